"""Frozen networks whose features pictures are compared by, and where their published weights lie. Nothing is downloaded.

A network takes float (n, 3, h, w), resized and normalised as the metric says (`nsdray.metrics.perceptual.prepare`), and
answers at its nodes, named as torchvision's `create_feature_extractor` names them. torchvision's AlexNet counts from 0:
`features.4` is the second convolution after its ReLU, `features.11` the fifth.
"""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchvision import models as tv

from nsdray.models.checkpoint import load_strictly, read_weights, require_fit, weight_shapes
from nsdray.models.clip import CLIP, CLIPConfig, published_checkpoint

SWAV_URL = "https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar"  # of facebookresearch/swav's hubconf.py
CLIP_FILE = "open_clip_model.safetensors"


@dataclass(frozen=True)
class Backbone:
    """An architecture, its weight file, and the nodes that metrics read."""

    name: str
    build: Callable[[], nn.Module]
    """The network with random weights, its tensors named as in the weight file."""
    nodes: tuple[str, ...]
    file: str
    source: str
    """Where the file comes from, in words or as an address."""
    cached: Callable[[str], Path] | None
    """From the file's name to its place in the usual cache (FileNotFoundError if that cache has its own rules). None: it
    lies in no cache and the caller names it."""
    dropped: tuple[str, ...] = ()
    """Beginnings of names in the weight file that the features do not need and the network has no place for."""
    keep: str | None = None
    """The only child that the nodes need; the others are let go after loading. None: all."""


def load_backbone(name: str, folder: str | Path | None = None, device: str | torch.device = "cpu") -> nn.Module:
    """The network with its published weights, in eval mode, float32, without gradients.

    folder: where its file lies under its own name, or the file itself. None: torchvision's cache, for CLIP open_clip's.
    FileNotFoundError if it is not there, ValueError if it is not the file of this network (every tensor must fit).
    """
    backbone = find_backbone(name)
    path = weights_file(name, folder)
    with torch.device("meta"):
        network = backbone.build()
    state = {key: value for key, value in read_weights(path).items() if not key.startswith(backbone.dropped)}
    # BatchNorm's step counters are unused in eval mode, and files from before PyTorch 0.4.1 lack them
    counters = {key: torch.zeros(()) for key in network.state_dict() if key.endswith("num_batches_tracked")}
    load_strictly(network, counters | state, path, f"The right one is {backbone.file} from {backbone.source}.")
    return _trimmed(backbone, network).to(device)


def check_backbone(name: str, folder: str | Path | None = None) -> None:
    """What `load_backbone` would refuse, by the file's header alone."""
    backbone = find_backbone(name)
    path = weights_file(name, folder)
    with torch.device("meta"):
        network = backbone.build()
    shapes = {key: shape for key, shape in weight_shapes(path).items() if not key.startswith(backbone.dropped)}
    counters = {key: torch.Size() for key in network.state_dict() if key.endswith("num_batches_tracked")}
    require_fit(network, counters | shapes, path, f"The right one is {backbone.file} from {backbone.source}.")


def random_backbone(name: str, seed: int = 0, device: str | torch.device = "cpu") -> nn.Module:
    """The network with seeded random weights, for tests and benchmarks: its features say little about pictures."""
    backbone = find_backbone(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = backbone.build()
        for part in network.modules():
            if isinstance(part, nn.Conv2d):  # PyTorch's own start lets the signal of deep networks fade to 1e-8 and below
                nn.init.kaiming_normal_(part.weight)
    return _trimmed(backbone, network.eval().requires_grad_(False)).to(device)


def weights_file(name: str, folder: str | Path | None = None) -> Path:
    """Where a network's weights lie; FileNotFoundError says which file is missing, from where it comes and where it goes."""
    backbone = find_backbone(name)
    if folder is None and backbone.cached is not None:
        path = backbone.cached(backbone.file)
    elif folder is None:
        raise FileNotFoundError(f"{name}: say in which folder {backbone.file} lies ({backbone.source}).")
    else:
        path = Path(folder)
        path = path if path.is_file() else path / backbone.file
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: its weights {backbone.file} are not in {path.parent}. They come from {backbone.source}: put the file "
            "there, or name the folder that holds it."
        )
    return path


