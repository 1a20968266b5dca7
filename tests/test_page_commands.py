"""Every command of the documentation is run, as it is printed, and ends as the page says."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from reshard.cli.app import reshard as command
from reshard.cli.app import run
from tests.oracle.cache import Oracle
from tests.test_site import CASES, parsed
from tests.world import World

# What lies where the pages say; a page may call another thing by the same name.
NAMED: Mapping[str, str] = {
    "A": "out",
    "B": "base",
    "BASE": "base",
    "CHECKPOINT": "run",
    "DIR": "out",
    "DST": "out",
    "FP8MODEL": "fp8",
    "MODEL": "base",
    "OLD": "run",
    "OUT": "out",
    "REFERENCE": "base",
    "RUN": "run",
    "SRC": "run",
    "out": "out",
    "run": "run",
    "Llama": "base",
    "Llama-3.1-8B": "base",
    "Meta-Llama-3-8B": "base",
    "Qwen2.5-7B": "base",
    "Qwen2.5-VL": "base",
    "Qwen/Qwen3-8B-folder": "megatron_base",
    "base": "base",
    "sft-model": "base",
    "checkpoints/DeepSeek-V3": "fp8",
    "checkpoints/PROJECT/RUN": "verl",
    "checkpoints/Qwen2.5-7B": "base",
    "checkpoints/SmolLM2-135M": "base",
    "checkpoints/qwen25-7b": "base",
    "checkpoints/qwen25-vl-7b": "base",
    "SmolLM2-135M": "base",
    "converted": "out",
    "checkpoints/mixtral-8x7b": "mixtral",
    "checkpoints/qwen25-vl-7b-s10-0321-150": "base",
    "critic.pt": "critic",
    "demo-out/run/_actor": "run",
    "demo-out/smollm2": "base",
    "export": "llava",
    "groups.json": "groups",
    "llava-1.5-7b-hf": "llava_base",
    "lora.pt": "adapters",
    "moved": "moved",
    "outputs/checkpoint-500": "dcp",
    "outputs/checkpoint/step-1000": "titan",
    "results/lightrft-7B-ds": "run",
    "results/lightrft-7B-ds/_actor/global_step2": "step",
    "results/lightrft-7B-ds2hf": "chat",
    "results/lightrft-7B-fsdp/_actor/global_step6": "dcp",
    "results/lora/_actor": "lora",
    "results/lora/adapter": "adapter",
    "results/my-run/_actor": "run",
    "results/qlora/checkpoint-10": "qlora",
    "results/run/_actor": "run",
    "results/srm-fsdp/ckpt": "srm",
    "run/_actor": "run",
    "run/_actor/global_step500": "step",
    "run/checkpoint-*": "saves",
    "run/step100": "first",
    "run/step200": "second",
    "smollm2": "chat",
    "smollm2-fp32": "chat_wide",
    "some-export": "out",
}
OF_PAGE: Mapping[str, Mapping[str, str]] = {
    "megatron": {"run": "megatron"},
    "serving": {"out": "chat"},
    "try": {"out": "chat"},
}
# A line that has other files than the page's other lines: what of it is another thing.
OF_LINE: Mapping[str, Mapping[str, str]] = {
    "reshard convert checkpoints/PROJECT/RUN out --base Qwen2.5-7B": {"Qwen2.5-7B": "verl_base"},
    "reshard convert RUN OUT --base FP8MODEL": {"RUN": "trained_on_fp8"},
    "reshard convert run moved --to dcp --optimizer --hyperparameters groups.json": {
        "run": "elastic"
    },
    "reshard try OUT --compare BASE": {"OUT": "chat", "BASE": "chat_wide"},
    "reshard try out --compare Qwen2.5-7B": {"out": "chat", "Qwen2.5-7B": "chat_wide"},
    "reshard doctor out --repair repaired": {"out": "llava"},
}
# A page's commands that are no command lines: a flag in a sentence, or a word to fill in.
PARTS = {
    "reshard convert --to dcp",
    "reshard convert --to dcp --names torchtitan",
    "reshard convert --to megatron",
    "reshard convert --to meta",
    "reshard convert --optimizer",
    "reshard verify --against",
    "reshard help TOPIC",
    "reshard help CODE",
}
#: What cluster/test_ray.py runs, where there is a cluster.
CLUSTER = "--engine ray"
# What models/test_rewards.py runs with these flags on a real run, which takes long to make, and
# what remote/ runs with servers of its own.
ELSEWHERE = ("results/srm/ckpt", "s3://", "hf://", CLUSTER)
# Commands that the page prints with the error that they give, and the error's start.
REFUSED = {
    "reshard convert critic.pt out --base Qwen2.5-VL": "error: the checkpoint does not fit",
    "reshard convert lora.pt out --base Llama": "error: the checkpoint holds LoRA adapters on 2",
}
# Commands whose exit code says what they found.
FINDS = {"diff": {0, 1}, "doctor": {0, 1}}
# The page says that this is the wrong way round; the output of this one is rounded.
EXCHANGED = {"reshard verify RUN --against OUT"}
# The parameters that name what a command writes.
OUTPUTS = {"target", "out", "repair", "html", "output_file", "output_dir", "output"}
# What a command needs that no page prints, for it to end.
ENDS = {"watch": ["--once", "--interval", "0.05"]}


@pytest.fixture(scope="module")
def world(oracle: Oracle, tmp_path_factory: pytest.TempPathFactory) -> World:
    pytest.importorskip("peft")
    return World(oracle, tmp_path_factory.mktemp("world"))


def bare(line: str) -> str:
    """The line without its comment and with single spaces."""
    return shlex.join(shlex.split(line, comments=True))


LINES = [
    (page, line)
    for page, line in CASES
    if bare(line) not in PARTS and not any(mark in line for mark in ELSEWHERE)
]


def inputs(found: click.Command, given: list[str]) -> Iterator[str]:
    """The paths that a command reads."""
    with found.make_context(str(found.name), list(given), resilient_parsing=True) as context:
        for parameter in found.params:
            if parameter.name in OUTPUTS:
                continue
            value = context.params.get(parameter.name or "")
            for path in value if isinstance(value, tuple) else (value,):
                if isinstance(path, Path) or str(path) in NAMED:
                    yield str(path)


@pytest.mark.parametrize(
    ("page", "line"), LINES, ids=[f"{page.stem}: {line}" for page, line in LINES]
)
def test_a_command_of_a_page_ends_well(
    world: World,
    page: Path,
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    found, given = parsed(line)
    if found is None or "--help" in given:
        assert CliRunner().invoke(found or command, given).exit_code == 0
        return
    kinds = {**NAMED, **OF_PAGE.get(page.stem, {}), **OF_LINE.get(bare(line), {})}
    for name in dict.fromkeys(inputs(found, given)):
        assert name in kinds, f"{name}: say in NAMED what it is"
        world.put(kinds[name], Path(re.sub(r"/[^/]*\*$", "", name)))
    if "--then" in given:
        world.put("script", Path("evaluate.py"))
    given = [path for word in given for path in expanded(word)] + ENDS.get(str(found.name), [])
    if (error := REFUSED.get(bare(line))) is not None:
        assert error in page.read_text(encoding="utf-8")
        assert run(found, given) == 1
        assert capsys.readouterr().err.startswith(error)
        return
    if bare(line) in EXCHANGED:
        assert run(found, given) == 1
        assert "To verify the output: reshard verify OUT --against RUN." in capsys.readouterr().err
        return
    done = CliRunner().invoke(found, given, catch_exceptions=False)
    assert done.exit_code in FINDS.get(str(found.name), {0}), done.output


def expanded(word: str) -> list[str]:
    """What a shell makes of a word."""
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]
