"""The base class of all guides of this package: an automatic guide with a parameter name of its own."""

import copy
import io
import itertools
import pickle
from abc import abstractmethod
from collections.abc import Container, Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from pyro.poutine.indep_messenger import CondIndepStackFrame

from pyro_avi.errors import CallError
from pyro_avi.inspection.data_errors import explain_data_errors

__all__ = ["BaseGuide"]

_count = itertools.count()


class _MissingModel:
    """The placeholder in a guide for a model that could not be pickled with it."""

    def __init__(self, name: str):
        self.__name__ = name

    def __call__(self, *args, **kwargs):
        raise ValueError(
            f"Expected a guide with its model, got one whose model {self.__name__} could not be pickled with it.\n"
            "Make a guide for the model and give it these parameters: new.load_state_dict(guide.state_dict()). To save guides "
            "for any model, use avi.save and avi.load."
        )


class _Pickler(pickle.Pickler):
    def __init__(self, file, model):
        super().__init__(file)
        self._model = model

    def persistent_id(self, obj):
        return "model" if obj is self._model else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, model):
        super().__init__(file)
        self._model = model

    def persistent_load(self, pid):
        return self._model


def _without_model(cls: type["BaseGuide"], state: bytes, name: str) -> "BaseGuide":
    guide = cls.__new__(cls)
    guide.__setstate__(_Unpickler(io.BytesIO(state), _MissingModel(name)).load())
    return guide


def _can_be_pickled(model: Any) -> bool:
    try:
        pickle.dumps(model)
    except (AttributeError, TypeError, pickle.PicklingError):
        return False
    return True


class BaseGuide(AutoGuide):
    """An :class:`~pyro.infer.autoguide.AutoGuide` with a name of its own that survives copying.

    Pyro's parameter store identifies parameters by name. Two guides of one name would share an entry, and the store would
    hand the optimizer the other guide's tensor, so that one of them silently never trains. Copying such a guide would also
    set the original's model to ``None``.
    """

    def __init__(self, model, *, create_plates=None):
        super().__init__(model, create_plates=create_plates)
        self._pending_state: tuple[dict[str, Any], bool, bool] | None = None
        self._asked_dtype: torch.dtype | None = None
        self._asked_device: torch.device | None = None
        self._take_new_name()

    def _take_new_name(self):
        root = f"{type(self).__name__}_{next(_count)}"
        for path, module in self.named_modules():
            if isinstance(module, PyroModule):
                module._pyro_name = f"{root}.{path}" if path else root

    def __call__(self, *args, **kwargs):
        """Call the guide; errors are raised without the tables of shapes that Pyro appends to them."""
        try:
            return super().__call__(*args, **kwargs)
        except ValueError as error:
            final = CallError.of(error)
            if final is error:
                raise
            raise final from error.__cause__

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False):
        """As for every module; a guide that has no parameters yet takes them when it is set up."""
        if self._is_set_up:
            return super().load_state_dict(state_dict, strict, assign)
        self._pending_state = (dict(state_dict), strict, assign)
        return super().load_state_dict({}, strict=False)

    @property
    @abstractmethod
    def _is_set_up(self) -> bool:
        """Whether the parameters have been created."""

    def _apply(self, fn, recurse=True):
        if not self._is_set_up:
            # A dtype was asked for if tensors of single and of double precision become the same.
            single, double = (fn(torch.empty(0, dtype=dtype)) for dtype in (torch.float32, torch.float64))
            if single.dtype == double.dtype:
                self._asked_dtype = single.dtype
            if single.device.type != "cpu":
                self._asked_device = single.device
        return super()._apply(fn, recurse)

    def _take_pending(self) -> None:
        """Load the state and move to the device and dtype that were asked for before there were parameters."""
        if self._pending_state is not None:
            state, strict, assign = self._pending_state
            super().load_state_dict(state, strict, assign)
        if self._asked_dtype is not None or self._asked_device is not None:
            self.to(device=self._asked_device, dtype=self._asked_dtype)
        # Only after all of it succeeded: a state that was not loaded stays pending.
        self._pending_state = self._asked_dtype = self._asked_device = None

    def __getstate__(self):
        # Weak references, plates and the rows of the last call are valid in this process only.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
            vars(parameter).pop("_pyro_subsample", None)
        return {**self.__dict__, "master": None, "plates": {}}

    def __reduce_ex__(self, protocol):
        if _can_be_pickled(self.model):
            return super().__reduce_ex__(protocol)
        # The model cannot be pickled, as a function inside a function; the guide's parameters still can.
        file = io.BytesIO()
        _Pickler(file, self.model).dump(self.__getstate__())
        name = getattr(self.model, "__qualname__", type(self.model).__qualname__)
        return _without_model, (type(self), file.getvalue(), name)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._take_new_name()

    def __deepcopy__(self, memo):
        # The copy is a new guide for the same model, unless the model is copied along with it.
        memo.setdefault(id(self.model), self.model)
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new

    def _check_prototype(self, part_trace):
        # Parts of this guide are made from its own model, so there is nothing to check.
        pass

    def _given_plates(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, pyro.plate]:
        """The plates that an enclosing guide or ``create_plates`` provides."""
        if self.master is not None:
            return self.master().plates
        if self.create_plates is None:
            return {}
        with explain_data_errors(args, kwargs):
            plates = self.create_plates(*args, **kwargs)
        plates = [plates] if isinstance(plates, pyro.plate) else list(plates)
        for plate in plates:
            if not isinstance(plate, pyro.plate):
                raise TypeError(f"Expected create_plates() to return plates, got {type(plate).__name__}.")
        return {plate.name: plate for plate in plates}

    @staticmethod
    def _plates(
        frames: Iterable[CondIndepStackFrame], given: Mapping[str, pyro.plate], without_size: Container[str]
    ) -> dict[str, pyro.plate]:
        """The plates given, and for all other plates of latents new ones over all rows."""
        plates = dict(given)
        missing = {frame.name: frame for frame in frames if frame.name not in plates}
        if missing:
            # Hidden from handlers, so that a guide written by hand may use plates of the same names.
            with poutine.block():
                for name, frame in missing.items():
                    size = None if name in without_size else frame.full_size or frame.size
                    plates[name] = pyro.plate(name, size, dim=frame.dim)
        return plates
