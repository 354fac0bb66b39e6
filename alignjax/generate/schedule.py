"""Rows in a queue -> slots and seats: which row is computed where. Plain Python, on the host."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

_MIN_ROWS = 8
"""So that all small calls are one compilation."""
MIN_SHRUNK = 16
"""Fewer rows than these are hardly quicker."""
_MIN_CAPACITY = 64
_READ_TOKENS = 8192
"""Tokens of prompts that a device reads at once, unless a single prompt has more."""


def bucket(size: int, *, smallest: int = 8) -> int:
    """The lowest rung of the ladder 1, 2, 3, 4, 6, 8, 12, ... that holds `size` and `smallest`."""
    rung = 1
    while rung < max(size, smallest):
        rung = -(-rung * 3 // 2) if rung & (rung - 1) == 0 else rung // 3 * 4
    return rung


@dataclass(frozen=True)
class Ladder:
    """The shapes that a call may compile functions for: a few, given by its size alone.

    Attributes:
      rows: slots at most; then half of them, and so on, down to 16.
      prompts: that are kept at once; never more than there are slots.
      seats: rows of one prompt at once.
      width: slots of a prompt.
      read: prompts that are read in one call.
      num_devices: over which slots are split, in order; a row stays on its device.
      capacity: tokens that a row may add at most; 64 of them at first, then twice as many.
    """

    rows: int
    prompts: int
    seats: int
    width: int
    read: int
    capacity: int
    num_devices: int = 1

    @classmethod
    def of(
        cls, num_prompts: int, width: int, num_samples: int, max_tokens: int,
        *, max_rows: int, num_devices: int,
    ) -> Ladder:  # fmt: skip
        total = num_prompts * num_samples
        limit = max(1, max_rows // num_devices) * num_devices
        rows = min(limit, -(-bucket(total, smallest=_MIN_ROWS) // num_devices) * num_devices)
        seats = min(num_samples, rows)
        prompts = -(-rows // seats)
        read = prompts
        if total > rows:  # Some wait for their last row while others begin, a quarter at a time.
            read, prompts = -(-prompts // 4), min(2 * prompts, num_prompts, rows)
        width = bucket(width)
        return cls(
            rows=rows,
            prompts=bucket(prompts, smallest=1),
            seats=seats,
            width=width,
            read=bucket(min(read, max(1, _READ_TOKENS * num_devices // width)), smallest=1),
            capacity=bucket(max_tokens),
            num_devices=num_devices,
        )

    @property
    def first_capacity(self) -> int:
        return min(_MIN_CAPACITY, self.capacity)


@dataclass
class Slots:
    """What the slots and the store of prompts hold.

    Attributes:
      rows: [N] int; the row in each slot, -1 where there is none.
      counts: [N] int; tokens drawn for it so far.
      prompts: [B] int; the prompt in each place, -1 where there is none.
      seats: [B, S] int; the slot that holds a seat of it, -1 where it is free.
    """

    ladder: Ladder
    rows: np.ndarray = field(init=False)
    counts: np.ndarray = field(init=False)
    prompts: np.ndarray = field(init=False)
    seats: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.rows = np.full(self.ladder.rows, -1)
        self.counts = np.zeros(self.ladder.rows, np.int32)
        self.prompts = np.full(self.ladder.prompts, -1)
        self.seats = np.full((self.ladder.prompts, self.ladder.seats), -1)

    @property
    def num_live(self) -> int:
        return int((self.rows >= 0).sum())

    def fill(self, queue: deque[int], num_samples: int) -> tuple[list[int], list[int]]:
        """Seats rows of the queue, in its order, as long as there is room.

        Args:
          queue: rows; sample g of prompt i is row i * num_samples + g. What is seated is taken off.
        Returns:
          the slots that were filled, and the places whose prompts are to be read first.
        """
        filled, read = [], []
        free = deque(np.flatnonzero(self.rows < 0).tolist())
        place_of = {prompt: place for place, prompt in enumerate(self.prompts) if prompt >= 0}
        while queue and free:
            prompt = queue[0] // num_samples
            if prompt not in place_of:
                unused = np.flatnonzero(self.prompts < 0)
                if not len(unused):
                    break
                place_of[prompt] = int(unused[0])
                self.prompts[unused[0]] = prompt
                read.append(int(unused[0]))
            place = place_of[prompt]
            unseated = np.flatnonzero(self.seats[place] < 0)
            if not len(unseated):
                break
            slot = free.popleft()
            self.seats[place, unseated[0]] = slot
            self.rows[slot], self.counts[slot] = queue.popleft(), 0
            filled.append(slot)
        return filled, read

    def empty(self, slots: Iterable[int], queue: deque[int], num_samples: int) -> None:
        """Frees slots, and the places of prompts that have no row left."""
        slots = list(slots)
        self.rows[slots] = -1
        self.seats[np.isin(self.seats, slots)] = -1
        waiting = queue[0] // num_samples if queue else -1
        is_idle = (self.seats < 0).all(axis=1) & (self.prompts != waiting)
        self.prompts[is_idle] = -1

    def shrink(self) -> tuple[np.ndarray, np.ndarray]:
        """Moves what is left to the smallest rung that holds it, each row on its device.

        Prompts of several devices stay where they are.

        Returns:
          [N'] and [B'] int32: the slot, and the place of a prompt, that each comes from; -1: none.
        """
        rows, devices = len(self.rows), self.ladder.num_devices
        while self._fit_into(rows, rows // 2):
            rows //= 2
        source = np.full((devices, rows // devices), -1, np.int32)
        for device, slots in enumerate(np.arange(len(self.rows)).reshape(devices, -1)):
            live = slots[self.rows[slots] >= 0]
            source[device, : len(live)] = live
        source = source.reshape(-1)
        if devices > 1:
            prompt_source = np.arange(len(self.prompts), dtype=np.int32)
        else:
            used = np.flatnonzero(self.prompts >= 0)
            prompt_source = np.full(min(len(self.prompts), rows), -1, np.int32)
            prompt_source[: len(used)] = used
        new_slot = np.full(len(self.rows) + 1, -1)
        new_slot[source[source >= 0]] = np.flatnonzero(source >= 0)
        seats = np.where(prompt_source[:, None] < 0, -1, new_slot[self.seats[prompt_source]])
        self.rows = np.where(source < 0, -1, self.rows[source])
        self.counts = self.counts[source]
        self.prompts = np.where(prompt_source < 0, -1, self.prompts[prompt_source])
        self.seats = seats
        return source, prompt_source

    @property
    def can_shrink(self) -> bool:
        return self._fit_into(len(self.rows), len(self.rows) // 2)

    def _fit_into(self, rows: int, half: int) -> bool:
        """Whether half of so many slots hold what each device has left."""
        devices = self.ladder.num_devices
        if rows % 2 or half % devices or half < MIN_SHRUNK:
            return False
        return int((self.rows >= 0).reshape(devices, -1).sum(axis=1).max()) <= half // devices

    def seating(self) -> tuple[np.ndarray, np.ndarray]:
        """[N] the seat of each row, and [B * S] the row in each seat, both int32 and 0 where there
        is none."""
        of_row, flat = np.zeros(len(self.rows), np.int32), self.seats.reshape(-1)
        taken = np.flatnonzero(flat >= 0)
        of_row[flat[taken]] = taken
        return of_row, np.maximum(flat, 0).astype(np.int32)
