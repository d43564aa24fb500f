"""The state of a training: parameters, buffers, the state of its optimizer and of its callbacks."""

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast, runtime_checkable

import pyro
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pyro_avi.optimization.adam import Moments
from pyro_avi.optimization.divergence import are_finite
from pyro_avi.optimization.step import HasRowTables, TrainingStep

__all__ = ["HasState", "StateBackup", "TrainingState"]

# The share of a training's time that backups may take.
_SHARE = 0.01


@runtime_checkable
class HasState(Protocol):
    """A callback whose state is in checkpoints: tensors, numbers and strings in mappings, lists and tuples."""

    def state_dict(self) -> Mapping[str, Any]:
        """The state."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Go on from a state."""
        ...


class TrainingState:
    """The tensors of a training by name.

    Args:
        training_step: holds the parameters and their optimizers.
        model, guide: whose parameters and buffers they are.

    Attributes:
        names: the names of the parameters by their ids: ``model.`` or ``guide.`` and the name in the module, or ``param.``
            and the name of a ``pyro.param`` statement.
    """

    def __init__(self, training_step: TrainingStep, model: Callable, guide: Callable):
        self._training_step = training_step
        roots = {kind: getattr(part, "__self__", part) for kind, part in (("model", model), ("guide", guide))}
        modules = {kind: root for kind, root in roots.items() if isinstance(root, nn.Module)}
        self.names: dict[int, str] = {}
        tables: set[int] = set(map(id, guide.row_tables().values())) if isinstance(guide, HasRowTables) else set()
        self._shared: list[Tensor] = []
        for kind, root in modules.items():
            for name, parameter in root.named_parameters():
                self._name(parameter, f"{kind}.{name}", tables)
        for name, parameter in pyro.get_param_store().named_parameters():
            self._name(parameter, f"param.{name}", tables)
        self._buffers = [
            (f"{kind}.{prefix}{'.' if prefix else ''}{name}", module, name)
            for kind, root in modules.items()
            for prefix, module in root.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.numel()
        ]

    def _name(self, parameter: Tensor, name: str, tables: set[int]) -> None:
        if id(parameter) not in self.names and id(parameter) not in tables:
            self._shared.append(parameter)
        self.names.setdefault(id(parameter), name)

    def parameters(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return {self.names[id(parameter)]: parameter.detach() for parameter in self._training_step.parameters}

    def parameters_in_memory(self) -> dict[str, Tensor]:
        """The parameters by name without tables on disk, whose rows are checked as they are moved."""
        on_disk = {self.names[id(table)] for table in self._training_step.on_disk}
        return {name: value for name, value in self.parameters().items() if name not in on_disk}

    def shared(self) -> list[Tensor]:
        """What is the same in all processes of a training: parameters and buffers, trained or not, but for tables."""
        return [*self._shared, *self.buffers()]

    def buffers(self) -> list[Tensor]:
        """The buffers of model and guide."""
        return [cast(Tensor, module._buffers[own]) for _, module, own in self._buffers]

    def values(self) -> dict[str, Tensor]:
        """The parameters by name, and the buffers."""
        return self.parameters() | {name: module._buffers[own] for name, module, own in self._buffers}

    def moments(self) -> dict[str, Tensor]:
        """The moments of Adam by name; none of parameters that an optimizer of the user moves.

        Those of torch's Adam are converted to those of :class:`~pyro_avi.optimization.adam.Adam`, so that an eager training
        can be resumed compiled and the other way round.
        """
        moments: dict[str, Tensor] = {}
        for adam in self._training_step.adams:
            moments |= self._named(adam.parameter, adam.moments)
        for parameter in self._torch_adam_parameters():
            like = torch.atleast_1d(parameter.detach())
            held = self._optimizer.state.get(parameter)
            if held:
                own = Moments(
                    held["exp_avg"].view_as(like), held["exp_avg_sq"].view_as(like), held["step"].reshape(1).to(like)
                )
            else:
                own = Moments(torch.zeros_like(like), torch.zeros_like(like), like.new_zeros(1))
            moments |= self._named(parameter, own)
        return moments

    def optimizer_state(self) -> dict[str, Any] | None:
        """The state of the user's optimizer, ``None`` where there is none."""
        given = self._training_step.optimizer_is_given
        return (
            self._training_step.optimizer.state_dict() if given and self._training_step.optimizer is not None else None
        )

    def optimizer_class(self) -> str | None:
        """The name of the class of the user's optimizer, ``None`` where there is none."""
        optimizer = self._training_step.optimizer
        if optimizer is None or not self._training_step.optimizer_is_given:
            return None
        return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"

    @torch.no_grad()
    def load(self, values: dict[str, Tensor], moments: dict[str, Tensor], optimizer: dict[str, Any] | None) -> None:
        """Write a state into the training.

        Args:
            values, moments: from :meth:`values` and :meth:`moments` of the same model and guide, on any device.
            optimizer: from :meth:`optimizer_state` with an optimizer of the same class.
        """
        for name, tensor in self.values().items():
            tensor.copy_(values[name])
        for adam in self._training_step.adams:
            for name, tensor in self._named(adam.parameter, adam.moments).items():
                tensor.copy_(moments[name])
        for parameter in self._torch_adam_parameters():
            own = Moments(*(moments[f"{self.names[id(parameter)]}:{kind}"] for kind in Moments._fields))
            held = self._optimizer.state
            held.pop(parameter, None)
            if own.visits > 0:
                held[parameter] = {
                    "step": own.visits.reshape(()).to(parameter.device, torch.float32, copy=True),
                    "exp_avg": own.first.view_as(parameter).to(parameter.device, copy=True),
                    "exp_avg_sq": own.second.view_as(parameter).to(parameter.device, copy=True),
                }
        if optimizer is not None:
            self._optimizer.load_state_dict(optimizer)

    @property
    def _optimizer(self) -> Optimizer:
        """The torch optimizer of the training, which has one where this is asked."""
        return cast(Optimizer, self._training_step.optimizer)

    def _torch_adam_parameters(self) -> list[Tensor]:
        optimizer = self._training_step.optimizer
        if optimizer is None or self._training_step.optimizer_is_given:
            return []
        return [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def _named(self, parameter: Tensor, moments: Moments) -> dict[str, Tensor]:
        name = self.names[id(parameter)]
        return {f"{name}:{kind}": tensor for kind, tensor in moments._asdict().items()}


class StateBackup:
    """A copy of the last state of a training that was known to be finite, on the same devices.

    Args:
        state: the state.

    Attributes:
        step: the number of steps after which the copy was made, ``None`` where there is no copy yet.
    """

    def __init__(self, state: TrainingState):
        self._state = state
        self.step: int | None = None
        self._tensors: dict[str, Tensor] = {}
        self._optimizer: dict[str, Any] | None = None
        self._began, self._spent = time.perf_counter(), 0.0

    def update(self, step: int, all_of: Callable[[bool], bool] = bool) -> None:
        """Copy the state if it is finite, unless copies have taken their share of the time already.

        Args:
            step: the number of steps taken.
            all_of: whether a flag is set in all processes of the training, which make copies at the same steps.
        """
        started = time.perf_counter()
        if not all_of(self.step is None or self._spent <= _SHARE * (started - self._began)):
            return
        moments = self._state.moments()
        # Buffers are not checked: a mask that is added may hold infinity.
        if all_of(are_finite(self._state.parameters() | moments)):
            tensors = self._state.values() | moments
            with torch.no_grad():
                if self._tensors.keys() == tensors.keys():
                    for name, tensor in tensors.items():
                        self._tensors[name].copy_(tensor)
                else:
                    self._tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            self._optimizer = copy.deepcopy(self._state.optimizer_state())
            self.step = step
        self._spent += time.perf_counter() - started

    def restore(self) -> None:
        """Bring the training back to the state of the copy."""
        self._state.load(self._tensors, self._tensors, self._optimizer)
