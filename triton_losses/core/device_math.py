"""Elementary functions for formulas and kernels: fast on a GPU, each with its PyTorch twin.

Errors of the float32 versions against float64, in units in the last place (ulp) of the result: exp 2 near 0 (elsewhere
a relative error of |x|·2⁻²⁴), log1p_exp_minus_abs 3, quotient 2, sigmoid 4, power 2·|γ·log2 b| + 2γ + 3, tanh 4,
log_cosh 9, expm1 4, log 6, log1p 6.
float64 always takes an exact branch (for tiny arguments log_cosh and tanh have an absolute error of 1e-16).
"""

import functools
import struct

import torch

from triton_losses.core.compiler import INTERPRET, jit, tl, triton

if triton is not None:
    from triton.language.extra import libdevice
    from triton.language.target_info import is_cuda

INTERPRETED = tl.constexpr(INTERPRET)  # the interpreter supports neither libdevice nor inline assembly
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.925963033500012e-08)  # log2 e minus its value in float32
LN2 = tl.constexpr(0.6931471805599453)
tiny = 1e-37  # near the smallest positive number that float32 holds with full precision
TINY = tl.constexpr(tiny)
# for |x| below this, polynomials in x² (minimax, relative error 5e-8) replace differences that would cancel
SERIES = tl.constexpr(0.45)


def twin(eager):
    """Decorate a device function with ``eager``, the function that PyTorch runs in its place."""

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
    """x / y for 1e-37 <= |y| <= 8e37; in float32 a reciprocal and a multiplication, where `/` takes 8 instructions."""
    if INTERPRETED or x.dtype == tl.float64:
        return x / y
    else:
        return libdevice.fast_dividef(x, y)


@twin(torch.div)
def division(x, y):
    """x / y, correctly rounded; Triton's float32 `/` has an error of up to 2 ulp."""
    if INTERPRETED or x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@twin(torch.exp)
def exact_exp(x):
    """exp(x) for x <= 88 with an error of at most 3 ulp, because it corrects for the rounding of x · log2 e."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    bounded = tl.maximum(x, -200.0, propagate_nan=tl.PropagateNan.ALL)  # for -inf, `rest` would be inf - inf = nan
    t = bounded * LOG2E
    rest = tl.fma(bounded, tl.full(x.shape, LOG2E, tl.float32), -t) + bounded * LOG2E_REST
    e = tl.exp2(t)
    return e + e * (rest * LN2)


@twin(torch.log2)
def log2(x):
    """log₂ x for x >= 1e-37; in float32 one instruction, absolute error 2⁻²² near 1."""
    if INTERPRETED or x.dtype == tl.float64 or not is_cuda():  # on AMD GPUs tl.log2 is one instruction
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
    """max(0, -x) with derivative -1 at 0. relu has 0 there, so relu(x) - negative_part(x) = x has the derivative 1."""
    return tl.maximum(-x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@twin(lambda x: torch.clamp(x, min=tiny))
def at_least_tiny(x):
    """max(x, tiny), which keeps a logarithm or a quotient finite; tiny is too small to change a float32 result."""
    return tl.maximum(x, TINY, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@twin(lambda x, low: torch.clamp(x, min=low))
def at_least(x, low):
    """The larger of the two; NaN stays NaN."""
    return tl.maximum(x, low, propagate_nan=tl.PropagateNan.ALL).to(x.dtype)


@twin(lambda x: (x >= 0).to(x.dtype))
def step(x):
    """1 for x >= 0, else 0: the derivative of max(0, x), with 1 at the corner."""
    return tl.where(x >= 0, 1.0, 0.0).to(x.dtype)


@jit
def log_of(r, x):
    """log x, where x = 1 + r: in float32 a polynomial near 1 (minimax, relative error 8e-8), elsewhere `log2`."""
    p = 1.642019333e-01 - 1.467700952e-01 * r
    p = p * r - 1.652406445e-01
    p = p * r + 1.988473445e-01
    p = p * r - 2.500321725e-01
    p = p * r + 3.333507315e-01
    p = p * r - 4.999998417e-01
    return tl.where(tl.abs(r) < 0.3, r + r * r * p, log2(x) * LN2)


@twin(torch.log)
def log(x):
    """log x; in float32 about 17 instructions, where Triton's takes 28."""
    if x.dtype == tl.float64:
        return tl.log(x)
    small = tl.abs(x) < 1.2e-38  # `log2` is not for subnormal numbers
    return log_of(x - 1.0, tl.where(small, x * 16777216.0, x)) - tl.where(small, 16.635532333438686, 0.0)  # 24 log 2


@twin(torch.log1p)
def log1p(x):
    """log(1 + x), in float64 by Kahan's method, in which the rounding error of 1 + x cancels."""
    u = 1.0 + x
    if x.dtype == tl.float64:
        return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))
    return log_of(x, u)


@twin(lambda a, x, y: torch.addcmul(a, x, y, value=-1))
def less_product(a, x, y):
    """a - x y; in PyTorch one operation instead of two."""
    return a - x * y


