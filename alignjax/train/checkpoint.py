"""(TrainState, position in the data) <-> a directory of Orbax checkpoints that survives kill -9."""

import json
import math
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from alignjax.core.errors import UserError
from alignjax.core.processes import is_first, told, wait_for_all

State = TypeVar("State")
_CHECKSUMS = "checksums.json"


class Checkpointer:
    """Saves asynchronously and atomically; keeps the last N and the best; restores the newest.

    A checkpoint appears under its final name only when it is complete, with a checksum of each of
    its files, so that a truncated or altered one is noticed and the one before it is used.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: int,
        best_metric: str | None = None,
        best_mode: str = "min",
        read_only: bool = False,
        processes: set[int] | None = None,
    ):
        """Args: keep: how many of the last to keep; best_metric: name of the metric whose best
        checkpoint is kept as well, by `best_mode` "min" or "max"; read_only: change nothing;
        processes: those that have a part of the state, the first among them; None: all. Others
        save and read nothing."""
        self.directory = directory.absolute()
        self._best_metric = best_metric
        num_all = jax.process_count()
        self._processes = {*range(num_all)} if processes is None else processes
        self._is_away = jax.process_index() not in self._processes
        # Orbax takes an array that one of several processes has for one that each has its own of.
        self._is_of_one = len(self._processes) == 1 < num_all
        if self._is_away:
            return
        best_fn = None if best_metric is None else lambda metrics: metrics[best_metric]
        policies: list[Any] = [checkpoint_managers.LatestN(keep)]
        if best_fn is not None:
            policies.append(
                checkpoint_managers.BestN(
                    get_metric_fn=best_fn,
                    reverse=best_mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                # The policy decides what stays; `best_fn` makes Orbax store the metrics on disk, so
                # that the best is still known after a restart.
                best_fn=best_fn,
                best_mode=best_mode,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
                # Its barriers are then of the coordination service. Those on devices would wait
                # behind devices that sample ahead, of which each process has another order.
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    active_processes=self._processes
                ),
                create=False,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._add_checksums),
            ),
        )

    def save(
        self,
        step: int,
        state: Any,
        position: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save; returns as soon as the arrays are copied to the host."""
        if self._is_away:
            return
        if self._is_of_one:
            state = jax.tree.map(np.array, state)  # Copies: what it was is donated before long.
        # One that is not finite would be taken for the best.
        value = math.nan if metrics is None else metrics.get(self._best_metric or "", math.nan)
        known = dict(metrics) if metrics is not None and math.isfinite(value) else None
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), position=ocp.args.JsonSave(dict(position))
            ),
            metrics=known,
        )

    def restore(
        self, template: State, *, warn: Callable[[str], None]
    ) -> tuple[int, State, dict[str, Any]] | None:
        """The newest checkpoint that is whole: (step, state, position); None if there is none.

        Args:
          template: a state with the shapes, dtypes and shardings to restore to. Its arrays are
            deleted where there is a checkpoint that fits, or two states would be on the devices.
          warn: called with a sentence for each newer checkpoint that is damaged. Damaged ones are
            set aside under `damaged-STEP`, since their step will be saved again.
        Raises:
          UserError: there are checkpoints and none of them is whole, or one that is whole holds
            other arrays than the template.
        """
        found = None if self._is_away else self._restore(template, warn)
        wait_for_all("set damaged checkpoints aside")
        known = told(None if found is None else [found[0], found[2]])
        if known is None:
            return None
        if found is not None:
            self._manager.reload()
        return known[0], template if found is None else found[1], known[1]

    def _restore(
        self, template: State, warn: Callable[[str], None]
    ) -> tuple[int, State, dict[str, Any]] | None:
        steps = sorted(self._manager.all_steps(), reverse=True)
        damaged: list[str] = []
        wanted = _abstract(template)
        for step in steps:
            fault = self._fault(step)
            if fault is None:
                self._check_fits(step, wanted)
                _delete(template)
                try:
                    restored = self._manager.restore(
                        step,
                        args=ocp.args.Composite(
                            state=ocp.args.StandardRestore(wanted),
                            position=ocp.args.JsonRestore(),
                        ),
                    )
                except (ValueError, OSError, KeyError) as error:
                    fault = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                else:
                    if is_first():
                        for bad in damaged:
                            self._set_aside(bad)
                    return step, restored["state"], restored["position"]
            warn(
                f"checkpoint {self.directory / str(step)} is damaged ({fault}); trying the one "
                "before"
            )
            damaged.append(str(step))
        if steps:
            raise UserError(
                f"{self.directory}: all {len(steps)} checkpoints are damaged; restore a backup, or "
                "delete the run directory to start again"
            )
        return None

    def restore_parts(
        self, template: Mapping[str, Any], step: int | None = None
    ) -> tuple[int, dict[str, Any]]:
        """Parts of the state of a checkpoint, the newest if no step is given: (step, parts).

        Args:
          template: such as {"params": ...}; of a part, too, some keys may be left out.
        Raises:
          UserError: if there is no such checkpoint, or it is damaged.
        """
        steps = sorted(self._manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise UserError(
                f"{self.directory}: no checkpoint{'' if step is None else f' of step {step}'}; "
                f"there are {', '.join(map(str, steps)) or 'none'}"
            )
        step = steps[-1] if step is None else step
        if (fault := self._fault(step)) is not None:
            raise UserError(f"checkpoint {self.directory / str(step)} is damaged ({fault})")
        item = _abstract(dict(template))
        self._check_fits(step, item, is_part=True)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            restored = checkpointer.restore(
                self.directory / str(step) / "state",
                args=ocp.args.PyTreeRestore(
                    item=item,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                    partial_restore=True,
                ),
            )
        return step, restored

    def latest_step(self) -> int | None:
        return None if self._is_away else self._manager.latest_step()

    def wait(self) -> None:
        """Returns when everything started has been saved; raises what went wrong while saving."""
        if not self._is_away:
            self._manager.wait_until_finished()

    def close(self) -> None:
        if not self._is_away:
            self._manager.close()

    def _add_checksums(self) -> None:
        # Orbax calls this between writing the last file and renaming the directory to its final
        # name, without saying which: at most one is being written at a time.
        if not is_first():
            return
        for unfinished in self.directory.glob("*.orbax-checkpoint-tmp*"):
            (unfinished / _CHECKSUMS).write_text(json.dumps(_checksums(unfinished)))

    def _fault(self, step: int) -> str | None:
        folder = self.directory / str(step)
        try:
            expected = json.loads((folder / _CHECKSUMS).read_text())
        except (OSError, ValueError) as error:
            return f"{_CHECKSUMS} cannot be read: {error}"
        found = _checksums(folder)
        for name, checksum in expected.items():
            if name not in found:
                return f"{name} is missing"
            if found[name] != checksum:
                return f"{name} has changed since it was written"
        return None

    def _check_fits(self, step: int, template: Any, *, is_part: bool = False) -> None:
        """Compares names, shapes and dtypes: Orbax would report a difference as if it were damage,
        and cast another dtype in silence."""
        metadata = ocp.PyTreeCheckpointHandler().metadata(self.directory / str(step) / "state")
        there = {leaf.name: _spell(leaf) for leaf in jax.tree.leaves(metadata.tree)}
        here = {
            jax.tree_util.keystr(path, simple=True, separator="."): _spell(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(template)
        }
        differences = [
            f"{name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} now"
            for name in {**here, **({} if is_part else there)}
            if there.get(name) != here.get(name)
        ]
        if differences:
            raise UserError(
                f"checkpoint {self.directory / str(step)} is of another model or optimizer "
                f"({'; '.join(differences[:3])}{'; ...' if differences[3:] else ''}): undo what "
                "changed, such as the tokenizer or the model directory, or start a new run"
            )

    def _set_aside(self, step: str) -> None:
        target = self.directory.parent / f"damaged-{step}"
        count = 1
        while target.exists():
            count += 1
            target = target.with_name(f"damaged-{step}-{count}")
        (self.directory / step).rename(target)


def _checksums(folder: Path) -> dict[str, list[int]]:
    """Relative path -> [size in bytes, CRC-32] of every file but Orbax's own markers, which it
    rewrites when it commits."""
    return {
        str(path.relative_to(folder)): _checksum(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (_CHECKSUMS, "_CHECKPOINT_METADATA")
    }


def _checksum(path: Path) -> list[int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _spell(array: Any) -> str:
    return f"{jax.numpy.dtype(array.dtype).name}{list(array.shape)}"


def _abstract(template: State) -> State:
    return jax.tree.map(ocp.utils.to_shape_dtype_struct, template)


def _delete(arrays: Any) -> None:
    for array in jax.tree.leaves(arrays):
        if isinstance(array, jax.Array):
            array.delete()
