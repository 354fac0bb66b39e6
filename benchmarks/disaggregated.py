"""Sampling ahead of training, on a device of its own: does it learn as well, and what does it gain?

    python benchmarks/disaggregated.py processes
    python benchmarks/disaggregated.py devices
    python benchmarks/disaggregated.py learn

All take two CPU devices, each of which computes in one thread, on two cores; one of them trains
while the other samples. Each measurement is a process of its own, or two.

processes: seconds of an iteration of GRPO where rollouts dominate, on two processes with a device
  and a core each: random weights that end a completion with each token alike, so that a round lasts
  several times as long as its mean row. Small: 32 rows, which two devices sample faster than one.
  Large: 8 rows of a model of which decoding reads all weights for each token, on however many
  devices.
devices: the same on two devices of one process, pinned to both cores.
learn: the RL stage of configs/recipes/r1_zero.yaml from the base models of that recipe, trained
  in turn and one iteration behind, each on one device, for half its iterations.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import record
import seeded

OUT = record.RESULTS / "disaggregated.json"
FLAGS = "--xla_force_host_platform_device_count={} --xla_cpu_multi_thread_eigen=false"
WEIGHED = {"old_logps": "trainer", "importance_cap": 2.0}
WAYS: dict[str, dict[str, Any]] = {
    "both in turn": {},
    "one samples, one trains, in turn": {"{}": 1},
    "one samples ahead, one trains": {"{}": 1, "max_staleness": 1},
}
"""What `rollout` has of what is named here: devices or processes."""
SIZES: dict[str, dict[str, Any]] = {
    "small": {"model": {"hidden_size": 128, "num_layers": 2, "num_heads": 4},
              "num_prompts": 8, "micro_batches": 8},
    "large": {"model": {"hidden_size": 768, "num_layers": 4, "num_heads": 12},
              "num_prompts": 2, "micro_batches": 4},
}  # fmt: skip
STEPS = 20


def speed(what: str, size: str, way: str, world: Path, num_steps: int) -> dict[str, Any]:
    """In this process: seconds of each iteration, and of what the main thread waits for samples."""
    import jax

    from alignjax.cli.runtime import join_processes
    from alignjax.phases.grpo import Grpo
    from alignjax.phases.grpo_config import GrpoConfig

    join_processes()
    changes = {name.format(what): value for name, value in WAYS[way].items()}
    sizes = SIZES[size]
    config = GrpoConfig.model_validate({
        "phase": "grpo", "name": "speed", "output_dir": str(world),
        "tokenizer": str(world / "tokenizer"),
        "model": {"init": {
            **sizes["model"], "max_position_embeddings": 512, "initializer_range": 0.01,
        }},
        "data": {
            "train": str(world / "train.jsonl"), "micro_batches": sizes["micro_batches"],
            "text": {"fields": {"prompt": "prompt", "reference": "reference"}},
        },
        "rollout": {
            "num_prompts": sizes["num_prompts"], "group_size": 4, "max_prompt_tokens": 16,
            "max_tokens": 128,
            **changes,
        },
        # All ways alike: the forward pass of the trainer, too.
        "algorithm": {"kl_coef": 0.0, "preset": "dr_grpo", **WEIGHED},
        "rewards": {"functions": {"format": {"function": "format.tags"}}, "num_workers": 1},
        "optimizer": {"learning_rate": 1e-6},
        "loop": {"steps": num_steps},
    })  # fmt: skip
    phase = Grpo(config, config.training_mesh())
    state, records = phase.init(jax.random.PRNGKey(0)), phase.records()
    seconds, waiting, lengths = [], [], []
    for _ in range(num_steps):
        start = time.perf_counter()
        state, collected = phase.collect(state, records)
        waiting.append(time.perf_counter() - start)
        for batch in collected.batches:
            state, _metrics = phase.step(state, batch)
        jax.block_until_ready(state.params)
        state = state._replace(step=state.step + 1)
        seconds.append(time.perf_counter() - start)
        lengths.append(collected.metrics["completions/mean_length"])
    phase.close()
    kept = slice(num_steps // 4, num_steps - 2)  # Not what compiles, nor what samples no more.
    return {
        "seconds": {
            "median": round(statistics.median(seconds[kept]), 4),
            "min": round(min(seconds[kept]), 4),
            "max": round(max(seconds[kept]), 4),
        },
        "median_seconds_until_sampled": round(statistics.median(waiting[kept]), 4),
        "num_iterations": len(seconds[kept]),
        "mean_length": round(statistics.mean(lengths[kept]), 1),
    }


def measure_speed(
    what: str, size: str, num_steps: int, repeats: int, cores: list[int]
) -> dict[str, Any]:
    """Each way in processes of its own, the ways after one another in each repeat."""
    from alignjax.recipes import chains

    world = record.REPO / "runs" / "disaggregated_world"
    world.mkdir(parents=True, exist_ok=True)
    chains.write(world, seed=0, num_questions=1, num_drills=1, num_train=400, num_test=8)
    found: dict[str, list[Any]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for way in WAYS:
            command = [sys.executable, __file__, "child", what, size, way]
            found[way].append(run([*command, str(world), str(num_steps)], what, cores))
            print(size, way, found[way][-1], flush=True)
    medians = {
        way: statistics.median(one["seconds"]["median"] for one in runs)
        for way, runs in found.items()
    }
    together, apart, ahead = medians.values()
    return {
        "ways": found,
        "median_seconds": medians,
        "gain_over_one_samples_one_trains": round(apart / ahead, 3),
        "gain_over_both_in_turn": round(together / ahead, 3),
    }


def run(command: list[str], what: str, cores: list[int]) -> Any:
    """What the (first) process of a measurement prints last."""
    if what == "devices":
        places = [(cores, environment())]
    else:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        together = {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(len(cores)),
        }
        places = [
            ([core], environment(1) | together | {"JAX_PROCESS_ID": str(number)})
            for number, core in enumerate(cores)
        ]
    processes = []
    for allowed, env in places:
        os.sched_setaffinity(0, allowed)  # The child has it from here.
        processes.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    outputs = [process.communicate() for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            raise RuntimeError(errors.decode())
    return json.loads(outputs[0][0].splitlines()[-1])


def measure_learning(seeds: list[int]) -> dict[str, Any]:
    """The last evaluation of each run, and the mean reward of its last five iterations."""
    overrides = {
        "in turn": ["rollout.devices=1"],
        "one behind": [
            "rollout.devices=1", "rollout.max_staleness=1", "algorithm.old_logps=trainer",
            "algorithm.importance_cap=2.0",
        ],
    }  # fmt: skip
    found: dict[str, list[Any]] = {way: [] for way in overrides}
    for seed in seeds:
        recipe = record.REPO / "runs" / ("r1_zero" if seed == 0 else f"r1_zero_seed{seed}")
        if not (recipe / "base" / "model").exists():
            seeded.run("r1_zero", seed)
        stage = record.REPO / "runs" / "disaggregated_stage.yaml"
        stage.write_text(rl_stage(recipe), encoding="utf-8")
        for way, changes in overrides.items():
            name = f"disaggregated_{way.replace(' ', '_')}_{seed}"
            run = [sys.executable, "-m", "alignjax", "run", str(stage), f"name={name}"]
            subprocess.run(
                [*run, f"seed={seed}", *changes], check=True, cwd=record.REPO, env=environment()
            )
            lines = (record.REPO / "runs" / name / "metrics.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            last = rows[-1]
            found[way].append(
                {
                    "seed": seed,
                    "eval/sampled/accuracy": [
                        round(row["eval/sampled/accuracy"], 4)
                        for row in rows
                        if "eval/sampled/accuracy" in row
                    ],
                    "eval/greedy/accuracy": round(last["eval/greedy/accuracy"], 4),
                    "reward_of_last_5": round(statistics.mean(r["reward"] for r in rows[-5:]), 4),
                    "staleness": last["rollout/staleness/mean"],
                    "largest_truncated_frac": max(
                        row.get("sampling/truncated_frac", 0.0) for row in rows
                    ),
                }
            )
            print(way, found[way][-1], flush=True)
    return {"steps": STEPS, "runs": found}


def rl_stage(recipe: Path) -> str:
    """The config of the RL stage of the recipe, as a phase of its own."""
    from alignjax.core.config import dump, find_config, load

    values = load(find_config("recipes/r1_zero")).values["stages"]["zero"]
    loop = {"steps": STEPS, "eval_every": 10, "checkpoint_every": 10}
    text = dump({"name": "disaggregated", **values, "loop": loop})
    for stage in ("world", "base"):
        text = text.replace(f"${{{stage}}}", str(recipe / stage))
    return text


def environment(num_devices: int = 2) -> dict[str, str]:
    """Of a child."""
    # Else the parts of one device's program share a pool of as many threads as there are cores, and
    # one device in turn computes on both of them.
    here = {"XLA_FLAGS": FLAGS.format(num_devices), "NPROC": "1", "JAX_PLATFORMS": "cpu"}
    return os.environ | here | {"PYTHONPATH": str(record.REPO)}


def main() -> None:
    if sys.argv[1:2] == ["child"]:
        what, size, way, world, num_steps = sys.argv[2:]
        print(json.dumps(speed(what, size, way, Path(world), int(num_steps))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["processes", "devices", "learn"])
    parser.add_argument("--steps", type=int, default=40, help="of a measurement of speed")
    parser.add_argument("--repeats", type=int, default=3, help="of a measurement of speed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cores", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--note", default="", help="kept with the figures, such as: machine shared")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()

    os.sched_setaffinity(0, args.cores)
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    measured = (
        measure_learning(args.seeds)
        if args.what == "learn"
        else {
            size: measure_speed(args.what, size, args.steps, args.repeats, args.cores)
            for size in SIZES
        }
    )
    flags = FLAGS.format(1 if args.what == "processes" else 2)
    here = {"note": args.note, "cores": len(args.cores), "xla_flags": flags, **measured}
    kept = {name: before[name] for name in ("processes", "devices", "learn") if name in before}
    record.write(args.out, {**kept, args.what: {**record.circumstances(), **here}})


if __name__ == "__main__":
    main()
