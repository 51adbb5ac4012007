"""Which process a test runs in.

The same tests run on the CPU path and, where there is one, on the GPU (this process); and with the kernels interpreted,
in a process of its own (TRITON_INTERPRET=1), started beside this one by test_interpreter.py.
"""

import collections
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
OTHER_TARGETS = ("sm_80", "sm_100", "gfx942")
os.environ.setdefault("TRITON_LOSSES_AUTOTUNE", "0")  # tests of the tuning switch it on


def patched_once_a_launch(patch):
    """Triton's interpreter patches its language anew for every function that a kernel calls, which takes half its time.

    Once a launch is enough for the functions of one module, because it undoes that only when the launch has ended.
    """
    patched = []  # the modules' globals, while a kernel runs

    def once(fn):
        if patched and any(fn.__globals__ is known for known in patched):
            return None  # a function that a kernel calls: nobody asks for its scope
        is_kernel = not patched
        patched.append(fn.__globals__)
        scope = patch(fn)
        if is_kernel:
            restore = scope.restore

            def end():
                patched.clear()
                restore()

            scope.restore = end
        return scope

    return once


def looked_up(numpy_type):
    """Triton's interpreter makes a table of types each time it looks one up."""
    known = {}

    def found(kind):
        name = kind.scalar.name
        if name not in known:
            known[name] = numpy_type(kind)
        return known[name]

    return found


if INTERPRET:
    from triton.runtime import interpreter

    interpreter._patch_lang = patched_once_a_launch(interpreter._patch_lang)
    interpreter._get_np_dtype = looked_up(interpreter._get_np_dtype)


def pytest_configure(config):
    config.addinivalue_line("markers", "not_interpreted: needs the compiler, or says nothing about kernels")
    config.addinivalue_line("markers", "cuda: runs on a GPU")
    config.addinivalue_line("markers", "builds: compiles kernels for GPUs that are not here")
    config.addinivalue_line("markers", "interpreted: waits for all tests with the kernels interpreted")


def pytest_addoption(parser):
    parser.addoption(
        "--every", type=int, default=1, metavar="N", help="of each test, every Nth set of parameters alone"
    )
    parser.addoption("--all-targets", action="store_true", help="build all for every GPU, not for sm_90 and one other")


def targets_in_turn(items):
    """The items, but each set of a build's parameters for sm_90 and one of the other GPUs in turn, not for all four."""
    others_of = {}
    for item in items:
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        if item.get_closest_marker("builds") and parameters.pop("name", None) in OTHER_TARGETS:
            others_of.setdefault(item.function, {}).setdefault(str(parameters), []).append(item)
    left_out = set()
    for sets in others_of.values():
        for turn, others in enumerate(sets.values()):
            if len(others) == len(OTHER_TARGETS):
                left_out.update(item for i, item in enumerate(others) if i != turn % len(others))
    return [item for item in items if item not in left_out]


def every(number, items):
    """Of each test's items the first, and each that is ``number`` further on."""
    seen = collections.Counter()
    kept = []
    for item in items:
        if seen[item.originalname, item.path] % number == 0:
            kept.append(item)
        seen[item.originalname, item.path] += 1
    return kept


def pytest_collection_modifyitems(config, items):
    if INTERPRET:
        items[:] = [item for item in items if not item.get_closest_marker("not_interpreted")]
    if not config.option.all_targets:
        items[:] = targets_in_turn(items)
    items[:] = every(config.option.every, items)
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

    With pytest-xdist it comes first: one worker waits for the run while the others go on.
    """
    wanted = [item for item in session.items if item.get_closest_marker("interpreted")]
    is_worker = hasattr(session.config, "workerinput")
    session.items.sort(key=lambda item: (item in wanted) != is_worker)
    if wanted and not session.config.option.collectonly and not is_worker:
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
