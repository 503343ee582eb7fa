"""Recommendations from a finished run of either stage, after any history.

Both stages run as in evaluation: a history is that of a user whose next item is to be predicted.
For a user's history before the test target, the scores are therefore those of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dataloader.sampler import evaluation_loader
from dataloader.sequences import Histories
from datasets import SequenceDataset
from errors import advice
from evaluation.retrieval import retrieve
from model.registry import load_retriever
from process import use_cuda
from recipes.runs import retriever_of
from storage import read_json, reading
from trainer.run_folder import CONFIG

if TYPE_CHECKING:  # it imports transformers and peft, which a retriever does not need
    from recipes.second_stage import Ranker

BATCH_SIZE = 64
ANY_ITEM = 1  # stands for the unknown next item; nothing depends on it


class Recommendations(NamedTuple):
    """Items for n histories.

    Attributes:
        items: (n, k) items, best first.
        scores: (n, k) their scores by name; the last one orders them.
        retrieved: (n, k) their 1-based rank by the retriever.
    """

    items: np.ndarray
    scores: dict[str, np.ndarray]
    retrieved: np.ndarray


def with_histories(data: SequenceDataset, histories: Sequence[np.ndarray]) -> SequenceDataset:
    """A data set with one user for each history, which precedes the user's test target."""
    lengths = [len(history) + 1 for history in histories]
    parts = [np.append(history, ANY_ITEM).astype(np.int32) for history in histories]
    return replace(
        data,
        item_ids=np.concatenate(parts),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        user_names=[str(index) for index in range(len(histories))],
    )


class Recommender:
    """The models of a run.

    Args:
        run_dir: a finished run of ``train_retriever.py`` or ``train_ranker.py``.
        data: its data set.
        device: ``cpu``, ``cuda`` or None for CUDA if available.
        base_model: overrides the language model that the run's ``config.json`` names.
        approximate: whether candidates come from an approximate index of the items.

    Raises:
        UserError: the run cannot be used.
    """

    def __init__(
        self,
        run_dir: Path,
        data: SequenceDataset,
        device: str | None,
        base_model: str | None,
        *,
        approximate: bool = False,
    ) -> None:
        self.data = data
        settings = read_json(run_dir / CONFIG)
        self.ranker: Ranker | None = None
        retriever_dir, retriever = retriever_of(run_dir, settings)
        with reading(run_dir / CONFIG):
            self.mask_history = retriever["mask_history"] != "never"
            self.num_candidates = int(retriever["num_candidates"])
        with advice("run train_retriever.py again"):
            self.retriever = load_retriever(retriever_dir, data.num_items)
        if "verbalizer" in settings:
            from recipes.second_stage import Ranker

            self.ranker = Ranker(run_dir, settings, data, device, base_model)
        self.retriever.to("cuda" if use_cuda(device) else "cpu")
        self.retrieve = partial(retrieve, self.retriever)
        if approximate:  # faiss need not be installed otherwise
            from evaluation.approximate import ItemIndex, retrieve_approximately

            index = ItemIndex(self.retriever)
            self.retrieve = partial(retrieve_approximately, self.retriever, index)

    def recommend(self, histories: Sequence[np.ndarray], k: int) -> Recommendations:
        """Recommend the k best items for each history; histories must not be empty."""
        data = with_histories(self.data, histories)
        spec = self.retriever.spec
        examples = Histories(data, "test", spec.max_len, spec.mask_token)
        candidates = self.retrieve(
            evaluation_loader(examples, BATCH_SIZE, 0),
            mask_history=self.mask_history,
            num_candidates=self.num_candidates if self.ranker else k,
            description="retrieve",
        )
        scores = {"retriever": candidates.scores}
        if self.ranker:
            scores = self.ranker.scores(data, candidates)
        *_, final = scores.values()
        order = np.argsort(-final, axis=1, kind="stable")[:, :k]
        best = {name: np.take_along_axis(values, order, 1) for name, values in scores.items()}
        return Recommendations(np.take_along_axis(candidates.items, order, 1), best, order + 1)
