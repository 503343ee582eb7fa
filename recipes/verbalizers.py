"""How the ranker presents candidates to the language model and reads its scores.

- ``Letters``, the paper's: one prompt lists the candidates under letters, and the logits of the
  letters are the scores (section 3.2.2).
- ``Titles``: the log-likelihood of each candidate's title after the history is its score.
- ``GuidedTitles``: titles too, but the language model corrects probabilities of their items.

A verbalizer provides training examples, their loss, and features of the candidates, which
``evaluation.fusion`` combines with the retriever's log-probability.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from config import RankerConfig
from dataloader.candidates import Candidates
from dataloader.guided_titles import GuidedCandidates, GuidedDocuments
from dataloader.item_prior import ItemPrior, PopularityPrior
from dataloader.prompt import PromptBuilder
from dataloader.prompt_batches import EvaluationPrompts, TrainingPrompts
from dataloader.sampler import evaluation_loader
from dataloader.sequences import Prefixes
from dataloader.title_batches import CandidateTitles, CatalogueTitles, TitleDocuments
from dataloader.title_prompt import TitlePrompts
from datasets import SequenceDataset
from errors import advice
from evaluation.fusion import RETRIEVER, Fusion, fit_fusion
from evaluation.reranking import (
    retriever_log_probabilities,
    score_candidates,
    score_catalogue_titles,
    score_titles,
)
from evaluation.retrieval import hard_negatives
from model.guided_titles import guided_loss, guided_scores, prior_weights
from model.registry import load_retriever
from model.title_likelihood import title_loss, title_scores
from model.verbalizer import response_loss
from recipes.language_model import LanguageModel
from recipes.out_of_fold import evaluation_prior, retriever_config, training_prior
from recipes.tuning import batch_limits
from trainer.loop import Metrics

RETRIEVER_BATCH_SIZE = 256
CATALOGUE_CHUNK = 32  # titles scored after one heading
CATALOGUE_ROWS = 8  # headings per batch
LOG_RATIO = "title_log_ratio"  # log of the guided probability over the retriever's
Features = dict[str, np.ndarray]


class Verbalizer(ABC):
    """Presents candidates and reads their scores; see the module's docstring.

    Args:
        config: all settings.
        data: the data set.
        candidates: the retriever's candidates by split.
        language_model: the base model.
        device: device of the model.
    """

    def __init__(
        self,
        config: RankerConfig,
        data: SequenceDataset,
        candidates: Mapping[str, Candidates],
        language_model: LanguageModel,
        device: torch.device,
    ) -> None:
        self.config, self.data, self.candidates = config, data, candidates
        self.language_model, self.device = language_model, device

    def set_users(self, data: SequenceDataset, candidates: Mapping[str, Candidates]) -> None:
        """Score the candidates of other users from now on; the catalogue stays the same."""
        self.data, self.candidates = data, candidates

    @property
    @abstractmethod
    def num_examples(self) -> int:
        """Training examples per epoch."""

    @abstractmethod
    def training_examples(self, seen: np.ndarray) -> TrainingPrompts | TitleDocuments:
        """Training examples; only those with the indices ``seen`` (n,) will be used."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Mean loss of a micro-batch of training examples."""

    @abstractmethod
    def score(
        self, model: nn.Module, split: str, users: np.ndarray, description: str
    ) -> np.ndarray:
        """(n, C) scores of the candidates of ``users`` (n,), in the candidates' order."""

    @abstractmethod
    def features(
        self, model: nn.Module, split: str, users: np.ndarray, scores: np.ndarray
    ) -> Features:
        """(n, C) features of the candidates by name; the first is computed from ``scores`` (n, C).

        The model must hold the best adapter.
        """

    def fuse_alone(self, features: Features, targets: np.ndarray) -> Fusion:
        """Combine all features except the retriever's, with fitted weights if there are several.

        Args:
            features: (n, C) by name, the retriever's log-probability among them.
            targets: (n,) index of the target among the candidates.
        """
        own = {name: values for name, values in features.items() if name != RETRIEVER}
        main = next(iter(own))
        return fit_fusion(own, targets, base=main) if len(own) > 1 else Fusion({main: 1.0})

    def learned_weights(self, model: nn.Module) -> Metrics:
        """What is trained in addition to the adapters, by name, for the log."""
        return {}

    def batch_size(self, split: str) -> int:
        """Users per batch."""
        return self.config.val_batch_size if split == "val" else self.config.test_batch_size


def retrieved_negatives(
    config: RankerConfig, data: SequenceDataset, seen: np.ndarray, device: torch.device
) -> np.ndarray | None:
    """Hard negatives from the retriever for the training examples of a run.

    Args:
        config: all settings.
        data: the data set.
        seen: (n,) indices of the examples.
        device: device of the retriever.

    Returns:
        (examples, k) int32 items, rows of zeros for examples that are not seen; None if all
        negatives are sampled at random.
    """
    if config.train_candidates == "random":
        return None
    with advice("run train_retriever.py again"):
        retriever = load_retriever(config.retrieved_dir, data.num_items)
    prefixes = Prefixes(data, retriever.spec.max_len, retriever.spec.mask_token)
    loader = evaluation_loader(
        Subset(prefixes, seen.tolist()), RETRIEVER_BATCH_SIZE, config.num_workers
    )
    size = config.llm_negative_sample_size // (1 if config.train_candidates == "retrieved" else 2)
    negatives = np.zeros((len(prefixes), size), np.int32)
    negatives[seen] = hard_negatives(retriever.to(device), loader, size)
    return negatives


