"""Settings refuse what cannot work, and recipes are what the paper says."""
from __future__ import annotations

import dataclasses
import inspect
import json

import pytest

from nsdray.config import (
    ClipConfig,
    ClusterConfig,
    Config,
    ConvConfig,
    DataConfig,
    GRUConfig,
    MLPConfig,
    RidgeConfig,
    SimulationConfig,
    Stage1Config,
    Stage2Config,
    TargetsConfig,
    TransformerConfig,
    digest,
)
from nsdray.recipes import RECIPES, read_recipe
from nsdray.regressors import REGRESSORS


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DataConfig(subjects=(1, 9)), r"data.subjects is \(1, 9\); choose from"),
        (lambda: DataConfig(subjects=(1, 1)), "names a subject twice"),
        (lambda: DataConfig(rois=()), "data.rois is empty"),
        (lambda: TargetsConfig(n_layers=76), "targets.n_layers is 76, must be in 1..75"),
        (lambda: TargetsConfig(n_layers=32), "the mini VDVAE has 31 layers"),
        (lambda: Config(n_layers=16), "targets.n_layers extracts only 15"),
        (lambda: RidgeConfig(alpha=0), "ridge.alpha is 0, must be positive"),
        (lambda: GRUConfig(dropout=1.0), "gru.dropout is 1.0"),
        (lambda: GRUConfig(patience=0), "gru.patience is 0"),
        (lambda: MLPConfig(n_hidden_layers=0), "mlp.n_hidden_layers is 0, must be positive"),
        (lambda: ConvConfig(hidden=5), "conv.hidden is 5, must be even"),
        (lambda: TransformerConfig(hidden=5), "transformer.hidden is 5, must be even"),
        (lambda: TransformerConfig(width=30), "transformer.width is 30, must be a multiple of transformer.n_heads, 4"),
        (lambda: GRUConfig(trunk_rate=2), r"gru.trunk_rate is 2, must be in \[0, 1\]"),
        (lambda: Config(n_layers=0), "n_layers is 0, must be at least 1"),
        (lambda: Config(models=("shared-gru",), data=DataConfig(subjects=(2,))), "shared-gru: a shared model wants several"),
        (lambda: SimulationConfig(noise_ceiling=0), "simulation.noise_ceiling is 0"),
        (lambda: RidgeConfig(alpha_text=-1), "ridge.alpha_text is -1"),
        (lambda: RidgeConfig(alphas=(1.0, -2.0)), r"ridge.alphas is \(1.0, -2.0\); all must be positive"),
        (lambda: RidgeConfig(alphas=(1.0, 1.0)), "ridge.alphas names an alpha twice"),
        (lambda: RidgeConfig(per_target=True, alphas=(1.0,)), r"at least two --ridge.alphas \(now \(1.0,\)\)"),
        (lambda: RidgeConfig(n_targets_search=0), "ridge.n_targets_search is 0"),
        (lambda: RidgeConfig(groups=("V1", "V1")), "ridge.groups names a group twice"),
        (lambda: RidgeConfig(groups=("V1",), penalties=(2.0,)), "ridge.penalties has 1 values for 1 ridge.groups"),
        (lambda: RidgeConfig(penalties=(2.0,)), "ridge.penalties has 1 values for 0 ridge.groups"),
        (lambda: RidgeConfig(groups=("V1",), penalties=(2.0, 0.0)), r"ridge.penalties is \(2.0, 0.0\)"),
        (lambda: RidgeConfig(n_penalties_drawn=3), "ridge.n_penalties_drawn is 3; .* needs --ridge.groups"),
        (lambda: ClipConfig(batch_size=0), "clip.batch_size is 0"),
        (lambda: Stage1Config(temperature=-0.5), "stage1.temperature is -0.5, must not be negative"),
        (lambda: Stage2Config(strength=1.2), "stage2.strength is 1.2"),
        (lambda: Stage2Config(mixing=-0.1), "stage2.mixing is -0.1"),
        (lambda: Stage2Config(start="noise"), "wants --stage2.strength 1, but it is 0.75"),
        (lambda: Config(stage2=Stage2Config(model="published")), "stage2.model is published, but clip.model is mini"),
        (lambda: ClusterConfig(n_train_workers=0), "cluster.n_train_workers is 0"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_recipes():
    configs = {name: recipe() for name, recipe in RECIPES.items()}
    assert all(config.recipe == name for name, config in configs.items())
    assert configs["ridge-31"].n_layers == 31 and configs["ridge-31"].ridge.alpha == 50_000
    assert configs["gru-15"].data.protocol == "nsd37" and configs["gru-15"].gru.hidden == 100
    paper, parity = configs["ridge-31"], configs["brain-diffuser"]
    assert (paper.stage2.n_steps, paper.stage2.strength, paper.stage2.guidance, paper.stage2.mixing) == (50, 0.75, 7.5, 0.4)
    assert (paper.ridge.alpha_vision, paper.ridge.alpha_text) == (50_000, 50_000)
    assert (parity.ridge.alpha, parity.ridge.alpha_vision, parity.ridge.alpha_text) == (50_000, 60_000, 100_000)
    assert parity.stage2.reference_offset and parity.ridge.rescale == "test_moments" and not paper.stage2.reference_offset
    assert configs["mini"].data.nsd_root is None and configs["mini"].targets.vdvae == "mini"


@pytest.mark.parametrize("name", REGRESSORS)
def test_settings_fit_the_networks(name):
    settings = getattr(Config(), name)
    assert settings.name == name and Config().settings(f"shared-{name}") == Config().settings(name)
    REGRESSORS[name](12, 5, **settings.sizes())
    arguments = inspect.signature(REGRESSORS[name]).parameters
    assert settings.sizes().keys() == arguments.keys() - {"n_voxels", "n_targets"}


def test_digest_is_stable():
    assert digest(dataclasses.asdict(RidgeConfig())) == digest(dataclasses.asdict(RidgeConfig(alpha=5e4)))
    assert digest({"a": 1}) != digest({"a": 2})


def test_recipe_files(tmp_path):
    path = tmp_path / "best.json"
    for recipe in RECIPES.values():
        path.write_text(json.dumps(dataclasses.asdict(recipe())))
        assert read_recipe(path) == recipe()
    path.write_text('{"gru": {"hidden": 7}, "models": ["gru"]}')
    assert read_recipe(path) == Config(models=("gru",), gru=GRUConfig(hidden=7))
    for text, message in [
        ("{", "is no JSON"),
        ('{"gru": {"hiden": 7}}', "gru has the fields hiden, which GRUConfig does not know"),
        ('{"gru": 3}', "gru is 3, wanted an object"),
        ('{"n_layers": 0}', "n_layers is 0"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recipe(path)
