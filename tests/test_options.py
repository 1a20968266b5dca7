"""Every option of every function: what it takes, and that nothing else is taken."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import click
import numpy as np
import pytest
import torch

import reshard
from reshard.checkpoint import OPEN
from reshard.cli.app import reshard as command
from reshard.cli.app import run
from reshard.cli.commands import convert as convert_command
from reshard.cli.lightrft.ds2hf import command as ds2hf
from reshard.cli.lightrft.fsdp2hf import command as fsdp2hf
from reshard.comparison.declared import DIFF, VERIFY
from reshard.conversion.declared import CONVERT, parsed
from reshard.conversion.options import restated
from reshard.core.options import Choice, Option, Options, parse
from reshard.diagnosis.declared import DOCTOR
from reshard.inspection import INSPECT


class Odd:
    """An object that answers to nothing."""

    def __repr__(self) -> str:
        return "odd\x1b[2J"


VALUES: dict[str, object] = {
    "None": None, "True": True, "False": False, "0": 0, "1": 1, "-1": -1, "huge": 10**400,
    "1.5": 1.5, "-0.5": -0.5, "nan": math.nan, "inf": math.inf, "'no'": "no", "'1'": "1",
    "empty": "", "blank": "  ", "NUL": "a\0b", "bytes": b"abc", "a list": ["a"], "a tuple": ("a",),
    "no list": [], "a list of an empty text": ["a", ""], "a list of bytes": [b"a"],
    "a list of numbers": [1], "a list of lists": [["a"]], "a dict": {"a": 1}, "a set": {"a"},
    "an object": Odd(), "a class": Odd, "a function": print, "a generator": (x for x in "ab"),
    "a path": Path("a"), "an array": np.zeros(2), "many wildcards": ["a**b**c**d**e"],
}  # fmt: skip
_TEXTS = {"'no'", "'1'"}
_PATHS = {"'no'", "'1'", "blank", "a path"}
_LISTS = {"a list", "a tuple", "no list"}
_FLAG = {"True", "False"}

#: Which of `VALUES` an option takes, besides None where that is the default.
TAKEN: dict[str, set[str]] = {
    "source": _PATHS, "target": _PATHS, "base": _PATHS, "adapter_config": _PATHS, "path": _PATHS,
    "folder": _PATHS, "against": _PATHS, "first": _PATHS, "second": _PATHS, "repair": _PATHS,
    "tag": _TEXTS, "prefix": _TEXTS, "role": _TEXTS, "adapter": _TEXTS, "value_head": _TEXTS,
    "to": set(), "dtype": set(), "names": set(), "lora": set(), "model_type": set(),
    "pooling_method": set(), "srm_format": set(), "transformers_version": {"'1'"},
    "max_shard_size": {"1", "'1'", "huge"}, "threads": {"1"},
    "consumed_samples": {"0", "1"}, "probing_layer": {"0", "1", "-1", "huge"},
    "lora_alpha": {"1", "1.5"}, "overwrite": _FLAG, "resume": _FLAG, "verify": _FLAG,
    "dry_run": _FLAG, "scale_for_train": _FLAG, "exclude_frozen": _FLAG, "masters": _FLAG,
    "fill_from_base": _FLAG, "optimizer": _FLAG, "layout": set(), "hyperparameters": _PATHS,
    "allow_unchanged": _FLAG, "allow_step_mismatch": _FLAG, "strict": {*_FLAG, "no list"},
    "allow": _LISTS, "heads_types": {*_LISTS, "many wildcards"},
    "engine": set(), "ray_address": set(), "spectrum": _FLAG, "progress": {"a function", "a class"},
}  # fmt: skip

FUNCTIONS: dict[Callable[..., Any], tuple[Options, dict[str, Any]]] = {
    reshard.convert: (CONVERT, {"source": "nowhere", "target": "out", "base": "nowhere"}),
    reshard.open: (OPEN, {"path": "nowhere"}),
    reshard.inspect: (INSPECT, {"path": "nowhere"}),
    reshard.verify: (VERIFY, {"folder": "nowhere", "against": "nowhere"}),
    reshard.diff: (DIFF, {"first": "nowhere", "second": "nowhere"}),
    reshard.doctor: (DOCTOR, {"folder": "nowhere"}),
}
CASES = [(function, name) for function, (options, _) in FUNCTIONS.items() for name in options]


def name_of(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.mark.parametrize(("function", "name"), CASES, ids=name_of)
def test_a_wrong_value_is_an_option_error_that_names_the_option(
    function: Callable[..., Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, needed = FUNCTIONS[function]
    option = options[name]
    for label, value in VALUES.items():
        taken = label in TAKEN[name] or (value is None and option.default is None)
        given = {**needed, name: value}
        if function is reshard.convert and name in (
            "consumed_samples",
            "optimizer",
            "layout",
            "hyperparameters",
        ):
            given["to"] = "dcp"
        if name in ("layout", "hyperparameters"):
            given["optimizer"] = True
        if taken and not (value is None and option.required):
            with pytest.raises(reshard.ReshardError) as caught:
                function(**given)
            # "nowhere" is not found; another value may be of no use together with the rest.
            assert not isinstance(caught.value, reshard.OptionError), (label, caught.value)
        else:
            with pytest.raises(reshard.OptionError) as caught:
                function(**given)
            assert caught.value.option == name, label
            assert str(caught.value).startswith(f"{name}: "), label
            assert str(caught.value).isprintable(), label
            assert len(str(caught.value)) < 600, label
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("function", FUNCTIONS, ids=name_of)
def test_keywords_and_declarations_agree(function: Callable[..., Any]) -> None:
    options, _ = FUNCTIONS[function]
    parameters = inspect.signature(function).parameters
    assert set(parameters) == set(options)
    for name, option in options.items():
        default = parameters[name].default
        assert default == (inspect.Parameter.empty if option.required else option.default), name
        assert f"\n    {name}:\n" in (function.__doc__ or ""), name


def literals(hint: object) -> set[str]:
    """The words of every Literal in a type."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return {word for part in get_args(hint) for word in literals(part)}


