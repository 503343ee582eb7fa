"""Training steps and evaluation of the retrievers: jagged batches against plain padded ones.

Both run in turn in one process, on the same windows, weights and settings; a step is batch
assembly, forward, backward, clipping and the optimizer. Ratios of medians; the last line is one
JSON object.

Example:
    python benchmarks/retriever_speed.py --data_root data --datasets games --models lru sas
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from torch import nn

from benchmarks import padded
from config import MODEL_CODES, RetrieverConfig, retriever_preset
from dataloader.retriever import Histories, MaskedWindows, TrainingWindows
from datasets import SequenceDataset, load_dataset
from datasets.base import Filters
from model.layers import Dropout
from model.losses import linear_cross_entropy
from model.retriever import build_retriever
from trainer.loop import build_optimizer
from trainer.retriever import answer_ranks, catalogue_loss, score_histories


def interleaved(plain: Callable[[], None], ours: Callable[[], None], rounds: int) -> list[float]:
    """Median seconds of both, each called once unmeasured and then in turn."""
    seconds: list[list[float]] = [[], []]
    for turn in range(rounds + 1):
        for times, call in zip(seconds, (plain, ours)):
            started = time.perf_counter()
            call()
            if turn:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in seconds]


def measure(
    data: SequenceDataset, config: RetrieverConfig, device: torch.device, rounds: int
) -> dict:
    """Times and ratios for one model on one data set."""
    torch.manual_seed(0)
    code, max_len, size = config.model_code, config.max_len, config.train_batch_size

    def build() -> nn.Module:
        return build_retriever(
            code,
            num_items=data.num_items,
            max_len=max_len,
            hidden_dim=config.hidden_units,
            num_blocks=config.num_blocks,
            num_heads=config.num_heads,
            dropout=config.dropout,
            attn_dropout=config.attn_dropout,
        ).to(device)

    loss = partial(linear_cross_entropy, precision=getattr(torch, config.loss_precision))
    adam = {"lr": 1e-3, "weight_decay": 0.01}
    plain_model = build()
    for module in plain_model.modules():
        if isinstance(module, Dropout):
            module.__class__ = nn.Dropout  # the plain way drops out as torch does
    plain_optimizer = torch.optim.AdamW(plain_model.parameters(), eps=1e-9, **adam)
    model = build()
    optimizer = build_optimizer(model, "AdamW", epsilon=1e-9, paged=False, **adam)
    windows = TrainingWindows(data, max_len, 1.0)
    if code == "bert":
        windows = MaskedWindows(data, max_len, 1.0, config.mask_prob, 0)
    lists = [data.item_ids[a:b].tolist() for a, b in zip(windows.starts, windows.ends)]
    rng = np.random.default_rng(0)
    batches = [rng.integers(len(windows), size=size).tolist() for _ in range(2 * rounds + 2)]
    turns = {"plain": iter(batches), "ours": iter(batches)}

    def step(network: nn.Module, update: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        update.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        update.step()

    def plain_step() -> None:
        chosen = [lists[i] for i in next(turns["plain"])]
        if code == "bert":
            loss = padded.masked_loss(plain_model, chosen, max_len, config.mask_prob)
        else:
            loss = padded.next_item_loss(plain_model, chosen, max_len)
        step(plain_model, plain_optimizer, loss)

    def our_step() -> None:
        (batch,) = windows.__getitems__(next(turns["ours"]))
        step(model, optimizer, catalogue_loss(model, batch, loss))

    plain_s, ours_s = interleaved(plain_step, our_step, rounds)

    plain_model.eval()
    model.eval()
    histories = padded.sequences(data, "test")
    answers = data.answers("test").tolist()
    mask_token = data.num_items + 1 if code == "bert" else None
    evaluation = Histories(data, "test", max_len, mask_token)
    users = [rng.integers(data.num_users, size=size).tolist() for _ in range(2 * rounds + 2)]
    turns = {"plain": iter(users), "ours": iter(users)}

    def plain_evaluation() -> None:
        chosen = next(turns["plain"])
        padded.evaluate(
            plain_model,
            [histories[u] for u in chosen],
            [answers[u] for u in chosen],
            max_len,
            code != "bert",
        )

    @torch.inference_mode()
    def our_evaluation() -> None:
        batch = evaluation.__getitems__(next(turns["ours"]))
        scores = score_histories(model, batch, mask_history=True)
        torch.topk(scores[:, 1:], 20)
        answer_ranks(scores, batch["answers"])

    plain_eval_s, ours_eval_s = interleaved(plain_evaluation, our_evaluation, rounds)
    return {
        "dataset": data.code,
        "model": code,
        "threads": torch.get_num_threads(),
        "plain_step_ms": round(1e3 * plain_s, 2),
        "step_ms": round(1e3 * ours_s, 2),
        "step_ratio": round(plain_s / ours_s, 2),
        "plain_eval_ms": round(1e3 * plain_eval_s, 2),
        "eval_ms": round(1e3 * ours_eval_s, 2),
        "eval_ratio": round(plain_eval_s / ours_eval_s, 2),
    }


def main() -> None:
    """Measure what the flags name and print a line each, then all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--cache_root", default="data/cache")
    parser.add_argument("--datasets", nargs="+", default=["ml-100k", "beauty", "games"])
    parser.add_argument("--models", nargs="+", default=list(MODEL_CODES), choices=MODEL_CODES)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--preset", default="paper", choices=("paper", "tuned"), help="sizes")
    parser.add_argument("--loss_precision", default="float32", choices=("float32", "bfloat16"))
    flags = parser.parse_args()
    rows = []
    for code in flags.datasets:
        data = load_dataset(
            code, data_root=flags.data_root, cache_root=flags.cache_root, filters=Filters()
        )
        for model_code in flags.models:
            for threads in flags.threads:
                torch.set_num_threads(threads)
                given = {"dataset_code": code, "model_code": model_code, "preset": flags.preset}
                config = RetrieverConfig(
                    **retriever_preset(given), **given, loss_precision=flags.loss_precision
                )
                rows.append(measure(data, config, torch.device("cpu"), flags.rounds))
                print(rows[-1], file=sys.stderr)
    about = {"benchmark": "retriever_speed", "device": "cpu", "preset": flags.preset}
    print(json.dumps(about | {"loss_precision": flags.loss_precision, "rows": rows}))


if __name__ == "__main__":
    main()
