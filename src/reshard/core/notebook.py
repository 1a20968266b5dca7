"""What a notebook shows: a table for a result, a bar for work that goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from reshard.core.sizes import size
from reshard.errors import printable

# Seconds between two updates of a bar: a notebook sends each over the network.
_EACH = 0.2
_LEFT = ' style="text-align:left;vertical-align:top"'


def html_table(
    title: str, rows: Iterable[Sequence[str]], *, header: Sequence[str] = (), more: str = ""
) -> str:
    """A table as HTML. All texts are escaped; `more` is HTML that stands below.

    >>> html_table("a<b", [("x", "1")])[:32]
    '<div><b>a&lt;b</b><table><tbody>'
    """
    head = "".join(f"<th{_LEFT}>{_text(cell)}</th>" for cell in header)
    body = "".join(
        "<tr>" + "".join(f"<td{_LEFT}>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    heading = f"<thead><tr>{head}</tr></thead>" if header else ""
    return f"<div><b>{_text(title)}</b><table>{heading}<tbody>{body}</tbody></table>{more}</div>"


def folded(title: str, content: str) -> str:
    """HTML that is shown on request."""
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _text(words: str) -> str:
    from html import escape  # takes 2 ms, and is used in notebooks alone

    return escape(printable(words, lines=True))


class NotebookBar:
    """Shows how far the work is in a notebook: `reshard.convert(..., progress=NotebookBar())`.

    It takes the calls of every `progress` option. Where IPython is not installed, or no notebook
    is there to show it, nothing is shown. `now` is the clock, in seconds, for tests.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began: dict[str, tuple[float, int]] = {}
        self._last = float("-inf")
        self._handle: Any = None

    def __call__(self, *event: Any) -> None:
        """Take (what, bytes done, bytes in all), or without what."""
        what = str(event[0]) if len(event) == 3 else "working"
        done, total = int(event[-2]), int(event[-1])
        now = self._now()
        if now - self._last < _EACH and done < total:
            return
        self._last = now
        self._show(self._html(what, done, total, now))

    def _html(self, what: str, done: int, total: int, now: float) -> str:
        began, first = self._began.setdefault(what, (now, done))
        speed = (done - first) / max(now - began, 1e-9)
        words = f"{what}: {size(done)} of {size(total)}"
        if speed > 0 and now > began:
            words += f", {size(int(speed))}/s"
            words += f", {(total - done) / speed:.0f} s left" if done < total else ""
        bar = f'<progress value="{done}" max="{max(total, 1)}"></progress>'
        return f"{bar} {_text(words)}"

    def _show(self, html: str) -> None:
        try:
            from IPython import display
        except ImportError:
            return
        shown = display.HTML(html)
        if self._handle is None:
            self._handle = display.display(shown, display_id=True)
        else:
            self._handle.update(shown)
