"""Device, optimizer and learning rate schedule."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from distributed import size
from process import use_cuda

MIN_PAGED_ELEMENTS = 100_000  # bitsandbytes does not page smaller tensors


def make_accelerator(device: str | None, seed: int) -> Accelerator:
    """Select the device and seed all random number generators.

    Args:
        device: ``cpu``, ``cuda``, or None for CUDA if available.
        seed: the seed.

    Raises:
        ArgumentError: CUDA is requested and not available.
    """
    torch.backends.cudnn.allow_tf32 = False  # only NARM's GRU would be affected
    # No accelerators besides CUDA: some cannot compute the complex recurrence of LRURec.
    accelerator = Accelerator(cpu=not use_cuda(device))
    num_gpus = torch.cuda.device_count()
    if accelerator.device.type == "cuda" and num_gpus > 1 and size() == 1:
        print(
            f"note: {num_gpus} GPUs are visible, but this run uses only the first; torchrun starts "
            "a process for each"
        )
    set_seed(seed)
    return accelerator


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float,
    weight_decay: float,
    epsilon: float,
    momentum: float = 0.0,
    paged: bool,
) -> Optimizer:
    """Build AdamW, Adam or SGD over the trainable parameters.

    Args:
        model: the model.
        name: ``AdamW``, ``Adam`` or ``SGD``.
        lr: learning rate.
        weight_decay: weight decay; biases and layer norms are exempt.
        epsilon: epsilon of the optimizer; SGD has none.
        momentum: momentum of SGD.
        paged: whether to use the paged AdamW of bitsandbytes, whose state moves to the host when
            GPU memory is full (QLoRA, section 3).
    """
    groups: dict[float, list[nn.Parameter]] = {weight_decay: [], 0.0: []}
    for parameter_name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_exempt = "bias" in parameter_name or "layer_norm" in parameter_name
            groups[0.0 if is_exempt else weight_decay].append(parameter)
    parameters = [{"params": p, "weight_decay": decay} for decay, p in groups.items() if p]
    # If all tensors are small, it would page nothing, yet synchronize with the GPU for each.
    if paged and name == "AdamW" and _largest(model.parameters()) >= MIN_PAGED_ELEMENTS:
        from bitsandbytes.optim import PagedAdamW32bit

        return PagedAdamW32bit(parameters, lr=lr, eps=epsilon)
    if name == "SGD":
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, fused=True)
    return getattr(torch.optim, name)(parameters, lr=lr, eps=epsilon, fused=True)


def _largest(parameters: Iterable[nn.Parameter]) -> int:
    """Number of elements of the largest trainable parameter."""
    return max(p.numel() for p in parameters if p.requires_grad)


def build_schedule(
    optimizer: Optimizer,
    *,
    warmup: int,
    total: int,
    decay: str | None,
    steps: tuple[int, float] | None = None,
) -> LambdaLR:
    """Build the learning rate schedule: linear warm-up, then constant or decaying.

    Args:
        optimizer: the optimizer.
        warmup: steps of the warm-up, 0 for none.
        total: step at which a decaying rate reaches 0.
        decay: ``linear``, ``cosine``, or None for a constant rate.
        steps: (n, factor) to multiply the rate by ``factor`` every n steps instead of warm-up and
            decay; or None.
    """

    def factor(step: int) -> float:
        if steps:
            return steps[1] ** (step // steps[0])
        if step < warmup:
            return step / warmup
        left = max(0.0, (total - step) / max(1, total - warmup))
        return {None: 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}[decay]

    return LambdaLR(optimizer, factor)
