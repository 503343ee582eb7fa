"""Speed of the retrievers: jagged batches against plain padded ones, in training and evaluation.

Both alternate in one process, with the same windows, weights and settings. A training step is
batch assembly, forward and backward pass, gradient clipping and the optimizer. Evaluation ranks the
whole catalogue for one batch of users and takes 20 candidates. Times are medians.

Example:
    python -m benchmarks.retriever_speed --data_root data --datasets games --models lru sas
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.optim import AdamW

from benchmarks import padded
from benchmarks.common import (
    DATASETS,
    Row,
    add_data_flags,
    alternating_medians,
    load_data,
    make_parser,
    report,
    run,
    update,
    use_stock_modules,
)
from config import MODEL_CODES, RetrieverConfig, retriever_preset
from dataloader.sequences import Histories, MaskedWindows, TrainingWindows
from datasets import SequenceDataset
from evaluation.retrieval import score_catalogue, target_ranks
from model.base import Retriever, RetrieverSpec
from model.losses import catalogue_loss, linear_cross_entropy
from model.registry import build_retriever
from trainer.optimization import build_optimizer

CPU = torch.device("cpu")
ADAMW: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
EPSILON = 1e-9
NUM_CANDIDATES = 20


def time_training(
    config: RetrieverConfig,
    windows: TrainingWindows | MaskedWindows,
    plain_model: Retriever,
    model: Retriever,
    batches: list[list[int]],
) -> list[float]:
    """Median seconds of a training step, plain and ours.

    Args:
        config: settings of the training.
        windows: training examples.
        plain_model: the model that the plain implementation trains.
        model: the model that ours trains.
        batches: numbers of the examples of each step; the first step is the warm-up.
    """
    lists = [windows.item_ids[a:b].tolist() for a, b in zip(windows.starts, windows.ends)]
    precision = getattr(torch, config.loss_precision)
    cross_entropy = partial(linear_cross_entropy, precision=precision)
    plain_optimizer = AdamW(plain_model.parameters(), eps=EPSILON, **ADAMW)
    optimizer = build_optimizer(model, "AdamW", epsilon=EPSILON, paged=False, **ADAMW)

    def plain_step(index: int) -> None:
        chosen = [lists[number] for number in batches[index]]
        if config.model_code == "bert":
            loss = padded.masked_loss(plain_model, chosen, config.max_len, config.mask_prob)
        else:
            loss = padded.next_item_loss(plain_model, chosen, config.max_len)
        loss.backward()
        update(plain_model, plain_optimizer, config.max_grad_norm)

    def our_step(index: int) -> None:
        (batch,) = windows.__getitems__(batches[index])
        catalogue_loss(model, batch, cross_entropy).backward()
        update(model, optimizer, config.max_grad_norm)

    return alternating_medians([plain_step, our_step], len(batches) - 1, CPU)


def training_windows(
    data: SequenceDataset, config: RetrieverConfig
) -> TrainingWindows | MaskedWindows:
    """Return the training examples of the model."""
    if config.model_code == "bert":
        return MaskedWindows(data, config.max_len, 1.0, config.mask_prob, 0)
    return TrainingWindows(data, config.max_len, 1.0)


def time_evaluation(
    data: SequenceDataset, plain_model: Retriever, model: Retriever, batches: list[list[int]]
) -> list[float]:
    """Median seconds of an evaluation batch, plain and ours; ``batches`` holds users."""
    plain_model.eval()
    model.eval()
    max_len = model.spec.max_len
    lists, targets = padded.histories(data, "test"), data.targets("test").tolist()
    histories = Histories(data, "test", max_len, model.spec.mask_token)

    def plain_evaluation(index: int) -> None:
        users = batches[index]
        padded.evaluate(
            plain_model, [lists[u] for u in users], [targets[u] for u in users], max_len
        )

    @torch.inference_mode()
    def our_evaluation(index: int) -> None:
        batch = histories.__getitems__(batches[index])
        scores = score_catalogue(model, batch, mask_history=True)
        torch.topk(scores[:, 1:], NUM_CANDIDATES)
        target_ranks(scores, batch["targets"])

    return alternating_medians([plain_evaluation, our_evaluation], len(batches) - 1, CPU)


def measure(data: SequenceDataset, config: RetrieverConfig, rounds: int) -> Row:
    """Times and ratios of one model on one data set."""
    torch.manual_seed(0)
    spec = RetrieverSpec.from_settings(config.as_dict() | {"num_items": data.num_items})
    model, plain_model = build_retriever(spec), build_retriever(spec)
    plain_model.load_state_dict(model.state_dict())
    use_stock_modules(plain_model)
    rng = np.random.default_rng(0)

    def draw(high: int) -> list[list[int]]:
        size = config.train_batch_size
        return [rng.integers(high, size=size).tolist() for _ in range(rounds + 1)]

    windows = training_windows(data, config)
    plain_step, step = time_training(config, windows, plain_model, model, draw(len(windows)))
    plain_eval, evaluation = time_evaluation(data, plain_model, model, draw(data.num_users))
    return {
        "dataset": data.code,
        "model": config.model_code,
        "threads": torch.get_num_threads(),
        "plain_step_ms": round(1e3 * plain_step, 2),
        "step_ms": round(1e3 * step, 2),
        "step_ratio": round(plain_step / step, 2),
        "plain_eval_ms": round(1e3 * plain_eval, 2),
        "eval_ms": round(1e3 * evaluation, 2),
        "eval_ratio": round(plain_eval / evaluation, 2),
    }


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure each data set, model and number of threads."""
    for code in flags.datasets:
        data = load_data(code, flags)
        for model_code in flags.models:
            chosen = {"dataset_code": code, "model_code": model_code, "preset": flags.preset}
            config = RetrieverConfig(
                **retriever_preset(chosen), **chosen, loss_precision=flags.loss_precision
            )
            for threads in flags.threads:
                torch.set_num_threads(threads)
                yield measure(data, config, flags.rounds)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    add_data_flags(parser)
    parser.add_argument(
        "--datasets", nargs="+", default=["ml-100k", "beauty", "games"], choices=DATASETS
    )
    parser.add_argument("--models", nargs="+", default=list(MODEL_CODES), choices=MODEL_CODES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20, help="measured batches (default: 20)")
    parser.add_argument(
        "--preset", default="paper", choices=("paper", "tuned"), help="recipe of the model"
    )
    parser.add_argument("--loss_precision", default="float32", choices=("float32", "bfloat16"))
    flags = parser.parse_args(argv)
    report(
        "retriever_speed",
        "cpu",
        measure_all(flags),
        preset=flags.preset,
        loss_precision=flags.loss_precision,
    )


if __name__ == "__main__":
    run(main)
