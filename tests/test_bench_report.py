"""The report: its JSON, its tables, its page, and what it must not claim. The numbers here are made up."""

import csv
import errno
import io
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from xml.etree import ElementTree

import pytest

from gpt2_edge.benchmarks import gguf_quality
from gpt2_edge.benchmarks.comparison import compare_reports
from gpt2_edge.benchmarks.formats import to_csv, to_json_lines, to_markdown
from gpt2_edge.benchmarks.html_report import to_html
from gpt2_edge.benchmarks.output import check_plot, show
from gpt2_edge.benchmarks.plot import draw
from gpt2_edge.benchmarks.report import (
    SCHEMA,
    Bandwidth,
    Latency,
    Memory,
    Quality,
    Report,
    Speed,
    SustainedSpeed,
    Variant,
)
from gpt2_edge.benchmarks.sheets import Sheet, sheets_of
from gpt2_edge.benchmarks.spread import Measurement, measurement
from gpt2_edge.benchmarks.summary import remarks, summary_sentences
from gpt2_edge.benchmarks.table import fitting_parts, print_tables
from gpt2_edge.errors import OptionError

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHECK_REPORT = Path(__file__).with_name("check_report.py")
LONG_NAME = "a-model-folder-with-quite-a-long-name-int8"


def _speed(mean: float, *, prompt: int = 0, new: int = 0, depth: int = 0, batch: int = 1) -> Speed:
    samples = measurement([mean * 0.99, mean, mean * 1.01])
    return Speed(n_prompt=prompt, n_gen=new, n_depth=depth, batch=batch, tokens_per_second=samples)


def _variant(name: str, precision: str, factor: float, quality: Quality) -> Variant:
    return Variant(
        name=name,
        folder=f"models/{name}",
        threads=2,
        device="cpu",
        precision=precision,
        parameters=124_439_808,
        size_bytes=int(498e6 / factor),
        weights_bytes=int(497e6 / factor),
        context_length=1024,
        vocabulary_size=50257,
        content_sha256=precision,
        load_seconds=1.234,
        speeds={
            "pp128": _speed(12345 * factor, prompt=128),
            "pp512": _speed(10234 * factor, prompt=512),
            "tg128": _speed(50 * factor, new=128),
            "tg128 @ d512": _speed(40 * factor, new=128, depth=512),
            "tg128 b4": _speed(150 * factor, new=128, batch=4),
            "tg128 b8": _speed(210 * factor, new=128, batch=8),
            "tg128 @ d2000": Speed(n_prompt=0, n_gen=128, n_depth=2000, batch=1, skipped="does not fit the context"),
        },
        latency=Latency(
            prompt_tokens=128,
            new_tokens=128,
            time_to_first_token=measurement([0.1, 0.11, 0.105]),
            inter_token_ms=tuple(20 / factor + step / 10 for step in range(50)),
            p50_ms=20.0,
            p95_ms=24.0,
            p99_ms=25.0,
            sampling_share=0.02,
            python_share=0.01,
        ),
        memory=Memory(before_loading_bytes=60_000_000, steady_bytes=int(7e8 / factor), peak_bytes=int(8e8 / factor)),
        idle_cpu_percent=0.1,
        bandwidth=Bandwidth(
            buffer_bytes=int(497e6 / factor),
            read_bytes_per_second=measurement([27e9, 28e9, 29e9]),
            bytes_per_token=int(5e8 / factor),
            limit_tokens_per_second=56 * factor,
            test="tg128",
            fraction=0.89,
        ),
        quality=quality,
        sustained=SustainedSpeed(seconds=(1.0, 2.0, 3.0, 4.0), tokens_per_second=(50.0, 49.0, 45.0, 40.0)),
    )


