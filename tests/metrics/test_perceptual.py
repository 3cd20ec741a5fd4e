"""Suites: preparation against torchvision's transforms written out, correlation distance against scipy, and the tables."""
from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.spatial.distance
import torch
from PIL import Image
from skimage.color import rgb2gray
from skimage.metrics import structural_similarity
from torchvision import transforms
from torchvision.transforms import functional as TF

from nsdray.metrics.perceptual import (
    COMPARISONS,
    SUITES,
    Metric,
    Preparation,
    compare,
    correlation_distance,
    find_suite,
    passes,
    pixel_scores,
    prepare,
)
from nsdray.metrics.pixel import PIXEL_METRICS
from nsdray.models.backbones import BACKBONES

IMAGENET = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
CLIP = transforms.Normalize(mean=[0.48145466, 0.4578275, 0.40821073], std=[0.26862954, 0.26130258, 0.27577711])
METRICS = {metric.name: metric for suite in SUITES.values() for metric in suite}


def draw(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Fine stripes and noise, uint8: pictures that antialiasing alters."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    stripes = 127 + 100 * np.sin(x * random.uniform(0.5, 3, (n, 1, 1)) + y * random.uniform(0.1, 3, (n, 1, 1)))
    return (stripes[..., None] + random.normal(0, 20, (n, height, width, 3))).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("shape", [(512, 512), (425, 425), (64, 64), (300, 200)])
@pytest.mark.parametrize(
    "name, normalise",
    [("alexnet2", IMAGENET), ("alexnet5", IMAGENET), ("inception", IMAGENET), ("clip", CLIP), ("swav", IMAGENET),
     ("effnet_b1_v1", IMAGENET)],
)  # fmt: skip
def test_brain_diffuser_prepares_as_its_script(shape, name, normalise):
    """PIL picture, resize to (224, 224), to_tensor, normalise."""
    pictures = draw(2, *shape)
    expected = torch.stack([normalise(TF.to_tensor(TF.resize(Image.fromarray(p), (224, 224))).float()) for p in pictures])
    prepared = prepare(pictures, METRICS[f"brain_diffuser/{name}"].preparation)
    assert prepared.dtype == torch.float32 and prepared.shape == (2, 3, 224, 224) and prepared.is_contiguous()
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(512, 512), (425, 425), (64, 64), (300, 200)])
@pytest.mark.parametrize(
    "name, size, normalise",
    [("alexnet2", 256, IMAGENET), ("alexnet5", 256, IMAGENET), ("inception", 342, IMAGENET), ("clip", 224, CLIP),
     ("swav", 224, IMAGENET), ("effnet_b1_v2", 255, IMAGENET), ("pixcorr", 425, None), ("ssim", 425, None)],
)  # fmt: skip
def test_mindeye_prepares_as_its_notebook(shape, name, size, normalise):
    """Float tensors to (256, 256), then to size, bilinear and, as torchvision 0.15 did by default, not antialiased."""
    pictures = draw(2, *shape)
    bilinear = transforms.InterpolationMode.BILINEAR
    steps = [transforms.Resize((256, 256), bilinear, antialias=False), transforms.Resize(size, bilinear, antialias=False)]
    steps += [normalise] if normalise else []
    expected = transforms.Compose(steps)(torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255)
    prepared = prepare(pictures, METRICS[f"mindeye/{name}"].preparation)
    assert prepared.dtype == torch.float32 and prepared.shape == (2, 3, size, size)
    torch.testing.assert_close(prepared, expected, rtol=0, atol=1e-6)


def test_antialiasing_is_a_difference():
    pictures = draw(2, 512, 512)
    pil, tensor = (prepare(pictures, METRICS[f"{suite}/swav"].preparation) for suite in ("brain_diffuser", "mindeye"))
    assert (pil - tensor).abs().mean() > 0.1


