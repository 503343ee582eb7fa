"""Train a sequential recommender, evaluate it and write the candidates for the ranker.

Example:
    python train_retriever.py --dataset_code ml-100k
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from augmentation.merge import Interactions, load_augmented, merge
from config import RetrieverConfig, UserError, check_device, parse, retriever_preset, run_main
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters
from storage import read_json, reading
from trainer import folder

if TYPE_CHECKING:
    import numpy as np

    from trainer.search import Point

OUTPUTS = ("model.safetensors", "candidates.npz", "val_metrics.json", "test_metrics.json")


def main(argv: Sequence[str] | None = None) -> None:
    """Read the settings and the data, then train."""
    config = parse(RetrieverConfig, argv, __doc__, preset=retriever_preset)
    check_device(config.device)
    data = load_dataset(
        config.dataset_code,
        data_root=config.data_root,
        cache_root=config.cache_root,
        filters=Filters(config.min_rating, config.min_uc, config.min_sc),
        interactions=config.interactions,
        items=config.items,
    )
    print(data.summary())
    if config.num_candidates > data.num_items:
        raise UserError(
            f"--num_candidates {config.num_candidates}: {data.code} has {data.num_items} items"
        )
    augmented = load_augmented(Path(config.augmented), data) if config.augmented else None
    # A search goes on with what is there of it: its runs resume on their own.
    if not (config.search and (config.run_dir / folder.SEARCH).exists()):
        folder.check_replaceable(config.run_dir, OUTPUTS, config)
    repeated = data.num_repeated()
    if repeated and config.mask_history != "never":
        print(
            f"note: {repeated:,} of {data.num_users:,} test answers are items the user had before, "
            "which are not recommended: --mask_history never recommends them",
            file=sys.stderr,
        )
    encodings = None if config.title_encoder == "none" else title_encodings(config, data)
    with folder.locked(config.run_dir):
        if config.search:
            search(config, sys.argv[1:] if argv is None else argv)
        else:
            train(config, data, augmented, encodings)


def title_encodings(config: RetrieverConfig, data: SequenceDataset) -> np.ndarray:
    """(num_items + 1, E) what the titles mean to the encoder that the flags name."""
    from model.hub import find_model

    encoder = find_model(
        config.title_encoder, cache_root=config.cache_root, hub_cache=None, flag="--title_encoder"
    )
    from model.titles import cached_title_encodings
    from trainer.run import use_cuda

    device = "cuda" if use_cuda(config.device) else "cpu"
    return cached_title_encodings(encoder, data.titles, device, Path(config.cache_root))


def search(config: RetrieverConfig, words: Sequence[str]) -> None:
    """Train every point of the grid and keep the best, chosen on validation, as this run."""
    from torch import cuda

    from trainer import run
    from trainer.search import grid, num_cores, publish, run_points, select, table

    num_gpus = 0 if config.device == "cpu" else cuda.device_count()
    run_dir = config.run_dir
    if config.overwrite:
        folder.clear(run_dir, OUTPUTS)
    points = grid(run_dir / folder.SEARCH_RUNS, config.search_weight_decay, config.search_dropout)

    def command(point: Point) -> list[str]:
        # What comes later on a command line wins.
        fixed = {
            "search": "false",
            "resume": "true",
            "overwrite": "false",
            "dataset_code": config.dataset_code,
        }
        chosen = fixed | point.settings | {"export_root": point.folder}
        flags = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
        return [sys.executable, __file__, *words, *flags]

    run_points(points, command, config.search_jobs or num_gpus or num_cores(), num_gpus)
    best, record = select(points, config.best_metric)
    publish(best, record, run_dir, ("config.json", folder.LOG, *OUTPUTS))
    print(table(record))
    print(f"\n{config.dataset_code}, {config.model_code}, {best.name}")
    print(run.metrics_table({"test": read_json(run_dir / "test_metrics.json")}))
    print(f"\nwritten to {run_dir}")


def train(
    config: RetrieverConfig,
    data: SequenceDataset,
    augmented: Interactions | None,
    encodings: np.ndarray | None,
) -> None:
    """Train, select on validation, evaluate on the test split and write the run's files."""
    # Imported late, so that the mistakes above answer without waiting for torch.
    import torch
    from safetensors.torch import load_model, save_model

    from dataloader.candidates import FILE_NAME, Candidates, save_candidates
    from dataloader.retriever import Histories, MaskedWindows, TrainingWindows
    from dataloader.sampler import ShuffledBatches, evaluation_loader, training_loader
    from metrics import ranking_metrics
    from model.losses import SampledCrossEntropy, linear_cross_entropy
    from model.retriever import build_retriever
    from model.titles import set_item_embeddings
    from storage import atomic_path, write_json
    from trainer import run
    from trainer.average import WeightAverage
    from trainer.loop import LoopSettings, Trainer, total_steps
    from trainer.retriever import catalogue_loss, retrieve

    run_dir = config.run_dir
    inputs = [augmented.fingerprint().encode()] if augmented else []
    fingerprint = folder.fingerprint(config.as_dict(), data, *inputs)
    if config.resume and folder.is_finished(run_dir, OUTPUTS, fingerprint):
        print(f"{run_dir} is finished, there is nothing to resume")
        print(run.metrics_table({"test": read_json(run_dir / "test_metrics.json")}))
        return
    accelerator = run.make_accelerator(config.device, config.seed)
    # Written interactions are there in training alone: histories and answers stay as they are.
    training = merge(data, augmented, config.augmented_place) if augmented else data
    cut = (training, config.max_len, config.sliding_window_size)
    if config.model_code == "bert":
        windows = MaskedWindows(*cut, config.mask_prob, config.seed)
        mask_token = windows.mask_token
    else:
        windows, mask_token = TrainingWindows(*cut), None
    sampler = ShuffledBatches(len(windows), config.train_batch_size, config.seed)
    settings = LoopSettings(
        num_epochs=config.num_epochs,
        max_steps=config.max_steps,
        val_steps=config.val_iterations if config.val_strategy == "iteration" else None,
        patience=config.early_stopping_patience if config.early_stopping else None,
        best_metric=config.best_metric,
        max_grad_norm=config.max_grad_norm,
        save_seconds=config.save_seconds,
        if_nan="start anew with a lower --lr",
        if_memory="start anew with a lower --train_batch_size",
    )
    model = build_retriever(
        config.model_code,
        num_items=data.num_items,
        max_len=config.max_len,
        hidden_dim=config.hidden_units,
        num_blocks=config.num_blocks,
        num_heads=config.num_heads,
        dropout=config.dropout,
        attn_dropout=config.attn_dropout,
    )
    if encodings is not None:
        set_item_embeddings(model.embedding.weight, encodings)
    cross_entropy = linear_cross_entropy
    if config.negatives:
        cross_entropy = SampledCrossEntropy(
            training.training_counts(), config.negatives, accelerator.device
        )
    cross_entropy = partial(
        cross_entropy,
        label_smoothing=config.label_smoothing,
        precision=getattr(torch, config.loss_precision),
    )
    total = total_steps(settings, len(sampler))
    optimizer, scheduler = run.build_optimization(
        model, config, lr=config.lr, total=total, paged=False
    )
    train_loader = training_loader(windows, sampler, config.num_workers)
    loaders = {
        split: evaluation_loader(
            Histories(data, split, config.max_len, mask_token), size, config.num_workers
        )
        for split, size in (("val", config.val_batch_size), ("test", config.test_batch_size))
    }
    model, optimizer, train_loader, loaders["val"], loaders["test"] = accelerator.prepare(
        model, optimizer, train_loader, loaders["val"], loaders["test"]
    )
    details = {
        "device": str(accelerator.device),
        "num_users": data.num_users,
        "num_items": data.num_items,
        "num_interactions": len(data.item_ids),
        "total_steps": total,
        "data_fingerprint": data.fingerprint,
        "fingerprint": fingerprint,
    }
    if augmented:
        details["augmented_fingerprint"] = augmented.fingerprint()
        details["num_augmented"] = len(augmented.items)
    log = run.open_run(run_dir, config, details, OUTPUTS)
    weights = run_dir / "model.safetensors"

    def ranked(split: str, mask_history: bool, description: str) -> Candidates:
        return retrieve(
            model,
            loaders[split],
            mask_history=mask_history,
            num_candidates=config.num_candidates,
            description=description,
        )

    def validate() -> dict[str, float]:
        ranks = ranked("val", config.mask_history == "always", "validate").label_ranks
        return ranking_metrics(ranks, config.metric_ks)

    def save_best() -> None:
        with atomic_path(weights) as temporary:
            save_model(model, str(temporary))

    trainer = Trainer(
        accelerator=accelerator,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        loader=train_loader,
        sampler=sampler,
        loss=partial(catalogue_loss, cross_entropy=cross_entropy),
        validate=validate,
        save_best=save_best,
        settings=settings,
        run_dir=run_dir,
        fingerprint=fingerprint,
        log=log,
        user_names=data.user_names,
        average=WeightAverage(model, config.ema_decay) if config.ema_decay else None,
    )
    progress = trainer.fit(config.resume)

    with reading(weights, "start anew with --overwrite true"):
        load_model(model, str(weights), device=str(accelerator.device))
    model.eval()
    val_metrics = validate()
    candidates = {
        split: ranked(split, config.mask_history != "never", f"candidates, {split}")
        for split in ("val", "test")
    }
    test_metrics = ranking_metrics(candidates["test"].label_ranks, config.metric_ks)
    save_candidates(run_dir / FILE_NAME, candidates, data.fingerprint)
    write_json(run_dir / "val_metrics.json", val_metrics)
    write_json(run_dir / "test_metrics.json", test_metrics)
    run.close_run(run_dir, log, {f"test_{k}": v for k, v in test_metrics.items()})
    print(f"\n{data.code}, {config.model_code}, best of step {progress.best_step:,}")
    print(run.metrics_table({"validation": val_metrics, "test": test_metrics}))
    print(f"\nwritten to {run_dir}")


if __name__ == "__main__":
    run_main(main)
