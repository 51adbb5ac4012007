"""What is refused: with torch's exception type, the rule and the offending value, before anything is read or written.

What torch accepts is not refused, and a derivative that would be wrong is not given. In the interpreter a bad shape
that gets past the host's checks ends the process.
"""

import warnings

import numpy
import pytest
import torch
from table import FIRST, SOME, TORCHS, prepared
from test_drop_in import operators

import triton_losses
from triton_losses import functional

torch.manual_seed(0)
NUMBERS, OTHERS, CHANCES = torch.randn(4, 5), torch.randn(4, 5), torch.rand(4, 5)
LABELS, BYTES = torch.tensor([0, 4, 2, 1]), torch.tensor([3, 0, 4, 1]).byte()
IMAGE, IMAGE_LABELS = torch.randn(2, 5, 3, 4), torch.ones(2, 3, 4).long()
PASSED = (NUMBERS, OTHERS, CHANCES, LABELS, BYTES, IMAGE, IMAGE_LABELS)
COPIES = [t.clone() for t in PASSED]
REGRESSIONS = ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "log_cosh_loss", "quantile_loss"]
VECTORS = ["margin_ranking_loss", "triplet_margin_loss", "triplet_margin_with_distance_loss", "cosine_embedding_loss"]
SIGNED = ["hinge_loss", "squared_hinge_loss", "perceptron_loss", "exponential_loss"]
ELEMENTWISE = [*REGRESSIONS, "binary_cross_entropy_with_logits", "sigmoid_focal_loss"]
ROWS = ["nll_loss", "cross_entropy", "focal_loss"]
INTEGERS, WHOLE, ELSEWHERE = torch.ones(4, 5).long(), torch.ones(4, 5).int(), torch.rand(4, 5, device="meta")
LABELS_ELSEWHERE = torch.zeros(4, device="meta").long()
NAN = float("nan")


def of(name, *tensors, **options):
    """The call, of whichever module has the function."""
    return lambda module: getattr(module, name)(*tensors, **options)


def labelled(*labels):
    return torch.tensor(labels)


def elementwise_refusals(name):
    yield "sizes that do not broadcast", "7", of(name, torch.randn(3, 4), torch.randn(7, 4))
    yield "unknown reduction", "average", of(name, NUMBERS, CHANCES, reduction="average")
    yield "no reduction", "None", of(name, NUMBERS, CHANCES, reduction=None)
    yield "reduction of another loss", "batchmean", of(name, NUMBERS, CHANCES, reduction="batchmean")
    yield "target on another device", "meta", of(name, NUMBERS, ELSEWHERE)
    yield "input on another device", "meta", of(name, ELSEWHERE, NUMBERS)
    yield "integers", "int64", of(name, INTEGERS, INTEGERS)
    yield "truth values", "bool", of(name, NUMBERS > 0, NUMBERS > 0)
    yield "eight-bit numbers", "float8", of(name, CHANCES.to(torch.float8_e4m3fn), CHANCES.to(torch.float8_e4m3fn))
    if name != "l1_loss":  # whose torch takes complex numbers
        yield "complex input", "complex64", of(name, NUMBERS + 0j, CHANCES)
    if name in ("smooth_l1_loss", "huber_loss", "log_cosh_loss"):
        yield "complex target", "complex64", of(name, NUMBERS, CHANCES + 0j)
    if name in ("huber_loss", "binary_cross_entropy_with_logits", "sigmoid_focal_loss"):
        yield "integer input", "int64", of(name, INTEGERS, CHANCES)
    yield "unknown option", "colour", of(name, NUMBERS, CHANCES, colour="red")


def weighted_refusals(name):
    yield "weight of another length", "3", of(name, NUMBERS, OTHERS, weight=torch.rand(4, 3))
    yield "weight that would broadcast", "(5,)", of(name, NUMBERS, OTHERS, weight=torch.rand(5))
    yield "weight on another device", "meta", of(name, NUMBERS, OTHERS, weight=ELSEWHERE)
    yield "unknown reduction beside a weight", "average", of(name, NUMBERS, OTHERS, weight=CHANCES, reduction="average")


