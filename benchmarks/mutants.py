"""How many deliberate faults in the loss modules do their tests notice?

One at a time, each fault is put into a module of `alignjax.losses`, in memory, and its tests run
until one fails: first the oracles of the function that has the fault, then all tests of the module,
then those of properties and of the presets.

    python benchmarks/mutants.py                      # all modules: about half an hour on 2 cores
    python benchmarks/mutants.py --modules kl clip    # some of them

Faults: a sign, a comparison, a mask turned or dropped, a mean that is a sum, a shift by one, an
exchanged product and quotient, a gradient that is not stopped, another default, another branch.
What survives is listed with its line; docs/results.md says why.
"""

import argparse
import ast
import copy
import importlib.abc
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import record

LOSSES = record.REPO / "alignjax" / "losses"
TESTS = record.REPO / "tests" / "losses"
TESTED_BY = {
    "ratio": ("ratio", "f_divergence"),
    "pairs": ("pairs", "preference", "reference_free", "unpaired"),
    "segments": ("segments", "reduce", "ratio", "trajectory"),
    "vocabulary": ("vocabulary", "logprob", "distill"),
}
"""Modules whose tests are in other files than that of their name."""
LIMIT_S = 900
"""A fault that makes the tests hang is noticed, too."""

SWAPPED_OPERATORS = {
    ast.Add: (ast.Sub, "sign"), ast.Sub: (ast.Add, "sign"),
    ast.Mult: (ast.Div, "product"), ast.Div: (ast.Mult, "product"),
    ast.BitAnd: (ast.BitOr, "mask"), ast.BitOr: (ast.BitAnd, "mask"),
    ast.Lt: (ast.Gt, "comparison"), ast.Gt: (ast.Lt, "comparison"),
    ast.LtE: (ast.GtE, "comparison"), ast.GtE: (ast.LtE, "comparison"),
    ast.Eq: (ast.NotEq, "comparison"), ast.NotEq: (ast.Eq, "comparison"),
}  # fmt: skip
SWAPPED_NAMES = {
    "mean": ("sum", "denominator"), "minimum": ("maximum", "branch"),
    "maximum": ("minimum", "branch"), "max": ("min", "branch"), "min": ("max", "branch"),
}  # fmt: skip
SWAPPED_SEGMENTS = {"mean": ("total", "denominator"), "total": ("mean", "denominator")}


class Mutant(NamedTuple):
    module: str
    function: str
    kind: str
    line: int
    before: str
    after: str
    source: str


def mutants(module: str) -> Iterator[Mutant]:
    """Every single fault of a module. What is in a `raise` or its condition is left alone: messages
    have tests of their own."""
    tree = ast.parse((LOSSES / f"{module}.py").read_text(encoding="utf-8"))
    nodes = [*ast.walk(tree)]
    owners = {
        id(inner): outer.name
        for outer in tree.body
        if isinstance(outer, ast.FunctionDef)
        for inner in ast.walk(outer)
    }
    skipped = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and any(isinstance(x, ast.Raise) for x in node.body)
        for inner in ast.walk(node)
    }
    annotations = {
        id(inner)
        for node in nodes
        for outer in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if outer is not None
        for inner in ast.walk(outer)
    }
    for i, node in enumerate(nodes):
        if id(node) in skipped | annotations or not isinstance(node, ast.expr | ast.arguments):
            continue
        for kind, changed in faults(node):
            copied = copy.deepcopy(tree)
            target = [*ast.walk(copied)][i]
            if isinstance(node, ast.arguments):
                vars(target).update(vars(changed))
            else:
                replace(copied, target, changed)
            line = getattr(node, "lineno", 0) or node.kwonlyargs[0].lineno
            yield Mutant(
                module, owners.get(id(node), ""), kind, line, ast.unparse(node),
                ast.unparse(changed), ast.unparse(ast.fix_missing_locations(copied)),
            )  # fmt: skip


