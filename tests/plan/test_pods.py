"""The configs of pods: shapes that ship, sizes that are those of the models' names."""

import json
import math
import re
from pathlib import Path

import jax
import pytest

from alignjax.core.config import load
from alignjax.models import Model
from alignjax.models.hf_config import from_hf
from alignjax.plan.topology import Topology

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MODELS = sorted((CONFIGS / "models").rglob("config.json"))
PODS = sorted((CONFIGS / "pods").glob("*.yaml"))


def test_shapes_have_the_published_numbers_of_parameters():
    def size(path):
        config = from_hf(str(path), json.loads(path.read_text()))
        shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
        return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))

    assert {path.parent.name: size(path) for path in MODELS} == {
        "Meta-Llama-3-8B": 8_030_261_248,
        "Llama-3.1-8B": 8_030_261_248,
        "Llama-3.1-70B": 70_553_706_496,
        "Qwen2.5-32B": 32_763_876_352,
        "Qwen3-30B-A3B-Base": 30_532_122_624,
    }


@pytest.mark.parametrize("path", PODS, ids=lambda path: path.stem)
def test_a_pod_names_its_slice_and_a_model_whose_shape_ships(path):
    head = path.read_text().split("\n\n")[0]
    command = re.search(r"^# plan +alignjax plan configs/pods/(\S+) --topology (.+)$", head, re.M)
    assert command.group(1) == path.name
    topology = Topology.parse(command.group(2))
    assert topology.num_chips >= 64
    values = load(path).values
    name = values["vars"]["model"] if "stages" in values else values["model"]["path"]
    assert (CONFIGS / "models" / name / "config.json").is_file()
