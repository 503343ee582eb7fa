"""RMSNorm with frozen weights in few passes over memory, on the CPU.

Composed of elementary operations, a norm in bfloat16 takes about twenty passes over its input and
its gradient, most of them in float32. B. Zhang and R. Sennrich, Root Mean Square Layer
Normalization, NeurIPS 2019 (https://arxiv.org/abs/1910.07467).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class FrozenRMSNorm(torch.autograd.Function):
    """RMSNorm of rows x (N, D) with frozen weights w::

        r = 1 / sqrt(mean(x^2) + epsilon)        n = r x        y = n w

    With g the gradient of y and h = g w,

        dx = r (h - n mean(h n))
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Compute y (N, D), with r in at least float32."""
        precise = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=precise)
        r = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        n = (x * r).to(x.dtype)
        ctx.save_for_backward(n, r, weight)
        return n * weight

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        """Compute dx (N, D); the weights and epsilon get no gradient."""
        n, r, weight = ctx.saved_tensors
        h = g * weight
        mean = (h * n).sum(-1, keepdim=True, dtype=r.dtype).div_(n.shape[-1])
        return h.addcmul_(n, mean.to(n.dtype), value=-1).mul_(r.to(n.dtype)), None, None


def _forward(module: Any, x: Tensor) -> Tensor:
    if module.weight.requires_grad:
        stock: Tensor = type(module).forward(module, x)
        return stock
    y: Tensor = FrozenRMSNorm.apply(x, module.weight, module.variance_epsilon)
    return y


def speed_up_norms(model: PreTrainedModel) -> None:
    """Use ``FrozenRMSNorm`` in the norms of a Llama on the CPU while their weights are frozen."""
    if model.device.type != "cpu":
        return
    module: nn.Module
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = partial(_forward, module)
