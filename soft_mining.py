"""Soft Mining: train on the pixels that still have error (Kheradmand et al., CVPR 2024,
arXiv 2312.00075).

Most pixels of an image are fitted early, and rays through them teach nothing more. Soft Mining
draws pixels from a density proportional to their present error Q, and divides the loss of each by
Q^alpha. The expected loss is then proportional to sum Q^(1 - alpha) err: with alpha = 0 difficult
pixels count more (hard mining), with alpha = 1 all pixels count alike (importance sampling), and
in between lies soft mining. No error map is kept to draw from. Every training ray is a random
walker on its image instead, which follows the gradient of log Q at its own pixel, given by the
ordinary backward pass, and adds noise: Langevin Monte Carlo (LMC).

    L = 1/R sum_r err(x_r) / sg(Q(x_r))^alpha                soft_weight, step 4 of train
    x <- x + a grad log Q(x) + b eta,  eta ~ N(0, I)         Walkers.update, step 6 of train
    the exponent grows linearly from 0 to alpha              soft_exponent

| paper                   | here                                                                 |
|-------------------------|----------------------------------------------------------------------|
| f(x), gt(x), x_n, N     | rgb, target, (view, xy), the number of rays R                        |
| err(x) = |f - gt|_2^2   | squared_error, a mean over channels                                  |
| Q(x) = |f - gt|_1       | abs_error, a mean over channels                                      |
| alpha, b, a             | --alpha, --noise, a = beta b^2 / 2 with --beta (see Walkers)         |
| sg                      | detach: no gradient passes                                           |

    python soft_mining.py --scene lego                       31.3 dB (100 px, mean of 3 seeds)
    python soft_mining.py --scene lego --sampling uniform    29.7 dB
With equally many rays a step (--ray-sampling proposal --steps 500), lego: uniform 25.9, edge 28.0,
multinomial 26.0, lmc 28.4, lmc --no-pixel-gradient 28.5, lmc --weighting off 28.4 dB (+- 0.2).
The training PSNR of lmc is lower, as it is that of hard pixels. walkers.gif: what is visited.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, Optional

import imageio.v3 as iio
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (OccupancySampler, ProposalSampler, Scene, SceneArgs, TrainingRun, Views,
                    camera_path, camera_rays, check_colours, check_flags, cli, colour_map,
                    comparison_strip, evenly_spaced, load_scene, psnr, random_background, require,
                    save_png, save_video, spherical_harmonics, ssim, to_device, truncated_exp,
                    view_rays)
from kernels import composite, hash_encode, hash_levels


@dataclass
class Args(SceneArgs):
    sampling: Literal["uniform", "edge", "multinomial", "lmc"] = "lmc"
    """Where the pixels of a step come from: everywhere, edges, a stored error map, or walkers."""
    alpha: float = 0.6
    """Exponent of the soft weight 1 / Q^alpha: 0 is hard mining, 1 is importance sampling."""
    warmup: int = 100
    """Steps in which the exponent grows linearly from 0 to alpha."""
    weighting: Literal["auto", "on", "off"] = "auto"
    """Soft weight in the loss. auto: with every sampling but uniform."""
    clamp: bool = True
    """Clamp the weights of a batch to [0.2, mean + std]."""
    beta: float = 1.0
    """Inverse temperature: the pure walk has the stationary density Q^beta (0: plain diffusion)."""
    noise: float = 0.02
    """b, standard deviation of one move [longer image sides]."""
    pixel_gradient: bool = True
    """Walkers follow grad log Q (off: they only diffuse and are re-initialised)."""
    reinit: Literal["none", "uniform", "edge"] = "edge"
    """Where walkers start again that left their image or found too little error (none: nowhere)."""
    reinit_share: float = 0.3
    """Share of the walkers of a step, those of least error, that are re-initialised."""
    uniform_share: float = 0.1
    """Share of the pixels of a step that is drawn uniformly (every sampling)."""
    as_released: bool = False
    """Walkers, alpha, clamp, batch and background of the released code, its errors included."""

    ray_sampling: Literal["occupancy", "proposal"] = "occupancy"
    """Where samples stand on a ray: in occupied cells, or where two networks expect density."""
    march_steps: int = 192
    """occupancy: samples along the diagonal of the scene's box, all cells being occupied."""
    proposal_samples: tuple[int, int] = (32, 16)
    """proposal: intervals a ray in the two proposal rounds."""
    ray_samples: int = 16
    """proposal: samples a ray that the field sees."""
    batch: Literal["rays", "samples"] = "samples"
    """What all steps have equally many of. samples: mined rays need more, so there are fewer."""
    rays: int = 256
    """Rays a step, R (with --batch samples: in the first step)."""
    samples: int = 8192
    """Samples a step with --batch samples."""
    num_walkers: int = 8192
    """Walkers kept with --batch samples, and the most rays a step."""

    levels: int = 8
    """Hash grid levels, L."""
    features: int = 4
    """Features a level, F."""
    log2_table: int = 16
    """log2 of the rows of a level's table."""
    finest: int = 256
    """Cells a side of the finest level (the coarsest has 16)."""
    lr: float = 2e-2
    """Learning rate of Adam after a warm-up of 100 steps; it falls to a tenth along a cosine."""
    half: bool = False
    """Matrix products of the MLPs in bfloat16 (for GPUs)."""


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", size=800, steps=20_000, eval_every=1000, eval_views=25,
                  ray_sampling="proposal", proposal_samples=(128, 96), ray_samples=64,
                  batch="rays", rays=4096, reinit_share=0.1, warmup=1000, lr=1e-2, levels=16,
                  features=2, log2_table=19, finest=4096, march_steps=1024, half=True),
}


