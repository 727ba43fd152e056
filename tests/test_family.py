"""Families of many scenes in common.py: the built-in `cars` and the SRN layout. Real data: NERF_DATA=... (else said to be skipped)."""
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import UserError  # noqa: E402
from conftest import real  # noqa: E402

SIZE = 32


def project(points, K, c2w):
    """Pixel coordinates (N, 2) and depth along the axis (N,) of world points (N, 3)."""
    x, y, z = ((points - c2w[:, 3]) @ c2w[:, :3]).unbind(-1)
    return torch.stack([K[0, 2] - K[0, 0] * x / z, K[1, 2] + K[1, 1] * y / z], -1), -z


@pytest.fixture(scope="module")
def cars():
    """The built-in family at 32 px, and its first 4 cars."""
    family = common.load_family("cars", "no such folder", SIZE)
    return family, [family.read(i) for i in range(4)]


# ---------------------------------------------------------------------------------------------------------------- cars

def test_cars_are_what_they_say(cars):
    family, scenes = cars
    assert (family.name, family.kind, family.size, family.near, family.far) == ("cars", "builtin", SIZE, 0.5, 2.1)
    assert len(family.scenes) >= 10_000 and torch.equal(family.aabb, torch.tensor([[-0.5] * 3, [0.5] * 3]))
    assert torch.equal(family.bg, torch.ones(3)) and family.above
    for train, test in scenes:
        assert len(test.names) == 10 and 12 <= len(train.names) <= 40 and not set(train.names) & set(test.names)
        assert test.names + train.names == sorted(test.names + train.names)     # the first ten of those kept
        for views in (train, test):
            V = len(views.names)
            assert views.images.shape == (V, SIZE, SIZE, 3) and views.alpha.shape == views.depth.shape == (V, SIZE, SIZE)
            assert 0 <= views.images.min() and views.images.max() <= 1 and 0 <= views.alpha.min() and views.alpha.max() <= 1
            assert (views.images[views.alpha == 0] == 1).all() and ((views.alpha > 0) & (views.alpha < 1)).any()
            hit = views.depth > 0
            assert (views.depth[hit] > family.near).all() and (views.depth[hit] < family.far).all()
            assert torch.equal(views.K, torch.tensor([[525 / 512 * SIZE, 0, SIZE / 2], [0, 525 / 512 * SIZE, SIZE / 2], [0, 0, 1]]))
            assert 0.08 < views.alpha.mean() < 0.3
            border = torch.cat([views.alpha[:, 0], views.alpha[:, -1], views.alpha[:, :, 0], views.alpha[:, :, -1]], 1)
            assert (border == 0).all()                                  # a car is in the picture as a whole


def test_cameras_stand_on_a_sphere_and_look_at_the_middle(cars):
    _, scenes = cars
    for views in (views for scene in scenes for views in scene):
        position, V = views.c2w[:, :, 3], len(views.names)
        assert torch.allclose(position.norm(dim=-1), torch.tensor(1.3), atol=1e-5)
        assert torch.allclose(views.c2w[:, :, :3].mT @ views.c2w[:, :, :3], torch.eye(3).expand(V, 3, 3), atol=1e-5)
        assert torch.allclose(torch.linalg.det(views.c2w[:, :, :3]), torch.ones(V), atol=1e-5)
        assert (views.c2w[:, 2, 0].abs() < 1e-6).all() and (views.c2w[:, 2, 1] > 0).all()             # upright
        for c2w in views.c2w:
            xy, ahead = project(torch.zeros(1, 3), views.K, c2w)
            assert torch.allclose(xy, torch.full((1, 2), SIZE / 2), atol=1e-4) and float(ahead) == pytest.approx(1.3, abs=1e-5)
    everywhere = torch.cat([common.load_car(seed, 1, torch.ones(3), False).c2w[:, :, 3] for seed in range(20)]) / 1.3
    assert len(everywhere) == 1000                                      # uniform over the sphere: mean 0, variance 1/3, each with
    assert everywhere.mean(0).abs().max() < 5 * (1 / 3 / 1000) ** 0.5   # five standard errors
    assert ((everywhere ** 2).mean(0) - 1 / 3).abs().max() < 5 * (4 / 45 / 1000) ** 0.5


