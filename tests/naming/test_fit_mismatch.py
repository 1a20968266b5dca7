"""The fit of names: what is missing, left over, or of another shape."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from reshard.core.tensors import Shape
from reshard.errors import NamesError
from reshard.naming import ways
from reshard.naming.judge import Judge
from tests.naming import tables
from tests.naming.test_fit import EMBEDDING, HEAD, NORM, TIED, UNTIED, run
from tests.naming.test_many_names import experts

# --- what is missing, left over, or of another shape -------------------------------------------


def test_both_lists_and_the_nearest_names() -> None:
    base = {f"model.layers.{n}.mlp.up_proj.weight": (4, 2) for n in range(30)}
    source = {name.replace("up_proj", "up_projection"): shape for name, shape in base.items()}
    with pytest.raises(NamesError) as caught:
        run({**source, NORM: (2,)}, {**base, NORM: (2,)})
    error = caught.value
    assert error.missing == tuple(base)
    assert error.unexpected == tuple(source)
    text = str(error)
    assert "1 of 31 tensors have the same name and shape" in text
    assert "30 of the base are not in the checkpoint" in text
    assert "30 of the checkpoint are not in the base" in text
    first = "model.layers.0.mlp.up_proj.weight (nearest: model.layers.0.mlp.up_projection.weight)"
    assert first in text
    assert text.count("nearest") == 20
    assert "and 20 more" in text


def test_another_size_of_the_model_is_told_in_a_table() -> None:
    """The example of docs/errors.md."""
    layer = "model.layers.{}.input_layernorm.weight"
    base = {EMBEDDING: (6, 2), NORM: (2,), layer.format(0): (2,), layer.format(1): (2,)}
    source = {EMBEDDING: (6, 4), NORM: (4,), layer.format(0): (4,)}
    with pytest.raises(NamesError) as caught:
        run(source, base)
    page = Path(__file__).parents[2] / "docs" / "errors.md"
    assert caught.value.message.strip() in page.read_text(encoding="utf-8")
    assert caught.value.missing == (layer.format(1),)


@pytest.mark.parametrize(
    ("held", "stored", "told"),
    [
        (24, 32, "The checkpoint lacks layers 24 to 31 of model.layers."),
        (32, 24, "The base lacks layers 24 to 31 of model.layers."),
        (31, 32, "The checkpoint lacks layer 31 of model.layers."),
    ],
)
def test_whole_layers_that_one_side_lacks_are_named(held: int, stored: int, told: str) -> None:
    def layers(count: int) -> dict[str, Shape]:
        names = [f"model.layers.{n}.{part}.weight" for n in range(count) for part in ("up", "down")]
        return {**TIED, **dict.fromkeys(names, (2,))}

    with pytest.raises(NamesError, match=re.escape(told)):
        run(layers(held), layers(stored))
    less = {name: shape for name, shape in layers(stored).items() if name.split(".")[2:3] != ["3"]}
    with pytest.raises(NamesError, match=r"lacks layers? 3"):
        run(less, layers(stored))


def test_a_layer_of_which_a_part_is_there_is_not_missing_whole() -> None:
    names = [f"model.layers.{n}.{part}.weight" for n in range(4) for part in ("up", "down")]
    base: dict[str, Shape] = {**TIED, **dict.fromkeys(names, (2,))}
    with pytest.raises(NamesError) as caught:
        run({name: shape for name, shape in base.items() if name != names[-1]}, base)
    assert "lacks" not in str(caught.value)


def test_no_hint_leaves_out_the_biases_of_modules_that_fit() -> None:
    many: dict[str, Shape] = {f"model.layers.{n}.up.weight": (2, 2) for n in range(9)}
    biases: dict[str, Shape] = {name.replace("weight", "bias"): (2,) for name in many}
    with pytest.raises(NamesError, match="biases of its modules") as caught:
        run({**TIED, **many, **biases}, {**TIED, **many})
    assert "--allow" not in str(caught.value)


def test_only_a_version_that_tells_is_asked_for() -> None:
    """Of experts that are square, of the backbone's class, the names told no version before."""
    base = tables.table("4.57", "qwen3_vl_moe")
    stored = {
        name: (*shape[:-2], *[min(shape[-2:])] * 2) if "experts" in name else shape
        for name, shape in base.disk_shapes().items()
    }
    backbone = {n.removeprefix("model."): shape for n, shape in stored.items() if n != HEAD}
    options: dict[str, Any] = {"fill_from_base": True}
    with pytest.raises(NamesError, match="--transformers-version"):
        run(backbone, stored, base.config, **options)
    for version in ((4, 57), (5, 23)):
        found = run(backbone, stored, base.config, transformers_version=version, **options)
        assert found.entries


