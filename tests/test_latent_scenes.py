"""latent_scenes.py against slow loops in float64 and cases worked out by hand. What a run of one
phase promises is in test_contract.py. Runs are on the built-in cars at 16 px."""
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import common
import latent_scenes as ls
from common import UserError
from conftest import ROOT, assert_refused, close, command, lines, words_of
from test_contract import assert_same_run
from latent_scenes import Args, Autoencoder, Bank, Model, phases, schedule

F64, SIZE = torch.float64, 16
TINY = dict(scene="cars", size=SIZE, scenes=2, new_scenes=2, steps=2, latent_channels=3,
            width=(8, 8), resolution=8, micro=2, macro=3, bases=4, hidden=8, samples=8, batch=2,
            rgb_rays=16, encode_every=1, device="cpu")
BOX = torch.tensor([[-1.0, -2, 0.5], [3, 1, 2]])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="module")
def cars_drawn_once():
    """A car is drawn the first time that a test wants it."""
    drawn, kept = common.load_car, {}

    def load_car(seed, size, bg, above):
        key = seed, size, tuple(bg.tolist()), above
        if key not in kept:
            kept[key] = drawn(seed, size, bg, above)
        return kept[key]
    common.load_car = load_car
    yield
    common.load_car = drawn


def args(**more):
    return replace(Args(), **{**TINY, **more})


def family_of(**more):
    return replace(common.load_family("cars", "no such folder", SIZE), **more)


def model_of(box=BOX, **more):
    """A model in float64 whose every number is drawn."""
    family = family_of(aabb=box, tight=box, bg=torch.tensor([0.9, 0.5, 0.2]), near=0.5, far=7.0)
    model = Model(args(**more), family).double()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
        if not model.rgb:
            model.autoencoder.bg.uniform_()
    return model


def views_of(*numbers):
    return {i: ls.load_views(family_of(), i, "cpu") for i in numbers}


def phase_of(given, name):
    return next(phase for phase in phases(given) if phase.name == name)


# ------------------------------------------------------- planes, latents, losses, phases, price

def test_fuse_against_loops():
    micro, W = torch.randn(2, 3, 5, 5, 2, dtype=F64), torch.randn(2, 4, dtype=F64)
    shared = torch.randn(4, 3, 5, 5, 3, dtype=F64)
    out = ls.fuse(micro, W, shared)
    assert out.shape == (2, 3, 5, 5, 5) and torch.equal(out[..., :2], micro)
    for i in range(2):
        assert close(out[i, ..., 2:], sum(W[i, k] * shared[k] for k in range(4)))


@pytest.mark.parametrize("flags, features, M", [
    ({}, 2, 4), ({"micro": 0}, 0, 4), ({"macro": 0}, 2, 0), ({"representation": "rgb"}, 5, 0)])
def test_parameters_of_a_scene(flags, features, M):
    model = model_of(**flags)
    assert model.P == 3 * 8 * 8 * features + M and len(model.shared) == M
    p = torch.randn(2, model.P, dtype=F64)
    planes = model.planes(p)
    assert planes.shape == (2, 3, 8, 8, model.mlp[0].in_features)
    assert torch.equal(planes[..., :features].flatten(1), p[:, :model.P - M])
    family = family_of()
    for kind, box in (("rgb", family.tight), ("latent", family.aabb)):      # two boxes
        assert torch.equal(Model(args(representation=kind), family).aabb, box)


def test_normalise_and_back():
    s = torch.tensor(0.3, dtype=F64)
    z = torch.linspace(-16, 16, 999, dtype=F64)                    # s |z| < 4.95: not clipped
    assert close(ls.denormalise(ls.normalise(z, s), s), z, atol=1e-9, rtol=0)
    assert close(ls.normalise(z, s), torch.tanh(0.3 * z))
    y = torch.tensor([-5.0, -1, -0.99995, 0.99995, 1, 5], dtype=F64, requires_grad=True)
    back = ls.denormalise(y, s)
    assert close(back.detach().abs(), torch.full((6,), math.atanh(1 - 1e-4) / 0.3, dtype=F64))
    assert not torch.autograd.grad(back.sum(), y)[0].any()


def test_total_variation_by_hand():
    planes = torch.randn(2, 3, 4, 5, 2, dtype=F64)
    p = planes.numpy()
    down = [(p[:, :, r + 1] - p[:, :, r]) ** 2 for r in range(3)]
    right = [(p[:, :, :, c + 1] - p[:, :, :, c]) ** 2 for c in range(4)]
    wanted = np.mean(down) + np.mean(right)
    assert float(ls.total_variation(planes)) == pytest.approx(wanted, abs=1e-12)


def parts_of(model):
    """Part -> its parameters, in the words of the table of phases."""
    parts = {"shared": [model.shared], "mlp": list(model.mlp.parameters())}
    if model.autoencoder is not None:
        parts["encoder"] = list(model.autoencoder.encoder.parameters())
        parts["decoder"] = list(model.autoencoder.decoder.parameters())
    return parts


