"""Batches for a language model that scores titles: documents to train on, branches to score.

In a training document every title is a target given the titles before it, so that one pass over a
user's history trains on all of its prefixes at the cost of one::

    heading  title 1  title 2  title 3  ...         tokens of each title are predicted in turn

To score candidates, the history is computed once and each candidate is a branch that sees the
history and itself, at the positions that follow the history::

    heading  title 1 ... title h | candidate 1 | candidate 2 | ...
    0 1 2    ...             n-1 | n n+1 ...   | n n+1 ...   |         position ids
    0 0 0    ...               0 | 1 1   ...   | 2 2   ...   |         branches

Both give the same result as a separate text for each title.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from dataloader.candidates import Candidates
from dataloader.prompt_batches import BatchLimits, micro_batches
from dataloader.title_prompt import TitlePrompts
from datasets.base import SequenceDataset
from jagged import flat_ranges

Batch = dict[str, Any]
PADDING_BRANCH = -1


def pad_right(sequences: Sequence[np.ndarray], fill: int) -> np.ndarray:
    """Pad sequences of integers on the right; returns (B, L) int64."""
    padded = np.full((len(sequences), max(map(len, sequences))), fill, dtype=np.int64)
    for row, sequence in zip(padded, sequences):
        row[: len(sequence)] = sequence
    return padded


class TitleDocuments(Dataset):
    """Windows of the users' training sequences as documents to train on.

    A user's first window has up to ``max_history + 1`` titles, all of which are targets. A longer
    sequence continues in windows of the same size that overlap by half; the titles in the overlap
    serve only as context. A target is thus preceded by ``max_history / 2`` to ``max_history``
    titles, or by all earlier ones if they are fewer.

    Args:
        data: the data set.
        prompts: tokenizes the titles.
        limits: limits on the micro-batches.
        pad_id: token id of the padding.
    """

    def __init__(
        self,
        data: SequenceDataset,
        prompts: TitlePrompts,
        *,
        limits: BatchLimits,
        pad_id: int,
    ) -> None:
        self.item_ids, self.prompts = data.item_ids, prompts
        self.limits, self.pad_id = limits, pad_id
        size = prompts.max_history + 1
        stride = max(size // 2, 1)
        starts, ends = data.offsets[:-1], data.history_ends("train")
        windows = 1 + np.maximum(-(-(ends - starts - size) // stride), 0)
        self.users, index = flat_ranges(np.arange(data.num_users), windows)
        self.users -= index
        starts, ends = starts[self.users], ends[self.users]
        self.ends = np.minimum(starts + size + index * stride, ends)
        is_first = index == 0
        self.starts = np.where(is_first, starts, self.ends - size)
        self.first_targets = np.where(is_first, starts, starts + size + (index - 1) * stride)

    def __len__(self) -> int:
        return len(self.users)

    def document(self, index: int) -> tuple[np.ndarray, int]:
        """Token ids (length,) of a document, and the index of the first token that is a target."""
        start, end, target = self.starts[index], self.ends[index], self.first_targets[index]
        context = self.prompts.encode(self.item_ids[start:target])
        return self.prompts.encode(self.item_ids[start:end]), len(context)

    def __getitems__(self, numbers: list[int]) -> list[Batch]:
        """Build the micro-batches of one optimizer step.

        Returns:
            Micro-batches with ``input_ids`` (B, L), padded on the right; ``sources`` (T,), flat
            indices of the positions that predict a target; ``labels`` (T,), the targets;
            ``num_targets``, their number as the method of that name counts; and ``users``, a list
            of B.
        """
        indices = np.asarray(numbers) % len(self)
        documents = [self.document(index) for index in indices]
        lengths = np.array([len(ids) for ids, _ in documents])
        counts = np.array([self.num_targets(index) for index in indices])
        batches = []
        for group in micro_batches(lengths, self.limits):
            input_ids = pad_right([documents[i][0] for i in group], self.pad_id)
            targets = self.targets(indices[group], [documents[i] for i in group], input_ids)
            batches.append(
                {
                    "input_ids": torch.from_numpy(input_ids),
                    **{name: torch.from_numpy(array) for name, array in targets.items()},
                    "num_targets": int(counts[group].sum()),
                    "users": self.users[indices[group]].tolist(),
                }
            )
        return batches

    def num_targets(self, index: int) -> int:
        """Number of targets of a document, over which the loss is a mean."""
        items = self.item_ids[self.first_targets[index] : self.ends[index]]
        return sum(len(self.prompts.lines[item]) for item in items)

    def targets(
        self,
        indices: np.ndarray,
        documents: Sequence[tuple[np.ndarray, int]],
        input_ids: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """What is predicted in a micro-batch.

        Args:
            indices: (B,) the documents.
            documents: token ids and index of the first target of each, see ``document``.
            input_ids: (B, L) padded token ids.

        Returns:
            Arrays to add to the batch by name, here ``sources`` and ``labels`` (T,).
        """
        is_target = np.zeros(input_ids.shape, dtype=bool)
        for row, (ids, first) in enumerate(documents):
            is_target[row, first : len(ids)] = True
        targets = np.flatnonzero(is_target)
        return {"sources": targets - 1, "labels": input_ids.ravel()[targets]}


def branch_batch(
    histories: Sequence[np.ndarray], branches: Sequence[Sequence[np.ndarray]], pad_id: int
) -> Batch:
    """Put the candidates of each history after it, as branches.

    The branches are sorted by their token ids, so that the candidates' order does not change the
    scores, not even by rounding.

    Args:
        histories: token ids of each history.
        branches: for each history, the token ids of its candidates' lines.
        pad_id: token id of the padding.

    Returns:
        ``input_ids``, ``position_ids`` and ``branches`` (B, L), padded on the right; ``sources``
        (T,), flat indices of the positions that predict a token of a candidate; ``labels`` (T,),
        that token; ``owners`` (T,), flat index of the candidate among B x C; and
        ``num_candidates``, C.
    """
    num_candidates = len(branches[0])
    rows: dict[str, list[np.ndarray]] = {"input_ids": [], "position_ids": [], "branches": []}
    sources, labels, owners = [], [], []
    for row, (history, lines) in enumerate(zip(histories, branches)):
        order = sorted(range(len(lines)), key=lambda i: lines[i].tolist())
        # The last token of a line is only predicted.
        sizes = [len(lines[i]) - 1 for i in order]
        starts = len(history) + np.cumsum([0, *sizes[:-1]])
        parts = [lines[i][:-1] for i in order]
        positions = [len(history) + np.arange(size) for size in sizes]
        rows["input_ids"].append(np.concatenate([history, *parts]))
        rows["position_ids"].append(np.concatenate([np.arange(len(history)), *positions]))
        rows["branches"].append(np.repeat(np.arange(len(lines) + 1), [len(history), *sizes]))
        for i, start, size in zip(order, starts, sizes):
            predicting = np.append(len(history) - 1, start + np.arange(size))
            sources.append(np.stack([np.full(size + 1, row), predicting]))
            labels.append(lines[i])
            owners.append(np.full(size + 1, row * num_candidates + i))
    input_ids = pad_right(rows["input_ids"], pad_id)
    row_index, column = np.concatenate(sources, axis=1)
    return {
        "input_ids": torch.from_numpy(input_ids),
        "position_ids": torch.from_numpy(pad_right(rows["position_ids"], 0)),
        "branches": torch.from_numpy(pad_right(rows["branches"], PADDING_BRANCH)),
        "sources": torch.from_numpy(row_index * input_ids.shape[1] + column),
        "labels": torch.from_numpy(np.concatenate(labels)),
        "owners": torch.from_numpy(np.concatenate(owners)),
        "num_candidates": num_candidates,
    }


class CandidateTitles(Dataset):
    """The titles of the candidates as branches of each user's history.

    Examples are sorted by the length of the history, so that batches need little padding.

    Args:
        data: the data set.
        split: ``val`` or ``test``.
        candidates: candidates of all users in this split.
        prompts: tokenizes the titles.
        users: (n,) the users to score.
        pad_id: token id of the padding.
    """

    def __init__(
        self,
        data: SequenceDataset,
        split: str,
        candidates: Candidates,
        prompts: TitlePrompts,
        *,
        users: np.ndarray,
        pad_id: int,
    ) -> None:
        self.item_ids, self.offsets, self.ends = (
            data.item_ids,
            data.offsets,
            data.history_ends(split),
        )
        self.candidates, self.prompts, self.pad_id = candidates.items, prompts, pad_id
        lengths = np.array([len(self._history(user)) for user in users], dtype=np.int64)
        self.users = users[np.argsort(lengths, kind="stable")]

    def _history(self, user: int) -> np.ndarray:
        items = self.item_ids[self.offsets[user] : self.ends[user]]
        return self.prompts.encode_history(items)

    def __len__(self) -> int:
        return len(self.users)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Build a batch: that of ``branch_batch``, and ``users`` (B,)."""
        users = self.users[indices]
        lines = [[self.prompts.lines[item] for item in self.candidates[user]] for user in users]
        batch = branch_batch([self._history(user) for user in users], lines, self.pad_id)
        return batch | {"users": torch.from_numpy(users)}


class CatalogueTitles(Dataset):
    """The titles of the whole catalogue as branches of the heading alone, without a history.

    Args:
        prompts: tokenizes the titles.
        size: titles per example.
        pad_id: token id of the padding.
    """

    def __init__(self, prompts: TitlePrompts, size: int, pad_id: int) -> None:
        self.prompts, self.pad_id = prompts, pad_id
        # A short last example is filled up with the last item.
        num_items = len(prompts.lines) - 1
        self.items = np.minimum(np.arange(1, -(-num_items // size) * size + 1), num_items)
        self.items = self.items.reshape(-1, size)

    def __len__(self) -> int:
        return len(self.items)

    def __getitems__(self, indices: list[int]) -> Batch:
        """Build a batch: that of ``branch_batch``, and ``items`` (B, size)."""
        items = self.items[indices]
        lines = [[self.prompts.lines[item] for item in row] for row in items]
        batch = branch_batch([self.prompts.heading] * len(items), lines, self.pad_id)
        return batch | {"items": torch.from_numpy(items)}
