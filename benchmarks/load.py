"""Time and peak memory of loading checkpoints of billions of parameters, in processes of their own.

Writes checkpoints of zeros (bfloat16, in shards of 1 GB) to a temporary folder, and loads them with
parameters of each type, on one device and split over eight. The host has to hold a tensor at a time
beside the parameters, whatever the size of the model: `excess_gb` is what it held at most, without
the parameters (which on a CPU are host memory) and what imports alone take.

    python benchmarks/load.py --note "machine shared"
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record

COMMON = {"family": "llama", "vocab_size": 32000, "tie_embeddings": False}
SHAPES = {
    "1.1B": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_layers": 22, "num_heads": 32,
        "num_kv_heads": 4,
    },
    "2.0B": {
        "hidden_size": 2560, "intermediate_size": 6912, "num_layers": 27, "num_heads": 20,
        "num_kv_heads": 5,
    },
}  # fmt: skip
"""The first is that of TinyLlama."""


def write(folder: Path, shape: str) -> None:
    """A checkpoint of bfloat16 weights."""
    import jax
    import jax.numpy as jnp

    from alignjax.models import Model, ModelConfig, save

    model = Model(ModelConfig(**COMMON, **SHAPES[shape]))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    # Zeros: what is in them does not matter, and random ones take minutes on a small CPU.
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), shapes)
    save(folder, model, params, max_shard_bytes=10**9)


def measure(folder: Path, dtype: str) -> dict[str, Any]:
    """One load in this process, over all of its devices: seconds, and the peak of resident memory
    before and after.

    Pages of the file that the system keeps in memory of its own accord count as resident while they
    are mapped: `peak_anonymous_gb` leaves them out, and is what the process itself holds. It is
    looked at every 10 ms.
    """
    import resource
    import threading

    import jax

    from alignjax.models import load
    from alignjax.models.stored import open_tensors
    from alignjax.sharding import MeshConfig, make_mesh

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
    _, params = load(folder, mesh=make_mesh(MeshConfig(fsdp=-1)), param_dtype=dtype)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - start
    is_done.set()
    watcher.join()
    leaves = jax.tree.leaves(params)
    with open_tensors(folder) as stored:
        sizes = [math.prod(one.handle.get_slice(one.name).get_shape()) for one in stored.values()]
    params_gb = sum(x.nbytes for x in leaves) / 1e9
    return {
        "param_dtype": dtype,
        "num_devices": len(jax.devices()),
        "seconds": round(seconds, 2),
        "num_params": sum(x.size for x in leaves),
        "params_gb": round(params_gb, 3),
        "largest_tensor_gb": round(2 * max(sizes) / 1e9, 3),
        "peak_before_gb": round(before, 3),
        "peak_gb": round(peak(), 3),
        "anonymous_before_gb": round(seen[0], 3),
        "peak_anonymous_gb": round(max(seen), 3),
        "excess_gb": round(max(seen) - seen[0] - params_gb, 3),
    }


def child(words: Sequence[str], num_devices: int = 1) -> Any:
    """What another process of this script prints."""
    flags = f"--xla_force_host_platform_device_count={num_devices}"
    command = [sys.executable, __file__, "--child", *words]
    out = subprocess.check_output(command, text=True, env=os.environ | {"XLA_FLAGS": flags})
    return json.loads(out.splitlines()[-1])


def measure_all(shape: str, dtypes: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        child(["write", folder, shape])
        written = time.perf_counter() - start
        files = sorted(Path(folder).glob("*.safetensors"))
        found = {
            "shape": COMMON | SHAPES[shape],
            "file_dtype": "bfloat16",
            "num_files": len(files),
            "files_gb": round(sum(f.stat().st_size for f in files) / 1e9, 3),
            "write_seconds_with_start": round(written, 1),
            "loads": [
                child(["measure", folder, dtype], num_devices)
                for dtype in dtypes
                for num_devices in (1, 8)
            ],
        }
    for one in found["loads"]:
        print(
            f"{shape}, {one['param_dtype']}, {one['num_devices']} devices: {one['seconds']} s, "
            f"parameters {one['params_gb']} GB, peak {one['peak_anonymous_gb']} GB, beside them "
            f"{one['excess_gb']} GB, of which the largest tensor is {one['largest_tensor_gb']} GB"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "load.json")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        verb, folder, what = args.child
        print(json.dumps({"write": write, "measure": measure}[verb](Path(folder), what)))
        return
    found = {shape: measure_all(shape, args.dtypes) for shape in args.shapes}
    record.write(args.out, {"note": args.note, "models": found})


if __name__ == "__main__":
    main()
