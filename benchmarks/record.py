"""Figures -> a JSON file that says under which circumstances they were taken."""

import json
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"


def git(*words: str) -> str:
    return subprocess.check_output(["git", "-C", str(REPO), *words], text=True).strip()


def commit() -> str:
    """The commit that is measured; `+` after it if the code differs from it."""
    is_modified = git("status", "--porcelain", "--", "alignjax", "benchmarks/*.py", "tests")
    return git("rev-parse", "HEAD") + ("+" if is_modified else "")


def circumstances() -> dict[str, Any]:
    """Commit, device and versions. No name of a machine and no path."""
    return {
        "commit": git("rev-parse", "HEAD"),
        "is_modified": bool(git("status", "--porcelain", "--", "alignjax", "benchmarks/*.py")),
        "device": f"{len(jax.devices())} x {jax.devices()[0].device_kind}",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")},
    }


def write(path: Path, result: Mapping[str, Any]) -> None:
    """Writes circumstances and result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**circumstances(), **result}, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {path.name}")
