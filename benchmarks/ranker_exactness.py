r"""Whether the ranker's lean scoring gives stock transformers' scores, on real prompts.

Ours passes the last position through the labels' rows of the output layer, in float32. Stock
computes the logits of all positions over the vocabulary, in the model's precision, with padding on
either side. In bfloat16 stock's logits have 8 bits, so that many of the 20 are equal; beside them
stands what stock's hidden states give with a float32 output layer, and how stock differs from
itself when only the batch size changes. With a trained adapter, also what adding it to the weights
would change.

Example:
    python benchmarks/ranker_exactness.py --dataset_code games --prompts 200 \
        --adapter experiments/smollm2-135m/games/adapter
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import pandas as pd
import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.language_models import prepare
from config import RankerConfig, UserError
from dataloader.prompt import PromptBuilder
from dataloader.ranker import pad_left
from datasets import load_dataset
from datasets.base import Filters
from model.hub import SMALL_MODEL
from model.verbalizer import candidate_scores, position_ids

NUM_CANDIDATES, MAX_HISTORY = 20, 20


def pad(sequences: list[np.ndarray], pad_id: int, side: str) -> dict[str, Tensor]:
    """A batch padded on one side."""
    batch = pad_left(sequences, pad_id)
    if side == "left":
        return batch
    lengths = batch["attention_mask"].sum(1)
    rolled = {name: x.clone() for name, x in batch.items()}
    for row, length in enumerate(lengths.tolist()):
        for name, x in batch.items():
            rolled[name][row] = x[row].roll(length)
    return rolled


@torch.inference_mode()
def stock(
    model: PreTrainedModel, batch: dict[str, Tensor], label_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """(B, C) labels' logits of the whole forward pass, and the same with a float32 output layer."""
    mask = batch["attention_mask"]
    output = model(**batch, position_ids=position_ids(mask), output_hidden_states=True)
    rows, last = torch.arange(len(mask)), mask.cumsum(1).argmax(1)
    weight = model.get_output_embeddings().weight[label_ids].float()
    hidden = output.hidden_states[-1][rows, last].float()
    return output.logits[rows, last][:, label_ids].float(), hidden @ weight.T


@torch.inference_mode()
def lean(
    model: PreTrainedModel, batches: list[dict[str, Tensor]], label_ids: Tensor, title: str
) -> Tensor:
    """(B, C) scores of the ranker."""
    return torch.cat(
        [candidate_scores(model, batch, label_ids) for batch in tqdm(batches, desc=title)]
    ).cpu()


def compare(found: Tensor, expected: Tensor) -> dict[str, float]:
    """Largest difference, how often the best candidate is one of the best, rank correlation."""
    best = expected.gather(1, found.argmax(1, keepdim=True))[:, 0]
    ranks = [pd.DataFrame(x.numpy()).rank(axis=1).to_numpy() for x in (found, expected)]
    correlations = [np.corrcoef(*pair)[0, 1] for pair in zip(*ranks)]
    return {
        "difference": float((found - expected).abs().max()),
        "top1": float((best == expected.max(1).values).float().mean()),
        "rank_correlation": round(float(np.mean(correlations)), 5),
    }


def main() -> None:
    """Compare both ways of scoring in both precisions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_code", default="games")
    parser.add_argument("--data_root", default="data")
    parser.add_argument("--cache_root", default="data/cache")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--adapter", help="a run's adapter folder; the plain base model if absent")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    setup = prepare(SMALL_MODEL, device, Path(arguments.cache_root), None)
    config = RankerConfig(dataset_code=arguments.dataset_code)
    data = load_dataset(
        arguments.dataset_code,
        data_root=arguments.data_root,
        cache_root=arguments.cache_root,
        filters=Filters(),
    )
    prompts = PromptBuilder(
        setup.tokenizer,
        data.titles,
        instruction=config.llm_system_template,
        input_template=config.llm_input_template,
        num_candidates=NUM_CANDIDATES,
    )
    label_ids = torch.from_numpy(prompts.label_ids).to(device)
    rng = np.random.default_rng(0)
    sequences = []
    for user in rng.permutation(data.num_users)[: arguments.prompts]:
        history = data.item_ids[data.offsets[user] : data.history_ends("test")[user]]
        candidates = 1 + rng.permutation(data.num_items)[:NUM_CANDIDATES]
        sequences.append(prompts.encode(history[-MAX_HISTORY:], candidates))

    rows = []
    for precision in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(
            setup.folder, dtype=getattr(torch, precision), device_map={"": device}
        )
        if arguments.adapter:
            model = PeftModel.from_pretrained(model, arguments.adapter)
        model.eval()
        alone: tuple[Tensor, Tensor] | None = None
        for batch_size in (1, 16):
            parts = [sequences[i : i + batch_size] for i in range(0, len(sequences), batch_size)]
            title = f"{precision}, batch size {batch_size}"
            for side in ("left", "right"):
                if batch_size == 1 and side == "right":
                    continue  # no padding
                batches = [to_device(pad(x, setup.eos_id, side), device) for x in parts]
                ours = lean(model, batches, label_ids, f"{title}, ours")
                found = [stock(model, x, label_ids) for x in tqdm(batches, desc=f"{title}, stock")]
                logits, lifted = (torch.cat(x).cpu() for x in zip(*found))
                kind = {"precision": precision, "batch_size": batch_size, "padding": side}
                rows.append(kind | {"ours": "lean", "against": "stock"} | compare(ours, logits))
                if precision == "bfloat16":
                    rounded = ours.bfloat16().float()
                    rows.append(
                        kind
                        | {"ours": "lean, rounded", "against": "stock"}
                        | compare(rounded, logits)
                    )
                rows.append(
                    kind
                    | {"ours": "lean", "against": "stock, float32 output"}
                    | compare(ours, lifted)
                )
                if alone is None:
                    alone = logits, lifted
                else:
                    rows.append(
                        kind
                        | {"ours": "stock", "against": "stock, batch size 1"}
                        | compare(logits, alone[0])
                    )
        if arguments.adapter:
            model.merge_adapter()
            merged = lean(model, batches, label_ids, f"{title}, merged")
            rows.append(
                {"precision": precision, "batch_size": batch_size, "padding": side}
                | {"ours": "lean, adapter merged", "against": "lean"}
                | compare(merged, ours)
            )
    print(json.dumps({"benchmark": "ranker_exactness", "device": device.type, "rows": rows}))


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch on a device."""
    return {name: x.to(device) for name, x in batch.items()}


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
