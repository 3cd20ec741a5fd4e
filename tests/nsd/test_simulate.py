from __future__ import annotations

import hashlib

import h5py
import numpy as np
import pytest

from nsdray.nsd.betas import SCALE, read_session, session_shape
from nsdray.nsd.design import protocol_sessions, trials
from nsdray.nsd.rois import load_voxels
from nsdray.nsd.simulate import simulate_nsd
from nsdray.nsd.stimuli import Stimuli


def _digests(layout, subject: int) -> dict[str, str]:
    """Of every file of a subject's, and of what all share."""
    files = {str(p.relative_to(layout.root)): p for p in layout.root.rglob("*") if p.is_file()}
    wanted = [name for name in sorted(files) if f"subj{subject:02d}" in name or "subj" not in name]
    return {name: hashlib.sha256(files[name].read_bytes()).hexdigest() for name in wanted}


def _read(layout, subject: int):
    """(betas in percent signal change, trials, voxels) of all sessions."""
    voxels, sessions = load_voxels(layout, subject), protocol_sessions(layout, subject, "nsd40")
    paths = [layout.session_betas(subject, session) for session in sessions]
    counts = {session: session_shape(path)[0] for session, path in zip(sessions, paths)}
    betas = np.concatenate([read_session(path, voxels) for path in paths]) / SCALE
    return betas, trials(layout, subject, sessions, counts), voxels


def test_same_seed_same_bytes_and_subjects_are_independent(mini, tiny, tmp_path):
    alone = simulate_nsd(tmp_path / "nsd", subjects=(5,), **tiny)
    first = _digests(alone, 5)
    assert len(first) == 17 and first == _digests(mini, 5)
    grown = simulate_nsd(tmp_path / "nsd", subjects=(1, 5), **tiny)
    assert grown.subjects() == [1, 5]
    assert _digests(grown, 5) == first and _digests(grown, 1) == _digests(mini, 1)
    other = simulate_nsd(tmp_path / "other", subjects=(5,), **{**tiny, "seed": 1})
    assert not np.array_equal(_read(other, 5)[0], _read(mini, 5)[0])


