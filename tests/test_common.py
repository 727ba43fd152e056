"""common.py against known answers. Real data: NERF_DATA=... ; without it those tests say that they were skipped."""
import http.server
import io
import json
import math
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import UserError  # noqa: E402
from conftest import real  # noqa: E402

WHITE = torch.ones(3)


def pose(position=(0.0, -4.0, 0.0), target=(0.0, 0.0, 0.0)):
    return np.vstack([common.look_at(position, target), [0, 0, 0, 1]])


def write_blender(folder, splits=("train", "test"), H=8, W=12, n=2, channels=4, edit=None, seed=0):
    """A tiny scene of noise; returns the pixels of each split."""
    rng = np.random.default_rng(seed)
    pixels = {}
    for split in splits:
        (folder / split).mkdir(parents=True, exist_ok=True)
        pixels[split] = rng.integers(0, 256, (n, H, W, channels), dtype=np.uint8)
        for v in range(n):
            iio.imwrite(folder / split / f"r_{v}.png", pixels[split][v])
        meta = {"camera_angle_x": 0.7, "frames": [{"file_path": f"./{split}/r_{v}", "transform_matrix": pose((v, -4.0, 1.0)).tolist()} for v in range(n)]}
        if edit:
            edit(meta)
        (folder / f"transforms_{split}.json").write_text(json.dumps(meta))
    return pixels


# ---------------------------------------------------------------------------------------------------------------- rays

def test_pixel_rays_by_hand():
    K = common._intrinsics(10.0, 20.0, 4.0, 3.0)
    c2w = torch.tensor([[1.0, 0, 0, 5], [0, 1, 0, 6], [0, 0, 1, 7]]).expand(3, 3, 4)
    o, d = common.pixel_rays(torch.tensor([[4.0, 3.0], [14.0, 3.0], [4.0, 23.0]]), K, c2w)
    s = math.sqrt(0.5)
    assert torch.equal(o, torch.tensor([5.0, 6, 7]).expand(3, 3))
    assert torch.allclose(d, torch.tensor([[0, 0, -1.0], [s, 0, -s], [0, -s, -s]]))


def test_pixel_rays_are_the_inverse_of_projection_and_differentiable():
    torch.manual_seed(0)
    K = common._intrinsics(50.0, 40.0, 31.0, 17.0)
    c2w = torch.tensor(pose((1.0, -3.0, 2.0))[:3], dtype=torch.float64).expand(20, 3, 4)
    world = torch.rand(20, 3, dtype=torch.float64) - 0.5
    camera = ((world - c2w[:, :, 3])[:, :, None] * c2w[:, :, :3]).sum(1)                 # R^T (x - position)
    xy = torch.stack([31 - 50 * camera[:, 0] / camera[:, 2], 17 + 40 * camera[:, 1] / camera[:, 2]], -1)
    o, d = common.pixel_rays(xy, K.double().expand(20, 3, 3), c2w)
    assert torch.allclose(o + (world - o).norm(dim=-1, keepdim=True) * d, world, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: common.pixel_rays(x, K.double(), c2w)[1], xy.requires_grad_())


def test_view_rays_order_is_row_by_row():
    views = common.Views(torch.zeros(1, 4, 6, 3), torch.tensor(pose()[:3], dtype=torch.float32)[None], common._intrinsics(9, 9, 3, 2), None, None, ["a"])
    o, d = common.view_rays(views, 0, False)
    expected = common.pixel_rays(torch.tensor([[4.5, 2.5]]), views.K, views.c2w)[1][0]  # row 2, column 4
    assert torch.equal(d[2 * 6 + 4], expected) and d.shape == (24, 3)


def test_ndc_ray_goes_through_the_images_of_the_ray_s_points():
    torch.manual_seed(0)
    H, W, near = 30, 40, 1.0
    K = common._intrinsics(35.0, 33.0, 20.0, 15.0).double()
    o = torch.randn(50, 3, dtype=torch.float64) * 0.2
    d = torch.nn.functional.normalize(torch.cat([torch.randn(50, 2, dtype=torch.float64) * 0.3, -torch.ones(50, 1, dtype=torch.float64)], -1), dim=-1)
    no, nd = common.ndc_rays(o, d, K, H, W, near)
    assert torch.allclose(no[:, 2], torch.full((50,), -1.0, dtype=torch.float64)) and torch.allclose(nd.norm(dim=-1), torch.ones(50, dtype=torch.float64))
    for t in (2.0, 5.0, 100.0):
        x = o + t * d
        image = torch.stack([-2 * 35 / W * x[:, 0] / x[:, 2], -2 * 33 / H * x[:, 1] / x[:, 2], 1 + 2 * near / x[:, 2]], -1)
        off = image - no
        assert torch.allclose(torch.linalg.cross(off, nd), torch.zeros_like(off), atol=1e-12)
        assert ((off * nd).sum(-1) > 0).all() and (image[:, 2] < 1).all()


# -------------------------------------------------------------------------------------------------------- reading scenes

@pytest.mark.parametrize("size", [None, 12, 6, 5, 1])
def test_resolution_is_an_area_average_of_premultiplied_colour(tmp_path, size):
    pixels = write_blender(tmp_path)["train"]
    bg = torch.tensor([0.2, 0.5, 0.9])
    views = common.load_blender(tmp_path, "train", size, bg)
    H, W = 8, 12
    w = size or 12
    h = max(1, round(8 * w / 12))
    expected, coverage = np.zeros((2, h, w, 3)), np.zeros((2, h, w))
    for v in range(2):
        for i in range(h):
            for j in range(w):
                for y in range(H):
                    for x in range(W):
                        dy = min((i + 1) * H / h, y + 1) - max(i * H / h, y)
                        dx = min((j + 1) * W / w, x + 1) - max(j * W / w, x)
                        if dy > 0 and dx > 0:
                            share = dy * dx / (H / h * W / w)
                            r, g, b, a = pixels[v, y, x] / 255
                            expected[v, i, j] += share * a * np.array([r, g, b])
                            coverage[v, i, j] += share * a
    expected += (1 - coverage[..., None]) * bg.numpy()
    assert views.images.shape == (2, h, w, 3)
    assert np.abs(views.images.numpy() - expected).max() < 1e-6 and np.abs(views.alpha.numpy() - coverage).max() < 1e-6
    assert views.K[0, 0] * 12 / w == pytest.approx(6 / math.tan(0.35)) and views.K[1, 2] == h / 2 and views.K[0, 2] == w / 2
    assert views.K[1, 1] * 8 / h == pytest.approx(6 / math.tan(0.35))


def test_blender_variants(tmp_path):
    pixels = write_blender(tmp_path / "rgb", channels=3, edit=lambda m: [f.update(file_path=f["file_path"] + ".png") for f in m["frames"]])
    scene = common.load_scene(str(tmp_path / "rgb"), tmp_path, bg="black")
    assert scene.train.alpha is None and scene.kind == "blender" and scene.name == "rgb" and not scene.ndc
    assert np.array_equal((scene.test.images.numpy() * 255).round().astype(np.uint8), pixels["test"])
    assert np.allclose(scene.train.c2w[1].numpy(), pose((1, -4.0, 1.0))[:3])
    write_blender(tmp_path / "fl", edit=lambda m: m.update(fl_x=20.0, fl_y=30.0, cx=10.0, cy=9.0, w=24, h=16))       # for 24x16: halved
    K = common.load_blender(tmp_path / "fl", "train", None, WHITE).K
    assert torch.equal(K, torch.tensor([[10.0, 0, 5.0], [0, 15.0, 4.5], [0, 0, 1]]))


def test_splits(tmp_path):
    write_blender(tmp_path / "data" / "nerf_synthetic" / "lego", splits=("train", "test"))
    data = tmp_path / "data"
    scene = common.load_scene("lego", data, test=False)
    assert len(scene.test.images) == 0 and len(scene.train.names) == 2 and scene.kind == "blender"
    with pytest.raises(UserError, match="transforms_val.json"):
        common.load_scene("lego", data, train_split="trainval")
    write_blender(data / "nerf_synthetic" / "lego", splits=("val",), n=3, edit=lambda m: m.update(camera_angle_x=0.9), seed=5)
    both = common.load_scene("lego", data, train_split="trainval").train
    assert both.images.shape[0] == 5 and both.K.shape == (5, 3, 3) and both.K[0, 0, 0] != both.K[4, 0, 0]
    assert torch.equal(common.view_rays(both, 4, False)[1][0], common.pixel_rays(torch.tensor([[0.5, 0.5]]), both.K[4], both.c2w[4:])[1][0])


def _frame(key, value):
    return lambda folder: write_blender(folder, edit=lambda m: m["frames"][1].update({key: value}))


def _then(change):
    def make(folder):
        write_blender(folder)
        change(folder)
    return make


