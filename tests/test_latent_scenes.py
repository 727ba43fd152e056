"""latent_scenes.py against known answers: the price list, autoencoder, planes, renderer, rows on disk, who trains when, ranks, runs.

Oracles are slow loops in float64 and cases worked out by hand. Runs are on the built-in cars at 16 px. Real data: NERF_DATA=... ; without
it that test says that it was skipped.
"""
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import conftest  # noqa: E402
import latent_scenes as ls  # noqa: E402
from common import UserError  # noqa: E402
from conftest import assert_refused, content, lines, real  # noqa: E402
from latent_scenes import Album, Args, Autoencoder, Model, Store, plan, schedule  # noqa: E402

F64 = torch.float64
SIZE = 16
TINY = dict(scene="cars", size=SIZE, factor=4, scenes=2, new_scenes=2, compare=(), rgb_scenes=1, steps=2, latent_channels=3, width=(8, 8),
            resolution=8, micro=2, macro=3, bases=4, hidden=8, samples=8, fine=0, box="whole", batch=2, views=1, rgb_rays=16, encode=1.0,
            device="cpu")
BOX = torch.tensor([[-1.0, -2, 0.5], [3, 1, 2]])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def cars_drawn_once():
    """A car is drawn the first time that a test wants it."""
    real, kept = common.load_car, {}

    def load_car(seed, size, bg, above):
        key = seed, size, tuple(bg.tolist()), above
        if key not in kept:
            kept[key] = real(seed, size, bg, above)
        return kept[key]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_car", load_car)
        yield


def args(**more):
    return replace(Args(), **{**TINY, **more})


def words_of(given):
    return conftest.words_of(vars(given))


def model_of(planes="both", rgb=False, box=BOX, **more):
    """A model in float64 whose every number is drawn."""
    model = Model(args(**more), planes, rgb, box, torch.tensor([0.9, 0.5, 0.2])).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        if not rgb:
            model.autoencoder.bg.uniform_()
    return model


def close(a, b, atol=1e-6, rtol=0.0):
    """True, or the complaint of torch's, which itself returns None."""
    torch.testing.assert_close(a, b, atol=atol, rtol=rtol)
    return True


def without_seconds(value):
    """A summary, a line of metrics or a phase's file, without what a clock said."""
    if isinstance(value, dict):
        return {k: without_seconds(v) for k, v in value.items() if "seconds" not in str(k) and k != "peak_memory_mb"}
    return [without_seconds(v) for v in value] if isinstance(value, list) else value


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def phase_file(out, name):
    return torch.load(Path(out) / f"phase-{name}.pt", weights_only=True)


def setup_of(folder, given, old, new):
    family = common.load_family("cars", "no such folder", given.size)
    scenes = {"old": old, "new": new, "few": new[:given.rgb_scenes]}
    return ls.Setup(given, Album(family, folder / "pictures"), scenes, family.aabb, folder, None, "cpu")


def phase_of(given, name):
    return next(p for p in plan(given) if p.name == name)


# ------------------------------------------------------------------------------------------------------------ the price list

def test_bytes_are_the_paper_s():
    rgb, networks = ls.bytes_per_scene(1000, 64, 32), 4 * 83.65e6
    ours = lambda N: ls.bytes_per_scene(N, 64, 10, 50, 22, networks)
    assert rgb == 1_572_864 == ls.bytes_per_scene(1, 64, 32)
    assert round(ours(1000) / 1000) == 880 and round(100 * (1 - ours(1000) / rgb), 1) == 44.0
    assert round(100 * (ours(100) / rgb - 1)) == 178                                               # of a hundred scenes each costs more
    assert next(N for N in range(1, 10 ** 4) if ours(N) < rgb) == 360
    assert ours(10 ** 12) == pytest.approx(491_720, abs=1)                                         # private planes and weights alone


def test_bytes_by_hand():
    assert ls.bytes_per_scene(2, 2, 1, 3, 5, 100) == 4 * (12 + 3) + (4 * 3 * 12 * 5 + 100) / 2 == 470
    assert ls.bytes_per_scene(7, 3, 0, 2, 1) == 8 + 4 * 2 * 27 / 7


def test_seconds_by_hand():
    assert ls.seconds_per_scene(10, 40, 100, 3) == (10, 13)                                        # fewer than stage 1 fitted
    assert ls.seconds_per_scene(40, 40, 100, 3) == (2.5, 5.5)
    assert ls.seconds_per_scene(50, 40, 100, 3) == (2.6, 5)
    assert ls.seconds_per_scene(8, 0, 0, 3) == (3, 3)
    kept, overhead = zip(*(ls.seconds_per_scene(N, 40, 400, 3) for N in range(1, 3000)))
    for curve in (kept, overhead):
        assert all(a > b > 3 for a, b in itertools.pairwise(curve)) and curve[-1] < 3.2
    assert all(a < b for a, b in zip(kept, overhead))
    assert ls.seconds_per_scene(10 ** 9, 40, 400, 3) == pytest.approx((3, 3), abs=1e-5)


def test_amortise_by_hand():
    table = ls.amortise({"bytes_per_scene": 8, "bytes_shared": 1000, "seconds_per_scene": 2, "seconds_shared": 60}, 10, [5, 20])
    assert table == {5: {"bytes": 208, "seconds": 12, "seconds_overhead": 14}, 20: {"bytes": 58, "seconds": 4, "seconds_overhead": 5}}
    alone = ls.amortise({"bytes_per_scene": 8, "bytes_shared": 0, "seconds_per_scene": 2, "seconds_shared": 0}, 10, [5, 20])
    assert all(cell == {"bytes": 8, "seconds": 2, "seconds_overhead": 2} for cell in alone.values())


# ----------------------------------------------------------------------------------------------------------- the autoencoder

def test_normalise_and_back():
    ae = Autoencoder(4, 4, (8, 8)).double()
    ae.s.fill_(0.3)
    z = torch.linspace(-16, 16, 999, dtype=F64)                                                    # s |z| < 4.95: not clipped
    assert close(ae.denormalise(ae.normalise(z)), z, 1e-9) and close(ae.normalise(z), torch.tanh(0.3 * z), 1e-12)
    y = torch.tensor([-5.0, -1, -0.99995, 0.99995, 1, 5], dtype=F64, requires_grad=True)           # the renderer's sigmoid may go beyond 1
    back = ae.denormalise(y)
    assert close(back.detach().abs(), torch.full((6,), math.atanh(1 - 1e-4) / 0.3, dtype=F64), 1e-9)
    assert torch.autograd.grad(back.sum(), y)[0].isfinite().all()


def test_measure():
    ae = Autoencoder(3, 4, (8, 8))
    x = torch.rand(5, 3, SIZE, SIZE) * 2 - 1
    ae.measure(x)
    z = ae.encoder(x).detach()
    assert float((ae.s * z).std()) == pytest.approx(0.4, abs=1e-5) and not ae.s.requires_grad and ((0 < ae.bg) & (ae.bg < 1)).all()


def test_measured_background_is_the_border_s():
    ae = Autoencoder(3, 4, (8, 8))
    ae.encoder = nn.AvgPool2d(4)
    colour = torch.tensor([1.0, -0.5, 0.25])
    x = colour.view(1, 3, 1, 1).repeat(4, 1, 20, 28)
    ae.measure(x)                                                                                  # a constant picture
    s = 0.4 / float(x[:, :, ::4, ::4].std())
    assert float(ae.s) == pytest.approx(s, rel=1e-5)
    assert ae.bg.tolist() == pytest.approx([(math.tanh(s * c) + 1) / 2 for c in colour.tolist()], abs=1e-5)
    x[:, :, 4:-4, 4:-4] = torch.rand(4, 3, 12, 20)
    ae.measure(x)                                                                                  # what is inside only moves s
    assert float(ae.s) != pytest.approx(s, rel=1e-2)
    assert ae.bg.tolist() == pytest.approx([(math.tanh(float(ae.s) * c) + 1) / 2 for c in colour.tolist()], abs=1e-5)


@pytest.mark.parametrize("factor, width", [(4, (8, 12)), (4, (8, 12, 99)), (8, (8, 12, 16))])
def test_shapes_and_gradients_of_the_autoencoder(factor, width):
    ae = Autoencoder(5, factor, width)
    assert all(99 not in p.shape for p in ae.parameters())                                         # a width too many is not used
    with torch.no_grad():
        for p in ae.parameters():
            p += 0.1 * torch.randn_like(p)                                                         # residual parts start at 0
    x = torch.rand(2, 3, 16, 24)
    z = ae.encoder(x)
    out = ae.decoder(z)
    assert z.shape == (2, 5, 16 // factor, 24 // factor) and out.shape == x.shape
    F.mse_loss(out, x).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in ae.parameters())


# ------------------------------------------------------------------------------------------------------------------- planes

@pytest.mark.parametrize("fusion", ["concat", "sum"])
@pytest.mark.parametrize("planes", ["micro", "macro", "both"])
def test_fuse_against_loops(planes, fusion):
    R, micro, macro, M = 3, 2, 2 if fusion == "sum" else 3, 4
    model = model_of(planes, resolution=R, micro=micro, macro=macro, bases=M, fusion=fusion)
    own, other = micro * (planes != "macro"), macro * (planes != "micro")
    P = 3 * R * R * own
    row = torch.randn(2, P + M * (other > 0), dtype=F64)
    out, shared = model.fuse(row).detach(), model.shared.tolist() if other else None
    sums = fusion == "sum" and planes == "both"
    assert out.shape == (2, 3, R, R, micro if sums else own + other)
    for b, plane, r, c in itertools.product(range(2), range(3), range(R), range(R)):
        at = ((plane * R + r) * R + c) * own
        a = row[b, at:at + own].tolist()
        s = [sum(float(row[b, P + k]) * shared[k][plane][r][c][f] for k in range(M)) for f in range(other)]
        assert out[b, plane, r, c].tolist() == pytest.approx([x + y for x, y in zip(a, s)] if sums else a + s, abs=1e-12)


def test_shared_planes_learn_from_every_scene_of_a_batch():
    model = model_of()
    rows = torch.randn(3, 3 * 64 * 2 + 4, dtype=F64)
    parts = [torch.autograd.grad(model.fuse(rows[b:b + 1]).square().sum(), model.shared)[0] for b in range(3)]
    assert all(g.flatten(1).abs().amax(1).min() > 0 for g in parts)                                # each of the shared planes
    assert close(torch.autograd.grad(model.fuse(rows).square().sum(), model.shared)[0], sum(parts), 1e-9)


class Bare(nn.Module):
    """In the place of an MLP: the first features are density and colours."""
    def forward(self, h):
        return h


