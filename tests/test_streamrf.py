"""streamrf.py against known answers: the grid, rendering, gradients, what may change and what is
kept, the stream and its damage, frames, runs. Oracles are slow loops in float64, cases worked out
by hand, and a stream's own round trip. All runs are on the built-in `stage` at 24 px."""
import base64
import itertools
import json
import math
import random
import sys
from dataclasses import replace
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
from conftest import assert_refused, close  # noqa: E402
from kernels import voxel_interp  # noqa: E402
from streamrf import DELTA, KEY, Args, Grid, StreamReader, grid_from  # noqa: E402

F64 = torch.float64
SIZE = (7, 6, 5)                            # 210 points: the last byte of a mask is not full


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(sr, "EROSION", 3)   # grids are small here


@pytest.fixture(scope="module")
def film():
    """stage at 24 px, its first four frames."""
    video = common.load_video("stage", "no such folder", 24, 4)
    return video, [video.read(t) for t in range(4)]


# --------------------------------------------------------------------------- grids to work with

def random_mask(seed, share=0.4, size=SIZE):
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < share


def random_grid(seed, share=0.4, columns=13, size=SIZE):
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(size, generator=g) < share
    values = torch.randn(int(mask.sum()), columns, generator=g)
    values[:, 0] *= 50                      # raw density, both signs
    return grid_from(mask, values)


def dense(grid):
    out = grid.values.new_zeros(*grid.links.shape, grid.values.shape[1])
    out[grid.active] = grid.values
    return out


def same(a, b):
    types = a.links.dtype, a.values.dtype
    return (torch.equal(a.links, b.links) and torch.equal(a.values, b.values)
            and types == (torch.int32, torch.float32))


def empty(shape, degree=1):
    return sr.empty_grid({"size": shape, "degree": degree})


def points(shape):
    return itertools.product(*map(range, shape))


def around(p, shape, n):
    """Lattice points within n steps of p, diagonals included."""
    return itertools.product(*(range(max(c - n, 0), min(c + n + 1, side))
                               for c, side in zip(p, shape)))


# ------------------------------------------------------------------------------ the sparse grid

def test_rows_are_in_raster_order():
    mask = torch.zeros(2, 2, 3, dtype=torch.bool)
    mask[0, 1, 2] = mask[1, 0, 0] = mask[0, 0, 1] = True
    grid = grid_from(mask, torch.tensor([[1.0], [2], [3]]))
    assert [int(grid.links[p]) for p in ((0, 0, 1), (0, 1, 2), (1, 0, 0))] == [0, 1, 2]
    assert torch.equal(grid.active, mask) and int((grid.links == -1).sum()) == 9
    assert grid.values_at(torch.tensor([[2, -1], [0, 0]]))[..., 0].tolist() == [[3, 0], [1, 1]]
    assert empty((2, 2, 2), 0).values_at(-torch.ones(3)).tolist() == [[0] * 4] * 3
    grid, mask = random_grid(3), random_mask(9, 0.5)
    assert torch.equal(dense(grid.restrict(mask)), dense(grid) * mask[..., None])


@pytest.mark.parametrize("times", [0, 1, 2])
def test_dilate_and_erode_against_brute_force(times):
    for seed, share in ((0, 0.02), (1, 0.9), (2, 0.97)):
        mask = random_mask(seed, share)
        wide, thin = sr.dilate(mask, times), ~sr.dilate(~mask, times)
        for p in points(SIZE):
            assert wide[p] == any(mask[q] for q in around(p, SIZE, times)), p
            assert thin[p] == all(mask[q] for q in around(p, SIZE, times)), p


def test_upsample_is_interpolation_above_zero_and_makes_four_points_of_one():
    one = torch.zeros(5, 6, 7, dtype=torch.bool)
    one[2, 3, 4] = True
    x = sr.coordinates(torch.ones(10, 12, 14, dtype=torch.bool), (5, 6, 7))
    for mask in (one, random_mask(1, 0.2, (5, 6, 7))):
        grid = grid_from(mask, torch.ones(int(mask.sum()), 1))
        fine, found = voxel_interp(x, grid.links, grid.values), sr.upsample(mask, (10, 12, 14))
        assert torch.equal(found.flatten(), fine[:, 0] > 0)
    found = sr.upsample(one, (10, 12, 14))
    assert found[3:7, 5:9, 7:11].all() and found.sum() == 64


def test_resample_to_the_same_shape_is_the_identity_and_prunes():
    grid = random_grid(4, share=0.05)
    grid.values[::3, 0], grid.values[1::3, 0] = 9.0, 1.0
    solid = dense(grid)[..., 0] >= 5.0
    assert torch.equal(grid.solid(5.0), solid) and 3 < solid.sum() < len(grid.values)
    keep = sr.dilate(solid, 1)
    assert (grid.active & ~keep).any()
    assert same(grid.resample(SIZE).prune(1), grid.restrict(keep))            # to the bit
    with pytest.raises(UserError, match="no voxel reaches density"):
        grid.restrict(grid.active & ~solid).prune(1)


# ------------------------------------------------------------------------------------ rendering

BOX = torch.tensor([[-1.0, -2, -0.5], [1.0, 1, 2]])                         # three voxel sizes
C0, C1 = 0.28209479177387814, 0.4886025119029199


