"""`alignjax frontier RUN ... --out PNG`: reward against KL from the reference, of several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLES = """\
examples:
  alignjax frontier runs/ppo runs/grpo runs/online_dpo --out frontier.png

Each RUN is a directory with metrics.jsonl, of a run with a reward and a reference (kl_coef above
0). A run alone has its picture in RUN/frontier.png already.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's directory")
    parser.add_argument(
        "--out", default="frontier.png", metavar="PNG", help="the picture (default: frontier.png)"
    )


def main(args: argparse.Namespace) -> None:
    from alignjax.core.errors import UserError
    from alignjax.report.frontier import frontier_picture
    from alignjax.train.metrics import read_metrics

    runs = {}
    for run in args.runs:
        name = Path(run).name
        if not (Path(run) / "metrics.jsonl").is_file():
            raise UserError(f"{run}: no metrics.jsonl; expected the directory of a run")
        runs[run if name in runs else name] = read_metrics(Path(run))
    frontier_picture(runs, args.out)
    print(f"wrote {args.out}")