def find_backbone(name: str) -> Backbone:
    """An entry of BACKBONES; ValueError lists the names."""
    if name not in BACKBONES:
        raise ValueError(f"no backbone is called {name!r}; there are {', '.join(BACKBONES)}")
    return BACKBONES[name]


def _trimmed(backbone: Backbone, network: nn.Module) -> nn.Module:
    if backbone.keep is None:
        return network
    return nn.Sequential(OrderedDict([(backbone.keep, network.get_submodule(backbone.keep))])).eval()


class _Reached(Exception):
    """The last wanted node has answered."""


@torch.inference_mode()
def features(network: nn.Module, images: torch.Tensor, nodes: Sequence[str]) -> dict[str, np.ndarray]:
    """Each node's output for a batch of images, flattened: (n, n_features) float32 on the CPU.

    images: float (n, 3, h, w), prepared. What lies behind the last wanted node is not computed.
    """
    if not nodes:
        raise ValueError("features: no node is wanted; name at least one")
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise ValueError(f"features: images are {images.dtype} {tuple(images.shape)}; they must be float (n, 3, height, width)")
    found: dict[str, np.ndarray] = {}

    def catch(node: str) -> Callable[[nn.Module, object, torch.Tensor], None]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            # a copy, since an operation in place may come next
            found[node] = output.flatten(1).to("cpu", torch.float32, copy=True).numpy()
            if len(found) == len(set(nodes)):
                raise _Reached

        return hook

    modules = dict(network.named_modules())
    unknown = [node for node in nodes if node not in modules]
    if unknown:
        raise ValueError(f"features: {type(network).__name__} has no part called {unknown}")
    handles = [modules[node].register_forward_hook(catch(node)) for node in set(nodes)]
    try:
        network(images.to(next(network.parameters()).device))
    except _Reached:
        return {node: found[node] for node in nodes}
    finally:
        for handle in handles:
            handle.remove()
    raise ValueError(f"features: these parts take no part in a forward pass: {sorted(set(nodes) - found.keys())}")


def _torch_hub(file: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def _swav() -> nn.Module:
    network = tv.resnet50()
    network.fc = nn.Identity()  # the file has no classifier
    return network


def _torchvision(
    name: str, build: Callable[[], nn.Module], weights: tv.WeightsEnum, *nodes: str, keep: str | None = None
) -> Backbone:
    return Backbone(name, build, nodes, weights.url.rsplit("/", 1)[-1], weights.url, _torch_hub, keep=keep)


BACKBONES = {
    backbone.name: backbone
    for backbone in (
        _torchvision("alexnet", tv.alexnet, tv.AlexNet_Weights.IMAGENET1K_V1, "features.4", "features.11", keep="features"),
        _torchvision(
            "inception_v3",
            # as with torchvision's weights: input normalised for ImageNet is brought to [-1, 1] inside
            lambda: tv.inception_v3(transform_input=True, init_weights=False),
            tv.Inception_V3_Weights.IMAGENET1K_V1,
            "avgpool",
        ),
        # one architecture, two trainings, and papers report either
        _torchvision("efficientnet_b1_v1", tv.efficientnet_b1, tv.EfficientNet_B1_Weights.IMAGENET1K_V1, "avgpool"),
        _torchvision("efficientnet_b1_v2", tv.efficientnet_b1, tv.EfficientNet_B1_Weights.IMAGENET1K_V2, "avgpool"),
        Backbone(
            "swav_resnet50", _swav, ("avgpool",), SWAV_URL.rsplit("/", 1)[-1], SWAV_URL, _torch_hub,
            dropped=("projection_head.", "prototypes."),
        ),
        Backbone(
            "clip_vit_l14", lambda: CLIP(CLIPConfig.published()).model, ("visual",), CLIP_FILE,
            "open_clip's ViT-L-14-quickgelu, pretrained openai", lambda file: published_checkpoint(), keep="visual",
        ),
        Backbone(
            "clip_mini", lambda: CLIP(CLIPConfig.mini()).model, ("visual",), "clip.safetensors",
            "nsdray's mini models, jobs/train_mini_models.py --only clip", None, keep="visual",
        ),
    )
}
