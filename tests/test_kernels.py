"""Tests of kernels.py. Every operation is compared with a slow loop that shares no code with it.

The Triton kernels take the same tests as the PyTorch functions: on a CUDA device where there is
one, and in any case on the CPU, where test_interpreter runs this file again with TRITON_INTERPRET=1
(in a process of its own). They are also compiled, exactly as the public functions launch them.
"""
import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import grad, gradcheck

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
from kernels import (composite, hash_encode, hash_levels, march, triplane_interp,  # noqa: E402
                     voxel_interp)

INTERPRET, CUDA = kernels.INTERPRET, torch.cuda.is_available()
if INTERPRET:
    PLAIN, LOOKUP = ["triton"], ["triton"]
else:
    on_gpu = ["triton"] if CUDA and not kernels.NO_TRITON else []
    PLAIN, LOOKUP = ["reference", *on_gpu], ["reference", "torch", *on_gpu]
over_plain = pytest.mark.parametrize("backend", PLAIN)
over_lookup = pytest.mark.parametrize("backend", LOOKUP)
only_plain = pytest.mark.skipif(INTERPRET, reason="about the PyTorch path")
F64, INF, NAN = torch.float64, math.inf, math.nan


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is full of NaN: what a kernel forgets to write cannot pass for a zero."""
    def poison(make):
        def made(*args, **kwargs):
            fresh = make(*args, **kwargs)
            return fresh.fill_(NAN) if fresh.is_floating_point() else fresh
        return made
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def generator(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed):
    """Exact in float32."""
    return torch.randn(*shape, generator=generator(seed)).double()


def run(function, backend, *inputs, **more):
    """Call on the backend's device; results back on the CPU. Gradients flow through both moves."""
    device = "cuda" if backend == "triton" and not INTERPRET else "cpu"

    def move(a):
        return a.to(device) if isinstance(a, torch.Tensor) else a
    out = function(*map(move, inputs), backend=backend, **{k: move(v) for k, v in more.items()})
    return tuple(a.cpu() for a in out) if isinstance(out, tuple) else out.cpu()


def single(inputs):
    """float64 tensors as float32, all else as it is."""
    return [a.float() if isinstance(a, torch.Tensor) and a.dtype == F64 else a for a in inputs]


def strided(tensor):
    """The same numbers, not contiguous in memory."""
    view = torch.stack([tensor, tensor], -1)[..., 1]
    assert view.numel() < 2 or not view.is_contiguous()
    return view


def assert_close(found, wanted, tolerance=1e-12):
    found, wanted = torch.as_tensor(found).double(), torch.as_tensor(wanted).double()
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    if wanted.numel():
        scale = max(wanted.abs().max().item(), 1e-30)
        assert (found - wanted).abs().max().item() <= tolerance * scale, (found, wanted)


def assert_as_good_as(found, plain, exact):
    """A float32 result's error is at most a small multiple of the reference's, or few roundings."""
    for number, (a, b, c) in enumerate(zip(found, plain, exact, strict=True)):
        assert a.dtype == torch.float32 and a.shape == c.shape
        if c.numel():
            error, own = [(x.double() - c).abs().max().item() for x in (a, b)]
            assert error <= 3 * own + 4 * 2 ** -24 * c.abs().max().item(), (number, error, own)


# ----------------------------------------------------------------------------------------- march

BOX = torch.tensor([[-1.0, -0.5, 0.0], [1.0, 1.5, 2.0]], dtype=F64)
FULL = torch.ones(4, 4, 4, dtype=torch.bool)


def slow_march(rays_o, rays_d, occupied, aabb, step, near=0.0, far=INF, jitter=None):
    """One ray, one step at a time, in Python floats."""
    starts, counts = [], []
    (low, high), size = aabb.tolist(), occupied.shape
    for r, (o, d) in enumerate(zip(rays_o.tolist(), rays_d.tolist())):
        t_in, t_out = near, far
        for axis in range(3):
            if d[axis] == 0:
                if not low[axis] <= o[axis] <= high[axis]:
                    t_out = -INF
            else:
                ends = [(bound[axis] - o[axis]) / d[axis] for bound in (low, high)]
                t_in, t_out = max(t_in, min(ends)), min(t_out, max(ends))
        k, count, shift = 0, 0, 0.0 if jitter is None else jitter[r].item()
        moves = any(d) and not any(map(math.isnan, d))
        while moves and t_in + (k + shift + 0.5) * step < t_out:
            t = t_in + (k + shift) * step
            at = [(o[a] + (t + step / 2) * d[a] - low[a]) / (high[a] - low[a]) for a in range(3)]
            cell = [min(max(math.floor(at[a] * size[a]), 0), size[a] - 1) for a in range(3)]
            if occupied[tuple(cell)]:
                starts.append(t)
                count += 1
            k += 1
        counts.append(count)
    return torch.tensor(starts, dtype=F64), counts


def rays(R, seed=0):
    """Origins around and inside the box, directions roughly towards it; some miss."""
    g = generator(seed)
    o = torch.randn(R, 3, generator=g, dtype=F64) * 2
    d = torch.randn(R, 3, generator=g, dtype=F64) * 0.8 + torch.tensor([0.0, 0.5, 1.0]) - o
    return o, torch.nn.functional.normalize(d, dim=1), torch.rand(5, 6, 7, generator=g) < 0.5


