import math
import re
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from shared import examples
from spaces import SMALL, ask, changed, document, documents, faults_of

from tuning.settings.config import PARAMETERS, InputError, SearchPlan, TrialConfig, build
from tuning.settings.space import DEFAULTS, image_sizes, suggest, trial_values
from tuning.settings.space_file import PORTFOLIO, SHIPPED, fix, is_same, load, parse, with_portfolio

# ---- start points


def test_start_points_are_completed_by_defaults():
    plain = document()
    plain["start"] = [{"backbone": "vgg16"}, {"unfreeze_depth": 2, "backbone": "resnet18", "learning_rate": 1}]
    plain["start"][1]["learning_rate"] = 0.01
    assert parse(plain, "x").start == (
        {"backbone": "vgg16", "unfreeze_depth": 0, "learning_rate": 1e-3},
        {"backbone": "resnet18", "unfreeze_depth": 2, "learning_rate": 0.01, "stage_lr_decay": 1.0},
    )


def test_a_default_outside_the_range_is_not_taken():
    plain = changed("parameters", learning_rate={"type": "float", "low": 0.01, "high": 0.1})
    plain["start"] = [{"backbone": "vgg16"}, {"learning_rate": 0.02}]
    assert faults_of(plain) == [
        "my.yaml: start[0].learning_rate: is missing, and its default must be between low 0.01 and high 0.1, "
        "got 0.001; give it a value",
        "my.yaml: start[1].backbone: is missing, and it has no default; give it a value",
    ]


# ---- fix


def test_fix_moves_a_parameter_and_reads_conditions_by_its_value():
    plain = document()
    plain["start"] = [
        {"backbone": "vgg16", "unfreeze_depth": 0},
        {"backbone": "vgg16", "unfreeze_depth": 2},
        {"backbone": "vgg16", "unfreeze_depth": 3, "stage_lr_decay": 0.5},
    ]
    space = parse(plain, "x")
    shallow, deep = fix(space, {"unfreeze_depth": 0}), fix(space, {"unfreeze_depth": 4})
    assert "unfreeze_depth" not in shallow.parameters and shallow.fixed["unfreeze_depth"] == 0
    assert shallow.start == ({"backbone": "vgg16", "learning_rate": 1e-3},)
    assert [point["stage_lr_decay"] for point in deep.start] == [1.0, 0.5]
    assert set(suggest(shallow, ask())) == {"backbone", "learning_rate"}
    assert set(suggest(deep, ask())) == {"backbone", "learning_rate", "stage_lr_decay"}
    for fixed in (shallow, deep):
        assert parse(fixed.document, "plan.yaml") == fixed
    assert space == parse(plain, "x")


def test_fix_takes_what_is_fixed_already_and_what_the_space_does_not_name():
    space = fix(parse(document(), "x"), {"batch_size": 64, "class_weighting": "balanced"})
    assert space.fixed == {"batch_size": 64, "class_weighting": "balanced", "optimizer": "sgd"}
    assert fix(space, {}) == space


def test_fix_everything_leaves_one_config():
    space = parse({**document(), "start": [{"backbone": "vgg16"}, {"backbone": "resnet18"}]}, "x")
    space = fix(space, {"backbone": "vgg16", "unfreeze_depth": 5, "learning_rate": 0.01, "stage_lr_decay": 0.5})
    assert space.parameters == {} and space.start == ({},) and suggest(space, ask()) == {}
    assert build(TrialConfig, trial_values(space, {}), "x").stage_lr_decay == 0.5


def test_fix_names_every_fault():
    with pytest.raises(InputError) as caught:
        fix(parse(document(), "x"), {"batch_sise": 3, "image_size": 7, "epochs": 3})
    assert caught.value.faults == [
        "--set: fixed: 'batch_sise': no such parameter; did you mean batch_size?",
        "--set: fixed: 'epochs': no such parameter; it belongs under search",
        "--set: fixed.image_size: must be greater than or equal to 32, got 7",
    ]
    strict = {"type": "float", "low": 0.3, "high": 0.9, "when": "unfreeze_depth > 1"}
    plain = {**changed("parameters", stage_lr_decay=strict), "start": [{"backbone": "vgg16"}]}
    with pytest.raises(InputError, match=r"--set: start\[0\]\.stage_lr_decay: is missing, and its default must be"):
        fix(parse(plain, "x"), {"unfreeze_depth": 3})


