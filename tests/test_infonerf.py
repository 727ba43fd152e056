"""infonerf.py against known answers: distributions, entropy and divergence, masks, cameras, intervals, fields, training, the command line.

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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import conftest  # noqa: E402
import infonerf as inf  # noqa: E402
from conftest import assert_refused, close, content, lines, real, write_llff  # noqa: E402
from infonerf import Args, divergence, entropy, opaque, ray_distribution  # noqa: E402

F64 = torch.float64
BY = ("alpha", "weight", "density")
TINY = dict(size=24, views=(2, 5, 11, 17), num_views=None, test_skip=1, rays=96, unseen_rays=64, samples=16, importance=0, precrop_steps=0, precrop_share=0.5,
            background="white", train_background="scene", entropy_weight=0.01, entropy_rays="both", unseen_poses="sphere", normalise="alpha", mask="acc",
            mask_threshold=0.1, entropy_ramp=1, entropy_end=0, entropy_final=1.0, kl_weight=0.0, kl_direction="original", kl_near="rotation", kl_degrees=5.0,
            kl_pixels=1, kl_mask=False, kl_rate=1.0, kl_every=1000, field="hash", levels=3, features=2, log2_table=11, base=4, finest=24, width=16,
            density_noise=0.0, lr=1e-2, lr_final=0.1, lr_warmup=1, eval_views=1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def args(**more):
    return replace(Args(), **{**TINY, **more})


def some_scene(V=100, T=25, kind="blender", H=12, W=16, names="v{:03d}"):
    """V training cameras around the middle of a box that is not the origin, each with its own K; pictures without content. LLFF: all look along -z."""
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(V + T, 2, generator=generator).numpy()
    aabb = torch.tensor([[-1.0, -1.2, -0.8], [2.0, 1.0, 1.4]])
    middle = aabb.mean(0).numpy()
    c2w = torch.tensor(np.stack([common.orbit_pose(6 * a, 0.1 + b, 3 + b, middle) for a, b in u]), dtype=torch.float32)
    if kind == "llff":
        c2w = torch.cat([torch.eye(3).expand(V + T, 3, 3), torch.tensor(np.c_[u, 0 * u[:, :1]])[..., None]], -1).float()
    K = torch.tensor([[18.0, 0, 8], [0, 18.0, 6], [0, 0, 1]]).repeat(V + T, 1, 1)
    K[:, 0, 0] += torch.arange(V + T)
    views = common.Views(torch.zeros(V + T, H, W, 3), c2w, K, None, None, [names.format(v) for v in range(V + T)])
    pick = lambda ids: common.pick_views(views, list(ids))
    train, test = common.hold_out(views, "here") if kind == "dtu" else (pick(range(V)), pick(range(V, V + T)))
    return common.Scene("s", kind, train, test, aabb, 1.0, 6.0, torch.tensor([0.9, 0.5, 0.1]), kind == "llff")


def assert_cameras(c2w):
    """Proper rotations."""
    assert close(c2w[:, :, :3] @ c2w[:, :, :3].mT, torch.eye(3).expand(len(c2w), 3, 3), atol=1e-5, rtol=0)
    assert close(torch.linalg.det(c2w[:, :, :3]), torch.ones(len(c2w)), atol=1e-5, rtol=0)


def distance_to(poses, c2w):
    """(n,): how far each pose is from the most similar one of c2w."""
    return (poses.flatten(1)[:, None] - c2w.flatten(1)).norm(dim=-1).amin(1)


# ------------------------------------------------------------------------------------------------------ p, H, D_KL, M

def distribution(sigmas, deltas, by):
    """p, with the weights that composite gives."""
    R, S = sigmas.shape
    ends = deltas.cumsum(1).flatten()
    weights = inf.composite(sigmas.flatten(), sigmas.flatten()[:, None], ends - deltas.flatten(), ends, torch.arange(R + 1) * S)[3]
    return ray_distribution(sigmas, deltas, weights.view(R, S), by)


def bits(sigmas, deltas, by):
    return entropy(distribution(sigmas, deltas, by), deltas if by == "density" else None)


def sigmas_of(alphas, deltas):
    return -torch.log1p(-alphas) / deltas


@pytest.mark.parametrize("by", BY)
def test_distribution_by_hand(by):
    alphas = torch.tensor([[0.5, 0.0, 0.5, 0.75]], dtype=F64)                                      # T = 1, 1/2, 1/2, 1/4
    deltas = torch.tensor([[1.0, 2.0, 0.5, 0.25]], dtype=F64)
    expected = {"alpha": [2, 0, 2, 3], "weight": [8, 0, 4, 3], "density": [1, 0, 1, 2]}[by]        # tau = ln 2 (1, 0, 1, 2)
    expected = torch.tensor([expected], dtype=F64)
    assert close(distribution(sigmas_of(alphas, deltas), deltas, by), expected / expected.sum(), atol=1e-8, rtol=0)


def test_entropy_by_hand():
    spike = torch.zeros(3, 9, dtype=F64)
    spike[0, 0], spike[1, 4], spike[2, 8] = 1.0, 1.0, 1.0
    assert entropy(spike).abs().max() < 1e-6 and entropy(spike.float()).abs().max() < 1e-6
    for k in (2, 3, 8, 64):
        alphas = torch.zeros(1, 64, dtype=F64)
        alphas[0, torch.randperm(64)[:k]] = 0.3
        assert float(bits(sigmas_of(alphas, 0.1), torch.full((1, 64), 0.1, dtype=F64), "alpha")) == pytest.approx(math.log2(k), abs=1e-6)
    assert float(entropy(torch.tensor([[0.5, 0.25, 0.25]]))) == pytest.approx(1.5, abs=1e-6)
    assert entropy(torch.rand(7, 5)).shape == (7,)


def test_entropy_of_alphas_ignores_their_scale():
    """A thin fog counts as much as a thick one: only where along the ray it sits."""
    alphas, deltas = torch.rand(20, 16, dtype=F64) * 0.9, torch.rand(20, 16, dtype=F64) + 0.1
    thick, thin = sigmas_of(alphas, deltas), sigmas_of(alphas * 0.01, deltas)
    assert close(bits(thick, deltas, "alpha"), bits(thin, deltas, "alpha"), atol=1e-6, rtol=0)
    assert (bits(thick, deltas, "weight") - bits(thin, deltas, "weight")).abs().mean() > 0.1       # an eye sees less far into the thick one
    assert close(bits(thick, deltas, "density"), bits(thick * 0.01, deltas, "density"), atol=1e-6, rtol=0)


def test_differential_entropy_does_not_depend_on_the_sampling():
    def sampled(edges):
        t = 0.5 * (edges[1:] + edges[:-1])
        return 3 * torch.exp(-(t - 3.3) ** 2 / 0.3)[None], edges.diff()[None]
    fine = [sampled(torch.linspace(2, 5, n + 1, dtype=F64)) for n in (64, 128, 256)]
    uneven = sampled(torch.cat([torch.linspace(2, 3, 151, dtype=F64), torch.linspace(3, 5, 101, dtype=F64)[1:]]))
    found = [float(bits(*case, "density")) for case in (*fine, uneven)]
    assert found == pytest.approx([found[0]] * 4, abs=2e-3)
    sd = math.sqrt(0.15)                                                                           # a Gaussian; its tail at t = 2 is nearly nothing
    assert found[0] == pytest.approx(math.log2(sd * math.sqrt(2 * math.pi * math.e) / (3 / 64)), abs=0.03)
    plain = [float(entropy(distribution(*case, "density"))) for case in fine]
    assert plain[1] - plain[0] == pytest.approx(1, abs=0.01) and plain[2] - plain[1] == pytest.approx(1, abs=0.01)


def test_differential_entropy_by_hand():
    for n in (16, 64, 200):                                                                        # equal shares of the whole ray: log2 64
        for length in (0.5, 3.0):
            assert float(entropy(torch.full((1, n), 1 / n, dtype=F64), torch.full((1, n), length / n, dtype=F64))) == pytest.approx(6, abs=1e-6)
    half = torch.tensor([[0.5, 0.5]])
    assert float(entropy(half)) == pytest.approx(1, abs=1e-6) and float(entropy(half, half)) == pytest.approx(6, abs=1e-5)
    p = torch.zeros(1, 128)
    p[0, 77] = 1.0                                                                                 # within 1/128 of the ray: half a unit
    assert float(entropy(p, torch.full((1, 128), 0.02))) == pytest.approx(-1, abs=1e-5)
    quarter = torch.tensor([[0.25, 0.75]]), torch.tensor([[0.5, 1.5]])                             # uneven intervals, even density
    assert float(entropy(*quarter)) == pytest.approx(6, abs=1e-5)


def hard_cases(dtype=torch.float32):
    """Rays with nothing, with intervals of no length, of no length altogether, with huge density, with both."""
    deltas = torch.full((6, 8), 0.2, dtype=dtype)
    sigmas = torch.rand(6, 8, dtype=dtype) * 5
    sigmas[0], sigmas[1, ::2], sigmas[2, 3] = 0, 0, 1e8
    deltas[3, 2:5], deltas[4] = 0, 0
    sigmas[5, 1:], deltas[5, -1] = 1e12, 0
    return sigmas.requires_grad_(), deltas


@pytest.mark.parametrize("by", BY)
def test_gradients_are_finite_where_there_is_nothing_or_too_much(by):
    sigmas, deltas = hard_cases()
    H = bits(sigmas, deltas, by)
    assert H.isfinite().all() and H[0] == 0 and H[4] == 0
    gradient, = torch.autograd.grad(H.sum(), sigmas)
    assert gradient.isfinite().all()
    p = distribution(sigmas, deltas, by)
    assert close(p.sum(1), torch.tensor([0.0, 1, 1, 1, 0, 1]), atol=1e-5, rtol=0)
    for kl in (divergence(p, p.flip(0)), divergence(p.flip(0), p)):
        assert kl.isfinite().all() and torch.autograd.grad(kl.sum(), sigmas, retain_graph=True)[0].isfinite().all()


@pytest.mark.parametrize("by", BY)
def test_a_step_against_the_gradient_moves_mass_to_the_peak(by):
    deltas = torch.full((1, 9), 0.3, dtype=F64)
    sigmas = torch.full((1, 9), 0.2, dtype=F64)
    sigmas[0, 5] = 3.0
    sigmas.requires_grad_()
    H = bits(sigmas, deltas, by)
    gradient, = torch.autograd.grad(H.sum(), sigmas)
    after = (sigmas - 1e-3 * gradient).detach()
    change = (distribution(after, deltas, by) - distribution(sigmas, deltas, by))[0]
    others = torch.arange(9) != 5
    assert change[5] > 1e-5 and (change[others] < 0).all() and (bits(after, deltas, by) < H - 1e-4).all()


def test_weights_ignore_what_is_behind_the_first_surface_and_alphas_do_not():
    deltas = torch.full((1, 12), 0.5, dtype=F64)
    one, two = torch.full((2, 1, 12), 0.01, dtype=F64)
    one[0, 4], two[0, 4], two[0, 8] = 200.0, 200.0, 200.0                                          # a wall; a second one behind it
    assert close(bits(one, deltas, "weight"), bits(two, deltas, "weight"), atol=1e-8, rtol=0)
    assert distribution(two, deltas, "weight")[0, 5:].abs().max() < 1e-12
    for by in ("alpha", "density"):
        assert abs(float(bits(one, deltas, by) - bits(two, deltas, by))) > 0.3
    fog = one.clone()
    fog[0, :4] = 1.0                                                                               # before the wall it counts
    assert float(bits(fog, deltas, "weight")) > float(bits(one, deltas, "weight")) + 0.5


def test_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
    assert float(divergence(p, q)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)         # 0.1438
    assert float(divergence(q, p)) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)       # 0.1308
    p = normalize(torch.rand(30, 8), p=1, dim=1)
    assert torch.equal(divergence(p, p), torch.zeros(30)) and (divergence(p, p.flip(0)) > -1e-6).all()
    spikes = torch.eye(2)
    assert float(divergence(spikes[:1], spikes[1:])) == pytest.approx(-math.log(1e-10), rel=1e-3)                # nats, not infinite


def test_divergence_has_a_gradient_to_both():
    """d/dp = ln p - ln q + 1, d/dq = - p / q."""
    p, q = torch.tensor([[0.5, 0.5]], requires_grad=True), torch.tensor([[0.25, 0.75]], requires_grad=True)
    d_p, d_q = torch.autograd.grad(divergence(p, q).sum(), (p, q))
    assert close(d_p, torch.tensor([[math.log(2) + 1, math.log(2 / 3) + 1]])) and close(d_q, torch.tensor([[-2.0, -2 / 3]]))


@pytest.mark.parametrize("by", BY)
def test_losses_against_finite_differences(by):
    sigmas = (torch.rand(3, 6, dtype=F64) * 4 + 0.1).requires_grad_()
    other = (torch.rand(3, 6, dtype=F64) * 4 + 0.1).requires_grad_()
    deltas = torch.rand(3, 6, dtype=F64) + 0.1
    assert torch.autograd.gradcheck(lambda s: bits(s, deltas, by), sigmas)
    assert torch.autograd.gradcheck(lambda a, b: divergence(distribution(a, deltas, by), distribution(b, deltas, by)), (sigmas, other))


def test_opaque_by_hand():
    deltas = torch.ones(4, 2, dtype=F64)
    alphas = torch.tensor([[0.0505, 0.0505], [0.2, 0.0], [0.0, 0.0], [0.03, 0.05]], dtype=F64)     # sums 0.101, 0.2, 0, 0.08
    sigmas = sigmas_of(alphas, deltas).requires_grad_()
    acc = 1 - torch.exp(-(sigmas * deltas).sum(1))                                                 # 0.0985, 0.2, 0, 0.0785
    masks = {by: opaque(sigmas, deltas, acc, by, 0.1) for by in ("acc", "sum", "none")}
    assert {by: mask.tolist() for by, mask in masks.items()} == {"acc": [0, 1, 0, 0], "sum": [1, 1, 0, 0], "none": [1, 1, 1, 1]}
    assert not any(mask.requires_grad for mask in masks.values())
    assert opaque(sigmas, deltas, acc, "acc", 0.07).tolist() == [1, 1, 0, 1] and opaque(sigmas, deltas, acc, "sum", 0.3).tolist() == [0] * 4
    sigmas = torch.rand(200, 9) ** 4
    deltas = torch.rand(200, 9)
    acc = 1 - torch.exp(-(sigmas * deltas).sum(1))
    by_acc, by_sum = (opaque(sigmas, deltas, acc, by, 0.4) for by in ("acc", "sum"))
    assert (by_acc <= by_sum).all() and 0 < by_acc.sum() < by_sum.sum() < 200


def test_entropy_weight_by_hand():
    weight = lambda t, **more: inf.entropy_weight(args(entropy_weight=0.8, entropy_ramp=4, steps=16, **more), t)
    assert [weight(t) for t in (0, 1, 2, 4, 8, 15)] == pytest.approx([0, 0.2, 0.4, 0.8, 0.8, 0.8])
    assert [weight(t, entropy_final=0.25) for t in (0, 2, 8, 16)] == pytest.approx([0, 0.4 * 0.25 ** 0.125, 0.4, 0.2])
    assert [weight(t, entropy_end=6) for t in (5, 6, 7, 15)] == pytest.approx([0.8, 0, 0, 0])
    assert inf.entropy_weight(args(entropy_weight=0.0, steps=16), 9) == 0


# ---------------------------------------------------------------------------------------------------------------- cameras

def some_rays(n=200):
    return torch.randn(n, 3) * 3, normalize(torch.randn(n, 3), dim=-1)


@pytest.mark.parametrize("degrees", [5.0, 20.0])
def test_near_rays_go_round_the_origin(degrees):
    o, d = some_rays(2000)
    o2, d2 = inf.near_rays(o, d, degrees)
    along = lambda o, d: (o * d).sum(1)
    beside = lambda o, d: (o - along(o, d)[:, None] * d).norm(dim=1)                               # the ray's closest approach to the origin
    assert close(o2.norm(dim=1), o.norm(dim=1)) and close(d2.norm(dim=1), torch.ones(2000))
    assert close(beside(o2, d2), beside(o, d), atol=1e-4, rtol=1e-4) and close(along(o2, d2), along(o, d), atol=1e-4, rtol=1e-4)
    angle = torch.rad2deg((d * d2).sum(1).clamp(-1, 1).acos())
    assert angle.max() < 1.01 * math.sqrt(3) * degrees and angle.max() > degrees and 0.4 * degrees < angle.mean() < degrees
    assert len(set((d2 - d)[:, 0].tolist())) > 1900                                                # each ray its own turn


def test_near_rays_by_hand(monkeypatch):
    o, d = some_rays(4)
    assert all(torch.equal(a, b) for a, b in zip(inf.near_rays(o, d, 0.0), (o, d)))
    u = torch.tensor([[0.0, 1.0, 0.5, 0.9], [0.5, 0.25, 1.0, 0.1], [0.5, 0.5, 0.75, 0.3]])         # of the three angles, for four rays
    monkeypatch.setattr(torch, "rand", lambda *size, **kind: u)
    o2, d2 = inf.near_rays(o, d, 30.0)
    for r in range(4):
        R = torch.eye(3)
        for (i, j), angle in zip(((1, 2), (2, 0), (0, 1)), torch.deg2rad(60 * u[:, r] - 30)):     # about x, y, z
            turn = torch.eye(3)
            turn[i, i] = turn[j, j] = angle.cos()
            turn[i, j], turn[j, i] = -angle.sin(), angle.sin()
            R = R @ turn
        assert close(o2[r], R @ o[r]) and close(d2[r], R @ d[r])


def test_facing():
    position, back, up = torch.randn(50, 3), torch.randn(50, 3) * 4, normalize(torch.randn(50, 3), dim=-1)
    for up in (up, torch.tensor([0.0, 0.0, 1.0])):
        c2w = inf.facing(position, back, up)
        assert_cameras(c2w)
        assert torch.equal(c2w[:, :, 3], position) and close(c2w[:, :, 2], normalize(back, dim=-1))
        assert (c2w[:, :, 0] * up).sum(1).abs().max() < 1e-5 and ((c2w[:, :, 1] * up).sum(1) > 0).all()
    target = torch.tensor([0.2, 0.1, -0.3])
    assert close(inf.facing(position, position - target, up)[7].double().numpy(), common.look_at(position[7].numpy(), target.numpy()), atol=1e-5, rtol=0)


def test_unseen_poses_on_the_sphere():
    scene = some_scene()
    poses = inf.unseen_poses(scene, None, 4000, "sphere")
    middle = scene.aabb.mean(0)
    out = poses[:, :, 3] - middle
    radius = float((scene.train.c2w[:, :, 3] - middle).norm(dim=1).mean())
    assert_cameras(poses)
    assert close(out.norm(dim=1), torch.full((4000,), radius)) and close(poses[:, :, 2], out / radius, atol=1e-5, rtol=0)   # looks at it
    assert (out[:, 2] >= 0).all() and poses[:, 2, 0].abs().max() < 1e-5 and (poses[:, 2, 1] > 0).all()      # above; the horizon is level
    height, turn = out[:, 2] / radius, torch.atan2(out[:, 1], out[:, 0])
    for share in (0.25, 0.5, 0.75):                                                                # equal area: heights are uniform
        assert float(height.quantile(share)) == pytest.approx(0.98 * share, abs=0.03)
        assert float(turn.quantile(share)) == pytest.approx((2 * share - 1) * math.pi, abs=0.15)


@pytest.mark.parametrize("kind", ["dtu", "llff"])
def test_unseen_poses_between_two_given_cameras(kind):
    scene, rest = inf.few_shot(some_scene(V=20, T=5, kind=kind), args(views=(1, 7, 12)))
    given = scene.train.c2w
    poses = inf.unseen_poses(scene, rest, 600, "sphere")
    assert_cameras(poses)
    pairs, best = [(0, 1), (0, 2), (1, 2)], []
    for i, j in pairs:                                                                             # how far from the segment, and where on it
        a, b = given[i], given[j]
        s = ((poses[:, :, 3] - a[:, 3]) @ (b - a)[:, 3] / (b - a)[:, 3].square().sum())[:, None]
        off = (poses[:, :, 3] - a[:, 3] - s * (b - a)[:, 3]).norm(dim=1)
        turned = (poses[:, :, 2] - normalize(torch.lerp(a[:, 2], b[:, 2], s), dim=-1)).norm(dim=1)
        best.append(off + turned + (s[:, 0] - s[:, 0].clamp(-1e-5, 1 + 1e-5)).abs())
    best = torch.stack(best)
    assert best.amin(0).max() < 1e-4
    assert min(best.argmin(0).bincount(minlength=3)) > 150                                         # all three pairs
    assert (distance_to(poses, given) > 1e-4).float().mean() > 0.97                                # "where no picture was given"
    one, rest = inf.few_shot(some_scene(V=20, T=5, kind=kind), args(views=(4,)))
    assert close(inf.unseen_poses(one, rest, 5, "sphere"), one.train.c2w.expand(5, 3, 4), atol=1e-6, rtol=0)     # there is no other place


def test_unseen_poses_of_the_dataset_are_neither_given_nor_test():
    whole = some_scene(V=9, T=25)
    scene, rest = inf.few_shot(whole, args(views=(1, 7, 2)))
    poses = inf.unseen_poses(scene, rest, 300, "dataset")
    expected = whole.train.c2w[[0, 3, 4, 5, 6, 8]]
    assert torch.equal(rest.c2w, expected) and distance_to(poses, expected).max() == 0 and distance_to(expected, poses).max() == 0
    assert distance_to(poses, torch.cat([scene.train.c2w, whole.test.c2w])).min() > 1e-3
    assert len(rest.images) == 6 and sorted([*scene.train.names, *rest.names]) == sorted(whole.train.names)


def test_views_of_dtu_that_are_not_given_are_test_views_and_no_source_of_poses():
    scene, rest = inf.few_shot(some_scene(V=20, T=5, kind="dtu"), args(views=(1, 7, 2)))
    assert len(scene.test.names) == 22
    assert len(rest.c2w) == 0 or distance_to(rest.c2w, scene.test.c2w).min() > 1e-3


def farthest(centre, chosen, n):
    """Slow: always the camera whose nearest chosen one is farthest away; the first of equals."""
    chosen = list(chosen)
    while len(chosen) < n:
        gap = [min(math.dist(c, centre[k]) for k in chosen) for c in centre]
        chosen.append(max(range(len(centre)), key=lambda v: (gap[v], -v)))
    return chosen


@pytest.mark.parametrize("kind", ["blender", "builtin", "llff", "dtu"])
def test_choose_views(kind):
    scene = some_scene(V=100, T=0, kind=kind) if kind != "dtu" else replace(some_scene(V=100, kind="blender"), kind="dtu")
    default = {"blender": [26, 86, 2, 55], "builtin": [26, 86, 2, 55], "dtu": [22, 25, 28], "llff": []}[kind]
    chosen = inf.choose_views(args(views=()), scene)
    assert chosen == default if default else len(set(chosen)) == 3
    sets = [inf.choose_views(args(views=(), num_views=n), scene) for n in range(1, 13)]
    assert [len(set(views)) for views in sets] == list(range(1, 13)) and all(long[:len(short)] == short for short, long in zip(sets, sets[1:]))
    centre = scene.train.c2w[:, :, 3].tolist()
    assert sets[-1] == farthest(centre, default or [0], 12)
    assert inf.choose_views(args(views=(7, 99, 0)), scene) == [7, 99, 0]
    assert sorted(inf.choose_views(args(views=(), num_views=100), scene)) == list(range(100))


@pytest.mark.parametrize("V", [1, 2, 3, 5, 20, 60])
@pytest.mark.parametrize("kind", ["blender", "dtu", "llff"])
def test_a_small_scene_has_default_views_too(V, kind):
    """A student's own twenty pictures: as many given views as on the well-known scenes, or all there are; and no complaint about a flag not given."""
    scene = replace(some_scene(V=V, T=2, kind="llff" if kind == "llff" else "blender"), kind=kind)
    chosen = inf.choose_views(args(views=()), scene)
    assert len(set(chosen)) == len(chosen) == min(V, {"blender": 4, "dtu": 3, "llff": 3}[kind]) and all(0 <= v < V for v in chosen)


