"""Read the text column of a parquet file, row group by row group."""

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from vae_ds.data.corpora.findings import Findings
from vae_ds.data.corpora.opening import unreadable
from vae_ds.data.progress import Progress
from vae_ds.errors import DataError

_ROWS_AT_ONCE = 10_000


def read_rows(path: Path, column: str, found: Findings) -> Iterator[tuple[int, str | None]]:
    """Pairs of a row number, counted from 1, and the text of the row, or None.

    Texts that are not UTF-8 are added to `found`. Raises DataError if the file is not parquet or has no such column of
    text.
    """
    try:
        with pq.ParquetFile(path) as file, Progress(f"Reading {path.name}", file.metadata.num_rows, "rows") as progress:
            _check_column(path, file.schema_arrow, column)
            first = 1
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=[column]):
                yield from enumerate(_texts(batch.column(0), first, found), first)
                first += len(batch)
                progress.add(len(batch))
    except OSError as error:
        raise unreadable(path, error) from None
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a parquet file ({str(error).splitlines()[0][:200]})") from None


def _check_column(path: Path, schema: pa.Schema, column: str) -> None:
    if schema.names.count(column) != 1:
        found = "two columns" if column in schema.names else "no column"
        raise DataError(f"{path}: {found} `{column}`; found: {', '.join(schema.names)[:200]}; set data.column")
    kind = schema.field(column).type
    plain = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(plain) or pa.types.is_large_string(plain) or pa.types.is_string_view(plain)):
        raise DataError(f"{path}: column `{column}` holds {kind}, not text; set data.column")


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
