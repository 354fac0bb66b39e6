"""A phase's config -> its run directory: trained, resumed or found finished, and exported.

A run writes config.yaml, metrics.jsonl, samples.jsonl, checkpoints/, model/ and report.png.
"""

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import yaml

from alignjax.core.config import build, diff, load, to_dict
from alignjax.core.errors import UserError
from alignjax.phases.common import PhaseConfig, Policy
from alignjax.phases.registry import PHASES
from alignjax.report.training import training_report
from alignjax.sharding import make_mesh
from alignjax.train.checkpoint import Checkpointer
from alignjax.train.loop import train
from alignjax.train.metrics import read_metrics, replace_file
from alignjax.train.progress import Progress

SHOWN = (
    "loss", "eval/loss", "reward", "completions/mean_length", "kl", "eval/sampled/accuracy",
    "eval/greedy/accuracy", "eval/sampled/reward", "eval/sampled/mean_length",
)  # fmt: skip
"""The metrics that a terminal shows."""


def run_phase(config: PhaseConfig, *, command: str, title: str = "") -> Path:
    """Trains a phase to its end in output_dir/name and exports the model.

    A directory with a checkpoint of the same config is continued; a finished one is left alone.

    Args:
      config: of one of the phases in `phases.registry`.
      command: what the user is told to enter to continue after an interruption.
      title: starts each line that is printed.
    Returns:
      The directory of the exported model.
    Raises:
      UserError: if the directory holds a run of another config (the difference is shown), or
        another process is at work in it; and what `train.loop.train` raises.
    """
    if jax.process_count() > 1:
        raise UserError("phases run in one process so far: use one host, with all its devices")
    run_dir = Path(config.output_dir) / config.name
    progress = Progress(SHOWN, title=title, min_interval=max(1, config.loop.log_every))
    with lock(run_dir):
        claim(run_dir, to_dict(config))
        model_dir = run_dir / "model"
        if model_dir.exists():
            progress.note(f"{model_dir} is there already: nothing to do")
            return model_dir
        _, phase_class = PHASES[config.phase]  # type: ignore[attr-defined]
        phase = phase_class(config, make_mesh(config.mesh))
        state = train(
            phase, config.loop, run_dir, seed=config.seed, progress=progress, resume_command=command
        )
        training_report(read_metrics(run_dir), run_dir / "report.png")
        # Last, since its presence says that the run is finished.
        phase.export(state, model_dir)
        progress.note(f"wrote {model_dir}")
    return model_dir


def claim(run_dir: Path, config: dict[str, Any]) -> None:
    """Writes config.yaml, or checks that the one there is the same.

    Raises:
      UserError: showing the difference, if there is something to lose.
    """
    path = run_dir / "config.yaml"
    holds_work = (run_dir / "model").exists() or any(run_dir.glob("checkpoints/*"))
    if path.exists() and holds_work:
        check_same(run_dir, config)
        return
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    replace_file(path, text.encode())


def check_same(run_dir: Path, config: dict[str, Any]) -> None:
    """Raises a UserError, showing the difference, if the directory was made with another config."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is there, but no run made it (no config.yaml); move it away")
    changes = diff(yaml.safe_load(path.read_text(encoding="utf-8")), config)
    if changes:
        raise UserError(
            f"{run_dir} holds a run of another config (there -> now):\n  "
            + "\n  ".join(changes)
            + "\nchoose another name (name=...), undo the change, or delete the directory"
        )


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Keeps a second process out of a run directory. The system frees it even after kill -9."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process is at work in it") from None
        yield


def export_checkpoint(run_dir: Path, out: Path, *, step: int | None = None) -> int:
    """Writes the model of a checkpoint as a Hugging Face directory; returns the checkpoint's step.

    Raises:
      UserError: if there is no such run or checkpoint, it is damaged, or `out` exists.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir}: no config.yaml; expected the directory of a run")
    if out.exists():
        raise UserError(f"{out} exists already; choose another directory or delete it")
    tree = load(path)
    if (phase := tree.values.get("phase")) not in PHASES:
        raise UserError(f"{path}: phase {phase!r} has no checkpoints; expected a run of a model")
    config = build(PHASES[phase][0], tree)
    policy = Policy(config, make_mesh(config.mesh))
    checkpoints = Checkpointer(run_dir / "checkpoints", keep=config.loop.keep, read_only=True)
    with contextlib.closing(checkpoints):
        step, params = checkpoints.restore_params(policy.init(jax.random.PRNGKey(0)), step)
    policy.export(params, out)
    return step
