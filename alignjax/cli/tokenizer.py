"""`alignjax tokenizer train` : fields of records -> a sentencepiece vocabulary of a given size."""

from __future__ import annotations

import argparse

EXAMPLES = """\
examples:
  alignjax tokenizer train train.jsonl --vocab-size 2048 --out tokenizers/gsm8k
  alignjax tokenizer train a.jsonl b.parquet --field question --field answer \\
      --special-token '<think>' --special-token '</think>' --vocab-size 4096 --out tokenizers/math

Writes tokenizer.model, tokenizer.json and tokenizer_config.json. Ids 0 to 3 are padding, BOS, EOS
and unknown. A character without a piece of its own is spelled in bytes: any text can be encoded,
and comes back as it was, but for U+2581, which becomes a space.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("action", choices=["train"], help="what to do")
    parser.add_argument(
        "sources", nargs="+", metavar="SOURCE",
        help=".jsonl, .jsonl.gz, .parquet or .array_record files; tfds:NAME/SPLIT; hf:NAME/SPLIT",
    )  # fmt: skip
    parser.add_argument("--vocab-size", type=int, required=True, metavar="N", help="tokens in all")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--field", action="append", default=[], metavar="NAME",
        help="train on this field of each record: text, or chat messages (repeat for several; "
        "default: on all text there is)",
    )  # fmt: skip
    parser.add_argument(
        "--special-token", action="append", default=[], metavar="TEXT",
        help="text that is to be one token, always (repeat for several)",
    )  # fmt: skip
    parser.add_argument(
        "--model-type", choices=["unigram", "bpe"], default="unigram", help="default: unigram"
    )


def main(args: argparse.Namespace) -> None:
    from alignjax.data import open_source, texts
    from alignjax.text import train_sentencepiece

    source = open_source(args.sources)
    print(f"Training a vocabulary of {args.vocab_size} on {len(source):,} records")
    tokenizer = train_sentencepiece(
        texts(source, args.field),
        args.out,
        args.vocab_size,
        special_tokens=args.special_token,
        model_type=args.model_type,
    )
    sample = list(texts(source, args.field, limit=1000))
    num_tokens = sum(len(tokenizer.encode(text)) for text in sample)
    chars = sum(map(len, sample)) / max(num_tokens, 1)
    print(f"Wrote {args.out}: {tokenizer.vocab_size} tokens, {chars:.2f} characters per token")