def test_above_leaves_out_the_views_from_below(cars):
    family, scenes = cars
    whole = common.load_family("cars", ".", SIZE, above=False)
    for i in range(2):
        everything, kept = (common.join_views(test, train) for train, test in (whole.read(i), scenes[i]))
        above = (everything.c2w[:, 2, 3] > -0.5).nonzero().flatten().tolist()
        assert everything.names == [f"{v:06d}" for v in range(50)] and 20 < len(above) < 50
        assert kept.names == [everything.names[v] for v in above] and torch.equal(kept.c2w, everything.c2w[above])
        assert torch.equal(kept.images, everything.images[above])


def test_a_car_depends_on_its_seed_alone(cars):
    family, scenes = cars
    assert repr(common.car(7)) == repr(common.car(7)) != repr(common.car(8))
    np.random.seed(3)
    torch.manual_seed(3)
    for i in (3, 0):                                                    # in any order, whatever was drawn before
        for a, b in zip(family.read(i), scenes[i]):
            assert a.names == b.names and all(torch.equal(getattr(a, k), getattr(b, k)) for k in ("images", "alpha", "depth", "c2w", "K"))
    assert family.read(2)[0].images is not family.read(2)[0].images     # nothing is kept
    code = "import common; print(common.load_family('cars', '.', 32).read(3)[0].images.double().sum().item(), common.car(5)[0])"
    elsewhere = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert elsewhere == f"{scenes[3][0].images.double().sum().item()} {common.car(5)[0]}"
    for seed in range(5):                                               # cars differ, and so do their cameras
        a, b = common.Car.draw(seed), common.Car.draw(seed + 1)
        assert a.length != b.length and a.paint != b.paint and not torch.equal(scenes[seed % 4][1].c2w, scenes[(seed + 1) % 4][1].c2w)


def test_cameras_do_not_depend_on_the_size(cars):
    _, scenes = cars
    for large, small in zip(common.load_family("cars", ".", 2 * SIZE).read(1), scenes[1]):
        assert torch.equal(large.c2w, small.c2w) and torch.allclose(large.K[:2] / 2, small.K[:2]) and large.names == small.names
        halved = F.avg_pool2d(large.images.movedim(-1, 1), 2).movedim(1, -1)
        assert (halved - small.images).abs().mean() < 0.01              # the same picture, but for how edges are sampled


def test_background_is_behind_and_nothing_else(cars):
    _, scenes = cars
    red = common.load_family("cars", ".", SIZE, bg=(0.8, 0.1, 0.2))
    for a, b in zip(red.read(0), scenes[0]):
        assert torch.equal(a.alpha, b.alpha) and torch.equal(a.depth, b.depth)
        clear = (1 - a.alpha)[..., None]
        assert torch.allclose(a.images - clear * red.bg, b.images - clear, atol=1e-6)


def test_cars_fit_their_box_and_vary():
    lengths, heights, kinds = [], [], set()
    for seed in range(300):
        parts, c = common.car(seed), common.Car.draw(seed)
        R = np.stack([np.eye(3) if p.rotation is None else p.rotation for p in parts])
        assert np.allclose(R @ R.transpose(0, 2, 1), np.eye(3)) and np.allclose(np.linalg.det(R), 1)
        half, centre = np.array([p.half for p in parts]), np.array([p.centre for p in parts])
        assert (half > 0).all()
        reach = (np.abs(R) @ half[..., None])[..., 0]
        low, high = (centre - reach).min(0), (centre + reach).max(0)
        assert (low > -0.5).all() and (high < 0.5).all()
        assert (abs(low + high) < 0.01).all()                           # its box has the origin in the middle
        assert high[0] - low[0] == pytest.approx(c.length, abs=0.04) and high[0] - low[0] > 1.7 * (high[1] - low[1])
        lengths.append(high[0] - low[0])
        heights.append(high[2] - low[2])
        kinds.add((c.trim, c.spoiler > 0))
        assert c.rear_window + c.windscreen < 0.8                       # there is a roof between them
        assert c.cabin_offset + c.cabin / 2 < 0.5 - c.overhang / c.length and c.cabin_offset - c.cabin / 2 >= c.overhang / c.length - 0.5
        wheels = [p for p in parts if p.kind == "cylinder" and p.colour == (0.10, 0.10, 0.11)]
        assert len(wheels) == 4 and all(p.centre[2] - p.half[0] == pytest.approx(low[2], abs=1e-6) for p in wheels)     # on the ground
        assert all(p.centre[2] + p.half[0] < low[2] + c.clearance + c.nose * c.body for p in wheels)                    # below the bonnet
    assert len(kinds) == 6 and np.ptp(lengths) > 0.1 and np.ptp(heights) > 0.07


