"""Further faults in a conversion's inputs, collected after an error has stopped it.

A user who mistypes three paths should learn of all three in one run. Without an error nothing is
read twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from reshard.conversion.base_model import read_base
from reshard.conversion.options import Options
from reshard.errors import NamesError, NotFoundError, ReshardError, WriteError
from reshard.formats import locate
from reshard.storage.local import Sources


@contextmanager
def with_other_errors(options: Options, *, checked_target: bool = False) -> Iterator[None]:
    """Add to an error of the block what else is wrong with the paths, as `also`.

    With `checked_target` the output's path was found to be right, and the block reads the source
    first and then the base.
    """
    try:
        yield
    except (NotFoundError, WriteError) as error:
        checks: list[Callable[[Sources], object]] = []
        if not checked_target:
            checks.append(lambda sources: locate.read(options.source, sources, options.selection))
        base = options.base
        if base is not None:
            checks.append(lambda sources: read_base(base, sources))
        error.also = tuple(_other(checks, error))
        raise


def _other(
    checks: list[Callable[[Sources], object]], error: ReshardError
) -> Iterator[ReshardError]:
    """The errors of the checks, without the one that is known."""
    for check in checks:
        try:
            with Sources() as sources:
                check(sources)
        except NamesError:  # whether names fit is known only once all paths are right
            continue
        except ReshardError as other:
            if str(other) != str(error):
                yield other
