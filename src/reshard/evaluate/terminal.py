"""What the command line shows: progress on standard error, results on standard output."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from unicodedata import category

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from reshard.core.findings import Finding
from reshard.evaluate.options import Options
from reshard.evaluate.progress import Event
from reshard.evaluate.report import Answer, Batch, Comparison, Score, Spread, TryReport

_COLOURS = {"error": "red", "warning": "yellow", "info": "blue"}


class Terminal:
    """Draws a bar while a run goes on (only where standard error is a terminal), and prints each
    answer as soon as it is there."""

    def __init__(self) -> None:
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            Elapsed(),
            console=Console(stderr=True),
            transient=True,
            disable=not Console(stderr=True).is_terminal,
        )
        self._stage = "start"
        self._task = self._progress.add_task(self._stage, total=None)
        # The shown part of the answer that is being written.
        self._written: str | None = None

    def __enter__(self) -> Terminal:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def listen(self, event: Event) -> None:
        """Show one event of the run."""
        if event.stage != self._stage:
            # rich takes a total of None for "as before": each stage gets a task of its own.
            self._progress.remove_task(self._task)
            self._stage = event.stage
            self._task = self._progress.add_task(event.stage, total=event.total)
        self._progress.update(self._task, completed=event.done, total=event.total)
        if event.text and sys.stdout.isatty():
            self._write(event.prompt, event.text)
        if event.result is not None:
            self._end(event.result)

    def _write(self, prompt: str, text: str) -> None:
        """Show the new part of an answer; the bar is hidden meanwhile, as both share the screen."""
        if self._written is None:
            self._progress.stop()
            click.echo(_asked(prompt))
            self._written = ""
        self._written += text
        click.echo(harmless(text), nl=False)

    def _end(self, result: Answer | Score) -> None:
        """Show a result, or the rest of it."""
        written, self._written = self._written, None
        self._progress.stop()
        whole = result.text if isinstance(result, Answer) else None
        if written is None:
            click.echo(_asked(result.prompt))
            click.echo(_outcome(result))
        elif whole is not None and whole.startswith(written):
            click.echo(_outcome(result, whole[len(written) :]))
        else:  # the tokenizer writes the whole otherwise, or the answer failed
            click.echo(f"\n{_outcome(result)}")
        self._progress.start()

    def summarise(self, report: TryReport, options: Options) -> None:
        """Print everything but the answers, which were printed as they came."""
        click.echo()
        for line in summary(report):
            click.echo(line)
        click.echo(f"report: {options.output_file}")
        if options.html is not None:
            click.echo(f"page:   {options.html}")


def _asked(prompt: str) -> str:
    return click.style(f"\n> {harmless(prompt)}", bold=True)


def _outcome(result: Answer | Score, text: str | None = None) -> str:
    """A result in words; of an answer whose beginning is shown, `text` is the rest."""
    if result.error is not None:
        return click.style(f"no result: {harmless(result.error)}", fg="red")
    if isinstance(result, Score):
        return "\n".join(f"{name}: {value:.6g}" for name, value in result.scores.items())
    rate = len(result.token_ids) / result.seconds if result.seconds else 0.0
    note = f"[{len(result.token_ids)} tokens, {rate:.1f} a second, ended by {result.ended}]"
    shown = result.text or "" if text is None else text
    return f"{harmless(shown)}\n{click.style(note, dim=True)}"


def harmless(text: str) -> str:
    """What a model wrote, without the control characters that a terminal would obey."""
    return "".join(c if c in "\n\t" or category(c) != "Cc" else "�" for c in text)


def summary(report: TryReport) -> Iterator[str]:
    """The report in lines for a terminal, without the answers."""
    yield from (f"note: {note}" for note in report.notes)
    if report.model is not None:
        model = report.model
        dtypes = ", ".join(model.dtypes)
        dtypes += f", stored as {model.quantisation}" if model.quantisation else ""
        yield (
            f"model: {model.architecture} ({model.kind}), {model.parameters:,} parameters, "
            f"{dtypes}, on {', '.join(model.devices)}, loaded in {model.load_seconds:.1f} s"
        )
    if report.benchmark is not None:
        yield f"benchmark: {report.benchmark.new_tokens} new tokens a row; median (min to max)"
        yield from (_batch(batch) for batch in report.benchmark.batches)
    if report.comparison is not None:
        yield from _comparison(report.comparison)
    yield from (_finding(finding) for finding in report.findings)
    for failure in report.failures:
        yield click.style(f"failed to {failure.stage}: ", fg="red") + failure.message
    colour = "green" if report.status == "passed" else "red"
    yield click.style(f"{report.status} in {report.seconds:.1f} s", fg=colour, bold=True)


def _finding(finding: Finding) -> str:
    label = click.style(f"{finding.severity}: {finding.code}", fg=_COLOURS[finding.severity])
    return f"{label}: {finding.message}"


def _batch(batch: Batch) -> str:
    parts = [f"  batch {batch.batch_size}"]
    if batch.time_to_first_token is not None:
        parts.append(f"first token {_milliseconds(batch.time_to_first_token)}")
    if batch.time_per_output_token is not None:
        parts.append(f"each further {_milliseconds(batch.time_per_output_token)}")
    if batch.tokens_per_second is not None:
        parts.append(f"{batch.tokens_per_second.median:.1f} tokens a second")
    else:
        parts.append(f"a call {_milliseconds(batch.seconds)}")
    parts.append(f"prompts {batch.prompt_tokens.median:.0f} tokens")
    for name, peak in (("CPU", batch.peak_cpu_bytes), ("GPU", batch.peak_gpu_bytes)):
        if peak is not None:
            parts.append(f"peak {name} memory {peak / 2**20:,.0f} MiB")
    return ", ".join(parts)


def _milliseconds(spread: Spread) -> str:
    median, low, high = (value * 1000 for value in (spread.median, spread.minimum, spread.maximum))
    return f"{median:.1f} ms ({low:.1f} to {high:.1f})"


def _comparison(comparison: Comparison) -> Iterator[str]:
    verdict = comparison.verdict or "cannot be told"
    yield click.style(f"compared with {comparison.other}: {verdict}", bold=True)
    yield f"  {comparison.reason}"
    if comparison.logits is not None:
        logits = comparison.logits
        yield (
            f"  logits of {logits.positions} tokens: largest difference "
            f"{_number(logits.max_difference)}, mean {_number(logits.mean_difference)}, "
            f"KL a token {_number(logits.mean_kl)}, same top token "
            f"{_number(logits.top1_agreement)}"
        )
    if comparison.perplexity is not None or comparison.other_perplexity is not None:
        yield (
            f"  perplexity on the {comparison.text} text: {_number(comparison.perplexity)}, "
            f"the other's {_number(comparison.other_perplexity)}"
        )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