@pytest.mark.parametrize("flags, words", [(dict(views=(3, 100)), "--views 100"), (dict(views=(-1,)), "--views -1"), (dict(views=(3, 4, 3)), "twice"),
                                          (dict(views=(3,), num_views=2), "--num-views"), (dict(views=(), num_views=0), "--num-views 0"),
                                          (dict(views=(), num_views=101), "--num-views 101"), (dict(views=(), num_views=-2), "--num-views -2")])
def test_choose_views_refuses(flags, words):
    with pytest.raises(common.UserError, match=words):
        inf.choose_views(args(**flags), some_scene())


def test_few_shot_keeps_views_whole():
    whole = some_scene(V=30, T=6)
    scene, rest = inf.few_shot(whole, args(views=(20, 3)))
    assert scene.train.names == ["v020", "v003"] and scene.train.K[:, 0, 0].tolist() == [38, 21]
    assert torch.equal(scene.train.c2w, whole.train.c2w[[20, 3]]) and scene.test.names == whole.test.names and len(rest.names) == 28


@pytest.mark.parametrize("T, skip, expected", [(25, 0, range(25)), (199, 0, range(199)), (200, 0, range(0, 200, 8)), (200, 1, range(200)), (25, 3, range(0, 25, 3)),
                                               (5, 100, [0])])
