"""The places of parameters in modules, and contexts with other tensors in these places."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

from pyro import poutine
from torch import Tensor, nn

from pyro_avi.compilation.fallback import CannotCompile

__all__ = ["find_slots", "in_modules", "parameters_replaced"]


def in_modules(parameters: Sequence[Tensor], owners: Sequence[Callable]) -> bool:
    """Whether every parameter belongs to a module of the owners, model and guide."""
    try:
        find_slots(parameters, owners)
    except CannotCompile:
        return False
    return True


def find_slots(parameters: Sequence[Tensor], owners: Sequence[Callable]) -> list[tuple[nn.Module, str]]:
    """The module and name of each parameter.

    Raises:
        CannotCompile: if one belongs to no module of the owners, model and guide.
    """
    # A module may stand inside of Pyro's handlers, and the parameters of a bound method are those of its object.
    inside = [poutine.unwrap(owner) for owner in owners]
    roots = [getattr(owner, "__self__", owner) for owner in inside]
    modules = [module for root in roots if isinstance(root, nn.Module) for module in root.modules()]
    known = {id(p): (module, name) for module in modules for name, p in module.named_parameters(recurse=False)}
    if not all(id(parameter) in known for parameter in parameters):
        raise CannotCompile("a parameter belongs to no module of model or guide")
    return [known[id(parameter)] for parameter in parameters]


@contextmanager
def parameters_replaced(slots: Sequence[tuple[nn.Module, str]], values: Sequence[Tensor]) -> Iterator[None]:
    """A context in which the parameters of modules are replaced by these tensors."""
    own = [module._parameters[name] for module, name in slots]
    for (module, name), value in zip(slots, values, strict=True):
        # A plain tensor stands in for the parameter.
        cast("dict[str, Tensor]", module._parameters)[name] = value
    try:
        yield
    finally:
        for (module, name), parameter in zip(slots, own, strict=True):
            module._parameters[name] = parameter