def slow_render(grid, rays_o, rays_d, scene):
    """No skipping, one sample after the other, in float64: rgb, opacity, depth in columns."""
    low, high = scene.aabb.double().numpy()
    sides, bg, result = np.array(grid.links.shape), scene.bg.double().numpy(), []
    for o, d in zip(rays_o.double().numpy(), rays_d.double().numpy()):
        scale = sides / (high - low)
        length = 1 / np.linalg.norm(d * scale)                              # of a voxel, metric
        at, along = (o + scene.near * d - low) * scale - 0.5, d * scale * length
        first, last = (-1 - at) / along, (sides - at) / along
        begin, end = max(0.0, np.minimum(first, last).max()), np.maximum(first, last).min()
        rgb, opacity, depth, T, k = np.zeros(3), 0.0, 0.0, 1.0, 0
        Y = [C0, -C1 * d[1], C1 * d[2], -C1 * d[0]][:(grid.values.shape[1] - 1) // 3]
        while begin + (k + 0.5) * 0.5 < end:
            t = begin + (k + 0.5) * 0.5
            x = torch.tensor(at + t * along)[None]
            f = voxel_interp(x, grid.links, grid.values)[0].numpy()
            tau = max(f[0], 0.0) * 0.5 * length
            w = T * (1 - math.exp(-tau)) if T >= sr.EARLY_STOP else 0.0
            sh = f[1:].reshape(3, -1) @ Y
            rgb += w * np.maximum(0, 0.5 + sh)
            opacity, depth = opacity + w, depth + w * (scene.near + t * length)
            T, k = T * math.exp(-tau), k + 1
        result.append([*(rgb + (1 - opacity) * bg), opacity, depth])
    return torch.tensor(np.array(result))


def world(aabb=BOX, near=0.0, **more):
    bg = torch.tensor([0.2, 0.5, 0.9], dtype=aabb.dtype)
    fields = dict(aabb=aabb, near=near, far=10.0, bg=bg, ndc=False, kind="builtin")
    return SimpleNamespace(**{**fields, **more})


def some_rays(n=12, seed=0, aabb=BOX, dtype=torch.float32):
    """From around the box, through points inside of it."""
    g = torch.Generator().manual_seed(seed)
    centre, half = aabb.double().mean(0), (aabb[1] - aabb[0]).double() / 2
    o = centre + 3 * half.max() * normalize(torch.randn(n, 3, generator=g, dtype=F64), dim=1)
    inside = centre + half * (torch.rand(n, 3, generator=g, dtype=F64) * 1.6 - 0.8)
    return o.to(dtype), normalize(inside - o, dim=1).to(dtype)


def everywhere(shape):
    return torch.ones([side + 1 for side in shape], dtype=torch.bool)


def columns(out):
    return torch.cat([out["rgb"], out["opacity"][:, None], out["depth"][:, None]], 1)


@pytest.mark.parametrize("shape, C", [((8, 8, 8), 13), ((6, 8, 10), 4)])
def test_render_against_the_slow_oracle(shape, C):
    grid = random_grid(1, 0.5, C, shape)
    grid.values[:, 0] *= 0.1                                                # empty, thin, opaque
    double, scene = Grid(grid.links, grid.values.double()), world(BOX.double(), near=0.5)
    rays_o, rays_d = some_rays(dtype=F64)
    rays_o[0] = torch.tensor([0.1, -0.4, 0.7])                              # one begins inside
    out = sr.render(double, everywhere(shape), rays_o, rays_d, scene)
    want = slow_render(double, rays_o, rays_d, scene)
    assert 0.2 < want[:, 3].mean() < 0.999 and want[:, :3].std() > 0.05
    close(columns(out), want, rtol=1e-9, atol=1e-9)
    missing = sr.render(double, everywhere(shape), rays_o + 100, rays_d, scene)
    assert torch.equal(missing["rgb"], scene.bg.expand(12, 3)) and not missing["opacity"].any()


def test_skipping_empty_cells_changes_nothing():
    grid = random_grid(2, 0.08, 13, (16, 16, 16))
    rays = some_rays(300)
    few = sr.cells_of(grid.solid(1e-8))
    a = sr.render(grid, everywhere((16, 16, 16)), *rays, world())
    b = sr.render(grid, few, *rays, world())
    assert 0.05 < few.float().mean() < 0.6 and len(b["x"]) < 0.7 * len(a["x"])
    assert torch.equal(columns(a), columns(b))


def test_an_image_is_what_its_pixels_rays_see(film):
    video, grid, pixels = film[0], random_grid(1, 0.3, 13, (8, 8, 8)), torch.arange(576)
    want = sr.render(grid, everywhere((8, 8, 8)), *sr.rays_of(video, [3], pixels), video)
    rgb, depth = sr.render_image(grid, video, 3)
    assert torch.equal(rgb.view(-1, 3), want["rgb"].clamp(0, 1))
    assert torch.equal(depth.flatten(), want["depth"])
    assert (sr.render_image(empty((8, 8, 8)), video, 0)[0] == 0.5).all()


def ndc_video():
    """Five cameras beside each other, one with another focal length; in NDC."""
    c2w = torch.eye(4)[None, :3].repeat(5, 1, 1)
    c2w[:, 0, 3] = torch.tensor([-0.4, -0.2, 0, 0.2, 0.4])
    c2w[:, 1, 3] = torch.tensor([0.1, -0.1, 0.2, 0, 0.1])
    K = torch.tensor([[[f, 0, 16], [0, f, 12], [0, 0, 1]] for f in (20.0, 20, 20, 20, 24)])
    box = torch.tensor([[-1.5, -1.5, -1], [1.5, 1.5, 1]])
    return world(box, K=K, c2w=c2w, H=24, W=32, train=[1, 2, 3, 4, 0], test=[], ndc=True)


def test_rays_of_pixels(film):
    """In NDC there is one space for all cameras, that of the first."""
    for video in (film[0], ndc_video()):
        W, n = video.W, video.H * video.W
        for index in (0, 3 * n + 7 * W + 5, 4 * n - 1):
            camera, pixel = video.train[index // n], index % n
            xy = torch.tensor([[pixel % W + 0.5, pixel // W + 0.5]])
            want = common.pixel_rays(xy, video.K[camera], video.c2w[camera].expand(1, 3, 4))
            if video.ndc:
                want = common.ndc_rays(*want, video.K[0], 24, 32)
            close(sr.rays_of(video, video.train, torch.tensor([index])), want)


# --------------------------------------------------------------------- gradient and optimiser

def test_gradient_of_render_goes_to_the_rows_of_the_mask():
    grid, rays = random_grid(0, 0.8, 13, (4, 4, 4)), some_rays(30)
    rows, leaf = torch.rand(len(grid.values)) < 0.4, grid.values.abs().requires_grad_()
    gradients = []
    for mask in (None, rows):
        out = sr.render(Grid(grid.links, leaf), everywhere((4, 4, 4)), *rays, world(), mask)
        gradients += torch.autograd.grad(out["rgb"].square().sum(), leaf)
    whole, part = gradients
    assert not part[~rows].any() and torch.equal(part[rows], whole[rows]) and whole[~rows].any()


def slow_tv(grid, chosen, weight):
    """Autograd of the formula in tv_gradient's docstring, voxel by voxel; side / 256 between the
    two halves of the chain rule."""
    v, sides = grid.values.clone().requires_grad_(), grid.links.shape
    differences, places = [], grid.active.nonzero().tolist()
    for row in chosen.tolist():
        d = []
        for axis in range(3):
            beside = tuple(c + (a == axis) for a, c in enumerate(places[row]))
            other = int(grid.links[beside]) if beside[axis] < sides[axis] else -1
            b = v[other] if other >= 0 else torch.zeros_like(v[0])
            colour = b[1:] - v[row, 1:] if other >= 0 else 0 * v[0, 1:]
            d.append(torch.cat([b[:1] - v[row, :1], colour]))
        differences.append(torch.stack(d))
    d = torch.stack(differences)                                                    # (n, 3, C)
    leaf = d.detach().requires_grad_()
    tv = (weight / len(chosen) * (1e-9 + leaf.square().sum(1)).sqrt()).sum()
    slope, = torch.autograd.grad(tv, leaf)
    return torch.autograd.grad((d * slope * torch.tensor(sides)[:, None] / 256).sum(), v)[0]


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_tv_gradient_against_autograd(share):
    grid = random_grid(1, share, 4, (5, 7, 6))                              # three factors
    grid = Grid(grid.links, grid.values.double())
    last = len(grid.values) - 1
    chosen = torch.cat([torch.randint(last, (60,)), torch.tensor([7, 7, 7, 0, last, last])])
    weight = torch.tensor([0.5, 2.0, 2.0, 3.0], dtype=F64)
    begun = torch.randn(grid.values.shape, dtype=F64)
    grad, want = begun.clone(), slow_tv(grid, chosen, weight)
    sr.tv_gradient(grid, sr.neighbours(grid)[:, chosen], weight, grad)
    assert close(grad - begun, want, rtol=1e-9, atol=1e-12) and want.abs().max() > 0


def test_rmsprop_by_hand():
    values, m = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), torch.zeros(3, 2)
    lr = torch.tensor([0.1, 0.01])
    sr.rmsprop_step(values, torch.tensor([[2.0, 0.5], [0, 0], [-1.0, 0.25]]), m, lr, 0.5)
    a, b = 0.5 * math.sqrt((4 + 1) / 2), 0.5 * math.sqrt((0.25 + 0.0625) / 2)
    first = [[1 - 0.1 * 2 / (2 + a), 2 - 0.01 * 0.5 / (0.5 + b)], [3, 4],
             [5 + 0.1 / (1 + a), 6 - 0.01 * 0.25 / (0.25 + b)]]
    close(values, torch.tensor(first))
    sr.rmsprop_step(values, torch.tensor([[1.0, 1.0], [0, 0], [0, 0]]), m, lr, 0.0)
    after = [0.95 * 4 + 0.05, 0.95 * 0.25 + 0.05]
    close(m, torch.tensor([after, [0.0, 0.0], [1.0, 0.0625]]))
    moved = [v - rate / math.sqrt(x) for v, rate, x in zip(first[0], (0.1, 0.01), after)]
    close(values, torch.tensor([moved, *first[1:]]))


@pytest.mark.parametrize("damp, want", [(1.0, [1 / 1.707, 1 / 71.7]), (0.0, [1.0, 1.0])])
def test_damping_example(damp, want):
    values, grad = torch.zeros(2, 1), torch.tensor([[1.0], [0.01]])
    sr.rmsprop_step(values, grad, torch.zeros(2, 1), torch.ones(1), damp)
    assert (-values[:, 0]).tolist() == pytest.approx(want, rel=1e-2)


# ------------------------------------------------------------- what may change, what is kept

def letters(*layers):
    """Text of (6, 6, ...) masks, the later over the earlier: [(mask, letter)] -> six lines."""
    picture = np.full((6, 6), ".")
    for mask, letter in layers:
        picture[mask[..., 0].numpy()] = letter
    return ["".join(row) for row in picture]


def test_the_drawn_example(monkeypatch):
    text = (ROOT / "streamrf.py").read_text().split("#    exists ")[1].splitlines()[1:7]
    drawn = [list(lines) for lines in zip(*(line[1:].split() for line in text))]
    exists, now = torch.zeros(2, 6, 6, 4, dtype=torch.bool)                 # all alike along z
    exists[2:, :4] = now[2:4, 2:4] = now[4:] = True
    pilot, added, removed = torch.zeros(3, 3, 3, 2, dtype=torch.bool)
    pilot[1:] = added[2, 2] = removed[1, 0] = True
    monkeypatch.setattr(sr, "DILATION", 1)
    monkeypatch.setattr(sr, "EROSION", 2)
    args, masks = small(hull=False), (added, added, removed)
    band = sr.masks_of_frame(exists, None, None, replace(args, mode="band"))[0]
    M, start, seeds, cleared = sr.masks_of_frame(exists, masks, None, args)
    solid = torch.tensor([50.0, 0, 0, 0])
    monkeypatch.setattr(sr, "optimise", lambda grid, *_: grid.values.copy_(
        now[grid.active][:, None] * solid))                                 # finds what is there
    full, half = (grid_from(m, m[m][:, None] * solid) for m in (exists, pilot))
    video, pixels = box(full, 0.03), torch.zeros(1, 6, 6) > 0
    new, stored, _, _ = sr.next_frame(full, half, masks, video, None, pixels, args)
    added, removed = (sr.upsample(mask, (6, 6, 4)) for mask in (added, removed))
    want = [
        letters((exists, "o")), letters((band, "#")), letters((added, "+"), (removed, "-")),
        letters((M, "#")), letters((start, "0"), (exists, "o"), (seeds, "s"), (cleared, "c")),
        letters((new.active, "o"), (sr.scatter(new.active, stored), "#"))]
    assert drawn == want and torch.equal(new.solid(), now)


def box(grid, side):
    """A world in the box of a lattice whose points are `side` apart."""
    return world(torch.tensor([[0.0] * 3, [side * n for n in grid.links.shape]]))


def apart(values):
    """A grid whose voxels are far from each other: one for each row of values (n, C)."""
    values = torch.tensor(values)
    mask = torch.zeros(4 * len(values), 3, 3, dtype=torch.bool)
    mask[torch.arange(len(values)) * 4 + 1, 1, 1] = True
    return grid_from(mask, values)


def test_keep_large_changes_by_hand():
    prev = apart([[5.0, 0, 0, 0], [-1.0, 0, 0, 0], [20.0, 0, 0, 0], [5.0, 0, 0, 0],
                  [20.0, 0.2, 0.2, 0.2]])
    new = apart([[8.0, 0, 0, 0],                            # denser: alpha 0.39 -> 0.55
                 [-1.0, 5, 5, 5],                           # another colour, invisible
                 [20.0, 0.2, -0.2, 0.1],                    # another colour, alpha 0.86: 0.43
                 [5.05, 0.1, 0, 0],                         # hardly anything
                 [-3.0, 0.2, 0.2, 0.2]])                    # gone
    for keep, released, want in (((0.05, 0.3), False, [1, 0, 1, 0, 1]),
                                 ((0.05, 0.44), False, [1, 0, 0, 0, 1]),
                                 ((0.05, 0.45), True, [0, 1, 1, 0, 0])):
        grid, stored = sr.keep_large_changes(prev, new, box(new, 0.1), keep, released)
        want = torch.tensor(want, dtype=torch.bool)
        assert torch.equal(stored, want) and torch.equal(grid.links, new.links)
        assert torch.equal(grid.values, torch.where(want[:, None], new.values, prev.values))


def test_keep_large_changes_sees_a_colour_where_a_neighbour_shows_it():
    """An empty voxel beside a dense one tints it: interpolation reaches from one to the other."""
    mask = torch.zeros(6, 3, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[1, 1, 1] = mask[3, 1, 1] = True
    prev = grid_from(mask, torch.tensor([[50.0, 0], [0.0, 0], [0.0, 0]]))
    new = grid_from(mask, torch.tensor([[50.0, 0], [0.0, 1], [0.0, 1]]))
    for want in ([False, True, False], [True, True, False]):
        stored = sr.keep_large_changes(prev, new, box(new, 0.1), (0.05, 0.3))[1]
        assert stored.tolist() == want
        new.values[0, 0] = 0.0                                              # or where one did


def test_keep_large_changes_of_new_voxels():
    new = apart([[9.0, 0.1], [0.3, 2.0], [3.0, 0.0], [0.0, 0.05]])
    prev = new.restrict(new.active & (torch.arange(16) < 4)[:, None, None])
    grid, stored = sr.keep_large_changes(prev, new, box(new, 0.1), (0.05, 0.3))
    assert stored.tolist() == [False, True]                                 # two are idle
    assert torch.equal(grid.values, new.values[[0, 2]])
    grid, stored = sr.keep_large_changes(prev, new, box(new, 0.1), (0.05, 0.3), released=True)
    assert grid.values[:, 1].tolist() == pytest.approx([0.1, 2.0])          # by colour alone
    same_again, stored = sr.keep_large_changes(new, new, box(new, 0.1), (0.0, 0.0))
    assert same(same_again, new) and not stored.any()


# --------------------------------------------------------------------- the stream: one frame

def header_like(as_released=True, size=SIZE, degree=1, key_every=4, n=2, ndc=False):
    """Bytes of a header, and its video of n cameras, one of them held out."""
    K, c2w = torch.arange(9.0 * n).view(n, 3, 3), torch.linspace(-3, 7, 12 * n).view(n, 3, 4)
    video = common.Video("v", "stream", 0, 29.97, c2w, K, 36, 48, [], list(range(1, n)), [0],
                         torch.tensor([[-1.0, -2, -3], [1, 2, 3]]), 0.1, 6.0,
                         torch.tensor([0.5, 0.25, 1]), ndc, None)
    args = SimpleNamespace(resolution=size, degree=degree, as_released=as_released,
                           key_every=key_every)
    return sr.pack_header(video, args), video


HEAD = {int8: header_like(not int8)[0] for int8 in (False, True)}
HEADER, INT8 = (sr.read_header(HEAD[int8], "s")[0] for int8 in (False, True))
NOTHING = empty(SIZE)


def next_of(t, prev):
    """What a frame of training does: voxels appear, vanish, move, change; -> grid, stored."""
    g = torch.Generator().manual_seed(t)
    shift = int(t % 5 == 4)                                                 # all moves along z
    moved, mask = torch.roll(dense(prev), shift, 2), torch.roll(prev.active, shift, 2)
    mask = (mask & (torch.rand(SIZE, generator=g) < 0.95)) | (torch.rand(SIZE, generator=g) < 0.05)
    n = int(mask.sum())
    change = 0.3 * torch.randn(n, 13, generator=g) * (torch.rand(n, 1, generator=g) < 0.3)
    return grid_from(mask, moved[mask] + change), torch.rand(n, generator=g) < 0.5


def stream_of(header, n, closed=True):
    """A closed loop of n frames -> the bytes of their stream, its records, the decoded grids."""
    data, records, grids, prev = HEAD[bool(header["int8"])], {}, [], NOTHING
    for t in range(n):
        new, stored = next_of(t, prev) if t else (random_grid(0), torch.ones(210) > 0)
        kind = DELTA
        if t % 4 == 0:
            kind, prev = KEY, NOTHING
        payload, _ = sr.encode_frame(header, kind, prev, new, stored[:len(new.values)])
        prev = sr.decode_frame(header, kind, payload, prev)
        record = sr.pack_record(t, kind, payload)
        records[t] = kind, len(data), len(data) + len(record)
        data += record
        grids.append(prev)
    return data + closed * sr.pack_index(records, len(data)), records, grids


@pytest.mark.parametrize("header", [HEADER, INT8], ids=["fp16", "int8"])
def test_delta_stores_what_it_should_and_nothing_else(header):
    for seed in range(1, 16):
        prev = Grid(random_grid(seed).links, random_grid(seed).values.half().float())
        new, stored = next_of(seed, prev)
        payload = sr.encode_frame(header, DELTA, prev, new, stored)[0]
        out = sr.decode_frame(header, DELTA, payload, prev)
        assert torch.equal(out.links, new.links)
        old, before = prev.active[new.active], dense(prev)[new.active]
        assert torch.equal(out.values[old & ~stored], before[old & ~stored])
        stored = stored | ~old
        if header is HEADER:
            assert torch.equal(out.values[stored], new.values[stored].half().float())
            continue
        want, had, got = (sr.compand(v[stored].numpy()) for v in (new.values, before, out.values))
        scale = np.maximum([0.05] + [0.01] * 12, np.abs(want - had).max(0) / 127)
        error = np.abs(got - want)
        assert (error <= 0.5 * scale * (1 + 1e-4)).all() and error.max() > 0.25 * scale.min()


@pytest.mark.parametrize("header", [HEADER, INT8], ids=["fp16", "int8"])
def test_other_sizes_and_equal_and_empty_grids(header):
    for degree, size in ((0, (1, 1, 1)), (2, (2, 3, 4)), (1, (9, 1, 8))):
        C, nothing = 1 + 3 * (degree + 1) ** 2, empty(size, degree)
        a, b = random_grid(1, 0.5, C, size), random_grid(2, 0.5, C, size)
        for prev, new in ((a, b), (a, a), (a, nothing), (nothing, nothing), (nothing, b)):
            stored = torch.zeros(len(new.values), dtype=torch.bool)
            payload = sr.encode_frame(header, DELTA, prev, new, stored)[0]
            out = sr.decode_frame(header, DELTA, payload, prev)
            assert torch.equal(out.links, new.links) and out.values.isfinite().all()
            assert prev is not new or same(out, new) and len(payload) < 40


# --------------------------------------------------------------------- the stream: the file

@pytest.mark.parametrize("header", [HEADER, INT8], ids=["fp16", "int8"])
def test_a_player_sees_what_the_encoder_saw(tmp_path, header, capsys):
    data, records, grids = stream_of(header, 11)
    (tmp_path / "s").write_bytes(data)
    reader = StreamReader(tmp_path / "s")
    assert reader.records == records and capsys.readouterr().err == ""
    out = dict(reader.frames())
    assert [*out] == list(range(11)) and all(same(out[t], grids[t]) for t in out)


def test_header_comes_back():
    data, video = header_like(False, (512, 256, 3), 2, 9, n=5, ndc=True)
    h, v = sr.read_header(data + b"more", "s")
    assert (*h["size"], h["degree"], h["key_every"]) == (512, 256, 3, 2, 9)
    args = SimpleNamespace(resolution=(512, 256, 3), degree=2, as_released=False, key_every=9)
    assert h["int8"] == 1 and sr.pack_header(v, args) == data
    for name in ("aabb", "bg", "near", "far", "fps", "ndc", "H", "W", "test", "train", "K", "c2w"):
        close(getattr(v, name), getattr(video, name))


def test_bad_headers_are_one_line(tmp_path):
    good, records, _ = stream_of(HEADER, 1)
    newer, damaged = bytearray(good), bytearray(good)
    newer[8], damaged[40] = 2, good[40] ^ 1
    empty = good[:records[0][1]]
    for data in (b"GIF89a" + good[6:], b"", newer, good[:30], empty[:-1], damaged, empty):
        (tmp_path / "s").write_bytes(data)
        line = "no frame" if data is empty else "no stream of format 1, or its header is damaged"
        with pytest.raises(UserError, match=line):
            StreamReader(tmp_path / "s")


def play(path, data, grids, capsys):
    """What a damaged file gives: frames, compared with the encoder's; the lines on stderr."""
    path.write_bytes(data)
    try:
        reader = StreamReader(path)
    except UserError as error:
        return [], str(error)
    out = dict(reader.frames())
    assert all(same(grid, grids[t]) for t, grid in out.items())
    return [*out], capsys.readouterr().err


def test_damage_costs_the_frames_up_to_the_next_key_frame(tmp_path, capsys):
    data, records, grids = stream_of(INT8, 11)
    flipped = bytearray(data)
    flipped[records[5][1] + 30] ^= 4
    frames, line = play(tmp_path / "s", flipped, grids, capsys)
    assert frames == [0, 1, 2, 3, 4, 8, 9, 10]
    assert line.endswith(": frames 5, 6, 7 are missing, and any after 10\n")
    for key, missing in ((0, [0, 1, 2, 3]), (4, [4, 5, 6, 7]), (8, [8, 9, 10])):
        gone = data[:records[key][1]] + data[records[key][2]:]              # cut out whole
        frames, line = play(tmp_path / "s", gone, grids, capsys)
        assert frames == [t for t in range(11) if t not in missing]
        assert ", ".join(map(str, missing)) in line
    junk = data[:records[2][1]] + b"FRAM" + bytes(99) + data[records[2][2]:] + b"x"
    frames, line = play(tmp_path / "s", junk, grids, capsys)
    assert frames == [0, 1, 4, 5, 6, 7, 8, 9, 10] and "frames 2, 3 are" in line
    twice = data[:records[3][1]] + data[records[2][1]:]                     # frame 2 again
    inserted = data[:records[3][1]] + bytes(9) + data[records[3][1]:]
    for data in (twice, inserted):                                          # all is there, but not
        frames, line = play(tmp_path / "s", data, grids, capsys)            # where it should be
        assert frames == [*range(11)] and "frames none are missing" in line


@pytest.mark.parametrize("closed", [True, False])
def test_a_cut_anywhere_is_noticed(tmp_path, closed, capsys):
    data, records, grids = stream_of(INT8, 6, closed)
    ends, rng = [end for _, _, end in records.values()], random.Random(1)
    cuts = {rng.randrange(len(data)) for _ in range(25)}
    cuts |= {end + d for end in ends for d in (-1, 0)}
    cuts |= set(range(ends[-1], len(data), 9))
    for cut in cuts - {len(data)}:
        frames, line = play(tmp_path / "s", data[:cut], grids, capsys)
        assert frames == [t for t, end in enumerate(ends) if end <= cut] and line.strip(), cut


def test_a_flipped_bit_anywhere_is_noticed_and_the_rest_plays(tmp_path, capsys):
    data, records, grids = stream_of(HEADER, 6)
    first, end, rng = records[0][1], records[5][2], random.Random(2)
    places = [rng.randrange(len(data)) for _ in range(60)] + [*range(end, len(data), 5)]
    places += [begin + i for _, begin, _ in records.values() for i in range(0, 17, 3)]
    for place in places:
        bad = bytearray(data)
        bad[place] ^= 1 << rng.randrange(8)
        frames, line = play(tmp_path / "s", bad, grids, capsys)
        hit = [t for t, (_, begin, stop) in records.items() if begin <= place < stop]
        lost = {t for h in hit for t in range(h, 4 if h < 4 else 6)}
        want = [] if place < first else [t for t in range(6) if t not in lost]
        assert frames == want and line.strip(), place
    assert len(places) > 100


# Written by the first version of streamrf.py: two voxels, int8; a key, a delta, a key frame.
FIRST_VERSION = """
Q*?4=VQo@I0RRF30ssO400963000010096C0000B000000D!*$0D!*$0D!*$0DwOL0DwOL0DwOL002J#002J#002MD%uGEB*CRXt
03bmC0DwOL0H8ns0DwOL0000000000000000DwOL0000000000000000DwOL0DwOL000000000000000000000DwOL0000000000
00000000000DwOL0001Jf7r-IQbA1s000006#xJL3duuP0RRw!0Du4h00000L`XOQv;aH+07g<lO#uJ^00AEW000RJ%@5!J82}dp
06?J_9w@oS@n`^Bl{ARIa0n)*u+IPh07g<lO#%P_000#L008^^HIM-S5CZ@JW&i+Y002xpE&u>B0000<PDEG(0000000000vj6}9
000000RR910oecm0000000IC2000RA00000004y`jHfRF00000002{Ta#BWRZe#
"""


def test_a_stream_of_the_first_version_plays(tmp_path, capsys):
    data = base64.b85decode(FIRST_VERSION.replace("\n", ""))
    (tmp_path / "s").write_bytes(data)
    reader = StreamReader(tmp_path / "s")
    grids = [grid for _, grid in reader.frames()]
    args = SimpleNamespace(resolution=(2, 2, 2), degree=0, as_released=False, key_every=2)
    assert data.startswith(sr.pack_header(reader.video, args)) and capsys.readouterr().err == ""
    assert torch.equal(grids[0].values, torch.tensor([[4, 0.5, -0.25, 1], [9.0, 0, 0, 0]]))
    close(grids[1].values, torch.tensor([[16, 0.1, 0, 0], [1, 0, 0.2, 0]]), rtol=1e-3, atol=1e-3)
    assert torch.equal(grids[1].active.nonzero(), torch.tensor([[1, 1, 0], [1, 1, 1]]))
    close(grids[2].values, grids[1].values, rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------- beyond the paper

def test_changed_pixels_by_hand():
    before = torch.full((2, 6, 7, 3), 0.5)
    now, want = before.clone(), torch.zeros(2, 6, 7, dtype=torch.bool)
    now[0, 3, 4, 2] += 0.04                                                 # one channel is enough
    now[1, 0, 0, 0] -= 0.04
    now[1, 5, 6, 1] += 0.02                                                 # too little
    want[0, 2:5, 3:6], want[1, :2, :2] = True, True
    assert torch.equal(sr.changed_pixels(now, before), want)


def seen_ball(video, centre, radius):
    """Pixels (V, H, W) of the training cameras that may show some of the ball."""
    o, d = sr.rays_of(video, video.train, torch.arange(len(video.train) * video.H * video.W))
    away = torch.tensor(centre) - o
    beside = (away - (away * d).sum(1, keepdim=True) * d).norm(dim=1)
    pixel = 0.75 * 3.5 / float(video.K[0, 0, 0])                            # half a diagonal
    return (beside < radius + pixel).view(len(video.train), video.H, video.W)


def test_hull_of_a_ball(film):
    video, shape, centre, radius = film[0], (24, 24, 24), (-0.2, 0.1, 0.05), 0.25
    x = video.aabb[0] + (torch.ones(shape).nonzero().view(*shape, 3) + 0.5) / 24 * 2
    distance = (x - torch.tensor(centre)).norm(dim=-1)
    ball = seen_ball(video, centre, radius)
    found = sr.visual_hull(video, ball, shape)
    assert found[distance < radius].all() and not found[distance > 4 * radius].any()
    shift = x[found].mean(0) - torch.tensor(centre)         # in y, as the cameras look, it is long
    assert shift[[0, 2]].abs().max() < 0.03
    ball[4] = False
    assert sr.visual_hull(video, ball, shape)[distance < radius].all()      # 11 of 12 are enough
    ball[[0, 7, 9]] = False
    assert not sr.visual_hull(video, ball, shape)[distance < radius].any()  # 8 are not


def test_hull_in_ndc():
    video, p = ndc_video(), (1.2, -0.6, -2.5)
    pixels = torch.zeros(5, 24, 32, dtype=torch.bool)
    for image, camera in zip(pixels, video.train):
        x, y, z = (torch.tensor(p) - video.c2w[camera, :, 3]).tolist()
        f = float(video.K[camera, 0, 0])
        u, v = 16 - f * x / z, 12 + f * y / z
        image[int(v) - 1:int(v) + 2, int(u) - 1:int(u) + 2] = True
    found = sr.visual_hull(video, pixels, (48, 48, 32))
    ndc = torch.tensor([-40 / 32 * p[0] / p[2], -40 / 24 * p[1] / p[2], 1 + 2 / p[2]])
    at = (ndc - video.aabb[0]) / (video.aabb[1] - video.aabb[0]) * torch.tensor([48.0, 48, 32])
    assert found[tuple((at - 0.5).round().long())] and found.float().mean() < 0.05


def test_births_are_where_a_change_is_not_explained(film):
    video = film[0]
    floor = torch.zeros(8, 8, 8, dtype=torch.bool)
    floor[:, :, 0] = True
    pilot = grid_from(floor, torch.tensor([[50.0] + [0.1] * 12]).repeat(64, 1))
    air = seen_ball(video, (-0.4, -0.6, 0.6), 0.3)                          # nothing is there
    born = sr.births(pilot, video, air)
    assert born[2, 1, 6] and born.sum() < 60 and not born[:, :, :2].any()
    assert not (born & ~sr.visual_hull(video, air, (8, 8, 8))).any()
    ground = seen_ball(video, (0.0, 0.0, -0.9), 0.2)                        # the floor explains it
    assert sr.births(pilot, video, ground).sum() < 3
    assert not sr.births(pilot, video, air & False).any()


# ------------------------------------------------------------------------ frames, and runs

SMALL = dict(size=24, steps=3, resolution=(16, 16, 16), first_iterations=60, first_rays=256,
             pilot_iterations=4, iterations=8, rays=256, lr=(3.0, 1.0, 0.1, 0.01),
             device="cpu", data="no such folder")


def small(out=None, **more):
    return Args(**{**SMALL, "out": out and str(out), **more})


def target_of(video, views):
    return views.images[video.train].flatten(0, 2)


def optimise(grid, film, t, iterations, rays, lr, *rest):
    target = target_of(film[0], film[1][t])
    rates = sr.learning_rates(lr, iterations)
    return sr.optimise(grid, film[0], target, torch.arange(len(target)), rays, rates, *rest)


@pytest.fixture(scope="module")
def begun(film):
    """Frame 0 and its pilot: header, full, pilot."""
    torch.manual_seed(0)
    video, views = film
    args, target = small(), target_of(video, views[0])
    grid = sr.first_frame(video, target, args)[0]
    pilot = grid.resample((8, 8, 8)).prune(1)
    optimise(pilot, film, 0, 8, 256, args.lr)
    header = sr.read_header(sr.pack_header(video, args), "s")[0]
    return header, Grid(grid.links, grid.values.half().float()), pilot


def recent_of(film, t):
    images = [views.images[film[0].train] for views in film[1]]
    return sr.changed_pixels(images[t], images[0])


def next_one(begun, film, t=1, recent=None, **more):
    """The pilot and next_frame, from frame 0 to frame t, always from the same random state."""
    _, prev, pilot = begun
    recent, masks, args = recent_of(film, t) if recent is None else recent, None, small(**more)
    torch.manual_seed(1)
    target = target_of(film[0], film[1][t])
    if args.mode in ("pilot", "full"):
        pilot, masks = sr.next_pilot(pilot, film[0], target, recent, args)
    return sr.next_frame(prev, pilot, masks, film[0], target, recent, args)


@pytest.mark.parametrize("more", [*(dict(mode=mode) for mode in ("warm", "band", "pilot", "full")),
                                  dict(hull=False), dict(birth=0.0)], ids=str)
def test_next_frame_leaves_the_rest_alone(begun, film, more):
    header, prev, _ = begun
    new, stored, M, out = next_one(begun, film, **more)
    payload = sr.encode_frame(header, DELTA, prev, new, stored)[0]
    decoded = sr.decode_frame(header, DELTA, payload, prev)
    assert torch.equal(decoded.active, new.active) and stored.shape == (len(new.values),)
    assert torch.equal(prev.active & ~M, new.active & ~M)                   # none comes or goes
    assert torch.equal(dense(decoded)[~M], dense(prev)[~M])                 # the same to the bit
    stored = sr.scatter(new.active, stored)
    assert not (stored & ~M).any() and (stored.any() or more.get("mode") == "warm")
    assert torch.equal(dense(decoded)[new.active & ~stored], dense(prev)[new.active & ~stored])
    assert 0 < M.sum() and out["loss"] < 0.1 and out["opacity"] > 0.2


def test_masks_nest(begun, film):
    prev = begun[1].active

    def mask(**more):
        return next_one(begun, film, **more)[2]

    band = sr.dilate(prev, 2) & sr.dilate(~prev, 3)
    hull = sr.dilate(sr.visual_hull(film[0], recent_of(film, 1), prev.shape), 2)
    assert mask(mode="warm", hull=False).all() and 0 < band.sum() < band.numel()
    assert torch.equal(mask(mode="band", hull=False), band)
    assert torch.equal(mask(mode="warm"), hull) and torch.equal(mask(mode="band"), band & hull)
    pilot, both = mask(mode="pilot"), mask()
    assert not (both & ~pilot).any() and (pilot & ~both).any() and not (pilot & ~hull).any()


def test_where_the_rays_of_a_frame_come_from(film):
    video = film[0]
    recent, mask = torch.zeros(12, 24, 24, dtype=torch.bool), torch.zeros(16, 16, 16) > 0
    recent[:, 8:14, 9:14], mask[4:9, 4:9, 4:9] = True, True
    args, lately = small(iterations=20, rays=500), recent.flatten()
    pixels = sr.pixels_to_train(recent, None, video, args)
    assert len(pixels) == 10_000 and 0.7 < lately[pixels].float().mean() < 0.75
    pixels = sr.pixels_to_train(recent, mask, video, args)
    others = pixels[7000:]
    rays = sr.rays_of(video, video.train, others)
    offsets = sr.sample_along_rays(sr.cells_of(mask), *rays, video)[3]
    assert lately[pixels[:7000]].all() and (offsets.diff() > 0).all() and 100 < len(others) <= 3000
    assert len(sr.pixels_to_train(recent & False, mask, video, args)) > 1000
    every = sr.pixels_to_train(recent, mask, video, small(hull=False))
    assert torch.equal(every, torch.arange(recent.numel()))


def test_an_identical_frame_changes_nothing(begun, film):
    header, prev, _ = begun
    for mode in ("warm", "band", "pilot", "full"):
        still = torch.zeros(12, 24, 24, dtype=torch.bool)
        new, stored, M, _ = next_one(begun, film, t=0, recent=still, mode=mode, birth=0.0)
        assert same(new, prev) and not M.any() and not stored.any()
        assert len(sr.encode_frame(header, DELTA, prev, new, stored)[0]) < 40


def test_seeds_and_cleared_voxels(begun, film, monkeypatch):
    """What the pilot added starts with its values, what it lost starts from 0, inside of M."""
    _, prev, pilot = begun
    removed = pilot.active & random_mask(0, 0.2, (8, 8, 8))
    added = sr.dilate(pilot.active) & ~pilot.active
    new = pilot.restrict(pilot.active | added)
    new.values[new.links[added].long()] = torch.tensor([30.0] + [0.3] * 12)
    begins = []
    monkeypatch.setattr(sr, "next_pilot", lambda *_: (new, (added, added, removed)))
    monkeypatch.setattr(sr, "optimise", lambda grid, *rest: begins.append(
        Grid(grid.links, grid.values.clone())))
    M = next_one(begun, film, hull=False, birth=0.0)[2]
    start, A = dense(begins[0]), prev.active
    up, gone = (sr.upsample(mask, A.shape) for mask in (added, removed))
    seeds = up & M & ~A
    want = voxel_interp(sr.coordinates(seeds, (8, 8, 8)), new.links, new.values)
    assert seeds.any() and torch.equal(start[seeds], want) and (want[:, 0] > 5).any()
    assert (gone & A & M).any() and not start[gone & A & M].any()
    rest = A & ~(gone & M)
    assert torch.equal(start[rest], dense(prev)[rest])


def test_pilot_masks(begun, film):
    video, views = film
    pilot, (changed, added, removed) = sr.next_pilot(
        begun[2], video, target_of(video, views[2]), recent_of(film, 2), small())
    before, after = begun[2].active, pilot.active
    assert torch.equal(added, after & ~before) and torch.equal(removed, before & ~after)
    differs = (dense(pilot) != dense(begun[2])).any(-1)
    assert torch.equal(differs & after & before, changed & before) and changed.any()
    assert not (added & ~changed).any()
    inputs = begun[2], video, target_of(video, views[2]), recent_of(film, 2)
    pilot, _ = sr.next_pilot(*inputs, small(pilot_keep=(0.0, 0.0)))         # no change is undone
    assert not (pilot.active & ~sr.dilate(pilot.solid())).any()             # pruned


def test_learning_rates_by_hand():
    rates = sr.learning_rates((8.0, 0.5, 0.1, 0.1), 8)
    assert rates[4:, 0].tolist() == pytest.approx([2.0, 2 * 0.5 ** 0.5, 1.0, 0.5 ** 0.5])
    assert rates[0, 0] == 8 and (rates[:, 1] == torch.tensor(0.1)).all()


def test_photographs_need_no_background(film):
    """A room with grey walls before a grey background: the walls must not be left out."""
    directions = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0)]
    c2w = torch.tensor(np.stack([common.look_at((0, 0, 0), d) for d in directions])).float()
    video = replace(film[0], kind="panoptic", c2w=c2w, train=[0, 1, 2], test=[3], near=0.1)
    target = torch.full((3 * 24 * 24, 3), 0.5)
    air = sr.grid_from(torch.ones(4, 4, 4, dtype=torch.bool), torch.zeros(64, 4))
    out = sr.optimise(air, video, target, torch.arange(99), 9, sr.learning_rates((1, 1, 1, 1), 1))
    assert out["loss"].item() == pytest.approx(1 / 12)      # variance of a uniform background
    grid, _ = sr.first_frame(video, target, small())
    for background in (torch.ones(3), torch.zeros(3)):
        seen = sr.render_image(grid, replace(video, bg=background), 0)[0]
        assert (seen - 0.5).abs().mean() < 0.02
    with pytest.raises(UserError, match="no voxel"):                        # with alpha: nothing
        sr.first_frame(replace(video, kind="builtin"), target, small())


@pytest.fixture(scope="module")
def stage_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "stage"
    return folder, sr.train(small(folder, first_iterations=150, iterations=20))


def test_what_was_scored_is_what_is_decoded(stage_run, film):
    folder, summary = stage_run
    video, views = film
    reader, frames = StreamReader(folder / "stream.srf"), summary["per_frame"]
    sizes = [end - begin for _, begin, end in reader.records.values()]
    assert sizes == [f["bytes"] for f in frames]
    seen = []
    for t, grid in reader.frames():
        seen.append(torch.stack([sr.render_image(grid, reader.video, v)[0] for v in range(2)]))
        target, moving = views[t].images[video.test], views[t].mask[video.test] > 0
        scores = [float(common.psnr(a, b)) for a, b in zip(seen[t], target)]
        assert np.mean(scores) == pytest.approx(frames[t]["psnr"], abs=1e-4)
        now, still = ((images - target).square()[moving].mean() for images in (seen[t], seen[0]))
        assert -10 * now.log10() == pytest.approx(frames[t]["psnr_moving"], abs=1e-4)
        assert frames[t]["voxels"] == len(grid.values)
    assert -10 * now.log10() > -10 * still.log10() + 0.3        # than frame 0, shown for ever
    assert summary["psnr"] == pytest.approx(np.mean([f["psnr"] for f in frames]))
    assert summary["psnr"] > 18 and frames[1]["bytes"] < 0.5 * frames[0]["bytes"]


def test_storage_is_compared_like_with_like(stage_run):
    folder, summary = stage_run
    *_, (_, last) = StreamReader(folder / "stream.srf").frames()
    assert summary["raw_sparse_fp16"] == 2 * 13 * len(last.values) + 16 ** 3 // 8
    records = [f["bytes"] for f in summary["per_frame"][1:]]
    assert summary["bytes"] == np.mean(records) < summary["raw"] < summary["raw_sparse_fp16"]
    assert summary["bytes"] < summary["bytes_sparse_fp16"] < summary["raw_sparse_fp16"]


@pytest.mark.parametrize("more", [
    dict(mode="scratch"), dict(mode="band"), dict(as_released=True),
    dict(key_every=1), dict(degree=2, resolution=(16, 8, 24), hull=False), dict(degree=0)], ids=str)
def test_every_flag_runs(tmp_path, more):
    summary = sr.train(small(tmp_path / "a", **{"steps": 2, "first_iterations": 40, **more}))
    reader = StreamReader(tmp_path / "a/stream.srf")
    kinds = [kind for kind, _, _ in reader.records.values()]
    assert kinds == [KEY, KEY if more in (dict(mode="scratch"), dict(key_every=1)) else DELTA]
    assert reader.header["int8"] == ("as_released" not in more)
    assert 8 < summary["psnr"] < 40 and summary["mode"] == more.get("mode", "full")


def test_no_look_at_later_frames_and_a_film_that_goes_on(tmp_path):
    """Two frames of four are the first two of two; a finished run goes on to the same bytes."""
    for name, steps in (("a", 2), ("b", 4)):
        sr.train(small(tmp_path / name, steps=steps, first_iterations=30, key_every=3))
    a, b = ((tmp_path / name / "stream.srf").read_bytes() for name in "ab")
    end = StreamReader(tmp_path / "a/stream.srf").records[1][2]
    assert a[:end] == b[:end]
    more = dict(first_iterations=30, key_every=3, resume=True)
    for steps, want in ((2, a), (4, b)):
        sr.train(small(tmp_path / "a", steps=steps, **more))
        assert (tmp_path / "a/stream.srf").read_bytes() == want


@pytest.fixture
def films(monkeypatch):
    """What is filmed, instead of a file: (path, frames)."""
    shot = []
    monkeypatch.setattr(sr, "save_video", lambda path, frames, fps: shot.append((path, frames)))
    return shot


def test_play_needs_no_pictures(stage_run, tmp_path, monkeypatch, capsys, films):
    data = (stage_run[0] / "stream.srf").read_bytes()
    (tmp_path / "a.srf").write_bytes(data)
    (tmp_path / "cut.srf").write_bytes(data[:StreamReader(tmp_path / "a.srf").records[2][1] + 40])
    (tmp_path / "bad.srf").write_bytes(b"\x89PNG" + bytes(500))
    monkeypatch.setattr(sr, "load_video", lambda *_: pytest.fail("asked for pictures"))

    def play(name, *words):
        words = "--play", tmp_path / f"{name}.srf", "--device", "cpu", *words
        return conftest.command(sr, monkeypatch, capsys, *words)

    assert play("a") == (0, f"3 frames in {tmp_path / 'a.mp4'}\n", "")
    path, frames = films[-1]
    assert path == tmp_path / "a.mp4" and len(frames) == 3
    assert all(f.shape == (24, 24, 3) and f.std() > 0.02 for f in frames)
    assert play("a", "--steps", 2)[0] == 0 and len(films[-1][1]) == 2
    status, _, line = play("cut")
    assert status == 0 and "any after 1" in line and len(films[-1][1]) == 2
    for name, line in (("bad", "no stream"), ("missing", "no such file")):
        assert_refused(play(name), name, line)


WRONG = {"--resolution 17 16 16": "--resolution", "--resolution 4 16 16": "--resolution",
         "--lr 1 1 0.1 0": "--lr", "--birth nan": "--birth", "--first-iterations 1": "--first-it"}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    assert_refused(conftest.command(sr, monkeypatch, capsys, *words.split()), WRONG[words])
    assert not list(tmp_path.rglob("*"))


def test_n3dv_trains_and_plays(film, tmp_path, films):
    """Films of stage in the layout of Neural 3D Video: in NDC, without a motion mask."""
    pytest.importorskip("imageio_ffmpeg", reason="no ffmpeg")
    from test_videos import write_n3dv
    write_n3dv(film[0], tmp_path / "n3dv/clip", 2)
    args = small(tmp_path / "a", scene="clip", data=str(tmp_path), steps=2, first_iterations=80,
                 resolution=(24, 24, 16), video=True)
    summary = sr.train(args)
    assert summary["data"] == "n3dv" and "psnr_moving" not in summary and summary["psnr"] > 14
    reader, (path, frames) = StreamReader(tmp_path / "a/stream.srf"), films[-1]
    assert reader.header["ndc"] == 1 and reader.header["held_out"] == 1
    assert path == tmp_path / "a/render.mp4" and all(f.std() > 0.02 for f in frames)
    again = sr.train(replace(args, eval_only=True, video=False))
    assert json.loads((tmp_path / "a/summary.json").read_text())["psnr"] == again["psnr"]
    assert again["psnr"] == pytest.approx(summary["psnr"], abs=1e-5)
