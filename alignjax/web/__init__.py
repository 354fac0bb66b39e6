"""The labelling page: people rank responses, and what they said is preference data. No jax."""

from alignjax.web.agreement import Agreement, agreement, krippendorff_alpha
from alignjax.web.export import write_rankings
from alignjax.web.store import Judgement, Store, open_store
from alignjax.web.tasks import Task, read_tasks

__all__ = [
    "Agreement",
    "Judgement",
    "Store",
    "Task",
    "agreement",
    "krippendorff_alpha",
    "open_store",
    "read_tasks",
    "write_rankings",
]
