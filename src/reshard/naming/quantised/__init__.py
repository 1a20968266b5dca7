"""Quantised weights: which tensors are codes, which are their scales, and which numbers they
represent.

stated.py      what a config says of its weights' quantisation
refused.py     the kinds whose codes are not read as numbers, by name
numbers.py     codes and scales as one tensor

    kind               codes                        scales                            read
    block fp8          X.weight          float8     X.weight_scale_inv  [R/128, C/128]  yes
    tensor, row fp8    X.weight          float8     X.weight_scale  [], [1], [R, 1]     yes
    MXFP4, gpt-oss     X_blocks  uint8 [E, R, G, 16]  X_scales  uint8 [E, R, G]         yes
    MXFP4, MXFP8       X.weight  int8 or float8     X.weight_scale, X.scale  E8M0       yes
    bitsandbytes, AWQ, GPTQ, int8, packed int4, NVFP4, MLX, ...                         no

Read off transformers 5.23 (integrations/finegrained_fp8.py, mxfp4.py, fbgemm_fp8.py),
compressed-tensors 0.20 and bitsandbytes 0.48.
"""

from __future__ import annotations

from reshard.naming.quantised.numbers import Numbers, numbers, stale_scales
from reshard.naming.quantised.refused import Refused, refused, without_codes
from reshard.naming.quantised.stated import Statement, statement

__all__ = [
    "Numbers",
    "Refused",
    "Statement",
    "numbers",
    "refused",
    "stale_scales",
    "statement",
    "without_codes",
]