def a_batch(given, name, views, step=0):
    """A batch of all these scenes."""
    rows = range(len(views))
    return ls.draw_batch(given, phase_of(given, name), 1, step, rows, views, "cpu")


@pytest.mark.parametrize("name, reached", [
    ("autoencoder", "encoder decoder"), ("latent", "planes shared mlp encoder"),
    ("rgb", "planes shared mlp decoder"), ("tv", "planes shared")])
def test_where_the_gradient_of_each_loss_goes(name, reached):
    """And that a loss is its mean squared error, times its weight."""
    model, batch = model_of(box=family_of().aabb).float(), a_batch(args(), "joint", views_of(0, 1))
    p = (0.1 * torch.randn(2, model.P)).requires_grad_()
    planes = model.planes(p)
    loss, opacity = ls.total_loss(model, batch, planes, {name: 0.5})
    loss.backward()
    touched = {part for part, params in parts_of(model).items()
               if any(q.grad is not None and q.grad.any() for q in params)}
    if p.grad is not None and p.grad.any():
        touched.add("planes")
    assert touched == set(reached.split())
    with torch.no_grad():
        z = model.autoencoder.encoder(batch.x)
        y = ls.render(model, planes, batch.rays_o, batch.rays_d, batch.jitter)["y"]
        wanted = {"autoencoder": lambda: F.mse_loss(model.autoencoder.decoder(z), batch.x),
                  "latent": lambda: F.mse_loss(y, torch.tanh(model.autoencoder.s * z)),
                  "rgb": lambda: F.mse_loss(model.decode(y), batch.x),
                  "tv": lambda: ls.total_variation(planes)}[name]()
    assert float(loss.detach()) == pytest.approx(0.5 * float(wanted), rel=1e-5)
    assert 0 < opacity < 1 and not opacity.requires_grad


def test_phases_are_the_papers_table():
    given = args(tv=0.5, lambda_latent=0.25, lambda_ae=0.125, epochs=(1, 2, 3, 4, 5), steps=9,
                 scenes=3, new_scenes=2)
    joint = {"rgb": 1, "latent": 0.25, "autoencoder": 0.125, "tv": 0.5}
    table = [("pretrain", "old", "encoder decoder", {"autoencoder": 1}, 2, 0),
             ("fit", "old", "planes shared mlp", {"latent": 1, "tv": 0.5}, 4, 16),
             ("joint", "old", "planes shared mlp encoder decoder", joint, 6, 16),
             ("new", "new", "planes", {"latent": 1}, 4, 16),
             ("finetune", "new", "planes decoder", {"rgb": 1}, 5, 16)]
    wanted = [ls.Phase(name, cars, set(trains.split()), *rest)
              for name, cars, trains, *rest in table]
    assert phases(given) == wanted
    assert phases(replace(given, autoencoder="plain")) == wanted[:2] + wanted[3:]
    assert phases(replace(given, representation="rgb")) == [
        ls.Phase("rgb", "new", {"planes", "mlp"}, {"rgb": 1, "tv": 0.5}, 9, 16)]


def test_bytes_are_the_papers():
    paper = replace(ls.PRESETS["paper"], device="cpu")
    ls.check(paper)
    model, rgb = Model(paper, family_of()), Model(replace(paper, representation="rgb"), family_of())
    each, shared, of_rgb = 4 * model.P, 4 * model.shared.numel() + 4 * 83.65e6, 4 * rgb.P
    assert of_rgb == 1_572_864 and round((each + shared / 1000) / 1000) == 880
    assert round(100 * (1 - (each + shared / 1000) / of_rgb), 1) == 44.0
    N = ls.break_even(shared, each, of_rgb)
    assert N == pytest.approx(359.5, abs=0.5)
    assert [each + shared / n < of_rgb for n in (math.floor(N), math.ceil(N))] == [False, True]
    assert ls.break_even(10, 3, 3) == math.inf


# ------------------------------------------------------------------------------- the autoencoder

