"""As many rows as the engine computes side by side: each gets what it gets alone."""

from typing import Any, Final

import pytest

import gpt2_edge
from gpt2_edge.core import row_seeds
from gpt2_edge.row_limit import MAXIMUM_ROWS

BEGINNINGS: Final = ["Once upon a time", "The king", "He", "My dear friend,"]
PROMPTS: Final = [BEGINNINGS[row % 4] + " and" * (row // 4) for row in range(MAXIMUM_ROWS)]
# Long enough for all to be there at once: one joins at each step.
NEW_TOKENS: Final = MAXIMUM_ROWS + 6


@pytest.mark.parametrize("options", [{}, {"temperature": 0.9, "top_k": 40}], ids=["greedy", "sampled"])
def test_rows_side_by_side_get_what_each_gets_alone(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with gpt2_edge.load("storyteller", device="cpu") as model:
        session = model._core.engine._session
        sizes = []
        decode = session.decode

        def recorded(tokens: Any, lengths: Any) -> Any:
            sizes.append(len(tokens))
            return decode(tokens, lengths)

        monkeypatch.setattr(session, "decode", recorded)
        options = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True, **options}
        together = model.generate(PROMPTS, seed=3, **options)
        assert max(sizes) == model._core.engine._most_rows
        for prompt, found, seed in list(zip(PROMPTS, together, row_seeds(3, MAXIMUM_ROWS), strict=True))[::9]:
            assert found.tokens == model.generate(prompt, seed=seed, **options).tokens
        assert session.slots == 1  # the memory of the others was given back
