"""Files of tensors <-> tensors by name, read and written a piece at a time: safetensors only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from alignjax.core.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ROWS_COMPARED = 1024


class Stored(NamedTuple):
    """A tensor of a safetensors file, not read yet."""

    file: Path
    handle: Any
    name: str

    def check(self, expected: tuple[int, ...]) -> None:
        """Raises a UserError unless it has this shape, and a type that is read here."""
        view = self.handle.get_slice(self.name)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != expected:
            raise UserError(
                f"{self.file}: tensor {self.name!r} has shape {shape}; config.json implies "
                f"{expected}"
            )
        if dtype not in DTYPES:
            raise UserError(
                f"{self.file}: tensor {self.name!r} is {dtype}; expected one of {', '.join(DTYPES)}"
            )

    @property
    def dtype(self) -> np.dtype:
        return DTYPES[self.handle.get_slice(self.name).get_dtype()]

    def read(self, window: tuple[slice, ...]) -> np.ndarray:
        """A part of it: only that is read, and copied."""
        return self.handle.get_slice(self.name)[window]

    def equals(self, other: Stored) -> bool:
        """Whether both, of one shape, hold the same values; some rows of each at a time."""
        rows = self.handle.get_slice(self.name).get_shape()[0]
        starts = range(0, rows, _ROWS_COMPARED)
        parts = [(slice(i, min(i + _ROWS_COMPARED, rows)),) for i in starts]
        return all(np.array_equal(self.read(part), other.read(part)) for part in parts)


@contextlib.contextmanager
def open_tensors(directory: Path) -> Iterator[dict[str, Stored]]:
    """Name -> tensor, of the one file or of all shards of the index."""
    weight_map: dict[str, str] | None = None
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        files = [WEIGHTS]
    else:
        weight_map = read_json(directory / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str)
            and file == os.path.basename(file)
            and file.endswith(".safetensors")
            for file in weight_map.values()
        ):
            raise UserError(
                f"{directory / INDEX}: expected a 'weight_map' from tensors to .safetensors files "
                "beside it"
            )
        files = sorted(set(weight_map.values()))
    tensors: dict[str, Stored] = {}
    with contextlib.ExitStack() as stack:
        for file in files:
            try:
                handle = stack.enter_context(safe_open(directory / file, framework="numpy"))
            except FileNotFoundError as error:
                raise UserError(
                    f"{directory / file}: no such file; the weights are missing"
                ) from error
            except (SafetensorError, OSError) as error:
                raise UserError(f"{directory / file}: not a safetensors file: {error}") from error
            tensors |= {name: Stored(directory / file, handle, name) for name in handle.keys()}  # noqa: SIM118
        for name, file in (weight_map or {}).items():
            if name not in tensors or tensors[name].file.name != file:
                raise UserError(
                    f"{directory / file}: tensor {name!r} is missing; {INDEX} says it is here"
                )
        yield tensors


class Planned(NamedTuple):
    """A tensor to be written, not made yet."""

    name: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]
    """Gives it in the type in which it is written. Called once, in the order of the plan."""

    def num_bytes(self, dtype: np.dtype) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize


def write_tensors(
    directory: Path,
    plan: Sequence[Planned],
    dtype: np.dtype,
    *,
    max_shard_bytes: int,
    is_writer: bool,
) -> None:
    """Writes model.safetensors, or as many shards as it takes and their index.

    Of the weights there is never more than one tensor on the host. Each file appears whole or not
    at all; of an earlier checkpoint in the directory, files that are not part of the new one go.

    Args:
      max_shard_bytes: of the tensors of one file; a larger tensor has a file of its own.
      is_writer: False: makes the tensors, as all processes must together, and writes nothing.
    """
    shards: list[list[Planned]] = [[]]
    size = 0
    for planned in plan:
        num_bytes = planned.num_bytes(dtype)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(planned)
        size += num_bytes
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WEIGHTS]
    for file, shard in zip(files, shards, strict=True):
        if is_writer:
            with replacing(directory / file) as target:
                _write_file(target, shard, dtype)
        else:
            for planned in shard:
                planned.make()
    if not is_writer:
        return
    if len(shards) > 1:
        pairs = zip(files, shards, strict=True)
        weight_map = {planned.name: file for file, shard in pairs for planned in shard}
        total = sum(planned.num_bytes(dtype) for planned in plan)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)
        files.append(INDEX)
    for old in ("model-*-of-*.safetensors", WEIGHTS, INDEX):
        for file in directory.glob(old):
            if file.name not in files:
                file.unlink()


def _write_file(path: Path, plan: Sequence[Planned], dtype: np.dtype) -> None:
    """The format of safetensors: the length of a JSON header, the header, the bytes of the tensors.

    By hand, since the library would hold all tensors of the file, and a copy of them.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for planned in plan:
        end = start + planned.num_bytes(dtype)
        header[planned.name] = {
            "dtype": _CODES[dtype], "shape": planned.shape, "data_offsets": [start, end],
        }  # fmt: skip
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for planned in plan:
            array = np.ascontiguousarray(planned.make())
            assert (array.shape, array.dtype) == (planned.shape, dtype), planned.name
            file.write(array.reshape(-1).view(np.uint8).data)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises a UserError naming file and line where there is none."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{file}: no such file; expected a Hugging Face model directory") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{error.lineno}: not JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(data).__name__}")
    return data


def write_json(file: Path, data: Mapping[str, Any]) -> None:
    """Writes the file, whole or not at all."""
    with replacing(file) as target:
        target.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A path to write to; it becomes `file` in one step once all is written and on disk."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
