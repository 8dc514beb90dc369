"""The README and the pages in docs/ tell the truth: their commands, settings, links, paths, columns and tests exist.

`python tests/test_readme.py` writes the tables of docs/settings.md anew.
"""

import ast
import re
import shlex
from functools import cache
from pathlib import Path

import pytest
import tyro

from tuning import audit, evaluate, label_issues, model_folder, report, run_search, train_final
from tuning.checks.findings import KINDS, SEVERITIES
from tuning.record.tables import AUDIT, DECISIONS, EPOCHS, FINALISTS, SAMPLES, TRIALS
from tuning.settings.command_line import command_line
from tuning.settings.config import PARAMETERS, SETTINGS, SearchPlan, TrialConfig

ROOT = Path(__file__).parent.parent
FOLDERS = ("benchmarks", "deploy", "docs", "findings", "results", "search_spaces")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))])
}
FINDINGS = {f"findings/{path.name}": path.read_text() for path in sorted((ROOT / "findings").glob("*.sh"))}
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
ROOMS = sorted(path.parent.name for path in (ROOT / "tuning").glob("*/__init__.py"))
COMMANDS = {"run_search": run_search, "audit": audit, "train_final": train_final, "report": report}
COMMANDS |= {"evaluate": evaluate, "label_issues": label_issues}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
TABLE = re.compile(r"^\| key \| default \| meaning \|\n(?:\|.*\n)+", re.MULTILINE)


def settings_table(model, names):
    """The `--set` keys of a model with their defaults and meanings."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name in names:
        field = model.model_fields[name]
        default = "" if field.is_required() or field.default is None else f"`{str(field.default).lower()}`"
        lines.append(f"| `{name}` | {default} | {' '.join((field.description or '').split())} |")
    return "\n".join(lines) + "\n"


def settings_tables():
    return [settings_table(SearchPlan, SETTINGS), settings_table(TrialConfig, PARAMETERS)]


def prose(page):
    return FENCE.sub("", PAGES[page])


def command_lines(page):
    """Commands in blocks of shell and of output, and in the text, as words."""
    blocks = "\n".join(block for language, block in FENCE.findall(PAGES[page]) if language in ("", "bash", "sh"))
    lines = blocks.replace("\\\n", " ").splitlines() + INLINE.findall(prose(page))
    return [
        shlex.split(line.removeprefix("$ "), comments=True) for line in lines if re.search(r"python.* \S+\.py", line)
    ]


def flags_of(text):
    """Its long flags, as fields."""
    return {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][a-z-]*)", text)}


@cache
def names_in(path):
    """Functions, classes, methods, constants and imported names of a Python file."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found |= {
                node.name,
                *(f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)),
            }
        elif isinstance(node, ast.ImportFrom):
            found |= {each.asname or each.name for each in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            found |= {each.id for each in ast.walk(node) if isinstance(each, ast.Name)}
    return found


@cache
def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) <= 200


def test_every_setting_is_in_its_page():
    assert TABLE.findall(SETTINGS_PAGE.read_text()) == settings_tables(), "python tests/test_readme.py"


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_parses(page):
    for words in command_lines(page):
        script = next(word for word in words if word.endswith(".py"))
        arguments = words[words.index(script) + 1 :]
        name = Path(script).stem
        if "tuning/" not in script:
            assert (ROOT / script).is_file()
            wanted = flags_of(" ".join(arguments))
            assert wanted <= set(re.findall(r"^    (\w+): ", (ROOT / script).read_text(), re.MULTILINE)), words
        elif name == "model_folder":
            tyro.extras.subcommand_cli_from_dict({"predict": model_folder.Predict}, args=arguments)
        else:
            flags = tyro.cli(COMMANDS[name].Flags, args=arguments)
            command_line({}, getattr(flags, "set", ()))


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_and_key_exists(page):
    fields = {"early_stopping", "no_early_stopping", "help"}
    for command in (*(module.Flags for module in COMMANDS.values()), model_folder.Predict):
        fields |= command.__dataclass_fields__.keys()
    for code in INLINE.findall(prose(page)):
        if code.startswith("--"):
            assert flags_of(code) <= fields, code
        for group in re.findall(r"--set ((?:\w+=\S+ ?)+)", code):
            keys = {pair.partition("=")[0] for pair in group.split()}
            assert keys <= {*SETTINGS, *PARAMETERS, "key"}, code


@pytest.mark.parametrize("page", PAGES)
def test_every_make_target_exists(page):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    blocks = "\n".join(block for _, block in FENCE.findall(PAGES[page]))
    named = re.findall(r"^make ([\w-]+)", blocks, re.MULTILINE)
    named += [code.split()[1] for code in INLINE.findall(prose(page)) if code.startswith("make ")]
    assert set(named) <= targets


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        file, _, anchor = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


@pytest.mark.parametrize("page", [*(page for page in PAGES if page != "CHANGELOG.md"), *FINDINGS])
def test_every_path_function_and_test_exists(page):
    content = (PAGES | FINDINGS)[page]
    for path in re.findall(r"\b((?:tuning|tests|benchmarks|search_spaces)/[\w/]+\.[a-z]+)\b", content):
        assert (ROOT / path).exists(), path
    for path, name in re.findall(r"`([\w/]+\.py)::?([\w.]+)`", content):
        assert (ROOT / path).is_file() and name in names_in(path), f"{path}:{name}"


def _from_tuning(name):
    return getattr(__import__("tuning", fromlist=[name]), name)


@pytest.mark.parametrize("page", PAGES)
def test_every_import_in_a_block_of_python_exists(page):
    for language, block in FENCE.findall(PAGES[page]):
        for node in ast.walk(ast.parse(block)) if language == "python" else ():
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "tuning":
                if node.module == "tuning":  # the commands are called as functions
                    assert all(callable(_from_tuning(alias.name)) for alias in node.names)
                    continue
                module = ROOT.joinpath(*node.module.split("."))
                for alias in node.names:
                    inside = (module / alias.name).with_suffix(".py")
                    assert inside.exists() or alias.name in names_in(module.with_suffix(".py")), alias.name


@pytest.mark.parametrize("finding", FINDINGS)
def test_every_finding_is_listed_and_has_its_head(finding):
    assert f"({Path(finding).name})" in PAGES["findings/README.md"]
    head = FINDINGS[finding].partition("\nset -euo pipefail\n")[0]
    parts = re.findall(r"^# (\w+):", head, re.MULTILINE)
    assert parts == ["Library", "Expected", "Happens", "Seen", "Matters", "Guard"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_stands_in_the_architecture_with_its_purpose(room):
    purpose = ast.get_docstring(ast.parse((ROOT / "tuning" / room / "__init__.py").read_text()))
    assert f"| `{room}/` | {purpose}" in PAGES["docs/architecture.md"]


def test_every_column_is_explained():
    for schema in (TRIALS, EPOCHS, DECISIONS, FINALISTS, SAMPLES, AUDIT):
        for name in schema.names:
            assert f"`{name}`" in PAGES["results/README.md"] or name.startswith("config_")


def test_every_finding_is_explained():
    for word in (*KINDS, *SEVERITIES):
        assert f"| `{word}` |" in PAGES["results/README.md"]


if __name__ == "__main__":
    made = iter(settings_tables())
    SETTINGS_PAGE.write_text(TABLE.sub(lambda _: next(made), SETTINGS_PAGE.read_text()))
