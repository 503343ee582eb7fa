"""Probabilities from retrievers that were trained on other users.

A ranker that corrects a retriever must learn from interactions that the retriever has not seen,
since it will have to rank such interactions. So the users are split into K folds, and for each fold
a retriever is trained on the other users, with the settings of the finished run and for as many
passes over the data. These retrievers are runs of their own in the folder ``folds`` of the
retriever's run, where later rankers find them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from augmentation.merge import Interactions, load_augmented
from config import RankerConfig, RetrieverConfig
from dataloader.item_prior import ItemScores, RetrieverPrior
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories, Prefixes
from datasets import SequenceDataset
from errors import InputError, UserError, advice, flag_names
from evaluation.sweep import sweep
from flags import flags_of, reread
from model.base import Retriever
from model.registry import load_retriever
from recipes.fit_retriever import WEIGHTS, set_up
from recipes.runs import find_encoder, locked, run_fingerprint
from recipes.training import close_run
from storage import read_json, reading
from trainer.run_folder import CONFIG, FOLDS, LOG, RunFolder
from trainer.run_log import RunLog

ENCODING_BATCH_SIZE = 256
INHERITED = ("data_root", "cache_root", "device", "num_workers", "save_seconds")
RETRAIN = "run train_retriever.py again, or set --title_prior none"


def training_prior(
    config: RankerConfig, data: SequenceDataset, interactions: np.ndarray, device: torch.device
) -> RetrieverPrior:
    """Probabilities before training interactions, from retrievers trained on other users.

    Args:
        config: all settings.
        data: the data set.
        interactions: (n,) ascending indices into ``data.item_ids``, without users' first items.
        device: device of the retrievers.

    Raises:
        UserError: the retriever's run cannot be used, or there are too few users.
    """
    with advice(RETRAIN):
        settings = retriever_config(config)
        steps = best_step(config.retrieved_dir, settings.best_metric)
        settings = replace(settings, max_steps=steps)
    augmented = generated_interactions(config.retrieved_dir, settings, data)
    prefixes = np.searchsorted(data.training_prefixes()[1], interactions)
    fold_of = user_folds(data.num_users, config.folds, settings.seed)
    layer_of = fold_of[np.searchsorted(data.offsets, interactions, side="right") - 1]
    encodings = np.zeros((len(interactions), settings.hidden_units), np.float32)
    layers = []
    for fold in range(config.folds):
        retriever = fold_retriever(config, settings, data, augmented, fold_of, fold).to(device)
        own = np.flatnonzero(layer_of == fold)
        if len(own):
            examples = Prefixes(data, retriever.spec.max_len, retriever.spec.mask_token)
            subset: Dataset = Subset(examples, prefixes[own].tolist())
            encodings[own] = encode(retriever, subset, config.num_workers)
        layers.append(output_layer(retriever))
    return RetrieverPrior(
        interactions, encodings, layers, layer_of, mask_history=settings.excludes_history
    )


def evaluation_prior(
    config: RankerConfig, data: SequenceDataset, split: str, device: torch.device
) -> RetrieverPrior:
    """Probabilities after the histories of all users, from the retriever itself.

    Args:
        config: all settings.
        data: the data set.
        split: ``val`` or ``test``.
        device: device of the retriever.

    Raises:
        UserError: the retriever's run cannot be used.
    """
    with advice(RETRAIN):
        settings = retriever_config(config)
        retriever = load_retriever(config.retrieved_dir, data.num_items).to(device)
    histories = Histories(data, split, retriever.spec.max_len, retriever.spec.mask_token)
    encodings = encode(retriever, histories, config.num_workers)
    users = np.arange(data.num_users)
    layers, layer_of = [output_layer(retriever)], np.zeros_like(users)
    return RetrieverPrior(
        users, encodings, layers, layer_of, mask_history=settings.excludes_history
    )


def retriever_config(config: RankerConfig) -> RetrieverConfig:
    """The settings of the retriever's run, with this run's folders and device.

    Raises:
        InputError: its ``config.json`` is missing or damaged.
    """
    path = config.retrieved_dir / CONFIG
    settings = read_json(path)
    names = settings.keys() & flags_of(RetrieverConfig).keys() - {*INHERITED}
    with reading(path):
        known = reread(RetrieverConfig, {name: settings[name] for name in names})
    here = {name: getattr(config, name) for name in INHERITED}
    return RetrieverConfig(**known | here | {"search": False})


def generated_interactions(
    run_dir: Path, settings: RetrieverConfig, data: SequenceDataset
) -> Interactions | None:
    """The generated interactions that a finished run was trained on, if any.

    Raises:
        UserError: they are missing, damaged or have changed since.
    """
    if settings.augmented is None:
        return None
    folder = Path(settings.augmented)
    with flag_names(folder="augmented"), advice(RETRAIN):
        augmented = load_augmented(folder, data)
        if augmented.fingerprint() != read_json(run_dir / CONFIG).get("augmented_fingerprint"):
            raise InputError(f"{folder} has changed since {run_dir} was trained")
    return augmented


def user_folds(num_users: int, folds: int, seed: int) -> np.ndarray:
    """(num_users,) random fold of each user; sizes of the folds differ by at most one."""
    return np.random.default_rng(seed).permutation(num_users) % folds


def users_of(data: SequenceDataset, selected: np.ndarray) -> SequenceDataset:
    """The data set of the ``selected`` users (num_users,) bool, with the whole catalogue."""
    lengths = np.diff(data.offsets)
    return replace(
        data,
        item_ids=data.item_ids[np.repeat(selected, lengths)],
        offsets=np.concatenate([[0], np.cumsum(lengths[selected])]),
        user_names=[data.user_names[user] for user in np.flatnonzero(selected)],
    )


def fold_retriever(
    config: RankerConfig,
    settings: RetrieverConfig,
    data: SequenceDataset,
    augmented: Interactions | None,
    fold_of: np.ndarray,
    fold: int,
) -> Retriever:
    """Load the retriever that was trained without a fold, or train it.

    Args:
        config: all settings.
        settings: those of the retriever, with the steps that it was trained for.
        data: the data set.
        augmented: generated interactions that the retriever was also trained on, or None.
        fold_of: (num_users,) fold of each user.
        fold: the fold.

    Raises:
        UserError: too few users are left to train on, or the folder cannot be used.
    """
    if config.dry_run:  # only its size matters
        return load_retriever(config.retrieved_dir, data.num_items)
    others = fold_of != fold
    if not others.any() or others.all():
        raise UserError(f"--folds {config.folds}: there are only {data.num_users} users")
    steps = max(1, round(cast(int, settings.max_steps) * others.mean()))  # as many passes
    path = config.retrieved_dir / FOLDS / f"{fold + 1}_of_{config.folds}"
    settings = replace(
        settings,
        export_root=str(path),
        max_steps=steps,
        val_strategy="iteration",
        val_iterations=steps,  # one validation, at the end
        use_wandb=False,
        use_tensorboard=False,
        overwrite=False,
    )
    inputs = [np.packbits(others).tobytes()]
    if augmented:
        augmented = augmented.of_users(others)
        inputs.append(augmented.fingerprint().encode())
    # Devices differ only by rounding, so retrievers trained on another device are kept.
    fingerprint = run_fingerprint(settings, {}, data, *inputs, exclude=("device",))
    run = RunFolder(path, (WEIGHTS,), fingerprint)
    # The caller's random state must not depend on whether a retriever is trained or found.
    with locked(run), torch.random.fork_rng():
        if not run.holds_this() or run.is_interrupted():
            print(f"retriever without fold {fold + 1} of {config.folds} of the users, in {path}")
            settings = replace(settings, resume=run.holds_this())
            encoder = find_encoder(settings)
            trainer, _ = set_up(settings, users_of(data, others), run, augmented, encoder)
            trainer.fit(settings.resume)
            close_run(run, trainer.log, {})
    return load_retriever(path, data.num_items)


def best_step(run_dir: Path, metric: str) -> int:
    """The step whose weights a finished run kept.

    Raises:
        InputError: the log is missing or damaged.
    """
    log = RunLog(run_dir / LOG)
    log.load(2**62)
    with reading(run_dir / LOG):
        return int(max(log.records, key=lambda record: record[f"val_{metric}"])["step"])


def encode(retriever: Retriever, examples: Dataset, num_workers: int) -> np.ndarray:
    """(n, D) float32 encodings of the sequences of evaluation examples."""

    def step(batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"encodings": retriever.encode(batch["sequences"]).float()}

    loader = evaluation_loader(examples, ENCODING_BATCH_SIZE, num_workers)
    return sweep(retriever, loader, step, description="encode histories")["encodings"]


def output_layer(retriever: Retriever) -> ItemScores:
    """Embeddings and bias of all items, on the host."""
    embeddings = retriever.item_embeddings.detach().float().cpu().numpy()
    bias = retriever.item_bias
    if bias is None:
        return ItemScores(embeddings, np.zeros(len(embeddings), np.float32))
    return ItemScores(embeddings, bias.detach().float().cpu().numpy())
