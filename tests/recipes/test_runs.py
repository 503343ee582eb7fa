"""What decides whether a run may start, resume or replace another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from config import (
    ALL_CONFIGS,
    IMMATERIAL_FLAGS,
    AugmentationConfig,
    CommonConfig,
    RankerConfig,
    RetrieverConfig,
)
from datasets import SequenceDataset
from errors import UserError
from flags import flags_of
from recipes.runs import (
    check_examples,
    check_replaceable,
    describe_data,
    is_finished,
    load_data,
    locked,
    run_fingerprint,
)
from storage import write_json
from tests.helpers import make_data
from trainer.run_folder import RunFolder

# Fingerprints -----------------------------------------------------------------------------------


def other_value(config: CommonConfig, name: str) -> Any:
    """A value that differs from the one in the config."""
    spec, value = flags_of(type(config))[name], getattr(config, name)
    if "choices" in spec.metadata:
        return next(choice for choice in spec.metadata["choices"] if choice != value)
    if spec.metadata.get("many"):
        return (*value, value[0])
    words = ("true", "false", "7", "0.125", "other")
    for word in words:
        try:
            other = spec.metadata["type"](word)
        except Exception:  # the type does not take it
            continue
        if other != value:
            return other
    raise AssertionError(f"no other value for {name}")


def changed(config: CommonConfig, **values: Any) -> CommonConfig:
    """The config with other values, even if they cannot be combined."""
    copy = object.__new__(type(config))
    for name in flags_of(type(config)):
        object.__setattr__(copy, name, values.get(name, getattr(config, name)))
    return copy


@pytest.mark.parametrize("cls", ALL_CONFIGS)
def test_results_depend_on_material_flags_alone(cls: type):
    config, data = cls(dataset_code="games"), make_data([5, 6])
    before = run_fingerprint(config, {}, data)
    for name, spec in flags_of(cls).items():
        other = changed(config, **{name: other_value(config, name)})
        assert (run_fingerprint(other, {}, data) != before) == (
            spec.metadata["affects"] == "results"
        ), name
        assert (name in IMMATERIAL_FLAGS) == (spec.metadata["affects"] != "results"), name
        assert run_fingerprint(other, {}, data, exclude=[name]) == run_fingerprint(
            config, {}, data, exclude=[name]
        )


def test_results_depend_on_details_data_and_inputs():
    config, data = RankerConfig(dataset_code="games"), make_data([5, 6])
    details = {"llm_base_model": "a", "llm_revision": "1", "tokens_per_batch": 1024}
    before = run_fingerprint(config, details, data, b"candidates")
    assert run_fingerprint(config, dict(details), make_data([5, 6]), b"candidates") == before
    other_data = make_data([5, 6])
    object.__setattr__(other_data, "fingerprint", "other")
    for other in (
        run_fingerprint(config, details | {"llm_base_model": "b"}, data, b"candidates"),
        run_fingerprint(config, details | {"llm_revision": "2"}, data, b"candidates"),
        run_fingerprint(config, details, other_data, b"candidates"),
        run_fingerprint(config, details, data, b"other"),
        run_fingerprint(config, details, data),
    ):
        assert other != before
    # A detail of the name of an immaterial flag is immaterial as well.
    fewer = run_fingerprint(config, details | {"tokens_per_batch": 7}, data, b"candidates")
    assert fewer == before


def test_details_replace_flags():
    data = make_data([5, 6])
    default = AugmentationConfig(dataset_code="games")
    named = AugmentationConfig(dataset_code="games", llm_base_model="a", device="cpu")
    details = {"llm_base_model": "a", "device": "cpu"}
    assert run_fingerprint(default, details, data) == run_fingerprint(named, details, data)


# Data -------------------------------------------------------------------------------------------


def test_load_data(toy: dict[str, Path], tmp_path: Path):
    files = {name: str(path) for name, path in toy.items()}
    config = RetrieverConfig(dataset_code="custom", cache_root=str(tmp_path), min_uc=12, **files)
    data = load_data(config)
    assert isinstance(data, SequenceDataset) and 0 < data.num_users < 60


def test_few_ties_are_not(capsys: pytest.CaptureFixture[str]):
    data = make_data([5] * 200)
    describe_data(replace(data, num_tied_targets=2), "item")
    assert tuple(capsys.readouterr()) == (data.summary() + "\n", "")
    describe_data(replace(data, num_tied_targets=3), "item")
    assert "note: for 2% of the users" in capsys.readouterr().err


def test_load_data_advises(toy: dict[str, Path], tmp_path: Path):
    files = {name: str(path) for name, path in toy.items()}
    config = RetrieverConfig(dataset_code="custom", cache_root=str(tmp_path), min_uc=99, **files)
    with pytest.raises(UserError, match=r"at least 99 per user .*: lower --min_uc"):
        load_data(config)


@pytest.mark.parametrize("ties", ["item", "file"])
def test_ties_are_pointed_out(
    ties: str, toy: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
):
    """Days in place of seconds: the last items of most users have the same time."""
    header, *rows = toy["interactions"].read_text().splitlines()
    days = (f"{row.rpartition(',')[0]},{int(row.rpartition(',')[2]) // 9}\n" for row in rows)
    log = tmp_path / "log.csv"
    log.write_text(f"{header}\n" + "".join(days))
    files = {"interactions": str(log), "items": str(toy["items"])}
    config = RetrieverConfig(
        dataset_code="custom", cache_root=str(tmp_path / "cache"), ties=ties, **files
    )
    data = load_data(config)
    describe_data(data, ties)
    share = f"{data.num_tied_targets / data.num_users:.0%}"
    order = {"item": "of their item numbers", "file": "of the file"}[ties]
    assert capsys.readouterr().err == (
        f"note: for {share} of the users, the test target has the same time as the item before; "
        f"their order is that {order} (--ties)\n"
    )


def test_check_examples():
    check_examples(make_data([3, 4]))
    with pytest.raises(UserError, match="test: no user has two training items"):
        check_examples(make_data([3, 3]))


# Earlier runs -----------------------------------------------------------------------------------


@pytest.fixture()
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", ("weights", "metrics.json"), "mine")


def fill(run: RunFolder, *names: str, fingerprint: str = "mine") -> None:
    run.path.mkdir(exist_ok=True)
    write_json(run.path / "config.json", {"fingerprint": fingerprint})
    for name in names:
        (run.path / name).touch()


INTERRUPTED = ("checkpoint.safetensors", "weights")
FINISHED = ("weights", "metrics.json")


@pytest.mark.parametrize(
    ("files", "flags", "message"),
    [
        ((), {}, None),
        ((), {"resume": True}, None),
        (("log.jsonl",), {}, None),
        (INTERRUPTED, {}, "an interrupted run: continue it with --resume, or start from scratch"),
        (INTERRUPTED, {"resume": True}, None),
        (INTERRUPTED, {"overwrite": True}, None),
        (FINISHED, {}, "an earlier run: replace it with --overwrite, or use another --export_root"),
        (FINISHED, {"overwrite": True}, None),
        (FINISHED, {"resume": True}, None),  # there is nothing to do
        (("weights",), {}, "an earlier run: replace it"),
    ],
)
def test_check_replaceable(
    files: tuple[str, ...], flags: dict[str, bool], message: str | None, run: RunFolder
):
    if files:
        fill(run, *files)
    config = RetrieverConfig(dataset_code="games", **flags)
    if message is None:
        check_replaceable(run, config)
        return
    with pytest.raises(UserError) as caught:
        check_replaceable(run, config)
    assert str(caught.value).startswith(f"{run.path} holds {message}")


def test_is_finished(run: RunFolder, capsys: pytest.CaptureFixture):
    resumed = RetrieverConfig(dataset_code="games", resume=True)
    assert not is_finished(run, resumed)
    fill(run, *INTERRUPTED)
    assert not is_finished(run, resumed)
    assert capsys.readouterr().out == ""
    run.checkpoint.unlink()
    fill(run, *FINISHED)
    assert is_finished(run, resumed)
    message = f"{run.path} is finished, there is nothing to resume\n"
    assert capsys.readouterr().out == message
    assert not is_finished(run, RetrieverConfig(dataset_code="games", overwrite=True))


def test_is_finished_refuses_another_run(run: RunFolder):
    fill(run, *FINISHED, fingerprint="another")
    with pytest.raises(UserError) as caught:
        is_finished(run, RetrieverConfig(dataset_code="games", resume=True))
    message = str(caught.value)
    assert "holds a run with other settings or data: resume with the settings in its" in message
    assert "--export_root" in message and "--overwrite" in message


def test_a_folder_in_use(run: RunFolder):
    with locked(run):
        with pytest.raises(UserError) as caught, locked(RunFolder(run.path, (), "another")):
            pass
        message = f"{run.path} is in use by another run: wait for it or use another --export_root"
        assert str(caught.value) == message
    with locked(run):
        pass


def test_errors_inside_a_lock_are_left_alone(run: RunFolder):
    error = UserError("x")
    with pytest.raises(UserError) as caught, locked(run):
        raise error
    assert caught.value is error
