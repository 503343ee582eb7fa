"""Retriever models: the jagged computation against plain padded ones and the definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import padded
from dataloader.retriever import Histories, MaskedWindows, TrainingWindows
from dataloader.sampler import evaluation_loader
from datasets.base import SequenceDataset
from model import narm
from model.layers import Dropout, SelfAttention, jagged_rows
from model.lru import LRURec, by_doubling, linear_recurrence, step_by_step
from model.narm import NARM, AdditiveAttention
from model.retriever import build_retriever
from model.transformer import TransformerRec
from trainer.retriever import catalogue_loss, retrieve


@pytest.fixture(autouse=True)
def several_tiles(monkeypatch: pytest.MonkeyPatch):
    """What these tests look at would fit into one tile."""
    monkeypatch.setitem(narm.TILE_POSITIONS, "cpu", 3)


def make_data(lengths: list[int], num_items: int = 30, seed: int = 0) -> SequenceDataset:
    rng = np.random.default_rng(seed)
    return SequenceDataset(
        code="test",
        item_ids=rng.integers(1, num_items + 1, sum(lengths)).astype(np.int32),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        titles=[""] + [f"t{i}" for i in range(num_items)],
        user_names=[str(u) for u in range(len(lengths))],
        item_names=[""] + [str(i) for i in range(num_items)],
        fingerprint="",
    )


def small_model(code: str, seed: int = 0, max_len: int = 20) -> nn.Module:
    """A model without dropout, away from the small values it begins with."""
    torch.manual_seed(seed)
    model = build_retriever(
        code, num_items=30, max_len=max_len, hidden_dim=16, num_blocks=2, num_heads=2,
        dropout=0.0, attn_dropout=0.0,
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def feed_forward(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer.layer_norm(x + layer.outer(layer.activation(layer.inner(x))))


def padded_lru(model: LRURec, item_ids: torch.Tensor) -> torch.Tensor:
    """LRURec on left-padded sequences (B, L), one time step after the other."""
    x = model.layer_norm(model.embedding(item_ids))
    real = item_ids > 0
    for block in model.blocks:
        layer = block.lru
        u = torch.view_as_complex(layer.in_proj(x).unflatten(-1, (-1, 2)))
        u = u * torch.exp(layer.gamma_log)
        eigenvalues = torch.exp(torch.complex(-torch.exp(layer.nu_log), torch.exp(layer.theta_log)))
        states = [u[:, 0]]
        for t in range(1, item_ids.shape[1]):
            before = torch.where(real[:, t - 1, None], states[-1], 0)  # padding passes nothing on
            states.append(u[:, t] + eigenvalues * before)
        h = torch.view_as_real(torch.stack(states, dim=1)).flatten(-2)
        x = layer.layer_norm(x + layer.out_proj(h))
        x = feed_forward(block.feed_forward, x)
    return x @ model.embedding.weight.T + model.output_bias


def padded_transformer(model: TransformerRec, item_ids: torch.Tensor) -> torch.Tensor:
    """SASRec or BERT4Rec on left-padded sequences (B, L), attention written out."""
    real = item_ids > 0
    length = item_ids.shape[1]
    last = model.position_embedding.num_embeddings
    place = torch.where(real, torch.arange(last - length, last), 0)  # padding has the first place
    x = model.layer_norm(model.embedding(item_ids) + model.position_embedding(place))
    allowed = real[:, None, :].expand(-1, length, -1)
    if model.causal:
        allowed = allowed & torch.ones(length, length).tril().bool()
    allowed = allowed & real[:, :, None] | torch.eye(length).bool()
    for block in model.blocks:
        layer = block.attention
        heads = layer.num_heads
        q, k, v = (
            y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in layer.in_proj(x).chunk(3, dim=-1)
        )
        energy = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        weights = energy.masked_fill(~allowed[:, None], -torch.inf).softmax(-1)
        y = (weights @ v).transpose(1, 2).flatten(-2)
        x = layer.layer_norm(x + layer.out_proj(y))
        x = feed_forward(block.feed_forward, x)
    return x @ model.embedding.weight[: model.num_items + 1].T + model.output_bias


def padded_narm(model: NARM, item_ids: torch.Tensor) -> torch.Tensor:
    """NARM on left-padded sequences (B, L), each sequence and each padding on its own."""
    rows = []
    for ids in item_ids:
        scores = []
        for sequence in (*ids[ids == 0][:, None], ids[ids > 0]):
            if len(sequence) == 0:
                continue
            h = model.gru(model.embedding(sequence)[:, None])[0][:, 0]
            for t in range(len(h)):
                seen = h[: t + 1]
                energy = model.energy(torch.sigmoid(model.query(h[t]) + model.key(seen)))
                encoding = torch.cat([h[t], (energy * seen).sum(0)])
                scores.append(model.embedding.weight @ model.bilinear(encoding))
        rows.append(torch.stack(scores))
    return torch.stack(rows)


PADDED = {
    "lru": padded_lru, "sas": padded_transformer, "bert": padded_transformer, "narm": padded_narm,
}  # fmt: skip
NEXT_ITEM = ("lru", "sas", "narm")


def padded_batch(data: SequenceDataset, windows: TrainingWindows, max_len: int) -> tuple:
    """Inputs and labels (B, max_len) as the published code pads them."""
    inputs, labels = [], []
    for start, end in zip(windows.starts, windows.ends):
        window = data.item_ids[start:end].tolist()
        tokens, targets = window[:-1][-max_len:], window[-max_len:]
        inputs.append([0] * (max_len - len(tokens)) + tokens)
        labels.append([0] * (max_len - len(targets)) + targets)
    return torch.tensor(inputs), torch.tensor(labels)


def assert_same_loss_and_gradients(
    model: nn.Module, jagged: torch.Tensor, padded: torch.Tensor
) -> None:
    assert jagged.item() == pytest.approx(padded.item(), rel=1e-5)
    gradients = [
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        for loss in (jagged, padded)
    ]
    for (name, _), found, expected in zip(model.named_parameters(), *gradients):
        assert (found - expected).norm() <= 1e-5 * expected.norm() + 1e-9, name


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("code", NEXT_ITEM)
def test_jagged_equals_padded_in_loss_and_gradients(code: str, seed: int):
    rng = np.random.default_rng(seed)
    max_len = int(rng.integers(4, 20))
    data = make_data(rng.integers(3, 50, size=12).tolist(), seed=seed)
    windows = TrainingWindows(data, max_len, 1.0)
    model = small_model(code, seed)
    jagged = catalogue_loss(model, windows.__getitems__(list(range(len(windows))))[0])
    inputs, labels = padded_batch(data, windows, max_len)
    scores = PADDED[code](model, inputs)
    padded = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=0)
    assert_same_loss_and_gradients(model, jagged, padded)


@pytest.mark.parametrize("code", NEXT_ITEM)
def test_what_the_benchmark_compares_with_is_the_same_model(code: str):
    data = make_data([9, 3, 20, 5])
    windows = TrainingWindows(data, 12, 1.0)
    model = small_model(code, max_len=12)
    lists = [data.item_ids[a:b].tolist() for a, b in zip(windows.starts, windows.ends)]
    plain = padded.next_item_loss(model, lists, 12)
    ours = catalogue_loss(model, windows.__getitems__(list(range(len(windows))))[0])
    # As in published code, the plain GRU reads the padding, and the start token has its own place.
    assert plain.item() == pytest.approx(ours.item(), rel=1e-5 if code == "lru" else 0.01)


@pytest.mark.parametrize("seed", range(5))
def test_masked_batches_equal_padded(seed: int):
    rng = np.random.default_rng(seed)
    data = make_data(rng.integers(3, 50, size=12).tolist(), seed=seed)
    windows = MaskedWindows(data, 9, 1.0, 0.3, seed)
    model = small_model("bert", seed)
    (batch,) = windows.__getitems__(list(range(len(windows))))
    ends = torch.cat(
        [(batch["positions"] == 0).nonzero()[1:, 0], torch.tensor([len(batch["positions"])])]
    )
    inputs, kept, start = [], [], 0
    for row, end in enumerate(ends.tolist()):
        tokens = batch["item_ids"][start:end]
        inputs.append(torch.cat([torch.zeros(9 - len(tokens), dtype=torch.int64), tokens]))
        masked = batch["keep"][(batch["keep"] >= start) & (batch["keep"] < end)]
        assert (batch["item_ids"][masked] == 31).all() and len(masked) > 0
        kept += [(row, 9 - len(tokens) + m - start) for m in masked.tolist()]
        window = data.item_ids[windows.starts[row] : windows.ends[row]][-9:]
        places = (masked - start).numpy()
        here = (batch["keep"] >= start) & (batch["keep"] < end)
        assert batch["labels"][here].tolist() == window[places].tolist()
        start = end
    scores = padded_transformer(model, torch.stack(inputs))
    rows, columns = zip(*kept)
    padded = nn.functional.cross_entropy(scores[list(rows), list(columns)], batch["labels"])
    assert_same_loss_and_gradients(model, catalogue_loss(model, batch), padded)


def test_masks_change_from_epoch_to_epoch_and_with_nothing_else():
    data = make_data([20, 30, 40])
    first = MaskedWindows(data, 10, 1.0, 0.3, 7)
    second = MaskedWindows(data, 10, 1.0, 0.3, 7)
    numbers = list(range(len(first)))
    same = first.__getitems__(numbers)[0]["keep"].tolist()
    assert same == second.__getitems__(numbers)[0]["keep"].tolist()
    later = first.__getitems__([n + len(first) for n in numbers])[0]["keep"].tolist()
    assert same != later


@pytest.mark.parametrize("code", PADDED)
def test_evaluation_equals_padded(code: str):
    data = make_data([5, 3, 40, 12])
    model = small_model(code, max_len=10).eval()
    mask = [31] if code == "bert" else []
    for split in ("val", "test"):
        histories = Histories(data, split, 10, mask_token=31 if mask else None)
        batch = histories.__getitems__([0, 1, 2, 3])
        scores = model(batch["item_ids"], batch["positions"], batch["longest"], batch["keep"])
        for user in range(4):
            history = data.item_ids[data.offsets[user] : data.history_ends(split)[user]]
            padded = torch.tensor([0] * 10 + history.tolist() + mask)[-10:][None]
            torch.testing.assert_close(PADDED[code](model, padded)[0, -1], scores[user])
            assert batch["answers"][user] == data.answers(split)[user]
            rows = batch["history_rows"] == user
            assert batch["history_items"][rows].tolist() == history.tolist()


@pytest.mark.parametrize("code", PADDED)
def test_what_the_benchmark_compares_with_ranks_the_same(code: str):
    lengths = [5, 3, 9, 10]  # it masks no more of a history than it reads
    rng = np.random.default_rng(0)
    walks = np.concatenate([rng.permutation(30)[:length] + 1 for length in lengths])
    data = replace(make_data(lengths), item_ids=walks)
    model = small_model(code, max_len=10).eval()
    mask_token = 31 if code == "bert" else None
    loader = evaluation_loader(Histories(data, "test", 10, mask_token), 4, 0)
    ours = retrieve(model, loader, mask_history=True, num_candidates=20, description="")
    histories, answers = padded.sequences(data, "test"), data.answers("test").tolist()
    ranks, best = padded.evaluate(model, histories, answers, 10, causal=code != "bert")
    assert ranks.tolist() == ours.label_ranks.tolist()
    assert best.tolist() == ours.items.tolist()


@pytest.mark.parametrize("code", NEXT_ITEM)
def test_future_items_change_no_past_score(code: str):
    model = small_model(code).eval()
    items, positions = torch.randint(1, 31, (20,)), torch.arange(20)
    before = model(items, positions, 20)
    items[12:] = items[12:] % 30 + 1
    after = model(items, positions, 20)
    torch.testing.assert_close(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:])


def test_masked_items_do_not_leak():
    data = make_data([12, 12])
    other = make_data([12, 12])
    model = small_model("bert").eval()
    batch = MaskedWindows(data, 20, 1.0, 0.4, 0).__getitems__([0, 1])[0]
    places = np.arange(24).reshape(2, 12)[:, :10].reshape(-1)[batch["keep"].numpy()]
    other.item_ids[places] = other.item_ids[places] % 30 + 1  # the masked items, and nothing else
    changed = MaskedWindows(other, 20, 1.0, 0.4, 0).__getitems__([0, 1])[0]
    assert not torch.equal(batch["labels"], changed["labels"])
    for key in ("item_ids", "positions", "keep"):
        assert torch.equal(batch[key], changed[key])
    scores = model(batch["item_ids"], batch["positions"], batch["longest"])
    seen = torch.arange(len(scores))[~torch.isin(torch.arange(len(scores)), batch["keep"])]
    items = batch["item_ids"].clone()
    items[seen[-1]] = items[seen[-1]] % 30 + 1
    moved = model(items, batch["positions"], batch["longest"])
    second = batch["keep"] >= 10  # attention goes both ways within a sequence, and not beyond
    assert not torch.allclose(moved[batch["keep"][second]], scores[batch["keep"][second]])
    torch.testing.assert_close(moved[:10], scores[:10])


@pytest.mark.parametrize("code", PADDED)
def test_sequences_of_a_batch_do_not_meet(code: str):
    model = small_model(code).eval()
    items, positions = torch.randint(1, 31, (9,)), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
    together = model(items, positions, 5)
    torch.testing.assert_close(together[5:], model(items[5:], positions[5:], 4))


def test_recurrence_equals_step_by_step_loop():
    torch.manual_seed(0)
    lengths = [1, 2, 7, 64, 3, 33]
    positions = torch.cat([torch.arange(n) for n in lengths])
    u = torch.randn(len(positions), 5, dtype=torch.complex128, requires_grad=True)
    phase = torch.rand(5, dtype=torch.float64) * 6
    eigenvalues = torch.polar(0.8 + 0.19 * torch.rand(5, dtype=torch.float64), phase)
    eigenvalues.requires_grad_()
    states = []
    for t, position in enumerate(positions):
        states.append(u[t] + eigenvalues * states[-1] if position > 0 else u[t])
    expected = torch.stack(states)
    weight = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * weight).real.sum(), (u, eigenvalues))

    found = linear_recurrence(u, eigenvalues, positions, max(lengths))
    grads = torch.autograd.grad((found * weight).real.sum(), (u, eigenvalues))
    assert (found - expected).abs().max() < 1e-10
    for grad, expected_grad in zip(grads, expected_grads):
        assert (grad - expected_grad).abs().max() < 1e-10


@pytest.mark.parametrize("backwards", [False, True])
def test_recurrence_of_cpu_and_gpu_agree(backwards: bool):
    torch.manual_seed(3)
    lengths = [1, 5, 64, 1, 2, 33]
    positions = torch.cat([torch.arange(n) for n in lengths])
    x = torch.randn(len(positions), 5, dtype=torch.complex128)
    factors = torch.polar(0.8 + 0.19 * torch.rand(5).double(), 6 * torch.rand(5).double())
    cpu = step_by_step(x, factors, positions, backwards=backwards)
    gpu = by_doubling(x, factors, positions, max(lengths), backwards=backwards)
    torch.testing.assert_close(cpu, gpu, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(cpu, x)


def test_recurrence_gradcheck():
    torch.manual_seed(1)
    positions = torch.tensor([0, 1, 2, 0, 0, 1])
    u = torch.randn(6, 2, dtype=torch.complex128, requires_grad=True)
    eigenvalues = (0.5 * torch.randn(2, dtype=torch.complex128)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, e: linear_recurrence(u, e, positions, 3), (u, eigenvalues)
    )


def test_additive_attention_gradcheck():
    torch.manual_seed(2)
    keep = torch.tensor([0, 2, 3, 4, 7])  # in sequences of 1, 4 and 3 positions
    starts = torch.tensor([0, 1, 1, 1, 5])
    shapes = ((5, 2), (8, 2), (8, 2), (2,))
    inputs = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(lambda *x: AdditiveAttention.apply(*x, keep, starts), inputs)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_drops_the_share_and_keeps_the_mean(p: float):
    torch.manual_seed(0)
    layer = Dropout(p)
    x = torch.ones(1000, 1001, requires_grad=True)
    y = layer(x)
    kept = y != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=2e-3)
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)))
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())
    for axis in (0, 1):  # no row or column is treated unlike the others
        assert (kept.float().mean(axis) - (1 - p)).abs().max() < 0.08
    pairs = (kept[:, 1:] & kept[:, :-1]).float().mean().item()
    assert pairs == pytest.approx((1 - p) ** 2, abs=3e-3)
    assert torch.equal(layer.eval()(x), x)


def test_rows_hold_each_sequence_once_and_waste_little():
    lengths = torch.tensor([1, 200, 3, 1, 12, 13, 50, 51, 2, 199, 7])
    positions = torch.cat([torch.arange(n) for n in lengths])
    groups = jagged_rows(positions, 200, filled=True)
    assert len(groups) > 2
    held = torch.cat([rows.source for rows in groups]).sort().values
    assert torch.equal(held, (lengths.repeat_interleave(lengths) > 1).nonzero()[:, 0])
    for rows in groups:
        assert torch.equal(rows.filled.flatten().nonzero()[:, 0], rows.places.sort().values)
        assert torch.equal(rows.places % rows.length, positions[rows.source])
        per_row = rows.filled.sum(1)
        assert per_row.sum() == len(rows.source) and rows.length < 5 * per_row.min()


@pytest.mark.parametrize("causal", [True, False])
def test_attention_with_dropout_is_right_on_average(causal: bool):
    torch.manual_seed(0)
    layer = SelfAttention(8, 2, 0.0, 0.25, causal=causal)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 3)])
    (rows,) = jagged_rows(positions, 5, filled=not causal)
    qkv = torch.randn(9, 24)
    expected = layer.eval()._attend(qkv, rows)
    layer.train()
    draws = torch.stack([layer._attend(qkv, rows) for _ in range(4000)])
    assert draws.std(0).min() > 0.01
    torch.testing.assert_close(draws.mean(0), expected, rtol=0, atol=0.05)


def test_initial_eigenvalues_lie_in_the_ring():
    torch.manual_seed(0)
    for block in LRURec(10, hidden_dim=64).blocks:
        modulus = block.lru.eigenvalues().abs()
        assert modulus.min() >= 0.8 - 1e-6 and modulus.max() <= 0.99 + 1e-6
        gamma = torch.exp(block.lru.gamma_log)
        torch.testing.assert_close(gamma, torch.sqrt(1 - modulus**2), rtol=1e-4, atol=1e-5)
    weight = LRURec(1000).embedding.weight
    assert weight.abs().max() <= 0.04 and weight.std().item() == pytest.approx(0.0176, rel=0.05)


def test_windows_follow_the_published_rule():
    data = make_data([9 + 2, 10 + 2, 19 + 2, 20 + 2, 35 + 2])  # training lengths + 2
    windows = TrainingWindows(data, max_len=10, window_stride=1.0)
    lengths = (windows.ends - windows.starts).tolist()
    assert lengths == [9, 10, 19, 10, 10, 10, 10, 10]
    batch = windows.__getitems__([2])[0]  # 19 items: the last 10 are labels, no start token
    first = data.offsets[2]
    assert batch["labels"].tolist() == data.item_ids[first + 9 : first + 19].tolist()
    assert batch["item_ids"].tolist() == data.item_ids[first + 8 : first + 18].tolist()
    assert batch["positions"].tolist() == list(range(10))
    batch = windows.__getitems__([0])[0]  # 9 items: the start token and 8 of them are inputs
    assert batch["item_ids"].tolist() == [0, *data.item_ids[:8]]
    assert batch["positions"].tolist() == [0, *range(8)]
