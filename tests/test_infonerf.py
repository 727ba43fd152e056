"""infonerf.py against known answers. What all scripts promise is in test_contract.py."""
import math
from dataclasses import replace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

import common
import infonerf as inf
from conftest import assert_refused, close, command, words_of, write_llff
from infonerf import Args, entropy, kl_divergence, ray_density, ray_mask

F64 = torch.float64
TINY = dict(size=24, views=(2, 5, 11, 17), rays=96, unseen_rays=64, samples=16, finest=24,
            train_background="scene", entropy_ramp=1, lr=1e-2, device="cpu", eval_views=1)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def args(**more):
    return replace(Args(), **{**TINY, **more})


def some_scene(V=20, T=5, kind="blender", H=12, W=16):
    """Cameras around the middle of a box that is not the origin, each with its own K; pictures
    without content. LLFF: all look along -z."""
    generator = torch.Generator().manual_seed(3)
    u = torch.rand(V + T, 2, generator=generator).numpy()
    aabb = torch.tensor([[-1.0, -1.2, -0.8], [2.0, 1.0, 1.4]])
    middle = aabb.mean(0).numpy()
    poses = [common.orbit_pose(6 * a, 0.1 + b, 3 + b, middle) for a, b in u]
    if kind == "llff":
        poses = [np.c_[np.eye(3), (a, b, 0)] for a, b in u]
    K = torch.tensor([[18.0, 0, 8], [0, 18.0, 6], [0, 0, 1]]).repeat(V + T, 1, 1)
    K[:, 0, 0] += torch.arange(V + T)
    views = common.Views(torch.zeros(V + T, H, W, 3), torch.tensor(np.stack(poses)).float(), K,
                         None, None, [f"v{v:03d}" for v in range(V + T)])
    train, test = (common.pick_views(views, list(ids)) for ids in (range(V), range(V, V + T)))
    bg = torch.tensor([0.9, 0.5, 0.1])
    return common.Scene("s", kind, train, test, aabb, 1.0, 6.0, bg, kind == "llff")


# ---------------------------------------------------------------------------------- p, M, H and D

def edges_of(deltas):
    return torch.nn.functional.pad(deltas.cumsum(1), (1, 0))


def sigmas_of(alphas, deltas):
    return -torch.log1p(-alphas) / deltas


def bits(sigmas, edges, by="alpha"):
    return entropy(ray_density(sigmas, edges, by))


@pytest.mark.parametrize("by, expected, walls", [("alpha", [2, 0, 2, 3], [0, 0.5, 0, 0.5]),
                                                 ("weight", [8, 0, 4, 3], [0, 1, 0, 0])])
def test_density_by_hand(by, expected, walls):
    alphas = torch.tensor([[0.5, 0.0, 0.5, 0.75]], dtype=F64)              # T = 1, 1/2, 1/2, 1/4
    deltas = torch.tensor([[1.0, 2.0, 0.5, 0.25]], dtype=F64)
    expected = torch.tensor([expected], dtype=F64)
    p = ray_density(sigmas_of(alphas, deltas), edges_of(deltas), by)
    assert close(p, expected / expected.sum(), atol=1e-8, rtol=0)
    two = ray_density(torch.tensor([[0, 1e6, 0, 1e6]]), edges_of(torch.ones(1, 4)), by)
    assert close(two, torch.tensor([walls]).float())        # the two walls of the docstring


def test_entropy_by_hand():
    spikes = torch.eye(9)[[0, 4, 8]]
    assert entropy(spikes).abs().max() < 1e-6
    edges = torch.linspace(2, 5, 65, dtype=F64)[None]
    for k in (2, 3, 8, 64):                                 # 64: an even fog, the most there is
        alphas = torch.zeros(1, 64, dtype=F64)
        alphas[0, torch.randperm(64)[:k]] = 0.3
        found = bits(sigmas_of(alphas, 3 / 64), edges)
        assert float(found) == pytest.approx(math.log2(k), abs=1e-6)
    assert float(entropy(torch.tensor([[0.5, 0.25, 0.25]]))) == pytest.approx(1.5, abs=1e-6)
    assert (entropy(normalize(torch.rand(50, 7), p=1, dim=1)) < math.log2(7)).all()


@pytest.mark.parametrize("S, share, H, slope, alone", [(32, 0.19, 2.4, 1.8, 1),
                                                      (64, 0.10, 2.9, 1.3, 2),
                                                      (128, 0.06, 3.5, 0.8, 3)])
