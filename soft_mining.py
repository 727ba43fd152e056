"""Soft Mining: train on the pixels that still have error (Kheradmand et al., CVPR 2024, arXiv 2312.00075).

The idea in five lines. Most pixels of a picture are fitted early; rays through them are wasted. Draw pixels from a density Q that
follows the present error instead, and divide a part of it, Q^alpha, back out of the loss: alpha = 0 is hard mining, alpha = 1 is
importance sampling, in between is soft mining. To draw from Q without ever storing it, let every ray be a random walker on its image
plane: it drifts up the gradient of log Q at its own pixel, which the ordinary backward pass leaves there for a little extra work, it
diffuses, it dies where there is nothing left to learn, and it is born again where images have edges.

| paper                        | here                                                                                   |
|------------------------------|----------------------------------------------------------------------------------------|
| f(x), gt(x)                  | out["rgb"], truth                                                                      |
| err(x) = |f - gt|_2^2        | e, mean over channels                                                                  |
| Q(x) = |f - gt|_1            | q, mean over channels; weights and deaths use it, the drift its smooth twin sqrt(e)    |
| alpha, a, b                  | --alpha, --drift, --noise                                                              |
| x_n, N                       | view, xy; len(xy)                                                                      |

    L = 1/N sum_n err(x_n) / sg(Q(x_n))^alpha          soft_weight; step 3 of train
    x <- x + a grad log Q(x) + b eta, eta ~ N(0, I)    Walkers.update, grad_log_q; step 5 of train
    alpha grows linearly in the first steps            --warmup; step 3 of train

Where the released code differs from this file (class ReleasedWalkers, --as-released, brings it back, bugs included):
(1) Its drift is divided by N, and adds a gradient per pixel to a position in image sides: at 800 px and 4100 rays the walk is nearly
    pure diffusion, of stationary density Q^0.06. Here it is Q^drift at every resolution and batch size.
(2) Its noise is 0.02 of each side, so walks in wide images are faster sideways. Here it is a share of the longer side, both ways.
(3) Its 10 % of uniform pixels are always those of the last 10 % of the images. Here they are spread over all.
(4) Its edge maps are divided by the maximum of each pixel column. Here by the image's.
(5) Its edges are those of pictures on black (it trains on white), with a zero border that counts as an edge. Here neither.
(6) Its exponent climbs by 1/1000 a step whatever alpha is; deaths go by the weighted loss. Here alpha is reached after --warmup steps,
    and deaths go by q.
Both leave the ground truth's own gradient out of grad log Q; --truth-gradient puts it in. Ours, not the paper's: marching through an
occupancy grid instead of a proposal network; no standardising of features inside the field; batches of equal sample count; a random
colour behind each training ray (on white, light surfaces may stay half transparent: nobody sees it but the depth); --walkers global,
whose walkers leave images that are fitted.

What the ablations say (README): at equal samples a step, uniform pixels with the soft weight gain as much as all of this; the walkers pay
where rays are what costs. The pixel gradient adds nothing measurable here. Try --weighting off, --no-pixel-gradient, --batch rays.

An honest clock. A mined ray hits the object more often than a uniform one, so at equal rays a step of Soft Mining costs more. With
--batch samples every step renders equally many samples, whatever their rays; metrics.jsonl counts steps, rays, samples and seconds.

    python soft_mining.py --scene lego                    31.3 dB over 25 test views at 100 px, 125 s of one core
    python soft_mining.py --scene lego --preset paper     for a GPU; not run
"""
from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Literal, Optional

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (K_of, OccupancyGrid, Progress, Run, Scene, Stopwatch, UserError, Views, check_finite, check_flags, check_not_empty, cli,
                    colour_map, load_scene, ndc_rays, peak_memory_mb, pixel_rays, psnr, random_state, save_png, save_video,
                    set_random_state, spherical_harmonics, spread, ssim, strip, tensorboard, to_device, turntable, view_rays)
from kernels import composite, hash_encode, hash_levels, march