def binary_refusals(name):
    yield "sizes that would broadcast", "torch.Size([5])", of(name, NUMBERS, CHANCES[0])
    yield "integer target", "int64", of(name, NUMBERS, INTEGERS)
    yield "weight that requires grad", "weight", of(name, NUMBERS, CHANCES, weight=torch.rand(5, requires_grad=True))
    yield "weight that enlarges the input", "(2, 4, 5)", of(name, NUMBERS, CHANCES, weight=torch.rand(2, 4, 5))
    yield "weight of another length", "(3,)", of(name, NUMBERS, CHANCES, weight=torch.rand(3))
    yield "weight on another device", "meta", of(name, NUMBERS, CHANCES, weight=ELSEWHERE)
    yield "pos_weight of another length", "(4,)", of(name, NUMBERS, CHANCES, pos_weight=torch.rand(4))
    yield "pos_weight on another device", "meta", of(name, NUMBERS, CHANCES, pos_weight=ELSEWHERE)
    yield "pos_weight that is a number", "2.0", of(name, NUMBERS, CHANCES, pos_weight=2.0)


def signed_refusals(name):
    yield "sizes that would broadcast", "torch.Size([5])", of(name, NUMBERS, CHANCES[0].round() * 2 - 1)
    yield "integer input", "int64", of(name, INTEGERS, INTEGERS)
    yield "unknown reduction", "average", of(name, NUMBERS, INTEGERS, reduction="average")
    for label in (0.0, 2.0, NAN):
        yield (
            f"label {label}",
            str(label),
            of(name, NUMBERS, torch.full((4, 5), -1.0).index_fill(1, torch.tensor([3]), label)),
        )


def chance_refusals(name):
    yield "sizes that would broadcast", "torch.Size([5])", of(name, CHANCES, CHANCES[0])
    yield "integers", "int64", of(name, INTEGERS, INTEGERS)
    yield "integer target", "int64", of(name, CHANCES, INTEGERS)
    yield "weight that requires grad", "weight", of(name, CHANCES, CHANCES, weight=torch.rand(5, requires_grad=True))
    yield "weight that enlarges the input", "(2, 4, 5)", of(name, CHANCES, CHANCES, weight=torch.rand(2, 4, 5))
    yield "unknown reduction", "average", of(name, CHANCES, CHANCES, reduction="average")
    for value in (-0.5, 1.5, NAN):
        yield f"input {value}", "input", of(name, CHANCES.index_fill(1, torch.tensor([3]), value), CHANCES)
        yield f"target {value}", "target", of(name, CHANCES, CHANCES.index_fill(1, torch.tensor([3]), value))


def remaining_refusals(name):
    """Of losses whose tensors broadcast without a word."""
    more = (CHANCES,) if name == "gaussian_nll_loss" else ()
    yield "sizes that do not broadcast", "7", of(name, NUMBERS, torch.randn(7, 5), *more)
    yield "unknown reduction", "average", of(name, NUMBERS, CHANCES, *more, reduction="average")
    yield "target on another device", "meta", of(name, NUMBERS, ELSEWHERE, *more)
    yield "unknown option", "colour", of(name, NUMBERS, CHANCES, *more, colour="red")


def vector_refusals(name):
    third = LABELS if name == "cosine_embedding_loss" else OTHERS
    yield "sizes that do not broadcast", "7", of(name, NUMBERS, torch.randn(7, 5), third)
    yield "vectors of other lengths", "3", of(name, NUMBERS, torch.randn(4, 3), third)
    yield "other dimensions", "", of(name, NUMBERS, OTHERS[0], third)
    yield "other dimensions of the third", "", of(name, NUMBERS, OTHERS, IMAGE)
    yield "unknown reduction", "average", of(name, NUMBERS, OTHERS, third, reduction="average")
    yield "no reduction", "None", of(name, NUMBERS, OTHERS, third, reduction=None)
    yield "vectors on another device", "meta", of(name, NUMBERS, ELSEWHERE, third)
    yield "the third on another device", "meta", of(name, NUMBERS, OTHERS, third.to("meta"))
    yield "unknown option", "colour", of(name, NUMBERS, OTHERS, third, colour="red")
    if "triplet" in name:
        for margin in (0.0, -1.0):
            yield f"margin {margin}", str(margin), of(name, NUMBERS, OTHERS, third, margin=margin)


