"""Values and gradients of losses as pictures: ``python -m bench curves``.

A panel shows losses of one number: of an error x - y, of a margin y x, or of the logit x of a label y = 1. The losses
themselves compute what is drawn.
"""

from dataclasses import dataclass, field

import torch
from matplotlib.figure import Figure

from bench.picture import COLOURS, FAINT, INK
from triton_losses import functional

POINTS = 601
PICTURE = "curves.png"


@dataclass(frozen=True)
class Panel:
    title: str
    axis: str
    target: float
    losses: tuple = field(default=())  # (label, name, options)
    reach: float = 3.0


PANELS = (
    Panel(
        "Regression",
        "error x - y",
        0.0,
        (
            ("squared error", "mse_loss", {}),
            ("L1", "l1_loss", {}),
            ("smooth L1, β = 1", "smooth_l1_loss", {}),
            ("Huber, δ = 1.5", "huber_loss", {"delta": 1.5}),
            ("log-cosh", "log_cosh_loss", {}),
            ("quantile 0.9", "quantile_loss", {"quantile": 0.9}),
        ),
    ),
    Panel(
        "Margins",
        "margin y x",
        1.0,
        (
            ("hinge", "hinge_loss", {}),
            ("squared hinge", "squared_hinge_loss", {}),
            ("perceptron", "perceptron_loss", {}),
            ("soft margin", "soft_margin_loss", {}),
            ("exponential", "exponential_loss", {}),
        ),
        2.5,
    ),
    Panel(
        "Binary cross entropy and focal loss",
        "logit x of a label 1",
        1.0,
        (
            ("cross entropy", "binary_cross_entropy_with_logits", {}),
            *(
                (f"focal, γ = {gamma}", "sigmoid_focal_loss", {"alpha": None, "gamma": gamma})
                for gamma in (0.5, 1, 2, 5)
            ),
        ),
        4.0,
    ),
)


def curve(panel, name, options):
    """Where, values and gradients of one loss, in float64."""
    x = torch.linspace(-panel.reach, panel.reach, POINTS, dtype=torch.float64, requires_grad=True)
    target = torch.full_like(x, panel.target)
    values = getattr(functional, name)(x, target, reduction="none", **options)
    (gradients,) = torch.autograd.grad(values.sum(), x)
    return x.detach(), values.detach(), gradients


def draw(path):
    figure = Figure(figsize=(4.2 * len(PANELS), 6.4), dpi=150, facecolor="white", layout="constrained")
    grid = figure.subplots(2, len(PANELS), sharex="col")
    for panel, (above, below) in zip(PANELS, grid.T):
        for (label, name, options), colour in zip(panel.losses, COLOURS):
            x, values, gradients = curve(panel, name, options)
            above.plot(x, values, color=colour, linewidth=1.8, label=label)
            below.plot(x, gradients, color=colour, linewidth=1.8)
        above.set_title(panel.title, fontsize=10, color=INK, loc="left")
        above.legend(fontsize=8, frameon=False)
        below.set_xlabel(panel.axis, fontsize=9, color=FAINT)
        above.set_ylim(top=min(above.get_ylim()[1], 5.0))
        below.set_ylim(max(below.get_ylim()[0], -4.0), min(below.get_ylim()[1], 4.0))
        for axes in (above, below):
            axes.grid(color="#e4e7eb", linewidth=0.8)
            axes.tick_params(labelsize=8, labelcolor=FAINT, length=0)
            axes.spines[:].set_visible(False)
    grid[0, 0].set_ylabel("loss", fontsize=9, color=FAINT)
    grid[1, 0].set_ylabel("gradient by x", fontsize=9, color=FAINT)
    figure.savefig(path)


def write(directory):
    directory.mkdir(parents=True, exist_ok=True)
    draw(directory / PICTURE)
    return directory / PICTURE
