"""The text that quality is measured over: a given one, the storyteller's held-out text, or what the model writes."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from gpt2_edge.errors import OptionError
from gpt2_edge.model import Model
from gpt2_edge.quantize.quality import WINDOW_TOKENS, windows_of

HELD_OUT_TITLE: Final = "the storyteller's held-out text (the excerpt that comes with gpt2-edge)"
OWN_TITLE: Final = "a text that the model wrote itself"
_HELD_OUT_NAME: Final = "held_out.txt"
# Of the storyteller's `tokenizer.json`, its "vocab" written with sorted keys and without spaces.
_STORYTELLER_VOCABULARY_SHA256: Final = "03b99765d2c69f009e6612be131ee0a88974f78ea9aaa025d9f204ceb726bcb8"
_OWN_TOKENS: Final = 256
_SEED: Final = 1


@dataclass(frozen=True, slots=True)
class QualityText:
    """What both models predict.

    Attributes:
        title: Which text it is.
        windows: Tokens; see `windows_of`.
    """

    title: str
    windows: Sequence[Sequence[int]]


def held_out_text() -> str:
    """Return the excerpt of the storyteller's held-out text that is installed with the package."""
    return (resources.files("gpt2_edge.quantize") / _HELD_OUT_NAME).read_text(encoding="utf-8")


def read_text(path: Path) -> str:
    """Read a text to measure quality over.

    Raises:
        OptionError: It cannot be read, is not UTF-8, or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise OptionError(f"cannot read the text {path}: {reason}") from error
    if not text.strip():
        raise OptionError(f"the text {path} is empty: give one of at least a few hundred words")
    return text


def choose_text(given: Path | None, model: Model, tokenizer_json: bytes) -> QualityText:
    """Return the given text; or the storyteller's held-out text if the model is of its kind; or the model's own.

    Fairy tales say little about a model of source code. Whether a model is of the storyteller's kind is told by its
    vocabulary, which fine-tuning leaves as it is. The model's own text fits any model and needs none from outside,
    but it is easier to predict than what people write.

    Args:
        given: A UTF-8 file; None if none was given.
        model: The full-precision model.
        tokenizer_json: The content of its `tokenizer.json`.

    Raises:
        OptionError: The text cannot be read.
        PromptError: The text is too short.
    """
    length = min(WINDOW_TOKENS, model.context_length)
    if given is not None:
        return QualityText(given.name, windows_of(model.tokenize(read_text(given)), length))
    if _has_vocabulary_of_storyteller(tokenizer_json):
        return QualityText(HELD_OUT_TITLE, windows_of(model.tokenize(held_out_text()), length))
    return QualityText(OWN_TITLE, [_own_text(model)])


def _own_text(model: Model) -> list[int]:
    start = model.manifest.end_of_text or 0
    count = min(_OWN_TOKENS, model.context_length) - 1
    text = model.generate([start], max_new_tokens=count, temperature=1.0, seed=_SEED, ignore_eos=True)
    return [start, *text.tokens]


def _has_vocabulary_of_storyteller(tokenizer_json: bytes) -> bool:
    vocabulary = json.loads(tokenizer_json).get("model", {}).get("vocab")
    canonical = json.dumps(vocabulary, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest() == _STORYTELLER_VOCABULARY_SHA256
