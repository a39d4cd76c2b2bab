"""Bits of HTML."""

import base64
from collections.abc import Iterable, Sequence
from html import escape


class Html(str):
    """Text that is HTML already; all other text is escaped."""


def cell(value: object) -> str:
    """Return a value as HTML."""
    return value if isinstance(value, Html) else escape(str(value))


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> str:
    """Return a table that scrolls by itself where it is too wide; ``numbers`` are the columns on the right."""

    def row(tag: str, cells: Sequence[object]) -> str:
        marked = (f"<{tag}{' class=n' if n in numbers else ''}>{cell(each)}</{tag}>" for n, each in enumerate(cells))
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(row("td", each) for each in rows)
    return f"<div class=wide><table><thead>{row('th', heads)}</thead><tbody>{body}</tbody></table></div>"


def image(png: bytes, name: str) -> str:
    """Return a PNG in the page itself."""
    return f'<img alt="{escape(name)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def folded(summary: str, text: str) -> str:
    """Return text as it is, which a click unfolds."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"
