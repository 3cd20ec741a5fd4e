"""From runs of BOLD to session files: NSD's layout and BIDS, any number of workers, kills, and what does not belong there."""
from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import tyro

from nsdray.cluster import glm
from nsdray.cluster.glm import GLMPlan, estimate_betas
from nsdray.cluster.run import prepare_betas
from nsdray.config import BIDSConfig, Config, DataConfig, GLMConfig, SimulationConfig, StoreConfig
from nsdray.glm import fit_glm
from nsdray.nsd.betas import read_session, to_stored
from nsdray.nsd.bold import read_series, voxels_with_data
from nsdray.nsd.layout import NSDLayout
from nsdray.nsd.rois import load_voxels
from nsdray.nsd.timeseries import nsd_sessions
from nsdray.stages import Plan

CHECKOUT = Path(__file__).parents[2]
DECODED = "betas_fithrf_GLMdenoise_RR"
SMALL = ["--models", "ridge", "--n-layers", "3", "--targets.n-layers", "3", "--stage2.n-steps", "4"]


def stored(path: Path, index: np.ndarray) -> np.ndarray:
    """Voxels of a session file, (n_trials, n_voxels), by plain h5py."""
    with h5py.File(path) as file:
        return file["betas"][()].transpose(0, 3, 2, 1).reshape(len(file["betas"]), -1)[:, index]


@pytest.fixture(scope="module")
def nsd(scanned, tmp_path_factory) -> Path:
    """Subject 1 of the miniature, sessions 1 and 2, in a copy."""
    root = Path(shutil.copytree(scanned.root, tmp_path_factory.mktemp("copy") / "nsd"))
    shutil.rmtree(root / "nsddata_timeseries/ppdata/subj02")
    for path in NSDLayout(root).timeseries_files(1)[3].values():
        path.unlink()
    NSDLayout(root).responses(1).unlink()  # it names session 3
    return root


@pytest.fixture(scope="module")
def plan(nsd, tmp_path_factory, cluster) -> GLMPlan:
    """Done, with chunks of 64 voxels."""
    store = StoreConfig(str(tmp_path_factory.mktemp("store")))
    plan = GLMPlan(GLMConfig(nsd_root=str(nsd), chunk_voxels=64, store=store))
    estimate_betas(plan)
    return plan


def test_session_files_hold_what_fit_glm_gives(plan, scanned):
    session = nsd_sessions(scanned, 1)[1]
    index = voxels_with_data(session.runs)
    data = [read_series(run.path, index) for run in session.runs]
    found = fit_glm([run.events for run in session.runs], data, session.stimulus_duration, session.tr)
    assert found.beta_type == "D" and found.n_regressors > 0 and len(np.unique(found.fraction)) > 5
    expected, n_cut = to_stored(found.betas)
    betas = stored(plan.layout.session_file(1, 2), index)
    assert betas.shape == expected.shape and n_cut == 0
    # chunks of other sizes differ in rounding, which now and then turns a choice between two fractions
    difference = np.abs(betas.astype(int) - expected)
    assert (difference.max(axis=0) <= 1).mean() > 0.99 and (difference == 0).mean() > 0.98
    volume = np.asarray(nib.load(plan.layout.session_map(1, 2, "HRFindex")).dataobj).ravel()
    np.testing.assert_array_equal(volume[index], found.hrf_index + 1)
    assert not np.delete(volume, index).any()
    r2 = np.asarray(nib.load(plan.layout.session_map(1, 2, "R2")).dataobj).ravel()
    np.testing.assert_allclose(np.median(np.abs(r2[index] - found.r2)), 0, atol=1e-3)
    fraction = np.asarray(nib.load(plan.layout.session_map(1, 2, "FRACvalue")).dataobj).ravel()
    assert (np.abs(fraction[index] - found.fraction) < 0.01).mean() > 0.98
    record = json.loads(plan.layout.session_record(1, 2).read_text())
    assert record["n_regressors"] == found.n_regressors and record["n_noise_pool"] == found.noise_pool.sum()
    assert (record["n_trials"], record["n_voxels"], record["beta_type"]) == (108, len(index), "D")


