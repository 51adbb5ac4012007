"""The passes that are timed. Each makes ready a piece of work: what it does before returning stays outside the clock."""

import torch


class Call:
    """A provider's function and the arguments of one case; the first tensor takes the gradient, as in training."""

    def __init__(self, function, tensors, options):
        self.function, self.tensors, self.options = function, tensors, options
        self.input = tensors[0].requires_grad_()
        self.upstream = None

    def loss(self):
        return self.function(*self.tensors, **self.options)

    def backward(self, loss):
        self.input.grad = None
        loss.backward(self.upstream)

    def ready(self, which, times):
        """Work of so many calls of a pass; the gradient of earlier work is freed now, not while the clock runs."""
        self.input.grad = None
        return PASSES[which](self, times)

    def value_and_gradient(self):
        loss = self.loss()
        if loss.dim():
            self.upstream = torch.ones_like(loss)
        self.backward(loss)
        gradient, self.input.grad = self.input.grad, None
        return loss.detach(), gradient


def forward(call, times):
    def work():
        for _ in range(times):
            loss = call.loss()
        return loss  # and with it what the backward pass would need, until the clock has stopped

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


def bytes_moved_at_least(name, tensors):
    """Every input is read once; a pass that differentiates also writes the gradient of the first."""
    read = sum(tensor.nbytes for tensor in tensors)
    return read + tensors[0].nbytes if name in ("backward", "full") else read
