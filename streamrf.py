"""StreamRF: a video as a voxel grid and its differences (Li et al., NeurIPS 2022, arXiv 2210.14831)

A sparse voxel grid of density and colour is optimised well for the first frame of a video that
several cameras film. Each later frame starts from the grid of the frame before it, and gets a few
dozen iterations instead of hundreds. Only a part of the grid may change: a narrow band around the
surfaces, cut down to where the pilot, a model of half the resolution that is optimised first, has
changed. Voxels that hardly changed are put back to what they were. What is left is a small
difference, which is appended to a file, the stream. No later frame is ever looked at, so a video
can be encoded while it is filmed.

    density and colour of a point = interpolation of 8 voxels      render         (Plenoxels, 3.1)
    frame 0, coarse to fine, with total variation                  first_frame    (Plenoxels, 3.4)
    where the half-resolution model changed                        next_pilot
    what may change: dilate(changed) within the band               masks_of_frame
    what of the new grid is kept, what is put back                 difference
    one frame, from all of these                                   next_frame
    a difference as bytes, and back                                encode_frame, decode_frame

The default also uses what stands under `beyond the paper`; --as-released does without.

    python streamrf.py                              12 frames of the built-in stage: 30.6 dB, and
                                                    52 kB a later frame, 1/21 of it in sparse fp16
    python streamrf.py --play runs/.../stream.srf   a flight through it, from the file alone
In changes/: target | render | in yellow what might change | in red what was stored.
"""
from __future__ import annotations

import lzma
import math
import os
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import (RunArgs, TrainingRun, UserError, Video, camera_path, check_flags, cli,
                    comparison_strip, load_video, ndc_rays, note, pixel_rays, psnr,
                    require, save_png, save_video, say, spherical_harmonics, ssim, to_device)
from kernels import composite, march, voxel_interp


@dataclass
class Args(RunArgs):
    scene: str = "stage"
    """A video's name under --data, a path, or the built-in `stage`."""
    size: int = 64
    """Longer image side [pixels]."""
    steps: int = 12
    """Frames to encode, or to play: a step of the run is one frame of the video."""
    eval_every: int = 1
    """Frames from one score and checkpoint to the next."""
    background: Literal["white", "black", "grey"] = "grey"
    """What stands behind the built-in scene (photographs: always grey, see first_frame)."""
    play: Optional[str] = None
    """Play this stream instead of training: a flight among its cameras, as a film beside it."""

    mode: Literal["scratch", "warm", "band", "pilot", "full"] = "full"
    """Each frame anew, from the last frame, with one of the two masks, with both (the paper)."""
    as_released: bool = False
    """Rays, steps and storage as released, without what stands under `beyond the paper`."""
    hull: bool = True
    """Rays come from pixels that changed; only points that cameras see there may change."""
    birth: float = 5.0
    """Density the pilot starts with where a change is not explained by a surface; 0: no births."""
    damp: float = 1.0
    """Damping of small gradients in later frames; 0: none (paper)."""

    resolution: tuple[int, int, int] = (64, 64, 64)
    """Lattice points along x, y, z; the pilot has half of each."""
    degree: Literal[0, 1, 2] = 1
    """Degree of the spherical harmonics: (degree + 1)^2 coefficients a colour channel."""
    first_iterations: int = 600
    """Optimiser iterations of frame 0 (--mode scratch: of every frame)."""
    first_rays: int = 2048
    """Rays of each of them."""
    pilot_iterations: int = 30
    """Iterations of the pilot in a later frame (four times as many in frame 0)."""
    iterations: int = 60
    """Iterations of the full model in a later frame."""
    rays: int = 704
    """Rays of each iteration of pilot and full model."""
    first_lr: tuple[float, float, float, float] = (3.0, 0.3, 0.05, 0.002)
    """Learning rates of frame 0: first and last of density [1/length], the same of coefficients."""
    lr: tuple[float, float, float, float] = (3.0, 1.0, 0.15, 0.01)
    """Learning rates of later frames and of the pilot."""
    tv: tuple[float, float] = (5e-4, 5e-3)
    """Weights of total variation: of the density, of the coefficients."""
    threshold: float = 5.0
    """Density from which on a voxel is solid; voxels far from solid ones are removed [1/length]."""
    dilation: int = 2
    """Outer width of the band: how far from what is there voxels may appear [points]."""
    erosion: int = 6
    """Inner width of the band, below the outermost voxels [points]."""
    keep: tuple[float, float] = (0.05, 0.3)
    """A voxel is stored if its opacity, or the sum of its coefficients, changed by more."""
    pilot_keep: tuple[float, float] = (0.05, 1.0)
    """The same for the pilot: what counts there as a change."""
    values: Literal["int8", "fp16"] = "int8"
    """How differences are stored (key frames: always fp16)."""
    key_every: int = 30
    """Frames from one key frame, which is stored whole, to the next."""


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", scene="flame_salmon_1", size=1352, steps=300, hull=False,
                  resolution=(512, 512, 128), degree=2, first_iterations=128_000, first_rays=5000,
                  pilot_iterations=750, iterations=500, rays=20_000, lr=(1.0, 1.0, 1e-2, 3e-3),
                  first_lr=(30.0, 1.1, 1e-2, 2e-4), keep=(0.05, 1.0), pilot_keep=(0.05, 0.5)),
}
EARLY_STOP = 0.01                   # a ray ends at this transmittance (the released constant)


# ---------------------------------------------------------------------------- the sparse grid
# A lattice of X x Y x Z points stands in the scene's box: point i of X at (i + 1/2) / X of its
# side. A voxel is a point that has values; its row is their place in `values`. In between, values
# are interpolated, where a point that is no voxel counts as 0. A cell is the space between
# neighbouring points. Lattice coordinates along one axis, X = 4:
#
#     point            0     1     2     3          beyond the outermost points their values hold
#     coordinate -1    0     1     2     3    4     for one more cell, which the box cuts in half
#     cell        |  0 |  1  |  2  |  3  | 4  |     X + 1 cells: cell i is between i - 1 and i
#     box            |                     |        from -1/2 to X - 1/2

