"""How options are spelt: flags from their declarations, values after one flag, groups in --help.

A flag has dashes; those that LightRFT's script knows have underscores as well.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any, TypeVar

import click

from reshard.cli import output
from reshard.cli.completion import complete_tag
from reshard.core.locations import RemotePath, location
from reshard.core.options import (
    GROUPS,
    Choice,
    Codes,
    Flag,
    Integer,
    Number,
    Option,
    Place,
    Texts,
)
from reshard.errors import OptionError

_F = TypeVar("_F", bound=Callable[..., Any])
# Flags of other programs, and reshard's equivalents.
_MEANT = {
    "-help": "--help",
    "--revision": "--tag",
    "--checkpoint": "--tag",
    "--src": "SRC, the first argument",
    "--source": "SRC, the first argument",
    "--input": "SRC, the first argument",
    "-i": "SRC, the first argument",
    "--dst": "DST, the second argument",
    "--output": "DST, the second argument",
    "-o": "DST, the second argument",
    "--base-model": "--base",
    "--model": "--base",
    "--force": "--overwrite",
    "-f": "--overwrite",
}
_OTHERS = "Other options"


class Command(click.Command):
    """A command whose options are shown in groups.

    Repeatable options take one or more values after one flag, as argparse's `nargs="+"` does:
    `--test_prompts "a" "b"`. An option of one value that is given twice is refused: to take either
    would be a guess. `examples` are lines at the end of `--help`, `usage` is its first one where an
    option belongs there.
    """

    def __init__(
        self, *given: Any, examples: Sequence[str] = (), usage: str = "", **more: Any
    ) -> None:
        super().__init__(*given, **more)
        self.examples = examples
        self.usage = usage

    def invoke(self, ctx: click.Context) -> Any:
        output.begin_counting()
        return super().invoke(ctx)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [self.usage] if self.usage else super().collect_usage_pieces(ctx)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [option for option in self.params if isinstance(option, click.Option)]
        names = {name for option in options for name in (*option.opts, *option.secondary_opts)}
        bare = {name: o.known for o in options if isinstance(o, _Codes) for name in o.opts}
        repeatable = {name for o in options if o.multiple for name in o.opts} - bare.keys()
        for flag, following in pairwise((*args, "--")):
            if flag == "--":
                break
            if flag in repeatable and (following in names or following == "--"):
                raise click.UsageError(f"{flag} needs at least one value.", ctx)
        self._check_meant(ctx, args, names)
        written = repeat_flags(known_values(args, bare), repeatable)
        self._check_once(ctx, written)
        ctx.allow_extra_args = True
        extra = super().parse_args(ctx, written)
        if extra and not ctx.resilient_parsing:
            ctx.fail(self._superfluous(ctx, extra))
        return extra

    def _check_meant(self, ctx: click.Context, args: Sequence[str], names: Collection[str]) -> None:
        """Refuse a flag of other programs, and name reshard's flag."""
        for argument in takewhile(lambda argument: argument != "--", args):
            flag = argument.partition("=")[0]
            meant = _MEANT.get(flag)
            if meant and flag not in names and (meant in (*names, "--help") or meant[0] != "-"):
                raise click.UsageError(f"No such option {flag!r}. Did you mean {meant}?", ctx)

    def _superfluous(self, ctx: click.Context, extra: Sequence[str]) -> str:
        """The error for one argument too many, with what it may be meant as."""
        takes = " and ".join(p.make_metavar(ctx) for p in self.params if isinstance(p, Argument))
        message = (
            f"{ctx.command_path} takes {takes or 'no argument'}; {extra[0]!r} is one too many."
        )
        for option in self.params:
            free = option.name in ("base", "against") and ctx.params.get(option.name) is None
            if len(extra) == 1 and free:
                flag = max(option.opts, key=len)
                what = "the base model" if option.name == "base" else "what to compare with"
                return f"{message} Is it {what}? Then write: {flag} {shlex.quote(extra[0])}"
        return message

    def _check_once(self, ctx: click.Context, args: list[str]) -> None:
        """Refuse an option of one value, or of yes and no, that is given twice."""
        if ctx.resilient_parsing:
            return
        _, _, order = self.make_parser(ctx).parse_args(list(args))
        for option in dict.fromkeys(order):
            single = isinstance(option, click.Option) and not option.multiple and not option.count
            twice = order.count(option) > 1
            if single and twice and (option.secondary_opts or not getattr(option, "is_flag", 0)):
                flag = max(option.opts, key=len)
                raise click.UsageError(f"{flag} was given twice; it takes one value.", ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        arguments = [p for p in self.params if isinstance(p, Argument) and p.words]
        if arguments:
            groups["Arguments"] = [(a.make_metavar(ctx), a.words) for a in arguments]
        params = [p for p in self.get_params(ctx) if not isinstance(p, click.Argument)]
        grouped = any(getattr(param, "group", "") for param in params)
        for param in params:
            record = param.get_help_record(ctx)
            if record is not None:
                title = getattr(param, "group", "") or (_OTHERS if grouped else "Options")
                groups.setdefault(title, []).append(record)
        for title in sorted(groups, key=lambda title: (title == _OTHERS, _place(title))):
            with formatter.section(title):
                formatter.write_dl(groups[title])
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':>{formatter.current_indent}}$ {line}\n")


def _place(title: str) -> int:
    """The position of a group in `--help`: the most used comes first."""
    return GROUPS.index(title) if title in GROUPS else -1


class Argument(click.Argument):
    """An argument with its own text in `--help`."""

    def __init__(self, *given: Any, words: str = "", **more: Any) -> None:
        super().__init__(*given, **more)
        self.words = words


class Grouped(click.Option):
    """An option that `--help` shows under the title `group`.

    With `brief`, its spelling with underscores is not shown there.
    """

    def __init__(self, *given: Any, group: str = "", brief: bool = False, **more: Any) -> None:
        super().__init__(*given, **more)
        self.group = group
        self.brief = brief

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is None or not self.brief:
            return record
        shown = (*self.opts, *self.secondary_opts)
        hidden = [name for name in shown if "_" in name and name.replace("_", "-") in shown]
        spelt = record[0]
        for name in hidden:
            spelt = spelt.replace(f"{name}, ", "")
        return spelt, record[1]


class _Codes(Grouped):
    """A flag that may be followed by codes of `known`: `--strict`, `--strict no-checksums`."""

    def __init__(self, *given: Any, known: Collection[str], **more: Any) -> None:
        super().__init__(*given, multiple=True, callback=self._value, **more)
        self.known = known

    @staticmethod
    def _value(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> object:
        return "" in values or tuple(values)


def known_values(args: Sequence[str], flags: Mapping[str, Collection[str]]) -> list[str]:
    """Write each of `flags` before each of the known values after it, or with an empty value.

    >>> known_values(["--s", "a", "b", "x", "--s"], {"--s": ["a", "b"]})
    ['--s=a', '--s=b', 'x', '--s=']
    """
    written: list[str] = []
    position = 0
    while position < len(args) and args[position] != "--":
        argument = args[position]
        position += 1
        if argument not in flags:
            written.append(argument)
            continue
        values = list(takewhile(flags[argument].__contains__, args[position:]))
        written += [f"{argument}={value}" for value in values or [""]]
        position += len(values)
    return [*written, *args[position:]]


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
    """A path that is not empty: `Path("")` is the current folder, which no user means by it.

    A leading `~` is the user's home: shells leave it in `--base=~/model` and within quotes. A
    folder of that name is `./~`. The URL of a store is taken as a declared option says.
    """

    def __init__(self, *, place: Place | None = None, **more: Any) -> None:
        super().__init__(path_type=Path, **more)
        self._place = place or Place()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty.", param, ctx)
        if isinstance(value, str):
            try:
                path = location(value, remote=self._place.remote, writes=self._place.writes)
            except OptionError as error:
                self.fail(str(error), param, ctx)
            if isinstance(path, RemotePath):
                return path
            # Path.expanduser raises where `~name` is not a user's.
            value = os.path.expanduser(value)  # noqa: PTH111
        return super().convert(value, param, ctx)


def debug(command: _F) -> _F:
    """Taken before and after a command's name; `cli.run` looks for it among the arguments."""
    flag = click.option(
        "--debug", "-d", is_flag=True, expose_value=False, help="Show the traceback of an error."
    )
    return flag(command)


def json_flag(command: _F) -> _F:
    """The flag that prints a command's result as JSON."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def html(command: _F) -> _F:
    """The flag that makes a page of what a command found."""
    flag = click.option(
        "--html",
        type=FolderOrFile(dir_okay=False),
        metavar="FILE",
        help="Also write the result to FILE as one self-contained web page (needs the extra html).",
    )
    return flag(command)


def option(name: str, field: str | None = None, **more: Any) -> Callable[[_F], _F]:
    """An option under its name with underscores, as in LightRFT's script, and with dashes."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
    return click.option(*spellings, field or name, **more)


class _Aliased(click.Choice[str]):
    """A choice that also takes other spellings, which `--help` does not list."""

    def __init__(self, kind: Choice) -> None:
        super().__init__(kind.choices)
        self._aliases = kind.aliases

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(self._aliases.get(value, value), param, ctx)


def flags(options: Iterable[Option]) -> Callable[[_F], _F]:
    """The flags of declared options, in that order; those of Python alone have none."""

    def add(function: _F) -> _F:
        for declared in reversed([*options]):
            if not (declared.required or declared.only_python):
                function = flag(declared, brief=True)(function)
        return function

    return add


def flag(declared: Option, **changes: Any) -> Callable[[_F], _F]:
    """The flag of a declared option; `changes` are click's words for what is different here."""
    spellings = [f"-{declared.short}"] * bool(declared.short)
    if declared.underscored:
        spellings.append(f"--{declared.name}")
    spellings.append(f"--{declared.flag}")
    more: dict[str, Any] = {"cls": Grouped, "group": declared.group, "help": declared.help}
    if declared.name == "tag":
        spellings.append("--step")  # its number is what most people have in mind
        more["shell_complete"] = complete_tag
    kind = declared.type
    if isinstance(kind, Flag):
        more |= {"is_flag": True, "default": declared.default}
        if kind.either:
            spellings = [f"{name}/--no-{name[2:]}" for name in spellings]
        elif kind.no:
            spellings = [f"--no-{declared.flag}"]
            more |= {"flag_value": False, "help": kind.no}
    elif isinstance(kind, Codes):
        more |= {"cls": _Codes, "known": kind.known, "metavar": f"[{declared.metavar}...]"}
    elif isinstance(kind, Texts):
        more |= {"multiple": True, "metavar": f"{declared.metavar or 'TEXT'}..."}
    else:
        more |= {"type": type_of(declared), "metavar": declared.metavar or None}
        if declared.default is not None:
            more |= {"default": declared.default, "show_default": True}
    return click.option(*dict.fromkeys(spellings), declared.name, **{**more, **changes})


def argument(name: str, declared: Option, **changes: Any) -> Callable[[_F], _F]:
    """The argument of a declared option, by another name; `changes` are as those of `flag`."""
    more = {"type": type_of(declared), "cls": Argument, "words": declared.help}
    return click.argument(name, **{**more, **changes})


def type_of(declared: Option) -> click.ParamType[Any]:
    """Click's type for the values of a declared option, where one word is one value."""
    kind = declared.type
    if isinstance(kind, Choice):
        return _Aliased(kind)
    if isinstance(kind, Integer):
        bounded = kind.least is not None or kind.most is not None
        return click.IntRange(kind.least, kind.most) if bounded else click.INT
    if isinstance(kind, Number):
        return click.FLOAT
    return FolderOrFile(place=kind) if isinstance(kind, Place) else click.STRING
