"""soft_mining.py against known answers: the weight, the samplers, the pixel gradient, training, checkpoints, the command line.

Random draws are compared with what they should follow at a stated tolerance, from fixed seeds. Real data: NERF_DATA=... ; without it
those tests say that they were skipped.
"""
import json
import math
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import conftest  # noqa: E402
import soft_mining as sm  # noqa: E402
from conftest import assert_refused, close, content, lines, real, write_llff  # noqa: E402
from soft_mining import Args, MultinomialSampler, PixelTable, ReleasedWalkers, Walkers, edge_maps, grad_log_q, soft_weight  # noqa: E402

F64 = torch.float64
TINY = dict(size=24, train_background="scene", batch="rays", rays=256, lr=1e-2, lr_warmup=1, drift=1.0, noise=0.02, grid_decay=0.9, levels=4, log2_table=11, finest=48,
            march_steps=48, grid=16, eval_views=1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def images(V=3, H=12, W=16, seed=0):
    return torch.rand(V, H, W, 3, generator=torch.Generator().manual_seed(seed))


def args(**more):
    """Args for a sampler alone: every share that moves walkers about is off unless asked for."""
    return replace(Args(), **{**dict(uniform_share=0.0, reborn_share=0.0, reinit="none"), **more})


def histogram(view, xy, V, H, W):
    """Counts (V, H, W); also says that what was drawn are pixel centres inside the images."""
    x, y = (xy - 0.5).unbind(-1)
    assert (x == x.round()).all() and (y == y.round()).all()
    assert x.min() >= 0 and x.max() < W and y.min() >= 0 and y.max() < H
    return torch.bincount((view * H + y.long()) * W + x.long(), minlength=V * H * W).view(V, H, W).double()


def assert_drawn_from(counts, density):
    """Pearson's chi-square: within five of its standard deviations; nothing where the density is zero."""
    expected = density.double() / density.double().sum() * counts.sum()
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert expected.min() > 5, "too few draws for this test"
    chi2, freedom = float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * max(freedom, 1)), (chi2, freedom)


# ------------------------------------------------------------------------------------------------------- the soft weight

def test_soft_weight_by_hand():
    q = torch.tensor([0.25, 1.0, 0.0625])
    assert_close(soft_weight(q, 0.5, clamp=False), torch.tensor([2.0, 1.0, 4.0]))
    assert_close(soft_weight(q, 1.0, clamp=False), torch.tensor([4.0, 1.0, 16.0]))
    for clamp in (True, False):
        assert torch.equal(soft_weight(q, 0.0, clamp), torch.ones(3))                              # hard mining
    assert_close(soft_weight(torch.tensor([0.0, 2 ** -11, 2 ** -10]), 1.0, clamp=False), torch.full((3,), 1024.0))
    assert_close(soft_weight(torch.tensor([0.0]), 0.6, clamp=False), torch.tensor([64.0]))         # the released range: 1 to 64


def test_soft_weight_clamp_by_hand():
    w = soft_weight(1 / torch.tensor([1.0, 2.0, 3.0, 10.0]), 1.0)                                  # mean 4, squares 9 + 4 + 1 + 36
    assert_close(w, torch.tensor([1.0, 2.0, 3.0, 4 + math.sqrt(50 / 3)]))                          # n - 1 = 3: unbiased
    assert_close(soft_weight(torch.tensor([10.0, 1.0, 1.0, 1.0]), 1.0), torch.tensor([0.2, 1.0, 1.0, 1.0]))


def test_soft_weight_of_one_pixel_and_without_gradient():
    assert_close(soft_weight(torch.tensor([0.25]), 0.5), torch.tensor([2.0]))                      # its own mean, deviation 0
    assert not soft_weight(torch.tensor([0.25, 0.5], requires_grad=True), 0.5).requires_grad


# --------------------------------------------------------------------------------------------------- tables of densities

def test_pixel_table_follows_its_density_in_every_image():
    V, H, W = 3, 5, 7
    density = torch.rand(V, H, W) + 0.05
    density[0, 0, :3], density[1, 2], density[2, -1, -2:] = 0, 0, 0                                # at the start, a row, at the end
    density[1] *= 1e6                                                                              # any scale
    view = torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), 200_000, replacement=True)             # in no order
    counts = histogram(view, PixelTable(density).draw(view), V, H, W)
    for v in range(V):
        assert counts[v].sum() == (view == v).sum()
        assert_drawn_from(counts[v], density[v])


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_pixel_table_reaches_the_first_and_the_last_pixel(scale):
    density = torch.zeros(40, 3, 4)
    density[::2, 0, 0], density[1::2, 2, 3] = scale, scale
    view = torch.arange(40).repeat(50)
    xy = PixelTable(density).draw(view)
    assert (xy[view % 2 == 0] == 0.5).all() and (xy[view % 2 == 1] == torch.tensor([3.5, 2.5])).all()


@pytest.mark.parametrize("u, pixel", [(0.0, [1.5, 0.5]), (1 - 2 ** -53, [3.5, 2.5])])
def test_pixel_table_at_the_ends_of_the_random_number(monkeypatch, u, pixel):
    monkeypatch.setattr(torch, "rand", lambda *size, **kind: torch.full(size, u, **kind))          # view + u rounds up to view + 1
    density = torch.rand(100, 3, 4) + 0.1
    density[:, 0, 0] = 0                                                                           # not even where the number is 0
    assert (PixelTable(density).draw(torch.arange(100)) == torch.tensor(pixel)).all()


def test_uniform_pixels():
    counts = histogram(torch.zeros(100_000, dtype=torch.long), sm.uniform_pixels(100_000, 5, 9, "cpu"), 1, 5, 9)
    assert_drawn_from(counts, torch.ones(1, 5, 9))


def test_edge_maps_by_hand():
    step = torch.zeros(2, 6, 8, 3)
    step[0, :, 4:], step[1, :, 4:] = 1.0, 0.1                                                      # two contrasts: a maximum an image
    edges = edge_maps(step)
    assert_close(edges[:, :, 3:5], torch.ones(2, 6, 2), atol=1e-5, rtol=0)
    assert (edges[:, :, [0, 1, 2, 5, 6, 7]] == 1e-5).all()
    flat = edge_maps(torch.full((1, 6, 8, 3), 0.7))                                                # all pixels alike, the border too
    assert flat.max() == flat.min()
    ramp = (torch.arange(8.0) / 10)[None, :, None, None].expand(1, 8, 6, 3)                        # along y
    expected = torch.ones(1, 8, 6)
    expected[:, [0, -1]] = 0.5                                                                     # half the rise where one side is missing
    assert_close(edge_maps(ramp), expected)
    colours = torch.zeros(1, 4, 24, 3)
    for i in range(3):
        colours[0, :, 4 + 8 * i:8 + 8 * i, i] = 1.0
    edges = edge_maps(colours)[0, 1]
    assert_close(edges[[4, 12, 20]], torch.tensor([0.2989, 0.5870, 0.1140]) / 0.5870, atol=1e-5, rtol=0)


def test_fixed_samplers():
    pictures = torch.zeros(3, 6, 8, 3)
    pictures[:, :, 4:] = 1.0
    sampler = sm.FixedSampler(pictures, args(sampling="uniform"))
    assert_drawn_from(histogram(*sampler.draw(60_000), 3, 6, 8), torch.ones(3, 6, 8))
    for share in (0.0, 0.25, 1.0):
        sampler = sm.FixedSampler(pictures, args(sampling="edge", uniform_share=share))
        edges = edge_maps(pictures)
        density = share / edges.numel() + (1 - share) * edges / edges.sum()
        counts = histogram(*sampler.draw(200_000), 3, 6, 8)
        assert abs(float(counts[:, :, 3:5].sum() / counts.sum() - density[:, :, 3:5].sum())) < 0.005
        assert_close(counts.sum((1, 2)) / counts.sum(), torch.full((3,), 1 / 3, dtype=F64), atol=0.005, rtol=0)


# ----------------------------------------------------------------------------------------- multinomial over a stored map

def test_multinomial_with_exponent_one_is_unbiased():
    """Pixels drawn from Q, weights 1/Q: mean(w e) times the mean of Q is the uniform mean of any error, here one that has nothing to do with Q."""
    V, H, W, n = 3, 6, 5, 200_000
    q, e = torch.rand(V, H, W) * 0.5 + 0.01, torch.rand(V, H, W) ** 4
    for pictures, how in ((slice(None), "global"), (slice(1), "per-image")):                       # one image: the two are the same
        Q, E = q[pictures], e[pictures]
        sampler = MultinomialSampler(torch.zeros(len(Q), H, W, 3), args(sampling="multinomial", walkers=how, refresh=1))
        sampler.draw(1)
        sampler.error = Q.clone()
        view, xy = sampler.draw(n)
        x, y = xy.long().unbind(-1)
        terms = soft_weight(Q[view, y, x], 1.0, clamp=False) * E[view, y, x] * Q.mean()
        assert abs(float(terms.mean() - E.mean())) < 5 * float(terms.std()) / math.sqrt(n)
        assert abs(float(E[view, y, x].mean() - E.mean())) > 5 * float(E.std()) / math.sqrt(n)     # the weights are needed


