"""Weight files: data, never code, and loaded strictly."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
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
        raise _unreadable(path, error) from error
    return {key.removeprefix("module."): value for key, value in state.items()}


def weight_shapes(path: str | Path) -> dict[str, torch.Size]:
    """Names and shapes of a weight file's tensors, by its header: no weights are read, no code is run. A leading ``module.``
    is dropped. A file that was cut short is a ValueError, as for `read_weights`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        if path.suffix == ".safetensors":
            with safe_open(str(path), "pt") as file:
                found = {key: torch.Size(file.get_slice(key).get_shape()) for key in file.keys()}
        else:
            with open(path, "rb") as stream:
                is_zip = stream.read(4) == b"PK\x03\x04"  # files from before PyTorch 1.6 are none, and are read as a whole
            state = torch.load(path, map_location="meta", weights_only=True, mmap=is_zip)
            found = {key: value.shape for key, value in state.items()}
    except Exception as error:
        raise _unreadable(path, error) from error
    return {key.removeprefix("module."): shape for key, shape in found.items()}


def _unreadable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"{path} cannot be read as weights ({reason}). Is it whole? Fetch it again.")


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
    require_fit(model, {key: value.shape for key, value in state.items()}, path, hint)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model.eval().requires_grad_(False)


def require_fit(model: nn.Module, shapes: Mapping[str, torch.Size], path: str | Path, hint: str) -> None:
    """ValueError unless tensors of these names and shapes are the module's, all of them and no other."""
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    absent, unknown = sorted(wanted.keys() - shapes.keys()), sorted(shapes.keys() - wanted.keys())
    misshaped = sorted(key for key in wanted.keys() & shapes.keys() if wanted[key] != shapes[key])
    if absent or unknown or misshaped:
        raise ValueError(
            f"{path} does not fit this {type(model).__name__} ({len(wanted)} tensors): {len(absent)} missing {absent[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}, {len(misshaped)} of another shape {misshaped[:3]}. {hint}"
        )