@dataclass
class Args:
    scene: str = "lego"
    """A scene's name under --data, a path, or the built-in `bricks`."""
    data: str = os.environ.get("NERF_DATA", "data")
    """Folder with nerf_synthetic/, nerf_llff_data/, dtu/ (default: $NERF_DATA, else `data`)."""
    preset: Literal["quick", "paper"] = "quick"
    """quick: 100 px, two minutes on two cores. paper: 800 px, 20 000 steps, for a GPU."""
    out: Optional[str] = None
    """Run folder (default: runs/soft_mining-SCENE-TIME)."""
    seed: int = 0
    """Seed of every random number."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, ..."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    eval_only: bool = False
    """Load the checkpoint in --out, evaluate it, draw the pictures, train nothing."""
    video: bool = False
    """Also write a turntable, render.mp4."""
    tensorboard: bool = False
    """Also log to TensorBoard (if it is installed)."""

    size: int = 100
    """Longer image side [pixels]."""
    steps: int = 3000
    """Optimiser steps."""
    batch: Literal["rays", "samples"] = "samples"
    """What every step has equally many of. `samples` adapts the number of rays, so that all steps cost the same."""
    rays: int = 256
    """Rays a step (N). With --batch samples: of the first step."""
    samples: int = 8192
    """Samples a step with --batch samples."""
    pool: int = 8192
    """Walkers kept with --batch samples, and the most rays a step; each step draws and moves some of them."""
    background: Literal["white", "black", "grey"] = "white"
    """What is behind the scene in the pictures."""
    train_background: Literal["random", "scene"] = "random"
    """Behind each training ray: a colour of its own, which pins the opacity (where pictures have alpha), or the scene's."""
    train_split: Literal["train", "val", "trainval"] = "train"
    """Blender split to train on."""

    sampling: Literal["uniform", "edge", "multinomial", "lmc"] = "lmc"
    """Where a step's pixels come from."""
    alpha: float = 0.6
    """Exponent of the soft weight 1/Q^alpha: 0 hard mining, 1 importance sampling."""
    warmup: int = 100
    """Steps in which the exponent grows linearly from 0 to alpha."""
    weighting: Literal["auto", "on", "off"] = "auto"
    """Soft weights in the loss. auto: for every sampling but uniform."""
    clamp: bool = True
    """Clamp the weights of a batch to [0.2, mean + std]."""
    drift: float = 4.0
    """Langevin drift: the walkers' stationary density is Q^drift (1: Q itself, 0: plain diffusion)."""
    noise: float = 0.05
    """Langevin noise b: standard deviation of one move [longer image sides]."""
    pixel_gradient: bool = True
    """Walkers feel grad log Q (off: they only diffuse, die and are reborn)."""
    truth_gradient: bool = False
    """Include the spatial gradient of the ground truth in grad log Q (the authors leave it out)."""
    reinit: Literal["none", "uniform", "edge"] = "edge"
    """Where a walker is reborn that left the image or found too little error."""
    uniform_share: float = 0.1
    """Share of a step's pixels drawn uniformly, over all images (all samplings)."""
    reborn_share: float = 0.1
    """Share of a step's walkers, those of least error, that are reborn."""
    walkers: Literal["per-image", "global"] = "per-image"
    """per-image: each image keeps its walkers (paper). global: walkers are reborn in images in proportion to their error (ours)."""
    refresh: int = 10
    """Steps between two rebuilds of the multinomial sampler's table."""
    as_released: bool = False
    """The released code's sampler and constants to the letter, bugs included, with equal rays a step (list above)."""

    levels: int = 8
    """Hash grid levels (L)."""
    features: int = 4
    """Features a level (F)."""
    log2_table: int = 16
    """Rows of a level's table, log2 (log2 T)."""
    base: int = 16
    """Cells a side of the coarsest level."""
    finest: int = 256
    """Cells a side of the finest level."""
    march_steps: int = 192
    """Samples along the box's diagonal; sets the step of the ray marcher."""
    grid: int = 48
    """Occupancy grid cells a side."""
    grid_decay: float = 0.8
    """What is left of a cell's remembered density at each look (every 16 steps)."""
    lr: float = 2e-2
    """Adam's learning rate; it ends at a tenth of this."""
    lr_warmup: int = 100
    """Steps in which it first grows linearly from 0 (at full rate the first ones can empty the field for good)."""
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"
    """How it gets there (constant: it stays)."""
    weight_decay: float = 1e-6
    """L2 term in Adam's gradient."""
    half: bool = False
    """bfloat16 matrix products in the MLPs (GPU)."""
    eval_every: int = 300
    """Steps between two evaluations and checkpoints."""
    eval_views: int = 5
    """Test views in those evaluations (the last one takes all)."""


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", size=800, steps=20_000, batch="rays", rays=4096, drift=1.0, noise=0.02, warmup=1000, lr=1e-2,
                  levels=16, features=2, log2_table=19, finest=4096, march_steps=1024, grid=128, grid_decay=0.95, half=True,
                  eval_every=1000, eval_views=25),
}


# ------------------------------------------------------------------------------------------------------- the soft weight