class Letters(Verbalizer):
    """The index letters of the paper; ``prompts`` builds the prompts."""

    def __init__(self, *args: Any, prompts: PromptBuilder) -> None:
        super().__init__(*args)
        self.prompts = prompts
        self.letter_ids = torch.from_numpy(prompts.letter_ids).to(self.device)

    @property
    def num_examples(self) -> int:
        """Training interactions with a history."""
        return len(self.data.training_prefixes()[0])

    def training_examples(self, seen: np.ndarray) -> TrainingPrompts:
        """Prompts for the training interactions."""
        config = self.config
        return TrainingPrompts(
            self.data,
            self.prompts,
            num_negatives=config.llm_negative_sample_size,
            hard_negatives=retrieved_negatives(config, self.data, seen, self.device),
            max_history=config.llm_max_history,
            limits=batch_limits(config, self.language_model),
            eos_id=self.language_model.eos_id,
            on_inputs=config.llm_train_on_inputs,
            seed=config.seed,
        )

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of the response."""
        over_letters = self.config.response_loss == "letters"
        return response_loss(model, batch, self.letter_ids if over_letters else None)

    def score(
        self, model: nn.Module, split: str, users: np.ndarray, description: str
    ) -> np.ndarray:
        """Logits of the candidates' letters."""
        config, candidates = self.config, self.candidates[split]
        prompts = EvaluationPrompts(
            self.data,
            split,
            candidates,
            self.prompts,
            max_history=config.llm_max_history,
            users=users,
            pad_id=self.language_model.eos_id,
            permutations=config.permutations,
            seed=config.seed,
        )
        loader = evaluation_loader(prompts, self.batch_size(split), config.num_workers)
        letter_ids = self.letter_ids[: candidates.items.shape[1]]
        return score_candidates(model, loader, letter_ids, description)[1]

    def features(
        self, model: nn.Module, split: str, users: np.ndarray, scores: np.ndarray
    ) -> Features:
        """The logits of the candidates' letters."""
        return {"letter_logit": scores}


class _Titles(Verbalizer):
    """What both verbalizers with titles share: documents to train on, branches to score.

    Args:
        args: arguments of ``Verbalizer``.
        prompts: tokenizes the titles.
    """

    documents_class: type[TitleDocuments]

    def __init__(self, *args: Any, prompts: TitlePrompts) -> None:
        super().__init__(*args)
        self.prompts = prompts

    @cached_property
    def documents(self) -> Any:
        """Users' training sequences."""
        return self.documents_class(
            self.data,
            self.prompts,
            limits=batch_limits(self.config, self.language_model),
            pad_id=self.language_model.eos_id,
        )

    @property
    def num_examples(self) -> int:
        """Documents."""
        return len(self.documents)

    def loader(self, titles: Dataset, split: str) -> DataLoader:
        """Batches of candidates in a split."""
        return evaluation_loader(titles, self.batch_size(split), self.config.num_workers)


class Titles(_Titles):
    """The likelihood of the candidates' titles."""

    documents_class = TitleDocuments
    _without_history: np.ndarray | None = None  # (V + 1,) of the best adapter

    def training_examples(self, seen: np.ndarray) -> TitleDocuments:
        """Users' training sequences as documents."""
        documents: TitleDocuments = self.documents
        return documents

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Cross-entropy of the titles' tokens."""
        return title_loss(model, batch)

    def score(
        self, model: nn.Module, split: str, users: np.ndarray, description: str
    ) -> np.ndarray:
        """Log-likelihoods of the candidates' titles."""
        titles = CandidateTitles(
            self.data,
            split,
            self.candidates[split],
            self.prompts,
            users=users,
            pad_id=self.language_model.eos_id,
        )
        return score_titles(model, self.loader(titles, split), title_scores, description)

    def features(
        self, model: nn.Module, split: str, users: np.ndarray, scores: np.ndarray
    ) -> Features:
        """The titles' log-likelihoods with and without the history, and their lengths in tokens."""
        if self._without_history is None:
            titles = CatalogueTitles(self.prompts, CATALOGUE_CHUNK, self.language_model.eos_id)
            loader = evaluation_loader(titles, CATALOGUE_ROWS, self.config.num_workers)
            self._without_history = score_catalogue_titles(model, loader, self.data.num_items)
        items = self.candidates[split].items[users]
        tokens = np.array([len(line) for line in self.prompts.lines])
        return {
            "title_log_likelihood": scores,
            "title_log_likelihood_without_history": self._without_history[items],
            "title_tokens": tokens[items].astype(np.float64),
        }


