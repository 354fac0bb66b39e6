"""`alignjax label`: what is ranked, where it is kept, what comes out, and faults by their flag."""

import json
import shutil
import sys

import pytest

from alignjax.cli.main import main
from alignjax.cli.sampling import Sampler
from alignjax.text import load_tokenizer
from alignjax.web import Task, open_store, read_tasks
from tests.web.app_case import records, write


@pytest.fixture
def responses(tmp_path):
    return write(tmp_path / "r.jsonl", records(4))


def ranked(path, *people):
    """Everybody ranks all; the ranks are those of the responses' own order."""
    store = open_store(path.with_suffix(".sqlite"), read_tasks(str(path)))
    for name, ranks in people:
        while (task := store.next_task(name, overlap=store.num_tasks)) is not None:
            store.rank(name, task, ranks, request=f"{name}-{task:06}")
    store.close()


def test_status_and_export(responses, tmp_path, capsys):
    ranked(responses, ("ann", [1, 2, 3]), ("bob", [1, 3, 2]))
    assert main(["label", "--responses", str(responses), "--status"]) == 0
    # Units 1,1 | 2,3 | 3,2, four times: n = 8, 8, 8; differences 1-2 and 2-3 are 8, 1-3 is 16.
    # Observed 16 * 64 / 24; expected 2 (64*64 + 64*64 + 64*256) / (24*23): 1 - 42.67 / 89.04.
    assert capsys.readouterr().out.splitlines() == [
        "4 of 4 prompts ranked, 8 rankings",
        "  ann: 4 ranked, 0 skipped, 0 flagged",
        "  bob: 4 ranked, 0 skipped, 0 flagged",
        "agreement: alpha 0.521 (Krippendorff, ordinal; 4 prompts, 2 people)",
    ]
    out = tmp_path / "out.jsonl"
    assert main(["label", "--responses", str(responses), "--export", str(out)]) == 0
    assert capsys.readouterr().out.startswith(f"wrote 8 rankings to {out}\n4 of 4 prompts ranked")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 8 and {row["annotator"]: row["ranks"] for row in rows} == {
        "ann": [1, 2, 3], "bob": [1, 3, 2],
    }  # fmt: skip
    # The store alone is enough.
    words = ["label", "--store", str(tmp_path / "r.sqlite"), "--export", str(tmp_path / "b.jsonl")]
    assert main(words) == 0
    assert (tmp_path / "b.jsonl").read_bytes() == out.read_bytes()