def soft_weight(q: Tensor, exponent: float, clamp: bool = True) -> Tensor:
    """w_n = max(q_n, 2^-10)^-exponent, the density's share that the loss gives back.  q (N,) mean |rgb - gt| -> w (N,), no gradient.

    exponent 0: all ones, hard mining. exponent 1, pixels drawn in proportion to q: mean_n w_n e_n is, up to a constant, an unbiased
    estimate of the mean of e over all pixels (of each image, where draws are tied to images). clamp: [0.2, mean(w) + std(w)] of this
    batch, which takes the largest weights, those of pixels already fitted, away again (so even exponent 1 is then biased).
    Source: paper, soft mining objective; released constants.
    Pocket check: q = 1/4, exponent 1/2 -> w = 2.
    """
    w = q.detach().clamp(min=2 ** -10) ** -exponent
    return torch.minimum(w.clamp(min=0.2), w.mean() + w.std(correction=min(1, len(w) - 1))) if clamp else w


# ---------------------------------------------------------------------------------------------- where the pixels come from
# A sampler has draw(n) -> (view (n,), xy (n, 2) pixel centres) and update(e, q, w, d_xy), which tells it what came of that draw:
# e (n,) squared error, q (n,) absolute error, w (n,) weights, d_xy (n, 2) = d mean(w e) / d xy or None. They are modules only because
# a module's buffers are saved in the checkpoint and follow it to the GPU.

def edge_maps(images: Tensor) -> Tensor:
    """Sobel magnitude of the grey image, divided by its maximum, in [1e-5, 1].  images (V, H, W, 3) -> (V, H, W)."""
    grey = (images @ images.new_tensor([0.2989, 0.5870, 0.1140]))[:, None]                          # (V, 1, H, W)
    grey = F.pad(grey, (1, 1, 1, 1), mode="replicate")                                              # no edge along the border
    sobel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    magnitude = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1)                  # (V, H, W)
    return (magnitude / (magnitude.amax((1, 2), keepdim=True) + 1e-7)).clamp(1e-5, 1.0)