def test_measured_scale_and_background():
    ae = Autoencoder(3, (8, 8))
    ae.encoder = nn.AvgPool2d(4)
    scene = views_of(0)[0]
    colour = torch.tensor([255, 64, 160], dtype=torch.uint8)
    scene.images = colour.view(1, 3, 1, 1).repeat(12, 1, 20, 28)
    scene.images[:, :, 4:-4, 4:-4] = torch.randint(256, (12, 3, 12, 20), dtype=torch.uint8)
    ae.set_latent_stats([scene])
    z = ae.encoder(scene.pictures(slice(10, None)))
    assert float((ae.s * z).std()) == pytest.approx(0.4, rel=1e-2)
    border = scene.pictures(0)[:, 0, 0]
    assert close(ae.bg, (torch.tanh(ae.s * border) + 1) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", [(8,), (8, 12), (8, 12, 16)])
def test_shapes_and_gradients_of_the_autoencoder(width):
    ae, f = Autoencoder(5, width), 2 ** len(width)
    with torch.no_grad():
        for p in ae.parameters():
            p += 0.1 * torch.randn_like(p)                         # residual parts start at 0
    x = torch.rand(2, 3, 16, 24)
    z = ae.encoder(x)
    out = ae.decoder(z)
    assert z.shape == (2, 5, 16 // f, 24 // f) and out.shape == x.shape
    F.mse_loss(out, x).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in ae.parameters())


# ------------------------------------------------------------------------------------- renderer

def test_planes_are_xy_xz_yz():
    model, R = model_of(resolution=4, micro=4, macro=0), 4
    model.mlp = nn.Identity()                                      # features: density and colours
    cells = torch.tensor(list(itertools.product(range(R), repeat=3)))          # along x, y, z
    x = (BOX[0] + (cells + 0.5) / R * (BOX[1] - BOX[0])).double()
    for plane, (a, b) in enumerate(((0, 1), (0, 2), (1, 2))):
        hot = torch.zeros(1, 3, R, R, 4, dtype=F64)
        hot[0, plane, 3, 1] = torch.tensor([2.0, -1, 0, 1])        # row 3, column 1
        sigmas, rgbs = model.field(x[None], hot)
        on = ((cells[:, a] == 1) & (cells[:, b] == 3)).double()
        assert on.sum() == R and close(sigmas, F.softplus(2 * on - 1), atol=1e-6, rtol=0)
        raw = on[:, None] * torch.tensor([-1.0, 0, 1])
        assert close(rgbs, 1.002 / (1 + torch.exp(-raw)) - 0.001, atol=1e-6, rtol=0)


def bilinear(plane, a, b):
    """plane (R, R, F), a along its columns, b along its rows, from -1 to 1; nothing outside."""
    R, out = len(plane), np.zeros(plane.shape[2])
    a, b = (a + 1) * R / 2 - 0.5, (b + 1) * R / 2 - 0.5
    for c, r in itertools.product(range(R), range(R)):
        out += max(0, 1 - abs(a - c)) * max(0, 1 - abs(b - r)) * plane[r, c]
    return out


def slow_field(model, planes, x):
    low, high = model.aabb.double().numpy()
    u = 2 * (x - low) / (high - low) - 1
    axes = ((0, 1), (0, 2), (1, 2))
    h = sum(bilinear(planes[p], u[a], u[b]) for p, (a, b) in enumerate(axes))
    first, last = (tuple(p.detach().numpy() for p in layer.parameters())
                   for layer in (model.mlp[0], model.mlp[2]))
    h = last[0] @ np.logaddexp(0, first[0] @ h + first[1]) + last[1]
    return np.logaddexp(0, h[0] - 1), 1.002 / (1 + np.exp(-h[1:])) - 0.001


def slow_render(model, planes, o, d, jitter):
    low, high = model.aabb.double().numpy()
    enter, leave = model.near, model.far
    for axis in range(3):
        if d[axis] == 0:
            if not low[axis] <= o[axis] <= high[axis]:
                leave = enter
            continue
        a, b = sorted(((low[axis] - o[axis]) / d[axis], (high[axis] - o[axis]) / d[axis]))
        enter, leave = max(enter, a), min(leave, b)
    S, T, rgb, opacity, depth = model.samples, 1.0, 0, 0, 0
    inner = [enter + (leave - enter) * (k + jitter - 0.5) / S for k in range(1, S)]
    edges = [enter, *inner, leave]
    for start, end in itertools.pairwise(edges if leave > enter else []):
        t = (start + end) / 2
        sigma, c = slow_field(model, planes, o + t * d)
        w = T * (1 - math.exp(-sigma * (end - start)))
        T -= w
        rgb, opacity, depth = rgb + w * c, opacity + w, depth + w * t
    bg = (model.background if model.rgb else model.autoencoder.bg).numpy()
    return 2 * (rgb + (1 - opacity) * bg) - 1, opacity, depth


def some_rays(n, h, w):
    """From all around towards BOX, one along an axis, one past it."""
    middle = BOX.double().mean(0)
    o = middle + 4 * F.normalize(torch.randn(n, h, w, 3, dtype=F64), dim=-1)
    d = F.normalize(middle + torch.randn(n, h, w, 3, dtype=F64) * 0.5 - o, dim=-1)
    o[:, 0, 0], d[:, 0, 0] = torch.tensor([0.3, -0.7, 6.0]), torch.tensor([0.0, 0.0, -1.0])
    d[:, 0, 1] = -d[:, 0, 1]
    return o, d


@pytest.mark.parametrize("representation, jittered",
                         [("latent", False), ("latent", True), ("rgb", True)])
def test_render_against_a_slow_loop(representation, jittered):
    model = model_of(representation=representation, resolution=4, micro=3, macro=0, hidden=5)
    with torch.no_grad():
        model.mlp[2].bias[0] += 1.0                                # half of the light is stopped
    planes, (o, d) = 2 * torch.randn(2, 3, 4, 4, 3, dtype=F64), some_rays(2, 2, 3)
    jitter = torch.rand(2, 2, 3, dtype=F64) if jittered else None
    with torch.no_grad():
        out = ls.render(model, planes, o, d, jitter)
    assert out["y"].shape == (2, 3, 2, 3) and out["opacity"].shape == (2, 2, 3)
    assert (out["opacity"][:, 0, 1] == 0).all() and (out["opacity"] > 0.2).sum() > 4
    for i, r, c in itertools.product(range(2), range(2), range(3)):
        j = float(jitter[i, r, c]) if jittered else 0.5
        wanted = slow_render(model, planes[i].numpy(), o[i, r, c].numpy(), d[i, r, c].numpy(), j)
        found = [*out["y"][i, :, r, c].tolist(), float(out["opacity"][i, r, c]),
                 float(out["depth"][i, r, c])]
        assert found == pytest.approx([*wanted[0], *wanted[1:]], abs=1e-6), (i, r, c)


@pytest.mark.parametrize("representation", ["rgb", "latent"])
def test_render_views_is_render_view_by_view(representation):
    model = model_of(family_of().aabb, representation=representation).float()
    p, scene, side = torch.randn(1, model.P), views_of(0)[0], SIZE // model.factor
    out = ls.render_views(model, p, scene.c2w[:3], scene.K[:3], SIZE)
    assert out["rgb"].shape == (3, SIZE, SIZE, 3) and out["depth"].shape == (3, side, side)
    for v, (r, c) in enumerate([(0, 1), (0, side - 2), (side - 1, 1)]):
        xy = torch.tensor([[c + 0.5, r + 0.5]]) * model.factor
        o, d = common.pixel_rays(xy, scene.K[v], scene.c2w[v][None])
        y = ls.render(model, model.planes(p), o[None, None], d[None, None])["y"]
        assert close(out["y"][v, :, r, c], y[0, :, 0, 0], atol=1e-4, rtol=0)
    pictures = (model.decode(out["y"]).clamp(-1, 1) + 1) / 2
    assert close(out["rgb"], pictures.permute(0, 2, 3, 1), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------- batch, schedule

def seen_at(rays_o, rays_d, c2w, K):
    """The pixels (n, h, w, 2) that rays (n, h, w, 3) of n views go through."""
    local = torch.einsum("nhwi,nij->nhwj", rays_o + rays_d - c2w[:, None, None, :, 3], c2w[..., :3])
    x, y, z = local.unbind(-1)
    K = K[:, None, None]
    return torch.stack([K[..., 0, 2] - K[..., 0, 0] * x / z, K[..., 1, 2] + K[..., 1, 1] * y / z],
                       -1)


def positions(scene):
    """The scene with pictures whose first two colours say where a pixel is: x, y."""
    xy = common.pixel_grid(SIZE, SIZE).view(SIZE, SIZE, 2).permute(2, 0, 1) * 8
    picture = torch.cat([xy, torch.zeros(1, SIZE, SIZE)]).round().byte()
    scene.images = picture.expand(len(scene.c2w), -1, -1, -1)
    return scene


@pytest.mark.parametrize("name, more", [("joint", {}), ("joint", {"shift": False}),
                                        ("rgb", {"representation": "rgb"})])
def test_rays_see_what_the_shifted_picture_shows(name, more):
    """In the original picture; where edges have not come round."""
    given, views, shifts, used = args(**more), views_of(0, 1), set(), {0: set(), 1: set()}
    for scene in views.values():
        positions(scene)
    for step in range(150):
        batch = a_batch(given, name, views, step)
        assert sorted(batch.rows) == [0, 1] and batch.share == 1
        for k, i in enumerate(batch.rows):
            scene, position = views[i], batch.rays_o[k, 0, 0]
            v = int((scene.c2w[:, :, 3] - position).norm(dim=1).argmin())
            used[i].add(v)
            at = seen_at(batch.rays_o[k:k + 1], batch.rays_d[k:k + 1], scene.c2w[v:v + 1],
                         scene.K[v:v + 1])[0]
            shown = batch.target[k, :2]
            if name == "joint":
                shown = F.avg_pool2d(shown[None], 4)[0]
                shifts.add(tuple((at[1, 1] - 6).round().long().tolist()))
                at, shown = at[1:-1, 1:-1], shown[:, 1:-1, 1:-1]
            assert close((shown + 1) * 127.5 / 8, at.permute(2, 0, 1), atol=0.1, rtol=0)
    for i, scene in views.items():
        assert used[i] == set(range(scene.num_tests, len(scene.c2w)))  # never a test view
    assert len(shifts) == {"joint": 1 if more else len(shifts), "rgb": 0}[name]
    if not more:
        assert len(shifts) > 15 and shifts <= set(itertools.product(range(-2, 3), repeat=2))


def test_one_picture_of_so_many_is_encoded_in_turns():
    given, views, came = args(batch=4, encode_every=2), views_of(*range(4)), []
    for step in range(4):
        batch = a_batch(given, "joint", views, step)
        assert len(batch.encoded) == 2 and batch.encoded_weight == 1
        came += [batch.rows[k] for k in batch.encoded]
    assert sorted(came) == sorted(list(range(4)) * 2)
    batch = a_batch(given, "fit", views)
    assert batch.encoded == [0, 1, 2, 3] and batch.encoded_weight == 1


@pytest.mark.parametrize("n, B", [(7, 3), (8, 4), (1, 1), (5, 5), (2, 4), (40, 4), (9, 2)])
def test_every_scene_comes_once_an_epoch_in_its_own_slot(n, B):
    L = math.ceil(n / B)
    steps = [schedule(range(n), B, s, 5, 1) for s in range(6 * L)]
    assert all(len(slots) == B for slots in steps)
    for epoch in range(6):
        came = [k for slots in steps[epoch * L:(epoch + 1) * L] for k in slots if k is not None]
        assert sorted(came) == list(range(n))
    assert all(k is None or k % B == slot for slots in steps for slot, k in enumerate(slots))
    assert steps == [schedule(range(n), B, s, 5, 1) for s in range(6 * L)]
    if n == 40:                                                    # by epoch, seed, phase
        epochs = [steps[e * L:(e + 1) * L] for e in range(6)]
        epochs += [[schedule(range(n), B, s, *seed) for s in range(L)] for seed in ((6, 1), (5, 2))]
        assert len(set(map(str, epochs))) == 8


# ------------------------------------------------------------------------------ the bank of rows

def test_a_step_is_adams_and_others_rest(tmp_path):
    bank, P = Bank(tmp_path / "rows", 10, 16, "cpu"), 16
    scenes = (9, 2, 4)
    for i in range(10):
        bank.fill(i, torch.randn(P))
    before = bank.file.clone()
    twin = {i: bank.read([i])[0].clone().requires_grad_() for i in scenes}
    adam = {i: torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.99)) for i, p in twin.items()}
    for step, batch in enumerate(([9, 2], [2], [4, 9], [9, 2, 4], [2, 4], [9])):
        lr = 0.1 * 0.7 ** step
        d_p = torch.randn(len(batch), P) * 10 ** float(torch.randn(()))
        d_p[:, 0] = 0                                              # a texel that no ray saw
        bank.step(batch, d_p, lr)
        for i, g in zip(batch, d_p):
            adam[i].param_groups[0]["lr"] = lr
            twin[i].grad = g
            adam[i].step()
    for i in scenes:
        state, row = adam[i].state[twin[i]], bank.file[i]
        assert close(row[:P], twin[i].detach(), atol=2e-6, rtol=0) and row[-1] == state["step"]
        assert close(row[P:2 * P], state["exp_avg"], atol=1e-5, rtol=1e-5)
        assert close(row[2 * P:-1], state["exp_avg_sq"], atol=1e-5, rtol=1e-5)
    rest = [i for i in range(10) if i not in scenes]
    assert torch.equal(bank.file[rest], before[rest])
    other = Bank(tmp_path / "rows", 10, 16, "cpu")                 # another process
    assert torch.equal(other.file, bank.file) and not torch.equal(before, bank.file)
    bank.step([0], torch.ones(1, P), 0.1)
    assert torch.equal(other.file, bank.file)