def test_multinomial_stores_what_it_saw():
    V, H, W = 2, 3, 4
    sampler = MultinomialSampler(torch.zeros(V, H, W, 3), args(sampling="multinomial", refresh=3))
    q_of = torch.rand(V, H, W) + 0.1
    seen = torch.zeros(V, H, W, dtype=torch.bool)
    for step in range(3):
        assert_close(sampler.density, torch.ones(V, H, W))                                         # not rebuilt before `refresh` draws
        view, xy = sampler.draw(5)
        x, y = xy.long().unbind(-1)
        seen[view, y, x] = True
        sampler.update(None, q_of[view, y, x], None, None)
    assert 0 < seen.sum() < seen.numel()
    assert torch.equal(sampler.error.isnan(), ~seen) and torch.equal(sampler.error[seen], q_of[seen])
    sampler.update(None, q_of[view, y, x] * 2, None, None)                                         # the last time counts
    q_of[view, y, x] *= 2
    view, xy = sampler.draw(100_000)
    expected = torch.where(seen, q_of, q_of[seen].mean())
    assert_close(sampler.density, expected)
    counts = histogram(view, xy, V, H, W)
    for v in range(V):
        assert_drawn_from(counts[v], expected[v])
    assert_close(counts.sum((1, 2)) / counts.sum(), torch.full((2,), 0.5, dtype=F64), atol=0.01, rtol=0)


def test_multinomial_budget_and_uniform_share():
    error = torch.tensor([1.0, 2.0, 5.0])[:, None, None] * (torch.rand(3, 4, 4) + 0.5)
    error = error / error.mean((1, 2), keepdim=True) * torch.tensor([1.0, 2.0, 5.0])[:, None, None]
    sampler = MultinomialSampler(torch.zeros(3, 4, 4, 3), args(sampling="multinomial", walkers="global", refresh=1, uniform_share=0.25))
    sampler.draw(1)
    sampler.error = error
    counts = histogram(*sampler.draw(200_000), 3, 4, 4)
    inside = 0.75 * error / error.sum((1, 2), keepdim=True) + 0.25 / 16
    assert_drawn_from(counts, torch.tensor([1.0, 2.0, 5.0])[:, None, None] * inside)


# ---------------------------------------------------------------------------------------------------------- the gradient

def smooth_picture(xy):
    """A differentiable "render": (n, 2) -> (n, 3)."""
    x, y = xy.unbind(-1)
    return torch.stack([torch.sin(0.3 * x) * y, torch.cos(0.2 * x * y), (0.1 * x - 0.2 * y) ** 2], -1)


@pytest.mark.parametrize("N", [1, 7, 200])
@pytest.mark.parametrize("weighted", [False, True])
def test_grad_log_q_is_the_gradient_of_log_rms(N, weighted):
    generator = torch.Generator().manual_seed(1)
    xy = (torch.rand(N, 2, dtype=F64, generator=generator) * 5).requires_grad_()
    truth = torch.rand(N, 3, dtype=F64, generator=generator)
    w = torch.rand(N, dtype=F64, generator=generator) * 30 + 0.2 if weighted else torch.ones(N, dtype=F64)
    e = ((smooth_picture(xy) - truth) ** 2).mean(-1)
    d_xy, = torch.autograd.grad((w * e).mean(), xy, retain_graph=True)
    expected, = torch.autograd.grad(e.sqrt().log().sum(), xy)
    assert_close(grad_log_q(e.detach(), w, d_xy), expected, rtol=1e-10, atol=1e-12)


def test_grad_log_q_where_there_is_no_error():
    assert torch.equal(grad_log_q(torch.zeros(3), torch.ones(3), torch.zeros(3, 2)), torch.zeros(3, 2))


def test_truth_gradient():
    slope = torch.tensor([[0.02, -0.01], [0.0, 0.03], [-0.015, 0.005]])                            # (3, 2) of each channel along x, y
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    picture = torch.stack([x, y], -1) @ slope.T                                                    # (7, 9, 3)
    view, xy = torch.tensor([1]).expand(63), common.pixel_grid(7, 9)
    found = sm.truth_gradient(torch.stack([torch.zeros(7, 9, 3), picture]), view, xy)
    assert_close(found, slope.expand(63, 3, 2), atol=1e-6, rtol=0)                                 # the border too: one-sided
    squares = (x ** 2)[None, ..., None].expand(1, 7, 9, 3)
    found = sm.truth_gradient(squares, torch.zeros(3, dtype=torch.long), torch.tensor([[4.5, 3.5], [0.5, 0.5], [8.5, 6.5]]))
    assert_close(found[:, 0], torch.tensor([[8.0, 0.0], [1.0, 0.0], [15.0, 0.0]]))                 # (25 - 9) / 2, 1 - 0, 64 - 49
    assert torch.equal(sm.truth_gradient(torch.rand(1, 1, 1, 3), torch.tensor([0]), torch.tensor([[0.5, 0.5]])), torch.zeros(1, 3, 2))


def some_views(ndc):
    """Two 16x12 views, of a ball's surroundings or forward-facing, in float64."""
    if ndc:
        c2w = torch.eye(4, dtype=F64)[None, :3].repeat(2, 1, 1)
        c2w[1, 0, 3] = 0.2
    else:
        c2w = torch.stack([torch.tensor(common.orbit_pose(a, 0.5, 4.0)) for a in (0.3, 2.0)])
    K = torch.tensor([[18.0, 0, 8], [0, 18.0, 6], [0, 0, 1]], dtype=F64)
    pictures = images(2, 12, 16).double()
    return common.Views(pictures, c2w, K, None, None, ["a", "b"])


