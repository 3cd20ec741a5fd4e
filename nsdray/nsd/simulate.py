"""The miniature NSD: simulated subjects that look at drawn scenes, written in NSD's own layout, file for file.

It shows that the method works and stands in for no figure about NSD. The encoding model, for image i and voxel v:

    beta_v(i, t) = m_v + a_v * z(phi(x_v(i))) + n_v(t)            percent signal change; stored as int16 x 300
    phi(x)       = sign(x) |x|^0.6                                 compressive non-linearity

z standardises over the subject's images. The drive x_v depends on the voxel's area:

- **V1, V2, V3, hV4** see the picture through a Gaussian receptive field g_v with centre c_v and width
  s_v = s_area (0.6 + 1.2 |c_v - centre|), in picture widths. With L, R, B the luminance, red-green and blue-yellow
  pictures,

      x_v = w_0 z(E_v) + w_1 z(<g_v, L>) + w_2 z(<g_v, R>) + w_3 z(<g_v, B>),
      E_v = sqrt(<g_v cos_v, L>^2 + <g_v sin_v, L>^2)              Gabor energy: a quadrature pair of its own
                                                                   orientation and frequency f_v ~ 1 / s_v

  where w is sparse with random signs. In a quarter of the voxels x is rectified to max(x + 0.5, 0).
- **Higher areas** see what the objects o are, not their pixels:

      x_v = sum_o size_o exp(-|c_o - c_v|^2 / (2 0.35^2)) (k_v[kind_o] + h_v[colour_o]) + b_v[background],

  with tuning weights k, h, b that are sparse (Laplace) and scaled by area: places answer most to the background,
  bodies, faces and words to kinds.

Noise is Gaussian with the variance that gives the voxel its noise ceiling: with nc_v drawn around ``noise_ceiling`` and
n repeats averaged, ncsnr_v^2 = nc_v / (n (1 - nc_v)) and sd(noise) = a_v / ncsnr_v. A fifth of the noise variance is
shared between voxels through a few spatially smooth maps, 3 % drifts slowly over a session, the rest is independent.
Voxels outside nsdgeneral hold noise only. Every draw is keyed by the seed and the subject, so subjects do not depend on
each other.
"""
from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from PIL import Image
from scipy.io import savemat
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from nsdray.nsd.betas import SCALE
from nsdray.nsd.layout import CAPTION_SPLITS, N_SUBJECTS, SESSION_SUFFIXES, NSDLayout, check_subject
from nsdray.nsd.rois import ATLASES, LABELS
from nsdray.nsd.scenes import BACKGROUNDS, COLOURS, KINDS, Scene, caption_scene, draw_scene, make_scene
from nsdray.nsd.simulate_bold import TRIAL_NOISE, Bold, write_runs
from nsdray.seeds import rng

VOLUME = (22, 24, 18)
N_VOXELS = {1: 1400, 2: 1250, 3: 1300, 4: 1200, 5: 1150, 6: 1350, 7: 1050, 8: 1100}  # in nsdgeneral, for VOLUME
RUNS_PER_SESSION = 12
RETINA = 32  # pixels at which the visual areas see a picture
EXPONENT = 0.6
RF_WIDTH = {"V1": 0.045, "V2": 0.06, "V3": 0.08, "hV4": 0.11}
SHARED_NOISE, DRIFT_NOISE, N_NOISE_MAPS = 0.2, 0.03, 5

# Shares of nsdgeneral, from the occipital pole forwards; the rest of it has no label
EARLY_SHARES = {"V1": 0.24, "V2": 0.16, "V3": 0.11, "hV4": 0.09}
HIGHER_SHARES = {"floc-bodies": 0.1, "floc-faces": 0.08, "floc-words": 0.06, "floc-places": 0.1}
# How much a higher area answers to (kinds, colours, background)
PREFERENCES = {
    "floc-bodies": (1.0, 0.5, 0.3),
    "floc-faces": (1.0, 0.3, 0.2),
    "floc-words": (1.0, 0.5, 0.2),
    "floc-places": (0.3, 0.2, 1.0),
    "": (0.8, 0.6, 0.6),
}


