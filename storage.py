"""Files that are either complete or absent: atomic writes, guarded reads, lossless JSON."""

from __future__ import annotations

import glob
import json
import os
import shutil
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from safetensors import SafetensorError

from errors import InputError, UserError

_UMASK = os.umask(0)
os.umask(_UMASK)
# Upper bound on the size of a decompressed file, far above anything the project reads. It protects
# against small files that would decompress until the disk or memory is full.
MAX_UNPACKED_BYTES = 4 << 30
READ_BYTES = 1 << 24  # read at once when only the checksum is needed
# Parts of a zip file: the header before a member's data, the start of an extra field in it, and the
# size of the extra field for members beyond 4 GiB.
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
EXTRA_FIELD = struct.Struct("<2H")
ZIP64_SIZE = 20
PADDING_ID = 0xD935  # zipalign's id for an extra field of padding
ALIGNMENT = 64


def describe(error: BaseException) -> str:
    """The message of an exception, on one line of at most 200 characters."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, KeyError) and error.args:  # str gives the key in quotes
        key = str(error.args[0])
        text = key if " " in key else f"no '{key}'"
    return " ".join(str(text).split())[:200]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn any failure to read a file into one message that names the file.

    Parsers do not document every exception that damaged input can raise, so all are caught.

    Args:
        path: the file that the block reads.

    Raises:
        InputError: the block failed.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise InputError(f"{path} is damaged ({describe(error)})") from error


def check_regular(path: Path) -> None:
    """Refuse folders, and pipes, which could block forever; a missing file passes.

    Raises:
        UserError: ``path`` is one of them.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file")


def check_unpacked_size(path: Path, size: int) -> None:
    """Refuse to decompress a file beyond ``MAX_UNPACKED_BYTES``.

    Raises:
        UserError: ``size`` is larger.
    """
    if size > MAX_UNPACKED_BYTES:
        raise UserError(
            f"{path} unpacks to more than {MAX_UNPACKED_BYTES / 2**30:g} GiB, which is refused: "
            "delete it or use another file"
        )


@contextmanager
def temporary_unless_used(path: Path) -> Iterator[None]:
    """Create a folder for the block; it and any parents created with it are removed if empty."""
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        path.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        with suppress(OSError):
            for folder in created:
                folder.rmdir()


def _temporary_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` and rename it to ``path`` if the block succeeds.

    Raises:
        UserError: the file cannot be written.
    """
    temporary = _temporary_path(path)
    try:
        with temporary_unless_used(path.parent):
            try:
                yield temporary
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.chmod(temporary, 0o666 & ~_UMASK)  # some libraries create private files
                os.replace(temporary, path)
            finally:
                with suppress(OSError):
                    temporary.unlink()
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {describe(error)}") from error


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``path`` if the block succeeds.

    Raises:
        UserError: the folder cannot be written.
    """
    temporary = _temporary_path(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {describe(error)}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_temporary_files(folder: Path) -> None:
    """Remove what a killed process left half written; no other process may be writing there.

    The temporary files of safetensors are named ``.tmp`` plus six letters.
    """
    for path in (*folder.glob(".*.tmp"), *folder.glob(".tmp??????")):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def remove_left_behind(path: Path) -> None:
    """Remove what killed processes of this machine left when they were writing ``path``."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = temporary.name.split(".")[-2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, complete or not at all; floats keep every digit."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        InputError: the file is missing or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read {path}: {describe(error)}") from error
    if not isinstance(value, dict):
        raise InputError(f"cannot read {path}: it holds no JSON object")
    return value


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an uncompressed ``.npz`` file, complete or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of an ``.npz`` file without pickle; use it within ``reading``."""
    with zipfile.ZipFile(path) as zipped:
        check_unpacked_size(path, sum(member.file_size for member in zipped.infolist()))
    with np.load(path, allow_pickle=False) as file:
        return {name: np.asarray(file[name]) for name in file.files}


def write_mappable_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an ``.npz`` file for ``map_arrays``, complete or not at all.

    Unlike in numpy's files, each array begins at a multiple of ``ALIGNMENT`` bytes: an extra field
    of zeros pads the header of its member.
    """
    with (
        atomic_path(path) as temporary,
        open(temporary, "wb") as target,
        zipfile.ZipFile(target, "w") as zipped,
    ):
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy")
            header = LOCAL_HEADER.size + len(member.filename) + EXTRA_FIELD.size + ZIP64_SIZE
            padding = -(target.tell() + header) % ALIGNMENT
            member.extra = EXTRA_FIELD.pack(PADDING_ID, padding) + bytes(padding)
            with zipped.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, (1, 0), allow_pickle=False)


def map_arrays(path: Path) -> dict[str, np.ndarray]:
    """Map the arrays of an uncompressed ``.npz`` file, so that processes share its pages.

    Use it within ``reading``. Checksums are verified. Arrays that are not aligned are copied.

    Returns:
        Read-only arrays by name.

    Raises:
        ValueError: an array cannot be mapped, for example because it is compressed.
    """
    arrays = {}
    with zipfile.ZipFile(path) as zipped, path.open("rb") as raw:
        check_unpacked_size(path, sum(member.file_size for member in zipped.infolist()))
        for member in zipped.infolist():
            with zipped.open(member) as file:
                version = np.lib.format.read_magic(file)
                shape, is_transposed, dtype = np.lib.format.read_array_header_1_0(file)
                header = file.tell()
                while file.read(READ_BYTES):  # at the end, zipfile compares the checksum
                    pass
            if member.compress_type or version != (1, 0) or is_transposed or dtype.hasobject:
                raise ValueError(f"{member.filename} cannot be mapped")
            raw.seek(member.header_offset)
            *_, name_size, extra_size = LOCAL_HEADER.unpack(raw.read(LOCAL_HEADER.size))
            array = np.memmap(path, dtype, "r", raw.tell() + name_size + extra_size + header, shape)
            name = member.filename.removesuffix(".npy")
            arrays[name] = np.asarray(array) if array.flags.aligned else np.array(array)
    return arrays