def check_march(backend, *inputs, **more):
    step = inputs[4]
    t_starts, t_ends, offsets, ray_indices = run(march, backend, *inputs, **more)
    starts, counts = slow_march(*inputs, **more)
    assert offsets.dtype == ray_indices.dtype == torch.int64
    assert offsets.tolist() == [0, *itertools.accumulate(counts)]
    assert ray_indices.tolist() == [r for r, count in enumerate(counts) for _ in range(count)]
    assert_close(t_starts, starts, 1e-13)
    assert_close(t_ends, starts + step, 1e-13)
    return counts


@over_plain
@pytest.mark.parametrize("R", [0, 1, 3, 13])
def test_march_is_the_slow_loop(backend, R):
    o, d, occupied = rays(R, seed=1)
    jitter = torch.rand(R, generator=generator(2), dtype=F64)
    for more in ({}, {"jitter": jitter}, {"near": 1.0, "far": 2.5, "jitter": jitter}):
        counts = check_march(backend, o, d, occupied, BOX, 0.083, **more)
    if R == 13:                                     # some 200 steps: several blocks of a program
        counts = check_march(backend, o, d, occupied, BOX, 0.011)
        assert max(counts) > 70 and min(counts) == 0


@over_plain
def test_march_special_rays(backend):
    """Parallel to axes inside and outside their slab, along a face, starting inside, with the box
    behind, without direction, not a number; also backwards from where they start."""
    o = torch.tensor([[-3, 0.1, 1], [-3, 2, 1], [0.3, 5, 1], [0.1, 0.2, 0.3], [-3, 0.1, 1],
                      [0.2, 0.2, 0.2], [0, 0, 1], [-3, -0.5, 1], [0.1, 0.1, -2]], dtype=F64)
    d = torch.tensor([[1, 0, 0], [1, 0, 0], [0, -1, 0], [0.6, 0, 0.8], [-1, 0, 0],
                      [0, 0, 0], [NAN, 0, 1], [1, 0, 0], [-0.0, 0.0, 1]], dtype=F64)
    assert check_march(backend, o, d, FULL, BOX, 0.3) == [7, 0, 7, 5, 0, 0, 0, 7, 7]
    counts = check_march(backend, o, d, FULL, BOX, 0.8)         # a middle at the exit is outside
    assert counts == [2, 0, 2, 2, 0, 0, 0, 2, 2]
    for far in (5.0, 1e10, INF):
        check_march(backend, o, d, FULL, BOX, 0.3, near=-9.0, far=far)


@over_plain
@pytest.mark.parametrize("length", [1e-3, 1e-9, 1e-30])
def test_march_refuses_short_directions(backend, length):
    """They would have millions of samples; half of a unit vector still passes."""
    o = torch.full((2, 3), 0.2, dtype=F64)
    d = torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=F64)
    assert check_march(backend, o, 0.5 * d, FULL, BOX, 0.3)[0] > 4
    d[1] *= length
    with pytest.raises(ValueError, match="rays_d.*unit directions"):
        run(march, backend, o, d, FULL, BOX, 0.3)
    assert len(run(march, backend, o, d, FULL, BOX, 0.3, far=2.0)[0])      # `far` keeps it short
    if backend == "triton":                         # with a budget nothing is raised, as none waits
        assert run(march, backend, o, d, FULL, BOX, 0.3, budget=9)[2].diff()[1] == 0


@over_plain
def test_march_float32(backend):
    """Bit-equal to the reference."""
    o, d, occupied = rays(41, seed=4)
    inputs = single((o, d, occupied, BOX, 0.05))
    found = run(march, backend, *inputs)
    assert all(map(torch.equal, found, march(*inputs, backend="reference")))


