"""A name for a set of weights, so that an importance is never used with others."""

import hashlib

import torch
from torch import nn


def model_digest(model: nn.Module) -> str:
    """SHA-256 over names, types, shapes and values of the state dict: ``"sha256:<hex>"``.

    It does not depend on the file format or the device; a changed weight, name or precision changes it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