def test_planes_are_xy_xz_yz():
    model, R = model_of("micro", resolution=4, micro=4), 4
    model.mlp = Bare()
    cells = torch.tensor(list(itertools.product(range(R), repeat=3)))                              # i, j, k: where along x, y, z
    x = (BOX[0] + (cells + 0.5) / R * (BOX[1] - BOX[0])).double()
    for plane, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
        hot = torch.zeros(1, 3, R, R, 4, dtype=F64)
        hot[0, plane, 3, 1] = torch.tensor([2.0, -1, 0, 1])                                        # row 3, column 1
        sigmas, rgbs = model.field(x[None], hot)
        on = ((cells[:, a] == 1) & (cells[:, b] == 3)).double()
        assert on.sum() == R and close(sigmas, F.softplus(2 * on - 1), 1e-6)
        assert close(rgbs, 1.002 / (1 + torch.exp(-on[:, None] * torch.tensor([-1.0, 0, 1]))) - 0.001, 1e-6)


# ------------------------------------------------------------------------------------------------------------------ renderer

softplus = lambda x: np.logaddexp(0, x)


def bilinear(plane, a, b):
    """plane (R, R, F), a along its columns, b along its rows, both from -1 to 1; nothing outside."""
    R, out = len(plane), np.zeros(plane.shape[2])
    a, b = (a + 1) * R / 2 - 0.5, (b + 1) * R / 2 - 0.5
    for c, r in itertools.product(range(R), range(R)):
        out += max(0, 1 - abs(a - c)) * max(0, 1 - abs(b - r)) * plane[r, c]
    return out


def slow_field(model, planes, x):
    low, high = model.box.double().numpy()
    u = 2 * (x - low) / (high - low) - 1
    h = sum(bilinear(planes[p], u[a], u[b]) for p, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))))
    first, last = (tuple(p.detach().numpy() for p in layer.parameters()) for layer in (model.mlp[0], model.mlp[2]))
    h = last[0] @ softplus(first[0] @ h + first[1]) + last[1]
    return softplus(h[0] - 1), 1.002 / (1 + np.exp(-h[1:])) - 0.001


def slow_march(model, planes, o, d, t, edges):
    T, rgb, acc, depth, weights = 1.0, 0, 0, 0, []
    for k, tk in enumerate(t):
        sigma, c = slow_field(model, planes, o + tk * d)
        w = T * (1 - math.exp(-sigma * (edges[k + 1] - edges[k])))
        T -= w
        rgb, acc, depth = rgb + w * c, acc + w, depth + w * (edges[k] + edges[k + 1]) / 2
        weights.append(w)
    return rgb, acc, depth, weights


def slow_cdf(weights):
    """Of weights widened to their neighbours, + 0.01."""
    S = len(weights)
    at = lambda i: weights[i] if 0 <= i < S else -math.inf
    p = np.array([(max(at(i - 1), at(i)) + max(at(i), at(i + 1))) / 2 + 0.01 for i in range(S)])
    return np.concatenate([[0], np.cumsum(p / p.sum())])


def slow_render(model, planes, o, d, near, far, jitter):
    low, high = model.box.double().numpy()
    t_in, t_out = near, far
    for axis in range(3):
        if d[axis] == 0:
            if not low[axis] <= o[axis] <= high[axis]:
                t_out = t_in
            continue
        a, b = sorted(((low[axis] - o[axis]) / d[axis], (high[axis] - o[axis]) / d[axis]))
        t_in, t_out = max(t_in, a), min(t_out, b)
    bg = (model.white if model.rgb else model.autoencoder.bg).numpy()
    if t_out <= t_in:
        return 2 * bg - 1, 0.0, 0.0
    S = model.samples
    edges = [t_in + (t_out - t_in) * k / S for k in range(S + 1)]
    t = [edges[k] + jitter * (edges[k + 1] - edges[k]) for k in range(S)]
    if model.fine:
        weights = slow_march(model, planes, o, d, t, edges)[3]
        more = np.interp([(k + jitter) / model.fine for k in range(model.fine)], slow_cdf(weights), edges)
        t = sorted([*t, *more])
        edges = [t_in, *((a + b) / 2 for a, b in itertools.pairwise(t)), t_out]
    rgb, acc, depth, _ = slow_march(model, planes, o, d, t, edges)
    return 2 * (rgb + (1 - acc) * bg) - 1, acc, depth


def some_rays(B, n):
    """From all around towards BOX, one along an axis, one past it."""
    middle = BOX.double().mean(0)
    o = middle + 4 * F.normalize(torch.randn(B, n, 3, dtype=F64), dim=-1)
    d = F.normalize(middle + torch.randn(B, n, 3, dtype=F64) * 0.5 - o, dim=-1)
    o[:, 0], d[:, 0] = torch.tensor([0.3, -0.7, 6.0]), torch.tensor([0.0, 0.0, -1.0])
    d[:, 1] = -d[:, 1]
    return o, d


@pytest.mark.parametrize("rgb, fine, jittered", [(False, 0, False), (False, 0, True), (False, 6, True), (True, 6, False)])
def test_render_against_a_slow_loop(rgb, fine, jittered):
    model = model_of("micro", rgb, resolution=4, micro=3, fine=fine, hidden=5)
    with torch.no_grad():
        model.mlp[2].bias[0] += 1.0                                                                # half of the light is stopped
    planes = 2 * torch.randn(2, 3, 4, 4, model.own[-1], dtype=F64)
    o, d = some_rays(2, 6)
    jitter = torch.rand(2, 6, dtype=F64) if jittered else None
    with torch.no_grad():
        out = ls.render(model, planes, o, d, 0.5, 7.0, jitter)
    assert out["y"].shape == (2, 6, 3) and out["acc"].shape == out["depth"].shape == (2, 6)
    assert (out["acc"][:, 1] == 0).all() and out["acc"].max() < 0.999 and (out["acc"] > 0.2).sum() > 4
    for b, k in itertools.product(range(2), range(6)):
        j = float(jitter[b, k]) if jittered else 0.5
        y, acc, depth = slow_render(model, planes[b].numpy(), o[b, k].numpy(), d[b, k].numpy(), 0.5, 7.0, j)
        found = out["y"][b, k].tolist() + [float(out["acc"][b, k]), float(out["depth"][b, k])]
        assert found == pytest.approx([*y, acc, depth], abs=1e-6), (b, k)


@pytest.mark.parametrize("rgb", [False, True])
def test_a_ray_that_misses_sees_the_background_exactly(rgb):
    model = model_of("micro", rgb, fine=4)
    bg = model.white if rgb else model.autoencoder.bg
    o, d = some_rays(1, 3)
    for jitter in (None, torch.rand(1, 3, dtype=F64)):
        out = ls.render(model, torch.randn(1, 3, 8, 8, model.own[-1], dtype=F64), o, d, 0.5, 7.0, jitter)
        assert torch.equal(out["y"][0, 1], 2 * bg - 1) and out["acc"][0, 1] == 0 and out["depth"][0, 1] == 0
        assert not torch.equal(out["y"][0, 0], 2 * bg - 1)


def test_without_jitter_nothing_is_drawn():
    model, (o, d) = model_of("micro", fine=4), some_rays(1, 5)
    planes = torch.randn(1, 3, 8, 8, 2, dtype=F64)
    once, before = ls.render(model, planes, o, d, 0.5, 7.0), torch.get_rng_state()
    again = ls.render(model, planes, o, d, 0.5, 7.0)
    half = ls.render(model, planes, o, d, 0.5, 7.0, torch.full((1, 5), 0.5, dtype=F64))
    assert torch.equal(before, torch.get_rng_state()) and same(once, again) and all(close(once[k], half[k], 1e-12) for k in once)
    assert not torch.equal(once["y"], ls.render(model, planes, o, d, 0.5, 7.0, torch.rand(1, 5, dtype=F64))["y"])


def test_a_constant_field_looks_the_same_however_it_is_split():
    o, d = some_rays(1, 8)
    pictures, model = [], model_of("micro")
    for samples, fine, jitter in ((1, 0, None), (3, 0, 0.9), (16, 0, None), (5, 7, 0.1), (2, 30, None)):
        model.samples, model.fine = samples, fine
        jitter = None if jitter is None else torch.full((1, 8), jitter, dtype=F64)
        out = ls.render(model, torch.zeros(1, 3, 8, 8, 2, dtype=F64), o, d, 0.5, 7.0, jitter)
        pictures.append(torch.cat([out["y"].flatten(), out["acc"].flatten()]))
    assert all(close(p, pictures[0], 1e-6) for p in pictures[1:]) and pictures[0].std() > 0.05


def test_gradients_reach_planes_shared_planes_and_mlp():
    model, (o, d) = model_of(fine=3), some_rays(2, 4)
    row = torch.randn(2, 3 * 64 * 2 + 4, dtype=F64, requires_grad=True)
    ls.render(model, model.fuse(row), o, d, 0.5, 7.0, torch.rand(2, 4, dtype=F64))["y"].square().sum().backward()
    for g in (row.grad[:, :-4], row.grad[:, -4:], model.shared.grad, *(p.grad for p in model.mlp.parameters())):
        assert g.isfinite().all() and g.abs().max() > 0


def test_resample_is_the_inverse_of_the_widened_distribution():
    weights = torch.rand(4, 7, dtype=F64) ** 4
    weights[1], weights[2, :5], weights[3] = 0, 0, torch.eye(7, dtype=F64)[3]
    edges = torch.linspace(2, 5, 8, dtype=F64).expand(4, 8)
    u = ((torch.arange(20_000, dtype=F64) + 0.5) / 20_000).expand(4, -1)
    t = ls.resample(edges, weights, u)
    assert (t.diff(dim=1) >= 0).all() and t.min() >= 2 and t.max() <= 5 and not t.requires_grad
    for k in range(4):
        cdf = slow_cdf(weights[k].tolist())
        assert close(t[k], torch.tensor(np.interp(u[k], cdf, edges[k])), 1e-9)
        middles, share = (edges[k, 1:] + edges[k, :-1]) / 2, torch.tensor(np.diff(cdf))
        assert float(t[k].mean()) == pytest.approx(float((share * middles).sum()), abs=1e-3)
        assert close(torch.histc(t[k], 7, 2, 5) / 20_000, share, 1e-3)
    assert close(t[1], 2 + 3 * u[1], 1e-9)                                                         # nothing found: everywhere alike
    inside = [float(((t[3] > 2 + 3 * k / 7) & (t[3] <= 2 + 3 * (k + 1) / 7)).double().mean()) for k in range(7)]
    assert inside[3] == pytest.approx(1.01 / 2.07, abs=1e-3) and inside[2] == pytest.approx(0.51 / 2.07, abs=1e-3) == inside[4]