def test_windows_and_wheels_are_dark_and_the_paint_is_the_paint():
    """From the side, where everything shows: rays at a window, a tyre, a hub, the door."""
    for seed in range(12):
        c, parts = common.Car.draw(seed), common.car(seed)
        ground = -(c.clearance + c.body + c.cabin_height + 0.012) / 2
        belt, middle = ground + c.clearance + c.body, c.cabin_offset * c.length
        x1, x2 = middle + (c.rear_window - 0.5) * c.cabin * c.length, middle + (0.5 - c.windscreen) * c.cabin * c.length
        axle = c.wheelbase / 2 * c.length
        spots = torch.tensor([[0.75 * x1 + 0.25 * x2, belt + c.cabin_height / 2], [axle, ground + 0.2 * c.wheel], [axle, ground + c.wheel],
                              [0.0, belt - 0.3 * c.body]], dtype=torch.float32)
        o = torch.stack([spots[:, 0], torch.full((4,), -2.0), spots[:, 1]], -1)
        colour, alpha, _ = common.raycast(parts, o, torch.tensor([0.0, 1.0, 0.0]).expand(4, 3).contiguous())
        grey = colour.mean(-1)
        assert (alpha == 1).all() and grey[0] < 0.35 and grey[1] < 0.2 and grey[2] > 2 * grey[1], seed
        paint = torch.tensor(c.paint, dtype=torch.float32)
        assert F.cosine_similarity(colour[3], paint, dim=0) > 0.97, seed


def test_every_ray_of_a_packet_finds_what_it_would_find_alone(cars):
    """first_hit leaves out what the middle ray of a packet misses by far; a margin too small would cut pieces off."""
    _, scenes = cars
    views, shapes = scenes[0][0], common._Packed(common.car(0))
    rays = [torch.cat(x) for x in zip(*(common.view_rays(views, v, False) for v in range(12)))]
    o, d = (x.reshape(96, 4, 8, 4, 3).transpose(1, 2).reshape(-1, 3) for x in rays)                   # blocks of 4x4
    alone = common.first_hit(shapes, o, d, 1)
    for packet in (16, 64, 256):
        t, index = common.first_hit(shapes, o, d, packet)
        assert torch.equal(t, alone[0]) and torch.equal(shapes.colours[index], shapes.colours[alone[1]])               # parts may touch


def test_no_such_car(cars):
    family, _ = cars
    assert family.check([0, 99_999, 5], False) == [0, 99_999, 5]
    for bad in (len(family.scenes), -1):
        for ask in (family.read, lambda i: family.check([0, i], True)):
            with pytest.raises(UserError, match=rf"cars: scene {bad} does not exist.*0 to 99999"):
                ask(bad)
    for size in (0, -3):
        with pytest.raises(UserError, match="--size"):
            common.load_family("cars", ".", size)
    with pytest.raises(UserError, match="background"):
        common.load_family("cars", ".", 8, bg="pink")


# ---------------------------------------------------------------------------------------------------------- SRN layout

