"""The providers, which compute the losses: one entry each.

`make` takes a case and returns the function to call with the case's tensors and options, or None if the provider has no
such loss. To add an installed peer, add an entry.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

import reference.losses
import triton_losses.functional
from reference import peers


@dataclass(frozen=True)
class Provider:
    make: Callable
    compiles: bool = False  # takes seconds per case: presets but `full` compile only headline cases' largest shapes
    slow: bool = False  # takes seconds per call, or to compile: not in the quick preset
    overwrites: bool = False  # writes the gradient over the logits: it gets tensors of its own


def ours(case):
    return getattr(triton_losses.functional, case.name)


def eager(case):
    return case.baseline or getattr(reference.losses, case.name)


def compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


PROVIDERS = {
    "triton_losses": Provider(ours),
    "eager": Provider(eager),
    "monai": Provider(peers.monai),
    "smp": Provider(peers.smp),
    "liger": Provider(peers.liger, slow=True, overwrites=True),
    "cut cross entropy": Provider(peers.cut_cross_entropy, slow=True),
    "fla": Provider(peers.fla, slow=True),
    "quack": Provider(peers.quack, slow=True),
    "torchvision": Provider(peers.torchvision, slow=True),
    "open_clip": Provider(peers.open_clip, slow=True),
    "lightly": Provider(peers.lightly, slow=True),
    "pytorch_metric_learning": Provider(peers.pytorch_metric_learning, slow=True),
    "info_nce": Provider(peers.info_nce, slow=True),
    "torch, chunked": Provider(peers.torch_chunked, slow=True),
    "torch.compile": Provider(lambda case: compiled(eager(case)), compiles=True),
    "torch.compile(triton_losses)": Provider(lambda case: compiled(ours(case)), compiles=True),
}


def providers_of(case, shape, preset, wanted):
    """The names, in order, of the providers that this preset runs on this shape of the case."""
    may_compile = preset == "full" or (case.headline and shape == case.largest(preset))
    fitting = {
        name
        for name, it in PROVIDERS.items()
        if (may_compile or not it.compiles) and not (it.slow and preset == "quick")
    }
    return [name for name in PROVIDERS if name in wanted and name in fitting]
