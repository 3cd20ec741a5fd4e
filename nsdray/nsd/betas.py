"""Session betas on disk -> the chosen voxels as int16, exactly as stored (percent signal change x 300).

NSD publishes a session twice, as HDF5 and as compressed NIfTI. Both are read at nearly the speed of the bare storage:

- HDF5 stores a voxel's trials in a chunk of its own, uncompressed. Each chosen voxel's chunk is fetched by its address,
  which skips the selection machinery.
- NIfTI stores one volume after the other in one compressed stream. The stream is decompressed volume by volume, and the
  chosen voxels are picked from each.

Neither ever holds more than the result and a buffer of BUFFER_BYTES or one volume.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from nsdray.nsd.hdf5 import own_dataset
from nsdray.nsd.nifti import DAMAGE, volumes
from nsdray.nsd.rois import Voxels

SCALE = 300
"""A stored int16 is percent signal change times this."""
BUFFER_BYTES = 32 * 2**20
"""Holds the chunks of all nsdgeneral voxels of a session, so that these are read in one sweep over the file."""


def session_shape(path: Path | str) -> tuple[int, tuple[int, int, int]]:
    """(n_trials, (X, Y, Z)) of a session, from its header alone."""
    path = Path(path)
    if _is_hdf5(path):
        with _open_hdf5(path) as file:
            n_trials, *zyx = _dataset(file, path).shape
            return n_trials, tuple(zyx[::-1])
    *xyz, n_trials = _nifti_header(path).shape
    return n_trials, tuple(xyz)


def check_session(path: Path | str) -> None:
    """ValueError if a session was cut short, without reading it: HDF5 and gzip files tell how long they should be."""
    path = Path(path)
    n_trials, shape = session_shape(path)
    if _is_hdf5(path):
        return  # its library has compared the length
    n_bytes = _nifti_header(path).offset + 2 * n_trials * int(np.prod(shape))
    found = path.stat().st_size
    if path.name.endswith(".gz"):
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            found = int.from_bytes(file.read(4), "little")  # length of what was compressed, modulo 2^32
        n_bytes %= 2**32
    if found != n_bytes:
        raise ValueError(f"{path} is damaged or cut short (it should hold {n_bytes} bytes, not {found}); download it again")


def read_session(path: Path | str, voxels: Voxels) -> np.ndarray:
    """Betas of the chosen voxels, (n_trials, n_voxels) int16, C-contiguous, in the order of voxels.index.

    path: .hdf5, .nii.gz or .nii. ValueError for a damaged file, another grid than the voxels', or values that are not
    plain int16.
    """
    path = Path(path)
    n_trials, shape = session_shape(path)
    if shape != tuple(voxels.shape):
        raise ValueError(
            f"{path} has the grid {shape}, but the ROIs have {tuple(voxels.shape)}; take both from the same subject "
            "and resolution"
        )
    xyz = np.unravel_index(voxels.index, shape)
    betas = np.empty((n_trials, len(voxels.index)), np.int16)
    try:
        if _is_hdf5(path):
            with _open_hdf5(path) as file:
                dataset = _dataset(file, path)
                read = _read_voxel_chunks if _has_voxel_chunks(dataset) else _read_boxes
                read(dataset, xyz, betas)
        else:
            _read_volumes(path, np.ravel_multi_index(xyz, shape, order="F"), betas)
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from error
    return betas


def to_stored(betas: np.ndarray) -> tuple[np.ndarray, int]:
    """Percent signal change as it is stored: int16, x 300, NaN as 0; and how many values were too large and cut."""
    scaled = np.rint(np.nan_to_num(betas, nan=0.0) * SCALE)
    low, high = np.iinfo(np.int16).min, np.iinfo(np.int16).max
    n_cut = int(((scaled < low) | (scaled > high)).sum())
    return scaled.clip(low, high).astype(np.int16), n_cut


@contextmanager
def session_writer(path: Path, n_trials: int, shape: tuple[int, int, int]) -> Iterator[Callable[[np.ndarray, np.ndarray], None]]:
    """Write a session as NSD's HDF5, portion by portion: ``write(index, betas)``; the file appears when all is written.

    index: flat, in C order of shape (X, Y, Z). betas: int16 (n_voxels, n_trials). Voxels that are never written are 0.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with h5py.File(partial, "w") as file:
        chunks = (n_trials, 1, 1, 1)
        dataset = file.create_dataset("betas", (n_trials, *shape[::-1]), "<i2", chunks=chunks, fillvalue=0)

        def write(index: np.ndarray, betas: np.ndarray) -> None:
            rows = np.ascontiguousarray(betas, "<i2")
            for row, x, y, z in zip(rows, *(axis.tolist() for axis in np.unravel_index(index, shape))):
                dataset.id.write_direct_chunk((0, z, y, x), row.tobytes())

        yield write
    os.replace(partial, path)


def dead_voxels(betas: np.ndarray) -> np.ndarray:
    """Voxels that never change: bool (n_voxels,) from betas (n_trials, n_voxels)."""
    return betas.min(axis=0) == betas.max(axis=0)


