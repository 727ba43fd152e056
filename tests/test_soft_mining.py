"""soft_mining.py against known answers: weight, samplers, pixel gradient, rendering, training.

What every script promises is in test_contract.py. Random draws, from fixed seeds, are compared with
what they should follow at a stated tolerance. Real data: NERF_DATA=DIR.
"""
import json
import math
from collections import defaultdict
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

import common
import soft_mining as sm
from common import OccupancySampler, ProposalSampler
from conftest import lines, real, write_llff
from soft_mining import (Args, BaselineSampler, ReleasedWalkers, Walkers, cumulative, draw_pixels,
                         edge_maps, grad_log_q, soft_weight)
from test_contract import assert_same_run, break_off_and_resume

F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def args(**more):
    """Args for a sampler alone: every share that moves walkers about is 0 unless asked for."""
    return replace(Args(uniform_share=0.0, reinit_share=0.0, reinit="none"), **more)


def histogram(view, xy, V, H, W):
    """Counts (V, H, W) of what was drawn, which must be pixel centres inside the images."""
    x, y = (xy - 0.5).unbind(-1)
    assert (x == x.round()).all() and (y == y.round()).all()
    assert x.min() >= 0 and x.max() < W and y.min() >= 0 and y.max() < H
    pixel = (view * H + y.long()) * W + x.long()
    return torch.bincount(pixel, minlength=V * H * W).view(V, H, W).double()


def assert_drawn_from(counts, density):
    """Pearson's chi-square within five of its standard deviations; no draw of density zero."""
    expected = density.double() / density.double().sum() * counts.sum()
    assert (counts[expected == 0] == 0).all()
    counts, expected = counts[expected > 0], expected[expected > 0]
    assert expected.min() > 5, "too few draws for this test"
    chi2, freedom = float(((counts - expected) ** 2 / expected).sum()), max(len(counts) - 1, 1)
    assert abs(chi2 - freedom) < 5 * math.sqrt(2 * freedom), (chi2, freedom)


def test_soft_weight_by_hand():
    q = torch.tensor([0.25, 1.0, 0.0625], requires_grad=True)
    assert_close(soft_weight(q, 0.5, clamp=False), torch.tensor([2.0, 1.0, 4.0]))
    assert torch.equal(soft_weight(q, 0.0), torch.ones(3))               # hard mining
    low = torch.tensor([0.0, 2 ** -11, 2 ** -10])
    assert_close(soft_weight(low, 1.0, clamp=False), torch.full((3,), 1024.0))
    assert not soft_weight(q, 0.5).requires_grad
    w = soft_weight(1 / torch.tensor([1.0, 2.0, 3.0, 10.0]), 1.0)        # mean 4, n - 1 = 3
    assert_close(w, torch.tensor([1.0, 2.0, 3.0, 4 + math.sqrt((9 + 4 + 1 + 36) / 3)]))
    assert_close(soft_weight(torch.tensor([10.0, 1, 1, 1]), 1.0), torch.tensor([0.2, 1, 1, 1]))
    assert_close(soft_weight(torch.tensor([0.25]), 0.5), torch.tensor([2.0]))    # one pixel
    example = soft_weight(torch.tensor([0.25, 0.25, 0.25, 2 ** -10]), 0.5)
    assert_close(example, torch.tensor([2.0, 2.0, 2.0, 24.5]))


def test_pixels_follow_the_map_of_every_image():
    V, H, W = 3, 5, 7
    pdf = torch.rand(V, H, W) + 0.05
    pdf[0, 0, :3], pdf[1, 2], pdf[2, -1, -2:] = 0, 0, 0                  # at both ends, a row
    pdf *= torch.tensor([1e-20, 1, 1e20])[:, None, None]                 # any scale
    view = torch.multinomial(torch.tensor([0.2, 0.5, 0.3]), 200_000, replacement=True)
    counts = histogram(view, draw_pixels(cumulative(pdf), view, H, W), V, H, W)
    for v in range(V):
        assert counts[v].sum() == (view == v).sum()
        assert_drawn_from(counts[v], pdf[v])


