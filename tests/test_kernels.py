"""Tests of kernels.py. Every operation is compared with a slow loop in Python floats that shares no code with it.

The Triton kernels take the same tests as the PyTorch functions. Where there is a CUDA device they run on it; in any case test_interpreter runs
this file again, in a process of its own with TRITON_INTERPRET=1, where the same kernels run on the CPU (the variable must be set before Triton
is imported, and nothing else should see it).
"""
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import grad, gradcheck

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
from kernels import composite, hash_encode, hash_levels, march, triplane_interp, voxel_interp  # noqa: E402

INTERPRET, CUDA = kernels.INTERPRET, torch.cuda.is_available()
if INTERPRET:
    PLAIN, HASH = ["triton"], ["triton"]
else:
    PLAIN = ["reference"] + ["triton"] * (CUDA and not kernels.NO_TRITON)
    HASH = ["reference", "torch"] + ["triton"] * (CUDA and not kernels.NO_TRITON)
over_plain, over_hash = pytest.mark.parametrize("backend", PLAIN), pytest.mark.parametrize("backend", HASH)
F64, INF, NAN = torch.float64, math.inf, math.nan


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fresh memory is full of NaN in every test: what a kernel forgets to write cannot pass for a zero."""
    def poison(make):
        def made(*args, **kwargs):
            fresh = make(*args, **kwargs)
            return fresh.fill_(NAN) if fresh.is_floating_point() else fresh.fill_(-(2 ** 30)) if fresh.dtype == torch.int64 else fresh
        return made
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


def device(backend):
    return "cuda" if backend == "triton" and not INTERPRET else "cpu"


def generator(seed):
    return torch.Generator().manual_seed(seed)


def run(function, backend, *inputs, **more):
    """Call on the backend's device; results back on the CPU. Gradients flow through both moves."""
    move = lambda a: a.to(device(backend)) if isinstance(a, torch.Tensor) else a        # noqa: E731
    out = function(*map(move, inputs), backend=backend, **{key: move(value) for key, value in more.items()})
    return tuple(a.cpu() for a in out) if isinstance(out, tuple) else out.cpu()


def assert_close(found, wanted, tolerance=1e-12):
    found, wanted = torch.as_tensor(found), torch.as_tensor(wanted)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    scale = wanted.abs().max().item() if wanted.numel() else 0.0
    error = (found.double() - wanted.double()).abs().max().item() if wanted.numel() else 0.0
    assert error <= tolerance * max(scale, 1e-30), (error, scale)


def assert_as_good_as(found, plain, exact, what=""):
    """The error of a float32 result against float64 is at most a small multiple of the float32 reference's own, or a few roundings."""
    for number, (a, b, c) in enumerate(zip(found, plain, exact)):
        assert a.dtype == torch.float32 and a.shape == c.shape
        if c.numel():
            scale = c.abs().max().item()
            error, own = (a.double() - c).abs().max().item(), (b.double() - c).abs().max().item()
            assert error <= 3 * own + 4 * 2 ** -24 * scale, (what, number, error, own, scale)


# ------------------------------------------------------------------------------------------------------------------------------ march
BOX = torch.tensor([[-1.0, -0.5, 0.0], [1.0, 1.5, 2.0]], dtype=F64)


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
                ends = [(low[axis] - o[axis]) / d[axis], (high[axis] - o[axis]) / d[axis]]
                t_in, t_out = max(t_in, min(ends)), min(t_out, max(ends))
        k, count, shift = 0, 0, 0.0 if jitter is None else jitter[r].item()
        while any(d) and not any(map(math.isnan, d)) and t_in + (k + shift + 0.5) * step < t_out:
            t = t_in + (k + shift) * step
            cell = [min(max(math.floor((o[a] + (t + step / 2) * d[a] - low[a]) / (high[a] - low[a]) * size[a]), 0), size[a] - 1) for a in range(3)]
            if occupied[tuple(cell)]:
                starts.append(t)
                count += 1
            k += 1
        counts.append(count)
    return starts, counts


def rays(R, seed=0, dtype=F64):
    """Origins around and inside the box, directions roughly towards it; some miss."""
    g = generator(seed)
    o = torch.randn(R, 3, generator=g, dtype=dtype) * 2
    d = torch.randn(R, 3, generator=g, dtype=dtype) * 0.8 + torch.tensor([0.0, 0.5, 1.0], dtype=dtype) - o
    return o, torch.nn.functional.normalize(d, dim=1), torch.rand(5, 6, 7, generator=g) < 0.5


def check_march(backend, o, d, occupied, aabb, step, **more):
    t_starts, t_ends, offsets, ray_ids = run(march, backend, o, d, occupied, aabb, step, **more)
    starts, counts = slow_march(o, d, occupied, aabb, step, **more)
    assert offsets.dtype == ray_ids.dtype == torch.int64 and t_starts.dtype == t_ends.dtype == o.dtype
    assert offsets.tolist() == [0, *itertools.accumulate(counts)]
    assert ray_ids.tolist() == [r for r, count in enumerate(counts) for _ in range(count)]
    assert_close(t_starts, torch.tensor(starts, dtype=F64), 1e-13)
    assert_close(t_ends, torch.tensor(starts, dtype=F64) + step, 1e-13)
    return counts


@over_plain
@pytest.mark.parametrize("R", [0, 1, 3, 13])
def test_march_is_the_slow_loop(backend, R):
    o, d, occupied = rays(R, seed=1)
    jitter = torch.rand(R, generator=generator(2), dtype=F64)
    for more in ({}, {"jitter": jitter}, {"near": 1.0, "far": 2.5, "jitter": jitter}):
        counts = check_march(backend, o, d, occupied, BOX, 0.083, **more)
    if R == 13:
        counts = check_march(backend, o, d, occupied, BOX, 0.011)       # some 200 steps: several blocks of the lattice
        assert max(counts) > 70 and min(counts) == 0                    # some miss the box


@over_plain
def test_march_special_rays(backend):
    """Parallel to axes inside and outside their slab, along a face, starting inside, box behind, no direction, not a number."""
    o = torch.tensor([[-3, 0.1, 1], [-3, 2, 1], [0.3, 5, 1], [0.1, 0.2, 0.3], [-3, 0.1, 1], [0.2, 0.2, 0.2], [0, 0, 1], [-3, -0.5, 1], [0.1, 0.1, -2]], dtype=F64)
    d = torch.tensor([[1, 0, 0], [1, 0, 0], [0, -1, 0], [0.6, 0, 0.8], [-1, 0, 0], [0, 0, 0], [NAN, 0, 1], [1, 0, 0], [-0.0, 0.0, 1]], dtype=F64)
    counts = check_march(backend, o, d, torch.ones(4, 4, 4, dtype=torch.bool), BOX, 0.3)
    assert counts == [7, 0, 7, 5, 0, 0, 0, 7, 7]
    check_march(backend, o, d, torch.ones(4, 4, 4, dtype=torch.bool), BOX, 0.3, near=-9.0)     # also backwards from where they start


@over_plain
@pytest.mark.parametrize("far", [5.0, 1e10, INF])
def test_march_gives_no_samples_where_there_is_no_direction(backend, far):
    """From inside the box; the ray beside it has as many samples as with any `far`."""
    o, d = torch.tensor([[0.2, 0.2, 0.2]] * 2, dtype=F64), torch.tensor([[0, -0.0, 0], [1, 0, 0]], dtype=F64)
    grid = torch.ones(4, 4, 4, dtype=torch.bool)
    assert check_march(backend, o, d, grid, BOX, 0.3, far=far, near=-3.0) == [0, 7]


@over_plain
@pytest.mark.parametrize("length", [1e-3, 1e-9, 1e-30])
def test_march_refuses_short_directions(backend, length):
    """They would have millions of samples; a half of a unit vector still passes."""
    o, d = torch.tensor([[0.2, 0.2, 0.2]] * 2, dtype=F64), torch.tensor([[1.0, 0, 0], [0, 0, 1]], dtype=F64)
    grid = torch.ones(4, 4, 4, dtype=torch.bool)
    assert check_march(backend, o, 0.5 * d, grid, BOX, 0.3)[0] > 4
    d[1] *= length
    with pytest.raises(ValueError, match="rays_d.*unit directions"):
        run(march, backend, o, d, grid, BOX, 0.3)
    assert len(run(march, backend, o, d, grid, BOX, 0.3, far=2.0)[0])              # `far` keeps it short


@over_plain
def test_march_by_hand(backend):
    """Box one wide, ray along x from its left face, step 0.4: middles 0.2, 0.6, and 1.0, which no longer lies before the exit."""
    args = torch.zeros(1, 3) + torch.tensor([0.0, 0.5, 0.5]), torch.tensor([[1.0, 0, 0]])
    box = torch.tensor([[0.0, 0, 0], [1, 1, 1]])
    t_starts, t_ends, offsets, _ = run(march, backend, *args, torch.ones(1, 1, 1, dtype=torch.bool), box, 0.4)
    assert_close(t_starts, torch.tensor([0.0, 0.4]), 1e-6), assert_close(t_ends, torch.tensor([0.4, 0.8]), 1e-6)
    grid = torch.tensor([False, False, True, False]).view(4, 1, 1)                     # x order: only [0.5, 0.75) is occupied
    assert_close(run(march, backend, *args, grid, box, 0.1)[0], torch.tensor([0.5, 0.6]), 1e-6)
    assert run(march, backend, *args, torch.zeros(2, 2, 2, dtype=torch.bool), box, 0.1)[2].tolist() == [0, 0]


