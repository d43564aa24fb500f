"""Contexts that see every tensor operation below autograd."""

import sys
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["OperationMode"]


class OperationMode(TorchDispatchMode):
    """While this is entered, :meth:`run` takes the place of every operation, also inside of backward passes."""

    def __init__(self) -> None:
        super().__init__()
        # Apart from a part of the program that is compiled, with which this would be compiled as well.
        self._run = torch.compiler.disable(self.run) if "torch._dynamo" in sys.modules else self.run

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Where torch sees to it, it imports its compiler, which takes more than a second.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take in an operation, and run it."""
        return self._run(func, types, args, kwargs or {})

    @abstractmethod
    def run(self, func: Any, types: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """What an operation returns, or ``NotImplemented`` to leave it to the classes of its arguments.

        Args:
            func: the operation.
            types: of the tensors among its arguments that are of classes of their own.
            args, kwargs: its arguments.
        """