@pytest.mark.parametrize("u, pixel", [(0.0, [1.5, 0.5]), (1 - 2 ** -53, [3.5, 2.5])])
def test_pixels_at_the_ends_of_the_random_number(monkeypatch, u, pixel):
    """view + u rounds up to view + 1; and a pixel of density 0 is not even drawn at u = 0."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kind: torch.full(size, u, **kind))
    pdf = torch.ones(100, 3, 4)
    pdf[:, 0, 0] = 0
    found = draw_pixels(cumulative(pdf), torch.arange(100), 3, 4)
    assert (found == torch.tensor(pixel)).all()


@pytest.mark.parametrize("released", [False, True])
def test_edge_maps_are_their_formula(released):
    """Released code: a maximum for each column instead of each image, and a border of zeros."""
    picture = torch.rand(2, 6, 7, 3) * torch.tensor([1.0, 0.1])[:, None, None, None]
    grey = picture.double().numpy() @ np.array([0.2989, 0.5870, 0.1140])
    grey = np.pad(grey, ((0, 0), (1, 1), (1, 1)), "constant" if released else "edge")
    expected = np.zeros((2, 6, 7))
    for v, i, j in np.ndindex(2, 6, 7):
        p = grey[v, i:i + 3, j:j + 3]
        gx, gy = (p[:, 2] - p[:, 0]) @ [1, 2, 1], (p[2] - p[0]) @ [1, 2, 1]
        expected[v, i, j] = math.hypot(gx, gy)
    largest = expected.max(1 if released else (1, 2), keepdims=True)
    expected = np.clip(expected / (largest + 1e-7), 1e-5, 1)
    found = edge_maps(picture, released)
    assert_close(found, torch.tensor(expected).float(), rtol=1e-4, atol=1e-5)
    assert (edge_maps(torch.ones(1, 4, 5, 3)) == 1e-5).all()             # no edge, no zero


@pytest.mark.parametrize("sampling, share", [("uniform", 0.0), ("edge", 0.0), ("edge", 0.25),
                                             ("edge", 1.0)])
def test_uniform_and_edge_sampling(sampling, share):
    pictures = torch.zeros(3, 6, 8, 3)
    pictures[:, :, 4:] = 1.0
    edges, share_drawn = edge_maps(pictures), 1.0 if sampling == "uniform" else share
    pdf = share_drawn / edges.numel() + (1 - share_drawn) * edges / edges.sum()
    sampler = BaselineSampler(pictures, args(sampling=sampling, uniform_share=share))
    counts = histogram(*sampler.draw(200_000), 3, 6, 8) / 200_000
    assert_close(counts, pdf.double(), atol=0.002, rtol=0)


def test_multinomial_draws_from_what_it_saw(monkeypatch):
    monkeypatch.setattr(BaselineSampler, "REFRESH", 3)
    sampler = BaselineSampler(torch.zeros(2, 3, 4, 3), args(sampling="multinomial"))
    q, seen = torch.rand(2, 3, 4) + 0.1, torch.zeros(2, 3, 4, dtype=torch.bool)
    for step in range(3):
        view, xy = sampler.draw(5, step)
        assert_close(sampler.cdf[:12], torch.arange(1, 13) / 12, check_dtype=False)  # not rebuilt
        x, y = xy.long().unbind(-1)
        seen[view, y, x] = True
        sampler.update(None, q[view, y, x], None, None)
    assert 0 < seen.sum() < seen.numel() and torch.equal(sampler.error_map.isnan(), ~seen)
    q[view, y, x] *= 2
    sampler.update(None, q[view, y, x], None, None)                      # the last time counts
    counts = histogram(*sampler.draw(100_000, 3), 2, 3, 4)
    expected = torch.where(seen, q, q[seen].mean())
    for v in range(2):
        assert_drawn_from(counts[v], expected[v])


@pytest.mark.parametrize("N", [1, 200])
def test_grad_log_q_is_the_gradient_of_log_rms(N):
    xy = (torch.rand(N, 2, dtype=F64) * 5).requires_grad_()
    target, w = torch.rand(N, 3, dtype=F64), torch.rand(N, dtype=F64) * 30 + 0.2
    x, y = xy.unbind(-1)
    rgb = torch.stack([torch.sin(0.3 * x) * y, torch.cos(0.2 * x * y), (0.1 * x - y) ** 2], -1)
    err = ((rgb - target) ** 2).mean(-1)
    d_xy, = torch.autograd.grad((w * err).mean(), xy, retain_graph=True)
    expected, = torch.autograd.grad(err.sqrt().log().sum(), xy)
    assert_close(grad_log_q(err.detach(), w, d_xy), expected, rtol=1e-10, atol=1e-12)
    assert not grad_log_q(0 * err, w, 0 * d_xy).any()                    # where there is no error


def small_scene(ndc=False, dtype=torch.float32):
    """Two 16x12 views, of an object's surroundings or forward-facing."""
    c2w = torch.eye(4)[None, :3].repeat(2, 1, 1)
    c2w[1, 0, 3] = 0.2
    aabb, near, far = [[-1.5, -1.5, -1.0], [1.5, 1.5, 1.0]], 0.0, 4.0
    if not ndc:
        c2w = torch.tensor(np.stack([common.orbit_pose(a, 0.5, 4.0) for a in (0.3, 2.0)]))
        aabb, near, far = [[-1.5] * 3, [1.5] * 3], 2.0, 6.0
    K = torch.tensor([[18.0, 0, 8], [0, 18, 6], [0, 0, 1]], dtype=dtype)
    pictures = torch.rand(2, 12, 16, 3, dtype=dtype)
    views = common.Views(pictures, c2w.to(dtype), K, None, None, ["a", "b"])
    return common.Scene("s", "blender", views, views, torch.tensor(aabb, dtype=dtype), near, far,
                        torch.tensor([0.9, 0.5, 0.1], dtype=dtype), ndc)


def small_field(scene, **more):
    field = sm.HashField(Args(levels=2, features=2, log2_table=12, finest=17, **more), scene.aabb)
    with torch.no_grad():
        field.table.normal_()                                            # something in it
    return field


