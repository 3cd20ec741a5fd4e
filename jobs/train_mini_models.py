"""Train the mini models of the offline default on drawn scenes, and write their weights and cards into the package.

    python jobs/train_mini_models.py                          # hours on two cores; interrupted, it goes on
    python jobs/train_mini_models.py --only clip              # one of them
    python jobs/train_mini_models.py --only diffusion --warm-start --diffusion-steps 4000   # better weights from the shipped ones

The shipped weights make this unnecessary; it is here so that they can be made again, or better. Versatile Diffusion learns
from the VAE and the CLIP in the output folder. A GPU is used where there is one.
"""
from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import torch
import tyro

from nsdray.config import digest
from nsdray.mini import weights_path
from nsdray.mini.cards import made_by, sha256
from nsdray.mini.loop import save_half
from nsdray.mini.train_clip import clip_card, train_clip
from nsdray.mini.train_vdvae import train_vdvae, vdvae_card
from nsdray.mini.train_versatile_diffusion import ScenePool, diffusion_card, save_folder, train_unet, train_vae
from nsdray.models.checkpoint import weights_file
from nsdray.models.clip import CLIPConfig, load_clip
from nsdray.models.vdvae import VDVAEConfig
from nsdray.models.versatile_diffusion import load_vae, unet_state
from nsdray.store import resolve_root

Model = Literal["vdvae", "clip", "vae", "diffusion"]


@dataclass(frozen=True)
class Arguments:
    """Settings of the mini models' training."""

    only: tuple[Model, ...] = ("vdvae", "clip", "vae", "diffusion")
    """Models to train, in this order; diffusion is Versatile Diffusion's UNet."""
    vdvae_steps: int = 3400
    """Optimiser steps of 32 scenes."""
    clip_steps: int = 1500
    """Optimiser steps of 128 scenes with captions."""
    vae_steps: int = 1500
    """Optimiser steps of 24 scenes."""
    diffusion_steps: int = 3000
    """Optimiser steps of 96 scenes."""
    n_scenes: int = 24_000
    """Scenes that the UNet sees; they are encoded once."""
    warm_start: bool = False
    """Begin the UNet with the weights in the output folder."""
    seed: int = 0
    """Seed of initial weights, scenes and noise."""
    output: Path = weights_path("vdvae").parent
    """Folder for weights and cards."""
    state: Path | None = None
    """Folder of the training state, from which an interrupted run goes on; one from other first weights, VAE or CLIP does not mix
    with it. None: <root>/mini-training."""


def run(arguments: Arguments) -> None:
    state = (arguments.state or Path(resolve_root(None)) / "mini-training") / f"seed={arguments.seed}"
    state.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in arguments.only:
        card = TRAINERS[model](arguments, state, device)
        print(card, f"written to {arguments.output}", sep="\n")


def command(arguments: Arguments) -> str:
    """The command line of this run, without folders and without the steps of models that it does not train."""
    words = ["python jobs/train_mini_models.py --only", *arguments.only]
    for name in (field.name for field in fields(arguments)):
        value = getattr(arguments, name)
        if name.endswith("_steps") and name.removesuffix("_steps") not in arguments.only:
            continue
        if name not in ("only", "output", "state") and value is not False:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return " ".join(words)


def make_vdvae(arguments: Arguments, state: Path, device: str) -> str:
    config, weights = VDVAEConfig.mini(), arguments.output / "vdvae.safetensors"
    save_half(train_vdvae(state / "vdvae.pt", config, arguments.vdvae_steps, seed=arguments.seed, device=device), weights)
    origin = made_by(command(arguments), device)
    return write_card(weights.with_suffix(".md"), vdvae_card(weights, config, origin, arguments.vdvae_steps))


def make_clip(arguments: Arguments, state: Path, device: str) -> str:
    config, weights = CLIPConfig.mini(), arguments.output / "clip.safetensors"
    save_half(train_clip(state / "clip.pt", config, arguments.clip_steps, seed=arguments.seed, device=device).model, weights)
    origin = made_by(command(arguments), device)
    return write_card(weights.with_suffix(".md"), clip_card(weights, config, origin, arguments.clip_steps))


def make_vae(arguments: Arguments, state: Path, device: str) -> str:
    folder = arguments.output / "versatile_diffusion"
    save_folder(folder, None, train_vae(state / "vae.pt", arguments.vae_steps, seed=arguments.seed, device=device))
    return f"VAE of {folder}: its figures are on the card of the whole"


def make_diffusion(arguments: Arguments, state: Path, device: str) -> str:
    folder, clip_file = arguments.output / "versatile_diffusion", arguments.output / "clip.safetensors"
    vae, clip = load_vae(folder / "vae").to(device), load_clip(clip_file, CLIPConfig.mini(), device)
    begun = {part: sha256(weights_file(folder / part)) for part in ("image_unet", "text_unet") if arguments.warm_start}
    data = f"{arguments.n_scenes}-{digest([sha256(weights_file(folder / 'vae')), sha256(clip_file)])}"
    pool = ScenePool.make(state / f"scenes-{data}.safetensors", vae, clip, arguments.n_scenes, arguments.seed)
    checkpoint = state / f"unet-{data}-from-{digest(begun) if begun else 'scratch'}.pt"
    start = unet_state(folder) if arguments.warm_start else None
    unet = train_unet(checkpoint, pool, clip, arguments.diffusion_steps, seed=arguments.seed, warm_start=start, device=device)
    save_folder(folder, unet, vae)
    origin = made_by(command(arguments), device, begun)
    if "vae" not in arguments.only:
        origin += "\n  The VAE was there before."
    return write_card(folder.with_suffix(".md"), diffusion_card(folder, clip.to("cpu"), origin, arguments.diffusion_steps))


def write_card(path: Path, card: str) -> str:
    path.write_text(card)
    return card


TRAINERS = {"vdvae": make_vdvae, "clip": make_clip, "vae": make_vae, "diffusion": make_diffusion}


if __name__ == "__main__":
    run(tyro.cli(Arguments, description=__doc__))