# ---------------------------------------------------------------------------- the soft weight

def soft_weight(abs_error: Tensor, exponent: float, clamp: bool = True) -> Tensor:
    """w_r = max(Q_r, 2^-10)^-exponent.  abs_error Q (R,) -> w (R,), no gradient (sg).

    Why Q is the absolute error: the gradient of err = d^2 with respect to the colour has the size
    2 |d|, and sampling in proportion to it gives the estimate of least variance.
    Why a weight: pixels drawn from Q count Q times too often. exponent 1 takes this back exactly:
    E_Q[w err] = mean(err) / mean(Q), the uniform loss up to a factor, which Adam does not see.
    exponent 0 takes nothing back. By itself, w err = |d|^(2 - exponent) lies between the squared
    and the absolute error: uniform pixels gain 0.6 dB by it at equal samples, none at equal rays.
    clamp: a fitted pixel can have a weight 30 times that of its neighbours, and would decide the
    direction of the step alone. So weights are clamped to [0.2, mean(w) + std(w)] of the batch (the
    released code's rule; as Q <= 1, the lower bound never acts). Exponent 1 is then biased as well.
    Example: Q = (1/4, 1/4, 1/4, 2^-10), exponent 1/2 -> w = (2, 2, 2, 32), clamped (2, 2, 2, 24.5).
    """
    w = abs_error.detach().clamp(min=2 ** -10) ** -exponent
    if not clamp:
        return w
    upper = w.mean() + w.std(correction=min(1, len(w) - 1))
    return torch.minimum(w.clamp(min=0.2), upper)


# -------------------------------------------------------------------------- Langevin walkers
# A pixel sampler, a module (its buffers are saved in checkpoints and follow it to the GPU), has
#     draw(n, step) -> view (n,), xy (n, 2)   images and pixel centres (x, y) of this step
#     update(squared_error, abs_error, weight, d_xy)     what came of that draw: (n,) each, and
#                                             d_xy (n, 2) = d mean(weight squared_error) / d xy

def grad_log_q(squared_error: Tensor, weight: Tensor, d_xy: Tensor) -> Tensor:
    """Gradient of log Q at each walker's pixel.  (R,), (R,), (R, 2) -> (R, 2) [1/pixel].

    The loss is 1/R sum_s w_s err_s, and pixel r only enters err_r, with w_r constant. So
    d_xy_r = w_r grad err_r / R, and dividing by w_r / R gives grad err_r, whatever R and w are.
    Q = |d| has no gradient at d = 0, so its smooth form sqrt(err) stands for it:
    grad log sqrt(err) = grad err / (2 err).
    The target's own gradient is left out, as in the released code: err changes only through the
    rendered colour. Adding it made no difference on lego (29.66 against 29.60 dB).
    """
    return len(weight) * d_xy / (2 * weight * squared_error).clamp(min=1e-12)[:, None]


