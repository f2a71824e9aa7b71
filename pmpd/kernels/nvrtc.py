"""CUDA C++ compiled at run time and launched on PyTorch's current stream.

It calls the NVRTC that PyTorch's CUDA wheels carry and the driver, through ctypes: no nvcc and no C compiler, no header
outside the source itself, the same for every PyTorch from 2.6 on. Machine code is kept on disk, so a process compiles
only what no process compiled before. It knows nothing about what the kernels compute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from pmpd.files import atomic
from pmpd.kernels.errors import CudaUnavailableError
from pmpd.paths import user_cache

log = logging.getLogger(__name__)

CACHE_ENTRY_VERSION = 1
SHARED_BYTES_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
CARVEOUT_ATTRIBUTE = 9  # CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT
CARVEOUT = 100
"""Percent of a processor's fast memory that is shared memory, the same for all kernels: a processor that must change it
between two kernels runs empty first."""
PROGRAMMATIC_STREAM_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
CLUSTER_DIMENSION = 4  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
PROGRAMMATIC_CAPABILITY = (9, 0)


class _LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``: an id, padding to 8 bytes, a union of 64 bytes."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int * 16))


def _attribute(kind: int, *values: int) -> _LaunchAttribute:
    return _LaunchAttribute(id=kind, value=(ctypes.c_int * 16)(*values))


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    )


@dataclass(frozen=True, eq=False)
class Function:
    """A kernel. ``function(grid, block, *arguments)`` queues it on the current stream; a stream capture records it."""

    name: str
    handle: ctypes.c_void_p
    _shared_limits: dict[int, int] = field(default_factory=dict, repr=False)

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        *arguments: Tensor | int | float | None,
        shared_bytes: int = 0,
        programmatic: bool = False,
        cluster: int = 1,
    ) -> None:
        """Args:
        arguments: tensors and ``None`` arrive as pointers, ``int`` as ``int`` (32 bits), ``float`` as ``float``.
        shared_bytes: dynamic shared memory of a block.
        programmatic: let the kernel start while its predecessor in the stream still runs ("programmatic dependent
            launch"). The kernel must execute ``griddepcontrol.wait`` before it reads or writes what other kernels
            touch. Ignored below compute capability 9.0, where the kernel just starts later.
        cluster: consecutive blocks that run at once and see each other's shared memory, from compute capability 9.0 on.

        Raises:
            RuntimeError: the driver refuses the launch.
        """
        device = torch.cuda.current_device()
        values = [_c_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        if device not in self._shared_limits:
            _check(_driver().cuKernelSetAttribute(CARVEOUT_ATTRIBUTE, CARVEOUT, self.handle, device))
        if shared_bytes > self._shared_limits.get(device, 0):  # what the kernel declares itself comes on top
            _check(_driver().cuKernelSetAttribute(SHARED_BYTES_ATTRIBUTE, shared_bytes, self.handle, device))
        self._shared_limits[device] = max(shared_bytes, self._shared_limits.get(device, 0))
        config = _LaunchConfig(
            (ctypes.c_uint * 3)(*grid, *(1,) * (3 - len(grid))),
            (ctypes.c_uint * 3)(*block, *(1,) * (3 - len(block))),
            shared_bytes,
            torch.cuda.current_stream().cuda_stream,
        )
        attributes = []
        if programmatic and torch.cuda.get_device_capability(device) >= PROGRAMMATIC_CAPABILITY:
            attributes.append(_attribute(PROGRAMMATIC_STREAM_SERIALIZATION, 1))
        if cluster > 1:
            attributes.append(_attribute(CLUSTER_DIMENSION, cluster, 1, 1))
        config.attributes = (_LaunchAttribute * len(attributes))(*attributes)
        config.num_attributes = len(attributes)
        _check(_driver().cuLaunchKernelEx(ctypes.byref(config), self.handle, pointers, None), self.name)


@dataclass(frozen=True, eq=False)
class Module:
    """Machine code loaded into the driver, for every device of its architecture."""

    handle: ctypes.c_void_p
    _functions: dict[str, Function] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> Function:
        """The kernel declared ``extern "C" __global__ void name``."""
        if name not in self._functions:
            kernel = ctypes.c_void_p()
            _check(_driver().cuLibraryGetKernel(ctypes.byref(kernel), self.handle, name.encode()), name)
            self._functions[name] = Function(name, kernel)
        return self._functions[name]


def compile(source: str, options: Sequence[str] = ()) -> Module:
    """CUDA C++ ``source`` for the current device, from the disk cache if it was compiled before.

    Args:
        options: more NVRTC options, such as ``-DNAME=1``; architecture and language are set here.

    Raises:
        CudaUnavailableError: no CUDA device, no NVRTC, no driver, or one older than CUDA 12.
        RuntimeError: a source that does not compile; the message has the compiler's log.
    """
    if not torch.cuda.is_available():
        raise CudaUnavailableError("CUDA kernels need a CUDA device, and PyTorch sees none; use device=cpu")
    major, minor = torch.cuda.get_device_capability()
    return _load(source, tuple(options), f"sm_{major}{minor}")


def cubin(source: str, options: Sequence[str], architecture: str) -> bytes:
    """Machine code of ``source`` for ``architecture`` (as ``sm_90``). Needs no device and no driver.

    Raises:
        CudaUnavailableError: no NVRTC.
        RuntimeError: a source that does not compile.
    """
    return build(source, options, architecture)[0]


def build(source: str, options: Sequence[str], architecture: str) -> tuple[bytes, str]:
    """As :func:`cubin`, with the compiler's log (of ``--ptxas-options=-v``: registers and spills)."""
    library = _nvrtc()
    flags = [f"--gpu-architecture={architecture}", "--std=c++17", "--device-as-default-execution-space", *options]
    program = ctypes.c_void_p()
    result = library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"pmpd.cu", 0, None, None)
    if result:
        raise RuntimeError(f"NVRTC could not start: {library.nvrtcGetErrorString(result).decode()}")
    try:
        encoded = [flag.encode() for flag in flags]
        result = library.nvrtcCompileProgram(program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded))
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, text)
        if result:
            reason = library.nvrtcGetErrorString(result).decode()
            raise RuntimeError(f"NVRTC {'.'.join(map(str, nvrtc_version()))}: {reason}\n{text.value.decode()}")
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        code = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, code)
        return code.raw, text.value.decode()
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def nvrtc_version() -> tuple[int, int]:
    """Version of the NVRTC found, as (major, minor)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _nvrtc().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def cache_dir() -> Path:
    """Where machine code is kept."""
    return user_cache() / "cubin"


def compiled(source: str, options: Sequence[str], architecture: str) -> bytes:
    """As :func:`cubin`, kept on disk, whole: two processes may compile the same source at once."""
    parts = (str(CACHE_ENTRY_VERSION), source, *options, architecture, str(nvrtc_version()))
    path = cache_dir() / f"{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()}.cubin"
    if path.exists():
        return path.read_bytes()
    _say_once(architecture)
    log.debug("compiling for %s %s", architecture, " ".join(options))
    code = cubin(source, options, architecture)
    try:
        with atomic(path) as temporary:
            temporary.write_bytes(code)
    except OSError as error:
        _warn_once(error.strerror)
    return code


@functools.cache
def _say_once(architecture: str) -> None:
    log.info("compiling CUDA kernels for %s, half a second each, kept in %s", architecture, cache_dir())


@functools.cache
def _warn_once(reason: str) -> None:
    log.warning(
        "compiled CUDA kernels cannot be kept in %s (%s), so every process compiles its own; set XDG_CACHE_HOME to a "
        "folder that can be written",
        cache_dir(),
        reason,
    )


@functools.cache
def _load(source: str, options: tuple[str, ...], architecture: str) -> Module:
    code, library = compiled(source, options, architecture), ctypes.c_void_p()
    load = _driver().cuLibraryLoadData
    _check(load(ctypes.byref(library), code, None, None, 0, None, None, 0), "loading machine code")
    return Module(library)


def _c_value(argument: Tensor | int | float | None) -> ctypes._SimpleCData:
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def _check(result: int, what: str = "") -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        reason = text.value.decode() if text.value else "unknown error"
        raise RuntimeError(f"CUDA driver error {result} ({reason}){': ' + what if what else ''}")


@functools.cache
def _driver() -> ctypes.CDLL:
    name = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError as error:
        raise CudaUnavailableError(
            f"{name} does not load ({error}): install the NVIDIA driver, or use device=cpu"
        ) from error
    if not hasattr(driver, "cuLibraryLoadData"):
        raise CudaUnavailableError(
            "the NVIDIA driver is older than CUDA 12, which these kernels need: update the driver"
        )
    torch.cuda.init()
    return driver


@functools.cache
def _nvrtc() -> ctypes.CDLL:
    """The library that PyTorch's wheels carry, else one that the system's loader finds."""
    version = torch.version.cuda
    patterns = [f"libnvrtc.so.{version.split('.')[0]}*"] if version else ["libnvrtc.so.1[2-9]"]
    candidates = [str(path) for folder in _library_folders() for name in patterns for path in sorted(folder.glob(name))]
    candidates += [f"libnvrtc.so.{version.split('.')[0]}"] if version else []
    for candidate in candidates:
        try:
            # NVRTC opens its built-ins by name alone, which works only once they are in the process.
            if Path(candidate).is_absolute():
                for builtins in sorted(Path(candidate).parent.glob("libnvrtc-builtins.so.*")):
                    ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(candidate)
        except OSError as error:
            log.debug("%s does not load: %s", candidate, error)
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise CudaUnavailableError(
        f"no libnvrtc for CUDA {version or '12 or later'} found (looked for {candidates or patterns}): "
        "install PyTorch's CUDA wheel, or the package nvidia-cuda-nvrtc of its CUDA version"
    )


def _library_folders() -> list[Path]:
    """``nvidia/*/lib`` of every site that has NVIDIA's wheels, and PyTorch's own ``lib``."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in spec.submodule_search_locations or ()] if spec else []
    return [folder for root in roots for folder in sorted(root.glob("*/lib"))] + [Path(torch.__file__).parent / "lib"]
