"""Elementary functions for formulas and kernels: fast on a GPU, each with its PyTorch twin.

Errors of the float32 forms against float64, in units of the last place of the result unless it says absolute: exp 2
near 0 and |x|·2⁻²⁴ relative elsewhere, log1p_exp_minus_abs 3, quotient 2, sigmoid 4, power 2·|γ·log2 b| + 2γ + 3, tanh
4, log_cosh 9, expm1 4, log1p 4.
float64 always takes an exact branch (log_cosh and tanh of tiny arguments: absolute 1e-16).
"""

import functools
import struct

import torch

from triton_losses.core.compiler import INTERPRET, jit, tl, triton

if triton is not None:
    from triton.language.extra import libdevice
    from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(INTERPRET)  # the interpreter knows neither libdevice nor inline assembly
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.925963033500012e-08)  # of log2 e, what float32 does not hold
LN2 = tl.constexpr(0.6931471805599453)
tiny = 1e-37  # about the smallest positive number that float32 still holds to all its digits
TINY = tl.constexpr(tiny)
# below it, polynomials in x² (minimax, relative error 5e-8) in place of differences that would cancel
SERIES = tl.constexpr(0.45)


def twin(eager):
    """Mark a device function with what PyTorch runs in its place."""

    def mark(fn):
        made = jit(fn)
        made.eager = eager
        return made

    return mark


@twin(torch.exp)
def exp(x):
    """exp(x); in float32 one multiplication and one instruction."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    return tl.exp2(x * LOG2E)


@twin(lambda x: torch.exp(-x.abs()))
def exp_minus_abs(x):
    """exp(-|x|)."""
    if x.dtype == tl.float64:
        return tl.exp(-tl.abs(x))
    return tl.exp2(tl.abs(x) * -LOG2E)  # |x| is free, -|x| is an instruction


@twin(torch.div)
def quotient(x, y):
    """x / y for 1e-37 <= |y| <= 8e37; in float32 one reciprocal and one multiplication, where `/` takes eight
    instructions.
    """
    if INTERPRETED or x.dtype == tl.float64:
        return x / y
    else:
        return libdevice.fast_dividef(x, y)


@twin(torch.div)
def division(x, y):
    """x / y, rounded to the nearest number; Triton's `/` of float32 is off by up to two units of the last place."""
    if INTERPRETED or x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@twin(torch.exp)
def exact_exp(x):
    """exp(x) for x <= 88, off by 3 units of the last place at most: what rounding x · log2 e left over is multiplied
    in.
    """
    if x.dtype == tl.float64:
        return tl.exp(x)
    bounded = tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)  # of -inf, inf - inf would be left over
    t = bounded * LOG2E
    rest = tl.fma(bounded, tl.full(x.shape, LOG2E, tl.float32), -t) + bounded * LOG2E_REST
    e = tl.exp2(t)
    return e + e * (rest * LN2)


@twin(torch.log2)
def log2(x):
    """log₂ x for x >= 1e-37; in float32 one instruction, absolute error 2⁻²² near 1."""
    if INTERPRETED or x.dtype == tl.float64 or not is_cuda():  # AMD's own is one instruction
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@twin(torch.clamp)
def clamp(x, low, high):
    """x between low and high; NaN stays NaN."""
    return tl.minimum(
        tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL), high, propagate_nan=tl.PropagateNan.ALL
    ).to(x.dtype)


@twin(torch.sign)
def sign(x):
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0)).to(x.dtype)


@twin(torch.relu)
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@twin(lambda x: -torch.clamp(x, max=0.0))
def negative_part(x):
    """max(0, -x), whose derivative at 0 is -1: relu's is 0 there, so that x = relu(x) - negative_part(x) has the right
    one.
    """
    return tl.maximum(-x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@twin(lambda x: torch.clamp(x, min=tiny))
def at_least_tiny(x):
    """Keeps a logarithm or a quotient finite; far below anything that shows in a float32 result."""
    return tl.maximum(x, TINY, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@twin(lambda x, low: torch.clamp(x, min=low))
def at_least(x, low):
    """The larger of the two; NaN stays NaN."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@twin(lambda x: (x >= 0).to(x.dtype))
def step(x):
    """1 from 0 on, else 0: the derivative of a hinge that counts its corner in."""
    return tl.where(x >= 0, 1.0, 0.0).to(x.dtype)


@twin(torch.log1p)
def log1p(x):
    """log(1 + x) (Kahan: the rounding of 1 + x cancels)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@twin(lambda a, x, y: torch.addcmul(a, x, y, value=-1))
def less_product(a, x, y):
    """a - x y, which PyTorch would take two steps for."""
    return a - x * y


def log1p_exp_minus_abs_eager(x):
    # whose derivative at 0 is -1, as relu's is 0: together they are softplus's
    magnitude = torch.nn.functional.leaky_relu(x, -1.0)
    return torch.nn.functional.softplus(-magnitude, threshold=50.0)  # from 50 on log1p(exp) is x in float64 too


@twin(log1p_exp_minus_abs_eager)
def log1p_exp_minus_abs(x):
    """log(1 + exp(-|x|)): what softplus(x) has beside relu(x)."""
    e = exp_minus_abs(x)
    if x.dtype == tl.float64:
        u = 1.0 + e
        return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))  # Kahan: the rounding of 1 + e cancels
    p = 5.232629355e-03 * e - 2.950498695e-02  # minimax of log1p(e)/e on [0, 1], relative error 1e-7
    p = p * e + 7.822555769e-02
    p = p * e - 1.366321402e-01
    p = p * e + 1.910599285e-01
    p = p * e - 2.484297904e-01
    p = p * e + 3.331909649e-01
    p = p * e - 4.999949313e-01
    p = p * e + 9.999999699e-01
    return p * e


