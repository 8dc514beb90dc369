"""What each method hands over: whole searches and final models, scored once on the test set.

- recipe: Ray Tune as its documentation shows it (`OptunaSearch`, `ASHAScheduler`, a checkpoint an epoch), 16 trials;
  its model is the best trial's last checkpoint, by Ray's own rule (`recipe`), or the best (`recipe, best epoch`).
- random: the same without ASHA, suggestions at random, for as long as the recipe took.
- product: `run_search.py`, then `train_final.py`, within a share of the recipe's seconds of the same set and seed.
  `--checkout` names another checkout of this project, such as the version before, whose results are kept beside.
- further: the same, with FURTHER among the choices of augmentation.

All methods search the same space (`quick`), at 64 px, in two slots of one thread. Each model gets the temperature that
fits the validation set. Results are kept in --out, a JSON file for each run, and not made again; `--report` prints the
table of what is there. All go to `benchmarks/delivered/results.parquet`, beside what that has of other runs.
"""

if __name__ == "__main__":  # this folder would come first on the path, and its modules would shadow others
    import sys
    from pathlib import Path

    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tyro
import yaml
from numpy.typing import NDArray

from benchmarks.sets import SETS, manifest
from tuning.record.tables import replacing
from tuning.record.temperature import fit_temperature, logarithms, tempered

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "benchmarks" / "delivered" / "results.parquet"
EPOCHS, SLOTS = 8, 2
SHARE = 0.2  # of the recipe's seconds that the product has
FURTHER = ("light crop=0.3", "trivial=1", "light mixup=0.2", "light cutmix=0.5")
FIGURES = ("loss", "auroc", "balanced_accuracy", "seconds")


@dataclasses.dataclass(frozen=True)
class Flags:
    """Compare the models that methods hand over."""

    xrays: str | None = None
    """Folder of the chest X-rays."""
    sets: tuple[str, ...] = SETS
    """Image sets."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of sampler and training."""
    methods: tuple[str, ...] = ("recipe", "product")
    """Methods: recipe, random, product, further."""
    share: float = SHARE
    """Share of the recipe's seconds that the product has."""
    checkout: str = str(ROOT)
    """Checkout of this project that `product` runs."""
    label: str = "product"
    """Name of the product's results, for another checkout or share."""
    final: tuple[str, ...] = ()
    """Settings of the product's final model, such as final_data=train."""
    out: str = "results/delivered"
    """Folder of the results."""
    report: bool = False
    """Only print what is there."""


# ---- methods ----------------------------------------------------------------------------------------------------


def figures(each: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Return the test figures of logits `test` at the temperature that fits the logits `val`."""
    from tuning.training.scores import score

    probabilities = tempered(each["test"], fit_temperature(each["val"], each["of_val"]))
    found = score(logarithms(probabilities).astype(np.float32), each["of_test"])
    return {name: found[name] for name in ("loss", "auroc", "balanced_accuracy")}


def of_recipe(data: Path, seed: int, seconds: float | None) -> dict[str, dict[str, Any]]:
    """Run the recipe, or random search for some seconds, in a process of its own; its models by name."""
    with tempfile.TemporaryDirectory() as place:
        task = {"data": str(data), "seed": seed, "seconds": seconds, "place": place}
        command = [sys.executable, str(ROOT / "benchmarks" / "stock.py"), json.dumps(task)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, env=environment)
        taken = json.loads((Path(place) / "seconds.json").read_text())
        found = {}
        for name in ("", ", best epoch"):
            found[name] = figures(np.load(Path(place) / f"model{name}.npz")) | {"seconds": taken}
    return found


def of_product(flags: Flags, data: Path, seed: int, seconds: float, further: bool) -> dict[str, Any]:
    """Run a search and the final training of a checkout."""
    with tempfile.TemporaryDirectory() as place:
        environment = os.environ | {
            "FINETUNE_SEARCH_CACHE": f"{place}/cache",
            "PYTHONPATH": str(Path(flags.checkout).resolve()),
        }
        began = time.perf_counter()

        def command(name: str, *arguments: str) -> None:
            words = [sys.executable, f"{flags.checkout}/tuning/{name}", *arguments]
            with open(f"{place}/log.txt", "a") as log:
                done = subprocess.run(words, cwd=place, env=environment, stdout=log, stderr=log)
            if done.returncode:
                shutil.copy(f"{place}/log.txt", f"{flags.out}/failed.log")
                raise SystemExit(f"{flags.out}/failed.log: exit status {done.returncode}")

        budget = f"{max(seconds - FINAL_SECONDS, 10):.0f}s"
        given = ["trials=1000", f"epochs={EPOCHS}", f"concurrent={SLOTS}", "image_size=64", "on_leak=warn"]
        space = yaml.safe_load((Path(flags.checkout) / "search_spaces" / "quick.yaml").read_text())
        space["parameters"]["augmentation"]["choices"] += FURTHER if further else ()
        Path(f"{place}/space.yaml").write_text(yaml.safe_dump(space))
        search = ["--data", str(data), "--space", f"{place}/space.yaml", "--name", "run", "--seed", str(seed)]
        search += ["--time-budget", budget, "--set", *given]
        command("run_search.py", *search)
        command("train_final.py", "results/run", *(["--set", *flags.final] if flags.final else []))
        taken = time.perf_counter() - began
        metrics = json.loads(Path(f"{place}/results/run/model/metrics.json").read_text())
    tested = metrics["test"]
    found = {name: tested[name] for name in ("loss", "auroc", "balanced_accuracy")}
    return found | {"seconds": taken, "members": len(metrics.get("ensemble", [1]))}


FINAL_SECONDS = 27.0  # of start-up and final training, which the search leaves


# ---- results ----------------------------------------------------------------------------------------------------


def kept(out: Path, name: str, seed: int, method: str) -> Path:
    return out / f"{name}-{seed}-{method}.json"


def make(flags: Flags, name: str, seed: int, method: str) -> None:
    """Make a result that isn't there."""
    out = Path(flags.out)
    label = {"product": flags.label, "further": f"{flags.label}, further"}.get(method, method)
    path = kept(out, name, seed, label)
    if path.exists():
        return
    data = manifest(name, out.resolve() / "images", flags.xrays)
    taken = None if method == "recipe" else recipe_seconds(everything(out), name, seed)
    if method in ("product", "further"):
        assert taken is not None
        found = {"": of_product(flags, data, seed, flags.share * taken, method == "further")}
    else:
        found = of_recipe(data, seed, taken)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(found))
    print(name, seed, label, found, flush=True)