class PixelTable:
    """Draws pixels from a density over each image, by inverting its distribution function.  density (V, H, W) >= 0, any scale."""
    def __init__(self, density: Tensor):
        V, self.H, self.W = density.shape
        cdf = density.reshape(V, -1).double().cumsum(1)
        shift = torch.arange(V, device=density.device, dtype=torch.float64)[:, None]
        self.cdf = (cdf / cdf[:, -1:] + shift).flatten()      # image v's function runs from v to v + 1: one sorted array for all images

    def draw(self, view: Tensor) -> Tensor:
        """view (n,) -> xy (n, 2), centre of one pixel of each image."""
        u = view + torch.rand(len(view), dtype=torch.float64, device=view.device)
        pixel = torch.searchsorted(self.cdf, u, right=True) - view * (self.H * self.W)
        pixel = pixel.clamp(0, self.H * self.W - 1)                                                 # u may round up to the end
        return torch.stack([pixel % self.W, pixel // self.W], -1) + 0.5


def uniform_pixels(n: int, H: int, W: int, device) -> Tensor:
    """n pixel centres, each pixel equally likely: xy (n, 2)."""
    return (torch.rand(n, 2, device=device) * torch.tensor([W, H], device=device)).floor() + 0.5


class FixedSampler(nn.Module):
    """uniform: every pixel of every image. edge: edge_maps, apart from the uniform share. Neither learns anything."""
    def __init__(self, images: Tensor, args: Args):
        super().__init__()
        self.V, self.H, self.W, _ = images.shape
        self.table = PixelTable(edge_maps(images)) if args.sampling == "edge" else None
        self.uniform_share, self.device = args.uniform_share, images.device

    def draw(self, n: int):
        view = torch.randint(self.V, (n,), device=self.device)
        xy = uniform_pixels(n, self.H, self.W, self.device)
        if self.table:
            k = round((1 - self.uniform_share) * n)
            xy[:k] = self.table.draw(view[:k]).to(xy)
        return view, xy

    def update(self, e, q, w, d_xy):
        pass


class MultinomialSampler(nn.Module):
    """Draws from a stored error map: each pixel holds the |error| of the last time it was seen (until then the mean of all that were).

    What the walkers approximate. It needs a number a pixel and a sum over all of them now and then (`refresh`), the walkers neither.
    """
    def __init__(self, images: Tensor, args: Args):
        super().__init__()
        self.V, self.H, self.W, _ = images.shape
        self.args = args
        self.register_buffer("error", torch.full(images.shape[:3], torch.nan, device=images.device))        # NaN: not seen yet
        self.register_buffer("density", torch.ones(images.shape[:3], device=images.device))                 # what the table was built from
        self.register_buffer("draws", torch.zeros((), dtype=torch.long))
        self.table = PixelTable(self.density)

    def load_state_dict(self, state, *rest):
        super().load_state_dict(state, *rest)
        self.table = PixelTable(self.density)

    def draw(self, n: int):
        if self.draws > 0 and self.draws % self.args.refresh == 0:
            self.density = torch.where(self.error.isnan(), self.error.nanmean(), self.error).clamp(min=2 ** -10)
            self.table = PixelTable(self.density)
        self.draws += 1
        budget = self.density.mean((1, 2)) if self.args.walkers == "global" else self.density.new_ones(self.V)
        view = torch.multinomial(budget, n, replacement=True)
        k = round((1 - self.args.uniform_share) * n)
        xy = torch.cat([self.table.draw(view[:k]).float(), uniform_pixels(n - k, self.H, self.W, view.device)])
        self.batch = view, xy
        return view, xy

    def update(self, e, q, w, d_xy):
        view, xy = self.batch
        x, y = xy.long().unbind(-1)
        self.error[view, y, x] = q


def grad_log_q(e: Tensor, w: Tensor, d_xy: Tensor) -> Tensor:
    """Spatial gradient of log Q at each walker, from what the backward pass left there.  e, w (N,), d_xy (N, 2) -> (N, 2) [1/pixel].

    The loss is 1/N sum_m w_m e_m with w constant, so d_xy_n = w_n grad e_n / N: divided by w_n / N it is grad e_n, whatever N and w.
    For Q its root-mean-square form sqrt(e) is taken, of which L1 is the absolute twin: grad log sqrt(e) = grad e / (2 e). No gradient.
    """
    return len(e) * d_xy / (2 * w * e).clamp(min=1e-12)[:, None]                                    # a ray without error stays put


class Walkers(nn.Module):
    """Langevin walkers on the image planes (paper, LMC): x <- x + a grad log Q(x) + b eta, eta ~ N(0, I), with deaths and births.

    Units that keep their meaning: b = --noise in longer image sides, and a = --drift b^2 / 2 with b in pixels, for which the walk's
    stationary density is Q^drift at every resolution and batch size. One drift move is cut to 2 b: where an error vanishes, its
    logarithm's gradient does not. A walker lives at a real position, trains the pixel that it stands in, and feels the gradient there.

    count walkers exist (at least one an image); a step draws a random n of them and moves those.
    Buffers: view (P,) each walker's image, xy (P, 2) its position [pixels], image_error (V,) running mean of q (for --walkers global).
    """
    def __init__(self, images: Tensor, args: Args, count: int):
        super().__init__()
        V, self.H, self.W, _ = images.shape
        count = max(count, V)
        self.args, self.b = args, args.noise * max(self.H, self.W)                                  # b in pixels
        self.edges = PixelTable(edge_maps(images)) if args.reinit == "edge" else None
        self.register_buffer("view", torch.arange(count, device=images.device) % V)                 # every image gets its share
        self.register_buffer("xy", uniform_pixels(count, self.H, self.W, images.device))
        self.register_buffer("image_error", torch.ones(V, device=images.device))

    def draw(self, n: int):
        self.drawn = torch.randperm(len(self.xy), device=self.xy.device)[:n]
        return self.view[self.drawn], self.xy[self.drawn].floor() + 0.5

    def update(self, e: Tensor, q: Tensor, w: Tensor, d_xy: Optional[Tensor]) -> None:
        args, n, device = self.args, len(q), q.device
        view, xy = self.view[self.drawn], self.xy[self.drawn]
        # 1. Langevin step
        if d_xy is not None:
            a = args.drift * self.b ** 2 / 2
            move = a * grad_log_q(e, w, d_xy)
            xy = xy + move * (2 * self.b / move.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
        xy = xy + self.b * torch.randn(n, 2, device=device)
        # 2. death: out of the image, or among those of least error
        size = torch.tensor([self.W, self.H], device=device)
        dead = ((xy < 0) | (xy >= size)).any(1)
        dead[q.topk(int(args.reborn_share * n), largest=False).indices] = True
        # 3. birth, in the same image, or in any in proportion to its running mean error
        if args.walkers == "global":
            seen = torch.zeros_like(self.image_error).index_add_(0, view, torch.ones_like(q))
            mean = torch.zeros_like(self.image_error).index_add_(0, view, q) / seen.clamp(min=1)
            self.image_error = torch.where(seen > 0, 0.9 * self.image_error + 0.1 * mean, self.image_error)
            view = torch.where(dead, torch.multinomial(self.image_error, n, replacement=True), view)
        if args.reinit == "edge":
            xy = torch.where(dead[:, None], self.edges.draw(view).to(xy), xy)
        elif args.reinit == "uniform":
            xy = torch.where(dead[:, None], uniform_pixels(n, self.H, self.W, device), xy)
        else:                                                                                       # nobody is reborn: borders reflect
            xy = size - (size - xy.abs()).abs()
        # 4. a share of uniform positions, over all images, so that no pixel is out of reach
        some = torch.randperm(n, device=device)[:round(args.uniform_share * n)]
        xy[some] = uniform_pixels(len(some), self.H, self.W, device)
        xy = torch.minimum(xy.clamp(min=0), size - 1e-3)                                            # size itself is outside
        self.view[self.drawn], self.xy[self.drawn] = view, xy


class ReleasedWalkers(nn.Module):
    """The released code's sampler, letter by letter (--as-released): positions s = (row/(H-1), column/(W-1)), and bs = ceil(rays/V)
    walkers tied to each image. Compare with Walkers above; the numbers are those of the list in the docstring."""
    A, B, UNIFORM, REBORN = 20.0, 0.02, 0.1, 0.1

    def __init__(self, images: Tensor, black: Tensor, rays: int):
        super().__init__()
        V, self.H, self.W, _ = images.shape
        bs = math.ceil(rays / V)
        self.last = torch.tensor([self.H - 1, self.W - 1], device=images.device)
        self.edges = PixelTable(self.edge_maps(black))
        self.register_buffer("view", torch.arange(bs * V, device=images.device) // bs)
        self.register_buffer("s", self.to_s(uniform_pixels(bs * V, self.H, self.W, images.device)))

    @staticmethod
    def edge_maps(black: Tensor) -> Tensor:
        grey = (black @ black.new_tensor([0.2989, 0.5870, 0.1140]))[:, None]
        sobel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
        magnitude = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None], padding=1).norm(dim=1)   # zeros outside (5)
        return (magnitude / (magnitude.amax(1, keepdim=True) + 1e-7)).clamp(1e-5, 1.0)              # maximum a column (4)

    def to_s(self, xy: Tensor) -> Tensor:
        return (xy - 0.5).flip(-1) / self.last

    def draw(self, n: int):
        return self.view, (self.s * self.last).round().flip(-1) + 0.5                               # all walkers, always

    def update(self, e: Tensor, q: Tensor, w: Tensor, d_xy: Optional[Tensor]) -> None:
        N, loss = len(e), w * e
        s = self.s + self.B * torch.randn_like(self.s)
        if d_xy is not None:                          # (1/N) grad_pixel log e, added to positions in image sides (1, 2)
            scale = 1024.0                            # of their loss; it matters only beside the epsilon
            s = s + self.A * (scale * d_xy / (scale * loss + torch.finfo(loss.dtype).eps)[:, None]).flip(-1)
        dead = ((s < 0) | (s > 1)).any(1) | (loss <= loss.kthvalue(int(self.REBORN * N) + 1).values)
        k = int(self.UNIFORM * N)
        s[N - k:] = torch.rand(k, 2, device=s.device)                                               # always the last images' (3)
        born = self.to_s(self.edges.draw(self.view).to(s))
        self.s = torch.where(dead[:, None], born, s).clamp(0, 1)


def make_sampler(scene: Scene, args: Args) -> nn.Module:
    views = scene.train
    if args.as_released:
        outside = 0 if views.alpha is None else (1 - views.alpha[..., None]) * scene.bg
        return ReleasedWalkers(views.images, views.images - outside, args.rays)
    if args.sampling == "lmc":
        return Walkers(views.images, args, args.rays if args.batch == "rays" else max(args.pool, args.rays))
    return (MultinomialSampler if args.sampling == "multinomial" else FixedSampler)(views.images, args)


def truth_gradient(images: Tensor, view: Tensor, xy: Tensor) -> Tensor:
    """Central differences of images (V, H, W, C) at pixels.  (n,), (n, 2) -> (n, C, 2) [1/pixel], last axis (x, y)."""
    H, W = images.shape[1:3]
    x, y = xy.long().unbind(-1)
    x0, x1, y0, y1 = (x - 1).clamp(min=0), (x + 1).clamp(max=W - 1), (y - 1).clamp(min=0), (y + 1).clamp(max=H - 1)
    d_x = (images[view, y, x1] - images[view, y, x0]) / (x1 - x0).clamp(min=1)[:, None]
    d_y = (images[view, y1, x] - images[view, y0, x]) / (y1 - y0).clamp(min=1)[:, None]
    return torch.stack([d_x, d_y], -1)


# -------------------------------------------------------------------------------------------------------------- the field

class _TruncatedExp(torch.autograd.Function):
    """exp(x), whose gradient is cut at exp(15): one wild sample must not blow up the table (Instant-NGP)."""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, d_y):
        return d_y * ctx.saved_tensors[0].clamp(max=15).exp()


class HashField(nn.Module):
    """Instant-NGP's field: hash grid -> MLP 64 -> density and 15 features; these and the direction -> MLP 64, 64 -> colour."""
    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        self.levels = hash_levels(args.levels, args.base, args.finest, args.log2_table)
        self.half = args.half
        self.register_buffer("aabb", aabb)                                                          # (2, 3)
        self.table = nn.Parameter(torch.empty(self.levels.offsets[-1], args.features).uniform_(-1e-4, 1e-4))
        self.geometry = nn.Sequential(nn.Linear(args.levels * args.features, 64), nn.ReLU(), nn.Linear(64, 16))
        self.colour = nn.Sequential(nn.Linear(15 + 16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))

    def encode(self, x: Tensor) -> Tensor:
        """x (N, 3) in the world -> (N, 16): log density + 1, and what the colour depends on."""
        u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])                                      # (N, 3) in [0, 1]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            return self.geometry(hash_encode(u, self.table, self.levels))

    def density(self, x: Tensor) -> Tensor:
        return _TruncatedExp.apply(self.encode(x)[:, 0].float() - 1)

    def forward(self, x: Tensor, sh: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3), sh (N, 16) spherical harmonics of the direction -> sigmas (N,) [1/length], rgbs (N, 3) in (0, 1)."""
        h = self.encode(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            rgbs = self.colour(torch.cat([h[:, 1:], sh.to(h)], -1))
        return _TruncatedExp.apply(h[:, 0].float() - 1), torch.sigmoid(rgbs.float())


def render(field: HashField, grid: OccupancyGrid, rays_o: Tensor, rays_d: Tensor, scene: Scene, bg: Tensor, step: float,
           jitter: Optional[Tensor] = None) -> dict:
    """Rays (R, 3) -> rgb (R, 3) over the background bg (3,) or (R, 3), acc (R,), depth (R,), samples (their number N).

    Differentiable in the field and, through the samples' positions and directions, in the rays; the distances t are constants.
    """
    t_starts, t_ends, offsets, ray = march(rays_o, rays_d, grid.occupied, grid.aabb, step, scene.near, scene.far, jitter)
    t = 0.5 * (t_starts + t_ends)                                                                   # (N,)
    o, d, sh = (a.index_select(0, ray) for a in (rays_o, rays_d, spherical_harmonics(rays_d)))      # (N, ...); faster backward than a[ray]
    sigmas, rgbs = field(o + t[:, None] * d, sh)
    rgb, acc, depth, _ = composite(sigmas, rgbs, t_starts, t_ends, offsets)
    return {"rgb": rgb + (1 - acc[:, None]) * bg, "acc": acc, "depth": depth, "samples": len(t)}


def camera_rays(views: Views, view: Tensor, xy: Tensor, ndc: bool) -> tuple[Tensor, Tensor]:
    """Rays of pixels xy (N, 2) in pictures view (N,) -> rays_o, rays_d (N, 3); differentiable in xy."""
    K = K_of(views, view)
    rays_o, rays_d = pixel_rays(xy, K, views.c2w[view])
    return ndc_rays(rays_o, rays_d, K, *views.images.shape[1:3]) if ndc else (rays_o, rays_d)


@torch.no_grad()
def render_view(field, grid, views: Views, v: int, scene: Scene, step: float, chunk: int = 8192) -> dict:
    """A whole picture: rgb (H, W, 3) in [0, 1], depth (H, W)."""
    H, W = views.images.shape[1:3]
    parts = [render(field, grid, o, d, scene, scene.bg, step) for o, d in zip(*(r.split(chunk) for r in view_rays(views, v, scene.ndc)))]
    return {"rgb": torch.cat([p["rgb"] for p in parts]).clamp(0, 1).view(H, W, 3), "depth": torch.cat([p["depth"] for p in parts]).view(H, W)}


def evaluate(field, grid, scene: Scene, step: float, views: list[int], pictures=None) -> dict:
    """Mean over test views of each view's PSNR [dB] and SSIM; pictures: folder for strips (truth | render | error | depth)."""
    scores = []
    for v in views:
        truth, out = scene.test.images[v], render_view(field, grid, scene.test, v, scene, step)
        scores.append([float(psnr(out["rgb"], truth)), float(ssim(out["rgb"], truth))])
        if pictures:
            save_png(pictures / f"test_{v:03d}.png", strip(truth, out["rgb"], out["depth"], scene.near, scene.far))
    return dict(zip(("psnr", "ssim"), torch.tensor(scores).mean(0).tolist()))


