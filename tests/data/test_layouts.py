"""Each layout read by hand, written and read again; what is found by itself; real transcripts."""

import gzip
import json

import pytest

from alignjax.core.errors import UserError
from alignjax.data import LAYOUTS, Preference, open_preferences, write_preferences
from alignjax.data.layouts import detect

TALK = [{"role": "user", "content": "Hi"}]


def say(text):
    return [{"role": "assistant", "content": text}]


def read(tmp_path, *records, **options):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(open_preferences(str(path), **options))


def test_pairs(tmp_path):
    text = {"prompt": "Hi", "chosen": "a", "rejected": "b", "margin": 2, "annotator": "ann"}
    chat = {"prompt": TALK, "chosen": say("a"), "rejected": say("b")}
    assert read(tmp_path, text, chat) == [
        Preference("Hi", ["a", "b"], ranks=[1, 2], annotator="ann", fields={"margin": 2}),
        Preference(TALK, ["a", "b"], ranks=[1, 2]),
    ]


def test_pairs_of_conversations_that_hold_the_prompt_are_of_another_layout(tmp_path):
    record = {"prompt": "Hi", "chosen": TALK + say("a"), "rejected": TALK + say("b")}
    with pytest.raises(UserError, match=r'data\.jsonl:1: chosen: .*the layout is "implicit"'):
        read(tmp_path, record)
    assert read(tmp_path, record, layout="implicit") == [Preference(TALK, ["a", "b"], ranks=[1, 2])]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("Q: Hi A: yes", "Q: Hi A: no", "Q: Hi A:"),
        ("Q: Hi A: food", "Q: Hi A: foot", "Q: Hi A:"),  # Not within a word.
        ("Q: Hi A: so it is", "Q: Hi A: so\nno", "Q: Hi A: so"),
        ("Q: Hi A: yes", "Q: Hi A: yes indeed", "Q: Hi A:"),  # Nothing would be left of the first.
        ("yes", "no", ""),
    ],
)
def test_a_prompt_that_both_texts_begin_with(tmp_path, chosen, rejected, prompt):
    (found,) = read(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert found.prompt == prompt and found.ranks == [1, 2]
    assert [prompt + response for response in found.responses] == [chosen, rejected]


def test_a_prompt_that_both_conversations_begin_with(tmp_path):
    record = {"chosen": TALK + say("a"), "rejected": TALK + say("b"), "source": "x"}
    assert read(tmp_path, record) == [
        Preference(TALK, ["a", "b"], ranks=[1, 2], fields={"source": "x"})
    ]
    record["rejected"] = [{"role": "user", "content": "Hey"}, *say("b")]
    with pytest.raises(UserError, match="not the same up to their last message"):
        read(tmp_path, record)


def test_unpaired(tmp_path):
    records = [
        {"prompt": "Hi", "completion": "a", "label": True},
        {"prompt": TALK, "completion": say("b"), "label": False},
    ]
    assert read(tmp_path, *records) == [
        Preference("Hi", ["a"], labels=[True]), Preference(TALK, ["b"], labels=[False])
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"labels\[0\]: expected true, false or null, came str"):
        read(tmp_path, {"prompt": "Hi", "completion": "a", "label": "good"})


HH = {
    "chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: So soon?",
    "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant: Go.\n\nNow.",
}


def test_transcripts(tmp_path):
    messages = [*TALK, *say("Hello."), {"role": "user", "content": "Bye"}]
    assert read(tmp_path, HH) == [Preference(messages, ["So soon?", "Go.\n\nNow."], ranks=[1, 2])]
    prompt = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Bye\n\nAssistant:"
    assert read(tmp_path, HH, layout="hh_text") == [
        Preference(prompt, [" So soon?", " Go.\n\nNow."], ranks=[1, 2])
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rejected": HH["rejected"].replace("Bye", "By")},
            "not the same up to their last Assistant: (they part at character 42)",
        ),
        ({"rejected": "\n\nHuman: Hi"}, "rejected: expected a transcript"),
        ({"chosen": HH["chosen"] + "\n\nHuman: No"}, "the last turn the assistant's"),
        ({"rejected": HH["chosen"]}, "responses[0] and responses[1] are equal"),
        ({"rejected": HH["rejected"].replace(" Go.\n\nNow.", "")}, "responses[1]: empty"),
    ],
)
def test_transcripts_that_are_wrong(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, HH, HH | changes)
    assert message in str(error.value) and "data.jsonl:2: " in str(error.value)


