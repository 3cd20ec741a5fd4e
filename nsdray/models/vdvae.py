"""Very deep VAE (Child 2020, arXiv:2011.10650): images to a hierarchy of latents and back.

Parameter names are those of OpenAI's checkpoints, so `VDVAEConfig.imagenet64()` takes
``imagenet64-iter-1600000-model-ema.th`` as it is; the mini model of the offline default is the same class with
another configuration. Latents are lists: layer i has shape (n, 16, r_i, r_i), from r = 1 at the top to the image's
own resolution. This module knows nothing of brains, files or clusters.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from nsdray import seeds as draws
from nsdray.models.checkpoint import load_strictly, read_weights, require_fit, weight_shapes

LOG_SCALE_MIN = -7.0  # the reference clamps the logistic's log-scale here
UNIFORM_MARGIN = 1e-5  # uniform draws are kept this far from 0 and 1

RIGHT_FILE = (
    "Is it the checkpoint of another model? The ImageNet-64 one is "
    "https://openaipublic.blob.core.windows.net/very-deep-vaes-assets/vdvae-assets-2/imagenet64-iter-1600000-model-ema.th "
    "(0.5 GB; the README of github.com/openai/vdvae links to it)."
)


def parse_blocks(text: str) -> list[tuple[int, str, int]]:
    """Read a block string such as ``"1x2,4m1,4x3"`` into ``(resolution, kind, argument)``, one per block.

    ``RxN``: N plain blocks at resolution R (kind "x"); ``RmS``: one block that adds the upsampled state of
    resolution S; ``RdK``: one block followed by K-fold average pooling; ``R`` alone: one plain block.
    """
    blocks = []
    for part in text.split(","):
        kind = next((k for k in "xmd" if k in part), "x")
        resolution, _, argument = part.partition(kind)
        count = int(argument or 1) if kind == "x" else 1
        blocks += [(int(resolution), kind, int(argument or 1))] * count
    return blocks


@dataclass(frozen=True)
class VDVAEConfig:
    """Architecture of a VDVAE."""

    image_size: int
    """Side of the square RGB images, in pixels."""
    enc_blocks: str
    """Encoder blocks, bottom-up, in the notation of `parse_blocks`."""
    dec_blocks: str
    """Decoder blocks, top-down; one latent layer each."""
    width: int
    """Channels of the main path."""
    bottleneck_multiple: float = 0.25
    """Channels inside a block as a fraction of width."""
    zdim: int = 16
    """Latent channels of every layer."""
    n_mixtures: int = 10
    """Components of the output's mixture of discretised logistics."""
    no_bias_above: int = 64
    """Resolutions up to this one start from a learned bias, larger ones from zeros."""
    pixel_mean: float = 115.92961967
    """Subtracted from pixels in 0..255 before the encoder (the ImageNet-64 checkpoint's value)."""
    pixel_std: float = 69.37404
    """Pixels are divided by this after subtracting the mean."""

    def __post_init__(self) -> None:
        for name in ("image_size", "width", "zdim", "n_mixtures"):
            if getattr(self, name) < 1:
                raise ValueError(f"VDVAEConfig.{name} is {getattr(self, name)}, must be at least 1")
        try:
            first, last = parse_blocks(self.enc_blocks)[0][0], parse_blocks(self.dec_blocks)[-1][0]
        except ValueError as error:
            raise ValueError(
                f"VDVAEConfig: cannot read block strings {self.enc_blocks!r}, {self.dec_blocks!r}: {error}. "
                "Write them like '32x2,32d2,16x2' and '1x2,4m1,4x3'."
            ) from error
        if not first == last == self.image_size:
            raise ValueError(
                f"VDVAEConfig: the encoder starts at {first} and the decoder ends at {last} pixels, "
                f"but image_size is {self.image_size}; all three must be equal"
            )

    @classmethod
    def imagenet64(cls) -> VDVAEConfig:
        """OpenAI's ImageNet-64 model: 125,005,860 parameters, 75 latent layers."""
        return cls(
            image_size=64,
            enc_blocks="64x11,64d2,32x20,32d2,16x9,16d2,8x8,8d2,4x7,4d4,1x5",
            dec_blocks="1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16,32x31,64m32,64x12",
            width=512,
        )

    @classmethod
    def mini(cls) -> VDVAEConfig:
        """The offline default: 32 x 32 pictures and just the first 31 layers of the real model, with their shapes."""
        return cls(
            image_size=32,
            enc_blocks="32x2,32d2,16x3,16d2,8x3,8d2,4x2,4d4,1x2",
            dec_blocks="1x2,4m1,4x3,8m4,8x7,16m8,16x15,32m16",
            width=96,
            bottleneck_multiple=1 / 3,
            n_mixtures=5,
        )

    @property
    def layer_shapes(self) -> list[tuple[int, int, int]]:
        """Shape (zdim, r, r) of one image's latents, layer by layer from the top."""
        return [(self.zdim, r, r) for r, _, _ in parse_blocks(self.dec_blocks)]

    def n_latents(self, n_layers: int) -> int:
        """Number of latent values of the first n_layers (13,344 for 15, 91,168 for 31 of the ImageNet-64 model)."""
        if not 1 <= n_layers <= len(self.layer_shapes):
            raise ValueError(f"n_layers is {n_layers}; this VDVAE has layers 1..{len(self.layer_shapes)}")
        return sum(math.prod(shape) for shape in self.layer_shapes[:n_layers])


