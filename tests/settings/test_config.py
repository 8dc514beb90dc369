from typing import get_args

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tuning.record.journal import LOSSES, SCORES
from tuning.settings.command_line import command_line
from tuning.settings.config import (
    PARAMETERS,
    InputError,
    SearchPlan,
    TrialConfig,
    build,
    check_value,
    visible,
    without_secrets,
)
from tuning.settings.values import parse_duration
from tuning.training import scores


@given(st.text())
@example("a\u2028b\u2029c")
@example("\u202etxt.\u2066exe")
def test_what_is_visible_is_one_line_that_moves_no_cursor(value):
    told = visible(value)
    assert len((told + ".").splitlines()) == 1 and not any(ord(sign) < 32 or 127 <= ord(sign) < 160 for sign in told)
    assert not any("\u202a" <= sign <= "\u202e" or "\u2066" <= sign <= "\u2069" for sign in told)
    assert visible("lung 🫁 [red]\n\x1b[31m") == "lung 🫁 [red]\\n\\x1b[31m"


PASSWORD = st.text("abcXYZ0123456789-._~%!$*+,;/:", min_size=6)


@given(PASSWORD, st.sampled_from(("", "me")), st.sampled_from(("", "/db", ":5432/db?sslmode=require")))
def test_a_password_in_a_url_is_neither_written_nor_shown(password, user, rest):
    url = f"postgresql+psycopg://{user}:<{password}>@host{rest}"
    plan = SearchPlan(name="x", optuna_storage=url)
    assert plan.optuna_storage == url
    assert plan.model_dump()["optuna_storage"] == f"postgresql+psycopg://{user}@host{rest}"
    told = InputError(f"optuna_storage: '{url}' can't be opened; give another")
    assert f"<{password}>" not in str(told) + told.faults[0] and "give another" in str(told)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://id:key@bucket/x and mysql://a:b@c/d", "s3://id@bucket/x and mysql://a@c/d"),
        ("postgresql://u:p@ss@host/db", "postgresql://u@host/db"),
        ("postgresql://host/db?user=u&password=p&x=1", "postgresql://host/db?user=u&x=1"),
        ("s3://b/x?access_key=a&secret_key=b&region=c", "s3://b/x?&region=c"),
        ("https://h/x?X-Amz-Date=1&X-Amz-Credential=a&X-Amz-Signature=b", "https://h/x?X-Amz-Date=1"),
        ("https://h/x?x-amz-security-token=a%2Fb", "https://h/x?"),
        ("https://h/x?AWSAccessKeyId=a&Expires=1&Signature=b", "https://h/x?&Expires=1"),
        ("https://h/x?sv=1&se=2&sig=a%3D&sp=r", "https://h/x?sv=1&se=2&sp=r"),
        ("https://h/x?GoogleAccessId=me&X-Goog-Signature=a", "https://h/x?GoogleAccessId=me"),
        ("fsspec+abfs://c/x?account_key=a&sas_token=b&api-key=c&client.secret=d", "fsspec+abfs://c/x?"),
        ("mysql://u@h/db?charset=utf8&passphrase=x&author=me", "mysql://u@h/db?charset=utf8&author=me"),
        (
            "C:/data, /data/a@b, me@host:/x, sqlite:////tmp/study.db",
            "C:/data, /data/a@b, me@host:/x, sqlite:////tmp/study.db",
        ),
    ],
)
def test_secrets_go_and_all_else_stays(text, shown):
    assert without_secrets(text) == shown


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59))
def test_durations_add_up(hours, minutes, seconds):
    assert parse_duration(f"{hours}h{minutes}m{seconds}s") == 3600 * hours + 60 * minutes + seconds


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("1.5h", 5400), ("45m", 2700), ("12", 12)])
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "2 hours", "2h -3m", "soon", "1e3s", "2h30", "5m10", "30ss"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="must be a duration such as"):
        parse_duration(text)


