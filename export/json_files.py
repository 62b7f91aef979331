"""Read the small JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from gpt2_edge.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Raises:
        CheckpointError: It cannot be read, or holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    return document
