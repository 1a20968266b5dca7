"""The oracle: checkpoints that real FSDP processes wrote, each beside the truth gathered from the
ranks."""
