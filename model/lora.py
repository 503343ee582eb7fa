"""Linear layers with LoRA adapters that compute in the dtype of their input.

PEFT casts the input of each adapter to float32, the dtype of the adapter, computes in it, and adds
the result in separate passes. Next to a frozen layer in bfloat16 or NF4, this takes longer than the
layer itself. Here the adapter's weights are cast instead, while the optimizer updates them in
float32, and products are added as they are computed. ``python -m benchmarks.ranker_train`` measures
the gain.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
from peft.tuners.lora import Linear
from peft.tuners.lora.bnb import Linear4bit
from torch import Tensor, nn


class AdaptedLinear(torch.autograd.Function):
    """A frozen linear layer with weights W and bias c, and an adapter A (r, in), B (out, r).

    For rows x and d, which is x after dropout::

        u = d A^T
        y = x W^T + c + u B^T

    and with g the gradient of y::

        dx = g W        du = g B        dd = du A        dA = du^T d        dB = g^T u

    Without dropout d is x, and dd is added to dx.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, d: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor
    ) -> Tensor:
        """Compute y (N, out) from x and d (N, in)."""
        u = d @ a.T
        y = nn.functional.linear(x, weight, bias).addmm_(u, b.T)
        ctx.save_for_backward(d, u, weight, a, b)
        ctx.has_dropout = d is not x
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients of x, d, A and B."""
        d, u, weight, a, b = ctx.saved_tensors
        du = g @ b
        dx = dd = None
        if ctx.needs_input_grad[0]:
            dx = g @ weight
            if ctx.has_dropout:
                dd = du @ a
            else:
                dx.addmm_(du, a)
        return dx, dd, None, None, du.T @ d, g.T @ u


def _forward(module: Any, x: Tensor) -> Tensor:
    """Forward pass of PEFT's ``Linear`` or ``Linear4bit`` with one adapter."""
    if module.disable_adapters or module.merged:
        stock: Tensor = type(module).forward(module, x)
        return stock
    (name,) = module.active_adapters
    a = module.lora_A[name].weight.to(x.dtype)
    b = (module.lora_B[name].weight * module.scaling[name]).to(x.dtype)
    layer, d = module.get_base_layer(), module.lora_dropout[name](x)
    if type(layer) is not nn.Linear:  # quantized
        return layer(x) + nn.functional.linear(nn.functional.linear(d, a), b)
    rows = x.flatten(0, -2)
    d = rows if d is x else d.flatten(0, -2)
    y: Tensor = AdaptedLinear.apply(rows, d, layer.weight, layer.bias, a, b)
    return y.view(*x.shape[:-1], -1)


def compute_in_input_dtype(model: nn.Module) -> None:
    """Let the adapters of a model compute in the dtype of their input.

    Args:
        model: a model with adapters from PEFT.
    """
    for module in model.modules():
        if isinstance(module, (Linear, Linear4bit)):
            cast(Any, module).forward = partial(_forward, module)
