from __future__ import annotations

import h5py
import numpy as np
import pytest

from nsdray.nsd.scenes import draw_scene, make_scene
from nsdray.nsd.stimuli import Stimuli


@pytest.mark.parametrize("image_ids", [[5, 2, 2, 90, 0, 5], [], np.array([7], np.int32)], ids=str)
def test_pictures_in_the_order_asked_for(mini, image_ids):
    with h5py.File(mini.stimuli) as file, Stimuli(mini.stimuli) as stimuli:
        assert (stimuli.n_images, stimuli.shape) == (6 + 8 * 12, (16, 16))
        found = stimuli.read(image_ids)
        assert found.dtype == np.uint8 and found.shape == (len(image_ids), 16, 16, 3)
        for picture, image_id in zip(found, image_ids):
            np.testing.assert_array_equal(picture, file["imgBrick"][image_id])


def test_pictures_are_the_scenes_of_their_ids(mini):
    with Stimuli(mini.stimuli) as stimuli:
        np.testing.assert_array_equal(stimuli.read([11])[0], draw_scene(make_scene(0, "stimuli", 11), 16))


@pytest.mark.parametrize("image_id", [-1, 102])
def test_ids_out_of_range(mini, image_id):
    with Stimuli(mini.stimuli) as stimuli:
        with pytest.raises(ValueError, match=f"image_id {image_id} is not in .*nsd_stimuli.hdf5, which holds 0..101"):
            stimuli.read([0, image_id])


def test_bad_files(tmp_path):
    path = tmp_path / "stimuli.hdf5"
    with pytest.raises(FileNotFoundError, match="no stimuli .*stimuli.hdf5"):
        Stimuli(path)
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is no whole HDF5 file"):
        Stimuli(path)
    with h5py.File(path, "w") as file:
        file["pictures"] = 0
    with pytest.raises(ValueError, match=r"has no dataset 'imgBrick', only \['pictures'\]"):
        Stimuli(path)
    with h5py.File(path, "w") as file:
        file["imgBrick"] = np.zeros((2, 4, 4, 3))
    with pytest.raises(ValueError, match=r"is float64 \(2, 4, 4, 3\); expected uint8"):
        Stimuli(path)
