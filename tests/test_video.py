"""Video scenes of common.py: the built-in `stage`, N3DV and CMU Panoptic layouts. Real data: NERF_DATA=... (else said to be skipped)."""
import builtins
import json
import sys
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
from common import STAGE_APPEARS, STAGE_FLICKER, UserError  # noqa: E402
from conftest import real  # noqa: E402

THINGS = ("ball", "turning", "appearing", "flicker")


def project(points, K, c2w):
    """Pixel coordinates (N, 2) and depth along the axis (N,) of world points (N, 3)."""
    x, y, z = ((points - c2w[:, 3]) @ c2w[:, :3]).unbind(-1)
    return torch.stack([K[0, 2] - K[0, 0] * x / z, K[1, 2] + K[1, 1] * y / z], -1), -z


def grown(mask):
    """(V, H, W) bool, one pixel wider on all sides."""
    return F.max_pool2d(mask.float()[:, None], 3, 1, 1)[:, 0] > 0


@pytest.fixture(scope="module")
def film():
    """stage at 32 px and its first 8 frames."""
    video = common.load_video("stage", "no such folder", 32, 8)
    return video, [video.read(t) for t in range(8)]


# --------------------------------------------------------------------------------------------------------------- stage

def test_stage_is_what_it_says(film):
    video, views = film
    assert (video.kind, video.name, video.frames, video.H, video.W, video.ndc) == ("builtin", "stage", 8, 32, 32, False)
    assert len(video.names) == 14 and len(video.train) == 12 and sorted(video.train + video.test) == list(range(14))
    assert video.c2w.shape == (14, 3, 4) and video.K.shape == (14, 3, 3) and torch.equal(video.bg, torch.tensor([0.5] * 3))
    for t, view in enumerate(views):
        assert view.images.shape == (14, 32, 32, 3) and view.depth.shape == view.mask.shape == (14, 32, 32) and view.names == video.names
        assert 0 <= view.images.min() and view.images.max() <= 1 and ((view.mask == 0) | (view.mask == 1)).all()
        hit = view.depth > 0
        assert (view.depth[hit] > video.near).all() and (view.depth[hit] < video.far).all()
        for v in range(14):                                             # the room is within the box
            o, d = common.view_rays(view, v, False)
            points = (o + view.depth[v].reshape(-1, 1) * d)[hit[v].flatten()]
            assert (points > video.aabb[0] + 0.03).all() and (points < video.aabb[1] - 0.03).all()
        assert torch.allclose(view.images[~grown(hit)], torch.tensor(0.5))                          # and around it is nothing
    assert common.load_video("stage", ".").frames == 20 and common.load_video("stage", ".").H == 128
    with pytest.raises(UserError, match="frame 8.*0 to 7"):
        video.read(8)
    with pytest.raises(UserError, match="frame -1"):
        video.read(-1)


def test_stage_is_the_same_in_each_run_and_for_any_number_of_frames(film):
    _, views = film
    longer = common.load_video("stage", ".", 32, 30)
    for t in (6, 2):                                                    # in any order
        again = longer.read(t)
        assert all(torch.equal(getattr(again, key), getattr(views[t], key)) for key in ("images", "depth", "mask", "alpha"))
    assert longer.read(29).images.shape == (14, 32, 32, 3)
    dark = common.load_video("stage", ".", 32, 1, bg="black").read(0)   # the background is behind everything, and nothing else
    assert torch.allclose(dark.images + 0.5 * (1 - dark.alpha[..., None]), views[0].images, atol=1e-6)