def test_the_example_of_the_number_of_samples(S, share, H, slope, alone):
    """Numbers of entropy's docstring: a wall 1/16 thick, in fog of sigma 0.5."""
    edges = torch.linspace(0, 1, S + 1, dtype=F64)[None]
    wall = torch.arange(S) * 16 // S == 8
    fog = torch.tensor(0.5, dtype=F64, requires_grad=True)
    sigmas = torch.where(wall, 1e6, fog)[None]
    p = ray_density(sigmas, edges)
    d_fog, = torch.autograd.grad(entropy(p).sum(), fog)
    p, sigmas = p.detach(), sigmas.detach()
    assert float(p[0, ~wall].sum()) == pytest.approx(share, abs=0.005)
    assert float(entropy(p)) == pytest.approx(H, abs=0.05)
    assert float(d_fog) == pytest.approx(slope, abs=0.05)
    assert float(bits(sigmas * wall, edges)) == pytest.approx(alone, abs=1e-6)


def test_halving_all_alphas_leaves_the_entropy():
    alphas, deltas = torch.rand(20, 16, dtype=F64) * 0.9, torch.rand(20, 16, dtype=F64) + 0.1
    edges = edges_of(deltas)
    thick, thin = sigmas_of(alphas, deltas), sigmas_of(alphas / 2, deltas)
    assert close(bits(thick, edges), bits(thin, edges), atol=1e-6, rtol=0)
    assert (bits(thick, edges, "weight") - bits(thin, edges, "weight")).abs().mean() > 0.1


@pytest.mark.parametrize("by", ["alpha", "weight"])
def test_gradients_are_finite_where_there_is_nothing_or_too_much(by):
    """Rays with nothing, with intervals of no length, with huge densities, with both."""
    deltas, sigmas = torch.full((6, 8), 0.2), torch.rand(6, 8) * 5
    sigmas[0], sigmas[1, ::2], sigmas[2, 3] = 0, 0, 1e8
    deltas[3, 2:5], deltas[4] = 0, 0
    sigmas[5, 1:], deltas[5, -1] = 1e12, 0
    sigmas.requires_grad_()
    p = ray_density(sigmas, edges_of(deltas), by)
    assert close(p.sum(1), torch.tensor([0.0, 1, 1, 1, 0, 1]), atol=1e-5, rtol=0)
    for term in (entropy(p), kl_divergence(p, p.flip(0)), kl_divergence(p.flip(0), p)):
        gradient, = torch.autograd.grad(term.sum(), sigmas, retain_graph=True)
        assert term.isfinite().all() and gradient.isfinite().all()
    assert entropy(p)[0] == 0 and entropy(p)[4] == 0


def test_mask_by_hand():
    deltas = torch.ones(4, 2, dtype=F64)
    alphas = torch.tensor([[0.05, 0.06], [0.05, 0.04], [0.2, 0], [0, 0]], dtype=F64)
    sigmas, edges = sigmas_of(alphas, deltas).requires_grad_(), edges_of(deltas)
    assert ray_mask(sigmas, edges, 0.1).tolist() == [1, 0, 1, 0]
    assert ray_mask(sigmas, edges, 0.15).tolist() == [0, 0, 1, 0]
    assert ray_mask(sigmas, edges, 0.0).tolist() == [1, 1, 1, 0]
    assert not ray_mask(sigmas, edges, 0.1).requires_grad


def test_divergence_by_hand():
    p = torch.tensor([[0.5, 0.5]], requires_grad=True)
    q = torch.tensor([[0.25, 0.75]], requires_grad=True)
    one, other = kl_divergence(p, q), kl_divergence(q, p)
    assert one.item() == pytest.approx(0.5 + 0.5 * math.log2(2 / 3), abs=1e-6)             # 0.21
    assert other.item() == pytest.approx(-0.25 + 0.75 * math.log2(1.5), abs=1e-6)
    d_p, d_q = torch.autograd.grad(one.sum() * math.log(2), (p, q))        # ln p/q + 1, -p/q
    assert close(d_p, torch.tensor([[math.log(2) + 1, math.log(2 / 3) + 1]]))
    assert close(d_q, torch.tensor([[-2.0, -2 / 3]]))
    p = normalize(torch.rand(30, 8), p=1, dim=1)
    assert kl_divergence(p, p).abs().max() == 0 and (kl_divergence(p, p.flip(0)) > -1e-6).all()


def test_divergence_of_empty_rays():
    spike, empty, even = torch.tensor([[0.0, 1, 0, 0]]), torch.zeros(1, 4), torch.full((1, 4), 0.25)
    assert float(kl_divergence(empty, even).abs()) < 1e-7
    assert float(kl_divergence(spike, empty)) == pytest.approx(math.log2(1e10), rel=1e-4)  # 33.2


