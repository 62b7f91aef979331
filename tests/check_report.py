"""Open an HTML report in headless Chromium: are the charts there, does anything overflow, does the console complain?

python tests/check_report.py REPORT.html FOLDER

Takes screenshots into FOLDER, light and dark, wide and narrow, to be looked at: `make check-report`. The test suite
does it with a made-up report, where there is a browser.
"""

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHARTS = 4
SHOTS = [
    (f"{shade}-{name}", width, shade)
    for shade in ("light", "dark")
    for name, width in (("wide", 1280), ("narrow", 390))
]
HEIGHT = 4000

# The report stays as it is, in a frame of the width to be tried; only the page around it has a script.
WRAPPER = """<!doctype html><body style="margin:0"><iframe id="report" srcdoc="{report}"
style="border:0;width:{width}px;height:{height}px"></iframe><script>
report.onload = () => {{
  const page = report.contentDocument, root = page.documentElement;
  const charts = [...page.querySelectorAll("svg")].map(each => each.getBoundingClientRect());
  document.body.dataset.found = JSON.stringify({{
    charts: charts.filter(box => box.width > 200 && box.height > 50 && box.right <= {width}).length,
    overflow: root.scrollWidth - root.clientWidth,
    dark: getComputedStyle(page.body).backgroundColor === "rgb(22, 22, 21)",
  }});
}};
</script></body>"""


def main() -> int:
    """Check a report."""
    parser = argparse.ArgumentParser(description="Open an HTML report in headless Chromium.")
    parser.add_argument("report", type=Path)
    parser.add_argument("folder", type=Path, help="where screenshots go")
    arguments = parser.parse_args()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"no browser is installed: one of {', '.join(BROWSERS)} is needed", file=sys.stderr)
        return 1
    arguments.folder.mkdir(parents=True, exist_ok=True)
    report = html.escape(arguments.report.read_text(encoding="utf-8"))
    problems = []
    for name, width, shade in SHOTS:
        with tempfile.TemporaryDirectory() as scratch:
            wrapper = Path(scratch) / "wrapper.html"
            wrapper.write_text(WRAPPER.format(report=report, width=width, height=HEIGHT), encoding="utf-8")
            picture = (arguments.folder / f"{name}.png").resolve()
            problems += [f"{name}: {problem}" for problem in _look(browser, wrapper, picture, width, shade)]
    print("\n".join(problems) or f"{arguments.report}: no problem; look at the pictures in {arguments.folder}")
    return 1 if problems else 0


def _look(browser: str, wrapper: Path, picture: Path, width: int, shade: str) -> list[str]:
    common = [
        *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars"),
        *(f"--user-data-dir={wrapper.parent / 'profile'}", f"--window-size={max(width, 600)},{HEIGHT}"),
        *("--enable-logging=stderr", f"--blink-settings=preferredColorScheme={0 if shade == 'dark' else 1}"),
    ]
    subprocess.run([*common, f"--screenshot={picture}", wrapper.as_uri()], check=True, capture_output=True, timeout=60)
    done = subprocess.run(
        [*common, "--dump-dom", wrapper.as_uri()], check=True, capture_output=True, encoding="utf-8", timeout=60
    )
    problems = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    matched = re.search(r'data-found="([^"]*)"', done.stdout)
    if matched is None:
        return [*problems, "the page did not load"]
    found = json.loads(html.unescape(matched[1]))
    if found["charts"] < CHARTS:
        problems.append(f"{found['charts']} charts are visible, expected {CHARTS} or more")
    if found["overflow"] > 0:
        problems.append(f"the page is {found['overflow']} pixels wider than the window")
    if found["dark"] != (shade == "dark"):
        problems.append(f"the page is not {shade}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
