"""What a run tells its user -> a live bar on a terminal, plain lines elsewhere."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from alignjax.core.processes import is_first


class Progress:
    """One per run. Metrics named in `shown` are printed, the first match of each."""

    def __init__(self, shown: Sequence[str] = ("loss",), *, title: str = "", min_interval: int = 1):
        """Args: shown: names of metrics to print; title: starts each line; min_interval: print only
        every so many steps (evaluations are always printed)."""
        # Of several processes the first speaks for all.
        quiet = not is_first()
        self._console = Console(file=sys.stderr, highlight=False, soft_wrap=True, quiet=quiet)
        self._shown, self._title, self._min_interval = tuple(shown), title, min_interval
        self._last_warning: dict[str, int] = {}

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        """Prints a warning; of a kind, which is what stands before a second colon and between the
        numbers, 3 are printed at most."""
        kind = "".join(c for c in ":".join(text.split(":")[:2]) if not c.isdigit())
        count = self._last_warning[kind] = self._last_warning.get(kind, 0) + 1
        if count <= 3:
            last = "" if count < 3 else " (not said again)"
            self._console.print(f"[yellow]warning:[/yellow] {_plain(text)}{last}", markup=True)

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        is_evaluation = any(name.startswith("eval/") for name in metrics)
        if is_evaluation or step % self._min_interval == 0:
            values = [f"{name} {metrics[name]:.4g}" for name in self._shown if name in metrics]
            if values:
                self._print(f"step {step:>5}  " + "  ".join(values))

    @contextlib.contextmanager
    def bar(self, start: int, total: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """Yields a function to call after each step with (step, metrics)."""
        columns = (
            TextColumn(self._title or "training"), BarColumn(), MofNCompleteColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[speed]}"),
        )  # fmt: skip
        with Bar(
            *columns, console=self._console, transient=True, disable=not self._console.is_terminal
        ) as bar:
            task = bar.add_task("", total=total, completed=start, speed="")

            def advance(step: int, metrics: Mapping[str, float]) -> None:
                bar.update(task, completed=step)
                if "tokens_per_second" in metrics:
                    bar.update(task, speed=f"{metrics['tokens_per_second']:,.0f} tokens/s")

            yield advance

    def _print(self, text: str) -> None:
        prefix = f"{self._title}: " if self._title else ""
        self._console.print(f"{prefix}{text}", markup=False)


def _plain(text: str) -> str:
    return text.replace("[", r"\[")