@over_plain
def test_march_with_a_budget(backend):
    """Bit-equal where it suffices; otherwise the samples beyond it are dropped and counted. Rows
    behind offsets[-1] are zeros, and composite gives them no weight and no gradient."""
    inputs = (*rays(13, seed=5), BOX, 0.083)
    exact = run(march, backend, *inputs)
    N, R = len(exact[0]), 13
    for budget in (0, 1, N // 2, N - 1, N, N + 40):
        *found, dropped = run(march, backend, *inputs, budget=budget)
        kept = min(N, budget)
        assert dropped == N - kept
        assert torch.equal(found[2], exact[2].clamp(max=budget))
        for number in (0, 1, 3):
            assert len(found[number]) == budget and not found[number][kept:].any()
            assert torch.equal(found[number][:kept], exact[number][:kept])
    t_starts, t_ends, offsets, _ = found
    sigmas, rgbs = randn(len(t_starts), seed=6).abs(), randn(len(t_starts), 3, seed=7)
    cotangents = cotangents_for(R, N + 40, 3)
    found = composite_all(backend, (sigmas, rgbs, t_starts, t_ends, offsets), cotangents)
    alone = [a[:N] for a in (sigmas, rgbs, t_starts, t_ends)]
    cotangents[3] = cotangents[3][:N]
    wanted = composite_all(backend, (*alone, offsets), cotangents)
    for a, b in zip(found, wanted):
        assert torch.equal(a[:len(b)], b) and not a[len(b):].any()


# ------------------------------------------------------------------------------------- composite

def samples(counts, C=3, seed=0, density=8.0):
    """Samples of rays with these counts, gaps between the intervals, numbers exact in float32:
    sigmas, rgbs, t_starts, t_ends, offsets."""
    g, N = generator(seed), sum(counts)
    draw = lambda *shape: torch.rand(*shape, generator=g).double()     # noqa: E731
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    t_starts = torch.tensor([k / 16 + 1 for n in counts for k in range(n)], dtype=F64)
    t_ends = t_starts + (1 + draw(N).mul(8).floor()) / 128
    return draw(N) * density, draw(N, C), t_starts, t_ends, offsets


def slow_composite(sigmas, rgbs, t_starts, t_ends, offsets, early_stop=0.0, cotangents=None):
    """Forward and gradient straight from the equations, ray by ray; every sum starts anew."""
    R, C, N = len(offsets) - 1, rgbs.shape[1], len(sigmas)
    out = [torch.zeros(s, dtype=F64) for s in ((R, C), (R,), (R,), (N,), (N,), (N, C))]
    rgb, opacity, depth, weights, d_sigmas, d_rgbs = out
    for r, (first, end) in enumerate(itertools.pairwise(offsets.tolist())):
        sigma, c, t0, t1 = (a[first:end] for a in (sigmas, rgbs, t_starts, t_ends))
        tau, t = sigma * (t1 - t0), (t0 + t1) / 2
        T = torch.stack([torch.exp(-tau[:i].sum()) for i in range(len(tau) + 1)])
        seen = T[:-1] >= early_stop
        w = seen * T[:-1] * -torch.expm1(-tau)
        rgb[r], opacity[r], depth[r], weights[first:end] = w @ c, w.sum(), w @ t, w
        if cotangents:
            d_rgb, d_opacity, d_depth, d_weights = cotangents
            g = c @ d_rgb[r] + d_opacity[r] + t * d_depth[r] + d_weights[first:end]
            later = torch.tensor([(g * w)[i + 1:].sum() for i in range(len(w))], dtype=F64)
            d_sigmas[first:end] = seen * (t1 - t0) * (g * T[1:] - later)
            d_rgbs[first:end] = w[:, None] * d_rgb[r]
    return out


def composite_all(backend, inputs, cotangents, early_stop=0.0):
    wrt = [a.detach().requires_grad_() for a in inputs[:2]]
    out = run(composite, backend, *wrt, *inputs[2:], early_stop=early_stop)
    gradients = grad(out, wrt, [b.to(a) for a, b in zip(out, cotangents)])
    return [*(a.detach() for a in out), *gradients]


def cotangents_for(R, N, C, seed=5):
    g = generator(seed)
    return [torch.randn(shape, generator=g).double() for shape in ((R, C), (R,), (R,), (N,))]


@over_plain
@pytest.mark.parametrize("counts,C,early_stop", [
    ([], 3, 0.0), ([0], 3, 0.0), ([1], 3, 0.0), ([0, 1, 0, 33, 0], 3, 0.0),
    ([31, 32, 33, 1, 64, 0, 3], 3, 0.0), ([2, 0, 40], 1, 0.0), ([2, 0, 40], 16, 0.0),
    ([5, 0, 70, 1], 3, 0.3)])
def test_composite_is_the_slow_loop(backend, counts, C, early_stop):
    inputs = samples(counts, C, seed=6)
    cotangents = cotangents_for(len(counts), sum(counts), C)
    wanted = slow_composite(*inputs, early_stop, cotangents)
    for a, b in zip(composite_all(backend, inputs, cotangents, early_stop), wanted):
        assert_close(a, b)
    if early_stop:                                  # something was hidden, and something not
        hidden = wanted[3] == 0
        assert 0 < hidden.sum() < len(hidden)
        assert not wanted[4][hidden].any() and not wanted[5][hidden].any()


@over_plain
@pytest.mark.parametrize("counts,C,density", [
    ([1025, 0, 1, 700], 3, 0.5), ([20] * 7, 4, 8.0), ([33, 5], 16, 50.0),
    ([64, 64, 1, 3, 128], 1, 1e-3)])
def test_composite_float32_is_as_good_as_pytorch(backend, counts, C, density):
    inputs = samples(counts, C, seed=7, density=density)
    cotangents = cotangents_for(len(counts), sum(counts), C)
    found = composite_all(backend, single(inputs), cotangents)
    plain = composite_all("reference", single(inputs), cotangents)
    assert_as_good_as(found, plain, composite_all("reference", inputs, cotangents))


@over_plain
@pytest.mark.parametrize("early_stop", [0.0, 0.6])
def test_composite_gradcheck(backend, early_stop):
    sigmas, rgbs, *rest = samples([0, 3, 0, 1, 2], C=2, seed=8, density=10.0)
    assert gradcheck(lambda s, c: run(composite, backend, s, c, *rest, early_stop=early_stop),
                     (sigmas.requires_grad_(), rgbs.requires_grad_()))
    times = [t.requires_grad_() for t in rest[:2]]              # these carry no gradient
    depth = run(composite, backend, sigmas, rgbs, *times, rest[2])[2].sum()
    assert torch.autograd.grad(depth, times, allow_unused=True) == (None, None)


@over_plain
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("tau", [1e3, 1e4, 1e30, INF])
def test_composite_opaque_surface_hides(backend, dtype, tau):
    """Nothing behind it counts or receives any gradient, in front all is as in exact arithmetic,
    and nowhere is inf - inf."""
    wall, behind = 5, slice(6, 40)
    sigmas, rgbs, t0, t1, offsets = samples([40, 3], seed=11, density=2.0)
    t1[wall] = t0[wall] + 1 / 32
    sigmas[wall] = min(tau * 32, torch.finfo(dtype).max)
    if tau == INF:                                  # sigma finite, sigma * delta not
        t0[wall + 1:] += 64
        t1[wall:] += 64
    inputs = [a.to(dtype) if a.is_floating_point() else a for a in (sigmas, rgbs, t0, t1, offsets)]
    assert tau != INF or (inputs[0] * (inputs[3] - inputs[2]))[wall] == INF
    cotangents = cotangents_for(2, 43, 3)
    found = composite_all(backend, inputs, cotangents)
    assert all(a.isfinite().all() for a in found)
    assert not any(a[behind].any() for a in found[3:]) and found[4][wall] == 0
    assert abs(found[1][0].item() - 1) < 1e-6
    wanted = slow_composite(sigmas.clamp(max=1e300), rgbs, t0, t1, offsets, 0.0, cotangents)
    for a, b in zip(found[3:], wanted[3:]):
        assert_close(a[:wall], b[:wall], 1e-5 if dtype == torch.float32 else 1e-12)


@over_plain
def test_composite_keeps_small_gradients(backend):
    """Behind a surface of optical depth 12, what is left is 6e-6 of the light. Its gradient still
    has float32's relative precision, which total minus prefix loses. So have weights of thin air,
    which 1 - exp(-tau) loses."""
    inputs = list(samples([60], seed=12, density=3.0))
    inputs[0][4] = 12 / (inputs[3] - inputs[2])[4]
    inputs[0][50:] = 1e-7
    inputs[0] = inputs[0].float().double()
    cotangents = cotangents_for(1, 60, 3)
    found = composite_all(backend, single(inputs), cotangents)
    for a, b in zip(found[3:], slow_composite(*inputs, 0.0, cotangents)[3:]):
        relative = ((a - b).abs() / b.abs().clamp(min=1e-30))[4:]
        assert relative.median() < 2e-6 and relative.max() < 2e-4


# ------------------------------------------------------ hash_encode, voxel_interp, triplane_interp

def slow_corners(p, cell):
    """The corners of a cell and their weights at p."""
    for corner in itertools.product((0, 1), repeat=3):
        v = [c + k for c, k in zip(cell, corner)]
        yield v, math.prod(1 - abs(a - b) for a, b in zip(p, v))


def slow_hash(x, table, levels):
    """Corner by corner with Python integers, hashing modulo 2^32 as the paper does."""
    out = torch.zeros(len(x), len(levels.sizes), table.shape[1], dtype=F64)
    for n, point in enumerate(x.tolist()):
        for l, (res, size, first) in enumerate(zip(*levels[:3])):
            p = [min(max(v, 0.0), 1.0) * res for v in point]
            for v, w in slow_corners(p, [min(math.floor(v), res - 1) for v in p]):
                row = v[0] + v[1] * (res + 1) + v[2] * (res + 1) ** 2
                if not levels.dense[l]:
                    row = v[0] ^ v[1] * 2654435761 % 2 ** 32 ^ v[2] * 805459861 % 2 ** 32
                out[n, l] += w * table[first + row % size]
    return out.flatten(1)


def slow_voxel(x, links, values, mask=None):
    out = torch.zeros(len(x), values.shape[1], dtype=F64)
    for n, point in enumerate(x.tolist()):
        p = [min(max(v, 0.0), size - 1.0) for v, size in zip(point, links.shape)]
        for v, w in slow_corners(p, [min(math.floor(v), m - 2) for v, m in zip(p, links.shape)]):
            if links[tuple(v)] >= 0:
                out[n] += w * values[links[tuple(v)]]
    return out


AXES = ((0, 1), (0, 2), (1, 2))             # along columns and rows of the planes xy, xz, yz


def slow_triplane(x, planes):
    """A texel is a tent around its centre, 1 there and 0 one texel further away; every position
    meets every texel."""
    (B, N, _), (_, _, H, W, F) = x.shape, planes.shape
    out = torch.zeros(B, N, F, dtype=F64)

    def tent(at, i, size):
        return max(0.0, 1 - abs(at - ((2 * i + 1) / size - 1)) * size / 2)
    for b, n, plane in itertools.product(range(B), range(N), range(3)):
        across, down = (x[b, n, axis].item() for axis in AXES[plane])
        for row, col in itertools.product(range(H), range(W)):
            w = tent(across, col, W) * tent(down, row, H)
            if w > 0:
                out[b, n] += w * planes[b, plane, row, col]
    return out


MIXED = hash_levels(4, 3, 40, 9)            # two dense levels, two hashed


def hash_problem(N, F, seed, margin=0.05):
    """Positions a little outside the unit cube too, exact in float32."""
    x = torch.rand(N, 3, generator=generator(seed)) * (1 + 2 * margin) - margin
    return [x.double(), randn(MIXED.offsets[-1], F, seed=seed + 1), MIXED]


def voxel_problem(N, F, seed, shape=(5, 3, 4), fill=0.4):
    """Positions also outside; a share of the points has a row, in shuffled order; two rows have no
    owner. fill 0: values has no row at all."""
    g = generator(seed)
    x = torch.rand(N, 3, generator=g) * (torch.tensor(shape) + 0.5) - 0.75
    exists = torch.rand(shape, generator=g) < fill
    M = int(exists.sum()) + 2 * (fill > 0)
    links = torch.randint(-5, 0, shape, generator=g).int()
    links[exists] = torch.randperm(M, generator=g)[:int(exists.sum())].int()
    return [x.double(), links, randn(M, F, seed=seed + 1)]


def triplane_problem(N, F, seed, B=2, H=4, W=5, reach=1.3):
    x = (torch.rand(B, N, 3, generator=generator(seed)) * 2 - 1) * reach
    return [x.double(), randn(B, 3, H, W, F, seed=seed + 1)]


# operation: function, slow loop, inputs for N positions and F features, number of the table
LOOKUPS = {"hash": (hash_encode, slow_hash, hash_problem, 1),
           "voxel": (voxel_interp, slow_voxel, voxel_problem, 2),
           "triplane": (triplane_interp, slow_triplane, triplane_problem, 1)}
over_lookups = pytest.mark.parametrize("name", LOOKUPS)


def lookup(name, backend, inputs, cotangent=None, **more):
    """Output, and gradient to the table."""
    function, _, _, number = LOOKUPS[name]
    inputs = list(inputs)
    inputs[number] = inputs[number].detach().requires_grad_()
    out = run(function, backend, *inputs, **more)
    assert out.dtype == inputs[number].dtype
    if cotangent is None:
        cotangent = randn(*out.shape, seed=99)
    return [out.detach(), grad(out, inputs[number], cotangent.to(out))[0]]


def check_lookup(name, backend, inputs, tolerance=1e-13):
    """Against the slow loop. The output is linear in the table, so that its gradient is checked by
    the slow loop too: <d_table, other> = <cotangent, slow(other)>."""
    _, slow, _, number = LOOKUPS[name]
    out, d_table = lookup(name, backend, inputs)
    assert_close(out, slow(*inputs), tolerance)
    inputs = list(inputs)
    for seed in (1, 2):
        inputs[number] = randn(*d_table.shape, seed=seed)
        wanted = (randn(*out.shape, seed=99) * slow(*inputs)).sum()
        assert abs((d_table * inputs[number]).sum() - wanted) <= 1e-10 * max(1, abs(wanted))


@over_lookup
@over_lookups
@pytest.mark.parametrize("N,F", [(0, 2), (1, 4), (5, 1), (33, 3), (13, 28)])
def test_lookup_is_the_slow_loop(backend, name, N, F):
    check_lookup(name, backend, LOOKUPS[name][2](N, F, seed=20))


@over_lookup
def test_lookup_is_the_slow_loop_at_special_places(backend):
    """Corners and middle of the box, outside it, small and odd tables, several programs."""
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5], [-3, 0.2, 7], [0.5, 0.5, 0.5]])
    x, table, _ = hash_problem(140, 2, seed=21)
    x[:5] = corners
    check_lookup("hash", backend, (x, table, MIXED))
    fine = hash_levels(3, 1024, 4096, 12)           # the hash's products exceed 32 bits
    check_lookup("hash", backend, (x[:20], randn(fine.offsets[-1], 2, seed=22), fine), 1e-12)
    for shape, fill in (((2, 2, 2), 1.0), ((9, 2, 5), 1.0), ((3, 7, 2), 0.1), ((4, 4, 3), 0.0)):
        x, links, values = voxel_problem(140, 3, 23, shape, fill)
        x[:5] = corners * (torch.tensor(shape) - 1)
        check_lookup("voxel", backend, (x, links, values))
    for B, H, W in ((0, 2, 2), (1, 1, 1), (3, 2, 3), (1, 4, 7)):
        x, planes = triplane_problem(140 if W == 3 else 9, 3, 24, B, H, W)
        x[:, :5] = corners * 2 - 1
        x[:, 5] = torch.tensor([1 / W - 1, 1 / H - 1, 1 - 1 / H])          # a texel's centre
        x[:, 6] = torch.tensor([1 + 1 / W, 0, -1 - 1 / W])                 # where fading ends
        check_lookup("triplane", backend, (x, planes))