@pytest.mark.parametrize("degrees", [0.0, 5.0, 40.0])
def test_rotated_rays_go_round_the_centre(degrees, monkeypatch):
    o, d = torch.randn(500, 3) * 3, normalize(torch.randn(500, 3), dim=-1)
    u, centre = torch.rand(500, 3), torch.tensor([1.0, -2.0, 0.5])
    monkeypatch.setattr(torch, "rand_like", lambda x: u)
    o2, d2 = inf.rotate_rays(o, d, centre, degrees)
    w, eye = torch.deg2rad((2 * u - 1) * degrees), torch.eye(3).expand(500, 3, 3)
    R = torch.linalg.matrix_exp(torch.linalg.cross(w[:, None], eye).mT)    # of v -> w x v
    assert close(d2, (R @ d[..., None])[..., 0], atol=1e-5, rtol=0)
    assert close(o2, centre + (R @ (o - centre)[..., None])[..., 0], atol=1e-5, rtol=0)
    angle = torch.rad2deg((d * d2).sum(1).clamp(-1, 1).acos())
    assert angle.max() <= 1.01 * 3 ** 0.5 * degrees + 0.1 and angle.max() >= degrees


# ---------------------------------------------------------------------------------------- cameras

def assert_cameras(c2w):
    """Proper rotations."""
    eye = torch.eye(3).expand(len(c2w), 3, 3)
    assert close(c2w[:, :, :3] @ c2w[:, :, :3].mT, eye, atol=1e-5, rtol=0)
    assert close(torch.linalg.det(c2w[:, :, :3]), torch.ones(len(c2w)), atol=1e-5, rtol=0)


def test_unseen_cameras_on_the_sphere():
    scene = some_scene()
    poses, middle = inf.unseen_poses(scene, 4000), scene.aabb.mean(0)
    out = poses[:, :, 3] - middle
    radius = (scene.train.c2w[:, :, 3] - middle).norm(dim=1).mean()
    assert_cameras(poses)
    assert close(out.norm(dim=1), radius.expand(4000))
    assert close(poses[:, :, 2], out / radius, atol=1e-5, rtol=0)          # they look at the middle
    assert poses[:, 2, 0].abs().max() < 1e-5 and (poses[:, 2, 1] > 0).all()    # a level horizon
    height, turn = out[:, 2] / radius, torch.atan2(out[:, 1], out[:, 0])
    for share in (0.0, 0.25, 0.5, 0.75):                    # equal area: heights are uniform
        assert float(height.quantile(share)) == pytest.approx(0.98 * share, abs=0.03)
        assert float(turn.quantile(share)) == pytest.approx((2 * share - 1) * math.pi, abs=0.15)


@pytest.mark.parametrize("kind", ["dtu", "llff"])
def test_unseen_cameras_between_two_training_cameras(kind):
    scene = some_scene(V=2, kind=kind)
    (a, b), poses = scene.train.c2w, inf.unseen_poses(scene, 600)
    assert_cameras(poses)
    along = (b - a)[:, 3]
    s = ((poses[:, :, 3] - a[:, 3]) @ along / along.square().sum())[:, None]
    assert s.min() > -1e-5 and s.max() < 1 + 1e-5 and s.std() == pytest.approx(12 ** -0.5, abs=0.02)
    assert close(poses[:, :, 3], a[:, 3] + s * along, atol=1e-4, rtol=0)
    back = normalize(torch.lerp(a[:, 2], b[:, 2], s), dim=-1)
    assert close(poses[:, :, 2], back, atol=1e-4, rtol=0)
    one = some_scene(V=1, kind=kind)                        # there is no other place
    assert close(inf.unseen_poses(one, 5), one.train.c2w.expand(5, 3, 4), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind, default", [("blender", [26, 86, 2, 55]), ("dtu", [19, 21, 24]),
                                           ("builtin", [26, 86, 2, 55]), ("llff", [])])
def test_choose_views(kind, default):
    def choose(V=100, views=(), **flags):
        return inf.choose_views(args(views=views, **flags), some_scene(V=V, kind=kind))
    count, position = len(default) or 3, some_scene(V=100, kind=kind).train.c2w[:, :, 3].tolist()
    assert choose(views=(7, 99, 0)) == [7, 99, 0] and choose() == choose(num_views=count)
    for views in ((), (9, 3)):
        expected = list(views or default or [0])
        while len(expected) < 12:                           # slow: the camera farthest from those
            gap = [min(math.dist(x, position[k]) for k in expected) for x in position]
            expected.append(gap.index(max(gap)))
        for n in range(1, 13):
            assert choose(views=views, num_views=n) == expected[:n]
    drawn = [choose(view_seed=seed, num_views=8) for seed in (0, 1, 1)]
    assert drawn[0] != drawn[1] == drawn[2] and len(set(drawn[0])) == 8
    assert drawn[0][:count] == choose(view_seed=0)
    for V in (1, 2, 5, 60):                                 # a small scene has default views, too
        few = choose(V)
        assert len(set(few)) == len(few) == min(V, count) and max(few) < V


