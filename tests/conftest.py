"""Which process a test runs in.

The same tests run on the CPU path and, where there is one, on the GPU (this process); and with the kernels interpreted,
in a process of its own (TRITON_INTERPRET=1), started beside this one by test_interpreter.py.
"""

import contextlib
import os
import pathlib
import subprocess
import sys
import tempfile
import warnings

import pytest
import torch

from triton_losses.core import dispatch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and not INTERPRET else [])
TESTS = pathlib.Path(__file__).parent
INTERPRETED = pytest.StashKey()
os.environ.setdefault("TRITON_LOSSES_AUTOTUNE", "0")  # tests of the tuning switch it on


def pytest_configure(config):
    config.addinivalue_line("markers", "not_interpreted: needs the compiler, or says nothing about kernels")
    config.addinivalue_line("markers", "cuda: runs on a GPU")
    config.addinivalue_line("markers", "builds: compiles kernels for GPUs that are not here")
    config.addinivalue_line("markers", "interpreted: waits for all tests with the kernels interpreted")


def pytest_collection_modifyitems(config, items):
    if INTERPRET:
        items[:] = [item for item in items if not item.get_closest_marker("not_interpreted")]
    # with --dist loadgroup a worker that has built a loss's kernels gets the rest of that loss's tests
    for item in items:
        case = getattr(item, "callspec", None) and item.callspec.params.get("case")
        if case is not None and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.xdist_group(case.name))


@contextlib.contextmanager
def torch_threads(number):
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def pytest_collection_finish(session):
    """Start the interpreted run beside this one where its test is wanted: that test comes last and waits for it.

    A worker of pytest-xdist starts it when it comes to that test, or each worker would have a run of its own.
    """
    wanted = [item for item in session.items if item.get_closest_marker("interpreted")]
    if wanted and not session.config.option.collectonly and not hasattr(session.config, "workerinput"):
        session.items.sort(key=lambda item: item in wanted)
        session.config.stash[INTERPRETED] = interpreted_run()


def interpreted_run():
    """All tests with the kernels interpreted: a process that has begun, and the file of its output."""
    log = tempfile.TemporaryFile("w+")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--no-header", "--durations=5", str(TESTS)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=TESTS.parent, env=environment, stdout=log, stderr=subprocess.STDOUT), log


def pytest_sessionfinish(session):
    if INTERPRETED in session.config.stash:
        session.config.stash[INTERPRETED][0].kill()  # nothing to do where it has ended


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize(
            "device",
            [pytest.param(device, marks=pytest.mark.cuda) if device == "cuda" else device for device in DEVICES],
        )


@pytest.fixture(autouse=True)
def calls_are_ours(monkeypatch):
    """Tests use small tensors, which on a CPU would go to ATen: they are to test what large ones meet."""
    monkeypatch.setattr(dispatch, "ATEN", False)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using a target size")
        torch.manual_seed(0)
        yield
