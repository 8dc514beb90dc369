"""best.yaml -> final training -> the test set, once -> the model folder."""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import json
import os
import shutil
import statistics
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pandas as pd
import tyro
import yaml
from numpy.typing import NDArray

from tuning import tables
from tuning.audit import load_checked
from tuning.calibration import calibration_error, fit_temperature, logarithms, tempered
from tuning.config import InputError, SearchPlan, TrialConfig, build, command_line
from tuning.ensemble import named_shares
from tuning.images import cache_folder, open_images
from tuning.intervals import measure
from tuning.mirror import borrowed
from tuning.predictions import group_numbers, read_predictions
from tuning.storage import is_uri

if TYPE_CHECKING:
    from tuning.data import Data

READINGS = "test_readings.jsonl"  # beside best.yaml: a line for each time that the test set was read


@dataclasses.dataclass(frozen=True)
class Flags:
    """Train the best configuration again, test it once, and write the model folder.

    Example: python tuning/train_final.py results/xray
    """

    best: Annotated[str, tyro.conf.Positional]
    """Folder of a run, or a best.yaml."""
    data: str | None = None
    """Other data than the search's: its splits are made anew."""
    set: tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]] = ()
    """Any setting of the README's table: --set weights=FOLDER learning_rate=1e-4."""


def main() -> int:
    """Run the command line; returns the exit code."""
    flags = tyro.cli(Flags)
    try:
        with borrowed(flags.best) as place:
            run(dataclasses.replace(flags, best=str(place)))
        if is_uri(flags.best):
            print(f"sent to {flags.best}")
    except InputError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; no model was written", file=sys.stderr)
        return 130
    return 0


@dataclasses.dataclass(frozen=True)
class Best:
    """What best.yaml and the command line say."""

    path: Path
    config: TrialConfig
    plan: SearchPlan
    provenance: dict[str, Any]
    changed: bool  # whether the configuration or the data is another than the search's


