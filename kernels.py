"""The operations under a radiance field, as mathematics, in plain PyTorch and as Triton kernels.

    march            rays and an occupancy grid      -> packed samples          no gradient
    composite        densities and colours           -> rgb, opacity, depth     to sigmas, rgbs
    hash_encode      positions, hashed table         -> features                to table, positions
    voxel_interp     positions, sparse voxel grid    -> features                to the values
    triplane_interp  positions, three planes         -> features                to the planes

How a script joins three of them, R rays with N samples in total, in the box from -1 to 1:
    t0, t1, offsets, ray = march(rays_o, rays_d, occupied, aabb, step)  # (N,), (N,), (R+1,), (N,)
    x = rays_o[ray] + (t0 + t1)[:, None] / 2 * rays_d[ray]              # (N, 3) middles
    sigmas, rgbs = mlp(hash_encode((x + 1) / 2, table, levels))         # (N,), (N, 3)
    rgb, opacity, depth, w = composite(sigmas, rgbs, t0, t1, offsets)   # (R, 3), (R,), (R,), (N,)
Samples are packed. With three rays, offsets = [0, 2, 2, 5] and ray = [0, 0, 2, 2, 2]: ray 0 has the
rows 0 and 1 of every (N, ...) tensor, ray 1 none, ray 2 the rows 2, 3, 4.

Each section: mathematics and gradient; `NAME_ref`, plain PyTorch to compare with it line by line;
Triton forward and backward (march: forward); the public `NAME(..., backend="auto")`. A reference
writes each intermediate result to memory, that of hash_encode 24 tensors of N x F for each level; a
kernel keeps them in registers: this is why it is fast.
Letters: C channels, L levels, F features, M rows of a table, B scenes, H rows and W columns of a
plane. d_name is the gradient of the loss to name.

backend: "reference"  NAME_ref, for any device and float type; it alone has second derivatives
         "torch"      the lookups only: a faster implementation for CPUs, at the end of this file
         "triton"     the kernels, in float32, or in float64 so that tests can be exact
         "auto"       triton for CUDA tensors of these types, otherwise torch (lookups) or reference
On a GPU, gradients that are summed by atomic additions differ in the last bits from run to run.
`python kernels.py` checks and times all. On a CPU it only checks the kernels, on 4 rays in Triton's
interpreter, which any program uses that sets TRITON_INTERPRET=1 before it imports this file.
"""
import argparse
import itertools
import math
import os
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch.autograd.function import once_differentiable
from torch.utils.benchmark import Timer

if __name__ == "__main__" and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

try:
    import triton
    import triton.language as tl
    NO_TRITON = ""
except ImportError as error:            # macOS, Windows: everything but backend="triton" works
    NO_TRITON = f"Triton cannot be imported here ({error})"
    # Enough to define the kernels with @triton.jit or triton.jit(option=...); none is ever called.
    tl = SimpleNamespace(constexpr=None)
    triton = SimpleNamespace(jit=lambda kernel=None, **options: kernel or (lambda later: later))

# A Triton kernel is started once for each point of a grid. Each start is a program, and its number
# tl.program_id. It computes on whole vectors: tl.arange(0, 32) is 0, 1, ..., 31; tl.load(pointer +
# offsets, mask, 0.0) reads where mask is true and gives 0.0 elsewhere. tl.constexpr arguments are
# fixed when it is compiled. A program has 4 warps of 32 threads here, which share the elements.
BLOCK_R, BLOCK_S = 4, 32    # march, composite: 32 samples of 4 rays (one per warp) at a time
BLOCK_N = 128               # hash_encode: positions of a program, one for each thread
BLOCK_NF = 512              # voxel_interp, triplane_interp: positions x features of a program


# --------------------------------------------------------------------- shared by the operations

def _backend(backend, offered, tensor):
    """Which implementation runs. `offered`: those in PyTorch, the fastest last."""
    supported = tensor.dtype in (torch.float32, torch.float64)
    if backend == "auto":
        return "triton" if tensor.is_cuda and supported and not NO_TRITON else offered[-1]
    if backend not in ("triton", *offered):
        raise ValueError(f"backend {backend!r}: choose one of auto, triton, {', '.join(offered)}")
    if backend == "triton":
        if NO_TRITON:
            raise RuntimeError(f'backend="triton": {NO_TRITON}')
        if not tensor.is_cuda and not INTERPRET:
            raise RuntimeError('backend="triton" needs CUDA (or TRITON_INTERPRET=1 before import)')
        if not supported:
            raise ValueError(f'backend="triton" takes float32 or float64, not {tensor.dtype}')
    return backend


def _check(name, tensor, shape, like=None, dtype=None):
    """Shape (None: any size), dtype and device; the last two as those of `like` unless told."""
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, not {type(tensor).__name__}")
    sizes = zip(shape, tensor.shape)
    if tensor.dim() != len(shape) or any(want not in (None, have) for want, have in sizes):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted ({wanted})")
    if dtype is None and like is not None:
        dtype = like.dtype
    if dtype not in (None, tensor.dtype) or (dtype is None and not tensor.is_floating_point()):
        raise ValueError(f"{name} has dtype {tensor.dtype}, wanted {dtype or 'floating-point'}")
    if like is not None and tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the others on {like.device}")


def _launch(kernel, grid, *inputs, fp_fusion=True):
    """kernel[grid](*inputs) on the first input's device, if the grid is not empty. Blocks are sized
    for 4 warps. fp_fusion: a b + c may round only once; Triton versions differ in the default."""
    if math.prod(grid) > 0:
        with torch.cuda.device_of(inputs[0]):
            kernel[grid](*inputs, num_warps=4, enable_fp_fusion=fp_fusion)


# Triton compiles anew for a size of 1 or a multiple of 16, but not for these, which often change.
_jit_sized = triton.jit(do_not_specialize=["R", "N", "M"])


@triton.jit
def _divide(a, b):
    """Rounded correctly, as PyTorch divides. Triton's own / is approximate in float32."""
    if b.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


# ===================================================================================== 1. march
# Instant-NGP appendix E, with equal steps and a single grid. A ray o + t v (v = rays_d) meets the
# planes x = low_x and x = high_x at t = (low_x - o_x) / v_x and (high_x - o_x) / v_x: the smaller t
# is its entry, the larger its exit. It is inside the box where it is inside all three slabs:
#     t_in = max(near, the three entries)        t_out = min(far, the three exits)
# Points along the ray:
#     t_k = t_in + (k + jitter) step             interval [t_k, t_k + step]
# An interval is a sample where its middle lies before t_out and in an occupied cell of the grid.
# jitter in [0, 1) is drawn for each ray and training step, or the field is seen at the same depths
# only. A ray's first jitter * step is in no interval, and its last interval may end step / 2 behind
# t_out. Empty cells are looked up, not skipped, so that 32 points can be tested at once.
# At most floor((t_out - t_in) / step + 1/2) points have their middle before t_out. If |v| = 1,
# t_out - t_in is at most the diagonal of the box. More than two diagonals, possible if |v| < 1/2,
# are an error (with a budget: no samples), as memory has a limit; |v| itself is not checked.

TOO_SHORT = "rays_d: in the box for more than twice its diagonal: give unit directions"


def _intersect_box(rays_o, rays_d, aabb, near, far):
    """t_in, t_out and their difference, 0 for a ray that misses the box, each (R,)."""
    low, high = aabb
    parallel = rays_d == 0
    inverse = 1 / torch.where(parallel, 1.0, rays_d)
    t_low = (low - rays_o) * inverse                                           # (R, 3)
    t_high = (high - rays_o) * inverse
    # A ray parallel to a slab is inside for t in (-inf, inf), or never: (inf, -inf) is empty.
    inside = (low <= rays_o) & (rays_o <= high)
    exit_parallel = torch.where(inside, math.inf, -math.inf).to(rays_o)
    enter = torch.where(parallel, -exit_parallel, torch.minimum(t_low, t_high))
    leave = torch.where(parallel, exit_parallel, torch.maximum(t_low, t_high))
    t_in = enter.amax(1).clamp(min=near)
    t_out = leave.amin(1).clamp(max=far)
    hit = (t_out > t_in) & (t_out < math.inf) & ~parallel.all(1)               # False where NaN
    length = torch.where(hit, t_out - t_in, 0.0)
    if (length > 2 * (high - low).norm()).any():
        raise ValueError(TOO_SHORT)
    return t_in, t_out, length


