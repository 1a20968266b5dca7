"""What a pickle may cost. Real training files stay far below; hostile ones stop here, early."""

# Bytes. DCP metadata takes about 143 bytes a chunk: room for 1.9 million chunks.
MAX_NBYTES = 256 << 20
# Opcodes. DCP metadata takes 2.1 bytes an opcode: as many as fit in MAX_NBYTES.
MAX_OPCODES = 128_000_000
# Entries of one stack. Only a tuple needs all its items there; lists come 1000 at a time.
MAX_STACK = 1_000_000
# Containers and records: this many, and one more for every 8 bytes of the pickle. The opcode of an
# empty dict is one byte, the dict 64; DCP metadata has 18 bytes an object. Long bytes that a
# handler makes count as one object for every 64.
MAX_OBJECTS = 500_000
NBYTES_PER_OBJECT = 8
# Containers within containers. Training files nest fewer than 20; consumers may recurse.
MAX_DEPTH = 128
# Open marks: an object within an object takes up to three.
MAX_MARKS = 1000
# Bytes of an integer. The largest in training files are 128-bit states of random generators; the
# limit keeps the decimal form below the 4300 digits that Python prints.
MAX_INT_NBYTES = 256
# Characters of a dotted name.
MAX_NAME = 1024
# Python hashes strings with a secret seed, but numbers and tuples without: a file can choose
# thousands of them that collide, and make a dict take quadratic time. Small integers are too few
# to collide much; of other such keys, one dict may have this many (8 million probes, 30 ms).
MAX_SMALL_KEY = 1 << 24
MAX_OTHER_KEYS = 4096
MAX_KEY_ITEMS = 16