@pytest.mark.parametrize("ndc", [False, True])
def test_pixel_gradient_of_the_real_render_path(monkeypatch, ndc):
    """d loss / d xy, through camera, positions, directions, hash grid, MLPs and compositing, against central differences in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)                                # the field rounds nothing to float32
    views = some_views(ndc)
    aabb = torch.tensor([[-1.5, -1.5, -1.0], [1.5, 1.5, 1.0]] if ndc else [[-1.5] * 3, [1.5] * 3], dtype=F64)
    near, far = (0.0, 4.0) if ndc else (2.0, 6.0)
    scene = common.Scene("s", "blender", views, views, aabb, near, far, torch.tensor([1.0, 0.5, 0.2], dtype=F64), ndc)
    field = sm.HashField(replace(Args(), levels=3, features=2, log2_table=9, base=3, finest=10), aabb).double()
    with torch.no_grad():
        field.table.normal_()                                                                      # a field with something in it
    grid = common.OccupancyGrid(aabb, 8)
    grid.occupied.copy_(torch.rand(8, 8, 8) < 0.6)
    n = 40
    view, xy = torch.arange(n) % 2, torch.rand(n, 2, dtype=F64) * torch.tensor([16.0, 12.0], dtype=F64)
    truth, w, jitter = torch.rand(n, 3, dtype=F64), torch.rand(n, dtype=F64) * 5 + 0.2, torch.rand(n, dtype=F64)
    packed = sm.march(*sm.camera_rays(views, view, xy, ndc), grid.occupied, aabb, 0.1, near, far, jitter)
    assert len(packed[0]) > 5 * n
    monkeypatch.setattr(sm, "march", lambda *_: packed)                                            # distances t are constants

    def loss(pixel):
        out = sm.render(field, grid, *sm.camera_rays(views, view, pixel, ndc), scene, scene.bg, 0.1, jitter)
        return w * ((out["rgb"] - truth) ** 2).mean(-1)                                            # (n,)
    pixel = xy.clone().requires_grad_()
    found, = torch.autograd.grad(loss(pixel).sum(), pixel)
    h, difference = 1e-7, torch.zeros(n, 2, dtype=F64)
    with torch.no_grad():
        for axis in range(2):
            shift = h * torch.eye(2, dtype=F64)[axis]
            difference[:, axis] = (loss(xy + shift) - loss(xy - shift)) / (2 * h)
    assert (found.norm(dim=1) > 1e-6).sum() > n / 2 and (found - difference).norm() < 1e-5 * difference.norm()


# ------------------------------------------------------------------------------------------------------ Langevin walkers

def walk(sampler, log_q, moves, measured):
    """Moves walkers by the analytic gradient of log_q(x, y), x and y in longer image sides; -> positions (measured * n, 2) of the last moves."""
    side, seen = max(sampler.H, sampler.W), []
    for t in range(moves):
        _, xy = sampler.draw(len(sampler.xy))
        u = (xy / side).requires_grad_()
        value = log_q(*u.unbind(-1))
        gradient = torch.autograd.grad(value.sum(), u)[0] / side                                   # of log Q, per pixel
        e = (2 * value.detach()).exp()
        sampler.update(e, e.sqrt(), torch.ones_like(e), 2 * e[:, None] * gradient / len(e))        # e = Q^2, loss = mean e
        if t >= moves - measured:
            seen.append(sampler.xy / side)
    return torch.cat(seen)


def hills(x, y):
    """log Q on a picture 1 wide and 3/4 high: one hill in the middle, about 13 : 1, level at the border."""
    cx, cy = torch.cos(2 * math.pi * x), torch.cos(8 / 3 * math.pi * y)
    return -0.8 * cx - 0.5 * cy - 0.2 * cx * cy


BORDER = 1 / 16


def shares(u, n=6):
    """Share of positions in each of n x n fields of the picture without its border."""
    x = ((u[:, 0] - BORDER) / (1 - 2 * BORDER) * n).floor().long()
    y = ((u[:, 1] - BORDER) / (0.75 - 2 * BORDER) * n).floor().long()
    ok = (x >= 0) & (x < n) & (y >= 0) & (y < n)
    return torch.bincount(y[ok] * n + x[ok], minlength=n * n).double() / ok.sum()


def expected_shares(power):
    y, x = torch.meshgrid((torch.arange(750) + 0.5) / 1000, (torch.arange(1000) + 0.5) / 1000, indexing="ij")
    weight = (power * hills(x, y)).exp()
    bins = torch.stack([x, y], -1).reshape(-1, 2)
    n = 6
    i = ((bins[:, 0] - BORDER) / (1 - 2 * BORDER) * n).floor().long()
    j = ((bins[:, 1] - BORDER) / (0.75 - 2 * BORDER) * n).floor().long()
    ok = (i >= 0) & (i < n) & (j >= 0) & (j < n)
    total = torch.zeros(n * n, dtype=F64).index_add_(0, j[ok] * n + i[ok], weight.flatten()[ok].double())
    return total / total.sum()


@pytest.mark.parametrize("drift, size, count", [(1.0, 64, 20_000), (1.0, 128, 10_000), (2.0, 64, 20_000), (0.0, 64, 10_000)])
def test_walkers_end_up_distributed_as_q_to_the_drift(drift, size, count):
    """The stationary density of the walk is Q^drift, at any resolution and batch: each of 36 fields holds its share to 6 % + 0.0015."""
    sampler = Walkers(torch.zeros(2, size * 3 // 4, size, 3), args(drift=drift, noise=0.03), count)
    found, expected = shares(walk(sampler, hills, 400, 150)), expected_shares(drift)
    assert expected_shares(1.0).max() > 5 * expected_shares(1.0).min()                             # something to find
    assert ((found - expected).abs() < 0.06 * expected + 0.0015).all(), (found / expected).view(6, 6)


def test_walkers_that_only_diffuse_stay_uniform_up_to_the_border():
    sampler = Walkers(torch.zeros(1, 48, 64, 3), args(drift=0.0, noise=0.02), 8000)
    u = walk(sampler, lambda x, y: 0 * x * y, 400, 100) * 64
    counts = histogram(torch.zeros(len(u), dtype=torch.long), u.floor() + 0.5, 1, 48, 64)[0] / len(u) * 48 * 64
    border = torch.ones(48, 64, dtype=torch.bool)
    border[1:-1, 1:-1] = False
    assert abs(float(counts[~border].mean()) - 1) < 0.1 and abs(float(counts[border].mean()) - 1) < 0.1, float(counts[border].mean())


def quiet(monkeypatch):
    """No noise: randn gives zeros."""
    monkeypatch.setattr(torch, "randn", lambda *size, **kind: torch.zeros(*size, **kind))
    monkeypatch.setattr(torch, "randn_like", lambda x, **kind: torch.zeros_like(x, **kind))


def one_move(size, N, drift=1.0, noise=0.02, gradient=1.5):
    """Displacement in longer image sides of walkers at one place, log Q's gradient along x being `gradient` per image side."""
    sampler = Walkers(torch.zeros(2, size, size, 3), args(drift=drift, noise=noise), N)
    sampler.xy.fill_(size * 0.5)
    before = sampler.xy.clone()
    sampler.draw(N)
    e, w = torch.rand(N) + 0.1, torch.rand(N) * 3 + 0.2
    g = torch.tensor([gradient / size, 0.0]).expand(N, 2)
    sampler.update(e, e.sqrt(), w, w[:, None] * 2 * e[:, None] * g / N)
    return (sampler.xy - before) / size


def test_drift_keeps_its_meaning_at_other_resolutions_and_batches(monkeypatch):
    quiet(monkeypatch)
    expected = torch.tensor([0.02 ** 2 / 2 * 1.5, 0.0])                                            # drift b^2 / 2 grad log Q
    for size, N in ((64, 100), (128, 100), (800, 100), (64, 2), (64, 5000)):
        assert_close(one_move(size, N), expected.expand(N, 2), rtol=2e-2, atol=1e-6)
    assert_close(one_move(256, 10, drift=3.0), 3 * expected.expand(10, 2), rtol=2e-2, atol=1e-6)
    assert one_move(64, 10, drift=0.0).abs().max() == 0


def test_noise_is_in_longer_image_sides():
    for H, W in ((40, 100), (100, 40), (200, 80)):
        sampler = Walkers(torch.zeros(1, H, W, 3), args(noise=0.02), 20_000)
        sampler.xy.copy_(torch.tensor([W / 2, H / 2]))
        sampler.draw(20_000)
        sampler.update(torch.ones(20_000), torch.ones(20_000), torch.ones(20_000), None)
        moved = (sampler.xy - torch.tensor([W / 2, H / 2])) / max(H, W)
        assert close(moved.std(0), torch.full((2,), 0.02), rtol=0.03, atol=0) and moved.mean(0).abs().max() < 0.001


def test_a_move_s_drift_is_cut_to_two_noises(monkeypatch):
    quiet(monkeypatch)
    limit = 2 * 0.02
    assert_close(one_move(100, 10, gradient=1e4)[:, 0], torch.full((10,), limit), rtol=1e-3, atol=0)
    just = 0.99 * limit / (0.02 ** 2 / 2)
    assert_close(one_move(100, 10, gradient=just)[:, 0], torch.full((10,), 0.99 * limit), rtol=1e-3, atol=0)
    assert one_move(100, 10, noise=0.0, gradient=1e4).abs().max() == 0


