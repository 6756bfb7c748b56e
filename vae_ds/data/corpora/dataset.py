"""The `dataset` corpus: a data set of the Hugging Face hub, or a local directory in the hub's or save_to_disk's layout.

Only data files are read (parquet, csv, json lines, ...), never a data set's own code.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from datasets import Dataset, DatasetDict
from datasets.exceptions import DatasetNotFoundError

from vae_ds.config import SPLITS, DataConfig, hub
from vae_ds.data.cache import digest
from vae_ds.data.corpora.corpus import Corpus, limited, quiet_datasets
from vae_ds.data.corpora.findings import LISTED
from vae_ds.data.corpora.text_files import kind_of
from vae_ds.data.progress import Progress, waiting
from vae_ds.errors import DataError

DEFAULT_NAMES: dict[str, str] = DataConfig.model_fields["splits"].default
_DIRECTORY = "a local directory with parquet, csv or json lines files or one written by save_to_disk"

log = logging.getLogger(__name__)


def load(data: DataConfig) -> Corpus:
    """Load the chosen column of each split, in the order of the data set. Rows without text are dropped with a warning.

    The column `label` has what `data.label_column` holds, in its own type.

    Raises DataError if the data set, the directory, a split or the column does not exist, or if the hub cannot be
    reached.
    """
    rows = {split: _texts(part, data, split) for split, part in _parts(data).items()}
    return Corpus("dataset", digest(_content(rows)), rows)


def _content(rows: dict[str, Dataset]) -> Iterator[str]:
    for split in SPLITS:
        yield split
        yield from (str(text) for text in _column(rows[split], f"Hashing {split}"))


def check(data: DataConfig) -> None:
    """Check the path, the splits and the column from headers and metadata. Raises DataError like `load`."""
    if _is_saved(data):
        for split, part in _parts(data).items():
            _check_column(part.features, data, split)
        return
    with _explained(data), _reachable(data), quiet_datasets():
        builder = datasets.load_dataset_builder(_location(data), data.subset, revision=data.revision)
        files = builder.config.data_files
        known = builder.info.splits or files
        if known:
            _check_splits(list(known), data)
        if builder.info.features:
            _check_column(builder.info.features, data, "train")
        elif Path(_location(data)).is_dir():
            _check_first_rows(data)


def _check_first_rows(data: DataConfig) -> None:
    streams = datasets.load_dataset(_location(data), data.subset, streaming=True)
    for split, name in _names(data).items():
        first = next(iter(streams[name.partition("[")[0]]), None)
        if first is None:
            raise DataError(f"{data.path}: split `{name}` has no rows")
        if data.column not in first:
            raise _no_column(list(first), data, split)
        if data.label_column is not None and data.label_column not in first:
            raise _no_label(list(first), data, split)


def _parts(data: DataConfig) -> dict[str, Dataset]:
    """The rows of the data set, by split name of this package."""
    names = _names(data)
    with _explained(data), quiet_datasets():
        if _is_saved(data):
            saved = datasets.load_from_disk(_location(data))
            if not isinstance(saved, DatasetDict):
                raise DataError(
                    f"{data.path}: contains one split only; save a DatasetDict with {', '.join(names.values())}"
                )
            _check_splits(list(saved), data)
            return {split: saved[name] for split, name in names.items()}
        with _reachable(data):
            builder = datasets.load_dataset_builder(_location(data), data.subset, revision=data.revision)
            known = builder.info.splits or builder.config.data_files
            if known:
                _check_splits(list(known), data)
            with waiting(f"Loading {data.path}"):
                builder.download_and_prepare()
            _check_splits(list(builder.info.splits or {}), data)
            return {split: builder.as_dataset(split=name) for split, name in names.items()}


def _names(data: DataConfig) -> dict[str, str]:
    return {**DEFAULT_NAMES, **data.splits}


def _location(data: DataConfig) -> str:
    assert data.path is not None  # the settings require it
    local = Path(data.path).expanduser()
    kind = kind_of(local)
    if kind == "directory":
        return str(local)
    if kind != "nothing":
        raise DataError(f"{data.path}: is a {kind}; data.path is a hub name or {_DIRECTORY}")
    if local.is_absolute() or data.path.startswith((".", "~")) or data.path.count("/") > 1:
        raise DataError(f"{data.path}: no such directory; data.path is a hub name or {_DIRECTORY}")
    return data.path


def _is_saved(data: DataConfig) -> bool:
    location = Path(_location(data))
    return (location / "dataset_dict.json").is_file() or (location / "state.json").is_file()


def _check_splits(found: list[str], data: DataConfig) -> None:
    for split, name in _names(data).items():
        # A slice such as train[:90%] can replace a missing split, so check only the name before the bracket.
        if name.partition("[")[0] not in found:
            raise DataError(
                f"{data.path}: no split `{name}` for {split}; found: {', '.join(map(str, found))};"
                f" set data.splits.{split} to one of them, or to a slice such as train[95%:]"
            )


def _no_column(found: list[str], data: DataConfig, split: str) -> DataError:
    return DataError(f"{data.path}: no column `{data.column}` in {split}; found: {', '.join(found)}; set data.column")


def _check_column(features: datasets.Features, data: DataConfig, split: str) -> None:
    if data.column not in features:
        raise _no_column(list(features), data, split)
    kind = getattr(features[data.column], "dtype", None)
    if kind not in {"string", "large_string", "string_view"}:
        raise DataError(
            f"{data.path}: column `{data.column}` in {split} holds {kind or 'lists'}, not text; set data.column"
        )
    if data.label_column is None:
        return
    if data.label_column not in features:
        raise _no_label(list(features), data, split)
    if not isinstance(features[data.label_column], datasets.Value | datasets.ClassLabel):
        raise DataError(
            f"{data.path}: column `{data.label_column}` in {split} holds lists, not labels; set data.label_column"
        )


def _no_label(found: list[str], data: DataConfig, split: str) -> DataError:
    return DataError(
        f"{data.path}: no column `{data.label_column}` in {split}; found: {', '.join(found)}; set data.label_column"
    )


def _texts(part: Dataset, data: DataConfig, split: str) -> Dataset:
    _check_column(part.features, data, split)
    names = {data.column: "text"} | ({data.label_column: "label"} if data.label_column else {})
    rows = part.select_columns(list(names)).rename_columns(names)
    texts = enumerate(_column(rows, f"Checking {split}"))
    filled = np.fromiter((index for index, text in texts if text and not text.isspace()), np.int64)
    blank = len(rows) - len(filled)
    if blank and data.blank_lines == "error":
        first = np.setdiff1d(np.arange(len(rows)), filled, assume_unique=True)[:LISTED] + 1
        listed = ", ".join(map(str, first)) + (", ..." if blank > LISTED else "")
        raise DataError(
            f"{data.path}: {blank} of {len(rows)} rows of {split} have no text: {listed}; set data.blank_lines to skip"
        )
    if blank:
        log.warning("%s: %d of %d rows of %s have no text; dropped them", data.path, blank, len(rows), split)
        rows = rows.select(filled)
    if not len(filled):
        raise DataError(f"{data.path}: split `{_names(data)[split]}` has no rows with text in `{data.column}`")
    return limited(rows, data.limit)


def _column(rows: Dataset, task: str) -> Iterator[str | None]:
    with Progress(task, len(rows), "rows") as progress:
        for batch in rows.with_format("arrow").iter(10_000):
            yield from batch["text"].to_pylist()
            progress.add(len(batch))


def _reachable(data: DataConfig) -> AbstractContextManager[None]:
    return hub.reachable_or_offline(local=Path(_location(data)).is_dir())


@contextmanager
def _explained(data: DataConfig) -> Iterator[None]:
    """Convert the exceptions of the library into a DataError of one line that says what to do."""
    try:
        yield
    except DataError:
        raise
    except DatasetNotFoundError:
        raise DataError(
            f"{data.path}: no such directory, and no such data set on the hub; if it is private, run `hf auth login`"
        ) from None
    except FileNotFoundError as error:
        if Path(_location(data)).is_dir():
            raise DataError(f"{data.path}: no data files; data.path must be {_DIRECTORY} ({_line(error)})") from None
        raise _unreachable(data) from None
    except ConnectionError:
        raise _unreachable(data) from None
    except (OSError, ValueError, RuntimeError, NotImplementedError, pa.ArrowException) as error:
        raise DataError(f"{data.path}: cannot be read: {_line(error.__cause__ or error)}") from None
    except datasets.exceptions.DatasetsError as error:
        raise DataError(f"{data.path}: cannot be read: {_line(error.__cause__ or error)}") from None


def _unreachable(data: DataConfig) -> DataError:
    reason = "HF_HUB_OFFLINE is set" if hub.is_offline() else "no connection"
    return DataError(
        f"{data.path}: no such directory, not in the cache {os.fspath(datasets.config.HF_DATASETS_CACHE)}, and the"
        f" hub cannot be reached ({reason}); set data.path to {_DIRECTORY}; or load the data set once on a machine with"
        " a network, with HF_HOME on a shared disk, and run with HF_HUB_OFFLINE=1"
    )


def _line(error: BaseException | Any) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
