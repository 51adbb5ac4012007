"""Time and memory of every timed loss beside its plain PyTorch reference: ``python -m bench``."""

import os

# Both must stand before torch is loaded.
# The profiler that counts memory would write its stages between the progress lines.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Idle OpenMP threads spin for milliseconds before they sleep. Where another process holds a core, every parallel region then
# waits for as long, and a loss of 30 ms takes seconds; this many spins outlast the gaps between operators, and no more.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
