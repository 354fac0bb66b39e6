"""The recipes of R1 are sound, and run with their sizes turned down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from alignjax.core.config import build, find_config, load
from alignjax.models import Model, ModelConfig, save
from alignjax.recipes import notations, notations_corpus
from alignjax.recipes.graph import RecipeConfig
from alignjax.text import load_tokenizer
from alignjax.train.metrics import read_metrics
from tests.flags import xla_flags

STARTS = {"dev1": "base", "dev2": "dev1", "dev3": "base", "r1": "dev3"}


def recipe(name: str, *overrides: str) -> RecipeConfig:
    return build(RecipeConfig, load(find_config(f"recipes/{name}"), overrides))


@pytest.mark.parametrize("name", ["r1", "r1_qwen3_1_7b"])
def test_each_stage_starts_from_what_it_should(name: str) -> None:
    config = recipe(name)
    stages, base = config.stages, config.vars.get("model", f"runs/{name}/base/model")
    for stage, start in STARTS.items():
        path = base if start == "base" else f"runs/{name}/{start}/model"
        assert stages[stage].model.path == path
    assert stages["kept"].model.path == f"runs/{name}/dev2/model"
    assert stages["dev3"].data.train[0] == f"runs/{name}/kept/kept.jsonl"
    # In the last stage, rules are for problems and reward models for the rest, and both are there.
    rewards = stages["r1"].rewards
    problem = rewards.functions["accuracy"].where
    assert set(problem) == {"kind"} and rewards.functions["language"].where == problem
    assert rewards.models and all(
        model.squash == "sigmoid" and model.where == {"kind": "general"}
        for model in rewards.models.values()
    )
    assert not rewards.functions["format"].where
    assert stages["dev2"].rewards.functions["language"].weight > 0


@pytest.mark.parametrize("name", ["r1", "r1_zero_qwen3_1_7b"])
def test_r1_zero_is_rewarded_for_answers_and_their_form_alone(name: str) -> None:
    weights = recipe(name).stages["zero"].rewards.weights
    assert {key for key, weight in weights.items() if weight} == {"accuracy", "format"}
    assert "language" in weights


def test_the_laptop_recipe_tunes_on_no_test_prompt() -> None:
    for name in ("r1", "r1_students", "r1_controls"):
        dumped = json.dumps({k: v.model_dump() for k, v in recipe(name).stages.items()})
        assert "test.jsonl" not in dumped.replace("_pairs/test.jsonl", "")


def test_students_have_no_fewer_samples_of_their_own_than_the_teacher_was_asked_for() -> None:
    teacher = recipe("r1").stages["kept"]
    stages = recipe("r1_students").stages
    for family, heads in (("llama", 2), ("qwen", None)):
        rl, more, shape = (
            stages[f"{family}_rl"], stages[f"{family}_rl_more"], stages[f"{family}_base"].model.init
        )  # fmt: skip
        assert shape.num_kv_heads == heads if heads else shape.family == "qwen3"
        own = rl.loop.steps * rl.rollout.num_prompts * rl.rollout.group_size
        assert own >= teacher.data.num_prompts * teacher.rollout.num_samples
        for way, start in {"distilled": "base", "rl": "base", "rl_more": "rl"}.items():
            path = f"runs/r1_students/{family}_{start}/model"
            assert stages[f"{family}_{way}"].model.path == path
        # The same RL, gone on with.
        differ = {"name", "model", "loop"}
        assert more.model_dump(exclude=differ) == rl.model_dump(exclude=differ)


def run(folder: Path, name: str, *overrides: str) -> Path:
    """Runs a recipe as a user does, on one device: of eight, two cores would be slow."""
    subprocess.run(
        [sys.executable, "-m", "alignjax", "run", f"recipes/{name}", *overrides],
        check=True,
        env=os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": os.pathsep.join(sys.path)},
        cwd=folder,
        timeout=600,
    )
    return folder / "runs" / name


TINY = "{hidden_size: 16, num_layers: 1, num_heads: 2, max_position_embeddings: 64}"


@pytest.mark.slow
def test_the_laptop_recipe_runs_and_ends_in_its_page(tmp_path: Path) -> None:
    """Tiny, so that nothing is right: what is kept, and what is compared, is anything at all."""
    anything = "{at_least: 0.0}"
    small = [
        f"stages.{s}.{key}"
        for s in ("zero", "dev2", "r1")
        for key in (
            "loop.steps=1", "rollout.num_prompts=4", "rollout.group_size=2",
            "data.micro_batches=1", "evaluation.num_problems=24", "evaluation.num_shown=24",
        )
    ]  # fmt: skip
    overrides = [
        *small,
        "stages.world.args={num_sums: 300, num_drills: 100, num_requests: 100, num_train: 64, "
        "num_held_out: 32, num_demonstrations: 20}",
        f"stages.base.model.init={TINY}",
        *(f"stages.{s}.loop.steps=2" for s in ("base", "dev1", "dev3", "helpful", "safe")),
        f"stages.traces.keep.accuracy={anything}",
        "stages.traces.data.num_prompts=40",
        "stages.cold_start.args.num_examples=10",
        f"stages.kept.keep={{accuracy: {anything}}}",
        "stages.kept.data.num_prompts=16",
        "stages.answers.data.num_prompts=38",
        "stages.base_answers.data.num_prompts=38",
        # Noise alone: of a model that has learned nothing no two answers are of unlike worth.
        "stages.helpful_pairs.args.min_gap=-1.0",
        "stages.safe_pairs.args.min_gap=-1.0",
    ]  # fmt: skip
    folder = run(tmp_path, "r1", *overrides)
    assert (folder / "page/r1.png").read_bytes().startswith(b"\x89PNG")
    shares = json.loads((folder / "page/stages.json").read_text())
    assert list(shares["Sums solved"]) == ["base", "Zero", "Dev1", "Dev2", "Dev3", "R1"]
    last = read_metrics(folder / "r1")[-1]
    # A part that is for some prompts alone is measured on them, and nothing has failed.
    assert last["num_failed_rewards"] == 0
    assert {"eval/sampled/accuracy", "eval/sampled/helpful", "eval/sampled/general"} <= last.keys()
    assert 0 < last["eval/sampled/helpful"] < 1
    samples = [json.loads(s) for s in (folder / "r1/samples.jsonl").read_text().splitlines()]
    for sample in samples:
        is_sum = sample["prompt"][0].isdigit()
        assert ("accuracy" in sample["parts"]) == is_sum
        assert ("helpful" in sample["parts"]) == ("safe" in sample["parts"]) == (not is_sum)
        assert "format" in sample["parts"]

    def files() -> list[Path]:
        return sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock"))

    # Every stage is finished, and stays as it is.
    before = [(p, p.stat().st_mtime_ns) for p in files()]
    run(tmp_path, "r1", *overrides)
    after = [(p, p.stat().st_mtime_ns) for p in files()]
    assert before == after


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model of the family, and files such as a user would have."""
    folder = tmp_path_factory.mktemp("qwen")
    notations_corpus.write(
        folder / "world", seed=0, num_sums=20, num_drills=0, num_requests=4, num_train=20,
        num_held_out=8, num_demonstrations=20,
    )  # fmt: skip
    tokenizer = load_tokenizer(folder / "world/tokenizer")
    model = Model(
        ModelConfig(
            family="qwen3", vocab_size=len(notations.TOKENS), hidden_size=16, num_layers=1,
            num_heads=2, max_position_embeddings=64,
        )
    )  # fmt: skip
    save(folder / "model", model, model.init(jax.random.PRNGKey(0)))
    tokenizer.save(str(folder / "model"))
    return folder