def log1p_exp_minus_abs_eager(x):
    # |x| with derivative -1 at 0, where relu has 0: the result plus relu(x) has the derivative of softplus
    magnitude = torch.nn.functional.leaky_relu(x, -1.0)
    return torch.nn.functional.softplus(-magnitude, threshold=50.0)  # above 50, log1p(exp(x)) is x in float64 too


@twin(log1p_exp_minus_abs_eager)
def log1p_exp_minus_abs(x):
    """log(1 + exp(-|x|)), which is softplus(x) - relu(x)."""
    e = exp_minus_abs(x)
    if x.dtype == tl.float64:
        u = 1.0 + e
        return tl.where(u == 1.0, e, tl.log(u) * (e / (u - 1.0)))  # Kahan's method, as in log1p
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
    """log(1 + x) for -1 < x <= 0, accurate near 0 as well."""
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
    """log(1 + exp(x)) without overflow. As one function it takes PyTorch one operation; its parts would take five."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL).to(x.dtype) + log1p_exp_minus_abs(x)


@twin(torch.sigmoid)
def sigmoid(x):
    e = exp_minus_abs(x)
    return quotient(tl.where(x < 0, e, 1.0), 1.0 + e)


@twin(torch.pow)
def power(base, exponent):
    """base ** exponent for base > 0; squares, the default of every focal loss, cost one multiplication."""
    if exponent == 2.0:  # a scalar argument: all threads take the same branch
        result = base * base
    else:
        if base.dtype == tl.float64:
            result = tl.exp(exponent * tl.log(base))
        else:
            result = tl.exp2(exponent * log2(base))
    return result


def root_eager(x, p):
    zero = x == 0
    return x.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0)  # otherwise the second derivative at 0 is nan


@twin(root_eager)
def root(x, p):
    """x ** (1 / p) for x >= 0 and p >= 1.

    It computes all results and selects one, without branches: LLVM may merge branches that end in different libdevice
    functions into one call with two possible arguments, and then aborts ("__nvvm_reflect argument must be a constant
    string").
    """
    return tl.where(p == 2.0, tl.sqrt(x), tl.where(p == 1.0, x, tl.exp2(tl.log2(x) / p)))


def root_slope_eager(x, p):
    zero = (x == 0) & (p > 1)
    return x.masked_fill(zero, 1).pow(1 / p - 1).div(p).masked_fill(zero, 0)


@twin(root_slope_eager)
def root_slope(x, p):
    """The derivative of `root`, but 0 at x = 0, where it is infinite unless p = 1."""
    slope = tl.where(p == 2.0, 0.5 / tl.sqrt(x), tl.exp2(tl.log2(x) * (1.0 / p - 1.0)) / p)
    return tl.where(p == 1.0, 1.0, tl.where(x == 0.0, 0.0, slope)).to(x.dtype)


@twin(torch.expm1)
def expm1(x):
    """exp(x) - 1; in float64 by Kahan's method: y - 1 and log y have the same relative error, which cancels."""
    if x.dtype == tl.float64:
        y = tl.exp(x)
        return tl.where(y == 1.0, x, tl.where(y - 1.0 == -1.0, y - 1.0, (y - 1.0) * (x / tl.log(y))))
    p = 1.984981005e-04 * x + 1.399617631e-03  # minimax on [-1/2, 1/2], relative error 3e-9
    p = p * x + 8.333579027e-03
    p = p * x + 4.166535858e-02
    p = p * x + 1.666666398e-01
    p = p * x + 5.000000394e-01
    return tl.where(tl.abs(x) < SERIES, x + x * x * p, exp(x) - 1.0)


@twin(torch.tanh)
def tanh(x):
    e = exp_minus_abs(2.0 * x)
    t = 1.0 - 2.0 * quotient(e, 1.0 + e)  # not (1 - e) / (1 + e): here the quotient's error shrinks with e
    large = tl.where(x < 0, -t, t)
    if x.dtype == tl.float64:
        return large
    u = x * x
    p = 1.864910538e-02 * u - 5.357453225e-02
    p = p * u + 1.333176077e-01
    p = p * u - 3.333332341e-01
    return tl.where(tl.abs(x) < SERIES, x + x * (u * p), large)


def log_cosh_eager(x):
    """log(1 + 2 sinh²(x/2)); linear for |x| > 20."""
    return torch.log1p(2.0 * torch.sinh((0.5 * x.abs()).clamp(max=10.0)).square()) + (x.abs() - 20.0).relu()


@twin(log_cosh_eager)
def log_cosh(x):
    """log(cosh(x)) = |x| - log 2 + log(1 + exp(-2|x|)); near 0, where that cancels, a polynomial close to x²/2."""
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
    """Scalars for a kernel. Triton passes floats as float32, so for float64 each one is split into two float32."""
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
    """Load, with zeros where the mask is False; without a mask (None) the compiler can use the widest loads."""
    if mask is None:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)
