"""HDF5 data sets whose values lie in the file itself.

A link, an external raw file or a virtual data set can make a downloaded file read any other file of this machine; NSD has none.
"""
from __future__ import annotations

from pathlib import Path

import h5py


def own_dataset(file: h5py.File, name: str, path: Path, kind: str) -> h5py.Dataset:
    """The data set of this name. ValueError if there is none, or if its values are elsewhere. kind: what the file should be."""
    if name not in file and file.get(name, getlink=True, default=None) is None:
        raise ValueError(f"{path} has no dataset {name!r}, only {sorted(file)}; it is not {kind}")
    if not isinstance(file.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f"{name} in {path} is a link to elsewhere, which no file of NSD has; download it again")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset) or dataset.external or dataset.is_virtual:
        raise ValueError(f"{name} in {path} is not stored in that file; it is not {kind}, download it again")
    return dataset
