"""Prompts one after another in one row, without padding.

Linear layers and norms act on single tokens; only attention has to know where a prompt ends.
Padding would add to all products and, above all, require a mask, for which torch has no fast kernel
on CUDA. Here attention stays within each prompt of the row: it is computed for all prompts at once
where torch's flash attention supports this, else prompt by prompt.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from model.cpu_attention import block_backward_attention
from storage import describe

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # a prototype, which a release of torch can move or drop
    varlen_attn = None  # type: ignore[assignment]

NAME = "sdpa_within_prompts"
# Other architectures can have layers besides attention that mix the tokens of a row.
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
HALF = (torch.bfloat16, torch.float16)
PROBE_LENGTHS = (3, 70)
MAX_DIFFERENCE = 0.05  # relative; in bfloat16, a correct kernel differs by less than 0.01


class Prompts(NamedTuple):
    """Where the prompts of a row lie.

    Attributes:
        lengths: number of tokens of each of the B prompts.
        offsets: (B + 1,) int32, index of the first token of each prompt, and their total.
    """

    lengths: list[int]
    offsets: Tensor


def pack(batch: dict[str, Any]) -> dict[str, Any]:
    """Turn padded prompts into arguments of a model that packs.

    Args:
        batch: ``input_ids`` and ``attention_mask`` (B, L), padded on either side.

    Returns:
        ``input_ids`` and ``position_ids`` (1, N), ``prompts``, and an empty ``attention_mask``. It
        has four dimensions, so that transformers does not build one.
    """
    mask = batch["attention_mask"].bool()
    counts = mask.sum(1)
    return {
        "input_ids": batch["input_ids"][mask][None],
        "position_ids": (mask.cumsum(1) - 1)[mask][None],
        "attention_mask": mask.new_empty(1, 1, 0, 0),
        "prompts": Prompts(
            counts.tolist(), nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        ),
    }


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prompts: Prompts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention within each prompt of a row, or plain attention if nothing is packed.

    The signature is that of the attention functions of transformers.

    Args:
        module: attention layer.
        query: (1, H, N, D), or (B, H, L, D) if nothing is packed.
        key: (1, G, N, D), G dividing H, or (B, G, L, D).
        value: of the same shape as ``key``.
        attention_mask: as in transformers; ignored if prompts are packed.
        prompts: where the prompts lie, or None if nothing is packed.
        options: further options of the model, ``scaling`` among them.

    Returns:
        (1, N, H, D) and None in place of the probabilities.
    """
    alone = sdpa_attention_forward if query.is_cuda else block_backward_attention
    if prompts is None:
        return alone(module, query, key, value, attention_mask, **options)
    has_dropout = options.get("dropout", 0.0) > 0
    if not has_dropout and varlen_works(query.device, query.dtype, query.shape[-1]):
        repeats = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, repeats), repeat_kv(value, repeats)
        return varlen(query, key, value, prompts, options["scaling"]), None
    parts = (x.split(prompts.lengths, dim=2) for x in (query, key, value))
    outputs = [alone(module, q, k, v, None, **options)[0] for q, k, v in zip(*parts)]
    return torch.cat(outputs, dim=1), None


def varlen(query: Tensor, key: Tensor, value: Tensor, prompts: Prompts, scaling: float) -> Tensor:
    """Compute causal attention within prompts with torch's flash attention.

    Args:
        query: (1, H, N, D).
        key: (1, H, N, D).
        value: (1, H, N, D).
        prompts: where the prompts lie.
        scaling: scale of the scores.

    Returns:
        (1, N, H, D).
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, H, D)
    offsets, longest = prompts.offsets, max(prompts.lengths)
    options: dict[str, Any] = {"scale": scaling, "window_size": (-1, 0)}  # causal window
    output = varlen_attn(q, k, v, offsets, offsets, longest, longest, **options)
    return cast(Tensor, output)[None]


@cache
def varlen_works(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether ``varlen`` gives the results of torch's attention on this device.

    This is tested once, since torch calls the function a prototype and has changed its signature.
    The random state does not change.

    Args:
        device: the device.
        dtype: dtype of queries, keys and values.
        width: D.
    """
    if device.type != "cuda" or dtype not in HALF or varlen_attn is None:
        return False
    try:
        with torch.inference_mode(False), torch.enable_grad():
            difference = _difference(device, dtype, width)
        problem = "" if difference < MAX_DIFFERENCE else f"its results differ by {difference:.0%}"
    except (RuntimeError, TypeError) as error:
        problem = describe(error)
    if problem:
        print(f"note: attention runs prompt by prompt, as torch's varlen_attn fails: {problem}")
    return not problem


def _difference(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """Largest relative difference of output and gradients to attention prompt by prompt."""
    total, scaling = sum(PROBE_LENGTHS), width**-0.5
    numbers = torch.arange(3 * 2 * total * width, device=device).view(3, 1, 2, total, width)
    q, k, v = leaves = [x.to(dtype).requires_grad_() for x in (numbers.float() * 1.7).sin()]
    offsets = torch.tensor([0, PROBE_LENGTHS[0], total], dtype=torch.int32, device=device)
    found = varlen(q, k, v, Prompts(list(PROBE_LENGTHS), offsets), scaling)
    plain = [
        nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        for q, k, v in zip(*(x.split(PROBE_LENGTHS, dim=2) for x in leaves))
    ]
    expected = torch.cat(plain, dim=2).transpose(1, 2)
    gradients, expected_gradients = (
        torch.autograd.grad(x.float().sin().sum(), leaves) for x in (found, expected)
    )
    pairs = zip((found.detach(), *gradients), (expected.detach(), *expected_gradients))
    return max(float((ours - theirs).norm() / theirs.norm()) for ours, theirs in pairs)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def pack_prompts(model: PreTrainedModel) -> None:
    """Let a model that only uses torch's attention read packed prompts, see ``packs``."""
    config = model.config
    is_plain = config.model_type in MODEL_TYPES and getattr(config, "sliding_window", None) is None
    if is_plain and config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def packs(model: Any) -> bool:
    """Whether a causal language model reads packed prompts."""
    return bool(model.config._attn_implementation == NAME)
