"""Every random draw, keyed by what it is for.

A draw depends only on its key (seed, image_id, purpose, ...), never on the order of images, the batch or the
worker, so results are the same however the work is split. Draws are made on the CPU in float32.
"""
from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch


def derive(*key: int | str) -> int:
    """Hash a key such as ``(seed, image_id, "posterior")`` to a 63-bit seed (BLAKE2b, stable across machines)."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def rng(*key: int | str) -> np.random.Generator:
    """NumPy generator for a key."""
    return np.random.default_rng(derive(*key))


def image_seeds(seed: int, image_ids: Sequence[int]) -> list[int]:
    """One seed per image: what `VDVAE.encode` and `VDVAE.decode` take as ``seeds``."""
    return [derive(seed, int(image_id)) for image_id in image_ids]


def _draw(seeds: Sequence[int], purpose: str, shape: Sequence[int], fill: str) -> torch.Tensor:
    out = torch.empty(len(seeds), *shape)
    for row, seed in zip(out, seeds):
        getattr(row, fill)(generator=torch.Generator().manual_seed(derive(seed, purpose)))
    return out


def normal(seeds: Sequence[int], purpose: str, shape: Sequence[int]) -> torch.Tensor:
    """Standard normal draws, (n, *shape) float32 on the CPU: row i depends on seeds[i] and purpose only."""
    return _draw(seeds, purpose, shape, "normal_")


def uniform(seeds: Sequence[int], purpose: str, shape: Sequence[int]) -> torch.Tensor:
    """Uniform draws in [0, 1), (n, *shape) float32 on the CPU: row i depends on seeds[i] and purpose only."""
    return _draw(seeds, purpose, shape, "uniform_")