def test_motion_mask_is_where_pictures_differ(film):
    video, views = film
    for t in range(1, 8):
        change = (views[t].images - views[t - 1].images).abs().amax(-1)
        assert change[views[t].mask == 0].max() <= 1e-4                 # outside nothing changes, and bit for bit, but for shadows that
        assert (change[~grown(views[t].mask > 0)] == 0).float().mean() > 0.9998                                  # graze a surface
        shown = [common.stage_masks(video, s)[what] for s in (t - 1, t) for what in THINGS]
        beside = (views[t].mask > 0) & ~torch.stack(shown).any(0)       # shadows and edges: there something does change
        assert (change[beside] > 1e-4).all()
        assert 0.02 < views[t].mask.mean() < 0.2
        assert views[t].mask[torch.stack(shown).any(0)].all()
        assert (views[t].depth == views[t - 1].depth)[views[t].mask == 0].all()
    first = torch.stack([common.stage_masks(video, 0)[what] for what in THINGS]).any(0)
    assert torch.equal(views[0].mask, first.float())


def test_the_cube_appears(film):
    video, views = film
    before, after = STAGE_APPEARS - 1, STAGE_APPEARS
    shown = common.stage_masks(video, after)["appearing"]
    assert not common.stage_masks(video, before)["appearing"].any() and shown.flatten(1).any(1).all()            # all cameras see it
    assert torch.equal(shown, common.stage_masks(video, after + 2)["appearing"])                                 # and it rests
    nearer = views[after].depth[shown] < views[before].depth[shown].masked_fill(views[before].depth[shown] == 0, 9) - 0.1
    assert nearer.all()                                                 # in the air, away from everything behind it
    assert common.stage(before)["appearing"] == [] and len(common.stage(after)["appearing"]) == 1


def test_the_panel_flickers_and_keeps_its_shape(film):
    video, views = film
    for t in range(1, 8):
        panel = common.stage_masks(video, t)["flicker"] & common.stage_masks(video, t - 1)["flicker"]
        assert panel.flatten(1).any(1).all() and torch.equal(views[t].depth[panel], views[t - 1].depth[panel])
        panel &= ~grown(~panel)                                         # without its rim
        change = (views[t].images - views[t - 1].images)[panel].abs().amax(-1)
        assert (change > 0.3).all() if t % STAGE_FLICKER == 0 else (change < 0.3).float().mean() > 0.9          # (a shadow may pass)


def test_ball_and_crate_move_as_they_should(film):
    video, _ = film
    room = 2.0                                                          # its size
    for t in range(1, 30):
        (a,), (b,) = common.stage(t - 1)["ball"], common.stage(t)["ball"]
        assert room / 64 < np.linalg.norm(np.subtract(a.centre, b.centre)) < room / 40
        assert b.centre[2] - b.half[2] == pytest.approx(-0.88)          # it rolls on the floor
        (a,), (b,) = common.stage(t - 1)["turning"], common.stage(t)["turning"]
        assert a.centre == b.centre and np.allclose(a.rotation.T @ b.rotation, common.turned("z", 6))
        assert repr(common.stage(t)["static"]) == repr(common.stage(0)["static"])
    for t in range(80):                                                 # a whole round, and it runs into nothing
        (ball,) = common.stage(t)["ball"]
        for thing in common.stage(t)["static"][2:] + common.stage(t)["turning"]:
            own = (np.eye(3) if thing.rotation is None else thing.rotation).T @ np.subtract(ball.centre, thing.centre)
            own = own if thing.kind == "box" else np.array([np.hypot(*own[:2]), 0, own[2]])
            aside = abs(own) - thing.half
            assert np.linalg.norm(aside.clip(0)) > 0.15, (t, thing)
    for what in ("ball", "turning"):
        assert not torch.equal(common.stage_masks(video, 0)[what], common.stage_masks(video, 4)[what])


def test_cameras_look_in_and_the_held_out_ones_stand_between_others(film):
    video, _ = film
    centre = torch.tensor([0, 0.1, -0.18])
    position = video.c2w[:, :, 3] - centre
    assert torch.allclose(position.norm(dim=-1), torch.tensor(3.2), atol=1e-5)
    assert torch.allclose(F.normalize(position, dim=-1), video.c2w[:, :, 2], atol=1e-5)                         # they look at it
    azimuth, height = torch.atan2(position[:, 1], position[:, 0]), position[:, 2]
    for v in video.test:
        assert min(video.train) < v < max(video.train) and v - 1 in video.train and v + 1 in video.train
        assert azimuth[v - 1] < azimuth[v] < azimuth[v + 1] and height.min() - 1e-5 <= height[v] <= height.max() + 1e-5
        assert (position[video.train] - position[v]).norm(dim=-1).min() < 1.2


