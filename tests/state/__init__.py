"""Training state that travels: runs that change the framework in the middle, and their losses.

jobs     what a run is, in words that travel to another process
model    the tiny model, its batches, parameter groups and schedule
engines  the real frameworks: train, save, load (deepspeed_engine, fsdp_engine, engine_parts)
launch   ranks, forked from one process that has imported everything
"""