def _report() -> Report:
    full = _variant("gpt2-fp32", "fp32", 1.0, Quality(text="a text", tokens=4080, perplexity=29.41))
    quality = Quality(
        text="a text",
        tokens=4080,
        perplexity=29.42,
        reference="gpt2-fp32",
        perplexity_change_percent=0.05,
        perplexity_change_error_percent=0.02,
        mean_kl_divergence=0.0015,
        same_top_percent=98.7,
    )
    small = _variant(LONG_NAME, "int8", 4.0, quality)
    broken = Variant(name="broken", folder="models/broken", error="models/broken has no manifest.json | <b>really</b>")
    return Report(
        created_at="2026-01-02T03:04:05Z",
        command=("gpt2-edge", "bench", "models/gpt2-fp32", "my models/int8"),
        settings={"repetitions": 3},
        environment={
            "cpu": "A CPU",
            "isa": ["avx2"],
            "cores_allowed": 2,
            "onnxruntime": "1.31.1",
            "gpt2-edge": "0.1.0",
        },
        variants=(full, small, broken),
        seconds=61.5,
    )


REPORT = _report()


def _tables(report: Report) -> str:
    output = io.StringIO()
    print_tables(report, output)
    return output.getvalue()


def test_json_comes_back_the_same() -> None:
    assert Report.from_json(REPORT.to_json()) == REPORT


def test_the_schema_has_the_names_that_others_rely_on() -> None:
    document = json.loads(REPORT.to_json())
    assert document["schema"] == SCHEMA == "gpt2-edge bench 1"
    variant = document["variants"][0]
    assert variant["speeds"]["pp128"]["tokens_per_second"]["mean"] == pytest.approx(12345)
    assert variant["speeds"]["tg128"]["n_gen"] == 128
    assert variant["bandwidth"]["fraction"] == 0.89


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no schema"),
        ("{}", "has no schema"),
        ('{"schema": "gpt2-edge bench 2"}', "has the schema 'gpt2-edge bench 2', expected 'gpt2-edge bench 1'"),
        ('{"schema": "gpt2-edge bench 1"}', "missing"),
        (REPORT.to_json().replace('"seconds": 61.5', '"seconds": "a minute"'), "seconds is 'a minute'"),
        (REPORT.to_json().replace('"threads": 2', '"threads": true', 1), "threads is 'True'"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=re.escape(message)):
        Report.from_json(text, "old.json")


def test_the_tables_fit_100_columns() -> None:
    compared = replace(REPORT, comparison=compare_reports(REPORT, REPORT, "old.json"))
    for line in _tables(compared).splitlines():
        assert len(line) <= 100, line


