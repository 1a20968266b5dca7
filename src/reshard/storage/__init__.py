"""Opening files and listing folders: every byte of a checkpoint comes through here.

paths.py       what lies under a path, links, listings: no other room asks the system
local.py       files of this machine: pread, identity checks, links of the hub cache
texts.py       reports and pages, written whole
frames.py      streams compressed by torch's ZStandard extension
strict_json.py JSON of every kind, within a budget
"""
