"""The notebooks run from top to bottom in smoke mode, and are kept without outputs."""

import json
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

from tests.flags import xla_flags

REPO = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def run(path, folder):
    """Executes a notebook with this interpreter, whatever kernels the machine has installed."""
    spec = folder / "kernels" / "this"
    spec.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec.joinpath("kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "this", "language": "python"})
    )
    kernels = KernelSpecManager(kernel_dirs=[str(spec.parent)], ensure_native_kernel=False)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        km=AsyncKernelManager(kernel_name="this", kernel_spec_manager=kernels),
        resources={"metadata": {"path": str(folder)}},
        timeout=300,
        startup_timeout=120,
    ).execute(cleanup_kc=True)  # Not by itself, as the manager is ours.
    return notebook


def outputs(notebook):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def test_there_are_notebooks():
    assert {path.stem for path in NOTEBOOKS} >= {"losses_with_chex", "r1_zero"}


@by_name
def test_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, cell.source
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert str(REPO) not in path.read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNJAX_SMOKE", "1")
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    # One device, as most people have: the eight of the other tests would only take time here.
    monkeypatch.setenv("XLA_FLAGS", xla_flags())
    return tmp_path


def test_losses_with_chex_asserts_all_that_it_says(folder):
    notebook = run(REPO / "notebooks" / "losses_with_chex.ipynb", folder)
    seen = outputs(notebook)
    assert not [o for o in seen if o.output_type == "error"]
    # To its last cell, in which seven versions of one function are told apart.
    assert seen[-1].text.count("caught") == 6 and seen[-1].text.count("passes") == 1
    assert sum(cell.source.count("assert") for cell in notebook.cells) > 40


@pytest.mark.slow
def test_r1_zero_trains_draws_and_answers(folder):
    seen = outputs(run(REPO / "notebooks" / "r1_zero.ipynb", folder))
    assert not [o for o in seen if o.output_type == "error"]
    assert len([o for o in seen if "image/png" in o.get("data", {})]) == 2
    recipe = folder / "runs" / "r1_zero_smoke"
    for stage in ("base", "zero", "control"):
        assert (recipe / stage / "model" / "model.safetensors").is_file()
    text = "".join(o.get("text", "") for o in seen)
    assert "base model " in text and "after RL, no thinking " in text
    assert text.count("12*03-09+08-05=") == 4  # One line for each sample.
