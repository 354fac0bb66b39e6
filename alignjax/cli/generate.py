"""`alignjax generate MODEL`: completions of prompts, as text or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from alignjax.cli import sampling

EXAMPLES = """\
examples:
  alignjax generate runs/r1_zero/zero/model --prompt '12*03-09+08='
  alignjax generate DIR --prompt 'Why is the sky blue?' --chat --max-tokens 512
  alignjax generate DIR --file prompts.txt --num-samples 4 --temperature 0.7 --json > out.jsonl
  echo 'One prompt a line' | alignjax generate DIR

MODEL is a Hugging Face directory (config.json, safetensors, tokenizer), such as a run's model/, or
the id of a model on the Hub, such as Qwen/Qwen3-0.6B.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="directory or id of the model")
    parser.add_argument(
        "--prompt", action="append", default=[], help="a prompt (repeat for several)"
    )
    parser.add_argument(
        "--file", metavar="PATH", help="prompts, one a line (default: what is piped in)"
    )
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message, with --chat")
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="for each (default: 1)"
    )
    sampling.add_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object for each completion")


def main(args: argparse.Namespace) -> None:
    _check(args)
    prompts = _prompts(args)

    from alignjax.data import Example, Fields, TextConfig, prompt_encoder

    sampler = sampling.Sampler(args.model, args)
    text = TextConfig(fields=Fields(prompt="prompt"), chat=args.chat, system=args.system)
    encode = prompt_encoder(text, sampler.tokenizer)
    ids = [encode(Example(prompt=prompt)) for prompt in prompts]
    max_tokens = sampler.max_tokens(max(map(len, ids)))
    for i, found in enumerate(sampler.sample(ids, args.num_samples, max_tokens=max_tokens)):
        prompt = prompts[i // args.num_samples]
        if args.json:
            record = {
                "prompt": prompt,
                "completion": found.text,
                "num_tokens": found.num_tokens,
                "logp": found.logp,
                "finish_reason": "length" if found.is_truncated else "stop",
            }
            print(json.dumps(record, ensure_ascii=False))
        else:
            cut = f" [cut at {max_tokens} tokens]" if found.is_truncated else ""
            print(f"{found.text}{cut}" if args.chat else f"{prompt}{found.text}{cut}")


def _check(args: argparse.Namespace) -> None:
    from alignjax.core.errors import UserError

    if args.num_samples < 1:
        raise UserError(f"--num-samples {args.num_samples}: expected at least 1")
    if args.system is not None and not args.chat:
        raise UserError(f"--system {args.system}: expected --chat with it")
    sampling.check(args)


def _prompts(args: argparse.Namespace) -> list[str]:
    from alignjax.core.errors import UserError

    prompts = list(args.prompt)
    if args.file:
        path = Path(args.file)
        if not path.is_file():
            raise UserError(f"--file: no such file: {path}")
        prompts += _lines(path.read_bytes(), f"--file: {path}")
    elif not prompts and not sys.stdin.isatty():
        prompts = _lines(sys.stdin.buffer.read(), "standard input")
    if not prompts:
        raise UserError("no prompt; give --prompt TEXT, --file PATH or pipe prompts in, one a line")
    return prompts


def _lines(data: bytes, where: str) -> list[str]:
    """Those that are not empty. Only a line feed ends one: form feeds, U+2028 may stand in one."""
    from alignjax.core.errors import UserError

    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text (byte {error.start})") from error
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]