def test_test_views_that_are_scored(T, skip, expected):
    whole = some_scene(V=3, T=T)
    scene, _ = inf.few_shot(whole, args(views=(1,), test_skip=skip))
    assert scene.test.names == [whole.test.names[v] for v in expected] and torch.equal(scene.test.c2w, whole.test.c2w[list(expected)])


@pytest.mark.parametrize("names", ["image/{:06d}.png", "image/{}.png"])                            # also where 10.png follows 9.png
def test_dtu_counts_all_views_in_file_order(names):
    whole = some_scene(V=15, T=2, kind="dtu", names=names)                                         # 0, 8, 16 were held out
    scene, _ = inf.few_shot(whole, args(views=(8, 12, 16, 1)))
    assert scene.train.names == [names.format(v) for v in (8, 12, 16, 1)] and scene.train.K[:, 0, 0].tolist() == [26, 30, 34, 19]
    others = [v for v in range(17) if v not in (8, 12, 16, 1)]
    assert scene.test.names == [names.format(v) for v in others] and scene.test.K[:, 0, 0].tolist() == [18 + v for v in others]
    scene, _ = inf.few_shot(whole, args(views=(8,), test_skip=4))
    assert scene.test.names == [names.format(v) for v in (0, 4, 9, 13)]


def test_dtu_with_no_view_left_to_score_is_refused():
    with pytest.raises(common.UserError, match="test"):
        inf.few_shot(some_scene(V=7, T=2, kind="dtu"), args(views=(), num_views=9))


def test_draw_pixels():
    for share, columns, rows in ((1.0, (0, 15), (0, 11)), (0.5, (4, 11), (3, 8))):
        xy = inf.draw_pixels(40_000, 12, 16, share, "cpu")
        x, y = (xy - 0.5).unbind(-1)
        assert (x == x.round()).all() and (y == y.round()).all() and (x.min(), x.max()) == columns and (y.min(), y.max()) == rows
        counts = torch.bincount((y * 16 + x).long(), minlength=192).double()
        expected = 40_000 / int((counts > 0).sum())
        assert (counts > 0).sum() == 192 * share ** 2 and ((counts[counts > 0] - expected).abs() < 6 * expected ** 0.5).all()
    assert (inf.draw_pixels(50, 13, 7, 0.0, "cpu") == torch.tensor([3.5, 6.5])).all()


# -------------------------------------------------------------------------------------------------------------- intervals

def test_box_interval_against_a_slow_walk():
    scene = some_scene()                                                                           # the box is 3 x 2.2 x 2.2; near 1, far 6
    middle, n = scene.aabb.mean(0), 300
    o = middle + torch.randn(n, 3) * 3
    d = normalize(middle + torch.randn(n, 3) - o, dim=-1)
    o[:40] = middle + (torch.rand(40, 3) - 0.5) * 2                                                # from inside the box
    d[40:60] = -d[40:60]                                                                           # away from it
    d[60:100] = torch.eye(3)[torch.randint(3, (40,))] * (torch.randint(2, (40, 1)) * 2 - 1.0)      # along the axes, from anywhere
    o[60:90] = middle - 3.5 * d[60:90] + 0.5 * torch.randn(30, 3)                                  # many of them through the box
    o[100:130] = middle - d[100:130] * torch.linspace(5, 9, 30)[:, None]                           # it begins or ends beyond far
    o[130], d[130] = torch.tensor([-1.0, 0.0, 4.0]), torch.tensor([0.0, 0.0, -1.0])                # within the plane of a face: 0 / 0?
    t_in, t_out = inf.box_interval(o, d, scene)
    assert (t_in >= scene.near).all() and (t_out <= scene.far).all() and (t_out >= t_in).all()
    t = torch.linspace(scene.near, scene.far, 4001, dtype=F64)
    hits = 0
    for r in range(n):
        x = o[r].double() + t[:, None] * d[r].double()
        inside = t[((x >= scene.aabb[0]) & (x <= scene.aabb[1])).all(1)]
        if len(inside) and r != 130:
            hits += 1
            assert abs(float(t_in[r] - inside[0])) < 2e-3 and abs(float(t_out[r] - inside[-1])) < 2e-3, r
        elif r != 130:
            assert float(t_out[r] - t_in[r]) < 2e-3, r
    assert 100 < hits < 270 and (t_in == t_out).sum() > 30


def test_stratified():
    t_in, t_out = torch.rand(500) + 1, torch.rand(500) * 2 + 3
    t_out[7] = t_in[7]                                                                             # a ray that misses
    width = (t_out - t_in)[:, None] / 8
    even = inf.stratified(t_in, t_out, 8, False)
    assert even.shape == (500, 9) and close(even.diff(dim=1), width.expand(500, 8), atol=1e-6, rtol=1e-5)
    moved = inf.stratified(t_in, t_out, 8, True)
    for t in (even, moved):
        assert torch.equal(t[:, 0], t_in) and (t.diff(dim=1) >= 0).all() and (t[7] == t_in[7]).all()
        assert close(t[:, -1], t_out, atol=1e-6, rtol=0)
    u = ((moved - even) / width)[torch.arange(500) != 7, 1:-1]
    assert u.min() >= -0.5001 and u.max() <= 0.5001 and abs(u.mean()) < 0.02 and u.std() == pytest.approx(12 ** -0.5, abs=0.01)
    assert (u[:, 0] - u[:, 1]).abs().max() > 0.5                                                   # each edge by itself


@pytest.mark.parametrize("perturb", [False, True])
def test_importance(perturb):
    t = torch.cat([torch.tensor([2.0, 2.5, 3.5, 3.75, 5.0]), torch.tensor([1.0, 2, 3, 4, 5]), torch.tensor([2.0, 2, 2, 2, 2])]).view(3, 5)
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.9, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    edges = inf.importance(t, weights, 1000, perturb)
    assert edges.shape == (3, 1005) and not edges.requires_grad and (edges.diff(dim=1) >= 0).all() and edges.isfinite().all()
    assert all((edges[r] == e).any() for r in range(3) for e in t[r])
    inside = lambda r, i: int(((edges[r] > t[r, i]) & (edges[r] < t[r, i + 1])).sum())
    assert [inside(0, i) for i in range(4)] == pytest.approx([100, 200, 300, 400], abs=2)
    within = edges[0][(edges[0] > 3.75) & (edges[0] < 5)]
    assert float(within.median()) == pytest.approx(4.375, abs=0.02)                                # evenly, within an interval
    assert inside(1, 2) >= 998 and (edges[2] == 2).all()
    assert inf.importance(t[:1], torch.zeros(1, 4), 400, perturb).diff().max() < 0.03              # no weight: everywhere, by interval


# ------------------------------------------------------------------------------------------------------- blend and render

def made_up_field(x, d):
    """Density and colour (N,), (N, 3) of positions and directions, smooth and in any dtype."""
    sigmas = (x.sin().sum(-1) + 1.5).clamp(min=0)
    return sigmas, None if d is None else torch.sigmoid(2 * x + d.roll(1, -1))