def test_dtu_pictures_of_the_paper():
    """Indices of the default views count training views only; the pictures are 22, 25 and 28."""
    views = common.join_views(some_scene(V=40).train, some_scene(V=9).train)
    train, _ = common.hold_out(replace(views, names=[f"{v:06d}.png" for v in range(49)]), "here")
    names = [train.names[v] for v in inf.DEFAULT_VIEWS["dtu"]]
    assert names == ["000022.png", "000025.png", "000028.png"]


def test_sample_pixels():
    for middle, first, last in ((False, [0, 0], [15, 11]), (True, [4, 3], [11, 8])):
        xy = inf.sample_pixels(40_000, some_scene().train, middle) - 0.5
        assert xy.amin(0).tolist() == first and xy.amax(0).tolist() == last
        pixels, counts = xy.unique(dim=0, return_counts=True)
        assert len(pixels) == (48 if middle else 192) and (pixels == pixels.round()).all()
        expected = 40_000 / len(pixels)
        assert ((counts - expected).abs() < 6 * expected ** 0.5).all()


# ------------------------------------------------------------------- intervals, fields, rendering

class MadeUp:
    """A field: density as a function of x, and smooth colours, in any dtype."""
    def __init__(self, sigma=lambda x: (x.sin().sum(-1) + 1.5).clamp(min=0)):
        self.sigma = sigma

    def encode(self, x):
        return self.sigma(x), x

    def colour(self, x, d):
        return torch.sigmoid(2 * x + d.roll(1, -1))


def test_intervals_fill_the_ray_s_part_of_the_box():
    scene = some_scene()
    middle = scene.aabb.mean(0)
    o = middle + torch.randn(300, 3) * 3
    rays = o, normalize(middle + torch.randn(300, 3) - o, dim=-1)
    box = common.ray_box(*rays, scene.aabb, scene.near, scene.far)
    _, even = inf.sample_along_rays(None, *rays, scene, args(samples=8), None)
    width = box.diff(dim=1) / 8
    assert close(even.diff(dim=1), width.expand(-1, 8), atol=1e-5, rtol=1e-4)
    jitter = torch.rand(300)
    coarse, moved = inf.sample_along_rays(None, *rays, scene, args(samples=8), jitter)
    assert torch.equal(coarse, moved) and torch.equal(moved[:, [0, -1]], box)
    shift = (jitter - 0.5)[:, None] * width
    assert close(moved[:, 1:-1], even[:, 1:-1] + shift, atol=1e-4, rtol=0)
    assert 20 < (width == 0).sum() < 280                                   # some rays miss the box


def test_fine_intervals_are_where_the_coarse_field_has_weight():
    scene = some_scene()
    o, d = torch.tensor([[5.0, 0, 0]]), torch.tensor([[-1.0, 0, 0]])       # x = 1 is at t = 4
    fields = {"coarse": MadeUp(lambda x: 40.0 * (x[:, 0] < 1.0))}
    ar = args(samples=16, fine_samples=24)
    coarse, fine = inf.sample_along_rays(fields, o, d, scene, ar, torch.rand(1))
    assert coarse.shape == (1, 17) and fine.shape == (1, 41) and (fine.diff(dim=1) >= 0).all()
    assert all((fine == edge).any() for edge in coarse[0])                 # the paper's union
    width = 3 / 16
    assert ((fine > 4 - 1.5 * width) & (fine < 4 + 2.5 * width)).sum() >= 20


def test_render_against_a_slow_loop():
    R, S, field = 5, 7, MadeUp()
    o, d = torch.randn(R, 3, dtype=F64), normalize(torch.randn(R, 3, dtype=F64), dim=-1)
    t = (torch.rand(R, S + 1, dtype=F64) * 3).sort(1).values
    bg = torch.rand(R, 3, dtype=F64)
    out = inf.render(field, o, d, t, bg)
    for r in range(R):
        T, rgb, opacity, depth = 1.0, torch.zeros(3, dtype=F64), 0.0, 0.0
        for i in range(S):
            middle = (t[r, i] + t[r, i + 1]) / 2
            x = (o[r] + middle * d[r])[None]
            sigma = field.sigma(x)
            alpha = 1 - float(torch.exp(-sigma * (t[r, i + 1] - t[r, i])))
            rgb, opacity = rgb + T * alpha * field.colour(x, d[r][None])[0], opacity + T * alpha
            depth, T = depth + T * alpha * float(middle), T * (1 - alpha)
            assert float(out["sigmas"][r, i]) == pytest.approx(float(sigma))
        assert close(out["rgb"][r], rgb + (1 - opacity) * bg[r])
        assert float(out["opacity"][r]) == pytest.approx(opacity)
        assert float(out["depth"][r]) == pytest.approx(depth)


