"""DeepSpeed's own mixtures of experts: whose masters lie in which rank's flat groups.

    layer_<L>_expert_<E>_mp_rank_00_model_states.pt   expert E of the L-th layer of experts, whole,
                                                      in the training dtype, under global numbers
    *_optim_states.pt                                 masters of all groups; a group of experts is
                                                      cut over fewer ranks than the others

Of W data parallel ranks, `ep` hold different experts: expert parallel rank e holds experts e * n
to e * n + n - 1 of each layer, and numbers them 0 to n - 1. The W / ep ranks that hold the same
experts share their masters as ZeRO shares any group. Layers may differ in `ep`; their experts are
then in groups of their own. `param_shapes` lists the names of rank 0, so
under local numbers. DeepSpeed 0.19.8: utils/groups.py (_create_expert_and_data_parallel),
runtime/engine.py (_save_moe_checkpoint), runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from reshard.core.regex import regex
from reshard.errors import FormatError, IncompleteError
from reshard.formats.deepspeed.files import Saved
from reshard.formats.deepspeed.parse import OptimFile, Shapes

_EXPERT = regex(r"(.*\.deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")


class ExpertParallelRank(Struct, frozen=True):
    """The files of the ranks that hold the same experts, and these experts' global names."""

    optim: tuple[OptimFile, ...]
    names: dict[str, str]


def holds_experts(shapes: Shapes) -> bool:
    """Whether a group's parameters are experts'; DeepSpeed keeps these in groups of their own."""
    return any(_EXPERT.fullmatch(name) for name in shapes)


def ranks(number: int, shapes: Shapes, saved: Saved) -> Iterator[ExpertParallelRank]:
    """The expert parallel ranks of group `number`, each with its part of the files.

    Raises `FormatError` where the numbers of ranks or experts do not divide.
    """
    optim, counts = saved.optim, saved.optim[0].partition_count
    share = counts[number] if number < len(counts) else 0
    if share == 0 or len(optim) % share:
        raise FormatError(
            f"its group {number}, of experts, is cut over {share} of {len(optim)} ranks.",
            path=optim[0].path,
        )
    degree = len(optim) // share
    held = _experts_a_rank(shapes, degree, saved)
    for rank in range(degree):
        if saved.model[0].data_before_experts:
            mine = optim[rank * share : (rank + 1) * share]
        else:
            mine = optim[rank::degree]
        yield ExpertParallelRank(mine, {n: _globally(n, rank, held, saved) for n in shapes})


def _experts_a_rank(shapes: Shapes, degree: int, saved: Saved) -> dict[str, int]:
    """Of each layer (the part of the names before the number), how many experts a rank holds."""
    layers = {match[1] for match in map(_EXPERT.fullmatch, shapes) if match}
    numbers: dict[str, set[int]] = {layer: set() for layer in layers}
    for file in saved.experts:
        for match in map(_EXPERT.fullmatch, file.module):
            if match and match[1] in numbers:
                numbers[match[1]].add(int(match[2]))
    for layer, experts in numbers.items():
        if experts != set(range(len(experts))) or len(experts) % degree:
            raise FormatError(
                f"its experts {layer}* are numbered {sorted(experts)}, over {degree} expert "
                "parallel ranks.",
                path=saved.model[0].path.parent,
            )
    return {layer: len(experts) // degree for layer, experts in numbers.items()}


def _globally(name: str, rank: int, counts: dict[str, int], saved: Saved) -> str:
    """A parameter's name with the expert's global number, given the name with the local one."""
    match = _EXPERT.fullmatch(name)
    if not match or int(match[2]) >= counts[match[1]]:
        raise FormatError(
            "a group of experts lists it, but no rank holds such an expert.",
            path=saved.model[0].path,
            tensor=name,
        )
    found = f"{match[1]}{rank * counts[match[1]] + int(match[2])}{match[3]}"
    if found not in saved.module:
        # Without it nothing would prove that the rank's masters are this expert's.
        raise IncompleteError(
            "no expert's file holds it.", path=saved.model[0].path.parent, tensor=found
        )
    return found
