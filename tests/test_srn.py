"""Families of scenes on disk (Scene Representation Networks). Real data: NERF_DATA=..."""
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import UserError
from conftest import real


def write_srn(folder, n=14, H=8, W=8, channels=3, seed=0, stated="512 512", f="525.0 256.0 256.0"):
    """A scene of noise -> pixels (n, H, W, channels) and c2w (n, 3, 4) with OpenGL axes. Every
    fourth camera stands below -0.5."""
    rng = np.random.default_rng(seed)
    for part in ("rgb", "pose"):
        (folder / part).mkdir(parents=True)
    pixels, c2w = rng.integers(0, 256, (n, H, W, channels), dtype=np.uint8), []
    for v in range(n):
        iio.imwrite(folder / f"rgb/{v:06d}.png", pixels[v])
        elevation = -0.6 if v % 4 == 3 else rng.uniform(-0.3, 1.4)
        c2w.append(common.orbit_pose(rng.uniform(0, 6), elevation, 1.3))
        pose = np.vstack([c2w[v] * [1, -1, -1, 1], [0, 0, 0, 1]])
        (folder / f"pose/{v:06d}.txt").write_text(" ".join(map(str, pose.flatten())))
    (folder / "intrinsics.txt").write_text(f"{f} 0.\n0. 0. 0.\n1.\n{stated}\n")
    return pixels, np.stack(c2w)


def all_views(family, size, **more):
    """All views of its only scene, by name."""
    train, test = common.load_family(str(family), ".", size, above=False, **more).read(0)
    return common.join_views(test, train)


def test_srn_read_back_exactly(tmp_path):
    pixels, c2w = write_srn(tmp_path / "srn_cars/cars_train/b", n=20)
    write_srn(tmp_path / "srn_cars/cars_train/a", seed=1)
    family = common.load_family("cars_train", tmp_path, 8)
    assert (family.name, family.kind) == ("cars_train", "srn")
    assert [scene.name for scene in family.scenes] == ["a", "b"]
    assert (family.near, family.far) == (0.5, 2.1)
    train, test = family.read(1)
    kept = [v for v in range(20) if v % 4 != 3]             # from above; 10 of 15 are held out
    K = torch.tensor([[525 / 64, 0, 4], [0, 525 / 64, 4], [0, 0, 1]])       # of 512 px, for 8
    for views, ids in ((test, kept[:10]), (train, kept[10:])):
        assert views.names == [f"rgb/{v:06d}.png" for v in ids]
        assert views.alpha is None and views.depth is None
        found = (views.images.numpy() * 255).round().astype(np.uint8)
        assert np.array_equal(found, pixels[ids]) and np.allclose(views.c2w, c2w[ids], atol=1e-6)
        assert views.K.dtype == torch.float32 and torch.allclose(views.K, K.expand(len(ids), 3, 3))
    train, test = common.load_family("cars_train", tmp_path, 8, above=False).read(1)
    assert len(test.names) == len(train.names) == 10 and "rgb/000003.png" in test.names


@pytest.mark.parametrize("n, kept, held_out",
                         [(16, 12, 10), (14, 11, 3), (6, 5, 1), (3, 3, 1), (2, 2, 1)])
def test_few_views_are_split_sensibly(tmp_path, n, kept, held_out):
    write_srn(tmp_path / "mine/one", n=n)
    train, test = common.load_family("mine", tmp_path, 8).read(0)
    assert len(test.names) == held_out and len(train.names) == kept - held_out
    assert not set(test.names) & set(train.names)


@pytest.mark.parametrize("stated, f", [("6 6", "7.0 3.4 2.9"), ("60 60", "70 34 29")])
def test_pictures_are_averaged(tmp_path, stated, f):
    pixels, _ = write_srn(tmp_path / "one", n=4, H=6, W=6, channels=4, stated=stated, f=f)
    views = all_views(tmp_path, 3, bg="black")
    pixels = pixels / 255
    pixels[..., :3] *= pixels[..., 3:]
    mean = pixels.reshape(4, 3, 2, 3, 2, 4).mean((2, 4))
    assert np.allclose(views.images, mean[..., :3], atol=1e-6)
    assert np.allclose(views.alpha, mean[..., 3], atol=1e-6)
    K = torch.tensor([[3.5, 0, 1.7], [0, 3.5, 1.45], [0, 0, 1]])
    assert torch.allclose(views.K, K.expand(4, 3, 3))
    grey = all_views(tmp_path, 3, bg="grey").images
    assert torch.allclose(grey, views.images + 0.5 * (1 - views.alpha[..., None]), atol=1e-6)


def test_pictures_that_are_not_square_are_refused(tmp_path):
    for name, H, W, stated in (("a", 6, 10, "512 512"), ("b", 8, 8, "60 100")):
        write_srn(tmp_path / name / "one", n=4, H=H, W=W, stated=stated)
        with pytest.raises(UserError, match=f"{name}/one/intrinsics.txt.* must be square"):
            all_views(tmp_path / name, 6)


