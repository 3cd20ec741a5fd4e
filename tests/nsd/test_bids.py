"""BIDS: what is read from a data set that a test wrote, and what is ambiguous or missing."""
from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest

from nsdray.nsd.bids import bids_sessions, number_participants, participants, read_events
from nsdray.nsd.timeseries import nsd_sessions


def func(root):
    return root / "sub-01/ses-2/func"


def test_it_says_the_same_as_nsd_s_layout(bids, scanned):
    assert participants(bids) == ["01", "02"]
    for ours, theirs in zip(bids_sessions(bids, "01", 1), nsd_sessions(scanned, 1), strict=True):
        assert (ours.session, ours.tr, ours.stimulus_duration) == (theirs.session, 4 / 3, 3.0)
        assert len(ours.runs) == len(theirs.runs) == 12 and ours.left_out == ()
        for a, b in zip(ours.runs, theirs.runs):
            np.testing.assert_allclose(a.events.onset, b.events.onset, atol=1e-3)
            assert [int(name[7:11]) for name in a.events.condition] == b.events.condition
            assert a.shape == b.shape and a.path.read_bytes() == b.path.read_bytes()


def test_preprocessed_runs_in_a_folder_of_their_own(bids, tmp_path):
    plain = bids_sessions(bids, "01", 1)
    derived = tmp_path / "fmriprep"
    for path in sorted(bids.glob("sub-01/*/func/*_bold.nii.gz")):
        for space in ("T1w", "MNI"):
            target = derived / path.relative_to(bids)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.with_name(path.name.replace("_bold", f"_space-{space}_desc-preproc_bold")).symlink_to(path)
    sidecar = derived / "sub-01/ses-1/func/sub-01_ses-1_task-look_run-2_space-T1w_desc-preproc_bold.json"
    sidecar.write_text(json.dumps({"RepetitionTime": 4 / 3, "StartTime": 0.5}))
    with pytest.raises(ValueError, match="a run in 2 versions: .*space-MNI.*space-T1w.*Choose by --bids.space"):
        bids_sessions(bids, "01", 1, derived)
    with pytest.raises(FileNotFoundError, match="with task any, space T2w; there are task-look_space-MNI, task-look_space-T1w"):
        bids_sessions(bids, "01", 1, derived, space="T2w")
    found = bids_sessions(bids, "01", 1, derived, task="look", space="T1w")
    assert all("space-T1w" in run.path.name for session in found for run in session.runs)
    later = [np.subtract(a.events.onset, b.events.onset) for a, b in zip(plain[0].runs, found[0].runs)]
    assert [float(one.max()) for one in later] == [0, 0.5, *[0] * 10] and later[1].min() == pytest.approx(0.5)


def test_runs_are_in_their_numbers_order_and_sessions_may_be_absent(bids):
    flat = bids / "sub-03/func"
    flat.mkdir(parents=True)
    for path in sorted(func(bids).iterdir()):
        (flat / path.name.replace("sub-01_ses-2", "sub-03")).symlink_to(path)
    (session,) = bids_sessions(bids, "03", 3)
    assert [run.path.name.split("run-")[1].split("_")[0] for run in session.runs] == [str(n) for n in range(1, 13)]


def test_runs_that_name_no_picture_are_left_out(bids):
    stem = func(bids) / "sub-01_ses-2_task-look_run-3"
    (func(bids) / "sub-01_ses-2_task-look_run-4_events.tsv").unlink()
    (func(bids) / f"{stem.name}_events.tsv").write_text("onset\tduration\tstim_file\n5\t1\tn/a\n")
    session = bids_sessions(bids, "01", 1)[1]
    assert len(session.runs) == 10
    reasons = "run-3_bold.nii.gz (no stim_file)", "run-4_bold.nii.gz (no events.tsv)"
    assert session.left_out == tuple(f"sub-01_ses-2_task-look_{reason}" for reason in reasons)
    for path in func(bids).glob("*_events.tsv"):
        path.unlink()
    with pytest.raises(ValueError, match="no run of sub-01 ses-2 names a picture.*Expected events.tsv"):
        bids_sessions(bids, "01", 1)


def test_echoes_and_parts_are_versions_of_a_run(bids):
    path = func(bids) / "sub-01_ses-2_task-look_run-3_bold.nii.gz"
    for entity in ("echo", "part"):
        first, second = (path.with_name(path.name.replace("_bold", f"_{entity}-{i}_bold")) for i in (1, 2))
        path.rename(first)
        second.symlink_to(first)
        with pytest.raises(ValueError, match=f"a run in 2 versions: .*{entity}-1_bold.*{entity}-2_bold.* combine echoes before"):
            bids_sessions(bids, "01", 1)
        second.unlink()
        first.rename(path)


