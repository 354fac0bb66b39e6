"""docs/papers.md leaves out no public loss; pages name files, functions and tests that exist."""

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


def test_every_file_named_exists_and_has_what_it_should():
    """`alignjax/core/types.py`, `core/types.py` or `core/types.py: Sample`, on any page."""
    checked = 0
    for page in (REPO / "README.md", *sorted((REPO / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for path, name in re.findall(r"`(?!path/to/)((?:\w+/)+\w+\.py)(?::\s(\w+))?", text):
            path = path.removeprefix("alignjax/")
            there = (REPO / path).is_file() or (REPO / "alignjax" / path).is_file()
            assert there, f"{page.name}: {path}"
            if name:
                module = importlib.import_module(f"alignjax.{path[:-3].replace('/', '.')}")
                assert hasattr(module, name), f"{page.name}: {path}: {name}"
            checked += 1
    assert checked > 10
