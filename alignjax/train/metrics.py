"""Metrics by step -> metrics.jsonl, samples.jsonl and TensorBoard (and W&B where installed)."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.core.errors import UserError

TIMINGS = ("step_time", "tokens_per_second")
"""Keys that differ between two runs of the same config; all others are reproducible bit for bit."""


class JsonLines:
    """An append-only file of JSON objects, each with a `step`, that can be rewound to a step."""

    def __init__(self, path: Path, *, last_step: int, warn: Callable[[str], None]):
        """Keeps what was written up to `last_step` and drops the rest, such as the lines of steps
        that a killed process had taken after its last checkpoint, and a line half written."""
        if path.exists():
            kept: list[bytes] = []
            for line in path.read_bytes().splitlines(keepends=True):
                if not line.endswith(b"\n"):
                    break
                try:
                    step = json.loads(line)["step"]
                except (ValueError, LookupError, TypeError):
                    warn(
                        f"{path}:{len(kept) + 1} is damaged; this line and those after it are lost"
                    )
                    break
                if step > last_step:
                    break
                kept.append(line)
            replace_file(path, b"".join(kept))
        # Half of a surrogate pair, which a model may write, is no UTF-8; escaped, it is JSON.
        self._file = path.open("a", encoding="utf-8", errors="backslashreplace")

    def write(self, record: Mapping[str, Any]) -> None:
        """Appends one line, in the hands of the operating system when this returns."""
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when what was written would outlast a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class MetricWriter:
    """Sends what a step measured to every place that was asked for."""

    def __init__(
        self,
        run_dir: Path,
        *,
        last_step: int,
        tensorboard: bool,
        wandb_project: str | None,
        warn: Callable[[str], None],
    ):
        """Args: last_step: of the checkpoint that is continued, -1 for none; warn: is told what was
        lost. Raises UserError if W&B is asked for and not installed."""
        self._metrics = JsonLines(run_dir / "metrics.jsonl", last_step=last_step, warn=warn)
        self._samples = JsonLines(run_dir / "samples.jsonl", last_step=last_step, warn=warn)
        self._board: Any = None
        self._wandb: Any = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            # The suffix, as names hold whole seconds: a quick restart must not overwrite.
            self._board = SummaryWriter(
                str(run_dir / "tensorboard"),
                purge_step=last_step + 1,
                filename_suffix=f".{last_step + 1}",
            )
        if wandb_project is not None:
            try:
                import wandb
            except ImportError as error:
                raise UserError(
                    f"loop.wandb_project={wandb_project}: W&B is not installed ({error}); pip "
                    "install wandb, or leave it out"
                ) from error
            # An id of the directory: a run that is continued goes on as the same run there, too.
            self._wandb = wandb.init(
                project=wandb_project,
                dir=str(run_dir),
                name=run_dir.name,
                id=hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16],
                resume="allow",
            )

    def write(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None:
        """Writes one step. A value that is not finite is null in the file, as JSON has no NaN."""
        finite = {k: v for k, v in metrics.items() if math.isfinite(v)}
        self._metrics.write({"step": step, **dict.fromkeys(metrics), **finite})
        for sample in samples:
            self._samples.write({"step": step, **sample})
        if self._board is not None:
            for name, value in finite.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(metrics), step=step)

    def sync(self) -> None:
        """As that of `JsonLines`: before a checkpoint that says that these lines are there."""
        self._metrics.sync()
        self._samples.sync()

    def close(self) -> None:
        for writer in (self._metrics, self._samples, self._board):
            if writer is not None:
                writer.close()
        if self._wandb is not None:
            self._wandb.finish()


class NoWriter:
    """A `MetricWriter` that writes nothing, for all processes of a run but the first."""

    def write(
        self, step: int, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]]
    ) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


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