def test_prepare_betas_reads_them(plan, nsd, tmp_path):
    data = DataConfig(nsd_root=str(nsd), subjects=(1,), beta_version=f"{DECODED}_nsdray")
    decoding = Plan(Config(data=data, store=StoreConfig(str(tmp_path))))
    prepare_betas(decoding)
    subject = decoding.subjects[0]
    assert list(subject.sessions) == [1, 2] and len(subject.trials.trial) == 216
    voxels = load_voxels(decoding.layout, 1)
    np.testing.assert_array_equal(read_session(subject.sessions[1], voxels), stored(subject.sessions[1], voxels.index))


def test_nothing_is_left_in_the_store_and_nothing_is_done_twice(plan, monkeypatch):
    left = [path.name for path in Path(plan.store.base).rglob("*") if path.is_file()]
    assert sorted(left) == ["config.json", "config.json"]
    for name in ("glm/series", "glm/betas"):  # as if the job had been killed before it could
        plan.store.write_bytes(f"{plan.stage(name, 1).folder}/{plan.groups[0].partition}/x.parquet", b"")

    def forbidden(*_, **__):
        raise AssertionError("nothing should have been started")

    monkeypatch.setattr(glm, "start_ray", forbidden)
    estimate_betas(GLMPlan(plan.config))
    assert left == [path.name for path in Path(plan.store.base).rglob("*") if path.is_file()]
    assert GLMPlan(replace(plan.config, chunk_voxels=None)).missing() == []
    assert len(GLMPlan(replace(plan.config, max_regressors=5)).missing()) == 2
    other = GLMPlan(replace(plan.config, sessions=(2,), beta_version="other"))
    assert [group.name for group in other.missing()] == ["subject 1, session 2"]


def test_jobs_with_other_outputs_share_nothing(plan, nsd, tmp_path):
    other = GLMPlan(replace(plan.config, output=str(tmp_path / "out")))
    another = GLMPlan(replace(plan.config, beta_type="B"))
    for name in ("glm/series", "glm/betas"):
        assert len({one.stage(name, 1).folder for one in (plan, other, another)}) == 3


def test_each_chunk_is_read_once_for_all_sessions(nsd, tmp_path, cluster, monkeypatch):
    config = GLMConfig(nsd_root=str(nsd), output=str(tmp_path / "out"), beta_type="B", hrf="assumed", sessions_together=True,
                       store=StoreConfig(str(tmp_path / "s")))  # fmt: skip
    plan, reads = GLMPlan(config), []
    read = glm.Stage.read
    monkeypatch.setattr(glm.Stage, "read", lambda self, *rest: reads.append(rest) or read(self, *rest))
    estimate_betas(plan)
    assert len(reads) == len(set(reads)) > 1
    index = voxels_with_data(plan.groups[0].runs)
    alone = GLMPlan(replace(config, output=str(tmp_path / "alone"), sessions_together=False))
    estimate_betas(alone)
    for session in (1, 2):
        ours, theirs = (stored(one.layout.session_file(1, session), index).astype(float) for one in (plan, alone))
        agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(ours.T, theirs.T)]
        assert np.median(agreement) > 0.999  # each in percent of its own mean


def test_betas_that_are_cut_are_counted_by_session_and_said(nsd, tmp_path, cluster, capsys):
    root = Path(shutil.copytree(nsd, tmp_path / "nsd"))
    shutil.rmtree(root / "nsddata_betas")
    path = NSDLayout(root).timeseries(1, 2, 3)
    image = nib.load(path)
    values = np.asarray(image.dataobj).copy()
    voxel = np.unravel_index(voxels_with_data(nsd_sessions(NSDLayout(root), 1)[1].runs)[5], values.shape[:3])
    values[voxel] = np.random.default_rng(0).integers(0, 32_000, values.shape[3])
    nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    config = GLMConfig(nsd_root=str(root), beta_type="B", sessions_together=True, store=StoreConfig(str(tmp_path / "s")))
    plan = GLMPlan(config)
    estimate_betas(plan)
    first, second = (json.loads(plan.layout.session_record(1, n).read_text())["n_values_cut"] for n in (1, 2))
    assert first == 0 < second
    assert f"; {second} betas were beyond what NSD's files hold (109 %) and were cut" in "".join(capsys.readouterr())


