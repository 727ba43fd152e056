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
