"""Check whether an inference engine loads the folder, by the facts in `diagnosis/engines.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

from reshard.conversion.base_model import CONFIG
from reshard.diagnosis.case import Case
from reshard.diagnosis.checks.vocabulary import head_is_lost
from reshard.diagnosis.engines import (
    DROPPED,
    ENGINES,
    FIELDS,
    LAYOUTS,
    MLX_ROTARY,
    MLX_THETA,
    MLX_TIES,
    SCORE_BIAS,
    EngineName,
    LayoutChange,
)
from reshard.diagnosis.folder import model_files
from reshard.diagnosis.signs import CONVERT_AGAIN, Repair, Signs, some
from reshard.naming import fields, patterns
from reshard.naming.families import TOWER_PARTS
from reshard.naming.released import Unreleased, unreleased
from reshard.naming.schema import CLASSIFIERS, classes_of, is_backbone, says_tied, text_config

_HUB = "Write it in the layout of the release: reshard convert DIR OUT --names hub."


def files(case: Case, key: EngineName) -> Signs | None:
    """Weight files that the engine reads in addition to the model's, or that it does not read."""
    engine, folder = ENGINES[key], case.folder
    if folder.pickled:
        words = f"{engine.title} reads only {engine.files}, but the weights are pickled"
        repair = Repair("the weights are written as safetensors")
        return None if engine.pickled else Signs((words,), repair)
    own = set(folder.files) if folder.listed is None else set(folder.listed.values())
    if engine.by_index and folder.listed is not None:
        return None
    read = {name for name in folder.safetensors if fnmatchcase(name, engine.files)}
    extra = sorted(read - own if folder.listed is not None else read - model_files(own))
    if not extra:
        return None
    evidence = (
        f"{engine.title} reads {engine.files}, so it reads {some(extra)} as a part of the model"
    )
    advice = "Move them into a folder below, or away."
    if engine.by_index:
        advice += " Or convert the run again: reshard writes an index, which keeps them apart."
    return Signs((evidence,), advice=advice)


def class_served(case: Case, key: EngineName) -> Signs | None:
    """A class that the engine has none for."""
    engine, named = ENGINES[key], next(iter(classes_of(case.folder.settings)), "")
    scores = named.endswith(CLASSIFIERS)
    if named in engine.unserved or (
        scores and engine.scores is not None and named not in engine.scores
    ):
        return Signs((f"{CONFIG} names {named}, for which {engine.title} has no class",))
    return None


def no_head(case: Case, key: EngineName) -> Signs | None:
    """A backbone: an engine generates nothing with it."""
    if not is_backbone(case.folder.settings):
        return None
    (named, *_), title = classes_of(case.folder.settings), ENGINES[key].title
    evidence = f"{CONFIG} names {named}, a class without an output head"
    return Signs((evidence, f"{title} cannot generate text with it, only score or embed"))


def tensors(case: Case, key: EngineName) -> Signs | None:
    """What the engine would leave at random values, or refuse for."""
    engine, found = ENGINES[key], case.structure
    lost = list(found.absent) if found is not None else []
    if head_is_lost(case) and case.vocabulary.embedding is not None:
        lost.append("lm_head.weight")
    evidence = []
    for what, names in _split(lost, lambda name: "norm" in name or "conv" in name):
        if names:
            effect = engine.norms if what else engine.absent
            evidence.append(f"without {some(names)}, {engine.title} {effect}")
    return Signs(tuple(evidence), advice=CONVERT_AGAIN) if evidence else None


def unknown_tensors(case: Case, key: EngineName) -> Signs | None:
    """What the engine would drop silently, or refuse for."""
    engine, found = ENGINES[key], case.structure
    evidence = []
    names = () if found is None else (*found.strange, *found.heads)
    for bias, group in _split(names, lambda name: name.endswith(("bias", "_bias"))):
        if group:
            effect = engine.biases if bias else engine.strange
            evidence.append(f"{engine.title} {effect} {some(group)}")
    dropped = [name for name in case.clean if patterns.matches_any(DROPPED.get(key, ()), name)]
    if dropped:
        evidence.append(f"{engine.title} silently drops {some(dropped)}")
    head = case.vocabulary.head
    own = head is not None and not case.vocabulary.equal
    if own and key in ("vllm", "mlx") and says_tied(case.folder.settings):
        evidence.append(f"{engine.title} ignores {head}, since the config ties it")
    return Signs(tuple(evidence), advice=CONVERT_AGAIN) if evidence else None


def names_taken(case: Case, key: EngineName) -> Signs | None:
    """A layout that the engine does not take."""
    effect, evidence = _layout(case, key)
    return Signs((evidence,), advice=_HUB) if effect is not None else None


def names_unread(case: Case, key: EngineName) -> Signs | None:
    """A layout that nobody has tried with the engine."""
    effect, evidence = _layout(case, key)
    return Signs((evidence,), advice=_HUB) if effect is None and evidence else None


