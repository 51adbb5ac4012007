"""CPU blocks are shared among threads, and nobody notices: same bits, same errors, same modes, same number of torch's
threads.
"""

import os
import threading

import pytest
import torch
from conftest import torch_threads

from triton_losses import functional
from triton_losses.core import threads

pytestmark = pytest.mark.not_interpreted
MANY = 8 * threads.RUN


@pytest.fixture(autouse=True)
def two_threads():
    with torch_threads(2):
        yield


def test_each_block_is_worked_on_once_by_threads_in_which_torch_stays():
    done, workers = [], set()

    def work(i):
        done.append(i)
        workers.add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))

    threads.share(work, MANY)
    assert sorted(done) == list(range(MANY))
    assert workers == {("triton", 1)} and torch.get_num_threads() == 2


def test_few_blocks_stay_with_the_caller():
    workers = set()
    threads.share(lambda i: workers.add(threading.get_ident()), threads.RUN)
    assert workers == {threading.get_ident()}


def test_an_error_in_a_block_reaches_the_caller():
    def work(i):
        if i == MANY - 1:
            raise ZeroDivisionError("the last block")

    with pytest.raises(ZeroDivisionError, match="the last block"):
        threads.share(work, MANY)


def test_no_graph_is_recorded_and_inference_mode_is_kept():
    x, seen = torch.ones(3, requires_grad=True), []
    threads.share(lambda i: seen.append((x * 2).requires_grad), MANY)
    assert not any(seen)
    with torch.inference_mode():
        seen.clear()
        threads.share(lambda i: seen.append(torch.is_inference_mode_enabled()), MANY)
    assert all(seen) and len(seen) == MANY


LARGE = threads.elements(torch.float32) * (3 * threads.RUN) + 17


def test_a_loss_of_many_blocks_is_exact_and_the_same_every_time():
    x, y = torch.randn(LARGE, requires_grad=True), torch.randn(LARGE)
    runs = []
    for _ in range(3):
        loss = functional.huber_loss(x, y)
        runs.append((loss.detach(), *torch.autograd.grad(loss, x)))
    for loss, gradient in runs[1:]:
        assert torch.equal(loss, runs[0][0]) and torch.equal(gradient, runs[0][1])
    exact = torch.nn.functional.huber_loss(x.double(), y.double())
    torch.testing.assert_close(runs[0][0].double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(runs[0][1], torch.autograd.grad(exact, x)[0], rtol=1e-6, atol=1e-12)


def test_rows_wider_than_a_block_are_exact():
    classes = threads.elements(torch.float32) + 100
    x, labels = torch.randn(2 * threads.RUN, classes, requires_grad=True), torch.randint(classes, (2 * threads.RUN,))
    ours, exact = functional.cross_entropy(x, labels), torch.nn.functional.cross_entropy(x.double(), labels)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(exact, x), rtol=1e-5, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_makes_threads_of_its_own():
    threads.share(lambda i: None, MANY)  # the parent has its threads
    child = os.fork()
    if child == 0:
        done = []
        threads.share(done.append, MANY)
        os._exit(0 if len(done) == MANY else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
