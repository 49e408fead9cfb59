"""A stand-in for a GPU: a device "standin:0" whose arithmetic a CPU does, for tests without one.

    with stand_in.device() as activity: ...

Inside, the scripts find this device where they look for a GPU. As on a GPU, its tensors do not mix
with CPU tensors, turn into no NumPy array and take no CPU generator: each of these raises.
`activity.waits` counts, by the line that asked, what would make the host wait for a GPU;
`activity.launches` counts the operations that would start kernels (an estimate: a view starts none,
a fused or a foreach operation one, and a library may use several for one).

It is a backend of PyTorch's PrivateUse1 written in Python: autograd is the real one. Autocast does
nothing on it.
"""

import collections
import contextlib
import traceback
from pathlib import Path
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return []


_setup_privateuseone_for_python_backend("standin", Backend())
DEVICE = torch.device("standin", 0)
# CUDA has a kernel of its own for this; without one here autograd would take it apart into seven
# operations
KERNELS = torch.library.Library("aten", "IMPL")
KERNELS.impl(
    "silu_backward",
    lambda *args: run(torch.ops.aten.silu_backward.default, args, {}),
    "PrivateUse1",
)
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = (ROOT, ROOT / "support", ROOT / "new_slices")
# Operations that give the host a value, or a tensor whose shape depends on values.
SYNCING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2"}
# Operations that may take tensors of two devices.
MIXING = {"_to_copy", "copy_", "index", "index_put_"}
NO_KERNEL = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "_unsafe_view",
    "resize_",
}


class Activity:
    """What the device was asked to do."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.waits: collections.Counter = collections.Counter()
        self.launches: collections.Counter = collections.Counter()

    def wait(self, what: str) -> None:
        frames = reversed(traceback.extract_stack())
        ours = (frame for frame in frames if Path(frame.filename).parent in SCRIPTS)
        frame = next(ours, None)
        self.waits[f"{what}, {Path(frame.filename).name}: {frame.line}" if frame else what] += 1


activity = Activity()


class StandInTensor(torch.Tensor):
    """A tensor on the stand-in device; `data_on_cpu` holds its values."""

    @staticmethod
    def __new__(cls, data_on_cpu: torch.Tensor):
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            data_on_cpu.shape,
            strides=data_on_cpu.stride(),
            storage_offset=data_on_cpu.storage_offset(),
            dtype=data_on_cpu.dtype,
            device=DEVICE,
        )
        self.data_on_cpu = data_on_cpu
        return self

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a stand-in tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def tolist(self):
        activity.wait("tolist")
        return self.data_on_cpu.tolist()

    def __reduce_ex__(self, protocol):  # torch.save copies to the host
        return self.data_on_cpu.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo):
        copy = StandInTensor(self.data_on_cpu.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy


def wrap(value):
    if isinstance(value, torch.Tensor) and not isinstance(value, StandInTensor):
        with torch.inference_mode(False):
            return StandInTensor(value)
    return value


def unwrap(value):
    return value.data_on_cpu if isinstance(value, StandInTensor) else value


def run(operation, args, kwargs):
    """One operation of PyTorch: checked, counted, and done by the CPU."""
    name, has_kernel = (
        operation.overloadpacket.__name__,
        torch._C._dispatch_has_kernel_for_dispatch_key,
    )
    if has_kernel(operation.name(), "CompositeImplicitAutograd") and not has_kernel(
        operation.name(), "CPU"
    ):
        with Mode():  # inference mode passes composite operations on whole
            return operation.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, StandInTensor)]
    elsewhere = [
        tensor for tensor in tensors if not isinstance(tensor, StandInTensor) and tensor.dim()
    ]
    target = kwargs.get("device")
    to_here = target is not None and torch.device(target).type == DEVICE.type
    indexes_cpu_tensor = name == "index" and not isinstance(args[0], StandInTensor)
    if here and elsewhere and (name not in MIXING or indexes_cpu_tensor):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, found {DEVICE} and cpu: {operation}"
        )
    if (here or to_here) and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a {DEVICE.type!r} device type for generator but found 'cpu'")
    leaves = bool(here) and target is not None and not to_here  # a copy to the CPU
    fills_cpu_tensor = name == "copy_" and bool(here) and not isinstance(args[0], StandInTensor)
    if here:
        count_waits(name, args, leaves or fills_cpu_tensor)
    if (here or to_here) and not operation.is_view and name not in NO_KERNEL:
        activity.launches[name] += 1
    cpu_kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if to_here:
        cpu_kwargs["device"] = "cpu"
    args_on_cpu, cpu_kwargs = tree_map(unwrap, args), tree_map(unwrap, cpu_kwargs)
    out = operation(*args_on_cpu, **cpu_kwargs)
    if leaves:
        return out.clone()
    if fills_cpu_tensor:
        return args[0]
    if (not here and not to_here) or name == "_local_scalar_dense":
        return out
    return return_and_correct_aliasing(operation, args, kwargs, tree_map(wrap, out))


def count_waits(name: str, args: tuple, copies_to_cpu: bool) -> None:
    if name in SYNCING:
        activity.wait(name)
    if copies_to_cpu:
        activity.wait("to the CPU")
    if name in ("index", "index_put_"):
        for index in args[1]:
            if index is not None and index.dtype is torch.bool:
                activity.wait("boolean index")
            elif index is not None and not isinstance(index, StandInTensor):
                activity.wait("index on the CPU")


class Mode(TorchDispatchMode):
    """Sees the operations that create tensors, which no argument sends to `StandInTensor`."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


@contextlib.contextmanager
def device(free_memory: int = 2**40):
    """Let the scripts find this device where they look for a GPU, one with `free_memory` bytes."""
    activity.clear()
    overwrite = torch.__future__.set_overwrite_module_params_on_conversion
    replacements = {
        "support.runtime.pick_device": lambda name: DEVICE,
        "support.runtime.has_fast_bf16": lambda device, batch_size: False,
        "torch.cuda.mem_get_info": lambda device: (free_memory, free_memory),
        "torch.Tensor.pin_memory": lambda tensor: tensor,
        "torch.optim.adam._device_dtype_check_for_fused": lambda *args, **kwargs: None,
        "torch.optim.optimizer._get_fused_kernels_supported_devices": lambda: [DEVICE.type],
        "torch.nn.utils.clip_grad._has_foreach_support": lambda *args: True,
    }
    with contextlib.ExitStack() as stack:
        for target, value in replacements.items():
            stack.enter_context(mock.patch(target, value))
        overwrite(True)  # a module's .to() makes new parameters
        stack.callback(overwrite, False)
        stack.enter_context(Mode())
        yield activity
