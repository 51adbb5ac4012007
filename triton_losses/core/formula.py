"""A formula is a loss, written once and used in three ways.

    Triton          compiles it into a family's kernel
    PyTorch, whole  the same source on whole tensors: torch.compile, vmap, devices without kernels
    PyTorch, blocks the same source on slices that stay in a CPU's cache

It is a function without branches or loops. It takes values, never pointers: first the operands (tensors), then the
scalars (options). It returns the loss, then its partial derivative with respect to each operand. It may use `tl` (the
functions in `Eager`) and the functions of device_math. PyTorch runs every line, so the PyTorch versions contain only
the lines that the wanted outputs need.
"""

import ast
import functools
import inspect
import itertools
import textwrap

import torch

from triton_losses.core.compiler import jit, tl

# by name, because torch.compile can pass a name to an op, and no compiled function
FORMULAS: dict[str, "Formula"] = {}


class Eager:
    """PyTorch versions of the functions of triton.language that a formula may use."""

    abs, exp, exp2, log = torch.abs, torch.exp, torch.exp2, torch.log
    sqrt, where, sigmoid = torch.sqrt, torch.where, torch.sigmoid


class Formula:
    """``formula.kernel`` is what Triton compiles; ``value`` and ``partials`` are what PyTorch runs."""

    def __init__(self, fn):
        # Triton's interpreter needs `tl` among the globals, even if the formula only calls helpers
        fn.__globals__.setdefault("tl", tl)
        self.name, self.kernel = fn.__name__, jit(fn)
        self.__doc__ = fn.__doc__
        self.parameters = tuple(inspect.signature(fn).parameters)
        self.scope = {
            name: getattr(value, "eager", value)
            for name, value in fn.__globals__.items()
            if name in fn.__code__.co_names
        }
        self.scope["tl"] = Eager
        self.body = ast.parse(textwrap.dedent(inspect.getsource(fn))).body[0]
        partials = len(self.body.body[-1].value.elts) - 1
        self.value = self.reading((0,))
        wishes = [wanted for wanted in itertools.product((False, True), repeat=partials) if any(wanted)]
        outputs = {wanted: tuple(i + 1 for i, want in enumerate(wanted) if want) for wanted in wishes}
        # built now, because torch.compile cannot trace `reading`
        self.cuts = {wanted: self.reading(outputs[wanted], in_tuple=True) for wanted in wishes}
        self.needs = {wanted: self.lines_for(outputs[wanted])[1].intersection(self.parameters) for wanted in wishes}

    def lines_for(self, outputs, given=()):
        """The lines that these outputs need, without those that assign a given name; and all names that are read."""
        *lines, result = self.body.body
        kept, names = [], names_in(*(result.value.elts[i] for i in outputs))
        for line in reversed(lines):
            if isinstance(line, ast.Assign) and (names & names_in(*line.targets)).difference(given):
                kept.insert(0, line)
                names |= names_in(line.value)
        return kept, names

    def reading(self, outputs, in_tuple=False, given=()):
        """A function that computes only these outputs; it returns a single one bare, or in a tuple if ``in_tuple``.

        given: names of intermediate values that the function takes as arguments, before the formula's own parameters.
        """
        found = [self.body.body[-1].value.elts[i] for i in outputs]
        result = ast.Return(ast.Tuple(found, ast.Load()) if len(found) > 1 or in_tuple else found[0])
        lines = [*self.lines_for(outputs, given)[0], result]
        parameters = ast.arguments([], [ast.arg(name) for name in (*given, *self.parameters)], None, [], [], None, [])
        cut = ast.FunctionDef(self.name, parameters, lines, [], lineno=1, col_offset=0, type_params=[])
        scope = dict(self.scope)
        exec(compile(ast.fix_missing_locations(ast.Module([cut], [])), f"<formula {self.name}>", "exec"), scope)
        return scope[self.name]

    def partials(self, wanted):
        """A function that returns a tuple of the partial derivatives with respect to the ``wanted`` operands."""
        return self.cuts[wanted]

    @functools.cache
    def slope_given(self, expression):
        """A function for the partial derivative by the first operand; it takes the value of ``expression`` first.

        If no line of the formula assigns that expression, the function ignores the value.
        """
        lines = [
            line for line in self.body.body if isinstance(line, ast.Assign) and ast.unparse(line.value) == expression
        ]
        return self.reading((1,), given=tuple(line.targets[0].id for line in lines) or ("unused",))


def names_in(*nodes):
    return {node.id for tree in nodes for node in ast.walk(tree) if isinstance(node, ast.Name)}


def formula(fn):
    """Make a Formula of ``fn`` and register it in FORMULAS under its name."""
    if fn.__name__ in FORMULAS:
        raise ValueError(f"two formulas are named {fn.__name__!r}")
    made = FORMULAS[fn.__name__] = Formula(fn)
    return made


def value_of(formula, values, scalars, weighted):
    """The loss of operands in the compute dtype; if ``weighted``, the last operand is a factor of the loss."""
    if not weighted:
        return formula.value(*values, *scalars)
    return formula.value(*values[:-1], *scalars) * values[-1]


def partials_of(formula, values, scalars, weighted, wanted):
    """∂L/∂operand of each wanted operand."""
    if not weighted:
        return formula.partials(wanted)(*values, *scalars)
    partials = formula.partials(wanted[:-1])(*values[:-1], *scalars) if any(wanted[:-1]) else ()
    own = (formula.value(*values[:-1], *scalars),) if wanted[-1] else ()
    return (*(partial * values[-1] for partial in partials), *own)


def terms_of(problem, wanted, values):
    """For families/pairs.py: (vector, pair, ∂g/∂vector) for each place of a wanted vector in a pair."""
    formula = FORMULAS[problem.coordinate]
    for k, pair in enumerate(zip(problem.pairs[::2], problem.pairs[1::2])):
        want = tuple(wanted[i] for i in pair)
        if any(want):
            partials = iter(formula.partials(want)(*(values[i] for i in pair), *problem.coordinate_scalars))
            for i in (i for i in pair if wanted[i]):
                yield i, k, next(partials)
