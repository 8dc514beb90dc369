"""What is wrong with the data, found on the decoding pass before any trial."""

from functools import partial
from pathlib import Path

import pandas as pd

from tuning import images, phantoms, samples
from tuning.config import SETTINGS, InputError, SearchPlan


def load_checked(
    plan: SearchPlan, image_sizes: list[int], *, table: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, dict[int, Path], str]:
    """Samples with their images decoded, once.

    Args:
        plan: names the data; without any the generated radiographs are drawn.
        image_sizes: sides in pixels.
        table: the samples of an earlier run, used as they are.

    Returns:
        Samples, the folder of decoded images by size, and the data's fingerprint.

    Raises:
        InputError: the data is unusable; all unreadable images are listed together.
    """
    cache = images.cache_folder()
    if table is None:
        data = (
            plan.data if plan.data is not None else str(phantoms.write_phantoms(cache / f"phantoms-{phantoms.VERSION}"))
        )
        columns = {key: getattr(plan, key) for key in SETTINGS if key.endswith(("_column", "_fraction"))}
        table = samples.load_samples(data, **columns)
    hashes = images.content_hashes(list(table["file"]), cache)
    folders: dict[int, Path] = {}
    decode = partial(images.decode_all, folder=cache, disk_cache_bytes=plan.disk_cache_bytes, map=images.parallel_map)
    for size in image_sizes:
        folder, unreadable = decode(list(table["file"]), hashes, size)
        if unreadable:  # the same files at every size, so this happens at the first
            table = _without(table, unreadable, plan.skip_unreadable)
            hashes = [value for index, value in enumerate(hashes) if index not in unreadable]
            folder, _ = decode(list(table["file"]), hashes, size)
        folders[size] = folder
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
