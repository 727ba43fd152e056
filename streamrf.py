"""StreamRF: video as a voxel grid and its differences, encoded on the fly (Li et al., NeurIPS 2022, arXiv 2210.14831).

The idea in five lines. One sparse grid of density and spherical harmonics is trained well on the first frame. Every later frame starts
from the grid of the frame before and gets a few dozen optimiser steps instead of hundreds, in a part of the space only: a narrow band
around surfaces, cut down to where a half-resolution pilot model, tuned first, has changed. Voxels that hardly changed are put back to
what they were. What is left is a small difference, stored in an append-only file (the stream); the next frame starts from what a player
of that file will have, so errors do not add up, and no later frame is ever looked at.

| paper                           | here                                                                                |
|---------------------------------|-------------------------------------------------------------------------------------|
| voxel grid of frame t           | Grid(links, values); A = active(grid) before the frame, Q after it                  |
| narrow band                     | band = dilate(A, --ring) minus erode(A, --depth)                                    |
| pilot model                     | pilot, half of --lattice; where it changed: S                                       |
| where the full model may change | M = S, widened by 1, within the band, and with --hull within the hull of change     |
| difference-based compression    | difference(), then encode_frame                                                     |

Sizes: X Y Z lattice points, G rows of a grid (its voxels), F columns, R rays, N samples, V cameras. Masks are (X, Y, Z) bool.

    sigma(x), colour(x, d) = interpolation of eight rows    render                    (Plenoxels section 3)
    frame 0, coarse to fine; total variation                from_scratch, tv_gradient (Plenoxels section 3)
    pilot, then full model, one frame                       next_pilot, next_frame    (paper section 3)
    what of the new grid is kept                            difference                (paper section 3)
    the file, seeking, damage, resuming                     encode_frame, decode_frame, StreamWriter, StreamReader  (ours)

Where the released code differs from this file. --as-released brings back its masks, seeds, keep rule, fp16, undamped steps, uniform
rays; thresholds, step counts, key frames, the closed loop, the file, and (6), (9) stay ours.
(1) A voxel is stored if its colour changed; a surface that fades is put back. Here its opacity counts as well, and colour where it shows.
(2) Seeds from the pilot reach only voxels that exist after growing (4 around surfaces), and overwrite what is there. Here they make new
    voxels anywhere in M, and overwrite none.
(3) It clears what the pilot lost also where nothing may be repaired: blocks. Here only inside M.
(4) fp16 is written but the encoder goes on in float32; the file has no reader. Here the encoder goes on from its own decoded bytes.
(5) The whole occupancy mask is written each frame. Here its difference.
(6) The pilot films the whole video first. Here pilot and full model take turns: truly on the fly.
(7) Its optimiser moves a row by the whole learning rate on first touch, however small the gradient: static voxels jitter, and are stored.
    Here, after frame 0, a step is damped by the root mean square gradient of the rows that move (--damp; 0 is theirs).
(8) Rays are drawn from all pixels. Here most come from pixels that changed in the last --memory frames, the full model's others from rays
    that meet M (--aim). M lies in the hull of those pixels (--hull), and things may be born there out of thin air (--birth).
(9) Total variation looks at a run of 1 % of the lattice. Here at random voxels among those that may change: the same lambda weighs more.
(10) M leaves out what the pilot lost, and speckle is eroded. Here losses count, what the pilot added widens the band, nothing is eroded.

What the runs say (README): a later frame costs an eighth of one from scratch, loses 0.3 dB, and has 1/38 of the bytes of a sparse fp16 one.
Hull, damping and births earn most of that; the band does nothing in a room of thin walls, and the pilot's mask little beside the hull: its
seeds are what counts.

    python streamrf.py                                       12 frames of the built-in stage, 64 px: 31.3 dB, 76 s of one core
    python streamrf.py --play runs/.../stream.srf            a film from the file alone; --path free: a flight
    python streamrf.py --scene flame_salmon_1 --preset paper      for a GPU; not run
"""
from __future__ import annotations

import lzma
import math
import os
import struct
import sys
import time
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import BinaryIO, Iterator, Literal, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import (Progress, Run, Stopwatch, UserError, check_finite, check_flags, cli, camera_path, load_video, ndc_rays,
                    peak_memory_mb, pixel_grid, pixel_rays, psnr, random_state, save_png, save_video, set_random_state, spherical_harmonics,
                    evenly_spaced, ssim, stage_masks, tensorboard, to_device, write_json)
from kernels import composite, march, voxel_interp


@dataclass
class Args:
    scene: str = "stage"
    """A video's name under --data, a path, or the built-in `stage`."""
    data: str = os.environ.get("NERF_DATA", "data")
    """Folder with n3dv/, meetroom/, panoptic_sports/ (default: $NERF_DATA, else `data`)."""
    preset: Literal["quick", "paper"] = "quick"
    """quick: 64 px, 64^3 points, 12 frames. paper: the released N3DV sizes and rates, 1352 px, 512 x 512 x 128 points, 300 frames, for a
    GPU (add --as-released for the released rules as well)."""
    out: Optional[str] = None
    """Run folder (default: runs/streamrf-SCENE-TIME)."""
    seed: int = 0
    """Seed of every random number."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, ..."""
    resume: bool = False
    """Continue the run in --out from its last frame."""
    eval_only: bool = False
    """Play the stream in --out and score it against the scene's pictures; train nothing."""
    video: bool = False
    """Also write the held-out cameras' film, render.mp4."""
    tensorboard: bool = False
    """Also log to TensorBoard (if it is installed)."""

    size: int = 64
    """Longer image side [pixels]."""
    frames: int = 12
    """Frames to encode, or to show with --play (fewer if there are fewer; --eval-only: all)."""
    background: Literal["white", "black", "grey"] = "grey"
    """What is behind the scene."""
    stream: Optional[str] = None
    """The stream's file (default: stream.srf in the run folder)."""
    play: Optional[str] = None
    """Play this stream instead of training: film, frames per second, bytes. Needs no pictures."""
    seek: int = 0
    """First frame to play."""
    path: Literal["held-out", "free"] = "held-out"
    """Play through the held-out cameras, side by side, or along a free camera path."""
    score: bool = False
    """With --play: also load --scene's pictures and score the held-out cameras."""

    mode: Literal["scratch", "warm", "band", "pilot", "full"] = "full"
    """scratch: every frame anew. warm: from the frame before, no mask. band, pilot: one of the two masks. full: both (paper). --hull
    narrows all but scratch: --no-hull for the paper's ablation."""
    compress: bool = True
    """Put back and drop what hardly changed (off: every touched voxel is stored; key frames store all)."""
    seeding: bool = True
    """New voxels start with the pilot's values."""
    clearing: bool = True
    """Voxels that the pilot lost start from zero."""
    as_released: bool = False
    """The released code's masks, seeds, keep rule, fp16, uniform rays and undamped steps (list above; overrides --aim --hull --birth --damp
    --memory --values)."""
    aim: Literal["changed", "crossing", "all"] = "changed"
    """Where a frame's rays come from: mostly pixels that changed lately, pixels whose ray meets M, or all pixels (paper)."""
    change: float = 0.03
    """A pixel changed if it or a neighbour differs from the last frame by more than this, in any channel."""
    memory: int = 3
    """Frames for which a changed pixel counts as changed."""
    changed_share: float = 0.7
    """Share of rays from changed pixels (--aim changed)."""
    hull: bool = True
    """M stays within points that changed pixels of nearly all cameras see."""
    birth: float = 5.0
    """Density that the pilot puts where changed pixels are not explained by any surface there is (0: none)."""

    lattice: tuple[int, int, int] = (64, 64, 64)
    """Points along x, y, z; the pilot has half."""
    degree: int = 1
    """Degree of the spherical harmonics, 0 to 2."""
    halvings: int = 1
    """Frame 0 starts on a lattice halved so often."""
    steps: int = 600
    """Optimiser steps of frame 0 (--mode scratch: of every frame)."""
    rays: int = 2048
    """Rays of each of them."""
    pilot_steps: int = 30
    """Steps of the pilot a frame (frame 0: four times as many)."""
    tune_steps: int = 60
    """Steps of the full model a frame."""
    tune_rays: int = 704
    """Rays of each step of both."""
    lr_density: tuple[float, float] = (3.0, 0.3)
    """First and last learning rate of density [1/length], frame 0."""
    lr_colour: tuple[float, float] = (0.05, 0.002)
    """The same of the coefficients."""
    tune_lr_density: tuple[float, float] = (3.0, 1.0)
    """First and last learning rate of density, later frames and pilot."""
    tune_lr_colour: tuple[float, float] = (0.15, 0.01)
    """The same of the coefficients."""
    damp: float = 1.0
    """Damping of small gradients after frame 0 (list above, 7)."""
    tv_density: float = 5e-4
    """Weight of total variation, density."""
    tv_colour: float = 5e-3
    """Weight of total variation, coefficients."""
    tv_share: float = 0.1
    """Share of the points that may change whose total variation a step looks at."""
    threshold: float = 5.0
    """Density from which on a point is solid; points far from all solid ones go [1/length]."""
    ring: int = 2
    """How far from solid points others may stand [points]."""
    depth: int = 6
    """How deep the narrow band reaches below the rim of what is active [points]."""
    stop: float = 0.01
    """Transmittance below which a ray ends."""
    keep_density: float = 0.05
    """A voxel is stored if its opacity (over one voxel) changed by more than this ..."""
    keep_colour: float = 0.3
    """... or its coefficients, summed, times the opacity around it."""
    pilot_keep_density: float = 0.05
    """The same for the pilot: what counts as a change there."""
    pilot_keep_colour: float = 1.0
    """The same."""
    drop_colour: float = 0.09
    """--as-released: new voxels whose summed coefficients are smaller are dropped."""
    values: Literal["int8", "fp16"] = "int8"
    """How a difference is stored (key frames: always fp16)."""
    density_step: float = 0.05
    """int8: finest step of sqrt(density)."""
    sh_step: float = 0.01
    """int8: finest step of a coefficient."""
    key_every: int = 30
    """Frames from one key frame to the next."""


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", scene="flame_salmon_1", size=1352, frames=300, lattice=(512, 512, 128), degree=2, halvings=2,
                  steps=128_000, rays=5000, pilot_steps=750, tune_steps=500, tune_rays=20_000, lr_density=(30.0, 1.1),
                  lr_colour=(1e-2, 2e-4), tune_lr_density=(1.0, 1.0), tune_lr_colour=(1e-2, 3e-3), tv_share=0.01, aim="all", hull=False,
                  memory=1, drop_colour=0.2, keep_colour=1.0, pilot_keep_colour=0.5),
}


