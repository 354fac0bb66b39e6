"""A Hugging Face directory <-> a Model and its parameters; safetensors only, no torch."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from alignjax.core.errors import UserError
from alignjax.core.hub import resolve
from alignjax.core.precision import ComputeDtype
from alignjax.models import families
from alignjax.models.tensors import TENSORS, UNREAD, Tensor
from alignjax.models.transformer import Model
from alignjax.sharding.rules import shardings

if TYPE_CHECKING:
    from alignjax.core.types import Params

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
GENERATION_CONFIG = "generation_config.json"
DTYPES = ("F32", "F16", "BF16")


class _Entry(NamedTuple):
    """One parameter, and where in the files it is."""

    tensor: Tensor
    which: int
    """Its place among the parameters of the tensor."""
    ours: tuple[tuple[int, ...], ...]
    """Shapes of all parameters of the tensor, in one layer and of one expert."""
    shape: tuple[int, ...]
    """Of the parameter, with the leading axes of layers and experts if it has them."""
    names: np.ndarray
    """[layers, experts], or fewer axes: the name of the tensor of each."""

    @property
    def theirs(self) -> tuple[int, ...]:
        return self.tensor.shape(self.ours)


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    compute_dtype: ComputeDtype = "float32",
    param_dtype: Literal["float32", "bfloat16"] = "float32",
    remat: bool = False,
) -> tuple[Model, dict[str, Any]]:
    """Reads config.json and model.safetensors, or the shards that an index names.

    Args:
      path: the directory, or the id of a model on the Hub; see `core.hub.resolve`.
      mesh: where to place the parameters, by `sharding.rules`; each process reads the tensors of
        its own shards. None: the default device.
      compute_dtype, remat: see `Model`.
      param_dtype: of the parameters, whatever type they are stored in.
    Returns:
      The model, and its parameters.
    Raises:
      UserError: naming the file and the field or tensor that is missing, extra, misshapen or not
        supported.
    """
    directory = resolve(path)
    config = families.from_hf(str(directory / CONFIG), _read_json(directory / CONFIG))
    model = Model(config, compute_dtype, remat, mesh=mesh)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    with _open(directory) as tensors:
        entries = _match(model, shapes, tensors, directory)
        if mesh is None:
            single = SingleDeviceSharding(jax.local_devices()[0])
            targets = jax.tree.map(lambda _: single, shapes)
        else:
            targets = shardings(model.logical_axes(), mesh, shapes)
        leaves, structure = jax.tree.flatten_with_path(targets)
        arrays = []
        for key_path, sharding in leaves:
            entry = entries[tuple(key.key for key in key_path)]
            arrays.append(_read(entry, tensors, sharding, param_dtype))
    return model, jax.tree.unflatten(structure, arrays)


def load_eos_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The ids that end a text, by generation_config.json, or else config.json, of a directory.

    Chat models list several (the end of a turn, of a text), of which a tokenizer names one. Empty
    where neither file says.

    Raises:
      UserError: if it is neither an id nor a list of ids.
    """
    directory = resolve(path, [GENERATION_CONFIG, CONFIG])
    for file in (directory / GENERATION_CONFIG, directory / CONFIG):
        found = _read_json(file).get("eos_token_id") if file.exists() else None
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(i) is int and i >= 0 for i in ids):  # True is an int, but no id.
                raise UserError(f"{file}: eos_token_id={found!r}: expected an id or a list of ids")
            return tuple(ids)
    return ()


def save(
    path: str | os.PathLike[str],
    model: Model,
    params: Params,
    *,
    extra_config: Mapping[str, Any] | None = None,
) -> None:
    """Writes config.json, generation_config.json and model.safetensors (float32).

    Each file appears whole or not at all, config.json last. Other files of the directory, such as
    those of a tokenizer, are left alone. With several processes all must call; the first writes.

    Args:
      path: the directory; made if it is not there.
      extra_config: more fields for config.json; `bos_token_id`, `eos_token_id` and `pad_token_id`
        also go to generation_config.json.
    """
    directory = Path(path)
    extra = dict(extra_config or {})
    tensors: dict[str, np.ndarray] = {}
    entries = _entries(model, params)
    for entry in entries.values():
        if entry.which:
            continue  # written with the first of its tensor
        arrays = [_to_host(_get(params, path)) for path in entry.tensor.paths]
        for index in np.ndindex(entry.names.shape):
            tensor = entry.tensor.write([array[index] for array in arrays])
            # safetensors writes the buffer as it lies: it must be contiguous.
            tensors[entry.names[index]] = np.ascontiguousarray(tensor, np.float32)
    if jax.process_index() != 0:
        return
    directory.mkdir(parents=True, exist_ok=True)
    ids = {name: value for name, value in extra.items() if name.endswith("_token_id")}
    with _replacing(directory / WEIGHTS) as target:
        save_file(tensors, target, metadata={"format": "pt"})
    for name, data in ((GENERATION_CONFIG, ids), (CONFIG, families.to_hf(model.config) | extra)):
        with _replacing(directory / name) as target:
            target.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _entries(model: Model, params: Any) -> dict[tuple[str, ...], _Entry]:
    """Path of each parameter of the model -> its tensors. `params` may be shapes alone."""
    config = model.config
    shapes = {
        tuple(key.key for key in key_path): tuple(array.shape)
        for key_path, array in jax.tree.leaves_with_path(params)
    }
    entries = {}
    for name, tensor in TENSORS[config.family].items():
        if tensor.paths[0] not in shapes:
            continue
        sizes = {"layer": config.num_layers, "expert": config.num_experts}
        stacked = {axis: size for axis, size in sizes.items() if f"{{{axis}}}" in name}
        names = np.empty(tuple(stacked.values()), object)
        for index in np.ndindex(names.shape):
            names[index] = name.format(**dict(zip(stacked, index, strict=True)))
        ours = tuple(shapes[path][names.ndim :] for path in tensor.paths)
        for which, path in enumerate(tensor.paths):
            entries[path] = _Entry(tensor, which, ours, shapes[path], names)
    assert entries.keys() == shapes.keys(), entries.keys() ^ shapes.keys()
    return entries