def march_ref(rays_o, rays_d, occupied, aabb, step, near=0.0, far=math.inf, jitter=None):
    """All R x S points at once, S those of the longest ray; then the ones that are samples. The
    order of the multiplications is the kernel's, so that both find the same cells."""
    t_in, t_out, length = _intersect_box(rays_o, rays_d, aabb, near, far)
    low, high = aabb
    S = int(length.max() / step + 0.5) + 1 if len(rays_o) else 0               # + 1: rounding
    k = torch.arange(S, device=rays_o.device).to(rays_o.dtype)
    shift = 0.0 if jitter is None else jitter[:, None]
    t = t_in[:, None] + (k + shift) * step                                     # (R, S)
    middle = t + 0.5 * step
    mask = (middle < t_out[:, None]) & (length > 0)[:, None]
    cell = torch.zeros_like(mask, dtype=torch.int32)                           # (x Y + y) Z + z
    for axis, size in enumerate(occupied.shape):
        scale = 1 / (high[axis] - low[axis]) * size                            # cells a unit length
        position = ((rays_d[:, axis] * scale)[:, None] * middle
                    + ((rays_o[:, axis] - low[axis]) * scale)[:, None])
        cell = cell * size + position.int().clamp_(0, size - 1)
    mask &= occupied.reshape(-1).index_select(0, cell.view(-1)).view_as(mask)

    t_starts = t.masked_select(mask)                                           # ray after ray
    counts = mask.sum(1)
    offsets = nnf.pad(counts.cumsum(0), (1, 0))
    ray_indices = torch.repeat_interleave(counts, output_size=len(t_starts))
    return t_starts, t_starts + step, offsets, ray_indices


@triton.jit
def _march_axis(rays, axis: tl.constexpr, size, t_in, t_out):
    """Cuts [t_in, t_out] to one slab. Returns also o and v in cells of the grid, and its width."""
    rays_o_ptr, rays_d_ptr, aabb_ptr, offs_r, mask_r = rays
    o = tl.load(rays_o_ptr + offs_r * 3 + axis, mask_r, 0.0)
    v = tl.load(rays_d_ptr + offs_r * 3 + axis, mask_r, 0.0)
    low = tl.load(aabb_ptr + axis)
    high = tl.load(aabb_ptr + 3 + axis)
    one = tl.full(v.shape, 1.0, v.dtype)
    inverse = _divide(one, tl.where(v == 0, 1.0, v).to(v.dtype))
    t_low = (low - o) * inverse
    t_high = (high - o) * inverse
    exit_parallel = tl.where((low <= o) & (o <= high), float("inf"), float("-inf"))
    enter = tl.where(v == 0, -exit_parallel, tl.minimum(t_low, t_high)).to(v.dtype)
    leave = tl.where(v == 0, exit_parallel, tl.maximum(t_low, t_high)).to(v.dtype)
    scale = _divide(one, high - low + tl.zeros_like(o)) * size      # zeros: numbers to a vector
    return ((o - low) * scale, v * scale, high - low, tl.maximum(t_in, enter),
            tl.minimum(t_out, leave))


@triton.jit
def _cell_at(o, v, middle, size):
    position = v[:, None] * middle + o[:, None]
    return tl.minimum(tl.maximum(position.to(tl.int32), 0), size - 1)


@_jit_sized
def _march_kernel(rays_o_ptr, rays_d_ptr, occupied_ptr, aabb_ptr, jitter_ptr, offsets_ptr,
                  t_starts_ptr, t_ends_ptr, ray_indices_ptr, R, X, Y, Z, step: "fp64",
                  near: "fp64", far: "fp64", BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
                  WRITE: tl.constexpr):
    """WRITE False: offsets[r + 1] = number of samples of ray r. WRITE True: offsets is the running
    sum of these, and the samples are written. Both passes must agree to the last bit: one body,
    without fused multiply-adds. "fp64": a Python float would arrive as float32."""
    pid = tl.program_id(0).to(tl.int64)
    offs_r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    dtype = rays_o_ptr.dtype.element_ty
    t_in = tl.full((BLOCK_R,), near, dtype)
    t_out = tl.full((BLOCK_R,), far, dtype)
    rays = (rays_o_ptr, rays_d_ptr, aabb_ptr, offs_r, mask_r)
    o_x, v_x, width_x, t_in, t_out = _march_axis(rays, 0, X, t_in, t_out)
    o_y, v_y, width_y, t_in, t_out = _march_axis(rays, 1, Y, t_in, t_out)
    o_z, v_z, width_z, t_in, t_out = _march_axis(rays, 2, Z, t_in, t_out)
    probe = o_x + o_y + o_z + v_x + v_y + v_z       # NaN if one is: tl.minimum and maximum drop it
    hit = mask_r & (probe == probe) & ((v_x != 0) | (v_y != 0) | (v_z != 0))
    hit = hit & (t_out > t_in) & (t_out < float("inf"))
    length = tl.where(hit, t_out - t_in, 0.0).to(dtype)
    diagonal = tl.sqrt(width_x * width_x + width_y * width_y + width_z * width_z)
    refused = length > 2 * diagonal
    length = tl.where(refused, 0.0, length).to(dtype)

    jitter = tl.load(jitter_ptr + offs_r, mask_r, 0.0)
    if WRITE:
        begin = tl.load(offsets_ptr + offs_r, mask_r, 0)
        end = tl.load(offsets_ptr + offs_r + 1, mask_r, 0)
    count = tl.zeros((BLOCK_R,), tl.int32)                  # samples of the ray so far
    delta = tl.full((BLOCK_R,), step, dtype)
    S = tl.max((_divide(length, delta) + 0.5).to(tl.int32)) + 1         # as in march_ref
    start = 0
    while start < S:
        k = (start + tl.arange(0, BLOCK_S)).to(dtype)
        t = t_in[:, None] + (k[None, :] + jitter[:, None]) * delta[:, None]
        middle = t + 0.5 * delta[:, None]
        mask = (middle < t_out[:, None]) & (length > 0)[:, None]
        cell = (_cell_at(o_x, v_x, middle, X) * Y + _cell_at(o_y, v_y, middle, Y)).to(tl.int64) * Z
        cell += _cell_at(o_z, v_z, middle, Z)
        mask = mask & (tl.load(occupied_ptr + cell, mask, 0) != 0)
        if WRITE:
            offs_n = begin[:, None] + (count[:, None] + tl.cumsum(mask.to(tl.int32), 1) - 1)
            mask_n = mask & (offs_n < end[:, None])         # not beyond the budget
            tl.store(t_starts_ptr + offs_n, t, mask_n)
            tl.store(t_ends_ptr + offs_n, t + delta[:, None], mask_n)
            tl.store(ray_indices_ptr + offs_n, offs_r[:, None], mask_n)
        count += tl.sum(mask.to(tl.int32), 1)
        start += BLOCK_S
    if not WRITE:           # A kernel cannot raise an error: for a direction too short, a huge
                            # negative count makes the total negative, which the host reads.
        count = tl.where(refused, -(1 << 40), count.to(tl.int64))
        tl.store(offsets_ptr + offs_r + 1, count, mask_r)


def _march_triton(rays_o, rays_d, occupied, aabb, step, near, far, jitter, budget):
    """Count each ray's samples, add up, write. An atomic counter would not keep the rays' order."""
    R = len(rays_o)
    jitter = rays_o.new_zeros(R) if jitter is None else jitter
    inputs = [a.contiguous() for a in (rays_o, rays_d, occupied.view(torch.uint8), aabb, jitter)]
    sizes = (R, *occupied.shape, step, near, far, BLOCK_R, BLOCK_S)
    grid = (triton.cdiv(R, BLOCK_R),)
    launch = partial(_launch, _march_kernel, grid, *inputs, fp_fusion=False)
    counts = rays_o.new_zeros(R + 1, dtype=torch.int64)     # after a leading 0
    launch(counts, jitter, jitter, counts, *sizes, False)   # 1. counts; the others are not used
    if budget is None:
        offsets = counts.cumsum(0)
        N = int(offsets[-1])                                # waits for the GPU
        if N < 0:
            raise ValueError(TOO_SHORT)
    else:
        totals = counts.clamp(min=0).cumsum(0)
        offsets = totals.clamp(max=budget)
        N = budget
    t_starts, t_ends, ray_indices = rays_o.new_zeros(N), rays_o.new_zeros(N), offsets.new_zeros(N)
    launch(offsets, t_starts, t_ends, ray_indices, *sizes, True)            # 2. samples
    samples = t_starts, t_ends, offsets, ray_indices
    return samples if budget is None else (*samples, totals[-1] - offsets[-1])


def march(rays_o, rays_d, occupied, aabb, step, near=0.0, far=math.inf, jitter=None,
          backend="auto", budget=None):
    """March along rays through an occupancy grid and return packed samples. No gradient.

    rays_o, rays_d (R, 3): origins and unit directions, so that t is metric. A direction of zero or
    NaN gives no samples; a short one may be an error (above). occupied (X, Y, Z) bool; aabb (2, 3):
    the grid's corners; step, near, far in units of t; jitter (R,) in [0, 1), or None for 0.
    Returns t_starts (N,), t_ends (N,), offsets (R+1,) int64, ray_indices (N,) int64.
    budget: the N to return, so that the host need not wait for the GPU to learn it. Samples beyond
    it are dropped, from the last ray backwards; a fifth result, an int64 tensor, is how many. Rows
    after offsets[-1] are padding (0, also as ray index), which composite ignores. A direction too
    short gets no samples then ("reference" refuses it).
    Example: a ray along x from the left face of a box 1 wide, all occupied, step 0.4. The middles
    are 0.2, 0.6 and 1.0, and 1.0 is not before the exit: t_starts 0, 0.4.
    """
    _check("rays_o", rays_o, (None, 3))
    _check("rays_d", rays_d, (len(rays_o), 3), rays_o)
    _check("occupied", occupied, (None, None, None), rays_o, torch.bool)
    _check("aabb", aabb, (2, 3))
    if not 0 < step < math.inf:
        raise ValueError(f"step must be positive and finite, not {step}")
    if jitter is not None:
        _check("jitter", jitter, (len(rays_o),), rays_o)
    inputs = (rays_o, rays_d, occupied, aabb.to(rays_o), float(step), float(near), float(far),
              jitter)
    with torch.no_grad():
        if _backend(backend, ("reference",), rays_o) == "triton":
            return _march_triton(*inputs, budget)
        t_starts, t_ends, offsets, ray_indices = march_ref(*inputs)
        if budget is None:
            return t_starts, t_ends, offsets, ray_indices
        room = (0, budget - len(t_starts))                  # negative: nnf.pad cuts
        dropped = (offsets[-1] - budget).clamp(min=0)
        return (nnf.pad(t_starts, room), nnf.pad(t_ends, room), offsets.clamp(max=budget),
                nnf.pad(ray_indices, room), dropped)


