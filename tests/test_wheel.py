"""The wheel holds every module, config and page, and runs with nothing else of the tree."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parent.parent


@pytest.mark.slow  # builds in an environment of its own where hatchling is not installed
def test_wheel(tmp_path):
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", str(REPO), "--no-deps", *isolation, "-qq",
         "--wheel-dir", str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    if "No matching distribution found for hatchling" in built.stderr:
        pytest.skip("hatchling, which builds wheels, is neither installed nor to be had")
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("alignjax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        archive.extractall(tmp_path / "installed")
    modules = {p.relative_to(REPO) for p in (REPO / "alignjax").rglob("*.py")}
    found = (p for p in REPO.glob("configs/**/*") if p.suffix in (".yaml", ".json"))
    configs = {Path("alignjax") / p.relative_to(REPO) for p in found}
    assert {"smoke", "phases", "recipes", "pods", "Qwen"} <= {
        p.parent.parent.name if p.suffix == ".json" else p.parent.name for p in configs
    }
    pages = {p.relative_to(REPO) for p in (REPO / "alignjax/web/static").iterdir()}
    assert {".html", ".js", ".css"} <= {p.suffix for p in pages}
    rewards = REPO / "alignjax/rewards"
    folders = (rewards / "templates", rewards / "constitutions")
    texts = {p.relative_to(REPO) for folder in folders for p in folder.iterdir()}
    assert {".yaml", ".jinja"} == {p.suffix for p in texts}
    assert names == {str(p) for p in modules | configs | pages | texts}
    shown = subprocess.run(
        [sys.executable, "-m", "alignjax", "run", "smoke/sft", "--print-config"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True, text=True,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    line = shown.stdout.splitlines()[0]
    assert line.startswith("name: smoke_sft")
    assert str(tmp_path / "installed/alignjax/configs/smoke/sft.yaml") in line
