"""The verdict on a model: whether an encoder of a row alone can close the amortization gap, and what it would have to read."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pyro_avi.display.text_table import text_table
from pyro_avi.encoder_inputs.window import Window
from pyro_avi.inspection.isolated_run import isolated_run
from pyro_avi.lock import in_turn
from pyro_avi.sufficiency.counterexample import gradient_difference
from pyro_avi.sufficiency.inputs import Input, window_over
from pyro_avi.sufficiency.joint import Joint

__all__ = ["Amortizability", "LatentVerdict"]

_WORDS = {True: "yes", False: "no", None: "undecided"}


@dataclass(frozen=True)
class LatentVerdict:
    """The verdict on one local latent.

    Attributes:
        name: of its site.
        plates: of its rows.
        possible: whether a function of the row's own data gives the best factor of every row, for every data set: the
            question of *transfer*. ``None`` where it is undecided.
        interpolates: whether rows of one data set with equal data have equal best factors, so that a function of the row's
            own data that is fitted anew to each data set can give them: the weaker question of *interpolation*.
        inputs: what an inference function has to read.
        reads_index: whether it also has to be told which row it is.
        coupled: whether the latents of different rows are coupled.
        reason: in a sentence.
    """

    name: str
    plates: tuple[str, ...]
    possible: bool | None
    interpolates: bool | None
    inputs: tuple[Input, ...]
    reads_index: bool
    coupled: bool
    reason: str

    @property
    def inputs_needed(self) -> str:
        """The inputs in words."""
        parts = [str(each) for each in self.inputs] + ["the row's index"] * self.reads_index
        return ", ".join(parts) or "nothing"

    @property
    def reads_whole_plate(self) -> bool:
        """Whether data of all rows are to be read, or of others than a window holds."""
        return self.coupled or any(each.kind in ("whole plate", "irregular") for each in self.inputs)

    def window(self) -> Window | None:
        """The window that an encoder has to read; ``None`` where it needs the row's own data alone, or the whole plate.

        An encoder of the whole plate reads its rows in order, and so knows which is which.

        Raises:
            ValueError: if the verdict is undecided, or asks for the row's index or for elements that belong to the row by
                another argument: a guide does not know how to read them.
        """
        if self.possible is not None and self.reads_whole_plate:
            return None
        asks = "the row's index" if self.reads_index else ""
        asks = asks or ", ".join(str(each) for each in self.inputs if each.kind in ("selected", "selector"))
        if self.possible is None or asks:
            raise ValueError(
                f"Expected a verdict on {self.name} that says what a row's encoder reads, got one that "
                f"{f'asks for {asks}' if asks else 'leaves it open'}: {self.reason}\n"
                "Tell the guide what to read: inputs=lambda *args, **kwargs: ..."
            )
        return window_over(self.inputs)


@dataclass(frozen=True, repr=False)
class Amortizability:
    """The verdict on a model, by latent.

    Attributes:
        latents: the verdicts, in the order of the model.
    """

    latents: tuple[LatentVerdict, ...]

    @property
    def by_latent(self) -> Mapping[str, LatentVerdict]:
        """The verdicts by the latents' names."""
        return {each.name: each for each in self.latents}

    @property
    def possible(self) -> bool | None:
        """Whether it is possible for every latent; ``None`` if one is undecided and none impossible."""
        found = {each.possible for each in self.latents}
        return False if False in found else None if None in found else True

    @property
    def inputs_needed(self) -> str:
        """What inference functions have to read, in words."""
        return "; ".join(dict.fromkeys(each.inputs_needed for each in self.latents))

    @property
    def reason(self) -> str:
        """Why; of the latents that decide."""
        deciding = [each for each in self.latents if each.possible is self.possible]
        return " ".join(dict.fromkeys(each.reason for each in deciding))

    def table(self, *, format: str = "text") -> str:
        """The verdict on each latent.

        Args:
            format: ``"text"`` or ``"markdown"``.

        Raises:
            ValueError: if it is neither.
        """
        if format not in ("text", "markdown"):
            raise ValueError(f'Expected format to be "text" or "markdown", got {format!r}.')
        cells = [["latent", "plates", "possible", "interpolates", "inputs needed"]]
        for each in self.latents:
            words = [_WORDS[each.possible], _WORDS[each.interpolates]]
            cells.append([each.name, " x ".join(each.plates), *words, each.inputs_needed])
        return text_table(cells, self.reason, format=format)

    @in_turn
    def check(
        self,
        model: Callable,
        *args: Any,
        inputs: str = "own row",
        transfer: bool = True,
        plate: str | Sequence[str] | None = None,
        structure: Sequence[str] = (),
        **kwargs: Any,
    ) -> dict[str, float]:
        """Look for two rows that refute an encoder, by numbers and without any training.

        One row's inputs are copied over another's, and with equal variational parameters on both and random ones elsewhere the
        gradients of the ELBO by these parameters are compared. If they differ, no encoder of these inputs can be optimal for
        both. Equal ones prove nothing.

        Args:
            model, plate, structure: as for the verdict.
            *args, **kwargs: the arguments of the model.
            inputs: what the encoder reads: ``"own row"``, or ``"needed"`` for the window that the verdict asks for. Latents
                whose rows are coupled, so that they need more than a window, are left out then.
            transfer: whether the rows are in different data sets with the same global latents; otherwise in one.

        Returns:
            By latent the relative difference: about 1e-16 where nothing is refuted; ``nan`` where a row's data cannot be given
            to another row, and no other data set is looked at.
        """
        if inputs not in ("own row", "needed"):
            raise ValueError(f'Expected inputs= to be "own row" or "needed", got {inputs!r}.')
        plates = None if plate is None else (plate,) if isinstance(plate, str) else tuple(plate)
        found: dict[str, float] = {}
        with isolated_run(0):
            joint = Joint(model, args, kwargs, plates=plates, fixed=tuple(structure))
            for at, rows in enumerate(joint.row_sets):
                verdict = self._verdict_on(rows.latents[0].name)
                window: dict[str, int] = {}
                if inputs == "needed":
                    if verdict.coupled or any(not (each.is_own or each.kind == "window") for each in verdict.inputs):
                        continue
                    window["before"] = max((each.before for each in verdict.inputs), default=0)
                    window["after"] = max((each.after for each in verdict.inputs), default=0)
                difference = gradient_difference(joint, at, transfer=transfer, **window)
                found.update(dict.fromkeys((latent.name for latent in rows.latents), difference))
        return found

    def _verdict_on(self, latent: str) -> LatentVerdict:
        if latent not in self.by_latent:
            raise ValueError(
                f"Expected the model of this verdict, with local latents {sorted(self.by_latent)}, got one with {latent!r}.\n"
                "Ask for a verdict on that model: avi.amortizability(model, *args).check(model, *args)"
            )
        return self.by_latent[latent]

    def __repr__(self) -> str:
        return f"Amortizability(possible={self.possible}, inputs_needed={self.inputs_needed!r}, reason={self.reason!r})"
