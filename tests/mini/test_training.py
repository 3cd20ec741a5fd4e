"""Training of the mini models: interrupted and gone on with, what is resumed and what is not, and what is written."""
from __future__ import annotations

import importlib
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import tyro
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn

from nsdray.mini import VERSATILE_DIFFUSION, cards, weights_path
from nsdray.mini import train_versatile_diffusion as training
from nsdray.mini.loop import train_mini
from nsdray.models.clip import CLIPConfig, load_clip
from nsdray.models.versatile_diffusion import build_unet, load_versatile_diffusion, unet_state

JOBS = Path(__file__).parents[2] / "jobs"
SMALL = {"block_out_channels": [16, 32, 32], "norm_num_groups": 8}
PARTS = ("image_unet", "text_unet", "vae")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def job(monkeypatch):
    monkeypatch.syspath_prepend(JOBS)
    return importlib.import_module("train_mini_models")


@pytest.fixture(scope="module")
def clip():
    return load_clip(weights_path("clip"), CLIPConfig.mini())


@pytest.fixture
def pool(monkeypatch):
    """Sixteen scenes of random latents and tokens, for a UNet smaller than the mini one."""
    monkeypatch.setattr(training, "UNET", training.UNET | SMALL)
    torch.manual_seed(1)
    shapes = {"latents": (16, 4, 16, 16), "vision": (16, 65, 64), "text": (16, 32, 64)}
    return training.ScenePool(**{name: torch.randn(shape).half() for name, shape in shapes.items()})


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_an_interrupted_unet_ends_as_an_undisturbed_one(tmp_path, pool, clip, monkeypatch):
    how = {"pool": pool, "clip": clip, "n_steps": 4, "batch_size": 3}
    undisturbed = training.train_unet(tmp_path / "a.pt", **how)

    def interrupted(name, model, loss_of, *arguments, **settings):
        def until_it_stops(step):
            if step == 2:
                raise KeyboardInterrupt
            return loss_of(step)

        return train_mini(name, model, until_it_stops, *arguments, **settings, save_every_s=0)

    monkeypatch.setattr(training, "train_mini", interrupted)
    with pytest.raises(KeyboardInterrupt):
        training.train_unet(tmp_path / "b.pt", **how)
    assert torch.load(tmp_path / "b.pt", weights_only=True)["step"] == 2
    monkeypatch.setattr(training, "train_mini", train_mini)
    assert same(training.train_unet(tmp_path / "b.pt", **how), undisturbed)
    with pytest.raises(ValueError, match="b.pt has 4 steps of the mini UNet already, more than the 3 asked for"):
        training.train_unet(tmp_path / "b.pt", **how | {"n_steps": 3})


def test_saved_weights_are_loaded_and_begun_with(tmp_path, pool, clip):
    torch.manual_seed(0)
    unet, vae = build_unet(training.UNET), AutoencoderKL.from_config(training.VAE)
    vae.register_to_config(scaling_factor=0.5)
    training.save_folder(tmp_path, unet, vae)
    assert not list(tmp_path.rglob("*.partial"))
    model = load_versatile_diffusion(tmp_path)
    for part, expected in ((model.unet, unet), (model.vae, vae)):
        assert same(part, expected.half().float())
    assert model.image_size == 64 and model.vae.config.scaling_factor == 0.5
    begun = training.train_unet(tmp_path / "unet.pt", pool, clip, n_steps=0, warm_start=unet_state(tmp_path))
    assert same(begun, model.unet)


def test_skipped_steps_are_counted(tmp_path, capfd):
    model = nn.Linear(2, 1)

    def loss_of(step):
        return model(torch.ones(1, 2)).sum() * (float("inf") if step in (1, 2) else 1.0), {"loss": 0.0}

    average = train_mini("line", model, loss_of, tmp_path / "line.pt", 5, learning_rate=0.1)
    assert all(value.isfinite().all() for value in average.state_dict().values())
    assert "skipped=2" in capfd.readouterr().err


def test_only_what_began_alike_is_gone_on_with(job, tmp_path, monkeypatch):
    """Where the training state of UNet and scenes is kept: by VAE, CLIP, number of scenes and first weights."""
    folder = tmp_path / "out/versatile_diffusion"
    for part in PARTS:
        (folder / part).mkdir(parents=True)
        save_file({"x": torch.zeros(1)}, folder / part / "diffusion_pytorch_model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "out/clip.safetensors")
    kept, cards_made = [], []
    for name in ("load_vae", "load_clip", "unet_state"):
        monkeypatch.setattr(job, name, lambda *_: nn.Linear(1, 1))
    monkeypatch.setattr(job.ScenePool, "make", lambda path, *_: kept.append([path.name]))
    monkeypatch.setattr(job, "train_unet", lambda path, *_, **__: kept[-1].append(path.name))
    monkeypatch.setattr(job, "save_folder", lambda *_: None)
    monkeypatch.setattr(job, "diffusion_card", lambda folder, clip, origin, n_steps: cards_made.append(origin) or origin)
    cold = job.Arguments(only=("diffusion",), output=tmp_path / "out", state=tmp_path / "state")
    warm = replace(cold, warm_start=True)
    text_unet = cards.sha256(folder / "text_unet/diffusion_pytorch_model.safetensors")

    def change(path: Path) -> None:
        save_file({"x": load_file(path)["x"] + 1}, path)

    job.run(cold)
    job.run(warm)
    job.run(warm)
    change(folder / "image_unet/diffusion_pytorch_model.safetensors")
    job.run(warm)
    job.run(cold)
    change(folder / "vae/diffusion_pytorch_model.safetensors")
    job.run(cold)
    change(tmp_path / "out/clip.safetensors")
    job.run(cold)
    job.run(replace(cold, n_scenes=10))
    pools, unets = zip(*kept)
    assert [pools.index(name) for name in pools] == [0, 0, 0, 0, 0, 5, 6, 7]
    assert [unets.index(name) for name in unets] == [0, 1, 1, 3, 0, 5, 6, 7]
    assert "earlier weights" not in cards_made[0] and f"text_unet: SHA-256 `{text_unet}`" in cards_made[1]


@pytest.mark.parametrize("settings", [
    {"only": ("vdvae",), "vdvae_steps": 7}, {"only": ("diffusion",), "warm_start": True, "diffusion_steps": 5000}, {},
])  # fmt: skip
def test_cards_tell_a_command_that_does_the_same(job, settings):
    arguments = job.Arguments(**settings)
    words = shlex.split(job.command(arguments))
    assert words[:2] == ["python", "jobs/train_mini_models.py"]
    assert tyro.cli(job.Arguments, args=words[2:]) == arguments


def test_shipped_weights_are_those_of_their_cards():
    folder = VERSATILE_DIFFUSION.parent
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 40e6
    for name in ("vdvae", "clip"):
        assert cards.sha256(weights_path(name)) in weights_path(name).with_suffix(".md").read_text()
    card = VERSATILE_DIFFUSION.with_suffix(".md").read_text()
    for part in PARTS:
        assert f"{part}: SHA-256 `{cards.sha256(VERSATILE_DIFFUSION / part / 'diffusion_pytorch_model.safetensors')}`" in card
