"""Reading of raw tables, with errors that name the file, row and column."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow import parquet

from errors import UserError
from storage import check_regular, check_unpacked_size, describe

CHUNK_ROWS = 250_000  # read at once; a row of text takes some 200 bytes in memory
SEPARATORS = {".csv": ",", ".tsv": "\t", ".inter": "\t", ".item": "\t", ".parquet": ""}
QUOTED = (".csv", ".tsv")  # quotes in MovieLens' and RecBole's own files are part of the text


def find_separator(path: Path) -> str:
    """Field separator of a table, by the end of its name in upper or lower case.

    Returns:
        The separator; empty for a Parquet file.

    Raises:
        UserError: the name ends in something else.
    """
    suffix = path.suffix.lower()
    if suffix not in SEPARATORS:
        raise UserError(f"{path}: its name must end in {', '.join(SEPARATORS)}")
    return SEPARATORS[suffix]


def has_quotes(path: Path) -> bool:
    """Whether quotes in a text file enclose a field, and are not part of the text."""
    return path.suffix.lower() in QUOTED


def read_interactions(
    path: Path, columns: Mapping[str, Sequence[str]], *, separator: str = ",", header: bool = True
) -> pd.DataFrame:
    """Read interactions with the columns ``user``, ``item``, ``timestamp`` and ``rating``.

    Users and items are categories, so that an interaction takes 24 bytes, however long the names.
    Without a ``rating`` column, all ratings are infinite, so that every interaction is kept.

    Args:
        path: see ``read_columns``.
        columns: see ``read_columns``.
        separator: see ``read_columns``.
        header: see ``read_columns``.

    Raises:
        UserError: the table cannot be read, a user or item is empty, a timestamp is neither a
            finite number nor a date in ISO 8601, or a rating is not a finite number.
    """
    row = 2 if header else 1
    names = {"user": _Names(), "item": _Names()}
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    dates = None
    for table in _chunks(path, columns, ("rating",), separator, header):
        for name, known in names.items():
            is_empty = (table[name] == "").to_numpy()
            if is_empty.any():
                raise UserError(f"{path} row {int(is_empty.argmax()) + row}: {name} is empty")
            parts[name].append(known.codes(table[name]))
        dates = are_dates(table["timestamp"]) if dates is None else dates
        parts["timestamp"].append(to_times(table["timestamp"], path, first_row=row, dates=dates))
        if "rating" in table:
            parts["rating"].append(to_numbers(table["rating"], path, first_row=row))
        row += len(table)
    values = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    categories = {name: known.categories(values[name]) for name, known in names.items()}
    return pd.DataFrame({"rating": np.inf} | values | categories)[
        ["user", "item", "timestamp", "rating"]
    ]


class _Names:
    """Codes of names, by first occurrence."""

    def __init__(self) -> None:
        self.code_of: dict[str, int] = {}

    def codes(self, column: pd.Series) -> np.ndarray:
        """(n,) int32 codes; names that are new get the next ones."""
        codes, distinct = pd.factorize(column)
        code_of = self.code_of
        known = (code_of.setdefault(name, len(code_of)) for name in distinct)
        return np.fromiter(known, np.int32, len(distinct))[codes]

    def categories(self, codes: np.ndarray) -> pd.Categorical:
        """The names of codes (n,)."""
        return pd.Categorical.from_codes(codes, categories=pd.Index(self.code_of, dtype=object))


def read_columns(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    *,
    optional: Sequence[str] = (),
    separator: str = ",",
    header: bool = True,
) -> pd.DataFrame:
    """Read columns of a delimited text file or a Parquet file as strings.

    Args:
        path: a Parquet file if its name ends in ``.parquet``, otherwise a text file in UTF-8.
        columns: the columns to read, each with other names it may have in the file, in order of
            preference. Without a header, they are the first columns of the file, in this order.
        optional: columns that may be absent.
        separator: field separator of a text file.
        header: whether the first line has the column names, in upper or lower case. A RecBole type
            after a colon, as in ``item_id:token``, is not part of the name.

    Raises:
        UserError: the file cannot be read, is empty, lacks a column or has it twice.
    """
    return pd.concat(_chunks(path, columns, optional, separator, header), ignore_index=True)


def _chunks(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    optional: Sequence[str],
    separator: str,
    header: bool,
) -> Iterator[pd.DataFrame]:
    """Up to ``CHUNK_ROWS`` rows at a time; see ``read_columns``."""
    is_empty = True
    with _problems_explained(path):
        check_regular(path)
        is_parquet = path.suffix.lower() == ".parquet"
        tables = _parquet_chunks(path) if is_parquet else _text_chunks(path, separator, header)
        for table in tables:
            if len(table):
                is_empty = False
                yield _named(path, table, columns, optional, header)
    if is_empty:
        raise UserError(f"{path} is empty")


def _named(
    path: Path,
    table: pd.DataFrame,
    columns: Mapping[str, Sequence[str]],
    optional: Sequence[str],
    header: bool,
) -> pd.DataFrame:
    """Pick the columns, by the file's header or in the given order."""
    if header:
        found = find_columns(path, table.columns, columns, optional)
        return pd.DataFrame({name: table.iloc[:, index] for name, index in found.items()})
    if table.shape[1] < len(columns):
        raise UserError(f"{path} has {table.shape[1]} columns but needs {', '.join(columns)}")
    return table.iloc[:, : len(columns)].set_axis(list(columns), axis=1)