def test_types_and_choices_agree() -> None:
    """So that a wrong word fails in a type checker, and each right one does not."""
    hints = get_type_hints(inspect.unwrap(reshard.convert))
    for name, option in CONVERT.items():
        choices: set[str] = set()
        if isinstance(option.type, Choice):
            choices = {*option.type.choices, *option.type.aliases}
        assert literals(hints[name]) == choices, name


def test_a_type_checker_finds_wrong_words() -> None:
    """`mypy --strict` reads this file and refuses an ignore that hides nothing."""
    with pytest.raises(reshard.OptionError):
        reshard.convert("a", "b", to="gguf")  # type: ignore[arg-type]
    with pytest.raises(reshard.OptionError):
        reshard.convert("a", "b", dtype="float31")  # type: ignore[arg-type]
    with pytest.raises(reshard.OptionError):
        reshard.convert("a", "b", lora="mergee")  # type: ignore[arg-type]
    with pytest.raises(reshard.OptionError):
        reshard.convert("a", "b", strict=1.5)  # type: ignore[arg-type]
    with pytest.raises(reshard.NotFoundError):
        reshard.convert("a", "b", base="c", dtype=torch.bfloat16, to="dcp")


@pytest.mark.parametrize(
    ("given", "stated"),
    [
        ({"dtype": "bf16"}, {"dtype": "bfloat16"}),
        ({"dtype": "fp16"}, {"dtype": "float16"}),
        ({"dtype": "fp32"}, {"dtype": "float32"}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"dtype": torch.float32}, {"dtype": "float32"}),
        ({"max_shard_size": "5G"}, {"max_shard_nbytes": 5 * 10**9}),
        ({"max_shard_size": "5GiB"}, {"max_shard_nbytes": 5 * 2**30}),
        ({"max_shard_size": np.int64(7)}, {"max_shard_nbytes": 7}),
        ({"to": "dcp"}, {"to": "dcp", "max_shard_nbytes": 10**9}),
        ({"probing_layer": np.int32(3)}, {"probing_layer": 3}),
        ({"allow": ("a", "b.*")}, {"allow": ["a", "b.*"]}),
    ],
)  # fmt: skip
def test_other_spellings(given: dict[str, Any], stated: dict[str, Any]) -> None:
    options, _ = parsed({"source": "a", "target": "b", "base": "c", **given})
    assert options.stated().items() >= stated.items()


def test_what_is_stated_is_read_again() -> None:
    """reshard.json's options go through the same kinds."""
    given = {"source": "a", "target": "b", "base": "c", "allow": ["x.*"], "lora": "both",
             "exclude_frozen": True, "adapter": "a", "value_head": "v",
             "srm_format": "split", "names": "disk"}  # fmt: skip
    options, _ = parsed(given)
    plain, _ = parsed({"source": "a", "target": "b", "base": "c"})
    assert restated(plain, options.stated(), {}).stated() == options.stated()
    wrong: list[dict[str, Any]] = [
        {"exclude_frozen": "no"}, {"allow": "x.*"}, {"lora": "all"}, {"srm_format": 1},
        {"probing_layer": True}, {"fill_from_base": 1},
    ]  # fmt: skip
    for change in wrong:
        with pytest.raises((reshard.OptionError, ValueError, TypeError)):
            restated(plain, {**options.stated(), **change}, {})


