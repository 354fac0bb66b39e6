"""What can be set of a judge: what answers, how it is asked, how its answers are read."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, JsonValue, field_validator, model_validator

from alignjax.core.config import Config

Probability = Annotated[float, Field(ge=0, le=1)]
_FROM_LIST = Field(strict=False)
"""Takes a list for a tuple also below a validator of a recipe, which hands on Python's own."""
Finite = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class JudgeTextConfig(Config):
    """How a question reaches what answers it."""

    system: str | None = None
    """Content of a system message to put first; with chat only."""


class HttpConfig(JudgeTextConfig):
    """An endpoint that speaks OpenAI's chat completions."""

    url: str
    """Up to what comes before /chat/completions, such as http://localhost:8000/v1."""
    model: str
    """Its name there."""
    key_env: str | None = None
    """The environment variable that holds the key; null: none is sent. The key itself is written
    nowhere."""
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    max_tokens: int = Field(8, ge=1)
    """Of an answer without chain of thought; with it, `think.max_tokens`."""
    top_logprobs: int = Field(20, ge=0, le=20)
    """How many to ask for; 0: none, for endpoints that have none. The text of the answer then
    counts as certain."""
    extra: dict[str, JsonValue] = {}
    """Further keys of the request, as the endpoint knows them."""
    concurrency: int = Field(8, ge=1, le=256)
    """Requests at a time, at most."""
    requests_per_minute: float | None = Field(None, gt=0, allow_inf_nan=False)
    timeout_s: float = Field(120.0, gt=0, allow_inf_nan=False)
    """Limit on one request from its start to the end of its answer, in seconds."""
    num_retries: int = Field(6, ge=0)
    """Times that a request is repeated that failed: 408, 409, 425, 429, 5xx, time-outs, broken
    connections and answers that are no JSON. The waits double from `backoff_s`, or are what the
    endpoint says (Retry-After)."""
    backoff_s: float = Field(1.0, ge=0, allow_inf_nan=False)
    max_wait_s: float = Field(120.0, ge=0, allow_inf_nan=False)
    """The longest wait before a repetition; if the endpoint asks for more, the question fails."""
    max_requests: int | None = Field(None, ge=0)
    """Requests of this endpoint and model in all runs that share the cache; none more is sent."""
    max_tokens_total: int | None = Field(None, ge=0)
    """The same of tokens, of prompts and answers. Checked before each request, so that those under
    way may go beyond it."""
    max_spend: float | None = Field(None, ge=0, allow_inf_nan=False)
    """The same of money, by `prices`."""
    prices: Annotated[tuple[Finite, Finite], _FROM_LIST] | None = None
    """Of a million tokens of prompts and of answers, in the currency of `max_spend`."""

    @field_validator("url")
    @classmethod
    def _is_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"expected http://HOST/... or https://HOST/..., came {url!r}")
        if parts.username or parts.password or parts.query:
            raise ValueError("a url with a key, name or password in it: use key_env")
        return url.rstrip("/")

    @model_validator(mode="after")
    def _has_prices(self) -> Self:
        if self.max_spend is not None and self.prices is None:
            raise ValueError("max_spend needs prices: [per million prompt tokens, of answers]")
        return self


class LocalConfig(JudgeTextConfig):
    """A model of our own; the options' probabilities are computed, not sampled."""

    path: str
    """A Hugging Face directory, such as runs/NAME/model, or an id of the Hub."""
    chat: bool = True
    """Ask through the model's chat template; false: the rendered text is what it goes on from."""
    chat_template: str | None = None
    """A jinja file, instead of the template that comes with the tokenizer."""
    template_variables: dict[str, JsonValue] = {}
    """Further variables for it, such as enable_thinking."""
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    """Of the chain of thought."""
    batch_size: int = Field(32, ge=1)
    """Questions that are computed together; after each such batch the answers are cached."""
    seed: int = Field(0, ge=0)
    """Of the chain of thought, at a temperature above 0."""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights as they are held; bfloat16 takes half the memory."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products. auto: bfloat16 on TPU and GPU, float32 on CPU."""


class ThinkConfig(Config):
    """Chain of thought before the verdict."""

    max_tokens: int = Field(512, ge=1)
    """Of the thought, at most."""


