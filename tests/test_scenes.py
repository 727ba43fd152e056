"""Rays and scenes from files against known answers. Real data: NERF_DATA=..., else skipped."""
import json
import math
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import UserError
from conftest import assert_malformed, change_file, real, write_llff

WHITE = torch.ones(3)
FOCAL = 0.5 / math.tan(0.35)                # of the tiny scenes, in widths of a picture


def pose(position=(0.0, -4.0, 0.0), target=(0.0, 0.0, 0.0)):
    return np.vstack([common.look_at(position, target), [0, 0, 0, 1]])


def ring(n=9):
    """n poses at the synthetic sets' distance, all around."""
    return [np.vstack([common.orbit_pose(2.4 * v, 0.3 + 0.1 * v, 4.0311), [0, 0, 0, 1]])
            for v in range(n)]


def ball(c2w, K, H, W):
    """(H, W, 4) uint8: a ball of radius 1 at the origin, its colour a smooth function of the place.
    """
    xy = (common.pixel_grid(H, W).double().numpy() - K[:2, 2]) / np.diag(K)[:2]
    d = np.stack([xy[:, 0], -xy[:, 1], -np.ones(len(xy))], 1) @ c2w[:3, :3].T
    d, o = d / np.linalg.norm(d, axis=1, keepdims=True), c2w[:3, 3]
    middle = d @ o
    root = middle ** 2 - o @ o + 1
    x = o + (-middle - np.sqrt(root.clip(0)))[:, None] * d
    rgba = np.concatenate([0.5 + 0.4 * np.sin(3 * x), (root > 0)[:, None]], 1)
    return (255 * rgba * (root > 0)[:, None]).round().astype(np.uint8).reshape(H, W, 4)


def K_of_width(W, H=None, f=FOCAL):
    return np.array([[f * W, 0, W / 2], [0, f * W, (H or W) / 2], [0, 0, 1]])


def write_scene(folder, H=24, W=24, n=9, splits=("train", "test"), meta=None, frame=None,
                draw=None, name="{}.png", save=None, c2w=None):
    """The ball seen by a ring of cameras, as Blender writes it. meta: more for the top of the file;
    frame(v), draw(v, c2w), save(file, image): a frame's values, its pixels, how they are stored."""
    for split in splits:
        (folder / split).mkdir(parents=True, exist_ok=True)
        frames = []
        for v, matrix in enumerate(c2w or ring(n)):
            image = draw(v, matrix) if draw else ball(matrix, K_of_width(W, H), H, W)
            file = folder / split / name.format(v)
            if save:
                save(file, image)
            else:
                iio.imwrite(file, image)
            frames.append({"file_path": f"./{split}/{file.name}",
                           "transform_matrix": matrix.tolist(), **(frame(v) if frame else {})})
        top = {"camera_angle_x": 0.7, **(meta or {}), "frames": frames}
        top = {key: value for key, value in top.items() if value is not None}
        (folder / f"transforms_{split}.json").write_text(json.dumps(top))
    return folder


def edit(path, change):
    """Change a JSON file in place."""
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def load(folder, **more):
    return common.load_scene(str(folder), folder.parent, **more)


