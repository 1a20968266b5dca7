"""What the demo teaches, and what it asks before and after."""

from __future__ import annotations

from dataclasses import dataclass

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