def test_the_last_interval_is_finite():
    """Density in the last 0.3 of the ray only: an opacity of 1 - exp(-0.7 * 0.3), not 1."""
    scene, field = some_scene(), MadeUp(lambda x: 0.7 * (x[:, 0] < -0.7))
    o, d = torch.tensor([[5.0, 0, 0], [8.0, 0, 0]]), torch.tensor([[-1.0, 0, 0], [1.0, 0, 0]])
    _, edges = inf.sample_along_rays(None, o, d, scene, args(samples=10), None)
    out = inf.render(field, o, d, edges, scene.bg)
    alpha = 1 - math.exp(-0.7 * 0.3)                                       # the box is 3 long
    assert out["opacity"].tolist() == pytest.approx([alpha, 0], abs=1e-5)
    assert float(out["depth"][0]) == pytest.approx(alpha * (6 - 0.15), abs=1e-4)
    assert torch.equal(out["rgb"][1], scene.bg)                            # this one misses the box


@pytest.mark.parametrize("kind", ["hash", "mlp"])
def test_fields(kind):
    field = inf.MLPField() if kind == "mlp" else inf.HashField(some_scene().aabb, 32)
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            parameter.normal_(std=3.0 if name == "table" else 0.1)
    assert kind == "mlp" or field.levels.resolutions[::5] == (8, 32)       # coarsest and finest
    x, d = torch.rand(500, 3) * 2 - 0.8, normalize(torch.randn(500, 3), dim=-1)
    sigmas, features = field.encode(x)
    rgbs = field.colour(features, d)
    assert sigmas.shape == (500,) and (sigmas >= 0).all() and sigmas.max() > 1.2 * sigmas.mean()
    assert rgbs.shape == (500, 3) and rgbs.min() >= 0 and rgbs.max() <= 1 and rgbs.std() > 1e-3
    assert (field.colour(features, -d) - rgbs).abs().max() > 1e-4          # colour sees d
    (sigmas.sum() + rgbs.sum()).backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in field.parameters())


def test_mlp_is_nerf_s():
    """63 -> 8 layers of 256, the sixth of which sees the 63 again -> 1 and 256; 283 -> 128 -> 3."""
    field = inf.MLPField()
    assert sum(parameter.numel() for parameter in field.parameters()) == 595_844
    for seed in range(4):                                   # born with density nearly everywhere
        torch.manual_seed(seed)
        sigmas, _ = inf.MLPField().encode(torch.rand(200, 3) * 3 - 1.5)
        assert (sigmas > 0).float().mean() > 0.5, seed
    v = [0.3, -1.0, 2.0]
    expected = v + [f(2 ** k * x) for f in (math.sin, math.cos) for k in range(3) for x in v]
    assert close(inf.positional_encoding(torch.tensor([v]), 3), torch.tensor([expected]))


# ------------------------------------------------------------------------------ scores and guards

def test_render_image_is_render_in_chunks():
    scene, fields = some_scene(), {"fine": MadeUp()}
    whole, parts = (inf.render_image(fields, scene, scene.test, 3, args(), chunk)
                    for chunk in (10_000, 50))
    assert all(close(whole[name], parts[name]) for name in whole)
    rays = [ray[7 * 16 + 3][None] for ray in common.view_rays(scene.test, 3, False)]
    _, edges = inf.sample_along_rays(fields, *rays, scene, args(), None)
    one = inf.render(fields["fine"], *rays, edges, scene.bg)
    assert close(one["rgb"][0], whole["rgb"][7, 3]) and close(one["depth"][0], whole["depth"][7, 3])
    assert close(bits(one["sigmas"], edges)[0], whole["entropy"][7, 3])


def test_evaluate_by_hand(monkeypatch):
    """Two images, wrong by 0.1 and 0.01 in the mask on the left, by 0.4 and 0.04 outside; the
    object, of opacity 0.9, is the upper quarter on the left."""
    scene = some_scene(T=2)
    target = torch.rand(2, 12, 16, 3) * 0.3 + 0.2
    row, column = torch.meshgrid(torch.arange(12), torch.arange(16), indexing="ij")
    left, upper = column < 8, (row < 3) & (column < 8)
    mask, alpha = (x.float().expand(2, 12, 16) for x in (left, upper))
    scene = replace(scene, test=replace(scene.test, images=target, mask=mask, alpha=alpha))

    def image(fields, scene, views, v, ar):
        wrong = (0.1, 0.01)[v] * (1 + 3 * ~left)[..., None]
        return {"rgb": target[v] + wrong, "opacity": torch.where(upper, 0.9, 0.05 + 0.02 * v),
                "depth": target[v, ..., 0], "entropy": torch.where(left, 2.0 + v, 7.0)}
    monkeypatch.setattr(inf, "render_image", image)
    scores = inf.evaluate(None, scene, args(), None)
    assert scores["psnr_masked"] == pytest.approx(30, abs=1e-3)            # the mean of 20 and 40
    per_image = [-10 * math.log10((1 + 16) / 2 * error ** 2) for error in (0.1, 0.01)]
    assert scores["psnr"] == pytest.approx(np.mean(per_image), abs=1e-3)
    assert scores["entropy_bits"] == pytest.approx(2.5)                    # where opacity > 0.1
    assert scores["opacity_on_object"] == pytest.approx(0.9)
    assert scores["opacity_off_object"] == pytest.approx(0.06)
    assert scores["opacity"] == pytest.approx((0.9 + 7 * 0.06) / 8) and 0 < scores["ssim"] < 1
    plain = replace(scene, test=replace(scene.test, mask=None, alpha=None))
    assert inf.evaluate(None, plain, args(), 1).keys() == {"psnr", "ssim", "opacity",
                                                           "entropy_bits"}


