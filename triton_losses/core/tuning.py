"""Chooses a kernel's launch configuration: known for this GPU, or measured at the first call and kept on disk.

A first call compiles the few candidates of each kernel in parallel threads, and then times them one after another.

TRITON_LOSSES_AUTOTUNE=0   never measure; use the rule that is written beside each kernel
TRITON_LOSSES_CACHE_DIR    the directory of the measured choices (default: triton_losses inside Triton's own cache)
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import threading
from collections.abc import Callable
from typing import Any

import torch

from triton_losses.core import plan
from triton_losses.core.choices import CHOICES
from triton_losses.core.compiler import INTERPRET, triton
from triton_losses.core.launch import Launch
from triton_losses.core.op import shapes_only
from triton_losses.core.rows import empty_with_strides

LAUNCH_OPTIONS = {
    "sanitize_overflow": False,  # with debug=True only asserts in the kernel run, not a check of every integer addition
}
SAMPLE_BYTES = 256 << 20
DOES_NOT_LAUNCH: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)
if triton is not None:
    import triton.testing
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    DOES_NOT_LAUNCH += (CompileTimeAssertionFailure, OutOfResources, PTXASError)

log = logging.getLogger("triton_losses")
one_at_a_time = threading.Lock()  # for all kernels: two measured at once would slow each other down
autotune = os.environ.get("TRITON_LOSSES_AUTOTUNE", "1") != "0"
made: list["Tuned"] = []  # all instances


class Tuned:
    """A @triton.jit kernel whose launch configuration is chosen once per GPU and ``key(args)``.

    configs     configurations to try, or args -> a list of them: few, because a first call measures each
    rule        args -> the configuration when nothing is measured
    key         args -> what the choice may depend on: formula, class of width, dtype, alignment; not the number of rows
    size        name of the argument with the number of rows (or elements, or images), the last one of type ``tl.int64``
    programs    size, arguments with the configuration -> the number of programs
    bytes_each  args -> the bytes of one row (or element, or image): at most 256 MB of them are measured
    written     names of the tensors of rows that the kernel reads and overwrites: copies of them are used to measure
    fuse        whether the compiler may fuse a multiplication and an addition (FMA), which rounds only once
    """

    def __init__(self, kernel, *, configs, rule, key, programs, size, bytes_each=None, written=(), fuse=True):
        self.kernel, self.rule, self.key, self.size = kernel, rule, key, size
        self.programs_of = programs
        self.configs = configs if callable(configs) else lambda args: configs
        self.bytes_each, self.written, self.chosen = bytes_each, written, {}
        made.append(self)
        self.options = {**LAUNCH_OPTIONS, "enable_fp_fusion": fuse}  # always passed: Triton 3.10 changes the default

    def bind(self, **args):
        """A launch for all calls of the same kind as these arguments; it drops those that the kernel does not take."""
        names = self.kernel.arg_names
        args = {name: value for name, value in args.items() if name in names}
        config, settled = self.choice(args)
        varying = names[: names.index(self.size) + 1]
        fixed = {name: value for name, value in {**args, **config}.items() if name not in varying and name in names}
        options = {name: value for name, value in config.items() if name not in names} | self.options
        if INTERPRET:  # it does not take num_warps
            options = {}
        launch = Launch(self.kernel, fixed, options, functools.partial(self.programs_of, fixed=fixed))
        launch.settled = settled
        return launch

    def programs(self, args, config):
        return self.programs_of(args[self.size], fixed={**args, **config})

    def candidates(self, args):
        """What a first call compiles and measures: the rule's configuration and the others."""
        found = [self.rule(args)]
        for config in self.configs(args):
            if config not in found:
                found.append(config)
        return found

    def launch(self, args, config):
        programs = self.programs(args, config)
        if programs and INTERPRET:  # it does not take num_warps
            self.kernel[(programs,)](
                **args, **{name: value for name, value in config.items() if name in self.kernel.arg_names}
            )
        elif programs:
            self.kernel[(programs,)](**args, **config, **self.options)

    def config(self, args):
        """The remembered choice; if there is none, the fastest, or the rule's if nothing can be measured now."""
        return self.choice(args)[0]

    def choice(self, args):
        """The configuration, and whether it is settled: if it could not be measured now, a later call may change it."""
        if not autotune or INTERPRET or torch.are_deterministic_algorithms_enabled() or not can_measure():
            return self.rule(args), True
        key = (device_name(), self.key(args))
        config = self.chosen.get(key) or self.choose(key, args)
        return config, key in self.chosen

    def choose(self, key, args):
        rule = self.rule(args)
        if shapes_only() or not self.programs(args, rule):
            return rule
        with one_at_a_time:
            if key not in self.chosen and (choice := self.recall_or_measure(key, args, rule)) is not None:
                self.chosen[key] = choice
        return self.chosen.get(key, rule)

    def recall_or_measure(self, key, args, rule):
        shipped = self.candidates(args)
        if len(shipped) == 1:
            return rule
        path = self.path(key, args)
        choice = recall(path, shipped)
        if choice is None:
            known = CHOICES.get(key[0], {}).get(self.kernel.__name__, {}).get(key[1])
            choice = next((ours for ours in shipped if ours == known), None)
        if choice is None and not capturing():
            log.info("tuning %s for %s on %s: %d configurations", self.kernel.__name__, key[1], key[0], len(shipped))
            times = self.measure(args, shipped)
            if times:
                ms, choice = min(times, key=lambda measured: measured[0])
                log.info("tuned %s for %s: %s, %.4f ms", self.kernel.__name__, key[1], choice, ms)
                remember(path, {"gpu": key[0], "key": key[1], "config": choice, "ms": ms})
        return choice

    def measure(self, args, shipped):
        times = []
        self.build(args, shipped)
        for config in shipped:
            try:
                times.append((median_ms(functools.partial(self.launch, self.sampled(args), config)), config))
            except DOES_NOT_LAUNCH as error:
                log.info("%s %s does not launch: %s", self.kernel.__name__, config, error)
        return times

    def build(self, args, shipped):
        """Compile every configuration in parallel. One that does not compile raises its error again at its launch."""
        index = None if gpu() is None else gpu().current_device()

        def compile_one(config):
            # each thread has its own current device
            with contextlib.nullcontext() if index is None else gpu().device(index):
                self.kernel.warmup(grid=(1,), **args, **config, **self.options)

        with concurrent.futures.ThreadPoolExecutor(len(shipped)) as pool:
            for building in [pool.submit(compile_one, config) for config in shipped]:
                if (error := building.exception()) is not None and not isinstance(error, DOES_NOT_LAUNCH):
                    raise error

    def sampled(self, args):
        """The arguments for measuring: at most SAMPLE_BYTES of rows, and copies of tensors that are overwritten."""
        if self.bytes_each:
            most = SAMPLE_BYTES // max(self.bytes_each(args), 1)
            args = {**args, self.size: min(args[self.size], max(most, 1))}
        rows = args[self.size]
        return {**args, **{name: scratch(args[name][:rows]) for name in self.written if args[name] is not None}}

    def path(self, key, args):
        # the sources of the kernel and of the formula
        sources = [used.cache_key for used in (self.kernel, *args.values()) if hasattr(used, "cache_key")]
        digest = hashlib.sha256(repr((key, triton.__version__, sources)).encode()).hexdigest()
        where = os.environ.get("TRITON_LOSSES_CACHE_DIR") or os.path.join(triton.knobs.cache.dir, "triton_losses")
        return pathlib.Path(where, f"{self.kernel.__name__}-{digest[:24]}.json")


