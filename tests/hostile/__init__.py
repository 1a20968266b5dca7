"""Hostile and huge input: whatever a file holds, a command stays in the budget of `tests.budget`.

bench.py       a process in which commands are forked, their cost measured
places.py      sound checkpoints, and every file name that a command asks for in them
forms.py       what is put in a file's place: bombs, pipes, loops of links, and so on
inputs.py      huge and odd inputs that need more than one replaced file
test_*.py      the short suite, and the whole (`slow`)
"""
