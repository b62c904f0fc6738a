"""FSDP2: several processes hold a share of a model's weights, gradients, moments and averages each.

Accelerate switches to FSDP2 on GPUs only; torch's `fully_shard` does the same on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

LARGE = 2**20
"""Layers with so many parameters are gathered when they are needed, and freed after that; the others stay gathered
from the forward to the backward pass."""

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding)


def shard(model: nn.Module, device: torch.device) -> None:
    """Leaves this process its share of every parameter, in place. Every process must hold the same model.

    The model must be called as a whole. Its layers must be called, not only read.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in model.modules():
        # Not of a derived class: those of torch's attention, for instance, are read by the module around them.
        if type(module) in _LAYERS and sum(parameter.numel() for parameter in module.parameters()) >= LARGE:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This process's shares; tensors that are not shared out are returned as they are."""
    return [value.to_local() if hasattr(value, "to_local") else value for value in tensors]


def gathered(tree: Any, keep: bool) -> Any:
    """A state dict with whole tensors on the CPU in place of shares; None in their place unless ``keep``.

    All processes have to call it together.
    """
    if hasattr(tree, "full_tensor"):
        whole = tree.full_tensor()
        return whole.detach().cpu() if keep else None
    if isinstance(tree, dict):
        return {key: gathered(value, keep) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [gathered(value, keep) for value in tree]
    return tree


def shared_out(whole: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, the same in all processes, as shares like those of ``like``."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(like, DTensor):
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)


def load_model(model: nn.Module, whole: dict[str, Tensor]) -> None:
    """Loads a state dict of whole tensors into a model, which may be sharded."""
    own = model.state_dict()
    model.load_state_dict({name: shared_out(value, own.get(name, value)) for name, value in whole.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, whole: dict[str, Any]) -> None:
    """Loads a state dict of whole tensors into an optimiser, whose parameters may be sharded."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments = {
        number: {
            name: shared_out(value, parameters[number]) if value.shape == parameters[number].shape else value
            for name, value in of_one.items()
        }
        for number, of_one in whole["state"].items()
    }
    optimizer.load_state_dict({**whole, "state": moments})
