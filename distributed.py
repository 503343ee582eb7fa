"""Several processes that work on one run, started by torchrun or ``accelerate launch``.

All of them run the same script on the same files. In training, each computes its share of a step's
examples; in evaluation, each of n processes takes every n-th batch. They exchange what they
computed, so that all hold exactly the same weights and results. Process 0, the main one, checks the
input before the others start, and it alone writes files and prints.

Without a launcher there is one process, and the functions here have nothing to do. torch is
imported only if there are several.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from errors import UserError

PATIENCE = timedelta(days=1)  # one process may wait for another's download or evaluation
P = ParamSpec("P")
T = TypeVar("T")


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the process that writes and prints."""
    return rank() == 0


def in_main_process(function: Callable[P, None]) -> Callable[P, None]:
    """Make a function do nothing in the other processes."""

    @wraps(function)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            function(*args, **kwargs)

    return wrapped


@contextmanager
def joined() -> Iterator[None]:
    """Run the block in every process; all but the main one start later and print nothing.

    The main process calls ``join`` in the block, after its checks. If these fail, the launcher ends
    the others. At the end, all wait for each other: a process that crashed while exiting would make
    the launcher end a main process that is still writing. All but the main one exit here.
    """
    if is_main():
        yield
    else:
        join()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    if size() > 1:
        from torch import distributed

        wait()
        distributed.destroy_process_group()
        if not is_main():
            leave()


def leave() -> None:
    """Exit at once if there are several processes; call it when everything is written.

    torch's threads can abort an interpreter that shuts down in the usual way.
    """
    if size() > 1:
        os._exit(0)


def join() -> None:
    """Wait until all processes have joined; without effect the second time."""
    if size() == 1:
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # one in Python would not run meanwhile
    try:
        # Gradients are exchanged on the device, everything else on the host.
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        with _others_watched():
            distributed.init_process_group(backend, timeout=PATIENCE)
    finally:
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _others_watched() -> Iterator[None]:
    """Explain why an exchange with the other processes failed.

    Raises:
        UserError: another process has ended.
    """
    try:
        yield
    except RuntimeError as error:
        raise UserError(
            "lost contact with the other processes of the run: see their messages, then continue "
            "with --resume"
        ) from error


def wait() -> None:
    """Wait until all processes get here, so that they find what the main one has written."""
    largest(0)


@contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the main process first, so that the others find what it has cached."""
    if not is_main():
        wait()
    yield
    if is_main():
        wait()


def total(number: int) -> int:
    """Sum of every process's number."""
    return _reduced(number, "SUM")


def largest(number: int) -> int:
    """Largest of every process's number."""
    return _reduced(number, "MAX")


def _reduced(number: int, operation: str) -> int:
    if size() == 1:
        return number
    import torch
    from torch import distributed

    numbers = torch.tensor([number])
    with _others_watched():
        distributed.all_reduce(numbers, op=getattr(distributed.ReduceOp, operation))
    return int(numbers)


def add_up(tensors: Sequence[Any]) -> None:
    """Replace tensors, in place, by their sums over all processes; all get the same bits."""
    if size() == 1:
        return
    import torch
    from torch import distributed

    flat = torch.cat([tensor.flatten() for tensor in tensors])  # one exchange instead of many
    with _others_watched():
        distributed.all_reduce(flat)
    for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
        tensor.copy_(summed.view_as(tensor))


def gather(value: T) -> list[T]:
    """Return every process's value, in order."""
    if size() == 1:
        return [value]
    from torch import distributed

    values: list[Any] = [None] * size()
    with _others_watched():
        distributed.all_gather_object(values, value)
    return values


def smallest(number: int) -> int:
    """Smallest of every process's number."""
    return -largest(-number)


def is_sharded(model: Any) -> bool:
    """Whether a model's weights are split among the processes, see ``model.sharding``."""
    if size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def repeats(count: int, batch: T) -> list[T]:
    """Batches that a process must repeat so that all processes run equally many.

    If its weights are sharded, all processes must call the model equally often.

    Args:
        count: number of batches that this process has, possibly none.
        batch: one of them; any value if there are none.

    Returns:
        The batch as often as needed; a process without batches gets the main process's.
    """
    missing = largest(count) - count
    if smallest(count) == 0:
        main = from_main(batch)
        batch = batch if count else main
    return [batch] * missing


def from_main(value: T) -> T:
    """Return the main process's value."""
    return gather(value)[0]


def interleave(values: list[T]) -> list[T]:
    """Restore the order of a list if process r of n holds the values r, r + n, r + 2n, ..."""
    shares = gather(values)
    return [shares[i % size()][i // size()] for i in range(sum(map(len, shares)))]
