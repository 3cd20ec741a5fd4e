"""Fixed batches: by index and padded, so that a result never depends on who else is in the batch or on the replica."""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def padded_batches(n: int, batch_size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (rows, n_valid) for n items: rows always has batch_size indices, the last one repeated as padding."""
    for start in range(0, n, batch_size):
        n_valid = min(batch_size, n - start)
        yield np.minimum(np.arange(start, start + batch_size), n - 1), n_valid