def simulate_nsd(
    root: Path | str,
    subjects: Sequence[int] = (1, 2, 5, 7),
    n_train: int = 600,
    n_test: int = 60,
    n_sessions: int = 6,
    n_repeats: int = 3,
    picture_size: int = 64,
    volume: tuple[int, int, int] = VOLUME,
    noise_ceiling: float = 0.35,
    betas_format: str = "hdf5",
    seed: int = 0,
    with_bold: bool = False,
    progress: bool = True,
) -> NSDLayout:
    """Write a miniature NSD to root and return its layout; what is there with the same parameters is kept.

    subjects: 1..8; those not yet there are added. n_train: images of each subject alone. n_test: images that all see.
    picture_size: pixels a side. volume: about (X, Y, Z), a little different in each subject. noise_ceiling: median over
    voxels of the fraction of variance that is signal, for the mean of n_repeats repeats. betas_format: "hdf5" or
    "nifti". with_bold: also write runs of BOLD that have these betas (`nsdray.nsd.simulate_bold`).

    Stimuli and design appear at once, then each subject at once: a call that was interrupted is simply repeated.
    ValueError for trials that do not fill the sessions, and for a root that holds anything else.
    """
    root = Path(root)
    for subject in subjects:
        check_subject(subject)
    parameters = dict(
        n_train=n_train, n_test=n_test, n_sessions=n_sessions, n_repeats=n_repeats, picture_size=picture_size,
        volume=list(volume), noise_ceiling=noise_ceiling, betas_format=betas_format, seed=seed,
    ) | ({"with_bold": True} if with_bold else {})  # fmt: skip
    _check(parameters)
    record = root / "simulated.json"
    if record.exists():
        if (found := json.loads(record.read_text())["parameters"]) != parameters:
            differing = {key: (found.get(key), value) for key, value in parameters.items() if found.get(key) != value}
            raise ValueError(
                f"{root} holds a miniature NSD with other parameters (there, asked for): {differing}. Ask for the "
                "same, take another root, or remove this one"
            )
    elif root.exists() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty and no miniature NSD (no {record.name}); take another root")

    design = _Design(**{key: parameters[key] for key in ("n_train", "n_test", "n_repeats", "seed")})
    stage = root.with_name(root.name + ".partial")
    shutil.rmtree(stage, ignore_errors=True)
    if not record.exists():
        _write_experiment(NSDLayout(_made(stage)), design, parameters, progress)
        os.replace(stage, root)
    layout = NSDLayout(root)
    for subject in sorted(set(subjects) - set(layout.subjects())):
        _write_subject(NSDLayout(_made(stage)), subject, design, parameters, progress)
        tops = ("nsddata", "nsddata_timeseries", "nsddata_betas") if with_bold else ("nsddata", "nsddata_betas")
        for top in tops:  # betas last: with them, the subject counts as there
            source = stage / top / "ppdata" / f"subj{subject:02d}"
            target = _made(root / top / "ppdata") / source.name
            shutil.rmtree(target, ignore_errors=True)
            os.replace(source, target)
        shutil.rmtree(stage)
    return layout


def _check(parameters: dict) -> None:
    for key in ("n_train", "n_test", "n_sessions", "n_repeats", "picture_size"):
        if parameters[key] < 1:
            raise ValueError(f"{key} is {parameters[key]}; it must be at least 1")
    n_trials = (parameters["n_train"] + parameters["n_test"]) * parameters["n_repeats"]
    if n_trials % parameters["n_sessions"]:
        raise ValueError(
            f"(n_train + n_test) * n_repeats = {n_trials} trials do not fill {parameters['n_sessions']} equal "
            "sessions; change n_sessions to a divisor"
        )
    if not 0 < parameters["noise_ceiling"] < 1:
        raise ValueError(f"noise_ceiling is {parameters['noise_ceiling']}; it is a fraction between 0 and 1")
    if parameters["betas_format"] not in ("hdf5", "nifti"):
        raise ValueError(f"betas_format is {parameters['betas_format']!r}; give 'hdf5' or 'nifti'")
    if min(parameters["volume"]) < 6:
        raise ValueError(f"volume is {parameters['volume']}; every axis needs 6 voxels or more to hold all areas")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- the experiment


