"""A GPU without a GPU: CUDA tensors that only have a shape, beside CPU tensors that are real.

`FakeTensorMode` alone makes every tensor fake, which leaves files, loaders and NumPy out. Here the
CPU is real, and what comes back from the GPU are numbers of the right shape and type.

It does not reach: values (nothing is computed on `cuda`), kernels and whether one exists, streams,
memory and speed, several GPUs, TF32, compilers, other runtimes, processes of their own, and files
that `torch.load` reads, which are fake within the mode. The backward pass, for which torch asks the
driver for a stream, gives every parameter a gradient on its own device. Parameters that are moved
are replaced, where on a GPU they keep their identity.
"""

from contextlib import contextmanager
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

MOVES = ("copy_", "_to_copy")
INDEXED = ("index", "index_put_", "_index_put_impl_")
MATRIX_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}


class FakeGPU(FakeTensorMode):
    """Within it `cuda` is a device: tensors move there and back, and any mix of devices raises."""

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.products = 0  # matrix products that ran on it

    avoid_device_init = True  # although `torch.cuda.is_available`

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name, leaves = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        device = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        real = [tensor for tensor in tensors if not isinstance(tensor, FakeTensor)]
        if len(real) == len(tensors) and (device is None or device.type != "cuda"):
            return func(*args, **kwargs)
        if func.namespace == "aten" and torch._C._dispatch_has_kernel_for_dispatch_key(
            func.name(), "CompositeImplicitAutograd"
        ):  # made of others, which inference mode does not take apart
            with self:
                return func.decompose(*args, **kwargs)
        if name == "_local_scalar_dense":
            return 1 if args[0].dtype == torch.bool else 0
        if name == "_to_copy" and device is not None and device.type == "cpu":
            return numbers(args[0]).to(kwargs.get("dtype"))
        if name == "copy_" and real and args[0] is real[0]:
            return args[0].copy_(numbers(args[1]))
        if name in INDEXED and isinstance(args[0], FakeTensor):  # torch moves such indices itself
            with self:
                indices = [None if index is None else index.to("cuda") for index in args[1]]
            args = (args[0], indices, *args[2:])
            real = [tensor for tensor in args[2:3] if not isinstance(tensor, FakeTensor)]
        if name not in MOVES and any(tensor.ndim for tensor in real):
            raise RuntimeError(f"{func}: CPU and CUDA tensors in one operation")
        self.products += name in MATRIX_PRODUCTS
        return super().__torch_dispatch__(func, types, args, kwargs)


def numbers(fake):
    """What is read from the GPU: numbers of a fake tensor's shape and type, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(fake.shape, generator=generator).to(fake.dtype)


def apply(module, function, recurse=True):
    """`nn.Module._apply` with new parameters where one changes: torch's own swaps fake ones."""
    for child in module.children():
        child._apply(function)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            with torch.no_grad():
                moved = function(parameter)
            if moved is not parameter:
                module._parameters[name] = nn.Parameter(moved.detach(), parameter.requires_grad)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = function(buffer)
    return module


def backward(accelerator, loss, **options):
    """A gradient for every parameter that is trained, on its own device."""
    assert loss.requires_grad and loss.device.type == "cuda" and loss.ndim == 0
    for model in accelerator._models:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)


@contextmanager
def fake_gpu(free=10**9):
    """Yield a `FakeGPU` in a process that seems to have a GPU with so many free bytes."""
    nothing = dict.fromkeys(("_lazy_init", "reset_peak_memory_stats", "synchronize",
                             "empty_cache", "set_rng_state"), lambda *a, **k: None)  # fmt: skip
    told = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "is_bf16_supported": lambda *a, **k: True,
        "get_device_name": lambda *a: "no GPU",
        "get_device_capability": lambda *a: (9, 0),
        "max_memory_allocated": lambda *a: 1,
        "mem_get_info": lambda *a: (free, free),
        "get_rng_state": lambda *a: torch.zeros(16, dtype=torch.uint8),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        with (
            mock.patch.multiple(torch.cuda, **nothing, **told),
            mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None),
            mock.patch.object(nn.Module, "_apply", apply),
            mock.patch.object(Accelerator, "backward", backward),
            mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
            sdpa_kernel(SDPBackend.MATH),
            FakeGPU() as gpu,
        ):
            yield gpu
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
