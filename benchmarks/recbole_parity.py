"""SASRec and NARM against RecBole's, with the same weights: scores, loss and gradients.

RecBole (https://recbole.io) is an independent implementation on padded batches. Its models have no
output bias, and its NARM has a GRU without biases: ours are 0 here. The exit status is 1 if
anything differs.

Example:
    python3 -m venv .venv-recbole
    .venv-recbole/bin/pip install -r benchmarks/requirements-recbole.txt
    .venv-recbole/bin/python -m benchmarks.recbole_parity
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.model.sequential_recommender import NARM as RecBoleNARM
from recbole.model.sequential_recommender import SASRec as RecBoleSASRec
from torch import Tensor, nn

from benchmarks.common import Row, make_parser, report, synthetic_data
from dataloader.sequences import Histories
from datasets import SequenceDataset
from model.base import Retriever, RetrieverSpec
from model.losses import linear_cross_entropy
from model.narm import NARM
from model.registry import build_retriever

NUM_ITEMS, NUM_USERS, MAX_LEN, HIDDEN_UNITS, NUM_BLOCKS, NUM_HEADS = 500, 200, 20, 32, 2, 2
MODELS = {"SASRec": ("sas", RecBoleSASRec), "NARM": ("narm", RecBoleNARM)}
TOLERANCE = 1e-5
SETTINGS = {
    "n_layers": NUM_BLOCKS, "n_heads": NUM_HEADS, "hidden_size": HIDDEN_UNITS,
    "inner_size": 4 * HIDDEN_UNITS, "embedding_size": HIDDEN_UNITS, "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0, "dropout_probs": [0.0, 0.0], "hidden_act": "gelu",
    "layer_norm_eps": 1e-5, "initializer_range": 0.1, "loss_type": "CE", "device": "cpu",
    "USER_ID_FIELD": "user", "ITEM_ID_FIELD": "item", "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length", "NEG_PREFIX": "neg_",
    "MAX_ITEM_LIST_LENGTH": MAX_LEN,
}  # fmt: skip
Pairs = list[tuple[Tensor, Tensor]]


class Catalogue:
    """The part of a RecBole data set that its models use."""

    def num(self, field: str) -> int:
        """Return the number of items with padding."""
        return NUM_ITEMS + 1


class Results(NamedTuple):
    """What is compared; gradients are stored in the parameters."""

    scores: Tensor
    loss: Tensor


# Weights ------------------------------------------------------------------------------------------


def tensor_pairs(ours: Retriever, theirs: nn.Module) -> Pairs:
    """Pair our parameters, or views of their parts, with RecBole's of the same meaning."""
    pairs: Pairs = [(ours.item_embeddings, theirs.item_embedding.weight)]  # type: ignore[list-item,union-attr]
    return pairs + (_narm_pairs if isinstance(ours, NARM) else _sasrec_pairs)(ours, theirs)


def _narm_pairs(ours: Any, theirs: Any) -> Pairs:
    pairs = [(getattr(ours.gru, name), other) for name, other in theirs.gru.named_parameters()]
    pairs += [
        (ours.key.weight, theirs.a_1.weight),
        (ours.query.weight, theirs.a_2.weight),
        (ours.energy.weight, theirs.v_t.weight),
    ]
    # RecBole concatenates the local encoding before the global one.
    halves = reversed(theirs.b.weight.split(HIDDEN_UNITS, 1))
    return [*pairs, *zip(ours.bilinear.weight.split(HIDDEN_UNITS, 1), halves)]


def _sasrec_pairs(ours: Any, theirs: Any) -> Pairs:
    modules = [
        (ours.position_embedding, theirs.position_embedding),
        (ours.layer_norm, theirs.LayerNorm),
    ]
    pairs: Pairs = []
    for block, layer in zip(ours.blocks, theirs.trm_encoder.layer):
        attention, other = block.attention, layer.multi_head_attention
        projections = (other.query, other.key, other.value)
        for name in ("weight", "bias"):
            parts = getattr(attention.in_proj, name).split(HIDDEN_UNITS)
            pairs += zip(parts, (getattr(projection, name) for projection in projections))
        modules += [
            (attention.out_proj, other.dense),
            (attention.layer_norm, other.LayerNorm),
            (block.feed_forward.inner, layer.feed_forward.dense_1),
            (block.feed_forward.outer, layer.feed_forward.dense_2),
            (block.feed_forward.layer_norm, layer.feed_forward.LayerNorm),
        ]
    for our_module, their_module in modules:
        pairs += zip(our_module.parameters(), their_module.parameters())
    return pairs


