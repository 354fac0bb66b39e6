"""A Hugging Face directory <-> a model and its parameters; safetensors only, no torch."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from alignjax.core.errors import UserError
from alignjax.core.hub import resolve
from alignjax.core.precision import ComputeDtype
from alignjax.models import stream
from alignjax.models.classify import reward_from_hf, reward_to_hf
from alignjax.models.config import ModelConfig
from alignjax.models.heads import ScalarModel
from alignjax.models.hf_config import from_hf, to_hf
from alignjax.models.quantize import Kind, codes
from alignjax.models.stored import open_tensors, read_json, replacing, write_json, write_tensors
from alignjax.models.stream import ParamPath
from alignjax.models.tensors import TENSORS, Tensor, full_name
from alignjax.models.transformer import Model
from alignjax.sharding.rules import shardings

if TYPE_CHECKING:
    from alignjax.core.types import Params

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
VALUE_HEAD, _VALUE_WEIGHT = "value_head.safetensors", "value_head.weight"
MAX_SHARD_BYTES = 5 * 10**9
ParamDtype = Literal["float32", "bfloat16"]


def load(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    compute_dtype: ComputeDtype = "float32",
    param_dtype: ParamDtype = "float32",
    remat: bool = False,
    quantize: Kind | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Reads config.json and model.safetensors, or the shards that an index names.

    The host never holds more than one tensor of the files, in their type: each goes to its place on
    the devices before the next one is read.

    Args:
      path: the directory, or the id of a model on the Hub; see `core.hub.resolve`.
      mesh: where to place the parameters, by `sharding.rules`; each process reads the parts that
        its own devices keep. None: the default device.
      compute_dtype, remat: see `Model`.
      param_dtype: of the parameters, whatever type they are stored in.
      quantize: hold the kernels of the layers as codes, made one by one as they are read.
    Returns:
      The model, and its parameters.
    Raises:
      UserError: naming the file and the field or tensor that is missing, extra, misshapen or not
        supported.
    """
    directory = resolve(path)
    config = from_hf(str(directory / CONFIG), read_json(directory / CONFIG))
    model = Model(config, compute_dtype, remat, mesh=mesh)
    coded = dataclasses.replace(model, quantize=quantize)
    placed = _targets(model, mesh)
    targets = placed if quantize is None else _targets(coded, mesh)

    def change(path: ParamPath) -> Callable[[jax.Array], Any]:
        if quantize is not None and path[0] == "layers" and path[-1] == "kernel":
            return _Coded(found[path].tensor.num_inputs, quantize)
        return _Cast(param_dtype)

    found = stream.entries(config, TENSORS[config.family], _shapes(model))
    return coded, _load(directory, found, placed, targets, change)


def load_reward(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    compute_dtype: ComputeDtype = "float32",
    param_dtype: ParamDtype = "float32",
    remat: bool = False,
) -> tuple[ScalarModel, dict[str, Any]]:
    """Reads a reward model: an AutoModelForSequenceClassification of transformers with one label.

    Arguments, result and errors as in `load`; the parameters are those of a `ScalarModel`, whose
    trunk has no unembedding of its own.
    """
    directory = resolve(path)
    source, data = str(directory / CONFIG), read_json(directory / CONFIG)
    config = reward_from_hf(source, data)
    model = ScalarModel(Model(config, compute_dtype, remat, mesh=mesh))
    targets = _flat(_targets(model, mesh))
    found = stream.entries(config, _reward_tensors(config), _flat(_shapes(model)))
    flat = _load(directory, found, targets, targets, lambda _: _Cast(param_dtype))
    head = {"kernel": flat.pop("score")}
    return model, {"decoder": flat, "head": head}


def load_eos_ids(path: str | os.PathLike[str]) -> tuple[int, ...]:
    """The ids that end a text, by generation_config.json, or else config.json, of a directory.

    Chat models list several (the end of a turn, of a text), of which a tokenizer names one. Empty
    where neither file says.

    Raises:
      UserError: if it is neither an id nor a list of ids.
    """
    directory = resolve(path, [GENERATION_CONFIG, CONFIG])
    for file in (directory / GENERATION_CONFIG, directory / CONFIG):
        found = read_json(file).get("eos_token_id") if file.exists() else None
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
    dtype: ParamDtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes config.json, generation_config.json and the weights, which transformers reads.

    Each file appears whole or not at all, config.json last, and the host never holds more than one
    tensor. Weights of an earlier model in the directory go; other files, such as those of a
    tokenizer, are left alone. With several processes all must call; the first writes.

    Args:
      path: the directory; made if it is not there.
      extra_config: more fields for config.json; `bos_token_id`, `eos_token_id` and `pad_token_id`
        also go to generation_config.json.
      dtype: of the weights in the files. None: as the parameters are, so that nothing is lost.
      max_shard_bytes: what does not fit into one file of so many bytes goes into several.
    """
    config = model.config
    found = stream.entries(config, TENSORS[config.family], params)
    data = to_hf(config)
    _save(Path(path), data, found, params, extra_config, dtype, max_shard_bytes)


def save_reward(
    path: str | os.PathLike[str],
    model: ScalarModel,
    params: Params,
    *,
    extra_config: Mapping[str, Any] | None = None,
    dtype: ParamDtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a reward model, as AutoModelForSequenceClassification with one label reads it.

    As `save`; the unembedding of the trunk, if it has one, is left out. `pad_token_id` in
    `extra_config` is how transformers finds the last token of each row.

    Raises:
      ValueError: without a pad_token_id: transformers would score rows of one alone.
    """
    if (extra_config or {}).get("pad_token_id") is None:
        raise ValueError("extra_config: a reward model needs a pad_token_id, see save_reward")
    flat = {name: value for name, value in _flat(params).items() if name != "unembedding"}
    config = model.decoder.config
    found = stream.entries(config, _reward_tensors(config), flat)
    data = reward_to_hf(config)
    _save(Path(path), data, found, flat, extra_config, dtype, max_shard_bytes)


