"""The command line and the run folder of common.py: what all methods promise, on a toy method."""
import contextlib
import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, Optional

import numpy as np
import pytest
import torch

import common
from common import RunArgs, TrainingRun, UserError, check_flags
from conftest import ROOT, assert_refused, content, lines


@dataclass
class Args(RunArgs):
    """A toy: y = w x + b, fitted to the sum of x."""
    device: str = "cpu"
    size: int = 16
    steps: int = 12
    eval_every: int = 5
    lr: float = 0.1
    """Adam's learning rate."""
    rates: tuple[float, float] = (1.0, 2.0)
    names: Optional[tuple[Literal["a", "b"], ...]] = None
    dither: bool = True


def train(args, at_step=lambda step, loss: loss, opacity=0.5, score=0.5, calls=None, scene="line"):
    """at_step(step, loss) -> loss: what a test does in the middle of a step."""
    check_flags(args, positive=("lr",))
    torch.manual_seed(args.seed)
    run = TrainingRun("toy", scene, args)
    field, table = torch.nn.Linear(3, 1), {"seen": 0}
    optimiser = torch.optim.Adam(field.parameters(), lr=args.lr)

    def evaluate(views, pictures):
        if calls is not None:
            calls.append((run.step, views, pictures))
        if pictures:
            with open(pictures / "test_000.png", "wb") as file:
                file.write(field.weight.numpy().tobytes())
        return {"psnr": float(field.weight.sum()), "ssim": score}

    for step in run.loop({"field": field, "optimiser": optimiser, "table": table}, evaluate):
        for group in optimiser.param_groups:
            group["lr"] = args.lr
        x = torch.rand(8, 3)
        loss = at_step(step, (field(x)[:, 0] - x.sum(1)).square().mean())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        table["seen"] += 8
        run.log(loss=loss, opacity=torch.tensor(opacity))
        run.count(rays=8, samples=run.counts["rays"])
    return run.finish(weight=field.weight, seen=table["seen"])


PRESETS = {"quick": Args(), "paper": Args(preset="paper", steps=14)}


