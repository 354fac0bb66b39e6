"""The demo with several seeds, each with a base model of its own -> a table and a JSON file.

    python benchmarks/r1_zero.py --seeds 0 1 2

Runs go to runs/, that of seed 0 to where `make demo` puts it. What is finished is not run again,
and its time is then the one that was noted when it was run, or unknown.
"""

import argparse
import json
import subprocess
import sys
import time
from typing import Any

from record import REPO, RESULTS, write
from table import table

from alignjax.recipes.r1_zero import evaluations, final

ROWS = {
    "base": ("zero", 0, "base"),
    "RL": ("zero", -1, "zero"),
    "RL, no thinking (control)": ("control", -1, "control"),
}
"""Stage and place of an evaluation during training, and the stage whose model is evaluated."""
COLUMNS = {
    "sampled": ".1%", "greedy": ".1%", "pass@1": ".1%", "maj@16": ".1%", "length": ".1f",
    "reflects": ".2%",
}  # fmt: skip


def measure(seed: int, overrides: list[str]) -> dict[str, Any]:
    """Runs one seed to its end and reads what it measured on held-out problems."""
    name = "r1_zero" if seed == 0 else f"r1_zero_seed{seed}"
    folder = REPO / "runs" / name
    noted = folder / "minutes.json"
    is_new = not folder.exists()
    start = time.perf_counter()
    command = [sys.executable, "-m", "alignjax", "demo", "r1-zero"]
    subprocess.run([*command, f"seed={seed}", f"name={name}", *overrides], check=True, cwd=REPO)
    if is_new:
        noted.write_text(json.dumps((time.perf_counter() - start) / 60))
    minutes = json.loads(noted.read_text()) if noted.exists() else None
    result: dict[str, Any] = {"seed": seed, "minutes": minutes}
    for name, (stage, index, model) in ROWS.items():
        row, figures = evaluations(folder / stage)[index], final(folder, model)
        result[name] = {
            "sampled": row["eval/sampled/accuracy"],
            "greedy": row["eval/greedy/accuracy"],
            "length": row["eval/sampled/mean_length"],
            "pass@1": figures["pass@1"],
            "maj@16": figures["maj@16"],
            "reflects": figures["parts"]["reflects"],
        }
    names = ("step", *(f"eval/sampled/{name}" for name in ("accuracy", "mean_length", "reflects")))
    result["over_steps"] = {
        name: [row[name] for row in evaluations(folder / "zero")] for name in names
    }
    differences = [
        row["sampling/sampling_logp_difference/max"]
        for line in (folder / "zero" / "metrics.jsonl").read_text().splitlines()
        if "sampling/sampling_logp_difference/max" in (row := json.loads(line))
    ]
    result["max_logp_difference"] = max(differences)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="key=value, for trying things out")
    args = parser.parse_intermixed_args()
    results = [measure(seed, args.overrides) for seed in args.seeds]
    write(RESULTS / "r1_zero.json", {"num_problems": 512, "seeds": results})
    rows = {
        name: [
            {key: v["mean"] if isinstance(v, dict) else v for key, v in result[name].items()}
            for result in results
        ]
        for name in ROWS
    }
    print(table(rows, COLUMNS))
    for result in results:
        print(f"seed {result['seed']}: {json.dumps(result['over_steps'])}")


if __name__ == "__main__":
    main()
