"""Two checkpoints compared: `reshard.verify` against a source, and `reshard.diff`.

compare.py     the functions of the API
pairing.py     which tensor is compared with which
values.py      the tensors of a pairing, compared in a stream
measures.py    how far two tensors are apart
spectrum.py    of which rank a change is
sums.py        changes by layer and by module
result.py      what was found
"""
