"""Tensors that are distributed over ranks, as torch pickles them: which part one rank's file holds.

    dtensor     DTensor: a mesh of ranks, and a placement for each of its dimensions
    sharded     ShardedTensor: the offsets and sizes of every rank's shard
    local       what either of them says of one rank: boxes of the whole tensor, and their bytes

>>> from reshard.containers.distributed import Decoder
>>> with Sources() as sources:                                      # doctest: +SKIP
...     file = torch.read(sources.open("model_world_size_2_rank_1.pt"))
...     local = Decoder(path, 1, sources).decode("lm_head.weight", file.value["lm_head.weight"])
>>> local.fragments[0].box                                              # doctest: +SKIP
Box(shape=(32000, 64), offsets=(16000, 0), sizes=(16000, 64))
"""

from reshard.containers.distributed.decoder import Decoder, is_distributed
from reshard.containers.distributed.local import Local, LocalFragment

__all__ = ["Decoder", "Local", "LocalFragment", "is_distributed"]
