"""The pipeline that converts a checkpoint, in its order.

declared.py      the options, each declared once
options.py       the options of one conversion, parsed
base_model.py    the model that training started from
assets.py        its files that are copied; modules.py: modules in its sub-folders
quantised.py     a base or a checkpoint as the numbers that its codes represent
adapters.py      the adapters' config, and the values that must be checked
fitted.py        a checkpoint split into its parts, its names fitted onto the base's
side_files.py    the files beside the model
output_model.py  names and dtypes of all that will be written
other_names.py   Megatron's and torchtitan's names turned into the hub's
trainer_names.py the hub's names turned into those of Megatron, torchtitan and Meta
memory_names.py  the names of a loaded model, for `--names memory`
released.py      the layout of releases, for `--names hub`, and how the output differs from them
dtypes.py        the dtype of each output tensor
training.py      the training state, under the output's names
hyperparameters.py  the hyperparameters that the user states
partners.py      head, embedding and vocabulary of the plan agree
idle.py          options that have no effect on this conversion
destination.py   whether an output may be written to its path
other_errors.py  further faults of the inputs, after an error
planning.py      read, fit, lay out: everything before a byte is written
writing.py       how a plan is carried out
execute.py       transfer, manifest, verify, commit
state_values.py  the values of an optimizer's moments, after all have passed
manifest.py      `reshard.json`
verification.py  a written folder read again, compared with its `reshard.json`
report.py        what a conversion did
convert.py       `reshard.convert`
"""