@pytest.mark.parametrize("ray_sampling", ["occupancy", "proposal"])
@pytest.mark.parametrize("ndc", [False, True])
def test_pixel_gradient_of_the_render_path(monkeypatch, ndc, ray_sampling):
    """d loss / d xy through camera, positions, directions, hash grid, MLPs and compositing, against
    central differences in float64. The distances t are constants."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)      # no rounding to float32
    scene, n = small_scene(ndc, F64), 40
    field = small_field(scene).double()
    sampler = OccupancySampler(scene, 40, 32.0).double()
    sampler.grid.occupied.copy_(torch.rand(10, 10, 10) < 0.6)
    if ray_sampling == "proposal":
        sampler = ProposalSampler(scene, (16, 12), 8, steps=10).double()
    view, size = torch.arange(n) % 2, torch.tensor([16.0, 12.0], dtype=F64)
    xy = (torch.rand(n, 2, dtype=F64) * size).requires_grad_()
    target, w, jitter = (torch.rand(n, k, dtype=F64) for k in (3, 1, 1))
    w, jitter = w[:, 0], jitter[:, 0]

    def loss(xy):
        rays = sm.camera_rays(scene.train, view, xy, ndc)
        out = sm.render(field, sampler, *rays, scene.bg, jitter)
        return w * ((out["rgb"] - target) ** 2).mean(-1)                 # (n,)
    found, = torch.autograd.grad(loss(xy).sum(), xy)
    packed = sampler.sample(*sm.camera_rays(scene.train, view, xy, ndc), jitter)
    assert len(packed[0]) > 5 * n
    monkeypatch.setattr(sampler, "sample", lambda *_: packed)
    h, difference = 1e-7, torch.zeros(n, 2, dtype=F64)
    with torch.no_grad():
        for axis in range(2):
            shift = h * torch.eye(2, dtype=F64)[axis]
            difference[:, axis] = (loss(xy + shift) - loss(xy - shift)) / (2 * h)
    assert (found.norm(dim=1) > 1e-6).sum() > n / 2
    assert (found - difference).norm() < 1e-5 * difference.norm()


@pytest.mark.parametrize("beta, size, count", [(1, 64, 10_000), (1, 128, 8000), (2, 64, 10_000)])
def test_the_pure_walk_has_the_stationary_density_q_to_the_beta(beta, size, count):
    """At any resolution and batch. One hill, level at the border: with x, y in image sides,
    log Q = -0.8 cos(2 pi x) - 0.5 cos(2 pi y). Each of 8 columns, 8 rows has its share to 6 %."""
    sampler = Walkers(torch.zeros(2, size, size, 3), args(beta=float(beta), noise=0.03), count)
    height, counts = torch.tensor([0.8, 0.5]), torch.zeros(2, 8)
    for t in range(300):
        u = 2 * math.pi * sampler.draw(count)[1] / size                  # Q is that of the pixel
        err = (-2 * height * u.cos()).sum(1).exp()                       # Q^2; the loss: its mean
        gradient = height * u.sin() * 2 * math.pi / size                 # of log Q, per pixel
        sampler.update(err, err.sqrt(), torch.ones(count), 2 * err[:, None] * gradient / count)
        if t >= 150:
            counts += torch.stack([x.histc(8, 0, size) for x in sampler.xy.T])
    fine = (torch.arange(800) + 0.5) / 800
    density = (-beta * height[:, None] * torch.cos(2 * math.pi * fine)).exp()
    expected = density.view(2, 8, 100).sum(2)
    expected /= expected.mean(1, keepdim=True)
    assert expected.amax(1).min() > 2 * expected.min()                   # something to find
    assert_close(counts / counts.mean(), expected, rtol=0.06, atol=0)


def one_move(size, N, beta=1.0, gradient=1.5):
    """How far walkers in the middle move, in longer image sides; `gradient` is the slope of log Q
    along x per image side."""
    sampler = Walkers(torch.zeros(2, size, size // 2, 3), args(beta=beta, noise=0.02), N)
    sampler.xy.copy_(torch.tensor([size / 4, size / 2]))
    sampler.draw(N)
    err, w = torch.rand(N) + 0.1, torch.rand(N) * 3 + 0.2
    slope = torch.tensor([gradient / size, 0.0]).expand(N, 2)
    sampler.update(err, err.sqrt(), w, w[:, None] * 2 * err[:, None] * slope / N)
    return sampler.xy / size - torch.tensor([0.25, 0.5])


def test_drift_and_noise_keep_their_meaning_at_other_resolutions_and_batches(monkeypatch):
    for size in (64, 200):                                               # b = 0.02 image sides
        moved = one_move(size, 20_000, beta=0.0)
        assert_close(moved.std(0), torch.full((2,), 0.02), rtol=0.03, atol=0)
        assert moved.mean(0).abs().max() < 0.001
    monkeypatch.setattr(torch, "randn", torch.zeros)                     # from here without noise
    expected = torch.tensor([0.02 ** 2 / 2 * 1.5, 0.0])                  # beta b^2 / 2 grad log Q
    for size, N, beta in ((64, 100, 1), (800, 100, 1), (64, 2, 1), (64, 5000, 1), (256, 10, 3)):
        found = one_move(size, N, float(beta))
        assert_close(found, beta * expected.expand(N, 2), rtol=2e-2, atol=1e-6)
    limit = torch.full((10,), 2 * 0.02)                                  # one drift is cut to 2 b
    assert_close(one_move(100, 10, gradient=1e4)[:, 0], limit, rtol=1e-3, atol=0)
    just = 0.99 * 0.04 / (0.02 ** 2 / 2)
    assert_close(one_move(100, 10, gradient=just)[:, 0], 0.99 * limit, rtol=1e-3, atol=0)


def standing(**more):
    """200 walkers on four 20x30 images, edges in columns 14 and 15, that do not move by themselves,
    none on a pixel's centre (where all that are born stand)."""
    pictures = torch.zeros(4, 20, 30, 3)
    pictures[:, :, 15:] = 1.0
    sampler = Walkers(pictures, args(noise=0.0, **more), 200)
    pixels = (torch.rand(200, 2) * torch.tensor([30, 20])).floor()
    sampler.xy.copy_(pixels + torch.rand(200, 2) * 0.4)
    sampler.draw(200)
    return sampler


