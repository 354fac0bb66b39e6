"""Both laptop recipes on real rankings of people -> what they learned, and in how many minutes.

    python benchmarks/rankings_laptop.py PAIRS

PAIRS is a file of hh-rlhf, such as harmless-base.jsonl.gz: 1,300 pairs train, 300 are held out.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import REPO, RESULTS, write

MEASURED = {
    "instructgpt_laptop": {
        "base": ("eval/loss",),
        "sft": ("eval/loss",),
        "reward": ("eval/accuracy", "eval/accuracy_low", "eval/accuracy_high", "eval/num_pairs"),
        "ppo": (
            "eval/sampled/reward", "eval/sampled/kl", "eval/sampled/mean_length",
            "eval/best_of_n/reward",
        ),
    },
    "dpo_laptop": {
        "dpo": (
            "eval/rewards/accuracies", "eval/rewards/accuracies_low",
            "eval/rewards/accuracies_high", "eval/loss",
        ),
    },
}  # fmt: skip


def measure(name: str, pairs: str) -> dict[str, Any]:
    """Runs a recipe from nothing; the first and the last evaluation of its stages."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "alignjax", "run", f"recipes/{name}", f"vars.pairs={pairs}"]
    subprocess.run(command, check=True, cwd=REPO)
    result: dict[str, Any] = {"minutes": (time.perf_counter() - start) / 60}
    for stage, names in MEASURED[name].items():
        path = REPO / "runs" / name / stage / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        seen = [row for row in rows if any(key in row for key in names)]
        result[stage] = {
            when: {key: row[key] for key in names if key in row}
            for when, row in (("before", seen[0]), ("after", seen[-1]))
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    pairs = str(parser.parse_args().pairs.resolve())
    results = {name: measure(name, pairs) for name in MEASURED}
    write(RESULTS / "rankings_laptop.json", results)
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
