"""NSD's layout around a lab's own experiment: design, stimuli, masks and captions, so that everything that reads NSD reads it.

Pictures are numbered in the order of their names; those that come with later sessions are appended, so that numbers stay.
``experiment.json`` holds these names, the numbers of the participants, what each session showed, and which pictures are
test images. A later call may add participants, sessions and pictures, but not alter what is there: betas, latents and
models that were made from it would silently belong to other pictures.
"""
from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
from PIL import Image
from scipy.io import savemat
from tqdm import tqdm

from nsdray.nsd.bold import BoldSession, affine
from nsdray.nsd.layout import CAPTION_SPLITS, N_SUBJECTS, NSDLayout
from nsdray.nsd.rois import read_volume
from nsdray.nsd.stimuli import Stimuli, resize
from nsdray.seeds import rng

RECORD = "experiment.json"
NSD_PICTURE_SIZE = 425
MAX_AFFINE_MM = 0.1
"""Distance by which the corners of a mask and of the runs may differ."""


def read_record(root: Path) -> dict:
    """What `write_experiment` recorded, or {}. ValueError for a folder that holds anything else."""
    if (root / RECORD).is_file():
        return json.loads((root / RECORD).read_text())
    if root.is_dir() and any(root.iterdir()):
        raise ValueError(f"{root} is not empty and no data set of nsdray's (no {RECORD}); take another --output")
    return {}


def draw_test_images(sessions: Mapping[int, Sequence[BoldSession]], n_images: int, seed: int) -> list[str]:
    """A seeded choice among the pictures that every subject saw. sessions: by subject."""
    seen = [{name for session in one for run in session.runs for name in run.events.condition} for one in sessions.values()]
    shared = sorted(set.intersection(*seen))
    if not 0 < n_images < len(set.union(*seen)) or n_images > len(shared):
        raise ValueError(
            f"{n_images} test images of {len(set.union(*seen))} pictures, of which {len(shared)} were seen by all "
            f"{len(seen)} participants; ask for fewer by --bids.n-test-images, or name them by --bids.test-images FILE"
        )
    return sorted(rng(seed, "test images").permutation(shared)[:n_images].tolist())


def read_test_images(path: Path) -> list[str]:
    """Names of pictures, one a line."""
    if not path.is_file():
        raise FileNotFoundError(f"no list of test images {path}; it names a stim_file a line")
    return sorted({line.strip() for line in path.read_text().splitlines()} - {""})


def read_captions(path: Path) -> dict[str, list[str]]:
    """{stim_file: [caption, …]} of a JSON file."""
    try:
        captions = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"no captions {path}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error})") from error
    if not isinstance(captions, dict) or not all(isinstance(one, list) and one for one in captions.values()):
        raise ValueError(f"{path} must hold an object: a list of captions for each stim_file")
    return captions


