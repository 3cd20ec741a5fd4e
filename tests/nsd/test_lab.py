"""NSD's layout around a lab's experiment, read back by what reads NSD."""
from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from nsdray.nsd import lab
from nsdray.nsd.bids import bids_sessions
from nsdray.nsd.captions import load_captions
from nsdray.nsd.design import trials
from nsdray.nsd.layout import NSDLayout
from nsdray.nsd.rois import load_voxels
from nsdray.nsd.stimuli import Stimuli

LABELS = {"01": 1, "02": 2}


def written(bids: Path, output: Path, n_sessions: int = 3, **options) -> tuple[NSDLayout, dict[str, int]]:
    output.mkdir(exist_ok=True)
    layout = NSDLayout(output)
    sessions = {number: bids_sessions(bids, label, number)[:n_sessions] for label, number in LABELS.items()}
    test = options.pop("test_images", lab.read_test_images(bids / "test_images.txt"))
    if n_sessions < 3:
        shown = {name for one in sessions.values() for session in one for run in session.runs for name in run.events.condition}
        test = [name for name in test if name in shown]
    if "captions" not in options:
        options["captions"] = lab.read_captions(bids / "captions.json")
    return layout, lab.write_experiment(layout, LABELS, sessions, test, bids / "stimuli", progress=False, **options)


def test_what_reads_nsd_reads_it(bids, scanned, tmp_path):
    layout, image_id = written(bids, tmp_path / "out")
    sessions = bids_sessions(bids, "02", 2)
    counts = {session.session: sum(len(run.events.onset) for run in session.runs) for session in sessions}
    found, theirs = trials(layout, 2, [1, 2, 3], counts), trials(scanned, 2, [1, 2, 3], counts)
    names = sorted(image_id, key=image_id.get)
    assert names == sorted(names)  # so that the n-th picture in the order of names is image n
    assert [int(names[i][7:11]) for i in found.image_id] == theirs.image_id.tolist()
    np.testing.assert_array_equal(found.is_test, theirs.is_test)
    np.testing.assert_array_equal(found.repeat, theirs.repeat)
    wanted = [0, 7, 3]
    with Stimuli(layout.stimuli) as ours, Stimuli(scanned.stimuli) as original:
        assert ours.n_images == len(names) and ours.shape == (64, 64)
        np.testing.assert_array_equal(ours.read(wanted), original.read([int(names[i][7:11]) for i in wanted]))
    assert load_captions(layout, wanted) == load_captions(scanned, [int(names[i][7:11]) for i in wanted])
    assert json.loads(layout.captions("val2017").read_text())["annotations"] == []  # what checks NSD's files wants both
    run = sessions[0].runs[0]
    lab.write_mask(layout, 2, bids / "masks/sub-02.nii.gz", run.path, run.shape)
    layout.betas_path(2).mkdir(parents=True)
    np.testing.assert_array_equal(load_voxels(layout, 2).index, load_voxels(scanned, 2).index)


def test_later_sessions_are_added_and_nothing_else_changes(bids, tmp_path):
    layout, first = written(bids, tmp_path / "out", 2)
    counts = {1: 108, 2: 108, 3: 108}
    before = trials(layout, 1, [1, 2], counts)
    with Stimuli(layout.stimuli) as stimuli:
        pictures = stimuli.read(range(stimuli.n_images))
    layout, second = written(bids, tmp_path / "out", 3)
    assert first.items() <= second.items() and len(second) > len(first)
    np.testing.assert_array_equal(trials(layout, 1, [1, 2], counts).image_id, before.image_id)
    with Stimuli(layout.stimuli) as stimuli:
        np.testing.assert_array_equal(stimuli.read(range(len(pictures))), pictures)
        name = max(second, key=second.get)
        np.testing.assert_array_equal(stimuli.read([second[name]])[0], np.asarray(Image.open(bids / "stimuli" / name)))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    written(bids, tmp_path / "out", 3)
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_what_would_give_results_to_other_pictures_is_refused(bids, tmp_path):
    layout, image_id = written(bids, tmp_path / "out")
    names = sorted(image_id)
    with pytest.raises(ValueError, match="another version of this experiment: the test images differ.* Take another --output"):
        written(bids, tmp_path / "out", test_images=names[:9])
    with pytest.raises(ValueError, match=r"the captions \(there, but not given now by --bids.captions\) differ"):
        written(bids, tmp_path / "out", captions=None)
    with pytest.raises(ValueError, match=r"picture_size \(64 there\) differ"):
        written(bids, tmp_path / "out", picture_size=32)
    path = next(bids.glob("sub-01/ses-1/func/*run-1_events.tsv"))
    rows = path.read_text().splitlines()
    onsets = [row.split("\t")[0] for row in rows]
    rows[1], rows[3] = (row.replace(a, b) for row, a, b in ((rows[1], onsets[1], onsets[3]), (rows[3], onsets[3], onsets[1])))
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="what an earlier session showed differ"):
        written(bids, tmp_path / "out")


def test_an_interrupted_start_goes_on(bids, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lab, "_write_design", broken)
        with pytest.raises(KeyboardInterrupt):
            written(bids, tmp_path / "out")
    layout, _ = written(bids, tmp_path / "out")
    assert layout.expdesign.exists() and lab.read_record(layout.root)["finished"]