def row_refusals(name):
    yield "fewer labels than rows", "(3)", of(name, NUMBERS, LABELS[:3])
    yield "more labels than rows", "(6)", of(name, NUMBERS, labelled(0, 1, 2, 3, 4, 0))
    yield "no labels at all", "(0)", of(name, NUMBERS, LABELS[:0])
    yield "a scalar label for rows", "scalar", of(name, NUMBERS, torch.tensor(1))
    yield "a scalar label for one row", "scalar", of(name, NUMBERS[:1], torch.tensor(1))
    yield "labels in a column", "", of(name, NUMBERS, LABELS[:, None])
    yield "labels in the input's shape", "", of(name, NUMBERS, INTEGERS)
    yield "two labels for unbatched logits", "2", of(name, NUMBERS[0], LABELS[:2])
    yield "a label in a matrix for unbatched logits", "(1, 1)", of(name, NUMBERS[0], labelled([1]))
    yield "an image's labels turned", "[2, 4, 3]", of(name, IMAGE, IMAGE_LABELS.transpose(1, 2))
    yield "an image's labels flattened", "[2, 12]", of(name, IMAGE, IMAGE_LABELS.flatten(1))
    yield "an image's labels too few", "[2]", of(name, IMAGE, IMAGE_LABELS[:, 0, 0])
    yield "an image's labels with a channel", "[2, 1, 3, 4]", of(name, IMAGE, IMAGE_LABELS[:, None])
    yield "another batch of images", "(1)", of(name, IMAGE, IMAGE_LABELS[:1])
    yield (
        "a volume's labels too few",
        "[2, 3, 4, 1]",
        of(name, IMAGE[..., None].repeat(1, 1, 1, 1, 2), IMAGE_LABELS[..., None]),
    )
    yield "a label above the classes", "5", of(name, NUMBERS, labelled(0, 5, 2, 1))
    yield "a label far above the classes", "1099511627776", of(name, NUMBERS, labelled(0, 2**40, 2, 1))
    yield "a negative label", "-1", of(name, NUMBERS, labelled(0, -1, 2, 1))
    yield "a label ignored by default, but not now", "-100", of(name, NUMBERS, labelled(0, -100, 2, 1), ignore_index=2)
    yield "a label above the classes in a byte", "255", of(name, NUMBERS, labelled(0, 255, 2, 1).byte())
    yield "a label above an image's classes", "7", of(name, IMAGE, IMAGE_LABELS * 7)
    yield "a label beside ignored ones", "9", of(name, NUMBERS, labelled(-100, -100, 9, -100))
    yield "a label where there are no classes", "0", of(name, NUMBERS[:, :0], torch.zeros(4).long())
    yield "labels of 32 bits", "int32", of(name, NUMBERS, LABELS.int())
    yield "labels that are truth values", "bool", of(name, NUMBERS, LABELS > 1)
    yield "labels that are numbers", "", of(name, NUMBERS, LABELS.float())
    yield "labels in a list", "[0, 4, 2, 1]", of(name, NUMBERS, [0, 4, 2, 1])
    yield "integer logits", "int64", of(name, INTEGERS, LABELS)
    yield "truth values for logits", "bool", of(name, NUMBERS > 0, LABELS)
    yield "complex logits", "complex64", of(name, NUMBERS + 0j, LABELS)
    yield "eight-bit logits", "float8", of(name, CHANCES.to(torch.float8_e4m3fn), LABELS)
    yield "labels on another device", "meta", of(name, NUMBERS, LABELS_ELSEWHERE)
    yield "logits on another device", "meta", of(name, ELSEWHERE, LABELS)
    yield "weight on another device", "meta", of(name, NUMBERS, LABELS, weight=ELSEWHERE[0])
    yield "weight for fewer classes", "(4,)", of(name, NUMBERS, LABELS, weight=torch.rand(4))
    yield "weight for more classes", "(6,)", of(name, NUMBERS, LABELS, weight=torch.rand(6))
    yield "weight in a row", "(1, 5)", of(name, NUMBERS, LABELS, weight=torch.rand(1, 5))
    yield "weight for an image's columns", "(4,)", of(name, IMAGE, IMAGE_LABELS, weight=torch.rand(4))
    yield "integer weight", "int64", of(name, NUMBERS, LABELS, weight=INTEGERS[0])
    yield "weight that requires grad", "weight", of(name, NUMBERS, LABELS, weight=torch.rand(5, requires_grad=True))
    yield "unknown reduction", "average", of(name, NUMBERS, LABELS, reduction="average")
    yield "no reduction", "None", of(name, NUMBERS, LABELS, reduction=None)
    yield "ignore_index between integers", "1.5", of(name, NUMBERS, LABELS, ignore_index=1.5)
    yield "no ignore_index", "None", of(name, NUMBERS, LABELS, ignore_index=None)


