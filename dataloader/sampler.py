"""Order of the examples: reshuffled every epoch in training, shared among the processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler

from distributed import rank, size


class ShuffledBatches(Sampler[list[int]]):
    """Batches of example numbers in an order that depends only on the seed and the epoch.

    Example i has the number i + epoch * num_examples, so that a data set can derive different
    random choices for it in every epoch.

    Args:
        num_examples: examples per epoch.
        batch_size: examples per batch; the last batch may be smaller.
        seed: seed of the order of every epoch.

    Attributes:
        total: number of batches in all epochs together, or None for no limit. Loaders prefetch, but
            the data that examples are built from may cover only the steps of the run.
    """

    total: int | None = None

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.epoch = self.first_batch = 0

    def seek(self, epoch: int, first_batch: int = 0) -> None:
        """Start the next iteration at batch ``first_batch`` of ``epoch``."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)

    def first_examples(self, num_batches: int) -> np.ndarray:
        """(n,) sorted indices of the examples in the first batches of the first epoch."""
        return np.sort(self._order(0)[: num_batches * self.batch_size])

    def __iter__(self) -> Iterator[list[int]]:
        numbers = self._order(self.epoch) + self.epoch * self.num_examples
        end = self.num_examples
        if self.total is not None:
            end = min(end, (self.total - self.epoch * len(self)) * self.batch_size)
        for start in range(self.first_batch * self.batch_size, end, self.batch_size):
            yield numbers[start : start + self.batch_size].tolist()


def training_loader(dataset: Dataset, sampler: ShuffledBatches, num_workers: int) -> DataLoader:
    """Load batches in the sampler's order; the data set builds a whole batch from its numbers.

    If there are several processes, each builds a part of every batch.
    """
    own = _Share(dataset) if size() > 1 else dataset
    return _loader(own, num_workers, batch_sampler=sampler)


def evaluation_loader(dataset: Any, batch_size: int, num_workers: int) -> DataLoader:
    """Load batches in the data set's own order; each of n processes loads every n-th batch."""
    return _loader(dataset, num_workers, batch_sampler=_EveryNthBatch(len(dataset), batch_size))


class _Share(Dataset):
    """This process's part of every training batch: a list of micro-batches, which may be empty."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitems__(self, numbers: list[int]) -> Any:
        share = numbers[rank() :: size()]
        return self.dataset.__getitems__(share) if share else []


class _EveryNthBatch(Sampler[list[int]]):
    """This process's batches of consecutive examples."""

    def __init__(self, num_examples: int, batch_size: int) -> None:
        self.batches = BatchSampler(range(num_examples), batch_size, drop_last=False)

    def __len__(self) -> int:
        return len(range(rank(), len(self.batches), size()))

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.batches), rank(), None, size())


def _loader(dataset: Dataset, num_workers: int, **batches: Any) -> DataLoader:
    # A loader draws a seed every time it is iterated. With a generator of its own, it leaves the
    # global one in the state that a resumed run needs.
    generator = torch.Generator()
    return DataLoader(
        dataset,
        collate_fn=_identity,
        num_workers=num_workers,
        worker_init_fn=_ignore_interrupts,
        generator=generator,
        **batches,
    )


def _identity(batch: object) -> object:
    return batch


def _ignore_interrupts(_: int) -> None:
    """Keep workers alive on Ctrl-C: the current step still needs their batches."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
