"""Read the columns of the text and of the label of a parquet file, row group by row group."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vae_ds.data.corpora.findings import Findings
from vae_ds.data.corpora.opening import unreadable
from vae_ds.data.progress import Progress
from vae_ds.errors import DataError

_ROWS_AT_ONCE = 10_000


def read_rows(
    path: Path, column: str, label_column: str | None, found: Findings
) -> Iterator[tuple[int, str | None, str | None]]:
    """The number of each row, counted from 1, its text, or None, and its label, or None.

    Texts that are not UTF-8 are added to `found`. Raises DataError if the file is not parquet or has no such columns of
    text and of labels (text, numbers or truth values).
    """
    try:
        with pq.ParquetFile(path) as file, Progress(f"Reading {path.name}", file.metadata.num_rows, "rows") as progress:
            _check_column(path, file.schema_arrow, column)
            if label_column is not None:
                _check_label_column(path, file.schema_arrow, label_column)
            first = 1
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column, *([label_column] if label_column else [])]):
                texts = _texts(batch.column(column), first, found)
                labels = _labels(batch.column(label_column)) if label_column else [None] * len(batch)
                yield from zip(range(first, first + len(batch)), texts, labels, strict=True)
                first += len(batch)
                progress.add(len(batch))
    except OSError as error:
        raise unreadable(path, error) from None
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0][:200]})") from None


def _check_column(path: Path, schema: pa.Schema, column: str) -> None:
    kind, plain = _kind(path, schema, column, "data.column")
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
        raise DataError(f"{path}: column `{column}` holds {kind}, not text; set data.column")


def _check_label_column(path: Path, schema: pa.Schema, column: str) -> None:
    kind, plain = _kind(path, schema, column, "data.label_column")
    if pa.types.is_nested(plain) or pa.types.is_binary(plain) or pa.types.is_large_binary(plain):
        raise DataError(f"{path}: column `{column}` holds {kind}, not labels; set data.label_column")


def _kind(path: Path, schema: pa.Schema, column: str, setting: str) -> tuple[pa.DataType, pa.DataType]:
    """The type of a column, and the type of its values."""
    if schema.names.count(column) != 1:
        found = "two columns" if column in schema.names else "no column"
        raise DataError(f"{path}: {found} `{column}`; found: {', '.join(schema.names)[:200]}; set {setting}")
    kind = schema.field(column).type
    return kind, kind.value_type if pa.types.is_dictionary(kind) else kind


def _labels(column: pa.Array) -> list[str | None]:
    return [None if value is None else str(value).strip() or None for value in column.to_pylist()]


def _texts(column: pa.Array, first: int, found: Findings) -> list[str | None]:
    try:
        texts: list[str | None] = column.to_pylist()
        return texts
    except UnicodeDecodeError:
        texts = []
    plain = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    for number, data in enumerate(plain.cast(pa.large_binary()).to_pylist(), first):
        try:
            texts.append(None if data is None else data.decode("utf-8"))
        except UnicodeDecodeError as error:
            found.add_bad(number, f"not UTF-8 at byte {error.start + 1} of the text; convert the file")
            texts.append("?")
    return texts
