"""best.yaml -> final training -> the test set, once -> the model folder."""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
import yaml
from numpy.typing import NDArray

from tuning import tables
from tuning.audit import load_checked
from tuning.config import InputError, SearchPlan, TrialConfig, build, command_line
from tuning.images import cache_folder, open_images

if TYPE_CHECKING:
    from tuning.data import Data


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
    try:
        run(tyro.cli(Flags))
    except InputError as error:
        for fault in error.faults:
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def run(flags: Flags) -> Path:
    """Train, test and write `model/` beside best.yaml; returns its folder.

    Raises:
        InputError: anything the user gave is wrong.
    """
    # What to train, on what.
    path = Path(flags.best) / "best.yaml" if Path(flags.best).is_dir() else Path(flags.best)
    config, plan, fingerprint = _read_best(path, flags)
    folder = path.parent / "model"
    if folder.exists():
        raise InputError(f"{folder} exists, and the test set is read once; move it away to train again")
    if not os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{path.parent}: no permission to write there; copy best.yaml to a folder of yours")
    recorded = path.parent / "samples.parquet"
    table = tables.read_table(recorded) if flags.data is None and recorded.exists() else None
    table, folders, found, _, told = load_checked(plan, [config.image_size], table=table)
    if flags.data is None and found != fingerprint:
        raise InputError(f"the data has changed since {path} was written; put it back, or name the new data by --data")
    for line in told:
        print(line)

    import torch  # takes seconds to load, and timm more: bad input and --help are told before

    from tuning import backbones
    from tuning.data import join, preparer
    from tuning.features import FeatureCache, run_folder
    from tuning.finetune import finetune, predict_images
    from tuning.model_folder import save_model
    from tuning.models import keep_memory
    from tuning.weights import find_weights

    data = join(table, open_images(folders[config.image_size]))
    weights = find_weights([config.backbone], plan.weights)[config.backbone]

    # Train: same schedule and epochs, best epoch on validation.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    if device.type == "cpu":
        keep_memory()
    snapshot = None
    with run_folder(cache_folder(), folder) as outputs:
        features = FeatureCache(outputs, plan.cache_bytes, device, augmented=False)
        for row, snapshot in finetune(  # noqa: B007
            config, data, device=device, weights=weights, metric=plan.metric, features=features
        ):
            _tell_epoch(row, config.epochs)
    assert snapshot is not None  # there is at least one epoch
    state = snapshot()
    best = tables.best_epoch(state.history, plan.metric)
    if best is None:
        raise InputError(f"{path}: no epoch had a finite loss; choose a lower learning rate by --set learning_rate=...")
    network = backbones.build(
        config.backbone,
        classes=len(data.classes),
        image_size=config.image_size,
        head_dropout=config.head_dropout,
        seed=config.seed,
        weights=weights,
    )
    trained = {name.removeprefix("best/"): tensor for name, tensor in state.tensors.items() if name.startswith("best/")}
    network.load_state_dict(trained, strict=False)

    # Test, once.
    tested = None
    if len(data.test):
        prepare = preparer(data.images, config.backbone, device)
        tested = measure(predict_images(network.to(device), prepare, data.test), data)
    metrics = {
        "best_epoch": best["epoch"],
        "validation": {name: best[name] for name in best if name.startswith("val_")},
    }
    metrics |= {"train_eval_loss": best["train_eval_loss"], "test": tested}
    provenance = {"trained_from": path.name, "metric": plan.metric, "fingerprint": found, "epochs": config.epochs}
    unfinished = folder.with_name(".model")
    shutil.rmtree(unfinished, ignore_errors=True)
    save_model(
        unfinished,
        network,
        config,
        data.classes,
        fit=plan.fit,
        drop_colour=plan.drop_colour,
        provenance=provenance,
    )
    (unfinished / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    unfinished.rename(folder)
    _tell(folder, metrics)
    return folder


def _read_best(path: Path, flags: Flags) -> tuple[TrialConfig, SearchPlan, str]:
    try:
        document = yaml.safe_load(path.read_text())
        provenance = document.pop("provenance")
        settings, fingerprint = provenance["settings"], str(provenance["fingerprint"])
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; give the folder of a run that has a best.yaml") from None
    except (yaml.YAMLError, AttributeError, KeyError, TypeError):
        raise InputError(f"{path}: not a best.yaml as run_search.py writes it") from None
    given, overrides = command_line({"data": flags.data}, flags.set)
    if "epochs" in given:
        overrides["epochs"] = given["epochs"]
    if "seed" in given:
        overrides["seed"] = given["seed"]
    return (
        build(TrialConfig, document | overrides, str(path)),
        build(SearchPlan, settings | given, str(path)),
        fingerprint,
    )


def measure(logits: NDArray[np.float32], data: "Data") -> dict[str, Any]:
    """What `metrics.json` says of the test set: accuracy with its 95% Wilson interval, and each class against the rest.

    Args:
        logits: [test images, classes].
        data: whose test split they are for.
    """
    from scipy.special import softmax
    from scipy.stats import binomtest
    from sklearn.metrics import confusion_matrix, roc_auc_score

    from tuning.scores import score

    targets, predicted = data.labels[data.test], logits.argmax(axis=1)
    right = int((predicted == targets).sum())
    interval = binomtest(right, len(targets)).proportion_ci(method="wilson")
    confusion = confusion_matrix(targets, predicted, labels=range(len(data.classes)))
    probabilities = softmax(logits.astype(np.float64), axis=1)
    classes = {}
    for index, name in enumerate(data.classes):
        positive, called = targets == index, predicted == index
        mixed = positive.any() and not positive.all()
        classes[name] = {
            "images": int(positive.sum()),
            "sensitivity": float(called[positive].mean()) if positive.any() else None,
            "specificity": float((~called[~positive]).mean()) if not positive.all() else None,
            "auroc": float(roc_auc_score(positive, probabilities[:, index])) if mixed else None,
        }
    return {
        "images": len(targets),
        **score(logits, targets),
        "accuracy_95": [interval.low, interval.high],
        "classes": classes,
        "confusion": {
            "rows": "true",
            "columns": "predicted",
            "order": list(data.classes),
            "counts": confusion.tolist(),
        },
    }


def _tell_epoch(row: dict[str, Any], epochs: int) -> None:
    losses = {name: row[name] for name in ("train_loss", "train_eval_loss", "val_loss", "val_accuracy")}
    said = "  ".join(f"{name} {'not finite' if value is None else f'{value:.4f}'}" for name, value in losses.items())
    print(f"epoch {row['epoch']}/{epochs}  {said}", flush=True)


def _tell(folder: Path, metrics: dict[str, Any]) -> None:
    tested = metrics["test"]
    print(f"\nbest epoch {metrics['best_epoch']}, val_loss {metrics['validation']['val_loss']:.4f}")
    if tested is None:
        print("no test images: nothing was tested")
    else:
        low, high = tested["accuracy_95"]
        auroc = "-" if tested["auroc"] is None else f"{tested['auroc']:.3f}"
        print(
            f"test: {tested['images']} images, accuracy {tested['accuracy']:.3f} "
            f"(95% {low:.3f} to {high:.3f}), AUROC {auroc}"
        )
        for name, values in tested["classes"].items():
            said = "  ".join(
                f"{key} {'-' if value is None else f'{value:.3f}'}" for key, value in list(values.items())[1:]
            )
            print(f"  {name}: {said}")
    print(f"\nwritten: {folder}\nNext:\n  python tuning/model_folder.py predict {folder} IMAGE ...")


if __name__ == "__main__":
    sys.exit(main())
