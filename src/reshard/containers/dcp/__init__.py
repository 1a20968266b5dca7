"""What a PyTorch distributed checkpoint consists of: metadata, items, chunks.

metadata.py    `.metadata`: what it holds, as types
records.py     its records, field by field
tables.py      its tables, taken apart while they are read
parsing.py     its tables, compared
columns.py     what is kept of them: numbers, and records for who asks
merging.py     one table of those that the ranks wrote
pickling.py    `.metadata`, written without torch
items.py       where the bytes of each chunk lie
zips.py        an item that is a torch.save zip
shards.py      shards of the DCP Hugging Face writer
chunked.py     chunks as entries, each proven to be tiled
"""
