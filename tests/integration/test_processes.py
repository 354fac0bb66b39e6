"""Several real processes train as one does, stop together, and go on in another number."""

import json
import shutil
import signal
import time

import pytest

from alignjax.cli.main import TERMINATED
from alignjax.core.config import dump
from alignjax.recipes import chains
from tests.integration.launched import Run, assert_same, metrics_of

RANKINGS = [
    {"prompt": f"{i}+{j}=", "responses": [f"{i + j}", f"{i + j + 1}"], "ranks": [1, 2]}
    for i in range(1, 7)
    for j in range(1, 7)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    sizes = {"num_questions": 200, "num_drills": 100, "num_train": 8, "num_test": 4}
    chains.write(folder / "world", seed=0, **sizes)
    (folder / "rankings.jsonl").write_text("\n".join(map(json.dumps, RANKINGS)))
    model = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "max_position_embeddings": 128}
    common = {
        "tokenizer": "world/tokenizer",
        "model": {"init": model},
        "mesh": {"data": 2, "fsdp": 2},
        "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
        "loop": {"steps": 6, "checkpoint_every": 4, "tensorboard": False},
    }
    texts = {"train": "world/corpus.jsonl", "eval": "world/corpus.jsonl",
             "text": {"fields": {"completion": "text"}}, "row_len": 128, "rows": 8}  # fmt: skip
    ranked = {"train": "rankings.jsonl", "eval": "rankings.jsonl", "row_len": 64, "num_prompts": 8}
    (folder / "lengths.py").write_text("def score(completion):\n    return len(completion) / 10\n")
    fields = {"prompt": "prompt", "reference": "reference"}
    rl = {
        "data": {"train": "world/train.jsonl", "eval": "world/test.jsonl",
                 "text": {"fields": fields}},
        "rewards": {"functions": {"length": {"function": "lengths.py:score"}}},
        "evaluation": {"num_problems": 4},
    }  # fmt: skip
    rollout = {"num_prompts": 8, "max_prompt_tokens": 20, "max_tokens": 16}
    phases = {
        "sft": {"data": texts},
        "reward": {"data": ranked},
        "preference": {"data": ranked, "losses": {"dpo": {}}, "cache_dir": "cache"},
        "grpo": {**rl, "rollout": rollout | {"group_size": 4}, "algorithm": {"kl_coef": 0.05}},
        "ppo": {**rl, "rollout": rollout},
    }
    for phase, values in phases.items():
        tree = {"phase": phase, "name": f"{phase}_1", **common, **values}
        (folder / f"{phase}.yaml").write_text(dump(tree))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["sft", "reward", "preference", "grpo", "ppo"])
@pytest.mark.parametrize(("many", "data"), [(2, 2), (4, 4)])
def test_processes_of_two_devices_train_as_one_of_all(folder, phase, many, data):
    runs = [f"{phase}_{number}_of_{many}" for number in (1, many)]
    for name, number in zip(runs, (1, many), strict=True):
        options = f"name={name}", f"mesh.data={data}"
        run = Run(folder, number, phase, *options, num_devices=2 * many)
        assert run.wait() == [0] * number, run.text()
    assert_same(*(metrics_of(folder, name) for name in runs[::-1]))
    weights = {(folder / f"runs/{name}/model/model.safetensors").stat().st_size for name in runs}
    assert len(weights) == 1


@pytest.mark.slow
def test_an_error_in_one_of_them_ends_all(folder):
    """The first cannot write its metrics, while the other waits for it to save a step."""
    (folder / "runs/stuck/metrics.jsonl").mkdir(parents=True)
    run = Run(folder, 2, "sft", "name=stuck")
    until = time.monotonic() + 400
    while "metrics.jsonl" not in run.logs[0].read_text():
        assert time.monotonic() < until, run.text()
        time.sleep(0.1)
    codes = run.wait(60)
    assert codes[0] == 1 and codes[1] != 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_they_stop_together_and_go_on_in_another_number(folder):
    """SIGTERM to one of two; then four, one of which is killed; then one, and two, to the end."""
    steps = "loop.steps=40"
    whole = Run(folder, 1, "sft", "name=whole", steps)
    assert whole.wait() == [0], whole.text()
    metrics = folder / "runs/parts/metrics.jsonl"

    run = Run(folder, 2, "sft", "name=parts", steps)
    run.wait_for_step(metrics, 6)
    run.processes[1].send_signal(signal.SIGTERM)
    codes = run.wait()
    assert codes == [TERMINATED, TERMINATED], run.text()
    assert "saved step" in run.logs[0].read_text()
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert (folder / f"runs/parts/checkpoints/{last}").is_dir()

    run = Run(folder, 4, "sft", "name=parts", steps)
    run.wait_for_step(metrics, last + 6)
    run.processes[2].kill()
    killed = time.monotonic()
    codes = run.wait(60)
    assert time.monotonic() - killed < 60 and all(codes), codes
    assert f"resumed from step {last}" in run.logs[0].read_text()

    parts, saved_by_four = folder / "runs/parts", folder / "saved_by_four"
    shutil.copytree(parts, saved_by_four)
    for number in (1, 2):
        shutil.rmtree(parts)
        shutil.copytree(saved_by_four, parts)
        run = Run(folder, number, "sft", "name=parts", steps)
        assert run.wait() == [0] * number, run.text()
        assert "resumed from step" in run.logs[0].read_text()
        assert_same(metrics_of(folder, "parts"), metrics_of(folder, "whole"))
