"""Which row is computed where: without a model, and without jax."""

from collections import deque

import numpy as np
import pytest

from alignjax.generate.schedule import Ladder, Slots


def ladder(num_prompts, num_samples, max_rows, num_devices=1):
    return Ladder.of(num_prompts, 8, num_samples, 100, max_rows=max_rows, num_devices=num_devices)


@pytest.mark.parametrize(
    ("num_prompts", "num_samples", "max_rows", "num_devices", "rows", "prompts"),
    [
        (1, 64, 1024, 1, 64, 1),  # a few prompts with many samples each
        (3, 16, 1024, 1, 48, 3),
        (1, 1, 1024, 1, 8, 8),
        (3, 2, 1024, 1, 8, 4),
        (64, 4, 128, 1, 128, 64),  # more than there are slots: twice the prompts that fill them
        (40, 8, 100, 1, 100, 32),
        (5, 1, 3, 1, 3, 3),
        (3, 16, 8, 1, 8, 2),  # G > max_rows
        (1, 64, 1024, 8, 64, 1),
        (6, 2, 1024, 8, 16, 8),
        (9, 1, 1, 8, 8, 8),  # never fewer than one row on each device
    ],
)
def test_no_more_rows_are_computed_than_max_rows_and_few_in_vain(
    num_prompts, num_samples, max_rows, num_devices, rows, prompts
):
    found = ladder(num_prompts, num_samples, max_rows, num_devices)
    assert (found.rows, found.prompts) == (rows, prompts)
    assert found.prompts * found.seats >= min(rows, num_prompts * num_samples)
    assert found.rows % num_devices == 0


def test_prompts_are_read_a_few_at_a_time():
    of = lambda width: Ladder.of(64, width, 1, 100, max_rows=1024, num_devices=1).read  # noqa: E731
    assert (of(100), of(1000), of(20_000)) == (64, 8, 1)


@pytest.mark.parametrize(
    ("num_prompts", "num_samples", "max_rows", "num_devices"),
    [(23, 5, 32, 1), (40, 1, 16, 1), (2, 50, 64, 1), (7, 3, 4, 1), (23, 5, 64, 4), (40, 2, 64, 8)],
)
def test_every_row_has_a_seat_of_its_prompt_until_it_is_done(
    num_prompts, num_samples, max_rows, num_devices
):
    rng, total = np.random.default_rng(0), num_prompts * num_samples
    slots = Slots(ladder(num_prompts, num_samples, max_rows, num_devices))
    queue = deque(range(total))
    done, num_reads, sizes = [], 0, []
    while queue or slots.num_live:
        waiting = list(queue)
        filled, read = slots.fill(queue, num_samples)
        assert slots.rows[filled].tolist() == waiting[: len(filled)]
        num_reads += len(read)
        of_row, rows = slots.seating()
        for slot in np.flatnonzero(slots.rows >= 0):
            place = of_row[slot] // slots.ladder.seats
            assert slots.prompts[place] == slots.rows[slot] // num_samples
            assert rows[of_row[slot]] == slot
        live = np.flatnonzero(slots.rows >= 0)
        assert len(live), "someone waits, and there is room"
        ended = live[rng.random(len(live)) < 0.3]
        done += slots.rows[ended].tolist()
        slots.empty(ended, queue, num_samples)
        if not queue and slots.can_shrink:
            before = slots.rows.copy(), slots.prompts.copy()
            source, prompt_source = slots.shrink()
            each = np.arange(len(source)) // (len(source) // num_devices)
            moved = source // (len(before[0]) // num_devices)
            assert (moved == each)[source >= 0].all(), "no row leaves its device"
            for now, old, kept in zip(
                (source, prompt_source), before, (slots.rows, slots.prompts), strict=True
            ):
                np.testing.assert_array_equal(np.where(now < 0, -1, old[now]), kept)
                assert set(kept) - {-1} == set(old) - {-1}
            sizes.append(len(slots.rows))
    assert sorted(done) == list(range(total))
    assert num_reads == num_prompts, "each prompt is read once"
    assert all(size >= 16 for size in sizes) and sizes == sorted(sizes, reverse=True)
