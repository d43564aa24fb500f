"""Guides in files: weights as safetensors, all else as JSON in the header, so that loading runs no code of the file."""

import copy
import json
import pkgutil
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pyro_avi import families, guides
from pyro_avi.encoder_inputs.window import Window
from pyro_avi.encoders import MLP
from pyro_avi.families import Family
from pyro_avi.guide_bases.description import check_kinds
from pyro_avi.guide_bases.local_guide import LocalGuide
from pyro_avi.inspection.fingerprint import fingerprint
from pyro_avi.tensor_files import read_tensors, write_tensors

__all__ = ["load", "save"]

_FORMAT, _KEY = 1, "pyro_avi"
# The options of a guide that improves what its encoder gives.
_OF_STEPS = ("num_steps", "num_points", "step_size", "learn_step_size")


def _classes_in(room: ModuleType, base: type) -> dict[str, type]:
    """The final classes below ``base`` that the files of a room define, by name: what a file may ask for."""
    modules = (import_module(f"{room.__name__}.{file.name}") for file in pkgutil.iter_modules(room.__path__))
    found = {name: getattr(module, name) for module in modules for name in module.__all__}
    classes = {name: value for name, value in found.items() if isinstance(value, type) and issubclass(value, base)}
    return {name: value for name, value in classes.items() if value is not base}


_GUIDES: dict[str, type[LocalGuide]] = _classes_in(guides, LocalGuide)
_FAMILIES: dict[str, type[Family]] = _classes_in(families, Family)


def save(guide: LocalGuide, path: str | PathLike) -> None:
    """Write a guide to a file, from which :func:`load` makes it again.

    The file holds the guide's parameters in the safetensors format, and in its header as JSON what kind of guide they are
    of: class, family, encoder, sites and shapes, versions. The model and its parameters are not part of it, but a hash of
    them is, so that :func:`load` warns beside others; :meth:`Fit.save` keeps model and guide together. Nor are the rows of a
    guide with ``rows_on="disk"`` part of it, which stay in their folder.

    Args:
        guide: one of the three guides, set up.
        path: the file, replaced where it exists, at once or not at all.

    Raises:
        TypeError: if the guide is none of this package's, or the settings of its family are no plain data.
        ValueError: if it has never been set up.

    Example::

        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> import pyro_avi as avi
        >>> x = torch.rand(20, 1, 8, 8)
        >>> model = avi.models.VAE(avi.models.DenseDecoder(2, (16,), (1, 8, 8)), size=20)
        >>> guide = avi.AmortizedGuide(model, encoder=(32,)).setup(x)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     avi.save(guide, Path(folder) / "guide.safetensors")
        ...     again = avi.load(Path(folder) / "guide.safetensors", model, x)
        >>> bool(torch.equal(again.variational_parameters(x), guide.variational_parameters(x)))
        True
    """
    if type(guide) not in _GUIDES.values():
        raise TypeError(f"Expected one of {', '.join(_GUIDES)}, got {type(guide).__name__}.")
    _as_json(guide.family.describe())
    header = {"format": _FORMAT, "versions": _versions(), "model": fingerprint(guide.model), **guide.describe()}
    write_tensors(Path(path), guide.state_dict(), header, key=_KEY)


def load(
    path: str | PathLike,
    model: Callable,
    *args,
    encoder: Any = None,
    family: families.Family | None = None,
    inputs: Any = None,
    global_guide: Any = None,
    create_plates: Callable | None = None,
    rows_path: str | PathLike | None = None,
    **kwargs,
) -> LocalGuide:
    """Make a guide from a file that :func:`save` wrote.

    Args:
        path: the file.
        model: the model that the guide was made for.
        *args, **kwargs: its arguments. With them the guide is set up and compared with the file at once, without them at its
            first call.
        encoder: where the encoder is a module, one of the same kind. A copy of it takes the weights of the file.
        family: where the family, or a part of it, is none of this package's, the same family that the guide was made with.
        inputs: where the guide was made with ``inputs=``, the same function.
        global_guide: where the globals have another guide than the default, a function to one of the same kind.
        create_plates: as for every guide.
        rows_path: the folder with the rows of a guide with ``rows_on="disk"``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or none of ours, an option is missing, or the model is another one: other
            sites, shapes, plates or numbers of rows.
    """
    header, state = _read(Path(path))
    if header.get("model") not in (None, fingerprint(model)):
        warnings.warn(
            f"The parameters of the model are not those that the guide at {path} was saved beside: its answers are for "
            "another posterior.\nLoad the model's state_dict first; Fit.save keeps both together.",
            stacklevel=2,
        )
    options: dict[str, Any] = {"plate": header["plate"], "family": _family(path, header["family"], family)}
    options |= {"init_scale": header["init_scale"], "create_plates": create_plates}
    if "encoder" in header:
        options["encoder"] = _given(path, "encoder", _widths(encoder, header["encoder"]), header["encoder"])
        options["inputs"] = _inputs(path, inputs, header["inputs"])
        # Files of versions before these were made without.
        rows = header["row_sets"]
        earlier = {"standardize": False, "covariates": [[] for _ in rows], "reads_globals": None}
        header = {**earlier, "reads": ["own row" for _ in rows], **header}
        options["standardize"], options["reads_globals"] = header["standardize"], header["reads_globals"]
        options |= {name: header[name] for name in _OF_STEPS if name in header}
    elif header["class"] == "FactorizedGuide":
        options |= {"same_rows": header["same_rows"], "rows_on": header["rows_on"]}
        if "rows_path" in header:
            # Never the path in the file: what is trained on is written to.
            header["rows_path"] = options["rows_path"] = str(_rows_path(path, rows_path, header["rows_path"]))
    options["global_guide"] = _given(path, "global_guide", global_guide, header["global_guide"])
    guide = _GUIDES[header["class"]](model, **options)
    guide.expect(header, state, family_is_given=family is not None)
    if args or kwargs:
        guide.setup(*args, **kwargs)
    return guide