@twin(torch.log1p)
def log1p_negative(x):
    """log(1 + x) for -1 < x <= 0, to its last digits near 0 as well."""
    if x.dtype == tl.float64:
        return log1p(x)
    s = quotient(x, 2.0 + x)
    u = s * s
    p = 1.407888917e-01 * u + 1.398257887e-01  # minimax of atanh(s)/s for x >= -1/2, relative error 4e-9
    p = p * u + 2.001229762e-01
    p = p * u + 3.333316082e-01
    p = p * u + 1.000000004e00
    return tl.where(x > -0.5, 2.0 * s * p, log2(1.0 + x) * LN2)


@twin(functools.partial(torch.nn.functional.softplus, threshold=50.0))
def softplus(x):
    """log(1 + exp(x)), which never overflows; as a formula's sum of parts, PyTorch would take five steps where it knows
    one.
    """
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype) + log1p_exp_minus_abs(x)


@twin(torch.sigmoid)
def sigmoid(x):
    e = exp_minus_abs(x)
    return quotient(tl.where(x < 0, e, 1.0), 1.0 + e)


@twin(torch.pow)
def power(base, exponent):
    """base ** exponent for base > 0; squares, the default of every focal loss, cost one multiplication."""
    if exponent == 2.0:  # a scalar of the launch: the whole program takes one branch
        result = base * base
    else:
        if base.dtype == tl.float64:
            result = tl.exp(exponent * tl.log(base))
        else:
            result = tl.exp2(exponent * log2(base))
    return result


def root_eager(x, p):
    zero = x == 0
    return x.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0)  # or the second derivative at 0 were nan


@twin(root_eager)
def root(x, p):
    """x ** (1 / p) for x >= 0 and p >= 1.

    It chooses between results, not between branches: LLVM may merge branches that end in different functions of
    libdevice into one call with two arguments, and then aborts ("__nvvm_reflect argument must be a constant string").
    """
    return tl.where(p == 2.0, tl.sqrt(x), tl.where(p == 1.0, x, tl.exp2(tl.log2(x) / p)))


def root_slope_eager(x, p):
    zero = (x == 0) & (p > 1)
    return x.masked_fill(zero, 1).pow(1 / p - 1).div(p).masked_fill(zero, 0)


@twin(root_slope_eager)
def root_slope(x, p):
    """The derivative of `root`; at 0, where it is infinite unless p = 1, 0."""
    slope = tl.where(p == 2.0, 0.5 / tl.sqrt(x), tl.exp2(tl.log2(x) * (1.0 / p - 1.0)) / p)
    return tl.where(p == 1.0, 1.0, tl.where(x == 0.0, 0.0, slope)).to(x.dtype)


@twin(torch.expm1)
def expm1(x):
    """exp(x) - 1 (Kahan: the error of y - 1 is that of log y, and cancels)."""
    y = tl.exp(x)
    return tl.where(y == 1.0, x, tl.where(y - 1.0 == -1.0, y - 1.0, (y - 1.0) * (x / tl.log(y))))


@twin(torch.tanh)
def tanh(x):
    e = exp_minus_abs(2.0 * x)
    t = 1.0 - 2.0 * quotient(e, 1.0 + e)  # not (1 - e) / (1 + e): the quotient's own error gets small as it does
    large = tl.where(x < 0, -t, t)
    if x.dtype == tl.float64:
        return large
    u = x * x
    p = 1.864910538e-02 * u - 5.357453225e-02
    p = p * u + 1.333176077e-01
    p = p * u - 3.333332341e-01
    return tl.where(tl.abs(x) < SERIES, x + x * (u * p), large)


def log_cosh_eager(x):
    """log(1 + 2 sinh²(x/2)); beyond 20 it is a line."""
    return torch.log1p(2.0 * torch.sinh((0.5 * x.abs()).clamp(max=10.0)).square()) + (x.abs() - 20.0).relu()


@twin(log_cosh_eager)
def log_cosh(x):
    """log(cosh(x)), which is |x| - log 2 + log(1 + exp(-2|x|)) and about x²/2 where that cancels."""
    a = tl.abs(x)
    large = a + (log1p_exp_minus_abs(2.0 * x) - LN2)
    if x.dtype == tl.float64:
        return large
    u = x * x
    p = 2.212322490e-02 - u * 5.938746590e-03
    p = p * u - 8.332938674e-02
    p = p * u + 4.999999753e-01
    return tl.where(a < SERIES, p * u, large)


def as_scalars(values, dtype):
    """A Python float reaches a kernel as float32; for a float64 kernel it travels as a float32 and the remainder."""
    if dtype != torch.float64:
        return tuple(values)
    return tuple(part for value in values for part in split(value))


@functools.cache
def split(value):
    head = struct.unpack("f", struct.pack("f", value))[0]
    return head, value - head


@jit
def exact(scalars, COMPUTE: tl.constexpr):
    """The scalars that `as_scalars` packed, in the type the kernel computes in."""
    values = scalars
    if COMPUTE == tl.float64:
        values = ()
        for i in tl.static_range(len(scalars) // 2):
            values += (tl.cast(scalars[2 * i], tl.float64) + tl.cast(scalars[2 * i + 1], tl.float64),)
    return values


@jit
def load_zeros(pointers, mask):
    """What is there, zeros where the mask forbids; no mask at all (None) keeps the load as wide as it can be."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)