def write_srn(folder, n=14, H=8, W=8, channels=3, seed=0, stated=(512, 512), focal=525.0, centre=(256.0, 256.0)):
    """A scene of noise; returns pixels (n, H, W, channels), and c2w (n, 3, 4) in OpenGL's axes. Every fourth camera stands below -0.5."""
    rng = np.random.default_rng(seed)
    for part in ("rgb", "pose"):
        (folder / part).mkdir(parents=True)
    pixels, c2w = rng.integers(0, 256, (n, H, W, channels), dtype=np.uint8), []
    for v in range(n):
        iio.imwrite(folder / "rgb" / f"{v:06d}.png", pixels[v])
        c2w.append(common.orbit_pose(rng.uniform(0, 6), -0.6 if v % 4 == 3 else rng.uniform(-0.3, 1.4), 1.3))
        pose = np.vstack([c2w[v] * [1, -1, -1, 1], [0, 0, 0, 1]])       # OpenCV: y down, z ahead
        (folder / "pose" / f"{v:06d}.txt").write_text(" ".join(map(str, pose.flatten())))
    (folder / "intrinsics.txt").write_text(f"{focal} {centre[0]} {centre[1]} 0.\n0. 0. 0.\n1.\n{stated[0]} {stated[1]}\n")
    return pixels, np.stack(c2w)


def test_srn_read_back_exactly(tmp_path):
    pixels, c2w = write_srn(tmp_path / "srn_cars/cars_train/b", n=20)
    write_srn(tmp_path / "srn_cars/cars_train/a", seed=1)
    family = common.load_family("cars_train", tmp_path, 8)
    assert (family.name, family.kind) == ("cars_train", "srn") and [s.name for s in family.scenes] == ["a", "b"]
    assert (family.near, family.far) == (0.5, 2.1) and family.check([1, 0], False) == [1, 0]
    train, test = family.read(1)
    kept = [v for v in range(20) if v % 4 != 3]                         # above: 15 views, of which 10 are held out
    for views, ids in ((test, kept[:10]), (train, kept[10:])):
        assert views.names == [f"rgb/{v:06d}.png" for v in ids] and views.alpha is None and views.depth is None
        assert np.array_equal((views.images.numpy() * 255).round().astype(np.uint8), pixels[ids])
        assert np.allclose(views.c2w.numpy(), c2w[ids], atol=1e-6)
        assert torch.allclose(views.K, torch.tensor([[525 / 64, 0, 4], [0, 525 / 64, 4], [0, 0, 1]]))   # of 512 px, for 8
    train, test = common.load_family("cars_train", tmp_path, 8, above=False).read(1)
    assert len(test.names) == 10 and len(train.names) == 10 and "rgb/000003.png" in test.names


@pytest.mark.parametrize("n, kept, held_out", [(16, 12, 10), (14, 11, 3), (6, 5, 1), (3, 3, 1), (2, 2, 1)])
def test_few_views_are_split_sensibly(tmp_path, n, kept, held_out):
    write_srn(tmp_path / "one", n=n)
    train, test = common.load_family(str(tmp_path / "one"), tmp_path, 8).read(0)
    assert len(test.names) == held_out and len(train.names) == kept - held_out and not set(test.names) & set(train.names)


@pytest.mark.parametrize("H, W, stated, focal, centre", [
    (6, 10, (6, 10), 7.0, (5.4, 2.9)), (6, 10, (60, 100), 70.0, (54.0, 29.0)),
    (10, 6, (512, 512), 7 * 512 / 6, (3.4 * 512 / 6, 2.9 * 512 / 6))])                                # usual: it speaks of the square
def test_srn_pictures_are_cropped_to_a_square_and_averaged(tmp_path, H, W, stated, focal, centre):
    pixels, _ = write_srn(tmp_path / "one", n=4, H=H, W=W, channels=4, stated=stated, focal=focal, centre=centre)
    views = common.join_views(*common.load_family(str(tmp_path / "one"), ".", 3, bg="black", above=False).read(0)[::-1])
    square = (pixels[:, :, 2:8] if W > H else pixels[:, 2:8]) / 255
    means = (square * np.concatenate([square[..., 3:]] * 3 + [np.ones_like(square[..., 3:])], -1)).reshape(4, 3, 2, 3, 2, 4).mean((2, 4))
    assert np.allclose(views.images, means[..., :3], atol=1e-6) and np.allclose(views.alpha, means[..., 3], atol=1e-6)
    cx = 5.4 - 2 if W > H else 3.4                                      # in pixels of the square, of which two make one
    assert torch.allclose(views.K, torch.tensor([[3.5, 0, cx / 2], [0, 3.5, 2.9 / 2], [0, 0, 1]]))
    grey = common.join_views(*common.load_family(str(tmp_path / "one"), ".", 3, bg="grey", above=False).read(0)[::-1])
    assert torch.allclose(grey.images, views.images + 0.5 * (1 - views.alpha[..., None]), atol=1e-6)