def _match(
    model: Model, shapes: Any, tensors: Mapping[str, _Stored], directory: Path
) -> dict[tuple[str, ...], _Entry]:
    """The entries of the model, after checking that the checkpoint holds them and no others."""
    entries = _entries(model, shapes)
    for entry in entries.values():
        for name in entry.names.flat:
            if name not in tensors:
                raise UserError(f"{directory}: tensor {name!r} is missing; config.json implies it")
            tensors[name].check(name, entry.theirs)
    known = {name for entry in entries.values() for name in entry.names.flat}
    for name in sorted(set(tensors) - known):
        if name.endswith(UNREAD):
            continue
        if name == "lm_head.weight" and model.config.tie_embeddings:
            entry = entries[("embedding",)]
            embedding = tensors[entry.names[()]]
            tensors[name].check(name, entry.theirs)
            if np.array_equal(tensors[name].read(), embedding.read()):
                continue
            raise UserError(
                f"{tensors[name].file}: tensor {name!r} differs from the embedding, although "
                "config.json says tie_word_embeddings=true"
            )
        raise UserError(
            f"{tensors[name].file}: tensor {name!r} is not part of the model of config.json"
        )
    return entries


class _Stored(NamedTuple):
    """A tensor of a safetensors file, not read yet."""

    file: Path
    handle: Any
    name: str

    def check(self, name: str, expected: tuple[int, ...]) -> None:
        view = self.handle.get_slice(self.name)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        if shape != expected:
            raise UserError(
                f"{self.file}: tensor {name!r} has shape {shape}; config.json implies {expected}"
            )
        if dtype not in DTYPES:
            raise UserError(
                f"{self.file}: tensor {name!r} is {dtype}; expected one of {', '.join(DTYPES)}"
            )

    def read(self) -> np.ndarray:
        return self.handle.get_tensor(self.name)


def _read(entry: _Entry, tensors: Mapping[str, _Stored], sharding: Any, dtype: str) -> jax.Array:
    """Reads one parameter, shard by shard: the host holds one shard and one tensor at a time."""
    done: dict[str, np.ndarray] = {}
    num_stacked = entry.names.ndim
    part = entry.tensor.part(entry.ours, entry.which)

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = str(index)
        if key not in done:  # replicas ask for the same shard again
            names, within = entry.names[index[:num_stacked]], index[num_stacked:]
            one = entry.ours[entry.which]
            pieces = [
                entry.tensor.read(tensors[name].read()[part], one)[within]
                for name in np.ravel(names)
            ]
            whole = np.stack(pieces, dtype=jnp.dtype(dtype), casting="unsafe")
            done[key] = whole.reshape(*np.shape(names), *pieces[0].shape)
        return done[key]

    return jax.make_array_from_callback(entry.shape, sharding, shard)


@contextlib.contextmanager
def _open(directory: Path) -> Iterator[dict[str, _Stored]]:
    """Name -> tensor, of the one file or of all shards of the index."""
    weight_map: dict[str, str] | None = None
    if (directory / WEIGHTS).exists() or not (directory / INDEX).exists():
        files = [WEIGHTS]
    else:
        weight_map = _read_json(directory / INDEX).get("weight_map")
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
    tensors: dict[str, _Stored] = {}
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
            tensors |= {name: _Stored(directory / file, handle, name) for name in handle.keys()}  # noqa: SIM118
        for name, file in (weight_map or {}).items():
            if name not in tensors or tensors[name].file.name != file:
                raise UserError(
                    f"{directory / file}: tensor {name!r} is missing; {INDEX} says it is here"
                )
        yield tensors


def _read_json(file: Path) -> dict[str, Any]:
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


@contextlib.contextmanager
def _replacing(file: Path) -> Iterator[Path]:
    """A path to write to; it becomes `file` in one step once all is written and on disk."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _to_host(array: Any) -> np.ndarray:
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