def find_columns(
    path: Path,
    header: Iterable[object],
    columns: Mapping[str, Sequence[str]],
    optional: Sequence[str] = (),
) -> dict[str, int]:
    """Find columns in a header; arguments as in ``read_columns``.

    Returns:
        Index in the header by column.

    Raises:
        UserError: a column is absent or occurs twice.
    """
    names = [str(name).split(":")[0].strip() for name in header]
    given = {name.lower(): name for name in reversed(names)}
    given |= {name: name for name in names}  # the same case first
    found = {}
    for column, other_names in columns.items():
        known = (given.get(name, given.get(name.lower())) for name in (column, *other_names))
        name = next((name for name in known if name is not None), None)
        if name is None:
            if column in optional:
                continue
            alternatives = f" (or {', '.join(other_names)})" if other_names else ""
            raise UserError(
                f"{path} lacks the column {column}{alternatives}; it has {', '.join(names)}"
            )
        if names.count(name) > 1:
            raise UserError(f"{path} has two columns {name}: rename one")
        found[column] = names.index(name)
    return found


def are_dates(column: pd.Series) -> bool:
    """Whether a column of times begins with something else than a number."""
    return bool(pd.to_numeric(column.iloc[:1], errors="coerce").isna().any())


def to_times(column: pd.Series, path: Path, *, first_row: int, dates: bool) -> np.ndarray:
    """Convert a column of strings to times: numbers, or dates in ISO 8601 with or without a time
    zone; other arguments as in ``to_numbers``.

    Args:
        dates: whether the values are dates, see ``are_dates``.

    Returns:
        (n,) numbers as they are, or int64 microseconds since 1970.

    Raises:
        UserError: a value is something else.
    """
    if not dates:
        return to_numbers(column, path, first_row=first_row)
    times = pd.to_datetime(column, format="ISO8601", utc=True, errors="coerce")
    is_invalid = times.isna().to_numpy()
    if is_invalid.any():
        index = int(is_invalid.argmax())
        raise UserError(
            f"{path} row {index + first_row}: {column.name} '{column.iloc[index][:50]}' is neither "
            "a number nor a date like 2014-07-23 or 2014-07-23T18:30:00"
        )
    return times.dt.as_unit("us").astype("int64").to_numpy()


def to_numbers(column: pd.Series, path: Path, *, first_row: int) -> np.ndarray:
    """Convert a column of strings to finite numbers.

    Args:
        column: the strings.
        path: file of the column, for the error message.
        first_row: row of the file that holds the first value, for the error message.

    Returns:
        (n,) int64 if all values fit, since float64 would round those above 2^53; otherwise
        float64.

    Raises:
        UserError: a value is not a finite number.
    """
    values = pd.to_numeric(column, errors="coerce").to_numpy()
    if values.dtype != np.int64:
        values = values.astype(np.float64)
    is_invalid = ~np.isfinite(values)
    if is_invalid.any():
        index = int(is_invalid.argmax())
        raise UserError(
            f"{path} row {index + first_row}: {column.name} '{column.iloc[index][:50]}' "
            "is not a number"
        )
    return values


@contextmanager
def _problems_explained(path: Path) -> Iterator[None]:
    """Raise a ``UserError`` for whatever a parser raises on a damaged file."""
    try:
        yield
    except UserError:
        raise
    except pd.errors.EmptyDataError:
        raise UserError(f"{path} is empty") from None
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: save it in that encoding") from error
    except pd.errors.ParserError as error:
        problem = describe(error).removeprefix("Error tokenizing data. C error: ")
        raise UserError(f"cannot read {path}: {problem}") from error
    except Exception as error:  # pandas and pyarrow do not document what they raise
        raise UserError(f"cannot read {path}: {describe(error)}") from error


def _text_chunks(path: Path, separator: str, header: bool) -> Iterator[pd.DataFrame]:
    with pd.read_csv(
        path,
        sep=separator,
        header=0 if header else None,
        dtype=object,
        keep_default_na=False,
        na_filter=False,
        encoding="utf-8-sig",
        quoting=csv.QUOTE_MINIMAL if has_quotes(path) else csv.QUOTE_NONE,
        chunksize=CHUNK_ROWS,
    ) as tables:
        for table in tables:
            if not isinstance(table.index, pd.RangeIndex):  # the first column as row names
                raise ValueError("its rows have more fields than its first line")
            yield table


def _parquet_chunks(path: Path) -> Iterator[pd.DataFrame]:
    with parquet.ParquetFile(path) as file:
        metadata = file.metadata
        # Repeated values take no space in the file but 8 bytes each in memory.
        check_unpacked_size(path, 8 * metadata.num_rows * metadata.num_columns)
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        check_unpacked_size(path, sum(group.total_byte_size for group in groups))
        for batch in file.iter_batches(CHUNK_ROWS):
            strings = batch.to_pandas().apply(lambda column: column.astype("string").fillna(""))
            yield strings.astype(object)