def refused(folder, *words, **more):
    assert_malformed(lambda: load(folder, **more), folder, *words)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The ball as Blender writes it: the right answer for the same thing written otherwise."""
    return load(write_scene(tmp_path_factory.mktemp("plain") / "scene"))


def assert_as_plain(scene, plain, pixels=1e-6):
    for one, other in ((scene.train, plain.train), (scene.test, plain.test)):
        assert torch.allclose(one.c2w, other.c2w, atol=1e-4)
        assert torch.allclose(one.K, other.K, rtol=1e-5)
        assert (one.images - other.images).abs().max() <= pixels
        assert (one.alpha is None) == (other.alpha is None)


# ------------------------------------------------------------------------------------------ rays

def test_pixel_rays_are_the_inverse_of_projection_and_differentiable():
    torch.manual_seed(0)
    K = torch.tensor([[50.0, 0, 31], [0, 40, 17], [0, 0, 1]], dtype=torch.float64)
    c2w = torch.tensor(pose((1.0, -3.0, 2.0))[:3]).expand(20, 3, 4)
    world = torch.rand(20, 3, dtype=torch.float64) - 0.5
    x, y, z = ((world - c2w[:, :, 3])[:, :, None] * c2w[:, :, :3]).sum(1).T         # R^T (x - o)
    xy = torch.stack([31 - 50 * x / z, 17 + 40 * y / z], -1)
    o, d = common.pixel_rays(xy, K.expand(20, 3, 3), c2w)
    assert torch.allclose(o + (world - o).norm(dim=-1, keepdim=True) * d, world, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: common.pixel_rays(x, K, c2w)[1], xy.requires_grad_())


def test_ndc_ray_goes_through_the_images_of_the_ray_s_points():
    torch.manual_seed(0)
    H, W = 30, 40
    K = torch.tensor([[35.0, 0, 20], [0, 33, 15], [0, 0, 1]], dtype=torch.float64)
    o = torch.randn(50, 3, dtype=torch.float64) * 0.2
    d = torch.cat([torch.randn(50, 2, dtype=torch.float64) * 0.3, -torch.ones(50, 1)], -1)
    d = torch.nn.functional.normalize(d, dim=-1)
    no, nd = common.ndc_rays(o, d, K, H, W)
    one = torch.ones(50, dtype=torch.float64)
    assert torch.allclose(no[:, 2], -one) and torch.allclose(nd.norm(dim=-1), one)
    for t in (2.0, 5.0, 100.0):
        x, y, z = (o + t * d).T
        image = torch.stack([-2 * 35 / W * x / z, -2 * 33 / H * y / z, 1 + 2 / z], -1)
        off = image - no
        assert torch.allclose(torch.linalg.cross(off, nd), torch.zeros_like(off), atol=1e-12)
        assert ((off * nd).sum(-1) > 0).all() and (image[:, 2] < 1).all()


# ---------------------------------------------------------------------- Blender: sizes and splits

@pytest.mark.parametrize("size", [None, 12, 6, 5, 1])
def test_resolution_is_an_area_average_of_premultiplied_colour(tmp_path, size):
    H, W, w = 8, 12, size or 12
    h = max(1, round(8 * w / 12))
    noise = np.random.default_rng(0).integers(0, 256, (9, H, W, 4), dtype=np.uint8)
    bg = torch.tensor([0.2, 0.5, 0.9])
    write_scene(tmp_path / "scene", draw=lambda v, c2w: noise[v])
    views = common.load_blender(tmp_path / "scene/transforms_train.json", size, bg)
    expected, coverage = np.zeros((2, h, w, 3)), np.zeros((2, h, w))
    for v, i, j, y, x in np.ndindex(2, h, w, H, W):
        dy = min((i + 1) * H / h, y + 1) - max(i * H / h, y)
        dx = min((j + 1) * W / w, x + 1) - max(j * W / w, x)
        if dy > 0 and dx > 0:
            share = dy * dx / (H / h * W / w) * noise[v, y, x, 3] / 255
            expected[v, i, j] += share * noise[v, y, x, :3] / 255
            coverage[v, i, j] += share
    expected += (1 - coverage[..., None]) * bg.numpy()
    assert views.images.shape == (9, h, w, 3)
    assert np.abs(views.images[:2].numpy() - expected).max() < 1e-6
    assert np.abs(views.alpha[:2].numpy() - coverage).max() < 1e-6
    f = 6 / math.tan(0.35)
    K = torch.tensor([[f * w / 12, 0, w / 2], [0, f * h / 8, h / 2], [0, 0, 1]])
    assert torch.allclose(views.K, K.expand(9, 3, 3))


def test_a_scene_without_alpha_and_one_as_it_is_on_disk(tmp_path, plain):
    write_scene(tmp_path / "rgb", save=lambda file, x: iio.imwrite(file, x[..., :3]))
    scene = load(tmp_path / "rgb", bg="black")
    assert (scene.train.alpha, scene.kind, scene.name, scene.ndc) == (None, "blender", "rgb", False)
    expected = [ball(matrix, K_of_width(24), 24, 24)[..., :3] for matrix in ring()]
    assert np.array_equal((scene.test.images * 255).round().byte().numpy(), expected)
    assert torch.allclose(plain.train.c2w.double(), torch.tensor(np.stack(ring()))[:, :3])
    assert (plain.near, plain.far) == (2, 6) and plain.aabb.tolist() == [[-1.5] * 3, [1.5] * 3]


def test_lookup(tmp_path, capsys, monkeypatch):
    folder = write_scene(tmp_path / "nerf_synthetic/mine", n=2)
    for size in (25, 0, -3):
        refused(folder, "--size", size=size)
    (tmp_path / "empty").mkdir()
    for name, named in (("legoo", "nerf_synthetic/mine.*bricks"), ("", "not found"),
                        ("stage", "not found"), ("basketball", "not found"),
                        ("cars_train", "not found"), ("empty", "empty: no poses_bounds.npy")):
        with pytest.raises(UserError, match=named):
            common.load_scene(name, tmp_path)
    capsys.readouterr()
    box = common.Shape(common.BOX, (0, 0, 0), (1, 1, 1), common.RED)
    monkeypatch.setattr(common, "truck", lambda: [box])                 # is soon drawn
    scene = common.load_scene("lego", tmp_path, size=8)
    message = capsys.readouterr().err
    assert scene.kind == "builtin" and scene.name == "bricks" and len(message.splitlines()) >= 3
    assert "USING THE BUILT-IN SCENE" in message and "common.py download lego" in message
    (tmp_path / "here/mine").mkdir(parents=True)        # a run's folder that is called like a scene
    monkeypatch.chdir(tmp_path / "here")
    assert common.load_scene("mine", tmp_path).kind == "blender" and capsys.readouterr().err == ""


# -------------------------------------------------------------- Blender: what else a file may state

def halves(v, c2w):
    """Odd pictures: their centre half, enlarged."""
    return ball(c2w, K_of_width(24, f=FOCAL * (1 + v % 2)), 24, 24)


FRAMES = {
    "focal length over the top's": (
        {"fl_x": FOCAL * 24, "fl_y": FOCAL * 24, "w": 24, "h": 24},
        lambda v: {"fl_x": 2 * FOCAL * 24} if v % 2 else {}),
    "focal length of another size": (
        {}, lambda v: {"fl_x": 2 * FOCAL * 48, "w": 48, "h": 48} if v % 2 else {}),
    "angle over the top's focal length": (
        {"fl_x": FOCAL * 24, "w": 24},
        lambda v: {"camera_angle_x": 2 * math.atan(0.25 / FOCAL)} if v % 2 else {}),
    "angles of frames only": (
        {"camera_angle_x": None},
        lambda v: {"camera_angle_x": 2 * math.atan(0.5 / FOCAL / (1 + v % 2))}),
    "focal lengths of frames only": (
        {"camera_angle_x": None},
        lambda v: {"fl_x": FOCAL * 24 * (1 + v % 2), "cx": 12, "cy": 12, "w": 24, "h": 24}),
}


@pytest.mark.parametrize("what", FRAMES)
def test_intrinsics_of_a_frame(tmp_path, what):
    meta, frame = FRAMES[what]
    write_scene(tmp_path / "scene", meta=meta, frame=frame, draw=halves)
    views = load(tmp_path / "scene", size=12).train
    for v in range(9):
        expected = torch.tensor(K_of_width(12, f=FOCAL * (1 + v % 2)))
        assert torch.allclose(views.K[v].double(), expected, rtol=1e-5)


def test_intrinsics_beside_the_angle(tmp_path):
    f = FOCAL * 24
    for name, meta, size, expected in (
            ("centre", {"cx": 8.4, "cy": 13.0}, (24, 24), (f / 2, f / 2, 4.2, 6.5)),
            ("equal angles", {"camera_angle_y": 0.7}, (12, 24), (f / 2, f / 4, 6, 3)),
            ("of 48x32", {"fl_x": 40, "fl_y": 60, "cx": 20, "cy": 18, "w": 48, "h": 32}, (16, 24),
             (10, 15, 5, 4.5))):
        write_scene(tmp_path / name, *size, meta=meta)
        K = load(tmp_path / name, size=12).train.K[3]
        fx, fy, cx, cy = expected
        assert torch.allclose(K, torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1.0]])), name


def test_lens_distortion_and_masks_are_refused_and_zeros_pass(tmp_path, capsys, plain):
    scene = write_scene(tmp_path / "zeros", meta={"k1": 0, "k2": 0.0, "camera_model": "OPENCV"})
    capsys.readouterr()
    assert_as_plain(load(scene), plain)
    assert capsys.readouterr().err == ""
    for i, meta in enumerate(({"camera_model": "OPENCV_FISHEYE"}, {"is_fisheye": True},
                              {"k1": -0.01}, {"p2": 0.01}, {"k4": "much"},
                              {"mask_path": "mask.png"})):
        refused(write_scene(tmp_path / str(i), meta=meta), "lens distortion", "undistort", "alpha")
    refused(write_scene(tmp_path / "frame", frame=lambda v: {"k2": 0.1 * (v == 5)}), "undistort")


def test_a_principal_point_that_speaks_of_another_size(tmp_path):
    full = {"fl_x": FOCAL * 48, "cx": 24, "cy": 24}             # pictures are 24x24
    refused(write_scene(tmp_path / "a", meta=full), "(24, 24) in pictures of 24x24", "48x48")
    refused(write_scene(tmp_path / "b", meta={**full, "cx": 36, "cy": 36}), "72x72")
    refused(write_scene(tmp_path / "c", meta={**full, "cx": 19, "cy": 19}), "38x38")
    load(write_scene(tmp_path / "d", meta={**full, "w": 48, "h": 48}))
    refused(write_scene(tmp_path / "e", 24, 18, meta={"w": 80, "h": 60}), "80x60", "18x24")


# ------------------------------------------------------------------------------------ pixel formats

def convert(mode, **more):
    """Store pictures on white in a Pillow mode."""
    def save(file, image):
        white = image.astype(float)
        white = white[..., :3] + 255 - white[..., 3:]
        Image.fromarray(white.round().astype(np.uint8)).convert(mode).save(file, **more)
    return save


def palette(file, image):
    picture = Image.fromarray(image[..., :3]).quantize(255)
    index = np.where(image[..., 3] > 0, np.asarray(picture), 255).astype(np.uint8)
    out = Image.fromarray(index, "P")
    out.putpalette((picture.getpalette() + [0] * 768)[:768])
    out.save(file, transparency=255)


def transparent_black(file, image):
    Image.fromarray(image[..., :3]).save(file, transparency=(0, 0, 0))


FORMATS = {                                     # how it is stored, its ending, mean error, alpha?
    "CMYK": (convert("CMYK", quality=98), "jpg", 0.02, False),
    "palette": (convert("P"), "png", 0.05, False),
    "palette with transparency": (palette, "png", 0.02, True),
    "a transparent colour": (transparent_black, "png", 1e-6, True),
}


@pytest.mark.parametrize("what", FORMATS)
def test_pixel_formats(tmp_path, what, plain):
    save, ending, tolerance, alpha = FORMATS[what]
    scene = load(write_scene(tmp_path / "scene", save=save, name="{}." + ending))
    assert (scene.train.images - plain.train.images).abs().mean() < tolerance
    assert (scene.train.alpha is not None) == alpha
    if alpha:
        assert torch.equal(scene.train.alpha, plain.train.alpha)


def test_pixels_that_cannot_be_scored_are_refused(tmp_path):
    for kind in (np.float32, np.int32, np.uint16):
        def save(file, image):
            Image.fromarray(image[..., 0].astype(kind)).save(file)
        write_scene(tmp_path / kind.__name__, save=save, name="{}.tif")
        refused(tmp_path / kind.__name__, "0.tif", "8 bits")
    write_scene(tmp_path / "empty", save=lambda f, x: iio.imwrite(f, 0 * x))
    refused(tmp_path / "empty", "fully transparent")


def turned(file, image):
    """Stored turned by 90 degrees, with the tag that asks viewers to turn it back."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(image[..., :3])).save(file, quality=99, exif=exif.tobytes())


