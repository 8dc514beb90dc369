"""What a paper on the model has to report: CLAIM and TRIPOD+AI, filled from the run as far as it knows.

CLAIM, 2024 update: Tejani et al. 2024, https://doi.org/10.1148/ryai.240300. TRIPOD+AI: Collins et al. 2024,
https://doi.org/10.1136/bmj-2023-078378. Items are named in words of our own.
"""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from tuning import __version__
from tuning.insight import analysis
from tuning.model.card import OVERALL, plain
from tuning.model.held_out import estimate, temperature_in_words
from tuning.record import tables
from tuning.record.subgroups import subgroups_of
from tuning.record.targets import NONE, counted, unknown_labels
from tuning.settings.documents import read_plan
from tuning.settings.words import count

FILE = "reporting.md"
YOURS = "*only you can say*"
# Number, what it asks for, and the facts that answer it; without facts it is the author's.
Items = tuple[tuple[str, str, tuple[str, ...]], ...]
CLAIM: Items = (
    ("1, 2", "title and abstract that name the method", ("method",)),
    ("3, 4", "background, intended use, aims and hypotheses", ()),
    ("5, 6", "prospective or retrospective; goal of the study", ()),
    ("7", "data sources", ("place",)),
    ("8", "criteria for inclusion and exclusion", ("left_out",)),
    ("9", "preprocessing", ("preprocessing",)),
    ("10", "subsets that were selected", ("left_out",)),
    ("11", "de-identification", ()),
    ("12", "missing data", ("missing",)),
    ("13", "how images were acquired", ()),
    ("14 to 18", "reference standard: definition, reason, annotators, test set, variability", ("labels",)),
    ("19, 20", "how images were assigned to sets, and at which level these are disjoint", ("split", "leaks")),
    ("21", "intended sample size", ()),
    ("22", "the model: architecture, inputs, outputs", ("architecture", "outputs")),
    ("23", "software", ("software",)),
    ("24", "initial weights", ("initial",)),
    ("25", "training: augmentation, hyperparameters, search, hardware", ("training", "search")),
    ("26", "how the final model was selected", ("selection",)),
    ("27", "ensembling", ("ensemble",)),
    ("28", "metrics", ("metrics",)),
    ("29", "statistical significance and uncertainty", ("uncertainty", "verdict")),
    ("30", "robustness", ("shortcuts", "subgroups")),
    ("31", "explanations", ("explanations",)),
    ("32", "evaluation on internal data", ("reading",)),
    ("33", "test on external data", ("external",)),
    ("34", "registration of a trial", ()),
    ("35", "flow of participants or examinations", ("counts",)),
    ("36", "demographic and clinical characteristics of each set", ("characteristics",)),
    ("37, 38", "performance with its uncertainty", ("results", "calibration")),
    ("39", "analysis of failures", ("failures",)),
    ("40, 41", "limitations; implications for practice", ("limits",)),
    ("42 to 44", "protocol; availability of code, model and data; funding", ("availability",)),
)
TRIPOD: Items = (
    ("1, 2", "title and abstract", ("method",)),
    ("3a to 3c", "context, target population, known inequalities", ()),
    ("4", "objectives", ()),
    ("5a, 5b", "data sources and dates", ("place",)),
    ("6a to 6c", "setting, eligibility, treatments", ()),
    ("7", "preparation of data", ("preprocessing", "left_out")),
    ("8a to 8c", "outcome: definition, assessors, blinding", ("labels",)),
    ("9a to 9c", "predictors", ("inputs",)),
    ("10", "sample size", ("counts",)),
    ("11", "missing data", ("missing",)),
    ("12a", "how data were used for development and evaluation", ("split", "leaks")),
    (
        "12b, 12c",
        "predictors in the analysis; type of model and how it was built",
        ("architecture", "training", "search"),
    ),
    ("12d", "heterogeneity between clusters", ()),
    ("12e", "measures of performance", ("metrics", "uncertainty")),
    ("12f", "updating of the model", ()),
    ("12g", "how predictions are computed", ("outputs", "availability")),
    ("13", "class imbalance", ("imbalance",)),
    ("14", "fairness", ("subgroups",)),
    ("15", "output of the model and its thresholds", ("outputs", "thresholds")),
    ("16", "differences between training and evaluation data", ("external",)),
    ("17", "ethical approval", ()),
    ("18a to 18f", "funding, interests, protocol, registration, data, code", ("availability",)),
    ("19", "involvement of patients and public", ()),
    ("20a to 20c", "flow and characteristics of participants", ("counts", "characteristics")),
    ("21", "numbers of participants and outcomes in each analysis", ("counts",)),
    ("22", "the full model", ("availability",)),
    ("23a, 23b", "performance, also in subgroups", ("results", "calibration", "subgroups")),
    ("24", "results of updating", ()),
    ("25, 26", "interpretation; limitations", ("limits",)),
    ("27a to 27c", "poor or missing input; expertise needed; next steps", ("unusable",)),
)


