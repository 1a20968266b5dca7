"""Time and memory of conversions, against the tools that people use today.

bench.py       the command: makes the inputs, runs the rounds, keeps the results as JSON
contenders.py  what is measured, as data: directions, and who takes part in each
peers.py       the tools that reshard is measured against, each its own process
inputs.py      the checkpoints: laid out as their frameworks save them, or trained
shapes.py      the models: Qwen2's tensors in any size
train.py       one rank of the DeepSpeed run that writes training state
dcp_train.py   one rank of the FSDP run that writes training state
dcp_ranks.py   one rank that saves weights as FSDP2 shards them
schedule.py    how many rounds fit into a budget
measure.py     one process: time, memory, bytes and system calls
start.py       what commands take on a tiny model
results.py     the results
page.py        docs/performance.md and README's table, from the results
charts.py      their charts
notes.md       what was tried, which the page includes
giants.py      checkpoints of a trillion parameters
giants_measure.py    what they take, in giants.md
many.py        checkpoints of very many small tensors
"""
