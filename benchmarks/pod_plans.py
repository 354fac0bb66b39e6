"""Plans every config of configs/pods for the slices that it is meant for -> JSON and docs/scale.md.

    python benchmarks/pod_plans.py                    # all that have no result yet, one by one
    python benchmarks/pod_plans.py --only sft_v5e     # some, anew
    python benchmarks/pod_plans.py --pages            # the tables of docs/scale.md alone

Needs libtpu (`pip install 'alignjax[plan]'`), no TPU, and minutes for each plan. Each result is
kept with the commit that it was made of.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import record

RESULT = record.RESULTS / "plans.json"
PAGE = record.REPO / "docs" / "scale.md"
BEGIN, END = "<!-- plans: written by benchmarks/pod_plans.py -->", "<!-- end of plans -->"
GIB = 2.0**30


class Pod(NamedTuple):
    config: str
    topology: str
    overrides: tuple[str, ...] = ()


PODS = {
    "sft_v5e": Pod("sft_llama3_8b", "v5e:16x16", ("data.eval=null",)),
    "sft_v5p_1024": Pod("sft_llama3_8b", "v5p:8x8x16", ("data.rows=1024", "data.eval=null")),
    "sft_2_v5e": Pod(
        "sft_llama3_8b", "2x v5e:16x16", ("mesh.data=2", "data.rows=512", "data.eval=null")
    ),
    "dpo_8b_v6e": Pod("dpo_llama3_8b", "v6e:8x8"),
    "dpo_8b_2_v6e": Pod("dpo_llama3_8b", "2x v6e:8x8", ("mesh.data=2", "data.num_prompts=256")),
    "dpo_70b_v5p": Pod("dpo_llama3_1_70b", "v5p:4x4x4"),
    "grpo_v5p": Pod("grpo_llama3_1_8b_8k", "v5p:4x4x4"),
    "grpo_apart_v5p": Pod(
        "grpo_llama3_1_8b_8k",
        "v5p:2x2x16",
        (
            "rollout.devices=32",
            "rollout.max_staleness=1",
            "algorithm.old_logps=trainer",
            "algorithm.importance_cap=2.0",
        ),
    ),
    "r1_zero_v5p": Pod("r1_zero_qwen2_5_32b", "v5p:4x4x8"),
    "r1_zero_2_v5p": Pod("r1_zero_qwen2_5_32b", "2x v5p:4x4x4", ("mesh.data=2",)),
    "sft_70b_32k_v5p": Pod("sft_llama3_1_70b_32k", "v5p:4x4x8", ("data.eval=null",)),
    "moe_v6e": Pod("sft_qwen3_30b_a3b", "v6e:8x8", ("data.eval=null",)),
    "instructgpt_v5e": Pod("instructgpt_llama3_8b", "v5e:16x16", ("stages.sft.data.eval=null",)),
}


def plan(pod: Pod) -> dict[str, Any]:
    """What `alignjax plan` writes, with the commit, and the words that it printed.

    Evaluations of `sft` are left out: they take less memory than updates, and as long to compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "plan.json"
        command = [
            sys.executable, "-m", "alignjax", "plan", f"configs/pods/{pod.config}.yaml",
            "--topology", pod.topology, "--json", str(out), *pod.overrides,
        ]  # fmt: skip
        before = _children_s()
        environment = os.environ | {"COLUMNS": "140", "NO_COLOR": "1"}
        done = subprocess.run(
            command, cwd=record.REPO, env=environment, stdout=subprocess.PIPE, text=True
        )
        if not out.is_file():
            raise SystemExit(f"{pod.config} on {pod.topology}: no plan; exit {done.returncode}")
        found = json.loads(out.read_text(encoding="utf-8"))
    printed = [line for line in done.stdout.splitlines() if not line.startswith("wrote ")]
    return {
        "commit": record.commit(),
        "overrides": list(pod.overrides),
        "cpu_s": round(_children_s() - before),
        **found,
        "printed": printed,
    }


def _children_s() -> float:
    """Processor time of the processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def pages(plans: Mapping[str, Any]) -> str:
    """A table with a line for each stage, and what was printed of each plan."""
    lines = [
        "| config | topology | stage | mesh | GiB of a device | | iteration, s | bound | "
        "tokens/s | utilisation | chip-hours | to plan, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        _row(name, found, stage) for name, found in plans.items() for stage in found["stages"]
    ]
    for name, found in plans.items():
        pod = PODS[name]
        words = " ".join([f"--topology {_quoted(pod.topology)}", *pod.overrides])
        lines += [
            "", "<details><summary>",
            f"<code>alignjax plan configs/pods/{pod.config}.yaml {words}</code>",
            "</summary>", "", "```", *(line.rstrip() for line in found["printed"]), "```", "",
            "</details>",
        ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _quoted(topology: str) -> str:
    return f"'{topology}'" if " " in topology else topology


def _row(name: str, found: Mapping[str, Any], stage: Mapping[str, Any]) -> str:
    programs = stage["programs"]
    longest = max(programs, key=lambda one: one["times"] * one.get("seconds", 0.0))
    steps = [one for one in programs if one.get("utilisation") and one["name"] == "train step"]
    mesh = _axes(stage["mesh"])
    if stage.get("sampling_mesh") is not None:
        mesh += f"; to sample {_axes(stage['sampling_mesh'])}"
    limit = stage["limit_bytes"]
    cells = [
        PODS[name].config, found["topology"], stage["phase"], mesh,
        f"{stage['needed_bytes'] / GIB:.1f}" + (f" of {limit / GIB:.1f}" if limit else ""),
        "fits" if stage["fits"] else "does not fit",
        _spelled(stage["iteration_s"], ".3g"),
        f"{longest.get('bound', '')} ({longest['name']})" if len(programs) > 1
        else longest.get("bound", ""),
        _spelled(stage["tokens_per_s"], ",.0f"),
        _spelled(steps[0]["utilisation"] if steps else None, ".0%"),
        _spelled(stage["chip_hours"], ",.0f"),
        f"{found['cpu_s']:,}" if stage is found["stages"][-1] else "",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _axes(mesh: Mapping[str, int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in mesh.items())


def _spelled(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def write_page(plans: Mapping[str, Any]) -> None:
    """Puts the tables between the two marks."""
    text = PAGE.read_text(encoding="utf-8")
    before, mark, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not mark or not end:
        raise SystemExit(f"{PAGE.name}: no {BEGIN} with {END} after it")
    PAGE.write_text(f"{before}{BEGIN}\n\n{pages(plans)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PODS, default=[], metavar="NAME")
    parser.add_argument("--pages", action="store_true", help="plan nothing")
    args = parser.parse_args()
    plans = json.loads(RESULT.read_text(encoding="utf-8"))["plans"] if RESULT.is_file() else {}
    wanted = args.only or [name for name in PODS if name not in plans]
    for name in [] if args.pages else wanted:
        print(f"{name}: {PODS[name].config} on {PODS[name].topology}", flush=True)
        # What is compiled once more comes from a cache: the first time says what it takes.
        took = plans.get(name, {}).get("cpu_s", 0)
        plans[name] = plan(PODS[name])
        plans[name]["cpu_s"] = max(took, plans[name]["cpu_s"])
        plans = {key: plans[key] for key in PODS if key in plans}
        text = json.dumps({"plans": plans}, indent=1) + "\n"
        RESULT.write_text(text, encoding="utf-8")
        print("\n".join(plans[name]["printed"]), flush=True)
    write_page(plans)


if __name__ == "__main__":
    main()
