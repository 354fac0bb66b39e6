"""`alignjax export RUN DIR`: the weights of a checkpoint -> a Hugging Face directory, or PEFT's."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  alignjax export runs/r1_zero/zero exported
  alignjax export runs/gsm8k/sft exported --step 200
  alignjax export runs/lora exported --adapter

A finished run has its last weights in RUN/model already; this takes them out of a checkpoint, of a
run that goes on or was stopped as well. transformers and vLLM read the result.

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


def main(args: argparse.Namespace) -> None:
    from alignjax.cli.runtime import prepare

    prepare()
    from alignjax.recipes.stage import export_checkpoint

    step = export_checkpoint(Path(args.run), Path(args.out), step=args.step, adapter=args.adapter)
    print(f"wrote {args.out} from step {step}")