def test_rays_hit_what_stands_there(film):
    video, views = film
    parts = sum(common.stage(7).values(), [])
    (ball,), (cube,) = common.stage(7)["ball"], common.stage(7)["appearing"]
    for thing in (ball, cube):
        centre = torch.tensor(thing.centre, dtype=torch.float32)
        for v in range(14):
            xy, z = project(centre[None], video.K[v], video.c2w[v])
            o, d = common.pixel_rays(xy, video.K[v], video.c2w[v][None])
            distance = (centre - o).norm()
            assert z > 0 and torch.allclose(o + distance * d, centre[None], atol=1e-5)
            _, _, depth = common.raycast([thing], o, d)
            if thing is ball:
                assert depth.item() == pytest.approx(distance.item() - 0.15, abs=1e-4)
            _, _, seen = common.raycast(parts, o, d)
            if seen == depth:                                           # nothing before it: then the picture shows it there
                col, row = xy[0].long().tolist()
                assert abs(views[7].depth[v, row, col] - depth) < 0.1


@pytest.mark.parametrize("flags", [dict(size=0), dict(frames=0), dict(frames=-2), dict(bg="pink")])
def test_impossible_flags(flags):
    with pytest.raises(UserError, match="{}.*{}".format(*next(iter(flags.items()))).replace("bg", "background")):
        common.load_video("stage", ".", **flags)


# ---------------------------------------------------------------------------------------------------------------- N3DV

def write_n3dv(video, folder, frames, name="cam{:02d}.mp4"):
    """A film per camera, and poses_bounds.npy; video.test[0] becomes the first camera, which is held out. -> the order of the cameras."""
    folder.mkdir(parents=True)
    order = [video.test[0]] + [v for v in range(len(video.names)) if v != video.test[0]]
    views = [video.read(t) for t in range(frames)]
    bounds = []
    for v in order:
        o, d = common.view_rays(views[0], v, False)
        z = torch.cat([view.depth[v].flatten() * -(d @ video.c2w[v, :, 2]) for view in views])
        bounds.append([float(z[z > 0].min()), float(z.max())])
    rows = []
    for i, (v, bound) in enumerate(zip(order, bounds)):
        stack = np.stack([common._bytes(view.images[v]) for view in views])
        iio.imwrite(folder / name.format(i), stack, fps=25, codec="libx264", pixelformat="yuv444p", macro_block_size=1,
                    output_params=["-crf", "6"])
        right, up, back, position = video.c2w[v].double().numpy().T
        matrix = np.stack([-up, right, back, position, [video.H, video.W, float(video.K[v, 0, 0])]], -1)
        rows.append([*matrix.ravel(), *bound])
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return order


@pytest.fixture(scope="module")
def clip(tmp_path_factory, film):
    folder = tmp_path_factory.mktemp("data") / "n3dv" / "clip"
    return folder, write_n3dv(film[0], folder, 6)


def copy(clip, tmp_path, cameras=3):
    """The first cameras of the clip, in a folder of their own."""
    folder = tmp_path / "copy"
    folder.mkdir()
    for f in sorted(clip[0].glob("*.mp4"))[:cameras]:
        (folder / f.name).write_bytes(f.read_bytes())
    np.save(folder / "poses_bounds.npy", np.load(clip[0] / "poses_bounds.npy")[:cameras])
    return folder


