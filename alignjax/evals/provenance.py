"""What a figure was measured with -> digests: two figures compare only where these are equal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignjax import __version__
from alignjax.core import digest
from alignjax.core.hub import resolve
from alignjax.data import TextOptions
from alignjax.evals.sampler import SamplingConfig
from alignjax.rewards.combine import RewardConfig

COMPARED = ("data", "prompt", "sampling", "scoring")
"""Parts of a provenance that have to be equal; the model is what may differ."""
_SAMPLING = ("num_samples", "temperature", "top_p", "top_k", "max_tokens", "stop_tokens", "until")


@dataclass(frozen=True)
class Provenance:
    """What an evaluation was made of.

    Attributes:
      problems: the digest of each problem, in order.
      values: JSON: the name of the task, model, data, prompt, sampling and scoring; of each but the
        first what it is and its digest. Also what may differ: the seed and our version.
    """

    problems: Sequence[str]
    values: Mapping[str, Any]


def provenance(
    *,
    task: str | None,
    models: Mapping[str, str],
    data: Any,
    problems: Sequence[str],
    prompt: Mapping[str, Any],
    sampling: SamplingConfig | None,
    scoring: Mapping[str, Any],
) -> Provenance:
    """Digests of everything that a figure depends on.

    Args:
      task: its name, for people.
      models: "model", or "a" and "b": directories, or ids of the Hub.
      data: where the problems are from, for people: what counts are the problems.
      problems: the digest of each.
      prompt: how a record becomes a prompt (`prompt_values`).
      sampling: how completions are sampled; None if none are.
      scoring: how they are judged; files and directories that it names count by their content.
    """
    settings = {} if sampling is None else sampling.model_dump(mode="json")
    how = {name: settings[name] for name in _SAMPLING if name in settings}
    return Provenance(
        problems,
        {
            "task": task,
            **{name: {"path": path, "digest": model_digest(path)} for name, path in models.items()},
            "data": {
                "source": data,
                "num_problems": len(problems),
                "digest": digest.of_value(list(problems)),
            },
            "prompt": {**prompt, "digest": digest.of_value(prompt)},
            "sampling": {**how, "digest": digest.of_value(how)},
            "scoring": {**scoring, "digest": digest.of_value([scoring, _contents(scoring)])},
            "seed": settings.get("seed"),
            "compute_dtype": settings.get("compute_dtype"),
            "alignjax": __version__,
        },
    )


def prompt_values(text: TextOptions, **more: Any) -> dict[str, Any]:
    """How a record becomes a prompt; a template in a file counts by what the file holds."""
    values = {"text": text.model_dump(mode="json"), **more}
    if text.chat_template is not None:
        values["text"]["chat_template"] = Path(text.chat_template).read_text(encoding="utf-8")
    return json.loads(json.dumps(values))


def reward_values(rewards: RewardConfig) -> dict[str, Any]:
    """What scores depend on: not the limits of processes, nor where a judge's answers are kept."""
    values = rewards.model_dump(mode="json", include={"functions", "models", "judges"})
    values["judges"] = {name: one | {"cache": None} for name, one in values["judges"].items()}
    return values


def model_digest(path: str) -> str:
    """Of all files of a model's directory; of one from the Hub the name of its commit."""
    here = resolve(path)
    return digest.of_path(here) if here == Path(path).expanduser() else here.name


def _contents(value: Any, key: str = "") -> dict[str, str]:
    """Of each `function` and `path` below a JSON value that is a file or a directory here, such as
    `my_rewards.py:close`: the digest of what it holds."""
    match value:
        case dict():
            found = [_contents(item, name) for name, item in value.items()]
        case str() if key in ("function", "path"):
            path = Path(value.rpartition(":")[0] if ".py:" in value else value).expanduser()
            return {value: digest.of_path(path)} if path.exists() else {}
        case _:
            return {}
    return {name: one for part in found for name, one in part.items()}