def test_brain_diffuser_scores_pixels_as_its_script():
    """Decoded 512 to 425 by PIL's default (bicubic), NSD's 425 as it is, and scikit-image 0.17's SSIM: columns."""
    truth, decoded = draw(2, 425, 425), draw(2, 512, 512)
    scores = dict(pixel_scores("brain_diffuser", truth, decoded))
    assert list(scores) == ["brain_diffuser/pixcorr", "brain_diffuser/ssim_columns", "brain_diffuser/ssim"]
    how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    for i in range(2):
        generated = np.array(Image.fromarray(decoded[i]).resize((425, 425))) / 255.0
        seen = truth[i] / 255.0
        correlation = np.corrcoef(seen.reshape(1, -1), generated.reshape(1, -1))[0, 1]
        assert scores["brain_diffuser/pixcorr"][i] == pytest.approx(correlation, rel=1e-6)
        grey = rgb2gray(generated), rgb2gray(seen)
        columns = structural_similarity(*grey, channel_axis=-1, **how)
        assert scores["brain_diffuser/ssim_columns"][i] == pytest.approx(columns, rel=1e-5)
        assert scores["brain_diffuser/ssim"][i] == pytest.approx(structural_similarity(*grey, **how), rel=1e-5)


def test_mindeye_scores_pixels_as_its_notebook():
    truth, decoded = draw(2, 425, 425), draw(2, 512, 512)
    scores = dict(pixel_scores("mindeye", truth, decoded))
    resize = transforms.Compose([transforms.Resize(size, antialias=False) for size in ((256, 256), 425)])
    x, y = (resize(torch.from_numpy(p).permute(0, 3, 1, 2) / 255).numpy() for p in (truth, decoded))
    how = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)
    for i in range(2):
        assert scores["mindeye/pixcorr"][i] == pytest.approx(np.corrcoef(x[i].ravel(), y[i].ravel())[0, 1], rel=1e-5)
        grey = [rgb2gray(z[i].transpose(1, 2, 0).astype(np.float64)) for z in (x, y)]
        assert scores["mindeye/ssim"][i] == pytest.approx(structural_similarity(*grey, **how), rel=1e-5)
        columns = structural_similarity(*grey, channel_axis=-1, **how)
        assert scores["mindeye/ssim_columns"][i] == pytest.approx(columns, rel=1e-5)


def test_correlation_distance_against_scipy():
    random = np.random.default_rng(0)
    truth = random.normal(3, 1, (130, 500))  # more rows than are handled at once
    prediction = truth * 2 + random.normal(0, 3, (130, 500))
    expected = [scipy.spatial.distance.correlation(x, y) for x, y in zip(truth, prediction)]
    np.testing.assert_allclose(correlation_distance(truth, prediction), expected, rtol=1e-10)
    single = correlation_distance(truth.astype(np.float32), prediction.astype(np.float32))
    np.testing.assert_allclose(single, expected, rtol=1e-5)
    np.testing.assert_allclose(correlation_distance(truth, 5 * truth + 1), 0, atol=1e-12)
    np.testing.assert_allclose(correlation_distance(truth, -truth), 2)
    assert correlation_distance(truth[:1], prediction[:1])[0] == pytest.approx(expected[0])


def test_correlation_distance_of_a_constant_row():
    random = np.random.default_rng(0)
    truth, prediction = random.normal(size=(2, 6, 50))
    prediction[2] = 0.3
    assert correlation_distance(truth, prediction)[2] == 1
    truth[4] = 0.1
    with pytest.raises(ValueError, match=r"correlation distance, truth: 1 of 6 rows are constant.*first \[4\]"):
        correlation_distance(truth, prediction)


def test_suites_hold_together():
    for suite, metrics in SUITES.items():
        for metric in metrics:
            assert metric.name.startswith(f"{suite}/")
            if metric.backbone is None:
                assert metric.comparison in PIXEL_METRICS and metric.node is None and metric.preparation.normalise is None
            else:
                assert metric.comparison in COMPARISONS and metric.node in BACKBONES[metric.backbone].nodes
            assert metric.direction == ("lower" if metric.comparison == "correlation_distance" else "higher")
            assert metric.chance == (0.5 if metric.comparison == "two_way" else None)
    assert len(METRICS) == sum(map(len, SUITES.values()))
    headings = {"PixCorr", "SSIM", "AlexNet(2)", "AlexNet(5)", "InceptionV3", "CLIP", "EffNet-B", "SwAV"}
    for suite in ("brain_diffuser", "mindeye"):
        printed = [metric.printed for metric in SUITES[suite] if metric.printed]
        assert len(printed) == 8 and set(printed) == headings


