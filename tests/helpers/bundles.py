"""MONAI bundles in the layout of the model zoo, with networks of random weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

UNET: dict[str, Any] = {
    "spatial_dims": 2, "in_channels": 3, "out_channels": 3, "channels": [32, 64], "attention_levels": [False, True],
    "num_head_channels": [0, 32], "num_res_blocks": 1, "norm_num_groups": 32,
}  # fmt: skip
AUTOENCODER: dict[str, Any] = {
    "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "latent_channels": 3, "channels": [32, 64],
    "num_res_blocks": 2, "norm_num_groups": 16, "attention_levels": [False, False],
    "with_encoder_nonlocal_attn": False, "with_decoder_nonlocal_attn": False,
}  # fmt: skip
SCHEDULER: dict[str, Any] = {
    "_target_": "generative.networks.schedulers.DDIMScheduler", "_requires_": ["@load_diffusion"],
    "num_train_timesteps": 1000, "beta_start": 0.0015, "beta_end": 0.0195, "schedule": "scaled_linear_beta",
    "clip_sample": False,
}  # fmt: skip


def randomised(network: torch.nn.Module) -> torch.nn.Module:
    """Zero-initialised outputs would hide everything behind them."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return network.eval()


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as the package monai-generative named it; `load_old_state_dict` of MONAI reads it."""
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"\.attn\.(to_[qkv])\.", r".\1.", name)
        name = name.replace(".attn.out_proj.", ".proj_attn.").replace("postconv", "conv")
        renamed[re.sub(r"(attn\d)\.out_proj\.", r"\1.to_out.0.", name)] = value
    return renamed


def write_bundle(folder: Path, old: bool = False, **entries: Any) -> tuple[DiffusionModelUNet, AutoencoderKL]:
    """A latent diffusion bundle of the zoo; ``entries`` replace those of its inference.json."""
    unet, codec = randomised(DiffusionModelUNet(**UNET)), randomised(AutoencoderKL(**AUTOENCODER))
    named = old_names if old else dict
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    torch.save(named(unet.state_dict()), folder / "models" / "model.pt")
    torch.save(named(codec.state_dict()), folder / "models" / "model_autoencoder.pt")
    content = {
        "imports": ["$import torch", "$open('executed', 'w')"],
        "bundle_root": ".",
        "spatial_dims": 2,
        "latent_channels": 3,
        "device": "$torch.device('cpu')",
        "autoencoder_def": {
            **AUTOENCODER, "_target_": "generative.networks.nets.AutoencoderKL", "spatial_dims": "@spatial_dims",
        },
        "network_def": {
            **UNET, "_target_": "monai.networks.nets.DiffusionModelUNet", "in_channels": "@latent_channels",
        },
        "load_diffusion": "$@network_def.load_state_dict(torch.load(@load_diffusion_path))",
        "noise_scheduler": SCHEDULER,
        **entries,
    }  # fmt: skip
    (folder / "configs" / "inference.json").write_text(json.dumps(content))
    (folder / "configs" / "metadata.json").write_text(json.dumps({"version": "1.0.0"}))
    return unet, codec
