"""Titles chosen branch by branch, by a language model and a prior of the items together.

At a fork of the prefix tree of all titles, the options are tokens t. With the language model's
logit z(t) after history and prefix, and the prior's probability p(t) of the items under t, which
is a retriever's after the same history or the items' popularity (``dataloader.item_prior``),

    q(t) = softmax over the options of (a z(t) + b log p(t))

with weights a and b that are trained with the adapters. The score of a title is the sum of log q
along its path, so that exp(score) is a distribution over the catalogue. With a = 0 and b = 1 it is
the prior; the adapters learn what the prior does not know. Log-linear interpolation of a
language model with another model is known in speech recognition as shallow fusion. As in A. Sriram
et al., Cold Fusion, 2017 (https://arxiv.org/abs/1708.06426), it is part of training too.

The trained parameters are log a and log b. A step of Adam moves a parameter by up to the learning
rate. If the parameter were a itself, this would be 2% of a = 0.05; trained like this for 200 steps,
a shrank while the adapters grew, and most of what the language model had learned was lost
(docs/results/ranker.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from model.language_model import base_causal_lm
from model.title_likelihood import hidden_states

INITIAL_WEIGHTS = {"retriever": (0.05, 1.0), "popularity": (0.1, 1.0)}  # a and b by prior


def add_prior_weights(model: nn.Module, prior: str = "retriever") -> None:
    """Give a model the trainable parameter ``log_prior_weights`` (2,), log a and log b.

    Args:
        model: causal language model.
        prior: ``retriever`` or ``popularity``; it sets the initial values.
    """
    device = next(model.parameters()).device
    weights = torch.tensor(INITIAL_WEIGHTS[prior], dtype=torch.float32, device=device)
    model.register_parameter("log_prior_weights", nn.Parameter(weights.log()))


def prior_weights(model: nn.Module) -> Tensor:
    """(2,) the weights a and b of a model to which ``add_prior_weights`` was applied."""
    logs: Any = model.log_prior_weights
    weights: Tensor = logs.exp()
    return weights


def log_softmax_by_group(scores: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """(P,) log-softmax of scores (P,) within groups, given as (P,) indices below ``num_groups``."""
    # gather and scatter, because the backward pass of indexing adds up in no fixed order.
    empty = scores.new_full((num_groups,), -torch.inf)
    maxima = empty.scatter_reduce(0, groups, scores.detach(), "amax")
    shifted = scores - maxima.gather(0, groups)
    sums = torch.zeros_like(maxima).scatter_add(0, groups, shifted.exp())
    return shifted - sums.log().gather(0, groups)


def chosen_log_probabilities(model: nn.Module, batch: dict[str, Any], tokens: Tensor) -> Tensor:
    """Compute log q of the options on the paths.

    Args:
        model: causal language model with ``log_prior_weights``.
        batch: see ``dataloader.guided_titles``.
        tokens: (U,) token ids of ``TitleTrie.tokens``.

    Returns:
        (T,) float32.
    """
    hidden = hidden_states(model, batch).index_select(0, batch["fork_sources"])  # (M, D)
    head = base_causal_lm(model).get_output_embeddings()
    bias = None if head.bias is None else head.bias[tokens].float()
    logits = nn.functional.linear(hidden.float(), head.weight[tokens].float(), bias)  # (M, U)
    forks = batch["option_forks"]
    options = logits.flatten().gather(0, forks * len(tokens) + batch["option_tokens"])
    a, b = prior_weights(model)
    scores = a * options + b * batch["option_priors"]
    return log_softmax_by_group(scores, forks, len(hidden)).gather(0, batch["chosen"])


def guided_loss(model: nn.Module, batch: dict[str, Any], tokens: Tensor) -> Tensor:
    """Compute the mean log-loss of a micro-batch's titles, minus the prior's.

    It is negative if both together predict the titles better than the prior alone.

    Args:
        model: causal language model with ``log_prior_weights``.
        batch: see ``dataloader.guided_titles.GuidedDocuments``.
        tokens: (U,) token ids of ``TitleTrie.tokens``.

    Returns:
        A scalar, in nats per title.
    """
    log_q = chosen_log_probabilities(model, batch, tokens)
    num_forks = len(batch["fork_sources"])
    log_p = log_softmax_by_group(batch["option_priors"], batch["option_forks"], num_forks)
    log_p = log_p.gather(0, batch["chosen"])
    return (log_p - log_q).sum() / batch["num_titles"]


def guided_scores(model: nn.Module, batch: dict[str, Any], tokens: Tensor) -> Tensor:
    """Score the candidates of each history by the log-probability of their titles.

    Args:
        model: causal language model with ``log_prior_weights``.
        batch: see ``dataloader.guided_titles.GuidedCandidates``.
        tokens: (U,) token ids of ``TitleTrie.tokens``.

    Returns:
        (B, C) float32.
    """
    log_q = chosen_log_probabilities(model, batch, tokens)
    shares: Tensor = batch["title_log_shares"]
    return shares.flatten().index_add(0, batch["chosen_owners"], log_q).view_as(shares)
