from __future__ import annotations

import json

import pandas as pd
import pytest

from nsdray.nsd.captions import load_captions
from nsdray.nsd.layout import CAPTION_SPLITS
from nsdray.nsd.scenes import caption_scene, make_scene


def test_captions_equal_the_scenes_and_a_lookup_by_hand(mini):
    table = pd.read_csv(mini.stim_info, index_col=0)
    assert set(table.cocoSplit) == set(CAPTION_SPLITS)
    image_ids = [40, 3, *table.index[table.cocoSplit == "val2017"][:2], 3]
    found = load_captions(mini, image_ids)
    for image_id, captions in zip(image_ids, found):
        row = table.loc[image_id]
        annotations = json.loads(mini.captions(row.cocoSplit).read_text())["annotations"]
        assert captions == [a["caption"] for a in annotations if a["image_id"] == row.cocoId]
        assert captions == caption_scene(make_scene(0, "stimuli", image_id), 0, image_id)


def test_white_space_goes(mini_copy):
    path = mini_copy.captions("train2017")
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["caption"] = f" {annotation['caption']}\n"
    path.write_text(json.dumps(content))
    assert all(caption == caption.strip() for caption in load_captions(mini_copy, [0])[0])


def test_bad_captions(mini_copy):
    with pytest.raises(ValueError, match="image_id 102 is not in .*nsd_stim_info_merged.csv, which holds 0..101"):
        load_captions(mini_copy, [102])
    coco_id = pd.read_csv(mini_copy.stim_info).cocoId[4]
    for split in CAPTION_SPLITS:
        mini_copy.captions(split).write_text('{"annotations": []}')
    with pytest.raises(ValueError, match=rf"image_id 4 \(cocoId {coco_id}\) has no caption in .*captions_"):
        load_captions(mini_copy, [4])
    for split in CAPTION_SPLITS:
        mini_copy.captions(split).write_text('{"annota')
    with pytest.raises(ValueError, match="is no COCO caption file"):
        load_captions(mini_copy, [4])
    for split in CAPTION_SPLITS:
        mini_copy.captions(split).unlink()
    with pytest.raises(FileNotFoundError, match="unpack COCO's annotations_trainval2017.zip"):
        load_captions(mini_copy, [4])
    mini_copy.stim_info.write_text(",cocoId,cocoSplit\n0,3,test2017\n")
    with pytest.raises(ValueError, match=r"names the COCO splits \['test2017'\]"):
        load_captions(mini_copy, [0])
    mini_copy.stim_info.write_text(",nsdId\n0,0\n")
    with pytest.raises(ValueError, match=r"lacks the columns \['cocoId', 'cocoSplit'\]"):
        load_captions(mini_copy, [0])
    mini_copy.stim_info.unlink()
    with pytest.raises(FileNotFoundError, match="no stimulus table"):
        load_captions(mini_copy, [0])
