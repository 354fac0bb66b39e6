"""Recipes that are killed with SIGKILL inside each of their stages end as one that nothing stopped.

A further recipe is a further entry of `CASES`.
"""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from alignjax.core.config import build, find_config, load
from alignjax.models import Model, ModelConfig, save
from alignjax.phases.common import PhaseConfig
from alignjax.phases.produce import PROGRESS
from alignjax.phases.registry import DATA_PHASES
from alignjax.recipes import chains
from alignjax.recipes.graph import RecipeConfig
from alignjax.text import load_tokenizer
from alignjax.train.metrics import TIMINGS
from tests.flags import xla_flags
from tests.integration.killed import REPO

pytestmark = [
    pytest.mark.timeout(3600),
    pytest.mark.slow,
    # What is compared is read as it stands in the file.
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
]

SIDES = ("whole", "cut")
TINY = "hidden_size: 16, num_layers: 1, num_heads: 2, max_position_embeddings: 64"
TRAINING = (
    "loop.steps=6", "loop.log_every=1", "loop.checkpoint_every=2", "loop.eval_every=3",
    "loop.tensorboard=false", "optimizer.warmup_steps=0", "data.micro_batches=1",
)  # fmt: skip
"""Of every stage that trains; a case may say otherwise."""
NOT_COMPARED = (".lock", ".log", ".png")
"""Ends of names: locks; what functions print; pictures, in which the time is drawn."""


class Case(NamedTuple):
    """A recipe, small enough to be run twice, though of several batches in each stage."""

    small: dict[str, tuple[str, ...]]
    """Stage -> overrides of its keys."""
    prepare: Callable[[Path], None] = lambda folder: None
    """Writes what the recipe needs into the directory where it is run."""
    overrides: tuple[str, ...] = ()
    """Of the recipe itself."""
    counts_calls: bool = True
    """Whether each question to a judge is written down: of a model, only the answers are."""


JUDGES = """
from alignjax.recipes import manners_judge

def ask(path, args):
    with open(path, "a") as file:
        file.write(repr(args) + "\\n")

def compare(prompt, first, second, *, noise, **fields):
    ask("pairs.txt", (prompt, first, second))
    return manners_judge.compare(prompt, first, second, noise=noise)

def rate(prompt, response, *, noise, **fields):
    ask("scores.txt", (prompt, response))
    return manners_judge.rate(prompt, response, noise=noise)
"""
ROLLOUT = ("rollout.num_prompts=4", "rollout.group_size=4", "evaluation.num_problems=8")


SLOW = """
import time
from alignjax.recipes import r1

def cold_start(*args, **kwargs):
    r1.cold_start(*args, **kwargs)
    time.sleep(1)

def compare(*args, **kwargs):
    r1.compare(*args, **kwargs)
    time.sleep(1)
"""
"""Of stages that would be over before they could be killed."""


STUDENTS = ("qwen_base", "llama_base", "qwen", "llama", "qwen_logits", "qwen_online")


def write_teacher(folder: Path) -> None:
    """A random model in place of the one that learned to reason, and its world."""
    chains.write(folder / "teacher/world", seed=0, num_questions=60, num_drills=20, num_train=40,
                 num_test=8, num_ops=(3,))  # fmt: skip
    tokenizer = load_tokenizer(folder / "teacher/world/tokenizer")
    shape = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "initializer_range": 0.2}
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, max_position_embeddings=64, **shape))
    save(folder / "teacher/zero/model", model, model.init(jax.random.PRNGKey(0)))
    tokenizer.save(str(folder / "teacher/zero/model"))


