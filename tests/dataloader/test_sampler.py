import os
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from dataloader.sampler import ShuffledBatches, evaluation_loader, training_loader

# Order ------------------------------------------------------------------------------------------


def batches(sampler: ShuffledBatches, epoch: int, first_batch: int = 0) -> list[list[int]]:
    sampler.seek(epoch, first_batch)
    return list(sampler)


def test_an_epoch_holds_every_example_once():
    sampler = ShuffledBatches(10, 4, seed=0)
    assert len(sampler) == 3
    for epoch in range(3):
        numbers = batches(sampler, epoch)
        assert [len(batch) for batch in numbers] == [4, 4, 2]
        assert sorted(np.concatenate(numbers)) == list(range(10 * epoch, 10 * epoch + 10))


def test_the_order_depends_on_the_seed_and_the_epoch_alone():
    sampler = ShuffledBatches(100, 7, seed=3)
    first = batches(sampler, 0)
    later = batches(sampler, 5)
    assert first == batches(ShuffledBatches(100, 7, seed=3), 0) == batches(sampler, 0)
    assert later == batches(ShuffledBatches(100, 7, seed=3), 5)
    assert np.concatenate(later).tolist() != (np.concatenate(first) + 500).tolist()
    assert first != batches(ShuffledBatches(100, 7, seed=4), 0)
    assert np.concatenate(first).tolist() != list(range(100))


def test_the_order_does_not_depend_on_the_batch_size():
    small, large = ShuffledBatches(100, 3, seed=0), ShuffledBatches(100, 64, seed=0)
    assert np.array_equal(np.concatenate(batches(small, 2)), np.concatenate(batches(large, 2)))


def test_an_epoch_resumes_at_any_batch():
    sampler = ShuffledBatches(10, 4, seed=0)
    whole = batches(sampler, 2)
    for first_batch in range(4):
        assert batches(sampler, 2, first_batch) == whole[first_batch:]


def test_first_examples():
    sampler = ShuffledBatches(10, 4, seed=0)
    numbers = batches(sampler, 0)
    sampler.seek(3, 1)  # has no effect
    assert sampler.first_examples(2).tolist() == sorted(numbers[0] + numbers[1])
    assert sampler.first_examples(99).tolist() == list(range(10))
    assert sampler.first_examples(0).tolist() == []


def test_no_batch_beyond_the_last_step():
    sampler = ShuffledBatches(10, 4, seed=0)
    epochs = [batches(sampler, epoch) for epoch in range(3)]
    sampler.total = 5
    assert [batches(sampler, epoch) for epoch in range(3)] == [epochs[0], epochs[1][:2], []]
    assert batches(sampler, 1, 1) == epochs[1][1:2]


# Loaders ----------------------------------------------------------------------------------------


class Squares(Dataset):
    """Example i is i squared; a batch also tells which process built it."""

    def __len__(self) -> int:
        return 10

    def __getitems__(self, numbers: list[int]) -> dict:
        interrupts_are_ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return {
            "squares": torch.tensor(numbers) ** 2,
            "process": os.getpid(),
            "interrupts_are_ignored": interrupts_are_ignored,
        }


@pytest.fixture()
def _default_handler() -> Iterator[None]:
    """Handle SIGINT as in a terminal; a shell starts background jobs with it ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("_default_handler")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_give_batches_in_order(num_workers: int):
    sampler = ShuffledBatches(10, 4, seed=0)
    expected = [[n * n for n in numbers] for numbers in batches(sampler, 0)]
    trained = list(training_loader(Squares(), sampler, num_workers))
    assert [batch["squares"].tolist() for batch in trained] == expected
    evaluated = list(evaluation_loader(Squares(), 3, num_workers))
    squares = [batch["squares"].tolist() for batch in evaluated]
    assert squares == [[0, 1, 4], [9, 16, 25], [36, 49, 64], [81]]
    for batch in (*trained, *evaluated):
        assert (batch["process"] != os.getpid()) == bool(num_workers)
        assert batch["interrupts_are_ignored"] == bool(num_workers)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loaders_do_not_draw_from_the_global_generator(num_workers: int):
    state = torch.get_rng_state()
    list(training_loader(Squares(), ShuffledBatches(10, 4, seed=0), num_workers))
    list(evaluation_loader(Squares(), 3, num_workers))
    assert torch.equal(torch.get_rng_state(), state)
