"""Opening files and listing folders: every byte of a checkpoint comes through here.

paths.py       what lies under a path, links, listings: no other room asks the system
places.py      the same questions, put to the system; `remote` puts them to a store
source.py      an open input: a file, read with pread, or an object, read by ranges
local.py       the inputs of a run: identity checks, frames, links of the hub cache
fingerprints.py  whether a file is still the one that an earlier run read
remote.py      what lies at a URL, kept for a short time
ahead.py       ranges of an object, read before they are needed
stores.py      object stores (S3, Google Cloud, Azure) by obstore, and what they refuse, in words
hub.py         models of the Hugging Face hub
web.py         files of web servers
uploads.py     uploads that killed runs left in a store
credentials.py whose keys, which endpoint: the settings of each store's own tools
requests.py    how much was asked of stores
texts.py       reports and pages, written whole
frames.py      streams compressed by torch's ZStandard extension
strict_json.py JSON of every kind, within a budget
"""
