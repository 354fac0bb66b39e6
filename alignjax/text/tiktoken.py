"""A tiktoken file (Llama 3's tokenizer.model, Qwen's *.tiktoken) -> byte-level BPE of `tokenizers`.

The file has a line for each token: its bytes in base64, a space, its rank, which is its id. Of two
neighbours, those are merged first whose union has the lowest rank; so a token gives a merge for
each way to cut it into two others, and merges are in the order of the tokens that they make.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from alignjax.core.errors import UserError
from alignjax.text.tokenizer import CONFIG_FILE, FROM_FILE, HFTokenizer, special_text

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How a text is cut before merging if the config has no `pat_str`: that of cl100k and Llama 3. The
file does not say; Qwen's differs in that digits stand alone, \\p{N} for \\p{N}{1,3}."""

_SPECIAL_KEYS = ("bos_token", "eos_token", "pad_token", "unk_token")


def is_tiktoken(path: Path) -> bool:
    """Whether a tokenizer.model is one of tiktoken, not of sentencepiece."""
    with path.open("rb") as file:
        return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\s*$", file.readline(1024)) is not None


def load_tiktoken(path: str | Path, config: dict[str, Any]) -> HFTokenizer:
    """Reads a file of ranks.

    Args:
      path: of the file.
      config: the contents of tokenizer_config.json. `pat_str` is the pattern (`PATTERN` if it has
        none), `added_tokens_decoder` ({id: {"content": ..., "special": ...}}) the tokens that are
        not in the file. Where it has none, the special tokens that it names follow the ranks:
        bos_token, eos_token, pad_token, unk_token, additional_special_tokens (transformers 5:
        extra_special_tokens), in this order.
    Raises:
      UserError: if a line is no token, a byte has no token, an id is taken twice, the pattern is
        none, or the config names no EOS.
    """
    path = Path(path)
    ranks = _ranks(path)
    letters = _letters()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in ranks.items()}
    added = _added(path, config, len(ranks) and max(ranks.values()) + 1)
    taken = {rank: token for token, rank in vocab.items()}
    for token in added:
        if token in taken:
            raise UserError(
                f"{path.parent / CONFIG_FILE}: added_tokens_decoder: id {token} is that of "
                f"{taken[token]!r} in {path.name}"
            )
    vocab |= {token.content: index for index, token in added.items()}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, _merges(ranks, letters), ignore_merges=True))
    pattern = config.get("pat_str", PATTERN)
    try:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception as error:  # The library raises nothing more specific.
        raise UserError(
            f"{path.parent / CONFIG_FILE}: pat_str: not a regular expression: {error}"
        ) from error
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in added.values() if token.special])
    tokenizer.add_tokens([token for token in added.values() if not token.special])
    return HFTokenizer(tokenizer, config | {"tokenizer_class": FROM_FILE}, str(path))


def _ranks(path: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}:{number}: expected a token in base64, a space and its rank, "
                f"came {line[:60]!r}"
            ) from error
    if len(set(ranks.values())) < len(ranks):
        raise UserError(f"{path}: two tokens have the same rank")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise UserError(f"{path}: no token for byte {missing[0]}, so not every text has ids")
    return ranks


def _added(path: Path, config: dict[str, Any], next_id: int) -> dict[int, AddedToken]:
    """Id -> token that is not in the file."""
    listed = config.get("added_tokens_decoder")
    if listed:
        return {
            int(i): AddedToken(
                token["content"], special=token.get("special", False), normalized=False
            )
            for i, token in sorted(listed.items(), key=lambda item: int(item[0]))
        }
    named = [config.get(key) for key in _SPECIAL_KEYS]
    for key in ("additional_special_tokens", "extra_special_tokens"):  # Of transformers 4 and 5.
        named += config.get(key) or []
    texts = dict.fromkeys(special_text(token) for token in named if token is not None)
    return {
        next_id + n: AddedToken(text, special=True, normalized=False)
        for n, text in enumerate(texts)
    }


def _merges(ranks: dict[bytes, int], letters: list[str]) -> list[tuple[str, str]]:
    def spell(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token, rank in ranks.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((rank, ranks[left], ranks[right], spell(left), spell(right)))
    return [(left, right) for *_, left, right in sorted(merges)]


def _letters() -> list[str]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's): itself where it
    can be seen, else the next one from U+0100 on."""
    seen = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(hidden)) for byte in range(256)]
