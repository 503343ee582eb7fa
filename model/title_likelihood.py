"""Titles as a verbalizer: candidate scores are the log-likelihoods of their titles.

The score of a title with tokens y[1..m], line break included, after a history x is

    log p(y | x) = sum over i of log p(y[i] | x, y[1..i-1])

from the language model's own output layer. One forward pass scores the tokens of all titles, see
``dataloader.title_batches``: a mask lets each candidate see the history and itself, and its
positions continue those of the history, so that the pass equals a separate one for each candidate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.language_model import base_causal_lm

CHUNK_ROWS = 256  # positions whose scores over the vocabulary are held at once


def hidden_states(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Compute the last hidden states of documents, or of histories with branches.

    Args:
        model: causal language model, with or without adapters.
        batch: ``input_ids`` (B, L), padded on the right, where causal attention ignores the
            padding; for branches also ``branches`` and ``position_ids`` (B, L).

    Returns:
        (B * L, D).
    """
    options = {}
    if "branches" in batch:
        options["attention_mask"] = branch_mask(batch["branches"])
        options["position_ids"] = batch["position_ids"]
    output = base_causal_lm(model).base_model(
        input_ids=batch["input_ids"], use_cache=False, **options
    )
    hidden: Tensor = output.last_hidden_state
    return hidden.flatten(0, 1)


def title_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Compute the mean cross-entropy of the target tokens of a micro-batch.

    Args:
        model: causal language model.
        batch: see ``dataloader.title_batches.TitleDocuments``.

    Returns:
        A scalar.
    """
    hidden = hidden_states(model, batch)[batch["sources"]]
    head = base_causal_lm(model).get_output_embeddings()
    return FrozenHeadLoss.apply(hidden, head.weight, head.bias, batch["labels"])


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy of an output layer whose weights are not trained.

    With scores s = W h + b of a hidden state h and label y, the gradient of the mean over T rows is

        dh = (softmax(s) - onehot(y)) W / T

    It needs only the scores of its own row, so the forward pass computes it chunk by chunk and
    never holds the scores of all positions over the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
    ) -> Tensor:
        """Compute the mean loss.

        Args:
            ctx: stores the gradient.
            hidden: (T, D) hidden states.
            weight: (V, D) of the output layer.
            bias: (V,) or None.
            labels: (T,) token ids.

        Returns:
            A scalar, at least float32.
        """
        grad_hidden = torch.empty_like(hidden)
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for h, grad_h, label in zip(
            hidden.split(CHUNK_ROWS), grad_hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS)
        ):
            scores = nn.functional.linear(h, weight, bias).to(loss.dtype)
            log_probabilities = scores.log_softmax(-1)
            loss -= log_probabilities.gather(1, label[:, None]).sum()
            grad_scores = log_probabilities.exp_()
            grad_scores[torch.arange(len(label)), label] -= 1
            torch.mm(grad_scores.to(h.dtype), weight, out=grad_h)
        ctx.save_for_backward(grad_hidden)
        return loss / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient of the forward pass."""
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * (grad_outputs[0] / len(grad_hidden)), None, None, None


def branch_mask(branches: Tensor) -> Tensor:
    """Build the attention mask of branches.

    Args:
        branches: (B, L), 0 for the history, a number from 1 for each branch, -1 for padding.

    Returns:
        (B, 1, L, L), true where a query sees a key: the history, and earlier tokens of its branch.
    """
    query, key = branches[:, :, None], branches[:, None, :]
    length = branches.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=branches.device).tril()
    return (causal & ((key == 0) | (key == query)))[:, None]


def title_scores(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Score the candidates of each history by the log-likelihood of their titles.

    Args:
        model: causal language model, with or without adapters.
        batch: see ``dataloader.title_batches.branch_batch``.

    Returns:
        (B, C) float32.
    """
    hidden = hidden_states(model, batch)[batch["sources"]]
    head = base_causal_lm(model).get_output_embeddings()
    tokens = token_log_likelihoods(head, hidden, batch["labels"])
    scores = tokens.new_zeros(len(batch["input_ids"]) * batch["num_candidates"])
    return scores.index_add_(0, batch["owners"], tokens).view(-1, batch["num_candidates"])


def token_log_likelihoods(head: nn.Linear, hidden: Tensor, labels: Tensor) -> Tensor:
    """Compute log p(label) at each position, from an output layer over the vocabulary.

    Args:
        head: the output layer.
        hidden: (T, D) last hidden states.
        labels: (T,) token ids.

    Returns:
        (T,) float32. The label's logit is computed in float32 whatever the dtype of the layer.
    """
    parts = []
    for h, label in zip(hidden.split(CHUNK_ROWS), labels.split(CHUNK_ROWS)):
        logit = (h.float() * head.weight[label].float()).sum(-1)
        if head.bias is not None:
            logit = logit + head.bias[label].float()
        parts.append(logit - head(h).float().logsumexp(-1))
    return torch.cat(parts)
