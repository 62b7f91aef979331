"""Does this machine compute a model as it should? Its logits against golden ones, which no kernel had a part in.

`gpt2-edge quantize` computes the golden logits with NumPy from the integers that it wrote, and puts them into the
folder as `golden.json`. Kernels round activations each in its own way, so some difference is right; a processor whose
integer products saturate is further off.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, NamedTuple

import numpy as np

from gpt2_edge.decoded_logits import decoded_logits
from gpt2_edge.errors import MachineError, ModelFolderError
from gpt2_edge.folder import ModelFolder
from gpt2_edge.known_hashes import cache_folder
from gpt2_edge.model import Model
from gpt2_edge.onnxruntime_import import onnxruntime
from gpt2_edge.processor import describe_processor
from gpt2_edge.session import Logits

GOLDEN_NAME: Final = "golden.json"
GOLDEN_TOKENS: Final = 48
_GOLDEN_LOGITS: Final = 64  # of each position, spread over the vocabulary
_FORMAT_VERSION: Final = 1
_BATCH_PROMPTS: Final = (1, 7, 32)
_SHORT_BATCH_PROMPTS: Final = (1, 5, 8)  # few enough tokens to be computed as single ones are


@dataclass(frozen=True, slots=True)
class Golden:
    """What the logits of a folder should be.

    Attributes:
        tokens: A short text.
        token_ids: The tokens of the vocabulary whose logits are here.
        logits: After each token of the text; shape [tokens, token ids].
        tolerance: The largest difference that is right; see `difference`.
        decoded: The same where the tokens come one by one; None if that is computed in the same way.
    """

    tokens: tuple[int, ...]
    token_ids: tuple[int, ...]
    logits: tuple[tuple[float, ...], ...]
    tolerance: float
    decoded: "Golden | None" = None

    def difference(self, logits: Logits) -> float:
        """Return how far logits are off: the RMS of the differences as a fraction of the golden logits' spread.

        A constant that is added to all logits of a position changes no probability and does not count. The mean over
        the positions is returned; infinity if a logit is not finite.

        Args:
            logits: Shape [tokens, vocabulary].
        """
        golden = np.array(self.logits)
        differences = logits[:, list(self.token_ids)].astype(np.float64) - golden
        if not np.isfinite(differences).all():
            return float("inf")
        return float((differences.std(axis=1) / np.maximum(golden.std(axis=1), 1e-12)).mean())

    def to_json(self) -> str:
        """Return the text of `golden.json`."""
        return json.dumps({"format_version": _FORMAT_VERSION, **asdict(self)}) + "\n"


class Deviation(NamedTuple):
    """How far logits are off, and how far they may be; see `Golden.difference`."""

    difference: float
    tolerance: float


def make_golden(tokens: Sequence[int], logits: Logits, tolerance: float) -> Golden:
    """Keep a part of the logits of a reference, shape [tokens, vocabulary]."""
    vocabulary_size = logits.shape[1]
    ids = np.unique(np.linspace(0, vocabulary_size - 1, min(_GOLDEN_LOGITS, vocabulary_size)).astype(int))
    rows = tuple(tuple(float(f"{value:.7g}") for value in row) for row in logits[:, ids].tolist())
    return Golden(tuple(tokens), tuple(ids.tolist()), rows, tolerance)


def parse_golden(content: bytes, vocabulary_size: int, context_length: int) -> Golden:
    """Read and check a `golden.json`.

    Raises:
        ModelFolderError: It is not one, or not of this model.
    """
    try:
        document = json.loads(content)
        if document["format_version"] != _FORMAT_VERSION:
            raise ModelFolderError(f"{GOLDEN_NAME} has another format version: quantize the model again")
        golden = _golden(document, vocabulary_size, context_length)
        decoded = document.get("decoded")
        return golden if decoded is None else replace(golden, decoded=_golden(decoded, vocabulary_size, context_length))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ModelFolderError(
            f"{GOLDEN_NAME} does not hold golden logits: {error}; quantize the model again"
        ) from error


def _golden(document: dict[str, Any], vocabulary_size: int, context_length: int) -> Golden:
    tokens, ids = (np.array(document[name], np.int64) for name in ("tokens", "token_ids"))
    logits = np.array(document["logits"], np.float64)
    tolerance = float(document["tolerance"])
    fits = 0 < tokens.size <= context_length and logits.shape == (tokens.size, ids.size) and ids.size > 1
    known = all(each.min(initial=0) >= 0 and each.max(initial=0) < vocabulary_size for each in (tokens, ids))
    if tokens.ndim != 1 or ids.ndim != 1 or not fits or not known or not np.isfinite(logits).all() or not tolerance > 0:
        raise ModelFolderError(f"{GOLDEN_NAME} does not belong to this model: quantize the model again")
    return Golden(tuple(tokens.tolist()), tuple(ids.tolist()), tuple(map(tuple, logits.tolist())), tolerance)


def check_machine(model: Model, golden: Golden) -> dict[str, Deviation]:
    """Compute the golden text here: in one pass, token by token, and in a batch of rows that begin differently.

    Returns:
        How far each of the ways is off.

    Raises:
        MachineError: One is off by more than the tolerance.
    """
    one_by_one = golden if golden.decoded is None else golden.decoded
    batch_prompts = _BATCH_PROMPTS if golden.decoded is None else _SHORT_BATCH_PROMPTS
    (alone,) = decoded_logits(model, one_by_one.tokens, [1])
    batch = decoded_logits(model, one_by_one.tokens, [min(each, len(one_by_one.tokens)) for each in batch_prompts])
    found = {
        "prefill": Deviation(golden.difference(model.logits(golden.tokens)), golden.tolerance),
        "decode": Deviation(one_by_one.difference(alone), one_by_one.tolerance),
        "batch": Deviation(max(map(one_by_one.difference, batch)), one_by_one.tolerance),
    }
    for way, (difference, tolerance) in found.items():
        if difference > tolerance:
            raise MachineError(
                f"this machine computes the model wrongly: the logits of {way} differ from the golden ones by "
                f"{100 * difference:.2g} % of their spread, where {100 * tolerance:.2g} % is right; use another "
                "recipe or the fp32 folder here, and report the processor"
            )
    return found


def read_golden(folder: ModelFolder) -> Golden:
    """Return the golden logits of a folder.

    Raises:
        ModelFolderError: It has none.
    """
    if GOLDEN_NAME not in {entry.name for entry in folder.manifest.files}:
        raise ModelFolderError(
            f"{folder.path} has no {GOLDEN_NAME}, with which this machine could be checked: "
            + ("quantize the model again" if folder.manifest.recipe is not None else "only quantized folders have one")
        )
    shape = folder.manifest.architecture
    return parse_golden(folder.content(GOLDEN_NAME).read(), shape.vocabulary_size, shape.context_length)


def ensure_machine(model: Model, golden: Golden) -> None:
    """Check the machine as `check_machine` does, unless that was done before, for the same model and ONNX Runtime.

    Raises:
        MachineError: It computes the model wrongly.
    """
    key = repr((model.manifest.content_sha256, onnxruntime.__version__, model.device, describe_processor()))
    path = None
    with suppress(OSError):  # no cache folder, or one that may not be entered
        path = cache_folder() / "machine-checks" / hashlib.sha256(key.encode()).hexdigest()
        if path.exists():
            return
    check_machine(model, golden)
    if path is not None:
        with suppress(OSError):  # nor written to: the check is made again the next time
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
