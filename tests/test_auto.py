"""Which recipe is chosen, what is shown, and that nothing remains of the others."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gpt2_edge import QuantizationError
from gpt2_edge.cli import main
from gpt2_edge.export import export_checkpoint
from gpt2_edge.folder import open_folder
from gpt2_edge.manifest import Manifest
from gpt2_edge.quantize import auto
from gpt2_edge.quantize.auto import Candidate, Speed, candidate_table, choose
from gpt2_edge.quantize.command import _percent
from gpt2_edge.quantize.recipes import RECIPES, Recipe

NAMES = ("int8-a", "int8-b", "int4-c")


@pytest.fixture(scope="module")
def recipes() -> list[Recipe]:
    return [replace(RECIPES["int8-block64"], name=name) for name in NAMES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory, write_checkpoint: Callable[..., Path]) -> Path:
    place = tmp_path_factory.mktemp("tiny")
    checkpoint = write_checkpoint(place / "checkpoint", n_layer=1, n_embd=16, n_head=2, n_positions=64)
    export_checkpoint(checkpoint, place / "fp32")
    return place / "fp32"


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    folder = tmp_path / "outputs"
    folder.mkdir()
    return folder


def candidate(recipe: Recipe, manifest: Manifest, decode: tuple[float, ...], increase: float, kld: float) -> Candidate:
    quality = {
        "perplexity_change_percent": increase,
        "perplexity_change_error_percent": 0.1,
        "mean_kl_divergence": kld,
        "same_top_percent": 97.0,
    }
    measured = replace(manifest, measured={"quality": quality})
    return Candidate(recipe, measured, Speed(decode), Speed((1000.0, 1100.0, 1200.0)))


def candidates(recipes: list[Recipe], tiny: Path) -> list[Candidate]:
    manifest = open_folder(tiny).manifest
    return [
        candidate(recipes[0], manifest, (99, 100, 101), 0.2, 0.001),
        candidate(recipes[1], manifest, (100, 101, 102), 0.5, 0.002),
        candidate(recipes[2], manifest, (198, 200, 202), 3.0, 0.03),
    ]


@pytest.mark.parametrize(
    ("budget", "chosen"),
    [
        (5.0, "int4-c"),
        (3.0, "int4-c"),
        (1.0, "int8-a"),  # as fast as int8-b as far as is known, and closer to full precision
        (0.3, "int8-a"),
    ],
)
def test_the_fastest_within_the_budget(budget: float, chosen: str, recipes: list[Recipe], tiny: Path) -> None:
    assert choose(candidates(recipes, tiny), budget).recipe.name == chosen


def test_a_difference_beyond_the_spread_counts(recipes: list[Recipe], tiny: Path) -> None:
    given = candidates(recipes, tiny)
    given[1] = replace(given[1], decode=Speed((110.0, 111.0, 112.0)))
    assert choose(given, 1.0).recipe.name == "int8-b"


def test_none_within_the_budget(recipes: list[Recipe], tiny: Path) -> None:
    with pytest.raises(QuantizationError, match=r"budget of \+0\.1 % .* int8-a, has \+0\.20 %; no folder was written"):
        choose(candidates(recipes, tiny), 0.1)


def test_nan_is_not_within_the_budget(recipes: list[Recipe], tiny: Path) -> None:
    manifest = open_folder(tiny).manifest
    with pytest.raises(QuantizationError):
        choose([candidate(recipes[0], manifest, (1.0,), float("nan"), 0.0)], 100.0)


def test_the_table_has_the_fastest_first(recipes: list[Recipe], tiny: Path) -> None:
    lines = candidate_table(candidates(recipes, tiny), 1.0)
    assert [line.split()[0] for line in lines] == ["recipe", "int4-c", "int8-b", "int8-a"]
    assert lines[1].endswith("over the budget")
    assert "200 ± 2" in lines[1]
    assert "+3.00 % ± 0.10" in lines[1]
    assert not lines[2].endswith("over the budget")


def test_only_the_chosen_folder_remains(
    recipes: list[Recipe], tiny: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = {"int8-a": 100.0, "int8-b": 300.0, "int4-c": 200.0}

    def measured(folders: list[Path]) -> list[tuple[Speed, Speed]]:
        return [(Speed((speeds[folder.name],) * 3), Speed((1.0, 1.0, 1.0))) for folder in folders]

    monkeypatch.setattr(auto, "_measure_speeds", measured)
    seen: list[str] = []
    chosen = auto.quantize_automatically(
        tiny, outputs / "auto", recipes, 50.0, on_measured=lambda found: seen.extend(each.recipe.name for each in found)
    )
    assert seen == list(NAMES)
    assert chosen.recipe.name == "int8-b"
    assert [path.name for path in outputs.iterdir()] == ["auto"]
    opened = open_folder(outputs / "auto")
    opened.check_hashes()
    assert opened.manifest == chosen.manifest
    assert opened.manifest.recipe is not None
    assert opened.manifest.recipe["name"] == "int8-b"
    assert {path.name for path in (outputs / "auto").iterdir()} == {
        *(entry.name for entry in opened.manifest.files),
        "manifest.json",
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, QuantizationError])
def test_nothing_remains_when_it_is_stopped(
    error: type[BaseException], recipes: list[Recipe], tiny: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(folders: list[Path]) -> None:
        assert all(folder.is_dir() for folder in folders)
        raise error

    monkeypatch.setattr(auto, "_measure_speeds", stop)
    with pytest.raises(error):
        auto.quantize_automatically(tiny, outputs / "auto", recipes[:1], 50.0)
    assert list(outputs.iterdir()) == []


def test_a_recipe_that_does_not_suit_the_model(
    recipes: list[Recipe], tiny: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = auto.quantize_folder

    def quantize(source: Path, destination: Path, recipe: Recipe, *more: object, cache: str) -> Manifest:
        if recipe.name == "int8-a":
            raise QuantizationError("it does not suit the model")
        return original(source, destination, recipe)

    monkeypatch.setattr(auto, "quantize_folder", quantize)
    failed: list[str] = []
    chosen = auto.quantize_automatically(
        tiny,
        outputs / "auto",
        recipes[:2],
        50.0,
        on_failed=lambda recipe, error: failed.append(f"{recipe.name}: {error}"),
    )
    assert failed == ["int8-a: it does not suit the model"]
    assert chosen.recipe.name == "int8-b"
    assert chosen.decode.mean > 0
    with pytest.raises(QuantizationError, match="does not suit"):
        auto.quantize_automatically(tiny, outputs / "none", recipes[:1], 50.0)
    assert [path.name for path in outputs.iterdir()] == ["auto"]


def test_a_source_that_is_quantized_already_is_refused_once(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "storyteller", "-o", str(outputs / "auto"), "--auto"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("gpt2-edge: storyteller is the bundled model, which is int8 already: ")
    assert said.count("\n") == 1
    assert list(outputs.iterdir()) == []


@pytest.mark.parametrize(("text", "percent"), [("1%", 1.0), ("0.01", 1.0), ("0.5%", 0.5), ("0", 0.0), ("0.99", 99.0)])
def test_budgets(text: str, percent: float) -> None:
    assert _percent(text) == pytest.approx(percent)


@pytest.mark.parametrize("text", ["-1%", "many", "nan", "inf", "%"])
def test_budgets_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "a", "-o", "b", "--auto", f"--max-perplexity-increase={text}"])
    assert "give one such as 1% or 0.01" in capsys.readouterr().err


def test_a_budget_that_is_likely_meant_in_percent(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["quantize", "a", "-o", "b", "--auto", "--max-perplexity-increase=1"])
    assert "'1' would be 100 %: write 1% if that many percent are meant" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--auto", "--recipe", "int8-block64"], "leave --recipe out"),
        (["--precision", "int8", "--max-perplexity-increase", "1%"], "is for --auto"),
        ([], "give --precision"),
    ],
)
def test_options_that_contradict(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "a", "-o", "b", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_the_command(
    tiny: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = RECIPES["int8-block64"]
    monkeypatch.setattr("gpt2_edge.quantize.command.RECIPES", {one.name: one})
    arguments = ["quantize", str(tiny), "-o", str(outputs / "auto"), "--auto", "--report", "-"]
    assert main([*arguments, "--max-perplexity-increase", "50%"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["recipe"]["name"] == one.name
    assert "decode tokens/s" in shown.err
