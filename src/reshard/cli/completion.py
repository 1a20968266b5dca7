"""Shell completion of a run's tags, beside options, choices and paths."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import CompletionItem

# The flags that name the run; in other commands it is the first argument.
_RUNS = ("against", "checkpoint_dir")


def complete_tag(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """The saves of the run that stands on the line already, newest first."""
    from reshard.errors import ReshardError
    from reshard.formats import locate, tags

    # While an option lacks its value, arguments are not assigned to their names.
    flag = next((p.name for p in ctx.command.params if p.name in _RUNS), None)
    given = ctx.params.get(flag) if flag else next(iter(ctx.args), None)
    if not given:
        return []
    try:
        run = Path(os.path.expanduser(given))  # noqa: PTH111 (`~name` may be no user)
        below = [save.path for save in locate.saves(run)]
        inside = [save.path for path in below for save in locate.saves(path)]
    except (OSError, ReshardError):
        return []
    found = {path.name for path in (*below, *inside) if tags.number_of(path.name) >= 0}
    names = sorted({*found, tags.LATEST}, key=lambda name: (-tags.number_of(name), name))
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]
