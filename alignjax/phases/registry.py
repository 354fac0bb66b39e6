"""The name of a phase -> its config and its class. A new phase is one line here."""

from typing import Any

from alignjax.core.config import Config
from alignjax.phases.common import PhaseConfig
from alignjax.phases.critique import Critique
from alignjax.phases.critique_config import CritiqueConfig
from alignjax.phases.distill import Distill
from alignjax.phases.distill_config import DistillConfig
from alignjax.phases.grpo import Grpo
from alignjax.phases.grpo_config import GrpoConfig
from alignjax.phases.label import Label
from alignjax.phases.label_config import LabelConfig
from alignjax.phases.online_distill import OnlineDistill
from alignjax.phases.online_distill_config import OnlineDistillConfig
from alignjax.phases.online_preference import OnlinePreference
from alignjax.phases.online_preference_config import OnlineConfig
from alignjax.phases.ppo import Ppo
from alignjax.phases.ppo_config import PpoConfig
from alignjax.phases.preference import Preference
from alignjax.phases.preference_config import PreferenceConfig
from alignjax.phases.reject import Reject
from alignjax.phases.reject_config import RejectConfig
from alignjax.phases.reward import Reward
from alignjax.phases.reward_config import RewardPhaseConfig
from alignjax.phases.sample import SampleResponses
from alignjax.phases.sample_config import SampleConfig
from alignjax.phases.sft import Sft, SftConfig

PHASES: dict[str, tuple[type[PhaseConfig], type[Any]]] = {
    "sft": (SftConfig, Sft),
    "reward": (RewardPhaseConfig, Reward),
    "preference": (PreferenceConfig, Preference),
    "online_preference": (OnlineConfig, OnlinePreference),
    "grpo": (GrpoConfig, Grpo),
    "ppo": (PpoConfig, Ppo),
    "distill": (DistillConfig, Distill),
    "online_distill": (OnlineDistillConfig, OnlineDistill),
}
"""Those that train a model."""

DATA_PHASES: dict[str, tuple[type[Config], type[Any]]] = {
    "sample": (SampleConfig, SampleResponses),
    "critique": (CritiqueConfig, Critique),
    "label": (LabelConfig, Label),
    "reject": (RejectConfig, Reject),
}
"""Those that make records; see `phases.produce`."""