def test_n3dv_round_trip(clip, film):
    folder, order = clip
    source, views = film
    video = common.load_video("clip", folder.parents[1])
    assert (video.kind, video.name, video.frames, video.fps, video.ndc) == ("n3dv", "clip", 6, 25.0, True)
    assert video.test == [0] and video.train == list(range(1, 14)) and video.names == [f"cam{v:02d}" for v in range(14)]
    assert torch.allclose(video.K, source.K[order])
    for t in range(6):
        view = video.read(t)
        difference = (view.images - views[t].images[order]).abs()
        assert difference.mean() < 0.01 and difference.amax() < 0.2, t
        assert view.depth is None and view.mask is None and view.names == video.names
    # the same cameras up to a shift, a turn and a scale: as seen from camera i, camera j stands and looks the same
    rows = np.load(folder / "poses_bounds.npy")
    scale = 1 / (0.75 * rows[:, 15:].min())
    true, found = source.c2w[order].double(), video.c2w.double()
    turn_a, turn_b = (c2w[:, None, :, :3].mT @ c2w[None, :, :, :3] for c2w in (true, found))
    shift_a, shift_b = (c2w[:, None, :, :3].mT @ (c2w[None, :, :, 3:] - c2w[:, None, :, 3:]) for c2w in (true, found))
    assert torch.allclose(turn_a, turn_b, atol=1e-5) and torch.allclose(scale * shift_a, shift_b, atol=1e-5)
    assert torch.allclose(video.c2w[:, :, 3].mean(0), torch.zeros(3), atol=1e-5)        # the mean camera is the identity
    # what is seen lies within the box, in NDC too
    for v in range(14):
        o, d = common.pixel_rays(common.pixel_grid(32, 32), video.K[v], video.c2w[v].expand(32 * 32, 3, 4))
        depth = views[0].depth[order[v]].flatten()
        x, y, z = (o + scale * depth[:, None] * d)[depth > 0].unbind(-1)
        near_o, near_d = common.view_rays(video.read(0), v, True)
        point = torch.stack([-2 * video.K[v, 0, 0] / 32 * x / z, -2 * video.K[v, 1, 1] / 32 * y / z, 1 + 2 / z], -1)
        assert (point > video.aabb[0]).all() and (point < video.aabb[1]).all()
        near_o, near_d = near_o[depth > 0], near_d[depth > 0]
        along = ((point - near_o) * near_d).sum(-1, keepdim=True)
        assert torch.allclose(near_o + along * near_d, point, atol=1e-4) and (along > video.near).all() and (along < video.far).all()


def test_n3dv_shrinks_like_pictures(clip):
    folder, order = clip
    full, half = common.load_video(str(folder), "."), common.load_video(str(folder), ".", size=16, frames=2)
    assert (half.H, half.W, half.frames) == (16, 16, 2) and torch.allclose(half.K[:, :2], full.K[:, :2] / 2)
    assert torch.allclose(half.read(1).images, full.read(1).images.reshape(14, 16, 2, 16, 2, 3).mean((2, 4)), atol=1e-5)
    with pytest.raises(UserError, match="smaller than --size 33"):
        common.load_video(str(folder), ".", size=33)


def test_films_are_read_a_frame_at_a_time_and_decoders_are_closed(clip, tmp_path, monkeypatch):
    folder, opened, closed, decoded = copy(clip, tmp_path), [], [], []
    real = imageio_ffmpeg.read_frames

    def counted(path, **options):
        opened.append(path)
        try:
            for frame in real(path, **options):
                if isinstance(frame, bytes):
                    decoded.append(path)
                yield frame
        finally:
            closed.append(path)

    monkeypatch.setattr(imageio_ffmpeg, "read_frames", counted)
    video = common.load_video(str(folder), ".")
    assert len(opened) == 3 and not decoded and not closed              # nothing is decoded before it is asked for
    pictures = [video.read(t).images for t in range(4)]
    assert len(opened) == 3 and len(decoded) == 4 * 3
    assert torch.equal(video.read(3).images, pictures[3]) and len(decoded) == 4 * 3                             # the last one is kept
    assert torch.equal(video.read(1).images, pictures[1])               # a jump back
    assert len(opened) == 6 and len(closed) == 3 and len(decoded) == 6 * 3
    assert torch.equal(video.read(3).images, pictures[3]) and len(opened) == 6                                  # a jump ahead
    video.read(4)
    video.read(5)
    assert len(closed) == 6                                             # the end: all are closed
    assert torch.equal(video.read(0).images, pictures[0]) and len(opened) == 9
    del video
    assert len(closed) == 9                                             # nobody can ask any more


