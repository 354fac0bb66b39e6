"""What `benchmarks/peers.py` measures: models, data and the arithmetic of each task.

The weights are random and written as a Hugging Face directory, Qwen3-style, that all libraries
read. Two things in them are not random, so that each library does the same work by its own means,
with nothing but its own EOS handling: ids below 256 are never sampled after an ordinary prompt, so
that completions are as long as they may be; and in the model "untied" an id n below 256 is followed
by n - 1 and the lowest of them by EOS, so that the last token of a prompt says how long its
completion will be.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

PAD, EOS, UNKNOWN, FIRST_COUNT, FIRST_WORD = 0, 1, 2, 3, 256
"""Ids. From FIRST_COUNT on they count down, from FIRST_WORD on they are ordinary."""

SIZES: dict[str, dict[str, int]] = {
    "S": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
          "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096},
    "M": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
          "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32_768},
    "T": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512},
}  # fmt: skip
HEAD_DIM = 64


@dataclass(frozen=True)
class Task:
    """One measurement.

    Attributes:
      kind: which function of a worker does it.
      sizes: models that it is done with.
      dims: numbers of rows and tokens; see `write_data`.
      is_untied: takes the model that counts down, whose unembedding is a matrix of its own.
      knows_reference: of dpo: the log-probs of the reference were computed before.
      unit: what is compared: seconds of a run, or tokens per second.
    """

    kind: str
    sizes: tuple[str, ...]
    dims: dict[str, int]
    is_untied: bool = False
    knows_reference: bool = False
    unit: str = "seconds"

    def quick(self) -> "Task":
        """The same with the tiny model and about a fiftieth of the work: does everything run?"""
        small = {name: max(2, size // 8) for name, size in self.dims.items()}
        return replace(self, sizes=("T",), dims=small)


BOTH = ("S", "M")
PAIRS = {"pairs": 8, "prompt": 128, "completion": 128}
TASKS: dict[str, Task] = {
    "sft": Task("sft", BOTH, {"rows": 8, "row_len": 256}),
    "sft_ragged": Task(
        "sft_ragged", BOTH, {"rows": 8, "row_len": 256, "examples": 1024}, unit="tokens per second"
    ),
    "dpo": Task("dpo", BOTH, PAIRS),
    "dpo_reference_known": Task("dpo", BOTH, PAIRS, knows_reference=True),
    "generate": Task(
        "generate", BOTH, {"prompts": 64, "prompt": 64, "completion": 128},
        unit="tokens per second",
    ),
    "generate_ragged": Task(
        "generate", BOTH, {"prompts": 128, "prompt": 32, "completion": 128, "shortest": 16},
        is_untied=True, unit="tokens per second",
    ),
    "grpo": Task("grpo", BOTH, {"prompts": 8, "prompt": 128, "group": 8, "completion": 128}),
    "grpo_long": Task("grpo", BOTH, {"prompts": 2, "prompt": 512, "group": 16, "completion": 64}),
    "ppo": Task("ppo", ("S",), {"prompts": 64, "prompt": 64, "completion": 128}, is_untied=True),
}  # fmt: skip

TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("sft", "M"): {"trl": 1.5, "tunix": 1.6},
    ("sft_ragged", "M"): {"trl": 2.0, "tunix": 2.0},
    ("dpo", "M"): {"trl": 2.2, "tunix": 2.2},
    ("generate", "M"): {"trl": 1.5, "tunix": 1.9},
    ("generate_ragged", "S"): {"trl": 2.0, "tunix": 2.0, "llamacpp": 1.0},
    ("grpo", "M"): {"trl": 2.2, "tunix": 2.2},
    ("grpo_long", "M"): {"trl": 4.0, "tunix": 4.0},
    ("ppo", "S"): {"tunix": 2.0},
}
"""How many times as fast as the best setting of a peer we mean to be in float32."""


def word(token: int) -> str:
    """How an id is spelled in the data."""
    return {PAD: "<pad>", EOS: "<eos>", UNKNOWN: "<unk>"}.get(token, f"t{token}")


def text(ids: np.ndarray) -> str:
    return " ".join(word(int(token)) for token in ids)


def write_model(folder: Path, size: Mapping[str, int], *, is_untied: bool, seed: int = 0) -> int:
    """Writes config, weights and tokenizer; returns the number of parameters."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **size,
        # Tunix 0.1.7 takes this base, whatever the config says.
        "head_dim": HEAD_DIM, "rms_norm_eps": 1e-6, "rope_theta": 1_000_000.0, "hidden_act": "silu",
        "max_position_embeddings": 1024, "tie_word_embeddings": not is_untied,
        "attention_bias": False, "attention_dropout": 0.0, "use_sliding_window": False,
        "initializer_range": 0.02, "torch_dtype": "float32",
        "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip
    weights = _weights(size, is_untied, np.random.default_rng(seed))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    vocabulary = {word(token): token for token in range(size["vocab_size"])}
    special = [
        {"id": token, "content": word(token), "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False, "special": True}
        for token in (PAD, EOS, UNKNOWN)
    ]  # fmt: skip
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": special,
        "normalizer": None, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": word(UNKNOWN)},
    }  # fmt: skip
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast", "pad_token": word(PAD),
        "eos_token": word(EOS), "unk_token": word(UNKNOWN), "model_max_length": 1024,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    generation = {"eos_token_id": EOS, "pad_token_id": PAD}
    files = {
        "config": config, "tokenizer": tokenizer, "tokenizer_config": names,
        "generation_config": generation,
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return sum(array.size for array in weights.values())


def _weights(
    size: Mapping[str, int], is_untied: bool, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    width, inner, vocab = size["hidden_size"], size["intermediate_size"], size["vocab_size"]
    queries = size["num_attention_heads"] * HEAD_DIM
    keys = size["num_key_value_heads"] * HEAD_DIM

    def normal(*shape: int) -> np.ndarray:
        return 0.02 * rng.standard_normal(shape, np.float32)

    embedding = normal(vocab, width)
    # Feature 0 tells ordinary ids from the others, and is far above what the layers add to it.
    embedding[:, 0] = np.where(np.arange(vocab) < FIRST_WORD, -4.0, 4.0)
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(width)}
    for layer in range(size["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": normal(queries, width),
            "self_attn.k_proj": normal(keys, width),
            "self_attn.v_proj": normal(keys, width),
            "self_attn.o_proj": normal(width, queries),
            "self_attn.q_norm": np.ones(HEAD_DIM),
            "self_attn.k_norm": np.ones(HEAD_DIM),
            "mlp.gate_proj": normal(inner, width),
            "mlp.up_proj": normal(inner, width),
            "mlp.down_proj": normal(width, inner),
            "input_layernorm": np.ones(width),
            "post_attention_layernorm": np.ones(width),
        }
        weights |= {f"model.layers.{layer}.{name}.weight": array for name, array in parts.items()}
    if is_untied:
        counts = np.arange(FIRST_COUNT, FIRST_WORD)
        embedding[counts, 1:] = rng.standard_normal((len(counts), width - 1), np.float32)
        head = normal(vocab, width)
        head[:, 0] = np.where(np.arange(vocab) < FIRST_WORD, -8.0, 0.0)
        # What follows an id answers to its embedding: 48 nats where 3 N(0, 1) is the noise.
        following = np.where(counts == FIRST_COUNT, EOS, counts - 1)
        head[following, 1:] += 3 / np.sqrt(width) * embedding[counts, 1:]
        weights["lm_head.weight"] = head
    return {name: array.astype(np.float32) for name, array in weights.items()}


def write_data(path: Path, task: Task, vocab: int, *, seed: int = 0) -> None:
    """Writes the JSON lines of a task: words of one token each, to which libraries add EOS. What
    follows a prompt starts with a space, for it is joined to it.

    The lengths of "sft_ragged" follow those of GSM8K in tokens of a large vocabulary: log-normal,
    with geometric means of 56 for questions and 111 for answers; what exceeds a row is left out.
    """
    rng, dims, kind = np.random.default_rng(seed), task.dims, task.kind

    def words(length: int) -> np.ndarray:
        return rng.integers(FIRST_WORD, vocab, length)

    records: list[dict[str, str]] = []
    if kind == "sft":
        records = [{"text": text(words(dims["row_len"] - 1))} for _ in range(dims["rows"])]
    elif kind == "sft_ragged":
        while len(records) < dims["examples"]:
            scale = dims["row_len"] / 256
            means = np.log([56 * scale, 111 * scale])
            question, answer = np.exp(rng.normal(means, [0.345, 0.424])).astype(int).clip(1)
            if question + answer < dims["row_len"]:
                prompt, completion = text(words(question)), " " + text(words(answer))
                records.append({"prompt": prompt, "completion": completion})
    elif kind == "dpo":
        for _ in range(dims["pairs"]):
            responses = [" " + text(words(dims["completion"] - 1)) for _ in range(2)]
            chosen, rejected = responses
            prompt = text(words(dims["prompt"]))
            records.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    else:
        for length in completion_lengths(task):
            prompt = words(dims["prompt"])
            if "shortest" in dims:
                # An id n is followed by n - 1, ..., FIRST_COUNT and EOS.
                prompt[-1] = length + FIRST_COUNT - 1
            records.append({"prompt": text(prompt)})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines, encoding="utf-8")


def completion_lengths(task: Task) -> np.ndarray:
    """Tokens that are sampled after each prompt, EOS included."""
    dims = task.dims
    longest = dims["completion"]
    lengths = np.linspace(dims.get("shortest", longest), longest, dims["prompts"]).round()
    return np.random.default_rng(1).permutation(lengths.astype(int))


def expected_tokens(task: Task) -> int | None:
    """Tokens of a run, where all libraries have to agree on them: in training those that are
    trained on, prompts included; in generation those that are sampled. None where packing decides.
    """
    dims = task.dims
    match task.kind:
        case "sft":
            return dims["rows"] * dims["row_len"]
        case "sft_ragged":
            return None
        case "dpo":
            return 2 * dims["pairs"] * (dims["prompt"] + dims["completion"])
        case "generate":
            return int(completion_lengths(task).sum())
        case _:
            return dims["prompts"] * dims.get("group", 1) * dims["completion"]


def work(task: Task, size: Mapping[str, int], tokens: float) -> dict[str, float]:
    """Arithmetic and traffic of a run as the plain computation has it: nothing shared or skipped
    but the unembedding of what is no target, attention causal.

    Args:
      tokens: as the run reported them.
    Returns:
      flops of matrix products; bytes that decoding must read in float32: all weights once for each
      step of a batch, and the keys and values before each token; 0 in training.
    """
    dims, kind = task.dims, task.kind
    width, layers, vocab = size["hidden_size"], size["num_hidden_layers"], size["vocab_size"]
    queries = size["num_attention_heads"] * HEAD_DIM
    keys = size["num_key_value_heads"] * HEAD_DIM
    per_layer = 2 * width * (queries + keys) + 3 * width * size["intermediate_size"]
    dense, head = 2.0 * layers * per_layer, 2.0 * width * vocab

    def forward(rows: float, length: float, targets: float) -> float:
        attention = 4.0 * layers * queries * length * length / 2
        return rows * (length * dense + attention + targets * head)

    def decoding(lengths: np.ndarray, prompt: int) -> tuple[float, float]:
        flops = sum(forward(1, prompt + n, n) for n in lengths)
        cached = sum(n * prompt + n * n / 2 for n in lengths) * 2 * layers * keys * 4.0
        steps = float(max(lengths))
        return flops, steps * 4.0 * (layers * per_layer + width * vocab) + cached

    if kind == "sft":
        length = dims["row_len"]
        return {"flops": 3 * forward(dims["rows"], length, length - 1), "bytes": 0.0}
    if kind == "sft_ragged":
        answers = 111 / (56 + 111)  # the share of a sequence that is a target, about
        length = 168 / 256 * dims["row_len"]
        return {"flops": 3 * forward(tokens / length, length, answers * length), "bytes": 0.0}
    prompt, completion = dims["prompt"], dims["completion"]
    if kind == "dpo":
        passes = 3 if task.knows_reference else 4
        rows = 2 * dims["pairs"]
        flops = passes * forward(rows, prompt + completion, completion)
        return {"flops": flops, "bytes": 0.0}
    if kind == "generate":
        flops, read = decoding(completion_lengths(task), prompt)
        return {"flops": flops, "bytes": read}
    rows = dims["prompts"] * dims.get("group", 1)
    flops, _ = decoding(np.full(rows, completion), prompt)
    # GRPO: the update. PPO: updates of policy and critic, values and reference before them.
    passes = 3 if kind == "grpo" else 8
    return {"flops": flops + passes * forward(rows, prompt + completion, completion), "bytes": 0.0}
