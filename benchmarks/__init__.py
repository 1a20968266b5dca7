"""Time and memory of conversions, against the tools that people use today.

bench.py       the command: makes the inputs, runs the rounds, prints the table, writes the JSON
contenders.py  who runs, as data: a name and a command line for each input
peers.py       the tools that reshard is measured against, each its own process
inputs.py      the checkpoints, made once: by the real DeepSpeed, and large ones laid out alike
train.py       one rank of the DeepSpeed run that writes them
dcp_inputs.py  the FSDP checkpoints, and the Hugging Face folders that are converted for FSDP
dcp_train.py   one rank of the FSDP run that writes them
fp8_inputs.py  quantised models
measure.py     one process: wall time and peak resident memory
"""