def faults(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What may be wrong in place of this node."""
    if isinstance(node, ast.BinOp):
        if type(node.op) in SWAPPED_OPERATORS:
            operator, kind = SWAPPED_OPERATORS[type(node.op)]
            yield kind, ast.BinOp(node.left, operator(), node.right)
        if is_number(node.left):
            yield "constant", ast.BinOp(other_number(node.left), node.op, node.right)
        if is_number(node.right):
            yield "constant", ast.BinOp(node.left, node.op, other_number(node.right))
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPPED_OPERATORS:
        operator, kind = SWAPPED_OPERATORS[type(node.ops[0])]
        yield kind, ast.Compare(node.left, [operator(), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Invert):
        yield "sign" if isinstance(node.op, ast.USub) else "mask", node.operand
    elif isinstance(node, ast.Call):
        yield from faults_of_call(node)
    elif isinstance(node, ast.arguments):
        for i, default in enumerate(node.kw_defaults):
            if is_number(default):
                defaults = [*node.kw_defaults]
                defaults[i] = other_number(default)
                yield "default", ast.arguments(**{**vars(node), "kw_defaults": defaults})
            elif isinstance(default, ast.Constant) and type(default.value) is bool:
                defaults = [*node.kw_defaults]
                defaults[i] = ast.Constant(not default.value)
                yield "default", ast.arguments(**{**vars(node), "kw_defaults": defaults})


def is_number(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def other_number(node: ast.Constant) -> ast.Constant:
    return ast.Constant(2 * node.value or 1)


def faults_of_call(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    for i, keyword in enumerate(node.keywords):
        # Not an axis, whose change would be no more than an error.
        if isinstance(keyword.value, ast.Constant) and type(keyword.value.value) in (float, bool):
            value = keyword.value.value
            new = ast.Constant(not value) if value in (True, False) else other_number(keyword.value)
            keywords = [*node.keywords]
            keywords[i] = ast.keyword(keyword.arg, new)
            yield "constant", ast.Call(node.func, node.args, keywords)
    name = ast.unparse(node.func)
    last = name.rsplit(".", 1)[-1]
    if last == "stop_gradient":
        yield "gradient", node.args[0]
    elif last == "where" and len(node.args) == 3:
        condition, yes, no = node.args
        yield "mask", yes
        yield "mask", ast.Call(node.func, [condition, no, yes], node.keywords)
    elif last in ("roll", "arange"):
        shifted = [*node.args]
        at = 1 if last == "roll" else 0
        shifted[at] = ast.BinOp(node.args[at], ast.Add(), ast.Constant(1))
        if last == "roll":
            yield "shift", ast.Call(node.func, shifted, node.keywords)
    elif name.startswith("segments.") and last in SWAPPED_SEGMENTS:
        other, kind = SWAPPED_SEGMENTS[last]
        yield kind, ast.Call(ast.parse(f"segments.{other}").body[0].value, node.args, node.keywords)
    elif name == "segments.length":
        yield "denominator", ast.Constant(1.0)
    elif last in SWAPPED_NAMES and "." in name:
        other, kind = SWAPPED_NAMES[last]
        if last == "mean" or not name.startswith("masked."):
            func = ast.parse(name[: -len(last)] + other).body[0].value
            yield kind, ast.Call(func, node.args, node.keywords)
    elif name == "masked.clean":
        on = ast.parse(f"jnp.ones_like({ast.unparse(node.args[0])})").body[0].value
        yield "mask", ast.Call(node.func, [on, *node.args[1:]], node.keywords)


def replace(tree: ast.AST, target: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, field, copy.deepcopy(new))
                return
            if isinstance(value, list) and any(x is target for x in value):
                index = next(i for i, x in enumerate(value) if x is target)
                value[index] = copy.deepcopy(new)
                return
    raise AssertionError("the node is in no parent")


class Loader(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module from the source of a mutant."""

    def __init__(self, mutant: Mutant):
        self.name, self.source = f"alignjax.losses.{mutant.module}", mutant.source

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_loader(name, self) if name == self.name else None

    def exec_module(self, module):
        exec(compile(self.source, f"{self.name} (mutant)", "exec"), module.__dict__)


def tests_of(module: str) -> list[str]:
    """The files with the tests of a module."""
    files = [TESTS / f"test_{name}.py" for name in TESTED_BY.get(module, (module,))]
    return [str(path) for path in files if path.exists()]


def stages(mutant: Mutant) -> Iterator[list[str]]:
    """Arguments of pytest, the quickest to notice first. A helper is tested by what it helps."""
    own = tests_of(mutant.module)
    tree = ast.parse((LOSSES / f"{mutant.module}.py").read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    names = [name for name in names if not name.startswith("_")]
    if mutant.function in names:
        names = [mutant.function]
    oracles = [f"{test}_{name}" for name in names for test in ("in_float64", "its_oracle")]
    yield [*own, "-k", " or ".join(oracles)]
    yield own
    yield [str(TESTS / "test_presets.py")]
    properties = [f"[{name}] or -{name}]" for name in names]
    yield [str(TESTS / "test_properties.py"), "-k", " or ".join(properties)]


def is_noticed(mutant: Mutant) -> int:
    """Runs the tests in this process, which ends after it: 0 if all pass."""
    import pytest

    sys.meta_path.insert(0, Loader(mutant))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    passed = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
    for stage in stages(mutant):
        if pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", *stage]) not in passed:
            return 1
    return 0


def survivors(chosen: list[Mutant], workers: int) -> list[Mutant]:
    """Forks a process for each, so that jax is imported once; it is not used before the fork."""
    running: dict[int, tuple[Mutant, float]] = {}
    waiting, found, done = [*chosen], [], 0
    while waiting or running:
        while waiting and len(running) < workers:
            mutant = waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                os._exit(is_noticed(mutant))
            running[pid] = mutant, time.monotonic()
        for pid, (mutant, start) in [*running.items()]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if not ended and time.monotonic() - start > LIMIT_S:
                os.kill(pid, 9)
                ended, status = os.waitpid(pid, 0)
            if ended:
                del running[pid]
                done += 1
                if status == 0:
                    found.append(mutant)
                    print(f"{done}/{len(chosen)} survives: {describe(mutant)}", flush=True)
                elif done % 25 == 0:
                    print(f"{done}/{len(chosen)}", flush=True)
        time.sleep(0.02)
    return found


def describe(mutant: Mutant) -> str:
    return f"{mutant.module}.py:{mutant.line} {mutant.kind}: {mutant.before} -> {mutant.after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", nargs="*", help="by default all")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--trust", action="store_true", help="do not run the sound tests first")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "mutants.json")
    args = parser.parse_args()
    modules = args.modules or sorted(p.stem for p in LOSSES.glob("*.py") if p.stem != "__init__")
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.path.insert(0, str(record.REPO))
    os.chdir(record.REPO)
    for heavy in ("jax.numpy", "chex", "hypothesis.extra.numpy", "pytest", "optax"):
        importlib.import_module(heavy)
    files = {path for module in modules for path in tests_of(module)}
    files |= {str(TESTS / "test_properties.py"), str(TESTS / "test_presets.py")}
    sound = [sys.executable, "-m", "pytest", "-q", "-n", str(args.workers), *sorted(files)]
    if not args.trust and subprocess.run(sound).returncode:
        raise SystemExit("The tests fail without any fault; mend that first.")
    table = json.loads(args.out.read_text())["modules"] if args.out.exists() else {}
    for module in modules:
        chosen = [*mutants(module)]
        left = survivors(chosen, args.workers)
        table[module] = {
            "commit": record.commit(),
            "mutants": len(chosen),
            "by_kind": dict(sorted(Counter(mutant.kind for mutant in chosen).items())),
            "survivors": [describe(mutant) for mutant in left],
        }
        # After each module, so that a run that is stopped is continued with --modules.
        args.out.write_text(json.dumps({"modules": dict(sorted(table.items()))}, indent=2) + "\n")
        print(f"{module}: {len(chosen) - len(left)} of {len(chosen)} noticed", flush=True)


if __name__ == "__main__":
    main()
