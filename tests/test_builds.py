"""Every kernel builds for GPUs that this machine does not have: without spills, with 16-byte accesses, with 64-bit
offsets.

The interpreter checks what kernels compute and says nothing about how they compile; this is the other half, without a
GPU. Where there is one, the other tests build the kernels for it.
"""

import re

import pytest
import torch

pytest.importorskip("triton", reason="kernels need Triton, which is not installed")

from triton import knobs

from bench.machine_code import accesses, loops_of, machine_loops, spills_in_loops
from bench.offline_build import OWN_CACHE, TARGETS, building
from reference.cases import CASES
from reference.cases.classification import logits_and_probabilities
from triton_losses import functional
from triton_losses.families import sharded_rows

pytestmark = [
    pytest.mark.not_interpreted,
    pytest.mark.builds,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the other tests build the kernels for"),
]

COLUMNS = (128256, 50257)  # rows of whole 16-byte vectors, and rows that start anywhere
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
COUNTS = (2**31 + 1, 2**31 + 16)  # Triton compiles another kernel for multiples of 16
# bytes stored and loaded (AMD: registers): at times a compiler parks a few registers outside the loops
PARKED = {True: 32, False: 16}
PLAIN_TORCH = [case for case in CASES if case.draw is logits_and_probabilities or "distance_function" in case.options]
KERNEL_CASES = [
    case for case in CASES if not case.note and case not in PLAIN_TORCH and not case.classes
]  # images: test_builds_segmentation.py


def call(case, rows, columns, dtype):
    """Forward and backward, by a mean; the numbers are meaningless."""
    tensors, options = case.arguments(case.shape(rows, columns), dtype, reduction="mean")
    leaves = [t.requires_grad_(i < case.differentiable and t.is_floating_point()) for i, t in enumerate(tensors)]
    getattr(functional, case.name)(*leaves, **options).sum().backward()


def huber(dtype, n=9999):
    """Odd on purpose: n is no multiple of anything."""
    input, target = torch.zeros(n, dtype=dtype, requires_grad=True), torch.zeros(n, dtype=dtype, requires_grad=True)
    functional.huber_loss(input, target).backward()


def cross_entropy(dtype, columns=1000, rows=3):
    logits = torch.zeros(rows, columns, dtype=dtype, requires_grad=True)
    functional.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64)).backward()


def triplet(dtype, columns=1000, rows=3):
    vectors = [torch.zeros(rows, columns, dtype=dtype, requires_grad=True) for _ in range(3)]
    functional.triplet_margin_loss(*vectors).backward()


def in_one_pass(name, dtype, columns, rows=3):
    """The loss and its gradient in the forward."""
    logits = torch.zeros(rows, columns, dtype=dtype, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64)
    getattr(functional, name)(logits, labels, gradient_in_forward=True).backward()


def cosine(dtype, columns, rows=3):
    vectors = [torch.zeros(rows, columns, dtype=dtype, requires_grad=True) for _ in range(2)]
    functional.cosine_embedding_loss(*vectors, torch.ones(rows)).backward()


def entropy(dtype, columns, rows=3):
    logits = torch.zeros(rows, columns, dtype=dtype, requires_grad=True)
    sum(
        functional.log_probs(logits, torch.zeros(rows, dtype=torch.int64), softcap=3.0, return_entropy=True)
    ).sum().backward()


def head_entropy(dtype, columns, rows=3):
    hidden, weight = torch.zeros(rows, 4, dtype=dtype, requires_grad=True), torch.zeros(columns, 4, dtype=dtype)
    sum(
        functional.linear_log_probs(
            hidden, weight, torch.zeros(rows, dtype=torch.int64), temperature=0.7, return_entropy=True
        )
    ).sum().backward()


