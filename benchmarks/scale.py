"""Cost of a retriever's step by catalogue size, sequence length and number of users.

Each row is measured in its own process, on synthetic data with LRURec in the paper's size and 64
sequences per step. Stages: ``catalogue`` and ``catalogue, sampled`` train on the whole catalogue
and on 1,024 negatives, for several catalogue sizes; ``evaluation`` ranks the whole catalogue for 64
users; ``length`` and ``users`` train on longer sequences and on more users; ``candidates, items``
and ``candidates, users`` find the candidates of 1,000 users in several catalogues, and of several
numbers of users among 1,000 items. ``seconds`` are those of a step, or of 1,000 users' candidates.
``peak_mib`` is the peak memory of the process beyond what it used before the model was built; for
candidates, without the peak of initializing the model. ``scores_mib`` is what the scores of all
positions of a step would take (N x V floats), and ``result_mib`` what the candidates take. On the
CPU, weights, gradients and optimizer state grow with V x D, as they must. The slopes of each stage
follow on stderr, on logarithmic scales.

Example:
    python -m benchmarks.scale --device cpu
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch.optim import Optimizer

from benchmarks.common import (
    Row,
    add_device_flag,
    alternating_medians,
    make_parser,
    print_slopes,
    report,
    run,
    seconds,
    synthetic_data,
    update,
)
from benchmarks.memory import in_own_process, peak_mib, reset_peak, rss_mib
from config import RetrieverConfig
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories, TrainingWindows
from datasets import SequenceDataset
from evaluation.retrieval import retrieve, score_catalogue, target_ranks
from model.base import Retriever, RetrieverSpec
from model.losses import CatalogueLoss, SampledCrossEntropy, catalogue_loss, linear_cross_entropy
from model.registry import build_retriever
from trainer.optimization import build_optimizer

BATCH_SIZE = 64
NUM_NEGATIVES = 1024
NUM_CANDIDATES = 20
MAX_GRAD_NORM = 5.0
CATALOGUE_STAGES = ("catalogue", "catalogue, sampled", "evaluation")
CANDIDATE_STAGES = ("candidates, items", "candidates, users")
STAGES = (*CATALOGUE_STAGES, "length", "users", *CANDIDATE_STAGES)
CATALOGUES = (1_000, 10_000, 100_000, 1_000_000)
CANDIDATE_USERS = (10_000, 100_000, 1_000_000)
LENGTHS = (10, 30, 100, 300, 1_000)
USERS = (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
Step = Callable[[int], None]


class Case(NamedTuple):
    """What one row measures.

    Attributes:
        stage: see the module's docstring.
        size: the size that the stage varies.
        num_items: V, size of the catalogue.
        length: items that the model reads of each user.
        num_users: number of users.
    """

    stage: str
    size: int
    num_items: int
    length: int
    num_users: int


def cases(largest: int) -> list[Case]:
    """List all rows with catalogues and numbers of users up to ``largest``."""
    catalogues = [size for size in CATALOGUES if size <= largest]
    users = [size for size in USERS if size <= largest]
    return [
        *(Case(stage, n, n, 10, 10_000) for stage in CATALOGUE_STAGES for n in catalogues),
        *(Case("length", n, 10_000, n, 1_000) for n in LENGTHS),
        *(Case("users", n, 10_000, 10, n) for n in users),
        *(Case("candidates, items", n, n, 10, 1_000) for n in catalogues),
        *(Case("candidates, users", n, 1_000, 10, n) for n in CANDIDATE_USERS if n <= largest),
    ]


def make_data(case: Case, rng: np.random.Generator) -> SequenceDataset:
    """Draw random sequences of ``length`` items and two held-out ones per user."""
    size = case.length + 2
    total = case.num_users * size
    # Popularity falls with rank, as in real catalogues.
    items = 1 + np.minimum(rng.zipf(1.3, total) - 1, case.num_items - 1).astype(np.int32)
    return synthetic_data(items, np.arange(0, total + 1, size), case.num_items)


def build_model(case: Case, device: torch.device) -> Retriever:
    """Build LRURec in the paper's size."""
    sizes = {"num_items": case.num_items, "max_len": case.length}
    spec = RetrieverSpec.from_settings(RetrieverConfig().as_dict() | sizes)
    torch.manual_seed(0)
    return build_retriever(spec).to(device)


