"""What once came out wrong without a word: it is right, or it is an error that says what to do."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

import reshard
from reshard.cli import app as cli
from reshard.cli.lightrft import ds2hf
from tests.models import released
from tests.oracle.cache import Oracle

Tensors = Mapping[str, torch.Tensor]


def command(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a `reshard` command, as the shell has it."""
    runner = CliRunner()
    with runner.isolation() as (out, err, _):
        code = cli.run(cli.reshard, list(map(str, arguments)))
        return code, out.getvalue().decode(), err.getvalue().decode()


class Case:
    """A base folder and a checkpoint of one family, both on disk."""

    def __init__(self, folder: Path, name: str, state: Tensors | None = None) -> None:
        self.name = name
        self.base = released.write(folder / "base", name, released.values(name, seed=0))
        self.state = released.values(name, seed=1) if state is None else dict(state)
        self.checkpoint = folder / "model.pt"
        self.out = folder / "out"
        self.save(self.state)

    def save(self, state: Tensors) -> None:
        torch.save(dict(state), self.checkpoint)

    def convert(self, **options: Any) -> reshard.Report:
        return reshard.convert(self.checkpoint, self.out, base=self.base, **options)

    def written(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = load_file(self.out / "model.safetensors")
        return found

    def config(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.out / "config.json").read_text())
        return found


# --- the same as the base ----------------------------------------------------------------------


