"""Comparison of two checkpoints: `reshard.verify` against a source, and `reshard.diff`.

compare.py     the functions of the API; their options: declared.py
pairing.py     which tensor is compared with which
values.py      the tensors of a pairing, compared in a stream
states.py      the training state of two checkpoints
steps.py       several checkpoints of a run, each compared with the one before
measures.py    how much two tensors differ
spectrum.py    the rank of a change
sums.py        changes by layer and by module
result.py      what was found
"""
