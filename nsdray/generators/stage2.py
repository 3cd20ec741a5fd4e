"""The stage-1 picture and CLIP tokens to the final picture, by Versatile Diffusion."""
from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nsdray import seeds as draws
from nsdray.generators.stage1 import enlarge
from nsdray.models.batching import padded_batches

if TYPE_CHECKING:  # importing diffusers takes seconds
    from nsdray.models.versatile_diffusion import VersatileDiffusion


def refine_pictures(
    diffusion: VersatileDiffusion,
    stage1: np.ndarray | None,
    vision: np.ndarray | None,
    text: np.ndarray | None,
    unconditional: tuple[torch.Tensor, torch.Tensor],
    image_ids: Sequence[int],
    seed: int = 0,
    batch_size: int = 8,
    noise: float = 0.0,
    **settings: Any,
) -> np.ndarray:
    """Stage-2 pictures, uint8 (n, s, s, 3) with s the diffusion model's image size.

    stage1: uint8 (n, h, w, 3), enlarged here by PIL's bicubic filter as Brain-Diffuser does; None starts from noise.
    vision (n, n_tokens, d), text (n, n_tokens, d): tokens, one of them may be None. unconditional: as
    `nsdray.targets.clip_tokens.unconditional_tokens`. image_ids: (n,), key all draws with seed. noise: factor of N(0, 1)
    noise added to the enlarged picture in 0..255, which is then clipped (paper, 3.4). settings: as
    `VersatileDiffusion.generate`. The result does not depend on batch_size beyond rounding.
    """
    seeds, size = draws.image_seeds(seed, image_ids), diffusion.image_size
    pictures = []
    for rows, n_valid in padded_batches(len(seeds), batch_size):
        of_rows = [seeds[i] for i in rows]
        start = None if stage1 is None else to_start(stage1[rows], size, of_rows, noise)
        tokens = [None if x is None else torch.from_numpy(x[rows].astype(np.float32)) for x in (vision, text)]
        refined = diffusion.generate(of_rows, *tokens, unconditional, start, **settings)
        pictures.append(refined[:n_valid].numpy())
    return np.concatenate(pictures)


def to_start(pictures: np.ndarray, size: int, seeds: Sequence[int], noise: float = 0.0) -> torch.Tensor:
    """Pictures uint8 (n, h, w, 3) as the diffusion model takes them, (n, 3, size, size) in [0, 1]; noise and its seeds as in
    `refine_pictures`."""
    images = torch.from_numpy(enlarge(pictures, (size, size))).permute(0, 3, 1, 2).float()
    if noise:
        images = (images + noise * draws.normal(seeds, "stage-1 noise", images.shape[1:])).clamp(0, 255)
    return images / 255


def round_trip(
    diffusion: VersatileDiffusion, pictures: np.ndarray, image_ids: Sequence[int], seed: int = 0, batch_size: int = 8
) -> np.ndarray:
    """Pictures through the VAE and back, uint8 (n, s, s, 3): the most that stage 2 could reach.

    pictures: uint8 (n, h, w, 3), brought to the model's size. image_ids: (n,), key the draws of the posterior with seed.
    """
    seeds, size, found = draws.image_seeds(seed, image_ids), diffusion.image_size, []
    for rows, n_valid in padded_batches(len(seeds), batch_size):
        of_rows = [seeds[i] for i in rows]
        latents = diffusion.encode(to_start(pictures[rows], size, of_rows), of_rows)
        found.append(diffusion.decode(latents)[:n_valid].numpy())
    return np.concatenate(found)
