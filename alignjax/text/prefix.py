"""A tokenizer that puts a space in front of a text -> one that does not, for what goes on from it.

Sentencepiece with `add_dummy_prefix` (Llama 2, Mistral) reads "Hello" as "_Hello", so that a word
is the same piece at the start of a text as within it. A completion does not start a text: what
follows a prompt has to be encoded without that space, or the two are not the text that they make.
"""

from __future__ import annotations

import json
from typing import Any, Literal

import tokenizers

Scheme = Literal["first", "always"]
"""Where the space is put: at the start of a text, or also after each added token within it."""

_PARTS = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}


def without_prefix(tokenizer: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, Scheme] | None:
    """The same tokenizer without its space in front, for encoding and decoding; and its scheme.

    None if it has none of the known forms: a `Prepend` among the normalizers (which is always), or
    a `Metaspace` among the pre-tokenizers whose `prepend_scheme` is "first" or "always".
    """
    spec = json.loads(tokenizer.to_str())
    schemes: list[Scheme] = []
    for name, members in _PARTS.items():
        spec[name] = _edited(spec[name], members, schemes)
    if not schemes:
        return None
    scheme: Scheme = "always" if "always" in schemes else "first"
    return tokenizers.Tokenizer.from_str(json.dumps(spec)), scheme


def spelled(tokenizer: tokenizers.Tokenizer, text: str) -> str:
    """The text as the model of the tokenizer sees it, its spaces spelled in some way."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text


def is_even(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether a text is spelled as its parts are, wherever it is cut."""
    return all(
        spelled(tokenizer, a) + spelled(tokenizer, b) == spelled(tokenizer, a + b)
        for a, b in (("x", " x"), ("x ", "x"), ("x", "x"), ("x ", " x"))
    )


def _edited(part: dict[str, Any] | None, members: str, schemes: list[Scheme]) -> Any:
    """A component without its prefix, or None if nothing is left; notes the scheme of each."""
    if part is None:
        return None
    match part["type"]:
        case "Sequence":
            kept = [_edited(member, members, schemes) for member in part[members]]
            kept = [member for member in kept if member is not None]
            return part | {members: kept} if kept else None
        case "Prepend":
            schemes.append("always")
            return None
        case "Metaspace":
            # A decoder's scheme says what it strips, not what was put there.
            if members == "pretokenizers" and part["prepend_scheme"] != "never":
                schemes.append(part["prepend_scheme"])
            return part | {"prepend_scheme": "never"}
        case "Strip" if members == "decoders":
            return None
    return part
