"""Time and memory of every timed loss beside its plain PyTorch reference: ``python -m bench``."""

import os

# Before torch is loaded: the profiler that counts memory would write its stages between the progress lines.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
