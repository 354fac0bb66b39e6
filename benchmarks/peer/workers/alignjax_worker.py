"""The tasks of `benchmarks/peers.py` in this library: its phases as `alignjax run` drives them.

A run is one iteration of `train.loop`: collect, the updates, and their metrics on the host.
"""

import json
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import protocol

from alignjax.core.allocator import restart_with_huge_pages
from alignjax.core.config import build, loads
from alignjax.core.keys import named_key
from alignjax.core.types import Sampling
from alignjax.generate import make_generate
from alignjax.models import load
from alignjax.phases.registry import PHASES
from alignjax.sharding import MeshConfig, make_mesh

Spec = dict[str, Any]
LEARNING_RATE = 1e-6


def phase_of(spec: Spec, name: str, settings: dict[str, Any]) -> Any:
    """A train phase with the settings of the task, and those of the variant over them."""
    base = {
        "phase": name, "name": name, "output_dir": tempfile.mkdtemp(prefix="peers"),
        "model": {"path": spec["model"], "compute_dtype": spec["dtype"]},
        "optimizer": {"learning_rate": LEARNING_RATE},
        "loop": {"steps": 1000},
    }  # fmt: skip
    schema, phase = PHASES[name]
    # The way of a config file, in which JSON is YAML.
    overrides = [f"{key}={json.dumps(value)}" for key, value in spec["options"].items()]
    config = build(schema, loads(json.dumps(base | settings), overrides))
    return phase(config, make_mesh(config.mesh))


def serve_phase(
    spec: Spec,
    gate: protocol.Gate,
    phase: Any,
    count: Callable[[Any], int],
    before: Callable[[Any, Any], None] = lambda state, batch: None,
) -> None:
    """Serves iterations.

    Args:
      count: what was collected -> tokens to report.
      before: more that counts, with the state and a batch, before each update.
    """
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()

    def run() -> dict[str, Any]:
        nonlocal state
        state, collected = phase.collect(state, records)
        updates = []
        for batch in collected.batches:
            before(state, batch)
            state, metrics = phase.step(state, batch)
            updates.append(metrics)
        state = state._replace(step=state.step + 1)
        host = jax.device_get(updates)
        jax.block_until_ready(state.params)
        return {"tokens": count(collected), "loss": float(np.mean([m["loss"] for m in host]))}

    gate.serve(run)


def sft(spec: Spec, gate: protocol.Gate) -> None:
    fields = {"completion": "text"}
    if spec["task"] == "sft_ragged":
        fields = {"prompt": "prompt", "completion": "completion"}
    data = {
        "train": spec["data"], "text": {"fields": fields},
        "row_len": spec["dims"]["row_len"], "rows": spec["dims"]["rows"],
    }  # fmt: skip
    phase = phase_of(spec, "sft", {"data": data})
    serve_phase(spec, gate, phase, lambda collected: collected.num_tokens)