def test_finished_ones_are_kept_and_halves_never_appear(mini, tiny, tmp_path, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in mini.root.rglob("*")}
    simulate_nsd(mini.root, subjects=(1, 5), **tiny)
    assert {path: path.stat().st_mtime_ns for path in mini.root.rglob("*")} == before

    def broken(path, betas):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nsdray.nsd.simulate.write_session", broken)
        with pytest.raises(KeyboardInterrupt):
            simulate_nsd(tmp_path / "nsd", subjects=(1,), **tiny)
    layout = simulate_nsd(tmp_path / "nsd", subjects=(), **tiny)
    assert layout.subjects() == []
    assert _digests(simulate_nsd(tmp_path / "nsd", subjects=(1,), **tiny), 1) == _digests(mini, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["nsd"]


def test_hdf5_and_nifti_hold_the_same_int16(mini, tiny, tmp_path):
    nifti = simulate_nsd(tmp_path / "nsd", subjects=(1,), **tiny, betas_format="nifti")
    assert nifti.session_betas(1, 1).name == "betas_session01.nii.gz"
    voxels = load_voxels(mini, 1, ["nsdgeneral"])
    for session in (1, 2, 3):
        compressed = read_session(nifti.session_betas(1, session), voxels)
        with h5py.File(mini.session_betas(1, session)) as file:
            plain = file["betas"][()].transpose(0, 3, 2, 1).reshape(len(compressed), -1)[:, voxels.index]
        np.testing.assert_array_equal(compressed, plain)
        np.testing.assert_array_equal(compressed, read_session(mini.session_betas(1, session), voxels))


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    sizes = dict(n_train=200, n_test=40, n_sessions=4, picture_size=32, volume=(13, 14, 12))
    return simulate_nsd(tmp_path_factory.mktemp("larger") / "nsd", subjects=(1,), **sizes, progress=False)


def test_noise_ceiling_is_the_one_asked_for_and_recorded(larger):
    betas, shown, voxels = _read(larger, 1)
    order = np.lexsort((shown.repeat, shown.image_id))
    repeats = betas[order].reshape(-1, 3, betas.shape[1])
    noise = repeats.var(axis=1, ddof=1).mean(axis=0)
    signal = np.maximum(repeats.mean(axis=1).var(axis=0, ddof=1) - noise / 3, 0)
    ceiling = signal / (signal + noise / 3)
    recorded = voxels.ncsnr**2 / (voxels.ncsnr**2 + 1 / 3)
    assert 0.28 < np.median(ceiling) < 0.42
    assert np.corrcoef(ceiling, recorded)[0, 1] > 0.8 and abs(np.median(ceiling - recorded)) < 0.05
    assert 0.8 < betas.std(axis=0).mean() < 2.2 and abs(betas).max() < 32767 / SCALE


def test_pictures_can_be_decoded_linearly(larger):
    betas, shown, _ = _read(larger, 1)
    image_ids, row = np.unique(shown.image_id, return_inverse=True)
    mean = np.stack([betas[row == i].mean(axis=0) for i in range(len(image_ids))])
    test = np.isin(image_ids, shown.image_id[shown.is_test])
    mean = (mean - mean[~test].mean(axis=0)) / mean[~test].std(axis=0)
    with Stimuli(larger.stimuli) as stimuli:
        pictures = stimuli.read(image_ids).reshape(-1, 8, 4, 8, 4, 3).mean(axis=(2, 4)).reshape(len(image_ids), -1)
    centre, train = pictures[~test].mean(axis=0), mean[~test]
    kernel = train @ train.T + 3 * train.shape[1] * np.eye(len(train))
    decoded = centre + mean[test] @ train.T @ np.linalg.solve(kernel, pictures[~test] - centre)
    scores = np.corrcoef(decoded, pictures[test])[: len(decoded), len(decoded) :]
    assert np.diag(scores).mean() - scores[~np.eye(len(scores), dtype=bool)].mean() > 0.3


def test_subjects_differ(mini):
    voxels_1, voxels_5 = load_voxels(mini, 1), load_voxels(mini, 5)
    assert voxels_1.shape != voxels_5.shape and len(voxels_1.index) > len(voxels_5.index)
    assert {"V1v", "V1d", "hV4", "PPA", "EBA"} <= set("+".join(voxels_1.roi_names).split("+"))
    early = [name.startswith(("V1", "V2", "V3", "hV4")) for name in voxels_1.roi_names]
    assert 0.5 < np.mean(early) < 0.7


def test_bad_parameters(mini, tiny, tmp_path):
    with pytest.raises(ValueError, match=r"other parameters \(there, asked for\): {'seed': \(0, 3\)}"):
        simulate_nsd(mini.root, subjects=(1,), **{**tiny, "seed": 3})
    with pytest.raises(ValueError, match="54 trials do not fill 4 equal sessions"):
        simulate_nsd(tmp_path / "nsd", **{**tiny, "n_sessions": 4})
    with pytest.raises(ValueError, match="betas_format is 'mat'; give 'hdf5' or 'nifti'"):
        simulate_nsd(tmp_path / "nsd", **tiny, betas_format="mat")
    with pytest.raises(ValueError, match="noise_ceiling is 1.0"):
        simulate_nsd(tmp_path / "nsd", **tiny, noise_ceiling=1.0)
    with pytest.raises(ValueError, match="n_test is 0; it must be at least 1"):
        simulate_nsd(tmp_path / "nsd", **{**tiny, "n_test": 0})
    with pytest.raises(ValueError, match="every axis needs 6 voxels"):
        simulate_nsd(tmp_path / "nsd", **{**tiny, "volume": (3, 12, 8)})
    with pytest.raises(ValueError, match="subject is 0"):
        simulate_nsd(tmp_path / "nsd", subjects=(0,), **tiny)
    (tmp_path / "letter.txt").touch()
    with pytest.raises(ValueError, match="is not empty and no miniature NSD"):
        simulate_nsd(tmp_path, **tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]
