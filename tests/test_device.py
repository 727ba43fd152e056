"""What only a GPU shows, on the pretend one of device.py: devices that mix, needless launches and
needless waiting of the host."""
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

import common
import soft_mining
from device import Pretend, pretend_device
from test_contract import METHODS


@pytest.fixture
def device():
    with pretend_device() as made:
        yield made


def test_tensors_of_two_devices_do_not_meet(device):
    x, y = torch.arange(4.0).to("pretend"), torch.ones(4)
    assert x.device.type == "pretend" and not x.is_cpu and type(x + x) is Pretend
    for mix in (lambda: x + y, lambda: torch.stack([y, x]), lambda: y[x.long()], lambda: y.add_(x),
                lambda: x[torch.tensor([0, 1])], lambda: torch.where(x > 0, x, y)):
        with pytest.raises(RuntimeError, match="a CPU tensor .* meets"):
            mix()
    with pytest.raises(RuntimeError):
        x.numpy()
    assert_close((x + torch.tensor(2.0)).cpu(), torch.arange(4.0) + 2, rtol=0, atol=0)
    assert_close(y.copy_(x), torch.arange(4.0), rtol=0, atol=0)


def test_launches_and_waits_are_counted(device):
    x = torch.zeros(2, 3, device="pretend", requires_grad=True)
    assert (device.launches.total(), device.waits.total()) == (1, 0)
    y = (x * 2 + 1).t()[1:].detach().view(2, 2)                          # views are free
    assert (device.launches.total(), device.waits.total()) == (3, 0)
    y += torch.empty_like(y).copy_(y)
    assert (device.launches.total(), device.waits.total()) == (5, 0)
    waits = [lambda: y[0, 0].item(), lambda: bool(y.any()), lambda: float(y.sum()), y.tolist,
             y.cpu, y.nonzero, lambda: y[y > 0], lambda: y.masked_select(y > 0), y.unique,
             lambda: torch.tensor([1.0], device=y.device), lambda: y.new_tensor([1.0, 2.0]),
             lambda: y.__setitem__(y > 0, 1.0), lambda: torch.repeat_interleave(y[0].long()),
             lambda: torch.equal(y, y), lambda: f"{y.sum():.2f}", lambda: y.copy_(torch.ones(2, 2))]
    for i, wait in enumerate(waits):
        before = device.waits.total()
        wait()
        assert device.waits.total() == before + 1, (i, device.waits)
    before = device.waits.total()
    torch.repeat_interleave(y[0].long(), output_size=2)                  # 1 + 1
    y[torch.arange(2, device=y.device)] = 0.0
    torch.where(y > 0, 1.0, y).topk(1)
    assert device.waits.total() == before, device.waits


def tf32(x):
    """Rounded to 10 bits behind the point, as cuDNN's convolutions do with float32 inputs."""
    if x.dtype != torch.float32:
        return x
    bits = x.contiguous().view(torch.int32)
    return ((bits + (1 << 12)) & ~((1 << 13) - 1)).view(torch.float32)


def test_ssim_and_edges_do_not_depend_on_tf32(monkeypatch):
    conv2d = torch.nn.functional.conv2d
    monkeypatch.setattr(torch.nn.functional, "conv2d",
                        lambda x, weight, *rest: conv2d(tf32(x), tf32(weight), *rest))
    x = torch.tensor([[[[1 + 2 ** -11]]]])
    assert torch.nn.functional.conv2d(x, torch.ones(1, 1, 1, 1)) == 1 + 2 ** -10
    image = 0.9 + 0.05 * common.pixel_grid(32, 40).sin().prod(1).view(32, 40, 1).expand(32, 40, 3)
    other = image + 0.002 * torch.rand(image.shape, generator=torch.Generator().manual_seed(0))
    found = float(common.ssim(image, other)), soft_mining.edge_maps(image[None])
    monkeypatch.undo()
    exact = float(common.ssim(image.double(), other.double()))
    assert abs(found[0] - exact) < 1e-3, (found[0], exact)
    assert_close(found[1], soft_mining.edge_maps(image[None].double()).float(), rtol=1e-4,
                 atol=1e-4)


def test_half_keeps_the_digits_of_the_density():
    """A bfloat16 log density of 4 to 8 has steps of 1/32, 3 % of the density."""
    torch.manual_seed(0)
    scene = SimpleNamespace(aabb=common.OBJECT_BOX)
    x, sigmas = 2 * torch.rand(500, 3) - 1, []
    for half in (False, True):
        args = soft_mining.Args(levels=4, log2_table=10, finest=32, half=half)
        torch.manual_seed(1)
        field = soft_mining.HashField(args, scene.aabb)
        with torch.no_grad():
            field.table.normal_()
            field.geometry[2].bias[0] = 6
        sigmas.append(field.density(x).log().detach())
    assert sigmas[1].dtype == torch.float32 and len(sigmas[1].unique()) > 450
    assert (sigmas[0] - sigmas[1]).abs().mean() < 1 / 128


def test_half_reaches_the_same_psnr(tiny, tmp_path):
    flags = dict(size=24, steps=120, eval_every=120, rays=128, batch="rays", levels=4,
                 log2_table=11, finest=32, march_steps=32, device="cpu", scene=str(tiny))
    scores = [soft_mining.train(soft_mining.Args(**flags, half=half, out=str(tmp_path / str(half))))
              for half in (False, True)]
    psnr, other = (score["psnr"] for score in scores)                    # two seeds: 0.5 dB apart
    assert abs(psnr - other) < 0.4 and psnr > 15, (psnr, other)


