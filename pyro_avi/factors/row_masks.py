"""The mask and scale of the rows of a joint factor."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from pyro import poutine
from pyro.poutine.indep_messenger import CondIndepStackFrame
from torch import Tensor

from pyro_avi.factors.layout import Layout, spread
from pyro_avi.families import Family
from pyro_avi.inspection.masks import Mask
from pyro_avi.inspection.structure import Latent

__all__ = ["enter_mask_and_scale", "coordinate_mask", "common_to_rows"]


def enter_mask_and_scale(stack: ExitStack, mask: Mask | None, scale: Tensor | float | None) -> None:
    """Enter a mask and a scale for the sites that are sampled in a stack of contexts."""
    if mask is not None:
        stack.enter_context(poutine.mask(mask=mask.values))
    if scale is not None:
        stack.enter_context(poutine.scale(scale=scale))


def common_to_rows(
    given: Mapping[str, Mask | Tensor | float],
    what: str,
    names: Sequence[str],
    frames: Sequence[CondIndepStackFrame],
    family: Family,
):
    """The mask or scale of whole rows, the same for all of their latents.

    Args:
        given: masks or scales by site.
        what: which of them.
        names: of the latents.
        frames: the plates of the rows.
        family: of the factor, for the message.

    Raises:
        ValueError: if it is not the same for all, or a part of a row.
    """
    found = [given.get(name) for name in names]
    values = [x.values if isinstance(x, Mask) else x for x in found]
    whole = not any(isinstance(x, Mask) and x.event_dim for x in found)
    whole &= all(x is values[0] or (not isinstance(x, Tensor) and x == values[0]) for x in values)
    if whole and isinstance(values[0], Tensor):
        rows = {-frame.dim for frame in frames}
        whole = all(size == 1 or values[0].dim() - i in rows for i, size in enumerate(values[0].shape))
    if not whole:
        instead = "DiagonalNormal() or MarkovNormal(order=...)" if what == "mask" else "DiagonalNormal()"
        raise ValueError(
            f"Expected one {what} for whole rows with the joint family {type(family).__name__}, got a {what} on "
            f"{[name for name in names if name in given]} of the latents {list(names)}, or on a part of their elements.\n"
            f"A joint factor cannot leave out a part of a row. Use family={instead}, or one poutine."
            f"{what} around all latents of the rows."
        )
    return found[0]


def coordinate_mask(
    masks: Mapping[str, Mask],
    latents: Sequence[Latent],
    layouts: Mapping[str, Layout],
    frames: Sequence[CondIndepStackFrame],
    sizes: Sequence[int],
) -> Tensor:
    """Which coordinates of the rows count, ``[*plates, K]``.

    Args:
        masks: what masks the sites of latents, by site.
        latents: the latents, in the order of the coordinates.
        layouts: how they lie in the rows, by site.
        frames: the plates of the rows.
        sizes: those of the dimensions of the plates, up to the leftmost of the rows'.
    """
    parts = []
    for latent in latents:
        layout, mask = layouts[latent.name], masks.get(latent.name, Mask(True))
        values = torch.as_tensor(mask.of_elements(latent.unconstrained_event_dim))
        of_site = layout.from_spread(torch.empty(*sizes, layout.size, device="meta")).shape
        parts.append(spread(layout.to_rows(values.expand(of_site)), frames, len(sizes)))
    like = next((part for part in parts if part.device.type != "cpu"), parts[0])
    return torch.cat([part.to(like.device) for part in parts], -1)
