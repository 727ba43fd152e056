"""continual.py against known answers: sides and streams, what is stored and replayed, gradients,
measures, one step of each learner, training, resumed runs, the command line."""
import copy
import functools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import conftest  # noqa: E402
import continual as cl  # noqa: E402
from conftest import assert_refused, close, lines, real, words_of  # noqa: E402
from continual import Args, RayData, ReplayBuffer, Task, weighted_sample  # noqa: E402
from test_contract import assert_same_run, break_off_and_resume  # noqa: E402

F64 = torch.float64
TINY = dict(scene="bricks", size=16, steps=6, rays=64, log2_table=10, march_steps=24,
            mlp=(16, 2, 3), eval_every=4, eval_views=1, device="cpu")


@functools.lru_cache
def bricks():
    return common.load_scene("bricks", "data", 16)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    """Fixed random numbers, and the built-in scene drawn once."""
    torch.manual_seed(0)
    load = common.load_scene
    monkeypatch.setattr(cl, "load_scene", lambda name, *words, **more:
                        bricks() if name == "bricks" else load(name, *words, **more))


def args(**more):
    return replace(Args(), **{**TINY, **more})


def at(azimuth, elevation=20.0, radius=4.0):
    a, e = math.radians(azimuth), math.radians(elevation)
    return [radius * math.cos(a) * math.cos(e), radius * math.sin(a) * math.cos(e),
            radius * math.sin(e)]


def placed(*positions):
    """Cameras (V, 3, 4) there; where they look does not matter."""
    axes = torch.eye(3).expand(len(positions), 3, 3)
    return torch.cat([axes, torch.tensor(positions)[..., None]], -1)


def some_scene(train, test, images=None):
    """Cameras at these positions, each with its own K, look at the origin; pictures are noise."""
    V, (H, W) = len(train) + len(test), (12, 16)
    poses = [common.look_at(np.array(p), np.zeros(3)) for p in (*train, *test)]
    K = torch.tensor([[18.0, 0, 8], [0, 18.0, 6], [0, 0, 1]]).repeat(V, 1, 1)
    K[:, 0, 0] += torch.arange(V)
    if images is None:
        images = torch.rand(V, H, W, 3, generator=torch.Generator().manual_seed(3))
    alpha = torch.ones(V, H, W)
    views = common.Views(images, torch.tensor(np.stack(poses)).float(), K, alpha, None,
                         [f"v{v}" for v in range(V)])
    train, test = (common.pick_views(views, list(ids))
                   for ids in (range(len(train)), range(len(train), V)))
    return common.Scene("s", "blender", train, test, torch.tensor([[-1.5] * 3, [1.5] * 3]), 2.0,
                        6.0, torch.tensor([0.9, 0.5, 0.1]), False)


def ring(V=6, T=2, **more):
    generator = torch.Generator().manual_seed(5)
    places = [at(360 * float(a), 60 * float(b))
              for a, b in torch.rand(V + T, 2, generator=generator)]
    return some_scene(places[:V], places[V:], **more)


def data_of(ar, scene=None):
    """Rays of six views of 192 pixels, of which four belong to old tasks."""
    tasks = [Task([0, 2], [6]), Task([1, 5], [6]), Task([3, 4], [7])]
    return RayData(scene or ring(), tasks, ar)


# -------------------------------------------------------------------------- tasks and streams

def test_two_sides_are_the_signs_of_x():
    x = torch.cat([torch.randn(2000), torch.tensor([1e-10, -1e-10, 0.0, -0.0])])
    c2w = placed(*torch.stack([x, torch.randn_like(x), torch.rand_like(x)], -1).tolist())
    assert torch.equal(cl.cameras_of_side(c2w, 1, False), x > 0)
    assert torch.equal(cl.cameras_of_side(c2w, -1, False), x < 0)


@pytest.mark.parametrize("sign, middle", [(1, 0), (-1, 180)])
def test_hard_sides_have_margins(sign, middle):
    inside = placed(*[at(middle + a, e) for a in (-74.9, 0, 20, 74.9) for e in (-30, 0, 59.9)])
    outside = placed(*[at(middle + a) for a in (75.1, -75.1, 180)], at(middle + 10, 60.1))
    assert cl.cameras_of_side(inside, sign, True).all()
    assert not cl.cameras_of_side(outside, sign, True).any()


def test_tasks_point_into_training_then_test_views():
    scene = some_scene([at(0), at(170), at(70), at(80), at(-100), at(10, 65), at(190)],
                       [at(100), at(-60), at(180), at(30, 70)])
    assert cl.make_tasks(scene, args(split="released")) == [Task([0, 2, 3, 5], [8, 10]),
                                                            Task([1, 4, 6], [7, 9])]
    assert cl.make_tasks(scene, args(split="hard")) == [Task([0, 2], [8]), Task([1, 6], [9])]


def test_real_lego_splits_42_to_58():
    folder = Path(real("nerf_synthetic/lego")) / "nerf_synthetic/lego"

    def positions(split):
        frames = json.loads((folder / f"transforms_{split}.json").read_text())["frames"]
        return [[row[3] for row in frame["transform_matrix"][:3]] for frame in frames]
    scene = some_scene(positions("train"), positions("test"))
    tasks = cl.make_tasks(scene, args(split="released"))
    assert [len(task.trained) for task in tasks] == [42, 58]
    hard = cl.make_tasks(scene, args(split="hard"))
    for a, b in zip(hard, tasks):
        assert set(a.trained) < set(b.trained) and set(a.held_out) < set(b.held_out)


