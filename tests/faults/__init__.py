"""Faults: kills at every system call, calls that fail, races; what stands afterwards, each time.

library.py     compiles fault.c, a library to be preloaded
trials.py      the process in which runs are forked, each with its fault; prints what happened
test_*.py      the short suite, and the long one (`slow`)
table.py       the outcomes in words, for docs/reliability.md
"""
