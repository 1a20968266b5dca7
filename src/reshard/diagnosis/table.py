"""The checks of a model folder, by code, in the order in which they run. **Extend this table.**

A check is a line here and a function beside the others; what its code means is a line in
`core/findings.py`, and `docs/doctor.md` says how it is seen and repaired.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from reshard.diagnosis.case import Case
from reshard.diagnosis.checks import architecture, files, names, quantised, values, vocabulary
from reshard.diagnosis.signs import Signs

CHECKS: Mapping[str, Callable[[Case], Signs | None]] = {
    "damaged-file": files.damaged,
    "index-mismatch": files.index,
    "pickled-weights": files.pickled,
    "config-missing": files.config,
    "fsdp-class": files.fsdp_class,
    "codes-unreadable": quantised.codes_unreadable,
    "scales-left-over": quantised.scales_left_over,
    "quantisation-contradicts-config": quantised.contradicts_config,
    "codes-unread": quantised.unread,
    "zero3-placeholders": names.placeholders,
    "wrapper-prefix": names.wrapper_prefix,
    "in-memory-names": names.memory_names,
    "transposed-experts": names.transposed_experts,
    "names-do-not-fit": names.misfit,
    "tensors-missing": architecture.tensors_missing,
    "part-missing": architecture.part_missing,
    "layer-count": architecture.layer_count,
    "names-unknown": architecture.names_unknown,
    "stray-head": architecture.stray_head,
    "shapes-differ": architecture.shapes_differ,
    "backbone-names": architecture.backbone_names,
    "head-stored-twice": vocabulary.head_stored_twice,
    "head-missing": vocabulary.head_missing,
    "head-contradicts-config": vocabulary.head_contradicts_config,
    "vocabulary-size": vocabulary.vocabulary_size,
    "tokenizer-too-large": vocabulary.tokenizer_size,
    "config-fields-missing": architecture.config_fields,
    "dtype-contradicts-config": vocabulary.dtype,
    "tokenizer-missing": files.tokenizer,
    "processor-missing": files.processor,
    "chat-template-missing": files.chat_template,
    "generation-config-missing": files.generation_config,
    "code-missing": files.code,
    "weights-not-finite": values.not_finite,
    "identical-to-base": values.identical,
}
