"""Where NSD keeps its files: every path and file name that nsdray knows is in this module.

The layout is that of NSD's bucket, ``s3://natural-scenes-dataset``; only the COCO captions come from elsewhere.
Subjects are ints 1..8 here and everywhere; "subj01" occurs in paths only.
"""
from __future__ import annotations

import re
from pathlib import Path

N_SUBJECTS = 8
SESSION_SUFFIXES = (".hdf5", ".nii.gz")  # the first one found is read
CAPTION_SPLITS = ("train2017", "val2017")


def check_subject(subject: int) -> None:
    """ValueError unless subject is one of NSD's eight."""
    if subject not in range(1, N_SUBJECTS + 1):
        raise ValueError(f"subject is {subject!r}; NSD's subjects are the integers 1 to {N_SUBJECTS}")


class NSDLayout:
    """Paths of one copy of NSD, on disk or a mount.

    root: the folder that holds ``nsddata``, ``nsddata_betas`` and ``nsddata_stimuli``.
    beta_version: folder name of NSD's beta preparation; the default is "b3".
    resolution: folder name of the functional space, for betas and ROIs alike.
    """

    def __init__(
        self, root: Path | str, beta_version: str = "betas_fithrf_GLMdenoise_RR", resolution: str = "func1pt8mm"
    ):
        self.root = Path(root)
        self.beta_version = beta_version
        self.resolution = resolution
        if not self.root.is_dir():
            raise FileNotFoundError(
                f"{self.root} is no folder. An NSD root holds nsddata/, nsddata_betas/ and nsddata_stimuli/. Give the "
                "folder that you downloaded NSD to, or write a miniature one by nsdray.nsd.simulate.simulate_nsd"
            )

    @property
    def expdesign(self) -> Path:
        """Experimental design, .mat."""
        return self.root / "nsddata/experiments/nsd/nsd_expdesign.mat"

    @property
    def stim_info(self) -> Path:
        """Table of all stimuli, .csv: one row an image, in the order of image_id."""
        return self.root / "nsddata/experiments/nsd/nsd_stim_info_merged.csv"

    @property
    def stimuli(self) -> Path:
        """All pictures, .hdf5."""
        return self.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"

    def captions(self, split: str) -> Path:
        """COCO captions of a split, "train2017" or "val2017", .json.

        Canonically in nsddata_stimuli/annotations; annotations/ at the root, where COCO's archive unpacks, is taken
        when only that exists.
        """
        if split not in CAPTION_SPLITS:
            raise ValueError(f"COCO split is {split!r}; NSD's pictures come from {' and '.join(CAPTION_SPLITS)}")
        canonical = self.root / f"nsddata_stimuli/annotations/captions_{split}.json"
        unpacked = self.root / "annotations" / canonical.name
        return unpacked if unpacked.exists() and not canonical.exists() else canonical

    def betas_folder(self, subject: int) -> Path:
        """Folder of the subject's sessions; FileNotFoundError lists the subjects that there are."""
        check_subject(subject)
        folder = self.betas_path(subject)
        if not folder.is_dir():
            raise FileNotFoundError(
                f"no betas of subject {subject}: {folder} does not exist. Subjects there: {self.subjects()}. "
                "Download that folder, or ask for one of these"
            )
        return folder

    def betas_path(self, subject: int) -> Path:
        """Where that folder is, or would be."""
        return self.root / f"nsddata_betas/ppdata/subj{subject:02d}" / self.resolution / self.beta_version

    def subjects(self) -> list[int]:
        """Subjects that have a folder of betas, ascending."""
        return [s for s in range(1, N_SUBJECTS + 1) if self.betas_path(s).is_dir()]

    def responses(self, subject: int) -> Path:
        """Behaviour, one row a trial, .tsv; it says which sessions the subject did."""
        check_subject(subject)
        return self.root / f"nsddata/ppdata/subj{subject:02d}/behav/responses.tsv"

    def timeseries_path(self, subject: int) -> Path:
        """Folder that holds the subject's BOLD runs, in timeseries, and what was shown in them, in design."""
        check_subject(subject)
        return self.root / f"nsddata_timeseries/ppdata/subj{subject:02d}" / self.resolution

    def roi_folder(self, subject: int) -> Path:
        """Folder of the subject's ROI volumes."""
        check_subject(subject)
        return self.root / f"nsddata/ppdata/subj{subject:02d}" / self.resolution / "roi"

    def roi(self, subject: int, name: str) -> Path:
        """Volume of a mask or atlas such as "nsdgeneral" or "prf-visualrois"."""
        return self.roi_folder(subject) / f"{name}.nii.gz"

    def ncsnr(self, subject: int) -> Path:
        """Volume of noise-ceiling signal-to-noise ratios, beside the betas that they were computed from."""
        return self.betas_folder(subject) / "ncsnr.nii.gz"

    def session_betas(self, subject: int, session: int) -> Path:
        """The session's betas: the HDF5 file where there is one, else the NIfTI file."""
        stem = self.betas_folder(subject) / f"betas_session{session:02d}"
        candidates = [stem.with_name(stem.name + suffix) for suffix in SESSION_SUFFIXES]
        for path in candidates:
            if path.exists():
                return path
        raise FileNotFoundError(
            f"no betas of subject {subject}, session {session}: neither {candidates[0]} nor {candidates[1].name} "
            f"exists. Sessions there: {sorted(self.session_files(subject))}. Download one of the two"
        )

    def session_file(self, subject: int, session: int) -> Path:
        """Where the session's betas are written: HDF5, in the folder of `beta_version`."""
        check_subject(subject)
        return self.betas_path(subject) / f"betas_session{session:02d}.hdf5"

    def session_map(self, subject: int, session: int, name: str) -> Path:
        """Volume of a number per voxel that goes with the session's betas, such as "R2" or "HRFindex"."""
        return self.betas_path(subject) / f"{name}_session{session:02d}.nii.gz"

    def session_record(self, subject: int, session: int) -> Path:
        """How nsdray estimated the session's betas, .json."""
        return self.betas_path(subject) / f"glm_session{session:02d}.json"

    def timeseries_folder(self, subject: int) -> Path:
        """Folder of the subject's runs of BOLD."""
        check_subject(subject)
        return self.root / f"nsddata_timeseries/ppdata/subj{subject:02d}" / self.resolution / "timeseries"

    def timeseries(self, subject: int, session: int, run: int) -> Path:
        """A run of BOLD, (X, Y, Z, n_timepoints)."""
        return self.timeseries_folder(subject) / f"timeseries_session{session:02d}_run{run:02d}.nii.gz"

    def run_design(self, subject: int, session: int, run: int) -> Path:
        """What was shown in a run, .tsv: a line per volume."""
        return self.timeseries_folder(subject).with_name("design") / f"design_session{session:02d}_run{run:02d}.tsv"

    def timeseries_files(self, subject: int) -> dict[int, dict[int, Path]]:
        """Runs of BOLD on disk, by session and run, both ascending."""
        return _by_session_and_run(self.timeseries_folder(subject), r"timeseries_session(\d\d)_run(\d\d)\.nii\.gz")

    def design_files(self, subject: int) -> dict[int, dict[int, Path]]:
        """Designs on disk, by session and run, both ascending."""
        return _by_session_and_run(self.timeseries_folder(subject).with_name("design"), r"design_session(\d\d)_run(\d\d)\.tsv")

    def session_files(self, subject: int) -> dict[int, Path]:
        """Sessions on disk, ascending, with the file that `session_betas` gives for each."""
        pattern = re.compile(r"betas_session(\d\d)\.(hdf5|nii\.gz)")
        matches = (pattern.fullmatch(path.name) for path in self.betas_folder(subject).iterdir())
        sessions = sorted({int(match[1]) for match in matches if match})
        return {session: self.session_betas(subject, session) for session in sessions}


def _by_session_and_run(folder: Path, pattern: str) -> dict[int, dict[int, Path]]:
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if match := re.fullmatch(pattern, path.name):
            found.setdefault(int(match[1]), {})[int(match[2])] = path
    return found
