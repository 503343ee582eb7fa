import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch

import process
from errors import ArgumentError, UserError
from process import (
    ACCELERATE_SETTINGS,
    Terminated,
    check_device,
    check_single_process,
    deferred_signals,
    has_cuda_driver,
    raise_interrupt,
    set_up,
    use_cuda,
)

# Signals ----------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _default_handlers() -> Iterator[None]:
    """Handle signals as in a terminal; a shell starts background jobs with SIGINT ignored."""
    sigint = signal.signal(signal.SIGINT, signal.default_int_handler)
    sigterm = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGINT, sigint)
    signal.signal(signal.SIGTERM, sigterm)


def test_sigterm_raises_like_ctrl_c(monkeypatch: pytest.MonkeyPatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    set_up()
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    assert issubclass(Terminated, KeyboardInterrupt)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    assert os.environ["GOMP_SPINCOUNT"] == "1000"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GOMP_SPINCOUNT")
    set_up()
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"  # the user's choice wins
    assert "GOMP_SPINCOUNT" not in os.environ


def test_warnings_of_libraries_are_hidden(monkeypatch: pytest.MonkeyPatch):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monkeypatch.setattr(sys, "warnoptions", ["default"])
        set_up()
        warnings.warn("soon to change", FutureWarning, stacklevel=1)
        assert len(caught) == 1  # python -W wins
        monkeypatch.setattr(sys, "warnoptions", [])
        set_up()
        warnings.warn("soon to change", FutureWarning, stacklevel=1)
        assert len(caught) == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_deferred_signals(number: signal.Signals):
    handlers = [signal.getsignal(x) for x in process.DEFERRED_SIGNALS]
    with deferred_signals() as received:
        signal.raise_signal(number)
        assert received == [number]
    assert [signal.getsignal(x) for x in process.DEFERRED_SIGNALS] == handlers


def test_signals_are_not_deferred_after_the_block():
    with pytest.raises(ZeroDivisionError), deferred_signals():
        _ = 1 / 0
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_deferred_signals_outside_the_main_thread():
    received: list[list[int]] = []

    def work() -> None:
        with deferred_signals() as signals:
            received.append(signals)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert received == [[]]


def test_raise_interrupt():
    with pytest.raises(Terminated):
        raise_interrupt(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as caught:
        raise_interrupt(signal.SIGINT)
    assert not isinstance(caught.value, Terminated)


# Devices ----------------------------------------------------------------------------------------


def test_what_needs_a_single_process(monkeypatch: pytest.MonkeyPatch):
    check_single_process()
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_single_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"started 2 processes, .*: start it with python"):
        check_single_process()


def test_accelerate_launches_one_process_on_cpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # with --num_processes 1
    check_device("cpu")
    monkeypatch.setenv("MASTER_PORT", "29500")  # with --num_processes 2
    with pytest.raises(UserError, match="use torchrun --nproc_per_node N"):
        check_device("cpu")
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_device("cpu")


def test_accelerate_launch_with_cpu(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("process.has_cuda_driver", lambda: True)
    assert use_cuda(None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    check_device(None)
    assert not use_cuda(None)
    with pytest.raises(ArgumentError, match="launched with --cpu"):
        check_device("cuda")


def test_settings_of_accelerate_in_the_environment(monkeypatch: pytest.MonkeyPatch):
    for name, unchanged in ACCELERATE_SETTINGS.items():
        monkeypatch.setenv(name, unchanged.upper())  # as its launcher sets some of them
    check_device("cpu")
    for name in ACCELERATE_SETTINGS:
        with monkeypatch.context() as other:
            other.setenv(name, "true")
            with pytest.raises(UserError, match=f"{name}=true in the environment .*: unset it"):
                check_device("cpu")


def test_cuda_without_a_driver(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("process.has_cuda_driver", lambda: False)
    check_device(None)
    check_device("cpu")
    with pytest.raises(ArgumentError) as caught:
        check_device("cuda")
    assert str(caught.value) == "device cuda: this machine has no CUDA driver; use cpu"
    monkeypatch.setattr("process.has_cuda_driver", lambda: True)
    check_device("cuda")


def test_has_cuda_driver(monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> None:
        raise OSError

    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("ctypes.CDLL", missing)
    assert not has_cuda_driver()
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    assert has_cuda_driver()
    monkeypatch.setattr("ctypes.CDLL", missing)
    monkeypatch.setattr("sys.platform", "win32")
    assert has_cuda_driver()  # only torch can tell


@pytest.mark.parametrize("available", [False, True])
def test_use_cuda(available: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert use_cuda(None) is available and use_cuda("cpu") is False
    if available:
        assert use_cuda("cuda")
    else:
        with pytest.raises(ArgumentError, match="device cuda: torch finds no CUDA device"):
            use_cuda("cuda")
