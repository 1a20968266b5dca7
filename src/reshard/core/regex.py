"""Regular expressions that are compiled on first use.

The rooms have a hundred of them, and a command uses a few: compiling all took 25 ms of each start.
"""

from __future__ import annotations

import re
from typing import Any, AnyStr, Generic, cast


class _Regex(Generic[AnyStr]):
    def __init__(self, pattern: AnyStr, flags: int) -> None:
        self.pattern: AnyStr = pattern
        self._given = flags

    def __getattr__(self, name: str) -> Any:
        """Called once for each name: what is found stays here."""
        if name.startswith("__"):  # asked of every object by copy and pickle
            raise AttributeError(name)
        value = getattr(re.compile(self.pattern, self._given), name)
        setattr(self, name, value)
        return value


def regex(pattern: AnyStr, flags: int = 0) -> re.Pattern[AnyStr]:
    """What `re.compile` returns, but for functions of `re`, which do not take it.

    >>> regex("a+").fullmatch("aa")
    <re.Match object; span=(0, 2), match='aa'>
    """
    return cast("re.Pattern[AnyStr]", _Regex(pattern, flags))
