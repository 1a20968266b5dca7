"""Pure data and geometry, no I/O.

dtypes.py      element types: their names in each format, their sizes, their numpy types
tensors.py     a tensor as boxes of elements in byte ranges of files; what is made by arithmetic
records.py     checksums that files state, as columns
strides.py     arrays in row-major order
fragments.py   questions about fragments
partition.py   what is cut out of flat tensors, described by numbers
tiling.py      the proof that parts hold every element exactly once
rearrange.py   boxes onto boxes: split, fuse, transpose, take rows
arrangement.py how a tensor is made of others, as a value
arithmetic.py  tensors that are computed: a LoRA update, and scaled.py: codes times scales
catalog.py     a checkpoint as a table of tensors
state.py       training state as entries; summary.py: in a few lines
hyperparameters.py  the settings of torch's optimizers
plan.py        what will be written, and where each tensor's bytes go
packed.py      a large file whose bytes are known, compressed
digests.py     a tensor's digest, as a tree
findings.py    what a user should know, by code. **A table to extend**
options.py     what an option of a command is
locations.py   where something lies: a path or a URL
sizes.py       sizes and durations in words
regex.py       regular expressions, compiled on first use
notebook.py    tables and a bar in a notebook
"""
