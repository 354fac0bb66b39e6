"""What config.json says of rotary embeddings and of layers <-> fields of ModelConfig.

A rule is a pair of functions, to read and to write; each family has one for angles and one for
layers. A new way of saying it is a new rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from alignjax.core.errors import UserError

if TYPE_CHECKING:
    from alignjax.models.config import ModelConfig


class Reader:
    """One config.json, and which of its fields were read."""

    def __init__(self, source: str, data: Mapping[str, Any]):
        self.source, self.data = source, data
        self.read: set[str] = set()

    def get(self, name: str) -> Any:
        """The value of a field; None if it is null or not there."""
        self.read.add(name)
        return self.data.get(name)

    def section(self, name: str) -> dict[str, Any]:
        """The object in a field; empty if it is null or not there."""
        section = self.get(name)
        if not isinstance(section, dict | None):
            raise self.error(f"{name}={section!r}: expected an object")
        return dict(section or {})

    def error(self, message: str) -> UserError:
        return UserError(f"{self.source}: {message}")


class Rule(NamedTuple):
    """Fields of theirs <-> fields of ours. Reading gets the number of layers."""

    read: Callable[[Reader, int], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


# --- angles -------------------------------------------------------------------------------------

_ORIGINAL = "original_max_position_embeddings"


def _base(reader: Reader, found: Mapping[str, Any], absent: float | None) -> float:
    """The one base of a rotary embedding that is given, perhaps under several names."""
    bases = {name: value for name, value in found.items() if value is not None}
    for name, value in bases.items():
        if type(value) not in (int, float) or not 1 < value < math.inf:
            raise reader.error(f"{name}={value!r}: expected a number above 1")
    if not bases and absent is not None:
        return absent
    if len(set(bases.values())) != 1:
        raise reader.error(
            f"expected one base of the rotary embedding in {' or '.join(found)}, found "
            f"{sorted(bases.values()) or 'none'}"
            + ("" if bases else "; transformers would assume one: add it if that is right")
        )
    return float(next(iter(bases.values())))


def _scaling(
    reader: Reader, section: dict[str, Any], aliases: Mapping[str, str]
) -> dict[str, Any] | None:
    """A section without its base -> the fields of `rope.Scaling`; None: no scaling."""
    kinds = [section.pop(name, None) for name in ("rope_type", "type")]
    kinds = [kind for kind in kinds if kind is not None] or ["default"]
    kind = kinds[0]
    if not all(isinstance(other, str) and other == kind for other in kinds):
        raise reader.error(
            f"rope_type and type of the rotary embedding are {kinds}: expected one name"
        )
    kind = aliases.get(kind, kind)
    if kind == "default":
        section.pop(_ORIGINAL, None)  # which says nothing where nothing is scaled
        if section:
            raise reader.error(f"rope_type 'default' with {section}: expected no more fields")
        return None
    if kind in ("llama3", "yarn", "longrope"):
        above = reader.get(_ORIGINAL)
        below = section.get(_ORIGINAL, reader.data.get("max_position_embeddings"))
        section[_ORIGINAL] = below if above is None else above
    else:
        section.pop(_ORIGINAL, None)
    if "attention_factor" in section:
        section["attention_scale"] = section.pop("attention_factor")
    lists = {name: tuple(v) if isinstance(v, list) else v for name, v in section.items()}
    return {"type": kind} | {name: v for name, v in lists.items() if v is not None}


def _angles(
    reader: Reader,
    old: dict[str, Any],
    new: dict[str, Any],
    *,
    absent: float | None = None,
    aliases: Mapping[str, str],
) -> dict[str, Any]:
    """`rope_scaling` (transformers 4) and `rope_parameters` (5), and what stands beside them."""
    found = {
        "rope_theta": reader.get("rope_theta"),
        "rope_scaling.rope_theta": old.pop("rope_theta", None),
        "rope_parameters.rope_theta": new.pop("rope_theta", None),
    }
    values: dict[str, Any] = {"rope_theta": _base(reader, found, absent)}
    fractions = {reader.get("partial_rotary_factor")}
    fractions |= {section.pop("partial_rotary_factor", None) for section in (old, new)}
    fractions -= {None}
    if len(fractions) > 1:
        raise reader.error(f"several values of partial_rotary_factor: {fractions}")
    if fractions:
        values["rope_fraction"] = float(fractions.pop())
    scalings = [_scaling(reader, section, aliases) for section in (old, new)]
    scalings = [scaling for scaling in scalings if scaling is not None]
    if len(scalings) > 1 and scalings[0] != scalings[1]:
        raise reader.error(
            f"rope_scaling and rope_parameters differ: {scalings[0]} and {scalings[1]}"
        )
    if scalings:
        values["rope_scaling"] = scalings[0]
    return values


def one_base(absent: float | None = None, aliases: Mapping[str, str] | None = None) -> Rule:
    """The same angles in all layers.

    Args:
      absent: the base where none is given; None: an error.
      aliases: other names of kinds of scaling.
    """

    def read(reader: Reader, num_layers: int) -> dict[str, Any]:
        old, new = reader.section("rope_scaling"), reader.section("rope_parameters")
        return _angles(reader, old, new, absent=absent, aliases=aliases or {})

    return Rule(read, lambda config: _written(config)[0])


def _written(config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """All fields of an embedding, and the section that is in rope_parameters."""
    section: dict[str, Any] = {"rope_type": "default"}
    data: dict[str, Any] = {"rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        section = config.rope_scaling.model_dump(mode="json", exclude_none=True)
        section["rope_type"] = section.pop("type")
        if "attention_scale" in section:
            section["attention_factor"] = section.pop("attention_scale")
        data["rope_scaling"] = dict(section)
    if config.rope_fraction != 1:
        data["partial_rotary_factor"] = section["partial_rotary_factor"] = config.rope_fraction
    section["rope_theta"] = config.rope_theta
    return data | {"rope_parameters": section}, section


def _read_two_bases(reader: Reader, num_layers: int) -> dict[str, Any]:
    old, new = reader.section("rope_scaling"), reader.section("rope_parameters")
    local = {"rope_theta": reader.get("rope_local_base_freq")}
    if "full_attention" in new or "sliding_attention" in new:
        local |= new.get("sliding_attention") or {}
        new = dict(new.get("full_attention") or {})
    elif new:
        raise reader.error(
            f"rope_parameters={new!r}: expected 'full_attention' and 'sliding_attention' in it"
        )
    theta = _base(reader, {"sliding_attention.rope_theta": local.pop("rope_theta")}, None)
    if _scaling(reader, local, {}) is not None:
        raise reader.error(
            "rope_parameters.sliding_attention is scaled; only full_attention may be"
        )
    return _angles(reader, old, new, aliases={}) | {"local_rope_theta": theta}


def _write_two_bases(config: ModelConfig) -> dict[str, Any]:
    data, section = _written(config)
    local = config.local_rope_theta
    sliding = dict(section) if local is None else {"rope_type": "default", "rope_theta": local}
    data["rope_parameters"] = {"full_attention": section, "sliding_attention": sliding}
    return data if local is None else data | {"rope_local_base_freq": local}


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    data, section = _written(config)
    if _ORIGINAL not in section:
        return data
    # transformers 4, and what is built on it, takes `type` and two lists, as Phi-3's own files have
    # them, and nothing else. 5 reads them there too, and what they leave out from beside them.
    three = {"type": section["rope_type"]}
    three |= {name: section[name] for name in ("short_factor", "long_factor")}
    is_derived = not {"factor", "attention_factor"} & section.keys()
    data |= {"rope_scaling": three} if is_derived else {}
    return data | {_ORIGINAL: section[_ORIGINAL]}


ONE_BASE = one_base()
NO_ANGLES = Rule(lambda reader, num_layers: {}, lambda config: {})
TWO_BASES = Rule(_read_two_bases, _write_two_bases)
"""One base for layers that see everything, which may be scaled, and one for those with a window."""
LONGROPE = Rule(one_base(aliases={"su": "longrope", "yarn": "longrope"}).read, _write_phi3)
"""Phi-3's: its scaling had other names first, and the first context stands beside it."""


