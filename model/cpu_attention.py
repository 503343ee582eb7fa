"""Attention of the language model on the CPU: torch's forward pass, a blockwise backward pass.

On CPUs the backward pass of torch's flash kernel takes two to three times as long as its forward
pass, and longer still with a padding mask. This one consists of a few matrix products per block of
queries. It recomputes the probabilities, so that it never holds those of more than one block
(T. Dao et al., FlashAttention, NeurIPS 2022, https://arxiv.org/abs/2205.14135, algorithm 4).
``benchmarks/ranker_train.py`` measures the gain.

In decoding, with a single query, matrix products replace torch's forward pass too.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_block_backward"
BLOCK = 128  # queries


class BlockBackward(torch.autograd.Function):
    r"""Causal self-attention over L positions with H query heads and G key heads, G dividing H.

    For one head, with queries Q, keys K and values V (L, D) and scale s::

        S = s Q K^T                       (-inf where a query does not see a key)
        P = softmax(S), by row
        O = P V

    and with dO the gradient of O, the chain rule gives::

        dV = P^T dO
        dP = dO V^T
        dS = P * (dP - rowsum(P * dP))    (Jacobian of the softmax)
           = P * (dO V^T - rowsum(dO * O))
        dQ = s dS K
        dK = s dS^T Q

    The last form of dS holds because rowsum(P * dP)_i = sum_j P_ij dO_i . V_j = dO_i . O_i. The
    output stands in for the probabilities there.

    Each row of P and dS belongs to one query, so the computation splits exactly into blocks of
    queries: a block has its own rows of dQ, and the blocks' dK and dV add up. By causality, a block
    whose last query is the l-th needs only the first l keys. The H / G query heads that share a key
    head are stacked as rows of the same product, which sums their dK and dV.
    """

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
        """Compute the output with torch's kernel.

        Args:
            ctx: context of autograd.
            module: attention layer.
            query: (B, H, L, D).
            key: (B, G, L, D).
            value: (B, G, L, D).
            mask: (B, 1, L, L), true where a query sees a key, never a later one; None for all keys
                up to the query.
            scaling: s.

        Returns:
            (B, L, H, D).
        """
        output, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=scaling)
        ctx.save_for_backward(query, key, value, mask, output)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values from dO (B, L, H, D)."""
        query, key, value, mask, output = ctx.saved_tensors
        key, value = key.contiguous(), value.contiguous()
        groups, length = key.shape[1:3]
        precise = torch.promote_types(query.dtype, torch.float32)
        # (B, G, H / G, L, .): s Q, dO and rowsum(dO * O)
        query_rows = (query * ctx.scaling).unflatten(1, (groups, -1))
        gradient_rows = gradient.transpose(1, 2).unflatten(1, (groups, -1))
        sums = (gradient.to(precise) * output.to(precise)).sum(-1, keepdim=True).to(query.dtype)
        sum_rows = sums.transpose(1, 2).unflatten(1, (groups, -1))
        if mask is None:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=key.device).tril()
        hidden = ~mask[:, :, None]

        query_gradient = torch.empty_like(query_rows)
        key_gradient = torch.zeros_like(key, dtype=precise)
        value_gradient = torch.zeros_like(value, dtype=precise)
        for first in range(0, length, BLOCK):
            last = min(first + BLOCK, length)
            q, do, row_sum = (
                rows[:, :, :, first:last].flatten(2, 3)
                for rows in (query_rows, gradient_rows, sum_rows)
            )
            k, v = key[:, :, :last], value[:, :, :last]
            p = _probabilities(q, k, hidden[..., first:last, :last])
            ds = (do @ v.transpose(2, 3)).sub_(row_sum).mul_(p)
            query_gradient[:, :, :, first:last] = (ds @ k).unflatten(2, (-1, last - first))
            key_gradient[:, :, :last] += ds.transpose(2, 3) @ q
            value_gradient[:, :, :last] += p.transpose(2, 3) @ do
        return (
            None,
            query_gradient.mul_(ctx.scaling).flatten(1, 2),
            key_gradient.to(key.dtype),
            value_gradient.to(value.dtype),
            None,
            None,
        )


def _probabilities(queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """Return P of a block of queries.

    Args:
        queries: (B, G, H / G * block, D), scaled.
        keys: (B, G, S, D).
        hidden: (B or 1, 1, 1, block, S), true where a query does not see a key.

    Returns:
        (B, G, H / G * block, S).
    """
    scores: Tensor = (queries @ keys.transpose(2, 3)).unflatten(2, (-1, hidden.shape[-2]))
    # Finite, because a query in the padding may see no key, and a row of -inf would become NaN.
    scores.masked_fill_(hidden, torch.finfo(queries.dtype).min)
    return scores.softmax(-1).flatten(2, 3)


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
    """Compute attention with ``BlockBackward`` or ``one_query_attention`` if possible.

    The signature is that of the attention functions of transformers. ``BlockBackward`` is for
    training without dropout of the probabilities and without cached keys, ``one_query_attention``
    for inference with a single query and keys in float32. Everything else uses torch's attention.

    Args:
        module: attention layer.
        query: (B, H, L, D).
        key: (B, G, S, D).
        value: (B, G, S, D).
        attention_mask: (B, 1, L, S), true where a query sees a key; None for all keys up to the
            query.
        scaling: scale of the scores.
        dropout: dropout probability of the attention probabilities.
        options: further options of the model.

    Returns:
        (B, L, H, D) and None in place of the probabilities.
    """
    plain = not dropout and options.get("position_bias") is None and scaling is not None
    if torch.is_grad_enabled() and plain and query.shape[2] == key.shape[2]:
        output = BlockBackward.apply(module, query, key, value, attention_mask, scaling)
        return output, None
    if plain and query.shape[2] == 1 and key.dtype == torch.float32:
        return one_query_attention(query, key, value, attention_mask, cast(float, scaling)), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
    )


def one_query_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor:
    """Compute attention of the last position, with scores in float32.

    torch's kernel takes several times as long for the few queries that share a key head. Matrix
    products are fast if keys and values are contiguous. They are in float32, since bfloat16 would
    round the scores.

    Args:
        query: (B, H, 1, D).
        key: (B, G, S, D) float32.
        value: (B, G, S, D) in any dtype.
        mask: (B, 1, 1, S), true where the query sees a key; None if it sees all.
        scaling: scale of the scores.

    Returns:
        (B, 1, H, D) in the dtype of the query.
    """
    rows = query.to(key.dtype).mul(scaling).view(*key.shape[:2], -1, key.shape[3])
    scores = rows @ key.transpose(2, 3)  # (B, G, H / G, S)
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    output = scores.softmax(-1).to(value.dtype) @ value
    return output.to(query.dtype).flatten(1, 2)[:, None]


AttentionInterface.register(NAME, block_backward_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def speed_up_on_cpu(model: PreTrainedModel) -> None:
    """Use ``block_backward_attention`` in a model on the CPU that uses torch's attention."""
    if model.device.type == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)
