"""Feature networks against torchvision's own extractor, and weight files found, missing and wrong."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models as tv
from torchvision.models.feature_extraction import create_feature_extractor

from nsdray.models import backbones
from nsdray.models.backbones import BACKBONES, features, load_backbone, random_backbone, weights_file
from nsdray.models.clip import CLIP, CLIPConfig, load_clip

SIZES = {"alexnet": 224, "inception_v3": 96, "efficientnet_b1_v1": 64, "efficientnet_b1_v2": 64, "swav_resnet50": 64}
TORCHVISION = {
    "alexnet": tv.alexnet,
    "inception_v3": lambda: tv.inception_v3(transform_input=True, init_weights=False),
    "efficientnet_b1_v1": tv.efficientnet_b1,
    "efficientnet_b1_v2": tv.efficientnet_b1,
    "swav_resnet50": tv.resnet50,
}


def torchvision_with_random_weights(name: str) -> nn.Module:
    """torchvision's network, its signals kept alive, and BatchNorm's moments away from 0 and 1."""
    torch.manual_seed(0)
    network = TORCHVISION[name]()
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
        if isinstance(part, nn.BatchNorm2d):
            nn.init.normal_(part.running_mean, 0, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
            part.num_batches_tracked.fill_(7)
    return network.eval()


def images(n: int, size: int) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torchvision cache."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def save_published(name: str, network: nn.Module, folder: Path) -> Path:
    """The network's tensors in a file of the published name and form."""
    state = network.state_dict()
    if name == "swav_resnet50":
        state = {f"module.{key}": value for key, value in state.items() if not key.startswith("fc.")}
        for key, shape in {"projection_head.0.weight": (8, 2048), "projection_head.1.num_batches_tracked": (),
                           "prototypes.weight": (3, 8)}.items():  # fmt: skip
            state[f"module.{key}"] = torch.zeros(shape)
    if name == "inception_v3":  # ported before PyTorch 0.4.1
        state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    path = folder / BACKBONES[name].file
    torch.save(state, path)
    return path


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")
@pytest.mark.parametrize("name", SIZES)
def test_features_are_torchvisions(name, hub):
    """From a file in the cache to features, against torchvision's extractor with the same weights."""
    reference = torchvision_with_random_weights(name)
    save_published(name, reference, hub)
    nodes = BACKBONES[name].nodes
    network = load_backbone(name)
    found = features(network, images(2, SIZES[name]), nodes)
    with torch.inference_mode():
        expected = create_feature_extractor(reference, list(nodes))(images(2, SIZES[name]))
    assert list(found) == list(nodes)
    for node in nodes:
        assert found[node].dtype == np.float32 and found[node].shape == (2, expected[node][0].numel())
        scale = expected[node].abs().max().item()
        np.testing.assert_allclose(found[node], expected[node].flatten(1), rtol=1e-5, atol=1e-6 * scale)
        assert 1e-3 < expected[node].std() < 1e6  # a signal, not rounding
    assert not any(m.training for m in network.modules()) and not any(p.requires_grad for p in network.parameters())


def test_sizes_of_features():
    sizes = {"alexnet": {"features.4": 192 * 27 * 27, "features.11": 256 * 13 * 13}, "efficientnet_b1_v2": {"avgpool": 1280}}
    for name, expected in sizes.items():
        found = features(random_backbone(name), images(1, 224), tuple(expected))
        assert {node: values.shape for node, values in found.items()} == {node: (1, d) for node, d in expected.items()}


def test_nothing_is_computed_behind_the_last_wanted_node():
    network = random_backbone("alexnet")
    assert [name for name, _ in network.named_children()] == ["features"], "AlexNet's classifier is 58 million unused weights"
    ran = []
    for i, part in enumerate(network.features):
        part.register_forward_hook(lambda *_, i=i: ran.append(i))
    features(network, images(1, 64), ["features.4"])
    assert ran == [0, 1, 2, 3, 4]
    ran.clear()
    both = features(network, images(1, 64), ["features.11", "features.4"])
    assert ran == list(range(12)) and list(both) == ["features.11", "features.4"]
    assert all(len(part._forward_hooks) == 1 for part in network.features), "hooks are taken away again"


def test_features_are_not_altered_by_later_operations_in_place():
    """features.3 is followed by a ReLU in place."""
    found = features(random_backbone("alexnet"), images(1, 64), ["features.3", "features.4"])
    assert found["features.3"].min() < 0
    np.testing.assert_array_equal(np.maximum(found["features.3"], 0), found["features.4"])


def test_mini_clip_gives_clips_image_embedding(tmp_path):
    torch.manual_seed(0)
    model = CLIP(CLIPConfig.mini()).model
    path = tmp_path / "clip.safetensors"
    save_file({key: value.half().contiguous() for key, value in model.state_dict().items()}, path)
    pictures = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    for place in (path, tmp_path):  # the file, or its folder
        network = load_backbone("clip_mini", place)
        found = features(network, (pictures - mean) / std, ["visual"])["visual"]
        expected = load_clip(path, CLIPConfig.mini()).vision_tokens(pictures)[:, 0].numpy()
        np.testing.assert_allclose(found / np.linalg.norm(found, axis=1, keepdims=True), expected, atol=1e-5)
        assert [name for name, _ in network.named_children()] == ["visual"]


