"""Weight files: data, never code, and loaded strictly."""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn


def read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` file, or of a PyTorch file (``weights_only``); a leading ``module.`` is dropped.

    FileNotFoundError, or ValueError if the file is damaged or holds anything but tensors.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            state = load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # the readers raise many kinds for a damaged file
        raise ValueError(f"{path} cannot be read as weights ({error}). Is it whole? Fetch it again.") from error
    return {key.removeprefix("module."): value for key, value in state.items()}


def weights_file(folder: Path) -> Path:
    """The weight file of a diffusers folder: safetensors, else a PyTorch file, in half precision if there is no other."""
    names = [f"diffusion_pytorch_model{half}.{kind}" for half in ("", ".fp16") for kind in ("safetensors", "bin")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has no weights; expected one of {', '.join(names)}")


def load_strictly(model: nn.Module, state: dict[str, torch.Tensor], path: str | Path, hint: str) -> nn.Module:
    """Give a module (best made on the meta device) these weights, in float32; it is returned in eval mode, without gradients.

    ValueError if keys or shapes differ; path and hint tell which file it was and which is the right one.
    """
    wanted = model.state_dict()
    absent, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    misshaped = sorted(k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape)
    if absent or unknown or misshaped:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__} ({len(wanted)} tensors): {len(absent)} missing {absent[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(misshaped)} of another shape {misshaped[:3]}. {hint}"
        )
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model.eval().requires_grad_(False)