def write(path: Path, records: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


SMALL = (
    "rollout.max_prompt_tokens=16", "rollout.max_tokens=24", "rollout.stop_tokens=[]",
    "model.compute_dtype=float32", "model.remat=false",
)  # fmt: skip
RL = (
    "loop.steps=1", "rollout.num_prompts=4", "rollout.group_size=2", "data.micro_batches=1",
    "evaluation.num_problems=4", "optimizer.warmup_steps=0",
)  # fmt: skip


@pytest.mark.slow
def test_the_recipe_for_a_gpu_runs(tiny: Path, tmp_path: Path) -> None:
    world = tiny / "world"
    sums = [json.loads(s) for s in (world / "arithmetic_train.jsonl").read_text().splitlines()]
    requests = [json.loads(s) for s in (world / "general_train.jsonl").read_text().splitlines()]
    problems = [r | {"kind": "problem"} for r in sums]
    pairs = [
        {"prompt": r["prompt"], "responses": ["<answer>no</answer>", "!"], "ranks": [1, 2]}
        for r in requests
    ]
    files = {
        "model": tiny / "model",
        "cold_start": world / "perfect.jsonl",
        "general": world / "demonstrations.jsonl",
        "problems": write(tmp_path / "problems.jsonl", problems),
        "held_out": write(tmp_path / "held_out.jsonl", problems[:4]),
        "prompts": write(tmp_path / "prompts.jsonl", problems[:6] + requests[:6]),
        "preferences": write(tmp_path / "preferences.jsonl", pairs),
    }
    sft = ("loop.steps=1", "data.row_len=64", "data.rows=4", "optimizer.warmup_steps=0",
           "model.compute_dtype=float32")  # fmt: skip
    folder = run(
        tmp_path, "r1_qwen3_1_7b",
        *(f"vars.{name}={path}" for name, path in files.items()),
        *(f"stages.{s}.{key}" for s in ("dev2", "r1") for key in (*SMALL, *RL)),
        *(f"stages.{s}.{key}" for s in ("dev1", "dev3") for key in sft),
        *(f"stages.kept.{key}" for key in SMALL[:4]),
        "stages.kept.data.num_prompts=8",
        "stages.kept.keep={accuracy: {at_least: 0.0}}",
        *(f"stages.reward.{key}" for key in (sft[0], sft[1], *sft[3:])),
        "stages.reward.data.num_prompts=4", "stages.reward.data.micro_batches=1",
    )  # fmt: skip
    last = read_metrics(folder / "r1")[-1]
    assert last["num_failed_rewards"] == 0
    assert (folder / "r1/model/model.safetensors").exists()


@pytest.mark.slow
def test_r1_zero_for_a_gpu_runs(tiny: Path, tmp_path: Path) -> None:
    """Its prompt is in words that the tiny vocabulary lacks, and is made of digits here."""
    sums = [json.loads(s) for s in (tiny / "world/validation.jsonl").read_text().splitlines()]
    sums = [{"problem": r["prompt"], "solution": f"#### {r['reference']}"} for r in sums
            if r["kind"] == "arithmetic"]  # fmt: skip
    data = write(tmp_path / "data.jsonl", sums)
    folder = run(
        tmp_path, "r1_zero_qwen3_1_7b",
        f"vars.model={tiny / 'model'}", f"vars.train={data}", f"vars.test={data}",
        "vars.question=problem", "vars.answer=solution",
        *(f"stages.zero.{key}" for key in (*SMALL, *RL)),
        "stages.zero.data.text.fields.prompt='{problem}'",
    )  # fmt: skip
    last = read_metrics(folder / "zero")[-1]
    assert last["num_failed_rewards"] == 0 and last["kl"] >= 0
    assert {"rewards/language/mean", "eval/sampled/accuracy"} <= last.keys()
