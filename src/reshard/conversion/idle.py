"""Findings for options that have no effect on this conversion, perhaps because of a typo."""

from __future__ import annotations

from collections.abc import Iterator

from reshard.conversion.base_model import Base
from reshard.conversion.options import Options
from reshard.conversion.output_model import OutputModel
from reshard.conversion.side_files import LIGHTRFT
from reshard.core.catalog import Catalog
from reshard.core.findings import Finding
from reshard.naming.judge import matched
from reshard.naming.rewards import REWARD_HEAD
from reshard.naming.search import unwrap

_NO_HEADS = "the checkpoint holds no heads of a reward model"


def idle(
    options: Options, catalog: Catalog, base: Base | None, output: OutputModel
) -> Iterator[Finding]:
    """A finding for each option that has no effect.

    Options that only permit something (`--allow-unchanged`), and options that a script always
    passes, do not count.
    """
    if base is not None:
        yield from _patterns(options, catalog, base, output)
    frozen = any(entry.kind == "frozen" for entry in catalog.entries.values())
    if options.exclude_frozen and not frozen and not output.matching.missing:
        yield _without("--exclude-frozen", "the checkpoint holds no frozen parameters")
    if options.fill_from_base and not output.matching.filled:
        yield _without("--fill-from-base", "the checkpoint lacks nothing that the base has")
    if output.scaling is None:
        yield from _of_adapters(options)
    if options.rewards.model_type != "vision2seq":  # the scripts' default, beside other defaults
        yield from _of_heads(options, output)
    if options.transformers_version and base is None and options.names not in ("all", "memory"):
        yield _without("--transformers-version", "names stay as they are in the checkpoint")


def _patterns(
    options: Options, catalog: Catalog, base: Base, output: OutputModel
) -> Iterator[Finding]:
    prefix = output.name_map.prefix
    known = {*base.entries}
    for name in catalog.names():
        known |= {name, unwrap(name), name.removeprefix(prefix), unwrap(name).removeprefix(prefix)}
    apart = {*output.matching.unexpected, *output.matching.missing}
    for pattern in options.allow:
        if not matched(known | apart, [pattern]):
            message = f"--allow {pattern!r} matches no name of the checkpoint or the base."
            yield Finding("allow-unmatched", message)
        elif not output.side_files and not matched(apart, [pattern]):
            why = "all that it matches is in the checkpoint and in the base"
            yield _without(f"--allow {pattern!r}", why)


def _of_adapters(options: Options) -> Iterator[Finding]:
    lora = options.lora
    given = {
        "--lora": lora.mode is not None,
        "--lora-alpha": lora.alpha is not None,
        "--adapter-config": lora.config is not None,
        "--adapter": lora.adapter is not None,
    }
    flags = [flag for flag, said in given.items() if said]
    if flags:
        message = f"{', '.join(flags)}: no effect, the checkpoint holds no adapters."
        yield Finding("no-adapters", message)


def _of_heads(options: Options, output: OutputModel) -> Iterator[Finding]:
    rewards = options.rewards
    if any(file.name in (REWARD_HEAD, LIGHTRFT) for file in output.side_files):
        return
    given = {
        "--probing-layer": rewards.probing_layer is not None,
        "--srm-format": rewards.srm_format != "both",
    }
    for flag, said in given.items():
        if said:
            yield _without(flag, _NO_HEADS)


def _without(flag: str, why: str) -> Finding:
    return Finding("option-idle", f"{flag} has no effect: {why}.")