def test_one_person_agrees_with_nobody(responses, capsys):
    ranked(responses, ("ann", [1, 2, 3]))
    assert main(["label", "--responses", str(responses), "--status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("agreement: not known")


def test_files_that_changed_are_noticed(responses, tmp_path, capsys):
    ranked(responses, ("ann", [1, 2, 3]))
    write(responses, records(5))
    assert main(["label", "--responses", str(responses), "--status"]) == 2
    err = capsys.readouterr().err
    assert f"--store {tmp_path / 'r.sqlite'}: made for other prompts or responses (4 tasks; " in err


def test_records_that_are_in_no_file_need_a_name_for_the_store(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("alignjax.web.read_tasks", lambda *_: [Task("a", ("x", "y"))])
    monkeypatch.setattr("alignjax.cli.label._serve", lambda store, args, annotators: None)
    words = ["label", "--responses", "hf:org/name/train"]
    assert main(words) == 2
    assert "--store: give a name; hf:org/name/train is no file" in capsys.readouterr().err
    assert main([*words, "--store", str(tmp_path / "s.sqlite")]) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to rank; give --responses FILE, or --prompts FILE and --model DIR"),
        (["--prompts", "p"], "nothing to rank; give --responses FILE, or --prompts FILE and"),
        (["--model", "m"], "--model: expected --prompts FILE with it"),
        (["--model", "m", "--prompts", "p", "--num-responses", "1"],
         "--num-responses 1: expected at least 2"),
        (["--model", "m", "--prompts", "p", "--top-p", "2"], "--top-p 2.0: expected above 0"),
        (["--responses", "no.jsonl"], "no such file: no.jsonl"),
        (["--responses", "R", "--overlap", "-1"], "--overlap -1: expected at least 0"),
        (["--responses", "R", "--port", "70000"], "--port 70000: expected 0 to 65535"),
        (["--responses", "R", "--annotators", "ann,,bob"], "--annotators: name '': expected 1 to"),
        (["--responses", "R", "--status"], "nothing has been ranked yet"),
        (["--responses", "R", "--export", "o.jsonl"], "nothing has been ranked yet"),
        (["--store", "no.sqlite"], "--store: no such file: no.sqlite"),
        (["--responses", "R", "--token", "short"], "--token: has 5 characters; expected 16"),
        (["--responses", "R", "--host", "no.such.host.invalid"],
         "--host no.such.host.invalid --port 8377: cannot listen there"),
    ],
)  # fmt: skip
def test_faults(responses, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["label", *(str(responses) if word == "R" else word for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("alignjax: ") and message in err


def test_a_missing_extra_is_named(responses, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["label", "--responses", str(responses)]) == 2
    assert "needs a package that is missing (uvicorn); pip install 'alignjax[web]'" in (
        capsys.readouterr().err
    )


# Responses of a model.


@pytest.fixture
def model(trained, tmp_path):
    """The smoke run's base, with a template that writes `+` before what a user says, `=` after."""
    path = tmp_path / "model"
    shutil.copytree(trained.root / "base/model", path)
    config = json.loads((path / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ bos_token }}{% for m in messages %}+{{ m.content }}{% endfor %}="
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return str(path)


@pytest.fixture
def sampled(model, tmp_path, monkeypatch, capsys):
    """Runs `label --model` up to where the page would be served; what it wrote."""
    monkeypatch.setattr("alignjax.cli.label._serve", lambda store, args, annotators: None)

    def run(rows, *words):
        prompts = write(tmp_path / "p.jsonl", rows)
        status = main(["label", "--prompts", str(prompts), "--model", model, *words])
        captured = capsys.readouterr()
        path = tmp_path / "p.responses.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return status, captured, rows

    return run


PROMPTS = [
    {"prompt": "+12+03="},
    {"messages": [{"role": "user", "content": "12+03"}]},
    {"prompt": "30-01="},
]


def test_responses_are_sampled_and_differ(sampled, tmp_path):
    status, captured, rows = sampled(PROMPTS, "--num-responses", "3", "--max-tokens", "12")
    assert status == 0, captured.err
    assert [row["prompt"] for row in rows] == [
        "+12+03=", PROMPTS[1]["messages"], "30-01=",
    ]  # fmt: skip
    for row in rows:
        assert len(row["responses"]) == len(set(row["responses"])) == 3
        assert all(text.strip() and "<eos>" not in text for text in row["responses"])
    assert len(open_store(tmp_path / "p.responses.sqlite", None).task(0).responses) == 3
    # The same command goes on with them; another refuses to.
    written = (tmp_path / "p.responses.jsonl").read_bytes()
    assert sampled(PROMPTS, "--num-responses", "3", "--max-tokens", "12")[:1] == (0,)
    assert (tmp_path / "p.responses.jsonl").read_bytes() == written
    status, captured, _ = sampled(
        PROMPTS, "--num-responses", "3", "--max-tokens", "12", "--seed", "1"
    )
    assert status == 2 and "exists, and was sampled otherwise (seed);" in captured.err
    status, captured, _ = sampled(PROMPTS[1:], "--num-responses", "3", "--max-tokens", "12")
    assert status == 2 and "was sampled otherwise (prompts);" in captured.err


def test_messages_go_through_the_template_and_text_does_not(sampled, model, capsys, monkeypatch):
    """At temperature 0 both prompts are the same ids, so both have the same greedy response."""
    words = ["generate", model, "--temperature", "0", "--max-tokens", "12", "--prompt", "+12+03="]
    assert main([*words, "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["completion"]
    # Greedy gives one response, so there is nothing to rank; the first turn is what is looked at.
    seen = []
    inner = Sampler.sample

    def spy(self, ids, num, **options):
        seen.append([list(map(int, one)) for one in ids])
        found = inner(self, ids, num, **options)
        assert all(one.text == expected for one in found)
        return found

    monkeypatch.setattr(Sampler, "sample", spy)
    status, captured, rows = sampled(PROMPTS[:2], "--temperature", "0", "--max-tokens", "12")
    assert status == 2 and rows == [] and "raise --temperature" in captured.err
    tokenizer = load_tokenizer(model)
    assert seen[0][0] == seen[0][1] == [tokenizer.bos_id, *tokenizer.encode("+12+03=")]


def test_a_prompt_that_does_not_fit_has_its_line(sampled):
    status, captured, rows = sampled([{"prompt": "1="}, {"prompt": "1" * 150}])
    assert status == 2 and rows == []
    assert "p.jsonl:2: the prompt has 151 tokens; the model's context of 128" in captured.err
    status, captured, _ = sampled([{"prompt": "1="}, {"text": "1"}])
    assert status == 2 and "p.jsonl:2: no prompt; expected a field 'prompt'" in captured.err
