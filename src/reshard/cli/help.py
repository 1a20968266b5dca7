"""The command `reshard help`."""

from __future__ import annotations

import sys
from difflib import get_close_matches

import click

from reshard.cli.flags import Command, debug


@click.command("help", cls=Command, short_help="Explain a command, an error, a finding or a topic.")
@click.argument("name", metavar="[TOPIC]", required=False)
@debug
def help_(name: str | None) -> None:
    """Explain TOPIC: a command, an error class, the code of a finding, or a page.

    Without a topic, list the commands; `reshard help topics` lists all topics.
    """
    from reshard.cli.topics import about, text, topics

    context = click.get_current_context()
    group = context.find_root()
    if name is None or not isinstance(group.command, click.Group):
        click.echo(group.get_help())
        return
    command = group.command.get_command(group, name)
    if command is not None:
        with command.make_context(name, [], parent=group, resilient_parsing=True) as inner:
            click.echo(command.get_help(inner))
        return
    found = _listed(topics()) if name == "topics" else text(name)
    if found is not None:
        _show(found)
        return
    said = about(name)
    if said or not get_close_matches(name, group.command.list_commands(group), 1, 0.5):
        every = [topic for group_of in topics().values() for topic in group_of]
        near = get_close_matches(name, every, 3, 0.5)
        question = f" Did you mean {' or '.join(near)}?" if near else ""
        question += f" Pages that speak of it: {', '.join(said)}." if said else ""
        context.fail(f"No such topic {name!r}.{question} All of them: reshard help topics")
    group.command.resolve_command(group, [name])  # names the nearest command


def _listed(topics: dict[str, list[str]]) -> str:
    return "\n\n".join(f"## {kind}\n\n{', '.join(names)}" for kind, names in topics.items()) + "\n"


def _show(markdown: str) -> None:
    """Markdown, laid out on a terminal and as it is elsewhere."""
    if not sys.stdout.isatty():
        click.echo(markdown, nl=False)
        return
    from rich.console import Console
    from rich.markdown import Markdown

    Console().print(Markdown(markdown, hyperlinks=False))
