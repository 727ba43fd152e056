"""Families of scenes on disk (Scene Representation Networks). Real data: NERF_DATA=..."""
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import common
from common import UserError
from conftest import assert_malformed, change_file, real, write_srn


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
    mean = pixels[..., 3].reshape(4, 3, 2, 3, 2).mean((2, 4)) / 255
    assert np.allclose(views.alpha, mean, atol=1e-6)
    K = torch.tensor([[3.5, 0, 1.7], [0, 3.5, 1.45], [0, 0, 1]])
    assert torch.allclose(views.K, K.expand(4, 3, 3))


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


def text(part, change):
    """A mutation: another text in a file of the scene."""
    return change_file(part, lambda old: change(old.decode()).encode())


def pose(change):
    """A mutation: another matrix (4, 4) in pose/000001.txt."""
    return text("pose/000001.txt", lambda old: " ".join(
        map(str, change(np.array(old.split(), float).reshape(4, 4)).flatten())))


WIDE = np.zeros((8, 10, 3), np.uint8)
MALFORMED = [
    (change_file("intrinsics.txt"), "intrinsics.txt: not usable (No such file"),
    (text("intrinsics.txt", lambda _: ""), "intrinsics.txt: f cx cy, ..., H W must be 5 finite"),
    (text("intrinsics.txt", lambda old: old.replace("512 512", "512")), "H = W"),
    (text("intrinsics.txt", lambda old: old.replace("512 512", "60 100")), "H = W"),
    (text("intrinsics.txt", lambda old: old.replace("525.0", "nan")), "must be 5 finite numbers"),
    (text("intrinsics.txt", lambda old: old.replace("525.0", "0")), "f, H and W must be positive"),
    (lambda f: [iio.imwrite(p, WIDE) for p in f.glob("*/*.png")], "must be square, not 10x8"),
    (text("pose/000001.txt", lambda old: old[:-4]), "000001.txt: not usable (ValueError"),
    (pose(lambda m: m * [np.nan, 1, 1, 1]), "000001.txt: it is not a rotation"),
    (pose(lambda m: m * [-1, 1, 1, 1]), "000001.txt: it is not a rotation"),
    (pose(lambda m: m.T), "000001.txt: it is not a rotation and a shift"),
    (change_file("pose/000001.txt"), "6 pictures, but 5 poses"),
    (change_file("rgb/000001.png"), "5 pictures, but 6 poses"),
    (lambda f: (f / "rgb/000001.png").rename(f / "rgb/1.png"), "pose/1.txt: not usable (No"),
    (change_file("*/*"), "0 of 0 views are used, two are needed"),
    (change_file("*/00000[1245].*"), "1 of 2 views are used, two are needed"),
    (change_file("rgb/000002.png", lambda old: old[:120]), "000002.png: not usable ("),
    (lambda f: iio.imwrite(f / "rgb/000002.png", WIDE), "rgb/000002.png: not 8x8 px"),
]


@pytest.mark.parametrize("mutate, named", MALFORMED)
def test_malformed_srn(tmp_path, mutate, named):
    for name in ("a", "b", "c"):
        write_srn(tmp_path / "mine" / name, n=6)
    mutate(tmp_path / "mine/b")
    family = common.load_family("mine", tmp_path, 8)
    assert_malformed(lambda: family.read(1), tmp_path / "mine/b", named)


def test_real_srn_cars():
    family = common.load_family("srn_cars", Path(real("srn_cars/cars_train")), 64)
    assert family.kind == "srn" and family.name == "cars_train" and len(family.scenes) >= 3
    for i in range(3):
        train, test = family.read(i)
        assert len(train.names) == 4 and len(test.names) == 2 and train.alpha is None
        views = common.join_views(test, train)
        assert float(views.K[0, 0, 0]) == pytest.approx(525 / 8) and float(views.K[0, 1, 2]) == 32
        position, back = views.c2w[:, :, 3], views.c2w[:, :, 2]         # they look at the middle
        assert torch.allclose(position, 1.3 * back, atol=1e-2)
        assert torch.allclose(position.norm(dim=-1), torch.tensor(1.3), atol=1e-4)
        assert (views.images[:, :, 0] == 1).all() and views.images.mean() > 0.6
