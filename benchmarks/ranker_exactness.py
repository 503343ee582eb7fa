r"""Agreement of the ranker's lean scoring with stock transformers, on real prompts.

Ours passes the last position through the letters' rows of the output layer, in float32. Stock
computes the logits of all positions over the vocabulary in the model's precision, with padding on
either side. Its bfloat16 logits have 8 bits of precision, so that many of the 20 are equal.
Therefore ours are also compared with stock's hidden states followed by a float32 output layer, and
stock with itself at another batch size. With a trained adapter, a last comparison shows what
merging it into the weights would change.

Example:
    python -m benchmarks.ranker_exactness --dataset_code games --prompts 200 \
        --adapter experiments/smollm2-135m/games/adapter
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from benchmarks.common import (
    DATASETS,
    Row,
    add_data_flags,
    add_device_flag,
    load_data,
    make_parser,
    report,
    run,
)
from benchmarks.language_models import (
    NUM_CANDIDATES,
    RANKER_DEFAULTS,
    Setup,
    build_prompts,
    prepare,
)
from dataloader.prompt import PromptBuilder
from dataloader.prompt_batches import pad_left
from datasets import SequenceDataset
from model.hub import SMALL_MODEL
from model.verbalizer import candidate_scores, position_ids

Batch = dict[str, Tensor]
PRECISIONS = ("float32", "bfloat16")
BATCHINGS = ((1, "left"), (16, "left"), (16, "right"))  # a batch of one has no padding


def encode_prompts(
    prompts: PromptBuilder, data: SequenceDataset, num_prompts: int
) -> list[np.ndarray]:
    """Encode test prompts of random users with random candidates."""
    rng = np.random.default_rng(0)
    sequences = []
    for user in rng.permutation(data.num_users)[:num_prompts]:
        history = data.item_ids[data.offsets[user] : data.history_ends("test")[user]]
        candidates = 1 + rng.permutation(data.num_items)[:NUM_CANDIDATES]
        sequences.append(prompts.encode(history[-RANKER_DEFAULTS.llm_max_history :], candidates))
    return sequences


def pad(sequences: list[np.ndarray], pad_id: int, side: str) -> Batch:
    """Pad sequences on the left or on the right."""
    batch = pad_left(sequences, pad_id)
    if side == "left":
        return batch
    lengths = batch["attention_mask"].sum(1).tolist()
    return {
        name: torch.stack([row.roll(length) for row, length in zip(rows, lengths)])
        for name, rows in batch.items()
    }


@torch.inference_mode()
def stock_scores(model: Any, batch: Batch, letter_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Score candidates by a forward pass over all positions and the vocabulary.

    Returns:
        (B, C) logits of the letters, and (B, C) the same with a float32 output layer.
    """
    mask = batch["attention_mask"]
    output = model(**batch, position_ids=position_ids(mask), output_hidden_states=True)
    rows, last = torch.arange(len(mask), device=mask.device), mask.cumsum(1).argmax(1)
    weight = model.get_output_embeddings().weight[letter_ids].float()
    hidden = output.hidden_states[-1][rows, last].float()
    return output.logits[rows, last][:, letter_ids].float(), hidden @ weight.T


@torch.inference_mode()
def lean_scores(model: Any, batches: list[Batch], letter_ids: Tensor, title: str) -> Tensor:
    """Return the ranker's (B, C) scores."""
    scores = [candidate_scores(model, batch, letter_ids) for batch in tqdm(batches, desc=title)]
    return torch.cat(scores).cpu()


def compare(scores: Tensor, expected: Tensor) -> Row:
    """Compare (B, C) scores.

    Returns:
        ``difference``, the largest one; ``top1``, how often the best candidate is also one of the
        best in ``expected``; ``rank_correlation``, Spearman's, the mean over rows.
    """
    best = expected.gather(1, scores.argmax(1, keepdim=True))[:, 0]
    ranks = [pd.DataFrame(x.numpy()).rank(axis=1).to_numpy() for x in (scores, expected)]
    correlations = [np.corrcoef(*pair)[0, 1] for pair in zip(*ranks)]
    return {
        "difference": float((scores - expected).abs().max()),
        "top1": float((best == expected.max(1).values).float().mean()),
        "rank_correlation": round(float(np.mean(correlations)), 5),
    }


def load_model(setup: Setup, precision: str, device: torch.device, adapter: str | None) -> Any:
    """Load the model as stock transformers does, with an adapter if given."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        setup.folder, dtype=getattr(torch, precision), device_map={"": device}
    )
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def compare_model(
    setup: Setup,
    precision: str,
    sequences: list[np.ndarray],
    letter_ids: Tensor,
    adapter: str | None,
) -> Iterator[Row]:
    """Compare both ways of scoring in one precision."""
    device = letter_ids.device
    model = load_model(setup, precision, device, adapter)
    alone: Tensor | None = None  # stock's scores in batches of one
    for size, side in BATCHINGS:
        batching = {"precision": precision, "batch_size": size, "padding": side}
        title = f"{precision}, batch size {size}"
        parts = [sequences[i : i + size] for i in range(0, len(sequences), size)]
        batches = [send_to_device(pad(part, setup.eos_id, side), device) for part in parts]
        lean = lean_scores(model, batches, letter_ids, f"{title}, ours")
        results = [
            stock_scores(model, batch, letter_ids)
            for batch in tqdm(batches, desc=f"{title}, stock")
        ]
        stock, precise = (torch.cat(tensors).cpu() for tensors in zip(*results))
        pairs = {("lean", "stock"): (lean, stock)}
        if precision == "bfloat16":
            pairs["lean, rounded", "stock"] = (lean.bfloat16().float(), stock)
        pairs["lean", "stock, float32 output"] = (lean, precise)
        if alone is None:
            alone = stock
        else:
            pairs["stock", "stock, batch size 1"] = (stock, alone)
        if adapter and (size, side) == BATCHINGS[-1]:
            model.merge_adapter()
            merged = lean_scores(model, batches, letter_ids, f"{title}, merged")
            pairs["lean, adapter merged", "lean"] = (merged, lean)
        for (ours, against), (scores, expected) in pairs.items():
            yield batching | {"ours": ours, "against": against} | compare(scores, expected)


def compare_all(flags: argparse.Namespace) -> Iterator[Row]:
    """Compare both ways of scoring in both precisions."""
    device = torch.device(flags.device)
    setup = prepare(SMALL_MODEL, device, flags.cache_root, None)
    data = load_data(flags.dataset_code, flags)
    prompts = build_prompts(setup, data.titles)
    sequences = encode_prompts(prompts, data, flags.prompts)
    letter_ids = torch.from_numpy(prompts.letter_ids).to(device)
    for precision in PRECISIONS:
        yield from compare_model(setup, precision, sequences, letter_ids, flags.adapter)


def main(argv: Sequence[str] | None = None) -> None:
    """Compare on the prompts that the flags select."""
    parser = make_parser(__doc__)
    parser.add_argument("--dataset_code", default="games", choices=DATASETS)
    add_data_flags(parser)
    add_device_flag(parser, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=200, help="number of prompts (default: 200)")
    parser.add_argument("--adapter", help="adapter folder of a run; the base model alone if absent")
    flags = parser.parse_args(argv)
    report("ranker_exactness", flags.device, compare_all(flags))


if __name__ == "__main__":
    run(main)
