"""A critic's head: its name, how it is detected, and which class includes it.

    score.weight [1, H]                          LightRFT, `...ForSequenceClassification`
    score.weight [1, H]   score.bias [1]         old verl, `...ForTokenClassification`
    v_head.summary.weight [1, H]   .bias [1]     TRL and LlamaFactory, beside `pretrained_model.`
    value_head.weight [1, H]                     OpenRLHF; the name is a setting
    value_head.0.weight, .0.bias, .2.weight ...  a few layers, the last of one row

A single matrix on the backbone of a causal model is what transformers' classifiers hold, so it
becomes one. Everything else keeps the base's class, with the head in a file beside it under its own
names: `value_head.safetensors`, as LlamaFactory writes and reads it (train/callbacks.py). Read off
TRL 0.29 (experimental/ppo/modeling_value_head.py), verl 0.1 (workers/fsdp_workers.py) and
transformers 5.23 (modeling_layers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence

from msgspec import Struct

from reshard.core.tensors import Entry, Shape
from reshard.errors import NamesError, listed
from reshard.naming.scanning import any_contains
from reshard.naming.search import shared_prefixes, unwrapped

#: The head of transformers' classifiers.
SCORE = "score"
#: Every other head, in a file beside the model.
VALUE_HEAD = "value_head.safetensors"
# Names that no part of a language model has: these heads are detected without an option.
_KNOWN = (SCORE, "v_head")

#: Causal models of which transformers (5.23) has a classifier whose head is `score`, by what their
#: classes' names begin with: one label for each sequence, or for each token and with a bias.
SEQUENCE_CLASSIFIERS = frozenset({
    "AXK1", "AXK2", "Arcee", "BioGpt", "Bloom", "CohereCompass", "DeepseekV2", "DeepseekV3",
    "DiffLlama", "Doge", "Exaone4", "Falcon", "GPTBigCode", "GPTJ", "GPTNeo", "GPTNeoX", "Gemma",
    "Gemma2", "Gemma3", "Glm", "Glm4", "GptOss", "Helium", "HunYuanDenseV1", "HunYuanMoEV1",
    "Jamba", "JetMoe", "Llama", "MiniCPM3", "MiniMax", "Ministral", "Ministral3", "Mistral",
    "Mixtral", "Mpt", "Nemotron", "OPT", "Olmo", "Olmo2", "Olmo3", "Persimmon", "Phi", "Phi3",
    "Phimoe", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Qwen3Next", "Qwen3_5", "SeedOss",
    "SmolLM3", "StableLm", "Starcoder2", "Zamba", "Zamba2",
})  # fmt: skip
TOKEN_CLASSIFIERS = frozenset({
    "AXK1", "AXK2", "Apertus", "Arcee", "DeepseekV3", "DiffLlama", "Exaone4", "Gemma", "Gemma2",
    "Glm", "Glm4", "GptOss", "Helium", "Llama", "MiniMax", "Ministral", "Ministral3", "Mistral",
    "Mixtral", "Nemotron", "Persimmon", "Phi", "Phi3", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe",
    "Qwen3Next", "SeedOss", "SmolLM3", "StableLm", "Starcoder2",
})  # fmt: skip
# Families whose classifier of that name is one of the composite model.
_TEXT_CLASSIFIERS = frozenset({"CohereCompass", "Gemma3", "Qwen3_5"})


class ValueHead(Struct, frozen=True):
    """A critic's head. `tensors` are by what follows `name` in their names: `weight`, `bias`."""

    name: str
    tensors: Mapping[str, Entry]

    def called(self, name: str) -> dict[str, Entry]:
        """The tensors by their whole names in a head of that name."""
        named = {f"{name}.{rest}": entry for rest, entry in self.tensors.items()}
        return {full: entry.renamed(full) for full, entry in named.items()}


def find(
    entries: Mapping[str, Entry],
    base: Container[str],
    given: str | None,
    allows: Callable[[str], bool],
) -> tuple[ValueHead, frozenset[str]] | None:
    """The head and the entries' names that are its; None where there is none.

    Without `given` it is one of the known names, of the model or of what all names lie under.
    Raises `NamesError` where the named one is not there.
    """
    plain = unwrapped(entries)
    known = _KNOWN if given is None else (given.removesuffix(".weight"),)
    heads = [head for head in known if any_contains(plain, (f"{head}.",))]
    if given is None and not heads:
        return None
    clean = dict(zip(plain, entries, strict=True))
    shared = shared_prefixes(clean)[-1]
    for head in heads:
        for prefix in dict.fromkeys((shared, "")):
            inside = f"{prefix}{head}."
            found = {
                name: own
                for name, own in clean.items()
                if name.startswith(inside)
                and name not in base
                and name.removeprefix(prefix) not in base
                and (given is not None or not allows(name.removeprefix(prefix)))
            }
            if _is_head([entries[own].spec.shape for own in found.values()]):
                tensors = {name.removeprefix(inside): entries[own] for name, own in found.items()}
                return ValueHead(head, tensors), frozenset(found.values())
    if given is None:
        return None
    alike = candidates(
        (name, entries[own].spec.shape) for name, own in clean.items() if name not in base
    )
    raise NamesError(
        f"there is no value head {given!r}: tensors below that name, the last of shape [1, H].",
        unexpected=tuple(alike),
        hint=f"Such tensors are in: {listed(alike)}." if alike else "There is none; leave it out.",
    )


def candidates(tensors: Iterable[tuple[str, Shape]]) -> list[str]:
    """What `--value-head` could name among tensors given by name and shape, but for layers."""
    return [
        name.removesuffix(".weight")
        for name, shape in tensors
        if name.endswith(".weight") and _is_row(shape) and ".layers." not in f".{name}"
    ]


def classifier(
    head: ValueHead, architectures: Sequence[str], *, speaks: bool
) -> dict[str, object] | None:
    """Config changes that make the base a classifier of one label with that head.

    None where it keeps its class: where it is not a causal model or one that transformers has no
    classifier of, where it keeps its output head (it `speaks`), or the head is not one layer.
    """
    first = str(architectures[0]) if architectures else ""
    stem = first.removesuffix("ForCausalLM")
    if stem == first or speaks:
        return None
    parts = head.tensors.keys()
    if parts == {"weight"} and stem in SEQUENCE_CLASSIFIERS:
        kind = "Sequence"
        stem += "Text" * (stem in _TEXT_CLASSIFIERS)
    elif parts == {"weight", "bias"} and head.name == SCORE and stem in TOKEN_CLASSIFIERS:
        kind = "Token"
    else:
        return None
    return {
        "architectures": [f"{stem}For{kind}Classification"],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
    }


def _is_head(shapes: Sequence[Shape]) -> bool:
    """Whether tensors of these shapes end in one value; a whole model below a name does not."""
    return sum(map(_is_row, shapes)) == 1


def _is_row(shape: Shape) -> bool:
    return len(shape) == 2 and shape[0] == 1
