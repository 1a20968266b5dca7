"""The command line: texts and exit codes. The library does all work.

app.py         the `reshard` command, exit codes, errors in words
commands.py    convert, inspect, verify
diff.py        diff
doctor.py      doctor
watch.py       watch
try_.py        try
help.py        help, and the topics that it knows (topics.py)
flags.py       kinds of options
output.py      tables, messages, JSON
progress.py    a bar, or lines in a log
next_steps.py  what to do with the folder that a conversion wrote
interrupts.py  the message when a run is interrupted
completion.py  the shell's completion of tags
version.py     what --version says
start.py       the start of every console command
lightrft/      LightRFT's four scripts
"""