# ---- faults


def parameter(**spec) -> dict:
    return changed("parameters", **spec)


DEPTH = {"type": "int", "low": 0, "high": 5}
DROPOUT = {"type": "float", "low": 0.0, "high": 0.5}


@pytest.mark.parametrize(
    ("plain", "parts"),
    [
        (None, ["my.yaml: is empty", "parameters, fixed, start, enqueue, portfolio, search"]),
        ({}, ["my.yaml: is empty"]),
        ([1], ["my.yaml: must be a mapping, got a list"]),
        ({**document(), "paramters": {}}, ["'paramters': no such section", "did you mean parameters?"]),
        ({**document(), "fixed": [1]}, ["fixed: must be a mapping, got a list", "`name: ..`"]),
        (parameter(learning_rte=DROPOUT), ["'learning_rte': no such parameter; did you mean learning_rate?"]),
        (parameter(xyz=DROPOUT), ["'xyz': no such parameter; use backbone, "]),
        (parameter(epochs=DEPTH), ["'epochs': no such parameter; it belongs under search"]),
        (parameter(head_dropout=0.5), ["parameters.head_dropout: must be a mapping such as", "got 0.5"]),
        (parameter(head_dropout={**DROPOUT, "hihg": 1}), ["'hihg': no such key", "mean high?; use type, low, high"]),
        (
            parameter(head_dropout={"low": 0.0, "high": 0.5}),
            ["float for head_dropout, got nothing; write `type"],
        ),
        (parameter(head_dropout={**DROPOUT, "type": "flaot"}), ["got 'flaot'; did you mean float?"]),
        (
            parameter(head_dropout={**DROPOUT, "type": "int"}),
            ["head_dropout.type: must be categorical or float for head_dropout, got 'int'; write"],
        ),
        (parameter(schedule={"type": "int", "low": 0, "high": 1}), ["must be categorical for schedule, got 'int'"]),
        (parameter(head_dropout={"type": "float", "high": 0.5}), ["has no low; add `low: ..`"]),
        (parameter(augmentation={"type": "categorical"}), ["augmentation.choices: must be a list", "got nothing"]),
        (
            parameter(augmentation={"type": "categorical", "choices": []}),
            ["choices: must be a list", "an empty list"],
        ),
        (
            parameter(unfreeze_depth={"type": "categorical", "choices": [5, "all"]}),
            ["unfreeze_depth.choices[1]: 5 is listed twice; delete one"],
        ),
        (
            parameter(augmentation={"type": "categorical", "choices": ["hefty"]}),
            ["choices[0]", "none, light", "'hefty'"],
        ),
        (parameter(head_dropout={**DROPOUT, "low": 0.5}), ["low must be below high, got low 0.5 and high 0.5"]),
        (parameter(head_dropout={**DROPOUT, "high": 1.5}), ["head_dropout.high: must be less than 1, got 1.5"]),
        (parameter(head_dropout={**DROPOUT, "log": True}), ["low: must be above 0 with log, got 0.0; raise low"]),
        (parameter(head_dropout={**DROPOUT, "log": "yes"}), ["log: must be true or false, got 'yes'"]),
        (
            parameter(head_dropout={"type": "float", "low": 0.1, "high": 0.5, "log": True, "step": 0.1}),
            ["step and log exclude each other", "delete one"],
        ),
        (parameter(head_dropout={**DROPOUT, "step": 0}), ["step: must be a number above 0, got 0"]),
        (parameter(head_dropout={**DROPOUT, "step": "1e-1"}), ["step: must be a number above 0", "write 0.1"]),
        (parameter(head_dropout={**DROPOUT, "step": 0.2}), ["step: must divide", "got 0.2; write `high: 0.4`"]),
        (parameter(head_dropout={**DROPOUT, "step": 1e-300}), ["at most 1,000,000 steps"]),
        (parameter(unfreeze_depth={**DEPTH, "step": 2}), ["step: must divide", "write `high: 4`"]),
        (parameter(unfreeze_depth={**DEPTH, "step": 1.0}), ["step: must be an integer above 0, got 1.0"]),
        (parameter(unfreeze_depth={**DEPTH, "high": 2.0}), ["high: must be an integer, got 2.0"]),
        (parameter(image_size={"type": "int", "low": 32, "high": 10**30}), ["must be from -2**53 to 2**53"]),
        (
            parameter(learning_rate={"type": "float", "low": "1e-5", "high": 0.1}),
            ["low: must be a number, got the text '1e-5'; write 1.0e-05"],
        ),
        (changed("fixed", image_size="64"), ["fixed.image_size: must be an integer, got the text '64'; write 64"]),
        (changed("fixed", augmentation=False), ["fixed.augmentation: ", "got False; YAML reads yes, no", "quote"]),
        (changed("fixed", augmentation=None), ["fixed.augmentation: ", "got None; YAML reads ~, null"]),
        (changed("fixed", image_size=[64]), ["fixed.image_size: must be a number or a word, got a list"]),
        (changed("fixed", learning_rate=0.1), ["learning_rate: is in both parameters and fixed; delete one"]),
        (changed("fixed", head_dropout=math.nan), ["fixed.head_dropout: must be a finite number, got nan"]),
        ({"fixed": {"image_size": 64}}, ["backbone: is missing; add it to parameters, or"]),
        (
            parameter(backbone={"type": "categorical", "choices": ["vgg16"], "when": "unfreeze_depth > 1"}),
            ["backbone.when: every trial needs a backbone", "delete it"],
        ),
        (
            parameter(head_dropout={**DROPOUT, "when": "unfreeze_depth >"}),
            ["parameters.head_dropout.when: can't be parsed", "got 'unfreeze_depth >'"],
        ),
        (
            parameter(head_dropout={**DROPOUT, "when": "weight_decay > 1"}),
            ["parameters.head_dropout.when: 'weight_decay': is neither in parameters nor in fixed"],
        ),
        (
            parameter(head_dropout={**DROPOUT, "when": "backbone == resnet81"}),
            ["must be one of resnet18, vgg16, got 'resnet81'; did you mean resnet18?; use a value in its range"],
        ),
        (changed("search", metric="auroc"), ["search.metric: must be 'val_loss', ", "got 'auroc'"]),
        (changed("search", patiance=3), ["search: 'patiance': no such setting; did you mean patience?"]),
        (changed("search", image_size=64), ["search.image_size: is a parameter; move it to parameters or fixed"]),
        (changed("search", data="x"), ["search.data: ", "give it on the command line: --data"]),
    ],
)
def test_a_fault_names_place_rule_value_and_cure(plain, parts):
    faults = faults_of(plain)
    assert len(faults) == 1, faults
    assert faults[0].startswith("my.yaml: ")
    for part in parts:
        assert part in faults[0]


