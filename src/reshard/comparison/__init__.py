"""Two checkpoints compared: `reshard.verify` against a source, and `reshard.diff`.

compare.py     the functions of the API
pairing.py     which tensor is compared with which
values.py      by how much two tensors differ
"""
