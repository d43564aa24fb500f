"""The network of an amortized guide: an encoder and its head."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_avi.encoders.sequence import SequenceEncoder

__all__ = ["Network"]


class Network(nn.Module):
    """An encoder to features ``[B, H]`` and a linear head to parameters ``[B, P]``.

    Args:
        encoder: ``[B, ...]`` to ``[B, H]``.
        inputs: what it reads of some rows.
        initial: what the head is to give them.
        standardize: by part of the inputs how it is standardized; empty where it is not.

    Raises:
        ValueError: if the encoder fails on the inputs, or gives other than features ``[B, H]``.
    """

    def __init__(self, encoder: nn.Module, inputs: Tensor, initial: Tensor, standardize: nn.ModuleList):
        super().__init__()
        # Without the number of rows.
        self.input_shape = tuple(inputs.shape[1:])
        try:
            features = encoder(inputs)
        except _OutOfMemory:
            raise
        except Exception as error:
            raise self._failed(encoder, inputs, error) from error
        _check_features(encoder, inputs, features)
        head = nn.Linear(features.shape[-1], initial.shape[-1]).to(features)
        nn.init.zeros_(head.weight)
        head.bias.copy_(initial[0])
        self.encoder, self.head, self.standardize = encoder, head, standardize

    def forward(self, inputs: Tensor) -> Tensor:
        """Parameters ``[B, P]`` of inputs ``[B, ...]``."""
        try:
            features = self.encoder(inputs)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            # What fails on rows like the first ones fails for a reason of its own, as when a graph of it is made.
            if tuple(inputs.shape[1:]) == self.input_shape:
                raise
            raise self._failed(self.encoder, inputs, error) from error
        if not torch.jit.is_tracing():
            _check_features(self.encoder, inputs, features)
        return self.head(features)

    def _failed(self, encoder: nn.Module, inputs: Tensor, error: Exception) -> ValueError:
        found = f"inputs of shape {tuple(inputs.shape)} and {inputs.dtype}, on which it"
        if tuple(inputs.shape[1:]) == self.input_shape:
            expected = "Expected an encoder for a batch of rows [B, ...] as the guide reads them"
            advice = (
                "- make it for rows of this shape, or begin it with what brings them into another: torch.nn.Flatten, "
                "torch.nn.Unflatten\n- tell the guide what to read: inputs=lambda *args, **kwargs: ..."
            )
            if any(own.is_floating_point() and own.dtype != inputs.dtype for own in encoder.parameters()):
                advice += f"\n- give it the precision of the rows: encoder.to({inputs.dtype})"
        else:
            shape = ", ".join(map(str, ["B", *self.input_shape]))
            expected = f"Expected inputs of shape [{shape}], as the guide was set up with"
            advice = "- pass rows of that shape\n- make another guide for the others"
        return ValueError(
            f"{expected}, got {found} ({type(encoder).__name__}) fails: {type(error).__name__}: {error}\n"
            f"Try one of the following fixes:\n{advice}"
        )


_OutOfMemory = (MemoryError, torch.OutOfMemoryError)


def _check_features(encoder: nn.Module, inputs: Tensor, features: Any) -> None:
    # Series keep their dimensions, of which rows are flattened into one.
    rows = inputs.shape[:-1] if isinstance(encoder, SequenceEncoder) else inputs.shape[:1]
    if not isinstance(features, Tensor):
        found = f"a {type(features).__name__}"
    elif features.dim() >= 2 and features.shape[:-1] == rows:
        return
    else:
        found = str(tuple(features.shape))
    expected = ", ".join(map(str, [*rows, "H"]))
    raise ValueError(
        f"Expected the encoder to map {tuple(inputs.shape)} to features of shape ({expected}), got {found}."
    )
