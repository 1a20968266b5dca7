"""Work on the machines of a Ray cluster.

    connection   start a cluster of this machine's own, or connect to one, and end it
    keeper       a program that ends what is left of it, where this one is killed
    tasks        hand tasks to its workers, make those of lost workers again, cancel them
    wire         what a task and its answer are as bytes
    worker       what a worker does: make pieces, hash leaves
    sender       the same for an output in a store: make whole files, and send them
    packing      what tasks of pieces are made of
    executor     a transfer, and a verification, as tasks
    stores       a transfer into a store, as tasks

A worker needs a task's bytes and the storage: the files that are read and written lie under the
same paths on every node. It reads no checkpoint's metadata and runs no pickle of one.

    driver (this process)                                workers, one task each at a time
    Assembly.pieces -> some pieces, their entries  --->  read, cast, write, fsync, hash
    digests, CRC-32s, findings; seal a file        <---  digests, CRC-32s of what was read, findings
"""
