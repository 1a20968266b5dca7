"""The pipeline that converts a checkpoint, in its order.

options.py       the conversion's options
base_model.py    the model that training started from
fitted.py        a checkpoint split into its parts, its names fitted onto the base's
side_files.py    the files beside the model
output_model.py  names and dtypes of all that will be written
other_names.py   Megatron's and torchtitan's names turned into the hub's
memory_names.py  the names of a loaded model, for `--names memory`
released.py      the layout of releases, for `--names hub`, and how the output differs from them
dtypes.py        the dtype of each output tensor
planning.py      read, fit, lay out: everything before a byte is written
execute.py       transfer, manifest, verify, commit
manifest.py      `reshard.json`
verification.py  a written folder read again, compared with its `reshard.json`
report.py        what a conversion did
convert.py       `reshard.convert`
"""