class JudgingConfig(Config):
    """How a judge is asked and its answers are read, whatever it is that answers."""

    template: str = "auto"
    """`pairwise`, `pairwise_cot`, `pointwise`, `pointwise_cot` or a jinja file; auto: the one that
    fits."""
    question: str | None = None
    """What makes a response good, for the template; its own words if not given."""
    options: Annotated[tuple[str, str], _FROM_LIST] = ("A", "B")
    """Verdicts on a pair: that the first, that the second response is better."""
    best_score: int = Field(10, ge=2, le=100)
    """Scores of a single response go from 1 to this one."""
    both_orders: bool = True
    """Ask about each pair in both orders and take the mean, which cancels a bias to a place."""
    harden: float | None = Field(None, gt=0, le=0.5)
    """Make labels hard: a probability nearer to 1/2 than this is a tie, others become 0 or 1."""
    clamp: Annotated[tuple[Probability, Probability], _FROM_LIST] | Literal["auto"] | None = "auto"
    """Where probabilities are cut off; auto: [0.4, 0.6] with chain of thought, which makes judges
    too sure (arXiv:2212.08073 sec. 4.1), unless harden is set; nowhere otherwise."""
    think: ThinkConfig | None = None
    """Chain of thought before the verdict; null: none."""
    cue: str = "Verdict:"
    """With chain of thought, what stands before the verdict."""
    num_attempts: int = Field(3, ge=1)
    """Times that a question is asked whose answer cannot be understood, the first one included."""

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if isinstance(self.clamp, tuple):
            low, high = self.clamp
            if not low <= 0.5 <= high:
                raise ValueError(f"clamp=[{low}, {high}]: expected [low, high] around 0.5")
            if self.harden is not None:
                raise ValueError("harden would undo clamp: give one of them")
        if len({option.strip() for option in self.options}) < 2 or "" in self.options:
            raise ValueError(f"options={list(self.options)}: expected two unlike texts")
        if not self.cue.strip():
            raise ValueError("cue: expected text, such as 'Verdict:'")
        return self

    @property
    def limits(self) -> tuple[float, float] | None:
        """Where probabilities are cut off; None: nowhere."""
        if self.clamp == "auto":
            return (0.4, 0.6) if self.think is not None and self.harden is None else None
        return self.clamp


LIMITS = (
    "cache", "timeout_s", "num_workers",
    *(f"http.{name}" for name in (
        "key_env", "concurrency", "requests_per_minute", "timeout_s", "num_retries", "backoff_s",
        "max_wait_s", "max_requests", "max_tokens_total", "max_spend", "prices",
    )),
)  # fmt: skip
"""Keys of a judge that change no answer: a run may go on with others, such as a higher budget."""


class JudgeConfig(JudgingConfig):
    """A judge: one of three that answer, and how it is asked."""

    name: str = Field("judge", pattern=r"^[\w.-]+$")
    """Its labels have the annotator "judge:NAME"."""
    http: HttpConfig | None = None
    """An endpoint."""
    model: LocalConfig | None = None
    """A model of our own."""
    function: str | None = None
    """A Python function, found, called and stopped like a reward function: `package.module:name`,
    `package.module.name` or `path/to/file.py:name`. Of a pair it is `judge(prompt, first, second,
    **fields)`, the probability from 0 to 1 that first is better; of a single response
    `judge(prompt, response, **fields)`, a score from 1 to best_score."""
    args: dict[str, JsonValue] = {}
    """Options of the function, by name."""
    timeout_s: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """Limit on one call of the function, in seconds."""
    num_workers: int = Field(default=2, ge=1)
    """Processes that call it."""
    cache: str | None = None
    """An SQLite file with every answer, which several runs may share; the run's own if not given.
    What is in it is not asked again. ":memory:" keeps none."""

    @model_validator(mode="after")
    def _is_one_of_three(self) -> Self:
        given = [n for n in ("http", "model", "function") if getattr(self, n) is not None]
        if len(given) != 1:
            raise ValueError(
                "give one of http (an endpoint), model (a directory) and function, came "
                + (" and ".join(given) or "none")
            )
        if self.function is not None and (self.think is not None or self.template != "auto"):
            raise ValueError("a function gets prompt and responses: it has no template or think")
        if self.args and self.function is None:
            raise ValueError("args are options of a function, and none is given")
        return self

    @property
    def annotator(self) -> str:
        """Whose the labels are."""
        return f"judge:{self.name}"
