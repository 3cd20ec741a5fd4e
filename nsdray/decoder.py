"""A fitted model that decodes one new image: betas in, picture out. No targets, no cluster, no Ray.

A decoder is a folder:

- ``decoder.json``: which regressor, which targets (with the SHA-256 of the network that made them), how to rescale
- ``scaling.safetensors``: voxel indices, z-score of the betas, moments of the targets and of held-out predictions
- the regressor's weights: ``network.safetensors``, or for ridge one file per column of the targets, such as
  ``ridge_layer_07.safetensors`` (if they were asked for: ``ridge.weights``): "weights" (n_voxels, n_targets), or "dual", what
  ``training_betas.safetensors`` (n_train, n_voxels) is multiplied with to predict betas: betas @ training_betas.T @ dual +
  intercept. Where all targets have one alpha, "dual" are the training targets themselves, float16, and the training betas are
  multiplied by the inverse of the kernel; else dual coefficients and the betas
- of ridge: ``alphas.safetensors``, ``ridge_report.json`` (what was chosen and how well it predicts; `nsdray.cluster.ridge`)
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import numpy as safetensors_numpy
from safetensors.torch import load_file

from nsdray.generators.stage1 import decode_pictures
from nsdray.mini import weights_path
from nsdray.models.vdvae import VDVAE, VDVAEConfig, load_vdvae
from nsdray.regressors import REGRESSORS
from nsdray.regressors.scaling import moments, rescale, zscore
from nsdray.training import predict


@dataclass(frozen=True)
class DecoderCard:
    """Contents of decoder.json."""

    subject: int
    regressor: str
    """"ridge" or a name in REGRESSORS."""
    kind: str
    """What it predicts: "vdvae", "clip_vision" or "clip_text"."""
    columns: list[str]
    """Names of the predicted columns: VDVAE layers or CLIP tokens."""
    shapes: list[list[int]]
    """Shape of a cell in each of them, e.g. (zdim, r, r) of a layer."""
    rescale: str
    """"train_moments", "test_moments" or "none"."""
    source: str
    """The network whose latents or tokens they are: "mini", "imagenet64" or "ViT-L-14"."""
    source_sha256: str
    simulated: bool
    """True if the betas are those of the miniature NSD."""
    network: dict
    """Arguments of the network beyond its sizes."""


@dataclass
class Scaling:
    """Fitted on training images only. All float32 but for voxel_index (int64)."""

    voxel_index: np.ndarray
    """(n_voxels,) flat index of each voxel in C order of the volume."""
    betas_mean: np.ndarray
    betas_std: np.ndarray
    latents_mean: np.ndarray
    """(n_targets,) moments of the training latents."""
    latents_std: np.ndarray
    predictions_mean: np.ndarray
    """(n_targets,) moments of the predictions for images that the regressor was not fitted to."""
    predictions_std: np.ndarray

    def to_bytes(self) -> bytes:
        return safetensors_numpy.save({name: np.ascontiguousarray(value) for name, value in vars(self).items()})


class Decoder:
    """Betas of one subject to latents and to the stage-1 picture."""

    def __init__(self, card: DecoderCard, scaling: Scaling, network: torch.nn.Module | None,
                 ridge: list[dict[str, np.ndarray]] | None, vdvae: VDVAE | None = None):  # fmt: skip
        self.card, self.scaling, self.network, self.ridge, self._vdvae = card, scaling, network, ridge, vdvae
        self.training_betas: np.ndarray | None = None
        """What dual coefficients are multiplied with, (n_train, n_voxels)."""

    @classmethod
    def load(cls, folder: str | Path, vdvae: VDVAE | None = None) -> Decoder:
        """Load a folder ``models/<model>/subject=NN``. vdvae: the loaded VDVAE; None loads the packaged mini one when
        `decode` needs it."""
        folder = Path(folder)
        if not (folder / "decoder.json").is_file():
            raise FileNotFoundError(f"{folder} holds no decoder.json; give a finished folder models/<model>/subject=NN")
        card = DecoderCard(**json.loads((folder / "decoder.json").read_text()))
        scaling = Scaling(**safetensors_numpy.load_file(folder / "scaling.safetensors"))
        if card.regressor == "ridge":
            files = [folder / f"ridge_{name}.safetensors" for name in card.columns]
            if not files[0].exists():
                raise FileNotFoundError(f"{folder} holds no weights: fit again with --ridge.weights all (or vdvae)")
            decoder = cls(card, scaling, None, [safetensors_numpy.load_file(file) for file in files], vdvae)
            if "dual" in decoder.ridge[0]:
                decoder.training_betas = safetensors_numpy.load_file(folder / "training_betas.safetensors")["betas"]
            return decoder
        network = REGRESSORS[card.regressor](len(scaling.betas_mean), len(scaling.latents_mean), **card.network)
        network.load_state_dict(load_file(folder / "network.safetensors"))
        return cls(card, scaling, network.eval(), None, vdvae)

    @property
    def vdvae(self) -> VDVAE:
        if self.card.kind != "vdvae":
            raise ValueError(f"this decoder predicts {self.card.kind} tokens, not pictures; use predict")
        if self._vdvae is None:
            if self.card.source != "mini":
                raise ValueError(
                    "this decoder needs the published VDVAE: load it with nsdray.models.vdvae.load_vdvae(FILE, "
                    "VDVAEConfig.imagenet64()) and pass it as Decoder.load(folder, vdvae=…)"
                )
            path = weights_path("vdvae")
            if hashlib.sha256(path.read_bytes()).hexdigest() != self.card.source_sha256:
                raise ValueError(f"this decoder was fitted to the latents of another VDVAE than {path}; fit it again")
            self._vdvae = load_vdvae(path, VDVAEConfig.mini())
        return self._vdvae

    def raw_predictions(self, betas: np.ndarray) -> np.ndarray:
        """Latents before rescaling, float32 (n, n_targets). betas: (n, n_voxels) percent signal change."""
        betas, s = np.asarray(betas, np.float32), self.scaling
        if betas.ndim != 2 or betas.shape[1] != len(s.betas_mean):
            raise ValueError(
                f"betas have shape {betas.shape}; this decoder of subject {self.card.subject} wants "
                f"(n, {len(s.betas_mean)}), the voxels of scaling.voxel_index"
            )
        if not np.isfinite(betas).all():
            raise ValueError(f"betas hold {np.count_nonzero(~np.isfinite(betas))} values that are not finite")
        x = zscore(betas, s.betas_mean, s.betas_std)
        if self.ridge is not None:
            name, x = ("weights", x) if self.training_betas is None else ("dual", x @ self.training_betas.T)
            predictions = np.concatenate([x @ layer[name] + layer["intercept"] for layer in self.ridge], 1)
            return predictions.astype(np.float32, copy=False)
        return predict(self.network, x, s.latents_mean, s.latents_std).numpy()

    def predict(self, betas: np.ndarray) -> list[np.ndarray]:
        """Rescaled targets, one float32 array per column: (n, zdim, r, r) of a layer, (n, d) of a token. betas:
        (n, n_voxels) percent signal change."""
        return self.rescaled(self.raw_predictions(betas))

    def rescaled(self, targets: np.ndarray) -> list[np.ndarray]:
        """Raw predictions (n, n_targets), rescaled and cut into columns."""
        return rescaled(self.card, self.scaling, targets)

    def decode(self, betas: np.ndarray, image_ids: Sequence[int] | None = None, **settings) -> np.ndarray:
        """Stage-1 pictures, uint8 (n, s, s, 3), or (s, s, 3) for betas of one image (n_voxels,).

        betas: percent signal change, voxels as in scaling.voxel_index. image_ids key the draws of the layers that are
        not predicted (default: 0, 1, …); settings: seed, temperature, deterministic, as `decode_pictures`.
        """
        betas = np.asarray(betas)
        batch = betas[None] if betas.ndim == 1 else betas
        image_ids = range(len(batch)) if image_ids is None else image_ids
        pictures = decode_pictures(self.vdvae, self.predict(batch), image_ids, **settings)
        return pictures[0] if betas.ndim == 1 else pictures


def rescaled(
    card: DecoderCard, s: Scaling, targets: np.ndarray, test_moments: tuple[np.ndarray, np.ndarray] | None = None
) -> list[np.ndarray]:
    """Raw predictions (n, n_targets) with the spread that the card asks for, cut into columns.

    test_moments: mean and standard deviation (ddof 0, as Brain-Diffuser) of the whole test set's predictions where targets are a
    part of it; None: those of the targets.
    """
    if card.rescale == "train_moments":
        targets = rescale(targets, s.predictions_mean, s.predictions_std, s.latents_mean, s.latents_std)
    elif card.rescale == "test_moments":
        if test_moments is None and len(targets) < 2:
            raise ValueError("rescale='test_moments' needs the whole test set, not one image; use 'train_moments'")
        targets = rescale(targets, *(test_moments or moments(targets, ddof=0)), s.latents_mean, s.latents_std)
    return cut_columns(targets, card.shapes)


def cut_columns(targets: np.ndarray, shapes: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Flat targets (n, n_targets), cut into columns (n, *shape)."""
    columns = np.split(targets, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1], 1)
    return [z.reshape(len(z), *shape) for z, shape in zip(columns, shapes)]


def card_bytes(card: DecoderCard) -> bytes:
    """decoder.json's contents."""
    return json.dumps(asdict(card), indent=1).encode()
