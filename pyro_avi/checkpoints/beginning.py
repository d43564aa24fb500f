"""From which file a training goes on: its own, or one that it is told to go on from."""

from collections.abc import Callable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from pyro_avi.checkpoints.file import SavedTraining, read
from pyro_avi.checkpoints.settings import differences
from pyro_avi.errors import check_count

__all__ = ["Beginning", "Beginnings"]


class Beginning(NamedTuple):
    """What a training goes on from.

    Attributes:
        path: the file.
        saved: what it holds.
        own: whether it is this training itself, and not another one's state to go on from.
        insisted: whether it is to be gone on from whatever has changed.
    """

    path: Path
    saved: SavedTraining
    own: bool
    insisted: bool

    def is_finished(self, num_steps: int) -> bool:
        """Whether nothing of this training is left to do: it has taken its steps, or a callback has ended it."""
        all_taken = self.saved.steps == num_steps
        return self.own and (all_taken or (self.saved.ended and self.saved.num_steps == num_steps))

    def check_last(self, found: str) -> None:
        """Refuse batches of which the last one that was used is not that of this training.

        Args:
            found: its hash.

        Raises:
            ValueError: if it is another one.
        """
        if self.own and not self.insisted and self.saved.last != found:
            step = self.saved.steps - 1
            where = (
                f"the batch of step {step} has other values: its data have changed, or batches that cannot be repeated"
            )
            raise another_training(self.path, self.saved.steps, [where])


class Beginnings:
    """The files that a training may go on from, read before any work is done.

    Args:
        checkpoint: the file of this training itself, ``None`` where it has none.
        every: the number of steps between two times that it is written.
        resume: a file whose state is taken over whatever the settings are.
        num_steps: the number of steps, in all.
        seed: of the draws.

    Raises:
        FileNotFoundError: if there is nothing at ``resume``.
        ValueError: if a file cannot be read or has taken more steps than asked for, the checkpoint's folder is missing, or
            there is no seed.
    """

    def __init__(
        self,
        checkpoint: str | PathLike | None,
        every: int,
        resume: str | PathLike | None,
        *,
        num_steps: int,
        seed: int | None,
    ):
        check_count("every", every)
        self._checkpoint = None if checkpoint is None else Path(checkpoint).absolute()
        self._resume = None if resume is None else Path(resume).absolute()
        self._files: dict[Path, SavedTraining] = {}
        if self._checkpoint is not None:
            self._check(self._checkpoint, seed)
            if self._checkpoint.exists():
                self._files[self._checkpoint] = read(self._checkpoint)
        if self._resume is not None and self._resume not in self._files:
            self._files[self._resume] = read(self._resume)
        for path, saved in self._files.items():
            if saved.steps > num_steps or (saved.steps == num_steps and path != self._checkpoint):
                least = "at least" if path == self._checkpoint else "more than"
                raise ValueError(
                    f"Expected num_steps of {least} the {saved.steps} taken by the training at {path}, got {num_steps}."
                )

    @property
    def path(self) -> Path | None:
        """The file of this training itself."""
        return self._checkpoint

    def choose(self, settings: Callable[[], Mapping[str, Any]]) -> Beginning | None:
        """The file that a training goes on from, ``None`` where it begins anew.

        Args:
            settings: gives what decides its numbers.

        Raises:
            ValueError: if the checkpoint is of another training, and is not the file to resume from.
        """
        # Not kept while the training goes on: they are as large as its state.
        files, self._files = self._files, {}
        insisted = self._resume == self._checkpoint
        if self._checkpoint is not None and self._checkpoint in files:
            own = files[self._checkpoint]
            differ = differences(own.settings or {}, settings())
            if not differ:
                return Beginning(self._checkpoint, own, own=True, insisted=insisted)
            if not insisted:
                raise another_training(self._checkpoint, own.steps, differ)
        return None if self._resume is None else Beginning(self._resume, files[self._resume], own=False, insisted=True)

    @staticmethod
    def _check(path: Path, seed: int | None) -> None:
        if seed is None:
            raise ValueError(
                "Expected a seed with checkpoint=, got None: draws from the program's random state are others when the program "
                "is started again."
            )
        if not path.parent.is_dir():
            raise ValueError(f"Expected a folder for checkpoint=, found none at {path.parent}.")


def another_training(path: Path, steps: int, differ: list[str]) -> ValueError:
    """The error that a checkpoint is of another training, with what differs."""
    return ValueError(
        f"Expected the checkpoint at {path} to be of this training, got one after {steps} steps of another: "
        f"{'; '.join(differ)}.\n"
        "Try one of the following fixes:\n"
        "- to go on with that training: the arguments that it was begun with\n"
        "- to begin this one anew: another checkpoint=, or remove the file\n"
        "- to go on from its state with these arguments: the same file as resume= beside checkpoint="
    )
