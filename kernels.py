"""The operations under a radiance field: march along rays, blend samples, look features up. Slow mathematics beside the fast call.

Every operation comes in the same six parts, so that one can be read after the other:
    1. the maths            2. `x_ref`: plain PyTorch, the definition (any device, any float dtype)
    3. Triton forward       4. Triton backward       5. `torch.autograd.Function`       6. the public `x(..., backend="auto")`

    march            rays and an occupancy grid         -> packed samples            no gradient
    composite        densities and colours of samples   -> colour, opacity, depth    gradient to sigmas, rgbs
    hash_encode      positions and a hashed table       -> features                  gradient to table and positions
    voxel_interp     positions, index grid, its rows    -> features                  gradient to the rows, or to some of them
    triplane_interp  scenes' positions and planes       -> features                  gradient to the planes

Letters: R rays, N samples, C channels, L levels, F features (of a level), B scenes, H lines and W columns of a plane.
Packed samples: those of ray r are the rows offsets[r]:offsets[r+1] of every (N, ...) tensor; rays may differ in length, none is padded.

backend:  "reference"  the definition; autograd derives its backward
          "torch"      the operations that look features up: same results, hand-written backward, several times faster on a CPU
          "triton"     the kernels below (float32 or float64, in their input's precision)
          "auto"       triton for CUDA tensors, otherwise the fastest of the others

Floors, in the docstrings, are arithmetic, not measurements: ns for 1000 samples on an H200, in float32, if nothing but one thing took time:
memory at 4 TB/s (what a copy reaches), its L2 cache at 5.5 TB/s in sectors of 32 bytes if the L1 caches serve none (an atomic add counts
twice, as it reads and writes), arithmetic at 60 Tflop/s. What binds comes first.

Nothing needs a GPU to be checked: with TRITON_INTERPRET=1 set before this file is imported, the kernels run on CPU tensors.
    python kernels.py              check every operation against float64, then time it
    python kernels.py --resources  registers, shared memory and spills of every kernel, compiled without a GPU
"""
import argparse
import json
import math
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    NO_TRITON = ""
except ImportError as error:                    # macOS, Windows: everything but backend="triton" works
    NO_TRITON = f"Triton cannot be imported here ({error})"

    class tl:                                   # just enough for the kernels below to be defined; none is ever called
        constexpr = None

    class triton:
        jit = staticmethod(lambda function: function)

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
RAYS, BLOCK = 4, 32      # a program of march or composite: 4 rays, one warp each, 32 steps of the ray at a time (a full 128-byte line)
POINTS = 128             # a program of hash_encode: this many positions, one level
CELLS = 512              # a program of voxel_interp or triplane_interp: positions x features, at most POINTS positions; see _block_sizes


# -------------------------------------------------------------------------------------------------- shared by the operations
def _backend(backend, offered, *tensors):
    """Which implementation runs; says in one line why Triton cannot."""
    if backend not in ("auto", "triton", *offered):
        raise ValueError(f"backend {backend!r}: choose one of auto, triton, {', '.join(offered)}")
    dtype, on_gpu = tensors[0].dtype, all(t.is_cuda for t in tensors)
    if backend == "auto":
        backend = "triton" if on_gpu and not NO_TRITON and dtype in (torch.float32, torch.float64) else offered[-1]
    if backend == "triton":
        if NO_TRITON:
            raise RuntimeError(f'backend="triton": {NO_TRITON}')
        if not on_gpu and not INTERPRET:
            raise RuntimeError('backend="triton" needs CUDA tensors, these are on the CPU '
                               "(to run the kernels there, set TRITON_INTERPRET=1 before importing kernels)")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f'backend="triton" takes float32 or float64, not {dtype}')
    return backend


def _check(name, tensor, shape, like=None, dtype=None):
    """One clear line for a wrong shape (None: any size), dtype or device. `like` gives dtype (unless told) and device."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(want not in (None, have) for want, have in zip(shape, tensor.shape)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted ({wanted})")
    dtype = dtype or (like.dtype if like is not None else None)
    if (dtype is None and not tensor.is_floating_point()) or dtype not in (None, tensor.dtype):
        raise ValueError(f"{name} has dtype {tensor.dtype}, wanted {dtype or 'a floating-point one'}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the others on {like.device}")


def _turn(matrix):
    """matrix.t().contiguous() in a third of the time: PyTorch copies a 2-D transpose on one thread."""
    return matrix.t()[None].contiguous()[0]


# ====================================================================================================================== 1. march
# A ray o + t d meets the planes x = low_x and x = high_x at t = (low_x - o_x) / d_x and (high_x - o_x) / d_x; it is inside the box where it
# is inside all three slabs: t_in = largest entry, t_out = smallest exit, cut to [near, far]. On the lattice t_k = t_in + (k + jitter) step,
# the interval [t_k, t_k + step] is a sample when its middle lies before t_out and in an occupied cell of the grid.
# A ray with a unit direction stays in the box for at most its diagonal, so it has at most diagonal / step + 2 points, whatever
# `far` is. A shorter direction would have more, without limit: beyond twice the diagonal it is refused. A direction of 0 leads
# nowhere: no samples.

TOO_SHORT = "rays_d: a ray stays in the box for more than twice its diagonal: give unit directions"


def march_ref(rays_o, rays_d, occupied, aabb, step, near=0.0, far=math.inf, jitter=None):
    """All R x S lattice points at once, S the longest ray's count, then keep those that hit."""
    low, high = aabb
    parallel = rays_d == 0                                                          # never leaves its slab, or never enters it
    inverse = 1 / torch.where(parallel, 1.0, rays_d)
    first, second = (low - rays_o) * inverse, (high - rays_o) * inverse             # (R, 3)
    inside = (low <= rays_o) & (rays_o <= high)
    always = torch.where(inside, math.inf, -math.inf).to(rays_o.dtype)              # a parallel ray's stay in its slab: (-inf, inf) or none
    enter = torch.where(parallel, -always, torch.minimum(first, second))
    leave = torch.where(parallel, always, torch.maximum(first, second))
    t_in, t_out = enter.amax(1).clamp(min=near), leave.amin(1).clamp(max=far)       # (R,)
    crosses = (t_out > t_in) & (t_out < math.inf) & ~parallel.all(1)                # not where NaN
    length = torch.where(crosses, t_out - t_in, 0.0)                                # (R,)
    if (length > 2 * (high - low).norm()).any():
        raise ValueError(TOO_SHORT)

    steps = int(length.max() / step + 0.5) + 1 if len(rays_o) else 0
    k = torch.arange(steps, device=rays_o.device).to(rays_o.dtype)                  # (S,)
    t = t_in[:, None] + (k if jitter is None else k + jitter[:, None]) * step       # (R, S)
    middle = t + 0.5 * step
    hit = (middle < t_out[:, None]) & (length > 0)[:, None]
    cell = torch.zeros_like(hit, dtype=torch.int32)
    for axis, size in enumerate(occupied.shape):                                    # grid coordinates are linear in t
        scale = 1 / (high[axis] - low[axis]) * size
        place = (rays_d[:, axis] * scale)[:, None] * middle + ((rays_o[:, axis] - low[axis]) * scale)[:, None]
        cell = cell * size + place.int().clamp_(0, size - 1)
    hit &= occupied.reshape(-1).index_select(0, cell.view(-1)).view_as(hit)

    t_starts, counts = t.masked_select(hit), hit.sum(1)
    offsets = nnf.pad(counts.cumsum(0), (1, 0))
    ray_ids = torch.repeat_interleave(counts, output_size=len(t_starts))
    return t_starts, t_starts + step, offsets, ray_ids


