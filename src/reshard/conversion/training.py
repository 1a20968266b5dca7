"""The training state beside the weights: it is read, completed by options, and renamed in the same
way as the weights.

    catalog.training_state() -> hyperparameters given -> names as the weights' -> lay_out_state
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from msgspec.structs import replace

from reshard.conversion.dtypes import OutputTensor
from reshard.conversion.hyperparameters import with_given
from reshard.conversion.options import Options
from reshard.conversion.output_model import OutputModel
from reshard.core.catalog import Catalog
from reshard.core.dtypes import FLOAT32
from reshard.core.findings import Finding
from reshard.core.state import WEIGHTS_ALONE, Group, Step, TrainingState
from reshard.core.tensors import Entry, Equal
from reshard.errors import PlanError, listed
from reshard.formats.dcp.lightrft import CONSUMED_SAMPLES
from reshard.formats.info import named, output_format
from reshard.naming import Translation


def with_state(catalog: Catalog, options: Options) -> tuple[Catalog, TrainingState | None]:
    """The catalog with the masters as weights, and its training state, if the options ask for it.

    Raises `PlanError` where the checkpoint holds none, and what its reader raises.
    """
    if not options.optimizer:
        return catalog, None
    state = catalog.training_state()
    if state is None and output_format(options.to).needs_state:
        raise PlanError(
            f"--to {options.to} writes a universal checkpoint, from which DeepSpeed takes weights "
            "only together with an optimizer's state, but this checkpoint holds none.",
            path=catalog.origin.root,
            hint="A new run starts from a Hugging Face model: pass --to hf, and load the output "
            "with from_pretrained before deepspeed.initialize.",
        )
    if state is None:
        what = "none is read of its format" if not _can_hold(catalog) else "it holds none"
        raise PlanError(
            f"training state was requested, but {what}.",
            path=catalog.origin.root,
            hint=WEIGHTS_ALONE,
        )
    state = _with_given(state, options)
    catalog = with_masters(catalog, state)
    kept = (found for found in catalog.findings if found.code != "optimizer-left-out")
    findings = (
        *kept,
        *state.findings,
        *_left_out(state),
        *_never_updated(state),
        *_steps_differ(state),
    )
    return replace(catalog, findings=findings), state


def with_masters(catalog: Catalog, state: TrainingState) -> Catalog:
    """The catalog with the optimizer's masters as weights."""
    entries = dict(catalog.entries)
    for name, master in state.masters.items():
        entries[name] = replace(master, kind=entries[name].kind, aliases=entries[name].aliases)
    records = tuple(dict.fromkeys((*catalog.records, *state.records)))
    return replace(catalog, entries=entries, records=records)


def _can_hold(catalog: Catalog) -> bool:
    return named(catalog.format).training_state


def _left_out(state: TrainingState) -> tuple[Finding, ...]:
    if not state.left_out:
        return ()
    message = f"of the training state was left out: {listed(state.left_out)}."
    return (Finding("state-left-out", message),)


def _never_updated(state: TrainingState) -> tuple[Finding, ...]:
    """The finding that groups cover parameters without moments; of an optimizer before its first
    step all."""
    held = state.held
    never = [name for group in state.groups for name in group.names if name not in held]
    if not never or not held:
        return ()
    message = (
        f"the optimizer's groups cover {len(never)} parameters that it holds no moments of, such "
        f"as frozen ones and those never updated: {listed(never, 4)}."
    )
    return (Finding("state-never-updated", message),)


def _steps_differ(state: TrainingState) -> tuple[Finding, ...]:
    counts = Counter(step.count for step in state.steps.values())
    if len(counts) < 2:
        return ()
    usual = counts.most_common(1)[0][0]
    told = (f"{number} parameters {count}" for count, number in sorted(counts.items()))
    others = [name for name, step in state.steps.items() if step.count != usual]
    message = f"parameters have had different numbers of steps: {listed(told)} ({listed(others)})."
    return (Finding("state-steps-differ", message),)


def _with_given(state: TrainingState, options: Options) -> TrainingState:
    """The state with the hyperparameters and the samples that the options give."""
    if options.consumed_samples is not None:
        given = {**state.client_state, CONSUMED_SAMPLES: options.consumed_samples}
        state = replace(state, client_state=given)
    return state if options.hyperparameters is None else with_given(state, options.hyperparameters)


def carried(
    state: TrainingState, output: OutputModel, maps: Sequence[Translation]
) -> TrainingState:
    """The state under the names of the output, whose tensors `maps` made, one after the other.

    Raises `PlanError` where a parameter's moments have no place in the output, as those of a LoRA
    that is merged, or where tensors that are joined were trained separately.
    """
    if output.merged:
        raise PlanError(
            f"LoRA is merged into {output.merged} of the weights, and these have no moments: the "
            "optimizer trained the adapter's matrices.",
            hint="To keep the adapter and its moments, leave out --base and the options that act "
            "on it. To merge the weights alone, pass --to hf without --optimizer.",
        )
    written = {tensor.spec.name: tensor.spec.shape for tensor in output.model}
    before = set(written)
    if output.trainer is not None:
        before = {name for of in output.trainer.sources.values() for name in of}
    for at, names in enumerate(maps, start=1):
        if at == len(maps):  # without the tied names, under which nothing has a state of its own
            kept = {name: of for name, of in names.sources.items() if name in before}
            names = replace(names, sources=kept)
        state = _through(state, names)
    if output.trainer is not None:
        state = _through(state, output.trainer)
        others = {tensor.spec.name: tensor.aliases for tensor in output.model if tensor.aliases}
        state = replace(state, aliases={n: others[n] for n in state.names if n in others})
    for kind, table in state.moments.items():
        for name, entry in table.items():
            if written.get(name) != entry.spec.shape:
                raise PlanError(
                    f"its {kind} has shape {entry.spec.shape}, but the weight in the output has "
                    f"{written.get(name, 'no shape')}: the optimizer's state cannot be carried "
                    "through this change.",
                    tensor=name,
                    hint=WEIGHTS_ALONE,
                )
    return state


