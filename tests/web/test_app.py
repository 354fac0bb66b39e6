"""The app: what the page is told, and who is refused before anything happens."""

import json

import pytest

from alignjax.web import Task, open_store
from tests.web.app_case import HOST

pytest.importorskip("starlette")
from starlette.testclient import TestClient

from alignjax.web.access import HEADERS, make_access
from alignjax.web.app import MAX_BODY_BYTES, make_app

KEY = bytes(range(32))
EVIL = "<script>alert(1)</script>"
TASKS = [
    Task(f"prompt {i} {EVIL}", ("a", f"b {EVIL}", "c", "d"), {"secret": "not for raters"})
    for i in range(5)
]


class Person:
    """A browser with the page open."""

    def __init__(self, app, name="ann", url=HOST, query=""):
        self.name, self.client = name, TestClient(app, base_url=url)
        self.client.get(f"/{query}")
        session = self.client.get("/api/session")
        self.status, self.session, self.requests = session.status_code, session.json(), 0
        self.headers = {"Origin": url, "X-CSRF-Token": self.session.get("csrf", "")}

    def post(self, verb, **body):
        self.requests += 1
        request = {} if verb == "task" else {"request": f"{self.name}-{self.requests:06}"}
        body = {"annotator": self.name} | request | body
        return self.client.post(f"/api/{verb}", json=body, headers=self.headers)


@pytest.fixture
def store(tmp_path):
    return open_store(tmp_path / "s.sqlite", TASKS)


@pytest.fixture
def app(store):
    return make_app(store, make_access("127.0.0.1", key=KEY))


@pytest.fixture
def ann(app):
    return Person(app)


def test_responses_are_shown_in_an_order_and_kept_in_their_own(ann, store):
    """Best is the one that was shown last, whatever that is."""
    orders = set()
    for number in range(5):
        shown = ann.post("task").json()
        assert shown["task"] == number and shown["prompt"] == TASKS[number].prompt
        responses = TASKS[number].responses
        assert sorted(shown["responses"]) == sorted(responses)
        answer = ann.post("rank", task=number, ranks=[4, 3, 2, 1]).json()
        assert answer["saved"] == f"ann-{ann.requests:06}"
        ranks = store.judgements()[-1].ranks
        by_rank = [responses[ranks.index(rank)] for rank in (1, 2, 3, 4)]
        assert by_rank == shown["responses"][::-1]
        orders.add(tuple(ranks))
    assert len(orders) > 1
    assert answer["task"] is None
    assert answer["progress"] == {"ranked": 5, "own": 5, "tasks": 5}
    assert "secret" not in json.dumps(shown)


def test_a_draft_comes_back_as_it_was_shown(ann, app, store):
    for number in range(5):
        ann.post("task")
        draft = {"ranks": [None, 2, 1, 4], "comment": "hm", "flagged": True}
        assert ann.post("draft", task=number, **draft).status_code == 200
        found = Person(app).post("task").json()["draft"]
        assert {key: found[key] for key in draft} == draft
        own, order = store.draft("ann", number)["ranks"], store.order("ann", number)
        assert [own[i] for i in order] == draft["ranks"]
        ann.post("skip", task=number)


def test_skip_and_undo(ann):
    ann.post("task")
    answer = ann.post("skip", task=0, comment="unclear").json()
    assert answer["task"] == 1 and answer["progress"]["own"] == 0
    answer = ann.post("undo").json()
    assert (answer["undone"], answer["task"], answer["draft"]["comment"]) == (0, 0, "unclear")
    answer = ann.post("undo").json()
    assert (answer["undone"], answer["task"]) == (None, 0)


