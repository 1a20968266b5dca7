"""How options are spelt: with underscores or dashes, and with several values after one flag."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])


class SeveralValues(click.Command):
    """A command whose repeatable options take one or more values after one flag, as argparse's
    `nargs="+"` does: `--test_prompts "a" "b"`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [option for option in self.params if isinstance(option, click.Option)]
        names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
        repeatable = {name for option in options if option.multiple for name in option.opts}
        for flag, following in pairwise((*args, "--")):
            if flag == "--":
                break
            if flag in repeatable and (following in names or following == "--"):
                raise click.UsageError(f"{flag} needs at least one value.", ctx)
        return super().parse_args(ctx, repeat_flags(args, repeatable))


def repeat_flags(args: Sequence[str], repeatable: set[str]) -> list[str]:
    """Write the flag before each of its values; values end at the next flag.

    >>> repeat_flags(["--p", "a", "b", "--n", "1"], {"--p"})
    ['--p', 'a', '--p', 'b', '--n', '1']
    """
    written: list[str] = []
    flag: str | None = None
    taken = 0
    for position, argument in enumerate(args):
        if argument == "--":
            return [*written, *args[position:]]
        if argument.startswith("-") and len(argument) > 1:
            flag, taken = (argument if argument in repeatable else None), 0
            written.append(argument)
            continue
        if flag is not None and taken:
            written.append(flag)
        written.append(argument)
        taken += 1
    return written


class FolderOrFile(click.Path):
    """A path that is not empty: `Path("")` is the current folder, which nobody means by it.

    A leading `~` is the user's home: shells leave it in `--base=~/model` and within quotes. A
    folder of that name is `./~`.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__(path_type=Path, **more)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty.", param, ctx)
        if isinstance(value, str):
            # Path.expanduser raises where `~name` is no user's.
            value = os.path.expanduser(value)  # noqa: PTH111
        return super().convert(value, param, ctx)


#: Taken before and after a command's name; `cli.run` looks for it among the arguments.
debug = click.option(
    "--debug", "-d", is_flag=True, expose_value=False, help="Show the traceback of an error."
)


def option(name: str, field: str | None = None, **more: Any) -> Callable[[_F], _F]:
    """An option under its name with underscores, as in LightRFT's script, and with dashes."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return click.option(*spellings, field or name, **more)