@dataclass
class Grid:
    """The model of a frame. Rows are in raster order of their voxels: x slowest, z fastest."""
    links: Tensor           # (X, Y, Z) int32: the point's row, or -1: no voxel
    values: Tensor          # (G, C) float32: density [1/length], any sign; then the coefficients
                            # of the spherical harmonics of red, of green, of blue

    @property
    def active(self) -> Tensor:
        """Which voxels there are: (X, Y, Z) bool."""
        return self.links >= 0

    def at(self, rows: Tensor) -> Tensor:
        """Values of rows (...) int, 0 where the row is -1: (..., C)."""
        values = self.values.new_zeros(*rows.shape, self.values.shape[1])
        values[rows >= 0] = self.values[rows[rows >= 0].long()]
        return values

    def solid(self, threshold: float) -> Tensor:
        """Voxels whose density reaches the threshold: (X, Y, Z) bool."""
        return spread(self.active, self.values[:, 0] >= threshold)

    def restrict(self, mask: Tensor) -> Grid:
        """The grid with exactly the voxels of mask (X, Y, Z); new ones have the value 0."""
        return grid_from(mask, self.at(self.links[mask]))

    def resample(self, shape, threshold: float, dilation: int) -> Grid:
        """The grid at another resolution: points within `dilation` of solid ones."""
        every = torch.ones(tuple(shape), dtype=torch.bool, device=self.links.device)
        x = coordinates(every, self.links.shape)
        values = voxel_interp(x, self.links, self.values).view(*shape, -1)
        mask = dilate(values[..., 0] >= threshold, dilation)
        return grid_from(mask, values[mask])

    def state_dict(self) -> dict:
        return dict(vars(self))

    def load_state_dict(self, saved: dict) -> None:
        device = self.links.device
        self.links, self.values = saved["links"].to(device), saved["values"].to(device)


def spread(mask: Tensor, marked: Tensor) -> Tensor:
    """Which points of mask (X, Y, Z) are marked, given (G,) bool in raster order: (X, Y, Z)."""
    out = torch.zeros_like(mask)
    out[mask] = marked
    return out


def grid_from(mask: Tensor, values: Tensor) -> Grid:
    """The grid with these voxels: mask (X, Y, Z) bool, values (G, C) in raster order."""
    links = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    links[mask] = torch.arange(len(values), dtype=torch.int32, device=mask.device)
    return Grid(links, values)


def dilate(mask: Tensor, times: int = 1) -> Tensor:
    """Points within `times` steps, diagonals included, of a point of mask (X, Y, Z) bool."""
    x = mask[None, None].float()
    for _ in range(times):
        x = F.max_pool3d(x, 3, 1, 1)
    return x[0, 0] > 0


def upsample(mask: Tensor, shape) -> Tensor:
    """Points of a finer lattice where the interpolation of mask, as 0 and 1, is above 0. At twice
    the resolution one point becomes 4 x 4 x 4: its own 2 x 2 x 2 and those beside them."""
    x = mask[None, None].float()
    return F.interpolate(x, tuple(shape), mode="trilinear", align_corners=False)[0, 0] > 0


def coordinates(mask: Tensor, shape) -> Tensor:
    """The points of mask in coordinates of a lattice of `shape` in the same box: (n, 3).
    (i + 1/2) ratio - 1/2. Example: from 4 points to 2, point 0 is at 1/2 * 1/2 - 1/2 = -1/4."""
    ratio = torch.tensor([b / a for a, b in zip(mask.shape, shape)], device=mask.device)
    return (mask.nonzero() + 0.5) * ratio - 0.5


# --------------------------------------------------------------------------------- rendering
# `scene` is what knows the box and the cameras: a Video, also that in the header of a stream.

def cells_of(mask: Tensor) -> Tensor:
    """Cells that touch a point of mask (X, Y, Z): (X+1, Y+1, Z+1) bool."""
    return F.max_pool3d(mask[None, None].float(), 2, 1, 1)[0, 0] > 0


def sample_along_rays(cells: Tensor, rays_o: Tensor, rays_d: Tensor, scene):
    """Samples every half voxel (as Plenoxels) of rays (R, 3) through these cells: x (N, 3) lattice
    coordinates, t_starts, t_ends (N,) metric, offsets (R+1,), ray (N,). march walks in lattice
    coordinates, where a voxel has side 1: along a ray of the world, that is 1 / |scale d|."""
    shape = [side - 1 for side in cells.shape]
    scale = torch.tensor(shape, device=rays_o.device) / (scene.aabb[1] - scene.aabb[0])
    voxel = 1 / (rays_d * scale).norm(dim=1)                                        # (R,)
    o = (rays_o + scene.near * rays_d - scene.aabb[0]) * scale - 0.5
    d = rays_d * scale * voxel[:, None]
    box = torch.tensor([[-1.0] * 3, shape], device=o.device)                        # of cells
    a, b, offsets, ray = march(o, d, cells, box, 0.5)
    x = o[ray] + (0.5 * (a + b))[:, None] * d[ray]
    return x, scene.near + a * voxel[ray], scene.near + b * voxel[ray], offsets, ray


