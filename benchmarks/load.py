"""Time and peak memory of loading a checkpoint of a billion parameters, in processes of their own.

Writes a checkpoint of zeros (bfloat16, about 2 GB, in shards) to a temporary folder, loads it with
parameters of each type; the peak before the load is what imports alone take.

    python benchmarks/load.py --note "machine shared"
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

SHAPE = {
    "family": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_layers": 22,
    "num_heads": 32, "num_kv_heads": 4, "vocab_size": 32000, "tie_embeddings": False,
}  # fmt: skip
"""1.1 billion parameters: the shape of TinyLlama."""


def write(folder: Path) -> None:
    """A checkpoint of bfloat16 weights."""
    import jax
    import jax.numpy as jnp

    from alignjax.models import Model, ModelConfig, save

    model = Model(ModelConfig(**SHAPE))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    # Zeros: what is in them does not matter, and random ones take minutes on a small CPU.
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), shapes)
    save(folder, model, params, max_shard_bytes=10**9)


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """One load in this process: seconds, and the peak of resident memory before and after.

    Pages of the file that the system keeps in memory of its own accord count as resident while they
    are mapped: `peak_anonymous_gb` leaves them out, and is what the process itself holds. It is
    looked at every 10 ms.
    """
    import resource
    import threading

    import jax

    from alignjax.models import load

    def peak() -> float:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def anonymous() -> float:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        fields = dict(line.split(":", 1) for line in status.splitlines())
        return int(fields["RssAnon"].split()[0]) * 1024 / 1e9

    seen, is_done = [anonymous()], threading.Event()

    def watch() -> None:
        while not is_done.wait(0.01):
            seen.append(anonymous())

    before = peak()
    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    _, params = load(folder, param_dtype=dtype)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    leaves = jax.tree.leaves(params)
    return {
        "param_dtype": dtype,
        "seconds": round(seconds, 2),
        "num_params": sum(x.size for x in leaves),
        "params_gb": round(sum(x.nbytes for x in leaves) / 1e9, 3),
        "peak_before_gb": round(before, 3),
        "peak_gb": round(peak(), 3),
        "anonymous_before_gb": round(seen[0], 3),
        "peak_anonymous_gb": round(max(seen), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "load.json")
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, folder = args.child[0], Path(args.child[1])
        print(json.dumps(write(folder) if what == "write" else measure(folder, what)))
        return

    def child(what: str, folder: str) -> Any:
        command = [sys.executable, __file__, "--child", what, folder]
        return json.loads(subprocess.check_output(command, text=True).splitlines()[-1])

    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        child("write", folder)
        written = time.perf_counter() - start
        files = sorted(Path(folder).glob("*.safetensors"))
        loads = [child(dtype, folder) for dtype in ("bfloat16", "float32")]
        result = {
            "note": args.note,
            "shape": SHAPE,
            "file_dtype": "bfloat16",
            "num_files": len(files),
            "files_gb": round(sum(f.stat().st_size for f in files) / 1e9, 3),
            "write_seconds_with_start": round(written, 1),
            "loads": loads,
        }
    for one in loads:
        print(
            f"{one['param_dtype']}: {one['seconds']} s, parameters {one['params_gb']} GB, "
            f"peak {one['peak_anonymous_gb']} GB (before: {one['anonymous_before_gb']}), "
            f"with pages of the files {one['peak_gb']} GB"
        )
    record.write(args.out, result)


if __name__ == "__main__":
    main()
