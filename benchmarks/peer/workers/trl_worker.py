"""The tasks of `benchmarks/peers.py` in TRL: its trainers, their own loop, one step for each run.

Float32 throughout, so `bf16=False`, which is not its default. `options` of a variant go to the
trainer's config. Sources: the documentation of TRL and of transformers, of the pinned versions.
"""

import json
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import protocol
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

Spec = dict[str, Any]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Steps(TrainerCallback):
    """Waits at the gate after each step: from one log to the next, data and update included."""

    def __init__(self, gate: protocol.Gate, tokens: Any):
        self._gate, self._tokens = gate, tokens

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self._gate.next()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            self._gate.next(tokens=self._tokens(logs), loss=float(logs["loss"]))


def records(spec: Spec) -> list[dict[str, str]]:
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def common(spec: Spec) -> dict[str, Any]:
    """Settings of every trainer; those of the variant come last."""
    return {
        "output_dir": tempfile.mkdtemp(prefix="peers"), "max_steps": 1000, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False,
        "use_cpu": DEVICE == "cpu", "learning_rate": 1e-6, "lr_scheduler_type": "constant",
        "model_init_kwargs": {"dtype": spec["dtype"]}, "dataloader_pin_memory": DEVICE == "cuda",
        **spec["options"],
    }  # fmt: skip


def sft(spec: Spec, gate: protocol.Gate) -> None:
    settings = {
        "per_device_train_batch_size": spec["dims"]["rows"], "max_length": spec["dims"]["row_len"],
        **common(spec),
    }  # fmt: skip
    trainer = SFTTrainer(
        spec["model"], SFTConfig(**settings), train_dataset=Dataset.from_list(records(spec))
    )
    collate, seen = trainer.data_collator, []

    def counting(examples: list[Any]) -> Any:
        # Batches are made before their step: one at a time, without workers.
        seen.append(sum(len(example["input_ids"]) for example in examples))
        return collate(examples)

    trainer.data_collator = counting
    steps = 0

    def tokens(logs: Any) -> int:
        nonlocal steps
        steps += 1
        return seen[steps - 1]

    trainer.add_callback(Steps(gate, tokens))
    trainer.train()


def dpo(spec: Spec, gate: protocol.Gate) -> None:
    dims = spec["dims"]
    settings = {
        "per_device_train_batch_size": dims["pairs"], "beta": 0.1,
        "max_length": dims["prompt"] + dims["completion"], **common(spec),
    }  # fmt: skip
    trainer = DPOTrainer(
        spec["model"], args=DPOConfig(**settings), train_dataset=Dataset.from_list(records(spec))
    )
    before = 0

    def tokens(logs: Any) -> int:
        nonlocal before
        before, found = int(logs["num_tokens"]), int(logs["num_tokens"]) - before
        return found

    trainer.add_callback(Steps(gate, tokens))
    trainer.train()


def grpo(spec: Spec, gate: protocol.Gate) -> None:
    dims = spec["dims"]
    total = dims["prompts"] * dims["group"]
    options = common(spec)
    rows = min(options.pop("per_device_train_batch_size", 8), total)
    settings = {
        "num_generations": dims["group"], "max_completion_length": dims["completion"],
        "per_device_train_batch_size": rows, "gradient_accumulation_steps": total // rows,
        **options,
    }  # fmt: skip

    def reward(completions: list[str], **others: Any) -> list[float]:
        return [protocol.reward(text) for text in completions]

    trainer = GRPOTrainer(
        spec["model"], reward, GRPOConfig(**settings),
        train_dataset=Dataset.from_list(records(spec)),
    )  # fmt: skip
    trainer.add_callback(Steps(gate, lambda logs: round(logs["completions/mean_length"] * total)))
    trainer.train()


def loaded(spec: Spec) -> Any:
    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype)
    return model.to(DEVICE).eval()


def prompt_ids(spec: Spec) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    return tokenizer([record["prompt"] for record in records(spec)])["input_ids"]


def generate(spec: Spec, gate: protocol.Gate) -> None:
    """What GRPOTrainer calls to sample: `generate`, or with `continuous` set `generate_batch`.

    The latter has a cache for all prompts and completions; left to itself it takes most memory.
    """
    from transformers.generation import ContinuousBatchingConfig, GenerationConfig

    model, prompts, dims = loaded(spec), prompt_ids(spec), spec["dims"]
    choice = spec["options_of_worker"]
    rows = choice.get("rows", len(prompts))
    config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=1, pad_token_id=0,
        max_new_tokens=dims["completion"], **spec["options"],
    )  # fmt: skip
    pages = -(-(dims["prompt"] + dims["completion"]) // 32)
    batching = ContinuousBatchingConfig(
        page_size=32, num_blocks=(pages + 1) * len(prompts), max_batch_tokens=1024
    )

    def continuous() -> dict[str, Any]:
        with torch.no_grad():
            out = model.generate_batch(
                prompts, generation_config=config, continuous_batching_config=batching,
                progress_bar=False,
            )  # fmt: skip
        return {"tokens": sum(len(one.generated_tokens) for one in out.values())}

    def padded() -> dict[str, Any]:
        tokens = 0
        for first in range(0, len(prompts), rows):
            ids = torch.tensor(prompts[first : first + rows], device=DEVICE)
            with torch.no_grad():
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config
                )
            tokens += int((out[:, ids.shape[1] :] != 0).sum())
        return {"tokens": tokens}

    gate.serve(continuous if choice.get("continuous") else padded)


def logits(spec: Spec, gate: protocol.Gate) -> None:
    model = loaded(spec)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(prompt_ids(spec), device=DEVICE)).logits
    np.save(spec["out"], out.float().cpu().numpy())
    gate.say(versions={name: version(name) for name in ("trl", "transformers", "torch", "numpy")})
    gate.next()


def limits(spec: Spec, gate: protocol.Gate) -> None:
    """As in alignjax_worker, as PyTorch reaches it."""
    found = {}
    for dtype in ("float32", "bfloat16"):
        a = torch.ones((2048, 2048), dtype=getattr(torch, dtype), device=DEVICE)
        found[f"{dtype}_flops"] = 2 * 2048**3 / best(lambda x: x @ x, a)
    big = torch.ones(64 * 2**20, device=DEVICE)
    found["bytes"] = big.numel() * 4 / best(torch.sum, big)
    gate.say(limits=found)
    gate.next()


def best(function: Any, argument: Any) -> float:
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        function(argument)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


if __name__ == "__main__":
    protocol.main(
        {"sft": sft, "sft_ragged": sft, "dpo": dpo, "generate": generate, "grpo": grpo,
         "logits": logits, "limits": limits}
    )  # fmt: skip
