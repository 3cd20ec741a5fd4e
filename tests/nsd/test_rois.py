from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from nsdray.nsd.rois import Voxels, load_voxels, voxel_groups


def _volume(layout, name: str) -> np.ndarray:
    return nib.load(layout.roi(1, name)).get_fdata()


def _save(path, volume) -> None:
    nib.save(nib.Nifti1Image(volume, np.eye(4)), path)


@pytest.mark.parametrize(
    ("rois", "expected"),
    [
        (["nsdgeneral"], lambda v: v("nsdgeneral") > 0),
        (["V1v"], lambda v: v("prf-visualrois") == 1),
        (["V3"], lambda v: np.isin(v("prf-visualrois"), [5, 6])),
        (["hV4", "PPA"], lambda v: (v("prf-visualrois") == 7) | (v("floc-places") == 2)),
        (["floc-words", "FFA-1"], lambda v: (v("floc-words") > 0) | (v("floc-faces") == 2)),
    ],
)
def test_unions_of_rois(mini, rois, expected):
    voxels = load_voxels(mini, 1, rois)
    mask = expected(lambda name: _volume(mini, name))
    assert mask.any() and voxels.shape == mask.shape and voxels.index.dtype == np.int64
    assert list(zip(*np.unravel_index(voxels.index, voxels.shape))) == list(zip(*np.nonzero(mask)))
    assert (voxels.ncsnr == nib.load(mini.ncsnr(1)).get_fdata()[mask]).all()


def test_names_come_from_all_atlases(mini_copy):
    inside = load_voxels(mini_copy, 1).index
    words = _volume(mini_copy, "floc-words").astype(np.int16)
    words[_volume(mini_copy, "prf-visualrois") == 1] = 4
    _save(mini_copy.roi(1, "floc-words"), words)
    mini_copy.ncsnr(1).unlink()
    voxels = load_voxels(mini_copy, 1, ["nsdgeneral"])
    v1v = np.flatnonzero(_volume(mini_copy, "prf-visualrois").ravel()[inside] == 1)
    assert {voxels.roi_names[i] for i in v1v} == {"V1v+mfs-words"}
    assert "" in voxels.roi_names and "hV4" in voxels.roi_names
    assert voxels.ncsnr is None


def test_another_mask_file_is_a_roi(mini_copy):
    mask = np.zeros(_volume(mini_copy, "nsdgeneral").shape, np.uint8)
    mask[1, 2, 3] = 1
    _save(mini_copy.roi(1, "mine"), mask)
    assert load_voxels(mini_copy, 1, ["mine"]).index.tolist() == [np.ravel_multi_index((1, 2, 3), mask.shape)]


def test_bad_rois(mini_copy):
    with pytest.raises(ValueError, match=r"no ROI 'V9' for subject 1.*Labels known: V1, .*Files present: floc-bodies"):
        load_voxels(mini_copy, 1, ["V9"])
    with pytest.raises(ValueError, match="give a list of names"):
        load_voxels(mini_copy, 1, "V1")
    _save(mini_copy.roi(1, "empty"), np.zeros((3, 3, 3), np.uint8))
    with pytest.raises(ValueError, match=r"rois \['empty'\] of subject 1 hold no voxel"):
        load_voxels(mini_copy, 1, ["empty"])
    _save(mini_copy.roi(1, "floc-faces"), np.zeros((3, 4, 5), np.int16))
    with pytest.raises(ValueError, match=r"floc-faces.nii.gz has shape \(3, 4, 5\), but .*nsdgeneral.nii.gz has"):
        load_voxels(mini_copy, 1)
    _save(mini_copy.roi(1, "floc-faces"), np.zeros((3, 4), np.int16))
    with pytest.raises(ValueError, match=r"has shape \(3, 4\); a ROI volume has three axes"):
        load_voxels(mini_copy, 1)
    path = mini_copy.roi(1, "nsdgeneral")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="nsdgeneral.nii.gz cannot be read as NIfTI"):
        load_voxels(mini_copy, 1)


def test_voxel_groups():
    names = ["V1v", "", "V1d+OFA", "FFA-1", "hV4", "OFA", "PPA+FFA-1"]
    voxels = Voxels(np.arange(7), (7, 1, 1), names, None)
    groups = voxel_groups(voxels, ["V1", "floc-faces", "hV4"])
    found = {name: own.tolist() for name, own in groups.items()}
    assert found == {"V1": [0, 2], "floc-faces": [3, 5, 6], "hV4": [4], "rest": [1]}
    assert list(voxel_groups(Voxels(np.arange(1), (7, 1, 1), ["V1v"], None), ["V1v"])) == ["V1v"]  # nothing is left
    with pytest.raises(ValueError, match="no voxel group 'V9'; choose from V1, .*floc-faces.*PPA"):
        voxel_groups(voxels, ["V9"])
    with pytest.raises(ValueError, match="'V1v' holds none of the 7 voxels, or those of earlier groups only"):
        voxel_groups(voxels, ["V1", "V1v"])