def standing(n=200, V=4, H=20, W=30, **more):
    """Walkers that do not move by themselves, none on a pixel's centre (where all that are born stand)."""
    pictures = torch.zeros(V, H, W, 3)
    pictures[:, :, W // 2:] = 1.0                                                                  # edges: columns W/2 - 1 and W/2
    sampler = Walkers(pictures, args(noise=0.0, **more), n)
    sampler.xy.copy_(torch.rand(n, 2) * 0.4 + (torch.rand(n, 2) * torch.tensor([W, H])).floor())
    sampler.draw(n)
    return sampler


def born(sampler, q, **more):
    """Which walkers another position was given, by their place in the batch."""
    before = sampler.xy[sampler.drawn].clone()
    sampler.update(q ** 2, q, torch.ones_like(q), None)
    return ((sampler.xy[sampler.drawn] - before).abs() > 1e-3).any(1)


@pytest.mark.parametrize("reinit", ["uniform", "edge"])
def test_reborn_are_the_k_of_least_error_and_those_that_left(reinit):
    sampler = standing(reinit=reinit, reborn_share=0.1)
    q = torch.rand(200) + 0.1
    out = torch.tensor([3, 50, 120])
    q[out] = 2.0                                                                                   # not for their error
    for i, place in zip(out, ([-0.1, 3.0], [30.0, 3.0], [7.0, 20.5])):
        sampler.xy[sampler.drawn[i]] = torch.tensor(place)
    expected = torch.zeros(200, dtype=torch.bool)
    expected[q.argsort()[:20]] = True
    expected[out] = True
    assert torch.equal(born(sampler, q), expected)
    xy = sampler.xy[sampler.drawn][expected]
    assert (xy % 1 == 0.5).all() and (xy > 0).all() and (xy < torch.tensor([30.0, 20.0])).all()
    on_edge = (xy[:, 0] == 14.5) | (xy[:, 0] == 15.5)
    assert on_edge.all() if reinit == "edge" else on_edge.sum() < 8


def test_reinit_none_moves_nobody_and_keeps_all_inside():
    sampler = standing(reinit="none", reborn_share=0.1)
    assert not born(sampler, torch.rand(200)).any()
    sampler.xy[:2] = torch.tensor([[-5.0, 3.0], [31.0, 22.0]])
    sampler.draw(200)
    sampler.update(torch.ones(200), torch.ones(200), torch.ones(200), None)
    assert (sampler.xy >= 0).all() and (sampler.xy < torch.tensor([30.0, 20.0])).all() and abs(float(sampler.xy[0, 1]) - 3.0) < 1e-5
    assert (sampler.draw(200)[1] < torch.tensor([30.0, 20.0])).all()


def test_reborn_share_holds_where_many_errors_are_equal():
    """Rays that meet nothing render the background exactly: half of all errors may be 0, and yet only a tenth shall be reborn."""
    q = torch.rand(200) + 0.1
    q[::2] = 0.0
    moved = born(standing(reinit="uniform", reborn_share=0.1), q)
    assert not moved[1::2].any() and 0 < moved.sum() <= 20, int(moved.sum())


def test_walkers_keep_to_their_image_or_go_where_the_error_is():
    error = torch.tensor([0.05, 0.05, 0.5, 0.05])
    for walkers in ("per-image", "global"):
        sampler = Walkers(torch.rand(4, 20, 30, 3), replace(Args(), walkers=walkers), 400)
        before = sampler.view.clone()
        assert torch.equal(before.bincount(), torch.full((4,), 100))
        for _ in range(100):
            view, _ = sampler.draw(400)
            q = error[view] * (0.5 + torch.rand(400))
            sampler.update(q ** 2, q, torch.ones(400), None)
        if walkers == "per-image":
            assert torch.equal(sampler.view, before)
        else:
            counts = sampler.view.bincount(minlength=4)
            assert counts[2] > 300 and counts.min() > 0, counts                                    # of 400; 0.77 of the error is there
            assert_close(sampler.image_error, error, rtol=0.15, atol=0)


def test_global_walkers_running_mean_by_hand():
    sampler = Walkers(torch.rand(3, 6, 6, 3), args(walkers="global", reinit="uniform"), 4)
    sampler.view.copy_(torch.tensor([0, 0, 2, 2]))
    view, _ = sampler.draw(4)
    sampler.update(torch.ones(4), torch.tensor([0.2, 0.0, 0.4, 0.0])[sampler.drawn], torch.ones(4), None)
    assert_close(sampler.image_error, torch.tensor([0.9 + 0.1 * 0.1, 1.0, 0.9 + 0.1 * 0.2]))       # image 1 was not seen


def test_uniform_share_comes_to_all_walkers_and_images():
    sampler = standing(n=200, uniform_share=0.1)
    times = torch.zeros(200)
    for _ in range(300):
        sampler.xy.fill_(0.25)
        sampler.draw(200)
        moved = born(sampler, torch.rand(200))
        assert moved.sum() == 20
        times[sampler.drawn[moved]] += 1
    per_image = torch.zeros(4).index_add_(0, sampler.view, times)
    assert times.min() > 8 and times.max() < 60 and abs(per_image / 1500 - 1).max() < 0.1          # 30 each


@pytest.mark.parametrize("reinit", ["none", "uniform", "edge"])
@pytest.mark.parametrize("walkers", ["per-image", "global"])
def test_walkers_stay_inside(reinit, walkers):
    sampler = Walkers(images(), replace(Args(), reinit=reinit, walkers=walkers, noise=0.7, drift=50.0), 60)
    for _ in range(30):
        view, xy = sampler.draw(40)
        assert histogram(view, xy, 3, 12, 16).sum() == 40
        sampler.update(torch.rand(40), torch.rand(40), torch.ones(40), torch.randn(40, 2))
        assert (sampler.xy >= 0).all() and (sampler.xy < torch.tensor([16, 12])).all() and sampler.xy.isfinite().all()


def test_a_step_that_draws_some_walkers_moves_only_those():
    sampler = Walkers(images(), replace(Args(), walkers="global"), 90)
    before = sampler.xy.clone(), sampler.view.clone()
    view, xy = sampler.draw(30)
    drawn = torch.zeros(90, dtype=torch.bool)
    drawn[sampler.drawn] = True
    assert drawn.sum() == 30 and torch.equal(view, before[1][sampler.drawn]) and torch.equal(xy, before[0][sampler.drawn].floor() + 0.5)
    sampler.update(torch.rand(30), torch.rand(30), torch.ones(30), torch.randn(30, 2))
    assert torch.equal(sampler.xy[~drawn], before[0][~drawn]) and torch.equal(sampler.view[~drawn], before[1][~drawn])
    assert (sampler.xy[drawn] != before[0][drawn]).any(1).all()
    sampler.draw(30)
    assert set(sampler.drawn.tolist()) != set(drawn.nonzero().flatten().tolist())                  # others, the next time


# ----------------------------------------------------------------------------------------------- the released code's rule

def released(V=5, H=9, W=11, rays=100):
    sampler = ReleasedWalkers(torch.zeros(V, H, W, 3), images(V, H, W), rays)
    sampler.s = torch.rand(len(sampler.view), 2) * 0.8 + 0.1
    return sampler


@pytest.mark.parametrize("V, rays, bs, N", [(100, 4096, 41, 4100), (17, 4096, 241, 4097), (4, 8, 2, 8)])
def test_released_slots(V, rays, bs, N):
    sampler = ReleasedWalkers(torch.zeros(V, 5, 7, 3), torch.zeros(V, 5, 7, 3), rays)
    assert torch.equal(sampler.view, torch.arange(N) // bs)
    view, xy = sampler.draw(3)                                                                     # all of them, whatever is asked
    assert len(xy) == N and torch.equal(view, sampler.view)
    pixels = sampler.s * torch.tensor([4.0, 6.0])                                                  # starts on whole pixels
    assert close(pixels, pixels.round()) and (sampler.s >= 0).all() and (sampler.s <= 1).all()
    if N > 4000:
        assert_drawn_from(histogram(torch.zeros_like(view), xy, 1, 5, 7), torch.ones(1, 5, 7))


def test_released_positions_are_row_column_over_the_last_index():
    sampler = released(V=1, H=5, W=11, rays=5)
    sampler.s = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.14 / 4, 0.4 / 10], [0.6 / 4, 0.6 / 10], [2.4 / 4, 6.6 / 10]])
    assert_close(sampler.draw(5)[1], torch.tensor([[10.5, 0.5], [0.5, 4.5], [0.5, 0.5], [1.5, 1.5], [7.5, 2.5]]))


def test_released_move_by_the_formula(monkeypatch):
    """s + 20 G + 0.02 eta with G_n = g_n / (1024 w_n e_n + eps), g = 1024 d mean(w e) / d pixel: (20/N) grad log e, per PIXEL, added to s."""
    sampler = released()
    N, before = 100, sampler.s.clone()
    eta, gradient = torch.randn(N, 2), torch.randn(N, 2) * 0.3                                     # grad log e, (x, y) per pixel
    monkeypatch.setattr(torch, "randn_like", lambda x: eta)
    monkeypatch.setattr(torch, "randn", lambda *size, **kind: eta)
    e, w = torch.rand(N) * 0.1 + 1e-2, torch.rand(N) * 3 + 0.2
    e[0], w[0] = 2 ** -20, 1.0                                                                     # here the epsilon matters ...
    sampler.update(e, e.sqrt(), w, w[:, None] * e[:, None] * gradient / N)
    G = (1024 * w * e / (1024 * w * e + 2 ** -23))[:, None] * gradient.flip(-1) / N
    assert 1024 * 2 ** -20 > 1e-4
    expected = before + 20 * G + 0.02 * eta
    alive = (w * e > (w * e).sort().values[10]) & (torch.arange(N) < 90) & ((expected >= 0) & (expected <= 1)).all(1)
    assert alive.sum() > 60
    assert_close(sampler.s[alive], expected[alive], rtol=1e-5, atol=1e-6)
    assert (sampler.s[~alive] != expected[~alive]).any(1).all()


def test_released_without_gradient(monkeypatch):
    quiet(monkeypatch)
    sampler = released()
    before = sampler.s.clone()
    e = torch.linspace(1, 2, 100).flip(0)                                                          # the last 10 + 1 are the least
    sampler.update(e, e, torch.ones(100), None)
    assert torch.equal(sampler.s[:89], before[:89]) and (sampler.s[89:] != before[89:]).any(1).all()


MARK = torch.tensor([3.5, 2.5])                                                                    # x, y of every pixel "drawn from the edges"


def flagged(sampler, e, w, d_xy=None):
    """Which slots were sent to their image's edges, and the positions before."""
    sampler.edges.draw = lambda view: MARK.double().expand(len(view), 2)
    before = sampler.s.clone()
    sampler.update(e, e.sqrt(), w, d_xy)
    at = (sampler.s * sampler.last).round().flip(-1) + 0.5
    assert torch.equal(at, sampler.draw(len(e))[1])
    return (sampler.s == sampler.to_s(MARK)).all(1), before


