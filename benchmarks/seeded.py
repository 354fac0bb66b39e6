"""A recipe and a seed -> its finished run in runs/, and the minutes that it took."""

import json
import subprocess
import sys
import time
from pathlib import Path

from record import REPO

NOTED = "minutes.json"


def run(recipe: str, seed: int, *overrides: str) -> Path:
    """Runs a recipe to its end, that of seed 0 under its own name; what is finished stays as it is.

    Returns:
      The directory. A run that was new has its minutes noted there; of one that was resumed, nobody
      knows them.
    """
    name = recipe if seed == 0 else f"{recipe}_seed{seed}"
    folder = REPO / "runs" / name
    is_new, start = not folder.exists(), time.perf_counter()
    path = REPO / "configs" / "recipes" / f"{recipe}.yaml"
    command = [sys.executable, "-m", "alignjax", "run", str(path), f"seed={seed}", f"name={name}"]
    subprocess.run([*command, *overrides], check=True, cwd=REPO)
    if is_new:
        (folder / NOTED).write_text(json.dumps((time.perf_counter() - start) / 60))
    return folder


def minutes(folder: Path) -> float | None:
    """Of a run; None where nobody knows."""
    noted = folder / NOTED
    return float(json.loads(noted.read_text())) if noted.exists() else None
