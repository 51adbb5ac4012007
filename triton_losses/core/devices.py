"""Checks that a loss's tensors lie on one device."""

import torch


def check_devices(x, *tensors):
    """Raise an error if any of the tensors is on another device than x; other values do not matter."""
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.device != x.device:
            raise RuntimeError(
                f"expected all tensors to be on the same device, but found {x.device} and {tensor.device}"
            )
