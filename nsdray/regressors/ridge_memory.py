"""How much memory a ridge regression will need, told before it starts."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nsdray.regressors.ridge import N_VOXELS_CHUNK


def ridge_bytes(
    n_samples: int, n_voxels: int, n_test: int, n_held_out: int, n_targets_block: int, dtype: type = np.float32, *,
    n_alphas: int = 1, n_groups: int = 1, decomposed: bool = False, keep: bool = False, n_columns: int | None = None,
    n_weights: int = 0,
) -> dict[str, int]:  # fmt: skip
    """Largest sum of arrays that exist at once, in bytes, by phase: "kernel", "factorisation", "targets".

    n_targets_block: targets that are worked through together; n_columns: targets that are read together as float16 (None: as
    many). n_alphas, n_groups: smoothers that are kept. decomposed: an eigendecomposition instead of a Cholesky factor. keep:
    the kernel and what was made of it stay while targets are worked through (for weights). n_weights: targets of the largest
    column whose weights are written, 0 if none are.
    """
    size, n = np.dtype(dtype).itemsize, n_samples
    betas, square = 4 * (n + n_test) * n_voxels, size * n * n
    chunk = size * (n + n_test) * min(N_VOXELS_CHUNK, n_voxels)
    smoothers = size * n_alphas * (n_groups * n_test + n_held_out) * n
    factorising = 3 * square if decomposed else square  # LAPACK's divide and conquer works in 2 n^2
    solving = max(chunk + size * n_test * n, 4 * size * n * max(n_test, n_held_out))
    block = size * n * n_targets_block + 2 * n * (n_columns or n_targets_block)
    outputs = size * n_targets_block * ((n_alphas + 3) * n_held_out + 2 * n_groups * n_test)
    kept = betas + 2 * square if keep else 0
    dual = size * n * (n_columns or n_targets_block) if n_weights else 0
    weights = 2 * size * max(n, n_voxels) * n_weights  # and the file's bytes
    return {
        "kernel": betas + square + chunk,
        "factorisation": betas + square + max(factorising, square + smoothers + solving),
        "targets": kept + smoothers + 2 * block + outputs + dual + weights,  # a block is in use, another is being read
    }


def check_memory(needed: Mapping[str, int], available: float, where: str, remedy: str) -> None:
    """ValueError with the numbers if any phase needs more than there is."""
    phase = max(needed, key=needed.get)
    if needed[phase] > available:
        each = ", ".join(f"{name} {n_bytes / 1e9:.2f}" for name, n_bytes in needed.items())
        raise ValueError(
            f"ridge: {phase} needs {needed[phase] / 1e9:.2f} GB, but {where} has {available / 1e9:.2f} GB "
            f"(by phase, in GB: {each}). {remedy}"
        )