def test_hit_box_by_hand():
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 2]])
    ray = lambda x: torch.tensor([x], dtype=torch.float32)
    hit = lambda o, d, near=0.5, far=10.0: [round(float(t), 5) for t in ls.hit_box(ray(o), ray(d), box, near, far)]
    assert hit((0, 0, 5), (0, 0, -1)) == [3, 6] and hit((5, 0.5, 0.5), (-1, 0, 0)) == [4, 6]
    assert hit((0, 0, 5), (0, 0, -1), far=4) == [3, 4] and hit((0, 0, 5), (0, 0, -1), near=3.5) == [3.5, 6]
    assert hit((0, 0, 0), (0, 0, 1)) == [0.5, 2] and hit((0, 0, 0), (0, -0.6, 0.8)) == [0.5, 1.66667]
    assert hit((-3, -3, 0), (0.5 ** 0.5, 0.5 ** 0.5, 0)) == [2.82843, 5.65685]
    for o, d in (((0, 3, 0), (0, 0, 1)), ((0, 3, 0), (0, 0, -1)), ((3, 0, 0), (0, 1, 0)), ((-3, 0, 0), (0.6, 0.8, 0)),
                 ((0, 0, 5), (0, 0, 1)), ((0, 0, 50), (0, 0, -1))):                                # past it, away from it, beyond far
        t_in, t_out = hit(o, d)
        assert t_in == t_out and 0.5 <= t_in <= 10
    o, d = some_rays(1, 30)
    t_in, t_out = ls.hit_box(o, d, BOX.double(), 0.5, 7.0)
    for t in (t_in, t_out):                                                                        # where it hits: on the box's surface
        on = ((o + t[..., None] * d - BOX[0]) / (BOX[1] - BOX[0]))[t_out > t_in]
        assert len(on) > 10 and on.min() > -1e-9 and on.max() < 1 + 1e-9 and (torch.minimum(on.abs(), (on - 1).abs()).amin(1) < 1e-9).all()


# --------------------------------------------------------------------------------------------------- latent pixels and shifts

def test_latent_pixels_are_the_middles_row_by_row():
    assert ls.latent_pixels(16, 4)[:5].tolist() == [[2, 2], [6, 2], [10, 2], [14, 2], [2, 6]] and len(ls.latent_pixels(16, 4)) == 16
    assert ls.latent_pixels(16, 8).tolist() == [[4, 4], [12, 4], [4, 12], [12, 12]] and ls.latent_pixels(8, 1)[8].tolist() == [0.5, 1.5]
    pixels = common.pixel_grid(16, 16).view(16, 16, 2).permute(2, 0, 1)
    assert torch.equal(F.avg_pool2d(pixels, 4).flatten(1).T, ls.latent_pixels(16, 4))


def test_moved_against_loops():
    x, shift = torch.rand(4, 3, 5, 7), torch.tensor([[2, 0], [-1, 2], [0, 0], [1, -2]])
    out = ls.moved(x, shift)
    for n, r, c in itertools.product(range(4), range(5), range(7)):
        dx, dy = shift[n].tolist()
        assert torch.equal(out[n, :, r, c], x[n, :, min(max(r - dy, 0), 4), min(max(c - dx, 0), 6)])
    assert torch.equal(ls.moved(x, 0 * shift), x)


def views_of(n):
    """Cameras that differ in pose and intrinsics."""
    views = common.load_car(0, SIZE, torch.ones(3), True)
    K = views.K[:1].repeat(n, 1, 1)
    K[:, 0, 0] += torch.arange(n)
    K[:, 0, 2] -= 0.3 * torch.arange(n)
    return views.c2w[:n], K


def seen_at(rays_o, rays_d, c2w, K):
    """The pixels (n, k, 2) that rays (n, k, 3) of n views go through."""
    x, y, z = torch.einsum("nki,nij->nkj", rays_o + rays_d - c2w[:, None, :, 3], c2w[:, :, :3]).unbind(-1)
    K = K[:, None]
    return torch.stack([K[..., 0, 2] - K[..., 0, 0] * x / z, K[..., 1, 2] + K[..., 1, 1] * y / z], -1)


def test_rays_through_each_view_s_own_camera():
    c2w, K = views_of(3)
    xy = torch.rand(3, 5, 2) * SIZE
    o, d = ls.rays_through(xy, c2w, K)
    for n in range(3):
        o_n, d_n = common.pixel_rays(xy[n], K[n], c2w[n].expand(5, 3, 4))
        assert torch.equal(o[n], o_n) and close(d[n], d_n, 1e-6)
    assert close(seen_at(o, d, c2w, K), xy, 1e-3)


def positions(n):
    """Pictures (n, 3, H, W) whose colours are where a pixel is: x, y, and which picture."""
    xy = common.pixel_grid(SIZE, SIZE).view(SIZE, SIZE, 2).permute(2, 0, 1)
    return torch.stack([torch.cat([xy, torch.full((1, SIZE, SIZE), float(k))]) for k in range(n)])


def batch_of(x, shift, pixels=None, rays=SIZE):
    n = len(x)
    return ls.Batch([0, 1], x, *views_of(n), shift, torch.rand(n, rays), pixels, 1.0, list(range(n)), 1.0)


def fake_render(c2w, K, seen):
    """In the place of render: a ray's colour is the pixel that it goes through in its own picture, and which picture."""
    def render(model, planes, rays_o, rays_d, near, far, jitter):
        n = len(c2w)
        at = seen_at(rays_o.view(n, -1, 3), rays_d.view(n, -1, 3), c2w, K)
        seen.append(at)
        which = torch.arange(n).view(n, 1, 1).expand(n, at.shape[1], 1)
        return {"y": torch.cat([at, which], -1).view(*rays_o.shape[:2], 3)}
    return render


def test_a_moved_picture_s_rays_move_with_it(monkeypatch):
    """What a ray sees in the picture as it was is what the moved one shows around the middle of that latent pixel."""
    model, family = model_of("micro").float(), common.load_family("cars", ".", SIZE)
    model.autoencoder.encoder, model.autoencoder.normalise = nn.AvgPool2d(4), lambda z: z
    shift = torch.tensor([[0, 0], [2, -1], [-2, 2], [1, 0]])
    for s in (shift, 0 * shift):
        b, seen = batch_of(ls.moved(positions(4), s), s), []
        monkeypatch.setattr(ls, "render", fake_render(b.c2w, b.K, seen))
        loss = ls.losses_of(model, phase_of(args(), "C"), torch.zeros(2, 3, 8, 8, 2), b, family)
        shown = F.avg_pool2d(b.x, 4)[:, :2]
        inner = seen[0].view(4, 4, 4, 2).permute(0, 3, 1, 2)[:, :, 1:-1, 1:-1]                     # edges repeat
        assert close(inner, shown[:, :, 1:-1, 1:-1], 1e-3)
    assert loss.keys() == {"latent"} and float(loss["latent"]) < 1e-6                              # not moved: everywhere, in order


