"""Videos from disk in common.py: films, frame folders, CMU Panoptic. Real data: NERF_DATA=..."""
import json
import subprocess

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import common
from common import UserError
from conftest import assert_malformed, change_file, real


def project(points, K, c2w):
    """Pixel coordinates (N, 2) and depth along the axis (N,) of world points (N, 3)."""
    x, y, z = ((points - c2w[:, 3]) @ c2w[:, :3]).unbind(-1)
    return torch.stack([K[0, 2] - K[0, 0] * x / z, K[1, 2] + K[1, 1] * y / z], -1), -z


def refused(path, *named):
    def load():
        video = common.load_video(str(path), ".")
        video.read(0)
        video.read(1)
    assert_malformed(load, path, *named)


@pytest.fixture(scope="module")
def film():
    """stage at 32 px and its first 6 frames."""
    video = common.load_video("stage", "no such folder", 32, 6)
    return video, [video.read(t) for t in range(6)]


def write_n3dv(video, folder, frames):
    """A film a camera, and poses_bounds.npy -> the order of the cameras: video.test[0] is first."""
    folder.mkdir(parents=True)
    first = video.test[0]
    order = [first] + [v for v in range(len(video.names)) if v != first]
    views, rows = [video.read(t) for t in range(frames)], []
    for i, v in enumerate(order):
        pixels = np.stack([(view.images[v].numpy() * 255).round().astype(np.uint8)
                           for view in views])
        iio.imwrite(folder / f"cam{i:02d}.mp4", pixels, fps=25, codec="libx264",
                    macro_block_size=1, pixelformat="yuv444p", output_params=["-crf", "6"])
        _, d = common.view_rays(views[0], v, False)
        ahead = -(d @ video.c2w[v, :, 2])
        z = torch.cat([view.depth[v].flatten() * ahead for view in views])
        right, up, back, position = video.c2w[v].double().numpy().T
        hwf = [video.H, video.W, float(video.K[v, 0, 0])]
        matrix = np.stack([-up, right, back, position, hwf], -1)
        rows.append([*matrix.ravel(), float(z[z > 0].min()), float(z.max())])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return order


@pytest.fixture(scope="module")
def clip(tmp_path_factory, film):
    folder = tmp_path_factory.mktemp("data") / "n3dv" / "clip"
    return folder, write_n3dv(film[0], folder, 6)


@pytest.fixture
def short(clip, tmp_path):
    """The first three cameras of the clip, in a folder of their own."""
    folder = tmp_path / "short"
    folder.mkdir()
    for v in range(3):
        (folder / f"cam{v:02d}.mp4").write_bytes((clip[0] / f"cam{v:02d}.mp4").read_bytes())
    np.save(folder / "poses_bounds.npy", np.load(clip[0] / "poses_bounds.npy")[:3])
    return folder


def to_frame_folders(folder):
    """Films -> 0000/images/cam00.png, 0001/..., as StreamRF prepares them."""
    for film in sorted(folder.glob("cam*")):
        for t, frame in enumerate(iio.imread(film)):
            images = folder / f"{t:04d}" / "images"
            images.mkdir(parents=True, exist_ok=True)
            iio.imwrite(images / f"{film.stem}.png", frame)
        film.unlink()


def test_films_round_trip(clip, film):
    (folder, order), (source, views) = clip, film
    video = common.load_video("clip", folder.parents[1])
    assert (video.kind, video.name, video.frames, video.fps) == ("n3dv", "clip", 6, 25.0)
    assert video.ndc and video.test == [0] and video.train == list(range(1, 14))
    assert video.names == [f"cam{v:02d}" for v in range(14)]
    assert torch.allclose(video.K, source.K[order])
    for t in range(6):
        view = video.read(t)
        difference = (view.images - views[t].images[order]).abs()
        assert difference.mean() < 0.01 and difference.amax() < 0.2, t
        assert view.depth is None and view.mask is None and view.names == video.names
    # Up to a shift, a turn and a scale the cameras are the same: seen from i, j looks the same.
    rows = np.load(folder / "poses_bounds.npy")
    scale = 1 / (0.75 * rows[:, 15:].min())
    for i in range(14):
        one, two = source.c2w[order].double(), video.c2w.double()
        (Ri, pi), (Si, qi) = ((c2w[i, :, :3], c2w[i, :, 3]) for c2w in (one, two))
        assert torch.allclose(Ri.T @ one[:, :, :3], Si.T @ two[:, :, :3], atol=1e-5)
        moved = scale * (one[:, :, 3] - pi) @ Ri
        assert torch.allclose(moved, (two[:, :, 3] - qi) @ Si, atol=1e-5)
    assert torch.allclose(video.c2w[:, :, 3].mean(0), torch.zeros(3), atol=1e-5)


