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

from config import UserError
from datasets.base import clean_title


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
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
            table = table.apply(lambda column: column.astype("string").fillna("")).astype(object)
        else:
            table = pd.read_csv(
                path,
                sep=separator,
                header=0 if header else None,
                dtype=object,
                keep_default_na=False,
                na_filter=False,
                encoding="utf-8",
                quoting=3 if separator == "\t" else 0,
            )
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read {path}: {reason}") from error
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
            found[wanted] = table[name].astype(object)
    return pd.DataFrame(found)


def to_number(column: pd.Series, path: Path, *, first_row: int) -> np.ndarray:
    """A text column as finite floats.

    Raises:
        UserError: a value is no number; names the file's row, the first of which is ``first_row``.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(bad.argmax())
        raise UserError(
            f"{path} row {row + first_row}: {column.name} '{column.iloc[row]}' is not a number"
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
    number = 0
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                number += 1
                try:
                    record = json.loads(line)
                except ValueError:
                    record = ast.literal_eval(line)  # the 2014 files; reads literals, runs nothing
                title = clean_title(str(record.get("title") or ""))
                if title:
                    titles[str(record["asin"]).strip()] = title
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (SyntaxError, ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{path} is not UTF-8 text after line {number}") from error
        raise UserError(f"{path} row {number}: no record with asin and title") from error
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(
            f"{path} is no whole gzip file: {error}; delete it to fetch it anew"
        ) from error
    if not titles:
        raise UserError(f"{path} is empty")
    return titles