def test_a_model_without_a_prefix_beside_one_with() -> None:
    held = {**TIED, **{f"actor.{name}": shape for name, shape in TIED.items()}, "actor.v": (1,)}
    with pytest.raises(NamesError, match=r"--prefix actor\. .* pass only --allow 'actor\.\*'\.$"):
        run(held, TIED, allow=("*",))
    for options, own in (
        ({"allow": ("*",), "prefix": "actor"}, f"actor.{NORM}"),
        ({"allow": ("actor.*",)}, NORM),
    ):
        assert tables.origin(run(held, TIED, **options).entries[NORM]) == own


def test_the_table_of_a_wrong_base_has_a_screen_at_most() -> None:
    mine, theirs = tables.table("4.57", "qwen2"), tables.table("4.57", "mixtral")
    wide = {name: tuple(2 * size for size in shape) for name, shape in mine.disk_shapes().items()}
    with pytest.raises(NamesError, match=r"hidden size +64 +32") as caught:
        run(wide, theirs.disk_shapes())
    assert len(str(caught.value).splitlines()) <= 12
    assert "nearest" not in str(caught.value)


def test_no_hint_puts_untrained_experts_beside_trained_layers() -> None:
    """Of an unknown layout, `--allow` and `--fill-from-base` together would do just that."""
    many = {f"model.layers.{n}.norm.weight": (2,) for n in range(9)}
    base = {**TIED, **many, "model.layers.0.experts.0.up.weight": (2, 2)}
    source = {**TIED, **many, "model.layers.0.experts.packed": (8,)}
    for fill in (False, True):
        with pytest.raises(NamesError, match="an unknown layout") as caught:
            run(source, base, fill_from_base=fill)
        assert "--allow" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        (
            {"value.weight": (1, 2)},
            r"pass --allow 'value\.\*'\. If it is a critic's head, pass --value-head value\.$",
        ),
        (
            {"model.mtp.a.weight": (3,), "model.mtp.b.weight": (3,), "extra.bias": (3,), "x": (1,)},
            r"no place for, pass --allow 'model\.mtp\.\*' 'extra\.\*' 'x'\.$",
        ),
        ({f"{letter}.weight": (3,) for letter in "abcde"}, r"pass --allow PATTERN \.\.\., where"),
    ],
)
def test_the_options_that_would_help_are_named(extra: dict[str, Shape], hint: str) -> None:
    many = {f"model.layers.{number}.weight": (2,) for number in range(9)}
    base = {**TIED, **many}
    with pytest.raises(NamesError, match=hint) as caught:
        run({**base, **extra}, base)
    assert set(caught.value.unexpected) == set(extra)
    with pytest.raises(NamesError, match=r"If it is, to leave out .*lacks, --fill-from-base\.$"):
        run({**TIED, **many, **extra}, {**base, "model.more": (5,)})
    allowed = re.findall("'(.*?)'", str(caught.value.hint))
    if allowed:
        assert set(run({**base, **extra}, base, allow=tuple(allowed)).matching.unexpected) == set(
            extra
        )


def test_a_shape_that_differs_is_shown_with_both() -> None:
    with pytest.raises(NamesError, match=r"norm.weight: \(3,\) in the checkpoint, \(2,\) in the"):
        run({**TIED, NORM: (3,)}, TIED)


def test_a_wrong_prefix_never_ends_in_the_base_alone() -> None:
    """`load_state_dict(strict=False)` exports the base's weights as the trained ones here."""
    source = {f"somewhere.{name}": shape for name, shape in TIED.items()}
    source["other.weight"] = (2, 2)
    with pytest.raises(NamesError) as caught:
        run(source, TIED, fill_from_base=True)
    assert caught.value.unexpected == ("other.weight",)


def test_filled_from_the_base() -> None:
    with pytest.raises(NamesError, match="--fill-from-base") as caught:
        run({NORM: (2,)}, UNTIED)
    assert set(caught.value.missing) == {EMBEDDING, HEAD}
    found = run({NORM: (2,)}, UNTIED, fill_from_base=True)
    assert set(found.matching.filled) == {EMBEDDING, HEAD}
    assert found.entries.keys() == {NORM}


