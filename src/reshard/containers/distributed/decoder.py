"""One rank's file: the distributed tensors in it, decoded."""

from __future__ import annotations

from reshard.containers.distributed import dtensor, sharded
from reshard.containers.distributed import mesh as meshes
from reshard.containers.distributed.local import Local, Place, attributes
from reshard.containers.distributed.mesh import Mesh
from reshard.containers.torch import Opaque
from reshard.errors import FormatError
from reshard.storage.local import Sources

_KINDS = ("DTensor", "ShardedTensor")


def is_distributed(value: object) -> bool:
    """Whether it is a DTensor or ShardedTensor."""
    return (
        isinstance(value, Opaque)
        and value.name.startswith("torch.distributed.")
        and value.short_name in _KINDS
    )


class Decoder:
    """Decodes the distributed tensors of one file, whose name says that `rank` wrote it; None where
    only the tensors state the rank.

    The file's tensors share their meshes, each of which is read once.
    """

    def __init__(self, path: str, rank: int | None, sources: Sources) -> None:
        self._path = path
        self._rank = rank
        self._sources = sources
        self._meshes: dict[Opaque, Mesh] = {}

    def decode(self, name: str, value: Opaque) -> Local:
        """The rank's part of the tensor `name`.

        Raises `FormatError` where the object contradicts itself or another rank wrote it,
        `UnsupportedError` for placements that are not supported.
        """
        place = Place(self._path, name)
        if value.short_name == "DTensor":
            mesh = self._mesh(value, place)
            self._check_rank(mesh.rank)
            return dtensor.decode(value, mesh, place)
        local = sharded.decode(value, place)
        self._check_rank(local.rank)
        return local

    def _check_rank(self, stated: int | None) -> None:
        if self._rank is not None and stated not in (None, self._rank):
            raise FormatError(
                f"its name states rank {self._rank}, but rank {stated} wrote it.",
                path=self._path,
                hint="A rank's file was copied or renamed; copy each rank's own file.",
            )

    def _mesh(self, value: Opaque, place: Place) -> Mesh:
        spec = attributes(attributes(value, place).get("_spec"), place)
        mesh = spec.get("mesh")
        if not isinstance(mesh, Opaque):
            raise place.broken("it has no device mesh.")
        if mesh not in self._meshes:
            self._meshes[mesh] = meshes.parse(mesh, self._rank, self._sources, place)
        return self._meshes[mesh]
