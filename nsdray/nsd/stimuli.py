"""The stimuli: ``nsd_stimuli.hdf5``, key ``imgBrick``, uint8 (n_images, height, width, 3), read picture by picture."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

from nsdray.nsd.hdf5 import own_dataset


def resize(pictures: np.ndarray, size: int) -> np.ndarray:
    """Resize uint8 pictures (n, h, w, 3) to (n, size, size, 3) by PIL's bilinear filter, antialiased.

    What Brain-Diffuser does before its VDVAE (torchvision's default on PIL pictures).
    """
    if pictures.shape[1:3] == (size, size):
        return pictures
    resized = [Image.fromarray(p).resize((size, size), Image.Resampling.BILINEAR) for p in pictures]
    return np.stack(resized) if resized else np.empty((0, size, size, 3), np.uint8)


class Stimuli:
    """Reads pictures from the stimulus file, only those asked for. Use it in a ``with`` statement.

    path: HDF5 file whose ``imgBrick`` is uint8 (n_images, h, w, 3); row number = image_id. FileNotFoundError or
    ValueError if it is not.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no stimuli {self.path}; download nsddata_stimuli/stimuli/nsd from NSD's bucket")
        try:
            self._file = h5py.File(self.path)
        except OSError as error:
            raise ValueError(f"{self.path} is no whole HDF5 file ({error}); download it again") from error
        try:
            self._brick = self._checked_brick()
        except ValueError:
            self._file.close()
            raise

    def _checked_brick(self) -> h5py.Dataset:
        brick = own_dataset(self._file, "imgBrick", self.path, "NSD's stimulus file")
        if brick.dtype != np.uint8 or brick.ndim != 4 or brick.shape[-1] != 3:
            raise ValueError(f"imgBrick in {self.path} is {brick.dtype} {brick.shape}; expected uint8 (n, h, w, 3)")
        return brick

    def __enter__(self) -> Stimuli:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    @property
    def n_images(self) -> int:
        return self._brick.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) in pixels."""
        return self._brick.shape[1:3]

    def read(self, image_ids: Sequence[int]) -> np.ndarray:
        """Pictures in the order asked for, duplicates included: uint8 (n, h, w, 3), values 0..255."""
        image_ids = np.asarray(image_ids, np.int64)
        outside = image_ids[(image_ids < 0) | (image_ids >= self.n_images)]
        if len(outside):
            raise ValueError(f"image_id {outside[0]} is not in {self.path}, which holds 0..{self.n_images - 1}")
        pictures = np.empty((len(image_ids), *self._brick.shape[1:]), np.uint8)
        previous = None
        for row in np.argsort(image_ids, kind="stable"):  # in the file's order, each picture once
            if previous is not None and image_ids[row] == image_ids[previous]:
                pictures[row] = pictures[previous]
            else:
                self._brick.read_direct(pictures, np.s_[image_ids[row]], np.s_[row])
            previous = row
        return pictures
