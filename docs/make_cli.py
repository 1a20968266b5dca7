"""Writes docs/cli.md, the reference of all commands, from the commands themselves.

    python docs/make_cli.py

`tests/test_docs.py` fails when the page is out of date.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import click

from reshard.cli.app import reshard
from reshard.cli.lightrft import ds2hf, fsdp2hf, hf2fsdp, test_model

PAGE = Path(__file__).parent / "cli.md"
SCRIPTS = {
    "ds2hf": ds2hf.command,
    "fsdp2hf": fsdp2hf.command,
    "hf2fsdp": hf2fsdp.command,
    "test_model": test_model.command,
}
_HEAD = """\
# Commands

<!-- Written by docs/make_cli.py from the commands themselves; change it there. -->

`reshard` has one command for each task. The four scripts of LightRFT do the same under their own
names and flags: they are installed as commands, and `python lightrft/utils/ckpt_scripts/ds2hf.py
...` runs them from a clone. In Python, each command except `try` is a function of the same name
with the same options: `reshard.convert`, `reshard.inspect`, `reshard.verify`, `reshard.diff`,
`reshard.doctor`, `reshard.watch`.

Results go to standard output, findings and progress to standard error. On a terminal, errors are
red, warnings and unverified results yellow, and verified results green; `NO_COLOR=1` switches
colours off.

| exit code | |
|---|---|
| 0 | done; for `verify` and `diff`: no difference |
| 1 | an error ([errors.md](errors.md)), or a difference |
| 2 | wrong usage |
| 130 | interrupted |
"""


_COMPLETION = """
## Shell completion

Your shell can complete commands, options, their values, paths, and the tags of a run (`--tag`).
One line switches completion on for `reshard`:

```bash
eval "$(_RESHARD_COMPLETE=bash_source reshard)"      # in ~/.bashrc
eval "$(_RESHARD_COMPLETE=zsh_source reshard)"       # in ~/.zshrc
_RESHARD_COMPLETE=fish_source reshard | source       # in ~/.config/fish/config.fish
```
"""


def commands() -> dict[str, click.Command]:
    """Every command that a user can type, by what is typed."""
    context = click.Context(reshard)
    found: dict[str, click.Command] = {"reshard": reshard}
    for name in reshard.list_commands(context):
        command = reshard.get_command(context, name)
        if command is not None:
            found[f"reshard {name}"] = command
    return found | SCRIPTS


def page() -> str:
    """The page's text."""
    return (
        _HEAD
        + _COMPLETION
        + "".join("\n" + "\n".join(section(n, c)) + "\n" for n, c in commands().items())
    )


def section(name: str, command: click.Command) -> Iterator[str]:
    """A command: its usage, what it does, and a table of its options."""
    yield f"## `{name}`\n"
    context = click.Context(command, info_name=name)
    yield "```\n" + " ".join([name, *command.collect_usage_pieces(context)]) + "\n```\n"
    yield inspect.cleandoc(command.help or "").replace("\b\n", "")
    rows = [row(option) for option in command.params if isinstance(option, click.Option)]
    if rows:
        yield "\n| option | |\n|---|---|"
        yield from rows


def row(option: click.Option) -> str:
    """An option: its spellings and values, what it is for, its default."""
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = _value(option)
    words = [option.help or ""]
    if option.required:
        words.append("Required.")
    if option.show_default and option.default not in (None, False, ()):
        words.append(f"Default: `{option.default}`.")
    text = " ".join(word if word.endswith((".", "`")) else f"{word}." for word in words if word)
    return f"| {names}{value} | {text.replace('|', chr(92) + '|')} |"


def _value(option: click.Option) -> str:
    if option.is_flag or option.count:
        return ""
    if isinstance(option.type, click.Choice):
        return " " + " \\| ".join(f"`{choice}`" for choice in option.type.choices)
    shown = option.metavar or option.type.name.upper()
    return f" `{shown}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
