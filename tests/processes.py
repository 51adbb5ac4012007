"""Several processes that talk by gloo, for tests of what a loss does across them.

A test is a function of this process' rank and the number of processes, at the top level of its module. ``run`` calls it
in every process of a group and raises what any of them raised. The groups are started once and used again, because
to start a process and import torch takes seconds.
"""

import atexit
import datetime
import os
import tempfile
import time
import traceback

import torch.multiprocessing as multiprocessing

SECONDS = 120  # how long a test may take, in the slowest of processes
GRACE = 3  # how long the others may go on when one has raised: they may wait for it in a collective
GROUPS: dict[int, "Processes"] = {}


def work(rank, size, meeting, connection):
    """A process: meets the others, then runs each function it is sent, and answers with None or an error's text."""
    import torch
    import torch.distributed as dist

    from triton_losses.core import dispatch

    dispatch.ATEN = False  # as in conftest.py
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timeout)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            break
        try:
            torch.manual_seed(0)
            function(rank, size, *arguments)
            connection.send(None)
        except BaseException:
            connection.send(traceback.format_exc())


class Processes:
    def __init__(self, size):
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        self.connections, self.running = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            meeting = os.path.join(self.folder.name, "meeting")
            process = context.Process(target=work, args=(rank, size, meeting, theirs), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.running.append(process)

    def run(self, function, *arguments):
        for connection in self.connections:
            connection.send((function, arguments))
        answers, until = {}, time.monotonic() + SECONDS
        while len(answers) < len(self.running) and time.monotonic() < until:
            for rank, connection in enumerate(self.connections):
                if rank not in answers and connection.poll(0.002):
                    answers[rank] = connection.recv()
                    if answers[rank] is not None:
                        until = min(until, time.monotonic() + GRACE)
        wrong = [f"rank {rank}:\n{answer}" for rank, answer in answers.items() if answer is not None]
        late = [rank for rank in range(len(self.running)) if rank not in answers]
        if late:  # the next test gets new processes
            wrong.append(f"no answer from ranks {late}")
            self.end()
        assert not wrong, "\n".join(wrong)

    def end(self):
        GROUPS.pop(len(self.running), None)
        for process in self.running:
            process.kill()


def run(size, function, *arguments):
    """Call ``function(rank, size, *arguments)`` in each of ``size`` processes."""
    if size not in GROUPS:
        GROUPS[size] = Processes(size)
        atexit.register(GROUPS[size].end)
    GROUPS[size].run(function, *arguments)