@pytest.mark.parametrize("T, views, expected", [(25, None, range(25)), (46, None, range(46)),
                                                (200, None, range(0, 200, 8)), (5, 2, (0, 4)),
                                                (200, 3, (0, 96, 192)), (2, 5, (0, 1))])
def test_test_images_that_are_scored(monkeypatch, T, views, expected):
    seen, flat = [], torch.zeros(12, 16)
    out = {"rgb": torch.zeros(12, 16, 3), "opacity": flat, "entropy": flat}
    monkeypatch.setattr(inf, "render_image", lambda f, s, views, v, a: seen.append(v) or out)
    inf.evaluate(None, some_scene(V=1, T=T), args(), views)
    assert seen == list(expected)


def test_ray_picture_shows_where_the_rays_end():
    """Cameras above opaque ground, z < 0: only intervals in it are lit, and all alike; most rays of
    a wide view miss the box."""
    scene = some_scene()
    K = scene.test.K * torch.tensor([0.2, 1, 1])[:, None]
    scene = replace(scene, test=replace(scene.test, K=K))
    fields, ar = {"fine": MadeUp(lambda x: 1e4 * (x[:, 2] < 0))}, args(samples=40)
    picture = inf.ray_picture(fields, scene, ar)[::3, ::3].flip(0).transpose(0, 1)
    rays = [ray.view(12, 16, 3)[6] for ray in common.view_rays(scene.test, 0, False)]
    _, edges = inf.sample_along_rays(fields, *rays, scene, ar, None)
    z = rays[0][:, 2:] + 0.5 * (edges[:, 1:] + edges[:, :-1]) * rays[1][:, 2:]     # (16, 40)
    hit = (z < 0) & (edges.diff(dim=1) > 0)
    assert 2 < hit.any(1).sum() < 15 and not hit.all(1).any()
    assert close(picture, common.colour_map(hit.float(), 0, 1), atol=1e-3, rtol=0)


ALPHA = torch.tensor([0.0, 1.0]).repeat(50)


@pytest.mark.parametrize("on, off, word", [
    (1e-5, 1e-5, "emptying"), (0.4, 0.0, "emptying"),
    (0.45, 0.45, "emptying"),                               # an emptied field, hidden by fog
    (0.6, 0.6, "uniform fog"), (0.8, 0.75, "uniform fog"),  # a moderate fog, what it may hide
    (0.999, 0.999, "uniform fog")])                         # a wall before the cameras
def test_a_collapsed_field_is_stopped(on, off, word):
    opacity = torch.where(ALPHA == 1, on, off)
    with pytest.raises(common.UserError) as error:
        inf.check_opacity(opacity, ALPHA, 321)
    for word in (word, "step 321", "--entropy-weight", f"{on:.2f} on the obj", f"{off:.2f} off it"):
        assert word in str(error.value)
    inf.check_opacity(opacity, ALPHA, 199)                  # every field starts as fog
    inf.check_opacity(opacity[:4], ALPHA[:4], 321)          # four rays say nothing


def test_fog_beside_the_object_is_noted(capsys):
    for off, noted in ((0.5, True), (0.31, True), (0.1, False), (0.0, False)):
        inf.check_opacity(torch.where(ALPHA == 1, 0.9, off), ALPHA, 500)
        said = capsys.readouterr().err
        assert (f"{off:.2f} off it" in said) == ("note: fog beside the object" in said) == noted
    for alpha in (torch.ones(100), None):                   # nothing is beside it; a photograph
        inf.check_opacity(torch.ones(100), alpha, 500)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------- training

def quick(scene, out, **more):
    return args(**{**dict(scene=str(scene), steps=4, eval_every=2, out=str(out)), **more})


