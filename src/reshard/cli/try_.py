"""The options of `reshard try`, which `test_model` shares, and the function that runs both.

Imports no torch: the model's libraries are loaded when a command runs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from reshard.cli import output
from reshard.cli.flags import Command, FolderOrFile, debug, option
from reshard.errors import NotFoundError, UnsupportedError
from reshard.evaluate.options import DTYPES, Options, Sampling
from reshard.evaluate.places import PAGE_MARK, free, replacing
from reshard.storage.paths import absolute, is_folder, real
from reshard.storage.texts import check_page

_DEFAULT = ParameterSource.DEFAULT
_F = TypeVar("_F", bound=Callable[..., Any])

_EXISTING = FolderOrFile(exists=True, dir_okay=False)


_OPTIONS: tuple[Callable[[Any], Any], ...] = (
    option(
        "test_prompts",
        "prompts",
        multiple=True,
        metavar="TEXT...",
        help="One or more prompts. Default: three built-in ones.",
    ),
    option(
        "image",
        "images",
        multiple=True,
        type=_EXISTING,
        metavar="PATH...",
        help="Images to send with every prompt.",
    ),
    option(
        "audio",
        multiple=True,
        type=_EXISTING,
        metavar="PATH...",
        help="Audio files (WAV) to send with every prompt.",
    ),
    option(
        "no_chat", is_flag=True, help="Send the prompts as raw text, without the chat template."
    ),
    option(
        "max_new_tokens",
        type=click.IntRange(min=1),
        default=256,
        show_default=True,
        help="The largest number of tokens of an answer.",
    ),
    option("do_sample", is_flag=True, help="Sample instead of greedy decoding."),
    option(
        "temperature",
        type=click.FloatRange(min=0),
        help="Sampling temperature. Implies --do_sample; 0 means greedy.",
    ),
    option(
        "top_p",
        type=click.FloatRange(min=0, max=1, min_open=True),
        help="Sample from the most likely tokens whose probabilities add up to this value. "
        "Implies --do_sample.",
    ),
    option(
        "top_k",
        type=click.IntRange(min=1),
        help="Sample from the K most likely tokens. Implies --do_sample.",
    ),
    option(
        "repetition_penalty",
        type=click.FloatRange(min=0, min_open=True),
        help="Values above 1 make tokens that already occurred less likely.",
    ),
    option("seed", type=int, default=0, show_default=True, help="The random seed for sampling."),
    option(
        "device",
        default="cuda",
        show_default=True,
        help="cuda (all GPUs if one is too small; the CPU if there is none), auto, or a torch "
        "device such as cpu or cuda:1.",
    ),
    option(
        "dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="The dtype to run in; auto: the dtype in the model's config.",
    ),
    option("benchmark", is_flag=True, help="Measure latency, throughput and memory."),
    option(
        "benchmark_samples",
        type=click.IntRange(min=1),
        default=5,
        show_default=True,
        help="The number of timed calls for each batch size.",
    ),
    option(
        "batch_sizes",
        multiple=True,
        type=click.IntRange(min=1),
        metavar="N...",
        help="Batch sizes to measure. Default: 1.",
    ),
    option(
        "compare",
        type=FolderOrFile(),
        metavar="OTHER",
        help="Also run a second model on the same prompts, and report whether the two are the "
        "same model.",
    ),
    option(
        "text",
        type=_EXISTING,
        help="A text file for the perplexity and the comparison. Default: a built-in text.",
    ),
    option(
        "output_file",
        type=FolderOrFile(dir_okay=False),
        default=Path("test_results.json"),
        show_default=True,
        help="Where to write the report (JSON). A file that is not a report is never replaced.",
    ),
    option("html", type=FolderOrFile(dir_okay=False), help="Also write the report as a web page."),
    option("trust_remote_code", is_flag=True, help="Run the Python code in the model's folder."),
)


def shared_options(function: _F) -> _F:
    """Every option of a run but the model itself."""
    for add in reversed((*_OPTIONS, debug)):
        function = add(function)
    return function


@click.command("try", cls=Command, short_help="Run a converted model: answers, speed, health.")
@click.argument("model", type=FolderOrFile())
@click.option(
    "--chat",
    "converse",
    is_flag=True,
    help="Chat with the model on the terminal: one line for each turn, /new to start over, "
    "Ctrl-D to end. No report is written.",
)
@shared_options
def try_model(converse: bool, **given: Any) -> int:
    """Run a converted model: show its answers, and check its speed, health and likeness to another.

    MODEL is a Hugging Face folder. The report goes to a JSON file: test_results.json, or
    test_results-2.json if the first is another model's report. The exit code is 0 only if the model
    loaded, every prompt was answered, and no finding is an error.
    """
    context = click.get_current_context()
    if converse:
        return _converse(make_options(given), context)
    if context.get_parameter_source("output_file") is _DEFAULT:
        given["output_file"] = free(given["output_file"], given["model"])
    return run_command(**given)


# What a conversation has no use for.
_NO_CHAT = ("prompts", "images", "audio", "no_chat", "benchmark", "compare", "text", "html")


def _converse(options: Options, context: click.Context) -> int:
    """Talk with the model; a line of standard input is a turn."""
    given = [p for p in context.command.params if p.name in _NO_CHAT]
    idle = [p for p in given if context.get_parameter_source(p.name or "") is not _DEFAULT]
    if idle:
        raise click.UsageError(f"{max(idle[0].opts, key=len)} has no effect with --chat.", context)
    if not is_folder(options.model):
        raise NotFoundError("there is no such model folder.", path=options.model)
    _check_installed()
    from reshard.evaluate.chat import converse
    from reshard.evaluate.terminal import harmless

    interactive = sys.stdin.isatty()

    def read() -> str | None:
        while True:
            try:
                line = input("> " if interactive else "")
            except EOFError:
                return None
            if line.strip():
                return line

    converse(options, read, lambda text: click.echo(harmless(text), nl=False))
    return 0


def _check_installed() -> None:
    """Raise `UnsupportedError` where torch or transformers are not installed."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            f"running a model needs torch and transformers: {error}.",
            hint="Install them, in reshard's folder: pip install '.[eval]'",
        ) from error


