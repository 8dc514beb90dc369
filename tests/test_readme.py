"""The README tells the truth about settings, modules and columns."""

from pathlib import Path

from tuning.checks.findings import KINDS, SEVERITIES
from tuning.record.tables import AUDIT, DECISIONS, EPOCHS, FINALISTS, SAMPLES, TRIALS
from tuning.settings.config import PARAMETERS, SETTINGS, SearchPlan, TrialConfig

ROOT = Path(__file__).parent.parent


def settings_table() -> str:
    """Every `--set` key with its default and meaning, as the README shows it."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for model, names in ((SearchPlan, SETTINGS), (TrialConfig, PARAMETERS)):
        for name in names:
            field = model.model_fields[name]
            default = "" if field.is_required() or field.default is None else f"`{str(field.default).lower()}`"
            lines.append(f"| `{name}` | {default} | {field.description} |")
    return "\n".join(lines)


def test_every_setting_is_in_the_readme():
    assert settings_table() in (ROOT / "README.md").read_text()


def test_every_module_is_in_the_file_tree():
    text = (ROOT / "README.md").read_text()
    for path in (ROOT / "tuning").glob("*.py"):
        assert path.name == "__init__.py" or path.name in text


def test_every_column_is_explained():
    text = (ROOT / "results" / "README.md").read_text()
    for schema in (TRIALS, EPOCHS, DECISIONS, FINALISTS, SAMPLES, AUDIT):
        for name in schema.names:
            assert f"`{name}`" in text or name.startswith("config_")


def test_every_finding_is_explained():
    text = (ROOT / "results" / "README.md").read_text()
    for word in (*KINDS, *SEVERITIES):
        assert f"| `{word}` |" in text