@pytest.fixture
def gpus(monkeypatch):
    """Two CUDA devices, as far as the state of their random numbers and their names go."""
    states = [torch.full((16,), i, dtype=torch.uint8) for i in range(2)]
    index = lambda device: torch.device(device).index or 0               # noqa: E731
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda d=0: f"GPU {index(d)}")
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda d="cuda": states[index(d)])
    monkeypatch.setattr(torch.cuda, "set_rng_state",
                        lambda state, d="cuda": states.__setitem__(index(d), state))
    return states


@pytest.mark.parametrize("there, here, then", [("cuda:1", "cuda:0", 1), ("cuda:0", "cpu", 7),
                                               ("cpu", "cuda:1", 7), ("cpu", "cpu", 7)])
def test_random_numbers_and_environment(gpus, tmp_path, capsys, there, here, then):
    """A checkpoint of GPU 1 goes on on GPU 0 with GPU 1's random numbers, any other as it can."""
    args = common.RunArgs(out=str(tmp_path), device=there, steps=1, size=16)
    run = common.TrainingRun("toy", "line", args)
    assert list(run.loop({}, lambda *_: {})) == [0]
    found = json.loads((tmp_path / "env.json").read_text())["device"]
    assert found == {"cuda:1": "GPU 1", "cuda:0": "GPU 0", "cpu": "cpu"}[there]
    gpus[:] = [torch.full((16,), 7, dtype=torch.uint8)] * 2
    expected = torch.rand(1)
    torch.manual_seed(5)
    run = common.TrainingRun("toy", "line", replace(args, device=here, resume=True))
    assert list(run.loop({}, lambda *_: {})) == [] and torch.rand(1) == expected
    assert (gpus[torch.device(here).index or 0] == then).all()
    said = "note: the checkpoint is of another kind of device" in capsys.readouterr().err
    assert said == (("cuda" in there) != ("cuda" in here))


BUDGETS = {                         # steps; launches and waits of the second: one line a script
    "soft_mining": (3, 350, 1), "infonerf": (3, 505, 0), "continual": (24, 330, 6),
    "latent_scenes": (3, 260, 6), "streamrf": (3, 3100, 400)}           # of a frame: 8 iterations


@pytest.fixture
def cost(device, monkeypatch):
    """cost(script, flags) -> launches and waits, by name, of the second step."""
    def cost(script, flags):
        seen, loop = [], common.TrainingRun.loop

        def counting(*args, **kwargs):
            for step in loop(*args, **kwargs):
                seen.append((device.launches.copy(), device.waits.copy()))
                yield step

        clock = SimpleNamespace(perf_counter=lambda: 0.0, monotonic=lambda: 0.0)
        with monkeypatch.context() as patch:
            patch.setattr(common.TrainingRun, "loop", counting)
            patch.setattr(common, "time", clock)                         # no progress in between
            script.train(replace(script.Args(), **flags, device="pretend"))
        return [after - before for before, after in zip(seen[1], seen[2])]
    return cost


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.script.__name__)
def test_a_step(cost, tiny, tmp_path, method):
    steps, most_launches, most_waits = BUDGETS[method.script.__name__]
    scene = method.scene if method.scene != "tiny" else str(tiny)
    flags = {**method.flags, "scene": scene, "steps": steps, "eval_every": steps,
             "out": str(tmp_path / "a")}
    launches, waits = cost(method.script, flags)
    assert launches.total() <= most_launches and waits.total() <= most_waits, (launches, waits)


TINY = dict(size=24, steps=3, eval_every=3, eval_views=1, rays=64, samples=512, num_walkers=256,
            levels=2, log2_table=10, finest=24, march_steps=24, proposal_samples=(8, 6),
            ray_samples=5)


@pytest.mark.parametrize("flags", [
    *(dict(sampling=sampling, ray_sampling=ray_sampling)
      for sampling in ("uniform", "edge", "multinomial", "lmc")
      for ray_sampling in ("occupancy", "proposal")),
    dict(as_released=True), dict(reinit="uniform"), dict(train_background="scene")],
    ids=lambda flags: "-".join(map(str, flags.values())))
def test_soft_mining(cost, tiny, tmp_path, flags):
    launches, waits = cost(soft_mining, {**TINY, **flags, "scene": str(tiny),
                                         "out": str(tmp_path / "a")})
    proposal = flags.get("ray_sampling") == "proposal"                   # two networks more
    assert launches.total() <= (650 if proposal else 350), launches
    assert waits.total() <= (0 if proposal else 1), waits                # march reads a sum


@pytest.mark.parametrize("flags", [{}, dict(as_released=True), dict(sampling="multinomial")],
                         ids=str)
def test_a_step_that_is_not_finite_is_remembered(device, tiny, tmp_path, monkeypatch, flags):
    """A GPU's loss is read at steps 0, 50, ... and before checkpoints. Until then the field, the
    pixels and the occupied cells must go on with what such a step leaves behind."""
    render, done = soft_mining.render, []

    def spoil(*args):
        out = render(*args)
        if torch.is_grad_enabled():
            done.append(out)
        if len(done) == 41:                                              # step 40, and no other
            out["rgb"] = out["rgb"] * torch.nan
            done.append(out)
        return out

    monkeypatch.setattr(soft_mining, "render", spoil)
    flags = {**TINY, "steps": 60, "eval_every": 30, "scene": str(tiny), "device": "pretend",
             "out": str(tmp_path / "a"), **flags}
    with pytest.raises(common.UserError, match="not finite at step 50"):
        soft_mining.train(soft_mining.Args(**flags))
    saved = torch.load(tmp_path / "a/ckpt.pt", weights_only=True)
    assert saved["step"] == 30
    assert all(x.isfinite().all() for x in saved["parts"]["training"]["field"].values())