# ================================================================================= 2. composite
# NeRF eq. 3. Along each ray, with delta_i = t_end - t_start, optical depth tau_i = sigma_i delta_i,
# transmittance T_i and t_i the middle of the interval:
#     T_i = exp(-sum_{j<i} tau_j)     alpha_i = 1 - exp(-tau_i)     w_i = T_i alpha_i
#     rgb = sum_i w_i rgb_i           opacity = sum_i w_i           depth = sum_i w_i t_i
# Gradient. All outputs are linear in the weights; the whole gradient to w_i is
#     g_i = d_rgb . rgb_i + d_opacity + t_i d_depth + d_weights_i         (the last: the caller's)
# and dw_i/dtau_i = T_i exp(-tau_i) = T_{i+1}, dw_j/dtau_i = -w_j for j > i, 0 for j < i. Therefore
#     d_sigma_i = delta_i (g_i T_{i+1} - sum_{j>i} g_j w_j)               d_rgbs_i = w_i d_rgb
# With early_stop, w_i, d_sigma_i and d_rgbs_i are 0 where T_i < early_stop.
# Both sums could be written as subtractions, and both would fail: (sum_{j<=i} tau_j) - tau_i is
# inf - inf where tau_i overflows; total - sum_{j<=i} g_j w_j loses its digits behind a surface,
# where it is small. So tau_j are added front to back, and g_j w_j back to front.

def composite_ref(sigmas, rgbs, t_starts, t_ends, offsets, early_stop=0.0):
    """Packed (N,), but padded to the longest ray (R, S) for the sum along the ray."""
    N = int(offsets[-1])
    padding = (0, len(sigmas) - N)
    sigmas, rgbs = sigmas[:N], rgbs[:N]                     # the rows behind belong to no ray
    t_starts, t_ends = t_starts[:N].detach(), t_ends[:N].detach()
    counts = offsets.diff()
    R = len(counts)
    S = int(counts.max()) if R else 0
    mask = torch.arange(S, device=counts.device) < counts[:, None]             # (R, S)
    ray_indices = torch.repeat_interleave(counts, output_size=N)               # (N,)
    tau = sigmas * (t_ends - t_starts)
    padded = tau.new_zeros(R, S).masked_scatter(mask, tau)                     # row r holds ray r
    tau_before = nnf.pad(padded, (1, 0))[:, :S].cumsum(1)                      # sum over j < i
    T = torch.exp(-tau_before.masked_select(mask))                             # (N,)
    # 1 - exp(-tau) loses digits where tau is small: expm1. Autograd takes the derivative of expm1
    # as its result + 1, which loses digits where tau is large: exp. Any limit near 0.5 will do.
    weights = T * torch.where(tau < 0.5, -torch.expm1(-tau), 1 - torch.exp(-tau))
    if early_stop > 0:
        weights = torch.where(T >= early_stop, weights, 0.0)
    rgb = rgbs.new_zeros(R, rgbs.shape[1]).index_add(0, ray_indices, weights[:, None] * rgbs)
    opacity = rgbs.new_zeros(R).index_add(0, ray_indices, weights)
    depth = rgbs.new_zeros(R).index_add(0, ray_indices, weights * (0.5 * (t_starts + t_ends)))
    return rgb, opacity, depth, nnf.pad(weights, padding)


@triton.jit
def _join(sum_a, sum_but_last_a, sum_b, sum_but_last_b):
    """The pairs (sum, sum without the last term) of two neighbouring blocks -> of both as one."""
    return sum_a + sum_b, sum_a + sum_but_last_b


@triton.jit
def _exclusive_cumsum(terms, REVERSE: tl.constexpr):
    """Exclusive prefix sum along axis 1: a, b, c -> 0, a, a + b (REVERSE: b + c, c, 0). The scan of
    Triton is inclusive; with the pairs of _join it makes of (a, 0), (b, 0), (c, 0) the elements
    (a, 0), (a + b, a), (a + b + c, a + b)."""
    _, but_last = tl.associative_scan((terms, tl.zeros_like(terms)), 1, _join, reverse=REVERSE)
    return but_last


@triton.jit
def _alpha(tau):
    """1 - exp(-tau) to full relative precision, without expm1 (not in triton.language). For small
    tau the rounded q = exp(-tau) has lost digits of tau, and so has 1 - q. But -log q has lost the
    same ones, so (1 - q) / -log q is accurate (Kahan): alpha = tau (1 - q) / -log q. tl.log becomes
    CUDA's logf, accurate also near 1 (tests/test_kernels.py: it is not lg2.approx)."""
    q = tl.exp(-tau)
    return tl.where(q == 1, tau, tl.where(q > 0.5, _divide((q - 1) * tau, tl.log(q)), 1 - q))


@triton.jit
def _load_rays(offsets_ptr, R, BLOCK_R: tl.constexpr):
    """Rays of this program, whether they exist, their first sample and the one after their last."""
    pid = tl.program_id(0).to(tl.int64)
    offs_r = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < R
    begin = tl.load(offsets_ptr + offs_r, mask_r, 0)
    return offs_r, mask_r, begin, tl.load(offsets_ptr + offs_r + 1, mask_r, 0)