def save_value_head(path: str | os.PathLike[str], head: Params) -> None:
    """Writes the head of a critic to `value_head.safetensors`: `value_head.weight` [1, D], float32.

    A model's own files have no place for it. Beside the model's directory is better than in it:
    servers may take every .safetensors file in there for weights.

    Args:
      path: the directory to write to.
      head: {"kernel": [D]}.
    """
    kernel = stream.to_host(head["kernel"])
    if jax.process_index() == 0:
        with replacing(Path(path) / VALUE_HEAD) as target:
            tensors = {_VALUE_WEIGHT: np.asarray(kernel, np.float32)[None]}
            save_file(tensors, target, metadata={"format": "pt"})


def load_value_head(path: str | os.PathLike[str]) -> dict[str, jax.Array]:
    """Reads what `save_value_head` wrote: {"kernel": [D] float32}.

    Raises:
      UserError: if there is none, or it holds something else.
    """
    file = Path(path) / VALUE_HEAD
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: no value head: {error}") from error
    weight = tensors.get(_VALUE_WEIGHT)
    if len(tensors) != 1 or weight is None or weight.ndim != 2 or len(weight) != 1:
        found = {name: tensor.shape for name, tensor in tensors.items()}
        raise UserError(f"{file}: expected {_VALUE_WEIGHT!r} of shape (1, D) alone, found {found}")
    return {"kernel": jnp.asarray(weight[0], jnp.float32)}


def _reward_tensors(config: ModelConfig) -> dict[str, Tensor]:
    """The trunk's, without an unembedding, and the head's."""
    trunk = {n: t for n, t in TENSORS[config.family].items() if t.paths != (("unembedding",),)}
    return trunk | {"score.weight": Tensor((("score",),), num_inputs=1)}


def _flat(params: Params) -> dict[str, Any]:
    """{"decoder": ..., "head": {"kernel": ...}} -> the decoder's, and "score"."""
    return {**params["decoder"], "score": params["head"]["kernel"]}


@dataclass(frozen=True)
class _Cast:
    dtype: ParamDtype

    def __call__(self, one: jax.Array) -> jax.Array:
        return one.astype(self.dtype)


@dataclass(frozen=True)
class _Coded:
    num_inputs: int
    kind: Kind

    def __call__(self, one: jax.Array) -> dict[str, jax.Array]:
        return codes(one.astype(jnp.float32), self.num_inputs, self.kind)


def _shapes(model: Model | ScalarModel) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0))


def _targets(model: Model | ScalarModel, mesh: Mesh | None) -> Any:
    """Where each parameter goes."""
    if mesh is not None:
        return shardings(model.logical_axes(), mesh, _shapes(model))
    single = SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda _: single, _shapes(model))


def _load(
    directory: Path,
    found: Mapping[ParamPath, stream.Entry],
    placed: Any,
    targets: Any,
    change: Callable[[ParamPath], Callable[[jax.Array], Any]],
) -> dict[str, Any]:
    """The parameters of `found`, placed as they are read and changed, and then as `targets`."""
    with open_tensors(directory) as stored:
        tensors = {full_name(name): tensor for name, tensor in stored.items()}
        stream.check(found, tensors, directory)

        def read(key_path: tuple[Any, ...], sharding: Any, target: Any) -> Any:
            path = tuple(key.key for key in key_path)
            return stream.read(found[path], tensors, sharding, change(path), target)

        return jax.tree_util.tree_map_with_path(read, placed, targets)


def _save(
    directory: Path,
    data: dict[str, Any],
    found: Mapping[ParamPath, stream.Entry],
    params: Params,
    extra_config: Mapping[str, Any] | None,
    dtype: ParamDtype | None,
    max_shard_bytes: int,
) -> None:
    is_writer = jax.process_index() == 0
    kept = jnp.dtype(dtype or jnp.result_type(*jax.tree.leaves(params)))
    plan = stream.plan(found, params, kept)
    if is_writer:
        directory.mkdir(parents=True, exist_ok=True)
    write_tensors(directory, plan, kept, max_shard_bytes=max_shard_bytes, is_writer=is_writer)
    if is_writer:
        extra = dict(extra_config or {})
        ids = {name: value for name, value in extra.items() if name.endswith("_token_id")}
        write_json(directory / GENERATION_CONFIG, ids)
        write_json(directory / CONFIG, data | {"torch_dtype": kept.name} | extra)
