"""What is planned is what runs: programs are given the shapes, types and places that phases give
them, and memory adds up to what the compiler says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.core.types import LENGTH, Completions, Score
from alignjax.generate import decode
from alignjax.phases import rollouts, scoring
from alignjax.phases.ppo_loss import Experience
from alignjax.phases.registry import PHASES
from alignjax.plan import memory
from alignjax.plan.phases import PLANNED
from alignjax.plan.programs import FROZEN, OPTIMIZER, PARAMS, REFERENCE, Program
from alignjax.plan.shapes import Shapes
from alignjax.train.step import Step
from tests.plan.small import config_of


class Caught(Exception):  # noqa: N818
    """What an update was to be given."""


@pytest.fixture
def stopped(monkeypatch):
    """Nothing is compiled: an update raises what it is given, and functions that phases ask before
    it note their arguments, by name. A sampler that samples token 5 stands for the engine."""
    seen = {}

    def update(self, state, batch):
        raise Caught(state, batch)

    def generate(params, prompts, lengths, key, sampling, **options):
        total = len(prompts) * sampling.num_samples
        shape = total, sampling.max_tokens
        return Completions(
            np.full(shape, 5, np.int32), np.full(total, sampling.max_tokens, np.int32),
            np.zeros(shape, np.float32), np.full(total, LENGTH, np.int8),
        )  # fmt: skip

    monkeypatch.setattr(Step, "__call__", update)
    monkeypatch.setattr(rollouts, "make_generate", lambda *args, **options: generate)
    monkeypatch.setattr(
        scoring.RewardModel,
        "__call__",
        lambda self, samples: [Score(i / 3) for i in range(len(samples))],
    )

    def noted(name, result):
        def function(*args):
            # Copies, for a batch gets more arrays later.
            seen[name] = [dict(arg) if isinstance(arg, dict) else arg for arg in args]
            return result(*args)

        return function

    return seen, noted


def update_of(phase, seen, noted):
    """What the first update of a phase is given."""
    logps = lambda params, batch: batch["old_logps"]  # noqa: E731
    if hasattr(phase, "_ref_logps"):
        phase._ref_logps = noted("reference scoring", logps)
        phase._logps = noted("old log-probs", logps)
    if hasattr(phase, "_teacher_logps"):
        phase._teacher_logps = noted("teacher scoring", logps)
    if hasattr(phase, "_values"):
        phase._values = noted("critic scoring", logps)
        phase._experience = noted("advantages", lambda kl, *rest: Experience(kl, kl, kl))
    if hasattr(phase, "_learner"):
        phase._learner.reference_logps = noted(
            "reference scoring", lambda scorer, params, batch: jnp.zeros(batch["ranks"].shape)
        )
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    state, collected = phase.collect(state, records)
    with pytest.raises(Caught) as caught:
        for batch in collected.batches:
            phase.step(state, batch)
    return caught.value.args


def assert_given(program, args, where):
    """That a program was lowered for such arguments."""
    infos = program.lower().args_info[0]
    planned, given = jax.tree.leaves(infos), jax.tree.leaves(args)
    shapes = [(x.shape, x.dtype) for x in planned]
    assert shapes == [(x.shape, x.dtype) for x in given], where


@pytest.mark.parametrize(
    ("phase", "changes"),
    [
        pytest.param("sft", {}, marks=pytest.mark.slow),
        ("sft", {"model__lora": {"rank": 2, "dropout": 0.1}}),
        ("reward", {}),
        pytest.param("preference", {}, marks=pytest.mark.slow),
        ("preference", {"losses": {"kto": {}}}),
        ("grpo", {}),
        ("grpo", {"algorithm": {"kl_coef": 0.1, "old_logps": "trainer", "num_minibatches": 2}}),
        pytest.param("grpo", {"model__lora": {"rank": 2}}, marks=pytest.mark.slow),
        ("ppo", {}),
        ("distill", {}),
        ("online_distill", {"divergence": {"kind": "sampled_reverse_kl"}}),
        pytest.param("online_distill", {}, marks=pytest.mark.slow),
        ("online_preference", {"losses": {"kto": {}}}),
        ("ppo", {"critic": {"trunk": "shared"}, "algorithm": {"old_logps": "trainer"}}),
    ],
)
def test_updates_are_given_what_is_planned(world, mesh, stopped, phase, changes):
    seen, noted = stopped
    config = config_of(world, phase, **changes)
    real = PHASES[phase][1](config, mesh)
    if hasattr(real, "_learner"):
        real._learner.kl = noted("mismatch KL", lambda params, batch: (losses_zero(), {}))
    state, batch = update_of(real, seen, noted)
    programs = {p.name: p for p in PLANNED[phase](config, mesh, Shapes()).all}
    policy = getattr(real, "_policy", None) or real._reward
    frozen = policy.frozen
    if phase == "distill":
        frozen = real._teacher.frozen
    elif phase == "online_distill" and config.divergence.kind != "sampled_reverse_kl":
        frozen = real._both
    elif phase == "ppo" and frozen is not None:
        frozen = {"policy": frozen}
    assert_given(programs["train step"], (state, frozen, batch), "train step")
    for name, args in seen.items():
        kept = args[1:] if hasattr(real, "_learner") and name == "reference scoring" else args
        assert_given(programs[name], kept, name)
    # Parameters and moments, and where they lie.
    for role, tree in ((PARAMS, state.params), (OPTIMIZER, state.opt_state)):
        resident = programs["train step"].resident
        if phase == "ppo" and role == PARAMS:
            tree = tree["policy"]
        planned = jax.tree.leaves(resident[role])
        for plan, array in zip(planned, jax.tree.leaves(tree), strict=True):
            assert plan.sharding.is_equivalent_to(array.sharding, array.ndim)


def losses_zero():
    from alignjax.core.types import Weighted

    return Weighted(jnp.zeros(()), jnp.ones(()))


@pytest.mark.parametrize(("phase", "has_own"), [("grpo", True), ("ppo", True)])
def test_frozen_models_lie_beside(world, mesh, phase, has_own):
    (step,) = (
        p for p in PLANNED[phase](config_of(world, phase), mesh, Shapes()).all
        if p.name == "train step"
    )  # fmt: skip
    params = memory.tree_bytes(step.resident[PARAMS])
    assert memory.tree_bytes(step.resident[REFERENCE]) == params
    assert step.resident[FROZEN] is None
    assert memory.tree_bytes(step.resident["reward learned"]) > 0
    lora = config_of(world, phase, model__lora={"rank": 2})
    adapted = PLANNED[phase](lora, mesh, Shapes()).all[-1]
    assert memory.tree_bytes(adapted.resident[REFERENCE]) == 0
    assert memory.tree_bytes(adapted.resident[FROZEN]) == params


def test_the_engine_is_given_what_is_planned(world, mesh, monkeypatch):
    """Of a call in which all rows become as long as they may."""
    config = config_of(world, "grpo")
    seen = {}

    def read_into(*args, **static):
        seen["prefill"] = args
        return args[1]

    def admit(*args, **static):
        seen["first tokens"] = args
        rows, entry = args[2], args[3]
        live = jnp.asarray(entry.is_new)
        rows = rows._replace(
            num_tokens=live.astype(jnp.int32), is_done=~live,
            max_tokens=jnp.asarray(entry.max_tokens), seats=entry.seats,
        )  # fmt: skip
        return rows, rows.num_tokens, rows.num_tokens.astype(jnp.float32)

    calls = []

    def advance(*args, **static):
        calls.append(args)
        rows, number = args[2], int(args[5])
        num_tokens = jnp.minimum(rows.num_tokens + number, rows.max_tokens)
        rows = rows._replace(num_tokens=num_tokens, is_done=num_tokens >= rows.max_tokens)
        tokens = jnp.zeros((len(num_tokens), decode.STEPS), jnp.int32)
        return rows, tokens, tokens.astype(jnp.float32)

    grown = []

    def grow(rows, **static):
        grown.append((rows,))
        return original(rows, **static)

    original = decode.grow
    for name, fake in (("read_into", read_into), ("admit", admit), ("advance", advance),
                       ("grow", grow)):  # fmt: skip
        monkeypatch.setattr(decode, name, fake)
    programs = {p.name: p for p in PLANNED["grpo"](config, mesh, Shapes()).all}
    phase = PHASES["grpo"][1](config, mesh)
    monkeypatch.setattr(
        scoring.RewardModel, "__call__", lambda self, samples: [Score(0.0)] * len(samples)
    )
    params = phase.init(jax.random.PRNGKey(0)).params
    phase._rollout(params, next(phase.records()), jax.random.key(0), phase._sampler.sampling)
    monkeypatch.undo()
    seen |= {"the same, short cache": calls[0], f"decode {decode.STEPS} tokens": calls[-1],
             "grow the cache": grown[-1]}  # fmt: skip
    assert len(calls) == 2 and len(grown) == 1
    for name, args in seen.items():
        assert_given(programs[name], args, name)
    times = {name: programs[name].times for name in seen}
    assert times["prefill"] == times["grow the cache"] == 1
    # Up to 96 tokens: 64 steps at a capacity of 64, 32 at one of 96.
    assert times[f"decode {decode.STEPS} tokens"] == pytest.approx(70 / 64 / 3)
    assert times["the same, short cache"] == pytest.approx(70 / 64 * 2 / 3)


def test_memory_adds_up_to_what_the_compiler_says(world, mesh):
    config = config_of(world, "sft")
    (step,) = PLANNED["sft"](config, mesh, Shapes()).all
    lowered = step.lower()
    compiled = lowered.compile()
    found, stats = memory.of_program(step, lowered, compiled), compiled.memory_analysis()
    assert found.argument_bytes == found.compiler_argument_bytes == stats.argument_size_in_bytes
    assert found.total == (
        stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes
        - stats.alias_size_in_bytes + stats.generated_code_size_in_bytes
    )  # fmt: skip
    # By hand: what fsdp and tensor divide lies on a quarter or a half of the devices.
    sizes = [
        x.size * 4 // len({str(i) for i in x.sharding.devices_indices_map(x.shape).values()})
        for x in jax.tree.leaves(step.resident[PARAMS])
        for x in [_Sized(x)]
    ]
    assert found.parts[PARAMS] == sum(sizes)
    assert 2 * found.parts[PARAMS] <= found.parts[OPTIMIZER] <= 2 * found.parts[PARAMS] + 64
    assert found.parts[memory.GRADIENTS] == found.parts[PARAMS]
    tokens = 2 * 8 * 64 // 4
    assert found.parts["batch"] == tokens * (4 + 4 + 4 + 1)  # ids, positions, segments, mask


class _Sized:
    def __init__(self, x):
        self.shape, self.sharding = x.shape, x.sharding
        self.size = int(np.prod(x.shape))


def test_what_lies_beside_is_counted_once(mesh):
    """A program that reads the reference, while parameters lie beside it."""

    def array(size, *spec):
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        return jax.ShapeDtypeStruct((size,), jnp.float32, sharding=where)

    given = {"read": array(64, "fsdp"), "not read": array(32)}
    function = jax.jit(lambda reference, batch: reference["read"].sum() + batch)
    program = Program(
        "scoring",
        lambda: function.lower(given, array(8)),
        (REFERENCE, "batch"),
        {REFERENCE: given, PARAMS: array(1024, ("fsdp", "tensor"))},
    )
    lowered = program.lower()
    found = memory.of_program(program, lowered, lowered.compile())
    assert found.parts[REFERENCE] == 64 * 4 // 2 + 32 * 4
    assert found.parts[PARAMS] == 1024 * 4 // 4
    assert found.parts["batch"] == 8 * 4
    assert found.argument_bytes == 64 * 4 // 2 + 8 * 4 == found.compiler_argument_bytes


def test_codes_in_the_sampler(world, mesh):
    """The kernels and the cache as int8: another tree of parameters, beside those that train."""
    rollout = {"num_prompts": 8, "max_prompt_tokens": 20, "max_tokens": 40}
    rollout |= {"int8_kv": True, "int8_weights": True}
    programs = PLANNED["grpo"](config_of(world, "grpo", rollout=rollout), mesh, Shapes()).all
    found = {program.name: program for program in programs}
    plain = jax.tree.leaves(found["quantize"].lower().args_info[0])
    params = jax.tree.leaves(found["train step"].resident[PARAMS])
    assert [x.shape for x in plain] == [x.shape for x in params]
    coded = found[f"decode {decode.STEPS} tokens"]
    kinds = {x.dtype for x in jax.tree.leaves(coded.lower().args_info[0][0])}
    assert jnp.dtype(jnp.int8) in kinds
    assert {PARAMS, "coded weights"} < coded.resident.keys()
    assert "coded weights" not in found["train step"].resident


def test_weights_that_lie_otherwise_while_they_sample(world, mesh):
    rollout = {"num_prompts": 8, "max_prompt_tokens": 20, "max_tokens": 40,
               "mesh": {"data": 2, "tensor": 4}}  # fmt: skip
    programs = PLANNED["grpo"](config_of(world, "grpo", rollout=rollout), mesh, Shapes()).all
    found = {program.name: program for program in programs}
    moved = found["prefill"].resident["moved weights"]
    kernel = moved["layers"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 8)  # tensor 4, no fsdp
    assert "moved weights" not in found["train step"].resident
    assert "moved weights" not in found["reward learned"].resident
    infos = found["prefill"].lower().args_info[0][0]
    assert [x.shape for x in jax.tree.leaves(infos)] == [x.shape for x in jax.tree.leaves(moved)]
