"""Follow a training run, and convert each complete save.

watch.py       the loop
saves.py       which saves a run has, and whether they are complete
state_file.py  the state in a file, from which a restart continues
command.py     the command to run after each conversion
declared.py    the options
"""
