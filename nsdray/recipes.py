"""Named complete configurations. A new experiment is a recipe, not a flag."""
from __future__ import annotations

from nsdray.config import Config, DataConfig, GRUConfig, RidgeConfig, Stage1Config, TargetsConfig


def mini() -> Config:
    """Ridge and GRU on the miniature NSD (SIMULATED): no download, no GPU, minutes on two cores."""
    return Config(
        recipe="mini",
        ridge=RidgeConfig(alpha=4_000.0),  # 50,000 scaled to some 1,250 voxels
        # strong regularisation: only 540 images are fitted to
        gru=GRUConfig(learning_rate=4e-3, weight_decay=2.0, dropout=0.7, batch_size=32, n_epochs=40, patience=8),
        stage1=Stage1Config(deterministic=True),
    )


def _nsd(name: str, model: str, n_layers: int) -> Config:
    return Config(
        recipe=name,
        models=(model,),
        n_layers=n_layers,
        data=DataConfig(protocol="nsd37"),
        targets=TargetsConfig(vdvae="imagenet64", n_layers=31),
    )


def gru_15() -> Config:
    """The paper's GRU, 15 layers (13,344 latents). Needs NSD and OpenAI's VDVAE checkpoint."""
    return _nsd("gru-15", "gru", 15)


def gru_31() -> Config:
    """The paper's GRU, 31 layers (91,168 latents). Needs NSD and OpenAI's VDVAE checkpoint."""
    return _nsd("gru-31", "gru", 31)


def ridge_15() -> Config:
    """Ridge, 15 layers, alpha 50,000. Needs NSD and OpenAI's VDVAE checkpoint."""
    return _nsd("ridge-15", "ridge", 15)


def ridge_31() -> Config:
    """Ridge, 31 layers, alpha 50,000 (Brain-Diffuser's first stage). Needs NSD and OpenAI's VDVAE checkpoint."""
    return _nsd("ridge-31", "ridge", 31)


RECIPES = {"mini": mini, "gru-15": gru_15, "gru-31": gru_31, "ridge-15": ridge_15, "ridge-31": ridge_31}
