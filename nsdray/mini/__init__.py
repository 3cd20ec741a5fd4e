"""The small models of the offline default: weights, cards, and how they were made.

Nothing here stands in for a published model; see the card (``*.md``) beside each weight file.
"""
from pathlib import Path


def weights_path(name: str) -> Path:
    """Path of a shipped weight file, e.g. ``weights_path("vdvae")``."""
    return Path(__file__).parent / f"{name}.safetensors"


VERSATILE_DIFFUSION = Path(__file__).parent / "versatile_diffusion"
"""Folder of the mini Versatile Diffusion, in diffusers' format."""
