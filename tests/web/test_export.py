"""Rankings -> preference records, which read back."""

import json

import pytest

from alignjax.core.errors import UserError
from alignjax.data import open_source
from alignjax.web import Task, open_store, read_tasks, write_rankings

TASKS = [
    Task("first", ("a", "b", "ä\u2028"), {"id": 7, "topic": "x"}),
    Task([{"role": "user", "content": "second"}], ("c", "d")),
    Task("third", ("e", "f")),
]


@pytest.fixture
def store(tmp_path):
    store = open_store(tmp_path / "s.sqlite", TASKS)
    for name, ranks in (("bob", [1, 2, 2]), ("ann", [3, 1, 2])):
        store.rank(name, store.next_task(name, overlap=3), ranks, request=f"{name}-first")
    task = store.next_task("ann", overlap=3)
    store.rank("ann", task, [2, 1], comment="hm", flagged=True, request="ann-second")
    store.skip("ann", store.next_task("ann", overlap=3), request="ann-third")
    return store


def test_records(store, tmp_path):
    path = tmp_path / "out.jsonl"
    assert write_rankings(store, path) == 3
    source = open_source(str(path))
    rows = [source[i] for i in range(len(source))]
    assert all(row.pop("time").endswith("Z") for row in rows)
    assert rows == [
        {"prompt": "first", "responses": ["a", "b", "ä\u2028"], "ranks": [3, 1, 2],
         "annotator": "ann", "id": 7, "topic": "x"},
        {"prompt": "first", "responses": ["a", "b", "ä\u2028"], "ranks": [1, 2, 2],
         "annotator": "bob", "id": 7, "topic": "x"},
        {"prompt": [{"role": "user", "content": "second"}], "responses": ["c", "d"],
         "ranks": [2, 1], "annotator": "ann", "comment": "hm", "flagged": True},
    ]  # fmt: skip
    assert list(tmp_path.glob("*.part")) == []


def test_an_export_may_be_ranked_again(store, tmp_path):
    path = tmp_path / "out.jsonl"
    write_rankings(store, path)
    assert read_tasks(str(path)) == [TASKS[0], TASKS[0], TASKS[1]]


def test_faults(store, tmp_path):
    with pytest.raises(UserError, match=r"expected a name that ends in \.jsonl"):
        write_rankings(store, tmp_path / "out.json")
    with pytest.raises(UserError, match="no such folder"):
        write_rankings(store, tmp_path / "no" / "out.jsonl")
    empty = open_store(tmp_path / "e.sqlite", TASKS)
    (tmp_path / "out.jsonl").write_text(json.dumps("before"))
    with pytest.raises(UserError, match=r"nothing is ranked in .*e\.sqlite yet"):
        write_rankings(empty, tmp_path / "out.jsonl")
    assert (tmp_path / "out.jsonl").read_text() == '"before"'
