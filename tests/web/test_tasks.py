"""Files of prompts and responses: what becomes a task, and what is refused with file and line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignjax.core.errors import UserError
from alignjax.web import Task, read_tasks
from alignjax.web.tasks import digest
from tests.web.app_case import write

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def test_one_file_has_both(tmp_path):
    rows = [
        {"prompt": "a", "responses": ["x", "y"], "id": 7, "scores": [1.0, 2.0], "comment": "old"},
        {"prompt": MESSAGES, "responses": ["x", "y", " z\n"]},
        {"messages": MESSAGES, "responses": ["x", "y"]},
    ]
    assert read_tasks(str(write(tmp_path / "r.jsonl", rows))) == [
        Task("a", ("x", "y"), {"id": 7}),
        Task(MESSAGES, ("x", "y", " z\n")),
        Task(MESSAGES, ("x", "y")),
    ]


def test_prompts_may_have_a_file_of_their_own(tmp_path):
    prompts = write(tmp_path / "p.jsonl", [{"prompt": "a", "of": "p"}, {"messages": MESSAGES}])
    rows = [{"responses": ["x", "y"], "of": "r"}, {"prompt": MESSAGES, "responses": ["u", "v"]}]
    responses = write(tmp_path / "r.jsonl", rows)
    assert read_tasks(str(responses), str(prompts)) == [
        Task("a", ("x", "y"), {"of": "r"}),
        Task(MESSAGES, ("u", "v")),
    ]
    write(tmp_path / "r.jsonl", [*rows, rows[0]])
    with pytest.raises(UserError, match=r"p\.jsonl has 2 records, .*r\.jsonl has 3"):
        read_tasks(str(responses), str(prompts))
    write(tmp_path / "r.jsonl", [rows[0], {"prompt": "other", "responses": ["u", "v"]}])
    with pytest.raises(UserError, match=r"r\.jsonl:2: its prompt is not the one that --prompts"):
        read_tasks(str(responses), str(prompts))


def test_parquet(tmp_path):
    table = pa.table({"prompt": ["a"], "responses": [["x", "y"]], "n": pa.array([3], pa.int8())})
    pq.write_table(table, tmp_path / "r.parquet")
    assert read_tasks(str(tmp_path / "r.parquet")) == [Task("a", ("x", "y"), {"n": 3})]


def test_a_task_survives_being_written_down():
    task = Task(MESSAGES, ("ä\u2028", "</script>"), {"k": [1, None]})
    assert Task.from_json(task.to_json()) == task
    assert digest([task]) == digest([Task.from_json(task.to_json())])
    assert digest([task]) != digest([Task(MESSAGES, ("</script>", "ä\u2028"), {"k": [1, None]})])
    assert digest([task, task]) != digest([task])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "responses": ["x"]}, "1 response; ranking takes at least 2"),
        ({"prompt": "a", "responses": []}, "0 response; ranking takes at least 2"),
        ({"prompt": "a", "responses": ["y", "x", "x"]}, "responses 2 and 3 are equal ('x')"),
        ({"prompt": "a", "responses": ["x", " \n"]}, "response 2 of 2 is empty; leave it out"),
        ({"prompt": "a", "responses": ["x", 3]}, "'responses': expected a list of texts, came ['x"),
        ({"prompt": "a"}, "'responses': expected a list of texts, came no such field"),
        ({"responses": ["x", "y"]}, "no prompt; expected a field 'prompt' or 'messages'"),
        ({"prompt": " ", "responses": ["x", "y"]}, "'prompt': expected text or messages, came an"),
        ({"prompt": 3, "responses": ["x", "y"]}, "'prompt': expected a list of messages, came int"),
        (
            {"prompt": "a", "messages": MESSAGES, "responses": ["x", "y"]},
            "both 'prompt' and 'messages'",
        ),
        (
            {"prompt": [{"role": "boss", "content": "x"}], "responses": ["x", "y"]},
            "'prompt'[0].role: expected one of system, user",
        ),
        ({"prompt": "a", "responses": ["x", "y\ud800"]}, "half a character (a surrogate) at pos"),
    ],
)
def test_faults_have_file_and_line(tmp_path, row, message):
    good = {"prompt": "a", "responses": ["x", "y"]}
    path = write(tmp_path / "r.jsonl", [good, row])
    with pytest.raises(UserError) as caught:
        read_tasks(str(path))
    assert str(caught.value).startswith(f"{path}:2: ") and message in str(caught.value)


def test_several_faults_are_told_at_once(tmp_path):
    rows = [{"prompt": "a", "responses": ["x"]}] * 7
    with pytest.raises(UserError) as caught:
        read_tasks(str(write(tmp_path / "r.jsonl", rows)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 6 and lines[4].endswith(":5: 1 response; ranking takes at least 2")
    assert lines[5] == "and 2 more records"


def test_a_broken_line(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps({"prompt": "a", "responses": ["x", "y"]}) + '\n{"prompt": \n')
    with pytest.raises(UserError, match=r"r\.jsonl:2: broken JSON"):
        read_tasks(str(path))
