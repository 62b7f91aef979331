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


texts = [" princess", " wolf", " ship", " golden crown", " an old soldier"]
prompts = ["The king had a daughter, a beautiful", "They sailed across the sea in a", "On his head the king wore a"]
with gpt2_edge.load(sys.argv[1] if len(sys.argv) > 1 else "storyteller") as model:
    choices = [[*model.tokenize(text), *model.tokenize("<|endoftext|>")] for text in texts]
    for prompt in prompts:
        processor = OnlyChoices(choices, len(model.tokenize(prompt)))
        likeliest = model.generate(prompt, logits_processor=processor)
        drawn = model.generate(prompt, n=4, temperature=2.0, seed=7, logits_processor=processor)
        print(f"{prompt}{likeliest.text}; or, drawn, {[result.text for result in drawn]}")
