"""What all tests share. Tiny tensors gain nothing from threads, and idle OpenMP threads spin, so
there is one thread here and in the processes that tests start."""
import json
import math
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def save_views(views, paths):
    """Pictures on black, which are colour * alpha, as PNG files with colour and alpha."""
    import common                              # after the line above
    import torch
    for image, alpha, path in zip(views.images, views.alpha[..., None], paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        common.save_png(path, torch.cat([image / alpha.clamp_min(1e-6), alpha], -1))


def write_blender_scene(folder, views_by_split):
    """Files in Blender's layout. views_by_split: split -> Views on black, of one focal length."""
    for split, views in views_by_split.items():
        save_views(views, [folder / f"{name}.png" for name in views.names])
        frames = []
        for name, c2w in zip(views.names, views.c2w.tolist()):
            frames.append({"file_path": f"./{name}", "transform_matrix": [*c2w, [0, 0, 0, 1]]})
        angle = 2 * math.atan(0.5 * views.images.shape[2] / float(views.K[0, 0, 0]))
        meta = {"camera_angle_x": angle, "frames": frames}
        (folder / f"transforms_{split}.json").write_text(json.dumps(meta))


def write_srn_family(folder, views_by_name):
    """Files in the layout of the SRN cars. views_by_name: scene -> Views on black."""
    import torch
    for scene, views in views_by_name.items():
        save_views(views, [folder / scene / "rgb" / f"{name}.png" for name in views.names])
        (folder / scene / "pose").mkdir()
        opencv = views.c2w * torch.tensor([1.0, -1.0, -1.0, 1.0])
        for name, c2w in zip(views.names, opencv.flatten(1).tolist()):
            line = " ".join(map(repr, [*c2w, 0.0, 0.0, 0.0, 1.0]))
            (folder / scene / "pose" / f"{name}.txt").write_text(line)
        intrinsics = "525.0 256.0 256.0 0.\n0. 0. 0.\n1.\n512 512\n"
        (folder / scene / "intrinsics.txt").write_text(intrinsics)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """bricks at 24 px as files, 20 training views, 2 test views: loads in a moment, and is what
    a student's own scene would be."""
    import common
    import torch
    folder, scene = tmp_path_factory.mktemp("scenes") / "tiny", {}
    for split, n in (("train", 20), ("val", 2), ("test", 2)):
        views = common.load_bricks(split, 24, torch.zeros(3))
        scene[split] = common.pick_views(views, list(range(n)))
    write_blender_scene(folder, scene)
    return folder


@pytest.fixture(scope="session")
def cars(tmp_path_factory):
    """Four of the built-in cars at 16 px as files, in the layout of the SRN cars."""
    import common
    import torch
    folder = tmp_path_factory.mktemp("families") / "cars_train"
    write_srn_family(folder, {f"car_{seed}": common.load_car(seed, 16, torch.zeros(3), False)
                              for seed in range(4)})
    return folder


def command(script, monkeypatch, capsys, *words):
    """Exit status, stdout and stderr of `python SCRIPT.py WORDS`, run in this process."""
    import common
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, words)])
    status = 0
    try:
        common.cli(script.PRESETS, script.train)
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


def assert_refused(outcome, *named):
    """Status 2, and one line on stderr, without a traceback, that names these words."""
    status, _, complaint = outcome
    assert status == 2, outcome
    assert len(complaint.splitlines()) == 1 and complaint.startswith("error: "), complaint
    assert "Traceback" not in complaint, complaint
    for word in named:
        assert str(word) in complaint, complaint


def real(name):
    """The folder of real data, in which `name` is; a skipped test where it is not."""
    data = os.environ.get("NERF_DATA")
    if not data:
        pytest.skip("NERF_DATA is not set")
    if not (Path(data) / name).is_dir():
        pytest.skip(f"{name} is not under NERF_DATA")
    return data


def close(a, b, **tolerance):
    """True, or the complaint of assert_close, which itself returns None."""
    from torch.testing import assert_close                # after OMP_NUM_THREADS is set
    assert_close(a, b, **tolerance)
    return True


def lines(path):
    """What a file holds whose lines are JSON."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def content(folder):
    """Every file below a folder, with its bytes: equal before and after, nothing was harmed."""
    files = [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


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


def write_llff(folder, n=9, H=12, W=16):
    """A scene in the LLFF layout: cameras on a line, all looking along -z, smooth colours."""
    import imageio.v3 as iio                              # after OMP_NUM_THREADS is set
    import numpy as np
    (folder / "images_4").mkdir(parents=True)
    rows = []
    for v in range(n):
        y, x = np.mgrid[:H, :W]
        image = np.stack([x * 15, y * 20, 0 * x + 100], -1).astype(np.uint8)
        iio.imwrite(folder / "images_4" / f"im{v:03d}.png", image)
        position, hwf = [0.1 * v, 0.0, 0.0], [H * 4, W * 4, 100.0]
        matrix = np.stack([[0, -1.0, 0], [1.0, 0, 0], [0, 0, 1.0], position, hwf], -1)
        rows.append([*matrix.ravel(), 2.0, 50.0])
    np.save(folder / "poses_bounds.npy", np.array(rows))


@pytest.fixture(scope="session")
def stage():
    return "stage"