def test_cycles_are_named_once_each_and_the_rest_is_still_checked():
    plain = parameter(
        head_dropout={**DROPOUT, "when": "label_smoothing > 0.1"},
        label_smoothing={**DROPOUT, "when": "head_dropout > 0.1"},
        weight_decay={**DROPOUT, "when": "head_dropout > 0.1"},
    )
    plain["start"] = [{"backbone": "vgg19", "weight_decay": 0.1}]
    cycle, start = faults_of(plain)
    assert "label_smoothing needs" in cycle and "head_dropout needs" in cycle and "cycle" in cycle
    assert "start[0].backbone" in start


@pytest.mark.parametrize(
    ("point", "part"),
    [
        ("vgg16", "start[0]: must be a mapping such as {learning_rate: 0.001}, got 'vgg16'"),
        ({"backbon": "vgg16", "backbone": "vgg16"}, "start[0]: 'backbon': no such parameter; did you mean backbone?"),
        ({"backbone": "vgg19"}, "start[0].backbone: must be one of resnet18, vgg16, got 'vgg19'; did you mean vgg16?"),
        (
            {"backbone": "vgg16", "learning_rate": 0.5},
            "learning_rate: must be between low 1e-05 and high 0.1, got 0.5",
        ),
        ({"backbone": "vgg16", "unfreeze_depth": 7}, "unfreeze_depth: must be less than or equal to 5, got 7"),
        (
            {"backbone": "vgg16", "stage_lr_decay": 0.5},
            "is inactive, since `unfreeze_depth > 1` does not hold; delete it",
        ),
        ({"backbone": "vgg16", "batch_size": 16}, "start[0].batch_size: is fixed at 16; delete it here"),
        ({"backbone": "vgg16", "head_dropout": 0.1}, "start[0].head_dropout: is not in parameters; add it"),
    ],
)
def test_start_points_are_checked(point, part):
    (fault,) = faults_of({**document(), "start": [point]})
    assert part in fault


