"""`alignjax export RUN DIR`: the weights of a checkpoint -> a Hugging Face directory, or PEFT's."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

EXAMPLES = """\
examples:
  alignjax export runs/r1_zero/zero exported
  alignjax export runs/gsm8k/sft exported --step 200 --dtype bfloat16 --max-shard-size 2GB
  alignjax export runs/lora exported --adapter

A finished run has its last weights in RUN/model already; this takes them out of a checkpoint, of a
run that goes on or was stopped as well. transformers and vLLM read the result: config.json,
model.safetensors or shards with their index, generation_config.json and the tokenizer.

Adapters (model.lora) are merged into the weights, quantised ones (model.quantize) being restored to
float32 as the run computed with them. With --adapter they are written by themselves, for PEFT.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", help="a run's directory")
    parser.add_argument("out", metavar="DIR", help="directory to write; must not exist")
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint (default: the last)"
    )
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapters of a LoRA run alone, for PEFT"
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"],
        help="of the weights in the files (default: as they were trained, so that nothing is lost)",
    )  # fmt: skip
    parser.add_argument(
        "--max-shard-size", type=_size, default="5GB", metavar="SIZE",
        help="a larger model is written in several files: 500MB, 5GB (default: 5GB)",
    )  # fmt: skip


def _size(text: str) -> int:
    """Bytes of a size such as 500MB; units are powers of 1000."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(KB|MB|GB)", text.upper())
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size such as 500MB or 5GB")
    return int(float(match[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[match[2]])


def main(args: argparse.Namespace) -> None:
    from alignjax.cli.runtime import prepare

    prepare()
    from alignjax.core.errors import UserError
    from alignjax.recipes.stage import export_checkpoint

    if args.adapter and args.dtype:
        raise UserError("--dtype: adapters are written in float32; leave it out, or --adapter")
    step = export_checkpoint(
        Path(args.run),
        Path(args.out),
        step=args.step,
        adapter=args.adapter,
        dtype=args.dtype,
        max_shard_bytes=args.max_shard_size,
    )
    print(f"wrote {args.out} from step {step}")
