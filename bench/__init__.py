"""Time and memory of every timed loss beside its plain PyTorch reference: ``python -m bench``."""

import os

# Set before torch is loaded; otherwise the profiler that counts memory prints its stages between progress lines.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
