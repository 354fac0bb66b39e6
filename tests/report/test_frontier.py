"""Reward against KL: which metrics, in which unit, of which runs."""

import json

import numpy as np
import pytest

from alignjax.cli.main import main
from alignjax.core.errors import UserError
from alignjax.report import frontier_of, frontier_picture, style

PPO = [
    {"step": 0, "eval/sampled/reward": 0.5, "eval/sampled/kl": 0.0},
    {"step": 1, "reward": 0.6, "objective/kl": 1.0},
    {"step": 2, "reward": 0.7, "objective/kl": 2.0, "eval/sampled/reward": 0.8,
     "eval/sampled/kl": 1.5, "eval/best_of_n/reward": 0.9, "eval/best_of_n/kl": 0.6},
    {"step": 3, "reward": None, "objective/kl": 2.5},
]  # fmt: skip
GRPO = [
    {"step": i, "reward": i / 10, "kl": i / 100, "completions/mean_length": 20.0 + i}
    for i in range(1, 4)
]


def test_held_out_prompts_come_first():
    found = frontier_of(PPO)
    np.testing.assert_array_equal(found.steps, [0, 2])
    np.testing.assert_array_equal(found.kl, [0, 1.5])
    np.testing.assert_array_equal(found.reward, [0.5, 0.8])
    assert found.is_held_out and found.best_of_n == (0.6, 0.9)


def test_a_kl_per_token_becomes_one_per_completion():
    found = frontier_of(GRPO)
    np.testing.assert_allclose(found.kl, [0.01 * 21, 0.02 * 22, 0.03 * 23])
    np.testing.assert_allclose(found.reward, [0.1, 0.2, 0.3])
    assert not found.is_held_out and found.best_of_n is None


def test_where_evaluations_have_no_kl_the_training_prompts_are_taken():
    lines = [{k: v for k, v in row.items() if k != "eval/sampled/kl"} for row in PPO]
    found = frontier_of(lines)
    np.testing.assert_array_equal(found.steps, [1, 2])
    np.testing.assert_array_equal(found.kl, [1.0, 2.0])


@pytest.mark.parametrize(
    "lines", [[], GRPO[:1], [{"step": 1, "reward": 1.0}] * 3, [{"step": 1, "kl": 1.0}] * 3]
)
def test_a_run_without_both_has_none(lines, tmp_path):
    assert frontier_of(lines) is None
    with pytest.raises(UserError, match=r"mine: no two lines of its metrics have .*kl_coef above"):
        frontier_picture({"mine": lines}, tmp_path / "f.png")


def test_several_runs_in_one_picture(tmp_path, monkeypatch):
    drawn = []
    save = style.save
    monkeypatch.setattr(
        style, "save", lambda picture, path: drawn.append(save(picture, path) or picture)
    )
    frontier_picture({"ppo": PPO, "grpo": GRPO}, tmp_path / "f.png")
    assert (tmp_path / "f.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    lines = {line.get_label(): line.get_xydata() for line in axes.lines}
    np.testing.assert_array_equal(lines["ppo"], [[0, 0.5], [1.5, 0.8]])
    assert {text.get_text() for text in axes.texts} == {"ppo", "grpo", "best of n"}
    assert "prompts" not in axes.get_title(loc="left"), "one run's are held out, the other's not"


def test_the_verb(tmp_path, capsys):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(row) + "\n" for row in PPO)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    out = str(tmp_path / "both.png")
    assert main(["frontier", str(tmp_path / "x"), str(tmp_path / "y"), "--out", out]) == 0
    assert out in capsys.readouterr().out
    assert main(["frontier", str(tmp_path), "--out", out]) == 2
    assert "no metrics.jsonl" in capsys.readouterr().err