CASES = {
    "rlaif": Case(
        {
            "world": ("args={num_lines: 300}",),
            "base": (f"model.init={{{TINY}}}", "data.rows=4"),
            "samples": ("data.num_prompts=12", "rollout.num_prompts=4"),
            "held_out": ("data.num_prompts=8", "rollout.num_prompts=4"),
            "labels": ("num_prompts=2", "judge.function=judges.py:compare", "judge.num_workers=1"),
            "reward": ("data.num_prompts=4",),
            "rl": ROLLOUT,
            "direct": (
                *ROLLOUT,
                "rewards.judges.score.function=judges.py:rate",
                "rewards.judges.score.num_workers=1",
            ),
            "online_dpo": (
                *ROLLOUT,
                "rewards.judges.wins.function=judges.py:compare",
                "rewards.judges.wins.num_workers=1",
            ),
        },
        prepare=lambda folder: (folder / "judges.py").write_text(JUDGES),
    ),
    "constitutional": Case(
        {
            "world": ("args={num_lines: 300}",),
            "base": (f"model.init={{{TINY.replace('64', '72')}}}", "data.rows=4"),
            "revisions": (
                "data.num_prompts=12",
                "rollout.num_prompts=4",
                "num_rounds=2",
                "truncated=keep",
            ),
            "sl_cai": ("data.rows=4",),
            # An untrained judge is not sure of anything: hardened, all its labels would be ties.
            "labels": (
                "sample.data.num_prompts=24",
                "sample.rollout.num_prompts=4",
                "judge.harden=null",
            ),
            "reward": ("data.num_prompts=4",),
            "rl_cai": ROLLOUT,
            "dpo": ("data.num_prompts=4", "cache_dir=cache"),
        },
        counts_calls=False,
    ),
    "r1_distill": Case(
        {
            "traces": (
                "data.num_prompts=24",
                "rollout.num_prompts=8",
                "keep={accuracy: {at_least: 0}}",
            ),
            "vocabulary": ("vocab_size=289",),  # The small world has fewer signs.
            "qwen_base": (f"model.init={{family: qwen3, {TINY}}}", "data.rows=4"),
            "llama_base": (f"model.init={{family: llama, {TINY}}}", "data.rows=4"),
            **dict.fromkeys(("qwen", "llama", "qwen_logits"), ("data.rows=4",)),
            "qwen_online": ("rollout.num_prompts=4", "evaluation.num_problems=8"),
            **{f"{name}_eval": ("num_problems=8", "num_samples=2") for name in STUDENTS},
        },
        prepare=write_teacher,
        overrides=("vars.teacher=teacher",),
    ),
    "r1": Case(
        {
            "world": (
                "args={num_sums: 300, num_drills: 100, num_requests: 100, num_train: 64, "
                "num_held_out: 16, num_demonstrations: 20}",
            ),
            "base": (f"model.init={{{TINY}}}", "data.rows=4"),
            **dict.fromkeys(("dev1", "dev3"), ("data.rows=4",)),
            # The page shows a sum and a request: all are evaluated.
            **dict.fromkeys(
                ("zero", "dev2", "r1"),
                (*ROLLOUT[:2], "evaluation.num_problems=24", "evaluation.num_shown=24"),
            ),
            # Nothing is right: what is kept, and what is compared, is anything at all.
            **dict.fromkeys(
                ("traces", "kept"),
                (
                    "data.num_prompts=24",
                    "rollout.num_prompts=8",
                    "keep={accuracy: {at_least: 0}}",
                ),
            ),
            "cold_start": ("args.num_examples=10", "function=slow.cold_start"),
            **dict.fromkeys(
                ("answers", "base_answers"), ("data.num_prompts=38", "rollout.num_prompts=8")
            ),
            **dict.fromkeys(
                ("helpful_pairs", "safe_pairs"), ("args.min_gap=-1.0", "function=slow.compare")
            ),
            **dict.fromkeys(("helpful", "safe"), ("data.num_prompts=4",)),
        },
        prepare=lambda folder: (folder / "slow.py").write_text(SLOW),
    ),
}


