"""Training of the mini Versatile Diffusion (VAE, then the dual UNet) on drawn scenes, and its card."""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file
from tqdm import tqdm

from nsdray import seeds as draws
from nsdray.metrics.identification import two_way
from nsdray.metrics.pixel import pixcorr, psnr
from nsdray.mini.cards import weights_lines
from nsdray.mini.judge import compare, contents, train_judge
from nsdray.mini.loop import held_out, scene_batch, train_mini, trapezoid, write_tensors
from nsdray.models.checkpoint import weights_file
from nsdray.models.clip import CLIP
from nsdray.models.versatile_diffusion import Context, attention_sites, build_unet, load_versatile_diffusion
from nsdray.nsd.scenes import caption_scene, make_scene
from nsdray.targets.clip_tokens import text_tokens, unconditional_tokens

SIZE = 64
UNET = {
    "sample_size": SIZE // 4,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [64, 128, 128],
    "layers_per_block": 1,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 16,
}
VAE = {
    "sample_size": SIZE,
    "block_out_channels": [24, 48, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
SCHEDULER = {  # Stable Diffusion's and Versatile Diffusion's
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
SNR_CLAMP = 5.0  # Hang et al. 2023 (arXiv:2303.09556): weight of a noise level min(SNR, 5) / SNR
P_UNCONDITIONAL = 0.1
TOKEN_SCALE = 8.0
"""CLIP's tokens have length 1, so their values are some 1 / sqrt(64); what reads them starts, and learns, that much larger."""
CARD_SETTINGS = {"sampler": "unipc", "n_steps": 20, "guidance": 3.0}


def train_vae(checkpoint: Path, n_steps: int, batch_size: int = 24, seed: int = 0, device: str = "cpu") -> AutoencoderKL:
    """Squared error of pixels and of their differences to right and lower neighbours, and a faint pull to a unit normal."""
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_config(VAE).to(device)

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        images = 2 * scene_batch(range(step * batch_size, (step + 1) * batch_size), SIZE, seed=seed) - 1
        torch.manual_seed(draws.derive(seed, "vae step", step) % 2**32)
        images = images.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        error = decoded.float() - images
        pixels = error.square().mean()
        edges = error.diff(dim=2).square().mean() + error.diff(dim=3).square().mean()
        kl = posterior.kl().mean() / images[0].numel()
        return pixels + edges + 1e-4 * kl, {"psnr": -10 * (pixels / 4).log10().item(), "kl": kl.item()}

    average = train_mini("VAE", vae, loss_of, checkpoint, n_steps, learning_rate=2e-3)
    images = 2 * scene_batch(range(256), SIZE, seed=seed).to(device) - 1
    average.register_to_config(scaling_factor=round(1 / average.encode(images).latent_dist.mean.std().item(), 5))
    return average


@dataclass(frozen=True)
class ScenePool:
    """Encoded scenes: what the UNet is trained on, computed once."""

    latents: torch.Tensor
    """(n, 4, 16, 16) float16, scaled."""
    vision: torch.Tensor
    """(n, 65, 64) float16."""
    text: torch.Tensor
    """(n, 32, 64) float16, the mean over five captions."""

    @classmethod
    def make(cls, path: Path, vae: AutoencoderKL, clip: CLIP, n: int, seed: int = 0, batch_size: int = 64) -> ScenePool:
        """Read from path, or compute and write it there."""
        if not path.exists():
            rows: dict[str, list[torch.Tensor]] = {"latents": [], "vision": [], "text": []}
            for start in tqdm(range(0, n, batch_size), desc="encode scenes", unit="batch", mininterval=10):
                indices = range(start, min(n, start + batch_size))
                images = scene_batch(indices, SIZE, seed=seed)
                captions = [caption_scene(make_scene(seed, "training", i), seed, i) for i in indices]
                with torch.no_grad(), torch.autocast(vae.device.type, torch.bfloat16):
                    latents = vae.encode(2 * images.to(vae.device) - 1).latent_dist.mean * vae.config.scaling_factor
                    rows["latents"].append(latents.half().cpu())
                    rows["vision"].append(clip.vision_tokens(images).half().cpu())
                    rows["text"].append(torch.from_numpy(text_tokens(clip, captions, 5 * batch_size)))
            write_tensors({name: torch.cat(parts) for name, parts in rows.items()}, path)
        return cls(**load_file(str(path)))


def train_unet(
    checkpoint: Path,
    pool: ScenePool,
    clip: CLIP,
    n_steps: int,
    batch_size: int = 96,
    seed: int = 0,
    warm_start: dict[str, torch.Tensor] | None = None,
    device: str = "cpu",
) -> torch.nn.Module:
    """Noise prediction; each batch sees one context, vision or text, so that the transformers of the other are not run.

    warm_start: weights to begin with, e.g. the shipped ones.
    """
    torch.manual_seed(seed)
    unet = build_unet(UNET)
    if warm_start is None:
        for name, parameter in unet.named_parameters():
            parameter.data *= reading_scale(name)
    else:
        unet.load_state_dict({key: value.float() for key, value in warm_start.items()})
    unet.to(device)
    alphas = DDIMScheduler.from_config(SCHEDULER).alphas_cumprod
    nothing = [tokens.float().cpu() for tokens in unconditional_tokens(clip)]

    def loss_of(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        random = draws.rng(seed, "diffusion step", step)
        torch.manual_seed(draws.derive(seed, "diffusion noise", step) % 2**32)
        rows = torch.from_numpy(random.integers(0, len(pool.latents), batch_size))
        by_text = bool(random.random() < 0.5)
        tokens = (pool.text if by_text else pool.vision)[rows].float()
        dropped = torch.from_numpy(random.random(batch_size) < P_UNCONDITIONAL)
        tokens[dropped] = nothing[by_text]
        t = torch.from_numpy(random.integers(0, len(alphas), batch_size))
        alpha = alphas[t].view(-1, 1, 1, 1)
        latents = pool.latents[rows].float()
        noise = torch.randn_like(latents)
        noisy = (alpha.sqrt() * latents + (1 - alpha).sqrt() * noise).to(memory_format=torch.channels_last)
        tokens = tokens.to(device)
        context = Context(None, tokens) if by_text else Context(tokens, None)
        with torch.autocast(device, torch.bfloat16):
            estimate = unet(noisy.to(device), t.to(device), encoder_hidden_states=context, return_dict=False)[0]
        snr = (alpha / (1 - alpha)).flatten()
        errors = (estimate.float().cpu() - noise).square().mean((1, 2, 3))
        loss = (errors * snr.clamp(max=SNR_CLAMP) / snr).mean()
        return loss, {"loss": loss.item(), "text" if by_text else "vision": errors.mean().item()}

    return train_mini("UNet", unet, loss_of, checkpoint, n_steps, learning_rate=1e-3, schedule=trapezoid, factor=reading_scale)


def reading_scale(name: str) -> float:
    """TOKEN_SCALE for the keys and values that are made from tokens, else 1."""
    return TOKEN_SCALE if ".attn2.to_k." in name or ".attn2.to_v." in name else 1.0


def save_folder(folder: Path, unet: torch.nn.Module | None, vae: AutoencoderKL) -> None:
    """Write the model in diffusers' format, fp16: the text UNet's file holds its transformers only."""
    configs = {"vae": VAE | {"scaling_factor": vae.config.scaling_factor, "_class_name": "AutoencoderKL"}}
    weights = {"vae": vae.state_dict()}
    if unet is not None:
        configs |= {"image_unet": UNET | {"_class_name": "UNet2DConditionModel"}}
        state = unet.state_dict()
        weights["image_unet"] = {k.replace(".image.", ".", 1): v for k, v in state.items() if ".text." not in k}
        weights["text_unet"] = {k.replace(".text.", ".", 1): v for k, v in state.items() if ".text." in k}
    for name, state in weights.items():
        write_tensors({key: value.half() for key, value in state.items()}, folder / name / "diffusion_pytorch_model.safetensors")
    for name, config in configs.items():
        (folder / name / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    (folder / "scheduler").mkdir(exist_ok=True)
    scheduler = SCHEDULER | {"_class_name": "DDIMScheduler"}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=1) + "\n")


def diffusion_card(folder: Path, clip: CLIP, made_by: str, n_steps: int, n_images: int = 100, n_judge_steps: int = 1200) -> str:
    """The card of the shipped Versatile Diffusion, in Markdown, with held-out figures of these weights."""
    model = load_versatile_diffusion(folder)
    images, truth = held_out(SIZE, n_images)
    scenes = [make_scene(0, "card", i) for i in range(n_images)]
    captions = [caption_scene(scene, 1, i) for i, scene in enumerate(scenes)]
    vision, text = clip.vision_tokens(images), torch.from_numpy(text_tokens(clip, captions)).float()
    seeds, judge = draws.image_seeds(0, range(n_images)), train_judge(n_judge_steps)
    round_trip = model.decode(model.encode(images, seeds)).numpy()
    pictures = {"the scenes themselves": truth, "the VAE's round trip": round_trip}
    for name, tokens in (("both", (vision, text)), ("vision", (vision, None)), ("text", (None, text))):
        generated = model.generate(seeds, *tokens, unconditional_tokens(clip), strength=1, **CARD_SETTINGS)
        pictures[f"true tokens, {name}"] = generated.numpy()
    lines = []
    for name, shown in pictures.items():
        embeddings = clip.vision_tokens(torch.from_numpy(shown).permute(0, 3, 1, 2) / 255)[:, 0]
        scores = [*compare(contents(scenes), judge.look(shown)), two_way(vision[:, 0].numpy(), embeddings.numpy()).mean(),
                  (vision[:, 0] * embeddings).sum(1).mean().item(), pixcorr(truth, shown).mean()]  # fmt: skip
        lines.append(f"| {name} | " + " | ".join(f"{score:.3f}" for score in scores) + " |")
    n_unet, n_vae = (sum(p.numel() for p in part.parameters()) for part in (model.unet, model.vae))
    files = {part: weights_file(folder / part) for part in ("image_unet", "text_unet", "vae")}
    table, n_sites = "\n".join(lines), len(attention_sites(model.unet))
    return f"""# Mini Versatile Diffusion

Versatile Diffusion of the offline default: the class of the published model (`nsdray.models.versatile_diffusion`), loaded
from the same kind of folder, with a small configuration: a UNet of {n_unet:,} parameters with {n_sites} dual attention
sites, and a VAE of {n_vae:,} from {SIZE} x {SIZE} pictures to 4 x 16 x 16 latents and back. It looks at the mini CLIP's
tokens. It knows drawn scenes only and stands in for no published model.

{made_by}
- **Scenes**: of the stream "training" of `nsdray.nsd.scenes`, which shares no scene with any stimulus set.
- **VAE**: squared error of pixels and of their differences to neighbours, and a faint pull to a unit normal.
- **UNet**: {n_steps:,} steps of noise prediction, noise levels weighted by min(SNR, {SNR_CLAMP:g}) / SNR; each batch of 96 sees
  one context, vision or the mean of five captions' tokens, left out with probability {P_UNCONDITIONAL}. AdamW, averaged weights.
{weights_lines(files)}

Held-out figures, {n_images} scenes of the stream "card". The VAE's round trip: {psnr(truth, round_trip).mean():.2f} dB PSNR.
Pictures are generated from noise alone under true tokens ({CARD_SETTINGS["sampler"]}, {CARD_SETTINGS["n_steps"]} steps, guidance
{CARD_SETTINGS["guidance"]:g}). Kind, place and colour are told by a small network that was trained on drawn scenes and has
never seen CLIP (`nsdray.mini.judge`), as shares of the objects: one of this kind is in the picture, one of this kind is at
this place, what is at this place has this colour. Its own accuracy is the first line. The other figures, beside the scene: by
the mini CLIP, which the pictures are made from and which is a lenient judge, and by pixels.

| pictures | kind | place | colour | two-way identification (chance 0.5) | cosine of embeddings | PixCorr |
|---|---|---|---|---|---|---|
{table}
"""
