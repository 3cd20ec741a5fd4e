"""Suites of picture metrics: a metric's name fixes weights, sizes, resizing, normalisation and comparison.

The same heading ("SSIM", "EffNet-B") is computed in different ways by different papers, so figures are comparable within
a suite only:

- `brain_diffuser`: Ozcelik & VanRullen 2023, which the project's paper follows. PIL resizing (antialiased), networks at 224,
  EfficientNet-B1 V1, pixels at 425, SSIM over columns.
- `mindeye`: MindEye, MindEye2, MindBridge, NeuroPictor. Everything goes through 256 x 256 first, tensors are resized
  bilinearly without antialiasing, Inception at 342, EfficientNet-B1 V2 at 255, SSIM in two dimensions.
- `mini`: pixel metrics and the mini CLIP at 64, for simulated data only.

Each suite has both SSIMs under their names; `printed` tells which one its papers mean. Here is what the suites are, and how
a picture is prepared; `nsdray.models.backbones` has the networks.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from nsdray.metrics.identification import centred, checked_pair, refuse_constant, two_way
from nsdray.metrics.pixel import PIXEL_METRICS
from nsdray.models.clip import MEAN, STD

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = (MEAN, STD)
PIL_FILTERS = {"pil_bilinear": Image.Resampling.BILINEAR, "pil_bicubic": Image.Resampling.BICUBIC}
TENSOR_BILINEAR = "tensor_bilinear"


@dataclass(frozen=True)
class Preparation:
    """From a uint8 picture to what is compared or fed to a network."""

    size: int
    """Pixels a side of the result; pictures that are not square are squeezed, as the references do."""
    resize: str
    """pil_bilinear or pil_bicubic: on the uint8 picture, antialiased. tensor_bilinear: on the float tensor, not antialiased."""
    first: int | None = None
    """Pixels a side that pictures are brought to before, in the same way. None: straight to size."""
    normalise: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    """Mean and standard deviation of the colours on [0, 1]. None: left in [0, 1]."""


@dataclass(frozen=True)
class Metric:
    """One way to score decoded pictures against true ones, to the last detail."""

    name: str
    """suite/metric: unique, and what results are stored under."""
    comparison: str
    """A name in COMPARISONS (of features) or PIXEL_METRICS (of pictures)."""
    preparation: Preparation
    backbone: str | None = None
    """A name in nsdray.models.backbones.BACKBONES. None: pixels are compared."""
    node: str | None = None
    printed: str | None = None
    """The heading under which the suite's papers print it. None: not in their tables."""

    @property
    def direction(self) -> str:
        """Which scores are better: "higher" or "lower"."""
        return "lower" if self.comparison == "correlation_distance" else "higher"

    @property
    def chance(self) -> float | None:
        """What decoding without a brain scores on average. None: not a constant, since all pictures share something; wrong
        pairs measure it (`nsdray.metrics.table.wrong_pairings`)."""
        return 0.5 if self.comparison == "two_way" else None


def correlation_distance(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """1 - Pearson correlation of each pair of rows, (n,) float64 in [0, 2]: equation 9 of the paper, scipy's `correlation`.

    Lower is better; 0 is perfect, 1 is uncorrelated. Chance lies below 1, since features share a mean: measure it with wrong
    pairs. truth, prediction: (n_images, n_features), any real dtype. A constant prediction has distance 1 (as PixCorr gives it
    0), where scipy's NaN would swallow the mean; a constant true row is refused.
    """
    truth, prediction = checked_pair(truth, prediction, "correlation distance")
    distances = np.empty(len(truth))
    images, constant = centred(truth, "correlation distance, truth")
    refuse_constant(constant, "correlation distance, truth")
    predictions, _ = centred(prediction, "correlation distance, prediction")
    for start in range(0, len(truth), 64):  # few rows at a time: float64 copies of them
        rows, everything = slice(start, start + 64), slice(None)
        products = images.unit(rows, everything, np.float64) * predictions.unit(rows, everything, np.float64)
        distances[rows] = 1 - products.sum(1)
    return distances


COMPARISONS = {"two_way": two_way, "correlation_distance": correlation_distance}


def prepare(pictures: np.ndarray, preparation: Preparation) -> torch.Tensor:
    """uint8 pictures (n, h, w, 3) to float32 (n, 3, size, size), resized and normalised as a metric says."""
    pictures = np.asarray(pictures)
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3 or not pictures.size:
        raise ValueError(f"pictures are {pictures.dtype} {pictures.shape}; they must be uint8 (n, height, width, 3), n >= 1")
    sizes = [size for size in (preparation.first, preparation.size) if size is not None]
    if preparation.resize in PIL_FILTERS:
        pictures = np.stack([_pil_resized(picture, sizes, PIL_FILTERS[preparation.resize]) for picture in pictures])
        images = _to_tensor(pictures)
    elif preparation.resize == TENSOR_BILINEAR:
        images = _to_tensor(pictures)
        for size in sizes:
            if images.shape[-2:] != (size, size):
                images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=False)
    else:
        raise ValueError(f"resize is {preparation.resize!r}; there are {', '.join([*PIL_FILTERS, TENSOR_BILINEAR])}")
    if preparation.normalise is None:
        return images
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in preparation.normalise)
    return (images - mean) / std


def _pil_resized(picture: np.ndarray, sizes: list[int], resample: Image.Resampling) -> np.ndarray:
    image = Image.fromarray(picture)
    for size in sizes:
        image = image.resize((size, size), resample)  # PIL returns a copy if it has that size
    return np.asarray(image)


