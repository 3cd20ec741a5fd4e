"""How much memory a ridge regression will need, told before it starts."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from nsdray.regressors.ridge import N_VOXELS_CHUNK
from nsdray.regressors.ridge_grid import N_ROWS_CHUNK

FLOAT, HALF = 4, 2


def ridge_bytes(
    n_samples: int, n_voxels: int, n_test: int, n_held_out: int, n_targets_block: int, dtype: type = np.float32, *,
    n_alphas: int = 1, n_groups: int = 1, decomposed: bool = False, scored: bool = False, n_searched: int = 0,
    keep: bool = False, n_columns: int | None = None, weights: Weights | None = None, n_workers: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Largest sum of arrays that exist at once, in bytes, by phase: "kernel", "factorisation", "search" (with n_searched),
    "targets".

    n_targets_block: targets that are worked through together; n_columns: targets that are read together as float16 (None: as
    many). n_alphas, n_groups: smoothers that are kept. decomposed: an eigendecomposition instead of a Cholesky factor. scored:
    alphas of a block are chosen by that. n_searched: targets of all kinds on which shared alphas and penalties are chosen. keep:
    the betas, the kernel and what was made of it stay while targets are worked through. n_workers: blocks that are worked
    through side by side.
    """
    size, n, n_columns = np.dtype(dtype).itemsize, n_samples, n_columns or n_targets_block
    betas, square = FLOAT * (n + n_test) * n_voxels, size * n * n
    chunk = size * (n + n_test) * min(N_VOXELS_CHUNK, n_voxels)
    smoothers = size * n_alphas * (n_groups * n_test + n_held_out) * n
    basis = FLOAT * n * n_voxels if weights else 0
    factorising = 3 * square if decomposed else square  # LAPACK's divide and conquer works in 2 n^2
    solving = max(chunk + size * n_test * n, 4 * size * n * max(n_test, n_held_out), basis and basis + 3 * chunk)
    scoring = 2 * size * n * n_targets_block + size * min(n, N_ROWS_CHUNK) * (n + 2 * n_targets_block)
    block = size * n * n_targets_block
    outputs = size * n_targets_block * ((n_alphas + 3) * n_held_out + 2 * n_groups * n_test)
    chosen = block if n_alphas > 1 else 0  # targets of one choice, side by side
    own = block + chosen + 2 * HALF * n * n_columns + outputs  # of the columns, some are in use and others are being read
    own += (scoring if scored else 0) + (weights.n_bytes(n, n_voxels, n_columns, block, n_alphas, size) if weights else 0)
    kept = betas + 2 * square if keep else 0
    search = betas + max(2 * square + block + scoring, square + factorising) + HALF * n * n_searched
    return {
        "kernel": betas + square + chunk,
        "factorisation": betas + square + max(factorising, square + smoothers + solving),
        **({"search": search} if n_searched else {}),
        "targets": kept + smoothers + basis + n_workers * own,
    }


@dataclass(frozen=True)
class Weights:
    """What is written for decoding new images."""

    n_targets: int
    """Of the largest column."""
    primal: bool

    def n_bytes(self, n_samples: int, n_voxels: int, n_columns: int, block: int, n_alphas: int, size: int) -> int:
        """Bytes that a worker holds beside its block."""
        coefficients = FLOAT * n_samples * n_columns + 4 * block if n_alphas > 1 else 0  # else they are the targets themselves
        if self.primal:
            return coefficients + FLOAT * (n_voxels + n_samples) * self.n_targets
        return coefficients + (FLOAT if n_alphas > 1 else HALF) * n_samples * self.n_targets


def check_memory(needed: Mapping[str, int], available: float, where: str, remedy: str) -> None:
    """ValueError with the numbers if any phase needs more than there is."""
    phase = max(needed, key=needed.get)
    if needed[phase] > available:
        each = ", ".join(f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in needed.items())
        raise ValueError(
            f"ridge: {phase} needs {needed[phase] / 1e9:.2f} GB, but {where} has {available / 1e9:.2f} GB "
            f"(by phase, in GB: {each}). {remedy}"
        )