FEEDBACK = {
    "source": "x", "instruction": "Hi",
    "completions": [
        {"model": "m", "response": "a", "overall_score": 7.5, "fine-grained_score": 3},
        {"model": "n", "response": "b", "overall_score": None, "fine-grained_score": 4},
        {"model": "o", "response": "c", "overall_score": 2, "fine-grained_score": 1.5},
    ],
}  # fmt: skip


def test_scores_of_ultrafeedback(tmp_path):
    (found,) = read(tmp_path, FEEDBACK)
    rest = [{"model": m, "fine-grained_score": s} for m, s in (("m", 3), ("n", 4), ("o", 1.5))]
    assert found == Preference(
        "Hi", ["a", "b", "c"], scores=[7.5, None, 2], fields={"source": "x", "completions": rest}
    )
    (found,) = read(tmp_path, FEEDBACK, layout="ultrafeedback_fine")
    assert found.scores == [3, 4, 1.5]
    del FEEDBACK["completions"][1]["overall_score"]
    with pytest.raises(UserError, match=r"completions\[1\]: no overall_score \(keys: model"):
        read(tmp_path, FEEDBACK)


NOTED = {"annotator": "ann", "time": "2026-11-25T01:02:03Z", "comment": "hm", "fields": {"n": 1}}
PAIR = [
    Preference("Hi", ["a b", "c"], ranks=[1, 2], **NOTED),
    Preference("Ho", ["d", "é\n\u2028"], ranks=[1, 2]),
]
CHAT_PAIR = [Preference([*TALK, *say("x"), *TALK], ["a", "b"], ranks=[1, 2], **NOTED)]
SCORED = [
    Preference("Hi", ["a", "b"], scores=[1.5, None], **NOTED),
    Preference("Ho", ["d", "e", "f"], scores=[0.5, 0.25, -1.0]),
]
HELD = {
    "native": [
        *PAIR, *SCORED,
        Preference("Hi", ["a", "b", "c"], ranks=[1, 2, 2], **NOTED),
        Preference("Hi", ["a", "b", "c"], choices=[[0, 1], [2, 1]]),
        Preference("Hi", ["a", "b"], labels=[None, True]),
    ],
    "pairs": PAIR, "implicit": PAIR[:1], "hh": CHAT_PAIR,
    "hh_text": [Preference("\n\nHuman: Hi\n\nAssistant:", [" a", " b"], ranks=[1, 2], **NOTED)],
    "unpaired": [
        Preference("Hi", ["a"], labels=[True], **NOTED), Preference("Ho", ["b"], labels=[False])
    ],
    "demonstrations": [Preference("Hi", ["a"], labels=[True], **NOTED)],
    "ultrafeedback": SCORED, "ultrafeedback_fine": SCORED,
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_written_is_read_again(tmp_path, layout, suffix):
    path = tmp_path / f"out.{suffix}"
    held = HELD[layout]
    if layout == "implicit":  # Whose prompts end where responses part.
        held = [Preference("Hi", [" a b", " c"], ranks=[1, 2], **NOTED)]
    write_preferences(path, held, layout)
    assert list(open_preferences(str(path), layout)) == held
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    if layout not in ("hh_text", "ultrafeedback_fine"):
        assert list(open_preferences(str(path))) == held, "found by itself"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("layout", ["native", "pairs", "implicit"])
def test_conversations_are_read_again(tmp_path, layout, suffix):
    path = tmp_path / f"out.{suffix}"
    tool = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    held = [Preference([*TALK, tool], ["a", "b"], ranks=[1, 2]), *CHAT_PAIR]
    write_preferences(path, held, layout)
    assert list(open_preferences(str(path), layout)) == held


def test_more_than_a_pair_becomes_a_record_for_each(tmp_path):
    path = tmp_path / "out.jsonl"
    ranked = [Preference("Hi", ["a", "b", "c"], ranks=[2, 1, 2])]
    write_preferences(path, ranked, "pairs")
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"prompt": "Hi", "chosen": "b", "rejected": "a"},
        {"prompt": "Hi", "chosen": "b", "rejected": "c"},
    ]
    write_preferences(path, ranked, "unpaired")
    assert [json.loads(line)["label"] for line in path.read_text().splitlines()] == [
        False, True, False
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "layout", "preference", "message"),
    [
        ("x.jsonl", "ultrafeedback", PAIR[0], "x.jsonl: preference 1: layout ultrafeedback: this"),
        ("x.jsonl", "hh", PAIR[0], "prompt: no transcript from"),
        ("x.jsonl", "hh", Preference([{"role": "system", "content": "x"}], ["a", "b"],
                                     ranks=[1, 2]), "a transcript holds text of user and assis"),
        ("x.jsonl", "trl", PAIR[0], "layout='trl' is unknown; expected one of native, pairs"),
        ("x.csv", "native", PAIR[0], "expected a name that ends in .jsonl or .parquet"),
        ("x.jsonl", "native", Preference("x", ["a"], ranks=[1]), "expected at least 2"),
    ],
)  # fmt: skip
def test_what_cannot_be_written(tmp_path, name, layout, preference, message):
    with pytest.raises(UserError, match=r"\w") as error:
        write_preferences(tmp_path / name, [preference], layout)
    assert message in str(error.value) and not list(tmp_path.iterdir())


