"""The files of a training that several processes take: each of them writes its own, and all go on from the same step."""

import glob
from os import PathLike
from pathlib import Path

from pyro_avi.checkpoints.file import read
from pyro_avi.distributed.ranks import Ranks

__all__ = ["make_way", "own_file", "settled"]


def own_file(path: str | PathLike, ranks: Ranks) -> Path:
    """The file of this process: ``path``, and of several processes ``path.0-of-2`` and ``path.1-of-2``."""
    path = Path(path)
    return path if ranks.alone else path.with_name(f"{path.name}.{ranks.rank}-of-{ranks.count}")


def _before(own: Path) -> Path:
    return own.with_name(own.name + ".before")


def make_way(own: Path, ranks: Ranks) -> None:
    """Keep the file of this process beside the one that is written now, until all processes have written theirs."""
    if not ranks.alone and own.exists():
        # No process can be further ahead: each takes a step with all others.
        own.replace(_before(own))


def settled(path: str | PathLike | None, ranks: Ranks) -> Path | None:
    """The file of this process, of the last step of which all processes have one.

    A program that is killed while its processes write leaves the files of some after another step than those of others.

    Args:
        path: of the training, ``None`` for none.
        ranks: its processes.

    Returns:
        The file, which may not be there; ``None`` for no path.

    Raises:
        ValueError: if the training was that of another number of processes, or files of a process are missing.
    """
    if path is None:
        return None
    own, taken = own_file(path, ranks), {}
    with ranks.together(f"looking for the training at {path}"):
        _check_count(Path(path), ranks)
        if ranks.alone:
            return own
        taken = {read(file).steps: file for file in (_before(own), own) if file.exists()}
    everywhere = ranks.gather(sorted(taken))
    common = set(everywhere[0]).intersection(*everywhere)
    if common and taken[max(common)] != own:
        taken[max(common)].replace(own)
    if any(everywhere) and not common:
        raise ValueError(
            f"Expected files of all {ranks.count} processes of the training at {path}, after one and the same step, got those "
            f"after {everywhere}.\nBring back the files that are missing, or begin anew: another path, or remove these."
        )
    return own


def _check_count(path: Path, ranks: Ranks) -> None:
    """Refuse the files of another number of processes."""
    if own_file(path, ranks).exists():
        return
    counts = {int(name.rpartition("-of-")[2]) for name in glob.glob(f"{glob.escape(str(path))}.*-of-*[0-9]")}
    counts |= {1} if path.exists() else set()
    if counts - {ranks.count}:
        raise ValueError(
            f"Expected the training of {ranks.count} process{'es' * (ranks.count > 1)} at {path}, got that of "
            f"{' and of '.join(map(str, sorted(counts)))}.\n"
            "Start as many processes as it was begun with: each holds rows, moments and a random state of its own."
        )