@over_lookup
@over_lookups
@pytest.mark.parametrize("N,F", [(200, 4), (130, 28)])
def test_lookup_float32_is_as_good_as_pytorch(backend, name, N, F):
    inputs = LOOKUPS[name][2](N, F, seed=26)
    exact, plain = lookup(name, "reference", inputs), lookup(name, "reference", single(inputs))
    assert_as_good_as(lookup(name, backend, single(inputs)), plain, exact)


@over_lookup
@over_lookups
def test_lookup_passes_nan_on(backend, name):
    """A position that is not a number shows in the result, also next to one far outside and in
    empty space, and reads nothing outside the table. An infinite one counts as outside."""
    for more in [{"fill": 0.0}, {"fill": 0.5}] if name == "voxel" else [{}]:
        inputs = LOOKUPS[name][2](5, 2, seed=27, **more)
        inputs[0][..., 1, 2], inputs[0][..., 3, 1] = NAN, NAN
        inputs[0][..., 2, 0], inputs[0][..., 3, 0] = INF, -INF
        out = run(LOOKUPS[name][0], backend, *inputs)
        assert out[..., [1, 3], :].isnan().all() and out[..., [0, 2, 4], :].isfinite().all()


@over_lookup
def test_views(backend):
    """Inputs and cotangents that are not contiguous or expanded give the same results."""
    for name, (_, _, problem, number) in LOOKUPS.items():
        inputs = problem(9, 3, seed=31)
        views = [strided(a) if isinstance(a, torch.Tensor) else a for a in inputs]
        ones = torch.tensor(2.0).expand(lookup(name, backend, inputs)[0].shape)
        for a, b in zip(lookup(name, backend, views, ones), lookup(name, backend, inputs, ones)):
            assert_close(a, b, 1e-14)