@triton.jit
def _divide(a, b):
    """Correctly rounded, as PyTorch divides (in float32, Triton's own / may be off in the last bit)."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


@triton.jit
def _slab(o, d, low, high, t_in, t_out):
    inverse = _divide(tl.full(d.shape, 1.0, d.dtype), tl.where(d == 0, 1.0, d).to(d.dtype))
    first, second = (low - o) * inverse, (high - o) * inverse
    inside = (low <= o) & (o <= high)
    enter = tl.where(d == 0, tl.where(inside, float("-inf"), float("inf")), tl.minimum(first, second))
    leave = tl.where(d == 0, tl.where(inside, float("inf"), float("-inf")), tl.maximum(first, second))
    return tl.maximum(t_in, enter.to(d.dtype)), tl.minimum(t_out, leave.to(d.dtype))


@triton.jit
def _to_grid(o, d, low, high, size):
    scale = _divide(tl.full(o.shape, 1.0, o.dtype), high - low + tl.zeros_like(o)) * size
    return (o - low) * scale, d * scale


@triton.jit
def _cell(o, d, size, middle):
    place = d[:, None] * middle + o[:, None]
    return tl.minimum(tl.maximum(place.to(tl.int32), 0), size - 1)


@triton.jit
def _march_kernel(rays_o, rays_d, occupied, aabb, jitter, counts, offsets, t_starts, t_ends, ray_ids, R, X, Y, Z,
                  step: "fp64", near: "fp64", far: "fp64", WRITE: tl.constexpr, RAYS: tl.constexpr, BLOCK: tl.constexpr):
    """One body for both passes, compiled without fused multiply-adds: the counting and the writing pass must agree to the last bit."""
    r = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    alive = r < R
    dtype = rays_o.dtype.element_ty
    ox, oy, oz = tl.load(rays_o + r * 3, alive, 0.0), tl.load(rays_o + r * 3 + 1, alive, 0.0), tl.load(rays_o + r * 3 + 2, alive, 0.0)
    dx, dy, dz = tl.load(rays_d + r * 3, alive, 0.0), tl.load(rays_d + r * 3 + 1, alive, 0.0), tl.load(rays_d + r * 3 + 2, alive, 0.0)
    x0, y0, z0 = tl.load(aabb), tl.load(aabb + 1), tl.load(aabb + 2)
    x1, y1, z1 = tl.load(aabb + 3), tl.load(aabb + 4), tl.load(aabb + 5)
    t_in, t_out = _slab(ox, dx, x0, x1, tl.full((RAYS,), near, dtype), tl.full((RAYS,), far, dtype))
    t_in, t_out = _slab(oy, dy, y0, y1, t_in, t_out)
    t_in, t_out = _slab(oz, dz, z0, z1, t_in, t_out)
    number = ox + oy + oz + dx + dy + dz                                            # NaN where any is: minimum and maximum dropped it
    crosses = alive & (number == number) & (t_out > t_in) & (t_out < float("inf"))
    crosses = crosses & ((dx != 0) | (dy != 0) | (dz != 0))
    length = tl.where(crosses, t_out - t_in, 0.0).to(dtype)
    diagonal = tl.sqrt((x1 - x0) * (x1 - x0) + (y1 - y0) * (y1 - y0) + (z1 - z0) * (z1 - z0))
    too_short = length > 2 * diagonal
    length = tl.where(too_short, 0.0, length).to(dtype)
    size = tl.full((RAYS,), step, dtype)
    ox, dx = _to_grid(ox, dx, x0, x1, X)
    oy, dy = _to_grid(oy, dy, y0, y1, Y)
    oz, dz = _to_grid(oz, dz, z0, z1, Z)
    steps = tl.max((_divide(length, size) + 0.5).to(tl.int32)) + 1
    shift = tl.load(jitter + r, alive, 0.0)
    done = tl.zeros((RAYS,), tl.int32)                                              # samples of the ray so far
    begin = tl.load(offsets + r, alive, 0)
    start = 0
    while start < steps:
        k = (start + tl.arange(0, BLOCK)).to(dtype)
        t = t_in[:, None] + (k[None, :] + shift[:, None]) * size[:, None]
        middle = t + 0.5 * size[:, None]
        hit = (middle < t_out[:, None]) & (length > 0)[:, None]
        cell = (_cell(ox, dx, X, middle) * Y + _cell(oy, dy, Y, middle)).to(tl.int64) * Z + _cell(oz, dz, Z, middle)
        hit = hit & (tl.load(occupied + cell, hit, 0) != 0)
        if WRITE:
            slot = begin[:, None] + (done[:, None] + tl.cumsum(hit.to(tl.int32), 1) - 1)
            tl.store(t_starts + slot, t, hit)
            tl.store(t_ends + slot, t + size[:, None], hit)
            tl.store(ray_ids + slot, tl.broadcast_to(r[:, None], (RAYS, BLOCK)), hit)
        done += tl.sum(hit.to(tl.int32), 1)
        start += BLOCK
    if not WRITE:
        tl.store(counts + r, tl.where(too_short, -(1 << 40), done.to(tl.int64)), alive)


def _march_triton(rays_o, rays_d, occupied, aabb, step, near, far, jitter):
    """Two launches: count the samples of each ray, add the counts up, write the samples where they belong."""
    R, device, dtype = len(rays_o), rays_o.device, rays_o.dtype
    rays_o, rays_d, aabb, grid = rays_o.contiguous(), rays_d.contiguous(), aabb.contiguous(), occupied.contiguous().view(torch.uint8)
    jitter = torch.zeros(R, dtype=dtype, device=device) if jitter is None else jitter.contiguous()
    offsets = torch.zeros(R + 1, dtype=torch.int64, device=device)

    def launch(t_starts, t_ends, ray_ids, write):
        with torch.cuda.device_of(rays_o):
            _march_kernel[triton.cdiv(R, RAYS),](rays_o, rays_d, grid, aabb, jitter, offsets[1:], offsets, t_starts, t_ends, ray_ids, R,
                                                 *occupied.shape, step, near, far, write, RAYS, BLOCK, num_warps=RAYS, enable_fp_fusion=False)
    if R:
        launch(jitter, jitter, offsets, False)
    offsets = offsets.cumsum(0)
    N = int(offsets[-1])
    if N < 0:                                                                       # a ray was marked
        raise ValueError(TOO_SHORT)
    t_starts, t_ends = (torch.empty(N, dtype=dtype, device=device) for _ in range(2))
    ray_ids = torch.empty(N, dtype=torch.int64, device=device)
    if N:
        launch(t_starts, t_ends, ray_ids, True)
    return t_starts, t_ends, offsets, ray_ids


def march(rays_o, rays_d, occupied, aabb, step, near=0.0, far=math.inf, jitter=None, backend="auto"):
    """Walk rays through an occupancy grid and emit packed samples.  No gradient.

    rays_o, rays_d (R, 3) origins and unit directions, so that t is metric (a zero or NaN direction
    gives no samples); occupied (X, Y, Z) bool; aabb (2, 3) lowest and highest corner of the grid;
    step, near, far in units of t; jitter (R,) in [0, 1) or None for 0 (evaluation).
    Returns t_starts (N,), t_ends (N,) = t_starts + step, offsets (R+1,) int64, ray_ids (N,) int64.
    Example: a ray along +x from the left face of a box 1 wide, all occupied, step 0.4: middles 0.2, 0.6 -> t_starts 0, 0.4 (1.0 is not < 1).
    Bytes: 24 a ray in; out 16 a sample in float32 (two times, one int64); grid reads stay in cache (2 MB at 128^3), and both passes make them.
    Floor: L2, 12 ns for 1000 steps of the lattice, occupied or not, if each of both passes touches another sector (along z 32 cells share
    one); memory, 5 for 1000 samples at 20 a ray, with rays read and offsets read or written in both passes; arithmetic, 1 (some 30 flops a
    step).
    Raises ValueError (shape, dtype, device, step, directions too short), RuntimeError (Triton asked
    for where it cannot run). Source: Instant-NGP, appendix E.
    """
    _check("rays_o", rays_o, (None, 3))
    _check("rays_d", rays_d, (len(rays_o), 3), rays_o)
    _check("occupied", occupied, (None, None, None), rays_o, torch.bool)
    _check("aabb", aabb, (2, 3), rays_o, aabb.dtype)
    if not (0 < step < math.inf):
        raise ValueError(f"step must be positive and finite, not {step}")
    if jitter is not None:
        _check("jitter", jitter, (len(rays_o),), rays_o)
    backend = _backend(backend, ("reference",), rays_o)
    with torch.no_grad():
        run = _march_triton if backend == "triton" else march_ref
        return run(rays_o, rays_d, occupied, aabb.to(rays_o.dtype), float(step), float(near), float(far), jitter)


# ================================================================================================================== 2. composite
# NeRF eq. 3. With delta_i = t_end - t_start, tau_i = sigma_i delta_i and t_i the middle of the interval, along each ray
#     T_i = exp(-sum_{j<i} tau_j)    alpha_i = 1 - exp(-tau_i)    w_i = T_i alpha_i
#     rgb = sum w_i rgb_i            acc = sum w_i                depth = sum w_i t_i    (not divided by acc; no background)
# Gradient: with g_i = dL/drgb . rgb_i + dL/dacc + t_i dL/ddepth + dL/dw_i
#     dL/drgb_i = w_i dL/drgb        dL/dsigma_i = delta_i (g_i T_{i+1} - sum_{j>i} g_j w_j)
# Both sums exclude their own term and start at their own end: never as total minus prefix. Behind an opaque surface such a difference
# is 0 in float32, and where tau overflows it is inf - inf.

def composite_ref(sigmas, rgbs, t_starts, t_ends, offsets, early_stop=0.0):
    """Rays padded to the longest, (R, S), for the one sum along the ray; cumsum's own backward sums from the far end."""
    counts = offsets[1:] - offsets[:-1]                                             # (R,)
    R, S = len(counts), int(counts.max()) if len(counts) else 0
    mask = torch.arange(S, device=counts.device) < counts[:, None]                  # (R, S), its true entries are the packed samples
    ray = torch.repeat_interleave(counts, output_size=len(sigmas))                  # (N,)
    t_starts, t_ends = t_starts.detach(), t_ends.detach()
    tau = sigmas * (t_ends - t_starts)
    before = nnf.pad(tau.new_zeros(R, S).masked_scatter(mask, tau), (1, 0))[:, :S].cumsum(1)    # moved on by one: the sum excludes its own
    T = torch.exp(-before.masked_select(mask))                                      # (N,)
    weights = T * torch.where(tau < 0.5, -torch.expm1(-tau), 1 - torch.exp(-tau))   # each where its value and its derivative keep their digits
    if early_stop > 0:
        weights = torch.where(T >= early_stop, weights, 0.0)
    rgb = rgbs.new_zeros(R, rgbs.shape[1]).index_add(0, ray, weights[:, None] * rgbs)
    acc = rgbs.new_zeros(R).index_add(0, ray, weights)
    depth = rgbs.new_zeros(R).index_add(0, ray, weights * (0.5 * (t_starts + t_ends)))
    return rgb, acc, depth, weights


@triton.jit
def _join(sum_a, but_last_a, sum_b, but_last_b):
    return sum_a + sum_b, sum_a + but_last_b


@triton.jit
def _sum_before(x, REVERSE: tl.constexpr):
    """Exclusive sums along axis 1 without a subtraction: scan pairs (sum of a stretch, sum of the stretch without its last element)."""
    _, but_last = tl.associative_scan((x, tl.zeros_like(x)), 1, _join, reverse=REVERSE)
    return but_last


@triton.jit
def _alpha(tau):
    """1 - exp(-tau) to full relative precision, as expm1 would: the rounding of u = exp(-tau) cancels in (1 - u) / log(u)."""
    u = tl.exp(-tau)
    return tl.where(u == 1, tau, tl.where(u > 0.5, (u - 1) * tau / tl.log(u), 1 - u))