def write_experiment(
    layout: NSDLayout,
    labels: Mapping[str, int],
    sessions: Mapping[int, Sequence[BoldSession]],
    test_images: Sequence[str],
    pictures: Path,
    captions: Mapping[str, Sequence[str]] | None = None,
    picture_size: int | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """Write everything but betas and masks; returns the image_id of every picture.

    labels: subject number by participant. sessions: by subject. test_images: names of pictures, which become the shared
    ones. pictures: the folder that stim_file is relative to. captions: of all pictures, or None. picture_size: pixels a
    side of the square that is cut from a picture's middle and resized; None: the smallest picture's shorter side, 425
    at most. Does nothing if it is all there. ValueError for what contradicts an earlier call, FileNotFoundError for
    pictures that are missing.
    """
    record = read_record(layout.root)
    shown = {subject: {session.session: _shown(session) for session in one} for subject, one in sessions.items()}
    named = sorted({name for one in shown.values() for names in one.values() for name in names})
    names = list(record.get("pictures", []))
    names += [name for name in named if name not in set(names)]
    image_id = {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(test_images) - set(names)):
        raise ValueError(f"{len(unknown)} test images were never shown, first {unknown[0]!r}; pictures are named as in stim_file")
    if not 0 < len(set(test_images)) < len(names):
        raise ValueError(f"{len(set(test_images))} test images of {len(names)} pictures; there must be some of both")
    trials = {str(subject): {str(n): [image_id[name] for name in one] for n, one in by_session.items()}
              for subject, by_session in shown.items()}  # fmt: skip
    if captions is not None and (bare := [name for name in names if not captions.get(name)]):
        raise ValueError(f"{len(bare)} of {len(names)} pictures have no caption, first {bare[0]!r}; caption all, or none")
    new = {
        "what": "written by nsdray from a data set in BIDS",
        "finished": True,
        "participants": dict(labels),
        "pictures": names,
        "test_images": sorted(set(test_images)),
        "picture_size": record.get("picture_size") or picture_size or _common_size(pictures, names),
        "trials": {subject: record.get("trials", {}).get(subject, {}) | by_session for subject, by_session in
                   (record.get("trials", {}) | trials).items()},
        "captions": [list(captions[name]) for name in names] if captions is not None else None,
    }  # fmt: skip
    _check_growth(layout.root, record, new, picture_size)
    if new != record:
        layout.root.mkdir(parents=True, exist_ok=True)
        _replace(layout.root / RECORD, json.dumps(new | {"finished": False}).encode())
        _write_stimuli(layout.stimuli, pictures, names, new["picture_size"], progress)
        _write_captions(layout, new["captions"])
        _write_design(layout, new)
        _replace(layout.root / RECORD, json.dumps(new).encode())
    return image_id


def _shown(session: BoldSession) -> list[str]:
    """Names of the pictures in the order of the trials."""
    orders = [(run.events.condition, np.argsort(run.events.onset, kind="stable")) for run in session.runs]
    return [condition[i] for condition, order in orders for i in order]


def _check_growth(root: Path, old: dict, new: dict, picture_size: int | None) -> None:
    """ValueError unless new only adds to old."""
    if not old:
        return
    before = set(old["pictures"])
    altered = []
    if [name for name in new["test_images"] if name in before] != old["test_images"]:
        altered.append("the test images")
    if any(new["trials"][s].get(n) != ids for s, one in old["trials"].items() for n, ids in one.items()):
        altered.append("what an earlier session showed")
    if any(new["participants"].get(label) != number for label, number in old["participants"].items()):
        altered.append("the numbers of the participants")
    if old["captions"] is not None and new["captions"] is None:
        altered.append("the captions (there, but not given now by --bids.captions)")
    if picture_size not in (None, old["picture_size"]):
        altered.append(f"picture_size ({old['picture_size']} there)")
    if altered:
        raise ValueError(
            f"{root} holds another version of this experiment: {', '.join(altered)} differ. What was made from it would "
            "belong to other pictures. Take another --output, or remove that folder"
        )


def _common_size(folder: Path, names: Sequence[str]) -> int:
    sizes = []
    for name in names:
        with _opened(folder, name) as picture:
            sizes.append(min(picture.size))
    return min(NSD_PICTURE_SIZE, *sizes)


def _opened(folder: Path, name: str) -> Image.Image:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"stim_file {name!r} in events.tsv leads out of {folder}; it must be relative to it, without '..'")
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"no picture {folder / name}, which events.tsv names; give the folder that stim_file is relative to by --bids.stimuli"
        )
    try:
        return Image.open(folder / name)
    except OSError as error:
        raise ValueError(f"{folder / name} is no picture ({error})") from error


def _write_stimuli(path: Path, folder: Path, names: Sequence[str], size: int, progress: bool) -> None:
    """All pictures as uint8 (size, size, 3); those in the file that is there, the first ones, are taken over."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    n_known = 0
    if path.exists():
        with Stimuli(path) as stimuli:
            n_known = stimuli.n_images
    with h5py.File(partial, "w") as file:
        shape = (size, size, 3)
        brick = file.create_dataset("imgBrick", (len(names), *shape), np.uint8, chunks=(1, *shape))
        if n_known:
            with Stimuli(path) as old:
                for image_id in range(n_known):
                    brick[image_id] = old.read([image_id])[0]
        for image_id in tqdm(range(n_known, len(names)), desc="stimuli", unit="picture", disable=not progress):
            with _opened(folder, names[image_id]) as picture:
                side = min(picture.size)
                left, top = (picture.width - side) // 2, (picture.height - side) // 2
                square = np.asarray(picture.convert("RGB").crop((left, top, left + side, top + side)))
            brick[image_id] = resize(square[None], size)[0]
    os.replace(partial, path)


def _write_captions(layout: NSDLayout, captions: Sequence[Sequence[str]] | None) -> None:
    """In COCO's JSON; a picture's cocoId is its image_id + 1, its split the first. The other's file is there and empty."""
    if captions is None:
        return
    paths = [layout.captions(split) for split in CAPTION_SPLITS]
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    texts = [(image_id + 1, text) for image_id, several in enumerate(captions) for text in several]
    annotations = [{"image_id": coco, "id": i, "caption": text} for i, (coco, text) in enumerate(texts, 1)]
    for path, entries in zip(paths, (annotations, [])):
        _replace(path, json.dumps({"annotations": entries}).encode())