def test_a_task_that_no_node_can_hold_is_refused(nsd, tmp_path, cluster, monkeypatch):
    plan = GLMPlan(GLMConfig(nsd_root=str(nsd), output=str(tmp_path / "out"), store=StoreConfig(str(tmp_path / "s"))))
    monkeypatch.setattr(glm, "TASK_BYTES", 2**50)
    with pytest.raises(ValueError, match="needs .* GB of memory, and the largest node offers .* Give --chunk-voxels a smaller"):
        estimate_betas(plan)


def test_one_worker_gives_the_same_bytes(plan, nsd, tmp_path):
    code = f"""
import ray
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
from nsdray.cluster.glm import GLMPlan, estimate_betas
from nsdray.config import GLMConfig, StoreConfig
out = {str(tmp_path / "out")!r}
estimate_betas(GLMPlan(GLMConfig(nsd_root={str(nsd)!r}, output=out, chunk_voxels=64, store=StoreConfig({str(tmp_path / "s")!r}))))
assert ray.cluster_resources()["CPU"] == 1
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=CHECKOUT, env=os.environ | {"PYTHONPATH": str(CHECKOUT)})
    there = NSDLayout(tmp_path / "out")
    for session in (1, 2):
        assert there.session_file(1, session).read_bytes() == plan.layout.session_file(1, session).read_bytes()
    assert there.stimuli.exists() and there.expdesign.exists() and there.roi(1, "nsdgeneral").exists()


def test_killed_again_and_again_it_ends_with_the_same_bytes(plan, nsd, tmp_path):
    out, store = tmp_path / "out", tmp_path / "store"
    command = [sys.executable, "jobs/estimate_betas.py", "--nsd-root", str(nsd), "--output", str(out), "--chunk-voxels", "64",
               "--store.root", str(store)]  # fmt: skip
    options = dict(cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    options["env"] = os.environ | {"PYTHONPATH": str(CHECKOUT)}
    betas = f"nsddata_betas/ppdata/subj01/func1pt8mm/{DECODED}"
    signs = (store, "glm/series-*/*/*/run=*"), (store, "glm/betas-*/*/*/chunk=*"), (out, f"{betas}/betas_session01.hdf5")
    for folder, sign in signs:
        process = subprocess.Popen(command, start_new_session=True, **options)
        deadline = time.monotonic() + 120
        while not list(folder.glob(sign)) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert process.poll() is None, f"ended before {sign} appeared: {process.communicate()[0]}"
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    done = subprocess.run(command, check=False, timeout=300, **options)
    assert done.returncode == 0, done.stdout
    assert f"next: python jobs/train_all_subjects.py mini --data.subjects 1 --data.nsd-root {out}" in done.stdout
    there = NSDLayout(out)
    for session in (1, 2):
        assert there.session_file(1, session).read_bytes() == plan.layout.session_file(1, session).read_bytes()
    assert not list(out.rglob("*.partial"))


def run_job(command: list[str]) -> str:
    options = dict(cwd=CHECKOUT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=500)
    done = subprocess.run([sys.executable, *command], env=os.environ | {"PYTHONPATH": str(CHECKOUT)}, **options)
    assert done.returncode == 0, done.stdout
    return done.stdout


def pictures_from(command: list[str], root: Path) -> dict[str, float]:
    """Estimate betas, then do what the job prints, with fewer layers; the pictures' pixel correlation, and that by chance."""
    (following,) = [line for line in run_job(command).splitlines() if line.startswith("next: ")]
    _, python, *arguments = shlex.split(following)
    assert python == "python" and arguments[0] == "jobs/train_all_subjects.py"
    run_job([*arguments, *SMALL])
    (scores,) = root.glob("metrics/ridge-*/subject=01/scores.parquet")
    rows = pq.read_table(scores, partitioning=None).to_pylist()
    of_pictures = [row for row in rows if (row["stage"], row["metric"]) == ("stage2", "mini/pixcorr")]
    pairings = {row["pairing"] for row in of_pictures}
    found = {one: float(np.mean([row["value"] for row in of_pictures if row["pairing"] == one])) for one in pairings}
    print(found)
    return found


