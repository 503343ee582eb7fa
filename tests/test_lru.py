"""LRURec: the jagged computation against a padded one and against the definition."""

import numpy as np
import pytest
import torch
from torch import nn

from dataloader.retriever import Histories, TrainingWindows
from datasets.base import SequenceDataset
from model.lru import LRURec, linear_recurrence
from trainer.retriever import next_item_loss


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


def padded_scores(model: LRURec, item_ids: torch.Tensor) -> torch.Tensor:
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
        ff = block.feed_forward
        x = ff.layer_norm(x + ff.outer(ff.activation(ff.inner(x))))
    return x @ model.embedding.weight.T + model.output_bias


def padded_batch(data: SequenceDataset, windows: TrainingWindows, max_len: int) -> tuple:
    """Inputs and labels (B, max_len) as the published code pads them."""
    inputs, labels = [], []
    for start, end in zip(windows.starts, windows.ends):
        window = data.item_ids[start:end].tolist()
        tokens, targets = window[:-1][-max_len:], window[-max_len:]
        inputs.append([0] * (max_len - len(tokens)) + tokens)
        labels.append([0] * (max_len - len(targets)) + targets)
    return torch.tensor(inputs), torch.tensor(labels)


@pytest.mark.parametrize("seed", range(5))
def test_jagged_equals_padded_in_loss_and_gradients(seed: int):
    rng = np.random.default_rng(seed)
    max_len = int(rng.integers(4, 20))
    data = make_data(rng.integers(3, 50, size=12).tolist(), seed=seed)
    windows = TrainingWindows(data, max_len, 1.0)
    torch.manual_seed(seed)
    model = LRURec(30, hidden_dim=16, dropout=0.0, attn_dropout=0.0)
    for parameter in model.parameters():  # away from the small initial values
        parameter.data += 0.1 * torch.randn_like(parameter)

    loss = next_item_loss(model, windows.__getitems__(list(range(len(windows))))[0])
    loss.backward()
    jagged = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    inputs, labels = padded_batch(data, windows, max_len)
    scores = padded_scores(model, inputs)
    plain = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=0)
    plain.backward()

    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        difference = (jagged[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-5, name


def test_evaluation_equals_padded():
    data = make_data([5, 3, 40, 12])
    torch.manual_seed(0)
    model = LRURec(30, hidden_dim=16).eval()
    for split in ("val", "test"):
        histories = Histories(data, split, max_len=10)
        batch = histories.__getitems__([0, 1, 2, 3])
        scores = model(batch["item_ids"], batch["positions"], batch["longest"], batch["keep"])
        for user in range(4):
            history = data.item_ids[data.offsets[user] : data.history_ends(split)[user]]
            padded = torch.tensor([0] * 10 + history.tolist())[-10:][None]
            torch.testing.assert_close(padded_scores(model, padded)[0, -1], scores[user])
            assert batch["answers"][user] == data.answers(split)[user]
            rows = batch["history_rows"] == user
            assert batch["history_items"][rows].tolist() == history.tolist()


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


def test_recurrence_gradcheck():
    torch.manual_seed(1)
    positions = torch.tensor([0, 1, 2, 0, 0, 1])
    u = torch.randn(6, 2, dtype=torch.complex128, requires_grad=True)
    eigenvalues = (0.5 * torch.randn(2, dtype=torch.complex128)).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda u, e: linear_recurrence(u, e, positions, 3), (u, eigenvalues)
    )


def test_future_items_change_no_past_score():
    torch.manual_seed(0)
    model = LRURec(30, hidden_dim=16).eval()
    items, positions = torch.randint(1, 31, (20,)), torch.arange(20)
    before = model(items, positions, 20)
    items[12:] = items[12:] % 30 + 1
    after = model(items, positions, 20)
    torch.testing.assert_close(before[:12], after[:12])
    assert not torch.allclose(before[12:], after[12:])


def test_sequences_of_a_batch_do_not_meet():
    torch.manual_seed(0)
    model = LRURec(30, hidden_dim=16).eval()
    items, positions = torch.randint(1, 31, (9,)), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2, 3])
    together = model(items, positions, 5)
    torch.testing.assert_close(together[5:], model(items[5:], positions[5:], 4))


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
