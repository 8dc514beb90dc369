"""Make results/example, which is committed, and the answers of results/ANALYSIS.md, which are printed from it.

Two small searches on the generated radiographs: `example`, which shows every usual end of a trial and a verdict, and
`other`, a poorer one beside it, which is not committed. What is large or tells of this machine is taken out.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import ast
import dataclasses
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pandas as pd
import pyarrow as pa
import tyro
from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

from tuning import report
from tuning.record.tables import SAMPLES, read_table, write_tables

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "results" / "ANALYSIS.md"
SEARCHES = {
    "example": "--trials 18 --epochs 6 --concurrent 2 "
    "--set image_size=48 grace_epochs=2 patience=1 finalist_seeds=3 finalist_epochs=54",
    "other": "--trials 8 --epochs 4 --seed 1 --concurrent 2 --set image_size=32 sampler=random probe=false finalists=0",
}
BLOCK = re.compile(r"```(python|sql)\n(.*?)```(\n\n```text\n.*?```)?", re.DOTALL)
PICTURES = {"report": (1400, 1720, "light"), "report-phone": (390, 1400, "dark")}  # pixels
DRAWN = """return [...document.querySelectorAll('[data-figure]')].every((one) => one.dataset.drawn || one.hidden
    || one.getBoundingClientRect().top > innerHeight)"""  # figures draw themselves when they come into view
SHOWN = {"display.width": 150, "display.max_columns": 30, "display.max_rows": 100, "display.precision": 4}


@dataclasses.dataclass(frozen=True)
class Flags:
    """Make results/example and the answers in results/ANALYSIS.md anew."""

    place: str
    """A folder of its own for the two runs; those that are there are taken."""


def main() -> None:
    """Search beside all other runs, print the answers, and take the first run and its pictures into the project."""
    place = Path(tyro.cli(Flags).place).resolve()
    place.mkdir(parents=True, exist_ok=True)
    os.chdir(place)
    for name, words in SEARCHES.items():
        if not (Path("results") / name / "best.yaml").exists():
            command = [sys.executable, str(ROOT / "tuning" / "run_search.py"), "--space", "quick", "--name", name]
            subprocess.run([*command, *words.split()], check=True)
            prune(Path("results") / name)
    PAGE.write_text(answered(PAGE.read_text()))
    take_pictures(Path("results/example"))
    shutil.rmtree(ROOT / "results" / "example")
    shutil.copytree("results/example", ROOT / "results" / "example")


def prune(run: Path) -> None:
    """Take out of a run what is large, and where its images lay on this machine."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "report.html").unlink(missing_ok=True)
    samples = read_table(run / "samples.parquet").assign(file=lambda table: table["path"])
    write_tables({"samples": pa.Table.from_pandas(samples, schema=SAMPLES, preserve_index=False)}, run)


def take_pictures(run: Path) -> None:
    """Pictures of the run's report from its top, wide and light, narrow and dark: by chromium, where there is one."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        print("no chromium and chromedriver here: the pictures of the report are not renewed")
        return
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    with TemporaryDirectory() as folder, webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        page = report.run(report.Flags((str(run),), out=f"{folder}/report.html"))
        for name, (width, height, shade) in PICTURES.items():
            size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            media = [{"name": "prefers-color-scheme", "value": shade}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
            browser.get(page.as_uri())
            WebDriverWait(browser, 60).until(lambda browser: browser.execute_script(DRAWN))
            taken = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            taken.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
                run / f"{name}.png", optimize=True
            )


def answered(page: str) -> str:
    """A page whose blocks of Python and SQL are each followed by what they print, run from top to bottom."""
    names: dict[str, Any] = {}

    def answer(found: re.Match[str]) -> str:
        language, code = found[1], found[2]
        said = run_python(code, names) if language == "python" else run_sql(code)
        return f"```{language}\n{code}```" + (f"\n\n```text\n{said}\n```" if said else "")

    return BLOCK.sub(answer, page)


def run_python(code: str, names: dict[str, Any]) -> str:
    """Run it with these names; returns the value of its last line as text, empty where it has none."""
    body = ast.parse(code).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "page", "exec"), names)
    return "" if last is None else _text(eval(compile(ast.Expression(last.value), "page", "eval"), names))


def run_sql(code: str) -> str:
    """The rows that DuckDB gives, as text."""
    return _text(duckdb.sql(code).df())


def _text(value: Any) -> str:
    if not isinstance(value, pd.DataFrame):
        return str(value)
    with pd.option_context(*(part for item in SHOWN.items() for part in item)):
        plain = isinstance(value.index, pd.RangeIndex) or (value.index.name is None and value.index.nlevels == 1)
        return value.to_string(index=not plain, float_format=lambda number: f"{number:.4g}", na_rep="-")


if __name__ == "__main__":
    main()
