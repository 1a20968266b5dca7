"""Opening files and listing folders: every byte of a checkpoint comes through here.

local.py       files of this machine: pread, identity checks, links of the hub cache
frames.py      streams compressed by torch's ZStandard extension
strict_json.py JSON of every kind, within a budget
"""
