"""What is printed of a batch: every token once, what is trained marked, counts, and no weights."""

import json
import re
import sys

import pytest

from alignjax.cli.main import main
from alignjax.recipes.chains import write
from alignjax.text import vocab_tokenizer

TOKENS = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 127)), "\n", "\x1b", "é"]


@pytest.fixture
def config(tmp_path, monkeypatch):
    """An sft config over three chats of two turns each. Its model has no weights."""
    monkeypatch.setenv("COLUMNS", "80")
    vocab_tokenizer(TOKENS).save(str(tmp_path / "model"))
    talks = [
        [
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": f"A{n}\né"},
            {"role": "user", "content": "[x]\x1b[31m"},
            {"role": "assistant", "content": f"B{n}"},
        ]
        for n in range(3)
    ]
    (tmp_path / "chat.jsonl").write_text(
        "".join(json.dumps({"talk": talk, "answer": n}) + "\n" for n, talk in enumerate(talks))
    )
    path = tmp_path / "sft.yaml"
    path.write_text(f"""
phase: sft
name: x
model: {{path: {tmp_path}/model}}
data:
  train: {tmp_path}/chat.jsonl
  text: {{fields: {{messages: talk}}}}
  row_len: 150
  rows: 2
optimizer: {{learning_rate: 1e-3}}
loop: {{steps: 1}}
""")
    return str(path)


# By hand, from the plain template; each character is a token.
ROW = """<bos>User:↵
{n}?↵
↵
Assistant:↵
⟦A{n}↵
é<eos>⟧↵
↵
User:↵
[x]\\x1b[31m↵
↵
Assistant:↵
⟦B{n}<eos>⟧↵
↵
"""


def shown(capsys, *words):
    status = main(["inspect", *words])
    out, err = capsys.readouterr()
    assert status == 0, err
    return out


def test_rows_documents_and_what_is_trained(config, capsys):
    out = shown(capsys, config)
    order = [int(n) for n in re.findall(r"(\d)\?", out)]
    assert len(order) == 4  # Two rows of two documents, over the end of an epoch.
    assert sorted(order[:3]) == [0, 1, 2]
    length = len("User:\n0?\n\nAssistant:\nA0\né\n\nUser:\n[x]\x1b[31m\n\nAssistant:\nB0\n\n") + 3
    assert length == 61
    head = [
        "Batch 1: 2 rows of 150 tokens, 244 tokens (81.3%) text, 56 tokens (18.7%) padding",
        "Trained: 32 tokens (13.1%) of the text",
        "Documents: 4, 2 to 2 in a row; of 3 in all, 0 dropped so far as too long",
        "What is trained on is between ⟦ and ⟧.",
    ]
    expected = "\n".join(head) + "\n"
    for row in (1, 2):
        expected += f"\n── row {row}: 2 documents, 122 tokens, 16 trained, 28 padding\n"
        for n in (1, 2):
            expected += f"── document {n}: 61 tokens, 8 trained\n"
            # First fit: the third document begins the second row.
            expected += ROW.format(n=order[2 * (row - 1) + n - 1])
    assert out == expected


def test_overrides_rows_and_batches(config, capsys):
    every = shown(capsys, config, "data.text.train_on=last", "data.packed=false", "--rows", "1")
    assert "⟦B" in every and "⟦A" not in every
    assert "── row 1: 1 document, 61 tokens, 3 trained, 89 padding" in every
    assert "row 2" not in every
    assert "⟦" not in shown(capsys, config, "--rows", "0").replace("between ⟦ and ⟧", "")
    one, two = (
        re.findall(r"(\d)\?", shown(capsys, config, "data.rows=1", "--batch", n)) for n in "12"
    )
    assert one + two == re.findall(r"(\d)\?", shown(capsys, config))


def test_each_turn_is_a_document(config, capsys):
    out = shown(capsys, config, "data.text.train_on=each", "--rows", "9")
    assert "of 6 in all" in out
    documents = out.split("── document")[1:]
    assert documents and all(document.count("⟦") == 1 for document in documents)


