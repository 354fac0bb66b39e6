"""Completions of one prompt -> one sequence that holds it once and each completion as a branch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np


def share_prompts(
    sequences: Sequence[Mapping[str, np.ndarray]], most: int
) -> list[dict[str, np.ndarray]]:
    """Joins sequences that begin with the same prompt, up to `most` of them.

      [prompt less its last token | that token, completion 1 | that token, completion 2 | ...]

    The last token of the prompt, which predicts the first one of a completion, stands in each
    branch, so that every target has a predictor of its own in the slot before.

    Args:
      sequences: as of `pack`: `tokens` and `mask`, which is True on the completion alone, and other
        arrays over the tokens. Of what stands before the last token of a prompt, the entries of the
        first sequence are kept.
      most: completions beside one copy of their prompt.
    Returns:
      Sequences with the same keys, `positions` (int32; of each branch as if it stood alone) and
      `branches` (int32; 0 on the prompt less its last token, 1, 2, ... on what follows). Each holds
      up to `most` completions, in their order; those of a prompt fill as few as can be.
    """
    groups: dict[bytes, list[Mapping[str, np.ndarray]]] = {}
    for sequence in sequences:
        prompt = sequence["tokens"][: int(np.argmax(sequence["mask"]))]
        groups.setdefault(np.asarray(prompt, np.int32).tobytes(), []).append(sequence)
    return [
        _joined(group[start : start + most])
        for group in groups.values()
        for start in range(0, len(group), most)
    ]


def shared_row_len(prompt_len: int, completion_len: int, most: int) -> int:
    """Tokens that a sequence of `share_prompts` has at most."""
    return prompt_len - 1 + most * (1 + completion_len)


def sequence_ids(rows: Mapping[str, np.ndarray]) -> np.ndarray:
    """Numbers the branches of each row: [..., T] int32, 1, 2, ... along it; the tokens of a prompt
    that come before its branches have any number.

    Args:
      rows: `segment_ids` and `branches`, [..., T].
    """
    segments, branches = rows["segment_ids"], rows["branches"]
    is_new = np.zeros(branches.shape, bool)
    is_new[..., 0] = True
    for ids in (segments, branches):
        is_new[..., 1:] |= ids[..., 1:] != ids[..., :-1]
    return np.cumsum(is_new & (branches > 0), axis=-1, dtype=np.int32)


def _joined(group: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    shared = int(np.argmax(group[0]["mask"])) - 1
    lengths = [len(sequence["tokens"]) for sequence in group]
    joined = {
        key: np.concatenate([group[0][key][:shared], *(one[key][shared:] for one in group)])
        for key in group[0]
    }
    return {
        **joined,
        "positions": np.concatenate(
            [np.arange(shared), *(np.arange(shared, length) for length in lengths)]
        ).astype(np.int32),
        "branches": np.repeat(
            np.arange(len(group) + 1, dtype=np.int32), [shared, *(n - shared for n in lengths)]
        ),
    }
