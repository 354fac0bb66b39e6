"""Seconds of runs -> medians, shares of what the machine can do, ratios; a table of them."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Row = dict[str, Any]


def row(
    library: str,
    variant: str,
    replies: Sequence[Mapping[str, Any]],
    *,
    prepare_s: float,
    num_warm_up: int,
    work: Mapping[str, float],
    limits: Mapping[str, float],
) -> Row:
    """What is kept of a worker's runs.

    Args:
      replies: of `Gate.next`, of all runs.
      prepare_s: seconds from the start of the process until it was ready.
      num_warm_up: first runs that do not count; what they took beyond others is warm-up.
      work: `flops` and `bytes` of a run.
      limits: `flops` and `bytes` that the machine does in a second.
    """
    first, others = replies[:num_warm_up], replies[num_warm_up:]
    seconds = [reply["seconds"] for reply in others]
    middle = median(seconds)
    speed = median(reply["tokens"] / reply["seconds"] for reply in others)
    found: Row = {
        "library": library,
        "variant": variant,
        "seconds": {"median": middle, "min": min(seconds), "max": max(seconds), "all": seconds},
        "tokens": [reply["tokens"] for reply in replies],
        "tokens_per_second": speed,
        "warm_up_seconds": prepare_s + sum(r["seconds"] - middle for r in first),
        "peak_gib": max(reply["peak_bytes"] for reply in replies) / 2**30,
        "flops_share": work["flops"] / middle / limits["flops"] if limits["flops"] else None,
        "bytes_share": None,
    }
    if work["bytes"] and limits["bytes"]:
        found["bytes_share"] = work["bytes"] / middle / limits["bytes"]
    if "loss" in replies[0]:
        found["first_loss"] = replies[0]["loss"]
    return found


def failed(library: str, variant: str, error: str) -> Row:
    return {"library": library, "variant": variant, "error": error}


def disagreements(
    rows: Sequence[Row], expected_tokens: int | None, has_same_loss: bool
) -> list[str]:
    """What is not the same work: other numbers of tokens, or another loss in the first step.

    Args:
      expected_tokens: of every run; None where the libraries choose their batches.
      has_same_loss: the first loss is to agree in float32, to 4 digits.
    """
    done = [r for r in rows if "error" not in r]
    found = [
        f"{r['library']} {r['variant']}: {sorted(set(r['tokens']))} tokens in a run, expected "
        f"{expected_tokens}"
        for r in done
        if expected_tokens is not None and set(r["tokens"]) != {expected_tokens}
    ]
    losses = [r for r in done if has_same_loss and r["variant"] != "bfloat16"]
    for r in losses[1:]:
        first = losses[0]["first_loss"]
        if abs(r["first_loss"] / first - 1) > 1e-4:
            found.append(
                f"{r['library']} {r['variant']}: first loss {r['first_loss']:.6g}, of "
                f"{losses[0]['library']} {first:.6g}"
            )
    return found


def ratios(rows: Sequence[Row], ours: str = "alignjax") -> dict[str, dict[str, float]]:
    """How many times as fast as a peer at its best we are: peer -> variant of ours -> ratio of the
    tokens per second."""
    done = [r for r in rows if "error" not in r]
    mine = {r["variant"]: r["tokens_per_second"] for r in done if r["library"] == ours}
    best: dict[str, float] = {}
    for r in done:
        if r["library"] != ours:
            best[r["library"]] = max(best.get(r["library"], 0.0), r["tokens_per_second"])
    return {
        peer: {variant: speed / theirs for variant, speed in mine.items()}
        for peer, theirs in best.items()
    }


HEADINGS = ("", "seconds", "min .. max", "tokens/s", "peak GiB", "warm-up s", "FLOPs", "bytes")


def table(
    title: str,
    rows: Sequence[Row],
    targets: Mapping[str, float],
    problems: Sequence[str] = (),
) -> str:
    """Lines for a terminal: a row for each variant, then the ratios with their targets."""
    cells = [HEADINGS, *(_cells(r) for r in rows if "error" not in r)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADINGS))]
    lines = [title]
    for first, *rest in cells:
        right = (cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *right]).rstrip())
    for r in rows:
        if "error" in r:
            lines.append(f"{r['library']} {r['variant']}: {r['error'].splitlines()[0]}")
    for r in rows:
        if "warm_up_from_disk_seconds" in r:
            found = r["warm_up_from_disk_seconds"]
            lines.append(f"{r['library']} {r['variant']}: warm-up from disk {found:.1f} s")
    for peer, found in ratios(rows).items():
        text = ", ".join(f"{ratio:.2f}x in {variant}" for variant, ratio in found.items())
        if peer in targets and "float32" in found:
            is_met = found["float32"] >= targets[peer]
            text += f"; meant to be {targets[peer]:g}x: {'met' if is_met else 'not met'}"
        lines.append(f"as fast as {peer} at its best: {text}")
    lines += [f"NOT THE SAME WORK: {problem}" for problem in problems]
    return "\n".join(lines)


def _cells(r: Row) -> tuple[str, ...]:
    seconds = r["seconds"]

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return (
        f"{r['library']} {r['variant']}",
        f"{seconds['median']:.3g}",
        f"{seconds['min']:.3g} .. {seconds['max']:.3g}",
        f"{r['tokens_per_second']:.0f}",
        f"{r['peak_gib']:.2f}",
        f"{r['warm_up_seconds']:.1f}",
        share(r["flops_share"]),
        share(r["bytes_share"]),
    )
