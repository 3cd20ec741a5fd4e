from __future__ import annotations

import pytest

from nsdray.nsd.layout import NSDLayout


def test_paths_are_those_of_the_bucket(mini):
    inside = lambda path: str(path.relative_to(mini.root))  # noqa: E731
    assert inside(mini.expdesign) == "nsddata/experiments/nsd/nsd_expdesign.mat"
    assert inside(mini.stimuli) == "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
    assert inside(mini.roi(1, "nsdgeneral")) == "nsddata/ppdata/subj01/func1pt8mm/roi/nsdgeneral.nii.gz"
    betas = "nsddata_betas/ppdata/subj05/func1pt8mm/betas_fithrf_GLMdenoise_RR"
    assert inside(mini.session_betas(5, 2)) == f"{betas}/betas_session02.hdf5"
    assert inside(mini.ncsnr(5)) == f"{betas}/ncsnr.nii.gz"
    assert mini.subjects() == [1, 5]
    assert list(mini.session_files(1)) == [1, 2, 3]


def test_no_root(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder. An NSD root holds nsddata/"):
        NSDLayout(tmp_path / "nowhere")


def test_subjects_not_there(mini):
    with pytest.raises(ValueError, match="subject is 9; NSD's subjects are the integers 1 to 8"):
        mini.session_files(9)
    with pytest.raises(FileNotFoundError, match=r"no betas of subject 2: .*Subjects there: \[1, 5\]"):
        mini.session_files(2)
    with pytest.raises(FileNotFoundError, match=r"betas_session09.hdf5 nor betas_session09.nii.gz.*\[1, 2, 3\]"):
        mini.session_betas(1, 9)


def test_hdf5_goes_before_nifti(mini_copy):
    nifti = mini_copy.session_betas(1, 1).with_name("betas_session01.nii.gz")
    nifti.touch()
    assert mini_copy.session_betas(1, 1).suffix == ".hdf5"
    mini_copy.session_betas(1, 1).unlink()
    assert mini_copy.session_betas(1, 1) == nifti == mini_copy.session_files(1)[1]


def test_captions_where_the_archive_unpacks_them(mini_copy):
    canonical = mini_copy.captions("val2017")
    assert canonical.parent.name == "annotations" and canonical.parent.parent.name == "nsddata_stimuli"
    canonical.parent.rename(mini_copy.root / "annotations")
    assert mini_copy.captions("val2017") == mini_copy.root / "annotations/captions_val2017.json"
    with pytest.raises(ValueError, match="COCO split is 'test2017'"):
        mini_copy.captions("test2017")