def test_the_suites_differ_where_the_papers_do():
    """Which SSIM is printed, whose EfficientNet, and which sizes."""
    printed = {suite: {m.printed: m for m in SUITES[suite] if m.printed} for suite in ("brain_diffuser", "mindeye")}
    ours, theirs = printed["brain_diffuser"], printed["mindeye"]
    assert (ours["SSIM"].comparison, theirs["SSIM"].comparison) == ("ssim_columns", "ssim")
    assert (ours["EffNet-B"].backbone, theirs["EffNet-B"].backbone) == ("efficientnet_b1_v1", "efficientnet_b1_v2")
    networks = ["AlexNet(2)", "AlexNet(5)", "InceptionV3", "CLIP", "EffNet-B", "SwAV"]
    assert [ours[heading].preparation.size for heading in networks] == [224] * 6
    assert [theirs[heading].preparation.size for heading in networks] == [256, 256, 342, 224, 255, 224]
    assert {metric.preparation.first for metric in ours.values()} == {None}
    assert {metric.preparation.first for metric in theirs.values()} == {256}
    assert {printed[s][h].node for s in printed for h in ["AlexNet(2)"]} == {"features.4"}
    assert {printed[s][h].node for s in printed for h in ["AlexNet(5)"]} == {"features.11"}


def test_passes_share_what_is_the_same():
    """Both AlexNet layers from one pass over the same pictures."""
    for suite in ("brain_diffuser", "mindeye"):
        groups = passes(suite)
        assert len(groups) == 5
        assert [len(group) for group in groups.values()] == [2, 1, 1, 1, 1]
        assert {m for group in groups.values() for m in group} == {m for m in SUITES[suite] if m.backbone}
        for (backbone, preparation), group in groups.items():
            assert {(m.backbone, m.preparation) for m in group} == {(backbone, preparation)}
    assert [key[0] for key in passes("mini")] == ["clip_mini"]


def test_compare_uses_the_metrics_comparison():
    truth, prediction = np.random.default_rng(0).normal(size=(2, 8, 30))
    np.testing.assert_array_equal(
        compare(METRICS["mindeye/swav"], truth, prediction), correlation_distance(truth, prediction)
    )
    np.testing.assert_array_equal(compare(METRICS["mindeye/clip"], truth, truth), 1)


def test_metrics_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        METRICS["mindeye/swav"].name = "other"
    assert hash(METRICS["mindeye/swav"])


def test_errors():
    pictures = draw(2, 40, 40)
    pixels = METRICS["mini/ssim"].preparation
    with pytest.raises(ValueError, match=r"pictures are float64 \(2, 40, 40, 3\); they must be uint8"):
        prepare(pictures / 255, pixels)
    with pytest.raises(ValueError, match=r"pictures are uint8 \(40, 40, 3\)"):
        prepare(pictures[0], pixels)
    with pytest.raises(ValueError, match=r"pictures are uint8 \(2, 3, 40, 40\)"):
        prepare(pictures.transpose(0, 3, 1, 2), pixels)
    with pytest.raises(ValueError, match="n >= 1"):
        prepare(pictures[:0], pixels)
    with pytest.raises(ValueError, match="resize is 'lanczos'; there are pil_bilinear, pil_bicubic, tensor_bilinear"):
        prepare(pictures, Preparation(64, "lanczos"))
    with pytest.raises(ValueError, match="'brain-diffuser'; there are brain_diffuser, mindeye, mini"):
        find_suite("brain-diffuser")
    with pytest.raises(ValueError, match="no suite of metrics is called 'all'"):
        passes("all")
    with pytest.raises(ValueError, match="2 true pictures and 1 decoded ones"):
        list(pixel_scores("mini", pictures, pictures[:1]))
    with pytest.raises(ValueError, match=r"truth has shape \(2, 5\) and prediction \(2, 6\)"):
        correlation_distance(np.ones((2, 5)), np.ones((2, 6)))
    assert isinstance(find_suite("mini")[0], Metric)