def test_what_changed_is_counted(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", released.values("llama", seed=0))
    case.save({**case.state, "model.norm.weight": torch.zeros(32)})
    report = case.convert()
    assert (report.changed, report.compared) == (1, len(case.state))


def test_a_result_like_the_base_is_an_error(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama", released.values("llama", seed=0))
    arguments = ["convert", case.checkpoint, case.out, "--base", case.base]
    code, _, words = command(*arguments)
    assert code == 1
    assert "all 21 tensors equal the base model's" in words
    assert "--allow-unchanged" in words
    assert not case.out.exists()
    code, said, _ = command(*arguments, "--allow-unchanged", "--json")
    assert code == 0
    assert json.loads(said)["changed"] == 0
    assert case.written().keys() == case.state.keys()


# --- what is missing or left over --------------------------------------------------------------


def without(name: str, part: str) -> dict[str, torch.Tensor]:
    return {key: v for key, v in released.values(name, seed=1).items() if part not in key}


def test_frozen_tensors_that_were_not_saved(tmp_path: Path) -> None:
    case = Case(tmp_path, "qwen2_5_vl", without("qwen2_5_vl", "visual."))
    with pytest.raises(reshard.NamesError, match="--fill-from-base") as caught:
        case.convert()
    assert all(name.startswith("visual.") for name in caught.value.missing)
    report = case.convert(fill_from_base=True)
    assert set(report.filled) == set(caught.value.missing)
    base = load_file(case.base / "model.safetensors")
    for key, value in case.written().items():
        assert torch.equal(value, (base if key in report.filled else case.state)[key]), key
    stated = json.loads((case.out / "reshard.json").read_text())
    assert stated["names"]["filled"] == list(report.filled)
    released.load(case.out, released.class_of("qwen2_5_vl"))


def test_nothing_is_filled_where_what_was_saved_does_not_fit(tmp_path: Path) -> None:
    """A wrong prefix with --fill-from-base would otherwise give the base's weights."""
    state = {f"strange.{key}.x": value for key, value in released.values("llama", seed=1).items()}
    case = Case(tmp_path, "llama", state)
    with pytest.raises(reshard.NamesError):
        case.convert(fill_from_base=True)


def test_names_that_the_user_allows(tmp_path: Path) -> None:
    state = {**without("qwen2_5_vl", "visual."), "value.weight": torch.randn(4, 4)}
    case = Case(tmp_path, "qwen2_5_vl", state)
    with pytest.raises(reshard.NamesError):
        case.convert(allow=["visual.*"])
    arguments = ["convert", case.checkpoint, case.out, "--base", case.base, "--json"]
    code, said, _ = command(*arguments, "--allow", "visual.*", "value.weight")
    assert code == 0
    report = json.loads(said)
    assert report["unexpected"] == ["value.weight"]
    assert report["missing"]
    assert all(name.startswith("visual.") for name in report["missing"])


def test_constants_of_the_base_are_always_there(tmp_path: Path) -> None:
    """Rotary frequencies that old files hold and no state dict has."""
    case = Case(tmp_path, "llama")
    constant = "model.layers.0.self_attn.rotary_emb.inv_freq"
    released.write(case.base, "llama", {**case.state, constant: torch.arange(4.0)})
    report = case.convert(allow_unchanged=True)
    assert report.filled == (constant,)
    assert torch.equal(case.written()[constant], torch.arange(4.0))


def test_frozen_parameters_of_deepspeed_are_left_out_or_filled(
    oracle: Oracle, tmp_path: Path
) -> None:
    """`--exclude_frozen_parameters` was once parsed and not used."""
    case = oracle["lora-zero2"]
    arguments = ["--checkpoint_dir", case.root, "--output_dir", tmp_path / "out", "--hf_base",
                 case.base, "--lora-alpha", 6]  # fmt: skip
    done = CliRunner().invoke(
        ds2hf.command, [*map(str, arguments), "--exclude_frozen_parameters"], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    trained = {"self_attn.q_proj", "mlp.down_proj"}
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {".".join(name.split(".")[3:5]) for name in written} == trained
    missing = json.loads((tmp_path / "out" / "reshard.json").read_text())["names"]["missing"]
    assert set(missing) == set(load_file(case.base / "model.safetensors")) - set(written)
    report = reshard.convert(
        case.root, tmp_path / "filled", base=case.base, lora_alpha=6, exclude_frozen=True,
        fill_from_base=True,
    )  # fmt: skip
    assert set(report.filled) == set(missing)
    released.load(tmp_path / "filled", "LlamaForCausalLM", torch.bfloat16)


# --- another model -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "base", "words"),
    [
        ("llama", "qwen2", "6 of the base are not in the checkpoint"),
        ("llama", "qwen2_5_vl", r"(?s)24 of the base are not in the checkpoint.*visual\.blocks"),
        ("qwen2", "llama", "6 of the checkpoint are not in the base"),
        ("llama", "mixtral", r"gate\.weight \(nearest: model\.layers\.0\.mlp\.gate_proj\.weight\)"),
        ("qwen2_vl", "qwen2_5_vl", r"visual\.blocks\.0\.mlp\.up_proj\.weight \(nearest: visual\."),
    ],
)
def test_the_wrong_base_is_told_with_both_lists(
    name: str, base: str, words: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, name)
    expected = released.values(base, seed=0)
    released.write(case.base, base, expected)
    with pytest.raises(reshard.NamesError, match=words) as caught:
        case.convert()
    assert set(caught.value.missing) == expected.keys() - case.state.keys()
    assert set(caught.value.unexpected) == case.state.keys() - expected.keys()
    assert not case.out.exists()


def test_a_base_of_another_size_names_both_shapes(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    state = {key: v.repeat(2, *[1] * (v.ndim - 1)) if v.ndim == 2 else v
             for key, v in case.state.items()}  # fmt: skip
    case.save(state)
    words = r"q_proj\.weight: \(64, 32\) in the checkpoint, \(32, 32\) in the base"
    with pytest.raises(reshard.NamesError, match=words):
        case.convert()


def test_inspect_shows_the_map(tmp_path: Path) -> None:
    state = released.in_memory("4.57", "qwen2_5_vl_tied", released.values("qwen2_5_vl_tied", 1))
    case = Case(tmp_path, "qwen2_5_vl_tied", {f"policy.{key}": v for key, v in state.items()})
    code, said, _ = command("inspect", case.checkpoint, "--base", case.base, "--json")
    assert code == 0
    shown = json.loads(said)["base"]
    assert shown["fits"]
    assert shown["prefix"] == "policy."
    assert any("model.visual.** -> visual.**" in rule for rule in shown["rules"])
    assert shown["tied"] == {"lm_head.weight": "model.embed_tokens.weight"}
    code, said, _ = command("inspect", case.checkpoint, "--base", case.base)
    assert code == 0
    for words in ("fits yes", "prefix 'policy.' is stripped", "model.visual.** -> visual.**"):
        assert words in " ".join(said.split())
    assert "()" not in said
    assert "missing" not in said


def test_inspect_of_what_does_not_fit_exits_with_one(tmp_path: Path) -> None:
    case = Case(tmp_path, "llama")
    case.save({**without("llama", "layers.1.mlp"), "extra.weight": torch.zeros(2)})
    code, said, _ = command("inspect", case.checkpoint, "--base", case.base, "--json")
    assert code == 1
    shown = json.loads(said)["base"]
    assert not shown["fits"]
    assert shown["missing"] == [
        f"model.layers.1.mlp.{part}_proj.weight" for part in ("down", "gate", "up")
    ]
    assert shown["unexpected"] == ["extra.weight"]
    code, said, _ = command("inspect", case.checkpoint, "--base", case.base)
    assert code == 1
    assert "extra.weight" in said
    assert "model.layers.1.mlp.up_proj.weight" in said


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"model.norm.lora_E.default": torch.zeros(2, 2)}, "AdaLoRA"),
        ({"preference_head.0.weight": torch.zeros(32, 32)}, "preference_head.0.bias"),
    ],
)
def test_inspect_says_what_a_conversion_would_refuse(
    extra: dict[str, torch.Tensor], words: str, tmp_path: Path
) -> None:
    case = Case(tmp_path, "llama")
    case.save({**case.state, **extra})
    code, said, _ = command("inspect", case.checkpoint, "--base", case.base, "--json")
    assert code == 1
    assert words in json.loads(said)["base"]["message"]


