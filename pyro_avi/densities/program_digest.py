"""A digest of what decides on which rows the numbers of a call depend: the operations of the call and their constants."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.poutine.trace_struct import Trace
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten

from pyro_avi.tracing.operation_mode import OperationMode

__all__ = ["ProgramDigest"]


@dataclass
class _Memory:
    """What is known of the memory of a tensor.

    Attributes:
        number: in the order in which memories came up.
        reference: as long as it is held, no other memory gets the same address.
        of_rows: whether it is computed from the latents of rows.
        varies: whether it is computed from parameters, other latents or random numbers.
        made: whether it is known how it was made, so that its content follows; otherwise each part that is read counts.
        parts: the parts that are known where it is not made.
    """

    number: int
    reference: StorageWeakRef
    of_rows: bool = False
    varies: bool = False
    made: bool = True
    parts: set = field(default_factory=set)


class ProgramDigest(OperationMode):
    """While this is entered, sums up what torch computes, however the program reaches its tensors.

    Two runs with equal digests are the same function of the latents of rows, of other latents and of the parameters: the
    same operations on tensors of the same shapes that come from the same places, with the same numbers as arguments. Any
    other tensor that enters, from the arguments, a buffer, a closure or out of a list, counts with its content. So does all
    that no operation of torch made: what was computed by other means is taken for a constant.

    Parameters and other latents may have other values in a run with the same digest, but not where that shows in who depends
    on whom: where a value computed from them meets the latents of rows in one operation, it counts where it is zero or not
    finite (a zero weight of a network, a connection that is cut), and whole numbers and booleans count with their content (an
    index, a mask).

    Args:
        of_rows: the latents of rows.
        others: other latents.
    """

    def __init__(self, of_rows: Iterable[Tensor], others: Iterable[Tensor]):
        super().__init__()
        self._hash = hashlib.blake2b(digest_size=32)
        self._memories: dict[int, _Memory] = {}
        self._readable = True
        for tensor in of_rows:
            self._add_result(tensor, of_rows=True, varies=False)
        for tensor in others:
            self._add_result(tensor, of_rows=False, varies=True)

    def add(self, *facts: Any) -> None:
        """Take in something else that counts, by its text."""
        self._hash.update(repr(facts).encode())

    def add_trace(self, trace: Trace) -> None:
        """Take in what the sample sites of a trace are, beside their numbers; parameters have other names in every guide."""
        self.add(*(_facts(site) for site in trace.nodes.values() if site["type"] == "sample"))

    def digest(self) -> bytes | None:
        """The digest; ``None`` where a tensor's content cannot be read."""
        return self._hash.digest() if self._readable else None

    def run(self, func: Any, types: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Take in an operation, and run it."""
        leaves, tree = tree_flatten((args, kwargs))
        inputs = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not self._readable or not all(map(_has_content, inputs)):
            self._readable = False
            return func(*args, **kwargs)
        known = [self._known(tensor) for tensor in inputs]
        self.add(str(func), str(tree), [_text(leaf) for leaf in leaves], [memory.number for memory in known])
        of_rows = any(memory.of_rows for memory in known)
        varies = any(memory.varies for memory in known) or torch.Tag.nondeterministic_seeded in func.tags
        if of_rows:
            for tensor, memory in zip(inputs, known, strict=True):
                if memory.varies and not memory.of_rows:
                    self._hash.update(_bytes(_pattern(tensor)))
        result = func(*args, **kwargs)
        for tensor in tree_flatten((result, _written(func, args, kwargs)))[0]:
            if isinstance(tensor, Tensor):
                self._add_result(tensor, of_rows, varies)
        return result

    def _known(self, tensor: Tensor) -> _Memory:
        """The memory of an input; that of one which no operation has made counts by its content."""
        memory = self._memories.get(tensor.untyped_storage()._cdata)
        if memory is None:
            # Of what is trained, the values are others in every run.
            trained = (tensor.requires_grad or isinstance(tensor, nn.Parameter)) and tensor.is_floating_point()
            memory = self._memory(tensor, varies=trained, made=trained)
        if not memory.made and _part(tensor) not in memory.parts:
            memory.parts.add(_part(tensor))
            self._hash.update(_bytes(tensor))
        return memory

    def _add_result(self, tensor: Tensor, of_rows: bool, varies: bool) -> None:
        if not _has_content(tensor):
            self._readable = False
            return
        memory = self._memories.get(tensor.untyped_storage()._cdata)
        if memory is None:
            self._memory(tensor, of_rows=of_rows, varies=varies)
        else:
            # A view of an input, or an input that was changed.
            memory.of_rows, memory.varies = memory.of_rows or of_rows, memory.varies or varies
            memory.parts.add(_part(tensor))

    def _memory(self, tensor: Tensor, **known: Any) -> _Memory:
        storage = tensor.untyped_storage()
        memory = _Memory(len(self._memories), StorageWeakRef(storage), **known)
        self._memories[storage._cdata] = memory
        return memory


def _facts(site: Mapping[str, Any]) -> tuple:
    infer = sorted((name, value) for name, value in site["infer"].items() if isinstance(value, (bool, int, str)))
    scale = site["scale"] if isinstance(site.get("scale"), (int, float)) else None
    frames = [(frame.name, frame.dim, frame.size, frame.full_size) for frame in site["cond_indep_stack"]]
    return site["name"], site["is_observed"], infer, scale, frames, str(type(site["fn"]))


def _written(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> list:
    """The arguments that an operation changes."""
    if not func._schema.is_mutable:
        return []
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | dict(kwargs)
    is_written = {argument.name for argument in func._schema.arguments if argument.is_write}
    return [value for name, value in named.items() if name in is_written]


def _has_content(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and tensor.device.type != "meta" and not tensor.is_quantized


def _part(tensor: Tensor) -> tuple:
    return tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _text(leaf: Any) -> Any:
    """An argument of an operation: a tensor by its place in its memory, a random generator by its kind, others as they are."""
    if isinstance(leaf, Tensor):
        return str(leaf.device), *_part(leaf)
    return type(leaf) if isinstance(leaf, torch.Generator) else leaf


def _pattern(tensor: Tensor) -> Tensor:
    """What of a value decides whether others that it is computed with still count."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return (tensor == 0).to(torch.uint8) + 2 * (~tensor.isfinite()).to(torch.uint8)


def _bytes(tensor: Tensor) -> Any:
    # Once what an expanded tensor has many times.
    once = tensor.detach()[tuple(slice(1) if stride == 0 else slice(None) for stride in tensor.stride())]
    plain = once.resolve_conj().resolve_neg().cpu().contiguous()
    # A contiguous tensor of one element may have any stride.
    return plain.as_strided((plain.numel(),), (1,)).view(torch.uint8).numpy()
