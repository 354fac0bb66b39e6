"""With which settings each library does each task of `benchmarks/peers.py`.

"default" is what a user gets who sets nothing but the sizes of the task and float32; "best" what
the library's own documentation advises for speed where memory suffices, as far as it exists on the
device. Where a library cannot do a task, the reason stands here, and in the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from peer.tasks import Task

LIBRARIES = ("alignjax", "trl", "tunix", "llamacpp")
"""The last does not train, and is a peer of the generation tasks alone."""
DTYPES = ("float32", "bfloat16")
"""Of the matrix products of ours; peers have float32."""


@dataclass(frozen=True, eq=False)
class Variant:
    """One library with one choice of settings.

    Attributes:
      options: of the library's own config, by their names there.
      worker: of the worker; see its module.
      missing: why there is no such thing, instead of settings.
    """

    library: str
    name: str
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    worker: Mapping[str, Any] = field(default_factory=dict)
    missing: str = ""


def ours(
    options: Mapping[str, Any] | None = None, worker: Mapping[str, Any] | None = None
) -> list[Variant]:
    return [Variant("alignjax", dtype, dtype, options or {}, worker or {}) for dtype in DTYPES]


def variants(task: Task) -> list[Variant]:
    """All variants of a task, ours first."""
    return (_dpo_reference_known if task.knows_reference else _BY_KIND[task.kind])(task)


KEEP = {"gradient_checkpointing": False}
"""TRL recomputes activations by default, to save memory."""
GUARD = {"cache_margin": 256}
"""What Tunix's examples add to the size of the KV cache."""

FLOAT32 = {
    "type_k": "GGML_TYPE_F32", "type_v": "GGML_TYPE_F32",
    "flash_attn_type": "LLAMA_FLASH_ATTN_TYPE_DISABLED",
}  # fmt: skip
"""By itself llama.cpp keeps keys and values in float16, and its flash attention, which it takes by
itself too, rounds them there whatever the cache holds. That was the quickest of both types with and
without it, as were all prompts together beside fewer."""


def _sft(task: Task) -> list[Variant]:
    return [
        *ours(),
        Variant("trl", "default"),
        Variant("trl", "best", options=KEEP),
        Variant("tunix", "default"),
    ]


def _sft_ragged(task: Task) -> list[Variant]:
    rows, row_len = max(1, task.dims["rows"] // 4), 4 * task.dims["row_len"]
    long_rows = {"per_device_train_batch_size": rows, "max_length": row_len}
    packing = KEEP | {"packing": True}
    return [
        # As many tokens of a step in longer rows, of which less stays empty.
        *ours({"data.rows": rows, "data.row_len": row_len}),
        Variant("trl", "default"),
        Variant("trl", "best", options=packing),
        Variant("trl", "best, long rows", options=packing | long_rows),
        # It says that packing is not there for SFT, and rows of one length spare it compilations.
        Variant("tunix", "default"),
    ]


def _dpo(task: Task) -> list[Variant]:
    return [
        *ours(worker={"reference_in_step": True}),
        Variant("trl", "default"),
        Variant("trl", "best", options=KEEP),
        Variant("tunix", "default"),
    ]


def _dpo_reference_known(task: Task) -> list[Variant]:
    known = {"precompute_ref_log_probs": True}
    return [
        *ours(),
        Variant("trl", "default", options=known),
        Variant("trl", "best", options=KEEP | known),
        Variant("tunix", "default", missing="always computes the reference in the step"),
    ]


def _generate(task: Task) -> list[Variant]:
    together = {"slots": task.dims["prompts"]}
    return [
        *ours(),
        Variant("trl", "default"),
        Variant("trl", "continuous batching", worker={"continuous": True}),
        Variant("tunix", "default", worker=GUARD),
        Variant("tunix", "best"),
        # One prompt after the other, as its Python bindings do it.
        Variant("llamacpp", "default", worker={"slots": 1}),
        Variant("llamacpp", "best", worker=together),
        Variant("llamacpp", "best, float32", options=FLOAT32, worker=together),
    ]


def _grpo(task: Task) -> list[Variant]:
    prompts = task.dims["prompts"]
    one_prompt = {"mini_batch_size": prompts, "train_micro_batch_size": 1}
    together = {"rollout_micro_batch_size": prompts, "compute_logps_micro_batch_size": prompts}
    return [
        *ours({"data.micro_batches": max(1, prompts)}),
        Variant("trl", "default"),
        Variant("trl", "best", options=KEEP | {"per_device_train_batch_size": 16}),
        Variant("tunix", "default", worker=GUARD),
        Variant("tunix", "best", options=one_prompt | together),
    ]


def _ppo(task: Task) -> list[Variant]:
    prompts = task.dims["prompts"]
    few = {"mini_batch_size": prompts, "train_micro_batch_size": max(1, prompts // 8)}
    together = {"rollout_micro_batch_size": prompts, "compute_logps_micro_batch_size": prompts}
    return [
        *ours({"data.micro_batches": min(8, prompts)}),
        Variant("trl", "default", missing="has no PPO any more"),
        Variant("tunix", "default", worker=GUARD),
        Variant("tunix", "best", options=few | together),
    ]


_BY_KIND: dict[str, Callable[[Task], list[Variant]]] = {
    "sft": _sft, "sft_ragged": _sft_ragged, "dpo": _dpo, "generate": _generate, "grpo": _grpo,
    "ppo": _ppo,
}  # fmt: skip
