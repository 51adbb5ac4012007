"""What ``python -m bench train`` trains: models, batches made on the spot, and losses, each called with a provider's
functions.

A loss takes the provider (`triton_losses.functional` or `reference.losses`), the model and the tensors of a batch.
"""

import ast
import itertools
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from triton_losses import dpo_loss, functional, grpo_loss, sequence_log_probs

TEXT = 400_000  # bytes
BATCH, CONTEXT, TOKENS, WIDTH = 8, 64, 1 << 16, 64
ANSWER = 48  # tokens of a sequence that are an answer; those before are its prompt
SAMPLED = 4  # batches of answers that the policy samples before its training
SIDE, SHAPES = 64, 4


class Task(NamedTuple):
    model: nn.Module
    batches: list
    loss: Callable


class LanguageModel(nn.Module):
    """Hidden states of a causal transformer; the head's weight is that of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.places = nn.Parameter(torch.randn(CONTEXT, WIDTH) * 0.02)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, tokens):
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1], device=tokens.device)
        placed = self.embedding(tokens) + self.places[: tokens.shape[1]]
        hidden = self.norm(self.layers(placed, mask=mask, is_causal=True))
        return hidden, self.embedding.weight


def text():
    """Documentation strings of the standard library, 400 kB, read from its source."""
    found, size = [], 0
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            if documented and (words := ast.get_docstring(node)):
                found.append(words.encode())
                size += len(found[-1])
        if size > TEXT:
            break
    return b"\n\n".join(found)[:TEXT]


def sequences(steps, rows):
    """Pieces of the text, (steps, rows, CONTEXT + 1); a token is two bytes."""
    numbers = torch.frombuffer(bytearray(text()), dtype=torch.uint8).long()
    tokens = numbers[: len(numbers) // 2 * 2].view(-1, 2) @ torch.tensor([256, 1])
    starts = torch.randint(len(tokens) - CONTEXT, (steps, rows))
    return tokens[starts[:, :, None] + torch.arange(CONTEXT + 1)]


def language(steps, device):
    """Each token's label is the next one."""
    batches = [(rows[:, :-1], rows[:, 1:]) for rows in sequences(steps, BATCH).to(device)]

    def loss(losses, model, tokens, labels):
        hidden, weight = model(tokens)
        return losses.linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten())

    return Task(LanguageModel().to(device), batches, loss)


def answers(losses, model, tokens):
    """log p of each token of the answers, (rows, ANSWER), from hidden states and the head's weight."""
    hidden, weight = model(tokens[:, :-1])
    return losses.linear_log_probs(hidden[:, -ANSWER:], weight, tokens[:, -ANSWER:])


def preference(steps, device):
    """DPO: the text as it goes on is preferred to one with every second token drawn from all; the reference is the
    model untrained.
    """
    model = LanguageModel().to(device)
    chosen = sequences(steps, BATCH // 2)
    rejected = chosen.clone()
    rejected[:, :, -ANSWER::2] = torch.randint(TOKENS, (steps, BATCH // 2, ANSWER // 2))
    batches = []
    for rows in torch.cat([chosen, rejected], 1).to(device):
        with torch.no_grad():
            batches.append((rows, sequence_log_probs(answers(functional, model, rows))))

    def loss(losses, model, tokens, reference):
        log_probs = sequence_log_probs(answers(losses, model, tokens))
        return dpo_loss(*log_probs.chunk(2), *reference.chunk(2))

    return Task(model, batches, loss)


@torch.no_grad()
def sampled(model, prompts):
    """Prompts (rows, CONTEXT + 1 - ANSWER) with the answers that the model samples."""
    tokens = prompts
    for _ in range(ANSWER):
        hidden, weight = model(tokens)
        chances = (hidden[:, -1] @ weight.T).softmax(-1)
        tokens = torch.cat([tokens, torch.multinomial(chances, 1)], 1)
    return tokens


def policy(steps, device):
    """GRPO: of the answers to a prompt, those with more letters than the others are better."""
    model, batches = LanguageModel().to(device), []
    prompts = sequences(SAMPLED, 2)[:, :, :-ANSWER].to(device).flatten(0, 1)
    for tokens in sampled(model, prompts.repeat_interleave(BATCH // 2, 0)).view(SAMPLED, BATCH, -1):
        characters = torch.stack([tokens[:, -ANSWER:] // 256, tokens[:, -ANSWER:] % 256])
        letters = ((characters | 32) >= ord("a")) & ((characters | 32) <= ord("z"))
        rewards = letters.float().mean((0, 2)).view(2, -1)
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        with torch.no_grad():
            batches.append((tokens, advantages.flatten(), answers(functional, model, tokens)))

    def loss(losses, model, tokens, advantages, old):
        return grpo_loss(answers(losses, model, tokens), advantages, None, old, old, beta=0.04)

    return Task(model, list(itertools.islice(itertools.cycle(batches), steps)), loss)


def drawing():
    """An image (1, SIDE, SIDE) of noise with a disc, a square and a frame in it, and which of them each pixel shows."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    labels = torch.zeros(SIDE, SIDE, dtype=torch.int64)
    for shape in range(1, SHAPES):
        (a, b), r = torch.randint(8, SIDE - 8, (2,)), torch.randint(5, 12, ())
        far = torch.maximum((y - a).abs(), (x - b).abs())
        inside = ((y - a) ** 2 + (x - b) ** 2 <= r * r, far <= r, (far <= r) & (far > r - 3))[shape - 1]
        labels[inside] = shape
    return (labels / SHAPES + 0.15 * torch.randn(SIDE, SIDE))[None], labels


def segmentation(steps, device):
    layers = [nn.Conv2d(1, 16, 5, padding=2), nn.ReLU()]
    for _ in range(2):
        layers += [nn.Conv2d(16, 16, 5, padding=2), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Conv2d(16, SHAPES, 1)).to(device)
    batches = []
    for _ in range(steps):
        images, labels = zip(*(drawing() for _ in range(BATCH)))
        batches.append((torch.stack(images).to(device), torch.stack(labels).to(device)))

    def loss(losses, model, images, labels):
        return losses.dice_ce_loss(model(images), labels, softmax=True)

    return Task(model, batches, loss)


TASKS = {
    "lm": ("language model", language),
    "seg": ("segmentation", segmentation),
    "dpo": ("preferences: DPO", preference),
    "grpo": ("policy: GRPO", policy),
}
