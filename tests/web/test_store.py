"""The store: what was said stays, in order; tasks are dealt out; nothing is mixed."""

import sqlite3
import threading

import pytest

from alignjax.core.errors import UserError
from alignjax.web import Task, open_store
from alignjax.web import store as store_module

TASKS = [Task(f"prompt {i}", ("a", "b", "c")) for i in range(6)]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "s.sqlite"


@pytest.fixture
def store(path):
    return open_store(path, TASKS)


def kinds(path):
    """All events as they lie in the file."""
    return sqlite3.connect(path).execute("SELECT annotator, task, kind FROM events").fetchall()


def test_a_ranking_is_kept(store, path):
    task = store.next_task("ann")
    store.rank("ann", task, [2, 1, 2], comment="hm", flagged=True, request="request-1")
    store.close()
    (found,) = open_store(path, TASKS).judgements()
    assert found[:6] == (task, "ann", "rank", [2, 1, 2], "hm", True)
    assert found.time.endswith("Z") and len(found.time) == 20


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([1, 3, 3], [1, 2, 2]),
        ([3, 3, 3], [1, 1, 1]),
        ([3, 1, 2], [3, 1, 2]),
        ([2, 1, 1], [2, 1, 1]),
    ],
)
def test_gaps_between_ranks_are_closed(store, given, kept):
    store.rank("ann", store.next_task("ann"), given, request="request-1")
    assert store.judgements()[0].ranks == kept


@pytest.mark.parametrize(
    "ranks", [[1, 2], [1, 2, 3, 4], [0, 1, 2], [1, 2, 4], [1, 2, None], [1, 2, True], [1, 2, 1.5]]
)
def test_what_is_no_ranking_is_refused(store, ranks):
    task = store.next_task("ann")
    with pytest.raises(UserError, match=r"expected 3 whole numbers|no rank yet"):
        store.rank("ann", task, ranks, request="request-1")
    assert store.judgements() == [] and store.draft("ann", task) is None


def test_a_request_that_comes_again_changes_nothing(store, path):
    task = store.next_task("ann")
    for _ in range(2):
        store.rank("ann", task, [1, 2, 3], request="request-1")
    store.rank("ann", task, [3, 2, 1], request="request-1")
    assert store.judgements()[0].ranks == [1, 2, 3]
    assert kinds(path) == [("ann", task, "open"), ("ann", task, "rank")]
    assert store.undo("ann", request="request-2") == task
    assert store.undo("ann", request="request-2") == task
    assert len(kinds(path)) == 3


def test_undo_takes_back_one_after_the_other_and_loses_nothing(store, path):
    tasks = []
    for i in range(3):
        tasks.append(store.next_task("ann"))
        store.rank("ann", tasks[-1], [i + 1, 1, 3], comment=f"{i}", request=f"request-{i}")
    assert len(set(tasks)) == 3 and store.count("ann") == 3
    assert store.undo("ann", request="undo-one") == tasks[2]
    assert store.undo("ann", request="undo-two") == tasks[1]
    assert store.count("ann") == 1
    # What was taken back is what is open again, as it was; and it is first in line.
    assert store.next_task("ann") == tasks[1]
    draft = store.draft("ann", tasks[1])
    assert (draft["ranks"], draft["comment"]) == ([2, 1, 3], "1")
    store.rank("ann", tasks[1], [1, 1, 1], request="again-one")
    assert store.next_task("ann") == tasks[2]
    assert [found.ranks for found in store.judgements()] == [[1, 1, 2], [1, 1, 1]]
    assert [kind for _, _, kind in kinds(path)].count("rank") == 4
    assert store.undo("bob", request="undo-three") is None


def test_a_full_disk_leaves_nothing_half_done(store, path):
    """It fails while it is written; once there is room, the same call does it."""
    task = store.next_task("ann")
    db = store._db
    db.rows(f"PRAGMA max_page_count = {db.value('PRAGMA page_count')}")
    with pytest.raises(sqlite3.OperationalError, match="full"):
        store.rank("ann", task, [1, 2, 3], comment="x" * 100_000, request="request-1")
    assert store.judgements() == [] and store.next_task("ann") == task
    db.rows("PRAGMA max_page_count = 1000000")
    store.rank("ann", task, [1, 2, 3], comment="x" * 100_000, request="request-1")
    assert len(store.judgements()[0].comment) == 100_000


