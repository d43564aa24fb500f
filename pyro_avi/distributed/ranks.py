"""The processes that train one model together, and what they tell each other.

Every exchange is a collective of ``torch.distributed``, which all processes have to enter. A process that raises an error
therefore enters the exchange that the others wait in, and tells them; then all of them raise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pyro_avi.rows.shard import Shard
from pyro_avi.seeds import seed_of_rank

__all__ = ["RankError", "Ranks"]

# The numbers in the exchange of a step: the loss, and the squared norm of the gradients in rows.
_NUMBERS = 2


class RankError(RuntimeError):
    """Another process of a training has raised an error; its message says which, and the error's own."""


class Ranks:
    """The processes of a training, of which this is one.

    Args:
        distributed: ``False`` for this process alone, which exchanges nothing; ``True`` for all processes of
            ``torch.distributed``; or a group of them.

    Attributes:
        alone: whether this process trains alone.
        rank: the number of this process, from 0.
        count: the number of processes.

    Raises:
        ValueError: if ``torch.distributed`` is not initialized, or this process is not in the group.
        TypeError: if it is no group.
    """

    def __init__(self, distributed: Any):
        # Some builds of torch come without it.
        is_group = dist.is_available() and isinstance(distributed, dist.ProcessGroup)
        if not (isinstance(distributed, bool) or is_group):
            raise TypeError(f"Expected distributed to be True, False or a process group, got {distributed!r}.")
        if distributed is not False and not (dist.is_available() and dist.is_initialized()):
            raise ValueError(
                "Expected torch.distributed to be initialized, for distributed=True, got none.\nCall "
                'torch.distributed.init_process_group("gloo") ("nccl" for CUDA), and start the program by '
                "torchrun --nproc-per-node=2 program.py."
            )
        self.alone = distributed is False
        self._group = None if isinstance(distributed, bool) else distributed
        self.rank = 0 if self.alone else dist.get_rank(self._group)
        self.count = 1 if self.alone else dist.get_world_size(self._group)
        if self.rank < 0:
            raise ValueError("Expected a process of the group given as distributed=, got one that is not in it.")
        self._step: tuple[str, Sequence[Tensor]] | None = None

    @property
    def shard(self) -> Shard | None:
        """The rows that belong to this process, ``None`` where all do."""
        return None if self.alone else Shard(self.rank, self.count)

    def seed(self, seed: int | None) -> int | None:
        """The seed of this process: draws must not be the same in all. ``None`` stays ``None``."""
        return seed if seed is None else seed_of_rank(seed, self.rank)

    def check_device(self, device: torch.device) -> None:
        """Refuse tensors that the processes cannot exchange.

        Raises:
            ValueError: if they are not on CUDA and the backend is nccl.
        """
        if not self.alone and device.type != "cuda" and dist.get_backend(self._group) == "nccl":
            raise ValueError(
                f"Expected a model on CUDA, for processes that exchange gradients by nccl, got one on {device.type}.\n"
                'Move model, guide and data to the device, or call torch.distributed.init_process_group("gloo").'
            )

    def gather(self, value: Any) -> list:
        """The values of all processes, plain data, in the order of their ranks."""
        if self.alone:
            return [value]
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def gather_tensor(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape."""
        if self.alone:
            return [tensor]
        own = tensor.to(self._device).contiguous()
        tensors = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(tensors, own, group=self._group)
        return [each.to(tensor.device) for each in tensors]

    def all(self, flag: bool) -> bool:
        """Whether a flag is set in every process."""
        return all(self.gather(flag))

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """A context for work without exchanges: an error in one process ends it in all.

        Args:
            what: the work, for the message.

        Raises:
            RankError: if another process raised an error.
        """
        error = None
        try:
            yield
        except Exception as own:
            error = own
        self._exchange(error, what)

    def _exchange(self, error: Exception | None, what: str, value: Any = None) -> list:
        """The values of all processes, unless one of them has an error."""
        found = self.gather((None if error is None else f"{type(error).__name__}: {error}", value))
        if error is not None:
            raise error
        for rank, (message, _) in enumerate(found):
            if message is not None:
                raise RankError(
                    f"Expected all {self.count} processes to finish {what}, got in process {rank} {message}"
                )
        return [value for _, value in found]

    def callbacks(self, callbacks: Sequence[Callable[[Any], Any]]) -> Sequence[Callable[[Any], Any]]:
        """The callbacks, of which one that asks to stop, or raises an error, does so in every process."""
        if self.alone or not callbacks:
            return callbacks

        def call_all(fit: Any) -> bool:
            error, stop = None, False
            try:
                stop = any([callback(fit) is True for callback in callbacks])
            except Exception as own:
                error = own
            return any(self._exchange(error, f"the callbacks after step {fit.steps - 1}", stop))

        return [call_all]

    @torch.no_grad()
    def broadcast(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite tensors by those of process 0."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for tensor in tensors:
            if tensor.numel() and not self.alone:
                by_device.setdefault(tensor.device, []).append(tensor)
        for group in by_device.values():
            # As bytes, since not every backend knows every type.
            parts = [tensor.detach().reshape(-1).clone().view(torch.uint8) for tensor in group]
            flat = torch.cat(parts)
            dist.broadcast(flat, group=self._group, group_src=0)
            for tensor, part in zip(group, flat.split([len(part) for part in parts]), strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    @contextmanager
    def step(self, step: int, parameters: Sequence[Tensor]) -> Iterator[None]:
        """A context for a step, in which every process calls :meth:`means` once: an error before that ends it in all.

        Args:
            step: its number.
            parameters: those of which it takes the mean gradient.
        """
        self._step = None if self.alone else (f"step {step}", parameters)
        try:
            yield
        except Exception as error:
            if self._step is not None:
                self._sums([None] * len(parameters), [0.0] * _NUMBERS, 1.0, error)
            raise

    def means(
        self, grads: Sequence[Tensor | None], numbers: Sequence[float | Tensor], weight: float
    ) -> tuple[list[Tensor | None], list[Tensor], Tensor]:
        r"""Means over all processes, :math:`\sum_k w_k g_k / \sum_k w_k`, exchanged at once.

        Args:
            grads: one for each parameter of the step; ``None`` counts as zeros.
            numbers: two more.
            weight: :math:`w_k`, that of this process.

        Returns:
            The means of the gradients, ``None`` where they are ``None`` in every process; the means of the numbers; and the
            share :math:`w_k / \sum_k w_k`.

        Raises:
            RankError: if another process raised an error in this step.
        """
        sums, (total, *rest) = self._sums(grads, numbers, weight, None)
        return [None if x is None else x / total for x in sums], [x / total for x in rest], weight / total

    def _sums(self, grads, numbers, weight: float, error: Exception | None):
        assert self._step is not None
        what, parameters = self._step
        self._step = None
        like = parameters[0].detach() if parameters else torch.zeros((), dtype=torch.double, device=self._device)
        dtype = like.dtype
        for parameter in parameters:
            dtype = torch.promote_types(dtype, parameter.dtype)
        flags = [error is not None, *(grad is not None for grad in grads)]
        head = [torch.tensor([weight, *flags], dtype=dtype, device=like.device)]
        head += [torch.as_tensor(x).detach().to(like.device, dtype).reshape(1) * weight for x in numbers]
        own = [torch.zeros_like(p) if x is None else x for p, x in zip(parameters, grads, strict=True)]
        flat = torch.cat([*head, *(x.detach().reshape(-1).to(dtype) * weight for x in own)])
        dist.all_reduce(flat, group=self._group)
        sizes = [1, len(flags), *(1 for _ in numbers), *(p.numel() for p in parameters)]
        total, flags, *parts = flat.split(sizes)
        failed, *there = flags.tolist()
        if failed:
            self._exchange(error, what)
        values = [
            x.view(p.shape).to(p.dtype) if held else None
            for p, x, held in zip(parameters, parts[len(numbers) :], there, strict=True)
        ]
        return values, [x.reshape(()) for x in (total, *parts[: len(numbers)])]

    @property
    def _device(self) -> torch.device:
        """Where tensors can be exchanged that are like no parameter; gloo gathers none of CUDA."""
        return torch.device("cuda" if dist.get_backend(self._group) == "nccl" else "cpu")