def test_all_means_every_stage():
    assert TrialConfig(backbone="x", unfreeze_depth="all").unfreeze_depth == 5
    assert check_value(TrialConfig, "unfreeze_depth", "all", text=True) == 5


def test_a_number_written_as_text_is_refused_with_the_cure():
    with pytest.raises(ValueError, match=r"must be a number, got the text '1e-4'; write 0.0001"):
        check_value(TrialConfig, "learning_rate", "1e-4")
    assert check_value(TrialConfig, "learning_rate", "1e-4", text=True) == 1e-4
    with pytest.raises(ValueError, match=r"must be an integer, got the text '16'; write 16"):
        check_value(TrialConfig, "batch_size", "16")
    with pytest.raises(ValueError, match=r"must be an integer, got '1\.5'$"):  # 1.5 would be no cure
        check_value(TrialConfig, "batch_size", "1.5")


def test_all_faults_are_told_at_once():
    with pytest.raises(InputError) as caught:
        build(SearchPlan, {"name": "../x", "trials": 0, "speed": 9}, "plan.yaml")
    assert len(caught.value.faults) == 3
    assert all(fault.startswith("plan.yaml: ") for fault in caught.value.faults)


def test_the_command_line_sorts_settings_from_parameters():
    given, overrides = command_line(
        {"trials": 3, "seed": None}, [["image_size=128", "metric=val_auroc"], ["patience=2"]]
    )
    assert given == {"trials": 3, "metric": "val_auroc", "patience": 2}
    assert overrides == {"image_size": 128}


@pytest.mark.parametrize(
    ("flags", "pairs", "said"),
    [
        ({"trials": 0}, [], "--trials: must be greater than or equal to 1, got 0"),
        ({"epochs": -1}, [], "--epochs: must be greater"),
        ({"gpus_per_trial": -0.5}, [], "--gpus-per-trial: must be greater"),
        ({"time_budget": "soon"}, [], "--time-budget: must be a duration such as"),
        ({"name": "a/b"}, [], "--name: must be letters, digits"),
        ({}, ["patience"], "--set patience: must be key=value"),
        ({}, ["patiance=3"], "--set patiance: no such setting; did you mean patience?"),
        ({}, ["patience=3", "patience=4"], "--set patience: is given twice"),
        ({"trials": 3}, ["trials=4"], "--set trials: is given twice"),
        ({}, ["learning_rate=fast"], "--set learning_rate: must be a number, got 'fast'"),
        (
            {},
            ["augmentation=heavy"],
            "--set augmentation: must be none, light, medium, strong, or strengths such",
        ),
        ({}, ["divergence_factor=nan"], "--set divergence_factor: must be a finite number"),
    ],
)
def test_each_fault_of_the_command_line(flags, pairs, said):
    with pytest.raises(InputError) as caught:
        command_line(flags, [pairs])
    assert len(caught.value.faults) == 1
    assert caught.value.faults[0].startswith(said)


@given(st.sampled_from([*PARAMETERS, "trials", "patience", "metric"]), st.text(max_size=20))
def test_any_text_is_taken_or_refused_in_words(key, text):
    try:
        command_line({}, [[f"{key}={text}"]])
    except InputError as error:
        assert error.faults[0].startswith(f"--set {key}: ")


def test_a_seed_leaves_room_for_those_of_finalists():
    largest = 2**31 - 1001
    plan = SearchPlan(name="x", seed=largest, finalist_seeds=1000)
    assert TrialConfig(backbone="a", seed=plan.seed + plan.finalist_seeds).seed < 2**31
    with pytest.raises(ValidationError, match="less than"):
        SearchPlan(name="x", seed=largest + 1)


def test_what_trials_are_chosen_by_is_what_epochs_have():
    metrics = get_args(SearchPlan.model_fields["metric"].annotation)
    assert set(metrics) == {*LOSSES, *SCORES} - {"val_accuracy"}
    assert {f"val_{name}" for name in scores.SCORES} == set(SCORES)
    assert all(f"`{name}`" in SearchPlan.model_fields["metric"].description for name in metrics)
