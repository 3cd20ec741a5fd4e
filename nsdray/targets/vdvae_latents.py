"""Pictures to VDVAE latents, the regression targets of stage 1."""
from __future__ import annotations

from typing import Literal

import numpy as np
import torch

from nsdray.models.batching import padded_batches
from nsdray.models.vdvae import VDVAE
from nsdray.nsd.stimuli import resize
from nsdray.seeds import image_seeds


def vdvae_latents(
    vdvae: VDVAE,
    pictures: np.ndarray,
    image_ids: np.ndarray,
    n_layers: int,
    latents: Literal["sample", "mean"] = "sample",
    seed: int = 0,
    batch_size: int = 32,
) -> list[np.ndarray]:
    """Latents of the first n_layers.

    pictures: uint8 (n, h, w, 3), resized here to the VDVAE's size. image_ids: (n,), key the posterior's draws with seed.
    Returns one float16 array (n, 16, r, r) per layer.
    """
    small = resize(pictures, vdvae.config.image_size)
    seeds = image_seeds(seed, image_ids)
    batches: list[list[np.ndarray]] = []
    for rows, n_valid in padded_batches(len(small), batch_size):
        images = torch.from_numpy(small[rows]).permute(0, 3, 1, 2) / 255
        layers = vdvae.encode(images, n_layers, latents, [seeds[i] for i in rows])
        batches.append([z[:n_valid].half().cpu().numpy() for z in layers])
    return [np.concatenate(layer) for layer in zip(*batches)]