def test_runs_are_compared_by_their_numbers(bids):
    expected = bids_sessions(bids, "01", 1)[1]
    for path in sorted(func(bids).glob("*_run-3_events.tsv")):
        path.rename(path.with_name(path.name.replace("run-3", "run-03")))
    found = bids_sessions(bids, "01", 1)[1]
    assert found.runs == expected.runs and found.left_out == ()


def test_repetition_times(bids):
    (bids / "task-look_bold.json").unlink()
    assert bids_sessions(bids, "01", 1)[0].tr == pytest.approx(4 / 3)  # of the headers
    path = func(bids) / "sub-01_ses-2_task-look_run-3_bold.nii.gz"
    image = nib.load(path)
    whole = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, image.header)
    whole.header.set_xyzt_units("mm", "msec")
    whole.header["pixdim"][4] = 4000 / 3
    nib.save(whole, path)
    assert bids_sessions(bids, "01", 1)[1].tr == pytest.approx(4 / 3)
    whole.header["pixdim"][4] = 2000
    nib.save(whole, path)
    with pytest.raises(ValueError, match=r"runs of sub-01 ses-2 differ in their TR: .*run-3_bold.nii.gz': 2.0"):
        bids_sessions(bids, "01", 1)
    assert bids_sessions(bids, "01", 1, tr=1.5)[1].tr == 1.5
    whole.header["pixdim"][4] = 0
    nib.save(whole, path)
    with pytest.raises(ValueError, match="neither a JSON file with RepetitionTime, nor a TR in its header; give --tr"):
        bids_sessions(bids, "01", 1)
    sidecar = bids / "sub-01/ses-2/ses-2_bold.json"
    sidecar.write_text(json.dumps({"RepetitionTime": 4 / 3}))
    assert bids_sessions(bids, "01", 1)[1].tr == pytest.approx(4 / 3)
    sidecar.write_text("{")
    with pytest.raises(ValueError, match="ses-2_bold.json is no JSON object"):
        bids_sessions(bids, "01", 1)


def test_a_header_that_disagrees_is_warned_of(bids):
    (bids / "task-look_bold.json").write_text(json.dumps({"RepetitionTime": 1.5}))
    with pytest.warns(UserWarning, match="RepetitionTime is 1.5 s, but the header says 1.3.* s; the former is used"):
        assert bids_sessions(bids, "01", 1)[0].tr == 1.5


@pytest.mark.parametrize(
    "text, message",
    [
        ("onset\tduration\ttrial_type\n3\t1\tface\n", r"lacks the columns \['stim_file'\]; it has"),
        ("onset\tduration\tstim_file\n3\t1\ta.png\nn/a\t1\tb.png\n", "line 3: onset 'n/a', duration '1'; expected seconds"),
    ],
)
def test_events_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "x_events.tsv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_events(path)


def test_one_duration_is_needed(bids):
    path = func(bids) / "sub-01_ses-2_task-look_run-3_events.tsv"
    text = path.read_text()
    path.write_text(text.replace("\t3.0\t", "\t4.0\t", 1))
    with pytest.raises(ValueError, match="sub-01 ses-2: the trials have durations of 3 to 4 s; .* give --stimulus-duration"):
        bids_sessions(bids, "01", 1)
    assert bids_sessions(bids, "01", 1, stimulus_duration=2.0)[1].stimulus_duration == 2.0


def test_participants_keep_their_numbers():
    assert number_participants(["01", "02", "07"]) == {"01": 1, "02": 2, "07": 7}
    assert number_participants(["ab", "cd"]) == {"ab": 1, "cd": 2}
    assert number_participants(["aa", "ab", "cd"], {"ab": 1, "cd": 2}) == {"ab": 1, "cd": 2, "aa": 3}
    assert number_participants(["05"], {"01": 1}) == {"01": 1, "05": 5}
    assert number_participants(["08", "09"]) == {"08": 1, "09": 2}
    with pytest.raises(ValueError, match="9 participants .*NSD's layout has 8. Choose some by --bids.participants"):
        number_participants([f"p{i}" for i in range(9)])


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder; a BIDS data set holds sub-01"):
        participants(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no sub-"):
        participants(tmp_path)
    (tmp_path / "sub-01/func").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="no runs of sub-01 in .*expected sub-01/"):
        bids_sessions(tmp_path, "01", 1)