@torch.no_grad()
def build_pair(name: str) -> tuple[Retriever, Any]:
    """Build our model and RecBole's with the same random weights."""
    torch.manual_seed(0)
    code, recbole_model = MODELS[name]
    theirs = recbole_model(SETTINGS, Catalogue())
    spec = RetrieverSpec(
        model_code=code,
        num_items=NUM_ITEMS,
        max_len=MAX_LEN,
        hidden_units=HIDDEN_UNITS,
        num_blocks=NUM_BLOCKS,
        num_heads=NUM_HEADS,
        dropout=0.0,
        attn_dropout=0.0,
    )
    ours = build_retriever(spec)
    for parameter in ours.parameters():
        parameter.zero_()
    for mine, other in tensor_pairs(ours, theirs):
        other += 0.05 * torch.randn_like(other)  # layer norms are the identity at first
        mine.copy_(other)
    return ours, theirs


# Comparison ---------------------------------------------------------------------------------------


def our_results(model: Retriever, batch: dict[str, Any]) -> Results:
    """Compute our scores and loss, with gradients."""
    sequences = batch["sequences"]
    loss = linear_cross_entropy(
        model.encode(sequences), model.item_embeddings, model.item_bias, labels=batch["targets"]
    )
    loss.backward()
    return Results(model(sequences).detach(), loss.detach())


def recbole_results(model: Any, batch: dict[str, Any], *, pad_left: bool) -> Results:
    """Compute RecBole's scores and loss, with gradients.

    Args:
        model: RecBole's model.
        batch: an evaluation batch.
        pad_left: whether to pad on the left, where RecBole's position embeddings are ours.
    """
    item_ids, positions, _, last = batch["sequences"]
    lengths = positions[last] + 1
    rows = torch.repeat_interleave(torch.arange(NUM_USERS), lengths)
    shifts = MAX_LEN - lengths if pad_left else torch.zeros_like(lengths)
    padded = torch.zeros(NUM_USERS, MAX_LEN, dtype=torch.int64)
    padded[rows, positions + shifts[rows]] = item_ids
    inputs = {"item_list": padded, "item_length": lengths + shifts}
    loss = model.calculate_loss(inputs | {"item": batch["targets"]})
    loss.backward()
    return Results(model.full_sort_predict(inputs).detach(), loss.detach())


def relative(actual: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """Return the norm of the difference over the larger of the expected norm and ``floor``."""
    return ((actual - expected).norm() / expected.norm().clamp(min=floor)).item()


@torch.no_grad()
def gradient_difference(ours: Retriever, theirs: nn.Module) -> float:
    """Return the largest relative difference of any gradient; afterwards the weights are lost."""
    for parameter in (*ours.parameters(), *theirs.parameters()):
        gradient = parameter.grad
        parameter.data = torch.zeros_like(parameter) if gradient is None else gradient
    pairs = tensor_pairs(ours, theirs)
    # The gradient of the keys' bias is zero but for rounding, so that its own norm means nothing.
    floor = 1e-3 * max(other.norm().item() for _, other in pairs)
    return max(relative(mine, other, floor) for mine, other in pairs)


def compare(name: str, data: SequenceDataset) -> Row:
    """Return the largest relative differences of scores, loss and gradients of one model."""
    ours, theirs = build_pair(name)
    batch = Histories(data, "test", MAX_LEN).__getitems__(list(range(NUM_USERS)))
    actual = our_results(ours, batch)
    expected = recbole_results(theirs, batch, pad_left=name == "SASRec")
    return {
        "model": name,
        "scores": relative(actual.scores, expected.scores),
        "loss": relative(actual.loss, expected.loss),
        "gradients": gradient_difference(ours, theirs),
    }


def within_tolerance(rows: Iterable[Row]) -> bool:
    """Whether all differences are rounding errors."""
    return all(row[key] <= TOLERANCE for row in rows for key in ("scores", "loss", "gradients"))


def main(argv: Sequence[str] | None = None) -> None:
    """Compare both models; exit with status 1 if they differ."""
    parser = make_parser(__doc__)
    parser.add_argument("--data_root", help="ignored: the data is synthetic")
    parser.parse_args(argv)
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 40, NUM_USERS))])
    items = rng.integers(1, NUM_ITEMS + 1, offsets[-1])
    data = synthetic_data(items, offsets, NUM_ITEMS)
    rows = report("recbole_parity", "cpu", (compare(name, data) for name in MODELS))
    if not within_tolerance(rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