@pytest.mark.skipif(INTERPRET, reason="about the PyTorch path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_every_float_type_is_kept(dtype):
    """Low precision is no use for positions, but what goes in comes out."""
    o, d, occupied = rays(9, seed=50)
    t0, t1, offsets, _ = march(o.to(dtype), d.to(dtype), occupied, BOX, 0.3)
    x, table = torch.rand(len(t0), 3).to(dtype).requires_grad_(), torch.rand(MIXED.offsets[-1], 4).to(dtype).requires_grad_()
    for backend in ("reference", "torch"):
        feature = hash_encode(x, table, MIXED, backend=backend)
        out = composite(feature[:, 0], feature[:, 1:4], t0, t1, offsets)
        assert len(t0) and {a.dtype for a in (t0, t1, feature, *out, *grad(out[0].sum(), (x, table)))} == {dtype}


@over_plain
def test_march_of_views(backend):
    """Sliced rays, expanded directions and jitter, a transposed grid."""
    o, d, occupied = rays(12, seed=3)
    grid, shift = occupied.permute(2, 1, 0), torch.tensor(0.25, dtype=F64).expand(6)
    found = run(march, backend, o[::2], d[:1].expand(6, 3), grid, BOX, 0.07, jitter=shift)
    wanted = run(march, backend, o[::2].clone(), d[:1].repeat(6, 1), grid.contiguous(), BOX, 0.07, jitter=shift.clone())
    assert len(found[0]) and all(map(torch.equal, found, wanted))


@over_plain
def test_march_float32(backend):
    """Bit-equal to the reference; against float64 only rays that graze a face may differ."""
    o, d, occupied = rays(41, seed=4)
    found = run(march, backend, o.float(), d.float(), occupied, BOX.float(), 0.05)
    assert all(map(torch.equal, found, march(o.float(), d.float(), occupied, BOX.float(), 0.05, backend="reference")))
    assert (found[2].diff() != march(o, d, occupied, BOX, 0.05)[2].diff()).double().mean() < 0.1


# -------------------------------------------------------------------------------------------------------------------------- composite
def samples(counts, C=3, seed=0, density=8.0):
    """float64 samples of rays with these counts, with gaps between the intervals: sigmas, rgbs, t_starts, t_ends, offsets."""
    g, N = generator(seed), sum(counts)
    draw = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float32).to(F64)      # noqa: E731  (exact in float32 too)
    offsets = torch.tensor([0, *itertools.accumulate(counts)])
    t_starts = (torch.cat([torch.arange(n) for n in counts]) if counts else torch.zeros(0)).double() / 16 + 1
    t_ends = t_starts + (1 + draw(N).mul(8).floor()) / 128
    return draw(N) * density, draw(N, C), t_starts, t_ends, offsets


def slow_composite(sigmas, rgbs, t_starts, t_ends, offsets, early_stop=0.0, cotangents=None):
    """Forward and gradient as double loops over Python floats, straight from the sums."""
    s, c, t0, t1, o = (a.tolist() for a in (sigmas, rgbs, t_starts, t_ends, offsets))
    R, C, N = len(o) - 1, rgbs.shape[1], len(s)
    rgb, acc, depth, weights = [[0.0] * C for _ in range(R)], [0.0] * R, [0.0] * R, [0.0] * N
    d_s, d_c = [0.0] * N, [[0.0] * C for _ in range(N)]
    for r in range(R):
        seen, left = [], {}
        for i in range(o[r], o[r + 1]):
            T = math.exp(-sum(s[j] * (t1[j] - t0[j]) for j in range(o[r], i)))
            if T >= early_stop:
                weights[i] = T * -math.expm1(-s[i] * (t1[i] - t0[i]))
                left[i] = math.exp(-sum(s[j] * (t1[j] - t0[j]) for j in range(o[r], i + 1)))
                seen.append(i)
            for k in range(C):
                rgb[r][k] += weights[i] * c[i][k]
            acc[r] += weights[i]
            depth[r] += weights[i] * (t0[i] + t1[i]) / 2
        if cotangents:
            g_rgb, g_acc, g_depth, g_w = (a.tolist() for a in cotangents)
            g = {i: sum(g_rgb[r][k] * c[i][k] for k in range(C)) + g_acc[r] + (t0[i] + t1[i]) / 2 * g_depth[r] + g_w[i] for i in seen}
            for i in seen:
                d_s[i] = (t1[i] - t0[i]) * (g[i] * left[i] - sum(g[j] * weights[j] for j in seen if j > i))
                d_c[i] = [weights[i] * g_rgb[r][k] for k in range(C)]
    tensors = [torch.tensor(a, dtype=F64) for a in (rgb, acc, depth, weights, d_s, d_c)]
    return [a.reshape(shape) for a, shape in zip(tensors, ((R, C), (R,), (R,), (N,), (N,), (N, C)))]


def composite_all(backend, inputs, cotangents, early_stop=0.0):
    """Four outputs and two gradients."""
    wrt = [a.detach().requires_grad_() for a in inputs[:2]]
    out = run(composite, backend, *wrt, *inputs[2:], early_stop=early_stop)
    return [*(a.detach() for a in out), *grad(out, wrt, [b.to(a) for a, b in zip(out, cotangents)])]


def cotangents_for(R, N, C, seed=5):
    g = generator(seed)
    return [torch.randn(shape, generator=g, dtype=torch.float32).to(F64) for shape in ((R, C), (R,), (R,), (N,))]


ODD = [[], [0], [0, 0, 0, 0, 0], [1], [0, 1, 0, 33, 0], [31, 32, 33, 1, 64, 0, 3]]


@over_plain
@pytest.mark.parametrize("counts,C,early_stop", [(counts, 3, 0.0) for counts in ODD] + [([2, 0, 40], C, 0.0) for C in (1, 4, 16)]
                         + [([5, 0, 70, 1], 3, 0.3)])
def test_composite_is_the_slow_loop(backend, counts, C, early_stop):
    inputs, cotangents = samples(counts, C, seed=6), cotangents_for(len(counts), sum(counts), C)
    wanted = slow_composite(*inputs, early_stop, cotangents)
    for a, b in zip(composite_all(backend, inputs, cotangents, early_stop), wanted):
        assert_close(a, b)
    if early_stop:                                                      # and something was hidden, something not
        hidden = wanted[3] == 0
        assert 0 < hidden.sum() < len(hidden) and not wanted[4][hidden].any() and not wanted[5][hidden].any()


@over_plain
@pytest.mark.parametrize("counts,C,density", [([1025, 0, 1, 700], 3, 0.5), ([20] * 7, 4, 8.0), ([33, 5], 16, 50.0), ([64, 64, 1, 3, 128], 1, 1e-3)])
def test_composite_float32_is_as_good_as_pytorch(backend, counts, C, density):
    inputs, cotangents = samples(counts, C, seed=7, density=density), cotangents_for(len(counts), sum(counts), C)
    exact = composite_all("reference", inputs, cotangents)
    single = [a.float() if a.is_floating_point() else a for a in inputs]
    assert_as_good_as(composite_all(backend, single, cotangents), composite_all("reference", single, cotangents), exact)


@over_plain
@pytest.mark.parametrize("early_stop", [0.0, 0.6])
def test_composite_gradcheck(backend, early_stop):
    sigmas, rgbs, *rest = samples([0, 3, 0, 1, 2], C=2, seed=8, density=10.0)
    assert gradcheck(lambda s, c: run(composite, backend, s, c, *rest, early_stop=early_stop), (sigmas.requires_grad_(), rgbs.requires_grad_()))


@over_plain
def test_composite_each_output_alone(backend):
    """A loss that uses one output leaves the other cotangents undefined."""
    inputs = samples([3, 0, 35], seed=9)
    full = cotangents_for(3, 38, 3)
    for number in range(4):
        wrt = [a.detach().requires_grad_() for a in inputs[:2]]
        out = run(composite, backend, *wrt, *inputs[2:])
        found = grad(out[number], wrt, full[number], allow_unused=True)
        wanted = slow_composite(*inputs, 0.0, [a if i == number else torch.zeros_like(a) for i, a in enumerate(full)])
        assert_close(found[0], wanted[4])
        assert_close(torch.zeros_like(inputs[1]) if found[1] is None else found[1], wanted[5])


@over_plain
def test_composite_by_hand(backend):
    """sigma = ln 2 over an interval of 1: half is absorbed. Twice: a half and a quarter."""
    sigmas, rgbs = torch.full((3,), math.log(2), dtype=F64), torch.tensor([[1.0], [2.0], [4.0]], dtype=F64)
    t0 = torch.tensor([1.0, 1.0, 3.0], dtype=F64)
    rgb, acc, depth, weights = run(composite, backend, sigmas, rgbs, t0, t0 + 1, torch.tensor([0, 1, 3]))
    assert_close(weights, torch.tensor([0.5, 0.5, 0.25], dtype=F64), 1e-15), assert_close(acc, torch.tensor([0.5, 0.75], dtype=F64), 1e-15)
    assert_close(rgb[:, 0], torch.tensor([0.5, 2.0], dtype=F64), 1e-15), assert_close(depth, torch.tensor([0.75, 0.75 + 0.875], dtype=F64), 1e-15)


