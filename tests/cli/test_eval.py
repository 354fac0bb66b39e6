"""`alignjax eval`: its figures against those that its samples give by hand."""

import json
import math
import re
import shutil

import pytest

from alignjax.cli.main import main
from alignjax.text import load_tokenizer

SETTINGS = ["num_samples=4", "num_problems=6"]


@pytest.fixture(scope="module")
def run(trained):
    return trained.root / "grpo"


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    """The files of one evaluation on problems that are easy to get right: a digit is enough."""
    out = tmp_path_factory.mktemp("eval")
    (out / "digit.py").write_text(
        "def right(prompt, completion, reference):\n"
        "    return float(completion.removesuffix('</answer>')[-1:] in '01234')\n"
    )
    override = f"rewards.functions={{accuracy: {{function: '{out}/digit.py:right', weight: 2.0}}}}"
    assert main(["eval", str(run), *SETTINGS, override, "--out", str(out / "a")]) == 0
    return out / "a"


def test_figures_are_those_of_the_samples(report, trained):
    figures = json.loads((report / "eval.json").read_text())
    samples = [json.loads(line) for line in (report / "eval_samples.jsonl").open()]
    problems = (trained.root / "world/test.jsonl").read_text().splitlines()[:6]
    prompts = [json.loads(line)["prompt"] for line in problems]
    assert [s["prompt"] for s in samples] == [p for p in prompts for _ in range(4)]
    rows = [samples[i : i + 4] for i in range(0, 24, 4)]
    right = [[s["parts"]["accuracy"] for s in row] for row in rows]
    assert 0 < sum(map(sum, right)) < 24  # else nothing is seen below
    assert figures["pass@1"]["mean"] == pytest.approx(sum(map(sum, right)) / 24)
    for k in (2, 4):
        expected = [1 - math.comb(4 - int(sum(r)), k) / math.comb(4, k) for r in right]
        assert figures[f"pass@{k}"]["mean"] == pytest.approx(sum(expected) / 6)

    def majority(group):
        votes = {}
        for s in group:
            seen = s["completion"].rpartition("</think>")[2].partition("<think>")[0]
            if found := re.findall("<answer>([^<]+)</answer>", seen):
                votes.setdefault(found[-1], []).append(s["parts"]["accuracy"])
        top = [v for v in votes.values() if len(v) == max(map(len, votes.values()))]
        return sum(sum(v) / len(v) for v in top) / len(top) if top else 0.0

    assert figures["maj@4"]["mean"] == pytest.approx(sum(map(majority, rows)) / 6)
    halves = [majority(row[i : i + 2]) for row in rows for i in (0, 2)]
    assert figures["maj@2"]["mean"] == pytest.approx(sum(halves) / 12)
    assert figures["reward"] == pytest.approx(2 * figures["pass@1"]["mean"])
    assert figures["mean_length"] == pytest.approx(sum(s["num_tokens"] for s in samples) / 24)
    assert figures["truncated_frac"] == sum(s["is_truncated"] for s in samples) / 24
    assert (figures["num_problems"], figures["num_samples"]) == (6, 4)
    low, mean, high = (figures["pass@1"][x] for x in ("low", "mean", "high"))
    assert 0 <= low < mean < high <= 1


