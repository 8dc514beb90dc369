"""Each data set is decoded once, with the facts of its images beside the array."""

import hashlib
import os
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tuning.data import images
from tuning.data.decoding import Facts, decode
from tuning.data.images import content_hashes, decode_all, held, open_images, parallel_map, read_facts
from tuning.settings.config import InputError, cache_folder


def save(file: Path, image: Image.Image | np.ndarray, **options) -> str:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, **options)
    return str(file)


def draw_set(folder: Path, count: int, *, coloured: tuple[int, ...] = ()) -> list[str]:
    rng = np.random.default_rng(count)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for index in range(count):
        shape = (20, 24, 3) if index in coloured else (20, 24)
        files.append(save(folder / f"{index}.png", rng.integers(0, 256, shape, dtype=np.uint8)))
    return files


def hash_all(files: list[str]) -> list[str]:
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]


def test_parallel_map_keeps_the_order_and_looks_a_little_ahead():
    asked = []

    def items():
        for number in range(1000):
            asked.append(number)
            yield number

    results = parallel_map(lambda number: number * 2, items())
    assert next(results) == 0
    assert len(asked) <= 4 * (os.cpu_count() or 1)
    assert list(results) == [number * 2 for number in range(1, 1000)]


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("FINETUNE_SEARCH_CACHE", "~/elsewhere")
    assert cache_folder() == Path.home() / "elsewhere"
    monkeypatch.delenv("FINETUNE_SEARCH_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "finetune-search"


def test_hashes_are_cached_until_a_file_changes(tmp_path):
    files = draw_set(tmp_path / "set", 4)
    cache = tmp_path / "cache"
    assert content_hashes([*files, files[0]], cache) == hash_all([*files, files[0]])

    def unread(function, items):
        assert not items
        return items

    old = hash_all(files)
    assert content_hashes(files, cache, unread) == old

    # Of the same size, with its time set back, as tar and rsync do.
    status, content = os.stat(files[1]), Path(files[1]).read_bytes()
    Path(files[1]).write_bytes(content[::-1])
    os.utime(files[1], ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_hashes(files, cache) == hash_all(files) != old
    table = cache / "hashes.parquet"
    pq.write_table(pq.read_table(table).drop_columns("ctime_ns"), table)  # as older versions wrote it
    assert content_hashes(files, cache) == hash_all(files)
    assert content_hashes(files[2:], cache) == old[2:]
    assert [file.name for file in cache.iterdir()] == ["hashes.parquet"]


def test_unreadable_files_and_a_broken_table_of_hashes_are_reported(tmp_path):
    with pytest.raises(InputError, match=r"gone\.png: is missing; restore it, or give the place"):
        content_hashes([str(tmp_path / "gone.png")], tmp_path)
    (tmp_path / "hashes.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="delete it"):
        content_hashes([], tmp_path)


@pytest.mark.parametrize("coloured", [(), (0,), (3,), (9,)])
def test_the_array_holds_every_image_in_as_many_channels_as_needed(tmp_path, coloured):
    files = draw_set(tmp_path / "set", 10, coloured=coloured)
    folder, unreadable = decode_all(
        files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9, map=parallel_map
    )
    array = open_images(folder)
    assert unreadable == {} and array.dtype == np.uint8 and not array.flags.writeable
    assert array.shape == (10, 16, 16, 3 if coloured else 1)
    for file, pixels in zip(files, array, strict=True):
        wanted, _ = decode(file, 16)
        assert (pixels == (wanted if wanted.ndim == 3 else wanted[:, :, None])).all()
    assert {file.name for file in folder.iterdir()} == {"images.npy", "facts.parquet"}
    assert [path.name for path in (tmp_path / "images").iterdir()] == [folder.name]


def test_facts_of_every_image_are_beside_the_array_in_its_order(tmp_path):
    files = draw_set(tmp_path / "set", 5, coloured=(1,))
    files.append(save(tmp_path / "set" / "wide.jpg", np.zeros((30, 50), np.uint8)))
    folder, _ = decode_all(files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9, map=parallel_map)
    facts = read_facts(folder)
    assert list(facts.columns) == list(Facts._fields)
    assert images.FACTS.names == list(Facts._fields)
    assert list(facts["mode"]) == ["L", "RGB", "L", "L", "L", "L"]
    assert list(facts["format"]) == ["PNG"] * 5 + ["JPEG"]
    assert list(zip(facts["width"], facts["height"], strict=True)) == [(24, 20)] * 5 + [(50, 30)]
    assert list(facts["bytes"]) == [os.path.getsize(file) for file in files]
    assert facts["notes"].isna().tolist() == [True] * 5 + [False] and facts["notes"][5] == "is nearly black"
    assert list(facts["pixels_sha256"]) == [decode(file, 16)[1].pixels_sha256 for file in files]
    assert facts["pixels_sha256"].nunique() == 6


def test_a_cached_set_is_not_decoded_again(tmp_path):
    files = draw_set(tmp_path / "set", 3)
    decoded = partial(decode_all, hashes=hash_all(files), folder=tmp_path, disk_cache_bytes=10**9)
    folder, _ = decoded(files, image_size=16)
    os.utime(folder, (0, 0))
    assert decoded(["gone.png"] * 3, image_size=16) == (folder, {})
    assert folder.stat().st_mtime > 0
    assert decoded(files, image_size=20)[0] != folder
    assert decode_all(files[::-1], hash_all(files)[::-1], 16, folder=tmp_path, disk_cache_bytes=10**9)[0] != folder


def test_whatever_changes_pixels_or_facts_is_decoded_anew(tmp_path):
    files = draw_set(tmp_path / "set", 3, coloured=(0,))
    decoded = partial(decode_all, hashes=hash_all(files), image_size=16, folder=tmp_path, disk_cache_bytes=10**9)
    kinds = [{}, {"fit": "crop"}, {"fit": "letterbox"}, {"drop_colour": True}, {"fit": "crop", "drop_colour": True}]
    folders = [decoded(files, **kind)[0] for kind in kinds]
    assert len(set(folders)) == len(kinds)
    assert [open_images(folder).shape[3] for folder in folders] == [3, 3, 3, 1, 1]
    for folder, kind in zip(folders, kinds, strict=True):
        assert (open_images(folder)[1] == decode(files[1], 16, **kind)[0].reshape(16, 16, -1)).all()

    renamed = [os.path.splitext(file)[0] + ".jpg" for file in files]
    for file, other in zip(files, renamed, strict=True):
        os.rename(file, other)
    folder, _ = decoded(renamed)
    assert folder not in folders
    assert list(read_facts(folder)["notes"]) == ["is a PNG file named .jpg"] * 3
    assert list(read_facts(folder)["pixels_sha256"]) == list(read_facts(folders[0])["pixels_sha256"])


def test_with_unreadable_files_nothing_is_cached(tmp_path):
    files = draw_set(tmp_path / "set", 4, coloured=(3,))
    Path(files[0]).write_bytes(b"")
    Path(files[2]).write_text("hello")
    folder, unreadable = decode_all(files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9)
    assert not folder.exists() and not list((tmp_path / "images").iterdir())
    assert {index: reason.split()[1] for index, reason in unreadable.items()} == {0: "empty", 2: "not"}


def test_an_interrupted_decoding_leaves_nothing(tmp_path):
    files = draw_set(tmp_path / "set", 2)

    def interrupted(function, items):
        yield function(items[0])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decode_all(files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9, map=interrupted)
    assert not list((tmp_path / "images").iterdir())


def test_two_at_once_share_what_the_first_finishes(tmp_path):
    files = draw_set(tmp_path / "set", 3)
    results = []

    def run():
        results.append(decode_all(files, hash_all(files), 16, folder=tmp_path, disk_cache_bytes=10**9, map=together))

    barrier = threading.Barrier(2)

    def together(function, items):
        barrier.wait()  # both are decoding now
        return map(function, items)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] and len(results) == 2
    assert open_images(results[0][0]).shape == (3, 16, 16, 1)
    assert len(list((tmp_path / "images").iterdir())) == 1


def test_least_recently_used_sets_are_deleted_first_and_abandoned_ones_always(tmp_path):
    sets = [draw_set(tmp_path / f"set{count}", count) for count in (1, 2, 3)]
    keep_all = {"folder": tmp_path, "disk_cache_bytes": 10**9}
    folders = [decode_all(files, hash_all(files), 16, **keep_all)[0] for files in sets[:2]]
    one_bytes = sum(file.stat().st_size for file in folders[0].iterdir())
    os.utime(folders[0], (2000, 2000))
    os.utime(folders[1], (1000, 1000))
    living, abandoned = (tmp_path / "images" / f"{images.DECODING}{name}" for name in ("living", "abandoned"))
    living.mkdir()
    abandoned.mkdir()
    hours_ago = time.time() - 2 * images.ABANDONED_S
    os.utime(abandoned, (hours_ago, hours_ago))
    third, _ = decode_all(sets[2], hash_all(sets[2]), 16, folder=tmp_path, disk_cache_bytes=3 * one_bytes)
    assert set((tmp_path / "images").iterdir()) == {folders[0], third, living}
    first, _ = decode_all(sets[1], hash_all(sets[1]), 16, folder=tmp_path, disk_cache_bytes=0)
    assert set((tmp_path / "images").iterdir()) == {first, living}


def test_too_little_disk_is_reported_before_a_byte_is_written(tmp_path):
    with pytest.raises(InputError, match="FINETUNE_SEARCH_CACHE"):
        decode_all(["gone.png"] * 10**5, ["x"], 10**5, folder=tmp_path, disk_cache_bytes=10**9)
    assert not list((tmp_path / "images").iterdir())


def test_arrays_that_are_held_are_not_evicted(tmp_path):
    sets = [draw_set(tmp_path / str(count), count) for count in (1, 2, 3)]
    keep_all = {"folder": tmp_path, "disk_cache_bytes": 10**9}
    first, _ = decode_all(sets[0], hash_all(sets[0]), 16, **keep_all)
    with held([first]):
        second, _ = decode_all(sets[1], hash_all(sets[1]), 16, **keep_all)
        third, _ = decode_all(sets[2], hash_all(sets[2]), 16, folder=tmp_path, disk_cache_bytes=0)
        assert first.exists() and not second.exists() and third.exists()
    decode_all(sets[1], hash_all(sets[1]), 16, folder=tmp_path, disk_cache_bytes=0)
    assert not first.exists() and second.exists()
