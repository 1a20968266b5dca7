"""The command `reshard help`."""

from __future__ import annotations

import click

from reshard.cli.flags import Command, debug


@click.command("help", cls=Command, short_help="Show what a command does.")
@click.argument("name", metavar="[COMMAND]", required=False)
@debug
def help_(name: str | None) -> None:
    """Show what COMMAND does and its options; without one, list the commands."""
    context = click.get_current_context()
    group = context.find_root()
    if name is None or not isinstance(group.command, click.Group):
        click.echo(group.get_help())
        return
    resolved, command, _ = group.command.resolve_command(group, [name])
    if command is not None:
        with command.make_context(resolved, [], parent=group, resilient_parsing=True) as inner:
            click.echo(command.get_help(inner))