def test_progress_and_agreement(store):
    app = make_app(store, make_access("127.0.0.1", key=KEY), overlap=5)
    people = [Person(app, name) for name in ("ann", "bob")]
    for person in people:
        for task in range(2):
            person.post("task")
            order = store.order(person.name, task)
            person.post("rank", task=task, ranks=[i + 1 for i in order], flagged=task == 1)
        person.post("skip", task=2)
    found = people[0].client.get("/api/progress").json()
    assert (found["tasks"], found["ranked"], found["rankings"]) == (5, 2, 4)
    assert found["annotators"] == [
        {"name": name, "ranked": 2, "skipped": 1, "flagged": 1} for name in ("ann", "bob")
    ]
    assert found["agreement"] == {"alpha": 1.0, "num_tasks": 2, "num_annotators": 2}


def test_every_answer_forbids_what_is_not_ours(ann, app):
    answers = [
        ann.client.get(path)
        for path in ("/", "/progress", "/static/script.js", "/static/no", "/no", "/api/session")
    ]
    answers += [ann.post("task"), ann.post("rank"), TestClient(app).get("/")]
    assert {a.status_code for a in answers} == {200, 400, 404, 421}
    for answer in answers:
        assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_pages_hold_no_script_and_no_style_of_their_own(ann):
    for path in ("/", "/progress"):
        page = ann.client.get(path).text
        assert page.count("<script") == 1 and '<script type="module" src="/static/' in page
        assert "style=" not in page and "onclick" not in page and "://" not in page
    for name in ("script.js", "board.js", "api.js", "drag.js", "progress.js"):
        code = ann.client.get(f"/static/{name}").text
        assert not any(
            word in code for word in ("innerHTML", "outerHTML", "insertAdjacent", "eval")
        )


def test_files_are_only_those_of_the_page(ann):
    for name in ("..%2fapp.py", "%2e%2e/app.py", "", "script.js%00", "__init__.py"):
        assert ann.client.get(f"/static/{name}").status_code in (404, 400), name


@pytest.mark.parametrize("host", ["evil.example:8377", "evil.example", "127.0.0.1.evil.example"])
def test_a_name_that_suddenly_means_this_machine_is_refused(app, store, host):
    client = TestClient(app, base_url=f"http://{host}")
    for path in ("/", "/api/session", "/static/script.js"):
        answer = client.get(path)
        assert answer.status_code == 421 and "--allow-host" in answer.json()["error"]
        assert "set-cookie" not in answer.headers
    allowed = make_app(store, make_access("127.0.0.1", key=KEY, names=[host.split(":")[0]]))
    assert Person(allowed, url=f"http://{host}").post("task").status_code == 200


@pytest.mark.parametrize(
    "changed",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "http://localhost:8377"},
        {"Origin": "null"},
        {"Origin": "127.0.0.1:8377"},
        {"Origin": ""},
        {"X-CSRF-Token": "0" * 64},
        {"X-CSRF-Token": ""},
    ],
)
@pytest.mark.parametrize("verb", ["task", "draft", "rank", "skip", "undo"])
def test_requests_of_other_sites_change_nothing(ann, store, changed, verb):
    ann.post("task")
    before = store._db.value("SELECT count(*) FROM events")
    ann.headers |= changed
    assert ann.post(verb, task=0, ranks=[1, 2, 3, 4]).status_code == 403
    assert store._db.value("SELECT count(*) FROM events") == before


def test_without_the_cookie_nothing_is_told(ann, app):
    cookies = ann.client.get("/", headers={"Cookie": ""}).headers["set-cookie"]
    assert "HttpOnly" in cookies and "SameSite=strict" in cookies
    ann.client.cookies.clear()
    assert ann.post("task").status_code == 401
    for path in ("/api/session", "/api/progress"):
        assert TestClient(app, base_url=HOST).get(path).status_code == 401
    # And another's proof does not go with one's own cookie.
    bob = Person(app, "bob")
    bob.headers["X-CSRF-Token"] = ann.headers["X-CSRF-Token"]
    assert bob.post("task").status_code == 403


