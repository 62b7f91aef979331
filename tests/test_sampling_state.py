"""What a chooser of tokens keeps from one token to the next: what was said, and its place in the random numbers."""

import threading
from typing import Final

import numpy as np
import pytest
from sampling_reference import (
    SLACK,
    Float32s,
    Float64s,
    Options,
    Probe,
    changed_logits,
    reference_drawn,
    reference_logits,
)

from gpt2_edge import GenerationOptions
from gpt2_edge.choosing import TokenChooser
from gpt2_edge.random_uniform import RandomUniform
from gpt2_edge.sampling import draw_index, keep

# State.


def test_a_growing_continuation_equals_a_new_chooser_each_time() -> None:
    """Tokens are appended, taken back and replaced, in the lists that the chooser was given and in new ones."""
    options = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3, "no_repeat_ngram_size": 2}
    rng = np.random.default_rng(8)
    logits = rng.normal(0, 2, 40).astype(np.float32)
    probe = Probe()
    chooser = TokenChooser(GenerationOptions(**options, logits_processor=probe), 1, [])
    prompt, said = [1, 2, 3], [4]
    for _ in range(400):
        match int(rng.integers(0, 10)):
            case 0:
                del said[len(said) - int(rng.integers(0, len(said) + 1)) :]
            case 1:
                said = rng.integers(0, 15, len(said)).tolist()
            case 2:
                prompt[int(rng.integers(0, 3))] = int(rng.integers(0, 15))
            case 3 if len(said) > 2:
                said[int(rng.integers(0, len(said) - 1))] = int(rng.integers(0, 15))  # same length, same last token
            case 4:
                prompt, said = (prompt + said)[-3:], []
            case _:
                said.append(int(rng.integers(0, 15)))
        chooser.choose(logits, prompt, tuple(said) if rng.random() < 0.2 else said)
        exact = reference_logits(logits, options, prompt, said, [])
        np.testing.assert_allclose(probe.logits, exact, rtol=1e-5, atol=1e-5)


def test_a_long_history() -> None:
    """More different tokens than the history has room for at first."""
    rng = np.random.default_rng(9)
    logits = rng.normal(0, 2, 5_000).astype(np.float32)
    prompt, said = rng.permutation(5_000)[:700].tolist(), rng.integers(0, 5_000, 900).tolist()
    options = {"repetition_penalty": 1.3, "frequency_penalty": 0.3, "no_repeat_ngram_size": 2}
    exact = reference_logits(logits, options, prompt, said, [])
    np.testing.assert_allclose(changed_logits(logits, options, prompt, said), exact, rtol=1e-5, atol=1e-5)


# Random numbers.


SAMPLED: Final = GenerationOptions(temperature=1.1, top_p=0.97, frequency_penalty=0.2)


def arithmetic_logits(size: int, step: int) -> Float32s:
    """Logits that are the same numbers everywhere: whole numbers divided by 64."""
    return ((np.arange(size) * (7919 + 2 * step) + 31 * step) % 509 / 64).astype(np.float32)


def continue_with(chooser: TokenChooser, said: list[int], count: int) -> list[int]:
    """Choose `count` more tokens."""
    said = list(said)
    for step in range(len(said), len(said) + count):
        said.append(chooser.choose(arithmetic_logits(600, step), [1, 2, 3], said))
    return said


@pytest.mark.parametrize("drawn_before", range(10))
def test_a_chooser_goes_on_from_a_position(drawn_before: int) -> None:
    whole = continue_with(TokenChooser(SAMPLED, 5, []), [], 20)
    first = TokenChooser(SAMPLED, 5, [])
    said = continue_with(first, [], drawn_before)
    assert first.position == drawn_before
    second = TokenChooser(SAMPLED, 5, [], position=first.position)
    assert second.position == drawn_before
    assert continue_with(second, said, 20 - drawn_before) == whole
    assert second.position == 20


def test_positions_far_ahead() -> None:
    uniform = RandomUniform(3)
    numbers = [uniform.draw() for _ in range(1_000)]
    assert [RandomUniform(3, position).draw() for position in range(0, 1_000, 37)] == numbers[::37]
    assert RandomUniform(3, 2**70).position == 2**70


