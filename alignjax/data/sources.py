"""A path, `tfds:NAME/SPLIT` or `hf:NAME/SPLIT` -> records by index, each with where it stands.

On the Hub NAME is ORG/NAME for most; with a configuration it is `hf:ORG/NAME/CONFIG/SPLIT`.
"""

from __future__ import annotations

import bisect
import gzip
import itertools
import json
import mmap
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from alignjax.core.errors import UserError

Record = dict[str, Any]
_FORMS = {
    "tfds": "tfds:NAME/SPLIT, such as tfds:gsm8k/train",
    "hf": "hf:NAME/SPLIT or hf:ORG/NAME/CONFIG/SPLIT, such as hf:openai/gsm8k/main/train",
}


class Source(Protocol):
    """Records by index; read from several threads at once."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    def where(self, index: int) -> str:
        """Where record `index` stands, for messages: "train.jsonl:7"."""
        ...


def open_source(spec: str | Sequence[str]) -> Source:
    """Opens records; several specs follow each other.

    Args:
      spec: a .jsonl, .jsonl.gz, .parquet or .array_record (JSON in each record) file; the directory
        of a Hugging Face data set (`save_to_disk`); `tfds:NAME/SPLIT`; `hf:NAME/SPLIT`;
        `hf:ORG/NAME/CONFIG/SPLIT`.
    Raises:
      UserError: if it is missing, empty, of an unknown kind, or a line of it is broken JSON.
    """
    if not isinstance(spec, str):
        if not spec:
            raise UserError("data: no source is given")
        sources = [open_source(one) for one in spec]
        return sources[0] if len(sources) == 1 else Concatenation(sources)
    source = _open_one(spec)
    if len(source) == 0:
        raise UserError(f"{spec}: no records; expected at least one")
    return source


class JsonLines:
    """A JSONL file, read through a memory map (a compressed one is held in memory, unpacked).

    Every line is parsed once, here, so that a broken one is found before anything is trained; only
    the byte offsets are kept.
    """

    def __init__(self, path: Path):
        self._path = path
        if path.suffix == ".gz":
            try:
                self._data: bytes | mmap.mmap = gzip.decompress(path.read_bytes())
            except (OSError, EOFError, zlib.error) as error:
                raise UserError(f"{path}: not a complete gzip file: {error}") from error
        elif path.stat().st_size == 0:  # Which no memory map can be.
            self._data = b""
        else:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        starts, ends, lines = [], [], []
        start, size = 0, len(self._data)
        for line in itertools.count(1):
            if start >= size:
                break
            found = self._data.find(b"\n", start)
            end = size if found < 0 else found
            if self._data[start:end].strip():
                self._parse(start, end, line)
                starts.append(start)
                ends.append(end)
                lines.append(line)
            start = end + 1
        self._spans = np.array([starts, ends, lines], np.int64)

    def __len__(self) -> int:
        return self._spans.shape[1]

    def __getitem__(self, index: int) -> Record:
        return self._parse(*(int(x) for x in self._spans[:, index]))

    def where(self, index: int) -> str:
        return f"{self._path}:{self._spans[2, index]}"

    def _parse(self, start: int, end: int, line: int) -> Record:
        data = self._data[start:end]
        return _parse_json(data, lambda: f"{self._path}:{line}")


class Rows:
    """Records of anything with a length and an index, converted one by one."""

    def __init__(
        self, rows: Any, name: str, convert: Callable[[Any, Callable[[], str]], Record], noun: str
    ):
        self._rows, self._name, self._convert, self._noun = rows, name, convert, noun

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        return self._convert(self._rows[int(index)], lambda: self.where(index))

    def where(self, index: int) -> str:
        return f"{self._name}:{self._noun} {index + 1}"


class Concatenation:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = sources
        self._ends = list(itertools.accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        source, i = self._find(index)
        return source[i]

    def where(self, index: int) -> str:
        source, i = self._find(index)
        return source.where(i)

    def _find(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        k = bisect.bisect_right(self._ends, index)
        return self._sources[k], index - (self._ends[k] - len(self._sources[k]))


def _open_one(spec: str) -> Source:
    scheme, _, rest = spec.partition(":")
    if scheme in ("tfds", "hf") and rest:
        name, _, split = rest.rpartition("/")
        if not name or not split:
            raise UserError(f"{spec}: expected {_FORMS[scheme]}")
        return _open_tfds(spec, name, split) if scheme == "tfds" else _open_hub(spec, name, split)
    path = Path(spec).expanduser()
    if not path.exists():
        raise UserError(f"data: no such file: {spec} (in {Path.cwd()})")
    if path.is_dir():
        return _open_saved(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return JsonLines(path)
    if path.suffix == ".parquet":
        return _open_parquet(path)
    if ".array_record" in path.name or ".arrayrecord" in path.name:  # May end in -00000-of-00001.
        return _open_array_record(path)
    raise UserError(
        f"{spec}: unknown kind of file; expected .jsonl, .jsonl.gz, .parquet or .array_record"
    )


def _open_parquet(path: Path) -> Source:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read: {error}") from error

    class Table:
        def __len__(self) -> int:
            return table.num_rows

        def __getitem__(self, index: int) -> Record:
            return table.slice(index, 1).to_pylist()[0]

    return Rows(Table(), str(path), lambda row, _: row, "row")


def _open_array_record(path: Path) -> Source:
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty; expected an ArrayRecord file")
    try:
        records = ArrayRecordDataSource(str(path))
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path}: not an ArrayRecord file that can be read: {error}") from error
    return Rows(records, str(path), _parse_json, "record")


def _open_tfds(spec: str, name: str, split: str) -> Source:
    remedy = "pip install tensorflow-datasets importlib_resources"
    tfds = _need("tensorflow_datasets", spec, remedy)
    # Without TensorFlow its data sets of text are known by name only once this is imported.
    _need("tensorflow_datasets.text", spec, remedy)
    try:
        rows = tfds.data_source(name, split=split, data_dir=os.environ.get("TFDS_DATA_DIR"))
    except Exception as error:  # Unknown name, unknown split, no network: dozens of types.
        raise UserError(
            f"{spec}: cannot be opened by tensorflow-datasets: {_first(error)}"
        ) from error
    return Rows(rows, spec, _record, "record")


def _open_hub(spec: str, name: str, split: str) -> Source:
    datasets = _need("datasets", spec, "pip install 'alignjax[hf]'")
    config = None
    if name.count("/") == 2 and all(name.split("/")):
        name, _, config = name.rpartition("/")
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # Unknown name, unknown split, no network: dozens of types.
        raise UserError(
            f"{spec}: cannot be opened by datasets: {_first(error)}; expected {_FORMS['hf']}"
        ) from error
    return Rows(rows, spec, lambda row, _: row, "record")


def _open_saved(path: Path) -> Source:
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise UserError(f"{path}: holds several splits; name the directory of one ({splits})")
    if not (path / "state.json").is_file():
        raise UserError(f"{path}: a directory, but not one that save_to_disk wrote; name a file")
    datasets = _need("datasets", str(path), "pip install 'alignjax[hf]'")
    return Rows(datasets.load_from_disk(str(path)), str(path), lambda row, _: row, "record")


def _need(module: str, spec: str, remedy: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{spec}: needs a package that is missing ({error}); {remedy}") from error


def _first(error: Exception) -> str:
    """The first line of a message that may go on for pages (all data sets there are)."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _parse_json(data: bytes, where: Callable[[], str]) -> Record:
    try:
        record = json.loads(data.removeprefix(b"\xef\xbb\xbf"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where()}: not UTF-8 at byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where()}: broken JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # Thousands of digits, or of brackets.
        raise UserError(f"{where()}: JSON that cannot be read: {error}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where()}: expected an object {{...}}, came {type(record).__name__}")
    return record


def _record(row: Mapping[str, Any], where: Callable[[], str]) -> Record:
    record = {}
    for name, value in row.items():
        try:
            record[name] = _plain(value)
        except UnicodeDecodeError as error:
            raise UserError(f"{where()}: field {name!r} is not UTF-8 text: {error}") from error
    return record


def _plain(value: Any) -> Any:
    """NumPy values and bytes, which tensorflow-datasets gives for text, -> plain Python."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
