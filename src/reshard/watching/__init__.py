"""A training run followed: each save is converted once it is complete.

watch.py       the loop
saves.py       which saves a run has, and whether they are complete
record.py      the state in a file, which a restart goes on from
command.py     what is run after each conversion
declared.py    the options
"""
