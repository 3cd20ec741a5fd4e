"""CLIP tokens: the hidden states that Versatile Diffusion is conditioned on, from an open_clip model.

Vision (257 x 768 for ViT-L/14): all last hidden states, layer-normalised and projected, divided by the norm of the
projected class token. Text (77 x 768): the same with the projected end-of-text token. So token 0 of a picture, and the
end-of-text token of a caption, are CLIP's unit-length embeddings. (Versatile Diffusion, Xu et al. 2022, as Brain-Diffuser
uses it.) The mini model is the same class with another architecture.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from nsdray.models.checkpoint import load_strictly, read_weights, require_fit, weight_shapes

PUBLISHED, PRETRAINED = "ViT-L-14-quickgelu", "openai"  # open_clip's plain ViT-L-14 has GELU, which these weights do not fit
RIGHT_FILE = f"The published one is open_clip_model.safetensors of {PUBLISHED}, pretrained {PRETRAINED}."
END_OF_TEXT = 49407
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's training pictures


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Architecture in open_clip's terms."""

    embed_dim: int
    vision: dict[str, Any]
    text: dict[str, Any]

    @staticmethod
    def published() -> CLIPConfig:
        """OpenAI's ViT-L/14, the one that Versatile Diffusion was trained with: 257 and 77 tokens of 768."""
        vision = {"image_size": 224, "patch_size": 14, "width": 1024, "layers": 24}
        text = {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12}
        return CLIPConfig(768, vision, text)

    @staticmethod
    def mini() -> CLIPConfig:
        """The small model of the offline default: 65 and 32 tokens of 64, pictures of 64 x 64."""
        vision = {"image_size": 64, "patch_size": 8, "width": 128, "layers": 4, "head_width": 32}
        text = {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 4}
        return CLIPConfig(64, vision, text)

    @property
    def image_size(self) -> int:
        return self.vision["image_size"]

    @property
    def n_vision_tokens(self) -> int:
        return (self.image_size // self.vision["patch_size"]) ** 2 + 1

    @property
    def n_text_tokens(self) -> int:
        return self.text["context_length"]


class CLIP(nn.Module):
    """An open_clip model (its own parameter names) with token outputs."""

    def __init__(self, config: CLIPConfig):
        import open_clip  # takes seconds, and most who import this module want a configuration only
        from open_clip.tokenizer import SimpleTokenizer

        super().__init__()
        self.config = config
        self.model = open_clip.CLIP(config.embed_dim, config.vision, config.text, quick_gelu=True)
        self.tokenizer = SimpleTokenizer(context_length=config.n_text_tokens)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    def vision_tokens(self, images: torch.Tensor) -> torch.Tensor:
        """(n, n_vision_tokens, embed_dim) from float (n, 3, image_size, image_size) in [0, 1]; token 0 has length 1."""
        visual, size = self.model.visual, self.config.image_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(f"CLIP wants images (n, 3, {size}, {size}) in [0, 1], got {tuple(images.shape)}")
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (MEAN, STD))
        x = visual._embeds((images.to(self.device) - mean) / std)
        tokens = (visual.ln_post(visual.transformer(x)) @ visual.proj).float()  # lengths are told in float32 under autocast too
        return tokens / tokens[:, :1].norm(dim=-1, keepdim=True)

    def token_ids(self, captions: Sequence[str]) -> torch.Tensor:
        """(n, n_text_tokens) int64, padded with end-of-text as the reference does (open_clip pads with 0)."""
        ids = self.tokenizer(list(captions))
        end = ids.argmax(-1, keepdim=True)  # the end-of-text token has the highest number
        return ids.masked_fill(torch.arange(ids.shape[1]) > end, END_OF_TEXT)

    def text_tokens(self, captions: Sequence[str]) -> torch.Tensor:
        """(n, n_text_tokens, embed_dim) from strings; the end-of-text token has length 1."""
        model, ids = self.model, self.token_ids(captions).to(self.device)
        x = model.token_embedding(ids) + model.positional_embedding
        tokens = (model.ln_final(model.transformer(x, attn_mask=model.attn_mask)) @ model.text_projection).float()
        pooled = tokens[torch.arange(len(ids)), ids.argmax(-1)]
        return tokens / pooled[:, None].norm(dim=-1, keepdim=True)

    def text_embeddings(self, captions: Sequence[str]) -> torch.Tensor:
        """(n, embed_dim), of length 1: CLIP's own text embeddings."""
        ends = self.token_ids(captions).argmax(-1)
        return self.text_tokens(captions)[torch.arange(len(ends)), ends]


def clip_pixels(pictures: np.ndarray, size: int) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, size, size) in [0, 1], as CLIP's own preprocessing: shorter side to size by PIL's
    bicubic filter, then the central square."""
    resized = []
    for picture in pictures:
        height, width = picture.shape[:2]
        if (height, width) != (size, size):
            short = min(height, width)
            width, height = size * width // short, size * height // short
            left, top = (width - size) // 2, (height - size) // 2
            image = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
            picture = np.asarray(image.crop((left, top, left + size, top + size)))
        resized.append(picture)
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255


def published_checkpoint() -> Path:
    """OpenAI's weights in open_clip's cache; FileNotFoundError says how to put them there."""
    import open_clip
    from huggingface_hub import try_to_load_from_cache

    repository = open_clip.get_pretrained_cfg(PUBLISHED, PRETRAINED)["hf_hub"].strip("/")
    for name in ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        found = try_to_load_from_cache(repository, name)
        if isinstance(found, str):
            return Path(found)
    raise FileNotFoundError(
        f"CLIP's weights ({repository}/open_clip_model.safetensors, 1.7 GB) are not in open_clip's cache. Where there is a "
        f"network: python -c \"import open_clip; open_clip.create_model('{PUBLISHED}', '{PRETRAINED}')\". Else copy the file "
        "and say --clip.checkpoint FILE."
    )


def load_clip(path: str | Path, config: CLIPConfig, device: str | torch.device = "cpu") -> CLIP:
    """Load weights strictly, from a file of tensors with open_clip's parameter names. ValueError if they do not fit."""
    with torch.device("meta"):
        clip = CLIP(config)
    load_strictly(clip.model, read_weights(path, RIGHT_FILE), path, RIGHT_FILE)
    n = config.n_text_tokens
    clip.model.attn_mask = torch.full((n, n), float("-inf")).triu_(1)  # causal; a buffer that no file holds
    return clip.to(device).eval().requires_grad_(False)


def check_clip(path: str | Path, config: CLIPConfig) -> None:
    """What `load_clip` would refuse, by the file's header alone."""
    with torch.device("meta"):
        clip = CLIP(config)
    require_fit(clip.model, weight_shapes(path, RIGHT_FILE), path, RIGHT_FILE)