def test_the_token_opens_the_page_once(store):
    access = make_access("0.0.0.0", key=KEY)
    app, url = make_app(store, access), "http://192.168.1.7:8377"
    for query in ("", "?token=", "?token=" + "0" * 32, "?token=%ff"):
        person = Person(app, url=url, query=query)
        assert person.status == 401 and person.post("task").status_code == 401
        assert "`alignjax label` printed" in person.session["error"]
    person = Person(app, url=url, query=f"?token={access.token}")
    assert person.post("task").status_code == 200
    # After a restart the same cookie and the same address are good.
    again = TestClient(make_app(store, make_access("0.0.0.0", key=KEY)), base_url=url)
    again.cookies = person.client.cookies
    assert again.get("/api/session").json()["csrf"] == person.session["csrf"]


def test_names(store, app):
    restricted = make_app(store, make_access("::1", key=KEY), annotators=["ann", "bób"])
    answer = Person(restricted, "eve").post("task")
    assert answer.status_code == 400
    assert answer.json()["error"].startswith("unknown annotator 'eve'; this page is for ann, bób.")
    assert Person(restricted, "eve").post("rank", task=0, ranks=[1, 2, 3, 4]).status_code == 400
    # The same name, composed otherwise.
    assert Person(restricted, " bo\u0301b ").post("task").json()["annotator"] == "bób"
    for name in ("", "  ", "x" * 65, "a\nb", "a\u202eb"):
        answer = Person(app, name).post("task")
        assert answer.status_code == 400 and "expected 1 to 64 characters" in answer.json()["error"]
    assert Person(app, EVIL).post("task").json()["annotator"] == EVIL


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"ranks": [1, 2, 3, 4]}, "expected a task and the id of the request"),
        ({"task": 0, "ranks": [1, 2, 3]}, "ranks: expected one for each of 4 responses"),
        ({"task": 0}, "ranks: expected one for each of 4 responses"),
        ({"task": 0, "ranks": [1, 2, 3, None]}, "a response has no rank yet"),
        ({"task": 0, "ranks": [1, 2, 3, 5]}, "expected 4 whole numbers from 1 to 4"),
        ({"task": 0, "ranks": [1, 2, 3, "4"]}, "ranks.3: "),
        ({"task": 1, "ranks": [1, 2, 3, 4]}, "task 1 was not given to 'ann'"),
        ({"task": 99, "ranks": [1, 2, 3, 4]}, "task 99: there are 0 to 4"),
        ({"task": 0, "ranks": [1, 2, 3, 4], "comment": "x" * 10_001}, "comment: "),
        ({"task": 0, "ranks": [1, 2, 3, 4], "request": ""}, "request: "),
        ({"task": 0, "ranks": [1, 2, 3, 4], "more": 1}, "more: "),
    ],
)
def test_faults_are_told_and_nothing_is_kept(ann, store, body, message):
    ann.post("task")
    answer = ann.post("rank", **body)
    assert answer.status_code == 400 and message in answer.json()["error"]
    assert store.judgements() == []


def test_bodies_that_are_none(ann):
    for body in (b"", b"{", b"[]", b"\xff", b'{"annotator": "\\ud800"}'):
        answer = ann.client.post("/api/task", content=body, headers=ann.headers)
        assert answer.status_code == 400, body
    big = b"x" * (MAX_BODY_BYTES + 1)
    assert ann.client.post("/api/task", content=big, headers=ann.headers).status_code == 413
    assert ann.client.get("/api/rank").status_code == 405


def test_what_cannot_be_written_is_not_acknowledged(ann, store):
    ann.post("task")
    store._db.rows("PRAGMA query_only = ON")
    answer = ann.post("rank", task=0, ranks=[1, 2, 3, 4])
    assert answer.status_code == 503 and answer.json()["error"].startswith("not saved: ")
    store._db.rows("PRAGMA query_only = OFF")
    assert store.judgements() == []
    assert ann.post("rank", task=0, ranks=[1, 2, 3, 4]).status_code == 200