def test_an_alpha_that_is_1_everywhere_says_nothing(tmp_path):
    for name, value in (("full", 255), ("nearly", 254)):
        pixels, _ = write_srn(tmp_path / name, n=3, channels=4)
        for v in range(3):
            pixels[v, ..., 3] = 255
            pixels[v, 2, 3, 3] = value
            iio.imwrite(tmp_path / name / "rgb" / f"{v:06d}.png", pixels[v])
        train, _ = common.load_family(str(tmp_path / name), ".", 8).read(0)
        assert (train.alpha is None) == (name == "full")


def test_family_lookup(tmp_path, capsys):
    for where in ("srn_cars/cars_train/a", "srn_cars/cars_train/b", "srn_cars/cars_test/c", "mine/x", "others/cars_test/y"):
        write_srn(tmp_path / where, n=3)
    (tmp_path / "mine/.cache").mkdir()
    (tmp_path / "mine/__MACOSX").mkdir()
    (tmp_path / "mine/readme.txt").write_text("")
    names = lambda name: [s.name for s in common.load_family(name, tmp_path, 8).scenes]
    for name in ("srn_cars/cars_train", "cars_train", "srn_cars", str(tmp_path / "srn_cars/cars_train"), str(tmp_path / "srn_cars")):
        assert names(name) == ["a", "b"] and common.load_family(name, tmp_path, 8).name == "cars_train"
    assert names("cars_test") == ["c"] and names("mine") == ["x"] and names("others") == ["y"]
    one = common.load_family("srn_cars/cars_train/b", tmp_path, 8)
    assert [s.name for s in one.scenes] == ["b"] and one.name == "b" and len(one.read(0)[0].names) == 2
    assert capsys.readouterr().err == ""
    (tmp_path / "cars").mkdir()                                         # "cars" is always the built-in one
    assert common.load_family("cars", tmp_path, 8).kind == "builtin" and capsys.readouterr().err == ""
    (tmp_path / "empty").mkdir()
    for name, named in (("empty", "empty"), ("no", "mine.*srn_cars/cars_train.*cars"), ("", "not found"), (str(tmp_path / "cars"), "cars")):
        with pytest.raises(UserError, match=named):
            common.load_family(name, tmp_path, 8)
    for name in ("srn_cars", "cars_train", "srn_cars/cars_train", "cars_val"):
        family = common.load_family(name, tmp_path / "empty", 8)
        message = capsys.readouterr().err
        assert (family.kind, family.name) == ("builtin", "cars") and len(message.splitlines()) >= 3
        assert f"'{name}' is not under" in message and str(tmp_path / "empty/srn_cars/cars_") in message
    for name in ("cars", "srn_cars"):
        with pytest.raises(UserError, match="family"):
            common.load_scene(name, tmp_path / "empty")


def _edit(part, change):
    """Lets `change` turn the text of a file into another one."""
    return lambda folder: (folder / part).write_text(change((folder / part).read_text()))


def _entry(k, value):
    return _edit("pose/000001.txt", lambda text: " ".join([*text.split()[:k], str(value), *text.split()[k + 1:]]))


def _pose(change):
    return _edit("pose/000001.txt", lambda text: " ".join(map(str, change(np.array(text.split(), float).reshape(4, 4)).flatten())))


def _empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def _cut(folder):                                                       # its head is there, and half of its pixels
    path = folder / "rgb/000002.png"
    path.write_bytes(path.read_bytes()[:120])


