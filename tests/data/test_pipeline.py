"""The order and the position of a stream of records; what happens to those too long."""

import itertools
import json
import threading

import numpy as np
import pytest

from alignjax.core.errors import UserError
from alignjax.data import examples, token_rows

NUM = 23


class Numbered:
    """Record i is the number i; `encode` makes (i % 4) + 2 tokens of value i + 1 from it."""

    def __init__(self, num=NUM):
        self.num = num

    def __len__(self):
        return self.num

    def __getitem__(self, index):
        return index

    def where(self, index):
        return f"train.jsonl:{index + 1}"


def encode(number):
    length = number % 4 + 2
    return {
        "tokens": np.full(length, number + 1, np.int32),
        "mask": np.arange(length) > 0,
    }


def rows_of(source=None, **options):
    options = {"num_micro_batches": 2, "rows": 2, "row_len": 8, "seed": 3} | options
    return token_rows(source or Numbered(), encode, **options)


def numbers(batch) -> list[int]:
    """The records of a batch: the value of each segment."""
    first = (batch["segment_ids"] > 0) & (batch["positions"] == 0)
    return (batch["tokens"][first] - 1).tolist()


def record_order(seed=3, **options) -> list[int]:
    stream = examples(
        Numbered(), lambda n: np.array([n]), num_prompts=1, prompt_len=1, seed=seed, **options
    )
    return [prompts[0].example for prompts in itertools.islice(stream, 3 * NUM)]


def test_each_epoch_has_every_record_once_in_another_order_set_by_the_seed():
    order = record_order()
    epochs = [order[:NUM], order[NUM : 2 * NUM], order[2 * NUM :]]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert record_order() == order
    assert record_order(num_threads=0) == order
    assert record_order(seed=4)[:NUM] != epochs[0]
    assert record_order(shuffle=False)[: 2 * NUM] == [*range(NUM)] * 2
    assert record_order(num_epochs=2) == order[: 2 * NUM]


@pytest.mark.parametrize("packed", [True, False])
def test_batches_hold_the_stream_in_order_without_gap_or_repeat(packed):
    seen = []
    for batch in itertools.islice(rows_of(packed=packed), 7):
        assert batch.keys() == {"tokens", "mask", "segment_ids", "positions"}
        assert all(value.shape == (2, 2, 8) for value in batch.values())
        seen.append(sorted(numbers(batch)))
    order = record_order()
    start = 0
    for batch in seen:
        assert batch == sorted(order[start : start + len(batch)])
        start += len(batch)
    assert start > (2 * NUM if packed else NUM)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_position_restores_exactly_the_rest_of_the_stream(packed, num_threads):
    """Across ends of epochs (23 records, 4 to 12 in a batch), from every position."""
    stream = rows_of(packed=packed, num_threads=num_threads)
    states, batches, epochs = [], [], []
    for _ in range(14):
        states.append(json.loads(json.dumps(stream.get_state())))
        epochs.append(stream.epoch)
        batches.append(next(stream))
    assert epochs[-1] > 2
    for n in (0, 1, 5, 9, 13):
        fresh = rows_of(packed=packed, num_threads=num_threads)
        next(fresh)  # It may have been read from before.
        fresh.set_state(states[n])
        assert fresh.get_state() == states[n]
        assert fresh.epoch == epochs[n]
        for m in range(n, 14):
            assert fresh.get_state() == states[m]
            batch = next(fresh)
            for key, value in batches[m].items():
                np.testing.assert_array_equal(batch[key], value)


def test_prompts_restore_likewise_and_the_last_list_is_short():
    def make():
        return examples(
            Numbered(), lambda n: np.array([n]), num_prompts=5, prompt_len=1, num_epochs=2
        )

    stream, states, lists = make(), [], []
    while True:
        states.append(stream.get_state())
        try:
            lists.append([prompt.example for prompt in next(stream)])
        except StopIteration:
            break
    assert [len(one) for one in lists] == [5] * 9 + [1]
    assert sorted(itertools.chain(*lists)) == sorted([*range(NUM)] * 2)
    fresh = make()
    fresh.set_state(states[4])
    assert [[prompt.example for prompt in one] for one in fresh] == lists[4:]
    assert stream.epoch == 2.0


def test_restoring_reads_only_what_follows():
    read = []

    class Counted(Numbered):
        def __getitem__(self, index):
            read.append(index)
            return index

    stream = rows_of(Counted(10_000), num_threads=0)
    stream.set_state({**stream.get_state(), "position": 9_000})
    next(stream)
    assert len(read) < 50


