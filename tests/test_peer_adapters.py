"""The bench compares like with like: other libraries' functions, called as ours are, give the values and gradients of
the plain reference. Liger-Kernel's and fla's kernels run where they are interpreted, cut cross entropy on any CPU.
"""

import pytest
import torch
from conftest import INTERPRET

import reference.losses
from reference import peers
from reference.cases import CASES

TIMED = [case for case in CASES if case.bench]
SHAPES = {1: (64,), 2: (16, 96), 3: (8, 16, 96), 4: (2, 5, 6, 8)}
NEED_A_GPU = {"fla": ("cross_entropy",), "quack": ("cross_entropy",), "torchvision": ("sigmoid_focal_loss",)}
ADAPTERS = {"liger": peers.liger, "cut cross entropy": peers.cut_cross_entropy, "fla": peers.fla, "quack": peers.quack}
ADAPTERS |= {name: getattr(peers, name) for name in ("torchvision", "open_clip", "lightly", "info_nce")}
ADAPTERS["pytorch_metric_learning"] = peers.pytorch_metric_learning
INTERPRETED = ("liger", "fla")  # their Triton kernels need a GPU or the interpreter


def installed(name, case):
    try:
        return ADAPTERS[name](case)
    except (ImportError, RuntimeError) as error:  # quack without its compiler, torchvision beside a torch without CUDA
        pytest.skip(f"{name} does not import here: {error}")


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_peers_function_has_the_references_value_and_gradients(name):
    if name not in peers.versions():
        pytest.skip(f"{name} is not installed")
    if not torch.cuda.is_available() and name in INTERPRETED and not INTERPRET:
        pytest.skip(f"{name}'s kernels need a GPU or the interpreter")
    compared = 0
    for case in TIMED:
        if not torch.cuda.is_available() and case.name in NEED_A_GPU.get(name, ()):
            continue
        function = installed(name, case)
        if function is None:
            continue
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tensors, options = case.arguments(SHAPES[len(next(iter(case.bench.values()))[0])], device=device)
        leaves = [tensor.requires_grad_() for tensor in tensors[: 2 if case.features or case.pairwise else 1]]
        plain = (case.baseline or getattr(reference.losses, case.name))(*tensors, **options)
        wanted = plain.detach(), *torch.autograd.grad(plain, leaves)
        found = function(*tensors, **options)  # comes last, because it may overwrite the logits
        torch.testing.assert_close((found.detach(), *torch.autograd.grad(found, leaves)), wanted, rtol=2e-6, atol=1e-7)
        compared += 1
    if name in NEED_A_GPU and name not in INTERPRETED and not torch.cuda.is_available():
        pytest.skip(f"{name} needs a GPU")
    assert compared, f"{name} is installed, but no timed case was compared"


def test_every_peer_of_the_bench_has_an_adapter():
    from bench.providers import PROVIDERS

    assert {name for name, provider in PROVIDERS.items() if provider.make in vars(peers).values()} == {
        *ADAPTERS,
        "monai",
        "smp",
        "torch, chunked",
    }


@pytest.mark.not_interpreted
def test_a_peer_that_overwrites_its_input_gets_tensors_of_its_own(monkeypatch):
    from bench import measure
    from bench.providers import PROVIDERS, Provider
    from reference.cases.case import Case
    from reference.cases.draws import numbers

    def overwriting(input, target):
        loss = torch.nn.functional.mse_loss(input, target)
        input.data.fill_(1e6)
        return loss

    monkeypatch.setitem(PROVIDERS, "overwriting", Provider(lambda case: overwriting, overwrites=True))
    case = Case("mse_loss", numbers, bench={"quick": ((6, 5),)})
    names, cpu = ["overwriting", "triton_losses", "eager"], torch.device("cpu")
    rows = measure.measure(case, (6, 5), torch.float32, cpu, measure.PRESETS["quick"], names)
    assert len(rows) == 6 and all(row["failed"] == "" for row in rows)
    assert all(row["error"] < 1e-6 for row in rows if row["provider"] != "overwriting")
