"""What can be wrong with an exported model: each ailment found by name, with evidence and its mend.

folder.py      a model folder as it is, however broken
case.py        all that the checks look at: the folder, the base, the fit, facts about values
files.py, names.py, vocabulary.py, values.py      the checks, pure functions of a case
table.py       the ailments. **This is the table to extend**; see `docs/doctor.md`
repair.py      a new folder in which what was found is mended
diagnosis.py   `reshard.doctor`
"""
