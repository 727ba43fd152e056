"""common.py: occupancy grid, spherical harmonics, metrics, camera paths and pictures."""
import math

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
from common import UserError

def test_occupancy_rule_by_hand():
    grid = common.OccupancyGrid(torch.tensor([[0.0, 0, 0], [2, 4, 8]]), resolution=2, decay=0.5)
    assert grid.occupied.all()

    def density(x):                                                     # 8 in cell (1, 0, 1)
        cells = (x / torch.tensor([1.0, 2, 4])).long()
        assert len({tuple(cell.tolist()) for cell in cells}) == 8 == len(x)
        assert (x % 1 != 0).any()
        return 8.0 * (cells == torch.tensor([1, 0, 1])).all(-1)

    def weak(x):
        return torch.full((len(x),), 1e-3)

    grid.update(density, 0.1, warm=True)
    expected = torch.zeros(2, 2, 2)
    expected[1, 0, 1] = 0.8
    assert torch.allclose(grid.ema, expected)
    assert torch.equal(grid.occupied, expected > 0)                     # min(mean 0.1, 0.01) = 0.01
    grid.update(weak, 1.0, warm=True)
    assert grid.ema[1, 0, 1] == pytest.approx(0.4)                      # decayed, not replaced
    assert grid.ema[0, 0, 0] == pytest.approx(1e-3) and grid.occupied.sum() == 1
    for _ in range(9):
        grid.update(weak, 1.0, warm=True)
    assert not grid.occupied.any()                                      # all equal their mean


@pytest.mark.parametrize("radius", [0.5, 2.0])
def test_later_updates_look_at_a_part_and_at_what_is_occupied(radius):
    grid = common.OccupancyGrid(torch.tensor([[-1.0] * 3, [1.0] * 3]), 16, decay=0.95)
    touched = torch.zeros(16, 16, 16)

    def ball(x):
        touched.index_put_(((x + 1) * 8).long().unbind(-1), torch.tensor(1.0), accumulate=True)
        return 50.0 * (x.norm(dim=-1) < radius)

    grid.update(ball, 0.1, warm=True)
    before, ema = grid.occupied.clone(), grid.ema.clone()
    touched.zero_()
    grid.update(ball, 0.1, warm=False)
    assert touched.max() == 1 and 800 < touched.sum() < 16 ** 3 / 2     # none twice, not all
    assert radius > 1 or touched[before].all()
    assert torch.equal(grid.ema[touched == 0], ema[touched == 0])


def test_spherical_harmonics_are_orthonormal_and_named_right():
    z, weight = np.polynomial.legendre.leggauss(8)
    phi = np.arange(16) * 2 * np.pi / 16
    Z, PHI = np.meshgrid(z, phi, indexing="ij")
    r = np.sqrt(1 - Z ** 2)
    d = torch.tensor(np.stack([r * np.cos(PHI), r * np.sin(PHI), Z], -1).reshape(-1, 3))
    w = torch.tensor(np.repeat(weight * 2 * np.pi / 16, 16))
    Y = common.spherical_harmonics(d, 4)
    assert torch.allclose(Y.T @ (w[:, None] * Y), torch.eye(16, dtype=torch.float64), atol=1e-12)
    for degree in (1, 2, 3):
        assert torch.equal(common.spherical_harmonics(d, degree), Y[:, :degree ** 2])
    up = common.spherical_harmonics(torch.tensor([[0.0, 0, 1]]), 4)[0]
    for l in range(4):                                                  # at the pole only m = 0
        assert up[l * l + l] == pytest.approx(math.sqrt((2 * l + 1) / (4 * math.pi)))
        assert up[l * l:(l + 1) ** 2].count_nonzero() == 1


def test_psnr_and_ssim_are_their_formulas():
    a = torch.full((16, 16, 3), 0.3)
    assert float(common.psnr(a, a + 0.01)) == pytest.approx(40, abs=1e-3)
    torch.manual_seed(0)
    x, y = torch.rand(2, 14, 13, 3, dtype=torch.float64)
    g = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    window = np.outer(g, g) / np.outer(g, g).sum()
    values = []
    for i, j, c in np.ndindex(4, 3, 3):
        p, q = x[i:i + 11, j:j + 11, c].numpy(), y[i:i + 11, j:j + 11, c].numpy()
        mp, mq = (window * p).sum(), (window * q).sum()
        vp, vq = (window * (p - mp) ** 2).sum(), (window * (q - mq) ** 2).sum()
        cov = (window * (p - mp) * (q - mq)).sum()
        values.append((2 * mp * mq + 1e-4) * (2 * cov + 9e-4)
                      / ((mp ** 2 + mq ** 2 + 1e-4) * (vp + vq + 9e-4)))
    assert float(common.ssim(x, y)) == pytest.approx(np.mean(values), abs=1e-10)
    with pytest.raises(UserError, match="11x11"):
        common.ssim(x[:10], y[:10])


