"""`alignjax report RUN`: a page of what a critique run wrote, to be read in a browser."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

EXAMPLES = """\
examples:
  alignjax report runs/constitutional/revisions
  alignjax report runs/constitutional --num 300 --out revisions.html

RUN is the directory of a finished run of `phase: critique`, or of a recipe with one such stage.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EXAMPLES
    parser.add_argument("run", metavar="RUN", help="a run's directory")
    parser.add_argument("--num", type=int, default=100, help="answers to show (default: 100)")
    parser.add_argument(
        "--out", metavar="HTML", help="the page to write (default: critiques.html in the directory)"
    )


def main(args: argparse.Namespace) -> None:
    from alignjax.core.errors import UserError
    from alignjax.report.critiques import critique_page

    if args.num < 1:
        raise UserError(f"--num={args.num}: expected at least 1")
    run = find_run(Path(args.run))
    out = Path(args.out) if args.out else run / "critiques.html"
    figures = json.loads((run / "critique.json").read_text(encoding="utf-8"))
    with (run / "trace.jsonl").open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in itertools.islice(lines, args.num)]
    try:
        critique_page(records, figures, out, title=f"Critiques and revisions: {run}")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror or error}") from error
    print(f"wrote {out}")


def find_run(folder: Path) -> Path:
    """The directory, or the one below it, that a finished critique run left. Raises UserError."""
    from alignjax.core.errors import UserError

    found = [p.parent for p in (folder / "trace.jsonl", *sorted(folder.glob("*/trace.jsonl")))
             if p.is_file()]  # fmt: skip
    if not found:
        raise UserError(
            f"{folder}: no trace.jsonl in it or in a directory of it; expected a finished run of "
            "phase: critique (a train run has its curves in report.png)"
        )
    if len(found) > 1:
        raise UserError(f"{folder}: several critique runs ({', '.join(map(str, found))}); name one")
    return found[0]