@pytest.mark.parametrize("per_ray", [False, True])
def test_blend_against_a_slow_loop(per_ray):
    R, S = 5, 7
    o, d = torch.randn(R, 3, dtype=F64), normalize(torch.randn(R, 3, dtype=F64), dim=-1)
    t = (torch.rand(R, S + 1, dtype=F64) * 3).sort(1).values
    bg = torch.rand(R, 3, dtype=F64) if per_ray else torch.rand(3, dtype=F64)
    out = inf.blend(made_up_field, o, d, t, bg, True)
    for r in range(R):
        T, rgb, acc, depth, weights = 1.0, np.zeros(3), 0.0, 0.0, []
        for i in range(S):
            middle = (t[r, i] + t[r, i + 1]) / 2
            sigma, colour = made_up_field((o[r] + middle * d[r])[None], d[r][None])
            alpha = 1 - math.exp(-float(sigma) * float(t[r, i + 1] - t[r, i]))
            weights.append(T * alpha)
            rgb, acc, depth, T = rgb + T * alpha * colour[0].numpy(), acc + T * alpha, depth + T * alpha * float(middle), T * (1 - alpha)
            assert float(out["sigmas"][r, i]) == pytest.approx(float(sigma)) and float(out["deltas"][r, i]) == pytest.approx(float(t[r, i + 1] - t[r, i]))
        rgb = rgb + (1 - acc) * (bg[r] if per_ray else bg).numpy()
        assert close(out["rgb"][r].numpy(), rgb) and close(out["weights"][r], torch.tensor(weights, dtype=F64))
        assert float(out["acc"][r]) == pytest.approx(acc) and float(out["depth"][r]) == pytest.approx(depth)
    assert out["t"] is t and out["rgb"].dtype == F64
    blind = inf.blend(made_up_field, o, d, t, bg, False)
    assert blind["rgb"] is None and all(torch.equal(blind[name], out[name]) for name in ("acc", "depth", "sigmas", "deltas", "weights", "t"))


def test_the_last_interval_is_finite():
    """The released code's last interval is 1e10 long: alpha 1. Here it ends where the ray does."""
    scene = some_scene()
    end = float(inf.box_interval(torch.tensor([[5.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]), scene)[1])
    field = lambda x, d: (0.7 * (x[:, 0] < 5 - end + 0.3), None if d is None else x * 0)
    out = inf.render({"fine": field}, torch.tensor([[5.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]]), scene, scene.bg, args(samples=10))
    assert end == pytest.approx(6) and out["sigmas"].count_nonzero() == 1 and float(out["sigmas"][0, -1]) == pytest.approx(0.7)
    alpha = 1 - math.exp(-0.7 * 0.3)                                                               # the box is 3 long
    assert float(out["acc"]) == pytest.approx(alpha, abs=1e-5) and float(out["weights"][0, -1]) == pytest.approx(alpha, abs=1e-5)
    assert float(out["depth"]) == pytest.approx(alpha * (6 - 0.15), abs=1e-4)


def test_render_of_rays_that_miss_is_the_background():
    scene = some_scene()
    o, d = torch.tensor([[8.0, 0, 0], [0, 0, 9]]), torch.tensor([[1.0, 0, 0], [0, 1, 0]])
    fog = lambda x, d: (torch.ones(len(x)), None if d is None else torch.zeros(len(x), 3))
    for flags in ({}, dict(importance=5)):
        out = inf.render({"fine": fog}, o, d, scene, scene.bg, args(**flags), perturb=True)
        assert torch.equal(out["rgb"], scene.bg.expand(2, 3)) and out["acc"].abs().max() == 0 and (out["deltas"] == 0).all()
        assert (bits(out["sigmas"], out["deltas"], "alpha") == 0).all()


def test_render_adds_importance_samples_where_the_first_pass_saw_weight():
    """With a coarse field: by its weights, its colour is returned, and only with a colour loss does it get a gradient."""
    scene, calls = some_scene(), []
    s = torch.tensor(1.0, requires_grad=True)

    def wall(at, name):
        def field(x, d):
            calls.append((name, len(x), d is None, torch.is_grad_enabled()))
            return s * 40 * (x[:, 0] < at), None if d is None else 0 * x + 0.25
        return field
    o, d = torch.tensor([[5.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]])
    fields = {"coarse": wall(1.0, "coarse"), "fine": wall(1.2, "fine")}
    ar = args(samples=16, importance=24)
    out = inf.render(fields, o, d, scene, scene.bg, ar)
    assert calls == [("coarse", 16, False, True), ("fine", 40, False, True)] and close(out["coarse"], torch.full((1, 3), 0.25), atol=1e-3, rtol=0)
    assert torch.autograd.grad(out["coarse"].sum(), s, retain_graph=True)[0].isfinite()
    width = 3 / 16
    assert ((out["t"] > 4 - width) & (out["t"] < 4 + 2 * width)).sum() >= 22                       # x = 1 is at t = 4
    calls.clear()
    out = inf.render(fields, o, d, scene, scene.bg, ar, colour=False)
    assert calls == [("coarse", 16, True, False), ("fine", 40, True, True)] and out["coarse"] is None and out["rgb"] is None
    calls.clear()
    out = inf.render({"fine": fields["fine"]}, o, d, scene, scene.bg, ar)
    assert calls == [("fine", 16, True, False), ("fine", 40, False, True)] and out["coarse"] is None and out["rgb"] is not None


def small_fields(kind="hash", **more):
    scene = some_scene()
    make = inf.HashField if kind == "hash" else inf.MLPField
    return make(args(**more), scene.aabb), scene


@pytest.mark.parametrize("kind", ["hash", "mlp"])
def test_fields(kind):
    field, scene = small_fields(kind, width=32)
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            parameter.normal_(std=3.0 if name == "table" else 0.3)
    field.eval()
    x, d = torch.rand(500, 3) * 2 - 0.8, normalize(torch.randn(500, 3), dim=-1)
    sigmas, rgbs = field(x, d)
    assert sigmas.shape == (500,) and rgbs.shape == (500, 3) and (sigmas >= 0).all() and (rgbs >= 0).all() and (rgbs <= 1).all() and rgbs.std() > 0.1
    blind, nothing = field(x, None)
    assert nothing is None and torch.equal(blind, sigmas) and sigmas.max() > 2 * sigmas.mean()
    other = field(x, -d)
    assert torch.equal(other[0], sigmas) and (other[1] - rgbs).abs().max() > 1e-3                  # density sees no direction, colour does
    (sigmas.sum() + rgbs.sum()).backward()
    assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in field.parameters())


def test_truncated_exponential():
    y = torch.tensor([-3.0, 2.0, 20.0], requires_grad=True)
    out = inf._TruncatedExp.apply(y)
    assert close(out.detach(), y.detach().exp())
    out.sum().backward()
    assert close(y.grad, torch.tensor([-3.0, 2.0, 15.0]).exp())


def test_mlp_is_nerf_s():
    """63 -> 8 layers of 256, the sixth of which sees the 63 again -> 1 and 256; 256 + 27 -> 128 -> 3."""
    field, _ = small_fields("mlp", width=256)
    layers = 63 * 256 + 256 + 6 * (256 * 256 + 256) + (256 + 63) * 256 + 256
    heads = 256 + 1 + 256 * 256 + 256 + (256 + 27) * 128 + 128 + 128 * 3 + 3
    assert sum(parameter.numel() for parameter in field.parameters()) == layers + heads == 595_844
    assert [layer.in_features for layer in field.layers] == [63, 256, 256, 256, 256, 319, 256, 256]


def test_frequencies_by_hand():
    v = torch.tensor([[0.3, -1.0, 2.0]])
    found = inf.MLPField.frequencies(v, 3)
    expected = [0.3, -1.0, 2.0]
    expected += [math.sin(2 ** k * x) for k in range(3) for x in (0.3, -1.0, 2.0)] + [math.cos(2 ** k * x) for k in range(3) for x in (0.3, -1.0, 2.0)]
    assert close(found, torch.tensor([expected]))


def test_density_noise_is_for_training():
    field, _ = small_fields("mlp", density_noise=1.0)
    x = torch.rand(400, 3)
    with torch.no_grad():
        field.density.bias.fill_(5.0)                                                              # the ReLU cuts nothing
    a, b = field(x, None)[0], field(x, None)[0]
    assert (a - b).std().item() == pytest.approx(2 ** 0.5, abs=0.15)
    field.eval()
    assert torch.equal(field(x, None)[0], field(x, None)[0])
    quiet, _ = small_fields("mlp", density_noise=0.0)
    assert torch.equal(quiet(x, None)[0], quiet(x, None)[0])


# --------------------------------------------------------------------------------------------------------------- evaluate

@pytest.mark.parametrize("normalise", BY)
def test_render_view_is_render_in_chunks(normalise):
    scene, ar = some_scene(), args(normalise=normalise)
    c2w, K = scene.test.c2w[3], scene.test.K[3]
    whole, parts = (inf.render_view({"fine": made_up_field}, c2w, K, scene, ar, chunk) for chunk in (10_000, 50))
    assert all(close(whole[name], parts[name]) for name in ("rgb", "acc", "depth", "entropy"))
    assert whole["rgb"].shape == (12, 16, 3) and whole["entropy"].shape == (12, 16) and whole["rgb"].max() <= 1
    one = inf.render({"fine": made_up_field}, *inf.camera_rays(torch.tensor([[3.5, 7.5]]), K, c2w[None], scene), scene, scene.bg, ar)
    assert close(one["rgb"][0], whole["rgb"][7, 3]) and close(one["depth"][0], whole["depth"][7, 3])
    alphas = 1 - torch.exp(-one["sigmas"] * one["deltas"])                                         # runs with any --normalise are compared by this
    p = alphas / alphas.sum()
    assert float(whole["entropy"][7, 3]) == pytest.approx(float(-(p * p.log2()).nansum()), abs=1e-4)