def refusals():
    """(function, sentence, what the message names, call)."""
    for names, kinds in [
        (ELEMENTWISE, elementwise_refusals),
        (ROWS, row_refusals),
        (["binary_cross_entropy_with_logits"], binary_refusals),
        (["mse_loss", "l1_loss", "huber_loss"], weighted_refusals),
        (SIGNED, signed_refusals),
        (["binary_cross_entropy"], chance_refusals),
        (["gaussian_nll_loss", "poisson_nll_loss", "soft_margin_loss", "hinge_embedding_loss"], remaining_refusals),
        (VECTORS, vector_refusals),
    ]:
        yield from ((name, *refusal) for name in names for refusal in kinds(name))
    for value in (0, -1.5, NAN):
        yield "huber_loss", f"delta {value}", str(value), of("huber_loss", NUMBERS, OTHERS, delta=value)
    odd = [(torch.rand(shape), str(shape)) for shape in ((5,), (1, 1), (4, 4))]
    for var, named in [(-0.5, "-0.5"), (CHANCES - 9, ">= 0"), *odd]:
        yield "gaussian_nll_loss", f"var {named}", named, of("gaussian_nll_loss", NUMBERS, OTHERS, var)
    yield "soft_margin_loss", "larger target", "(4, 5)", of("soft_margin_loss", NUMBERS[0], OTHERS)
    for value in (-0.5, NAN):
        yield "smooth_l1_loss", f"beta {value}", str(value), of("smooth_l1_loss", NUMBERS, OTHERS, beta=value)
    for sentence, target in [("labels", LABELS), ("probabilities", CHANCES)]:
        yield (
            "cross_entropy",
            f"smoothing above 1 of {sentence}",
            "1.25",
            of("cross_entropy", NUMBERS, target, label_smoothing=1.25),
        )
    for sentence, named, target, options in [
        ("probabilities of other classes", "", CHANCES[:, :3], {}),
        ("probabilities of other rows", "", CHANCES[:3], {}),
        ("probabilities to ignore", "ignore_index", CHANCES, {"ignore_index": 2}),
        ("probabilities elsewhere", "meta", ELSEWHERE, {}),
        ("complex probabilities", "", CHANCES + 0j, {}),
        ("weight for fewer classes of probabilities", "[4]", CHANCES, {"weight": torch.rand(4)}),
    ]:
        yield "cross_entropy", sentence, named, of("cross_entropy", NUMBERS, target, **options)


REFUSALS = [(call, named, name, sentence) for name, sentence, named, call in refusals()]
IDS = [f"{name}: {sentence}" for _, _, name, sentence in REFUSALS]