def spy(monkeypatch, scene, out, **more):
    """Of each training step, lists of (words, result) by function name, and what was logged."""
    steps, log = [{}], common.TrainingRun.log

    def recorded(name, function):
        def call(*words):
            result = function(*words)
            if torch.is_grad_enabled():
                steps[-1].setdefault(name, []).append((words, result))
            return result
        return call

    def logged(run, **values):
        steps[-1]["log"] = {name: value.item() for name, value in values.items()}
        steps.append({})
        log(run, **values)
    with monkeypatch.context() as patch:
        for name in ("camera_rays", "render", "query", "ray_density", "unseen_poses", "rotate_rays",
                     "random_background", "sample_pixels", "sample_unseen_rays"):
            patch.setattr(inf, name, recorded(name, getattr(inf, name)))
        patch.setattr(common.TrainingRun, "log", logged)
        inf.train(quick(scene, out, **more))
    return steps[:-1]


def seen_mse(step, which=0):
    """The colour loss of a step, from the pixels that it drew and what it rendered."""
    (views, view, xy, _), _ = step["camera_rays"][0]
    x, y = xy.long().unbind(-1)
    target = views.images[view, y, x]
    if "random_background" in step:
        target, _ = step["random_background"][0][1]
    return ((step["render"][which][1]["rgb"] - target) ** 2).mean().item()


@pytest.mark.parametrize("flags", [{}, dict(ray_density="weight"), dict(kl_weight=0.0),
                                   dict(entropy_weight=0.0), dict(train_background="random"),
                                   dict(unseen_rays=0)])
def test_the_loss_is_what_the_docstring_says(tiny, tmp_path, monkeypatch, flags):
    """mse + lambda_1 mean M H + lambda_2 mean D over seen and unseen rays, masked ones counted."""
    ar = dict(entropy_weight=0.3, entropy_ramp=4, kl_weight=2.0, mask_threshold=0.9, lr=0.1,
              steps=6, eval_every=6, precrop_steps=2) | flags
    masks = []
    for t, step in enumerate(spy(monkeypatch, tiny, tmp_path / "a", **ar)):
        (words, out), (_, unseen) = step["render"][0], step["sample_unseen_rays"][0]
        rays = [torch.cat(pair) for pair in zip((*words[1:4], out["sigmas"]), unseen)]
        assert [len(x) for x in rays] == [96 + ar.get("unseen_rays", 64)] * 4
        poses = step["unseen_poses"][0][1]
        assert torch.equal(unseen[0], poses[:, :, 3])
        assert ((unseen[1] * -poses[:, :, 2]).sum(1) > 0.8).all()          # within the picture
        (words, p), *rest = step["ray_density"]
        assert torch.equal(words[0], rays[3]) and torch.equal(words[1], rays[2])
        assert torch.equal(p, ray_density(rays[3], rays[2], ar.get("ray_density", "alpha")))
        mask = ray_mask(rays[3], rays[2], 0.9)
        masks.append(mask)
        assert [words[2] for words, _ in step["sample_pixels"]] == [t < 2, False]
        H, D = (mask * entropy(p)).mean().item() * (ar["entropy_weight"] > 0), 0.0
        assert len(rest) == ("rotate_rays" in step) == (ar["kl_weight"] > 0)
        if rest:
            (turned, neighbours), (asked, found) = step["rotate_rays"][0], step["query"][-1]
            assert all(torch.equal(a, b) for a, b in zip(turned[:2], rays)) and turned[3] == 5.0
            assert asked[1] is neighbours[0] and asked[2] is neighbours[1]
            (words, q), = rest                              # at the same distances
            assert words[0] is found[0] and q.requires_grad
            assert torch.equal(asked[3], rays[2]) and torch.equal(words[1], rays[2])
            D = kl_divergence(p, q).mean().item()
        expected = seen_mse(step) + ar["entropy_weight"] * min(t / 4, 1) * H + ar["kl_weight"] * D
        found = [step["log"][name] for name in ("loss", "entropy", "kl")]
        assert found == pytest.approx([expected, H, D], rel=1e-5, abs=1e-7)
    assert 0 < torch.cat(masks).mean() < 1                  # some rays are masked