def sheet(
    model: Path, run: Path, provenance: Mapping[str, Any], samples: pd.DataFrame, audit: pd.DataFrame | None
) -> str:
    """Return the checklists, in Markdown; arguments as in `card.card`."""
    known = facts(model, run, provenance, samples, audit)
    parts = [
        f"# What to report of {plain(provenance.get('run', 'model'))}",
        "Filled from the run. Compare it with the journal's own form: items are shortened here, and what is marked is "
        "yours to write. Figures and settings are in the model card (README.md).",
    ]
    for title, items in (("CLAIM, 2024 update", CLAIM), ("TRIPOD+AI", TRIPOD)):
        rows = []
        for number, asks, keys in items:
            said = " ".join(known[key] for key in keys if known.get(key))
            rows.append(f"| {number} | {asks} | {said or YOURS} |")
        parts.append("\n".join([f"## {title}", "", "| item | asks for | from this run |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def facts(
    model: Path, run: Path, provenance: Mapping[str, Any], samples: pd.DataFrame, audit: pd.DataFrame | None
) -> dict[str, str]:
    """Return what a run knows, in sentences by subject; empty where it knows nothing."""
    config = yaml.safe_load((model / "config.yaml").read_text(encoding="utf-8"))
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    settings = provenance.get("final_settings", provenance["settings"])
    several, members = config.get("multi_label", False), config.get("ensemble", {})
    networks = [yaml.safe_load((model / name / "config.yaml").read_text(encoding="utf-8")) for name in members]
    each, shaping = [one["config"] for one in networks or [config]], (networks or [config])[0]["preprocessing"]
    tested, groups = metrics["test"], samples["group"].notna().any()
    unit = "groups (such as patients)" if groups else "images"
    counts = counted(samples)
    by_split = {
        split: f"{split} {count(int(number), 'image')}"
        + (f" of {samples.loc[samples['split'] == split, 'group'].nunique():,} groups" if groups else "")
        for split, number in samples["split"].value_counts().items()
    }
    shared = int((samples.dropna(subset="group").groupby("group")["split"].nunique() > 1).sum())
    drawn = "Sets"
    if (run / "plan.yaml").exists():
        at_random = read_plan(run)["provenance"].get("val_drawn", False)
        drawn = "Training and validation sets drawn at random" if at_random else "Sets as given by the data"
    found = {
        "method": "Deep learning: fine-tuned convolutional or transformer image classifier.",
        "place": f"Images from {plain(settings.get('data') or 'generated radiographs')}, fingerprint "
        f"{plain(config['provenance']['fingerprint'][:16])}.",
        "labels": f"Labels: {', '.join(plain(name) for name in counts.index if name != NONE)}"
        f"{' (an image may have several)' if several else ''}. Who gave them, and how: {YOURS}",
        "counts": "; ".join(by_split[name] for name in ("train", "val", "test") if name in by_split) + ".",
        "split": drawn + (f"; {count(shared, 'group')} in several of them." if shared else f", disjoint by {unit}."),
        "metrics": "Accuracy, balanced accuracy, AUROC, AUPRC, F1, sensitivity and specificity of each "
        f"{'label' if several else 'class'}, cross-entropy, expected calibration error.",
        "uncertainty": f"95% confidence intervals, each {'group' if groups else 'image'} as one observation (Wilson; "
        "DeLong for AUROC).",
        "verdict": f"Verdict of the search: {plain(provenance.get('why') or provenance.get('verdict') or 'unknown')}.",
        "outputs": f"A probability of each {'label' if several else 'class'}, with temperature scaling "
        f"({temperature_in_words(metrics['temperature']['value'])}).",
        "inputs": "The pixels of one image; no other predictor.",
        "explanations": "Class-activation maps (HiResCAM) of the most confident mistakes: mistakes.html."
        if tested is not None
        else "",
        "availability": "The model's folder has weights, ONNX file, configuration and predictions; the software is "
        f"finetune-search. Data and funding: {YOURS}",
        "external": f"By `evaluate.py` on labelled images from elsewhere, which writes what differs. Results: {YOURS}",
        "unusable": "Unreadable images are refused, and images unlike those of training are flagged (`predict`).",
        "limits": "See the limitations in the model card.",
        "imbalance": f"Images by {'label' if several else 'class'}: "
        + ", ".join(f"{plain(name)} {int(row.sum()):,}" for name, row in counts.iterrows())
        + f"; class_weighting={each[0]['class_weighting']}.",
        "ensemble": f"The mean of {count(len(members), 'network')}." if members else "One network.",
    }
    found["architecture"] = "; ".join(
        f"{plain(one['backbone'])} at {one['image_size']} px, {one['unfreeze_depth']} of 5 stages trained"
        for one in each
    )
    found["training"] = "; ".join(
        f"{plain(one['optimizer'])}, learning rate {one['learning_rate']:.3g}, {plain(one['schedule'])} schedule, "
        f"batch of {one['batch_size']}, up to {count(one['epochs'], 'epoch')}, augmentation "
        f"{plain(one['augmentation'])}, batch norm {plain(one['batch_norm'])}"
        for one in each
    )
    found |= {name: f"{found[name]}." for name in ("architecture", "training")}
    found["preprocessing"] = f"{plain(shaping['resize'])}; {plain(shaping['channels'])}; mean and deviation subtracted."
    digests = provenance.get("weights") or {}
    if used := sorted({one["backbone"] for one in each} & digests.keys()):
        files = ", ".join(f"{plain(name)} ({plain(str(digests[name])[:12])})" for name in used)
        found["initial"] = f"Pretrained weights, by the sha256 of their files: {files}."
    if packages := provenance.get("packages"):
        named = {"finetune-search": __version__, **packages}
        found["software"] = ", ".join(f"{plain(name)} {plain(version)}" for name, version in named.items()) + "."
    if (run / "trials.parquet").exists():
        trials = analysis.searched(tables.read_table(run / "trials.parquet"))
        early = ", early stopping by ASHA" if settings.get("early_stopping", True) else ""
        tried, epochs = count(len(trials), "configuration"), count(int(trials["epochs"].sum()), "epoch")
        found["search"] = f"{tried} tried (Optuna {plain(settings['sampler'])}{early}), {epochs} in all."
    of_val = "its best epoch on the validation set" if metrics["trained_on"] == "train" else "the median best epoch"
    what = "the trials whose mean is best" if members else "one configuration"
    found["selection"] = f"By {plain(settings['metric'])} on the validation set: {what}, each at {of_val}."
    if several:
        unknown = sum(unknown_labels(samples).values())
        read = {"negative": "as absent", "ignore": "as unknown"}[settings.get("blank", "negative")]
        found["missing"] = (
            f"{count(unknown, 'unknown label')}, left out of loss and figures; empty cells of label columns were read "
            f"{read}, uncertain ones as uncertain={plain(settings.get('uncertain', 'ignore'))}."
        )
    if audit is not None:
        kinds = audit["finding"].value_counts()
        lost = int(kinds.get("unreadable", 0))
        found["left_out"] = f"{count(lost, 'unreadable image')} left out." if lost else ""
        leaks = audit["finding"].isin(["group_across_splits", "exact_duplicate", "near_duplicate"])
        across = audit["detail"].str.contains("; in ", regex=False) | (audit["finding"] == "group_across_splits")
        found["leaks"] = f"Copies and groups in several sets, by the audit: {int((leaks & across).sum()):,}."
        shortcuts = audit.loc[audit["finding"].str.startswith("shortcut_"), "detail"]
        found["shortcuts"] = (
            f"Shortcuts: {plain('; '.join(shortcuts))}." if len(shortcuts) else "No shortcut was found."
        )
    parts = []
    for column, cells in subgroups_of(samples)[0].items():
        values = pd.Series(cells, index=samples.index).fillna("unknown")
        for split in by_split:
            numbers = Counter(values[samples["split"] == split]).most_common()
            parts.append(f"{plain(column)} in {split}: {', '.join(f'{plain(value)} {n:,}' for value, n in numbers)}")
    found["characteristics"] = "; ".join(parts)
    if tested is not None:
        found["reading"] = f"Test set of {count(tested['images'], 'image')}, evaluation number "
        found["reading"] += f"{metrics['test_reading']['number']}."
        overall = ("accuracy", "balanced_accuracy", "auroc")
        found["results"] = "; ".join(f"{OVERALL[name]} {estimate(tested, name)}" for name in overall) + "."
        found["calibration"] = f"Expected calibration error {tested['calibration_error']:.3f}."
        found["failures"] = "The most confident mistakes are in mistakes.html."
        found["thresholds"] = "Thresholds for 90 and 95% specificity on validation are in metrics.json."
        if words := tested.get("subgroups_in_words"):
            found["subgroups"] = " ".join(f"{plain(line)}." for line in words)
    return found