@pytest.mark.parametrize("N", [100, 105])
def test_released_kills_a_tenth_and_one_by_weighted_loss(monkeypatch, N):
    quiet(monkeypatch)
    e, w = torch.rand(N) + 0.01, torch.rand(N) * 30 + 0.2
    dead, before = flagged(released(V=5, rays=N), e, w)
    expected = torch.zeros(N, dtype=torch.bool)
    expected[(w * e).argsort()[:N // 10 + 1]] = True
    assert torch.equal(dead, expected) and not torch.equal(dead, e <= e.sort().values[N // 10])


def test_released_ties_die_together_and_flagged_uniform_slots_go_to_edges(monkeypatch):
    quiet(monkeypatch)
    sampler = released()
    e = torch.rand(100) + 0.1
    e[40:65], e[95:] = 0.01, 0.01                                                                  # 30 equal ones; the last five are uniform slots
    dead, before = flagged(sampler, e, torch.ones(100))
    assert torch.equal(dead.nonzero().flatten(), torch.cat([torch.arange(40, 65), torch.arange(95, 100)]))
    assert torch.equal(sampler.s[:40], before[:40]) and torch.equal(sampler.s[65:90], before[65:90])
    assert (sampler.s[90:95] != before[90:95]).any(1).all()                                        # uniform: floor(0.1 N) slots, from 90 on
    positions = []
    for _ in range(200):                                                                           # anywhere in [0, 1)^2, between pixels
        flagged(sampler, e, torch.ones(100))
        positions.append(sampler.s[90:95])
    positions = torch.cat(positions)
    assert_close(positions.mean(0), torch.full((2,), 0.5), atol=0.05, rtol=0)
    assert_close(positions.std(0), torch.full((2,), 12 ** -0.5), atol=0.03, rtol=0)


def test_released_walkers_that_leave_go_to_edges(monkeypatch):
    quiet(monkeypatch)
    sampler = released()
    outside = torch.tensor([7, 20, 33, 50])
    sampler.s[outside] = torch.tensor([[-0.01, 0.5], [0.5, -0.01], [1.01, 0.5], [0.5, 1.01]])
    e = torch.linspace(1, 2, 100).flip(0)
    dead, before = flagged(sampler, e, torch.ones(100))
    assert torch.equal(dead.nonzero().flatten(), torch.cat([outside, torch.arange(89, 100)]))
    assert (sampler.s >= 0).all() and (sampler.s <= 1).all()


def test_released_edges_column_maximum_and_zero_padding():
    picture = torch.rand(2, 6, 7, 3)
    grey = np.pad((picture.double().numpy() @ np.array([0.2989, 0.5870, 0.1140])), ((0, 0), (1, 1), (1, 1)))
    expected = np.zeros((2, 6, 7))
    for v in range(2):
        for i in range(6):
            for j in range(7):
                p = grey[v, i:i + 3, j:j + 3]
                gx = (p[:, 2] - p[:, 0]) @ [1, 2, 1]
                gy = (p[2] - p[0]) @ [1, 2, 1]
                expected[v, i, j] = math.hypot(gx, gy)
        expected[v] = np.clip(expected[v] / (expected[v].max(0, keepdims=True) + 1e-7), 1e-5, 1)   # a maximum for each column
    assert_close(ReleasedWalkers.edge_maps(picture), torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)
    flat = ReleasedWalkers.edge_maps(torch.full((1, 6, 7, 3), 0.8))[0]
    assert (flat[0] > 0.99).all() and (flat[1:-1, 0] > 0.5).all() and (flat[2:-2, 2:-2] < 2e-5).all()   # the border looks like an edge


def test_released_sampler_of_a_scene(tiny):
    """Edges of the picture on black, not of what is trained on; nominal rays, whatever the walkers' own flags say."""
    scene = common.load_scene(str(tiny), tiny, 24, "white")
    sampler = sm.make_sampler(scene, replace(Args(), as_released=True, rays=256))
    assert isinstance(sampler, ReleasedWalkers) and len(sampler.s) == 260 and (sampler.A, sampler.B) == (20.0, 0.02)
    black = common.load_scene(str(tiny), tiny, 24, "black")
    assert_close(sampler.edges.cdf, PixelTable(ReleasedWalkers.edge_maps(black.train.images)).cdf, atol=1e-4, rtol=0)
    assert (sampler.edges.cdf - PixelTable(ReleasedWalkers.edge_maps(scene.train.images)).cdf).abs().max() > 0.01
    assert sm.make_sampler(replace(scene, train=replace(scene.train, alpha=None)), replace(Args(), as_released=True, rays=256)) is not None


@pytest.mark.parametrize("rays", [256, 8])
def test_every_training_image_has_a_walker(tiny, rays):
    scene = common.load_scene(str(tiny), tiny, 24, "white")
    sampler = sm.make_sampler(scene, replace(Args(), rays=rays))
    assert set(sampler.view.tolist()) == set(range(20))


# ------------------------------------------------------------------------------------------------------ field and render

def small_field(**more):
    aabb = torch.tensor([[-1.5] * 3, [1.5] * 3])
    views = some_views(False)
    views = replace(views, images=views.images.float(), c2w=views.c2w.float(), K=views.K.float())
    scene = common.Scene("s", "blender", views, views, aabb, 2.0, 6.0, torch.tensor([0.9, 0.5, 0.1]), False)
    return sm.HashField(replace(Args(), levels=3, features=2, log2_table=9, base=3, finest=10, **more), aabb), common.OccupancyGrid(aabb, 8), scene


def test_field():
    field, _, scene = small_field()
    with torch.no_grad():
        field.table.normal_(std=3.0)
    x, d = torch.rand(500, 3) * 3 - 1.5, normalize(torch.randn(500, 3), dim=-1)
    sigmas, rgbs = field(x, common.spherical_harmonics(d))
    assert sigmas.shape == (500,) and rgbs.shape == (500, 3) and (sigmas > 0).all() and (rgbs > 0).all() and (rgbs < 1).all()
    assert close(field.density(x), sigmas) and sigmas.max() > 2 * sigmas.min()
    other = field(x, common.spherical_harmonics(-d))
    assert torch.equal(other[0], sigmas) and (other[1] - rgbs).abs().max() > 1e-3                  # density sees no direction, colour does
    y = torch.tensor([-3.0, 2.0, 20.0], requires_grad=True)
    out = sm._TruncatedExp.apply(y)
    assert_close(out.detach(), y.detach().exp())
    out.sum().backward()
    assert_close(y.grad, torch.tensor([-3.0, 2.0, 15.0]).exp())
    half = small_field(half=True)[0]
    with torch.no_grad():
        half.load_state_dict(field.state_dict())
    rough = half(x, common.spherical_harmonics(d))
    assert rough[0].dtype == rough[1].dtype == torch.float32 and (rough[1] - rgbs).abs().mean() < 0.02


def test_render_of_nothing_is_the_background():
    field, grid, scene = small_field()
    o, d = common.view_rays(scene.train, 0, False)
    for rays_o, rays_d in ((o[:0], d[:0]), (o, -d)):                                               # no rays; rays that look away
        out = sm.render(field, grid, rays_o, rays_d, scene, scene.bg, 0.1)
        assert out["samples"] == 0 and torch.equal(out["rgb"], scene.bg.expand(len(rays_o), 3)) and out["acc"].shape == out["depth"].shape == (len(rays_o),)
        (out["rgb"].sum() + out["acc"].sum()).backward() if out["rgb"].requires_grad else None
    grid.occupied.zero_()
    picture = sm.render_view(field, grid, scene.train, 1, scene, 0.1)
    assert torch.equal(picture["rgb"], scene.bg.expand(12, 16, 3)) and torch.equal(picture["depth"], torch.zeros(12, 16))


def test_render_by_hand():
    """A field of one colour and density s: acc = 1 - exp(-s L), rgb = c acc + (1 - acc) bg, one sample every step of L."""
    field, grid, scene = small_field()

    def uniform(x, sh):
        return torch.full((len(x),), 0.7), torch.tensor([0.2, 0.4, 0.6]).expand(len(x), 3)
    rays_o, rays_d = torch.tensor([[-4.0, 0.1, 0.2]]), torch.tensor([[1.0, 0.0, 0.0]])             # the box lies from 2.5 to 5.5
    out = sm.render(uniform, grid, rays_o, rays_d, scene, scene.bg, 0.01)
    acc = 1 - math.exp(-0.7 * 3)
    assert abs(out["samples"] - 300) <= 1 and float(out["acc"]) == pytest.approx(acc, abs=2e-3)
    assert_close(out["rgb"][0], acc * torch.tensor([0.2, 0.4, 0.6]) + (1 - acc) * scene.bg, atol=2e-3, rtol=0)
    depth = 2.5 * acc + 1 / 0.7 - (3 + 1 / 0.7) * math.exp(-0.7 * 3)                               # integral of t s exp(-s (t - 2.5))
    assert float(out["depth"]) == pytest.approx(depth, abs=1e-2)


def test_render_view_is_render_in_chunks():
    field, grid, scene = small_field()
    whole, parts = (sm.render_view(field, grid, scene.train, 1, scene, 0.1, chunk) for chunk in (10_000, 50))
    assert close(whole["rgb"], parts["rgb"]) and close(whole["depth"], parts["depth"])
    xy = torch.tensor([[3.5, 7.5]])                                                                # the same ray as in training
    one = sm.render(field, grid, *sm.camera_rays(scene.train, torch.tensor([1]), xy, False), scene, scene.bg, 0.1)
    assert_close(one["rgb"][0].detach(), whole["rgb"][7, 3])


def test_evaluate_is_the_mean_over_views(monkeypatch):
    _, grid, scene = small_field()
    monkeypatch.setattr(sm, "render_view", lambda f, g, views, v, *_: {"rgb": views.images[v] + (0.1, 0.01)[v], "depth": None})
    scores = sm.evaluate(None, grid, scene, 0.1, [0, 1])
    assert scores["psnr"] == pytest.approx(30, abs=1e-3) and 0 < scores["ssim"] < 1                # of 20 and 40 dB


# -------------------------------------------------------------------------------------------------------------- training

def quick(tiny, out, **more):
    return replace(Args(), **{**TINY, "scene": str(tiny), "steps": 4, "eval_every": 2, "out": str(out), **more})


def weights(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)["field"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without_seconds(path):
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines(path)]


@pytest.fixture(scope="module")
def bricks_run(tmp_path_factory):
    """One short run on the built-in scene, by its command line."""
    folder = tmp_path_factory.mktemp("runs") / "bricks"
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "scene": "bricks", "steps": 60, "eval_every": 20, "out": folder}.items()]
    done = subprocess.run([sys.executable, str(ROOT / "soft_mining.py"), *words, "--video"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done


def test_a_run_learns(bricks_run):
    curve = lines(bricks_run[0] / "metrics.jsonl")
    psnr = [line["psnr"] for line in curve]
    assert psnr[-1] > 15 and psnr[-1] > psnr[0] + 2, psnr                                          # 60 steps at 24 px; white alone has 9


def test_a_run_s_folder(bricks_run):
    folder, done = bricks_run
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"args.json", "env.json", "metrics.jsonl", "summary.json", "ckpt.pt", "walkers.gif", "render.mp4",
                     *(f"test_{v:03d}.png" for v in range(25)), *(f"walkers/{step:06d}.png" for step in (20, 40, 60))}
    summary = json.loads((folder / "summary.json").read_text())
    assert {"method", "scene", "data", "size", "seed", "steps", "train_seconds", "peak_memory_mb", "psnr", "ssim", "sampling"} <= summary.keys()
    assert (summary["method"], summary["scene"], summary["data"], summary["size"], summary["steps"]) == ("soft_mining", "bricks", "builtin", 24, 60)
    assert 0 < summary["train_seconds"] < 120 and 50 < summary["peak_memory_mb"] < 4000 and 0 < summary["ssim"] < 1
    curve = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in curve] == [20, 40, 60] and all({"rays", "samples", "train_seconds", "psnr"} <= line.keys() for line in curve)
    assert [line["rays"] for line in curve] == [20 * 256, 40 * 256, 60 * 256]
    for key in ("samples", "train_seconds"):
        assert 0 < curve[0][key] < curve[1][key] < curve[2][key]
    assert curve[-1]["psnr"] == summary["psnr"] and curve[-1]["views"] == 25 and curve[0]["views"] == 1
    recorded = json.loads((folder / "args.json").read_text())
    assert recorded == {**asdict(replace(Args(), **TINY, scene="bricks", steps=60, eval_every=20, out=str(folder), video=True)), "device": recorded["device"]}
    strip = iio.imread(folder / "test_003.png") / 255
    assert strip.shape == (24, 4 * 24, 3)
    assert len(iio.imread(folder / "walkers.gif", index=None)) == 3
    assert f"{summary['psnr']:.2f} dB" in done.stdout


def test_the_picture_s_first_strip_is_scored_right(bricks_run):
    folder, _ = bricks_run
    strips = [iio.imread(folder / f"test_{v:03d}.png") / 255 for v in range(25)]
    psnr = [-10 * math.log10(((s[:, :24] - s[:, 24:48]) ** 2).mean()) for s in strips]
    assert np.mean(psnr) == pytest.approx(json.loads((folder / "summary.json").read_text())["psnr"], abs=0.05)   # pixels were rounded to 1/255


def test_a_good_run_says_nothing_on_stderr(bricks_run):
    assert bricks_run[1].stderr == ""


def test_eval_only_gives_the_same_score(bricks_run, capsys):
    folder, _ = bricks_run
    before = (folder / "ckpt.pt").read_bytes(), (folder / "metrics.jsonl").read_text(), json.loads((folder / "summary.json").read_text())
    (folder / "test_000.png").unlink()
    again = sm.train(replace(Args(), **TINY, scene="bricks", steps=60, eval_every=20, out=str(folder), eval_only=True))
    summary = json.loads((folder / "summary.json").read_text())
    assert again["psnr"] == summary["psnr"] == pytest.approx(before[2]["psnr"], abs=1e-5) and summary["steps"] == 60
    assert summary["train_seconds"] == pytest.approx(before[2]["train_seconds"], abs=0.01)
    assert (folder / "ckpt.pt").read_bytes() == before[0] and (folder / "metrics.jsonl").read_text() == before[1] and (folder / "test_000.png").is_file()


FLAGS = {
    "uniform": dict(sampling="uniform"), "uniform weighted": dict(sampling="uniform", weighting="on"), "edge": dict(sampling="edge"),
    "multinomial": dict(sampling="multinomial", refresh=2, steps=6, eval_every=3),                 # resumed between two tables
    "multinomial global": dict(sampling="multinomial", refresh=2, walkers="global"),
    "lmc": {}, "no pixel gradient": dict(pixel_gradient=False), "truth gradient": dict(truth_gradient=True), "no weights": dict(weighting="off"),
    "no clamp": dict(clamp=False), "alpha 0": dict(alpha=0.0), "alpha 1": dict(alpha=1.0), "reinit none": dict(reinit="none"),
    "reinit uniform": dict(reinit="uniform"), "global": dict(walkers="global"), "samples": dict(batch="samples", samples=2000, pool=400),
    "samples uniform": dict(batch="samples", sampling="uniform", samples=2000), "as released": dict(as_released=True),
    "as released, no gradient": dict(as_released=True, pixel_gradient=False), "no shares": dict(uniform_share=0.0, reborn_share=0.0),
    "all shares": dict(uniform_share=1.0, reborn_share=1.0), "still": dict(drift=0.0, noise=0.0), "bfloat16": dict(half=True),
    "black": dict(background="black"), "trainval": dict(train_split="trainval"), "two rays": dict(rays=2), "one ray": dict(rays=1),
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_combination_runs_and_resumes(tiny, tmp_path, monkeypatch, name):
    """A few steps; the same again, broken off just after the first checkpoint and resumed from it: all numbers are the same bits."""
    undisturbed = sm.train(quick(tiny, tmp_path / "a", **FLAGS[name]))
    assert math.isfinite(undisturbed["psnr"]) and undisturbed["psnr"] > 3 and undisturbed["samples"] > 0

    def power_cut(loss, step):
        if step == FLAGS[name].get("eval_every", 2):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sm, "check_finite", power_cut)
        sm.train(quick(tiny, tmp_path / "b", **FLAGS[name]))
    torch.manual_seed(99)
    resumed = sm.train(quick(tiny, tmp_path / "b", resume=True, **FLAGS[name]))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert {**resumed, "train_seconds": 0, "peak_memory_mb": 0} == {**undisturbed, "train_seconds": 0, "peak_memory_mb": 0}
    assert without_seconds(tmp_path / "a/metrics.jsonl") == without_seconds(tmp_path / "b/metrics.jsonl")


def test_same_seed_same_weights(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        sm.train(quick(tiny, tmp_path / name, seed=seed))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b")) and not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def spy(monkeypatch, tiny, out, **more):
    """What each step gave its sampler, its exponent, its render, and how many rays it had."""
    seen = {"update": [], "exponent": [], "rgb": [], "pixels": []}
    real_weight, real_render, real_make = sm.soft_weight, sm.render, sm.make_sampler

    def make(scene, arguments):
        sampler = real_make(scene, arguments)
        draw, update = sampler.draw, sampler.update

        def drawing(n):
            seen["pixels"].append(draw(n))
            return seen["pixels"][-1][0], seen["pixels"][-1][1].clone()
        sampler.draw, sampler.update = drawing, lambda *words: (seen["update"].append(words), update(*words))[1]
        return sampler

    def rendering(*words, jitter=None):
        out = real_render(*words, jitter=jitter)
        if jitter is not None:
            seen["rgb"].append(out["rgb"].detach())
        return out
    with monkeypatch.context() as patch:
        patch.setattr(sm, "make_sampler", make)
        patch.setattr(sm, "render", rendering)
        patch.setattr(sm, "soft_weight", lambda q, exponent, clamp=True: (seen["exponent"].append((exponent, clamp)), real_weight(q, exponent, clamp))[1])
        sm.train(quick(tiny, out, **more))
    return seen


def test_what_the_loop_tells_the_sampler(tiny, tmp_path, monkeypatch):
    scene = common.load_scene(str(tiny), tiny, 24, "white")
    seen = spy(monkeypatch, tiny, tmp_path / "a", warmup=2)
    for (e, q, w, d_xy), rgb, (view, xy), exponent in zip(seen["update"], seen["rgb"], seen["pixels"], (0.0, 0.3, 0.6, 0.6)):
        x, y = xy.long().unbind(-1)
        difference = rgb - scene.train.images[view, y, x]
        assert close(e, (difference ** 2).mean(-1)) and close(q, difference.abs().mean(-1))
        assert_close(w, soft_weight(q, exponent))
        assert d_xy.shape == (256, 2) and d_xy.isfinite().all() and not e.requires_grad
    assert [round(exponent, 9) for exponent, _ in seen["exponent"]] == [0.0, 0.3, 0.6, 0.6]        # alpha t / warmup
    plain = seen["update"][0][3], seen["rgb"][0], seen["pixels"][0]
    assert plain[0].abs().max() > 0
    assert all(update[3] is None for update in spy(monkeypatch, tiny, tmp_path / "b", pixel_gradient=False)["update"])
    assert all(update[3] is None for update in spy(monkeypatch, tiny, tmp_path / "c", sampling="multinomial")["update"])
    truth = spy(monkeypatch, tiny, tmp_path / "d", warmup=2, truth_gradient=True)
    assert torch.equal(truth["rgb"][0], plain[1])                                                  # the first step is the same up to here
    view, xy = plain[2]
    x, y = xy.long().unbind(-1)
    difference = plain[1] - scene.train.images[view, y, x]
    slope = sm.truth_gradient(scene.train.images, view, xy)
    expected = plain[0] - torch.einsum("nc,ncd->nd", 2 / 3 * difference / 256, slope)              # d/dxy of (1/N) sum_n mean_c (rgb - truth)^2
    assert_close(truth["update"][0][3], expected, rtol=1e-4, atol=1e-9)


def test_weights_are_used_where_they_should_be(tiny, tmp_path, monkeypatch):
    for i, (flags, used) in enumerate(((dict(sampling="uniform"), False), (dict(sampling="edge"), True), (dict(weighting="off"), False), (dict(clamp=False), True))):
        seen = spy(monkeypatch, tiny, tmp_path / str(i), steps=2, warmup=1, **flags)
        assert len(seen["exponent"]) == 2 * used and all(clamp == flags.get("clamp", True) for _, clamp in seen["exponent"])
        assert used or all((update[2] == 1).all() for update in seen["update"])


@pytest.mark.parametrize("sampling", ["uniform", "lmc"])
def test_batches_of_equal_ray_count(tiny, tmp_path, monkeypatch, sampling):
    """--batch rays: every step has --rays of them, however many samples they cost; --samples is for --batch samples."""
    seen = spy(monkeypatch, tiny, tmp_path / "a", sampling=sampling, samples=500)
    assert [len(view) for view, _ in seen["pixels"]] == [256] * 4


def test_learning_rate_falls_by_a_cosine_to_a_tenth(tiny, tmp_path, monkeypatch):
    rates, made = [], []

    class Adam(torch.optim.Adam):
        def __init__(self, *words, **more):
            super().__init__(*words, **more)
            made.append(self.defaults)

        def step(self, *words):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*words)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    sm.train(quick(tiny, tmp_path / "a", steps=8, eval_every=8, lr=0.02, lr_warmup=4, weight_decay=1e-5))
    rise = [0.25, 0.5, 0.75] + 5 * [1]
    assert rates == pytest.approx([rise[t] * (0.002 + 0.018 * (1 + math.cos(math.pi * t / 8)) / 2) for t in range(8)])
    assert (made[0]["eps"], made[0]["weight_decay"], made[0]["betas"]) == (1e-15, 1e-5, (0.9, 0.999))


def test_random_backgrounds_leave_a_perfect_field_no_error(tiny, tmp_path, monkeypatch):
    """A renderer that knows colour and opacity of every training pixel: no loss, though each ray has its own background."""
    scene, pixels, colours, seen = common.load_scene(str(tiny), ".", 24), [], [], []
    real_rays, real_weight = sm.camera_rays, sm.soft_weight

    def rays(views, view, xy, ndc):
        pixels.append((view, *xy.detach().long().unbind(-1)))
        return real_rays(views, view, xy, ndc)

    def perfect(field, grid, rays_o, rays_d, scene_, bg, step, jitter=None):
        view, x, y = pixels[-1]
        colours.append(bg)
        alpha = scene.train.alpha[view, y, x, None]
        rgb = scene.train.images[view, y, x] - (1 - alpha) * scene.bg + (1 - alpha) * bg
        return {"rgb": rgb + 0 * (field.table.sum() + rays_d), "acc": alpha[:, 0], "depth": alpha[:, 0], "samples": 1000}
    monkeypatch.setattr(sm, "camera_rays", rays)
    monkeypatch.setattr(sm, "render", perfect)
    monkeypatch.setattr(sm, "render_view", lambda f, g, views, v, *_: {"rgb": views.images[v], "depth": views.images[v, ..., 0]})
    monkeypatch.setattr(sm, "soft_weight", lambda q, *rest: (seen.append(q), real_weight(q, *rest))[1])
    sm.train(quick(tiny, tmp_path / "a", train_background="random"))
    assert len(seen) == 4 and max(q.max() for q in seen) < 1e-6
    assert all(bg.shape == (len(p[0]), 3) and bg.std() > 0.2 for bg, p in zip(colours, pixels))


def test_an_empty_field_is_named_and_the_checkpoint_kept(tiny, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(sm, "check_not_empty", lambda acc, step: (calls.append(step), common.check_not_empty(acc * (step < 4), step)))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "scene": tiny, "steps": 8, "eval_every": 2, "out": tmp_path / "a"}.items()]
    assert_refused(command(monkeypatch, capsys, *words), "empty", "step 4", "--lr")
    assert calls == [2, 4] and torch.load(tmp_path / "a/ckpt.pt", weights_only=True)["count"]["step"] == 2


def test_batches_of_equal_sample_count(tiny, tmp_path, monkeypatch):
    want = 3000
    seen = spy(monkeypatch, tiny, tmp_path / "a", batch="samples", samples=want, pool=500, rays=256, steps=30, eval_every=30)
    rays = [len(view) for view, _ in seen["pixels"]]
    assert rays[0] == 256 and max(rays) <= 500 and min(rays) >= 64 and len(set(rays)) > 3
    last = lines(tmp_path / "a/metrics.jsonl")[-1]
    assert last["rays"] == sum(rays) and 0.5 * want < last["samples"] / 30 < 3 * want


def as_released_exponents(monkeypatch, scene, out, **more):
    """Of steps 0, 1, 2 and, by a checkpoint that is moved on, of 599, 600, 601 and of 799, 800, 801."""
    values, real_weight = [], sm.soft_weight

    def stop(loss, step):
        if step in (2, 601, 801):
            raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(sm, "soft_weight", lambda q, exponent, clamp: (values.append((exponent, clamp)), real_weight(q, exponent, clamp))[1])
        patch.setattr(sm, "check_finite", stop)
        for first in (0, 599, 799):
            if first:
                state = torch.load(out / "ckpt.pt", weights_only=True)
                state["count"]["step"] = first
                torch.save(state, out / "ckpt.pt")
            with pytest.raises(KeyboardInterrupt):
                sm.train(quick(scene, out, steps=900, eval_every=1, as_released=True, resume=first > 0, **more))
    assert all(clamp for _, clamp in values)
    return [exponent for exponent, _ in values]


def test_as_released_exponent(tiny, tmp_path, monkeypatch):
    """min(t / 1000, alpha), alpha 0.6 (0.8 for forward-facing scenes), whatever --alpha, --warmup and --no-clamp say."""
    found = as_released_exponents(monkeypatch, tiny, tmp_path / "a", alpha=0.1, warmup=7, clamp=False, weighting="off")
    assert found == pytest.approx([0, 0.001, 0.002, 0.599, 0.6, 0.6, 0.6, 0.6, 0.6])
    write_llff(tmp_path / "line")
    found = as_released_exponents(monkeypatch, tmp_path / "line", tmp_path / "b", size=16)
    assert found == pytest.approx([0, 0.001, 0.002, 0.599, 0.6, 0.601, 0.799, 0.8, 0.8])


@pytest.mark.parametrize("flags", [{}, dict(as_released=True), dict(background="grey", truth_gradient=True), dict(video=True)])
def test_forward_facing_scene_runs(tmp_path, flags):
    write_llff(tmp_path / "line")
    result = sm.train(quick(tmp_path / "line", tmp_path / "run", size=16, **flags))
    assert result["data"] == "llff" and math.isfinite(result["psnr"]) and result["samples"] > 0


# ------------------------------------------------------------------------------------------ killed, resumed, and not harmed

def test_killed_three_times_and_resumed_ends_bit_equal(tiny, tmp_path):
    more = dict(steps=48, eval_every=8)
    sm.train(quick(tiny, tmp_path / "a", **more))
    words = [f"--{name.replace('_', '-')}={value}" for name, value in {**TINY, "scene": tiny, "out": tmp_path / "b", **more}.items()]
    moments = random.Random()
    seed = moments.randrange(10 ** 6)
    moments.seed(seed)
    for kill, after in enumerate((1, 2, 4)):                                                       # evaluations to wait for
        process = subprocess.Popen([sys.executable, str(ROOT / "soft_mining.py"), *words, *(["--resume"] if kill else [])],
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        metrics, ckpt, began = tmp_path / "b/metrics.jsonl", tmp_path / "b/ckpt.pt", time.monotonic()
        while process.poll() is None and time.monotonic() - began < 120:
            if metrics.is_file() and ckpt.is_file() and len(metrics.read_text().splitlines()) >= after:
                break
            time.sleep(0.005)
        time.sleep(moments.random() * 0.15)                                                        # about the time between two evaluations
        process.kill()
        _, complaint = process.communicate()
        assert process.returncode == -signal.SIGKILL, (seed, kill, process.returncode, complaint.decode())
    sm.train(quick(tiny, tmp_path / "b", resume=True, **more))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b")), f"moments of seed {seed}"
    assert without_seconds(tmp_path / "a/metrics.jsonl") == without_seconds(tmp_path / "b/metrics.jsonl")
    seconds = [line["train_seconds"] for line in lines(tmp_path / "b/metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert [p.name for p in sorted((tmp_path / "a/walkers").iterdir())] == [p.name for p in sorted((tmp_path / "b/walkers").iterdir())]
    a, b = (iio.imread(tmp_path / run / "walkers/000048.png") for run in "ab")
    assert np.array_equal(a, b)


def test_killed_before_the_first_checkpoint_there_is_a_way_on(tiny, tmp_path, monkeypatch):
    """The advice of an error message must not lead to the next error message: one of the two commands works."""
    def power_cut(loss, step):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sm, "check_finite", power_cut)
        sm.train(quick(tiny, tmp_path / "a"))
    failed = []
    for resume in (True, False):
        try:
            sm.train(quick(tiny, tmp_path / "a", resume=resume))
            break
        except common.UserError as error:
            failed.append(str(error))
    assert len(failed) < 2, failed


command = partial(conftest.command, sm)


def broken(tiny, folder, content):
    folder.mkdir()
    (folder / "transforms_train.json").write_text(content)
    return folder


WRONG = {
    "--steps 0": "--steps", "--steps -3": "--steps", "--steps many": "many", "--size -5": "--size", "--size 0": "--size", "--size 5000": "--size",
    "--rays 0": "--rays", "--rays -1": "--rays", "--alpha -1": "--alpha", "--alpha nan": "--alpha", "--noise -0.1": "--noise", "--drift inf": "--drift",
    "--uniform-share 2": "--uniform-share", "--reborn-share -0.5": "--reborn-share", "--uniform-share nan": "--uniform-share", "--lr 0": "--lr",
    "--lr nan": "--lr", "--lr-warmup 0": "--lr-warmup", "--warmup 0": "--warmup", "--refresh 0": "--refresh", "--levels 0": "--levels", "--features -2": "--features",
    "--log2-table 40": "--log2-table", "--base 300 --finest 200": "--finest", "--grid -4": "--grid",
    "--march-steps 0": "--march-steps", "--eval-every 0": "--eval-every", "--eval-views 0": "--eval-views", "--weight-decay -1": "--weight-decay",
    "--grid-decay 1.5": "--grid-decay", "--seed 99999999999999999999999": "--seed",
    "--sampling langevin": "langevin", "--reinit maybe": "maybe", "--walkers some": "some", "--background pink": "pink", "--bogus 3": "--bogus",
    "--as-released --sampling uniform": "--as-released", "--eval-only": "--out",
    "--resume": "--out", "--device nonsense": "--device", "--preset huge": "--preset",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_one_line(tiny, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    base = ["--scene", tiny, "--steps", 4, "--size", 24]
    given = words.split()
    if "--steps" in given or "--size" in given:
        base = base[:2]
    assert_refused(command(monkeypatch, capsys, *base, *given), WRONG[words])
    assert not list(tmp_path.rglob("ckpt.pt")) and not list(tmp_path.rglob("metrics.jsonl"))


def test_a_picture_too_small_to_score_is_refused_before_training(tiny, tmp_path, monkeypatch, capsys):
    assert_refused(command(monkeypatch, capsys, "--scene", tiny, "--size", 8, "--steps", 1, "--rays", 16, "--out", tmp_path / "a"), "--size")
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(tiny, tmp_path, monkeypatch, capsys):
    for device in ("cuda", "cuda:3"):
        assert_refused(command(monkeypatch, capsys, "--scene", tiny, "--size", 24, "--device", device, "--out", tmp_path / "a"), "--device", device)
    assert not (tmp_path / "a").exists()


def test_wrong_scenes_are_one_line(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(command(monkeypatch, capsys, "--scene", "nosuchscene", "--data", tmp_path), "nosuchscene", "bricks")
    assert_refused(command(monkeypatch, capsys, "--scene", broken(tiny, tmp_path / "cut", '{"frames": [')), "cut", "transforms_train.json")
    assert_refused(command(monkeypatch, capsys, "--scene", broken(tiny, tmp_path / "none", '{"camera_angle_x": 1, "frames": []}')), "frames")
    assert_refused(command(monkeypatch, capsys, "--scene", broken(tiny, tmp_path / "list", "[]")), "transforms_train.json")
    assert not (tmp_path / "runs").exists()


def test_wrong_out_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    base = ["--scene", tiny, "--size", 24, "--steps", 4, "--out"]
    for out in ("file", "file/below"):
        assert_refused(command(monkeypatch, capsys, *base, tmp_path / out), "--out", out)
    assert (tmp_path / "file").read_text() == "mine"
    assert_refused(command(monkeypatch, capsys, *base, tmp_path / "new", "--resume"), "ckpt.pt")
    assert_refused(command(monkeypatch, capsys, *base, tmp_path / "new", "--eval-only"), "ckpt.pt")


def test_a_run_is_not_harmed_by_another(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a"
    sm.train(quick(tiny, out))
    base = ["--scene", tiny, "--out", out, "--steps", 4, "--eval-every", 2, *(f"--{name.replace('_', '-')}={value}" for name, value in TINY.items())]
    before = content(out)
    assert_refused(command(monkeypatch, capsys, *base), "holds a run")
    for name, value in (("seed", 5), ("levels", 3), ("sampling", "uniform"), ("alpha", 0.3), ("size", 12), ("rays", 64), ("steps", 8)):
        for how in ("--resume", "--eval-only"):
            assert_refused(command(monkeypatch, capsys, *base, how, f"--{name}", value), f"{name} was")
    assert_refused(command(monkeypatch, capsys, *base, "--resume", "--scene", "bricks"), "bricks")
    assert content(out) == before
    (tmp_path / "b").mkdir()
    common.Run("other_method", "tiny", tmp_path / "b", {}).save({"step": 1})
    copied = content(tmp_path / "b")
    words = [str(tmp_path / "b") if word == out else word for word in base]
    assert_refused(command(monkeypatch, capsys, *words, "--resume"), "other_method")
    assert content(tmp_path / "b") == copied
    whole = (out / "ckpt.pt").read_bytes()
    for length in (len(whole) // 2, 100, 0):
        (out / "ckpt.pt").write_bytes(whole[:length])
        before = content(out)
        for how in ("--resume", "--eval-only"):
            assert_refused(command(monkeypatch, capsys, *base, how), "ckpt.pt", "not a usable checkpoint")
        assert content(out) == before
    (out / "ckpt.pt").write_bytes(whole)
    assert command(monkeypatch, capsys, *base, "--resume")[0] == 0                                 # finished: evaluated once more


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    real_render, out = sm.render, tmp_path / "a"
    calls = []

    def spoil(*words, jitter=None):
        picture = real_render(*words, jitter=jitter)
        if jitter is not None:
            calls.append(1)
            if len(calls) == 4:
                picture["rgb"] = picture["rgb"] * math.nan
        return picture
    monkeypatch.setattr(sm, "render", spoil)
    with pytest.raises(common.UserError, match="step 3"):
        sm.train(quick(tiny, out))
    state = torch.load(out / "ckpt.pt", weights_only=True)
    assert state["count"]["step"] == 2 and all(value.isfinite().all() for value in state["field"].values())
    assert math.isfinite(sm.train(quick(tiny, out, resume=True, lr=1e-3))["psnr"])                 # as the message says: a lower rate, then --resume


def test_help_names_every_flag():
    done = subprocess.run([sys.executable, str(ROOT / "soft_mining.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name in asdict(Args()):
        assert name == "preset" or f"--{name.replace('_', '-')}" in done.stdout, name


# ------------------------------------------------------------------------------------------------------------- real data

def test_real_lego_learns_in_a_hundred_steps(tmp_path):
    data = real("nerf_synthetic/lego")
    result = sm.train(replace(Args(), scene="lego", data=data, size=50, steps=100, rays=512, levels=6, log2_table=14, finest=128, march_steps=128, grid=32,
                              eval_every=50, eval_views=3, lr_warmup=10, out=str(tmp_path / "run")))
    assert result["data"] == "blender" and result["psnr"] > 19.5, result["psnr"]


def test_real_fern_trains_and_renders(tmp_path):
    data = real("nerf_llff_data/fern")
    result = sm.train(replace(Args(), scene="fern", data=data, size=63, steps=20, rays=256, levels=4, log2_table=12, finest=64, march_steps=96, grid=32,
                              eval_every=10, eval_views=1, lr_warmup=1, out=str(tmp_path / "run")))
    assert result["data"] == "llff" and result["psnr"] > 10, result["psnr"]
    strip = iio.imread(tmp_path / "run/test_000.png") / 255
    assert strip.shape == (47, 4 * 63, 3) and strip[:, 63:126].std() > 0.02
