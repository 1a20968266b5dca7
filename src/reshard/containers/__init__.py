"""Files that hold tensors, from any framework.

torch/          torch.save files and pickles, read without torch and without running anything
safetensors.py  the header of a safetensors file, checked strictly
dcp/            the metadata and the items of PyTorch distributed checkpoints
distributed/    DTensor and ShardedTensor: which part of a tensor one rank's file holds
copies.py       whether one rank's file was copied over another's
"""
