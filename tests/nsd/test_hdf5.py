"""A downloaded HDF5 file reads no other file of this machine."""
from __future__ import annotations

import h5py
import numpy as np
import pytest

from nsdray.nsd.betas import check_session, session_shape
from nsdray.nsd.stimuli import Stimuli

SHAPE = (6, 2, 3, 4)


@pytest.fixture
def secret(tmp_path):
    """Another file of this machine, as HDF5 and as raw bytes."""
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["betas"] = np.ones(SHAPE, np.int16)
        file["imgBrick"] = np.ones((6, 4, 4, 3), np.uint8)
    (tmp_path / "secret.bin").write_bytes(b"\1" * 288)
    return tmp_path


def external_link(file, name, shape, dtype, folder):
    file[name] = h5py.ExternalLink(str(folder / "secret.h5"), f"/{name}")


def soft_link(file, name, shape, dtype, folder):
    file["other"] = h5py.ExternalLink(str(folder / "secret.h5"), f"/{name}")
    file[name] = h5py.SoftLink("/other")


def raw_bytes(file, name, shape, dtype, folder):
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    file.create_dataset(name, shape, dtype, external=[(str(folder / "secret.bin"), 0, n_bytes)])


def virtual(file, name, shape, dtype, folder):
    layout = h5py.VirtualLayout(shape, dtype)
    layout[:] = h5py.VirtualSource(str(folder / "secret.h5"), name, shape)
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("trick", [external_link, soft_link, raw_bytes, virtual])
def test_values_from_elsewhere_are_refused(trick, secret):
    path = secret / "betas_session01.hdf5"
    with h5py.File(path, "w") as file:
        trick(file, "betas", SHAPE, np.int16, secret)
    with h5py.File(path) as file:
        assert (file["betas"][:] != 0).all()  # h5py itself would read them
    with pytest.raises(ValueError, match="betas in .* is (a link to elsewhere|not stored in that file)"):
        session_shape(path)
    with h5py.File(secret / "stimuli.hdf5", "w") as file:
        trick(file, "imgBrick", (6, 4, 4, 3), np.uint8, secret)
    with pytest.raises(ValueError, match="imgBrick in .* is (a link to elsewhere|not stored in that file)"):
        Stimuli(secret / "stimuli.hdf5")


def test_a_group_is_no_dataset(tmp_path):
    with h5py.File(tmp_path / "betas_session01.hdf5", "w") as file:
        file.create_group("betas")
    with pytest.raises(ValueError, match="not stored in that file; it is not one of NSD's sessions"):
        session_shape(tmp_path / "betas_session01.hdf5")


@pytest.mark.parametrize("suffix", [".hdf5", ".nii.gz", ".nii"])
def test_a_session_that_was_cut_short_is_known_without_reading_it(tmp_path, suffix):
    import nibabel as nib

    path, betas = tmp_path / f"betas_session01{suffix}", np.arange(24 * 50, dtype=np.int16).reshape(2, 3, 4, 50)
    if suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            file.create_dataset("betas", data=betas.transpose(3, 2, 1, 0), chunks=(50, 1, 1, 1))
    else:
        nib.save(nib.Nifti1Image(betas, np.eye(4)), path)
    check_session(path)
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="damaged or cut short"):
        check_session(path)
