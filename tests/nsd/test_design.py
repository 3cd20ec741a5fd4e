from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy.io import loadmat, savemat

from nsdray.nsd.design import planned_trials, protocol_sessions, shared_images, trials

COUNTS = {1: 18, 2: 18, 3: 18}


def _forge_sessions(layout, subject: int, sessions) -> None:
    """Leave empty files of just these sessions."""
    folder = layout.betas_folder(subject)
    for path in folder.glob("betas_session*"):
        path.unlink()
    for session in sessions:
        (folder / f"betas_session{session:02d}.nii.gz").touch()


def test_nsd37_is_sessions_1_to_37(mini_copy):
    _forge_sessions(mini_copy, 1, range(1, 41))
    assert protocol_sessions(mini_copy, 1, "nsd37") == list(range(1, 38))
    _forge_sessions(mini_copy, 1, range(1, 37))
    with pytest.raises(FileNotFoundError, match=r"no file of sessions \[37\] \(it has 36\).*take protocol nsd40"):
        protocol_sessions(mini_copy, 1, "nsd37")


def test_nsd40_takes_the_sessions_of_responses(mini_copy):
    assert protocol_sessions(mini_copy, 1, "nsd40") == [1, 2, 3]
    _forge_sessions(mini_copy, 1, [1, 2, 3, 4])
    with pytest.warns(UserWarning, match=r"sessions \[4\] of subject 1 are left out"):
        assert protocol_sessions(mini_copy, 1, "nsd40") == [1, 2, 3]
    _forge_sessions(mini_copy, 1, [1, 3])
    with pytest.raises(FileNotFoundError, match=r"responses.tsv needs sessions 1..3, .*no file of sessions \[2\]"):
        protocol_sessions(mini_copy, 1, "nsd40")


def test_nsd40_without_responses_takes_consecutive_files(mini_copy):
    mini_copy.responses(1).unlink()
    _forge_sessions(mini_copy, 1, [1, 2, 3, 4])
    assert protocol_sessions(mini_copy, 1, "nsd40") == [1, 2, 3, 4]
    _forge_sessions(mini_copy, 1, [1, 2, 4])
    with pytest.raises(ValueError, match=r"sessions \[3\] are missing from 1..4"):
        protocol_sessions(mini_copy, 1, "nsd40")
    _forge_sessions(mini_copy, 1, [])
    with pytest.raises(FileNotFoundError, match="holds no session"):
        protocol_sessions(mini_copy, 1, "nsd40")


def test_bad_protocol_and_responses(mini_copy):
    with pytest.raises(ValueError, match="unknown protocol 'nsd41'; known: nsd37, nsd40"):
        protocol_sessions(mini_copy, 1, "nsd41")
    mini_copy.responses(1).write_text("RUN\tTRIAL\n")
    with pytest.raises(ValueError, match="has no column SESSION"):
        protocol_sessions(mini_copy, 1, "nsd40")
    mini_copy.responses(1).write_text("SESSION\tTRIAL\n")
    with pytest.raises(ValueError, match="has no rows"):
        protocol_sessions(mini_copy, 1, "nsd40")


@pytest.mark.parametrize("subject", [1, 5])
def test_trials_equal_a_plain_loop(mini, subject):
    design = loadmat(mini.expdesign)
    found = trials(mini, subject, [2, 3], COUNTS)
    seen, row = {}, 0
    for trial, column in enumerate(design["masterordering"][0]):
        image_id = int(design["subjectim"][subject - 1, int(column) - 1]) - 1
        if trial >= 18:
            assert found.trial[row] == trial and found.image_id[row] == image_id
            assert found.session[row] == trial // 18 + 1
            assert found.repeat[row] == seen.get(image_id, 0)  # session 1 counts
            assert found.is_test[row] == (image_id + 1 in design["sharedix"])
            row += 1
        seen[image_id] = seen.get(image_id, 0) + 1
    assert row == len(found.trial) == 36
    np.testing.assert_array_equal(shared_images(mini) + 1, design["sharedix"].ravel())
    assert [getattr(found, name).dtype.str[1:] for name in ("trial", "session", "image_id", "repeat", "is_test")] == [
        "i4", "i2", "i4", "i2", "b1"]  # fmt: skip