@pytest.mark.parametrize("stated", [{}, {"w": 24, "h": 18}, {"w": 18, "h": 24}])
def test_exif_orientation_is_refused(tmp_path, stated):
    """Programs differ on whether their cameras speak of the stored picture or of the turned one."""
    write_scene(tmp_path / "scene", 18, 24, name="{}.jpg", save=turned, meta=stated)
    refused(tmp_path / "scene", "0.jpg", "EXIF orientation")


# -------------------------------------------------------------- worlds, and files of other programs

def moved(scale=1.0, shift=(0, 0, 0), axes=(1, 1, 1)):
    def change(meta):
        for frame in meta["frames"]:
            matrix = np.array(frame["transform_matrix"])
            matrix[:3, 3] = matrix[:3, 3] * scale + shift
            matrix[:3, :3] *= axes
            frame["transform_matrix"] = matrix.tolist()
    return change


def rewrite(folder, change):
    for split in ("train", "test"):
        edit(folder / f"transforms_{split}.json", change)
    return folder


@pytest.mark.parametrize("scale, shift", [(10, (0, 0, 0)), (0.25, (0, 0, 0)), (1, (6, 0, 0)),
                                          (3, (-2, 5, 1))])
def test_a_world_of_another_scale_and_place(tmp_path, capsys, scale, shift, plain):
    f = 1.3889 * 24                                         # the synthetic sets': 0.69 rad
    meta = {"fl_x": f, "w": 24, "h": 24}
    folder = rewrite(write_scene(tmp_path / "scene", meta=meta), moved(scale, shift))
    scene = load(folder)
    assert "moved" in capsys.readouterr().err
    assert torch.allclose(scene.train.c2w, plain.train.c2w, atol=2e-3)
    assert torch.allclose(scene.test.c2w, plain.test.c2w, atol=2e-3)
    assert scene.near == pytest.approx(2, abs=0.05) and scene.far == pytest.approx(6, abs=0.05)
    as_it_is = load(folder, normalise=False)
    assert torch.allclose(as_it_is.train.c2w[:, :, 3],
                          plain.train.c2w[:, :, 3] * scale + torch.tensor(shift), atol=1e-4)
    assert (as_it_is.near, as_it_is.far) == (2, 6)


