"""The linear recurrence of LRURec against a loop, its gradients, and its initial eigenvalues."""

import pytest
import torch

from model.base import RetrieverSpec
from model.lru import by_doubling, linear_recurrence, step_by_step
from model.registry import build_retriever


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def test_recurrence_equals_a_loop_in_states_and_gradients():
    torch.manual_seed(0)
    lengths = [1, 2, 7, 64, 3, 33]
    positions = positions_of(lengths)
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

    ours = linear_recurrence(u, eigenvalues, positions, max(lengths))
    grads = torch.autograd.grad((ours * weight).real.sum(), (u, eigenvalues))
    assert (ours - expected).abs().max() < 1e-10
    for grad, expected_grad in zip(grads, expected_grads):
        assert (grad - expected_grad).abs().max() < 1e-10


@pytest.mark.parametrize("backwards", [False, True])
def test_recurrences_of_cpu_and_gpu_agree(backwards: bool):
    torch.manual_seed(3)
    lengths = [1, 5, 64, 1, 2, 33]
    positions = positions_of(lengths)
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


def test_initial_eigenvalues_lie_in_the_ring():
    torch.manual_seed(0)
    spec = RetrieverSpec(
        model_code="lru", num_items=10, max_len=20, hidden_units=64, num_blocks=2, num_heads=1,
        dropout=0.0, attn_dropout=0.0,
    )  # fmt: skip
    model = build_retriever(spec)
    assert len(model.blocks) == 2
    for block in model.blocks:
        modulus = block.lru.eigenvalues().abs()
        assert modulus.shape == (128,)
        assert modulus.min() >= 0.8 - 1e-6 and modulus.max() <= 0.99 + 1e-6
        assert modulus.min() < 0.83 and modulus.max() > 0.97  # the ring is filled
        gamma = torch.exp(block.lru.gamma_log)
        torch.testing.assert_close(gamma, torch.sqrt(1 - modulus**2), rtol=1e-4, atol=1e-5)