def test_dropped_ones_are_counted(config, capsys):
    words = ["data.text.train_on=each", "data.row_len=40", "data.overlong=drop", "data.rows=3"]
    assert re.search(r"of 6 in all, [1-9] dropped", shown(capsys, config, *words, "--batch", "2"))


def test_tokens_one_by_one(config, capsys):
    out = shown(capsys, config, "--rows", "1", "--tokens")
    first = out.split("── document 1")[1].split("── document 2")[0]
    cells = first.split("\n", 1)[1].split("  ")
    assert cells[0] == "'<bos>':1"
    found = re.findall(r"(⟦?)'([^']+)':(\d+)(⟧?)", first)
    assert len(found) == 61
    for opening, text, i, closing in found:
        assert bool(opening) == bool(closing)
        assert (
            text.encode().decode("unicode_escape") == TOKENS[int(i)]
            or TOKENS[int(i)] == text == "é"
        )
    assert sum(bool(opening) for opening, *_ in found) == 8
    assert all(len(line) <= 82 for line in first.splitlines())


def test_colours_instead_of_brackets_and_no_colour_where_it_is_not_wanted(
    config, capsys, monkeypatch
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    coloured = shown(capsys, config)
    assert "⟦" not in coloured and "What is trained on is bold green." in coloured
    assert re.search(r"\x1b\[1;32mB\d\x1b\[0m", coloured)
    assert "\x1b[1;7;35m<eos>\x1b[0m" in coloured  # Special, and trained.
    assert "\x1b[35m<bos>\x1b[0m" in coloured
    assert "[x]\\x1b[31m" in coloured  # Of the data: shown, not obeyed.
    monkeypatch.setenv("NO_COLOR", "1")
    assert "⟦" in shown(capsys, config)


def test_an_output_that_has_ascii_only(config, capsys, monkeypatch):
    monkeypatch.setattr("rich.console.Console.encoding", "ascii")
    out = shown(capsys, config, "--rows", "1")
    assert out.isascii()
    assert "[[A" in out and "\\xe9<eos>]]\\n" in out and "-- row 1" in out


def test_prompts_of_grpo_as_the_model_gets_them(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    write(
        tmp_path / "smoke_grpo" / "world",
        seed=0, num_questions=20, num_drills=5, num_train=9, num_test=4, num_ops=[1],
    )  # fmt: skip
    words = ["configs/smoke/grpo.yaml", f"output_dir={tmp_path}"]
    world = tmp_path / "smoke_grpo" / "world"
    more = [f"stages.grpo.tokenizer={world}/tokenizer", "--stage", "grpo"]
    out = shown(capsys, *words, *more, "--rows", "2")
    assert "Batch 1: 8 prompts of " in out and "(at most 16), 4 completions of each" in out
    records = [json.loads(line) for line in (world / "train.jsonl").read_text().splitlines()]
    blocks = re.findall(r"── prompt \d: (\d+) tokens\n(.*)\n── reference: (.*); fields", out)
    assert len(blocks) == 2
    known = {f"<bos>{record['prompt']}": repr(record["reference"]) for record in records}
    for length, text, reference in blocks:
        assert known[text] == reference
        assert 1 < int(length) <= 16
    assert "⟦" not in out
    base = shown(capsys, *words, "--stage", "base", "--rows", "1")
    assert "⟦" in base and "documents" in base


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "-1"], "--rows -1: expected at least 0"),
        (["--batch", "0"], "--batch 0: expected at least 1"),
        (["--stage", "x"], "--stage x: this config is one phase"),
        (["data.row_len=30"], r"chat.jsonl:\d: \d+ tokens, but only 30 fit"),
        (["data.train=gone.jsonl"], r"gone\.jsonl"),
        (["tokenizer=gone"], "no such directory: gone"),
        (["data.text.fields.messages=tlak"], "no field 'tlak'; did you mean 'talk'"),
        (["data.rwos=3"], "rwos"),
    ],
)
def test_faults_are_one_message(config, capsys, words, message):
    assert main(["inspect", config, *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("alignjax: ") and "Traceback" not in err
    assert re.search(message, err), err


def test_a_recipe_needs_a_stage(capsys, tmp_path):
    words = ["inspect", "configs/smoke/grpo.yaml", f"output_dir={tmp_path}"]
    assert main(words) == 2
    assert "expected --stage with one of base, grpo" in capsys.readouterr().err
    assert main([*words, "--stage", "world"]) == 2
    assert "--stage world: expected --stage with one of base, grpo" in capsys.readouterr().err


def test_it_starts_no_device(config, capsys):
    """The configs of phases import jax; nothing here may make an array of it."""
    import subprocess

    code = (
        "import sys; from alignjax.cli.main import main\n"
        f"assert main(['inspect', {config!r}, '--rows', '0']) == 0\n"
        "from jax._src import xla_bridge\n"
        "print('devices:', len(xla_bridge._backends))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "devices: 0", done.stderr


@pytest.fixture
def rankings(config, tmp_path):
    """Three prompts with three responses each, in a config of phase reward."""
    records = [
        {"prompt": f"{n}?", "responses": [f"a{n}", f"bb{n}", f"c{n}"], "ranks": [2, 1, 2]}
        for n in range(3)
    ]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "rankings.jsonl").write_text(lines)
    path = tmp_path / "reward.yaml"
    path.write_text(f"""
phase: reward
name: x
model: {{path: {tmp_path}/model}}
data: {{train: {tmp_path}/rankings.jsonl, row_len: 64, num_prompts: 3}}
optimizer: {{learning_rate: 1e-3}}
loop: {{steps: 1}}
""")
    return str(path)


def test_rankings_with_the_rank_of_each_response(rankings, tmp_path, capsys):
    out = shown(capsys, rankings)
    # BOS and 2 characters; responses of 2, 3 and 2, with EOS and the last token of the prompt
    # before each: 2 + 4 + 5 + 4.
    assert out.startswith(
        "Batch 1: 3 comparisons, 1 row of 64 tokens, 45 tokens (70.3%) text\n"
        "Of 3 comparisons of 3 records, 0 dropped so far as too long; 0 records say nothing of the "
        "kind, 0 are faulty\n"
    )
    order = re.findall(r"rankings\.jsonl:(\d)", out)
    assert sorted(order) == ["1", "2", "3"]
    for n, line in enumerate(order, start=1):
        i = int(line) - 1
        expected = (
            f"── comparison {n}: {tmp_path}/rankings.jsonl:{line}\n── prompt: 3 tokens\n<bos>{i}?\n"
            f"── rank 2: 3 tokens\n⟦a{i}<eos>⟧\n── rank 1: 4 tokens\n⟦bb{i}<eos>⟧\n"
            f"── rank 2: 3 tokens\n⟦c{i}<eos>⟧\n"
        )
        assert expected in out


def test_pairs_and_labels_of_the_preference_phase(rankings, capsys):
    words = ["phase=preference", "data.num_prompts=2", "data.row_len=20"]
    pairs = shown(capsys, rankings, *words, "--rows", "1")
    # Ties are no pair: each record has two.
    assert "2 comparisons, 2 rows of 20 tokens, 22 tokens (55.0%) text" in pairs
    assert "Of 6 comparisons of 3 records" in pairs and "comparison 2" not in pairs
    assert re.search(r"rank 1: 4 tokens\n⟦bb\d<eos>⟧\n── rank 2: 3 tokens\n⟦[ac]\d<eos>⟧\n$", pairs)
    single = shown(capsys, rankings, *words, "losses={kto: {}}", "--rows", "9", "--batch", "2")
    assert re.search(r"── (good: 4 tokens\n⟦bb|bad: 3 tokens\n⟦[ac])\d<eos>⟧", single)
    assert "rank" not in single.split("What is trained")[1].replace("rankings", "")
