"""Reading of raw tables, with errors that name the file, row and column."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet

from errors import UserError
from storage import check_regular, check_unpacked_size, describe

CHUNK_ROWS = 250_000  # handled at once
BLOCK_BYTES = 4 << 20  # of a text file, parsed at once; a longer row is refused
TEXT = pa.large_string()
WRONG_WIDTH = re.compile(r"Row #(\d+): Expected (\d+) columns, got (\d+): (.*)", re.DOTALL)
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
    """Whether quotes in a text file enclose fields instead of being part of the text."""
    return path.suffix.lower() in QUOTED


def read_interactions(
    path: Path, columns: Mapping[str, Sequence[str]], *, separator: str = ",", header: bool = True
) -> pd.DataFrame:
    """Read interactions with the columns ``user``, ``item``, ``timestamp`` and ``rating``.

    Users and items are categories, so that an interaction takes 24 bytes however long the names
    are. Without a ``rating`` column, all ratings are infinite, so that every interaction is kept.

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
    for chunk in _chunks(path, columns, ("rating",), separator, header):
        for name, known in names.items():
            empty = pc.index(chunk[name], "").as_py()
            if empty >= 0:
                raise UserError(f"{path} row {empty + row}: {name} is empty")
            known.add(chunk[name])
        times = _series(chunk, "timestamp")
        dates = are_dates(times) if dates is None else dates
        parts["timestamp"].append(to_times(times, path, first_row=row, dates=dates))
        if "rating" in chunk.schema.names:
            parts["rating"].append(to_numbers(_series(chunk, "rating"), path, first_row=row))
        row += len(chunk)
    values = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    ratings = values.pop("rating", np.broadcast_to(np.inf, len(values["timestamp"])))
    categories = {name: names.pop(name).categories() for name in list(names)}
    return pd.DataFrame(categories | values | {"rating": ratings}, copy=False)


class _Names:
    """Codes of names by first occurrence, found without a Python object for each name."""

    def __init__(self) -> None:
        self._codes: list[np.ndarray] = []
        self._known = pa.array([], TEXT)
        self._waiting: list[pa.DictionaryArray] = []
        self._num_waiting = 0

    def add(self, column: pa.Array) -> None:
        """Append the names of a chunk."""
        self._waiting.append(column.dictionary_encode())
        self._num_waiting += len(self._waiting[-1].dictionary)
        if self._num_waiting > len(self._known):  # amortizes hashing of the known names
            self._unify()

    def _unify(self) -> None:
        """Assign codes to the waiting names; known names keep theirs."""
        known = pa.DictionaryArray.from_arrays(pa.array([], pa.int32()), self._known)
        _, *chunks = pa.chunked_array([known, *self._waiting]).unify_dictionaries().chunks
        self._codes += [chunk.indices.to_numpy() for chunk in chunks]
        self._known = chunks[0].dictionary if chunks else self._known
        self._waiting, self._num_waiting = [], 0

    def categories(self) -> pd.Categorical:
        """The names of all rows."""
        self._unify()
        names = pd.Index(pd.arrays.ArrowExtensionArray(pa.chunked_array([self._known])))
        return pd.Categorical.from_codes(np.concatenate(self._codes), categories=names)


def _series(chunk: pa.RecordBatch, name: str) -> pd.Series:
    """A column of text, without a Python object for each row."""
    return pd.Series(pd.arrays.ArrowExtensionArray(pa.chunked_array([chunk[name]])), name=name)


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
    table = pa.Table.from_batches(_chunks(path, columns, optional, separator, header))
    return pd.DataFrame(
        {name: table[name].to_pylist() for name in table.column_names}, dtype=object
    )


def _chunks(
    path: Path,
    columns: Mapping[str, Sequence[str]],
    optional: Sequence[str],
    separator: str,
    header: bool,
) -> Iterator[pa.RecordBatch]:
    """Up to ``CHUNK_ROWS`` rows of text at a time; see ``read_columns``."""
    is_empty = True
    with _problems_explained(path):
        check_regular(path)
        is_parquet = path.suffix.lower() == ".parquet"
        batches = _parquet_batches(path) if is_parquet else _text_batches(path, separator, header)
        for batch in batches:
            chosen = _chosen(path, batch, columns, optional, header)
            for start in range(0, len(batch), CHUNK_ROWS):
                is_empty = False
                yield chosen.slice(start, CHUNK_ROWS)
    if is_empty:
        raise UserError(f"{path} is empty")