def test_allowed_names() -> None:
    source = {**TIED, "extra.head.weight": (5,)}
    base = {**TIED, "model.vision.weight": (7,)}
    found = run(source, base, allow=("extra.**", "model.vision.*"))
    assert found.matching.unexpected == ("extra.head.weight",)
    assert found.matching.missing == ("model.vision.weight",)


def test_constants_come_and_go() -> None:
    constant = "model.layers.0.self_attn.rotary_emb.inv_freq"
    assert run({**TIED, constant: (4,)}, TIED).matching.unexpected == (constant,)
    assert run(TIED, {**TIED, constant: (4,)}).matching.filled == (constant,)


def test_some_experts_of_a_stack() -> None:
    base = tables.table("5.23", "mixtral")
    stacked = base.memory
    source = tables.table("4.57", "mixtral").disk_shapes()
    del source["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    with pytest.raises(NamesError, match="holds only a part of it") as caught:
        run(dict(source), stacked, base.config, fill_from_base=True)
    assert caught.value.missing == ("model.layers.1.mlp.experts.down_proj",)


def test_of_many_names_few_readings_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base of an unknown kind is read in seven ways, and the checkpoint in 25: a verdict on each
    of 40,000 names took 25 s."""
    judged = 0
    verdicts = Judge.verdicts

    def counted(*given: Any) -> Any:
        nonlocal judged
        judged += 1
        return verdicts(*given)

    monkeypatch.setattr(Judge, "verdicts", counted)
    monkeypatch.setattr(ways, "_MAX_VERDICTS", 20_000)
    source = dict.fromkeys(experts(300, "specialists"), (4,))
    base = dict.fromkeys(experts(300), (4,))
    for near in ({}, {NORM: (2,)}):
        judged = 0
        with pytest.raises(NamesError, match=f"{len(near)} of {300 + len(near)} tensors"):
            run(source | near, base | near)
        assert judged <= 8


def test_two_tensors_of_the_base_that_one_layout_reads_alike() -> None:
    """Read as transformers 4.52 names Qwen2-VL's parts, a base of an unknown kind would have one
    of them: a checkpoint of one fitted it, and the output had no other."""
    part = {"visual.proj.weight": (3, 2), "model.visual.proj.weight": (3, 2)}
    assert run({**TIED, **part}, {**TIED, **part}).entries.keys() == {*TIED, *part}
    for name in part:
        (other,) = part.keys() - {name}
        with pytest.raises(NamesError) as caught:
            run({**TIED, name: (3, 2)}, {**TIED, **part})
        assert caught.value.missing == (other,)


def test_experts_that_the_base_has_fewer_of_are_not_left_out() -> None:
    """They lie in a tensor whose other experts the base has: it is not the base's under another
    name."""
    base = tables.table("4.57", "mixtral")
    fewer = {name: shape for name, shape in base.disk_shapes().items() if ".experts.2." not in name}
    with pytest.raises(NamesError) as caught:
        run(dict(tables.table("5.23", "mixtral").memory), fewer, base.config)
    experts_of = [name for name in caught.value.unexpected if "experts" in name]
    assert experts_of
    assert all("experts" in name for name in experts_of)


@pytest.mark.parametrize("fill", [False, True])
def test_no_hint_puts_the_bases_experts_in_place_of_trained_layers(fill: bool) -> None:
    """A dense checkpoint on a base of experts: `--allow` and `--fill-from-base` would join two
    models."""
    many = {f"model.layers.{n}.norm.weight": (2,) for n in range(9)}
    base = {**TIED, **many, "model.layers.0.mlp.experts.down_proj": (2, 2, 2)}
    source = {**TIED, **many, "model.layers.0.mlp.down_proj.weight": (2, 2)}
    with pytest.raises(NamesError, match="an unknown layout") as caught:
        run(source, base, fill_from_base=fill)
    assert "--allow" not in str(caught.value)


def test_of_two_models_that_may_be_left_over_one_is_named() -> None:
    held = {f"{part}.{name}": shape for part in ("policy", "ref") for name, shape in TIED.items()}
    with pytest.raises(NamesError, match=r"--prefix policy or --prefix ref\.$"):
        run(held, TIED, allow=("*",))
    chosen = run(held, TIED, allow=("*",), prefix="policy")
    assert tables.origin(chosen.entries[NORM]) == f"policy.{NORM}"