def test_cameras_are_sorted_by_their_number(film, tmp_path):
    source, views = film
    order = write_n3dv(source, tmp_path / "meetroom" / "a", 1, name="cam_{}.mp4")
    video = common.load_video("a", tmp_path)
    assert video.names == [f"cam_{i}" for i in range(14)]               # cam_10 comes after cam_9
    assert (video.read(0).images - views[0].images[order]).abs().mean() < 0.01


def test_films_of_unequal_length(clip, tmp_path, capsys):
    folder = copy(clip, tmp_path)
    frames = iio.imread(folder / "cam01.mp4")[:4]
    iio.imwrite(folder / "cam01.mp4", frames, fps=25, macro_block_size=1)
    video = common.load_video(str(folder), ".")
    note = capsys.readouterr().err
    assert video.frames == 4 and len(note.splitlines()) == 1 and "4 to 6 frames" in note
    video.read(3)
    with pytest.raises(UserError, match="frame 4"):
        video.read(4)
    assert capsys.readouterr().err == ""
    assert common.load_video(str(folder), ".", frames=2).frames == 2 and common.load_video(str(folder), ".", frames=99).frames == 4


def rows(edit):
    def harm(folder):
        array = np.load(folder / "poses_bounds.npy")
        np.save(folder / "poses_bounds.npy", edit(array))
    return harm


def _nan(array):
    array[1, 3] = np.nan
    return array


BAD_N3DV = {
    "no poses": (lambda f: (f / "poses_bounds.npy").unlink(), "poses_bounds.npy: not a readable array"),
    "poses of wrong shape": (rows(lambda a: a[:, :16]), "expected (N, 17)"),
    "poses with NaN": (rows(_nan), "finite"),
    "a row too few": (rows(lambda a: a[:2]), "3 videos camNN.mp4, but poses_bounds.npy has 2 rows"),
    "one camera": (lambda f: [(f / "cam01.mp4").unlink(), (f / "cam02.mp4").unlink(), rows(lambda a: a[:1])(f)], "one camera only"),
    "a cut film": (lambda f: (f / "cam01.mp4").write_bytes((f / "cam01.mp4").read_bytes()[:1500]), "cam01.mp4: not a readable video"),
    "no film at all": (lambda f: (f / "cam02.mp4").write_bytes(b""), "cam02.mp4: not a readable video"),
    "another size": (lambda f: iio.imwrite(f / "cam02.mp4", np.zeros((6, 16, 24, 3), np.uint8), fps=25, macro_block_size=1),
                     "24x16 px, but cam00.mp4 has 32x32"),
    "no films": (lambda f: [p.unlink() for p in f.glob("*.mp4")], "no camNN.mp4"),
}


@pytest.mark.parametrize("what", BAD_N3DV)
def test_malformed_n3dv_is_a_user_error_that_names_it(clip, tmp_path, what):
    harm, named = BAD_N3DV[what]
    folder = copy(clip, tmp_path)
    harm(folder)
    with pytest.raises(UserError) as error:
        common.load_video(str(folder), ".")
    assert named in str(error.value) and str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_film_that_ends_early_is_named(clip, tmp_path, monkeypatch):
    folder = copy(clip, tmp_path)
    real, opened = imageio_ffmpeg.read_frames, []

    def cut(path, **options):                                           # the header promises more frames than can be decoded
        opened.append(path)
        for i, frame in enumerate(real(path, **options)):
            if "cam01" in path and i == 3:
                return
            yield frame

    monkeypatch.setattr(imageio_ffmpeg, "read_frames", cut)
    video = common.load_video(str(folder), ".")
    video.read(1)
    with pytest.raises(UserError, match="cam01.mp4: broken at or before frame 2"):
        video.read(2)
    assert video.read(0).images.shape == (3, 32, 32, 3) and len(opened) == 6            # what is whole can still be read


