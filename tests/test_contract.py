"""What every script on TrainingRun promises, on a few steps of a small scene.

The run object itself is tested on a toy, in test_run.py. Here: that a script gives it all that a
checkpoint must hold, logs what it checks, and leaves nothing to a number that is not restored.
"""
import json
import math
import re
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

import common
import latent_scenes
import infonerf
import continual
import soft_mining
import streamrf
from conftest import ROOT, assert_refused, command, content, lines, words_of


@dataclass
class Method:
    script: ModuleType
    scene: str                      # "tiny", the fixture, or the name of a built-in one
    flags: dict                     # of a run that takes seconds: 6 steps, 3 checkpoints
    files: list[str]                # what the folder holds beyond the files of all runs
    refused: tuple[str, str]        # a flag of its own that makes no sense; what the line says


METHODS = [
    Method(soft_mining, "tiny",
           dict(size=24, steps=6, eval_every=2, eval_views=1, batch="rays", rays=256, lr=1e-2,
                levels=4, log2_table=11, finest=48, march_steps=48),
           ["test_000.png", "test_001.png", "walkers.gif",
            *(f"walkers/00000{step}.png" for step in (2, 4, 6))],
           ("--alpha -1", "--alpha -1.0 must be 0 or more")),
    Method(streamrf, "stage",
           dict(size=24, steps=6, eval_every=2, resolution=(16, 16, 16), first_iterations=40,
                first_rays=256, pilot_iterations=3, iterations=4, rays=128),
           ["stream.srf", "test_000.png", "test_001.png"],
           ("--damp -1", "--damp -1.0 must be 0 or more")),
    Method(latent_scenes, "cars",               # all phases: in test_latent_scenes.py
           dict(representation="rgb", size=16, steps=6, eval_every=2, eval_views=1, scenes=1,
                new_scenes=2, resolution=8, micro=2, macro=2, hidden=8, samples=8, batch=2),
           ["test_000.png", "test_001.png"],
           ("--tv -1", "--tv -1.0 must be 0 or more")),
    Method(infonerf, "tiny",
           dict(size=24, steps=6, eval_every=2, eval_views=1, views=(2, 5, 11, 17), rays=96,
                unseen_rays=64, samples=16, finest=24, lr=1e-2, train_background="scene"),
           ["test_000.png", "test_001.png", "rays.png"],
           ("--views 0 20", "--views 20: tiny has 20 training views")),
    Method(continual, "tiny",
           dict(size=24, stream=True, learner="joint", steps=24, eval_every=2, eval_views=1,
                rays=64, log2_table=11, march_steps=48),
           ["test_000.png", "test_001.png"],
           ("--replay-weight -1", "--replay-weight -1.0 must be 0 or more")),
]
COMMON_FILES = ["args.json", "env.json", "metrics.jsonl", "summary.json", "ckpt.pt"]


@pytest.fixture(scope="module", params=METHODS, ids=lambda method: method.script.__name__)
def method(request, tiny):
    chosen = request.param
    scene = chosen.scene if chosen.scene != "tiny" else str(tiny)
    return replace(chosen, flags={**chosen.flags, "scene": scene, "device": "cpu"})


def train(method, folder, **more):
    flags = {**method.flags, "out": str(folder), **more}
    method.script.train(replace(method.script.Args(), **flags))


@pytest.fixture(scope="module")
def undisturbed(method, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    train(method, folder)
    return folder


def run(method, monkeypatch, capsys, folder, *words):
    """Status, stdout and stderr of the command, in this process."""
    flags = words_of({**method.flags, "out": folder})
    return command(method.script, monkeypatch, capsys, *flags, *words)


def assert_same_run(a, b):
    """Two folders hold the same: all bits of what a checkpoint restores, scores, pictures."""
    parts = [torch.load(folder / "ckpt.pt", weights_only=True)["parts"] for folder in (a, b)]
    assert_close(*parts, rtol=0, atol=0, equal_nan=True)
    results = []
    for folder in (a, b):
        scores = [json.loads((folder / "summary.json").read_text())]
        scores += lines(folder / "metrics.jsonl")
        for values in scores:
            clock = [name for name in values if "seconds" in name]
            values.update(dict.fromkeys(clock, 0), peak_memory_mb=0)
        results.append([scores, *sorted(path.read_bytes() for path in folder.rglob("*.png"))])
    assert results[0] == results[1]


def break_off_and_resume(train, k):
    """train(resume) is broken off right after checkpoint k (from 1), and resumed."""
    write, written = common.write_whole, []

    def write_and_stop(path, how):
        write(path, how)
        if path.name == "ckpt.pt":
            written.append(path)
        if len(written) == k:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "write_whole", write_and_stop)
        train(False)
    torch.manual_seed(99)
    train(True)


def change_log(monkeypatch, change):
    """change(step, values) -> what run.log is told instead."""
    log = common.TrainingRun.log
    monkeypatch.setattr(common.TrainingRun, "log",
                        lambda run, **values: log(run, **change(run.step, values)))


