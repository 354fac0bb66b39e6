"""JudgeConfig -> a Judge: an endpoint, a model on the devices or a function, behind a cache."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import jax
from jax.sharding import Mesh

from alignjax.core.errors import UserError
from alignjax.core.processes import is_first, together, told
from alignjax.phases.judge_model import ModelAsk
from alignjax.rewards.judge import Judge
from alignjax.rewards.judge_answer import Answer, Ask, Question, Usage
from alignjax.rewards.judge_cache import IN_MEMORY, AnswerCache, CachedAsk
from alignjax.rewards.judge_config import JudgeConfig
from alignjax.rewards.judge_function import FunctionAsk
from alignjax.rewards.judge_http import HttpAsk
from alignjax.rewards.judge_prompt import load_templates

CACHE = "judge.sqlite"
"""The file of answers in a run's directory, unless the config names another."""


def open_judge(config: JudgeConfig, mesh: Mesh, folder: Path | None = None) -> Judge:
    """A judge, to be closed.

    Of several processes the first asks an endpoint or a function, keeps the answers and tells them
    to the others. A model is asked by all, each of which remembers its answers in memory alone.

    Args:
      mesh: where a model lies and is computed.
      folder: of the run; the answers are kept there, unless config.cache says where, and what a
        function prints, in judge.log. None: without config.cache no answer outlives the judge.
    Raises:
      UserError: if a model, function or template cannot be loaded, the cache cannot be used, or
        the environment has no key; a model of several processes has no cache in a file.
    """
    is_alone = jax.process_count() == 1
    if config.model is not None and config.cache is not None and not is_alone:
        raise UserError(
            f"judge.cache={config.cache!r}: of several processes each remembers the answers of a "
            "model in memory: leave it out, or use one process"
        )
    if config.model is None and not is_first():
        templates = None if config.function is not None else load_templates(config, [])
        return Judge(_Told(None), config, templates)
    with ExitStack() as opened:
        own = IN_MEMORY if folder is None or (config.model and not is_alone) else folder / CACHE
        cache = AnswerCache(Path(config.cache) if config.cache else own)
        opened.callback(cache.close)
        ask: HttpAsk | ModelAsk | FunctionAsk
        specials: list[str] = []
        if config.http is not None:
            ask = HttpAsk(config.http, config.think)
            ask.spent = cache.spent(ask.account)
        elif config.model is not None:
            ask = ModelAsk(config.model, config.think, mesh)
            specials = ask.specials
        else:
            log_path = None if folder is None else folder / "judge.log"
            ask = FunctionAsk(config, log_path=log_path)
            opened.callback(ask.close)
        templates = None if config.function is not None else load_templates(config, specials)
        cached: Ask = CachedAsk(ask, cache, identity=ask.identity, account=ask.account)
        if config.model is None and not is_alone:
            cached = _Told(cached)
        close = opened.pop_all().close
        return Judge(cached, config, templates, identity=ask.identity, close=close)


class _Told:
    """An `Ask` in each of several processes, all of which ask the same: the first asks another one
    and tells the answers, as they come."""

    def __init__(self, ask: Ask | None):
        """Args: ask: in the first process, what answers."""
        self._ask = ask

    def __call__(self, questions: Sequence[Question]) -> Iterator[Mapping[int, Answer]]:
        chunks = iter(()) if self._ask is None else self._ask(questions)
        while True:
            with together():
                chunk = next(chunks, None)
            # Pairs, since the keys of a JSON object are texts.
            pairs = [(place, dataclasses.asdict(answer)) for place, answer in (chunk or {}).items()]
            found = told(None if chunk is None else pairs)
            if found is None:
                return
            yield {place: _answer(**values) for place, values in found}


def _answer(
    text: str, logps: list[float] | None, usage: dict[str, int], error: str | None
) -> Answer:
    """From the JSON of one."""
    return Answer(text, None if logps is None else tuple(logps), Usage(**usage), error)
