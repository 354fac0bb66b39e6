"""A teacher, its vocabulary, and texts: what the tests of both distillation phases share."""

import json
import math

import jax
import numpy as np

from alignjax.models import Model, ModelConfig, save
from alignjax.recipes import chains
from alignjax.sharding import MeshConfig, make_mesh
from tests.phases.compiled import compilations

STUDENT = {
    "hidden_size": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "intermediate_size": 32,
    "rope_theta": 100.0, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
NUM_PADDING = 5
"""Entries of the teacher's unembedding beyond the vocabulary."""


def write_world(folder):
    """Prompts, ragged pairs, and a teacher of another family, wider, with padding in its
    vocabulary that is likely."""
    chains.write(folder, seed=0, num_questions=60, num_drills=20, num_train=40, num_test=16)
    for name, to in (("train", "pairs"), ("test", "held_out")):
        lines = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        with (folder / f"{to}.jsonl").open("w") as file:
            for i, line in enumerate(lines):
                completion = line["reference"] * (1 + i % 3)
                print(json.dumps({"prompt": line["prompt"], "completion": completion}), file=file)
    shape = STUDENT | {"family": "qwen3", "hidden_size": 24, "head_dim": 8}
    vocab_size = len(chains.TOKENS) + NUM_PADDING
    teacher = Model(ModelConfig(vocab_size=vocab_size, **shape, tie_embeddings=False))
    save(folder / "teacher", teacher, teacher.init(jax.random.key(9)))
    for file in (folder / "tokenizer").iterdir():
        (folder / "teacher" / file.name).write_bytes(file.read_bytes())
    return folder


def mesh_of(sizes):
    return make_mesh(
        MeshConfig(**dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))),
        jax.devices()[: math.prod(sizes)],
    )


def log_softmax(z):
    """[..., V] float64."""
    z = np.asarray(z, np.float64)
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def divergence(kind, log_t, log_s, beta=0.5):
    """[..., V] x [..., V] -> [...], from the formulas."""

    def kl(a, b):
        return (np.exp(a) * (a - b)).sum(-1)

    log_m = np.log(beta * np.exp(log_t) + (1 - beta) * np.exp(log_s))
    return {
        "forward_kl": lambda: kl(log_t, log_s),
        "reverse_kl": lambda: kl(log_s, log_t),
        "jsd": lambda: beta * kl(log_t, log_m) + (1 - beta) * kl(log_s, log_m),
    }[kind]()


def assert_same(found, expected, rtol=1e-4, atol=2e-5):
    """Two results of `run`."""
    for a, b in zip(found[1], expected[1], strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(a[name], b[name], rtol=rtol, atol=atol, err_msg=name)
    params = found[0].params, expected[0].params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), *params)


def compiled_by_step(phase, num_steps):
    """What each step compiled, with an evaluation after it."""
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    found = []
    for _ in range(num_steps):
        with compilations() as names:
            state, collected = phase.collect(state, records)
            for batch in collected.batches:
                state, _ = phase.step(state, batch)
            state = state._replace(step=state.step + 1)
            phase.evaluate(state)
        found.append(names)
    return found
