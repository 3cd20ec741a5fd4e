"""One vector of betas per image from its repeats: a single one, or a mixture of all of them.

A network that sees another draw each epoch sees the measurement's noise, which the mean over repeats hides. Images to be
decoded are means, so the noise is a regulariser; nothing is z-scored by it.
"""
from __future__ import annotations

import numpy as np

from nsdray.nsd.betas import SCALE
from nsdray.seeds import rng


def draw_repeats(
    repeats: np.ndarray, n_repeats: np.ndarray, image_ids: np.ndarray, sampling: str, seed: int, epoch: int
) -> np.ndarray:
    """Betas (n, n_voxels) float32 in percent signal change; an image's draw depends on (seed, epoch, image_id) only.

    repeats: (n, most repeats, n_voxels) int16 as on disk, of which each image has its first n_repeats (n,). sampling: "trial",
    one of them; "mixture", their mean under weights drawn uniformly from all that sum to 1 (Dirichlet of ones).
    """
    if sampling not in ("trial", "mixture"):
        raise ValueError(f"draw_repeats: sampling is {sampling!r}; choose trial or mixture")
    weights = np.zeros(repeats.shape[:2], np.float32)
    for row, n, image_id in zip(weights, n_repeats, image_ids):
        draw = rng(seed, "repeats", epoch, int(image_id))
        if sampling == "trial":
            row[draw.integers(n)] = 1
        else:
            row[:n] = draw.dirichlet(np.ones(n))
    return sum(weights[:, r, None] * repeats[:, r] for r in range(repeats.shape[1])) / np.float32(SCALE)
