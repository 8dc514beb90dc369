"""Data of a run that is the same in another place, or has changed."""

import re

import pytest
from test_samples import touch, write_csv

from tuning.data.changes import OtherSamples, changes, elsewhere
from tuning.data.samples import load_samples
from tuning.settings.config import InputError, SearchPlan


@pytest.fixture
def files(tmp_path):
    return touch(tmp_path, *(f"{number:02d}.png" for number in range(20)))


@pytest.fixture
def rows():
    return [{"path": f"{number:02d}.png", "label": "ab"[number % 2]} for number in range(20)]


def plan_of(data, **settings):
    return SearchPlan(name="run", data=str(data), **settings)


def test_a_place_that_says_the_same_has_the_same_samples(files, rows):
    first = load_samples(write_csv(files / "first.csv", rows))
    plan = plan_of(write_csv(files / "second.csv", rows))
    assert (
        elsewhere(first, plan, None).to_dict("records") == first.to_dict("records")
        and changes(first, plan, None) is None
    )
    grouped = [row | {"group": str(n), "split": "val" if n % 10 < 2 else "train"} for n, row in enumerate(rows)]
    of_groups = load_samples(write_csv(files / "grouped.csv", grouped))
    assert elsewhere(of_groups, plan, None).to_dict("records") == of_groups.to_dict(
        "records"
    )  # which says nothing of splits and groups


@pytest.mark.parametrize("fault", ["label", "group", "split", "more", "fewer"])
def test_a_place_that_says_otherwise_has_other_samples(files, rows, fault):
    given = [
        row | {"group": str(number // 2), "split": "train" if number % 8 < 6 else "val"}
        for number, row in enumerate(rows)
    ]
    first = load_samples(write_csv(files / "first.csv", given))
    other = [dict(row) for row in given]
    if fault == "more":
        (files / "more.png").write_bytes(b"")
        other.append(given[0] | {"path": "more.png"})
    elif fault == "fewer":
        other.pop()
    else:
        values = {"label": next(row["label"] for row in given if row["label"] != given[0]["label"])}
        other[0][fault] = (values | {"group": "9999", "split": "val"})[fault]
    plan = plan_of(write_csv(files / "other.csv", other))
    said = {"more": "1 further image (more.png)", "fewer": "1 missing image"}.get(fault, f"1 other {fault}")
    with pytest.raises(OtherSamples, match=re.escape(said)):
        elsewhere(first, plan, None)
    told = changes(first, plan, first.attrs["listing"])
    assert told.startswith("1 image no longer listed" if fault == "fewer" else said)  # the file is still there
    for settings, excused in (({"on_leak": "move"}, "split"), ({"skip_unreadable": True}, "more")):
        if fault == excused:
            assert elsewhere(first, plan.model_copy(update=settings), None)["path"].equals(first["path"])


def test_a_place_that_is_gone_has_not_changed(files, rows):
    first = load_samples(write_csv(files / "first.csv", rows))
    assert (
        changes(first, plan_of(files / "gone"), None) is None and changes(first, SearchPlan(name="run"), None) is None
    )
    with pytest.raises(InputError, match="no such folder or file"):
        elsewhere(first, plan_of(files / "gone"), None)


@pytest.mark.parametrize("settings", [{"on_leak": "move"}, {"skip_unreadable": True}])
@pytest.mark.parametrize("fault", ["split", "more"])
def test_what_a_run_moves_or_leaves_out_hides_no_change(files, rows, settings, fault):
    given = [row | {"split": "val" if n % 10 < 2 else "train"} for n, row in enumerate(rows)]
    first = load_samples(write_csv(files / "first.csv", given))
    moved = first.assign(split=["train", *first["split"][1:]])  # as a run has them after it has moved one
    plan, listing = plan_of(files / "first.csv", **settings), first.attrs["listing"]
    assert changes(moved, plan, listing) is None
    assert list(elsewhere(moved, plan, listing)["split"]) == list(moved["split"])
    if fault == "more":
        (files / "more.png").write_bytes(b"")
        given.append(given[0] | {"path": "more.png"})
    else:
        given[5]["split"] = "val"
    write_csv(files / "first.csv", given)
    assert changes(moved, plan, listing)
    with pytest.raises(OtherSamples):
        elsewhere(moved, plan, listing)


def test_a_manifest_that_is_no_longer_read_as_before_has_changed(files, rows):
    first = load_samples(write_csv(files / "first.csv", rows))
    renamed = [{"path": row["path"], "finding": row["label"]} for row in rows]
    plan = plan_of(write_csv(files / "first.csv", renamed))
    assert changes(first, plan, None).startswith("it can't be read as before: ") and "'label'" in changes(
        first, plan, None
    )
    gone = [row | {"path": f"gone{row['path']}"} for row in rows]
    assert changes(first, plan_of(write_csv(files / "gone.csv", gone)), None) is None  # which is said of each file