def refusal_of(call, module):
    with pytest.raises(Exception) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(module)
    return caught.value


@pytest.mark.parametrize("call, named, name, sentence", REFUSALS, ids=IDS)
def test_refuses_what_torch_refuses_and_says_what_it_got(call, named, name, sentence):
    error = refusal_of(call, functional)
    assert named in str(error)
    assert all(torch.equal(t, copy) and t._version == 0 for t, copy in zip(PASSED, COPIES, strict=True))
    if hasattr(torch.nn.functional, name):
        torchs = refusal_of(call, torch.nn.functional)
        assert isinstance(error, type(torchs)), f"torch: {torchs!r}, ours: {error!r}"
    else:
        assert isinstance(error, (ValueError, RuntimeError, IndexError, TypeError)) and not isinstance(
            error, torch.AcceleratorError
        )


@pytest.mark.parametrize("name", TORCHS)
def test_pytorchs_own_error_samples_are_refused_as_torch_refuses_them(name):
    for op in (op for op in operators(name) if op.error_inputs_func):
        for error in op.error_inputs("cpu"):
            sample = error.sample_input
            with pytest.raises(error.error_type):
                getattr(functional, name)(sample.input, *sample.args, **sample.kwargs)


REFUSED_WHEN_MADE = {
    "TripletMarginLoss": {"margin": -1.0},
    "TripletMarginWithDistanceLoss": {"margin": 0},
    "MultiMarginLoss": {"p": 3},
}


@pytest.mark.parametrize("name", REFUSED_WHEN_MADE)
def test_a_module_refuses_options_when_torchs_does(name):
    ((option, value),) = REFUSED_WHEN_MADE[name].items()
    for package in (torch.nn, triton_losses):
        with pytest.raises(ValueError, match=str(value) if package is triton_losses else ""):
            getattr(package, name)(**{option: value})


OURS = [
    (ValueError, "-0.1", of("cross_entropy", NUMBERS, LABELS, z_loss=-0.1)),
    (ValueError, "nan", of("cross_entropy", NUMBERS, LABELS, z_loss=NAN)),
    # torch passes over it in silence
    (RuntimeError, "-0.1", of("cross_entropy", NUMBERS, LABELS, label_smoothing=-0.1)),
    (RuntimeError, "nan", of("cross_entropy", NUMBERS, LABELS, label_smoothing=NAN)),
    (TypeError, "int64", of("cross_entropy", NUMBERS, LABELS, out_dtype=torch.int64)),
    (TypeError, "'float32'", of("cross_entropy", NUMBERS, LABELS, out_dtype="float32")),
    (TypeError, "complex64", of("cross_entropy", NUMBERS, CHANCES, out_dtype=torch.complex64)),
    (ValueError, "-1", of("focal_loss", NUMBERS, LABELS, gamma=-1)),
    (ValueError, "nan", of("focal_loss", NUMBERS, LABELS, gamma=NAN)),
    (ValueError, "-0.5", of("sigmoid_focal_loss", NUMBERS, CHANCES, gamma=-0.5)),
    (ValueError, "1.5", of("sigmoid_focal_loss", NUMBERS, CHANCES, alpha=1.5)),
    (ValueError, "nan", of("sigmoid_focal_loss", NUMBERS, CHANCES, alpha=NAN)),
    (ValueError, "torch.Size([5])", of("sigmoid_focal_loss", NUMBERS, CHANCES[0])),
    (ValueError, "torch.Size([3])", of("sigmoid_focal_loss", NUMBERS, LABELS[:3])),
    (ValueError, "torch.Size([4])", of("sigmoid_focal_loss", NUMBERS, LABELS > 1)),
    (IndexError, "5", of("sigmoid_focal_loss", NUMBERS, labelled(0, 5, 2, 1))),
    (IndexError, "-1", of("sigmoid_focal_loss", NUMBERS, labelled(0, -1, 2, 1), background=5)),
    (IndexError, "-2", of("sigmoid_focal_loss", NUMBERS, labelled(0, -1, -2, 1))),
    (TypeError, "None", of("sigmoid_focal_loss", NUMBERS, LABELS, background=None)),
    (RuntimeError, "meta", of("sigmoid_focal_loss", NUMBERS, LABELS_ELSEWHERE)),
    (ValueError, "-0.5", of("sigmoid_focal_loss", NUMBERS, LABELS, gamma=-0.5)),
    (ValueError, "average", of("sigmoid_focal_loss", NUMBERS, LABELS, reduction="average")),
    (ValueError, "1.5", of("quantile_loss", NUMBERS, OTHERS, 1.5)),
    (ValueError, "nan", of("quantile_loss", NUMBERS, OTHERS[:, 0], (0.1, NAN))),
    (ValueError, "(4, 5)", of("quantile_loss", NUMBERS, OTHERS, [0.5])),
    (ValueError, "(4, 5)", of("multi_quantile_loss", NUMBERS, OTHERS[:, 0])),
    (RuntimeError, "-2", lambda _: triton_losses.HuberLoss(delta=-2)(NUMBERS, OTHERS)),
    (RuntimeError, "(3,)", lambda _: triton_losses.CrossEntropyLoss(torch.rand(3))(NUMBERS, LABELS)),
    (ValueError, "average", lambda _: triton_losses.FocalLoss(reduction="average")),
    (TypeError, "colour", lambda _: triton_losses.MSELoss(colour="red")),
    (TypeError, "size_average", lambda _: triton_losses.FocalLoss(size_average=True)),
    (ValueError, "torch.Size([5])", lambda _: triton_losses.BCEWithLogitsLoss()(NUMBERS, CHANCES[0])),
]