def test_evaluate_by_hand(monkeypatch):
    """Two pictures; on the left the mask and known depths, in the upper quarter the object; the lower half of view 1 shows nothing."""
    scene = some_scene(V=3, T=2)
    truth = torch.rand(2, 12, 16, 3) * 0.3 + 0.2
    row, column = torch.meshgrid(torch.arange(12), torch.arange(16), indexing="ij")
    left, upper = column < 8, row < 3
    mask, alpha, depth = (x.float().expand(2, 12, 16) for x in (left, upper, 3.5 * left))
    scene = replace(scene, test=replace(scene.test, images=truth, mask=mask, alpha=alpha, depth=depth))

    def picture(fields, c2w, K, scene, ar):
        v = next(v for v in range(2) if torch.equal(c2w, scene.test.c2w[v]))
        assert torch.equal(K, scene.test.K[v])
        acc = torch.where(left, torch.where(upper, 0.9, torch.where((row >= 6) & (v == 1), 0.0, 0.5)), 0.05 + 0.02 * v)
        return {"rgb": truth[v] + (0.1, 0.01)[v] * (1 + 3 * ~left)[..., None], "acc": acc, "depth": acc * torch.where(left, 2.0, 9.0),
                "entropy": torch.where(left, 2.0 + v, 7.0)}
    monkeypatch.setattr(inf, "render_view", picture)
    scores = inf.evaluate(None, scene, args(), [0, 1])
    assert scores["psnr_masked"] == pytest.approx(30, abs=1e-3)                                    # the mean of 20 and 40 dB, not of their errors
    assert scores["psnr"] == pytest.approx(30 - 10 * math.log10((1 + 16) / 2), abs=1e-3)
    assert scores["entropy_bits"] == pytest.approx((96 * 2 + 48 * 3) / 144)                        # a mean over rays; acc 0, 0.05 and 0.07 do not count
    assert scores["acc_off_object"] == pytest.approx((72 * 0.5 + 24 * 0.5 + 72 * (0.05 + 0.07)) / 288)
    assert scores["acc_on_object"] == pytest.approx((48 * 0.9 + 24 * (0.05 + 0.07)) / 96)
    assert scores["depth_error"] == pytest.approx((144 * (3.5 - 2) + 48 * 3.5) / 192)              # seen at 2, or not at all
    assert 0 < scores["ssim"] < 1 and 0 < scores["ssim_masked"] < 1
    monkeypatch.setattr(inf, "render_view", lambda *words: {**picture(*words), "rgb": torch.where(left[..., None], truth[0], 0.0)})
    scores = inf.evaluate(None, scene, args(), [0])
    assert scores["ssim_masked"] == pytest.approx(1, abs=1e-5) and scores["ssim"] < 0.9            # an error outside the mask
    monkeypatch.setattr(inf, "render_view", picture)
    scene = replace(scene, test=replace(scene.test, mask=None, alpha=None, depth=None))
    assert inf.evaluate(None, scene, args(), [0, 1]).keys() == {"psnr", "ssim", "entropy_bits"}


def test_ray_picture_shows_where_the_rays_end():
    """Cameras above the plane z = 0 of opaque ground: in each column it is dark below the dot of the true depth, and bright right there."""
    scene = some_scene(V=3, T=3)
    o, d = inf.camera_rays(common.pixel_grid(12, 16), scene.test.K[0], scene.test.c2w[:1].expand(192, 3, 4), scene)
    depth = (-o[:, 2] / d[:, 2]).view(1, 12, 16).expand(3, 12, 16)
    hit = (o + depth[0].reshape(-1, 1) * d).view(12, 16, 3)[6]
    assert (hit[:, :2] > scene.aabb[0, :2]).all() and (hit[:, :2] < scene.aabb[1, :2]).all()
    ground = lambda x, d: (1e4 * (x[:, 2] < 0), None if d is None else x * 0)
    plain = inf.ray_picture({"fine": ground}, scene, args())
    dotted = inf.ray_picture({"fine": ground}, replace(scene, test=replace(scene.test, depth=depth)), args())
    assert plain.shape == dotted.shape == (3 * 96, 3 * 16, 3)
    plain, dotted = (p[::3, ::3].flip(0).transpose(0, 1) for p in (plain, dotted))                 # (16, 96, 3), near to far
    lit = (plain - common.colour_map(torch.tensor(0.0), 0, 1)).abs().amax(-1) > 0.05
    for column in range(16):
        dot, = (dotted[column] == 1).all(-1).nonzero().flatten().tolist()
        first = int(lit[column].nonzero()[0])
        assert abs(first - dot) <= 1 and lit[column].any() and not lit[column, :first].any()
        assert close(plain[column, first], common.colour_map(torch.tensor(1.0), 0, 1), atol=1e-3, rtol=0)


def test_ray_picture_keeps_its_scale_where_rays_miss_the_box():
    scene = some_scene(V=3, T=3)
    K = scene.test.K.clone()
    K[:, 0, 0] = 4.0                                                                               # a wide view: outer rays pass the box
    scene = replace(scene, test=replace(scene.test, K=K, depth=torch.full((3, 12, 16), 3.0)))
    xy = common.pixel_grid(12, 16).view(12, 16, 2)[6]
    t_in, t_out = inf.box_interval(*inf.camera_rays(xy, K[0], scene.test.c2w[:1].expand(16, 3, 4), scene), scene)
    assert 0 < (t_in == t_out).sum() < 16
    fog = lambda x, d: (torch.ones(len(x)), None if d is None else x * 0)
    picture = inf.ray_picture({"fine": fog}, scene, args())[::3, ::3].flip(0).transpose(0, 1)
    dots = (picture == 1).all(-1).nonzero()[:, 1]
    assert len(dots) == 16 and 15 < dots.float().mean() < 60, dots                                 # of 96 bins between 1 and at most 6
    picture = inf.ray_picture({"fine": fog}, replace(scene, test=replace(scene.test, depth=None)), args())[::3, ::3].flip(0).transpose(0, 1)
    bins = (t_out - t_in) / (t_out.max() - t_in.min()) * 96
    lit = ((picture - common.colour_map(torch.tensor(0.0), 0, 1)).abs().amax(-1) > 0.05).sum(1)
    assert ((lit - bins).abs() < 2.5).all(), (lit, bins)                                           # fog counts as long as a ray is in the box


def test_check_opacity():
    alpha = torch.tensor([0.0, 1.0]).repeat(50)
    for acc, known, word in ((torch.full((100,), 1e-5), None, "empty"), (torch.full((100,), 1e-5), alpha, "entropy-weight"), (torch.full((100,), 0.2), alpha, "emptying"),
                             (torch.full((100,), 0.999), alpha, "wall")):
        with pytest.raises(common.UserError, match=word) as error:
            inf.check_opacity(acc, known, 321)
        assert "321" in str(error.value)
    inf.check_opacity(alpha, alpha, 1)
    inf.check_opacity(torch.full((100,), 0.03), None, 1)                                           # unknown: what should it be compared with?
    inf.check_opacity(torch.full((100,), 0.999), None, 1)
    inf.check_opacity(torch.full((100,), 0.999), torch.ones(100), 1)                               # the pictures are full
    inf.check_opacity(torch.full((100,), 0.03), torch.full((100,), 0.05), 1)                       # they are nearly empty
    inf.check_opacity(torch.zeros(3), torch.tensor([0.0, 1.0, 1.0]), 1)                            # three rays say nothing


# -------------------------------------------------------------------------------------------------------------- training

def quick(tiny, out, **more):
    return args(**{**dict(scene=str(tiny), steps=4, eval_every=2, out=str(out)), **more})


def words_of(**flags):
    return conftest.words_of({**TINY, **flags})


