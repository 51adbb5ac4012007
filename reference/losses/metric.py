"""The ranking and metric losses in plain PyTorch."""

from torch.nn.functional import cosine_similarity

from reference.losses.shared import reduced


def cosine_similarity_loss(input1, input2, target, reduction="mean", eps=1e-8):
    return reduced((cosine_similarity(input1, input2, -1, eps) - target) ** 2, reduction)


def contrastive_loss(input1, input2, target, margin=1.0, reduction="mean"):
    difference = input1 - input2
    square, distance = (difference**2).sum(-1), difference.norm(dim=-1)
    return reduced(target * square + (1 - target) * (margin - distance).clamp(min=0) ** 2, reduction)
