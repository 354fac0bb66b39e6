"""The demo with several seeds, each with a base model of its own -> a table and a JSON file.

    python benchmarks/r1_zero.py --seeds 0 1 2

Runs go to runs/, that of seed 0 to where `make demo` puts it. What is finished is not run again,
and its time is then the one that was noted when it was run, or unknown.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

from record import REPO, RESULTS, write

from alignjax.recipes.r1_zero import evaluations, final

ROWS = {
    "base": ("zero", 0, "base"),
    "RL": ("zero", -1, "zero"),
    "RL, no thinking (control)": ("control", -1, "control"),
}
"""Stage and place of an evaluation during training, and the stage whose model is evaluated."""


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
    result["reflects_over_steps"] = [
        [row["step"], row["eval/sampled/reflects"]] for row in evaluations(folder / "zero")
    ]
    differences = [
        row["sampling/sampling_logp_difference/max"]
        for line in (folder / "zero" / "metrics.jsonl").read_text().splitlines()
        if "sampling/sampling_logp_difference/max" in (row := json.loads(line))
    ]
    result["max_logp_difference"] = max(differences)
    return result


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: a line for each seed, and the mean with the range."""
    head = ["seed"]
    head += [f"{name}: {key}" for name in ROWS for key in ("sampled", "greedy", "length")]
    head += ["minutes"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    columns: list[list[float]] = [[] for _ in head[1:]]
    for result in results:
        values = [result[name][key] for name in ROWS for key in ("sampled", "greedy", "length")]
        values += [] if result["minutes"] is None else [result["minutes"]]
        for column, value in zip(columns, values, strict=False):
            column.append(value)
        lines.append(_line(str(result["seed"]), [[v] for v in values]))
    lines.append(_line("mean (range)", columns))
    return "\n".join(lines) + "\n"


def _line(label: str, columns: list[list[float]]) -> str:
    cells = []
    for i, values in enumerate(filter(None, columns)):
        is_share = i % 3 != 2 and i < len(columns) - 1
        text = "{:.1%}" if is_share else "{:.1f}"
        cell = text.format(statistics.mean(values))
        if len(values) > 1:
            cell += f" ({text.format(min(values))} to {text.format(max(values))})"
        cells.append(cell)
    return f"| {label} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("overrides", nargs="*", help="key=value, for trying things out")
    args = parser.parse_intermixed_args()
    results = [measure(seed, args.overrides) for seed in args.seeds]
    write(RESULTS / "r1_zero.json", {"num_problems": 512, "seeds": results})
    print(table(results))


if __name__ == "__main__":
    main()