def scratch(tensor):
    """A copy with the tensor's strides, because the kernel takes them: ``clone`` would drop padding between rows."""
    return empty_with_strides(tensor).copy_(tensor)


def recall(path, shipped):
    """The configuration in the file, if it is one of the candidates."""
    try:
        config = json.loads(path.read_text())["config"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return next((ours for ours in shipped if ours == config), None)


def remember(path, record):
    draft = path.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(record))
        os.replace(draft, path)  # ranks may race: each file is complete, and the last one wins
    except OSError as error:
        log.warning("the choice is for this process only: %s", error)


@functools.cache  # the query takes microseconds; not made at import, because afterwards the process must not fork
def gpu():
    return next((kind for kind in (torch.cuda, torch.xpu) if kind.is_available()), None)  # ROCm devices are called cuda


@functools.cache
def name_of(index):
    return gpu().get_device_name(index)


def device_name():
    return name_of(gpu().current_device()) if gpu() else "no GPU"


def can_measure():
    return triton is not None and not INTERPRET and gpu() is not None


def capturing():
    return gpu() is not None and gpu().is_current_stream_capturing()


def chosen():
    """What was chosen on this machine, in the form of core/choices.py."""
    found = {}
    for tuned in made:
        for (device, key), config in tuned.chosen.items():
            found.setdefault(device, {}).setdefault(tuned.kernel.__name__, {})[key] = config
    return found


def median_ms(launch):
    return triton.testing.do_bench(launch, warmup=5, rep=20, return_mode="median")


def set_autotune(enabled: bool) -> None:
    """Let kernels be measured at their first call (True), or have each follow its rule of thumb (False).

    >>> set_autotune(False)  # measured choices are not used either: the same configuration on every machine
    >>> set_autotune(True)
    """
    global autotune
    if not isinstance(enabled, bool):
        raise TypeError(f"enabled must be True or False, got {enabled!r}")
    autotune = enabled
    plan.forget()


def tune(loss: Callable[..., Any], *tensors: Any, **options: Any) -> None:
    """Choose the launch configurations of ``loss(*tensors, **options)`` now, forward and backward, not at its first
    call.

    It measures even after ``set_autotune(False)``, and does not change any ``.grad``.
    >>> logits = torch.randn(8192, 128256, device="cuda", requires_grad=True)  # doctest: +SKIP
    >>> tune(triton_losses.cross_entropy, logits, labels)  # doctest: +SKIP
    """
    if not can_measure():
        raise RuntimeError(
            "tune() needs Triton, not its interpreter, and a CUDA, ROCm or XPU device: nothing can be measured here"
        )
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError(
            "tune() measures nothing under torch.use_deterministic_algorithms(True): the rule decides there"
        )
    parameters = loss.parameters() if isinstance(loss, torch.nn.Module) else ()
    inputs = [x for x in (*tensors, *options.values(), *parameters) if getattr(x, "requires_grad", False)]
    before = autotune
    set_autotune(True)
    try:
        results = loss(*tensors, **options)
        results = [
            r for r in (results if isinstance(results, tuple) else (results,)) if getattr(r, "requires_grad", False)
        ]
        if results and not inputs:
            raise ValueError("tune() runs the backward pass to tensors that require grad among its arguments, got none")
        if results:
            torch.autograd.grad(results, inputs, [torch.ones_like(r) for r in results], allow_unused=True)
    finally:
        set_autotune(before)
