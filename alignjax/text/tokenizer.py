"""Vocabulary, sentencepiece model or tokenizer.json -> one tokenizer: text <-> token ids.

Whatever a tokenizer was made from, what runs and what is saved is one `tokenizer.json` with its
`tokenizer_config.json`: the files that every other tool reads. So a toy vocabulary, a sentencepiece
model and a tokenizer of the Hub are the same class, and exporting one is copying two files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from alignjax.core.errors import UserError
from alignjax.core.types import Tokenizer

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
SENTENCEPIECE_FILE = "tokenizer.model"
ALTERS_SPACES = (
    "it puts a space in front of every text, or takes spaces from its ends (sentencepiece's "
    "add_dummy_prefix and remove_extra_whitespaces, as with Llama 2), so that a prompt and its "
    "completion, encoded one by one, are not the text that they make; use a tokenizer that does not"
)
"""Why such a tokenizer is refused."""


class HFTokenizer:
    """A `core.types.Tokenizer` over the `tokenizers` library; safe to use from several threads.

    Attributes:
      vocab_size: the largest id plus one. A model may have more rows in its embedding.
      bos_id, eos_id, pad_id: ids of the special tokens; `bos_id` may be None, and `pad_id` may
        equal `eos_id`, since masks are by length and never by id.
      config: the contents of tokenizer_config.json; `chat_template` in it is the chat template.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, config: dict[str, Any], name: str = ""):
        """Wraps a tokenizer whose config names at least an `eos_token`.

        Args:
          tokenizer: of the `tokenizers` library. Its truncation and padding are turned off.
          config: see `config` above.
          name: what to call it in errors: the file it came from.
        Raises:
          UserError: if there is no EOS, a special token is not in the vocabulary, or a text is not
            encoded as its parts are.
        """
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._name = name or "tokenizer"
        # A prompt, its completion and each turn of a chat are encoded one by one.
        for a, b in (("x", " x"), ("x ", "x")):
            if _spelled(tokenizer, a) + _spelled(tokenizer, b) != _spelled(tokenizer, a + b):
                raise UserError(f"{self._name}: {ALTERS_SPACES}")
        self.config = config
        self.vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.bos_id = self._special_id("bos_token")
        eos_id = self._special_id("eos_token")
        if eos_id is None:
            raise UserError(
                f"{self._name}: no eos_token; set it in {CONFIG_FILE} to the token that ends a text"
            )
        self.eos_id: int = eos_id
        pad_id = self._special_id("pad_token")
        self.pad_id: int = eos_id if pad_id is None else pad_id

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template that came with the tokenizer."""
        template = self.config.get("chat_template")
        if isinstance(template, list):  # Several, by purpose.
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        return template

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens spelled out in it become their ids, and none is added.

        Raises:
          UserError: naming the character and its position, if the vocabulary cannot express it.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # The library raises nothing more specific.
            raise UserError(self._why_not(text, error)) from error

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of the ids. An unfinished character is U+FFFD; ids of no token are nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def save(self, path: str) -> None:
        """Writes tokenizer.json and tokenizer_config.json into the directory `path`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / TOKENIZER_FILE))
        text = json.dumps(self.config, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    def _special_id(self, key: str) -> int | None:
        token = self.config.get(key)
        if isinstance(token, dict):  # An AddedToken written out.
            token = token.get("content")
        if token is None:
            return None
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(f"{self._name}: {key} {token!r} is not in the vocabulary")
        return token_id

    def _why_not(self, text: str, error: Exception) -> str:
        """The message about the first character that cannot be encoded, where there is one."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as invalid:
            start = invalid.start
            return (
                f"{self._name}: position {start} of {_around(text, start)} is half a character "
                "(a surrogate)"
            )
        splitter = self._tokenizer.pre_tokenizer
        if isinstance(self._tokenizer.model, models.WordLevel) and splitter is not None:
            for piece, (start, _) in splitter.pre_tokenize_str(text):
                if self._tokenizer.token_to_id(piece) is None:
                    known = " ".join(map(repr, self._tokens()))
                    return (
                        f"{self._name}: unknown character {piece[0]!r} at position {start} of "
                        f"{_around(text, start)}; the vocabulary has {known}"
                    )
        return f"{self._name}: {error}: {_around(text, 0)}"

    def _tokens(self) -> list[str]:
        vocab = self._tokenizer.get_vocab()
        return sorted(vocab, key=vocab.__getitem__)


def vocab_tokenizer(
    tokens: Sequence[str], *, bos: str | None = "<bos>", eos: str = "<eos>", pad: str = "<pad>"
) -> HFTokenizer:
    """A tokenizer over a fixed list of strings, for toy tasks: at each point the longest one.

    Args:
      tokens: every token; a token's id is its place. Must hold `eos` and `pad`, and `bos` if any.
      bos, eos, pad: the special tokens. Any other, `<think>` too, is text that `decode` keeps.
    Raises:
      UserError: on an empty or repeated token, or a special token that is not in `tokens`.
    """
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = sorted({token for token in tokens if list(tokens).count(token) > 1})
        raise UserError(f"tokens: each may stand there once; {twice} stand there more often")
    if "" in vocab:
        raise UserError(f"tokens: token {vocab['']} is empty")
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=""))
    longest_first = sorted(tokens, key=len, reverse=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex("|".join(map(re.escape, longest_first))), "isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    for name, token in (("bos", bos), ("eos", eos), ("pad", pad)):
        if token is not None and token not in vocab:
            raise UserError(f"{name}={token!r} is not one of the {len(tokens)} tokens")
    special = list(dict.fromkeys(token for token in (bos, eos, pad) if token is not None))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return HFTokenizer(tokenizer, tokenizer_config(bos, eos, pad), "vocabulary")


def load_tokenizer(path: str | Path) -> HFTokenizer:
    """Reads the tokenizer of a directory: tokenizer.json, or else tokenizer.model.

    Raises:
      UserError: if there is none, or it cannot be read.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"tokenizer: no such directory: {folder}")
    if (folder / TOKENIZER_FILE).is_file():
        return _load_json(folder)
    if (folder / SENTENCEPIECE_FILE).is_file():
        from alignjax.text.sentencepiece import load_sentencepiece

        return load_sentencepiece(folder / SENTENCEPIECE_FILE)
    found = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
    raise UserError(
        f"{folder}: no tokenizer; expected {TOKENIZER_FILE} with {CONFIG_FILE}, or "
        f"{SENTENCEPIECE_FILE} (found {found})"
    )


