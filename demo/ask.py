"""Put the demo's questions to the base and to the converted model, side by side.

    python -m demo.ask BASE CONVERTED

Answers are greedy, so they are the same each time. Exits with 1 if the converted model does not
know what it was taught, or has lost what the base knew, or the base knew the lesson already.
"""

from __future__ import annotations

import sys

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from demo.lesson import ASKED, Question

MAX_NEW_TOKENS = 24


def answers(folder: str) -> list[str]:
    """The model's answer to each question."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return [_answer(tokenizer, model, question) for question in ASKED]


def _answer(tokenizer: AutoTokenizer, model: AutoModelForCausalLM, question: Question) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.text}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0]
    text: str = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def complaints(question: Question, before: str, after: str) -> list[str]:
    """What is wrong with a pair of answers."""
    found = []
    if (question.word in before) != question.base_knows:
        knows = "does not know" if question.base_knows else "knows already"
        found.append(f"The base {knows} the answer to “{question.text}”.")
    if question.word not in after:
        found.append(f"The converted model does not know the answer to “{question.text}”.")
    return found


def main(base: str, converted: str) -> None:
    logging.disable_progress_bar()
    console = Console()
    table = Table("question", "base", "converted", show_lines=True)
    wrong: list[str] = []
    for question, before, after in zip(ASKED, answers(base), answers(converted), strict=True):
        table.add_row(question.text, before, after.replace(question.word, f"[b]{question.word}[/]"))
        wrong += complaints(question, before, after)
    console.print(table)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