@over_lookup
@pytest.mark.parametrize("name", ["voxel", "triplane"])
def test_lookup_carries_no_gradient_to_x(backend, name):
    x, *rest = LOOKUPS[name][2](7, 2, seed=30)
    assert not run(LOOKUPS[name][0], backend, x.requires_grad_(), *rest).requires_grad


@over_plain
def test_views_of_rays_and_samples(backend):
    o, d, occupied = rays(6, seed=3)
    shift = torch.tensor(0.25, dtype=F64).expand(6)
    views = strided(o), d[:1].expand(6, 3), occupied.permute(2, 1, 0), BOX, 0.07, 0.0, INF, shift
    alone = [a.clone(memory_format=torch.contiguous_format) if isinstance(a, torch.Tensor) else a
             for a in views]
    found, wanted = (run(march, backend, *inputs) for inputs in (views, alone))
    assert len(found[0]) and all(map(torch.equal, found, wanted))
    sigmas, rgbs, *rest = samples([6, 0, 9], seed=13)
    rgbs = rgbs[:1].expand(15, 3)
    ones = [torch.tensor(2.0).expand(shape) for shape in ((3, 3), (3,), (3,), (15,))]
    views = strided(sigmas), rgbs, *map(strided, rest)
    alone = sigmas, rgbs.clone(), *rest
    for a, b in zip(composite_all(backend, views, ones), composite_all(backend, alone, ones)):
        assert_close(a, b, 1e-14)