def test_wide_pictures_stand_nearer_but_outside_of_the_box(tmp_path):
    folder = rewrite(write_scene(tmp_path / "scene", meta={"camera_angle_x": 1.6}), moved(10))
    scene = load(folder)
    distance = scene.train.c2w[:, :, 3].norm(dim=-1)
    assert distance.min() == pytest.approx(2.7, abs=1e-3) and scene.near < 2.7 - 1


def test_worlds_that_cannot_be_right(tmp_path):
    opencv = write_scene(tmp_path / "opencv")
    refused(rewrite(opencv, moved(axes=(1, -1, -1))), "OpenGL axes", "OpenCV")
    parallel = [pose((0.3 * v, -9, 0), (0.3 * v, 0, 0)) for v in range(9)]
    refused(write_scene(tmp_path / "parallel", c2w=parallel), "one place", "--no-normalise")
    for name, axes in (("mirrored", (1, 1, -1)), ("scaled", (2, 2, 2))):
        refused(rewrite(write_scene(tmp_path / name), moved(axes=axes)), "not a rotation")


def test_one_file_without_splits(tmp_path, capsys, plain):
    """As instant-ngp and nerfstudio write it; and one that lists no test views."""
    for name in ("one", "no test", "empty test"):
        folder = write_scene(tmp_path / name, splits=("train",))
        if name == "one":
            (folder / "transforms_train.json").rename(folder / "transforms.json")
        if name == "empty test":
            (folder / "transforms_test.json").write_text('{"camera_angle_x": 0.7, "frames": []}')
        capsys.readouterr()
        scene = load(folder)
        assert "every 8th" in capsys.readouterr().err
        assert scene.test.names == ["./train/0.png", "./train/8.png"]
        assert torch.equal(scene.train.images, plain.train.images[1:8])
    refused(write_scene(tmp_path / "1", n=1, splits=("train",)), "one view only")