def test_start_must_be_a_list_without_repeats():
    assert faults_of({**document(), "start": {"backbone": "vgg16"}}) == [
        "my.yaml: start: must be a list, got a mapping; write lines like `- {name: value}`"
    ]
    twice = [{"backbone": "vgg16"}, {"backbone": "vgg16", "unfreeze_depth": 0}]
    assert faults_of({**document(), "start": twice}) == [
        "my.yaml: start[1]: equals start[0] once completed; delete one of them"
    ]


def test_all_faults_come_at_once_and_none_follows_from_another():
    plain = {
        "parameters": {
            "backbone": {"type": "categorical", "choices": ["vgg16", False]},
            "unfreeze_depth": {"type": "int", "low": 0, "high": 9},
            "stage_lr_decay": {"type": "float", "low": 0.0, "high": 1.0, "when": "unfreeze_depth > 1"},
        },
        "fixed": {"batch_size": 1},
        "start": [{"backbone": "vgg16", "unfreeze_depth": 2, "stage_lr_decay": 0.5}, 4],
        "search": {"trails": 3, "epochs": 0},
    }
    places = [re.match(r"my\.yaml: ([\w.\[\]]+)", fault)[1] for fault in faults_of(plain)]
    assert places == [
        "fixed.batch_size",
        "parameters.backbone.choices[1]",
        "parameters.unfreeze_depth.high",
        "parameters.stage_lr_decay.low",
        "start[1]",
        "search",
        "search.epochs",
    ]


# ---- files