@pytest.mark.slow
def test_from_simulated_bold_to_pictures(tmp_path):
    simulation = "--simulation.n-train 96 --simulation.n-test 12 --simulation.n-sessions 3".split()
    found = pictures_from(["jobs/estimate_betas.py", "--subjects", "1", *simulation, "--store.root", str(tmp_path)], tmp_path)
    assert found["matched"] > found["chance"] + 0.1


@pytest.mark.slow
def test_from_bids_to_pictures(bids, tmp_path):
    shutil.rmtree(bids / "sub-02")
    root, out = tmp_path / "root", tmp_path / "out"
    where = ["--bids.root", str(bids), "--bids.mask", f"{bids}/masks/sub-{{participant}}.nii.gz", "--bids.n-test-images", "12"]
    command = ["jobs/estimate_betas.py", *where, "--output", str(out), "--store.root", str(root)]
    found = pictures_from(command, root)
    assert found["matched"] > found["chance"] + 0.1


def test_files_that_are_not_ours_are_not_overwritten(nsd):
    with pytest.raises(ValueError, match="session01.hdf5 is there, but nsdray did not make it .* Give another --beta-version"):
        GLMPlan(GLMConfig(nsd_root=str(nsd), beta_version=DECODED)).missing()


def test_what_to_type_next(nsd, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(CHECKOUT / "jobs"))
    job = importlib.import_module("estimate_betas")
    simulation = SimulationConfig(n_train=12, n_test=6, n_sessions=3, with_bold=True)
    config = GLMConfig(subjects=(1,), beta_type="C", simulation=simulation, store=StoreConfig(str(tmp_path)))
    plan = GLMPlan(config)
    assert job.next_command(plan)[1:] == (
        "jobs/train_all_subjects.py mini --data.subjects 1 --simulation.n-train 12 --simulation.n-test 6 "
        f"--simulation.n-sessions 3 --simulation.with-bold --store.root {tmp_path} "
        "--data.beta-version betas_fithrf_GLMdenoise_nsdray"
    ).split()
    arguments = tyro.cli(Config, args=job.next_command(plan)[3:])
    assert Plan(arguments).layout.betas_path(1) == plan.layout.betas_path(1)
    assert "not enough to decode from: " in job.not_yet(plan)
    plan.layout.betas_path(1).mkdir()
    for session in (1, 2):
        plan.layout.session_file(1, session).touch()
    reason = r"needs sessions 1..3, but .* holds no file of sessions \[3\] .*or estimate them: this job without --sessions"
    assert re.search(reason, job.not_yet(plan))
    plan.layout.session_file(1, 3).touch()
    assert job.not_yet(plan) is None
    given = GLMPlan(GLMConfig(nsd_root=str(nsd), output=str(tmp_path / "out")))
    assert job.next_command(given)[3:] == ["--data.subjects", "1", "--data.nsd-root", str(tmp_path / "out")]


def lab_config(root: Path, tmp_path: Path, **changes) -> GLMConfig:
    settings = BIDSConfig(
        root=str(root),
        mask=f"{root}/masks/sub-{{participant}}.nii.gz",
        test_images=str(root / "test_images.txt"),
        captions=str(root / "captions.json"),
    )
    settings, store = replace(settings, **changes.pop("bids", {})), StoreConfig(str(tmp_path / "store"))
    return GLMConfig(bids=settings, output=str(tmp_path / "out"), store=store, **changes)


