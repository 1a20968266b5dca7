"""Tensors that a model holds under several names. **A table to extend**; see `docs/names.md`.

Read from `_tied_weights_keys` of transformers 4.57 and 5.23. Files keep one of the names, loaded
models have them all. Names are the hub's.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from itertools import product

Pair = tuple[str, str]

# Encoders whose classes name the part below the head after the model.
_BERTS = (
    "bert", "big_bird", "convbert", "data2vec_text", "deberta", "ernie", "esm", "fnet", "ibert",
    "layoutlm", "longformer", "megatron_bert", "mobilebert", "mpnet", "mra", "nystromformer",
    "roberta", "roberta_prelayernorm", "roc_bert", "roformer", "tapas", "visual_bert", "xmod",
    "yoso", "lxmert", "nezha",
)  # fmt: skip
_BERT_HEADS = ("cls.predictions.decoder.weight", "lm_head.decoder.weight")


def _inside(prefixes: Iterable[str], pairs: Iterable[Pair]) -> tuple[Pair, ...]:
    """The pairs of a model, and of the same model inside another one."""
    within = product(prefixes, tuple(pairs))
    return tuple((prefix + name, prefix + original) for prefix, (name, original) in within)


#: (output head, the input embedding it may be tied to): `tie_word_embeddings` says whether it is.
#: Classes that generate have it, and it has no tensor but its weight.
HEADS: tuple[Pair, ...] = (
    ("lm_head.weight", "model.embed_tokens.weight"),
    ("lm_head.weight", "model.language_model.embed_tokens.weight"),
    ("language_model.lm_head.weight", "language_model.model.embed_tokens.weight"),
    ("lm_head.weight", "model.text_model.embed_tokens.weight"),
    ("text_model.lm_head.weight", "text_model.model.embed_tokens.weight"),
    ("lm_head.weight", "model.embed_tokens.embed_tokens.weight"),
    ("lm_head.weight", "backbone.embeddings.weight"),
    ("lm_head.weight", "model.language_model.shared.weight"),
    ("lm_head.weight", "led.shared.weight"),
    ("lm_head.weight", "prophetnet.word_embeddings.weight"),
    ("lm_head.weight", "transformer.tokens_embed.weight"),
    ("lm_head.weight", "transformer.w.weight"),
    ("embed_out.weight", "gpt_neox.embed_in.weight"),
    ("embed_out.weight", "gpt_neox_japanese.embed_in.weight"),
    ("output_projection.weight", "biogpt.embed_tokens.weight"),
    ("head.weight", "rwkv.embeddings.weight"),
    ("text_decoder_postnet.lm_head.weight", "speecht5.decoder.prenet.embed_tokens.weight"),
    *_inside(
        ("", "language_model.", "decoder."),
        (
            ("lm_head.weight", "model.shared.weight"),
            ("lm_head.weight", "shared.weight"),
            ("lm_head.weight", "model.decoder.embed_tokens.weight"),
            ("lm_head.weight", "transformer.wte.weight"),
            ("lm_head.weight", "transformer.word_embeddings.weight"),
        ),
    ),
    ("proj_out.weight", "model.decoder.embed_tokens.weight"),
    ("output_projection.weight", "model.decoder.embed_tokens.weight"),
    ("lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"),
)

#: Heads that share their embedding with another type's: model type -> the head it has.
HEAD_OF = {
    "whisper": "proj_out.weight",
    "moonshine": "proj_out.weight",
    "moonshine_streaming": "proj_out.weight",
    "canary": "proj_out.weight",
    "cohere_asr": "proj_out.weight",
    "trocr": "output_projection.weight",
    "t5gemma": "lm_head.out_proj.weight",
}

_HEAD = "lm_head.weight"
_AMBIGUOUS = "model.decoder.embed_tokens.weight"

#: The same for heads with more than a weight, a bias or a layer before it: a model with these has
#: the head.
PREDICTIONS: tuple[Pair, ...] = (
    ("lm_head.weight", "funnel.embeddings.word_embeddings.weight"),
    ("generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
    ("generator_lm_head.weight", "convbert.embeddings.word_embeddings.weight"),
    ("vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
    ("predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
    ("pred_layer.proj.weight", "transformer.embeddings.weight"),
    ("decoder.weight", "model.embeddings.tok_embeddings.weight"),
    ("output.weight", "git.embeddings.word_embeddings.weight"),
    ("cls.predictions.decoder.weight", "transformer.embeddings.word_embeddings.weight"),
    ("lm_loss.weight", "transformer.word_embedding.weight"),
    *_inside(
        ("", "decoder.", "text_decoder."),
        ((head, f"{name}.embeddings.word_embeddings.weight") for head in _BERT_HEADS
         for name in _BERTS),
    ),
)  # fmt: skip

#: (name, the tensor that it is in every model of its class).
COPIES: tuple[Pair, ...] = (
    *_inside(
        ("", "model.", "led.", "language_model.", "language_model.model.",
         "model.language_model.", "decoder.", "transformer."),
        (
            ("encoder.embed_tokens.weight", "shared.weight"),
            ("decoder.embed_tokens.weight", "shared.weight"),
        ),
    ),
    *_inside(
        ("", "prophetnet."),
        (
            ("encoder.word_embeddings.weight", "word_embeddings.weight"),
            ("decoder.word_embeddings.weight", "word_embeddings.weight"),
        ),
    ),
    ("text_encoder.embed_tokens.weight", "shared.weight"),
    ("text_decoder.embed_tokens.weight", "shared.weight"),
    *_inside(
        ("", "decoder.", "text_decoder."),
        (
            ("cls.predictions.decoder.bias", "cls.predictions.bias"),
            ("lm_head.decoder.bias", "lm_head.bias"),
        ),
    ),
    ("predictions.decoder.bias", "predictions.bias"),
)  # fmt: skip

#: The input embeddings that heads may be tied to.
EMBEDDINGS = frozenset(original for _, original in (*HEADS, *PREDICTIONS))
_HEAD_NAMES = frozenset(head for head, _ in (*HEADS, *PREDICTIONS))


def _gather(pairs: Iterable[Pair]) -> dict[str, tuple[str, ...]]:
    """Name -> what stands beside it in the pairs, in order."""
    found: dict[str, list[str]] = {}
    for name, other in pairs:
        found.setdefault(name, []).append(other)
    return {name: tuple(others) for name, others in found.items()}


# Copies first: they are one tensor for certain.
_ALL = (*COPIES, *HEADS, *PREDICTIONS)
_ORIGINALS = _gather(_ALL)
_PARTNERS = _gather(pair for name, original in _ALL
                 for pair in ((name, original), (original, name)))  # fmt: skip


def embeddings_in(part: str) -> tuple[str, ...]:
    """The embeddings of the causal models and encoders that call their backbone `part`.

    Seq2seq models are left out: they have parts of their own at the top.
    """
    if part == "model":
        return ("model.embed_tokens.weight",)
    return tuple(
        name for name in EMBEDDINGS if name.startswith(f"{part}.") and "shared" not in name
    )


def is_known(name: str) -> bool:
    """Whether some class ties a tensor of this name."""
    return name in _PARTNERS


def is_head(name: str) -> bool:
    """Whether it is the name of an output head that may be tied."""
    return name in _HEAD_NAMES


def embedding_of(head: str, names: Container[str]) -> str | None:
    """The input embedding among `names` that a head may be tied to, or None."""
    return original_of(head, names) if is_head(head) else None


def original_of(name: str, names: Container[str]) -> str | None:
    """The tensor among `names` that `name` is or may be another name of, or None."""
    return next((found for found in _ORIGINALS.get(name, ()) if found in names), None)


def tied_partner(name: str, names: Container[str]) -> str | None:
    """Another name among `names` that one tensor may have: its original, a copy, or another copy
    of its original."""
    near = _PARTNERS.get(name)
    if near is None:
        return None
    found = next((partner for partner in near if partner in names), None)
    if found is None and not is_head(name):
        far = (partner for original in _ORIGINALS.get(name, ()) for partner in _PARTNERS[original])
        found = next((partner for partner in far if partner != name and partner in names), None)
    return found


def may_be_tied(one: str, other: str) -> bool:
    """Whether two names are those of parameters that some class ties."""
    return original_of(one, (other,)) is not None or original_of(other, (one,)) is not None


def are_one(one: str, other: str, *, tied: bool) -> bool:
    """Whether two tensors that the base stores are one by their class, or by the config if `tied`.

    Two copies of what the base does not store need not be: a translator may have a vocabulary on
    either side.
    """
    return may_be_tied(one, other) and (tied or not (is_head(one) or is_head(other)))


def is_vocabulary(name: str, names: Container[str]) -> bool:
    """Whether a tensor's rows are the vocabulary: an embedding, or a head beside its embedding."""
    if name not in _PARTNERS:
        return False
    return not is_head(name) or original_of(name, names) is not None


def missing_heads(names: Container[str], model_type: object) -> dict[str, str]:
    """Head -> embedding of those that `names` lack, of a class that generates."""
    own = HEAD_OF.get(str(model_type), _HEAD)
    return {
        head: embedding
        for head, embedding in HEADS
        if embedding in names and head not in names and (embedding != _AMBIGUOUS or head == own)
    }


def missing_parts(names: Container[str], modules: Container[str]) -> dict[str, str]:
    """Name -> original of the predictions and copies that `names` lack, where the module which they
    are a part of has other tensors."""
    found: dict[str, str] = {}
    for name, original in (*PREDICTIONS, *COPIES):
        module, _, leaf = name.rpartition(".")
        parent = module.rpartition(".")[0]
        if leaf == "bias":  # of a matrix that is stored, or was found above
            there = f"{module}.weight" in found or f"{module}.weight" in names
        else:
            there = module in modules or (parent != "" and parent in modules)
        if there and original in names and name not in names:
            found[name] = original
    return found