def test_run_folder(method, tmp_path, monkeypatch, capsys):
    status, out, err = run(method, monkeypatch, capsys, tmp_path / "a")
    assert (status, err) == (0, "")
    assert {str(path) for path in content(tmp_path / "a")} == {*COMMON_FILES, *method.files}
    args = json.loads((tmp_path / "a/args.json").read_text())
    given = replace(method.script.Args(), **method.flags, out=str(tmp_path / "a"))
    assert args == common.to_json(asdict(given))
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    curve = lines(tmp_path / "a/metrics.jsonl")
    assert summary["method"] == method.script.__name__ and summary["data"] and summary["steps"] == 6
    assert [line["step"] for line in curve] == [2, 4, 6]
    assert all(a["rays"] < b["rays"] for a, b in zip(curve, curve[1:]))
    assert curve[-1]["psnr"] == summary["psnr"] and f"{summary['psnr']:.2f} dB" in out
    assert out.startswith("step 1/6  loss ")


def test_run_broken_off_at_its_end_is_resumed(method, undisturbed, tmp_path):
    break_off_and_resume(lambda resume: train(method, tmp_path / "a", resume=resume), 3)
    assert_same_run(tmp_path / "a", undisturbed)


KILLED = f"""
import os, runpy, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import common
log = common.TrainingRun.log
def kill(run, **values):
    if run.step == 3: os.kill(os.getpid(), signal.SIGKILL)
    log(run, **values)
common.TrainingRun.log = kill
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def test_killed_run_resumed_ends_bit_equal(method, undisturbed, tmp_path, monkeypatch, capsys):
    words = words_of({**method.flags, "out": tmp_path / "a"})
    done = subprocess.run([sys.executable, "-c", KILLED, method.script.__file__, *words],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")
    assert torch.load(tmp_path / "a/ckpt.pt", weights_only=True)["step"] == 2
    words = "--out", tmp_path / "a", "--resume"
    status, out, _ = command(method.script, monkeypatch, capsys, *words)
    assert status == 0 and out.startswith("step 3/6  loss ")
    assert_same_run(tmp_path / "a", undisturbed)


def test_eval_only_says_the_same_and_harms_nothing(method, undisturbed, monkeypatch, capsys):
    before = content(undisturbed)
    (undisturbed / "test_000.png").unlink()
    (undisturbed / "summary.json").unlink()
    change_log(monkeypatch, None)                            # a training step would fail
    assert run(method, monkeypatch, capsys, undisturbed, "--eval-only")[0] == 0
    after = content(undisturbed)
    summaries = [json.loads(files.pop(Path("summary.json"))) for files in (before, after)]
    assert after == before and summaries[0]["psnr"] == pytest.approx(summaries[1]["psnr"], abs=1e-5)


def test_seed_decides(method, undisturbed, tmp_path):
    train(method, tmp_path / "a")
    assert_same_run(tmp_path / "a", undisturbed)
    train(method, tmp_path / "b", seed=1)
    parts = [torch.load(folder / "ckpt.pt", weights_only=True)["parts"]
             for folder in (undisturbed, tmp_path / "b")]
    a, b = (next(iter(of_stage.values()))["field"] for of_stage in parts)
    tensors = [name for name, value in a.items() if isinstance(value, torch.Tensor)]
    same = [name for name in tensors if torch.equal(a[name], b[name])]
    assert len(same) < len(a) / 2, same


def test_bad_flags_are_one_line(method, tmp_path, monkeypatch, capsys):
    for words, named in (method.refused, ("--bogus 3", "--bogus"), ("--steps 0", "--steps 0"),
                         ("--scene nosuchscene", "nosuchscene"),
                         ("--preset huge", "'quick', 'paper'")):
        assert_refused(run(method, monkeypatch, capsys, tmp_path / "a", *words.split()), named)
    assert not (tmp_path / "a").exists()


def test_occupied_folder(method, undisturbed, monkeypatch, capsys):
    before = content(undisturbed)
    for words, named in (((), "holds a run"), (("--resume", "--seed", 5), "seed was 0, now 5")):
        assert_refused(run(method, monkeypatch, capsys, undisturbed, *words), named)
    assert content(undisturbed) == before


@pytest.mark.parametrize("name, bad, line", [("loss", math.nan, "not finite at step 3"),
                                             ("opacity", 0.0, "field is empty at step 4")])
def test_a_bad_step_keeps_the_last_checkpoint(method, undisturbed, tmp_path, monkeypatch, capsys,
                                              name, bad, line):
    def spoil(step, values):
        return {**values, name: values[name] * bad} if step == 3 else values
    with monkeypatch.context() as patch:
        change_log(patch, spoil)
        outcome = run(method, monkeypatch, capsys, tmp_path / "a")
    assert_refused(outcome, line)
    for flag in re.findall(r"--([a-z-]+)", outcome[2]):      # the advice names flags that exist
        assert hasattr(method.script.Args(), flag.replace("-", "_")), flag
    assert torch.load(tmp_path / "a/ckpt.pt", weights_only=True)["step"] == 2
    assert [line["step"] for line in lines(tmp_path / "a/metrics.jsonl")] == [2]
    train(method, tmp_path / "a", resume=True)
    assert_same_run(tmp_path / "a", undisturbed)
