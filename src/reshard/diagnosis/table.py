"""The ailments, in the order in which they are looked for. **This is the table to extend.**

An ailment is a line here, a check beside the others, and a line in `docs/doctor.md`.
"""

from __future__ import annotations

from reshard.diagnosis.checks import files, names, values, vocabulary
from reshard.diagnosis.findings import Ailment

AILMENTS = (
    Ailment("damaged-file", "error",
            "a weight file is cut off or breaks its format's rules", files.damaged),
    Ailment("index-mismatch", "error",
            "the index does not match the files", files.index),
    Ailment("pickled-weights", "warning",
            "the weights are in torch.save files", files.pickled),
    Ailment("config-missing", "error",
            "config.json is missing or cannot be read", files.config),
    Ailment("fsdp-class", "error",
            "the config names a class as FSDP calls it, which transformers has none of",
            files.fsdp_class),
    Ailment("zero3-placeholders", "error",
            "ZeRO-3 left placeholders where the weights should be", names.placeholders),
    Ailment("wrapper-prefix", "error",
            "names carry a wrapper's or trainer's prefix", names.wrapper_prefix),
    Ailment("in-memory-names", "error",
            "names are those of a live module, not those of the files", names.memory_names),
    Ailment("transposed-experts", "error",
            "stacked experts are transposed", names.transposed_experts),
    Ailment("names-do-not-fit", "error",
            "tensors are missing, left over or of another shape", names.misfit),
    Ailment("head-stored-twice", "warning",
            "the output head is stored although it is the embedding", vocabulary.head_stored_twice),
    Ailment("head-missing", "error",
            "the output head is missing", vocabulary.head_missing),
    Ailment("head-contradicts-config", "error",
            "the config ties a head that is not the embedding", vocabulary.head_contradicts_config),
    Ailment("vocabulary-size", "error",
            "the vocabulary's size is not the config's", vocabulary.vocabulary_size),
    Ailment("tokenizer-too-large", "warning",
            "the tokenizer has more tokens than the embedding", vocabulary.tokenizer_size),
    Ailment("dtype-contradicts-config", "warning",
            "the weights' dtype is not the config's", vocabulary.dtype),
    Ailment("tokenizer-missing", "error",
            "the tokenizer is missing", files.tokenizer),
    Ailment("processor-missing", "error",
            "the image or audio processor is missing", files.processor),
    Ailment("chat-template-missing", "warning",
            "the chat template is missing", files.chat_template),
    Ailment("generation-config-missing", "warning",
            "generation_config.json is missing", files.generation_config),
    Ailment("code-missing", "error",
            "code that the config names is missing", files.code),
    Ailment("not-finite", "error",
            "weights are NaN or infinite", values.not_finite),
    Ailment("identical-to-base", "error",
            "the weights are the base's: nothing was trained", values.identical),
)  # fmt: skip
