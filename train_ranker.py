"""Tune a language model to rank the retriever's candidates, and evaluate both stages together.

Example:
    python train_ranker.py --llm_retrieved_path experiments/lru/ml-100k
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cli import parse, run_main
from config import DATA_FLAGS, RankerConfig, ranker_preset
from dataloader.candidates import CANDIDATES_FILE, Candidates, load_candidates
from datasets import SequenceDataset
from datasets.base import Filters
from distributed import size
from errors import UserError, advice
from flags import reread
from process import check_device, check_single_process
from recipes.language_model import LanguageModel, find_language_model
from recipes.prompts import build_prompts, note_few_items
from recipes.runs import (
    check_examples,
    check_replaceable,
    describe_data,
    load_data,
    locked,
    run_fingerprint,
)
from storage import read_json, reading
from trainer.run_folder import CONFIG, LOG, RunFolder

OUTPUTS = (
    "adapter",
    "rankings.npz",
    "subset_metrics.json",
    "retrieval_metrics.json",
    "overall_metrics.json",
    "fused_metrics.json",
    "fusion.json",
)
RETRIEVER_WEIGHTS = "model.safetensors"
RETRAIN = "run train_retriever.py again"


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings, the data and the candidates, check them, then train."""
    config = parse(RankerConfig, argv, __doc__, preset=ranker_preset, inherit=retriever_settings)
    check_device(config.device)
    if config.dry_run:
        check_single_process()
    if config.llm_shard_weights and size() == 1:
        raise UserError(
            "--llm_shard_weights needs several processes: use torchrun --nproc_per_node N"
        )
    data = load_data(config)
    describe_data(data, config.ties)
    config = config.with_retriever(data.code)
    check_examples(data)
    candidates = read_candidates(config, data)
    check_retriever(config)
    language_model = find_language_model(config)
    sizes = [split.items.shape[1] for split in candidates.values()]
    num_candidates = max(config.llm_negative_sample_size + 1, *sizes)
    prompts = build_prompts(config, data, num_candidates, language_model)
    if config.verbalizer == "letters":
        note_few_items(config, data)
    details = run_details(config, data, language_model)
    items = (split.items.tobytes() for split in candidates.values())
    fingerprint = run_fingerprint(config, language_model.details(), data, *items)
    run = RunFolder(config.run_dir(language_model.base.name, data.code), OUTPUTS, fingerprint)
    if config.dry_run:
        from recipes.dry_run import dry_run_ranker

        dry_run_ranker(config, data, candidates, language_model, prompts, details)
        return
    check_replaceable(run, config)
    with locked(run):
        # torch and transformers take seconds to import, so this comes after all checks.
        from recipes.fit_ranker import train

        train(config, data, run, candidates, language_model, prompts, details)


def retriever_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Data settings of the retriever's run, so that they need not be passed again.

    Args:
        given: the flags of this run.

    Raises:
        UserError: there is no such run, or the flags contradict it.
    """
    if "llm_retrieved_path" not in given:
        return {}
    run_dir = Path(given["llm_retrieved_path"])
    if not (run_dir / CANDIDATES_FILE).exists():
        raise UserError(
            f"--llm_retrieved_path {run_dir}: no {CANDIDATES_FILE} there; name the folder of a "
            "finished run of train_retriever.py, e.g. experiments/lru/ml-100k"
        )
    path = run_dir / CONFIG
    if not path.exists():
        return {}
    with advice(RETRAIN), reading(path):
        settings = read_json(path)
        settings = reread(
            RankerConfig, {name: settings[name] for name in DATA_FLAGS if name in settings}
        )
    for name in ("dataset_code", *Filters._fields):
        if name in given and given[name] != settings.get(name, given[name]):
            raise UserError(
                f"--{name} {given[name]}: {run_dir} used {settings[name]}; leave out the flag or "
                "name another --llm_retrieved_path"
            )
    return settings


def read_candidates(config: RankerConfig, data: SequenceDataset) -> dict[str, Candidates]:
    """The retriever's candidates, by split.

    Raises:
        UserError: they are missing, damaged or made from other data, or there is nothing to rank.
    """
    with advice("run train_retriever.py with the same data and --min_* flags"):
        candidates = load_candidates(config.retrieved_dir / CANDIDATES_FILE, data)
    if not all(len(split.retrieved) for split in candidates.values()):
        raise UserError(
            f"{config.retrieved_dir}: no user's target is among the candidates, so there is "
            "nothing to rank; train the retriever longer"
        )
    return candidates


def check_retriever(config: RankerConfig) -> None:
    """Refuse a run without the files that the prior of the titles needs.

    Raises:
        UserError: a file is missing.
    """
    if not config.is_guided:
        return
    prior, folder = config.title_prior, config.retrieved_dir
    for name in (CONFIG, LOG, RETRIEVER_WEIGHTS) if config.uses_folds else (CONFIG,):
        if not (folder / name).exists():
            other = "none" if name == CONFIG else "popularity"
            raise UserError(
                f"{folder}: no {name} there, which --title_prior {prior} needs; {RETRAIN}, or set "
                f"--title_prior {other}"
            )


def run_details(
    config: RankerConfig, data: SequenceDataset, language_model: LanguageModel
) -> dict[str, Any]:
    """Resolved settings and those of the retriever, for ``config.json``."""
    details = language_model.details() | {
        "data_code": data.code,
        "data_fingerprint": data.fingerprint,
        "retrieved_from": str(config.retrieved_dir),
    }
    if (config.retrieved_dir / CONFIG).exists():
        with advice(RETRAIN):
            details["retriever"] = read_json(config.retrieved_dir / CONFIG)
    return details


if __name__ == "__main__":
    run_main(main)
