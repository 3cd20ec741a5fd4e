"""Latents to the first, blurry picture: the VDVAE's decoder."""
from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from nsdray.models.batching import padded_batches
from nsdray.models.vdvae import VDVAE
from nsdray.seeds import image_seeds


def decode_pictures(
    vdvae: VDVAE,
    latents: Sequence[np.ndarray],
    image_ids: Sequence[int],
    seed: int = 0,
    temperature: float = 1.0,
    deterministic: bool = False,
    batch_size: int = 32,
) -> np.ndarray:
    """Pictures from the latents of the first layers, uint8 (n, s, s, 3) with s the VDVAE's image size.

    latents: one (n, 16, r, r) array per layer, from the top. image_ids: (n,), key the draws of all other layers with
    seed. The result does not depend on batch_size beyond rounding.
    """
    seeds = image_seeds(seed, image_ids)
    pictures = []
    for rows, n_valid in padded_batches(len(seeds), batch_size):
        batch = [torch.from_numpy(layer[rows].astype(np.float32)) for layer in latents]
        decoded = vdvae.decode(batch, [seeds[i] for i in rows], temperature, deterministic)
        pictures.append(decoded[:n_valid].numpy())
    return np.concatenate(pictures)


def to_png(picture: np.ndarray) -> bytes:
    """A uint8 (h, w, 3) picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return buffer.getvalue()


def from_png(data: bytes) -> np.ndarray:
    """PNG bytes as uint8 (h, w, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def enlarge(pictures: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize uint8 pictures (n, h, w, 3) to (n, *size, 3) by PIL's bicubic filter, as Brain-Diffuser's stage 1 does."""
    height, width = size
    return np.stack([Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC) for p in pictures])