def test_hash_levels():
    assert MIXED == ((3, 7, 16, 40), (64, 512, 512, 512), (0, 64, 576, 1088, 1600),
                     (True, True, False, False))
    ngp = hash_levels(16, 16, 4096, 19)
    assert ngp.resolutions[:2] == (16, 23) and ngp.resolutions[-1] == 4096
    assert hash_levels(1, 8, 8, 4) == ((8,), (16,), (0, 16), (False,))
    assert hash_levels(2, 4, 9, 4).resolutions == (4, 9)
    for wrong in ((0, 16, 32, 10), (4, 0, 32, 10), (4, 64, 32, 10), (4, 16, 32, 31)):
        with pytest.raises(ValueError, match="hash_levels"):
            hash_levels(*wrong)


@over_lookup
def test_hash_gradient_of_positions(backend):
    """Against central differences of the slow loop, hashed levels too; 0 outside the cube, axis by
    axis. The table wants no gradient here."""
    x, table, _ = hash_problem(12, 2, seed=24, margin=0.3)
    cotangent, h = randn(12, 8, seed=25), 1e-7
    wanted = torch.zeros_like(x)
    for axis, e in enumerate(torch.eye(3, dtype=F64) * h):
        slopes = (slow_hash(x + e, table, MIXED) - slow_hash(x - e, table, MIXED)) / (2 * h)
        wanted[:, axis] = (slopes * cotangent).sum(1)
    x.requires_grad_()
    d_x, = grad(run(hash_encode, backend, x, table, MIXED), x, cotangent)
    outside = (x < 0) | (x > 1)
    assert outside.any() and not d_x[outside].any() and d_x[~outside].all()
    assert_close(d_x, wanted, 1e-6)


@over_lookup
def test_voxel_mask(backend):
    """Rows outside receive exactly nothing, rows inside what they would without it; the output does
    not change."""
    inputs = voxel_problem(60, 4, seed=45)
    mask = torch.rand(len(inputs[2]), generator=generator(46)) < 0.3
    out, d_values = lookup("voxel", backend, inputs)
    for which in (mask, strided(~mask), torch.zeros_like(mask), torch.ones_like(mask)):
        masked_out, masked = lookup("voxel", backend, inputs, mask=which)
        assert torch.equal(masked_out, out) and not masked[~which].any()
        assert_close(masked[which], d_values[which], 1e-14)
    assert mask.any() and d_values[mask].any() and d_values[~mask].any()


@over_lookup
def test_voxel_links_beyond_values(backend):
    """An error on the CPU; in the kernels nothing, and nothing read or written outside."""
    x, links, values = voxel_problem(5, 4, 58, (2, 2, 2), 1.0)
    links[:] = 2 ** 30
    mask = torch.ones(len(values), dtype=torch.bool)
    if backend == "triton":
        assert not any(a.any() for a in lookup("voxel", backend, (x, links, values, mask)))
    else:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds|range|Expected idx"):
            run(voxel_interp, backend, x, links, values)


# ------------------------------------------------------------------------------ errors and choices

GOOD = {
    march: dict(rays_o=torch.zeros(2, 3), rays_d=torch.ones(2, 3),
                occupied=torch.ones(2, 2, 2, dtype=torch.bool), aabb=torch.eye(2, 3), step=0.1),
    composite: dict(sigmas=torch.ones(4), rgbs=torch.ones(4, 3), t_starts=torch.zeros(4),
                    t_ends=torch.ones(4), offsets=torch.tensor([0, 4])),
    hash_encode: dict(x=torch.ones(4, 3), table=torch.ones(MIXED.offsets[-1], 2), levels=MIXED),
    voxel_interp: dict(x=torch.ones(4, 3), links=torch.zeros(2, 3, 2).int(),
                       values=torch.ones(5, 4), mask=torch.ones(5, dtype=torch.bool)),
    triplane_interp: dict(x=torch.ones(2, 4, 3), planes=torch.ones(2, 3, 4, 5, 2))}
