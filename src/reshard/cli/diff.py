"""The command `reshard diff`: flags in, `reshard.diff`, tables or JSON out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reshard.cli import output
from reshard.cli.flags import Command, argument, debug, flags, html, json_flag
from reshard.cli.progress import Shown, how_shown, shown_progress
from reshard.comparison.declared import DIFF
from reshard.errors import NotFoundError, listed
from reshard.progress import stage

if TYPE_CHECKING:
    from reshard.comparison.result import Compared, Comparison
    from reshard.comparison.sums import Key, Sum

_KEYS = ("name", "change", "largest", "mean", "elements")
# Rows of tensors that cannot be measured, unless --tensors or --top asks for others.
_MAX_APART = 40


@click.command(cls=Command, short_help="Compare two checkpoints, tensor by tensor.")
@argument("a", DIFF["first"])
@argument("b", DIFF["second"])
@argument(
    "more",
    DIFF["second"],
    nargs=-1,
    words="More checkpoints of a run, as in RUN/*: each is compared with the one before it.",
)
@flags(DIFF.values())
@how_shown
@click.option(
    "--tensors",
    is_flag=True,
    help="Show a row for each tensor instead of each layer, however many there are.",
)
@click.option(
    "--top",
    type=click.IntRange(min=1),
    metavar="N",
    help="Show only the first N rows of each table; without --sort, those that changed most.",
)
@click.option(
    "--sort",
    type=click.Choice(_KEYS),
    help="Order of the rows, largest first. change: the norm of the change divided by that of "
    "the weights; elements: the share of elements that differ. Default: name, or change "
    "with --top.",
)
@html
@json_flag
@debug
def diff(
    a: Path,
    b: Path,
    more: tuple[Path, ...],
    base: Path | None,
    spectrum: bool,
    optimizer: bool,
    tensors: bool,
    top: int | None,
    sort: Key | None,
    html: Path | None,
    as_json: bool,
    shown: Shown | None,
    quiet: bool,
) -> int:
    """Compare the checkpoints A and B, of any formats, tensor by tensor.

    If dtypes differ, the wider is rounded to the narrower. If you name more than two checkpoints,
    each is compared with the one before it. The exit code is 1 if they differ.
    """
    from reshard.comparison.steps import diff_steps

    if html is not None:
        from reshard.pages.page import check_place

        check_place(html)
    paths = _checkpoints([a, b, *more])
    with shown_progress(shown, quiet=as_json or quiet) as progress:
        found = diff_steps(
            paths,
            base=base,
            spectrum=spectrum,
            optimizer=optimizer,
            progress=stage(progress, "compare"),
        )
    if html is not None:
        from reshard.pages.changes import changes_page
        from reshard.storage.texts import write_text

        write_text(html, changes_page(found))
    if as_json:
        steps = [{"first": one.first, "second": one.second, **one.to_json()} for one in found]
        same = all(one.same for one in found)
        values = found[0].to_json() if len(paths) == 2 else {"same": same, "steps": steps}
        output.print_json(output.with_requests(values))
    elif not quiet:
        output.print_findings(dict.fromkeys(finding for one in found for finding in one.findings))
        if len(found) == 1:
            show(found[0], tensors=tensors, top=top, sort=sort)
        else:
            _show_steps(found, tensors=tensors, top=top, sort=sort)
        if html is not None:
            output.print_result(f"\nPage: {html}", lines=True)
        output.print_requests()
    return 0 if all(one.same for one in found) else 1


def _checkpoints(paths: list[Path]) -> list[Path]:
    """What is compared: of more than two paths, those that are checkpoints, in their order."""
    if len(paths) == 2:
        return paths
    from reshard.comparison.steps import of_run

    found, left = of_run(paths)
    if left:
        output.print_message(
            f"left out, since no checkpoint is there: {listed(map(str, left))}.", "note"
        )
    if len(found) < 2:
        raise NotFoundError(
            f"{len(found)} of these {len(paths)} paths is a checkpoint; diff needs two or more."
        )
    return found


def _show_steps(
    comparisons: Sequence[Comparison], *, tensors: bool, top: int | None, sort: Key | None
) -> None:
    """A row for each step; with `tensors` each step as that of two checkpoints."""
    from reshard.comparison.sums import percent, short

    cells = []
    for one in comparisons:
        total = one.total
        cells.append(
            (
                f"{len(one.differences)} of {len(one.tensors)}",
                percent(total.share),
                short(total.largest),
                short(total.mean),
                short(total.relative),
                f"{one.first} -> {one.second}",
            )
        )
    header = ("tensors", "elements", "largest", "mean", "change", "from -> to")
    output.print_table(cells, header=header, right=range(len(header) - 1))
    if tensors:
        for one in comparisons:
            output.print_result(f"\n{one.first} -> {one.second}", lines=True)
            show(one, tensors=True, top=top, sort=sort)


def show(comparison: Comparison, *, tensors: bool, top: int | None, sort: Key | None) -> None:
    """Print the summary, then the tables, which begin with what differs most."""
    from reshard.comparison.sums import ordered

    output.print_result(
        f"{comparison.num_equal} tensors are equal, {len(comparison.differences)} differ."
    )
    if comparison.same:
        return
    output.print_table(comparison.rows())
    apart = comparison.apart()
    if apart:
        _print_apart(apart, top, tensors=tensors)
    differing = [one for one in comparison.measured if one.kind == "values"]
    if tensors and differing:
        _print_tensors(differing, sort, top)
    elif differing:
        layers, modules = comparison.layers(), comparison.modules()
        _print_sums("layer", ordered(layers, sort, top))
        if len(modules) < len(layers):
            _print_sums("module", ordered(modules, sort, top))


def _print_apart(apart: Sequence[tuple[str, str, int]], top: int | None, *, tensors: bool) -> None:
    """The first rows of the tensors that could not be measured, and how many are not shown."""
    rows = top or (len(apart) if tensors else _MAX_APART)
    output.print_result("")
    cells = [(str(count), how, name) for how, name, count in apart[:rows]]
    output.print_table(cells, header=("tensors", "how", "tensor"), right={0})
    left = apart[rows:]
    if left:
        count = sum(count for _, _, count in left)
        how = "--tensors without --top shows" if top else "--tensors shows"
        output.print_result(f"{count:,} more tensors in {len(left):,} rows: {how} all of them.")


def _print_sums(title: str, rows: Iterable[Sum]) -> None:
    """A row for each layer or module; names come last, so that they may be of any length."""
    from reshard.comparison.sums import MEASURES, cells

    output.print_result("")
    output.print_table(
        [(*cells(row), row.name) for row in rows],
        header=(*MEASURES, title),
        right=range(len(MEASURES)),
    )


def _print_tensors(differing: Sequence[Compared], sort: Key | None, top: int | None) -> None:
    from reshard.comparison.sums import ordered, percent, short, summed

    by_name = {one.name: one.change for one in differing}
    rows = ordered((summed(one.name, [one]) for one in differing), sort, top)
    header = ["elements", "largest", "mean", "rel. max", "rel. mean", "cosine", "change"]
    ranks = any(change.energy for change in by_name.values())
    header += ["rank 1", "rank 8"] if ranks else []
    cells = []
    for row in rows:
        change = by_name[row.name]
        measures = (row.largest, row.mean, row.largest_relative, row.mean_relative)
        cosine = "-" if change.cosine is None else f"{change.cosine:.6f}"
        energy = [percent(change.energy[at]) if change.energy else "-" for at in (0, -1)]
        columns = [percent(row.share), *map(short, measures), cosine, short(row.relative)]
        cells.append((*columns, *(energy if ranks else []), row.name))
    output.print_result("")
    output.print_table(cells, header=(*header, "tensor"), right=range(len(header)))