def _is_hdf5(path: Path) -> bool:
    if not path.exists():
        raise FileNotFoundError(f"no betas {path}; download the session from NSD's bucket")
    if path.name.endswith((".hdf5", ".h5")):
        return True
    if path.name.endswith((".nii.gz", ".nii")):
        return False
    raise ValueError(f"{path} is no session of betas: its name must end in .hdf5, .nii.gz or .nii")


# ---- HDF5


def _open_hdf5(path: Path) -> h5py.File:
    try:
        return h5py.File(path)
    except OSError as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from error


def _dataset(file: h5py.File, path: Path) -> h5py.Dataset:
    """The checked dataset, int16 (n_trials, Z, Y, X): MATLAB's (X, Y, Z, n_trials) seen from C."""
    dataset = own_dataset(file, "betas", path, "one of NSD's sessions")
    if dataset.ndim != 4:
        raise ValueError(f"betas in {path} have shape {dataset.shape}; expected (n_trials, Z, Y, X)")
    if dataset.dtype.kind != "i" or dataset.dtype.itemsize != 2:
        raise ValueError(f"betas in {path} are {dataset.dtype}; expected int16, percent signal change x {SCALE}")
    return dataset


def _has_voxel_chunks(dataset: h5py.Dataset) -> bool:
    """Whether every voxel has one raw chunk of its own, as in NSD."""
    raw = dataset.id.get_create_plist().get_nfilters() == 0 and dataset.dtype == np.dtype("<i2")
    return raw and dataset.chunks == (dataset.shape[0], 1, 1, 1)


def _read_voxel_chunks(dataset: h5py.Dataset, xyz: tuple[np.ndarray, ...], betas: np.ndarray) -> None:
    """Fill betas, one chunk a voxel. A group of voxels fits the buffer; within it, chunks are read in file order."""
    n_trials, n_voxels = betas.shape
    group = max(1, min(n_voxels, BUFFER_BYTES // (2 * n_trials)))
    chunks = np.empty(group, f"V{2 * n_trials}")
    rows = chunks.view("<i2").reshape(group, n_trials)
    read_chunk = dataset.id.read_direct_chunk
    for first in range(0, n_voxels, group):
        x, y, z = (axis[first : first + group] for axis in xyz)
        order = np.lexsort((x, y, z))
        corners = zip(repeat(0), z[order].tolist(), y[order].tolist(), x[order].tolist())
        for voxel, corner in zip(order.tolist(), corners):
            try:
                chunks[voxel] = read_chunk(corner)[1]
            except RuntimeError:  # a chunk that was never written: the slow way knows the fill value
                rows[voxel] = dataset[:, *corner[1:]]
        for start in range(0, len(x), 256):  # transposed in strips that stay in the processor's cache
            strip = rows[start : min(start + 256, len(x))]
            betas[:, first + start : first + start + len(strip)] = strip.T


def _read_boxes(dataset: h5py.Dataset, xyz: tuple[np.ndarray, ...], betas: np.ndarray) -> None:
    """Fill betas from any other storage: visit the chunks that hold a chosen voxel, each once, and pick from them."""
    n_trials, *zyx = dataset.shape
    step, *box = dataset.chunks or (n_trials, *zyx)
    step = max(1, min(step if dataset.chunks else n_trials, BUFFER_BYTES // (2 * int(np.prod(box)))))
    coordinates = np.stack(xyz[::-1])  # (3, n_voxels) as z, y, x
    boxes, box_of_voxel = np.unique(coordinates // np.array(box)[:, None], axis=1, return_inverse=True)
    order = np.argsort(box_of_voxel, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(box_of_voxel))[:-1])
    for corner, chosen in zip((boxes * np.array(box)[:, None]).T, members):
        where = tuple(slice(low, min(low + width, size)) for low, width, size in zip(corner, box, zyx))
        inside = tuple(coordinates[:, chosen] - corner[:, None])
        for t in range(0, n_trials, step):
            betas[t : t + step, chosen] = dataset[(slice(t, t + step), *where)][(slice(None), *inside)]


# ---- NIfTI


def _nifti_header(path: Path) -> nib.arrayproxy.ArrayProxy:
    """Shape, dtype and offset of a session, checked; no data is read."""
    try:
        header = nib.load(path).dataobj
    except DAMAGE as error:
        raise ValueError(f"{path} is damaged or cut short ({error}); download it again") from error
    if len(header.shape) != 4:
        raise ValueError(f"{path} has shape {header.shape}; a session of betas has (X, Y, Z, n_trials)")
    if header.dtype.kind != "i" or header.dtype.itemsize != 2:
        raise ValueError(f"{path} holds {header.dtype}; expected int16, percent signal change x {SCALE}")
    if (header.slope, header.inter) != (1, 0):
        raise ValueError(
            f"{path} has scl_slope {header.slope} and scl_inter {header.inter}; betas are read as stored, which must "
            f"be percent signal change x {SCALE}. Write the file again without scaling"
        )
    return header


def _read_volumes(path: Path, flat_index: np.ndarray, betas: np.ndarray) -> None:
    """Fill betas volume by volume. flat_index: in the file's order, x fastest."""
    header = _nifti_header(path)
    for row, volume in zip(betas, volumes(path, header), strict=True):
        row[:] = volume[flat_index]
