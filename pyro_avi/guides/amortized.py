"""The amortized guide: a network predicts each row's factor."""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from pyro_avi.encoders import MLP
from pyro_avi.guides.guide import LocalGuide, RowFactor, qualified_name
from pyro_avi.provenance import Found, Sources

__all__ = ["AmortizedGuide"]

Encoder = Sequence[int] | nn.Module
Inputs = Callable[..., Tensor]
Key = str | tuple[str, ...]


class _Network(nn.Module):
    """An encoder to features ``[B, H]`` and a linear head to parameters ``[B, P]``."""

    def __init__(self, encoder: nn.Module, inputs: Tensor, initial: Tensor):
        super().__init__()
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

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.encoder(inputs))


class AmortizedGuide(LocalGuide):
    r"""A guide that predicts every row's factor from the row itself, with the parameters of one network (A-VI).

    .. math:: f(n, x_n) = W h_\phi(x_n) + b

    with an encoder :math:`h_\phi` to ``H`` features and a linear head. Before training the head gives every row the same
    location and the scale ``init_scale``.

    Args:
        model: any Pyro callable.
        encoder: widths of a multilayer perceptron (:class:`~pyro_avi.encoders.MLP`), or any module from ``[B, *input]`` to
            features ``[B, H]``; for several row sets also a dictionary of such by the names of their plates.
        inputs: a function of the model's arguments that returns what the encoder reads, ``[B, ...]``: the rows of the
            call, or all ``N`` rows where the model draws its rows itself. By default the values observed in the plate;
            several of them are flattened and joined. Masked values are read as zeros, and their mask beside them. For
            several row sets a dictionary of such functions by the names of their plates, those left out by default.
            Together with ``create_plates`` the model's rows are not searched for: they are those of the plates given.
        plate, family, global_guide, init_loc_fn, init_scale, create_plates: as for every guide, see
            :class:`~pyro_avi.guides.guide.LocalGuide`.

    Raises:
        ValueError: if a width is not positive, the encoder's features are not ``[B, H]``, or nothing is known to read.

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
        encoder: Encoder | Mapping[Key, Encoder] = (64, 64),
        *,
        inputs: Inputs | Mapping[Key, Inputs] | None = None,
        **kwargs,
    ):
        super().__init__(model, **kwargs)
        for each in encoder.values() if isinstance(encoder, Mapping) else [encoder]:
            if not isinstance(each, nn.Module):
                MLP.check_widths(each)
        # Hidden from the module: the encoders that are trained belong to the inference functions.
        self._given_encoder = (_by_plates(encoder),)
        self._inputs = _by_plates(inputs)
        self._masked: dict[str, bool] = {}

    @property
    def encoder(self) -> nn.Module | dict[tuple[str, ...], nn.Module]:
        """The encoder, ``[B, *input]`` to ``[B, H]``; by plates where there are several row sets."""
        return self._by_rows(lambda of: of.function.encoder)

    @property
    def head(self) -> nn.Linear | dict[tuple[str, ...], nn.Linear]:
        """The linear head, ``[B, H]`` to ``[B, P]``; by plates where there are several row sets."""
        return self._by_rows(lambda of: of.function.head)

    def _find_sources(self, structure):
        sites: dict[str, None] = {}
        row_sets = structure.row_sets
        given = [self._of_rows(self._inputs, rows.plates, "inputs", len(row_sets)) is not None for rows in row_sets]
        weighted = any(latent.is_weighted for latent in structure.global_latents + structure.local_latents)
        if row_sets and all(given) and self.create_plates is not None and not weighted:
            return None
        for rows in structure.row_sets:
            if self._of_rows(self._inputs, rows.plates, "inputs", len(structure.row_sets)) is not None:
                continue
            if not rows.observations:
                raise ValueError(
                    f"Expected values observed in {rows} for the encoder to read, found none.\n"
                    "Try one of the following fixes:\n"
                    "- pass the observations to this call\n"
                    "- tell the guide what to read: inputs=lambda *args, **kwargs: ..."
                )
            for name, plates in rows.subsampled.items():
                if plates:
                    raise ValueError(
                        f"Expected all rows of plate {plates[0]!r} at observed site {name!r} for the encoder of {rows}, got a "
                        "part of them.\nTell the guide what to read: inputs=lambda *args, **kwargs: ..."
                    )
            sites.update(dict.fromkeys(rows.observations))
        latents = [latent.name for latent in structure.global_latents + structure.local_latents]
        unobserved = not structure.observations
        return Sources(self.model, tuple(structure.frames), tuple(sites), latents, unobserved=unobserved, inputs=True)

    def _all_rows(self):
        # The rows are what it reads.
        return None

    def describe(self):
        """What kind of guide this is, as plain data; of modules and functions their names."""
        encoder = _qualified(self._given_encoder[0])
        return {**super().describe(), "encoder": encoder, "inputs": _qualified(self._inputs)}

    @staticmethod
    def _of_rows(given: Any, plates: tuple[str, ...], option: str, count: int) -> Any:
        """What an option says about one set of rows."""
        if isinstance(given, dict):
            return given.get(plates)
        if count > 1 and (isinstance(given, nn.Module) or callable(given)):
            raise ValueError(
                f"Expected {option}= for each of the {count} sets of rows, got one.\n"
                f"Pass a dictionary by the names of the plates: {option}={{{plates if len(plates) > 1 else plates[0]!r}: ...}}."
            )
        return given

    def _create_function(self, of, initial, found, args, kwargs):
        for name in of.rows.observations:
            self._masked[name] = name in found.masks
        inputs = self._read(of, found, args, kwargs).to(initial.device).flatten(0, initial.dim() - 2)
        encoder = self._of_rows(self._given_encoder[0], of.rows.plates, "encoder", len(self._structure.row_sets))
        if encoder is None:
            raise ValueError(f"Expected encoder= for {of.rows}, got those for {sorted(self._given_encoder[0])}.")
        if not isinstance(encoder, nn.Module):
            encoder = MLP(prod(inputs.shape[1:]), encoder).to(initial)
        return _Network(encoder, inputs, initial.flatten(0, -2))

    def _infer(self, of, found, args, kwargs):
        inputs = self._read(of, found, args, kwargs)
        depth = len(of.rows.plates)
        if depth == 1:
            return of.function(inputs)
        return of.function(inputs.flatten(0, depth - 1)).unflatten(0, inputs.shape[:depth])

    def _read(self, of: RowFactor, found: Found, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """What the encoder reads, ``[*B, ...]``."""
        plates = of.rows.plates
        given = self._of_rows(self._inputs, plates, "inputs", len(self._structure.row_sets))
        if given is not None:
            return self._read_given(given(*args, **kwargs), plates, found, args, kwargs)
        parts = []
        for name, dims in of.rows.observations.items():
            parts += [_rows_first(part, dims) for part in self._observed(of, name, found)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(
            [part.flatten(len(plates)) if part.dim() > len(plates) else part[..., None] for part in parts], -1
        )

    def _observed(self, of: RowFactor, name: str, found: Found) -> list[Tensor]:
        """The observed value of a site, and its mask where it has one."""
        value = found.values[name].to(of.function.head.weight.dtype if of.function else self._like.dtype)
        mask = found.masks.get(name)
        if mask is not None and not self._masked[name]:
            raise ValueError(
                f"Expected site {name!r} without a mask, as in the first call, got a mask.\n"
                "Call guide.setup(*args) with arguments for which it is masked: the encoder reads the mask too."
            )
        if not self._masked[name]:
            return [value]
        event_dim = of.rows.frames[0].dim - of.rows.observations[name][0]
        mask = True if mask is None else mask.of_elements(event_dim)
        mask = torch.as_tensor(mask, device=value.device).expand_as(value)
        return [torch.where(mask, value, 0.0), mask.to(value.dtype)]

    def _read_given(self, inputs: Tensor, plates: tuple[str, ...], found: Found, args, kwargs) -> Tensor:
        drawn = {} if self._sources is None else self._sources.draws_rows(args, kwargs)
        for dim, name in enumerate(plates):
            # Where the model draws its rows, the caller cannot know them and gives all.
            if name in drawn:
                inputs = inputs.index_select(dim, found.rows[name].index)
            if inputs.dim() <= dim or inputs.shape[dim] != len(found.rows[name]):
                raise ValueError(
                    f"Expected inputs= to return the {len(found.rows[name])} rows of the call in dimension {dim}, got shape "
                    f"{tuple(inputs.shape)}."
                )
        return inputs


def _by_plates(given: Any) -> Any:
    """A dictionary by the names of plates with tuples as keys; anything else as it is."""
    if not isinstance(given, Mapping):
        return given
    return {(key,) if isinstance(key, str) else tuple(key): value for key, value in given.items()}


def _rows_first(value: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The value with the dimensions of its rows in front."""
    there = all(value.dim() + dim == position for position, dim in enumerate(dims))
    return value if there else value.movedim(dims, tuple(range(len(dims))))


def _qualified(given: Any) -> Any:
    """Widths as they are, code by its name; by plates a text that names all."""
    if isinstance(given, dict):
        return ", ".join(f"{' x '.join(plates)}: {_qualified(each)}" for plates, each in given.items())
    return list(given) if isinstance(given, Sequence) else None if given is None else qualified_name(given)
