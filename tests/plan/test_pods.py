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
PODS = sorted((CONFIGS / "pods").glob("*.yaml"))
PUBLISHED = {
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "meta-llama/Llama-3.1-70B": 70_553_706_496,
    "Qwen/Qwen2.5-32B": 32_763_876_352,
    "Qwen/Qwen3-30B-A3B-Base": 30_532_122_624,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shapes_have_the_published_number_of_parameters(name):
    path = CONFIGS / "models" / name / "config.json"
    config = from_hf(str(path), json.loads(path.read_text()))
    shapes = jax.eval_shape(Model(config).init, jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == PUBLISHED[name]


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