@over_plain
def test_composite_properties(backend):
    counts = [7, 0, 40, 1]
    sigmas, rgbs, t0, t1, offsets = samples(counts, seed=10, density=60.0)
    rgb, acc, depth, weights = run(composite, backend, sigmas, rgbs, t0, t1, offsets)
    assert (weights >= 0).all() and (acc <= 1).all() and acc[2] > 0.9
    assert_close(torch.stack([weights[a:b].sum() for a, b in zip(offsets, offsets[1:])]), acc)
    assert_close(acc, torch.stack([-torch.expm1(-(sigmas * (t1 - t0))[a:b].sum()) for a, b in zip(offsets, offsets[1:])]))
    # an interval cut in two (at a third of its length) with its density and colour in both halves: same picture, same shares
    cut = t0 + (t1 - t0) / 3
    twice = [a.repeat_interleave(2, 0) for a in (sigmas, rgbs)]
    halves = run(composite, backend, *twice, torch.stack([t0, cut], 1).flatten(), torch.stack([cut, t1], 1).flatten(), offsets * 2)
    assert_close(halves[0], rgb), assert_close(halves[1], acc), assert_close(halves[3].view(-1, 2).sum(1), weights)


@over_plain
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("tau", [1e3, 1e4, 1e30, INF])
def test_composite_opaque_surface_hides(backend, dtype, tau):
    """Nothing behind it counts or receives any gradient, in front all is as in exact arithmetic, and no inf - inf anywhere."""
    counts, wall = [40, 3], 5
    sigmas, rgbs, t0, t1, offsets = samples(counts, seed=11, density=2.0)
    t1[wall] = t0[wall] + 1 / 32
    sigmas[wall] = min(tau * 32, torch.finfo(dtype).max)
    if tau == INF:                                                      # sigma finite, sigma * delta not
        t0[wall + 1:] += 64
        t1[wall:] += 64
    inputs = [a.to(dtype) if a.is_floating_point() else a for a in (sigmas, rgbs, t0, t1, offsets)]
    assert tau != INF or (inputs[0] * (inputs[3] - inputs[2]))[wall] == INF
    cotangents = cotangents_for(2, 43, 3)
    found = composite_all(backend, inputs, cotangents)
    assert all(a.isfinite().all() for a in found)
    weights, d_sigmas, d_rgbs = found[3:]
    behind = slice(wall + 1, 40)
    assert not weights[behind].any() and not d_sigmas[behind].any() and not d_rgbs[behind].any() and d_sigmas[wall] == 0
    assert abs(found[1][0].item() - 1) < 1e-6
    clear = slice(0, wall)
    wanted = slow_composite(sigmas.clamp(max=1e300), rgbs, t0, t1, offsets, 0.0, cotangents)
    for a, b in zip(found[3:], wanted[3:]):
        assert_close(a[clear], b[clear], 1e-5 if dtype == torch.float32 else 1e-12)


@over_plain
def test_composite_keeps_small_gradients(backend):
    """Behind a surface of optical depth 12, what is left is 6e-6 of the light; its gradient still has float32's own relative precision,
    which total-minus-prefix sums lose. The same for weights of very thin air, which 1 - exp(-tau) loses."""
    inputs = list(samples([60], seed=12, density=3.0))
    inputs[0][4] = 12 / (inputs[3] - inputs[2])[4]
    inputs[0][50:] = torch.tensor([1e-7], dtype=F64)
    inputs[0] = inputs[0].float().double()
    cotangents = cotangents_for(1, 60, 3)
    single = [a.float() if a.is_floating_point() else a for a in inputs]
    found, exact = composite_all(backend, single, cotangents), slow_composite(*inputs, 0.0, cotangents)
    for a, b in zip(found[3:], exact[3:]):
        relative = ((a - b).abs() / b.abs().clamp(min=1e-30))[4:]               # the surface itself and all behind it
        assert relative.median() < 2e-6 and relative.max() < 2e-4, (relative.median(), relative.max())


@over_plain
def test_composite_of_views(backend):
    """Sliced densities and times, one colour expanded over all samples, offsets with a stride."""
    sigmas, _, t0, t1, offsets = samples([6, 0, 9], seed=13)
    wide, colour = torch.stack([sigmas, -sigmas], 1), torch.rand(1, 3, generator=generator(14), dtype=F64)
    views = wide[:, 0], colour.expand(15, 3), torch.stack([t0, t0], 1)[:, 1], torch.stack([t1, t1])[0], torch.stack([offsets, offsets], 1)[:, 0]
    cotangents = [a.expand(b) for a, b in zip(cotangents_for(1, 1, 1, seed=15), ((3, 3), (3,), (3,), (15,)))]
    for a, b in zip(composite_all(backend, views, cotangents), slow_composite(sigmas, views[1], t0, t1, offsets, 0.0, cotangents)):
        assert_close(a, b)


@over_plain
def test_composite_times_carry_no_gradient(backend):
    sigmas, rgbs, t0, t1, offsets = samples([4], seed=16)
    t0.requires_grad_(), t1.requires_grad_(), sigmas.requires_grad_()
    out = run(composite, backend, sigmas, rgbs, t0, t1, offsets)
    assert grad(out[2].sum(), (t0, t1), allow_unused=True) == (None, None)


# ------------------------------------------------------------------------------------------------------------------------ hash_encode
def slow_hash(x, table, levels):
    """Corner by corner with Python integers, hashing modulo 2^32 as the paper does."""
    out = []
    for point in x.tolist():
        row = []
        for res, size, first, dense in zip(levels.resolutions, levels.sizes, levels.offsets, levels.dense):
            p = [min(max(v, 0.0), 1.0) * res for v in point]
            cell = [min(math.floor(v), res - 1) for v in p]
            total = torch.zeros(table.shape[1], dtype=F64)
            for corner in itertools.product((0, 1), repeat=3):
                v = [a + b for a, b in zip(cell, corner)]
                w = math.prod(a - b if k else 1 - (a - b) for a, b, k in zip(p, cell, corner))
                hashed = (v[0] * 1 ^ v[1] * 2654435761 % 2 ** 32 ^ v[2] * 805459861 % 2 ** 32) % size
                total += w * table[first + (v[0] + v[1] * (res + 1) + v[2] * (res + 1) ** 2 if dense else hashed)]
            row.append(total)
        out.append(torch.cat(row))
    return torch.stack(out) if out else torch.zeros(0, len(levels.sizes) * table.shape[1], dtype=F64)


def hash_problem(N, F, levels, seed=0, margin=0.05):
    """Positions a little outside the unit cube too, exact in float32, and a table."""
    g = generator(seed)
    x = torch.rand(N, 3, generator=g) * (1 + 2 * margin) - margin
    return x.double(), torch.randn(levels.offsets[-1], F, generator=g).double()


def hash_all(backend, x, table, levels, cotangent):
    x, table = x.detach().requires_grad_(), table.detach().requires_grad_()
    out = run(hash_encode, backend, x, table, levels)
    return [out.detach(), *grad(out, (x, table), cotangent.to(out))]


MIXED = hash_levels(4, 3, 40, 9)                # two dense levels, two hashed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("F", [1, 2, 3, 4, 6, 8])
def test_rows_read_as_wide_numbers(F, dtype):
    """The CPU's gather: what a row looks like as a complex number must not matter, nor where in memory the table begins."""
    random = torch.Generator().manual_seed(F)
    storage = torch.randn(1 + 9 * F + F, generator=random).to(dtype)
    rows = torch.tensor([3, 0, 8, 3, 3, 7], dtype=torch.int32)
    for start in (0, 1, F):
        table = storage[start:start + 9 * F].view(9, F)
        assert torch.equal(kernels._take(table, rows), table[rows.long()])
        assert torch.equal(kernels._turn(table), table.t()) and kernels._turn(table).is_contiguous()


@pytest.mark.parametrize("F", [1, 2, 3, 4])
def test_hash_sums_into_the_table_in_order(F):
    """On the CPU each row of the table's gradient is summed corner by corner, sample by sample: the same last bits every time."""
    x, table = torch.rand(40, 3), torch.randn(MIXED.offsets[-1], F)
    g = torch.randn(40, 4 * F)
    wanted = torch.zeros_like(table)
    for level, (part, side) in enumerate(zip(*kernels._axes(x.t(), MIXED))):
        rows, weights = kernels._rows_weights(part, side, MIXED.dense[level])
        assert 0 <= rows.min() and rows.max() < MIXED.sizes[level]
        for k in range(8):
            for n in range(40):
                wanted[rows[k, n] + MIXED.offsets[level]] += weights[k, n] * g[n, level * F:(level + 1) * F]
    table.requires_grad_()
    assert torch.equal(torch.autograd.grad(hash_encode(x, table, MIXED, "torch"), table, g)[0], wanted)


