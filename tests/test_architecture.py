"""Who may import whom (docs/architecture.md), read from the source with `ast`."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPO = Path(__file__).resolve().parent.parent

LAYERS = (
    "core", "losses text sharding report", "models data rewards", "generate train web",
    "phases evals", "recipes plan", "cli",
)  # fmt: skip
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer.split()}
# Of what rank allows, what the contracts refuse.
REFUSED = {
    "losses": ("alignjax.core.config", "pydantic", "yaml"),
    "train": ("alignjax.losses",),
    "generate": ("alignjax.text",),
}
NO_JAX = (
    "alignjax.text", "alignjax.data", "alignjax.rewards", "alignjax.report", "alignjax.web",
    "alignjax.core.types", "alignjax.core.config", "alignjax.core.errors",
)  # fmt: skip
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
STANDARD = (*sys.stdlib_module_names, "alignjax")
# In two parts, so that this file passes its own test.
HOSTS = ["pypi" + ".org", "python" + "hosted", "npm" + "js", "download." + "pytorch", "/wo" + "rk/"]


class Import(NamedTuple):
    name: str
    line: int
    is_lazy: bool
    """True in a function or under TYPE_CHECKING: not run when the module is imported."""


def imports(tree: ast.AST, is_lazy: bool = False) -> Iterator[Import]:
    """Every import; those for types count as well, since a reader follows them all the same."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, is_lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            # `from alignjax.core import keys` may name a module; a name too long is harmless.
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno, is_lazy)
        else:
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from imports(node, is_lazy or is_function or is_types)


def starts(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def violations(root: Path) -> list[str]:
    """What the modules of `root`/alignjax do that they may not, a line each."""
    found, eager = [], {}
    for path in sorted((root / "alignjax").rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        package = parts[1] if len(parts) > 2 else ""
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if not (ast.get_docstring(tree, clean=False) or "").split("\n")[0].strip():
            found.append(f"{module}: the docstring's first line says nothing")
        if package not in RANK and package:
            found.append(f"{module}: {package} has no rank")
            continue
        if not package and parts[-1] not in ("__init__", "__main__"):
            found.append(f"{module}: in no package, so of no rank")
        eager[module] = set()
        for name, line, is_lazy in imports(tree):
            where = f"{module}:{line} imports {name}"
            if name.startswith("alignjax.") and package:
                other = name.split(".")[1]
                if other in RANK and other != package and RANK[other] >= RANK[package]:
                    found.append(f"{where}: not below {package}")
            if starts(name, REFUSED.get(package, ())):
                found.append(f"{where}: refused to {package}")
            if package == "cli" and not is_lazy and not starts(name, STANDARD):
                found.append(f"{where}: slows down --help")
            if not is_lazy:
                eager[module].add(name)
    for module in eager:
        if starts(module, NO_JAX) and (way := way_to_jax(module, eager)):
            found.append(f"{module}: imports {' -> '.join(way)}")
    return found


def way_to_jax(module: str, eager: dict[str, set[str]]) -> list[str]:
    """The imports by which loading a module loads jax, [] if it does not."""
    seen, ways = {module}, [(module, [])]
    for current, way in ways:
        for name in sorted(eager[current]):
            if starts(name, JAX):
                return [*way, name]
            parts = name.split(".")
            for below in (".".join(parts[: n + 1]) for n in range(len(parts))):
                if below in eager and below not in seen:
                    seen.add(below)
                    ways.append((below, [*way, below]))
    return []


def test_imports_go_downwards_only():
    assert violations(REPO) == []


FAKE = {
    "alignjax/__init__.py": "'''Root.'''",
    "alignjax/__main__.py": "'''Verbs.'''\nfrom alignjax.cli import run",
    "alignjax/core/keys.py": "'''Keys.'''\nimport jax",
    "alignjax/core/types.py": "'''Types.'''\nfrom typing import TYPE_CHECKING\n"
    "if TYPE_CHECKING:\n    from jax import Array",
    "alignjax/core/config.py": "'''Config.'''\ndef f():\n    import jax",
    "alignjax/losses/clip.py": "'''Clip.'''\nimport jax\nfrom alignjax.core import keys",
    "alignjax/text/chat.py": "'''Chat.'''\nfrom alignjax.core.types import Tokenizer",
    "alignjax/train/step.py": "'''Step.'''\nfrom alignjax.models import x",
    "alignjax/cli/run.py": "'''Run.'''\nimport argparse\ndef f():\n    import alignjax.phases",
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("core/a.py", "'''A.'''\nimport alignjax.cli", "core.a:2 imports alignjax.cli: not below"),
        ("losses/a.py", "'''A.'''\nfrom alignjax import text", "imports alignjax.text: not below"),
        ("losses/a.py", "'''A.'''\nfrom alignjax.core.config import Config", "refused to losses"),
        ("rewards/a.py", "'''A.'''\ndef f():\n    import alignjax.models", "not below rewards"),
        ("rewards/a.py", "'''A.'''\nfrom alignjax.generate import x", "not below rewards"),
        ("rewards/a.py", "'''A.'''\nfrom alignjax.core import keys", "alignjax.core.keys -> jax"),
        ("data/a.py", "'''A.'''\nimport numpy, jax.numpy as jnp", "alignjax.data.a: imports jax"),
        (
            "core/config.py",
            "'''C.'''\ntry:\n    import jax\nfinally:\n    pass",
            "core.config: imp",
        ),
        ("train/a.py", "'''A.'''\nfrom alignjax.losses.clip import ppo_clip", "refused to train"),
        ("generate/a.py", "'''A.'''\nimport alignjax.text.chat", "refused to generate"),
        ("generate/a.py", "'''A.'''\nimport alignjax.train", "not below generate"),
        ("cli/a.py", "'''A.'''\nimport numpy as np", "imports numpy: slows down --help"),
        ("cli/a.py", "x = 1", "alignjax.cli.a: the docstring's first line says nothing"),
        ("cli/a.py", "'''\nA.\n'''", "the docstring's first line says nothing"),
        ("utils/a.py", "'''A.'''", "alignjax.utils.a: utils has no rank"),
        ("utils.py", "'''U.'''\nimport alignjax.cli", "alignjax.utils: in no package"),
    ],
)
def test_a_violation_is_found(tmp_path, path, text, complaint):
    def write(name: str, content: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)

    for name, content in FAKE.items():
        write(name, content)
    assert violations(tmp_path) == []
    write(f"alignjax/{path}", text)
    (found,) = violations(tmp_path)
    assert complaint in found


def test_no_device_is_started_by_what_others_import():
    """The libraries that they import count too."""
    names = [name for name in NO_JAX if importlib.util.find_spec(name)]
    code = f"import sys, {', '.join(names)}; print('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


def test_no_file_names_a_host_or_a_path_of_one_machine():
    folders = ("alignjax", "benchmarks", "configs", "docs", "launch", "notebooks", "tests", ".ci")
    files = [path for path in REPO.iterdir() if path.is_file()]
    files += [path for folder in folders for path in (REPO / folder).rglob("*") if path.is_file()]
    found = []
    for path in files:
        if "__pycache__" in path.parts or path.suffix in (".png", ".model"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(REPO)}: {host}" for host in HOSTS if host in text]
    assert len(files) > 10 and found == []
