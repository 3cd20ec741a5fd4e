"""Versatile Diffusion under a picture's and a caption's CLIP tokens at once (Xu et al. 2022, arXiv:2211.08332).

Loads a folder in diffusers' format (``shi-labs/versatile-diffusion``: image_unet, text_unet, vae, scheduler). The image
UNet's residual blocks are used; at each attention site the whole transformers of both UNets are mixed:

    h + (1 - mixing) * (image_transformer(h, vision) - h) + mixing * (text_transformer(h, text) - h)

UNet blocks, VAE and schedulers are diffusers'; its own dual-guided path, which raises a TypeError since 0.17, is not used.
The mini model of the offline default is the same class, loaded from the same kind of folder.
"""
from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn

from nsdray import seeds as draws
from nsdray.models.checkpoint import load_strictly, read_weights, require_fit, weight_shapes, weights_file

SAMPLERS = {"ddim": DDIMScheduler, "unipc": UniPCMultistepScheduler, "dpm": DPMSolverMultistepScheduler}
Sampler = Literal["ddim", "unipc", "dpm"]
FLOW_ONLY = ("resnets", "conv_in", "conv_out", "conv_norm_out", "time_embedding", "downsamplers", "upsamplers")
"""Parts of the text UNet that serve its own flow only; dual guidance takes its transformers."""
PUBLISHED_UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
"""image_unet of shi-labs/versatile-diffusion: 320 channels times 1, 2, 4, 4; 8 heads (Versatile-Diffusion, openai_unet.yaml)."""
PUBLISHED_VAE = {
    "sample_size": 512,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "latent_channels": 4,
    "layers_per_block": 2,
}
"""Its vae: Stable Diffusion's kl-f8 (Versatile-Diffusion, sd.yaml)."""
PUBLISHED_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Its scheduler. It tells no timestep_spacing, so each sampler has its own: DDIM "leading", UniPC and DPM-Solver "linspace"."""
RIGHT_FILES = "Are these the files of shi-labs/versatile-diffusion, whole and of one version?"
VAE_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers before 0.13


@dataclass(frozen=True)
class Context:
    """What a denoising step looks at. Rows belong to rows of the latents."""

    vision: torch.Tensor | None
    """(n, n_vision_tokens, embed_dim), or None for text alone."""
    text: torch.Tensor | None
    """(n, n_text_tokens, embed_dim), or None for vision alone."""
    mixing: float = 0.4
    """Weight of the text's transformers; the picture's have 1 - mixing. It is 0 or 1 where one of them is None."""

    def __post_init__(self) -> None:
        if self.vision is None and self.text is None:
            raise ValueError("Versatile Diffusion needs vision tokens, text tokens or both; got neither")
        if not 0 <= self.mixing <= 1:
            raise ValueError(f"mixing is {self.mixing}, must be in [0, 1]: the text's weight beside the picture's")

    @property
    def weights(self) -> tuple[float, float]:
        """(vision, text), adding to 1."""
        text = 0.0 if self.text is None else 1.0 if self.vision is None else self.mixing
        return 1 - text, text


class DualTransformer(nn.Module):
    """The two transformers of an attention site. Takes the arguments that diffusers' UNet blocks give to theirs."""

    def __init__(self, image: Transformer2DModel, text: Transformer2DModel):
        super().__init__()
        self.image, self.text = image, text

    def forward(self, hidden_states: torch.Tensor, encoder_hidden_states: Context, **_: Any) -> tuple[torch.Tensor]:
        """hidden_states: (n, channels, h, w). A transformer of weight 0 is not run."""
        context, mixed = encoder_hidden_states, hidden_states
        for transformer, tokens, weight in zip((self.image, self.text), (context.vision, context.text), context.weights):
            if weight > 0:
                h = transformer(hidden_states, encoder_hidden_states=tokens, return_dict=False)[0]
                mixed = mixed + weight * (h - hidden_states)
        return (mixed,)


def build_unet(config: dict[str, Any]) -> UNet2DConditionModel:
    """diffusers' UNet of this configuration with a DualTransformer at each attention site."""
    unet = UNet2DConditionModel.from_config(config)
    for name in [name for name, module in unet.named_modules() if isinstance(module, Transformer2DModel)]:
        parent, index = name.rsplit(".", 1)
        image = unet.get_submodule(name)
        unet.get_submodule(parent)[int(index)] = DualTransformer(image, copy.deepcopy(image))
    return unet


def attention_sites(unet: nn.Module) -> list[DualTransformer]:
    """All dual attention sites; the published model has 16."""
    return [module for module in unet.modules() if isinstance(module, DualTransformer)]


