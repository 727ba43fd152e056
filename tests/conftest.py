"""Tiny tensors gain nothing from threads, and idle OpenMP threads spin: one thread here and in the processes that tests start."""
import json
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """bricks at 24 px as files: 20 training views, 2 test views. Loads in a moment, and is what a student's own scene would be."""
    import common                              # after the line above
    folder = tmp_path_factory.mktemp("scenes") / "tiny"
    common.Bricks(folder, 24)()
    for split, n in (("train", 20), ("val", 2), ("test", 2)):
        path = folder / f"transforms_{split}.json"
        meta = json.loads(path.read_text())
        path.write_text(json.dumps({**meta, "frames": meta["frames"][:n]}))
    return folder


def command(script, monkeypatch, capsys, *words):
    """Exit status, stdout and stderr of `python SCRIPT.py WORDS`, in this process. script: the imported method."""
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
    assert len(complaint.splitlines()) == 1 and complaint.startswith("error: ") and "Traceback" not in complaint, complaint
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
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


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
    """A forward-facing scene in the LLFF layout: cameras on a line, all looking along -z of the world, pictures of smooth colours."""
    import imageio.v3 as iio                              # after OMP_NUM_THREADS is set, which numpy's library reads too
    import numpy as np
    (folder / "images_4").mkdir(parents=True)
    rows = []
    for v in range(n):
        y, x = np.mgrid[:H, :W]
        iio.imwrite(folder / "images_4" / f"im{v:03d}.png", np.stack([x * 15, y * 20, 0 * x + 100], -1).astype(np.uint8))
        matrix = np.stack([[0, -1.0, 0], [1.0, 0, 0], [0, 0, 1.0], [0.1 * v, 0.0, 0.0], [H * 4, W * 4, 100.0]], -1)
        rows.append([*matrix.ravel(), 2.0, 50.0])
    np.save(folder / "poses_bounds.npy", np.array(rows))
