"""Compilation of kernels by NVRTC, through NVIDIA's bindings for Python."""

from __future__ import annotations

from typing import Any, NamedTuple

from bandpo import _core
from bandpo.backends.cuda import cubin_cache
from bandpo.error import KernelError

ADDED_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")
"""Options that CuPy adds by itself. Without them, subnormal numbers would have other bits."""


class Cubin(NamedTuple):
    """A kernel as machine code."""

    name: str
    """Its mangled name in the code."""

    code: bytes


def nvrtc_module() -> Any:
    """NVRTC of ``cuda.bindings``, imported late, for CUDA tensors alone."""
    from cuda.bindings import nvrtc

    return nvrtc


def cubin(kernel: str, architecture: str, options: tuple[str, ...]) -> Cubin:
    """Returns a kernel for an architecture such as ``"sm_90"``, from the cache if it is there.

    Raises:
        KernelError: If NVRTC refuses it; the message has the first error.
        ModuleNotFoundError: If ``cuda.bindings`` is not installed.
    """
    nvrtc = nvrtc_module()
    version = "{}.{}".format(*_checked(nvrtc, "nvrtcVersion", nvrtc.nvrtcVersion()))
    given = (*options, *ADDED_OPTIONS, f"-arch={architecture}")
    key = cubin_cache.key_of(_core.KERNEL_SOURCE, *given, f"nvrtc {version}", kernel)
    stored = cubin_cache.read(key)
    if stored is None:
        made = _compiled(nvrtc, kernel, given)
        cubin_cache.write(key, made.name.encode() + b"\0" + made.code)
        return made
    name, _, code = stored.partition(b"\0")
    return Cubin(name.decode(), code)


def _compiled(nvrtc: Any, kernel: str, options: tuple[str, ...]) -> Cubin:
    source, expression = _core.KERNEL_SOURCE.encode(), kernel.encode()
    made = nvrtc.nvrtcCreateProgram(source, b"bandpo.cu", 0, [], [])
    [program] = _checked(nvrtc, "nvrtcCreateProgram", made)
    try:
        _checked(nvrtc, kernel, nvrtc.nvrtcAddNameExpression(program, expression))
        encoded = [option.encode() for option in options]
        [status] = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        if status:
            log = _text(nvrtc, program, "ProgramLog").decode(errors="replace")
            errors = [line for line in log.splitlines() if "error" in line]
            raise KernelError(f"NVRTC cannot compile {kernel}: {status.name}: {[*errors, log][0]}")
        [name] = _checked(nvrtc, kernel, nvrtc.nvrtcGetLoweredName(program, expression))
        return Cubin(name.decode(), _text(nvrtc, program, "CUBIN"))
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(nvrtc: Any, program: Any, what: str) -> bytes:
    """A text that NVRTC writes into memory of the caller, after its size."""
    [size] = _checked(nvrtc, what, getattr(nvrtc, f"nvrtcGet{what}Size")(program))
    text = bytearray(size)
    _checked(nvrtc, what, getattr(nvrtc, f"nvrtcGet{what}")(program, text))
    return bytes(text)


def _checked(nvrtc: Any, what: str, result: tuple[Any, ...]) -> list[Any]:
    status, *values = result
    if status:
        raise KernelError(f"NVRTC fails at {what}: {status.name}")
    return values
