"""How many sequences are computed side by side."""

from typing import Final

MAXIMUM_ROWS: Final = 64  # powers of two, both
ROWS_OF_ANY_MACHINE: Final = 16
_SHARE_OF_FREE_MEMORY: Final = 1 / 8


def rows_that_fit(bytes_of_a_row: int, free_bytes: int | None) -> int:
    """Return how many sequences may lie side by side, a power of two from 16 to `MAXIMUM_ROWS`.

    More than 16 only where an eighth of the free memory holds them even if each fills its context: rows beyond 16 are
    worth less each, and others want memory too.

    Args:
        bytes_of_a_row: What a sequence takes that fills its context.
        free_bytes: What programs can still have; None where the system does not tell.
    """
    rows = MAXIMUM_ROWS
    while rows > ROWS_OF_ANY_MACHINE and rows * bytes_of_a_row > _SHARE_OF_FREE_MEMORY * (free_bytes or 0):
        rows //= 2
    return rows