def test_rows_of_a_device_reach_the_file_and_come_back(tmp_path):
    """As on a GPU, where rows are not the file."""
    bank = Bank(tmp_path / "rows", 3, 4, "cpu")

    class OnDevice(torch.Tensor):
        device = torch.device("cuda")

    bank.table = bank.file.clone().as_subclass(OnDevice)
    bank.step([1], torch.ones(1, 4), 0.1)
    assert not bank.file.any()
    bank.to_file([1])
    assert bank.file[1].all() and not bank.file[[0, 2]].any()
    saved = torch.randn(3, 13)
    bank.load_state_dict({"rows": saved})
    assert torch.equal(bank.table, saved) and torch.equal(bank.state_dict()["rows"], saved)


# ------------------------------------------------------------------------------- a run, from inside

def parts_at(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)["parts"]


def flat(model):
    return {name: torch.cat([p.detach().flatten() for p in params]).clone()
            for name, params in parts_of(model).items()}


def test_a_phase_trains_what_the_table_says_and_nothing_else(tmp_path, monkeypatch):
    states, begin = [], ls.start_phase

    def start_phase(phase, model, bank, rows, views):
        begin(phase, model, bank, rows, views)
        states.append((phase, flat(model), bank.file.clone()))

    def summarise(args, run, model, old_model, bank, *rest):
        states.append((None, flat(model), bank.file.clone()))
        states.append(flat(old_model))
    monkeypatch.setattr(ls, "start_phase", start_phase)
    monkeypatch.setattr(ls, "summarise", summarise)
    ls.train(args(out=str(tmp_path / "a"), scenes=3, new_scenes=3, steps=4))
    *states, old_model = states
    assert [phase.name for phase, *_ in states[:-1]] == [p.name for p in phases(args())]
    for (phase, model, bank), (_, later, bank_later) in itertools.pairwise(states):
        moved = {part for part in model if not torch.equal(model[part], later[part])}
        assert moved == phase.trains - {"planes"}, phase.name
        changed = (bank != bank_later).any(1).tolist()
        if phase.cars == "old" and phase.name != "pretrain":
            assert changed[:3] == [True] * 3, phase.name
        if phase.cars == "new":
            assert changed == [False] * 3 + [True] * 3, phase.name
    _, model, bank = states[3]                                     # phase new begins
    P = (bank.shape[1] - 1) // 3
    assert close(bank[3:, :P], bank[:3, :P].mean(0).expand(3, P), atol=1e-6, rtol=0)
    assert not bank[3:, P:].any()                                  # no moments yet
    assert all(torch.equal(old_model[part], model[part]) for part in model)
    assert not torch.equal(old_model["decoder"], states[-1][1]["decoder"])


