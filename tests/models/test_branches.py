"""Completions that share their prompt: each has what it would have alone after the prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models import Model, ModelConfig

PROMPT, LENGTHS = 6, (4, 7, 1)
"""Tokens of the prompt and of its completions."""
TOTAL = PROMPT + max(LENGTHS)
GEMMA2 = {"family": "gemma2", "sliding_window": 4, "sliding_layers": (True, False),
          "attention_soft_cap": 3.0}  # fmt: skip
SHAPES = {
    "qwen3": {"family": "qwen3"},
    "windows and soft caps": GEMMA2,
    "window of all layers": {"family": "mistral", "sliding_window": 5},
    "two bases": {"family": "gemma3_text", "sliding_window": 3, "sliding_layers": (True, False),
                  "local_rope_theta": 7.0},
    "experts": {"family": "qwen3_moe", "num_experts": 4, "experts_per_token": 2},
    "learned positions": {"family": "gpt2", "num_kv_heads": 4, "max_position_embeddings": TOTAL},
    "layers without positions": {"family": "smollm3", "rope_layers": (True, False)},
    "norms after": {"family": "olmo2"},
    "angles by length": {
        "family": "llama", "max_position_embeddings": TOTAL - 4,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
    "longrope": {
        "family": "phi3",
        "rope_scaling": {
            "type": "longrope", "short_factor": (1.0, 1.1, 1.5, 2.0),
            "long_factor": (1.0, 3.0, 9.0, 27.0),
            "original_max_position_embeddings": TOTAL - 4,
        },
    },
    "yarn": {
        "family": "qwen2",
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    },
}  # fmt: skip


def make(name, **more):
    shape = {"hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "initializer_range": 0.3}
    model = Model(ModelConfig(vocab_size=19, **(shape | SHAPES[name])), **more)
    return model, model.init(jax.random.key(0))


def texts(seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda n: rng.integers(0, 19, n).tolist()  # noqa: E731
    return draw(PROMPT), [draw(n) for n in LENGTHS]


def shared(prompt, completions, filling=5):
    """One row: the prompt without its last token, then that token and each completion.

    Returns:
      The arguments of `apply`, and for each completion the slots of its tokens and of that before.
    """
    tokens, branches, positions, slots = prompt[:-1], [0] * (PROMPT - 1), [*range(PROMPT - 1)], []
    for k, completion in enumerate(completions, 1):
        part = [prompt[-1], *completion]
        slots.append(np.arange(len(tokens), len(tokens) + len(part)))
        tokens, branches = tokens + part, branches + [k] * len(part)
        positions += range(PROMPT - 1, PROMPT - 1 + len(part))
    segments = [1] * len(tokens) + [0] * filling
    tokens, positions, branches = (x + [0] * filling for x in (tokens, positions, branches))
    arrays = (np.array([x], np.int32) for x in (tokens, segments, positions, branches))
    return dict(zip(("tokens", "segment_ids", "positions", "branches"), arrays, strict=True)), slots


def plain(prompt, completions):
    """A row for each completion, in one call, so that angles by length are those of one length."""
    tokens = np.zeros((len(completions), TOTAL), np.int32)
    segments = np.zeros_like(tokens)
    for row, completion in enumerate(completions):
        tokens[row, : PROMPT + len(completion)] = prompt + completion
        segments[row, : PROMPT + len(completion)] = 1
    positions = np.broadcast_to(np.arange(TOTAL, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "segment_ids": segments, "positions": positions}


def completion_logits(model, params, batch, slots):
    """Logits of each completion's tokens and of the one before, one below the other."""
    logits = model.logits(params, model.apply(params, **batch)[0])
    return jnp.concatenate([logits[row, slot] for row, slot in slots])


CHUNKED = ("qwen3", "windows and soft caps")


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "auto") for name in SHAPES), *((name, "chunked") for name in CHUNKED)],
)
def test_a_shared_prompt_equals_a_prompt_for_each(name, attention):
    """Logits, and the gradient of a function of them by every parameter."""
    model, params = make(name, attention=attention)
    prompt, completions = texts()
    batch, slots = shared(prompt, completions)
    places = [(0, slot) for slot in slots]
    alone = [
        (row, np.arange(PROMPT - 1, PROMPT + len(completion)))
        for row, completion in enumerate(completions)
    ]
    weights = np.random.default_rng(1).normal(size=(sum(LENGTHS) + len(LENGTHS), 19))

    @jax.jit
    def run(params):
        def total(params, *where):
            logits = completion_logits(model, params, *where)
            return jnp.sum(jnp.tanh(logits) * weights), logits

        gradient = jax.grad(total, has_aux=True)
        return gradient(params, batch, places), gradient(params, plain(prompt, completions), alone)

    (found_gradient, found), (expected_gradient, expected) = run(params)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, atol=1e-5)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected_gradient))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * largest),
        found_gradient,
        expected_gradient,
    )


@pytest.mark.parametrize("name", ["qwen3", "windows and soft caps", "experts"])
def test_a_branch_changes_no_other(name):
    """Bit for bit; and it does change itself from the changed token on."""
    model, params = make(name)
    batch, slots = shared(*texts())
    apply = jax.jit(model.apply)
    before = np.asarray(apply(params, **batch)[0][0])
    batch["tokens"][0, slots[1][3]] += 1
    after = np.asarray(apply(params, **batch)[0][0])
    moved = np.flatnonzero((before != after).any(-1))
    np.testing.assert_array_equal(moved, slots[1][3:])


def test_branches_change_what_a_completion_sees():
    """Without them the second would read the first: the test above would notice."""
    model, params = make("qwen3")
    batch, slots = shared(*texts())
    hidden = np.asarray(model.apply(params, **batch)[0])
    del batch["branches"]
    without = np.asarray(model.apply(params, **batch)[0])
    assert np.abs(hidden - without)[0, slots[1][0]].max() > 1e-2
    np.testing.assert_array_equal(hidden[0, slots[0]], without[0, slots[0]])


def test_layers_computed_again_have_the_same_branches():
    model, params = make("qwen3", remat=True)
    batch, _ = shared(*texts())
    gradient = jax.jit(jax.grad(lambda p: jnp.sum(model.apply(p, **batch)[0] ** 2)))(params)
    other, _ = make("qwen3")
    expected = jax.jit(jax.grad(lambda p: jnp.sum(other.apply(p, **batch)[0] ** 2)))(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradient, expected
    )


def test_routing_counts_a_shared_prompt_once():
    model, params = make("experts")
    batch, _ = shared(*texts())
    hidden, sums = jax.jit(model.apply_with_routing)(params, **batch)
    np.testing.assert_allclose(hidden, jax.jit(model.apply)(params, **batch)[0], atol=1e-6)
    assert float(sums.count) == 2 * int((batch["segment_ids"] > 0).sum())


def test_with_a_cache_there_are_no_branches():
    model, params = make("qwen3")
    batch, _ = shared(*texts())
    with pytest.raises(ValueError, match="with a cache there are none"):
        model.apply(params, **batch, cache=model.init_cache(1, 64))