def test_without_ffmpeg(clip, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "imageio_ffmpeg":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=r'pip install "imageio\[ffmpeg\]"'):
        common.load_video(str(clip[0]), ".")


# ------------------------------------------------------------------------------------------------------------ Panoptic

OURS = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]])


def write_panoptic(folder, T=3, train=(1, 2, 4, 10), test=(0, 3), H=6, W=8, edit=None):
    """A dome of noise. -> pixels[camera] (T, H, W, 3), w2c[camera] (4, 4) in metres, y down."""
    rng, pixels, w2c = np.random.default_rng(0), {}, {}
    for i, cam in enumerate(train + test):
        (folder / "ims" / str(cam)).mkdir(parents=True)
        pixels[cam] = rng.integers(0, 256, (T, H, W, 3), dtype=np.uint8)
        for t in range(T):                                              # PNG by content: without loss
            iio.imwrite(folder / f"ims/{cam}/{t:06d}.jpg", pixels[cam][t], extension=".png")
        c2w = common.look_at((2.4 * np.cos(i), -1.0 - 0.3 * i, 2.4 * np.sin(i)), (0, -1, 0), (0, -1, 0))
        R = (c2w[:, :3] * [1, -1, -1]).T
        w2c[cam] = np.vstack([np.c_[R, -R @ c2w[:, 3]], [0, 0, 0, 1]])
    for split, cams in (("train", train), ("test", test)):
        k = lambda cam: [[10.0 + cam, 0, 4.5], [0, 11.0 + cam, 3.25], [0, 0, 1]]
        meta = {"w": W, "h": H, "k": [[k(cam) for cam in cams]] * T, "w2c": [[w2c[cam].tolist() for cam in cams]] * T,
                "fn": [[f"{cam}/{t:06d}.jpg" for cam in cams] for t in range(T)], "cam_id": [list(cams)] * T}
        if edit:
            meta = json.loads(json.dumps(meta))                         # no two frames share a list
            edit(split, meta)
        (folder / f"{split}_meta.json").write_text(json.dumps(meta))
    return pixels, w2c


def test_panoptic_with_a_known_answer(tmp_path):
    pixels, w2c = write_panoptic(tmp_path / "panoptic_sports" / "dome")
    video = common.load_video("dome", tmp_path)
    assert (video.kind, video.name, video.frames, video.H, video.W, video.ndc) == ("panoptic", "dome", 3, 6, 8, False)
    assert video.names == ["1", "2", "4", "10", "0", "3"] and video.train == [0, 1, 2, 3] and video.test == [4, 5]
    for t in (2, 0, 1):
        view = video.read(t)
        assert np.array_equal((view.images.numpy() * 255).round().astype(np.uint8), np.stack([pixels[int(cam)][t] for cam in video.names]))
    world = np.random.default_rng(1).uniform(-1, 1, (20, 3)) * [1, 0.9, 1] - [0, 1, 0]                          # metres, y down
    ours = torch.tensor((world @ OURS.T - [0, 0, 2.1]) / 3, dtype=torch.float32)
    for v, cam in enumerate(map(int, video.names)):
        camera = world @ w2c[cam][:3, :3].T + w2c[cam][:3, 3]
        uv = np.stack([(10 + cam) * camera[:, 0] / camera[:, 2] + 4.5, (11 + cam) * camera[:, 1] / camera[:, 2] + 3.25], -1)
        xy, depth = project(ours, video.K[v], video.c2w[v])
        assert np.allclose(xy, uv, atol=1e-3) and np.allclose(3 * depth, camera[:, 2], atol=1e-5)
        assert torch.linalg.det(video.c2w[v, :, :3]) > 0.99
    small = common.load_video("dome", tmp_path, size=4, frames=2)
    assert (small.H, small.W, small.frames) == (3, 4, 2) and torch.allclose(small.K[:, :2], video.K[:, :2] / 2)
    with pytest.raises(UserError, match="frame 2"):
        small.read(2)