def test_a_table_that_is_too_wide_is_cut_between_columns() -> None:
    sheet = Sheet("title", ("model", "first", "second", "third"), (("m", "1" * 10, "2" * 10, "3" * 10),))
    assert [part.header[1:] for part in fitting_parts(sheet, 80)] == [("first", "second", "third")]
    assert [part.header[1:] for part in fitting_parts(sheet, 36)] == [("first", "second"), ("third",)]
    assert fitting_parts(sheet, 36)[1].rows == (("m", "3" * 10),)
    assert len(fitting_parts(sheet, 5)) == 3


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_no_number_is_lost_on_a_terminal(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = re.sub(r"\x1b\[[0-9;]*m", "", _tables(REPORT))
    assert max(map(len, text.splitlines())) <= min(width, 100)
    for sheet in sheets_of(REPORT):
        for row in sheet.rows:
            for cell in row[1:]:
                assert cell in text


def test_the_tables_say_everything() -> None:
    text = _tables(REPORT)
    unfolded = re.sub(r"\s+", " ", text)
    for part in ("12,345 ± 123", "tg128 @ d512", "tg128 b8", "29.41", "98.7 %", "700 MB", "GB/s", "1.23 s", "a text"):
        assert part in unfolded, part
    assert "broken: models/broken has no manifest.json | <b>really</b>" in unfolded
    assert "skipped tg128 @ d2000 (does not fit the context)" in unfolded


def test_the_summary() -> None:
    (sentence,) = summary_sentences(REPORT)
    assert sentence == (
        f"{LONG_NAME} is 4.0 x as fast as gpt2-fp32 (tg128) and 4.0 x smaller; "
        "perplexity +0.05 % ± 0.02 %, the same likeliest token 98.7 % of the time."
    )


def test_the_summary_has_no_ratio_that_the_spread_does_not_support() -> None:
    full, small, _ = REPORT.variants
    wide = Measurement(200.0, 160.0, (100.0, 200.0, 300.0))
    speeds = small.speeds | {"tg128": replace(small.speeds["tg128"], tokens_per_second=wide)}
    report = replace(REPORT, variants=(full, replace(small, speeds=speeds)))
    (sentence,) = summary_sentences(report)
    assert "not faster or slower than gpt2-fp32 beyond the spread (tg128)" in sentence
    assert any("disturbed (spread above 10 %) in tg128" in remark for remark in remarks(report))
    assert "200 ± 160*" in _tables(report)


def test_without_a_reference_rows_are_described_alone() -> None:
    (sentence,) = summary_sentences(replace(REPORT, variants=REPORT.variants[1:]))
    assert sentence == f"{LONG_NAME} has 124.5 MB, decodes 200 ± 2.0 tokens/s (tg128) and keeps 175 MB resident."


def test_a_report_of_nothing_can_be_shown() -> None:
    nothing = replace(REPORT, variants=(REPORT.variants[2],), interrupted=True)
    assert "Interrupted" in _tables(nothing)
    assert "Nothing could be measured." in to_html(nothing)
    assert "no manifest.json" in to_markdown(nothing)
    assert json.loads(to_json_lines(nothing))["error"].startswith("models/broken")


def test_markdown_begins_as_llama_bench_does() -> None:
    lines = to_markdown(REPORT).splitlines()
    assert lines[0] == "| model | size | params | backend | threads | test | t/s |"
    assert lines[2] == "| gpt2-fp32 | 474.93 MiB | 124.44 M | ONNX Runtime CPU | 2 | pp128 | 12,345 ± 123 |"
    assert any(line.startswith("| broken |") and "no manifest.json \\| <b>" in line for line in lines)


def test_csv_and_json_lines_have_a_line_for_each_test() -> None:
    rows = list(csv.DictReader(io.StringIO(to_csv(REPORT))))
    records = [json.loads(line) for line in to_json_lines(REPORT).splitlines()]
    assert len(rows) == len(records) == 7 + 7 + 1
    batch = next(record for record in records if record["test"] == "tg128 b4")
    assert batch["samples_ts"][1] == 150
    assert batch["samples_ns"][1] == round(1e9 * 4 * 128 / 150)
    assert rows[0]["n_prompt"] == "128"
    assert rows[0]["model_n_params"] == "124439808"
    assert rows[-1]["error"] == REPORT.variants[2].error


def test_comparing_with_itself_finds_no_difference() -> None:
    comparison = compare_reports(REPORT, REPORT, "old.json")
    assert {each.verdict for each in comparison.verdicts} == {"not beyond the spread"}
    assert len(comparison.verdicts) == 2 * (6 + 1)
    assert comparison.notes == ()


def test_comparing_finds_what_changed() -> None:
    full, _, broken = REPORT.variants
    slower = replace(full, speeds=full.speeds | {"tg128": _speed(25, new=128)}, content_sha256="another")
    now = replace(REPORT, variants=(slower, broken), environment=REPORT.environment | {"cpu": "Another CPU"})
    comparison = compare_reports(now, REPORT, "old.json")
    (verdict,) = [each for each in comparison.verdicts if each.quantity == "tg128"]
    assert (verdict.verdict, verdict.times_as_fast) == ("slower", "0.50 x")
    assert comparison.notes == (
        "cpu was A CPU, is Another CPU",
        "gpt2-fp32 holds another model than in the earlier report",
    )
    assert "slower, 0.50 x" in _tables(replace(now, comparison=comparison))


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_whole_and_needs_nothing_else() -> None:
    html = to_html(replace(REPORT, comparison=compare_reports(REPORT, REPORT, "old.json")))
    page = _Page()
    page.feed(html)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert names.count("svg") == 5
    assert not {"script", "img", "iframe", "object"} & set(names)
    assert "@import" not in html
    assert "url(" not in html
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name) in (None, "data:,"), (tag, attributes)
        assert not any(name.startswith("on") or name == "style" for name in attributes)