@_jit_sized
def _composite_forward(sigmas_ptr, rgbs_ptr, t_starts_ptr, t_ends_ptr, offsets_ptr, rgb_ptr,
                       opacity_ptr, depth_ptr, weights_ptr, T_ptr, R, early_stop: "fp64",
                       C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
                       BLOCK_S: tl.constexpr):
    offs_r, mask_r, begin, end = _load_rays(offsets_ptr, R, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dtype = sigmas_ptr.dtype.element_ty
    stop = tl.full((1, 1), early_stop, dtype)
    tau_sum = tl.zeros((BLOCK_R,), dtype)
    opacity = tl.zeros((BLOCK_R,), dtype)
    depth = tl.zeros((BLOCK_R,), dtype)
    rgb = tl.zeros((BLOCK_R, BLOCK_C), dtype)
    longest = tl.max(end - begin).to(tl.int32)
    start = 0
    while start < longest:
        offs_n = begin[:, None] + start + tl.arange(0, BLOCK_S)[None, :]       # (BLOCK_R, BLOCK_S)
        mask_n = offs_n < end[:, None]
        t0 = tl.load(t_starts_ptr + offs_n, mask_n, 0.0)
        t1 = tl.load(t_ends_ptr + offs_n, mask_n, 0.0)
        tau = tl.load(sigmas_ptr + offs_n, mask_n, 0.0) * (t1 - t0)
        T = tl.exp(-(tau_sum[:, None] + _exclusive_cumsum(tau, False)))
        w = tl.where(T >= stop, T * _alpha(tau), 0.0).to(dtype)
        offs_nc = offs_n[:, :, None] * C + offs_c[None, None, :]
        colour = tl.load(rgbs_ptr + offs_nc, mask_n[:, :, None] & mask_c[None, None, :], 0.0)
        rgb += tl.sum(w[:, :, None] * colour, 1)
        opacity += tl.sum(w, 1)
        depth += tl.sum(w * (0.5 * (t0 + t1)), 1)
        tau_sum += tl.sum(tau, 1)
        tl.store(weights_ptr + offs_n, w, mask_n)
        tl.store(T_ptr + offs_n, T, mask_n)
        start += BLOCK_S
    mask_rc = mask_r[:, None] & mask_c[None, :]
    tl.store(rgb_ptr + offs_r[:, None] * C + offs_c[None, :], rgb, mask_rc)
    tl.store(opacity_ptr + offs_r, opacity, mask_r)
    tl.store(depth_ptr + offs_r, depth, mask_r)


@_jit_sized
def _composite_backward(sigmas_ptr, rgbs_ptr, t_starts_ptr, t_ends_ptr, offsets_ptr, T_ptr,
                        d_rgb_ptr, d_opacity_ptr, d_depth_ptr, d_weights_ptr, d_sigmas_ptr,
                        d_rgbs_ptr, R, early_stop: "fp64", C: tl.constexpr, BLOCK_C: tl.constexpr,
                        BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr):
    """Blocks of each ray from its far end; later_sum is sum g_j w_j over the blocks behind. T is
    read, not recomputed: from the far end the sum in front of a sample is not known."""
    offs_r, mask_r, begin, end = _load_rays(offsets_ptr, R, BLOCK_R)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dtype = sigmas_ptr.dtype.element_ty
    stop = tl.full((1, 1), early_stop, dtype)
    mask_rc = mask_r[:, None] & mask_c[None, :]
    d_rgb = tl.load(d_rgb_ptr + offs_r[:, None] * C + offs_c[None, :], mask_rc, 0.0)
    d_opacity = tl.load(d_opacity_ptr + offs_r, mask_r, 0.0)
    d_depth = tl.load(d_depth_ptr + offs_r, mask_r, 0.0)
    later_sum = tl.zeros((BLOCK_R,), dtype)
    start = (tl.cdiv(tl.max(end - begin).to(tl.int32), BLOCK_S) - 1) * BLOCK_S     # the last block
    while start >= 0:
        offs_n = begin[:, None] + start + tl.arange(0, BLOCK_S)[None, :]
        mask_n = offs_n < end[:, None]
        t0 = tl.load(t_starts_ptr + offs_n, mask_n, 0.0)
        t1 = tl.load(t_ends_ptr + offs_n, mask_n, 0.0)
        tau = tl.load(sigmas_ptr + offs_n, mask_n, 0.0) * (t1 - t0)
        T = tl.load(T_ptr + offs_n, mask_n, 0.0)
        mask_seen = mask_n & (T >= stop)
        w = tl.where(mask_seen, T * _alpha(tau), 0.0).to(dtype)
        offs_nc = offs_n[:, :, None] * C + offs_c[None, None, :]
        mask_nc = mask_n[:, :, None] & mask_c[None, None, :]
        colour = tl.load(rgbs_ptr + offs_nc, mask_nc, 0.0)
        g = tl.sum(colour * d_rgb[:, None, :], 2) + d_opacity[:, None]
        g += 0.5 * (t0 + t1) * d_depth[:, None] + tl.load(d_weights_ptr + offs_n, mask_n, 0.0)
        gw = g * w                                          # w is 0 where not seen
        suffix_sum = later_sum[:, None] + _exclusive_cumsum(gw, True)
        d_sigma = tl.where(mask_seen, (t1 - t0) * (g * T * tl.exp(-tau) - suffix_sum), 0.0)
        tl.store(d_sigmas_ptr + offs_n, d_sigma, mask_n)
        tl.store(d_rgbs_ptr + offs_nc, w[:, :, None] * d_rgb[:, None, :], mask_nc)
        later_sum += tl.sum(gw, 1)
        start -= BLOCK_S


class _CompositeTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sigmas, rgbs, t_starts, t_ends, offsets, early_stop):
        inputs = [tensor.contiguous() for tensor in (sigmas, rgbs, t_starts, t_ends, offsets)]
        R, C = len(offsets) - 1, rgbs.shape[1]
        rgb, opacity, depth = rgbs.new_empty(R, C), rgbs.new_empty(R), rgbs.new_empty(R)
        weights = torch.zeros_like(inputs[0])   # 0 for samples of no ray, behind offsets[-1]
        T = torch.empty_like(inputs[0])
        ctx.sizes = (R, early_stop, C, triton.next_power_of_2(C), BLOCK_R, BLOCK_S)
        ctx.grid = (triton.cdiv(R, BLOCK_R),)
        _launch(_composite_forward, ctx.grid, *inputs, rgb, opacity, depth, weights, T, *ctx.sizes)
        ctx.save_for_backward(*inputs, T)
        return rgb, opacity, depth, weights

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        sigmas, rgbs, *_ = ctx.saved_tensors
        d_sigmas, d_rgbs = torch.zeros_like(sigmas), torch.zeros_like(rgbs)
        _launch(_composite_backward, ctx.grid, *ctx.saved_tensors,
                *[grad.contiguous() for grad in grads], d_sigmas, d_rgbs, *ctx.sizes)
        return d_sigmas, d_rgbs, None, None, None, None


def composite(sigmas, rgbs, t_starts, t_ends, offsets, early_stop=0.0, backend="auto"):
    """Volume rendering of packed samples (NeRF eq. 3), front to back.

    sigmas (N,) density per unit of t, at least 0; rgbs (N, C), C small; t_starts, t_ends (N,)
    finite; offsets (R+1,) int64, from 0 on, never falling. Samples after offsets[-1] are in no ray:
    weight and gradient are 0. early_stop: those with T_i below it get 0 too, as in renderers that
    stop there. It is only a cut-off in the result: all samples are read, no time is saved.
    Returns rgb (R, C), opacity (R,), depth (R,) (divide by opacity for a mean), weights (N,). A ray
    without samples gives zeros. There is no background: add (1 - opacity) bg.
    Gradient of all four outputs to sigmas and rgbs; none to the times.
    Example: sigma = ln 2 on the interval [1, 2], colour 1. Half of the light is absorbed: rgb 0.5,
    opacity 0.5, depth 0.5 * 1.5 = 0.75, weights [0.5].
    """
    _check("sigmas", sigmas, (None,))
    _check("rgbs", rgbs, (len(sigmas), None), sigmas)
    _check("t_starts", t_starts, (len(sigmas),), sigmas)
    _check("t_ends", t_ends, (len(sigmas),), sigmas)
    _check("offsets", offsets, (None,), sigmas, torch.int64)
    if len(offsets) == 0 or rgbs.shape[1] == 0:
        raise ValueError("offsets needs R + 1 entries and rgbs at least one channel")
    if not offsets.is_cuda:                     # on a GPU the host would wait for this check
        if offsets[0] != 0 or offsets[-1] > len(sigmas) or (offsets.diff() < 0).any():
            raise ValueError(f"offsets must rise from 0 to at most {len(sigmas)}, the sample count")
    run = {"reference": composite_ref, "triton": _CompositeTriton.apply}
    backend = _backend(backend, ("reference",), sigmas)
    return run[backend](sigmas, rgbs, t_starts, t_ends, offsets, float(early_stop))


# =============================================================================== 3. hash_encode
# Instant-NGP section 3. Level l is a cubic lattice of res_l cells per side. A position lies in one
# cell of each level. The features of the cell's eight corners, which are rows of the level's part
# of the table, are interpolated trilinearly, and the levels are concatenated:
#     p = clamp(x, 0, 1) res      c = min(floor(p), res - 1)      u = p - c
#     w_k = prod_a (u_a if k_a else 1 - u_a)                      a = x, y, z
#     out[l] = sum_k w_k table[row(c + k)]        corner k = (k_x, k_y, k_z), each 0 or 1
# The resolutions grow geometrically from base to finest, in the paper N_min and N_max (eq. 2, 3):
#     res_l = floor(base * b**l), l = 0 ... L - 1      b = (finest / base)**(1 / (L - 1))
# A level of (res+1)**3 <= P corners, P = 2**log2_table (the paper's T), is dense: each has a row.
# Otherwise it is hashed and has P rows:
#     row(v) = v_x + v_y * (res+1) + v_z * (res+1)**2                              dense
#     row(v) = (v_x XOR v_y * 2654435761 XOR v_z * 805459861) mod P                hashed (eq. 4)
# The factors are the paper's; v_x has 1, so that neighbours along x lie close in memory. Corners
# that collide share a row and its gradient, to which visible surfaces contribute most.
# Gradient, with g = d_out[l]. out is linear in the table and, inside a cell, in each u_a:
#     d_table[row(c + k)] += w_k g
#     d_x_a += res sum_k (dw_k/du_a) (g . table[row(c + k)])
# dw_k/du_a is the product of the two other factors, negative where k_a = 0. Where the clamp acts,
# d_x_a = 0, while the rows of the nearest point of the cube still receive their gradient.

class HashLevels(NamedTuple):
    """Layout of a hash table. Tuples of length L; offsets has L + 1, and the last is M."""
    resolutions: tuple          # cells per side
    sizes: tuple                # rows of the level
    offsets: tuple              # its first row
    dense: tuple                # True: every corner has its own row


def hash_levels(levels, base, finest, log2_table):
    """The layout for P = 2**log2_table. 1e-6: against rounding a whole number down. The limits: 64
    levels of 2**24 rows are 2**30, and row numbers are int32."""
    if not 1 <= levels <= 64 or not 1 <= base <= finest or not 0 <= log2_table <= 24:
        raise ValueError("hash_levels: levels 1 to 64, 1 <= base <= finest, log2_table 0 to 24")
    growth = math.exp(math.log(finest / base) / (levels - 1)) if levels > 1 else 1.0
    resolutions = tuple(math.floor(base * growth ** l + 1e-6) for l in range(levels))
    corners = [(res + 1) ** 3 for res in resolutions]
    sizes = tuple(min(number, 2 ** log2_table) for number in corners)
    dense = tuple(number <= 2 ** log2_table for number in corners)
    return HashLevels(resolutions, sizes, tuple(itertools.accumulate(sizes, initial=0)), dense)


PRIMES = (1, 2654435761, 805459861)


def _corners(cell, u):
    """The eight corners (N, 3) of cells (N, 3), one after the other, with their weights (N,)."""
    for upper in itertools.product((0, 1), repeat=3):
        factors = [u[:, a] if upper[a] else 1 - u[:, a] for a in range(3)]
        yield cell + torch.tensor(upper, device=cell.device), factors[0] * factors[1] * factors[2]


