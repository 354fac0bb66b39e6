"""Tokens per second of a 100M model, forward and forward with backward, beside transformers.

    python benchmarks/models.py                  # two families, float32, 2 threads
    python benchmarks/models.py --families qwen3

The same weights in both (transformers writes them, ours are read from its files), the same tokens,
the same number of threads, one process each, in turns: the quickest turn counts, and the spread is
kept. The loss is the summed cross-entropy of the next token; ours never keeps all logits, theirs
does. Before anything is timed both must agree on it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

SHAPES = {
    "llama": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 14,
              "num_attention_heads": 10, "num_key_value_heads": 5},
    "qwen3": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 14,
              "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 64},
    "gemma2": {"hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 12,
               "num_attention_heads": 10, "num_key_value_heads": 5, "head_dim": 64,
               "query_pre_attn_scalar": 64, "sliding_window": 256},
}  # fmt: skip
VOCAB, ROWS, TIME = 32_000, 4, 512
REPEATS, TURNS = 2, 2


def make(family: str, folder: Path) -> int:
    """Saves a random model of transformers; returns its number of parameters."""
    import torch
    import transformers

    torch.manual_seed(0)
    name = {"llama": "Llama", "qwen3": "Qwen3", "gemma2": "Gemma2"}[family]
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCAB, max_position_embeddings=2048, tie_word_embeddings=True, **SHAPES[family]
    )
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def tokens():
    import numpy as np

    return np.random.default_rng(0).integers(3, VOCAB, (ROWS, TIME)).astype(np.int32)


def timed(functions) -> dict[str, list[float]]:
    out = {}
    for name, function in functions.items():
        function()  # compiles, or warms up
        seconds = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        out[name] = seconds
    return out


def theirs(folder: str) -> dict:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor(tokens()).long()

    def loss():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        flat = logits.reshape(-1, logits.shape[-1])
        return torch.nn.functional.cross_entropy(flat, ids[:, 1:].reshape(-1), reduction="sum")

    def forward():
        with torch.no_grad():
            return loss()

    def backward():
        model.zero_grad()
        loss().backward()

    return {"loss": float(forward()), "seconds": timed({"forward": forward, "backward": backward})}


def ours(folder: str, dtype: str) -> dict:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from alignjax.losses import next_token_logps
    from alignjax.losses.vocabulary import default_chunk_size
    from alignjax.models import load

    model, params = load(folder, compute_dtype=dtype)
    ids = jnp.asarray(tokens())
    segments = jnp.ones_like(ids)
    positions = jnp.broadcast_to(jnp.arange(TIME, dtype=jnp.int32), ids.shape)
    mask = jnp.asarray(np.arange(TIME)[None] >= 1) & (segments > 0)

    def loss(params):
        hidden, _ = model.apply(params, ids, segments, positions)
        out = next_token_logps(
            hidden, model.unembedding(params), ids, mask, chunk_size=default_chunk_size(ROWS),
            soft_cap=model.config.logit_soft_cap,
        )  # fmt: skip
        return -jnp.sum(out.logps)

    forward, backward = jax.jit(loss), jax.jit(jax.grad(loss))
    found = float(forward(params))
    functions = {
        "forward": lambda: jax.block_until_ready(forward(params)),
        "backward": lambda: jax.block_until_ready(backward(params)),
    }
    return {"loss": found, "seconds": timed(functions)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="*", default=["llama", "gemma2"], choices=SHAPES)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        side, folder = args.worker
        print(json.dumps(theirs(folder) if side == "theirs" else ours(folder, args.dtype)))
        return
    import record

    result = {}
    for family in args.families:
        with tempfile.TemporaryDirectory() as folder:
            num_params = make(family, Path(folder))
            found = {"theirs": [], "ours": []}
            for _ in range(TURNS):
                for side, runs in found.items():
                    command = [sys.executable, __file__, "--worker", side, folder]
                    command += ["--dtype", args.dtype]
                    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    runs.append(json.loads(output.stdout.splitlines()[-1]))
        losses = {side: runs[0]["loss"] for side, runs in found.items()}
        limit = 1e-4 if args.dtype == "float32" else 1e-2
        assert abs(losses["ours"] / losses["theirs"] - 1) < limit, losses
        row = {"parameters": num_params, "loss_in_nats": losses}
        for kind in ("forward", "backward"):
            for side, runs in found.items():
                seconds = [s for run in runs for s in run["seconds"][kind]]
                best, middle, worst = min(seconds), median(seconds), max(seconds)
                row[f"{side}, {kind}"] = {
                    "tokens_per_s": round(ROWS * TIME / best),
                    "median": round(ROWS * TIME / middle),
                    "slowest": round(ROWS * TIME / worst),
                }
        result[family] = row
        print(family, json.dumps(row, indent=2))
    suffix = "" if args.dtype == "float32" else f"_{args.dtype}"
    record.write(
        record.RESULTS / f"models{suffix}.json",
        {"rows": ROWS, "time": TIME, "vocab": VOCAB, "threads": os.cpu_count(),
         "dtype_of_ours": args.dtype, "families": result},
    )  # fmt: skip


if __name__ == "__main__":
    main()
