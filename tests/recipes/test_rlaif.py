"""The recipes of RLAIF are sound, and those for real models run with their sizes turned down."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignjax.core.config import build, find_config, load
from alignjax.data import open_preferences
from alignjax.phases.registry import DATA_PHASES
from alignjax.recipes import sevens
from alignjax.recipes.graph import RecipeConfig
from alignjax.recipes.stage import run_data_phase
from alignjax.train.metrics import read_metrics
from tests.flags import xla_flags
from tests.recipes.test_instructgpt import write_model, write_pairs
from tests.rewards.judge_server import Server, says


def recipe(name: str, *overrides: str) -> RecipeConfig:
    return build(RecipeConfig, load(find_config(f"recipes/{name}"), overrides))


def test_the_laptop_recipe_hands_on_labels_of_the_judge() -> None:
    stages = recipe("rlaif").stages
    assert stages["labels"].responses == "runs/rlaif/samples/preferences.jsonl"
    assert stages["reward"].data.train == "runs/rlaif/labels/preferences.jsonl"
    assert stages["rl"].rewards.models["learned"].path == "runs/rlaif/reward/model"
    # Nobody but the metrics sees the hidden reward.
    for stage in ("rl", "direct", "online_dpo"):
        assert stages[stage].rewards.weights["hidden"] == 0.0
    assert stages["direct"].rewards.judges["score"].method == "pointwise"
    assert stages["online_dpo"].rewards.judges["wins"].method == "pairwise"


def test_the_controls_differ_from_the_recipe_in_their_labels_alone() -> None:
    whole = recipe("rlaif").stages
    stages = recipe("rlaif_controls", "vars.rlaif=runs/rlaif").stages
    for kind, source in (("true", "samples"), ("noisy", "noisy_labels")):
        reward, rl = stages[f"{kind}_reward"], stages[f"{kind}_rl"]
        assert reward.data.train.endswith(f"/{source}/preferences.jsonl")
        assert rl.rewards.models["learned"].path == f"runs/rlaif_controls/{kind}_reward/model"
        same = {"name": "x", "output_dir": "x"}
        data = reward.data.model_copy(update={"train": whole["reward"].data.train})
        assert reward.model_copy(update={**same, "data": data}) == whole["reward"].model_copy(
            update=same
        )
        same["rewards"] = whole["rl"].rewards
        assert rl.model_copy(update=same) == whole["rl"].model_copy(update=same)
    judges = {name: stages[name].judge for name in ("noisy_labels", "one_order_labels")}
    assert judges["noisy_labels"].args == {"noise": 0.2}
    assert judges["one_order_labels"] == whole["labels"].judge.model_copy(
        update={"both_orders": False}
    )


def test_the_phase_by_itself_does_what_its_head_says(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    sevens.write(tmp_path / "world", seed=0, num_train=1, num_test=100)
    tree = load(
        find_config("phases/label"),
        [f"output_dir={tmp_path}", f"responses={tmp_path}/world/test.jsonl"],
    )
    file = run_data_phase(build(DATA_PHASES["label"][0], tree), command="again")
    figures = json.loads(file.with_name("label.json").read_text())
    agreement = figures["agreement"]["no annotator"]
    assert agreement["same_order"] == agreement["alpha"] == 1.0 and agreement["num_prompts"] == 100
    assert figures["first_is_preferred"] == pytest.approx(0.6)


SMALL = {
    "data": ["args.num_test=8", "args.num_train=24"],
    "labels": ["sample.data.num_prompts=8", "sample.rollout.num_prompts=4",
               "sample.rollout.max_prompt_tokens=96", "sample.rollout.max_tokens=8",
               "sample.truncated=keep", "judge.model.param_dtype=float32"],
    "reward": ["data.num_prompts=4", "data.micro_batches=1", "loop.steps=2", "data.row_len=256",
               "optimizer.warmup_steps=0"],
    "rl": [], "direct": [], "online_dpo": [],
}  # fmt: skip
RL = [
    "rollout.num_prompts=4", "rollout.group_size=2", "data.micro_batches=1", "loop.steps=2",
    "rollout.max_prompt_tokens=96", "rollout.max_tokens=8", "optimizer.warmup_steps=0",
    "evaluation.num_problems=4",
]  # fmt: skip


def run(folder: Path, name: str, *overrides: str, **environment: str) -> str:
    """Runs a recipe as a user does, on one device: of eight, two cores would be slow."""
    small = []
    for stage in recipe(name).stages:
        values = SMALL[stage] or RL
        small += [f"stages.{stage}.{value}" for value in values]
    done = subprocess.run(
        [sys.executable, "-m", "alignjax", "run", f"recipes/{name}", *small, *overrides],
        env=os.environ | {"XLA_FLAGS": xla_flags(), "PYTHONPATH": os.pathsep.join(sys.path)}
        | environment,
        cwd=folder, timeout=900, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_with_a_judge_of_our_own(tmp_path: Path) -> None:
    """On prompts as hh-rlhf has them, with tiny random models: mechanics, not quality."""
    model = write_model(tmp_path / "model", "qwen2", context=2048)
    overrides = [
        f"vars.pairs={write_pairs(tmp_path / 'pairs.jsonl')}", f"vars.model={model}",
        f"vars.judge={model}",
    ]  # fmt: skip
    run(tmp_path, "rlaif_qwen3_1_7b", *overrides)
    folder = tmp_path / "runs" / "rlaif_qwen3_1_7b"
    figures = json.loads((folder / "labels" / "label.json").read_text())
    assert figures["num_records"] > 2 and 0 <= figures["first_is_preferred"] <= 1
    assert figures["annotator"] == "judge:qwen3_4b" and len(figures["templates"]) == 2
    assert read_metrics(folder / "rl")[-1]["step"] == 2
    again = run(tmp_path, "rlaif_qwen3_1_7b", *overrides)
    assert again.count("nothing to do") == 4


@pytest.mark.slow
def test_with_an_endpoint(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "qwen2", context=2048)

    def reply(count, body):
        text = body["messages"][-1]["content"]
        return says("A" if "[response A" in text else str(1 + len(text) % 10))

    with Server(reply) as server:
        overrides = [
            f"vars.pairs={write_pairs(tmp_path / 'pairs.jsonl')}", f"vars.model={model}",
            f"vars.url={server.url}", "vars.judge=m",
        ]  # fmt: skip
        run(tmp_path, "rlaif_http_qwen3_1_7b", *overrides, JUDGE_KEY="sk-secret-of-a-test")
    folder = tmp_path / "runs" / "rlaif_http_qwen3_1_7b"
    last = read_metrics(folder / "direct")[-1]
    assert last["step"] == 2 and 1 <= last["rewards/score/score/mean"] <= 10
    assert -1 <= last["reward"] <= 1
    last = read_metrics(folder / "online_dpo")[-1]
    # It always prefers what stands first, so that every sample is as good as the other.
    assert last["reward"] == 0.5 and last["rewards/wins/first_place/mean"] == 1.0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if b"sk-secret-of-a-test" in path.read_bytes()]
    assert len(server.asked) == len({body["messages"][-1]["content"] for body in server.asked})


@pytest.mark.slow
def test_on_prompts_of_people(tmp_path: Path, real_data: Path) -> None:
    """Requests of hh-rlhf, answered and judged by a tiny random model: mechanics, not quality."""
    pairs = str(real_data / "hh-rlhf" / "harmless-base-1600.jsonl.gz")
    found = open_preferences(pairs, "hh", faulty="drop")
    prompts = (found[i].prompt for i in range(len(found)))
    short = [p for p in prompts if sum(len(m["content"]) for m in p) < 200]
    plain = [p for p in short if all(m["content"].isascii() for m in p)][:6]
    with (tmp_path / "prompts.jsonl").open("w") as file:
        file.writelines(json.dumps({"messages": p}) + "\n" for p in plain)
    model = str(write_model(tmp_path / "model", "qwen2", context=2048))
    data = {"train": str(tmp_path / "prompts.jsonl"), "text": {"fields": {"messages": "messages"}}}
    rollout = {"num_samples": 3, "num_prompts": 4, "max_prompt_tokens": 320, "max_tokens": 16}
    config = DATA_PHASES["label"][0].model_validate({
        "phase": "label", "name": "labels", "output_dir": str(tmp_path),
        "sample": {"model": {"path": model}, "data": data, "rollout": rollout},
        "judge": {"model": {"path": model}},
    })  # fmt: skip
    file = run_data_phase(config, command="again")
    records = open_preferences(str(file))
    assert [records[i].prompt for i in range(len(records))] == plain
    for i in range(len(records)):
        rates = records[i].fields["win_rates"]
        assert sum(rates) == pytest.approx(len(rates) / 2)
    figures = json.loads(file.with_name("label.json").read_text())
    assert figures["num_questions"] == 6 * 3 and figures["num_failed"] == 0
