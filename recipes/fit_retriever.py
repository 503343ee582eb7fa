"""Train a retriever, evaluate it and write its candidates."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from augmentation.merge import Interactions, merge
from config import RetrieverConfig
from dataloader.candidates import CANDIDATES_FILE, SPLITS, Candidates, save_candidates
from dataloader.sampler import ShuffledBatches, evaluation_loader
from dataloader.sequences import Histories, MaskedWindows, TrainingWindows
from datasets import SequenceDataset
from distributed import in_main_process, main_first, size
from errors import UserError, advice, flag_names
from evaluation.retrieval import retrieve
from metrics import ranking_metrics
from model.base import Retriever, RetrieverSpec
from model.hub import BaseModel
from model.losses import CatalogueLoss, SampledCrossEntropy, catalogue_loss, linear_cross_entropy
from model.registry import build_retriever
from model.titles import cached_title_encodings, init_item_embeddings_
from process import free_memory, use_cuda
from recipes.runs import FROM_SCRATCH, is_finished
from recipes.training import (
    build_trainer,
    close_run,
    loop_settings,
    metrics_table,
    open_run,
    print_metrics,
    training_bytes,
)
from storage import atomic_path, reading, write_json
from trainer.loop import Advice, LoopSettings, Metrics, Trainer
from trainer.optimization import make_accelerator
from trainer.run_folder import RunFolder

WEIGHTS = "model.safetensors"
VAL_METRICS = "val_metrics.json"
TEST_METRICS = "test_metrics.json"


def train(
    config: RetrieverConfig,
    data: SequenceDataset,
    run: RunFolder,
    augmented: Interactions | None,
    encoder: BaseModel | None,
) -> None:
    """Train, select on validation, evaluate on the test split and write the run's files.

    Args:
        config: all settings.
        data: the data set.
        run: the run's folder, reserved for this process.
        augmented: generated interactions to train on in addition, or None.
        encoder: text encoder whose title encodings initialize the item embeddings, or None.
    """
    if is_finished(run, config):
        print_metrics(run.path / TEST_METRICS, "test")
        return
    trainer, evaluator = set_up(config, data, run, augmented, encoder)
    with advice(FROM_SCRATCH):
        progress = trainer.fit(config.resume)
        load_weights(evaluator.model, run.path / WEIGHTS)
    results = evaluate(evaluator)
    write(results, data, run)
    close_run(run, trainer.log, {f"test_{name}": x for name, x in results.test_metrics.items()})
    print(f"\n{data.code}, {config.model_code}, best at step {progress.best_step:,}")
    print(metrics_table({"validation": results.val_metrics, "test": results.test_metrics}))
    print(f"\nwritten to {run.path}")


# Set up -------------------------------------------------------------------------------------------


def set_up(
    config: RetrieverConfig,
    data: SequenceDataset,
    run: RunFolder,
    augmented: Interactions | None,
    encoder: BaseModel | None,
) -> tuple[Trainer, Evaluator]:
    """Build everything that training needs, and open the run's folder; arguments as in ``train``.

    Raises:
        UserError: the model does not fit in memory.
    """
    encodings = title_encodings(config, data, encoder) if encoder else None
    accelerator = make_accelerator(config.device, config.seed)
    check_memory(config, data.num_items, accelerator.device)
    # Generated interactions are only trained on; histories and targets in evaluation are real.
    training_data = merge(data, augmented, config.augmented_place) if augmented else data
    windows = training_windows(config, training_data)
    sampler = ShuffledBatches(len(windows), config.train_batch_size, config.seed)
    settings = retriever_loop(config)
    model = build_model(config, data.num_items, encodings).to(accelerator.device)
    loss = training_loss(config, training_data, accelerator.device)
    evaluator = Evaluator(config, data, model)
    details = run_details(data, augmented) | {
        "device": str(accelerator.device),
        "num_processes": size(),
        "total_steps": settings.total_steps(len(sampler)),
    }
    trainer = build_trainer(
        config,
        run,
        open_run(run, config, details),
        accelerator=accelerator,
        model=model,
        dataset=windows,
        sampler=sampler,
        settings=settings,
        lr=config.lr,
        loss=partial(catalogue_loss, cross_entropy=loss),
        validate=evaluator.validate,
        save_best=partial(save_weights, model, run.path / WEIGHTS),
        user_names=data.user_names,
    )
    return trainer, evaluator


def check_memory(config: RetrieverConfig, num_items: int, device: torch.device) -> None:
    """Refuse a model for which there is no memory, before the system ends the run.

    Raises:
        UserError: weights, gradients and the optimizer's state exceed the free memory.
    """
    with torch.random.fork_rng(), torch.device("meta"):  # allocates nothing
        model = build_model(config, num_items, None)
    size = sum(parameter.numel() for parameter in model.parameters())
    needed = training_bytes(size, config)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
    if needed > free:
        raise UserError(
            f"--hidden_units {config.hidden_units}, --num_blocks {config.num_blocks}: training "
            f"{size:,} parameters takes {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are "
            "free: lower them"
        )


def run_details(data: SequenceDataset, augmented: Interactions | None) -> dict[str, Any]:
    """Statistics and hashes of the data, for ``config.json``."""
    details = {
        "num_users": data.num_users,
        "num_items": data.num_items,
        "num_interactions": len(data.item_ids),
        "data_code": data.code,
        "data_fingerprint": data.fingerprint,
    }
    if augmented:
        details["augmented_fingerprint"] = augmented.fingerprint()
        details["num_augmented"] = len(augmented.items)
    return details


def title_encodings(
    config: RetrieverConfig, data: SequenceDataset, encoder: BaseModel
) -> np.ndarray:
    """(V + 1, E) encodings of the titles, from the cache if possible."""
    device = "cuda" if use_cuda(config.device) else "cpu"
    with flag_names(encoder="title_encoder"), main_first():
        return cached_title_encodings(encoder, data.titles, device, Path(config.cache_root))


def training_windows(
    config: RetrieverConfig, data: SequenceDataset
) -> TrainingWindows | MaskedWindows:
    """The training examples that the model needs."""
    if config.model_code == "bert":
        return MaskedWindows(
            data, config.max_len, config.sliding_window_size, config.mask_prob, config.seed
        )
    return TrainingWindows(data, config.max_len, config.sliding_window_size)


def build_model(config: RetrieverConfig, num_items: int, encodings: np.ndarray | None) -> Retriever:
    """Build the model, its item embeddings initialized from title encodings if there are any."""
    spec = RetrieverSpec.from_settings(config.as_dict() | {"num_items": num_items})
    model = build_retriever(spec)
    if encodings is not None:
        with torch.no_grad():
            init_item_embeddings_(model.item_embeddings, encodings)
    return model


def training_loss(
    config: RetrieverConfig, data: SequenceDataset, device: torch.device
) -> CatalogueLoss:
    """The loss that the flags select."""
    loss: CatalogueLoss = linear_cross_entropy
    if config.negatives:
        loss = SampledCrossEntropy(data.training_counts(), config.negatives, device)
    return partial(
        loss,
        label_smoothing=config.label_smoothing,
        precision=getattr(torch, config.loss_precision),
    )


def retriever_loop(config: RetrieverConfig) -> LoopSettings:
    """Settings of the training loop."""
    return loop_settings(
        config,
        num_epochs=config.num_epochs,
        val_iterations=config.val_iterations,
        patience=config.early_stopping_patience,
        best_metric=config.best_metric,
        advice=Advice(
            diverged=f"{FROM_SCRATCH} and a lower --lr",
            out_of_memory=f"{FROM_SCRATCH} and a lower --train_batch_size",
            out_of_memory_in_validation="continue with --resume and a lower --val_batch_size",
        ),
    )


# Fit and evaluate ---------------------------------------------------------------------------------


class Evaluator:
    """Ranks the catalogue for the users of a split.

    Args:
        config: all settings.
        data: the data set.
        model: the retriever.
    """

    def __init__(self, config: RetrieverConfig, data: SequenceDataset, model: Retriever) -> None:
        self.config, self.model = config, model
        self.loaders: dict[str, DataLoader] = {
            split: evaluation_loader(
                Histories(data, split, config.max_len, model.spec.mask_token),
                batch_size,
                config.num_workers,
            )
            for split, batch_size in (
                ("val", config.val_batch_size),
                ("test", config.test_batch_size),
            )
        }

    def _rank(self, split: str, mask_history: bool, description: str) -> Candidates:
        return retrieve(
            self.model,
            self.loaders[split],
            mask_history=mask_history,
            num_candidates=self.config.num_candidates,
            description=description,
        )

    def validate(self) -> Metrics:
        """Metrics on the validation split."""
        ranking = self._rank("val", self.config.mask_history == "always", "validate")
        return ranking_metrics(ranking.label_ranks, self.config.metric_ks)

    def candidates(self, split: str) -> Candidates:
        """Candidates of a split, for the ranker."""
        return self._rank(split, self.config.excludes_history, f"candidates, {split}")


class Results(NamedTuple):
    """Results of a finished run.

    Attributes:
        val_metrics: metrics on the validation split.
        test_metrics: metrics on the test split.
        candidates: candidates of all users by split.
    """

    val_metrics: Metrics
    test_metrics: Metrics
    candidates: dict[str, Candidates]


def evaluate(evaluator: Evaluator) -> Results:
    """Evaluate the model on both splits."""
    val_metrics = evaluator.validate()
    candidates = {split: evaluator.candidates(split) for split in SPLITS}
    ranks = candidates["test"].label_ranks
    return Results(val_metrics, ranking_metrics(ranks, evaluator.config.metric_ks), candidates)


@in_main_process
def write(results: Results, data: SequenceDataset, run: RunFolder) -> None:
    """Write the run's files, the one that marks it as finished last."""
    save_candidates(run.path / CANDIDATES_FILE, results.candidates, data.fingerprint)
    write_json(run.path / VAL_METRICS, results.val_metrics)
    write_json(run.path / TEST_METRICS, results.test_metrics)


@in_main_process
def save_weights(model: Retriever, path: Path) -> None:
    """Write the weights, complete or not at all."""
    # Copies: cuDNN keeps the weights of a GRU in one buffer, and safetensors refuses shared memory.
    weights = {name: weight.to("cpu", copy=True) for name, weight in model.state_dict().items()}
    with atomic_path(path) as temporary:
        save_file(weights, temporary)


def load_weights(model: Retriever, path: Path) -> None:
    """Load what ``save_weights`` wrote.

    Raises:
        InputError: the file is missing or damaged.
    """
    with reading(path):
        model.load_state_dict(load_file(path))
