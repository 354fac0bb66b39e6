"""Recipes for models of people's own: what they train divides over the chips that they name."""

import re

import pytest

from alignjax.core.config import build, find_config, load
from alignjax.phases.common import PhaseConfig
from alignjax.recipes.graph import RecipeConfig

RECIPES = (
    "constitutional_qwen2_5_1_5b", "dpo_llama3_8b_tpu", "gsm8k_qwen3_0_6b",
    "instructgpt_llama3_8b_tpu", "r1_distill_qwen3_1_7b", "r1_qwen3_1_7b", "r1_zero_qwen3_1_7b",
    "rlaif_http_qwen3_1_7b", "rlaif_qwen3_1_7b",
)  # fmt: skip


def rows(stage: PhaseConfig) -> int:
    """Of a micro-batch."""
    parts = stage.data.micro_batches
    match stage.phase:
        case "sft" | "distill":
            return stage.data.rows
        case "reward" | "preference":
            return stage.data.num_prompts // parts
        case _:
            return stage.rows_per_update // parts


@pytest.mark.parametrize("name", RECIPES)
def test_rows_divide_over_the_chips_of_a_tpu_host(name: str) -> None:
    path = find_config(f"recipes/{name}")
    (num_chips,) = re.findall(r"TPU .*?(\d+) chips", path.read_text(encoding="utf-8"))
    stages = build(RecipeConfig, load(path)).stages.values()
    # Whatever holds a model spreads it over all chips.
    meshes = [stage.mesh for stage in stages if hasattr(stage, "mesh")]
    assert {(mesh.data, mesh.fsdp, mesh.tensor) for mesh in meshes} == {(1, -1, 1)}
    trained = [stage for stage in stages if isinstance(stage, PhaseConfig)]
    assert trained and all(rows(stage) % int(num_chips) == 0 for stage in trained)
