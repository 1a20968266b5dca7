"""A quantised folder is run as what it is, and answers as its numbers do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import reshard
from reshard.evaluate.terminal import summary
from tests.evaluate import tiny
from tests.evaluate.trying import attempt
from tests.quantised import makers

MAKERS: dict[str, Callable[[Path, int], Path]] = {
    "fp8": lambda folder, rows: makers.blocks(folder, makers.llama(vocab_size=rows)),
    "compressed-tensors": lambda folder, rows: makers.compressed(
        folder, makers.llama(vocab_size=rows), "tensor"
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_quantised_folder_answers_as_its_numbers(kind: str, tmp_path: Path) -> None:
    words = tiny.tokenizer()
    folder = MAKERS[kind](tmp_path / "codes", len(words))
    words.save_pretrained(folder)
    reshard.convert(folder, tmp_path / "numbers")
    codes = attempt(folder, tmp_path, max_new_tokens=3)
    numbers = attempt(tmp_path / "numbers", tmp_path, max_new_tokens=3)
    assert codes.status == numbers.status == "passed", codes.failures
    assert codes.model is not None
    assert numbers.model is not None
    assert kind.split("-")[0] in str(codes.model.quantisation).lower()
    assert numbers.model.quantisation is None
    assert f", stored as {codes.model.quantisation}, on cpu" in "\n".join(summary(codes))
    said = [answer.token_ids[0] for answer in codes.answers]
    assert said == [answer.token_ids[0] for answer in numbers.answers]
