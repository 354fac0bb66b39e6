"""Metrics by step -> metrics.jsonl, samples.jsonl and TensorBoard (and W&B where installed)."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

TIMINGS = ("step_time", "tokens_per_second")
"""Keys that differ between two runs of the same config; all others are reproducible bit for bit."""


class JsonLines:
    """An append-only file of JSON objects, each with a `step`, that can be rewound to a step."""

    def __init__(self, path: Path, *, last_step: int):
        """Keeps what was written up to `last_step` and drops the rest, such as the lines of steps
        that a killed process had taken after its last checkpoint, and a line half written."""
        self.path = path
        if path.exists():
            kept = []
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n") or json.loads(line)["step"] > last_step:
                    break
                kept.append(line)
            replace_file(path, b"".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line, in the hands of the operating system when this returns."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class MetricWriter:
    """Sends what a step measured to every place that was asked for."""

    def __init__(
        self, run_dir: Path, *, last_step: int, tensorboard: bool, wandb_project: str | None
    ):
        self._metrics = JsonLines(run_dir / "metrics.jsonl", last_step=last_step)
        self._samples = JsonLines(run_dir / "samples.jsonl", last_step=last_step)
        self._board: Any = None
        self._wandb: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=last_step + 1)
        if wandb_project is not None:
            import wandb

            self._wandb = wandb.init(project=wandb_project, dir=str(run_dir), name=run_dir.name)

    def write(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes one step. A value that is not finite is null in the file, as JSON has no NaN."""
        finite = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
        self._metrics.write({"step": step, **finite})
        for sample in samples:
            self._samples.write({"step": step, **sample})
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        for writer in (self._metrics, self._samples, self._board):
            if writer is not None:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order of step."""
    with (run_dir / "metrics.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file so that a reader, or a restart after a kill, sees the old one or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