class _Design:
    """Who sees what when. All ids are 0-based.

    shared: (n_test,) ascending image ids, scattered over all. order: (n_trials,) columns of ``images``, the same for
    every subject. images: (8, n_test + n_train) image ids, the shared ones first.
    """

    def __init__(self, n_train: int, n_test: int, n_repeats: int, seed: int):
        self.n_images = n_test + N_SUBJECTS * n_train
        ids = rng(seed, "design", "ids").permutation(self.n_images)
        self.shared = np.sort(ids[:n_test])
        own = ids[n_test:].reshape(N_SUBJECTS, n_train)
        self.images = np.hstack([np.tile(self.shared, (N_SUBJECTS, 1)), own])
        self.order = rng(seed, "design", "order").permutation(np.repeat(np.arange(n_test + n_train), n_repeats))
        self.n_trials = len(self.order)


def _write_experiment(layout: NSDLayout, design: _Design, parameters: dict, progress: bool) -> None:
    """Everything that all subjects share, and the record of the parameters."""
    _made(layout.expdesign.parent)
    savemat(
        layout.expdesign,
        {"masterordering": design.order[None] + 1.0, "subjectim": design.images + 1.0,
         "sharedix": design.shared[None] + 1.0},
    )  # fmt: skip
    with open(layout.expdesign, "r+b") as file:  # the header's text holds the time; the same seed gives the same bytes
        file.write(b"MATLAB 5.0 MAT-file, simulated".ljust(116))
    _made(layout.stimuli.parent)
    _made(layout.captions("train2017").parent)
    seed, size = parameters["seed"], parameters["picture_size"]
    coco_ids = np.sort(rng(seed, "coco").choice(600_000, design.n_images, replace=False)) + 1
    splits = np.where(rng(seed, "split").random(design.n_images) < 0.95, *CAPTION_SPLITS)
    annotations = {split: [] for split in CAPTION_SPLITS}
    with h5py.File(layout.stimuli, "w") as file:
        shape = (size, size, 3)
        brick = file.create_dataset("imgBrick", (design.n_images, *shape), np.uint8, chunks=(1, *shape))
        for image_id in tqdm(range(design.n_images), desc="simulated stimuli", unit="picture", disable=not progress):
            scene = make_scene(seed, "stimuli", image_id)
            brick.id.write_direct_chunk((image_id, 0, 0, 0), draw_scene(scene, size).tobytes())
            for text in caption_scene(scene, seed, image_id):
                split = annotations[str(splits[image_id])]
                split.append({"image_id": int(coco_ids[image_id]), "id": len(split) + 1, "caption": text})
    for split, entries in annotations.items():
        layout.captions(split).write_text(json.dumps({"info": {"description": "simulated"}, "annotations": entries}))
    _write_stim_info(layout.stim_info, design, coco_ids, splits)
    record = {"what": "simulated data, written by nsdray.nsd.simulate", "parameters": parameters}
    (layout.root / "simulated.json").write_text(json.dumps(record, indent=2) + "\n")


def _write_stim_info(path: Path, design: _Design, coco_ids: np.ndarray, splits: np.ndarray) -> None:
    seen_by = np.zeros((design.n_images, N_SUBJECTS), int)
    for subject, images in enumerate(design.images):
        seen_by[images, subject] = 1
    shared = np.isin(np.arange(design.n_images), design.shared)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        subjects = [f"subject{s + 1}" for s in range(N_SUBJECTS)]
        writer.writerow(["", "cocoId", "cocoSplit", "nsdId", "shared1000", *subjects])
        for i in range(design.n_images):
            writer.writerow([i, coco_ids[i], splits[i], i, shared[i], *seen_by[i]])


