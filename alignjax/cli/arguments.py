"""Arguments that several verbs have: a config, what is set otherwise in it, and to see it."""

from __future__ import annotations

import argparse


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """`key=value` ..., and `--print-config`. To be called once the positional ones are there."""
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="values to set otherwise")
    parser.add_argument(
        "--print-config", action="store_true",
        help="print every value and where it came from, and stop",
    )  # fmt: skip


def override(key: str, text: str) -> str:
    """`key=text`, whatever signs the text has."""
    from alignjax.core.yaml_tree import scalar_text

    return f"{key}={scalar_text(text)}"


def model_of(path: str) -> str:
    """The model of a run, or what is a model itself."""
    from pathlib import Path

    return f"{path}/model" if (Path(path) / "model").is_dir() else path
