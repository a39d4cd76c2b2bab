"""Where figures are drawn: matplotlib without a screen."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shards.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS = 150  # an inch


def sheet(width: float, height: float) -> "Figure":
    """Return an empty figure of so many inches."""
    try:
        from matplotlib.figure import Figure  # no pyplot: nothing global, no screen
    except ImportError:
        raise UserError("figures need matplotlib; install it: pip install 'patchmill[figures]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def tiles(
    pictures: Sequence[np.ndarray] | np.ndarray, columns: int, side: float, title: str, **how: object
) -> "Figure":
    """Draw pictures [h, w] or [h, w, 3] row by row, each ``side`` inches wide; ``how`` as of matplotlib's imshow."""
    rows = -(-len(pictures) // columns)
    figure = sheet(max(columns * side, 4.0), rows * side + 0.4)
    figure.suptitle(title, fontsize=9)
    for place, axis in enumerate(np.ravel(figure.subplots(rows, columns, squeeze=False))):
        axis.set_axis_off()
        if place < len(pictures):
            axis.imshow(pictures[place], **how)
    return figure


def png(figure: "Figure") -> bytes:
    """Return a figure as a PNG file, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DOTS, metadata={"Software": None})
    return buffer.getvalue()
