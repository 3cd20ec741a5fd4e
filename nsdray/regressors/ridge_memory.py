"""How much memory a ridge regression will need, told before it starts."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nsdray.regressors.ridge import N_VOXELS_CHUNK


def ridge_bytes(
    n_samples: int, n_voxels: int, n_test: int, n_held_out: int, n_targets_block: int, dtype: type = np.float32, *,
    n_alphas: int = 1, n_groups: int = 1, decomposed: bool = False, keep: bool = False, n_columns: int | None = None,
) -> dict[str, int]:  # fmt: skip
    """Largest sum of arrays that exist at once, in bytes, by phase: "kernel", "factorisation", "targets".

    n_targets_block: targets that are worked through together; n_columns: targets that are read together as float16 (None: as
    many). n_alphas, n_groups: smoothers that are kept. decomposed: an eigendecomposition instead of a Cholesky factor. keep:
    the kernel and what was made of it stay while targets are worked through (for weights).
    """
    size, n = np.dtype(dtype).itemsize, n_samples
    betas, square = 4 * (n + n_test) * n_voxels, size * n * n
    smoothers = size * n_alphas * (n_groups * n_test + n_held_out) * n
    solving = size * n * (4 * max(n_test, n_held_out) + (n_held_out if n_alphas > 1 else 0))
    factor = (4 if decomposed else 1) * square  # LAPACK's divide and conquer works in 2 n^2 beside copy and vectors
    outputs = size * n_targets_block * (3 * n_held_out * max(1, min(n_alphas, 3) // 2 * n_alphas) + 2 * n_groups * n_test)
    block = 2 * (size * n * n_targets_block + 2 * n * (n_columns or n_targets_block))  # one in use, one being read
    kept = betas + square * (2 if decomposed else 1) if keep else 0
    return {
        "kernel": betas + square + 2 * size * n * min(N_VOXELS_CHUNK, n_voxels),
        "factorisation": betas + square + factor + smoothers + solving,
        "targets": kept + smoothers + block + outputs,
    }


def check_memory(needed: Mapping[str, int], available: float, where: str, remedy: str) -> None:
    """ValueError with the numbers if any phase needs more than there is."""
    phase = max(needed, key=needed.get)
    if needed[phase] > available:
        each = ", ".join(f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in needed.items())
        raise ValueError(
            f"ridge: {phase} needs {needed[phase] / 1e9:.2f} GB, but {where} has {available / 1e9:.2f} GB (by phase, in GB: {each}). "
            f"{remedy}"
        )
