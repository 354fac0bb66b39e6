"""`alignjax generate`: prompts from anywhere, completions as text or JSON, faults by their flag."""

import io
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from alignjax.cli.main import main
from alignjax.text import load_tokenizer

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


def piped(text):
    """What sys.stdin is to a process that bytes are piped into."""
    data = text if isinstance(text, bytes) else text.encode()
    return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")


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
    monkeypatch.setattr("sys.stdin", piped("\r\n".join(PROMPTS)))
    same(generate(*words))


def test_what_shapes_a_completion_comes_from_the_command_line(generate):
    words = ["--prompt", PROMPTS[0], "--temperature", "0", "--json"]
    digits = [c for c in json.loads(generate(*words)[0])["completion"] if c.isdigit()]
    banned = max(digits, key=digits.count)  # what it would say most
    options = ["--prefix", "1", "--ban", banned, "--repetition-penalty", "1.2", "--min-p", "0.1",
               "--stop-sequence", "22", "--max-tokens", "8", "--int8-kv",
               "--int8-weights"]  # fmt: skip
    record = json.loads(generate(*words, *options)[0])
    said = record["completion"]
    assert said.startswith("1") and banned not in said[1:]
    assert record["num_tokens"] == 8 or record["finish_reason"] == "stop"


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


def test_only_a_line_feed_ends_a_prompt(model, capsys, monkeypatch, tmp_path):
    for text in ("12\u2028", "12\x85", "12\f"):
        (tmp_path / "p.txt").write_text(text + "3=\n", encoding="utf-8")
        monkeypatch.setattr("sys.stdin", piped(text + "3=\n"))
        for words in ([], ["--file", str(tmp_path / "p.txt")]):
            assert main(["generate", model, *words]) == 2
            assert f"unknown character {text[-1]!r} at position 2" in capsys.readouterr().err


def test_an_empty_prompt_is_bos_alone(generate):
    words = ["--prompt", "", "--prompt", "12+03=", "--max-tokens", "1", "--json"]
    assert [json.loads(line)["prompt"] for line in generate(*words)] == ["", "12+03="]


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_what_the_model_lists_as_its_ends_stops_it(trained, tmp_path, capsys, file):
    model = tmp_path / "model"
    shutil.copytree(trained.root / "base/model", model)
    words = ["generate", str(model), "--prompt", PROMPTS[0], "--temperature", "0", "--json"]
    assert main(words) == 0
    whole = json.loads(capsys.readouterr().out)
    tokenizer = load_tokenizer(model)
    (end,) = tokenizer.encode("<answer>")
    (model / "generation_config.json").unlink()
    found = json.loads((model / file).read_text()) if file == "config.json" else {}
    (model / file).write_text(json.dumps(found | {"eos_token_id": [tokenizer.eos_id, end]}))
    assert main(words) == 0
    stopped = json.loads(capsys.readouterr().out)
    before = whole["completion"].partition("<answer>")[0]
    assert stopped["completion"] == before + "<answer>" and stopped["finish_reason"] == "stop"


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_weights_that_are_no_numbers(trained, tmp_path, capsys, temperature):
    model = tmp_path / "model"
    shutil.copytree(trained.root / "base/model", model)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][:] = np.nan
    save_file(tensors, model / "model.safetensors")
    assert main(["generate", str(model), "--prompt", "1", "--temperature", temperature]) == 2
    assert "log-probs are not finite: the weights hold nan or inf" in capsys.readouterr().err


def test_no_prompt(model, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", piped("\n\n"))
    assert main(["generate", model]) == 2
    assert capsys.readouterr().err == (
        "alignjax: no prompt; give --prompt TEXT, --file PATH or pipe prompts in, one a line\n"
    )
    (tmp_path / "p.txt").write_bytes(b"12\xff")
    assert main(["generate", model, "--file", str(tmp_path / "p.txt")]) == 2
    assert "p.txt: not UTF-8 text (byte 2)" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", piped(b"12\xff"))
    assert main(["generate", model]) == 2
    assert "standard input: not UTF-8 text (byte 2)" in capsys.readouterr().err
