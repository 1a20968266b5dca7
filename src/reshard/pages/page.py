"""What every page has: its template, its policy, and the file that it becomes."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Any

from reshard._version import __version__
from reshard.comparison.sums import percent, short
from reshard.core.sizes import size
from reshard.errors import UnsupportedError, WriteError, printable
from reshard.storage.paths import absolute, is_folder
from reshard.storage.texts import check_page

#: In the head of every page; it identifies a page.
MARK = '<meta name="generator" content="reshard">'


def check_place(path: Path) -> None:
    """Raise `UnsupportedError` without jinja2, and `WriteError` where `path` cannot become a page.

    Called before the work whose result the page shows.
    """
    _jinja()
    if not is_folder(absolute(path).parent):
        raise WriteError("there is no such folder.", path=absolute(path).parent)
    if is_folder(path):
        raise WriteError("this is a folder.", path=path, hint="Name a file with --html.")
    check_page(path, MARK, "a page of reshard")


def _jinja() -> Any:
    try:
        import jinja2
    except ImportError:
        raise UnsupportedError(
            "a page is made with jinja2, which is not installed.",
            hint="Install the extra, in reshard's folder: pip install '.[html]'.",
        ) from None
    return jinja2


def render(template: str, **values: Any) -> str:
    """A page as HTML. All values are escaped, and characters that cannot be shown spelt out."""
    jinja2 = _jinja()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_data),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
    )
    environment.filters |= {"percent": percent, "short": short, "size": size}
    script = _data("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    markup = jinja2.utils.markupsafe.Markup
    page: str = environment.get_template(template).render(
        **values,
        version=__version__,
        mark=markup(MARK),
        style=markup(_data("page.css")),
        script=markup(script),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )
    return page


def _data(name: str) -> str:
    return (files("reshard.pages") / "data" / name).read_text(encoding="utf-8")


def _finalize(value: object) -> object:
    """The output of a value: the printable form of a plain text, because a name may hold
    anything."""
    return printable(value, lines=True) if type(value) is str else value