def recipe_seconds(rows: pd.DataFrame, name: str, seed: int) -> float:
    found = rows[(rows["set"] == name) & (rows["seed"] == seed) & (rows["method"] == "recipe")]
    if found.empty:
        raise SystemExit(f"{name}, seed {seed}: the recipe comes first, since the others have its seconds")
    return float(found["seconds"].iloc[0])


def everything(out: Path) -> pd.DataFrame:
    """What is in the folder, and what KEPT has of other runs."""
    rows = [results(out), pd.read_parquet(KEPT)] if KEPT.exists() else [results(out)]
    return pd.concat(rows).drop_duplicates(["set", "seed", "method"]).reset_index(drop=True)


def results(out: Path) -> pd.DataFrame:
    """Return a row for each model: set, seed, method and figures."""
    rows = []
    for path in sorted(out.glob("*-[0-9]*-*.json")):
        name, seed, method = path.stem.rsplit("-", 2)
        for kind, found in json.loads(path.read_text()).items():
            rows.append({"set": name, "seed": int(seed), "method": method + kind, **found})
    return pd.DataFrame(rows, columns=["set", "seed", "method", *FIGURES, "members"])


def report(rows: pd.DataFrame) -> None:
    """Print medians over seeds, and each method's loss relative to the recipe's, paired by set and seed."""
    table = rows.groupby(["set", "method"])[list(FIGURES)].median().round(4)
    print(table.assign(runs=rows.groupby(["set", "method"]).size()).to_string())
    losses = rows.pivot_table(index=["set", "seed"], columns="method", values="loss")
    rng = np.random.default_rng(0)
    for method in losses.columns.drop("recipe", errors="ignore"):
        pairs = losses[[method, "recipe"]].dropna()
        change = (pairs[method] / pairs["recipe"] - 1).to_numpy()
        if len(change) > 1:
            low, high = np.percentile([np.median(rng.choice(change, len(change))) for _ in range(4000)], [2.5, 97.5])
            said = f"loss {np.median(change):+.1%} ({low:+.1%} to {high:+.1%}) of the recipe's"
            print(f"{method}: {said}, {len(change)} pairs")
    print("seconds until the model is as good as the recipe's\n" + time_to_it(rows).to_string())


def time_to_it(rows: pd.DataFrame) -> pd.DataFrame:
    """Return, for each set, the seconds until the product's model is as good as the recipe's, the median over seeds.

    That is the quickest run of the product, with any budget, whose test loss is at most the recipe's; infinite if none.
    """
    recipe = rows[rows["method"] == "recipe"].set_index(["set", "seed"])
    ours = rows[rows["method"].str.startswith("product")].set_index(["set", "seed"])
    taken = ours["seconds"].where(ours["loss"] <= recipe["loss"].reindex(ours.index), np.inf)
    taken = taken.groupby(["set", "seed"]).min()
    return pd.DataFrame({"product": taken, "recipe": recipe["seconds"]}).dropna().groupby("set").median().round(1)


def main() -> None:
    """Make what isn't there yet, and print the table."""
    flags = tyro.cli(Flags)
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    if not flags.report:
        for seed, name, method in itertools.product(flags.seeds, flags.sets, flags.methods):
            make(flags, name, seed, method)
    rows = everything(out)
    if len(rows):
        KEPT.parent.mkdir(exist_ok=True)
        rows.to_parquet(KEPT, index=False)
        report(rows)


if __name__ == "__main__":
    main()