def head_statistics(dtype, columns, rows=3):
    hidden, weight = torch.zeros(rows, 4, dtype=dtype, requires_grad=True), torch.zeros(columns, 4, dtype=dtype)
    functional.linear_cross_entropy(
        hidden, weight, torch.zeros(rows, dtype=torch.int64), softcap=3.0, z_loss=0.1, return_stats=True
    )


def part_of_classes(dtype, columns, problem, rows=3):
    """A process' shard of the classes, weighted, as families/sharded_rows.py reads it."""
    tensors = [torch.zeros(rows, columns, dtype=dtype), torch.zeros(rows, dtype=torch.int64), None]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if problem.mean:
        tensors[2] = torch.ones(columns, dtype=wide)
    _, saved, _ = sharded_rows.sharded_rows_forward(tensors, problem)
    operands = [torch.zeros(rows, dtype=wide) for _ in range(3 if problem.mean or problem.entropy else 2)]
    sharded_rows.sharded_rows_backward(tensors, saved, operands, problem)


def ctc(dtype, labels, classes=1001, samples=3):
    logits = torch.zeros(7, samples, classes, dtype=dtype, requires_grad=True)
    targets, lengths = torch.ones(samples, labels, dtype=torch.int64), (torch.full((samples,), n) for n in (7, labels))
    functional.ctc_loss_with_logits(logits, targets, *lengths).backward()


def of_one_row_of(name, labels, dtype, columns, rows=3):
    """A loss of (rows, columns) and, as labels say, a label, a set of labels or chances for each row."""
    shapes = {
        "label": ((rows,), torch.int64),
        "set": ((rows, columns), torch.int64),
        "chances": ((rows, columns), dtype),
    }
    shape, kind = shapes[labels]
    getattr(functional, name)(
        torch.zeros(rows, columns, dtype=dtype, requires_grad=True), torch.zeros(shape, dtype=kind)
    ).backward()


def head_distillation(dtype, columns, rows=3, **options):
    hidden, weight = torch.zeros(rows, 4, dtype=dtype, requires_grad=True), torch.zeros(columns, 4, dtype=dtype)
    functional.linear_distillation_loss(hidden, weight, hidden.detach(), weight, **options)


FAMILY_LOSSES = {"elementwise": huber, "label_rows": cross_entropy}


def built(name, call, *args, finish=False, **options):
    """What a call builds; without the kernel that adds up the losses, unless that is wanted."""
    with building(name) as builds:
        call(*args, **options)
    for build in builds:
        assert build.kernel.metadata.target == TARGETS[name]
        assert build.spills <= PARKED[name.startswith("sm_")], (
            f"{build} spills {build.spills}, with {build.registers} registers"
        )
        assert not build.spills or not spills_in_loops(build), f"{build} spills in a loop"
    return [build for build in builds if finish or build.kernel.name != "finish"]


def forward_and_backward(name, call, *args, passes=("forward", "backward"), **options):
    builds = built(name, call, *args, **options)
    names = [build.kernel.name for build in builds]
    assert len(names) == len(passes) and all(f"_{which}_" in f"_{name}_" for which, name in zip(passes, names)), names
    return builds


def test_builds_keep_to_their_own_cache_wherever_a_program_keeps_its_kernels(tmp_path):
    """A kernel that another process compiled would have no report of registers and spills."""
    with knobs.cache.scope():
        knobs.cache.dir = str(tmp_path)
        with building("sm_90"):
            assert knobs.cache.dir == OWN_CACHE.name
        assert knobs.cache.dir == str(tmp_path)


# of each loss, in every dtype; other options in the one trained in
FIRST = {case.name: case for case in reversed(KERNEL_CASES)}.values()
BUILDS = [(case, dtype) for case in KERNEL_CASES for dtype in DTYPES if case in FIRST or dtype == torch.bfloat16]


@pytest.mark.parametrize("case, dtype", BUILDS, ids=str)
def test_every_loss_builds_forward_and_backward_without_spills(case, dtype):
    forward_and_backward("sm_90", call, case, 60, 1001, dtype, passes=passes_of(case))


