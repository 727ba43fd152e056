"""streamrf.py against known answers: the grid, rendering, gradients, what may change and what is kept, the stream, training, playing.

Oracles are slow loops in float64, cases worked out by hand, and a stream's own round trip. All runs are on the built-in `stage` at 24 px.
"""
import inspect
import itertools
import json
import lzma
import math
import random
import signal
import struct
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import conftest  # noqa: E402
import streamrf as sr  # noqa: E402
from common import UserError  # noqa: E402
from conftest import assert_refused, lines  # noqa: E402
from streamrf import (DELTA, KEY, Args, Grid, StreamDamaged, StreamHeader, StreamReader, StreamWriter, active, compand,  # noqa: E402
                      decode_frame, encode_frame, grid_from, pack_header, pack_record)

F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def film():
    """stage at 24 px, its first four frames."""
    video = common.load_video("stage", "no such folder", 24, 4)
    return video, [video.read(t) for t in range(4)]


def assert_close(a, b, **tolerance):
    """True, or the complaint of torch's, which itself returns None."""
    torch.testing.assert_close(a, b, **tolerance)
    return True


# ------------------------------------------------------------------------------------------------------ grids to work with

SIZE = (7, 6, 5)                                                                # 210 bits: the last byte of a mask is not full
HEADER = StreamHeader(SIZE, torch.tensor([[-1.0, -2, -3], [1, 2, 3]]), 1, torch.tensor([0.5, 0.25, 1]), "fp16", 0.02, 0.005, 4, 29.97,
                      0.1, 6.0, False, torch.arange(18.0).view(2, 3, 3), torch.linspace(-3, 7, 24).view(2, 3, 4), 1, 36, 48)
INT8 = replace(HEADER, values="int8")


def random_grid(seed, share=0.4, F=13, size=SIZE):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=g) < share
    values = torch.randn(int(mask.sum()), F, generator=g)
    values[:, 0] *= 50                                                          # raw density, both signs
    return grid_from(mask, values)


def dense(grid):
    out = grid.values.new_zeros(*grid.links.shape, grid.values.shape[1])
    out[active(grid)] = grid.values
    return out


def next_of(seed, prev):
    """What a frame of training does: voxels appear, vanish, the lot moves by one, some change; -> grid, keep."""
    g = torch.Generator().manual_seed(seed)
    if seed % 5 == 4:                                                           # everything moves along z
        moved = torch.roll(dense(prev), 1, 2)
        mask = torch.roll(active(prev), 1, 2)
    else:
        moved, mask = dense(prev), active(prev)
    mask = (mask & (torch.rand(SIZE, generator=g) < 0.95)) | (torch.rand(SIZE, generator=g) < 0.05)
    values = moved[mask] + 0.3 * torch.randn(int(mask.sum()), 13, generator=g) * (torch.rand(int(mask.sum()), 1, generator=g) < 0.3)
    return grid_from(mask, values), torch.rand(len(values), generator=g) < 0.5


def same(a, b):
    return (torch.equal(a.links, b.links) and torch.equal(a.values, b.values)
            and a.links.dtype == torch.int32 and a.values.dtype == torch.float32)


def encode(header, n, start=0, prev=None):
    """Yields (t, kind, payload, the encoder's grid): a closed loop whose frame t depends on t and the frame before only."""
    for t in range(start, n):
        new, keep = (random_grid(0), None) if t == 0 else next_of(t, prev)
        kind = KEY if t % header.key_every == 0 else DELTA
        payload = encode_frame(header, None if kind == KEY else prev, new, keep)
        prev = decode_frame(header, kind, payload, prev)
        yield t, kind, payload, prev


def write_stream(path, header=HEADER, n=10, close=True):
    writer, truth = StreamWriter(path, header), []
    for t, kind, payload, grid in encode(header, n):
        writer.append(t, kind, payload)
        truth.append(grid)
    if close:
        writer.close()
    return truth


def craft(header, raw, prev=None, kind=KEY):
    return decode_frame(header, kind, lzma.compress(raw, lzma.FORMAT_RAW, filters=sr.LZMA), prev)


# ------------------------------------------------------------------------------------------------------ the sparse grid

def test_grid_from_is_raster():
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0, 0] = mask[0, 0, 1] = True
    grid = grid_from(mask, torch.tensor([[1.0], [2], [3]]))
    assert [int(grid.links[p]) for p in ((0, 0, 1), (0, 1, 2), (1, 0, 0))] == [0, 1, 2] and torch.equal(active(grid), mask)
    assert int((grid.links == -1).sum()) == 9


def lattice_points(shape):
    return itertools.product(*map(range, shape))


def around(p, shape, n):
    """Lattice points within n steps of p, diagonals included."""
    return itertools.product(*(range(max(c - n, 0), min(c + n + 1, side)) for c, side in zip(p, shape)))


def test_restrict_keeps_values_and_makes_zeros():
    grid = random_grid(3)
    mask = torch.rand(SIZE, generator=torch.Generator().manual_seed(9)) < 0.5
    out = sr.restrict(grid, mask)
    assert torch.equal(active(out), mask) and out.links.dtype == torch.int32
    n = 0
    for p in lattice_points(SIZE):
        if mask[p]:
            assert out.links[p] == n
            had = int(grid.links[p])
            assert torch.equal(out.values[n], grid.values[had] if had >= 0 else torch.zeros(13))
            n += 1
    assert n == len(out.values)
    assert same(sr.restrict(grid, active(grid)), grid)


@pytest.mark.parametrize("times", [0, 1, 2, 3])
def test_dilate_and_erode_against_brute_force(times):
    for seed, share in ((0, 0.02), (1, 0.9), (2, 0.97)):
        mask = torch.rand(SIZE, generator=torch.Generator().manual_seed(seed)) < share
        wide, thin = sr.dilate(mask, times), sr.erode(mask, times)
        for p in lattice_points(SIZE):
            assert wide[p] == any(mask[q] for q in around(p, SIZE, times)), p
            assert thin[p] == all(mask[q] for q in around(p, SIZE, times)), p                      # outside counts as in
    assert sr.erode(torch.ones(SIZE, dtype=torch.bool), 9).all() and not sr.dilate(torch.zeros(SIZE, dtype=torch.bool), 9).any()


def test_upsample_one_pilot_voxel_is_four_cubed():
    mask = torch.zeros(5, 6, 7, dtype=torch.bool)
    mask[2, 3, 4] = True
    out = sr.upsample(mask, (10, 12, 14))
    expected = torch.zeros(10, 12, 14, dtype=torch.bool)
    expected[3:7, 5:9, 7:11] = True
    assert torch.equal(out, expected)
    mask[:] = False
    mask[0, 0, 0] = True
    expected[:] = False
    expected[:3, :3, :3] = True                                                                    # two of its own, one beside them
    assert torch.equal(sr.upsample(mask, (10, 12, 14)), expected)
    everywhere = torch.rand(5, 6, 7) < 0.2
    fine = sr.lookup(grid_from(everywhere, torch.ones(int(everywhere.sum()), 1)), sr.on_lattice(torch.ones(10, 12, 14, dtype=torch.bool), (5, 6, 7)))
    assert torch.equal(sr.upsample(everywhere, (10, 12, 14)).flatten(), fine[:, 0] > 0)            # "linear interpolation of 0 and 1 is above 0"


def test_on_lattice_positions_coincide_in_the_world():
    low, high = torch.tensor([-1.0, -2, 3]), torch.tensor([2.0, -1, 7])
    for a, b in (((4, 6, 8), (4, 6, 8)), ((8, 6, 4), (4, 3, 2)), ((4, 6, 8), (8, 12, 16)), ((4, 6, 8), (6, 6, 2))):
        mask = torch.rand(a, generator=torch.Generator().manual_seed(1)) < 0.4
        found = sr.on_lattice(mask, b)
        world = low + (mask.nonzero() + 0.5) / torch.tensor(a) * (high - low)                      # point i of n: low + (i + 1/2)/n of the box
        assert_close(low + (found + 0.5) / torch.tensor(b) * (high - low), world)
    assert torch.equal(sr.on_lattice(torch.ones(2, 2, 2, dtype=torch.bool), (4, 4, 4))[0], torch.tensor([0.5, 0.5, 0.5]))


def test_resample_to_the_same_shape_is_the_identity_and_prunes():
    grid = random_grid(4, share=0.05)
    grid.values[::3, 0], grid.values[1::3, 0] = 9.0, 1.0
    out = sr.resample(grid, SIZE, 5.0, 1)
    solid = torch.zeros(SIZE, dtype=torch.bool)
    solid[active(grid)] = grid.values[:, 0] >= 5.0
    assert torch.equal(sr.solid(grid, 5.0), solid) and 3 < solid.sum() < len(grid.values)
    keep = sr.dilate(solid, 1)
    assert 0 < keep.sum() < keep.numel() and (active(grid) & ~keep).any()
    assert same(out, sr.restrict(grid, keep))                                                      # to the bit; new ones are 0


def test_resample_to_half_averages_eight_points():
    grid = random_grid(5, 0.7, 4, (8, 6, 4))
    grid.values[:, 0] = grid.values[:, 0].abs() + 5
    out, full = sr.resample(grid, (4, 3, 2), 1.0, 0), dense(grid)
    mean = full.view(4, 2, 3, 2, 2, 2, 4).mean((1, 3, 5))
    assert torch.equal(active(out), mean[..., 0] >= 1.0)
    assert_close(out.values, mean[active(out)], rtol=1e-5, atol=1e-5)


def test_resample_to_double_interpolates():
    ramp = torch.stack(torch.meshgrid(*(torch.arange(float(n)) for n in (4, 4, 4)), indexing="ij"), -1) @ torch.tensor([1.0, 2, 3]) + 10
    out = sr.resample(grid_from(torch.ones(4, 4, 4, dtype=torch.bool), ramp.view(-1, 1)), (8, 8, 8), 0.5, 0)
    at = [max(min((i + 0.5) / 2 - 0.5, 3), 0) for i in range(8)]                                   # clamped at the rim
    for i, j, k in lattice_points((8, 8, 8)):
        assert float(out.values[out.links[i, j, k].long(), 0]) == pytest.approx(10 + at[i] + 2 * at[j] + 3 * at[k], abs=1e-4)


# ------------------------------------------------------------------------------------------------------ rendering

C0, C1 = 0.28209479177387814, 0.4886025119029199


def harmonics(d, bands):
    x, y, z = d
    out = [C0, -C1 * y, C1 * z, -C1 * x, 1.0925484305920792 * x * y, -1.0925484305920792 * y * z, 0.31539156525252005 * (2 * z * z - x * x - y * y),
           -1.0925484305920792 * x * z, 0.5462742152960396 * (x * x - y * y)]
    return out[:bands]


def trilinear(full, x):
    """Of an array (X, Y, Z, F) at lattice coordinates x, clamped into the lattice, corner by corner."""
    out, cell, f = np.zeros(full.shape[3]), [], []
    for c, side in zip(x, full.shape):
        c = min(max(c, 0.0), side - 1.0)
        i = min(int(c), side - 2)
        cell.append(i), f.append(c - i)
    for corner in itertools.product((0, 1), repeat=3):
        w = math.prod(f[a] if corner[a] else 1 - f[a] for a in range(3))
        out += w * full[tuple(i + c for i, c in zip(cell, corner))]
    return out


