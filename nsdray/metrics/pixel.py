"""Pixel metrics: PixCorr, the two SSIMs of the literature, and PSNR.

All take pairs of pictures (n, h, w, 3), uint8 in 0..255 or float in [0, 1], and return one float64 score per pair.

Published SSIMs are not on one scale: scikit-image before 0.20 read ``multichannel=True`` on a grey picture as "the last
axis is channels" and averaged one-dimensional SSIMs over the columns; later versions ignore the argument and compute
the ordinary two-dimensional SSIM. Both are here, under their own names, and must not be compared with each other.
"""
from __future__ import annotations

import numpy as np
from scipy.ndimage import correlate1d

SIGMA, TRUNCATE = 1.5, 3.5  # Wang et al. 2004; an 11-tap window, as in scikit-image
K1, K2 = 0.01, 0.03
LUMA = np.array([0.2125, 0.7154, 0.0721])  # scikit-image's rgb2gray


def as_float(images: np.ndarray) -> np.ndarray:
    """Pictures (n, h, w, 3) as float64 in [0, 1]."""
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"pictures have shape {images.shape}, expected (n, height, width, 3)")
    if images.dtype == np.uint8:
        return images / 255.0
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"pictures are {images.dtype}; give uint8 in 0..255 or float in [0, 1]")
    if len(images) and not (images.min() >= -1e-6 and images.max() <= 1 + 1e-6):
        raise ValueError(
            f"float pictures range over [{images.min():.3g}, {images.max():.3g}]; they must be in [0, 1]. "
            "Divide 0..255 floats by 255 or pass uint8."
        )
    return images.astype(np.float64)


def _pairs(truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    truth, prediction = as_float(truth), as_float(prediction)
    if truth.shape != prediction.shape:
        raise ValueError(f"truth has shape {truth.shape} but prediction {prediction.shape}; resize one to the other")
    return truth, prediction


def pixcorr(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Pearson correlation of all pixel values of each pair, (n,).

    Higher is better; 1 is perfect; a constant picture scores 0. Chance is not 0 for pictures that share a layout:
    compare with wrongly paired ones.
    """
    truth, prediction = (x.reshape(len(x), -1) for x in _pairs(truth, prediction))
    truth = truth - truth.mean(1, keepdims=True)
    prediction = prediction - prediction.mean(1, keepdims=True)
    norms = np.linalg.norm(truth, axis=1) * np.linalg.norm(prediction, axis=1)
    return np.divide((truth * prediction).sum(1), norms, out=np.zeros(len(norms)), where=norms > 1e-12)


def psnr(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in decibels, 10 log10(1 / MSE), (n,). Higher is better; identical pictures give inf."""
    truth, prediction = _pairs(truth, prediction)
    error = ((truth - prediction) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return -10 * np.log10(error)


def ssim(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Structural similarity of the grey pictures with a two-dimensional Gaussian window (sigma 1.5), (n,).

    Wang et al. 2004, population covariance, data range 1, mean over the picture less a border of 5 pixels. Higher is better; 1 is
    perfect. What MindEye and later papers report.
    """
    return _ssim(truth, prediction, axes=(1, 2))


def ssim_columns(truth: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """Mean over the picture's columns of one-dimensional SSIMs along each column, (n,).

    What Brain-Diffuser's script computes under its pinned scikit-image 0.17. On natural pictures some 0.1 higher than
    `ssim` (which see for the formula). Higher is better; 1 is perfect.
    """
    return _ssim(truth, prediction, axes=(1,))


def _ssim(truth: np.ndarray, prediction: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    x, y = (images @ LUMA for images in _pairs(truth, prediction))  # (n, h, w)
    radius = int(TRUNCATE * SIGMA + 0.5)
    if min(x.shape[axis] for axis in axes) < 2 * radius + 1:
        raise ValueError(f"pictures are {x.shape[1]} x {x.shape[2]}; SSIM's window needs at least {2 * radius + 1}")
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / SIGMA) ** 2)
    taps /= taps.sum()

    def blur(images: np.ndarray) -> np.ndarray:
        for axis in axes:
            images = correlate1d(images, taps, axis=axis, mode="reflect")
        return images

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = K1**2, K2**2
    score = ((2 * mean_x * mean_y + c1) * (2 * covariance + c2)) / (
        (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    )
    crop = tuple(slice(radius, -radius) if axis in axes else slice(None) for axis in range(3))
    return score[crop].mean((1, 2))


PIXEL_METRICS = {"pixcorr": pixcorr, "ssim": ssim, "ssim_columns": ssim_columns}
