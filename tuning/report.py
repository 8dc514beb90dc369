"""Write the report of a run, or a comparison of several; see `tuning.show.report`."""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import tyro

from tuning.record.mirror import borrowed
from tuning.record.storage import is_uri, joined
from tuning.settings.command_line import DONE, exit_code
from tuning.settings.config import InputError
from tuning.show.report import compare, report, save
from tuning.show.sections import read


@dataclasses.dataclass(frozen=True)
class Flags:
    """Write a run's report.html; of several runs a page that compares them.

    Example: python tuning/report.py results/xray
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of runs, or URIs of them."""
    out: str | None = None
    """Where to write. Default: report.html in the run's folder, comparison.html beside several runs."""


def main() -> int:
    """Run the command line; returns the exit code."""

    def command() -> int:
        print(f"written: {run(tyro.cli(Flags))}")
        return DONE

    return exit_code(command)


def run(flags: Flags) -> Path | str:
    """Write what the flags say; returns where.

    Raises:
        InputError: a folder is not that of a run, or the page can't be written.
    """
    if not flags.runs:
        raise InputError("which run? give its folder: python tuning/report.py results/NAME")
    with ExitStack() as stack:
        folders = [stack.enter_context(borrowed(place, without=("model/",))) for place in flags.runs]
        written = _write(folders, _where(flags, folders))
    sent = flags.out is None and len(folders) == 1 and is_uri(flags.runs[0])
    return joined(flags.runs[0], written.name) if sent else written


def _where(flags: Flags, folders: list[Path]) -> Path:
    if flags.out:
        return Path(flags.out)
    if len(folders) == 1:
        return folders[0] / "report.html"
    return Path() / "comparison.html" if is_uri(flags.runs[0]) else folders[0].resolve().parent / "comparison.html"


def _write(folders: list[Path], out: Path) -> Path:
    runs = [read(folder) for folder in folders]
    content = report(runs[0]) if len(runs) == 1 else compare(runs)
    try:
        return save(out, content)
    except OSError as error:
        raise InputError(f"{out}: can't be written ({error.strerror}); choose another place by --out") from None


if __name__ == "__main__":
    sys.exit(main())
