"""Files of codes: written and read in parts, so that memory does not grow with their number.

Shapes: N codes of a file, C of a part, L latent units.

`.npz` and `.safetensors` have `z` (N, L) float32, `line` (N,) int64, the line of the text in its file from 1, `mean`
and `scale` (L,) float32, the mean and the standard deviation of each unit over the file, `dimension`, which is L, and
`model`, the fingerprint of the model. A line without a code has a row of NaN.

`.jsonl` and `.csv` have a row per line with `line`, `text`, the code (`z`, or `z0`, `z1`, ...), `model`, and `error`
for a line without a code. `mean`, `scale`, `dimension` and `model` are in a file beside it, NAME.units.json.
"""

import csv
import json
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from vae_ds.errors import DataError

ARRAYS = (".npz", ".safetensors")
ROWS = (".jsonl", ".csv")
AT_ONCE = 4096  # codes of a part
FORMAT = "vae_ds codes"


class Part(NamedTuple):
    """Codes of a file: their lines, line_C int64, and z_CL float32. A line without a code has NaN."""

    line_C: np.ndarray
    z_CL: np.ndarray


class Units:
    """The mean and the standard deviation of each unit over codes that come in parts; float64, rows of NaN left out."""

    def __init__(self, latent_dim: int) -> None:
        self.count = 0
        self._mean_L, self._square_L = np.zeros(latent_dim), np.zeros(latent_dim)

    def add(self, z_CL: np.ndarray) -> None:
        """Count more codes (Chan et al. 1983)."""
        z_CL = z_CL[np.isfinite(z_CL).all(axis=1)].astype(np.float64)
        if not len(z_CL):
            return
        mean_L, total = z_CL.mean(0), self.count + len(z_CL)
        apart_L = mean_L - self._mean_L
        self._square_L += ((z_CL - mean_L) ** 2).sum(0) + apart_L**2 * (self.count * len(z_CL) / total)
        self._mean_L += apart_L * (len(z_CL) / total)
        self.count = total

    def facts(self) -> dict[str, np.ndarray]:
        """`mean` and `scale`, float32 (L,)."""
        scale_L = np.sqrt(self._square_L / max(1, self.count))
        return {"mean": self._mean_L.astype(np.float32), "scale": scale_L.astype(np.float32)}


class ArrayFile:
    """Collects codes on the disk, and then writes an .npz or .safetensors file of them."""

    def __init__(self, folder: Path, latent_dim: int, model: str) -> None:
        """`folder`: where the codes are until they are written, in files without a name."""
        self._units, self._dim, self._model = Units(latent_dim), latent_dim, model
        self._rows = 0
        self._z: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open until the codes are written
        self._line: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115

    def add(self, part: Part) -> None:
        """Add codes, after those before."""
        self._units.add(part.z_CL)
        self._rows += len(part.line_C)
        self._z.write(np.ascontiguousarray(part.z_CL, "<f4").tobytes())
        self._line.write(np.ascontiguousarray(part.line_C, "<i8").tobytes())

    def write(self, file: IO[bytes], suffix: str) -> None:
        """Write all codes."""
        large: dict[str, tuple[str, tuple[int, ...], IO[bytes]]] = {
            "line": ("<i8", (self._rows,), self._line),
            "z": ("<f4", (self._rows, self._dim), self._z),
        }
        if suffix == ".npz":
            self._write_npz(file, large)
        else:
            self._write_safetensors(file, large)

    def _write_npz(self, file: IO[bytes], large: dict[str, tuple[str, tuple[int, ...], IO[bytes]]]) -> None:
        small = {"dimension": np.array(self._dim), "model": np.array(self._model), **self._units.facts()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, (kind, shape, source) in large.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    header = {"descr": kind, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, header)
                    _copy(source, member)
            for name, array in small.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)

    def _write_safetensors(self, file: IO[bytes], large: dict[str, tuple[str, tuple[int, ...], IO[bytes]]]) -> None:
        kinds, small = {"<i8": ("I64", 8), "<f4": ("F32", 4)}, self._units.facts()
        header: dict[str, Any] = {"__metadata__": {"format": FORMAT, "dimension": str(self._dim), "model": self._model}}
        at = 0
        for name, kind, shape in [
            *((name, kind, shape) for name, (kind, shape, _) in large.items()),
            *((name, "<f4", array.shape) for name, array in small.items()),
        ]:
            end = at + kinds[kind][1] * int(np.prod(shape, dtype=np.int64))
            header[name] = {"dtype": kinds[kind][0], "shape": list(shape), "data_offsets": [at, end]}
            at = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, source in large.values():
            _copy(source, file)
        for array in small.values():
            file.write(array.astype("<f4").tobytes())


def _copy(source: IO[bytes], to: Any) -> None:
    source.seek(0)
    shutil.copyfileobj(source, to, 1 << 20)