def walker_picture(field, grid, scene: Scene, step: float, visits: Tensor) -> Tensor:
    """Three training views, a row each: truth | render | its error, 0 to 0.25, with a white dot where a pixel was drawn since the last
    picture.  visits (V, H, W) -> (3 H z, 3 W z, 3), enlarged by a whole z to at least 300 pixels."""
    V, H, W = visits.shape
    rows = []
    for v in spread(V, 3):
        truth, out = scene.train.images[v], render_view(field, grid, scene.train, v, scene, step)["rgb"]
        error = colour_map((out - truth).abs().mean(-1), 0, 0.25)
        rows.append(torch.cat([truth, out, torch.where(visits[v][..., None], 1.0, error)], 1))
    z = math.ceil(300 / W)
    return torch.cat(rows).repeat_interleave(z, 0).repeat_interleave(z, 1)


# --------------------------------------------------------------------------------------------------------------- training

# flags that may change between a run and its --resume or --eval-only (lr: the cure of a loss that is not finite)
FREE = {"lr", "data", "device", "out", "resume", "eval_only", "video", "tensorboard"}


def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("steps", "rays", "samples", "pool", "levels", "features", "base", "finest", "march_steps", "grid", "eval_every",
                                "eval_views", "refresh", "warmup", "lr_warmup", "lr"),
                not_negative=("alpha", "drift", "noise", "weight_decay"), shares=("uniform_share", "reborn_share", "grid_decay"))
    if not 1 <= args.log2_table <= 24 or args.finest < args.base:
        raise UserError(f"--log2-table {args.log2_table} --base {args.base} --finest {args.finest}: wanted 1 to 24, and finest not below base")
    if args.walkers == "global" and args.sampling == "lmc" and args.reinit == "none":
        raise UserError("--walkers global moves walkers to other images at their rebirth: use it with --reinit edge or uniform")
    if args.as_released and args.sampling != "lmc":
        raise UserError(f"--as-released is a rule for walkers: it needs --sampling lmc, not {args.sampling}")


def anneal(progress: float, schedule: str) -> float:
    """Factor on the learning rate, 1 at progress 0; 1/10 at progress 1 unless constant."""
    return {"cosine": 0.55 + 0.45 * math.cos(math.pi * progress), "exponential": 0.1 ** progress, "constant": 1.0}[schedule]


def train(args: Args) -> dict:
    """Train, evaluate, write the run folder; -> what summary.json holds."""
    check(args)
    torch.manual_seed(args.seed)
    scene = to_device(load_scene(args.scene, args.data, args.size, args.background, args.train_split), args.device)
    if args.as_released:                                                                            # constants of the released code
        args = replace(args, alpha=0.8 if scene.ndc else 0.6, clamp=True, weighting="on", batch="rays", train_background="scene")
    run = Run("soft_mining", scene.name, args.out, asdict(args), resume=args.resume, eval_only=args.eval_only)
    board = tensorboard(run.path) if args.tensorboard else None
    weighting = args.weighting == "on" or args.weighting == "auto" and args.sampling != "uniform"

    images, tests = scene.train.images, len(scene.test.images)                                      # (V, H, W, 3)
    random_bg = args.train_background == "random" and scene.train.alpha is not None
    alpha = scene.train.alpha[..., None] if random_bg else None                                     # (V, H, W, 1)
    field = HashField(args, scene.aabb).to(args.device)
    grid = OccupancyGrid(scene.aabb, args.grid, decay=args.grid_decay).to(args.device)
    sampler = make_sampler(scene, args).to(args.device)
    optimiser = torch.optim.Adam(field.parameters(), lr=args.lr, eps=1e-15, weight_decay=args.weight_decay, fused=True)
    parts = {"field": field, "grid": grid, "sampler": sampler, "optimiser": optimiser}              # what a checkpoint holds
    march_step = float((scene.aabb[1] - scene.aabb[0]).norm()) / args.march_steps                   # in world units
    count = {"step": 0, "rays": 0, "samples": 0, "next_rays": args.rays}
    clock = Stopwatch(args.device)
    if run.resumed:
        state = run.load({name: value for name, value in run.args.items() if name not in FREE})
        for name, part in parts.items():
            part.load_state_dict(state[name])
        set_random_state(state["random"])
        count, clock = state["count"], Stopwatch(args.device, state["seconds"])
    if args.resume:
        run.rewind(count["step"])                                                                   # lines that will be written again
    visits = torch.zeros(images.shape[:3], dtype=torch.bool, device=args.device)                    # pixels since the last picture
    (run.path / "walkers").mkdir(exist_ok=True)
    progress = Progress(args.steps, count["step"])
    scores = None

    while count["step"] < args.steps and not args.eval_only:
        t = count["step"]
        clock.start()
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min((t + 1) / args.lr_warmup, 1) * anneal(t / args.steps, args.schedule)
        if t % 16 == 0:
            grid.update(field.density, march_step, warm=t < 256)
        # 1. draw pixels from Q, and their rays; a ray follows its pixel differentiably
        view, xy = sampler.draw(count["next_rays"])                                                 # (N,), (N, 2)
        x, y = xy.long().unbind(-1)
        truth, bg = images[view, y, x], scene.bg                                                    # (N, 3), a constant
        if random_bg:                                                                               # in scene.bg's place
            bg = torch.rand_like(truth)
            truth = truth + (1 - alpha[view, y, x]) * (bg - scene.bg)
        xy.requires_grad_(args.sampling == "lmc" and args.pixel_gradient)
        rays_o, rays_d = camera_rays(scene.train, view, xy, scene.ndc)
        # 2. render them
        out = render(field, grid, rays_o, rays_d, scene, bg, march_step, jitter=torch.rand(len(xy), device=args.device))
        # 3. the error, its density Q, the soft weight, the loss
        difference = out["rgb"] - truth                                                             # (N, 3)
        e, q = (difference ** 2).mean(-1), difference.detach().abs().mean(-1)                       # (N,)
        exponent = min(t / 1000, args.alpha) if args.as_released else args.alpha * min(t / args.warmup, 1)
        w = soft_weight(q, exponent, args.clamp) if weighting else torch.ones_like(q)
        loss = (w * e).mean()
        check_finite(loss, t)
        # 4. the field takes a step
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        # 5. the walkers move, by the gradient that the backward pass left at their pixels
        d_xy = xy.grad
        if d_xy is not None and args.truth_gradient:
            d_rgb = 2 * w[:, None] * difference.detach() / difference.numel()                       # dL/drgb
            d_truth = truth_gradient(images, view, xy.detach())                                     # (N, 3, 2)
            if random_bg:
                d_truth = d_truth - (bg - scene.bg)[:, :, None] * truth_gradient(alpha, view, xy.detach())
            d_xy = d_xy - (d_rgb[:, :, None] * d_truth).sum(1)
        sampler.update(e.detach(), q, w, d_xy)
        # 6. the books, and the size of the next batch: half way to equal cost
        count = {"step": t + 1, "rays": count["rays"] + len(xy), "samples": count["samples"] + out["samples"], "next_rays": len(xy)}
        if args.batch == "samples":
            count["next_rays"] = int(min(max(len(xy) * (args.samples / max(out["samples"], 1)) ** 0.5, 64), args.pool))
        seconds = clock.stop()

        visits[view, y, x] = True
        progress(t + 1, loss=loss, psnr=-10 * e.mean().log10(), rays_per_second=count["rays"] / seconds)
        last = t + 1 == args.steps
        if (t + 1) % args.eval_every == 0 or last:
            check_not_empty(out["acc"], t + 1)
            n = tests if last else min(args.eval_views, tests)
            scores = evaluate(field, grid, scene, march_step, spread(tests, n), pictures=run.path if last else None)
            run.log(step=t + 1, rays=count["rays"], samples=count["samples"], train_seconds=seconds, loss=loss.item(), views=n, **scores)
            for name, value in scores.items() if board else ():
                board.add_scalar(name, value, t + 1)
            save_png(run.path / "walkers" / f"{t + 1:06d}.png", walker_picture(field, grid, scene, march_step, visits))
            visits.zero_()
            run.save({"random": random_state(), "count": count, "seconds": seconds, **{name: part.state_dict() for name, part in parts.items()}})
    progress.close()
    if scores is None:                                                                              # nothing was left to train
        scores = evaluate(field, grid, scene, march_step, range(tests), pictures=run.path)
    return conclude(args, run, scene, field, grid, march_step, count, clock.seconds, scores)


