from __future__ import annotations

import gzip

import h5py
import nibabel as nib
import numpy as np
import pytest

from nsdray.nsd import betas as reader
from nsdray.nsd.betas import dead_voxels, read_session, session_shape
from nsdray.nsd.rois import Voxels
from nsdray.nsd.simulate import write_session

N_TRIALS, SHAPE = 13, (5, 7, 4)


@pytest.fixture
def stored() -> np.ndarray:
    """int16 (n_trials, X, Y, Z) over the whole range."""
    return np.random.default_rng(0).integers(-32768, 32768, (N_TRIALS, *SHAPE)).astype(np.int16)


@pytest.fixture
def voxels() -> Voxels:
    index = np.sort(np.random.default_rng(1).choice(np.prod(SHAPE), 60, replace=False))
    return Voxels(index, SHAPE, [""] * 60, None)


def _expected(stored, voxels) -> np.ndarray:
    return stored[:, *np.unravel_index(voxels.index, SHAPE)]


def _check(path, stored, voxels) -> None:
    found = read_session(path, voxels)
    assert found.dtype == np.int16 and found.flags.c_contiguous
    np.testing.assert_array_equal(found, _expected(stored, voxels))
    assert session_shape(path) == (N_TRIALS, SHAPE)


def _write_hdf5(path, stored, **storage) -> None:
    with h5py.File(path, "w") as file:
        file.create_dataset("betas", data=stored.transpose(0, 3, 2, 1), **storage)


def test_hdf5_of_nsd(tmp_path, stored, voxels):
    write_session(tmp_path / "s.hdf5", stored)
    _check(tmp_path / "s.hdf5", stored, voxels)
    with h5py.File(tmp_path / "s.hdf5") as file:  # as MATLAB wrote it: x is the last axis
        assert file["betas"].chunks == (N_TRIALS, 1, 1, 1)
        np.testing.assert_array_equal(file["betas"][:, 1, 2, 3], stored[:, 3, 2, 1])


@pytest.mark.parametrize("buffer_bytes", [1, 2 * N_TRIALS * 7, 8 * 2**20])
def test_hdf5_in_groups(tmp_path, stored, voxels, monkeypatch, buffer_bytes):
    monkeypatch.setattr(reader, "BUFFER_BYTES", buffer_bytes)
    write_session(tmp_path / "s.hdf5", stored)
    _check(tmp_path / "s.hdf5", stored, voxels)
    _write_hdf5(tmp_path / "whole.hdf5", stored)
    _check(tmp_path / "whole.hdf5", stored, voxels)


@pytest.mark.parametrize(
    "storage",
    [
        dict(),
        dict(chunks=(N_TRIALS, 1, 1, 1), compression="gzip"),
        dict(chunks=(N_TRIALS, 1, 1, 1), dtype=">i2"),
        dict(chunks=(N_TRIALS, 1, 1, 1), fletcher32=True),
        dict(chunks=(1, 4, 7, 5)),
        dict(chunks=(4, 3, 2, 2), compression="gzip", shuffle=True),
        dict(chunks=(5, 1, 1, 1)),
    ],
    ids=str,
)
def test_hdf5_stored_otherwise(tmp_path, stored, voxels, storage):
    _write_hdf5(tmp_path / "s.hdf5", stored, **storage)
    _check(tmp_path / "s.hdf5", stored, voxels)


def test_chunks_never_written_hold_the_fill_value(tmp_path, stored, voxels):
    with h5py.File(tmp_path / "s.hdf5", "w") as file:
        size = (N_TRIALS, *SHAPE[::-1])
        dataset = file.create_dataset("betas", size, "<i2", chunks=(N_TRIALS, 1, 1, 1), fillvalue=-7)
        x, y, z = np.unravel_index(voxels.index[10], SHAPE)
        dataset[:, z, y, x] = np.arange(N_TRIALS)
    found = read_session(tmp_path / "s.hdf5", voxels)
    assert (found[:, 10] == np.arange(N_TRIALS)).all()
    assert (np.delete(found, 10, axis=1) == -7).all()