def test_trials_agree_with_responses(mini):
    with open(mini.responses(5), newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    found = trials(mini, 5, [1, 2, 3], COUNTS)
    assert [int(row["73KID"]) - 1 for row in rows] == found.image_id.tolist()
    assert [int(row["SESSION"]) for row in rows] == found.session.tolist()


def test_unequal_sessions_shift_the_offset(mini):
    whole, part = trials(mini, 1, [1, 2, 3], COUNTS), trials(mini, 1, [2], {1: 10, 2: 5})
    assert part.trial.tolist() == list(range(10, 15))
    assert part.image_id.tolist() == whole.image_id[10:15].tolist()


def test_shared_images_are_test_for_all_and_the_rest_is_each_subjects_own(mini):
    one, five = trials(mini, 1, [1, 2, 3], COUNTS), trials(mini, 5, [1, 2, 3], COUNTS)
    for found in (one, five):
        assert set(found.repeat) == {0, 1, 2}
        assert not set(found.image_id[found.is_test]) & set(found.image_id[~found.is_test])
    assert set(one.image_id[one.is_test]) == set(five.image_id[five.is_test])
    assert not set(one.image_id[~one.is_test]) & set(five.image_id[~five.is_test])


def test_bad_designs(mini_copy):
    with pytest.raises(ValueError, match=r"no count for sessions \[2\]; it must cover 1..3"):
        trials(mini_copy, 1, [3], {1: 18, 3: 18})
    with pytest.raises(ValueError, match=r"have 60 trials, but masterordering in .* has 54"):
        trials(mini_copy, 1, [1, 2, 3], {1: 20, 2: 20, 3: 20})
    design = {k: v for k, v in loadmat(mini_copy.expdesign).items() if not k.startswith("__")}

    def write(**changes):
        savemat(mini_copy.expdesign, {k: v for k, v in {**design, **changes}.items() if v is not None})

    write(masterordering=design["masterordering"] + 1)
    with pytest.raises(ValueError, match=r"masterordering in .* ranges over 2..19, but subjectim has columns 1..18"):
        trials(mini_copy, 1, [1], COUNTS)
    write(subjectim=np.zeros((8, 18)))
    with pytest.raises(ValueError, match="holds id 0; ids count from 1"):
        trials(mini_copy, 1, [1], COUNTS)
    write(subjectim=design["subjectim"][:4])
    with pytest.raises(ValueError, match="subject 5 has no row in subjectim of .*, which has 4 rows"):
        trials(mini_copy, 5, [1], COUNTS)
    write(sharedix=None)
    with pytest.raises(ValueError, match=r"lacks \['sharedix'\]"):
        trials(mini_copy, 1, [1], COUNTS)
    mini_copy.expdesign.unlink()
    with pytest.raises(FileNotFoundError, match="no design file"):
        trials(mini_copy, 1, [1], COUNTS)


def test_planned_trials_are_those_of_a_whole_experiment(mini_copy):
    """NSD's own size: 10,000 images a subject, each three times, of which 1,000 are shared."""
    random = np.random.default_rng(0)
    shared = random.permutation(73_000)[:1000] + 1
    images = np.stack([np.concatenate([shared, 1 + random.permutation(73_000)[:9000]]) for _ in range(8)])
    ordering = random.permutation(np.tile(np.arange(1, 10_001), 3))
    savemat(mini_copy.expdesign, {"masterordering": ordering[None], "subjectim": images, "sharedix": shared[None]})
    paper, everything, short = (planned_trials(mini_copy, *which) for which in ((1, "nsd37"), (1, "nsd40"), (4, "nsd40")))
    assert [len(found.trial) for found in (paper, everything, short)] == [27_750, 30_000, 22_500]
    assert len(np.unique(everything.image_id[everything.is_test])) == 1000
    assert set(paper.image_id[paper.is_test]) <= set(shared - 1)
    counts = dict.fromkeys(range(1, 38), 750)
    np.testing.assert_array_equal(paper.image_id, trials(mini_copy, 1, range(1, 38), counts).image_id)
    with pytest.raises(ValueError, match="subject 4 did 30 sessions only; protocol nsd37 needs 37"):
        planned_trials(mini_copy, 4, "nsd37")
