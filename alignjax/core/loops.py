"""How often a loop turns, where only the data knows: a name that the compiled program keeps."""

from contextlib import AbstractContextManager

import jax


def turning(trips: float) -> AbstractContextManager[None]:
    """Names the loops made under it: `with turning(8): jax.lax.while_loop(...)`.

    A program says nothing of the trips of a loop that ends by its data. `alignjax plan`, which
    multiplies what a loop's body costs by them, reads them here. Nothing else is changed.

    Args:
      trips: the most that there can be; of a loop inside of another one, on average.
    Raises:
      ValueError: if trips < 1.
    """
    if trips < 1:
        raise ValueError(f"trips={trips}: expected at least 1")
    return jax.named_scope(f"turning_{trips:g}_times")