class Place:
    """A directory in which a recipe is run, on one device: of eight, two cores would be slow."""

    def __init__(self, folder: Path, name: str):
        case, stages = CASES[name], build(RecipeConfig, load(find_config(f"recipes/{name}"))).stages
        assert case.small.keys() <= stages.keys()
        own = {k: TRAINING if isinstance(s, PhaseConfig) else () for k, s in stages.items()}
        self.stages = stages
        self.folder, self.runs = folder, folder / "runs" / name
        self._command = [
            sys.executable, "-m", "alignjax", "run", f"recipes/{name}", *case.overrides,
            *(f"stages.{k}.{v}" for k in stages for v in (*own[k], *case.small.get(k, ()))),
        ]  # fmt: skip
        folder.mkdir()
        case.prepare(folder)

    def start(self) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(REPO), "XLA_FLAGS": xla_flags()}
        with (self.folder / "printed.txt").open("w") as printed:
            return subprocess.Popen(
                self._command, cwd=self.folder, env=environment, stdout=printed,
                stderr=subprocess.STDOUT, text=True, start_new_session=True,
            )  # fmt: skip

    @property
    def printed(self) -> str:
        return (self.folder / "printed.txt").read_text()

    def finish(self) -> None:
        assert self.start().wait() == 0, self.printed

    def is_inside(self, stage: str) -> bool:
        """Some of the stage's work is done, and some is left."""
        run, phase = self.runs / stage, self.stages[stage].phase
        if phase in DATA_PHASES:
            return (run / PROGRESS).exists() and not self.is_done(stage)
        if not isinstance(self.stages[stage], PhaseConfig):
            return run.with_name(f".{stage}.tmp").exists()
        metrics = run / "metrics.jsonl"
        return (
            metrics.exists() and metrics.read_bytes().count(b"\n") > 3 and not self.is_done(stage)
        )

    def is_done(self, stage: str) -> bool:
        run, phase = self.runs / stage, self.stages[stage].phase
        if phase in DATA_PHASES:
            return (run / DATA_PHASES[phase][1].output).exists()
        return (run / "model" if isinstance(self.stages[stage], PhaseConfig) else run).exists()

    def kill_inside(self, stage: str) -> None:
        """SIGKILL in the middle of a stage; if that is over in a moment, after several tries."""
        for _ in range(8):
            process = self.start()
            deadline = time.monotonic() + 900
            while not (self.is_inside(stage) or self.is_done(stage)):
                assert process.poll() is None and time.monotonic() < deadline, self.printed
                time.sleep(0.0005)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if self.is_inside(stage):
                return
            for later in list(self.stages)[list(self.stages).index(stage) :]:
                shutil.rmtree(self.runs / later, ignore_errors=True)
        raise AssertionError(f"{stage}: never caught inside")

    def content(self) -> Iterator[tuple[str, Any]]:
        """All that must be the same, bit for bit."""
        for path in sorted(self.runs.rglob("*")):
            name = path.relative_to(self.runs).as_posix()
            if path.is_dir() or name.endswith(NOT_COMPARED) or "/checkpoints/" in name:
                continue
            if path.name == "metrics.jsonl":
                lines = [json.loads(line) for line in path.read_text().splitlines()]
                yield name, [{k: v for k, v in x.items() if k not in TIMINGS} for x in lines]
            elif path.suffix == ".sqlite":
                yield name, answers(path)
            else:
                yield name, path.read_bytes()
        for path in sorted(self.runs.glob("*/checkpoints/*")):
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                state = reader.restore(path / "state")
            leaves = jax.tree_util.tree_leaves_with_path(state)
            values = {jax.tree_util.keystr(key): np.asarray(x) for key, x in leaves}
            name = path.relative_to(self.runs).as_posix()
            yield name, {key: (str(x.dtype), x.tobytes()) for key, x in values.items()}
            yield f"{name}/position", (path / "position" / "metadata").read_text()

    def times(self) -> dict[Path, int]:
        """When each file was written, of locks apart."""
        paths = [path for path in self.runs.rglob("*") if not path.name.endswith(".lock")]
        return {path: path.stat().st_mtime_ns for path in paths}

    def num_asked(self) -> tuple[int, int]:
        """Calls of the functions that judge, and answers that are kept."""
        calls = [line for path in self.folder.glob("*.txt") if path.name != "printed.txt"
                 for line in path.read_text().splitlines()]  # fmt: skip
        return len(calls), sum(len(answers(path)) for path in self.runs.rglob("judge.sqlite"))


def answers(path: Path) -> list[Any]:
    db = sqlite3.connect(path)
    try:
        return db.execute("SELECT * FROM answers ORDER BY 1").fetchall()
    finally:
        db.close()


@pytest.mark.parametrize("name", CASES)
def test_killed_inside_each_stage(tmp_path: Path, name: str) -> None:
    whole, cut = (Place(tmp_path / side, name) for side in SIDES)
    whole.finish()
    for stage in cut.stages:
        cut.kill_inside(stage)
    cut.finish()
    expected, found = dict(whole.content()), dict(cut.content())
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == value, key
    calls, kept = whole.num_asked()
    assert calls == (kept if CASES[name].counts_calls else 0)
    # Of a judge, only what it was being asked in that moment is asked again.
    again, num_kept = cut.num_asked()
    assert num_kept == kept and calls <= again <= calls + 3 * 32
    # What is finished stays as it is, and nobody is asked anything.
    before = cut.times()
    cut.finish()
    assert cut.printed.count("nothing to do") == len(cut.stages)
    assert cut.times() == before and cut.num_asked() == (again, num_kept)
