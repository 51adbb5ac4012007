"""Imports point down only: objectives and integrations → modules → functional → themes → families → whole, blocks,
kernels → core.
"""

import ast
import doctest
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import triton_losses
import triton_losses.functional

pytestmark = pytest.mark.not_interpreted
ROOT = pathlib.Path(__file__).parents[1]
CORE = {
    "compiler": 0,
    "collectives": 0,
    "dispatch": 1,
    "op": 1,
    "formula": 1,
    "device_math": 1,
    "threads": 1,
    "reduction": 1,
    "dtensors": 1,
    "rows": 1,
    "launch": 1,
    "plan": 1,
    "tuning": 2,
    "bridge": 2,
}
READINGS = ("whole", "blocks", "kernels")
ABOVE = {"functional": 6, "modules": 7, "objectives": 8, "region_modules": 8}
SHARED = dict.fromkeys(("row_formulas", "element_formulas", "region_scores", "head_checks", "process_rows"), 4.5)
SHARED |= {"similarity_losses": 4.6}


def layer_of(name):
    """A number that an import must not raise: the core below the families, those below the themes, and so on."""
    parts = name.split(".")
    if parts[0] != "triton_losses":
        return None
    if len(parts) == 1:
        return 9
    if parts[1] == "core":
        return CORE.get(parts[-1], 1 if len(parts) > 2 else 0)
    if parts[1] == "families":
        return 4
    if parts[1] in READINGS:
        return 3
    if parts[1] == "integrations":
        return 8 if parts[-1] == "deferred_logits" else 9
    return {**SHARED, **ABOVE}.get(parts[1], 5)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
            yield from (
                f"{node.module}.{alias.name}"
                for alias in node.names
                if (ROOT / node.module.replace(".", "/") / f"{alias.name}.py").exists()
            )


FILES = sorted((ROOT / "triton_losses").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for imported in imports_of(path):
        layer = layer_of(imported)
        if layer is None or imported in (
            "triton_losses",
            *(f"triton_losses.{room}" for room in ("core", "families", *READINGS)),
        ):
            continue
        assert layer < layer_of(name) or (layer == layer_of(name) and layer in (1, 2, 3, 4)), (
            f"{name} imports {imported}"
        )


@pytest.mark.parametrize("reading", READINGS)
def test_readings_do_not_import_one_another(reading):
    found = {
        name.split(".")[1]
        for path in (ROOT / "triton_losses" / reading).rglob("*.py")
        for name in imports_of(path)
        if name.startswith("triton_losses.")
    }
    assert found <= {reading, "core"}


@pytest.mark.parametrize(
    "package, others",
    [
        ("reference", ("triton_losses", "bench", "tests")),
        ("triton_losses", ("reference", "bench", "tests")),
        ("bench", ("tests",)),
    ],
)
def test_packages_do_not_import_one_another(package, others):
    found = {name.split(".")[0] for path in (ROOT / package).rglob("*.py") for name in imports_of(path) if name}
    assert not found & set(others)


def test_importing_needs_torch_and_triton_alone():
    """Nor pandas, nor plotting, nor what we integrate with; and it starts no compiler and no GPU."""
    unwanted = "pandas", "matplotlib", "rich", "pytest", "hypothesis", "transformers", "torch._dynamo.symbolic_convert"
    loaded = f"import sys, triton_losses; print([m for m in {unwanted} if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", loaded], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_the_package_works_without_triton():
    script = """
import sys
sys.modules["triton"] = sys.modules["triton.language"] = None
import torch, triton_losses
x, y = torch.randn(5, 9, requires_grad=True), torch.randint(9, (5,))
ours, torchs = (of.CrossEntropyLoss(label_smoothing=0.1)(x, y) for of in (triton_losses, torch.nn))
torch.testing.assert_close(ours, torchs)
torch.testing.assert_close(torch.autograd.grad(ours, x), torch.autograd.grad(torchs, x))
torch.testing.assert_close(triton_losses.HuberLoss()(x, x.detach() + 1), torch.tensor(0.5))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


THEMES = [path.stem for path in FILES if "\n    >>> " in path.read_text() and path.parent.name == "triton_losses"]


@pytest.mark.parametrize("theme", THEMES)
def test_the_examples_in_docstrings_are_true(theme):
    module = importlib.import_module(f"triton_losses.{theme}")
    scope = {**vars(module), "torch": torch}
    results = [
        doctest.DocTestRunner(verbose=False).run(test) for test in doctest.DocTestFinder().find(module, globs=scope)
    ]
    assert sum(r.attempted for r in results) > 0 and sum(r.failed for r in results) == 0


def test_the_oldest_versions_that_are_promised_are_those_that_are_tested():
    promised = dict(re.findall(r'"(torch|triton)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    tested = dict(re.findall(r"^(torch|triton)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    assert set(promised) == {"torch", "triton"}
    assert {name: (version + ".0").split(".")[:3] for name, version in promised.items()} == {
        name: v.split(".")[:3] for name, v in tested.items()
    }


def test_the_versions_that_the_readme_names_are_those_that_are_tested():
    tested = "\n".join((ROOT / name).read_text() for name in ("constraints.txt", "constraints-oldest.txt", ".ci/run"))
    (said,) = re.findall(r"All tests run on\n.*?\n\n", (ROOT / "README.md").read_text(), re.S)
    assert set(re.findall(r"(torch|triton) ([\d.]+\d)", said)) == set(re.findall(r"\b(torch|triton)==([\d.]+)", tested))


MOST_ARGUMENTS = 8
OF_MANY = {
    "Tuned.__init__": "what a kernel is launched with, given by name",
    "LinearDistributionRows.forward": "torch.compile wants every tensor of an autograd.Function as an argument",
}


def functions_of(tree, owner=""):
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            yield from functions_of(node, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            yield owner + node.name, node


def test_no_private_function_takes_more_than_eight_arguments():
    """Options travel as a Problem. Kernels' own code is another matter: Triton's arguments are flat."""
    public = {*dir(triton_losses), *dir(triton_losses.functional)}
    found = {}
    for path in (ROOT / "triton_losses").rglob("*.py"):
        for name, node in functions_of(ast.parse(path.read_text())):
            of_triton = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if name not in public and not of_triton and not name.split(".")[-1].startswith("from_"):
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                found[name] = len([n for n in names if n not in ("self", "ctx", "cls")])
    assert {name for name, count in found.items() if count > MOST_ARGUMENTS} == set(OF_MANY)


def test_every_public_function_has_type_hints():
    functions = {**vars(triton_losses.functional), **vars(triton_losses)}.values()
    for f in functions:
        if inspect.isfunction(f):
            assert not set(inspect.signature(f).parameters) - set(f.__annotations__), f.__name__
            assert "return" in f.__annotations__, f.__name__
