"""Files that are either whole or not there: atomic writes, guarded reads, exact JSON."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError

from config import UserError

_UMASK = os.umask(0)
os.umask(_UMASK)
# What a compressed file may unpack to, far above what the project reads: a small file that unpacks
# without end would fill the disk or the memory.
MAX_UNPACKED = 4 << 30


def reason(error: BaseException) -> str:
    """What an error says, in one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(text).split())[:200]


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[None]:
    """Turn whatever goes wrong while a file is read into one message that names it.

    No parser says what all it may raise at damaged bytes, so nothing is excepted.

    Args:
        path: the file.
        remedy: what the user can do.

    Raises:
        UserError: the block failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path} is damaged ({reason(error)}): {remedy}") from error


def check_unpacked(path: Path, size: int) -> None:
    """Refuse to unpack more than ``MAX_UNPACKED`` bytes.

    Raises:
        UserError: ``size`` is more.
    """
    if size > MAX_UNPACKED:
        raise UserError(
            f"{path} unpacks to more than {MAX_UNPACKED / 2**30:g} GiB, which is refused: "
            "delete it or name another"
        )


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Make a folder for the block; it and its new parents go again if they stay empty."""
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` that takes its place once the block succeeds.

    Raises:
        UserError: the folder or the disk does not let the file be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with made_folder(path.parent):
            try:
                yield temporary
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o666 & ~_UMASK)  # some writers make files private
                os.replace(temporary, path)
            finally:
                with suppress(OSError):
                    temporary.unlink()
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that takes the place of ``path`` once the block succeeds.

    Raises:
        UserError: the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {reason(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Take away what a killed process was writing; nobody else may be writing there.

    safetensors writes by way of temporary files of its own, ``.tmp`` and six letters.
    """
    for path in (*folder.glob(".*.tmp"), *folder.glob(".tmp??????")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON; floats keep every digit."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        UserError: the file is missing or holds no such thing.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"cannot read {path}: it holds no JSON object")
    return value


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz`` file without pickle, for use within ``reading``."""
    with zipfile.ZipFile(path) as zipped:
        check_unpacked(path, sum(member.file_size for member in zipped.infolist()))
    with np.load(path, allow_pickle=False) as file:
        return {name: np.asarray(file[name]) for name in file.files}