def test_rates_fall_in_each_phase(tmp_path, monkeypatch):
    rates, adam, step = [], torch.optim.Adam.step, Bank.step
    monkeypatch.setattr(torch.optim.Adam, "step", lambda optimiser: adam(optimiser) or rates.append(
        [group["lr"] for group in optimiser.param_groups if group["params"]]))
    monkeypatch.setattr(Bank, "step", lambda bank, rows, grad, lr: rates[-1].append(lr) or
                        step(bank, rows, grad, lr))
    ls.train(args(out=str(tmp_path / "a"), lr=0.01, lr_mlp=0.02, lr_ae=0.03,
                  lr_finetune=0.04, steps=2))
    begin = [[0.03, 0.03], [0.01, 0.02, 0.01], [0.01, 0.02, 0.03, 0.03, 0.01], [0.01],
             [0.04, 0.01]]                                         # of each phase, planes last
    assert rates[::2] == begin
    for one, two in zip(begin, rates[1::2]):
        assert two == pytest.approx([0.05 ** 0.5 * rate for rate in one])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "a"
    given = args(out=str(out), scenes=3, new_scenes=2, steps=4, eval_every=2)
    return given, ls.train(given), out


def test_summary_and_lines(run):
    given, summary, out = run
    curve = lines(out / "metrics.jsonl")
    assert [line["step"] for line in curve] == list(range(2, 21, 2)) and summary["steps"] == 20
    assert [("latent_psnr" in line, "old_psnr" in line) for line in curve[1::2]] == [
        (False, False), (False, True), (False, True), (True, False), (True, False)]
    assert summary["ceiling_psnr"] == pytest.approx(curve[7]["autoencoder_psnr"], abs=1e-5)
    assert summary["new_latent_psnr"] == pytest.approx(curve[7]["latent_psnr"], abs=1e-5)
    assert summary["psnr"] == pytest.approx(curve[-1]["psnr"])
    seconds = [0.0] + [line["train_seconds"] for line in curve[1::2]]
    assert summary["seconds_shared"] == pytest.approx(seconds[3])
    assert summary["seconds_per_scene"] == pytest.approx((seconds[5] - seconds[3]) / 2)
    count = {part: len(numbers) for part, numbers in flat(Model(given, family_of())).items()}
    assert summary["bytes_per_scene"] == 4 * (3 * 8 * 8 * 2 + 4)
    assert summary["bytes_shared"] == 4 * (sum(count.values()) + count["decoder"])
    wanted = summary["bytes_shared"] / (4 * 3 * 8 * 8 * 5 - summary["bytes_per_scene"])
    assert summary["break_even_scenes"] == pytest.approx(wanted)
    assert summary["old_psnr"] != summary["old_psnr_new_decoder"]
    assert not list(out.glob("*.tmp")) and not (out / "planes.bin").exists()


