"""What can be set of the phases on preferences: losses by name, data, reference."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from jax import Array
from pydantic import Field, model_validator

from alignjax import losses
from alignjax.core.errors import KeyedError
from alignjax.data import Preferences, View, pairs, unpaired
from alignjax.phases.common import PhaseConfig
from alignjax.phases.comparisons import ComparisonData
from alignjax.phases.grpo_config import keyword_defaults

PAIRS = ("pairs",)
SINGLES = ("logps", "ref_logps", "is_desirable", "kl", "is_valid")


@dataclass(frozen=True)
class Loss:
    """A function of `alignjax.losses`, and what it needs."""

    function: Callable[..., Array]
    """Arrays named by `takes`, by position, and hyperparameters by keyword -> [N]."""
    takes: tuple[str, ...] = PAIRS
    """Names of `preference_loss.pair_inputs` or, of losses on single responses, `single_inputs`."""
    reads_reference: bool = True
    per_token: bool = False
    """Whether it compares means over tokens rather than sums."""
    needs_whole_batch: bool = False
    """Whether the loss of one pair depends on the others of its update."""

    @property
    def is_unpaired(self) -> bool:
        return "pairs" not in self.takes


LOSSES: dict[str, Loss] = {
    "dpo": Loss(losses.dpo),
    "soft_dpo": Loss(losses.soft_dpo, (*PAIRS, "preference_prob")),
    "robust_dpo": Loss(losses.robust_dpo),
    "length_normalized_dpo": Loss(losses.length_normalized_dpo, per_token=True),
    "wpo": Loss(losses.wpo, (*PAIRS, "weights")),
    "dpop": Loss(losses.dpop),
    "hinge": Loss(losses.hinge),
    "ipo": Loss(losses.ipo),
    "ipo_mean": Loss(losses.ipo_mean, per_token=True),
    "exo": Loss(losses.exo),
    "discopop": Loss(losses.discopop),
    "f_dpo_forward_kl": Loss(losses.f_dpo_forward_kl),
    "f_dpo_js": Loss(losses.f_dpo_js),
    "f_dpo_alpha": Loss(losses.f_dpo_alpha),
    "kto": Loss(losses.kto, SINGLES),
    "bco": Loss(losses.bco, (*PAIRS, "delta")),
    "nca": Loss(losses.nca),
    "sppo": Loss(losses.sppo),
    "apo_zero": Loss(losses.apo_zero),
    "apo_down": Loss(losses.apo_down),
    "aot": Loss(losses.aot, needs_whole_batch=True),
    "aot_unpaired": Loss(losses.aot_unpaired, needs_whole_batch=True),
    "simpo": Loss(losses.simpo, reads_reference=False, per_token=True),
    "alphapo": Loss(losses.alphapo, reads_reference=False, per_token=True),
    "cpo": Loss(losses.cpo, reads_reference=False),
    "orpo": Loss(losses.orpo, reads_reference=False, per_token=True),
    "chosen_nll": Loss(losses.chosen_nll, reads_reference=False, per_token=True),
}
"""What `losses` of a config may name; docs/papers.md has their papers."""

_ZEROS, _ONES = np.zeros(1, np.float32), np.ones(1, np.int32)
_ONE: dict[str, Any] = {
    "pairs": losses.Pairs(*[_ZEROS] * 4, _ONES, _ONES, np.ones(1, bool)),
    "preference_prob": _ZEROS, "weights": _ZEROS, "delta": np.float32(0),
    "logps": _ZEROS, "ref_logps": _ZEROS, "is_desirable": np.ones(1, bool), "kl": np.float32(0),
    "is_valid": np.ones(1, bool),
}  # fmt: skip
"""One element, to try hyperparameters on."""


@dataclass(frozen=True)
class Part:
    """A loss of a sum of losses."""

    weight: float
    loss: Loss
    options: dict[str, float]

    def __call__(self, inputs: dict[str, Any]) -> Array:
        return self.loss.function(*(inputs[name] for name in self.loss.takes), **self.options)


@dataclass(frozen=True)
class Objective:
    """A sum of losses, of pairs all or of single responses all. Rewards are those of the first."""

    parts: tuple[Part, ...]
    length_alpha: float

    @property
    def takes(self) -> set[str]:
        return {name for part in self.parts for name in part.loss.takes}

    @property
    def is_unpaired(self) -> bool:
        return self.parts[0].loss.is_unpaired

    @property
    def reads_reference(self) -> bool:
        return any(part.loss.reads_reference for part in self.parts)

    @property
    def needs_whole_batch(self) -> bool:
        return any(part.loss.needs_whole_batch for part in self.parts)

    @property
    def beta(self) -> float:
        """Reward units for a nat."""
        options = self.parts[0].options
        return options.get("beta", options.get("coef", 1.0))


class ObjectiveConfig(PhaseConfig):
    """What the configs of all phases on preferences share."""

    losses: dict[Literal[*LOSSES], dict[str, float]] = Field({"dpo": {}}, min_length=1)
    """What is minimised: the sum of these losses, each with its hyperparameters, and `weight`, 1 if
    not given. `{dpo: {beta: 0.1}, chosen_nll: {weight: 1}}` is iterative RPO. Metrics rewards/...
    are of the first."""
    reference: str | None = None
    """A directory or id of the Hub with the weights that the policy is held to; null: those that it
    starts from, which under LoRA are the base."""
    length_alpha: float = Field(1.0, ge=0, le=1)
    """Below 1, tokens of a completion beyond the length of the other one count by this factor
    (LD-DPO, arXiv:2409.06411)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """Writes all hyperparameters out, so that what a run saves is what it reads back."""
        if not isinstance(values, dict):
            return values
        chosen = values.get("losses", {"dpo": {}})
        if not isinstance(chosen, dict):
            return values
        filled = {
            name: {"weight": 1.0, **keyword_defaults(LOSSES[name].function), **options}
            if name in LOSSES and isinstance(options, dict)
            else options
            for name, options in chosen.items()
        }
        return values | {"losses": filled}

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        for name, options in self.losses.items():
            taken = ("weight", *keyword_defaults(LOSSES[name].function))
            if unknown := options.keys() - set(taken):
                raise KeyedError(
                    ("losses", name),
                    f"has no {', '.join(sorted(unknown))}; it has {', '.join(taken)}",
                )
        for name, part in zip(self.losses, self.objective.parts, strict=True):
            try:
                part(_ONE)
            except ValueError as fault:
                raise KeyedError(("losses", name), str(fault)) from None
        kinds = {part.loss.is_unpaired for part in self.objective.parts}
        if len(kinds) > 1:
            raise ValueError(
                f"losses: {', '.join(self.losses)} are of pairs and of single responses; take "
                "those of one kind"
            )
        if self.length_alpha < 1 and self.objective.is_unpaired:
            raise ValueError(
                f"length_alpha={self.length_alpha} compares the lengths of a pair, and "
                f"{', '.join(self.losses)} takes single responses; leave it out"
            )
        if self.model.lora is not None and self.model.lora.dropout > 0:
            raise ValueError(
                f"model.lora.dropout={self.model.lora.dropout}: log-probs of a policy that drops "
                "inputs at random say little against those of a reference that does not; set "
                "it to 0"
            )
        return self

    def check_micro_batches(self, micro_batches: int) -> None:
        """Raises ValueError if a loss cannot be split."""
        if micro_batches > 1 and self.objective.needs_whole_batch:
            raise ValueError(
                f"data.micro_batches={micro_batches}: {', '.join(self.losses)} sorts the pairs of "
                "a whole update; set it to 1, with fewer data.num_prompts if memory is short"
            )

    @property
    def objective(self) -> Objective:
        """The same, as `preference_loss` takes it."""
        parts = []
        for name, options in self.losses.items():
            rest = {key: value for key, value in options.items() if key != "weight"}
            parts.append(Part(options["weight"], LOSSES[name], rest))
        return Objective(tuple(parts), self.length_alpha)