def capitals(folder):
    for file in [*(folder / "train").iterdir(), *(folder / "test").iterdir()]:
        file.rename(file.with_suffix(".PNG"))


def each(**values):
    """Change of all frames: key -> function of the old value."""
    def change(meta):
        for frame in meta["frames"]:
            for key, new in values.items():
                frame[key] = new(frame.get(key))
    return change


SPELLINGS = {
    "backslashes": lambda f: rewrite(f, each(file_path=lambda x: x[2:].replace("/", "\\"))),
    "byte-order mark": change_file("*.json", lambda old: b"\xef\xbb\xbf" + old),
    "capitals": capitals,
    "capitals, no ending": lambda f: capitals(rewrite(f, each(file_path=lambda x: x[:-4]))),
    "no ending": lambda f: rewrite(f, each(file_path=lambda x: x[:-4])),
    "3x4 matrices": lambda f: rewrite(f, each(transform_matrix=lambda x: x[:3])),
}


@pytest.mark.parametrize("what", SPELLINGS)
def test_spellings_of_other_programs(tmp_path, what, plain, capsys):
    folder = write_scene(tmp_path / "scene")
    SPELLINGS[what](folder)
    assert_as_plain(load(folder), plain)
    assert capsys.readouterr().err == ""


def test_what_is_left_out_is_said(tmp_path, capsys, plain):
    write_scene(tmp_path / "scene", meta={"aabb_scale": 4, "offset": [0, 0, 0]},
                frame=lambda v: {"time": v / 9, "rotation": 0.1})
    assert_as_plain(load(tmp_path / "scene"), plain)
    assert "left out: aabb_scale, offset, time\n" in capsys.readouterr().err


def _train(change):
    """The right scene, changed: change(meta) of its training file."""
    return lambda folder: edit(folder / "transforms_train.json", change)


def _matrix(value):
    return _train(lambda meta: meta["frames"][1].update(transform_matrix=value))


def _picture(name, *shape):
    return lambda folder: iio.imwrite(folder / name, np.zeros(shape, np.uint8))


MALFORMED_BLENDER = {
    "no json": (change_file("transforms_train.json"), "transforms.json: not usable"),
    "broken": (change_file("transforms_train.json", lambda _: b"{"), "train.json: not usable"),
    "a list": (change_file("transforms_train.json", lambda _: b"[1]"), "not usable"),
    "missing image": (change_file("train/1.png"), "1.png: not usable"),
    "cut image": (change_file("train/1.png", lambda old: old[:150]), "1.png: not usable"),
    "odd size": (_picture("train/1.png", 8, 10, 4), "1.png: not 24x24 px as 0.png"),
    "NaN pose": (_matrix((np.eye(4) * np.nan).tolist()), "matrix of ./train/1.png"),
    "ragged pose": (_matrix([[1, 2], [3]]), "matrix of ./train/1.png"),
    "no pose": (_train(lambda m: m["frames"][1].pop("transform_matrix")), "transform_matrix"),
    "transposed pose": (_matrix(pose((1, 2, 3)).T.tolist()), "matrix of ./train/1.png"),
    "no frames": (_train(lambda m: m.update(frames=[])), "no frames"),
    "no path": (_train(lambda m: m["frames"][0].pop("file_path")), "file_path"),
    "no angle": (_train(lambda m: m.pop("camera_angle_x")), "camera_angle_x"),
    "degrees": (_train(lambda m: m.update(camera_angle_x=40)), "camera_angle_x 40"),
    "NaN focal length": (_train(lambda m: m.update(fl_x=math.nan)), "fl_x"),
    "no width": (_train(lambda m: m.update(w=0, h=24)), "fl_x 0"),
    "text focal length": (_train(lambda m: m["frames"][3].update(fl_x="long")), "fl_x"),
    "test of another size": (lambda f: write_scene(f, 23, 24, splits=("test",)), "one size"),
}


# ------------------------------------------------------------------------------------------ LLFF

def as_bytes(images):
    return (images * 255).round().byte().numpy()


def test_llff_with_a_known_answer(tmp_path):
    pixels = write_llff(tmp_path / "nerf_llff_data/line")
    scene = common.load_scene("line", tmp_path)
    assert scene.kind == "llff" and scene.ndc and len(scene.train.names) == 7
    assert np.array_equal(as_bytes(scene.test.images), pixels[[0, 8]])
    assert scene.train.K[6].tolist() == [[25, 0, 8], [0, 25, 6], [0, 0, 1]]
    c2w = torch.cat([scene.test.c2w[:1], scene.train.c2w, scene.test.c2w[1:]])      # 0, 1..7, 8
    x = 0.1 * (torch.arange(9.0) - 4) / (2.0 * 0.75)    # nearest depth 2 -> 1/0.75, mean camera 1
    assert torch.allclose(c2w[:, :, :3], torch.eye(3).expand(9, 3, 3), atol=1e-6)
    assert torch.allclose(c2w[:, :, 3], torch.stack([x, 0 * x, 0 * x], -1), atol=1e-6)
    o, d = common.view_rays(scene.test, 0, True)
    assert torch.allclose(o[:, 2], -torch.ones(12 * 16), atol=1e-6)
    small = common.load_scene("line", tmp_path, size=8).train
    assert small.images.shape[1:3] == (6, 8) and float(small.K[0, 0, 0]) == 12.5


