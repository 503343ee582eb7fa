"""The verbalizer: from a language model's output to scores of the candidates (section 3.2.2)."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def position_ids(attention_mask: Tensor) -> Tensor:
    """(B, L) index of each token within its row's text, whatever padding stands before it."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def candidate_scores(model: nn.Module, batch: dict[str, Any], label_ids: Tensor) -> Tensor:
    """Scores of the candidates: the logits of their labels after the prompt, in one forward pass.

    Only the prompt's last position passes the output layer, only the labels' rows of it are
    multiplied, and that in float32: in bfloat16, 20 logits of one size are often equal.

    Args:
        model: causal LM, with or without adapters.
        batch: ``input_ids`` and ``attention_mask``, (B, L), padded on either side.
        label_ids: (C,) token ids of the labels.

    Returns:
        (B, C) float32.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask = batch["attention_mask"]
    hidden = causal_lm.base_model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
    ).last_hidden_state  # (B, L, D)
    last = mask.cumsum(-1).argmax(-1)
    hidden = hidden[torch.arange(len(last), device=last.device), last]
    head = causal_lm.get_output_embeddings()
    if isinstance(head, BaseTunerLayer):  # its weights alone are not what it computes
        return head(hidden)[:, label_ids].float()
    bias = None if head.bias is None else head.bias[label_ids].float()
    return nn.functional.linear(hidden.float(), head.weight[label_ids].float(), bias)


def response_loss(
    model: nn.Module, batch: dict[str, Any], label_ids: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy of the response: the answer's label and the end of the sequence.

    Only the last positions pass the output layer.

    Args:
        model: causal LM.
        batch: left-padded ``input_ids`` and ``attention_mask``, (B, L), and ``targets`` (B, R), the
            last R tokens, -100 for those that are not trained on.
        label_ids: (C,) token ids of the labels: the label's cross-entropy among them alone, as they
            are scored, instead of the response's over the vocabulary.
    """
    mask, targets = batch["attention_mask"], batch["targets"]
    logits = model(
        input_ids=batch["input_ids"],
        attention_mask=mask,
        position_ids=position_ids(mask),
        use_cache=False,
        logits_to_keep=targets.shape[1] + 1,
    ).logits[:, :-1]  # the last position's are of no use
    if label_ids is not None:
        places = (targets[:, -2, None] == label_ids).int().argmax(1)
        return nn.functional.cross_entropy(logits[:, -2, label_ids].float(), places)
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