def _layout(case: Case, key: EngineName) -> tuple[str | None, str]:
    """What the engine makes of names that no release has, None where that is not known; evidence,
    empty where the names are right."""
    engine, settings = ENGINES[key], case.folder.settings
    found = case.structure
    if found is not None and found.bare and not case.folder.headless:
        words = (
            f"names lack `model.`, like a backbone's: {engine.title} refuses to generate with it"
        )
        return (None, "") if engine.bare else ("refuses", words)
    shapes = {clean: case.shape(own) for clean, own in case.clean.items()}
    other = unreleased(shapes, settings)
    if other is None:
        return None, ""
    unknown = ""
    for kind, names in _kinds(other).items():
        effect = LAYOUTS.get((key, kind, str(settings.get("model_type"))))
        said = f"{len(names)} names are not the release's, such as {names[0]}"
        if effect is None:
            unknown = f"{said}: it is not known whether {engine.title} loads them"
        elif effect == "transposed":
            return effect, f"{said}: {engine.title} silently exports the experts transposed"
        elif effect == "random":
            return effect, f"{said}: {engine.title} silently leaves them at random values"
        elif effect == "refuses":
            return effect, f"{said}: {engine.title} refuses them"
    return None, unknown


def _kinds(other: Unreleased) -> dict[LayoutChange, tuple[str, ...]]:
    towers = tuple(name for name in other.moved if name.startswith(TOWER_PARTS))
    lacking = tuple(name for name in towers if ".vision_model." not in f".{name}")
    moved = tuple(name for name in other.moved if name not in set(lacking))
    found: dict[LayoutChange, tuple[str, ...]] = {
        "moved": moved, "tower": lacking, "stacked": other.stacked, "transposed": other.turned
    }  # fmt: skip
    return {kind: names for kind, names in found.items() if names}


def weights(case: Case, key: EngineName) -> Signs | None:
    """Codes that the engine does not read, and weights that it wants as codes."""
    engine, settings = ENGINES[key], case.folder.settings
    stated = settings.get("quantization_config") or settings.get("quantization")
    method = None
    if isinstance(stated, Mapping):
        method = str(stated.get("quant_method", "mlx"))
    if key == "mlx" and settings.get("model_type") == "gpt_oss" and method is None:
        return Signs(("mlx-lm reads gpt-oss only as MXFP4, but these weights are not quantised",))
    if key == "mlx" and settings.get("model_type") == "phimoe" and not _has_biases(settings):
        return Signs(
            ("mlx-lm's class has biases of queries, keys, values and the head, unlike these files",)
        )
    if key == "mlx" and method == "fp8" and settings.get("model_type") == "deepseek_v3":
        return None
    if method is None or (engine.codes is None and method != "mlx"):
        return None
    if engine.codes is not None and method in engine.codes:
        return None
    return Signs(
        (f"the weights are quantised ({method}), which {engine.title} does not read",),
        advice="Make the 16-bit model: reshard convert DIR OUT.",
    )


def _has_biases(settings: Mapping[str, object]) -> bool:
    return bool(settings.get("attention_bias")) and bool(settings.get("lm_head_bias"))


def config(case: Case, key: EngineName) -> Signs | None:
    """Fields of the config that the engine asks for."""
    title, evidence, patches = ENGINES[key].title, [], {}
    for field in fields.missing(case.folder.settings):
        effect = FIELDS.get((key, field.model_type, field.name))
        if key == "mlx" and field.name.startswith("rope_"):
            effect = _rotary(field)
        if effect is not None:
            evidence.append(f"without {field.path}, {title} {effect}")
            patches[field.path] = field.value
    path = "text_config.tie_word_embeddings"
    if key == "mlx" and _unstated_tie(case):
        evidence.append(f"without {path}, mlx-lm refuses, or does not find the head")
        patches[path] = says_tied(case.folder.settings)
    if not evidence:
        return None
    return Signs(tuple(evidence), Repair("they are written as the release has them", patches))


def _unstated_tie(case: Case) -> bool:
    """Whether mlx-lm, which reads the inner config alone, misses what it says of ties: its classes
    of Qwen take a tie for granted, and those of Qwen's experts ask."""
    text = text_config(case.folder.settings)
    kind = str(case.folder.settings.get("model_type"))
    asks = kind == "qwen3_vl_moe" or case.vocabulary.head is not None
    return bool(text) and "tie_word_embeddings" not in text and kind in MLX_TIES and asks


def _rotary(field: fields.Missing) -> str | None:
    """What mlx-lm does without a field of rotary positions."""
    if field.model_type in MLX_ROTARY:
        return None
    if field.name != "rope_theta":
        return "silently uses none"
    theta = MLX_THETA.get(field.model_type, 0.0)
    if theta is None:
        return "refuses"
    if theta == 0.0:
        return "may silently use a default"
    return None if theta == field.value else f"silently uses {theta:g}"


def score_bias(case: Case, key: EngineName) -> Signs | None:
    """sglang's classifiers of Qwen have a bias that no file has."""
    named = next(iter(classes_of(case.folder.settings)), "")
    if key != "sglang" or named not in SCORE_BIAS or "score.bias" in case.clean:
        return None
    evidence = (
        "sglang's class has score.bias, which stays at its random initial value: it is "
        "added to every reward"
    )
    return Signs((evidence,))


def _split(
    names: Iterable[str], test: Callable[[str], bool]
) -> tuple[tuple[bool, list[str]], tuple[bool, list[str]]]:
    listed = list(names)
    return (True, [n for n in listed if test(n)]), (False, [n for n in listed if not test(n)])


#: The checks of an engine, by the codes of what they find.
CHECKS: Mapping[str, Callable[[Case, EngineName], Signs | None]] = {
    "engine-files": files,
    "engine-class": class_served,
    "engine-no-head": no_head,
    "engine-tensors": tensors,
    "engine-unknown-tensors": unknown_tensors,
    "engine-names": names_taken,
    "engine-names-unread": names_unread,
    "engine-weights": weights,
    "engine-config": config,
    "engine-score-bias": score_bias,
}
