"""Frozen weights split among processes, for language models that do not fit on one GPU.

Fully sharded data parallelism (Y. Zhao et al., PyTorch FSDP, VLDB 2023,
https://arxiv.org/abs/2304.11277), as torch's ``fully_shard`` does it: each of n processes keeps 1/n
of the frozen weights of a layer, and all gather the rest while the layer computes, forward and
backward. Adapters, embeddings and the output layer stay whole, so gradients are exchanged as
without sharding. All processes must pass through the layers equally often: ``distributed.repeats``.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distributed
from errors import ArgumentError
from model.language_model import base_causal_lm, quantized_layers


def shard_weights(model: PeftModel, device: torch.device) -> None:
    """Split the frozen weights of the layers, and move everything else to a device.

    Args:
        model: causal language model with adapters, on the host.
        device: this process's device.

    Raises:
        ArgumentError: the model's layers cannot be found.
    """
    decoder: Any = base_causal_lm(model).base_model
    if not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ArgumentError("shard_weights", "true", f"{type(decoder).__name__} has no layers")
    for _, _, layer in quantized_layers(model):
        _use_plain_weight(layer, device)
    mesh = init_device_mesh(device.type, (distributed.size(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh, ignored_params=trained)
    # With a common root, the next layer's weights are gathered while a layer computes.
    whole = set(decoder.parameters()) - set(decoder.layers.parameters())
    fully_shard(decoder, mesh=mesh, ignored_params=trained | whole)
    model.to(device)


def _use_plain_weight(layer: Any, device: torch.device) -> None:
    """Store the numbers of a layer in NF4 as a plain parameter, and their scales on the layer.

    ``fully_shard`` cannot split the parameter class of bitsandbytes, which holds the scales. For
    each product, the layer builds such a parameter from the two.
    """
    layer.quant_state = layer.weight.quant_state
    layer.quant_state.to(device)
    numbers = layer.weight.data.as_subclass(torch.Tensor)
    layer.weight = nn.Parameter(numbers, requires_grad=False)
