"""The passes that are timed. Each returns a function to time; what it does before it returns is not timed."""

import torch


def learned_by(case):
    """How many of the first tensors require a gradient, as in training: the input and, of a head, the weight; or the
    features of both sides.
    """
    return 2 if case.features or case.pairwise else 1


class Call:
    """A provider's function and the arguments of one case; the first ``learned`` tensors require a gradient."""

    def __init__(self, function, tensors, options, learned=1):
        self.function, self.tensors, self.options = function, tensors, options
        self.leaves = [tensor.requires_grad_() for tensor in tensors[:learned]]
        self.upstream = None

    def forget(self):
        for leaf in self.leaves:
            leaf.grad = None

    def loss(self):
        return self.function(*self.tensors, **self.options)

    def backward(self, loss):
        self.forget()
        loss.backward(self.upstream)

    def ready(self, which, times):
        """A function that runs a pass ``times`` times. Frees earlier gradients now, so that this is not timed."""
        self.forget()
        return PASSES[which](self, times)

    def value_and_gradients(self):
        loss = self.loss()
        if loss.dim():
            self.upstream = torch.ones_like(loss)
        self.backward(loss)
        gradients = [leaf.grad for leaf in self.leaves]
        self.forget()
        return loss.detach(), *gradients


def forward(call, times):
    def work():
        for _ in range(times):
            loss = call.loss()
        return loss  # keeps what the backward needs alive until the clock has stopped

    return work


def backward(call, times):
    losses = [call.loss() for _ in range(times)]

    def work():
        for loss in losses:
            call.backward(loss)

    return work


def full(call, times):
    def work():
        for _ in range(times):
            call.backward(call.loss())

    return work


def no_grad(call, times):
    return torch.no_grad()(forward(call, times))


PASSES = {"forward": forward, "backward": backward, "full": full, "no-grad": no_grad}


def bytes_moved_at_least(name, tensors, learned=1):
    """Every input is read once; a pass that differentiates also writes the gradients of the first ones."""
    read = sum(tensor.nbytes for tensor in tensors)
    return read + sum(tensor.nbytes for tensor in tensors[:learned]) if name in ("backward", "full") else read
