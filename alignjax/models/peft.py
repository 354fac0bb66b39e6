"""Adapters <-> a directory of PEFT: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from alignjax.core.errors import UserError
from alignjax.models.lora import LoraConfig, split
from alignjax.models.peft_modules import Module, modules_of
from alignjax.models.transformer import Model

if TYPE_CHECKING:
    from alignjax.core.types import Params

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PARTS = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""Our parameters of an adapter -> what PEFT calls them."""
FIELDS = {
    "r": ("rank", 8),
    "lora_alpha": ("alpha", 8),
    "use_rslora": ("rslora", False),
    "use_dora": ("dora", False),
}
"""Theirs -> ours, and what absence means there."""


def save(path: str | os.PathLike[str], model: Model, adapters: Params, *, base: str) -> None:
    """Writes what `peft.PeftModel.from_pretrained` puts on a transformers model.

    Args:
      path: the directory, which is there.
      model: with `lora`. If its base is quantised, the adapters are nevertheless to be put on the
        base as it was before.
      adapters: as `lora.split` gives them.
      base: the directory or name of the base, for who reads the adapter.
    Raises:
      UserError: if DoRA adapts some and not all of the projections that one tensor of transformers
        holds, as its magnitudes are of the whole tensor.
    """
    assert model.lora is not None
    found = {
        name: {part: _matrices(part, np.asarray(jax.device_get(x))) for part, x in arrays.items()}
        for name, arrays in projections(adapters).items()
    }
    modules = modules_of(model, found)
    tensors: dict[str, np.ndarray] = {}
    for module in modules:
        for part, stacked in module.join([found[name] for name in module.projections]).items():
            for layer, array in enumerate(stacked):
                key = f"{PREFIX}{module.name.format(layer=layer)}.{PARTS[part]}"
                tensors[key] = np.ascontiguousarray(array, np.float32)
    directory = Path(path)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        **{theirs: getattr(model.lora, ours) for theirs, (ours, _) in FIELDS.items()},
        "lora_dropout": model.lora.dropout,
        "target_modules": sorted(module.target for module in modules),
        **_patterns(model.lora, modules),
        "bias": "none",
        "fan_in_fan_out": model.config.family == "gpt2",  # whose kernels are [in, out]
        "inference_mode": True,
    }
    (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(path: str | os.PathLike[str], model: Model) -> dict[str, Any]:
    """Reads adapters for a model with `lora`, as `save` and PEFT write them: arrays on the host.

    Raises:
      UserError: if a file is missing or no such file, if it says otherwise than `model.lora`, or
        if a tensor is missing, extra or misshapen; it names which.
    """
    assert model.lora is not None
    directory = Path(path)
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(directory / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{directory}: not an adapter of PEFT: {error}") from error
    for name, (field, absent) in FIELDS.items():
        found, ours = config.get(name, absent), getattr(model.lora, field)
        if found != ours:
            raise UserError(
                f"{directory / CONFIG}: {name}={found!r}, but lora.{field}={ours!r}: make them one"
            )
    shapes, _ = split(jax.eval_shape(model.init, jax.random.key(0)))
    expected = {
        name: {
            part: _matrices(part, np.zeros(shape.shape, np.float32))
            for part, shape in arrays.items()
        }
        for name, arrays in projections(shapes).items()
    }
    modules = modules_of(model, expected)
    patterns = {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    is_joined = any(patterns.values())
    if is_joined and patterns != _patterns(model.lora, modules):
        raise UserError(
            f"{directory / CONFIG}: {patterns} is not supported; all projections have one rank and "
            "alpha here"
        )
    stacked = {}
    for module in modules:
        parts = [expected[name] for name in module.projections]
        shape_of = module.join(parts) if is_joined else module.share(parts)
        read = {
            part: np.stack([
                _take(tensors, f"{PREFIX}{module.name.format(layer=layer)}.{PARTS[part]}",
                      directory, one)
                for layer, one in enumerate(arrays)
            ])
            for part, arrays in shape_of.items()
        }  # fmt: skip
        for name, arrays in zip(module.projections, module.parted(read, is_joined), strict=True):
            for part, array in arrays.items():
                turned = array if part == "magnitude" else array.swapaxes(1, 2)
                stacked[name, part] = turned.reshape(projections(shapes)[name][part].shape)
    if tensors:
        raise UserError(
            f"{directory / WEIGHTS}: tensor {min(tensors)!r} belongs to no projection of "
            f"lora.targets={list(model.lora.targets)}"
        )
    leaves, structure = jax.tree.flatten_with_path(shapes)
    names = ([key.key for key in key_path] for key_path, _ in leaves)
    return jax.tree.unflatten(structure, [stacked[".".join(n[1:-2]), n[-1]] for n in names])


def _patterns(config: LoraConfig, modules: Sequence[Module]) -> dict[str, dict[str, float]]:
    """Rank and alpha of the modules in which several adapters are one: they add up, so that what an
    adapter is scaled by stays."""
    counts = {m.target: len(m.projections) for m in modules if len(m.projections) > 1}
    power = 0.5 if config.rslora else 1.0  # It is scaled by alpha / rank^power.
    return {
        "rank_pattern": {target: k * config.rank for target, k in counts.items()},
        "alpha_pattern": {target: k**power * config.alpha for target, k in counts.items()},
    }


def _take(
    tensors: dict[str, np.ndarray], key: str, directory: Path, expected: np.ndarray
) -> np.ndarray:
    if key not in tensors:
        raise UserError(
            f"{directory / WEIGHTS}: tensor {key!r} is missing; lora.targets implies it"
        )
    array = tensors.pop(key)
    if array.shape != expected.shape:
        raise UserError(
            f"{directory / WEIGHTS}: tensor {key!r} has shape {array.shape}; the model implies "
            f"{expected.shape}"
        )
    return np.asarray(array, np.float32)


def projections(adapters: Params) -> dict[str, dict[str, Any]]:
    """Dotted path of each adapted projection -> its stacked `a`, `b` and perhaps `magnitude`."""
    found: dict[str, dict[str, Any]] = {}
    for key_path, array in jax.tree.leaves_with_path(adapters["layers"]):
        *path, _, part = (key.key for key in key_path)
        found.setdefault(".".join(path), {})[part] = array
    return found


def _matrices(part: str, stacked: np.ndarray) -> np.ndarray:
    """[L, ...] here -> [L, r, inputs], [L, outputs, r] or [L, outputs], as torch has them."""
    num_layers = len(stacked)
    match part:
        case "a":
            return stacked.reshape(num_layers, -1, stacked.shape[-1]).swapaxes(1, 2)
        case "b":
            return stacked.reshape(num_layers, stacked.shape[1], -1).swapaxes(1, 2)
        case _:
            return stacked.reshape(num_layers, -1)