def test_a_lab_s_bids_data_become_a_readable_nsd_folder(bids, scanned, tmp_path, cluster):
    for label in ("01", "02"):
        shutil.rmtree(bids / f"sub-{label}/ses-3")
    shown = {name for path in bids.rglob("*_events.tsv") for name in path.read_text().split() if name.endswith(".png")}
    test = (bids / "test_images.txt").read_text().split()
    (bids / "test_images.txt").write_text("\n".join(name for name in test if name in shown))
    plan = GLMPlan(lab_config(bids, tmp_path))
    estimate_betas(plan)
    assert GLMPlan(plan.config).missing() == []
    data = DataConfig(nsd_root=str(tmp_path / "out"), subjects=(1, 2))
    decoding = Plan(Config(data=data, store=StoreConfig(str(tmp_path / "run"))))
    prepare_betas(decoding)
    names = json.loads((tmp_path / "out/experiment.json").read_text())["pictures"]
    for subject in decoding.subjects:
        sessions = nsd_sessions(scanned, subject.subject)[:2]
        expected = [image_id for session in sessions for run in session.runs for image_id in run.events.condition]
        assert [int(names[i][7:11]) for i in subject.trials.image_id] == expected
        assert len(subject.image_ids("test")) == len([name for name in test if name in shown])
        np.testing.assert_array_equal(subject.voxels.index, load_voxels(scanned, subject.subject).index)
        simulated = [scanned.session_betas(subject.subject, session) for session in (1, 2)]
        on_disk, betas = (
            np.concatenate([read_session(path, subject.voxels) for path in paths]).T.astype(float)
            for paths in (simulated, subject.sessions.values())
        )
        agreement = [np.corrcoef(a, b)[0, 1] for a, b in zip(betas, on_disk)]
        assert np.median(agreement) > 0.3  # the same images, and little of the noise: see simulate_bold.py
        assert len(subject.targets_wanted("train", "clip_text")) > 0  # captions are there


def test_without_repeats_in_a_session_type_b_is_written_and_said(bids, tmp_path, cluster, capsys):
    """Every picture once a session; then sessions fitted together have repeats."""
    shutil.rmtree(bids / "sub-02")
    shutil.rmtree(bids / "sub-01/ses-3")
    for session in (1, 2):
        seen = iter(range(10_000))
        for path in sorted((bids / f"sub-01/ses-{session}/func").glob("*_events.tsv")):
            header, *rows = path.read_text().splitlines()
            pictures = sorted((bids / "stimuli/scenes").iterdir())
            rows = [row for row in rows if "n/a" not in row]
            rows = ["\t".join([*row.split("\t")[:3], f"scenes/{pictures[next(seen)].name}"]) for row in rows]
            path.write_text("\n".join([header, *rows]) + "\n")
    config = lab_config(bids, tmp_path, bids={"test_images": None, "n_test_images": 5, "captions": None})
    plan = GLMPlan(config)
    estimate_betas(plan)
    output = "".join(capsys.readouterr())
    assert "subject 1, session 1: none of the 108 conditions occurs in more than one of 12 runs" in output
    assert "subject 1, session 2: type B" in output
    record = json.loads(plan.layout.session_record(1, 2).read_text())
    assert record["beta_type"] == "B" and "type D cannot be cross-validated" in record["warnings"][0]
    together = GLMPlan(replace(config, sessions_together=True))
    assert [group.name for group in together.missing()] == ["subject 1, 2 sessions"]
    estimate_betas(together)
    index = voxels_with_data(together.groups[0].runs)
    runs = together.groups[0].runs
    data = [read_series(run.path, index) for run in runs]
    found = fit_glm([run.events for run in runs], data, 3.0, 4 / 3, sessions=[1] * 12 + [2] * 12)
    assert found.beta_type == "D"
    betas = np.concatenate([stored(together.layout.session_file(1, session), index) for session in (1, 2)])
    expected = to_stored(found.betas)[0]
    assert (np.abs(betas.astype(int) - expected).max(axis=0) <= 1).mean() > 0.99


