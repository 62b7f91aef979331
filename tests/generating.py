"""What tests of generating share: a text, every way of asking a model, and what the same answer is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from gpt2_edge import Generation, Model

STORYTELLER: Final = Path(__file__).resolve().parent.parent / "models" / "storyteller"
STORY: Final = (STORYTELLER / "calibration.txt").read_text(encoding="utf-8")[:6000]
CONTEXT: Final = 512
VOCABULARY: Final = 8192
END_OF_TEXT: Final = 0
SAMPLED: Final = {"temperature": 1.0, "top_k": 50, "seed": 11}

Logits = npt.NDArray[np.float32]
Follow = Callable[[Sequence[int]], None]


def story_tokens(model: Model, count: int, start: int = 0) -> list[int]:
    return model.tokenize(STORY)[start : start + count]


def assert_same(one: Generation, other: Generation, but_seed: bool = False) -> None:
    """All but the timings, and the seed where none was given."""
    assert (one.text, one.tokens, one.finish_reason) == (other.text, other.tokens, other.finish_reason)
    assert one.prompt_tokens == other.prompt_tokens
    assert but_seed or one.seed == other.seed


CALLS: Final[dict[str, Callable[[Model, Any], Any]]] = {
    "generate": lambda model, prompt: model.generate(prompt, max_new_tokens=2),
    "generate a list": lambda model, prompt: model.generate(["Once", prompt], max_new_tokens=2),
    "stream": lambda model, prompt: model.stream(prompt, max_new_tokens=2),
    "next_tokens": lambda model, prompt: model.next_tokens(prompt),
    "logits": lambda model, prompt: model.logits(prompt),
    "score": lambda model, prompt: model.score(prompt),
}


def calls_but(*left_out: str) -> pytest.MarkDecorator:
    names = [name for name in CALLS if name not in left_out]
    return pytest.mark.parametrize("call", [CALLS[name] for name in names], ids=names)


def write_words(path: Path, seed: int = 0, count: int = 1300) -> Path:
    """Write a text of random words."""
    words = ["the", "king", "said", "to", "his", "daughter", "a", "bird", "came", "and", "sang", "in", "garden", "."]
    path.write_text(" ".join(np.random.default_rng(seed).choice(words, count)), encoding="utf-8")
    return path