# --- layers -------------------------------------------------------------------------------------

_FULL, _SLIDING = "full_attention", "sliding_attention"


def _read_all_full(reader: Reader, num_layers: int) -> dict[str, Any]:
    if reader.get("layer_types") not in (None, [_FULL] * num_layers):
        raise reader.error(
            f"layer_types={reader.data['layer_types']!r} is not supported here; only {_FULL!r}, "
            f"once for each of num_hidden_layers={num_layers}"
        )
    return {}


def _slides(reader: Reader, by_default: list[bool]) -> tuple[bool, ...]:
    """Which layers have a window, by layer_types if that is there."""
    types = reader.get("layer_types")
    if types is None:
        return tuple(by_default)
    is_list = isinstance(types, list) and all(kind in (_FULL, _SLIDING) for kind in types)
    if not is_list or len(types) != len(by_default):
        raise reader.error(
            f"layer_types={types!r}: expected {_FULL!r} or {_SLIDING!r} for each of "
            f"{len(by_default)} layers"
        )
    return tuple(kind == _SLIDING for kind in types)


def _types(config: ModelConfig) -> dict[str, Any]:
    return {"layer_types": [_FULL if window is None else _SLIDING for window in config.windows]}


def every(number: int) -> Rule:
    """Each layer has a window, but for every `number`-th."""

    def read(reader: Reader, num_layers: int) -> dict[str, Any]:
        names = ("sliding_window_pattern", "_sliding_window_pattern")
        patterns = [reader.get(name) for name in names]
        pattern = next((value for value in patterns if value is not None), number)
        if type(pattern) is not int or pattern < 1:
            raise reader.error(f"sliding_window_pattern={pattern!r}: expected a number of layers")
        return {
            "sliding_layers": _slides(reader, [(i + 1) % pattern != 0 for i in range(num_layers)])
        }

    def write(config: ModelConfig) -> dict[str, Any]:
        # transformers derives neither of them; without a window no layer has one, by its type.
        window, scalar = config.sliding_window, config.query_scalar
        return _types(config) | {
            "sliding_window": config.max_position_embeddings if window is None else window,
            "query_pre_attn_scalar": config.head_dim if scalar is None else scalar,
        }

    return Rule(read, write)


