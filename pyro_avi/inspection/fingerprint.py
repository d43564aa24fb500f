"""A hash that identifies the parameters of a model."""

import hashlib
from collections.abc import Callable

import torch
from torch import nn

__all__ = ["fingerprint"]


def fingerprint(model: Callable) -> str | None:
    """A hash of the parameters and buffers of a model, by their names, the same on every device.

    Args:
        model: any callable; of a method the module it belongs to.

    Returns:
        The hash; ``None`` for a callable without parameters.

    Example::

        >>> import torch
        >>> from pyro_avi.inspection.fingerprint import fingerprint
        >>> layer = torch.nn.Linear(1, 1)
        >>> before = fingerprint(layer)
        >>> layer.bias.data += 1.0
        >>> fingerprint(layer) == before
        False
    """
    root = getattr(model, "__self__", model)
    state = root.state_dict() if isinstance(root, nn.Module) else {}
    tensors = {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
    if not tensors:
        return None
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
