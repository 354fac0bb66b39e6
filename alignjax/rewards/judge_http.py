"""Questions -> answers of an endpoint that speaks OpenAI's chat completions.

Requests run in an event loop of a thread of their own, so that each has a limit on its whole time
and all end at once when the caller goes. The key stands in one header and nowhere else: what an
endpoint repeats of it is blotted out.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import json
import logging
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import httpx2 as httpx

from alignjax.core.errors import UserError
from alignjax.rewards.judge_answer import Answer, Question, Usage
from alignjax.rewards.judge_completion import ReplyError, read_reply
from alignjax.rewards.judge_config import HttpConfig, ThinkConfig

# At DEBUG it writes headers, and an endpoint may repeat the key in one.
logging.getLogger("httpcore2").setLevel(logging.INFO)
AGAIN = (408, 409, 425, 429)
"""Statuses besides 5xx after which a request is repeated."""
FATAL = (401, 402, 403, 404, 405)
"""Statuses that say that no question will be answered."""
MAX_BYTES = 64 * 2**20
"""Of one reply."""


class HttpAsk:
    """An `Ask`. Several threads must not use one at a time.

    Attributes:
      identity: of what answers: address, model, and what else of a request changes answers.
      account: under which its usage is counted.
      spent: what was used up so far; to be set to what was before, of which the limits are too.
    """

    def __init__(self, config: HttpConfig, think: ThinkConfig | None = None):
        """Args:
          think: with chain of thought.
        Raises:
          UserError: if the environment has no key, or one that is no header.
        """
        self._config = config
        self._key = _key(config)
        self._body: dict[str, Any] = {
            "model": config.model,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens if think is None else think.max_tokens,
        }
        if config.top_logprobs:
            self._body |= {"logprobs": True, "top_logprobs": config.top_logprobs}
        self._body = {k: v for k, v in (self._body | config.extra).items() if v is not None}
        self.identity = json.dumps([config.url, config.system, self._body], sort_keys=True)
        self.account = f"{config.url} {config.model}"
        self.spent = Usage()
        self._next_start = self._not_before = 0.0  # Of the monotonic clock.

    def __call__(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer]]:
        """An `Ask`. Raises: UserError: if the endpoint refuses key, address or model."""
        found: queue.SimpleQueue[tuple[int, Answer] | Exception | None] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._all(questions, found.put))

        def work() -> None:
            try:
                with asyncio.Runner(loop_factory=lambda: loop) as runner:
                    runner.run(_ended(task))
            finally:
                found.put(None)  # Whatever happened, nobody waits for more.

        thread = threading.Thread(target=work, name="judge", daemon=True)
        thread.start()
        try:
            for _ in questions:
                item = found.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    raise RuntimeError("the thread that asks ended before all was answered")
                yield {item[0]: item[1]}
        finally:
            with contextlib.suppress(RuntimeError):  # It is over, and its loop closed.
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _all(self, questions: Sequence[Question], put: Callable[[Any], None]) -> None:
        todo = iter(enumerate(questions))
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}

        async def work() -> None:
            for place, question in todo:
                put((place, await self._answer(client, question)))

        limits = httpx.Limits(max_connections=self._config.concurrency)
        try:
            async with httpx.AsyncClient(
                headers=headers, timeout=self._config.timeout_s, limits=limits
            ) as client:
                workers = min(self._config.concurrency, len(questions))
                await asyncio.gather(*(work() for _ in range(workers)))
        except Exception as error:  # Whoever waits for an answer has to hear of it.
            put(error)

    async def _answer(self, client: httpx.AsyncClient, question: Question) -> Answer:
        config, used, why = self._config, Usage(), ""
        for count in range(config.num_retries + 1):
            await self._turn()
            if (over := self._over_budget()) is not None:
                return Answer(usage=used, error=over)
            self.spent += Usage(num_requests=1)
            used += Usage(num_requests=1)
            asked_to_wait = None
            try:
                async with asyncio.timeout(config.timeout_s):
                    status, wait, body = await self._post(client, question)
            except TimeoutError:
                why = f"no answer within {config.timeout_s:g} s"
            except httpx.HTTPError as error:
                why = self._blotted(f"{type(error).__name__}: {error}".rstrip("."))
            else:
                if status == 200:
                    try:
                        answer = read_reply(body, question)
                    except ReplyError as error:
                        why = self._blotted(str(error))
                    else:
                        tokens = self._counted(answer)
                        self.spent += tokens
                        return Answer(self._blotted(answer.text), answer.logps, used + tokens, None)
                else:
                    why, asked_to_wait = self._refusal(status, body), wait
                    if status in FATAL:
                        raise UserError(f"judge.http {config.url}: {why}; see url, model, key_env")
                    if status not in AGAIN and status < 500:
                        return Answer(usage=used, error=f"judge.http {config.url}: {why}")
            if count < config.num_retries:
                wait_s = config.backoff_s * 2**count * random.uniform(0.5, 1.0)
                if asked_to_wait is not None:
                    if asked_to_wait > config.max_wait_s:
                        why += f"; it asks to wait {asked_to_wait:.0f} s, more than max_wait_s"
                        break
                    # The others would hear the same.
                    self._not_before = max(self._not_before, time.monotonic() + asked_to_wait)
                    wait_s = asked_to_wait
                await asyncio.sleep(min(wait_s, config.max_wait_s))
        what = f"no answer in {used.num_requests} requests, the last: {why}"
        return Answer(usage=used, error=f"judge.http {config.url}: {what}")

    async def _turn(self) -> None:
        """Waits until a request may start."""
        rate = self._config.requests_per_minute
        start = max(time.monotonic(), self._next_start)
        if rate is not None:
            self._next_start = start + 60 / rate
        while (left := max(start, self._not_before) - time.monotonic()) > 0:
            await asyncio.sleep(left)

    async def _post(
        self, client: httpx.AsyncClient, question: Question
    ) -> tuple[int, float | None, str]:
        """Status, the seconds that it asks to wait, and the body."""
        system = self._config.system
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": question.text})
        # Escaped, half of a surrogate pair is JSON, too.
        body = json.dumps(self._body | {"messages": messages}).encode()
        kind = {"Content-Type": "application/json"}
        url = f"{self._config.url}/chat/completions"
        async with client.stream("POST", url, content=body, headers=kind) as reply:
            parts, size = [], 0
            async for part in reply.aiter_bytes():
                size += len(part)
                if size > MAX_BYTES:
                    raise httpx.ReadError(f"an answer of more than {MAX_BYTES} bytes")
                parts.append(part)
            wait = _retry_after(reply.headers.get("Retry-After"))
            return reply.status_code, wait, b"".join(parts).decode(errors="replace")

    def _refusal(self, status: int, body: str) -> str:
        return self._blotted(f"HTTP {status}: {' '.join(body[:2000].split())[:200]}")

    def _blotted(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")

    def _counted(self, answer: Answer) -> Usage:
        usage, config = answer.usage, self._config
        if not usage.prompt_tokens and (config.max_tokens_total or config.max_spend) is not None:
            raise UserError(
                f"judge.http {config.url}: its answers do not say how many tokens were used, so "
                "max_tokens_total and max_spend cannot be kept; limit max_requests"
            )
        return usage

    def _over_budget(self) -> str | None:
        config, spent = self._config, self.spent
        tokens = spent.prompt_tokens + spent.completion_tokens
        limits: list[tuple[str, float, float | None]] = [
            ("max_requests", spent.num_requests, config.max_requests),
            ("max_tokens_total", tokens, config.max_tokens_total),
            ("max_spend", money(spent, config.prices), config.max_spend),
        ]
        for name, value, limit in limits:
            if limit is not None and value >= limit:
                return (
                    f"judge.http {config.url}: {name}={limit:g} is used up ({value:g}); what was "
                    "answered is in the cache: raise it, and run again"
                )
        return None


def money(usage: Usage, prices: tuple[float, float] | None) -> float:
    """What it costs, at prices of a million tokens of prompts and of answers."""
    prompt, completion = prices or (0.0, 0.0)
    return (usage.prompt_tokens * prompt + usage.completion_tokens * completion) / 1e6


async def _ended(task: asyncio.Task[None]) -> None:
    await asyncio.wait([task])


def _key(config: HttpConfig) -> str | None:
    if config.key_env is None:
        return None
    key = os.environ.get(config.key_env, "").strip()
    if not key:
        raise UserError(f"judge.http.key_env: the environment has no {config.key_env}; set it")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(
            f"judge.http.key_env: {config.key_env} holds characters that no key has (it is not "
            "shown here)"
        )
    return key


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header; None where there is none that can be read."""
    if value is None:
        return None
    try:
        return max(0.0, float(int(value)))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
