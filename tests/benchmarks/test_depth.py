"""Programs of training and sampling do not grow with the number of layers."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import depth

SMALL = {
    "family": "qwen3", "hidden_size": 16, "num_heads": 2, "num_kv_heads": 1,
    "intermediate_size": 32, "vocab_size": 64, "max_position_embeddings": 512,
}  # fmt: skip


@pytest.mark.slow
def test_size_is_the_same_with_8_and_32_layers():
    """Both what goes to the compiler, on which its time depends, and what comes out."""
    few, many = (depth.programs(layers, **SMALL) for layers in (8, 32))
    assert few.keys() == many.keys() and len(few) == 3
    for name in few:
        assert len(many[name].as_text()) < 1.02 * len(few[name].as_text()), name
        compiled = [len(one[name].compile().as_text()) for one in (few, many)]
        assert compiled[1] < 1.2 * compiled[0], name
