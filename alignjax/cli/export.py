"""`alignjax export RUN DIR`: the weights of a checkpoint -> a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  alignjax export runs/r1_zero/zero exported
  alignjax export runs/gsm8k/sft exported --step 200

A finished run has its last weights in RUN/model already; this takes them out of a checkpoint, of a
run that goes on or was stopped as well. transformers and vLLM read the result.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", help="a run's directory")
    parser.add_argument("out", metavar="DIR", help="directory to write; must not exist")
    parser.add_argument(
        "--step", type=int, metavar="N", help="which checkpoint (default: the last)"
    )


def main(args: argparse.Namespace) -> None:
    from alignjax.cli.runtime import prepare

    prepare()
    from alignjax.recipes.stage import export_checkpoint

    step = export_checkpoint(Path(args.run), Path(args.out), step=args.step)
    print(f"wrote {args.out} from step {step}")
