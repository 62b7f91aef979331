"""What quantization cost: each statistic against values worked out by hand or with a loop, and where they are shown."""

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

import gpt2_edge
from gpt2_edge import LogitsError, OptionError, PromptError
from gpt2_edge.cli import main
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import Manifest
from gpt2_edge.quality_table import quality_rows
from gpt2_edge.quantize import quality as quality_module
from gpt2_edge.quantize import texts
from gpt2_edge.quantize.measurement import measure_folder
from gpt2_edge.quantize.pipeline import quantize_folder
from gpt2_edge.quantize.quality import (
    PositionStatistics,
    Quality,
    compare_greedy_texts,
    compare_logits,
    measure_quality,
    summarize,
    windows_of,
)
from gpt2_edge.quantize.recipes import default_recipe

FloatArray = npt.NDArray[np.float32]
REPOSITORY: Final = Path(__file__).resolve().parent.parent


def statistics_of(full: list[float], quantized: list[float], divergences: list[float], same: list[bool]) -> Quality:
    arrays = [np.array(each) for each in (full, quantized, divergences)]
    return summarize([PositionStatistics(arrays[0], arrays[1], arrays[2], np.array(same))])


# ---- position by position ----


def test_divergence_by_hand() -> None:
    """KL((1/2, 1/2) from (1/4, 3/4)) is 1/2 ln 2 + 1/2 ln 2/3; logits may be shifted."""
    exact = np.log(np.array([[0.5, 0.5], [0.9, 0.1], [0.2, 0.8]], np.float32))
    rounded = np.log(np.array([[0.25, 0.75], [0.9, 0.1], [0.8, 0.2]], np.float32)) + np.float32(30)
    compared = compare_logits(exact, rounded, [1, 0, 0])
    first = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    third = 0.2 * math.log(0.25) + 0.8 * math.log(4)
    np.testing.assert_allclose(compared.divergences, [first, 0, third], atol=1e-6)
    np.testing.assert_allclose(np.exp(compared.full_precision_logprobs), [0.5, 0.9, 0.2], atol=1e-6)
    np.testing.assert_allclose(np.exp(compared.logprobs), [0.75, 0.9, 0.8], atol=1e-6)
    assert compared.same_top.tolist() == [False, True, False]  # in the first, the tie goes to token 0


def test_divergence_is_that_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are those of Python's exact `fsum`, and where the blocks end makes no difference."""
    random = np.random.default_rng(0)
    exact = (4 * random.normal(size=(11, 60)) - 90).astype(np.float32)
    rounded = exact + random.normal(size=exact.shape).astype(np.float32) / 10
    following = random.integers(0, 60, 11).tolist()
    monkeypatch.setattr(quality_module, "_BLOCK_NUMBERS", 250)  # blocks of 4 positions
    compared = compare_logits(exact, rounded, following)

    def log_probabilities(row: FloatArray) -> list[float]:
        total = math.log(math.fsum(math.exp(float(value)) for value in row))
        return [float(value) - total for value in row]

    for position in range(11):
        p, q = log_probabilities(exact[position]), log_probabilities(rounded[position])
        divergence = math.fsum(math.exp(one) * (one - other) for one, other in zip(p, q, strict=True))
        assert compared.divergences[position] == pytest.approx(divergence, abs=1e-12)
        assert compared.full_precision_logprobs[position] == pytest.approx(p[following[position]], abs=1e-12)
        assert compared.logprobs[position] == pytest.approx(q[following[position]], abs=1e-12)


def test_equal_models_have_no_divergence() -> None:
    logits = np.random.default_rng(1).normal(size=(5, 999)).astype(np.float32) * 20
    compared = compare_logits(logits, logits.copy(), [0] * 5)
    assert compared.divergences.tolist() == [0] * 5
    assert compared.same_top.all()
    quality = summarize([compared])
    assert quality.perplexity_change_percent == quality.rms_probability_change_percent == 0


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_logits_that_are_not_finite(which: int, number: float) -> None:
    both = [np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32)]
    both[which][1, 2] = number
    with pytest.raises(LogitsError, match="not finite"):
        compare_logits(both[0], both[1], [0, 0])


# ---- over all positions ----


