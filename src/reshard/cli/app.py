"""The command line: texts and exit codes. The library does all work.

Exit codes: 0 done; 1 a stated failure; 2 wrong usage; 130 interrupted. An error is one short
paragraph on standard error: what, where, how to fix it; `--debug` adds the traceback.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import re
import resource
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn, cast

import click

from reshard.cli import output
from reshard.cli.flags import debug
from reshard.cli.interrupts import Interrupted
from reshard.cli.start import end_at_once
from reshard.errors import OptionError, ReshardError, printable

# Twice what `storage` keeps open.
_FILES = 8192
# M_ARENA_MAX, M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of glibc's malloc.h.
_HEAP = ((-8, 1), (-1, 16 << 20), (-3, 4 << 20))
HELP: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


# Where each command stands; its module is imported when the command is called or described.
_COMMANDS = {
    "convert": "reshard.cli.commands:convert",
    "inspect": "reshard.cli.commands:inspect",
    "verify": "reshard.cli.commands:verify",
    "diff": "reshard.cli.diff:diff",
    "doctor": "reshard.cli.doctor:doctor",
    "watch": "reshard.cli.watch:watch",
    "try": "reshard.cli.try_:try_model",
    "help": "reshard.cli.help:help_",
}
# What people type instead of a command's name.
_MEANT = {
    "merge": "convert",
    "export": "convert",
    "info": "inspect",
    "show": "inspect",
    "compare": "diff",
    "check": "verify",
    "repair": "doctor",
    "run": "try",
    "version": "--version",
}


class Group(click.Group):
    """The commands of `_COMMANDS`, in that order, each imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        return cast(click.Command, getattr(import_module(module), attribute))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command with this name; the error for an unknown one names the nearest, and lists
        all."""
        name = args[0]
        if name in _COMMANDS or ctx.resilient_parsing or name.startswith("-"):
            return super().resolve_command(ctx, args)
        near = [_MEANT[name]] if name in _MEANT else get_close_matches(name, _COMMANDS, 2, 0.5)
        question = f" Did you mean {' or '.join(near)}?" if near else ""
        return ctx.fail(f"No such command {name!r}.{question} Commands: {', '.join(_COMMANDS)}.")


def _show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from reshard.cli.version import words

        click.echo(words())
        ctx.exit()


@click.group(
    cls=Group,
    context_settings=HELP,
    epilog="Options and examples of a command: reshard COMMAND --help",
)
@click.option(
    "--version",
    "-V",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and the installed extras.",
)
@debug
def reshard() -> None:
    """Convert checkpoints between DeepSpeed, FSDP/DCP, Megatron and Hugging Face, verified."""


def run(command: click.Command, args: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; every stated failure becomes one paragraph."""
    arguments = list(sys.argv[1:] if args is None else args)
    shows_traceback = "--debug" in arguments or "-d" in arguments
    _allow_files()
    if signal.getsignal(signal.SIGINT) is end_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
        signal.signal(signal.SIGHUP, _interrupt)
    _start_quickly()
    try:
        code = command.main(args=arguments, standalone_mode=False)
    except click.ClickException as error:
        _say_usage(error)
        if "--json" in arguments:
            fields = {"class": "UsageError", "message": error.format_message()}
            output.print_json({"error": fields})
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error.__cause__ if isinstance(error, click.Abort) else error
        stands = f" {cause}" if isinstance(cause, Interrupted) else ""
        click.echo(printable(f"Interrupted.{stands}"), err=True)
        return 130
    except (ReshardError, OSError) as error:
        if shows_traceback:
            traceback.print_exc()
        _say_error(command, error)
        if "--json" in arguments:
            also = [_fields(other) for other in getattr(error, "also", ())]
            output.print_json({"error": {**_fields(error), **({"also": also} if also else {})}})
        return 2 if isinstance(error, OptionError) else 1
    return code if isinstance(code, int) else 0


def _say_usage(error: click.ClickException) -> None:
    """Print the command's usage, if the usage is wrong, and what is wrong."""
    context = getattr(error, "ctx", None)
    if context is not None:
        output.print_message(context.get_usage(), lines=True)
        if context.command.get_help_option(context) is not None:
            output.print_message(f"Help: {context.command_path} {context.help_option_names[-1]}")
    output.print_message(error.format_message(), "error")


def _say_error(command: click.Command, error: Exception) -> None:
    """Print an error and those in its `also`, each as one paragraph."""
    for one in (error, *getattr(error, "also", ())):
        output.print_message(f"{_in_flags(one)}{_elsewhere(command, one)}", "error", lines=True)


def _fields(error: Exception) -> dict[str, str | None]:
    """An error as JSON values."""
    fields = {name: getattr(error, name, None) for name in ("path", "tensor", "hint", "option")}
    message = getattr(error, "message", str(error))
    return {"class": type(error).__name__, "message": message, **fields}


def _in_flags(error: Exception) -> str:
    """The error's text, which names the option as this command spells it."""
    # A `ReshardError` has already made its text printable, with its own line breaks.
    words = str(error) if isinstance(error, ReshardError) else printable(str(error))
    option = getattr(error, "option", None)
    if option and words.startswith(f"{option}: "):
        return f"--{option.replace('_', '-')}{words[len(option) :]}"
    return words


def _elsewhere(command: click.Command, error: Exception) -> str:
    """Which command has the flags that the error suggests, if this script lacks them."""
    hint = getattr(error, "hint", None)
    if isinstance(command, click.Group) or not hint:
        return ""
    own = {name.replace("_", "-") for parameter in command.params for name in parameter.opts}
    advised = dict.fromkeys(flag.replace("_", "-") for flag in re.findall(r"--[a-z][a-z_-]+", hint))
    lacking = [flag for flag in advised if flag not in own]
    if not lacking or "reshard convert" in hint:
        return ""
    return f" ({', '.join(lacking)}: see `reshard convert --help`, which does the same.)"


def _start_quickly() -> None:
    """A plan is very many small objects without a cycle: the collector would search them over and
    over, and once more at the end, for 20 ms. And numpy's BLAS starts a thread for each core,
    though the engine has its own."""
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    _use_one_heap()


def _use_one_heap() -> None:
    """Tell glibc to serve all threads from one heap, which keeps 16 MiB of freed memory for reuse.
    Other C libraries stay as they are.

    By default each thread has a heap of its own, returns it to the system piece by piece, and asks
    for the same again: 200,000 tensors took 1.7 times as much processor time, and 20 MiB more.
    """
    libc = ctypes.CDLL(None)
    for parameter, value in _HEAP:
        with suppress(AttributeError):
            libc.mallopt(parameter, value)


def _allow_files() -> None:
    """Use the descriptors that the system grants on request: a file stays open while it is read."""
    allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _FILES if most == resource.RLIM_INFINITY else min(_FILES, most)
    if allowed != resource.RLIM_INFINITY and allowed < limit:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """End as Ctrl-C does, so that a partial output folder is removed on the way out.

    A terminal that is closed (SIGHUP) ends a run no worse than one that is killed (SIGTERM).
    """
    raise KeyboardInterrupt


def main() -> None:
    """The console command `reshard`."""
    end(run(reshard))


def end(code: int) -> NoReturn:
    """Exit with this code; nothing that happens from now on may change it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)
