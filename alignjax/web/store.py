"""Tasks and what people did with them <-> one SQLite file that loses nothing it acknowledged.

What was done is an event, appended and never changed; taking something back is an event too.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.core.errors import UserError
from alignjax.web.database import Database
from alignjax.web.tasks import Task, digest

CLAIM_S = 30 * 60
"""After so many seconds without a sign of its owner, a task may be given to somebody else."""


class Judgement(NamedTuple):
    """What one person last said of one task."""

    task: int
    annotator: str
    kind: str
    """rank or skip."""
    ranks: list[int] | None
    """1 is best, equal a tie; one for each response, in the task's own order. None if skipped."""
    comment: str
    flagged: bool
    time: str
    """ISO 8601, UTC."""


def open_store(path: Path, tasks: Sequence[Task] | None) -> Store:
    """Opens a store, or makes one.

    Args:
      path: the SQLite file.
      tasks: those it has to be of; None takes the ones that it holds.
    Raises:
      UserError: if the file is no store, or one of other tasks; if there is none and `tasks` is
        None.
    """
    if tasks is None and not path.exists():
        raise UserError(f"--store: no such file: {path}; name the responses too, to make one")
    try:
        db = Database(path)
        if db.is_empty():
            _create(db, tasks or ())
        db.check()
        store = Store(db)
    except sqlite3.Error as error:
        raise UserError(f"--store {path}: cannot be used as an SQLite file: {error}") from error
    if tasks is not None and digest(tasks) != store.digest:
        raise UserError(
            f"--store {path}: made for other prompts or responses ({store.num_tasks} tasks; given "
            f"are {len(tasks)}), or the files were changed since; rankings are never mixed: name "
            "another store, or leave the files out to go on with the tasks of this one"
        )
    return store


def _create(db: Database, tasks: Sequence[Task]) -> None:
    with db.transaction():
        db.make_tables()
        db.rows("INSERT INTO about VALUES ('digest', ?)", digest(tasks))
        for i, task in enumerate(tasks):
            db.rows("INSERT INTO tasks VALUES (?, ?)", i, task.to_json())


