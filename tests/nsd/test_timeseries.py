"""NSD's time series and designs: what is read, and what does not belong together."""
from __future__ import annotations

import gzip
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from nsdray.glm import Events, fit_glm
from nsdray.nsd.betas import SCALE, read_session, session_writer, to_stored
from nsdray.nsd.bold import BoldRun, BoldSession, bold_shape, read_series, session_design, voxels_with_data
from nsdray.nsd.layout import NSDLayout
from nsdray.nsd.rois import Voxels, load_voxels
from nsdray.nsd.simulate import simulate_nsd
from nsdray.nsd.simulate_bold import responses
from nsdray.nsd.timeseries import nsd_sessions


@pytest.fixture
def own(tiny, tmp_path) -> NSDLayout:
    """A small one to damage."""
    return simulate_nsd(tmp_path / "nsd", subjects=(1,), **tiny, with_bold=True)


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Over trials, per voxel."""
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    return (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))


@pytest.mark.parametrize("seed", [0, 1])
def test_each_type_of_betas_is_nearer_to_the_responses_that_were_simulated(scan_sizes, tmp_path, seed):
    """The truth has no trial noise: the same images and brain, with a noise ceiling of almost 1, which alters its scale only.

    The assumed HRF is the worst; fitted HRFs help a little, noise regressors more, then ridge regression. The simulation is
    not the fit's own model.
    """
    layout = simulate_nsd(tmp_path / "nsd", (1,), **scan_sizes, seed=seed, with_bold=True)
    noiseless = simulate_nsd(tmp_path / "truth", (1,), **scan_sizes, seed=seed, noise_ceiling=0.9999)
    sessions, voxels = nsd_sessions(layout, 1), load_voxels(layout, 1)
    assert (len(sessions[0].runs), sessions[0].tr, sessions[0].stimulus_duration) == (12, 4 / 3, 3.0)
    index = voxels_with_data(sessions[0].runs)
    at = np.searchsorted(index, voxels.index)
    np.testing.assert_array_equal(index[at], voxels.index)
    assert len(index) == len(at) + len(at) // 2
    truth, noisy = (
        np.concatenate([read_session(one.session_betas(1, session.session), voxels) for session in sessions]) / SCALE
        for one in (noiseless, layout)
    )
    medians, slopes = [], []
    for options in ({"beta_type": "B", "hrf": "assumed"}, {"beta_type": "B"}, {"beta_type": "C"}, {"beta_type": "D"}):
        betas = []
        for session in sessions:
            events, data = [run.events for run in session.runs], [read_series(run.path, index) for run in session.runs]
            betas.append(fit_glm(events, data, session.stimulus_duration, session.tr, **options).betas[:, at])
        betas = np.concatenate(betas)
        medians.append(np.median(correlation(betas, truth)))
        slopes.append(np.polyfit(noisy.mean(axis=0), betas.mean(axis=0), 1)[0])  # of means over trials, across voxels
    on_disk = np.median(correlation(noisy, truth))
    print("assumed HRF, B, C, D:", np.round(medians, 3), "on disk:", np.round(on_disk, 3), "slopes:", np.round(slopes, 2))
    assert (np.diff(medians) > [0.005, 0.04, 0.01]).all(), medians
    assert 0.8 < medians[3] / on_disk < 1.2
    assert 0.9 < slopes[3] < 1.1, slopes  # percent signal change, as on disk


def test_bold_alters_nothing_else(own, tiny, tmp_path):
    without = simulate_nsd(tmp_path / "without", subjects=(1,), **tiny)
    before = {path.relative_to(without.root): path.read_bytes() for path in without.root.rglob("*") if path.is_file()}
    record = before.pop(next(path for path in before if path.name == "simulated.json"))
    assert b"with_bold" not in record
    assert all((own.root / name).read_bytes() == content for name, content in before.items())
    again = simulate_nsd(tmp_path / "again", subjects=(1,), **tiny, with_bold=True)
    path = own.timeseries(1, 2, 3)
    assert path.read_bytes() == again.timeseries(1, 2, 3).read_bytes()


def test_responses_have_one_peak_and_their_delay():
    found = responses(np.array([4.0, 5.5, 7.0]), np.full(3, 1.0), np.full(3, 0.1))
    np.testing.assert_allclose(found.max(axis=1), 1)
    assert np.diff(found.argmax(axis=1)).min() >= 1 and (found[:, 0] < 0.01).all() and found.min() < -0.03


def test_series_are_those_of_nibabel(scanned, tmp_path):
    path = scanned.timeseries(1, 1, 2)
    volume = np.asarray(nib.load(path).dataobj)
    index = np.random.default_rng(0).permutation(volume[..., 0].size)[:50]
    found = read_series(path, index)
    assert found.dtype == np.int16 and found.flags.c_contiguous and bold_shape(path) == volume.shape
    np.testing.assert_array_equal(found, volume.reshape(-1, volume.shape[-1])[index])
    scaled = nib.Nifti1Image((volume / 7).astype(np.float32), np.diag([2, 2, 2, 1]))
    scaled.header.set_slope_inter(0.5, 3)
    nib.save(scaled, tmp_path / "scaled.nii")
    expected = nib.load(tmp_path / "scaled.nii").get_fdata().reshape(-1, volume.shape[-1])[index]
    np.testing.assert_allclose(read_series(tmp_path / "scaled.nii", index), expected, rtol=1e-5)


def test_runs_without_pictures_are_left_out(own):
    """14 runs, of which the first and the last are at rest: with designs of their own, without any, or numbered 1 to 12."""
    folder, n = own.timeseries_folder(1), len(own.timeseries_files(1)[2])
    expected = nsd_sessions(own, 1)[1]
    for run in range(n, 0, -1):
        own.timeseries(1, 2, run).rename(own.timeseries(1, 2, run + 1))
    for rest in (1, n + 2):
        (folder / own.timeseries(1, 2, rest).name).write_bytes(own.timeseries(1, 2, 2).read_bytes())

    def check(found: BoldSession) -> None:
        assert found.left_out == (own.timeseries(1, 2, 1).name, own.timeseries(1, 2, n + 2).name)
        assert [run.events for run in found.runs] == [run.events for run in expected.runs]
        assert found.runs[0].path == own.timeseries(1, 2, 2)

    check(nsd_sessions(own, 1)[1])
    for run in range(n, 0, -1):
        own.run_design(1, 2, run).rename(own.run_design(1, 2, run + 1))
    check(nsd_sessions(own, 1)[1])
    for rest in (1, n + 2):
        own.run_design(1, 2, rest).write_text("0\n" * 20)
    check(nsd_sessions(own, 1)[1])


def test_files_that_do_not_belong_together(own):
    path = own.run_design(1, 2, 1)
    lines = path.read_text().splitlines()
    shown = [i for i, line in enumerate(lines) if line != "0"]
    swapped = lines.copy()
    swapped[shown[0]], swapped[shown[1]] = lines[shown[1]], lines[shown[0]]
    for text, message in [
        ("\n".join(swapped), r"subject 1, session 2: trial 0 showed image \d+ by its designs, but \d+ by .*nsd_expdesign.mat"),
        ("\n".join(lines[:-5]), r"volumes, its design \d+ lines; expected as many, or one line less"),
        ("\n".join([*lines[:-1], "x"]), "does not hold one integer per line"),
        ("\n".join([*lines[:-1], "-4"]), "holds -4; expected 0 or an image"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            nsd_sessions(own, 1)
    path.write_text("\n".join(lines))
    assert len(nsd_sessions(own, 1, [2])) == 1
    with pytest.raises(FileNotFoundError, match=r"no time series of sessions \[9\] of subject 1.* has sessions \[1, 2, 3\]"):
        nsd_sessions(own, 1, [1, 9])
    with pytest.raises(FileNotFoundError, match="no time series of subject 2"):
        nsd_sessions(own, 2)
    for run in own.design_files(1)[1].values():
        run.unlink()
    with pytest.raises(FileNotFoundError, match=r"no designs of sessions \[1\] of subject 1"):
        nsd_sessions(own, 1, [2])


def test_damaged_runs(own):
    path = own.timeseries(1, 1, 1)
    content = path.read_bytes()
    path.write_bytes(content[:-400])
    with pytest.raises(ValueError, match="run01.nii.gz is damaged or cut short"):
        read_series(path, np.arange(5))
    path.write_bytes(gzip.compress(gzip.decompress(content)[:200]))
    with pytest.raises(ValueError, match="damaged"):
        bold_shape(path)
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), path)
    with pytest.raises(ValueError, match=r"holds int16 \(4, 4, 4\); a run of BOLD is real and has"):
        bold_shape(path)


def test_designs_that_cannot_be_are_told_with_their_session_and_files(scanned):
    session = nsd_sessions(scanned, 1)[0]

    def altered(**changes) -> BoldSession:
        runs = (replace(session.runs[0], **changes), *session.runs[1:])
        return replace(session, runs=runs)

    shape = session.runs[0].shape
    swapped = replace(session, runs=tuple(replace(run, shape=(shape[3], *shape[:3])) for run in session.runs))
    for one, message in [
        (replace(session, tr=1333.0), "subject 1, session 1: tr is 1333.*if these are milliseconds, give 1.333.*run01.nii.gz"),
        (altered(shape=(5, *shape[1:])), "subject 1, session 1: runs have unequal voxels"),
        (altered(events=Events([1e4], [3])), "1 of 1 events are outside the run"),
        (swapped, "before the last event .* Are the axes swapped"),
    ]:
        with pytest.raises(ValueError, match=message):
            session_design([one])
    with pytest.raises(ValueError, match="sessions that are fitted together need the same"):
        session_design([session, replace(session, session=2, tr=1.0)])
    both = session_design([session, replace(session, session=2)])
    assert both.session.tolist() == [1] * 12 + [2] * 12


def test_empty_runs(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 9), np.int16), np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(ValueError, match="are 0 everywhere in their first volumes"):
        voxels_with_data([BoldRun(tmp_path / "empty.nii.gz", (4, 4, 4, 9), Events([1.0], ["a"]))])


def test_zero_is_what_the_header_makes_of_the_stored_numbers(tmp_path):
    stored = np.full((4, 4, 4, 9), -6, np.int16)  # 0.5 x -6 + 3 = 0
    stored[1, 2, 3] = 0
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(0.5, 3)
    image.header["vox_offset"] = 352
    path = tmp_path / "scaled.nii"  # nibabel would rescale what it saves
    path.write_bytes(image.header.binaryblock + bytes(4) + stored.tobytes(order="F"))
    assert nib.load(path).get_fdata()[0, 0, 0, 0] == 0
    runs = [BoldRun(path, stored.shape, Events([1.0], ["a"]))]
    assert voxels_with_data(runs).tolist() == [np.ravel_multi_index((1, 2, 3), (4, 4, 4))]


def test_sessions_written_in_portions_are_read_back(tmp_path):
    random, shape = np.random.default_rng(0), (3, 4, 5)
    betas = random.integers(-3000, 3000, (7, 20), np.int16)
    index = np.sort(random.permutation(60)[:20])
    path = tmp_path / "folder" / "betas_session01.hdf5"
    with session_writer(path, 7, shape) as write:
        write(index[:13], betas[:, :13].T)
        write(index[13:], betas[:, 13:].T)
        assert not path.exists()
    np.testing.assert_array_equal(read_session(path, Voxels(index, shape, [""] * 20, None)), betas)
    others = np.setdiff1d(np.arange(60), index)
    assert not read_session(path, Voxels(others, shape, [""] * 40, None)).any()


def test_stored_betas_are_rounded_cut_and_counted():
    stored, n_cut = to_stored(np.array([1.0, -0.0018, np.nan, 200, -200], np.float32))
    assert stored.tolist() == [300, -1, 0, 32767, -32768] and stored.dtype == np.int16 and n_cut == 2