@pytest.mark.parametrize("kind, named, call", OURS, ids=[f"{kind.__name__} {named}" for kind, named, _ in OURS])
def test_refuses_what_breaks_its_own_rules(kind, named, call):
    with pytest.raises(kind) as caught:
        call(functional)
    assert named in str(caught.value)


def acceptances():
    """(sentence, call): unusual, and fine with torch."""
    yield "bytes for labels", of("cross_entropy", NUMBERS, BYTES)
    yield "bytes for labels, 255 ignored", of("cross_entropy", NUMBERS, labelled(0, 255, 2, 1).byte(), ignore_index=255)
    for name, options in [("nll_loss", {}), ("cross_entropy", {}), ("cross_entropy", {"label_smoothing": 0.1})]:
        for reduction in ("none", "mean", "sum"):
            more = {**options, "reduction": reduction}
            end = ", ".join(map(str, (name, *more.values())))
            yield f"unbatched logits: {end}", of(name, NUMBERS[0], torch.tensor(3), **more)
            yield f"unbatched logits of one class: {end}", of(name, NUMBERS[0, :1], torch.tensor(0), **more)
            yield f"no rows: {end}", of(name, NUMBERS[:0], LABELS[:0], **more)
            yield f"no pixels: {end}", of(name, IMAGE[:, :, :0], IMAGE_LABELS[:, :0], **more)
            yield f"all ignored: {end}", of(name, NUMBERS, torch.full((4,), 77), ignore_index=77, **more)
            if not options:  # torch smooths neither
                yield f"no classes, all ignored: {end}", of(name, NUMBERS[:, :0], torch.full((4,), -100), **more)
                yield f"a batch of one label for unbatched logits: {end}", of(name, NUMBERS[0], labelled(3), **more)
    yield (
        "no weight on any label",
        of("cross_entropy", NUMBERS, torch.zeros(4).long(), weight=torch.tensor([0.0, 1, 1, 1, 1])),
    )
    yield "a negative class weight", of("cross_entropy", NUMBERS, LABELS, weight=torch.tensor([1.0, 1, -3, 1, 1]))
    yield "NumPy's integers", of("cross_entropy", NUMBERS, LABELS, ignore_index=numpy.int64(2))
    yield "ignore_index far away", of("cross_entropy", NUMBERS, labelled(0, -(2**40), 2, 1), ignore_index=-(2**40))
    yield (
        "an infinite logit that is masked",
        of("cross_entropy", NUMBERS.masked_fill(NUMBERS > 9, -float("inf")), LABELS),
    )
    yield (
        "nan in an ignored row",
        of("cross_entropy", torch.cat([NUMBERS, NUMBERS[:1] * NAN]), labelled(0, 4, 2, 1, -100)),
    )
    yield "smoothing by 1", of("cross_entropy", NUMBERS, LABELS, label_smoothing=1)
    yield "probabilities in double", of("cross_entropy", NUMBERS, CHANCES.double())
    yield "unbatched probabilities", of("cross_entropy", NUMBERS[0], CHANCES[0])
    yield "probabilities of no class", of("cross_entropy", NUMBERS[:, :0], CHANCES[:, :0])
    yield "an image's probabilities", of("cross_entropy", IMAGE, IMAGE.softmax(1), label_smoothing=0.1)
    for name in ("mse_loss", "l1_loss", "smooth_l1_loss"):
        yield f"integers against numbers: {name}", of(name, INTEGERS, NUMBERS)
        yield f"numbers against integers: {name}", of(name, NUMBERS, INTEGERS)
        yield f"a number against integers: {name}", of(name, torch.tensor(1.5), WHOLE)
        yield f"nothing: {name}", of(name, NUMBERS[:0], OTHERS[:0])
        yield f"nothing against one row: {name}", of(name, NUMBERS[:0], OTHERS[:1])
    for beta in (0, 1e-40, 1e-37, 1e30, float("inf")):
        yield (
            f"beta {beta}",
            of(
                "smooth_l1_loss",
                torch.cat([NUMBERS, OTHERS]),
                torch.cat([NUMBERS, NUMBERS]),
                beta=beta,
                reduction="none",
            ),
        )
    for delta in (1e-30, 1e30, float("inf"), torch.tensor(0.5)):
        yield (
            f"delta {delta}",
            of(
                "huber_loss", torch.cat([NUMBERS, OTHERS]), torch.cat([NUMBERS, NUMBERS]), delta=delta, reduction="none"
            ),
        )
    full = {"full": True}
    for name, options in [
        ("poisson_nll_loss", {}),
        ("poisson_nll_loss", full),
        ("hinge_embedding_loss", {}),
        ("soft_margin_loss", {}),
    ]:
        end = ", ".join((name, *options))
        yield f"numbers against integers: {end}", of(name, NUMBERS, INTEGERS, **options)
        yield f"a column beside each number: {end}", of(name, NUMBERS, OTHERS[:, :1], reduction="none", **options)
    yield "a larger target of hinge_embedding_loss", of("hinge_embedding_loss", NUMBERS[0], OTHERS, reduction="none")
    for var in (0.0, 0.3, NAN, CHANCES[:, 0], CHANCES[:, :1], CHANCES[:1], CHANCES.double()):
        shape = tuple(var.shape) if isinstance(var, torch.Tensor) else var
        yield f"var {shape}", of("gaussian_nll_loss", NUMBERS, OTHERS, var, reduction="none", full=True)
    yield "certain chances", of("binary_cross_entropy", CHANCES.round(), CHANCES, reduction="none")
    for weight in (CHANCES[:, :1], CHANCES.bfloat16(), CHANCES.double()):
        yield (
            f"chances weighted by {weight.dtype}, {weight.shape}",
            of("binary_cross_entropy", CHANCES, CHANCES, weight=weight),
        )
    yield (
        "seven dimensions",
        of("mse_loss", NUMBERS.view(2, 1, 2, 1, 5, 1, 1), OTHERS.view(2, 1, 2, 1, 5, 1, 1), reduction="none"),
    )
    yield "targets that are no chances", of("binary_cross_entropy_with_logits", NUMBERS, 3 * OTHERS)
    yield "a scalar pos_weight", of("binary_cross_entropy_with_logits", NUMBERS, CHANCES, pos_weight=torch.tensor(2.0))
    yield (
        "a pos_weight for each number",
        of("binary_cross_entropy_with_logits", NUMBERS, CHANCES, pos_weight=OTHERS.exp()),
    )
    yield "an integer pos_weight", of("binary_cross_entropy_with_logits", NUMBERS, CHANCES, pos_weight=INTEGERS[0])
    yield "a weight for each row", of("binary_cross_entropy_with_logits", NUMBERS, CHANCES, weight=CHANCES[:, :1])