MALFORMED = {
    "no json": (_then(lambda f: (f / "transforms_train.json").unlink()), "transforms_train.json"),
    "broken json": (_then(lambda f: (f / "transforms_train.json").write_text("{")), "transforms_train.json"),
    "json of another kind": (_then(lambda f: (f / "transforms_train.json").write_text("[]")), "transforms_train.json"),
    "not text": (_then(lambda f: (f / "transforms_train.json").write_bytes(b"\xff\xfe\x00")), "transforms_train.json"),
    "missing image": (_then(lambda f: (f / "train/r_1.png").unlink()), "r_1"),
    "truncated image": (_then(lambda f: (f / "train/r_1.png").write_bytes((f / "train/r_1.png").read_bytes()[:150])), "r_1"),
    "empty image": (_then(lambda f: (f / "train/r_0.png").write_bytes(b"")), "r_0"),
    "odd size": (_then(lambda f: iio.imwrite(f / "train/r_1.png", np.zeros((8, 10, 4), np.uint8))), "r_1.png: 10x8"),
    "NaN pose": (_frame("transform_matrix", (np.eye(4) * np.nan).tolist()), "frame 1"),
    "3x3 pose": (_frame("transform_matrix", np.eye(3).tolist()), "frame 1"),
    "ragged pose": (_frame("transform_matrix", [[1, 2], [3]]), "frame 1"),
    "text pose": (_frame("transform_matrix", "identity"), "frame 1"),
    "no frames": (lambda f: write_blender(f, edit=lambda m: m.update(frames=[])), "no frames"),
    "frame without path": (lambda f: write_blender(f, edit=lambda m: m["frames"][0].pop("file_path")), "file_path"),
    "no camera angle": (lambda f: write_blender(f, edit=lambda m: m.pop("camera_angle_x")), "camera_angle_x"),
    "zero camera angle": (lambda f: write_blender(f, edit=lambda m: m.update(camera_angle_x=0)), "camera_angle_x"),
    "NaN focal length": (lambda f: write_blender(f, edit=lambda m: m.update(fl_x=math.nan)), "fl_x"),
    "test of another size": (_then(lambda f: write_blender(f, splits=("test",), H=9)), "must agree"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_scene_is_a_user_error_that_names_it(tmp_path, what):
    make, named = MALFORMED[what]
    make(tmp_path / "scene")
    with pytest.raises(UserError) as error:
        common.load_scene(str(tmp_path / "scene"), tmp_path)
    assert named in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("size", [0, -3, 13])
def test_impossible_size(tmp_path, size):
    write_blender(tmp_path / "scene")
    with pytest.raises(UserError, match="--size"):
        common.load_scene(str(tmp_path / "scene"), tmp_path, size=size)


def test_lookup(tmp_path, capsys):
    write_blender(tmp_path / "nerf_synthetic" / "mine")
    with pytest.raises(UserError, match="mine.*bricks"):
        common.load_scene("legoo", tmp_path)
    with pytest.raises(UserError):
        common.load_scene("", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        common.load_scene("empty", tmp_path)
    for bad in ("pink", (1, 2, 3), (0.5, 0.5), None):
        with pytest.raises(UserError, match="background"):
            common.load_scene("mine", tmp_path, bg=bad)
    capsys.readouterr()
    scene = common.load_scene("lego", tmp_path, size=8, test=False)
    message = capsys.readouterr().err
    assert scene.kind == "builtin" and scene.name == "bricks" and "common.py download lego" in message and len(message.splitlines()) >= 3
    assert common.load_scene("mine", tmp_path).kind == "blender" and capsys.readouterr().err == ""


def write_llff(folder, n=9, factor=4, H=12, W=16):
    """Cameras on a line, all looking along -z of the world, in LLFF's axes [down, right, backwards]."""
    (folder / f"images_{factor}").mkdir(parents=True)
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (n, H, W, 3), dtype=np.uint8)
    rows = []
    for v in range(n):
        iio.imwrite(folder / f"images_{factor}" / f"im{v:03d}.png", pixels[v])
        matrix = np.stack([[0, -1.0, 0], [1.0, 0, 0], [0, 0, 1.0], [float(v), 10.0, 3.0], [H * factor, W * factor, 100.0]], -1)
        rows.append([*matrix.ravel(), 6.0, 50.0])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return pixels


def test_llff_with_a_known_answer(tmp_path):
    pixels = write_llff(tmp_path / "nerf_llff_data" / "line")
    scene = common.load_scene("line", tmp_path)
    assert scene.kind == "llff" and scene.ndc and len(scene.test.names) == 2 and len(scene.train.names) == 7
    assert np.array_equal((scene.test.images.numpy() * 255).round().astype(np.uint8), pixels[[0, 8]])
    assert torch.equal(scene.train.K, torch.tensor([[25.0, 0, 8], [0, 25.0, 6], [0, 0, 1]]))
    c2w = torch.cat([scene.test.c2w[:1], scene.train.c2w, scene.test.c2w[1:]])          # 0, 1..7, 8
    assert torch.allclose(c2w[:, :, :3], torch.eye(3).expand(9, 3, 3), atol=1e-6)       # recentred: the mean is the identity
    x = (torch.arange(9.0) - 4) / (6.0 * 0.75)                                          # nearest depth 6 -> 1/0.75
    assert torch.allclose(c2w[:, :, 3], torch.stack([x, 0 * x, 0 * x], -1), atol=1e-6)
    o, d = common.view_rays(scene.test, 0, True)
    assert torch.allclose(o[:, 2], torch.full((12 * 16,), -1.0), atol=1e-6)
    small = common.load_scene("line", tmp_path, size=8)
    assert small.train.images.shape[1:3] == (6, 8) and float(small.train.K[0, 0]) == 12.5
    path = common.turntable(scene, 5)
    assert path.shape == (5, 3, 4) and (path[:, 2, 2] > 0.8).all()                      # they still look forward
    for name, harm in {"rows": lambda f: np.save(f / "poses_bounds.npy", np.zeros((9, 16))), "count": lambda f: (f / "images_4/im003.png").unlink(),
                       "nan": lambda f: np.save(f / "poses_bounds.npy", np.full((9, 17), np.nan)), "cut": lambda f: (f / "poses_bounds.npy").write_bytes(b"\x93NUM")}.items():
        write_llff(tmp_path / name)
        harm(tmp_path / name)
        with pytest.raises(UserError, match=name):
            common.load_scene(name, tmp_path)
    with pytest.raises(UserError, match="split"):
        common.load_scene("line", tmp_path, train_split="trainval")


def test_llff_takes_the_smallest_folder_that_is_large_enough(tmp_path):
    write_llff(tmp_path / "a", factor=4, H=12, W=16)
    for v in range(9):
        (tmp_path / "a/images_2").mkdir(exist_ok=True)
        iio.imwrite(tmp_path / f"a/images_2/im{v}.png", np.zeros((24, 32, 3), np.uint8))
    names = lambda size: common.load_scene("a", tmp_path, size=size).train.names[0].split("/")[0]
    assert (names(None), names(16), names(17), names(32)) == ("images_4", "images_4", "images_2", "images_2")
    assert common.load_scene("a", tmp_path, size=32).train.K[0, 0] == 50


def write_dtu(folder, n=9, H=6, W=8, sign=1.0, name="{:06d}", edit=None):
    """Cameras on one side of an object of size 50 at (10, -20, 600), given by their projection times `sign`.

    Returns pixels (n, H, W, 3), masks (n, H, W), both 0..255, rotations to the OpenCV camera (n, 3, 3), and positions in the unit sphere's world.
    """
    (folder / "image").mkdir(parents=True)
    (folder / "mask").mkdir()
    rng = np.random.default_rng(2)
    pixels, masks = rng.integers(0, 256, (n, H, W, 3), dtype=np.uint8), rng.integers(0, 256, (n, H, W), dtype=np.uint8)
    cameras, rotations, positions = {}, [], []
    for v in range(n):
        iio.imwrite(folder / "image" / f"{name.format(v)}.png", pixels[v])
        iio.imwrite(folder / "mask" / f"{v:03d}.png", masks[v] if v % 2 else np.stack([masks[v]] * 3, -1))
        position = 3 * np.array([np.cos(0.2 * v), 0.3 * np.sin(2.0 * v), -np.sin(0.2 * v)])     # its axes: y down, as in the real scans
        right, up, back, _ = common.look_at(position, rng.uniform(-0.2, 0.2, 3), (0.1, -1, 0)).T
        R, K = np.stack([right, -up, -back]), np.array([[11.0, 0, 4.2 + 0.1 * v], [0, 9.5, 2.6], [0, 0, 1]])
        world = K @ np.concatenate([R, -R @ (50 * position + [10, -20, 600])[:, None]], 1)
        cameras[f"world_mat_{v}"] = np.vstack([sign * world, [0, 0, 0, 1]])
        cameras[f"scale_mat_{v}"] = np.array([[50.0, 0, 0, 10], [0, 50, 0, -20], [0, 0, 50, 600], [0, 0, 0, 1]], np.float32)
        rotations.append(R)
        positions.append(position)
    if edit:
        edit(cameras)
    np.savez(folder / "cameras.npz", **cameras)
    return pixels, masks, np.stack(rotations), np.stack(positions)


@pytest.mark.parametrize("size", [None, 4, 5])                                          # as on disk, halved, 5x4 (its pixels are not square)
def test_dtu_rays_go_through_the_points_that_the_matrices_project(tmp_path, size):
    _, _, R, position = write_dtu(tmp_path)
    views = common.load_dtu(tmp_path, size, WHITE)
    h, w = views.images.shape[1:3]
    assert (h, w) == {None: (6, 8), 4: (3, 4), 5: (4, 5)}[size] and views.K.shape == (9, 3, 3) and views.alpha is None and views.depth is None
    cameras = np.load(tmp_path / "cameras.npz")
    X = np.random.default_rng(0).uniform(-0.57, 0.57, (50, 3))
    for v in range(9):
        def project(points):                                          # from the unit sphere's world to pixels whose centres are integers
            p = np.c_[50 * points + [10, -20, 600], np.ones(len(points))] @ cameras[f"world_mat_{v}"][:3].T
            assert (p[:, 2] > 0).all()
            return p[:, :2] / p[:, 2:]
        xy = torch.tensor((project(X) + 0.5) * [w / 8, h / 6], dtype=torch.float32)
        o, d = common.pixel_rays(xy, views.K[v], views.c2w[v].expand(50, 3, 4))
        to = torch.tensor(X, dtype=torch.float32) - o
        along = (to * d).sum(-1, keepdim=True)
        assert (along > 1).all() and (to - along * d).norm(dim=-1).max() < 1e-4          # in front, and on the ray
        o, d = common.view_rays(views, v, False)
        back = (project((o + 3 * d).double().numpy()) + 0.5) * [w / 8, h / 6]
        assert np.abs(back - common.pixel_grid(h, w).numpy()).max() < 1e-4
    axes = np.stack([R[:, 0], -R[:, 1], -R[:, 2], position], -1)                         # OpenGL: x right, y up, z backwards
    assert np.abs(views.c2w.numpy() - axes).max() < 1e-5 and torch.allclose(torch.linalg.det(views.c2w[:, :, :3]), torch.ones(9), atol=1e-5)
    assert ((views.c2w[:, :, 2] * views.c2w[:, :, 3]).sum(-1) > 2.8).all()               # the object is ahead


def test_dtu_pictures_masks_split_and_lookup(tmp_path):
    pixels, masks, _, _ = write_dtu(tmp_path / "dtu" / "toy")
    scene = common.load_scene("toy", tmp_path, bg="black")
    assert scene.kind == "dtu" and scene.name == "toy" and not scene.ndc and scene.far == 5.0
    nearest = min(float(c.norm()) for views in (scene.train, scene.test) for c in views.c2w[:, :, 3])
    assert nearest > 2 and scene.near == pytest.approx(nearest - 1.1, abs=1e-6)                       # before the unit sphere, behind the cameras
    assert torch.equal(scene.aabb, torch.tensor([[-1.5] * 3, [1.5] * 3]))
    assert scene.test.names == ["image/000000.png", "image/000008.png"] and scene.train.names == [f"image/{v:06d}.png" for v in range(1, 8)]
    grey = lambda x: (x.numpy() * 255).round().astype(np.uint8)
    assert np.array_equal(grey(scene.test.images), pixels[[0, 8]]) and np.array_equal(grey(scene.train.images), pixels[1:8])
    assert np.array_equal(grey(scene.test.mask), masks[[0, 8]]) and np.array_equal(grey(scene.train.mask), masks[1:8])
    for size, shape in ((4, (3, 2, 4, 2)), (2, (2, 3, 2, 4))):
        small = common.load_scene("toy", tmp_path, size=size).train.mask.numpy()
        assert np.abs(small - masks[1:8].reshape(7, *shape).mean((2, 4)) / 255).max() < 1e-6
    both = common.join_views(scene.train, scene.test)
    assert torch.equal(both.mask, torch.cat([scene.train.mask, scene.test.mask])) and both.K.shape == (9, 3, 3)
    assert common.to_device(scene, "meta").train.mask.device.type == "meta"
    none = common.load_scene("toy", tmp_path, test=False).test
    assert none.names == [] and none.mask.shape == none.images.shape[:3] == (0, 6, 8)
    with pytest.raises(UserError, match="there is toy"):
        common.load_scene("toi", tmp_path)
    with pytest.raises(UserError, match="split"):
        common.load_scene("toy", tmp_path, train_split="val")
    for mask in (tmp_path / "dtu/toy/mask").glob("*"):
        mask.unlink()
    scene = common.load_scene("toy", tmp_path)
    assert scene.train.mask is None and scene.test.mask is None and common.join_views(scene.train, scene.test).mask is None
    pixels = write_dtu(tmp_path / "plain", n=11, name="{}")[0]                            # 10.png comes after 9.png
    assert np.array_equal(grey(common.load_dtu(tmp_path / "plain", None, WHITE).images), pixels)


def test_dtu_projections_are_known_up_to_a_factor(tmp_path):
    a, b = ((write_dtu(tmp_path / str(sign), sign=sign), common.load_dtu(tmp_path / str(sign), None, WHITE))[1] for sign in (1.0, -2.5))
    assert torch.allclose(a.c2w, b.c2w, atol=1e-5) and torch.allclose(a.K, b.K, atol=1e-4)


def test_dtu_turntable_stays_among_the_cameras_and_is_closed(tmp_path):
    write_dtu(tmp_path / "toy")
    scene = common.load_scene("toy", tmp_path)
    path, train = common.turntable(scene, 16), scene.train.c2w
    position = path[:, :, 3]
    assert path.shape == (16, 3, 4) and torch.allclose(position.norm(dim=-1), torch.tensor(3.0), atol=0.2)
    assert torch.allclose(path[:, :, 2], position / position.norm(dim=-1, keepdim=True), atol=1e-5)      # looks at the origin
    steps = (position - position.roll(1, 0)).norm(dim=-1)                                                # the last one leads back to the first
    assert 0.05 < steps.min() and steps.max() < 0.5
    towards = train[:, :, 3].mean(0) / train[:, :, 3].mean(0).norm()
    away = lambda x: (x @ towards / x.norm(dim=-1)).acos().max()
    assert away(position) < away(train[:, :, 3]) and (path[:, :, 1] @ train[:, :, 1].mean(0) > 0.5).all()


def _cameras(change):
    return lambda folder: write_dtu(folder, edit=change)


def _set(key, where, value):
    return _cameras(lambda c: c[key].__setitem__(where, value))


def _dtu(change):
    def make(folder):
        write_dtu(folder)
        change(folder)
    return make


MALFORMED_DTU = {
    "cut archive": (_dtu(lambda f: (f / "cameras.npz").write_bytes((f / "cameras.npz").read_bytes()[:3000])), "cameras.npz: not a readable"),
    "empty archive": (_dtu(lambda f: (f / "cameras.npz").write_bytes(b"")), "cameras.npz: not a readable"),
    "text": (_dtu(lambda f: (f / "cameras.npz").write_text("P\n1 2\n")), "cameras.npz: not a readable"),
    "one array": (_dtu(lambda f: np.save((f / "cameras.npz").open("wb"), np.eye(4))), "cameras.npz: not a readable"),
    "pickled objects": (_cameras(lambda c: c.update(world_mat_2=np.array([[None] * 4] * 4))), "cameras.npz: not a readable"),
    "no array": (_dtu(lambda f: zipfile.ZipFile(f / "cameras.npz", "w").writestr("world_mat_0", "eye")), "cameras.npz: world_mat_0 must be 4x4"),
    "no matrices": (_cameras(lambda c: c.clear()), "cameras.npz: world_mat_0 is missing"),
    "no world_mat_2": (_cameras(lambda c: c.pop("world_mat_2")), "cameras.npz: world_mat_2 is missing"),
    "no last world_mat": (_cameras(lambda c: c.pop("world_mat_8")), "cameras.npz: world_mat_8 is missing"),
    "no scale_mat_0": (_cameras(lambda c: c.pop("scale_mat_0")), "cameras.npz: scale_mat_0 is missing"),
    "3x4": (_cameras(lambda c: c.update(world_mat_3=c["world_mat_3"][:3])), "world_mat_3 must be 4x4"),
    "words": (_cameras(lambda c: c.update(scale_mat_3=c["scale_mat_3"].astype(str))), "scale_mat_3 must be 4x4 finite numbers"),
    "NaN": (_set("world_mat_4", (0, 3), np.nan), "world_mat_4 must be 4x4 finite"),
    "infinite scale": (_set("scale_mat_4", (1, 3), np.inf), "scale_mat_4 must be 4x4 finite"),
    "zeros": (_cameras(lambda c: c.update(world_mat_5=np.zeros((4, 4)))), "world_mat_5 is singular"),
    "two rows alike": (_cameras(lambda c: c["world_mat_5"].__setitem__(0, c["world_mat_5"][1])), "world_mat_5 is singular"),
    "skew": (_cameras(lambda c: c["world_mat_6"].__setitem__(0, c["world_mat_6"][0] + 0.1 * c["world_mat_6"][1])), "world_mat_6 has skew"),
    "uneven scale": (_set("scale_mat_7", (1, 1), 51), "scale_mat_7 must be"),
    "turned scale": (_set("scale_mat_7", (1, 0), 5), "scale_mat_7 must be"),
    "projective scale": (_set("scale_mat_7", (3, 0), 0.5), "scale_mat_7 must be"),
    "no scale": (_cameras(lambda c: [c[f"scale_mat_{v}"].__setitem__((range(3), range(3)), 0) for v in range(9)]), "scale_mat_0 must be"),
    "mirrored scale": (_cameras(lambda c: [c[f"scale_mat_{v}"].__setitem__((range(3), range(3)), -50) for v in range(9)]), "scale_mat_0 must be"),
    "another shift": (_set("scale_mat_7", (0, 3), 11), "scale_mat_7 differs"),
    "another scale": (_set("scale_mat_7", (range(3), range(3)), 51), "scale_mat_7 differs"),
    "no image folder": (_dtu(lambda f: (f / "image").rename(f / "rgb")), "image: no PNG or JPG"),
    "image gone": (_dtu(lambda f: (f / "image/000003.png").unlink()), "image: 8 files, but cameras.npz has 9"),
    "image too many": (_dtu(lambda f: iio.imwrite(f / "image/000009.png", np.zeros((6, 8, 3), np.uint8))), "image: 10 files"),
    "image cut": (_dtu(lambda f: (f / "image/000003.png").write_bytes((f / "image/000003.png").read_bytes()[:60])), "000003.png: not a readable"),
    "image of another size": (_dtu(lambda f: iio.imwrite(f / "image/000003.png", np.zeros((6, 9, 3), np.uint8))), "000003.png: 9x6"),
    "mask gone": (_dtu(lambda f: (f / "mask/003.png").unlink()), "mask: 8 files"),
    "mask of another size": (_dtu(lambda f: iio.imwrite(f / "mask/003.png", np.zeros((3, 4), np.uint8))), "003.png: 4x3 px, but 000000.png has 8x6"),
    "one view": (lambda f: write_dtu(f, n=1), "one view only"),
}


@pytest.mark.parametrize("what", MALFORMED_DTU)
def test_malformed_dtu_is_a_user_error_that_names_it(tmp_path, what):
    make, named = MALFORMED_DTU[what]
    make(tmp_path / "scan")
    bytes_there = lambda: {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    before = bytes_there()
    with pytest.raises(UserError) as error:
        common.load_scene(str(tmp_path / "scan"), tmp_path)
    assert named in str(error.value) and str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1
    assert bytes_there() == before


def test_real_lego():
    data = Path(real("nerf_synthetic/lego"))
    began = time.perf_counter()
    scene = common.load_scene("lego", data, size=100)
    assert time.perf_counter() - began < 30
    assert scene.train.images.shape == (100, 100, 100, 3) and scene.test.images.shape == (25, 100, 100, 3)
    assert torch.allclose(scene.train.c2w[:, :, 3].norm(dim=-1), torch.tensor(4.0311), atol=1e-3)
    image = iio.imread(data / "nerf_synthetic/lego/train/r_7.png").astype(np.float64) / 255
    expected = (image[..., :3] * image[..., 3:] + 1 - image[..., 3:]).reshape(100, 8, 100, 8, 3).mean((1, 3))
    assert np.abs(scene.train.images[7].numpy() - expected).max() < 1e-5


def test_real_fern():
    scene = common.load_scene("fern", real("nerf_llff_data/fern"), size=126)
    assert len(scene.train.names) == 17 and len(scene.test.names) == 3
    for v in range(17):                                     # all of every ray, from the near plane to infinity, is in the box
        o, d = common.view_rays(scene.train, v, True)
        for x in (o, o + ((1 - o[:, 2]) / d[:, 2])[:, None] * d):
            assert (x > scene.aabb[0] - 1e-4).all() and (x < scene.aabb[1] + 1e-4).all()


def test_real_scan24():
    scene = common.load_scene("scan24", real("dtu/scan24"), size=100)
    views = common.join_views(scene.train, scene.test)
    assert len(scene.train.names) == 42 and len(scene.test.names) == 7
    assert views.images.shape == (49, 75, 100, 3) and views.mask.shape == (49, 75, 100)
    # DTU's own calibration, for 1600x1200 and centres at integers: fx 2892.33, fy 2883.175, cx 823.205, cy 619.07
    assert torch.allclose(views.K * 16, torch.tensor([[2892.33, 0, 823.705], [0, 2883.175, 619.57], [0, 0, 16]]).expand(49, 3, 3), atol=0.1)
    distance = views.c2w[:, :, 3].norm(dim=-1)
    assert 2.7 < distance.min() and distance.max() < 3.0
    xy = common.pixel_grid(75, 100)
    X = torch.cartesian_prod(*[torch.linspace(-1, 1, 48)] * 3)
    hull = X[X.norm(dim=-1) < 1]                                            # what all masks leave of the unit sphere
    for mask, K, c2w in zip(views.mask, views.K, views.c2w):
        assert 0.2 < mask.mean() < 0.9
        o, d = common.pixel_rays((mask.reshape(-1, 1) * xy).sum(0, keepdim=True) / mask.sum(), K, c2w[None])
        assert torch.linalg.cross(o, d).norm() < 0.5                        # the mask's middle is seen along a ray that passes near the origin
        x = (hull - c2w[:, 3]) @ c2w[:, :3]
        u, v = K[0, 0] * x[:, 0] / -x[:, 2] + K[0, 2], K[1, 1] * x[:, 1] / x[:, 2] + K[1, 2]
        outside = (u < 0) | (u >= 100) | (v < 0) | (v >= 75)
        hull = hull[outside | (mask[v.long().clamp(0, 74), u.long().clamp(0, 99)] > 0.5)]
    assert 0.3 < len(hull) / (4 / 3 * math.pi * 23.5 ** 3) < 0.6            # cameras that disagreed would leave next to nothing


# ------------------------------------------------------------------------------------------------------------ ray-caster

def test_raycast_hits_by_hand():
    s = math.sqrt(0.5)
    P = common.Primitive
    cases = [                                               # primitive, origin, direction, distance (0: a miss)
        (P("box", (0, 0, 0), (1, 2, 3), (1, 0, 0)), (5, 0, 0), (-1, 0, 0), 4.0),
        (P("box", (0, 0, 0), (1, 2, 3), (1, 0, 0)), (0, 0, 9), (0, 0, -1), 6.0),
        (P("box", (0, 0, 0), (1, 2, 3), (1, 0, 0)), (5, 2.01, 0), (-1, 0, 0), 0.0),
        (P("box", (0, 0, 0), (1, 2, 3), (1, 0, 0)), (0, 0, 0), (0, 1, 0), 2.0),                       # from inside
        (P("box", (0, 0, 0), (1, 1, 1), (1, 0, 0), common.turned("z", 45)), (5, 0, 0), (-1, 0, 0), 5 - math.sqrt(2)),
        (P("ball", (0, 0, 1), (2, 2, 2), (1, 0, 0)), (0, -6, 1), (0, 1, 0), 4.0),
        (P("ball", (0, 0, 0), (1, 1, 3), (1, 0, 0)), (0, 0, 10), (0, 0, -1), 7.0),                    # an ellipsoid
        (P("ball", (0, 0, 0), (1, 1, 1), (1, 0, 0)), (0, -6, 1.01), (0, 1, 0), 0.0),
        (P("cylinder", (0, 0, 0), (1, 1, 2), (1, 0, 0)), (4, 0, 1.9), (-1, 0, 0), 3.0),
        (P("cylinder", (0, 0, 0), (1, 1, 2), (1, 0, 0)), (4, 0, 2.1), (-1, 0, 0), 0.0),
        (P("cylinder", (0, 0, 0), (1, 1, 2), (1, 0, 0)), (0.5, 0.5, 7), (0, 0, -1), 5.0),             # its cap
        (P("cylinder", (0, 0, 0), (1, 1, 2), (1, 0, 0)), (0.9, 0.9, 7), (0, 0, -1), 0.0),             # a box would be hit
        (P("cylinder", (0, 0, 0), (1, 1, 2), (1, 0, 0), common.turned("y", 90)), (6, 0, 0), (-1, 0, 0), 4.0),
        (P("cylinder", (0, 0, 0), (1, 1, 2), (1, 0, 0)), (-4, 0, 3), (s, 0, -s), 3 * math.sqrt(2)),   # side at x = -1, z = 0
        (P("ball", (3, 0, 0), (1, 1, 1), (1, 0, 0)), (0, 0, 0), (-1, 0, 0), 0.0),                     # behind
    ]
    for primitive, o, d, distance in cases:
        colour, alpha, depth = common.raycast([primitive], torch.tensor([o], dtype=torch.float32), torch.tensor([d], dtype=torch.float32))
        assert float(depth) == pytest.approx(distance, abs=1e-5), (primitive, o, d)
        assert float(alpha) == (distance > 0) and (distance == 0) == bool((colour == 0).all())


def test_raycast_packets_do_not_change_the_answer():
    torch.manual_seed(0)
    o = torch.randn(500, 3) * 3
    d = torch.nn.functional.normalize(torch.randn(500, 3) * 0.3 - o, dim=-1)
    one = common.raycast(common.truck(), o, d, packet=1)
    many = common.raycast(common.truck(), o, d, packet=37)
    assert (one[1] > 0).sum() > 100
    assert torch.allclose(one[2], many[2], atol=1e-4) and torch.allclose(one[0], many[0], atol=1e-3)


def test_shading_light_side_dark_side_shadow_and_pattern():
    P = common.Primitive
    floor = P("box", (0, 0, -1), (5, 5, 1), (0.5, 0.5, 0.5))
    down = torch.tensor([[0.0, 0, -1]])
    see = lambda parts, x: float(common.raycast(parts, torch.tensor([[x, 0.0, 9.0]]), down, sun=(0.0, 1.0, 1.0))[0].mean())
    roof = P("box", (0, 3, 3), (1, 0.5, 0.1), (0, 0, 0))                       # between x = 0 and the light, not above it
    assert see([floor, roof], 3.0) == see([floor], 0.0) > see([floor, roof], 0.0) > 0
    checker = P("box", (0, 0, -1), (5, 5, 1), (1, 0, 0), None, "checker", (0, 0, 1), 0.5)
    colours = [common.raycast([checker], torch.tensor([[x, 0.1, 9.0]]), down)[0][0] for x in (0.1, 0.6, 1.1)]
    assert torch.equal(colours[0], colours[2]) and (colours[0] - colours[1]).abs().max() > 0.3


@pytest.mark.parametrize("H, W", [(9, 14), (16, 8)])
def test_pictures_are_antialiased_by_3x3_rays(H, W):
    ball = [common.Primitive("ball", (0, 0, 0), (1, 1, 1), (1.0, 0.4, 0.2))]
    c2w = torch.tensor(np.stack([common.orbit_pose(a, 0.4, 5.0) for a in (0.0, 2.0)]), dtype=torch.float32)
    K = common._intrinsics(17.0, 16.0, W / 2, H / 2)
    images, alpha, depth = common.render_primitives(ball, c2w, K, H, W, torch.tensor([0.0, 0.5, 1.0]))
    for v in range(2):
        for i in range(H):
            for j in range(W):
                xy = torch.tensor([[j + (x + 0.5) / 3, i + (y + 0.5) / 3] for y in range(3) for x in range(3)])
                colour, hit, t = common.raycast(ball, *common.pixel_rays(xy, K, c2w[v].expand(9, 3, 4)))
                assert float(alpha[v, i, j]) == pytest.approx(float(hit.mean()), abs=1e-6) and float(depth[v, i, j]) == pytest.approx(float(t[4]), abs=1e-4)
                expected = (colour + (1 - hit[:, None]) * torch.tensor([0.0, 0.5, 1.0])).mean(0)
                assert torch.allclose(images[v, i, j], expected, atol=0.03 if hit.all() else 1e-5)     # inside, one ray may do
    assert ((alpha > 0) & (alpha < 1)).any()


@pytest.fixture(scope="module")
def bricks():
    return common.load_bricks("test", 48, WHITE)


def test_bricks_cameras_range_and_determinism(bricks):
    again = common.load_bricks("test", 48, WHITE)
    for a, b in ((bricks.images, again.images), (bricks.alpha, again.alpha), (bricks.depth, again.depth), (bricks.c2w, again.c2w)):
        assert torch.equal(a, b)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 if threads != 3 else 2)
    try:
        assert torch.equal(common.load_bricks("test", 48, WHITE).images, bricks.images)
    finally:
        torch.set_num_threads(threads)
    train = common.load_bricks("train", 2, WHITE)
    for views, n in ((bricks, 25), (train, 100)):
        assert len(views.names) == n and torch.allclose(views.c2w[:, :, 3].norm(dim=-1), torch.tensor(4.0311289), atol=1e-5)
        assert torch.allclose(views.c2w[:, :, :3].mT @ views.c2w[:, :, :3], torch.eye(3).expand(n, 3, 3), atol=1e-5)
        assert torch.allclose(-views.c2w[:, :, 2] * 4.0311289, -views.c2w[:, :, 3], atol=1e-5) and (views.c2w[:, 2, 3] > 0).all()
    assert float(train.K[0, 0]) == pytest.approx(1 / math.tan(0.3455556), rel=1e-5)
    assert 0 <= float(bricks.alpha.min()) and float(bricks.alpha.max()) <= 1 and 0.1 < float(bricks.alpha.mean()) < 0.5
    assert float(bricks.images.min()) >= 0 and float(bricks.images.max()) <= 1
    assert (bricks.images[bricks.alpha == 0] == 1).all() and (bricks.depth[bricks.alpha == 1] > 2).all() and (bricks.depth[bricks.alpha == 0] == 0).all()
    assert ((bricks.alpha > 0) & (bricks.alpha < 1)).any()                     # antialiased


def test_bricks_depth_is_the_same_surface_from_two_views(bricks):
    o, d = common.view_rays(bricks, 3, False)
    seen = bricks.depth[3].flatten() > 0
    x = (o + bricks.depth[3].flatten()[:, None] * d)[seen]
    assert (x.abs() < 1.5).all()
    other = bricks.c2w[4, :, 3]
    to = x - other
    far = to.norm(dim=-1)
    _, alpha, depth = common.raycast(common.truck(), other.expand_as(to), to / far[:, None])
    assert (alpha == 1).all() and (depth <= far + 1e-3).all()                  # never sees through a surface
    assert ((depth - far).abs() < 1e-3).float().mean() > 0.6                   # and mostly sees the same point
    camera = ((x - other)[:, :, None] * bricks.c2w[4, :, :3]).sum(1)           # the same through the pictures: project, look up
    col = (24 - bricks.K[0, 0] * camera[:, 0] / camera[:, 2]).long().clamp(0, 47)
    row = (24 + bricks.K[1, 1] * camera[:, 1] / camera[:, 2]).long().clamp(0, 47)
    assert ((bricks.depth[4][row, col] - far).abs() < 0.06).float().mean() > 0.5


def test_bricks_written_as_files_load_again(tmp_path, bricks):
    subprocess.run([sys.executable, str(ROOT / "common.py"), "bricks", "--out", "b", "--size", "48"], cwd=tmp_path, check=True, capture_output=True)
    scene = common.load_scene(str(tmp_path / "b"), tmp_path)
    assert scene.kind == "blender" and len(scene.train.names) == 100
    assert torch.allclose(scene.test.c2w, bricks.c2w, atol=1e-6) and torch.allclose(scene.test.K, bricks.K, rtol=1e-5)
    assert (scene.test.images - bricks.images).abs().max() < 1.1 / 255 and (scene.test.alpha - bricks.alpha).abs().max() < 0.6 / 255
    again = subprocess.run([sys.executable, str(ROOT / "common.py"), "bricks", "--out", "b"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 2 and again.stderr.startswith("error: ") and len(again.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------------------- grid, harmonics, metrics

def test_occupancy_rule_by_hand():
    grid = common.OccupancyGrid(torch.tensor([[0.0, 0, 0], [2, 4, 8]]), resolution=2, decay=0.5, threshold=0.01)
    assert grid.occupied.all()
    seen = []
    def density(x):
        seen.append(x)
        return torch.where((x[:, 0] > 1) & (x[:, 1] < 2) & (x[:, 2] > 4), 8.0, 0.0)        # cell (1, 0, 1)
    grid.update(density, 0.1, warm=True, generator=torch.Generator().manual_seed(0))
    x = torch.cat(seen)
    cells = (x / torch.tensor([1.0, 2, 4])).long()
    assert len({tuple(c.tolist()) for c in cells}) == 8 == len(x) and (x % 1 != 0).any()
    expected = torch.zeros(2, 2, 2)
    expected[1, 0, 1] = 0.8
    assert torch.allclose(grid.ema, expected) and torch.equal(grid.occupied, expected > 0)  # min(mean 0.1, 0.01) = 0.01
    grid.update(lambda x: torch.zeros(len(x)), 0.1, warm=True)
    assert grid.ema[1, 0, 1] == pytest.approx(0.4)                                          # decayed, not replaced
    grid.update(lambda x: torch.full((len(x),), 1e-3), 1.0, warm=True)
    assert grid.ema[1, 0, 1] == pytest.approx(0.2) and grid.ema[0, 0, 0] == pytest.approx(1e-3)
    assert grid.occupied.sum() == 1
    for _ in range(8):
        grid.update(lambda x: torch.full((len(x),), 1e-3), 1.0, warm=True)
    assert not grid.occupied.any() or float(grid.ema.mean()) < 0.01                          # threshold falls with the mean


def test_occupancy_later_updates_look_at_a_part_and_at_what_is_occupied():
    grid = common.OccupancyGrid(torch.tensor([[-1.0] * 3, [1.0] * 3]), resolution=16)
    ball = lambda x: 50.0 * (x.norm(dim=-1) < 0.5)
    grid.update(ball, 0.1, warm=True)
    assert 0 < int(grid.occupied.sum()) < 16 ** 3 // 4
    before, asked = grid.occupied.clone(), []
    ema = grid.ema.clone()
    grid.update(lambda x: (asked.append(x), ball(x))[1], 0.1, warm=False, generator=torch.Generator().manual_seed(1))
    cells = ((torch.cat(asked) + 1) * 8).long()
    touched = torch.zeros(16, 16, 16, dtype=torch.bool)
    touched[cells.unbind(-1)] = True
    assert touched[before].all() and len(cells) == int(touched.sum()) < 16 ** 3 / 2          # all occupied, none twice, not all
    assert torch.equal(grid.ema[~touched], ema[~touched])


def test_spherical_harmonics_are_orthonormal_and_named_right():
    z, wz = np.polynomial.legendre.leggauss(8)
    phi = np.arange(16) * 2 * np.pi / 16
    Z, PHI = np.meshgrid(z, phi, indexing="ij")
    r = np.sqrt(1 - Z ** 2)
    d = torch.tensor(np.stack([r * np.cos(PHI), r * np.sin(PHI), Z], -1).reshape(-1, 3))
    w = torch.tensor(np.repeat(wz * 2 * np.pi / 16, 16))
    Y = common.spherical_harmonics(d, 4)
    assert torch.allclose(Y.T @ (w[:, None] * Y), torch.eye(16, dtype=torch.float64), atol=1e-12)
    for degree in (1, 2, 3):
        assert torch.equal(common.spherical_harmonics(d, degree), Y[:, :degree ** 2])
    up = common.spherical_harmonics(torch.tensor([[0.0, 0, 1]]), 4)[0]
    for l in range(4):                                                                       # at the pole: sqrt((2l+1)/4pi), m = 0 only
        assert up[l * l + l] == pytest.approx(math.sqrt((2 * l + 1) / (4 * math.pi))) and up[l * l:(l + 1) ** 2].count_nonzero() == 1
    with pytest.raises(ValueError):
        common.spherical_harmonics(d, 5)


def test_psnr_and_ssim_known_answers():
    a = torch.full((16, 16, 3), 0.3)
    assert float(common.psnr(a, a + 0.1)) == pytest.approx(20, abs=1e-4)
    assert float(common.psnr(a, a + 0.01)) == pytest.approx(40, abs=1e-3)
    torch.manual_seed(0)
    x, y = torch.rand(14, 13, 3, dtype=torch.float64), torch.rand(14, 13, 3, dtype=torch.float64)
    assert float(common.ssim(x, x)) == pytest.approx(1, abs=1e-9)
    flat = float(common.ssim(torch.full((11, 11, 3), 0.2), torch.full((11, 11, 3), 0.6)))
    assert flat == pytest.approx((2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4), abs=1e-4)         # only the means speak
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(g, g) / np.outer(g, g).sum()
    values = []
    for c in range(3):
        for i in range(4):
            for j in range(3):
                p, q = x[i:i + 11, j:j + 11, c].numpy(), y[i:i + 11, j:j + 11, c].numpy()
                mp, mq = (window * p).sum(), (window * q).sum()
                vp, vq, cov = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum(), (window * (p - mp) * (q - mq)).sum()
                values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4) / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    assert float(common.ssim(x, y)) == pytest.approx(np.mean(values), abs=1e-10)
    with pytest.raises(UserError, match="11x11"):
        common.ssim(x[:10], y[:10])


# ------------------------------------------------------------------------------------------------------------- pictures

def test_pictures(tmp_path):
    lo, mid, hi = common.colour_map(torch.tensor([-5.0, 1.0, 9.0]), 0.0, 2.0)
    assert mid[1] > 0.8 > mid[2] and lo.max() < 0.3 and hi[0] > 0.4 > hi[2]                  # dark blue, green, dark red
    truth = torch.rand(6, 5, 3)
    s = common.strip(truth, truth, torch.full((6, 5), 3.0), 2.0, 6.0)
    assert s.shape == (6, 20, 3) and torch.equal(s[:, :5], s[:, 5:10]) and torch.allclose(s[:, 10:15], lo.expand(6, 5, 3))
    common.save_png(tmp_path / "a.png", torch.tensor([[[0.0], [0.5], [2.0], [math.nan]]]))
    assert iio.imread(tmp_path / "a.png").tolist() == [[[0] * 3, [128] * 3, [255] * 3, [0] * 3]]
    frames = [torch.full((19, 33, 3), v) for v in (0.0, 0.5, 1.0)]
    for name in ("v.gif", "v.mp4"):
        common.save_video(tmp_path / name, frames, fps=10)
        back = iio.imread(tmp_path / name, index=None)
        assert len(back) == 3 and abs(float(back[1].mean()) - 128) < 6
    path = common.orbit_poses(4, 2.0, 30.0, (1.0, 0.0, 0.0))
    assert torch.allclose((path[:, :, 3] - torch.tensor([1.0, 0, 0])).norm(dim=-1), torch.tensor(2.0)) and torch.allclose(path[:, 2, 3], torch.tensor(1.0))


def svg_of(*args, **kwargs):
    """The texts of draw_panels' picture with their x, y (those of a turned text: None), and the elements of a kind."""
    svg = ET.fromstring(common.draw_panels(*args, **kwargs))
    find = lambda tag: svg.findall("{http://www.w3.org/2000/svg}" + tag)
    return [(node.text, *(node.get(k) and float(node.get(k)) for k in "xy")) for node in find("text")], find


def points(node):
    return np.array([[float(n) for n in point.split(",")] for point in node.get("points").split()])


def test_panels_by_hand():
    """A panel is 190 wide and 170 high; y runs from 0.8 to 3.2 where its values go from 1 to 3, logarithmic x from -0.2 to 2.2."""
    band = common.Panel("steps", {"a": ([0, 10], [[1, 2], [3, 2]])}, "dB")
    texts, find = svg_of([band])
    Y = {v: 12 + 170 * (3.2 - v) / 2.4 for v in (1, 1.5, 2, 2.5, 3)}
    assert np.allclose(points(find("polyline")[0]), [[45, Y[2]], [235, Y[2]]], atol=0.06)
    assert np.allclose(points(find("polygon")[0]), [[45, Y[1]], [235, Y[2]], [235, Y[2]], [45, Y[3]]], atol=0.06) and not find("circle")
    assert [(text, x) for text, x, _ in texts[:5]] == [("1", 39), ("1.5", 39), ("2", 39), ("2.5", 39), ("3", 39)]
    assert np.allclose([y - 4 for *_, y in texts[:5]], list(Y.values()), atol=0.06)
    assert texts[5:] == [("0", 45, 199), ("5", 140, 199), ("10", 235, 199), ("steps", 140, 217), ("a", 69, 242), ("dB", None, None)]
    texts, find = svg_of([common.Panel("n", {"a": ([1, 100], [10, 1000.0])}, "bytes")], log=True, dots=True)
    line = [[55 + 190 * 0.2 / 2.4, Y[1]], [55 + 190 * 2.2 / 2.4, Y[3]]]
    assert np.allclose(points(find("polyline")[0]), line, atol=0.06) and not find("polygon")
    assert np.allclose([[float(node.get(k)) for k in ("cx", "cy")] for node in find("circle")], line, atol=0.06)
    assert [text for text, *_ in texts] == ["10", "100", "1k", "1", "10", "100", "n", "a", "bytes"]
    assert np.allclose([x for _, x, _ in texts[3:6]], [line[0][0], 150, line[1][0]], atol=0.06)


def test_panels_side_by_side():
    """A label's colour is its own in all panels; one y_title, one range; what is empty is left out; names are escaped."""
    line = lambda *y: ([1, 2], y)
    panels = [common.Panel("x<1>", {"none": ([], []), "a": line(1, 2)}, "s & t"),
              common.Panel("x2", {"b<&": line(5, 9), "a": line(1, 1)}, "s & t"),
              common.Panel("empty", {"none": ([], []), "later": ([], [])}, "s & t"),
              common.Panel("x3", {"a": line(100, 200)}, "\"MB\"")]
    texts, find = svg_of(panels)
    lines = [(node.get("stroke"), points(node)) for node in find("polyline")]
    legend = [node.get("stroke") for node in find("path") if node.get("stroke-width") == "3"]
    names = [text for text, *_ in texts]
    assert names[-6:] == ["none", "a", "b<&", "later", "s & t", '"MB"'] and "empty" not in names and {"x<1>", "x2", "x3"} < set(names)
    assert len(set(legend)) == 4 and [stroke for stroke, _ in lines] == [legend[1], legend[1], legend[2], legend[1]]
    assert lines[0][1][0, 1] == lines[1][1][0, 1] == lines[1][1][1, 1] > 170                                        # 1 is 1 in both
    assert lines[3][1][0, 1] > 150 and [x[0, 0] - lines[0][1][0, 0] for _, x in lines] == [0, 245, 245, 490]
    turned = [node.get("transform") for node in find("text") if node.get("transform")]
    assert turned == ["translate(10 97.0) rotate(-90)", "translate(500 97.0) rotate(-90)"]
    many = common.draw_panels([common.Panel("x", {str(i): line(i, i) for i in range(7)})])
    assert many.count('stroke="#2f81f7"') == 4 and many.count('stroke="#2f81f7" stroke-dasharray') == 2                    # line and legend
    for bad, log in ((panels[2:3], False), ([], True), ([common.Panel("x", {"a": line(1, 0)})], True),
                     ([common.Panel("x", {"a": ([-1, 1], [1, 1])})], True), ([common.Panel("x", {"a": line(1, math.nan)})], False)):
        with pytest.raises(ValueError, match="nothing to draw"):
            common.draw_panels(bad, log)


@pytest.mark.parametrize("lo, hi, ticks", [
    (0.7, 130, [1, 10, 100]), (7, 54, [10, 20, 50]), (0.0015, 0.3, [0.01, 0.1]), (1, 1e9, [1, 100, 1e4, 1e6, 1e8]), (1, 50, [1, 10]),
    (3, 90, [5, 10, 20, 50]), (1.6e6, 2.5e6, [1.6e6, 1.8e6, 2e6, 2.2e6, 2.4e6]), (2.1, 4.9, [2.5, 3, 3.5, 4, 4.5])])
def test_log_ticks(lo, hi, ticks):
    assert np.allclose(common.log_ticks(lo, hi), ticks)


# ----------------------------------------------------------------------------------------------------------- run folder

def test_run_never_overwrites_and_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a, b = common.Run("m", "s", None, {}), common.Run("m", "s", None, {})
    assert a.path != b.path and a.path.parent == Path("runs") and a.path.name.startswith("m-s-")
    run = common.Run("m", "s", "out", {"lr": 0.1, "path": Path("x"), "nothing": math.nan})
    assert json.loads((run.path / "args.json").read_text()) == {"lr": 0.1, "path": "x", "nothing": None}
    env = json.loads((run.path / "env.json").read_text())
    assert env["torch"] and {"python", "triton", "numpy", "device", "cpu", "commit", "dirty", "date", "argv"} <= set(env)
    with pytest.raises(UserError, match="out.*--resume"):
        common.Run("m", "s", "out", {})
    common.Run("m", "s", "early", {"lr": 1})
    assert not common.Run("m", "s", "early", {"lr": 2}, resume=True).resumed                        # killed before its first checkpoint: starts again
    with pytest.raises(UserError, match="ckpt.pt"):
        common.Run("m", "s", "nothing", {}, resume=True)
    with pytest.raises(UserError, match="--out"):
        common.Run("m", "s", None, {}, resume=True)
    (tmp_path / "file").write_text("")
    for bad in ("file", "file/below"):
        with pytest.raises(UserError, match="cannot be written"):
            common.Run("m", "s", bad, {})
    for step in range(5):
        run.log(step=step, psnr=torch.tensor(20.0 + step), loss=float("inf"))
    with open("out/metrics.jsonl", "a") as file:
        file.write('{"step": 2, "ps')                                                        # killed while writing
    run.save({"step": 2, "w": torch.arange(3), "rng": common.random_state()})
    again = common.Run("m", "s", "out", {"lr": 5}, resume=True)
    assert json.loads(Path("out/args.json").read_text())["lr"] == 0.1                        # kept, as long as nothing goes on
    again.rewind(2)
    lines = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[0] == {"step": 0, "psnr": 20.0, "loss": None}
    assert json.loads(Path("out/args.json").read_text())["lr"] == 5                          # what it goes on with: the next --resume reads it
    assert torch.equal(again.load({"lr": 0.1})["w"], torch.arange(3))
    run.summary(psnr=torch.tensor(31.5), ssim=np.float32(0.5), bad=math.nan, n=np.int64(3))
    assert json.loads(Path("out/summary.json").read_text()) == {"psnr": 31.5, "ssim": 0.5, "bad": None, "n": 3}


def test_checkpoint_of_another_run_or_broken(tmp_path):
    run = common.Run("m", "s", tmp_path / "a", {"levels": 8, "betas": (0.9, 0.99)})
    run.save({"step": 1})
    assert run.load({"levels": 8, "betas": (0.9, 0.99)})["step"] == 1
    asked = common.Run("m", "s", tmp_path / "b", {"scene": "t"})                             # the flag said t, what was found is s
    asked.save({})
    asked.load({"scene": "t"})
    with pytest.raises(UserError, match="another run: scene was s, now t"):
        common.Run("m", "t", tmp_path / "b", {"scene": "t"}, resume=True).load({"scene": "t"})
    for key, load in {"levels": lambda: run.load({"levels": 4}), "absent": lambda: run.load({"absent": 1}),
                      "method": common.Run("other", "s", tmp_path / "a", {}, resume=True).load,
                      "scene": common.Run("m", "t", tmp_path / "a", {}, resume=True).load}.items():
        with pytest.raises(UserError, match=f"another run: {key}"):
            load()
    whole = (tmp_path / "a/ckpt.pt").read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"hello"):
        (tmp_path / "a/ckpt.pt").write_bytes(content)
        with pytest.raises(UserError, match="not a usable checkpoint"):
            run.load()


def test_kill_before_the_rename_leaves_the_old_checkpoint(tmp_path):
    run = common.Run("m", "s", tmp_path / "a", {})
    run.save({"step": 1})
    code = (f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r}); import common\n"
            "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
            f"common.Run('m', 's', {str(tmp_path / 'a')!r}, {{}}, resume=True).save({{'step': 2}})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == -signal.SIGKILL and (tmp_path / "a/ckpt.pt.tmp").is_file()
    assert run.load()["step"] == 1
    run.save({"step": 3})
    assert run.load()["step"] == 3 and not (tmp_path / "a/ckpt.pt.tmp").exists()


def test_random_state_survives_a_checkpoint(tmp_path):
    run = common.Run("m", "s", tmp_path / "a", {})
    torch.manual_seed(1), np.random.seed(2), random.seed(3)
    np.random.randn(), random.gauss(0, 1)                                                    # both keep a spare Gaussian
    draw = lambda: (torch.rand(3).tolist(), np.random.randn(3).tolist(), random.gauss(0, 1), random.random())
    run.save({"rng": common.random_state()})
    first = draw()
    assert draw() != first
    common.set_random_state(run.load()["rng"])
    assert draw() == first


def test_small_things(capsys):
    common.check_finite(torch.tensor(1.0), 3)
    for bad in (math.nan, math.inf):
        with pytest.raises(UserError, match="step 7"):
            common.check_finite(torch.tensor(bad), 7)
    common.check_not_empty(torch.tensor([0.0, 0.1]), 3)
    with pytest.raises(UserError, match="empty at step 9"):
        common.check_not_empty(torch.tensor([0.0, 1e-4]), 9)
    progress = common.Progress(100)
    for step in range(1, 101):
        progress(step, loss=torch.tensor(0.5))
    progress.close()
    with warnings.catch_warnings(action="error"):                                            # a loss before its backward pass
        common.Progress(1)(1, loss=torch.tensor(0.5, requires_grad=True))
    lines = capsys.readouterr().out.splitlines()[:-1]
    assert 1 <= len(lines) <= 3 and "step 100/100" in lines[-1] and "loss 0.5" in lines[-1]
    watch = common.Stopwatch(seconds=5.0)
    watch.start()
    time.sleep(0.02)
    assert 5.02 <= watch.stop() < 6 and watch.stop() == watch.seconds
    assert 50 < common.peak_memory_mb("cpu") < 1e5
    moved = common.to_device(common.Scene("a", "builtin", *[common.load_bricks("test", 2, WHITE)] * 2, torch.zeros(2, 3), 2.0, 6.0, WHITE, False), "meta")
    assert moved.train.images.device.type == moved.aabb.device.type == "meta" and moved.near == 2.0


# ------------------------------------------------------------------------------------------------------------- commands

SCRIPT = """
import sys; sys.path.insert(0, {root!r})
from dataclasses import dataclass
import common
@dataclass
class Args:
    \"\"\"A method.\"\"\"
    scene: str = "lego"
    \"\"\"Scene.\"\"\"
    steps: int = 10
    \"\"\"Steps.\"\"\"
def main(args):
    if args.steps == 0: raise common.UserError("steps 0\\nmust be positive")
    if args.steps == 1: raise KeyboardInterrupt
    print(args)
common.cli({{"quick": Args(), "paper": Args(steps=99)}}, main)
"""


@pytest.mark.parametrize("words, status, out", [
    ("", 0, "steps=10"), ("--preset paper", 0, "steps=99"), ("--scene a --preset=paper --steps 5", 0, "scene='a', steps=5"), ("--help", 0, "--preset {quick,paper}"),
    ("--preset nope", 2, "quick, paper"), ("--preset", 2, "preset"), ("--bogus 3", 2, "--bogus"), ("--steps many", 2, "many"),
    ("--steps 0", 2, "steps 0 must be positive"), ("--steps 1", 130, "interrupted")])
def test_cli(tmp_path, words, status, out):
    (tmp_path / "m.py").write_text(SCRIPT.format(root=str(ROOT)))
    done = subprocess.run([sys.executable, "m.py", *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status and out in (done.stderr if status else done.stdout), (done.stdout, done.stderr)
    if status:
        assert len(done.stderr.splitlines()) == 1 and done.stdout == ""
        assert status == 130 or done.stderr.startswith("error: ")


RESUMABLE = """
import os, sys; sys.path.insert(0, {root!r})
from dataclasses import asdict, dataclass
from typing import Literal, Optional
import common
@dataclass
class Args:
    \"\"\"A method.\"\"\"
    preset: Literal["quick", "paper"] = "quick"
    out: Optional[str] = None
    resume: bool = False
    eval_only: bool = False
    data: str = os.environ.get("NERF_DATA", "data")
    device: str = "cpu"
    steps: int = 10
    rate: float = 1e-2
    rates: tuple[float, float] = (1.0, 2.0)
    names: Optional[tuple[Literal["a", "b"], ...]] = None
    none: Optional[int] = 3
    video: bool = False
    dither: bool = True
def main(args):
    run = common.Run("m", "s", args.out, asdict(args), resume=args.resume, eval_only=args.eval_only)
    if run.resumed:
        run.load({{key: value for key, value in run.args.items() if key not in ("out", "resume", "eval_only", "data", "device", "rate")}})
        if args.resume:
            run.rewind(0)
    else:
        run.save({{"step": args.steps}})
    print(args)
common.cli({{"quick": Args(), "paper": Args("paper", steps=99)}}, main)
"""


def test_cli_resumes_with_the_flags_of_the_run(tmp_path):
    (tmp_path / "m.py").write_text(RESUMABLE.format(root=str(ROOT)))

    def call(words):
        done = subprocess.run([sys.executable, "m.py", *words.split()], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "NERF_DATA": "data"})
        return done.returncode, done.stderr if done.returncode else done.stdout
    flags = "--rate 3e-5 --rates 0.1 -0.5 --names b a --none None --video --no-dither"
    status, first = call(f"--out x --preset paper {flags}")
    assert status == 0 and "steps=99, rate=3e-05, rates=(0.1, -0.5), names=('b', 'a'), none=None, video=True, dither=False" in first
    for how in ("--resume", "--eval-only"):
        flag = how[2:].replace("-", "_")
        assert call(f"--out x {how}") == (0, first.replace(f"{flag}=False", f"{flag}=True"))
    assert "rate=0.5" in call("--out x --resume --rate 0.5 --device cuda")[1]                 # a flag that is given comes after
    for how in ("--eval-only", "--resume"):                                                   # and is remembered; not where the run was
        assert "rate=0.5" in call(f"--out x {how}")[1] and "device='cpu'" in call(f"--out x {how}")[1]
    assert json.loads((tmp_path / "x/args.json").read_text())["resume"] is False
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
    assert "data='old'" in call("--out x --resume --data old")[1] and "data='old'" in call("--out x --resume")[1]
    (tmp_path / "old").rmdir()                                                                # moved
    assert "data='data'" in call("--out x --resume")[1] and "data='new'" in call("--out x --resume --data new")[1]
    assert call("--out x --resume --preset paper")[0] == 0
    for words, named in {"--steps 5": "steps was 99, now 5", "--preset quick": "preset was paper, now quick", "--dither": "dither"}.items():
        status, complaint = call(f"--out x --resume {words}")
        assert status == 2 and named in complaint, complaint
    for content in ("{", "[1, 2]", '{"steps": "many"}'):
        (tmp_path / "x/args.json").write_text(content)
        status, complaint = call("--out x --resume")
        assert status == 2 and len(complaint.splitlines()) == 1 and complaint.startswith("error: "), complaint
        assert (tmp_path / "x/args.json").read_text() == content


def test_eval_only_without_a_checkpoint_writes_nothing(tmp_path):
    common.Run("m", "s", tmp_path / "a", {"steps": 3})
    before = {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()}
    for folder in ("a", "absent"):
        with pytest.raises(UserError, match="no ckpt.pt to evaluate"):
            common.Run("m", "s", tmp_path / folder, {"steps": 4}, eval_only=True)
    assert {file.name: file.read_bytes() for file in (tmp_path / "a").iterdir()} == before and not (tmp_path / "absent").exists()


def fake_run(folder, rows, **summary):
    run = common.Run(summary["method"], "lego", folder, {})
    for step, seconds, psnr, *more in rows:
        run.log(step=step, train_seconds=seconds, psnr=psnr, **dict(zip(("rays", "samples"), more)))
    run.summary(scene="lego", data="blender", **summary)
    common.save_png(run.path / "test_000.png", torch.full((4, summary["size"] * 4, 3), 0.5))


def test_compare_draws_ends_against_a_number_of_the_summary(tmp_path):
    for name, size, psnr in (("a-1", 30, 20.0), ("a-2", 10, 18.0), ("b-1", 20, 25.0), ("c-1", None, 9.0)):
        more = {} if size is None else {"bytes": size}
        fake_run(tmp_path / name, [(10, 1.0, psnr)], method="one", size=2, steps=10, train_seconds=1.0, psnr=psnr, **more)
    svg = common.draw_curves([tmp_path / name for name in ("a-1", "a-2", "b-1", "c-1")], "bytes")
    lines = [[tuple(map(float, point.split(","))) for point in found.split()] for found in re.findall(r'polyline points="([^"]*)"', svg)]
    assert [len(line) for line in lines] == [2, 1] and svg.count("<circle") == 3                   # a line for a, a point for b, nothing for c
    (x1, y1), (x2, y2), (x3, y3) = lines[0] + lines[1]
    assert x1 < x3 < x2 and abs((x2 - x1) / 2 - (x3 - x1)) < 0.2 and y3 < y2 < y1                   # 10, 20, 30 bytes; up is more PSNR
    for run, key in (("c-1", "bytes"), ("a-1", "method")):              # missing; not a number
        with pytest.raises(common.UserError, match="nothing to draw"):
            common.draw_curves([tmp_path / run], key)


def test_compare(tmp_path):
    fake_run(tmp_path / "a", [(10, 1.0, 20.0), (20, 3.0, 24.0), (30, 5.0, 25.0)], method="one", size=2, steps=30, train_seconds=5.0, psnr=25.0, ssim=0.9)
    fake_run(tmp_path / "b", [(10, 2.0, 21.0), (20, 4.0, 27.0)], method="two", size=3, steps=20, train_seconds=4.0, psnr=27.0)
    done = subprocess.run([sys.executable, str(ROOT / "common.py"), "compare", "a", "b"], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[0][10:] == ["PSNR at equal steps (20)", "PSNR at equal seconds (4)", "share of steps to 25.00 dB", "share of train s to 25.00 dB"]
    assert rows[2] == ["a", "one", "lego", "blender", "2", "30", "5.0", "-", "25.00", "0.9000", "24.00", "24.50", "1.00", "1.00"]
    assert rows[3] == ["b", "two", "lego", "blender", "3", "20", "4.0", "-", "27.00", "-", "27.00", "27.00", "0.56", "0.67"]    # 21 -> 27 in 10 steps: 25 at 16.7 of 30, 3.3 of 5 s
    assert iio.imread(tmp_path / "compare.png").shape == (16, 12, 3) and "a, b" in done.stdout
    with pytest.raises(UserError, match="not a finished run"):
        common.compare([tmp_path])
    fake_run(tmp_path / "c", [(10, 1.0, 20.0)], method="one", size=2, steps=10, train_seconds=1.0, psnr=20.0, entropy_bits=1.25, table={"x": 1})
    common.save_png(tmp_path / "c/rays.png", torch.full((7, 5, 3), 0.5))
    words = ["compare", "a", "c", "--keys", "entropy_bits", "table", "--picture", "rays.png", "--out", "r.png"]
    done = subprocess.run([sys.executable, str(ROOT / "common.py"), *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[0][10:12] == ["entropy_bits", "table"] and [row[10:12] for row in rows[2:]] == [["-", "-"], ["1.250", "-"]]
    again = common.compare([tmp_path / "c"], ["psnr"]).splitlines()                    # a key that is a column already
    assert len({line.count("|") for line in again}) == 1 and again[0].count("psnr") == 1
    assert len({len(row) for row in rows}) == 1 and iio.imread(tmp_path / "r.png").shape == (7, 9, 3)       # not wide: side by side


def seeds(folder):
    """base-s0, base-s1 end at 24 and 26 dB; fast-s0..2 reach the mean, 25 dB, at steps 10, 15, never; 1 s each 10 steps, 2 for base."""
    rows = lambda per_10, *psnrs: [(10 * i, per_10 * i, p, 100 * i, 1000.0 * i) for i, p in enumerate(psnrs, 1)]
    fake_run(folder / "base-s0", rows(2, 20, 22, 24), method="one", size=2, steps=30, train_seconds=6.0, psnr=24.0, ssim=0.8)
    fake_run(folder / "base-s1", rows(2, 20, 22, 26), method="one", size=2, steps=30, train_seconds=6.0, psnr=26.0, ssim=0.9)
    fake_run(folder / "fast-s0", rows(1, 25, 27), method="two", size=2, steps=20, train_seconds=2.0, psnr=27.0)
    fake_run(folder / "fast-s1", rows(1, 23, 27), method="two", size=2, steps=20, train_seconds=2.0, psnr=27.0)
    fake_run(folder / "fast-s2", rows(1, 21, 24), method="two", size=2, steps=20, train_seconds=2.0, psnr=24.0)
    fake_run(folder / "other-s4", rows(1, 19, 20, 20)[:2], method="three", size=2, steps=20, train_seconds=2.0, psnr=20.0)
    return [folder / name for name in ("base-s0", "base-s1", "fast-s0", "fast-s1", "fast-s2", "other-s4")]


def test_compare_takes_seeds_together(tmp_path):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in common.compare(seeds(tmp_path)).splitlines()]
    assert rows[2] == ["base (2 runs)", "one", "lego", "blender", "2", "30", "6.0", "-", "25.00 ± 1.41", "0.8500 ± 0.0707", "22.00", "20.00",
                       "0.92 (1 of 2)", "0.92 (1 of 2)"]                                     # 22 -> 26: 25 at 27.5 of 30
    assert rows[3] == ["fast (3 runs)", "two", "lego", "blender", "2", "20", "2.0", "-", "26.00 ± 1.73", "-", "26.00 ± 1.73", "26.00 ± 1.73",
                       "0.42 (2 of 3)", "0.21 (2 of 3)"]                                     # (10 + 15)/2 of 30, 1.25 of 6 s
    assert rows[4] == ["other-s4", "three", "lego", "blender", "2", "20", "2.0", "-", "20.00", "-", "20.00", "20.00", "-", "-"] and len(rows) == 5
    both = common.compare([tmp_path / "other-s4", tmp_path / "fast-s0", tmp_path / "fast-s1"]).splitlines()[3].split("|")
    assert [cell.strip() for cell in both[-3:-1]] == ["0.50", "0.50"]                        # all were there at the first evaluation
    curve = [dict(step=10, train_seconds=0, psnr=20), dict(step=20, train_seconds=2, psnr=24), dict(step=30, train_seconds=9, psnr=22)]
    assert [common.cost_to_reach(curve, p, "step") for p in (19, 20, 23, 24, 25)] == [10, 10, 17.5, 20, None]
    assert common.cost_to_reach(curve, 23, "train_seconds") == 1.5


def test_curves(tmp_path):
    runs = seeds(tmp_path)
    words = ["compare", *(run.name for run in runs), "--curves", "c.svg", "--out", "c.png"]
    done = subprocess.run([sys.executable, str(ROOT / "common.py"), *words], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "c.svg" in done.stdout
    svg = ET.fromstring((tmp_path / "c.svg").read_text(encoding="utf-8"))
    find = lambda tag: svg.findall("{http://www.w3.org/2000/svg}" + tag)
    texts = [node.text for node in find("text")]
    for text in ("steps", "rays", "samples", "training seconds", "base (2 runs)", "fast (3 runs)", "other-s4"):
        assert texts.count(text) == 1
    assert len(find("polyline")) == 4 * 3 and len(find("polygon")) == 4 * 2                  # a band needs two seeds
    number = {float(node.text): float(node.get("y")) - 4 for node in find("text")[:10] if node.get("text-anchor") == "end"}   # PSNR -> pixels
    (a, ya), (b, yb) = list(number.items())[:2]
    to_psnr = lambda y: a + (y - ya) * (b - a) / (yb - ya)
    line, band = points(find("polyline")[0]), points(find("polygon")[0])
    assert np.allclose(to_psnr(line[:, 1]), [20, 22, 25], atol=0.02) and np.allclose(np.diff(line[:, 0]), 190 / 3, atol=0.11)
    assert np.allclose(to_psnr(band[:, 1]), [20, 22, 24, 26, 22, 20], atol=0.02)             # least, then greatest backwards
    fake_run(tmp_path / "a<&", [(10, 1.0, 20.0)], method="m", size=2, steps=10)              # one point, no rays, a name to escape
    svg = ET.fromstring(common.draw_curves([tmp_path / "a<&"]))
    assert len(find("polyline")) == 2 and "a<&" in [node.text for node in find("text")]
    fake_run(tmp_path / "none", [], method="m", size=2, steps=10)
    (tmp_path / "none/metrics.jsonl").touch()
    for command, words in ((common.Compare([tmp_path / "none"], tmp_path / "d.png", tmp_path / "d.svg"), "no evaluations"),
                           (common.Compare(runs, tmp_path / "d.png", tmp_path / "d.pdf"), ".svg"),
                           (common.Compare(runs, tmp_path / "d.png", tmp_path / "no/d.svg"), "--curves.*cannot be written")):
        with pytest.raises(UserError, match=words):
            command()
    assert all(lo <= t <= hi and len(common.round_ticks(lo, hi)) <= 5 for lo, hi in ((0, 1), (19.2, 31.7), (0, 3e7), (20, 20.2), (-3, 99))
               for t in common.round_ticks(lo, hi)) and common.round_ticks(0, 30).tolist() == [0, 10, 20, 30]


def scene_zip(prefix="", extra=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as z:
        z.writestr(prefix + "transforms_train.json", "{}" + " " * 30000)
        z.writestr(prefix + "train/r_0.png", np.random.default_rng(0).bytes(50000))
        if extra:
            z.writestr(*extra)
    return buffer.getvalue()


class Server:
    """Serves bytes with Range; can cut the first `cuts` replies in the middle. Keeps what was asked."""
    def __init__(self, content, cuts=0, ranges=True):
        outer = self
        self.asked = []
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if ranges else 0
                outer.asked.append(start)
                if self.path != "/s.zip":
                    return self.send_error(404)
                if start >= len(content):
                    self.send_response(416)
                    self.send_header("Content-Range", f"bytes */{len(content)}")
                    return self.end_headers()
                body = content[start:]
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[:len(body) // 2] if len(outer.asked) <= cuts else body)
            def log_message(self, *words):
                pass
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/s.zip"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


@pytest.mark.parametrize("prefix", ["", "lego/", "other_name/"])
def test_download(tmp_path, prefix):
    with Server(scene_zip(prefix)) as server:
        folder = common.download("lego", tmp_path, server.url)
        assert folder == tmp_path / "nerf_synthetic/lego" and (folder / "transforms_train.json").is_file() and (folder / "train/r_0.png").stat().st_size == 50000
        assert [p.name for p in folder.parent.iterdir()] == ["lego"]
        with pytest.raises(UserError, match="there already"):
            common.download("lego", tmp_path, server.url)
        assert len(server.asked) == 1


@pytest.mark.parametrize("ranges", [True, False])
def test_download_goes_on_after_a_cut(tmp_path, ranges):
    content = scene_zip()
    with Server(content, cuts=1, ranges=ranges) as server:
        with pytest.raises(UserError, match="run the command again"):
            common.download("lego", tmp_path, server.url)
        assert not (tmp_path / "nerf_synthetic/lego").exists()
        have = (tmp_path / "nerf_synthetic/lego.zip.part").stat().st_size
        assert have == len(content) // 2
        assert (common.download("lego", tmp_path, server.url) / "transforms_train.json").is_file()
        assert server.asked == [0, have if ranges else 0]


def test_download_of_a_part_that_is_complete_or_too_long(tmp_path):
    content = scene_zip()
    part = tmp_path / "nerf_synthetic/lego.zip.part"
    part.parent.mkdir()
    with Server(content) as server:
        part.write_bytes(content + b"x")
        with pytest.raises(UserError, match="has changed"):
            common.download("lego", tmp_path, server.url)
        assert not part.exists()
        part.write_bytes(content)
        assert common.download("lego", tmp_path, server.url).is_dir()


def test_download_refuses(tmp_path):
    link = zipfile.ZipInfo("train/link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for extra in (("../evil", "x"), ("/evil", "x"), ("a/../../evil", "x"), ("..\\evil", "x"), ("C:evil", "x"), (link, "/etc")):
        with Server(scene_zip(extra=extra)) as server, pytest.raises(UserError, match="would leave the folder"):
            common.download("lego", tmp_path, server.url)
        (tmp_path / "nerf_synthetic/lego.zip.part").unlink()
        assert not list((tmp_path / "nerf_synthetic").iterdir()) and not list(tmp_path.rglob("*evil*"))
    for content, words in ((b"<html>sorry</html>", "not a good zip"), (scene_zip()[:-30000], "not a good zip"), (scene_zip("a/b/"), "no transforms_train.json")):
        with Server(content) as server, pytest.raises(UserError, match=words):
            common.download("lego", tmp_path, server.url)
        (tmp_path / "nerf_synthetic/lego.zip.part").unlink(missing_ok=True)
        assert not list((tmp_path / "nerf_synthetic").iterdir())
    with Server(b"") as server, pytest.raises(UserError, match="404"):
        common.download("lego", tmp_path, server.url.replace("s.zip", "t.zip"))
    with pytest.raises(UserError, match="network"):
        common.download("lego", tmp_path, "http://127.0.0.1:9/s.zip")
    for name in ("../x", "a/b", "", ".."):
        with pytest.raises(UserError, match="name"):
            common.download(name, tmp_path, "http://127.0.0.1:9/s.zip")
    with pytest.raises(UserError, match="no scene"):
        common.download("fern", tmp_path)