def _to_tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))).float() / 255


def compare(metric: Metric, truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Per-image scores (n,) float64 from features (n, n_features) of the metric's node, true and decoded."""
    return COMPARISONS[metric.comparison](truth, prediction)


def pixel_scores(suite: str, truth: np.ndarray, prediction: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (metric's name, (n,) float64) for a suite's pixel metrics; uint8 pictures (n, h, w, 3), of two sizes if need be.

    Some 22 MB of memory an image at 425 pixels: call it in batches.
    """
    if len(truth) != len(prediction):
        raise ValueError(f"{len(truth)} true pictures and {len(prediction)} decoded ones; they must be pairs")
    prepared: dict[Preparation, tuple[np.ndarray, np.ndarray]] = {}
    for metric in find_suite(suite):
        if metric.backbone is None:
            how = metric.preparation
            if how not in prepared:
                pair = (prepare(pictures, how).permute(0, 2, 3, 1).numpy() for pictures in (truth, prediction))
                prepared[how] = tuple(np.clip(images, 0, 1) for images in pair)  # interpolation can leave by a rounding error
            yield metric.name, PIXEL_METRICS[metric.comparison](*prepared[how])


def passes(suite: str) -> dict[tuple[str, Preparation], tuple[Metric, ...]]:
    """A suite's feature metrics by network and preparation: each key is one forward pass over the pictures."""
    found: dict[tuple[str, Preparation], tuple[Metric, ...]] = {}
    for metric in find_suite(suite):
        if metric.backbone is not None:
            key = metric.backbone, metric.preparation
            found[key] = (*found.get(key, ()), metric)
    return found


def find_suite(name: str) -> tuple[Metric, ...]:
    """An entry of SUITES; ValueError lists the names."""
    if name not in SUITES:
        raise ValueError(f"no suite of metrics is called {name!r}; there are {', '.join(SUITES)}")
    return SUITES[name]


def _brain_diffuser() -> tuple[Metric, ...]:
    pixels = Preparation(425, "pil_bicubic")  # NSD's pictures have 425 and stay as they are
    imagenet = Preparation(224, "pil_bilinear", normalise=IMAGENET)
    clip = Preparation(224, "pil_bilinear", normalise=CLIP)
    return (
        Metric("brain_diffuser/pixcorr", "pixcorr", pixels, printed="PixCorr"),
        Metric("brain_diffuser/ssim_columns", "ssim_columns", pixels, printed="SSIM"),
        Metric("brain_diffuser/ssim", "ssim", pixels),
        Metric("brain_diffuser/alexnet2", "two_way", imagenet, "alexnet", "features.4", "AlexNet(2)"),
        Metric("brain_diffuser/alexnet5", "two_way", imagenet, "alexnet", "features.11", "AlexNet(5)"),
        Metric("brain_diffuser/inception", "two_way", imagenet, "inception_v3", "avgpool", "InceptionV3"),
        Metric("brain_diffuser/clip", "two_way", clip, "clip_vit_l14", "visual", "CLIP"),
        Metric(
            "brain_diffuser/effnet_b1_v1", "correlation_distance", imagenet, "efficientnet_b1_v1", "avgpool", "EffNet-B"
        ),
        Metric("brain_diffuser/swav", "correlation_distance", imagenet, "swav_resnet50", "avgpool", "SwAV"),
    )


def _mindeye() -> tuple[Metric, ...]:
    def at(size: int, normalise: tuple[tuple[float, ...], tuple[float, ...]] | None) -> Preparation:
        return Preparation(size, TENSOR_BILINEAR, first=256, normalise=normalise)

    return (
        Metric("mindeye/pixcorr", "pixcorr", at(425, None), printed="PixCorr"),
        Metric("mindeye/ssim", "ssim", at(425, None), printed="SSIM"),
        Metric("mindeye/ssim_columns", "ssim_columns", at(425, None)),
        Metric("mindeye/alexnet2", "two_way", at(256, IMAGENET), "alexnet", "features.4", "AlexNet(2)"),
        Metric("mindeye/alexnet5", "two_way", at(256, IMAGENET), "alexnet", "features.11", "AlexNet(5)"),
        Metric("mindeye/inception", "two_way", at(342, IMAGENET), "inception_v3", "avgpool", "InceptionV3"),
        # MindEye's script runs CLIP in float16 on a GPU; here it is float32
        Metric("mindeye/clip", "two_way", at(224, CLIP), "clip_vit_l14", "visual", "CLIP"),
        Metric(
            "mindeye/effnet_b1_v2", "correlation_distance", at(255, IMAGENET), "efficientnet_b1_v2", "avgpool", "EffNet-B"
        ),
        Metric("mindeye/swav", "correlation_distance", at(224, IMAGENET), "swav_resnet50", "avgpool", "SwAV"),
    )


def _mini() -> tuple[Metric, ...]:
    pixels = Preparation(64, "pil_bicubic")
    return (
        Metric("mini/pixcorr", "pixcorr", pixels),
        Metric("mini/ssim", "ssim", pixels),
        Metric("mini/ssim_columns", "ssim_columns", pixels),
        Metric("mini/clip", "two_way", Preparation(64, "pil_bicubic", normalise=CLIP), "clip_mini", "visual"),
    )


SUITES = {"brain_diffuser": _brain_diffuser(), "mindeye": _mindeye(), "mini": _mini()}