# ---------------------------------------------------------------------------------------------------------- the sparse grid

@dataclass
class Grid:
    """A frame: a sparse voxel grid over a box. Voxel (i, j, k) sits at lattice point (i, j, k); between points one interpolates."""
    links: Tensor           # (X, Y, Z) int32: the voxel's row of values, -1 = none; rows in raster order, x slowest, z fastest
    values: Tensor          # (G, F) float32: raw density [1/length], any sign; then (degree + 1)^2 coefficients of red, of green, of blue


def grid_from(mask: Tensor, values: Tensor) -> Grid:
    """The grid with these voxels: mask (X, Y, Z) bool, values (G, F) in raster order. Example: the n-th True of mask gets link n - 1."""
    links = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    links[mask] = torch.arange(len(values), dtype=torch.int32, device=mask.device)
    return Grid(links, values)


def active(grid: Grid) -> Tensor:
    """Which voxels there are: (X, Y, Z) bool."""
    return grid.links >= 0


def rows_at(grid: Grid, rows: Tensor) -> Tensor:
    """values of rows (...) int, 0 where the row is -1: (..., F)."""
    return F.pad(grid.values, (0, 0, 1, 0))[rows.long() + 1]


def restrict(grid: Grid, mask: Tensor) -> Grid:
    """The grid with exactly the voxels of mask: those that it has keep their values, new ones are 0."""
    return grid_from(mask, rows_at(grid, grid.links[mask]))


def dilate(mask: Tensor, times: int = 1) -> Tensor:
    """Points within `times` steps, diagonals included, of a point of mask (X, Y, Z) bool."""
    x = mask[None, None].float()
    for _ in range(times):
        x = F.max_pool3d(x, 3, 1, 1)
    return x[0, 0] > 0


def erode(mask: Tensor, times: int = 1) -> Tensor:
    """Points of mask whose neighbours within `times` steps all belong to it; outside the lattice counts as in."""
    return ~dilate(~mask, times)


def upsample(mask: Tensor, shape) -> Tensor:
    """Points of a finer lattice that a point of the coarse mask reaches: linear interpolation of 0 and 1 is above 0 (4^3 from one)."""
    return F.interpolate(mask[None, None].float(), tuple(shape), mode="trilinear", align_corners=False)[0, 0] > 0


def on_lattice(mask: Tensor, shape) -> Tensor:
    """Points of mask, a lattice over the box, in coordinates of a lattice of `shape` over the same box: (i + 1/2) ratio - 1/2, (n, 3)."""
    ratio = torch.tensor([b / a for a, b in zip(mask.shape, shape)], device=mask.device)
    return (mask.nonzero() + 0.5) * ratio - 0.5


def lookup(grid: Grid, x: Tensor) -> Tensor:
    """Interpolated values at lattice coordinates x (n, 3), a million at a time, no gradient: (n, F)."""
    with torch.no_grad():
        return torch.cat([voxel_interp(part, grid.links, grid.values) for part in x.split(1 << 20)])


def solid(grid: Grid, threshold: float) -> Tensor:
    """(X, Y, Z) bool: voxels whose density reaches the threshold."""
    return rows_at(grid, grid.links)[..., 0] >= threshold


def resample(grid: Grid, shape, threshold: float, ring: int) -> Grid:
    """The field on a lattice of another shape over the same box; points farther than `ring` from all solid ones are left out."""
    every = torch.ones(tuple(shape), dtype=torch.bool, device=grid.links.device)
    density = lookup(Grid(grid.links, grid.values[:, :1].contiguous()), on_lattice(every, grid.links.shape))
    keep = dilate(density.view(every.shape) >= threshold, ring)
    return grid_from(keep, lookup(grid, on_lattice(keep, grid.links.shape)))


# ------------------------------------------------------------------------------------------------------------------ rendering
# `where` is what knows the box and the cameras: a Video, or the header of a stream.

def cells_of(mask: Tensor) -> Tensor:
    """Cells that touch a point of mask (X, Y, Z): (X+1, Y+1, Z+1) bool. Cell i lies between points i - 1 and i."""
    return F.max_pool3d(mask[None, None].float(), 2, 1, 1)[0, 0] > 0


def walk(cells: Tensor, rays_o: Tensor, rays_d: Tensor, where):
    """Samples every half voxel of rays (R, 3) through these cells.

    -> x (N, 3) in lattice coordinates, t_starts, t_ends (N,) metric, offsets (R+1,), ray (N,). Source: Plenoxels, released constants.
    """
    shape = [side - 1 for side in cells.shape]
    scale = torch.tensor(shape, device=rays_o.device) / (where.aabb[1] - where.aabb[0])             # voxels per unit of length
    voxel = 1 / (rays_d * scale).norm(dim=1)                                                        # (R,) length of a voxel along the ray
    o, d = (rays_o + where.near * rays_d - where.aabb[0]) * scale - 0.5, rays_d * scale * voxel[:, None]
    box = torch.tensor([[-1.0] * 3, shape], device=o.device)
    a, b, offsets, ray = march(o, d, cells, box, 0.5)
    return o[ray] + (0.5 * (a + b))[:, None] * d[ray], where.near + a * voxel[ray], where.near + b * voxel[ray], offsets, ray