def test_llff_takes_the_smallest_folder_that_is_large_enough(tmp_path):
    folder = tmp_path / "a"
    write_llff(folder, factor=4)
    (folder / "images_2").mkdir()
    for v in range(9):
        _picture(f"images_2/im{v}.png", 24, 32, 3)(folder)
    names = [load(folder, size=size).train.names[0].split("/")[0] for size in (None, 16, 17, 32)]
    assert names == ["images_4", "images_4", "images_2", "images_2"]
    assert load(folder, size=32).train.K[0, 0, 0] == 50


def test_llff_with_a_focal_length_a_row(tmp_path):
    """A K each, and one NDC: the images of a point lie on its ray from every view."""
    write_llff(tmp_path / "a", focal=lambda v: 100.0 + 50 * (v % 2))
    scene = load(tmp_path / "a")
    assert scene.train.K[:, 0, 0].tolist() == [37.5, 25, 37.5, 25, 37.5, 25, 37.5]
    point = torch.tensor([0.1, -0.2, -3.0])
    there = torch.tensor([-2 * 25 / 16 * 0.1 / -3, -2 * 25 / 12 * -0.2 / -3, 1 + 2 / -3])
    for views in (scene.train, scene.test):
        for v, (K, c2w) in enumerate(zip(views.K, views.c2w)):
            x, y, z = (point - c2w[:, 3]) @ c2w[:, :3]
            xy = torch.stack([K[0, 2] - K[0, 0] * x / z, K[1, 2] + K[1, 1] * y / z])[None]
            o, d = common.camera_rays(views, torch.tensor([v]), xy, True)
            assert torch.linalg.cross(there - o[0], d[0]).norm() < 1e-5


def test_llff_all_around_is_refused(tmp_path):
    write_llff(tmp_path / "a", c2w=ring())
    refused(tmp_path / "a", "not forward-facing", "transforms.json")


def test_llff_pictures_in_numeric_order_without_hidden_files(tmp_path):
    pixels = write_llff(tmp_path / "a", n=20, name="{}.png")
    (tmp_path / "a/images_4/._3.png").write_bytes(b"left by macOS")
    scene = load(tmp_path / "a")
    expected = pixels[[v for v in range(20) if v % 8]]
    assert np.array_equal(as_bytes(scene.train.images), expected)


MALFORMED_LLFF = {
    "zeros": (lambda f: np.save(f / "poses_bounds.npy", np.zeros((9, 17))), "positive"),
    "ones": (lambda f: np.save(f / "poses_bounds.npy", np.ones((9, 17))), "row 0 is not a"),
    "NaN": (lambda f: np.save(f / "poses_bounds.npy", np.full((9, 17), np.nan)), "finite"),
    "cut": (change_file("poses_bounds.npy", lambda old: old[:4]), "not usable"),
    "count": (change_file("images_4/im003.png"), "8 images, but 9 poses"),
    "shape": (lambda f: [_picture(f"images_4/im{v:03d}.png", 16, 12, 3)(f) for v in range(9)],
              "64x48", "12x16"),
    "no pictures": (lambda f: (f / "images_4").rename(f / "pictures"), "no images/"),
}


# ------------------------------------------------------------------------------------------- DTU

SHIFT = np.array([10, -20, 600])


def write_dtu(folder, n=9, H=6, W=8, sign=1.0, cameras="cameras.npz"):
    """Cameras on one side of an object of size 50 at SHIFT, by their projection times `sign`.

    Returns pixels (n, H, W, 3), masks (n, H, W), rotations to OpenCV's camera (n, 3, 3), positions.
    """
    (folder / "image").mkdir(parents=True)
    (folder / "mask").mkdir()
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (n, H, W, 3), dtype=np.uint8)
    masks = rng.integers(0, 256, (n, H, W), dtype=np.uint8)
    arrays, rotations, positions = {}, [], []
    for v in range(n):
        iio.imwrite(folder / "image" / f"{v:06d}.png", pixels[v])
        mask = masks[v] if v % 2 else np.stack([masks[v]] * 3, -1)
        iio.imwrite(folder / "mask" / f"{v:03d}.png", mask)
        position = 3 * np.array([np.cos(0.2 * v), 0.3 * np.sin(2.0 * v), -np.sin(0.2 * v)])
        target = rng.uniform(-0.2, 0.2, 3)
        right, up, back, _ = common.look_at(position, target, (0.1, -1, 0)).T   # y is down
        R, K = np.stack([right, -up, -back]), np.diag([11.0, 9.5, 1])
        K[:2, 2] = 4.2 + 0.1 * v, 2.6
        world = K @ np.column_stack([R, -R @ (50 * position + SHIFT)])
        arrays[f"world_mat_{v}"] = np.vstack([sign * world, [0, 0, 0, 1]])
        arrays[f"scale_mat_{v}"] = np.diag([50.0, 50, 50, 1]).astype(np.float32)
        arrays[f"scale_mat_{v}"][:3, 3] = SHIFT
        rotations.append(R)
        positions.append(position)
    np.savez(folder / cameras, **arrays)
    return pixels, masks, np.stack(rotations), np.stack(positions)