def test_a_seed_gives_the_same_tokens_whatever_else_runs() -> None:
    alone = {seed: continue_with(TokenChooser(SAMPLED, seed, []), [], 40) for seed in range(8)}
    assert len({tuple(tokens) for tokens in alone.values()}) == 8

    taking_turns: dict[int, list[int]] = {seed: [] for seed in range(8)}
    choosers = {seed: TokenChooser(SAMPLED, seed, []) for seed in range(8)}
    for _ in range(40):
        for seed, chooser in choosers.items():
            taking_turns[seed] = continue_with(chooser, taking_turns[seed], 1)
    assert taking_turns == alone

    together: dict[int, list[int]] = {}

    def run(seed: int) -> None:
        np.random.seed(seed)  # numpy's global generator must not matter
        together[seed] = continue_with(TokenChooser(SAMPLED, seed, []), [], 40)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in alone]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


ALL_AT_ONCE: Final[Options] = {
    "temperature": 0.9,
    "top_k": 200,
    "top_p": 0.95,
    "min_p": 0.02,
    "typical_p": 0.9,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.25,
    "no_repeat_ngram_size": 2,
    "logit_bias": {7: 4.0},
    "banned_tokens": [0, 1],
}
GOLDEN: Final[list[tuple[Options, list[int]]]] = [
    ({}, [138, 306, 302, 449, 336, 228, 204, 112, 442, 262, 4, 448]),
    ({"temperature": 1.0}, [451, 393, 499, 496, 315, 447, 271, 209, 84, 358, 189, 443]),
    ({"top_k": 20}, [457, 411, 484, 463, 329, 434, 302, 182, 67, 353, 158, 438]),
    ({"top_p": 0.9, "temperature": 0.8}, [448, 393, 505, 491, 315, 446, 271, 209, 84, 358, 188, 443]),
    ({"min_p": 0.3}, [455, 393, 505, 491, 315, 446, 271, 204, 84, 358, 183, 443]),
    ({"typical_p": 0.5}, [446, 386, 498, 498, 313, 446, 276, 204, 89, 351, 193, 471]),
    (ALL_AT_ONCE, [43, 7, 505, 491, 315, 434, 271, 204, 84, 358, 183, 443]),
]


@pytest.mark.parametrize(("options", "expected"), GOLDEN, ids=[", ".join(options) for options, _ in GOLDEN])
def test_golden_tokens(options: Options, expected: list[int]) -> None:
    """A stored seed must give the same tokens in every release and on every machine."""
    assert continue_with(TokenChooser(GenerationOptions(**options), 2024, []), [], 12) == expected


# Quantiles of the chi-squared distribution at 0.1 %: a right sampler fails once in a thousand seeds.
CRITICAL: Final = {22: 48.268, 49: 85.351}


def assert_fits(tokens: list[int], probabilities: Float64s) -> None:
    possible = probabilities > 0
    counts = np.bincount(tokens, minlength=probabilities.size)
    assert counts[~possible].sum() == 0
    expected = len(tokens) * probabilities[possible]
    statistic = float(((counts[possible] - expected) ** 2 / expected).sum())
    assert statistic < CRITICAL[int(possible.sum()) - 1]


def test_100_000_chosen_tokens_follow_the_distribution() -> None:
    logits = np.random.default_rng(10).normal(0, 1, 50).astype(np.float32)
    chooser = TokenChooser(GenerationOptions(temperature=1.3), 77, [])
    tokens = [chooser.choose(logits, [0], ()) for _ in range(100_000)]
    assert_fits(tokens, reference_drawn(logits.astype(np.float64), {"temperature": 1.3}).probabilities)


def test_100_000_draws_follow_the_narrowed_distribution() -> None:
    logits = np.random.default_rng(11).normal(0, 1.2, 50_257).astype(np.float32)
    options = {"temperature": 0.7, "top_k": 60, "top_p": 0.9, "min_p": 0.05, "typical_p": 0.62}
    token_ids, weights = keep(logits, **options)
    assert token_ids is not None
    uniform = RandomUniform(78)
    tokens = [int(token_ids[draw_index(weights, uniform.draw())]) for _ in range(100_000)]
    exact = reference_drawn(logits.astype(np.float64), options)
    assert exact.margin > SLACK
    assert_fits(tokens, exact.probabilities)
