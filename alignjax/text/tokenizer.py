"""Vocabulary, sentencepiece model or tokenizer.json -> one tokenizer: text <-> token ids.

Whatever a tokenizer was made from, what runs and what is saved is one `tokenizer.json` with its
`tokenizer_config.json`: the files that every other tool reads. So a toy vocabulary, a sentencepiece
model and a tokenizer of the Hub are the same class, and exporting one is copying two files.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from alignjax.core.errors import UserError
from alignjax.core.types import Tokenizer
from alignjax.text.prefix import is_even, without_prefix

TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
FROM_FILE = "PreTrainedTokenizerFast"
"""The class of transformers that does what tokenizer.json says and nothing else."""
ALTERS_SPACES = (
    "it alters the spaces of a text in a way that is not undone (sentencepiece's "
    "remove_extra_whitespaces, a Strip, a ByteLevel with add_prefix_space), so that a prompt and "
    "its completion, encoded one by one, are not the text that they make; use a tokenizer that "
    "does not"
)
"""Why such a tokenizer is refused. One that puts a space in front of a text (Llama 2) is not."""


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
        self._going_on, self._scheme = tokenizer, "never"
        if not is_even(tokenizer):
            found = without_prefix(tokenizer)
            if found is None or not is_even(found[0]):
                raise UserError(f"{self._name}: {ALTERS_SPACES}")
            self._going_on, self._scheme = found
        self._added = frozenset(tokenizer.get_added_tokens_decoder())
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
    def vocab(self) -> dict[str, int]:
        """Every token, added ones included, and its id."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    @property
    def special_texts(self) -> list[str]:
        """Texts of the special tokens: BOS, EOS, what begins and ends a turn, ... Spelled out in a
        text, each is the token."""
        added = self._tokenizer.get_added_tokens_decoder()
        return [token.content for token in added.values() if token.special]

    @property
    def chat_template(self) -> str | None:
        """Source of the chat template that came with the tokenizer."""
        template = self.config.get("chat_template")
        if isinstance(template, list):  # Several, by purpose.
            named = {entry["name"]: entry["template"] for entry in template}
            template = named.get("default")
        return template

    def encode(self, text: str, after: Sequence[int] = ()) -> list[int]:
        """Ids of the text; special tokens spelled out in it become their ids, and none is added.

        Args:
          text: alone, or what goes on from `after`.
          after: ids that the text follows, such as those of its prompt. Only a tokenizer that puts
            a space in front of a text (Llama 2, Mistral) reads them, for there it puts none, unless
            the last is an added token and the tokenizer puts one after each of those.
        Raises:
          UserError: naming the character and its position, if the vocabulary cannot express it.
        """
        try:
            return self._encode(text, after)
        except Exception as error:  # The library raises nothing more specific.
            raise UserError(self._why_not(text, error)) from error

    def decode(
        self, ids: Sequence[int], *, skip_special: bool = True, after: Sequence[int] = ()
    ) -> str:
        """Text of the ids. An unfinished character is U+FFFD; ids of no token are nothing.

        Without `after`, which is as in `encode`, the space that was put in front is taken away.
        """
        return "".join(
            tokenizer.decode(run, skip_special_tokens=skip_special)
            for tokenizer, run in self._runs([int(i) for i in ids], after)
        )

    def _encode(self, text: str, after: Sequence[int]) -> list[int]:
        def ids_of(tokenizer: tokenizers.Tokenizer, part: str) -> Any:
            return tokenizer.encode(part, add_special_tokens=False)

        if self._starts(after):
            return ids_of(self._tokenizer, text).ids
        encoding = ids_of(self._going_on, text)
        ids: list[int] = encoding.ids
        if self._scheme == "always":
            for n, (i, (_, stop)) in enumerate(zip(ids, encoding.offsets, strict=True), start=1):
                if i in self._added:
                    return ids[:n] + ids_of(self._tokenizer, text[stop:]).ids
        return ids

    def _runs(
        self, ids: list[int], after: Sequence[int]
    ) -> Iterator[tuple[tokenizers.Tokenizer, list[int]]]:
        """What to decode one by one, with the tokenizer that takes a space away or does not."""
        if self._scheme != "always":
            yield (self._tokenizer if self._starts(after) else self._going_on), ids
            return
        starts = self._starts(after)
        for is_added, run in itertools.groupby(ids, self._added.__contains__):
            yield (self._tokenizer if starts and not is_added else self._going_on), list(run)
            starts = is_added

    def _starts(self, after: Sequence[int]) -> bool:
        """Whether what stands after these ids has a space in front of it, in such a tokenizer."""
        return len(after) == 0 or (self._scheme == "always" and after[-1] in self._added)

    def save(self, path: str) -> None:
        """Writes tokenizer.json and tokenizer_config.json into the directory `path`."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        self._tokenizer.save(str(folder / TOKENIZER_FILE))
        # Some classes of transformers, LlamaTokenizer for one, put spaces by rules of their own.
        own = {} if self._scheme == "never" else {"tokenizer_class": FROM_FILE}
        text = json.dumps(self.config | own, indent=2, ensure_ascii=False) + "\n"
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")

    def _special_id(self, key: str) -> int | None:
        token = special_text(self.config.get(key))
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
    some_text = [-1]  # No token: what ends a completion never starts a text.
    ids = [tokenizer.encode(token, some_text) for token in tokens]
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
        "tokenizer_class": FROM_FILE,
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": eos if pad is None else pad,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    } | more


def special_text(token: Any) -> Any:
    """A special token of a tokenizer_config.json, which may be an AddedToken written out."""
    return token.get("content") if isinstance(token, dict) else token


def _around(text: str, position: int, reach: int = 40) -> str:
    """The text in quotes, or what stands around a position in it if it is long."""
    if len(text) <= 2 * reach:
        return repr(text)
    start, end = max(0, position - reach), position + reach
    return "..." * (start > 0) + repr(text[start:end]) + "..." * (end < len(text))