def test_pictures_are_cut_square_and_resized(bids, tmp_path):
    for path in (bids / "stimuli/scenes").iterdir():
        wide = Image.new("RGB", (64, 48), "red")
        wide.paste(Image.open(path).resize((48, 48)), (8, 0))
        wide.save(path)
    layout, image_id = written(bids, tmp_path / "out")
    with Stimuli(layout.stimuli) as stimuli:
        assert stimuli.shape == (48, 48)
        name = next(iter(image_id))
        expected = np.asarray(Image.open(bids / "stimuli" / name))[:, 8:56]
        np.testing.assert_array_equal(stimuli.read([image_id[name]])[0], expected)
    layout, _ = written(bids, tmp_path / "small", picture_size=16, captions=None)
    with Stimuli(layout.stimuli) as stimuli:
        assert stimuli.shape == (16, 16)
    with pytest.raises(FileNotFoundError, match="no captions"):
        load_captions(layout, [0])


def test_the_split_is_stated(bids, tmp_path):
    sessions = {number: bids_sessions(bids, label, number) for label, number in LABELS.items()}
    drawn = lab.draw_test_images(sessions, 9, seed=0)
    shared = set(lab.read_test_images(bids / "test_images.txt"))
    assert len(drawn) == 9 and set(drawn) <= shared  # only these were seen by both
    assert drawn == lab.draw_test_images(sessions, 9, seed=0) != lab.draw_test_images(sessions, 9, seed=1)
    alone = lab.draw_test_images({1: sessions[1]}, 30, seed=0)
    assert len(alone) == 30 and not set(alone) <= shared
    with pytest.raises(ValueError, match="13 test images of 204 pictures, of which 12 were seen by all 2 participants"):
        lab.draw_test_images(sessions, 13, seed=0)
    with pytest.raises(ValueError, match="1 test images were never shown, first 'x.png'"):
        written(bids, tmp_path / "out", test_images=["x.png"])
    with pytest.raises(ValueError, match="0 test images of 204 pictures; there must be some of both"):
        written(bids, tmp_path / "out", test_images=[])
    with pytest.raises(FileNotFoundError, match="no list of test images"):
        lab.read_test_images(tmp_path / "none.txt")


@pytest.mark.parametrize("absolute", [False, True])
def test_no_picture_is_taken_from_outside_of_its_folder(bids, tmp_path, absolute):
    secret = bids / "stimuli/../secret.png"
    Image.new("RGB", (64, 64)).save(secret)
    name = str(bids / "secret.png") if absolute else "../secret.png"
    path = next(bids.glob("sub-01/ses-1/func/*run-1_events.tsv"))
    rows = path.read_text().splitlines()
    rows[1] = "\t".join([*rows[1].split("\t")[:-1], name])
    path.write_text("\n".join(rows) + "\n")
    with pytest.raises(ValueError, match="secret.png' in events.tsv leads out of .*stimuli; it must be relative"):
        written(bids, tmp_path / "out", captions=None, picture_size=16)


def test_missing_or_wrong_files(bids, tmp_path):
    run = bids_sessions(bids, "01", 1)[0].runs[0]
    mask, captions = bids / "masks/sub-01.nii.gz", bids / "captions.json"
    layout, _ = written(bids, tmp_path / "out")

    def write_mask(values, affine=None):
        nib.save(nib.Nifti1Image(values.astype(np.uint8), np.eye(4) if affine is None else affine), mask)
        lab.write_mask(layout, 1, mask, run.path, run.shape)

    with pytest.raises(ValueError, match=r"has the grid \(5, 5, 5\) .* resample the mask to the runs"):
        write_mask(np.ones((5, 5, 5)))
    with pytest.raises(ValueError, match="resample the mask to the runs"):
        write_mask(np.ones(run.shape[:3]), np.diag([1.1, 1, 1, 1]))
    with pytest.raises(ValueError, match="has no voxel above 0"):
        write_mask(np.zeros(run.shape[:3]))
    with pytest.raises(FileNotFoundError, match="no mask .* for subject 1; --bids.mask names"):
        lab.write_mask(layout, 1, bids / "none.nii.gz", run.path, run.shape)
    texts = json.loads(captions.read_text())
    del texts[sorted(texts)[3]]
    captions.write_text(json.dumps(texts))
    with pytest.raises(ValueError, match="1 of 204 pictures have no caption, first 'scenes/"):
        written(bids, tmp_path / "a")
    for text, message in [("{", "is no JSON"), ("[]", "must hold an object"), ('{"a.png": "a text"}', "must hold an object")]:
        captions.write_text(text)
        with pytest.raises(ValueError, match=message):
            lab.read_captions(captions)
    with pytest.raises(FileNotFoundError, match="no captions"):
        lab.read_captions(bids / "none.json")
    picture = next((bids / "stimuli/scenes").iterdir())
    picture.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="is no picture"):
        written(bids, tmp_path / "b", captions=None)
    picture.unlink()
    with pytest.raises(FileNotFoundError, match="no picture .* which events.tsv names; .* by --bids.stimuli"):
        written(bids, tmp_path / "c", captions=None)
    with pytest.raises(ValueError, match="is not empty and no data set of nsdray's"):
        lab.read_record(bids)
