"""What is wrong with the data, found on the decoding pass before any trial."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from tuning import images, phantoms, samples
from tuning.config import SETTINGS, InputError, SearchPlan

MOST_SIZES = 8  # image sizes of one search


def load_checked(
    plan: SearchPlan,
    image_sizes: list[int],
    *,
    table: pd.DataFrame | None = None,
    map: Callable[..., Any] = images.parallel_map,
) -> tuple[pd.DataFrame, dict[int, Path], str]:
    """Samples with their images decoded, once.

    Args:
        plan: names the data; without any the generated radiographs are drawn.
        image_sizes: sides in pixels.
        table: the samples of an earlier run, used as they are.
        map: decodes images by it; see `images.decode_all`.

    Returns:
        Samples, the folder of decoded images by size, and the data's fingerprint.

    Raises:
        InputError: the data is unusable; all unreadable images are listed together.
    """
    if len(image_sizes) > MOST_SIZES:
        cure = "give a few choices, or a range with a step"
        raise InputError(f"image_size: takes {len(image_sizes)} values, each of which is decoded and kept; {cure}")
    cache = images.cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{cache}: {error.strerror}; set FINETUNE_SEARCH_CACHE to a folder of yours") from None
    if not os.access(cache, os.W_OK | os.X_OK, effective_ids=True):
        raise InputError(f"{cache}: no permission to write there; set FINETUNE_SEARCH_CACHE to a folder of yours")
    if table is None:
        data = (
            plan.data if plan.data is not None else str(phantoms.write_phantoms(cache / f"phantoms-{phantoms.VERSION}"))
        )
        columns = {key: getattr(plan, key) for key in SETTINGS if key.endswith(("_column", "_fraction"))}
        table = samples.load_samples(data, **columns)
    hashes = images.content_hashes(list(table["file"]), cache)
    folders: dict[int, Path] = {}
    for size in image_sizes:
        folders[size], unreadable = images.decode_all(
            list(table["file"]),
            hashes,
            size,
            fit=plan.fit,
            drop_colour=plan.drop_colour,
            folder=cache,
            disk_cache_bytes=plan.disk_cache_bytes,
            keep=set(folders.values()),
            map=map,
        )
        if unreadable:  # rows go, so every size begins anew
            return load_checked(plan, image_sizes, table=_without(table, unreadable, plan.skip_unreadable), map=map)
    return table, folders, samples.fingerprint(table, hashes)


def _without(table: pd.DataFrame, unreadable: dict[int, str], skip: bool) -> pd.DataFrame:
    listed = [f"{table['file'][index]}: {reason}" for index, reason in sorted(unreadable.items())]
    if not skip:
        cure = "repair or remove them, or leave them out with --set skip_unreadable=true"
        raise InputError([*listed, f"{len(listed)} of {len(table)} images can't be read; {cure}"])
    kept = table.drop(index=list(unreadable)).reset_index(drop=True)
    gone = set(zip(table["label"], table["split"], strict=True)) - set(zip(kept["label"], kept["split"], strict=True))
    if gone:
        lost = ", ".join(f"{label} in {split}" for label, split in sorted(gone))
        raise InputError([*listed, f"no readable image is left of {lost}; repair some of these"])
    return kept
