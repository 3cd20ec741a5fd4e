"""The stimuli: ``nsd_stimuli.hdf5``, key ``imgBrick``, uint8 (n_images, height, width, 3), read picture by picture."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from PIL import Image


def resize(pictures: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 pictures (n, h, w, 3) to (n, size, size, 3) by PIL's bilinear filter, antialiased.

    What Brain-Diffuser does before its VDVAE (torchvision's default on PIL pictures).
    """
    if pictures.shape[1:3] == (size, size):
        return pictures
    resized = [Image.fromarray(p).resize((size, size), Image.Resampling.BILINEAR) for p in pictures]
    return np.stack(resized) if resized else np.empty((0, size, size, 3), np.uint8)