class Walkers(nn.Module):
    """Langevin walkers on the images: x <- x + a grad log Q(x) + b eta, and re-initialisation.

    Why a = beta b^2 / 2. Let p(x) be the density of many walkers. For small moves it obeys
    dp/dt = -div(a p grad log Q) + b^2/2 lap(p) (Fokker-Planck). p = Q^k has the gradient
    k p grad log Q, so the right side vanishes for k = 2a / b^2. Walkers that only walk therefore
    visit Q^beta if a = beta b^2 / 2, at every resolution and batch size (a and b in pixels).
    One drift is clipped to 2 b: the gradient of a logarithm has no bound where the error vanishes.

    What the walkers really visit. At each step the reinit_share of least error, and those that
    left their image, start again on an edge, where errors are found first; a uniform_share starts
    anywhere, so that no pixel is forgotten. With the defaults this happens to four walkers of ten.
    A walker then makes two or three moves in its life, too few for the density above. Measured on
    lego, visits ~ Q^k with k = 0.7 (visit_exponent). The weight Q^-0.6 nearly takes this back, so
    the default is close to importance sampling: the uniform loss, with more rays at the errors.
    Example: 100 px, noise 0.02: b = 2 px; beta 1: a = 2 px^2. Where Q grows by a tenth a pixel,
    a move is 0.2 px of drift and 2 px of noise. So --no-pixel-gradient changes little here.

    num_walkers exist, at least one an image, each tied to its image. A step moves n of them. A
    walker stands at a real position and trains the pixel there. Buffers: view (P,), xy (P, 2).
    """
    def __init__(self, images: Tensor, args: Args, num_walkers: int):
        super().__init__()
        V, self.H, self.W, _ = images.shape
        num_walkers = max(num_walkers, V)
        self.args = args
        self.noise = args.noise * max(self.H, self.W)                          # b in pixels
        self.edges = PixelTable(edge_maps(images)) if args.reinit == "edge" else None
        self.register_buffer("view", torch.arange(num_walkers, device=images.device) % V)
        self.register_buffer("xy", uniform_pixels(num_walkers, self.H, self.W, images.device))
        self.size = torch.tensor([self.W, self.H], device=images.device)

    def draw(self, n: int, step: int = 0) -> tuple[Tensor, Tensor]:
        self.drawn = torch.randperm(len(self.xy), device=self.xy.device)[:n]
        return self.view[self.drawn], self.xy[self.drawn].floor() + 0.5

    def update(self, squared_error, abs_error, weight, d_xy: Optional[Tensor]) -> None:
        args, n, device = self.args, len(abs_error), abs_error.device
        view, xy = self.view[self.drawn], self.xy[self.drawn]
        # Langevin move
        if d_xy is not None:
            drift = args.beta * self.noise ** 2 / 2 * grad_log_q(squared_error, weight, d_xy)
            length = drift.norm(dim=1, keepdim=True).clamp(min=1e-12)
            xy = xy + drift * (2 * self.noise / length).clamp(max=1)
        xy = xy + self.noise * torch.randn(n, 2, device=device)
        # re-initialise those that left their image, and those of least error
        starts = ((xy < 0) | (xy >= self.size)).any(1)
        starts[abs_error.topk(int(args.reinit_share * n), largest=False).indices] = True
        if args.reinit == "edge":
            xy = torch.where(starts[:, None], self.edges.draw(view).to(xy), xy)
        elif args.reinit == "uniform":
            xy = torch.where(starts[:, None], uniform_pixels(n, self.H, self.W, device), xy)
        else:                                                       # the image's border reflects
            xy = self.size - (self.size - xy.abs()).abs()
        # a share of uniform positions, so that every pixel is visited now and then
        uniform = torch.randperm(n, device=device)[:round(args.uniform_share * n)]
        xy[uniform] = uniform_pixels(len(uniform), self.H, self.W, device)
        self.xy[self.drawn] = torch.minimum(xy.clamp(min=0), self.size - 1e-3)  # below the size