# ---- one subject


def _write_subject(layout: NSDLayout, subject: int, design: _Design, parameters: dict, progress: bool) -> None:
    seed, n_repeats = parameters["seed"], parameters["n_repeats"]
    brain = _make_brain(subject, tuple(parameters["volume"]), seed)
    scenes = [make_scene(seed, "stimuli", int(i)) for i in design.images[subject - 1]]
    pictures = np.stack([draw_scene(scene, parameters["picture_size"]) for scene in scenes])
    signal = _standardise(encode(pictures, scenes, brain, rng(seed, subject, "tuning")))  # (n_images, n_voxels)

    random = rng(seed, subject, "gain")
    n_voxels = len(brain.index)
    logit = np.log(parameters["noise_ceiling"] / (1 - parameters["noise_ceiling"])) + random.normal(0, 0.6, n_voxels)
    ncsnr = np.exp(logit / 2) / np.sqrt(n_repeats)  # nc / (1 - nc) = exp(logit)
    total_sd = random.uniform(1.0, 2.0, n_voxels)  # of a single trial, percent signal change
    gain = total_sd * ncsnr / np.sqrt(1 + ncsnr**2)
    mean = random.normal(0.8, 0.6, n_voxels)
    expected = (mean + gain * signal).astype(np.float32)
    noise_sd = (gain / ncsnr).astype(np.float32)

    _write_volumes(layout, subject, brain, ncsnr)
    _made(layout.responses(subject).parent)
    _write_responses(layout.responses(subject), subject, design, parameters["n_sessions"])
    suffix = SESSION_SUFFIXES[parameters["betas_format"] == "nifti"]
    sessions = np.split(design.order, parameters["n_sessions"])
    bold = Bold.draw(brain.shape, brain.index, brain.noise_maps[-1], seed, subject) if "with_bold" in parameters else None
    for session, shown in enumerate(tqdm(sessions, desc=f"simulated subject {subject}", disable=not progress), 1):
        random = rng(seed, subject, "noise", session)
        volumes = random.standard_normal((len(shown), brain.size), np.float32) * 1.5
        volumes[:, brain.index] = expected[shown] + noise_sd * _noise(len(shown), brain, random)
        stored = np.rint(volumes * SCALE).clip(-32768, 32767).astype(np.int16)
        path = layout.betas_folder(subject) / f"betas_session{session:02d}{suffix}"
        write_session(path, stored.reshape(len(shown), *brain.shape))
        if bold:
            betas, image_ids = stored[:, brain.index] / np.float32(SCALE), design.images[subject - 1, shown]
            betas = expected[shown] + TRIAL_NOISE * (betas - expected[shown])
            write_runs(layout, subject, session, bold, betas, image_ids, trials_per_run(len(shown)), seed)


@dataclass(frozen=True)
class Brain:
    """Where a subject's areas lie."""

    shape: tuple[int, int, int]
    index: np.ndarray
    """(n_voxels,) nsdgeneral's voxels: flat index in C order of the volume, ascending."""
    area: np.ndarray
    """(n_voxels,) str: "V1", "V2", "V3", "hV4", a floc atlas, or ""."""
    labels: dict[str, np.ndarray]
    """Per atlas, (n_voxels,) int: its label, 0 for none."""
    right: np.ndarray
    """(n_voxels,) bool: in the right hemisphere, which sees the left half of the picture."""
    dorsal: np.ndarray
    """(n_voxels,) bool: in the upper half, which sees the lower half of the picture."""
    noise_maps: np.ndarray
    """(N_NOISE_MAPS + 1, n_voxels) float32: spatially smooth; the last one carries the drift."""

    @property
    def size(self) -> int:
        """Voxels of the whole volume."""
        return int(np.prod(self.shape))