def slow_render(grid, rays_o, rays_d, where, stop):
    """The dense oracle: no skipping, one sample after the other, in float64. -> rgb, acc, depth."""
    full = dense(grid).double().numpy()
    low, high = where.aabb.double().numpy()
    sides = np.array(full.shape[:3])
    result = []
    for o, d in zip(rays_o.double().numpy(), rays_d.double().numpy()):
        scale = sides / (high - low)
        length = 1 / np.linalg.norm(d * scale)                                                     # of a voxel, along the ray
        at, along = (o + where.near * d - low) * scale - 0.5, d * scale * length
        first, last = (-1 - at) / along, (sides - at) / along                                      # from half a voxel before the box to half behind it
        begin, end = max(0.0, np.minimum(first, last).max()), np.maximum(first, last).min()
        rgb, acc, depth, T, k = np.zeros(3), 0.0, 0.0, 1.0, 0
        Y = harmonics(d, (full.shape[3] - 1) // 3)
        while begin + (k + 0.5) * 0.5 < end:
            t = begin + (k + 0.5) * 0.5
            f = trilinear(full, at + t * along)
            tau = max(f[0], 0.0) * 0.5 * length
            w = T * (1 - math.exp(-tau)) if T >= stop else 0.0
            rgb += w * np.array([max(0.0, 0.5 + sum(s * y for s, y in zip(f[1 + c * len(Y):], Y))) for c in range(3)])
            acc, depth, T, k = acc + w, depth + w * (where.near + t * length), T * math.exp(-tau), k + 1
        result.append((*(rgb + (1 - acc) * where.bg.double().numpy()), acc, depth))
    result = torch.tensor(np.array(result))
    return result[:, :3], result[:, 3], result[:, 4]


BOX = torch.tensor([[-1.0, -2, -0.5], [1.0, 1, 2]])                                                # three different voxel sizes


def world(aabb=BOX, near=0.0, **more):
    return SimpleNamespace(**{**dict(aabb=aabb, near=near, far=10.0, bg=torch.tensor([0.2, 0.5, 0.9], dtype=aabb.dtype), ndc=False), **more})


def some_rays(n=12, seed=0, aabb=BOX, dtype=torch.float32):
    """From around the box, through points inside of it."""
    g = torch.Generator().manual_seed(seed)
    centre, half = aabb.double().mean(0), (aabb[1] - aabb[0]).double() / 2
    o = centre + 3 * half.max() * normalize(torch.randn(n, 3, generator=g, dtype=F64), dim=1)
    d = normalize(centre + half * (torch.rand(n, 3, generator=g, dtype=F64) * 1.6 - 0.8) - o, dim=1)
    return o.to(dtype), d.to(dtype)


def everywhere(shape):
    return torch.ones([side + 1 for side in shape], dtype=torch.bool)


@pytest.mark.parametrize("shape, F", [((8, 8, 8), 13), ((8, 8, 8), 4), ((6, 8, 10), 28)])
@pytest.mark.parametrize("stop", [0.0, 0.1])
def test_render_against_the_slow_oracle(shape, F, stop):
    grid = random_grid(1, 0.5, F, shape)
    grid.values[:, 0] *= 0.1                                                                       # of both signs: empty, thin and opaque
    double, where = Grid(grid.links, grid.values.double()), world(BOX.double())
    rays_o, rays_d = some_rays(dtype=F64)
    out = sr.render(double, everywhere(shape), rays_o, rays_d, where, stop)
    rgb, acc, depth = slow_render(double, rays_o, rays_d, where, stop)
    assert 0.2 < acc.mean() < 0.999 and rgb.std() > 0.05
    for name, want in (("rgb", rgb), ("acc", acc), ("depth", depth)):
        assert_close(out[name], want, rtol=1e-9, atol=1e-9)
    single = sr.render(grid, everywhere(shape), rays_o.float(), rays_d.float(), world(), stop)
    assert (single["rgb"] - rgb).abs().median() < 1e-4                                             # a last sample may fall on either side


def test_render_from_inside_and_of_rays_that_miss():
    grid, where = random_grid(1, 0.5, 13, (8, 8, 8)), world(BOX.double())
    double = Grid(grid.links, grid.values.double())
    rays_o, rays_d = torch.tensor([[0.1, -0.4, 0.7], [0.1, -0.4, 0.7], [5.0, 5, 5]], dtype=F64), torch.tensor([[1.0, 0.1, 0.2], [-1, 0.3, 0.1], [1, 0, 0]], dtype=F64)
    rays_d = normalize(rays_d, dim=1)
    out = sr.render(double, everywhere((8, 8, 8)), rays_o, rays_d, where, 0.0)
    assert_close(out["rgb"][:2], slow_render(double, rays_o[:2], rays_d[:2], where, 0.0)[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(out["rgb"][2], where.bg) and out["acc"][2] == 0


def test_constant_density_gives_the_analytic_transmittance():
    shape, sigma = (8, 12, 10), 0.7
    values = torch.zeros(math.prod(shape), 4, dtype=F64)
    values[:, 0] = sigma
    grid, where = grid_from(torch.ones(shape, dtype=torch.bool), values), world(BOX.double())
    rays_o, rays_d = some_rays(50, dtype=F64)
    out = sr.render(grid, everywhere(shape), rays_o, rays_d, where, 0.0)
    half = (BOX[1] - BOX[0]).double() / torch.tensor(shape) / 2                                    # the outermost cells end half a voxel outside
    a, b = (BOX[0].double() - half - rays_o) / rays_d, (BOX[1].double() + half - rays_o) / rays_d
    chord = torch.maximum(a, b).amin(1) - torch.minimum(a, b).amax(1)
    step = 0.5 / (rays_d / (2 * half)).norm(dim=1)
    error = (-torch.log(1 - out["acc"]) / sigma - chord).abs()
    assert (chord > 0).all() and (error <= 0.5 * step + 1e-9).all()                                # the count of steps is rounded, no more
    assert_close(out["rgb"], 0.5 * out["acc"][:, None] + (1 - out["acc"][:, None]) * where.bg)     # coefficients 0: grey


def test_skipping_empty_cells_changes_nothing():
    grid = random_grid(2, 0.08, 13, (16, 16, 16))
    rays_o, rays_d = some_rays(300)
    few = sr.cells_of(sr.solid(grid, 1e-8))
    assert 0.05 < few.float().mean() < 0.6
    for stop in (0.0, 0.01):
        a = sr.render(grid, everywhere((16, 16, 16)), rays_o, rays_d, world(), stop)
        b = sr.render(grid, few, rays_o, rays_d, world(), stop)
        assert len(b["x"]) < 0.7 * len(a["x"])
        for name in ("rgb", "acc", "depth"):
            assert torch.equal(a[name], b[name]), name


def test_cells_of_against_brute_force():
    mask = torch.rand(SIZE) < 0.1
    cells = sr.cells_of(mask)
    assert cells.shape == (8, 7, 6)
    for cell in lattice_points(cells.shape):
        corners = [tuple(c - e for c, e in zip(cell, low)) for low in itertools.product((0, 1), repeat=3)]
        assert cells[cell] == any(mask[p] for p in corners if all(0 <= c < side for c, side in zip(p, SIZE)))


def test_a_world_twice_as_large_and_half_as_dense_looks_the_same():
    grid = random_grid(3, 0.5, 13, (8, 8, 8))
    rays_o, rays_d = some_rays(40)
    thin = Grid(grid.links, grid.values * torch.tensor([0.5] + [1.0] * 12))
    a = sr.render(grid, everywhere((8, 8, 8)), rays_o, rays_d, world(near=0.25), 0.01)
    b = sr.render(thin, everywhere((8, 8, 8)), 2 * rays_o, rays_d, world(2 * BOX, near=0.5), 0.01)
    assert torch.equal(a["rgb"], b["rgb"]) and torch.equal(2 * a["depth"], b["depth"])            # a factor of two: to the bit
    assert (a["acc"] > 0.1).any()


def test_near_hides_what_is_before_it_and_moves_nothing():
    shape = (16, 4, 4)
    values = torch.zeros(16, 4, 4, 4)
    values[2:5, ..., 0], values[10:13, ..., 0] = 4.0, 3.0
    values[2:5, ..., 1], values[10:13, ..., 2] = 1.0, 1.0                                          # red before green
    both = grid_from(torch.ones(shape, dtype=torch.bool), values.view(-1, 4))
    behind = values.clone()
    behind[:8] = 0
    behind = grid_from(torch.ones(shape, dtype=torch.bool), behind.view(-1, 4))
    box = torch.tensor([[0.0, 0, 0], [16, 4, 4]])                                                  # voxels of side 1, along x: steps of 0.5
    rays_o, rays_d = torch.tensor([[-5.0, 2.2, 1.9]]), torch.tensor([[1.0, 0, 0]])
    see = lambda grid, near: sr.render(grid, everywhere(shape), rays_o, rays_d, world(box, near=near), 0.0)
    for near in (1.0, 3.7, 4.5):                                                                   # all before the box, which begins at t = 4.5
        for name in ("rgb", "acc", "depth"):
            assert_close(see(both, near)[name], see(both, 0.0)[name], rtol=1e-5, atol=1e-5)
    for name in ("rgb", "acc", "depth"):
        assert_close(see(both, 13.0)[name], see(behind, 0.0)[name], rtol=1e-5, atol=1e-5)          # between the two
    assert (see(both, 13.0)["rgb"] - see(both, 0.0)["rgb"]).abs().max() > 0.1


def test_picture_is_render_in_chunks_and_paint_is_the_share(film):
    video, _ = film
    grid = random_grid(1, 0.3, 13, (8, 8, 8))
    args = SimpleNamespace(stop=0.0)
    xy = common.pixel_grid(video.H, video.W)
    rays_o, rays_d = common.pixel_rays(xy, video.K[3], video.c2w[3].expand(len(xy), 3, 4))
    want = sr.render(grid, everywhere((8, 8, 8)), rays_o, rays_d, video, 0.0)
    every = sr.picture(grid, video, 3, args, torch.ones(len(grid.values), dtype=torch.bool))
    assert torch.equal(every["rgb"].view(-1, 3), want["rgb"].clamp(0, 1)) and torch.equal(every["depth"].flatten(), want["depth"])
    paint = torch.rand(len(grid.values)) < 0.5
    a, b = (sr.picture(grid, video, 3, args, rows)["paint"] for rows in (paint, ~paint))
    assert_close(a + b, every["paint"]) and (every["paint"] <= want["acc"].view(24, 24) + 1e-5).all() and a.max() > 0.1 and b.max() > 0.1


def test_rays_in_ndc():
    c2w = torch.eye(4)[None, :3].repeat(2, 1, 1)
    c2w[1, 0, 3] = 0.3
    K = torch.tensor([[20.0, 0, 8], [0, 20, 6], [0, 0, 1]]).repeat(2, 1, 1)
    where = world(torch.tensor([[-1.5, -1.5, -1], [1.5, 1.5, 1]]), K=K, c2w=c2w, H=12, W=16)
    where.ndc = True
    grid = grid_from(torch.ones(8, 8, 8, dtype=torch.bool), torch.full((512, 4), 0.3))
    xy = common.pixel_grid(12, 16)
    o, d = sr.rays_of(where, 1, xy)
    want = common.ndc_rays(*common.pixel_rays(xy, K[1], c2w[1].expand(len(xy), 3, 4)), K[1], 12, 16)
    assert torch.equal(o, want[0]) and torch.equal(d, want[1]) and (o[:, 2] + 1).abs().max() < 1e-6
    out = sr.picture(grid, where, 1, SimpleNamespace(stop=0.01))
    assert out["rgb"].isfinite().all() and (out["rgb"] != where.bg).all(-1).float().mean() > 0.9
    both = sr.rays_of(where, torch.tensor([0, 1]).repeat_interleave(192), xy.repeat(2, 1))         # a camera for each pixel
    assert_close(both[0][192:], o) and assert_close(both[1][192:], d)


# ------------------------------------------------------------------------------------------------------ the gradient

def test_gradient_of_render_against_finite_differences():
    shape = (4, 4, 4)
    g = torch.Generator().manual_seed(0)
    mask = torch.rand(shape, generator=g) < 0.8
    values = 0.05 * torch.randn(int(mask.sum()), 13, generator=g, dtype=F64)                       # colours near 1/2, densities far from 0
    values[:, 0] = 1 + torch.rand(len(values), generator=g, dtype=F64)
    grid, where = grid_from(mask, values), world(BOX.double())
    rays_o, rays_d = some_rays(30, dtype=F64)
    weight = torch.randn(30, 3, generator=g, dtype=F64)
    loss = lambda v, rows=None: (weight * sr.render(Grid(grid.links, v), everywhere(shape), rays_o, rays_d, where, 0.0, rows)["rgb"]).sum()
    full, = torch.autograd.grad(loss(v := values.clone().requires_grad_()), v)
    places = torch.randperm(values.numel(), generator=g)[:80].tolist() + list(range(0, 13 * 10, 13))
    for place in places:
        up, down = values.clone(), values.clone()
        up.view(-1)[place] += 1e-5
        down.view(-1)[place] -= 1e-5
        assert float(full.view(-1)[place]) == pytest.approx(float(loss(up) - loss(down)) / 2e-5, rel=1e-6, abs=1e-8)
    assert (full != 0).float().mean() > 0.8
    rows = torch.rand(len(values), generator=g) < 0.4
    part, = torch.autograd.grad(loss(v := values.clone().requires_grad_(), rows), v)
    assert torch.equal(part[~rows], torch.zeros_like(part[~rows])) and assert_close(part[rows], full[rows], rtol=1e-12, atol=1e-15)
    assert torch.equal(loss(values, rows), loss(values))


def slow_tv(grid, points, weight):
    """Autograd of the formula in tv_gradient's docstring, point by point; the factor side / 256 between the two halves of the chain rule."""
    v, sides = grid.values.clone().requires_grad_(), grid.links.shape
    differences, factors = [], []
    for p in points.tolist():
        at = np.unravel_index(p, sides)
        row, d = int(grid.links[at]), []
        for axis in range(3):
            beside = tuple(c + (a == axis) for a, c in enumerate(at))
            other = int(grid.links[beside]) if beside[axis] < sides[axis] else -1
            a, b = (v[i] if i >= 0 else torch.zeros_like(v[0]) for i in (row, other))
            colour = b[1:] - a[1:] if row >= 0 and other >= 0 else 0 * v[0, 1:]                    # no difference to a missing voxel
            d.append(torch.cat([b[:1] - a[:1], colour]))                                           # which has no density
        differences.append(torch.stack(d))
        factors.append(torch.tensor(sides)[:, None] / 256)
    d = torch.stack(differences)                                                                   # (n, 3, F)
    leaf = d.detach().requires_grad_()
    tv = (weight / len(points) * (1e-9 + leaf.square().sum(1)).sqrt()).sum()
    slope, = torch.autograd.grad(tv, leaf)
    return torch.autograd.grad((d * slope * torch.stack(factors)).sum(), v)[0]


@pytest.mark.parametrize("share", [0.3, 0.8, 1.0])
def test_tv_gradient_against_autograd(share):
    shape = (5, 7, 6)                                                                              # three different factors
    grid = random_grid(1, share, 4, shape)
    grid = Grid(grid.links, grid.values.double())
    g = torch.Generator().manual_seed(2)
    points = torch.cat([torch.randint(210, (60,), generator=g), torch.tensor([7, 7, 7, 0, 209, 209])])      # repeated, first, last
    weight = torch.tensor([0.5, 2.0, 2.0, 3.0], dtype=F64)
    begun = torch.randn(grid.values.shape, generator=g, dtype=F64)
    grad = begun.clone()
    sr.tv_gradient(grid, points, weight, grad)
    want = slow_tv(grid, points, weight)
    assert_close(grad - begun, want, rtol=1e-9, atol=1e-12) and want.abs().max() > 0


def test_tv_gradient_by_hand():
    """Two voxels along x on 256 x 4 x 4 points: densities 1 and 3. The first: d = (2, -1, -1); alone at the rim: all three to nothing."""
    mask = torch.zeros(256, 4, 4, dtype=torch.bool)
    mask[10, 1, 1] = mask[11, 1, 1] = True
    grid = grid_from(mask, torch.tensor([[1.0, 0.2], [3.0, 0.7]]))
    grad = torch.zeros(2, 2)
    sr.tv_gradient(grid, torch.tensor([10 * 16 + 5]), torch.tensor([1.0, 1.0]), grad)
    n = math.sqrt(6)
    assert_close(grad, torch.tensor([[-2 / n + 2 * (1 / n) * 4 / 256, -1.0], [2 / n, 1.0]]))       # colour: along x only
    grad = torch.zeros(2, 2)
    sr.tv_gradient(grid, torch.tensor([9 * 16 + 5]), torch.tensor([1.0, 1.0]), grad)               # an empty point beside a voxel
    assert_close(grad, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


# ------------------------------------------------------------------------------------------------------ the optimiser

def test_rmsprop_by_hand():
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    optimiser, lr = sr.LazyRMSProp(values, 0.5), torch.tensor([0.1, 0.01])
    optimiser.step(values, torch.tensor([[2.0, 0.5], [0.0, 0.0], [-1.0, 0.25]]), lr)
    mean = (math.sqrt((4 + 1) / 2), math.sqrt((0.25 + 0.0625) / 2))                                # over the rows with a gradient
    first = [[1 - 0.1 * 2 / (2 + 0.5 * mean[0]), 2 - 0.01 * 0.5 / (0.5 + 0.5 * mean[1])], [3, 4],
             [5 + 0.1 / (1 + 0.5 * mean[0]), 6 - 0.01 * 0.25 / (0.25 + 0.5 * mean[1])]]
    assert_close(values, torch.tensor(first))
    optimiser.step(values, torch.tensor([[1.0, 1.0], [4.0, 0.0], [0.0, 0.0]]), lr)
    m = [0.95 * 4 + 0.05, 0.95 * 0.25 + 0.05]
    mean = (math.sqrt((m[0] + 16) / 2), math.sqrt(m[1] / 2))
    want = [[first[0][0] - 0.1 / (math.sqrt(m[0]) + 0.5 * mean[0]), first[0][1] - 0.01 / (math.sqrt(m[1]) + 0.5 * mean[1])],
            [3 - 0.1 * 4 / (4 + 0.5 * mean[0]), 4], first[2]]
    assert_close(values, torch.tensor(want))
    assert_close(optimiser.m, torch.tensor([m, [16.0, 0.0], [1.0, 0.0625]]))


def test_rmsprop_undamped_takes_a_whole_first_step_and_leaves_others_alone():
    values = torch.randn(50, 4)
    before, grad = values.clone(), torch.randn(50, 4) * 10.0 ** torch.randint(-6, 3, (50, 1))
    grad[::3] = 0
    sr.LazyRMSProp(values, 0.0).step(values, grad, torch.tensor([0.5, 0.1, 0.1, 0.1]))
    assert torch.equal(values[::3], before[::3])
    touched = torch.arange(50) % 3 > 0
    want = before - torch.tensor([0.5, 0.1, 0.1, 0.1]) * grad.sign()
    big = touched[:, None] & (grad.abs() > 1e-5)
    assert_close(values[big], want[big], rtol=2e-3, atol=2e-3)                                     # + 1e-8 beside |g|
    damped = before.clone()
    sr.LazyRMSProp(damped, 1.0).step(damped, grad, torch.tensor([0.5, 0.1, 0.1, 0.1]))
    assert ((damped - before).abs() <= (values - before).abs() + 1e-6).all()


# ------------------------------------------------------------------------------------------------------ where to look

def two_cameras(n=2, H=10, W=12, seed=3, dtype=F64):
    """Cameras anywhere around BOX, in float64: no ray runs along a lattice plane."""
    g = torch.Generator().manual_seed(seed)
    c2w = torch.stack([torch.tensor(common.orbit_pose(float(a), float(e), 6.0, (0.0, -0.5, 0.75)))
                       for a, e in zip(6 * torch.rand(n, generator=g), 1.2 * torch.rand(n, generator=g) - 0.5)])
    K = torch.tensor([[14.3, 0, W / 2], [0, 14.3, H / 2], [0, 0, 1]], dtype=F64).repeat(n, 1, 1)
    return world(BOX.to(dtype), near=0.5, K=K.to(dtype), c2w=c2w.to(dtype), H=H, W=W, train=list(range(1, n)) + [0], test=[])


def test_crossing_against_brute_force():
    video, shape = two_cameras(), (6, 8, 7)
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[1, 2, 3] = mask[5, 7, 6] = mask[3, 0, 0] = True
    found = sr.crossing(mask, video, torch.arange(240))
    want = []
    for pixel in range(2 * 120):
        o, d = sr.training_rays(video, torch.tensor([pixel]))
        x = sr.walk(everywhere(shape), o, d, video)[0]
        touched = False
        for place in x.tolist():
            corner = [math.floor(c) for c in place]
            for low in itertools.product((0, 1), repeat=3):
                p = tuple(c + e for c, e in zip(corner, low))
                touched |= all(0 <= c < side for c, side in zip(p, shape)) and bool(mask[p])
        want += [pixel] * touched
    assert found.tolist() == want and 10 < len(want) < 200
    some = torch.randperm(240)[:100]
    assert sr.crossing(mask, video, some).tolist() == [pixel for pixel in some.tolist() if pixel in want]           # of these, in their order
    grid = grid_from(torch.ones(shape, dtype=torch.bool), torch.full((math.prod(shape), 4), 0.2, dtype=F64))
    gradient = lambda pixels: torch.autograd.grad(sr.render(grid, everywhere(shape), *sr.training_rays(video, pixels), video, 0.0,
                                                            mask[active(grid)])["rgb"].sum(), grid.values)[0][mask[active(grid)]]
    grid.values.requires_grad_()
    others = torch.tensor(sorted(set(range(240)) - set(want)))
    assert (gradient(others) == 0).all() and (gradient(found) != 0).any(1).all()


def test_training_rays_are_those_of_the_pixel(film):
    video, _ = film
    for index in (0, 24 * 24 * 5 + 3 * 24 + 7, 12 * 24 * 24 - 1):
        camera, pixel = video.train[index // 576], index % 576
        xy = torch.tensor([[pixel % 24 + 0.5, pixel // 24 + 0.5]])
        want = common.pixel_rays(xy, video.K[camera], video.c2w[camera].expand(1, 3, 4))
        got = sr.training_rays(video, torch.tensor([index]))
        assert_close(got[0], want[0]) and assert_close(got[1], want[1])


def test_changed_pixels_by_hand():
    before = torch.full((2, 6, 7, 3), 0.5)
    now = before.clone()
    now[0, 3, 4, 2] += 0.04                                                                        # one channel is enough
    now[1, 0, 0, 0] -= 0.04
    now[1, 5, 6, 1] += 0.02                                                                        # too little
    found = sr.changed_pixels(now, before, 0.03)
    want = torch.zeros(2, 6, 7, dtype=torch.bool)
    want[0, 2:5, 3:6], want[1, :2, :2] = True, True
    assert torch.equal(found, want)


def slow_hull(video, pixels, shape, share):
    """Point by point, camera by camera, in float64."""
    out = torch.zeros(shape, dtype=torch.bool)
    low, high = video.aabb.double().numpy()
    margin = torch.full(shape, math.inf)                                                           # how near to the rim of a pixel
    for p in lattice_points(shape):
        x = low + (np.array(p) + 0.5) / np.array(shape) * (high - low)
        sees = marked = 0
        for camera, lit in zip(video.train, pixels):
            K, pose = video.K[camera].double().numpy(), video.c2w[camera].double().numpy()
            c = pose[:, :3].T @ (x - pose[:, 3])
            if c[2] >= 0:
                continue
            u, v = K[0, 2] + K[0, 0] * c[0] / -c[2], K[1, 2] - K[1, 1] * c[1] / -c[2]
            margin[p] = min(margin[p], abs(u - round(u)), abs(v - round(v)))
            if 0 <= u < video.W and 0 <= v < video.H:
                sees, marked = sees + 1, marked + bool(lit[int(v), int(u)])
        out[p] = sees >= min(3, len(video.train)) and marked >= share * sees - 1e-9
    return out, margin


def seen_ball(video, centre, radius):
    """Pixels (V, H, W) of the training cameras whose square, seen from the camera, may hold some of the ball."""
    o, d = sr.training_rays(video, torch.arange(len(video.train) * video.H * video.W))
    away = torch.tensor(centre) - o
    beside = (away - (away * d).sum(1, keepdim=True) * d).norm(dim=1)
    pixel = 0.75 * 3.5 / float(video.K[0, 0, 0])                                                   # half a pixel's diagonal, out there
    return (beside < radius + pixel).view(len(video.train), video.H, video.W)


def test_hull_against_brute_force_and_of_a_ball(film):
    video, _ = film
    shape = (12, 10, 11)
    pixels = torch.rand(12, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.75
    for share in (0.8, 0.7):
        want, margin = slow_hull(video, pixels, shape, share)
        found, clear = sr.hull(video, pixels, shape, share), margin > 1e-4
        assert torch.equal(found[clear], want[clear]) and clear.float().mean() > 0.95 and 0.01 < want.float().mean() < 0.9
    shape, centre, radius = (24, 24, 24), (-0.2, 0.1, 0.05), 0.25
    x = video.aabb[0] + (torch.ones(shape).nonzero().view(*shape, 3) + 0.5) / 24 * 2
    distance = (x - torch.tensor(centre)).norm(dim=-1)
    ball = seen_ball(video, centre, radius)
    found = sr.hull(video, ball, shape)
    assert found[distance < radius].all() and not found[distance > 4 * radius].any() and (distance < radius).sum() > 50
    beside = torch.tensor([0.0, 0, 1.0])                                                           # as far up: no camera looks along z
    assert not found[((x - torch.tensor(centre)) @ beside).abs() > 2.2 * radius].any()
    blinded = ball.clone()
    blinded[4] = False
    assert sr.hull(video, blinded, shape)[distance < radius].all()                                 # 11 of 12 are enough
    blinded[[0, 7, 9]] = False
    assert not sr.hull(video, blinded, shape)[distance < radius].any()                             # 8 of 12 are not
    assert not sr.hull(video, torch.zeros_like(ball), shape).any()


def ndc_video(focal=(20.0,) * 5):
    c2w = torch.eye(4)[None, :3].repeat(5, 1, 1)
    c2w[:, 0, 3], c2w[:, 1, 3] = torch.tensor([-0.4, -0.2, 0, 0.2, 0.4]), torch.tensor([0.1, -0.1, 0.2, 0, 0.1])
    K = torch.tensor([[[f, 0, 16], [0, f, 12], [0, 0, 1]] for f in focal])
    return world(torch.tensor([[-1.5, -1.5, -1], [1.5, 1.5, 1]]), K=K, c2w=c2w, H=24, W=32, train=[1, 2, 3, 4, 0], test=[], ndc=True)


def mark_point(video, p):
    pixels = torch.zeros(len(video.train), video.H, video.W, dtype=torch.bool)
    for lit, camera in zip(pixels, video.train):
        x, y, z = (torch.tensor(p) - video.c2w[camera, :, 3]).tolist()
        f = float(video.K[camera, 0, 0])
        u, v = 16 - f * x / z, 12 + f * y / z
        lit[int(v) - 1:int(v) + 2, int(u) - 1:int(u) + 2] = True
    return pixels


def test_hull_in_ndc():
    video, p = ndc_video(), (1.2, -0.6, -2.5)
    found = sr.hull(video, mark_point(video, p), (48, 48, 32))
    ndc = torch.tensor([-2 * 20 / 32 * p[0] / p[2], -2 * 20 / 24 * p[1] / p[2], 1 + 2 / p[2]])
    at = ((ndc - video.aabb[0]) / (video.aabb[1] - video.aabb[0]) * torch.tensor([48.0, 48, 32]) - 0.5).round().long()
    assert found[tuple(at)] and found.float().mean() < 0.05


def test_unexplained():
    video, shape = two_cameras(4, dtype=torch.float32), (8, 8, 8)
    values = torch.zeros(8, 8, 8, 4)
    values[2:5, 2:5, 2:5, 0] = 60.0                                                                # an opaque block
    block = values[..., 0] > 0
    grid = grid_from(torch.ones(shape, dtype=torch.bool), values.view(-1, 4))
    args = SimpleNamespace(stop=0.01)
    marked = torch.rand(4, 10, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    o, d = sr.training_rays(video, torch.arange(480))
    sees = sr.render(grid, everywhere(shape), o, d, video, 0.0)["acc"].view(4, 10, 12)
    assert (sees > 0.9).sum() > 20 and (sees < 0.1).sum() > 20
    left = sr.unexplained(grid, video, marked, sr.dilate(block), args)
    assert not left[~marked].any() and not left[marked & (sees > 0.55)].any() and left[marked & (sees < 0.45)].all()
    elsewhere = torch.zeros(shape, dtype=torch.bool)
    elsewhere[6:, 6:, 6:] = True
    assert torch.equal(sr.unexplained(grid, video, marked, elsewhere, args), marked)


def test_drawing():
    some, others, nobody = torch.tensor([3, 5]), torch.tensor([10, 11, 12]), torch.zeros(0, dtype=torch.long)
    drawn = sr.drawing(some, others, 0.7)(1000)
    assert len(drawn) == 1000 and int((drawn < 10).sum()) == 700
    assert set(drawn.tolist()) == {3, 5, 10, 11, 12}
    assert (sr.drawing(some, others, 0.0)(50) >= 10).all() and (sr.drawing(some, others, 1.0)(50) < 10).all()
    assert set(sr.drawing(nobody, others, 0.7)(200).tolist()) == {10, 11, 12}
    assert set(sr.drawing(some, nobody, 0.7)(200).tolist()) == {3, 5}


# ------------------------------------------------------------------------------------------------------ what is kept

def apart(values):
    """A grid whose voxels are far from each other: one in each row of values (n, F), and a mask of all."""
    values = torch.tensor(values)
    mask = torch.zeros(4 * len(values), 3, 3, dtype=torch.bool)
    mask[torch.arange(len(values)) * 4 + 1, 1, 1] = True
    return grid_from(mask, values)


FLAGS = SimpleNamespace(compress=True, as_released=False, drop_colour=0.09)
RELEASED = SimpleNamespace(compress=True, as_released=True, drop_colour=0.09)


def test_difference_by_hand():
    before = apart([[5.0, 0, 0, 0], [-1.0, 0, 0, 0], [20.0, 0, 0, 0], [5.0, 0, 0, 0], [20.0, 0.2, 0.2, 0.2]])
    after = apart([[8.0, 0, 0, 0],                                                                 # denser: alpha 0.39 -> 0.55
                   [-1.0, 5, 5, 5],                                                                # another colour, invisible
                   [20.0, 0.2, -0.2, 0.1],                                                         # another colour, alpha 0.86: 0.43
                   [5.05, 0.1, 0, 0],                                                              # hardly anything
                   [-3.0, 0.2, 0.2, 0.2]])                                                         # gone
    grid, keep = sr.difference(before, after, 0.1, 0.05, 0.3, FLAGS)
    assert keep.tolist() == [True, False, True, False, True] and same(grid, after)                 # old voxels stay in it
    grid, keep = sr.difference(before, after, 0.1, 0.05, 0.45, RELEASED)
    assert keep.tolist() == [False, True, True, False, False] and same(grid, after)
    assert not sr.difference(before, after, 0.1, 0.05, 0.44, FLAGS)[1][3]
    assert sr.difference(before, after, 0.1, 0.05, 0.44, FLAGS)[1].tolist() == [True, False, False, False, True]      # 0.86 x 0.5 = 0.432


def test_difference_sees_a_colour_where_a_neighbour_shows_it():
    """An empty voxel beside a dense one tints it: interpolation reaches from one to the other, diagonally too, but no farther."""
    mask = torch.zeros(6, 3, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 1, 1] = True
    before = grid_from(mask, torch.tensor([[50.0, 0], [0.0, 0], [0.0, 0]]))
    after = grid_from(mask, torch.tensor([[50.0, 0], [0.0, 1], [0.0, 1]]))
    assert sr.difference(before, after, 0.1, 0.05, 0.3, FLAGS)[1].tolist() == [False, True, False]
    after.values[0, 0] = 0.0                                                                       # or where one did before
    assert sr.difference(before, after, 0.1, 0.05, 0.3, FLAGS)[1].tolist() == [True, True, False]


def test_difference_of_new_voxels():
    mask = torch.zeros(13, 3, 3, dtype=torch.bool)
    mask[[1, 4, 7, 10], 1, 1] = True
    old = mask.clone()
    old[4:] = False
    before = grid_from(old, torch.tensor([[9.0, 0.1]]))
    after = grid_from(mask, torch.tensor([[9.0, 0.1], [0.3, 2.0], [3.0, 0.0], [0.0, 0.05]]))
    grid, keep = sr.difference(before, after, 0.1, 0.05, 0.3, FLAGS)
    want = mask.clone()
    want[4] = want[10] = False                                                                     # idle: next to nothing to be seen
    assert torch.equal(active(grid), want) and keep.tolist() == [False, False] and torch.equal(grid.values, after.values[[0, 2]])
    grid, keep = sr.difference(before, after, 0.1, 0.05, 0.3, RELEASED)
    assert grid.values[:, 1].tolist() == pytest.approx([0.1, 2.0]) and keep.tolist() == [False, False]               # by colour alone
    grid, keep = sr.difference(before, after, 0.1, 0.05, 0.3, replace_(FLAGS, compress=False))
    assert same(grid, after) and keep.tolist() == [False] * 4


def replace_(flags, **more):
    return SimpleNamespace(**{**vars(flags), **more})


def test_difference_without_compression_and_of_equal_grids():
    before, after = random_grid(1), random_grid(1)
    touched = torch.rand(len(after.values), generator=torch.Generator().manual_seed(0)) < 0.5
    after.values[touched, 5] += 1e-6
    touched &= after.values[:, 5] != before.values[:, 5]
    off = replace_(FLAGS, compress=False)
    grid, keep = sr.difference(before, after, 0.1, 0.05, 0.3, off)
    assert same(grid, after) and torch.equal(keep, touched) and 10 < keep.sum() < len(keep)
    untouched = sr.restrict(before, torch.ones(SIZE, dtype=torch.bool))                            # new ones that nothing has touched
    assert same(sr.difference(before, untouched, 0.1, 0.05, 0.3, off)[0], before)
    for flags in (FLAGS, RELEASED, off):
        grid, keep = sr.difference(before, random_grid(1), 0.1, 0.05, 0.3, flags)
        assert same(grid, before) and not keep.any()


# ------------------------------------------------------------------------------------------------------ the stream: one frame

def test_key_frame_is_exact_to_fp16():
    grid = random_grid(1)
    grid.values[0, 0], grid.values[1, 0] = 1e6, -1e6                            # beyond fp16: the largest there is
    out = decode_frame(INT8, KEY, encode_frame(INT8, None, grid), None)
    assert torch.equal(out.links, grid.links) and torch.equal(out.values, grid.values.clamp(-65504, 65504).half().float())


@pytest.mark.parametrize("header", [HEADER, INT8])
def test_delta_stores_what_it_should_and_nothing_else(header):
    for seed in range(1, 25):
        prev = decode_frame(header, KEY, encode_frame(header, None, random_grid(seed)), None)
        new, keep = next_of(seed, prev)
        out = decode_frame(header, DELTA, encode_frame(header, prev, new, keep), prev)
        assert torch.equal(out.links, new.links)
        old = active(prev)[active(new)]
        before = dense(prev)[active(new)]
        assert torch.equal(out.values[old & ~keep], before[old & ~keep])        # to the bit
        stored = ~old | keep
        if header.values == "fp16":
            assert torch.equal(out.values[stored], new.values[stored].half().float())
        else:                                                                   # before is 0 where a voxel is new
            want, had, got = (compand(v[stored].numpy()) for v in (new.values, before, out.values))
            scale = np.maximum([0.02] + [0.005] * 12, np.abs(want - had).max(0) / 127)
            error = np.abs(got - want)
            assert (error <= 0.5 * scale * (1 + 1e-4)).all() and error.max() > 0.25 * scale.min()


def test_int8_step_is_the_finest_scale():
    prev = grid_from(torch.ones(SIZE, dtype=torch.bool), torch.zeros(210, 13))
    new = Grid(prev.links, torch.full((210, 13), 0.0074))                       # 1.48 steps of 0.005; density: sqrt = 0.086 = 4.3 steps
    out = decode_frame(INT8, DELTA, encode_frame(INT8, prev, new, torch.ones(210, dtype=torch.bool)), prev)
    assert torch.equal(out.values[:, 1:], torch.full((210, 12), np.float32(0.005).item()))
    assert torch.allclose(out.values[:, 0], torch.tensor(0.08 ** 2))


@pytest.mark.parametrize("header", [HEADER, INT8])
def test_same_frame_and_empty_grids(header):
    empty, grid = random_grid(0, share=0), random_grid(2)
    nothing = torch.zeros(len(grid.values), dtype=torch.bool)
    payload = encode_frame(header, grid, grid, nothing)
    assert len(payload) < 40 and same(decode_frame(header, DELTA, payload, grid), grid)
    all_zero = torch.zeros(0, dtype=torch.bool)
    assert same(decode_frame(header, KEY, encode_frame(header, None, empty), None), empty)
    assert same(decode_frame(header, DELTA, encode_frame(header, empty, empty, all_zero), empty), empty)
    assert same(decode_frame(header, DELTA, encode_frame(header, grid, empty, all_zero), grid), empty)
    again = decode_frame(header, DELTA, encode_frame(header, empty, grid, nothing), empty)
    assert torch.equal(again.links, grid.links)


@pytest.mark.parametrize("degree", [0, 2, 4])
def test_other_sizes(degree):
    F = 1 + 3 * (degree + 1) ** 2
    for size in ((1, 1, 1), (2, 3, 4), (9, 1, 8)):
        for values in ("fp16", "int8"):
            h = replace(HEADER, degree=degree, size=size, values=values)
            a, b = random_grid(1, 0.5, F, size), random_grid(2, 0.5, F, size)
            a = decode_frame(h, KEY, encode_frame(h, None, a), None)
            keep = torch.ones(len(b.values), dtype=torch.bool)
            out = decode_frame(h, DELTA, encode_frame(h, a, b, keep), a)
            assert torch.equal(out.links, b.links) and torch.isfinite(out.values).all()


def test_a_value_that_is_not_finite_is_refused():
    grid = random_grid(1)
    grid.values[3, 2] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        encode_frame(HEADER, None, grid)


def test_payloads_that_lie():
    full, zeros = b"\xff" * 27, bytes(27)                                       # 210 voxels; packbits leaves the last 6 bits 0
    prev = decode_frame(HEADER, KEY, encode_frame(HEADER, None, random_grid(3)), None)
    good = 210 * 13 * 2
    assert len(craft(HEADER, full + bytes(good)).values) == 210
    with pytest.raises(StreamDamaged, match="too short"):
        craft(HEADER, full + bytes(good - 1))
    with pytest.raises(StreamDamaged, match="too long"):
        craft(HEADER, zeros + b"x")
    with pytest.raises(StreamDamaged, match="does not end"):                    # a bomb: stops at a full lattice
        craft(HEADER, full + bytes(10 ** 8))
    with pytest.raises(StreamDamaged, match="too short"):
        craft(HEADER, b"")
    with pytest.raises(StreamDamaged, match="too short"):
        craft(HEADER, zeros + b"\xff", prev, DELTA)                             # keep bits missing
    with pytest.raises(StreamDamaged, match="not finite"):
        craft(HEADER, full + np.full(210 * 13, 0x7c00, "<u2").view("u1").reshape(-1, 2).T.tobytes())     # infinity
    for scale in (float("nan"), float("inf")):
        with pytest.raises(StreamDamaged, match="not finite"):
            craft(INT8, full + struct.pack("<13f", *[scale] * 13) + b"\1" * 210 * 13, random_grid(0, share=0), DELTA)
    payload = encode_frame(HEADER, None, random_grid(3))
    for bad in (payload[:-1], payload + b"\0", b"", b"garbage", payload[:10] + payload[11:]):
        with pytest.raises(StreamDamaged):
            decode_frame(HEADER, KEY, bad, None)
    with pytest.raises(StreamDamaged, match="without a frame before"):
        decode_frame(HEADER, DELTA, payload, None)


# ------------------------------------------------------------------------------------------------------ the stream: the file

@pytest.mark.parametrize("header", [HEADER, INT8])
def test_stream_equals_encoder_to_the_bit(tmp_path, header, capsys):
    truth = write_stream(tmp_path / "s", header, 23)
    reader = StreamReader(tmp_path / "s")
    out = list(reader.frames())
    assert [t for t, _ in out] == list(range(23)) and all(same(grid, true) for (_, grid), true in zip(out, truth))
    assert all(same(reader.seek(t), truth[t]) for t in random.Random(0).sample(range(23), 23))
    assert [t for t, _ in reader.frames(start=6)] == list(range(6, 23)) and same(next(reader.frames(6))[1], truth[6])
    assert [kind for kind, _ in reader.entries] == [KEY if t % 4 == 0 else DELTA for t in range(23)]
    payloads = [len(payload) for _, _, payload, _ in encode(header, 23)]
    assert reader.sizes == [n + sr.RECORD.size for n in payloads] and len(reader) == 23
    assert capsys.readouterr().err == ""
    for t in (-1, 23):
        with pytest.raises(UserError, match="no frame"):
            reader.seek(t)


def test_header_comes_back(tmp_path):
    for header in (HEADER, replace(INT8, ndc=True, size=(512, 256, 3), K=torch.zeros(0, 3, 3), c2w=torch.zeros(0, 3, 4))):
        StreamWriter(tmp_path / "s", header, resume_at=0).close()
        with open(tmp_path / "s", "rb") as file:
            h = sr.read_header(file, "s")
        for name, value in vars(header).items():
            got = getattr(h, name)
            assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value if not isinstance(value, float) else \
                got == np.float32(value), name
        assert pack_header(h) == pack_header(header)
        (tmp_path / "s").unlink()


def test_bad_headers(tmp_path):
    write_stream(tmp_path / "s", n=1)
    good = (tmp_path / "s").read_bytes()

    def complaint(data):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(UserError) as error:
            StreamReader(tmp_path / "bad")
        assert "\n" not in str(error.value) and "bad" in str(error.value)
        return str(error.value)
    assert "not a StreamRF stream" in complaint(b"GIF89a" + good[6:])
    assert "not a StreamRF stream" in complaint(b"")
    newer = good[:8] + struct.pack("<H", 2) + good[10:]
    assert "format 2" in complaint(newer) and "reads format 1" in complaint(newer)
    assert "header is damaged" in complaint(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    assert "header is damaged" in complaint(good[:30])
    assert "no frame" in complaint(good[:len(pack_header(HEADER))])
    with pytest.raises(UserError, match="cannot be read"):
        StreamReader(tmp_path / "missing")
    for change in (dict(size=(70000, 1, 1)), dict(size=(0, 4, 4)), dict(size=(2000, 2000, 2000)), dict(sh_step=0.0)):
        with pytest.raises(UserError, match="needs"):
            StreamWriter(tmp_path / "new", replace(HEADER, **change))
        assert not (tmp_path / "new").exists()


def played(path, truth, capsys):
    """What a damaged file gives: the frames, checked against the truth, and the one line that said so."""
    try:
        reader = StreamReader(path)
    except UserError as error:
        return 0, str(error)
    out = list(reader.frames())
    assert [t for t, _ in out] == list(range(len(reader))) and all(same(grid, truth[t]) for t, grid in out)
    return len(out), capsys.readouterr().err


@pytest.mark.parametrize("closed", [True, False])
def test_a_cut_anywhere_gives_the_frames_before_it(tmp_path, closed, capsys):
    truth = write_stream(tmp_path / "s", INT8, 7, closed)
    data = (tmp_path / "s").read_bytes()
    reader = StreamReader(tmp_path / "s")
    assert ("not finished" in capsys.readouterr().err) == (not closed)
    ends = [at + size for (_, at), size in zip(reader.entries, reader.sizes)]
    rng = random.Random(1)
    cuts = {rng.randrange(len(data)) for _ in range(60)} | {c + d for c in ends for d in (-1, 0, 1, 3, 4, 5)}
    cuts |= set(range(ends[-1], len(data)))
    cuts = {c for c in cuts if c < len(data)}
    for cut in cuts:
        (tmp_path / "s").write_bytes(data[:cut])
        n, line = played(tmp_path / "s", truth, capsys)
        assert n == sum(end <= cut for end in ends) and line.strip() and line.strip().count("\n") == 0, cut
    assert len(cuts) > 80


def test_a_flipped_bit_anywhere_gives_the_frames_before_it(tmp_path, capsys):
    truth = write_stream(tmp_path / "s", HEADER, 7)
    data = (tmp_path / "s").read_bytes()
    reader = StreamReader(tmp_path / "s")
    starts = [at for _, at in reader.entries]
    end = starts[-1] + reader.sizes[-1]
    rng, seen = random.Random(2), {"header": 0, "record": 0, "index": 0}
    places = [rng.randrange(len(data)) for _ in range(140)] + [s + i for s in starts for i in range(sr.RECORD.size)] + \
        list(range(end, len(data))) + [rng.randrange(starts[0]) for _ in range(20)]
    for place in places:
        bad = bytearray(data)
        bad[place] ^= 1 << rng.randrange(8)
        (tmp_path / "s").write_bytes(bad)
        n, line = played(tmp_path / "s", truth, capsys)
        assert line.strip() and line.strip().count("\n") == 0
        assert n == (0 if place < starts[0] else sum(s <= place for s in starts) - 1 if place < end else 7), place
        seen["header" if place < starts[0] else "record" if place < end else "index"] += 1
    assert min(seen.values()) >= 20 and sum(seen.values()) > 300, seen


def test_junk_is_noticed(tmp_path, capsys):
    truth = write_stream(tmp_path / "s", HEADER, 5)
    data = (tmp_path / "s").read_bytes()
    entries = StreamReader(tmp_path / "s").entries
    third = slice(entries[3][1], entries[4][1])
    for bad, n in ((data + b"x", 5), (data[:third.start] + data[third.stop:], 3), (data[:third.stop] + data[third.start:], 4),
                   (data[:third.start] + bytes(1000), 3), (data[:third.start] + b"FRAM" + b"\xff" * 40, 3)):
        (tmp_path / "s").write_bytes(bad)
        count, line = played(tmp_path / "s", truth, capsys)
        assert count == n and "warning" in line and f"playing the first {n} frames" in line and line.count("\n") == 1


def test_damage_messages(tmp_path, capsys):
    write_stream(tmp_path / "s", HEADER, 5)
    data = bytearray((tmp_path / "s").read_bytes())
    data[StreamReader(tmp_path / "s").entries[3][1] + 30] ^= 4
    (tmp_path / "s").write_bytes(data)
    reader = StreamReader(tmp_path / "s")
    assert capsys.readouterr().err == f"warning: {tmp_path / 's'}: record 3 is damaged (checksum): playing the first 3 frames\n"
    assert len(reader) == len(reader.sizes) == 3
    (tmp_path / "s").write_bytes(data[:reader.entries[2][1] + 40])
    assert len(StreamReader(tmp_path / "s")) == 2 and "record 2 is damaged (cut short)" in capsys.readouterr().err


def test_right_checksum_wrong_content(tmp_path):
    first = next(encode(HEADER, 1))[2]
    short = lzma.compress(bytes(27), lzma.FORMAT_RAW, filters=sr.LZMA)
    for kind, payload in ((DELTA, b"garbage"), (DELTA, short), (KEY, first + b"\0")):
        (tmp_path / "s").write_bytes(pack_header(HEADER) + pack_record(0, KEY, first) + pack_record(1, kind, payload))
        frames = StreamReader(tmp_path / "s").frames()
        assert next(frames)[0] == 0
        with pytest.raises(StreamDamaged, match="frame 1"):
            next(frames)
    (tmp_path / "s").write_bytes(pack_header(HEADER) + pack_record(0, DELTA, first))
    with pytest.raises(UserError, match="no such kind"):
        StreamReader(tmp_path / "s")


def test_a_file_that_is_damaged_after_opening(tmp_path):
    write_stream(tmp_path / "s", HEADER, 5)
    reader = StreamReader(tmp_path / "s")
    data = bytearray((tmp_path / "s").read_bytes())
    data[reader.entries[2][1] + 25] ^= 1
    (tmp_path / "s").write_bytes(data)
    frames = reader.frames()
    assert [next(frames)[0], next(frames)[0]] == [0, 1]
    with pytest.raises(StreamDamaged, match="record 2 is damaged"):
        next(frames)


# ------------------------------------------------------------------------------------------------------ the stream: resumed

@pytest.mark.parametrize("moment", ["whole record", "half a record", "after close", "half a header", "nothing"])
def test_resume_gives_the_same_bytes(tmp_path, moment):
    truth = write_stream(tmp_path / "whole", INT8, 10)
    want = (tmp_path / "whole").read_bytes()
    entries = StreamReader(tmp_path / "whole").entries
    n = 0 if moment in ("half a header", "nothing") else 6
    have = {"whole record": want[:entries[6][1]], "half a record": want[:entries[7][1] + 40], "after close": want,
            "half a header": want[:50], "nothing": None}[moment]
    if have is not None:
        (tmp_path / "s").write_bytes(have)
    writer = StreamWriter(tmp_path / "s", INT8, resume_at=n)
    for t, kind, payload, _ in encode(INT8, 10, n, truth[n - 1] if n else None):
        writer.append(t, kind, payload)
    writer.close()
    assert (tmp_path / "s").read_bytes() == want


def test_resume_cuts_off_what_follows(tmp_path):
    write_stream(tmp_path / "ten", HEADER, 10)
    write_stream(tmp_path / "four", HEADER, 4)
    StreamWriter(tmp_path / "ten", HEADER, resume_at=4).close()
    assert (tmp_path / "ten").read_bytes() == (tmp_path / "four").read_bytes()


def test_seek_starts_at_the_nearest_key_frame(tmp_path, monkeypatch):
    write_stream(tmp_path / "s", HEADER, 12)
    reader, decoded = StreamReader(tmp_path / "s"), []
    monkeypatch.setattr(sr, "decode_frame", lambda header, kind, *rest: decoded.append(kind) or decode_frame(header, kind, *rest))
    reader.seek(10)
    assert decoded == [KEY, DELTA, DELTA]                                       # 8, 9, 10


def test_resume_and_overwrite_are_refused(tmp_path):
    write_stream(tmp_path / "s", HEADER, 5, close=False)
    data = (tmp_path / "s").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        StreamWriter(tmp_path / "s", HEADER)
    with pytest.raises(UserError, match="other settings"):
        StreamWriter(tmp_path / "s", replace(HEADER, key_every=5), resume_at=3)
    with pytest.raises(UserError, match="holds 5 whole frames"):
        StreamWriter(tmp_path / "s", HEADER, resume_at=6)
    with pytest.raises(UserError, match="does not exist"):
        StreamWriter(tmp_path / "t", HEADER, resume_at=1)
    assert (tmp_path / "s").read_bytes() == data                                # nothing harmed
    writer = StreamWriter(tmp_path / "s", HEADER, resume_at=5)
    for t, kind in ((4, KEY), (6, KEY)):
        with pytest.raises(ValueError):
            writer.append(t, kind, b"")
    damaged = bytearray(data)
    damaged[StreamReader(tmp_path / "s").entries[2][1] + 30] ^= 1
    (tmp_path / "s").write_bytes(damaged)
    with pytest.raises(UserError, match="holds 2 whole frames"):
        StreamWriter(tmp_path / "s", HEADER, resume_at=4)


def test_frames_are_on_disk_when_append_returns(tmp_path, capsys):
    writer = StreamWriter(tmp_path / "s", HEADER)
    for t, kind, payload, grid in encode(HEADER, 3):
        assert writer.append(t, kind, payload) == len(payload) + sr.RECORD.size
        reader = StreamReader(tmp_path / "s")                                   # while it is being written
        assert len(reader) == t + 1 and same(reader.seek(t), grid)
        assert "not finished" in capsys.readouterr().err
    writer.close()


# ------------------------------------------------------------------------------------------------------ one frame of tuning

SMALL = dict(size=24, frames=3, lattice=(16, 16, 16), degree=1, halvings=1, steps=60, rays=256, pilot_steps=4, tune_steps=8, tune_rays=256,
             lr_density=(3.0, 0.3), lr_colour=(0.05, 0.002), tune_lr_density=(3.0, 1.0), tune_lr_colour=(0.1, 0.01), threshold=5.0, ring=2, depth=3,
             tv_density=5e-4, tv_colour=5e-3, keep_density=0.05, keep_colour=0.3, damp=1.0, mode="full", aim="changed", hull=True, birth=5.0,
             memory=3, change=0.03, changed_share=0.7, values="int8", key_every=30, seed=0, device="cpu", data="no such folder")


def small(out=None, **more):
    return replace(Args(), **{**SMALL, "out": None if out is None else str(out), **more})


def truth_of(video, views):
    return views.images[video.train].flatten(0, 2)


@pytest.fixture(scope="module")
def begun(film):
    """Frame 0, as decoded, and its pilot: video, header, full, pilot."""
    torch.manual_seed(0)
    video, views = film
    args, truth = small(), truth_of(video, views[0])
    header = StreamHeader(args.lattice, video.aabb, 1, video.bg, "int8", args.density_step, args.sh_step, 30, 10.0, video.near, video.far, False,
                          video.K, video.c2w, 2, 24, 24)
    full = decode_frame(header, KEY, encode_frame(header, None, sr.from_scratch(video, truth, args)[0]), None)
    pilot = sr.resample(full, (8, 8, 8), args.threshold, 1)
    sr.tune(pilot, video, truth, 8, 256, (args.tune_lr_density, args.tune_lr_colour), args)
    return video, header, full, pilot


def next_one(begun, film, t=1, recent=None, **more):
    """next_frame from frame 0 to frame t, always from the same random state; inputs must not change."""
    video, header, full, pilot = begun
    args, views = small(**more), film[1]
    if recent is None:
        recent = sr.changed_pixels(views[t].images[video.train], views[0].images[video.train], args.change)
    before = [x.clone() for x in (full.links, full.values, pilot.links, pilot.values)]
    torch.manual_seed(1)
    out = sr.next_frame(full, pilot, video, truth_of(video, views[t]), recent, args)
    assert all(torch.equal(a, b) for a, b in zip(before, (full.links, full.values, pilot.links, pilot.values)))
    return out


@pytest.mark.parametrize("more", [dict(mode=mode) for mode in ("warm", "band", "pilot", "full")]
                         + [dict(compress=False), dict(hull=False), dict(aim="all"), dict(aim="crossing"), dict(clearing=False), dict(seeding=False), dict(birth=0.0)],
                         ids=str)
def test_next_frame_leaves_the_rest_alone(begun, film, more):
    video, header, full, _ = begun
    grid, keep, pilot, M, used = next_one(begun, film, **more)
    out = decode_frame(header, DELTA, encode_frame(header, full, grid, keep), full)
    A, Q = active(full), active(out)
    assert torch.equal(Q, active(grid)) and keep.shape == (len(grid.values),) and M.shape == A.shape and M.dtype == torch.bool
    assert torch.equal((A & ~M), (Q & ~M))                                                         # outside M voxels neither come nor go
    assert torch.equal(dense(out)[~M], dense(full)[~M])                                            # and are the same to the bit
    stored = torch.zeros_like(Q)
    stored[Q] = keep
    assert not (stored & ~(M & A)).any() and (stored.any() or more.get("mode") == "warm")
    assert torch.equal(dense(out)[A & Q & ~stored], dense(full)[A & Q & ~stored])                  # put back
    assert used == 256 * (8 + 4 * (more.get("mode", "full") in ("pilot", "full"))) and 0 < M.sum()
    assert (more.get("mode", "full") in ("warm", "band")) == (pilot is begun[3])


def test_masks_nest(begun, film):
    video, _, full, _ = begun
    mask = lambda **more: next_one(begun, film, **more)[3]
    A = active(full)
    band = sr.dilate(A, 2) & ~sr.erode(A, 3)
    assert mask(mode="warm", hull=False).all() and torch.equal(mask(mode="band", hull=False), band) and 0 < band.sum() < band.numel()
    recent = sr.changed_pixels(film[1][1].images[video.train], film[1][0].images[video.train], 0.03)
    H = sr.dilate(sr.hull(video, recent, A.shape), 2)
    assert torch.equal(mask(mode="warm"), H) and torch.equal(mask(mode="band"), band & H) and 0 < H.sum() < H.numel()
    for hull in (False, True):
        pilot, full_ = mask(mode="pilot", hull=hull), mask(mode="full", hull=hull)
        assert not (full_ & ~pilot).any() and (pilot & ~full_).any()
        assert torch.equal(full_ & band, pilot & band)                                             # beyond the band: where the pilot is new
        assert not hull or not (pilot & ~H).any()
    released = mask(as_released=True, hull=False, birth=0.0)
    assert not (released & ~band).any() and released.any()


def test_where_a_frame_s_rays_come_from(begun, film, monkeypatch):
    video, _, full, _ = begun
    recent, drawn = torch.zeros(12, 24, 24, dtype=torch.bool), {}
    recent[:, 8:14, 9:14] = True
    lately = set(recent.flatten().nonzero()[:, 0].tolist())
    parameters = list(inspect.signature(sr.tune).parameters)
    monkeypatch.setattr(sr, "tune", lambda *words, **more: drawn.update(**dict(zip(parameters, words)), **more) or 0)
    for aim in ("all", "crossing", "changed"):
        M = next_one(begun, film, recent=recent, mode="warm", aim=aim)[3]
        meets = set(sr.crossing(M & active(drawn["grid"]), video, torch.arange(12 * 576)).tolist())
        assert len(lately) < len(meets) < 0.9 * 12 * 576
        pixels = drawn["draw"](1000).tolist()
        outside, share = sum(pixel not in meets | lately for pixel in pixels), sum(pixel in lately for pixel in pixels) / 1000
        assert outside > 50 if aim == "all" else outside == 0
        assert share >= 0.7 if aim == "changed" else share < 0.4


def test_an_identical_frame_changes_nothing(begun, film):
    """Nothing changed lately: M is empty, nothing is stored, and not a bit moves, however much the pilot trembles."""
    video, header, full, _ = begun
    recent = torch.zeros(12, 24, 24, dtype=torch.bool)
    for mode in ("warm", "band", "pilot", "full"):
        grid, keep, _, M, _ = next_one(begun, film, t=0, recent=recent, mode=mode, birth=0.0)
        payload = encode_frame(header, full, grid, keep)
        assert not M.any() and not keep.any() and len(payload) < 40
        assert same(decode_frame(header, DELTA, payload, full), full)


def test_an_appearing_voxel_starts_as_the_pilot_has_it(begun, film, monkeypatch):
    """Added voxels of the pilot, well inside M and away from all there is: the full model gets them, with the pilot's values."""
    video, header, full, pilot = begun
    A = active(full)
    free = ~sr.dilate(A, 2)
    added = torch.nn.functional.max_pool3d((~free).float()[None, None], 2)[0, 0] == 0              # pilot voxels whose eight points are free
    if not added.any():
        pytest.skip("no room")
    new = sr.restrict(pilot, active(pilot) | added)
    new.values[new.links[added].long()] = torch.tensor([30.0] + [0.3] * 12)
    changed, none = added.clone(), torch.zeros_like(added)
    monkeypatch.setattr(sr, "next_pilot", lambda *_: (new, (changed, added, none), 0))
    seeded = {}
    monkeypatch.setattr(sr, "tune", lambda grid, *rest: seeded.update(grid=Grid(grid.links, grid.values.clone())) or 0)
    grid, keep, _, M, _ = next_one(begun, film, mode="full", hull=False)
    at = sr.upsample(added, A.shape) & ~A
    assert torch.equal(M, sr.dilate(sr.upsample(changed, A.shape)) & (sr.dilate(A, 2) & ~sr.erode(A, 3) | sr.upsample(added, A.shape)))
    assert at.any() and (M & at).equal(at) and active(seeded["grid"])[at].all()
    want = sr.lookup(new, sr.on_lattice(at, (8, 8, 8)))
    assert torch.equal(seeded["grid"].values[seeded["grid"].links[at].long()], want) and (want[:, 0] > 5).any()
    assert (active(grid) & at & ~A).any()                                                          # and dense ones survive
    next_one(begun, film, mode="full", hull=False, seeding=False)
    rows = seeded["grid"].links[at]
    assert (seeded["grid"].values[rows[rows >= 0].long()] == 0).all()
    added[:] = changed[:] = sr.dilate(active(pilot)) & ~active(pilot)                              # beside what there is: that keeps its values
    new = sr.restrict(pilot, active(pilot) | added)
    new.values[new.links[added].long()] = torch.tensor([30.0] + [0.3] * 12)
    next_one(begun, film, mode="full", hull=False)
    assert (sr.upsample(added, A.shape) & A).any() and torch.equal(dense(seeded["grid"])[A], dense(full)[A])


def test_a_voxel_outside_m_stays_though_nothing_solid_is_near(begun, film):
    video, header, full, pilot = begun
    A = active(full)
    lonely = (~sr.dilate(sr.solid(full, 5.0), 3)).nonzero()[0].tolist()
    mask = A.clone()
    mask[tuple(lonely)] = True
    full = sr.restrict(full, mask)
    full.values[full.links[tuple(lonely)].long(), 0] = 1.0
    recent = torch.zeros(12, 24, 24, dtype=torch.bool)                                             # M is empty
    grid = next_one((video, header, full, pilot), film, t=0, recent=recent, mode="warm")[0]
    assert same(grid, full)


def test_a_vanished_voxel_starts_from_nothing_inside_m_only(begun, film, monkeypatch):
    video, header, full, pilot = begun
    A, removed = active(full), active(pilot) & (torch.rand(8, 8, 8) < 0.2)
    monkeypatch.setattr(sr, "next_pilot", lambda *_: (sr.restrict(pilot, active(pilot) & ~removed), (~removed & False, ~removed & False, removed), 0))
    seeded = {}
    monkeypatch.setattr(sr, "tune", lambda grid, *rest: seeded.update(grid=Grid(grid.links, grid.values.clone())) or 0)
    for more in (dict(clearing=True), dict(clearing=False)):
        M = next_one(begun, film, mode="full", **more)[3]
        gone = sr.upsample(removed, A.shape) & A
        assert (gone & M).any() and (gone & ~M).any()
        cleared = dense(seeded["grid"])
        assert torch.equal(cleared[gone & ~M], dense(full)[gone & ~M])
        assert (cleared[gone & M] == 0).all() == more["clearing"]
        assert torch.equal(cleared[A & ~gone], dense(full)[A & ~gone])


def test_pilot_masks_and_birth(begun, film):
    """next_pilot's masks say what differs between the pilot before and after; births only where pixels are not explained."""
    video, _, _, pilot = begun
    args, views = small(pilot_steps=6), film[1]
    recent = sr.changed_pixels(views[2].images[video.train], views[0].images[video.train], 0.03)
    new, (changed, added, removed), used = sr.next_pilot(pilot, video, truth_of(video, views[2]), recent, 0.25, None, args)
    A, Q = active(pilot), active(new)
    assert torch.equal(added, Q & ~A) and torch.equal(removed, A & ~Q) and not (added & ~changed).any() and used == 6 * 256
    different = (dense(new) != dense(pilot)).any(-1)
    assert torch.equal(different & Q & A, changed & A) and changed.any()                           # the others were put back
    ball = seen_ball(video, (-0.4, -0.6, 0.6), 0.3)                                                # in the air: nothing is there
    floor = torch.zeros(8, 8, 8, dtype=torch.bool)
    floor[:, :, 0] = True
    pilot, born = grid_from(floor, torch.tensor([[50.0] + [0.1] * 12]).repeat(64, 1)), {}
    for birth in (0.0, 7.0):
        born[birth] = sr.next_pilot(pilot, video, truth_of(video, views[0]), ball, 0.25, None, small(pilot_steps=0, birth=birth))[1][1]
    assert born[7.0][2, 1, 6] and not born[0.0].any()
    wide = sr.hull(video, ball, (8, 8, 8))
    assert not (born[7.0] & ~wide).any() and not born[7.0][:, :, :2].any() and born[7.0].sum() < 60


def test_tune_moves_only_the_rows_of_the_mask(begun, film):
    video, _, full, _ = begun
    args, truth = small(), truth_of(video, film[1][0])
    mask = torch.rand(len(full.values)) < 0.3
    grid, drawn = Grid(full.links, full.values.clone()), []

    def draw(n):
        drawn.append(n)
        return torch.randint(len(truth), (n,))
    assert sr.tune(grid, video, truth, 5, 200, ((3.0, 1.0), (0.1, 0.01)), args, mask, draw) == 1000 and drawn == [200] * 5
    assert torch.equal(grid.values[~mask], full.values[~mask]) and (grid.values[mask] != full.values[mask]).any(1).float().mean() > 0.3
    assert not grid.values.requires_grad


def test_tune_s_learning_rates(begun, film, monkeypatch):
    video, _, full, _ = begun
    rates, step = [], sr.LazyRMSProp.step
    monkeypatch.setattr(sr.LazyRMSProp, "step", lambda self, values, grad, lr: (rates.append(lr.tolist()), step(self, values, grad, lr))[1])
    sr.tune(Grid(full.links, full.values.clone()), video, truth_of(video, film[1][0]), 4, 64, ((8.0, 0.5), (0.1, 0.1)), small(), span=(0.5, 1.0))
    assert [rate[0] for rate in rates] == pytest.approx([2.0, 2 * 0.25 ** 0.25, 1.0, 2 * 0.25 ** 0.75])      # half way from 8 to 1/2: 2
    assert all(rate[1:] == pytest.approx([0.1] * 12) for rate in rates)


# ------------------------------------------------------------------------------------------------------ training

def without_seconds(path):
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines(path)]


@pytest.fixture(scope="module")
def stage_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stage"
    return folder, sr.train(small(folder, steps=150, tune_steps=20))


def test_a_run_s_folder_and_summary(stage_run):
    folder, summary = stage_run
    names = {path.name for path in folder.iterdir()}
    assert names == {"args.json", "env.json", "metrics.jsonl", "summary.json", "ckpt.pt", "stream.srf", *(f"test_{t:03d}.png" for t in range(3))}
    assert json.loads((folder / "summary.json").read_text()).keys() == summary.keys()
    assert {"method", "scene", "data", "size", "seed", "steps", "train_seconds", "peak_memory_mb", "psnr", "ssim", "psnr_moving", "mode", "frames",
            "seconds_first", "seconds_per_frame", "rays_per_frame", "bytes_first", "bytes_per_frame", "bytes_full_frame_fp16", "bytes_dense_fp32",
            "trainable", "kept", "added", "per_frame"} <= summary.keys()
    assert (summary["method"], summary["scene"], summary["data"], summary["size"], summary["frames"]) == ("streamrf", "stage", "builtin", 24, 3)
    frames, curve = summary["per_frame"], lines(folder / "metrics.jsonl")
    assert len(frames) == 3 and [line["step"] for line in curve] == [0, 1, 2]
    for frame, line in zip(frames, curve):
        assert all(line[key] == pytest.approx(frame[key]) for key in frame)
    assert summary["psnr"] == pytest.approx(np.mean([f["psnr"] for f in frames])) and summary["psnr_moving"] is not None
    assert summary["bytes_per_frame"] == pytest.approx(np.mean([f["bytes"] for f in frames[1:]])) and summary["bytes_first"] == frames[0]["bytes"]
    assert summary["seconds_per_frame"] == pytest.approx(np.mean([f["seconds"] for f in frames[1:]]))
    assert summary["bytes_full_frame_fp16"] == pytest.approx(np.mean([f["voxels"] for f in frames]) * 26 + 512)
    assert summary["bytes_dense_fp32"] == 16 ** 3 * 13 * 4
    assert frames[0]["rays"] == 150 * 256 and frames[1]["rays"] == frames[2]["rays"] == (4 + 20) * 256
    reader = StreamReader(folder / "stream.srf")
    assert reader.sizes == [f["bytes"] for f in frames] and [kind for kind, _ in reader.entries] == [KEY, DELTA, DELTA]
    assert [f["voxels"] for f in frames] == [len(grid.values) for _, grid in reader.frames()]
    assert [f["key"] for f in frames] == [True, False, False]
    assert all(0 < f[key] < 1 for f in frames[1:] for key in ("trainable", "kept")) and frames[1]["bytes"] < 0.5 * frames[0]["bytes"]


def test_the_books_agree_with_the_stream(stage_run):
    """kept, added, removed: from the decoded frames alone."""
    folder, summary = stage_run
    grids = [grid for _, grid in StreamReader(folder / "stream.srf").frames()]
    for a, b, frame in zip(grids, grids[1:], summary["per_frame"][1:]):
        A, Q = active(a), active(b)
        assert frame["added"] == pytest.approx(float((Q & ~A).sum() / Q.sum()))
        moved = (dense(a) != dense(b)).any(-1) & Q
        assert moved.sum() / Q.sum() <= frame["kept"] + 1e-6 and frame["kept"] <= frame["trainable"] * (A | Q).sum() / Q.sum() + 1e-6


def test_what_was_scored_is_what_is_decoded(stage_run, film):
    folder, summary = stage_run
    video, views = film
    reader = StreamReader(folder / "stream.srf")
    header = reader.header
    assert header.held_out == 2 and torch.equal(header.c2w, video.c2w[video.test + video.train]) and torch.equal(header.K[0], video.K[0])
    for (t, grid), frame in zip(reader.frames(), summary["per_frame"]):
        pictures = torch.stack([sr.picture(grid, header, camera, small())["rgb"] for camera in range(2)])
        truth, moving = views[t].images[video.test], views[t].mask[video.test] > 0
        assert np.mean([float(common.psnr(a, b)) for a, b in zip(pictures, truth)]) == pytest.approx(frame["psnr"], abs=1e-4)
        assert -10 * math.log10(float((pictures - truth).square()[moving].mean())) == pytest.approx(frame["psnr_moving"], abs=1e-4)


def test_eval_only_scores_the_same_and_harms_nothing(stage_run):
    folder, summary = stage_run
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = sr.train(small(folder, steps=150, tune_steps=20, eval_only=True))
    for key in ("psnr", "ssim", "psnr_moving"):
        assert again[key] == pytest.approx(summary[key], abs=1e-6)
    assert again["frames"] == 3
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert after["stream.srf"] == files["stream.srf"] and after["ckpt.pt"] == files["ckpt.pt"]


def test_training_learns(stage_run, tmp_path):
    """Against a grid of one step (of a low threshold, or nothing would be left of it)."""
    untrained = sr.train(small(tmp_path / "a", steps=1, halvings=0, threshold=0.01, frames=1))
    assert stage_run[1]["per_frame"][0]["psnr"] > untrained["psnr"] + 3 and stage_run[1]["psnr"] > 18
    video, reader = common.load_video("stage", ".", 24, 3), StreamReader(stage_run[0] / "stream.srf")
    views, still = video.read(2), reader.seek(0)                                                   # frame 0, shown for ever
    moving = views.mask[video.test] > 0
    frozen = torch.stack([sr.picture(still, video, camera, small())["rgb"] for camera in video.test])
    frozen = -10 * math.log10(float((frozen - views.images[video.test]).square()[moving].mean()))
    assert stage_run[1]["per_frame"][2]["psnr_moving"] > frozen + 0.3


@pytest.mark.parametrize("more", [dict(mode="scratch"), dict(mode="warm"), dict(mode="band"), dict(mode="pilot"), dict(as_released=True), dict(as_released=True, mode="band"),
                                  dict(aim="all", hull=False), dict(aim="crossing"), dict(seeding=False, clearing=False), dict(values="fp16", key_every=1),
                                  dict(degree=2, lattice=(16, 8, 24), halvings=0), dict(degree=0, background="black", damp=0.0)], ids=str)
def test_every_flag_runs(tmp_path, more):
    summary = sr.train(small(tmp_path / "a", **{"frames": 2, "steps": 40, **more}))
    assert (8 if "background" in more else 12) < summary["psnr"] < 40 and summary["frames"] == 2 and summary["mode"] == more.get("mode", "full")
    reader = StreamReader(tmp_path / "a/stream.srf")
    keys = [KEY, KEY if more.get("mode") == "scratch" or more.get("key_every") == 1 else DELTA]
    assert [kind for kind, _ in reader.entries] == keys and reader.header.values == ("fp16" if more.get("as_released") else more.get("values", "int8"))
    assert summary["per_frame"][1]["rays"] == {"scratch": 40 * 256, "warm": 8 * 256, "band": 8 * 256}.get(summary["mode"], 12 * 256)


def test_without_compression_a_frame_is_larger(tmp_path):
    runs = {compress: sr.train(small(tmp_path / str(compress), frames=2, compress=compress)) for compress in (True, False)}
    assert runs[True]["bytes_first"] == runs[False]["bytes_first"]
    assert runs[False]["bytes_per_frame"] > 1.5 * runs[True]["bytes_per_frame"] and runs[False]["kept"] > runs[True]["kept"]


def test_same_seed_same_stream_and_no_look_at_later_frames(tmp_path):
    """Two frames of four are the first two of two: on the fly."""
    a, b, c = (sr.train(small(tmp_path / name, frames=n, seed=seed, steps=30)) for name, n, seed in (("a", 2, 0), ("b", 3, 0), ("c", 2, 1)))
    records = {name: (tmp_path / name / "stream.srf").read_bytes() for name in "abc"}
    end = StreamReader(tmp_path / "a/stream.srf").entries[1][1] + a["per_frame"][1]["bytes"]
    assert records["a"][:end] == records["b"][:end] and records["a"][:end] != records["c"][:end]


def test_memory_of_changed_pixels(tmp_path, monkeypatch):
    seen, changed = [], []
    real_next, real_changed = sr.next_frame, sr.changed_pixels
    monkeypatch.setattr(sr, "changed_pixels", lambda *words: changed.append(real_changed(*words)) or changed[-1])
    monkeypatch.setattr(sr, "next_frame", lambda full, pilot, video, truth, recent, args: seen.append(recent) or real_next(full, pilot, video, truth, recent, args))
    sr.train(small(tmp_path / "a", frames=4, memory=2, steps=20, tune_steps=1, pilot_steps=1))
    assert len(seen) == len(changed) == 3 and not torch.equal(changed[0], changed[1])
    assert torch.equal(seen[0], changed[0]) and torch.equal(seen[1], changed[0] | changed[1]) and torch.equal(seen[2], changed[1] | changed[2])


# ------------------------------------------------------------------------------------------------------ killed, resumed, and not harmed

FATAL = """
import os, signal, sys
sys.path.insert(0, {root!r})
import common, streamrf as s
moment, count = sys.argv.pop(1), [0]
def die(*words):
    os.kill(os.getpid(), signal.SIGKILL)
def at(n, real):
    def call(*words, **more):
        count[0] += 1
        if count[0] == n:
            die()
        return real(*words, **more)
    return call
if moment == "in frame 0":
    s.check_finite = at(25, s.check_finite)
if moment == "between append and checkpoint":
    s.Run.save = at(2, s.Run.save)
if moment == "half a record":
    def half(self, data, real=s.StreamWriter._write):
        count[0] += 1
        if count[0] == 3:
            self.file.write(data[:len(data) // 2]), self.file.flush(), die()
        real(self, data)
    s.StreamWriter._write = half
common.cli(s.PRESETS, s.train)
"""


def words_of(args):
    return conftest.words_of(vars(args))


def test_killed_three_times_and_resumed_ends_bit_equal(tmp_path):
    more = dict(frames=4, key_every=2, steps=40)
    sr.train(small(tmp_path / "a", **more))
    script = FATAL.format(root=str(ROOT))
    for moment, frames in (("in frame 0", 0), ("between append and checkpoint", 2), ("half a record", 2)):
        # killed in frame 0; frame 1 is in the stream and in the log, not in the checkpoint; frame 1 is done, of frame 2 there is half
        done = subprocess.run([sys.executable, "-c", script, moment, *words_of(small(tmp_path / "b", resume=(tmp_path / "b").exists(), **more))],
                              capture_output=True, text=True, timeout=300)
        assert done.returncode == -signal.SIGKILL, (moment, done)
        part = (tmp_path / "b/stream.srf").read_bytes()
        assert (tmp_path / "a/stream.srf").read_bytes().startswith(part[:-4])
        if frames:
            assert len(StreamReader(tmp_path / "b/stream.srf")) == frames
    sr.train(small(tmp_path / "b", resume=True, **more))
    assert (tmp_path / "a/stream.srf").read_bytes() == (tmp_path / "b/stream.srf").read_bytes()
    assert without_seconds(tmp_path / "a/metrics.jsonl") == without_seconds(tmp_path / "b/metrics.jsonl")
    a, b = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    assert a["psnr"] == b["psnr"] and a["bytes_per_frame"] == b["bytes_per_frame"] and b["train_seconds"] > 0


def test_resume_of_a_finished_run_and_with_more_frames(tmp_path):
    sr.train(small(tmp_path / "a", frames=2, steps=30))
    sr.train(small(tmp_path / "b", frames=3, steps=30))
    done = (tmp_path / "a/stream.srf").read_bytes()
    sr.train(small(tmp_path / "a", frames=2, steps=30, resume=True))
    assert (tmp_path / "a/stream.srf").read_bytes() == done
    sr.train(small(tmp_path / "a", frames=3, steps=30, resume=True))
    assert (tmp_path / "a/stream.srf").read_bytes() == (tmp_path / "b/stream.srf").read_bytes()
    with pytest.raises(UserError, match="keep_colour was"):
        sr.train(small(tmp_path / "a", frames=3, steps=30, resume=True, keep_colour=0.7))
    with pytest.raises(UserError, match="--frames 2.* has 3 frames already"):
        sr.train(small(tmp_path / "a", frames=2, steps=30, resume=True))
    assert (tmp_path / "a/stream.srf").read_bytes() == (tmp_path / "b/stream.srf").read_bytes()
    assert json.loads((tmp_path / "a/args.json").read_text())["frames"] == 3


# ------------------------------------------------------------------------------------------------------ playing

@pytest.fixture
def films(monkeypatch):
    """What is filmed, instead of a file: (path, frames)."""
    shot = []
    monkeypatch.setattr(sr, "save_video", lambda path, frames, fps=30: shot.append((Path(path), frames)))
    return shot


def test_play_needs_no_data(stage_run, tmp_path, monkeypatch, films):
    folder, _ = stage_run
    (tmp_path / "a.srf").write_bytes((folder / "stream.srf").read_bytes())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sr, "load_video", lambda *_: pytest.fail("asked for pictures"))
    summary = sr.train(Args(play="a.srf", out="played", device="cpu"))
    assert summary["frames"] == 3 and summary["pictures_per_second"] > 0 and "psnr" not in summary
    assert summary["mb_per_frame"] == pytest.approx(np.mean(StreamReader("a.srf").sizes) / 1e6)
    path, frames = films[-1]
    assert path == Path("played/render.mp4") and len(frames) == 3 and all(f.shape == (24, 48, 3) and 0 <= f.min() and f.max() <= 1 for f in frames)
    for t in (1, 2):
        sr.train(Args(play="a.srf", out=f"from{t}", seek=t, device="cpu"))
        tail = films[-1][1]
        assert len(tail) == 3 - t and all(torch.equal(a, b) for a, b in zip(tail, frames[t:]))
    sr.train(Args(play="a.srf", out="two", seek=1, frames=1, device="cpu"))
    assert len(films[-1][1]) == 1 and torch.equal(films[-1][1][0], frames[1])
    sr.train(Args(play="a.srf", out="free", path="free", device="cpu"))
    free = films[-1][1]
    assert len(free) == 3 and all(f.shape == (24, 24, 3) for f in free) and not torch.equal(free[0], free[1])
    header = StreamReader("a.srf").header
    away = common.camera_path(header.c2w, False, 3)
    want = sr.picture(StreamReader("a.srf").seek(1), replace(header, c2w=away), 1, small())["rgb"]
    assert torch.equal(free[1], want)


def test_play_scores_as_training_did(stage_run, tmp_path, films, monkeypatch):
    folder, summary = stage_run
    played = sr.train(Args(play=str(folder / "stream.srf"), out=str(tmp_path / "a"), score=True, scene="stage", size=24, device="cpu"))
    for key in ("psnr", "ssim", "psnr_moving"):
        assert played[key] == pytest.approx(summary[key], abs=1e-5)
    tail = sr.train(Args(play=str(folder / "stream.srf"), out=str(tmp_path / "b"), score=True, seek=2, scene="stage", size=24, device="cpu"))
    assert tail["psnr"] == pytest.approx(summary["per_frame"][2]["psnr"], abs=1e-5)
    assert json.loads((tmp_path / "b/summary.json").read_text())["psnr"] == tail["psnr"]
    other = sr.train(Args(play=str(folder / "stream.srf"), out=str(tmp_path / "c"), score=True, scene="stage", size=32, background="white", device="cpu"))
    assert other["psnr"] == played["psnr"]                                                         # size and background are the stream's
    fewer = sr.load_video
    monkeypatch.setattr(sr, "load_video", lambda *words: replace(fewer(*words), test=[4]))
    with pytest.raises(UserError, match="--scene"):
        sr.train(Args(play=str(folder / "stream.srf"), out=str(tmp_path / "d"), score=True, scene="stage", device="cpu"))


command = partial(conftest.command, sr)


def test_play_of_damaged_files(stage_run, tmp_path, monkeypatch, capsys, films):
    monkeypatch.chdir(tmp_path)
    data = (stage_run[0] / "stream.srf").read_bytes()
    at = StreamReader(stage_run[0] / "stream.srf").entries[2][1]
    for n, (name, content, frames) in enumerate((("cut", data[:at + 100], 2), ("open", data[:-9], 3), ("bit", data[:at + 60] + bytes([data[at + 60] ^ 8]) + data[at + 61:], 2))):
        Path(name).write_bytes(content)
        status, out, err = command(monkeypatch, capsys, "--play", name, "--out", f"run{n}", "--device", "cpu")
        assert status == 0 and len(err.splitlines()) == 1 and f"playing the first {frames} frames" in err and f"{frames} frames" in out
        assert len(films[-1][1]) == frames
    Path("empty").write_bytes(b"")
    Path("foreign").write_bytes(b"\x89PNG" + bytes(500))
    Path("headonly").write_bytes(data[:500])
    for n, name in enumerate(("empty", "foreign", "headonly", "missing", ".")):
        assert_refused(command(monkeypatch, capsys, "--play", name, "--out", f"bad{n}", "--device", "cpu"), name)
    Path("whole").write_bytes(data)
    assert_refused(command(monkeypatch, capsys, "--play", "whole", "--seek", 3, "--out", "beyond", "--device", "cpu"), "--seek 3", "0 to 2")
    status, _, err = command(monkeypatch, capsys, "--play", "cut", "--seek", 2, "--out", "beyond2", "--device", "cpu")
    assert status == 2 and len(err.splitlines()) == 2 and "--seek 2" in err and "0 to 1" in err    # the damage, then the error


WRONG = {
    "--lattice 17 16 16": "--lattice", "--lattice 4 16 16": "--lattice", "--lattice 16 16 18 --halvings 2": "--lattice", "--lattice 16 16": "lattice",
    "--lattice 8192 16 16": "--lattice", "--degree 3": "--degree", "--degree -1": "--degree", "--play x.srf --resume": "--resume", "--play x.srf --eval-only --out a": "--play",
    "--tune-lr-density -1.0 1.0": "tune-lr-density", "--tune-lr-colour 0.1 0": "--tune-lr-colour", "--lr-density 0 1": "--lr-density", "--scene nosuchscene": "nosuchscene",
    "--frames 0": "--frames", "--steps 0": "--steps", "--rays 0": "--rays", "--tune-rays 0": "--tune-rays", "--memory 0": "--memory", "--key-every 0": "--key-every",
    "--damp -1": "--damp", "--changed-share 1.5": "--changed-share", "--stop 2": "--stop", "--ring -1": "--ring", "--depth -1": "--depth", "--threshold 0": "--threshold",
    "--density-step 0": "--density-step", "--sh-step nan": "--sh-step", "--birth nan": "--birth", "--tv-share 2": "--tv-share", "--mode some": "some", "--aim nowhere": "nowhere",
    "--values int4": "int4", "--seek -1": "--seek", "--size 8": "--size", "--resume": "--out", "--eval-only": "--out", "--device nonsense": "--device", "--preset huge": "--preset",
    "--background pink": "pink", "--seed -1": "--seed",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(command(monkeypatch, capsys, "--data", tmp_path, *words.split()), WRONG[words])
    assert not list(tmp_path.rglob("*.srf")) and not list(tmp_path.rglob("ckpt.pt"))


def test_files_that_exist_are_not_overwritten(stage_run, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").write_text("mine")
    base = words_of(small(tmp_path / "a", frames=1, steps=20))
    assert_refused(command(monkeypatch, capsys, *base, "--stream", tmp_path / "mine"), "mine", "exists already")
    assert (tmp_path / "mine").read_text() == "mine"
    assert_refused(command(monkeypatch, capsys, *words_of(small(stage_run[0]))), "holds a run")
    assert_refused(command(monkeypatch, capsys, *words_of(small(tmp_path / "new", resume=True))), "ckpt.pt")
    assert command(monkeypatch, capsys, *words_of(small(tmp_path / "b", frames=1, steps=20)), "--stream", tmp_path / "s")[0] == 0
    assert len(StreamReader(tmp_path / "s")) == 1 and not (tmp_path / "b/stream.srf").exists()


def test_help_names_every_flag():
    done = subprocess.run([sys.executable, str(ROOT / "streamrf.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name in asdict(Args()):
        assert name == "preset" or f"--{name.replace('_', '-')}" in done.stdout, name


def test_n3dv_trains_and_plays(film, tmp_path, monkeypatch, films):
    """Films of stage in the layout of Neural 3D Video: forward-facing, in NDC, no motion mask."""
    pytest.importorskip("imageio_ffmpeg", reason="no ffmpeg")
    from test_videos import write_n3dv
    write_n3dv(film[0], tmp_path / "n3dv/clip", 2)
    summary = sr.train(small(tmp_path / "a", scene="clip", data=str(tmp_path), frames=2, steps=80, lattice=(24, 24, 16), video=True))
    assert (summary["data"], summary["scene"], summary["frames"], summary["psnr_moving"]) == ("n3dv", "clip", 2, None) and summary["psnr"] > 14
    assert len(films[-1][1]) == 2 and films[-1][1][0].shape == (24, 24, 3)                         # one camera is held out
    reader = StreamReader(tmp_path / "a/stream.srf")
    assert reader.header.ndc and reader.header.held_out == 1 and len(reader.header.c2w) == 14 and len(reader) == 2
    for more in ({}, dict(path="free"), dict(score=True, scene="clip", data=str(tmp_path), size=24)):
        played = sr.train(Args(play=str(tmp_path / "a/stream.srf"), out=str(tmp_path / f"b{len(films)}"), device="cpu", **more))
        assert all(f.std() > 0.02 for f in films[-1][1])
    assert played["psnr"] == pytest.approx(summary["psnr"], abs=1e-5) and played["psnr_moving"] is None


# ------------------------------------------------------------------------------------------------------ faults that were found, and mended

def test_a_film_in_which_nothing_moves(tmp_path, monkeypatch):
    """Every frame the same, default flags: each costs next to nothing, and looks as the first."""
    def still(name, data, size, frames, background):
        video = common.load_video(name, data, size, frames, background)
        read = video.read
        return replace(video, read=lambda t: read(0))
    monkeypatch.setattr(sr, "load_video", still)
    summary = sr.train(small(tmp_path / "a"))
    assert all(frame["bytes"] < 60 and frame["psnr"] == summary["per_frame"][0]["psnr"] for frame in summary["per_frame"][1:])


def test_pictures_without_alpha_need_no_background(film):
    """Cameras in a room with grey walls, before a grey background: the walls must not be left out."""
    directions = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)]
    c2w = torch.tensor(np.stack([common.look_at((0, 0, 0), d) for d in directions])).float()
    video = replace(film[0], kind="panoptic", c2w=c2w, train=[0, 1, 2], test=[3], near=0.1)
    grid, _ = sr.from_scratch(video, torch.full((3 * 24 * 24, 3), 0.5), small())
    for background in ("white", "black"):
        seen = sr.picture(grid, replace(video, bg=common.background(background)), 0, small())
        assert (seen["rgb"] - 0.5).abs().mean() < 0.02
    with pytest.raises(UserError, match="no voxel"):        # with alpha, nothing is there
        sr.from_scratch(replace(video, kind="builtin"), torch.full((3 * 24 * 24, 3), 0.5), small())


@pytest.mark.parametrize("ndc", [False, True])
def test_the_shell_is_where_rays_end(ndc):
    x, y, z = torch.meshgrid(torch.arange(4), torch.arange(5), torch.arange(6), indexing="ij")
    sides = (x == 0) | (x == 3) | (y == 0) | (y == 4) | (z == 5)
    assert torch.equal(sr.shell((4, 5, 6), ndc), sides if ndc else sides | (z == 0))


def test_an_empty_frame_is_the_background(film):
    video = film[0]
    empty = grid_from(torch.zeros(8, 8, 8, dtype=torch.bool), torch.zeros(0, 13))
    assert (sr.picture(empty, video, 0, small())["rgb"] == 0.5).all()
    none = torch.zeros(12, 24, 24, dtype=torch.bool)
    assert not sr.unexplained(grid_from(torch.ones(8, 8, 8, dtype=torch.bool), torch.ones(512, 13)), video, none, active(empty), small()).any()


@pytest.mark.parametrize("more", [dict(halvings=1), dict(halvings=0), dict(halvings=0, mode="warm")], ids=str)
def test_a_first_frame_with_nothing_solid_is_named(tmp_path, monkeypatch, capsys, more):
    """Far too few steps: no voxel reaches --threshold. A film of the background or a line that says so, no traceback."""
    status, _, complaint = command(monkeypatch, capsys, *words_of(small(tmp_path / "a", steps=1, frames=2, **more)))
    assert status == 0 or status == 2 and len(complaint.splitlines()) == 1


def test_a_long_stream_is_scored_to_its_end(film, tmp_path, films):
    """stage has as many frames as one asks for, 20 if one does not: frame 20 of a stream of 22."""
    video = film[0]
    header = StreamHeader((8, 8, 8), video.aabb, 1, video.bg, "int8", 0.05, 0.01, 30, 10.0, 1.0, 5.0, False, video.K, video.c2w, 2, 24, 24)
    writer = StreamWriter(tmp_path / "s", header)
    payload = encode_frame(header, None, grid_from(torch.ones(8, 8, 8, dtype=torch.bool), torch.ones(512, 13)))
    for t in range(22):
        writer.append(t, KEY, payload)
    writer.close()
    assert sr.train(Args(play=str(tmp_path / "s"), out=str(tmp_path / "a"), score=True, scene="stage", size=24, seek=20, device="cpu"))["frames"] == 2


def test_a_refused_play_leaves_no_run_behind(stage_run, tmp_path, monkeypatch, capsys, films):
    """The same command with the right file must not be refused because of the wrong one."""
    (tmp_path / "bad").write_bytes(b"GIF89a")
    assert_refused(command(monkeypatch, capsys, "--play", tmp_path / "bad", "--out", tmp_path / "a", "--device", "cpu"), "not a StreamRF")
    assert command(monkeypatch, capsys, "--play", stage_run[0] / "stream.srf", "--out", tmp_path / "a", "--device", "cpu")[0] == 0


def test_a_stream_of_another_run_is_never_cut(tmp_path, monkeypatch, capsys):
    """Run A wrote FILE. Run B with --stream FILE is refused: 'resume it, or give another --out'. Neither may cost A its stream."""
    stream = tmp_path / "mine.srf"
    sr.train(small(tmp_path / "A", frames=1, steps=30, stream=str(stream)))
    whole = stream.read_bytes()
    base = words_of(small(tmp_path / "B", frames=1, steps=31, stream=str(stream)))
    assert_refused(command(monkeypatch, capsys, *base), "exists already")
    monkeypatch.setattr(sr, "from_scratch", lambda *_: (_ for _ in ()).throw(UserError("it went on")))
    command(monkeypatch, capsys, *base, "--resume")
    assert stream.read_bytes() == whole


def test_ndc_is_one_space_for_all_cameras():
    """Cameras of different focal lengths (N3DV has them): the rays to one point of the world meet in NDC."""
    video, p = ndc_video((20.0, 20.0, 20.0, 20.0, 24.0)), torch.tensor([[0.3, -0.2, -2.5]])
    rays = []
    for camera in (0, 4):
        x, y, z = (p[0] - video.c2w[camera, :, 3]).tolist()
        f = float(video.K[camera, 0, 0])
        rays.append(sr.rays_of(video, camera, torch.tensor([[16 - f * x / z, 12 + f * y / z]])))
    (o, d), (q, e) = rays
    normal = torch.cross(d, e, dim=1)
    assert float(((o - q) * normal).sum().abs() / normal.norm()) < 1e-4
