"""Let the model choose from a list: a logits processor allows only the tokens that lead to one of its texts.

Run: python examples/structured_choice.py [FOLDER]
"""

import math
import sys
from collections.abc import Sequence
from typing import Any

import gpt2_edge


class OnlyChoices:
    """Allows one of some token sequences after a prompt, and then the end of the text."""

    def __init__(self, choices: list[list[int]], prompt_length: int) -> None:
        self.choices = choices
        self.prompt_length = prompt_length

    def __call__(self, tokens: Sequence[int], logits: Any) -> None:
        """Forbid, in place, all tokens that lead nowhere; `logits` is a numpy array of shape [vocabulary]."""
        written = list(tokens[self.prompt_length :])
        allowed = [choice[len(written)] for choice in self.choices if choice[: len(written)] == written]
        kept = logits[allowed]
        logits[:] = -math.inf
        logits[allowed] = kept


texts = [" the king's daughter", " the king's son", " a little bird", " an old woman"]
with gpt2_edge.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller") as model:
    choices = [[*model.tokenize(text), *model.tokenize("<|endoftext|>")] for text in texts]
    for prompt in ("In the tree sat", "He married", "In the hut lived"):
        processor = OnlyChoices(choices, len(model.tokenize(prompt)))
        drawn = model.generate(prompt, n=4, temperature=1.0, seed=7, logits_processor=processor)
        print(f"{prompt} ... {[result.text for result in drawn]}")
