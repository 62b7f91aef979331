"""Means, spreads, percentiles, ratios and verdicts, against values worked out by hand."""

from dataclasses import asdict, replace

import numpy as np
import pytest

from gpt2_edge.benchmarks.bandwidth import bytes_touched_per_token, parameters, read_bandwidth, weights_bytes
from gpt2_edge.benchmarks.chart_axes import linear_scale, logarithmic_scale, round_step
from gpt2_edge.benchmarks.comparison import NO_DIFFERENCE, judge
from gpt2_edge.benchmarks.perplexity import QualityTally, bench_windows
from gpt2_edge.benchmarks.spread import Measurement, measurement, percentile, supported_ratio, two_digits
from gpt2_edge.folder import open_folder
from gpt2_edge.quantize.recipes import RECIPES


def test_the_spread_is_the_sample_standard_deviation() -> None:
    # Deviations -1, 0, 1: sum of squares 2, divided by n - 1 = 2.
    assert measurement([9.0, 10.0, 11.0]) == Measurement(10.0, 1.0, (9.0, 10.0, 11.0))


def test_a_single_sample_has_no_spread() -> None:
    alone = measurement([5.0])
    assert alone.stddev is None
    assert alone.relative_spread is None
    assert not alone.disturbed


@pytest.mark.parametrize(("stddev", "disturbed"), [(10.0, False), (10.1, True)])
def test_disturbed_is_a_spread_above_ten_percent(stddev: float, disturbed: bool) -> None:
    assert Measurement(100.0, stddev, (1.0, 2.0, 3.0)).disturbed is disturbed


def test_percentiles_are_those_of_numpy() -> None:
    samples = [7.0, 1.0, 5.0, 2.0, 10.0]
    assert percentile(samples, 50) == 5.0
    assert percentile(samples, 95) == pytest.approx(9.4)  # place 3.8 between 7 and 10
    for percent in (0, 1, 33, 99, 100):
        assert percentile(samples, percent) == pytest.approx(float(np.percentile(samples, percent)))


def _of(mean: float, stddev: float | None, samples: int = 3) -> Measurement:
    return Measurement(mean, stddev, (mean,) * samples)


def test_a_ratio_has_the_range_that_the_spreads_allow() -> None:
    ratio = supported_ratio(_of(50, 1), _of(10, 0.2))
    assert ratio is not None
    assert ratio.value == 5.0
    assert ratio.lowest == pytest.approx(49 / 10.2)
    assert ratio.highest == pytest.approx(51 / 9.8)
    assert str(ratio) == "5.0 x"


def test_a_ratio_that_is_known_roughly_is_a_range() -> None:
    assert str(supported_ratio(_of(50, 10), _of(10, 2))) == "3.3 to 7.5 x"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (_of(11, 0.6), _of(10, 0.4)),  # 1.0 apart, together 1.0: they touch
        (_of(11, None, 1), _of(10, 0.1)),
        (_of(20, 0.1, 2), _of(10, 0.1, 2)),  # two samples prove nothing
        (_of(20, 1), None),
        (_of(20, 1), _of(5, 6)),
    ],
)
def test_no_ratio_without_support(one: Measurement | None, other: Measurement | None) -> None:
    assert supported_ratio(one, other) is None
    assert supported_ratio(other, one) is None


@pytest.mark.parametrize(("value", "text"), [(5.06, "5.1"), (0.934, "0.93"), (23.7, "24"), (512.4, "512"), (0.0, "0")])
def test_two_digits(value: float, text: str) -> None:
    assert two_digits(value) == text


def test_verdicts_need_a_difference_beyond_the_spread() -> None:
    assert judge("m", "tg128", before=_of(100, 2), now=_of(120, 2)).verdict == "faster"
    assert judge("m", "tg128", before=_of(100, 2), now=_of(80, 2)).verdict == "slower"
    assert judge("m", "tg128", before=_of(100, 2), now=_of(103, 2)).verdict == NO_DIFFERENCE
    assert "fewer than 3" in judge("m", "tg128", before=_of(100, None, 1), now=_of(200, 2)).verdict


def test_less_time_is_faster() -> None:
    verdict = judge("m", "time", before=_of(2.0, 0.01), now=_of(1.0, 0.01), less_is_faster=True)
    assert (verdict.verdict, verdict.times_as_fast) == ("faster", "2.0 x")