def visit_exponent(visits: Tensor, abs_error: Tensor) -> float:
    """The k for which visits ~ Q^k fits best, over pixels in ten groups of equal size by Q.

    visits (n,) how often each pixel was drawn, abs_error Q (n,). Slope of the least-squares line
    through (log mean Q, log mean visits) of the groups that were visited. 0 is uniform.
    Example: visits of 1, 2, 4 where Q is 1, 4, 16 give k = 1/2.
    """
    order = abs_error.argsort()
    groups = [(abs_error[ids].mean().clamp(min=2 ** -10), visits[ids].float().mean())
              for ids in order.tensor_split(10)]
    points = torch.tensor([(math.log(q), math.log(v)) for q, v in groups if v > 0])        # (G, 2)
    if len(points) == 0:
        return 0.0
    x, y = (points - points.mean(0)).unbind(1)
    return float((x * y).sum() / (x * x).sum().clamp(min=1e-12))


# --------------------------------------- baselines: pixels from a table, and the released code

def edge_maps(images: Tensor, released: bool = False) -> Tensor:
    """Sobel magnitude of the grey image over its maximum, in [1e-5, 1].
    images (V, H, W, 3) -> (V, H, W). In float64, as convolutions on a GPU may keep 10 bits (TF32).

    Released code: the maximum is that of each pixel column, and the border counts as an edge.
    """
    grey = (images @ images.new_tensor([0.2989, 0.5870, 0.1140]))[:, None].double()
    grey = F.pad(grey, (1, 1, 1, 1), mode="constant" if released else "replicate")
    sobel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    magnitude = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1)
    largest = magnitude.amax(1 if released else (1, 2), keepdim=True)
    return (magnitude / (largest + 1e-7)).clamp(1e-5, 1.0).to(images)