@pytest.mark.parametrize("value", [255, 254])
def test_an_alpha_that_is_1_everywhere_says_nothing(tmp_path, value):
    pixels, _ = write_srn(tmp_path / "one", n=3, channels=4)
    for v in range(3):
        pixels[v, ..., 3] = 255
        pixels[v, 2, 3, 3] = value
        iio.imwrite(tmp_path / f"one/rgb/{v:06d}.png", pixels[v])
    assert (all_views(tmp_path, 8).alpha is None) == (value == 255)


def test_files_as_other_systems_write_them(tmp_path):
    """Hidden files beside the real ones, a byte-order mark, an extension in capitals."""
    write_srn(tmp_path / "one", n=3)
    wanted = all_views(tmp_path, 8)
    for path in [*tmp_path.glob("one/pose/*"), tmp_path / "one/intrinsics.txt"]:
        path.write_text(path.read_text(), encoding="utf-8-sig")
    for path in [*tmp_path.glob("*/*/*")]:
        path.with_name("._" + path.name).write_bytes(b"Mac OS X")
    (tmp_path / "one/rgb/000001.png").rename(tmp_path / "one/rgb/000001.PNG")
    found = all_views(tmp_path, 8)
    assert torch.equal(found.images, wanted.images) and torch.equal(found.c2w, wanted.c2w)


def test_look_up(tmp_path, capsys):
    for where in ("srn_cars/cars_train/a", "srn_cars/cars_train/b", "srn_cars/cars_test/c",
                  "mine/x", "cars/z"):
        write_srn(tmp_path / where, n=3)
    (tmp_path / "mine/.cache").mkdir()
    (tmp_path / "mine/__MACOSX").mkdir()
    (tmp_path / "empty").mkdir()
    for name, family, scenes in (
            ("srn_cars/cars_train", "cars_train", "ab"), ("cars_train", "cars_train", "ab"),
            (tmp_path / "srn_cars", "cars_train", "ab"), ("cars_test", "cars_test", "c"),
            ("mine", "mine", "x")):
        found = common.load_family(str(name), tmp_path, 8)
        assert found.name == family and [scene.name for scene in found.scenes] == [*scenes]
    assert common.load_family("cars", tmp_path, 8).kind == "builtin"        # always
    assert capsys.readouterr().err == ""
    for name, named in (("empty", "empty: no folders with rgb/"), ("", "not found"),
                        ("srn_cars/cars_train/b", "b: no folders with rgb/"),      # one scene
                        ("no", "mine.*srn_cars/cars_train.*cars"), ("lego", "not found")):
        with pytest.raises(UserError, match=named):
            common.load_family(name, tmp_path, 8)
    for name in ("srn_cars", "cars_val"):
        assert common.load_family(name, tmp_path / "empty", 8).kind == "builtin"
        message = capsys.readouterr().err
        assert f"'{name}' is not under" in message and str(tmp_path / "empty/srn_cars") in message
        with pytest.raises(UserError, match="not found"):
            common.load_scene(name, tmp_path / "empty")


def text(part, change):
    """A mutation: another text in a file of the scene."""
    def mutate(folder):
        path = folder / part
        path.write_text(change(path.read_text()))
    return mutate


def pose(change):
    """A mutation: another matrix (4, 4) in pose/000001.txt."""
    return text("pose/000001.txt", lambda old: " ".join(
        map(str, change(np.array(old.split(), float).reshape(4, 4)).flatten())))


def without(pattern):
    """A mutation: these files are missing."""
    return lambda folder: [path.unlink() for path in folder.glob(pattern)]


def cut(folder):
    """The head of a picture is there, and half of its pixels."""
    path = folder / "rgb/000002.png"
    path.write_bytes(path.read_bytes()[:120])


WIDE = np.zeros((8, 10, 3), np.uint8)
NUMBERS = "intrinsics.txt: f cx cy, and H W in the last line, must be 5 finite numbers"
MALFORMED = [
    (without("intrinsics.txt"), "intrinsics.txt: not usable (No such file"),
    (text("intrinsics.txt", lambda _: ""), "intrinsics.txt: not usable (IndexError"),
    (text("intrinsics.txt", lambda old: old.replace("512 512", "512")), NUMBERS),
    (text("intrinsics.txt", lambda old: old.replace("525.0", "nan")), NUMBERS),
    (text("intrinsics.txt", lambda old: old.replace("525.0", "0")), "f, H and W must be positive"),
    (text("pose/000001.txt", lambda old: old[:-4]), "000001.txt: not usable (ValueError"),
    (pose(lambda m: m * [np.nan, 1, 1, 1]), "000001.txt: it is not a rotation"),
    (pose(lambda m: m * [-1, 1, 1, 1]), "000001.txt: it is not a rotation"),
    (pose(lambda m: m.T), "000001.txt: it is not a rotation and a shift"),
    (without("pose/000001.txt"), "6 pictures, but 5 poses"),
    (without("rgb/000001.png"), "5 pictures, but 6 poses"),
    (lambda f: (f / "rgb/000001.png").rename(f / "rgb/1.png"), "pose/1.txt: not usable (No"),
    (without("*/*"), "0 of 0 views are used, two are needed"),
    (without("*/00000[1245].*"), "1 of 2 views are used, two are needed"),
    (cut, "000002.png: not usable ("),
    (lambda f: iio.imwrite(f / "rgb/000002.png", WIDE), "rgb/000002.png: not 8x8 px"),
]


