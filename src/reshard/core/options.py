"""What an option of a command is: its name, the type of its values, and what it is for.

An option is declared once. The keyword of the Python function, the flag of the command line, the
line in `--help` and `docs/cli.md` and the paragraph in the docstring are all made from that, and
every value, from wherever it comes, is parsed by the option's type: a wrong value is an
`OptionError` that names the option.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from textwrap import TextWrapper
from typing import Any, Protocol, TypeVar

from msgspec import Struct

from reshard.core.locations import location
from reshard.core.plan import parse_size
from reshard.errors import OptionError, brief

#: The groups of options, in the order of `--help`.
GROUPS = ("Input", "Output", "Adapters", "Reward models and critics",
          "Training state", "What may differ")  # fmt: skip

PathLike = str | os.PathLike[str]
_F = TypeVar("_F", bound=Callable[..., Any])


class ValueType(Struct, frozen=True):
    """The values that an option takes. `shown` is its place holder on the command line."""

    @property
    def words(self) -> str:
        """What a value is, in words, after "is not"."""
        raise NotImplementedError

    def parse(self, value: object) -> Any:
        """The value as the program uses it; raises `ValueError` where it is not of the type.

        Types that can say more precisely what is wrong raise `OptionError` themselves.
        """
        raise NotImplementedError


class Flag(ValueType, frozen=True):
    """True or False. With `no`, the flag turns the option off (`--no-verify`), and this text
    describes it.

    `either`: there is a flag for each value.
    """

    no: str = ""
    either: bool = False

    @property
    def words(self) -> str:
        return "True or False"

    def parse(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value


class Choice(ValueType, frozen=True):
    """One of a few words; `aliases` maps other spellings to them."""

    choices: tuple[str, ...]
    aliases: Mapping[str, str] = {}

    @property
    def words(self) -> str:
        return f"one of {', '.join(self.choices)}"

    def parse(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError
        found = self.aliases.get(value, value)
        if found not in self.choices:
            raise ValueError
        return found


class DTypeName(Choice, frozen=True):
    """A choice of dtypes, which a `torch.dtype` may name as well."""

    def parse(self, value: object) -> str:
        if type(value).__name__ == "dtype" and str(value).startswith("torch."):
            value = str(value).removeprefix("torch.")
        return super().parse(value)


class Text(ValueType, frozen=True):
    """A word or a name; not empty."""

    @property
    def words(self) -> str:
        return "a text that is not empty"

    def parse(self, value: object) -> str:
        if not isinstance(value, str) or not value.strip() or "\0" in value:
            raise ValueError
        return value


class Parsed(Text, frozen=True):
    """A text that `reads` parses; it raises `OptionError`."""

    reads: Callable[[str], Any]

    def parse(self, value: object) -> Any:
        return self.reads(super().parse(value))


class Texts(ValueType, frozen=True):
    """A list of words or names; one text is not a list."""

    @property
    def words(self) -> str:
        return "a list of texts that are not empty"

    def parse(self, value: object) -> tuple[str, ...]:
        return tuple(map(Text().parse, listed(value)))


class Codes(ValueType, frozen=True):
    """True, False, or a list of codes of `known`."""

    known: Mapping[str, object]

    @property
    def words(self) -> str:
        return "True, False or a list of codes"

    def parse(self, value: object) -> bool | tuple[str, ...]:
        if isinstance(value, bool):
            return value
        codes = tuple(map(Text().parse, listed(value)))
        for code in codes:
            if code not in self.known:
                near = get_close_matches(code, self.known, 3, 0.5)
                hint = (
                    f"Did you mean {' or '.join(near)}?"
                    if near
                    else "docs/findings.md lists all codes."
                )
                raise OptionError(f"{brief(code)} is not the code of a finding.", hint=hint)
        return codes or False


class Integer(ValueType, frozen=True):
    """A whole number, from `least` to `most`."""

    least: int | None = None
    most: int | None = None

    @property
    def words(self) -> str:
        bounds = [f"at least {self.least}"] * (self.least is not None)
        bounds += [f"at most {self.most}"] * (self.most is not None)
        return " ".join(["a whole number", *bounds[:1], *(f"and {bound}" for bound in bounds[1:])])

    def parse(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise ValueError
        number = int(value)
        if (self.least is not None and number < self.least) or (
            self.most is not None and number > self.most
        ):
            raise ValueError
        return number


class Number(ValueType, frozen=True):
    """A positive finite number."""

    @property
    def words(self) -> str:
        return "a positive number"

    def parse(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError
        try:
            number = float(value)
        except OverflowError:
            raise ValueError from None
        if not math.isfinite(number) or number <= 0:
            raise ValueError
        return number


class Size(ValueType, frozen=True):
    """Bytes: a whole number, or a text like 5GB."""

    @property
    def words(self) -> str:
        return "a size: a whole number of bytes, or a text like 5GB"

    def parse(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, (str, Integral)):
            raise ValueError
        return parse_size(value if isinstance(value, str) else int(value))


class Place(ValueType, frozen=True):
    """A path of a file or folder. The empty path is refused: no user means the current folder by
    it.

    `remote`: the URL of a store is taken as well; `writes`: of one that can be written.
    """

    remote: bool = False
    writes: bool = False

    @property
    def words(self) -> str:
        return "a path: a text or an os.PathLike"

    def parse(self, value: object) -> Path:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError
        text = os.fspath(value)
        if not isinstance(text, str) or not text or "\0" in text:
            raise ValueError
        return location(text, remote=self.remote, writes=self.writes)


class Function(ValueType, frozen=True):
    """Something to call."""

    @property
    def words(self) -> str:
        return "a function"

    def parse(self, value: object) -> Any:
        if not callable(value):
            raise ValueError
        return value


class TorchDType(Protocol):
    """A `torch.dtype`, for type annotations only: torch is not imported."""

    @property
    def is_floating_point(self) -> bool: ...
    @property
    def itemsize(self) -> int: ...


class Option(Struct, frozen=True):
    """An option. `name` is its keyword in Python, and with dashes its flag.

    A `required` option has no default; on the command line it is an argument, of no flag.
    `needs_base`: it acts on a base's names or values. `underscored`: the flag is also known with
    underscores, as LightRFT has it. `only_python`: there is no flag. `spelt`: the flag,
    where it is another.
    """

    name: str
    type: ValueType
    help: str
    default: object = None
    required: bool = False
    group: str = ""
    metavar: str = ""
    short: str = ""
    needs_base: bool = False
    underscored: bool = False
    only_python: bool = False
    spelt: str = ""

    @property
    def flag(self) -> str:
        """The flag without its dashes in front."""
        return self.spelt or self.name.replace("_", "-")

    def parse(self, value: object) -> Any:
        """The value as the program uses it; None stays None where that is the default.

        Raises `OptionError`, which names the option.
        """
        if value is None and self.default is None and not self.required:
            return None
        try:
            return self.type.parse(value)
        except OptionError as error:
            raise OptionError(
                f"{self.name}: {error.message}", hint=error.hint, option=self.name
            ) from None
        except (ValueError, TypeError):
            raise OptionError(
                f"{self.name}: {brief(value)} is not {self.type.words}.", option=self.name
            ) from None


Options = Mapping[str, Option]


def table(*options: Option) -> Options:
    """Options by name."""
    return {option.name: option for option in options}


def parse(options: Options, given: Mapping[str, object]) -> dict[str, Any]:
    """The values of all options; those that were not given have their defaults.

    Raises `OptionError`, which names the option at fault; `also` are those of the others.
    """
    for name in given.keys() - options.keys():
        raise OptionError(f"{name}: there is no such option.", option=name)
    values = {name: option.default for name, option in options.items()} | dict(given)
    parsed: dict[str, Any] = {}
    errors: list[OptionError] = []
    for name, option in options.items():
        try:
            parsed[name] = option.parse(values[name])
        except OptionError as error:
            errors.append(error)
    if errors:
        errors[0].also = tuple(errors[1:])
        raise errors[0]
    return parsed


def listed(value: object) -> Sequence[object]:
    """A list or tuple, as it is; raises `ValueError` for a text, bytes and all else."""
    if isinstance(value, (str, bytes, bytearray, memoryview)) or not isinstance(value, Sequence):
        raise ValueError
    return value


def documented(options: Options) -> Callable[[_F], _F]:
    """Add a paragraph on each option to a function's docstring."""

    def document(function: _F) -> _F:
        wrap = TextWrapper(96, initial_indent="    ", subsequent_indent="    ").fill
        lines = ["", "    Parameters", "    ----------"]
        for option in options.values():
            lines += [f"    {option.name}:", f"    {wrap(option.help)}"]
        function.__doc__ = f"{(function.__doc__ or '').rstrip()}\n" + "\n".join(lines) + "\n    "
        return function

    return document