def toy(folder, words="", **how):
    """Status, stdout and stderr of `python toy.py --out FOLDER WORDS`, in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    where = ["--out", str(folder)] if folder else []
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["toy.py", *where, *words.split()])
        try:
            common.cli(PRESETS, lambda args: train(args, **how))
        except SystemExit as stop:
            status = stop.code
    return status, out.getvalue(), err.getvalue()


def result(folder):
    """summary.json and metrics.jsonl without what time and place decide; the picture."""
    summary = json.loads((folder / "summary.json").read_text())
    curve = lines(folder / "metrics.jsonl")
    for values in (summary, *curve):
        for name in ("train_seconds", "peak_memory_mb"):
            values.pop(name, None)
    return summary, curve, (folder / "test_000.png").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "a"
    assert toy(folder)[0] == 0
    return folder


class Killed(BaseException):
    pass


def killed_at(k, error=Killed):
    def at_step(step, loss):
        if step == k:
            raise error
        return loss
    return at_step


def test_folder(tmp_path, monkeypatch):
    """Its files and args.json: in test_contract.py."""
    status, out, err = toy(tmp_path / "a")
    env = json.loads((tmp_path / "a/env.json").read_text())
    assert (status, err) == (0, "") and env["argv"][:2] == ["toy.py", "--out"]
    assert {"torch", "python", "device", "threads", "date", "cpu", "commit"} <= env.keys()
    summary, curve, _ = result(tmp_path / "a")
    assert summary.keys() >= {"method", "scene", "data", "size", "seed", "psnr", "ssim", "weight"}
    assert summary["steps"] == 12 and summary["seen"] == 96
    assert [(line["step"], line["rays"]) for line in curve] == [(5, 40), (10, 80), (12, 96)]
    assert curve[0]["samples"] == 8 * (1 + 2 + 3 + 4)
    assert all(line["loss"] > 0 and line["ssim"] == 0.5 for line in curve)
    shown = out.splitlines()
    assert shown[0].startswith("step 1/12  loss ") and shown[-2].startswith("step 12/12")
    assert shown[-1] == (f"line: PSNR {summary['psnr']:.2f} dB, SSIM 0.5000 after 12 steps, 0 s of "
                         f"training; pictures in {tmp_path / 'a'}")
    monkeypatch.chdir(tmp_path)
    assert [toy(None)[0], toy(None)[0]] == [0, 0]                        # within one second
    names = [path.name for path in Path("runs").iterdir()]
    assert len(names) == 2 and all(name.startswith("toy-line-") for name in names)


def test_to_json():
    value = {1: (np.float32(0.5), np.int64(3)), "t": torch.tensor([1.0, math.inf]), "p": Path("x")}
    assert common.to_json(value) == {"1": [0.5, 3], "t": [1.0, None], "p": "x"}


def test_evaluations(tmp_path):
    """Of --eval-views views without pictures; at the end, of all with pictures."""
    calls = []
    toy(tmp_path / "a", calls=calls)
    assert calls == [(5, 5, None), (10, 5, None), (12, None, tmp_path / "a")]
    for how in ("--resume", "--eval-only"):                              # nothing is left to train
        calls.clear()
        assert toy(tmp_path / "a", how, calls=calls)[0] == 0
        assert calls == [(12, None, tmp_path / "a")]


def test_clock_is_training_time(tmp_path, monkeypatch):
    """Here a step takes 1 s, and writing a file 100 s."""
    now, write = [0], common.write_whole

    def wait(seconds, value=None):
        now[0] += seconds
        return value

    clock = SimpleNamespace(perf_counter=lambda: now[0], monotonic=time.monotonic)
    monkeypatch.setattr(common, "time", clock)
    monkeypatch.setattr(common, "write_whole", lambda *words: wait(100, write(*words)))
    for words in ("", "--resume --steps 13"):
        assert toy(tmp_path / "a", words, at_step=lambda step, loss: wait(1, loss))[0] == 0
    curve = lines(tmp_path / "a/metrics.jsonl")
    assert [line["train_seconds"] for line in curve] == [5, 10, 12, 13]
    assert json.loads((tmp_path / "a/summary.json").read_text())["train_seconds"] == 13


@pytest.mark.parametrize("k", [*range(0, 12, 2), None])
def test_killed_and_resumed_run_ends_like_the_undisturbed_one(undisturbed, tmp_path, k):
    """None: the run ends at step 10, and goes on with a larger --steps, of no effect on the toy."""
    if k is None:
        toy(tmp_path / "a", "--steps 10")
    else:
        with pytest.raises(Killed):
            toy(tmp_path / "a", at_step=killed_at(k))
    with open(tmp_path / "a/metrics.jsonl", "a") as file:
        file.write('{"step": 11, "loss": 1}\n{"step": 12, "ps')          # killed while writing
    assert toy(tmp_path / "a", "--resume --steps 12")[0] == 0
    assert result(tmp_path / "a") == result(undisturbed)
    assert json.loads((tmp_path / "a/args.json").read_text())["steps"] == 12


SCRIPT = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import common, test_run
replace = os.replace
def replace_or_die(a, b):
    if "KILL" in os.environ and b.name == "ckpt.pt" and b.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = replace_or_die
common.cli(test_run.PRESETS, test_run.train)
"""


