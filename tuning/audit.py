"""Audit the images of a search; see `tuning.checks.audit`."""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import os
import sys
from pathlib import Path
from typing import Annotated

import tyro

from tuning.checks import audit, findings
from tuning.data.images import parallel_map
from tuning.record import tables
from tuning.settings.command_line import BAD_INPUT, DONE, command_line, exit_code
from tuning.settings.config import InputError, SearchPlan, build, visible

IMAGE_SIZE = 128  # of the images that the command decodes


@dataclasses.dataclass(frozen=True)
class Flags:
    """Audit images: duplicates, leaks between splits, labels in conflict, shortcuts, imbalance.

    Example: python tuning/audit.py chest_xrays/

    Tells what it finds and writes all of it to audit.parquet. Exit code 2 where a search would not begin.
    """

    data: Annotated[str, tyro.conf.Positional]
    """Folder of class folders (with or without train/val/test above them), or CSV or Parquet manifest."""
    out: str = "."
    """Folder for audit.parquet."""
    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Settings about the data: --set group_column=patient_id on_leak=warn image_size=224."""


def main() -> int:
    """Run the command line; returns the exit code."""
    return exit_code(lambda: run(tyro.cli(Flags)))


def run(flags: Flags) -> int:
    """Audit, tell and write; returns the exit code.

    Raises:
        InputError: anything the user gave is wrong.
    """
    given, overrides = command_line({"data": flags.data}, flags.set)
    size = overrides.pop("image_size", IMAGE_SIZE)
    if overrides:
        raise InputError([f"--set {key}: has no bearing on an audit; leave it out" for key in overrides])
    out = Path(flags.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: can't be made ({error.strerror}); choose another") from None
    if not os.access(out, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"--out {out}: no permission to write there; choose another")
    plan = build(SearchPlan, {"name": "audit"} | given, "command line")
    found, moved, told = audit.audited(plan, audit.decoded(plan, [size], None, parallel_map, skip=True))
    tables.write_tables({"audit": findings.table(found)}, out)
    for label, row in moved.groupby(["label", "split"]).size().unstack(fill_value=0).iterrows():
        print(f"{visible(label)}: " + ", ".join(f"{count} {split}" for split, count in row.items()))
    print("\n".join(map(visible, told)))
    print(f"written: {out / 'audit.parquet'}")
    return BAD_INPUT if any(row.severity == "stop" for row in found) else DONE


if __name__ == "__main__":
    sys.exit(main())
