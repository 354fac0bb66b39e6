"""A store -> the labelling page: its files, and what they ask the server, as a Starlette app."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Sequence
from importlib.resources import files
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from alignjax.core.errors import UserError
from alignjax.web.access import HEADERS, Access
from alignjax.web.names import check_name
from alignjax.web.store import Store
from alignjax.web.summary import summary

MAX_BODY_BYTES = 1 << 18
MAX_COMMENT_LEN = 10_000
COOKIE_S = 30 * 24 * 3600
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}


class Asked(BaseModel):
    """The body of every request that does something."""

    model_config = ConfigDict(extra="forbid", strict=True)

    annotator: str
    task: int | None = None
    request: str | None = Field(default=None, min_length=8, max_length=64)
    """Made up by the page for each thing that is done; see `Store.rank`."""
    ranks: list[int | None] | None = None
    """In the order in which the responses were shown."""
    comment: str = Field(default="", max_length=MAX_COMMENT_LEN)
    flagged: bool = False


def make_app(
    store: Store, access: Access, *, annotators: Sequence[str] = (), overlap: int = 0
) -> Starlette:
    """The app.

    Args:
      store: tasks and rankings.
      access: who may talk to it.
      annotators: the only names under which to rank; none lets everybody choose one.
      overlap: how many tasks everybody ranks; see `Store.next_task`.
    """
    page = _Page(store, access, tuple(annotators), overlap)
    return Starlette(
        routes=[
            Route("/", page.index),
            Route("/progress", page.index),
            Route("/static/{name}", page.static),
            Route("/api/session", page.session),
            Route("/api/progress", page.progress),
            *(
                Route(f"/api/{verb}", page.answer(getattr(page, f"_{verb}")), methods=["POST"])
                for verb in ("task", "draft", "rank", "skip", "undo")
            ),
        ],
        middleware=[Middleware(BaseHTTPMiddleware, dispatch=_guard(access))],
        exception_handlers={
            HTTPException: _refused,
            UserError: _refused,
            sqlite3.Error: _not_saved,
        },
    )


def cookie_name(request: Request) -> str:
    """Cookies do not tell ports apart; two pages on one machine must not share theirs."""
    return f"alignjax_label_{request.url.port or 80}"


def _guard(access: Access) -> Callable[..., Awaitable[Response]]:
    """Refuses strangers before anything is looked at, and puts `HEADERS` on every answer."""

    async def guard(
        request: Request, call_next: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        why = _why_refused(request, access)
        response = await call_next(request) if why is None else _error(*why)
        response.headers.update(HEADERS)
        return response

    return guard


def _why_refused(request: Request, access: Access) -> tuple[str, int] | None:
    host = request.headers.get("host", "")
    if not access.is_host(host):
        return f"this page is not called {host[:100]!r}; see --allow-host", 421
    is_api = request.url.path.startswith("/api/")
    session = request.cookies.get(cookie_name(request), "")
    if is_api and not access.is_session(session):
        return "this page opens with the whole address that `alignjax label` printed", 401
    if request.method in ("GET", "HEAD"):
        return None
    origin = request.headers.get("origin", "")
    if not origin.startswith(("http://", "https://")) or urlsplit(origin).netloc != host:
        return f"a request from another site: {origin[:100]!r}", 403
    if not access.is_csrf(session, request.headers.get("x-csrf-token", "")):
        return "the page is older than its session; reload it", 403
    return None


class _Page:
    def __init__(self, store: Store, access: Access, annotators: tuple[str, ...], overlap: int):
        self._store, self._access = store, access
        self._annotators, self._overlap = annotators, overlap
        folder = files("alignjax.web") / "static"
        self._files = {file.name: file.read_bytes() for file in folder.iterdir()}

    # Files. They hold nothing that anybody wrote, so they are for everybody who is let to ask.

    def _file(self, name: str) -> Response:
        return Response(self._files[name], media_type=TYPES[name.rpartition(".")[2]])

    async def static(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            raise HTTPException(404, "no such file")
        return self._file(name)

    async def index(self, request: Request) -> Response:
        """The page itself, with a session for whoever may have one.

        No redirect takes the token out of the address (the page does): a browser that came from
        another site would not bring a SameSite=Strict cookie along.
        """
        response = self._file("progress.html" if request.url.path == "/progress" else "index.html")
        cookie = cookie_name(request)
        has_session = self._access.is_session(request.cookies.get(cookie, ""))
        if not has_session and self._access.is_token(request.query_params.get("token", "")):
            response.set_cookie(
                cookie, self._access.new_session(), max_age=COOKIE_S, httponly=True,
                samesite="strict", secure=request.url.scheme == "https",
            )  # fmt: skip
        return response

    # What the page asks.

    async def session(self, request: Request) -> Response:
        return JSONResponse(
            {
                "csrf": self._access.csrf(request.cookies[cookie_name(request)]),
                "store": self._access.identity,
                "annotators": self._annotators,
            }
        )

    async def progress(self, request: Request) -> Response:
        return JSONResponse(await run_in_threadpool(summary, self._store))

    def answer(
        self, act: Callable[[str, Asked], dict[str, Any]]
    ) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that does `act`, for the person who asks, and sends what it returns."""

        async def endpoint(request: Request) -> Response:
            body = bytearray()
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise HTTPException(413, f"more than {MAX_BODY_BYTES} bytes")
            try:
                asked = Asked.model_validate_json(bytes(body))
            except ValidationError as error:
                first = error.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"])) or "body"
                raise HTTPException(400, f"{where}: {first['msg']}") from error
            name = check_name(asked.annotator, self._annotators)
            return JSONResponse(await run_in_threadpool(act, name, asked))

        return endpoint

    def _task(self, name: str, asked: Asked) -> dict[str, Any]:
        """What this person is to do now, and how far everything is."""
        store = self._store
        progress = {
            "ranked": store.count(), "own": store.count(name), "tasks": store.num_tasks,
        }  # fmt: skip
        number = store.next_task(name, self._overlap)
        if number is None:
            return {"annotator": name, "task": None, "progress": progress}
        task, order = store.task(number), store.order(name, number)
        draft = store.draft(name, number)
        if draft is not None:
            draft = draft | {"ranks": [draft["ranks"][i] for i in order]}
        return {
            "annotator": name,
            "task": number,
            "prompt": task.prompt,
            "responses": [task.responses[i] for i in order],
            "draft": draft,
            "progress": progress,
        }

    def _draft(self, name: str, asked: Asked) -> dict[str, Any]:
        task, request = _named(asked)
        ranks = self._in_own_order(name, task, asked.ranks)
        self._store.save_draft(
            name, task, ranks, comment=asked.comment, flagged=asked.flagged, request=request
        )
        return {"saved": request}

    def _rank(self, name: str, asked: Asked) -> dict[str, Any]:
        task, request = _named(asked)
        ranks = self._in_own_order(name, task, asked.ranks)
        self._store.rank(
            name, task, ranks, comment=asked.comment, flagged=asked.flagged, request=request
        )
        return self._task(name, asked) | {"saved": request}

    def _skip(self, name: str, asked: Asked) -> dict[str, Any]:
        task, request = _named(asked)
        self._store.skip(name, task, comment=asked.comment, flagged=asked.flagged, request=request)
        return self._task(name, asked) | {"saved": request}

    def _undo(self, name: str, asked: Asked) -> dict[str, Any]:
        if asked.request is None:
            raise UserError("request: expected an id")
        undone = self._store.undo(name, request=asked.request)
        return self._task(name, asked) | {"saved": asked.request, "undone": undone}

    def _in_own_order(self, name: str, task: int, shown: list[int | None] | None) -> list[Any]:
        order = self._store.order(name, task)
        if shown is None or len(shown) != len(order):
            raise UserError(f"ranks: expected one for each of {len(order)} responses")
        return [shown[order.index(i)] for i in range(len(order))]


def _named(asked: Asked) -> tuple[int, str]:
    if asked.task is None or asked.request is None:
        raise UserError("expected a task and the id of the request")
    return asked.task, asked.request


def _error(message: str, status: int) -> Response:
    return JSONResponse({"error": message}, status)


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        if not request.url.path.startswith("/api/"):
            return PlainTextResponse(error.detail, error.status_code)
        return _error(error.detail, error.status_code)
    return _error(str(error), 400)


async def _not_saved(request: Request, error: Exception) -> Response:
    """The disk is full or the file is locked: nothing was acknowledged, and asking again may do."""
    return _error(f"not saved: {error}", 503)