def test_published_clip_has_the_published_shape():
    """Without its weights: architecture and file name only."""
    with torch.device("meta"):
        network = BACKBONES["clip_vit_l14"].build()
    assert sum(p.numel() for p in network.visual.parameters()) == 303_966_208
    assert BACKBONES["clip_vit_l14"].file == "open_clip_model.safetensors"


def test_random_networks_are_seeded_and_leave_the_global_state():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (random_backbone("efficientnet_b1_v1", seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    x = images(1, 64)
    assert not any(m.training for m in first.modules()) and not any(p.requires_grad for p in first.parameters())
    a, b, c = (features(network, x, ["avgpool"])["avgpool"] for network in (first, again, other))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)


def test_files_are_torchvisions_own_and_nodes_the_references():
    assert {name: BACKBONES[name].file for name in SIZES} == {
        "alexnet": "alexnet-owt-7be5be79.pth",
        "inception_v3": "inception_v3_google-0cc3c7bd.pth",
        "efficientnet_b1_v1": "efficientnet_b1_rwightman-bac287d4.pth",
        "efficientnet_b1_v2": "efficientnet_b1-c27df63c.pth",
        "swav_resnet50": "swav_800ep_pretrain.pth.tar",
    }
    nodes = {name: ("avgpool",) for name in SIZES} | {"alexnet": ("features.4", "features.11")}
    assert {name: BACKBONES[name].nodes for name in SIZES} == nodes
    assert all(name == backbone.name for name, backbone in BACKBONES.items())


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_file_is_told_with_name_source_and_place(name, hub, tmp_path):
    backbone = BACKBONES[name]
    with pytest.raises(FileNotFoundError, match=f"{name}: its weights {backbone.file} are not in {hub}. They come from https"):
        load_backbone(name)
    with pytest.raises(FileNotFoundError, match=f"{backbone.file} are not in {tmp_path / 'weights'}"):
        load_backbone(name, tmp_path / "weights")


def test_clip_is_looked_for_in_open_clips_cache(tmp_path, monkeypatch):
    def missing() -> Path:
        raise FileNotFoundError("not in open_clip's cache")

    monkeypatch.setattr(backbones, "published_checkpoint", missing)
    with pytest.raises(FileNotFoundError, match="not in open_clip's cache"):
        weights_file("clip_vit_l14")
    monkeypatch.setattr(backbones, "published_checkpoint", lambda: tmp_path / "blob")
    (tmp_path / "blob").touch()
    assert weights_file("clip_vit_l14") == tmp_path / "blob"
    with pytest.raises(FileNotFoundError, match=f"open_clip_model.safetensors are not in {tmp_path}. They come from open_clip"):
        weights_file("clip_vit_l14", tmp_path)
    with pytest.raises(FileNotFoundError, match="clip_mini: say in which folder clip.safetensors lies"):
        weights_file("clip_mini")


def test_wrong_weights_are_refused(hub, tmp_path):
    reference = torchvision_with_random_weights("swav_resnet50")
    path = save_published("swav_resnet50", reference, hub)
    state = torch.load(path, weights_only=True)
    extra = state | {"module.other_head.weight": torch.zeros(3)}
    torch.save(extra, path)
    with pytest.raises(ValueError, match=r"1 unknown \['other_head.weight'\].*The right one is swav_800ep_pretrain.pth.tar from"):
        load_backbone("swav_resnet50")
    del state["module.layer1.0.conv1.weight"]
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"1 missing \['layer1.0.conv1.weight'\]"):
        load_backbone("swav_resnet50")
    torch.save(tv.resnet18().state_dict(), tmp_path / BACKBONES["alexnet"].file)
    with pytest.raises(ValueError, match="does not fit this AlexNet"):
        load_backbone("alexnet", tmp_path)
    (tmp_path / BACKBONES["alexnet"].file).write_bytes(b"<html>")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_backbone("alexnet", tmp_path)


def test_errors():
    with pytest.raises(ValueError, match="no backbone is called 'efficientnet_b1'; there are alexnet, .*efficientnet_b1_v1"):
        load_backbone("efficientnet_b1")
    with pytest.raises(ValueError, match="no backbone is called 'resnet'"):
        random_backbone("resnet")
    network = random_backbone("clip_mini")
    with pytest.raises(ValueError, match=r"Sequential has no part called \['avgpool'\]"):
        features(network, images(1, 64), ["avgpool"])
    with pytest.raises(ValueError, match="no node is wanted"):
        features(network, images(1, 64), [])
    with pytest.raises(ValueError, match=r"images are torch.uint8 \(1, 64, 64, 3\); they must be float \(n, 3, height, width\)"):
        features(network, torch.zeros(1, 64, 64, 3, dtype=torch.uint8), ["visual"])
    with pytest.raises(ValueError, match=r"images are torch.float32 \(3, 64, 64\)"):
        features(network, images(1, 64)[0], ["visual"])
    with pytest.raises(ValueError, match=r"take no part in a forward pass: \['AuxLogits'\]"):
        features(random_backbone("inception_v3"), images(1, 96), ["avgpool", "AuxLogits"])


def test_backbones_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        BACKBONES["alexnet"].file = "other"
