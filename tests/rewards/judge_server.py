"""An endpoint of the tests' own: chat completions with any fault that they ask for."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = Callable[[BaseHTTPRequestHandler, dict[str, Any]], None]
"""Writes what comes back for a request with this body."""


class Server:
    """Answers by `plan(count, body)`, the number of the request from 0 and what was asked.

    Attributes:
      asked: the bodies of all requests, in the order in which they came.
      answered: the texts of the questions that were answered in full.
      times: when each came, in seconds.
      keys: the Authorization headers.
    """

    def __init__(self, plan: Callable[[int, dict[str, Any]], Reply]):
        self.asked: list[dict[str, Any]] = []
        self.answered: list[str] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.num_open = self.most_open = 0
        lock, server = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    count = len(server.asked)
                    server.asked.append(body)
                    server.times.append(time.monotonic())
                    server.keys.append(self.headers["Authorization"])
                    server.num_open += 1
                    server.most_open = max(server.most_open, server.num_open)
                self.is_answered = False
                try:
                    plan(count, body)(self, body)
                    with lock:
                        if self.is_answered:
                            server.answered.append(body["messages"][-1]["content"])
                except OSError:
                    pass  # The client has gone.
                finally:
                    with lock:
                        server.num_open -= 1

            def log_message(self, *args):
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    def close(self):
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        self.close()


def says(text: str, top: list[dict[str, float]] | None = None, tokens: list[str] | None = None):
    """A completion. top: of each token the log-probs that are listed; tokens: the text if None."""

    def reply(handler, body):
        choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if top is not None:
            choice["logprobs"] = {"content": [
                {"token": token, "logprob": listed.get(token, -9.0),
                 "top_logprobs": [{"token": t, "logprob": p} for t, p in listed.items()]}
                for token, listed in zip(tokens or [text], top, strict=True)
            ]}  # fmt: skip
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        send(handler, 200, json.dumps({"choices": [choice], "usage": usage}))
        handler.is_answered = True

    return reply


def fails(status: int, text: str = "no", **headers: str):
    def reply(handler, body):
        send(handler, status, text, **{k.replace("_", "-"): v for k, v in headers.items()})

    return reply


def waits(seconds: float, then: Reply):
    def reply(handler, body):
        time.sleep(seconds)
        then(handler, body)

    return reply


def trickles(handler, body):
    """A byte now and then: no read takes long, and the whole would take for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


def breaks_off(handler, body):
    """Half of an answer; then the connection is closed."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def hangs_up(handler, body):
    """No answer at all."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def send(handler: BaseHTTPRequestHandler, status: int, text: str, **headers: str) -> None:
    content = text.encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(content)))
    for name, value in headers.items():
        handler.send_header(name, value)
    handler.end_headers()
    handler.wfile.write(content)
    handler.wfile.flush()
