"""The file of a reference's log-probs: found by content, whole or not at all."""

import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.phases.reference_logps import cached, default_cache, weights_digest

ROWS = {
    name: np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    for name in ("tokens", "mask", "positions", "segment_ids", "branches")
}


class Notes:
    """Stands in for `Progress`."""

    def __init__(self):
        self.notes, self.warnings = [], []
        self.note, self.warn = self.notes.append, self.warnings.append


def batches(index=((3, -1, 0), (1, -1, 4)), **changes):
    index = np.array(index, np.int32)[..., None]  # [M, R, N]
    return [{**ROWS, "index": index, **changes}]


def look_up(folder, *, key="k", found=None, notes=None, num_elements=5):
    """Log-probs that are 10 times the place, and that and a half; place 2 is left out."""
    calls = []

    def compute(batch):
        calls.append(batch)
        place = batch["index"].astype(np.float32)
        return np.stack([10 * place, 10 * place + 0.5], axis=-1)

    found = batches() if found is None else found
    out = cached(
        compute, lambda: iter(found), num_elements, 2,
        key=key, directory=folder, progress=notes or Notes(),
    )  # fmt: skip
    return out, len(calls)


def test_places_by_hand_and_a_second_time(tmp_path):
    nan = np.nan
    expected = np.array([[0, 0.5], [10, 10.5], [nan, nan], [30, 30.5], [40, 40.5]], np.float32)
    folder = tmp_path / "not" / "there"
    notes = Notes()
    for num_calls in (1, 0):
        found, calls = look_up(folder, notes=notes)
        np.testing.assert_array_equal(found, expected)
        assert calls == num_calls
    assert [path.suffix for path in folder.iterdir()] == [".npz"]
    assert "batch 1 of 1" in notes.notes[0] and "read from" in notes.notes[1]


def test_other_content_is_another_file(tmp_path):
    look_up(tmp_path)
    others = [{"key": "other"}, {"num_elements": 6}]
    others += [{"found": batches(**{name: array + 1})} for name, array in ROWS.items()]
    others += [{"found": batches(index=((0, -1, 3), (1, -1, 4)))}]
    for number, change in enumerate(others, start=2):
        assert look_up(tmp_path, **change)[1] == 1, change
        assert len(list(tmp_path.iterdir())) == number
    assert look_up(tmp_path)[1] == 0


def damage_end(data):
    return data[: len(data) // 2]


def damage_byte(data):
    middle = data.index(b"NUMPY") + 128 + 9  # in the numbers, past their header
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("damage", [damage_end, damage_byte, lambda data: b"", lambda data: b"no"])
def test_a_damaged_file_is_noticed_and_written_anew(tmp_path, damage):
    expected, _ = look_up(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    notes = Notes()
    found, calls = look_up(tmp_path, notes=notes)
    np.testing.assert_array_equal(found, expected)
    assert calls == 1
    assert len(notes.warnings) == 1 and "is damaged" in notes.warnings[0]
    assert look_up(tmp_path)[1] == 0


def test_a_file_of_another_shape_is_noticed(tmp_path):
    look_up(tmp_path)
    (path,) = tmp_path.iterdir()
    with path.open("wb") as file:
        np.savez(file, logps=np.zeros((4, 2), np.float32))
    notes = Notes()
    assert look_up(tmp_path, notes=notes)[1] == 1
    assert "float32[4, 2]" in notes.warnings[0]


def test_a_digest_is_of_names_dtypes_shapes_and_values():
    weights = {"a": jnp.arange(6.0), "b": {"c": jnp.ones((2, 3))}}
    same = {"b": {"c": jnp.ones((2, 3))}, "a": jnp.arange(6.0)}
    others = [
        {"a": weights["a"].at[5].set(4.9), "b": weights["b"]},
        {"a": weights["a"].astype(jnp.bfloat16), "b": weights["b"]},
        {"a": weights["a"].reshape(2, 3), "b": weights["b"]},
        {"z": weights["a"], "b": weights["b"]},
    ]
    digests = [weights_digest(w, kind="x") for w in (weights, *others)]
    digests.append(weights_digest(weights, kind="y"))
    assert len(set(digests)) == 6
    assert weights_digest(same, kind="x") == digests[0]


def test_the_cache_is_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "alignjax" / "reference"