def written(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "my.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "my.yaml: is empty"),
        (b"fixed: {backbone: \xff}", "my.yaml: byte 19: not UTF-8 text; save the file as UTF-8"),
        ("fixed: {backbone: vgg16\n", "my.yaml: line 2, column 1: not valid YAML"),
        ("fixed:\n\tbackbone: vgg16\n", "my.yaml: line 2, column 1: not valid YAML: found character '\\t'"),
        ("fixed: {backbone: a\x07b}", "my.yaml: line 1, column 20: not valid YAML"),
        ("fixed: {backbone: vgg16}\n--- 3\n", "my.yaml: line 2, column 1: not valid YAML"),
        ("fixed: {backbone: !!python/object:x.y {}}", "my.yaml: line 1, column 19: not valid YAML"),
        ("fixed: {backbone: 2024-02-31}", "my.yaml: line 1, column 19: not valid YAML: can't be read as timestamp"),
        ('fixed: {backbone: "\\UFFFFFFFF"}', "my.yaml: can't be read (Python int too large"),
        ('fixed: {backbone: "\\U00110000"}', "my.yaml: can't be read (chr() arg not in range"),
        ("fixed: {backbone: !!bool maybe}", "my.yaml: line 1, column 19: not valid YAML: can't be read as bool"),
        ("fixed: {backbone: 2024-02-03}", "fixed.backbone: must be a number or a word, got a date"),
        ("fixed: &a {backbone: *a}", "my.yaml: aliases (*name) give a cycle, or over 100,000 values"),
        (
            "a: &a [1]\n" + "".join(f"{n}: &{n} [*{m}, *{m}, *{m}]\n" for m, n in pairwise("abcdefghijklmno")),
            "give a cycle",
        ),
        ("fixed: {batch_size: 0x" + "f" * 5000 + ", backbone: x}", "fixed.batch_size: must be from -2**53 to 2**53"),
        ("fixed: " + "[" * 600, "my.yaml: nested too deeply"),
        ("a: {when: unfreeze_depth in [1, 2]}", "inside braces, quote a value that has commas or brackets"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, content, part):
    with pytest.raises(InputError) as caught:
        load(written(tmp_path, content))
    assert len(caught.value.faults) == 1 and part in str(caught.value)
    assert str(caught.value).count("my.yaml") == 1


def test_repeated_keys_are_refused_with_both_lines_beside_the_other_faults(tmp_path):
    text = "fixed:\n  backbone: vgg16\n  backbone: resnet18\nsearch: {trials: 3, trials: 4}\nfixd: 3\n"
    with pytest.raises(InputError) as caught:
        load(written(tmp_path, text))
    first, second, third = caught.value.faults
    assert first.endswith("line 3: 'backbone' is already in line 2; delete one of them")
    assert second.endswith("line 4: 'trials' is already in line 4; delete one of them")
    assert "'fixd'" in third


def test_anchors_and_merge_keys_are_no_repeats(tmp_path):
    text = """
parameters:
  weight_decay: &range {type: float, low: 1.0e-4, high: 1.0e-1, log: true}
  learning_rate: {<<: *range, high: 1.0}
fixed: {backbone: vgg16}
"""
    space = load(written(tmp_path, "\ufeff" + text.replace("\n", "\r\n")))
    assert space.parameters["learning_rate"].high == 1.0 and space.parameters["weight_decay"].high == 0.1


def test_names_and_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"quik: no such space; did you mean quick\? Give .*\(chest_xray, quick\)"):
        load("quik")
    with pytest.raises(InputError, match=r"quick\.yaml: can't be read \(No such file .*\(chest_xray, quick\)"):
        load("quick.yaml")
    with pytest.raises(InputError, match="can't be read"):
        load("./")
    with pytest.raises(InputError, match="can't be read"):
        load("a\0.yaml")
    assert load(written(tmp_path, SMALL)) == load("my.yaml") == parse(document(), "x")


# ---- the shipped spaces


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_spaces_say_how_they_are_run_and_what_they_found(path):
    space = load(path.stem)
    comments = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert comments[0].startswith(f"# python tuning/run_search.py --space {path.stem}")
    assert any(line.startswith("# What it found:") for line in comments)
    build(SearchPlan, {"name": "run", **space.search}, path.name)
    for point in space.start:
        build(TrialConfig, trial_values(space, point), path.name)
    for seed in range(20):
        build(TrialConfig, trial_values(space, suggest(space, ask(seed))), path.name)


def test_quick_begins_with_the_classifier_alone():
    space = load("quick")
    first, *others = (trial_values(space, point) for point in space.start)
    assert (first["unfreeze_depth"], first["learning_rate"], first["augmentation"]) == (0, 1e-3, "none")
    assert [(each["unfreeze_depth"], each["batch_norm"]) for each in others] == [(3, "frozen"), (3, "train")]
    assert (space.search["trials"], space.search["epochs"], image_sizes(space)) == (20, 6, [64])


def test_chest_xray_begins_with_the_six_classical_attempts():
    space = load("chest_xray")
    attempts = [(point["backbone"], point["unfreeze_depth"]) for point in space.start]
    assert attempts == [(backbone, depth) for backbone in ("resnet18", "vgg16") for depth in (0, 2, 5)]


def test_the_example_in_the_readme_does_what_it_says():
    text = (SHIPPED / "README.md").read_text()
    space = parse(yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]), "README.md")
    assert {"head_dropout": 0.0, "batch_norm": "train"}.items() <= space.start[1].items()
    held = fix(space, {"unfreeze_depth": 2})
    assert {"stage_lr_decay": 1.0, "batch_norm": "train"}.items() <= held.start[0].items()


