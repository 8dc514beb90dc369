"""Audit the images of a search; see `tuning.checks.audit`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout comes first on the path, not this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import os
from typing import Annotated

import tyro

from tuning.checks import audit, findings
from tuning.data.images import parallel_map
from tuning.record import tables
from tuning.record.targets import counted
from tuning.settings.command_line import BAD_INPUT, DONE, Pairs, command_line, exit_code
from tuning.settings.config import InputError, SearchPlan, build, visible

IMAGE_SIZE = 128  # of the decoded images, unless --set image_size gives another


@dataclasses.dataclass(frozen=True)
class Flags:
    """Audit images: duplicates, leaks between splits, conflicting labels, shortcuts, imbalance.

    Example: python tuning/audit.py chest_xrays/

    Findings are summarized on the screen and written to audit.parquet. Exit code 2: a search would not start.
    """

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DATA")]
    """Folder of class folders (train/val/test above them are optional), manifest, or URI of one."""
    out: Annotated[str, tyro.conf.arg(metavar="FOLDER", help_behavior_hint="(default: the current folder)")] = "."
    """Folder for audit.parquet."""
    set: Annotated[Pairs, tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Settings of the data, such as --set group_column=patient_id on_leak=warn. Default: image_size=128."""


def main() -> int:
    """Run the command line; return the exit code."""
    return exit_code(lambda: run(tyro.cli(Flags)), "nothing was written")


def run(flags: Flags) -> int:
    """Audit, print and write; return the exit code. Wrong input raises InputError."""
    given, overrides = command_line({"data": flags.data}, flags.set)
    size = overrides.pop("image_size", IMAGE_SIZE)
    if overrides:
        raise InputError([f"--set {key}: has no effect on an audit; leave it out" for key in overrides])
    out = Path(flags.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: can't be created ({error.strerror}); choose another") from None
    if not os.access(out, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"--out {out}: no permission to write there; choose another")
    plan = build(SearchPlan, {"name": "audit"} | given, "command line")
    found, moved, notes = audit.audited(plan, audit.decoded(plan, [size], None, parallel_map, skip=True))
    tables.write_tables({"audit": findings.table(found)}, out)
    for label, row in counted(moved).iterrows():
        print(f"{visible(label)}: " + ", ".join(f"{images} {split}" for split, images in row.items()))
    print("\n".join(map(visible, notes)))
    print(f"written: {out / 'audit.parquet'}")
    return BAD_INPUT if any(row.severity == "stop" for row in found) else DONE


if __name__ == "__main__":
    sys.exit(main())
