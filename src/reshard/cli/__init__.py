"""The command line: texts and exit codes. The library does all work.

app.py         the `reshard` command, exit codes, errors in words
commands.py    convert, inspect, verify
diff.py        diff
doctor.py      doctor
watch.py       watch
try_.py        try
flags.py       kinds of options
output.py      tables, progress bars, JSON
lightrft/      LightRFT's four scripts
"""