ACCEPTED = list(acceptances())


@pytest.mark.parametrize("call", [call for _, call in ACCEPTED], ids=[sentence for sentence, _ in ACCEPTED])
def test_accepts_what_torch_accepts_and_gives_what_it_gives(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, torchs = call(functional), call(torch.nn.functional)
    torch.testing.assert_close(ours, torchs, equal_nan=True)


@pytest.mark.parametrize("name", [*ELEMENTWISE, *ROWS])
def test_an_upstream_gradient_of_another_shape_is_refused(name):
    input = NUMBERS.clone().requires_grad_()
    loss = getattr(functional, name)(input, LABELS if name in ROWS else CHANCES, reduction="none")
    with pytest.raises(RuntimeError, match="[Mm]ismatch in shape"):
        loss.backward(torch.ones(3))
    assert input.grad is None


NOT_READ_AGAIN = ("logits_and_probabilities", "lovasz_loss")
# two views are joined; a positive beside stored negatives meets its query alone
NOT_READ_AGAIN += ("nt_xent_loss", "queries_keys_and_negatives", "queries_keys_and_their_negatives")
READ_AGAIN = [
    c for c in SOME if not {c.draw.__name__, c.name} & {*NOT_READ_AGAIN} and "distance_function" not in c.options
]


@pytest.mark.parametrize("case", READ_AGAIN, ids=str)
def test_a_tensor_overwritten_before_the_backward_is_noticed(case, device):
    """Input, target, and the tensors among the options: the backward reads them all again. (Lovász's reads what was
    sorted.)
    """
    tensors, options = case.arguments(case.shape(6, 5))
    for which in range(len(tensors) + sum(isinstance(option, torch.Tensor) for option in options.values())):
        tensors, options = case.arguments(case.shape(6, 5), torch.float32, device)
        loss = getattr(functional, case.name)(tensors[0].requires_grad_(), *tensors[1:], **options).sum()
        [*tensors, *(option for option in options.values() if isinstance(option, torch.Tensor))][which].detach().zero_()
        if options.get("shift") and which == len(tensors) - 1:  # labels that are shifted are copied
            loss.backward()
            continue
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("case", FIRST.values(), ids=str)
def test_forward_mode_is_right_or_refused_aloud(case, device):
    loss, (input, *rest) = prepared(case, device, reduction="mean")
    direction = torch.randn_like(input)
    with torch.autograd.forward_ad.dual_level():
        try:
            value = loss(torch.autograd.forward_ad.make_dual(input.detach(), direction), *(t.detach() for t in rest))
        except NotImplementedError as error:
            assert "forward mode" in str(error) or "forward AD" in str(error)  # ours or ATen's
        else:  # torch's own function served it
            tangent = torch.autograd.forward_ad.unpack_dual(value).tangent
            torch.testing.assert_close(tangent, (torch.autograd.grad(loss(input, *rest), input)[0] * direction).sum())


@pytest.mark.parametrize("name", REGRESSIONS)
def test_sizes_that_differ_draw_torchs_warning_where_they_were_written(name):
    with pytest.warns(UserWarning) as caught:
        getattr(functional, name)(NUMBERS, OTHERS[0])
        torch.nn.functional.mse_loss(NUMBERS, OTHERS[0])
    ours, torchs = (warning for warning in caught if warning.category is UserWarning)  # numpy has one of Triton 3.6
    assert str(ours.message) == str(torchs.message) and ours.filename == __file__