def test_pictures(run):
    given, _, out = run
    test = family_of().read(3)[1]                                  # the first new scene
    strip = torch.from_numpy(iio.imread(out / "test_000.png")).float() / 255
    assert strip.shape == (SIZE, 6 * SIZE, 3) and not (out / "test_002.png").exists()
    assert close(strip[:, :SIZE], test.images[0], atol=1.01 / 255, rtol=0)
    model = Model(given, family_of())
    model.load_state_dict(parts_at(out)["finetune"]["field"])
    z = model.autoencoder.encoder(2 * test.images[:1].permute(0, 3, 1, 2) - 1).detach()
    latents = (torch.tanh(model.autoencoder.s * z) + 1) / 2        # (1, 3, 4, 4)
    shown = F.avg_pool2d(strip[None, :, -SIZE:].permute(0, 3, 1, 2), 4)
    assert close(shown, latents, atol=0.02, rtol=0)


def test_eval_only_and_resume_of_a_finished_run_say_the_same(run, monkeypatch):
    given, summary, out = run
    monkeypatch.setattr(ls, "total_loss", lambda *words: pytest.fail("trains"))
    for how in ("eval_only", "resume"):
        again = ls.train(replace(given, **{how: True}))
        for name in ("psnr", "ssim", "ceiling_psnr", "old_psnr", "bytes_shared", "steps"):
            assert again[name] == pytest.approx(summary[name], abs=1e-4), (how, name)


