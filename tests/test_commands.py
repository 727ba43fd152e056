"""python common.py compare and download."""
import http.server
import io
import json
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tyro

import common
from conftest import ROOT, content
from common import UserError


def fake_run(folder, rows, **summary):
    """A finished run; rows: (step, train_seconds, psnr, rays, samples), the last two may lack."""
    folder.mkdir()
    names = "step", "train_seconds", "psnr", "rays", "samples"
    lines = [json.dumps(dict(zip(names, row))) + "\n" for row in rows]
    lines.append('{"step": 7, "loss": 0.5}\n')                          # not an evaluation
    (folder / "metrics.jsonl").write_text("".join(lines))
    summary = {"method": "one", "scene": "lego", "data": "blender", "size": 2, **summary}
    (folder / "summary.json").write_text(json.dumps(summary))


def call(folder, *words):
    """Cells of the table that the command prints, row by row."""
    done = subprocess.run([sys.executable, str(ROOT / "common.py"), "compare", *words], cwd=folder,
                          capture_output=True, text=True, check=True)
    rows = done.stdout.splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_compare(tmp_path):
    """b goes from 21 to 27 dB in 10 steps: it reaches a's 25 dB after 16.7 steps and 3.3 s."""
    fake_run(tmp_path / "a", [(10, 1.0, 20.0), (20, 3.0, 24.0), (30, 5.0, 25.0)], steps=30,
             train_seconds=5.0, psnr=25.0, ssim=0.9)
    fake_run(tmp_path / "b", [(10, 2.0, 21.0), (20, 4.0, 27.0)], method="two")
    fake_run(tmp_path / "none", [])
    rows = call(tmp_path, "a", "b", "none")
    assert rows[0] == ["run", "seeds", "method", "scene", "data", "size", "steps", "train_seconds",
                       "peak_memory_mb", "psnr", "ssim", "step to 25.00 dB",
                       "train_seconds to 25.00 dB"]
    assert rows[2:] == [["a", "1", "one", "lego", "blender", "2", "30", "5.0", "-", "25.00",
                         "0.9000", "30.0", "5.0"],
                        ["b", "1", "two", "lego", "blender", "2", *"-----", "16.7", "3.3"],
                        ["none", "1", "one", "lego", "blender", "2", *"-------"]]
    assert call(tmp_path, "none", "a")[0][-1] == "ssim"                 # no PSNR to reach


def test_compare_takes_seeds_together_and_draws_their_curves(tmp_path):
    """base ends at 24 and 26 dB after 30 steps and 6 s; the three runs of fast reach the mean of
    these, 25 dB, at steps 10, 15 and never, with 1 s for 10 steps."""
    for name, per_10, values, data in (
            ("base-s0", 2, (20, 22, 24), "blender"), ("base-s1", 2, (20, 22, 26), "blender"),
            ("fast-s0", 1, (25, 27), "blender"), ("fast-s1", 1, (23, 27), "builtin"),
            ("fast-s2", 1, (21, 24), "builtin"), ("o<&-s4", 1, (19, 20), "blender")):
        rows = [(10 * i, per_10 * i, value, i) for i, value in enumerate(values, 1)]
        fake_run(tmp_path / name, rows, psnr=values[-1], data=data)
    names = [path.name for path in sorted(tmp_path.iterdir())]
    rows = call(tmp_path, *names, "--curves", "c.svg")
    assert [row[:2] + row[4:5] + row[-4:] for row in rows[2:]] == [
        ["base", "2", "blender", "25.00 ± 1.41", "-", "27.5 (1 of 2)", "5.5 (1 of 2)"],
        ["fast", "3", "blender / builtin", "26.00 ± 1.73", "-", "12.5 ± 3.5 (2 of 3)",
         "1.2 ± 0.4 (2 of 3)"], ["o<&", "1", "blender", "20.00", "-", "-", "-"]]
    root, svg = ET.parse(tmp_path / "c.svg").getroot(), "{http://www.w3.org/2000/svg}"
    panels, legend = root.findall(svg + "g"), root.findall(svg + "text")
    assert [node.text for node in legend] == ["base", "fast", "o<&"]
    texts = [[node.text for node in panel.findall(svg + "text")] for panel in panels]
    costs = ["step", "rays", "train_seconds"]                           # samples: not logged
    assert [text[0] for text in texts] == [f"held-out PSNR [dB] against {cost}" for cost in costs]
    assert texts[0][1:] == ["10", "19", "20", "23", "30", "27"]         # x, y of three ticks
    curves = [(node.get("stroke"), node.get("points")) for node in panels[0].iter(svg + "polyline")]
    colours = [node.get("fill") for node in legend]
    assert [colours.index(stroke) for stroke, _ in curves] == [0, 0, 1, 1, 1, 2]
    assert curves[0][1] == "0.0,148.8 95.0,106.2 190.0,63.8" and len(set(colours)) == 3