def born(sampler, q):
    """Which walkers got another position, by their place in the batch."""
    before = sampler.xy[sampler.drawn].clone()
    sampler.update(q ** 2, q, torch.ones_like(q), None)
    return ((sampler.xy[sampler.drawn] - before).abs() > 1e-3).any(1)


@pytest.mark.parametrize("reinit", ["uniform", "edge"])
def test_reborn_are_the_k_of_least_error_and_those_that_left(reinit):
    sampler, q = standing(reinit=reinit, reinit_share=0.1), torch.rand(200) + 0.1
    expected = torch.zeros(200, dtype=torch.bool)
    for i, place in ((3, [-0.1, 3.0]), (50, [30.0, 3.0]), (120, [7.0, 20.5])):
        q[i], expected[i] = 2.0, True                                    # not for their error
        sampler.xy[sampler.drawn[i]] = torch.tensor(place)
    expected[q.argsort()[:20]] = True
    assert torch.equal(born(sampler, q), expected)
    xy = sampler.xy[sampler.drawn][expected]
    assert (xy % 1 == 0.5).all() and (xy > 0).all() and (xy < torch.tensor([30.0, 20.0])).all()
    on_edge = (xy[:, 0] == 14.5) | (xy[:, 0] == 15.5)
    assert on_edge.all() if reinit == "edge" else on_edge.sum() < 8


def test_uniform_share_and_reflection_at_the_border():
    sampler, times = standing(uniform_share=0.1), torch.zeros(200)
    for _ in range(300):
        sampler.xy.fill_(0.25)
        sampler.draw(200)
        times[sampler.drawn[born(sampler, torch.rand(200))]] += 1
    assert times.sum() == 300 * 20 and 8 < times.min() and times.max() < 60      # 30 each
    sampler = standing(reinit="none", reinit_share=0.1)
    assert not born(sampler, torch.rand(200)).any()
    sampler.xy[:2] = torch.tensor([[-5.0, 3.0], [31.0, 22.0]])
    sampler.draw(200)
    born(sampler, torch.ones(200))
    assert_close(sampler.xy[:2], torch.tensor([[5.0, 3.0], [29.0, 18.0]]))


@pytest.mark.parametrize("reinit", ["none", "uniform", "edge"])
def test_a_step_moves_those_it_drew_and_keeps_them_inside(reinit):
    sampler = Walkers(torch.rand(3, 12, 16, 3), Args(reinit=reinit, noise=0.7, beta=50.0), 60)
    sets = set()
    for _ in range(30):
        before, (view, xy) = sampler.xy.clone(), sampler.draw(40)
        drawn = torch.zeros(60, dtype=torch.bool)
        drawn[sampler.drawn] = True
        sets.add(tuple(drawn.tolist()))
        assert histogram(view, xy, 3, 12, 16).sum() == 40 == drawn.sum()
        assert torch.equal(view, sampler.drawn % 3)
        assert torch.equal(xy, before[sampler.drawn].floor() + 0.5)
        sampler.update(torch.rand(40), torch.rand(40), torch.ones(40), torch.randn(40, 2))
        assert torch.equal(sampler.xy[~drawn], before[~drawn])
        assert (sampler.xy != before)[drawn].any(1).float().mean() > 0.9
        assert (sampler.xy >= 0).all() and (sampler.xy < torch.tensor([16, 12])).all()
    assert len(sets) > 25


def test_visit_exponent():
    example = sm.visit_exponent(torch.tensor([1, 2, 4]), torch.tensor([1.0, 4.0, 16.0]))
    assert example == pytest.approx(0.5)
    q = torch.rand(50_000) + 0.05
    for k in (0.0, 1.0, 2.0):
        drawn = torch.multinomial(q ** k, 200_000, replacement=True)
        visits = torch.bincount(drawn, minlength=50_000)
        assert sm.visit_exponent(visits, q) == pytest.approx(k, abs=0.1)
    assert sm.visit_exponent(torch.zeros(100, dtype=torch.int32), q[:100]) == 0


def released(V=5, H=9, W=11, rays=100):
    sampler = ReleasedWalkers(torch.rand(V, H, W, 3), rays)
    sampler.s = torch.rand(len(sampler.view), 2) * 0.8 + 0.1
    return sampler


