"""best.yaml -> what the search has trained, or a training anew -> the test set, once -> the model folder."""

import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout comes first on the path, not this folder, whose modules would shadow others
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import dataclasses
import json
import os
import shlex
import statistics
import tempfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
import tyro
from numpy.typing import NDArray

from tuning.api import CommandModule
from tuning.checks.audit import Checked, load_checked
from tuning.data.changes import OtherSamples, changes, elsewhere
from tuning.data.images import content_hashes, cores, open_images, read_facts
from tuning.insight import conformal, shift
from tuning.insight.best import config_digest
from tuning.insight.ensemble import declined, members, offer
from tuning.insight.operating import median_thresholds, prevalences
from tuning.insight.per_group import By
from tuning.model.held_out import READINGS, print_metrics, record_evaluation, score_test_set
from tuning.record import tables
from tuning.record.journal import read_journal
from tuning.record.mirror import borrowed
from tuning.record.predictions import group_numbers, read_predictions, write_tested
from tuning.record.storage import is_uri, joined
from tuning.record.temperature import fit_temperature, logarithms, median_temperature, plain, tempered
from tuning.search.plans import other_packages, short_training
from tuning.settings.command_line import BAD_INPUT, DONE, Pairs, command_line, endure, exit_code, flag, leave
from tuning.settings.config import SAMPLE_SETTINGS, InputError, SearchPlan, TrialConfig, build, cache_folder, visible
from tuning.settings.documents import check_parts, read_mapping
from tuning.settings.words import count, examples

if TYPE_CHECKING:
    from tuning.model.final import Kept


PLACES = ("images", "join", "split_files")
OF_OTHER_DATA = (*SAMPLE_SETTINGS, "on_leak", "skip_unreadable")
EFFECTIVE = (
    *("data", "fit", "drop_colour", "disk_cache_bytes", "cache_bytes"),
    *("weights", "epochs", "seed", "metric", "final_data", "ensemble", "device", "deterministic", "cuda_graphs"),
)


@dataclasses.dataclass(frozen=True)
class Flags:
    """Take the best trial of a search, or the mean of its best, or train; test it once, and write the model folder.

    Example: python tuning/train_final.py results/xray
    """

    best: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Folder or URI of a run, or a best.yaml."""
    data: Annotated[tyro.conf.DisallowNone[str | None], tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Other data to train and test on, with splits of its own, or the place that the data of the search was moved to.
    Default: the data and splits of the search."""
    device: Annotated[str | None, flag("device", "auto|cpu|cuda|mps")] = None
    prevalence: Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS=SHARE ...", help_behavior_hint="")] = ()
    """Share of a class where the model is to be used, by which its PPV and NPV are given: pneumonia=0.02."""
    per_group: Annotated[
        tyro.conf.DisallowNone[By | None], tyro.conf.arg(metavar="mean|max", help_behavior_hint="")
    ] = None
    """Gives the figures also per group, such as a patient, by the mean or the maximum of its images' probabilities."""
    set: Annotated[Pairs, tyro.conf.arg(metavar="KEY=VALUE ...")] = ()
    """Settings of the final model or of --data, and trials' parameters: --set ensemble=false learning_rate=1e-4."""


def main() -> int:
    """Run the command line; return the exit code."""
    endure()
    return exit_code(lambda: _run_at(tyro.cli(Flags)), "what is not in model/ was not written")


def _run_at(flags: Flags) -> int:
    with borrowed(flags.best) as place:
        written = str(run(dataclasses.replace(flags, best=str(place))))
    if is_uri(flags.best):
        if place.exists():  # the model couldn't be sent, which has been reported
            return BAD_INPUT
        written = joined(flags.best, "model")
    print(f"\nwritten: {written}\nNext:\n  python tuning/model_folder.py predict {shlex.quote(written)} IMAGE ...")
    return DONE


