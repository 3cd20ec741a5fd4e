"""Voxels of named regions of interest: which of a volume's voxels are read, and what they are called.

A name is a mask or atlas file ("nsdgeneral", "floc-faces": all voxels above 0), a label of an atlas ("V1v", "PPA"), or
an early visual area in both halves ("V1").
"""
from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from nsdray.nsd.layout import NSDLayout

ATLASES = {  # file: names of the labels 1, 2, ...
    "prf-visualrois": ("V1v", "V1d", "V2v", "V2d", "V3v", "V3d", "hV4"),
    "floc-faces": ("OFA", "FFA-1", "FFA-2", "mTL-faces", "aTL-faces"),
    "floc-places": ("OPA", "PPA", "RSC"),
    "floc-bodies": ("EBA", "FBA-1", "FBA-2", "mTL-bodies"),
    "floc-words": ("OWFA", "VWFA-1", "VWFA-2", "mfs-words", "mTL-words"),
}
LABELS = {name: (atlas, value) for atlas, names in ATLASES.items() for value, name in enumerate(names, 1)}
UNIONS = {"V1": ("V1v", "V1d"), "V2": ("V2v", "V2d"), "V3": ("V3v", "V3d")}


@dataclass(frozen=True)
class Voxels:
    """A choice of voxels of a volume of shape (X, Y, Z)."""

    index: np.ndarray
    """(n_voxels,) int64: flat index in C order of (X, Y, Z), ascending."""
    shape: tuple[int, int, int]
    """(X, Y, Z)."""
    roi_names: list[str]
    """Per voxel, the atlas labels that it has, such as "V1v", joined with "+"; "" where none."""
    ncsnr: np.ndarray | None
    """(n_voxels,) float32, NSD's noise-ceiling signal-to-noise ratio; None without the file."""


def load_voxels(layout: NSDLayout, subject: int, rois: Sequence[str] = ("nsdgeneral",)) -> Voxels:
    """Union of the named ROIs. ValueError for an unknown name, an empty union or volumes that do not match."""
    if isinstance(rois, str) or not rois:
        raise ValueError(f"rois is {rois!r}; give a list of names such as ['nsdgeneral']")
    volumes = _Volumes(layout, subject)
    chosen = np.flatnonzero(np.any([volumes.mask(name) for name in rois], axis=0).ravel())
    if not len(chosen):
        raise ValueError(f"rois {list(rois)} of subject {subject} hold no voxel in {layout.roi_folder(subject)}")
    names = [[] for _ in chosen]
    for atlas in ATLASES:
        if layout.roi(subject, atlas).exists():
            values = volumes.read(layout.roi(subject, atlas)).ravel()[chosen].astype(int)
            for voxel in np.flatnonzero((values > 0) & (values <= len(ATLASES[atlas]))):
                names[voxel].append(ATLASES[atlas][values[voxel] - 1])
    ncsnr = None
    if layout.ncsnr(subject).exists():
        ncsnr = volumes.read(layout.ncsnr(subject)).ravel()[chosen].astype(np.float32)
    return Voxels(chosen.astype(np.int64), volumes.shape, ["+".join(n) for n in names], ncsnr)


def voxel_groups(voxels: Voxels, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Positions (k,) in voxels.index of the voxels of each named group, and of all others as "rest" (unless there are none).

    names: labels ("V1v", "PPA"), unions ("V1") or atlases ("floc-faces"). A voxel belongs to the first group that has it.
    ValueError for an unknown name or a group without voxels.
    """
    labels = [set(name.split("+")) for name in voxels.roi_names]
    free, groups = np.ones(len(labels), bool), {}
    for name in names:
        members = {name} if name in LABELS else set(UNIONS.get(name, ATLASES.get(name, ())))
        if not members:
            raise ValueError(f"no voxel group {name!r}; choose from {', '.join([*UNIONS, *ATLASES, *LABELS])}")
        own = free & np.array([bool(members & label) for label in labels])
        if not own.any():
            raise ValueError(
                f"voxel group {name!r} holds none of the {len(labels)} voxels, or those of earlier groups only; leave it out"
            )
        groups[name], free = np.flatnonzero(own), free & ~own
    return groups | ({"rest": np.flatnonzero(free)} if free.any() else {})


class _Volumes:
    """Reads one subject's volumes, which must all have the shape of the first one."""

    def __init__(self, layout: NSDLayout, subject: int):
        self.layout, self.subject = layout, subject
        self.shape: tuple[int, int, int] | None = None
        self.first: Path | None = None

    def read(self, path: Path) -> np.ndarray:
        volume = read_volume(path)
        if self.shape is None:
            self.shape, self.first = volume.shape, path
        elif volume.shape != self.shape:
            raise ValueError(
                f"{path} has shape {volume.shape}, but {self.first} has {self.shape}; both must be of the same subject "
                "and resolution"
            )
        return volume

    def mask(self, name: str) -> np.ndarray:
        """Bool (X, Y, Z) of a ROI name."""
        if name in UNIONS:
            return np.any([self.mask(part) for part in UNIONS[name]], axis=0)
        atlas, value = LABELS.get(name, (name, None))
        path = self.layout.roi(self.subject, atlas)
        if not path.exists():
            present = sorted(p.name.removesuffix(".nii.gz") for p in path.parent.glob("*.nii.gz"))
            raise ValueError(
                f"no ROI {name!r} for subject {self.subject}: {path} does not exist. Labels known: "
                f"{', '.join([*UNIONS, *LABELS])}. Files present: {', '.join(present) or 'none'}"
            )
        volume = self.read(path)
        return volume > 0 if value is None else volume == value


def read_volume(path: Path) -> np.ndarray:
    """A NIfTI volume as stored, (X, Y, Z). ValueError for a damaged file or one that is not 3-D."""
    try:
        volume = np.asarray(nib.load(path).dataobj)
    except (nib.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as NIfTI ({error}); download it again") from error
    if volume.ndim != 3:
        raise ValueError(f"{path} has shape {volume.shape}; a ROI volume has three axes (X, Y, Z)")
    return volume