def _window(reader: Reader) -> int | None:
    """The window, where the switch for it is on."""
    is_on, window = reader.get("use_sliding_window"), reader.get("sliding_window")
    reader.get("max_window_layers")
    return window if is_on else None


def _switch(config: ModelConfig) -> dict[str, Any]:
    window = config.sliding_window
    return {"use_sliding_window": window is not None, "sliding_window": window}


def _read_upper(reader: Reader, num_layers: int) -> dict[str, Any]:
    window = _window(reader)
    if window is None:
        return _read_all_full(reader, num_layers)
    first = reader.data.get("max_window_layers")
    first = 28 if first is None else first  # what transformers takes it for
    slides = _slides(reader, [i >= first for i in range(num_layers)])
    return {"sliding_window": window, "sliding_layers": slides}


def _write_upper(config: ModelConfig) -> dict[str, Any]:
    kinds = _types(config)
    types = [*kinds["layer_types"], _SLIDING]
    return kinds | _switch(config) | {"max_window_layers": types.index(_SLIDING)}


def _read_all_or_none(reader: Reader, num_layers: int) -> dict[str, Any]:
    return _read_all_full(reader, num_layers) | {"sliding_window": _window(reader)}


def _read_smollm3(reader: Reader, num_layers: int) -> dict[str, Any]:
    interval = reader.get("no_rope_layer_interval") or 4
    turns = reader.get("no_rope_layers")  # 1 where there is an embedding
    if turns is None:
        turns = [(i + 1) % interval != 0 for i in range(num_layers)]
    turns = tuple(bool(turn) for turn in turns[:num_layers])
    window = _window(reader)
    if window is None:
        return _read_all_full(reader, num_layers) | {"rope_layers": turns}
    slides = _slides(reader, [not turn for turn in turns])
    return {"rope_layers": turns, "sliding_window": window, "sliding_layers": slides}


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    turns = config.rope_layers or (True,) * config.num_layers
    return _types(config) | _switch(config) | {"no_rope_layers": [int(turn) for turn in turns]}


ALIKE = Rule(_read_all_full, lambda config: {})
"""All layers do the same, with or without a window."""
UPPER = Rule(_read_upper, _write_upper)
"""With `use_sliding_window` those from `max_window_layers` on, unless layer_types says which."""
ALL_OR_NONE = Rule(_read_all_or_none, _switch)
"""With `use_sliding_window` all of them."""
SMOLLM3 = Rule(_read_smollm3, _write_smollm3)
"""Some without rotary embedding; with `use_sliding_window` those have a window."""