def test_films_shrink_like_pictures(short):
    full = common.load_video(str(short), ".")
    half = common.load_video(str(short), ".", size=16, frames=2)
    assert (half.H, half.W, half.frames) == (16, 16, 2)
    assert torch.allclose(half.K[:, :2], full.K[:, :2] / 2)
    mean = full.read(1).images.reshape(3, 16, 2, 16, 2, 3).mean((2, 4))
    assert torch.allclose(half.read(1).images, mean, atol=1e-5)
    with pytest.raises(UserError, match="--size 33 must be 1 to"):
        common.load_video(str(short), ".", size=33)


def test_films_are_decoded_in_order_and_let_go(short, monkeypatch):
    started, start = [], subprocess.Popen

    def counted(words, **options):
        started.append(start(words, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", counted)
    video = common.load_video(str(short), ".")
    first = len(started)
    pictures = [video.read(t).images for t in range(4)]
    assert torch.equal(video.read(3).images, pictures[3]) and len(started) == first
    assert torch.equal(video.read(1).images, pictures[1]) and len(started) == first + 3     # back
    assert torch.equal(video.read(3).images, pictures[3]) and len(started) == first + 3     # ahead
    del video                                   # nobody can ask any more
    for process in started:
        process.wait(timeout=10)


@pytest.mark.parametrize("name", ["cam_{}.mp4", "cam{}.MP4", "cam_{:02d}.mov"])
def test_names_of_films(short, name):
    """By number: cam_10 comes after cam_9. What macOS leaves beside them is no film."""
    wanted = common.load_video(str(short), ".").read(0).images
    for i, film in zip((2, 9, 10), sorted(short.glob("cam*"))):
        film.rename(short / name.format(i))
    (short / f"._{name.format(0)}").write_bytes(b"Mac OS X")
    video = common.load_video(str(short), ".")
    assert video.names == [name.rpartition(".")[0].format(i) for i in (2, 9, 10)]
    assert torch.equal(video.read(0).images, wanted)


@pytest.mark.parametrize("poses_in_frames", [False, True])
def test_frame_folders(short, poses_in_frames):
    wanted = common.load_video(str(short), ".", size=16)
    pictures = [wanted.read(t).images for t in range(6)]
    to_frame_folders(short)
    (short / "0003/images/._cam00.png").write_bytes(b"Mac OS X")
    if poses_in_frames:
        for frame in short.glob("0*"):
            (frame / "poses_bounds.npy").write_bytes((short / "poses_bounds.npy").read_bytes())
        (short / "poses_bounds.npy").unlink()
    video = common.load_video(str(short), ".", size=16)
    assert (video.kind, video.frames, video.test, video.ndc) == ("n3dv", 6, [0], True)
    assert video.names == ["cam00", "cam01", "cam02"] and torch.equal(video.c2w, wanted.c2w)
    assert torch.equal(video.K, wanted.K)
    for t in (4, 0, 5):
        assert torch.allclose(video.read(t).images, pictures[t], atol=1e-6)
    assert common.load_video(str(short), ".", frames=2).frames == 2


def test_films_of_unequal_length(short, capsys):
    frames = iio.imread(short / "cam01.mp4")[:4]
    iio.imwrite(short / "cam01.mp4", frames, fps=25, macro_block_size=1)
    video = common.load_video(str(short), ".")
    note = capsys.readouterr().err
    assert video.frames == 4 and note.startswith("note: ") and "4 to 6 frames" in note
    video.read(3)
    assert len(note.splitlines()) == 1 and capsys.readouterr().err == ""
    assert [common.load_video(str(short), ".", frames=n).frames for n in (2, 99)] == [2, 4]


def rows(edit):
    """A mutation: edit(array) -> what poses_bounds.npy holds instead."""
    def mutate(folder):
        path = folder / "poses_bounds.npy"
        np.save(path, edit(np.load(path)))
    return mutate


def in_frames(edit):
    """A mutation of frame folders."""
    return lambda folder: (to_frame_folders(folder), edit(folder))


def wide_film(folder):
    pixels = np.zeros((6, 16, 24, 3), np.uint8)
    iio.imwrite(folder / "cam02.mp4", pixels, fps=25, macro_block_size=1)


SMALL = np.zeros((8, 8, 3), np.uint8)
BAD_N3DV = [
    (change_file("poses_bounds.npy"), "poses_bounds.npy: not usable"),
    (rows(lambda a: a[:, :16]), "x17 finite numbers"),
    (rows(lambda a: a[:2]), "3 cameras, but 2 rows in poses_bounds.npy"),
    (rows(lambda a: a * np.where(np.arange(17) == 4, 2, 1)), "turned or cropped"),
    (rows(lambda a: a[:1]), "one camera only"),
    (change_file("cam01.mp4", lambda old: old[:1500]), "cam01.mp4: not usable (EOFError: the film"),
    (wide_film, "all films must have one size"),
    (change_file("*.mp4"), "no camNN.mp4"),
    (in_frames(change_file("0001/images/cam01.png")), "frame 1: 2 cameras, but 3 rows"),
    (in_frames(change_file("poses_bounds.npy")), "0000/poses_bounds.npy: not usable"),
    (in_frames(change_file("0001/images/cam01.png", lambda old: old[:300])), "cam01.png: "),
    (in_frames(lambda f: iio.imwrite(f / "0001/images/cam01.png", SMALL)), "cam01.png: not 32x32"),
    (in_frames(lambda f: [iio.imwrite(p, SMALL) for p in (f / "0001/images").iterdir()]),
     "frame 1 has another size"),
]


@pytest.mark.parametrize("mutate, named", BAD_N3DV)
def test_malformed_n3dv(short, mutate, named):
    mutate(short)
    refused(short, named)


def test_without_ffmpeg(clip, monkeypatch):
    def missing(*_, **__):
        raise ImportError("no imageio-ffmpeg")
    monkeypatch.setattr(common.iio, "imiter", missing)
    refused(clip[0], "pip install 'imageio[ffmpeg]'")


def write_panoptic(folder, T=3, train=(1, 2, 4, 10), test=(0, 3), H=6, W=8):
    """A dome of noise -> pixels[camera] (T, H, W, 3), w2c[camera] (4, 4) in metres, y down."""
    rng, pixels, w2c = np.random.default_rng(0), {}, {}
    for i, cam in enumerate(train + test):
        (folder / "ims" / str(cam)).mkdir(parents=True)
        pixels[cam] = rng.integers(0, 256, (T, H, W, 3), dtype=np.uint8)
        for t in range(T):                      # PNG by content: without loss
            iio.imwrite(folder / f"ims/{cam}/{t:06d}.jpg", pixels[cam][t], extension=".png")
        place = (2.4 * np.cos(i), -1.0 - 0.3 * i, 2.4 * np.sin(i))
        c2w = common.look_at(place, (0, -1, 0), (0, -1, 0))
        R = (c2w[:, :3] * [1, -1, -1]).T
        w2c[cam] = np.vstack([np.c_[R, -R @ c2w[:, 3]], [0, 0, 0, 1]])
    for split, cams, slash in (("train", train, "/"), ("test", test, "\\")):      # as on Windows
        k = [[[10.0 + cam, 0, 4.5], [0, 11.0 + cam, 3.25], [0, 0, 1]] for cam in cams]
        meta = {"w": W, "h": H, "k": [k] * T, "w2c": [[w2c[cam].tolist() for cam in cams]] * T,
                "fn": [[f"{cam}{slash}{t:06d}.jpg" for cam in cams] for t in range(T)]}
        (folder / f"{split}_meta.json").write_text(json.dumps(meta))
    return pixels, w2c


def test_panoptic_with_a_known_answer(tmp_path):
    pixels, w2c = write_panoptic(tmp_path / "panoptic_sports" / "dome")
    video = common.load_video("dome", tmp_path)
    assert (video.kind, video.name, video.frames) == ("panoptic", "dome", 3)
    assert (video.H, video.W, video.ndc) == (6, 8, False)
    assert video.names == ["1", "2", "4", "10", "0", "3"]
    assert video.train == [0, 1, 2, 3] and video.test == [4, 5]
    cameras = [int(name) for name in video.names]
    for t in (2, 0, 1):
        found = (video.read(t).images.numpy() * 255).round().astype(np.uint8)
        assert np.array_equal(found, np.stack([pixels[cam][t] for cam in cameras]))
    world = np.random.default_rng(1).uniform(-1, 1, (20, 3)) * [1, 0.9, 1] - [0, 1, 0]  # y down
    x, y, z = world.T
    ours = torch.tensor(np.stack([x, z, -y - 2.1], -1) / 3, dtype=torch.float32)
    for v, cam in enumerate(cameras):
        x, y, z = (world @ w2c[cam][:3, :3].T + w2c[cam][:3, 3]).T
        uv = np.stack([(10 + cam) * x / z + 4.5, (11 + cam) * y / z + 3.25], -1)
        xy, depth = project(ours, video.K[v], video.c2w[v])
        assert np.allclose(xy, uv, atol=1e-3) and np.allclose(3 * depth, z, atol=1e-5)
        assert torch.linalg.det(video.c2w[v, :, :3]) > 0.99
    small = common.load_video("dome", tmp_path, size=4, frames=2)
    assert (small.H, small.W, small.frames) == (3, 4, 2)
    assert torch.allclose(small.K[:, :2], video.K[:, :2] / 2)


def meta(edit):
    """A mutation: edit(content) of train_meta.json."""
    def mutate(folder):
        path = folder / "train_meta.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content), encoding="utf-8-sig")      # with a byte-order mark
    return mutate


def put(key, where, change):
    """A mutation: meta[key][where] becomes change(old)."""
    def edit(content):
        array = np.array(content[key], object)
        array[where] = change(array[where])
        content[key] = array.tolist()
    return meta(edit)


ALL = slice(None)
BAD_PANOPTIC = [
    (meta(lambda m: m.pop("w2c")), "w2c must be"),
    (meta(lambda m: m.pop("h")), "w, h must be"),
    (meta(lambda m: m.pop("fn")), "KeyError: 'fn'"),
    (put("k", (0, 0, 0, 0), lambda _: "wide"), "k must be 3x4x3x3 finite numbers"),
    (put("w2c", (1, 2, 0, 3), lambda _: float("nan")), "w2c must be 3x4x4x4 finite numbers"),
    (put("k", (ALL, 1, 0, 0), lambda _: 0), "focal lengths be positive"),
    (put("w2c", (2, 1, 0, 3), lambda x: x + 0.5), "cameras must stand still"),
    (put("w2c", (ALL, 0, 0, 0), lambda _: 2.0), "w2c is not a rotation"),
    (meta(lambda m: [m[key].pop() for key in ("fn", "k", "w2c")]), "as many frames as train_meta"),
    (put("w2c", (ALL, ALL, slice(3), 3), lambda x: x * 1000), "w2c must be in metres"),
    (meta(lambda m: m.update(w=6, h=8)), "turned or cropped"),
    (change_file("test_meta.json"), "test_meta.json: not usable"),
    (change_file("train_meta.json"), "train_meta.json in it: not a video"),
    (change_file("train_meta.json", lambda _: b"{"), "train_meta.json: not usable"),
    (change_file("ims/4/000001.jpg"), "ims/4/000001.jpg: not usable"),
    (lambda f: iio.imwrite(f / "ims/2/000001.jpg", SMALL), "2/000001.jpg: not 8x6 px"),
]


@pytest.mark.parametrize("mutate, named", BAD_PANOPTIC)
def test_malformed_panoptic(tmp_path, mutate, named):
    write_panoptic(tmp_path / "dome")
    mutate(tmp_path / "dome")
    refused(tmp_path / "dome", named)


def test_real_basketball():
    video = common.load_video("basketball", real("panoptic_sports/basketball"), size=320)
    assert video.frames == 30 and video.c2w.shape == (31, 3, 4)
    assert [video.names[v] for v in video.test] == ["0", "10", "15", "30"]
    assert video.read(7).images.shape == (31, 180, 320, 3)
    position, axis = video.c2w[:, :, 3], -video.c2w[:, :, 2]
    centre = torch.tensor([0, 0, (1.355 - 2.1) / 3])
    assert torch.allclose((position - centre).norm(dim=-1) * 3, torch.tensor(2.75), atol=0.06)
    assert (position > video.aabb[0]).all() and (position < video.aabb[1]).all()
    assert (((centre - position) * axis).sum(-1) > 0.7).all()       # they look inwards


def test_look_up(tmp_path, capsys):
    write_panoptic(tmp_path / "panoptic_sports" / "mine")
    (tmp_path / "empty").mkdir()
    for name, named in (("minee", "mine.*stage"), ("", "not found"), ("bricks", "not found"),
                        ("lego", "not found"), ("empty", "empty: no camNN.mp4")):
        with pytest.raises(UserError, match=named):
            common.load_video(name, tmp_path)
    capsys.readouterr()
    for name in ("n3dv/flame_salmon_1", "meetroom/discussion", "panoptic_sports/basketball"):
        video = common.load_video(name.partition("/")[2], tmp_path, 16, 2)
        message = capsys.readouterr().err
        assert (video.kind, video.name, video.frames) == ("builtin", "stage", 2)
        assert str((tmp_path / name).parent) in message and "'stage' INSTEAD" in message
    assert common.load_video("mine", tmp_path).kind == "panoptic"
    assert capsys.readouterr().err == ""