class GuidedTitles(_Titles):
    """Titles chosen by the language model and a prior of their items together."""

    documents_class = GuidedDocuments

    def __init__(self, *args: Any, prompts: TitlePrompts) -> None:
        super().__init__(*args, prompts=prompts)
        self.tokens = torch.from_numpy(prompts.trie.tokens).to(self.device)
        self._priors: dict[str, ItemPrior] = {}  # by split

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Log-loss of the titles, minus the prior's."""
        return guided_loss(model, batch, self.tokens)

    def learned_weights(self, model: nn.Module) -> Metrics:
        """Weights of the language model's logits and of the prior."""
        names = ("language_model_weight", f"{self.config.title_prior}_weight")
        return dict(zip(names, prior_weights(model).tolist()))

    def training_examples(self, seen: np.ndarray) -> GuidedDocuments:
        """Users' training sequences, with the prior before their items."""
        documents: GuidedDocuments = self.documents
        documents.prior = self.training_prior(documents.interactions(seen))
        return documents

    def score(
        self, model: nn.Module, split: str, users: np.ndarray, description: str
    ) -> np.ndarray:
        """Log-probabilities of the candidates."""
        if split not in self._priors:
            self._priors[split] = self.evaluation_prior(split)
        titles = GuidedCandidates(
            self.data,
            split,
            self.candidates[split],
            self.prompts,
            users=users,
            pad_id=self.language_model.eos_id,
            prior=self._priors[split],
        )
        score = partial(guided_scores, tokens=self.tokens)
        return score_titles(model, self.loader(titles, split), score, description)

    @abstractmethod
    def training_prior(self, interactions: np.ndarray) -> ItemPrior:
        """Probabilities before training interactions (n,), ascending indices into the items."""

    @abstractmethod
    def evaluation_prior(self, split: str) -> ItemPrior:
        """Probabilities after the histories of all users."""


class RetrieverTitles(GuidedTitles):
    """Titles chosen by language model and retriever together."""

    def set_users(self, data: SequenceDataset, candidates: Mapping[str, Candidates]) -> None:
        """See ``Verbalizer``; drops the retriever's probabilities of the earlier users."""
        super().set_users(data, candidates)
        self._priors = {}

    def training_prior(self, interactions: np.ndarray) -> ItemPrior:
        """Those of retrievers that were trained on other users."""
        return training_prior(self.config, self.data, interactions, self.device)

    def evaluation_prior(self, split: str) -> ItemPrior:
        """Those of the retriever itself."""
        return evaluation_prior(self.config, self.data, split, self.device)

    def features(
        self, model: nn.Module, split: str, users: np.ndarray, scores: np.ndarray
    ) -> Features:
        """What the language model adds to the log-probability of each candidate."""
        retriever = retriever_log_probabilities(self.candidates[split], users)
        return {LOG_RATIO: scores - retriever}

    def fuse_alone(self, features: Features, targets: np.ndarray) -> Fusion:
        """The guided log-probabilities themselves: the retriever's plus the log-ratio."""
        return Fusion({RETRIEVER: 1.0, LOG_RATIO: 1.0})


class PopularityTitles(GuidedTitles):
    """Titles chosen by a language model that knows how popular they are, without a retriever."""

    def __init__(self, *args: Any, prompts: TitlePrompts) -> None:
        super().__init__(*args, prompts=prompts)
        self._counts = self.data.training_counts()  # those of the users it was tuned on

    def _prior(self) -> ItemPrior:
        mask_history = retriever_config(self.config).excludes_history
        return PopularityPrior(self._counts, mask_history=mask_history)

    def training_prior(self, interactions: np.ndarray) -> ItemPrior:
        """The items' shares of the training interactions."""
        return self._prior()

    def evaluation_prior(self, split: str) -> ItemPrior:
        """The same."""
        return self._prior()

    def features(
        self, model: nn.Module, split: str, users: np.ndarray, scores: np.ndarray
    ) -> Features:
        """The candidates' log-probabilities, and the logarithms of their popularity."""
        popularity = np.log1p(self._counts)[self.candidates[split].items[users]]
        return {"title_log_probability": scores, "log_popularity": popularity}


TITLES: dict[str, Callable[..., Verbalizer]] = {  # by --title_prior
    "retriever": RetrieverTitles,
    "popularity": PopularityTitles,
    "none": Titles,
}


def build_verbalizer(
    config: RankerConfig,
    data: SequenceDataset,
    candidates: Mapping[str, Candidates],
    language_model: LanguageModel,
    device: torch.device,
    prompts: PromptBuilder | TitlePrompts,
) -> Verbalizer:
    """Build the verbalizer of the prompts; see ``Verbalizer`` for the other arguments."""
    common = (config, data, candidates, language_model, device)
    if isinstance(prompts, TitlePrompts):
        return TITLES[config.title_prior](*common, prompts=prompts)
    return Letters(*common, prompts=prompts)