@dataclasses.dataclass(frozen=True)
class Best:
    """A best.yaml with the changes that the command line makes."""

    path: Path
    config: TrialConfig
    plan: SearchPlan
    provenance: dict[str, Any]
    changed: bool  # whether the configuration or the data differs from the search's
    chosen_weights: bool  # whether the command line names the pretrained weights
    retrained: bool  # whether the command line asks for another training than the search's


def run(flags: Flags, *, onnx: bool = True) -> Path:
    """Train, test and write `model/` beside best.yaml; return its folder. Wrong input raises InputError.

    Args:
        flags: of the command line.
        onnx: whether to write the ONNX file, which takes longest after training.
    """
    # Read and check: the configuration, the run, the data.
    best = _read_best(Path(flags.best) / "best.yaml" if Path(flags.best).is_dir() else Path(flags.best), flags)
    config, plan, run_folder = best.config, best.plan, best.path.parent
    folder = run_folder / "model"
    # Damage is reported before hours of training.
    if (run_folder / READINGS).exists():
        read_journal(run_folder / READINGS)
    trials, findings = _table(run_folder / "trials.parquet"), _table(run_folder / "audit.parquet")
    if folder.exists():
        raise InputError(f"{folder} exists, and the test set is to be read once; move it away to train again")
    if not os.access(run_folder, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{run_folder}: no permission to write there; copy best.yaml to a folder of your own")
    table = _table(run_folder / "samples.parquet")
    if flags.data is not None and table is not None:
        table = _moved(table, best)
    elif table is not None and (changed := changes(table, plan, best.provenance.get("listing"))):
        cure = "restore it, or give the new data by --data"
        raise InputError(f"{plan.data} has changed since {best.path} was written: {changed}; {cure}")
    last = _median_best_epoch(best) if plan.final_data == "train+val" else None
    if last is not None and best.changed:
        print(f"trained up to epoch {last}, the best of {best.provenance.get('trial_id')}, which was trained otherwise")
    taken = _taken(best, run_folder, table)
    configs = {"": config} if taken is None else taken.configs
    sizes = sorted({each.image_size for each in configs.values()})
    table, folders, found, audit, notes = _load(best, sizes, table, moved=flags.data is not None)
    if taken is not None and found != best.provenance["fingerprint"] and flags.data is not None:  # other images
        taken, configs, sizes = None, {"": config}, [config.image_size]
        if config.image_size not in folders:
            table, folders, found, audit, notes = _load(best, sizes, None, moved=True)
    if taken is not None:
        _print_taken(taken, best.provenance)
    if audit is not None:
        findings = audit.to_pandas()
    best = dataclasses.replace(best, changed=best.changed or found != best.provenance["fingerprint"])
    if flags.data is None and found != best.provenance["fingerprint"]:
        cure = "give the new data by --data"
        if plan.data is None:
            cure = f"train on the images generated here by --data {Path(table['file'].iloc[0]).parents[1]}"
        raise InputError(f"the data has changed since {best.path} was written; restore it, or {cure}")
    for words in short_training(config.warmup_epochs, config.epochs):
        print(words)
    if packages := other_packages(best.provenance):
        print(f"other versions than in the search: {', '.join(packages)}")
    for line in notes:
        print(visible(line))

    # torch takes seconds to load, and timm more: wrong input is reported before.
    from tuning.model import familiar
    from tuning.model.activation import class_maps
    from tuning.model.card import card
    from tuning.model.evaluation import known_images, outlines, write_known_images
    from tuning.model.export import MODEL, export, interface
    from tuning.model.final import assemble, train, usual_features
    from tuning.model.folder import preprocessing, save_ensemble, save_model
    from tuning.model.mistakes import SIDE, mistakes_page, picture, worst
    from tuning.model.sheet import FILE as REPORTING
    from tuning.model.sheet import sheet
    from tuning.show.plots import write_plots
    from tuning.training.backbones import check
    from tuning.training.dataset import join
    from tuning.training.device import all_gpus, ready
    from tuning.training.digests import digests, other_weights
    from tuning.training.features import FeatureCache, HeldOutputs
    from tuning.training.outputs import run_folder as outputs_folder
    from tuning.training.weights import find_weights

    data = {size: join(table, open_images(images)) for size, images in folders.items()}
    some = data[sizes[0]]
    prevalence = prevalences(flags.prevalence, some.classes)
    weights = find_weights([each.backbone for each in configs.values()], plan.weights)
    if not best.chosen_weights and (other := other_weights(digests(weights), best.provenance.get("weights"))):
        named = shlex.quote(plan.weights) if isinstance(plan.weights, str) else "'{BACKBONE: FILE}'"
        cure = f"restore them, or train with these by --set weights={named}"
        raise InputError(f"the pretrained weights of {examples(other)} have changed since the search; {cure}")
    for each in configs.values():
        said = check(each.backbone, [each.image_size], weights[each.backbone])
        if said and best.chosen_weights:
            print(visible(f"{each.backbone}: {said}"))
    device = ready(plan.device, threads=cores(), deterministic=plan.deterministic)

    # Take what the search has trained, or train.
    if taken is not None:
        final = assemble(taken, data, weights=weights, device=device)
    else:
        with outputs_folder(cache_folder(), folder) as outputs:
            final = train(
                config,
                some,
                last=last,
                weights=weights[config.backbone],
                devices=all_gpus(device),
                metric=plan.metric,
                graphs=plan.cuda_graphs and device.type == "cuda",
                features=HeldOutputs(device)
                if device.type != "cpu"
                else FeatureCache(outputs, plan.cache_bytes, augmented=False),
                on_epoch=lambda row: _print_epoch(row, config.epochs, on_both=last is not None),
            )

    # Calibrate.
    validated, fitted_on = _validated(best, trials, final.validated, table)
    several: dict[str, Any] = {"multi_label": some.multi_label}
    of_val = some.labels[some.val]
    temperature = median_temperature([fit_temperature(logits, of_val) for logits in validated])
    of_validated = [tempered(logits, temperature, **several) for logits in validated]
    thresholds = median_thresholds(of_validated, of_val, some.classes)

    # Export before the test set is read, since this takes a while and may be interrupted.
    unfinished = Path(tempfile.mkdtemp(prefix=".model-", dir=run_folder))
    unfinished.chmod(0o755)
    shaping = {
        name: preprocessing(network, each, plan.fit, plan.drop_colour)
        for name, (network, each) in final.networks.items()
    }
    exported: dict[str, Any] = {"error": "not asked for"}
    if onnx:
        inside: dict[str, Any] = {"classes": some.classes, "temperature": plain(temperature), "fingerprint": found}
        inside |= interface(final) | several
        inside |= shaping[""] if "" in shaping else {"members": shaping}
        exported = export(unfinished / MODEL, final, data, temperature=temperature, described=inside)

    # What the model folder keeps of the images, which may be out of reach later.
    first, (network, its_config) = next(iter(final.networks.items()))
    of_size = data[its_config.image_size]
    usual = usual_features(network, its_config, of_size, device)
    groups = group_numbers(table.iloc[of_size.val])
    ruled = conformal.scores(of_validated, of_val, groups, some.classes)
    facts, everyone = read_facts(folders[sizes[0]]), np.arange(len(table))
    contents = content_hashes(list(table["file"]), cache_folder())
    known = known_images(
        table["split"].tolist(),
        contents,
        facts,
        shift.described(np.asarray(some.images), everyone, facts),
        outlines(np.asarray(some.images), everyone),
    )

    # Test, once.
    tested, reading, logits = None, None, None
    rows = table.iloc[some.test]
    if len(rows):
        hashes = [contents[row] for row in some.test]
        reading = record_evaluation(run_folder, found, final.metrics["trained_on"], len(final.networks) > 1, hashes)
        logits = final.logits(data, "test", device)
        if flags.per_group is not None and rows["group"].isna().all():
            print("no patients are known, so --per-group counts each image as one")
        tested = score_test_set(
            logits, temperature, rows, some.classes, thresholds, prevalence, per_group=flags.per_group
        )

    # Write: weights and metrics first, then what people look at.
    metrics = final.metrics | {
        "verdict": best.provenance.get("verdict"),
        "temperature": {
            "value": plain(temperature),
            "fitted_on": fitted_on,
            "images": len(some.val) if fitted_on else 0,
        },
        "thresholds": thresholds,
        "test_reading": reading,
        "test": tested,
        "onnx": exported,
    }
    provenance = {"trained_from": best.path.name, "metric": plan.metric, "fingerprint": found, "epochs": config.epochs}
    described: dict[str, Any] = {"provenance": provenance} | ({} if "error" in exported else {"onnx": interface(final)})
    shaped: dict[str, Any] = {"fit": plan.fit, "drop_colour": plan.drop_colour}
    for name, (network, each) in final.networks.items():
        own = {"provenance": provenance} if name else described | {"temperature": temperature}
        save_model(unfinished / name, network, each, some.classes, **shaped, **several, **own)
    if len(final.networks) > 1:
        whole = described | {"preprocessing": shaped}
        save_ensemble(unfinished, final.shares, some.classes, temperature, **several, **whole)
    (unfinished / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    write_known_images(unfinished, known)
    if usual is not None:
        familiar.write(unfinished / first, usual)
    if len(ruled):
        conformal.write(unfinished, ruled)
    if logits is not None:
        probabilities = tempered(logits, temperature, **several)
        write_tested(unfinished / "predictions.parquet", rows, some.classes, probabilities, temperature=temperature)
    try:
        unfinished.rename(folder)
    except OSError as error:
        raise InputError(f"{folder}: can't be written ({error.strerror}); the model is in {unfinished}") from None
    print_metrics(metrics)
    try:  # the model is written and tested: a fault in what only shows it must not fail the command
        if logits is not None:
            targets = some.labels[some.test]
            write_plots(folder, some.classes, targets, probabilities, temperature)
            mistakes = worst(targets, probabilities)
            indices = some.test[mistakes.rows]
            pictures = [
                picture(file, np.asarray(some.images[index]), **shaped)
                for file, index in zip(rows["file"].iloc[mistakes.rows], indices, strict=True)
            ]
            maps = class_maps(final, data, indices, mistakes.predicted, SIDE) if len(indices) else None
            title = str(best.provenance.get("run", "model"))
            page = mistakes_page(title, mistakes, rows, probabilities, some.classes, pictures, maps)
            (folder / "mistakes.html").write_text(page, encoding="utf-8", errors="replace")
        whence = best.provenance | {"changed": best.changed, "final_settings": plan.model_dump()}
        (folder / "README.md").write_text(card(folder, run_folder, whence, table, findings), encoding="utf-8")
        (folder / REPORTING).write_text(sheet(folder, run_folder, whence, table, findings), encoding="utf-8")
    except Exception as error:
        print(
            f"plots, mistakes.html, README.md or reporting.md are missing ({type(error).__name__}: {error})",
            file=sys.stderr,
        )
    return folder


def _table(path: Path) -> pd.DataFrame | None:
    return tables.read_table(path) if path.exists() else None


def _read_best(path: Path, flags: Flags) -> Best:
    if not path.is_file():
        raise InputError(f"{path}: no such file; give the folder of a run that has a best.yaml")
    document = read_mapping(path)
    check_parts(document, path, {"provenance": dict})
    provenance = document.pop("provenance")
    check_parts(provenance, path, {"fingerprint": str, "settings": dict})
    settings = provenance["settings"]
    given, overrides = command_line({"data": flags.data, "device": flags.device}, flags.set)
    overrides |= {key: given[key] for key in ("epochs", "seed") if key in given}
    _check_effect(given, path.parent, flags)
    places = PLACES if flags.data is not None else ()  # of the search's data, not of other data
    plan = build(SearchPlan, {key: settings[key] for key in settings if key not in places} | given, str(path))
    reshaped = any(given.get(key, settings.get(key)) != settings.get(key) for key in ("fit", "drop_colour"))
    retrained = bool(overrides) or reshaped or plan.final_data != "train" or plan.metric != settings.get("metric")
    if plan.ensemble is True and retrained:
        cure = "leave it out, or leave out final_data, fit, drop_colour and parameters of trials"
        raise InputError(f"ensemble=true: uses the weights that the search has trained; {cure}")
    chosen = "weights" in given
    trained = build(TrialConfig, document | overrides, str(path))
    edited = provenance.get("config_sha256") not in (None, config_digest(document))
    if plan.ensemble is True and edited:
        raise InputError(f"ensemble=true: uses what the search has trained, and {path} is no longer it; leave it out")
    changed = reshaped or chosen or edited or bool(overrides.keys() - {"seed"})
    return Best(path, trained, plan, provenance, changed, chosen, retrained or chosen)


def _check_effect(given: Mapping[str, Any], run: Path, flags: Flags) -> None:
    """Raise InputError for settings of the command line that change nothing about the final model."""
    unused = given.keys() - {*EFFECTIVE, *OF_OTHER_DATA}
    faults = [f"{name}: has no effect on the final model; leave it out" for name in sorted(unused)]
    if flags.data is None and (run / "samples.parquet").exists():
        cure = "has no effect on the search's data; leave it out, or give --data"
        faults += [f"{name}: {cure}" for name in sorted(given.keys() & set(OF_OTHER_DATA))]
    if faults:
        raise InputError(faults)


def _taken(best: Best, run: Path, table: pd.DataFrame | None) -> "Kept | None":
    """Return what the search has trained: the mean of several trials, or the best one; None if it is to be trained.

    Raises:
        InputError: `ensemble=true` can't be.
    """
    asked = best.plan.ensemble
    if asked is not True and (table is None or best.retrained):
        return None
    if table is None:
        needed = "the folder of a run, with its tables, and the images of its search"
        raise InputError(f"ensemble=true: needs {needed}; leave out ensemble or --data")
    from tuning.model.final import kept_trials

    if asked is not True and not (run / "trials.parquet").exists():
        return None
    found = kept_trials(run, table)
    if asked is True and len(found.predictions.trial_ids) < 2:
        lacks = f"fewer than two trials of {run} have both their best weights (checkpoints/) and their validation"
        raise InputError(f"ensemble=true: {lacks} probabilities (predictions/); leave ensemble out")
    chosen = str(best.provenance.get("trial_id"))
    kept = chosen in found.predictions.trial_ids
    same = kept and found.configs[chosen] == best.config
    if asked is True or (asked == "auto" and same):
        least = 2 if asked is True else 1
        gained = offer(found.predictions, chosen, least=least)
        averaged = members(found.predictions, least=least) if gained is None else gained.members
        if len(averaged) > 1 and (asked is True or (gained is not None and gained.better)):
            if not (why := declined(best.plan)):
                return dataclasses.replace(found.of(averaged), gained=gained)
            print(f"the mean of {count(len(averaged), 'trial')} would be significantly better, but is not taken: {why}")
    if same:
        return found.of([chosen])
    if chosen in found.rows.index:
        why = f"{best.path} has another configuration" if kept else "its weights were not kept"
        print(f"{chosen} is trained anew: {why}")
    return None


def _print_taken(taken: "Kept", provenance: dict[str, Any]) -> None:
    chosen, gained = str(provenance.get("trial_id")), taken.gained
    if len(taken.configs) == 1:
        print(f"{chosen} as the search has trained it, with the weights of its best epoch")
    elif gained is None:
        print(f"the mean of {count(len(taken.configs), 'trial')}; it could not be compared with {chosen} alone")
    if gained is None:
        return
    latency_ms = taken.rows["latency_ms"]
    each = latency_ms[list(gained.members)]
    low, high = gained.gain_95 if gained.gain >= 0 else (-gained.gain_95[1], -gained.gain_95[0])
    change = f"{abs(gained.gain):.4f} {'lower' if gained.gain >= 0 else 'higher'}"
    print(
        f"the mean of {count(len(gained.members), 'trial')} of the search has a val_tempered_loss {change} than "
        f"{chosen} alone (95% confidence interval {low:.4f} to {high:.4f});",
        f"one image takes {each.sum():.1f} ms instead of {latency_ms.get(chosen, each.iloc[0]):.1f}; "
        f"--set ensemble=false takes {chosen} alone",
    )


def _moved(samples: pd.DataFrame, best: Best) -> pd.DataFrame | None:
    """Return the samples of the search with their files in --data; None, with a word, if --data has other samples."""
    try:
        return elsewhere(samples, best.plan, best.provenance.get("listing"))
    except OtherSamples as error:
        print(f"--data is used as other data, with splits of its own: {'; '.join(map(visible, error.faults))}")
        return None


def _load(best: Best, sizes: list[int], table: pd.DataFrame | None, *, moved: bool) -> Checked:
    """Load the samples of the search or, without them or if files of the same names have other content, --data."""
    checked = load_checked(best.plan, sizes, table=table)
    if moved and table is not None and checked.fingerprint != best.provenance["fingerprint"]:
        why = "its images have the names of the search's, but not all have their content"
        print(f"--data is used as other data, with splits of its own: {why}")
        return load_checked(best.plan, sizes)
    return checked


def _median_best_epoch(best: Best) -> int:
    """Return the median best epoch of the finalists or, without finalists, of the trial; at most the planned epochs."""
    own = best.provenance.get("best_epoch")
    found: Any = best.provenance.get("best_epochs") or [own.get("epoch") if isinstance(own, dict) else None]
    if not isinstance(found, list) or not all(type(epoch) is int and epoch > 0 for epoch in found):
        raise InputError(f"final_data=train+val: {best.path} names no best epoch; leave it out")
    return min(round(float(statistics.median(found))), best.config.epochs)


def _validated(
    best: Best, trials: pd.DataFrame | None, logits: NDArray[Any] | None, samples: pd.DataFrame
) -> tuple[list[NDArray[Any]], str | None]:
    """Return validation logits by models that were not trained on the validation set, and which models these are.

    If the final model was (its `logits` are None), these are the runs of the same configuration in the search.
    """
    if logits is not None:
        return [logits], "validation"
    if best.changed or trials is None:
        return [], None
    columns = [name for name in trials.columns if name.startswith("config_")]
    mine = trials.loc[trials["trial_id"] == best.provenance.get("trial_id"), columns]
    alike = trials[trials["origin"] != "probe"].merge(mine, on=columns)
    known = read_predictions(best.path.parent, alike, samples)
    named = f"validation, by {', '.join(known.trial_ids)} of the search" if known.trial_ids else None
    return [logarithms(each, multi_label=known.multi_label) for each in known.probabilities], named


def _print_epoch(row: dict[str, Any], epochs: int, *, on_both: bool) -> None:
    names = ("train_loss", "train_eval_loss") + (() if on_both else ("val_loss", "val_accuracy"))
    values = "  ".join(f"{name} {'not finite' if row[name] is None else f'{row[name]:.4f}'}" for name in names)
    print(f"epoch {row['epoch']}/{epochs}  {values}", flush=True)


if __name__ == "__main__":
    leave(main())
else:  # `from tuning import train_final` is called as the command is
    sys.modules[__name__].__class__ = CommandModule