@pytest.mark.parametrize("size", [None, 4, 5])              # as on disk, halved, 5x4 (not square)
def test_dtu_rays_go_through_the_points_that_the_matrices_project(tmp_path, size):
    _, _, R, position = write_dtu(tmp_path)
    views = common.load_dtu(tmp_path, size, WHITE)
    h, w = views.images.shape[1:3]
    assert (h, w) == {None: (6, 8), 4: (3, 4), 5: (4, 5)}[size]
    assert views.K.shape == (9, 3, 3) and views.alpha is None and views.depth is None
    cameras = np.load(tmp_path / "cameras.npz")
    X = np.random.default_rng(0).uniform(-0.57, 0.57, (50, 3))
    for v in range(9):
        def project(points):                                # to pixels of ours, of h x w
            p = np.c_[50 * points + SHIFT, np.ones(len(points))] @ cameras[f"world_mat_{v}"][:3].T
            assert (p[:, 2] > 0).all()
            return (p[:, :2] / p[:, 2:] + 0.5) * [w / 8, h / 6]
        xy = torch.tensor(project(X), dtype=torch.float32)
        o, d = common.pixel_rays(xy, views.K[v], views.c2w[v].expand(50, 3, 4))
        to = torch.tensor(X, dtype=torch.float32) - o
        along = (to * d).sum(-1, keepdim=True)
        assert (along > 1).all() and (to - along * d).norm(dim=-1).max() < 1e-4     # ahead, on it
        o, d = common.view_rays(views, v, False)
        back = project((o + 3 * d).double().numpy())
        assert np.abs(back - common.pixel_grid(h, w).numpy()).max() < 1e-4
    axes = np.stack([R[:, 0], -R[:, 1], -R[:, 2], position], -1)
    assert np.abs(views.c2w.numpy() - axes).max() < 1e-5


def test_dtu_pictures_masks_split_and_lookup(tmp_path):
    folder = tmp_path / "dtu/toy"
    pixels, masks, _, position = write_dtu(folder)
    scene = common.load_scene("toy", tmp_path, bg="black")
    assert (scene.kind, scene.name, scene.ndc, scene.far) == ("dtu", "toy", False, 5.0)
    nearest = np.linalg.norm(position, axis=1).min()        # near: behind cameras, before the ball
    assert nearest > 2 and scene.near == pytest.approx(nearest - 1.1, abs=1e-5)
    assert scene.aabb.tolist() == [[-1.5] * 3, [1.5] * 3]
    assert scene.test.names == ["image/000000.png", "image/000008.png"]
    assert scene.train.names == [f"image/{v:06d}.png" for v in range(1, 8)]
    for views, ids in ((scene.train, range(1, 8)), (scene.test, (0, 8))):
        assert np.array_equal(as_bytes(views.images), pixels[list(ids)])
        assert np.array_equal(as_bytes(views.mask), masks[list(ids)])
    small = common.load_scene("toy", tmp_path, size=4).train.mask.numpy()
    assert np.abs(small - masks[1:8].reshape(7, 3, 2, 4, 2).mean((2, 4)) / 255).max() < 1e-6
    both = common.join_views(scene.train, scene.test)
    assert torch.equal(both.mask, torch.cat([scene.train.mask, scene.test.mask]))
    assert common.to_device(scene, "meta").train.mask.device.type == "meta"
    none = common.pick_views(scene.test, [])
    assert none.names == [] and none.mask.shape == none.images.shape[:3] == (0, 6, 8)
    shutil.rmtree(folder / "mask")
    scene = common.load_scene("toy", tmp_path)
    assert scene.train.mask is None and common.join_views(scene.train, scene.test).mask is None


def test_dtu_projections_are_known_up_to_a_factor_and_under_neus_s_name(tmp_path):
    write_dtu(tmp_path / "a")
    write_dtu(tmp_path / "b", sign=-2.5, cameras="cameras_sphere.npz")
    a, b = load(tmp_path / "a").train, load(tmp_path / "b").train
    assert torch.allclose(a.c2w, b.c2w, atol=1e-5) and torch.allclose(a.K, b.K, atol=1e-4)


def _cameras(change):
    """Change the arrays of cameras.npz."""
    def harm(folder):
        arrays = dict(np.load(folder / "cameras.npz"))
        change(arrays)
        np.savez(folder / "cameras.npz", **arrays)
    return harm


def _set(key, where, value):
    return _cameras(lambda arrays: arrays[key].__setitem__(where, value))


def _scale(value):
    return _cameras(lambda c: [c[f"scale_mat_{v}"].__setitem__((range(3), range(3)), value)
                               for v in range(9)])


