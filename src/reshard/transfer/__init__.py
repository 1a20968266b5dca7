"""Move bytes: the engine, the checks of the bytes that pass, and the output.

pieces.py      cut the output into pieces, each made, hashed and verified separately
executor.py    what makes the pieces: threads of this process, or `cluster/`
assembly.py    the output while it is written: its pieces and their results
outcome.py     what a transfer did: digests, counts, findings
engine.py      a few threads that make the pieces
making.py      make a segment of a piece, block by block; `fill` reads and casts a block
checksums.py   the source files' own checksums, compared as the bytes pass
finite.py      NaN and infinity in a block; `changes` compares a block with the base's
reading.py     a tensor as a stream of blocks; `passes` over all weights; `readback` of the output
writeback.py   written bytes synced to the disk in the background; `system`: calls of the system
signals.py     signals that wait while an operation is half done
memory.py      how much memory a transfer takes
targets.py     where an output will be: on this machine or in a store
output.py      what either of them offers to those who write it
commit.py      a folder of this machine: `lock`, `leftovers`, `seals`, `resuming`
remote.py      a folder of a store: `claims`, `sending`, `upload`, `notes`, `takeover`
journal.py     which pieces are finished, for a run that resumes this one
cluster/       the workers of a Ray cluster
"""
