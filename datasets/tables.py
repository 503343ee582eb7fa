"""Raw tables read with errors that name the file, the row and the column."""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import parquet

from config import UserError
from datasets.base import clean_title
from storage import check_unpacked, reason

LONGEST_LINE = 16 << 20  # bytes of a record; some have long descriptions


def read_columns(
    path: Path,
    columns: dict[str, Sequence[str]],
    *,
    optional: Sequence[str] = (),
    separator: str = ",",
    header: bool = True,
) -> pd.DataFrame:
    """Read columns of a delimited text or Parquet file as text.

    Args:
        path: the file; ``.parquet`` is read as Parquet, anything else as UTF-8 text.
        columns: for each column wanted, the names it may have in the file, best first. Without a
            header, columns are taken in this order.
        optional: wanted columns that may be absent.
        separator: between the fields of a text file.
        header: whether the first line names the columns. A RecBole type after a colon
            (``item_id:token``) is no part of a name.

    Raises:
        UserError: the file cannot be read, is empty or lacks a column.
    """
    try:
        table = _parquet(path) if path.suffix == ".parquet" else _text(path, separator, header)
    except UserError:
        raise
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"cannot read {path}: it is not UTF-8 text, save it as such") from error
    except Exception as error:  # pandas and pyarrow do not say what they raise
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if len(table) == 0:
        raise UserError(f"{path} is empty")
    if header:
        table.columns = [str(name).split(":")[0].strip() for name in table.columns]
    elif table.shape[1] < len(columns):
        raise UserError(f"{path} has {table.shape[1]} columns, it needs {', '.join(columns)}")
    else:
        table = table.iloc[:, : len(columns)].set_axis(list(columns), axis=1)
    found = {}
    for wanted, names in columns.items():
        name = next((n for n in (wanted, *names) if n in table.columns), None)
        if name is None and wanted not in optional:
            raise UserError(
                f"{path} lacks the column {wanted}"
                + (f" (or {', '.join(names)})" if names else "")
                + f"; it has {', '.join(map(str, table.columns))}"
            )
        if name is not None:
            if list(table.columns).count(name) > 1:
                raise UserError(f"{path} has two columns {name}: rename one")
            found[wanted] = table[name]
    return pd.DataFrame(found)


def _text(path: Path, separator: str, header: bool) -> pd.DataFrame:
    table = pd.read_csv(
        path,
        sep=separator,
        header=0 if header else None,
        dtype=object,
        keep_default_na=False,
        na_filter=False,
        encoding="utf-8-sig",
        quoting=3 if separator == "\t" else 0,
    )
    if not isinstance(table.index, pd.RangeIndex):  # pandas would take the first for row names
        raise ValueError("its rows have more fields than its first line")
    return table


def _parquet(path: Path) -> pd.DataFrame:
    with parquet.ParquetFile(path) as file:
        metadata = file.metadata
        # Repeated values take no room in the file, but 8 bytes each here.
        check_unpacked(path, 8 * metadata.num_rows * metadata.num_columns)
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        check_unpacked(path, sum(group.total_byte_size for group in groups))
        table = file.read().to_pandas()
    return table.apply(lambda column: column.astype("string").fillna("")).astype(object)


def to_number(column: pd.Series, path: Path, *, first_row: int) -> np.ndarray:
    """A text column as finite numbers: int64 where all are, as floats round what is beyond 2^53.

    Raises:
        UserError: a value is no number; names the file's row, the first of which is ``first_row``.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy()
    if values.dtype != np.int64:
        values = values.astype(np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{path} row {row + first_row}: {column.name} '{column.iloc[row][:50]}' is not a number"
        )
    return values


def interactions(
    path: Path, columns: dict[str, Sequence[str]], *, separator: str = ",", header: bool = True
) -> pd.DataFrame:
    """Interactions with the columns ``user``, ``item``, ``timestamp`` and ``rating``.

    A missing ``rating`` column means that every interaction counts.

    Raises:
        UserError: see ``read_columns``; also an empty user or item, and numbers that are none.
    """
    table = read_columns(path, columns, optional=("rating",), separator=separator, header=header)
    first_row = 2 if header else 1
    for name in ("user", "item"):
        empty = (table[name] == "").to_numpy()
        if empty.any():
            raise UserError(f"{path} row {int(empty.argmax()) + first_row}: {name} is empty")
    table["timestamp"] = to_number(table["timestamp"], path, first_row=first_row)
    table["rating"] = (
        to_number(table["rating"], path, first_row=first_row) if "rating" in table else np.inf
    )
    return table[["user", "item", "timestamp", "rating"]]


def amazon_titles(path: Path) -> dict[str, str]:
    """Titles by item from Amazon metadata: gzip, one JSON object or Python literal a line.

    Raises:
        UserError: the file is missing, truncated, or a line is no record.
    """
    titles: dict[str, str] = {}
    number = size = 0
    try:
        with gzip.open(path, "rb") as file:
            while line := file.readline(LONGEST_LINE):
                number += 1
                size += len(line)
                if len(line) == LONGEST_LINE:
                    raise UserError(f"{path} row {number}: longer than {LONGEST_LINE:,} bytes")
                check_unpacked(path, size)
                asin, title = _record(line.decode())
                if title:
                    titles[asin] = title
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} is no whole gzip file: {reason(error)}; delete it to fetch it anew"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} row {number} is not UTF-8 text") from error
    except Exception as error:  # what parsers raise depends on what they are given
        raise UserError(f"{path} row {number}: no record with asin and title") from error
    if not titles:
        raise UserError(f"{path} is empty")
    return titles


def _record(line: str) -> tuple[str, str]:
    """An item's asin and title; an item without a title needs no asin."""
    try:
        record = json.loads(line)
    except ValueError:
        record = ast.literal_eval(line)  # the 2014 files; reads literals, runs nothing
    title = clean_title(str(record.get("title") or ""))
    return str(record["asin"]).strip() if title else "", title
