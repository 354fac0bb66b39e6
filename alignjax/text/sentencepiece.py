"""Texts -> a sentencepiece model -> tokenizer.json. Sentencepiece trains; `HFTokenizer` runs.

A sentencepiece model and the tokenizer.json written from it give the same ids (tests compare them
with the sentencepiece library on real text), so nothing here runs after conversion.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from alignjax.core.errors import UserError
from alignjax.text.tokenizer import (
    ALTERS_SPACES,
    FROM_FILE,
    HFTokenizer,
    special_text,
    tokenizer_config,
)

SENTENCEPIECE_FILE = "tokenizer.model"

_SPACE = "\u2581"
"""How sentencepiece spells a space inside its pieces."""

PAD, BOS, EOS, UNK = "<pad>", "<s>", "</s>", "<unk>"
"""Special tokens of a vocabulary that is trained here: ids 0 to 3."""


def train_sentencepiece(
    texts: Iterable[str],
    out_dir: str | Path,
    vocab_size: int,
    *,
    special_tokens: Sequence[str] = (),
    model_type: Literal["unigram", "bpe"] = "unigram",
    character_coverage: float = 0.9995,
) -> HFTokenizer:
    """Trains a vocabulary and writes tokenizer.model, tokenizer.json and tokenizer_config.json.

    Lossless but for U+2581, which stands for a space inside and comes back as one, and
    deterministic: text is not normalised, spaces are kept, a number is split into its digits, and a
    character without a piece of its own is spelled in bytes. The same texts in the same order give
    the same files.

    Args:
      texts: what to train on.
      out_dir: directory, made if missing.
      vocab_size: number of tokens in all: 4 special ones, 256 bytes, `special_tokens` and pieces.
      special_tokens: strings that are always one token, such as `<think>`; `decode` keeps them.
      model_type: "unigram" (arXiv:1804.10959) or "bpe" (arXiv:1508.07909).
      character_coverage: share of the characters that get a piece; the others become bytes.
    Raises:
      UserError: if there is no text, too little of it for `vocab_size`, or `vocab_size` is too
        small for what every vocabulary has.
    """
    import sentencepiece

    num_fixed = len((PAD, BOS, EOS, UNK)) + 256 + len(special_tokens)
    if vocab_size <= num_fixed:
        raise UserError(
            f"tokenizer: vocab_size={vocab_size}; expected more than {num_fixed}: 4 special "
            f"tokens, 256 bytes and {len(special_tokens)} of special_tokens come before any piece"
        )
    total = 0

    def counted() -> Iterator[str]:
        nonlocal total
        for text in texts:
            total += len(text)
            yield text

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=counted(),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            character_coverage=character_coverage,
            user_defined_symbols=list(special_tokens),
            byte_fallback=True,
            split_digits=True,
            required_chars="<>x0123456789ABCDEF",  # See `_unigram`: what "<0x0A>" is written with.
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2**30,  # The default skips longer texts without a word.
            num_threads=1,  # Sums in a fixed order: the same pieces on every machine.
            minloglevel=2,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_piece=UNK,
        )
    except RuntimeError as error:
        if not total:
            raise UserError("tokenizer: no text to train on") from error
        reason = str(error).rpartition("] ")[2]  # After the place in the library's own source.
        raise UserError(f"tokenizer: vocab_size={vocab_size}: {reason}") from error
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / SENTENCEPIECE_FILE
    path.write_bytes(model.getvalue())
    tokenizer = load_sentencepiece(path)
    tokenizer.save(str(folder))
    return tokenizer


def load_sentencepiece(path: str | Path, config: Mapping[str, Any] | None = None) -> HFTokenizer:
    """Reads a unigram or BPE tokenizer.model.

    Args:
      path: of the file.
      config: the contents of a tokenizer_config.json, which come before what the model says.
        `added_tokens_decoder` may name tokens beyond those of the model; `legacy: false` puts the
        space of `add_dummy_prefix` at the start of a text only, not after each special token in it.
    Raises:
      UserError: if it is no sentencepiece model, of another type, alters spaces, or has no EOS.
    """
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    schema: Any = sentencepiece_model_pb2  # Its classes are made at import.
    proto = schema.ModelProto()
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except DecodeError as error:
        raise UserError(f"{path}: not a sentencepiece model: {error}") from error
    trainer, piece_type = proto.trainer_spec, schema.ModelProto.SentencePiece
    if not proto.pieces or trainer.model_type not in (trainer.UNIGRAM, trainer.BPE):
        raise UserError(f"{path}: expected a sentencepiece model of type unigram or bpe")
    spec = proto.normalizer_spec
    if spec.remove_extra_whitespaces:
        raise UserError(f"{path}: {ALTERS_SPACES}")
    config = dict(config or {})
    is_unigram = trainer.model_type == trainer.UNIGRAM
    tokenizer = tokenizers.Tokenizer(
        _unigram(proto, piece_type) if is_unigram else _bpe(proto, piece_type)
    )
    _spell_spaces(tokenizer, spec, is_legacy=config.get("legacy") is not False)
    control = (piece_type.CONTROL, piece_type.UNKNOWN)
    tokenizer.add_special_tokens(
        [_added(p.piece, special=True) for p in proto.pieces if p.type in control]
    )
    tokenizer.add_tokens(
        [_added(p.piece, special=False) for p in proto.pieces if p.type == piece_type.USER_DEFINED]
    )

    def piece(index: int) -> str | None:
        return proto.pieces[index].piece if 0 <= index < len(proto.pieces) else None

    _add_listed(tokenizer, config, path)
    eos = special_text(config.get("eos_token")) or piece(trainer.eos_id)
    if eos is None:
        raise UserError(f"{path}: the model has no EOS; train it with an eos_id")
    own = tokenizer_config(
        piece(trainer.bos_id), eos, piece(trainer.pad_id), unk_token=piece(trainer.unk_id)
    )
    given = {key: value for key, value in config.items() if value is not None}
    return HFTokenizer(tokenizer, own | given | {"tokenizer_class": FROM_FILE}, str(path))


def _spell_spaces(tokenizer: tokenizers.Tokenizer, spec: Any, *, is_legacy: bool) -> None:
    """Sets how spaces, and the one in front of a text, are spelled and read."""
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    scheme: Literal["first", "never"] = "never"
    if spec.add_dummy_prefix and is_legacy:
        steps.append(normalizers.Prepend(_SPACE))
    elif spec.add_dummy_prefix:
        scheme = "first"
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=_SPACE, prepend_scheme=scheme, split=False
    )
    strip = [decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )


def _add_listed(
    tokenizer: tokenizers.Tokenizer, config: Mapping[str, Any], path: str | Path
) -> None:
    """Adds what `added_tokens_decoder` has beyond the model, at the ids that it says."""
    listed = config.get("added_tokens_decoder") or {}
    for index, token in sorted(((int(i), token) for i, token in listed.items())):
        content, special = token["content"], token.get("special", False)
        added = AddedToken(
            content, special=special, normalized=False,
            lstrip=token.get("lstrip", False), rstrip=token.get("rstrip", False),
        )  # fmt: skip
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([added])
        if tokenizer.token_to_id(content) != index:
            raise UserError(
                f"{path}: added_tokens_decoder has {content!r} as {index}, but here it is "
                f"{tokenizer.token_to_id(content)}; give the tokenizer.json of this model"
            )


def _added(token: str, *, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _unigram(proto: Any, piece_type: Any) -> models.Unigram:
    lowest = min((p.score for p in proto.pieces if p.type == piece_type.NORMAL), default=0.0)
    # Bytes are for characters without a piece. The library would also match the text "<0x0A>" with
    # the byte of that name: a score below that of any other spelling keeps it from doing so, as
    # long as its characters have pieces.
    never = 10 * (lowest - 10)
    vocab = [(p.piece, never if p.type == piece_type.BYTE else p.score) for p in proto.pieces]
    return models.Unigram(vocab, proto.trainer_spec.unk_id, proto.trainer_spec.byte_fallback)


def _bpe(proto: Any, piece_type: Any) -> models.BPE:
    vocab = {p.piece: i for i, p in enumerate(proto.pieces)}
    merges = []
    for p in proto.pieces:
        if p.type == piece_type.NORMAL:
            splits = [(p.piece[:i], p.piece[i:]) for i in range(1, len(p.piece))]
            known = [(left, right) for left, right in splits if left in vocab and right in vocab]
            merges += [(-p.score, vocab[left], vocab[right], left, right) for left, right in known]
    return models.BPE(
        vocab,
        [(left, right) for *_, left, right in sorted(merges)],
        unk_token=proto.pieces[proto.trainer_spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )
