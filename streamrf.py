"""StreamRF: a video as a voxel grid and its differences (Li et al., NeurIPS 2022, arXiv 2210.14831)

Several cameras film a scene. For the first frame, a sparse voxel grid of density and colour is
optimised well. Each later frame starts from the grid of the frame before it, and gets 60 iterations
instead of 600. First the pilot, a grid of half the resolution, is optimised on the new frame. The
full grid may only change where the pilot changed and, a second mask, in a narrow band around the
border of the existing voxels (or where the pilot gained some). Voxels that hardly changed get their
last values back. What is left, a small difference, is appended to a file, the stream. No later
frame is used, so a video can be encoded while it is filmed (next_frame).

    where the half-resolution model changed                         next_pilot
    what may change: pilot's changes, dilated, within the band      masks_of_frame
    what of the new grid is stored, what is put back                keep_large_changes
    density and colour from interpolated values of 8 points         render       (Plenoxels, 3.1)
    frame 0, coarse to fine, with total variation                   first_frame  (Plenoxels, 3.4)
    a difference as bytes, and back                                 encode_frame, decode_frame

Ours: hull, births, damping, int8, the opacity test (--as-released turns them off); in all modes key
frames, rounding in the loop, some rules of the masks.
    python streamrf.py                             30.6 dB, 54 kB a later frame: 1/33 of a whole one
    python streamrf.py --play runs/.../stream.srf  a film of it, from the file alone
    --size 40 --resolution 40 40 40 --steps 9:           dB    kB and s per later frame
    --mode scratch                                      29.2   518  26   sparse fp16
    --mode warm --no-hull --keep 0 0                    27.9   222  2.3  from the last frame on
    --mode warm --no-hull                               27.9   103  2.3  and small changes undone
    --no-hull --birth 0                                 28.1   102  3.0  and both masks
    --no-hull                                           28.4    92  3.0  and births
    (the default)                                       28.8    29  2.9  and the hull
    --as-released --lr 1 1 1e-2 3e-3 (the paper's)      27.5    87  3.5  fp16, no damping
"""
from __future__ import annotations

import lzma
import math
import re
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import (RunArgs, TrainingRun, Video, check_flags, cli, comparison_strip, load_video,
                    ndc_rays, note, pixel_rays, psnr, require, save_png, save_video, say,
                    spherical_harmonics, ssim, to_device)
from kernels import composite, march, voxel_interp


@dataclass
class Args(RunArgs):
    scene: str = "stage"            # a video's name under --data, a path, or the built-in `stage`
    size: int = 64                  # longer image side [pixels]
    steps: int = 12
    """Frames to encode, or to play: a step of the run is one frame of the video."""
    eval_every: int = 1             # frames, from one score and checkpoint to the next
    play: str | None = None
    """Play this stream instead of training: what a held-out camera sees, as a film beside it."""
    mode: Literal["scratch", "warm", "band", "pilot", "full"] = "full"
    """scratch: each frame anew. warm: from the last one, all voxels free. band, pilot: one mask.
    full: both. The hull is a further mask: --no-hull --birth 0 shows those of the paper alone."""
    as_released: bool = False
    """No hull, births, damping, int8 and opacity test, as released."""
    hull: bool = True
    """Ours. Only what is near the visual hull of recently changed pixels may change; 0.7 or more of
    the rays come from these pixels."""
    birth: float = 5.0
    """Ours. Density of new pilot voxels where no surface explains a changed pixel; 0: none."""
    damp: float = 1.0               # damping of small gradients in later frames; 0: none (paper)
    resolution: tuple[int, int, int] = (64, 64, 64)
    """Lattice points along x, y, z; the pilot has half of each."""
    degree: Literal[0, 1, 2] = 1    # of the spherical harmonics: (degree + 1)^2 of each colour
    first_iterations: int = 600     # of the optimiser in frame 0 (--mode scratch: in every frame)
    first_rays: int = 2048          # rays of each of them
    pilot_iterations: int = 30      # of the pilot in a later frame (four times as many in frame 0)
    iterations: int = 60            # iterations of the full model in a later frame
    rays: int = 704                 # rays of each iteration of pilot and full model
    first_lr: tuple[float, float, float, float] = (3.0, 0.3, 0.05, 0.002)
    """Learning rates of frame 0: density first and last [1/length], coefficients first and last."""
    lr: tuple[float, float, float, float] = (3.0, 1.0, 0.15, 0.01)  # of later frames and pilot
    keep: tuple[float, float] = (0.05, 0.3)
    """A change is stored if it is larger: of opacity, of visible coefficients (their sum)."""
    pilot_keep: tuple[float, float] = (0.05, 1.0)      # the same for the pilot: what is a change
    key_every: int = 30             # frames from one that is stored whole, a key frame, to the next


PRESETS = {                     # paper: its sizes; --as-released adds its rules
    "quick": Args(),
    "paper": Args(preset="paper", scene="flame_salmon_1", size=1352, steps=300, hull=False,
                  resolution=(512, 512, 128), degree=2, first_iterations=128_000, first_rays=5000,
                  pilot_iterations=750, iterations=500, rays=20_000, lr=(1.0, 1.0, 1e-2, 3e-3),
                  first_lr=(30.0, 1.1, 1e-2, 2e-4), keep=(0.05, 1.0), pilot_keep=(0.05, 0.5)),
}
THRESHOLD = 5.0                 # a voxel is solid from this density on [1/length]; all as released
DILATION, EROSION = 2, 6        # the band: points outside and inside the border; pruning: outside
TV = 5e-4, 5e-3                 # weights of total variation: of density, of coefficients
EARLY_STOP = 0.01               # a ray ends at this transmittance


# ---------------------------------------------------------------------------- the sparse grid
# A lattice of X x Y x Z points stands in the scene's box: point i of X at (i + 1/2) / X of its
# length. Values live on points: one that has values is called a voxel, as in Plenoxels, and its row
# is their place in `values`. In a cell, the cube between 8 points, values are interpolated; a point
# that is no voxel counts as 0 there.

@dataclass
class Grid:
    """The model of a frame. Rows are in raster order of their voxels: x slowest, z fastest."""
    links: Tensor           # (X, Y, Z) int32: the point's row, or -1: no voxel
    values: Tensor          # (G, C) float32: density [1/length], any sign; then the coefficients
                            # of the spherical harmonics of red, of green, of blue

    @property
    def active(self) -> Tensor:
        """Which points are voxels: (X, Y, Z) bool."""
        return self.links >= 0

    def values_at(self, rows: Tensor) -> Tensor:
        """Values of rows (...) int, 0 where the row is -1: (..., C)."""
        values = self.values.new_zeros(*rows.shape, self.values.shape[1])
        values[rows >= 0] = self.values[rows[rows >= 0].long()]
        return values

    def solid(self, threshold: float = THRESHOLD) -> Tensor:
        """Voxels whose density reaches the threshold: (X, Y, Z) bool."""
        return scatter(self.active, self.values[:, 0] >= threshold)

    def restrict(self, mask: Tensor) -> Grid:
        """The grid with exactly the voxels of mask (X, Y, Z); new ones have the value 0."""
        return grid_from(mask, self.values_at(self.links[mask]))

    def prune(self, dilation: int) -> Grid:
        """The grid without the voxels that are further than `dilation` from solid ones."""
        near = self.active & dilate(self.solid(), dilation)
        require(near.any(), f"no voxel reaches density {THRESHOLD}: use more --first-iterations")
        return self.restrict(near)

    def resample(self, shape) -> Grid:
        """The grid at another resolution, with a voxel at each point."""
        mask = torch.ones(tuple(shape), dtype=torch.bool, device=self.links.device)
        x = coordinates(mask, self.links.shape)
        return grid_from(mask, voxel_interp(x, self.links, self.values))


# -------------------------------------------------- one frame: what may change, and what is kept

def next_frame(prev: Grid, pilot: Grid, pilot_masks, video, target: Tensor, recent: Tensor, args):
    """-> the grid of the frame; stored (G,), its voxels to be written; M (X, Y, Z), what could
    change; what optimise returns. prev: the last grid; pilot: that of this frame."""
    # 1. what may change, and what the new grid starts with
    exists, hull, out = prev.active, None, {}
    if args.hull:
        hull = dilate(visual_hull(video, recent, exists.shape), 2)
    M, start, seeds, cleared = masks_of_frame(exists, pilot_masks, hull, args)
    new = prev.restrict(start)
    x = coordinates(seeds, pilot.links.shape)
    new.values[new.links[seeds].long()] = voxel_interp(x, pilot.links, pilot.values)
    new.values[new.links[cleared].long()] = 0.0
    # 2. optimise what may change
    pixels = pixels_to_train(recent, M & start, video, args)
    if (M & start).any() and len(pixels):
        out = optimise(new, video, target, pixels, args.rays,
                       learning_rates(args.lr, args.iterations), M[start], args.damp)
    # 3. of what could change, voxels far from solid ones are removed; small changes are undone
    near = dilate(new.solid(), DILATION)
    new = new.restrict(start & (near | (exists & ~M)))
    new, stored = keep_large_changes(prev, new, video, args.keep, args.as_released)
    return new, stored, M, out


def next_pilot(pilot: Grid, video, target: Tensor, recent: Tensor, args):
    """Optimise all voxels of the pilot on the new frame, and compare it with the last pilot: cheap,
    as its lattice has an eighth of the points. -> the new pilot; masks of its lattice: changed
    (much, or new), added, removed. It is never stored, nor corrected by the full model.
    target (P, 3): training pixels, P = V H W; recent (V, H, W) bool: which changed lately."""
    born = births(pilot, video, recent) if args.birth else torch.zeros_like(pilot.active)
    new = pilot.restrict(dilate(pilot.active) | born)
    new.values[new.links[born].long(), 0] = args.birth
    pixels = pixels_to_train(recent, None, video, args)
    rates = learning_rates(args.lr, args.pilot_iterations)
    optimise(new, video, target, pixels, args.rays, rates, damp=args.damp)
    new, stored = keep_large_changes(pilot, new.prune(1), video, args.pilot_keep, args.as_released)
    changed = scatter(new.active, stored)
    return new, (changed, new.active & ~pilot.active, pilot.active & ~new.active)


# Example of the masks: on a lattice of 6 x 6, an object (all voxels solid) loses a corner and grows
# sideways; DILATION 1 and EROSION 2. The pilot (3 x 3) lost its point in row 1, column 0: rows 2-3,
# columns 0-1 of the lattice. It gained that in row 2, column 2: rows 4-5, columns 4-5.
#    exists      band        pilot       M           start       stored
#    ......      ......      ......      ......      ......      ......
#    ......      #####.      ---...      ####..      0000..      ......
#    oooo..      #####.      ---...      #####.      ccco0.      .#oo..
#    oooo..      #####.      ---+++      ######      cccoss      ##oo..
#    oooo..      ..###.      ---+++      ..####      oocoss      oooo##
#    oooo..      ..###.      ...+++      ..####      ooooss      oooo##
# pilot: lost -, gained +, upsampled, with a margin of one point. start: old o, new 0, seeded s,
# cleared c: too many, the optimisation fills column 2 again, and empties the seeds of row 3. stored
# (#): what differs from the last frame; others (o) cost a bit each. Removed: the outermost voxel of
# the corner, which is far from solid ones, and new voxels whose values came out near 0.

def masks_of_frame(exists: Tensor, pilot_masks: tuple | None, hull: Tensor | None, args):
    """-> masks (X, Y, Z) bool: M, what may change; what the new grid starts with, and, among that,
    the seeded and the cleared voxels. exists: voxels of the last frame.

        band = dilate(exists, DILATION) minus erode(exists, EROSION)
        M = dilate(changed or removed) within (band or added), within hull
        seeds = added within M, where nothing exists        cleared = removed within M
        start = exists or (dilate(exists, DILATION) within M) or seeds

    hull: None, or a further mask. --mode pilot: the band is everywhere; band, warm: no pilot.
    Why a band: between two frames a surface moves by a few points; voxels deeper inside are hidden,
    and only total variation would change them.
    Seeds start with the pilot's values, other new voxels and cleared ones with 0. A voxel of
    density 0 beside a solid one can grow, as samples between them have sigma > 0; one far from all
    surfaces has no gradient, as relu is flat there: hence seeds.
    Released code: M = dilate(changed) in the band; pilot values replace those of existing voxels,
    which are finer; what is removed is cleared outside of M, too, where nothing can correct it."""
    band = torch.ones_like(exists)
    added = removed = torch.zeros_like(exists)
    if args.mode in ("band", "full"):
        band = dilate(exists, DILATION) & dilate(~exists, EROSION)
    M = band
    if args.mode in ("pilot", "full"):
        changed, added, removed = (upsample(mask, exists.shape) for mask in pilot_masks)
        M = dilate(changed | removed) & (band | added)
    if hull is not None:
        M = M & hull
    seeds = added & M & ~exists
    cleared = removed & M & exists
    start = exists | (dilate(exists, DILATION) & M) | seeds
    return M, start, seeds, cleared


def keep_large_changes(prev: Grid, new: Grid, video, keep: tuple, released: bool = False):
    """Undo small changes: an old voxel gets its values back, a new one is removed. -> the grid;
    stored (G,) bool, the voxels whose change was large.

        alpha = 1 - exp(-max(0, density) side)
        visible = the largest alpha of a voxel and its 26 neighbours, before or after
        stored: |change of alpha| > keep[0] or visible sum |change of coefficients| > keep[1]

    side: mean distance of two points. Neighbours: a voxel of density 0 beside a solid one colours
    what is between them. A new voxel changes from 0. Example: keep = (0.05, 0.3), side 0.03: from
    density 40 to 50, alpha changes from 0.70 to 0.78: stored; from 200 to 300, 0.9975 to 0.9999:
    not. Released code: stored is what sum |change of coefficients| > keep[1] (new ones: a fifth of
    it), so a surface that fades stays."""
    rows = prev.links[new.active]                                                   # (G,)
    is_new, old = rows < 0, prev.values_at(rows)
    change = (new.values[:, 1:] - old[:, 1:]).abs().sum(1)
    if released:
        stored = change > torch.where(is_new, keep[1] / 5, keep[1])
    else:
        sides = (video.aabb[1] - video.aabb[0]) / torch.tensor(new.links.shape, device=rows.device)
        side = float(sides.prod()) ** (1 / 3)
        before, after = (1 - torch.exp(-side * v[:, 0].relu()) for v in (old, new.values))
        visible = torch.zeros(new.links.shape, device=rows.device)
        visible[new.active] = torch.maximum(before, after)
        visible = F.max_pool3d(visible[None, None], 3, 1, 1)[0, 0][new.active]
        stored = ((before - after).abs() > keep[0]) | (visible * change > keep[1])
    values = torch.where(stored[:, None], new.values, old)
    kept = stored | ~is_new
    return grid_from(scatter(new.active, kept), values[kept]), stored[kept]


# ------------------------------------------------------------------ operations on masks and grids

def grid_from(mask: Tensor, values: Tensor) -> Grid:
    """The grid with these voxels: mask (X, Y, Z) bool, values (G, C) in raster order."""
    links = torch.full(mask.shape, -1, dtype=torch.int32, device=mask.device)
    links[mask] = torch.arange(len(values), dtype=torch.int32, device=mask.device)
    return Grid(links, values)


def scatter(mask: Tensor, marked: Tensor) -> Tensor:
    """Which points of mask (X, Y, Z) are marked, given (G,) bool in raster order: (X, Y, Z)."""
    return torch.zeros_like(mask).masked_scatter(mask, marked)


def dilate(mask: Tensor, times: int = 1) -> Tensor:
    """Points within `times` steps, diagonals included, of a point of mask (X, Y, Z) bool."""
    x = mask[None, None].float()
    for _ in range(times):
        x = F.max_pool3d(x, 3, 1, 1)
    return x[0, 0] > 0


def upsample(mask: Tensor, shape) -> Tensor:
    """Points of a finer lattice where interpolating mask gives more than 0: 4 x 4 x 4 of one."""
    return F.interpolate(mask[None, None].float(), tuple(shape), mode="trilinear")[0, 0] > 0


def coordinates(mask: Tensor, shape) -> Tensor:
    """The points of mask in coordinates of a lattice of `shape` in the same box: (n, 3).
    (i + 1/2) ratio - 1/2. Example: from 4 points to 2, point 0 is at 1/2 * 1/2 - 1/2 = -1/4."""
    ratio = torch.tensor([b / a for a, b in zip(mask.shape, shape)], device=mask.device)
    return (mask.nonzero() + 0.5) * ratio - 0.5


# --------------------------------------------------------------------- rendering (Plenoxels)
# Lattice coordinates along one axis, X = 4, and the cells between neighbouring points:
#
#     point            0     1     2     3          beyond the outermost points their values hold
#     coordinate -1    0     1     2     3    4     for one more cell, which the box cuts in half
#     cell        |  0 |  1  |  2  |  3  | 4  |     X + 1 cells: cell i is between i - 1 and i
#     box            |                     |        from -1/2 to X - 1/2

def cells_of(mask: Tensor) -> Tensor:
    """Cells that touch a point of mask (X, Y, Z): (X+1, Y+1, Z+1) bool."""
    return F.max_pool3d(mask[None, None].float(), 2, 1, 1)[0, 0] > 0


def sample_along_rays(cells: Tensor, rays_o: Tensor, rays_d: Tensor, video):
    """Samples every half voxel of rays (R, 3) through these cells: x (N, 3) lattice coordinates,
    t_starts, t_ends (N,) along rays_d, offsets (R+1,), ray (N,). march walks in lattice
    coordinates; `unit` is the length along rays_d of a step of 1 there: 1 / |scale d|."""
    shape = torch.tensor(cells.shape, device=rays_o.device) - 1.0                   # (3,)
    scale = shape / (video.aabb[1] - video.aabb[0])
    unit = 1 / (rays_d * scale).norm(dim=1)                                         # (R,)
    o = (rays_o + video.near * rays_d - video.aabb[0]) * scale - 0.5
    d = rays_d * scale * unit[:, None]
    box = torch.stack([torch.full_like(shape, -1), shape])                          # of cells
    a, b, offsets, ray = march(o, d, cells, box, 0.5)
    x = o[ray] + (0.5 * (a + b))[:, None] * d[ray]
    return x, video.near + a * unit[ray], video.near + b * unit[ray], offsets, ray


def render(grid: Grid, cells: Tensor, rays_o: Tensor, rays_d: Tensor, video,
           row_mask: Tensor | None = None) -> dict:
    """Volume rendering of rays (R, 3), with f the interpolated values, Y spherical harmonics:

        sigma = max(0, f_0),    colour of a channel = max(0, 1/2 + sum_b f_b Y_b(direction)),
        T_i = exp(-sum_{j<i} sigma_j delta_j),    w_i = T_i (1 - exp(-sigma_i delta_i)),
        rgb = sum_i w_i colour_i + (1 - opacity) bg,    opacity = sum_i w_i.

    -> rgb (R, 3), opacity, depth (R,); of the N samples x (N, 3), weights, ray (N,). cells: where
    to look; cells_of voxels with density above 0 is enough. Gradient to the rows of grid.values in
    row_mask (G,) bool (None: all). Where sigma is 0 there is none: surfaces grow at rims only."""
    x, t_starts, t_ends, offsets, ray = sample_along_rays(cells, rays_o, rays_d, video)
    f = voxel_interp(x, grid.links, grid.values, row_mask)                          # (N, 1 + 3 B)
    Y = spherical_harmonics(rays_d, math.isqrt(f.shape[1] // 3))                    # (R, B)
    colours = 0.5 + (f[:, 1:].unflatten(1, (3, -1)) * Y[ray][:, None]).sum(-1)      # (N, 3)
    rgb, opacity, depth, weights = composite(
        torch.relu(f[:, 0]), torch.relu(colours), t_starts, t_ends, offsets, EARLY_STOP)
    return {"rgb": rgb + (1 - opacity[:, None]) * video.bg, "opacity": opacity, "depth": depth,
            "x": x, "weights": weights, "ray": ray}


def rays_of(video, cameras: list, pixel: Tensor) -> tuple[Tensor, Tensor]:
    """Rays of pixels (R,), flat indices into (cameras, H, W): rays_o, rays_d (R, 3). In NDC, if the
    video is: one space for all cameras, with the intrinsics of the first."""
    camera = torch.tensor(cameras, device=pixel.device)[pixel // (video.H * video.W)]
    xy = torch.stack([pixel % video.W, pixel // video.W % video.H], 1) + 0.5
    rays = pixel_rays(xy, video.K[camera], video.c2w[camera])
    return ndc_rays(*rays, video.K[0], video.H, video.W) if video.ndc else rays


@torch.no_grad()
def render_image(grid: Grid, video, camera: int) -> tuple[Tensor, Tensor]:
    """What a camera sees: rgb (H, W, 3) in [0, 1], depth (H, W)."""
    cells, parts = cells_of(grid.solid(1e-8)), []
    for pixel in torch.arange(video.H * video.W, device=video.aabb.device).split(1 << 15):
        out = render(grid, cells, *rays_of(video, [camera], pixel), video)
        parts.append(torch.cat([out["rgb"].clamp(0, 1), out["depth"][:, None]], 1))
    image = torch.cat(parts).view(video.H, video.W, 4)
    return image[..., :3], image[..., 3]


# ----------------------------------------------------- optimising the grid of a frame (Plenoxels)

def neighbours(grid: Grid) -> Tensor:
    """Rows of each voxel, and of the next points along x, y and z (-1: no voxel): (4, G) int."""
    links = F.pad(grid.links, (0, 1, 0, 1, 0, 1), value=-1)
    nexts = links[:-1, :-1, :-1], links[1:, :-1, :-1], links[:-1, 1:, :-1], links[:-1, :-1, 1:]
    return torch.stack([rows[grid.active] for rows in nexts]).long()


def tv_gradient(grid: Grid, rows: Tensor, weight: Tensor, grad: Tensor) -> None:
    """Add the gradient of total variation at n voxels, rows (4, n) of neighbours, to grad (G, C).

        TV = weight/n sum_voxels sqrt(1e-9 + sum_axes d^2),   d = v[next along the axis] - v[voxel]

    weight (C,). As in Plenoxels, a point that is no voxel has density 0, which pulls rims down, and
    no colour (d = 0), and the gradient along an axis of X points is multiplied by X / 256. Why TV:
    specks that few rays look through would change from frame to frame, and be stored."""
    v = grid.values_at(rows)                                                        # (4, n, C)
    d = v[1:] - v[0]                                                                # (3, n, C)
    d[:, :, 1:] *= (rows[1:] >= 0)[:, :, None]
    norm = (1e-9 + d.square().sum(0)).sqrt()
    share = torch.tensor(grid.links.shape, device=rows.device) / 256
    g = weight / rows.shape[1] * d * share[:, None, None] / norm
    g, rows = torch.cat([-g.sum(0, keepdim=True), g]).flatten(0, 1), rows.flatten()
    there = rows >= 0
    grad.index_add_(0, rows[there], g[there])


def rmsprop_step(values: Tensor, grad: Tensor, m: Tensor, lr: Tensor, damp: float) -> None:
    """RMSProp that moves only rows with a gradient, in place. m (G, C): their mean of g^2.
    damp is 0 in frame 0; why it is not later: `beyond the paper`.

        m <- g^2 the first time, then 0.95 m + 0.05 g^2
        values <- values - lr g / (sqrt(m) + damp sqrt(mean of m over the rows) + 1e-8)   lr (C,)"""
    rows = (grad != 0).any(1).nonzero()[:, 0]
    g, before = grad[rows], m[rows]
    after = torch.where(before == 0, g * g, 0.95 * before + 0.05 * g * g)
    m[rows] = after
    values[rows] -= lr * g / (after.sqrt() + damp * after.mean(0).sqrt() + 1e-8)


def learning_rates(lr: tuple, iterations: int) -> Tensor:
    """Log-linear from first to (nearly) last, see Args: (iterations, 2), density, coefficients."""
    return torch.tensor([[lr[i] * (lr[i + 1] / lr[i]) ** (k / iterations) for i in (0, 2)]
                         for k in range(iterations)])


def optimise(grid: Grid, video, target: Tensor, pixels: Tensor, rays: int, rates: Tensor,
             row_mask: Tensor | None = None, damp: float = 0.0) -> dict:
    """Minimise the squared error of one frame, and TV, from grid.values on, which it replaces.
    target (P, 3): all training pixels. pixels (n,): those that each iteration draws its `rays`
    from. rates: see learning_rates. row_mask (G,) bool: rows that may change (None: all).
    -> loss and opacity of the last batch."""
    device, values = target.device, grid.values.requires_grad_()
    m, rows, column = torch.zeros_like(values), neighbours(grid), [0] + [1] * (values.shape[1] - 1)
    weight, rates = torch.tensor(TV, device=device)[column], rates.to(device)[:, column]
    if row_mask is not None:
        rows = rows[:, row_mask]
    n_tv = min(rows.shape[1] // 10 + 1, 1 << 18)    # a tenth of them at a time is enough
    for k, lr in enumerate(rates):                  # lr (C,)
        if k % 8 == 0:                              # voxels that grow above 0 in between wait
            cells = cells_of(grid.solid(1e-8))
        pixel = pixels[torch.randint(len(pixels), (rays,), device=device)]
        out = render(grid, cells, *rays_of(video, video.train, pixel), video, row_mask)
        loss = (out["rgb"] - target[pixel]).square().mean()
        if video.kind != "builtin":                 # photographs, see first_frame
            loss = loss + (1 - out["opacity"]).square().mean() / 12
        with torch.no_grad():
            grad, = torch.autograd.grad(loss, values)
            some = torch.randint(rows.shape[1], (n_tv,), device=device)
            tv_gradient(grid, rows[:, some], weight, grad)
            if row_mask is not None:
                grad *= row_mask[:, None]
            rmsprop_step(values, grad, m, lr, damp)
    grid.values = values.detach()
    return {"loss": loss, "opacity": out["opacity"].mean()}


def first_frame(video, target: Tensor, args) -> tuple[Grid, dict]:
    """A frame without a past: -> grid, and what optimise returns. Coarse to fine:
    1. half of the iterations at half the resolution, from grey voxels of density 0.1 everywhere;
    2. interpolated to the full resolution, and pruned; 3. the other half of the iterations.
    Photographs have no alpha, so a grid could stay transparent where the background has their
    colour. So optimise takes the mean of the loss over all grey backgrounds: that on middle grey,
    plus (1 - opacity)^2 times their variance, 1/12. And the outer faces of the box (in NDC all but
    the near one) start opaque."""
    shape = [side // 2 for side in args.resolution]
    values = torch.zeros(*shape, 1 + 3 * (args.degree + 1) ** 2, device=target.device)
    values[..., 0] = 0.1
    if video.kind != "builtin":
        sides = (video.aabb[1] - video.aabb[0]) / torch.tensor(shape, device=target.device)
        values[..., 0] = 6 / float(sides.max())                 # half a voxel lets exp(-3) through
        values[1:-1, 1:-1, (0 if video.ndc else 1):-1, 0] = 0.1
    grid = grid_from(torch.ones_like(values[..., 0], dtype=torch.bool), values.flatten(0, 2))
    pixels, half = torch.arange(len(target), device=target.device), args.first_iterations // 2
    rates = learning_rates(args.first_lr, args.first_iterations)
    optimise(grid, video, target, pixels, args.first_rays, rates[:half])
    grid = grid.resample(args.resolution).prune(DILATION)
    out = optimise(grid, video, target, pixels, args.first_rays, rates[half:])
    return grid.prune(DILATION), out


# ------------------------------------------------------------ the stream: one frame <-> bytes
# payload = LZMA( X Y Z bits: voxels that appear or vanish | a bit for each voxel that stays: is it
#           stored? | int8: scale, C x f32 | new voxels, then stored ones, column by column:
#           int8 steps, or differences of the bits of fp16 ). All counts follow from the bits.

KEY, DELTA = 0, 1               # a key frame is a difference to a grid without voxels
LZMA = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 1 << 23, "lc": 3, "lp": 0, "pb": 0}]


def half_bits(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest finite fp16, as uint16: close integers for close numbers of one sign."""
    return np.clip(values, -65504, 65504).astype("<f2").view("<u2")


def encode_frame(header, kind: int, prev: Grid, new: Grid, stored: Tensor) -> tuple[bytes, int]:
    """The payload of a frame, and its length before LZMA. prev: the last frame as decoded (of a key
    frame: no voxels); stored (G,) bool: rows of new to be written, the others are as in prev."""
    old_rows = prev.links[new.active]                           # (G,), -1: the voxel is new
    old, values = prev.values_at(old_rows).cpu().numpy(), new.values.cpu().numpy()
    is_old, stored = (old_rows >= 0).cpu().numpy(), stored.cpu().numpy()
    rows = np.r_[np.flatnonzero(~is_old), np.flatnonzero(stored & is_old)]
    raw = np.packbits((prev.active ^ new.active).cpu().numpy()).tobytes()
    raw += np.packbits(stored[is_old]).tobytes()
    if len(rows) and kind == DELTA and header["int8"]:
        change = compand(values[rows]) - compand(old[rows])
        steps = np.r_[INT8_STEPS[0], np.full(values.shape[1] - 1, INT8_STEPS[1])]
        scale = np.maximum(steps, np.abs(change).max(0) / 127).astype("<f4")        # (C,)
        q = np.rint(change / scale).clip(-127, 127).astype(np.int8)         # off by scale / 2
        raw += scale.tobytes() + q.T.tobytes()
    else:                       # modulo 2^16; all low bytes, then all high ones: alike beside alike
        bits = half_bits(values[rows]) - half_bits(old[rows])
        raw += np.ascontiguousarray(bits.T).view(np.uint8).reshape(-1, 2).T.tobytes()
    return lzma.compress(raw, lzma.FORMAT_RAW, filters=LZMA), len(raw)


def decode_frame(header, kind: int, payload: bytes, prev: Grid) -> Grid:
    """The frame of a payload, on the CPU, as prev."""
    raw = np.frombuffer(lzma.decompress(payload, lzma.FORMAT_RAW, filters=LZMA), np.uint8)
    points, columns = prev.links.numel(), prev.values.shape[1]
    flips, raw = np.split(raw, [(points + 7) // 8])
    active = prev.active ^ torch.from_numpy(
        np.unpackbits(flips, count=points)).bool().view(prev.links.shape)
    old_rows = prev.links[active]                               # (G,), -1: the voxel is new
    values, old = prev.values_at(old_rows).numpy(), np.flatnonzero(old_rows >= 0)
    bits, raw = np.split(raw, [(len(old) + 7) // 8])
    stored = np.unpackbits(bits, count=len(old)).astype(bool)
    rows = np.r_[np.flatnonzero(old_rows < 0), old[stored]]
    if len(rows) and kind == DELTA and header["int8"]:
        scale, raw = np.split(raw, [4 * columns])
        q = raw.view("i1").reshape(columns, -1).T
        values[rows] = compand(values[rows]) + q * scale.view("<f4")
        values[rows, 0] *= np.abs(values[rows, 0])                  # the inverse of compand
    else:
        bits = np.ascontiguousarray(raw.reshape(2, -1).T).view("<u2").reshape(columns, -1).T
        values[rows] = (bits + half_bits(values[rows])).view("<f2")
    return grid_from(active, torch.from_numpy(values))


# ------------------------------------------------------------------------ the stream: the file
# header  HEADER | K (9 f32) and c2w (12) of each camera, the held-out ones first | CRC32
# records "FRAM" | frame 0, 1, ... | kind | payload length | CRC32 of all but "FRAM" | payload
# index   "INDX" | number of frames | each (frame, kind, offset) | CRC32 | offset of the index
#         | "StrRFend"                  written last: without it, the recording was not finished

HEADER = np.dtype([
    ("magic", "S10"), ("size", "<u2", 3), ("degree", "u1"), ("int8", "u1"), ("ndc", "u1"),
    ("key_every", "<u4"), ("cameras", "<u2"), ("held_out", "<u2"), ("H", "<u4"), ("W", "<u4"),
    ("aabb", "<f4", (2, 3)), ("bg", "<f4", 3), ("steps", "<f4", 2), ("fps", "<f4"),
    ("near", "<f4"), ("far", "<f4")])
RECORD = struct.Struct("<4sIBII")


def pack_header(video, args) -> bytes:
    header = np.array(
        (b"StreamRF\1\0", args.resolution, args.degree, not args.as_released, video.ndc,
         args.key_every, len(video.c2w), len(video.test), video.H, video.W, video.aabb.cpu(),
         video.bg.cpu(), INT8_STEPS, video.fps, video.near, video.far), HEADER)
    cameras = torch.cat([video.K.flatten(1), video.c2w.flatten(1)], 1)[video.test + video.train]
    head = header.tobytes() + cameras.cpu().numpy().astype("<f4").tobytes()
    return head + struct.pack("<I", zlib.crc32(head))


def read_header(data: bytes, path) -> tuple[np.ndarray, Video]:
    """What a stream begins with: -> header, a Video without pictures."""
    header = np.frombuffer(data[:HEADER.itemsize].ljust(HEADER.itemsize), HEADER)[0]
    *_, ndc, _, n, held_out, H, W, aabb, bg, _, fps, near, far = header.item()
    end = HEADER.itemsize + 4 * 21 * n
    crc = struct.pack("<I", zlib.crc32(data[:end]))
    require(data[:10] == b"StreamRF\1\0" and data[end:end + 4] == crc,
            f"{path}: no stream of format 1, or its header is damaged: copy the file again")
    cameras = torch.tensor(np.frombuffer(data[HEADER.itemsize:end], "<f4")).view(n, 21)
    K, c2w = cameras[:, :9].reshape(n, 3, 3), cameras[:, 9:].reshape(n, 3, 4)
    return header, Video(
        Path(path).stem, "stream", 0, fps, c2w, K, H, W, [], list(range(held_out, n)),
        list(range(held_out)), torch.tensor(aabb), near, far, torch.tensor(bg), bool(ndc), None)


def empty_grid(header) -> Grid:
    mask = torch.zeros(tuple(header["size"]), dtype=torch.bool)
    return grid_from(mask, torch.zeros(0, 1 + 3 * (int(header["degree"]) + 1) ** 2))


def pack_record(frame: int, kind: int, payload: bytes) -> bytes:
    head = RECORD.pack(b"FRAM", frame, kind, len(payload), 0)[:-4]
    return head + struct.pack("<I", zlib.crc32(head[4:] + payload)) + payload


def pack_index(records: dict, begin: int) -> bytes:
    """Index and footer, which begin there, of records {frame: (kind, begin, end)}."""
    index = b"INDX" + struct.pack("<I", len(records))
    index += b"".join(struct.pack("<IBQ", frame, *place[:2]) for frame, place in records.items())
    return index + struct.pack("<IQ8s", zlib.crc32(index), begin, b"StrRFend")


def write_at(stream: Path, begin: int, data: bytes) -> int:
    """Write from this offset on, over what a run that was broken off left there. -> the end."""
    with open(stream, "r+b" if begin else "wb") as file:
        file.truncate(begin)
        file.seek(begin)
        return begin + file.write(data)


class StreamReader:
    """Plays a stream. A frame is playable if its record is whole, and it is a key frame, or the
    frame before it is playable: damage costs the frames up to the next key frame."""

    def __init__(self, path):
        require(Path(path).is_file(), f"{path}: there is no such file")
        self.data, self.records, self.playable = Path(path).read_bytes(), {}, []
        self.header, self.video = read_header(self.data, path)
        last = -1
        for mark in re.finditer(b"FRAM", self.data[:-RECORD.size]):     # also behind damage
            begin = mark.start()
            _, frame, kind, length, _ = RECORD.unpack_from(self.data, begin)
            record = self.data[begin:begin + RECORD.size + length]
            if frame > last and record == pack_record(frame, kind, record[RECORD.size:]):
                if kind == KEY or frame - 1 in self.playable[-1:]:
                    self.playable.append(frame)
                last, end = frame, begin + len(record)
                self.records[frame] = kind, begin, end
        require(self.playable, f"{path}: no frame can be played: copy the file again")
        if self.data[end:] != pack_index(self.records, end):    # which holds all offsets
            missing = [str(t) for t in range(last + 1) if t not in self.playable]
            note(f"{path}: damaged, or not finished: frames {', '.join(missing) or 'none'} are "
                 f"missing, and any after {last}")

    def frames(self):
        """(t, grid) of all playable frames, each a difference to the grid before it."""
        for t in self.playable:
            kind, begin, end = self.records[t]
            if kind == KEY:
                grid = empty_grid(self.header)
            grid = decode_frame(self.header, kind, self.data[begin + RECORD.size:end], grid)
            yield t, grid


# -------------------------------------------------------------------------- beyond the paper
# Rounding in the loop. The next frame starts from the grid as a player decodes it (in the paper,
# from that before encoding), so that errors of rounding do not add up.
#
# Damping. RMSProp divides a gradient by its own size: the first step of a row is the whole learning
# rate, and noise moves walls that rest. With the typical gradient of the moving rows in the divisor
# small gradients make small steps. Example: gradients 1 and 0.01, damp 1: the mean of m is 0.5, the
# steps are lr / 1.7 and lr / 72. --damp 0 (40 px): 77 kB instead of 29, and 0.6 dB less.

CHANGE, MEMORY = 0.03, 3        # tuned on stage: above its noise; frames until it has settled
INT8_STEPS = 0.05, 0.01         # finest steps: of the square root of density, of coefficients


def changed_pixels(now: Tensor, before: Tensor) -> Tensor:
    """Pixels where a channel, there or at a neighbour, differs by more than CHANGE from the last
    frame: (V, H, W, 3) each -> (V, H, W) bool."""
    return F.max_pool2d((now - before).abs().amax(-1)[:, None], 3, 1, 1)[:, 0] > CHANGE


def visual_hull(video, pixels: Tensor, shape) -> Tensor:
    """Lattice points (X, Y, Z) bool at which 3 or more training cameras look (or all), and 0.8 of
    these see a marked pixel (V, H, W) bool: what moves, and is not hidden from many, is inside."""
    x = torch.ones(tuple(shape), device=pixels.device).nonzero() + 0.5
    x = x / torch.tensor(shape, device=pixels.device)
    x = video.aabb[0] + x * (video.aabb[1] - video.aabb[0])                         # (n, 3) world
    if video.ndc:                               # back into the space of the cameras
        K, z = video.K[0], 2 / (x[:, 2].clamp(max=0.999) - 1)
        x = torch.stack([-0.5 * video.W / K[0, 0] * x[:, 0] * z,
                         -0.5 * video.H / K[1, 1] * x[:, 1] * z, z], 1)
    n_looking, n_marked = torch.zeros(2, len(x), device=x.device)
    for camera, image in zip(video.train, pixels):
        K, c2w = video.K[camera], video.c2w[camera]
        c = (x - c2w[:, 3]) @ c2w[:, :3]                                            # camera's axes
        column = (K[0, 2] - K[0, 0] * c[:, 0] / c[:, 2]).floor()
        line = (K[1, 2] + K[1, 1] * c[:, 1] / c[:, 2]).floor()
        inside = (c[:, 2] < 0) & (column >= 0) & (column < video.W)
        inside &= (line >= 0) & (line < video.H)
        n_looking += inside
        n_marked[inside] += image[line[inside].long(), column[inside].long()]
    enough = n_looking >= min(3, len(video.train))
    return ((n_marked >= 0.8 * n_looking) & enough).view(tuple(shape))


@torch.no_grad()
def births(pilot: Grid, video, recent: Tensor) -> Tensor:
    """Empty points (X, Y, Z) bool where something new probably appeared: in the visual hull of the
    changed pixels that are unexplained, as the weights of their ray, rendered with the pilot, sum
    to less than 0.5 inside the hull of all changed pixels."""
    hull = dilate(visual_hull(video, recent, pilot.links.shape))
    cells, unexplained = cells_of(pilot.solid(1e-8)), torch.zeros_like(recent)
    for pixel in recent.flatten().nonzero()[:, 0].split(1 << 15):
        out = render(pilot, cells, *rays_of(video, video.train, pixel), video)
        x, y, z = (c.clamp(0, n - 1) for c, n in zip(out["x"].round().long().T, hull.shape))
        explained = torch.zeros(len(pixel), device=pixel.device)
        explained.index_add_(0, out["ray"], out["weights"] * hull[x, y, z])
        unexplained.view(-1)[pixel[explained < 0.5]] = True
    return visual_hull(video, unexplained, pilot.links.shape) & ~dilate(pilot.active)


def pixels_to_train(recent: Tensor, mask: Tensor | None, video, args) -> Tensor:
    """Training pixels to draw from: 0.7 n that changed lately, and up to 0.3 n drawn from all whose
    ray meets the mask (X, Y, Z), if one is given (or it has no gradient). With --no-hull: all."""
    if not args.hull:
        return torch.arange(recent.numel(), device=recent.device)
    n, changed = args.iterations * args.rays, recent.flatten().nonzero()[:, 0]
    others = torch.randint(recent.numel(), (n,), device=recent.device)
    if mask is not None:
        cells = cells_of(mask)
        meets = [sample_along_rays(cells, *rays_of(video, video.train, part), video)[3].diff() > 0
                 for part in others.split(1 << 16)]
        others = others[torch.cat(meets)]
    if len(changed) == 0:
        return others
    some = changed[torch.randint(len(changed), (round(0.7 * n),), device=recent.device)]
    return torch.cat([some, others[:n - len(some)]])


def compand(values: np.ndarray) -> np.ndarray:
    """Before int8, density s -> sign(s) sqrt|s|, example: -9 -> -3; other columns as they are. So
    steps are fine where a little matters, and coarse where all is opaque."""
    out = values.copy()
    out[:, 0] = np.copysign(np.sqrt(np.abs(out[:, 0])), out[:, 0])
    return out


# -------------------------------------------------------------------- evaluation and playing

def evaluate(grid: Grid, video, frame: int, args: Args, pictures) -> dict:
    """Scores of a decoded frame, means over held-out cameras: psnr, ssim; psnr_moving, inside the
    true mask of what moves, where there is one. pictures: folder for strips, or None."""
    cameras, views = video.test[:args.eval_views], to_device(video.read(frame), args.device)
    rgb, depth = zip(*(render_image(grid, video, camera) for camera in cameras))
    target = views.images[cameras]
    means = torch.tensor([[float(psnr(a, b)), float(ssim(a, b))] for a, b in zip(rgb, target)])
    scores = dict(zip(("psnr", "ssim"), means.mean(0).tolist()))
    if views.mask is not None:
        moving = (torch.stack(rgb) - target).square().mean(-1)[views.mask[cameras] > 0]
        scores["psnr_moving"] = float(-10 * moving.mean().log10())
    for i in range(len(cameras) if pictures else 0):
        strip = comparison_strip(target[i], rgb[i], depth[i], video.near, video.far)
        save_png(pictures / f"test_{i:03d}.png", strip)
    return scores


def write_film(stream, film: Path, args: Args) -> None:
    """What the first camera, a held-out one, sees of a stream, --steps frames at most."""
    reader = StreamReader(stream)
    video = to_device(reader.video, args.device)
    images = [render_image(to_device(grid, args.device), video, 0)[0].cpu()
              for _, (_, grid) in zip(range(args.steps), reader.frames())]
    save_video(film, images, fps=max(round(video.fps), 1))
    say(f"{len(images)} frames in {film}")


# --------------------------------------------------------------------------------- training

def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    positive = "first_rays", "rays", "pilot_iterations", "iterations", "key_every"
    check_flags(args, positive, not_negative=("birth", "damp"))
    rates = args.first_lr + args.lr
    require(all(rate > 0 for rate in rates), f"--first-lr, --lr {rates}: must be greater than 0")
    require(all(side % 2 == 0 and 8 <= side <= 4096 for side in args.resolution),
            f"--resolution {args.resolution}: wanted even numbers from 8 to 4096")
    require(args.first_iterations > 1, f"--first-iterations {args.first_iterations}: too few")


def storage(costs: dict, packed: bytes, raw: int) -> dict:
    """Means over later frames, key frames included; bytes against the last frame as a key frame."""
    later = [cost for t, cost in costs.items() if t] or [*costs.values()]
    means = {name: sum(cost[name] for cost in later) / len(later)
             for name in ("bytes", "raw", "stored", "may_change")}
    say(f"later frames {means['bytes'] / 1000:.1f} kB: 1/{len(packed) / means['bytes']:.0f} of a "
        f"sparse fp16 frame; before LZMA {means['raw'] / 1000:.1f} kB, 1/{raw / means['raw']:.0f}; "
        f"of the voxels {means['may_change']:.0%} in M, {means['stored']:.0%} stored")
    return {**means, "raw_sparse_fp16": raw, "bytes_sparse_fp16": len(packed)}


def train(args: Args) -> dict | None:
    """Encode a video frame by frame, score what a player sees; -> what summary.json holds."""
    check(args)
    if args.play:
        return write_film(args.play, Path(args.play).with_suffix(".mp4"), args)
    torch.manual_seed(args.seed)
    video = to_device(load_video(args.scene, args.data, args.size, args.steps), args.device)
    run = TrainingRun("streamrf", video.name, args, free=("first_lr", "lr"))
    if args.as_released:
        args = replace(args, hull=False, birth=0.0, damp=0.0)
    stream, head = run.path / "stream.srf", pack_header(video, args)
    header = read_header(head, stream)[0]
    empty = to_device(empty_grid(header), args.device)
    parts = {name: {} for name in ("field", "pilot", "history", "records", "costs", "scores")}
    field, pilot_field, history, records, costs, scores = parts.values()     # saved at checkpoints
    previous = None

    def grid_of(saved):
        return to_device(Grid(**saved), args.device) if saved else empty

    def score(_, pictures):
        """Means over the frames that were scored so far; the last one is scored now."""
        now = evaluate(grid_of(field), video, run.step - 1, args, pictures)
        scores[run.step - 1] = now
        video.read(min(run.step, video.frames - 1))     # the next one: no clock runs here
        return {name: sum(s[name] for s in scores.values()) / len(scores) for name in now}

    for frame in run.loop(parts, score, steps=video.frames, empty="use a lower --first-lr"):
        full, pilot, masks = grid_of(field), grid_of(pilot_field), None
        if previous is None:                            # the first frame of this process
            previous = to_device(video.read(max(frame - 1, 0)), args.device).images[video.train]
        images = to_device(video.read(frame), args.device).images[video.train]
        target = images.flatten(0, 2)                                               # (V H W, 3)
        # 1. where pixels changed in the last MEMORY frames
        changed = changed_pixels(images, previous)[None]                            # (1, V, H, W)
        changed = torch.cat([history.get("changed", changed).to(changed), changed])[-MEMORY:]
        history["changed"], previous, recent = changed, images, changed.any(0)      # (V, H, W)
        # 2. the grid of this frame, after the pilot's
        if frame == 0 or args.mode == "scratch":
            new, out = first_frame(video, target, args)
            M = torch.ones_like(new.active)
            run.count(rays=args.first_iterations * args.first_rays)
        else:
            if args.mode in ("pilot", "full"):
                pilot, masks = next_pilot(pilot, video, target, recent, args)
                run.count(rays=args.pilot_iterations * args.rays)
            new, stored, M, out = next_frame(full, pilot, masks, video, target, recent, args)
            run.count(rays=args.iterations * args.rays)
        # 3. its bytes, and what a player makes of them: the next frame starts from there
        kind, prev = DELTA, full
        if args.mode == "scratch" or frame % args.key_every == 0:           # all is stored
            kind, prev = KEY, empty
            stored = torch.ones(len(new.values), dtype=torch.bool, device=args.device)
        payload, raw = encode_frame(header, kind, prev, new, stored)
        begin = records[frame - 1][2] if frame else write_at(stream, 0, head)
        end = write_at(stream, begin, pack_record(frame, kind, payload))
        records[frame] = kind, begin, end
        costs[frame] = {"bytes": end - begin, "raw": raw, "voxels": len(new.values),
                        "stored": float(stored.float().mean()),
                        "may_change": float(M[new.active].float().mean())}
        full = decode_frame(header, kind, payload, to_device(prev, "cpu"))
        # 4. a pilot for the frames to come
        if frame == 0 and args.mode in ("pilot", "full"):
            pilot = to_device(full, args.device).resample([side // 2 for side in args.resolution])
            pilot, every = pilot.prune(1), torch.arange(len(target), device=args.device)
            rates = learning_rates(args.lr, 4 * args.pilot_iterations)
            optimise(pilot, video, target, every, args.rays, rates)
        field.update(vars(full))
        pilot_field.update(vars(pilot))
        run.log(**out)
    end = records[max(records)][2]
    if not args.eval_only:
        write_at(stream, end, pack_index(records, end))
    if args.video:
        write_film(stream, run.path / "render.mp4", args)
    full = grid_of(field)
    whole = encode_frame(header, KEY, empty, full, torch.ones(len(full.values), dtype=torch.bool))
    return run.finish(data=video.kind, mode=args.mode, **storage(costs, *whole),
                      per_frame=[{**costs[t], **scores.get(t, {})} for t in costs])


if __name__ == "__main__":
    cli(PRESETS, train)
