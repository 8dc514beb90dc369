"""Likely wrong labels and odd images of a search's data; see `tuning.insight.confident`."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout comes first on the path, not this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import os
from typing import Annotated, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from tuning.checks.audit import load_checked
from tuning.data.images import cores, open_images
from tuning.data.splits import number_units
from tuning.insight.confident import ranked
from tuning.record import tables
from tuning.record.mirror import borrowed
from tuning.settings.command_line import DONE, exit_code, flag, leave
from tuning.settings.config import InputError, SearchPlan, TrialConfig, build, cache_folder, visible
from tuning.settings.documents import check_parts, read_mapping
from tuning.settings.words import count

TABLE, PAGE = "label_issues.parquet", "label_issues.html"
LISTED = 10  # on the screen
ISSUES = tables.versioned(
    dict.fromkeys(("path", "split", "label", "suggested"), pa.string())
    | {"own_probability": pa.float64(), "suggested_probability": pa.float64()}
    | {"issue": pa.bool_(), "unlike_others": pa.float64()}
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Rank the images of a search by how likely their labels are wrong, and show which are unlike all others.

    The best configuration is trained several times, each time without a part of the images, which it then predicts.
    Nothing is changed: results are label_issues.parquet and label_issues.html in the run's folder. Test images are
    left alone.

    Example: python tuning/label_issues.py results/xray
    """

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder of a run that has a best.yaml, with the images of its search."""
    folds: Annotated[int, tyro.conf.arg(metavar="N")] = 5
    """Number of parts, and of trainings."""
    device: Annotated[str | None, flag("device", "auto|cpu|cuda|mps")] = None


def main() -> int:
    """Run the command line; return the exit code."""
    return exit_code(lambda: _run_at(tyro.cli(Flags)), "nothing was written")


def _run_at(flags: Flags) -> int:
    with borrowed(flags.run) as place:
        run(dataclasses.replace(flags, run=str(place)))
    return DONE


def run(flags: Flags) -> pd.DataFrame:
    """Train, rank, print and write; return the table. Wrong input raises InputError."""
    folder = Path(flags.run)
    if flags.folds < 2:
        raise InputError(f"--folds {flags.folds}: must be at least 2")
    path = folder / "best.yaml"
    document = read_mapping(path) if path.is_file() else {}
    if not document:
        raise InputError(f"{folder}: has no best.yaml; give the folder of a run, such as results/NAME")
    check_parts(document, path, {"provenance": dict})
    provenance = document.pop("provenance")
    check_parts(provenance, path, {"fingerprint": str, "settings": dict})
    settings = {key: value for key, value in provenance["settings"].items() if key in SearchPlan.model_fields}
    plan = build(SearchPlan, settings | ({"device": flags.device} if flags.device else {}), str(path))
    config = build(TrialConfig, document, str(path))
    if not os.access(folder, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{folder}: no permission to write there; copy the run to a folder of your own")
    samples = tables.read_table(folder / "samples.parquet")
    checked = load_checked(plan, [config.image_size], table=samples)
    if checked.fingerprint != provenance["fingerprint"]:
        raise InputError(f"the data has changed since {path} was written; restore it")

    # torch takes seconds to load, and timm more: wrong input is reported before.
    from tuning.model.out_of_fold import folds, ordered
    from tuning.training.dataset import join
    from tuning.training.device import ready
    from tuning.training.features import FeatureCache, HeldOutputs
    from tuning.training.outputs import run_folder
    from tuning.training.weights import find_weights

    data = join(samples, open_images(checked.folders[config.image_size]))
    weights = find_weights([config.backbone], plan.weights)[config.backbone]
    device = ready(plan.device, threads=cores(), deterministic=plan.deterministic)
    known = samples["unit"].notna().all()  # not of a run of an older version
    units = samples["unit"].to_numpy(np.int64) if known else number_units(samples["group"], [])
    found = []
    with run_folder(cache_folder(), folder / TABLE) as outputs:
        cache = (
            FeatureCache(outputs, plan.cache_bytes, augmented=False) if device.type == "cpu" else HeldOutputs(device)
        )
        parts = folds(config, data, units, flags.folds, weights=weights, device=device, features=cache)
        for number, fold in enumerate(parts, start=1):
            print(
                f"part {number} of {flags.folds}: {count(len(fold.rows), 'image')}, val_loss {fold.val_loss:.4f}",
                flush=True,
            )
            found.append(fold)
    rows, probabilities, unlike = ordered(found)
    table = ranked(probabilities, data.labels[rows], data.classes)
    images = rows[table["row"].to_numpy(np.int64)]
    table = table.assign(
        path=samples["path"].to_numpy()[images],
        split=samples["split"].to_numpy()[images],
        own_probability=table["own"],
        suggested_probability=table["probability"],
        unlike_others=unlike[table["row"].to_numpy(np.int64)],
    )
    with tables.replacing(folder / TABLE) as temporary:
        written = pa.Table.from_pandas(table[ISSUES.names], schema=ISSUES, preserve_index=False)
        pq.write_table(written, temporary, write_page_checksum=True)
    _show(folder, table, images, samples, data.images, plan)
    return table[ISSUES.names]


def _show(
    folder: Path, table: pd.DataFrame, images: Any, samples: pd.DataFrame, decoded: Any, plan: SearchPlan
) -> None:
    issues = table[table["issue"]]
    number = count(int(table["path"].nunique()), "image")
    wrong = int(issues["path"].nunique())
    print(f"\n{wrong:,} of {number} of training and validation have a label that is likely to be wrong:")
    for row in issues.head(LISTED).itertuples():
        print(visible(f"  {row.path}: {row.label} ({row.own_probability:.1%}), rather {row.suggested}"))
    print(f"  {folder / PAGE} shows them, {TABLE} has all" if len(issues) else "  none")
    try:  # the table is written: a fault in what only shows it must not fail the command
        from tuning.model.issues_page import issues_page

        shaped = {"fit": plan.fit, "drop_colour": plan.drop_colour}
        page = issues_page(plan.name, table, images, samples["file"].tolist(), decoded, shaped)
        (folder / PAGE).write_text(page, encoding="utf-8", errors="replace")
    except Exception as error:
        print(f"{PAGE} is missing ({type(error).__name__}: {error})", file=sys.stderr)


if __name__ == "__main__":
    leave(main())