def test_hash_levels():
    assert MIXED == ((3, 7, 16, 40), (64, 512, 512, 512), (0, 64, 576, 1088, 1600), (True, True, False, False))
    ngp = hash_levels(16, 16, 4096, 19)
    assert ngp.resolutions[0] == 16 and ngp.resolutions[-1] == 4096 and ngp.resolutions[1] == 23 and ngp.sizes[-1] == 2 ** 19
    assert ngp.dense == tuple((r + 1) ** 3 <= 2 ** 19 for r in ngp.resolutions) and ngp.offsets[1] == 17 ** 3
    assert hash_levels(1, 8, 8, 4) == ((8,), (16,), (0, 16), (False,))
    for wrong in ((0, 16, 32, 10), (4, 0, 32, 10), (4, 64, 32, 10), (4, 16, 32, 31)):
        with pytest.raises(ValueError, match="hash_levels"):
            hash_levels(*wrong)


@over_hash
@pytest.mark.parametrize("N,F", [(0, 2), (1, 4), (5, 1), (129, 3), (40, 16), (30, 2)])
def test_hash_is_the_slow_loop(backend, N, F):
    x, table = hash_problem(N, F, MIXED, seed=20)
    x[:4] = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5], [-3, 0.2, 7]], dtype=F64)[:N]
    out = run(hash_encode, backend, x, table, MIXED)
    assert_close(out, slow_hash(x, table, MIXED), 1e-13)
    # the encoding is linear in the table, so its gradient is checked exactly against the slow forward
    cotangent, other = (torch.randn(a.shape, generator=generator(21), dtype=F64) for a in (out, table))
    d_table = hash_all(backend, x, table, MIXED, cotangent)[2]
    assert_close((d_table * other).sum(), (slow_hash(x, other, MIXED) * cotangent).sum(), 1e-11 if N else 0)


@over_hash
def test_hash_finest_levels(backend):
    """Coordinates to 4096, where the products of the hash exceed 32 bits."""
    levels = hash_levels(3, 1024, 4096, 12)
    x, table = hash_problem(20, 2, levels, seed=22, margin=0.0)
    assert_close(run(hash_encode, backend, x, table, levels), slow_hash(x, table, levels))


@over_hash
def test_hash_gradcheck(backend):
    """To table and to x, at points that keep clear of cell faces (where the derivative to x jumps)."""
    levels = hash_levels(2, 1, 3, 3)
    assert levels.dense == (True, False) and levels.offsets[-1] == 16
    x, table = hash_problem(60, 2, levels, seed=23, margin=0.0)
    clear = [(x * res - (x * res).round()).abs().amin(1) > 0.01 for res in levels.resolutions]
    x = x[clear[0] & clear[1]][:3]
    assert len(x) == 3
    assert gradcheck(lambda x, table: run(hash_encode, backend, x, table, levels), (x.requires_grad_(), table.requires_grad_()),
                     fast_mode=INTERPRET, nondet_tol=1e-12)


@over_hash
def test_hash_gradient_of_x(backend):
    """Against central differences of the slow loop, hashed levels and points outside the cube included (zero there, axis by axis)."""
    x, table = hash_problem(12, 2, MIXED, seed=24, margin=0.3)
    cotangent = torch.randn(12, 8, generator=generator(25), dtype=F64)
    wanted, h = torch.zeros_like(x), 1e-7
    for axis in range(3):
        e = torch.zeros(3, dtype=F64)
        e[axis] = h
        wanted[:, axis] = ((slow_hash(x + e, table, MIXED) - slow_hash(x - e, table, MIXED)) * cotangent).sum(1) / (2 * h)
    found = hash_all(backend, x, table, MIXED, cotangent)[1]
    outside = (x < 0) | (x > 1)
    assert outside.any() and not found[outside].any() and found[~outside].all()
    assert_close(found, wanted, 1e-6)


@over_hash
def test_hash_linear_precision(backend):
    """A dense level whose corners hold a linear function reproduces it, between the corners too, and the gradient is its slope."""
    levels, slope = hash_levels(1, 6, 6, 10), torch.tensor([[2.0, -3.0], [0.5, 4.0], [-1.0, 7.0]], dtype=F64)
    z, y, x = torch.meshgrid(*[torch.arange(7, dtype=F64) / 6] * 3, indexing="ij")
    table = torch.stack([x, y, z], -1).view(-1, 3) @ slope + 5
    points = torch.rand(50, 3, generator=generator(26), dtype=F64).requires_grad_()
    out = run(hash_encode, backend, points, table, levels)
    assert_close(out, points.detach() @ slope + 5, 1e-13)
    for f in range(2):
        assert_close(grad(out[:, f].sum(), points, retain_graph=True)[0], slope[:, f].expand(50, 3), 1e-12)


@over_hash
def test_hash_by_hand(backend):
    levels = hash_levels(1, 1, 1, 3)
    x = torch.tensor([[0.5, 0.25, 1.0]], dtype=F64, requires_grad=True)
    out = run(hash_encode, backend, x, torch.arange(8, dtype=F64)[:, None], levels)
    assert out.item() == 5 and grad(out, x)[0].tolist() == [[1, 2, 4]]


@over_hash
def test_hash_collisions_add_up(backend):
    """Many samples in one cell: the table's gradient is the sum over all of them."""
    x, cotangent = torch.tensor([[0.3, 0.6, 0.45]], dtype=F64), torch.randn(1, 8, generator=generator(27), dtype=F64)
    table = torch.zeros(MIXED.offsets[-1], 2, dtype=F64)
    one = hash_all(backend, x, table, MIXED, cotangent)[2]
    many = hash_all(backend, x.expand(300, 3), table, MIXED, cotangent.expand(300, 8))[2]
    assert_close(many, 300 * one)


@over_hash
@pytest.mark.parametrize("N,F", [(300, 4), (257, 2), (33, 3)])
def test_hash_float32_is_as_good_as_pytorch(backend, N, F):
    x, table = hash_problem(N, F, MIXED, seed=28, margin=0.0)
    cotangent = torch.randn(N, 4 * F, generator=generator(29), dtype=torch.float32)
    exact = hash_all("reference", x, table, MIXED, cotangent)
    plain = hash_all("reference", x.float(), table.float(), MIXED, cotangent)
    assert_as_good_as(hash_all(backend, x.float(), table.float(), MIXED, cotangent), plain, exact)


@over_hash
def test_hash_gradient_only_where_wanted(backend):
    x, table = hash_problem(7, 2, MIXED, seed=30)
    cotangent = torch.randn(7, 8, generator=generator(31), dtype=F64)
    _, d_x, d_table = hash_all(backend, x, table, MIXED, cotangent)
    only_table = table.clone().requires_grad_()
    assert_close(grad(run(hash_encode, backend, x, only_table, MIXED), only_table, cotangent)[0], d_table)
    only_x = x.clone().requires_grad_()
    assert_close(grad(run(hash_encode, backend, only_x, table, MIXED), only_x, cotangent)[0], d_x)
    assert not run(hash_encode, backend, x, table, MIXED).requires_grad


@over_hash
def test_hash_of_views(backend):
    """Sliced positions, a transposed table, an expanded cotangent."""
    x, table = hash_problem(18, 2, MIXED, seed=32)
    views = torch.stack([x, x], 2)[::2, :, 1], table.t().contiguous().t()
    assert not views[0].is_contiguous() and not views[1].is_contiguous()
    cotangent = torch.tensor([[2.0]], dtype=F64).expand(9, 8)
    for a, b in zip(hash_all(backend, *views, MIXED, cotangent), hash_all("reference", x[::2].clone(), table, MIXED, cotangent.clone())):
        assert_close(a, b)


@over_hash
def test_hash_passes_nan_on(backend):
    """A position that is not a number must show in the result, and must not read outside the table."""
    x, table = hash_problem(3, 2, MIXED, seed=33)
    x[1, 2] = NAN
    out = run(hash_encode, backend, x, table, MIXED)
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()