class Block(nn.Module):
    """Bottleneck of four convolutions, a GELU before each; optionally residual and average-pooled."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, resolution: int, residual: bool = False, pool: int = 1):
        super().__init__()
        k = 3 if resolution > 2 else 1  # a 3 x 3 kernel would see only padding
        self.residual, self.pool = residual, pool
        self.c1 = nn.Conv2d(c_in, c_mid, 1)
        self.c2 = nn.Conv2d(c_mid, c_mid, k, padding=k // 2)
        self.c3 = nn.Conv2d(c_mid, c_mid, k, padding=k // 2)
        self.c4 = nn.Conv2d(c_mid, c_out, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.c1(F.gelu(x))
        h = self.c2(F.gelu(h))
        h = self.c3(F.gelu(h))
        h = self.c4(F.gelu(h))
        if self.residual:
            h = x + h
        return F.avg_pool2d(h, self.pool) if self.pool > 1 else h


class Encoder(nn.Module):
    """Bottom-up path: normalised pixels to one activation map per resolution."""

    def __init__(self, config: VDVAEConfig):
        super().__init__()
        width, middle = config.width, int(config.width * config.bottleneck_multiple)
        self.in_conv = nn.Conv2d(3, width, 3, padding=1)
        self.enc_blocks = nn.ModuleList(
            Block(width, middle, width, r, residual=True, pool=argument if kind == "d" else 1)
            for r, kind, argument in parse_blocks(config.enc_blocks)
        )

    def forward(self, x: torch.Tensor) -> dict[int, torch.Tensor]:
        x = self.in_conv(x)
        activations = {x.shape[-1]: x}
        for block in self.enc_blocks:
            x = block(x)
            activations[x.shape[-1]] = x
        return activations


class DecoderBlock(nn.Module):
    """One latent layer of the top-down path."""

    def __init__(self, config: VDVAEConfig, resolution: int, mixin: int | None):
        super().__init__()
        width, middle, zdim = config.width, int(config.width * config.bottleneck_multiple), config.zdim
        self.resolution, self.mixin, self.zdim = resolution, mixin, zdim
        self.enc = Block(2 * width, middle, 2 * zdim, resolution)
        self.prior = Block(width, middle, 2 * zdim + width, resolution)
        self.z_proj = nn.Conv2d(zdim, width, 1)
        self.resnet = Block(width, middle, width, resolution, residual=True)

    def read(self, state: dict[int, torch.Tensor]) -> torch.Tensor:
        """The block's input (n, width, r, r): the state at its resolution, plus the upsampled one that it mixes in."""
        x = state.get(self.resolution)
        if self.mixin is None:
            return x
        up = F.interpolate(state[self.mixin], scale_factor=self.resolution // self.mixin)
        return up if x is None else x + up

    def posterior(self, x: torch.Tensor, activations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of q(z | image, layers above), each (n, zdim, r, r) float32."""
        mean, log_std = self.enc(torch.cat([x, activations], 1)).float().chunk(2, 1)
        return mean, log_std

    def prior_step(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Mean and log standard deviation of p(z | layers above), float32, and x with the prior's features added."""
        mean, log_std, features = self.prior(x).split([self.zdim, self.zdim, x.shape[1]], 1)
        return mean.float(), log_std.float(), x + features

    def write(self, state: dict[int, torch.Tensor], x: torch.Tensor, z: torch.Tensor) -> None:
        """Add the latents z to x (already through `prior_step`) and store the new state."""
        state[self.resolution] = self.resnet(x + self.z_proj(z.to(x.dtype)))


class OutputNet(nn.Module):
    """Last features to the parameters of a mixture of discretised logistics (PixelCNN++, arXiv:1701.05517)."""

    def __init__(self, config: VDVAEConfig):
        super().__init__()
        self.n_mixtures = config.n_mixtures
        self.out_conv = nn.Conv2d(config.width, 10 * config.n_mixtures, 1)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits (n, K, h, w), and means, log-scales and channel coefficients (n, 3, K, h, w), float32."""
        out = self.out_conv(features).float()
        logits, rest = out[:, : self.n_mixtures], out[:, self.n_mixtures :]
        means, log_scales, coefficients = rest.unflatten(1, (3, 3, self.n_mixtures)).unbind(2)
        return logits, means, log_scales.clamp_min(LOG_SCALE_MIN), coefficients.tanh()

    def log_likelihood(self, features: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Log-likelihood in nats, summed over the image, (n,), of target (n, 3, h, w) in [-1, 1]."""
        logits, means, log_scales, coefficients = self(features)
        x = target.float().unsqueeze(2)  # (n, 3, 1, h, w)
        r, g = x[:, 0], x[:, 1]
        means = torch.stack(  # green is conditioned on red, blue on both
            [
                means[:, 0],
                means[:, 1] + coefficients[:, 0] * r,
                means[:, 2] + coefficients[:, 1] * r + coefficients[:, 2] * g,
            ],
            1,
        )
        centred, inverse_scale = x - means, torch.exp(-log_scales)
        upper, lower = inverse_scale * (centred + 1 / 255), inverse_scale * (centred - 1 / 255)
        middle = inverse_scale * centred
        mass = torch.sigmoid(upper) - torch.sigmoid(lower)
        # where the bin's mass underflows, the density at its centre times its width stands in
        inside = torch.where(
            mass > 1e-5,
            torch.log(mass.clamp_min(1e-12)),
            middle - log_scales - 2 * F.softplus(middle) - math.log(127.5),
        )
        edges = torch.where(x > 0.999, -F.softplus(lower), inside)
        per_channel = torch.where(x < -0.999, upper - F.softplus(upper), edges)
        per_pixel = torch.logsumexp(per_channel.sum(1) + F.log_softmax(logits, 1), 1)  # (n, h, w)
        return per_pixel.sum((1, 2))

    def pixels(
        self, features: torch.Tensor, u_mixture: torch.Tensor | None = None, u_logistic: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Draw pixels, (n, 3, h, w) float32 in [-1, 1].

        u_mixture (n, h, w, K) and u_logistic (n, h, w, 3) are uniform in (0, 1); without them, the mode of the
        heaviest component is taken, which need not be the mixture's mode.
        """
        logits, means, log_scales, coefficients = self(features)
        if u_mixture is not None:
            logits = logits - torch.log(-torch.log(u_mixture.to(logits.device).movedim(-1, 1)))
        chosen = logits.argmax(1)[:, None, None].expand(-1, 3, 1, -1, -1)  # (n, 3, 1, h, w)
        x, log_scale, k = (t.gather(2, chosen).squeeze(2) for t in (means, log_scales, coefficients))
        if u_logistic is not None:
            x = x + log_scale.exp() * torch.logit(u_logistic.to(x.device).movedim(-1, 1))
        red = x[:, 0].clamp(-1, 1)
        green = (x[:, 1] + k[:, 0] * red).clamp(-1, 1)
        blue = (x[:, 2] + k[:, 1] * red + k[:, 2] * green).clamp(-1, 1)
        return torch.stack([red, green, blue], 1)


class Decoder(nn.Module):
    """Top-down path."""

    def __init__(self, config: VDVAEConfig):
        super().__init__()
        blocks = parse_blocks(config.dec_blocks)
        self.dec_blocks = nn.ModuleList(
            DecoderBlock(config, r, argument if kind == "m" else None) for r, kind, argument in blocks
        )
        resolutions = sorted({r for r, _, _ in blocks if r <= config.no_bias_above})
        self.bias_xs = nn.ParameterList(nn.Parameter(torch.zeros(1, config.width, r, r)) for r in resolutions)
        self.out_net = OutputNet(config)
        self.gain = nn.Parameter(torch.ones(1, config.width, 1, 1))
        self.bias = nn.Parameter(torch.zeros(1, config.width, 1, 1))

    def start(self, n: int) -> dict[int, torch.Tensor]:
        """State before the first block: the learned biases, by resolution."""
        return {bias.shape[-1]: bias.expand(n, -1, -1, -1) for bias in self.bias_xs}

    def features(self, state: dict[int, torch.Tensor]) -> torch.Tensor:
        """What the output net reads, (n, width, image_size, image_size)."""
        return state[self.dec_blocks[-1].resolution] * self.gain + self.bias


class VDVAE(nn.Module):
    """Very deep VAE with a seeded `encode` and `decode`.

    Both are deterministic given their seeds, and do not depend on how images are grouped into batches (to rounding).
    """

    def __init__(self, config: VDVAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self._scale_initial_weights()

    @torch.no_grad()
    def _scale_initial_weights(self) -> None:
        """Start near the identity, so that depth does not blow activations up (Child 2020, section 3.2)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.bias.zero_()
        for blocks in (self.encoder.enc_blocks, self.decoder.dec_blocks):
            for block in blocks:
                scale = len(blocks) ** -0.5
                if isinstance(block, DecoderBlock):
                    block.prior.c4.weight.zero_()
                    block.z_proj.weight.mul_(scale)
                    block = block.resnet
                block.c4.weight.mul_(scale)

    @property
    def device(self) -> torch.device:
        return self.decoder.gain.device

    def _activations(self, images: torch.Tensor) -> dict[int, torch.Tensor]:
        size = self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}, this VDVAE wants (n, 3, {size}, {size})")
        pixels = images.to(self.device, torch.float32) * 255
        return self.encoder((pixels - self.config.pixel_mean) / self.config.pixel_std)

    def elbo(self, images: torch.Tensor, n_posterior_layers: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Terms of the evidence lower bound, in nats per image.

        images: (n, 3, s, s) float in [0, 1]. Layers from n_posterior_layers on are drawn from the prior instead of the
        posterior, which is a lower bound too (their KL is zero) and asks the early layers to carry the picture.
        Returns the log-likelihood (n,) and the KL divergence per layer (n, n_posterior_layers).
        """
        activations = self._activations(images)
        state, rates = self.decoder.start(len(images)), []
        for i, block in enumerate(self.decoder.dec_blocks):
            x = block.read(state)
            mean, log_std, x_next = block.prior_step(x)
            if n_posterior_layers is None or i < n_posterior_layers:
                q_mean, q_log_std = block.posterior(x, activations[block.resolution])
                ratio, distance = torch.exp(2 * (q_log_std - log_std)), ((q_mean - mean) * torch.exp(-log_std)) ** 2
                rates.append((0.5 * (ratio + distance - 1) + log_std - q_log_std).sum((1, 2, 3)))
                mean, log_std = q_mean, q_log_std
            block.write(state, x_next, mean + log_std.exp() * torch.randn_like(mean))
        likelihood = self.decoder.out_net.log_likelihood(self.decoder.features(state), images.to(self.device) * 2 - 1)
        return likelihood, torch.stack(rates, 1)

    @torch.inference_mode()
    def encode(
        self,
        images: torch.Tensor,
        n_layers: int | None = None,
        latents: Literal["sample", "mean"] = "sample",
        seeds: Sequence[int] | None = None,
    ) -> list[torch.Tensor]:
        """Posterior latents of the first n_layers; deeper layers are not computed.

        images: (n, 3, image_size, image_size) float in [0, 1]. n_layers: None means all.
        latents: "sample" draws from the posterior (what Brain-Diffuser regresses on), with seeds[i] for image i;
        "mean" takes its mean, at every layer. Returns a list of (n, zdim, r, r) float32 tensors.
        """
        n_layers = len(self.decoder.dec_blocks) if n_layers is None else n_layers
        self.config.n_latents(n_layers)  # refuses an impossible number of layers
        if latents not in ("sample", "mean"):
            raise ValueError(f"latents is {latents!r}, must be 'sample' or 'mean'")
        if latents == "sample" and (seeds is None or len(seeds) != len(images)):
            raise ValueError(
                f"encode(latents='sample') needs one seed per image: {len(images)} images, "
                f"{'no' if seeds is None else len(seeds)} seeds. See nsdray.seeds.image_seeds."
            )
        activations, out = self._activations(images), []
        state = self.decoder.start(len(images))
        for i, block in enumerate(self.decoder.dec_blocks[:n_layers]):
            x = block.read(state)
            z, log_std = block.posterior(x, activations[block.resolution])
            if latents == "sample":
                noise = draws.normal(seeds, f"posterior/{i}", z.shape[1:])
                z = z + log_std.exp() * noise.to(z.device)
            out.append(z)
            if i + 1 < n_layers:
                block.write(state, block.prior_step(x)[2], z)
        return out

    @torch.inference_mode()
    def decode(
        self,
        latents: Sequence[torch.Tensor],
        seeds: Sequence[int] | None = None,
        temperature: float = 1.0,
        deterministic: bool = False,
    ) -> torch.Tensor:
        """Pictures from the latents of the first len(latents) layers; the rest comes from the prior.

        latents: list of (n, zdim, r, r), from the top; at least one. seeds: one per image, for the prior's and the
        output's draws. temperature: factor on the prior's standard deviation. deterministic: prior means and the mode
        of the output mixture's heaviest component, no draw at all. Returns uint8 (n, image_size, image_size, 3).
        """
        n, shapes = self._check_latents(latents)
        if not deterministic and (seeds is None or len(seeds) != n):
            raise ValueError(f"decode needs one seed per image ({n}) unless deterministic=True")
        state = self.decoder.start(n)
        for i, block in enumerate(self.decoder.dec_blocks):
            z, log_std, x = block.prior_step(block.read(state))
            if i < len(latents):
                z = latents[i].to(self.device, torch.float32)
            elif not deterministic:
                z = z + log_std.exp() * temperature * draws.normal(seeds, f"prior/{i}", shapes[i]).to(z.device)
            block.write(state, x, z)
        u_mixture = u_logistic = None
        if not deterministic:
            size, span = self.config.image_size, 1 - 2 * UNIFORM_MARGIN
            u_mixture = UNIFORM_MARGIN + span * draws.uniform(seeds, "mixture", (size, size, self.config.n_mixtures))
            u_logistic = UNIFORM_MARGIN + span * draws.uniform(seeds, "logistic", (size, size, 3))
        pixels = self.decoder.out_net.pixels(self.decoder.features(state), u_mixture, u_logistic)
        return ((pixels + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    def _check_latents(self, latents: Sequence[torch.Tensor]) -> tuple[int, list[tuple[int, int, int]]]:
        shapes = self.config.layer_shapes
        if not 1 <= len(latents) <= len(shapes):
            raise ValueError(f"decode got {len(latents)} layers of latents; this VDVAE has 1..{len(shapes)}")
        n = len(latents[0])
        for i, z in enumerate(latents):
            if tuple(z.shape) != (n, *shapes[i]):
                raise ValueError(f"latents of layer {i} have shape {tuple(z.shape)}, expected {(n, *shapes[i])}")
        return n, shapes


def load_vdvae(path: str | Path, config: VDVAEConfig, device: str | torch.device = "cpu") -> VDVAE:
    """Load weights strictly: a ``.safetensors`` file, or a PyTorch file of tensors (OpenAI's ``.th``), never code.

    A leading ``module.`` in the keys is dropped. Any dtype is converted to float32. ValueError if the file cannot be
    read or its keys or shapes are not those of the configuration.
    """
    with torch.device("meta"):
        model = VDVAE(config)
    # channels last: convolutions take two thirds of the time on CPUs
    return load_strictly(model, read_weights(path, RIGHT_FILE), path, RIGHT_FILE).to(device, memory_format=torch.channels_last)


def check_vdvae(path: str | Path, config: VDVAEConfig) -> None:
    """What `load_vdvae` would refuse, by the file's header alone."""
    with torch.device("meta"):
        model = VDVAE(config)
    require_fit(model, weight_shapes(path, RIGHT_FILE), path, RIGHT_FILE)