def _make_brain(subject: int, volume: tuple[int, int, int], seed: int) -> Brain:
    """A folded shell whose posterior part is nsdgeneral; areas follow one another from the pole forwards."""
    random = rng(seed, subject, "brain")
    shape = tuple(int(n + step) for n, step in zip(volume, random.integers(-1, 2, 3)))
    n_voxels = round(N_VOXELS[subject] * np.prod(volume) / np.prod(VOLUME))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    smooth = [_smooth(random, shape) for _ in range(3 + N_NOISE_MAPS + 1)]
    off_shell = np.abs(np.sqrt(x**2 + y**2 + z**2) - 0.85 - 0.06 * smooth[0])
    index = np.sort(np.argsort((off_shell + 0.25 * (y + 1)).ravel())[:n_voxels])  # y = -1 is posterior

    right, dorsal = (x > 0).ravel()[index], (z > 0).ravel()[index]
    height = (z + 0.3 * smooth[2]).ravel()[index]
    rank = np.empty(n_voxels, int)
    rank[np.argsort((y + 0.1 * smooth[1]).ravel()[index])] = np.arange(n_voxels)
    n_early = [round(n_voxels * share) for share in np.cumsum(list(EARLY_SHARES.values()))]
    area = np.array([*EARLY_SHARES, ""], dtype=object)[np.searchsorted(n_early, rank, side="right")]
    labels = {atlas: np.zeros(n_voxels, int) for atlas in ATLASES}
    for name in EARLY_SHARES:
        inside = area == name
        dorsal[inside] = height[inside] > np.median(height[inside])
        for half, suffix in ((inside & ~dorsal, "v"), (inside & dorsal, "d")):
            atlas, value = LABELS.get(name + suffix) or LABELS[name]  # hV4 is one label
            labels[atlas][half] = value

    higher = np.flatnonzero(area == "")
    higher = higher[np.argsort(height[higher])]  # patches from below to above, overlapping a little
    start = 0
    for atlas, share in HIGHER_SHARES.items():
        patch = higher[start : start + round(n_voxels * share)]
        area[patch] = atlas
        for value, part in enumerate(np.array_split(patch, len(ATLASES[atlas])), 1):
            labels[atlas][part] = value
        start += round(0.9 * len(patch))
    maps = np.stack([field.ravel()[index] for field in smooth[3:]])
    return Brain(shape, index, area.astype(str), labels, right, dorsal, maps.astype(np.float32))


