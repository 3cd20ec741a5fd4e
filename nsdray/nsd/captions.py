"""COCO's captions of NSD's images: image_id -> cocoId and split (stimulus table) -> captions (COCO's JSON)."""
from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from nsdray.nsd.layout import CAPTION_SPLITS, NSDLayout


def load_captions(layout: NSDLayout, image_ids: Sequence[int]) -> list[list[str]]:
    """All captions of each image (five, rarely more), in COCO's order and without white space around them.

    ValueError for an image_id that the stimulus table lacks and for an image that has no caption.
    """
    coco = _coco_ids(layout.stim_info)
    if outside := [image_id for image_id in image_ids if not 0 <= image_id < len(coco)]:
        raise ValueError(f"image_id {outside[0]} is not in {layout.stim_info}, which holds 0..{len(coco) - 1}")
    splits = {coco[image_id][1] for image_id in image_ids}
    captions = {split: _read_split(layout.captions(split)) for split in CAPTION_SPLITS if split in splits}
    found = []
    for image_id in image_ids:
        coco_id, split = coco[image_id]
        if coco_id not in captions[split]:
            raise ValueError(
                f"image_id {image_id} (cocoId {coco_id}) has no caption in {layout.captions(split)}; "
                "take COCO's own annotations_trainval2017"
            )
        found.append(captions[split][coco_id])
    return found


def _coco_ids(path: Path) -> list[tuple[int, str]]:
    """(cocoId, cocoSplit) by image_id."""
    if not path.exists():
        raise FileNotFoundError(f"no stimulus table {path}; download nsddata/experiments/nsd from NSD's bucket")
    with open(path, newline="") as file:
        rows = csv.DictReader(file)
        if missing := {"cocoId", "cocoSplit"} - set(rows.fieldnames or ()):
            raise ValueError(f"{path} lacks the columns {sorted(missing)}; it has {rows.fieldnames}")
        coco = [(int(row["cocoId"]), row["cocoSplit"]) for row in rows]
    if unknown := {split for _, split in coco} - set(CAPTION_SPLITS):
        raise ValueError(f"{path} names the COCO splits {sorted(unknown)}; known: {', '.join(CAPTION_SPLITS)}")
    return coco


def _read_split(path: Path) -> dict[int, list[str]]:
    if not path.exists():
        raise FileNotFoundError(f"no captions {path}; unpack COCO's annotations_trainval2017.zip so that it is there")
    try:
        annotations = json.loads(path.read_text())["annotations"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no COCO caption file ({error!r}); unpack it again") from error
    captions = defaultdict(list)
    for annotation in annotations:
        captions[annotation["image_id"]].append(annotation["caption"].strip())
    return captions
