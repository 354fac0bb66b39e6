"""A data phase: batches of records, one after the other -> a file, which a kill leaves resumable.

After each batch the file is written to disk and then, in one step, `progress.json`: the state of
the phase and how many bytes of the file belong to it. What stands behind them is from a batch that
a kill cut short, and is made anew. Of several processes all make the records, and the first writes
them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Protocol

from alignjax.core.processes import is_first, together, wait_for_all
from alignjax.train.metrics import replace_file

PROGRESS = "progress.json"
State = dict[str, Any]
"""JSON: all that the next batch depends on besides the config, and `counts`, by name."""


class DataPhase(Protocol):
    """What makes records without training anything."""

    output: ClassVar[str]
    """The file in the run's directory; its presence says that the run is finished."""
    shown: ClassVar[tuple[str, ...]]
    """Counts of a state to print after each batch."""

    @property
    def warnings(self) -> list[str]:
        """Sentences for the user, before the first batch."""
        ...

    def init(self) -> State:
        """The state before the first batch."""
        ...

    def produce(self, state: State) -> tuple[Sequence[Mapping[str, Any]], State] | None:
        """The records of the next batch and the state after it; None at the end. A function of the
        state, as long as the functions of the user's are."""
        ...

    def finish(self, state: State, records: Iterable[dict[str, Any]], run_dir: Path) -> str:
        """Writes what else there is to write, of all records; returns a sentence on the result. In
        the first process alone."""
        ...

    def close(self) -> None:
        """Gives back what is held, such as the processes of rewards."""
        ...


def produce(phase: DataPhase, run_dir: Path, tell: Callable[[State], None]) -> str:
    """Makes the file of a data phase, or goes on with it where a run that was killed had stopped.

    Args:
      run_dir: where the file is written.
      tell: called with the state after each batch, and before the first one.
    Returns:
      What `finish` says, in the first process.
    """
    partial, noted = run_dir / f".{phase.output}.partial", run_dir / PROGRESS
    state, num_bytes = phase.init(), 0
    if noted.exists():
        found = json.loads(noted.read_text(encoding="utf-8"))
        state, num_bytes = found["state"], found["num_bytes"]
    wait_for_all("read where it stopped")  # Before the first goes on from there.
    with contextlib.closing(phase), contextlib.ExitStack() as stack:
        file = stack.enter_context(partial.open("ab")) if is_first() else None
        if file is not None:
            file.truncate(num_bytes)
        tell(state)
        while (made := phase.produce(state)) is not None:
            records, state = made
            if file is not None:
                _write(records, file)
                note = {"state": state, "num_bytes": file.tell()}
                replace_file(noted, json.dumps(note).encode())
            tell(state)
    said = ""
    with together():
        if is_first():
            with partial.open(encoding="utf-8") as lines:
                said = phase.finish(state, map(json.loads, lines), run_dir)
            os.replace(partial, run_dir / phase.output)
            with contextlib.suppress(FileNotFoundError):
                noted.unlink()
    return said


def _write(records: Sequence[Mapping[str, Any]], file: BinaryIO) -> None:
    for record in records:
        # Half of a surrogate pair, which a model may write, is no UTF-8; escaped, it is JSON.
        line = json.dumps(record, ensure_ascii=False) + "\n"
        file.write(line.encode(errors="backslashreplace"))
    file.flush()
    os.fsync(file.fileno())