def dpo(spec: Spec, gate: protocol.Gate) -> None:
    """The phase reads the log-probs of the reference from a file that it writes once. Where others
    compute them in each step, they are computed in each step here, too."""
    dims = spec["dims"]
    # Each branch repeats the last token of the prompt.
    pair = dims["prompt"] + 2 * dims["completion"] + 1
    settings = {
        "losses": {"dpo": {"beta": 0.1}},
        "cache_dir": tempfile.mkdtemp(prefix="peers"),
        "data": {"train": spec["data"], "row_len": -(-pair // 8) * 8, "num_prompts": dims["pairs"]},
    }
    phase = phase_of(spec, "preference", settings)
    before: Callable[[Any, Any], None] = lambda state, batch: None  # noqa: E731
    if spec["options_of_worker"].get("reference_in_step"):
        learner = phase._learner  # The one thing here that a user does not reach.
        scorer = learner.reference(None)[0]
        mesh = make_mesh(MeshConfig())
        weights = load(spec["model"], mesh=mesh, compute_dtype=spec["dtype"])[1]

        def before(state: Any, batch: Any) -> None:
            rows = {key: value for key, value in batch.items() if key != "ref_logps"}
            jax.block_until_ready(learner.reference_logps(scorer, weights, rows))

    def count(collected: Any) -> int:
        # A prompt counts twice, as where it is computed twice.
        targets = sum(int(batch["mask"].sum()) for batch in collected.batches)
        return targets + 2 * dims["pairs"] * dims["prompt"]

    serve_phase(spec, gate, phase, count, before)


def rl(spec: Spec, gate: protocol.Gate, name: str, algorithm: dict[str, Any]) -> None:
    dims = spec["dims"]
    settings = {
        "data": {"train": spec["data"], "text": {"fields": {"prompt": "prompt"}}},
        "rollout": {
            "num_prompts": dims["prompts"], "group_size": dims.get("group", 1),
            "max_prompt_tokens": dims["prompt"], "max_tokens": dims["completion"],
        },
        "algorithm": algorithm,
        "rewards": {"functions": {"some": {"function": f"{protocol.__file__}:reward"}}},
    }  # fmt: skip
    phase = phase_of(spec, name, settings)

    def count(collected: Any) -> int:
        mean = collected.metrics["completions/mean_length"]
        return round(mean * dims["prompts"] * dims.get("group", 1))

    serve_phase(spec, gate, phase, count)


def generate(spec: Spec, gate: protocol.Gate) -> None:
    model, params = load(spec["model"], compute_dtype=spec["dtype"])
    engine = make_generate(model, **spec["options_of_worker"])
    prompts = prompt_ids(spec)
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    sampling = Sampling(max_tokens=spec["dims"]["completion"], stop_tokens=(1,))
    number = 0

    def run() -> dict[str, Any]:
        nonlocal number
        number += 1
        key = named_key(jax.random.PRNGKey(0), "rollout", number)
        out = engine(params, prompts, lengths, key, sampling)
        return {"tokens": int(out.lengths.sum())}

    gate.serve(run)


def prompt_ids(spec: Spec) -> np.ndarray:
    """[N, P] int32."""
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    rows = [[int(w[1:]) for w in json.loads(line)["prompt"].split()] for line in lines]
    return np.array(rows, np.int32)


def logits(spec: Spec, gate: protocol.Gate) -> None:
    """Writes the logits [B, P, V] of the prompts to the file that the spec names."""
    model, params = load(spec["model"], compute_dtype=spec["dtype"])
    ids = jnp.asarray(prompt_ids(spec))
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    hidden, _ = jax.jit(model.apply)(params, ids, jnp.ones_like(ids), positions)
    np.save(spec["out"], np.asarray(hidden @ model.unembedding(params), np.float32))
    names = ("jax", "jaxlib", "flax", "optax", "numpy")
    gate.say(versions={name: version(name) for name in names})
    gate.next()


def limits(spec: Spec, gate: protocol.Gate) -> None:
    """What the machine can do, as JAX reaches it: FLOP/s of square matrix products, bytes/s of
    reading memory."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        a = jnp.ones((2048, 2048), dtype)
        found[f"{dtype}_flops"] = 2 * 2048**3 / best(jax.jit(lambda x: x @ x), a)
    big = jnp.ones(64 * 2**20, jnp.float32)
    found["bytes"] = big.nbytes / best(jax.jit(jnp.sum), big)
    gate.say(limits=found)
    gate.next()


def best(function: Callable[[Any], Any], argument: Any) -> float:
    """Seconds of the quickest of several calls."""
    jax.block_until_ready(function(argument))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(argument))
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def grpo(spec: Spec, gate: protocol.Gate) -> None:
    rl(spec, gate, "grpo", {"preset": "grpo", "kl_coef": 0.0})


def ppo(spec: Spec, gate: protocol.Gate) -> None:
    rl(spec, gate, "ppo", {"num_epochs": 1})


if __name__ == "__main__":
    restart_with_huge_pages()  # As the command line does.
    protocol.main(
        {"sft": sft, "sft_ragged": sft, "dpo": dpo, "generate": generate, "grpo": grpo, "ppo": ppo,
         "logits": logits, "limits": limits}
    )  # fmt: skip