class PreferenceData(ComparisonData):
    """Preferences, and which of their responses are compared."""

    pairs: Literal["all", "best_worst"] = "all"
    """Of more than two responses to a prompt: all pairs of unlike rank, or the best against the
    worst."""
    prob_field: str | None = None
    """Of soft_dpo: the field of a record that says how likely it is, 0 to 1, that the better
    response is the better one."""
    ties: bool = False
    """Of soft_dpo, with all pairs: learn from two responses of one rank, too, with probability 1/2,
    so that what a judge does not tell apart stays as it is; false: leave them out."""
    shared_prompt: bool = True
    """Compute the prompt once for both responses."""


class PreferenceConfig(ObjectiveConfig):
    """`phase: preference`."""

    phase: Literal["preference"]
    data: PreferenceData
    cache_dir: str | None = None
    """Where the log-probs of the reference are kept for other runs; null: alignjax/reference in the
    user's cache."""

    @model_validator(mode="after")
    def _has_its_data(self) -> Self:
        self.check_micro_batches(self.data.micro_batches)
        needs_prob = "preference_prob" in self.objective.takes
        if needs_prob != (self.data.prob_field is not None):
            raise ValueError(
                "soft_dpo and data.prob_field, the field of the records with the probabilities, go "
                "together; give both, or neither"
            )
        if self.data.ties and not (needs_prob and self.data.pairs == "all"):
            raise ValueError("data.ties needs soft_dpo, and data.pairs: all")
        if self.objective.is_unpaired and self.data.num_prompts < 2:
            raise ValueError(
                f"data.num_prompts={self.data.num_prompts}: the KL of kto is a mean over an "
                "update; use at least 2"
            )
        return self

    def view(self, preferences: Preferences) -> View:
        """What is learned from."""
        if self.objective.is_unpaired:
            return unpaired(preferences)
        data = self.data
        return pairs(preferences, data.pairs, prob=data.prob_field, ties=data.ties)