class VersatileDiffusion(nn.Module):
    """UNet, VAE and noise schedule."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: dict[str, Any]):
        super().__init__()
        self.unet, self.vae, self.scheduler_config = unet, vae, scheduler

    @property
    def device(self) -> torch.device:
        return self.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.unet.conv_in.weight.dtype

    @property
    def image_size(self) -> int:
        """Width and height of its pictures in pixels: 512 for the published model."""
        return self.unet.config.sample_size * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, size, size)

    def scheduler(self, sampler: Sampler) -> Any:
        """A fresh scheduler: the multistep ones carry state from step to step."""
        return SAMPLERS[sampler].from_config(self.scheduler_config)

    @torch.inference_mode()
    def encode(self, images: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """Scaled latents (n, 4, h / 8, w / 8) of images (n, 3, h, w) in [0, 1]: a seeded draw of the VAE's posterior."""
        posterior = self.vae.encode((2 * images - 1).to(self.device, self.dtype)).latent_dist
        noise = draws.normal(seeds, "vae", posterior.mean.shape[1:]).to(self.device, self.dtype)
        return (posterior.mean + posterior.std * noise) * self.vae.config.scaling_factor

    @torch.inference_mode()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pictures uint8 (n, h, w, 3) on the CPU, of scaled latents."""
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0].float()
        return ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    def predict_noise(self, latents: torch.Tensor, timestep: torch.Tensor | int, context: Context) -> torch.Tensor:
        """The UNet's estimate of the noise in latents (n, 4, h, w)."""
        return self.unet(latents, timestep, encoder_hidden_states=context, return_dict=False)[0]

    @torch.inference_mode()
    def generate(
        self,
        seeds: Sequence[int],
        vision: torch.Tensor | None,
        text: torch.Tensor | None,
        unconditional: tuple[torch.Tensor, torch.Tensor] | None,
        images: torch.Tensor | None = None,
        strength: float = 0.75,
        guidance: float = 7.5,
        mixing: float = 0.4,
        n_steps: int = 50,
        sampler: Sampler = "ddim",
        reference_offset: bool = False,
    ) -> torch.Tensor:
        """Pictures under CLIP tokens: uint8 (n, image_size, image_size, 3), on the CPU.

        seeds: n numbers, key all draws. vision (n, n_tokens, d), text (n, n_tokens, d): one of them may be None.
        unconditional: vision and text tokens (1, n_tokens, d) to steer away from; may be None for guidance 1.
        images: (n, 3, image_size, image_size) in [0, 1] to start from; None starts from noise alone and wants strength 1.
        strength: share of the n_steps that are run; 0 gives the VAE's round trip. guidance: factor on the difference
        between conditional and unconditional noise. reference_offset: start from the noise level one step above the first
        that is denoised (t = 741 and 721 of 50 steps at strength 0.75), as Brain-Diffuser's scripts do.
        """
        context = self._context(vision, text, unconditional, mixing, guidance, len(seeds))
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}, must be in [0, 1]")
        if images is None and strength < 1:
            raise ValueError(f"strength is {strength}, but without a picture to start from it must be 1")
        if images is not None and images.shape != (len(seeds), 3, self.image_size, self.image_size):
            raise ValueError(
                f"images have shape {tuple(images.shape)}, expected {(len(seeds), 3, self.image_size, self.image_size)}"
            )
        scheduler = self.scheduler(sampler)
        scheduler.set_timesteps(n_steps)
        noise = draws.normal(seeds, "diffusion", self.latent_shape).to(self.device)
        n_run = int(strength * n_steps)
        if images is None:
            latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        else:
            latents = self.encode(images, seeds).float()
            if n_run > 0:
                alphas = scheduler.alphas_cumprod.to(self.device)
                alpha = alphas[noise_level(scheduler.timesteps, n_run, reference_offset)]
                latents = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        if n_run > 0:
            for t in scheduler.timesteps[-n_run:]:
                estimate = self._guided(latents, t.to(self.device), context, guidance)
                latents = scheduler.step(estimate, t, latents, return_dict=False)[0]
        return self.decode(latents.to(self.dtype))

    def _context(self, vision, text, unconditional, mixing: float, guidance: float, n: int) -> Context:
        """Tokens of the whole batch; under guidance, the unconditional ones first."""
        tokens = []
        for i, (name, given) in enumerate((("vision", vision), ("text", text))):
            if given is not None:
                if given.ndim != 3 or len(given) != n or given.shape[2] != self.unet.config.cross_attention_dim:
                    raise ValueError(
                        f"{name} tokens have shape {tuple(given.shape)}, expected ({n}, n_tokens, "
                        f"{self.unet.config.cross_attention_dim})"
                    )
                if guidance != 1:
                    if unconditional is None:
                        raise ValueError(f"guidance {guidance} needs unconditional tokens")
                    given = torch.cat([unconditional[i].to(given).expand(n, -1, -1), given])
                given = given.to(self.device, self.dtype)
            tokens.append(given)
        return Context(*tokens, mixing)

    def _guided(self, latents: torch.Tensor, t: torch.Tensor, context: Context, guidance: float) -> torch.Tensor:
        """Classifier-free guidance, in float32: unconditional + guidance * (conditional - unconditional)."""
        x = latents.to(self.dtype)
        if guidance == 1:
            return self.predict_noise(x, t, context).float()
        without, under = self.predict_noise(torch.cat([x, x]), t, context).float().chunk(2)
        return without + guidance * (under - without)