def _write_design(layout: NSDLayout, record: dict) -> None:
    """nsd_expdesign.mat, nsd_stim_info_merged.csv, and every subject's responses.tsv.

    NSD has one order for all subjects (masterordering, over columns of subjectim). Here it is 1, 2, 3, …, and a row of
    subjectim is the subject's own order, filled up with its last image.
    """
    layout.expdesign.parent.mkdir(parents=True, exist_ok=True)
    orders = {int(subject): [i for n in sorted(one, key=int) for i in one[n]] for subject, one in record["trials"].items()}
    n_trials, shared = max(map(len, orders.values())), np.flatnonzero(np.isin(record["pictures"], record["test_images"]))
    images = np.ones((N_SUBJECTS, n_trials))
    for subject, order in orders.items():
        images[subject - 1] = np.array(order + order[-1:] * (n_trials - len(order))) + 1.0
    partial = layout.expdesign.with_name("partial.mat")
    savemat(partial, {"masterordering": np.arange(1.0, n_trials + 1)[None], "subjectim": images, "sharedix": shared[None] + 1.0})
    os.replace(partial, layout.expdesign)
    seen = {subject: set(order) for subject, order in orders.items()}
    with open(layout.stim_info, "w", newline="") as file:
        writer = csv.writer(file)
        subjects = [f"subject{s + 1}" for s in range(N_SUBJECTS)]
        writer.writerow(["", "cocoId", "cocoSplit", "nsdId", "shared1000", *subjects, "stim_file"])
        for i, name in enumerate(record["pictures"]):
            seen_by = [int(i in seen.get(s + 1, ())) for s in range(N_SUBJECTS)]
            writer.writerow([i, i + 1, CAPTION_SPLITS[0], i, name in set(record["test_images"]), *seen_by, name])
    for subject, by_session in record["trials"].items():
        path = layout.responses(int(subject))
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t")
            writer.writerow(["SUBJECT", "SESSION", "TRIAL", "73KID"])
            rows = ((n, t, i) for n in sorted(by_session, key=int) for t, i in enumerate(by_session[n], 1))
            writer.writerows([subject, n, t, i + 1] for n, t, i in rows)


def write_mask(layout: NSDLayout, subject: int, mask: Path, run: Path, shape: Sequence[int]) -> None:
    """Write the voxels to decode from as ROI "nsdgeneral". mask: NIfTI on the runs' grid, above 0 where chosen. run: one run.

    ValueError for another grid, or a mask without a voxel.
    """
    if not mask.is_file():
        raise FileNotFoundError(f"no mask {mask} for subject {subject}; --bids.mask names a NIfTI volume on the grid of the runs")
    volume, theirs, ours = read_volume(mask), affine(mask), affine(run)
    corners = np.array([[x, y, z, 1] for x in (0, shape[0]) for y in (0, shape[1]) for z in (0, shape[2])]).T
    if volume.shape != tuple(shape[:3]) or np.abs(theirs @ corners - ours @ corners).max() > MAX_AFFINE_MM:
        raise ValueError(
            f"{mask} has the grid {volume.shape} with affine {theirs.round(2).tolist()}, the runs of subject {subject} "
            f"{tuple(shape[:3])} with {ours.round(2).tolist()}; resample the mask to the runs"
        )
    if not (volume > 0).any():
        raise ValueError(f"{mask} has no voxel above 0")
    path = layout.roi(subject, "nsdgeneral")
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image((volume > 0).astype(np.int16), ours), path)


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)
