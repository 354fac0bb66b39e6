"""What several tests of plans start from."""

import pytest

from alignjax.sharding import MeshConfig, make_mesh
from tests.plan.small import make_world


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("world"))
