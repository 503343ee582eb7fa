"""Attention of the language model on the CPU: torch's forward pass, a backward pass by blocks.

The backward pass of torch's flash kernel takes 2 to 3 times its forward pass on CPUs, and a mask
for padding slows it further. Here it is a few matrix products a block of queries, over the keys up
to there, from probabilities computed anew, so that it holds no more than one block of them
(T. Dao et al., FlashAttention, NeurIPS 2022, https://arxiv.org/abs/2205.14135, algorithm 4).
``benchmarks/ranker_train.py`` has the gain in training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_block_backward"
BLOCK = 128  # queries


class BlockBackward(torch.autograd.Function):
    """Causal attention of L queries to as many keys, H query heads to G key heads."""

    @staticmethod
    def forward(
        ctx: Any,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
    ) -> Tensor:
        """(B, L, H, D) from queries (B, H, L, D), keys and values (B, G, L, D).

        ``mask`` (B, 1, L, L) is true where a query sees a key, no later one; None if padding hides
        none.
        """
        output, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
        ctx.save_for_backward(query, key, value, mask, output)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        query, key, value, mask, output = ctx.saved_tensors
        key, value = key.contiguous(), value.contiguous()
        groups, length = key.shape[1:3]
        precise = torch.promote_types(query.dtype, torch.float32)
        # (B, G, H / G, L, .): query heads of one key head are rows of the same product.
        query_rows = (query * ctx.scaling).unflatten(1, (groups, -1))
        gradient_rows = gradient.transpose(1, 2).unflatten(1, (groups, -1))
        # What the softmax takes away: the sum of probabilities times their gradients.
        means = (gradient.to(precise) * output.to(precise)).sum(-1, keepdim=True).to(query.dtype)
        mean_rows = means.transpose(1, 2).unflatten(1, (groups, -1))
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=key.device).tril()
        hidden = ~mask[:, :, None]

        query_gradient = torch.empty_like(query_rows)
        key_gradient = torch.zeros_like(key, dtype=precise)
        value_gradient = torch.zeros_like(value, dtype=precise)
        for first in range(0, length, BLOCK):
            last = min(first + BLOCK, length)
            q, d, mean = (
                rows[:, :, :, first:last].flatten(2, 3)
                for rows in (query_rows, gradient_rows, mean_rows)
            )
            k, v = key[:, :, :last], value[:, :, :last]
            scores = (q @ k.transpose(2, 3)).unflatten(2, (-1, last - first))
            scores.masked_fill_(hidden[..., first:last, :last], torch.finfo(q.dtype).min)
            probabilities = scores.softmax(-1).flatten(2, 3)
            score_gradient = (d @ v.transpose(2, 3)).sub_(mean).mul_(probabilities)
            block_gradient = (score_gradient @ k).unflatten(2, (-1, last - first))
            query_gradient[:, :, :, first:last] = block_gradient
            key_gradient[:, :, :last] += score_gradient.transpose(2, 3) @ q
            value_gradient[:, :, :last] += probabilities.transpose(2, 3) @ d
        return (
            None,
            query_gradient.mul_(ctx.scaling).flatten(1, 2),
            key_gradient.to(key.dtype),
            value_gradient.to(value.dtype),
            None,
            None,
        )


def block_backward_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it; without gradients it is torch's alone.

    Args:
        module: the attention layer.
        query: (B, H, L, D).
        key: (B, G, S, D).
        value: (B, G, S, D).
        attention_mask: (B, 1, L, S) true where a query sees a key; None if causality decides.
        scaling: of the scores.
        dropout: of the probabilities.
        options: what else models may ask for, left to transformers.

    Returns:
        (B, L, H, D), and no weights.
    """
    plain = not dropout and options.get("position_bias") is None and scaling is not None
    if torch.is_grad_enabled() and plain and query.shape[2] == key.shape[2]:
        output = BlockBackward.apply(module, query, key, value, attention_mask, scaling)
        return output, None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )


AttentionInterface.register(NAME, block_backward_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def speed_up_on_cpu(model: PreTrainedModel) -> None:
    """Let a model on the CPU that uses torch's attention train with the backward pass above."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
