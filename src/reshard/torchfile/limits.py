"""What a pickle may cost. Real training files stay far below; hostile ones stop here, early."""

# Bytes. DCP metadata takes about 143 bytes a chunk: room for 1.9 million chunks.
MAX_NBYTES = 256 << 20
# Opcodes. DCP metadata takes 2.1 bytes an opcode: as many as fit in MAX_NBYTES.
MAX_OPCODES = 128_000_000
# Entries of one stack. Only a tuple needs all its items there; lists come 1000 at a time.
MAX_STACK = 1_000_000
# Bytes of memory for what a pickle makes: this many, and 32 more for each byte of it. One byte of
# a pickle can make a dict; DCP metadata makes 13 bytes a byte by the estimates below.
MAX_MADE_NBYTES = 128 << 20
MAX_MADE_PER_BYTE = 32
# What an object takes in CPython 3.11, in bytes: a dict with its first item. A tensor takes 400,
# and counts for more because it takes 10 us to check.
DICT_NBYTES = 232
LIST_NBYTES = 88
TUPLE_NBYTES = 64
CALL_NBYTES = 128
TENSOR_NBYTES = 1024
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