def test_a_part_that_is_named(tmp_path: Path) -> None:
    """Two models in one state dict: actor and reference, told apart by --prefix."""
    actor, reference = released.values("llama", seed=1), released.values("llama", seed=2)
    both = {f"actor.model.{key}": value for key, value in actor.items()}
    both |= {f"reference.model.{key}": value for key, value in reference.items()}
    case = Case(tmp_path, "llama", both)
    with pytest.raises(reshard.NamesError):
        case.convert()
    for prefix, state in (("actor.model", actor), ("reference", reference)):
        case.convert(prefix=prefix, overwrite=True)
        for key, value in case.written().items():
            assert torch.equal(value, state[key]), key
        shown = command("inspect", case.checkpoint, "--base", case.base, "--prefix", prefix)
        assert shown[0] == 0
    with pytest.raises(reshard.NamesError, match="'critic'; the names begin with actor, reference"):
        case.convert(prefix="critic", overwrite=True)
    reshard.convert(case.checkpoint, tmp_path / "plain", prefix="actor.model")
    assert load_file(tmp_path / "plain" / "model.safetensors").keys() == actor.keys()


# --- regressions: what the scripts that people use today get wrong -----------------------------


WRAPPINGS: dict[str, Callable[[str], str]] = {
    "plain": lambda name: name,
    "ddp": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "grm": lambda name: f"model.{name}",
    "actor": lambda name: f"actor.model.{name}",
    "unknown": lambda name: f"trainer.student.{name}",
    "checkpointed": lambda name: name.replace("mlp.", "mlp._checkpoint_wrapped_module."),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("version", ["4.51", "4.57"])
def test_a_prefix_never_leaves_the_bases_weights(
    wrapping: str, version: str, tmp_path: Path
) -> None:
    """`strict=False` with its result thrown away exported the base as the trained model."""
    name = "qwen2_5_vl"
    trained = released.values(name, seed=1)
    state = released.in_memory(version, name, trained)
    case = Case(tmp_path, name, {WRAPPINGS[wrapping](key): v for key, v in state.items()})
    report = case.convert()
    assert report.changed == report.compared == len(trained)
    for key, value in case.written().items():
        assert torch.equal(value, trained[key]), key


def test_tag_and_parent_folder_are_used(oracle: Oracle, tmp_path: Path) -> None:
    case = oracle["llama-zero3"]
    run = Path(shutil.copytree(case.root, tmp_path / "run"))
    shutil.copytree(run / "global_step2", run / "global_step1")
    for name, folder, flags in (
        ("parent", run, []),
        ("tag", run, ["--tag", "global_step1"]),
        ("folder", run / "global_step1", []),
    ):
        arguments = ["--checkpoint_dir", folder, "--output_dir", tmp_path / name, "--hf_base",
                     case.base, *flags]  # fmt: skip
        done = CliRunner().invoke(ds2hf.command, list(map(str, arguments)), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        tag = json.loads((tmp_path / name / "reshard.json").read_text())["source"]["tag"]
        assert tag == ("global_step2" if name == "parent" else "global_step1")
        assert (tmp_path / name / "model.safetensors").is_file()


@pytest.mark.parametrize("dtype", ["base", "keep", "float16"])
def test_the_config_states_the_dtype_that_is_written(dtype: str, tmp_path: Path) -> None:
    """Masters in float32 beside a base's config of bfloat16: twice the size, and a lie."""
    case = Case(tmp_path, "qwen2_5_vl")
    narrow = {k: v.bfloat16() for k, v in released.values("qwen2_5_vl", seed=0).items()}
    released.write(case.base, "qwen2_5_vl", narrow)
    config = json.loads((case.base / "config.json").read_text())
    config["torch_dtype"] = config["text_config"]["torch_dtype"] = "bfloat16"
    (case.base / "config.json").write_text(json.dumps(config))
    case.convert(dtype=dtype)
    expected = {"base": "bfloat16", "keep": "float32", "float16": "float16"}[dtype]
    assert {str(v.dtype) for v in case.written().values()} == {f"torch.{expected}"}
    assert case.config()["torch_dtype"] == case.config()["text_config"]["torch_dtype"] == expected


def test_no_conversion_needs_a_warning_of_the_importer(tmp_path: Path) -> None:
    """Nothing of a model is imported or built: no class that a version may lack, no GPU."""
    case = Case(tmp_path, "qwen2_audio")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case.convert()