# ---- garbage

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([*PARAMETERS, "all", "1e-4", "unfreeze_depth > 1", "float", "int", "categorical", 10**400]),
)
KEYS = st.one_of(
    SCALARS,
    st.sampled_from([*PARAMETERS, "type", "low", "high", "choices", "when", "step", "log", "trials", "time_budget"]),
)
GARBAGE = st.recursive(
    SCALARS | st.dates() | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


def only_input_errors(plain: object) -> None:
    try:
        space = parse(plain, "garbage")
    except InputError as error:
        assert error.faults and all(fault.startswith("garbage: ") for fault in error.faults)
    else:
        build(TrialConfig, trial_values(space, suggest(space, ask())), "suggestion")


@examples(40)
@given(plain=GARBAGE | st.dictionaries(st.sampled_from(["parameters", "fixed", "start", "search"]), GARBAGE))
def test_garbage_raises_input_errors_only(plain):
    only_input_errors(plain)


@examples(30)
@given(plain=documents(), data=st.data())
def test_a_space_with_one_part_replaced_by_garbage_raises_input_errors_only(plain, data):
    plain = {**plain, "start": [{}], "search": {"trials": 3}}
    part = data.draw(st.sampled_from(["parameters", "fixed", "start", "search", "spec"]))
    if part == "start":
        plain["start"] = data.draw(st.lists(GARBAGE | st.dictionaries(KEYS, SCALARS, max_size=4), max_size=3))
    elif part == "spec" and plain["parameters"]:
        name = data.draw(st.sampled_from(sorted(plain["parameters"])))
        plain["parameters"][name] |= data.draw(st.dictionaries(KEYS, GARBAGE, max_size=3))
    else:
        plain.setdefault(part, {})
        plain[part] = {**plain[part], **data.draw(st.dictionaries(KEYS, GARBAGE, max_size=3))}
    only_input_errors(plain)


@pytest.fixture(scope="module")
def garbage_path(tmp_path_factory):
    return tmp_path_factory.mktemp("garbage") / "garbage.yaml"


@examples(60)
@given(
    content=st.binary(max_size=40)
    | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.text("{}[]:,-!&*<>|'\"#%@ \nanot0x1e.~\\", max_size=40).map(str.encode)
    | st.text("0123456789:-+T.Zxbo_", max_size=20).map(lambda text: f"fixed: {text}".encode())
)
def test_garbage_files_raise_input_errors_only(garbage_path, content):
    garbage_path.write_bytes(content)
    with pytest.raises(InputError):
        load(str(garbage_path))


# ---- points tried after the start points


def test_points_to_enqueue_are_completed_and_go_with_what_is_fixed():
    plain = document()
    plain["start"] = [{"backbone": "vgg16"}]
    plain["enqueue"] = [{"backbone": "resnet18", "unfreeze_depth": 2}, {"backbone": "resnet18", "unfreeze_depth": 3}]
    space = parse(plain, "x")
    assert [point["unfreeze_depth"] for point in space.enqueue] == [2, 3] and "learning_rate" in space.enqueue[0]
    held = fix(space, {"unfreeze_depth": 1})
    assert len(held.enqueue) == 1 and "unfreeze_depth" not in held.enqueue[0]
    assert parse(held.document, "plan.yaml").enqueue == held.enqueue


def test_a_point_to_enqueue_that_is_a_start_point_is_told():
    plain = document()
    plain["start"], plain["enqueue"] = [{"backbone": "vgg16"}], [{"backbone": "vgg16"}]
    assert faults_of(plain) == ["my.yaml: enqueue[0]: equals start[0] once completed; delete one of them"]


LITE = ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "tf_efficientnet_lite2"]