def test_evaluate_is_the_mean_of_means(monkeypatch, tmp_path):
    views, model, errors = views_of(0, 1, 2), model_of(family_of().aabb).float(), {}

    def render_views(model, p, c2w, K, size):
        i = next(i for i in views if torch.equal(views[i].c2w[:len(c2w)], c2w))
        errors[i] = 0.1 * torch.linspace(i + 1, i + 2, len(c2w)).view(-1, 1, 1, 1)
        x = views[i].pictures(slice(len(c2w)))
        y = torch.tanh(model.autoencoder.s * model.autoencoder.encoder(x))
        return {"rgb": (x.permute(0, 2, 3, 1) + 1) / 2 + errors[i], "y": y - y.sign() * errors[i]}
    monkeypatch.setattr(ls, "render_views", render_views)
    bank = Bank(tmp_path / "rows", 3, model.P, "cpu")
    for count in (None, 4):
        scores = ls.evaluate(model, bank, views, range(1, 3), count)
        wanted = np.mean([float((-20 * torch.log10(errors[i])).mean()) for i in (1, 2)])
        assert scores["psnr"] == pytest.approx(wanted, abs=1e-3)
        assert scores["latent_psnr"] == pytest.approx(wanted + 20 * math.log10(2), abs=1e-3)
        assert scores.keys() == {"psnr", "ssim", "autoencoder_psnr", "latent_psnr"}
        assert len(errors[1]) == (count or 10)
    assert ls.evaluate(model, None, views, range(3)).keys() == {"autoencoder_psnr"}


# -------------------------------------------------------------------------------- many processes

@pytest.mark.parametrize("world", [2, 4])
def test_parts_of_a_step_add_up_to_the_whole(world):
    """With scenes that do not fill the slots."""
    views, box = views_of(*range(5)), family_of().aabb
    for name, more in (("joint", {}), ("rgb", {"representation": "rgb"})):
        given = args(batch=4, tv=0.1, encode_every=2, **more)
        phase, model = phase_of(given, name), model_of(box, **more).float()
        own, rested = 0.1 * torch.randn(5, model.P), 0

        def gradients(rank, of, step):
            torch.manual_seed(step)
            mine = {i: views[i] for i in range(rank, 5, of)}
            batch = ls.draw_batch(given, phase, 1, step, range(5), mine, "cpu")
            if batch is None:
                return None, {}
            p = own[batch.rows].requires_grad_()
            model.zero_grad()
            loss, _ = ls.total_loss(model, batch, model.planes(p), phase.weights)
            (batch.share * loss).backward()
            found = {n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None}
            found["loss"] = batch.share * loss.detach()
            return batch, {**found, **dict(zip(batch.rows, p.grad))}

        for step in range(3):
            whole, wanted = gradients(0, 1, step)
            parts = [gradients(rank, world, step) for rank in range(world)]
            rested += any(batch is None for batch, _ in parts)
            came = [i for batch, _ in parts if batch for i in batch.rows]
            assert sorted(came) == sorted(whole.rows)
            for key, value in wanted.items():
                total = sum(found[key] for _, found in parts if key in found)
                assert close(total, value, atol=1e-5, rtol=1e-4), (name, step, key)
        assert rested or world == 2


