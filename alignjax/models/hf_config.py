"""config.json <-> ModelConfig, by the row of its family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from alignjax.models.config import Family, ModelConfig
from alignjax.models.families import ACTIVATIONS, INERT, REQUIRED, ROWS, Row
from alignjax.models.hf_rules import Reader


def from_hf(source: str, data: Mapping[str, Any]) -> ModelConfig:
    """The contents of a config.json -> ModelConfig.

    Args:
      source: the file, for messages.
    Raises:
      UserError: on anything missing, and on anything that would change the mathematics in a way
        that is not implemented here.
    """
    reader = Reader(source, data)
    family, row = _family(reader)
    values = {"family": family} | _fields(reader, family, row)
    if type(values["num_layers"]) is int:
        for rule in (row.angles, row.layers):
            values |= rule.read(reader, values["num_layers"])
    _check_the_rest(reader, row)
    try:
        return ModelConfig(**values)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(row.fields.get(str(key), str(key)) for key in e['loc']) or 'model'}: "
            f"{e['msg']}"
            for e in error.errors()
        )
        raise reader.error(problems) from error


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """ModelConfig -> the contents of config.json, without token ids."""
    row = ROWS[config.family]
    spelled = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    spelled["gelu_tanh"] = row.gelu_tanh
    data = {theirs: getattr(config, ours) for ours, theirs in row.fields.items()}
    return {
        "architectures": [row.architecture],
        "model_type": config.family,
        **data,
        row.fields["activation"]: spelled[config.activation],
        **row.angles.write(config),
        **row.layers.write(config),
        "torch_dtype": "float32",
    }


def _family(reader: Reader) -> tuple[Family, Row]:
    architectures = reader.get("architectures") or []
    model_type = reader.get("model_type")
    for family, row in ROWS.items():
        if architectures == [row.architecture]:
            if model_type not in (None, family):
                raise reader.error(
                    f"model_type={model_type!r} contradicts architectures={architectures!r}, "
                    f"which is {family!r}"
                )
            return family, row
    raise reader.error(
        f"architectures={architectures!r} is not supported; expected one of "
        + ", ".join(row.architecture for row in ROWS.values())
    )


def _fields(reader: Reader, family: Family, row: Row) -> dict[str, Any]:
    """What stands in a field of its own."""
    values: dict[str, Any] = {}
    for ours, theirs in row.fields.items():
        value = reader.get(theirs)
        if theirs in row.also_known:
            second = reader.get(row.also_known[theirs])
            if None not in (value, second) and value != second:
                raise reader.error(
                    f"{theirs}={value!r} contradicts {row.also_known[theirs]}={second!r}"
                )
            value = second if value is None else value
        if value is None:
            default = row.defaults.get(ours, REQUIRED)
            if default is REQUIRED and not (ours in row.nullable and theirs in reader.data):
                raise reader.error(f"field {theirs!r} is missing; a {family} model needs it")
            value = None if default is REQUIRED else default
        elif ours == "activation":
            if not isinstance(value, str) or value not in ACTIVATIONS:
                raise reader.error(
                    f"{theirs}={value!r} is not supported; only {', '.join(ACTIVATIONS)} are"
                )
            value = row.gelu if value == "gelu" else ACTIVATIONS[value]
        values[ours] = value
    return values


def _check_the_rest(reader: Reader, row: Row) -> None:
    """Nothing unread may change the mathematics."""
    supported = row.supported
    for name, value in reader.data.items():
        if name in supported and value is not None and value != supported[name]:
            raise reader.error(f"{name}={value!r} is not supported; only {supported[name]!r} is")
        if name not in reader.read | set(supported) | row.inert | INERT:
            raise reader.error(
                f"field {name!r}={value!r} is unknown for {row.architecture} and might change the "
                "mathematics; remove it if it does not"
            )
