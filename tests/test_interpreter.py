"""The same tests with the kernels interpreted, in a process of their own: Triton decides when it is imported."""

import pytest
from conftest import INTERPRETED, interpreted_run

from triton_losses.core.compiler import triton

pytestmark = [pytest.mark.not_interpreted, pytest.mark.interpreted]


@pytest.mark.skipif(triton is None, reason="Triton is not installed: there are no kernels to interpret")
def test_everything_holds_with_the_kernels_interpreted(request):
    process, log = request.config.stash.get(INTERPRETED, None) or interpreted_run()
    request.config.stash[INTERPRETED] = process, log  # the end of the session ends it
    code = process.wait()
    log.seek(0)
    output = log.read()
    print(output)
    assert code == 0, "the interpreted run failed: its output is above"
