"""JudgeConfig -> a Judge: an endpoint, a model on the devices or a function, behind a cache."""

from contextlib import ExitStack
from pathlib import Path

from jax.sharding import Mesh

from alignjax.phases.judge_model import ModelAsk
from alignjax.rewards.judge import Judge
from alignjax.rewards.judge_cache import IN_MEMORY, AnswerCache, CachedAsk
from alignjax.rewards.judge_config import JudgeConfig
from alignjax.rewards.judge_function import FunctionAsk
from alignjax.rewards.judge_http import HttpAsk
from alignjax.rewards.judge_prompt import load_templates

CACHE = "judge.sqlite"
"""The file of answers in a run's directory, unless the config names another."""


def open_judge(config: JudgeConfig, mesh: Mesh, folder: Path | None = None) -> Judge:
    """A judge, to be closed.

    Args:
      mesh: where a model lies and is computed.
      folder: of the run; the answers are kept there, unless config.cache says where, and what a
        function prints, in judge.log. None: without config.cache no answer outlives the judge.
    Raises:
      UserError: if a model, function or template cannot be loaded, the cache cannot be used, or
        the environment has no key.
    """
    with ExitStack() as opened:
        own = IN_MEMORY if folder is None else folder / CACHE
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
        cached = CachedAsk(ask, cache, identity=ask.identity, account=ask.account)
        close = opened.pop_all().close
        return Judge(cached, config, templates, identity=ask.identity, close=close)