MALFORMED = {                                                           # -> what the message names: file, fault
    "no intrinsics": (lambda f: (f / "intrinsics.txt").unlink(), "intrinsics.txt", "No such file"),
    "empty intrinsics": (_edit("intrinsics.txt", lambda _: ""), "intrinsics.txt", "f cx cy"),
    "intrinsics of one line": (_edit("intrinsics.txt", lambda _: "525 256 256 0.\n"), "intrinsics.txt", "H W"),
    "intrinsics without a size": (_edit("intrinsics.txt", lambda text: text.replace("512 512", "512")), "intrinsics.txt", "H W"),
    "size 0": (_edit("intrinsics.txt", lambda text: text.replace("512 512", "512 0")), "intrinsics.txt", "H W"),
    "focal length 0": (_edit("intrinsics.txt", lambda text: text.replace("525.0", "0")), "intrinsics.txt", "f cx cy"),
    "focal length NaN": (_edit("intrinsics.txt", lambda text: text.replace("525.0", "nan")), "intrinsics.txt", "not finite"),
    "focal length a word": (_edit("intrinsics.txt", lambda text: text.replace("525.0", "long")), "intrinsics.txt", "'long'"),
    "intrinsics no text": (lambda f: (f / "intrinsics.txt").write_bytes(b"\xff\xfe\x00"), "intrinsics.txt", "numbers only"),
    "15 numbers": (_edit("pose/000001.txt", lambda text: text.rsplit(" ", 1)[0]), "000001.txt", "15 numbers"),
    "empty pose": (_edit("pose/000001.txt", lambda _: ""), "000001.txt", "0 numbers"),
    "pose a word": (_entry(3, "x"), "000001.txt", "'x'"),
    "NaN pose": (_entry(3, "nan"), "000001.txt", "not finite"),
    "infinite pose": (_entry(7, "-inf"), "000001.txt", "not finite"),
    "no rotation": (_entry(0, 2.0), "000001.txt", "rotation"),
    "mirrored": (_pose(lambda matrix: matrix * [-1, 1, 1, 1]), "000001.txt", "rotation"),
    "column by column": (_pose(lambda matrix: matrix.T), "000001.txt", "row"),
    "picture without pose": (lambda f: (f / "pose/000001.txt").unlink(), "000001.png", "pose/000001.txt"),
    "pose without picture": (lambda f: (f / "rgb/000001.png").unlink(), "000001.txt", "rgb/000001.png"),
    "a name twice": (lambda f: (f / "rgb/000001.jpg").write_bytes(b""), "rgb", "one name"),
    "no rgb": (lambda f: shutil.rmtree(f / "rgb"), "rgb", "not found"),
    "no pose": (lambda f: shutil.rmtree(f / "pose"), "pose", "not found"),
    "empty folder": (_empty, "rgb", "not found"),
    "no views": (lambda f: (_empty(f / "rgb"), _empty(f / "pose")), "two are the least", "0 views"),
    "one view from above": (lambda f: [file.unlink() for v in (1, 2, 4, 5) for file in f.glob(f"*/{v:06d}.*")],
                            "1 views from above", "two are the least"),
    "cut picture": (_cut, "000002.png", "not a readable image"),
    "empty picture": (lambda f: (f / "rgb/000000.png").write_bytes(b""), "000000.png", "not a readable image"),
    "another size": (lambda f: iio.imwrite(f / "rgb/000002.png", np.zeros((8, 10, 3), np.uint8)), "000002.png", "10x8"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_srn_is_a_user_error_that_names_it(tmp_path, capsys, what):
    harm, *named = MALFORMED[what]
    for name in ("a", "b", "c"):
        write_srn(tmp_path / "mine" / name, n=6)
    harm(tmp_path / "mine/b")
    family = common.load_family("mine", tmp_path, 8)
    with pytest.raises(UserError) as one:
        family.read(1)
    with pytest.raises(UserError) as all_:
        family.check([0, 1, 2], False)
    for error in (one, all_):
        assert all(word in str(error.value) for word in named) and str(tmp_path / "mine/b") in str(error.value), error.value
        assert "\n" not in str(error.value)
    assert "mine: 1 of 3 scenes" in str(all_.value) and "--skip-bad" in str(all_.value)
    assert capsys.readouterr().err == "" and family.check([0, 2], False) == [0, 2]
    assert family.check([2, 1, 0], True) == [2, 0]
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and str(tmp_path / "mine/b") in said and all(word in said for word in named)
    with pytest.raises(UserError, match="none is left"):
        family.check([1], True)
    assert len(family.read(2)[0].names) == 4                            # the others can be read


def test_check_counts_what_it_does_not_name_and_looks_at_all_ids_first(tmp_path, capsys):
    for k in range(7):
        write_srn(tmp_path / "mine" / f"s{k}", n=3)
        if k != 2:
            (tmp_path / "mine" / f"s{k}" / "intrinsics.txt").unlink()
    family = common.load_family("mine", tmp_path, 8)
    with pytest.raises(UserError) as error:
        family.check(list(range(7)), False)
    assert all(word in str(error.value) for word in ("6 of 7 scenes", "s0", "s1", "s3", "and 3 more")) and "s4" not in str(error.value)
    assert family.check(list(range(7)), True) == [2] and len(capsys.readouterr().err.splitlines()) == 6
    for ids in ([0, 7], [-1]):
        with pytest.raises(UserError, match="mine: scene (7|-1) does not exist: it has 7, numbers 0 to 6"):
            family.check(ids, True)
    for ask in (lambda: common.load_family("mine", tmp_path, 9).check([2], False), lambda: common.load_family("mine", tmp_path, 9).read(2)):
        with pytest.raises(UserError, match="--size 9"):                # pictures of 8 px
            ask()


def test_check_decodes_no_pixels(tmp_path, monkeypatch):
    write_srn(tmp_path / "mine/a", n=3)
    family = common.load_family("mine", tmp_path, 8)
    monkeypatch.setattr(common, "read_image", lambda path: pytest.fail("decoded"))
    assert family.check([0], False) == [0]


def test_cars_written_as_files_load_again(tmp_path, cars):
    words = [sys.executable, str(ROOT / "common.py"), "cars", "--out", "c", "--n", "2", "--size", str(SIZE)]
    subprocess.run(words, cwd=tmp_path, check=True, capture_output=True)
    family = common.load_family(str(tmp_path / "c"), tmp_path, SIZE)
    assert family.kind == "srn" and [s.name for s in family.scenes] == ["car_00000", "car_00001"] and family.check([0, 1], False) == [0, 1]
    for i in range(2):
        assert len(list((family.scenes[i] / "rgb").iterdir())) == 50
        for a, b in zip(family.read(i), cars[1][i]):
            assert [Path(name).stem for name in a.names] == b.names and torch.allclose(a.c2w, b.c2w, atol=1e-6) and torch.allclose(a.K, b.K)
            assert (a.images - b.images).abs().max() < 1.1 / 255 and (a.alpha - b.alpha).abs().max() < 0.6 / 255
    for more in (words, [*words[:3], "--out", "d", "--n", "0"]):
        again = subprocess.run(more, cwd=tmp_path, capture_output=True, text=True)
        assert again.returncode == 2 and again.stderr.startswith("error: ") and len(again.stderr.splitlines()) == 1
    assert not (tmp_path / "d").exists()


# ------------------------------------------------------------------------------------------------------------ real cars

def grown(mask, r):
    """(V, H, W) bool, r pixels wider on all sides."""
    return F.max_pool2d(mask.float()[:, None], 2 * r + 1, 1, r)[:, 0] > 0


def hull_scores(silhouettes, K, c2w, aabb, n=64):
    """Carve a grid of n^3 points in the box with all silhouettes but one, project what is left into that one: IoU (V,) with its silhouette,
    and the share of it that is covered (V,)."""
    steps = (torch.arange(n) + 0.5) / n
    points = torch.cartesian_prod(steps, steps, steps) * (aabb[1] - aabb[0]) + aabb[0]
    V, H, W = silhouettes.shape
    where, seen = [], []
    for v in range(V):
        xy, ahead = project(points, K, c2w[v])
        col, row = xy.floor().long().unbind(-1)
        inside = (ahead > 0) & (col >= 0) & (col < W) & (row >= 0) & (row < H)
        where.append(torch.where(inside, row * W + col, 0))
        seen.append(inside & silhouettes[v].flatten()[where[v]])
        where[v][~inside] = -1
    scores = []
    for v in range(V):
        left = where[v][torch.stack([seen[u] for u in range(V) if u != v]).all(0)]
        hull = torch.zeros(H * W, dtype=torch.bool)
        hull[left[left >= 0]] = True
        hull, truth = ~grown(~grown(hull.view(1, H, W), 1), 1)[0], silhouettes[v]                     # closed: points are not solid
        scores.append([float((hull & truth).sum() / (hull | truth).sum()), float((hull & truth).sum() / truth.sum())])
    return torch.tensor(scores).unbind(-1)


def test_hull_scores_of_the_built_in_cars(cars):
    """The measure itself, where the answer is known: 25 silhouettes carve a car well, six not so tightly, mirrored cameras none."""
    family, scenes = cars
    train = scenes[0][0]
    silhouettes = train.alpha > 0.5
    some = torch.arange(0, len(train.names), 4)
    iou, covered = hull_scores(silhouettes, train.K, train.c2w, family.aabb)
    assert iou.mean() > 0.85 and covered.mean() > 0.95
    assert hull_scores(silhouettes[some], train.K, train.c2w[some], family.aabb)[0].mean() > 0.6
    assert hull_scores(silhouettes, train.K, train.c2w * torch.tensor([1.0, -1.0, 1.0, 1.0]), family.aabb)[0].mean() < 0.5


def test_real_srn_cars():
    data = Path(real("srn_cars/cars_train"))
    family = common.load_family("srn_cars", data, 64)
    assert family.kind == "srn" and family.name == "cars_train" and len(family.scenes) >= 3 and family.check([0, 1, 2], False) == [0, 1, 2]
    flip = torch.tensor([1.0, -1.0, -1.0, 1.0])
    for i in range(3):
        train, test = family.read(i)
        assert len(train.names) == 4 and len(test.names) == 2 and train.alpha is None and train.images.shape == (4, 64, 64, 3)
        views = common.join_views(test, train)
        assert float(views.K[0, 0]) == pytest.approx(525 / 8) and float(views.K[1, 2]) == 32
        assert torch.allclose(views.c2w[:, :, 3].norm(dim=-1), torch.tensor(1.3), atol=1e-4)
        assert (views.images[:, :, 0] == 1).all() and views.images.mean() > 0.6
        solid = ~grown(~grown((views.images < 0.99).any(-1), 2), 2)     # white parts of a car close up
        iou, covered = hull_scores(solid, views.K, views.c2w, family.aabb)
        assert iou.mean() > 0.78 and covered.min() > 0.97, (iou, covered)   # a hull of five views is larger than a car, but holds it
        wrong = {"OpenCV's axes left as they are": views.c2w * flip, "turned upside down": views.c2w * torch.tensor([-1.0, -1.0, 1.0, 1.0]),
                 "mirrored": views.c2w * torch.tensor([-1.0, 1.0, 1.0, 1.0]),
                 "world to camera": torch.cat([views.c2w[:, :, :3].mT, -views.c2w[:, :, :3].mT @ views.c2w[:, :, 3:]], -1),
                 "rotation transposed": torch.cat([(views.c2w * flip)[:, :, :3].mT * flip[:3], views.c2w[:, :, 3:]], -1)}
        for what, c2w in wrong.items():
            assert hull_scores(solid, views.K, c2w, family.aabb)[0].mean() < iou.mean() - 0.1, what
        shifted, far = views.K.clone(), views.K.clone()
        shifted[0, 2] += 5                                              # pixels
        far[:2] *= 2                                                    # intrinsics of pictures of 128 px
        for K in (shifted, far):
            assert hull_scores(solid, K, views.c2w, family.aabb)[0].mean() < iou.mean() - 0.1
