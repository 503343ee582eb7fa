"""Our SASRec and NARM against RecBole's, layer by layer the same weights: scores and gradients.

RecBole (https://recbole.io) is an independent implementation on padded batches. Its models have no
output bias and NARM's GRU has no biases: ours are 0 here. Exits with status 1 on a difference.

Example:
    python3 -m venv .venv-recbole
    .venv-recbole/bin/pip install -r benchmarks/requirements-recbole.txt
    .venv-recbole/bin/python benchmarks/recbole_parity.py
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from recbole.model.sequential_recommender import NARM as RecBoleNARM
from recbole.model.sequential_recommender import SASRec as RecBoleSASRec
from torch import Tensor, nn

from dataloader.retriever import Histories
from datasets.base import SequenceDataset
from model.losses import linear_cross_entropy
from model.narm import NARM
from model.transformer import TransformerRec

NUM_ITEMS, NUM_USERS, MAX_LEN, DIM, BLOCKS, HEADS = 500, 200, 20, 32, 2, 2
TOLERANCE = 1e-5
SETTINGS = {
    "n_layers": BLOCKS, "n_heads": HEADS, "hidden_size": DIM, "inner_size": 4 * DIM,
    "embedding_size": DIM, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0,
    "dropout_probs": [0.0, 0.0], "hidden_act": "gelu", "layer_norm_eps": 1e-5,
    "initializer_range": 0.1, "loss_type": "CE", "device": "cpu", "USER_ID_FIELD": "user",
    "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list", "ITEM_LIST_LENGTH_FIELD": "item_length",
    "NEG_PREFIX": "neg_", "MAX_ITEM_LIST_LENGTH": MAX_LEN,
}  # fmt: skip


class Catalogue:
    """What RecBole's models ask of a data set."""

    def num(self, field: str) -> int:
        """Number of items with padding."""
        return NUM_ITEMS + 1


def tensor_pairs(ours: nn.Module, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(our part, their parameter) that mean the same, ours as views that can be written to."""
    pairs = [(ours.embedding.weight, theirs.item_embedding.weight)]
    if isinstance(ours, NARM):
        pairs += [(getattr(ours.gru, n), p) for n, p in theirs.gru.named_parameters()]
        pairs += [
            (ours.key.weight, theirs.a_1.weight),
            (ours.query.weight, theirs.a_2.weight),
            (ours.energy.weight, theirs.v_t.weight),
        ]
        # Their global and local encodings stand the other way round.
        pairs += zip(ours.bilinear.weight.split(DIM, 1), reversed(theirs.b.weight.split(DIM, 1)))
        return pairs

    def both(our_module: nn.Module, their_module: nn.Module) -> None:
        pairs.extend(zip(our_module.parameters(), their_module.parameters()))

    both(ours.position_embedding, theirs.position_embedding)
    both(ours.layer_norm, theirs.LayerNorm)
    for block, layer in zip(ours.blocks, theirs.trm_encoder.layer):
        attention, other = block.attention, layer.multi_head_attention
        maps = (other.query, other.key, other.value)
        pairs.extend(zip(attention.in_proj.weight.split(DIM), (m.weight for m in maps)))
        pairs.extend(zip(attention.in_proj.bias.split(DIM), (m.bias for m in maps)))
        both(attention.out_proj, other.dense)
        both(attention.layer_norm, other.LayerNorm)
        both(block.feed_forward.inner, layer.feed_forward.dense_1)
        both(block.feed_forward.outer, layer.feed_forward.dense_2)
        both(block.feed_forward.layer_norm, layer.feed_forward.LayerNorm)
    return pairs


def relative(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Norm of the difference as a share of the expected norm, or of ``floor`` if that is more."""
    return ((found - expected).norm() / expected.norm().clamp(min=floor)).item()


def compare(name: str, data: SequenceDataset) -> dict:
    """Largest relative differences of scores, loss and gradients for one model."""
    torch.manual_seed(0)
    if name == "SASRec":
        theirs = RecBoleSASRec(SETTINGS, Catalogue())
        ours = TransformerRec(NUM_ITEMS, DIM, BLOCKS, HEADS, 0.0, 0.0, MAX_LEN)
    else:
        theirs = RecBoleNARM(SETTINGS, Catalogue())
        ours = NARM(NUM_ITEMS, DIM, BLOCKS, 0.0, 0.0)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
        for mine, other in tensor_pairs(ours, theirs):
            other += 0.05 * torch.randn_like(other)  # layer norms begin as identities
            mine.copy_(other)

    histories = Histories(data, "test", MAX_LEN)
    batch = histories.__getitems__(list(range(NUM_USERS)))
    lengths = batch["positions"][batch["keep"]] + 1
    padded = torch.zeros(NUM_USERS, MAX_LEN, dtype=torch.int64)
    rows = torch.repeat_interleave(torch.arange(NUM_USERS), lengths)
    if name == "SASRec":  # padded on the left, where its positions are ours
        padded[rows, batch["positions"] + MAX_LEN - lengths[rows]] = batch["item_ids"]
        lengths = torch.full_like(lengths, MAX_LEN)
    else:
        padded[rows, batch["positions"]] = batch["item_ids"]

    jagged = (batch["item_ids"], batch["positions"], batch["longest"], batch["keep"])
    scores = ours(*jagged)
    expected = theirs.full_sort_predict({"item_list": padded, "item_length": lengths})
    loss = ours(
        *jagged,
        lambda x, weight, bias: linear_cross_entropy(x, weight, bias, labels=batch["answers"]),
    )
    expected_loss = theirs.calculate_loss(
        {"item_list": padded, "item_length": lengths, "item": batch["answers"]}
    )
    loss.backward()
    expected_loss.backward()
    for parameter in (*ours.parameters(), *theirs.parameters()):
        parameter.data = (
            torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        )  # the pairs then pair gradients
    with torch.no_grad():
        pairs = tensor_pairs(ours, theirs)
        # The gradient of a key's bias is 0 but for rounding: no share can be taken of it.
        floor = 1e-3 * max(other.norm().item() for _, other in pairs)
        gradients = [relative(mine, other, floor) for mine, other in pairs]
    return {
        "model": name,
        "scores": relative(scores, expected),
        "loss": relative(loss.detach(), expected_loss.detach()),
        "gradients": max(gradients),
    }


def main() -> None:
    """Compare both models and print the differences as JSON."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 40, NUM_USERS))])
    data = SequenceDataset(
        code="synthetic",
        item_ids=rng.integers(1, NUM_ITEMS + 1, offsets[-1]).astype(np.int32),
        offsets=offsets,
        titles=[""] * (NUM_ITEMS + 1),
        user_names=[],
        item_names=[],
        fingerprint="",
    )
    rows = [compare(name, data) for name in ("SASRec", "NARM")]
    print(json.dumps({"benchmark": "recbole_parity", "device": "cpu", "rows": rows}))
    if max(value for row in rows for value in row.values() if isinstance(value, float)) > TOLERANCE:
        sys.exit(1)


if __name__ == "__main__":
    main()