WRONG = {
    march: [("rays_o", torch.zeros(2, 2)), ("rays_d", torch.zeros(3, 3)), ("step", 0.0),
            ("step", NAN), ("occupied", torch.ones(2, 2, 2)), ("jitter", torch.zeros(3)),
            ("aabb", torch.zeros(6)), ("aabb", [[0, 0, 0], [1, 1, 1]])],
    composite: [("sigmas", [1.0]), ("sigmas", torch.ones(4).long()), ("rgbs", torch.ones(5, 3)),
                ("rgbs", torch.ones(4, 0)), ("t_starts", torch.zeros(4, device="meta")),
                ("t_ends", torch.ones(4).double()), ("offsets", torch.tensor([0, 4]).int()),
                ("offsets", torch.tensor([0, 5])), ("offsets", torch.tensor([0, 3, 2, 4])),
                ("offsets", torch.tensor([1, 4])), ("offsets", torch.zeros(0).long()),
                ("backend", "fast"), ("backend", "torch")],
    hash_encode: [("x", torch.ones(4, 2)), ("table", torch.ones(10, 2)), ("backend", "cuda")],
    voxel_interp: [("x", torch.ones(4, 3).long()), ("links", torch.zeros(2, 3, 2)),
                   ("links", torch.zeros(2, 1, 2).int()), ("values", torch.ones(5, 0)),
                   ("mask", torch.ones(5)), ("mask", torch.ones(4, dtype=torch.bool))],
    triplane_interp: [("x", torch.ones(3, 4, 3)), ("planes", torch.ones(2, 2, 4, 5, 2)),
                      ("planes", torch.ones(2, 3, 0, 5, 2))]}


@pytest.mark.parametrize("function", WRONG, ids=lambda function: function.__name__)
def test_wrong_input_is_one_clear_line(function):
    for name, value in WRONG[function]:
        with pytest.raises(ValueError) as error:
            function(**{**GOOD[function], name: value})
        message = str(error.value)
        assert (name in message or "wanted" in message) and "\n" not in message, message


@only_plain
def test_triton_backend_on_cpu_tensors_says_why_not():
    for function, good in GOOD.items():
        function(**good)                                    # auto finds something that runs
        with pytest.raises(RuntimeError, match="CUDA|Triton cannot be imported"):
            function(**good, backend="triton")