def noise_level(timesteps: torch.Tensor, n_run: int, reference_offset: bool) -> int:
    """Timestep whose noise is added to the picture before the last n_run of the (descending) timesteps are run."""
    if reference_offset and n_run < len(timesteps):
        return int(timesteps[len(timesteps) - n_run - 1])
    return int(timesteps[len(timesteps) - n_run])


def read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there. Versatile Diffusion is a folder in diffusers' format with image_unet, text_unet, vae and "
            "scheduler: fetch shi-labs/versatile-diffusion from the Hugging Face hub, and say --stage2.folder."
        )
    return json.loads(path.read_text())


def unet_state(folder: Path, read: Callable[[Path], dict[str, Any]] = read_weights) -> dict[str, Any]:
    """Weights of both UNets under the dual UNet's names; or what else read gives of their files."""
    state = {}
    for key, value in read(weights_file(folder / "image_unet")).items():
        site, _, rest = key.partition(".attentions.")
        index, _, rest = rest.partition(".")
        state[f"{site}.attentions.{index}.image.{rest}" if rest else key] = value
    for key, value in read(weights_file(folder / "text_unet")).items():
        site, _, rest = key.partition(".attentions.")
        index, _, rest = rest.partition(".")
        if rest:
            state[f"{site}.attentions.{index}.text.{rest}"] = value
        elif not set(key.split(".")) & set(FLOW_ONLY):
            raise ValueError(f"{folder / 'text_unet'} has {key}, which no part of Versatile Diffusion is called")
    return state


def vae_state(folder: Path, read: Callable[[Path], dict[str, Any]] = read_weights) -> dict[str, Any]:
    """Weights of the VAE; its attention's old names are brought up to date."""
    state = {}
    for key, value in read(weights_file(folder)).items():
        parts = [VAE_RENAMED.get(part, part) if ".attentions." in key else part for part in key.split(".")]
        state[".".join(parts)] = value
    return state


def load_vae(folder: str | Path) -> AutoencoderKL:
    """Load a diffusers VAE folder, strictly."""
    folder = Path(folder)
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(read_json(folder / "config.json"))
    return load_strictly(vae, vae_state(folder), folder, RIGHT_FILES)


def load_versatile_diffusion(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> VersatileDiffusion:
    """Load a folder in diffusers' format, strictly and without running code from it.

    FileNotFoundError for a missing file, ValueError if weights and configuration do not fit.
    """
    folder = Path(folder)
    config = read_json(folder / "image_unet" / "config.json")
    with torch.device("meta"):
        unet = build_unet(config)
    load_strictly(unet, unet_state(folder), folder / "{image,text}_unet", RIGHT_FILES)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    model = VersatileDiffusion(unet, load_vae(folder / "vae"), scheduler)
    return model.to(device, dtype, memory_format=torch.channels_last).eval().requires_grad_(False)


def check_versatile_diffusion(folder: str | Path) -> None:
    """What `load_versatile_diffusion` would refuse, by the files' headers alone."""
    folder = Path(folder)
    read_json(folder / "scheduler" / "scheduler_config.json")
    with torch.device("meta"):
        unet = build_unet(read_json(folder / "image_unet" / "config.json"))
        vae = AutoencoderKL.from_config(read_json(folder / "vae" / "config.json"))
    require_fit(unet, unet_state(folder, weight_shapes), folder / "{image,text}_unet", RIGHT_FILES)
    require_fit(vae, vae_state(folder / "vae", weight_shapes), folder / "vae", RIGHT_FILES)
