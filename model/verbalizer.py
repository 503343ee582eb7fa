"""The verbalizer: candidate scores from a language model's output (LlamaRec, section 3.2.2).

Each candidate is listed under a letter. The logit of that letter as the first token of the
response is the candidate's score.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from model.language_model import base_causal_lm
from model.packing import pack, packs


def position_ids(attention_mask: Tensor) -> Tensor:
    """Return the index of each token within its text, 0 for padding on the left.

    Args:
        attention_mask: (B, L), 1 for tokens and 0 for padding.

    Returns:
        (B, L).
    """
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def padded(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Arguments of a model for ``input_ids`` and ``attention_mask`` (B, L)."""
    mask = batch["attention_mask"]
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": mask,
        "position_ids": position_ids(mask),
    }


def candidate_scores(model: nn.Module, batch: dict[str, Any], letter_ids: Tensor) -> Tensor:
    """Score the candidates of each prompt by the logits of their letters, in one forward pass.

    The output layer is applied only at the last position of each prompt, and only with the letters'
    rows. This product is in float32: in bfloat16, many of 20 similar logits would be equal.

    Args:
        model: causal language model, with or without adapters.
        batch: ``input_ids`` and ``attention_mask`` (B, L), padded on either side.
        letter_ids: (C,) token ids of the letters.

    Returns:
        (B, C) float32.
    """
    causal_lm = base_causal_lm(model)
    mask = batch["attention_mask"]
    if packs(causal_lm):
        inputs = pack(batch)
        last = inputs["prompts"].offsets[1:] - 1
        rows = torch.zeros_like(last)
    else:
        inputs = padded(batch)
        rows, last = torch.arange(len(mask), device=mask.device), mask.cumsum(-1).argmax(-1)
    hidden: Tensor = causal_lm.base_model(**inputs, use_cache=False).last_hidden_state
    hidden = hidden[rows, last]  # (B, D)
    return token_logits(causal_lm, hidden, letter_ids, torch.float32)


def token_logits(
    causal_lm: Any, hidden: Tensor, token_ids: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Compute the logits of some tokens only.

    Args:
        causal_lm: causal language model.
        hidden: (B, D) last hidden states.
        token_ids: (C,) the tokens.
        dtype: dtype of the product; the model's if None. Ignored if the output layer has an
            adapter.

    Returns:
        (B, C) float32.
    """
    head: Any = causal_lm.get_output_embeddings()
    has_adapter = isinstance(head, BaseTunerLayer)
    if has_adapter:  # head.weight does not include it
        logits: Tensor = head(hidden)
        return logits[:, token_ids].float()
    weight = head.weight[token_ids]
    dtype = dtype or weight.dtype
    bias = None if head.bias is None else head.bias[token_ids].to(dtype)
    return nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias).float()


def response_loss(
    model: nn.Module, batch: dict[str, Any], letter_ids: Tensor | None = None
) -> Tensor:
    """Compute the mean cross-entropy of the responses: the letter and the end of the sequence.

    Only the positions that predict a target pass through the output layer.

    Args:
        model: causal language model.
        batch: ``input_ids`` and ``attention_mask`` (B, L), padded on the left, and ``targets``
            (B, R), the last R tokens of each row, -100 where a token is not trained on.
        letter_ids: (C,) token ids of the letters. If given, the loss is the cross-entropy of the
            letter over these C tokens instead of that of the response over the vocabulary.

    Returns:
        A scalar.
    """
    targets = batch["targets"]
    width = targets.shape[1]
    if packs(base_causal_lm(model)):
        inputs = pack(batch)
        before = torch.arange(-width - 1, -1, device=targets.device)
        sources = inputs["prompts"].offsets[1:, None] + before
        sources = sources.flatten().clamp(min=0)  # a shorter response has no target there
        logits = model(**inputs, use_cache=False, logits_to_keep=sources).logits
        logits = logits.view(*targets.shape, -1)  # (B, R, V)
    else:
        logits = model(**padded(batch), use_cache=False, logits_to_keep=width + 1).logits
        logits = logits[:, :-1]  # (B, R, V); the last position predicts nothing
    if letter_ids is not None:
        letters = (targets[:, -2, None] == letter_ids).int().argmax(1)
        return nn.functional.cross_entropy(logits[:, -2, letter_ids].float(), letters)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
