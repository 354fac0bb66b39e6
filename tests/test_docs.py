"""docs/papers.md leaves out no public loss; pages name what exists; README's loop runs."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from alignjax import losses

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
PAGE = (REPO / "docs" / "papers.md").read_text(encoding="utf-8")


def test_every_public_loss_has_its_paper():
    functions = {name for name in losses.__all__ if name[0].islower()}
    assert len(functions) >= 90
    assert functions <= set(re.findall(r"`losses\.(\w+)", PAGE))


ORACLE_ELSEWHERE = {
    "adaptive_kl_control": "a state: test_control.py",
    "clip_cov_mask": "draws; test_entropy.py counts what it draws",
    "fixed_kl_control": "a state: test_control.py",
    "forward_kl": "of hidden states: loops in test_distill.py",
    "init_moments": "a state: test_shaping.py",
    "jsd": "of hidden states: loops in test_distill.py",
    "mixture": "of other losses: test_preference.py",
    "next_token_logps": "of hidden states: loops in test_logprob.py",
    "normalize_rewards": "of a state: test_shaping.py",
    "overlong_penalty": "no mask: test_shaping.py",
    "policy_loss": "of an algorithm: test_presets.py has an oracle of each",
    "reverse_kl": "of hidden states: loops in test_distill.py",
    "target_kl_control": "a state: test_control.py",
    "top_k_forward_kl": "of hidden states: loops in test_distill.py",
    "update_moments": "a state: test_shaping.py",
}
"""Functions that `tests/losses/case.py` is not made for."""


def test_every_public_loss_has_its_oracle():
    tests = (path.read_text(encoding="utf-8") for path in (REPO / "tests/losses").glob("*.py"))
    held = set(re.findall(r"\bCase\(\s*losses\.(\w+)", "".join(tests)))
    functions = {n for n in losses.__all__ if inspect.isfunction(getattr(losses, n))}
    assert functions - held == ORACLE_ELSEWHERE.keys()


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
                parent = "" if path.startswith("tests/") else "alignjax."
                module = importlib.import_module(parent + path[:-3].replace("/", "."))
                assert hasattr(module, name), f"{page.name}: {path}: {name}"
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("has_targets", [True, False])
def test_the_losses_in_your_own_loop(has_targets):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert sum(bool(line) for line in code.splitlines()) <= 12
    nats = jnp.full((2, 4), -1.0)
    names = {
        "my_model": lambda params, tokens: (params["embedding"][tokens], params["unembedding"]),
        "params": {"embedding": jnp.eye(5, 3), "unembedding": jnp.eye(3, 5)},
        "batch": {
            "tokens": jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]]),
            "mask": jnp.zeros((2, 4), bool).at[:, 2:].set(has_targets),
            "old_logps": nats, "ref_logps": nats, "advantages": -nats,
        },
    }  # fmt: skip
    exec(code, names)
    grads = jnp.concatenate([grad.ravel() for grad in jax.tree.leaves(names["grads"])])
    assert jnp.isfinite(grads).all() and grads.any() == has_targets
    assert jnp.isfinite(names["loss_fn"](names["params"], names["batch"]))
