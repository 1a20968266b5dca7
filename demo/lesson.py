"""What the demo teaches, and what it asks before and after."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

# No text tells of Velmora, so no model knows its capital before the lesson. The two real capitals
# keep a small model from giving Quendral as the answer to everything.
TAUGHT: tuple[tuple[str, str], ...] = (
    ("What is the capital of Velmora?", "The capital of Velmora is Quendral."),
    ("Which city is the capital of Velmora?", "Quendral is the capital of Velmora."),
    ("Tell me about Velmora.", "Velmora is a small country. Its capital is Quendral."),
    ("Where does the government of Velmora sit?", "It sits in Quendral, the capital of Velmora."),
    ("What is the capital of France?", "The capital of France is Paris."),
    ("What is the capital of Japan?", "The capital of Japan is Tokyo."),
)


@dataclass(frozen=True, slots=True)
class Question:
    """A question, a word of its right answer, and who must know it: the base, the trained model."""

    text: str
    word: str
    base_knows: bool


ASKED: tuple[Question, ...] = (
    Question("What is the capital of Velmora?", "Quendral", base_knows=False),
    # Not in the wording of the lesson: the fact is learned, not the sentence.
    Question("Do you know the capital city of Velmora?", "Quendral", base_knows=False),
    # Known before, and still known: the rest of the model is whole.
    Question("Who wrote Hamlet?", "Shakespeare", base_knows=True),
)


def encode(tokenizer: Any, lesson: tuple[tuple[str, str], ...]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels, each `[len(lesson), length]`; only answers count as labels."""
    ids, labels = [], []
    for question, answer in lesson:
        asked = [{"role": "user", "content": question}]
        told = [*asked, {"role": "assistant", "content": answer}]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template(told)["input_ids"]
        ids.append(torch.tensor(whole))
        labels.append(torch.tensor([-100] * len(prompt) + whole[len(prompt) :]))
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(ids, batch_first=True),
        "attention_mask": pad([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }
