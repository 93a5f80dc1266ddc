"""Kernels in CUDA C++, compiled by NVRTC when first asked for: what Triton has no words for.

Unusual: constants are macros before the source (and `common.cu`), so that each set of them is a kernel of its own, as in Triton. Launched
programmatically (see `zoo.kernels.launch`). NVRTC and the driver are spoken to through `cuda-bindings`, which torch brings
along where it was built for CUDA; without it, or before Hopper, Triton's kernels run.
"""

from __future__ import annotations

import functools
import warnings
from importlib.resources import files
from typing import Any

import torch

from zoo.kernels.launch import NVIDIA, hopper

bindings: Any = None
if NVIDIA and torch.cuda.is_available():
    try:
        from cuda.bindings import driver, nvrtc

        bindings = driver, nvrtc
    except ImportError:
        pass


def serves(x: torch.Tensor) -> bool:
    """Whether kernels in CUDA C++ run for x."""
    return bindings is not None and hopper(x) and _works(x.device.index or 0)


@functools.cache
def shared(device: int) -> int:
    """Bytes of shared memory that a program can have."""
    driver, _ = bindings
    most = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_checked(driver.cuDeviceGetAttribute(most, device)))


@functools.cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _works(device: int) -> bool:
    """Whether NVRTC and the driver are of one mind; said once, if not."""
    try:
        _function(("nothing",), device, ())
    except RuntimeError as e:
        warnings.warn(
            f"Kernels in CUDA C++ do not run on cuda:{device}, Triton's do in their place: {e}", stacklevel=2
        )
        return False
    return True


class Source:
    """A file `name`.cu beside this one, with a kernel of the same name, and the C types of its arguments. `parts`: files before it."""

    def __init__(self, name: str, types: tuple[Any, ...], parts: tuple[str, ...] = ()) -> None:
        self.name, self.types, self.parts = name, types, (*parts, name)
        self.made: dict[tuple[object, ...], Any] = {}

    def launch(
        self,
        x: torch.Tensor,
        programs: int,
        threads: int,
        shared: int,
        arguments: tuple[Any, ...],
        **constants: int,
    ) -> None:
        """`arguments` are numbers, tensors, or None for no tensor. `shared`: bytes of shared memory. On the stream of the device
        of x. Raises RuntimeError if CUDA refuses."""
        device = x.device.index or 0
        key = (device, programs, threads, shared, *constants.items())
        made = self.made.get(key)
        if made is None:
            made = self.made[key] = self._configured(device, programs, threads, shared, constants)
        config, function = made
        config.hStream = torch._C._cuda_getCurrentRawStream(device)
        values = tuple(a.data_ptr() if isinstance(a, torch.Tensor) else a or 0 for a in arguments)
        (error,) = bindings[0].cuLaunchKernelEx(config, function, (values, self.types), 0)
        if error:
            raise RuntimeError(f"{self.name}.cu was not launched: {error!r}")

    def _configured(
        self, device: int, programs: int, threads: int, shared: int, constants: dict[str, int]
    ) -> tuple[Any, Any]:
        driver, _ = bindings
        function, _ = _function(self.parts, device, tuple(constants.items()))
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = shared
        attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        config.attrs, config.numAttrs = [attribute], 1
        return config, function


@functools.cache
def _function(parts: tuple[str, ...], device: int, constants: tuple[tuple[str, int], ...]) -> tuple[Any, Any]:
    """The compiled kernel, and the module that it is of and lives as long as."""
    driver, _ = bindings
    most, rather, clusters = (
        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
        driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED,
    )
    with torch.cuda.device(device):
        torch.cuda.current_stream()  # makes the context current
        image = _compiled(parts, constants, torch.cuda.get_device_capability(device))
        module = _checked(driver.cuModuleLoadData(image))
        function = _checked(driver.cuModuleGetFunction(module, parts[-1].encode()))
        for attribute, value in ((most, shared(device)), (rather, 100), (clusters, 1)):
            _checked(driver.cuFuncSetAttribute(function, attribute, value))
    return function, module


@functools.cache
def _compiled(
    parts: tuple[str, ...], constants: tuple[tuple[str, int], ...], capability: tuple[int, int]
) -> bytes:
    """The kernel of the last of some files for GPUs of a capability. Raises RuntimeError with the compiler's words."""
    _, nvrtc = bindings
    name, own = parts[-1], "a" if capability == (9, 0) else ""  # Hopper's own instructions
    options = [f"--gpu-architecture=sm_{capability[0]}{capability[1]}{own}".encode(), b"-std=c++17"]
    text = source(parts, constants).encode()
    program = _checked(nvrtc.nvrtcCreateProgram(text, f"{name}.cu".encode(), 0, [], []))
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if error:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"{name}.cu does not compile ({error!r}): {log.decode(errors='replace')}")
        image: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, image))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return image


def source(parts: tuple[str, ...], constants: tuple[tuple[str, int], ...]) -> str:
    """What is compiled: constants, what kernels share, the files."""
    macros = "".join(f"#define {key} ({int(value)})\n" for key, value in constants)
    return macros + "".join(
        files(__package__).joinpath(f"{part}.cu").read_text() for part in ("common", *parts)
    )


def _checked(answer: tuple[Any, ...]) -> Any:
    error, *values = answer
    if error:
        raise RuntimeError(f"CUDA: {error!r}")
    return values[0] if len(values) == 1 else None
