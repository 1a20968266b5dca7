"""What a PyTorch distributed checkpoint consists of: metadata, items, chunks.

metadata.py    `.metadata`, parsed into types
pickling.py    `.metadata`, written without torch
items.py       where the bytes of each chunk lie
zips.py        an item that is a torch.save zip
shards.py      shards of the DCP Hugging Face writer
chunked.py     chunks as entries, each proven to be tiled
"""
