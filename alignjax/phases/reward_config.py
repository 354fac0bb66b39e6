"""What can be set of the phase that trains reward models, and its objectives by name."""

import inspect
from collections.abc import Callable
from typing import Literal, NamedTuple, Self

import jax.numpy as jnp
from jax import Array
from pydantic import Field, model_validator

from alignjax import losses
from alignjax.core.config import Config
from alignjax.data import LAYOUTS, Preferences, View, pairs, rankings
from alignjax.phases.common import PhaseConfig
from alignjax.phases.comparisons import ComparisonData


class Objective(NamedTuple):
    """What is made of the scores of an element."""

    loss: Callable[..., Array]
    """scores [E, K], ranks [E, K], is_valid [E, K], margins [E] and hyperparameters by keyword ->
    [E] float32, nats; 0 where `is_comparable` says no."""
    of_pairs: bool = False
    """Whether an element has to have two completions."""
    counts: Callable[[Array, Array], Array] = losses.is_comparable
    """ranks, is_valid -> [E] bool: the elements that it is a mean over."""


def kwise(scores: Array, ranks: Array, is_valid: Array, margins: Array) -> Array:
    """`losses.kwise_ranking`: all pairs of a prompt, in one element."""
    return losses.kwise_ranking(scores, ranks, is_valid)


def plackett_luce(scores: Array, ranks: Array, is_valid: Array, margins: Array) -> Array:
    """`losses.plackett_luce`: the order of all responses of a prompt."""
    return losses.plackett_luce(scores, ranks, is_valid)


def bradley_terry(
    scores: Array, ranks: Array, is_valid: Array, margins: Array, *, center_coef: float = 0.0
) -> Array:
    """`losses.bradley_terry` of two completions."""
    chosen, rejected, is_pair = _two(scores, ranks, is_valid)
    return losses.bradley_terry(chosen, rejected, is_pair, center_coef=center_coef)


def bradley_terry_margin(scores: Array, ranks: Array, is_valid: Array, margins: Array) -> Array:
    """`losses.bradley_terry_margin` of two completions, with the margin of the element."""
    chosen, rejected, is_pair = _two(scores, ranks, is_valid)
    return losses.bradley_terry_margin(chosen, rejected, margins, is_pair)


def soft_bradley_terry(scores: Array, ranks: Array, is_valid: Array, margins: Array) -> Array:
    """`losses.soft_bradley_terry` of two completions, with the probability of the element."""
    return losses.soft_bradley_terry(scores[:, 0], scores[:, 1], margins, is_valid.all(1))


def _is_pair(ranks: Array, is_valid: Array) -> Array:
    """Ties, too."""
    return is_valid.all(1)


def _two(scores: Array, ranks: Array, is_valid: Array) -> tuple[Array, Array, Array]:
    """Scores of the better and the worse of two completions, and whether there are such."""
    is_first = ranks[:, 0] < ranks[:, 1]
    first, second = scores[:, 0], scores[:, 1]
    chosen = jnp.where(is_first, first, second)
    return chosen, jnp.where(is_first, second, first), losses.is_comparable(ranks, is_valid)


OBJECTIVES = {
    "kwise": Objective(kwise),
    "plackett_luce": Objective(plackett_luce),
    "bradley_terry": Objective(bradley_terry, of_pairs=True),
    "bradley_terry_margin": Objective(bradley_terry_margin, of_pairs=True),
    "soft_bradley_terry": Objective(soft_bradley_terry, of_pairs=True, counts=_is_pair),
}
HYPERPARAMETERS = ("center_coef",)


