"""What the multi-class margin losses refuse and accept, as torch does: see test_bad_input.py."""

import pytest
import test_bad_input
import torch
from test_bad_input import CHANCES, ELSEWHERE, IMAGE, IMAGE_LABELS, INTEGERS, LABELS, NAN, NUMBERS, labelled, of


def margin_refusals(name):
    sets = name == "multilabel_margin_loss"
    labels = LABELS[:, None].repeat(1, 5) if sets else LABELS
    yield "fewer labels than rows", "(3", of(name, NUMBERS, labels[:3])
    yield "labels of other columns", "(4, 3)", of(name, NUMBERS, LABELS[:, None].repeat(1, 3))
    yield "two labels for unbatched scores", "(2,)", of(name, NUMBERS[0], LABELS[:2])
    yield "an image", "(2, 5, 3, 4)", of(name, IMAGE, IMAGE_LABELS)
    yield "no classes", "(4, 0)", of(name, NUMBERS[:, :0], labels[:, :0] if sets else labels)
    yield "no classes, unbatched", "(0,)", of(name, NUMBERS[0, :0], labels[0, :0] if sets else labels[0])
    yield "a label above the classes", "5", of(name, NUMBERS, labels.masked_fill(labels == 4, 5))
    yield "a label below them", "-2", of(name, NUMBERS, labels.masked_fill(labels == 4, -2))
    yield (
        "a label far above an only class",
        "9",
        of(name, NUMBERS[:, :1], labels[:, :1] * 0 + 9 if sets else labels * 0 + 9),
    )
    yield "labels of 32 bits", "int32", of(name, NUMBERS, labels.int())
    yield "labels of a byte", "uint8", of(name, NUMBERS, labels.byte())
    yield "labels that are numbers", "float32", of(name, NUMBERS, labels.float())
    yield "labels in a list", "[0, 4, 2, 1]", of(name, NUMBERS, [0, 4, 2, 1])
    yield "integer scores", "int64", of(name, INTEGERS, labels)
    yield "complex scores", "complex64", of(name, NUMBERS + 0j, labels)
    yield "eight-bit scores", "float8", of(name, CHANCES.to(torch.float8_e4m3fn), labels)
    yield "labels on another device", "meta", of(name, NUMBERS, labels.to("meta"))
    yield "scores on another device", "meta", of(name, ELSEWHERE, labels)
    yield "unknown reduction", "average", of(name, NUMBERS, labels, reduction="average")
    yield "no reduction", "None", of(name, NUMBERS, labels, reduction=None)
    yield "unknown option", "colour", of(name, NUMBERS, labels, colour="red")


def multi_margin_refusals(name):
    for p in (0, 3, 1.5, NAN):
        yield f"p {p}", str(p), of(name, NUMBERS, LABELS, p=p)
    yield "a negative label", "-1", of(name, NUMBERS, labelled(0, -1, 2, 1))
    yield "margin that is a word", "wide", of(name, NUMBERS, LABELS, margin="wide")
    yield "weight for fewer classes", "4", of(name, NUMBERS, LABELS, weight=torch.rand(4))
    yield "weight in a column", "(5, 1)", of(name, NUMBERS, LABELS, weight=torch.rand(5, 1))
    yield "weight of another dtype", "float64", of(name, NUMBERS, LABELS, weight=torch.rand(5).double())
    yield "weight on another device", "meta", of(name, NUMBERS, LABELS, weight=ELSEWHERE[0])
    yield "weight that requires grad", "weight", of(name, NUMBERS, LABELS, weight=torch.rand(5, requires_grad=True))


def soft_margin_refusals(name):
    yield "sizes that do not broadcast", "7", of(name, NUMBERS, torch.randn(7, 5))
    yield "integer input", "int64", of(name, INTEGERS, CHANCES)
    yield "truth values", "bool", of(name, NUMBERS, NUMBERS > 0)
    yield "scalar input", "dimension", of(name, NUMBERS[0, 0], CHANCES[0, 0])
    yield "unknown reduction", "average", of(name, NUMBERS, CHANCES, reduction="average")
    yield "target on another device", "meta", of(name, NUMBERS, ELSEWHERE)
    yield "weight of another length", "4", of(name, NUMBERS, CHANCES, weight=torch.rand(4))


def refusals():
    for names, kinds in [
        (["multi_margin_loss", "multilabel_margin_loss"], margin_refusals),
        (["multi_margin_loss"], multi_margin_refusals),
        (["multilabel_soft_margin_loss"], soft_margin_refusals),
    ]:
        yield from ((name, *refusal) for name in names for refusal in kinds(name))


REFUSALS = list(refusals())


@pytest.mark.parametrize(
    "name, sentence, named, call", REFUSALS, ids=[f"{name}: {sentence}" for name, sentence, *_ in REFUSALS]
)
def test_refuses_what_torch_refuses(name, sentence, named, call):
    test_bad_input.test_refuses_what_torch_refuses_and_says_what_it_got(call, named, name, sentence)


def acceptances():
    for target in (torch.tensor(3), labelled(3)):
        for reduction in ("none", "mean", "sum"):
            end = f"{tuple(target.shape)}, {reduction}"
            yield f"unbatched scores: {end}", of("multi_margin_loss", NUMBERS[0], target, reduction=reduction)
            yield (
                f"one row of scores: {end}",
                of("multi_margin_loss", NUMBERS[:1], target, reduction=reduction, weight=CHANCES[0]),
            )
            yield f"a scalar score: {end}", of("multi_margin_loss", NUMBERS[0, 0], target * 0, reduction=reduction)
            yield (
                f"a set for a scalar score: {end}",
                of("multilabel_margin_loss", NUMBERS[0, 0], target * 0 - 1, reduction=reduction),
            )
            a_set = labelled(3, 0, -1, 4, 1)
            yield (
                f"a set for unbatched scores: {end}",
                of("multilabel_margin_loss", NUMBERS[0], a_set, reduction=reduction),
            )
            yield (
                f"a set for one score: {end}",
                of("multilabel_margin_loss", NUMBERS[0, :1], target * 0, reduction=reduction),
            )
    for margin in (2, -1.0, NAN, torch.tensor(0.5)):
        yield f"margin {margin}", of("multi_margin_loss", NUMBERS, LABELS, p=2.0, margin=margin)
    for reduction in ("none", "mean", "sum"):
        soft = "multilabel_soft_margin_loss"
        yield f"integers for classes, {reduction}", of(soft, NUMBERS, INTEGERS, reduction=reduction)
        yield f"one row of classes for all, {reduction}", of(soft, NUMBERS, CHANCES[0], reduction=reduction)
        yield f"more rows of classes, {reduction}", of(soft, NUMBERS[0], CHANCES, reduction=reduction)
        yield (
            f"a weight for each row, {reduction}",
            of(soft, NUMBERS, CHANCES, weight=CHANCES[:, :1].double(), reduction=reduction),
        )
        yield f"an image's last dimension, {reduction}", of(soft, IMAGE, IMAGE.sigmoid(), reduction=reduction)
        yield f"no rows of classes, {reduction}", of(soft, NUMBERS[:0], CHANCES[:0], reduction=reduction)
        yield f"no classes, {reduction}", of(soft, NUMBERS[:, :0], CHANCES[:, :0], reduction=reduction)


ACCEPTED = list(acceptances())


@pytest.mark.parametrize("call", [call for _, call in ACCEPTED], ids=[sentence for sentence, _ in ACCEPTED])
def test_accepts_what_torch_accepts(call):
    test_bad_input.test_accepts_what_torch_accepts_and_gives_what_it_gives(call)