def test_released_walkers_and_their_positions():
    """As many on each image; positions are row and column over the last index."""
    for V, rays, per_image in ((17, 4096, 241), (4, 8, 2)):
        sampler = ReleasedWalkers(torch.zeros(V, 5, 7, 3), rays)
        view, xy = sampler.draw(3)                                       # all, whatever is asked
        assert torch.equal(view, torch.arange(V * per_image) // per_image)
    sampler = ReleasedWalkers(torch.zeros(1, 5, 7, 3), 4000)
    assert_drawn_from(histogram(*sampler.draw(0), 1, 5, 7), torch.ones(1, 5, 7))
    sampler = released(V=1, H=5, W=11, rays=4)
    sampler.s = torch.tensor([[0.0, 1.0], [0.14 / 4, 0.4 / 10], [0.6 / 4, 0.6 / 10], [0.6, 0.66]])
    expected = torch.tensor([[10.5, 0.5], [0.5, 0.5], [1.5, 1.5], [7.5, 2.5]])
    assert_close(sampler.draw(4)[1], expected)


def test_released_move_by_the_formula(monkeypatch):
    """s + 20 G + 0.02 eta, G = g / (1024 w err + eps), g = 1024 d mean(w err) / d pixel: that is
    (20 / N) grad log err per PIXEL, added to s."""
    sampler, N = released(), 100
    before, eta = sampler.s.clone(), torch.randn(N, 2)
    monkeypatch.setattr(torch, "randn_like", lambda x: eta)
    gradient = torch.randn(N, 2) * 0.3                                   # of log err, (x, y)
    err, w = torch.rand(N) * 0.1 + 1e-2, torch.rand(N) * 3 + 0.2
    err[:20], w[:20] = 2.0 ** -32, 1.0                                   # here 1024 err = 2 eps
    err[20:40] = 0.0                                                     # of least error
    sampler.update(err, err.sqrt(), w, w[:, None] * err[:, None] * gradient / N)
    share = torch.where(torch.arange(N) < 20, 2 / 3, 1.0)[:, None]
    expected = before + share * 20 * gradient.flip(-1) / N + 0.02 * eta
    stays = (err > 0) & (torch.arange(N) < 90) & ((expected >= 0) & (expected <= 1)).all(1)
    assert stays[:20].sum() > 10 and stays.sum() > 50
    assert_close(sampler.s[stays], expected[stays], rtol=1e-4, atol=1e-5)
    assert (sampler.s[~stays] != expected[~stays]).any(1).all()


def test_released_births_and_the_uniform_tenth(monkeypatch):
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    mark = torch.tensor([3.5, 2.5])                          # all that is drawn from edges
    monkeypatch.setattr(sm, "draw_pixels", lambda cdf, view, H, W: mark.expand(len(view), 2))

    def sent_to_edges(sampler, err, w):
        sampler.update(err, err.sqrt(), w, None)
        return (sampler.s == sampler.to_s(mark)).all(1)
    for N in (100, 105):                                     # a tenth and one by weighted error
        err, w = torch.rand(N) + 0.01, torch.rand(N) * 30 + 0.2
        expected = torch.zeros(N, dtype=torch.bool)
        expected[(w * err).argsort()[:N // 10 + 1]] = True
        assert torch.equal(sent_to_edges(released(rays=N), err, w), expected)
    sampler, err = released(), torch.rand(100) + 0.1
    err[40:65], err[95:] = 0.01, 0.01                        # 30 equal ones are born together
    outside = torch.tensor([[-0.01, 0.5], [0.5, -0.01], [1.01, 0.5], [0.5, 1.01]])
    sampler.s[[7, 20, 33, 80]] = outside
    before = sampler.s.clone()
    found = sent_to_edges(sampler, err, torch.ones(100))
    assert found.nonzero().flatten().tolist() == [7, 20, 33, *range(40, 65), 80, *range(95, 100)]
    stays = ~found & (torch.arange(100) < 90)
    assert torch.equal(sampler.s[stays], before[stays])
    assert (sampler.s[90:95] != before[90:95]).all()         # these are anywhere


def test_the_sampler_of_a_scene(tiny):
    """--as-released: edges of the picture on black, not of what is trained on."""
    scene = common.load_scene(str(tiny), tiny, 24, "white")
    sampler = sm.make_pixel_sampler(scene, Args(as_released=True, rays=256))
    assert isinstance(sampler, ReleasedWalkers) and len(sampler.s) == 260
    black = common.load_scene(str(tiny), tiny, 24, "black").train.images
    expected = cumulative(edge_maps(black, released=True))
    assert_close(sampler.edges, expected, atol=1e-4, rtol=0)             # on white: 0.01 and more
    for more, count in ((dict(rays=8, batch="rays"), 20), (dict(rays=90, batch="rays"), 90),
                        (dict(num_walkers=300), 300), (dict(num_walkers=30, rays=70), 30)):
        sampler = sm.make_pixel_sampler(scene, Args(**more))
        assert len(sampler.xy) == count and set(sampler.view.tolist()) == set(range(20))


def test_render_by_hand():
    """One colour and density s over a length L: opacity = 1 - exp(-s L)."""
    scene = small_scene()
    sampler = OccupancySampler(scene, 520, 32.0)             # a step of 0.01; the box: 2.5 to 5.5
    rays = torch.tensor([[-4.0, 0.1, 0.2]]), torch.tensor([[1.0, 0.0, 0.0]])
    colour = torch.tensor([0.2, 0.4, 0.6])

    def uniform(x, sh):
        return torch.full((len(x),), 0.7), colour.expand(len(x), 3)
    out = sm.render(uniform, sampler, *rays, scene.bg)
    opacity = 1 - math.exp(-0.7 * 3)
    assert abs(out["samples"] - 300) <= 1
    assert float(out["opacity"]) == pytest.approx(opacity, abs=2e-3)
    assert_close(out["rgb"][0], opacity * colour + (1 - opacity) * scene.bg, atol=2e-3, rtol=0)
    backgrounds = torch.rand(2, 3)                           # (R, 3): one for each ray
    rgb = sm.render(uniform, sampler, *(r.expand(2, 3) for r in rays), backgrounds)["rgb"]
    assert_close(rgb - out["rgb"], (1 - opacity) * (backgrounds - scene.bg), atol=2e-3, rtol=0)
    out = sm.render(uniform, sampler, rays[0], -rays[1], scene.bg)       # that looks away
    assert out["samples"] == 0 and torch.equal(out["rgb"], scene.bg[None])


def test_field_image_and_mean_over_views(monkeypatch):
    scene = small_scene()
    field, sampler = small_field(scene), OccupancySampler(scene, 48, 32.0)
    d = normalize(torch.randn(500, 3), dim=-1)
    (sigmas, rgbs), other = (field(d, common.spherical_harmonics(sign * d)) for sign in (1, -1))
    assert torch.equal(other[0], sigmas) and (other[1] - rgbs).abs().max() > 1e-3
    whole = sm.render_image(field, sampler, scene, scene.train, 1, chunk=50)
    rays = sm.camera_rays(scene.train, torch.tensor([1]), torch.tensor([[3.5, 7.5]]), False)
    assert_close(sm.render(field, sampler, *rays, scene.bg)["rgb"][0].detach(), whole["rgb"][7, 3])

    def off_by(field, sampler, scene, views, v):
        return {"rgb": views.images[v] + (0.1, 0.01)[v], "depth": None,
                "opacity": torch.tensor(float(v))}
    monkeypatch.setattr(sm, "render_image", off_by)
    scores = sm.evaluate(None, None, scene, None)            # of 20 and 40 dB
    assert scores["psnr"] == pytest.approx(30, abs=1e-3)
    assert 0 < scores["ssim"] < 1 and scores["opacity"] == 0.5


def test_saturated_colours_are_named(capsys):
    rgbs, weights = torch.tensor([[0.0, 1.0, 1.0], [0.5, 0.5, 0.5]]), torch.tensor([3.0, 1.0])
    common.check_colours(rgbs, weights, torch.full((9, 3), 0.5))
    assert "note: 75% of the visible colours are saturated, 0% in" in capsys.readouterr().err
    common.check_colours(rgbs, weights, torch.full((9, 3), 1.0))         # so are the pictures
    common.check_colours(rgbs, weights.flip(0), torch.full((9, 3), 0.5))
    assert capsys.readouterr().err == ""


def photographs():
    """A wall with things before it, without alpha: 13 training and 2 test views, all opaque."""
    wall = common.Shape(common.BOX, (0, 0.6, 0), (1.4, 0.05, 1.4), common.TEAL, common.WHITE,
                        (6, 1, 6))
    ball = common.Shape(common.BALL, (0.1, 0, 0.1), (0.35,) * 3, common.RED, common.WHITE)
    crate = common.Shape(common.BOX, (-0.3, 0.2, -0.3), (0.2, 0.2, 0.3), common.GREEN)
    cameras = {f"{e} {a}": common.orbit_pose(math.radians(a - 90), math.radians(e), 3.0)
               for e in (-12, 0, 12) for a in (-20, -10, 0, 10, 20)}
    views = common.render([wall, ball, crate], cameras, 2.0, 24, torch.zeros(3))[0]
    assert (views.alpha == 1).all()
    views = replace(views, alpha=None)
    train = common.pick_views(views, [*range(6), 7, *range(9, 15)])
    return common.Scene("room", "llff", train, common.pick_views(views, [6, 8]),
                        torch.tensor([[-1.5] * 3, [1.5] * 3]), 1.0, 6.0, torch.ones(3), False)


def test_photographs_end_opaque_and_right_on_every_background(tmp_path, monkeypatch):
    """White stands behind the scene. With --train-background scene: opacity 0.75, and 28.3 dB on
    white, 10.6 on black, as white is used as paint."""
    scenes = [replace(photographs(), bg=common.background(bg)) for bg in ("white", "black", "grey")]
    scores, evaluate = [], sm.evaluate

    def on_three(field, sampler, scene, views, pictures=None):
        scores.extend(evaluate(field, sampler, other, views) for other in scenes)
        return scores[0]
    monkeypatch.setattr(sm, "load_scene", lambda *_: scenes[0])
    monkeypatch.setattr(sm, "evaluate", on_three)
    sm.train(quick("room", tmp_path / "a", sampling="uniform", train_background="random", lr=4e-2,
                   rays=192, levels=2, finest=24, march_steps=24, steps=400, eval_every=400))
    psnr = [score["psnr"] for score in scores]
    assert min(psnr) > 20 and max(psnr) - min(psnr) < 0.5 and scores[0]["opacity"] > 0.95, psnr


TINY = dict(size=24, train_background="scene", batch="rays", rays=256, lr=1e-2, beta=1.0,
            noise=0.02, levels=4, log2_table=11, finest=48, march_steps=48, eval_views=1, steps=4,
            eval_every=2, device="cpu")
PROPOSAL = dict(ray_sampling="proposal", proposal_samples=(8, 6), ray_samples=6)


def quick(scene, out, **more):
    return replace(Args(), **{**TINY, "scene": str(scene), "out": str(out), **more})


FLAGS = {
    "uniform": dict(sampling="uniform", weighting="on", train_background="random"),
    "edge": dict(sampling="edge", weighting="off"),
    "multinomial": dict(sampling="multinomial", steps=14, eval_every=12),    # with a table
    "no pixel gradient": dict(pixel_gradient=False, clamp=False, alpha=1.0),
    "reinit none": dict(reinit="none", uniform_share=0.0, reinit_share=0.0, alpha=0.0),
    "reinit uniform": dict(reinit="uniform", uniform_share=1.0, reinit_share=1.0),
    "samples": dict(batch="samples", samples=2000, num_walkers=400, train_background="random"),
    "as released": dict(as_released=True),
    "proposal": dict(**PROPOSAL, train_background="random"),
    "proposal samples": dict(**PROPOSAL, batch="samples", samples=1200, sampling="uniform"),
    "one ray": dict(rays=1),
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_combination_runs_and_resumes(tiny, tmp_path, name):
    result = sm.train(quick(tiny, tmp_path / "a", **FLAGS[name]))
    assert math.isfinite(result["psnr"]) and result["psnr"] > 3 and result["samples"] > 0

    def train(resume):
        sm.train(quick(tiny, tmp_path / "b", resume=resume, **FLAGS[name]))
    break_off_and_resume(train, 1)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def spy(monkeypatch, scene, out, **more):
    """Every call of these functions in a run: name -> list of (arguments, result)."""
    seen, samplers = defaultdict(list), (Walkers, BaselineSampler, ReleasedWalkers)
    watched = [(sm, "render"), (sm, "soft_weight"), (sm.TrainingRun, "log"),
               *((sampler, name) for sampler in samplers for name in ("draw", "update"))]
    with monkeypatch.context() as patch:
        for owner, name in watched:
            def watch(*words, name=name, call=getattr(owner, name), **values):
                result = call(*words, **values)
                seen[name].append((values or words, result))
                return result
            patch.setattr(owner, name, watch)
        sm.train(quick(scene, out, **more))
    return seen


@pytest.mark.parametrize("flags", [{}, dict(**PROPOSAL, train_background="random")])
def test_a_step(tiny, tmp_path, monkeypatch, flags):
    train = common.load_scene(str(tiny), tiny, 24, "white").train
    seen = spy(monkeypatch, tiny, tmp_path / "a", warmup=2, **flags)
    rendered = [call for call in seen["render"] if len(call[0]) == 6]    # with jitter: in training
    for step, exponent in enumerate((0.0, 0.3, 0.6, 0.6)):               # alpha step / warmup
        view, xy = seen["draw"][step][1]
        _, squared_error, abs_error, weight, d_xy = seen["update"][step][0]
        words, out = rendered[step]
        logged, bg = seen["log"][step][0], words[4]
        x, y = xy.detach().long().unbind(-1)
        target = train.images[view, y, x] + (1 - train.alpha[view, y, x, None]) * (bg - 1)
        difference = out["rgb"].detach() - target            # none if the field is perfect
        assert bg.shape == ((256, 3) if flags else (3,))
        assert_close(squared_error, (difference ** 2).mean(-1))
        assert_close(abs_error, difference.abs().mean(-1))
        assert_close(weight, soft_weight(abs_error, exponent))
        assert_close(logged["loss"].detach(), (weight * squared_error).mean())
        assert_close(logged["opacity"], out["opacity"].mean())
        assert d_xy.shape == (256, 2) and d_xy.isfinite().all() and d_xy.any()
    state = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    optimiser = state["parts"]["training"]["optimiser"]
    group, = optimiser["param_groups"]
    assert group["lr"] == sm.learning_rate(quick(tiny, None), 3)
    assert len(optimiser["state"]) == len(group["params"])   # all have a gradient, proposals too


@pytest.mark.parametrize("flags, weighted, moved", [
    (dict(pixel_gradient=False, clamp=False), True, False), (dict(weighting="off"), False, True),
    (dict(sampling="multinomial"), True, False), (dict(sampling="uniform"), False, False)])
def test_who_is_weighted_and_moved(tiny, tmp_path, monkeypatch, flags, weighted, moved):
    seen = spy(monkeypatch, tiny, tmp_path / "a", steps=2, **flags)
    assert [words[2] for words, _ in seen["soft_weight"]] == 2 * [flags.get("clamp", True)]
    assert (seen["soft_weight"][1][0][1] > 0) == weighted                # the exponent
    for (_, _, _, weight, d_xy), _ in seen["update"]:
        assert (d_xy is not None) == moved and (weighted or (weight == 1).all())


def test_schedules():
    """Rate: linear over 100 steps, times a cosine to a tenth. Exponent: linear, then constant."""
    flags = Args(lr=0.02, steps=1000)
    for step, share in ((0, 0.01), (250, 0.55 + 0.45 * 0.5 ** 0.5), (500, 0.55), (999, 0.1)):
        assert sm.learning_rate(flags, step) == pytest.approx(0.02 * share, rel=1e-4)
    for more, expected in ((dict(warmup=100), [0, 0.3, 0.6, 0.6, 0.6]),
                           (dict(as_released=True), [0, 0.05, 0.599, 0.6, 0.6])):
        found = [sm.soft_exponent(Args(alpha=0.6, **more), step) for step in (0, 50, 599, 601, 801)]
        assert found == pytest.approx(expected)


def test_as_released_constants(tiny, tmp_path):
    """Whatever the flags say: alpha 0.6, and 0.8 for forward-facing scenes."""
    write_llff(tmp_path / "line")
    other = dict(alpha=0.1, clamp=False, weighting="off", batch="samples",
                 train_background="random")
    for scene, size, alpha in ((tiny, 24, 0.6), (tmp_path / "line", 16, 0.8)):
        sm.train(quick(scene, tmp_path / f"{alpha}", size=size, as_released=True, **other))
        saved = json.loads((tmp_path / f"{alpha}/args.json").read_text())
        assert [saved[name] for name in other] == [alpha, True, "on", "rays", "scene"]


def test_batches_of_equal_rays_or_samples(tiny, tmp_path, monkeypatch):
    seen = spy(monkeypatch, tiny, tmp_path / "a", batch="samples", samples=3000, num_walkers=500,
               steps=30, eval_every=30)
    rays = [len(view) for _, (view, _) in seen["draw"]]
    assert rays[0] == 256 and max(rays) <= 500 and min(rays) >= 64 and len(set(rays)) > 3
    last = lines(tmp_path / "a/metrics.jsonl")[-1]
    assert last["rays"] == sum(rays) and 1500 < last["samples"] / 30 < 9000
    proposal = ProposalSampler(small_scene(), (4, 4), 6, 10)
    for samples, expected in ((1200, 200), (6, 64), (10 ** 6, Args().num_walkers)):
        assert sm.num_rays(Args(samples=samples), proposal) == expected


def test_pictures(tiny, tmp_path):
    """The strips show what was scored; walkers.gif a white dot where a pixel was drawn."""
    psnr = sm.train(quick(tiny, tmp_path / "a", rays=40))["psnr"]
    strips = [iio.imread(tmp_path / f"a/test_00{v}.png") / 255 for v in (0, 1)]
    found = [-10 * math.log10(((s[:, :24] - s[:, 24:48]) ** 2).mean()) for s in strips]
    assert np.mean(found) == pytest.approx(psnr, abs=0.05)               # rounded to 1/255
    assert iio.imread(tmp_path / "a/walkers.gif", index=None).shape[:3] == (2, 936, 936)
    dots = iio.imread(tmp_path / "a/walkers/000002.png")[::13, ::13][:, 48:]
    assert 0 < (dots == 255).all(-1).sum() <= 2 * 40


def test_wrong_flags():
    wrong = {name: -1 for name, value in vars(Args()).items() if type(value) in (int, float)}
    wrong.update(rays=0, warmup=0, finest=15, log2_table=40, proposal_samples=(8, 0), beta=math.inf,
                 uniform_share=2.0, reinit_share=math.nan)
    for name, bad in wrong.items():
        with pytest.raises(common.UserError, match=f"^--{name.replace('_', '-')} "):
            sm.check(replace(Args(), **{name: bad}))
    with pytest.raises(common.UserError, match="--as-released"):
        sm.check(Args(as_released=True, sampling="edge"))


def test_forward_facing_scene_runs(tmp_path):
    write_llff(tmp_path / "line")
    result = sm.train(quick(tmp_path / "line", tmp_path / "run", size=16, video=True, **PROPOSAL,
                            train_background="random"))
    assert result["data"] == "llff" and math.isfinite(result["psnr"]) and result["samples"] > 0
    assert (tmp_path / "run/render.mp4").exists()


def test_real_lego_learns_in_a_hundred_steps(tmp_path):
    result = sm.train(quick("lego", tmp_path / "run", data=real("nerf_synthetic/lego"), size=50,
                            steps=100, levels=6, log2_table=14, finest=128, march_steps=64,
                            eval_every=50, eval_views=3, train_background="random", lr=2e-2,
                            reinit_share=0.1, noise=0.05, beta=4.0))
    assert result["data"] == "blender" and result["psnr"] > 19.5, result["psnr"]
