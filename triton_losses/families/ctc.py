"""Connectionist temporal classification: L_n = -log of the summed probability of all alignments of a target with T_n
steps.

An alignment says at each step one of the states blank_0, label_0, blank_1, label_1, ... blank_L, from step to step
staying in its state, going on to the next, or past a blank to the next label if that is another. With e_t(s) the
probability of the state's class,

    α_t(s) = e_t(s) Σ_{s' → s} α_{t-1}(s')        of all ways that lead to state s
    β_t(s) = e_t(s) Σ_{s → s'} β_{t+1}(s')        of all ways on from it: α of the reversed sequence and target
    exp -L = Σ_s α_t(s) β_t(s) / e_t(s)           for any t
    γ_t(c) = Σ_{s of class c} α_t(s) β_t(s) / (e_t(s) exp -L)        the class's occupancy

    ∂L/∂log p_t(c) = -γ_t(c), or p_t(c) - γ_t(c) by PyTorch's convention, which is ∂L/∂x_t(c) for p = softmax(x)

    forward   logits are read once, for max x and log Σ exp(x - max x); the classes of the target are read twice. It
              saves how likely each state is at each step
    backward  reads the logits once and writes their gradient
"""

from typing import NamedTuple

import torch

from triton_losses.blocks import ctc as blocks
from triton_losses.core.bridge import Bridge
from triton_losses.core.compiler import triton
from triton_losses.whole import ctc as whole

if triton is not None:
    from triton_losses.kernels import ctc as kernels
else:
    kernels = None  # type: ignore[assignment]

WIDEST = 1 << 13  # labels and a blank: of more, a program's states would not fit its registers, and plain PyTorch walks


class Problem(NamedTuple):
    width: torch.SymInt  # labels that a target may have, and 1; batches differ in it, which compiles no graph anew
    blank: int
    from_logits: bool  # else log-probabilities
    exact: bool  # of log-probabilities: the gradient is their derivative, not by PyTorch's convention
    zero_infinity: bool
    reduction: str  # the mean is of losses that have been divided by the lengths of their targets
    dtype: torch.dtype  # of the result
    store: bool  # keep what the backward needs


read = Bridge("ctc", Problem, inputs=4, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def ctc(inputs, targets, input_lengths, target_lengths, **options):
    """The loss of (T, N, C) logits or log-probabilities, and targets (N, S) or concatenated.

    Lengths: (N,), contiguous integers. options: those of Problem, but for ``store``.
    """
    problem = Problem(**options, store=torch.is_grad_enabled() and inputs.requires_grad)
    tensors = inputs, targets, input_lengths, target_lengths
    if problem.width > WIDEST or not inputs.shape[2]:
        return whole.forward(tensors, problem)
    return read(problem, *tensors)
