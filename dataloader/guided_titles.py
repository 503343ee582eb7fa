"""Batches for a language model that chooses titles branch by branch, guided by a prior.

At each fork of the prefix tree (``dataloader.title_trie``) on the path to a title, the options are
the fork's branches. In addition to the inputs of ``dataloader.title_batches``, a batch has

- ``fork_sources`` (M,): flat index of the position that predicts the token after each fork;
- ``option_forks``, ``option_tokens`` (P,): fork of each option, from 0 to M - 1, and its token as
  an index into ``TitleTrie.tokens``;
- ``option_priors`` (P,) float32: log of the prior's probability of the option's items;
- ``chosen`` (T,): indices of the options on the paths to the titles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dataloader.item_prior import ItemPrior
from dataloader.title_batches import Batch, CandidateTitles, TitleDocuments, branch_batch
from dataloader.title_prompt import TitlePrompts
from dataloader.title_trie import TitleTrie
from datasets import SequenceDataset
from jagged import flat_ranges

Arrays = dict[str, np.ndarray]


def fork_options(
    trie: TitleTrie,
    cumulative: np.ndarray,
    rows: np.ndarray,
    sources: np.ndarray,
    branches: np.ndarray,
) -> Arrays:
    """Collect the options at the forks where branches were taken.

    Args:
        trie: the titles.
        cumulative: (R, V + 1) cumulative probabilities, see ``TitleTrie.cumulative``.
        rows: (T,) row of ``cumulative`` of each branch.
        sources: (T,) flat index of the position that predicts the branch. It determines the row.
        branches: (T,) the branches.

    Returns:
        The five arrays of the module's docstring by name.
    """
    keys = np.stack([sources, trie.forks[branches], rows])
    (fork_sources, forks, fork_rows), fork_of = np.unique(keys, axis=1, return_inverse=True)
    counts = np.diff(trie.offsets)[forks]
    options, _ = flat_ranges(trie.offsets[forks], counts)
    option_forks = np.repeat(np.arange(len(forks)), counts)
    masses = trie.masses(cumulative, fork_rows[option_forks], options)
    first_option = np.cumsum(counts) - counts
    return {
        "fork_sources": fork_sources,
        "option_forks": option_forks,
        "option_tokens": trie.branch_tokens[options],
        "option_priors": np.log(masses).astype(np.float32),
        "chosen": first_option[fork_of] + branches - trie.offsets[forks[fork_of]],
    }


class GuidedDocuments(TitleDocuments):
    """Documents whose titles are chosen branch by branch.

    A user's first item serves only as context, since a retriever has no history before it.

    Args:
        data: the data set.
        prompts: tokenizes the titles.
        limits: further arguments of ``TitleDocuments``.

    Attributes:
        prior: probabilities before each interaction that can be a target; set it before building
            batches.
    """

    prior: ItemPrior

    def __init__(self, data: SequenceDataset, prompts: TitlePrompts, **limits: Any) -> None:
        super().__init__(data, prompts, **limits)
        self.offsets, self.trie = data.offsets, prompts.trie
        self.first_targets = np.maximum(self.first_targets, self.offsets[self.users] + 1)
        kept = self.first_targets < self.ends
        self.users, self.first_targets = self.users[kept], self.first_targets[kept]
        self.starts, self.ends = self.starts[kept], self.ends[kept]

    def interactions(self, indices: np.ndarray) -> np.ndarray:
        """Ascending indices into ``data.item_ids`` of the targets of documents (n,)."""
        counts = self.ends[indices] - self.first_targets[indices]
        return np.sort(flat_ranges(self.first_targets[indices], counts)[0])

    def num_targets(self, index: int) -> int:
        """Number of titles that are predicted in a document."""
        return int(self.ends[index] - self.first_targets[index])

    def targets(
        self,
        indices: np.ndarray,
        documents: Sequence[tuple[np.ndarray, int]],
        input_ids: np.ndarray,
    ) -> Arrays:
        """The options at the forks before the targets; see ``fork_options``."""
        counts = self.ends[indices] - self.first_targets[indices]
        targets, _ = flat_ranges(self.first_targets[indices], counts)
        items, starts = self.item_ids[targets], np.repeat(self.offsets[self.users[indices]], counts)
        histories = [self.item_ids[start:target] for start, target in zip(starts, targets)]
        probabilities = self.prior.probabilities(targets, histories, items)
        cumulative = self.trie.cumulative(probabilities)
        # Each target's line begins after its document's context and the targets before it.
        sizes = np.array([len(self.prompts.lines[item]) for item in items])
        before = np.cumsum(sizes) - sizes
        first = np.cumsum(counts) - counts  # each document's first target
        contexts = [
            row * input_ids.shape[1] + context for row, (_, context) in enumerate(documents)
        ]
        begins = before + np.repeat(contexts - before[first], counts)
        branches, depths = zip(*(self.trie.path(item) for item in items))
        lengths = [len(path) for path in branches]
        return fork_options(
            self.trie,
            cumulative,
            rows=np.repeat(np.arange(len(items)), lengths),
            sources=np.repeat(begins, lengths) + np.concatenate(depths) - 1,
            branches=np.concatenate(branches),
        ) | {"num_titles": np.array(len(items))}


class GuidedCandidates(CandidateTitles):
    """The candidates of each user as branches of the history, up to their last forks.

    The tokens after a title's last fork are certain and need not be scored.

    Args:
        args, options: arguments of ``CandidateTitles``.
        prior: probabilities after each user's history; its keys are users.
    """

    def __init__(self, *args: Any, prior: ItemPrior, **options: Any) -> None:
        super().__init__(*args, **options)
        self.trie, self.prior = self.prompts.trie, prior

    def __getitems__(self, indices: list[int]) -> Batch:
        """Build a batch.

        Returns:
            The batch of ``branch_batch`` and the options of ``fork_options``, with ``users`` (B,);
            ``chosen_owners`` (T,), flat index of the candidate among B x C that each chosen option
            leads to; and ``title_log_shares`` (B, C), see ``TitleTrie.log_share``.
        """
        users = self.users[indices]
        candidates = self.candidates[users]
        histories = [self.item_ids[self.offsets[user] : self.ends[user]] for user in users]
        probabilities = self.prior.probabilities(users, histories)
        cumulative = self.trie.cumulative(probabilities)
        paths = [self.trie.path(item) for item in candidates.ravel()]
        lines = [
            self.prompts.lines[item][: depths[-1] + 1 if len(depths) else 1]
            for item, (_, depths) in zip(candidates.ravel(), paths)
        ]
        width = candidates.shape[1]
        batch = branch_batch(
            [self._history(user) for user in users],
            [lines[row * width : (row + 1) * width] for row in range(len(users))],
            self.pad_id,
        )
        # Positions that predict the tokens of candidate i, in order, begin at index first[i].
        owners = batch.pop("owners").numpy()
        order = np.argsort(owners, kind="stable")
        sources = batch.pop("sources").numpy()[order]
        del batch["labels"]
        first = np.searchsorted(owners[order], np.arange(len(paths)))
        lengths = [len(branches) for branches, _ in paths]
        chosen_owners = np.repeat(np.arange(len(paths)), lengths)
        depths = np.concatenate([depths for _, depths in paths])
        options = fork_options(
            self.trie,
            cumulative,
            rows=chosen_owners // width,
            sources=sources[first[chosen_owners] + depths],
            branches=np.concatenate([branches for branches, _ in paths]),
        )
        shares = [
            [self.trie.log_share(row, item) for item in items]
            for row, items in zip(cumulative, candidates)
        ]
        arrays = options | {
            "users": users,
            "chosen_owners": chosen_owners,
            "title_log_shares": np.array(shares, dtype=np.float32),
        }
        return batch | {name: torch.from_numpy(array) for name, array in arrays.items()}