def training_step(
    case: Case,
    data: SequenceDataset,
    model: Retriever,
    optimizer: Optimizer,
    rng: np.random.Generator,
) -> Step:
    """Return a function that takes one training step on random windows."""
    device = model.item_embeddings.device
    windows = TrainingWindows(data, case.length, 1.0)
    cross_entropy: CatalogueLoss = linear_cross_entropy
    if case.stage == "catalogue, sampled":
        cross_entropy = SampledCrossEntropy(data.training_counts(), NUM_NEGATIVES, device)
    model.train()

    def step(_: int) -> None:
        (batch,) = windows.__getitems__(rng.integers(len(windows), size=BATCH_SIZE).tolist())
        catalogue_loss(model, send_to_device(batch, device), cross_entropy).backward()
        update(model, optimizer, MAX_GRAD_NORM)

    return step


def evaluation_step(
    case: Case, data: SequenceDataset, model: Retriever, rng: np.random.Generator
) -> Step:
    """Return a function that ranks the catalogue for random users."""
    device = model.item_embeddings.device
    histories = Histories(data, "test", case.length)
    model.eval()

    @torch.inference_mode()
    def step(_: int) -> None:
        users = rng.integers(data.num_users, size=BATCH_SIZE).tolist()
        batch: dict[str, Any] = send_to_device(histories.__getitems__(users), device)
        scores = score_catalogue(model, batch, mask_history=True)
        torch.topk(scores, NUM_CANDIDATES)
        target_ranks(scores, batch["targets"])

    return step


def measure(case: Case, device: torch.device, steps: int) -> Row:
    """Seconds and memory; to be called in a process of its own."""
    rng = np.random.default_rng(0)
    data = make_data(case, rng)
    gc.collect()
    before = rss_mib()
    model = build_model(case, device)
    if case.stage in CANDIDATE_STAGES:
        return measure_candidates(case, data, model, before)
    # In evaluation as well: torch imports modules for it, which are not a cost of training steps.
    optimizer = build_optimizer(
        model, "AdamW", lr=1e-3, weight_decay=0.01, epsilon=1e-9, paged=False
    )
    positions = BATCH_SIZE * case.length
    if case.stage == "evaluation":
        positions = BATCH_SIZE
        step = evaluation_step(case, data, model, rng)
    else:
        step = training_step(case, data, model, optimizer, rng)
    (median,) = alternating_medians([step], steps, device)
    return _row(case, median, before, positions, device)


def measure_candidates(case: Case, data: SequenceDataset, model: Retriever, before: float) -> Row:
    """Find the candidates of all users once; ``before`` is the memory in MiB without the model."""
    device = model.item_embeddings.device
    loader = evaluation_loader(Histories(data, "test", case.length), BATCH_SIZE, 0)
    found = []

    def find() -> None:
        found.append(
            retrieve(
                model,
                loader,
                mask_history=True,
                num_candidates=NUM_CANDIDATES,
                description="candidates",
            )
        )

    reset_peak()
    per_thousand = seconds(find, device) / case.num_users * 1000
    result = sum(array.nbytes for array in found[0])
    row = _row(case, per_thousand, before, BATCH_SIZE, device)
    return row | {"result_mib": round(result / 2**20, 1)}


def _row(case: Case, measured: float, before: float, positions: int, device: torch.device) -> Row:
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = peak_mib() - before
    return {
        "stage": case.stage,
        "size": case.size,
        "seconds": round(measured, 5),
        "peak_mib": round(peak, 1),
        "scores_mib": round(positions * case.num_items * 4 / 2**20, 1),
    }


def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure every row in its own process."""
    device = torch.device(flags.device)
    for case in cases(flags.largest):
        if flags.stages and case.stage not in flags.stages:
            continue
        yield in_own_process(measure, case, device, flags.steps)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_root", help="ignored: the data is synthetic")
    add_device_flag(parser)
    parser.add_argument("--steps", type=int, default=5, help="steps per row (default: 5)")
    parser.add_argument(
        "--largest",
        type=int,
        default=10**6,
        help="largest catalogue and number of users (default: 1000000)",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        metavar="STAGE",
        choices=STAGES,
        help=f"only these stages ({'; '.join(STAGES)}; default: all)",
    )
    flags = parser.parse_args(argv)
    rows = report("scale", flags.device, measure_all(flags))
    for stage in STAGES:
        own = [row for row in rows if row["stage"] == stage]
        print_slopes(own, "size", ("seconds", "peak_mib"), f"{stage}: ")


if __name__ == "__main__":
    run(main)
