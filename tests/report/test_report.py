"""The pictures show the numbers and the texts that they are given."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex

from alignjax.core.errors import UserError
from alignjax.report import (
    Curve,
    Transcript,
    reasoning,
    reasoning_picture,
    stages_picture,
    style,
    training_report,
)
from alignjax.report.training import smooth


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures = []
    save = style.save

    def keep(picture, path):
        figures.append(picture)
        save(picture, path)

    monkeypatch.setattr(style, "save", keep)
    return figures


def lines(axes):
    return {line.get_label(): np.array(line.get_xydata()) for line in axes.lines}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n")


def test_training_report(tmp_path, drawn):
    metrics = [
        {"step": i, "loss": 1 / i, "rewards/exact/mean": i / 10, "grad_norm": 1.0, "unknown": 3.0}
        for i in range(1, 5)
    ]
    metrics[1]["grad_norm"] = None
    metrics[3]["eval/loss"] = 0.5
    training_report(metrics, tmp_path / "run" / "report.png", "a run")
    assert is_png(tmp_path / "run" / "report.png")
    panels = {axes.get_title(loc="left"): lines(axes) for axes in drawn[0].axes}
    assert list(panels) == ["Loss", "Reward", "Gradient norm"]
    np.testing.assert_allclose(panels["Loss"]["loss"], [[1, 1], [2, 1 / 2], [3, 1 / 3], [4, 1 / 4]])
    np.testing.assert_array_equal(panels["Loss"]["eval/loss"], [[4, 0.5]])
    assert list(panels["Reward"]) == ["rewards/exact/mean"]
    np.testing.assert_array_equal(panels["Gradient norm"]["grad_norm"], [[1, 1], [3, 1], [4, 1]])
    assert drawn[0].get_suptitle() == "a run"


def test_a_long_run_is_smoothed_over_its_raw_line(tmp_path, drawn):
    values = [math.sin(i) for i in range(100)]
    training_report([{"step": i, "loss": v} for i, v in enumerate(values)], tmp_path / "r.png")
    raw, smoothed = drawn[0].axes[0].lines
    np.testing.assert_allclose(raw.get_ydata(), values)
    assert np.std(smoothed.get_ydata()) < np.std(values)


def test_smooth_is_a_centred_mean_that_shortens_at_the_ends():
    values = np.arange(120.0) ** 2  # a window of 3 on either side
    expected = [np.mean(values[max(0, i - 3) : i + 4]) for i in range(120)]
    np.testing.assert_allclose(smooth(values), expected)


def test_nothing_to_draw(tmp_path):
    for metrics in ([], [{"step": 1, "other": 2.0}], [{"step": 1, "loss": None}]):
        with pytest.raises(UserError, match="nothing to draw"):
            training_report(metrics, tmp_path / "r.png")


def test_reasoning_picture(tmp_path, drawn):
    think = Curve([0, 5, 10], [0.1, 0.4, 0.79], [0.05, 0.5, 1.0], [7, 20, 35])
    control = Curve([0, 10], [0.04, 0.05], (), [5, 6])
    transcripts = [
        Transcript("before", "1+1=", "<answer>3</answer>", False),
        Transcript("after", "1+1=", "$\\x$<think>1+1=2;</think>\n<answer>2</answer>", True),
    ]
    reasoning_picture(tmp_path / "r.png", think, control, transcripts, subtitle="small")
    assert is_png(tmp_path / "r.png")
    left, right, before, after = drawn[0].axes
    curves = [line.get_xydata().tolist() for line in left.lines]
    assert curves == [
        [[0, 0.1], [5, 0.4], [10, 0.79]], [[0, 0.05], [5, 0.5], [10, 1.0]], [[0, 0.04], [10, 0.05]],
    ]  # fmt: skip
    assert sorted(texts(left)) == ["greedy 100%", "no thinking 5%", "sampled 79%"]
    assert sorted(texts(right)) == ["no thinking 6", "thinking 35"]
    assert texts(before) == ["before", "wrong", "1+1=\n<answer>3</answer>"]
    assert texts(after) == [
        "after",
        "right",
        "1+1=\n$\\x$<think>1+1=2;</think>\n<answer>2</answer>",
    ]
    assert to_hex(before.lines[0].get_color()) == style.RED
    assert to_hex(after.lines[0].get_color()) == style.GREEN


def test_reasoning_picture_of_one_measurement_alone(tmp_path, drawn):
    reasoning_picture(tmp_path / "r.png", Curve([0], [0.1]))
    assert is_png(tmp_path / "r.png") and len(drawn[0].axes) == 2


def test_reflection_has_a_panel_where_it_was_measured(tmp_path, drawn):
    think = Curve([0, 5], [0.1, 0.4], [], [7, 20], reflects=[0.5, 0.025])
    control = Curve([0, 5], [0.1, 0.1], [], [5, 6], reflects=[0.0, 0.0])
    reasoning_picture(tmp_path / "r.png", think, control)
    assert is_png(tmp_path / "r.png")
    last = drawn[0].axes[2]
    assert [line.get_ydata().tolist() for line in last.lines] == [[0.5, 0.025], [0.0, 0.0]]
    assert sorted(texts(last)) == ["no thinking 0.0%", "thinking 2.5%"]
    ends = [axes.get_position() for axes in drawn[0].axes]
    assert ends[0].x1 < ends[1].x0 and ends[1].x1 < ends[2].x0 and ends[2].x1 < 1


def test_names_of_lines_do_not_overlap(tmp_path, drawn):
    same = Curve([0, 1], [0.5, 0.5], [0.5, 0.5])
    reasoning_picture(tmp_path / "r.png", same, Curve([0, 1], [0.5, 0.5]))
    heights = sorted(text.xy[1] for text in drawn[0].axes[0].texts)
    assert min(np.diff(heights)) > 0.07


def test_transcripts_wrap_between_steps_and_lose_nothing():
    steps = "".join(f"{i}+{i}={2 * i};" for i in range(10, 24))
    text = f"<think>{steps}</think>" + "x" * 100
    wrapped = reasoning.wrap(Transcript("", "p", text, True))
    assert "".join(wrapped[1:]) == text
    assert max(map(len, wrapped)) <= reasoning.WIDTH
    assert wrapped[1].endswith(";")
    long = reasoning.wrap(Transcript("", "p", "y" * 5000, True))
    assert len(long) == reasoning.HEIGHT and long[-1] == "..."


def test_stages_have_their_bars_over_their_transcripts(tmp_path, drawn):
    shares = {"Right": {"base": 0.1, "end": 0.9}, "Unsafe": {"base": 0.5, "end": 0.0}}
    rows = [
        [Transcript("base", "1+1=", "3", False), Transcript("end", "1+1=", "2", True)],
        [Transcript("end", "copy a=", "a;" * 60, True)],
    ]
    stages_picture(tmp_path / "s.png", shares, rows, title="A line", subtitle="of two")
    assert is_png(tmp_path / "s.png")
    first, second, *transcripts = drawn[0].axes
    for axes, (name, by_stage) in zip((first, second), shares.items(), strict=True):
        assert axes.get_title(loc="left") == name
        assert [bar.get_height() for bar in axes.patches] == list(by_stage.values())
        assert [label.get_text() for label in axes.get_xticklabels()] == ["base", "end"]
    assert texts(first) == ["10%", "90%"]
    assert [texts(axes)[:2] for axes in transcripts] == [
        ["base", "wrong"], ["end", "right"], ["end", "right"]
    ]  # fmt: skip
    # Nothing lies over anything else, and all of it is on the page.
    boxes = [axes.get_position() for axes in drawn[0].axes]
    assert all(0 <= box.y0 < box.y1 <= 1 and 0 <= box.x0 < box.x1 <= 1 for box in boxes)
    assert not any(
        a.x0 < b.x1 and b.x0 < a.x1 and a.y0 < b.y1 and b.y0 < a.y1
        for i, a in enumerate(boxes) for b in boxes[i + 1 :]
    )  # fmt: skip
