"""Connectionist temporal classification: L_n = -log of the total probability of a target's alignments with T_n steps.

An alignment has one of the states blank_0, label_0, blank_1, label_1, ... blank_L at each step. From one step to the
next it stays in its state, moves to the next state, or skips a blank to the next label if the two labels differ. With
e_t(s) the probability of the class of state s,

    α_t(s) = e_t(s) Σ_{s' → s} α_{t-1}(s')        over all paths that end in state s
    β_t(s) = e_t(s) Σ_{s → s'} β_{t+1}(s')        over all paths that start in it: α of the reversed sequence and target
    exp -L = Σ_s α_t(s) β_t(s) / e_t(s)           for any t
    γ_t(c) = Σ_{s of class c} α_t(s) β_t(s) / (e_t(s) exp -L)        the class's occupancy

    ∂L/∂log p_t(c) = -γ_t(c), or p_t(c) - γ_t(c) by PyTorch's convention, which is ∂L/∂x_t(c) for p = softmax(x)

    forward   reads the logits once, for max x and log Σ exp(x - max x), and the classes of the target twice. It saves
              how probable each state is at each step
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

WIDEST = 1 << 13  # labels and a blank: more states would not fit in a program's registers, so plain PyTorch takes over


class Problem(NamedTuple):
    width: torch.SymInt  # most labels of a target, plus 1; a SymInt, so that no width compiles a graph again
    blank: int
    from_logits: bool  # if False, the inputs are log-probabilities
    exact: bool  # for log-probabilities: the gradient is their true derivative, not PyTorch's convention
    zero_infinity: bool
    reduction: str  # the mean is over losses that are each divided by the length of the target
    dtype: torch.dtype  # of the result
    store: bool  # keep what the backward needs


read = Bridge("ctc", Problem, inputs=4, outputs=1, whole=whole, blocks=blocks, kernels=kernels)


def ctc(inputs, targets, input_lengths, target_lengths, **options):
    """The loss of (T, N, C) logits or log-probabilities, and targets (N, S) or concatenated.

    Lengths: (N,), contiguous integers. options: the fields of Problem except ``store``.
    """
    problem = Problem(**options, store=torch.is_grad_enabled() and inputs.requires_grad)
    tensors = inputs, targets, input_lengths, target_lengths
    if problem.width > WIDEST or not inputs.shape[2]:
        return whole.forward(tensors, problem)
    return read(problem, *tensors)
