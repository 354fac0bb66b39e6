"""Made-up preferences, and a small phase on them, for the tests of the phases on preferences."""

import json
import math

import jax
import numpy as np

from alignjax.phases.preference import Preference
from alignjax.phases.preference_config import PreferenceConfig
from alignjax.recipes import chains
from alignjax.sharding import MeshConfig, make_mesh

MODEL = {
    "hidden_size": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8,
    "intermediate_size": 32, "rope_theta": 100.0, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip


def write_world(folder):
    """A tokenizer of 23 tokens, and pairs: ragged, of a rule that can be learned.

    The chosen one has only digits below 5, the rejected one only digits from 5 on.
    """
    chains.write(folder, seed=0, num_questions=60, num_drills=20, num_train=8, num_test=8)
    rng = np.random.default_rng(0)

    def text(digits):
        return "".join(rng.choice(list(digits), rng.integers(1, 6)))

    for name, num in (("pairs", 40), ("held_out", 32), ("more", 160)):
        with (folder / f"{name}.jsonl").open("w") as file:
            for i in range(num):
                prompt = text("0123456789") + "+-*"[i % 3] + text("0123456789")
                record = {"prompt": prompt, "chosen": text("01234"), "rejected": text("56789")}
                file.write(json.dumps({**record, "sure": 0.5 + (i % 5) / 10}) + "\n")
    return folder


def config_of(folder, losses=None, data=None, **changes):
    return PreferenceConfig.model_validate(
        {
            "phase": "preference", "name": "x", "model": {"init": MODEL},
            "tokenizer": str(folder / "tokenizer"),
            "losses": losses or {"dpo": {}},
            "data": {
                "train": str(folder / "pairs.jsonl"), "eval": str(folder / "held_out.jsonl"),
                "row_len": 48, "num_prompts": 8, **(data or {}),
            },
            "cache_dir": str(folder / "cache"),
            "optimizer": {"learning_rate": 1e-3},
            "loop": {"steps": 20},
            **changes,
        }
    )  # fmt: skip


def make(folder, losses=None, data=None, sizes=(1, 1, 1), **changes):
    mesh = make_mesh(
        MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
        jax.devices()[: math.prod(sizes)],
    )
    return Preference(config_of(folder, losses, data, **changes), mesh)


def run(phase, num_steps, state=None, records=None):
    """Final state, and the metrics of each update."""
    if state is None:
        state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    seen = []
    for _ in range(num_steps):
        state, collected = phase.collect(state, records)
        for batch in collected.batches:
            state, metrics = phase.step(state, batch)
            seen.append({k: float(v) for k, v in jax.device_get(metrics).items()})
        state = state._replace(step=state.step + 1)
    return state, seen


def assert_same(found, expected, rtol=1e-4, atol=2e-5):
    """Two results of `run`; at first all rewards are 0, so that rounding says which is larger."""
    for step, (a, b) in enumerate(zip(found[1], expected[1], strict=True)):
        assert a.keys() == b.keys()
        for name in a.keys() - ({"rewards/accuracies"} if step == 0 else set()):
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)
    params = found[0].params, expected[0].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), *params)