class ObjectiveConfig(Config):
    """What is minimised."""

    name: Literal[*OBJECTIVES] = "kwise"
    center_coef: float | None = Field(None, ge=0)
    """Of bradley_terry: weight of (sum of both scores)^2, which keeps scores around 0; 0.01 in its
    source."""
    score_coef: float = Field(0.0, ge=0)
    """Weight of the mean of score^2 over the responses of a prompt: scores stay small."""

    @model_validator(mode="after")
    def _takes(self) -> Self:
        given = {name for name in HYPERPARAMETERS if getattr(self, name) is not None}
        parameters = inspect.signature(OBJECTIVES[self.name].loss).parameters.values()
        taken = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        if given - taken:
            raise ValueError(
                f"objective {self.name!r} has no {', '.join(sorted(given - taken))}; it has "
                f"{', '.join(taken) or 'no hyperparameters'}"
            )
        return self

    @property
    def options(self) -> dict[str, float]:
        """Hyperparameters that are set, by keyword."""
        named = {name: getattr(self, name) for name in HYPERPARAMETERS}
        return {name: value for name, value in named.items() if value is not None}


class RewardData(ComparisonData):
    """Preferences to learn from."""

    pairs: Literal["all", "best_worst"] | None = None
    """Make an element of each pair of responses, or of the best against the worst; null: all
    responses of a prompt in one element, where shared work is done once (arXiv:2203.02155)."""
    margin: str | None = None
    """Of bradley_terry_margin, with pairs: "scores", the difference of the scores; or the name of a
    field of the records that holds a number."""
    margin_scale: float = Field(1.0, allow_inf_nan=False)
    """What the margin is multiplied by."""
    prob_field: str | None = None
    """Of soft_bradley_terry, with pairs: the field of a record that says how likely it is, 0 to 1,
    that the better response is the better one."""
    ties: bool = False
    """Of soft_bradley_terry, with all pairs: learn from two responses of one rank, too, with
    probability 1/2, so that what a judge does not tell apart is scored alike; false: leave them
    out."""
    reference: str | list[str] | None = None
    """Responses whose scores have mean 0 and standard deviation 1 once normalised by reward.json,
    such as demonstrations (prompt, completion); null: those of eval, or else of train."""
    reference_layout: Literal["auto", *LAYOUTS] = "auto"


class RewardPhaseConfig(PhaseConfig):
    """`phase: reward`."""

    phase: Literal["reward"]
    data: RewardData
    objective: ObjectiveConfig = ObjectiveConfig()

    @model_validator(mode="after")
    def _has_margin(self) -> Self:
        is_used = self.objective.name == "bradley_terry_margin"
        if is_used != (self.data.margin is not None):
            raise ValueError(
                f"objective.name={self.objective.name!r} with data.margin={self.data.margin!r}: "
                "bradley_terry_margin and a margin go together; give both, or neither"
            )
        if is_used and self.data.pairs is None:
            raise ValueError('margins are of pairs: set data.pairs to "all" or "best_worst"')
        return self

    @model_validator(mode="after")
    def _has_probabilities(self) -> Self:
        data = self.data
        is_used = self.objective.name == "soft_bradley_terry"
        if is_used != (data.prob_field is not None):
            raise ValueError(
                f"objective.name={self.objective.name!r} with data.prob_field="
                f"{data.prob_field!r}: soft_bradley_terry and the field of the records with the "
                "probabilities go together; give both, or neither"
            )
        if is_used and data.pairs is None:
            raise ValueError('probabilities are of pairs: set data.pairs to "all" or "best_worst"')
        if data.ties and not (is_used and data.pairs == "all"):
            raise ValueError("data.ties needs soft_bradley_terry, and data.pairs: all")
        return self

    def view(self, preferences: Preferences) -> View:
        """What is learned from."""
        data = self.data
        if data.pairs is None:
            return rankings(preferences)
        return pairs(
            preferences, data.pairs, margin=data.margin, margin_scale=data.margin_scale,
            prob=data.prob_field, ties=data.ties,
        )  # fmt: skip

    @model_validator(mode="after")
    def _drops_nothing(self) -> Self:
        if self.model.lora is not None and self.model.lora.dropout > 0:
            raise ValueError(
                f"model.lora.dropout={self.model.lora.dropout}: both responses of a pair are to be "
                "scored by the same model; set it to 0"
            )
        return self