def weights(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)["fields"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def timeless(summary):
    """What does not depend on the machine; NaN (no ray saw anything) equals NaN."""
    return {key: None if value != value else value for key, value in summary.items() if key not in ("train_seconds", "peak_memory_mb")}


def without_seconds(path):
    return [{key: value for key, value in line.items() if "seconds" not in key} for line in lines(path)]


@pytest.fixture(scope="module")
def bricks_run(tmp_path_factory):
    """One short run on the built-in scene, by its command line."""
    folder = tmp_path_factory.mktemp("runs") / "bricks"
    flags = dict(scene="bricks", views=(26, 86, 2, 55), steps=90, eval_every=30, samples=24, out=folder, video=True)
    done = subprocess.run([sys.executable, str(ROOT / "infonerf.py"), *words_of(**flags)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done, flags


def test_a_run_learns(bricks_run):
    curve = lines(bricks_run[0] / "metrics.jsonl")
    psnr, loss, mse = ([line[name] for line in curve] for name in ("psnr", "loss", "mse"))
    assert psnr[-1] > 12 and psnr[-1] > psnr[0] + 0.5, psnr
    assert loss[-1] < 0.8 * loss[0] and mse[-1] < 0.7 * mse[0], (loss, mse)


def test_a_run_s_folder(bricks_run):
    folder, done, flags = bricks_run
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {"args.json", "env.json", "metrics.jsonl", "summary.json", "ckpt.pt", "rays.png", "render.mp4", *(f"test_{v:03d}.png" for v in range(25))}
    summary = json.loads((folder / "summary.json").read_text())
    assert {"method", "scene", "data", "size", "seed", "steps", "train_seconds", "peak_memory_mb", "psnr", "ssim", "entropy_bits", "acc_on_object",
            "acc_off_object", "depth_error"} <= summary.keys()
    assert (summary["method"], summary["scene"], summary["data"], summary["size"], summary["steps"]) == ("infonerf", "bricks", "builtin", 24, 90)
    assert 0 < summary["train_seconds"] < 120 and 50 < summary["peak_memory_mb"] < 4000 and 0 < summary["ssim"] < 1
    assert 0 < summary["entropy_bits"] <= math.log2(24) and 0 < summary["acc_off_object"] < summary["acc_on_object"] < 1 and 0 < summary["depth_error"] < 4
    assert summary["train_views"] == ["train/r_26", "train/r_86", "train/r_2", "train/r_55"]
    curve = lines(folder / "metrics.jsonl")
    assert [line["step"] for line in curve] == [30, 60, 90] and [line["rays"] for line in curve] == [30 * 96, 60 * 96, 90 * 96]
    assert 0 < curve[0]["train_seconds"] < curve[1]["train_seconds"] < curve[2]["train_seconds"]
    assert curve[-1]["psnr"] == summary["psnr"] and curve[-1]["views"] == 25 and curve[0]["views"] == 1
    recorded = json.loads((folder / "args.json").read_text())
    assert recorded == {**common.to_json(asdict(args(**flags))), "device": recorded["device"], "out": str(folder)}
    assert iio.imread(folder / "test_003.png").shape == (24, 4 * 24, 3) and iio.imread(folder / "rays.png").shape[1] == 3 * 24
    assert iio.imread(folder / "render.mp4", index=0).shape == (24, 2 * 24, 3)
    assert f"{summary['psnr']:.2f} dB" in done.stdout and "4 views" in done.stdout


def test_the_picture_s_first_strip_is_scored_right(bricks_run):
    folder = bricks_run[0]
    strips = [iio.imread(folder / f"test_{v:03d}.png") / 255 for v in range(25)]
    psnr = [-10 * math.log10(((s[:, :24] - s[:, 24:48]) ** 2).mean()) for s in strips]
    assert np.mean(psnr) == pytest.approx(json.loads((folder / "summary.json").read_text())["psnr"], abs=0.05)   # pixels were rounded to 1/255


def test_a_good_run_says_nothing_on_stderr(bricks_run):
    assert bricks_run[1].stderr == ""


@pytest.mark.parametrize("flags", [{}, dict(field="mlp", density_noise=1.0)])
def test_eval_only_gives_the_same_score(tiny, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(inf, "check_opacity", lambda *_: None)                                     # a network that was just born may be empty
    before = inf.train(quick(tiny, tmp_path / "a", **flags))
    kept = [(tmp_path / "a" / name).read_bytes() for name in ("ckpt.pt", "metrics.jsonl", "args.json", "rays.png")]
    (tmp_path / "a/test_000.png").unlink()
    again = inf.train(quick(tiny, tmp_path / "a", eval_only=True, **flags))
    assert timeless(again) == timeless(before)
    assert again["train_seconds"] == pytest.approx(before["train_seconds"], abs=0.01) and (tmp_path / "a/test_000.png").is_file()
    assert kept == [(tmp_path / "a" / name).read_bytes() for name in ("ckpt.pt", "metrics.jsonl", "args.json", "rays.png")]


FLAGS = {
    "baseline": dict(entropy_weight=0.0), "entropy": {}, "KL alone": dict(entropy_weight=0.0, kl_weight=0.01), "both": dict(kl_weight=0.01),
    "seen": dict(entropy_rays="seen", kl_weight=0.01), "unseen": dict(entropy_rays="unseen", kl_weight=0.01), "unseen, no KL": dict(entropy_rays="unseen"),
    "dataset": dict(unseen_poses="dataset"), "one view": dict(views=(3,)), "num views": dict(views=(), num_views=3),
    "weight": dict(normalise="weight", kl_weight=0.01), "density": dict(normalise="density", kl_weight=0.01), "mask sum": dict(mask="sum"),
    "mask none": dict(mask="none"), "KL near": dict(kl_weight=0.01, kl_direction="near"), "KL pixel": dict(kl_weight=0.01, kl_near="pixel", kl_pixels=2),
    "KL mask": dict(kl_weight=0.01, kl_mask=True), "KL decays": dict(kl_weight=0.01, kl_rate=0.5, kl_every=1), "KL 0 degrees": dict(kl_weight=0.01, kl_degrees=0.0),
    "ramp, end, final": dict(entropy_ramp=3, entropy_end=3, entropy_final=0.1), "hash importance": dict(importance=8),
    "hash importance KL": dict(importance=8, kl_weight=0.01), "mlp": dict(field="mlp"), "mlp importance": dict(field="mlp", importance=8, kl_weight=0.01),
    "mlp noise": dict(field="mlp", density_noise=1.0), "precrop": dict(precrop_steps=3), "black": dict(background="black"),
    "random background": dict(train_background="random", kl_weight=0.01, unseen_rays=40), "one ray": dict(rays=1, unseen_rays=1),
    "two samples": dict(samples=2), "warm-up": dict(lr_warmup=3),
}


@pytest.mark.parametrize("name", FLAGS)
def test_every_combination_runs_and_resumes(tiny, tmp_path, monkeypatch, name):
    """A few steps; the same again, broken off just after the first checkpoint and resumed from it: all numbers are the same bits."""
    if name in ("one ray", "mlp", "mlp importance", "mlp noise"):                                  # opacity of one ray, of a network that was just born
        monkeypatch.setattr(inf, "check_opacity", lambda *_: None)
    undisturbed = inf.train(quick(tiny, tmp_path / "a", **FLAGS[name]))
    assert math.isfinite(undisturbed["psnr"]) and undisturbed["psnr"] > 3

    def power_cut(loss, step):
        if step == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(inf, "check_finite", power_cut)
        inf.train(quick(tiny, tmp_path / "b", **FLAGS[name]))
    with open(tmp_path / "b/metrics.jsonl", "a") as file:                                          # written, but its checkpoint was not
        file.write('{"step": 3, "psnr": 99}\n')
    torch.manual_seed(99)
    resumed = inf.train(quick(tiny, tmp_path / "b", resume=True, **FLAGS[name]))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert timeless(resumed) == timeless(undisturbed)
    assert without_seconds(tmp_path / "a/metrics.jsonl") == without_seconds(tmp_path / "b/metrics.jsonl")


def test_every_term_changes_the_weights(tiny, tmp_path):
    """What a flag switches on must be felt."""
    names = ("baseline", "entropy", "KL alone", "both", "seen", "unseen", "dataset", "weight", "density", "mask none", "KL near", "KL pixel", "KL mask")
    found = {}
    for i, name in enumerate(names):
        more = {**FLAGS[name], "mask_threshold": 0.7, "eval_every": 4}                             # some rays are masked
        inf.train(quick(tiny, tmp_path / str(i), **{**more, "mask": more.get("mask", "acc")}))
        found[name] = weights(tmp_path / str(i))["fine.table"]
    for i, a in enumerate(names):
        assert all(not torch.equal(found[a], found[b]) for b in names[:i]), a


def test_same_seed_same_weights(tiny, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        inf.train(quick(tiny, tmp_path / name, seed=seed, kl_weight=0.01))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b")) and not same(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_the_term_lowers_the_entropy(tiny, tmp_path):
    """Same seed, with and without: the rays of test views end in fewer places."""
    without, term, alone = (inf.train(quick(tiny, tmp_path / name, steps=100, eval_every=100, lr=0.02, **flags)) for name, flags in (
        ("a", dict(entropy_weight=0.0)), ("b", dict(entropy_weight=0.03)), ("c", dict(entropy_weight=0.03, entropy_rays="unseen"))))
    assert term["entropy_bits"] < without["entropy_bits"] - 0.5, (term, without)
    assert alone["entropy_bits"] < without["entropy_bits"] - 0.3, (alone, without)
    assert term["psnr"] > 10 and without["psnr"] > 10


def spy(monkeypatch, tiny, out, **more):
    """What was called with gradients on, step by step: lists of (words, result) by function name; losses under "loss"."""
    steps = [{}]
    real_check = inf.check_finite

    def recorded(name, function):
        def call(*words, **more):
            result = function(*words, **more)
            if torch.is_grad_enabled():
                steps[-1].setdefault(name, []).append((words, result))
            return result
        return call

    def check(loss, step):
        steps[-1]["loss"] = loss.item()
        steps.append({})
        return real_check(loss, step)
    with monkeypatch.context() as patch:
        for name in ("blend", "ray_distribution", "entropy", "divergence", "camera_rays", "unseen_poses", "draw_pixels", "render"):
            patch.setattr(inf, name, recorded(name, getattr(inf, name)))
        patch.setattr(inf, "check_finite", check)
        inf.train(quick(tiny, out, **more))
    return steps[:-1]


def results(step, name):
    return [result for _, result in step.get(name, [])]


def twins_of(step, outs):
    """What was blended at the very distances of each of `outs`, but was not that: (words, result) of blend."""
    return [next(call for call in step["blend"] if call[0][3] is out["t"] and call[1]["sigmas"] is not out["sigmas"]) for out in outs]


def p_of(step, outs):
    return [next(p for words, p in step["ray_distribution"] if words[0] is out["sigmas"]) for out in outs]


def mse_of(step, tiny, views):
    """The colour loss of a step, from what it rendered and the pixels it drew."""
    scene = common.load_scene(str(tiny), tiny, 24, "white")
    seen = results(step, "render")[0]
    (xy, K, c2w, _), _ = step["camera_rays"][0]
    view = torch.cdist(c2w.flatten(1), scene.train.c2w[list(views)].flatten(1)).argmin(1)
    x, y = xy.long().unbind(-1)
    return ((seen["rgb"] - scene.train.images[list(views)][view, y, x]) ** 2).mean().item()


@pytest.mark.parametrize("flags", [{}, dict(kl_mask=True), dict(entropy_rays="seen"), dict(entropy_rays="unseen"), dict(kl_direction="near"),
                                   dict(kl_near="pixel", normalise="density"), dict(mask="sum", normalise="weight")])
def test_the_loss_is_what_the_docstring_says(tiny, tmp_path, monkeypatch, flags):
    """mse + lambda_1 mean M H + lambda_2 mean D_KL, over seen and unseen rays, masked ones counted; and who is compared with whom."""
    ar = dict(entropy_weight=0.3, entropy_ramp=4, kl_weight=2.0, kl_rate=0.5, kl_every=2, mask_threshold=0.4, lr=0.1, steps=6, **flags)
    steps = spy(monkeypatch, tiny, tmp_path / "a", **ar)
    rays = {"both": [96, 64], "seen": [96], "unseen": [64]}[flags.get("entropy_rays", "both")]
    some_masked, kl_share = False, 0
    for t, step in enumerate(steps):
        lambda1, lambda2 = 0.3 * min(t / 4, 1), 2.0 * 0.5 ** (t // 2)
        outs = results(step, "render") if flags.get("entropy_rays") != "unseen" else results(step, "render")[1:]
        near = [twin for _, twin in twins_of(step, outs)]
        originals, twins = p_of(step, outs), p_of(step, near)
        for p, o in zip(originals + twins, outs + near):
            assert torch.equal(p, ray_distribution(o["sigmas"], o["deltas"], o["weights"], flags.get("normalise", "alpha")))
        assert [len(p) for p in originals] == [len(p) for p in twins] == rays
        masks = [opaque(o["sigmas"], o["deltas"], o["acc"], flags.get("mask", "acc"), 0.4) for o in outs]
        some_masked |= bool((torch.cat(masks) == 0).any() and (torch.cat(masks) == 1).any())
        H = [m * entropy(p, o["deltas"] if flags.get("normalise") == "density" else None) for p, o, m in zip(originals, outs, masks)]
        kl = [divergence(q, p) if "kl_direction" in flags else divergence(p, q) for p, q in zip(originals, twins)]
        kl = [m * k if "kl_mask" in flags else k for m, k in zip(masks, kl)]
        expected = mse_of(step, tiny, TINY["views"]) + lambda1 * torch.cat(H).mean().item() + lambda2 * torch.cat(kl).mean().item()
        assert step["loss"] == pytest.approx(expected, rel=1e-5, abs=1e-7)
        for (words, _), p, q in zip(step["divergence"], originals, twins):
            assert words[0] is (q if "kl_direction" in flags else p) and words[1] is (p if "kl_direction" in flags else q)
            assert p.requires_grad and q.requires_grad and not torch.equal(p, q)
        assert ("entropy" in step) == (lambda1 > 0)
        kl_share = max(kl_share, lambda2 * torch.cat(kl).mean().item() / expected)
    assert some_masked and kl_share > 2e-4, kl_share                                               # all parts matter at this tolerance


def test_twins_share_their_distances(tiny, tmp_path, monkeypatch):
    for near, flags in (("rotation", {}), ("pixel", dict(kl_pixels=2)), ("rotation", dict(importance=8))):
        steps = spy(monkeypatch, tiny, tmp_path / f"{near}{len(flags)}{len(flags) and flags.get('importance', 0)}", kl_weight=0.01, kl_near=near, steps=2, **flags)
        for step in steps:
            outs = results(step, "render")
            rays = [next(words for words, out in step["blend"] if out["sigmas"] is one["sigmas"]) for one in outs]
            twins = [words for words, _ in twins_of(step, outs)]
            assert len(step["blend"]) == 4 and [words[5] for words in (*rays, *twins)] == [True, False, False, False]    # colour for seen rays only
            for (_, o, d, *_), (_, o2, d2, *_) in zip(rays, twins):
                assert not torch.equal(d2, d)
                angle = torch.rad2deg((d * d2).sum(1).clamp(-1, 1).acos())
                if near == "rotation":
                    assert close(o2.norm(dim=1), o.norm(dim=1)) and angle.max() < 8.8 and not torch.equal(o, o2)
                else:
                    assert torch.equal(o2, o) and angle.max() < math.degrees(2 * 2 ** 0.5 / 33 * 1.02)          # focal length 33 px
            if near == "pixel":
                pixels = [words[0] for words, _ in step["camera_rays"]]
                for a, b in zip(pixels[:2], pixels[2:]):
                    assert set((b - a).flatten().tolist()) == {-2.0, -1.0, 0.0, 1.0, 2.0}


def test_unseen_rays_are_drawn_where_a_term_uses_them(tiny, tmp_path, monkeypatch):
    drawn = lambda name, **flags: ["unseen_poses" in step for step in spy(monkeypatch, tiny, tmp_path / name, **flags)]
    assert drawn("a") == [False, True, True, True]                                                 # the ramp begins at 0
    assert drawn("b", entropy_weight=0.0) == [False] * 4 == drawn("c", entropy_rays="seen", kl_weight=0.1)
    assert drawn("d", entropy_weight=0.0, kl_weight=0.1) == [True] * 4 and drawn("e", entropy_end=2) == [False, True, False, False]


@pytest.mark.parametrize("source", ["sphere", "dataset"])
def test_unseen_rays_start_neither_at_given_nor_at_test_views(tiny, tmp_path, monkeypatch, source):
    scene = common.load_scene(str(tiny), tiny, 24, "white")
    steps = spy(monkeypatch, tiny, tmp_path / "a", unseen_poses=source)
    poses = torch.cat([pose for step in steps for pose in results(step, "unseen_poses")])
    known = torch.cat([scene.train.c2w[list(TINY["views"])], scene.test.c2w])
    assert len(poses) == 3 * 64 and distance_to(poses, known).min() > 1e-4
    others = scene.train.c2w[[v for v in range(20) if v not in TINY["views"]]]
    assert distance_to(poses, others).max() == 0 if source == "dataset" else distance_to(poses, others).min() > 1e-4
    for step in steps[1:]:                                                                         # and their rays do start there
        (_, _, c2w, _), (rays_o, _) = step["camera_rays"][1]
        assert c2w is results(step, "unseen_poses")[0] and torch.equal(rays_o, c2w[:, :, 3])


def test_precrop_is_for_seen_rays(tiny, tmp_path, monkeypatch):
    steps = spy(monkeypatch, tiny, tmp_path / "a", precrop_steps=2, precrop_share=0.25)
    assert [[words[3] for words, _ in step["draw_pixels"]] for step in steps] == [[0.25], [0.25, 1.0], [1.0, 1.0], [1.0, 1.0]]


def test_learning_rate_by_hand(tiny, tmp_path, monkeypatch):
    rates = []

    class Adam(torch.optim.Adam):
        def step(self, *words):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*words)
    monkeypatch.setattr(torch.optim, "Adam", Adam)
    inf.train(quick(tiny, tmp_path / "a", steps=8, eval_every=8, lr=0.02, lr_warmup=4, lr_final=0.25))
    rise = [0.25, 0.5, 0.75] + 5 * [1]
    assert rates == pytest.approx([0.02 * rise[t] * 0.25 ** (t / 8) for t in range(8)])


def test_the_coarse_field_learns_by_its_own_colour(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(inf, "check_opacity", lambda *_: None)
    steps = spy(monkeypatch, tiny, tmp_path / "a", field="mlp", importance=8, entropy_weight=0.0, steps=2)
    for step in steps:
        out = results(step, "render")[0]
        assert out["sigmas"].shape == (96, 24) and step["loss"] > mse_of(step, tiny, TINY["views"]) + 1e-4
    start = {name: value for name, value in weights(tmp_path / "a").items() if name.startswith("coarse")}
    assert start and not same({k: v for k, v in start.items()}, {k: weights(tmp_path / "a")[k.replace("coarse", "fine")] for k in start})


def test_random_backgrounds_leave_a_perfect_field_no_error(tiny, tmp_path, monkeypatch):
    """A renderer that knows colour and opacity of every training pixel: no loss, though each ray has its own background."""
    scene, colours, losses = common.load_scene(str(tiny), ".", 24), [], []
    given = common.pick_views(scene.train, list(TINY["views"]))
    real_rays, pixels = inf.camera_rays, []

    def rays(xy, K, c2w, scene_):
        pixels.append((torch.cdist(c2w.flatten(1), given.c2w.flatten(1)).argmin(1), *xy.long().unbind(-1)))
        return real_rays(xy, K, c2w, scene_)

    def perfect(fields, rays_o, rays_d, scene_, bg, ar, perturb=False, colour=True):
        view, x, y = pixels[-1]
        alpha = given.alpha[view, y, x]
        rgb = given.images[view, y, x] + (1 - alpha[:, None]) * (bg - scene.bg)
        colours.append(bg)
        nothing = 0 * fields["fine"].table.sum() + torch.zeros(len(x), 4)
        return {"rgb": rgb + nothing[:, :3], "acc": alpha, "depth": alpha, "coarse": None, "t": None, "sigmas": nothing, "deltas": nothing, "weights": nothing}
    monkeypatch.setattr(inf, "camera_rays", rays)
    monkeypatch.setattr(inf, "render", perfect)
    monkeypatch.setattr(inf, "evaluate", lambda *_, **more: {"psnr": 0.0, "ssim": 0.0})
    monkeypatch.setattr(inf, "check_finite", lambda loss, step: losses.append(loss.item()))
    inf.train(quick(tiny, tmp_path / "a", train_background="random", entropy_weight=0.0))
    assert len(losses) == 4 and max(losses) < 1e-12
    assert all(bg.shape == (96, 3) and bg.std() > 0.2 for bg in colours)


def test_photographs_without_alpha_get_another_background_behind_each_ray(tmp_path, monkeypatch):
    """A background that all rays share can be used as paint by a field that stays transparent."""
    write_llff(tmp_path / "line")
    used, real_render = [], inf.render

    def render(fields, rays_o, rays_d, scene, bg, *more, **options):
        if options.get("perturb"):
            used.append(bg)
        return real_render(fields, rays_o, rays_d, scene, bg, *more, **options)

    monkeypatch.setattr(inf, "render", render)
    inf.train(quick(tmp_path / "line", tmp_path / "a", views=(0, 1), size=16, steps=2,
                    train_background="scene", entropy_weight=0.0))
    assert used[0].shape == (96, 3) and used[0].std(0).max() > 0.05


def as_dtu(scene):
    """A scene of kind "dtu" out of one with alpha: masks, no alpha, no depth, a K for each view, every 8th held out."""
    both = common.join_views(scene.train, scene.test)
    both = replace(both, mask=both.alpha, alpha=None, depth=None, names=[f"image/{v:06d}.png" for v in range(len(both.names))])
    train, test = common.hold_out(both, "here")
    return replace(scene, kind="dtu", near=0.1, train=train, test=test)


@pytest.mark.parametrize("flags", [{}, dict(kl_weight=1e-3), dict(kl_weight=1e-3, kl_near="pixel", normalise="weight", video=True)])
def test_dtu_runs(tiny, tmp_path, monkeypatch, flags):
    monkeypatch.setattr(inf, "load_scene", lambda *words: as_dtu(common.load_scene(*words)))
    result = inf.train(quick(tiny, tmp_path / "a", views=(3, 8, 16), test_skip=5, **flags))
    assert result["data"] == "dtu" and result["train_views"] == ["image/000003.png", "image/000008.png", "image/000016.png"] and result["test_views"] == 4
    assert {"psnr_masked", "ssim_masked", "entropy_bits"} <= result.keys() and not {"acc_on_object", "acc_off_object", "depth_error"} & result.keys()
    assert math.isfinite(result["psnr_masked"]) and result["psnr_masked"] != result["psnr"]
    for more in (dict(unseen_poses="dataset"), dict(views=(), num_views=22)):                      # no view left that is not a test view; none to test
        with pytest.raises(common.UserError, match="unseen-poses" if "unseen_poses" in more else "test"):
            inf.train(quick(tiny, tmp_path / "b", **more))
    assert not (tmp_path / "b").exists()


def test_masks_cut_the_object_out_of_dtu_pictures(tiny):
    scene = as_dtu(common.load_scene(str(tiny), ".", bg="black"))
    cut, _ = inf.few_shot(scene, args(views=(3, 8), masked=True))
    plain, _ = inf.few_shot(scene, args(views=(3, 8)))
    m = plain.train.mask[..., None]
    assert 0 < m.mean() < 1 and torch.equal(cut.train.images, m * plain.train.images) and torch.equal(cut.train.alpha, plain.train.mask)
    assert torch.equal(cut.test.images, plain.test.mask[..., None] * plain.test.images) and plain.train.alpha is None
    with pytest.raises(common.UserError, match="no masks"):
        inf.few_shot(common.load_scene(str(tiny), "."), args(views=(3, 8), masked=True))


def test_evaluations_on_the_way_take_spread_test_views(tiny, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(inf, "load_scene", lambda *words: as_dtu(common.load_scene(*words)))
    monkeypatch.setattr(inf, "evaluate", lambda fields, scene, ar, ids, pictures=None: (seen.append((list(ids), pictures)), {"psnr": 0.0, "ssim": 0.0})[1])
    inf.train(quick(tiny, tmp_path / "a", eval_views=3))
    assert seen == [([0, 8, 17], None), (list(range(18)), tmp_path / "a")]                         # 22 less 4; at the end all, with their pictures


@pytest.mark.parametrize("flags", [{}, dict(kl_weight=0.01, kl_near="auto"), dict(unseen_poses="dataset", importance=4, video=True)])
def test_forward_facing_scene_runs(tmp_path, flags):
    write_llff(tmp_path / "line")
    result = inf.train(quick(tmp_path / "line", tmp_path / "run", size=16, views=(), num_views=3, **flags))
    assert result["data"] == "llff" and math.isfinite(result["psnr"]) and len(result["train_views"]) == 3


# ------------------------------------------------------------------------------------------ killed, resumed, and not harmed

def test_killed_twice_and_resumed_ends_bit_equal(tiny, tmp_path):
    more = dict(steps=60, eval_every=6, kl_weight=1e-3)
    inf.train(quick(tiny, tmp_path / "a", **more))
    words = words_of(scene=tiny, out=tmp_path / "b", **more)
    moments = random.Random()
    seed = moments.randrange(10 ** 6)
    moments.seed(seed)
    for kill, after in enumerate((1, 4)):                                                          # evaluations to wait for
        process = subprocess.Popen([sys.executable, str(ROOT / "infonerf.py"), *words, *(["--resume"] if kill else [])],
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
    inf.train(quick(tiny, tmp_path / "b", resume=True, **more))
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b")), f"moments of seed {seed}"
    assert without_seconds(tmp_path / "a/metrics.jsonl") == without_seconds(tmp_path / "b/metrics.jsonl")
    seconds = [line["train_seconds"] for line in lines(tmp_path / "b/metrics.jsonl")]
    assert seconds == sorted(seconds)
    for name in ("test_000.png", "rays.png"):
        assert np.array_equal(*(iio.imread(tmp_path / run / name) for run in "ab"))


command = partial(conftest.command, inf)


@pytest.mark.parametrize("factor, word", [(1e-2, "emptying"), (1e-7, "emptying"), (1e4, "wall")])
def test_a_collapse_is_named_and_the_checkpoint_kept(tiny, tmp_path, monkeypatch, capsys, factor, word):
    real_forward, steps = inf.HashField.forward, []

    def forward(field, x, d):
        sigmas, rgbs = real_forward(field, x, d)
        return sigmas * (factor if len(steps) > 2 else 1), rgbs
    monkeypatch.setattr(inf.HashField, "forward", forward)
    monkeypatch.setattr(inf, "check_finite", lambda loss, step: steps.append(step))
    outcome = command(monkeypatch, capsys, *words_of(scene=tiny, steps=8, eval_every=2, out=tmp_path / "a"))
    assert_refused(outcome, word, "step 4", "--entropy-weight")
    assert torch.load(tmp_path / "a/ckpt.pt", weights_only=True)["step"] == 2 and len(lines(tmp_path / "a/metrics.jsonl")) == 1
    assert not (tmp_path / "a/summary.json").exists()


def test_an_absurd_weight_ends_in_a_named_collapse(tiny, tmp_path, monkeypatch, capsys):
    """Low entropy is had cheaply by a field with nothing in it (masked rays count as 0), or with a wall before the cameras."""
    words = words_of(scene=tiny, steps=400, eval_every=20, entropy_weight=1e3, lr=0.03, lr_final=1.0, out=tmp_path / "a")
    assert_refused(command(monkeypatch, capsys, *words), "the field has collapsed", "--entropy-weight")


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(tiny, tmp_path, monkeypatch):
    real_render, out, calls = inf.render, tmp_path / "a", []

    def spoil(*words, **more):
        picture = real_render(*words, **more)
        if more.get("perturb") and more.get("colour", True):
            calls.append(1)
            if len(calls) == 4:
                picture["rgb"] = picture["rgb"] * math.nan
        return picture
    monkeypatch.setattr(inf, "render", spoil)
    with pytest.raises(common.UserError, match="step 3"):
        inf.train(quick(tiny, out))
    state = torch.load(out / "ckpt.pt", weights_only=True)
    assert state["step"] == 2 and all(value.isfinite().all() for value in state["fields"].values())
    assert math.isfinite(inf.train(quick(tiny, out, resume=True, lr=1e-3))["psnr"])                # as the message says: a lower rate, then --resume


WRONG = {
    "--steps 0": "--steps", "--steps many": "many", "--size 0": "--size", "--size 8": "--size", "--size 5000": "--size", "--rays 0": "--rays",
    "--unseen-rays 0": "--unseen-rays", "--unseen-rays -1": "--unseen-rays", "--samples 0": "--samples", "--samples 1": "--samples", "--importance -1": "--importance",
    "--views 0 20": "--views 20", "--views 3 4 3": "twice", "--views 3 x": "x", "--num-views 0": "--num-views", "--num-views 1000": "--num-views",
    "--num-views -1": "--num-views", "--views 1 2 --num-views 2": "--num-views", "--test-skip -1": "--test-skip",
    "--entropy-weight -1": "--entropy-weight", "--entropy-weight nan": "--entropy-weight", "--entropy-weight inf": "--entropy-weight",
    "--entropy-ramp 0": "--entropy-ramp", "--entropy-end -1": "--entropy-end", "--entropy-final 0": "--entropy-final", "--entropy-final nan": "--entropy-final",
    "--kl-weight -0.1": "--kl-weight", "--kl-weight nan": "--kl-weight", "--kl-degrees -5": "--kl-degrees", "--kl-degrees inf": "--kl-degrees",
    "--kl-pixels 0": "--kl-pixels", "--kl-rate 0": "--kl-rate", "--kl-every 0": "--kl-every", "--mask-threshold -1": "--mask-threshold",
    "--mask-threshold nan": "--mask-threshold", "--precrop-steps -1": "--precrop-steps", "--precrop-share 1.5": "--precrop-share", "--density-noise -1": "--density-noise",
    "--width 0": "--width", "--levels 0": "--levels", "--features -2": "--features", "--log2-table 40": "--log2-table", "--log2-table 0": "--log2-table",
    "--base 300 --finest 200": "--finest", "--lr 0": "--lr", "--lr nan": "--lr", "--lr-final 0": "--lr-final", "--lr-warmup 0": "--lr-warmup",
    "--eval-every 0": "--eval-every", "--eval-views 0": "--eval-views", "--seed -1": "--seed", "--seed 99999999999999999999999": "--seed",
    "--entropy-rays all": "all", "--unseen-poses test": "test", "--normalise softmax": "softmax", "--mask maybe": "maybe", "--kl-direction both": "both",
    "--kl-near far": "far", "--field voxels": "voxels", "--background pink": "pink", "--bogus 3": "--bogus", "--preset huge": "--preset",
    "--unseen-poses dataset --num-views 20": "--unseen-poses", "--eval-only": "--out", "--resume": "--out", "--device nonsense": "--device",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_one_line(tiny, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    given = words.split()
    base = [word for name, value in (("--steps", 2), ("--size", 24)) if name not in given for word in (name, value)]
    assert_refused(command(monkeypatch, capsys, "--scene", tiny, *base, *given), WRONG[words])
    assert not list(tmp_path.iterdir())


def test_rotation_about_the_middle_of_a_forward_facing_scene_is_refused(tmp_path, monkeypatch, capsys):
    write_llff(tmp_path / "line")
    words = ["--scene", tmp_path / "line", "--size", 16, "--steps", 2, "--kl-weight", 0.1, "--kl-near", "rotation", "--out", tmp_path / "a"]
    assert_refused(command(monkeypatch, capsys, *words), "--kl-near rotation", "--kl-near pixel")
    assert not (tmp_path / "a").exists()


def test_a_run_is_not_harmed_by_another(tiny, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a"
    base = words_of(scene=tiny, steps=4, eval_every=2, out=out)
    assert command(monkeypatch, capsys, *base)[0] == 0
    before = content(out)
    assert_refused(command(monkeypatch, capsys, *base), "holds a run")
    for name, value in (("seed", 5), ("levels", 2), ("entropy-weight", 0.5), ("samples", 8), ("size", 12), ("steps", 8), ("views", "2 5 11"), ("kl-weight", 1)):
        for how in ("--resume", "--eval-only"):
            assert_refused(command(monkeypatch, capsys, *base, how, f"--{name}", *str(value).split()), f"{name.replace('-', '_')} was")
    assert_refused(command(monkeypatch, capsys, *base, "--resume", "--scene", "bricks", "--views", 1), "bricks")
    assert content(out) == before
    (tmp_path / "b").mkdir()
    common.Run("other_method", "tiny", tmp_path / "b", {"preset": "quick", "data": ""}).save({"step": 1})
    copied = content(tmp_path / "b")
    assert_refused(command(monkeypatch, capsys, *words_of(scene=tiny, steps=4, eval_every=2, out=tmp_path / "b"), "--resume"), "other_method")
    assert content(tmp_path / "b") == copied
    assert_refused(command(monkeypatch, capsys, *words_of(scene=tiny, steps=4, out=tmp_path / "new"), "--eval-only"), "ckpt.pt")
    assert not (tmp_path / "new").exists()
    whole = (out / "ckpt.pt").read_bytes()
    (out / "ckpt.pt").write_bytes(whole[:len(whole) // 2])
    assert_refused(command(monkeypatch, capsys, *base, "--resume"), "ckpt.pt")
    (out / "ckpt.pt").write_bytes(whole)
    assert command(monkeypatch, capsys, *base, "--resume", "--test-skip", 2, "--eval-views", 2)[0] == 0           # finished: evaluated once more


def test_help_names_every_flag(monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, "--help")
    assert status == 0
    for name in asdict(Args()):
        assert name == "preset" or f"--{name.replace('_', '-')}" in out, name


def test_presets_pass_their_own_checks():
    for name, preset in inf.PRESETS.items():
        inf.check(preset)
        assert preset.preset == name


# ------------------------------------------------------------------------------------------------------------- real data

def test_real_lego_learns_in_sixty_steps(tmp_path):
    data = real("nerf_synthetic/lego")
    flags = {**TINY, **dict(size=40, views=(26, 86, 2, 55), rays=256, unseen_rays=64, samples=32, levels=4, log2_table=13, finest=64, test_skip=5)}
    result = inf.train(replace(Args(), **flags, scene="lego", data=data, steps=60, eval_every=20, out=str(tmp_path / "run")))
    psnr = [line["psnr"] for line in lines(tmp_path / "run/metrics.jsonl")]
    assert result["data"] == "blender" and psnr[-1] > psnr[0] + 0.5 and psnr[-1] > 12, psnr
    assert "acc_off_object" in result and "depth_error" not in result


def test_real_scan24_runs(tmp_path):
    data = real("dtu/scan24")
    try:
        common.load_scene("scan24", data, 16)
    except common.UserError as error:
        pytest.skip(f"load_scene does not know DTU: {error}")
    flags = {**TINY, **dict(size=32, views=(22, 25, 28), background="black", test_skip=12, kl_weight=2e-5)}
    result = inf.train(replace(Args(), **flags, scene="scan24", data=data, steps=10, eval_every=5, out=str(tmp_path / "run")))
    assert result["data"] == "dtu" and result["test_views"] == 4 and math.isfinite(result["psnr_masked"]) and result["psnr_masked"] > 3


def test_neighbours_are_other_pixels_of_the_picture():
    """All 8 (reach 1) or 24 (reach 2) neighbours, equally often, never the pixel itself; at the border mirrored."""
    torch.manual_seed(0)
    xy = torch.tensor([[10.5, 7.5]]).expand(24000, 2)
    for reach, count in ((1, 8), (2, 24)):
        moves, times = (inf.neighbours(xy, reach, 20, 30) - xy).unique(dim=0, return_counts=True)
        assert len(moves) == count and moves.abs().max() == reach and (moves != 0).any(1).all()
        assert (times / len(xy) * count - 1).abs().max() < 0.2
    corner = inf.neighbours(torch.tensor([[29.5, 0.5]]).expand(1000, 2), 1, 20, 30)
    assert (corner > 0).all() and (corner[:, 0] < 30).all() and (corner != torch.tensor([29.5, 0.5])).any(1).all()


def test_mlp_is_born_with_density_everywhere():
    """With the usual bias, four of ten seeds are 0 all over the box, and stay so."""
    aabb = torch.tensor([[-1.5] * 3, [1.5] * 3])
    for seed in range(6):
        torch.manual_seed(seed)
        sigmas, _ = inf.MLPField(Args(field="mlp"), aabb)(torch.rand(200, 3) * 3 - 1.5, None)
        assert (sigmas > 0).float().mean() > 0.5, seed