def _pano(change):
    return lambda folder: write_panoptic(folder, edit=lambda split, meta: change(meta) if split == "train" else None)


def _then(harm):
    return lambda folder: (write_panoptic(folder), harm(folder))


def _set(*path, value):
    def change(meta):
        for key in path[:-1]:
            meta = meta[key]
        meta[path[-1]] = value
    return change


BAD_PANOPTIC = {
    "no test meta": (_then(lambda f: (f / "test_meta.json").unlink()), "test_meta.json: cannot be read"),
    "no train meta": (_then(lambda f: (f / "train_meta.json").unlink()), "train_meta.json: cannot be read"),
    "not JSON": (_then(lambda f: (f / "train_meta.json").write_text("{")), "not a usable meta file"),
    "no w2c": (_pano(lambda m: m.pop("w2c")), "KeyError: 'w2c'"),
    "ragged k": (_pano(lambda m: m["k"].pop()), "must be one a frame and camera"),
    "no camera": (_pano(lambda m: m.update(fn=[[]] * 3)), "must be one a frame and camera"),
    "words": (_pano(_set("k", 0, 0, 0, 0, value="wide")), "not a usable meta file"),
    "NaN": (_pano(_set("w2c", 0, 1, 2, 3, value=float("nan"))), "finite"),
    "focal length 0": (_pano(lambda m: [k.__setitem__(0, [0, 0, 4]) for row in m["k"] for k in row]), "positive"),
    "moving camera": (_pano(_set("w2c", 2, 1, 0, 3, value=0.5)), "cameras must stand still"),
    "cameras change places": (_pano(_set("cam_id", 1, value=[2, 1, 4, 10])), "cameras must stand still"),
    "fewer frames": (_pano(lambda m: [m[key].pop() for key in ("fn", "k", "w2c", "cam_id")]), "3 frames, but train_meta.json has 2"),
    "mirrored": (_pano(lambda m: [w.__setitem__(0, [2 * x for x in w[0]]) for row in m["w2c"] for w in row]), "not a rotation"),
    "millimetres": (_pano(lambda m: [w[i].__setitem__(3, 1000 * w[i][3]) for row in m["w2c"] for w in row for i in range(3)]), "metres"),
    "a picture gone": (_then(lambda f: (f / "ims/4/000001.jpg").unlink()), "ims/4/000001.jpg: image not found"),
}


@pytest.mark.parametrize("what", BAD_PANOPTIC)
def test_malformed_panoptic_is_a_user_error_that_names_it(tmp_path, what):
    make, named = BAD_PANOPTIC[what]
    make(tmp_path / "dome")
    with pytest.raises(UserError) as error:
        common.load_video(str(tmp_path / "dome"), tmp_path)
    assert named in str(error.value) and str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_panoptic_pictures_of_unequal_size_or_broken(tmp_path):
    write_panoptic(tmp_path / "dome")
    iio.imwrite(tmp_path / "dome/ims/2/000001.jpg", np.zeros((3, 4, 3), np.uint8))
    (tmp_path / "dome/ims/2/000002.jpg").write_bytes(b"no picture")
    video = common.load_video(str(tmp_path / "dome"), ".")
    video.read(0)                                                       # pictures are looked at one frame at a time
    with pytest.raises(UserError, match="000001.jpg: 4x3 px, but 000001.jpg has 8x6"):
        video.read(1)
    with pytest.raises(UserError, match="000002.jpg: not a readable image"):
        video.read(2)