class PixelTable:
    """Draws pixels from a density (V, H, W) >= 0 over each image by inverting its distribution
    function. Those of all images are one sorted array, in which that of image v runs from v to
    v + 1, so that one searchsorted serves all images."""
    def __init__(self, density: Tensor):
        V, self.H, self.W = density.shape
        cdf = density.reshape(V, -1).double().cumsum(1)
        shift = torch.arange(V, device=density.device, dtype=torch.float64)[:, None]
        self.cdf = (cdf / cdf[:, -1:] + shift).flatten()

    def draw(self, view: Tensor) -> Tensor:
        """view (n,) -> xy (n, 2), the centre of one pixel of each image."""
        u = view + torch.rand(len(view), dtype=torch.float64, device=view.device)
        pixel = torch.searchsorted(self.cdf, u, right=True) - view * (self.H * self.W)
        pixel = pixel.clamp(0, self.H * self.W - 1)                # u may round up to the end
        return torch.stack([pixel % self.W, pixel // self.W], -1) + 0.5


def uniform_pixels(n: int, H: int, W: int, device) -> Tensor:
    """n pixel centres, each pixel equally likely: xy (n, 2)."""
    x, y = torch.rand(n, 2, device=device).unbind(1)
    return torch.stack([x * W, y * H], 1).floor() + 0.5


class TableSampler(nn.Module):
    """Draws pixels from a density over each image, apart from a uniform share.

    uniform: all pixels alike. edge: edge_maps. multinomial: a stored map of Q, where each pixel has
    the abs_error of the last time that it was drawn (until then the mean of all drawn ones). In
    500 steps a quarter of lego's pixels is drawn: most of the map is that mean, nearly uniform.
    """
    REFRESH = 10

    def __init__(self, images: Tensor, args: Args):
        super().__init__()
        self.V, self.H, self.W, _ = images.shape
        self.sampling = args.sampling
        self.share = 1.0 if args.sampling == "uniform" else args.uniform_share
        unknown = torch.full(images.shape[:3], torch.nan, device=images.device)
        self.register_buffer("error", unknown)
        self.register_buffer("density", torch.ones_like(unknown))
        if args.sampling == "edge":
            self.density = edge_maps(images)
        self.table = PixelTable(self.density)

    def load_state_dict(self, state, *rest):
        super().load_state_dict(state, *rest)
        self.table = PixelTable(self.density)

    def draw(self, n: int, step: int = 0) -> tuple[Tensor, Tensor]:
        if self.sampling == "multinomial" and step > 0 and step % self.REFRESH == 0:
            error = torch.where(self.error.isnan(), self.error.nanmean(), self.error)
            self.density = error.clamp(min=2 ** -10)
            self.table = PixelTable(self.density)
        view = torch.randint(self.V, (n,), device=self.density.device)
        xy = uniform_pixels(n, self.H, self.W, view.device)
        k = round((1 - self.share) * n)
        xy[:k] = self.table.draw(view[:k]).to(xy)
        self.batch = view, xy.long()
        return view, xy

    def update(self, squared_error, abs_error, weight, d_xy) -> None:
        view, (x, y) = self.batch[0], self.batch[1].unbind(-1)
        self.error[view, y, x] = abs_error


class ReleasedWalkers(nn.Module):
    """The walkers of the released code, its errors included (--as-released).

    Positions s = (row / (H-1), column / (W-1)); ceil(rays / V) walkers an image, all move at every
    step. Where it differs from Walkers:
    * The drift, A grad log err / R in pixels, is added to s, whose unit is the image's side. At
      800 px, 4100 rays and b = 16 px it is 20 * 799 / 4100 = 3.9 px^2 grad log err, or 7.8 px^2
      grad log Q, so beta = 2 * 7.8 / 16^2 = 0.06: the walk is nearly plain diffusion.
    * The uniform share is always the last tenth of the walkers, those of the last images.
    * Walkers are re-initialised by their weighted error, on edges of the image on black.
    """
    A, B, UNIFORM, REINIT = 20.0, 0.02, 0.1, 0.1

    def __init__(self, images: Tensor, black: Tensor, rays: int):
        super().__init__()
        V, self.H, self.W, _ = images.shape
        per_image = math.ceil(rays / V)
        self.last = torch.tensor([self.H - 1, self.W - 1], device=images.device)
        self.edges = PixelTable(edge_maps(black, released=True))
        ids = torch.arange(per_image * V, device=images.device)
        self.register_buffer("view", ids // per_image)
        self.register_buffer("s", self.to_s(uniform_pixels(len(ids), self.H, self.W, ids.device)))

    def to_s(self, xy: Tensor) -> Tensor:
        return (xy - 0.5).flip(-1) / self.last

    def draw(self, n: int, step: int = 0) -> tuple[Tensor, Tensor]:
        return self.view, (self.s * self.last).round().flip(-1) + 0.5

    def update(self, squared_error, abs_error, weight, d_xy: Optional[Tensor]) -> None:
        N, loss = len(abs_error), weight * squared_error
        s = self.s + self.B * torch.randn_like(self.s)
        if d_xy is not None:
            eps = torch.finfo(loss.dtype).eps / 1024       # its loss has a factor of 1024
            s = s + self.A * (d_xy / (loss + eps)[:, None]).flip(-1)
        starts = ((s < 0) | (s > 1)).any(1)
        starts |= loss <= loss.kthvalue(int(self.REINIT * N) + 1).values
        k = int(self.UNIFORM * N)
        s[N - k:] = torch.rand(k, 2, device=s.device)
        edges = self.to_s(self.edges.draw(self.view).to(s))
        self.s = torch.where(starts[:, None], edges, s).clamp(0, 1)


def make_pixel_sampler(scene: Scene, args: Args) -> nn.Module:
    images, alpha = scene.train.images, scene.train.alpha
    if args.as_released:
        outside = 0 if alpha is None else (1 - alpha[..., None]) * scene.bg
        return ReleasedWalkers(images, images - outside, args.rays)
    if args.sampling != "lmc":
        return TableSampler(images, args)
    return Walkers(images, args, args.rays if args.batch == "rays" else args.num_walkers)


# ------------------------------------------------------------------------------------ the field

class HashField(nn.Module):
    """Instant-NGP's field: hash grid -> MLP -> density and 15 features; these and the view
    direction -> MLP -> colour. Released code: features and directions are standardised first."""
    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        self.levels = hash_levels(args.levels, 16, args.finest, args.log2_table)
        self.half = args.half
        self.register_buffer("aabb", aabb)                                     # (2, 3)
        rows = self.levels.offsets[-1]
        self.table = nn.Parameter(torch.empty(rows, args.features).uniform_(-1e-4, 1e-4))
        self.geometry = nn.Sequential(nn.Linear(args.levels * args.features, 64), nn.ReLU(),
                                      nn.Linear(64, 16))
        self.colour = nn.Sequential(nn.Linear(15 + 16, 64), nn.ReLU(), nn.Linear(64, 64),
                                    nn.ReLU(), nn.Linear(64, 3))

    def encode(self, x: Tensor) -> Tensor:
        """x (N, 3) in the world -> (N, 16): log density + 1, and what the colour depends on."""
        u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])                 # (N, 3) in [0, 1]
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            h = self.geometry[:2](hash_encode(u, self.table, self.levels))
        return self.geometry[2](h.to(x))            # bfloat16 changes a density by 1 %

    def density(self, x: Tensor) -> Tensor:
        return truncated_exp(self.encode(x)[:, 0] - 1)

    def forward(self, x: Tensor, sh: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3), sh (N, 16) spherical harmonics of the direction
        -> sigmas (N,) [1/length], rgbs (N, 3) in (0, 1)."""
        h = self.encode(x)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            rgbs = self.colour(torch.cat([h[:, 1:], sh.to(h)], -1))
        return truncated_exp(h[:, 0] - 1), torch.sigmoid(rgbs.float())


# ------------------------------------------------------------------------ rendering, evaluation

def render(field: HashField, ray_sampler: nn.Module, rays_o: Tensor, rays_d: Tensor, bg: Tensor,
           jitter: Optional[Tensor] = None) -> dict:
    """Volume rendering (NeRF eq. 3) of rays (R, 3): with delta_i the length of interval i,

        T_i = exp(-sum_{j<i} sigma_j delta_j),    weights_i = T_i (1 - exp(-sigma_i delta_i)),
        rgb = sum_i weights_i rgbs_i + (1 - opacity) bg,    opacity = sum_i weights_i.

    bg (3,) or (R, 3) -> rgb (R, 3), opacity (R,), depth = sum_i weights_i t_i (R,); of the N
    samples: weights (N,), rgbs (N, 3), and N. Differentiable in the field and, through positions
    and directions of the samples, in the rays. No gradient passes through the distances t.
    """
    t_starts, t_ends, offsets, ray_indices = ray_sampler.sample(rays_o, rays_d, jitter)
    t = 0.5 * (t_starts + t_ends)                                              # (N,)
    o, d = rays_o.index_select(0, ray_indices), rays_d.index_select(0, ray_indices)
    sh = spherical_harmonics(rays_d).index_select(0, ray_indices)              # (N, 16)
    sigmas, rgbs = field(o + t[:, None] * d, sh)
    rgb, opacity, depth, weights = composite(sigmas, rgbs, t_starts, t_ends, offsets)
    return {"rgb": rgb + (1 - opacity[:, None]) * bg, "opacity": opacity, "depth": depth,
            "weights": weights, "rgbs": rgbs, "samples": len(t)}


@torch.no_grad()
def render_image(field, ray_sampler, scene: Scene, views: Views, v: int, chunk: int = 8192) -> dict:
    """A whole image: rgb (H, W, 3) in [0, 1], depth and opacity (H, W)."""
    H, W = views.images.shape[1:3]
    rays_o, rays_d = view_rays(views, v, scene.ndc)
    parts = [render(field, ray_sampler, o, d, scene.bg)
             for o, d in zip(rays_o.split(chunk), rays_d.split(chunk))]
    out = {key: torch.cat([part[key] for part in parts]) for key in ("rgb", "depth", "opacity")}
    out["rgb"].clamp_(0, 1)
    return {key: value.unflatten(0, (H, W)) for key, value in out.items()}


def evaluate(field, ray_sampler, scene: Scene, views: Optional[int], pictures=None) -> dict:
    """Mean PSNR [dB], SSIM and opacity over `views` evenly spaced test images (None: all).
    pictures: folder for one comparison strip an image (target | render | error | depth)."""
    total, scores = len(scene.test.images), []
    for v in evenly_spaced(total, min(views or total, total)):
        target = scene.test.images[v]
        out = render_image(field, ray_sampler, scene, scene.test, v)
        scores.append([float(psnr(out["rgb"], target)), float(ssim(out["rgb"], target)),
                       float(out["opacity"].mean())])
        if pictures:
            strip = comparison_strip(target, out["rgb"], out["depth"], scene.near, scene.far)
            save_png(pictures / f"test_{v:03d}.png", strip)
    return dict(zip(("psnr", "ssim", "opacity"), torch.tensor(scores).mean(0).tolist()))


def walker_picture(field, ray_sampler, scene: Scene, visits: Tensor) -> tuple[Tensor, float]:
    """What was sampled since the last evaluation, and the exponent k of visits ~ Q^k.

    visits (V, H, W) counts. Three training images, a row each: target | render | Q, 0 to 0.25, with
    a white dot where a pixel was drawn. (3 H z, 3 W z, 3), enlarged by z to at least 300 px wide.
    """
    V, H, W = visits.shape
    rows, errors, ids = [], [], evenly_spaced(V, min(V, 3))
    for v in ids:
        target = scene.train.images[v]
        rgb = render_image(field, ray_sampler, scene, scene.train, v)["rgb"]
        errors.append((rgb - target).abs().mean(-1))
        dots = torch.where(visits[v, ..., None] > 0, 1.0, colour_map(errors[-1], 0, 0.25))
        rows.append(torch.cat([target, rgb, dots], 1))
    exponent = visit_exponent(visits[ids].flatten(), torch.stack(errors).flatten())
    z = math.ceil(300 / W)
    return torch.cat(rows).repeat_interleave(z, 0).repeat_interleave(z, 1), exponent


# ------------------------------------------------------------------------------------- training

def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("rays", "samples", "num_walkers", "levels", "features", "finest",
                                "march_steps", "ray_samples", "warmup", "lr"),
                not_negative=("alpha", "beta", "noise"), shares=("uniform_share", "reinit_share"))
    require(min(args.proposal_samples) > 0, "--proposal-samples must be greater than 0")
    require(1 <= args.log2_table <= 24, f"--log2-table {args.log2_table}: wanted 1 to 24")
    require(args.finest >= 16, f"--finest {args.finest}: the coarsest level has 16 cells a side")
    require(args.sampling == "lmc" or not args.as_released,
            f"--as-released is a rule for walkers: it needs --sampling lmc, not {args.sampling}")


def learning_rate(args: Args, step: int) -> float:
    """Linear warm-up over 100 steps (at the full rate, the first steps can empty the field for
    good), times a cosine from 1 to 1/10."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
    return args.lr * min((step + 1) / 100, 1) * cosine


def soft_exponent(args: Args, step: int) -> float:
    """Exponent of the weight: linear from 0 to alpha in --warmup steps. At first the error is large
    everywhere, and nothing has to be taken back. Released code: 1/1000 a step for any alpha."""
    if args.weighting == "off" or args.weighting == "auto" and args.sampling == "uniform":
        return 0.0                                                 # all weights are 1
    if args.as_released:
        return min(step / 1000, args.alpha)
    return args.alpha * min(step / args.warmup, 1)


def num_rays(args: Args, ray_sampler: nn.Module) -> int:
    """Rays of the next step: a constant, or as many as have --samples samples."""
    if args.batch == "rays":
        return args.rays
    rays = args.samples / ray_sampler.samples_per_ray
    return int(min(max(rays, 64), args.num_walkers))


def make_ray_sampler(scene: Scene, args: Args) -> nn.Module:
    if args.ray_sampling == "proposal":
        return ProposalSampler(scene, args.proposal_samples, args.ray_samples, args.steps)
    return OccupancySampler(scene, args.march_steps, args.samples / args.rays)


def train(args: Args) -> dict:
    """Train, evaluate, write the run folder; -> what summary.json holds."""
    check(args)
    torch.manual_seed(args.seed)
    scene = to_device(load_scene(args.scene, args.data, args.size, args.background,
                                 args.normalise), args.device)
    if args.as_released:                                           # constants of the released code
        args = replace(args, alpha=0.8 if scene.ndc else 0.6, clamp=True, weighting="on",
                       batch="rays", train_background="scene")
    images, alpha = scene.train.images, scene.train.alpha          # (V, H, W, 3), (V, H, W) | None
    field = HashField(args, scene.aabb).to(args.device)
    ray_sampler = make_ray_sampler(scene, args).to(args.device)
    pixels = make_pixel_sampler(scene, args).to(args.device)
    parameters = [*field.parameters(), *ray_sampler.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=args.lr, eps=1e-15, weight_decay=1e-6, fused=True)
    visits = torch.zeros(images.shape[:3], dtype=torch.int32, device=args.device)
    run = TrainingRun("soft_mining", scene, args)

    def score(views, pictures):
        if visits.any():                               # pixels drawn since the last evaluation
            image, run.counts["visit_exponent"] = walker_picture(field, ray_sampler, scene, visits)
            (run.path / "walkers").mkdir(exist_ok=True)
            save_png(run.path / "walkers" / f"{run.step:06d}.png", image)
            visits.zero_()
        return evaluate(field, ray_sampler, scene, views, pictures)

    parts = {"field": field, "ray_sampler": ray_sampler, "pixels": pixels, "optimiser": optimiser}
    for step in run.loop(parts, score, empty="use a lower --lr, or another --seed"):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(args, step)
        # 1. place the samples: refresh the occupancy grid, or anneal the proposals
        ray_sampler.prepare(field, step)
        # 2. draw pixels, look up their colours, and make their rays (differentiable in xy)
        view, xy = pixels.draw(num_rays(args, ray_sampler), step)  # (R,), (R, 2)
        x, y = xy.nan_to_num().long().unbind(-1)       # NaN: a GPU's loss is looked at now and then
        target, bg = images[view, y, x], scene.bg                  # (R, 3), a constant
        if args.train_background == "random":
            visible = None if alpha is None else alpha[view, y, x]
            target, bg = random_background(target, visible, bg)
        xy.requires_grad_(args.sampling == "lmc" and args.pixel_gradient)
        rays_o, rays_d = camera_rays(scene.train, view, xy, scene.ndc)
        # 3. render
        jitter = torch.rand(len(xy), device=args.device)
        out = render(field, ray_sampler, rays_o, rays_d, bg, jitter)
        # 4. error, density Q, soft weight, loss
        difference = out["rgb"] - target                           # (R, 3)
        squared_error = (difference ** 2).mean(-1)                 # err (R,)
        abs_error = difference.detach().abs().mean(-1)             # Q (R,)
        weight = soft_weight(abs_error, soft_exponent(args, step), args.clamp)
        loss = (weight * squared_error).mean()
        # 5. optimise the field, and the proposal networks (whose loss does not reach xy)
        optimiser.zero_grad()
        (loss + ray_sampler.loss(out["weights"])).backward()
        run.log(loss=loss, psnr=-10 * squared_error.mean().log10(), opacity=out["opacity"].mean())
        optimiser.step()
        # 6. move the walkers along the gradient that the backward pass left at their pixels
        pixels.update(squared_error.detach(), abs_error, weight, xy.grad)
        visits.index_put_((view, y, x), torch.ones_like(x, dtype=torch.int32), accumulate=True)
        run.count(rays=len(xy), samples=out["samples"])
        if step + 1 == args.steps:
            check_colours(out["rgbs"], out["weights"], target)
    summary = run.finish(sampling=args.sampling, **run.counts)
    write_films(args, run, scene, field, ray_sampler)
    return summary


def write_films(args: Args, run: TrainingRun, scene: Scene, field, ray_sampler) -> None:
    """walkers.gif from the pictures of all evaluations; with --video a camera path, render.mp4."""
    files = sorted((run.path / "walkers").glob("*.png"))
    pictures = [torch.from_numpy(iio.imread(file)) / 255 for file in files]
    save_video(run.path / "walkers.gif", pictures, fps=4)
    if args.video:
        path = camera_path(scene.train.c2w, scene.ndc, 120).to(args.device)    # (120, 3, 4)
        views = replace(scene.test, c2w=path, K=scene.test.K[:1].expand(120, 3, 3),
                        images=scene.test.images[:1].expand(120, -1, -1, -1))
        frames = [render_image(field, ray_sampler, scene, views, v)["rgb"] for v in range(120)]
        save_video(run.path / "render.mp4", frames)


if __name__ == "__main__":
    cli(PRESETS, train)