def make_options(given: dict[str, Any]) -> Options:
    """The options as the command line gave them; raises `click.UsageError` for those that clash."""
    sampling = Sampling(
        do_sample=_samples(given),
        temperature=given.pop("temperature") or None,
        top_p=given.pop("top_p"),
        top_k=given.pop("top_k"),
        repetition_penalty=given.pop("repetition_penalty"),
    )
    del given["do_sample"]
    for name in ("output_file", "html"):
        path: Path | None = given[name]
        if path is not None and not is_folder(absolute(path).parent):
            raise click.UsageError(f"--{name}: there is no folder {absolute(path).parent}.")
    if given["html"] is not None and real(given["html"]) == real(given["output_file"]):
        raise click.UsageError("--output_file and --html name the same file.")
    given["chat"] = not given.pop("no_chat")
    given["batch_sizes"] = given["batch_sizes"] or (1,)
    return Options(sampling=sampling, **given)


def _samples(given: dict[str, Any]) -> bool:
    if given["temperature"] == 0:
        if given["do_sample"] or given["top_p"] is not None or given["top_k"] is not None:
            raise click.UsageError("--temperature 0 is greedy, and the other options sample.")
        return False
    named = ("temperature", "top_p", "top_k")
    return bool(given["do_sample"]) or any(given[name] is not None for name in named)


def run_command(**given: Any) -> int:
    """Run a model as the command line asks, show what comes, and return the exit code.

    Raises `NotFoundError` where there is no model, `WriteError` where the report or the page would
    replace another file, `UnsupportedError` where torch or transformers are not installed.
    """
    options = make_options(given)
    for folder in (options.model, options.compare):
        if folder is not None and not is_folder(folder):
            raise NotFoundError("there is no such model folder.", path=folder)
    replaced = replacing(options.output_file)
    if options.html is not None:
        check_page(options.html, PAGE_MARK, "a page of an earlier run")
    _check_installed()
    from reshard.evaluate.run import run
    from reshard.evaluate.terminal import Terminal

    with Terminal() as terminal:
        try:
            report = run(options, terminal.listen)
        except KeyboardInterrupt:
            click.echo(f"Interrupted; {options.output_file} holds what was done.", err=True)
            return 130
    terminal.summarise(report, options)
    if replaced:
        output.print_message(replaced, "note")
    return report.exit_code
