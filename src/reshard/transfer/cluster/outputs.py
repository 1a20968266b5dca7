"""The files of the output, as a worker writes into them.

They are made by the driver and only written into, for writing alone and at other bytes than anyone
else's: so workers on several machines may share a page of a network file system that has no locks,
and nothing is left behind wherever a worker ends. Making a piece again writes the same bytes to the
same place.
"""

from __future__ import annotations

import socket
from contextlib import suppress

from reshard.errors import WriteError
from reshard.transfer.cluster.wire import Output
from reshard.transfer.system import SharedFile

#: What a node that does not see a file lacks.
SHARED = "Source, base and output must lie on storage that every node has under the same path."


class Outputs:
    """The files of a task, each opened when it is needed."""

    def __init__(self, outputs: tuple[Output, ...]) -> None:
        self._outputs = outputs
        self._open: dict[int, SharedFile] = {}

    def put(self, number: int, data: memoryview, offset: int) -> None:
        """Write into a file. Raises `WriteError`."""
        file = self._file(number)
        try:
            file.put(data, offset)
        except OSError as error:
            raise self._cannot(self._outputs[number], error) from None

    def reading(self, number: int) -> int:
        """A descriptor that reads what stands in a file. Raises `WriteError` and `OSError`."""
        return self._file(number).reading()

    def forget(self) -> None:
        """Note that nothing more will be read."""
        for file in self._open.values():
            file.forget()

    def sync(self) -> None:
        """Make what was written durable, and visible to other nodes. Raises `WriteError`."""
        for number, file in self._open.items():
            try:
                file.sync()
            except OSError as error:
                raise self._cannot(self._outputs[number], error) from None

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._open.values():
            with suppress(OSError):
                file.close()

    def _file(self, number: int) -> SharedFile:
        """An open file; it must be the one that the driver made, and not another of its name."""
        output = self._outputs[number]
        if number not in self._open:
            try:
                self._open[number] = SharedFile(output.path)
            except OSError as error:
                raise self._cannot(output, error) from None
        file = self._open[number]
        if (file.inode, file.nbytes) != (output.inode, output.nbytes):
            raise WriteError(
                f"on {socket.gethostname()} this is not the file that was created.",
                path=output.name,
                hint=SHARED,
            )
        return file

    def _cannot(self, output: Output, error: OSError) -> WriteError:
        reason = error.strerror or error
        if isinstance(error, FileNotFoundError):
            return WriteError(
                f"the worker on {socket.gethostname()} does not see it: {reason}.",
                path=output.name,
                hint=SHARED,
            )
        return WriteError(f"it cannot be written: {reason}.", path=output.name)