def test_quality_adds_windows_up() -> None:
    tally = QualityTally()
    tally.add(
        {
            "logprobs": [-1.0, -2.0],
            "reference_logprobs": [-0.9, -1.7],
            "divergences": [0.1, 0.3],
            "same_top": [True, False],
        }
    )
    tally.add({"logprobs": [-3.0], "reference_logprobs": [-2.8], "divergences": [0.5], "same_top": [True]})
    quality = tally.quality("text", "reference")
    assert quality.tokens == 3
    assert quality.perplexity == pytest.approx(np.exp(2.0))
    assert quality.perplexity_change_percent == pytest.approx(100 * (np.exp(0.2) - 1))
    # The deviation of 0.1, 0.3, 0.2 is 0.1.
    assert quality.perplexity_change_error_percent == pytest.approx(100 * np.exp(0.2) * 0.1 / np.sqrt(3))
    assert quality.mean_kl_divergence == pytest.approx(0.3)
    assert quality.same_top_percent == pytest.approx(200 / 3)


def test_quality_of_a_model_without_a_reference() -> None:
    tally = QualityTally()
    tally.add({"logprobs": [-1.0, -3.0]})
    quality = tally.quality("text", None)
    assert (quality.tokens, quality.perplexity) == (2, pytest.approx(np.exp(2.0)))
    assert quality.mean_kl_divergence is None


def test_windows_fit_the_context_and_the_number_of_tokens() -> None:
    assert bench_windows(range(11), context_length=5, most_tokens=100) == [[0, 1, 2, 3, 4], [6, 7, 8, 9, 10]]
    assert bench_windows(range(11), context_length=5, most_tokens=7) == [[0, 1, 2, 3, 4]]
    assert bench_windows(range(11), context_length=100, most_tokens=7) == [[0, 1, 2, 3, 4, 5, 6]]
    assert bench_windows(range(11), context_length=100, most_tokens=1) == [[0, 1]]


def test_bytes_touched_by_a_token_of_the_storyteller() -> None:
    manifest = open_folder("storyteller").manifest
    assert parameters(manifest) == 6_967_296  # as the model's card says
    # Without the 512 x 256 float positions, of which a token reads one row.
    assert bytes_touched_per_token(manifest, 0) == weights_bytes(manifest) - 4 * 512 * 256
    # 6 layers, keys and values of 256 floats for each token before.
    assert bytes_touched_per_token(manifest, 100) - bytes_touched_per_token(manifest, 0) == 6 * 2 * 256 * 4 * 100
    integers = replace(manifest, cache_precision="int8")
    assert bytes_touched_per_token(integers, 100) - bytes_touched_per_token(integers, 0) == 6 * 2 * 256 * 100
    assert manifest.recipe is not None
    twofold = replace(manifest, recipe={**manifest.recipe, "prompt": {"bits": 8}})
    for_prompts = 6 * 12 * 256 * 256
    assert bytes_touched_per_token(manifest, 0) - bytes_touched_per_token(twofold, 0) == for_prompts
    # Of a head that is no embedding, too, the lookup's share is one of what is left without those for prompts.
    untied = replace(manifest, architecture=replace(manifest.architecture, tied_head=False))
    smaller = replace(untied, files=(replace(manifest.files[0], name="model.onnx", size_bytes=9_000_000),))
    larger = replace(untied, files=(replace(smaller.files[0], size_bytes=9_000_000 + for_prompts),))
    assert bytes_touched_per_token(replace(larger, recipe=twofold.recipe), 0) == bytes_touched_per_token(smaller, 0)


def test_scales_that_are_stored_in_16_bits_are_read_in_32() -> None:
    manifest = replace(open_folder("storyteller").manifest, recipe=asdict(RECIPES["int4"]))
    stored = weights_bytes(manifest) - 2 * 512 * 256
    # A scale for 32 of the weights of 6 layers and of half of the head, and for 64 of its other half.
    scales = 6 * 12 * 256 * 256 / 32 + 8192 * 256 * (0.5 / 32 + 0.5 / 64)
    assert bytes_touched_per_token(manifest, 0) == stored + 2 * scales
    closer = replace(manifest, recipe=asdict(RECIPES["int4-close"]))
    scales = 6 * (3 + 4) * 256 * 256 / 32 + 6 * (1 + 4) * 256 * 256 / 64 + 8192 * 256 * (0.25 / 32 + 0.75 / 64)
    assert bytes_touched_per_token(closer, 0) == stored + 2 * scales


def test_bandwidth_counts_the_bytes_that_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2_edge.benchmarks.bandwidth._pass_seconds", lambda _, parts: 0.5 * len(parts))
    assert read_bandwidth(4000, threads=2) == 4000.0


def test_axes_end_on_round_values() -> None:
    assert [round_step(each) for each in (0.3, 1.0, 21, 50)] == [0.5, 1.0, 50.0, 50.0]
    scale = linear_scale(0, 187, 0, 100)
    assert scale.ticks == (0, 50, 100, 150, 200)
    assert scale.at(50) == 25
    logarithmic = logarithmic_scale(1.2, 40, 0, 100)
    assert logarithmic.ticks == (1, 2, 5, 10, 20, 50)
    assert (logarithmic.at(1), logarithmic.at(50)) == (0, 100)