def test_statistics_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/8 become 1/4, 1/4, 1/4."""
    halves = [math.log(1 / 2), math.log(1 / 4), math.log(1 / 8)]
    quarters = [math.log(1 / 4)] * 3
    quality = statistics_of(halves, quarters, [0.1, 0.3, 0.5], [True, True, False])
    assert quality.tokens == 3
    assert quality.full_precision_perplexity == pytest.approx(4)
    assert quality.perplexity == pytest.approx(4)
    assert quality.perplexity_change_percent == pytest.approx(0)
    # Differences ln 2, 0, -ln 2: deviation ln 2.
    assert quality.perplexity_change_error_percent == pytest.approx(100 * math.log(2) / math.sqrt(3))
    assert quality.mean_kl_divergence == pytest.approx(0.3)
    assert quality.mean_kl_divergence_error == pytest.approx(0.2 / math.sqrt(3))
    assert quality.same_top_percent == pytest.approx(200 / 3)
    # As llama-perplexity has it: sqrt(p (1 - p) / (n - 1)).
    assert quality.same_top_error_percent == pytest.approx(100 * math.sqrt(2 / 3 * 1 / 3 / 2))
    # -1/4, 0, 1/8: mean -1/24, mean square 5/192.
    assert quality.mean_probability_change_percent == pytest.approx(-100 / 24)
    assert quality.rms_probability_change_percent == pytest.approx(100 * math.sqrt(5 / 192))
    squares = np.array([1 / 16, 0, 1 / 64])
    error = squares.std(ddof=1) / math.sqrt(3) / (2 * math.sqrt(5 / 192))
    assert quality.rms_probability_change_error_percent == pytest.approx(100 * error)


def test_percentiles() -> None:
    quality = statistics_of([-1.0] * 1001, [-1.0] * 1001, [each / 1000 for each in range(1001)], [True] * 1001)
    found = (
        quality.median_kl_divergence,
        quality.kl_divergence_90,
        quality.kl_divergence_95,
        quality.kl_divergence_99,
        quality.kl_divergence_99_9,
        quality.largest_kl_divergence,
    )
    np.testing.assert_allclose(found, [0.5, 0.9, 0.95, 0.99, 0.999, 1.0])


def test_windows_are_summed_up_by_position() -> None:
    one = statistics_of([-1.0, -2.0, -3.0], [-1.5, -2.0, -4.0], [0.1, 0.2, 0.9], [True, False, True])
    parts = [
        PositionStatistics(np.array(full), np.array(small), np.array(divergences), np.array(same))
        for full, small, divergences, same in (
            ([-1.0], [-1.5], [0.1], [True]),
            ([-2.0, -3.0], [-2.0, -4.0], [0.2, 0.9], [False, True]),
        )
    ]
    assert summarize(parts) == one


def test_a_single_position_has_no_error() -> None:
    quality = statistics_of([-1.0], [-2.0], [0.5], [True])
    assert quality.perplexity_change_percent == pytest.approx(100 * (math.e - 1))
    assert quality.mean_kl_divergence_error == 0


def test_a_ruined_model_has_a_finite_perplexity() -> None:
    assert math.isfinite(statistics_of([-1.0, -1.0], [-5000.0, -5000.0], [1.0, 1.0], [True, True]).perplexity)


# ---- windows and texts ----


def test_windows_are_spread_over_the_text() -> None:
    assert windows_of(range(10), 4) == [[0, 1, 2, 3], [6, 7, 8, 9]]
    assert windows_of(range(100), 2, most_windows=3) == [[0, 1], [49, 50], [98, 99]]
    assert windows_of(range(3), 512) == [[0, 1, 2]]
    windows = windows_of(range(1000), 7)
    assert len(windows) == 24
    assert all(later[0] > earlier[-1] for earlier, later in pairwise(windows))
    assert (windows[0][0], windows[-1][-1]) == (0, 999)


@pytest.mark.parametrize("tokens", [[], [7]])
def test_a_text_too_short(tokens: list[int]) -> None:
    with pytest.raises(PromptError, match="at least 2"):
        windows_of(tokens, 512)


def test_the_excerpt_is_the_beginning_of_the_held_out_text() -> None:
    text = (REPOSITORY / "models" / "storyteller" / "held_out.txt").read_text(encoding="utf-8")
    excerpt = texts.held_out_text()
    assert len(excerpt) > 20_000
    assert text.startswith(excerpt)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    checkpoint = write_checkpoint(place / "checkpoint", n_layer=1, n_embd=16, n_head=2, n_positions=64)
    export_checkpoint(checkpoint, place / "fp32")
    return place / "fp32"


def test_choosing_a_text(tiny: Path, tmp_path: Path) -> None:
    given = tmp_path / "given.txt"
    given.write_text("Once upon a time there was a text. " * 40)
    tokenizer_json = (tiny / "tokenizer.json").read_bytes()
    document = json.loads(tokenizer_json)
    document["model"]["vocab"]["another"] = document["model"]["vocab"].pop("the")
    with gpt2_edge.load(tiny) as model:
        chosen = texts.choose_text(given, model, tokenizer_json)
        assert chosen.title == "given.txt"
        assert chosen.windows == windows_of(model.tokenize(given.read_text()), 64)
        chosen = texts.choose_text(None, model, tokenizer_json)
        assert "storyteller's held-out text" in chosen.title
        assert chosen.windows[0] == model.tokenize(texts.held_out_text()[:1000])[:64]
        chosen = texts.choose_text(None, model, json.dumps(document).encode())
        assert chosen.title == "a text that the model wrote itself"
        (window,) = chosen.windows
        assert len(window) == 64


@pytest.mark.parametrize(("content", "said"), [(None, "cannot read"), (b"\xff", "cannot read"), (b" \n", "is empty")])
def test_texts_that_cannot_be_used(content: bytes | None, said: str, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=said):
        quantize_folder(tiny, tmp_path / "out" / "int8", default_recipe("int8"), text=path)
    assert not (tmp_path / "out").exists()


# ---- two models ----


def test_quality_of_the_storyteller(fp32_model: gpt2_edge.Model, int8_model: gpt2_edge.Model) -> None:
    """Against the models' own scores, which go another way."""
    tokens = fp32_model.tokenize(texts.held_out_text())
    windows = windows_of(tokens, 128, most_windows=4)
    steps: list[None] = []
    quality = measure_quality(fp32_model, int8_model, windows, lambda: steps.append(None))
    assert len(steps) == 4
    scores = [[model.score(window) for window in windows] for model in (fp32_model, int8_model)]
    exact, rounded = (np.concatenate([score.logprobs for score in each]) for each in scores)
    assert quality.tokens == 4 * 127
    assert quality.full_precision_perplexity == pytest.approx(np.exp(-exact.mean()), rel=1e-5)
    assert quality.perplexity == pytest.approx(np.exp(-rounded.mean()), rel=1e-5)
    changes = exact - rounded
    assert quality.perplexity_change_percent == pytest.approx(100 * np.expm1(changes.mean()), abs=1e-3)
    error = 100 * np.exp(changes.mean()) * changes.std(ddof=1) / np.sqrt(len(changes))
    assert quality.perplexity_change_error_percent == pytest.approx(error, rel=1e-3)
    probabilities = np.exp(rounded) - np.exp(exact)
    assert quality.rms_probability_change_percent == pytest.approx(100 * np.sqrt((probabilities**2).mean()), rel=1e-3)
    assert 0 < quality.median_kl_divergence < quality.mean_kl_divergence < 0.004
    assert 94 < quality.same_top_percent < 100