def test_real_basketball():
    data = real("panoptic_sports/basketball")
    video = common.load_video("basketball", data, size=320)
    assert video.frames == 30 and video.c2w.shape == (31, 3, 4) and [video.names[v] for v in video.test] == ["0", "10", "15", "30"]
    image = video.read(7).images
    assert image.shape == (31, 180, 320, 3)
    position = video.c2w[:, :, 3]
    centre = torch.tensor([0, 0, (1.355 - 2.1) / 3])
    assert torch.allclose((position - centre).norm(dim=-1) * 3, torch.tensor(2.75), atol=0.06)                  # on the dome
    assert (position > video.aabb[0]).all() and (position < video.aabb[1]).all()
    assert (((centre - position) * -video.c2w[:, :, 2]).sum(-1) > 0.7).all()                                    # and look inwards
    floor = torch.tensor([0.0, 0, -0.7])
    assert sum(project(floor[None], video.K[v], video.c2w[v])[1] > 0 for v in range(31)) == 31
    # a camera sees the lenses of others: black dots on the wall, just where those cameras stand
    darker = []
    for v in range(31):
        xy, depth = project(position, video.K[v], video.c2w[v])
        for x, y in xy[(depth > 0.5) & (xy > 12).all(-1) & (xy < torch.tensor([308.0, 168.0])).all(-1)].long().tolist():
            dot, around = image[v, y - 1:y + 2, x - 1:x + 2].mean(), image[v, y - 8:y + 9, x - 8:x + 9].flatten(0, 1).mean(-1).median()
            darker.append(float(around - dot))
    assert len(darker) > 100 and np.mean(np.array(darker) > 0.1) > 0.7, (len(darker), np.mean(np.array(darker) > 0.1))


# ------------------------------------------------------------------------------------------------------ look-up, paths

def test_look_up(tmp_path, capsys):
    write_panoptic(tmp_path / "panoptic_sports" / "mine")
    with pytest.raises(UserError, match="mine.*stage"):
        common.load_video("minee", tmp_path)
    for name in ("", "bricks", "lego"):
        with pytest.raises(UserError, match="not found"):
            common.load_video(name, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty: no camNN.mp4"):
        common.load_video("empty", tmp_path)
    for name in ("stage", "flame_salmon_1", "basketball"):              # and the other way round
        with pytest.raises(UserError, match="is a video"):
            common.load_scene(name, tmp_path)
    capsys.readouterr()
    for name, place in (("flame_salmon_1", "n3dv"), ("discussion", "meetroom"), ("basketball", "panoptic_sports")):
        video = common.load_video(name, tmp_path, 16, 2)
        message = capsys.readouterr().err
        assert (video.kind, video.name, video.frames) == ("builtin", "stage", 2)
        assert str(tmp_path / place / name) in message and "'stage' INSTEAD" in message and len(message.splitlines()) >= 3
    assert common.load_video("mine", tmp_path).kind == "panoptic" and capsys.readouterr().err == ""


def test_free_path(clip, film, tmp_path):
    write_panoptic(tmp_path / "dome")
    for video in (film[0], common.load_video(str(clip[0]), "."), common.load_video(str(tmp_path / "dome"), ".")):
        path = common.free_path(video.c2w, video.ndc, 40)
        position, there = path[:, :, 3], video.c2w[:, :, 3]
        assert path.shape == (40, 3, 4) and torch.allclose(path[:, :, :3].mT @ path[:, :, :3], torch.eye(3).expand(40, 3, 3), atol=1e-5)
        step = (position - position.roll(1, 0)).norm(dim=-1)
        assert 0 < step.min() and step.max() < 3 * step.median()       # smooth and closed
        assert (position >= there.amin(0) - 0.3).all() and (position <= there.amax(0) + 0.3).all()
        middle = torch.tensor([0, 0, -4.0]) if video.ndc else video.aabb.mean(0)
        assert ((F.normalize(middle - position, dim=-1) * -path[:, :, 2]).sum(-1) > 0.8).all()
    dome = common.free_path(video.c2w, video.ndc, 8)[:, :, 3]
    assert torch.allclose(dome[:, 2], video.c2w[:, 2, 3].mean().expand(8))