def test_epoch_counts_records():
    stream = rows_of(packed=False)
    next(stream)
    assert stream.epoch == pytest.approx(4 / NUM)


@pytest.mark.parametrize("packed", [True, False])
def test_evaluation_sees_each_record_once_and_fills_up_with_empty_rows(packed):
    batches = list(rows_of(packed=packed, shuffle=False, num_epochs=1))
    assert [n for batch in batches for n in sorted(numbers(batch))] == list(range(NUM))
    assert batches[-1]["tokens"].shape == (2, 2, 8)
    if not packed:
        assert len(batches) == 6  # 23 records, 4 rows.
        assert not batches[-1]["segment_ids"][-1, -1].any()
        assert (batches[0]["segment_ids"].max(-1) == 1).all()


def test_too_long_is_an_error_that_names_the_record():
    with pytest.raises(UserError, match=r"train\.jsonl:4: 5 tokens, but only 4 fit.*drop"):
        list(rows_of(row_len=4, shuffle=False, num_epochs=1))
    with pytest.raises(UserError, match=r"train\.jsonl:3: 9 tokens, but only 8 fit"):
        next(
            examples(
                Numbered(),
                lambda n: np.zeros(9 if n == 2 else 3),
                num_prompts=4,
                prompt_len=8,
                shuffle=False,
            )
        )


def test_dropped_records_are_counted_and_the_count_is_restored():
    options = {"row_len": 4, "shuffle": False, "num_epochs": 2, "overlong": "drop"}
    stream, states, batches = rows_of(**options), [], []
    while True:
        states.append((stream.get_state(), stream.num_dropped))
        try:
            batches.append(next(stream))
        except StopIteration:
            break
    kept = [n for n in range(NUM) if n % 4 != 3]  # n % 4 == 3 has 5 tokens.
    assert sorted(n for batch in batches for n in numbers(batch)) == sorted(kept * 2)
    assert stream.num_dropped == 2 * (NUM - len(kept))
    fresh = rows_of(**options)
    fresh.set_state(states[3][0])
    assert fresh.num_dropped == states[3][1] > 0
    assert [numbers(batch) for batch in fresh] == [numbers(batch) for batch in batches[3:]]
    assert fresh.get_state() == stream.get_state()


@pytest.mark.parametrize("num_epochs", [None, 1])
def test_if_everything_is_dropped_it_says_so(num_epochs):
    num = NUM if num_epochs else 2 * NUM + 1
    with pytest.raises(UserError, match=f"every one of the last {num} records is too long"):
        next(rows_of(row_len=1, overlong="drop", num_epochs=num_epochs))


def test_a_record_that_was_refused_is_refused_again_and_the_position_stays():
    stream = rows_of(row_len=4, rows=1, num_micro_batches=1, shuffle=False)
    next(stream)
    state = stream.get_state()
    for _ in range(2):
        with pytest.raises(UserError, match=r"train\.jsonl:4"):
            for _ in range(3):
                next(stream)
    assert state["position"] <= stream.get_state()["position"] <= 3


def test_a_record_that_cannot_be_trained_is_named():
    def refuse(number):
        if number == 2:
            raise UserError("unknown character 'x'")
        return encode(number)

    def untrained(number):
        return encode(number) | {"mask": np.zeros(number % 4 + 2, bool)}

    shape = {"num_micro_batches": 1, "rows": 4, "row_len": 8, "shuffle": False}
    with pytest.raises(UserError, match=r"^train\.jsonl:3: unknown character 'x'$"):
        next(token_rows(Numbered(), refuse, **shape))
    with pytest.raises(UserError, match=r"^train\.jsonl:1: none of its 2 tokens is a target$"):
        next(token_rows(Numbered(), untrained, **shape))
    with pytest.raises(UserError, match=r"^train\.jsonl:1: the prompt has no tokens$"):
        next(examples(Numbered(), lambda n: [], num_prompts=1, prompt_len=8, shuffle=False))


def test_a_position_in_other_data_is_refused():
    state = rows_of().get_state()
    with pytest.raises(UserError, match="resume with the same data"):
        rows_of(Numbered(24)).set_state(state)


def test_encoding_runs_ahead_in_threads():
    names = set()

    def named(number):
        names.add(threading.current_thread().name)
        return encode(number)

    next(token_rows(Numbered(), named, num_micro_batches=1, rows=2, row_len=8, num_threads=2))
    assert names
    assert threading.current_thread().name not in names