def test_the_charts_of_many_rows_name_them_by_the_numbers_of_the_legend() -> None:
    full, small, broken = REPORT.variants
    speeds = [small.speeds | {"tg128": _speed(100 + 70 * place, new=128)} for place in range(5)]
    rows = [replace(small, name=f"row-{place}", speeds=each) for place, each in enumerate(speeds)]
    few = replace(REPORT, variants=(broken, full, *rows))
    many = replace(few, variants=(*few.variants, replace(small, name="row-5")))
    assert ">2 gpt2-fp32<" not in to_html(few)
    assert ">row-4</text>" in to_html(few)
    page = to_html(many)
    for number, variant in enumerate(many.variants[1:], start=2):
        assert f"<b>{number} {variant.name}</b>" in page
        assert (
            len(re.findall(rf"coloured series-\d\"[^>]*>{number}</text>", page)) == 2
        )  # speed against size, and against context
    assert ">row-4</text>" not in page


def chart_of_speed_and_size(rows: Sequence[tuple[str, int, float]]) -> str:
    """Of rows with a name, megabytes and tokens a second."""
    _, small, _ = REPORT.variants
    variants = tuple(
        replace(small, name=name, size_bytes=megabytes * 10**6, speeds={"tg128": _speed(speed, new=128)})
        for name, megabytes, speed in rows
    )
    return to_html(replace(REPORT, variants=variants)).split("<svg", 1)[1].split("</svg>")[0]


def test_names_of_rows_stand_beside_their_points() -> None:
    chart = chart_of_speed_and_size(
        [("fp32", 498, 50), ("int8", 128, 150), ("int8-cache8", 128, 152), ("int4", 81, 200)]
    )
    boxes = []
    for text in re.findall(r"<text [^>]*halo[^>]*>[^<]*</text>", chart):
        label = ElementTree.fromstring(text)
        width = 5 * len(label.text or "")
        left = float(label.attrib["x"]) - (width if label.attrib["text-anchor"] == "end" else 0)
        boxes.append((left, left + width, float(label.attrib["y"])))
    assert len(boxes) == 8
    for one, other in combinations(boxes, 2):
        assert one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= 12


def test_rows_whose_names_would_cover_something_have_numbers() -> None:
    """The names of three rows reach over the name of a row that is nearly as fast, or over its point."""
    rows = [("storyteller-int4", 5, 2800), ("storyteller-int8", 8, 2000), ("storyteller-int8-cache8", 8, 1900)]
    assert "halo" in chart_of_speed_and_size([*rows, ("storyteller-fp32", 60, 300)])
    for megabytes in (28, 18):
        chart = chart_of_speed_and_size([*rows, ("storyteller-fp32", megabytes, 1800)])
        assert "halo" not in chart
        assert re.findall(r"coloured series-\d\"[^>]*>(\d)</text>", chart) == ["1", "2", "3", "4"]