def test_a_column_of_text_and_messages_is_not_for_parquet(tmp_path):
    with pytest.raises(UserError, match=r"holds values of one type: .*; write .jsonl"):
        write_preferences(tmp_path / "x.parquet", [*PAIR, *CHAT_PAIR])
    assert not list(tmp_path.iterdir())


def test_layouts_that_are_unknown_or_ambiguous(tmp_path):
    with pytest.raises(UserError) as error:
        read(tmp_path, {"question": "x", "answer": "y"})
    parts = (
        "data.jsonl:1: no known layout", "fields there: question, answer",
        "pairs: prompt, chosen, rejected", "native: prompt, responses and one of",
    )  # fmt: skip
    for part in parts:
        assert part in str(error.value)
    record = {"prompt": "x", "responses": ["a", "b"], "chosen": "a", "rejected": "b"}
    with pytest.raises(UserError, match=r"may be native or pairs .*; name one as layout"):
        detect(record)
    assert detect(record | {"responses": None}) == "pairs"
    record = {"prompt": "x", "completion": "a"}
    assert detect(record) == "demonstrations" and detect(record | {"label": False}) == "unpaired"
    with pytest.raises(UserError, match=r"no known layout .*fields there: prompt, completion\)"):
        detect(record | {"label": None})
    with pytest.raises(UserError, match="layout='trl' is unknown; expected auto or native"):
        read(tmp_path, HH, layout="trl")


def test_real_transcripts(real_data):
    """All but 5 of 1,600, of which one parts before the last turn and four say nothing."""
    path = str(real_data / "hh-rlhf" / "harmless-base-1600.jsonl.gz")
    found = open_preferences(path, faulty="drop")
    assert len(found) == 1595 and found.num_faulty == 5
    assert all(one.ranks == [1, 2] and one.prompt[0]["role"] == "user" for one in found)
    with pytest.raises(UserError, match=r"jsonl\.gz:\d+: "):
        open_preferences(path)
    as_text = open_preferences(path, "hh_text", faulty="drop")
    lines = lines_of(path)
    assert [one.prompt + one.responses[0] for one in as_text] == [
        lines[int(as_text.where(i).rpartition(":")[2]) - 1]["chosen"] for i in range(len(as_text))
    ]


def lines_of(path):
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]
