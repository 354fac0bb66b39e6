"""A phase's config -> its run directory: trained, resumed or found finished, and exported.

A run writes config.yaml, inputs.json, metrics.jsonl, samples.jsonl, checkpoints/, model/ and
report.png, and frontier.png where it measured both a reward and a KL from the reference.
"""

import contextlib
import fcntl
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from alignjax.core.config import Config, build, diff, dump, load, to_dict
from alignjax.core.digest import of_path
from alignjax.core.errors import UserError
from alignjax.core.hub import TOKENIZER_FILES, resolve
from alignjax.core.processes import is_first, together, wait_for_all
from alignjax.phases.common import PhaseConfig, Policy
from alignjax.phases.produce import PROGRESS, State, produce
from alignjax.phases.registry import DATA_PHASES, PHASES
from alignjax.report.frontier import frontier_of, frontier_picture
from alignjax.report.training import training_report
from alignjax.rewards.judge_config import LIMITS
from alignjax.sharding import make_mesh
from alignjax.train.checkpoint import Checkpointer
from alignjax.train.loop import evaluated, train
from alignjax.train.metrics import read_metrics, replace_file
from alignjax.train.optim import averaged, make_optimizer
from alignjax.train.progress import Progress
from alignjax.train.state import create_state

INPUTS = (
    "model.path", "model.adapter", "tokenizer", "data.train", "data.eval", "data.reference",
    "sources", "rewards.models.*.path", "critic.path", "ptx.train", "reference", "teacher.path",
    "model", "data", "constitution.path", "template",
    "responses", "compare_with", "sample.model.path", "sample.tokenizer", "sample.data.train",
    "judge.model.path", "judge.template", "rewards.judges.*.model.path",
    "rewards.judges.*.template",
)  # fmt: skip
"""Keys of configs whose values are files or directories that a run reads; * is any key."""
MODELS = (
    "model", "model.path", "tokenizer", "rewards.models.*.path", "critic.path", "reference",
    "teacher.path", "sample.model.path", "sample.tokenizer", "judge.model.path",
    "rewards.judges.*.model.path",
)  # fmt: skip
"""Those that may name a model of the Hub."""


