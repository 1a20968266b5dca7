"""An answer's text, piece by piece, while its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# What a tokenizer decodes bytes to that are not a whole character yet.
_PARTIAL = "\ufffd"


class Spoken:
    """Turns tokens into text as they come.

    A token's text depends on those before it: a space, a character of several tokens. So the last
    tokens are decoded with and without the new ones, and what was added is the new text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        # The tokens from `start` to `told` are context: their text was passed on before.
        self._start = self._told = 0

    def add(self, new: Sequence[int]) -> str:
        """The text that the new tokens add; empty while a character is not complete."""
        self._ids += new
        before = self._decode(self._ids[self._start : self._told])
        now = self._decode(self._ids[self._start :])
        if len(now) <= len(before) or now.endswith(_PARTIAL):
            return ""
        self._start, self._told = self._told, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """The text that is still pending, at the end."""
        before = self._decode(self._ids[self._start : self._told])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text