def test_baseline_draws_no_unseen_rays_and_learning_rate_by_hand(tiny, tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def noted(optimiser, *words):
        rates.append(optimiser.param_groups[0]["lr"])
        return step(optimiser, *words)
    monkeypatch.setattr(torch.optim.Adam, "step", noted)
    for calls in spy(monkeypatch, tiny, tmp_path / "a", steps=60, eval_every=60, lr=0.02,
                     lr_final=0.25, rays=16, entropy_weight=0.0, kl_weight=0.0):
        assert "unseen_poses" not in calls and len(calls["query"]) == 1
        assert calls["log"]["loss"] == pytest.approx(seen_mse(calls), rel=1e-5)
    expected = [0.02 * min((t + 1) / 50, 1) * 0.25 ** (t / 60) for t in range(60)]
    assert rates == pytest.approx(expected)


def test_the_coarse_field_learns_by_its_own_colour_only(tiny, tmp_path, monkeypatch):
    flags = dict(fine_samples=8, samples=8, field="mlp", steps=2, entropy_ramp=10 ** 9,
                 kl_weight=0.0)
    for step in spy(monkeypatch, tiny, tmp_path / "a", **flags):
        fine, coarse = (out["sigmas"].shape for _, out in step["render"])
        assert fine == (96, 16) and coarse == (96, 8)
        assert step["render"][0][0][0] is not step["render"][1][0][0]
        assert step["ray_density"][0][1].shape == (160, 16)
        expected = seen_mse(step) + seen_mse(step, 1)
        assert step["log"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_photographs_end_opaque(tmp_path, monkeypatch):
    """Another pixel's colour behind each ray, and 0.1 mean (1 - opacity)^2 in the loss."""
    write_llff(tmp_path / "line")
    flags, results = dict(size=16, views=(), num_views=3), []
    step = spy(monkeypatch, tmp_path / "line", tmp_path / "a", **flags)[0]
    words, (target, bg) = step["random_background"][0]
    out = step["render"][0][1]
    assert words[1] is None and bg.shape == (96, 3) and bg.std(0).max() > 0.05
    expected = seen_mse(step) + 0.1 * ((1 - out["opacity"]) ** 2).mean().item()
    assert step["log"]["loss"] == pytest.approx(expected + 0.0035 * step["log"]["kl"], rel=1e-5)
    for bg in ("white", "black"):
        results.append(inf.train(quick(tmp_path / "line", tmp_path / bg, background=bg, steps=60,
                                       eval_every=60, lr=0.02, rays=64, unseen_rays=16,
                                       video=bg == "white", **flags)))
    assert min(result["opacity"] for result in results) > 0.98, results
    assert abs(results[0]["psnr"] - results[1]["psnr"]) < 0.3, results
    assert iio.imread(tmp_path / "white/render.mp4", index=0).shape == (12, 16, 3)


def test_the_terms_lower_the_entropy(tiny, tmp_path):
    """Same seed, with and without: the rays of test views end in fewer places."""
    flags = dict(steps=100, eval_every=100, lr=0.02, kl_weight=0.0)
    without = inf.train(quick(tiny, tmp_path / "a", **flags, entropy_weight=0.0))
    term = inf.train(quick(tiny, tmp_path / "b", **flags, entropy_weight=0.03))
    assert term["entropy_bits"] < without["entropy_bits"] - 0.5, (term, without)
    assert min(term["psnr"], without["psnr"]) > 10


def test_an_absurd_weight_ends_in_a_named_collapse(tiny, tmp_path, monkeypatch, capsys):
    """Low entropy is cheap in a field with nothing in it: emptying, or empty."""
    flags = dict(TINY, scene=tiny, steps=400, eval_every=5, entropy_weight=1e3, lr=0.03,
                 lr_final=1.0, out=tmp_path / "a", kl_weight=0.0)
    outcome = command(inf, monkeypatch, capsys, *words_of(flags))
    assert_refused(outcome, "the field is em", "--entropy-weight")
    assert (tmp_path / "a/ckpt.pt").is_file() and not (tmp_path / "a/summary.json").exists()


@pytest.mark.parametrize("words", [
    "--rays 0", "--unseen-rays -1", "--samples 0", "--fine-samples -1", "--entropy-weight nan",
    "--entropy-ramp 0", "--kl-weight -0.1", "--kl-degrees inf", "--mask-threshold -1",
    "--precrop-steps -1", "--finest 7", "--lr 0", "--lr-final 0", "--num-views 0",
    "--num-views 21", "--views -1", "--views 3 4 3", "--view-seed 1 --views 3",
    "--ray-density sigma", "--field voxels"])
def test_wrong_flags_are_one_line(tiny, tmp_path, monkeypatch, capsys, words):
    outcome = command(inf, monkeypatch, capsys, "--scene", tiny, "--size", 24, "--out",
                      tmp_path / "a", *words.split())
    assert_refused(outcome, words.split()[0])


def test_presets(tiny, tmp_path):
    """They pass their own checks; the paper's, on small pictures, runs."""
    for name, preset in inf.PRESETS.items():
        inf.check(preset)
        assert preset.preset == name
    paper = replace(inf.PRESETS["paper"], scene=str(tiny), size=24, views=(2, 5), rays=16, steps=2,
                    unseen_rays=8, samples=4, fine_samples=8, out=str(tmp_path / "a"), device="cpu")
    assert math.isfinite(inf.train(paper)["psnr"])
