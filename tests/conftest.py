"""What all tests share. Tiny tensors gain nothing from threads, and idle OpenMP threads spin, so
there is one thread here and in the processes that tests start."""
import json
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import imageio.v3 as iio  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import common  # noqa: E402


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """bricks at 24 px as Blender's files, 20 training and 2 test views: loads in a moment, and is
    what a student's own scene would be."""
    folder, render = tmp_path_factory.mktemp("scenes") / "tiny", common.render
    for split, n in (("train", 20), ("test", 2)):
        with pytest.MonkeyPatch.context() as patch:         # the first n of its cameras
            patch.setattr(common, "render", lambda shapes, cameras, *more: render(
                shapes, dict([*cameras.items()][:n]), *more))
            views, frames = common.load_bricks(split, 24, torch.zeros(3)), []
        (folder / split).mkdir(parents=True)
        for v, (name, c2w) in enumerate(zip(views.names, views.c2w.tolist())):
            alpha = views.alpha[v, ..., None]               # on black: colour * alpha
            rgba = torch.cat([views.images[v] / alpha.clamp_min(1e-6), alpha], -1)
            common.save_png(folder / f"{name}.png", rgba)
            frames.append({"file_path": f"./{name}", "transform_matrix": [*c2w, [0, 0, 0, 1]]})
        meta = {"camera_angle_x": 0.691111207, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(meta))
    return folder


def write_srn(folder, n=14, H=8, W=8, channels=3, seed=0, stated="512 512", f="525.0 256.0 256.0"):
    """A scene of noise in the layout of the SRN cars -> pixels (n, H, W, channels) and c2w
    (n, 3, 4) with OpenGL axes. Every fourth camera stands below -0.5."""
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


def write_llff(folder, n=9, H=12, W=16, factor=4, focal=lambda v: 100.0, name="im{:03d}.png",
               c2w=None):
    """Cameras on a line, all looking along -z of the world, or `c2w`; smooth colours, where the
    first pixel is the number of the view -> pixels (n, H, W, 3)."""
    (folder / f"images_{factor}").mkdir(parents=True)
    y, x = np.mgrid[:H, :W]
    pixels = np.stack([np.stack([x * 15, y * 20, 0 * x + 100], -1)] * n).astype(np.uint8)
    rows = []
    for v in range(n):
        pixels[v, 0, 0] = v
        iio.imwrite(folder / f"images_{factor}" / name.format(v), pixels[v])
        line = np.column_stack([np.eye(3), [0.1 * v, 10.0, 3.0]])
        right, up, back, position = (line if c2w is None else c2w[v])[:3].T
        matrix = np.stack([-up, right, back, position, [H * factor, W * factor, focal(v)]], -1)
        rows.append([*matrix.ravel(), 2.0, 50.0])       # columns: down, right, backwards
    np.save(folder / "poses_bounds.npy", np.array(rows))
    return pixels



@pytest.fixture(scope="session")
def cars(tmp_path_factory):
    """Four scenes of noise at 16 px in the layout of the SRN cars."""
    folder = tmp_path_factory.mktemp("families") / "cars_train"
    for seed in range(4):
        write_srn(folder / f"car_{seed}", H=16, W=16, seed=seed)
    return folder


def change_file(pattern, change=None):
    """A mutation of a folder: change(bytes) of these files; None: they are gone."""
    def mutate(folder):
        for path in [*folder.glob(pattern)]:
            old = path.read_bytes()
            path.unlink()
            if change:
                path.write_bytes(change(old))
    return mutate


def assert_malformed(load, folder, *words):
    """load() says in one line what is wrong in this folder; nothing is harmed."""
    before = content(folder)
    with pytest.raises(common.UserError) as error:
        load()
    line = str(error.value)
    assert all(word in line for word in (str(folder), *words)) and "\n" not in line, line
    assert content(folder) == before


def real(name):
    """The folder of real data, in which `name` is; a skipped test where it is not."""
    data = os.environ.get("NERF_DATA")
    if not data or not (Path(data) / name).is_dir():
        pytest.skip(f"{name} is not under NERF_DATA")
    return data


# ------------------------------------------------------------------- runs and what they leave

def command(script, monkeypatch, capsys, *words):
    """Exit status, stdout and stderr of `python SCRIPT.py WORDS`, run in this process."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    status = 0
    try:
        common.cli(script.PRESETS, script.train)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def words_of(flags):
    """The command line that gives these flags (name -> value); None: not given."""
    words = []
    for name, value in flags.items():
        flag = name.replace("_", "-")
        if value is None or name == "preset":
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, tuple):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    return words


def assert_refused(outcome, *named):
    """Status 2, and one line on stderr, without a traceback, that names these words."""
    status, _, complaint = outcome
    assert status == 2, outcome
    assert len(complaint.splitlines()) == 1 and complaint.startswith("error: "), complaint
    for word in named:
        assert str(word) in complaint, complaint


def close(a, b, **tolerance):
    """True, or the complaint of assert_close, which itself returns None."""
    torch.testing.assert_close(a, b, **tolerance)
    return True


def lines(path):
    """What a file holds whose lines are JSON."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def content(folder):
    """Every file below a folder, with its bytes: equal before and after, nothing was harmed."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}
