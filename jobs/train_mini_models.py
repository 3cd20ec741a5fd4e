"""Train the mini models of the offline default on drawn scenes, and write their weights and cards into the package.

    python jobs/train_mini_models.py                          # about an hour on two cores; interrupted, it goes on
    python jobs/train_mini_models.py --n-steps 20 --output /tmp/mini   # a trial

The shipped weights make this unnecessary; it is here so that they can be made again, or better.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from nsdray.mini import weights_path
from nsdray.mini.train import save_half, train_vdvae, vdvae_card
from nsdray.models.vdvae import VDVAEConfig
from nsdray.store import resolve_root


@dataclass(frozen=True)
class Arguments:
    """Settings of the mini models' training."""

    n_steps: int = 3400
    """Optimiser steps."""
    batch_size: int = 32
    """Scenes per step."""
    seed: int = 0
    """Seed of initial weights, scenes and noise."""
    output: Path = weights_path("vdvae").parent
    """Folder for weights and cards."""
    state: Path | None = None
    """Folder of the training state, from which an interrupted run goes on. None: <root>/mini-training."""


def run(arguments: Arguments) -> None:
    state = (arguments.state or Path(resolve_root(None)) / "mini-training") / f"seed={arguments.seed},steps={arguments.n_steps}"
    state.mkdir(parents=True, exist_ok=True)
    arguments.output.mkdir(parents=True, exist_ok=True)
    config = VDVAEConfig.mini()
    model = train_vdvae(state / "vdvae.pt", config, arguments.n_steps, arguments.batch_size, seed=arguments.seed)
    weights = arguments.output / "vdvae.safetensors"
    save_half(model, weights)
    card = vdvae_card(weights, config, arguments.n_steps, arguments.batch_size)
    weights.with_suffix(".md").write_text(card)
    print(f"{card}\nwritten: {weights} and its card")


if __name__ == "__main__":
    run(tyro.cli(Arguments, description=__doc__))
