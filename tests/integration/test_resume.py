"""Real processes, killed with SIGKILL at random moments, end as the one that nothing stopped."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml

from alignjax.cli.main import TERMINATED
from alignjax.models import Model, ModelConfig, save
from alignjax.recipes import chains, sevens
from alignjax.text import load_tokenizer
from alignjax.train.metrics import TIMINGS
from tests.flags import xla_flags

# What is compared is read as it stands in the file.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")
REPO = Path(__file__).resolve().parent.parent.parent
REWARD = """
def reward(completion, num_tokens):
    sevens = completion.count("7")
    return {"sevens": sevens / num_tokens, "any": 0.5 * (sevens > 0)}
"""
MODEL = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
COMMON = {
    "name": "run", "output_dir": "runs", "tokenizer": "tokenizer", "model": {"init": MODEL},
    "optimizer": {"learning_rate": 1e-2, "schedule": "cosine", "warmup_steps": 3},
    "loop": {
        "steps": 14, "checkpoint_every": 3, "eval_every": 4, "keep": 2, "tensorboard": False,
        "best_metric": "eval/loss",
    },
}  # fmt: skip
LORA = {
    "model": {"path": "base", "lora": {"rank": 4, "dropout": 0.2, "dora": True}, "quantize": "nf4"},
    "optimizer": {"learning_rate": 3e-2},
}
CONFIGS = {
    "sft": COMMON | {
        "phase": "sft",
        "data": {
            "train": "corpus.jsonl", "eval": "corpus.jsonl",
            "text": {"fields": {"completion": "text"}},
            "row_len": 64, "rows": 4, "micro_batches": 2,
        },
    },
    "grpo": COMMON | {
        "phase": "grpo",
        "data": {
            "train": "train.jsonl", "eval": "test.jsonl",
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
        },
        "rollout": {"num_prompts": 4, "group_size": 4, "max_prompt_tokens": 16, "max_tokens": 8},
        "algorithm": {
            "preset": "dapo", "kl_coef": 0.1, "reference_every": 4, "num_updates": 2,
            "num_minibatches": 2,
        },
        "rewards": {
            "functions": {"sevens": {"function": "rewards.py:reward"}}, "num_workers": 1,
            "timeout_s": 60.0,
        },
        "evaluation": {"num_problems": 8},
        "loop": COMMON["loop"] | {
            "best_metric": "eval/sampled/reward", "best_mode": "max", "steps": 10,
        },
    },
}  # fmt: skip


CONFIGS["lora"] = CONFIGS["sft"] | LORA
CONFIGS["reward"] = COMMON | {
    "phase": "reward",
    "tokenizer": "sevens/tokenizer",
    "data": {
        "train": "sevens/train.jsonl",
        "eval": "sevens/test.jsonl",
        "row_len": 64,
        "num_prompts": 8,
        "micro_batches": 2,
    },
}
CONFIGS["ahead"] = CONFIGS["grpo"] | {
    # On two devices, one of which samples while the other trains.
    "rollout": CONFIGS["grpo"]["rollout"] | {"devices": 1, "max_staleness": 1},
    "algorithm": CONFIGS["grpo"]["algorithm"] | {"old_logps": "trainer", "importance_cap": 2.0},
}  # fmt: skip
CONFIGS["ppo"] = CONFIGS["grpo"] | {
    "phase": "ppo",
    "rollout": {"num_prompts": 8, "max_prompt_tokens": 16, "max_tokens": 8},
    "algorithm": {
        "kl_coef": 0.1, "kl_control": "adaptive", "kl_target": 0.5, "kl_horizon": 20,
        "num_epochs": 2, "num_minibatches": 2, "ptx_coef": 0.2, "scale_scores": True,
    },
    "critic": {"learning_rate_scale": 3.0},
    "ptx": {
        "train": "corpus.jsonl", "text": {"fields": {"completion": "text"}}, "rows": 2,
        "overlong": "drop",
    },
}  # fmt: skip
CONFIGS["preference"] = CONFIGS["reward"] | {
    # With a running mean in the state; the reference is asked before the first step.
    "phase": "preference", "losses": {"bco": {"beta": 0.1}}, "cache_dir": "cache",
}  # fmt: skip
CONFIGS["online"] = (
    COMMON
    | {
        "phase": "online_preference",
        "losses": {"dpo": {"beta": 0.1}},
        "algorithm": {"num_updates": 2, "num_minibatches": 2},
        "loop": COMMON["loop"] | {"best_metric": "eval/sampled/reward", "best_mode": "max"},
    }
    | {name: CONFIGS["grpo"][name] for name in ("data", "rollout", "rewards", "evaluation")}
)
TEACHER = {"model": {"init": MODEL}, "seed": 7, "teacher": {"path": "base"}}
DISTILL = {
    "distill": CONFIGS["sft"] | TEACHER | {"phase": "distill", "divergence": {"kind": "jsd"}},
    "distill_top_k": CONFIGS["sft"] | TEACHER | {
        "phase": "distill", "teacher": {"path": "base", "top_k": 4, "cache_dir": "cache"},
    },
    "online_distill": CONFIGS["online"] | TEACHER | {
        "phase": "online_distill", "divergence": {"kind": "sampled_reverse_kl"},
        "rollout": CONFIGS["grpo"]["rollout"] | {"group_size": 1, "num_prompts": 8},
        "loop": COMMON["loop"] | {"best_metric": "eval/sampled/reverse_kl"},
    },
}  # fmt: skip
del DISTILL["online_distill"]["losses"]


class Place:
    """A directory with data and config, and the run in it."""

    def __init__(self, folder, phase):
        self.folder, self.run = folder, folder / "runs" / "run"
        chains.write(folder, seed=0, num_questions=60, num_drills=10, num_train=40, num_test=8,
                     num_ops=(1, 2, 3))  # fmt: skip
        (folder / "sevens").mkdir(exist_ok=True)
        sevens.write(folder / "sevens", seed=0, num_train=60, num_test=20)
        model = Model(ModelConfig(vocab_size=23, **MODEL))
        save(folder / "base", model, model.init(jax.random.key(0)))
        load_tokenizer(folder / "tokenizer").save(str(folder / "base"))
        (folder / "rewards.py").write_text(REWARD)
        (folder / "config.yaml").write_text(yaml.safe_dump((CONFIGS | DISTILL)[phase]))
        self.flags = xla_flags(2 if phase == "ahead" else 1)

    def start(self, *overrides):
        env = os.environ | {
            "PYTHONPATH": str(REPO), "XLA_FLAGS": self.flags, "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        return subprocess.Popen(
            [sys.executable, "-m", "alignjax", "run", "config.yaml", *overrides],
            cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def finish(self, *overrides):
        """Runs to the end of the process: (exit status, what it printed)."""
        process = self.start(*overrides)
        text, _ = process.communicate(timeout=300)
        return process.returncode, text

    def num_lines(self):
        with contextlib.suppress(FileNotFoundError):
            return (self.run / "metrics.jsonl").read_bytes().count(b"\n")
        return 0

    def is_saving(self):
        return any(self.run.glob("checkpoints/*.orbax-checkpoint-tmp*"))

    def is_exporting(self):
        return (self.run / ".model.tmp").exists()

    def kill_when(self, condition, delay=0.0):
        """SIGKILL as soon as the condition holds; None, or the output if the run ended before."""
        process = self.start()
        try:
            while not condition():
                if process.poll() is not None:
                    return process.communicate()[0]
                time.sleep(0.001)
            time.sleep(delay)
            if process.poll() is not None:
                return process.communicate()[0]
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        return None

    def content(self):
        """All that must be the same, bit for bit."""
        (last,) = sorted((self.run / "checkpoints").glob("*"), key=lambda p: -int(p.name))[:1]
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            state = reader.restore(last / "state")
        lines = [json.loads(x) for x in (self.run / "metrics.jsonl").read_text().splitlines()]
        return {
            "state": {
                jax.tree_util.keystr(path): (np.asarray(x).dtype.name, np.asarray(x).tobytes())
                for path, x in jax.tree_util.tree_leaves_with_path(state)
            },
            "position": (last / "position" / "metadata").read_text(),
            "checkpoints": sorted(p.name for p in (self.run / "checkpoints").iterdir()),
            "metrics": [{k: v for k, v in x.items() if k not in TIMINGS} for x in lines],
            "samples": (self.run / "samples.jsonl").read_text(),
            "model": {
                p.name: p.read_bytes() for p in sorted((self.run / "model").iterdir())
            },
            "config": (self.run / "config.yaml").read_text(),
        }  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """phase -> the place of a run that nothing stopped, and what it left."""
    known = {}

    def get(phase):
        if phase not in known:
            place = Place(tmp_path_factory.mktemp(phase), phase)
            status, text = place.finish()
            assert status == 0, text
            known[phase] = place, place.content()
        return known[phase]

    return get


PHASES = list(CONFIGS)


def assert_same(place, expected):
    found = place.content()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == value, name


def kill_at_random(place, seed, num_kills):
    """Each time after a random number of further lines and a part of a step."""
    rng = random.Random(seed)
    for _ in range(num_kills):
        target = place.num_lines() + rng.randint(1, 5)
        ended = place.kill_when(lambda t=target: place.num_lines() >= t, rng.random() * 0.2)
        if ended is not None:
            return


def kill_while(place, condition, after=0):
    """Kills in the middle of something that is over in a moment; several tries."""
    for _ in range(8):
        ended = place.kill_when(lambda: place.num_lines() > after and condition())
        if ended is not None:  # Too late each time: from the start again.
            shutil.rmtree(place.run)
        elif condition():
            return
    raise AssertionError("never caught in the act")


def resume(place):
    status, text = place.finish()
    assert status == 0, text
    return text


@pytest.mark.slow
def test_what_the_runs_do_is_worth_resuming(uninterrupted):
    """Else equality would show nothing: both learn, evaluate, and take several roads."""
    _, sft = uninterrupted("sft")
    losses = [x["eval/loss"] for x in sft["metrics"] if "eval/loss" in x]
    assert [x["step"] for x in sft["metrics"]] == list(range(15))
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.2
    _, lora = uninterrupted("lora")
    losses = [x["eval/loss"] for x in lora["metrics"] if "eval/loss" in x]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.1
    assert all("'lora'" in name for name in lora["state"] if "params" in name)
    _, reward = uninterrupted("reward")
    losses = [x["eval/loss"] for x in reward["metrics"] if "eval/loss" in x]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.1
    assert json.loads(reward["model"]["reward.json"])["num"] > 40
    _, preference = uninterrupted("preference")
    shares = [x["eval/rewards/accuracies"] for x in preference["metrics"] if "eval/loss" in x]
    assert len(shares) == 5 and shares[-1] > shares[0] + 0.1
    assert len({x["delta"] for x in preference["metrics"][2:]}) == 13
    _, online = uninterrupted("online")
    assert len({x["reward"] for x in online["metrics"][1:]}) > 5
    assert all(x["reward_margin"] > 0 for x in online["metrics"][1:])
    assert any("reference" in name for name in uninterrupted("grpo")[1]["state"])
    grpo = uninterrupted("grpo")[1]["metrics"]
    assert len({x["kl"] for x in grpo[1:]}) == 10 and len({x["reward"] for x in grpo[1:]}) > 5
    assert max(x["num_rounds"] for x in grpo[1:]) > 1
    assert all(x["sampling/sampling_logp_difference/max"] < 1e-5 for x in grpo[1:])
    _, ppo = uninterrupted("ppo")
    for field in ("objective/kl", "kl_coef", "loss/ptx_avg", "val/explained_variance"):
        assert len({x[field] for x in ppo["metrics"][1:]}) == 10, field
    assert any("critic" in name for name in ppo["state"]), "its moments, too"
    _, ahead = uninterrupted("ahead")
    assert [x["rollout/staleness/max"] for x in ahead["metrics"][1:]] == [0] + [1] * 9
    assert any("behaviour" in name for name in ahead["state"])
    assert '"texts"' in ppo["position"]


@pytest.mark.parametrize(
    "phase",
    [p if p in ("sft", "grpo", "ppo") else pytest.param(p, marks=pytest.mark.slow) for p in PHASES],
)
def test_killed_at_random_and_during_a_save(tmp_path, uninterrupted, phase):
    place = Place(tmp_path, phase)
    kill_while(place, place.is_saving, after=4)
    kill_at_random(place, seed=phase, num_kills=1)
    resume(place)
    assert_same(place, uninterrupted(phase)[1])


@pytest.mark.slow
@pytest.mark.parametrize("phase", DISTILL)
def test_distillation_killed_at_random(tmp_path, uninterrupted, phase):
    expected = uninterrupted(phase)[1]
    name = "eval/sampled/reverse_kl" if phase == "online_distill" else "eval/loss"
    found = [x[name] for x in expected["metrics"] if name in x]
    assert len(found) == 5 and found[-1] < found[0], "it is worth resuming"
    assert not any("teacher" in name for name in expected["state"])
    place = Place(tmp_path, phase)
    kill_while(place, place.is_saving, after=4)
    kill_at_random(place, seed=phase, num_kills=2)
    resume(place)
    assert_same(place, expected)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("phase", PHASES)
def test_killed_again_and_again(tmp_path, uninterrupted, phase, seed):
    place = Place(tmp_path, phase)
    kill_while(place, place.is_saving)
    kill_at_random(place, seed=f"{phase}{seed}", num_kills=5)
    if not (place.run / "model").exists():
        kill_while(place, place.is_exporting)
        assert not (place.run / "model").exists()
    resume(place)
    assert_same(place, uninterrupted(phase)[1])


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, TERMINATED, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_saves_and_says_how_to_go_on(tmp_path, uninterrupted, number, code, word):
    place = Place(tmp_path, "sft")
    process = place.start()
    while place.num_lines() < 5:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(number)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == code, text
    step = place.num_lines() - 1
    assert f"saved step {step}; alignjax run config.yaml continues from there" in text
    assert "Traceback" not in text and f"alignjax: {word}" in text
    assert (place.run / "checkpoints" / str(step)).is_dir()
    text = resume(place)
    assert f"resumed from step {step} of 14" in text
    assert_same(place, uninterrupted("sft")[1])


def copy_of(uninterrupted, phase, folder):
    """A finished run, as if it had been killed before the export."""
    place, expected = uninterrupted(phase)
    shutil.copytree(place.folder, folder, dirs_exist_ok=True)
    copy = Place(folder, phase)
    shutil.rmtree(copy.run / "model")
    return copy, expected


@pytest.mark.parametrize("phase", ["sft", "grpo"])
def test_of_a_truncated_last_checkpoint_the_one_before_is_used(tmp_path, uninterrupted, phase):
    place, expected = copy_of(uninterrupted, phase, tmp_path)
    last = CONFIGS[phase]["loop"]["steps"]
    files = [p for p in (place.run / "checkpoints" / str(last)).rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    text = resume(place)
    assert f"checkpoints/{last} is damaged" in text and "trying the one before" in text
    assert f"resumed from step {12 if phase == 'sft' else 9} of {last}" in text
    assert "Traceback" not in text
    assert_same(place, expected)


@pytest.mark.slow
def test_it_goes_on_on_another_mesh(tmp_path, uninterrupted):
    place, expected = copy_of(uninterrupted, "sft", tmp_path)
    shutil.rmtree(place.run / "checkpoints/14")
    place.flags = xla_flags(4)
    status, text = place.finish("mesh={fsdp: 2, tensor: 2}")
    assert status == 0 and "resumed from step 12 of 14" in text, text
    found = place.content()
    assert found["position"] == expected["position"]
    assert found["metrics"] != expected["metrics"], "it computes with other parts"
    for one, other in zip(found["metrics"], expected["metrics"], strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-6)


def test_another_config_is_refused_and_the_difference_shown(tmp_path, uninterrupted):
    place, expected = copy_of(uninterrupted, "sft", tmp_path)
    before = {p: p.stat().st_mtime_ns for p in place.run.rglob("*") if p.is_file()}
    status, text = place.finish("optimizer.learning_rate=5e-3", "loop.steps=20", "data.rows=8")
    assert status == 2
    assert "holds a run of another config (there -> now)" in text
    for change in ("optimizer.learning_rate: 0.01 -> 0.005", "loop.steps: 14 -> 20",
                   "data.rows: 4 -> 8"):  # fmt: skip
        assert change in text
    assert text.count(" -> ") == 4 and "Traceback" not in text
    after = {p: p.stat().st_mtime_ns for p in place.run.rglob("*") if p.is_file()}
    before.pop(place.run / ".lock"), after.pop(place.run / ".lock")
    assert after == before
    resume(place)
    assert_same(place, expected)


def test_a_second_process_is_kept_out(tmp_path):
    place = Place(tmp_path, "sft")
    process = place.start()
    while place.num_lines() < 1:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    process.send_signal(signal.SIGSTOP)
    try:
        status, text = place.finish()
    finally:
        process.kill()
        process.communicate()
    assert status == 2 and "another process is at work in it" in text
