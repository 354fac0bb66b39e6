"""One SQLite file with the tables of a store: transactions that are on disk when they end."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignjax.core.errors import UserError

APPLICATION_ID = 0x616C6A78  # "aljx": whose file it is
VERSION = 1

SCHEMA = (
    "CREATE TABLE about (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "CREATE TABLE tasks (task INTEGER PRIMARY KEY, record TEXT NOT NULL) STRICT",
    """CREATE TABLE events (
         event INTEGER PRIMARY KEY AUTOINCREMENT,
         time TEXT NOT NULL,
         annotator TEXT NOT NULL,
         task INTEGER NOT NULL REFERENCES tasks,
         kind TEXT NOT NULL CHECK (kind IN ('open', 'draft', 'rank', 'skip', 'undo')),
         body TEXT,
         request TEXT UNIQUE
       ) STRICT""",
    "CREATE INDEX events_of ON events (annotator, task, event)",
    """CREATE TRIGGER no_update BEFORE UPDATE ON events
       BEGIN SELECT RAISE(ABORT, 'events are only appended'); END""",
    """CREATE TRIGGER no_delete BEFORE DELETE ON events
       BEGIN SELECT RAISE(ABORT, 'events are only appended'); END""",
    """CREATE TABLE state (
         annotator TEXT NOT NULL,
         task INTEGER NOT NULL REFERENCES tasks,
         kind TEXT NOT NULL CHECK (kind IN ('open', 'rank', 'skip')),
         event INTEGER NOT NULL REFERENCES events,
         seen REAL NOT NULL,
         PRIMARY KEY (annotator, task)
       ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX state_of ON state (task, kind)",
)
"""`events` is the record; `state` follows from it, and is kept in the same transactions so that
questions need not read all of it. In `state`, `seen` is a time in seconds since 1970."""


class Database:
    """A connection that threads share. Raises sqlite3.Error where SQLite does."""

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.RLock()
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=10)
        if self.value("PRAGMA application_id") == APPLICATION_ID or self.is_empty():
            self.rows("PRAGMA journal_mode = WAL")
            # A commit returns when the disk has it, so that a power cut loses nothing either.
            self.rows("PRAGMA synchronous = FULL")
            self.rows("PRAGMA foreign_keys = ON")

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def is_empty(self) -> bool:
        return self.value("SELECT count(*) FROM sqlite_master") == 0

    def make_tables(self) -> None:
        """Within a transaction."""
        for statement in SCHEMA:
            self.rows(statement)
        self.rows(f"PRAGMA application_id = {APPLICATION_ID}")
        self.rows(f"PRAGMA user_version = {VERSION}")

    def check(self) -> None:
        """Raises UserError unless the file has these tables."""
        if self.value("PRAGMA application_id") != APPLICATION_ID:
            raise UserError(f"--store {self.path}: a database, but not one that label made")
        if (version := self.value("PRAGMA user_version")) != VERSION:
            raise UserError(f"--store {self.path}: has format {version}, expected {VERSION}")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All or nothing, and on disk when it ends; other threads and processes wait."""
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:  # It failed, or the disk is full.
                    self._db.execute("ROLLBACK")

    def rows(self, query: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._db.execute(query, values).fetchall()

    def value(self, query: str, *values: Any) -> Any:
        """The first column of the first row; None if there is none."""
        rows = self.rows(query, *values)
        return rows[0][0] if rows else None
