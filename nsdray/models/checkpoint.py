"""Weight files: data, never code, and loaded strictly."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn


def read_weights(path: str | Path, hint: str = "") -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` file, or of a PyTorch file (``weights_only``); a leading ``module.`` is dropped.

    FileNotFoundError, or ValueError if the file is damaged or holds anything but named tensors; hint ends it.
    """
    return _read(Path(path), hint, only_shapes=False)


def weight_shapes(path: str | Path, hint: str = "") -> dict[str, torch.Size]:
    """Names and shapes of a weight file's tensors, by its header: no weights are read, no code is run. A leading ``module.``
    is dropped. Errors as of `read_weights`.
    """
    return {key: value.shape for key, value in _read(Path(path), hint, only_shapes=True).items()}


def _read(path: Path, hint: str, only_shapes: bool) -> dict[str, torch.Tensor]:
    """The tensors, or ones without values that have their shapes."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there. {hint}".strip())
    try:
        if path.suffix == ".safetensors":
            state: Any = _safetensors_shapes(path) if only_shapes else load_file(str(path))
        else:
            device = "meta" if only_shapes else "cpu"
            state = torch.load(path, map_location=device, weights_only=True, mmap=only_shapes and _is_zip(path))
    except Exception as error:  # the readers raise many kinds for a damaged file
        reason = " ".join(str(error).split())[:300]
        text = f"{path} cannot be read as weights ({reason}). Is it whole? Fetch it again. {hint}"
        raise ValueError(text.strip()) from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()):
        found = f"a dict of {', '.join(map(repr, state))}"[:100] if isinstance(state, dict) else f"a {type(state).__name__}"
        text = f"{path} is no weight file: it holds {found}, not tensors by name. Is it an optimiser's state? {hint}"
        raise ValueError(text.strip())
    return {key.removeprefix("module."): value for key, value in state.items()}


def _safetensors_shapes(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(path), "pt") as file:
        return {key: torch.empty(file.get_slice(key).get_shape(), device="meta") for key in file.keys()}


def _is_zip(path: Path) -> bool:
    """PyTorch's files since 1.6 are; older ones can only be read as a whole."""
    with open(path, "rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


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