WATCHED = f"""
import runpy, sys, torch.distributed.distributed_c10d as c10d
to_tensor = c10d._object_to_tensor
def watch(thing, *rest):
    assert thing is None or isinstance(thing, str), f"pickled: {{thing}}"
    return to_tensor(thing, *rest)
c10d._object_to_tensor = watch
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="no gloo")
def test_two_processes_are_one_and_pickle_no_tensors(tmp_path):
    more = dict(scenes=3, new_scenes=3, steps=4, eval_every=2, encode_every=2)
    one = ls.train(args(out=str(tmp_path / "one"), **more))
    words = words_of(vars(args(out=str(tmp_path / "two"), **more)))

    (tmp_path / "watched.py").write_text(WATCHED)

    def torchrun(*more):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   "--nproc-per-node=2", str(tmp_path / "watched.py"),
                   str(ROOT / "latent_scenes.py"), *words, *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    printed = torchrun()
    two = json.loads((tmp_path / "two/summary.json").read_text())
    assert (one["processes"], two["processes"]) == (1, 2)
    for name in ("psnr", "ssim", "ceiling_psnr", "old_psnr", "old_psnr_new_decoder"):
        assert two[name] == pytest.approx(one[name], abs=0.01), name
    a, b = (lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [line["step"] for line in a] == [line["step"] for line in b]
    assert [line["loss"] for line in b] == pytest.approx([line["loss"] for line in a], rel=1e-4)
    a, b = (parts_at(tmp_path / name)["finetune"]["bank"]["rows"] for name in ("one", "two"))
    assert close(a, b, atol=2e-3, rtol=1e-2)                       # of both processes' scenes
    assert printed.count("phase finetune") == 1                    # the first one speaks
    torchrun("--resume")                                           # nothing is left to do


def test_each_process_has_its_own_gpu_before_nccl_starts(monkeypatch):
    order = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: order.append(device))
    monkeypatch.setattr(ls.dist, "init_process_group",
                        lambda kind, timeout: order.append((kind, timeout.total_seconds())))
    monkeypatch.setattr(ls.dist, "get_rank", lambda: 0)
    for device in ("cuda:0", "cuda:1"):
        with pytest.raises(UserError, match=f"--device {device}: 2 processes would share it"):
            ls.start_ranks(device)
    assert not order and ls.start_ranks("cuda") == "cuda:1"
    assert order == ["cuda:1", ("nccl", 3600)]


def test_a_batch_that_processes_cannot_share_is_refused(monkeypatch):
    monkeypatch.setattr(ls, "ranks", lambda: (0, 2))
    with pytest.raises(UserError, match="--batch 3.*2 processes"):
        ls.check(args(batch=3))


# -------------------------------------------------------------------------- interrupted, resumed

def test_cut_in_four_phases_and_resumed_ends_bit_equal(tmp_path):
    more = dict(scenes=3, new_scenes=3, steps=6, eval_every=2, encode_every=2)
    ls.train(args(out=str(tmp_path / "a"), **more))
    given, log = args(out=str(tmp_path / "b"), **more), common.TrainingRun.log
    for at in (6 + 3, 12, 18 + 2, 24 + 5):                         # in all phases but the first

        def stop(run, **values):
            if run.step == at:
                raise KeyboardInterrupt
            log(run, **values)
        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common.TrainingRun, "log", stop)
            ls.train(replace(given, resume=(tmp_path / "b").exists()))
        torch.manual_seed(99)
    ls.train(replace(given, resume=True))
    assert_same_run(tmp_path / "a", tmp_path / "b")


# ----------------------------------------------------------------------- learning, command line

def test_it_learns(tmp_path):
    more = dict(scenes=4, new_scenes=2, batch=4, steps=1000, latent_channels=4, width=(16, 24),
                resolution=16, micro=4, macro=4, hidden=16, lr_ae=4e-3, lr_finetune=2e-3,
                epochs=(400, 60, 200, 60, 150), encode_every=2, eval_every=1000)
    summary = ls.train(args(out=str(tmp_path / "a"), **more))
    white = [float(common.psnr(picture, torch.ones(3))) for i in (4, 5)
             for picture in family_of().read(i)[1].images]
    curve = {line["step"]: line for line in lines(tmp_path / "a/metrics.jsonl")}
    zero, a, b, c, d = curve.values()
    assert zero["old_autoencoder_psnr"] > np.mean(white) + 3
    assert b["old_psnr"] > a["old_psnr"] > np.mean(white)
    assert np.mean(white) < c["psnr"] < summary["ceiling_psnr"] + 0.3
    assert d["psnr"] > c["psnr"] and summary["psnr"] > np.mean(white) + 3


WRONG = {
    "--size 18": "--size 18", "--size 8": "--size", "--width": "--width", "--width 8 0": "--width",
    "--scenes 0": "--scenes", "--new-scenes 200000": "lower them", "--batch 0": "--batch",
    "--micro 0 --macro 0": "--micro 0 --macro 0", "--macro -1": "--macro", "--lr nan": "--lr",
    "--epochs 1 1 0 1 1": "--epochs", "--lambda-ae -1": "--lambda-ae", "--steps 0": "--steps",
    "--representation hsv": "hsv", "--autoencoder 4d": "4d", "--encode-every 0": "--encode-every"}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_one_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    outcome = command(ls, monkeypatch, capsys, "--device", "cpu", *words.split())
    assert_refused(outcome, WRONG[words])
    assert not list(tmp_path.iterdir())


def test_torchrun_stumbles_over_no_flag_that_begins_two_of_its_own():
    from torch.distributed.run import get_args_parser
    for name in vars(Args()):
        flag = f"--{name.replace('_', '-')}"
        get_args_parser().parse_args(["--nproc-per-node=2", "latent_scenes.py", flag, "x"])


def test_a_broken_scene_is_named_before_anything_is_written(cars, tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "mine", tmp_path / "a"
    folder.mkdir()
    for scene in cars.iterdir():
        (folder / scene.name).symlink_to(scene)
    words = words_of(vars(args(scene=str(folder), scenes=2, new_scenes=2, steps=1,
                                        out=str(out), video=True)))
    (folder / "car_1").unlink()
    (folder / "car_1").mkdir()
    assert_refused(command(ls, monkeypatch, capsys, *words), "car_1")
    assert not out.exists()
    (folder / "car_1").rmdir()
    words += ["--scenes", "1"]
    assert command(ls, monkeypatch, capsys, *words)[0] == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["data"], summary["scene"]) == ("srn", "mine")
    assert (out / "render.mp4").is_file()