def test_bad_voxels_are_counted_and_stored_as_0(bids, tmp_path, cluster, capsys):
    shutil.rmtree(bids / "sub-02")
    for session in (2, 3):
        shutil.rmtree(bids / f"sub-01/ses-{session}")
    paths = sorted((bids / "sub-01/ses-1/func").glob("*_bold.nii.gz"))
    mask = np.flatnonzero(np.asarray(nib.load(bids / "masks/sub-01.nii.gz").dataobj).ravel())
    for number, path in enumerate(paths):
        image = nib.load(path)
        values = np.ascontiguousarray(image.dataobj, np.float32)
        flat = values.reshape(-1, values.shape[-1])
        flat[mask[0]] = 7
        if number == 3:
            flat[mask[1], 5] = np.nan
        header = image.header.copy()
        header.set_data_dtype(np.float32)
        nib.save(nib.Nifti1Image(values, image.affine, header), path)
    (bids / "sub-01/ses-1/func/sub-01_ses-1_task-look_run-2_events.tsv").unlink()
    plan = GLMPlan(lab_config(bids, tmp_path, beta_type="B", bids={"test_images": None, "n_test_images": 5, "captions": None}))
    estimate_betas(plan)
    output = "".join(capsys.readouterr())
    assert "(1 constant, 1 with NaN or infinity)" in output
    assert "left out of session 1: sub-01_ses-1_task-look_run-2_bold.nii.gz (no events.tsv)" in output
    betas = stored(plan.layout.session_file(1, 1), mask)
    assert not betas[:, :2].any() and (betas[:, 2:].std(axis=0) > 0).all()


def test_what_must_be_said_or_cannot_be(bids, nsd, tmp_path):
    for settings, message in [
        (dict(bids={"test_images": None}), "which images are test images must be said"),
        (dict(bids={"n_test_images": 5}), "which images are test images must be said"),
        (dict(bids={"mask": None}), "which voxels to decode from must be said"),
        (dict(nsd_root=str(nsd)), "both nsd_root .* and bids.root .* are given"),
        (dict(subjects=(1,)), "subjects are NSD's; choose from a BIDS data set by --bids.participants"),
        (dict(bids={"participants": ("04",)}), r"bids.participants names \['04'\], but .* has \['01', '02'\]"),
        (dict(tr=1333.0), "subject 1, session 1: tr is 1333: .*if these are milliseconds, give 1.333"),
        (dict(stimulus_duration=3000.0), "stimulus_duration is 3000 s, longer than run 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            GLMPlan(lab_config(bids, tmp_path, **settings))
    with pytest.raises(ValueError, match="where to write a BIDS data set must be said: give --output"):
        GLMConfig(bids=BIDSConfig(root=str(bids), mask="m", n_test_images=3))
    with pytest.raises(ValueError, match="output is x, but betas of the miniature NSD are written into it"):
        GLMConfig(output="x")
    with pytest.raises(ValueError, match="subject 1, session 1: max_regressors is 99; run 0 has"):
        GLMPlan(lab_config(bids, tmp_path, max_regressors=99))
    with pytest.raises(ValueError, match="tr is known for NSD"):
        GLMConfig(tr=2.0)
    with pytest.raises(ValueError, match="simulation.with_bold is off"):
        GLMPlan(replace(GLMConfig(store=StoreConfig(str(tmp_path))), simulation=Config().simulation))
    with pytest.raises(FileNotFoundError, match="holds no time series"):
        GLMPlan(GLMConfig(nsd_root=str(tmp_path)))
    events = next(bids.glob("sub-01/ses-2/func/*run-5_events.tsv"))
    events.write_text(events.read_text() + "999\t3.0\tpicture\tscenes/0001.png\n")
    with pytest.raises(ValueError, match="subject 1, session 2: run 4: 1 of 10 events are outside the run"):
        GLMPlan(lab_config(bids, tmp_path))
