"""One tiny run, made by the command line from the smoke config, that the tests of verbs look at."""

from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parents[2]
SMOKE = REPO / "configs" / "smoke" / "grpo.yaml"


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """What `alignjax run configs/smoke/grpo.yaml` wrote, shortened: `root`, and `command`."""
    from alignjax.cli.main import main

    out = tmp_path_factory.mktemp("smoke")
    command = [
        "run", str(SMOKE), f"output_dir={out}",
        "stages.base.loop.steps=30",
        "stages.grpo.loop.steps=4", "stages.grpo.loop.checkpoint_every=2",
        "stages.grpo.evaluation.num_problems=8",
    ]  # fmt: skip
    assert main(command) == 0
    return SimpleNamespace(root=out / "smoke_grpo", command=command)
