"""Figures without pyplot."""

import io

__all__ = ["new_figure"]


def new_figure(**options):
    """A figure that is not registered with pyplot: it opens no window and need not be closed. Notebooks display it.

    Args:
        **options: of :class:`matplotlib.figure.Figure`.
    """
    from matplotlib.figure import Figure

    class Shown(Figure):
        def _repr_png_(self) -> bytes:
            file = io.BytesIO()
            self.savefig(file, format="png")
            return file.getvalue()

    return Shown(**options)