@pytest.mark.skipif(not any(map(shutil.which, BROWSERS)), reason="no Chromium is installed")
@pytest.mark.parametrize(
    ("added", "problem"),
    [("", ""), ("<style>svg { display: none }</style><script>1</script>", "0 charts are visible")],
)
def test_a_browser_shows_the_page(added: str, problem: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(to_html(REPORT).replace("</body>", f"{added}</body>"), encoding="utf-8")
    shown = subprocess.run(
        [sys.executable, CHECK_REPORT, page, tmp_path / "pictures"], capture_output=True, encoding="utf-8", timeout=250
    )
    assert shown.returncode == bool(problem), shown.stdout + shown.stderr
    assert problem in shown.stdout
    assert ("CONSOLE" in shown.stdout) == bool(problem)  # the page lets no script run


def test_the_page_says_what_the_table_says() -> None:
    page = _Page()
    page.feed(to_html(REPORT))
    for part in (*summary_sentences(REPORT), "12,345 ± 123", "A CPU", "avx2", "28.0 GB/s over 497 MB", "61.5 s"):
        assert part in page.text, part
    assert "gpt2-edge bench models/gpt2-fp32 'my models/int8'" in page.text
    assert "<b>really</b>" in page.text  # as text, not as a tag


def test_the_drawings_are_well_formed_and_inside_their_frame() -> None:
    for svg in re.findall(r"<svg.*?</svg>", to_html(REPORT), re.DOTALL):
        drawing = ElementTree.fromstring(svg)
        _, _, width, height = map(float, drawing.attrib["viewBox"].split())
        for element in drawing.iter():
            for name in ("x", "x1", "x2", "cx"):
                assert -1 <= float(element.get(name, "0")) <= width + 1
            for name in ("y", "y1", "y2", "cy"):
                assert -1 <= float(element.get(name, "0")) <= height + 1


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_the_plot(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"plot{ending}"
    check_plot(path)
    draw(REPORT, path)
    assert path.read_bytes()[:5] == {".png": b"\x89PNG\r", ".svg": b"<?xml"}[ending]
    draw(replace(REPORT, variants=REPORT.variants[2:]), path)


def test_a_plot_of_another_kind_is_refused() -> None:
    with pytest.raises(OptionError, match=r"\.png or \.svg"):
        check_plot(Path("plot.bmp"))


@pytest.fixture
def no_room_beyond_1000_bytes() -> Iterator[None]:
    """A write beyond them fails in the middle of a file, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


@pytest.mark.parametrize("format_name", ["table", "md", "csv", "json", "jsonl", "html"])
@pytest.mark.parametrize("earlier", [None, "the earlier one"])
def test_a_full_disk_keeps_the_table_and_the_earlier_result(
    no_room_beyond_1000_bytes: None, tmp_path: Path, format_name: str, earlier: str | None
) -> None:
    path, picture = tmp_path / "report", tmp_path / "report.svg"
    if earlier is not None:
        path.write_text(earlier, encoding="utf-8")
        picture.write_text(earlier, encoding="utf-8")
    with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
        assert show(REPORT, format_name, path, picture) is False
    assert "12,345 ± 123" in output.getvalue()
    assert f"cannot write {path}: File too large" in errors.getvalue()
    assert f"cannot write {picture}: File too large" in errors.getvalue()
    left = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert left == ({} if earlier is None else {"report": earlier, "report.svg": earlier})


def test_the_quality_of_gguf_files_is_printed_also_where_it_cannot_be_written(
    no_room_beyond_1000_bytes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"size_bytes": 1e6, "perplexity": 30.0, "perplexity_change_percent": 0.5, "mean_kl_divergence": 0.01}
    row |= {"kl_divergence_99": 0.1, "same_top_percent": 95.0}
    rows = [{"name": f"{kind} {number}", **row} for kind in ("llama.cpp", "int8") for number in range(9)]
    monkeypatch.setattr(gguf_quality, "measure", lambda *_: {"models": rows})
    path, picture = tmp_path / "quality.json", tmp_path / "quality.png"
    arguments = ["checkpoint", "folder", "--text", "text", "-o", str(path), "--plot", str(picture)]
    for left_out in ([], ["-o", str(path)]):
        given = [argument for argument in arguments if argument not in left_out]
        monkeypatch.setattr("sys.argv", ["gguf_quality", *given])
        with redirect_stdout(io.StringIO()) as output, redirect_stderr(io.StringIO()) as errors:
            assert gguf_quality.main() == 1
        assert "| int8 8 | 1.00 | 30.000 (+0.50 %) |" in output.getvalue()
        assert re.fullmatch(r"error: cannot write .*: File too large\n", errors.getvalue())
        assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_printed_keeps_the_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", Full())
        assert show(REPORT, "json", None, None) is False
    assert "12,345 ± 123" in capsys.readouterr().err
