"""The real server: killed while people rank, and asked by many of them at once."""

import http.client
import json
import random
import signal
import sqlite3
import threading
import time

import pytest

from alignjax.web import open_store
from tests.web.app_case import Server, records, write

pytest.importorskip("uvicorn")


class Client:
    """Somebody who ranks over HTTP, and asks again when nobody answers, as the page does."""

    def __init__(self, port, name):
        self.port, self.name, self.acknowledged = port, name, []
        self.cookie = self.csrf = None
        self.random = random.Random(name)

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        headers = {"Origin": f"http://127.0.0.1:{self.port}", "X-CSRF-Token": self.csrf or ""}
        if self.cookie:
            headers["Cookie"] = self.cookie
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            data = answer.read()
        finally:
            connection.close()
        if cookie := answer.getheader("Set-Cookie"):
            self.cookie = cookie.split(";")[0]
        assert answer.status == 200, data
        return data

    def sign_in(self):
        self.ask("GET", "/")
        self.csrf = json.loads(self.ask("GET", "/api/session"))["csrf"]
        return self.post("task")

    def post(self, verb, **body):
        return json.loads(self.ask("POST", f"/api/{verb}", {"annotator": self.name} | body))

    def rank_all(self, is_killed=lambda: False):
        """Ranks until there is nothing left, or the server is gone for good."""
        found = self.sign_in()
        while found["task"] is not None:
            num = len(found["responses"])
            ranks = [self.random.randint(1, num) for _ in range(num)]
            request = f"{self.name}-{found['task']:06}"
            try:
                found = self.post("rank", task=found["task"], ranks=ranks, request=request)
            except (OSError, http.client.HTTPException):
                if is_killed():
                    return
                raise
            assert found["saved"] == request
            self.acknowledged.append(request)


def in_threads(clients, is_killed=lambda: False):
    faults = []

    def work(client):
        try:
            client.rank_all(is_killed)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    return threads, faults


def stored(path):
    with sqlite3.connect(path) as db:
        return [r for (r,) in db.execute("SELECT request FROM events WHERE kind = 'rank'")]


def test_kill_loses_nothing_that_was_acknowledged(tmp_path):
    """Killed three times with SIGKILL while five people rank; what was in flight may be either."""
    responses = write(tmp_path / "r.jsonl", records(3000))
    names = [f"person {i}" for i in range(5)]
    acknowledged, sent = [], 0
    for kill in range(3):
        with Server("--responses", responses) as server:
            clients = [Client(server.port, f"{name} {kill}") for name in names]
            is_killed = threading.Event()
            threads, faults = in_threads(clients, is_killed.is_set)
            while sum(len(client.acknowledged) for client in clients) < 40:
                assert not faults, faults
                time.sleep(0.005)
            is_killed.set()
            server.process.send_signal(signal.SIGKILL)
            for thread in threads:
                thread.join()
            assert faults == []
        acknowledged += [request for client in clients for request in client.acknowledged]
        sent += len(clients)
    kept = stored(tmp_path / "r.sqlite")
    assert len(acknowledged) >= 120 and len(kept) == len(set(kept))
    assert set(acknowledged) <= set(kept)
    assert len(kept) <= len(acknowledged) + sent
    assert open_store(tmp_path / "r.sqlite", None).count() == len(kept)


def test_who_heard_no_answer_asks_again(tmp_path):
    """The same request, cookie and proof are good after the server was killed and started."""
    responses = write(tmp_path / "r.jsonl", records(3))
    with Server("--responses", responses) as server:
        ann = Client(server.port, "ann")
        task = ann.sign_in()["task"]
        ann.post("draft", task=task, ranks=[2, None, 1], request="draft-001")
        ann.post("rank", task=task, ranks=[2, 3, 1], request="request-1")
        ann.post("draft", task=task + 1, ranks=[1, None, None], request="draft-002")
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        port = server.port
    with Server("--responses", responses, port=port) as server:
        again = ann.post("rank", task=task, ranks=[2, 3, 1], request="request-1")
        assert again["progress"]["own"] == 1
        assert (again["task"], again["draft"]["ranks"]) == (task + 1, [1, None, None])
    assert stored(tmp_path / "r.sqlite") == ["request-1"]


def test_twenty_people_at_once(tmp_path):
    """Everybody ranks those of the overlap, the rest is dealt out, and all of it is there."""
    responses = write(tmp_path / "r.jsonl", records(60))
    names = [f"p{i:02}" for i in range(20)]
    words = ["--responses", responses, "--overlap", 4, "--annotators", ",".join(names)]
    with Server(*words) as server:
        clients = [Client(server.port, name) for name in names]
        threads, faults = in_threads(clients)
        for thread in threads:
            thread.join()
        assert faults == []
        found = json.loads(clients[0].ask("GET", "/api/progress"))
    assert (found["ranked"], found["rankings"]) == (60, 20 * 4 + 56)
    assert found["agreement"]["num_tasks"] == 4
    assert abs(found["agreement"]["alpha"]) < 0.2  # They ranked at random.
    requests = [request for client in clients for request in client.acknowledged]
    assert sorted(stored(tmp_path / "r.sqlite")) == sorted(requests)
    store = open_store(tmp_path / "r.sqlite", None)
    by_person = [f.annotator for f in store.judgements()]
    assert all(by_person.count(name) >= 4 for name in names)


def test_others_need_the_token(tmp_path):
    responses = write(tmp_path / "r.jsonl", records(2))
    with Server("--responses", responses, "--host", "0.0.0.0") as server:
        token = server.url.partition("?token=")[2]
        ann = Client(server.port, "ann")
        ann.ask("GET", "/")
        with pytest.raises(AssertionError, match="`alignjax label` printed"):
            ann.ask("GET", "/api/session")
        ann.ask("GET", f"/?token={token}")
        ann.csrf = json.loads(ann.ask("GET", "/api/session"))["csrf"]
        assert ann.post("task")["task"] == 0
    with Server("--responses", responses, "--host", "0.0.0.0") as server:
        assert server.url.endswith(token)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_cleanly(tmp_path, how):
    responses = write(tmp_path / "r.jsonl", records(2))
    with Server("--responses", responses) as server:
        Client(server.port, "ann").sign_in()
        server.process.send_signal(how)
        rest = server.process.stdout.read()
        status = server.process.wait(timeout=10)
    assert "Traceback" not in rest and "rror" not in rest
    if how == signal.SIGINT:
        assert status == 0 and rest.endswith(
            f"stopped; 0 of 2 prompts ranked, in {tmp_path}/r.sqlite\n"
        )
    # What was in the log has gone into the file: it can be copied by itself.
    assert not (tmp_path / "r.sqlite-wal").exists() or how == signal.SIGTERM


def test_a_port_that_is_taken(tmp_path):
    responses = write(tmp_path / "r.jsonl", records(2))
    with Server("--responses", responses) as server, pytest.raises(AssertionError) as caught:
        Server("--responses", responses, port=server.port)
    assert f"--host 127.0.0.1 --port {server.port}: cannot listen there" in str(caught.value)
    assert "another --port, or 0, takes a free one" in str(caught.value)