def passes_of(case):
    """Which kernels a case launches, in their order."""
    if case.name == "linear_distillation_loss":  # a teacher's top-k: the classes named, and the rest of them
        kernels = 2 if "teacher_ids" in case.options and case.options.get("tail", True) else 1
        return ("forward",) * kernels + ("backward",) * kernels
    if case.pairwise:
        merges = 2 if case.name == "clip_loss" else 1  # of rows, and of columns
        paired = case.options.get("negative_mode") == "paired"  # plain PyTorch
        return () if paired else ("statistics", *("merge",) * merges, "gradient")
    if case.steps:
        return ("forward",) * (3 if case.name.endswith("logits") else 2) + ("backward",)
    if "gradient_in_forward" in case.options:
        return ("mean_factor", "both", "scale_rows")
    # the gradient is made beside a reduced loss
    return ("both",) if case.features and case.reduces else ("forward", "backward")


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(
    "columns, dtype", [(1001, torch.float64), (1001, torch.bfloat16), (128256, torch.bfloat16), (128256, torch.float32)]
)
def test_entropies_and_gradients_in_place_build_without_spills(columns, dtype, name):
    forward_and_backward(name, entropy, dtype, columns)
    forward_and_backward(name, head_entropy, dtype, columns)
    forward_and_backward(name, head_statistics, dtype, columns, passes=("both",))


