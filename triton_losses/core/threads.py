"""Work on a CPU in blocks that stay in its cache, shared among threads of our own.

torch would split each operation on each block among its OpenMP threads, and wait for all of them after every one. Where
another process holds a core, each of those thousands of waits lasts until the system schedules the last thread:
milliseconds. Ours run whole blocks, and meet once, at the end.
"""

import concurrent.futures
import functools
import os
import threading

import torch

BYTES = 1 << 20  # of a block: a few of them fit the cache, and the allocator keeps rather than returns them
RUN = 16  # blocks that a thread takes at a time, at most
MOST_THREADS = 16  # beyond it Python's lock, taken once an operation, is what they wait for

pools: dict[int, concurrent.futures.ThreadPoolExecutor] = {}  # by number of threads
making = threading.Lock()
os.register_at_fork(after_in_child=pools.clear)  # threads do not survive a fork


def elements(dtype):
    """How many elements a block has."""
    return BYTES // dtype.itemsize


def row_blocks(rows, cols, dtype):
    """Runs of rows, small enough for a cache where a row is; none where there are no columns."""
    step = max(1, elements(dtype) // max(cols, 1))
    return [slice(start, start + step) for start in range(0, rows if cols else 0, step)]


def pool(threads):
    """Threads in each of which torch's operations stay."""
    with making:
        if threads not in pools:
            before = torch.get_num_threads()
            made = pools[threads] = concurrent.futures.ThreadPoolExecutor(threads, "triton_losses", torch_stays_here)
            started = threading.Barrier(threads)
            list(made.map(lambda _: started.wait(), range(threads)))
            torch.set_num_threads(before)  # of this thread and of those still to come; set in each of ours
        return pools[threads]


@functools.cache
def let_memory_stay():
    """glibc hands memory back to the system, page by page, once more is free at its end than twice the largest piece
    that it has seen freed: blocks and gradients would be faulted in anew all the time. Nothing is written to these 31
    MB."""
    torch.empty(31 << 20, dtype=torch.uint8)


def torch_stays_here():
    torch.get_num_threads()  # or the first operation would set the number anew
    torch.set_num_threads(1)


def share(work, count, alone=RUN):
    """``work(i)`` for every i below ``count``, in no order. alone: how many blocks at most stay in this thread.

    There torch splits each operation among its own threads: they wait for work in a loop, and for as long as they do, a
    few milliseconds, ours would have to share their cores.
    """
    let_memory_stay()
    threads = min(torch.get_num_threads(), MOST_THREADS, count)
    if threads < 2 or count <= alone:
        for i in range(count):
            work(i)
        return
    run = max(1, min(RUN, count // (4 * threads)))  # or one thread would be left with much of the work
    runs, inference = iter(range(0, count, run)), torch.is_inference_mode_enabled()

    def take():
        with torch.inference_mode(inference), torch.no_grad():  # a thread has modes of its own
            for start in runs:
                for i in range(start, min(start + run, count)):
                    work(i)

    for taken in [pool(threads).submit(take) for _ in range(threads)]:
        taken.result()
