"""Questions -> answers from an SQLite file, or from a judge, whose answers are on disk at once.

An answer is found by its content: digest of the template, what answered (a model by its digest),
the rendered text, the options. So a restart asks nothing again that was answered, and a change of
any of these asks anew. Answers that could not be understood are kept as well; errors are not.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from alignjax.core.errors import UserError
from alignjax.rewards.judge_answer import Answer, Ask, Question, Usage

APPLICATION_ID = 0x616C6A6A  # "aljj": whose file it is
FORMAT = 1
"""Part of each key: raise it when the same question is to be answered otherwise."""
IN_MEMORY = Path(":memory:")
"""The path of a cache that is gone when it is closed."""
_FEW = 500
"""Keys in one query."""


class AnswerCache:
    """An SQLite file of answers; threads and processes may share it. Closed by `close`."""

    def __init__(self, path: Path):
        """Raises: UserError: if it cannot be opened, or is not one of ours."""
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=60
            )
            found = self._value("PRAGMA application_id")
            if found != APPLICATION_ID and self._value("SELECT count(*) FROM sqlite_master"):
                raise UserError(f"judge.cache {path}: a database, but no cache of judgements")
            self._db.execute("PRAGMA journal_mode = WAL")
            # A commit returns when the disk has it, so that a power cut loses no paid answer.
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) "
                "STRICT, WITHOUT ROWID"
            )
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS spent (account TEXT PRIMARY KEY, requests INTEGER, "
                "prompt_tokens INTEGER, completion_tokens INTEGER) STRICT, WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"judge.cache {path}: cannot be used: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def find(self, keys: Sequence[str]) -> dict[str, Answer]:
        """Those of the keys that are there, with their answers."""
        found = {}
        for start in range(0, len(keys), _FEW):
            part = keys[start : start + _FEW]
            marks = ", ".join("?" * len(part))
            with self._lock:
                rows = self._db.execute(
                    f"SELECT key, answer FROM answers WHERE key IN ({marks})", part
                ).fetchall()
            found |= {key: _read(text) for key, text in rows}
        return found

    def add(self, account: str, answers: Mapping[str, Answer], spent: Usage) -> None:
        """Writes answers and what they cost, all or nothing, and on disk when it returns."""
        rows = [(key, _written(answer)) for key, answer in answers.items()]
        usage = (account, spent.num_requests, spent.prompt_tokens, spent.completion_tokens)
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                self._db.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", rows)
                self._db.execute(
                    "INSERT INTO spent VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET "
                    "requests = requests + excluded.requests, "
                    "prompt_tokens = prompt_tokens + excluded.prompt_tokens, "
                    "completion_tokens = completion_tokens + excluded.completion_tokens",
                    usage,
                )
                self._db.execute("COMMIT")
            except sqlite3.Error as error:
                raise UserError(f"judge.cache {self.path}: cannot be written: {error}") from error
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    def spent(self, account: str) -> Usage:
        """What was used up under an account so far."""
        columns = "requests, prompt_tokens, completion_tokens"
        with self._lock:
            row = self._db.execute(
                f"SELECT {columns} FROM spent WHERE account = ?", (account,)
            ).fetchone()
        return Usage() if row is None else Usage(*row)

    def _value(self, query: str) -> int:
        return self._db.execute(query).fetchone()[0]


class CachedAsk:
    """An `Ask` that asks another one what the cache does not know, each question once.

    Attributes:
      num_found, num_asked: questions that the cache knew, and that were asked, so far.
    """

    def __init__(self, ask: Ask, cache: AnswerCache, *, identity: str, account: str):
        """Args:
        identity: of what answers, as far as its answers depend on it.
        account: under which its usage is counted.
        """
        self._ask, self._cache = ask, cache
        self._identity, self._account = identity, account
        self.num_found = self.num_asked = 0

    def __call__(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer]]:
        places: dict[str, list[int]] = {}
        for place, question in enumerate(questions):
            places.setdefault(digest(question, self._identity), []).append(place)
        known = self._cache.find([*places])
        self.num_found += len(known)
        if known:
            yield {place: answer for key, answer in known.items() for place in places[key]}
        unknown = [key for key in places if key not in known]
        if not unknown:
            return
        for chunk in self._ask([questions[places[key][0]] for key in unknown]):
            answers = {unknown[i]: answer for i, answer in chunk.items()}
            spent = sum((answer.usage for answer in answers.values()), Usage())
            kept = {key: answer for key, answer in answers.items() if answer.error is None}
            self._cache.add(self._account, kept, spent)
            self.num_asked += len(answers)
            yield {place: answer for key, answer in answers.items() for place in places[key]}


def digest(question: Question, identity: str) -> str:
    """SHA-256, hexadecimal, of all that an answer depends on."""
    content = [
        FORMAT, identity, question.template, question.text, question.options, question.cue,
        question.attempt,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _written(answer: Answer) -> str:
    """JSON, with null for a log-prob of -inf."""
    logps = answer.logps
    if logps is not None:
        logps = [one if math.isfinite(one) else None for one in logps]  # type: ignore[assignment]
    usage = answer.usage
    spent = [usage.num_requests, usage.prompt_tokens, usage.completion_tokens]
    return json.dumps({"text": answer.text, "logps": logps, "usage": spent})


def _read(text: str) -> Answer:
    found = json.loads(text)
    logps = found["logps"]
    if logps is not None:
        logps = tuple(-math.inf if one is None else one for one in logps)
    return Answer(found["text"], logps, Usage(*found["usage"]))
