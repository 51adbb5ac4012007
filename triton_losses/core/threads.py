"""Runs work on a CPU in blocks that fit in its cache, in threads of our own.

torch would split each operation on each block among its OpenMP threads, and wait for all of them after each operation.
If another process occupies a core, each of those thousands of waits takes milliseconds, until the system schedules the
last thread. Our threads run whole blocks, and the caller waits for them only once, at the end.
"""

import concurrent.futures
import functools
import os
import threading

import torch

BYTES = 1 << 20  # of a block: a few of them fit in the cache, and the allocator keeps them when they are freed
RUN = 16  # a thread takes at most so many blocks at a time
MOST_THREADS = 16  # more would mostly wait for Python's global lock, which each operation takes

pools: dict[int, concurrent.futures.ThreadPoolExecutor] = {}  # by number of threads
making = threading.Lock()
os.register_at_fork(after_in_child=pools.clear)  # threads do not survive a fork


def elements(dtype):
    """How many elements a block has."""
    return BYTES // dtype.itemsize


def row_blocks(rows, cols, dtype):
    """Slices of rows that fit in the cache, if a single row does; none if there are no columns."""
    step = max(1, elements(dtype) // max(cols, 1))
    return [slice(start, start + step) for start in range(0, rows if cols else 0, step)]


def pool(threads):
    """A pool of threads in which torch runs each operation in the thread itself, not in further threads."""
    with making:
        if threads not in pools:
            before = torch.get_num_threads()
            made = pools[threads] = concurrent.futures.ThreadPoolExecutor(threads, "triton_losses", torch_stays_here)
            started = threading.Barrier(threads)
            list(made.map(lambda _: started.wait(), range(threads)))
            torch.set_num_threads(before)  # restores it for this thread and for new ones; each of ours keeps 1
        return pools[threads]


@functools.cache
def let_memory_stay():
    """Allocate and free 31 MB once, so that glibc keeps the memory of freed blocks and gradients.

    glibc returns memory to the system once more is free at the end of its heap than twice the largest piece that it has
    seen freed. Blocks and gradients would cause page faults again and again. Nothing is written to these 31 MB.
    """
    torch.empty(31 << 20, dtype=torch.uint8, device="cpu")


def torch_stays_here():
    torch.get_num_threads()  # otherwise the thread's first operation would reset the number
    torch.set_num_threads(1)


def share(work, count, alone=RUN):
    """Run ``work(i)`` for every i below ``count``, in no particular order.

    alone: up to so many blocks run in the calling thread, where torch splits each operation among its own threads.
    After an operation those threads spin for a few milliseconds, waiting for work, and our threads would have to share
    the cores with them. So ours run only if there are more blocks.
    """
    let_memory_stay()
    threads = min(torch.get_num_threads(), MOST_THREADS, count)
    if threads < 2 or count <= alone:
        for i in range(count):
            work(i)
        return
    run = max(1, min(RUN, count // (4 * threads)))  # otherwise one thread could be left with much of the work
    runs, inference = iter(range(0, count, run)), torch.is_inference_mode_enabled()

    def take():
        with torch.inference_mode(inference), torch.no_grad():  # these modes are set per thread
            for start in runs:
                for i in range(start, min(start + run, count)):
                    work(i)

    for taken in [pool(threads).submit(take) for _ in range(threads)]:
        taken.result()
