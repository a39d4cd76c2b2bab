"""Sweeps of a run: a table of their runs each, and a figure where what they went through has an axis."""

from contextlib import suppress
from html import escape
from importlib.util import find_spec

from pipeline.figures.canvas import png
from pipeline.figures.sweeps import draw
from pipeline.report.markup import image
from pipeline.report.run import Run
from pipeline.sweeps import Swept, html_table, read_sweeps
from shards.atomic import whole_file


def sweeps(runs: dict[str, Run]) -> str:
    """Return the sweeps of each run; their figures are ``RUN/sweeps/NAME.png``, too, where a run can be written."""
    return "".join(
        f"<h3>{escape(swept.name if len(runs) == 1 else f'{name} / {swept.name}')}</h3>"
        f"<div class=wide>{html_table(swept)}</div>{_figure(run, swept)}"
        for name, run in runs.items()
        if run.plan is not None
        for swept in read_sweeps(run.folder)
    )


def _figure(run: Run, swept: Swept) -> str:
    if not find_spec("matplotlib") or (figure := draw(swept)) is None:
        return ""
    data = png(figure)
    with suppress(OSError), whole_file(run.folder / "sweeps" / f"{swept.name}.png") as partial:
        partial.write_bytes(data)
    return f"<figure>{image(data, f'sweep {swept.name}, drawn')}</figure>"