def lite(**sections):
    parameters = {
        "backbone": {"type": "categorical", "choices": LITE},
        "unfreeze_depth": {"type": "int", "low": 0, "high": 5},
        "learning_rate": {"type": "float", "low": 1e-5, "high": 0.1, "log": True},
        "augmentation": {"type": "categorical", "choices": ["none", "light", "strong"]},
        "batch_norm": {"type": "categorical", "choices": ["train", "frozen"], "when": "unfreeze_depth > 0"},
    }
    return parse({"parameters": parameters} | sections, "x")


def test_a_space_takes_from_the_portfolio_what_lies_inside_it():
    none = with_portfolio(lite())  # no start point
    assert len(none.start) == 1 and none.start[0] not in none.portfolio
    head = {"backbone": LITE[0], "unfreeze_depth": 0, "learning_rate": 0.01, "augmentation": "none"}
    whole = with_portfolio(lite(start=[head]))
    assert whole.start == (head,) and whole.portfolio == none.start + none.portfolio
    assert len(whole.portfolio) == len(yaml.safe_load(PORTFOLIO.read_text())["portfolio"]) == 16
    again = parse(whole.document, "plan.yaml")
    assert (again.start, again.portfolio) == (whole.start, whole.portfolio) and not again.enqueue
    assert with_portfolio(again) == again
    first = dict(whole.portfolio[0])
    near = first | {"learning_rate": 0.8 * first["learning_rate"]}
    assert with_portfolio(lite(start=[near])).portfolio == whole.portfolio[1:]
    for name, value in first.items():
        held = with_portfolio(fix(lite(), {name: value}))
        assert {name: value, **held.start[0]} == first and len(held.portfolio) < len(whole.portfolio)
    for other in (fix(lite(), {"backbone": "test_resnet"}), lite(enqueue=[])):
        assert with_portfolio(other) == other


def test_a_space_is_the_recorded_one_whatever_the_portfolio_was():
    head = {"backbone": LITE[0], "unfreeze_depth": 0, "learning_rate": 0.01}
    for space in (lite(), lite(start=[head]), lite(start=[head], enqueue=[head | {"learning_rate": 0.02}])):
        recorded = with_portfolio(space).document
        assert is_same(space, recorded) and not is_same(fix(space, {"batch_norm": "frozen"}), recorded)
        if "portfolio" in recorded:  # as versions without that section wrote it
            assert is_same(space, {**recorded, "enqueue": recorded["portfolio"], "portfolio": []})
    assert not is_same(lite(start=[head]), with_portfolio(lite()).document)


def test_a_point_that_becomes_a_start_point_when_something_is_fixed_is_left_out():
    plain = document()
    plain["start"] = [{"backbone": "vgg16"}]
    plain["enqueue"] = [{"backbone": "resnet18"}, {"backbone": "resnet18", "unfreeze_depth": 3}]
    plain["portfolio"] = [{"backbone": "vgg16", "unfreeze_depth": 3}, {"backbone": "resnet18", "unfreeze_depth": 4}]
    held = fix(parse(plain, "x"), {"backbone": "resnet18"})
    again = parse(held.document, "plan.yaml")  # which a resumed run reads
    assert again == held and held.start[0] not in held.enqueue
    assert [len(points) for points in (held.start, held.enqueue, held.portfolio)] == [1, 1, 1]


def test_the_portfolio_is_taken_as_it_was_recorded_or_not_at_all():
    points = yaml.safe_load(PORTFOLIO.read_text())["portfolio"]
    assert with_portfolio(lite(fixed={"optimizer": "sgd"})).portfolio == ()
    conditional = lite().document["parameters"]
    for name, when in (("augmentation", "batch_norm == frozen"), ("unfreeze_depth", f"backbone == {LITE[0]}")):
        changed = {**conditional, name: {**conditional[name], "when": when}}
        if name == "augmentation":
            changed["batch_norm"] = {key: value for key, value in changed["batch_norm"].items() if key != "when"}
        space = with_portfolio(parse({"parameters": changed}, "x"))
        parse(space.document, "plan.yaml")
        for taken in (*space.start, *space.portfolio):
            whole = {**DEFAULTS, **trial_values(space, taken)}
            assert any(point.items() <= whole.items() for point in points)
