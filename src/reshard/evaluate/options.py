"""The options of one run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen; None leaves a value to transformers' own default.

    Without `do_sample` decoding is greedy, whatever the model's own generation config says, so
    that two runs give the same answer.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """One run of `reshard try`; the fields are the options of the command line.

    `dtype` is one of `DTYPES`. `prompts` may be empty: then the first of the shipped prompts are
    used. `images` and `audio` are sent with every prompt.
    """

    model: Path
    prompts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    audio: tuple[Path, ...] = ()
    device: str = "cuda"
    dtype: str = "auto"
    chat: bool = True
    max_new_tokens: int = 256
    sampling: Sampling = Sampling()
    seed: int = 0
    benchmark: bool = False
    benchmark_samples: int = 5
    batch_sizes: tuple[int, ...] = (1,)
    compare: Path | None = None
    text: Path | None = None
    output_file: Path = Path("test_results.json")
    html: Path | None = None
    trust_remote_code: bool = False
