"""Recall and seconds of the approximate index, beside scoring all items.

The catalogue is that of a run, or larger ones that are made from it: ``near`` draws each item's
embedding and bias around those of a random item of the run, with half their standard deviation;
``gaussian`` draws them from a normal distribution with the run's covariance, which has no clusters
to find. The encodings are those of the run's users before their test targets; histories are not
excluded. Seconds are those of 1,000 users, in batches of 64. ``encode`` precedes both searches;
``build`` is paid once. ``recall`` is the share of the 20 best items that the index finds.

Example:
    python -m benchmarks.approximate_retrieval --run experiments/lru/beauty
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import Row, add_run_flags, load_run_data, make_parser, report, run
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories
from evaluation.approximate import ItemIndex
from model.base import Retriever
from model.registry import load_retriever

BATCH_SIZE = 64
NUM_CANDIDATES = 20
NO_ITEMS = np.empty(0, dtype=np.int64)
Layer = tuple[Tensor, Tensor]  # (V + 1, D) embeddings and (V + 1,) bias


def enlarge(kind: str, layer: Layer, num_items: int, rng: np.random.Generator) -> Layer:
    """Make the output layer of a larger catalogue; see the module's docstring."""
    points = torch.cat([layer[0], layer[1][:, None]], dim=1)[1:].numpy()
    noise = rng.standard_normal((num_items + 1, points.shape[1]), dtype=np.float32)
    if kind == "near":
        drawn = points[rng.integers(len(points), size=num_items + 1)]
        drawn += 0.5 * points.std(axis=0) * noise
    else:
        root = np.linalg.cholesky(np.cov(points.T) + 1e-9 * np.eye(points.shape[1]))
        drawn = points.mean(axis=0) + noise @ root.T.astype(np.float32)
    made = torch.from_numpy(drawn)
    return made[:, :-1].contiguous(), made[:, -1].contiguous()


def search_exactly(encodings: Tensor, layer: Layer) -> np.ndarray:
    """(B, k) the best items of all."""
    scores = nn.functional.linear(encodings, *layer)
    return torch.topk(scores[:, 1:], NUM_CANDIDATES).indices.numpy() + 1


def per_thousand(
    call: Callable[[Any], Any], batches: Sequence[Any], num_users: int
) -> tuple[float, list[Any]]:
    """Seconds of 1,000 users, and what was found for each batch."""
    start = time.perf_counter()
    found = [call(batch) for batch in batches]
    return (time.perf_counter() - start) / num_users * 1000, found


def measure(kind: str, layer: Layer, batches: Sequence[Tensor], encode: float) -> Row:
    """Search a catalogue both ways."""
    num_users = sum(map(len, batches))
    exact_seconds, exact = per_thousand(
        lambda batch: search_exactly(batch, layer), batches, num_users
    )
    start = time.perf_counter()
    stand_in: Any = SimpleNamespace(item_embeddings=layer[0], item_bias=layer[1])
    index = ItemIndex(stand_in)
    build = time.perf_counter() - start
    seconds, found = per_thousand(
        lambda batch: index.search(batch.numpy(), NO_ITEMS, NO_ITEMS, NUM_CANDIDATES),
        batches,
        num_users,
    )
    hits = [  # a batch for which too few items are found is scored in full
        np.isin(ours, best).sum()
        for theirs, pair in zip(exact, found)
        for best, ours in zip(theirs, pair[0] if pair else theirs)
    ]
    return {
        "catalogue": kind,
        "items": len(layer[1]) - 1,
        "encode": round(encode, 3),
        "exact": round(exact_seconds, 3),
        "index": round(seconds, 3),
        "build": round(build, 1),
        "recall": round(float(np.mean(hits)) / NUM_CANDIDATES, 4),
    }


@torch.inference_mode()
def measure_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Measure the run's catalogue and larger ones."""
    data = load_run_data(flags)
    model: Retriever = load_retriever(Path(flags.run), data.num_items).eval()
    histories = Histories(data, "test", model.spec.max_len, model.spec.mask_token)
    histories.ends = histories.ends[: flags.users]
    loader = evaluation_loader(histories, BATCH_SIZE, 0)
    encode, batches = per_thousand(
        lambda batch: model.encode(batch["sequences"]), list(loader), len(histories)
    )
    bias = model.item_bias
    layer = model.item_embeddings, torch.zeros(data.num_items + 1) if bias is None else bias
    yield measure("of the run", layer, batches, encode)
    for num_items in flags.items:
        for kind in ("near", "gaussian"):
            rng = np.random.default_rng(0)
            yield measure(kind, enlarge(kind, layer, num_items, rng), batches, encode)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure what the flags select."""
    parser = make_parser(__doc__)
    add_run_flags(parser, "a finished run of train_retriever.py")
    parser.add_argument(
        "--items",
        type=int,
        nargs="*",
        default=(10**5, 10**6),
        help="items of larger catalogues (default: 10^5 and 10^6)",
    )
    parser.add_argument("--users", type=int, default=1024, help="users (default: 1024)")
    flags = parser.parse_args(argv)
    report("approximate_retrieval", "cpu", measure_all(flags), run=flags.run)


if __name__ == "__main__":
    run(main)
