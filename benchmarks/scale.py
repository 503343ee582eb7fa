"""What a step of the retriever costs against catalogue size, sequence length and number of users.

A row is a process of its own on synthetic data: LRURec in the paper's size, 64 sequences a step.
``catalogue`` scores the whole catalogue in training, ``catalogue, sampled`` 1,024 negatives;
``evaluation`` ranks the whole catalogue for 64 users. ``peak_mib`` is the most memory the process
held less what it held before the model was built; ``scores_mib`` what the scores of all positions
at once would take (N x V floats). On the CPU the optimizer's state, the gradients and the weights
grow with V x D as they must.

Example:
    python benchmarks/scale.py --device cpu
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.memory import in_own_process, peak_mib, rss_mib

BATCH_SIZE = 64
CATALOGUES = (1_000, 10_000, 100_000, 1_000_000)
LENGTHS = (10, 30, 100, 300, 1_000)
USERS = (1_000, 10_000, 100_000, 1_000_000)


def measure(
    stage: str, size: int, num_items: int, length: int, num_users: int, device: str, steps: int
) -> dict:
    """One row: median seconds of a step, and memory."""
    import numpy as np
    import torch
    from accelerate.utils import send_to_device

    from dataloader.retriever import Histories, TrainingWindows
    from datasets.base import SequenceDataset
    from model.losses import SampledCrossEntropy, linear_cross_entropy
    from model.lru import LRURec
    from trainer.loop import build_optimizer
    from trainer.retriever import answer_ranks, catalogue_loss, score_histories

    rng = np.random.default_rng(0)
    total = num_users * (length + 2)
    # Popularity falls with rank, as in real catalogues.
    items = 1 + np.minimum(rng.zipf(1.3, total) - 1, num_items - 1).astype(np.int32)
    data = SequenceDataset(
        code="synthetic",
        item_ids=items,
        offsets=np.arange(0, total + 1, length + 2, dtype=np.int64),
        titles=[""] * (num_items + 1),
        user_names=[],
        item_names=[],
        fingerprint="",
    )
    gc.collect()
    before = rss_mib()
    torch.manual_seed(0)
    model = LRURec(num_items).to(device)
    windows, histories = TrainingWindows(data, length, 1.0), Histories(data, "test", length)
    cross_entropy = linear_cross_entropy
    if stage == "catalogue, sampled":
        cross_entropy = SampledCrossEntropy(data.training_counts(), 1024, device)
    optimizer = build_optimizer(
        model, "AdamW", lr=1e-3, weight_decay=0.01, epsilon=1e-9, paged=False
    )
    positions = 0

    def train() -> None:
        nonlocal positions
        (batch,) = windows.__getitems__(rng.integers(len(windows), size=BATCH_SIZE).tolist())
        positions = len(batch["labels"])
        catalogue_loss(model, send_to_device(batch, device), cross_entropy).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        optimizer.zero_grad()

    @torch.inference_mode()
    def evaluate() -> None:
        nonlocal positions
        users = rng.integers(num_users, size=BATCH_SIZE).tolist()
        batch = send_to_device(histories.__getitems__(users), device)
        positions = BATCH_SIZE
        scores = score_histories(model, batch, mask_history=True)
        torch.topk(scores, 20)
        answer_ranks(scores, batch["answers"])

    model.train(stage != "evaluation")
    step = evaluate if stage == "evaluation" else train
    seconds = []
    for _ in range(steps + 1):  # the first one warms up
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    held = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None
    return {
        "stage": stage,
        "size": size,
        "seconds": round(statistics.median(seconds[1:]), 5),
        "peak_mib": round(peak_mib() - before if held is None else held, 1),
        "scores_mib": round(positions * num_items * 4 / 2**20, 1),
    }


def main() -> None:
    """Measure every curve and print a line a row, then all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_root", help="of no use here: the data are synthetic")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--steps", type=int, default=5, help="steps a row (default: 5)")
    parser.add_argument("--largest", type=int, default=10**6, help="largest catalogue, most users")
    flags = parser.parse_args()
    catalogues = [n for n in CATALOGUES if n <= flags.largest]
    cells = [
        *((stage, n, n, 10, 10_000) for stage in ("catalogue", "catalogue, sampled", "evaluation")
          for n in catalogues),
        *(("length", n, 10_000, n, 1_000) for n in LENGTHS),
        *(("users", n, 10_000, 10, n) for n in USERS if n <= flags.largest),
    ]  # fmt: skip
    rows = []
    for cell in cells:
        rows.append(in_own_process(measure, *cell, flags.device, flags.steps))
        print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "scale", "device": flags.device, "rows": rows}))


if __name__ == "__main__":
    main()