def test_a_commit_that_fails_is_taken_back(store):
    """As when the disk fills up at the very end: the store goes on working."""
    task, inner = store.next_task("ann"), store._db._db

    class Failing:
        in_transaction = property(lambda self: inner.in_transaction)

        def execute(self, statement, *values):
            if statement == "COMMIT":
                raise sqlite3.OperationalError("disk I/O error")
            return inner.execute(statement, *values)

    store._db._db = Failing()
    with pytest.raises(sqlite3.OperationalError, match="disk I/O"):
        store.rank("ann", task, [1, 2, 3], request="request-1")
    store._db._db = inner
    assert store.judgements() == []
    store.rank("ann", task, [1, 2, 3], request="request-1")
    assert len(store.judgements()) == 1


def test_events_can_only_be_appended(store, path):
    store.next_task("ann")
    with sqlite3.connect(path) as db:
        for statement in ("DELETE FROM events", "UPDATE events SET annotator = 'bob'"):
            with pytest.raises(sqlite3.IntegrityError, match="only appended"):
                db.execute(statement)


def test_it_is_as_durable_as_sqlite_can_be(store):
    assert store._db.value("PRAGMA journal_mode") == "wal"
    assert store._db.value("PRAGMA synchronous") == 2  # FULL


def test_drafts_are_kept(store, path):
    task = store.next_task("ann")
    store.save_draft(
        "ann", task, [None, 1, None], comment="so far", flagged=True, request="draft-01"
    )
    store.close()
    store = open_store(path, TASKS)
    assert store.next_task("ann") == task
    draft = store.draft("ann", task)
    assert draft.pop("order") == store.order("ann", task)
    assert draft == {"ranks": [None, 1, None], "comment": "so far", "flagged": True}
    assert store.draft("bob", task) is None and store.judgements() == []


def test_a_late_draft_does_not_reopen(store):
    task = store.next_task("ann")
    store.rank("ann", task, [1, 2, 3], request="request-1")
    store.save_draft("ann", task, [None, 1, None], comment="", flagged=False, request="draft-01")
    assert store.judgements()[0].ranks == [1, 2, 3] and store.next_task("ann") != task


def test_tasks_are_dealt_out(store):
    tasks = [store.next_task(name) for name in ("ann", "bob", "cem")]
    assert tasks == [0, 1, 2]
    assert [store.next_task(name) for name in ("cem", "bob", "ann")] == [2, 1, 0]
    store.rank("bob", 1, [1, 2, 3], request="request-1")
    assert store.next_task("bob") == 3


def test_what_one_skips_another_gets(store):
    assert store.next_task("ann") == 0
    store.skip("ann", 0, request="request-1")
    assert store.next_task("ann") == 1
    assert store.next_task("bob") == 0
    store.rank("bob", 0, [1, 2, 3], request="request-2")
    assert [f.kind for f in store.judgements()] == ["skip", "rank"]
    assert store.undo("ann", request="request-3") == 0


def test_everybody_gets_those_of_the_overlap(store):
    def all_of(name):
        tasks = []
        while (task := store.next_task(name, overlap=2)) is not None:
            tasks.append(task)
            store.rank(name, task, [1, 2, 3], request=f"{name}-{task:06}")
        return tasks

    ann, bob, cem = all_of("ann"), all_of("bob"), all_of("cem")
    assert sorted(ann) == list(range(6)) and ann[:2] == bob == cem and len(bob) == 2
    # A larger number keeps those of a smaller one.
    assert set(bob) < set(bob) | {store.next_task("bob", overlap=3)}
    assert store.next_task("bob", overlap=3) is not None
    assert store.count() == 6 and store.count("bob") == 2


def test_everything_overlaps(store):
    for name in ("ann", "bob"):
        for expected in range(6):
            assert store.next_task(name, overlap=100) == expected
            store.rank(name, expected, [1, 2, 3], request=f"{name}-{expected:06}")
        assert store.next_task(name, overlap=100) is None


