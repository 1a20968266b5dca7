"""For those who add a format: what every reader and every writer must do, as tests to inherit.

`ReaderConformance` and `WriterConformance` are classes of pytest tests. A subclass says how a
checkpoint is made, or loaded, *without* reshard; everything else is inherited:

    class TestMine(ReaderConformance):
        format = "mine"

        def make(self, folder, tensors):
            their_own_library.save(tensors, folder)

`gathering` reads an entry the slow, obvious way, `truth` has the tensors that are written, and
`strategies` has hypothesis strategies (it needs hypothesis; all else needs numpy and pytest).
"""

import pytest

pytest.register_assert_rewrite("reshard.testing.reader", "reshard.testing.writer")

from reshard.testing.reader import ReaderConformance, Sample  # noqa: E402
from reshard.testing.writer import WriterConformance  # noqa: E402

__all__ = ["ReaderConformance", "Sample", "WriterConformance"]