def _rows_path(path: str | PathLike, given: str | PathLike | None, saved: Any) -> Path:
    if given is None:
        raise ValueError(
            f"Expected rows_path= for the guide in {path}, the folder of its rows on disk, got none.\n"
            f"It was saved with them in {saved}; pass that folder, or where it is now."
        )
    return Path(given).absolute()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    header, state = read_tensors(path, key=_KEY, writer="avi.save")
    if header is None or not isinstance(header.get("class"), str) or header["class"] not in _GUIDES:
        raise ValueError(
            f"Expected a file written by avi.save at {path}, got a safetensors file without a guide's header."
        )
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"Expected format {_FORMAT} at {path}, got {header.get('format')}, written by pyro_avi "
            f"{header.get('versions')}.\nInstall that version or a later one."
        )
    try:
        check_kinds(header)
    except ValueError as error:
        raise ValueError(f"Expected a whole file written by avi.save at {path}, got a damaged one: {error}") from error
    return header, state


def _family(path, described: dict[str, Any], given: families.Family | None) -> families.Family:
    """The family that the guide was made with: as the caller names it, or made by the settings of the file."""
    if given is not None:
        if _as_json(given.describe()) != described:
            raise ValueError(f"Expected family= as described at {path}, {described}, got {given!r}.")
        return given
    if described.get("class") not in _FAMILIES:
        raise ValueError(
            f"Expected a family of {sorted(_FAMILIES)} at {path}, got {described.get('class')!r}.\n"
            "Files hold weights and no code: pass the same family= that the guide was made with."
        )
    settings = described.get("settings")
    try:
        # Of a family that is made of another.
        made = {name: _family(path, x, None) if isinstance(x, dict) else x for name, x in dict(settings or {}).items()}
        return _FAMILIES[described["class"]](**made)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"Expected settings of {described['class']} at {path}, got {settings}: {error}") from error


def _as_json(description: dict[str, Any]) -> dict[str, Any]:
    """A family's description as it comes back from a file.

    Raises:
        TypeError: if its settings are no plain data.
    """
    try:
        return json.loads(json.dumps(description))
    except TypeError as error:
        raise TypeError(
            f"Expected settings() of family {description['class']} to be plain data, numbers, texts, lists and families, got "
            f"{description['settings']}."
        ) from error


def _given(path, option: str, given: Any, described: Any) -> Any:
    """The option as given, or as the file describes it where plain data can."""
    if isinstance(described, str):
        if given is None:
            raise ValueError(
                f"Expected {option}= for the guide at {path}, which was made with {described}, got none.\n"
                f"Files hold weights and no code: pass the same {option}= that the guide was made with."
            )
        return given
    if given is not None and given != described:
        made = "without one" if described is None else f"with {described}"
        raise ValueError(
            f"Expected {option}={described} for the guide at {path}, which was made {made}, got {given!r}."
        )
    return described


def _inputs(path, given: Any, described: Any) -> Any:
    """What the encoder reads, as it is passed on."""
    if isinstance(described, list) and given is None:
        return Window(*described)
    if isinstance(described, dict) and given is None:
        return "needed"
    return given if isinstance(described, list | dict) else _given(path, "inputs", given, described)


def _widths(encoder: Any, described: Any) -> Any:
    """An encoder as it is passed on: a copy, so that loading changes nothing but the guide that it makes."""
    if isinstance(encoder, MLP) and isinstance(described, list):
        # The encoder of a guide that was made with widths.
        return encoder.widths
    if isinstance(encoder, Sequence) and not isinstance(encoder, str):
        return list(encoder)
    return copy.deepcopy(encoder)


def _versions() -> dict[str, str]:
    try:
        own = version("pyro-avi")
    except PackageNotFoundError:
        own = "unknown"
    return {"pyro_avi": own, "torch": torch.__version__, "pyro": version("pyro-ppl")}
