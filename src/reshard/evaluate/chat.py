"""A conversation with a model: each answer as it is written, with all turns before it."""

from __future__ import annotations

from collections.abc import Callable

from reshard.errors import UnsupportedError
from reshard.evaluate.device import place, set_seed
from reshard.evaluate.encoding import load_encoder
from reshard.evaluate.folder import read_folder
from reshard.evaluate.generation import OnToken, generate, settings
from reshard.evaluate.loading import load_model, load_tokenizer
from reshard.evaluate.options import Options
from reshard.evaluate.streaming import Spoken
from reshard.storage.paths import file_size

#: The line that starts a new conversation.
AGAIN = "/new"


def converse(options: Options, read: Callable[[], str | None], say: Callable[[str], None]) -> int:
    """Answer each text that `read` returns, until it returns None. Returns the number of answers.

    `say` gets the pieces of each answer; the last one ends with a line break.

    Raises `UnsupportedError` for a model that does not generate or has no chat template, and what
    loading raises.
    """
    folder = read_folder(options.model)
    if not folder.kind.generates:
        raise UnsupportedError(
            f"a {folder.kind.value} gives scores, not answers.",
            path=folder.path,
            hint="Leave out --chat: reshard try then scores the prompts.",
        )
    remote = options.trust_remote_code
    tokenizer = load_tokenizer(folder.path, remote_code=remote)
    encoder = load_encoder(folder, tokenizer, chat=True, remote_code=remote)
    if not encoder.has_template:
        raise UnsupportedError(
            "the tokenizer has no chat template.",
            path=folder.path,
            hint="Copy chat_template.jinja from the base model, or leave out --chat.",
        )
    placement = place(options.device, sum(file_size(path) for path in folder.weights))
    loaded = load_model(folder, placement, dtype=options.dtype, remote_code=remote)
    arguments = settings(options.sampling, options.max_new_tokens, tokenizer, loaded.core)
    set_seed(options.seed)
    turns: list[tuple[str, str]] = []
    answers = 0
    while (line := read()) is not None:
        if line.strip() == AGAIN:
            turns = []
            continue
        turns.append(("user", line))
        inputs = encoder.encode([encoder.render_turns(turns)])
        spoken = Spoken(tokenizer)
        made = generate(loaded, inputs, arguments, on_token=_telling(spoken, say))
        say(f"{spoken.rest()}\n")
        turns.append(("assistant", tokenizer.decode(made.rows[0], skip_special_tokens=True)))
        answers += 1
    return answers


def _telling(spoken: Spoken, say: Callable[[str], None]) -> OnToken:
    """A callback that takes the tokens of an answer and passes on their text."""

    def heard(count: int, new: list[int]) -> None:
        if text := spoken.add(new):
            say(text)

    return heard
