"""How many kernels a loss launches, its own and PyTorch's; no GPU is needed to see it."""

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which is not installed")

from bench import host
from bench.no_gpu import kernels_launch_nothing
from reference.cases import CASES
from triton_losses import functional
from triton_losses.core import dispatch, tuning
from triton_losses.core.launch import Launch

pytestmark = [
    pytest.mark.not_interpreted,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, whose driver is not to be replaced"),
]
FORWARD, IN_ALL = 2, 3  # a kernel of ours and the one that finishes its sums; the backward's
MORE = {  # forward, in all
    "ctc_loss": (3, 4),  # before the finishing kernel both halves of the walk
    "ctc_loss_with_logits": (4, 5),  # and the statistics of each step
    "multi_quantile_loss": (6, 9),  # PyTorch makes the tensor of the quantiles; the target's gradient is a sum
}
TIMED = [case for case in CASES if case.bench and not (case.features or case.pairwise)]


@pytest.mark.parametrize("case", TIMED, ids=str)
def test_a_loss_launches_few_kernels(case, monkeypatch):
    launched = []
    monkeypatch.setattr(Launch, "__call__", lambda *_: launched.append(1))
    monkeypatch.setattr(tuning, "autotune", False)

    def launches(work):
        launched.clear()
        by_torch = host.operations(work)
        return len(launched) + by_torch

    with kernels_launch_nothing():
        forward, both = host.call_of(case, "triton_losses")
        both()
        extra = "gradient_in_forward" in case.options  # the mean's factor, before the pass
        most_forward, most = MORE.get(case.name, (FORWARD + extra, IN_ALL + extra))
        assert launches(forward) <= most_forward
        assert launches(both) <= most


def test_nll_loss_of_few_rows_is_atens_and_of_more_is_a_kernel(monkeypatch):
    monkeypatch.setattr(dispatch, "ATEN", True)
    monkeypatch.setattr(tuning, "autotune", False)
    for rows, launched in ((dispatch.FEW_ROWS, 0), (dispatch.FEW_ROWS + 1, 3)):
        log_p, labels = torch.randn(rows, 7).log_softmax(1).requires_grad_(), torch.randint(7, (rows,))
        with kernels_launch_nothing() as launcher:
            before = launcher.launches
            loss = functional.nll_loss(log_p, labels)
            loss.backward()
            assert launcher.launches - before == launched
        if not launched:
            torch.testing.assert_close(loss, torch.nn.functional.nll_loss(log_p, labels), rtol=0, atol=0)