def hash_encode_ref(x, table, levels):
    out = []
    for res, size, first, dense in zip(*levels):                               # L times
        p = x.clamp(0, 1) * res                                                # (N, 3)
        cell = p.detach().long().clamp(0, res - 1)
        feature = table.new_zeros(len(x), table.shape[1])
        for v, weight in _corners(cell, p - cell):
            if dense:
                row = v[:, 0] + v[:, 1] * (res + 1) + v[:, 2] * (res + 1) ** 2
            else:
                row = (v[:, 0] ^ v[:, 1] * PRIMES[1] ^ v[:, 2] * PRIMES[2]) % size  # ^: XOR
            feature = feature + weight[:, None] * table[first + row]
        out.append(feature)
    return torch.cat(out, 1)                                                   # (N, L F)


@triton.jit
def _block(N, F: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """Positions and features of a lookup's program, and whether they exist."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_f = tl.arange(0, BLOCK_F)[None, :]
    mask_n = offs_n < N
    return offs_n, offs_f, mask_n, mask_n[:, None] & (offs_f < F)


@triton.jit
def _corner(cell, u, CORNER: tl.constexpr):
    """A corner and the factors of its weight. Bits 0, 1, 2 of CORNER: upper along x, y, z."""
    vx = cell[0] + (CORNER & 1)
    vy = cell[1] + (CORNER >> 1 & 1)
    vz = cell[2] + (CORNER >> 2)
    wx = u[0] if CORNER & 1 else 1 - u[0]
    wy = u[1] if CORNER >> 1 & 1 else 1 - u[1]
    wz = u[2] if CORNER >> 2 else 1 - u[2]
    return (vx, vy, vz), (wx, wy, wz)


@triton.jit
def _load_axis(x_ptr, offs_n, mask_n, axis: tl.constexpr, scale, last):
    """Position times scale, clamped to [0, last] -> lower corner of its cell, u."""
    p = tl.load(x_ptr + offs_n * 3 + axis, mask_n, 0.0) * scale
    p = tl.where(p < 0, 0.0, tl.where(p > last, last, p)).to(x_ptr.dtype.element_ty)  # keeps a NaN
    c = tl.minimum(tl.maximum(p.to(tl.int32), 0), last - 1)
    return c, p - c.to(p.dtype)


@triton.jit
def _load_cell(x_ptr, offs_n, mask_n, scale, last_x, last_y, last_z):
    """The cell of each position in a lattice with corners 0 ... last along each axis."""
    cx, ux = _load_axis(x_ptr, offs_n, mask_n, 0, scale, last_x)
    cy, uy = _load_axis(x_ptr, offs_n, mask_n, 1, scale, last_y)
    cz, uz = _load_axis(x_ptr, offs_n, mask_n, 2, scale, last_z)
    return (cx, cy, cz), (ux, uy, uz)


@triton.jit
def _hash_cell(x_ptr, layout_ptr, offs_n, mask_n, level):
    """Cells and u of a level, and its layout (loaded: a constant would be compiled anew)."""
    res = tl.load(layout_ptr + level * 4)
    size = tl.load(layout_ptr + level * 4 + 1)
    first = tl.load(layout_ptr + level * 4 + 2)
    dense = tl.load(layout_ptr + level * 4 + 3)
    cell, u = _load_cell(x_ptr, offs_n, mask_n, res, res, res, res)
    return cell, u, (res, size, first, dense)


@triton.jit
def _hash_row(corner, layout):
    vx, vy, vz = corner
    res, size, first, dense = layout
    flat = vx + (res + 1) * (vy + (res + 1) * vz)
    # int32 wraps modulo 2**32; -1640531535 = 2654435761 - 2**32. & (size - 1) is modulo size.
    hashed = (vx ^ (vy * -1640531535) ^ (vz * 805459861)) & (size - 1)
    return (tl.where(dense != 0, flat, hashed) + first).to(tl.int64)


@_jit_sized
def _hash_kernel(x_ptr, table_or_d_table_ptr, layout_ptr, out_or_d_out_ptr, N, L: tl.constexpr,
                 F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
                 BACKWARD: tl.constexpr):
    """Forward, a gather: out[n] = sum_k w_k table[row_k]. BACKWARD, a scatter: d_table[row_k] +=
    w_k d_out[n]; d_table and d_out take the places of table and out. Both visit the same n and k.
    The level is the second grid axis. Axis 0 varies fastest in the usual launch order, so that
    mostly one level is in flight, whose rows can stay in the L2 cache; but x is read L times."""
    level = tl.program_id(1)
    offs_n, offs_f, mask_n, mask_nf = _block(N, F, BLOCK_N, BLOCK_F)
    offs_out = offs_n[:, None] * (L * F) + level * F + offs_f
    cell, u, layout = _hash_cell(x_ptr, layout_ptr, offs_n, mask_n, level)
    if BACKWARD:
        g = tl.load(out_or_d_out_ptr + offs_out, mask_nf, 0.0)
    else:
        out = tl.zeros((BLOCK_N, BLOCK_F), table_or_d_table_ptr.dtype.element_ty)
    for k in tl.static_range(8):                # unrolled: _corner wants a constant
        corner, (wx, wy, wz) = _corner(cell, u, k)
        offs_row = _hash_row(corner, layout)[:, None] * F + offs_f
        w = (wx * wy * wz)[:, None]
        if BACKWARD:                            # relaxed: orders no other access to memory
            tl.atomic_add(table_or_d_table_ptr + offs_row, w * g, mask_nf, sem="relaxed")
        else:
            out += w * tl.load(table_or_d_table_ptr + offs_row, mask_nf, 0.0)
    if not BACKWARD:
        tl.store(out_or_d_out_ptr + offs_out, out, mask_nf)


@_jit_sized
def _hash_backward_x(x_ptr, table_ptr, layout_ptr, d_out_ptr, d_x_ptr, N, L: tl.constexpr,
                     F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr):
    """All levels in one program, so that a position's gradient is written once, without atomics."""
    offs_n, offs_f, mask_n, mask_nf = _block(N, F, BLOCK_N, BLOCK_F)
    zero = tl.zeros((BLOCK_N,), x_ptr.dtype.element_ty)
    d_x0, d_x1, d_x2 = zero, zero, zero         # along the three axes
    for level in range(L):                      # not unrolled: L times eight corners is long code
        cell, u, layout = _hash_cell(x_ptr, layout_ptr, offs_n, mask_n, level)
        offs_out = offs_n[:, None] * (L * F) + level * F + offs_f
        g = tl.load(d_out_ptr + offs_out, mask_nf, 0.0)
        for k in tl.static_range(8):
            corner, (wx, wy, wz) = _corner(cell, u, k)
            offs_row = _hash_row(corner, layout)[:, None] * F + offs_f
            s = tl.sum(g * tl.load(table_ptr + offs_row, mask_nf, 0.0), 1) * layout[0]
            d_x0 += (s if k & 1 else -s) * wy * wz
            d_x1 += (s if k >> 1 & 1 else -s) * wx * wz
            d_x2 += (s if k >> 2 else -s) * wx * wy
    for axis in tl.static_range(3):
        d_x = d_x0 if axis == 0 else d_x1 if axis == 1 else d_x2
        x = tl.load(x_ptr + offs_n * 3 + axis, mask_n, 0.0)
        clamped = (x < 0) | (x > 1) | (x != x)
        tl.store(d_x_ptr + offs_n * 3 + axis, tl.where(clamped, 0.0, d_x), mask_n)


@lru_cache(maxsize=16)
def _layout(levels, device):
    """(L, 4) int32: resolution, size, first row, dense. Cached: only the first step copies it."""
    return torch.tensor(list(zip(*levels)), dtype=torch.int32, device=device)


class _HashTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, levels):
        x, table, layout = x.contiguous(), table.contiguous(), _layout(levels, x.device)
        N, L, F = len(x), len(levels.sizes), table.shape[1]
        ctx.sizes = (N, L, F, triton.next_power_of_2(F), BLOCK_N)
        ctx.grid = (triton.cdiv(N, BLOCK_N), L)
        ctx.save_for_backward(x, table, layout)
        out = table.new_empty(N, L * F)
        _launch(_hash_kernel, ctx.grid, x, table, layout, out, *ctx.sizes, False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, table, layout = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_x = d_table = None
        if ctx.needs_input_grad[0]:
            d_x = torch.empty_like(x)
            _launch(_hash_backward_x, ctx.grid[:1], x, table, layout, d_out, d_x, *ctx.sizes)
        if ctx.needs_input_grad[1]:
            d_table = torch.zeros_like(table)
            _launch(_hash_kernel, ctx.grid, x, d_table, layout, d_out, *ctx.sizes, True)
        return d_x, d_table, None


def hash_encode(x, table, levels, backend="auto"):
    """Features of positions from a multiresolution hash table.

    x (N, 3) in [0, 1]; outside, the features are those of the cube's nearest point. table (M, F),
    M = levels.offsets[-1]; levels from hash_levels. Returns (N, L F), one level after the other.
    Gradient to table and x (the other lookups give x none: no script needs it). A loss on the
    gradient to x, as on a normal, needs "reference".
    Example: one dense level of one cell, F = 1, table rows 0, 1, ..., 7. x = (1/2, 1/4, 1) gives
    1/2 + 2/4 + 4 = 5, and the gradient to x is (1, 2, 4).
    """
    _check("x", x, (None, 3))
    _check("table", table, (levels.offsets[-1], None), x)
    run = {"reference": hash_encode_ref, "torch": _HashTorch.apply, "triton": _HashTriton.apply}
    return run[_backend(backend, ("reference", "torch"), x)](x, table, levels)


# ============================================================================== 4. voxel_interp
# Plenoxels section 3.1: a lattice most of whose points are empty. links, as large as the lattice,
# holds the row of values that a point owns, or a negative number if it owns none. The features of
# the eight corners of a position's cell are interpolated trilinearly; a missing corner counts as 0:
#     p = clamp(x, 0, size - 1)      c = min(floor(p), size - 2)      u = p - c     (axis by axis)
#     out = sum_k w_k values[links[c + k]]                            k, w_k as in hash_encode
# Gradient, with g = d_out; out is linear in values:
#     d_values[links[c + k]] += w_k g        for corners that exist (and are in the mask, if given)

def voxel_interp_ref(x, links, values, mask=None):
    if mask is not None:
        values = torch.where(mask[:, None], values, values.detach())
    values = nnf.pad(values, (0, 0, 1, 0))                     # row 0: the zeros of missing corners
    last = torch.tensor(links.shape, dtype=x.dtype, device=x.device) - 1
    p = x.detach().clamp(min=0).minimum(last)                                  # (N, 3)
    cell = p.long().clamp(min=0).minimum(last.long() - 1)
    out = values.new_zeros(len(x), values.shape[1])
    for v, weight in _corners(cell, p - cell):
        row = links[v[:, 0], v[:, 1], v[:, 2]].clamp(min=-1) + 1
        out = out + weight[:, None] * values[row]
    return out                                                                 # (N, F)


@_jit_sized
def _voxel_kernel(x_ptr, links_ptr, mask_ptr, values_or_d_values_ptr, out_or_d_out_ptr, N, X, Y, Z,
                  M, F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
                  BACKWARD: tl.constexpr):
    """As _hash_kernel. d_out is loaded for each corner (from the L1 cache after the first): a
    position without corners reads none. The mask concerns gradients: forward it is None."""
    offs_n, offs_f, mask_n, mask_out = _block(N, F, BLOCK_N, BLOCK_F)
    offs_out = offs_n[:, None] * F + offs_f
    cell, u = _load_cell(x_ptr, offs_n, mask_n, 1, X - 1, Y - 1, Z - 1)
    out = tl.zeros((BLOCK_N, BLOCK_F), values_or_d_values_ptr.dtype.element_ty)
    for k in tl.static_range(8):
        (vx, vy, vz), (wx, wy, wz) = _corner(cell, u, k)
        row = tl.load(links_ptr + (vx.to(tl.int64) * Y + vy) * Z + vz, mask_n, -1).to(tl.int64)
        mask_row = mask_n & (row >= 0) & (row < M)      # nothing is read or written outside
        if mask_ptr is not None:
            mask_row = mask_row & (tl.load(mask_ptr + row, mask_row, 0) != 0)
        offs_row = row[:, None] * F + offs_f
        mask_nf = mask_row[:, None] & (offs_f < F)
        w = (wx * wy * wz)[:, None]
        if BACKWARD:
            g = tl.load(out_or_d_out_ptr + offs_out, mask_nf, 0.0)
            tl.atomic_add(values_or_d_values_ptr + offs_row, w * g, mask_nf, sem="relaxed")
        else:
            out += w * tl.load(values_or_d_values_ptr + offs_row, mask_nf, 0.0)
    if not BACKWARD:
        tl.store(out_or_d_out_ptr + offs_out, out, mask_out)


def _block_sizes(F):
    """F, F rounded up, positions of a program. BLOCK_NF = 512 for 128 threads: 4 floats each, one
    128-bit access. F = 28: BLOCK_F = 32, 16 positions, 8 threads per row, one of them idle."""
    BLOCK_F = triton.next_power_of_2(F)
    return F, BLOCK_F, max(1, min(BLOCK_N, BLOCK_NF // BLOCK_F))


class _VoxelTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, links, values, mask):
        x, links, values = x.contiguous(), links.contiguous(), values.contiguous()
        mask = None if mask is None else mask.contiguous().view(torch.uint8)
        ctx.save_for_backward(x, links, mask)
        ctx.shape = values.shape
        ctx.sizes = (len(x), *links.shape, len(values), *_block_sizes(values.shape[1]))
        ctx.grid = (triton.cdiv(len(x), ctx.sizes[-1]),)
        out = values.new_empty(len(x), values.shape[1])
        _launch(_voxel_kernel, ctx.grid, x, links, None, values, out, *ctx.sizes, False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        d_values = d_out.new_zeros(ctx.shape)
        _launch(_voxel_kernel, ctx.grid, *ctx.saved_tensors, d_values, d_out.contiguous(),
                *ctx.sizes, True)
        return None, None, d_values, None


def voxel_interp(x, links, values, mask=None, backend="auto"):
    """Features of positions from a sparse voxel grid.

    x (N, 3) in lattice coordinates: the lattice point (i, j, k) lies at x = (i, j, k). links
    (X, Y, Z) int32, each side at least 2; values (M, F) of x's dtype, finite, as weights may be 0.
    mask (M,) bool: the rows that receive a gradient (StreamRF), None for all. This saves the
    additions into the other rows, but the whole (M, F) gradient is still cleared.
    Returns (N, F). Gradient to values only. A row beyond values: an error in PyTorch, 0 in Triton.
    Example: X = Y = Z = 2, F = 1, only (0, 0, 0) present, with value 8, and (1, 0, 0), with 16.
    x = (1/2, 0, 1/2) gives 8/4 + 16/4 = 6.
    """
    _check("x", x, (None, 3))
    _check("links", links, (None, None, None), x, torch.int32)
    _check("values", values, (None, None), x)
    if min(links.shape) < 2 or values.shape[1] == 0:
        raise ValueError("links must have two points along each axis, values a column")
    if mask is not None:
        _check("mask", mask, (len(values),), x, torch.bool)
    run = {"reference": voxel_interp_ref, "torch": _VoxelTorch.apply, "triton": _VoxelTriton.apply}
    return run[_backend(backend, ("reference", "torch"), x)](x.detach(), links, values, mask)


# =========================================================================== 5. triplane_interp
# EG3D section 3: a scene is three planes of features, xy, xz and yz. A position is projected onto
# each, the four texels around it are interpolated bilinearly, and the three results are summed.
# In plane (a, b), x_a selects the column, 0 to W - 1, and x_b the row, 0 to H - 1. Texel i of n has
# its centre at (2 i + 1) / n - 1, so that -1 and 1 are the borders of the plane:
#     p_a = ((x_a + 1) W - 1) / 2   p_b = ((x_b + 1) H - 1) / 2   c = floor(p)     u = p - c
#     out = sum_planes sum_k w_k plane[c_b + k_b, c_a + k_a]          k_a, k_b in {0, 1}
#     w_k = prod over a and b of (u if k else 1 - u)
# A texel outside counts as 0 (grid_sample with align_corners=False and zeros).
# Released code: the third plane is (z, x). Here it is (y, z), as in the paper.
# Gradient, with g = d_out: d_plane[c_b + k_b, c_a + k_a] += w_k g for texels inside.

PLANE_AXES = ((0, 1), (0, 2), (1, 2))


def _texel(x, size):
    """Lower texel, from -1 to size - 1, and u. A NaN stays one."""
    p = ((x.detach() + 1) * (size / 2) - 0.5).clamp(-1, size)
    cell = p.floor().long().clamp(-1, size - 1)
    return cell, p - cell


def triplane_interp_ref(x, planes):
    B, _, H, W, F = planes.shape
    planes = nnf.pad(planes, (0, 0, 1, 1, 1, 1))               # a ring of zeros round each plane
    scene = torch.arange(B, device=x.device)[:, None]
    out = planes.new_zeros(B, x.shape[1], F)
    for plane, (a, b) in enumerate(PLANE_AXES):
        col, ua = _texel(x[..., a], W)                                         # (B, N)
        row, ub = _texel(x[..., b], H)
        for ka, kb in itertools.product((0, 1), repeat=2):
            weight = (ua if ka else 1 - ua) * (ub if kb else 1 - ub)
            out = out + weight[..., None] * planes[scene, plane, 1 + row + kb, 1 + col + ka]
    return out                                                                 # (B, N, F)


@triton.jit
def _load_texel(x_ptr, offs_n, mask_n, axis: tl.constexpr, size):
    p = (tl.load(x_ptr + offs_n * 3 + axis, mask_n, 0.0) + 1) * (0.5 * size) - 0.5
    p = tl.where(p < -1, -1, tl.where(p > size, size, p)).to(x_ptr.dtype.element_ty)
    cell = tl.minimum(tl.maximum(tl.floor(p).to(tl.int32), -1), size - 1)
    return cell, p - cell.to(p.dtype)


@_jit_sized
def _triplane_kernel(x_ptr, planes_or_d_planes_ptr, out_or_d_out_ptr, N, H, W, F: tl.constexpr,
                     BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr, BACKWARD: tl.constexpr):
    """As _hash_kernel. The scene is the second grid axis: its planes stay in the L2 cache."""
    scene = tl.program_id(1).to(tl.int64)
    offs_n, offs_f, mask_n, mask_out = _block(N, F, BLOCK_N, BLOCK_F)
    offs_n += scene * N
    offs_out = offs_n[:, None] * F + offs_f
    if BACKWARD:
        g = tl.load(out_or_d_out_ptr + offs_out, mask_out, 0.0)
    else:
        out = tl.zeros((BLOCK_N, BLOCK_F), planes_or_d_planes_ptr.dtype.element_ty)
    for plane in tl.static_range(3):                            # the axes are PLANE_AXES[plane]
        col, ua = _load_texel(x_ptr, offs_n, mask_n, 0 if plane < 2 else 1, W)
        row, ub = _load_texel(x_ptr, offs_n, mask_n, 1 if plane == 0 else 2, H)
        for k in tl.static_range(4):
            i = row + (k >> 1)
            j = col + (k & 1)
            mask = mask_n & (i >= 0) & (i < H) & (j >= 0) & (j < W)
            mask_nf = mask[:, None] & (offs_f < F)
            offs_texel = (((scene * 3 + plane) * H + i) * W + j)[:, None] * F + offs_f
            w = ((ua if k & 1 else 1 - ua) * (ub if k >> 1 else 1 - ub))[:, None]
            if BACKWARD:
                tl.atomic_add(planes_or_d_planes_ptr + offs_texel, w * g, mask_nf, sem="relaxed")
            else:
                out += w * tl.load(planes_or_d_planes_ptr + offs_texel, mask_nf, 0.0)
    if not BACKWARD:
        tl.store(out_or_d_out_ptr + offs_out, out, mask_out)


class _TriplaneTriton(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, planes):
        x, planes = x.contiguous(), planes.contiguous()
        B, N, _ = x.shape
        _, _, H, W, F = ctx.shape = planes.shape
        ctx.sizes = (N, H, W, *_block_sizes(F))
        ctx.grid = (triton.cdiv(N, ctx.sizes[-1]), B)
        ctx.save_for_backward(x)
        out = planes.new_empty(B, N, F)
        _launch(_triplane_kernel, ctx.grid, x, planes, out, *ctx.sizes, False)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        d_planes = d_out.new_zeros(ctx.shape)
        _launch(_triplane_kernel, ctx.grid, *ctx.saved_tensors, d_planes, d_out.contiguous(),
                *ctx.sizes, True)
        return None, d_planes


def triplane_interp(x, planes, backend="auto"):
    """Features of positions from the three planes of their scene.

    x (B, N, 3) in [-1, 1], each scene with its own positions (at most 65535 scenes, CUDA's limit
    for the second grid axis). Half a texel outside, the two planes with that axis have faded to 0.
    planes (B, 3, H, W, F) finite, of x's dtype, order xy, xz, yz: first letter along W, second H.
    Returns (B, N, F). Gradient to planes only.
    Example: H = W = 2, F = 1, so that texels are centred at -1/2 and 1/2. Plane xy is
    [[1, 2], [3, 4]], the others 0: (1/2, 0, z) gives (2 + 4)/2 = 3, and (1, 0, z) half of that.
    """
    _check("x", x, (None, None, 3))
    _check("planes", planes, (len(x), 3, None, None, None), x)
    if min(planes.shape[2:]) == 0:
        raise ValueError(f"planes {tuple(planes.shape)} needs a texel along each axis, a feature")
    run = {"reference": triplane_interp_ref, "torch": _TriplaneTorch.apply,
           "triton": _TriplaneTriton.apply}
    return run[_backend(backend, ("reference", "torch"), x)](x.detach(), planes)


# ============================================================================= what a CPU runs
# backend="torch" of the three lookups, three to four times as fast as the references on two cores.
# embedding_bag gathers rows and adds them, each times its weight, in one pass. Backward adds in an
# order that is fixed on a CPU. Nothing here is needed to understand the kernels.

def _transpose_contiguous(matrix):
    """PyTorch copies a transposed matrix on one thread, a transposed 3-D tensor on all."""
    return matrix.t()[None].contiguous()[0]


def _two_terms(cell, u, strides):
    """cell, u (..., 3, N) -> for the lower and the upper corner along each axis, its term of the
    row number and its factor of the weight, both (..., 3, 2, N), which serve all 8 corners."""
    terms = cell * strides                                                     # strides (..., 3, 1)
    return torch.stack([terms, terms + strides], -2), torch.stack([1 - u, u], -2)


def _eight_corners(terms, factors, hashed=False):
    """Both (3, 2, N) -> rows, the sum or XOR of a term for each axis, and weights, both (8, N)."""
    x, y, z = terms                                                            # (2, N)
    wx, wy, wz = factors
    y, wy = y[:, None], wy[:, None]
    z, wz = z[:, None, None], wz[:, None, None]
    rows = z ^ y ^ x if hashed else z + y + x                                  # (2, 2, 2, N)
    return rows.view(8, -1), (wz * wy * wx).view(8, -1)


class _HashTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, table, levels):
        table = table.contiguous()
        res, _, _, dense = _layout(levels, x.device).view(-1, 4, 1, 1).unbind(1)    # (L, 1, 1)
        p = _transpose_contiguous(x).clamp(0, 1) * res                         # (L, 3, N)
        cell = p.int().clamp_(torch.zeros_like(res), res - 1)
        u = p - cell
        strides = torch.cat([torch.ones_like(res), res + 1, (res + 1) ** 2], 1)     # (L, 3, 1)
        primes = torch.tensor(PRIMES, device=x.device).int()[:, None]          # wraps modulo 2**32
        terms, factors = _two_terms(cell, u, torch.where(dense > 0, strides, primes))
        out, saved = [], []
        for level, (size, first) in enumerate(zip(levels.sizes, levels.offsets)):
            hashed = not levels.dense[level]
            rows, weights = _eight_corners(terms[level], factors[level], hashed)
            if hashed:
                rows &= size - 1                                               # modulo size
            level_table = table[first:first + size]
            out.append(nnf.embedding_bag(_transpose_contiguous(rows), level_table, mode="sum",
                                         per_sample_weights=_transpose_contiguous(weights)))
            saved += [rows, weights]
            if ctx.needs_input_grad[0]:                 # once more, while they are in the cache
                saved.append(_transpose_contiguous(level_table.index_select(0, rows.view(-1))))
        ctx.levels, ctx.shape = levels, table.shape
        ctx.save_for_backward(x, u, *saved)
        return torch.cat(out, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        x, u, *saved = ctx.saved_tensors                                       # u (L, 3, N)
        levels, F = ctx.levels, ctx.shape[1]
        want_x, want_table, _ = ctx.needs_input_grad
        N, L = len(x), len(levels.sizes)
        d_table = d_out.new_empty(ctx.shape) if want_table else None
        s = d_out.new_zeros(L, 8, N) if want_x else None                       # g . table[row_k]
        per_level = len(saved) // L
        for level, g in enumerate(_transpose_contiguous(d_out).view(L, F, 1, N)):
            rows, weights, *corners = saved[level * per_level:(level + 1) * per_level]
            if want_table:                              # each feature into an array of its own
                sums = g.new_zeros(F, levels.sizes[level])
                sums.scatter_add_(1, rows.view(-1).long().expand(F, -1), (weights * g).view(F, -1))
                first, end = levels.offsets[level:level + 2]
                d_table[first:end] = _transpose_contiguous(sums)
            if want_x:
                for feature, g_feature in zip(corners[0].view(F, 8, N), g):
                    s[level].addcmul_(feature, g_feature)
        if not want_x:
            return None, d_table, None
        d_x = _trilinear_slopes(s.view(L, 2, 2, 2, N), *u.unbind(1))           # (3, L, N)
        d_x = (d_x * _layout(levels, x.device)[:, :1]).sum(1).t()
        return d_x * ((x >= 0) & (x <= 1)), d_table, None


def _trilinear_slopes(s, ux, uy, uz):
    """Corner values s (L, 2, 2, 2, N), axes z, y, x -> derivatives along x, y, z, (3, L, N): the
    difference along one axis, interpolated along the other two."""
    slope_x = s[:, :, :, 1] - s[:, :, :, 0]                                    # (L, 2, 2, N)
    s = torch.addcmul(s[:, :, :, 0], slope_x, ux[:, None, None])
    slope_x = torch.lerp(slope_x[:, :, 0], slope_x[:, :, 1], uy[:, None])      # (L, 2, N)
    slope_y = s[:, :, 1] - s[:, :, 0]
    s = torch.addcmul(s[:, :, 0], slope_y, uy[:, None])
    slope_x = torch.lerp(slope_x[:, 0], slope_x[:, 1], uz)
    slope_y = torch.lerp(slope_y[:, 0], slope_y[:, 1], uz)
    return torch.stack([slope_x, slope_y, s[:, 1] - s[:, 0]])


class _VoxelTorch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, links, values, mask):
        _, Y, Z = links.shape
        last = torch.tensor(links.shape, device=x.device)[:, None] - 1
        p = x.t().clamp(min=0).minimum(last.to(x.dtype))                       # (3, N)
        cell = p.long().clamp_(min=0).minimum(last - 1)
        strides = torch.tensor([[Y * Z], [Z], [1]], device=x.device)
        points, weights = _eight_corners(*_two_terms(cell, p - cell, strides))
        rows = links.reshape(-1).index_select(0, points.view(-1))
        rows = _transpose_contiguous(rows.view(8, -1))                         # (N, 8)
        weights = _transpose_contiguous(weights)
        ctx.save_for_backward(rows, weights, mask)
        ctx.shape = values.shape
        table = values.contiguous() if len(values) else values.new_zeros(1, values.shape[1])
        return nnf.embedding_bag(rows.clamp(min=0), table, mode="sum",
                                 per_sample_weights=weights * (rows >= 0))

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        """scatter_add_ sorts whole rows and adds in order, in half the time of index_add_."""
        rows, weights, mask = ctx.saved_tensors
        rows = rows.view(-1)                            # entry 8 * position + corner
        entries = (rows >= 0).nonzero()[:, 0]
        if mask is not None:
            entries = entries[mask[rows[entries]]]
        g = d_out.index_select(0, entries // 8) * weights.view(-1)[entries][:, None]
        index = rows[entries].long()[:, None].expand(-1, ctx.shape[1])
        return None, None, d_out.new_zeros(ctx.shape).scatter_add_(0, index, g), None


class _TriplaneTorch(torch.autograd.Function):
    """Each plane has a ring of zeros and W + 2 texels per row. A cell is named by its lower texel,
    counted over all planes; its four texels are that one and those 1, W + 2 and W + 3 further.
    Example, H = W = 2: texels 0 to 15; cell 5 has 5, 6, 9 and 10, all that are not of the ring."""
    @staticmethod
    def forward(ctx, x, planes):
        B, N, _ = x.shape
        _, _, H, W, F = ctx.shape = planes.shape
        ctx.steps = (0, 1, W + 2, W + 3)
        x = x.permute(2, 0, 1)
        col, ua = _texel(x[[a for a, _ in PLANE_AXES]], W)                     # (3, B, N)
        row, ub = _texel(x[[b for _, b in PLANE_AXES]], H)
        plane = torch.arange(3 * B, device=x.device).view(B, 3, 1).transpose(0, 1)
        cells = ((plane * (H + 2) + 1 + row) * (W + 2) + 1 + col).flatten(1)   # (3, B N)
        weights = (torch.stack([1 - ub, ub])[:, None] * torch.stack([1 - ua, ua])).view(4, 3, B * N)
        ctx.save_for_backward(cells, weights)
        rows = _transpose_contiguous(cells)[:, :, None] + torch.tensor(ctx.steps, device=x.device)
        texels = nnf.pad(planes, (0, 0, 1, 1, 1, 1)).flatten(0, 3)
        out = nnf.embedding_bag(rows.view(B * N, 12), texels, mode="sum",
                                per_sample_weights=weights.permute(2, 1, 0).reshape(B * N, 12))
        return out.view(B, N, F)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        """The 3 B N pairs (plane, position) are sorted by cell. For corner k, one embedding_bag
        sums w_k d_out over the pairs of each cell, that of cell c for texel c + steps[k]."""
        cells, weights = ctx.saved_tensors
        B, _, H, W, F = ctx.shape
        d_out = d_out.flatten(0, 1)                                            # (B N, F)
        d_texels = d_out.new_zeros(B * 3 * (H + 2) * (W + 2), F)
        if len(d_out):
            order = cells.flatten().argsort(stable=True)
            counts = cells.flatten().bincount(minlength=len(d_texels))
            starts = counts.cumsum(0) - counts
            weights = weights.flatten(1).index_select(1, order)
            positions = order % len(d_out)
            for step, w in zip(ctx.steps, weights):
                sums = nnf.embedding_bag(positions, d_out, starts, per_sample_weights=w, mode="sum")
                d_texels[step:] += sums[:len(sums) - step]
        return None, d_texels.view(B, 3, H + 2, W + 2, F)[:, :, 1:-1, 1:-1]


# ================================================================ python kernels.py: check and time

def _cases(rays, dtype, device):
    """name -> (function, inputs), the same random numbers in every dtype. 70 samples of a ray are
    three blocks; some rays are empty, some positions outside. For the options, see the tests."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape, low=0.0, high=1.0, grad=False):
        numbers = torch.rand(*shape, generator=random) * (high - low) + low
        return numbers.to(device, dtype).requires_grad_(grad)

    counts = torch.tensor([70, 0, 1, 9], device=device).repeat(rays // 4 + 1)[:rays]
    offsets = nnf.pad(counts.cumsum(0), (1, 0))
    N = int(offsets[-1])
    t = torch.arange(N, device=device).to(dtype) % 70 / 32  # not in order, which is not needed
    rays_d = nnf.normalize(draw(rays, 3, low=-1), dim=1)
    rays_o = -2 * rays_d
    rays_o[1::4] += 9
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]], device=device)
    levels = hash_levels(8, 16, 256, 16 if device == "cpu" else 19)
    table = draw(levels.offsets[-1], 4, low=-1, grad=True)
    links = draw(64, 64, 64, low=-N, high=N).int()          # half of the points own no row
    return {
        "march": (march, (rays_o, rays_d, draw(32, 32, 32) < 0.3, box, 0.03, 0.9, 3.1, draw(rays))),
        "composite": (composite, (draw(N, high=3, grad=True), draw(N, 3, grad=True), t, t + 1 / 32,
                                  offsets)),
        "hash_encode": (hash_encode, (draw(N, 3, low=-0.1, high=1.1, grad=True), table, levels)),
        "voxel_interp": (voxel_interp, (draw(N, 3, high=65) - 1, links, draw(N, 28, grad=True))),
        "triplane_interp": (triplane_interp, (draw(4, N // 4, 3, low=-1.1, high=1.1),
                                              draw(4, 3, 64, 64, 32, grad=True)))}


def _results(function, inputs, backend):
    """Outputs and, unless it is march, the gradient of half their sum of squares."""
    out = function(*inputs, backend=backend)
    out = out if isinstance(out, tuple) else (out,)
    wrt = [a for a in inputs if isinstance(a, torch.Tensor) and a.requires_grad]
    return [*out, *torch.autograd.grad(out, wrt, [a.detach() for a in out])] if wrt else out


def check(name, backend, rays, device):
    """"ok", or what is wrong. With exact and plain, the reference in float64 and float32, wanted is
    max |found - exact| <= 4 max |plain - exact| + 1e-6 max |exact|, as sums have another order. The
    result of march must equal plain: in float64 a middle may be in another cell."""
    exact, plain, found = (
        _results(*_cases(rays, dtype, device)[name], which)
        for dtype, which in ((torch.float64, "reference"), (torch.float32, "reference"),
                             (torch.float32, backend)))
    if name == "march":
        return "ok" if all(map(torch.equal, plain, found)) else "not equal to the reference"
    for number, (a, b, c) in enumerate(zip(exact, plain, found)):
        error = (c.double() - a).abs().max().item()
        allowed = 4 * (b.double() - a).abs().max().item() + 1e-6 * a.abs().max().item()
        if not error <= allowed:
            return f"result {number} is off by {error:.1e}, allowed {allowed:.1e}"
    return "ok"


def _milliseconds(function, seconds):
    timer = Timer("f()", globals={"f": function}, num_threads=torch.get_num_threads())
    return f"{1e3 * timer.blocked_autorange(min_run_time=seconds).median:.3g}"


def main():
    """A time to compare with, computed and not measured: composite's forward reads 24 bytes per
    sample (C = 3) and writes 8. 65536 rays have 1.31 million samples here: 0.0125 ms at 3.35 TB/s,
    the memory of an H100."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser = argparse.ArgumentParser(description="Check every operation, then time it.")
    parser.add_argument("--rays", type=int, default=1024 if device == "cpu" else 65536)
    parser.add_argument("--seconds", type=float, default=0.5, help="time for each number")
    args = parser.parse_args()
    print(torch.cuda.get_device_name() if device == "cuda" else "CPU", "| torch",
          torch.__version__, "|", NO_TRITON or f"triton {triton.__version__}")
    print("\n| operation | backend | check | forward ms | with backward |\n|---|---|---|---|---|")
    failed = False
    for name, (function, inputs) in _cases(args.rays, torch.float32, device).items():
        backends = ["reference"] if name in ("march", "composite") else ["reference", "torch"]
        for backend in backends + ["triton"] * (not NO_TRITON):
            interpreted = backend == "triton" and device == "cpu"
            result = "-" if backend == "reference" else check(
                name, backend, 4 if interpreted else args.rays, device)
            failed = failed or result not in ("-", "ok")
            times = []
            if result in ("-", "ok") and not interpreted:
                runs = [partial(function, *inputs, backend=backend)]
                if name != "march":
                    runs.append(partial(_results, function, inputs, backend))
                times = [_milliseconds(run, args.seconds) for run in runs]
            print("|", " | ".join([name, backend, result, *times, "-", "-"][:5]), "|", flush=True)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
