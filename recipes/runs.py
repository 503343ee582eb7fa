"""What all scripts do before torch is imported: load the data set, open the run's folder."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from config import DATA_FLAGS, IMMATERIAL_FLAGS, CommonConfig, RankerConfig, RetrieverConfig
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters
from distributed import is_main, join
from errors import UserError, advice, flag_names
from flags import reread
from model.hub import BaseModel, find_model
from storage import read_json, reading
from trainer.fingerprint import fingerprint
from trainer.run_folder import CONFIG, RunFolder

FROM_SCRATCH = "start from scratch with --overwrite"
TIED_SHARE = 0.01  # share of users with tied targets above which a note is printed


def load_data(config: CommonConfig) -> SequenceDataset:
    """Load the data set that the flags select.

    Raises:
        UserError: files are missing or cannot be used.
    """
    with (
        advice("lower --min_uc, --min_sc or --min_rating, or use more data"),
        flag_names(code="dataset_code"),
    ):
        return load_dataset(
            str(config.dataset_code),
            data_root=config.data_root,
            cache_root=config.cache_root,
            filters=Filters(config.min_rating, config.min_uc, config.min_sc, config.ties),
            interactions=config.interactions,
            items=config.items,
        )


def describe_data(data: SequenceDataset, ties: str) -> None:
    """Print the statistics of a data set, and a note if many test targets have tied timestamps."""
    print(data.summary())
    if data.num_tied_targets > TIED_SHARE * data.num_users:
        order = "of their item numbers" if ties == "item" else "of the file"
        print(
            f"note: for {data.num_tied_targets / data.num_users:.0%} of the users, the test target "
            f"has the same time as the item before; their order is that {order} (--ties)",
            file=sys.stderr,
        )


def find_encoder(config: RetrieverConfig) -> BaseModel | None:
    """Locate the text encoder that the flags name, downloading it if necessary; None for none.

    Raises:
        UserError: it does not exist or cannot be downloaded.
    """
    if config.title_encoder == "none":
        return None
    with flag_names(name="title_encoder"):
        return find_model(config.title_encoder, cache_root=config.cache_root, hub_cache=None)


def check_examples(data: SequenceDataset) -> None:
    """Refuse data without a training example for the language model.

    Raises:
        UserError: no user has a training item that follows another.
    """
    if not len(data.training_prefixes()[0]):
        raise UserError(
            f"{data.code}: no user has two training items, so there is no prompt to train on: "
            "use data with longer histories"
        )


def run_fingerprint(
    config: CommonConfig,
    details: Mapping[str, Any],
    data: SequenceDataset,
    *inputs: bytes,
    exclude: Collection[str] = (),
) -> str:
    """Hash what determines the results of a run.

    Args:
        config: all settings.
        details: resolved settings that replace those of the flags.
        data: the data set.
        inputs: other inputs that the results depend on.
        exclude: settings that do not matter here, in addition to the immaterial ones.

    Returns:
        Hex SHA-256.
    """
    settings = {
        name: value
        for name, value in (config.as_dict() | dict(details)).items()
        if name not in IMMATERIAL_FLAGS and name not in exclude
    }
    return fingerprint(settings, data.fingerprint.encode(), *inputs)


def check_replaceable(run: RunFolder, config: CommonConfig) -> None:
    """Refuse to touch an earlier run unless the flags allow it.

    Raises:
        UserError: the folder holds an earlier run.
    """
    if config.overwrite or (config.resume and run.is_interrupted()):
        return
    if run.is_interrupted():
        raise UserError(
            f"{run.path} holds an interrupted run: continue it with --resume, or {FROM_SCRATCH}"
        )
    if not config.resume and run.has_outputs():
        raise UserError(
            f"{run.path} holds an earlier run: replace it with --overwrite, or use another "
            "--export_root"
        )


def is_finished(run: RunFolder, config: CommonConfig) -> bool:
    """Whether ``--resume`` finds this run already finished, in which case it says so.

    Raises:
        UserError: the folder holds another run.
    """
    if not config.resume:
        return False
    with other_run_explained():
        finished = run.is_finished()
    if finished:
        print(f"{run.path} is finished, there is nothing to resume")
    return finished


@contextmanager
def other_run_explained() -> Iterator[None]:
    """Add advice to the error for a folder or checkpoint that belongs to another run."""
    with advice(
        "resume with the settings in its config.json, use another --export_root, or replace it "
        "with --overwrite"
    ):
        yield


@contextmanager
def locked(run: RunFolder) -> Iterator[None]:
    """Reserve the run's folder for this run, then let its other processes, if any, start.

    Raises:
        UserError: another process uses it, or it cannot be written.
    """
    with ExitStack() as stack:
        if is_main():
            with advice("wait for it or use another --export_root"):
                stack.enter_context(run.locked())
        join()
        yield


# Finished runs ------------------------------------------------------------------------------------


def finished_settings(run_dir: Path) -> dict[str, Any]:
    """The ``config.json`` of a finished run of either stage; a ranker's has ``verbalizer``.

    Raises:
        UserError: there is no such run, or it is not finished.
    """
    if not (run_dir / CONFIG).exists():
        raise UserError(f"--run {run_dir}: no {CONFIG} there; name the folder of a finished run")
    with advice("name another run with --run, or run it again"):
        settings: dict[str, Any] = read_json(run_dir / CONFIG)
    if settings.keys().isdisjoint(("model_code", "verbalizer")):
        raise UserError(
            f"--run {run_dir}: it is no run of train_retriever.py or train_ranker.py; name one"
        )
    last = "fusion.json" if "verbalizer" in settings else "test_metrics.json"
    if not (run_dir / last).exists():
        raise UserError(f"--run {run_dir}: the run is not finished; continue it with --resume")
    return settings


def retriever_of(run_dir: Path, settings: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """Folder and settings of a finished run's retriever, which a ranker's settings include.

    Raises:
        InputError: the settings are damaged.
    """
    with reading(run_dir / CONFIG):
        if "verbalizer" in settings:
            return Path(settings["retrieved_from"]), dict(settings["retriever"])
    return run_dir, settings


def check_own_folder(folder: Path, *, is_ours: bool) -> None:
    """Refuse an --output that cannot be written without losing something else.

    Args:
        folder: the folder, which may be absent.
        is_ours: whether it holds an earlier output.

    Raises:
        UserError: it is a file, or a folder with other files.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours:
        raise UserError(f"--output {folder}: the folder holds something else; name another")


def data_config(
    run_dir: Path, settings: dict[str, Any], data_root: str | None, cache_root: str | None
) -> CommonConfig:
    """The data settings of a finished run; ``data_root`` and ``cache_root`` override its folders.

    Raises:
        InputError: the settings are damaged.
    """
    config = RankerConfig if "verbalizer" in settings else RetrieverConfig
    with reading(run_dir / CONFIG):
        known = reread(config, {name: settings[name] for name in DATA_FLAGS if name in settings})
    folders = {"data_root": data_root, "cache_root": cache_root}
    return config(**known | {name: value for name, value in folders.items() if value is not None})