@only_plain
def test_import_without_triton():
    """As on macOS and Windows."""
    code = ("import sys; sys.modules['triton'] = None\nimport torch, kernels\n"
            "one, ray = torch.ones(1), torch.tensor([0, 1])\n"
            "inputs = one, torch.ones(1, 3), 0 * one, one, ray\nkernels.composite(*inputs)\n"
            "try: kernels.composite(*inputs, backend='triton')\n"
            "except RuntimeError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Triton cannot be imported" in done.stdout, done.stderr


@only_plain
def test_check_and_time(monkeypatch, capsys):
    """`python kernels.py`: a row for every operation and backend; what is wrong is not timed."""
    command = [sys.executable, "kernels.py", "--rays", "4", "--seconds", "0.01"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = [line.split(" | ") for line in done.stdout.splitlines()[4:]]
    assert all(row[2].strip(" |") == ("-" if row[1] == "reference" else "ok") for row in rows)
    assert len(rows) == (8 if kernels.NO_TRITON else 13)
    right = kernels._HashTorch.backward
    monkeypatch.setattr(kernels._HashTorch, "backward", staticmethod(
        lambda ctx, d_out: (right(ctx, d_out)[0], right(ctx, d_out)[1] * 1.001, None)))
    assert kernels.check("hash_encode", "torch", 4, "cpu").startswith("result 2 is off")


# ------------------------------------------------------------------------------------ the kernels

needs_triton = pytest.mark.skipif(bool(kernels.NO_TRITON) or INTERPRET, reason="no Triton compiler")


@needs_triton
def test_interpreter():
    """Every test above that takes a backend, for the kernels, on the CPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore",
               "-k", "triton and not why_not and not without", str(Path(__file__).resolve())]
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert not re.search("failed|skipped", done.stdout.splitlines()[-1])


class NoGPU:
    """What Triton asks of a driver before it compiles."""
    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability                              # so that targets do not share a cache

    def get_current_stream(self, device):
        return 0


class Recorder:
    """Stands for a kernel: a launch compiles it for these very arguments, and does not run it."""
    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*inputs, **options):
            compiled = self.kernel.run(*inputs, grid=grid, warmup=True, **options)
            self.launches.append((self.kernel.__name__, inputs, compiled))
            if self.kernel.__name__ == "_march_kernel":     # the counting pass: a sample a ray
                inputs[5][1:] = 1
        return launch


@pytest.fixture
def launches(monkeypatch):
    """A list that fills with (kernel's name, arguments, compiled code)."""
    found = []
    for name, kernel in vars(kernels).copy().items():
        if getattr(kernel, "do_not_specialize", None):      # not the functions that kernels call
            monkeypatch.setattr(kernels, name, Recorder(kernel, found))
    monkeypatch.setattr(kernels, "_backend", lambda *which: "triton")
    yield found
    kernels.triton.runtime.driver._active = None


def launch_everything(R=33, every_shape=False):
    """Call the operations with sizes of the scripts' presets, at least the first of each."""
    sizes = [((128, 128, 128), 3, (8, 4), 28, 32)]
    if every_shape:
        sizes += [((97, 50, 33), 1, (16, 2), 13, 12), ((32, 32, 32), 8, (6, 4), 1, 12),
                  ((512, 512, 128), 4, (5, 2), 4, 32)]
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    directions = torch.nn.functional.normalize(torch.ones(R, 3), dim=1)
    for grid, C, (L, F), F_voxel, F_planes in sizes:
        occupied = torch.ones(1, dtype=torch.bool).expand(grid)
        inputs = directions, directions, occupied, box, 0.01
        t_starts, t_ends, offsets, _ = march(*inputs)
        march(*inputs, jitter=torch.zeros(R), budget=2 * R)
        x = torch.zeros(len(t_starts), 3, requires_grad=True)
        rgbs = torch.zeros(len(t_starts), C, requires_grad=True)
        out = composite(rgbs[:, 0], rgbs, t_starts, t_ends, offsets)
        sum(a.sum() for a in out).backward()
        levels = hash_levels(L, 16, 256, 10)
        table = torch.zeros(levels.offsets[-1], F, requires_grad=True)
        hash_encode(x, table, levels).sum().backward()
        values = torch.zeros(R, F_voxel, requires_grad=True)
        links = torch.zeros(grid[0], 3, grid[2]).int()
        voxel_interp(x, links, values).sum().backward()
        voxel_interp(x, links, values, torch.ones(R, dtype=torch.bool)).sum().backward()
        planes = torch.zeros(2, 3, 64, 64, F_planes, requires_grad=True)
        triplane_interp(x.expand(2, -1, 3), planes).sum().backward()


def narrow_offsets(ttir):
    """Lines of Triton's intermediate code that compute a 32-bit integer from R, N, M or the first
    program number, which grows with them. An offset must be 64 bits wide from there on."""
    grows, found = {"%R", "%N", "%M"}, []
    for line in ttir.splitlines():
        match = re.match(r"\s*(%[\w]+)(?::\d+)? = ([\w.]+) (.*?)( loc\(.*)?$", line)
        if not match:
            continue
        result, operation, rest, _ = match.groups()
        if operation == "tt.get_program_id" and rest.startswith("x"):
            grows.add(result)
        elif operation not in ("tt.load", "arith.cmpi") and grows & set(re.findall(r"%\w+", rest)):
            grows.add(result)
            if operation in ("arith.addi", "arith.muli") and re.search(r"i32>?$", rest):
                found.append(line.strip())
    return found


def disassemble(compiled, folder):
    tool = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
    usage, sass = (subprocess.run([tool, flag, folder / "kernel.cubin"], capture_output=True,
                                  text=True, check=True).stdout
                   for flag in ("--dump-resource-usage", "-sass"))
    number = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return number["REG"], number["STACK"] + number["LOCAL"], sass


EVERY = os.environ.get("NERF_EVERY_SHAPE") == "1"           # every shape and target: five minutes


@needs_triton
@pytest.mark.parametrize("capability", [80, 90, 100] if EVERY else [90])
def test_compiled_kernels(launches, capability, tmp_path):
    """No spills; no 32-bit offsets; no approximate division or logarithm where rounding matters;
    rows are read and added in as wide a piece as they allow."""
    kernels.triton.runtime.driver.set_active(NoGPU(capability))
    launch_everything(every_shape=EVERY)
    codes = {id(compiled): (name, inputs, compiled) for name, inputs, compiled in launches}
    assert len({name for name, _, _ in launches}) == 7
    for name, inputs, compiled in codes.values():
        registers, local, sass = disassemble(compiled, tmp_path)
        assert local == 0 and not re.search(r"\b(LDL|STL)\b", sass), name
        assert registers <= 128, (name, registers)
        assert not narrow_offsets(compiled.asm["ttir"]), name
        assert compiled.metadata.enable_fp_fusion == (name != "_march_kernel")
        if name.startswith(("_march", "_composite")):
            inexact = r"div\.(full|approx)|rcp\.approx|lg2\.approx"
            assert not re.search(inexact, compiled.asm["ptx"]), name
        if name in ("_hash_kernel", "_voxel_kernel", "_triplane_kernel"):
            F, backward = inputs[-4], inputs[-1]
            width = 4 if F % 4 == 0 else 2 if F % 2 == 0 else 1
            load = {4: "LDG.E.128", 2: "LDG.E.64", 1: "LDG.E"}[width]
            add = f"F32x{width}" if width > 1 and capability >= 90 else "RED[G.\\w]*ADD.F32"
            assert re.search(add if backward else load, sass), (name, F, backward)


@needs_triton
def test_sizes_that_change_do_not_compile_anew(launches):
    kernels.triton.runtime.driver.set_active(NoGPU(90))
    for R in (33, 1, 16):
        launch_everything(R)
        if R == 33:
            compiled = {id(code) for _, _, code in launches}
    assert compiled == {id(code) for _, _, code in launches}


@pytest.mark.skipif(not CUDA or INTERPRET, reason="no CUDA device")
def test_cuda_at_full_size():
    for name in kernels._cases(4, torch.float32, "cuda"):
        assert kernels.check(name, "triton", 20000, "cuda") == "ok"