def render(grid: Grid, cells: Tensor, rays_o: Tensor, rays_d: Tensor, scene,
           row_mask: Optional[Tensor] = None) -> dict:
    """Volume rendering of rays (R, 3), with f the interpolated values, Y spherical harmonics:

        sigma = max(0, f_0),    colour of a channel = max(0, 1/2 + sum_b f_b Y_b(direction)),
        T_i = exp(-sum_{j<i} sigma_j delta_j),    w_i = T_i (1 - exp(-sigma_i delta_i)),
        rgb = sum_i w_i colour_i + (1 - opacity) bg,    opacity = sum_i w_i.

    -> rgb (R, 3), opacity, depth (R,); of the N samples x (N, 3), weights, ray (N,). cells: where
    to look; cells_of voxels with density above 0 is enough. Gradient to the rows of grid.values in
    row_mask (G,) bool (None: all). Where sigma is 0 there is none: surfaces grow at rims only."""
    x, t_starts, t_ends, offsets, ray = sample_along_rays(cells, rays_o, rays_d, scene)
    f = voxel_interp(x, grid.links, grid.values, row_mask)                          # (N, 1 + 3 B)
    Y = spherical_harmonics(rays_d, math.isqrt(f.shape[1] // 3))                    # (R, B)
    colours = 0.5 + (f[:, 1:].unflatten(1, (3, -1)) * Y[ray][:, None]).sum(-1)      # (N, 3)
    rgb, opacity, depth, weights = composite(
        torch.relu(f[:, 0]), torch.relu(colours), t_starts, t_ends, offsets, EARLY_STOP)
    return {"rgb": rgb + (1 - opacity[:, None]) * scene.bg, "opacity": opacity, "depth": depth,
            "x": x, "weights": weights, "ray": ray}


def camera_rays(scene, camera, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Rays of pixels (R,), counted row by row, of camera(s), a number or (R,): rays_o, rays_d
    (R, 3), in NDC where the scene is (one space for all cameras: that of the first)."""
    xy = torch.stack([pixel % scene.W, pixel // scene.W], 1) + 0.5
    rays = pixel_rays(xy, scene.K[camera], scene.c2w[camera].expand(len(xy), 3, 4))
    return ndc_rays(*rays, scene.K[0], scene.H, scene.W) if scene.ndc else rays


@torch.no_grad()
def render_image(grid: Grid, scene, camera: int) -> tuple[Tensor, Tensor]:
    """What a camera sees: rgb (H, W, 3) in [0, 1], depth (H, W)."""
    cells, parts = cells_of(grid.solid(1e-8)), []
    for pixel in torch.arange(scene.H * scene.W, device=scene.aabb.device).split(1 << 15):
        out = render(grid, cells, *camera_rays(scene, camera, pixel), scene)
        parts.append(torch.cat([out["rgb"].clamp(0, 1), out["depth"][:, None]], 1))
    image = torch.cat(parts).view(scene.H, scene.W, 4)
    return image[..., :3], image[..., 3]


# ---------------------------------------------------------------- optimising the grid of a frame

def tv_gradient(grid: Grid, points: Tensor, weight: Tensor, grad: Tensor,
                row_mask: Optional[Tensor] = None) -> None:
    """Add the gradient of total variation at lattice points (n,), flat indices, to grad (G, C).

        TV = weight/n sum_points sqrt(1e-9 + sum_axes d^2),   d = v[next along the axis] - v[point]

    weight (C,); row_mask (G,) bool: rows that receive it. As in Plenoxels, a point that is no voxel
    has density 0, which pulls rims down, and no colour; an axis of X points weighs X / 256. Why
    TV: specks that few rays look through would change from frame to frame, and be stored."""
    size = torch.tensor(grid.links.shape, device=points.device)
    at = torch.stack(torch.unravel_index(points, grid.links.shape))                 # (3, n)
    steps = torch.eye(3, dtype=at.dtype, device=at.device)[:, :, None]
    at = torch.stack([at, *(at + steps)])           # (4, 3, n): itself, the next along x, y, z
    x, y, z = torch.minimum(at, size[:, None] - 1).unbind(1)
    row = torch.where((at < size[:, None]).all(1), grid.links[x, y, z], -1).long()  # (4, n)
    row = row[:, (row >= 0).any(0)]
    v = grid.at(row)                                                                # (4, n, C)
    d = v[1:] - v[0]                                                                # (3, n, C)
    d[:, :, 1:] *= ((row[1:] >= 0) & (row[0] >= 0))[:, :, None]
    norm = (1e-9 + d.square().sum(0)).sqrt()
    g = weight / len(points) * d * (size / 256)[:, None, None] / norm
    g, row = torch.cat([-g.sum(0, keepdim=True), g]).flatten(0, 1), row.flatten()
    receives = row >= 0
    if row_mask is not None:
        receives = receives & row_mask[row]         # row -1 reads the last one, but is out
    grad.index_add_(0, row[receives], g[receives])


def rmsprop_step(values: Tensor, grad: Tensor, m: Tensor, lr: Tensor, damp: float) -> None:
    """RMSProp that moves only rows with a gradient, each by its own history m (G, C), in place.

        m <- g^2 the first time, then 0.95 m + 0.05 g^2
        v <- v - lr g / (sqrt(m) + damp sqrt(mean of m over the rows that move))      lr (C,)

    damp is 0 in frame 0; why it is not later: `beyond the paper`."""
    rows = (grad != 0).any(1).nonzero()[:, 0]
    g, before = grad[rows], m[rows]
    after = torch.where(before == 0, g * g, 0.95 * before + 0.05 * g * g)
    m[rows] = after
    values[rows] -= lr * g / (after.sqrt() + damp * after.mean(0).sqrt() + 1e-8)


def training_rays(video, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Rays of training pixels (R,), flat indices into (training cameras, H, W)."""
    camera = torch.tensor(video.train, device=pixel.device)[pixel // (video.H * video.W)]
    return camera_rays(video, camera, pixel % (video.H * video.W))


def optimise(grid: Grid, video, target: Tensor, iterations: int, rays: int, lr: tuple, args,
             row_mask: Optional[Tensor] = None, pixels: Optional[Tensor] = None, damp: float = 0.0,
             span=(0.0, 1.0)) -> dict:
    """Minimise the squared error of one frame, and TV; replaces grid.values.

    target (P, 3): all training pixels. row_mask (G,) bool: rows that may change. pixels (m,): where
    rays come from (None: everywhere). lr: see Args; log-linear from first to last, here from
    span[0] to span[1] of the way. -> loss and opacity of the last batch, number of rays."""
    device, values = target.device, grid.values.requires_grad_()
    m, which = torch.zeros_like(values), [0] + [1] * (values.shape[1] - 1)
    weight = torch.tensor(args.tv, device=device)[which]                            # (C,)
    points = grid.active.flatten().nonzero()[:, 0]                                  # (G,)
    points = points if row_mask is None else points[row_mask]
    require(len(points), f"no voxel reaches density {args.threshold}, none is left to optimise: "
                         "use more --first-iterations, or a lower --threshold")
    n_tv = min(len(points) // 10 + 1, 1 << 18)      # a tenth of them at a time is enough
    choices = len(target) if pixels is None else len(pixels)
    for k in range(iterations):
        if k % 8 == 0:                              # what grew in between is not looked at yet
            cells = cells_of(grid.solid(1e-8))
        pixel = torch.randint(choices, (rays,), device=device)
        pixel = pixel if pixels is None else pixels[pixel]
        out = render(grid, cells, *training_rays(video, pixel), video, row_mask)
        loss = (out["rgb"] - target[pixel]).square().mean()
        if video.kind != "builtin":                 # photographs, see first_frame
            loss = loss + (1 - out["opacity"]).square().mean() / 12
        require(loss.isfinite(), f"the loss is not finite at iteration {k}: lower --lr, --first-lr")
        with torch.no_grad():
            grad, = torch.autograd.grad(loss, values)
            some = torch.randint(len(points), (n_tv,), device=device)
            tv_gradient(grid, points[some], weight, grad, row_mask)
            progress = span[0] + (span[1] - span[0]) * k / iterations
            rate = [lr[i] * (lr[i + 1] / lr[i]) ** progress for i in (0, 2)]
            rmsprop_step(values, grad, m, torch.tensor(rate, device=device)[which], damp)
    grid.values = values.detach()
    return {"loss": loss.detach(), "opacity": out["opacity"].mean(), "rays": iterations * rays}


def first_frame(video, target: Tensor, args) -> tuple[Grid, dict]:
    """A frame without a past: -> grid, and what optimise returns.

    Coarse to fine: all points of half the resolution start as grey voxels of density 0.1; half of
    the iterations later only what is near solid voxels goes on at the full one.
    Photographs have no alpha, and the background must not matter: else it is used as paint. So the
    sides of the box (in NDC all but the near plane) start opaque, the background is grey, and
    optimise adds (1 - opacity)^2 / 12: together the mean of the loss over all backgrounds."""
    shape = [side // 2 for side in args.resolution]
    values = torch.zeros(*shape, 1 + 3 * (args.degree + 1) ** 2, device=target.device)
    values[..., 0] = 0.1
    if video.kind != "builtin":
        voxel = (video.aabb[1] - video.aabb[0]) / torch.tensor(shape, device=target.device)
        values[..., 0] = 6 / float(voxel.max())                 # half a voxel lets exp(-3) through
        values[1:-1, 1:-1, (0 if video.ndc else 1):-1, 0] = 0.1
    links = torch.arange(math.prod(shape), dtype=torch.int32, device=target.device).view(shape)
    grid, rays, begin = Grid(links, values.flatten(0, 2)), 0, 0
    for end in (args.first_iterations // 2, args.first_iterations):
        if begin:
            grid = grid.resample(args.resolution, args.threshold, args.dilation)
        out = optimise(grid, video, target, end - begin, args.first_rays, args.first_lr, args,
                       span=(begin / args.first_iterations, end / args.first_iterations))
        rays, begin = rays + out["rays"], end
    grid = grid.restrict(grid.active & dilate(grid.solid(args.threshold), args.dilation))
    require(len(grid.values), f"no voxel reaches density {args.threshold}: use more "
                              "--first-iterations, or a lower --threshold")
    return grid, {**out, "rays": rays}


# -------------------------------------------------- one frame: what may change, and what is kept
# A frame on a lattice of 6 x 6, with --dilation 1 --erosion 1. The pilot (3 x 3) lost its point in
# row 1, column 0, and gained that in row 2, column 2: an object loses a corner, and grows sideways.
#
#    exists      band        pilot       M           start       stored
#    ......      ......      ......      ......      ......      ......
#    ......      #####.      ---...      ####..      0000..      ......
#    oooo..      #####.      ---...      #####.      ccco0.      ###o..
#    oooo..      ...##.      ---+++      ...###      ooooss      oooo##
#    oooo..      ...##.      ---+++      ...###      ooooss      oooo##
#    oooo..      ...##.      ...+++      ...###      ooooss      oooo##
#
# pilot: removed -, added +, upsampled. start: old o, new 0, seeded s, cleared c. The optimisation
# left seeds solid and cleared ones empty: these are stored (#). Idle new voxels are gone.

def masks_of_frame(exists: Tensor, pilot_masks: Optional[tuple], hull: Optional[Tensor], args):
    """-> masks (X, Y, Z) bool: M, what may change; what the new grid starts with, and, among that,
    the seeded and the cleared voxels. exists: voxels of the last frame; hull: see visual_hull.

        band = dilate(exists, dilation) minus erode(exists, erosion)
        M = dilate(changed or removed) within (band or added)
        start = exists or (dilate(exists, dilation) within M) or seeds
        seeds = added within M, where nothing exists        cleared = removed within M

    Why a band: surfaces move a little; deeper inside nothing shows, and no ray would teach it. Why
    a pilot (its masks: changed, added, removed): with an eighth of the voxels it finds where
    something happens. What it added starts with its values, what it removed from 0, like other new
    voxels: beside a surface they get a gradient. Released code: what was removed does not widen M,
    and is cleared outside of it, too, where nothing can be repaired; what was added counts within
    the band only, and overwrites."""
    M, added, removed = torch.ones_like(exists), torch.zeros_like(exists), torch.zeros_like(exists)
    if args.mode in ("band", "full"):
        inside = ~dilate(~exists, args.erosion)
        M = dilate(exists, args.dilation) & ~inside
    if args.mode in ("pilot", "full"):
        changed, added, removed = (upsample(mask, exists.shape) for mask in pilot_masks)
        M = dilate(changed | removed) & (M | added)
    if hull is not None:
        M = M & hull
    seeds = added & M & ~exists
    return M, exists | dilate(exists, args.dilation) & M | seeds, seeds, exists & removed & M


def difference(prev: Grid, new: Grid, voxel: float, keep: tuple, released: bool = False
               ) -> tuple[Grid, Tensor]:
    """What is worth storing: -> new without idle voxels, all others put back; stored (G,) bool.

        alpha = 1 - exp(-max(0, density) voxel)      shows = the largest alpha of a voxel and its
        stored: |change of alpha| > keep[0]                  neighbours, before or after
                or shows sum |change of coefficients| > keep[1]

    voxel: its side [length]. A new voxel changes from 0; one that is not stored is idle, and goes.
    Example: keep = (0.05, 0.3), voxel 0.03: from density 40 to 50, alpha changes from 0.70 to 0.78:
    stored. From 200 to 300 it is 0.9975 and 0.9999: not stored. Released code: stored is what sum
    |change of coefficients| > keep[1] (new ones: a fifth of it), so a surface that fades stays."""
    rows = prev.links[new.active]                                                   # (G,)
    is_new, old = rows < 0, prev.at(rows)
    change = (new.values[:, 1:] - old[:, 1:]).abs().sum(1)
    if released:
        stored = change > torch.where(is_new, keep[1] / 5, keep[1])
    else:
        before, after = (1 - torch.exp(-voxel * v[:, 0].relu()) for v in (old, new.values))
        shows = torch.zeros(new.links.shape, device=rows.device)
        shows[new.active] = torch.maximum(before, after)
        shows = F.max_pool3d(shows[None, None], 3, 1, 1)[0, 0][new.active]
        stored = ((before - after).abs() > keep[0]) | (shows * change > keep[1])
    values = torch.where(stored[:, None], new.values, old)
    stay = stored | ~is_new
    return grid_from(spread(new.active, stay), values[stay]), stored[stay]


def next_pilot(pilot: Grid, video, target: Tensor, recent: Tensor, voxel: float, args):
    """The pilot follows the frame, all of its voxels free. -> masks (changed, added, removed) of
    its lattice, of which changed includes added; number of rays. voxel: its side [length]."""
    exists = pilot.active
    born = births(pilot, video, recent) if args.birth else torch.zeros_like(exists)
    new = pilot.restrict(dilate(exists) | born)
    new.values[new.links[born].long(), 0] = args.birth
    out = optimise(new, video, target, args.pilot_iterations, args.rays, args.lr, args,
                   pixels=pixels_to_train(recent, None, video, args), damp=args.damp)
    new = new.restrict(new.active & dilate(new.solid(args.threshold)))
    new, stored = difference(pilot, new, voxel, args.pilot_keep, args.as_released)
    masks = spread(new.active, stored), new.active & ~exists, exists & ~new.active
    pilot.load_state_dict(vars(new))
    return masks, out["rays"]


def next_frame(prev: Grid, pilot: Grid, video, target: Tensor, recent: Tensor, args):
    """One frame from the last one; moves the pilot on. -> grid, stored (G,), M (X, Y, Z), what
    optimise returns. target (P, 3): the training pixels; recent (V, H, W): changed lately."""
    exists, shape = prev.active, prev.links.shape
    sides = (video.aabb[1] - video.aabb[0]) / torch.tensor(shape, device=exists.device)
    voxel = float(sides.prod()) ** (1 / 3)
    # 1. the pilot goes first
    masks = hull = None
    rays = 0
    if args.mode in ("pilot", "full"):
        masks, rays = next_pilot(pilot, video, target, recent, 2 * voxel, args)
    if args.hull:
        hull = dilate(visual_hull(video, recent, shape), 2)
    # 2. what may change, and what the new grid starts with
    M, start, seeds, cleared = masks_of_frame(exists, masks, hull, args)
    new = prev.restrict(start)
    if seeds.any():
        x = coordinates(seeds, pilot.links.shape)
        new.values[new.links[seeds].long()] = voxel_interp(x, pilot.links, pilot.values)
    new.values[new.links[cleared].long()] = 0.0
    # 3. optimise what may change
    out = {"loss": torch.zeros(()), "opacity": torch.ones(()), "rays": 0}
    pixels = pixels_to_train(recent, M & start, video, args)
    if (M & start).any() and (pixels is None or len(pixels)):
        out = optimise(new, video, target, args.iterations, args.rays, args.lr, args, M[start],
                       pixels, args.damp)
    # 4. what became empty is removed, and what hardly changed is put back
    near = dilate(new.solid(args.threshold), args.dilation)
    new = new.restrict(start & (near | exists & ~M))
    new, stored = difference(prev, new, voxel, args.keep, args.as_released)
    return new, stored, M, {**out, "rays": rays + out["rays"]}


# ------------------------------------------------------------ the stream: one frame <-> bytes
# header  HEADER | n x CAMERA, the held-out ones first | CRC32
# record  "FRAM" | frame 0, 1, ... | kind: 0 key, 1 delta | payload length | CRC32 | payload
# ...     (the CRC is that of all but "FRAM"; a key frame first, and every key_every frames)
# index   "INDX" | number of frames | each (frame, kind, offset) | CRC32 | offset of the index
#         | "StrRFend"                  written last: without it, the recording was not finished
# payload = LZMA( X Y Z bits: voxels that appear or vanish | a bit for each voxel that stays: is it
#           stored? | int8: scale, C x f32 | new voxels, then stored ones, column by column:
#           int8 steps, or differences of the bits of fp16 ). All counts follow from the bits.

KEY, DELTA = 0, 1
VALUES = ("fp16", "int8")
HEADER = np.dtype([
    ("magic", "S8"), ("version", "<u2"), ("size", "<u2", 3), ("degree", "u1"), ("values", "u1"),
    ("ndc", "u1"), ("key_every", "<u4"), ("cameras", "<u2"), ("held_out", "<u2"), ("H", "<u4"),
    ("W", "<u4"), ("aabb", "<f4", (2, 3)), ("bg", "<f4", 3), ("steps", "<f4", 2), ("fps", "<f4"),
    ("near", "<f4"), ("far", "<f4")])                           # steps: of int8, see quantise
CAMERA = np.dtype([("K", "<f4", (3, 3)), ("c2w", "<f4", (3, 4))])
RECORD = struct.Struct("<4sIBII")
# Raw LZMA2, as the record has a CRC. pb=0: a byte's place modulo 4 means nothing here.
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 23, "lc": 3, "lp": 0, "pb": 0}]


def to_planes(a: np.ndarray) -> bytes:
    """(S, C) integers -> bytes column by column, all low bytes before all high ones: what is alike
    stands together for the compressor."""
    return np.ascontiguousarray(a.T).view(np.uint8).reshape(-1, a.itemsize).T.tobytes()


def from_planes(raw: np.ndarray, columns: int, dtype: str) -> np.ndarray:
    """Inverse of to_planes, from bytes as uint8 -> (S, C)."""
    planes = raw.reshape(np.dtype(dtype).itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(columns, -1).T


def half_bits(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest finite fp16, as uint16. Bits of close numbers are close integers."""
    return np.clip(values, -65504, 65504).astype("<f2").view("<u2")


def encode_frame(header, kind: int, prev: Grid, new: Grid, stored: Tensor) -> bytes:
    """The bytes of a frame before LZMA. prev: the last frame as decoded (of a key frame: a grid
    without voxels); stored (G,) bool: the rows of new to be written, the others are as in prev."""
    old_rows = prev.links[new.active]                           # (G,), -1: the voxel is new
    guess, values = prev.at(old_rows).cpu().numpy(), new.values.cpu().numpy()
    require(np.isfinite(values).all(), "a frame is not finite: lower --lr, --first-lr")
    is_old, stored = (old_rows >= 0).cpu().numpy(), stored.cpu().numpy()
    rows = np.r_[np.flatnonzero(~is_old), np.flatnonzero(stored & is_old)]
    raw = np.packbits((prev.active ^ new.active).cpu().numpy()).tobytes()
    raw += np.packbits(stored[is_old]).tobytes()
    if len(rows) and kind == DELTA and VALUES[header["values"]] == "int8":
        return raw + quantise(header["steps"], values[rows], guess[rows])
    return raw + to_planes(half_bits(values[rows]) - half_bits(guess[rows]))


def compress(raw: bytes) -> bytes:
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA)


def decode_frame(header, kind: int, payload: bytes, prev: Grid) -> Grid:
    """The frame of a payload = compress(encode_frame(...)), on the CPU, as prev. An exception if
    it does not fit prev to the byte."""
    raw = np.frombuffer(lzma.decompress(payload, lzma.FORMAT_RAW, filters=LZMA), np.uint8)
    points, columns = prev.links.numel(), prev.values.shape[1]
    flips, raw = np.split(raw, [(points + 7) // 8])
    flips = torch.from_numpy(np.unpackbits(flips, count=points)).bool().view(prev.links.shape)
    now = prev.active ^ flips
    old_rows = prev.links[now].numpy()                          # (G,), -1: the voxel is new
    old = np.flatnonzero(old_rows >= 0)
    bits, raw = np.split(raw, [(len(old) + 7) // 8])
    stored = np.unpackbits(bits, count=len(old)).astype(bool)
    rows = np.r_[np.flatnonzero(old_rows < 0), old[stored]]
    guess = prev.at(prev.links[now]).numpy()
    if len(rows) and kind == DELTA and VALUES[header["values"]] == "int8":
        scale, raw = np.split(raw, [4 * columns])
        q = from_planes(raw, columns, "i1")
        guess[rows] = dequantise(scale.view("<f4"), q, guess[rows])
    elif len(rows):
        guess[rows] = (from_planes(raw, columns, "<u2") + half_bits(guess[rows])).view("<f2")
    return grid_from(now, torch.from_numpy(guess))


# ------------------------------------------------------------------------ the stream: the file

def empty_grid(shape, degree: int) -> Grid:
    """A grid without voxels, which a key frame is a difference to."""
    values = torch.zeros(0, 1 + 3 * (degree + 1) ** 2)
    return grid_from(torch.zeros(tuple(shape), dtype=torch.bool), values)


def pack_header(video, args) -> bytes:
    header = np.array(
        (b"StreamRF", 1, args.resolution, args.degree, VALUES.index(args.values), video.ndc,
         args.key_every, len(video.c2w), len(video.test), video.H, video.W, video.aabb.cpu(),
         video.bg.cpu(), (0.05, 0.01), video.fps, video.near, video.far), HEADER)
    cameras, order = np.zeros(len(video.c2w), CAMERA), video.test + video.train
    cameras["K"], cameras["c2w"] = video.K[order].cpu(), video.c2w[order].cpu()
    head = header.tobytes() + cameras.tobytes()
    return head + struct.pack("<I", zlib.crc32(head))


def read_header(data: bytes, path) -> tuple[np.ndarray, Video, int]:
    """What a stream begins with: -> header, a Video without pictures, where the records begin."""
    require(data[:8] == b"StreamRF", f"{path}: no stream, or its first bytes are damaged")
    version = int.from_bytes(data[8:10], "little")
    require(version == 1, f"{path}: stream format {version}, but this program reads format 1")
    damaged = f"{path}: the header is damaged, nothing can be played: copy the file again"
    require(len(data) >= HEADER.itemsize, damaged)
    h = np.frombuffer(data[:HEADER.itemsize], HEADER)[0]
    n, held_out = int(h["cameras"]), int(h["held_out"])
    end = HEADER.itemsize + CAMERA.itemsize * n
    require(data[end:end + 4] == struct.pack("<I", zlib.crc32(data[:end])), damaged)
    cameras = np.frombuffer(data[HEADER.itemsize:end], CAMERA)
    K, c2w, aabb, bg = (torch.tensor(a) for a in (cameras["K"], cameras["c2w"], h["aabb"], h["bg"]))
    return h, Video(Path(path).stem, "stream", 0, float(h["fps"]), c2w, K, int(h["H"]), int(h["W"]),
                    [], list(range(held_out, n)), list(range(held_out)), aabb, float(h["near"]),
                    float(h["far"]), bg, bool(h["ndc"]), None), end + 4


def pack_record(frame: int, kind: int, payload: bytes) -> bytes:
    head = RECORD.pack(b"FRAM", frame, kind, len(payload), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head[4:] + payload)) + payload


def read_record(data: bytes, at: int) -> Optional[tuple[int, int, int]]:
    """Frame, kind, and where the record at this offset ends; None where no whole record is."""
    if data[at:at + 4] != b"FRAM" or at + RECORD.size > len(data):
        return None
    _, frame, kind, length, _ = RECORD.unpack_from(data, at)
    end = at + RECORD.size + length
    whole = data[at:end] == pack_record(frame, kind, data[at + RECORD.size:end])
    return (frame, kind, end) if whole and kind in (KEY, DELTA) else None


def pack_index(records: dict, at: int) -> bytes:
    """Index and footer, which stand at offset `at`, of records {frame: (kind, begin, end)}."""
    index = b"INDX" + struct.pack("<I", len(records))
    index += b"".join(struct.pack("<IBQ", frame, *place[:2]) for frame, place in records.items())
    return index + struct.pack("<IQ8s", zlib.crc32(index), at, b"StrRFend")


def scan(data: bytes, at: int) -> tuple[dict, bool]:
    """All whole records from this offset on, {frame: (kind, begin, end)}, and whether there is
    nothing else but their index. Behind damage, the next record is found by its mark."""
    records, last = {}, -1
    while at >= 0:
        record = read_record(data, at)
        if record and record[0] > last:
            last, kind, end = record
            records[last] = kind, at, end
            at = end
        elif data[at:] == pack_index(records, at):
            return records, True
        else:
            at = data.find(b"FRAM", at + 1)
    return records, False


def write_frame(stream: Path, header, records: dict, frame: int, kind: int, prev: Grid, new: Grid,
                stored: Tensor) -> tuple[Grid, dict]:
    """Append a frame. When this returns, the frame is on disk, whatever happens next.
    -> the grid that a player decodes, on the CPU, and what the frame costs."""
    raw = encode_frame(header, kind, prev, new, stored)
    record, begin = pack_record(frame, kind, compress(raw)), stream.stat().st_size
    with open(stream, "ab") as file:
        file.write(record)
        file.flush()
        os.fsync(file.fileno())
    records[frame] = kind, begin, begin + len(record)
    decoded = decode_frame(header, kind, record[RECORD.size:], to_device(prev, "cpu"))
    return decoded, {"bytes": len(record), "raw": len(raw), "voxels": len(new.values),
                     "stored": float(stored.float().mean())}


class StreamReader:
    """Plays a stream. A frame is playable if its record is whole, and it is a key frame, or the
    frame before it is playable: damage costs the frames up to the next key frame; a note says so"""

    def __init__(self, path):
        require(os.path.isfile(path), f"{path}: there is no such file")
        self.path, self.data, self.playable = path, Path(path).read_bytes(), []
        self.header, self.video, begin = read_header(self.data, path)
        self.records, whole = scan(self.data, begin)
        for t, (kind, _, _) in self.records.items():
            if kind == KEY or self.playable and self.playable[-1] == t - 1:
                self.playable.append(t)
        require(self.playable, f"{path}: no frame can be played: copy the file again")
        last = max(self.records)
        missing = [str(t) for t in range(last + 1) if t not in self.playable]
        if missing or not whole:
            note(f"{path}: damaged, or not finished: frames {', '.join(missing) or 'none'} are "
                 f"missing, and any after {last}")

    def frames(self):
        """(t, grid) of all playable frames. Grids are not to be written to: the next one is a
        difference to them."""
        for t in self.playable:
            kind, begin, end = self.records[t]
            if kind == KEY:
                grid = empty_grid(self.header["size"], int(self.header["degree"]))
            try:
                grid = decode_frame(self.header, kind, self.data[begin + RECORD.size:end], grid)
            except (ValueError, lzma.LZMAError) as error:
                raise UserError(f"{self.path}: frame {t} was written wrongly: {error}") from None
            yield t, grid


# -------------------------------------------------------------------------- beyond the paper
# Closed loop. The next frame starts from the decoded state, not from what was optimised. So the
# encoder knows what the player sees, and errors of rounding do not add up: the next difference is
# taken to the rounded values, and corrects them where it matters.
#
# Damping (rmsprop_step). RMSProp divides a gradient by its own size, so the first step of a row is
# the whole learning rate, however small the gradient: walls that rest are moved by noise, and
# stored. With the typical gradient of the moving rows added to the divisor, small gradients make
# small steps. Example: gradients 1 and 0.01, damp 1: the mean of m is 0.5, the steps are lr / 1.7
# and lr / 72. Measured: a third of the bytes, and 0.9 dB more.

CHANGE, MEMORY = 0.03, 3            # tuned on stage: above its noise; frames until it has settled


def changed_pixels(now: Tensor, before: Tensor) -> Tensor:
    """Pixels where a channel, there or at a neighbour, differs by more than CHANGE from the last
    frame: (V, H, W, 3) each -> (V, H, W) bool."""
    return F.max_pool2d((now - before).abs().amax(-1)[:, None], 3, 1, 1)[:, 0] > CHANGE


def visual_hull(video, pixels: Tensor, shape, share: float = 0.8) -> Tensor:
    """Lattice points (X, Y, Z) bool that are seen at marked pixels (V, H, W) bool by at least
    `share` of the training cameras that look there (at least 3). What moves, and is not hidden
    from many cameras, is inside."""
    every = torch.ones(tuple(shape), dtype=torch.bool, device=pixels.device)
    low, high = video.aabb
    x = (every.nonzero() + 0.5) / torch.tensor(shape, device=pixels.device)
    x = low + x * (high - low)                                                      # (n, 3) world
    if video.ndc:                               # back into the space of the cameras
        K, z = video.K[0], 2 / (x[:, 2].clamp(max=0.999) - 1)
        x = torch.stack([-0.5 * video.W / K[0, 0] * x[:, 0] * z,
                         -0.5 * video.H / K[1, 1] * x[:, 1] * z, z], 1)
    looks, marked = torch.zeros(2, len(x), device=x.device)
    for camera, image in zip(video.train, pixels):
        K, c2w = video.K[camera], video.c2w[camera]
        c = (x - c2w[:, 3]) @ c2w[:, :3]                                            # camera's axes
        column = (K[0, 2] - K[0, 0] * c[:, 0] / c[:, 2]).floor()
        line = (K[1, 2] + K[1, 1] * c[:, 1] / c[:, 2]).floor()
        inside = (c[:, 2] < 0) & (column >= 0) & (column < video.W)
        inside &= (line >= 0) & (line < video.H)
        looks += inside
        marked[inside] += image[line[inside].long(), column[inside].long()]
    enough = looks >= min(3, len(video.train))
    return ((marked >= share * looks) & enough).view(every.shape)


@torch.no_grad()
def births(pilot: Grid, video, recent: Tensor) -> Tensor:
    """Points (X, Y, Z) bool in thin air where something new must have appeared. Empty space has no
    gradient, so nothing grows far from a surface. A changed pixel is explained if most of its
    weight comes from surfaces in the hull of all changed pixels. In the hull of the others, the
    pilot starts new voxels, with density --birth."""
    suspects = dilate(visual_hull(video, recent, pilot.links.shape))
    cells, others = cells_of(pilot.solid(1e-8)), torch.zeros_like(recent)
    last = torch.tensor(suspects.shape, device=recent.device) - 1
    for pixel in recent.flatten().nonzero()[:, 0].split(1 << 15):
        out = render(pilot, cells, *training_rays(video, pixel), video)
        x, y, z = torch.minimum(out["x"].round().long().clamp(min=0), last).unbind(1)
        explained = torch.zeros(len(pixel), device=pixel.device)
        explained.index_add_(0, out["ray"], out["weights"] * suspects[x, y, z])
        others.view(-1)[pixel[explained < 0.5]] = True
    return visual_hull(video, others, pilot.links.shape) & ~dilate(pilot.active)


def pixels_to_train(recent: Tensor, mask: Optional[Tensor], video, args) -> Optional[Tensor]:
    """Training pixels (m,) to draw from: seven tenths of them changed lately, the others lie
    anywhere. With mask (X, Y, Z): these only where their ray meets a point of it, as it teaches
    nothing there else. With --no-hull: all pixels (None)."""
    if not args.hull:
        return None
    n, changed = args.iterations * args.rays, recent.flatten().nonzero()[:, 0]
    others = torch.randint(recent.numel(), (n,), device=recent.device)
    if mask is not None:
        cells = cells_of(mask)
        meets = [sample_along_rays(cells, *training_rays(video, part), video)[3].diff() > 0
                 for part in others.split(1 << 16)]
        others = others[torch.cat(meets)]
    if len(changed) == 0:
        return others
    some = changed[torch.randint(len(changed), (round(0.7 * n),), device=recent.device)]
    return torch.cat([some, others[:n - len(some)]])


def compand(values: np.ndarray) -> np.ndarray:
    """Density s -> sign(s) sqrt|s|, other columns as they are: fine steps where a little matters,
    coarse ones where all is opaque. All machines round sqrt and products alike, and so see the same
    bits. Example: -9 -> -3."""
    out = values.copy()
    out[:, 0] = np.copysign(np.sqrt(np.abs(out[:, 0])), out[:, 0])
    return out


def quantise(steps: tuple, values: np.ndarray, guess: np.ndarray) -> bytes:
    """int8: q = round((compand(values) - compand(guess)) / scale), for each column with the scale
    max(step, largest difference / 127); an error of at most scale / 2. -> scale (C,) f32, q."""
    change = compand(values) - compand(guess)
    finest = np.array([steps[0]] + [steps[1]] * (change.shape[1] - 1))
    scale = np.maximum(finest, np.abs(change).max(0) / 127).astype("<f4")
    return scale.tobytes() + to_planes(np.rint(change / scale).clip(-127, 127).astype(np.int8))


def dequantise(scale: np.ndarray, q: np.ndarray, guess: np.ndarray) -> np.ndarray:
    values = compand(guess) + q * scale
    values[:, 0] *= np.abs(values[:, 0])                        # the inverse of compand
    return values


# -------------------------------------------------------------------- evaluation and playing

def evaluate(grid: Grid, video, frame: int, args: Args, pictures) -> dict:
    """Scores of a decoded frame, means over held-out cameras: psnr, ssim; psnr_moving, inside the
    true mask of what moves (None where there is none). pictures: folder for strips, or None."""
    cameras = video.test[:args.eval_views]
    views, scores, errors = to_device(video.read(frame), grid.links.device), [], []
    for i, camera in enumerate(cameras):
        (rgb, depth), target = render_image(grid, video, camera), views.images[camera]
        scores.append([float(psnr(rgb, target)), float(ssim(rgb, target))])
        errors.append((rgb - target).square().mean(-1))
        if pictures:
            strip = comparison_strip(target, rgb, depth, video.near, video.far)
            save_png(pictures / f"test_{i:03d}.png", strip)
    mean, moving = torch.tensor(scores).mean(0).tolist(), None
    if views.mask is not None:
        moving = float(-10 * torch.stack(errors)[views.mask[cameras] > 0].mean().log10())
    return {"psnr": mean[0], "ssim": mean[1], "psnr_moving": moving}


def show_changes(grid: Grid, video, frame: int, M: Tensor, stored: Tensor) -> Tensor:
    """A held-out camera: target | render | grey, yellow what might change, red what was stored."""
    camera = video.test[0]
    target = to_device(video.read(frame), M.device).images[camera]
    colours = grid.values[:, 1:].unflatten(1, (3, -1)).mean(1, keepdim=True).repeat(1, 3, 1)
    for marked, colour in ((M[grid.active], (0.9, 0.8, 0.2)), (stored, (0.8, 0.1, 0.1))):
        colours[marked] = 0
        colours[marked, :, 0] = (torch.tensor(colour, device=M.device) - 0.5) / 0.2821      # Y_0
    painted = Grid(grid.links, torch.cat([grid.values[:, :1], colours.flatten(1)], 1))
    images = [render_image(shown, video, camera)[0] for shown in (grid, painted)]
    return torch.cat([target, *images], 1)


def write_film(stream, film: Path, args: Args) -> None:
    """A flight among the cameras through the frames of a stream, --steps of them at most."""
    require(not args.play or not film.exists(), f"{film} exists already: move it away")
    reader = StreamReader(stream)
    n, video = min(args.steps, len(reader.playable)), to_device(reader.video, args.device)
    path = camera_path(video.c2w, video.ndc, n).to(args.device)
    flight = replace(video, c2w=path, K=video.K[:1].expand(n, 3, 3))
    images = [render_image(to_device(grid, args.device), flight, i)[0].cpu()
              for i, (_, grid) in zip(range(n), reader.frames())]
    save_video(film, images, fps=max(round(video.fps), 1))
    say(f"{n} frames in {film}")


# --------------------------------------------------------------------------------- training

# May change on --resume, as the cure of a loss that is not finite.
RATES = ("first_lr", "lr")


def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("first_rays", "rays", "pilot_iterations", "iterations",
                                "threshold", "key_every"),
                not_negative=("birth", "damp", "dilation", "erosion"))
    for name in (*RATES, "tv", "keep", "pilot_keep"):
        low = min(getattr(args, name))
        require(low > 0 or low == 0 and name not in RATES,
                f"--{name.replace('_', '-')} {getattr(args, name)}: must be greater than 0")
    require(all(side % 2 == 0 and 8 <= side <= 4096 for side in args.resolution),
            f"--resolution {args.resolution}: wanted even numbers from 8 to 4096")
    require(args.first_iterations > 1, f"--first-iterations {args.first_iterations}: too few")


def train(args: Args) -> Optional[dict]:
    """Encode a video frame by frame, score what a player sees; -> what summary.json holds."""
    check(args)
    if args.play:
        return write_film(args.play, Path(args.play).with_suffix(".mp4"), args)
    torch.manual_seed(args.seed)
    video = load_video(args.scene, args.data, args.size, args.steps, args.background)
    if video.kind != "builtin":
        video = replace(video, bg=torch.full((3,), 0.5))
    video = to_device(video, args.device)
    run = TrainingRun("streamrf", video.name, args, RATES)
    if args.as_released:
        args = replace(args, hull=False, birth=0.0, damp=0.0, values="fp16")
    head, stream = pack_header(video, args), run.path / "stream.srf"
    header = read_header(head, stream)[0]
    nothing = to_device(empty_grid(args.resolution, args.degree), args.device)
    full, pilot = replace(nothing), replace(nothing)
    recent, records, books, previous, M = {}, {}, {}, None, None

    def score(_, pictures):
        now, frames = run.step - 1, [(run.step - 1, full)]
        if args.eval_only:
            frames = StreamReader(stream).frames()
        for t, grid in frames:
            folder = pictures if t == now else None
            if t == now or "psnr" in books.get(t, {}):          # those scored in training
                books[t].update(evaluate(to_device(grid, args.device), video, t, args, folder))
        if M is not None:
            (run.path / "changes").mkdir(exist_ok=True)
            image = show_changes(full, video, now, M, stored)
            save_png(run.path / "changes" / f"{now:03d}.png", image)
        video.read(min(now + 1, video.frames - 1))  # is kept: no clock runs while it is read
        return {name: mean_of(books, name) for name in ("psnr", "ssim", "psnr_moving")}

    parts = {"field": full, "pilot": pilot, "recent": recent, "records": records, "books": books}
    for frame in run.loop(parts, score, steps=video.frames, empty="use a lower --first-lr"):
        if previous is None:                        # the first frame of this process
            if frame:                               # cut off what came after the checkpoint
                os.truncate(stream, records[frame - 1][2])
            else:
                stream.write_bytes(head)
            previous = to_device(video.read(max(frame - 1, 0)), args.device).images[video.train]
        images = to_device(video.read(frame), args.device).images[video.train]
        target = images.flatten(0, 2)                                               # (P, 3)
        # 1. where pixels changed in the last MEMORY frames
        changed = changed_pixels(images, previous)[None]                            # (1, V, H, W)
        seen = torch.cat([recent.get("pixels", changed).to(changed), changed])[-MEMORY:]
        recent["pixels"], previous = seen, images
        # 2. the grid of this frame
        if frame == 0 or args.mode == "scratch":
            new, out = first_frame(video, target, args)
            M = torch.ones_like(new.active)
        else:
            new, stored, M, out = next_frame(full, pilot, video, target, seen.any(0), args)
        # 3. its bytes, and what a player makes of them: the next frame starts from there
        kind, prev = DELTA, full
        if args.mode == "scratch" or frame % args.key_every == 0:
            kind, prev = KEY, nothing
            stored = torch.ones(len(new.values), dtype=torch.bool, device=args.device)
        may_change = float(M[new.active].float().mean())
        decoded, cost = write_frame(stream, header, records, frame, kind, prev, new, stored)
        full.load_state_dict(vars(decoded))
        books[frame] = {**cost, "may_change": may_change}
        # 4. a pilot for the frames to come
        if frame == 0 and args.mode in ("pilot", "full"):
            half = [side // 2 for side in args.resolution]
            pilot.load_state_dict(vars(full.resample(half, args.threshold, 1)))
            optimise(pilot, video, target, 4 * args.pilot_iterations, args.rays, args.lr, args)
        run.log(loss=out["loss"], opacity=out["opacity"])
        run.count(rays=out["rays"])
    if not args.eval_only:
        end = records[len(records) - 1][2]
        os.truncate(stream, end)                    # the old index, if a finished run is resumed
        with open(stream, "ab") as file:
            file.write(pack_index(records, end))
    if args.video:
        write_film(stream, run.path / "render.mp4", args)
    return finish(run, args, video, books, encode_frame(
        header, KEY, nothing, full, torch.ones(len(full.values), dtype=torch.bool)))


def finish(run: TrainingRun, args: Args, video, books: dict, whole: bytes) -> dict:
    """summary.json, and what a later frame costs against `whole`, the last frame in sparse fp16:
    both before LZMA, and both after it."""
    later = {t: book for t, book in books.items() if t} or books
    means = {name: mean_of(later, name) for name in ("bytes", "raw", "stored", "may_change")}
    packed = len(compress(whole))
    say(f"later frames {means['bytes'] / 1000:.1f} kB: 1/{packed / means['bytes']:.0f} of a sparse "
        f"fp16 frame; before LZMA {means['raw'] / 1000:.1f} kB, 1/{len(whole) / means['raw']:.0f}")
    return run.finish(data=video.kind, mode=args.mode, **means, raw_sparse_fp16=len(whole),
                      bytes_sparse_fp16=packed, per_frame=list(books.values()))


def mean_of(books: dict, name: str) -> Optional[float]:
    """Mean over the frames that have this number."""
    values = [book[name] for book in books.values() if book.get(name) is not None]
    return sum(values) / len(values) if values else None


if __name__ == "__main__":
    cli(PRESETS, train)
