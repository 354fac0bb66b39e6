"""`alignjax generate MODEL`: completions of prompts, as text or as JSON lines."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

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
    parser.add_argument("--max-tokens", type=int, metavar="N", help="default: 256, or what fits")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0, help="in (0, 1] (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, help="0 keeps all (default)")
    parser.add_argument("--stop", action="append", default=[], metavar="TOKEN", help="besides EOS")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto",
        help="of the matrix products (default: bfloat16 on TPU and GPU, float32 on CPU)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object for each completion")


def main(args: argparse.Namespace) -> None:
    _check(args)
    prompts = _prompts(args)

    from alignjax.cli.runtime import prepare

    prepare()
    import jax
    import numpy as np

    from alignjax.core.errors import UserError
    from alignjax.core.precision import compute_dtype
    from alignjax.core.types import LENGTH, Sampling
    from alignjax.data import Example, Fields, TextConfig, prompt_encoder
    from alignjax.generate import make_generate
    from alignjax.models import load, load_eos_ids
    from alignjax.sharding import MeshConfig, make_mesh
    from alignjax.text import check_fits, load_tokenizer, stop_ids

    tokenizer = load_tokenizer(args.model)
    mesh = make_mesh(MeshConfig())
    dtype = compute_dtype(args.dtype, mesh.devices.flat[0].platform)
    model, params = load(args.model, mesh=mesh, compute_dtype=dtype)
    check_fits(tokenizer, model.config.vocab_size, args.model)
    text = TextConfig(fields=Fields(prompt="prompt"), chat=args.chat, system=args.system)
    encode = prompt_encoder(text, tokenizer)
    ids = [encode(Example(prompt=prompt)) for prompt in prompts]
    if not all(map(len, ids)):
        raise UserError("a prompt is empty, and this tokenizer has no BOS to begin with")
    lengths = np.array([len(i) for i in ids])
    tokens = np.zeros((len(ids), lengths.max()), np.int32)
    for row, one in zip(tokens, ids, strict=True):
        row[: len(one)] = one
    room = model.config.max_position_embeddings - int(lengths.max())
    max_tokens = max(1, min(256, room)) if args.max_tokens is None else args.max_tokens
    sampling = Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        max_tokens=max_tokens,
        stop_tokens=stop_ids(tokenizer, args.stop, load_eos_ids(args.model)),
        num_samples=args.num_samples,
    )
    try:
        out = make_generate(model, mesh=mesh)(
            params, tokens, lengths, jax.random.PRNGKey(args.seed), sampling
        )
    except ValueError as error:  # What the engine refuses here came from the command line.
        raise UserError(str(error)) from error
    if not np.isfinite(out.logps).all():
        raise UserError(
            f"{args.model}: log-probs are not finite: the weights hold nan or inf, or are too "
            f"large for --dtype {dtype} or --temperature {args.temperature}"
        )
    rows = zip(out.tokens, out.lengths, out.logps, out.finish_reasons, strict=True)
    for i, (row, length, logps, reason) in enumerate(rows):
        completion = tokenizer.decode(row[:length])
        prompt = prompts[i // args.num_samples]
        if args.json:
            record = {
                "prompt": prompt,
                "completion": completion,
                "num_tokens": int(length),
                "logp": float(logps.sum()),
                "finish_reason": "length" if reason == LENGTH else "stop",
            }
            print(json.dumps(record, ensure_ascii=False))
        else:
            cut = f" [cut at {max_tokens} tokens]" if reason == LENGTH else ""
            print(f"{prompt}{completion}{cut}" if not args.chat else f"{completion}{cut}")


def _check(args: argparse.Namespace) -> None:
    from alignjax.core.errors import UserError

    for name, is_good, expected in (
        ("num_samples", args.num_samples >= 1, "at least 1"),
        ("max_tokens", args.max_tokens is None or args.max_tokens >= 1, "at least 1"),
        ("temperature", 0 <= args.temperature < float("inf"), "at least 0"),
        ("top_p", 0 < args.top_p <= 1, "above 0 and at most 1"),
        ("top_k", args.top_k >= 0, "at least 0"),
        ("system", args.chat or args.system is None, "--chat with it"),
    ):
        if not is_good:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {getattr(args, name)}: expected {expected}")


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
