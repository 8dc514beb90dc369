"""Write the report of a run, or a comparison of several runs; see `tuning.show.report`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout comes first on the path, not this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
from contextlib import ExitStack
from typing import Annotated

import tyro

from tuning.record.mirror import borrowed
from tuning.record.storage import is_uri, joined
from tuning.settings.command_line import exit_code
from tuning.settings.config import InputError
from tuning.show.report import compare, report, save
from tuning.show.sections import read


@dataclasses.dataclass(frozen=True)
class Flags:
    """Write the report of a run, or a page that compares several runs.

    Example: python tuning/report.py results/xray
    """

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...", help_behavior_hint="")]
    """Folders or URIs of runs."""
    out: Annotated[tyro.conf.DisallowNone[str | None], tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """HTML file to write. Default: report.html in the run's folder; comparison.html beside the first of several."""


def main() -> int:
    """Run the command line; return the exit code."""
    return exit_code(lambda: print(f"written: {run(tyro.cli(Flags))}"))


def run(flags: Flags) -> Path | str:
    """Write the report or the comparison; return its path or URI.

    Raises:
        InputError: a folder is not a run, or the page can't be written.
    """
    if not flags.runs:
        raise InputError("give the folder of a run: python tuning/report.py results/NAME")
    with ExitStack() as stack:
        folders = [stack.enter_context(borrowed(place, without=("model/",))) for place in flags.runs]
        if flags.out:
            out = Path(flags.out)
        elif len(folders) == 1:
            out = folders[0] / "report.html"
        else:
            out = (Path() if is_uri(flags.runs[0]) else folders[0].resolve().parent) / "comparison.html"
        runs = [read(folder) for folder in folders]
        content = report(runs[0]) if len(runs) == 1 else compare(runs)
        try:
            save(out, content)
        except OSError as error:
            raise InputError(f"{out}: can't be written ({error.strerror}); choose another file by --out") from None
    sent = flags.out is None and len(folders) == 1 and is_uri(flags.runs[0])
    return joined(flags.runs[0], out.name) if sent else out


if __name__ == "__main__":
    sys.exit(main())