def _chosen(
    path: Path,
    batch: pa.RecordBatch,
    columns: Mapping[str, Sequence[str]],
    optional: Sequence[str],
    header: bool,
) -> pa.RecordBatch:
    """Pick the columns, by the file's header or in the given order."""
    if header:
        found = find_columns(path, batch.schema.names, columns, optional)
    else:
        found = {name: index for index, name in enumerate(columns)}
        if batch.num_columns < len(columns):
            raise UserError(
                f"{path} has {batch.num_columns} columns but needs {', '.join(columns)}"
            )
    return pa.RecordBatch.from_arrays([batch.column(i) for i in found.values()], names=list(found))


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
    """Whether a column of times begins with something other than a number."""
    return bool(pd.to_numeric(column.iloc[:1].astype(object), errors="coerce").isna().any())


def to_times(column: pd.Series, path: Path, *, first_row: int, dates: bool) -> np.ndarray:
    """Convert a column of strings to times.

    Args:
        column: numbers, or dates in ISO 8601 with or without a time zone.
        path: see ``to_numbers``.
        first_row: see ``to_numbers``.
        dates: whether the values are dates, see ``are_dates``.

    Returns:
        (n,) numbers as they are, or int64 microseconds since 1970 for dates.

    Raises:
        UserError: a value is something else.
    """
    if not dates:
        return to_numbers(column, path, first_row=first_row)
    times = pd.to_datetime(column.astype(object), format="ISO8601", utc=True, errors="coerce")
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
    texts = pa.array(column, TEXT)
    if pc.all(pc.ascii_is_decimal(texts)).as_py():
        with suppress(pa.ArrowInvalid):  # beyond int64
            return pc.cast(texts, pa.int64()).to_numpy()
    values = pd.to_numeric(column.astype(object), errors="coerce").to_numpy()
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
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as error:  # pandas and pyarrow do not document what they raise
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{path} is not UTF-8 text: save it in that encoding") from error
        if "Empty CSV file" in str(error):
            raise UserError(f"{path} is empty") from None
        raise UserError(f"cannot read {path}: {describe(error)}") from error


def _text_batches(path: Path, separator: str, header: bool) -> Iterator[pa.RecordBatch]:
    quoted = has_quotes(path)
    options: dict[str, Any] = {
        # Only with a single thread does pyarrow count rows for its error messages.
        "read_options": csv.ReadOptions(
            use_threads=False, block_size=BLOCK_BYTES, autogenerate_column_names=not header
        ),
        "parse_options": csv.ParseOptions(
            delimiter=separator, quote_char='"' if quoted else False, newlines_in_values=quoted
        ),
    }
    last = None
    try:
        with csv.open_csv(path, **options) as reader:
            as_text = csv.ConvertOptions(column_types=dict.fromkeys(reader.schema.names, TEXT))
        with csv.open_csv(path, **options, convert_options=as_text) as reader:
            for batch in reader:
                last = batch if len(batch) else last
                yield batch
    except pa.ArrowInvalid as error:
        with path.open(encoding="utf-8") as file:  # another encoding also makes rows look wrong
            while file.read(BLOCK_BYTES):
                pass
        raise ValueError(_explained(str(error), quoted)) from error
    if quoted and last is not None:
        _check_quote_closed(path, last.columns[-1][-1].as_py())


def _explained(problem: str, quoted: bool) -> str:
    """What is wrong with a row, from pyarrow's message, which quotes the beginning of the row."""
    found = WRONG_WIDTH.search(problem)
    if not found:
        return problem
    row, expected, actual, text = found.groups()
    explained = f"Expected {expected} fields in line {row}, saw {actual}"
    if int(actual) > int(expected):
        explained += "; its rows have more fields than its first line"
    elif quoted and text.count('"') % 2:
        explained += "; a quote in it may not be closed"
    return explained


def _check_quote_closed(path: Path, last_field: str) -> None:
    """Refuse a file whose last field would hold all rows after a quote that is never closed.

    Raises:
        ValueError: it is such a file.
    """
    if "\n" not in last_field and "\r" not in last_field:
        return
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 64), os.SEEK_END)
        if not file.read().rstrip().endswith(b'"'):
            raise ValueError("a quote is never closed")


def _parquet_batches(path: Path) -> Iterator[pa.RecordBatch]:
    with parquet.ParquetFile(path) as file:
        metadata = file.metadata
        # Repeated values take no space in the file but 8 bytes each in memory.
        check_unpacked_size(path, 8 * metadata.num_rows * metadata.num_columns)
        groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
        check_unpacked_size(path, sum(group.total_byte_size for group in groups))
        for batch in file.iter_batches(CHUNK_ROWS):
            columns = [_to_text(column) for column in batch.columns]
            yield pa.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _to_text(column: pa.Array) -> pa.Array:
    """A Parquet file's column as text, in pandas' notation; nulls are empty."""
    if column.null_count == 0 and pa.types.is_integer(column.type):
        return column.cast(TEXT)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return column.fill_null("").cast(TEXT)
    texts = column.to_pandas().astype("string").fillna("")
    return pa.array(texts.astype(object), TEXT)