def _smooth(random: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """A smooth random field over the volume, mean 0 and standard deviation 1."""
    field = gaussian_filter(random.standard_normal(shape), 2.0, mode="nearest")
    return (field - field.mean()) / field.std()


# ---- encoding model


def encode(pictures: np.ndarray, scenes: Sequence[Scene], brain: Brain, random: np.random.Generator) -> np.ndarray:
    """Noise-free answers, arbitrary units: float32 (n_images, n_voxels).

    pictures: uint8 (n_images, size, size, 3). scenes: what they show. random: draws the subject's tuning.
    """
    answers = np.empty((len(pictures), len(brain.index)), np.float32)
    early = np.isin(brain.area, list(RF_WIDTH))
    drive = _early_drive(_opponent(pictures), brain, np.flatnonzero(early), random)
    rectified = random.random(drive.shape[1]) < 0.25
    answers[:, early] = np.where(rectified, np.maximum(drive + 0.5, 0), drive)
    answers[:, ~early] = _higher_drive(scenes, brain.area[~early], random)
    return np.sign(answers) * np.abs(answers) ** EXPONENT


def _opponent(pictures: np.ndarray) -> np.ndarray:
    """Luminance, red-green and blue-yellow: float32 (3, n_images, RETINA * RETINA), each in [-1, 1]."""
    small = [np.asarray(Image.fromarray(p).resize((RETINA, RETINA), Image.Resampling.BOX)) for p in pictures]
    red, green, blue = np.moveaxis(np.stack(small).reshape(len(small), -1, 3) / np.float32(255), -1, 0)
    return np.stack([(red + green + blue) * 2 / 3 - 1, red - green, blue - (red + green) / 2])


def _early_drive(opponent: np.ndarray, brain: Brain, voxels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """x_v of the visual areas before rectification: float32 (n_images, len(voxels))."""
    n = len(voxels)
    area = brain.area[voxels]
    along, down = random.uniform(-0.03, 0.5, (2, n))  # within a quadrant, a little over its borders
    centre_x = np.where(brain.right[voxels], 0.5 - along, 0.5 + along)
    down = np.where(area == "hV4", random.uniform(-0.5, 0.5, n), down)  # hV4 sees the whole half
    centre_y = np.where(brain.dorsal[voxels], 0.5 + down, 0.5 - down)
    eccentricity = np.hypot(centre_x - 0.5, centre_y - 0.5)
    width = np.array([RF_WIDTH[a] for a in area]) * (0.6 + 1.2 * eccentricity) * random.uniform(0.8, 1.25, n)
    width = np.maximum(width, 0.5 / RETINA)

    grid = (np.arange(RETINA) + 0.5) / RETINA
    dy, dx = (g.reshape(-1, 1) for g in np.meshgrid(grid, grid, indexing="ij"))  # (pixels, 1)
    dx, dy = dx - centre_x, dy - centre_y  # (pixels, n)
    field = np.exp(-(dx**2 + dy**2) / (2 * width**2))
    field /= field.sum(axis=0)
    orientation, cycles = random.uniform(0, np.pi, n), random.uniform(0.15, 0.35, n) / width
    phase = 2 * np.pi * cycles * (dx * np.cos(orientation) + dy * np.sin(orientation))

    energy = np.zeros((opponent.shape[1], n), np.float32)
    for wave in (np.cos(phase), np.sin(phase)):
        gabor = field * (wave - (field * wave).sum(axis=0))  # sums to zero: blind to uniform light
        energy += (opponent[0] @ gabor.astype(np.float32)) ** 2
    features = [np.sqrt(energy), *(opponent @ field.astype(np.float32))]
    weights = random.laplace(size=(4, n)) * np.array([1.0, 1.2, 1.0, 1.0])[:, None]
    weights[0] = np.abs(weights[0])  # energy excites
    drive = sum(weight * _standardise(feature) for weight, feature in zip(weights, features))
    return _standardise(drive)


def _higher_drive(scenes: Sequence[Scene], area: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """x_v of the higher areas, standardised: float32 (n_images, len(area))."""
    n = len(area)
    preference = np.array([PREFERENCES[a] for a in area]).T[:, None]  # (3, 1, n)
    kinds, colours, backgrounds = (
        random.laplace(size=(len(names), n)) * p for names, p in zip((KINDS, COLOURS, BACKGROUNDS), preference)
    )
    centre = random.uniform(0.2, 0.8, (2, n))
    kind_row, colour_row, background_row = ({k: i for i, k in enumerate(d)} for d in (KINDS, COLOURS, BACKGROUNDS))
    drive = np.empty((len(scenes), n))
    for answer, scene in zip(drive, scenes):
        answer[:] = backgrounds[background_row[scene.background]]
        for thing in scene.objects:
            near = np.exp(-((thing.x - centre[0]) ** 2 + (thing.y - centre[1]) ** 2) / (2 * 0.35**2))
            answer += 2 * thing.size * near * (kinds[kind_row[thing.kind]] + colours[colour_row[thing.colour]])
    return _standardise(drive).astype(np.float32)


def _standardise(values: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 down each column; a constant column becomes 0."""
    centred = values - values.mean(axis=0)
    deviation = centred.std(axis=0)
    return centred / np.where(deviation > 0, deviation, 1)


def _noise(n_trials: int, brain: Brain, random: np.random.Generator) -> np.ndarray:
    """One session's noise, variance 1 for each voxel: float32 (n_trials, n_voxels)."""
    *maps, drift_map = brain.noise_maps
    maps = np.stack(maps) / np.sqrt(np.sum(np.square(maps), axis=0))  # each voxel's loadings have length 1
    shared = random.standard_normal((n_trials, len(maps)), np.float32) @ maps
    time = np.linspace(0, 1, n_trials, dtype=np.float32)[:, None]
    phase, turns = random.uniform(0, 2 * np.pi), random.uniform(0.5, 1.5)
    drift = np.sqrt(2) * np.sin(2 * np.pi * turns * time + phase) * np.sign(drift_map)
    own = random.standard_normal((n_trials, len(brain.index)), np.float32)
    parts = ((SHARED_NOISE, shared), (DRIFT_NOISE, drift), (1 - SHARED_NOISE - DRIFT_NOISE, own))
    return sum(np.float32(np.sqrt(share)) * part for share, part in parts)


# ---- files of one subject


def _write_volumes(layout: NSDLayout, subject: int, brain: Brain, ncsnr: np.ndarray) -> None:
    """nsdgeneral and the atlases, -1 outside of the cortex as in NSD, and ncsnr, 0 outside of nsdgeneral."""

    def save(path: Path, values: np.ndarray, outside: int, dtype: type) -> None:
        volume = np.full(brain.size, outside, dtype)
        volume[brain.index] = values
        nib.save(nib.Nifti1Image(volume.reshape(brain.shape), np.eye(4)), path)

    _made(layout.roi_folder(subject))
    nsdgeneral = np.full(brain.size, -1, np.int16)
    nsdgeneral[: brain.size // 2] = 0  # one half stands for cortex outside of nsdgeneral
    nsdgeneral[brain.index] = 1
    nib.save(nib.Nifti1Image(nsdgeneral.reshape(brain.shape), np.eye(4)), layout.roi(subject, "nsdgeneral"))
    for atlas, values in brain.labels.items():
        save(layout.roi(subject, atlas), values, -1, np.int16)
    _made(layout.betas_path(subject))
    save(layout.ncsnr(subject), ncsnr, 0, np.float32)


def _write_responses(path: Path, subject: int, design: _Design, n_sessions: int) -> None:
    per_session = design.n_trials // n_sessions
    per_run = trials_per_run(per_session)
    seen = set()
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["SUBJECT", "SESSION", "RUN", "TRIAL", "73KID", "10KID", "ISOLD"])
        for trial, column in enumerate(design.order.tolist()):
            session, in_session = divmod(trial, per_session)
            run, in_run = divmod(in_session, per_run)
            image_id = design.images[subject - 1, column]
            writer.writerow([subject, session + 1, run + 1, in_run + 1, image_id + 1, column + 1, int(column in seen)])
            seen.add(column)


def trials_per_run(n_trials: int) -> int:
    """Trials in each run of a session but the last, which may have fewer."""
    return -(-n_trials // RUNS_PER_SESSION)


def write_session(path: Path, betas: np.ndarray) -> None:
    """Write a session as NSD does, by the name's ending: .hdf5, or NIfTI. betas: int16 (n_trials, X, Y, Z)."""
    if path.suffix != ".hdf5":
        nib.save(nib.Nifti1Image(np.moveaxis(betas, 0, -1), np.eye(4)), path)
        return
    n_trials, *shape = betas.shape
    by_voxel = np.ascontiguousarray(betas.reshape(n_trials, -1).T, "<i2")
    with h5py.File(path, "w") as file:
        size = (n_trials, *shape[::-1])
        write = file.create_dataset("betas", size, "<i2", chunks=(n_trials, 1, 1, 1)).id.write_direct_chunk
        for trials, (x, y, z) in zip(by_voxel, np.ndindex(*shape)):
            write((0, z, y, x), trials.tobytes())