class Store:
    """See `open_store`. Every method may be called from any thread; what it returned is on disk."""

    def __init__(self, db: Database):
        self._db = db
        self.path = db.path
        self.digest: str = db.value("SELECT value FROM about WHERE key = 'digest'")
        self.num_tasks: int = db.value("SELECT count(*) FROM tasks")
        """Both are of the tasks, which never change."""
        self._everybody: dict[int, list[int]] = {}  # overlap -> the tasks that everybody gets

    def close(self) -> None:
        self._db.close()

    # What there is.

    def task(self, task: int) -> Task:
        record = self._db.value("SELECT record FROM tasks WHERE task = ?", task)
        if record is None:
            raise UserError(f"task {task}: there are 0 to {self.num_tasks - 1}")
        return Task.from_json(record)

    def order(self, annotator: str, task: int) -> list[int]:
        """In which order this person sees the responses: always the same, unlike for others."""
        return self._shuffled(range(len(self.task(task).responses)), annotator, str(task))

    def draft(self, annotator: str, task: int) -> dict[str, Any] | None:
        """What this person last chose for a task: `ranks` (null where none), comment, flagged."""
        body = self._db.value(
            "SELECT body FROM events WHERE annotator = ? AND task = ? AND body IS NOT NULL "
            "ORDER BY event DESC LIMIT 1",
            annotator, task,
        )  # fmt: skip
        return None if body is None else json.loads(body)

    def judgements(self) -> list[Judgement]:
        """All that is in force, by task, then annotator."""
        rows = self._db.rows(
            "SELECT state.task, state.annotator, state.kind, body, time FROM state "
            "JOIN events USING (event) WHERE state.kind != 'open' "
            "ORDER BY state.task, state.annotator"
        )
        found = []
        for task, annotator, kind, text, time in rows:
            body = json.loads(text)
            ranks = body["ranks"] if kind == "rank" else None
            found.append(
                Judgement(task, annotator, kind, ranks, body["comment"], body["flagged"], time)
            )
        return found

    def count(self, annotator: str | None = None) -> int:
        """Tasks that were ranked: by this person, or by anybody."""
        if annotator is None:
            return self._db.value("SELECT count(DISTINCT task) FROM state WHERE kind = 'rank'")
        return self._db.value(
            "SELECT count(*) FROM state WHERE kind = 'rank' AND annotator = ?", annotator
        )

    # What people do.

    def next_task(self, annotator: str, overlap: int = 0) -> int | None:
        """The task that this person is to rank now, theirs from here on; None if none is left.

        First one that they have open; then those for everybody; then one that nobody has; last one
        that somebody left open for more than `CLAIM_S`.

        Args:
          annotator: who asks.
          overlap: how many tasks everybody ranks. A larger number includes those of a smaller one.
        """
        if overlap not in self._everybody:
            shuffled = self._shuffled(range(self.num_tasks), "overlap")
            self._everybody[overlap] = sorted(shuffled[:overlap])
        with self._db.transaction():
            own = self._db.value(
                "SELECT task FROM state WHERE annotator = ? AND kind = 'open' "
                "ORDER BY event DESC LIMIT 1",
                annotator,
            )
            if own is not None:
                return own
            task = self._first_free(annotator, self._everybody[overlap])
            if task is not None:
                self._append(annotator, task, "open")
            return task

    def _first_free(self, annotator: str, everybody: list[int]) -> int | None:
        seen = {
            t for (t,) in self._db.rows("SELECT task FROM state WHERE annotator = ?", annotator)
        }
        for task in everybody:
            if task not in seen:
                return task
        for oldest in (0.0, _now().timestamp() - CLAIM_S):
            taken = self._db.rows(
                "SELECT DISTINCT task FROM state "
                "WHERE kind = 'rank' OR (kind = 'open' AND seen > ?)",
                oldest,
            )
            gone = seen.union(everybody, (task for (task,) in taken))
            free = next((t for t in range(self.num_tasks) if t not in gone), None)
            if free is not None:
                return free
        return None

    def save_draft(
        self, annotator: str, task: int, ranks: Sequence[int | None], *, comment: str,
        flagged: bool, request: str,
    ) -> None:  # fmt: skip
        """Keeps what somebody has chosen so far. `request` as in `rank`."""
        self._check_ranks(task, ranks)
        self._say(annotator, task, "draft", list(ranks), comment, flagged, request)

    def rank(
        self, annotator: str, task: int, ranks: Sequence[int], *, comment: str = "",
        flagged: bool = False, request: str,
    ) -> None:  # fmt: skip
        """Keeps a ranking; it replaces what this person said of the task before.

        Args:
          annotator: whose it is.
          task: one that `next_task` gave them.
          ranks: one for each response in the task's own order: 1 is best, equal is a tie. Gaps are
            closed: 1, 3, 3 is kept as 1, 2, 2.
          comment: anything.
          flagged: whether something is wrong with the task.
          request: an id of this call. A second call with it changes nothing, so that whoever heard
            no answer may ask again.
        Raises:
          UserError: if it is no ranking of this task.
        """
        self._check_ranks(task, ranks)
        if any(rank is None for rank in ranks):
            raise UserError("a response has no rank yet")
        levels = sorted(set(ranks))
        dense = [levels.index(rank) + 1 for rank in ranks]
        self._say(annotator, task, "rank", dense, comment, flagged, request)

    def skip(
        self, annotator: str, task: int, *, comment: str = "", flagged: bool = False, request: str
    ) -> None:
        """This person does not rank the task; unless it is for everybody, somebody else will."""
        draft = self.draft(annotator, task)
        ranks = [None] * len(self.task(task).responses) if draft is None else draft["ranks"]
        self._say(annotator, task, "skip", ranks, comment, flagged, request)

    def undo(self, annotator: str, *, request: str) -> int | None:
        """Takes back this person's last ranking or skip; the task is open again, as it was.

        Returns:
          The task; None if there is nothing to take back.
        """
        with self._db.transaction():
            done = self._db.value("SELECT task FROM events WHERE request = ?", request)
            if done is not None:
                return done
            task = self._db.value(
                "SELECT task FROM state WHERE annotator = ? AND kind != 'open' "
                "ORDER BY event DESC LIMIT 1",
                annotator,
            )
            if task is not None:
                body = json.dumps(self.draft(annotator, task), ensure_ascii=False)
                self._append(annotator, task, "undo", body, request)
            return task

    def _check_ranks(self, task: int, ranks: Sequence[int | None]) -> None:
        num = len(self.task(task).responses)
        is_good = all(rank is None or (type(rank) is int and 1 <= rank <= num) for rank in ranks)
        if len(ranks) != num or not is_good:
            raise UserError(f"ranks {list(ranks)}: expected {num} whole numbers from 1 to {num}")

    def _say(
        self, annotator: str, task: int, kind: str, ranks: list[int | None], comment: str,
        flagged: bool, request: str,
    ) -> None:  # fmt: skip
        body = {
            "ranks": ranks, "comment": comment, "flagged": flagged,
            "order": self.order(annotator, task),
        }  # fmt: skip
        with self._db.transaction():
            if self._db.value("SELECT 1 FROM events WHERE request = ?", request):
                return
            state = "SELECT kind FROM state WHERE annotator = ? AND task = ?"
            if self._db.value(state, annotator, task) is None:
                raise UserError(f"task {task} was not given to {annotator!r}")
            self._append(annotator, task, kind, json.dumps(body, ensure_ascii=False), request)

    def _append(
        self, annotator: str, task: int, kind: str, body: str | None = None,
        request: str | None = None,
    ) -> None:  # fmt: skip
        now = _now()
        time = now.isoformat(timespec="seconds").replace("+00:00", "Z")
        event = self._db.value(
            "INSERT INTO events (time, annotator, task, kind, body, request) "
            "VALUES (?, ?, ?, ?, ?, ?) RETURNING event",
            time, annotator, task, kind, body, request,
        )  # fmt: skip
        if kind == "draft":  # A sign of life; a draft that comes late reopens nothing.
            self._db.rows(
                "UPDATE state SET seen = ? WHERE annotator = ? AND task = ?",
                now.timestamp(), annotator, task,
            )  # fmt: skip
            return
        state = "open" if kind == "undo" else kind
        self._db.rows(
            "INSERT INTO state VALUES (?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
            "SET kind = excluded.kind, event = excluded.event, seen = excluded.seen",
            annotator, task, state, event, now.timestamp(),
        )  # fmt: skip

    def _shuffled(self, items: Sequence[int], *salt: str) -> list[int]:
        """The items in an order that depends on the tasks and the salt, and on nothing else."""
        key = json.dumps([self.digest, *salt])
        return sorted(items, key=lambda i: hashlib.sha256(f"{key}{i}".encode()).digest())


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
