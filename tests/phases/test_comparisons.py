"""What a model is given of rows of comparisons, and which rows a process makes."""

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from alignjax.core.errors import UserError
from alignjax.data import Element, rankings
from alignjax.data.comparison_rows import pack_elements
from alignjax.phases.comparisons import ComparisonData, batches, per_element, token_rows_of
from alignjax.recipes import sevens
from alignjax.sharding import MeshConfig, make_mesh
from alignjax.text import load_tokenizer


def rows(shared_prompt):
    two = (np.array([1, 2]), np.array([3]))
    elements = [Element(np.array([5, 6]), two, (1, 2)), Element(np.array([9]), two, (2, 1))]
    return pack_elements(
        elements, num_rows=2, row_len=16, num_responses=2, shared_prompt=shared_prompt
    )


def test_with_a_shared_prompt_a_model_gets_branches_of_elements():
    batch = rows(True)
    given = token_rows_of(batch, 2, shared_prompt=True)
    assert given.keys() == {"tokens", "mask", "positions", "segment_ids", "branches"}
    np.testing.assert_array_equal(given["segment_ids"][0, :11], [1] * 6 + [2] * 5)


def test_without_each_completion_is_a_segment():
    given = token_rows_of(rows(False), 2, shared_prompt=False)
    assert given.keys() == {"tokens", "mask", "positions", "segment_ids"}
    expected = [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 0, 0, 0, 0]
    np.testing.assert_array_equal(given["segment_ids"][0], expected)
    np.testing.assert_array_equal(given["positions"][0, :8], [0, 1, 2, 3, 0, 1, 2, 0])


def test_entries_by_completion_are_entries_by_element():
    batch = rows(True)
    assert batch["ranks"].shape == (2, 2, 2)
    found = per_element(np.arange(8).reshape(2, 4), batch)
    np.testing.assert_array_equal(found, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sevens")
    sevens.write(folder, seed=1, num_train=20, num_test=4)
    return folder


def stream(world, num_devices=1, context=64, **values):
    data = ComparisonData.model_validate(
        {"train": str(world / "train.jsonl"), "row_len": 64, "num_prompts": 4, **values}
    )
    view = rankings(data.open(data.train))
    mesh = make_mesh(MeshConfig(data=num_devices), jax.devices()[:num_devices])
    return batches(
        data, view, load_tokenizer(str(world / "tokenizer")), mesh, context=context,
        num_responses=view.num_responses, seed=0,
    )  # fmt: skip


def test_rows_are_those_of_the_config(world):
    batch = next(stream(world, micro_batches=2))
    assert batch["tokens"].shape == (2, 2, 64) and batch["ranks"].shape == (2, 2, 4, 4)
    assert (batch["branches"] == 0).any() and (batch["index"] >= 0).sum() == 4


def test_rows_have_to_divide(world):
    with pytest.raises(UserError, match="2 rows in a micro-batch do not divide over 8 devices"):
        stream(world, 8, micro_batches=2)
    with pytest.raises(ValidationError, match="num_prompts=4 comparisons do not divide into 3"):
        stream(world, micro_batches=3)


def test_what_ends_beyond_the_context_is_too_long(world):
    with pytest.raises(UserError, match=r"train\.jsonl:\d+: \d+ tokens, but only 3 fit"):
        next(stream(world, context=3, overlong="error"))
    with pytest.raises(UserError, match="records is too long and was dropped; allow more tokens"):
        next(stream(world, context=3))