_JUDGES = r"(judge|rewards\.judges\.[^.:]+)"
_FREE = re.compile(
    rf"({_JUDGES}\.({'|'.join(map(re.escape, LIMITS))})|max_failure_frac|max_unparsable_frac|"
    r"loop\.watchdog_minutes|(rollout\.)?mesh(\.\w+)?|rollout\.(devices|processes)): "
)
"""Changes of a config with which a run may go on: how long and how far a judge is asked, when a
watchdog speaks, and which devices do what, on which results depend by rounding alone."""


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
      UserError: if the directory holds a run of another config (the difference is shown) or of
        other inputs, or another process is at work in it; and what `train.loop.train` raises.
    """
    run_dir = Path(config.output_dir) / config.name
    _, phase_class = PHASES[config.phase]  # type: ignore[attr-defined]
    progress = Progress(phase_class.shown, title=title, min_interval=config.loop.log_every)
    model_dir = run_dir / "model"
    with taken(run_dir, config, model_dir) as is_done, contextlib.ExitStack() as stack:
        if is_done:
            progress.note(f"{model_dir} is there already: nothing to do")
            return model_dir
        with together():
            phase = phase_class(config, config.training_mesh())
        if hasattr(phase, "close"):
            stack.callback(phase.close)  # Before another phase begins, and however this one ends.
        state = train(
            phase, config.loop, run_dir, seed=config.seed, progress=progress, resume_command=command
        )
        if is_first():
            metrics = read_metrics(run_dir)
            training_report(metrics, run_dir / "report.png")
            if frontier_of(metrics) is not None:
                frontier_picture({config.name: metrics}, run_dir / "frontier.png")
        # Last, since its presence says that the run is finished.
        phase.export(evaluated(state), model_dir)
        progress.note(f"wrote {model_dir}")
    return model_dir


def run_data_phase(config: Config, *, command: str, title: str = "") -> Path:
    """Makes the records of a data phase in output_dir/name.

    A directory with a part of them, made by the same config, is continued; with all it is left
    alone.

    Args:
      config: of one of the data phases in `phases.registry`.
      command, title: as of `run_phase`.
    Returns:
      The file of records.
    Raises:
      UserError: as `run_phase`.
    """
    name, phase_class = config.phase, DATA_PHASES[config.phase][1]  # type: ignore[attr-defined]
    run_dir = Path(config.output_dir) / config.name  # type: ignore[attr-defined]
    progress = Progress(title=title or name)
    output = run_dir / phase_class.output
    with taken(run_dir, config, output) as is_done:
        if is_done:
            progress.note(f"{output} is there already: nothing to do")
            return output
        with together():
            phase = phase_class(config, make_mesh(config.mesh))  # type: ignore[attr-defined]
        for warning in phase.warnings:
            progress.warn(warning)

        def tell(state: State) -> None:
            counts = state["counts"]
            progress.note("  ".join(f"{key} {counts[key]}" for key in phase.shown))

        try:
            progress.note(produce(phase, run_dir, tell))
        except KeyboardInterrupt:
            progress.note(f"stopped; what was made is kept. Continue with: {command}")
            raise
        progress.note(f"wrote {output}")
    return output


@contextlib.contextmanager
def taken(run_dir: Path, config: Config, output: Path) -> Iterator[bool]:
    """A run directory for this run alone, all of its processes; gives whether the run is finished,
    which the presence of `output` says.

    Raises:
      UserError: as `lock` and `claim`.
    """
    with contextlib.ExitStack() as stack:
        with together():
            if is_first():
                stack.enter_context(lock(run_dir, run_dir / ".lock"))
                claim(run_dir, config)
        is_done = output.exists()
        wait_for_all("looked for a finished run")  # Before the first may write it.
        yield is_done


def claim(run_dir: Path, config: Config) -> None:
    """Notes config and inputs in the directory, or checks that they are those of the run there.

    Raises:
      UserError: as `check_same`, if there is something to lose.
    """
    path, inputs = run_dir / "config.yaml", run_dir / "inputs.json"
    checkpoints = run_dir / "checkpoints"
    outputs = ("model", PROGRESS, *(phase.output for _, phase in DATA_PHASES.values()))
    holds_work = any((run_dir / name).exists() for name in outputs) or (
        checkpoints.is_dir() and any(p.name.isdecimal() for p in checkpoints.iterdir())
    )
    if holds_work or (path.exists() and not inputs.exists()):
        check_same(run_dir, config)
        return
    replace_file(inputs, json.dumps(digests(config), indent=2).encode())
    replace_file(path, dump(to_dict(config)).encode())


def check_same(run_dir: Path, config: Config) -> None:
    """Compares config and inputs with those that a directory was made with.

    Raises:
      UserError: showing the difference, or if no run made the directory.
    """
    path, inputs = run_dir / "config.yaml", run_dir / "inputs.json"
    if not (path.is_file() and inputs.is_file()):
        missing = inputs.name if path.is_file() else path.name
        raise UserError(
            f"{run_dir} is there, but no run made it (no {missing}); move it away, or choose "
            "another name (name=...)"
        )
    changes = [
        change for change in diff(load(path).values, to_dict(config)) if not _FREE.match(change)
    ]
    if changes:
        raise UserError(
            f"{run_dir} holds a run of another config (there -> now):\n  "
            + "\n  ".join(changes)
            + "\nchoose another name (name=...), undo the change, or delete the directory"
        )
    check_inputs(run_dir, config)


def check_inputs(run_dir: Path, config: Config, keys: Sequence[str] = INPUTS) -> None:
    """Compares what the inputs of a run hold with what they held when it began.

    A checkpoint of a LoRA run holds the adapters alone: this is what ties it to its base.

    Raises:
      UserError: naming the first that has changed.
    """
    before = json.loads((run_dir / "inputs.json").read_text(encoding="utf-8"))
    for name, digest in digests(config, keys).items():
        if before.get(name) != digest:
            raise UserError(
                f"{run_dir} was made from another {name}: its content has changed since. Choose "
                "another name (name=...), bring it back, or delete the directory"
            )


def digests(config: Config, keys: Sequence[str] = INPUTS) -> dict[str, str]:
    """ "KEY PATH" -> SHA-256 of the names and contents, for each input that is a file or directory
    here. One that is gone may be: who needs it will say so."""
    found = {}
    for key in keys:
        for name in _values(to_dict(config), key.split(".")):
            here = Path(name).expanduser()
            is_model = key in MODELS
            path = resolve(name, TOKENIZER_FILES) if is_model else here
            if path != here:  # A snapshot from the Hub bears the name of its commit.
                found[f"{key} {name}"] = path.name
            elif path.exists():
                found[f"{key} {name}"] = of_path(path)
    return found


def _values(tree: Any, keys: Sequence[str]) -> list[str]:
    """The texts that stand under the keys: one, a list of them, or none."""
    if not keys:
        return [tree] if isinstance(tree, str) else tree if isinstance(tree, list) else []
    if not isinstance(tree, dict):
        return []
    below = tree.values() if keys[0] == "*" else [tree.get(keys[0])]
    return [name for value in below for name in _values(value, keys[1:])]


@contextlib.contextmanager
def lock(run_dir: Path, path: Path) -> Iterator[None]:
    """Keeps a second process out of a run directory. The system frees it even after kill -9.

    Args:
      path: the file of the lock; its directory is created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written: {error.strerror}: {error.filename}; choose another "
            "output_dir"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run_dir}: another process is at work in it") from None
        yield


def export_checkpoint(
    run_dir: Path, out: Path, *, step: int | None = None, adapter: bool = False, **files: Any
) -> int:
    """Writes the model of a checkpoint as a Hugging Face directory; returns the checkpoint's step.

    Args:
      step: the last one if not given.
      adapter: write the adapters of a LoRA run as a directory of PEFT; else they are merged.
      files: `dtype` and `max_shard_bytes` of a whole model, as of `models.save`.
    Raises:
      UserError: if there is no such run or checkpoint, it is damaged, or `out` exists; for adapters
        also if the run trained none, or their base is not what it was.
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
    if config.model.lora is not None:
        check_inputs(run_dir, config, ("model.path",))
    exporter = getattr(PHASES[phase][1], "exporter", Policy)
    policy = exporter(config, config.training_mesh())
    checkpoints = Checkpointer(run_dir / "checkpoints", keep=config.loop.keep, read_only=True)
    with contextlib.closing(checkpoints):
        key = jax.random.PRNGKey(0)
        parts = {"params": policy.init(key)}
        if config.optimizer.name == "schedule_free":
            transform = make_optimizer(config.optimizer, config.loop.steps).transform
            parts["opt_state"] = create_state(parts["params"], transform, key).opt_state
        step, parts = checkpoints.restore_parts(parts, step)
    params = averaged(parts["params"], parts.get("opt_state"))
    if adapter:
        policy.export_adapter(params, out)
    else:
        policy.export(params, out, **files)
    return step
