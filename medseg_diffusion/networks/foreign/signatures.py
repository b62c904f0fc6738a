"""Recognises the published architecture that a list of parameter names resembles."""

from __future__ import annotations

import re
from collections.abc import Iterable


def nearest(state: Iterable[str]) -> str:
    """A clause for messages: which known architecture the names resemble most, if any."""
    names = list(state)
    shares = {
        label: sum(any(re.match(pattern, name) for name in names) for pattern in patterns) / len(patterns)
        for label, patterns in _SIGNATURES.items()
    }
    best = max(shares, key=lambda label: shares[label])
    if shares[best] < 0.5:
        return f"no known architecture resembles it; known: {', '.join(_SIGNATURES)}"
    return f"it resembles {best}"


_SIGNATURES: dict[str, tuple[str, ...]] = {
    "a guided-diffusion or improved-diffusion U-Net": (
        r"input_blocks\.0\.0\.weight",
        r"output_blocks\.",
        r"middle_block\.",
        r"time_embed\.0",
        r"out\.2\.(weight|bias)",
    ),
    "a guided-diffusion noisy classifier": (
        r"input_blocks\.0\.0\.weight",
        r"middle_block\.",
        r"out\.2\.positional",
        r"out\.2\.qkv_proj",
        r"out\.2\.c_proj",
    ),
    "a latent-diffusion checkpoint": (r"model\.diffusion_model\.", r"first_stage_model\.", r"betas|alphas_cumprod"),
    "a latent-diffusion autoencoder": (
        r"encoder\.down\.",
        r"decoder\.up\.",
        r"encoder\.mid\.attn_1",
        r"quant_conv\.weight",
    ),
    "a MONAI DiffusionModelUNet": (r"conv_in\.conv", r"down_blocks\.", r"up_blocks\.", r"middle_block\.resnet_1"),
    "a MONAI AutoencoderKL": (r"encoder\.blocks\.", r"decoder\.blocks\.", r"quant_conv_mu", r"post_quant_conv"),
}


def few(names: Iterable[str]) -> str:
    """The first three names and the number of the others."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
