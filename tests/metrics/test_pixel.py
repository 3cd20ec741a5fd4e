"""Pixel metrics against NumPy and scikit-image."""
from __future__ import annotations

import numpy as np
import pytest
from skimage.color import rgb2gray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from nsdray.metrics.pixel import PIXEL_METRICS, pixcorr, psnr, ssim, ssim_columns

WANG = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0)


@pytest.fixture(scope="module")
def pairs() -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures and noisy versions of them, (4, 40, 33, 3) uint8."""
    random = np.random.default_rng(0)
    y, x = np.mgrid[:40, :33]
    phase = random.uniform(0, 6, (4, 1, 1, 3))
    truth = 127 + 90 * np.sin(x[None, :, :, None] / 5 + phase) * np.cos(y[None, :, :, None] / 7 + phase)
    prediction = truth * 0.8 + random.normal(0, [5, 15, 30, 60], (40, 33, 3, 4)).transpose(3, 0, 1, 2)
    return truth.astype(np.uint8), prediction.clip(0, 255).astype(np.uint8)


def test_pixcorr(pairs):
    expected = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(*pairs)]
    np.testing.assert_allclose(pixcorr(*pairs), expected, rtol=1e-10)


def test_pixcorr_of_a_constant_picture_is_zero(pairs):
    assert (pixcorr(pairs[0], np.full_like(pairs[0], 77)) == 0).all()


def test_psnr(pairs):
    expected = [peak_signal_noise_ratio(a, b, data_range=255) for a, b in zip(*pairs)]
    np.testing.assert_allclose(psnr(*pairs), expected, rtol=1e-10)
    assert np.isposinf(psnr(pairs[0], pairs[0])).all()


def test_ssim(pairs):
    expected = [structural_similarity(rgb2gray(a), rgb2gray(b), **WANG) for a, b in zip(*pairs)]
    np.testing.assert_allclose(ssim(*pairs), expected, rtol=1e-9)


def test_ssim_columns(pairs):
    """scikit-image <= 0.19 with multichannel=True on a grey picture: a 1-D SSIM per column, then their mean."""
    expected = [
        np.mean([structural_similarity(a[:, i], b[:, i], **WANG) for i in range(a.shape[1])])
        for a, b in zip(*(rgb2gray(pictures) for pictures in pairs))
    ]
    np.testing.assert_allclose(ssim_columns(*pairs), expected, rtol=1e-9)
    assert not np.allclose(ssim_columns(*pairs), ssim(*pairs), atol=0.01)
    # which is what today's scikit-image does when told that the last axis of a grey picture is channels
    expected = [structural_similarity(rgb2gray(a), rgb2gray(b), channel_axis=-1, **WANG) for a, b in zip(*pairs)]
    np.testing.assert_allclose(ssim_columns(*pairs), expected, rtol=1e-9)


def test_ssim_columns_against_a_plain_loop(pairs):
    """Every window of 11 pixels of every column, by the formula of Wang et al. 2004, and no library."""
    window = [np.exp(-0.5 * (k / 1.5) ** 2) for k in range(-5, 6)]
    window = [w / sum(window) for w in window]
    for truth, prediction, score in zip(*pairs, ssim_columns(*pairs)):
        x, y = (p.astype(float) / 255 @ [0.2125, 0.7154, 0.0721] for p in (truth, prediction))
        scores = []
        for column in range(x.shape[1]):
            for top in range(x.shape[0] - 10):
                a, b = x[top : top + 11, column], y[top : top + 11, column]
                mean_a, mean_b = sum(window * a), sum(window * b)
                var_a, var_b = sum(window * (a - mean_a) ** 2), sum(window * (b - mean_b) ** 2)
                covariance = sum(window * (a - mean_a) * (b - mean_b))
                scores.append(
                    (2 * mean_a * mean_b + 1e-4) * (2 * covariance + 9e-4)
                    / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))
                )
        assert score == pytest.approx(np.mean(scores), rel=1e-9)


@pytest.mark.parametrize("metric", PIXEL_METRICS.values(), ids=PIXEL_METRICS)
def test_uint8_and_float_agree_and_identical_is_one(metric, pairs):
    truth, prediction = pairs
    np.testing.assert_allclose(metric(truth / 255, prediction / 255), metric(*pairs), rtol=1e-12)
    np.testing.assert_allclose(metric(truth / 255, prediction), metric(*pairs), rtol=1e-12)
    single = metric((truth / 255).astype(np.float32), (prediction / 255).astype(np.float32))
    np.testing.assert_allclose(single, metric(*pairs), rtol=1e-5)
    np.testing.assert_allclose(metric(truth, truth), 1)
    np.testing.assert_allclose(metric(truth[2:3], prediction[2:3])[0], metric(*pairs)[2], rtol=1e-12)


def test_errors(pairs):
    truth, prediction = pairs
    with pytest.raises(ValueError, match=r"shape \(40, 33, 3\), expected \(n, height, width, 3\)"):
        pixcorr(truth[0], prediction[0])
    with pytest.raises(ValueError, match=r"expected \(n, height, width, 3\)"):
        pixcorr(truth.transpose(0, 3, 1, 2), prediction)
    with pytest.raises(ValueError, match="pictures are int64; give uint8"):
        psnr(truth.astype(np.int64), prediction)
    with pytest.raises(ValueError, match=r"float pictures range over .* must be in \[0, 1\]"):
        ssim(truth.astype(np.float64), prediction)
    with pytest.raises(ValueError, match=r"range over \[nan, nan\]"):
        ssim(truth * np.nan, prediction)
    with pytest.raises(ValueError, match="resize one to the other"):
        ssim(truth, prediction[:, :20])
    with pytest.raises(ValueError, match="pictures are 10 x 33; SSIM's window needs at least 11"):
        ssim(truth[:, :10], prediction[:, :10])
    with pytest.raises(ValueError, match="at least 11"):
        ssim_columns(truth[:, :10], prediction[:, :10])
