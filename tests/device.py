"""A pretend accelerator: shows on a CPU what would go wrong, or slowly, on a GPU.

Tensors on the device "pretend" hold CPU data. They refuse to meet CPU tensors (those without axes
may, as on CUDA). Counted by the name of the operation: launches (views and uninitialised memory are
free) and waits of the host for the device: .item(), bool(), .tolist(), copies from and to the CPU,
shapes that depend on data (nonzero, x[mask]).
A call of kernels.py counts as what it launches on CUDA, whatever it does on the CPU.
"""
import contextlib
import sys
from collections import Counter
from functools import partial

import kernels
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
        "_local_scalar_dense"}
WAITS = {"nonzero", "masked_select", "equal", "allclose", "multinomial", "_unique2",
         "repeat_interleave", "_local_scalar_dense"}
# Launches forward and backward, and waits. march counts, adds up, reads the sum, and writes.
KERNELS = {"march": (4, 0, 1), "composite": (1, 1, 0), "hash_encode": (1, 3, 0),
           "voxel_interp": (1, 2, 0), "triplane_interp": (1, 2, 0)}


class Pretend(torch.Tensor):
    """A tensor on the device. raw: the CPU tensor with its data."""
    @staticmethod
    def __new__(cls, raw):
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, raw.stride(), dtype=raw.dtype,
                                                   device="pretend:0")
        made.raw = raw
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: the pretend device is switched off")

    def tolist(self):                                       # PyTorch's refuses subclasses
        return self.detach().cpu().tolist()

    def __format__(self, spec):
        return format(self.tolist(), spec)

    def __reduce_ex__(self, protocol):                      # torch.save
        return self.detach().cpu().__reduce_ex__(protocol)


def unwrap(values):
    for x in tree_leaves(values):
        if isinstance(x, torch.Tensor) and not isinstance(x, Pretend) and x.dim() > 0:
            raise RuntimeError(f"a CPU tensor {tuple(x.shape)} meets tensors of the pretend device")
    return tree_map_only(Pretend, lambda x: x.raw, values)


class Device(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.launches, self.waits = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Pretend)]
        place = kwargs.get("device")
        to_device = place is not None and torch.device(place).type == "pretend"
        if not inputs and not to_device:
            return func(*args, **kwargs)
        kwargs.update({"device": "cpu"} if to_device else {})
        moves = name == "_to_copy" and place is not None and to_device != bool(inputs)
        if moves or name == "copy_" and len(inputs) == 1:   # from or to the CPU
            self.waits[name] += 1
            out = func(*tree_map_only(Pretend, lambda x: x.raw, args), **kwargs)
            return args[0] if name == "copy_" else Pretend(out) if to_device else out
        out = func(*unwrap(args), **unwrap(kwargs))
        by_mask = name in ("index", "index_put", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1])
        self.waits[name] += by_mask or name in WAITS and not kwargs.get("output_size")
        stores = {x.raw.untyped_storage()._cdata for x in inputs}
        views = [torch.is_tensor(x) and x.untyped_storage()._cdata in stores
                 for x in tree_leaves(out)]
        self.launches[name] += name not in FREE and (func._schema.is_mutable or not all(views))
        known = {id(x.raw): x for x in inputs}              # written in place: the same tensor
        wrap = lambda x: known[id(x)] if id(x) in known else Pretend(x)     # noqa: E731
        return tree_map_only(torch.Tensor, wrap, out)


class Kernel(torch.autograd.Function):
    """A call of kernels.py, on the CPU data."""
    @staticmethod
    def forward(ctx, device, function, spec, *values):
        ctx.device, ctx.name = device, function.__name__
        device.launches[ctx.name] += KERNELS[ctx.name][0]
        device.waits[ctx.name] += KERNELS[ctx.name][2]
        raw = [x.detach() if torch.is_tensor(x) else x for x in unwrap(values)]
        ctx.inputs = [x.requires_grad_() for x, need in zip(raw, ctx.needs_input_grad[3:]) if need]
        args, kwargs = tree_unflatten(raw, spec)
        with torch.enable_grad():
            out = function(*args, **kwargs)
        ctx.out = tree_leaves(out)
        out = tree_map_only(torch.Tensor, lambda x: Pretend(x.detach()), out)
        constant = [x for x, y in zip(tree_leaves(out), ctx.out) if not y.requires_grad]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        return out

    @staticmethod
    def backward(ctx, *grads):
        ctx.device.launches[ctx.name + " backward"] += KERNELS[ctx.name][1]
        outs, grads = zip(*((x, g.raw) for x, g in zip(ctx.out, grads) if g is not None))
        found = iter(torch.autograd.grad(outs, ctx.inputs, grads))
        return tuple(Pretend(next(found)) if need else None for need in ctx.needs_input_grad)


@contextlib.contextmanager
def pretend_device():
    """The device, switched on. Modules get its version of the kernels that they import."""
    if torch._C._get_privateuse1_backend_name() != "pretend":           # once a process
        _setup_privateuseone_for_python_backend("pretend")
        torch.pretend.get_amp_supported_dtype = lambda: []
        torch.pretend.get_rng_state = torch.pretend.set_rng_state = lambda *_: None     # the CPU's
    made = Device()

    def call(function, *args, **kwargs):
        values, spec = tree_flatten((args, kwargs))
        if any(isinstance(x, Pretend) for x in values):
            return Kernel.apply(made, function, spec, *values)
        return function(*args, **kwargs)

    torch._C._set_only_lift_cpu_tensors(True)               # torch.tensor: first on the CPU
    with pytest.MonkeyPatch.context() as patch, made, \
            torch.autograd.set_multithreading_enabled(False):           # no thread for the device
        for name in KERNELS:
            function = getattr(kernels, name)
            for module in [*sys.modules.values()]:
                if module is not kernels and getattr(module, name, None) is function:
                    patch.setattr(module, name, partial(call, function))
        yield made
    torch._C._set_only_lift_cpu_tensors(False)