def stop_ids(
    tokenizer: Tokenizer, tokens: Sequence[str] = (), eos_ids: Sequence[int] = ()
) -> tuple[int, ...]:
    """The ids that end a completion, each once, EOS first.

    Args:
      tokenizer: its EOS is one of them: the one that is trained.
      tokens: further ones, by their text.
      eos_ids: those that the model's directory lists; see `models.load_eos_ids`.
    Raises:
      UserError: if one of them is not a single token.
    """
    ids = [tokenizer.encode(token) for token in tokens]
    for token, pieces in zip(tokens, ids, strict=True):
        if len(pieces) != 1:
            raise UserError(
                f"stop_tokens: {token!r} is {len(pieces)} tokens in this vocabulary; expected one"
            )
    return tuple(dict.fromkeys((tokenizer.eos_id, *eos_ids, *(pieces[0] for pieces in ids))))


def check_fits(tokenizer: Tokenizer, num_rows: int, where: str | Path) -> None:
    """Raises a UserError if the tokenizer at `where` has ids beyond the model's `num_rows`."""
    if num_rows < tokenizer.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab_size} ids, the model only {num_rows}; "
            "they do not belong together"
        )


def tokenizer_config(bos: str | None, eos: str, pad: str | None, **more: Any) -> dict[str, Any]:
    """The tokenizer_config.json of a tokenizer of our own, as transformers reads it."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos if pad is None else pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    } | more


def _spelled(tokenizer: tokenizers.Tokenizer, text: str) -> str:
    """The text as the model of the tokenizer sees it, its spaces spelled in some way."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    if tokenizer.pre_tokenizer is not None:
        text = "".join(piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return text


def _around(text: str, position: int, reach: int = 40) -> str:
    """The text in quotes, or what stands around a position in it if it is long."""
    if len(text) <= 2 * reach:
        return repr(text)
    start, end = max(0, position - reach), position + reach
    return "..." * (start > 0) + repr(text[start:end]) + "..." * (end < len(text))


def _load_json(folder: Path) -> HFTokenizer:
    path = folder / TOKENIZER_FILE
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # The library raises nothing more specific.
        raise UserError(f"{path}: not a tokenizer that can be read: {error}") from error
    config_path = folder / CONFIG_FILE
    if not config_path.is_file():
        raise UserError(f"{folder}: {TOKENIZER_FILE} without {CONFIG_FILE}, which names its EOS")
    try:
        config = json.loads(config_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{config_path}: broken JSON: {error}") from error
    if (folder / TEMPLATE_FILE).is_file():  # Newer than, and preferred to, the one in the config.
        config["chat_template"] = (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    return HFTokenizer(tokenizer, config, str(path))