def test_compare_refuses(tmp_path):
    fake_run(tmp_path / "a", [(10, 1.0, 20.0)], psnr=20.0)
    fake_run(tmp_path / "none", [])
    fake_run(tmp_path / "begun", [])
    (tmp_path / "begun/summary.json").unlink()
    for runs, curves, words in (([], None, "needs a run folder"),
                                ([tmp_path], None, "metrics.jsonl|not usable"),
                                ([tmp_path / "begun"], None, "not finished: go on"),
                                ([tmp_path / "none"], tmp_path / "c.svg", "no evaluations"),
                                ([tmp_path / "a"], tmp_path / "no/c.svg", "choose another file")):
        with pytest.raises(UserError, match=words):
            common.Compare(runs, curves)()


def scene_zip(prefix="", extra=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(prefix + "transforms_train.json", "{}" + " " * 30000)
        archive.writestr(prefix + "train/r_0.png", np.random.default_rng(0).bytes(50000))
        if extra:
            archive.writestr(extra, "x")
    return buffer.getvalue()


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """publish(content): a server gives it as lego.zip, in the place of the mirror."""
    def at(content):
        (tmp_path / "lego.zip").write_bytes(content)

    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setattr(common, "MIRROR", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield at
        server.shutdown()


def refused(words, scene, data):
    """UserError, and nothing half is left."""
    with pytest.raises(UserError, match=words):
        common.Download(scene, data)()
    assert not list(data.glob("nerf_synthetic/*"))


@pytest.mark.parametrize("prefix, extra", [("", None), ("lego/", None), ("other_name/", "readme"),
                                           ("", "../evil"), ("a/", "{}/evil")])
def test_download(tmp_path, publish, prefix, extra):
    data = tmp_path / "a/data"
    publish(scene_zip(prefix, extra and extra.format(tmp_path)))
    common.Download("lego", data)()
    found = content(tmp_path / "a")
    folder = Path("data/nerf_synthetic/lego")
    assert found[folder / "transforms_train.json"].startswith(b"{}")
    assert len(found[folder / "train/r_0.png"]) == 50000
    assert all(folder in path.parents for path in found) and not (tmp_path / "evil").exists()
    with pytest.raises(UserError, match="is there already"):
        common.Download("lego", data)()


@pytest.mark.parametrize("content, words", [
    (b"<html>sorry</html>", "not a zip"), (scene_zip()[:-30000], "not a zip"),
    (scene_zip().replace(b"{}  ", b"{}x "), "CRC"),
    (scene_zip(extra="b/transforms_train.json"), "2 files"),
    (scene_zip().replace(b"transforms_train", b"transforms_trial"), "0 files")])
def test_an_archive_that_is_no_scene(tmp_path, publish, content, words):
    publish(content)
    refused(words, "lego", tmp_path / "data")


def test_download_refuses(tmp_path, publish, monkeypatch):
    publish(scene_zip())
    refused("404", "mic", tmp_path)
    (tmp_path / "file").touch()
    refused("--data", "lego", tmp_path / "file")
    for name in ("../x", "a/b", "", "..", "fern"):
        with pytest.raises(SystemExit):                                 # the command line knows
            tyro.cli(common.Download, args=[name, "--data", str(tmp_path)])
    monkeypatch.setattr(common, "MIRROR", "http://127.0.0.1:9")
    refused("network", "lego", tmp_path)