@pytest.mark.skipif(INTERPRET, reason="about the PyTorch path")
def test_hash_on_the_cpu_is_deterministic():
    levels = hash_levels(4, 8, 64, 12)
    x, table = hash_problem(20000, 4, levels, seed=34)
    cotangent = torch.randn(20000, 16, generator=generator(35))
    first, *others = (hash_all("auto", x.float(), table.float(), levels, cotangent) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


# ----------------------------------------------------------------------------------------------------------------------- voxel_interp
def slow_voxel(x, links, values, mask=None, cotangent=None):
    """Sample by sample, corner by corner, feature by feature in Python floats: output, gradient to values."""
    F, rows, table, out = values.shape[1], links.tolist(), values.tolist(), []
    d_values = [[0.0] * F for _ in table]
    for n, point in enumerate(x.tolist()):
        p = [min(max(v, 0.0), size - 1.0) for v, size in zip(point, links.shape)]
        cell = [min(math.floor(v), size - 2) for v, size in zip(p, links.shape)]
        total = [0.0] * F
        for corner in itertools.product((0, 1), repeat=3):
            i, j, k = (a + b for a, b in zip(cell, corner))
            row, w = rows[i][j][k], math.prod(a - b if up else 1 - (a - b) for a, b, up in zip(p, cell, corner))
            for f in range(F if row >= 0 else 0):
                total[f] += w * table[row][f]
                if cotangent is not None and (mask is None or mask[row]):
                    d_values[row][f] += w * cotangent[n, f].item()
        out.append(total)
    return torch.tensor(out, dtype=F64).view(len(x), F), torch.tensor(d_values, dtype=F64).view(values.shape)


def voxel_problem(N, F, shape=(5, 3, 4), fill=0.4, seed=0):
    """Positions also outside the grid, exact in float32; that share of the points has a row, in shuffled order; two rows have no owner."""
    g = generator(seed)
    x = torch.rand(N, 3, generator=g) * (torch.tensor(shape) + 0.5) - 0.75
    there = torch.rand(shape, generator=g) < fill
    M = int(there.sum()) + 2 * (fill > 0)                   # fill 0: values has no row at all
    links = torch.randint(-5, 0, shape, generator=g).int()
    links[there] = torch.randperm(M, generator=g)[:int(there.sum())].int()
    return x.double(), links, torch.randn(M, F, generator=g).double()


def voxel_all(backend, x, links, values, mask, cotangent):
    values = values.detach().requires_grad_()
    out = run(voxel_interp, backend, x, links, values, mask=mask)
    return [out.detach(), grad(out, values, cotangent.to(out))[0]]


def voxel_cotangent(N, F, seed=41):
    return torch.randn(N, F, generator=generator(seed)).double()


@over_hash
@pytest.mark.parametrize("N,F,shape,fill", [(0, 4, (2, 2, 2), 1.0), (1, 28, (2, 3, 2), 0.5), (129, 1, (5, 3, 4), 0.4),
                                            (40, 3, (9, 2, 5), 1.0), (33, 28, (3, 7, 2), 0.1), (33, 4, (4, 4, 3), 0.0),
                                            (13, 32, (3, 3, 3), 0.7), (0, 3, (3, 2, 2), 0.0)])
def test_voxel_is_the_slow_loop(backend, N, F, shape, fill):
    x, links, values = voxel_problem(N, F, shape, fill, seed=40)
    top = torch.tensor(shape) - 1.0
    x[:6] = torch.stack([top * 0, top, top * 0.5, -top - 1, top + 3, top * torch.tensor([1.0, 0, 1])]).double()[:N]
    cotangent, mask = voxel_cotangent(N, F), torch.rand(len(values), generator=generator(42)) < 0.5
    for which in (None, mask):
        for a, b in zip(voxel_all(backend, x, links, values, which, cotangent), slow_voxel(x, links, values, which, cotangent)):
            assert_close(a, b, 1e-13)


@over_hash
def test_voxel_gradcheck(backend):
    x, links, values = voxel_problem(5, 2, (3, 2, 2), 0.6, seed=43)
    assert gradcheck(lambda v: run(voxel_interp, backend, x, links, v), (values.requires_grad_(),), fast_mode=INTERPRET, nondet_tol=1e-12)


@over_hash
def test_voxel_by_hand(backend):
    links = torch.full((2, 2, 2), -1, dtype=torch.int32)
    links[0, 0, 0], links[1, 0, 0] = 1, 0
    x, values = torch.tensor([[0.5, 0.0, 0.5], [0.25, 0.5, 0.0]], dtype=F64), torch.tensor([[16.0], [8.0]], dtype=F64)
    out, d_values = voxel_all(backend, x, links, values, None, torch.tensor([[1.0], [10.0]]))
    assert out.tolist() == [[6], [3 + 2]] and d_values.tolist() == [[0.25 + 1.25], [0.25 + 3.75]]
    assert voxel_all(backend, x, links, values, torch.tensor([True, False]), torch.ones(2, 1))[1].tolist() == [[0.25 + 0.125], [0]]


@over_hash
def test_voxel_linear_precision(backend):
    """A full grid that holds a linear function reproduces it: at the lattice points, upper faces too, and between; outside, clamped."""
    shape, slope = (4, 2, 6), torch.tensor([[2.0, -3.0], [0.5, 4.0], [-1.0, 7.0]], dtype=F64)
    lattice = torch.cartesian_prod(*(torch.arange(size, dtype=F64) for size in shape))
    links, top = torch.arange(48, dtype=torch.int32).view(shape), torch.tensor(shape) - 1.0
    x = torch.cat([lattice, voxel_problem(40, 1, shape, seed=44)[0], (top + 2)[None]])
    out = run(voxel_interp, backend, x, links, lattice @ slope + 5)
    assert torch.equal(out[:48], lattice @ slope + 5)
    assert_close(out, torch.minimum(x.clamp(min=0), top) @ slope + 5, 1e-14)


@over_hash
def test_voxel_missing_corners_count_as_zero(backend):
    """Ones fall off linearly towards the empty side; where nothing is there, nothing comes out, whatever row 0 holds."""
    links = torch.full((3, 2, 2), -1, dtype=torch.int32)
    links[0] = torch.tensor([[1, 2], [3, 4]])
    values = torch.ones(5, 3, dtype=F64)
    values[0] = 1e30
    x = torch.tensor([[0.0, 0.5, 0.5], [0.25, 0.1, 1.0], [0.75, 0.3, 0.9], [1.0, 0.5, 0.5], [1.7, 0.2, 0.2], [2.0, 1.0, 1.0]], dtype=F64)
    out, d_values = voxel_all(backend, x, links, values, None, torch.ones(6, 3))
    assert_close(out, torch.tensor([1, 0.75, 0.25, 0, 0, 0], dtype=F64)[:, None].expand(6, 3), 1e-15)
    assert not out[3:].any() and not d_values[0].any()


@over_hash
def test_voxel_mask(backend):
    """Rows outside receive exactly nothing, rows inside what they would without it; the output does not change."""
    x, links, values = voxel_problem(60, 4, seed=45)
    cotangent, mask = voxel_cotangent(60, 4), torch.rand(len(values), generator=generator(46)) < 0.3
    out, d_values = voxel_all(backend, x, links, values, None, cotangent)
    for which in (mask, ~mask, torch.zeros_like(mask), torch.ones_like(mask)):
        masked_out, masked = voxel_all(backend, x, links, values, which, cotangent)
        assert torch.equal(masked_out, out) and not masked[~which].any()
        if which.any():
            assert_close(masked[which], d_values[which], 1e-14)
    assert mask.any() and d_values[mask].any() and d_values[~mask].any()


@over_hash
def test_voxel_carries_no_gradient_to_x(backend):
    x, links, values = voxel_problem(7, 2, seed=47)
    assert not run(voxel_interp, backend, x.requires_grad_(), links, values).requires_grad
    out = run(voxel_interp, backend, x, links, values.requires_grad_())
    d_x, d_values = grad(out.sum(), (x, values), allow_unused=True)
    assert d_x is None and d_values.any()


@over_hash
def test_voxel_passes_nan_on(backend):
    """A position that is not a number must show in the result, in empty space too, and not read outside; an infinite one is clamped."""
    for fill in (0.0, 0.5):
        x, links, values = voxel_problem(4, 2, seed=48, fill=fill)
        x[1, 2], x[2, 0] = NAN, INF
        out = run(voxel_interp, backend, x, links, values)
        assert out[1].isnan().all() and out[[0, 2, 3]].isfinite().all()


@over_hash
def test_voxel_collisions_add_up(backend):
    """Two samples in one cell, then many: the gradient is the sum over all of them."""
    x, links, values = voxel_problem(2, 28, (2, 2, 2), 1.0, seed=49)
    cotangent = voxel_cotangent(2, 28)
    first, second = (voxel_all(backend, x[n:n + 1], links, values, None, cotangent[n:n + 1])[1] for n in range(2))
    assert_close(voxel_all(backend, x, links, values, None, cotangent)[1], first + second)
    many = voxel_all(backend, x[:1].expand(70, 3), links, values, None, cotangent[:1].expand(70, 28))[1]
    assert_close(many, 70 * first)
    links[:] = 3                                            # lattice points may even share one row
    assert_close(voxel_all(backend, x, links, values, None, cotangent)[1][3], cotangent.sum(0))


@over_hash
@pytest.mark.parametrize("N,F", [(200, 4), (130, 28)])
def test_voxel_float32_is_as_good_as_pytorch(backend, N, F):
    x, links, values = voxel_problem(N, F, (6, 7, 5), 0.6, seed=51)
    cotangent, mask = voxel_cotangent(N, F), torch.rand(len(values), generator=generator(52)) < 0.5
    for which in (None, mask):
        exact = voxel_all("reference", x, links, values, which, cotangent)
        plain = voxel_all("reference", x.float(), links, values.float(), which, cotangent)
        assert_as_good_as(voxel_all(backend, x.float(), links, values.float(), which, cotangent), plain, exact)


@over_hash
def test_voxel_of_views(backend):
    """Sliced positions, a transposed grid and table, a mask with a stride, an expanded cotangent; one position and one row expanded."""
    x, links, values = voxel_problem(18, 3, seed=53)
    mask = torch.rand(len(values), generator=generator(54)) < 0.5
    views = torch.stack([x, x], 2)[::2, :, 1], links.permute(2, 1, 0), values.t().contiguous().t(), torch.stack([mask, mask], 1)[:, 0]
    assert not any(view.is_contiguous() for view in views)
    cotangent = torch.tensor([[2.0]], dtype=F64).expand(9, 3)
    wanted = slow_voxel(x[::2], links.permute(2, 1, 0).contiguous(), values, mask, cotangent)
    for a, b in zip(voxel_all(backend, *views, cotangent), wanted):
        assert_close(a, b)
    one = x[:1].expand(5, 3), links, values[:1].expand(len(values), 3), mask[:1].expand(len(values))
    for a, b in zip(voxel_all(backend, *one, cotangent[:5]), slow_voxel(*(a.clone() for a in one), cotangent[:5])):
        assert_close(a, b)


@pytest.mark.skipif(INTERPRET, reason="about the PyTorch path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_voxel_keeps_every_float_type(dtype):
    x, links, values = voxel_problem(9, 4, seed=55)
    for backend in ("reference", "torch"):
        found = voxel_all(backend, x.to(dtype), links, values.to(dtype), None, torch.ones(9, 4))
        assert {a.dtype for a in found} == {dtype} and all(a.isfinite().all() for a in found)


@pytest.mark.skipif(INTERPRET, reason="about the PyTorch path")
def test_voxel_on_the_cpu_is_deterministic():
    x, links, values = voxel_problem(20000, 28, (20, 20, 20), 0.5, seed=56)
    mask, cotangent = torch.rand(len(values), generator=generator(57)) < 0.5, voxel_cotangent(20000, 28)
    for which in (None, mask):
        first, *others = (voxel_all("auto", x.float(), links, values.float(), which, cotangent) for _ in range(3))
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


@over_hash
def test_voxel_links_beyond_values(backend):
    """Rows that values does not have: an error on the CPU; in the kernels nothing, and nothing read or written outside."""
    x, links, values = voxel_problem(5, 4, (2, 2, 2), 1.0, seed=58)
    links[:] = 2 ** 30
    if backend == "triton":
        out, d_values = voxel_all(backend, x, links, values, torch.ones(len(values), dtype=torch.bool), torch.ones(5, 4))
        assert not out.any() and not d_values.any()
    else:
        with pytest.raises((IndexError, RuntimeError), match="out of bounds|range|Expected idx"):
            run(voxel_interp, backend, x, links, values)


# -------------------------------------------------------------------------------------------------------------------- triplane_interp
AXES = ((0, 1), (0, 2), (1, 2))                             # along the columns and the rows of the planes xy, xz, yz


def slow_triplane(x, planes, cotangent=None):
    """Output, gradient to planes. A texel is a tent around its centre, 1 there and 0 one texel further; every sample meets every texel."""
    (B, N, _), (_, _, H, W, F) = x.shape, planes.shape
    out, d_planes = torch.zeros(B, N, F, dtype=F64), torch.zeros_like(planes)
    tent = lambda at, i, size: max(0.0, 1 - abs(at - ((2 * i + 1) / size - 1)) * size / 2)      # noqa: E731
    for b, n, plane in itertools.product(range(B), range(N), range(3)):
        across, down = (x[b, n, axis].item() for axis in AXES[plane])
        for row, col in itertools.product(range(H), range(W)):
            w = tent(across, col, W) * tent(down, row, H)
            if w > 0:
                out[b, n] += w * planes[b, plane, row, col]
                if cotangent is not None:
                    d_planes[b, plane, row, col] += w * cotangent[b, n]
    return out, d_planes


def triplane_problem(B, N, F, H, W, seed=0, reach=1.3):
    """Positions also outside the cube; all numbers exact in float32."""
    g = generator(seed)
    x = (torch.rand(B, N, 3, generator=g) * 2 - 1) * reach
    return x.double(), torch.randn(B, 3, H, W, F, generator=g).double()


def triplane_all(backend, x, planes, cotangent):
    planes = planes.detach().requires_grad_()
    out = run(triplane_interp, backend, x, planes)
    return [out.detach(), grad(out, planes, cotangent.to(out))[0]]


def triplane_cotangent(*shape, seed=61):
    return torch.randn(*shape, generator=generator(seed)).double()


@over_hash
@pytest.mark.parametrize("B,N,F,H,W", [(0, 3, 2, 2, 2), (2, 0, 4, 3, 3), (1, 1, 12, 4, 4), (2, 33, 3, 5, 2), (2, 129, 1, 1, 1),
                                       (3, 17, 32, 3, 6), (2, 131, 4, 2, 3), (1, 40, 12, 4, 7)])
def test_triplane_is_the_slow_loop(backend, B, N, F, H, W):
    x, planes = triplane_problem(B, N, F, H, W, seed=60)
    edge = 1 + 1 / W
    for scene in x:                                         # the cube's corners and middle, a texel's centre, where fading ends, far out
        scene[:7] = torch.tensor([[-1, -1, -1], [1, 1, 1], [0, 0, 0], [1 / W - 1, 1 / H - 1, 1 - 1 / H], [edge, 0, -edge], [1, -1, 0.5],
                                  [9, -9, 0.1]], dtype=F64)[:N]
    cotangent = triplane_cotangent(B, N, F)
    for a, b in zip(triplane_all(backend, x, planes, cotangent), slow_triplane(x, planes, cotangent)):
        assert_close(a, b, 1e-13)


@over_hash
@pytest.mark.parametrize("H,W", [(8, 8), (5, 9)])
def test_triplane_is_grid_sample(backend, H, W):
    """The library's sampling, plane by plane."""
    x, planes = triplane_problem(2, 60, 12, H, W, seed=62)
    cotangent, wrt = triplane_cotangent(2, 60, 12), planes.clone().requires_grad_()
    wanted = sum(torch.nn.functional.grid_sample(wrt[:, plane].permute(0, 3, 1, 2), x[:, None][..., list(AXES[plane])], mode="bilinear",
                                                 padding_mode="zeros", align_corners=False)[:, :, 0].transpose(1, 2) for plane in range(3))
    found = triplane_all(backend, x, planes, cotangent)
    assert_close(found[0], wanted.detach(), 1e-13), assert_close(found[1], grad(wanted, wrt, cotangent)[0], 1e-13)
    assert_close(kernels._grid_sample(x, planes), wanted.detach(), 1e-13)


@over_hash
def test_triplane_gradcheck(backend):
    x, planes = triplane_problem(2, 4, 2, 2, 3, seed=63)
    assert gradcheck(lambda p: run(triplane_interp, backend, x, p), (planes.requires_grad_(),), fast_mode=INTERPRET, nondet_tol=1e-12)


@over_hash
def test_triplane_by_hand(backend):
    """Texels of 2 x 2 are centred at -1/2 and 1/2: half-way between rows in column 1; a quarter of the way; half of it missing."""
    planes = torch.zeros(1, 3, 2, 2, 1, dtype=F64)
    planes[0, 0] = torch.tensor([[1.0, 2], [3, 4]])[..., None]
    x = torch.tensor([[[0.5, 0, 7], [-0.25, -0.5, 0], [1, 0, 0], [-0.5, 1, 0]]], dtype=F64)
    out, d_planes = triplane_all(backend, x, planes, torch.tensor([1.0, 10, 100, 1000]).view(1, 4, 1))
    assert out.flatten().tolist() == [3, 1.25, 1.5, 1.5]
    assert d_planes[0, 0, ..., 0].tolist() == [[7.5, 0.5 + 2.5 + 25], [500, 0.5 + 25]]
    planes = torch.tensor([[1.0, 10, 100]], dtype=F64).view(1, 3, 1, 1, 1)             # one texel each: what each plane adds
    x = torch.tensor([[[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [2, 0, 0], [0, -2, 0], [0, 0, 2]]], dtype=F64)
    assert run(triplane_interp, backend, x, planes).flatten().tolist() == [111, 105.5, 60.5, 56, 100, 10, 1]


@over_hash
@pytest.mark.parametrize("plane", [0, 1, 2])
def test_triplane_each_plane_sees_its_two_axes(backend, plane):
    """A function of two axes jointly lives in their own plane, exactly where it is bilinear; that plane knows nothing of the third axis.
    Where the third plane is one more xz plane, as in the released code, no plane holds one of y and z."""
    (across, down), H, W = AXES[plane], 6, 5
    bilinear = lambda a, b: 2 + a - 4 * b + 3 * a * b                                   # noqa: E731
    centre = lambda size: (2 * torch.arange(size, dtype=F64) + 1) / size - 1            # noqa: E731
    planes = torch.zeros(1, 3, H, W, 1, dtype=F64)
    planes[0, plane, ..., 0] = bilinear(centre(W), centre(H)[:, None])
    x = triplane_problem(1, 50, 1, H, W, seed=64, reach=0.8)[0]                         # between the outermost centres
    out = run(triplane_interp, backend, x, planes)
    assert_close(out[..., 0], bilinear(x[..., across], x[..., down]), 1e-14)
    for axis in range(3):
        moved = x.clone()
        moved[..., axis] *= -0.9
        changes = (run(triplane_interp, backend, moved, planes) - out).abs()
        assert (changes > 1e-3).double().mean() > 0.9 if axis in (across, down) else not changes.any()


@over_hash
def test_triplane_linear_precision(backend):
    """Planes that hold linear functions add up to one, up to half a texel from the faces."""
    B, H, W = 2, 4, 7
    slope = triplane_cotangent(B, 3, 2, 3, seed=65)                                     # of each plane along its columns, rows, and at 0
    col, row = (2 * torch.arange(W, dtype=F64) + 1) / W - 1, (2 * torch.arange(H, dtype=F64) + 1) / H - 1
    values = slope[..., 0, None, None] * col + slope[..., 1, None, None] * row[:, None] + slope[..., 2, None, None]     # (B, 3, 2, H, W)
    x = triplane_problem(B, 40, 1, H, W, seed=66, reach=0.75)[0]
    a, b = x[..., [0, 0, 1], None], x[..., [1, 2, 2], None]                             # (B, N, 3, 1)
    s = slope[:, None]
    wanted = (s[..., 0] * a + s[..., 1] * b + s[..., 2]).sum(2)
    assert_close(run(triplane_interp, backend, x, values.permute(0, 1, 3, 4, 2)), wanted, 1e-14)


@over_hash
def test_triplane_outside_is_zero(backend):
    """All ones: 3 inside; on a face two planes give half, half a texel further nothing, nor beyond; and nothing goes back from there."""
    planes, at = torch.ones(1, 3, 4, 4, 2, dtype=F64), torch.tensor([0.5, 1, 1.125, 1.25, 1.5, 100, 1e30, INF], dtype=F64)
    for axis, sign in itertools.product(range(3), (1, -1)):
        x = torch.full((1, 8, 3), 0.1, dtype=F64)
        x[..., axis] = sign * at
        out, d_planes = triplane_all(backend, x, planes, torch.ones(1, 8, 2))
        assert_close(out[0, :, 0], torch.tensor([3, 2, 1.5, 1, 1, 1, 1, 1], dtype=F64), 1e-14)
        assert_close(d_planes.sum(), 2 * torch.tensor(3 + 2 + 1.5 + 5, dtype=F64), 1e-14)
        x[..., (axis + 1) % 3], x[..., (axis + 2) % 3] = -INF, 9
        out, d_planes = triplane_all(backend, x, planes, torch.ones(1, 8, 2))
        assert not out.any() and not d_planes.any()


@over_hash
def test_triplane_passes_nan_on(backend):
    """A position that is not a number must show in the result, next to another far outside too, and not read outside the planes."""
    x, planes = triplane_problem(2, 5, 3, 3, 2, seed=67)
    x[0, 1, 2], x[1, 2] = NAN, torch.tensor([INF, NAN, -INF])
    out = run(triplane_interp, backend, x, planes)
    bad = torch.zeros(2, 5, dtype=torch.bool)
    bad[0, 1] = bad[1, 2] = True
    assert out[bad].isnan().all() and out[~bad].isfinite().all()


@over_hash
def test_triplane_carries_no_gradient_to_x(backend):
    x, planes = triplane_problem(2, 7, 2, 3, 3, seed=68)
    assert not run(triplane_interp, backend, x.requires_grad_(), planes).requires_grad
    out = run(triplane_interp, backend, x, planes.requires_grad_())
    d_x, d_planes = grad(out.sum(), (x, planes), allow_unused=True)
    assert d_x is None and d_planes.any()


@over_hash
def test_triplane_scenes_do_not_mix_and_samples_add_up(backend):
    """Each scene as if alone; a scene without a cotangent gets no gradient; 70 samples at one place send 70 times one's gradient."""
    x, planes = triplane_problem(3, 19, 12, 4, 4, seed=69)
    cotangent = triplane_cotangent(3, 19, 12)
    together = triplane_all(backend, x, planes, cotangent)
    for b in range(3):
        for a, alone in zip(together, triplane_all(backend, x[b:b + 1], planes[b:b + 1], cotangent[b:b + 1])):
            assert_close(a[b:b + 1], alone, 1e-14)
    cotangent[1] = 0
    d_planes = triplane_all(backend, x, planes, cotangent)[1]
    assert not d_planes[1].any() and d_planes[0].any() and d_planes[2].any()
    one = triplane_all(backend, x[:, :1], planes, cotangent[:, :1])[1]
    assert_close(triplane_all(backend, x[:, :1].expand(3, 70, 3), planes, cotangent[:, :1].expand(3, 70, 12))[1], 70 * one)


@over_hash
@pytest.mark.parametrize("B,N,F,H,W", [(3, 65, 12, 8, 8), (1, 200, 32, 5, 7), (2, 130, 4, 32, 32)])
def test_triplane_float32_is_as_good_as_pytorch(backend, B, N, F, H, W):
    x, planes = triplane_problem(B, N, F, H, W, seed=70)
    cotangent = triplane_cotangent(B, N, F)
    exact, plain = triplane_all("reference", x, planes, cotangent), triplane_all("reference", x.float(), planes.float(), cotangent)
    assert_as_good_as(triplane_all(backend, x.float(), planes.float(), cotangent), plain, exact)


@over_hash
def test_triplane_of_views(backend):
    """Sliced and reordered positions, planes channels first in memory, expanded cotangents; one position and one scene expanded."""
    x, planes = triplane_problem(3, 12, 3, 4, 5, seed=71)
    first = planes.permute(0, 1, 4, 2, 3).contiguous()
    views = x.flip(2).transpose(0, 1).contiguous().transpose(0, 1)[:, ::2], first.permute(0, 1, 3, 4, 2)
    assert not any(view.is_contiguous() for view in views)
    cotangent = torch.tensor([[[2.0]]], dtype=F64).expand(3, 6, 3)
    for a, b in zip(triplane_all(backend, *views, cotangent), slow_triplane(*views, cotangent)):
        assert_close(a, b)
    one = x[:1, :1].expand(2, 5, 3), planes[:1, :, :, :, :1].expand(2, 3, 4, 5, 3)
    for a, b in zip(triplane_all(backend, *one, cotangent[:2, :5]), slow_triplane(*(a.clone() for a in one), cotangent[:2, :5])):
        assert_close(a, b)


@pytest.mark.skipif(INTERPRET, reason="about the PyTorch path")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_triplane_keeps_every_float_type(dtype):
    x, planes = triplane_problem(2, 9, 4, 3, 3, seed=72)
    for backend in ("reference", "torch"):
        found = triplane_all(backend, x.to(dtype), planes.to(dtype), torch.ones(2, 9, 4))
        assert {a.dtype for a in found} == {dtype} and all(a.isfinite().all() for a in found)


@pytest.mark.skipif(INTERPRET, reason="about the PyTorch path")
def test_triplane_on_the_cpu_is_deterministic():
    x, planes = triplane_problem(2, 20000, 12, 16, 16, seed=73)
    first, *others = (triplane_all("auto", x.float(), planes.float(), triplane_cotangent(2, 20000, 12)) for _ in range(3))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other))


# ---------------------------------------------------------------------------------------------------------------------- all together
@over_hash
def test_thirty_steps_of_training_agree(backend):
    """March, encode, composite and fit one colour and density field: the same losses on every backend."""
    plain = "reference" if backend == "torch" else backend
    losses = {}
    for which, other in ((backend, plain), ("reference", "reference")):
        torch.manual_seed(0)
        o, d, _ = rays(8, seed=36, dtype=torch.float32)
        levels = hash_levels(2, 4, 8, 8)
        table = (0.1 * torch.randn(levels.offsets[-1], 4, generator=generator(37))).requires_grad_()
        target = torch.rand(8, 3, generator=generator(38))
        optimiser = torch.optim.Adam([table], lr=0.05)
        steps = 6 if INTERPRET else 30
        t0, t1, offsets, ray = run(march, other, o, d, torch.ones(4, 4, 4, dtype=torch.bool), BOX.float(), 0.2)
        x = (o[ray] + d[ray] * (0.5 * (t0 + t1))[:, None] - BOX[0].float()) / 2
        losses[which] = []
        for _ in range(steps):
            feature = run(hash_encode, which, x, table, levels)
            rgb, acc, _, _ = run(composite, other, feature[:, 0].exp(), feature[:, 1:4].sigmoid(), t0, t1, offsets)
            loss = (rgb - target * (acc > 0)[:, None]).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses[which].append(loss.item())
    first, second = (torch.tensor(a) for a in (losses[backend], losses["reference"]))
    assert_close(first, second, 1e-4)
    assert second[-1] < (0.9 if INTERPRET else 0.3) * second[0]


# ----------------------------------------------------------------------------------------------------------------- errors and choices
GOOD_MARCH = dict(rays_o=torch.zeros(2, 3), rays_d=torch.ones(2, 3), occupied=torch.ones(2, 2, 2, dtype=torch.bool), aabb=torch.eye(2, 3), step=0.1)
GOOD_COMPOSITE = dict(sigmas=torch.ones(4), rgbs=torch.ones(4, 3), t_starts=torch.zeros(4), t_ends=torch.ones(4), offsets=torch.tensor([0, 4]))
GOOD_HASH = dict(x=torch.ones(4, 3), table=torch.ones(MIXED.offsets[-1], 2), levels=MIXED)
GOOD_VOXEL = dict(x=torch.ones(4, 3), links=torch.zeros(2, 3, 2).int(), values=torch.ones(5, 4), mask=torch.ones(5, dtype=torch.bool))

GOOD_TRIPLANE = dict(x=torch.ones(2, 4, 3), planes=torch.ones(2, 3, 4, 5, 2))


@pytest.mark.parametrize("function,good,wrong", [
    (march, GOOD_MARCH, dict(rays_o=torch.zeros(2, 2))), (march, GOOD_MARCH, dict(rays_d=torch.zeros(3, 3))), (march, GOOD_MARCH, dict(step=0.0)),
    (march, GOOD_MARCH, dict(rays_d=torch.ones(2, 3).double())), (march, GOOD_MARCH, dict(occupied=torch.ones(2, 2, 2))),
    (march, GOOD_MARCH, dict(jitter=torch.zeros(3))), (march, GOOD_MARCH, dict(aabb=torch.zeros(6))), (march, GOOD_MARCH, dict(step=NAN)),
    (composite, GOOD_COMPOSITE, dict(sigmas=torch.ones(4, 1))), (composite, GOOD_COMPOSITE, dict(rgbs=torch.ones(5, 3))),
    (composite, GOOD_COMPOSITE, dict(t_ends=torch.ones(4).double())), (composite, GOOD_COMPOSITE, dict(offsets=torch.tensor([0, 4]).int())),
    (composite, GOOD_COMPOSITE, dict(offsets=torch.tensor([0, 3]))), (composite, GOOD_COMPOSITE, dict(offsets=torch.tensor([0, 3, 2, 4]))),
    (composite, GOOD_COMPOSITE, dict(sigmas=torch.ones(4).long())), (composite, GOOD_COMPOSITE, dict(rgbs=torch.ones(4, 0))),
    (composite, GOOD_COMPOSITE, dict(t_starts=torch.zeros(4, device="meta"))), (composite, GOOD_COMPOSITE, dict(offsets=torch.zeros(0).long())),
    (composite, GOOD_COMPOSITE, dict(sigmas=[1.0])), (composite, GOOD_COMPOSITE, dict(backend="fast")), (composite, GOOD_COMPOSITE, dict(backend="torch")),
    (hash_encode, GOOD_HASH, dict(x=torch.ones(4, 2))), (hash_encode, GOOD_HASH, dict(table=torch.ones(10, 2))),
    (hash_encode, GOOD_HASH, dict(x=torch.ones(4, 3).double())), (hash_encode, GOOD_HASH, dict(backend="cuda")),
    (voxel_interp, GOOD_VOXEL, dict(x=torch.ones(4, 2))), (voxel_interp, GOOD_VOXEL, dict(x=torch.ones(4, 3).double())),
    (voxel_interp, GOOD_VOXEL, dict(x=torch.ones(4, 3).long())), (voxel_interp, GOOD_VOXEL, dict(links=torch.zeros(2, 3, 2))),
    (voxel_interp, GOOD_VOXEL, dict(links=torch.zeros(2, 3, 2).long())), (voxel_interp, GOOD_VOXEL, dict(links=torch.zeros(12).int())),
    (voxel_interp, GOOD_VOXEL, dict(links=torch.zeros(2, 1, 2).int())), (voxel_interp, GOOD_VOXEL, dict(links=[0])),
    (voxel_interp, GOOD_VOXEL, dict(values=torch.ones(5))), (voxel_interp, GOOD_VOXEL, dict(values=torch.ones(5, 0))),
    (voxel_interp, GOOD_VOXEL, dict(values=torch.ones(5, 4, device="meta"))), (voxel_interp, GOOD_VOXEL, dict(mask=torch.ones(5))),
    (voxel_interp, GOOD_VOXEL, dict(mask=torch.ones(4, dtype=torch.bool))), (voxel_interp, GOOD_VOXEL, dict(backend="cuda")),
    (triplane_interp, GOOD_TRIPLANE, dict(x=torch.ones(4, 3))), (triplane_interp, GOOD_TRIPLANE, dict(x=torch.ones(2, 4, 2))),
    (triplane_interp, GOOD_TRIPLANE, dict(x=torch.ones(3, 4, 3))), (triplane_interp, GOOD_TRIPLANE, dict(x=torch.ones(2, 4, 3).double())),
    (triplane_interp, GOOD_TRIPLANE, dict(x=torch.ones(2, 4, 3).long())), (triplane_interp, GOOD_TRIPLANE, dict(x=[0.0])),
    *((triplane_interp, GOOD_TRIPLANE, dict(planes=torch.ones(shape))) for shape in
      ((2, 2, 4, 5, 2), (2, 3, 4, 5), (2, 3, 0, 5, 2), (2, 3, 4, 0, 2), (2, 3, 4, 5, 0))),
    (triplane_interp, GOOD_TRIPLANE, dict(planes=torch.ones(2, 3, 4, 5, 2, device="meta"))),
    (triplane_interp, GOOD_TRIPLANE, dict(planes=torch.ones(2, 3, 4, 5, 2).long())),
    (triplane_interp, GOOD_TRIPLANE, dict(backend="cuda"))])
def test_wrong_input_is_one_clear_line(function, good, wrong):
    with pytest.raises(ValueError) as error:
        function(**{**good, **wrong})
    name = next(iter(wrong))
    assert (name in str(error.value) or "wanted" in str(error.value)) and "\n" not in str(error.value)


@pytest.mark.skipif(INTERPRET, reason="Triton does run here")
def test_triton_backend_on_cpu_tensors_says_why_not():
    for function, good in ((march, GOOD_MARCH), (composite, GOOD_COMPOSITE), (hash_encode, GOOD_HASH), (voxel_interp, GOOD_VOXEL),
                           (triplane_interp, GOOD_TRIPLANE)):
        function(**good)                                                # auto finds something that runs
        with pytest.raises(RuntimeError, match="CUDA|Triton cannot be imported"):
            function(**good, backend="triton")


def test_import_without_triton():
    """As on macOS and Windows."""
    code = ("import sys; sys.modules['triton'] = None\nimport torch, kernels\nassert kernels.NO_TRITON\n"
            "args = torch.ones(2), torch.ones(2, 3), torch.zeros(2), torch.ones(2), torch.tensor([0, 2])\nkernels.composite(*args)\n"
            "try: kernels.composite(*args, backend='triton')\nexcept RuntimeError as error: print(error)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Triton cannot be imported" in done.stdout, done.stderr


def test_benchmark_runs_and_prints_json():
    done = subprocess.run([sys.executable, "kernels.py", "--rays", "64", "--no-compile", "--json", "--seconds", "0.02"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    found = json.loads(done.stdout)
    assert {row["operation"] for row in found["rows"]} == set(kernels.OPERATIONS) and found["copy_gb_per_s"] > 0
    assert all(row["forward_ms"] > 0 for row in found["rows"])


@pytest.mark.skipif(INTERPRET or CUDA, reason="about the CPU's table")
def test_benchmark_refuses_to_time_what_is_wrong(monkeypatch):
    right = kernels._HashTorch.backward
    monkeypatch.setattr(kernels._HashTorch, "backward", staticmethod(lambda ctx, d: (lambda x, table, none: (x, table * 1.001, none))(*right(ctx, d))))
    _, rows = kernels.benchmark(64, with_compile=False, seconds=0.02)
    failed = [row for row in rows if "failed" in row]
    assert [(row["operation"], row["backend"]) for row in failed] == [("hash_encode", "torch")] and "forward_ms" not in failed[0]


# --------------------------------------------------------------------------------------------------------------------- Triton kernels
@pytest.mark.skipif(bool(kernels.NO_TRITON) or INTERPRET, reason=kernels.NO_TRITON or "already inside the interpreter")
def test_interpreter():
    """Every test above that takes a backend, for the Triton kernels, on the CPU."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", "-k", "triton and not why_not and not without",
                           str(Path(__file__).resolve())], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout and " failed" not in done.stdout and " skipped" not in done.stdout


@pytest.mark.skipif(bool(kernels.NO_TRITON) or INTERPRET, reason=kernels.NO_TRITON or "nothing is compiled inside the interpreter")
@pytest.mark.parametrize("capability,dtype", [(80, "fp32"), (90, "fp32"), (90, "fp64")])
def test_kernels_compile_without_spills(capability, dtype):
    pytest.importorskip("triton.backends.nvidia")
    tools = Path(kernels.triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not all((tools / tool).exists() for tool in ("ptxas", "cuobjdump")):
        pytest.skip(f"this Triton comes without ptxas and cuobjdump in {tools}")
    listed = kernels.kernel_list()
    helpers = ("_slab", "_to_grid", "_cell", "_divide", "_join", "_before", "_alpha", "_place", "_row", "_texel")
    assert {kernel for _, kernel, _, _ in listed} == {value for name, value in vars(kernels).items() if name.startswith("_")
                                                      and hasattr(value, "arg_names") and not name.endswith(helpers)}
    for label, *what in listed:
        found = kernels.resources(*what, capability, dtype)
        assert found["local"] == 0 and found["spill_instructions"] == 0 and found["registers"] <= (128 if dtype == "fp32" else 255), (label, found)
        assert (found["atomics"] != "-") == ("to table" in label or "to values" in label or "to planes" in label), (label, found)
        if dtype == "fp32" and ("voxel" in label or "triplane" in label):           # whole rows, or several lanes a row
            assert "LDG.E.128" in found["loads"], (label, found)
        if dtype == "fp32" and "hash" in label and "to table" not in label:         # a row of features is one load
            assert ("LDG.E.128" if "F = 4" in label else "LDG.E.64") in found["loads"], (label, found)


@pytest.mark.skipif(not CUDA or INTERPRET, reason="no CUDA device (there, every test above runs as [triton] on it, and this one at full size)")
def test_cuda_at_full_size():
    for name in kernels.OPERATIONS:
        assert kernels._disagreement(name, "triton", "cuda", 20000) is None
