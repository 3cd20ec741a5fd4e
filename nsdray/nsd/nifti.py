"""4-D NIfTI files as a stream: volume by volume in one buffer, at the speed of decompression."""
from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np

DAMAGE = (
    OSError,
    EOFError,
    RuntimeError,
    zlib.error,
    nib.filebasedimages.ImageFileError,
    nib.spatialimages.HeaderDataError,
)
"""What h5py, gzip and nibabel raise for a damaged file."""


def volumes(path: Path, header: nib.arrayproxy.ArrayProxy) -> Iterator[np.ndarray]:
    """Flat volumes, x fastest, one after the other in the same buffer; EOFError if the file ends early.

    header: the file's `nibabel.load(path).dataobj`. Values are as stored, without slope and intercept.
    """
    *xyz, n_volumes = header.shape
    volume = np.empty(int(np.prod(xyz)), header.dtype)
    with gzip.open(path) if path.name.endswith(".gz") else open(path, "rb") as stream:
        stream.read(header.offset)
        for number in range(n_volumes):
            n_bytes = stream.readinto(volume.view(np.uint8))
            if n_bytes != volume.nbytes:
                raise EOFError(f"volume {number} of {n_volumes} has {n_bytes} of {volume.nbytes} bytes")
            yield volume
        stream.read(1)  # a compressed stream checks its sum when it comes to the end