@pytest.mark.parametrize("train, test", [([0, 10], [0, 180]), ([0, 180], [20, 5])])
def test_tasks_without_views_are_refused(train, test):
    with pytest.raises(common.UserError, match="--split hard"):
        cl.make_tasks(some_scene([at(a) for a in train], [at(a) for a in test]), args())


@pytest.mark.parametrize("V, chunk, sizes", [(23, 5, [5, 5, 5, 5, 3]), (23, 12, [12, 11]),
                                             (9, 3, [3] * 3), (31, 10, [10, 10, 10]),
                                             (22, 10, [10, 10])])
def test_chunks_of_a_stream(V, chunk, sizes):
    scene = ring(V, 4)
    chunks = torch.tensor(cl.smooth_order(scene.train.c2w[:, :, 3]))[:sum(sizes)].split(sizes)
    for task, frames in zip(cl.make_tasks(scene, args(stream=True, chunk=chunk)), chunks,
                            strict=True):
        held_out = [v for i, v in enumerate(frames.tolist()) if i in (2, 7, 12)]
        assert task.held_out == held_out
        assert task.trained == [v for v in frames.tolist() if v not in held_out]


@pytest.mark.parametrize("V, chunk", [(20, 20), (20, 18), (20, 2), (2, 3)])
def test_chunks_that_make_no_stream_are_refused(V, chunk):
    with pytest.raises(common.UserError, match=f"--chunk {chunk}"):
        cl.make_tasks(ring(V, 4), args(stream=True, chunk=chunk))


def test_nearest_neighbour_order():
    line = torch.tensor([[0.0, 0, 0], [10, 0, 0], [1, 0, 0], [9, 0, 0], [2, 0, 0]])
    assert cl.smooth_order(line) == [0, 2, 4, 3, 1]
    assert sorted(cl.smooth_order(torch.zeros(5, 3))) == list(range(5))


# ------------------------------------------------------------------------ a weighted sample

def test_weighted_sample():
    """The example; each index once; zeros last."""
    found = torch.zeros(3)
    for _ in range(4000):
        found[weighted_sample(torch.tensor([0.8, 0.1, 0.1]), 2)] += 1
    assert close(found / 4000, torch.tensor([0.978, 0.511, 0.511]), atol=0.03, rtol=0)
    for B, n in ((1, 1), (50, 0), (50, 7), (50, 50)):
        assert len(weighted_sample(torch.rand(B), n).unique()) == n
    p = torch.zeros(40)
    p[[3, 17, 29]] = torch.tensor([1e-6, 1.0, 1e6])
    drawn = weighted_sample(p, 5)
    assert set(drawn[:3].tolist()) == {3, 17, 29} and len(drawn.unique()) == 5


# ------------------------------------------------------------------------ the replay buffer

H, W = 6, 10


@functools.lru_cache
def six_views():
    return data_of(args())


def buffer_of(size, fill="random", draw="random"):
    """An empty buffer with so many places."""
    buffer = ReplayBuffer(args(buffer_fill=fill, buffer_draw=draw), six_views())
    buffer.size = size
    return buffer


def rays(*views):
    """All rays of these pictures: id, rgb and loss that follow from id."""
    id = torch.cat([torch.arange(v * H * W, (v + 1) * H * W) for v in views])
    return id, *content_of(id)