def test_rgb_rays_are_those_of_their_pixels(monkeypatch):
    model, family = model_of(rgb=True).float(), common.load_family("cars", ".", SIZE)
    pixels = torch.randint(SIZE ** 2, (4, 9))
    b, seen = batch_of(positions(4), torch.zeros(4, 2, dtype=torch.long), pixels, 9), []
    monkeypatch.setattr(ls, "render", fake_render(b.c2w, b.K, seen))
    loss = ls.losses_of(model, phase_of(args(compare=("rgb",)), "rgb"), torch.zeros(2, 3, 8, 8, 5), b, family)
    assert close(seen[0], torch.stack([pixels % SIZE, pixels // SIZE], -1) + 0.5, 1e-3)
    assert loss.keys() == {"rgb"} | ({"tv"} if args().tv else set()) and float(loss["rgb"]) < 1e-6


def test_total_variation_by_hand():
    planes = torch.randn(2, 3, 4, 5, 2, dtype=F64)
    down, right = [], []
    for b, p, r, c, f in itertools.product(*map(range, planes.shape)):
        for found, there, (r1, c1) in ((down, r < 3, (r + 1, c)), (right, c < 4, (r, c + 1))):
            found += [float((planes[b, p, r1, c1, f] - planes[b, p, r, c, f]) ** 2)] if there else []
    assert float(ls.total_variation(planes)) == pytest.approx(np.mean(down) + np.mean(right), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------- rows on disk

@pytest.fixture
def a_store(tmp_path):
    """name, mean, seed -> a store in a file of that name."""
    model, opened = model_of(resolution=2, micro=1).float(), []

    def make(name="s", mean=None, seed=3):
        opened.append(Store(tmp_path / name, model, mean, seed))
        return opened[-1]
    yield make
    for store in opened:
        store.close()


def test_a_row_never_written_is_the_mean(a_store):
    mean = torch.randn(16)
    store = a_store(mean=mean)
    assert store.P == 16 == 3 * 2 * 2 * 1 + 4
    p, (m, v, t) = store.read([0, 5, 10 ** 9])                                                     # beyond the file's end
    assert torch.equal(p, mean.expand(3, 16)) and not any(x.any() for x in (m, v, t)) and store.path.stat().st_size == 0
    store.step([5], p[1:2], torch.ones(1, 16), (m[1:2], v[1:2], t[1:2]), 0.1)
    p, (_, _, t) = store.read([4, 5, 6])                                                           # a hole, the row, beyond the end
    assert torch.equal(p[0], mean) and torch.equal(p[2], mean) and not torch.equal(p[1], mean) and t.flatten().tolist() == [0, 1, 0]


def test_noise_depends_on_seed_and_scene_alone(a_store, tmp_path):
    noise = a_store().read([7, 2, 7])[0]
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    torch.manual_seed(99)
    assert torch.equal(a_store("other").read([2])[0][0], noise[1]) and not torch.equal(a_store("third", seed=4).read([2])[0][0], noise[1])
    model = model_of(resolution=8, bases=25, micro=2).float()
    big = Store(tmp_path / "big", model, None, 0)
    rows = big.read(list(range(60)))[0]
    big.close()
    assert float(rows[:, :-25].std()) == pytest.approx(0.1, rel=0.03) and float(rows[:, -25:].std()) == pytest.approx(0.2, rel=0.1)
    combined = torch.einsum("bm,mf->bf", rows[:, -25:], torch.randn(25, 999) * 0.1)                # a mixture is as large as a plane
    assert float(combined.std()) == pytest.approx(0.1, rel=0.1)


def test_a_step_is_adam_s(a_store):
    store, scenes = a_store(), (9, 2, 4)
    twin = {i: store.read([i])[0][0].clone().requires_grad_() for i in scenes}
    adam = {i: torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.99)) for i, p in twin.items()}
    for step, batch in enumerate(([9, 2], [2], [4, 9], [9, 2, 4], [2, 4], [9])):
        lr = 0.1 * 0.7 ** step
        p, moments = store.read(batch)
        d_p = torch.randn(len(batch), store.P) * 10 ** float(torch.randn(()))
        d_p[:, 0] = 0                                                                              # a texel that no ray saw
        store.step(batch, p, d_p, moments, lr)
        for i, g in zip(batch, d_p):
            adam[i].param_groups[0]["lr"] = lr
            twin[i].grad = g
            adam[i].step()
    p, (m, v, t) = store.read(list(scenes))
    for k, i in enumerate(scenes):
        state = adam[i].state[twin[i]]
        assert close(p[k], twin[i].detach(), 2e-6) and float(t[k]) == float(state["step"])
        assert close(m[k], state["exp_avg"], 1e-5, 1e-5) and close(v[k], state["exp_avg_sq"], 1e-5, 1e-5)


def test_a_scene_that_is_absent_does_not_move(a_store):
    store = a_store(mean=torch.randn(16))
    for batch in ([0, 1, 2, 3], [3, 1]):
        p, moments = store.read(batch)
        store.step(batch, p, torch.randn(len(batch), 16), moments, 0.1)
    row = lambda i: store.path.read_bytes()[i * store.bytes:(i + 1) * store.bytes]
    before = [row(i) for i in range(4)]
    for _ in range(3):
        p, moments = store.read([2])
        store.step([2], p, torch.randn(1, 16), moments, 0.1)
    assert [row(i) == before[i] for i in range(4)] == [True, True, False, True] and store.path.stat().st_size == 4 * store.bytes


def test_a_step_touches_its_rows_only(a_store, monkeypatch):
    """However many scenes there are."""
    touched, read, write = [], os.pread, os.pwrite
    monkeypatch.setattr(ls.os, "pread", lambda file, n, at: touched.append(n) or read(file, n, at))
    monkeypatch.setattr(ls.os, "pwrite", lambda file, data, at: touched.append(len(data)) or write(file, data, at))
    costs = []
    for store, scene in ((a_store("few"), 1), (a_store("many"), 10 ** 6)):
        for _ in range(2):
            p, moments = store.read([scene, 0])
            store.step([scene, 0], p, torch.ones(2, 16), moments, 0.1)
        costs.append(list(touched))
        touched.clear()
    assert costs[0] == costs[1] == 8 * [4 * (3 * 16 + 1)]


def test_a_file_begins_with_its_first_scene(tmp_path):
    store = Store(tmp_path / "s", model_of(resolution=2, micro=1).float(), None, 0, 500)
    p, moments = store.read([501, 500])
    assert torch.equal(p[1], store.noise(500))
    store.step([501, 500], p, torch.ones(2, 16), moments, 0.1)
    again = store.read([500, 501, 502])
    store.close()
    assert store.path.stat().st_size == 2 * store.bytes and again[1][2].flatten().tolist() == [1, 1, 0]
    assert close(again[0][:2], p.flip(0) - 0.1, 1e-5)                                              # Adam's first step, in whichever order


def test_a_row_is_kept_to_the_last_bit(a_store):
    store, numbers = a_store(), torch.randn(1, 16) * 10.0 ** torch.arange(-8, 8)
    p, moments = store.read([3])
    store.step([3], numbers, torch.zeros(1, 16), moments, 0.1)
    assert torch.equal(a_store().read([3])[0], numbers) and store.bytes == 4 * (3 * 16 + 1)        # gradient 0, no moments: it stays
    for _ in range(2):
        p, moments = store.read([3])
        store.step([3], p, torch.randn(1, 16), moments, 0.1)
    again = a_store().read([3])
    assert torch.equal(again[0], store.read([3])[0]) and float(again[1][2]) == 3


# ------------------------------------------------------------------------------------------------------------ who comes when

@pytest.mark.parametrize("n, B", [(7, 3), (8, 4), (1, 1), (5, 5), (2, 4), (40, 4), (9, 2)])
def test_every_scene_comes_once_an_epoch_in_its_own_slot(n, B):
    scenes = [100 + 3 * k for k in range(n)]
    epoch = math.ceil(n / B)
    steps = [schedule(scenes, B, s, 5, 1) for s in range(4 * epoch)]
    assert all(len(slots) == B for slots in steps)
    for e in range(4):
        assert sorted(i for slots in steps[e * epoch:(e + 1) * epoch] for i in slots if i is not None) == scenes
    assert all(i is None or scenes.index(i) % B == slot for slots in steps for slot, i in enumerate(slots))
    assert steps == [schedule(scenes, B, s, 5, 1) for s in range(4 * epoch)]
    if epoch > 3:
        orders = [steps[e * epoch:(e + 1) * epoch] for e in range(4)]
        assert all(a != b for a, b in itertools.combinations(orders, 2))                           # by epoch, seed, phase
        assert steps[:epoch] != [schedule(scenes, B, s, 6, 1) for s in range(epoch)] != [schedule(scenes, B, s, 5, 2) for s in range(epoch)]


def test_generator_depends_on_its_numbers():
    draw = lambda *numbers: torch.rand(3, generator=ls.generator(*numbers)).tolist()
    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert len({tuple(draw(*numbers)) for numbers in itertools.product((1, 2), (3, 4), range(5))}) == 20


# ---------------------------------------------------------------------------------------------------- the album, and the box

def test_album_keeps_bytes_and_asks_once(tmp_path, monkeypatch):
    family = common.load_family("cars", ".", SIZE)
    album, (train, test) = Album(family, tmp_path / "p"), family.read(1)
    truth = torch.cat([test.images, train.images])
    scene, every = album.scene(1), album.pictures(1, slice(None))
    V = len(truth)
    assert every.shape == (V, 3, SIZE, SIZE) and every.dtype == torch.float32 and scene["test"] == len(test.names) == 10 < V
    assert close((every.permute(0, 2, 3, 1) + 1) / 2, truth, 0.5 / 255 + 1e-6)
    assert torch.equal(scene["c2w"], torch.cat([test.c2w, train.c2w]))
    assert torch.equal(scene["K"], torch.cat([test.K, train.K]))
    assert torch.equal(album.pictures(1, [12, 3]), every[[12, 3]]) and torch.equal(album.pictures(1, np.array([0])), every[:1])
    kept = np.load(scene["file"])
    assert kept.dtype == np.uint8 and scene["file"].stat().st_size <= V * SIZE * SIZE * 3 + 256
    assert sum(f.stat().st_size for f in (tmp_path / "p").iterdir()) < V * (SIZE * SIZE * 3 + 100) + 2000
    monkeypatch.setattr(common.Family, "read", lambda *words: pytest.fail("asked again"))
    again = Album(family, tmp_path / "p")
    assert torch.equal(again.pictures(1, slice(None)), every) and torch.equal(again.scene(1)["c2w"], scene["c2w"])


def test_box_holds_all_that_is_hit_and_is_smaller_than_the_cube(tmp_path):
    family = common.load_family("cars", ".", 32)
    scenes = [0, 1, 2]
    album = Album(family, tmp_path / "p")
    box = ls.measure_box(album, scenes)
    assert torch.equal(box, ls.measure_box(album, scenes[::-1]))                                   # of all of them
    points = []
    for views in (views for i in scenes for views in family.read(i)):
        for v in range(len(views.names)):
            o, d = common.view_rays(views, v, False)
            t = views.depth[v].flatten()
            points.append((o + t[:, None] * d)[t > 0])
    points = torch.cat(points)
    assert len(points) > 5000 and (points >= box[0]).all() and (points <= box[1]).all()
    sides, needed = box[1] - box[0], points.amax(0) - points.amin(0)
    assert (box[0] >= family.aabb[0]).all() and (box[1] <= family.aabb[1]).all()
    assert sides.prod() < 0.4 and (sides < needed + 0.28).all()                                    # pixels of 0.04, a cell of 0.02


def test_no_silhouettes_no_box(tmp_path, monkeypatch):
    album = Album(common.load_family("cars", ".", SIZE), tmp_path / "p")
    monkeypatch.setattr(Album, "pictures", lambda self, i, views: torch.ones(len(views), 3, SIZE, SIZE))
    with pytest.raises(UserError, match="cars.*--box whole"):
        ls.measure_box(album, [0])
    monkeypatch.setattr(Album, "pictures", lambda self, i, views: torch.zeros(len(views), 3, SIZE, SIZE))
    assert close(ls.measure_box(album, [0]), album.family.aabb, 0)                                 # everything is solid


# --------------------------------------------------------------------------------------------------------- the freezing table

ALL = ("autoencoder", "shared", "mlp")
WEIGHTS = dict(tv=0.5, lambda_latent=0.25, lambda_ae=0.125)
JOINT = {"latent": 0.25, "rgb": 1, "autoencoder": 0.125, "tv": 0.5}
FIRST = [("0", "old", "encoder decoder", {"autoencoder": 1}, "", None, None),
         ("A", "old", "planes shared mlp", {"latent": 1, "tv": 0.5}, "old", "0", ("autoencoder",))]
B = ("B", "old", "planes shared mlp encoder decoder", JOINT, "old", "A", ALL)
C = ("C", "new", "planes", {"latent": 1}, "new", "B", ALL)
D = ("D", "new", "planes decoder", {"rgb": 1}, "new", "C", ALL)
TABLE = {
    "3d": [*FIRST, B, C, D],
    "plain": [*FIRST, (*C[:5], "A", ALL), D],
    "finetune none": [*FIRST, B, C, ("D", "new", "planes", *D[3:])],
    "shared trained": [*FIRST, B, ("C", "new", "planes shared mlp", *C[3:]), ("D", "new", "planes shared mlp decoder", *D[3:])],
    "shared random": [*FIRST, B, ("C", "new", "planes shared mlp", *C[3:6], ("autoencoder",)),
                      ("D", "new", "planes shared mlp decoder", *D[3:])],
    "rgb": [("rgb", "new", "planes mlp", {"rgb": 1, "tv": 0.5}, "rgb", None, None)],
}
FLAGS = {"3d": {}, "plain": dict(autoencoder="plain", compare=("plain",)), "finetune none": dict(finetune="none"),
         "shared trained": dict(new_shared="trained"), "shared random": dict(new_shared="random"),
         "rgb": dict(representation="rgb", compare=("rgb", "micro"))}


@pytest.mark.parametrize("name", TABLE)
def test_plan_is_the_paper_s_table(name):
    phases = plan(args(**WEIGHTS, **FLAGS[name]))
    found = [(p.name, p.scenes, p.train, p.losses, p.store, p.after) for p in phases]
    assert found == [(n, s, frozenset(train.split()), losses, store, after) for n, s, train, losses, store, after, _ in TABLE[name]]
    assert all(p.keep == keep for p, (*_, keep) in zip(phases, TABLE[name]) if keep)
    assert all(p.planes == "both" and p.kind == ("rgb" if p.name == "rgb" else "latent") for p in phases)
    rows = [p.row for p in phases if p.row]
    assert [p.row is not None for p in phases] == [p.scenes == "new" for p in phases] and len(set(rows)) == len(rows)
    assert all(p.encode == (args().encode if p.name == "B" else 1) for p in plan(args(encode=0.5, **FLAGS[name])) if p.name != "B")
    assert ls.main_phase(phases) == phases[-1]


def test_plan_gives_rivals_stages_of_their_own():
    given = args(compare=("rgb", "plain", "micro", "both", "macro"), encode=0.25)
    phases = plan(given)
    assert phases[:5] == plan(args(encode=0.25)) and phases[2].encode == 0.25 and ls.main_phase(phases).name == "D"
    names = [p.name for p in phases]
    assert len(set(names)) == len(names) and names[5] == "plain-C" and phases[5].after == "A" and phases[5].store == "plain-new"
    for planes in ("micro", "both", "macro"):
        a, c, d = (phases[names.index(f"{planes}-{x}")] for x in "ACD")
        assert (a.after, c.after, d.after) == ("B", a.name, c.name) and a.planes == c.planes == d.planes == planes
        assert a.train == {"planes", "shared", "mlp"} and c.train == {"planes"} and d.train == {"planes", "decoder"}
        assert a.keep == ("autoencoder",) and a.store == f"{planes}-old" and c.store == d.store == f"{planes}-new"
        assert (a.scenes, c.scenes, d.scenes) == ("old", "new", "new")
    rgb = phases[-1]
    assert (rgb.name, rgb.scenes, rgb.kind, rgb.after) == ("rgb", "few", "rgb", None) and rgb.train == {"planes", "mlp"}
    assert len({p.row for p in phases if p.row}) == sum(p.row is not None for p in phases)         # a row each
    assert [p.name for p in ls.chain(phases, "macro-D")] == ["0", "A", "B", "macro-A", "macro-C", "macro-D"]
    assert [p.name for p in plan(args(planes="micro"))] == list("0ABCD") and {p.planes for p in plan(args(planes="micro"))} == {"micro"}


def test_scenes_are_disjoint():
    family = common.load_family("cars", ".", SIZE)
    found = ls.choose_scenes(args(first=3, scenes=4, new_scenes=3, rgb_scenes=2), family)
    assert found == {"old": [3, 4, 5, 6], "new": [7, 8, 9], "few": [7, 8]}


# ------------------------------------------------------------------------------------------------- a run, looked at from inside

def part(name):
    words = name.split(".")
    return words[1] if words[0] == "autoencoder" else words[0]


@pytest.fixture(scope="module")
def spied(tmp_path_factory):
    """A run with all rivals, two steps a phase, and what went through each phase."""
    out, seen, now = tmp_path_factory.mktemp("spied") / "run", {}, []
    run_phase, losses_of, check_finite, step, adam = ls.run_phase, ls.losses_of, ls.check_finite, Store.step, torch.optim.Adam.step
    state = lambda model: {k: v.clone() for k, v in model.state_dict().items()}
    rows = lambda store, ids: store.read(ids)[0].clone() if store else None

    def spy(setup, number, phase, model, store, *rest):
        mine = seen[phase.name] = SimpleNamespace(phase=phase, scenes=setup.scenes[phase.scenes], before=state(model), losses=[], totals=[],
                                                  rates=[], groups=[], names={id(p): part(n) for n, p in model.named_parameters()})
        mine.rows = rows(store, mine.scenes)
        now[:] = [mine]
        result = run_phase(setup, number, phase, model, store, *rest)
        mine.after, mine.rows_after, mine.P = state(model), rows(store, mine.scenes), store and store.P
        return result

    def spy_losses(model, phase, *rest):
        now[0].losses.append(losses_of(model, phase, *rest))
        return now[0].losses[-1]

    def spy_adam(optimiser, *rest):
        now[0].groups.append({now[0].names[id(g["params"][0])]: (g["lr"], g["betas"]) for g in optimiser.param_groups if g["params"]})
        return adam(optimiser, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ls, "run_phase", spy)
        patch.setattr(ls, "losses_of", spy_losses)
        patch.setattr(ls, "check_finite", lambda total, s: now[0].totals.append(float(total)) or check_finite(total, s))
        patch.setattr(Store, "step", lambda self, ids, p, d_p, moments, lr: now[0].rates.append(lr) or step(self, ids, p, d_p, moments, lr))
        patch.setattr(torch.optim.Adam, "step", spy_adam)
        given = args(out=str(out), compare=("rgb", "plain", "micro", "both", "macro"), box="measured", first=1)
        summary = ls.train(given)
    return SimpleNamespace(out=out, seen=seen, args=given, summary=summary)


def test_a_phase_moves_what_the_table_says_and_nothing_else(spied):
    assert list(spied.seen) == [p.name for p in plan(spied.args)]
    for name, s in spied.seen.items():
        moved = {part(k) for k in s.before if not torch.equal(s.before[k], s.after[k])}
        assert moved == s.phase.train - {"planes"} - ({"shared"} if "shared" not in s.before else set()), name
        if s.rows is None:
            assert "planes" not in s.phase.train
        else:
            assert "planes" in s.phase.train and (s.rows != s.rows_after).any(1).all(), name      # of every scene
        kept = phase_file(spied.out, name)["model"]
        assert all(torch.equal(kept[k], s.after[k]) for k in kept if name != "0" or k not in ("autoencoder.s", "autoencoder.bg")), name
    kept, start, end = phase_file(spied.out, "0")["model"], spied.seen["A"].before, spied.seen["0"].after
    for k in ("autoencoder.s", "autoencoder.bg"):                                                  # measured when 0 ends
        assert torch.equal(kept[k], start[k]) and (kept[k] != end[k]).all()


def test_a_phase_starts_where_the_one_before_ended(spied):
    for name, s in spied.seen.items():
        if s.phase.after is None:
            continue
        kept = phase_file(spied.out, s.phase.after)["model"]
        for k, value in s.before.items():
            if k.split(".")[0] in s.phase.keep:
                assert torch.equal(value, kept[k]), (name, k)
            elif k.startswith(("mlp", "shared")):
                assert k not in kept or not torch.equal(value, kept[k]), (name, k)                 # drawn anew
    ends = {"C": "B", "plain-C": "A", "micro-C": "micro-A", "both-C": "both-A", "macro-C": "macro-A"}
    for c, a in ends.items():
        mean = spied.seen[a].rows_after.mean(0)
        assert close(spied.seen[c].rows, mean.expand_as(spied.seen[c].rows), 1e-6), c
    for c, d in (("C", "D"), ("A", "B"), ("micro-C", "micro-D"), ("macro-C", "macro-D")):
        assert torch.equal(spied.seen[c].rows_after, spied.seen[d].rows)
    store = Store(spied.out / "planes-old.bin", Model(spied.args, "both", False, BOX, torch.ones(3)), None, spied.args.seed)
    assert torch.equal(spied.seen["A"].rows, torch.stack([store.noise(i) for i in spied.seen["A"].scenes]))
    store.close()


def test_the_books(spied):
    """metrics.jsonl: time goes on through the phases; psnr without a name before it is that of the run's own row."""
    books = lines(spied.out / "metrics.jsonl")
    assert [b["phase"] for b in books] == list(spied.seen) and [b["step"] for b in books] == [2 * (k + 1) for k in range(len(books))]
    seconds = [b["train_seconds"] for b in books]
    assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(spied.summary["train_seconds"], abs=0.01)
    assert [b["phase"] for b in books if "psnr" in b] == ["C", "D"] and all(b["visits"] == 2 for b in books)
    for b in books:
        row = spied.summary["rows"].get(spied.seen[b["phase"]].phase.row)
        assert row is None or b["psnr" if b["phase"] in "CD" else f"{b['phase']}/psnr"] == pytest.approx(row["psnr"])


def test_scenes_of_the_stages(spied):
    assert all(s.scenes == {"old": [1, 2], "new": [3, 4], "few": [3]}[s.phase.scenes] for s in spied.seen.values())


def test_the_loss_is_the_weighted_sum(spied):
    for name, s in spied.seen.items():
        assert len(s.totals) == len(s.losses) == 2
        for total, found in zip(s.totals, s.losses):
            assert found.keys() == {k for k, w in s.phase.losses.items() if w}, name
            assert total == pytest.approx(sum(s.phase.losses[k] * v.item() for k, v in found.items()), rel=1e-5)
        assert [line["loss"] for line in lines(spied.out / "metrics.jsonl") if line["phase"] == name] == [pytest.approx(s.totals[-1])]


def test_rates_fall_over_each_phase(spied):
    a = spied.args
    for name, s in spied.seen.items():
        decays = [1.0, a.decay ** 0.5]
        if s.rows is not None:
            assert s.rates == pytest.approx([d * (a.lr_rgb if name == "rgb" else a.lr) for d in decays])
        rate = {"encoder": a.lr_ae, "decoder": a.lr_finetune if s.phase.scenes == "new" else a.lr_ae, "shared": a.lr, "mlp": a.lr_mlp}
        for group, d in zip(s.groups, decays):
            assert group.keys() == s.phase.train - {"planes"} - ({"shared"} if "shared" not in s.before else set())
            assert all(lr == pytest.approx(d * rate[k]) and betas == (0.9, 0.99) for k, (lr, betas) in group.items()), name


@pytest.mark.parametrize("more, noise", [(dict(new_start="random"), True), (dict(new_shared="random"), True), ({}, False)])
def test_new_planes_start_as_noise_where_there_is_no_mean(tmp_path, monkeypatch, more, noise):
    """The mean of stage 1 means nothing to shared planes that are drawn anew."""
    starts, run_phase = {}, ls.run_phase

    def spy(setup, number, phase, model, store, *rest):
        if store:
            starts[phase.name] = [torch.equal(store.read([i])[0][0], store.noise(i)) for i in setup.scenes[phase.scenes]]
        return run_phase(setup, number, phase, model, store, *rest)
    monkeypatch.setattr(ls, "run_phase", spy)
    ls.train(args(out=str(tmp_path / "a"), steps=1, finetune="none", **more))
    assert starts == {"A": [True, True], "B": [False, False], "C": [noise, noise], "D": [False, False]}


# ------------------------------------------------------------------------------------------------------------ summary, files

def test_summary_rows_and_costs(spied):
    summary = json.loads((spied.out / "summary.json").read_text())
    assert without_seconds(summary) == without_seconds(common.to_json(spied.summary))
    assert [summary[k] for k in ("ranks", "scenes", "new_scenes", "seed", "method")] == [1, 2, 2, 0, "latent_scenes"]
    assert summary["steps"] == 2 * len(plan(spied.args))
    ended = {name: phase_file(spied.out, name) for name in spied.seen}
    R, micro, macro, M = 8, 2, 3, 4
    floats = {"micro": 3 * R * R * micro, "both": 3 * R * R * micro + M, "macro": M}
    count = lambda name, *parts: sum(v.numel() for k, v in ended[name]["model"].items() if part(k) in parts)
    phases = [p for p in plan(spied.args) if p.row]
    ways = {"C": [*"0ABC"], "D": [*"0ABCD"], "plain-C": ["0", "A", "plain-C"], "rgb": ["rgb"]}
    for planes in ("micro", "both", "macro"):
        way = [*"0AB", *(f"{planes}-{x}" for x in "ACD")]
        ways |= {f"{planes}-C": way[:-1], f"{planes}-D": way}
    assert list(summary["rows"]) == [p.row for p in phases]
    for p in phases:
        row = summary["rows"][p.row]
        assert all(math.isfinite(row[k]) for k in ("psnr", "ssim")) and row["scenes"] == (1 if p.name == "rgb" else 2)
        own = 3 * R * R * (micro + macro) if p.kind == "rgb" else floats[p.planes]
        assert row["bytes_per_scene"] == 4 * own == 4 * spied.seen[p.name].P, p.name
        decoders = 2 if p.name.endswith("D") else 1                                                # the tuned one beside stage 1's
        assert row["bytes_shared"] == 4 * (count(p.name, "mlp", "shared", "encoder") + decoders * count(p.name, "decoder"))
        way = ways[p.name]
        once = [n for n in way if n.endswith(("0", "A", "B"))]
        assert row["seconds_shared"] == pytest.approx(sum(ended[n]["seconds"] for n in once))
        assert row["seconds_per_scene"] == pytest.approx(sum(ended[n]["seconds"] for n in way if n not in once) / row["scenes"])
        assert ("latent_psnr" in row) == ("autoencoder_psnr" in row) == (p.kind == "latent")
    main = summary["rows"]["3D-aware AE, + decoder"]
    assert (summary["psnr"], summary["ssim"]) == (main["psnr"], main["ssim"])
    assert summary["autoencoder_psnr"] == summary["rows"]["3D-aware AE"]["autoencoder_psnr"]       # with the decoder as stage 1 left it
    assert summary["train_seconds"] == pytest.approx(sum(e["seconds"] for e in ended.values()), abs=0.01)
    networks = 4 * (count("D", "mlp", "encoder") + 2 * count("D", "decoder"))
    assert set(summary["amortised"]) == set(summary["amortised_rgb"]) == {"4", "10", "30", "100", "300", "1000", "3000"}
    for N, cell in summary["amortised"].items():
        assert cell["bytes"] == pytest.approx(ls.bytes_per_scene(int(N), R, micro, M, macro, networks))
        wanted = ls.seconds_per_scene(int(N), 2, main["seconds_shared"], main["seconds_per_scene"])
        assert (cell["seconds"], cell["seconds_overhead"]) == pytest.approx(wanted)
        rgb = summary["rows"]["RGB tri-planes"]
        assert summary["amortised_rgb"][N]["seconds"] == pytest.approx(rgb["seconds_per_scene"])
    assert all(math.isfinite(summary[k]) for k in ("few_scenes_psnr", "old_scenes_psnr", "old_scenes_psnr_new_decoder", "peak_memory_mb"))
    assert summary["old_scenes_psnr"] != summary["old_scenes_psnr_new_decoder"]


def test_pictures(spied):
    zoom = 128 // SIZE
    sheet = iio.imread(spied.out / "sheet.png")
    assert sheet.shape[0] == SIZE * zoom and sheet.shape[1] % (SIZE * zoom) == 0 and sheet.shape[1] // (SIZE * zoom) >= 6
    assert iio.imread(spied.out / "macro.png").shape == (SIZE * zoom, 5 * SIZE * zoom, 3)          # the mean, and each of four weights
    strip = iio.imread(spied.out / "test_003.png")
    assert strip.shape == (SIZE, 4 * SIZE, 3) and [f.name for f in spied.out.glob("test_*.png")] == ["test_003.png"]
    test = common.load_family("cars", ".", SIZE).read(3)[1]
    shown = torch.from_numpy(strip[:, :SIZE].copy()).float() / 255
    assert close(shown, test.images[0], 1.01 / 255)
    assert np.abs(sheet[zoom // 2::zoom, zoom // 2:SIZE * zoom:zoom].astype(int) - strip[:, :SIZE]).max() <= 1
    assert (spied.out / "costs.svg").read_text().startswith("<svg")
    assert not (spied.out / "pictures").exists() and not list(spied.out.glob("*.tmp"))
    assert {f"phase-{name}.pt" for name in spied.seen} <= {f.name for f in spied.out.iterdir()}


def test_eval_only_gives_the_same_scores(spied, tmp_path, monkeypatch):
    shutil.copytree(spied.out, tmp_path / "a")
    monkeypatch.setattr(ls, "run_phase", lambda *words: pytest.fail("trains"))
    again = ls.train(replace(spied.args, out=str(tmp_path / "a"), eval_only=True))
    assert again["psnr"] == pytest.approx(spied.summary["psnr"], abs=1e-4)
    for name, row in again["rows"].items():
        assert all(row[k] == pytest.approx(v, abs=1e-4) for k, v in spied.summary["rows"][name].items()), name
    assert (tmp_path / "a/sheet.png").read_bytes() == (spied.out / "sheet.png").read_bytes()
    (tmp_path / "a/phase-D.pt").unlink()
    with pytest.raises(UserError, match="phase D is not finished"):
        ls.train(replace(spied.args, out=str(tmp_path / "a"), eval_only=True))


def test_scenes_that_no_step_reached_score_the_same_again(tmp_path):
    given = args(out=str(tmp_path / "a"), new_scenes=5, steps=1)
    first = ls.train(given)
    assert ls.train(replace(given, eval_only=True))["psnr"] == pytest.approx(first["psnr"], abs=1e-4)


VARIANTS = {
    "one scene": dict(new_scenes=1, scenes=1, compare=("macro", "rgb"), fusion="sum", micro=3),
    "rgb": dict(representation="rgb", fine=4),
    "macro": dict(factor=8, width=(8, 8, 8), planes="macro", new_shared="trained", views=2, shift=False),
    "micro": dict(planes="micro", autoencoder="plain", finetune="none", fine=4, batch=4),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run(tmp_path, name):
    given = args(out=str(tmp_path / "a"), steps=1, **VARIANTS[name])
    summary = ls.train(given)
    assert math.isfinite(summary["psnr"]) and list(summary["rows"]) == [p.row for p in plan(given) if p.row]
    if given.new_shared == "trained":                                                              # stage 1's scenes keep theirs
        size = lambda *parts: sum(4 * v.numel() for k, v in phase_file(tmp_path / "a", "D")["model"].items() if part(k) in parts)
        c, d = (row["bytes_shared"] for row in summary["rows"].values())
        assert c == size("encoder", "decoder") + 2 * size("mlp", "shared") == d - size("decoder")
    if "macro" in given.compare:
        tiles = np.split(iio.imread(tmp_path / "a/macro.png"), 5, 1)                               # of one scene there is no spread
        assert all(tile.max() > 20 for tile in tiles)
        assert summary["rows"]["RGB tri-planes"]["bytes_per_scene"] == 4 * 3 * 64 * 3             # sum: as many features as either has


def test_evaluate_is_the_mean_of_means(tmp_path, monkeypatch):
    given = args()
    setup, model = setup_of(tmp_path, given, [0], [1, 2, 3]), Model(given, "both", False, BOX, torch.ones(3))
    errors = {}

    def render_views(model, row, c2w, K, family, decoder):
        i = next(i for i in (1, 2, 3) if torch.equal(setup.album.scene(i)["c2w"][:10], c2w))
        errors[i] = 0.1 * torch.linspace(i, i + 1, 10)                                             # of each test view
        truth = (setup.album.pictures(i, slice(0, 10)).permute(0, 2, 3, 1) + 1) / 2
        return {"rgb": truth + errors[i].view(-1, 1, 1, 1), "y": torch.zeros(10, 3, 4, 4)}
    monkeypatch.setattr(ls, "render_views", render_views)
    store = Store(tmp_path / "rows", model, None, 0)
    scores = ls.evaluate(model, store, setup.album, [1, 2, 3], "cpu")
    store.close()
    assert scores["psnr"] == pytest.approx(float(np.mean([(-20 * torch.log10(e)).mean() for e in errors.values()])), abs=1e-3)
    assert scores.keys() == {"psnr", "ssim", "latent_psnr", "autoencoder_psnr"} and set(errors) == {1, 2, 3}


def test_render_views_is_render_view_by_view(tmp_path):
    family = common.load_family("cars", ".", SIZE)
    for rgb in (False, True):
        model = Model(args(), "both", rgb, family.aabb, torch.ones(3))
        row, (c2w, K) = torch.randn(1, math.prod(model.own) + model.bases), views_of(11)           # more than fit at once
        out = ls.render_views(model, row, c2w, K, family)
        side = SIZE if rgb else SIZE // 4
        assert out["rgb"].shape == (11, SIZE, SIZE, 3) and out["y"].shape == (11, 3, side, side) and out["depth"].shape == (11, side, side)
        for v in (0, 8, 10):
            o, d = ls.rays_through(ls.latent_pixels(SIZE, model.factor)[None], c2w[v:v + 1], K[v:v + 1])
            y = ls.render(model, model.fuse(row), o, d, family.near, family.far)["y"].detach().view(side, side, 3)
            assert close(out["y"][v].permute(1, 2, 0), y, 1e-4)
            picture = y if rgb else model.decode(y.permute(2, 0, 1)[None]).detach()[0].permute(1, 2, 0)
            assert close(out["rgb"][v], (picture.clamp(-1, 1) + 1) / 2, 1e-4)


# ---------------------------------------------------------------------------------------------------- batches, and their parts

def test_batches_are_of_training_views_and_use_them_all(tmp_path):
    given = args(batch=2, views=2, shift=False)
    setup, model = setup_of(tmp_path, given, [0, 1], [2]), Model(given, "both", False, BOX, torch.ones(3))
    used = {0: set(), 1: set()}
    for step in range(100):
        b = ls.draw_batch(setup, 2, phase_of(given, "A"), step, model)
        assert sorted(b.scenes) == [0, 1] and b.x.shape == (4, 3, SIZE, SIZE) and b.pixels is None and not b.shift.any()
        for k, i in enumerate(i for i in b.scenes for _ in range(2)):
            c = setup.album.scene(i)
            v = next(v for v in range(len(c["c2w"])) if torch.equal(c["c2w"][v], b.c2w[k]))
            used[i].add(v)
            assert torch.equal(setup.album.pictures(i, [v])[0], b.x[k]) and torch.equal(c["K"][v], b.K[k])
    for i, views in used.items():
        assert views == set(range(10, len(setup.album.scene(i)["c2w"])))


def test_pictures_move_by_up_to_half_a_latent_pixel(tmp_path):
    given = args(batch=2)
    setup, model = setup_of(tmp_path, given, [0, 1], [2]), Model(given, "both", False, BOX, torch.ones(3))
    shifts = torch.cat([ls.draw_batch(setup, 2, phase_of(given, "A"), step, model).shift for step in range(60)])
    assert {tuple(s) for s in shifts.tolist()} == set(itertools.product(range(-2, 3), repeat=2))
    assert shifts.float().mean(0).abs().max() < 0.5


@pytest.mark.parametrize("batch, encode, expected", [(4, 1.0, 4), (4, 0.5, 2), (4, 0.25, 1), (2, 0.5, 1)])
def test_encode_is_the_share_of_slots_that_are_encoded(tmp_path, batch, encode, expected):
    given = args(batch=batch, views=2, encode=encode)
    setup, model = setup_of(tmp_path, given, list(range(batch)), [9]), Model(given, "both", False, BOX, torch.ones(3))
    came = []
    for step in range(4):
        b = ls.draw_batch(setup, 2, phase_of(given, "B"), step, model)
        assert len(b.encoded) == 2 * expected and b.share_encoded == 1 and b.encoded[1::2] == [k + 1 for k in b.encoded[::2]]
        came += [b.scenes[k // 2] for k in b.encoded]
    assert {came.count(i) for i in range(batch)} == {2 * expected * 4 // batch}                    # in turns
    whole = ls.draw_batch(setup, 1, phase_of(given, "A"), 0, model)
    assert whole.encoded == list(range(2 * batch))                                                 # other phases encode all


@pytest.mark.parametrize("world", [2, 4])
def test_parts_of_a_step_add_up_to_the_whole(tmp_path, monkeypatch, world):
    """With scenes that do not fill the slots, and half of them encoded."""
    given = args(batch=4, views=2, encode=0.5, compare=("rgb",), rgb_scenes=5, tv=0.1)
    setup = setup_of(tmp_path, given, [0, 1, 2, 3, 4], [5, 2, 3, 4, 1])
    for number, name in ((2, "B"), (5, "rgb")):
        phase = phase_of(given, name)
        model = Model(given, "both", phase.kind == "rgb", setup.box, torch.ones(3))
        own = {i: torch.randn(math.prod(model.own) + model.bases) for i in range(6)}

        def losses(rank, of, step):
            monkeypatch.setattr(ls, "ranks", lambda: (rank, of))
            b = ls.draw_batch(setup, number, phase, step, model)
            if b is None:
                return None, {}, {}
            rows = torch.stack([own[i] for i in b.scenes]).requires_grad_()
            found = ls.losses_of(model, phase, model.fuse(rows), b, setup.album.family)
            model.zero_grad()
            sum(phase.losses[k] * v for k, v in found.items()).backward()
            grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
            return b, {k: v.item() for k, v in found.items()}, {**grads, **dict(zip(b.scenes, rows.grad))}

        rested = 0
        for step in range(3):
            whole, parts = losses(0, 1, step), [losses(rank, world, step) for rank in range(world)]
            b = whole[0]
            rested += any(p[0] is None for p in parts)
            assert sorted(i for p in parts if p[0] for i in p[0].scenes) == sorted(b.scenes)
            assert sum(p[0].share for p in parts if p[0]) == pytest.approx(1) == b.share
            encoded = sum(p[0].share_encoded for p in parts if p[0])
            assert encoded == pytest.approx(b.share_encoded) == (1 if b.encoded else 0)
            for p in (p[0] for p in parts if p[0]):
                for k, i in enumerate(p.scenes):
                    mine, its = slice(2 * k, 2 * k + 2), slice(2 * b.scenes.index(i), 2 * b.scenes.index(i) + 2)
                    for key in ("x", "c2w", "K", "shift", "jitter") + (("pixels",) if model.rgb else ()):
                        assert torch.equal(getattr(p, key)[mine], getattr(b, key)[its]), key
                    assert [n in p.encoded for n in range(mine.start, mine.stop)] == [n in b.encoded for n in range(its.start, its.stop)]
            for what in (1, 2):
                for key, value in whole[what].items():
                    total = sum(p[what].get(key, 0) for p in parts)
                    assert close(torch.as_tensor(total), torch.as_tensor(value), 1e-5, 1e-4), (name, step, key)
        assert rested or world == 2


def test_batches_do_not_depend_on_the_number_of_ranks(tmp_path, monkeypatch):
    """run_phase fits the batch to the scenes: fewer of them than slots, and no multiple of the ranks."""
    given, plans = args(batch=4, steps=None, visits_a=6), []
    monkeypatch.setattr(ls, "checkpoint", lambda *words: None)
    monkeypatch.setattr(ls, "sum_over_ranks", lambda values: None)
    for world in (1, 2):
        setup = setup_of(tmp_path, given, [0, 1, 2], [3])
        monkeypatch.setattr(ls, "ranks", lambda: (0, world))
        asked, draw_batch = [], ls.draw_batch

        def spy(setup, number, phase, step, model):
            asked.append(schedule(setup.scenes[phase.scenes], setup.args.batch, step, setup.args.seed, number))
            return draw_batch(setup, number, phase, step, model)
        model = Model(given, "both", False, BOX, torch.ones(3))
        store = Store(tmp_path / f"rows-{world}", model, None, 0)
        with monkeypatch.context() as patch:
            patch.setattr(ls, "draw_batch", spy)
            ls.run_phase(setup, 1, phase_of(given, "A"), model, store, None, 0)
        store.close()
        plans.append([sorted(i for i in slots if i is not None) for slots in asked])
    assert plans[0] == plans[1]


@pytest.mark.parametrize("scenes, batch", [(2, 2), (5, 4), (3, 2)])
def test_every_scene_gets_the_visits_that_were_asked_for(tmp_path, monkeypatch, scenes, batch):
    given, came = args(batch=batch, steps=None, visits_a=6), []
    setup, losses_of = setup_of(tmp_path, given, list(range(scenes)), [9]), ls.losses_of
    monkeypatch.setattr(ls, "losses_of", lambda *words: came.extend(words[3].scenes) or losses_of(*words))
    monkeypatch.setattr(ls, "checkpoint", lambda *words: None)
    model = Model(given, "both", False, BOX, torch.ones(3))
    store = Store(tmp_path / "rows", model, None, 0)
    ls.run_phase(setup, 1, phase_of(given, "A"), model, store, None, 0)
    store.close()
    assert {came.count(i) for i in range(scenes)} == {6}


def test_a_batch_that_ranks_cannot_share_is_refused(monkeypatch):
    ls.check(args(batch=3))
    monkeypatch.setattr(ls, "ranks", lambda: (0, 2))
    ls.check(args(batch=4))
    with pytest.raises(UserError, match="--batch 3.*2 ranks"):
        ls.check(args(batch=3))


def test_two_real_ranks_are_one(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    try:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
    except OSError as error:
        pytest.skip(f"no sockets here: {error}")
    more = dict(scenes=3, new_scenes=3, rgb_scenes=2, steps=6, eval_every=1, compare=("rgb",), encode=0.5, views=2, save_every=4)
    ls.train(args(out=str(tmp_path / "one"), **more))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port", str(port)]
    words = words_of(args(out=str(tmp_path / "two"), **more))
    done = subprocess.run([*torchrun, str(ROOT / "latent_scenes.py"), *words], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert len(one) == len(two) >= 12
    for a, b in zip(one, two):
        assert (a["step"], a["phase"], a["visits"]) == (b["step"], b["phase"], b["visits"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4) and b.get("psnr", 0) == pytest.approx(a.get("psnr", 0), abs=0.01)
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == (1, 2) and two["psnr"] == pytest.approx(one["psnr"], abs=0.01)
    for name, row in one["rows"].items():
        other = two["rows"][name]
        assert other["psnr"] == pytest.approx(row["psnr"], abs=0.01) and other["bytes_per_scene"] == row["bytes_per_scene"]


# -------------------------------------------------------------------------------------------------------- killed and resumed

def cut(patch, name, step=None):
    """Ends phase `name` with Ctrl-C, after step number `step` has written its rows, or in its evaluation. -> the phases that were run."""
    run_phase, real_step, evaluate, began, count = ls.run_phase, Store.step, ls.evaluate, [], []

    def spy(setup, number, phase, *rest):
        began.append(phase.name)
        return run_phase(setup, number, phase, *rest)

    def step_and_die(self, *words):
        real_step(self, *words)
        count.append(began[-1])
        if count.count(name) == step:
            raise KeyboardInterrupt

    def evaluate_or_die(*words):
        if step is None and began[-1] == name:
            raise KeyboardInterrupt
        return evaluate(*words)
    patch.setattr(ls, "run_phase", spy)
    patch.setattr(Store, "step", step_and_die)
    patch.setattr(ls, "evaluate", evaluate_or_die)
    return began


def test_cut_in_four_phases_and_resumed_ends_bit_equal(tmp_path):
    more = dict(scenes=3, steps=6, save_every=2, eval_every=0, new_shared="trained")
    ls.train(args(out=str(tmp_path / "a"), **more))
    given = args(out=str(tmp_path / "b"), **more)
    for name, step, began in (("A", 3, "0A"), ("B", 1, "AB"), ("C", None, "BC"), ("D", 5, "CD")):  # in C after all steps
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            ran = cut(patch, name, step)
            ls.train(replace(given, resume=(tmp_path / "b").exists()))
        assert ran == list(began)                                                                  # finished ones are not repeated
    with pytest.MonkeyPatch.context() as patch:
        ran = cut(patch, "none", -1)
        ls.train(replace(given, resume=True))
    assert ran == ["D"]
    for name in "0ABCD":
        a, b = (without_seconds(phase_file(tmp_path / run, name)) for run in "ab")
        assert same(a, b) and a["steps"] == 6, name
    for name in ("old", "new"):
        assert (tmp_path / f"a/planes-{name}.bin").read_bytes() == (tmp_path / f"b/planes-{name}.bin").read_bytes()
    a, b = (json.loads((tmp_path / run / "summary.json").read_text()) for run in "ab")
    assert without_seconds(a) == without_seconds(b) and b["train_seconds"] > 0
    a, b = (lines(tmp_path / run / "metrics.jsonl") for run in "ab")
    assert without_seconds(a) == without_seconds(b) and [line["step"] for line in b] == sorted({line["step"] for line in b})
    assert (tmp_path / "a/sheet.png").read_bytes() == (tmp_path / "b/sheet.png").read_bytes()


def test_a_resumed_run_writes_no_line_twice(tmp_path):
    more = dict(scenes=2, steps=6, save_every=4, eval_every=1, autoencoder="plain")
    ls.train(args(out=str(tmp_path / "a"), **more))
    given = args(out=str(tmp_path / "b"), **more)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        cut(patch, "C", 6)                                                                         # lines 5 and later are written again
        ls.train(given)
    assert len([line for line in lines(tmp_path / "b/metrics.jsonl") if line["phase"] == "C"]) == 5
    ls.train(replace(given, resume=True))
    a, b = (without_seconds(lines(tmp_path / run / "metrics.jsonl")) for run in "ab")
    assert a == b and len(a) == 2 + 6 + 6
    finished = (tmp_path / "b/summary.json").read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ls, "run_phase", lambda *words: pytest.fail("trains again"))
        ls.train(replace(given, resume=True))                                                      # nothing is left to do
    assert without_seconds(json.loads((tmp_path / "b/summary.json").read_text())) == without_seconds(json.loads(finished))
    assert without_seconds(lines(tmp_path / "b/metrics.jsonl")) == b


def test_a_loss_that_is_not_finite_is_named_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    count, losses_of = [], ls.losses_of

    def spoil(*words):
        count.append(1)
        return {k: v * (math.nan if len(count) == 3 + 4 else 1) for k, v in losses_of(*words).items()}
    monkeypatch.setattr(ls, "losses_of", spoil)
    given = args(out=str(tmp_path / "a"), steps=4, save_every=2, autoencoder="plain")
    with pytest.raises(UserError, match="step 2"):
        ls.train(given)
    state = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    assert (state["phase"], state["step"]) == ("A", 2)
    assert math.isfinite(ls.train(replace(given, resume=True))["psnr"])


# ----------------------------------------------------------------------------------------------------------------- learning

def test_it_learns(tmp_path, monkeypatch):
    totals, now, run_phase = {}, [], ls.run_phase

    def spy(setup, number, phase, *rest):
        now[:] = [phase.name]
        return run_phase(setup, number, phase, *rest)
    monkeypatch.setattr(ls, "run_phase", spy)
    monkeypatch.setattr(ls, "check_finite", lambda total, step: totals.setdefault(now[0], []).append(float(total)))
    more = dict(scenes=4, new_scenes=2, batch=4, steps=None, latent_channels=4, width=(16, 24), resolution=16, micro=4, macro=4, hidden=16,
                box="measured", lr_ae=4e-3, lr_finetune=2e-3, visits_0=400, visits_a=60, visits_b=200, visits_c=60, visits_d=150,
                encode=0.5)
    summary = ls.train(args(out=str(tmp_path / "a"), **more))
    for name, losses in totals.items():
        if name != "C":                                                                            # which starts at the mean, a good guess
            assert np.mean(losses[-10:]) < {"0": 0.5}.get(name, 0.9) * np.mean(losses[:10]), (name, losses[:10], losses[-10:])
    monkeypatch.undo()
    empty = ls.train(args(out=str(tmp_path / "b"), **{**more, "steps": 1}))
    white = []
    for i in (4, 5):
        test = common.load_family("cars", ".", SIZE).read(i)[1]
        white += [float(common.psnr(picture, torch.ones(3))) for picture in test.images]
    rows = summary["rows"]
    assert rows["3D-aware AE, + decoder"]["psnr"] > max(np.mean(white) + 3, empty["psnr"] + 4), (summary, np.mean(white), empty["psnr"])
    assert rows["3D-aware AE, + decoder"]["psnr"] > rows["3D-aware AE"]["psnr"] > np.mean(white)
    assert summary["autoencoder_psnr"] > rows["3D-aware AE"]["psnr"] - 0.3                         # the ceiling


# ------------------------------------------------------------------------------------------------------------- command line

command = partial(conftest.command, ls)

WRONG = {
    "--size 18": "--size 18", "--size 0": "--size", "--size 8": "--size", "--factor 3": "--factor", "--factor 16": "--factor",
    "--factor 8 --size 20": "--factor", "--width 8": "--width", "--width 8 0": "--width", "--factor 8 --width 8 8": "--width",
    "--fusion sum": "--fusion", "--encode 0": "--encode", "--encode 1.5": "--encode", "--encode nan": "--encode",
    "--encode 0.3": "--encode", "--steps 0": "--steps", "--steps many": "many", "--scenes 0": "--scenes",
    "--new-scenes 0": "--new-scenes", "--scenes 200000": "--scenes", "--first 99999": "--first", "--first -1": "--first",
    "--batch 0": "--batch", "--views 0": "--views", "--bases 0": "--bases", "--micro 0": "--micro", "--macro -1": "--macro",
    "--resolution 0": "--resolution", "--samples 0": "--samples", "--fine -1": "--fine", "--hidden 0": "--hidden", "--lr nan": "--lr",
    "--lr-ae 0": "--lr-ae", "--lr-mlp inf": "--lr-mlp", "--lr-rgb -1": "--lr-rgb", "--lambda-latent -1": "--lambda-latent",
    "--lambda-ae nan": "--lambda-ae", "--tv -1": "--tv", "--save-every 0": "--save-every", "--eval-every -1": "--eval-every",
    "--visits-c 0": "--visits-c", "--visits-0 -5": "--visits-0", "--rgb-scenes 0": "--rgb-scenes", "--rgb-rays 0": "--rgb-rays",
    "--latent-channels 0": "--latent-channels", "--seed -1": "--seed", "--device nonsense": "--device", "--compare nerf": "nerf",
    "--planes none": "none", "--autoencoder 4d": "4d", "--representation hsv": "hsv", "--new-shared some": "some",
    "--scene nothing": "nothing", "--eval-only": "--out", "--resume": "--out", "--bogus 3": "--bogus", "--preset huge": "--preset",
    "--batch 2 --encode 0.25": "--encode", "--lr-finetune 0": "--lr-finetune", "--decay 1.5": "--decay", "--decay nan": "--decay",
    "--new-start zero": "zero",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    given = words.split()
    base = {"--steps": 1, "--size": 16, "--scenes": 1, "--new-scenes": 1, "--micro": 2, "--macro": 3, "--device": "cpu"}
    base = [word for flag, value in base.items() if flag not in given for word in (flag, value)]
    assert_refused(command(monkeypatch, capsys, *base, *given), WRONG[words])
    assert not list(tmp_path.iterdir())


def test_a_run_is_not_harmed_by_another(spied, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a"
    shutil.copytree(spied.out, out)
    before, base = content(out), words_of(replace(spied.args, out=str(out)))
    assert_refused(command(monkeypatch, capsys, *base), "holds a run")
    for name, value in (("seed", 5), ("micro", 3), ("steps", 3), ("compare", "rgb"), ("batch", 4), ("box", "whole"), ("planes", "micro"),
                        ("scenes", 3), ("lr", 0.1), ("width", "8 9"), ("new-shared", "trained")):
        how = ("--resume", "--eval-only")[len(name) % 2]
        assert_refused(command(monkeypatch, capsys, *base, how, f"--{name}", *str(value).split()), f"{name.replace('-', '_')} was")
    assert content(out) == before
    for how in ("--eval-only", "--resume"):
        assert_refused(command(monkeypatch, capsys, *words_of(args(out=str(tmp_path / "new"))), how), "ckpt.pt")
    assert not (tmp_path / "new").exists()
    for name, complaint in (("ckpt.pt", "ckpt.pt"), ("phase-B.pt", "phase-B.pt: "), ("planes-new.bin", "not found")):
        whole = (out / name).read_bytes()
        (out / name).unlink() if name.endswith("bin") else (out / name).write_bytes(whole[:len(whole) // 2])
        for how in ("--resume", "--eval-only"):
            assert_refused(command(monkeypatch, capsys, *base, how), name, complaint)
        (out / name).write_bytes(whole)


def test_compare_with_nothing_and_other_ways_to_say_it(monkeypatch, capsys):
    got = []
    monkeypatch.setattr(ls, "train", got.append)
    for words, compare in ((["--compare"], ()), (["--compare", "rgb", "macro"], ("rgb", "macro")), ([], Args().compare)):
        assert command(monkeypatch, capsys, *words)[0] == 0 and got.pop().compare == compare
    assert command(monkeypatch, capsys, "--preset", "paper", "--compare")[0] == 0 and got[0].size == 128 and got[0].compare == ()


def test_help_names_every_flag(monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, "--help")
    assert status == 0
    for name in asdict(Args()):
        assert name == "preset" or f"--{name.replace('_', '-')}" in out, name


def test_every_flag_passes_through_torchrun(capsys):
    """It reads the script's flags too, and stumbles over one that begins two of its own."""
    from torch.distributed.run import get_args_parser
    parser, bad = get_args_parser(), []
    for name in asdict(Args()):
        try:
            parser.parse_args(["--nproc-per-node=2", "latent_scenes.py", f"--{name.replace('_', '-')}", "x"])
        except SystemExit:
            bad.append(name)
    assert not bad, capsys.readouterr().err[-300:]


def test_a_good_run_says_nothing_on_stderr(tmp_path):
    words = words_of(args(out=str(tmp_path / "a"), steps=1, compare=("macro",)))
    done = subprocess.run([sys.executable, str(ROOT / "latent_scenes.py"), *words], capture_output=True, text=True, timeout=300,
                          cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "") and "3D-aware AE, + decoder" in done.stdout
    assert [f.name for f in tmp_path.iterdir()] == ["a"]


def test_presets_pass_their_own_checks():
    for name, preset in ls.PRESETS.items():
        ls.check(replace(preset, factor=4 if preset.size <= 64 else 8))
        assert preset.preset == name and ls.FREE <= asdict(preset).keys()
    paper = ls.PRESETS["paper"]
    assert (paper.resolution, paper.micro, paper.macro, paper.bases, paper.scenes, paper.latent_channels) == (64, 10, 22, 50, 500, 4)


@pytest.fixture(scope="module")
def a_family(tmp_path_factory):
    """Five cars as files; the second has half a picture, the last no pose of one."""
    folder = tmp_path_factory.mktemp("family") / "mine"
    cars = {f"car_{seed:05d}": common.load_car(seed, SIZE, torch.zeros(3), False) for seed in range(5)}
    conftest.write_srn_family(folder, cars)
    broken = sorted(folder.glob("car_00001/rgb/*.png"))[3]
    broken.write_bytes(broken.read_bytes()[:broken.stat().st_size // 2])
    sorted(folder.glob("car_00004/pose/*.txt"))[0].unlink()
    return folder


def test_broken_scenes_are_named_before_training(a_family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ls, "run_phase", lambda *words: pytest.fail("trains"))
    base = words_of(args(scene=str(a_family), scenes=2, new_scenes=2, out=str(tmp_path / "a")))
    assert_refused(command(monkeypatch, capsys, *base), "car_00001", "truncated", "--skip-bad")
    status, out, complaint = command(monkeypatch, capsys, *base, "--scenes", 4, "--new-scenes", 1, "--skip-bad")
    assert_refused((status, out, complaint.splitlines()[-1]), "no usable scene", "stage 2")        # after those that were left out
    assert_refused(command(monkeypatch, capsys, *base, "--scenes", 4, "--new-scenes", 2), "5 scenes")
    assert not (tmp_path / "a").exists()


def test_broken_scenes_are_left_out(a_family, tmp_path, monkeypatch, capsys):
    words = words_of(args(scene=str(a_family), scenes=3, new_scenes=2, out=str(tmp_path / "a"), skip_bad=True, steps=1, box="measured"))
    status, out, complaint = command(monkeypatch, capsys, *words)
    assert status == 0 and len(complaint.strip().splitlines()) == 2 and all(f"car_0000{i}" in complaint for i in (1, 4)), complaint
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert (summary["scenes"], summary["new_scenes"], summary["scene"], summary["data"]) == (2, 1, "mine", "srn")
    assert (tmp_path / "a/test_003.png").is_file() and "3D-aware AE, + decoder" in out


# ---------------------------------------------------------------------------------------------------------------- real data

def test_real_cars_run(tmp_path):
    data = real("srn_cars/cars_train")
    given = args(scene="srn_cars", data=data, size=32, scenes=2, new_scenes=1, compare=("rgb", "plain", "macro"), box="measured",
                 out=str(tmp_path / "a"))
    summary = ls.train(given)
    assert summary["data"] == "srn" and summary["scene"] == "cars_train" and list(summary["rows"]) == [p.row for p in plan(given) if p.row]
    assert all(math.isfinite(row["psnr"]) for row in summary["rows"].values())
    box = ls.measure_box(Album(common.load_family("srn_cars", data, 32), tmp_path / "p"), [0, 1])
    assert (box[1] - box[0]).prod() < 0.8                               # four views a car leave a wide hull
