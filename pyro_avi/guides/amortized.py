"""The amortized guide: a network predicts each row's factor."""

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor, nn

from pyro_avi.encoders import MLP
from pyro_avi.guides.guide import LocalGuide

__all__ = ["AmortizedGuide"]


class AmortizedGuide(LocalGuide):
    r"""A guide that predicts every row's factor from the row itself, with the parameters of one network (A-VI).

    .. math:: f(n, x_n) = W h_\phi(x_n) + b

    with an encoder :math:`h_\phi` to ``H`` features and a linear head. Before training the head gives every row the same
    location and the scale ``init_scale``.

    Args:
        model: any Pyro callable.
        encoder: widths of a multilayer perceptron (:class:`~pyro_avi.encoders.MLP`), or any module from ``[B, *input]`` to
            features ``[B, H]``.
        inputs: a function of the model's arguments that returns what the encoder reads, ``[B, ...]``: the rows of the
            call, or all ``N`` rows where the model draws its rows itself. By default the values observed in the plate;
            several of them are flattened and joined.
        plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guides.guide.LocalGuide`.

    Raises:
        ValueError: if a width is not positive, or the encoder's features are not ``[B, H]``.

    References:
        Kingma and Welling, "Auto-Encoding Variational Bayes", 2014, https://arxiv.org/abs/1312.6114.

    Example::

        >>> import torch
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model, encoder=(32,)).setup(x)
        >>> guide.posterior(torch.rand(7, 1, 8, 8)).batch_shape
        torch.Size([7])
    """

    def __init__(
        self,
        model: Callable,
        encoder: Sequence[int] | nn.Module = (64, 64),
        *,
        inputs: Callable[..., Tensor] | None = None,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        if not isinstance(encoder, nn.Module):
            encoder = MLP.check_widths(encoder)
        self._given_encoder, self._inputs = encoder, inputs

    def _sites_read(self, structure):
        if self._inputs is not None:
            return ()
        if not structure.observations:
            raise ValueError(
                f"Expected values observed in plate {structure.plate.name!r} for the encoder to read, found none.\n"
                "Try one of the following fixes:\n"
                "- pass the observations to this call\n"
                "- tell the guide what to read: inputs=lambda *args, **kwargs: ..."
            )
        return tuple(structure.observations)

    def _create_parameters(self, initial, found, args, kwargs):
        inputs = self._read(found, args, kwargs).to(initial.device)
        if isinstance(self._given_encoder, nn.Module):
            encoder = self._given_encoder
        else:
            encoder = MLP(prod(inputs.shape[1:]), self._given_encoder).to(initial)
        features = encoder(inputs)
        if features.dim() != 2 or len(features) != len(inputs):
            raise ValueError(
                f"Expected the encoder to map {tuple(inputs.shape)} to features of shape ({len(inputs)}, H), got "
                f"{tuple(features.shape)}."
            )
        head = nn.Linear(features.shape[-1], initial.shape[-1]).to(features)
        nn.init.zeros_(head.weight)
        head.bias.copy_(initial[0])
        self.encoder, self.head = encoder, head

    def _infer(self, found, args, kwargs):
        return self.head(self.encoder(self._read(found, args, kwargs)))

    def _read(self, found, args, kwargs) -> Tensor:
        if self._inputs is not None:
            inputs = self._inputs(*args, **kwargs)
            count = found.size if found.index is None else len(found.index)
            # Where the model draws its rows, the caller cannot know them and gives all.
            if found.index is not None and self._sources.draws_rows(args, kwargs) is not None:
                inputs = inputs[found.index]
            if len(inputs) != count:
                raise ValueError(f"Expected inputs= to return the {count} rows of the call, got {len(inputs)}.")
            return inputs
        dtype = self._like.dtype
        values = [v.movedim(self._structure.observations[name], 0).to(dtype) for name, v in found.values.items()]
        return values[0] if len(values) == 1 else torch.cat([value.reshape(len(value), -1) for value in values], -1)