def run(flags: Flags) -> Path:
    """Train, test and write `model/` beside best.yaml; returns its folder.

    Raises:
        InputError: anything the user gave is wrong.
    """
    # What to train, on what.
    best = _read_best(Path(flags.best) / "best.yaml" if Path(flags.best).is_dir() else Path(flags.best), flags)
    config, plan, run_folder = best.config, best.plan, best.path.parent
    folder = run_folder / "model"
    if folder.exists():
        raise InputError(f"{folder} exists, and the test set is read once; move it away to train again")
    if not os.access(run_folder, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{run_folder}: no permission to write there; copy best.yaml to a folder of yours")
    recorded = run_folder / "samples.parquet"
    table = tables.read_table(recorded) if flags.data is None and recorded.exists() else None
    last = _median_best_epoch(best) if plan.final_data == "train+val" else None
    configs = {"": config}
    if plan.ensemble:
        if table is None:
            raise InputError(f"ensemble=true: needs the run's folder, with what the search left; {run_folder} is none")
        from tuning.final import kept_trials

        predictions, known = kept_trials(run_folder, table)
        configs = {trial_id: known[trial_id] for trial_id in named_shares(predictions)}
    sizes = sorted({each.image_size for each in configs.values()})
    table, folders, found, _, told = load_checked(plan, sizes, table=table)
    if flags.data is None and found != best.provenance["fingerprint"]:
        raise InputError(
            f"the data has changed since {best.path} was written; put it back, or name the new data by --data"
        )
    for line in told:
        print(line)

    import torch  # takes seconds to load, and timm more: bad input and --help are told before

    from tuning.data import join
    from tuning.features import FeatureCache
    from tuning.features import run_folder as outputs_folder
    from tuning.final import assembled, trained
    from tuning.model_folder import save_ensemble, save_model
    from tuning.models import keep_memory
    from tuning.weights import find_weights

    data = {size: join(table, open_images(images)) for size, images in folders.items()}
    some = data[sizes[0]]
    weights = find_weights([each.backbone for each in configs.values()], plan.weights)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    if device.type == "cpu":
        keep_memory()

    # Train, or put together what the search has trained.
    if plan.ensemble:
        final = assembled(run_folder, predictions, configs, data, weights=weights, device=device)
    else:
        with outputs_folder(cache_folder(), folder) as outputs:
            final = trained(
                config,
                some,
                last=last,
                weights=weights[config.backbone],
                device=device,
                metric=plan.metric,
                features=FeatureCache(outputs, plan.cache_bytes, device, augmented=False),
                tell=lambda row: _tell_epoch(row, config.epochs, on_both=last is not None),
            )

    # Calibrate.
    validated, fitted_on = _validated(best, final.validated, table)
    fitted = [fit_temperature(logits, some.labels[some.val]) for logits in validated]
    temperature = statistics.median(fitted) if fitted else 1.0

    # Test, once.
    tested, reading = None, None
    if len(some.test):
        reading = _note_reading(run_folder, found, final.metrics["trained_on"], plan.ensemble)
        tested = _tested(final.logits(data, "test", device), temperature, table, some)

    # Write.
    metrics = final.metrics | {
        "verdict": best.provenance.get("verdict"),
        "temperature": {"value": temperature, "fitted_on": fitted_on},
        "test_reading": reading,
        "test": tested,
    }
    provenance = {"trained_from": best.path.name, "metric": plan.metric, "fingerprint": found, "epochs": config.epochs}
    unfinished = folder.with_name(".model")
    shutil.rmtree(unfinished, ignore_errors=True)
    for name, (network, each) in final.networks.items():
        save_model(
            unfinished / name,
            network,
            each,
            some.classes,
            fit=plan.fit,
            drop_colour=plan.drop_colour,
            temperature=1.0 if plan.ensemble else temperature,
            provenance=provenance,
        )
    if plan.ensemble:
        save_ensemble(unfinished, final.shares, some.classes, temperature, provenance=provenance)
    (unfinished / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    unfinished.rename(folder)
    _tell(folder, metrics)
    return folder


def _read_best(path: Path, flags: Flags) -> Best:
    try:
        document = yaml.safe_load(path.read_text())
        provenance = document.pop("provenance")
        settings = provenance["settings"]
        provenance["fingerprint"] = str(provenance["fingerprint"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the folder of a run that has a best.yaml") from None
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        raise InputError(f"{path}: not a best.yaml as run_search.py writes it") from None
    given, overrides = command_line({"data": flags.data}, flags.set)
    overrides |= {key: given[key] for key in ("epochs", "seed") if key in given}
    plan = build(SearchPlan, settings | given, str(path))
    reshaped = any(given.get(key, settings.get(key)) != settings.get(key) for key in ("fit", "drop_colour"))
    if plan.ensemble and (overrides or reshaped or flags.data is not None or plan.final_data != "train"):
        raise InputError(
            "ensemble=true: takes the weights that the search has trained, on its training images; leave it out, or "
            "leave out --data, final_data, fit, drop_colour and parameters of trials"
        )
    changed = flags.data is not None or reshaped or "weights" in given or bool(overrides.keys() - {"seed"})
    return Best(path, build(TrialConfig, document | overrides, str(path)), plan, provenance, changed)


def _median_best_epoch(best: Best) -> int:
    """The median best epoch of the finalists; without finalists the trial's own. At most all planned epochs."""
    found: list[int] = best.provenance.get("best_epochs") or [best.provenance.get("best_epoch", {}).get("epoch")]
    if None in found:
        raise InputError(f"final_data=train+val: {best.path} says of no epoch that it was best; leave it out")
    return min(round(statistics.median(found)), best.config.epochs)


def _validated(best: Best, logits: NDArray[Any] | None, samples: pd.DataFrame) -> tuple[list[NDArray[Any]], str | None]:
    """Logits of validation by models that were not trained on it, and which models these are.

    Where the final model was (its own `logits` are null), these are the search's runs of the same configuration.
    """
    path = best.path.parent / "trials.parquet"
    if logits is not None:
        return [logits], "validation"
    if best.changed or not path.exists():
        return [], None
    trials = tables.read_table(path)
    columns = [name for name in trials.columns if name.startswith("config_")]
    mine = trials.loc[trials["trial_id"] == best.provenance.get("trial_id"), columns]
    alike = trials[trials["origin"] != "probe"].merge(mine, on=columns)
    known = read_predictions(path.parent, alike, samples)
    named = f"validation, by {', '.join(known.trial_ids)} of the search" if known.trial_ids else None
    return [logarithms(each) for each in known.probabilities], named


def _note_reading(folder: Path, fingerprint: str, trained_on: str, ensemble: bool) -> dict[str, Any]:
    """Record, for good, that this data's test set is read; says the how manieth time it is, and when the first was."""
    path = folder / READINGS
    journal = tables.Journal(path)
    journal.append("test_read", fingerprint=fingerprint, trained_on=trained_on, ensemble=ensemble)
    journal.close()
    times = [event["time"] for event in tables.read_journal(path) if event["fingerprint"] == fingerprint]
    first, this = (datetime.fromtimestamp(time, UTC).isoformat(timespec="seconds") for time in (times[0], times[-1]))
    return {"number": len(times), "at": this, "first_at": first}


def _tested(logits: NDArray[Any], temperature: float, samples: pd.DataFrame, data: "Data") -> dict[str, Any]:
    """What `metrics.json` says of the test set."""
    rows = samples.iloc[data.test]
    groups = group_numbers(rows)
    targets = data.labels[data.test]
    tested = measure(tempered(logits, temperature), targets, groups, data.classes)
    return tested | {"calibration_error_untempered": calibration_error(tempered(logits, 1.0), targets)}


def _tell_epoch(row: dict[str, Any], epochs: int, *, on_both: bool) -> None:
    names = ("train_loss", "train_eval_loss") + (() if on_both else ("val_loss", "val_accuracy"))
    said = "  ".join(f"{name} {'not finite' if row[name] is None else f'{row[name]:.4f}'}" for name in names)
    print(f"epoch {row['epoch']}/{epochs}  {said}", flush=True)


def _tell(folder: Path, metrics: dict[str, Any]) -> None:
    validation, tested, reading = metrics["validation"], metrics["test"], metrics["test_reading"]
    if "ensemble" in metrics:
        members = ", ".join(f"{trial_id} {share:.0%}" for trial_id, share in metrics["ensemble"].items())
        print(f"ensemble: {members}")
        if validation is not None:
            print(
                f"val_loss {validation['val_loss']:.4f}, of the best trial alone {validation['best_trial_alone']:.4f} "
                "(each judged on the half of validation that it was not chosen on)"
            )
    elif validation is None:
        print(f"\ntrained on training and validation images together, for {metrics['epochs']} epochs")
    else:
        print(f"\nbest epoch {metrics['epochs']}, val_loss {validation['val_loss']:.4f}")
    if metrics["temperature"]["fitted_on"] is None:
        print("temperature 1: there is no validation to fit it on")
    else:
        print(f"temperature {metrics['temperature']['value']:.2f}, fitted on {metrics['temperature']['fitted_on']}")
    if tested is None:
        print("no test images: nothing was tested")
    else:
        if reading["number"] > 1:
            count = "second reading" if reading["number"] == 2 else f"reading number {reading['number']}"
            print(
                f"{count} of this test set (the first: {reading['first_at']}): whoever chooses between models by it "
                "has no test any more"
            )
        groups = "" if tested["groups"] == tested["images"] else f" of {tested['groups']} groups"
        print(f"test, {tested['images']} images{groups}, with 95% intervals:")
        print(f"  {_figures(tested, 'accuracy', 'balanced_accuracy', 'auroc')}")
        for name, values in tested["classes"].items():
            print(f"  {name}: {_figures(values, 'sensitivity', 'specificity', 'auroc')}")
        before, after = tested["calibration_error_untempered"], tested["calibration_error"]
        print(f"  calibration error {after:.3f} ({before:.3f} without the temperature)")
    print(f"\nwritten: {folder}\nNext:\n  python tuning/model_folder.py predict {folder} IMAGE ...")


def _figures(values: dict[str, Any], *names: str) -> str:
    said = []
    for name in names:
        interval = "" if values[name] is None else " ({:.3f} to {:.3f})".format(*values[f"{name}_95"])
        number = "-" if values[name] is None else f"{values[name]:.3f}"
        said.append(f"{name.replace('_', ' ').replace('auroc', 'AUROC')} {number}{interval}")
    return "  ".join(said)


if __name__ == "__main__":
    sys.exit(main())