MALFORMED_DTU = {
    "pickled objects": (_cameras(lambda c: c.update(world_mat_2=np.full((4, 4), None))),
                        "not usable"),
    "no matrices": (_cameras(lambda c: c.clear()), "0x4x4 finite"),
    "one too few": (_cameras(lambda c: c.pop("world_mat_2")), "world_mat_2 is not a file"),
    "last one": (_cameras(lambda c: c.pop("world_mat_8")), "9 PNG or JPG files, but 8 cameras"),
    "3x4": (_cameras(lambda c: c.update(world_mat_3=np.eye(3, 4))), "world_mat_i must be 9x4x4"),
    "NaN": (_set("world_mat_4", (0, 3), np.nan), "world_mat_i must be 9x4x4 finite"),
    "zeros": (_set("world_mat_5", slice(None), 0), "not usable (LinAlgError: Singular"),
    "skew": (_cameras(lambda c: c["world_mat_6"].__iadd__(0.1 * c["world_mat_6"][[1, 0, 2, 3]])),
             "skew"),
    "uneven": (_set("scale_mat_7", (1, 1), 51), "scale_mat_i must be [s I"),
    "mirrored": (_scale(-50), "scale_mat_i must be [s I"),
    "another shift": (_set("scale_mat_7", (0, 3), 11), "scale_mat_i must be [s I"),
    "cut archive": (change_file("cameras.npz", lambda old: old[:3000]), "cameras.npz: not usable"),
    "no folder": (lambda f: (f / "image").rename(f / "rgb"), "image: 0 PNG or JPG files, but 9"),
    "one more": (_picture("image/000009.png", 6, 8, 3), "image: 10 PNG or JPG files, but 9"),
    "image of another size": (_picture("image/000003.png", 6, 9, 3), "000003.png: not 8x6"),
    "mask gone": (change_file("mask/003.png"), "mask: 8 PNG or JPG files"),
    "reduced without its cameras": (
        lambda f: [_picture(file.relative_to(f), 3, 4, 3)(f) for file in f.glob("*/*.png")],
        "principal point (4.7, 3.1) in pictures of 4x3", "9x6"),
}
LAYOUTS = {"blender": (write_scene, MALFORMED_BLENDER), "llff": (write_llff, MALFORMED_LLFF),
           "dtu": (write_dtu, MALFORMED_DTU)}


@pytest.mark.parametrize("layout, what", [(layout, what) for layout in LAYOUTS
                                          for what in LAYOUTS[layout][1]])
def test_malformed_scene_is_one_line_that_names_it(tmp_path, layout, what):
    write, table = LAYOUTS[layout]
    harm, *words = table[what]
    write(tmp_path / "scene")
    harm(tmp_path / "scene")
    refused(tmp_path / "scene", *words)


# ------------------------------------------------------------------------------------- real data

def test_real_lego():
    data = Path(real("nerf_synthetic/lego"))
    scene = common.load_scene("lego", data, size=100)
    assert scene.train.images.shape == (100, 100, 100, 3)
    assert scene.test.images.shape == (25, 100, 100, 3) and (scene.near, scene.far) == (2, 6)
    image = iio.imread(data / "nerf_synthetic/lego/train/r_7.png").astype(np.float64) / 255
    expected = image[..., :3] * image[..., 3:] + 1 - image[..., 3:]
    expected = expected.reshape(100, 8, 100, 8, 3).mean((1, 3))
    assert np.abs(scene.train.images[7].numpy() - expected).max() < 1e-5


def test_real_fern():
    scene = common.load_scene("fern", real("nerf_llff_data/fern"), size=126)
    assert len(scene.train.names) == 17 and len(scene.test.names) == 3
    for v in range(17):                         # from the near plane to infinity, all is in the box
        o, d = common.view_rays(scene.train, v, True)
        for x in (o, o + ((1 - o[:, 2]) / d[:, 2])[:, None] * d):
            assert (x > scene.aabb[0] - 1e-4).all() and (x < scene.aabb[1] + 1e-4).all()


def test_real_scan24():
    scene = common.load_scene("scan24", real("dtu/scan24"), size=100)
    views = common.join_views(scene.train, scene.test)
    assert len(scene.train.names) == 42 and len(scene.test.names) == 7
    assert views.images.shape == (49, 75, 100, 3) and views.mask.shape == (49, 75, 100)
    # DTU's calibration, for 1600x1200, centres at integers: fx, fy, cx, cy + 0.5
    K = torch.tensor([[2892.33, 0, 823.705], [0, 2883.175, 619.57], [0, 0, 16]])
    assert torch.allclose(views.K * 16, K.expand(49, 3, 3), atol=0.1)
    X = torch.cartesian_prod(*[torch.linspace(-1, 1, 48)] * 3)
    hull = X[X.norm(dim=-1) < 1]                # what all masks leave of the unit sphere
    for mask, K, c2w in zip(views.mask, views.K, views.c2w):
        x, y, z = ((hull - c2w[:, 3]) @ c2w[:, :3]).T
        u, v = K[0, 2] - K[0, 0] * x / z, K[1, 2] + K[1, 1] * y / z
        outside = (u < 0) | (u >= 100) | (v < 0) | (v >= 75)
        seen = mask[v.long().clamp(0, 74), u.long().clamp(0, 99)] > 0.5
        hull = hull[outside | seen]
    assert 0.3 < len(hull) / (4 / 3 * math.pi * 23.5 ** 3) < 0.6    # not if cameras disagreed
