"""docs/papers.md leaves out no public loss, and names functions and tests that there are."""

import ast
import importlib
import re
from pathlib import Path

from alignjax import losses

REPO = Path(__file__).resolve().parent.parent
PAGE = (REPO / "docs" / "papers.md").read_text(encoding="utf-8")


def test_every_public_loss_has_its_paper():
    functions = {name for name in losses.__all__ if name[0].islower()}
    assert len(functions) >= 12
    assert functions <= set(re.findall(r"`losses\.(\w+)", PAGE))


def test_every_function_named_exists():
    named = re.findall(r"`(losses|generate\.sample)\.(\w+)(?:\([^`]*\))?`", PAGE)
    assert len(named) >= 15
    for module, name in named:
        assert hasattr(importlib.import_module(f"alignjax.{module}"), name), name


def test_every_test_named_exists():
    checked = 0
    for path, names in re.findall(r"`(tests/[\w/]+\.py)`:\s((?:`test_\w+`(?:,\s)?)+)", PAGE):
        tree = ast.parse((REPO / path).read_text(encoding="utf-8"))
        there = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        for name in re.findall(r"`(test_\w+)`", names):
            assert name in there, f"{path}: {name}"
            checked += 1
    assert checked == len(re.findall(r"`test_\w+`", PAGE)) > 25
