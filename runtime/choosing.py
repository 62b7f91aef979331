"""Choose the next token of one sequence: its options, its random numbers, what it has said so far."""

from collections.abc import Sequence
from dataclasses import dataclass

from gpt2_edge.options import GenerationOptions
from gpt2_edge.results import TokenLogprobs
from gpt2_edge.sampling import Logits, RandomUniform, choose_token


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token, and its log-probabilities if the options ask for them."""

    token: int
    logprobs: TokenLogprobs | None


class TokenChooser:
    """Chooses the tokens of one continuation, one after another.

    Args:
        options: How to choose.
        seed: Of the random numbers.
        final_tokens: Tokens that may end the continuation, which `min_new_tokens` holds back.
    """

    def __init__(self, options: GenerationOptions, seed: int, final_tokens: Sequence[int], position: int = 0) -> None:
        self._options = options
        self._uniform = RandomUniform(seed)
        self.position = position
        for _ in range(position):
            self._uniform.draw()
        self._final_tokens = final_tokens

    def choose(self, logits: Logits, prompt: Sequence[int], continuation: Sequence[int]) -> Choice:
        """Choose the next token.

        Args:
            logits: Raw logits, shape [vocabulary]; not changed.
            prompt: Tokens of the prompt.
            continuation: Tokens chosen so far.
        """
        self.position += self._options.effective_temperature > 0
        return Choice(choose_token(logits, self._options, self._uniform), None)
