"""Reconstructions that others made, as they leave them: a folder of pictures, or one file of all; so that nsdray can referee.

Known ways: Brain-Diffuser writes 0.png, 1.png, … in the order in which the test images were first seen; MindEye2 writes one .pt
file in ascending order of image_id.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
ARRAYS = (".npy", ".pt", ".pth")
MANY = 5  # names that an error lists


@dataclass(frozen=True)
class ForeignPictures:
    """One reconstruction for each test image."""

    path: Path
    """The folder, or the file of all."""
    places: dict[int, str | int]
    """File name, or row in the file of all, by image_id."""
    order: str
    """What the names or rows were taken for: image_id, first_seen or sorted."""

    @property
    def digest(self) -> str:
        """Changes when a file does: of names, sizes and times."""
        files = [self.path] if self.path.is_file() else [self.path / name for name in self.places.values()]
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        return hashlib.sha256(repr((sorted(self.places.items()), stats)).encode()).hexdigest()[:10]

    def read(self, image_ids: np.ndarray) -> np.ndarray:
        """Their pictures, uint8 (n, h, w, 3). ValueError for pictures of several sizes, or what is no picture."""
        if self.path.is_file():
            rows = _opened(self.path)[[self.places[int(i)] for i in image_ids]]
            return _as_uint8(_as_numpy(rows), self.path)
        pictures = []
        for image_id in image_ids:
            path = self.path / self.places[int(image_id)]
            try:
                pictures.append(np.asarray(Image.open(path).convert("RGB")))
            except OSError as error:
                raise ValueError(f"{path} is no picture that can be read ({error})") from error
            if pictures[-1].shape != pictures[0].shape:
                raise ValueError(
                    f"{path} is {_size(pictures[-1])} pixels, other pictures of {self.path} are {_size(pictures[0])}; bring them "
                    "to one size"
                )
        return np.stack(pictures)


def find_pictures(path: Path, image_ids: np.ndarray, order: str = "auto") -> ForeignPictures:
    """Which picture of a folder (or file) belongs to which test image.

    image_ids: (n,) 0-based 73k ids of the test images, in the order in which the subject first saw them. order: what the
    files are named by, or the rows ordered by: "image_id", "first_seen", "sorted", or "auto". FileNotFoundError or ValueError
    that says what does not fit.
    """
    ids = [int(i) for i in image_ids]
    if path.is_file():
        return _of_array(path, ids, order)
    if not path.is_dir():
        raise FileNotFoundError(f"{path} is not there; --images names a folder of reconstructions, or a file of all")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    numbers: dict[int, str] = {}
    for file in files:
        if file.stem.isdecimal() and numbers.setdefault(int(file.stem), file.name) != file.name:
            both = f"{numbers[int(file.stem)]} and {file.name}"
            raise ValueError(f"{path} has both {both}; which one is meant? Move the other elsewhere")
    if odd := [file.name for file in files if not file.stem.isdecimal()]:
        raise ValueError(
            f"{path}: {len(odd)} pictures are not named by a number alone, such as {', '.join(odd[:MANY])}. Name them by their "
            "0-based image_id, or 0, 1, … in the order in which the subject saw them first, or move them elsewhere"
        )
    if order == "auto":
        order = "image_id" if set(ids) <= numbers.keys() else "first_seen"
    keys = {"image_id": ids, "first_seen": range(len(ids)), "sorted": [sorted(ids).index(i) for i in ids]}[order]
    missing = [key for key in keys if key not in numbers]
    if missing or (order != "image_id" and len(numbers) != len(ids)):
        raise ValueError(
            f"{path} has {len(numbers)} pictures, the subject has {len(ids)} test images; taken in the order {order!r}, "
            f"{len(missing)} are missing (first: {missing[:MANY]}). Is it the right protocol (--data.protocol) and --order?"
        )
    return ForeignPictures(path, {image_id: numbers[key] for image_id, key in zip(ids, keys)}, order)


def _of_array(path: Path, ids: list[int], order: str) -> ForeignPictures:
    n = len(_opened(path))
    order = "sorted" if order == "auto" else order
    if order == "image_id":
        raise ValueError(f"{path} is one file, whose rows have no names: --order sorted or first_seen")
    if n != len(ids):
        raise ValueError(
            f"{path} has {n} pictures, the subject has {len(ids)} test images. Is it the right protocol (--data.protocol)? "
            "Several samples an image must be reduced to one"
        )
    rows = sorted(ids) if order == "sorted" else ids
    return ForeignPictures(path, {image_id: row for row, image_id in enumerate(rows)}, order)


def _opened(path: Path) -> Any:
    """A file's array or tensor, mapped into memory where the format allows it; nothing in it is run."""
    try:
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False)
        if path.suffix in ARRAYS:
            import torch

            tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"it holds a {type(tensor).__name__}")
            return tensor
    except Exception as error:
        raise ValueError(f"{path} holds no plain array ({error}). Save a tensor, or a folder of pictures") from error
    raise ValueError(f"{path}: files of reconstructions end in {', '.join(ARRAYS)}")


def _as_numpy(rows: Any) -> np.ndarray:
    """An array as it is, a tensor as an array; NumPy knows no bfloat16."""
    return rows if isinstance(rows, np.ndarray) else (rows.float() if rows.is_floating_point() else rows).numpy()


def _as_uint8(pictures: np.ndarray, path: Path) -> np.ndarray:
    """Pictures (n, 3, h, w) or (n, h, w, 3), uint8 or floats in [0, 1], as uint8 (n, h, w, 3)."""
    if pictures.ndim == 4 and pictures.shape[1] == 3 and pictures.shape[3] != 3:
        pictures = pictures.transpose(0, 2, 3, 1)
    if pictures.ndim != 4 or pictures.shape[3] != 3:
        raise ValueError(f"{path} has shape {pictures.shape}; pictures are (n, 3, height, width) or (n, height, width, 3)")
    if pictures.dtype == np.uint8:
        return np.ascontiguousarray(pictures)
    pictures = pictures.astype(np.float32)
    low, high = float(pictures.min()), float(pictures.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ValueError(f"{path} holds values from {low:g} to {high:g}; pictures are uint8, or floats in [0, 1]")
    return np.round(pictures.clip(0, 1) * 255).astype(np.uint8)


def _size(picture: np.ndarray) -> str:
    return f"{picture.shape[1]} x {picture.shape[0]}"
