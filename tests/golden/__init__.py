"""Checkpoints that DeepSpeed and torch wrote once, kept with the digests of what they hold.

NAME/checkpoint/    as written; DeepSpeed's own scripts beside it are left out
NAME/digests.json   of each tensor, taken from the running ranks' truth, without reshard;
                    and of each file that reshard made of it when the checkpoint was added

The oracles train anew and compare with a truth that is made anew: a change of reshard that alters
its output for the same input shows here, and so does one that stops reading what it once read.
"""