def content_of(id):
    return (torch.stack([id % 256, id // 256, id * 7 % 256], -1) / 255,
            torch.frac(id.float() * 0.618034) + 0.01)


def assert_sound(buffer):
    """No ray twice, and each one with its own colour and loss."""
    assert len(buffer.ray_index.unique()) == len(buffer.ray_index) == len(buffer.rgb)
    assert (buffer.ray_index.dtype, buffer.rgb.dtype) == (torch.int32, torch.uint8)
    rgb, loss = content_of(buffer.ray_index.long())
    assert torch.equal(buffer.rgb.float(), (rgb * 255).round())
    assert buffer.loss is None or torch.equal(buffer.loss, loss)


def test_the_buffer_s_example():
    """The ten rays of the docstring."""
    loss = torch.tensor([1.0, 9, 2, 8, 3, 7, 4, 6, 5, 0])
    ten = torch.arange(10), torch.rand(10, 3), loss
    uniform, topk = buffer_of(4, "uniform"), buffer_of(4, "topk", "topk")
    uniform.add(*ten)
    assert uniform.ray_index.tolist() == [0, 2, 5, 7]
    topk.add(*ten)
    assert topk.ray_index.tolist() == [1, 3, 5, 7] and topk.loss.tolist() == [9, 8, 7, 6]
    assert topk.ray_index[topk.draw(2)].tolist() == [1, 3]
    topk.refresh(torch.tensor([2.0, 8.5]))
    assert topk.loss.tolist() == [2, 8.5, 7, 6] and topk.ray_index[topk.draw(2)].tolist() == [3, 5]
    uniform.add(torch.arange(10, 20), torch.rand(10, 3), loss)
    assert uniform.ray_index.tolist() == [0, 5, 10, 15]


@pytest.mark.parametrize("fill", ["random", "uniform", "topk"])
def test_a_buffer_is_full_and_holds_no_ray_twice(fill):
    small, large, seen = buffer_of(150, fill), buffer_of(10_000, fill), 0
    for views in ((0,), (5, 3), (2, 1, 4), (9,)):          # 60, 180, 360, 420 rays
        for buffer in (small, large):
            buffer.add(*rays(*views))
            assert_sound(buffer)
        seen += len(views) * H * W
        assert small.rays_seen == large.rays_seen == seen and len(small.ray_index) == min(150, seen)
    assert sorted(large.ray_index.tolist()) == sorted(rays(0, 5, 3, 2, 1, 4, 9)[0].tolist())


def test_random_fill_stores_every_ray_so_far_with_the_same_probability():
    """15, 15, 30 rays through 6 places: 0.1 for each ray."""
    found, trials = torch.zeros(60), 3000
    for _ in range(trials):
        buffer = buffer_of(6)
        for part in torch.arange(60).split([15, 15, 30]):
            buffer.add(part, torch.zeros(len(part), 3), torch.zeros(len(part)))
        found[buffer.ray_index.long()] += 1
    sd = math.sqrt(0.1 * 0.9 / trials)
    assert (found / trials - 0.1).abs().max() < 4.5 * sd
    mean = torch.stack([part.mean() for part in (found / trials).split([15, 15, 30])])
    assert (mean - 0.1).abs().max() < 4 * sd / math.sqrt(15)


@pytest.mark.parametrize("fill", ["random", "uniform"])
def test_tasks_share_the_places_in_proportion_to_their_rays(fill):
    buffer = buffer_of(96, fill)
    for views in ((0, 1, 2), (3,), (4, 5), (6, 7)):
        buffer.add(*rays(*views))
        new = sum(int((buffer.ray_index // (H * W) == v).sum()) for v in views)
        assert new == round(96 * len(views) * H * W / buffer.rays_seen)
    counts = (buffer.ray_index // (H * W)).bincount(minlength=8)
    assert counts.sum() == 96 and (counts - 12).abs().max() <= (0 if fill == "uniform" else 8)


def test_topk_fill_keeps_the_highest_losses_of_all_tasks():
    buffer, everything = buffer_of(70, "topk"), []
    for views in ((0,), (5, 3), (2, 1), (4,)):
        id, rgb, loss = rays(*views)
        buffer.add(id, rgb, loss)
        everything += list(zip(loss.tolist(), id.tolist()))
        hardest = {k for _, k in sorted(everything, reverse=True)[:70]}
        assert hardest == set(buffer.ray_index.tolist())
        assert_sound(buffer)


def filled(loss, draw="weighted"):
    """A buffer of rays 0, 1, ... with these losses."""
    buffer = buffer_of(len(loss), "topk", draw)
    buffer.add(torch.arange(len(loss)), torch.zeros(len(loss), 3), loss)
    return buffer


@pytest.mark.parametrize("how", ["random", "topk", "weighted"])
@pytest.mark.parametrize("n, B", [(1024, 3000), (100, 100), (500, 60), (1, 7)])
def test_a_draw_takes_no_ray_twice(how, n, B):
    buffer = filled(torch.rand(B), how)
    i = buffer.draw(n)
    assert i.shape == (min(n, B),) and len(i.unique()) == len(i) and 0 <= i.min() and i.max() < B
    if how == "topk":
        assert sorted(buffer.loss[i].tolist()) == sorted(buffer.loss.tolist())[-n:]


def test_weighted_draw_takes_820_by_loss_and_204_from_the_rest():
    high, rest = torch.randperm(3000).split([820, 2180])
    loss = torch.full((3000,), 1e-9)
    loss[high] = 1e3 + 1e6 * torch.rand(820)
    loss[rest[:1000]] *= 1e-3                              # the rest: uniform, whatever its loss
    buffer, found = filled(loss), torch.zeros(3000)
    for _ in range(60):
        id = buffer.ray_index[buffer.draw(1024)].long()
        assert set(id[:820].tolist()) == set(high.tolist()) and len(id.unique()) == 1024
        found[id[820:]] += 1
    sd = math.sqrt(0.094 * 0.906 / 60)
    assert found[high].sum() == 0 and (found[rest] / 60 - 204 / 2180).abs().max() < 5.5 * sd


# ----------------------------------------------------------------------- gradients, measures

def test_projected_gradients_do_no_harm():
    """Unchanged where both agree; else at right angles to the old one, and nearest to the new."""
    corrected = 0
    for _ in range(100):
        g, r = ([torch.randn(shape, dtype=F64) for shape in ((4, 3), (2, 2, 2))] for _ in range(2))
        result = cl.agem_project(g, r)
        a, b, c = (torch.cat([x.flatten() for x in xs]) for xs in (g, r, result))
        if a @ b >= 0:
            assert torch.equal(a, c)
            continue
        corrected += 1
        assert abs(c @ b) < 1e-12 and close(c, a - (a @ b) / (b @ b) * b)
    assert corrected > 30
    by_hand = cl.agem_project(torch.tensor([1.0, -3.0]).split(1), torch.ones(2).split(1))
    assert torch.cat(list(by_hand)).tolist() == [2, -2]
    assert torch.equal(cl.agem_project([torch.ones(2)], [torch.zeros(2)])[0], torch.ones(2))


def test_gauss_newton_diagonal_of_many_outputs_is_the_hessian_s():
    A, w = torch.randn(6, 3, 5, dtype=F64), torch.randn(5, dtype=F64, requires_grad=True)
    exact = torch.autograd.functional.hessian(lambda w: ((A @ w - 1) ** 2).mean(), w.detach())
    h, = cl.gauss_newton_diagonal(lambda: A @ w, [w], 4000)
    assert close(h, exact.diagonal(), rtol=0.1, atol=0)
    few, = cl.gauss_newton_diagonal(lambda: A @ w, [w], 1)
    assert not torch.allclose(few, exact.diagonal(), rtol=0.1)             # signs are random


def test_forgetting_and_backward_transfer_by_hand():
    assert cl.forgetting([[30.0, 20.0], [25.0, 30.0]]) == (5, -5)
    P = [[30.0, 50.0, 10.0], [32.0, 28.0, 12.0], [28.0, 31.0, 33.0]]       # 32 -> 28; 28 -> 31
    assert cl.forgetting(P) == pytest.approx((2.0, (-2 + 3) / 2))
    assert cl.forgetting(P[:1]) == cl.forgetting([]) == (None, None)
    assert cl.forgetting([[20.0, 0.0], [25.0, 30.0]]) == (0, 5)            # became better


def test_learning_rate_as_released():
    def rates(first):
        return [cl.learning_rate(args(lr=1.0, optimiser="continued"), first, step / 3200, step)
                for step in (24, 49, 51, 101, 201, 1600)]
    assert rates(True) == pytest.approx([0.5, 1, 0.5, 0.25, 0.125, 0.125])
    assert rates(False) == [0.125] * 6


# --------------------------------------------------------------------------------- rendering

def test_rays_of_pixels():
    data = data_of(args())
    for v in (0, 4, 7):
        id = data.all_rays([v])
        assert torch.equal(id, torch.arange(v * 192, (v + 1) * 192))
        for a, b in zip(data.rays(id.int()), common.view_rays(data.views, v, False)):
            assert torch.equal(a, b)
        assert torch.equal(data.pixels[id].view(12, 16, 3), data.views.images[v])
    id = data.draw([1, 4, 5], 3000)
    assert set((id // 192).tolist()) == {1, 4, 5} and len((id % 192).unique()) == 192
    assert (id // 192).bincount()[[1, 4, 5]].sub(1000).abs().max() < 120


def test_the_released_mlp():
    """8 layers of 256: the released model's 595 844 weights."""
    field = cl.MLPField(args(mlp=(256, 8, 10)), torch.zeros(2, 3))
    assert sum(p.numel() for p in field.parameters()) == 595_844
    assert [layer.in_features for layer in field.layers] == [63] + 3 * [256] + [319] + 3 * [256]
    x = torch.tensor([[0.3, -1.0, 2.0]])
    expected = torch.cat([x, x.sin(), (2 * x).sin(), x.cos(), (2 * x).cos()], 1)
    assert close(cl.frequencies(x, 2), expected)


@pytest.mark.parametrize("make", [cl.HashField, cl.MLPField])
def test_fields(make):
    """Density and feature of a place; every weight has a gradient."""
    field, x = make(args(), torch.tensor([[-1.5] * 3, [1.5] * 3])), torch.rand(40, 3) * 3 - 1.5
    with torch.no_grad():
        for weight in field.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    directions = field.encode_directions(nn.functional.normalize(torch.randn(40, 3), dim=-1))
    sigmas, feature = field.features(x)
    colour = field.colour(torch.cat([feature, directions], -1))
    assert sigmas.shape == (40,) and (sigmas >= 0).all() and sigmas.std() > 0
    assert colour.shape == (40, 3)
    gradients = torch.autograd.grad(sigmas.sum() + colour.sum(), list(field.parameters()))
    assert all(g.abs().max() > 0 for g in gradients)


class Fog(nn.Module):
    """The same density and colour everywhere."""
    def encode_directions(self, d):
        return d

    def features(self, x):
        return torch.full((len(x),), 0.5), x

    def colour(self, x):
        return torch.tensor([0.8, 0.6, 0.4]).logit().expand(len(x), 3)


def test_render_of_fog_by_hand():
    """rgb = (1 - exp(-sigma L)) colour + exp(-sigma L) background, L the length in the box."""
    data = data_of(args())
    data.views.K[0, :2, :2] /= 2                           # sees more than the box
    o, d = data.rays(torch.arange(192))
    model = cl.Model(args(march_steps=400), data.scene)
    model.field = Fog()
    t = torch.stack([(s * 1.5 - o) / d for s in (-1, 1)])
    length = (t.amax(0).amin(1).clamp(max=6) - t.amin(0).amax(1).clamp(min=2)).clamp(min=0)
    opacity = 1 - torch.exp(-0.5 * length)[:, None]
    assert 0 < (length == 0).sum() < len(o)
    for bg in (data.scene.bg, torch.rand(192, 3)):         # one for all rays, one for each ray
        out = cl.render(model, o, d, bg)
        expected = opacity * torch.tensor([0.8, 0.6, 0.4]) + (1 - opacity) * bg
        assert close(out["rgb"], expected, atol=5e-3, rtol=0)
        assert close(out["opacity"][:, None], opacity, atol=5e-3, rtol=0)


def test_samples_move_only_in_training():
    data = data_of(args())
    model = cl.Model(args(), data.scene)
    o, d = data.rays(data.all_rays([1]))
    still = [cl.render(model, o, d, data.scene.bg)["rgb"] for _ in range(2)]
    moved = [cl.render(model, o, d, data.scene.bg, torch.rand(192))["rgb"] for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*moved)
    view = cl.render_image(model, data, 1)
    assert view["rgb"].shape == (12, 16, 3) and view["depth"].shape == (12, 16)
    assert close(view["rgb"].view(-1, 3), still[0].clamp(0, 1)) and not view["rgb"].requires_grad


def test_evaluate_by_hand(monkeypatch):
    """View v is rendered with an error of 10^-(v/2): 10 v dB."""
    data, asked = data_of(args(), ring(images=torch.full((8, 12, 16, 3), 0.5))), []

    def image(model, data, v):
        asked.append(v)
        return {"rgb": data.views.images[v] + 10 ** (-v / 2), "opacity": torch.full((2,), v / 10)}
    monkeypatch.setattr(cl, "render_image", image)
    tasks = [Task([0, 1, 2], [4]), Task([3, 5], [6, 7])]
    scores = cl.evaluate(None, data, tasks, 9)
    assert scores["psnr_train"] == pytest.approx([10, 40], abs=1e-2)
    assert scores["psnr_heldout"] == pytest.approx([40, 65], abs=0.1)
    ssim = [float(common.ssim(image(None, data, v)["rgb"], data.views.images[v]))
            for v in (4, 6, 7)]
    assert scores["ssim"] == pytest.approx(sum(ssim) / 3)
    assert scores["opacity"] == pytest.approx((0.4 + 0.6 + 0.7) / 3)
    asked.clear()
    cl.evaluate(None, data, tasks, 2)
    assert sorted(asked) == [0, 2, 3, 4, 5, 6, 7]


# ------------------------------------------------------------------ one step of each learner

class Flat(nn.Module):
    """A model whose pictures have one colour."""
    def __init__(self, *colour):
        super().__init__()
        self.colour = nn.Parameter(torch.tensor(colour))


@pytest.fixture
def flat(monkeypatch):
    """View v has the colour 0.1 v, so that what is drawn shows in the loss. renders: what has been
    asked of cl.render: model, rays_o, whether samples move."""
    renders = []

    def render(model, rays_o, rays_d, bg, jitter=None):
        renders.append((model, rays_o, jitter is not None))
        R = len(rays_o)
        return {"rgb": model.colour.expand(R, 3), "opacity": torch.ones(R), "depth": torch.ones(R)}
    monkeypatch.setattr(cl, "render", render)
    images = (0.1 * torch.arange(8.0))[:, None, None, None].expand(8, 12, 16, 3).contiguous()
    return ring(images=images), renders


def learner_after(name, ar, scene, model, views, old_views=None):
    """A learner at the end of a task with these views, which `model` has learnt."""
    data = data_of(ar, scene)
    learner = cl.LEARNERS[name](ar, data, model)
    data.old_views = old_views or views
    learner.consolidate(model, views)
    return learner


def step(learner, model, views, n=8):
    id = learner.data.draw(views, n)
    batch = learner.data.render_and_loss(model, id, learner.data.pixels[id])
    return learner.backward(model, batch).item()


@pytest.mark.parametrize("name", ["naive", "joint"])
def test_naive_and_joint_learn_the_new_rays(flat, name):
    model = Flat(0.2, 0.2, 0.3)
    learner = learner_after(name, args(), flat[0], Flat(0.0, 0.0, 0.0), [0])
    assert step(learner, model, [4]) == pytest.approx((0.04 + 0.04 + 0.01) / 3)
    assert close(model.colour.grad, 2 / 3 * torch.tensor([-0.2, -0.2, -0.1]))
    tasks = [Task([0, 2], []), Task([1], []), Task([5], [])]
    assert cl.Naive.stages(None, tasks, 7) == [(0, [0, 2], 7), (1, [1], 7), (2, [5], 7)]
    assert cl.Joint.stages(None, tasks, 7) == [(2, [0, 2, 1, 5], 21)]


def test_distillation_ends_in_the_mean_of_both_targets(flat):
    old = torch.tensor([0.9, 0.5, 0.1])
    learner = learner_after("distill", args(), flat[0], Flat(*old.tolist()), [0, 1])
    model = Flat(0.5, 0.5, 0.5)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimiser.zero_grad()
        step(learner, model, [3])
        optimiser.step()
    assert close(model.colour.detach(), (0.3 + old) / 2, atol=1e-5, rtol=0)
    (new, new_o, moves), (asked, asked_o, asked_moves) = flat[1][-2:]      # the very same rays
    assert torch.equal(new_o, asked_o) and (moves, asked_moves) == (True, False)
    assert new is model and asked is learner.old_model


def test_replay_adds_the_loss_of_stored_rays(flat):
    ar, model = args(replay_weight=0.7), Flat(0.2, 0.2, 0.2)
    learner = learner_after("replay", ar, flat[0], Flat(0.5, 0.5, 0.5), [5])
    loss = step(learner, model, [4])                       # view 5 is stored as 128 of 255
    assert loss == pytest.approx(0.2 ** 2 + 0.7 * (128 / 255 - 0.2) ** 2, rel=1e-5)
    expected = 2 / 3 * ((0.2 - 0.4) + 0.7 * (0.2 - 128 / 255))
    assert close(model.colour.grad, torch.full((3,), expected))
    assert [len(o) for _, o, _ in flat[1]] == [8, 64] and flat[1][1][2]


def test_generative_replay_renders_old_cameras_with_the_old_model(flat):
    scene, renders = flat
    ar, model = args(replay_weight=0.7, rays=900), Flat(0.2, 0.2, 0.2)
    learner = learner_after("generative", ar, scene, Flat(0.9, 0.5, 0.1), [3], [0, 2, 3])
    expected = 0.2 ** 2 + 0.7 * (0.7 ** 2 + 0.3 ** 2 + 0.1 ** 2) / 3
    assert step(learner, model, [4]) == pytest.approx(expected, rel=1e-5)
    gradient = 2 / 3 * (-0.2 + 0.7 * (0.2 - torch.tensor([0.9, 0.5, 0.1])))
    assert close(model.colour.grad, gradient)
    (_, _, _), (asked, asked_o, asked_moves), (_, fit_o, moves) = renders
    assert asked is learner.old_model and torch.equal(asked_o, fit_o) and len(fit_o) == 900
    assert (asked_moves, moves) == (False, True)
    found = torch.cdist(fit_o, learner.data.views.c2w[:, :, 3]).argmin(1)
    assert set(found.tolist()) == {0, 2, 3}


def test_mixed_replays_half_and_half(flat):
    scene, renders = flat
    ar, model = args(replay_weight=0.7, rays=33), Flat(0.2, 0.2, 0.2)
    learner = learner_after("mixed", ar, scene, Flat(0.9, 0.5, 0.1), [5])
    generated, stored = (0.7 ** 2 + 0.3 ** 2 + 0.1 ** 2) / 3, (128 / 255 - 0.2) ** 2
    expected = 0.04 + 0.7 * (17 * generated + 16 * stored) / 33
    assert step(learner, model, [4]) == pytest.approx(expected, rel=1e-4)
    assert [len(o) for _, o, _ in renders] == [8, 17, 33]
    assert torch.equal(renders[1][1], renders[2][1][16:])
    buffer = learner.buffer                                # fewer stored: more of the other kind
    buffer.ray_index, buffer.rgb = buffer.ray_index[:5], buffer.rgb[:5]
    step(learner, model, [4])
    assert [len(o) for _, o, _ in renders[3:]] == [8, 28, 33]


@pytest.mark.parametrize("name", ["replay", "agem", "mixed"])
def test_refreshed_losses_are_errors_against_the_stored_colours(name):
    ar = args(buffer_draw="weighted", buffer_fill="topk", rays=32)
    scene, torch_rays = ring(), 16 if name == "mixed" else 32
    model = cl.Model(ar, scene)
    learner = learner_after(name, ar, scene, model, [0, 2])
    buffer = learner.buffer
    own = torch.stack([cl.render_image(model, learner.data, v)["rgb"] for v in range(3)])
    error = ((own.view(-1, 3) - learner.data.pixels[:3 * 192]) ** 2).mean(-1)
    assert close(buffer.loss, error[buffer.ray_index.long()])      # of the model after the task
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    before, fits, fit = buffer.loss.clone(), [], learner.data.render_and_loss
    learner.data.render_and_loss = lambda *words: (fits.append(fit(*words)), fits[-1])[1]
    step(learner, model, [3], 20)
    i, rgb = buffer.drawn, fits[-1]["rgb"][:len(buffer.drawn)].detach()
    expected = before.clone()
    expected[i] = ((rgb - buffer.rgb[i] / 255) ** 2).mean(1)
    assert len(i) == torch_rays and (expected - before)[i].abs().min() > 0
    assert close(buffer.loss, expected) and not buffer.loss.requires_grad


def test_with_soft_targets_losses_stay_errors_against_pictures(flat):
    """The unit that they are filled with. The stored colours are the model's own, and an error
    against these would be 0 at first."""
    ar = args(soft_targets=True, buffer_fill="topk", buffer_draw="topk", buffer_share=0.1)
    learner = learner_after("replay", ar, flat[0], Flat(0.8, 0.6, 0.4), [1, 5])
    buffer = learner.buffer
    assert (buffer.rgb == torch.tensor([204, 153, 102])).all()
    assert set((buffer.ray_index // 192).tolist()) == {1}         # the worse fit: 0.1 everywhere
    expected = torch.full((len(buffer.ray_index),), (0.49 + 0.25 + 0.09) / 3)
    assert close(buffer.loss, expected)
    loss = step(learner, Flat(0.2, 0.2, 0.2), [4])
    assert loss == pytest.approx(0.04 + (0.36 + 0.16 + 0.04) / 3, rel=1e-5)
    assert close(buffer.loss, expected)
    plain = learner_after("replay", args(soft_targets=True), flat[0], Flat(0.8, 0.6, 0.4), [1])
    assert plain.buffer.loss is None and (plain.buffer.rgb[:, 0] == 204).all()


def test_agem_by_hand(flat):
    """New pictures say -0.4, -0.4, +0.2 (2/3 of it), stored ones +0.4, 0, 0: the first channel
    gives way, the others stay."""
    scene, _ = flat
    learner = learner_after("agem", args(), scene, Flat(0.5, 0.5, 0.5), [0])
    learner.data.views.images[4] = torch.tensor([1.0, 1.0, 0.2])
    for stored, first in (((51, 153, 102), 0.0), ((255, 153, 102), -0.4)):
        learner.buffer.rgb[:] = torch.tensor(stored, dtype=torch.uint8)
        model = Flat(0.6, 0.6, 0.4)
        loss = step(learner, model, [4])                   # what is stored is not learnt
        assert loss == pytest.approx((0.16 + 0.16 + 0.04) / 3, rel=1e-4)
        expected = 2 / 3 * torch.tensor([first, -0.4, 0.2])
        assert close(model.colour.grad, expected, atol=1e-6, rtol=0)


def test_ewc_pulls_towards_the_old_weights(flat):
    """One colour for all n rays: 2 / (3 n) (sum of n signs)^2, 2/3 in the mean, for each channel.
    h adds up over the tasks; the weights that it pulls to are the newest."""
    scene, ar = flat[0], args(ewc_weight=0.5)
    learner = learner_after("ewc", ar, scene, Flat(0.8, 0.5, 0.1), [0, 1])
    once = learner.importance.colour.clone()
    assert once.min() > 0.05 and once.max() < 3
    learner.consolidate(Flat(0.7, 0.6, 0.2), [2])
    h = learner.importance.colour.clone()
    assert (h > once).all() and learner.old_model.colour.tolist() == pytest.approx([0.7, 0.6, 0.2])
    model, old = Flat(0.5, 0.5, 0.5), torch.tensor([0.7, 0.6, 0.2])
    expected = 0.01 + 0.5 * 0.5 * float((h * (0.5 - old) ** 2).sum())
    assert step(learner, model, [4]) == pytest.approx(expected, rel=1e-4)
    assert close(model.colour.grad, 2 / 3 * 0.1 + 0.5 * h * (0.5 - old))


@pytest.mark.parametrize("name", ["distill", "mixed", "ewc"])
def test_an_old_model_does_not_learn(name):
    ar, scene = args(), ring()
    model = cl.Model(ar, scene)
    learner = learner_after(name, ar, scene, model, [0, 2])
    before = copy.deepcopy(model.state_dict())
    assert close(learner.old_model.state_dict(), before, rtol=0, atol=0)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(3):
        model.sampler.prepare(model, 0)
        optimiser.zero_grad()
        step(learner, model, [3], 20)
        optimiser.step()
    assert close(learner.old_model.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(before["field.table"], model.field.table)


@pytest.mark.parametrize("alpha, flags, own", [(True, {}, False), (False, {}, True),
                                               (False, dict(train_background="scene"), False)])
def test_images_without_alpha_are_trained_on_random_backgrounds(monkeypatch, alpha, flags, own):
    """Behind each ray stands the target of another ray; with alpha, the scene's background."""
    seen, render, scene = [], cl.render, ring()
    monkeypatch.setattr(cl, "render", lambda model, o, d, bg, *words, **more:
                        (seen.append(bg), render(model, o, d, bg, *words, **more))[1])
    if not alpha:
        scene = replace(scene, train=replace(scene.train, alpha=None))
    data, id, target = data_of(args(**flags), scene), torch.arange(50), torch.rand(50, 3)
    out = data.render_and_loss(cl.Model(args(), scene), id, target)
    assert seen[-1].shape == ((50, 3) if own else (3,))
    if own:
        assert torch.equal(seen[-1].sort(0).values, target.sort(0).values)
        assert not torch.equal(seen[-1], target)
    error = ((out["rgb"] - target) ** 2).mean(-1)
    assert close(out["squared_error"], error.detach()) and close(out["loss"], error.mean())


# ---------------------------------------------------------------------------------- training

def quick(out, **more):
    return cl.train(args(out=str(out), **more))


def test_a_run_of_two_tasks(tmp_path, capsys):
    summary = quick(tmp_path / "a", learner="replay", steps=24, eval_every=10)
    names, printed = {path.name for path in (tmp_path / "a").iterdir()}, capsys.readouterr().out
    assert {"test_000.png", "test_001.png"} <= names
    P, curve = summary["P"]["psnr_heldout"], lines(tmp_path / "a/metrics.jsonl")
    assert [line["step"] for line in curve] == [10, 20, 24, 34, 44, 48] and summary["steps"] == 48
    assert [line["task"] for line in curve] == [1, 1, 1, 2, 2, 2]
    assert P == [curve[2]["psnr_heldout"], curve[5]["psnr_heldout"]]
    assert curve[2]["psnr"] == P[0][0] and summary["psnr"] == pytest.approx(sum(P[1]) / 2)
    assert (summary["forgetting"], summary["backward_transfer"]) == cl.forgetting(P)
    assert curve[2]["psnr_train"][0] > curve[0]["psnr_train"][0]             # it learns
    shown = "  ".join(f"{decibels:.2f}" for decibels in P[0])
    assert f"after task 1: psnr_heldout of each task [dB]  {shown}\n" in printed


def test_the_first_task_does_not_depend_on_the_learner(tmp_path):
    rows = [quick(tmp_path / name, learner=name)["P"]["psnr_train"]
            for name in ("naive", "distill", "replay", "agem")]
    assert all(row[0] == rows[0][0] for row in rows)
    assert len({json.dumps(row[1]) for row in rows}) == 4                  # four ways to go on


def test_replay_forgets_less_than_nothing_kept(tmp_path):
    """Small tables: the second side's rays overwrite what the first one stored."""
    flags = dict(steps=160, rays=128, lr=0.02, march_steps=32, eval_every=1000, eval_views=4)
    naive, replay = (quick(tmp_path / name, learner=name, **flags) for name in ("naive", "replay"))
    assert naive["forgetting_train"] > 0.4 and replay["forgetting_train"] < 0.3
    P, Q = naive["P"]["psnr_train"], replay["P"]["psnr_train"]
    assert Q[1][0] > P[1][0] + 0.8
    assert min(P[1][1], Q[1][1]) > P[0][1] + 3             # both learn the second side


def test_optimisers_start_afresh_or_go_on(monkeypatch, tmp_path):
    """Of every optimiser step: the rate, and how many steps Adam's moments had seen."""
    found, step = [], torch.optim.Adam.step

    def recorded(optimiser, *words, **more):
        group = optimiser.param_groups[0]
        state = optimiser.state.get(group["params"][0])
        found.append((group["lr"], int(state["step"]) if state else 0))
        return step(optimiser, *words, **more)
    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    warm = [0.01 * (t + 1) / 50 for t in range(6)]
    fresh = [a * (0.55 + 0.45 * math.cos(math.pi * t / 6)) for t, a in enumerate(warm)]
    stream = dict(stream=True, steps=48, chunk=51)
    for flags, rates, counts in (({}, fresh * 2, [*range(6)] * 2),
                                 (dict(optimiser="continued"), [0.01 / 8] * 6, [*range(12)]),
                                 (stream, warm + [0.01] * 6, [*range(12)])):
        found.clear()
        quick(tmp_path / str(len(flags)), learner="naive", **flags)
        assert [rate for rate, _ in found][-len(rates):] == pytest.approx(rates)
        assert [count for _, count in found] == counts


def test_joint_sees_as_many_rays_as_the_first_task_and_replay(tmp_path):
    quick(tmp_path / "a", learner="joint", eval_every=3)
    assert [line["rays"] for line in lines(tmp_path / "a/metrics.jsonl")] == [192, 384, 768, 1152]


def test_a_new_model_s_grid_is_evaluated_whole(monkeypatch, tmp_path):
    found, update = [], common.OccupancyGrid.update
    monkeypatch.setattr(common.OccupancyGrid, "update", lambda *words, warm:
                        (found.append(warm), update(*words, warm=warm))[1])
    quick(tmp_path / "a", learner="naive", steps=17)
    assert found == [True] * 2 + [False] * 2


# ----------------------------------------------------------------------- resumed, not harmed

FLAGS = {
    "mixed": dict(learner="mixed", buffer_fill="topk", buffer_draw="weighted"),
    "ewc, mlp": dict(learner="ewc", field="mlp", mlp=(16, 6, 3)),
    "generative, optimiser goes on": dict(learner="generative", optimiser="continued"),
    "stream, agem": dict(learner="agem", stream=True, chunk=34, steps=40),
    "soft targets": dict(learner="replay", soft_targets=True, buffer_draw="topk"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_a_run_broken_off_in_any_stage_ends_bit_equal(tmp_path, name):
    """Two checkpoints a task: within it, and at its end."""
    quick(tmp_path / "a", **FLAGS[name])
    for k in (1, 2, 3, 4):
        break_off_and_resume(lambda resume: quick(tmp_path / f"b{k}", resume=resume, **FLAGS[name]),
                             k)
        assert_same_run(tmp_path / f"b{k}", tmp_path / "a")


def test_a_film_shows_120_cameras(monkeypatch, tmp_path):
    quick(tmp_path / "a", learner="naive")
    seen, image = [], torch.rand(16, 16, 3)
    monkeypatch.setattr(cl, "render_image", lambda model, data, v: (seen.append(v), {
        "rgb": image, "depth": image[..., 0], "opacity": image[..., 0]})[1])
    quick(tmp_path / "a", learner="naive", eval_only=True, video=True)
    assert seen[-120:] == [*range(120)] and (tmp_path / "a/render.mp4").stat().st_size > 500


command = functools.partial(conftest.command, cl)


WRONG = {
    "--replay-weight nan": "--replay-weight", "--ewc-weight -1": "--ewc-weight",
    "--buffer-share 0": "--buffer-share", "--buffer-share 1.5": "--buffer-share",
    "--rays 0": "--rays", "--march-steps -8": "--march-steps", "--lr nan": "--lr",
    "--log2-table 40": "--log2-table", "--mlp 0 4 6": "--mlp", "--chunk 0": "--chunk",
    "--stream --chunk 100": "--chunk", "--stream --chunk 2": "--chunk", "--dynamic": "--dynamic",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_one_line(monkeypatch, capsys, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    base = words_of({**TINY, "out": tmp_path / "a"})
    assert_refused(command(monkeypatch, capsys, *base, *words.split()), WRONG[words])
    assert not list(tmp_path.iterdir())
