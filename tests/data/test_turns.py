"""One record, several sequences: each in its place, counted, shuffled, packed and resumed."""

import itertools
import json

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data import (
    Example,
    Examples,
    Fields,
    TextConfig,
    Turns,
    sequence_encoder,
    token_rows,
    training_source,
)
from alignjax.text import vocab_tokenizer

TOKENS = ["<pad>", "<bos>", "<eos>", *map(chr, range(32, 127)), "\n"]
TOKENIZER = vocab_tokenizer(TOKENS)
FIELDS = Fields(messages="talk")


def talk(*contents):
    return [
        {"role": "assistant" if n % 2 else "user", "content": content}
        for n, content in enumerate(contents)
    ]


RECORDS = [
    {"talk": talk("a", "b", "c", "d", "e", "f")},
    {"talk": talk("g", "h")},
    {"talk": talk("i", "j", "k", "l", "m")},  # Ends with the user.
]


def written(tmp_path, records=RECORDS):
    path = tmp_path / "chat.jsonl"
    if path.exists():  # Sources map their files.
        return str(path)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_an_example_for_each_turn_ends_there(tmp_path):
    config = TextConfig(fields=FIELDS, train_on="each")
    source = training_source(written(tmp_path), config)
    assert isinstance(source, Turns)
    found = ["".join(m["content"] for m in source[i].messages) for i in range(len(source))]
    assert found == ["ab", "abcd", "abcdef", "gh", "ij", "ijkl"]
    assert source.where(1).endswith("chat.jsonl:1: messages up to [3]")
    encode = sequence_encoder(config, TOKENIZER)
    trained = [
        "".join(TOKENS[i] for i in out["tokens"][out["mask"]]) for out in map(encode, source)
    ]
    assert trained == [f"{letter}<eos>" for letter in "bdfhjl"]
    assert isinstance(training_source(written(tmp_path), TextConfig(fields=FIELDS)), Examples)


def test_what_has_no_messages_is_as_it_was():
    class One:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return (
                Example(prompt="p", completion="c")
                if index == 0
                else Example(messages=talk("a", "b"))
            )

        def where(self, index):
            return f"line {index}"

    source = Turns(One())
    assert (len(source), source[0].completion, source.where(0)) == (2, "c", "line 0")
    assert source[1].messages == talk("a", "b")


def test_a_conversation_in_which_the_assistant_says_nothing_is_named(tmp_path):
    path = written(tmp_path, [*RECORDS, {"talk": talk("a")}])
    with pytest.raises(UserError, match=r"chat\.jsonl:4: a conversation without an assistant"):
        training_source(path, TextConfig(fields=FIELDS, train_on="each"))


def rows(tmp_path, **options):
    config = TextConfig(fields=FIELDS, train_on="each")
    options = {
        "num_micro_batches": 1, "rows": 1, "row_len": 100, "seed": 1, "overlong": "error",
    } | options  # fmt: skip
    return token_rows(
        training_source(written(tmp_path), config), sequence_encoder(config, TOKENIZER), **options
    )


def trained(batch):
    return "".join(TOKENS[i] for i in batch["tokens"][batch["mask"]]).split("<eos>")[:-1]


@pytest.mark.parametrize("packed", [True, False])
def test_every_turn_once_an_epoch_in_any_order_and_a_position_amid_a_record(tmp_path, packed):
    """A row holds two turns or so: batches end within a record."""
    stream = rows(tmp_path, packed=packed)
    states, batches = [], []
    while len([t for batch in batches for t in trained(batch)]) < 18:
        states.append(json.loads(json.dumps(stream.get_state())))
        batches.append(next(stream))
    seen = [t for batch in batches for t in trained(batch)]
    assert [sorted(seen[n : n + 6]) for n in (0, 6, 12)] == [list("bdfhjl")] * 3
    assert seen[:6] != seen[6:12]
    assert states[-1]["num_records"] == 6
    for n in range(len(states)):
        fresh = rows(tmp_path, packed=packed)
        fresh.set_state(states[n])
        for batch in batches[n:]:
            again = next(fresh)
            for key, value in batch.items():
                np.testing.assert_array_equal(again[key], value)


def test_a_turn_that_is_too_long_is_dropped_alone_and_named(tmp_path):
    stream = rows(tmp_path, row_len=40, overlong="drop", num_epochs=1)
    assert sorted(itertools.chain(*map(trained, stream))) == ["b", "h", "j"]
    assert stream.num_dropped == 3
    with pytest.raises(UserError, match=r"chat\.jsonl:1: messages up to \[3\]: \d+ tokens, but"):
        list(rows(tmp_path, row_len=40, num_epochs=1, shuffle=False))
