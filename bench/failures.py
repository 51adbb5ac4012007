"""A provider that fails (no C compiler, a kernel error, no memory left) is a finding, not the end of the run."""

from contextlib import contextmanager

LONGEST = 300  # characters: compilers print pages


@contextmanager
def noted(failures, name):
    """Keep an error's text, on one line, under `name` instead of raising it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (whatever a provider raises)
        failures[name] = " ".join(f"{type(error).__name__}: {error}".split())[:LONGEST]
