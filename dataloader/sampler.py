"""Order of the training examples: reshuffled every epoch, and resumable at any batch."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class ShuffledBatches(Sampler[list[int]]):
    """Batches of example numbers; the order depends on seed and epoch alone.

    Numbers go on from epoch to epoch: example i has the number i + epoch * num_examples, which
    lets a data set draw anew what is random about it.

    Args:
        num_examples: examples in an epoch.
        batch_size: examples in a batch; the last batch may be smaller.
        seed: seed of all epochs' orders.
    """

    def __init__(self, num_examples: int, batch_size: int, seed: int) -> None:
        self.num_examples, self.batch_size, self.seed = num_examples, batch_size, seed
        self.epoch = self.first_batch = 0

    def seek(self, epoch: int, first_batch: int = 0) -> None:
        """Let the next iteration give ``epoch`` from its batch ``first_batch`` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(self.num_examples)

    def seen(self, num_batches: int) -> np.ndarray:
        """Sorted indices of the examples that the first batches of all epochs hold."""
        return np.sort(self._order(0)[: num_batches * self.batch_size])

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self.epoch) + self.epoch * self.num_examples
        for start in range(self.first_batch * self.batch_size, self.num_examples, self.batch_size):
            yield order[start : start + self.batch_size].tolist()


def _as_is(batch: object) -> object:
    return batch


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches a worker as well, whose batches are still needed to come to a step's end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def training_loader(dataset: Dataset, sampler: ShuffledBatches, num_workers: int) -> DataLoader:
    """Loader over a data set whose ``__getitems__`` makes whole batches from index lists."""
    return _loader(dataset, num_workers, batch_sampler=sampler)


def evaluation_loader(dataset: Dataset, batch_size: int, num_workers: int) -> DataLoader:
    """Like ``training_loader``, in the data set's own order."""
    return _loader(dataset, num_workers, batch_size=batch_size)


def _loader(dataset: Dataset, num_workers: int, **batches: Any) -> DataLoader:
    # A loader draws a seed whenever it is iterated. With a generator of its own it leaves the
    # global one alone, which a resumed run needs in the state it would have had.
    generator = torch.Generator()
    return DataLoader(
        dataset,
        collate_fn=_as_is,
        num_workers=num_workers,
        worker_init_fn=_ignore_interrupts,
        generator=generator,
        **batches,
    )
