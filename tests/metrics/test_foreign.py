"""Which picture made elsewhere belongs to which test image."""
from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from nsdray.metrics.foreign import find_pictures

IDS = np.array([70, 2, 33])  # as first seen


def picture(value: int, size: tuple[int, int] = (5, 4)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def write(folder, names, size=(5, 4)):
    for value, name in enumerate(names):
        Image.fromarray(picture(value, size)).save(folder / name)


@pytest.mark.parametrize(
    ("names", "order", "taken", "values"),
    [
        (["0.png", "1.png", "2.png"], "auto", "first_seen", [0, 1, 2]),
        (["0.png", "1.png", "2.png"], "sorted", "sorted", [2, 0, 1]),
        (["2.png", "33.png", "70.png"], "auto", "image_id", [2, 0, 1]),
        (["2.png", "33.png", "70.png", "71.png"], "auto", "image_id", [2, 0, 1]),  # more images than this subject's
        (["00.bmp", "01.bmp", "02.bmp"], "auto", "first_seen", [0, 1, 2]),
    ],
)
def test_folder(tmp_path, names, order, taken, values):
    write(tmp_path, names)
    found = find_pictures(tmp_path, IDS, order)
    assert found.order == taken
    np.testing.assert_array_equal(found.read(IDS)[:, 0, 0, 0], values)
    np.testing.assert_array_equal(found.read(IDS[::-1])[:, 0, 0, 0], values[::-1])


@pytest.mark.parametrize("names", [["0.png", "00.png", "1.png", "2.png"], ["0.png", "1.bmp", "1.png", "2.png"]])
def test_two_pictures_of_one_number_are_refused(tmp_path, names):
    write(tmp_path, names)
    with pytest.raises(ValueError, match=f"{names[0 if '00' in names[1] else 1]} and .*which one is meant"):
        find_pictures(tmp_path, IDS)


@pytest.mark.parametrize("suffix", [".pt", ".npy"])
@pytest.mark.parametrize(("order", "values"), [("auto", [2, 0, 1]), ("first_seen", [0, 1, 2])])
@pytest.mark.parametrize("form", ["uint8 hwc", "float chw", "half chw"])
def test_one_file(tmp_path, suffix, order, values, form):
    pictures = np.stack([picture(value) for value in range(3)])
    if "chw" in form:
        pictures = (pictures.transpose(0, 3, 1, 2) / 255).astype(np.float16 if "half" in form else np.float32)
    path = tmp_path / f"all_recons{suffix}"
    np.save(path, pictures) if suffix == ".npy" else torch.save(torch.from_numpy(pictures.copy()), path)
    found = find_pictures(path, IDS, order).read(IDS)
    assert found.dtype == np.uint8 and found.shape == (3, 5, 4, 3)
    np.testing.assert_array_equal(found[:, 0, 0, 0], values)


def test_digest_changes_with_a_picture(tmp_path):
    write(tmp_path, ["0.png", "1.png", "2.png"])
    before = find_pictures(tmp_path, IDS).digest
    assert before == find_pictures(tmp_path, IDS).digest
    Image.fromarray(picture(200)).save(tmp_path / "1.png")
    assert before != find_pictures(tmp_path, IDS).digest


def test_what_does_not_fit_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not there; --images names a folder"):
        find_pictures(tmp_path / "nowhere", IDS)
    write(tmp_path, ["0.png", "1.png"])
    with pytest.raises(ValueError, match=r"has 2 pictures, the subject has 3 test images; .* 1 are missing \(first: \[2\]\)"):
        find_pictures(tmp_path, IDS)
    write(tmp_path, ["0.png", "1.png", "2.png", "3.png"])
    with pytest.raises(ValueError, match="has 4 pictures, the subject has 3 test images"):
        find_pictures(tmp_path, IDS)
    with pytest.raises(ValueError, match=r"'image_id', 2 are missing \(first: \[70, 33\]\)"):
        find_pictures(tmp_path, IDS, "image_id")
    write(tmp_path, ["grid_1.png"])
    with pytest.raises(ValueError, match="1 pictures are not named by a number alone, such as grid_1.png"):
        find_pictures(tmp_path, IDS)


def test_pictures_that_cannot_be_used(tmp_path):
    write(tmp_path, ["0.png", "1.png", "2.png"])
    write(tmp_path, ["2.png"], (9, 9))
    with pytest.raises(ValueError, match="2.png is 9 x 9 pixels, other pictures of .* are 4 x 5"):
        find_pictures(tmp_path, IDS).read(IDS)
    (tmp_path / "2.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="2.png is no picture that can be read"):
        find_pictures(tmp_path, IDS).read(IDS)


def test_files_that_cannot_be_used(tmp_path):
    def saved(array, name="all.npy"):
        np.save(tmp_path / name, array, allow_pickle=True)
        return tmp_path / name

    with pytest.raises(ValueError, match=r"has shape \(3, 4\); pictures are \(n, 3, height, width\)"):
        find_pictures(saved(np.zeros((3, 4))), IDS).read(IDS)
    with pytest.raises(ValueError, match="holds values from 0 to 255; pictures are uint8, or floats in"):
        find_pictures(saved(np.linspace(0, 255, 3 * 5 * 4 * 3).reshape(3, 5, 4, 3)), IDS).read(IDS)
    with pytest.raises(ValueError, match="has 2 pictures, the subject has 3 test images"):
        find_pictures(saved(np.zeros((2, 5, 4, 3), np.uint8)), IDS)
    with pytest.raises(ValueError, match="rows have no names"):
        find_pictures(saved(np.zeros((3, 5, 4, 3), np.uint8)), IDS, "image_id")
    with pytest.raises(ValueError, match="holds no plain array"):
        find_pictures(saved(np.array([print, print, print])), IDS)


def test_a_pickle_is_not_run(tmp_path):
    class Bad:
        def __reduce__(self):
            return (tmp_path / "ran").touch, ()

    torch.save(Bad(), tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="holds no plain array"):
        find_pictures(tmp_path / "bad.pt", IDS)
    assert not (tmp_path / "ran").exists()