def conclude(args: Args, run: Run, scene: Scene, field, grid, march_step: float, count: dict, seconds: float, scores: dict) -> dict:
    """Write the film, the turntable and the summary. scores: of all test views."""
    frames = [torch.from_numpy(iio.imread(file)) / 255 for file in sorted((run.path / "walkers").glob("*.png"))]
    save_video(run.path / "walkers.gif", frames, fps=4)
    if args.video:
        path = turntable(scene, 120)                                                                # (120, 3, 4)
        views = replace(scene.test, c2w=path.to(args.device), images=scene.test.images[:1].expand(len(path), -1, -1, -1))
        save_video(run.path / "render.mp4", [render_view(field, grid, views, v, scene, march_step)["rgb"] for v in range(len(path))])
    summary = dict(method="soft_mining", scene=scene.name, data=scene.kind, size=args.size, seed=args.seed, steps=count["step"],
                   train_seconds=round(seconds, 2), peak_memory_mb=round(peak_memory_mb(args.device), 1), **scores,
                   sampling=args.sampling, rays=count["rays"], samples=count["samples"])
    run.summary(**summary)
    print(f"{scene.name}: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} over {len(scene.test.images)} test views after "
          f"{count['step']} steps, {seconds:.1f} s of training; pictures in {run.path}")
    return summary


if __name__ == "__main__":
    cli(PRESETS, train)