@triton.jit
def _composite_forward(sigmas, rgbs, t_starts, t_ends, offsets, rgb, acc, depth, weights, transmittance, R, early_stop: "fp64",
                       C: tl.constexpr, CP: tl.constexpr, RAYS: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    alive = r < R
    dtype = sigmas.dtype.element_ty
    begin, end = tl.load(offsets + r, alive, 0), tl.load(offsets + r + 1, alive, 0)
    c = tl.arange(0, CP)
    limit = tl.full((1, 1), early_stop, dtype)
    tau_sum, acc_sum, depth_sum = tl.zeros((RAYS,), dtype), tl.zeros((RAYS,), dtype), tl.zeros((RAYS,), dtype)
    rgb_sum = tl.zeros((RAYS, CP), dtype)
    start, longest = 0, tl.max(end - begin).to(tl.int32)
    while start < longest:
        n = begin[:, None] + start + tl.arange(0, BLOCK)[None, :]                   # (RAYS, BLOCK)
        ok = n < end[:, None]
        t0, t1 = tl.load(t_starts + n, ok, 0.0), tl.load(t_ends + n, ok, 0.0)
        tau = tl.load(sigmas + n, ok, 0.0) * (t1 - t0)
        T = tl.exp(-(tau_sum[:, None] + _sum_before(tau, False)))
        w = tl.where(T >= limit, T * _alpha(tau), 0.0).to(dtype)
        colour = tl.load(rgbs + n[:, :, None] * C + c[None, None, :], ok[:, :, None] & (c < C)[None, None, :], 0.0)
        rgb_sum += tl.sum(w[:, :, None] * colour, 1)
        acc_sum += tl.sum(w, 1)
        depth_sum += tl.sum(w * (0.5 * (t0 + t1)), 1)
        tau_sum += tl.sum(tau, 1)
        tl.store(weights + n, w, ok)
        tl.store(transmittance + n, T, ok)
        start += BLOCK
    tl.store(rgb + r[:, None] * C + c[None, :], rgb_sum, alive[:, None] & (c < C)[None, :])
    tl.store(acc + r, acc_sum, alive)
    tl.store(depth + r, depth_sum, alive)


@triton.jit
def _composite_backward(sigmas, rgbs, t_starts, t_ends, offsets, transmittance, d_rgb, d_acc, d_depth, d_weights, d_sigmas, d_rgbs, R,
                        early_stop: "fp64", C: tl.constexpr, CP: tl.constexpr, RAYS: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of each ray from its far end; `behind` carries sum_{j>i} g_j w_j from block to block."""
    r = tl.program_id(0).to(tl.int64) * RAYS + tl.arange(0, RAYS)
    alive = r < R
    dtype = sigmas.dtype.element_ty
    begin, end = tl.load(offsets + r, alive, 0), tl.load(offsets + r + 1, alive, 0)
    c = tl.arange(0, CP)
    limit = tl.full((1, 1), early_stop, dtype)
    g_rgb = tl.load(d_rgb + r[:, None] * C + c[None, :], alive[:, None] & (c < C)[None, :], 0.0)
    g_acc, g_depth = tl.load(d_acc + r, alive, 0.0), tl.load(d_depth + r, alive, 0.0)
    behind = tl.zeros((RAYS,), dtype)
    start = tl.cdiv(tl.max(end - begin).to(tl.int32), BLOCK) * BLOCK - BLOCK            # the longest ray's last block
    while start >= 0:
        n = begin[:, None] + start + tl.arange(0, BLOCK)[None, :]
        ok = n < end[:, None]
        t0, t1 = tl.load(t_starts + n, ok, 0.0), tl.load(t_ends + n, ok, 0.0)
        tau = tl.load(sigmas + n, ok, 0.0) * (t1 - t0)
        T = tl.load(transmittance + n, ok, 0.0)
        seen = ok & (T >= limit)
        w = tl.where(seen, T * _alpha(tau), 0.0).to(dtype)
        some = ok[:, :, None] & (c < C)[None, None, :]
        colour = tl.load(rgbs + n[:, :, None] * C + c[None, None, :], some, 0.0)
        g = tl.sum(colour * g_rgb[:, None, :], 2) + g_acc[:, None] + (0.5 * (t0 + t1)) * g_depth[:, None]
        if d_weights is not None:
            g += tl.load(d_weights + n, ok, 0.0)
        gw = tl.where(seen, g * w, 0.0).to(dtype)
        after = behind[:, None] + _sum_before(gw, True)
        d_sigma = tl.where(seen, (t1 - t0) * (g * T * tl.exp(-tau) - after), 0.0)
        tl.store(d_sigmas + n, d_sigma, ok)
        tl.store(d_rgbs + n[:, :, None] * C + c[None, None, :], w[:, :, None] * g_rgb[:, None, :], some)
        behind += tl.sum(gw, 1)
        start -= BLOCK


class _Composite(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigmas, rgbs, t_starts, t_ends, offsets, early_stop):
        ctx.set_materialize_grads(False)
        sigmas, rgbs, t_starts, t_ends, offsets = (a.contiguous() for a in (sigmas, rgbs, t_starts, t_ends, offsets))
        R, C = len(offsets) - 1, rgbs.shape[1]
        rgb, acc, depth = rgbs.new_empty(R, C), rgbs.new_empty(R), rgbs.new_empty(R)
        weights, transmittance = torch.empty_like(sigmas), torch.empty_like(sigmas)
        ctx.sizes = (R, early_stop, C, triton.next_power_of_2(C), RAYS, BLOCK)
        if R:
            with torch.cuda.device_of(sigmas):
                _composite_forward[triton.cdiv(R, RAYS),](sigmas, rgbs, t_starts, t_ends, offsets, rgb, acc, depth, weights, transmittance,
                                                          *ctx.sizes, num_warps=RAYS, enable_fp_fusion=True)
        ctx.save_for_backward(sigmas, rgbs, t_starts, t_ends, offsets, transmittance)
        return rgb, acc, depth, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, d_rgb, d_acc, d_depth, d_weights):
        sigmas, rgbs, *_ = saved = ctx.saved_tensors
        R, _, C = ctx.sizes[:3]
        d_rgb, d_acc, d_depth = (sigmas.new_zeros(shape) if d is None else d.contiguous()
                                 for d, shape in ((d_rgb, (R, C)), (d_acc, (R,)), (d_depth, (R,))))
        d_weights = None if d_weights is None else d_weights.contiguous()
        d_sigmas, d_rgbs = torch.empty_like(sigmas), torch.empty_like(rgbs)
        if R:
            with torch.cuda.device_of(sigmas):
                _composite_backward[triton.cdiv(R, RAYS),](*saved, d_rgb, d_acc, d_depth, d_weights, d_sigmas, d_rgbs,
                                                           *ctx.sizes, num_warps=RAYS, enable_fp_fusion=True)
        return d_sigmas, d_rgbs, None, None, None, None


def composite(sigmas, rgbs, t_starts, t_ends, offsets, early_stop=0.0, backend="auto"):
    """Blend the packed samples of each ray from front to back (NeRF eq. 3).  Returns rgb (R, C), acc (R,), depth (R,), weights (N,).

    sigmas (N,) density per unit of t, at least 0; rgbs (N, C); t_starts, t_ends (N,) finite intervals, front to back in each ray;
    offsets (R+1,) int64 from 0 to N. An empty ray gives zeros. No background: add (1 - acc) bg yourself.
    early_stop: where the transmittance T_i is below it, the rest of the ray counts as hidden: weight 0, no gradient. 0 is off.
    Gradient of all four outputs to sigmas and rgbs; none to t_starts, t_ends, offsets.
    Example: one sample, sigma = ln 2, interval [1, 2], colour 1: alpha 0.5, so rgb 0.5, acc 0.5, depth 0.75, weights [0.5].
    Bytes a sample in float32: forward reads 12 + 4C, writes 8 (weight, transmittance): 32 at C = 3; backward reads 16 + 4C, writes 4 + 4C: 44
    (48 where weights carry a cotangent).
    Floor: memory, 8 ns forward and 11 backward; arithmetic, 1 (some 60 flops each way). The kernels move just this: transmittance is kept
    (4 written, 4 read) because the backward runs from the far end, where the sum in front of a sample is not known yet, and w_i / alpha_i
    does not give it back where alpha_i is 0. A ray of 5 samples costs a warp as many instructions as one of 32, but not as many bytes.
    Raises ValueError (shape, dtype, device; on the CPU also offsets that do not cover the samples), RuntimeError (Triton cannot run).
    """
    _check("sigmas", sigmas, (None,))
    _check("rgbs", rgbs, (len(sigmas), None), sigmas)
    _check("t_starts", t_starts, (len(sigmas),), sigmas)
    _check("t_ends", t_ends, (len(sigmas),), sigmas)
    _check("offsets", offsets, (None,), sigmas, torch.int64)
    if len(offsets) == 0 or rgbs.shape[1] == 0:
        raise ValueError("offsets needs R + 1 entries and rgbs at least one channel")
    if not offsets.is_cuda and (offsets[0] != 0 or offsets[-1] != len(sigmas) or (offsets.diff() < 0).any()):
        raise ValueError(f"offsets must rise from 0 to the number of samples, {len(sigmas)}; they run from {offsets[0]} to {offsets[-1]}")
    if _backend(backend, ("reference",), sigmas) == "triton":
        return _Composite.apply(sigmas, rgbs, t_starts, t_ends, offsets, float(early_stop))
    return composite_ref(sigmas, rgbs, t_starts, t_ends, offsets, early_stop)


# ================================================================================================================ 3. hash_encode
# Instant-NGP section 3. Level l is a cubic lattice of res_l cells a side. A position falls into one cell of each level; the features of the
# cell's eight corners, rows of the level's stretch of the table, are interpolated trilinearly, and the levels are concatenated:
#     p = clamp(x, 0, 1) res      c = min(floor(p), res - 1)      u = p - c
#     out[l] = sum_{k in {0,1}^3} w_k table[row(c + k)]           w_k = prod_axis (u if k_axis else 1 - u)
#     row(v) = v_x + v_y (res+1) + v_z (res+1)^2                  where all (res+1)^3 corners fit into 2^log2_table rows ("dense")
#            = (v_x ^ v_y 2654435761 ^ v_z 805459861) mod 2^log2_table    otherwise (eq. 4; products mod 2^32, so int32 does)
# Gradient, with g = dL/dout[l]:  dL/dtable[row(c + k)] += w_k g     dL/dx_axis += res sum_k (dw_k/du_axis) g . table[row(c + k)]

class HashLevels(NamedTuple):
    """Layout of a hash table: tuples of length L, but offsets, of length L + 1. The table has offsets[-1] rows."""
    resolutions: tuple          # cells a side
    sizes: tuple                # rows of the level
    offsets: tuple              # its first row
    dense: tuple                # True: every corner has its own row


def hash_levels(levels, base, finest, log2_table):
    """Resolutions in geometric progression from base to finest (Instant-NGP eq. 2 and 3), each level dense where it fits 2^log2_table rows."""
    if levels < 1 or not 1 <= base <= finest or not 0 <= log2_table <= 30:
        raise ValueError(f"hash_levels: wanted levels >= 1, 1 <= base <= finest, 0 <= log2_table <= 30; got {levels}, {base}, {finest}, {log2_table}")
    growth = math.exp(math.log(finest / base) / (levels - 1)) if levels > 1 else 1.0
    resolutions = tuple(math.floor(base * growth ** level + 1e-6) for level in range(levels))       # tiny: finest itself must not round down
    dense = tuple((res + 1) ** 3 <= 2 ** log2_table for res in resolutions)
    sizes = tuple((res + 1) ** 3 if fits else 2 ** log2_table for res, fits in zip(resolutions, dense))
    return HashLevels(resolutions, sizes, tuple(sum(sizes[:level]) for level in range(levels + 1)), dense)


PRIMES = (1, 2654435761 - 2 ** 32, 805459861)           # as int32


def _axes(x, levels):
    """x (3, N) -> all levels' cells axis by axis: what the lower and the upper corner add to the row's number, (L, 3, 2, N) int32, and their
    weights, (L, 3, 2, N)."""
    res, size, _, dense = _layout(levels, x.device).view(-1, 4, 1, 1).unbind(1)     # each (L, 1, 1)
    place = x.clamp(0, 1) * res                                                     # (L, 3, N)
    cell = place.detach().int().clamp_(torch.zeros_like(res), res - 1)
    upper, side = place - cell, res + 1
    factor = torch.tensor(PRIMES, dtype=torch.int32, device=x.device)[:, None]      # (3, 1)
    factor = torch.where(dense > 0, torch.cat([torch.ones_like(res), side, side * side], 1), factor)            # (L, 3, 1)
    part = cell * factor
    return torch.stack([part, part + factor], 2) & torch.where(dense > 0, -1, size - 1)[..., None], torch.stack([1 - upper, upper], 2)


def _rows_weights(part, weight, dense):
    """The axes of a level, (3, 2, N) each -> rows (8, N) int32 of the corners in its stretch of the table, weights (8, N). Bits 0, 1, 2 of the
    corner's number: x, y, z."""
    (cx, cy, cz), (wx, wy, wz) = part, weight                                       # each (2, N)
    cy, cz, wy, wz = cy[:, None], cz[:, None, None], wy[:, None], wz[:, None, None]
    rows = cz + cy + cx if dense else cz ^ cy ^ cx                                  # (2, 2, 2, N), axes z, y, x; mod 2^T: so were the parts
    return rows.view(8, -1), (wz * wy * wx).view(8, -1)


def hash_encode_ref(x, table, levels):
    out = []
    for *axes, dense, first in zip(*_axes(x.t(), levels), levels.dense, levels.offsets):
        rows, weights = _rows_weights(*axes, dense)
        out.append((table[rows + first] * weights[:, :, None]).sum(0))              # (8, N, F) -> (N, F)
    return torch.cat(out, 1)


@triton.jit
def _place(x, n, alive, axis: tl.constexpr, res):
    """One axis of the positions -> lower lattice coordinate, its distance u to the position in cells, whether x lies in [0, 1]."""
    x = tl.load(x + n * 3 + axis, alive, 0.0)
    p = tl.where(x < 0, 0.0, tl.where(x > 1, 1.0, x)).to(x.dtype) * res                 # not minimum and maximum: those would hide a NaN
    cell = tl.minimum(tl.maximum(p.to(tl.int32), 0), res - 1)
    return cell, p - cell.to(x.dtype), (x >= 0) & (x <= 1)


@triton.jit
def _row(x, y, z, res, size, first, dense):
    flat = x + (res + 1) * (y + (res + 1) * z)
    hashed = (x ^ (y * -1640531535) ^ (z * 805459861)) & (size - 1)                     # 2654435761 as int32
    return (tl.where(dense != 0, flat, hashed) + first).to(tl.int64)


@triton.jit
def _hash_forward(x, table, layout, out, N, L, F: tl.constexpr, FP: tl.constexpr, POINTS: tl.constexpr):
    """Levels are the second grid axis: programs of one level run side by side, so that its stretch of the table stays in the L2 cache."""
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    level = tl.program_id(1)
    alive, f = n < N, tl.arange(0, FP)
    some = alive[:, None] & (f < F)[None, :]
    res, size = tl.load(layout + level * 4), tl.load(layout + level * 4 + 1)
    first, dense = tl.load(layout + level * 4 + 2), tl.load(layout + level * 4 + 3)
    cx, ux, _ = _place(x, n, alive, 0, res)
    cy, uy, _ = _place(x, n, alive, 1, res)
    cz, uz, _ = _place(x, n, alive, 2, res)
    total = tl.zeros((POINTS, FP), table.dtype.element_ty)
    for k in tl.static_range(8):
        row = _row(cx + (k & 1), cy + (k >> 1 & 1), cz + (k >> 2), res, size, first, dense)
        w = (ux if k & 1 else 1 - ux) * (uy if k >> 1 & 1 else 1 - uy) * (uz if k >> 2 else 1 - uz)
        total += w[:, None] * tl.load(table + row[:, None] * F + f[None, :], some, 0.0)
    tl.store(out + n[:, None] * (L * F) + level * F + f[None, :], total, some)


@triton.jit
def _hash_backward_table(x, layout, d_out, d_table, N, L, F: tl.constexpr, FP: tl.constexpr, POINTS: tl.constexpr):
    """The forward's mirror image: eight atomic adds of a row of F. Their order, and so the last bits of the sums, changes from run to run."""
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    level = tl.program_id(1)
    alive, f = n < N, tl.arange(0, FP)
    some = alive[:, None] & (f < F)[None, :]
    res, size = tl.load(layout + level * 4), tl.load(layout + level * 4 + 1)
    first, dense = tl.load(layout + level * 4 + 2), tl.load(layout + level * 4 + 3)
    cx, ux, _ = _place(x, n, alive, 0, res)
    cy, uy, _ = _place(x, n, alive, 1, res)
    cz, uz, _ = _place(x, n, alive, 2, res)
    g = tl.load(d_out + n[:, None] * (L * F) + level * F + f[None, :], some, 0.0)
    for k in tl.static_range(8):
        row = _row(cx + (k & 1), cy + (k >> 1 & 1), cz + (k >> 2), res, size, first, dense)
        w = (ux if k & 1 else 1 - ux) * (uy if k >> 1 & 1 else 1 - uy) * (uz if k >> 2 else 1 - uz)
        tl.atomic_add(d_table + row[:, None] * F + f[None, :], w[:, None] * g, some, sem="relaxed")


@triton.jit
def _hash_backward_x(x, table, layout, d_out, d_x, N, L: tl.constexpr, F: tl.constexpr, FP: tl.constexpr, POINTS: tl.constexpr):
    """All levels in one program, so that each position is written once, without atomics."""
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    alive, f = n < N, tl.arange(0, FP)
    some = alive[:, None] & (f < F)[None, :]
    dtype = x.dtype.element_ty
    dx, dy, dz = tl.zeros((POINTS,), dtype), tl.zeros((POINTS,), dtype), tl.zeros((POINTS,), dtype)
    for level in range(L):
        res, size = tl.load(layout + level * 4), tl.load(layout + level * 4 + 1)
        first, dense = tl.load(layout + level * 4 + 2), tl.load(layout + level * 4 + 3)
        cx, ux, in_x = _place(x, n, alive, 0, res)
        cy, uy, in_y = _place(x, n, alive, 1, res)
        cz, uz, in_z = _place(x, n, alive, 2, res)
        g = tl.load(d_out + n[:, None] * (L * F) + level * F + f[None, :], some, 0.0)
        for k in tl.static_range(8):
            row = _row(cx + (k & 1), cy + (k >> 1 & 1), cz + (k >> 2), res, size, first, dense)
            wx, wy, wz = (ux if k & 1 else 1 - ux), (uy if k >> 1 & 1 else 1 - uy), (uz if k >> 2 else 1 - uz)
            s = tl.sum(g * tl.load(table + row[:, None] * F + f[None, :], some, 0.0), 1) * res
            dx += tl.where(in_x, s if k & 1 else -s, 0.0).to(dtype) * wy * wz
            dy += tl.where(in_y, s if k >> 1 & 1 else -s, 0.0).to(dtype) * wx * wz
            dz += tl.where(in_z, s if k >> 2 else -s, 0.0).to(dtype) * wx * wy
    tl.store(d_x + n * 3, dx, alive)
    tl.store(d_x + n * 3 + 1, dy, alive)
    tl.store(d_x + n * 3 + 2, dz, alive)


@lru_cache(maxsize=16)
def _layout(levels, device):
    """The layout as the kernels read it: (L, 4) int32 of resolution, size, first row, dense. Kept, so that a step copies nothing to the GPU."""
    return torch.tensor(list(zip(*levels[:2], levels.offsets[:-1], levels.dense)), dtype=torch.int32, device=device)


class _HashTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, levels):
        x, table = x.contiguous(), table.contiguous()
        (N, F), L = (len(x), table.shape[1]), len(levels.sizes)
        out = table.new_empty(N, L * F)
        ctx.save_for_backward(x, table, _layout(levels, x.device))
        ctx.sizes = (N, L, F, triton.next_power_of_2(F), POINTS)
        if N:
            with torch.cuda.device_of(x):
                _hash_forward[triton.cdiv(N, POINTS), L](x, table, _layout(levels, x.device), out, *ctx.sizes, enable_fp_fusion=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (x, table, layout), (N, L, *_) = ctx.saved_tensors, ctx.sizes
        d_out, d_x, d_table = d_out.contiguous(), None, None
        with torch.cuda.device_of(x):
            if ctx.needs_input_grad[1]:
                d_table = torch.zeros_like(table)
                if N:
                    _hash_backward_table[triton.cdiv(N, POINTS), L](x, layout, d_out, d_table, *ctx.sizes, enable_fp_fusion=True)
            if ctx.needs_input_grad[0]:
                d_x = torch.empty_like(x)
                if N:
                    _hash_backward_x[triton.cdiv(N, POINTS),](x, table, layout, d_out, d_x, *ctx.sizes, enable_fp_fusion=True)
        return d_x, d_table, None


def _take(table, rows):
    """table[rows], (M, F), (n,) -> (n, F), on a CPU. A row that is as wide as some kind of number is read as one, in half the time or less."""
    F = table.shape[1]
    number = {8: torch.complex64, 16: torch.complex128}.get(F * table.element_size())
    if number is None or table.storage_offset() % F or table.stride(0) != F:
        return table.index_select(0, rows)
    return table.view(number)[:, 0].index_select(0, rows).view(table.dtype).view(-1, F)


class _HashTorch(torch.autograd.Function):
    """backend="torch", made for the CPU, level by level so that a level's rows and temporaries stay in the L2 cache. Forward: embedding_bag, the
    gather and the weighted sum in one pass; where x wants a gradient, the rows are gathered once more, while they are in the cache, and kept
    (32LF bytes a sample). Backward: each feature is an array of its own, into which one thread adds in a fixed order."""
    @staticmethod
    def forward(ctx, x, table, levels):
        table, (parts, sides), kept, out = table.contiguous(), _axes(x.t().contiguous(), levels), [], []
        for part, side, dense, first, size in zip(parts, sides, levels.dense, levels.offsets, levels.sizes):
            (rows, weights), stretch = _rows_weights(part, side, dense), table[first:first + size]      # (8, N)
            out.append(nnf.embedding_bag(_turn(rows), stretch, per_sample_weights=_turn(weights), mode="sum"))
            kept += [rows, weights] + ([_turn(_take(stretch, rows.view(-1)))] if ctx.needs_input_grad[0] else [])
        ctx.levels, ctx.shape = levels, table.shape
        ctx.save_for_backward(x, sides[:, :, 1], *kept)
        return torch.cat(out, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (x, upper, *kept), levels, (M, F), (want_x, want_table, _) = ctx.saved_tensors, ctx.levels, ctx.shape, ctx.needs_input_grad
        N, L, each = len(x), len(levels.sizes), len(kept) // len(levels.sizes)      # each: tensors kept of a level
        d_table = d_out.new_empty(M, F) if want_table else None
        s = d_out.new_zeros(L, 8, N) if want_x else None                            # s_k = g . table[row_k]
        for level, g in enumerate(_turn(d_out).view(L, F, 1, N)):
            rows, weights, *corners = kept[level * each:(level + 1) * each]
            first, last = levels.offsets[level:level + 2]
            if want_table:
                sums = g.new_zeros(F, last - first).scatter_add_(1, rows.view(-1).long().expand(F, -1), (weights * g).view(F, -1))
                d_table[first:last] = _turn(sums)
            if want_x:
                for feature, g_of in zip(corners[0].view(F, 8, N), g):
                    s[level].addcmul_(feature, g_of)
        if not want_x:
            return None, d_table, None
        s, (ux, uy, uz) = s.view(L, 2, 2, 2, N), upper.unbind(1)                    # axes z, y, x of the corners; each (L, N)
        s0, dx = s[:, :, :, 0], s[:, :, :, 1] - s[:, :, :, 0]                       # (L, 2, 2, N): s differentiated along x,
        s0 = torch.addcmul(s0, dx, ux[:, None, None])                               # and interpolated; then both along y and z
        dx = torch.lerp(dx[:, :, 0], dx[:, :, 1], uy[:, None])                      # (L, 2, N)
        s0, dy = s0[:, :, 0], s0[:, :, 1] - s0[:, :, 0]
        s0 = torch.addcmul(s0, dy, uy[:, None])
        d_x = torch.stack([torch.lerp(dx[:, 0], dx[:, 1], uz), torch.lerp(dy[:, 0], dy[:, 1], uz), s0[:, 1] - s0[:, 0]])       # (3, L, N)
        d_x = (d_x * _layout(levels, x.device)[:, :1]).sum(1).t()
        return d_x * ((x >= 0) & (x <= 1)), d_table, None


def hash_encode(x, table, levels, backend="auto"):
    """Features of positions from a multiresolution hash table (Instant-NGP section 3).  Returns (N, L F), levels one after the other.

    x (N, 3) in [0, 1] (clamped: outside, the features of the nearest face and no gradient); table (levels.offsets[-1], F) of x's dtype;
    levels from hash_levels. Gradient to table, and to x where x requires it (piecewise constant along each axis of a cell, so no second one).
    Example: one dense level of 1 cell a side, F = 1, table rows 0, 1, ..., 7: x = (1/2, 1/4, 1) gives 1/2 + 2/4 + 4 = 5, gradient (1, 2, 4).
    On a GPU the sums into the table are atomic, so their last bits differ from run to run; on the CPU they do not.
    Bytes a sample in float32: forward 12 in and 4LF out, backward 12 + 4LF in and 12 out where x wants it; besides, 32LF of gathers and as many
    of atomic adds, which stay in the L2 cache where a level's 2^T rows fit (2^19 rows of 2 features: 4 MB). At L = 8, F = 4: 140, 152 and 1024 bytes.
    Floor at these sizes: L2, 370 ns forward, 750 backward to the table, 370 to x, as each of 64 corners is a sector of which a row fills half
    (280, 560, 280 if in half of the cells two neighbours along x share one); memory, 35 and 38; arithmetic, 30 (some 1600 operations). The kernels
    read x once a level from the L2 cache, and write a level's 4F bytes of a position at a time: whole sectors at F = 8, halves at F = 4.
    Raises ValueError (shape, dtype, device), RuntimeError (Triton cannot run).
    """
    _check("x", x, (None, 3))
    _check("table", table, (levels.offsets[-1], None), x)
    run = {"reference": hash_encode_ref, "torch": _HashTorch.apply, "triton": _HashTriton.apply}
    return run[_backend(backend, ("reference", "torch"), x)](x, table, levels)


# =============================================================================================================== 4. voxel_interp
# Plenoxels section 3.1: a lattice most of whose points are empty. links, as large as the lattice, says which row of values a point owns;
# negative: none. A position in lattice coordinates falls into one cell, and what its corners own is interpolated trilinearly:
#     p = clamp(x, 0, size - 1)      c = min(floor(p), size - 2)      u = p - c         (axis by axis; size = X, Y or Z)
#     out = sum_{k in {0,1}^3} w_k values[links[c + k]]               w_k = prod_axis (u if k_axis else 1 - u)
# A missing corner counts as 0, so that values fall off towards the empty side of a surface. A row is density and colour: one gather.
# Gradient, with g = dL/dout:  dL/dvalues[links[c + k]] += w_k g     for corners that are there, and in the mask if there is one; none to x.

def _voxel_corners(x, links):
    """x (N, 3) -> rows (8, N) int32 of the corners in values (negative: not there), weights (8, N). Corners as in _rows_weights."""
    top = torch.tensor(links.shape, dtype=x.dtype, device=x.device)[:, None] - 1    # (3, 1)
    place = x.detach().t().clamp(min=0).minimum(top)                                # (3, N); both pass a NaN on
    cell = place.long().clamp_(min=0).minimum(top.long() - 1)
    upper = place - cell
    (cx, cy, cz), (wx, wy, wz) = torch.stack([cell, cell + 1], 1), torch.stack([1 - upper, upper], 1)       # each (2, N)
    _, Y, Z = links.shape
    flat = (cx * (Y * Z))[None, None] + (cy * Z)[None, :, None] + cz[:, None, None]                        # (2, 2, 2, N), axes z, y, x
    rows = links.reshape(-1).index_select(0, flat.view(-1))
    return rows.view(8, -1), (wz[:, None, None] * wy[:, None] * wx).view(8, -1)


def voxel_interp_ref(x, links, values, mask=None):
    rows, weights = _voxel_corners(x, links)
    if mask is not None:
        values = torch.where(mask[:, None], values, values.detach())
    values = nnf.pad(values, (0, 0, 1, 0))                                          # row 0: the zero of all who are missing
    return (values[rows.clamp(min=-1) + 1] * weights[:, :, None]).sum(0)            # (8, N, F) -> (N, F)


@triton.jit
def _voxel_place(x, n, alive, axis: tl.constexpr, size):
    """One axis of the positions -> lower lattice coordinate, its distance u to the position."""
    x = tl.load(x + n * 3 + axis, alive, 0.0)
    p = tl.where(x < 0, 0.0, tl.where(x > size - 1, size - 1, x)).to(x.dtype)           # passes a NaN on, as in _place
    cell = tl.minimum(tl.maximum(p.to(tl.int32), 0), size - 2)
    return cell, p - cell.to(x.dtype)


@triton.jit
def _voxel_row(links, x, y, z, alive, Y, Z, M):
    """A corner's row and whether it is there. A row that values does not have counts as missing: nothing is read or written outside."""
    row = tl.load(links + (x.to(tl.int64) * Y + y) * Z + z, alive, -1)
    return row.to(tl.int64), alive & (row >= 0) & (row < M)


@triton.jit
def _voxel_forward(x, links, values, out, N, X, Y, Z, M, F: tl.constexpr, FP: tl.constexpr, POINTS: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    alive, f = n < N, tl.arange(0, FP)
    cx, ux = _voxel_place(x, n, alive, 0, X)
    cy, uy = _voxel_place(x, n, alive, 1, Y)
    cz, uz = _voxel_place(x, n, alive, 2, Z)
    total = tl.zeros((POINTS, FP), values.dtype.element_ty)
    for k in tl.static_range(8):
        row, there = _voxel_row(links, cx + (k & 1), cy + (k >> 1 & 1), cz + (k >> 2), alive, Y, Z, M)
        w = (ux if k & 1 else 1 - ux) * (uy if k >> 1 & 1 else 1 - uy) * (uz if k >> 2 else 1 - uz)
        total += w[:, None] * tl.load(values + row[:, None] * F + f[None, :], there[:, None] & (f < F)[None, :], 0.0)
    tl.store(out + n[:, None] * F + f[None, :], total, alive[:, None] & (f < F)[None, :])


@triton.jit
def _voxel_backward(x, links, mask, d_out, d_values, N, X, Y, Z, M, F: tl.constexpr, FP: tl.constexpr, POINTS: tl.constexpr):
    """The forward's mirror image. A corner that is missing or masked out costs no atomic; a position all of whose corners are, no read of
    d_out either: g is loaded corner by corner, from the L1 cache after the first time."""
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    alive, f = n < N, tl.arange(0, FP)
    cx, ux = _voxel_place(x, n, alive, 0, X)
    cy, uy = _voxel_place(x, n, alive, 1, Y)
    cz, uz = _voxel_place(x, n, alive, 2, Z)
    for k in tl.static_range(8):
        row, takes = _voxel_row(links, cx + (k & 1), cy + (k >> 1 & 1), cz + (k >> 2), alive, Y, Z, M)
        if mask is not None:
            takes = takes & (tl.load(mask + row, takes, 0) != 0)
        w = (ux if k & 1 else 1 - ux) * (uy if k >> 1 & 1 else 1 - uy) * (uz if k >> 2 else 1 - uz)
        some = takes[:, None] & (f < F)[None, :]
        g = tl.load(d_out + n[:, None] * F + f[None, :], some, 0.0)
        tl.atomic_add(d_values + row[:, None] * F + f[None, :], w[:, None] * g, some, sem="relaxed")


def _block_sizes(F):
    """F, F rounded up, positions of a program of voxel_interp or triplane_interp. It has 4 warps, as all here. At F = 28: 16 positions;
    eight lanes share a row, one 128-bit load or atomic each, and a thread has one row: 40 registers. sm_80 adds one number a lane, so that
    each lane needs the address of many rows: 90 registers, and at 32 positions 161. At F <= 4: 128 positions, one lane a row.
    triplane_interp at F = 12 and 32, 32 and 16 positions: a thread's twelve loads in flight in 48 registers; twice as many take 94."""
    FP = triton.next_power_of_2(F)
    return F, FP, max(1, min(POINTS, CELLS // FP))


class _VoxelTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, links, values, mask):
        x, links, values = x.contiguous(), links.contiguous(), values.contiguous()
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        (N, (M, F)) = len(x), values.shape
        out = values.new_empty(N, F)
        ctx.save_for_backward(x, links, mask)
        ctx.sizes = (N, *links.shape, M, *_block_sizes(F))
        if N:
            with torch.cuda.device_of(x):
                _voxel_forward[triton.cdiv(N, ctx.sizes[-1]),](x, links, values, out, *ctx.sizes, enable_fp_fusion=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (N, _, _, _, M, F, *_), d_out = ctx.sizes, d_out.contiguous()
        d_values = d_out.new_zeros(M, F)
        if N and M:
            with torch.cuda.device_of(d_out):
                _voxel_backward[triton.cdiv(N, ctx.sizes[-1]),](*ctx.saved_tensors, d_out, d_values, *ctx.sizes, enable_fp_fusion=True)
        return None, None, d_values, None


class _VoxelTorch(torch.autograd.Function):
    """backend="torch", made for the CPU. Forward: embedding_bag, the gather and the weighted sum in one pass (a missing corner reads row 0
    with weight 0: for finite values that is nothing). Backward: only the (position, corner) pairs that count, then one scatter_add_ of
    whole rows, which sorts them by row and adds in order: the same sum each time, and at F = 28 in half the time of index_add_."""
    @staticmethod
    def forward(ctx, x, links, values, mask):
        rows, weights = (_turn(a) for a in _voxel_corners(x, links))                # (N, 8)
        ctx.save_for_backward(rows, weights, mask)
        ctx.shape = values.shape
        table = values.contiguous() if len(values) else values.new_zeros(1, values.shape[1])
        return nnf.embedding_bag(rows.clamp(min=0), table, per_sample_weights=weights * (rows >= 0), mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (rows, weights, mask), (M, F) = ctx.saved_tensors, ctx.shape
        rows = rows.view(-1)
        pairs = (rows >= 0).nonzero()[:, 0]                                         # 8 position + corner
        rows = rows[pairs]
        if mask is not None:
            takes = mask[rows].nonzero()[:, 0]
            pairs, rows = pairs[takes], rows[takes]
        g = d_out.index_select(0, pairs // 8) * weights.view(-1)[pairs][:, None]    # (P, F)
        return None, None, d_out.new_zeros(M, F).scatter_add_(0, rows.long()[:, None].expand(-1, F), g), None


def voxel_interp(x, links, values, mask=None, backend="auto"):
    """Features of positions from a sparse grid: eight rows found through an index grid (Plenoxels section 3.1).  Returns (N, F).

    x (N, 3) in lattice coordinates: the lattice point (i, j, k) sits at x = (i, j, k); clamped to [0, size - 1] along each axis.
    links (X, Y, Z) int32, each side at least 2: the point's row of values; negative: it has none and counts as 0. values (M, F) finite, of
    x's dtype, F up to 32 or so (1 density, 27 spherical harmonics). mask (M,) bool: the rows that receive a gradient; None: all. The
    backward does no work for the other rows, so that a restricted update is also a faster one.
    Gradient to values; none to x, links, mask. On a GPU its sums are atomic: the last bits differ from run to run, on the CPU they do not.
    Example: X = Y = Z = 2, F = 1, only (0, 0, 0) there, with value 8, and (1, 0, 0), with 16: x = (1/2, 0, 1/2) gives 8/4 + 16/4 = 6.
    Bytes a sample in float32: forward 12 in and 4F out, backward 12 + 4F in; besides, each way 32 of links and 32F of gathers or atomics,
    less where corners are missing or masked. At F = 28: 124, 124, and 928 that caches serve in part, as neighbours on a ray share corners.
    Floor at these sizes: L2, 230 ns forward, 420 backward (a row lies in four sectors, a link in one); memory, 31; arithmetic, 10 (some 500 flops).
    Raises ValueError (shape, dtype, device), RuntimeError (Triton cannot run); where links names a row beyond values, IndexError or
    RuntimeError on the CPU, while the kernels count that corner as missing. Source: Plenoxels section 3.1; StreamRF for the mask.
    """
    _check("x", x, (None, 3))
    _check("links", links, (None, None, None), x, torch.int32)
    _check("values", values, (None, None), x)
    if min(links.shape) < 2 or values.shape[1] == 0:
        raise ValueError(f"links {tuple(links.shape)} needs two points along each axis, values {tuple(values.shape)} a column")
    if mask is not None:
        _check("mask", mask, (len(values),), x, torch.bool)
    run = {"reference": voxel_interp_ref, "torch": _VoxelTorch.apply, "triton": _VoxelTriton.apply}
    return run[_backend(backend, ("reference", "torch"), x)](x.detach(), links, values, mask)


# ============================================================================================================ 5. triplane_interp
# EG3D section 3: a scene is three planes of features, xy, xz and yz. A position is dropped onto each of them, the four texels around it
# are interpolated bilinearly, and the three results are summed. Plane (a, b) has a along its columns (W) and b along its rows (H):
#     p_a = ((a + 1) W - 1) / 2     p_b = ((b + 1) H - 1) / 2     c = floor(p)     u = p - c     (texel i is centred at (2 i + 1) / W - 1)
#     out = sum_planes sum_{k in {0,1}^2} w_k plane[c_b + k_b, c_a + k_a]          w_k = prod_axis (u if k_axis else 1 - u)
# A missing texel counts as 0, so that across the cube's faces features fade to nothing (grid_sample: align_corners=False, zeros).
# The released code, and much that grew from it, samples (x, y), (x, z), (z, x): the third plane is the second one's kind transposed, and
# none holds a function of y and z jointly. Here, as in the paper, the third is yz.
# Gradient, with g = dL/dout:  dL/dplane[c_b + k_b, c_a + k_a] += w_k g          for texels that are there; none to x.

def _triplane_cells(x, H, W):
    """x (B, N, 3) -> cells (3, B, N) int64, weights (4, 3, B, N). Around each plane goes a ring of zeros, the missing texels. A cell is
    where its lower corner then stands among the B 3 (H+2) (W+2) texels; corner k (bit 0: column, 1: row) is _corner_steps(W)[k] further."""
    found = []
    for axes, size in (((0, 0, 1), W), ((1, 2, 2), H)):                             # a, then b, of the planes xy, xz, yz
        p = ((x.detach().permute(2, 0, 1)[list(axes)] + 1) * (size / 2) - 0.5).clamp(-1, size)      # (3, B, N); passes a NaN on
        cell = p.floor().long().clamp_(-1, size - 1)
        found.append((cell + 1, torch.stack([1 - (p - cell), p - cell])))           # the ring moves all by one
    (col, w_a), (row, w_b) = found
    plane = torch.arange(3 * len(x), device=x.device).view(-1, 3, 1).transpose(0, 1)                # (3, B, 1)
    return (plane * (H + 2) + row) * (W + 2) + col, (w_b[:, None] * w_a).flatten(0, 1)


def _corner_steps(W):
    return 0, 1, W + 2, W + 3


def triplane_interp_ref(x, planes):
    cells, weights = _triplane_cells(x, *planes.shape[2:4])
    rows = nnf.pad(planes, (0, 0, 1, 1, 1, 1)).flatten(0, 3)                        # with the ring
    return sum((rows[cells + step] * w[..., None]).sum(0) for step, w in zip(_corner_steps(planes.shape[3]), weights))      # (B, N, F)


@triton.jit
def _triplane_place(x, m, alive, axis: tl.constexpr, size):
    """One axis of the positions -> the lower texel, from -1 to size - 1, and its distance u to the position in texels."""
    x = tl.load(x + m * 3 + axis, alive, 0.0)
    p = (x + 1) * (0.5 * size) - 0.5
    p = tl.where(p < -1, -1, tl.where(p > size, size, p)).to(x.dtype)                   # passes a NaN on, as in _place
    cell = tl.minimum(tl.maximum(tl.floor(p).to(tl.int32), -1), size - 1)
    return cell, p - cell.to(x.dtype)


@triton.jit
def _triplane_texel(first, col, row, alive, H, W):
    """A corner's texel, counted over all planes (first: lines of texels in the planes before), and whether it is there."""
    return (first + row) * W + col, alive & (col >= 0) & (col < W) & (row >= 0) & (row < H)


@triton.jit
def _triplane_forward(x, planes, out, N, H, W, F: tl.constexpr, FP: tl.constexpr, POINTS: tl.constexpr):
    """Scenes are the second grid axis: programs of one scene run side by side, so that its planes stay in the L2 cache."""
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    scene = tl.program_id(1).to(tl.int64)
    alive, m, f = n < N, scene * N + n, tl.arange(0, FP)
    total = tl.zeros((POINTS, FP), planes.dtype.element_ty)
    for plane in tl.static_range(3):                                                    # axes (0, 1), (0, 2), (1, 2)
        ca, ua = _triplane_place(x, m, alive, plane // 2, W)
        cb, ub = _triplane_place(x, m, alive, (plane + 3) // 2, H)
        for k in tl.static_range(4):
            texel, there = _triplane_texel((scene * 3 + plane) * H, ca + (k & 1), cb + (k >> 1), alive, H, W)
            w = (ua if k & 1 else 1 - ua) * (ub if k >> 1 else 1 - ub)
            total += w[:, None] * tl.load(planes + texel[:, None] * F + f[None, :], there[:, None] & (f < F)[None, :], 0.0)
    tl.store(out + m[:, None] * F + f[None, :], total, alive[:, None] & (f < F)[None, :])


@triton.jit
def _triplane_backward(x, d_out, d_planes, N, H, W, F: tl.constexpr, FP: tl.constexpr, POINTS: tl.constexpr):
    """The forward's mirror image: twelve atomic adds of a row of F, fewer where texels are missing."""
    n = tl.program_id(0).to(tl.int64) * POINTS + tl.arange(0, POINTS)
    scene = tl.program_id(1).to(tl.int64)
    alive, m, f = n < N, scene * N + n, tl.arange(0, FP)
    g = tl.load(d_out + m[:, None] * F + f[None, :], alive[:, None] & (f < F)[None, :], 0.0)
    for plane in tl.static_range(3):
        ca, ua = _triplane_place(x, m, alive, plane // 2, W)
        cb, ub = _triplane_place(x, m, alive, (plane + 3) // 2, H)
        for k in tl.static_range(4):
            texel, there = _triplane_texel((scene * 3 + plane) * H, ca + (k & 1), cb + (k >> 1), alive, H, W)
            w = (ua if k & 1 else 1 - ua) * (ub if k >> 1 else 1 - ub)
            tl.atomic_add(d_planes + texel[:, None] * F + f[None, :], w[:, None] * g, there[:, None] & (f < F)[None, :], sem="relaxed")


class _TriplaneTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, planes):
        x, planes = x.contiguous(), planes.contiguous()
        (B, N, _), (_, _, H, W, F) = x.shape, planes.shape
        out = planes.new_empty(B, N, F)
        ctx.save_for_backward(x)
        ctx.shape, ctx.sizes = planes.shape, (N, H, W, *_block_sizes(F))
        if B and N:
            with torch.cuda.device_of(x):
                _triplane_forward[triton.cdiv(N, ctx.sizes[-1]), B](x, planes, out, *ctx.sizes, enable_fp_fusion=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, = ctx.saved_tensors
        d_out, d_planes = d_out.contiguous(), d_out.new_zeros(ctx.shape)
        if x.numel():
            with torch.cuda.device_of(x):
                _triplane_backward[triton.cdiv(ctx.sizes[0], ctx.sizes[-1]), len(x)](x, d_out, d_planes, *ctx.sizes, enable_fp_fusion=True)
        return None, d_planes


class _TriplaneTorch(torch.autograd.Function):
    """backend="torch", made for the CPU. Forward: embedding_bag, the gather and the weighted sum of 3 x 4 rows in one pass. Backward: the
    same turned round. Samples are sorted by cell (3 numbers a sample; by texel it would be 12), so that a cell is a bag of samples; for
    each corner one embedding_bag sums what they send there, and all of it lands that corner's step further. The sums' order is fixed."""
    @staticmethod
    def forward(ctx, x, planes):
        (B, N, _), (_, _, H, W, F) = x.shape, planes.shape
        cells, weights = (a.flatten(-2) for a in _triplane_cells(x, H, W))          # (3, B N), (4, 3, B N)
        ctx.save_for_backward(cells, weights)
        ctx.shape = planes.shape
        rows = _turn(cells)[:, :, None] + torch.tensor(_corner_steps(W), device=x.device)
        out = nnf.embedding_bag(rows.view(B * N, 12), nnf.pad(planes, (0, 0, 1, 1, 1, 1)).flatten(0, 3),
                                per_sample_weights=weights.permute(2, 1, 0).reshape(B * N, 12), mode="sum")
        return out.view(B, N, F)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        (cells, weights), (B, _, H, W, F), d_out = ctx.saved_tensors, ctx.shape, d_out.flatten(0, 1)
        total = d_out.new_zeros(B * 3 * (H + 2) * (W + 2), F)
        if len(d_out):
            order = cells.flatten().argsort(stable=True)
            counts = cells.flatten().bincount(minlength=len(total))
            samples, starts = order % len(d_out), counts.cumsum(0) - counts
            for step, w in zip(_corner_steps(W), weights.flatten(1).index_select(1, order)):
                total[step:] += nnf.embedding_bag(samples, d_out, starts, per_sample_weights=w, mode="sum")[:len(total) - step]
        return None, total.view(B, 3, H + 2, W + 2, F)[:, :, 1:-1, 1:-1]


def triplane_interp(x, planes, backend="auto"):
    """Features of positions from the three planes of their scene, bilinear and summed (EG3D section 3).  Returns (B, N, F).

    x (B, N, 3): B scenes (on a GPU at most 65535), each with its own positions and planes; -1 and 1 are the planes' outer edges, and from
    the outermost centres, half a texel inside, to half a texel outside, features fade to 0. planes (B, 3, H, W, F) of x's dtype, finite,
    channels last, in the order xy, xz, yz: the first letter runs along W, the second along H.
    Gradient to planes; none to x. On a GPU its sums are atomic: the last bits differ from run to run, on the CPU they do not.
    Example: H = W = 2, F = 1, texels centred at -1/2 and 1/2; plane xy [[1, 2], [3, 4]], the others 0: (1/2, 0, z) gives (2 + 4)/2 = 3, and
    (1, 0, z), half a texel further out, half of that.
    Bytes a sample in float32: forward 12 in and 4F out, backward 12 + 4F in; besides, each way 48F of gathers or atomics, which stay in the
    L2 cache where a scene's 12 H W F bytes fit. At F = 32: 140, 140 and 1536, and planes of 1.6 MB at 64^2.
    Floor at these sizes: L2, 280 ns forward, 560 backward; memory, 35; arithmetic, 15 (some 900 flops).
    A position that is not a number gives NaN, an infinite one lies outside; neither reads outside the planes.
    Raises ValueError (shape, dtype, device), RuntimeError (Triton cannot run). Source: EG3D section 3, but not its code's third plane.
    """
    _check("x", x, (None, None, 3))
    _check("planes", planes, (len(x), 3, None, None, None), x)
    if min(planes.shape[2:]) == 0:
        raise ValueError(f"planes {tuple(planes.shape)} needs a texel along each axis and a feature")
    run = {"reference": triplane_interp_ref, "torch": _TriplaneTorch.apply, "triton": _TriplaneTriton.apply}
    return run[_backend(backend, ("reference", "torch"), x)](x.detach(), planes)


# ============================================================================================== python kernels.py: check, time, look inside
OPERATIONS = ("march", "composite", "hash_encode", "voxel_interp, F = 28", "voxel_interp, F = 28, 10 % of rows", "voxel_interp, F = 28, 1 % of rows",
              "voxel_interp, F = 4", "triplane_interp, F = 12", "triplane_interp, F = 32")      # % of rows: that many receive a gradient


def _problem(name, dtype, device, rays):
    """One operation on made-up input (the same numbers in every dtype): function of a backend, its differentiable inputs, bytes each way."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.rand(*shape, generator=random).to(device, dtype)

    size = torch.finfo(dtype).bits // 8
    if name == "march":                                     # through a ball that fills 7 % of its box: some 20 samples a ray
        d = nnf.normalize(draw(rays, 3) - 0.5, dim=1)
        o = 0.5 * (draw(rays, 3) - 0.5) - 2 * d
        ticks = torch.linspace(-1, 1, 128)
        ball = (torch.cartesian_prod(ticks, ticks, ticks).norm(dim=1) < 0.5).view(128, 128, 128).to(device)
        box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]], device=device)
        call = lambda backend: march(o, d, ball, box, 0.03, backend=backend)                # noqa: E731
        samples = len(call("reference")[0])
        return call, (), 6 * size * rays + (2 * size + 8) * samples, 0
    if name == "composite":                                 # 0 to 40 samples a ray, some rays opaque
        counts = torch.randint(0, 41, (rays,), generator=random)
        offsets = nnf.pad(counts.cumsum(0), (1, 0)).to(device)
        N = int(offsets[-1])
        t = (torch.arange(N, device=device) - torch.repeat_interleave(offsets[:-1], counts.to(device))) * 0.03 + 1
        t0, t1 = t.to(dtype), t.to(dtype) + 0.03
        wrt = (draw(N) ** 4 * 100).requires_grad_(), draw(N, 3).requires_grad_()
        return lambda backend: _pick(composite, composite_ref, backend)(*wrt, t0, t1, offsets), wrt, 8 * size * N, 12 * size * N
    if name.startswith("voxel_interp"):                     # in a shell a tenth of the lattice wide, so that some corners are missing
        F, N = int(re.search(r"F = (\d+)", name)[1]), 20 * rays
        ticks = torch.linspace(-1, 1, 128)
        shell = ((torch.cartesian_prod(ticks, ticks, ticks).norm(dim=1) - 0.5).abs() < 0.1).view(128, 128, 128)
        links = torch.where(shell, shell.view(-1).cumsum(0).view(shell.shape) - 1, -1).int().to(device)
        x = ((nnf.normalize(draw(N, 3).float() - 0.5, dim=1) * (0.35 + 0.3 * draw(N, 1).float()) + 1) * 63.5).to(dtype)
        M = int(shell.sum())
        share = re.search(r"(\d+) %", name)
        mask, wrt = (draw(M) < float(share[1]) / 100 if share else None), ((draw(M, F) - 0.5).requires_grad_(),)
        moved = (3 + F) * size * N
        return lambda backend: (_pick(voxel_interp, voxel_interp_ref, backend)(x, links, *wrt, mask),), wrt, moved, moved
    if name.startswith("triplane_interp"):                  # eight scenes of 32 x 32 texels, or four of 64 x 64
        F = int(re.search(r"F = (\d+)", name)[1])
        B, side = (8, 32) if F == 12 else (4, 64)
        x, wrt = 2 * draw(B, 20 * rays // B, 3) - 1, ((draw(B, 3, side, side, F) - 0.5).requires_grad_(),)
        moved = (3 + F) * size * 20 * rays
        return lambda backend: (_pick(triplane_interp, triplane_interp_ref, backend)(x, *wrt),), wrt, moved, moved
    levels = hash_levels(8, 16, 256, 16 if device == "cpu" else 19)
    wrt = draw(20 * rays, 3).requires_grad_(), (draw(levels.offsets[-1], 4) - 0.5).requires_grad_()
    moved = (3 + 32) * size * 20 * rays
    return lambda backend: (_pick(hash_encode, hash_encode_ref, backend)(*wrt, levels),), wrt, moved, moved + 3 * size * 20 * rays


def _grid_sample(x, planes):
    """triplane_interp as the library's one call for all planes at once; planes (B, 3, H, W, F) are channels last to it already."""
    (B, N, _), (_, _, H, W, F) = x.shape, planes.shape
    places = torch.stack([x[..., :2], x[..., ::2], x[..., 1:]], 1)                          # (B, 3, N, 2)
    out = nnf.grid_sample(planes.reshape(B * 3, H, W, F).permute(0, 3, 1, 2), places.view(B * 3, 1, N, 2), align_corners=False)
    return out.view(B, 3, F, N).sum(1).transpose(1, 2)


def _pick(public, reference, backend):
    """A backend's name, or a function of the reference that gives what runs instead (torch.compile; grid_sample)."""
    return backend(reference) if callable(backend) else lambda *inputs: public(*inputs, backend=backend)


def _results(call, wrt, backend):
    outputs = call(backend)
    if not wrt:
        return list(outputs)
    random = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(out.shape, generator=random).to(out) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, wrt, cotangents)]


def _disagreement(name, backend, device, rays):
    """None, or what is wrong with a backend: its float32 error against float64 must stay near that of the reference."""
    exact, plain, tried = (_results(*_problem(name, dtype, device, rays)[:2], run)
                           for dtype, run in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, backend)))
    if name == "march":                                     # a middle on a cell's face may round to either side: count those rays
        moved = (exact[2].diff() != tried[2].diff()).double().mean().item()
        same = all(torch.equal(a, b) for a, b in zip(plain, tried))
        return None if moved < 0.02 and same else f"{moved:.1%} of the rays differ from float64, reference {'equal' if same else 'not equal'}"
    for number, (a, b, c) in enumerate(zip(exact, plain, tried)):
        error, allowed = ((x.double() - a).abs().max().item() / (a.abs().max().item() + 1e-30) for x in (c, b))
        if not error <= 4 * allowed + 1e-6:
            return f"result {number} is off by {error:.1e}, the float32 reference by {allowed:.1e}"
    return None


def _seconds(function, device, budget, before=lambda: ()):
    """Median time of function(*before()), without before's; on CUDA between events, so that the launches of one run hide behind the run before."""
    function(*before()), function(*before())
    times, stop = [], time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 50):
        given = before()
        if device == "cpu":
            start = time.perf_counter()
            function(*given)
            times.append(time.perf_counter() - start)
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(), function(*given), end.record()
            times.append((start, end))
    if device != "cpu":
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) * 1e-3 for start, end in times]
    return statistics.median(times)


def benchmark(rays, with_compile=True, seconds=1.0):
    """-> header, rows. A backend that fails its check gets a row that says so, and no time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = torch.zeros(2 ** (28 if device == "cuda" else 24))
    source, target = data.to(device), torch.empty_like(data, device=device)
    bandwidth = 2 * data.nbytes / _seconds(lambda: target.copy_(source), device, seconds)
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    header = {"device": name, "torch": torch.__version__, "triton": NO_TRITON or triton.__version__, "python": platform.python_version(),
              "date": time.strftime("%Y-%m-%d"), "rays": rays, "copy_gb_per_s": round(bandwidth / 1e9, 1)}
    rows = []
    for name in OPERATIONS:
        backends = ["reference"] if name in ("march", "composite") else ["reference", "torch"]
        backends = backends + (["triton"] if device == "cuda" and not NO_TRITON else [])
        backends = backends + (["grid_sample"] if name.startswith("triplane_interp") else [])
        for backend in backends + (["compiled reference"] if with_compile and name != "march" else []):
            row = {"operation": name, "backend": backend}
            rows.append(row)
            run = {"compiled reference": torch.compile, "grid_sample": lambda reference: _grid_sample}.get(backend, backend)
            try:
                problem = _disagreement(name, run, device, rays)
            except Exception as error:                      # torch.compile where no C++ compiler works
                problem = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            if problem:
                row["failed"] = problem
                continue
            call, wrt, bytes_forward, bytes_backward = _problem(name, torch.float32, device, rays)
            if backend == "compiled reference":
                compiled = torch.compile(globals()[name.split(",")[0] + "_ref"])
                run = lambda reference: compiled            # noqa: E731  (compiled once, timed often)
            with torch.no_grad():
                row["forward_ms"] = _seconds(lambda: call(run), device, seconds) * 1e3
            row["forward_bandwidth"] = bytes_forward / bandwidth / row["forward_ms"] * 1e3
            if wrt:
                ones = [torch.ones_like(out) for out in call(run)]
                row["backward_ms"] = _seconds(lambda *outputs: torch.autograd.grad(outputs, wrt, ones), device, seconds, lambda: call(run)) * 1e3
                row["both_ms"] = _seconds(lambda: torch.autograd.grad(call(run), wrt, ones), device, seconds) * 1e3
                row["backward_bandwidth"] = bytes_backward / bandwidth / row["backward_ms"] * 1e3
    return header, rows


def kernel_list():
    """Every kernel with its compile-time constants, as the public calls launch it at C = 3 and the F of each."""
    if NO_TRITON or INTERPRET:
        raise RuntimeError(NO_TRITON or "TRITON_INTERPRET=1 is set: there is nothing to compile")
    tile, options = {"RAYS": RAYS, "BLOCK": BLOCK}, {"num_warps": RAYS, "enable_fp_fusion": True}
    exact = {**options, "enable_fp_fusion": False}
    return [("march, count", _march_kernel, {"WRITE": False, **tile}, exact), ("march, write", _march_kernel, {"WRITE": True, **tile}, exact),
            ("composite, forward", _composite_forward, {"C": 3, "CP": 4, **tile}, options),
            ("composite, backward", _composite_backward, {"C": 3, "CP": 4, **tile, "d_weights": None}, options),
            ("composite, backward with weights", _composite_backward, {"C": 3, "CP": 4, **tile}, options)] + [
            (f"hash_encode, {what}, F = {F}", kernel, {"F": F, "FP": F, "POINTS": POINTS, **levels}, {"enable_fp_fusion": True}) for F in (4, 2)
            for what, kernel, levels in (("forward", _hash_forward, {}), ("backward to table", _hash_backward_table, {}),
                                         ("backward to x", _hash_backward_x, {"L": 8}))] + [
            (f"voxel_interp, {what}, F = {F}", kernel, {**dict(zip(("F", "FP", "POINTS"), _block_sizes(F))), **mask},
             {"enable_fp_fusion": True}) for F in (28, 4)
            for what, kernel, mask in (("forward", _voxel_forward, {}), ("backward to values", _voxel_backward, {"mask": None}),
                                       ("backward to values, masked", _voxel_backward, {}))] + [
            (f"triplane_interp, {what}, F = {F}", kernel, dict(zip(("F", "FP", "POINTS"), _block_sizes(F))), {"enable_fp_fusion": True})
            for F in (12, 32) for what, kernel in (("forward", _triplane_forward), ("backward to planes", _triplane_backward))]


def resources(kernel, constants, options, capability, dtype="fp32"):
    """Compile for a GPU that need not be here; what ptxas and the disassembler inside the triton package say of the result."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    types = {"occupied": "*u8", "offsets": "*i64", "counts": "*i64", "ray_ids": "*i64", "layout": "*i32", "links": "*i32", "mask": "*u8",
             **dict.fromkeys("RNLMXYZHW", "i32"),
             **dict.fromkeys(("step", "near", "far", "early_stop"), "fp64"), **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "*" + dtype) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    constants = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    cubin = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["cubin"]
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.cubin")
        with open(path, "wb") as file:
            file.write(cubin)
        usage, code = (subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
                       for flag in ("--dump-resource-usage", "-sass"))
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}

    def count(pattern):
        found = re.findall(pattern, code)
        return ", ".join(f"{found.count(kind)} {kind}" for kind in sorted(set(found))) or "-"
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return {"registers": number["REG"], "shared": number["SHARED"], "local": number["STACK"] + number["LOCAL"], "spill_instructions": spills,
            "loads": count(r"\b(LDG[.\w]*)"), "stores": count(r"\b(STG[.\w]*)"), "atomics": count(r"\b((?:REDG?|ATOMG?)\.[.\w]*)")}


def _print_table(rows):
    columns = list(max(rows, key=len)) + ["failed"] * any("failed" in row for row in rows)
    show = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)     # noqa: E731
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(show(row.get(column, "")) for column in columns) + " |")


def main():
    parser = argparse.ArgumentParser(description="Check every operation against its float64 reference, then time it.")
    parser.add_argument("--rays", type=int, default=65536 if torch.cuda.is_available() else 1024,
                        help="rays; hash_encode, voxel_interp and triplane_interp take 20 positions a ray")
    parser.add_argument("--seconds", type=float, default=1.0, help="time spent on each number")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (it takes a minute)")
    parser.add_argument("--resources", action="store_true", help="compile the Triton kernels for sm_80, sm_90, sm_100; needs no GPU")
    parser.add_argument("--json", action="store_true", help="for machines")
    args = parser.parse_args()
    if args.resources:
        header = {"triton": NO_TRITON or triton.__version__}
        rows = [{"kernel": label, "target": f"sm_{target}", **resources(*what, target)} for target in (80, 90, 100) for label, *what in kernel_list()]
    else:
        header, rows = benchmark(args.rays, not args.no_compile, args.seconds)
    if args.json:
        print(json.dumps({**header, "rows": rows}, indent=1))
    else:
        print("  ".join(f"{key} {value}" for key, value in header.items()) + "\n")
        _print_table(rows)
    raise SystemExit(1 if any("failed" in row and "compiled" not in row["backend"] for row in rows) else 0)


if __name__ == "__main__":
    main()
