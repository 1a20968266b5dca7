"""The doctor: findings about an exported model, by code, with evidence and repair.

folder.py      a model folder as it is, however broken
case.py        all that the checks look at: the folder, the base, the fit, facts about values
checks/        the checks, pure functions of a case
table.py       the checks by code. **This is the table to extend**; see `docs/doctor.md`
signs.py       what a check sees, as a finding with its repair
engines.py     facts about inference engines. **Tables to extend**
adapters.py    whether an engine loads an adapter folder
quantisation.py  what the weights are made of: numbers, or codes with scales
tokens.py      the number of token ids of a tokenizer
training.py    a training checkpoint: its files, names and values, without a config
repair.py      a new folder in which what was found is repaired
diagnosis.py   `reshard.doctor`; its options: declared.py
"""
