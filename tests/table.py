"""The public functions and modules by what they have in common, and how to call each, as the table of cases says."""

import inspect

import torch
from conftest import INTERPRET

import triton_losses
from reference.cases import CASES
from triton_losses import functional

WITHOUT_MODULES = ("log_probs", "ctc_loss_with_logits")  # the last has ctc_loss's
FUNCTIONS = {
    name: f for name, f in vars(functional).items() if inspect.isfunction(f) and not name.endswith(WITHOUT_MODULES)
}
MODULES = {
    n: c for n, c in vars(triton_losses).items() if isinstance(c, type) and hasattr(c, "function") and n[-4:] != "Head"
}
REGIONS = [case.name for case in CASES if case.classes]  # their means are of whole images
# test_head.py compares them with torch's: a weight's owner is ...Head
HEADS = [name for name in FUNCTIONS if name.startswith("linear_")]
# of four tensors: test_sequence.py has what holds for pairs here
SEQUENCES = [name for name in FUNCTIONS if name.startswith("ctc_")]
TORCHS = [name for name in FUNCTIONS if hasattr(torch.nn.functional, name) and name not in HEADS]
# ours is given the weight
TORCHS_MODULES = [name for name in MODULES if hasattr(torch.nn, name) and name != "LinearCrossEntropyLoss"]
MARGINS = ["multi_margin_loss", "multilabel_margin_loss"]  # they take labels too, and rows alone
WITH_LABELS = [*MARGINS, *(name for name, f in FUNCTIONS.items() if "ignore_index" in inspect.signature(f).parameters)]
PLAIN = [case for case in CASES if not case.note]
FIRST = {case.name: case for case in reversed(PLAIN)}  # of each loss
# the interpreter takes seconds for what the CPU path takes milliseconds for
SOME = FIRST.values() if INTERPRET else PLAIN


def draw(name, device="cpu", shape=(6, 5), dtype=torch.float32, seed=0):
    """Input and target of the loss's first case."""
    return FIRST[name].arguments(FIRST[name].shape(*shape) if len(shape) == 2 else shape, dtype, device, seed)[0]


def prepared(case, device, module=functional, shape=(6, 5), dtype=torch.float32, **changes):
    """The case's loss as a function of the tensors it is differentiated by, and those tensors."""
    tensors, options = case.arguments(case.shape(*shape), dtype, device)
    inputs, rest = [t.requires_grad_() for t in tensors[: case.differentiable]], tensors[case.differentiable :]
    return lambda *inputs: getattr(module, case.name)(
        *inputs, *rest, **{**options, **(changes if case.reduces else {})}
    ), inputs


def class_weights():
    return torch.linspace(0.5, 1.5, 5)
