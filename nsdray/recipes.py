"""Named complete configurations. A new experiment is a recipe, not a flag."""
from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsdray.config import (
    ClipConfig,
    Config,
    ConvConfig,
    DataConfig,
    EvaluationConfig,
    GRUConfig,
    MLPConfig,
    RidgeConfig,
    SearchConfig,
    Stage1Config,
    Stage2Config,
    TargetsConfig,
    TransformerConfig,
)


def mini() -> Config:
    """Ridge and GRU on the miniature NSD (SIMULATED): no download, no GPU, minutes on two cores."""
    # strong regularisation: only 540 images are fitted to
    training = {"batch_size": 32, "n_epochs": 40}
    return Config(
        recipe="mini",
        ridge=RidgeConfig(alpha=4_000.0, alpha_vision=4_000.0, alpha_text=4_000.0),  # 50,000 scaled to some 1,250 voxels
        gru=GRUConfig(learning_rate=4e-3, weight_decay=2.0, dropout=0.7, patience=8, **training),
        conv=ConvConfig(learning_rate=4e-3, weight_decay=4.0, dropout=0.5, patience=15, **training),
        transformer=TransformerConfig(learning_rate=2e-3, weight_decay=2.0, dropout=0.7, patience=8, **training),
        mlp=MLPConfig(hidden=208, learning_rate=1e-3, weight_decay=2.0, dropout=0.8, patience=8, n_hidden_layers=1, **training),
        stage1=Stage1Config(deterministic=True),
        stage2=Stage2Config(sampler="unipc", n_steps=20, guidance=3.0),
        search=SearchConfig(width=(0.5, 1.0), n_epochs=24, grace_epochs=8, reduction=3),  # some 16 minutes on two cores
    )


def _nsd(name: str, model: str, n_layers: int) -> Config:
    return Config(
        recipe=name,
        models=(model,),
        n_layers=n_layers,
        data=DataConfig(protocol="nsd37"),
        targets=TargetsConfig(vdvae="imagenet64", n_layers=31),
        clip=ClipConfig(model="ViT-L-14"),
        stage2=Stage2Config(model="published", dtype="bfloat16"),
        evaluation=EvaluationConfig(suites=("brain_diffuser", "mindeye")),
    )


def gru_15() -> Config:
    """The paper's GRU, 15 layers (13,344 latents). Needs NSD and the published checkpoints."""
    return _nsd("gru-15", "gru", 15)


def gru_31() -> Config:
    """The paper's GRU, 31 layers (91,168 latents). Needs NSD and the published checkpoints."""
    return _nsd("gru-31", "gru", 31)


def ridge_15() -> Config:
    """Ridge, 15 layers, alpha 50,000. Needs NSD and the published checkpoints."""
    return _nsd("ridge-15", "ridge", 15)


def ridge_31() -> Config:
    """Ridge, 31 layers, alpha 50,000 (Brain-Diffuser's first stage). Needs NSD and the published checkpoints."""
    return _nsd("ridge-31", "ridge", 31)


def brain_diffuser() -> Config:
    """Brain-Diffuser's own settings, for parity: ridge with its code's alphas, 31 layers, its noise offset, and predictions
    rescaled by the test set's moments (which looks at the whole test set). Needs NSD and the published checkpoints."""
    config = ridge_31()
    ridge = RidgeConfig(alpha_vision=60_000.0, alpha_text=100_000.0, rescale="test_moments")
    return replace(config, recipe="brain-diffuser", ridge=ridge, stage2=replace(config.stage2, reference_offset=True))


def read_recipe(path: Path) -> Config:
    """A configuration from a JSON file with Config's fields (as `jobs/search.py` writes it); what it lacks has its default.
    ValueError names what does not fit."""
    try:
        return _filled(Config, json.loads(path.read_text()), str(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); a recipe file is what jobs/search.py writes as best.json") from error


def _filled(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{where} is {values!r}, wanted an object with the fields of {kind.__name__}")
    fields = {f.name: f.default_factory for f in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - fields.keys()):
        raise ValueError(f"{where} has the fields {', '.join(unknown)}, which {kind.__name__} does not know")
    return kind(**{
        name: _filled(fields[name], value, f"{where}: {name}") if dataclasses.is_dataclass(fields[name])
        else tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
    })  # fmt: skip


RECIPES = {
    "mini": mini,
    "gru-15": gru_15,
    "gru-31": gru_31,
    "ridge-15": ridge_15,
    "ridge-31": ridge_31,
    "brain-diffuser": brain_diffuser,
}
