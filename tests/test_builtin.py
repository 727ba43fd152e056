"""The built-in scenes of common.py: the renderer against slow loops and known answers, then the
truck (`bricks`), the room (`stage`) and the cars."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import BALL, BOX, TUBE, WHEEL, Shape, trace

WHITE, RED = torch.ones(3), (1.0, 0.0, 0.0)
SIZE = 32


def stage_masks(video, t):
    """Thing that changes -> (V, H, W) bool: pixels of frame t whose centre shows it."""
    _, seen = common.stage_frame(t, video.H)
    things = ("ball", "turning", "flicker", "appearing")                # shapes 8 to 11 of stage(t)
    return {thing: seen == 8 + i for i, thing in enumerate(things)}


def look(shapes, o, d):
    """Distance to what one ray meets, its colour and its index; inf, black and -1 for a miss."""
    c2w = np.float32(common.look_at(o, np.add(o, d), (0.3, 0.5, 0.8)))
    colour, distance, index = trace(shapes, c2w, 1.0, 1)                # a picture of one pixel
    return float(distance[0, 0]), colour[:, 0, 0], int(index[0, 0])


def traced(azimuth, elevation, n):
    """What `trace` finds in some_shapes(), and its rays (n * n, 3) in float64."""
    shapes, c2w = some_shapes(), np.float32(common.orbit_pose(azimuth, elevation, 4.0))
    K = common._intrinsics(1.2 * n, 1.2 * n, n / 2, n / 2)
    rays = common.pixel_rays(common.pixel_grid(n, n), K, torch.tensor(c2w).expand(n * n, 3, 4))
    return shapes, *trace(shapes, c2w, 1.2, n), *(x.double().numpy() for x in rays)


def unit_points(shape, x):
    """x (..., 3) in the axes of the shape, in units of `half`: what the docstring of Shape says."""
    (c, cp), (s, sp) = ((f(math.radians(shape.yaw)), f(math.radians(shape.pitch)))
                        for f in (math.cos, math.sin))
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    about_y = np.array([[cp, 0, sp], [0, 1, 0], [-sp, 0, cp]])
    return (x - np.array(shape.centre)) @ (about_z @ about_y) / shape.half


def level(shape, x):
    """Below 1 inside the shape, 1 on its surface, above 1 outside; x (..., 3) -> (...)."""
    unit, flat = abs(unit_points(shape, x)), [i for i in range(3) if i not in shape.kind]
    radius = np.linalg.norm(unit[..., list(shape.kind)], axis=-1)
    return np.maximum(radius, unit[..., flat].max(-1, initial=0))


def check_cameras(views, radius):
    """They stand at this distance from the middle and look at it, with z upwards."""
    position, R = views.c2w[:, :, 3], views.c2w[:, :, :3]
    assert torch.allclose(R[:, :, 2] * radius, position, atol=1e-5)
    assert torch.allclose(R.mT @ R, torch.eye(3), atol=1e-5) and (torch.linalg.det(R) > 0).all()
    assert (R[:, 2, 0].abs() < 1e-6).all() and (R[:, 2, 1] > 0).all()


def some_shapes():
    """Two of each kind, stretched, turned and overlapping."""
    rng, shapes = np.random.default_rng(5), []
    for kind in (BOX, TUBE, WHEEL, BALL) * 2:
        centre, half = rng.uniform(-0.8, 0.8, 3), rng.uniform(0.15, 0.7, 3)
        colour, angles = rng.uniform(0.2, 1, 3), rng.uniform(-180, 180, 2)
        shapes.append(Shape(kind, centre, half, colour, colour, (1, 1, 1), *angles))
    return shapes


# ---------------------------------------------------------------------------------------- renderer

def test_first_surfaces_are_those_of_a_march_in_small_steps():
    shapes, _, distance, index, *rays = traced(0.7, 0.5, 24)
    t, hits = np.arange(2, 6, 0.002), 0
    for i, (o, d) in enumerate(zip(*rays)):
        inside = np.stack([level(shape, o + t[:, None] * d) <= 1 for shape in shapes])
        first = np.where(inside.any(1), t[inside.argmax(1)], np.inf)
        nearest, found, there = first.min(), index.flat[i], distance.flat[i]
        if np.isinf(nearest):           # or a chord shorter than a step
            assert found < 0 or level(shapes[found], o + there * d) > 0.999
            continue
        assert found >= 0 and nearest - 0.0021 <= there <= nearest + 1e-4
        assert first[found] <= nearest + 0.0021
        hits += 1
    assert hits > 150 and len(set(index[index >= 0].tolist())) >= 6


def test_colours_are_those_of_the_normal():
    """The normal is the gradient of `level`, here by differences in float64."""
    shapes, colours, distance, index, o, d = traced(2.0, 0.4, 40)
    hits, edges = (index.flatten() >= 0).nonzero()[0], 0
    for i in hits:
        shape, x = shapes[index.flat[i]], o[i] + distance.flat[i] * d[i]
        assert level(shape, x) == pytest.approx(1, abs=1e-4)
        ahead, back = (level(shape, x + step * np.eye(3)) for step in (1e-4, -1e-4))
        normal = (ahead - back) / np.linalg.norm(ahead - back)
        sun = max(0, normal @ (0.45, -0.35, 0.82))
        expected = np.clip(shape.colour * (0.42 + 0.16 * normal[2] + 0.62 * sun), 0, 1)
        edges += not np.allclose(colours.reshape(3, -1)[:, i], expected, atol=5e-3)     # no normal
    assert len(hits) > 400 and edges < 0.02 * len(hits)


def test_cells_are_a_checkerboard():
    shape = Shape(BOX, (0, 0, 0), (2, 1, 0.5), (1, 0, 0), (0, 0, 1), (4, 2, 1))
    for x in (-1.5, -0.5, 0.5, 1.5):                        # cells of 1 x 1, seen from above
        for y in (-0.5, 0.5):
            _, colour, _ = look([shape], (x, y, 3), (0, 0, -1))
            second = (math.floor(x + 2) + math.floor(y + 1)) % 2 == 1
            assert (colour > 0.5).tolist() == [not second, False, second]


def test_pictures_are_means_over_3x3_rays():
    shapes, size, bg = some_shapes(), 9, torch.tensor([0.0, 0.5, 1.0])
    cameras = {name: common.orbit_pose(a, 0.4, 5.0) for name, a in (("a", 0.0), ("b", 2.0))}
    views, index = common.render(shapes, cameras, 1.3, size, bg)
    assert views.names == ["a", "b"] and np.allclose(views.c2w[1], cameras["b"], atol=1e-6)
    for v in range(2):
        for i, j in np.ndindex(size, size):
            xy = [[j + (x + 0.5) / 3, i + (y + 0.5) / 3] for y in range(3) for x in range(3)]
            rays = common.pixel_rays(torch.tensor(xy), views.K[v], views.c2w[v].expand(9, 3, 4))
            seen = [look(shapes, o.numpy(), d.numpy()) for o, d in zip(*rays)]
            alpha = np.mean([found >= 0 for _, _, found in seen])
            colour = np.mean([colour for _, colour, _ in seen], 0) + (1 - alpha) * bg.numpy()
            assert float(views.alpha[v, i, j]) == pytest.approx(alpha, abs=1e-6)
            assert np.allclose(views.images[v, i, j], colour, atol=1e-3)
            distance, _, middle = seen[4]
            assert int(index[v, i, j]) == middle
            depth = distance if middle >= 0 else 0
            assert float(views.depth[v, i, j]) == pytest.approx(depth, abs=1e-4)
    assert ((views.alpha > 0) & (views.alpha < 1)).any()


# ------------------------------------------------------------------------------------------ bricks

@pytest.fixture(scope="module")
def bricks():
    return common.load_bricks("test", 48, WHITE)


def test_bricks_cameras_and_range(bricks, monkeypatch):
    monkeypatch.setattr(common, "truck", lambda: some_shapes()[:1])     # soon drawn
    train = common.load_bricks("train", 2, WHITE)
    for views, n in ((bricks, 25), (train, 100)):
        check_cameras(views, 4.0311289)
        assert len(views.names) == n and views.K.shape == (n, 3, 3)
        assert (views.c2w[:, 2, 3] > 0).all()
    assert float(train.K[7, 0, 0]) == pytest.approx(1 / math.tan(0.3455556), rel=1e-5)
    assert np.allclose(train.c2w[0, :, 3], (-2.48765, -2.89279, 1.30128), atol=1e-4)    # as ever
    assert np.allclose(bricks.c2w[24, :, 3], (2.84883, -0.73145, 2.75665), atol=1e-4)
    assert 0 <= bricks.images.min() and bricks.images.max() <= 1 and bricks.alpha.max() <= 1
    assert (bricks.images[bricks.alpha == 0] == 1).all()
    assert (bricks.depth[bricks.alpha == 1] > 2).all()
    assert (bricks.depth[bricks.alpha == 0] == 0).all()
    for v in range(25):                                     # it fits into its box
        o, d = common.view_rays(bricks, v, False)
        depth = bricks.depth[v].reshape(-1, 1)
        assert ((o + depth * d)[depth[:, 0] > 0].abs() < 1.5).all()


def test_bricks_have_background_texture_and_flat_areas():
    """Something for soft mining to find: most pixels are white, a few differ from the next."""
    views = common.load_bricks("test", 100, WHITE)
    assert 0.65 < (views.alpha == 0).float().mean() < 0.85
    solid = (views.alpha == 1)[:, :, 1:] & (views.alpha == 1)[:, :, :-1]
    change = (views.images[:, :, 1:] - views.images[:, :, :-1]).abs().amax(-1)[solid]
    assert (change > 0.3).float().mean() > 0.05 and (change < 0.01).float().mean() > 0.3


# ------------------------------------------------------------------------------------------- stage

def grown(mask):
    """(V, H, W) bool, one pixel wider on all sides."""
    return F.max_pool2d(mask.float()[:, None], 3, 1, 1)[:, 0] > 0


@pytest.fixture(scope="module")
def film():
    """stage at 32 px and its first 8 frames."""
    video = common.load_video("stage", "no such folder", 32, 8)
    return video, [video.read(t) for t in range(8)]


def test_stage_is_what_it_says(film):
    video, views = film
    assert (video.kind, video.name, video.frames, video.H) == ("builtin", "stage", 8, 32)
    assert (video.near, video.far, video.ndc, video.test) == (1.0, 5.0, False, [4, 9])
    assert sorted(video.train + video.test) == list(range(len(video.names))) == list(range(14))
    assert torch.equal(video.K, common._intrinsics(35.84, 35.84, 16, 16).expand(14, 3, 3))
    assert np.allclose(video.c2w[0, :, 3], (-1.81758, -2.49578, 0.26535), atol=1e-3)
    assert np.allclose(video.c2w[9, :, 3], (0.66954, -2.69712, 1.22279), atol=1e-3)
    for view in views:
        assert view.images.shape == (14, 32, 32, 3) and view.names == video.names
        hit = view.depth > 0
        assert (view.depth[hit] > video.near).all() and (view.depth[hit] < video.far).all()
        for v in range(14):                                 # the room is within the box
            o, d = common.view_rays(view, v, False)
            points = (o + view.depth[v].reshape(-1, 1) * d)[hit[v].flatten()]
            assert (points.abs() < video.aabb[1] - 0.03).all() and (video.aabb[1] == 1).all()
        assert torch.allclose(view.images[~grown(hit)], torch.tensor(0.5))     # nothing around it
    assert (common.load_video("stage", ".").frames, common.load_video("stage", ".").H) == (20, 128)


def test_stage_is_the_same_in_any_order_and_for_any_number_of_frames(film):
    longer = common.load_video("stage", ".", 32, 30)
    for t in (6, 2):
        again = longer.read(t)
        for key in ("images", "depth", "mask", "alpha"):
            assert torch.equal(getattr(again, key), getattr(film[1][t], key))
    dark = common.load_video("stage", ".", 32, 1, bg="black").read(0)
    shown = dark.images + 0.5 * (1 - dark.alpha[..., None])             # grey is behind everything
    assert torch.allclose(shown, film[1][0].images, atol=1e-6)


def test_mask_is_where_pictures_differ(film):
    video, views = film
    things = [torch.stack(list(stage_masks(video, t).values())).any(0) for t in range(8)]
    assert torch.equal(views[0].mask, things[0].float())
    for t in range(1, 8):
        change = (views[t].images - views[t - 1].images).abs().amax(-1)
        moving = views[t].mask > 0
        assert change[~moving].max() <= 1e-4 and (change[~moving] == 0).float().mean() > 0.9998
        assert (views[t].depth == views[t - 1].depth)[~moving].all()
        assert moving[things[t] | things[t - 1]].all() and 0.02 < moving.float().mean() < 0.2
        assert (change[moving & ~things[t] & ~things[t - 1]] > 1e-4).all()     # edges


def test_the_cube_appears_and_rests(film):
    video, views = film
    shown = stage_masks(video, 5)["appearing"]
    assert not stage_masks(video, 4)["appearing"].any()
    assert shown.flatten(1).any(1).all()                    # all cameras see it
    assert torch.equal(shown, stage_masks(video, 7)["appearing"])
    behind = torch.where(views[4].depth == 0, 9, views[4].depth)
    assert (views[5].depth < behind - 0.1)[shown].all()     # in the air, before everything else


def test_ball_and_crate_move_as_they_should(film):
    static, ball, crate = common.stage(0)[:8], 8, 9
    for t in range(80):                                     # a whole round
        now, later = common.stage(t), common.stage(t + 1)
        assert repr(now[:8]) == repr(static) and [x.kind for x in now[8:10]] == [BALL, BOX]
        step = np.subtract(later[ball].centre, now[ball].centre)
        assert 0.035 < np.linalg.norm(step) < 0.041         # metres a frame
        assert now[ball].centre[2] - 0.15 == pytest.approx(-0.88)       # it lies on the floor,
        assert later[ball].pitch - now[ball].pitch == pytest.approx(math.degrees(0.04 / 0.15))
        axle = (math.sin(-math.radians(now[ball].yaw)), math.cos(math.radians(now[ball].yaw)))
        assert abs(np.dot(axle, step[:2])) < 0.1 * np.linalg.norm(step)     # and rolls ahead
        assert later[crate].yaw - now[crate].yaw == 6 and later[crate].centre == now[crate].centre
        for shape in [*static[1:], now[crate]]:             # it runs into nothing
            sphere = np.random.default_rng(t).normal(size=(400, 3))
            sphere *= 0.15 / np.linalg.norm(sphere, axis=1, keepdims=True)
            assert (level(shape, sphere + now[ball].centre) > 1).all(), (t, shape)
    first, later = (stage_masks(film[0], t) for t in (0, 4))
    assert not any(torch.equal(first[what], later[what]) for what in ("ball", "turning"))


# -------------------------------------------------------------------------------------------- cars

@pytest.fixture(scope="module")
def cars():
    """The built-in family at 32 px, and its first 4 cars."""
    family = common.load_family("cars", "no such folder", SIZE)
    return family, [family.read(i) for i in range(4)]


def test_cars_are_what_they_say(cars):
    family, scenes = cars
    assert (family.name, family.kind, family.near, family.far) == ("cars", "builtin", 0.5, 2.1)
    assert len(family.scenes) >= 10_000 and family.above and torch.equal(family.bg, WHITE)
    for train, test in scenes:
        assert len(test.names) == 10 and 12 <= len(train.names) <= 40
        assert test.names + train.names == sorted({*test.names, *train.names})
        for views in (train, test):
            V = len(views.names)
            assert views.images.shape == (V, SIZE, SIZE, 3) and views.K.shape == (V, 3, 3)
            assert 0 <= views.images.min() and views.images.max() <= 1
            assert (views.images[views.alpha == 0] == 1).all()
            assert ((views.alpha > 0) & (views.alpha < 1)).any() and 0.08 < views.alpha.mean() < 0.3
            depth = views.depth[views.depth > 0]
            assert (depth > family.near).all() and (depth < family.far).all()
            f, middle = 525 / 512 * SIZE, SIZE / 2
            assert torch.equal(views.K[0], common._intrinsics(f, f, middle, middle))
            inner = F.pad(views.alpha[:, 1:-1, 1:-1], (1, 1, 1, 1))
            assert torch.equal(inner, views.alpha)          # a car is in the picture as a whole


def test_cameras_stand_on_a_sphere_and_look_at_the_middle(cars, monkeypatch):
    for views in (views for scene in cars[1] for views in scene):
        check_cameras(views, 1.3)
    monkeypatch.setattr(common, "car", lambda seed: some_shapes()[:1])
    where = [common.load_car(seed, 1, WHITE, False).c2w[:, :, 3] / 1.3 for seed in range(20)]
    assert np.allclose(1.3 * where[3][49], (-1.25599, 0.33372, -0.03366), atol=1e-4)     # as ever
    where = torch.cat(where)                                # uniform: mean 0 and variance 1/3, each
    assert where.mean(0).abs().max() < 5 * (1 / 3 / 1000) ** 0.5       # with five standard errors
    assert ((where ** 2).mean(0) - 1 / 3).abs().max() < 5 * (4 / 45 / 1000) ** 0.5


def test_above_leaves_out_the_views_from_below():
    everything, kept = (common.load_car(1, 8, WHITE, above) for above in (False, True))
    above = (everything.c2w[:, 2, 3] > -0.5).nonzero().flatten().tolist()
    assert everything.names == [f"{v:06d}" for v in range(50)] and 20 < len(above) < 50
    assert kept.names == [everything.names[v] for v in above]
    assert torch.equal(kept.images, everything.images[above])


def test_a_car_depends_on_its_seed_alone(cars):
    family, scenes = cars
    np.random.seed(3)
    for i in (3, 0):                                        # in any order
        for a, b in zip(family.read(i), scenes[i]):
            for key in ("images", "alpha", "depth", "c2w", "K"):
                assert torch.equal(getattr(a, key), getattr(b, key))
    large = common.load_car(1, 2 * SIZE, WHITE, True)
    small = common.join_views(scenes[1][1], scenes[1][0])
    assert torch.equal(large.c2w, small.c2w)                # cameras, whatever the size
    halved = F.avg_pool2d(large.images.movedim(-1, 1), 2).movedim(1, -1)
    assert (halved - small.images).abs().mean() < 0.01


def test_cars_fit_their_box_and_vary():
    lengths, heights, looks = [], [], set()
    box = common.load_family("cars", "no such folder", SIZE).tight.numpy()
    for seed in range(300):
        shapes = common.car(seed)
        corners = [s.matrix() @ common.CORNERS + np.reshape(s.centre, (3, 1)) for s in shapes]
        low, high = np.min(corners, (0, 2)), np.max(corners, (0, 2))
        assert (low > box[0]).all() and (high < box[1]).all() and (abs(low + high) < 0.06).all()
        assert high[0] - low[0] > 1.7 * (high[1] - low[1])
        wheels = [s for s in shapes if s.colour == common.DARK]
        ground = [wheel.centre[2] - wheel.half[2] for wheel in wheels]
        assert len(wheels) == 4 and np.allclose(ground, low[2], atol=1e-6)
        lengths.append(high[0] - low[0])
        heights.append(high[2] - low[2])
        looks.add((len(shapes[3].kind), len(shapes)))       # kind of cabin; spoiler
    assert len(looks) == 4 and np.ptp(lengths) > 0.1 and np.ptp(heights) > 0.07
    assert len({str(common.car(seed)[0].colour) for seed in range(50)}) > 40