def test_greedy_texts(fp32_model: gpt2_edge.Model, int8_model: gpt2_edge.Model) -> None:
    windows = windows_of(fp32_model.tokenize(texts.held_out_text()), 64, most_windows=9)
    same = compare_greedy_texts(fp32_model, fp32_model, windows)
    assert (same.tokens, same.first_divergent_tokens, same.first_divergent_in_batch) == (64, (64,) * 4, (64,) * 4)
    found = compare_greedy_texts(fp32_model, int8_model, windows)
    assert len(found.first_divergent_tokens) == 4
    for window, place in zip(windows[::2], found.first_divergent_tokens, strict=False):
        texts_of = [
            model.generate(window[:32], max_new_tokens=64, ignore_eos=True).tokens for model in (fp32_model, int8_model)
        ]
        assert texts_of[0][:place] == texts_of[1][:place]
        assert place == 64 or texts_of[0][place] != texts_of[1][place]
    assert min(found.first_divergent_tokens) < 64
    assert found.first_divergent_in_batch == (64,) * 4


def test_measuring_twice_gives_the_same(storyteller_fp32: Path, storyteller_int8: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(texts.held_out_text()[:4000], encoding="utf-8")
    one, other = (measure_folder(storyteller_fp32, storyteller_int8, text) for _ in range(2))
    assert one.document() == other.document()
    assert json.loads(json.dumps(one.document())) == one.document()
    assert one.text == "text.txt"


# ---- where it is shown ----


@pytest.fixture(scope="module")
def measured(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    folder = tmp_path_factory.mktemp("measured") / "int8"
    return folder, quantize_folder(tiny, folder, default_recipe("int8"))


def test_the_manifest_has_the_quality(measured: tuple[Path, Manifest]) -> None:
    folder, manifest = measured
    quality = open_folder(folder).manifest.measured["quality"]
    assert quality == manifest.measured["quality"]
    assert quality["windows"] == 24
    assert quality["tokens"] == 24 * 63
    assert set(Quality.__slots__) < set(quality)
    assert len(quality["first_divergent_tokens"]) == 4


def test_the_table_has_every_number(measured: tuple[Path, Manifest]) -> None:
    quality = measured[1].measured["quality"]
    rows = dict(quality_rows(quality))
    assert rows["text"].startswith("1,512 tokens of the storyteller's held-out text")
    assert rows["mean KLD"] == (
        f"{quality['mean_kl_divergence']:.5f} ± {quality['mean_kl_divergence_error']:.5f} nats a token"
    )
    assert f"{quality['perplexity_change_percent']:+.2f} ± " in rows["perplexity"]
    assert (
        f"99.9 % {quality['kl_divergence_99_9']:.5f}, maximum {quality['largest_kl_divergence']:.5f}"
        in (rows["KLD percentiles"])
    )
    assert f"{quality['same_top_percent']:.2f} ± {quality['same_top_error_percent']:.2f} %" == rows["same top token"]
    assert rows["greedy text"].startswith("first divergent token of 4 texts of 32: ")
    assert set(rows) == {
        *(
            "text",
            "perplexity",
            "mean KLD",
            "KLD percentiles",
            "same top token",
            "mean Δp",
            "RMS Δp",
            "greedy text",
            "rows of a batch",
        )
    }


def test_the_table_of_a_strange_manifest() -> None:
    assert quality_rows({}) == []
    strange: dict[str, Any] = {"tokens": "many", "mean_kl_divergence": [1], "first_divergent_tokens": 3, "text": None}
    assert quality_rows(strange) == []
    assert quality_rows({"mean_kl_divergence": 1.0}) == [("mean KLD", "1.00000 nats a token")]


def test_info_shows_the_quality(measured: tuple[Path, Manifest], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(measured[0])]) == 0
    shown = capsys.readouterr().out
    for name, value in quality_rows(measured[1].measured["quality"]):
        assert f"quality: {name}" in shown
        assert value in shown


def test_report_as_a_table(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "words.txt"
    text.write_text(texts.held_out_text()[:3000], encoding="utf-8")
    arguments = ["quantize", str(tiny), "-o", str(tmp_path / "int8"), "--precision", "int8"]
    assert main([*arguments, "--text", str(text), "--report"]) == 0
    shown = capsys.readouterr().out
    assert "tokens of words.txt it is" in shown
    assert "KLD percentiles" in shown


@pytest.mark.parametrize("target", ["-", "report.json"])
def test_report_as_json(target: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = target if target == "-" else str(tmp_path / target)
    arguments = ["quantize", str(tiny), "-o", str(tmp_path / "int8"), "--precision", "int8", "--report", target]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    document = json.loads(shown if target == "-" else Path(target).read_text(encoding="utf-8"))
    manifest = open_folder(tmp_path / "int8").manifest
    assert document["quality"] == manifest.measured["quality"]
    assert document["content_sha256"] == manifest.content_sha256


def test_report_that_would_swallow_the_folder(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", "--report", str(tiny), "-o", "nowhere", "--precision", "int8"])
    assert stopped.value.code == 2
    assert "put FOLDER before --report" in capsys.readouterr().err


def test_a_vocabulary_of_50257_needs_no_gigabytes() -> None:
    """Two windows' worth of logits are given; what is added must be far less than they are."""
    import tracemalloc

    logits = np.zeros((512, 50_257), np.float32)
    logits[:, 3] = 1
    tracemalloc.start()
    compare_logits(logits, logits, [0] * 512)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000_000


def test_where_texts_part() -> None:
    assert quality_module._first_divergent([[1, 2, 3], [4, 5, 6], [7]], [[1, 2, 3], [4, 9, 6], [8]]) == (3, 1, 0)
