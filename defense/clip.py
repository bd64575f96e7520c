"""ClipModel: images and class names in one space, by open_clip (CLIP: Radford et al., arXiv 2103.00020)."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from defense.digest import model_digest
from defense.errors import ClipError

DEFAULT_NAME, DEFAULT_PRETRAINED = "ViT-B-16", "openai"  # the paper's
CONFIG_FILE, WEIGHTS_FILE = "open_clip_config.json", "open_clip_model.safetensors"


class ClipModel:
    """An open_clip model with its own preprocessing and tokenizer; in eval mode.

    Features are not normalized: soft-WPMI and its relatives do that themselves.

    Args:
        name: an open_clip architecture (``"ViT-B-16"``), or ``"hf-hub:..."`` or ``"local-dir:..."``.
        pretrained: a tag of open_clip (``"openai"``) or a file of weights; ignored for the two prefixes. OpenAI's own
            weights as a *file* need a name that ends in ``-quickgelu``; their tag sets that by itself.
        device: where it runs; features come back on the CPU.

    Raises:
        ClipError: unknown name or tag, or weights that are neither here nor downloadable.
    """

    def __init__(
        self, name: str = DEFAULT_NAME, pretrained: Path | str | None = DEFAULT_PRETRAINED, *, device: str = "cpu"
    ) -> None:
        pretrained = None if ":" in name or not pretrained else str(pretrained)
        self.name = f"{name}:{pretrained}" if pretrained else name
        self.device = torch.device(device)
        self._model, self._preprocess, self._tokenizer, self._config = _load(name, pretrained)
        self._model.to(self.device).eval().requires_grad_(False)

    @classmethod
    def from_directory(cls, directory: Path | str, *, device: str = "cpu") -> "ClipModel":
        """The CLIP of a folder with ``open_clip_config.json`` and ``open_clip_model.safetensors``: works offline.

        Raises:
            ClipError: a file is missing or wrong.
        """
        directory = Path(directory)
        for file in (CONFIG_FILE, WEIGHTS_FILE):
            if not (directory / file).is_file():
                raise ClipError(f"expected {file} in '{directory}', found none; models/train_tiny_clip.py writes both")
        return cls(f"local-dir:{directory}", None, device=device)

    @cached_property
    def digest(self) -> str:
        """Of weights, architecture and preprocessing, ``"sha256:..."``: the same digest, the same features."""
        parts = [model_digest(self._model), self._config, self._model.visual.preprocess_cfg]
        return f"sha256:{hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()}"

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """Features [B, D] of images [B, 3 or 1, H, W] in [0, 1], by CLIP's own resize, crop and normalization."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ClipError(f"expected images [B, 3 or 1, H, W], got {list(images.shape)}")
        *resize_and_crop, normalize = self._preprocess.transforms
        pixels = images.to(self.device, torch.float32).expand(-1, 3, -1, -1)
        for step in resize_and_crop:
            pixels = step(pixels)
        # Clamped: bicubic overshoots at edges, which 8-bit pictures cannot.
        return self._encode(normalize(pixels.clamp(0, 1)))

    @torch.no_grad()
    def image_features_of(self, images: Sequence[Image.Image]) -> Tensor:
        """Features [B, D] of original pictures of any size, by CLIP's own preprocessing."""
        return self._encode(torch.stack([self._preprocess(image.convert("RGB")) for image in images]))

    @torch.no_grad()
    def text_features(self, names: Sequence[str], template: str = "{}", *, batch_size: int = 256) -> Tensor:
        """Features [C, D] of class names, each put in place of the template's ``{}``.

        Raises:
            ClipError: no names, or a template without ``{}``, which would make all classes one.
        """
        if "{}" not in template:
            raise ClipError(f"expected a prompt template with {{}} for the class name, got '{template}'")
        if not names:
            raise ClipError("expected class names, got none")
        tokens: Tensor = self._tokenizer([template.replace("{}", name) for name in names])
        features = [self._model.encode_text(part.to(self.device)).float().cpu() for part in tokens.split(batch_size)]
        return torch.cat(features)

    def _encode(self, pixels: Tensor) -> Tensor:
        features: Tensor = self._model.encode_image(pixels.to(self.device))
        return features.float().cpu()


def _load(name: str, pretrained: str | None) -> tuple[Any, Any, Any, Any]:
    """Model, preprocessing, tokenizer and architecture."""
    import open_clip  # type: ignore[import-untyped]  # slow, and most of the service does without

    name = name if ":" in name else name.replace("/", "-")  # OpenAI writes ViT-B/16
    # Without it open_clip 3 runs OpenAI's weights with the wrong activation, and only warns.
    quick_gelu = bool(pretrained and (open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu"))
    try:
        model, preprocess = open_clip.create_model_from_pretrained(name, pretrained, force_quick_gelu=quick_gelu)
        return model, preprocess, open_clip.get_tokenizer(name), [open_clip.get_model_config(name), quick_gelu]
    # open_clip raises whatever its downloaders, readers and model constructors do.
    except Exception as error:
        raise ClipError(
            f"cannot load the CLIP '{name}' with pretrained={pretrained!r} ({error}); offline, pass a file of "
            "its weights as pretrained, fill open_clip's cache where there is internet and copy it (HF_HOME), or use a "
            "directory with its own CLIP, such as models/fashion-mnist/clip"
        ) from error