@pytest.mark.parametrize("name", ["s.nii.gz", "s.nii"])
@pytest.mark.parametrize("endianness", ["<", ">"])
def test_nifti_equals_nibabel_and_hdf5(tmp_path, stored, voxels, name, endianness):
    header = nib.Nifti1Header(endianness=endianness)
    header.set_data_dtype(np.dtype("i2").newbyteorder(endianness))
    path = tmp_path / name
    nib.save(nib.Nifti1Image(np.moveaxis(stored, 0, -1), np.eye(4), header), path)
    whole = nib.load(path).get_fdata()
    np.testing.assert_array_equal(read_session(path, voxels), whole.reshape(-1, N_TRIALS)[voxels.index].T)
    _check(path, stored, voxels)


@pytest.mark.parametrize("name", ["s.hdf5", "s.nii.gz", "s.nii"])
def test_damaged_files(tmp_path, stored, voxels, name):
    path = tmp_path / name
    write_session(path, stored)
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{name} is damaged or cut short .*; download it again"):
            read_session(path, voxels)


def test_damage_inside_a_compressed_stream(tmp_path, stored, voxels):
    path = tmp_path / "s.nii.gz"
    write_session(path, stored)
    raw = bytearray(path.read_bytes())
    raw[-8] ^= 1  # the check sum
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged or cut short .*CRC"):
        read_session(path, voxels)


def test_bad_hdf5(tmp_path, stored, voxels):
    path = tmp_path / "s.hdf5"
    _write_hdf5(path, stored.astype(np.float32))
    with pytest.raises(ValueError, match="betas in .*s.hdf5 are float32; expected int16"):
        read_session(path, voxels)
    with h5py.File(path, "w") as file:
        file["other"] = stored
    with pytest.raises(ValueError, match=r"no dataset 'betas', only \['other'\]"):
        session_shape(path)
    _write_hdf5(path, stored[:, :4])
    with pytest.raises(ValueError, match=r"s.hdf5 has the grid \(4, 7, 4\), but the ROIs have \(5, 7, 4\)"):
        read_session(path, voxels)
    with h5py.File(path, "w") as file:
        file["betas"] = stored[0]
    with pytest.raises(ValueError, match=r"have shape \(5, 7, 4\); expected \(n_trials, Z, Y, X\)"):
        session_shape(path)


def test_bad_nifti(tmp_path, stored, voxels):
    path = tmp_path / "s.nii.gz"
    nib.save(nib.Nifti1Image(np.moveaxis(stored, 0, -1).astype(np.float32), np.eye(4)), path)
    with pytest.raises(ValueError, match="s.nii.gz holds float32; expected int16"):
        read_session(path, voxels)
    nib.save(nib.Nifti1Image(stored[0], np.eye(4)), path)
    with pytest.raises(ValueError, match=r"has shape \(5, 7, 4\); a session of betas has"):
        session_shape(path)
    write_session(path, stored[..., :3])
    with pytest.raises(ValueError, match=r"has the grid \(5, 7, 3\)"):
        read_session(path, voxels)
    write_session(path, stored)
    raw = bytearray(gzip.decompress(path.read_bytes()))
    raw[112:116] = np.float32(0.5).tobytes()  # scl_slope
    path.write_bytes(gzip.compress(raw))
    with pytest.raises(ValueError, match="has scl_slope 0.5 and scl_inter 0.0; betas are read as stored"):
        read_session(path, voxels)


def test_no_session_at_all(tmp_path, voxels):
    with pytest.raises(FileNotFoundError, match="no betas .*s.hdf5"):
        read_session(tmp_path / "s.hdf5", voxels)
    (tmp_path / "s.npy").touch()
    with pytest.raises(ValueError, match="its name must end in .hdf5, .nii.gz or .nii"):
        session_shape(tmp_path / "s.npy")


def test_dead_voxels(stored, voxels):
    betas = _expected(stored, voxels)
    betas[:, [3, 8]] = [0, 411]
    assert np.flatnonzero(dead_voxels(betas)).tolist() == [3, 8]