def test_what_somebody_left_open_is_given_away_after_a_while(store, monkeypatch):
    for i in range(5):
        store.rank("ann", store.next_task("ann"), [1, 2, 3], request=f"request-{i}")
    assert store.next_task("ann") == 5
    assert store.next_task("bob") is None
    monkeypatch.setattr(store_module, "CLAIM_S", -1)
    assert store.next_task("bob") == 5
    for name in ("ann", "bob"):  # Both count; nothing is lost.
        store.rank(name, 5, [1, 2, 3], request=f"{name}-last")
    assert [f.annotator for f in store.judgements() if f.task == 5] == ["ann", "bob"]


def test_a_task_that_one_was_not_given_is_refused(store):
    with pytest.raises(UserError, match="task 3 was not given to 'ann'"):
        store.rank("ann", 3, [1, 2, 3], request="request-1")
    with pytest.raises(UserError, match="task 9: there are 0 to 5"):
        store.rank("ann", 9, [1, 2, 3], request="request-1")


def test_orders_differ_between_people_and_stay(path):
    tasks = [Task(f"{i}", tuple("abcdef")) for i in range(40)]
    store = open_store(path, tasks)
    orders = {(name, i): store.order(name, i) for name in ("ann", "bob") for i in range(40)}
    store.close()
    again = open_store(path, tasks)
    assert all(again.order(*key) == order for key, order in orders.items())
    assert all(sorted(order) == list(range(6)) for order in orders.values())
    assert sum(orders["ann", i] == orders["bob", i] for i in range(40)) <= 2
    # No place is preferred: 80 orders, 6 places, 13.3 each is expected, sigma 3.3.
    for response in range(6):
        firsts = sum(order[0] == response for order in orders.values())
        assert 1 <= firsts <= 27


def test_the_order_is_kept_with_the_ranking(store, path):
    store.rank("ann", store.next_task("ann"), [1, 2, 3], request="request-1")
    query = "SELECT json_extract(body, '$.order') FROM events WHERE kind = 'rank'"
    assert sqlite3.connect(path).execute(query).fetchone() == (
        str(store.order("ann", 0)).replace(" ", ""),
    )


def test_twenty_people_at_once(path):
    """Every task goes to one of them, and all that they say is there."""
    tasks = [Task(f"{i}", ("a", "b")) for i in range(200)]
    store, faults = open_store(path, tasks), []

    def work(name):
        try:
            while (task := store.next_task(name)) is not None:
                store.rank(name, task, [1, 2], request=f"{name}-{task:06}")
        except Exception as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(f"person {i}",)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [found.task for found in store.judgements()] == list(range(200))


def test_two_processes_share_a_store(store, path):
    """Two connections stand for them: neither gets what the other has."""
    other = open_store(path, TASKS)
    assert [s.next_task(n) for s, n in ((store, "ann"), (other, "bob"), (store, "cem"))] == [
        0,
        1,
        2,
    ]
    other.rank("bob", 1, [1, 2, 3], request="request-1")
    assert store.count() == 1


def test_a_store_of_other_tasks_is_refused(store, path):
    store.close()
    for others in (TASKS[:5], [*TASKS[:5], Task("prompt 5", ("a", "b", "d"))]):
        with pytest.raises(UserError, match=r"made for other prompts or responses .6 tasks; given"):
            open_store(path, others)
    assert open_store(path, None).num_tasks == 6


def test_what_is_no_store_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello " * 200)
    with pytest.raises(UserError, match="cannot be used as an SQLite file"):
        open_store(tmp_path / "text", TASKS)
    with sqlite3.connect(tmp_path / "other") as db:
        db.execute("CREATE TABLE precious (x)")
    before = (tmp_path / "other").read_bytes()
    with pytest.raises(UserError, match="a database, but not one that label made"):
        open_store(tmp_path / "other", TASKS)
    assert (tmp_path / "other").read_bytes() == before
    with pytest.raises(UserError, match="no such file"):
        open_store(tmp_path / "none", None)
    with pytest.raises(UserError, match="unable to open"):
        open_store(tmp_path / "no" / "folder", TASKS)
    open_store(tmp_path / "later", TASKS)._db.rows("PRAGMA user_version = 2")
    with pytest.raises(UserError, match="has format 2, expected 1"):
        open_store(tmp_path / "later", TASKS)


def test_one_that_was_killed_while_it_was_made_is_made_again(path):
    sqlite3.connect(path).execute("PRAGMA journal_mode = WAL")
    assert path.stat().st_size > 0
    assert open_store(path, TASKS).num_tasks == 6
