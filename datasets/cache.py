"""Cache of preprocessed data sets, keyed by everything that determines them."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np

from datasets.base import Filters, RawSource, SequenceDataset
from datasets.preprocessing import build
from errors import UserError
from storage import (
    check_regular,
    describe,
    map_arrays,
    reading,
    remove_left_behind,
    write_mappable_arrays,
)

CACHE_FORMAT = 5  # increment when preprocessing or the arrays in the file change
MAX_STEM = 40  # characters of a file's name in a code, at most four bytes each


def build_cached(source: RawSource, filters: Filters, cache_root: Path) -> SequenceDataset:
    """Read a data set from the cache, or build and cache it if that is missing or outdated.

    Raises:
        ArgumentError: see ``preprocessing.build``.
        InputError: no interactions remain.
        UserError: raw files cannot be downloaded or used, or the cache cannot be written.
    """
    source.fetch()
    content = _hash_files(source)
    code = source.code or _code_by_content(source, content)
    key = hashlib.sha256(json.dumps([CACHE_FORMAT, code, *filters]).encode() + content).hexdigest()
    path = cache_root / f"{code}.npz"
    data = note = None
    if path.exists():
        note = f"note: {path} was built from other files or with other filters: rebuilt"
        try:
            data = _read_cache(path, key, code)
        except UserError as error:
            note = f"note: {error}: rebuilt"
    if data is None:
        data = build(code, source.read(), filters)
        _write_cache(path, key, data)
        if note:
            print(note, file=sys.stderr)
    if filters == Filters():
        _compare_with_paper(data, source.statistics)
    return data


def _hash_files(source: RawSource) -> bytes:
    """SHA-256 of each raw file, one after the other."""
    hashes = []
    for path in source.files:
        check_regular(path)
        try:
            with open(path, "rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read {path}: {describe(error)}") from error
    return b"".join(hashes)


def _code_by_content(source: RawSource, content: bytes) -> str:
    """A code for a user's files that differs whenever their content does."""
    stem = re.sub(r"[^\w.-]", "_", source.files[0].stem)[:MAX_STEM]
    return f"{stem}-{hashlib.sha256(content).hexdigest()[:8]}"


def _write_cache(path: Path, key: str, data: SequenceDataset) -> None:
    text = {
        "titles": data.titles,
        "user_names": data.user_names,
        "item_names": data.item_names,
        "key": key,
        "fingerprint": data.fingerprint,
        "num_tied_targets": data.num_tied_targets,
    }
    remove_left_behind(path)
    write_mappable_arrays(
        path,
        item_ids=data.item_ids,
        offsets=data.offsets,
        text=np.frombuffer(json.dumps(text).encode(), dtype=np.uint8),
    )


def _read_cache(path: Path, key: str, code: str) -> SequenceDataset | None:
    """Map the cached data set; None if it was stored under another key.

    Raises:
        UserError: the file is damaged.
    """
    with reading(path):
        arrays = map_arrays(path)
        text = json.loads(arrays["text"].tobytes())
        if text.pop("key") != key:
            return None
        return SequenceDataset(
            code=code, item_ids=arrays["item_ids"], offsets=arrays["offsets"], **text
        )


def _compare_with_paper(data: SequenceDataset, reported: tuple[int, int, int] | None) -> None:
    """Print a note if the statistics differ from those that the paper reports."""
    if reported not in (None, (data.num_users, data.num_items, len(data.item_ids))):
        statistics = "{:,} users, {:,} items, {:,} interactions".format(*reported)
        print(f"note: the paper reports {statistics} for {data.code}", file=sys.stderr)
