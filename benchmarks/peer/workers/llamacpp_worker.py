"""Generation of `benchmarks/peers.py` in llama.cpp, by the low-level API of its Python bindings.

The weights are those of the safetensors, in a GGUF file of float32. `options` of a variant go to
the parameters of its context, where a name such as "GGML_TYPE_F32" stands for the constant; `slots`
sequences are decoded together.
Sources: the header llama.h of the pinned version, and the package gguf.
"""

import ctypes
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as api
import numpy as np
import protocol
import slots
from safetensors.numpy import load_file

Spec = dict[str, Any]
EOS = 1


def write_gguf(folder: Path, out: Path) -> None:
    """The model of a Hugging Face directory as a GGUF file, without a tokenizer: ids go in."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "qwen3")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
    for name, array in load_file(folder / "model.safetensors").items():
        theirs = names.get_name(name, try_suffixes=(".weight",))
        if theirs is None:
            raise ValueError(f"{folder}: GGUF has no name for the tensor {name!r}")
        writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(spec: Spec) -> Any:
    """Raises: RuntimeError: if there is a GPU that it was not built for, or it cannot load."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") != "" and not api.llama_supports_gpu_offload():
        raise RuntimeError(
            f"built without a GPU: remove {sys.prefix} and set CMAKE_ARGS=-DGGML_CUDA=ON"
        )
    api.llama_backend_init()
    params = api.llama_model_default_params()
    params.n_gpu_layers = -1
    with tempfile.TemporaryDirectory(prefix="peers") as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(Path(spec["model"]), file)
        model = api.llama_model_load_from_file(str(file).encode(), params)
    if model is None:
        raise RuntimeError("llama.cpp could not load the model; its log says why")
    return model


class Batch:
    """Tokens for `llama_decode`, which reads these arrays in place."""

    def __init__(self, size: int):
        self.tokens, self.positions, self.sequences = (np.zeros(size, np.int32) for _ in range(3))
        self.has_output = np.zeros(size, np.int8)
        self._counts = np.ones(size, np.int32)  # each token belongs to one sequence,
        address = self.sequences.ctypes.data
        self._pointers = address + self.sequences.itemsize * np.arange(size)  # which stands there

    def of(self, rows: Sequence[slots.Row], *, all_outputs: bool = False) -> api.llama_batch:
        """Args: all_outputs: logits of each token, not only of the last of each row."""
        ends = np.cumsum([len(tokens) for _, _, tokens in rows])
        for end, (sequence, start, tokens) in zip(ends, rows, strict=True):
            part = slice(end - len(tokens), end)
            self.tokens[part] = tokens
            self.positions[part] = np.arange(start, start + len(tokens))
            self.sequences[part] = sequence
        self.has_output[: ends[-1]] = all_outputs
        self.has_output[ends - 1] = True
        found = api.llama_batch(n_tokens=int(ends[-1]))
        for name, array in (
            ("token", self.tokens), ("pos", self.positions), ("n_seq_id", self._counts),
            ("seq_id", self._pointers), ("logits", self.has_output),
        ):  # fmt: skip
            kind = dict(api.llama_batch._fields_)[name]
            setattr(found, name, ctypes.cast(array.ctypes.data, kind))
        return found


class Context:
    """Sequences of at most `length` tokens each, sampled at temperature 1 from all tokens."""

    def __init__(
        self, model: Any, *, slots: int, length: int, options: dict[str, Any], outputs: int = 1
    ):
        """Args: outputs: at most so many tokens of a sequence have logits in one call."""
        params = api.llama_context_default_params()
        params.n_seq_max, params.n_ctx, params.n_batch = slots, slots * length, slots * length
        params.n_outputs_max, params.n_outputs_max_per_seq = slots * outputs, outputs
        params.n_threads = params.n_threads_batch = len(os.sched_getaffinity(0))
        for name, value in options.items():
            setattr(params, name, getattr(api, value) if isinstance(value, str) else value)
        self._context = api.llama_init_from_model(model, params)
        if self._context is None:
            raise RuntimeError("llama.cpp made no context; its log says why")
        self._memory = api.llama_get_memory(self._context)
        self._batch = Batch(slots * length)
        self._sampler = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(self._sampler, api.llama_sampler_init_dist(0))

    def decode(self, rows: Sequence[slots.Row]) -> list[int]:
        self._run(self._batch.of(rows))
        ends = np.cumsum([len(tokens) for _, _, tokens in rows]) - 1
        return [api.llama_sampler_sample(self._sampler, self._context, int(i)) for i in ends]

    def logits(self, rows: Sequence[slots.Row], vocab: int) -> np.ndarray:
        """[tokens of all rows, V] float32."""
        batch = self._batch.of(rows, all_outputs=True)
        self._run(batch)
        found = api.llama_get_logits(self._context)
        return np.ctypeslib.as_array(found, (batch.n_tokens, vocab)).copy()

    def free(self, sequence: int) -> None:
        api.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def move(self, source: int, target: int) -> None:
        api.llama_memory_seq_cp(self._memory, source, target, -1, -1)
        self.free(source)

    def _run(self, batch: api.llama_batch) -> None:
        if code := api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode: {code}")


def prompt_ids(spec: Spec) -> list[list[int]]:
    lines = Path(spec["data"]).read_text(encoding="utf-8").splitlines()
    return [[int(word[1:]) for word in json.loads(line)["prompt"].split()] for line in lines]


def generate(spec: Spec, gate: protocol.Gate) -> None:
    dims, prompts = spec["dims"], prompt_ids(spec)
    count = spec["options_of_worker"]["slots"]
    length = dims["prompt"] + dims["completion"]
    context = Context(loaded(spec), slots=count, length=length, options=spec["options"])

    def run() -> dict[str, Any]:
        found = slots.complete(
            prompts, context, slots=count, max_tokens=dims["completion"], eos=EOS
        )
        return {"tokens": sum(map(len, found))}

    gate.serve(run)


def logits(spec: Spec, gate: protocol.Gate) -> None:
    """Of all prompts at once, each in a sequence of its own, in float32 throughout: its defaults
    are 2e-4 of the largest logit away."""
    prompts = prompt_ids(spec)
    length = len(prompts[0])
    config = json.loads((Path(spec["model"]) / "config.json").read_text(encoding="utf-8"))
    float32 = {
        "type_k": "GGML_TYPE_F32", "type_v": "GGML_TYPE_F32",
        "flash_attn_type": "LLAMA_FLASH_ATTN_TYPE_DISABLED",
    }  # fmt: skip
    context = Context(
        loaded(spec), slots=len(prompts), length=length, options=float32, outputs=length
    )
    rows = [(i, 0, prompt) for i, prompt in enumerate(prompts)]
    found = context.logits(rows, config["vocab_size"])
    np.save(spec["out"], found.reshape(len(prompts), length, -1))
    versions = {name: version(name) for name in ("llama-cpp-python", "gguf", "numpy")}
    # Which instructions of the processor it was built for.
    versions["system_info"] = api.llama_print_system_info().decode().strip()
    gate.say(versions=versions)
    gate.next()


if __name__ == "__main__":
    protocol.main({"generate": generate, "logits": logits})