def test_sigkill_just_before_the_second_checkpoint_takes_its_place(undisturbed, tmp_path):
    done = subprocess.run([sys.executable, "-c", SCRIPT, "--out", str(tmp_path / "a")],
                          env={**os.environ, "KILL": "1"}, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    saved = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    assert saved["step"] == 5 and (tmp_path / "a/ckpt.pt.tmp").exists()
    assert toy(tmp_path / "a", "--resume")[0] == 0
    assert result(tmp_path / "a") == result(undisturbed)
    assert not (tmp_path / "a/ckpt.pt.tmp").exists()


def test_flags_on_resume(tmp_path, monkeypatch):
    """--out DIR --resume is enough; flags that are given as well replace the run's."""
    monkeypatch.chdir(tmp_path)
    board = SimpleNamespace(SummaryWriter=lambda folder: None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    seen = []
    monkeypatch.setitem(globals(), "check_flags", lambda args, **_: seen.append(args))

    def call(words):
        assert toy("x", words)[0] == 0
        return seen[-1]

    first = call("--preset paper --lr 3e-5 --rates 0.1 -0.5 --names b a --tensorboard --no-dither")
    assert first == Args(preset="paper", steps=14, out="x", lr=3e-5, rates=(0.1, -0.5),
                         names=("b", "a"), tensorboard=True, dither=False)
    assert call("--eval-only --preset paper") == replace(first, eval_only=True)
    changed = replace(first, resume=True, lr=0.5, tensorboard=False)
    assert call("--resume --lr 0.5 --no-tensorboard") == changed == call("--resume")
    Path("old").mkdir()
    assert call("--resume --data old").data == call("--resume").data == "old"
    Path("old").rmdir()                                                  # the data has moved
    saved = json.loads(Path("x/args.json").read_text())
    Path("x/args.json").write_text(json.dumps({**saved, "device": "cuda:7"}))
    assert call("--resume").data == Args().data and seen[-1].device == "cpu"
    before = content(Path("x"))
    for words, named in {"--steps 5": "steps was 14, now 5", "--dither": "was False, now True",
                         "--preset quick": "preset was paper, now quick",
                         "--rates 1 2": "rates was [0.1, -0.5], now [1.0, 2.0]"}.items():
        for how in ("--resume", "--eval-only"):
            assert_refused(toy("x", f"{how} {words}"), named)
    assert content(Path("x")) == before


@pytest.mark.parametrize("change", [
    "{", [1, 2], {"steps": "many"}, {"steps": None}, {"preset": "gone"}, {"names": ["c"]},
    {"preset": []}, {"data": None}, {"unknown": 1}], ids=str)
def test_broken_args_json(tmp_path, change):
    toy(tmp_path / "a", "--steps 1")
    path = tmp_path / "a/args.json"
    if isinstance(change, dict):
        change = {**json.loads(path.read_text()), **change}
    path.write_text(change if isinstance(change, str) else json.dumps(change))
    before = content(tmp_path / "a")
    for how in ("--resume", "--eval-only"):
        assert_refused(toy(tmp_path / "a", how), path)
    assert content(tmp_path / "a") == before


def test_broken_checkpoint_or_of_another_run(tmp_path):
    toy(tmp_path / "a")
    path = tmp_path / "a/ckpt.pt"
    whole = path.read_bytes()
    for broken in (whole[:len(whole) // 2], b"", b"hello"):
        path.write_bytes(broken)
        before = content(tmp_path / "a")
        for how in ("--resume", "--eval-only"):
            assert_refused(toy(tmp_path / "a", how), path, "start afresh")
        assert content(tmp_path / "a") == before
    path.write_bytes(whole)
    args = Args(out=str(tmp_path / "a"), resume=True)
    with pytest.raises(UserError, match="another run: method was toy, now other"):
        TrainingRun("other", "line", args)
    with pytest.raises(UserError, match="another run: scene was line, now t"):
        TrainingRun("toy", "t", args)
    for parts, stage in (({"field": None}, "training"), ({"new": {}}, "training"),
                         ({"table": {}}, "other")):
        with pytest.raises(UserError, match="ckpt.pt: not usable"):      # of another program
            next(TrainingRun("toy", "line", args).loop(parts, None, stage=stage))


def test_missing_and_unfinished_folders(tmp_path, monkeypatch):
    """Occupied ones: in test_contract.py."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    for folder in ("file", "file/below"):
        assert_refused(toy(folder), folder, "--out")
    for folder in ("no", None):
        assert_refused(toy(folder, "--resume"), "no ckpt.pt to resume", "--out")
        assert_refused(toy(folder, "--eval-only"), "no ckpt.pt to evaluate", "--out")
    assert {path.name for path in tmp_path.iterdir()} == {"file"}
    with pytest.raises(Killed):
        toy("a", at_step=killed_at(0))
    before = content(Path("a"))
    assert_refused(toy("a", "--eval-only"), "no ckpt.pt to evaluate")
    assert content(Path("a")) == before


@pytest.mark.parametrize("words, named", [
    ("--lr 0", "--lr 0.0 must be greater"), ("--lr nan", "--lr nan"), ("--steps many", "many"),
    ("--eval-every 0", "--eval-every 0"), ("--eval-views 0", "--eval-views 0"),
    ("--size 10", "--size 10"), ("--seed -1", "--seed -1"), ("--names c", "names"),
    ("--device abacus", "--device abacus"), ("--preset", "preset"), ("--rates 1", "rates")])
def test_bad_flags(tmp_path, words, named):
    assert_refused(toy(tmp_path / "a", words), named)
    assert not (tmp_path / "a").exists()


def test_presets_help_and_ranges(tmp_path):
    status, out, _ = toy(tmp_path / "a", "--help --preset paper")
    assert status == 0 and __doc__ in out and "(default: 14)" in out
    assert "Seed of every random number." in out and "Adam's learning rate." in out
    assert toy(tmp_path / "a", "--preset=paper --steps 3")[0] == 0
    args = json.loads((tmp_path / "a/args.json").read_text())
    assert args["preset"] == "paper" and args["steps"] == 3
    flags = replace(Args(), eval_views=0, lr=2)
    with pytest.raises(UserError, match="--lr 2 must be from 0 to 1"):
        check_flags(flags, not_negative=("eval_views",), shares=("lr",))
    check_flags(replace(flags, lr=1), not_negative=("eval_views",), shares=("lr",))


def test_losses_on_a_gpu_are_read_at_every_fiftieth_step_and_before_a_checkpoint(tmp_path):
    """Reading one waits for the GPU."""
    for first, found in ((0, 0), (31, 50), (51, 59), (60, 100), (101, 119)):
        args = Args(out=str(tmp_path / f"{first}"), steps=120, eval_every=60)
        run = TrainingRun("toy", "line", args)
        run.device = torch.device("meta")                                # any but a CPU
        with pytest.raises(UserError, match=f"not finite at step {found};"):
            for step in run.loop({}, lambda *_: {}):
                run.log(loss=math.nan if step >= first else 1.0)


def test_empty_field_and_score_that_is_not_a_number(tmp_path):
    outcome = toy(tmp_path / "a", opacity=1e-4)
    assert_refused(outcome, "field is empty at step 5", "1.0e-04", "will stay so: use a lower --lr")
    outcome = toy(tmp_path / "b", score=math.nan)
    assert_refused(outcome, "ssim is not a number after 5 steps")
    assert not list(tmp_path.glob("*/ckpt.pt"))


@pytest.mark.parametrize("name", ["metrics.jsonl.tmp", "ckpt.pt.tmp", "summary.json.tmp",
                                  "test_000.png"])
def test_disk_full(undisturbed, tmp_path, monkeypatch, name):
    """Whichever file it is, the last good checkpoint stays, and the run goes on from it."""
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    def full(path, mode="r", *words):
        if Path(path).name == name and (tmp_path / "a/ckpt.pt").exists():
            return Full(path, mode)
        return io.open(path, mode, *words)

    monkeypatch.setattr("builtins.open", full)
    assert_refused(toy(tmp_path / "a"), tmp_path / "a", "No space left", "free space")
    assert not list((tmp_path / "a").glob("*.tmp"))
    monkeypatch.undo()
    assert toy(tmp_path / "a", "--resume")[0] == 0
    assert result(tmp_path / "a") == result(undisturbed)


@pytest.mark.parametrize("words", [["--out", "a"], ["--help"]])
def test_closed_pipe_does_not_end_the_training(undisturbed, tmp_path, words):
    """As with `| head -1`, whose end closes the pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words], cwd=tmp_path, stdout=writer,
                          stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")
    if "--out" in words:
        assert result(tmp_path / "a") == result(undisturbed)


def test_out_of_memory_interrupt_and_bugs(tmp_path):
    def huge(step, loss):
        return loss + torch.empty(10 ** 15)

    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    for number, at_step in enumerate((huge, killed_at(0, gpu), killed_at(0, MemoryError()))):
        assert_refused(toy(tmp_path / f"{number}", at_step=at_step), "out of memory: lower --size")
    status, _, err = toy(tmp_path / "a", at_step=killed_at(7, KeyboardInterrupt()))
    assert status == 130 and err.startswith("interrupted: ") and len(err.splitlines()) == 1
    with pytest.raises(RuntimeError, match="shapes"):                    # a bug keeps its traceback
        toy(tmp_path / "b", at_step=killed_at(0, RuntimeError("shapes do not fit")))


def test_no_ffmpeg_is_said_before_training(tmp_path, monkeypatch):
    assert toy(tmp_path / "a", "--video --steps 1")[0] == 0
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    assert_refused(toy(tmp_path / "b", "--video"), "--video: not usable", "pip install")
    assert not (tmp_path / "b").exists() and toy(tmp_path / "b")[0] == 0


def scene_of(count=2, shift=0.0, focal=20.0, name="lego"):
    def views(V):
        c2w = torch.eye(4)[:3].expand(V, 3, 4) + shift
        K = torch.tensor([[focal, 0, 6.0], [0, focal, 6.0], [0, 0, 1.0]])
        images = torch.full((V, 12, 12, 3), 0.5)
        return common.Views(images, c2w, K, None, None, [str(v) for v in range(V)])
    return common.Scene(name, "builtin", views(count), views(1), torch.zeros(2, 3), 2.0, 6.0,
                        torch.ones(3), False)


def test_another_scene_of_the_same_name_is_refused(tmp_path):
    folder = tmp_path / "a"
    assert toy(folder, "--scene there/lego", scene=scene_of())[0] == 0
    assert result(folder)[0]["data"] == "builtin"
    before = content(folder)
    for how in ("--resume", "--eval-only"):
        for other in (dict(count=1), dict(shift=0.1), dict(focal=21.0)):
            outcome = toy(folder, how, scene=scene_of(**other))
            assert_refused(outcome, "another scene of the same name", "--scene")
        outcome = toy(folder, how, scene=scene_of(name="mic"))
        assert_refused(outcome, "scene was lego, now mic")
    assert content(folder) == before
    for words in ("--resume", "--resume --scene ../there/lego", "--eval-only --scene /x/lego"):
        assert toy(folder, words, scene=scene_of(shift=1e-6))[0] == 0


LOOPS = (("one", 4), ("two", 3), ("three", 5))
ORDER = [(name, step) for name, steps in LOOPS for step in range(steps)]


def stages(args, kill=None):
    """A random walk; the third loop starts with a jump.
    -> summary without seconds and memory, the steps taken, the loops evaluated."""
    torch.manual_seed(args.seed)
    run, field = TrainingRun("stages", "line", args), torch.nn.Linear(2, 1)
    scores, taken, evaluated = {}, [], []
    for name, steps in LOOPS:
        if name == "three":
            field.weight.data += 1

        def evaluate(views, pictures):
            evaluated.append(name)
            scores[name] = float(field.weight.sum())
            return {"psnr": scores[name]}

        parts = {"field": field, "scores": scores}
        for step in run.loop(parts, evaluate, steps=steps, stage=name):
            if kill == (name, step):
                raise Killed
            taken.append((name, step))
            field.weight.data += torch.randn(1, 2)
            run.count(rays=5)
    summary = run.finish(rays=run.counts["rays"], weight=field.weight.tolist(), table=dict(scores))
    return {**summary, "train_seconds": 0, "peak_memory_mb": 0}, taken, evaluated


@pytest.mark.parametrize("k, first", [(0, 0), (3, 2), (5, 4), (7, 7), (8, 7), (10, 9), (11, 11)])
def test_several_loops_killed_and_resumed(tmp_path, k, first):
    args = Args(out=str(tmp_path / "a"), eval_every=2)
    expected, taken, _ = stages(args)
    assert taken == ORDER and expected["steps"] == 12 and expected["rays"] == 60
    args = replace(args, out=str(tmp_path / "b"))
    with pytest.raises(Killed):
        stages(args, kill=ORDER[k])
    assert stages(replace(args, resume=True))[:2] == (expected, ORDER[first:])
    for folder in "ab":
        curve = lines(tmp_path / folder / "metrics.jsonl")
        assert [line["step"] for line in curve] == [2, 4, 6, 7, 9, 11, 12]


def test_several_loops_evaluated_and_resumed_at_their_end(tmp_path):
    args = Args(out=str(tmp_path / "a"), eval_every=9)
    expected, _, evaluated = stages(args)
    assert evaluated == ["one", "two", "three"]
    for how in ("resume", "eval_only"):
        assert stages(replace(args, **{how: True})) == (expected, [], ["three"])
    args = replace(args, out=str(tmp_path / "b"))
    with pytest.raises(Killed):
        stages(args, kill=("three", 0))
    with pytest.raises(UserError, match="three is not trained: --resume"):
        stages(replace(args, eval_only=True))
    with pytest.raises(UserError, match="steps was 12, now 13"):         # too late for loop one
        stages(replace(args, resume=True, steps=13))