def read_codes(path: str | Path, latent_dim: int, model: str) -> Iterator[Part]:
    """The codes of a file, in parts. `-` is standard input with JSON lines.

    A file that does not name its model is read if its dimension fits. Raises DataError if the file is missing, broken
    or empty, or has codes of another model or dimension. A row without a code, or with values that are not finite, has
    NaN.
    """
    file = Path(path)
    suffix = ".jsonl" if str(path) == "-" else file.suffix.lower()
    if suffix not in ARRAYS + ROWS:
        raise DataError(f"{path}: codes are in files with the ending {', '.join(ARRAYS + ROWS)}")
    readers = {".npz": _read_npz, ".safetensors": _read_safetensors, ".jsonl": _read_rows, ".csv": _read_rows}
    is_empty = True
    try:
        for found, part in readers[suffix](file, latent_dim):
            if found is not None and found != model:
                raise DataError(f"{path}: codes of the model {found}, but this model is {model}; use that one")
            is_empty = is_empty and not len(part.line_C)
            yield part
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, SafetensorError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()) or repr(error)
        raise DataError(f"{path}: no codes can be read: {reason}") from None
    if is_empty:
        raise DataError(f"{path}: has no codes")


def _read_npz(file: Path, latent_dim: int) -> Iterator[tuple[str | None, Part]]:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        if "z.npy" not in names:
            raise DataError(f"{file}: has no array `z`")
        model, line_N = None, None
        with np.load(file, allow_pickle=False) as small:
            model = str(small["model"]) if "model.npy" in names else None
            line_N = small["line"].astype(np.int64) if "line.npy" in names else None
        with archive.open("z.npy") as member:
            version = np.lib.format.read_magic(member)
            read: Any = np.lib.format.read_array_header_1_0
            shape, is_fortran, kind = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(member)
            _check_shape(file, shape, latent_dim)
            if is_fortran or kind.kind not in "fiu":
                raise DataError(f"{file}: `z` is no matrix of numbers in rows; save np.ascontiguousarray(z)")
            for start in range(0, shape[0], AT_ONCE):
                count = min(AT_ONCE, shape[0] - start)
                content = member.read(count * latent_dim * kind.itemsize)
                z_CL = np.frombuffer(content, kind).reshape(count, latent_dim).astype(np.float32)
                yield model, _part(line_N, start, z_CL)


def _read_safetensors(file: Path, latent_dim: int) -> Iterator[tuple[str | None, Part]]:
    with safe_open(file, framework="numpy") as stored:
        if "z" not in stored.keys():  # noqa: SIM118 - no mapping
            raise DataError(f"{file}: has no array `z`")
        rows = stored.get_slice("z")
        shape = tuple(rows.get_shape())
        _check_shape(file, shape, latent_dim)
        line_N = stored.get_tensor("line") if "line" in stored.keys() else None  # noqa: SIM118
        model = (stored.metadata() or {}).get("model")
        for start in range(0, shape[0], AT_ONCE):
            # A slice of safetensors must not reach past the end.
            z_CL = np.asarray(rows[start : min(start + AT_ONCE, shape[0])], np.float32)
            yield model, _part(line_N, start, z_CL)


def _read_rows(file: Path, latent_dim: int) -> Iterator[tuple[str | None, Part]]:
    name = "standard input" if str(file) == "-" else str(file)
    with nullcontext(sys.stdin.buffer) if str(file) == "-" else file.open("rb") as raw:
        lines = (content.decode("utf-8-sig") for content in raw)
        rows: Iterator[dict[str, Any]]
        rows = csv.DictReader(lines) if file.suffix.lower() == ".csv" else _json_rows(lines, name)
        model: str | None = None
        line: list[int] = []
        z: list[list[float]] = []
        for number, row in enumerate(rows, start=1):
            found = row.get("model") or None
            if z and (found != model or len(z) == AT_ONCE):
                yield model, Part(np.array(line), np.array(z, np.float32))
                line, z = [], []
            model = found
            line.append(int(row.get("line") or number))
            z.append(_row_code(row, latent_dim, f"{name}: row {number}"))
        if z:
            yield model, Part(np.array(line), np.array(z, np.float32))


def _json_rows(lines: Iterator[str], name: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        row = json.loads(line)
        if not isinstance(row, dict):
            raise DataError(f"{name}: row {number} is no JSON object")
        yield row


def _row_code(row: dict[str, Any], latent_dim: int, where: str) -> list[float]:
    """The code of a row of JSON or CSV; NaN if the row says that it has none."""
    columns = [key for key in row if key and key[0] == "z" and key[1:].isdigit()]
    z = row.get("z") if not columns else [row[f"z{unit}"] for unit in range(len(columns))]
    if row.get("error"):
        return [np.nan] * latent_dim
    if not isinstance(z, list):
        raise DataError(f"{where} has no code `z`")
    if len(z) != latent_dim:
        raise DataError(f"{where} has a code of {len(z)} units, but this model has {latent_dim}")
    try:
        return [float(value) for value in z]
    except (TypeError, ValueError):
        raise DataError(f"{where} has a code with values that are no numbers") from None


def _check_shape(file: Path, shape: tuple[int, ...], latent_dim: int) -> None:
    if len(shape) != 2 or shape[1] != latent_dim:
        raise DataError(f"{file}: codes of the shape {tuple(shape)}, but this model needs (N, {latent_dim})")


def _part(line_N: np.ndarray | None, start: int, z_CL: np.ndarray) -> Part:
    end = start + len(z_CL)
    return Part(np.arange(start + 1, end + 1) if line_N is None else line_N[start:end], z_CL)