def test_what_the_model_lists_as_its_ends_stops_it(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (end,) = load_tokenizer(run / "model").encode("<answer>")
    listed = {"eos_token_id": [1, end]}
    (tmp_path / "run/model/generation_config.json").write_text(json.dumps(listed))
    assert main(["eval", str(tmp_path / "run"), *SETTINGS]) == 0
    lines = (tmp_path / "run/eval/eval_samples.jsonl").read_text().splitlines()
    texts = [json.loads(line)["completion"] for line in lines]
    assert any("<answer>" in text for text in texts)
    assert not any(text.partition("<answer>")[2] for text in texts)


def test_what_is_printed(run, capsys, tmp_path):
    assert main(["eval", str(run), "num_samples=2", "num_problems=6"]) == 0
    out = capsys.readouterr().out.splitlines()
    figures = json.loads((run / "eval/eval.json").read_text())
    assert out[0].startswith(f"pass@1     {100 * figures['pass@1']['mean']:.1f}% [")
    assert out[0].endswith("(6 problems x 2)")
    assert [line.split()[0] for line in out] == [
        "pass@1", "pass@2", "maj@2", "reward", "format", "length", "wrote"
    ]  # fmt: skip
    low, high = (figures["reward_interval"][end] for end in ("low", "high"))
    assert out[3] == f"reward     {figures['reward']:.3f} [{low:.3f}, {high:.3f}]"


def test_failed_rewards_are_counted_as_wrong(run, capsys, tmp_path):
    (tmp_path / "fails.py").write_text(
        "def half(prompt, completion, reference):\n"
        "    assert int(reference) % 2 == 0, 'odd'\n"
        "    return 1.0\n"
    )
    override = f"rewards.functions={{accuracy: {{function: '{tmp_path}/fails.py:half'}}}}"
    words = ["eval", str(run), "num_samples=2", "num_problems=6", override, "--out", str(tmp_path)]
    assert main(words) == 0
    samples = [json.loads(line) for line in (tmp_path / "eval_samples.jsonl").open()]
    num_odd = sum(int(s["reference"]) % 2 for s in samples)
    assert 0 < num_odd < 12
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["pass@1"]["mean"] == pytest.approx(1 - num_odd / 12)
    assert figures["num_failed_rewards"] == num_odd and figures["reward"] == 1.0
    assert f"failed     {num_odd} rewards (counted as wrong)" in capsys.readouterr().out
    assert "AssertionError: odd" in next(s["error"] for s in samples if s["error"])


def test_a_yaml_file_and_another_model(trained, run, tmp_path, capsys):
    """The config shown for a run, kept as a file, gives the same figures; another model others."""
    assert main(["eval", str(run), *SETTINGS, "--print-config"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    shared = ["eval", str(tmp_path / "mine.yaml"), "--out"]
    assert main([*shared, str(tmp_path / "a")]) == 0
    assert main(["eval", str(run), *SETTINGS, "--out", str(tmp_path / "b")]) == 0
    a, b = ((tmp_path / x / "eval_samples.jsonl").read_text() for x in "ab")
    assert a == b
    base = trained.root / "base/model"
    assert main([*shared, str(tmp_path / "c"), f"model={base}", "temperature=0"]) == 0
    assert (tmp_path / "c/eval_samples.jsonl").read_text() != a


def test_problems_that_do_not_fit_are_left_out_where_asked(run, tmp_path, capsys):
    problems = [{"prompt": p, "reference": "1"} for p in ("01+02=", "01+02+03+04+05=", "04-01=")]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(p) + "\n" for p in problems))
    settings = [f"data={tmp_path}/p.jsonl", "max_prompt_tokens=8", "num_samples=1"]
    assert main(["eval", str(run), *settings, "--out", str(tmp_path)]) == 2
    assert "p.jsonl:2: 16 tokens, but only 8 fit" in capsys.readouterr().err
    assert main(["eval", str(run), *settings, "overlong=drop", "--out", str(tmp_path)]) == 0
    samples = [json.loads(line) for line in (tmp_path / "eval_samples.jsonl").open()]
    assert [s["prompt"] for s in samples] == ["01+02=", "04-01="]
    assert json.loads((tmp_path / "eval.json").read_text())["num_problems"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere: No such file or directory"),
        (
            ["{root}/base"],
            "config.yaml: expected phase grpo or ppo with data.eval (found 'sft'); for",
        ),
        (["{root}"], "no config.yaml; expected a run's directory or a YAML file"),
        (["{root}/grpo", "num_sampels=2"],
         "command line: unknown key 'num_sampels'; did you mean 'num_samples'?"),
        (["{root}/grpo", "correct=right", "num_problems=1", "num_samples=1"],
         "correct='right' is no part of the reward; there are accuracy, format"),
        (["{root}/grpo", "answer=nope"], "command line: answer: place='nope'; expected one of"),
        (["{root}/grpo", "max_prompt_tokens=3"], "test.jsonl:1: 7 tokens, but only 3 fit"),
        (["{root}/grpo", "max_tokens=1000"], "exceed the model's context of 128"),
        (["{root}/grpo", "model={root}/world"], "config.json: no such file; expected a Hugging"),
    ],
)  # fmt: skip
def test_faults(trained, capsys, tmp_path, words, message):
    words = [word.format(root=trained.root) for word in words]
    assert main(["eval", *words, "--out", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("alignjax: ") and message in err and err.count("\n") == 1
    assert out == "" and not (tmp_path / "out").exists()