def render(grid: Grid, cells: Tensor, rays_o: Tensor, rays_d: Tensor, where, stop: float, mask: Optional[Tensor] = None) -> dict:
    """Rays (R, 3) -> rgb (R, 3) over the background, acc, depth (R,), and of the samples x (N, 3), weights, ray (N,).

    sigma = max(0, interpolated density), colour = max(0, 1/2 + interpolated coefficients . Y(d)); a missing voxel counts as 0 in both.
    cells: where to look, cells_of voxels with positive density is enough. stop: transmittance at which a ray ends.
    Gradient to grid.values, of mask (G,) bool only these rows. Source: Plenoxels section 3.1.
    """
    x, t_starts, t_ends, offsets, ray = walk(cells, rays_o, rays_d, where)
    f = voxel_interp(x, grid.links, grid.values, mask)                                              # (N, 1 + 3B)
    Y = spherical_harmonics(rays_d, math.isqrt(f.shape[1] // 3))                                    # (R, B)
    rgbs = torch.relu(0.5 + (f[:, 1:].view(len(x), 3, Y.shape[1]) * Y[ray][:, None]).sum(-1))               # (N, 3)
    rgb, acc, depth, weights = composite(torch.relu(f[:, 0]), rgbs, t_starts, t_ends, offsets, early_stop=stop)
    return {"rgb": rgb + (1 - acc[:, None]) * where.bg, "acc": acc, "depth": depth, "x": x, "weights": weights, "ray": ray}


def rays_of(where, camera, xy: Tensor) -> tuple[Tensor, Tensor]:
    """Rays of pixels xy (n, 2) of camera(s), a number or (n,): rays_o, rays_d (n, 3), in NDC where the scene is."""
    K = where.K[camera]
    rays_o, rays_d = pixel_rays(xy, K, where.c2w[camera].expand(len(xy), 3, 4))
    return ndc_rays(rays_o, rays_d, where.K[0], where.H, where.W) if where.ndc else (rays_o, rays_d)         # one space: one K


@torch.no_grad()
def picture(grid: Grid, where, camera, args, paint: Optional[Tensor] = None) -> dict:
    """What a camera sees: rgb (H, W, 3) in [0, 1], depth (H, W), and the share of each pixel's weight on rows of paint (G,) bool."""
    cells, parts = cells_of(solid(grid, 1e-8)), []
    for xy in pixel_grid(where.H, where.W, where.aabb.device).split(1 << 15):
        out = render(grid, cells, *rays_of(where, camera, xy), where, args.stop)
        share = torch.zeros(len(xy), device=xy.device)
        if paint is not None:
            share.index_add_(0, out["ray"], out["weights"] * voxel_interp(out["x"], grid.links, paint.float()[:, None])[:, 0])
        parts.append(torch.cat([out["rgb"].clamp(0, 1), out["depth"][:, None], share[:, None]], 1))
    out = torch.cat(parts).view(where.H, where.W, 5)
    return {"rgb": out[..., :3], "depth": out[..., 3], "paint": out[..., 4]}


# ---------------------------------------------------------------------------------- tuning: colour loss, total variation, RMSProp

def tv_gradient(grid: Grid, points: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Add the gradient of total variation at some lattice points (n,), flat indices, to grad (G, F).  weight (F,).

        TV = weight/n sum_points sqrt(1e-9 + sum_axes d^2), d = v[next along axis] - v[point]; each axis of its
    gradient times points a side / 256 (on a lattice of unequal sides no exact gradient any more).
    Density: a missing voxel counts as 0, which pulls the rim of what is active down. Coefficients: no difference to a missing voxel.
    Source: Plenoxels eq. 4, stochastic as released.
    """
    size = torch.tensor(grid.links.shape, device=points.device)
    at = torch.stack(torch.unravel_index(points, grid.links.shape))                                 # (3, n)
    at = torch.stack([at, *(at + torch.eye(3, dtype=at.dtype, device=at.device)[:, :, None])])      # (4, 3, n): itself, next along x, y, z
    x, y, z = torch.minimum(at, size[:, None] - 1).unbind(1)
    rows = torch.where((at < size[:, None]).all(1), grid.links[x, y, z], -1).long()                 # (4, n)
    rows = rows[:, (rows >= 0).any(0)]
    v = rows_at(grid, rows)                                                                         # (4, n, F)
    d = v[1:] - v[0]                                                                                # (3, n, F)
    d[:, :, 1:] *= ((rows[1:] >= 0) & (rows[0] >= 0))[:, :, None]
    g = weight / len(points) * d * (size / 256)[:, None, None] / (1e-9 + d.square().sum(0)).sqrt()
    g, rows = torch.cat([-g.sum(0, keepdim=True), g]).flatten(0, 1), rows.flatten()
    grad.index_add_(0, rows[rows >= 0], g[rows >= 0])


class LazyRMSProp:
    """RMSProp that moves only rows with a gradient, each by its own history.

        m <- g^2 the first time, then 0.95 m + 0.05 g^2        v <- v - lr g / (sqrt(m) + damp sqrt(mean of m over these rows) + 1e-8)
    damp 0 (released): a row's first step is the whole lr, however small its gradient. values (G, F), changed in place; lr (F,).
    """
    def __init__(self, values: Tensor, damp: float):
        self.m, self.damp = torch.zeros_like(values), damp

    def step(self, values: Tensor, grad: Tensor, lr: Tensor) -> None:
        rows = (grad != 0).any(1).nonzero()[:, 0]
        g, m = grad[rows], self.m[rows]
        self.m[rows] = m = torch.where(m == 0, g * g, 0.95 * m + 0.05 * g * g)
        values[rows] -= lr * g / (m.sqrt() + self.damp * m.mean(0).sqrt() + 1e-8)


def training_rays(video, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Rays of training pixels (n,), flat indices into (training cameras, H, W)."""
    camera = torch.tensor(video.train, device=pixel.device)[pixel // (video.H * video.W)]
    pixel = pixel % (video.H * video.W)
    return rays_of(video, camera, torch.stack([pixel % video.W, pixel // video.W], 1) + 0.5)


def tune(grid: Grid, video, truth: Tensor, steps: int, rays: int, lr, args, mask: Optional[Tensor] = None, draw=None,
         damp: float = 0.0, span=(0.0, 1.0)) -> int:
    """Optimiser steps on one frame; replaces grid.values. -> rays used.

    truth (P, 3): all training pixels. draw(n) -> pixels (n,); None: uniform. mask (G,) bool: the rows that may change. lr: first and last
    of density, first and last of coefficients; log-linear, from span[0] to span[1] of the way.
    """
    draw = draw or (lambda n: torch.randint(len(truth), (n,), device=truth.device))
    values, columns = grid.values.requires_grad_(), grid.values.shape[1]
    optimiser = LazyRMSProp(grid.values, damp)
    weight = torch.tensor([args.tv_density] + [args.tv_colour] * (columns - 1), device=truth.device)
    place = active(grid).flatten().nonzero()[:, 0]                                                  # (G,) lattice points of the rows
    place = place if mask is None else place[mask]
    if len(place) == 0:
        raise UserError(f"no voxel is left to tune: none reaches density {args.threshold}: use more --steps, or a lower --threshold")
    n_tv = max(round(args.tv_share * len(place)), 1)
    for k in range(steps):
        if k % 8 == 0:                                                                              # what grew since is not seen yet
            cells = cells_of(solid(grid, 1e-8))
        pixel = draw(rays)
        out = render(grid, cells, *training_rays(video, pixel), video, args.stop, mask)
        loss = (out["rgb"] - truth[pixel]).square().mean()
        if is_opaque(video):        # what a background drawn at random from [0, 1] adds on average
            loss = loss + (1 - out["acc"]).square().mean() / 12
        check_finite(loss, k)
        with torch.no_grad():
            grad, = torch.autograd.grad(loss, values)
            tv_gradient(grid, place[torch.randint(len(place), (n_tv,), device=place.device)], weight, grad)
            if mask is not None:
                grad[~mask] = 0.0
            way = span[0] + (span[1] - span[0]) * k / steps
            rate = [first * (last / first) ** way for first, last in lr]
            optimiser.step(values, grad, torch.tensor([rate[0]] + [rate[1]] * (columns - 1), device=truth.device))
    grid.values = values.detach()
    return steps * rays


def is_opaque(video) -> bool:
    """Whether each ray ends on something. Pictures without alpha say so, and only built-in ones have
    it. Their background must not matter, else the field leaves out what has its colour."""
    return video.kind != "builtin"


def shell(shape, ndc: bool) -> Tensor:
    """(X, Y, Z) bool: the outermost points, on which rays end; in NDC not those at the near plane."""
    points = torch.zeros(*shape, dtype=torch.bool)
    for axis in range(3):
        first = 1 if ndc and axis == 2 else 0
        for side in (0, -1)[first:]:
            points.select(axis, side)[:] = True
    return points


def from_scratch(video, truth: Tensor, args) -> tuple[Grid, int]:
    """A frame without a past, coarse to fine: -> grid, rays used.  Source: Plenoxels section 3.4.

    Ours: for pictures without alpha the box starts with opaque sides, so that what rays see behind
    everything else is painted there and not left to the background.
    """
    parts = args.halvings + 1
    shape = [side >> args.halvings for side in args.lattice]
    start = torch.zeros(math.prod(shape), 1 + 3 * (args.degree + 1) ** 2, device=truth.device)
    start[:, 0] = 0.1
    if is_opaque(video):
        voxel = (video.aabb[1] - video.aabb[0]) / torch.tensor(shape, device=truth.device)
        start[shell(shape, video.ndc).flatten(), 0] = 6 / float(voxel.max())    # exp(-6 / 2) passes
    grid, used = grid_from(torch.ones(shape, dtype=torch.bool, device=truth.device), start), 0
    for part in range(parts):
        if part:
            grid = resample(grid, [side >> (args.halvings - part) for side in args.lattice], args.threshold, args.ring)
        steps = args.steps * (part + 1) // parts - args.steps * part // parts
        used += tune(grid, video, truth, steps, args.rays, (args.lr_density, args.lr_colour), args, span=(part / parts, (part + 1) / parts))
    grid = restrict(grid, active(grid) & dilate(solid(grid, args.threshold), args.ring))
    if len(grid.values) == 0:
        raise UserError(f"no voxel of a frame from scratch reaches density {args.threshold}: use more --steps, or a lower --threshold")
    return grid, used


# ------------------------------------------------------------------------------------ where may the next frame change, and what is kept

def changed_pixels(now: Tensor, before: Tensor, threshold: float) -> Tensor:
    """Pixels where a picture, or a neighbour there, differs from the last frame's in any channel: (V, H, W, 3) each -> (V, H, W) bool."""
    return F.max_pool2d((now - before).abs().amax(-1)[:, None], 3, 1, 1)[:, 0] > threshold


def hull(video, pixels: Tensor, shape, share: float = 0.8) -> Tensor:
    """Lattice points (X, Y, Z) bool that lie on marked pixels in at least `share` of the training cameras that see them (3 at least).

    pixels (V, H, W) bool of the training cameras. A visual hull; all that changes and is not hidden from many cameras lies in it.
    """
    every = torch.ones(tuple(shape), dtype=torch.bool, device=pixels.device)
    x = video.aabb[0] + (on_lattice(every, shape) + 0.5) / torch.tensor(shape, device=pixels.device) * (video.aabb[1] - video.aabb[0])
    if video.ndc:                                                                                   # back into the world of the cameras
        K, z = video.K[0], 2 / (x[:, 2].clamp(max=0.999) - 1)
        x = torch.stack([-0.5 * video.W / K[0, 0] * x[:, 0] * z, -0.5 * video.H / K[1, 1] * x[:, 1] * z, z], 1)
    sees, marked = torch.zeros(len(x), device=x.device), torch.zeros(len(x), device=x.device)
    for camera, lit in zip(video.train, pixels):
        K, c = video.K[camera], (x - video.c2w[camera, :, 3]) @ video.c2w[camera, :, :3]            # c: camera coordinates
        u, v = (K[0, 2] - K[0, 0] * c[:, 0] / c[:, 2]).floor(), (K[1, 2] + K[1, 1] * c[:, 1] / c[:, 2]).floor()
        there = (c[:, 2] < 0) & (u >= 0) & (u < video.W) & (v >= 0) & (v < video.H)
        sees += there
        marked[there] += lit[v[there].long(), u[there].long()]
    return ((marked >= share * sees) & (sees >= min(3, len(video.train)))).view(every.shape)


@torch.no_grad()
def unexplained(grid: Grid, video, pixels: Tensor, suspects: Tensor, args) -> Tensor:
    """Of marked pixels (V, H, W) bool those that see no surface among the suspects (X, Y, Z) bool: something new must be before it."""
    chosen, left, cells = pixels.flatten().nonzero()[:, 0], torch.zeros_like(pixels), cells_of(solid(grid, 1e-8))
    top = torch.tensor(suspects.shape, device=chosen.device) - 1
    for pixel in chosen.split(1 << 15):
        out = render(grid, cells, *training_rays(video, pixel), video, args.stop)
        x, y, z = torch.minimum(out["x"].round().long().clamp(min=0), top).unbind(1)
        share = torch.zeros(len(pixel), device=pixel.device).index_add_(0, out["ray"], out["weights"] * suspects[x, y, z])
        left.view(-1)[pixel[share < 0.5]] = True
    return left


def crossing(mask: Tensor, video, pixels: Tensor) -> Tensor:
    """Of training pixels (n,) those whose ray meets a cell of a point of mask (X, Y, Z); the loss of the others has no gradient there."""
    cells = cells_of(mask)
    return torch.cat([some[walk(cells, *training_rays(video, some), video)[3].diff() > 0] for some in pixels.split(1 << 16)])


def drawing(some: Tensor, others: Tensor, share: float):
    """draw(n): a share of n from the pixels `some`, the rest from `others` (all from the other where one is empty)."""
    def draw(n):
        k = 0 if len(some) == 0 else n if len(others) == 0 else round(share * n)
        pick = lambda pixels, m: pixels[torch.randint(len(pixels), (m,), device=pixels.device)] if m else pixels[:0]
        return torch.cat([pick(some, k), pick(others, n - k)])
    return draw


def difference(before: Grid, after: Grid, voxel: float, keep_density: float, keep_colour: float, args) -> tuple[Grid, Tensor]:
    """What of a tuned grid is worth storing: -> the grid without idle new voxels, keep (G,) bool, its old voxels that really changed.

        alpha = 1 - exp(-max(0, density) voxel)      shows = the largest alpha, before or after, of a voxel and its neighbours
        keep:  |change of alpha| > keep_density   or   shows sum |change of coefficients| > keep_colour
    A new voxel for which neither holds, against 0, is idle. voxel: its side [length]. Old voxels not in keep still have their tuned values.
    --as-released: keep is sum |change of coefficients| > keep_colour, idle sum |coefficients| < drop_colour.
    """
    Q = active(after)
    rows = before.links[Q]
    fresh, old, new = rows < 0, rows_at(before, rows), after.values                                 # (G,), (G, F), (G, F)
    change = (new[:, 1:] - old[:, 1:]).abs().sum(1)
    if not args.compress:
        keep, idle = (new != old).any(1), (new == 0).all(1)
    elif args.as_released:
        keep, idle = change > keep_colour, change < args.drop_colour
    else:
        a, b = (1 - torch.exp(-voxel * v[:, 0].relu()) for v in (old, new))
        shows = torch.zeros(Q.shape, device=Q.device)
        shows[Q] = torch.maximum(a, b)
        shows = F.max_pool3d(shows[None, None], 3, 1, 1)[0, 0][Q]
        keep = ((a - b).abs() > keep_density) | (shows * change > keep_colour)
        idle = ~keep
    stay, left = ~(fresh & idle), torch.zeros_like(Q)
    left[Q] = stay
    return grid_from(left, new[stay]), (keep & ~fresh)[stay]


def put_back(before: Grid, after: Grid, keep: Tensor) -> Grid:
    """The grid after, with the old voxels that are not in keep (G,) bool as they were before."""
    rows = before.links[active(after)]
    return Grid(after.links, torch.where(((rows >= 0) & ~keep)[:, None], rows_at(before, rows), after.values))


def next_pilot(pilot: Grid, video, truth: Tensor, recent: Tensor, voxel: float, draw, args):
    """The half-resolution model follows the frame, all of its voxels free.  -> pilot, masks (changed, added, removed), rays used.

    recent (V, H, W) bool: pixels that changed lately. voxel: a pilot voxel's side [length]. changed holds added, but not removed.
    """
    A = active(pilot)
    born = torch.zeros_like(A)
    if args.birth:
        suspects = dilate(hull(video, recent, A.shape))                 # a changed pixel that sees a surface among these is explained,
        orphans = unexplained(pilot, video, recent, suspects, args)     # the others must see something new
        born = hull(video, orphans, A.shape) & ~dilate(A)
    new = restrict(pilot, dilate(A) | born)
    new.values[new.links[born].long(), 0] = args.birth
    used = tune(new, video, truth, args.pilot_steps, args.tune_rays, (args.tune_lr_density, args.tune_lr_colour), args, draw=draw,
                damp=args.damp)
    new = restrict(new, active(new) & dilate(solid(new, args.threshold)))
    new, keep = difference(pilot, new, voxel, args.pilot_keep_density, args.pilot_keep_colour, args)
    Q = active(new)
    changed = Q & ~A
    changed[Q] |= keep
    return put_back(pilot, new, keep), (changed, Q & ~A, A & ~Q), used


def next_frame(full: Grid, pilot: Optional[Grid], video, truth: Tensor, recent: Tensor, args):
    """One frame from the one before; no later one is known.  -> grid, keep (G,), pilot, M (X, Y, Z), rays used.

    truth (P, 3) its training pixels, recent (V, H, W) bool those that changed lately. Source: paper section 3; differences: top.
    """
    A = active(full)
    shape, nowhere = A.shape, torch.zeros_like(A)                                                   # (X, Y, Z)
    voxel = float(((video.aabb[1] - video.aabb[0]) / torch.tensor(shape, device=A.device)).prod()) ** (1 / 3)
    band, M, added, removed, used = ~nowhere, ~nowhere, nowhere, nowhere, 0
    all_pixels, lately = torch.arange(len(truth), device=A.device), recent.flatten().nonzero()[:, 0]
    # 1. the narrow band: a little outside of what there is, a little inside
    if args.mode in ("band", "full"):
        M = band = dilate(A, args.ring) & ~erode(A, args.depth)
    # 2. the pilot goes first; the full model may change only where it did
    if args.mode in ("pilot", "full"):
        draw = drawing(lately, all_pixels, args.changed_share) if args.aim == "changed" else None
        pilot, (changed, added, removed), used = next_pilot(pilot, video, truth, recent, 2 * voxel, draw, args)
        S, added, removed = upsample(changed | removed, shape), upsample(added, shape), upsample(removed, shape)
        M = dilate(S) & (band | added) if not args.as_released else dilate(erode(upsample(changed, shape)), 2) & band
    if args.hull:
        M = M & dilate(hull(video, recent, shape), 2)
    # 3. room for surfaces to move; what appears (seeds) starts as the pilot has it, what vanishes (cleared) from nothing
    room = A | (dilate(A, args.ring) & M)                              # new voxels are 0: next to a surface they get a gradient, and grow
    seeds, cleared = added & M & ~A, A & removed & M
    if args.as_released:
        seeds, cleared = room & added, room & removed
    grid = restrict(full, room | seeds if args.seeding else room)
    if args.seeding and seeds.any():
        grid.values[grid.links[seeds].long()] = lookup(pilot, on_lattice(seeds, pilot.links.shape))
    if args.clearing:
        grid.values[grid.links[cleared].long()] = 0.0
    grown = active(grid)
    # 4. tuning
    mask = M[grown]
    pixels = all_pixels
    if args.aim != "all":                                                                           # no more than will be drawn
        pixels = crossing(M & grown, video, all_pixels[torch.randperm(len(truth), device=A.device)[:args.tune_steps * args.tune_rays]])
    if mask.any() and len(pixels):
        draw = drawing(lately, pixels, args.changed_share if args.aim == "changed" else 0.0)
        used += tune(grid, video, truth, args.tune_steps, args.tune_rays, (args.tune_lr_density, args.tune_lr_colour), args, mask, draw,
                     args.damp)
    # 5. what became empty goes, what hardly changed is put back (by put_back, or by the decoder)
    stay = grown & (dilate(solid(grid, args.threshold), args.ring) | A & ~M)
    grid, keep = difference(full, restrict(grid, stay), voxel, args.keep_density, args.keep_colour, args)
    return grid, keep, pilot, M, used


# ---------------------------------------------------------------------------------------------- the stream: one frame <-> bytes
#     header  "StreamRF" | version | lattice X Y Z | SH degree | values: fp16, int8 | NDC? | key interval | cameras n, held out, H, W
#             | box (2, 3) | background (3,) | density step, SH step | fps, near, far | n x (K (3, 3), c2w (3, 4)) | CRC32
#     record  "FRAM" | frame number 0, 1, 2 ... | kind: key, delta | payload length | CRC32 of these and the payload | payload
#     record  ...                                            a key frame first, then one every K: a player can start at each of them
#     index   "INDX" | n | n x (frame number, kind, offset) | CRC32        written last: only a finished stream has one; who plays over a
#     footer  offset of the index | "StrRFend"                             slow line can fetch it first (StreamReader reads all, to be sure)
#
#     payload = LZMA( P xor Q, X Y Z bits | keep, a bit for each voxel of both P and Q, in raster order
#                     | int8, if anything is stored: scale, F x f32 | voxels of Q not in P, then kept ones, column by column:
#                       int8 steps, or uint16 differences of the bits of fp16 )
# P: voxels of the frame before, Q: of this one; a key frame is a difference to P = {}. No counts stored: all sizes follow from the bits.

KEY, DELTA = 0, 1
VALUE_TYPES = ("fp16", "int8")
# Raw LZMA2: no container (the record has a CRC). pb=0: a byte's place modulo 4 means nothing here.
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 23, "lc": 3, "lp": 0, "pb": 0}]


class StreamDamaged(UserError):
    """Bytes that are no frame. The message says which record, and what is wrong with it."""


@dataclass
class StreamHeader:
    """All that a player needs to know and frames do not say. Floats are float32 in the file."""
    size: tuple[int, int, int]                              # lattice points along x, y, z
    aabb: Tensor                                            # (2, 3) the box
    degree: int                                             # of the spherical harmonics, 0 to 3
    bg: Tensor                                              # (3,)
    values: Literal["fp16", "int8"]                         # how delta frames store values; key frames: always fp16
    density_step: float                                     # finest quantisation step of int8, > 0: of the companded density
    sh_step: float                                          # and of the spherical harmonics
    key_every: int                                          # frames from key to key
    fps: float
    near: float
    far: float
    ndc: bool
    K: Tensor                                               # (n, 3, 3) all cameras, those held out first
    c2w: Tensor                                             # (n, 3, 4)
    held_out: int                                           # how many these are
    H: int                                                  # their pictures, in pixels
    W: int


def compand(values: np.ndarray) -> np.ndarray:
    """Density s -> sign(s) sqrt|s|: fine steps where a little matters, coarse ones where all is opaque. (G, F) -> (G, F), other columns
    as they are. Like its inverse made of operations that IEEE 754 rounds exactly: all machines decode the same bits. Example: -9 -> -3."""
    out = values.copy()
    out[:, 0] = np.copysign(np.sqrt(np.abs(out[:, 0])), out[:, 0])
    return out


def expand(values: np.ndarray) -> np.ndarray:
    """Inverse of compand: c -> c |c|."""
    out = values.copy()
    out[:, 0] *= np.abs(out[:, 0])
    return out


def half_bits(values: np.ndarray) -> np.ndarray:
    """float32 -> nearest fp16 (largest finite one beyond), its bits as uint16. Subtracted as integers, close numbers of one sign give a
    small one, without loss."""
    return np.clip(values, -65504, 65504).astype("<f2").view("<u2")


def to_planes(a: np.ndarray) -> bytes:
    """(S, F) integers -> bytes column by column, all low bytes before all high ones: alike stands beside alike for the compressor."""
    return np.ascontiguousarray(a.T).view(np.uint8).reshape(-1, a.itemsize).T.tobytes()


def from_planes(raw: bytes, S: int, F: int, dtype: str) -> np.ndarray:
    """Inverse of to_planes -> (S, F)."""
    size = np.dtype(dtype).itemsize
    return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(size, -1).T).view(dtype).reshape(F, S).T


def quantise(header: StreamHeader, target: np.ndarray, guess: np.ndarray) -> bytes:
    """int8: q = round((compand(target) - compand(guess)) / scale), scale = max(step, largest difference / 127) for each column.

    target, guess (S, F). The decoded value is off by at most scale / 2, measured after compand. Returns scale (F,) f32, then q.
    """
    r = compand(target) - compand(guess)
    step = np.array([header.density_step] + [header.sh_step] * (r.shape[1] - 1))
    scale = np.maximum(step, np.abs(r).max(0) / 127).astype("<f4")
    return scale.tobytes() + to_planes(np.rint(r / scale).clip(-127, 127).astype(np.int8))


def predict(P: np.ndarray, Q: np.ndarray, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What the frame before says about this one: P, Q (X*Y*Z,) bool, before (|P|, F) -> guess (|Q|, F), the value before or 0 where
    there was none; old (|Q|,), whether there was one."""
    old = P[Q]
    guess = np.zeros((len(old), before.shape[1]), np.float32)
    guess[old] = before[Q[P]]
    return guess, old


def _flat(header: StreamHeader, grid: Optional[Grid]) -> tuple[np.ndarray, np.ndarray]:
    """A grid's voxels (X*Y*Z,) bool and values (G, F); None: a grid without voxels."""
    if grid is None:
        return np.zeros(np.prod(header.size), bool), np.zeros((0, 1 + 3 * (header.degree + 1) ** 2), np.float32)
    return active(grid).cpu().numpy().ravel(), grid.values.detach().cpu().numpy()


def encode_frame(header: StreamHeader, prev: Optional[Grid], new: Grid, keep: Optional[Tensor] = None) -> bytes:
    """The payload of one frame: what decode_frame needs to get from `prev` to `new`.

    prev: the frame before, as decoded; None: this is a key frame. keep (G,) bool: the rows of new that are stored although prev has the
    voxel; all other voxels of prev stay exactly as they were (rows that prev does not have are always stored).
    Go on from decode_frame(header, kind, payload, prev), never from `new`: then encoder and player see the same numbers for ever.
    """
    (P, before), (Q, values) = _flat(header, prev), _flat(header, new)
    if not np.isfinite(values).all():
        raise UserError("a frame to be stored is not finite: lower --tune-lr-density or --tune-lr-colour (frame 0: --lr-...)")
    guess, old = predict(P, Q, before)
    keep = old & keep.cpu().numpy() if prev is not None else old
    rows = np.r_[np.flatnonzero(~old), np.flatnonzero(keep)]                        # added, then kept
    raw = np.packbits(P ^ Q).tobytes() + np.packbits(keep[old]).tobytes()
    if len(rows) and prev is not None and header.values == "int8":
        raw += quantise(header, values[rows], guess[rows])
    else:
        raw += to_planes(half_bits(values[rows]) - half_bits(guess[rows]))         # wraps around, and back
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA)


def decode_frame(header: StreamHeader, kind: int, payload: bytes, prev: Optional[Grid]) -> Grid:
    """Inverse of encode_frame; prev is not looked at for a key frame. Returns a new Grid, on the CPU.

    Raises StreamDamaged for a payload that does not fit prev to the byte, and never unpacks more than a full lattice would need.
    """
    if kind == DELTA and prev is None:
        raise StreamDamaged("a difference without a frame before it")
    P, before = _flat(header, None if kind == KEY else prev)
    N, F = len(P), before.shape[1]
    try:
        unpacker = lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=LZMA)
        raw = unpacker.decompress(payload, max_length=(N + 7) // 8 * 2 + F * (2 * N + 4) + 1)
    except lzma.LZMAError:
        raise StreamDamaged("payload cannot be unpacked") from None
    if not unpacker.eof or unpacker.unused_data:
        raise StreamDamaged("payload does not end where it should")
    place = 0

    def take(n):
        nonlocal place
        place += n
        if place > len(raw):
            raise StreamDamaged("payload is too short")
        return raw[place - n:place]

    def bits(n):
        return np.unpackbits(np.frombuffer(take((n + 7) // 8), np.uint8), count=n).astype(bool)

    Q = P ^ bits(N)
    guess, old = predict(P, Q, before)
    keep = np.zeros_like(old)
    keep[old] = bits(int(old.sum()))
    rows = np.r_[np.flatnonzero(~old), np.flatnonzero(keep)]
    S = len(rows)
    if S and kind == DELTA and header.values == "int8":
        scale, q = np.frombuffer(take(4 * F), "<f4"), from_planes(take(S * F), S, F, "i1")
        with np.errstate(all="ignore"):                                             # a scale may be anything: looked at below
            guess[rows] = expand(compand(guess[rows]) + q * scale)
    else:
        guess[rows] = (from_planes(take(2 * S * F), S, F, "<u2") + half_bits(guess[rows])).view("<f2")
    if place != len(raw):
        raise StreamDamaged("payload is too long")
    if not np.isfinite(guess[rows]).all():
        raise StreamDamaged("values are not finite")
    return grid_from(torch.from_numpy(Q).view(header.size), torch.from_numpy(guess))


# ----------------------------------------------------------------------------------------------------- the stream: the file

MAGIC, VERSION = b"StreamRF", 1
FIXED = struct.Struct("<8sH 3HBBB IHHII 6f3f2f3f")
RECORD = struct.Struct("<4sIBII")
ENTRY, FOOTER = struct.Struct("<IBQ"), struct.Struct("<Q8s")


def _crc(data: bytes) -> bytes:
    return struct.pack("<I", zlib.crc32(data))


def pack_header(h: StreamHeader) -> bytes:
    """The header's bytes. A stream is only continued if it begins with just these."""
    if not (0 < min(h.size) and max(h.size) < 2 ** 16 and np.prod(h.size, dtype=np.int64) < 2 ** 31 and min(h.density_step, h.sh_step) > 0):
        raise UserError(f"a stream needs 1 to 65535 points an axis, < 2^31 in all, steps > 0: not {h.size}, {h.density_step}, {h.sh_step}")
    head = FIXED.pack(MAGIC, VERSION, *h.size, h.degree, VALUE_TYPES.index(h.values), h.ndc, h.key_every, len(h.c2w), h.held_out, h.H, h.W,
                      *h.aabb.flatten().tolist(), *h.bg.tolist(), h.density_step, h.sh_step, h.fps, h.near, h.far)
    head += torch.cat([h.K.flatten(1), h.c2w.flatten(1)], 1).cpu().numpy().astype("<f4").tobytes()      # (n, 9 + 12)
    return head + _crc(head)


def read_header(file: BinaryIO, path) -> StreamHeader:
    """Read the header, and leave the file at the first record. UserError if it is damaged or of another format."""
    head = file.read(FIXED.size)
    if head[:8] != MAGIC:
        raise UserError(f"{path}: not a StreamRF stream, or its first bytes are damaged")
    if len(head) >= 10 and head[8:10] != struct.pack("<H", VERSION):
        raise UserError(f"{path}: stream format {int.from_bytes(head[8:10], 'little')}, but this program reads format {VERSION}: update it")
    if len(head) == FIXED.size:
        x, y, z, degree, values, ndc, key_every, n, held_out, H, W, *f = FIXED.unpack(head)[2:]
        head += file.read(84 * n + 4)
    if len(head) < FIXED.size + 4 or _crc(head[:-4]) != head[-4:]:
        raise UserError(f"{path}: the header is damaged, nothing can be played: copy the file again or encode it again")
    cameras = torch.from_numpy(np.frombuffer(head[FIXED.size:-4], "<f4").reshape(n, 21).copy())
    return StreamHeader((x, y, z), torch.tensor(f[:6]).view(2, 3), degree, torch.tensor(f[6:9]), VALUE_TYPES[values], f[9], f[10],
                        key_every, *f[11:], bool(ndc), cameras[:, :9].reshape(n, 3, 3), cameras[:, 9:].reshape(n, 3, 4), held_out, H, W)


def pack_record(t: int, kind: int, payload: bytes) -> bytes:
    """The record of frame t."""
    head = RECORD.pack(b"FRAM", t, kind, len(payload), 0)[:-4]
    return head + _crc(head[4:] + payload) + payload


def read_record(file: BinaryIO, t: int, at: int) -> tuple[int, bytes]:
    """The record of frame t, at this offset -> kind, payload. Raises StreamDamaged, unless it is there, whole and undamaged."""
    def check(good, why):
        if not good:
            raise StreamDamaged(f"record {t} is damaged ({why})")

    left = os.fstat(file.fileno()).st_size - at - RECORD.size
    check(left >= 0, "cut short")
    file.seek(at)
    marker, number, kind, length, crc = RECORD.unpack(head := file.read(RECORD.size))
    check(marker == b"FRAM", "no record starts here")
    check(length <= left, "cut short")
    payload = file.read(length)
    check(zlib.crc32(payload, zlib.crc32(head[4:-4])) == crc, "checksum")
    check(number == t, f"it holds frame {number}")
    check(kind == KEY or kind == DELTA and t > 0, "no such kind of frame here")
    return kind, payload


def pack_index(entries: list[tuple[int, int]], at: int) -> bytes:
    """Index and footer: entries (kind, offset) of frames 0, 1, ...; at: the offset of the index itself, where the records end."""
    index = b"INDX" + struct.pack("<I", len(entries)) + b"".join(ENTRY.pack(t, *entry) for t, entry in enumerate(entries))
    return index + _crc(index) + FOOTER.pack(at, b"StrRFend")


def scan(file: BinaryIO) -> tuple[list[tuple[int, int]], int, str]:
    """Read all records from where the file stands, checksums included, up to the first one that is not right.

    Returns (kind, offset) of each good one, where they end, and what is wrong there; "" if they end in a whole index that agrees.
    """
    entries, at = [], file.tell()
    try:
        while not b"INDX".startswith(file.read(4)):                                 # also the end of the file
            kind, _ = read_record(file, len(entries), at)
            entries.append((kind, at))
            at = file.tell()
    except StreamDamaged as error:
        return entries, at, str(error)
    file.seek(at)
    rest = file.read()
    return entries, at, "" if rest == pack_index(entries, at) else "the index is damaged" if rest else "the recording was not finished"


class StreamWriter:
    """Writes a stream, frame by frame; whatever happens, the frames that append has returned from are on disk.

    path: a new file. resume_at=n continues one: its header must be the same and its first n frames whole; what follows them (a later or
    half a record, an index) is cut off. Killed and resumed, a deterministic encoder ends with the same bytes. UserError otherwise.
    """

    def __init__(self, path: str | Path, header: StreamHeader, resume_at: Optional[int] = None):
        head, self.entries = pack_header(header), []
        if resume_at is None:
            try:
                self.file = open(path, "xb")
            except FileExistsError:
                raise UserError(f"{path} exists already: --resume the run that wrote it, or give another --stream") from None
            return self._write(head)
        try:
            self.file = open(path, "r+b" if resume_at or os.path.exists(path) else "w+b")
        except FileNotFoundError:
            raise UserError(f"{path} does not exist: nothing to resume") from None
        have = self.file.read(len(head))
        if not head.startswith(have):
            raise UserError(f"{path}: made with other settings, or damaged: resume with the same settings, or give another --out")
        if len(have) < len(head):                                                   # killed while it wrote the header
            self.file.seek(0)
            self._write(head)
        entries, end, damage = scan(self.file)
        if len(entries) < resume_at:
            raise UserError(f"{path} holds {len(entries)} whole frames, but is to be continued after {resume_at}: give another --out")
        if resume_at == 0 and (len(entries) > 1 or entries and not damage):         # a run without a checkpoint wrote one frame at most
            raise UserError(f"{path} holds {len(entries)} frames of another run: give another --stream")
        self.entries = entries[:resume_at]
        self.file.seek(([at for _, at in entries] + [end])[resume_at])
        self.file.truncate()
        self._write(b"")

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.file.flush()
        os.fsync(self.file.fileno())

    def append(self, t: int, kind: int, payload: bytes) -> int:
        """Write frame t, the next one: kind KEY or DELTA, payload of encode_frame. Returns the bytes of its record."""
        if t != len(self.entries) or t == 0 and kind != KEY:
            raise ValueError(f"frame {t} ({'key' if kind == KEY else 'delta'}) cannot follow {len(self.entries)} frames")
        record, at = pack_record(t, kind, payload), self.file.tell()
        self._write(record)
        self.entries.append((kind, at))
        return len(record)

    def close(self) -> None:
        """Write the index: the stream is finished."""
        self._write(pack_index(self.entries, self.file.tell()))
        self.file.close()


class StreamReader:
    """Plays a stream: header, len (frames), sizes (bytes of each frame's record), frames(), seek().

    Opening reads the file once and verifies every byte, so len and sizes are those of frames that can be played. Of a damaged file that is
    the frames before the damage, and a line on stderr says so; if there are none, or the header is damaged: UserError.
    """

    def __init__(self, path: str | Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.header = read_header(file, path)
                self.entries, end, damage = scan(file)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from None
        offsets = [at for _, at in self.entries] + [end]
        self.sizes = [b - a for a, b in zip(offsets, offsets[1:])]
        if not self.entries:
            raise UserError(f"{path}: no frame can be played: {damage or 'the stream has none'}")
        if damage:
            print(f"warning: {path}: {damage}: playing the first {len(self)} frames", file=sys.stderr)

    def __len__(self) -> int:
        return len(self.entries)

    def frames(self, start: int = 0) -> Iterator[tuple[int, Grid]]:
        """(t, Grid) of frames start, start + 1, ...; decoding begins at the last key frame up to `start`. Grids are not to be written to:
        the next frame is a difference to them."""
        if not 0 <= start < len(self):
            raise UserError(f"{self.path}: there is no frame {start}: choose one from 0 to {len(self) - 1}")
        grid = None
        for t in range(max(t for t in range(start + 1) if self.entries[t][0] == KEY), len(self)):
            try:
                with open(self.path, "rb") as file:
                    kind, payload = read_record(file, t, self.entries[t][1])
                grid = decode_frame(self.header, kind, payload, grid)
            except StreamDamaged as error:
                raise StreamDamaged(f"{self.path}: frame {t}: {error}") from None
            if t >= start:
                yield t, grid

    def seek(self, t: int) -> Grid:
        """Frame t, to the bit what frames() gives."""
        return next(self.frames(t))[1]


# ---------------------------------------------------------------------------------------------------------------- evaluation

def score(grid: Grid, video, t: int, views, args, pictures=None, allowed: Optional[Tensor] = None, stored: Optional[Tensor] = None) -> dict:
    """Decoded frame t on the held-out cameras: psnr [dB], ssim, their means over cameras; psnr_moving inside the true motion mask, if any,
    and for the built-in stage psnr_THING where each thing that changes is seen (None: nowhere).

    pictures: file for a strip of the first camera: truth | render | voxels that were allowed to change | voxels that were stored.
    allowed (X, Y, Z), stored (G,) bool: red in proportion to their weight in a pixel.
    """
    scores, errors, grey = [], [], lambda x: 0.6 * x.mean(-1, keepdim=True) + 0.2
    for camera in video.test:
        truth, rgb = views.images[camera], picture(grid, video, camera, args)["rgb"]
        scores.append([float(psnr(rgb, truth)), float(ssim(rgb, truth))])
        errors.append((rgb - truth).square().mean(-1))
        if pictures and camera == video.test[0]:
            red = [torch.lerp(grey(rgb), rgb.new_tensor([0.9, 0.1, 0.1]), picture(grid, video, camera, args, rows)["paint"][..., None])
                   for rows in (allowed[active(grid)], stored)]
            save_png(pictures, torch.cat([truth, rgb, *red], 1))
    mean = torch.tensor(scores).mean(0).tolist()
    masks = {} if views.mask is None else {"moving": views.mask > 0}
    masks |= stage_masks(video, t) if video.kind == "builtin" else {}
    inside = {f"psnr_{name}": torch.stack(errors)[mask[video.test].to(video.c2w.device)] for name, mask in masks.items()}
    return {"psnr": mean[0], "ssim": mean[1], "psnr_moving": None,
            **{name: float(-10 * some.mean().log10()) if len(some) else None for name, some in inside.items()}}


def play(args: Args) -> dict:
    """Decode a stream and film it: render.mp4; with --score or --eval-only PSNR and SSIM, too.  -> what summary.json holds."""
    path = args.play or args.stream or Path(args.out or "--out DIR") / "stream.srf"
    reader = StreamReader(path)
    if args.seek >= len(reader):
        raise UserError(f"--seek {args.seek}: {path} has frames 0 to {len(reader) - 1}")
    shown = range(args.seek, min(args.seek + args.frames, len(reader)) if args.play else len(reader))
    where, video = to_device(reader.header, args.device), None
    if args.score or args.eval_only:
        video = to_device(load_video(args.scene, args.data, max(where.H, where.W), shown.stop, where.bg.tolist()), args.device)
        if (video.H, video.W, len(video.test)) != (where.H, where.W, where.held_out):
            raise UserError(f"{path}: {where.held_out} cameras of {where.W}x{where.H} px are held out, in {args.scene} {len(video.test)} "
                            f"of {video.W}x{video.H}: give the --scene that it was made with")
    run = Run("streamrf", Path(path).stem if args.play else args.scene, args.out, asdict(args), eval_only=args.eval_only)
    flight = camera_path(where.c2w, where.ndc, len(shown)).to(args.device)
    flight = replace(where, c2w=flight, K=where.K[:1].expand(len(shown), 3, 3))
    films, scores, seconds, frames = [], [], 0.0, reader.frames(args.seek)
    for t in shown:
        start = time.perf_counter()
        grid = to_device(next(frames)[1], args.device)
        seats = [(flight, t - args.seek)] if args.path == "free" else [(where, camera) for camera in range(where.held_out)]
        films.append(torch.cat([picture(grid, *seat, args)["rgb"] for seat in seats], 1).cpu())     # .cpu() waits for a GPU
        seconds += time.perf_counter() - start
        if video:
            scores.append(score(grid, video, t, to_device(video.read(t), args.device), args))
    if args.play or args.video:
        save_video(run.path / "render.mp4", films, fps=max(round(where.fps), 1))
    mean = {key: mean_of([s[key] for s in scores]) for key in ("psnr", "ssim", "psnr_moving")} if scores else {}
    summary = dict(method="streamrf", scene=run.identity["scene"], data=video.kind if video else None, size=max(where.H, where.W),
                   seed=args.seed, steps=0, train_seconds=0.0, peak_memory_mb=round(peak_memory_mb(args.device), 1), **mean,
                   frames=len(shown), pictures_per_second=round(len(shown) * len(seats) / seconds, 2),
                   mb_per_frame=sum(reader.sizes[t] for t in shown) / len(shown) / 1e6)
    print(f"{path}: {len(shown)} frames from {args.seek} on, {summary['pictures_per_second']} pictures of {where.W}x{where.H} px a second "
          f"with decoding, {summary['mb_per_frame']:.3f} MB a frame"
          + (f", PSNR {mean['psnr']:.2f} dB, SSIM {mean['ssim']:.4f}" if scores else "") + f"; in {run.path}")
    if args.play:
        write_json(run.path / "summary.json", summary)
    return summary


def mean_of(values) -> Optional[float]:
    """Mean of those that are not None; None if there are none."""
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


# --------------------------------------------------------------------------------------------------------------- training

# flags that may change between a run and its --resume or --eval-only (rates: the cure of a loss that is not finite)
FREE = {"data", "device", "out", "resume", "eval_only", "video", "tensorboard", "frames", "play", "seek", "path", "score", "stream",
        "lr_density", "lr_colour", "tune_lr_density", "tune_lr_colour"}


def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("frames", "steps", "rays", "tune_rays", "memory", "key_every", "density_step", "sh_step", "threshold"),
                not_negative=("seek", "damp", "tv_density", "tv_colour", "change", "birth", "pilot_steps", "tune_steps", "ring", "depth",
                              "halvings", "keep_density", "keep_colour", "pilot_keep_density", "pilot_keep_colour", "drop_colour"),
                shares=("changed_share", "tv_share", "stop"))
    for name in ("lr_density", "lr_colour", "tune_lr_density", "tune_lr_colour"):
        if not all(0 < rate < math.inf for rate in getattr(args, name)):
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: both rates must be greater than 0")
    part = 2 ** max(args.halvings, 1)
    if any(side % part or side < 4 * part or side > 4096 for side in args.lattice):
        raise UserError(f"--lattice {args.lattice}: sides must be multiples of {part}, {4 * part} to 4096 (the pilot has half; --halvings)")
    if not 0 <= args.degree <= 2:
        raise UserError(f"--degree {args.degree}: choose 0, 1 or 2")
    if args.key_every >= 2 ** 31:
        raise UserError(f"--key-every {args.key_every} must be less than 2^31")
    if args.play and (args.resume or args.eval_only):
        raise UserError("--play trains nothing: leave --resume and --eval-only away")


def train(args: Args) -> dict:
    """Encode a video frame by frame, score what a player will see, write the run folder; -> what summary.json holds."""
    check(args)
    if args.play or args.eval_only:
        return play(args)
    torch.manual_seed(args.seed)
    video = to_device(load_video(args.scene, args.data, args.size, args.frames, args.background), args.device)
    if args.as_released:
        args = replace(args, aim="all", hull=False, birth=0.0, damp=0.0, memory=1, values="fp16")
    if args.stream and not args.resume and os.path.exists(args.stream):
        raise UserError(f"--stream {args.stream} exists already: give another, or --resume the run that wrote it")
    run = Run("streamrf", video.name, args.out, asdict(args), resume=args.resume)
    board = tensorboard(run.path) if args.tensorboard else None
    cameras = video.test + video.train
    header = StreamHeader(args.lattice, video.aabb, args.degree, video.bg, args.values, args.density_step, args.sh_step, args.key_every,
                          video.fps, video.near, video.far, video.ndc, video.K[cameras], video.c2w[cameras], len(video.test),
                          video.H, video.W)
    clock, full, pilot, per_frame = Stopwatch(args.device), None, None, []
    recent = torch.zeros(0, len(video.train), video.H, video.W, dtype=torch.bool, device=args.device)
    if run.resumed:
        state = run.load({name: value for name, value in run.args.items() if name not in FREE})
        set_random_state(state["random"])
        full, pilot = (None if grid is None else to_device(Grid(*grid), args.device) for grid in (state["full"], state["pilot"]))
        recent, per_frame, clock = state["recent"].to(args.device), state["per_frame"], Stopwatch(args.device, state["seconds"])
        if len(per_frame) > video.frames:
            raise UserError(f"--frames {args.frames}: {run.path} has {len(per_frame)} frames already: give at least that, or another --out")
    if args.resume:
        run.rewind(len(per_frame) - 1)
    writer = StreamWriter(args.stream or run.path / "stream.srf", header, len(per_frame) if args.resume else None)
    progress = Progress(video.frames, len(per_frame))
    images = to_device(video.read(len(per_frame) - 1), args.device).images[video.train] if per_frame else None

    for t in range(len(per_frame), video.frames):
        views = to_device(video.read(t), args.device)                                               # not on the clock: a camera delivers it
        before, images = images, views.images[video.train]                                          # (V, H, W, 3)
        truth, start = images.flatten(0, 2), clock.seconds
        clock.start()
        # 1. the grid of this frame
        kind = KEY if args.mode == "scratch" or t % args.key_every == 0 else DELTA
        keep = M = None
        if full is None or args.mode == "scratch":
            grid, used = from_scratch(video, truth, args)
        else:
            recent = torch.cat([recent, changed_pixels(images, before, args.change)[None]])[-args.memory:]
            grid, keep, pilot, M, used = next_frame(full, pilot, video, truth, recent.any(0), args)
            grid = put_back(full, grid, keep) if kind == KEY else grid
        # 2. its difference to the last one, and what a player makes of it: from there it goes on
        payload = encode_frame(header, None if kind == KEY else full, grid, keep)
        last, full = full, to_device(decode_frame(header, kind, payload, full), args.device)
        seconds = clock.stop() - start
        # 3. a pilot for the frames to come, which needs more steps now than it will later
        if t == 0 and args.mode in ("pilot", "full"):
            clock.start()
            pilot = resample(full, [side // 2 for side in args.lattice], args.threshold, 1)
            tune(pilot, video, truth, 4 * args.pilot_steps, args.tune_rays, (args.tune_lr_density, args.tune_lr_colour), args)
            clock.stop()
        size = writer.append(t, kind, payload)
        # 4. the books, of what a player sees
        A, Q = (torch.zeros_like(active(full)) if last is None else active(last)), active(full)
        M = M if M is not None else torch.ones_like(Q)
        stored = torch.ones_like(A[Q]) if kind == KEY else ~A[Q] | keep
        scores = score(full, video, t, views, args, run.path / f"test_{t:03d}.png" if t in evenly_spaced(video.frames, 12) else None, M, stored)
        share = lambda mask, of: float(mask.sum() / of.sum())
        info = dict(scores, seconds=seconds, rays=used, bytes=size, voxels=int(Q.sum()), key=kind == KEY,
                    trainable=share(M & (A | Q), A | Q), kept=float(stored.float().mean()), added=share(Q & ~A, Q),
                    removed=share(A & ~Q, A | Q))
        per_frame.append(info)
        run.write_line(step=t, train_seconds=clock.seconds, **info)
        for name in ("psnr", "bytes", "seconds") if board else ():
            board.add_scalar(name, info[name], t)
        progress(t + 1, psnr=scores["psnr"], seconds=seconds, kilobytes=size / 1000)
        run.save({"random": random_state(), "per_frame": per_frame, "seconds": clock.seconds, "recent": recent.cpu(),
                  **{name: None if g is None else [g.links.cpu(), g.values.cpu()] for name, g in (("full", full), ("pilot", pilot))}})
    writer.close()
    return conclude(args, run, video, clock.seconds, per_frame)


def conclude(args: Args, run: Run, video, seconds: float, per_frame: list[dict]) -> dict:
    """Write the film and the summary."""
    if args.video:
        reader = StreamReader(args.stream or run.path / "stream.srf")
        films = [torch.cat([picture(to_device(grid, args.device), video, camera, args)["rgb"] for camera in video.test], 1).cpu()
                 for _, grid in reader.frames()]
        save_video(run.path / "render.mp4", films, fps=max(round(video.fps), 1))
    mean = lambda key, frames=per_frame: mean_of([info[key] for info in frames])
    later, columns = per_frame[1:], 1 + 3 * (args.degree + 1) ** 2
    slope = float(np.polyfit(range(len(per_frame)), [info["psnr"] for info in per_frame], 1)[0]) if later else None
    summary = dict(method="streamrf", scene=video.name, data=video.kind, size=args.size, seed=args.seed, steps=len(per_frame),
                   train_seconds=round(seconds, 2), peak_memory_mb=round(peak_memory_mb(args.device), 1), psnr=mean("psnr"),
                   ssim=mean("ssim"), psnr_moving=mean("psnr_moving"), psnr_slope=slope, mode=args.mode,
                   seconds_first=per_frame[0]["seconds"], seconds_per_frame=mean("seconds", later), rays_per_frame=mean("rays", later),
                   bytes_first=per_frame[0]["bytes"], bytes_per_frame=mean("bytes", later),
                   bytes_full_frame_fp16=mean("voxels") * columns * 2 + math.prod(args.lattice) / 8,
                   bytes_dense_fp32=math.prod(args.lattice) * columns * 4, trainable=mean("trainable", later), kept=mean("kept", later),
                   added=mean("added", later), frames=len(per_frame), per_frame=per_frame)
    write_json(run.path / "summary.json", summary)
    each = f", later ones {summary['seconds_per_frame']:.2f} s and {summary['bytes_per_frame'] / 1000:.1f} kB" if later else ""
    print(f"{video.name}: PSNR {summary['psnr']:.2f} dB, SSIM {summary['ssim']:.4f} over {len(video.test)} held-out cameras and "
          f"{len(per_frame)} frames; first frame {summary['seconds_first']:.1f} s, {summary['bytes_first'] / 1000:.0f} kB{each}; "
          f"pictures and stream in {run.path}")
    return summary


if __name__ == "__main__":
    cli(PRESETS, train)
