"""A store -> how far the ranking is, who did what, and how far people agree."""

from __future__ import annotations

from collections import Counter
from typing import Any

from alignjax.web.agreement import agreement
from alignjax.web.store import Store


def summary(store: Store) -> dict[str, Any]:
    """How far everything is, who did what, and how far people agree: JSON values."""
    judgements = store.judgements()
    counts = Counter((found.annotator, found.kind) for found in judgements)
    flags = Counter(found.annotator for found in judgements if found.flagged)
    ranked = [(f.task, f.annotator, f.ranks) for f in judgements if f.ranks is not None]
    return {
        "tasks": store.num_tasks,
        "ranked": store.count(),
        "rankings": len(ranked),
        "annotators": [
            {"name": name, "ranked": counts[name, "rank"], "skipped": counts[name, "skip"],
             "flagged": flags[name]}
            for name in sorted({annotator for annotator, _ in counts})
        ],
        "agreement": agreement(ranked)._asdict(),
    }  # fmt: skip
