"""Train a sequential recommender, evaluate it and write the candidates for the ranker.

Example:
    python train_retriever.py --dataset_code ml-100k
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from augmentation.merge import Interactions, load_augmented
from cli import parse, run_main
from config import RetrieverConfig, retriever_preset
from datasets import SequenceDataset
from errors import UserError, advice, flag_names
from model.hub import content_hash
from process import check_device, check_single_process
from recipes.runs import (
    check_replaceable,
    describe_data,
    find_encoder,
    load_data,
    locked,
    run_fingerprint,
)
from trainer.run_folder import SEARCH, RunFolder

OUTPUTS = ("model.safetensors", "candidates.npz", "val_metrics.json", "test_metrics.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and the data, check them, then train."""
    config = parse(RetrieverConfig, argv, __doc__, preset=retriever_preset)
    check_device(config.device)
    if config.search or config.dry_run:
        check_single_process()  # a search runs points side by side instead
    data = load_data(config)
    describe_data(data, config.ties)
    check_sizes(config, data)
    augmented = read_augmented(config, data)
    inputs = fingerprint_inputs(config, augmented)
    run = RunFolder(config.run_dir(data.code), OUTPUTS, run_fingerprint(config, {}, data, *inputs))
    if config.dry_run:
        from recipes.dry_run import dry_run_retriever

        dry_run_retriever(config, data, augmented, find_encoder(config))
        return
    if not (config.search and (run.path / SEARCH).exists()):  # a search always resumes
        check_replaceable(run, config)
    note_repeated_targets(config, data)
    encoder = find_encoder(config)
    with locked(run):
        # torch takes seconds to import, so this comes after all checks.
        if config.search:
            from recipes.search import search

            words = sys.argv[1:] if argv is None else argv
            search(config, data, run, encoder, [__file__, *words])
        else:
            from recipes.fit_retriever import train

            train(config, data, run, augmented, encoder)


def check_sizes(config: RetrieverConfig, data: SequenceDataset) -> None:
    """Refuse more candidates or sampled items than there are items.

    Raises:
        UserError: a flag asks for more.
    """
    for name in ("num_candidates", "negatives"):
        size = getattr(config, name)
        if size is not None and size > data.num_items:
            raise UserError(f"--{name} {size}: {data.code} has only {data.num_items} items")


def read_augmented(config: RetrieverConfig, data: SequenceDataset) -> Interactions | None:
    """The generated interactions that the flags name, or None.

    Raises:
        UserError: they are missing, damaged or belong to other data.
    """
    if config.augmented is None:
        return None
    with (
        flag_names(folder="augmented"),
        advice("name a finished run of augment_data.py with the same data and --min_* flags"),
    ):
        return load_augmented(Path(config.augmented), data)


def fingerprint_inputs(config: RetrieverConfig, augmented: Interactions | None) -> list[bytes]:
    """What determines the results in addition to settings and data."""
    inputs = [augmented.fingerprint().encode()] if augmented else []
    if Path(config.title_encoder).is_dir():  # its content can change under its name
        inputs.append(content_hash(Path(config.title_encoder)).encode())
    return inputs


def note_repeated_targets(config: RetrieverConfig, data: SequenceDataset) -> None:
    """Point out targets that cannot be recommended because they are in the user's history."""
    repeated = data.num_repeated_targets()
    if repeated and config.excludes_history:
        print(
            f"note: {repeated:,} of {data.num_users:,} test targets are also in the user's "
            "history, which is excluded from ranking; to rank it too, set --mask_history never",
            file=sys.stderr,
        )


if __name__ == "__main__":
    run_main(main)