PARTS = ({}, {"mean": True}, {"entropy": True, "softcap": 3.0}, {"scale": 0.7, "likeliest": True})


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("options", PARTS, ids=str)
@pytest.mark.parametrize("columns, dtype", [(1001, torch.float64), (32064, torch.bfloat16), (32000, torch.float32)])
def test_a_part_of_the_classes_builds_without_spills(columns, dtype, options, name):
    forward_and_backward(name, part_of_classes, dtype, columns, sharded_rows.Problem(**options))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("loss", ["cross_entropy", "focal_loss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", [1001, 50257, 128256])
def test_a_gradient_made_in_the_forward_builds_without_spills(columns, dtype, loss, name):
    factor, rows, scaling = built(name, in_one_pass, loss, dtype, columns)
    assert [factor.kernel.name, scaling.kernel.name] == ["mean_factor", "scale_rows"] and "_both_" in rows.kernel.name


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("direction", ["forward", "jsd"])
def test_a_students_gradient_in_place_builds_without_spills(direction, name):
    forward_and_backward(name, head_distillation, torch.bfloat16, 128256, direction=direction)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("family", FAMILY_LOSSES)
def test_every_configuration_builds_without_spills(family, name):
    by_rule = forward_and_backward(name, FAMILY_LOSSES[family], torch.bfloat16, 1 << 17)

    def all_others():
        for build in by_rule:
            configs = build.launch.configs(build.arguments)
            assert len(configs) > 2
            for config in configs:
                if config != build.config:
                    build.launch.launch(build.arguments, config)

    built(name, all_others)


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_are_built_with_16_byte_accesses_in_every_loop(columns, dtype, name):
    forward, backward = forward_and_backward(name, cross_entropy, dtype, columns)
    assert forward.config["UNROLL"] == 2
    for build, kinds in ((forward, ["load"]), (backward, ["load", "store"])):
        main = [kind for kind in kinds for _ in range(build.config["UNROLL"])]
        loops = [accesses(loop) for loop in loops_of(build.lines)]
        assert {bits for loop in loops for _, bits in loop} == {128}, f"{build}: {loops}"
        assert main in [[kind for kind, _ in loop] for loop in loops], f"{build}: {loops}"


# its sums, and its upstream gradient, which may be bfloat16
ONE_NUMBER_A_ROW = (("load", 32), ("store", 32), ("load", 16))


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", [triplet, cosine])
def test_pairs_of_vectors_are_built_with_16_byte_accesses_and_no_spills(loss, dtype, name):
    """Also where rows are no multiple of 16 numbers, and in a last block that they do not fill."""
    for columns in (1000, 8192):
        forward, backward = forward_and_backward(name, loss, dtype, columns)
        for build in (forward, backward):
            looped = columns > build.config["BLOCK"]
            found = (
                [access for loop in loops_of(build.lines) for access in accesses(loop)]
                if looped
                else accesses(build.lines)
            )
            kept = [access for access in found if looped or access not in ONE_NUMBER_A_ROW]
            assert {bits for _, bits in kept} == {128}, f"{build}: {found}"
            assert ("store", 128) in kept or build is forward, f"{build}: {found}"


def test_rows_of_pairs_beyond_2_31_elements_are_built_with_64_bit_offsets():
    small = forward_and_backward("sm_90", triplet, torch.bfloat16, 8192)

    def large():
        for build in small:
            build.launch.launch({**build.arguments, "rows": 1 << 20}, build.config)

    for build in built("sm_90", large):
        for pointer in ("%vectors", "%vectors_0", "%vectors_1", "%grads"):
            assert offsets_of(build, pointer) <= {"i64"}, build
        assert "i64" in offsets_of(build), build


@pytest.mark.parametrize("name", TARGETS)
def test_every_configuration_of_pairs_builds_without_spills(name):
    by_rule = forward_and_backward(name, triplet, torch.bfloat16, 8192)

    def all_others():
        for build in by_rule:
            for config in build.launch.configs(build.arguments):
                if config != build.config:
                    build.launch.launch(build.arguments, config)

    assert len(built(name, all_others)) == 2 * 3


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_whole_blocks_of_elements_are_built_with_16_byte_accesses(dtype, name):
    forward, backward = forward_and_backward(name, huber, dtype)
    for build, kinds in ((forward, ["load"]), (backward, ["load", "store"])):
        found = accesses(build.lines)
        of_one_block = 2 * dtype.itemsize * build.config["BLOCK"] // build.threads // 16
        # the ragged last block has narrow ones too, so count the wide ones; the compiler may unroll the blocks
        for kind in kinds:
            assert found.count((kind, 128)) in (of_one_block, of_one_block * 4), f"{build}: {found}"


ROW_LOSSES = {
    "multi_margin_loss": "label",
    "multilabel_margin_loss": "set",
    "categorical_cross_entropy": "chances",
    "sparse_categorical_cross_entropy": "label",
}


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_wide_rows_of_other_families_are_built_with_16_byte_accesses(loss, dtype, name):
    builds = forward_and_backward(name, of_one_row_of, loss, ROW_LOSSES[loss], dtype, COLUMNS[0])
    for build, kind in zip(builds, ("load", "store")):
        loops = [accesses(loop) for loop in loops_of(build.lines)]
        assert (kind, 128) in accesses(build.lines), build
        # which loops over its labels; on AMD an assertion has loops too
        if name == "sm_90" and ROW_LOSSES[loss] != "set":
            assert {bits for loop in loops for _, bits in loop} == {128}, f"{build}: {loops}"


@pytest.mark.parametrize("loss", ROW_LOSSES)
def test_rows_of_other_families_beyond_2_31_elements_are_built_with_64_bit_offsets(loss):
    small = built("sm_90", of_one_row_of, loss, ROW_LOSSES[loss], torch.bfloat16, COLUMNS[0])

    def large():
        for build in small:
            build.launch.launch({**build.arguments, "rows": 1 << 20}, build.config)

    forward, backward = forward_and_backward("sm_90", large)
    gradient = "%grad_x" if "categorical" in loss else "%grad"
    for build, pointers in ((forward, ["%x"]), (backward, ["%x", gradient])):
        for pointer in pointers:  # within a row 32 bits are enough; a label's p_t is all that is read of x then
            assert offsets_of(build, pointer) == {"i64"}, f"{build}: {pointer}"


def offsets_of(build, pointer=r"%\w+"):
    """Types of what is added first to this pointer, or to any, in Triton's own intermediate language."""
    text = build.kernel.asm["ttir"]
    bases = "|".join([pointer, *re.findall(rf"(%\w+) = tt\.splat {pointer} :", text)])
    return set(re.findall(rf"tt\.addptr (?:{bases}), \S+ : \S+, (?:tensor<\w*?x)?(i\d+)", text))


@pytest.mark.parametrize("n", COUNTS)
def test_more_than_2_31_elements_are_built_with_64_bit_offsets(n):
    small = built("sm_90", huber, torch.bfloat16)

    def large():
        for build in small:
            build.launch.launch({**build.arguments, "n": n, "divisor": n}, build.config)

    forward, backward = forward_and_backward("sm_90", large)
    for build in (forward, backward):
        assert build.kernel.src.signature["n"] == "i64"
        assert offsets_of(build) == {"i64"}, build


def test_rows_beyond_2_31_elements_are_built_with_64_bit_offsets():
    small = built("sm_90", cross_entropy, torch.bfloat16, 128256)

    def large():
        for build in small:
            build.launch.launch({**build.arguments, "rows": 1 << 20}, build.config)

    forward, backward = forward_and_backward("sm_90", large)
    for build, pointers in ((forward, ["%logits"]), (backward, ["%logits", "%grad"])):
        for pointer in pointers:  # within a row 32 bits are enough
            assert offsets_of(build, pointer) == {"i64"}, f"{build}: {pointer}"


def test_cross_entropy_is_built_with_few_instructions_an_element_and_no_barrier():
    forward, _ = forward_and_backward("sm_90", cross_entropy, torch.bfloat16, 128256)
    main = max(machine_loops(forward), key=lambda loop: sum("LDG" in code for code in loop))
    elements = forward.config["UNROLL"] * 8  # of a thread, each iteration
    assert sum(".128" in code for code in main if "LDG" in code) * 8 == elements, main
    assert not [code for code in main if "BAR" in code or "SHFL" in code]
    assert len(main) <= 8 * elements, f"{len(main) / elements:.2f} instructions an element"


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("labels", [1, 30, 127, 255, 511])
def test_ctc_builds_without_spills_for_targets_of_any_length(labels, dtype, name):
    assert [build.kernel.name.removeprefix("ctc_") for build in built_of_ctc(name, dtype, labels)] == CTC_KERNELS


CTC_KERNELS = ["forward_statistics", "forward_apart", "forward_together", "backward_gradient"]


def built_of_ctc(name, dtype, labels):
    return [build for build in built(name, ctc, dtype, labels) if build.kernel.name.startswith("ctc_")]


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])  # eight seconds each
def test_every_configuration_of_ctc_builds_without_spills(name):
    by_rule = built_of_ctc(name, torch.float32, 100)

    def all_others():
        for build in by_rule:
            for config in build.launch.configs(build.arguments):
                build.launch.launch(build.arguments, config)

    assert len(built(name, all_others)) >= 2 * len(by_rule)


def test_ctc_beyond_2_31_elements_is_built_with_64_bit_offsets():
    small = built_of_ctc("sm_90", torch.bfloat16, 100)

    def large():
        for build in small:
            build.launch.launch({**build.arguments, "steps": 1 << 20}, build.config)

    for build in built("sm_90", large):
        for pointer in ("%inputs", "%mantissas", "%powers", "%likely", "%grad"):
            assert offsets_of(build, pointer) <= {"i64"}, f"{build}: {pointer}"


def test_one_warp_walks_short_targets_and_meets_no_barrier():
    builds = built_of_ctc("sm_90", torch.float32, 100)
    for build in builds[1:3]:
        assert build.config["num_warps"] == 1
        assert not [code for loop in machine_loops(build) for code in loop if "BAR" in code]