def test_truncated_exponential():
    x = torch.tensor([-2.0, 3.0, 15.0, 20.0, 80.0], requires_grad=True)
    y = common.truncated_exp(x)
    (2 * y).sum().backward()
    assert torch.equal(y.detach(), x.detach().exp())
    assert torch.allclose(x.grad, 2 * torch.tensor([-2.0, 3, 15, 15, 15]).exp())


def one_side(focus, up, ahead):
    """20 cameras 3 away from `focus`, within about 25 degrees of the direction `ahead`."""
    rng = np.random.default_rng(0)
    poses = []
    for _ in range(20):
        direction = np.array(ahead, float) + rng.uniform(-0.35, 0.35, 3)
        position = np.array(focus) + 3 * direction / np.linalg.norm(direction)
        poses.append(common.look_at(position, focus + rng.uniform(-0.1, 0.1, 3), up))
    return torch.tensor(np.stack(poses)).float()


@pytest.mark.parametrize("ahead, up, focus", [
    (None, (0, 0, 1), (1.0, 2.0, 0.5)), ((1, 0, 0.3), (0, 0, 1), (1.0, 2.0, 0.5)),
    ((1, 0, 0), (0.1, -1, 0), (1.0, 2.0, 0.5)), ((0, 0, 1), (0, 1, 0), (0.0, 0.0, -4.0))],
    ids=["around", "one side", "no axis is up", "NDC"])
def test_camera_path(ahead, up, focus):
    """Closed and smooth, among the cameras, at their distance, looks at the focus, upright."""
    cameras = torch.cat([common.orbit_poses(30, 3.0, degrees, focus) for degrees in (10.0, 50.0)])
    if ahead:
        cameras = one_side(focus, up, ahead)
    assert common.camera_path(cameras[:1], False, 8).isfinite().all()
    path = common.camera_path(cameras, focus == (0.0, 0.0, -4.0), 40)
    position, focus, R = path[:, :, 3], torch.tensor(focus), path[:, :, :3]
    assert path.shape == (40, 3, 4)
    assert torch.allclose(R.mT @ R, torch.eye(3).expand(40, 3, 3), atol=1e-5)
    step = (position - position.roll(1, 0)).norm(dim=-1)
    assert 0.01 < step.min() and step.max() < 3 * step.median()
    assert torch.allclose((position - focus).norm(dim=-1), torch.tensor(3.0), atol=0.1)
    towards = F.normalize(focus - position, dim=-1)
    assert ((towards * -path[:, :, 2]).sum(-1) > 0.99).all()
    assert (path[:, :, 1] @ F.normalize(torch.tensor(up, dtype=torch.float), dim=0) > 0.5).all()
    mean = F.normalize((cameras[:, :, 3] - focus).mean(0), dim=0)
    if not ahead:                                   # at the mean height of 10 and 50 degrees
        assert torch.allclose(position[:, 2] - focus[2], torch.tensor(1.4095), atol=1e-3)
        assert (position.amax(0)[:2] - position.amin(0)[:2] > 4).all()
    else:
        inside = (F.normalize(position - focus, dim=-1) @ mean).min()
        assert inside > (F.normalize(cameras[:, :, 3] - focus, dim=-1) @ mean).min()


def test_colour_map_and_comparison_strip():
    colours = common.colour_map(torch.tensor([-5.0, 1.0, 9.0]), 0.0, 2.0)
    assert colours.tolist() == [[0, 0, 0.5], [0.5, 1, 0.5], [0.5, 0, 0]]        # blue, green, red
    target, render = torch.rand(2, 6, 5, 3)
    strip = common.comparison_strip(target, render, torch.full((6, 5), 3.0), 2.0, 6.0)
    error = common.colour_map((target - render).abs().mean(-1), 0, 0.25)
    quarter = common.colour_map(torch.full((6, 5), 0.25), 0, 1)                 # 3 of 2 .. 6
    assert torch.allclose(strip, torch.cat([target, render, error, quarter], 1), atol=1e-5)


def test_save_png_and_video(tmp_path):
    common.save_png(tmp_path / "a.png", torch.tensor([[[0.0, 0.5, 2.0], [1.0, math.nan, -1.0]]]))
    assert iio.imread(tmp_path / "a.png").tolist() == [[[0, 128, 255], [255, 0, 0]]]
    frames = [torch.full((19, 33, 3), value) for value in (0.0, 0.5, 1.0)]
    for name in ("v.gif", "v.mp4"):
        common.save_video(tmp_path / name, frames, fps=10)
        back = iio.imread(tmp_path / name, index=None)
        assert len(back) == 3 and abs(float(back[1].mean()) - 128) < 6
