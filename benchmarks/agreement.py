"""Log-probs of sampling, of training and of PyTorch in float32: how far from those in float64?

    python benchmarks/agreement.py                    # random weights of the sizes S and M
    python benchmarks/agreement.py runs/r1_zero/base/model

32 prompts of 16 random ids with 8 samples of 48 tokens each. float64 is PyTorch's, by transformers,
in whole sequences. What float32 itself leaves open is how far PyTorch in float32 is from it.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import record
import torch
from peer.tasks import SIZES, write_model
from transformers import AutoModelForCausalLM

from alignjax.core.types import Sampling
from alignjax.generate import make_generate
from alignjax.losses import next_token_logps
from alignjax.models import load

PROMPTS, GROUP, PROMPT_LEN, NEW = 32, 8, 16, 48


def of_torch(path: str, rows: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """[N, T] float64; log p of each token after those before it, 0 for the first."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    found = np.zeros(rows.shape)
    with torch.no_grad():
        for start in range(0, len(rows), 16):
            ids = torch.tensor(rows[start : start + 16], dtype=torch.int64)
            logps = torch.log_softmax(model(ids).logits[:, :-1], dim=-1)
            found[start : start + 16, 1:] = logps.gather(-1, ids[:, 1:, None])[..., 0].numpy()
    return found


def measure(path: str) -> dict[str, Mapping[str, float]]:
    """Name of two -> the largest and the mean difference, nats, and tokens beyond 1e-5."""
    model, params = load(path, compute_dtype="float32")
    rng = np.random.default_rng(0)
    prompts = rng.integers(3, model.config.vocab_size, (PROMPTS, PROMPT_LEN)).astype(np.int32)
    out = make_generate(model)(
        params, prompts, np.full(PROMPTS, PROMPT_LEN), jax.random.PRNGKey(1),
        Sampling(max_tokens=NEW, num_samples=GROUP),
    )  # fmt: skip
    rows = np.concatenate([np.repeat(prompts, GROUP, axis=0), out.tokens], axis=1)
    mask = np.zeros(rows.shape, bool)
    mask[:, PROMPT_LEN:] = np.arange(NEW) < out.lengths[:, None]
    positions = jnp.broadcast_to(jnp.arange(rows.shape[1]), rows.shape)
    hidden, _ = jax.jit(model.apply)(params, rows, jnp.ones_like(rows), positions)
    trained = next_token_logps(hidden, model.unembedding(params), jnp.array(rows), jnp.array(mask))
    sampled = np.zeros(rows.shape)
    sampled[:, PROMPT_LEN:] = out.logps
    of = {
        "sampling": sampled,
        "training": np.asarray(trained.logps, np.float64),
        "torch": of_torch(path, rows, torch.float32),
        "float64": of_torch(path, rows, torch.float64),
    }
    pairs = [("sampling", "training"), *((name, "float64") for name in list(of)[:3])]
    found = {}
    for a, b in pairs:
        apart = np.abs(of[a] - of[b])[mask]
        found[f"{a} and {b}"] = {
            "largest": float(apart.max()), "mean": float(apart.mean()), "tokens": apart.size,
            "beyond_1e-5": int((apart > 1e-5).sum()),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="directories as Hugging Face writes them")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "agreement.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = {path: path for path in args.models}
        for size in () if args.models else ("S", "M"):
            models[size] = str(Path(folder) / size)
            write_model(Path(models[size]), SIZES[size], is_untied=False)
        found = {name: measure(path) for name, path in models.items()}
    for name, pairs in found.items():
        print(name)
        for pair, said in pairs.items():
            print(f"  {pair:24s}", " ".join(f"{k} {v:.3g}" for k, v in said.items()))
    known = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    known |= {name: {**record.circumstances(), "apart": pairs} for name, pairs in found.items()}
    args.out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