def _through(state: TrainingState, names: Translation) -> TrainingState:
    """The state by the names of one map's outputs."""
    covered = set(state.names)
    owners: dict[str, tuple[str, ...]] = {}
    for name, made_of in names.sources.items():
        trained = covered.intersection(made_of)
        if trained and len(trained) < len(made_of):
            raise PlanError(
                "it is made of parameters with and without an optimizer's state "
                f"({listed(sorted(trained), 2)} has one).",
                tensor=name,
                hint=WEIGHTS_ALONE,
            )
        if trained:
            owners[name] = made_of
    lost = covered.difference(*owners.values()) if owners else covered
    if lost:
        raise PlanError(
            f"the moments of {len(lost)} parameters cannot be carried to the names of the output: "
            f"{listed(sorted(lost), 4)}.",
            hint="Leave out --base and the options that act on names: without them the names stay, "
            "and the state travels with them.",
        )
    moments = {
        kind: {name: entry for name, entry in names.make(table).items() if name in owners}
        for kind, table in state.moments.items()
    }
    steps = {
        name: _one([state.steps.get(source) for source in made_of], name, "steps")
        for name, made_of in owners.items()
    }
    numbers = {name: at for at, group in enumerate(state.groups) for name in group.names}
    members: dict[int, list[str]] = {at: [] for at in range(len(state.groups))}
    for name, made_of in owners.items():
        at = _one([numbers.get(source) for source in made_of], name, "parameter groups")
        if at is not None:
            members[at].append(name)
    groups = [
        Group(tuple(members[at]), group.hyperparameters) for at, group in enumerate(state.groups)
    ]
    found: dict[str, Step] = {name: step for name, step in steps.items() if step is not None}
    return replace(state, moments=moments, masters={}, steps=found, groups=tuple(groups))


def _one(values: Sequence[Any], name: str, what: str) -> Any:
    """The value that all sources of a tensor have."""
    if any(value != values[0] for value in values):
        raise PlanError(
            f"it is made of parameters with different {what}, so it cannot have one optimizer "
            "state.",
            tensor=name,
            hint=WEIGHTS_ALONE,
        )
    return values[0]


def with_ties(
    output: OutputModel, state: TrainingState, same: Equal, first: Callable[[Entry], bytes]
) -> OutputModel:
    """The output in which a matrix without moments that equals a trained one is that one's alias.

    DCP stores a tied head twice, and its optimizer has one of the two names. A matrix that is
    frozen equals no trained one, value by value. `first` gives a tensor's first bytes: only those
    that begin alike are read whole.
    """
    trained = set(state.names)
    model: list[OutputTensor] = []
    tied: dict[str, str] = {}
    starts = cache(lambda number: first(output.model[number].source))
    alike: dict[object, list[int]] = {}
    for number, tensor in enumerate(output.model):
        if tensor.spec.name in trained:
            alike.setdefault((tensor.source.spec.dtype, tensor.spec.shape), []).append(number)
    for number, tensor in enumerate(output.model):
        equal = None
        if tensor.spec.name not in trained and len(tensor.spec.shape) == 2:
            for other in alike.get((tensor.source.spec.dtype, tensor.spec.shape), ()):
                candidate = output.model[other]
                if starts(other) == starts(number) and same(candidate.source, tensor.source):
                    equal = candidate
                    break
        if equal is None:
            model.append(tensor)
        else:
            tied[tensor.spec.name] = equal.spec.name
    if not tied:
        return output
    others: dict[str, tuple[str, ...]] = {}
    for tensor in output.model:
        if tensor.spec.name in tied:
            owner = tied[tensor.spec.name]
            others[owner] = (*others.get(owner, ()), tensor.spec.name, *tensor.aliases)
    model = [replace(t, aliases=(*t.aliases, *others.get(t.spec.name, ()))) for t in model]
    matching = replace(output.matching, tied={**output.matching.tied, **tied})
    return replace(output, model=model, matching=matching)


def in_full_precision(state: TrainingState, output: OutputModel) -> OutputModel:
    """The output with float32 for what the optimizer updates, and for its moments."""
    trained = state.held
    model = [
        replace(tensor, spec=replace(tensor.spec, dtype=FLOAT32))
        if tensor.spec.name in trained
        else tensor
        for tensor in output.model
    ]
    moments = {
        kind: {n: replace(e, spec=replace(e.spec, dtype=FLOAT32)) for n, e in table.items()}
        for kind, table in state.moments.items()
    }
    return replace(output, model=model, state=replace(state, moments=moments))


def rounded(state: TrainingState, output: OutputModel) -> tuple[Finding, ...]:
    """The finding that the weights are written in fewer bits than the optimizer's masters have."""
    trained = set(state.names)
    names = [
        tensor.spec.name
        for tensor in output.model
        if tensor.spec.name in trained
        and tensor.spec.dtype.itemsize < tensor.source.spec.dtype.itemsize
    ]
    if not names:
        return ()
    message = (
        f"{len(names)} of the weights are masters of the optimizer that were rounded "
        f"({listed(names, 2)}): the run goes on from other weights than it had."
    )
    return (Finding("state-masters-rounded", message),)
