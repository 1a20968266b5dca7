"""Pure data and geometry, no I/O.

dtypes.py      element types: their names in each format, their sizes, their numpy types
tensors.py     a tensor as boxes of elements in byte ranges of files; what is made by arithmetic
rearrange.py   boxes onto boxes: split, fuse, transpose, take rows
catalog.py     a checkpoint as a table of tensors
plan.py        what will be written, and where each tensor's bytes go
"""
