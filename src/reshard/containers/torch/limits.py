"""Limits on the cost of a pickle. Real training files stay far below; hostile ones are stopped
early."""

# Bytes. DCP metadata takes about 143 bytes a chunk: room for 1.9 million chunks.
# 405 billion parameters on 512 FSDP2 ranks have 1.7 million, with the two moments of Adam.
MAX_NBYTES = 256 << 20
# Opcodes. DCP metadata takes 2.1 bytes an opcode: as many as fit in MAX_NBYTES.
MAX_OPCODES = 128_000_000
# Entries of one stack. Only a tuple needs all its items there; lists come 1000 at a time.
MAX_STACK = 1_000_000
# Bytes of memory for what a pickle makes: this many, and 24 for each byte of it so far. One byte
# can make a dict; DCP metadata makes 13 bytes a byte by the estimates below. So a pickle of up to
# 4 MB stays below 256 MiB, whatever it holds, and a larger one takes no more than twice a real one.
MAX_MADE_NBYTES = 64 << 20
MAX_MADE_PER_BYTE = 24
# What an object takes in CPython 3.11, in bytes: a dict with its first item. A tensor takes 400,
# and counts for more because it takes 10 us to check.
DICT_NBYTES = 232
LIST_NBYTES = 88
TUPLE_NBYTES = 64
CALL_NBYTES = 128
TENSOR_NBYTES = 1024
# Values that a pickle stands for where it recalls lists and dicts, each counted as often as it is
# met: this many, and 4 for each byte. Real ones have less than one a byte. A list of two of the
# list before, a hundred times over, is a small file, and whoever walks it walks for ever.
MAX_VALUES = 1_000_000
MAX_VALUES_PER_BYTE = 4
# Containers within containers. Training files nest fewer than 20; consumers may recurse.
MAX_DEPTH = 128
# Open marks: an object within an object takes up to three.
MAX_MARKS = 1000
# Bytes of an integer. The largest in training files are 128-bit states of random generators; the
# limit keeps the decimal form below the 4300 digits that Python prints.
MAX_INT_NBYTES = 256
# Bytes of a text or of bytes that are copied. A tokenizer's JSON has 33 million at most; of what is
# longer only a record is kept that it was there.
MAX_STRING_NBYTES = 64 << 20
# Characters of a dotted name.
MAX_NAME = 1024
# Python hashes strings with a secret seed, but numbers and tuples without: a file can choose keys
# that all collide, and a dict of n such keys takes n * n / 2 probes. Integers below MAX_SMALL_KEY
# are too few for that (measured: below 1 us a key at worst). All dicts of a pickle together may
# cost this many probes if all other keys collide: about a second, or 11,000 keys in one dict.
MAX_SMALL_KEY = 1 << 24
MAX_PROBES = 64_000_000
# Items of a tuple that is a key.
MAX_KEY_ITEMS = 16
