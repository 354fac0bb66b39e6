"""`alignjax VERB ...` -> the verb's own module, imported only then; errors -> one message."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from alignjax import __version__
from alignjax.core.allocator import restart_with_huge_pages
from alignjax.core.errors import Terminated, UserError

VERBS = {
    "run": "train what a config describes; resumes where it stopped",
    "plan": "memory and time of a run on a pod that is not there",
    "inspect": "show a batch of the data, with what is trained on",
    "generate": "sample completions of prompts from a model directory",
    "label": "rank responses on a web page, alone or with others",
    "eval": "measure accuracy: pass@1 with its interval, maj@k, pass@k",
    "compare": "how often one model's completions are preferred to another's",
    "report": "write a page of what a critique run wrote, to be read",
    "frontier": "draw reward against KL from the reference, of several runs",
    "export": "write a run's model as a Hugging Face directory",
    "tokenizer": "train a sentencepiece vocabulary",
    "demo": "watch a base model learn to reason, on a laptop",
}
"""Verb -> what it does; `alignjax/cli/VERB.py` holds it."""

EXAMPLES = """\
examples:
  alignjax demo r1-zero
  alignjax run configs/recipes/gsm8k_laptop.yaml
  alignjax run configs/recipes/gsm8k_laptop.yaml stages.grpo.loop.steps=10
  alignjax run configs/recipes/gsm8k_laptop.yaml --print-config
  alignjax VERB --help
"""

OK, BUG, USER_ERROR, INTERRUPTED = 0, 1, 2, 130
TERMINATED = 75
"""EX_TEMPFAIL of sysexits.h: saved after SIGTERM, start the same command again. The templates in
launch/ look for it."""


def program() -> int:
    """The process that a user starts."""
    restart_with_huge_pages()
    return main()


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb.

    Args:
      argv: the words after the program's name; None takes the process's own.
    Returns:
      The exit status: 0, or what the verb returned; 1 on a bug of ours, 2 on what the user can
      mend (wrong usage included), 130 when interrupted, 75 after SIGTERM.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in words
    try:
        status = _dispatch(words)
        sys.stdout.flush()
        return status
    except Terminated:
        print("\nalignjax: terminated; the same command continues", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print("\nalignjax: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BUG
    except UserError as error:
        if is_debug:
            traceback.print_exc()
        else:
            print(f"alignjax: {error}", file=sys.stderr)
        return USER_ERROR
    except Exception as error:
        if is_debug:
            traceback.print_exc()
        else:
            what = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"alignjax: {what}\nrun again with --debug to see where", file=sys.stderr)
        return BUG


def _dispatch(words: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="alignjax",
        usage="alignjax [--version] [--help] VERB ...",
        description="Align language models in JAX: from a base model to one that reasons.",
        epilog="verbs:\n"
        + "".join(f"  {verb:<10} {summary}\n" for verb, summary in VERBS.items())
        + f"\n{EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"alignjax {__version__}")
    parser.add_argument("--debug", action="store_true", help="print tracebacks")
    parser.add_argument("verb", nargs="?", choices=VERBS, metavar="VERB", help="see below")
    # Only the words up to the verb are ours.
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    verb = parser.parse_args(words[: at + 1]).verb
    if verb is None:
        parser.print_help()
        return USER_ERROR
    module = importlib.import_module(f"alignjax.cli.{verb}")
    verb_parser = argparse.ArgumentParser(
        prog=f"alignjax {verb}",
        description=VERBS[verb].capitalize() + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(verb_parser)
    verb_parser.add_argument("--debug", action="store_true", help="print tracebacks")
    # Intermixed: `run CONFIG key=value --print-config key=value` is what people type.
    status = module.main(verb_parser.parse_intermixed_args(words[at + 1 :]))
    return OK if status is None else status