def test_an_unknown_option_is_named() -> None:
    with pytest.raises(reshard.OptionError, match="frobnicate: there is no such option"):
        parse(CONVERT, {"source": "a", "target": "b", "frobnicate": 1})


def test_torchs_other_dtypes_are_refused() -> None:
    for dtype in (torch.int64, torch.float64, np.dtype("float32"), np.float32):
        with pytest.raises(reshard.OptionError, match=r"^dtype: "):
            reshard.convert("a", "b", dtype=dtype)  # type: ignore[arg-type]


def test_codes_of_strict() -> None:
    with pytest.raises(reshard.OptionError, match="Did you mean no-checksums"):
        reshard.convert("a", "b", strict=["no-checksum"])
    with pytest.raises(reshard.NotFoundError):
        reshard.convert("a", "b", strict=["no-checksums", "no-base"])


def flags_of(command: click.Command) -> dict[str, click.Parameter]:
    return {flag: parameter for parameter in command.params for flag in parameter.opts}


def test_the_command_has_a_flag_for_each_option() -> None:
    found = flags_of(convert_command)
    for option in CONVERT.values():
        if option.required or option.only_python:
            continue
        flag = f"--no-{option.flag}" if option.name == "verify" else f"--{option.flag}"
        assert flag in found, flag
        assert found[flag].name == option.name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--adapter", "a", "--adapter", "b"],
        ["--adapter=a", "--adapter=a"],
        ["--lora-alpha", "1", "--lora_alpha", "2"],
        ["-t", "a", "--tag", "b"],
        ["--scale-for-train", "--no-scale-for-train"],
        ["--base", "a", "--base", "b"],
    ],
)
def test_an_option_of_one_value_is_given_once(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, ["convert", "a", "b", *arguments]) == 2
    assert "was given twice; it takes one value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        (ds2hf, ["--tag", "a", "-t", "b"]),
        (fsdp2hf, ["--lora-alpha", "1", "--lora-alpha", "2"]),
    ],
)
def test_the_scripts_too(
    script: click.Command, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    needed = ["--checkpoint_dir", "a", "--hf_base", "b", "--output_dir", "c"]
    assert run(script, [*needed, *arguments]) == 2
    assert "was given twice" in capsys.readouterr().err


def given_to(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Mapping[str, Any]:
    """What the command hands to `reshard.convert`."""
    got: dict[str, Any] = {}

    def stand_in(*_: object, **options: Any) -> None:
        got.update(options)
        raise reshard.PlanError("seen")

    monkeypatch.setattr("reshard.conversion.convert.convert", stand_in)
    assert run(command, ["convert", *arguments]) == 1
    return got


@pytest.mark.parametrize(
    ("arguments", "strict"),
    [
        (["a", "b"], ()),
        (["a", "b", "--strict"], True),
        (["--strict", "a", "b"], True),
        (["a", "b", "--strict", "--dry-run"], True),
        (["a", "b", "--strict", "no-base", "no-checksums", "--dry-run"],
         ("no-base", "no-checksums")),
        (["--strict", "no-base", "a", "b"], ("no-base",)),
    ],
)  # fmt: skip
def test_strict_takes_codes(
    arguments: list[str], strict: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert given_to(arguments, monkeypatch)["strict"] == strict


def test_allow_and_heads_stay_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    got = given_to(["a", "b", "--allow", "x", "y", "--allow", "z", "--dtype", "bf16"], monkeypatch)
    assert (got["allow"], got["dtype"]) == (("x", "y", "z"), "bfloat16")
    assert got.keys() == {n for n, option in CONVERT.items() if not option.required}


def test_help_is_made_of_the_declarations(capsys: pytest.CaptureFixture[str]) -> None:
    run(command, ["convert", "--help"])
    shown = re.sub(r"\s+", " ", capsys.readouterr().out)
    options: list[Option] = list(CONVERT.values())
    assert len(options) > 30
    for option in options:
        words = getattr(option.type, "no", "") or option.help
        assert option.only_python or re.sub(r"\s+", " ", words) in shown, option.name
