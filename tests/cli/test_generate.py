"""`alignjax generate`: prompts from anywhere, completions as text or JSON, faults by their flag."""

import io
import json
import shutil

import numpy as np
import pytest

from alignjax.cli.main import main

PROMPTS = ["12+03=", "30-01="]


@pytest.fixture
def model(trained):
    return str(trained.root / "base" / "model")


@pytest.fixture
def generate(model, capsys):
    def run(*words):
        assert main(["generate", model, *words]) == 0
        return capsys.readouterr().out.splitlines()

    return run


def test_json_says_what_was_sampled(generate):
    words = [w for p in PROMPTS for w in ("--prompt", p)]
    lines = generate(*words, "--num-samples", "3", "--max-tokens", "12", "--json")
    records = [json.loads(line) for line in lines]
    assert [r["prompt"] for r in records] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({r["completion"] for r in records}) > 2
    for record in records:
        assert record["finish_reason"] == "stop" or record["num_tokens"] == 12
        assert 1 <= record["num_tokens"] <= 12 and record["logp"] < 0
        assert "<eos>" not in record["completion"]
    again = generate(*words, "--num-samples", "3", "--max-tokens", "12", "--json")
    assert again == lines
    other = generate(*words, "--num-samples", "3", "--max-tokens", "12", "--json", "--seed", "1")
    assert other != lines


def test_text_is_prompt_and_completion(generate):
    words = ["--prompt", PROMPTS[0], "--temperature", "0"]
    (line,) = generate(*words)
    record = json.loads(generate(*words, "--json")[0])
    assert record["finish_reason"] == "stop" and line == PROMPTS[0] + record["completion"]
    (cut,) = generate(*words, "--max-tokens", "2")
    assert cut.endswith(" [cut at 2 tokens]") and cut.split(" [")[0] == line[: len(cut) - 18]


def test_prompts_come_from_a_file_or_a_pipe_and_blank_lines_are_none(
    generate, tmp_path, monkeypatch
):
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS) + "\n\n")
    words = ["--temperature", "0", "--json"]
    expected = [json.loads(x) for p in PROMPTS for x in generate(*words, "--prompt", p)]

    def same(lines):
        # The completion is the same in another batch; its log-prob to the last bits only.
        found = [json.loads(line) for line in lines]
        assert [r["completion"] for r in found] == [r["completion"] for r in expected]
        np.testing.assert_allclose(
            [r["logp"] for r in found], [r["logp"] for r in expected], rtol=1e-4
        )

    same(generate(*words, "--file", str(tmp_path / "p.txt")))
    same(generate(*words, "--prompt", PROMPTS[0], "--file", str(tmp_path / "p.txt"))[1:])
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(PROMPTS)))
    same(generate(*words))


def test_a_stop_token_ends_it_and_is_kept(generate):
    words = ["--prompt", PROMPTS[0], "--temperature", "0", "--json"]
    whole = json.loads(generate(*words)[0])
    stopped = json.loads(generate(*words, "--stop", "<answer>")[0])
    before = whole["completion"].partition("<answer>")[0]
    assert stopped["completion"] == before + "<answer>" and stopped["finish_reason"] == "stop"


def test_chat_wraps_the_prompt(trained, tmp_path, capsys):
    """The template is the tokenizer's; nothing but the completion is shown."""
    model = tmp_path / "model"
    shutil.copytree(trained.root / "base/model", model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{{ bos_token }}{% for m in messages %}{{ '*' if m.role == 'system' else '+' }}"
        "{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    shared = ["generate", str(model), "--temperature", "0"]
    assert main([*shared, "--prompt", "+12+03="]) == 0
    plain = capsys.readouterr().out
    assert main([*shared, "--prompt", "12+03", "--chat"]) == 0
    assert "+12+03=" + capsys.readouterr().out == plain
    assert main([*shared, "--prompt", "*99+12+03="]) == 0
    plain = capsys.readouterr().out
    assert main([*shared, "--prompt", "12+03", "--chat", "--system", "99"]) == 0
    assert "*99+12+03=" + capsys.readouterr().out == plain


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-samples", "0"], "--num-samples 0: expected at least 1"),
        (["--max-tokens", "0"], "--max-tokens 0: expected at least 1"),
        (["--temperature", "-1"], "--temperature -1.0: expected at least 0"),
        (["--temperature", "nan"], "--temperature nan: expected at least 0"),
        (["--top-p", "0"], "--top-p 0.0: expected above 0 and at most 1"),
        (["--top-k", "-1"], "--top-k -1: expected at least 0"),
        (["--system", "x"], "--system x: expected --chat with it"),
        (["--file", "no.txt"], "--file: no such file: no.txt"),
        (["--max-tokens", "500"], "a prompt of 2 tokens and max_tokens=500 exceed the model's "
         "context of 128; shorten the prompt or lower max_tokens"),
        (["--prompt", "1" * 150], "a prompt of 151 tokens and max_tokens=1 exceed the model's "
         "context of 128; shorten the prompt or lower max_tokens"),
        (["--stop", "12"], "stop_tokens: '12' is 2 tokens in this vocabulary; expected one"),
        (["--prompt", "1x"], "unknown character 'x' at position 1 of '1x'; the vocabulary has"),
    ],
)  # fmt: skip
def test_faults(model, capsys, words, message):
    assert main(["generate", model, "--prompt", "1", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("alignjax: ") and message in err
    assert err.count("\n") == 1


def test_no_prompt(model, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("\n\n"))
    assert main(["generate", model]) == 2
    assert capsys.readouterr().err == (
        "alignjax: no prompt; give --prompt TEXT, --file PATH or pipe prompts in, one a line\n"
    )
    (tmp_path / "p.txt").write_bytes(b"12\xff")
    assert main(["generate", model, "--file", str(tmp_path / "p.txt")]) == 2
    assert "p.txt: not UTF-8 text (byte 2)" in capsys.readouterr().err