@pytest.mark.parametrize("mutate, named", MALFORMED)
def test_malformed_srn(tmp_path, mutate, named):
    for name in ("a", "b", "c"):
        write_srn(tmp_path / "mine" / name, n=6)
    mutate(tmp_path / "mine/b")
    family = common.load_family("mine", tmp_path, 8)
    with pytest.raises(UserError) as error:
        family.read(1)
    message = str(error.value)
    assert str(tmp_path / "mine/b") in message and len(message.splitlines()) == 1
    assert named in message, message


def test_what_does_not_exist(tmp_path):
    write_srn(tmp_path / "mine/one", n=3)
    for i in (1, -1):
        with pytest.raises(UserError, match=f"scene {i} does not exist: it has 1"):
            common.load_family("mine", tmp_path, 8).read(i)
    with pytest.raises(UserError, match="--size 9"):        # pictures have 8 px
        common.load_family("mine", tmp_path, 9).read(0)
    with pytest.raises(UserError, match="--size 0 must be"):
        common.load_family("cars", tmp_path, 0)


# ------------------------------------------------------------------------------- real pictures

def grown(mask, r):
    """(V, H, W) bool, r pixels wider on all sides."""
    return F.max_pool2d(mask.float()[:, None], 2 * r + 1, 1, r)[:, 0] > 0


def hull_overlap(silhouettes, K, c2w, aabb, n=64):
    """How well the cameras explain silhouettes (V, H, W): a grid of n^3 points is carved with all
    but one and projected into that one -> mean IoU."""
    steps = (torch.arange(n) + 0.5) / n
    points = torch.cartesian_prod(steps, steps, steps) * (aabb[1] - aabb[0]) + aabb[0]
    V, H, W = silhouettes.shape
    pixel, seen = [], []                                    # (n^3,) each; -1: not in the picture
    for v in range(V):
        x, y, z = ((points - c2w[v, :, 3]) @ c2w[v, :, :3]).unbind(-1)
        col = (K[v, 0, 2] - K[v, 0, 0] * x / z).floor().long()
        row = (K[v, 1, 2] + K[v, 1, 1] * y / z).floor().long()
        inside = (z < 0) & (col >= 0) & (col < W) & (row >= 0) & (row < H)
        pixel.append(torch.where(inside, row * W + col, -1))
        seen.append(inside & silhouettes[v].flatten()[pixel[v].clamp(min=0)])
    overlap = []
    for v in range(V):
        left = pixel[v][torch.stack(seen[:v] + seen[v + 1:]).all(0)]
        hull = torch.zeros(H * W, dtype=torch.bool)
        hull[left[left >= 0]] = True
        hull = ~grown(~grown(hull.view(1, H, W), 1), 1)[0]  # closed: points are not solid
        both, either = hull & silhouettes[v], hull | silhouettes[v]
        overlap.append(float(both.sum() / either.sum()))
    return np.mean(overlap)


def test_real_srn_cars():
    data = Path(real("srn_cars/cars_train"))
    family = common.load_family("srn_cars", data, 64)
    assert family.kind == "srn" and family.name == "cars_train" and len(family.scenes) >= 3
    for i in range(3):
        train, test = family.read(i)
        assert len(train.names) == 4 and len(test.names) == 2 and train.alpha is None
        views = common.join_views(test, train)
        assert float(views.K[0, 0, 0]) == pytest.approx(525 / 8) and float(views.K[0, 1, 2]) == 32
        position = views.c2w[:, :, 3]
        assert torch.allclose(position.norm(dim=-1), torch.tensor(1.3), atol=1e-4)
        assert (views.images[:, :, 0] == 1).all() and views.images.mean() > 0.6
        solid = ~grown(~grown((views.images < 0.99).any(-1), 2), 2)     # white parts close up
        iou = hull_overlap(solid, views.K, views.c2w, family.aabb)
        assert iou > 0.78                                   # a hull of five views is larger
        inverse = views.c2w[:, :, :3].mT
        wrong = [(views.c2w * torch.tensor([1.0, -1, -1, 1]), views.K),         # OpenCV's axes
                 (views.c2w * torch.tensor([-1.0, 1, 1, 1]), views.K),          # mirrored
                 (torch.cat([inverse, -inverse @ views.c2w[:, :, 3:]], -1), views.K),
                 (views.c2w, common.scale_K(views.K, 2, 2))]        # of pictures of 128 px
        for c2w, K in wrong:
            assert hull_overlap(solid, K, c2w, family.aabb) < iou - 0.1
