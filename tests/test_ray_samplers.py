"""Where samples stand on a ray (common.py): the occupancy sampler and the proposal sampler."""
import math

import pytest
import torch
from torch.nn.functional import normalize
from torch.testing import assert_close

import common
import soft_mining as sm
from common import OccupancySampler, ProposalSampler, interlevel_loss, resample
from kernels import composite

F64 = torch.float64
BOX = torch.tensor([[-1.5] * 3, [1.5] * 3])
BG = torch.tensor([0.9, 0.5, 0.1])
SCENE = common.Scene("s", "blender", None, None, BOX, 2.0, 6.0, BG, False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def some_edges(R, S):
    return 1 + torch.cat([torch.zeros(R, 1, dtype=F64), torch.rand(R, S, dtype=F64)], 1).cumsum(1)


def some_rays(n, spread=1.0):
    """Rays from a sphere around the box towards points in its middle."""
    rays_o = normalize(torch.randn(n, 3), dim=-1) * 4
    return rays_o, normalize((torch.rand(n, 3) - 0.5) * spread - rays_o, dim=-1)


def resample_slowly(edges, weights, n, jitter):
    padded, pdf, inner = [0, *weights, 0], [], []
    for left, w, right in zip(padded, weights, padded[2:]):
        pdf.append((max(left, w) + max(w, right)) / 2 + 0.01)
    for k in range(1, n):
        before, i = (k + jitter - 0.5) / n * sum(pdf), 0     # this much lies before the edge
        while before > pdf[i] and i < len(pdf) - 1:
            before, i = before - pdf[i], i + 1
        inner.append(edges[i] + before / pdf[i] * (edges[i + 1] - edges[i]))
    return [edges[0], *inner, edges[-1]]


@pytest.mark.parametrize("S, n", [(1, 1), (1, 5), (6, 4), (5, 16)])
def test_resample_inverts_the_blurred_distribution(S, n):
    edges, weights, jitter = some_edges(20, S), torch.rand(20, S, dtype=F64) ** 4, torch.rand(20)
    weights[0], weights[1] = 0, weights[1] * (torch.arange(S) == S - 1)
    edges[2] = 3.0                                           # a ray that misses the box
    for u in (jitter.double(), None):
        found = resample(edges, weights.requires_grad_(), n, u)
        assert not found.requires_grad
        for r in range(20):
            shift = 0.5 if u is None else float(u[r])
            expected = resample_slowly(edges[r].tolist(), weights[r].tolist(), n, shift)
            assert_close(found[r], torch.tensor(expected, dtype=F64))


def test_resample_example():
    found = resample(torch.arange(4.0)[None], torch.tensor([[0.0, 1, 0]]), 3, None)
    inner = 1 + (2.03 / 3 - 0.51) / 1.01
    assert inner == pytest.approx(1.17, abs=0.006)
    assert_close(found, torch.tensor([[0, inner, 3 - inner, 3]]))


def interlevel_slowly(edges, weights, p_edges, p_weights):
    """mip-NeRF 360, eq. 12 and 13, of one ray."""
    loss = 0.0
    for i, w in enumerate(weights):
        bound = 0.0
        for j, p in enumerate(p_weights):
            if p_edges[j] < edges[i + 1] and p_edges[j + 1] > edges[i]:
                bound += p
        loss += max(0.0, w - bound) ** 2 / (w + 1e-7)
    return loss


def test_interlevel_loss():
    p_edges, p_weights = some_edges(12, 5), torch.rand(12, 5, dtype=F64) * 0.2
    edges = p_edges[:, :1] + (p_edges[:, -1:] - p_edges[:, :1]) * torch.linspace(0, 1, 10)
    edges[0, 3] = p_edges[0, 2]                              # intervals that only touch
    edges, weights = edges.sort(1).values, torch.rand(12, 9, dtype=F64).requires_grad_()
    loss = interlevel_loss(edges, weights, p_edges, p_weights.requires_grad_())
    rays = zip(*(x.tolist() for x in (edges, weights, p_edges, p_weights)))
    expected = [interlevel_slowly(*ray) for ray in rays]
    assert loss.item() == pytest.approx(sum(expected) / 12) and min(expected) > 0
    loss.backward()
    assert weights.grad is None and p_weights.grad.min() < -0.1
    assert p_weights.grad.max() < 1e-12                      # more weight never costs more
    edges, weights = some_edges(7, 8), torch.rand(7, 8, dtype=F64)         # proposals that bound
    coarse_edges, coarse = edges[:, ::2].contiguous(), weights.view(7, 4, 2).sum(2)
    for bound in ((edges, weights), (edges, weights + 1), (coarse_edges, coarse)):
        assert interlevel_loss(edges, weights, *bound) < 1e-12
    assert interlevel_loss(edges, weights, coarse_edges, 0.4 * coarse) > 1e-3


def test_ray_weights_are_those_of_compositing():
    edges, sigmas = some_edges(6, 9), torch.rand(6, 9, dtype=F64) * 5
    sigmas[0], sigmas[1, 3] = 0, 1e4
    weights = composite(sigmas.flatten(), torch.rand(54, 3, dtype=F64), edges[:, :-1].flatten(),
                        edges[:, 1:].flatten(), torch.arange(7) * 9)[3]
    assert_close(common.ray_weights(sigmas, edges), weights.view(6, 9))


def test_ray_box_by_hand():
    rays_o = torch.tensor([[-4.0, 0, 0], [0, 0, 0], [4, 0.5, -1.4], [-2, -0.5, 0], [-4, 2, 0],
                           [-4, 0, 0]])
    rays_d = torch.tensor([[1.0, 0, 0], [0, -1, 0], [-1, 0, 0], [0.6, 0.8, 0], [1, 0, 0],
                           [0.6, 0, 0.8]])
    found = common.ray_box(rays_o, rays_d, BOX, 0.1, 5.0)
    expected = [[2.5, 5.0], [0.1, 1.5], [2.5, 5.0], [0.5 / 0.6, 2.5]]      # far, near; faces
    assert_close(found[:4], torch.tensor(expected))
    assert (found[4:, 0] == found[4:, 1]).all()              # these miss the box


def ball(x):
    """Density 40 within 0.7 of the origin, with a soft border."""
    return 40 * torch.sigmoid((0.7 - x.norm(dim=-1)) * 20)


def field(x, sh):
    return ball(x), 0.5 + 0.2 * torch.sin(2 * x)


field.density = ball


def test_proposals_find_a_known_density():
    sampler, rays = ProposalSampler(SCENE, (24, 16), 12, steps=60), some_rays(300)
    optimiser = torch.optim.Adam(sampler.parameters(), lr=2e-2, eps=1e-15)

    def share_near_the_surface():
        t_starts, t_ends, _, ray = sampler.sample(*rays, None)
        x = rays[0][ray] + 0.5 * (t_starts + t_ends)[:, None] * rays[1][ray]
        return float(((x.norm(dim=-1) - 0.7).abs() < 0.2).float().mean())
    before = share_near_the_surface()
    for step in range(60):
        sampler.prepare(field, step)
        weights = sm.render(field, sampler, *some_rays(128), BG, torch.rand(128))["weights"]
        optimiser.zero_grad()
        sampler.loss(weights).backward()
        optimiser.step()
    sampler.power = 0.0                                      # of no use in an evaluation
    assert share_near_the_surface() > 2 * before             # 0.29 -> 0.85


def test_proposals_learn_from_their_own_loss_only():
    sampler = ProposalSampler(SCENE, (8, 6), 5, steps=100)
    learner = sm.HashField(sm.Args(levels=2, log2_table=8, finest=16), BOX)
    out = sm.render(learner, sampler, *some_rays(20), BG, torch.rand(20))
    out["rgb"].sum().backward(retain_graph=True)
    assert all(p.grad is None for p in sampler.parameters()) and learner.table.grad.any()
    learner.zero_grad()
    sampler.loss(out["weights"] + 1).backward()              # larger than any proposal
    assert all(p.grad is None for p in learner.parameters())
    assert all(network.table.grad.any() for network in sampler.networks)   # in both rounds


def test_schedule_and_cost_of_the_proposals():
    """Annealing: 10 s / (9 s + 1) with s = step / steps. Every ray costs as much as any other."""
    sampler, rays = ProposalSampler(SCENE, (4, 3), 5, steps=1000), some_rays(3)
    rays[1][1].neg_()                                        # it looks away
    rays[1].requires_grad_()                                 # as in soft_mining: not through edges
    for step, power, learn in ((0, 0, True), (63, None, True), (65, None, False), (66, None, True),
                               (100, 1 / 1.9, True), (995, None, True), (1000, 1, True),
                               (999, None, False)):
        sampler.prepare(None, step)
        assert sampler.learn == learn and power in (None, pytest.approx(sampler.power))
    t_starts, t_ends, offsets, ray = sampler.sample(*rays, torch.rand(3))
    assert sampler.loss(None) == 0.0 and not sampler.rounds[0][1].requires_grad
    assert not t_starts.requires_grad and not t_ends.requires_grad
    assert torch.equal(ray, torch.arange(15) // 5) and offsets.tolist() == [0, 5, 10, 15]
    assert ((t_ends > t_starts).view(3, 5) == torch.tensor([[True], [False], [True]])).all()


def test_both_samplers_render_the_same_smooth_field():
    proposal, rays = ProposalSampler(SCENE, (32, 32), 400, steps=100), some_rays(50, spread=3.0)
    a, b = (sm.render(field, sampler, *rays, BG)
            for sampler in (OccupancySampler(SCENE, 800, 100.0), proposal))
    assert 0.2 < a["opacity"].mean() < 0.9
    for key in ("rgb", "opacity", "depth"):
        assert_close(a[key], b[key], atol=5e-3, rtol=0)


def test_occupancy_sampler_skips_empty_cells_and_follows_its_cost():
    sampler, rays = OccupancySampler(SCENE, 48, 32.0), some_rays(200)
    assert sampler.step == pytest.approx(3 * math.sqrt(3) / 48)
    full = len(sampler.sample(*rays, None)[0]) / 200
    assert float(sampler.samples_per_ray) == 32.0            # an evaluation does not count
    for step in range(1, 17):
        assert sampler.grid.occupied.all()
        sampler.prepare(field, step)
    cost = len(sampler.sample(*rays, torch.rand(200))[0]) / 200
    assert 2 < cost < 0.7 * full and sampler.loss(None) == 0.0
    assert float(sampler.samples_per_ray) == pytest.approx(math.sqrt(32 * cost), rel=1e-5)
