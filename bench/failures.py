"""If a provider fails (no C compiler, a kernel error, no memory left), the run records that and goes on."""

from contextlib import contextmanager

LONGEST = 300  # most characters of an error, because compilers print pages


@contextmanager
def noted(failures, name):
    """Store an error's text, on one line, in `failures[name]` instead of raising it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever a provider raises)
        failures[name] = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
