"""Soft Mining: train where the error is (Kheradmand et al., CVPR 2024, arXiv 2312.00075).

Most pixels of an image are fitted early, and rays through them teach little more. Soft Mining wants
to draw pixels in proportion to their present error Q. No map of errors is kept to draw from.
Instead, each training ray belongs to a walker, a moving position in one image. After a step, the
walker moves along an estimate of grad log Q, for which the backward pass of the loss goes on to the
pixel positions, and a random step is added. This is Langevin Monte Carlo (LMC).

    L = 1/R sum_r err(x_r) / sg(Q(x_r))^alpha                soft_weight, step 4 of train
    x <- x + a grad log Q(x) + b eta,  eta ~ N(0, I)         Walkers.update, step 6 of train
    the exponent grows linearly from 0 to alpha              soft_exponent

Drawing pixels in proportion to Q^k and dividing their loss by Q^alpha, pixel x counts Q^(k - alpha)
in the expected loss: alpha 0 is hard mining, alpha = k importance sampling (all pixels count alike,
but difficult ones get more rays), in between it is soft mining. In theory the walk leads to k = 1.
Here it leaves k at 0, and k = 0.7 comes from the restarts: after each step, the 30 % of its walkers
with the least error jump to edges of their image. In a short training these restarts earn most, in
a longer one the soft weight does, and the gradient nothing (section `what was measured`).

    paper                                  here
    f(x), gt(x), x_n, N                    rgb, target, (view, xy), the number of rays R
    err = |f - gt|_2^2, Q = |f - gt|_1     squared_error, abs_error: means over channels
    alpha, b, a                            --alpha, --noise, beta b^2 / 2 with --beta (see Walkers)
    sg                                     detach: no gradient passes

    python soft_mining.py --scene lego                       31.3 dB (100 px, 95 s)
    python soft_mining.py --scene lego --sampling uniform    29.7 dB
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
    alpha: float = 0.6              # exponent of the soft weight 1 / Q^alpha (0: hard mining)
    warmup: int = 100               # steps in which the exponent grows linearly from 0 to alpha
    clamp: bool = True              # clamp the weights of a batch to [0.2, mean + std]
    weighting: Literal["auto", "on", "off"] = "auto"
    """Soft weight in the loss. off: as --alpha 0. auto: on, but off with --sampling uniform."""
    beta: float = 1.0               # inverse temperature: walkers that only walk visit Q^beta
    noise: float = 0.02             # b, standard deviation of one move [longer image sides]
    pixel_gradient: bool = True     # walkers follow grad log Q (off: noise only)
    reinit: Literal["none", "uniform", "edge"] = "edge"
    """Where walkers restart that left their image or have low error (none: borders reflect)."""
    reinit_share: float = 0.3       # share of a step's walkers, those of least error, that restart
    uniform_share: float = 0.1      # share of a step's pixels that is uniform (uniform: all)
    as_released: bool = False       # the released code's rules, errors included, instead of these

    # rendering and batches, not about mining
    ray_sampling: Literal["occupancy", "proposal"] = "occupancy"
    """Where samples stand on a ray: in occupied cells, or where two networks expect density."""
    march_steps: int = 192                          # occupancy: samples along the box's diagonal
    proposal_samples: tuple[int, int] = (32, 16)    # proposal: intervals per ray in two rounds
    ray_samples: int = 16                           # proposal: samples per ray for the field
    batch: Literal["rays", "samples"] = "samples"
    """What is constant: R, or the samples of a step. Then R falls where rays need more samples."""
    rays: int = 256             # --batch rays: rays per step, R (with samples: a first guess)
    samples: int = 8192         # --batch samples: samples per step
    num_walkers: int = 8192     # --batch samples: walkers, the largest R; a step moves R of them
    levels: int = 8             # hash grid: levels
    features: int = 4           # hash grid: features per level
    log2_table: int = 16        # hash grid: log2 of the rows of a level's table
    finest: int = 256           # hash grid: cells per side of the finest level (coarsest: 16)
    lr: float = 2e-2            # Adam's learning rate, before the ramp and the cosine
    half: bool = False          # matrix products of the MLPs in bfloat16 (for GPUs)


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", size=800, steps=20_000, eval_every=1000, eval_views=25,
                  ray_sampling="proposal", proposal_samples=(128, 96), ray_samples=64,
                  batch="rays", rays=4096, reinit_share=0.1, warmup=1000, lr=1e-2, levels=16,
                  features=2, log2_table=19, finest=4096, march_steps=1024, half=True),
}


# ---------------------------------------------------------------------------- the soft weight

def soft_weight(abs_error: Tensor, exponent: float, clamp: bool = True) -> Tensor:
    """w_r = max(Q_r, 2^-10)^-exponent, clamped.  abs_error Q (R,) -> w (R,), no gradient (sg).

    Why Q is the absolute error: a ray's gradient in the parameters is 2 (rgb - target) times
    d rgb / d parameters. If the second factor is alike for all rays, rays drawn in proportion to
    |rgb - target| and divided by it (exponent 1) give the estimate of least variance.
    Why a weight: a pixel drawn in proportion to Q counts Q times as much in the mean loss. All V
    images get equally many pixels, so exponent 1 then gives 1/V sum_v mean_v(err) / mean_v(Q):
    inside an image the uniform loss up to a factor; images of large mean error count less.
    Seen as a loss: w is a constant in the backward pass, so for d = rgb - target and pixels drawn
    like Q^k the expected gradient is that of |d|^(2 + k - exponent), up to a factor: of the squared
    error for exponent k, of a loss between it and the absolute error for uniform pixels (k = 0).
    Why clamp: at exponent 0.6, Q = 2^-10 has 512^0.6 = 42 times the weight of Q = 1/2, and one
    fitted pixel could decide the direction of a step. So w is clamped to [0.2, mean(w) + std(w)] of
    the batch, as in the released code (0.2 never acts, as Q <= 1). With the clamp, not even
    exponent 1 restores the uniform loss exactly.
    Example: Q = (1/4, 1/4, 1/4, 2^-10), exponent 1/2 -> w = (2, 2, 2, 32), clamped (2, 2, 2, 24.5).
    """
    w = abs_error.detach().clamp(min=2 ** -10) ** -exponent
    if not clamp:
        return w
    upper = w.mean() + w.std(correction=min(1, len(w) - 1))
    return torch.minimum(w.clamp(min=0.2), upper)


def soft_exponent(args: Args, step: int) -> float:
    """Linear from 0 to alpha in --warmup steps: walkers begin at uniform positions (k = 0), where
    there is no bias to undo. Released code: + 1/1000 per step, whatever alpha is."""
    if args.weighting == "off" or (args.weighting == "auto" and args.sampling == "uniform"):
        return 0.0                                                 # all weights are 1
    if args.as_released:
        return min(step / 1000, args.alpha)
    return args.alpha * min(step / args.warmup, 1)


# -------------------------------------------------------------------------- Langevin walkers
# A pixel sampler (Walkers, or a baseline; its buffers are saved in checkpoints) has
#     draw(R, step) -> view (R,), xy (R, 2)   images and pixel centres (x, y) of this step
#     update(squared_error, abs_error, weight, d_xy)     what came of that draw: (R,) each, and
#                                             d_xy (R, 2) = d mean(weight squared_error) / d xy

def grad_log_q(squared_error: Tensor, weight: Tensor, d_xy: Tensor) -> Tensor:
    """Estimate of grad log Q at each walker's pixel.  (R,), (R,), (R, 2) -> (R, 2) [1/pixel].

    The loss is 1/R sum_j w_j err_j, and pixel r only enters err_r, with w_r constant. So
    d_xy_r = w_r grad err_r / R, and dividing by w_r / R gives grad err_r, whatever R and w are.
    The estimate is grad log sqrt(err) = grad err / (2 err). Two approximations: sqrt(err), the root
    mean square of |rgb - target| over the channels, stands for Q, their mean (equal if all channels
    have the same error), as the gradient of Q would need a second backward pass. And the target is
    taken as constant, as in the released code: at its edges this leaves out a large part of grad Q.
    """
    return len(weight) * d_xy / (2 * weight * squared_error).clamp(min=1e-12)[:, None]


class Walkers(nn.Module):
    """Langevin walkers, each tied to its image.  Buffers: view (num_walkers,), xy (num_walkers, 2).

    A step moves R of them, drawn at random: there are more, as R varies. With R = 512 of 8192, a
    walker moves about once in 16 steps. It stands at a real position, so that moves of less than
    a pixel add up, and trains the pixel around it, at the centre, where the target is known.

    The move is x <- x + a grad log Q(x) + b eta. Why a = beta b^2 / 2: let p(x) be the density of
    many walkers. Two flows act on it, and in equilibrium they cancel:
        a p grad log Q (drift) - b^2/2 grad p (noise) = 0   =>   p ~ Q^(2a / b^2) = Q^beta
    whatever R and the resolution are. This needs the true gradient and moves shorter than the
    details of Q: with ours, Q^beta is a guide. A drift is clipped to 2 b, since the gradient of a
    logarithm has no bound where the error vanishes.
    Example: 100 px, noise 0.02: b = 2 px; beta 1: a = 2 px^2. Where Q grows by a tenth per pixel,
    a move is 0.2 px of drift and 2 px of noise. Drift adds up like n, noise like sqrt(n), so the
    drift shows after some (2 / 0.2)^2 = 100 moves.

    Re-initialisation: the reinit_share of least error, and those that left their image, restart on
    an edge, where errors are found first; a uniform_share restarts anywhere, so that no pixel is
    forgotten. By default at least 1 - 0.7 * 0.9 = 0.37 of the R walkers of a step restart, so a
    walker makes on average 1 / 0.37 = 2.7 moves or fewer in between (paper preset: five), and the
    drift would need a hundred: --no-pixel-gradient changes little.
    """
    def __init__(self, images: Tensor, args: Args, num_walkers: int):
        super().__init__()
        V, self.H, self.W, _ = images.shape
        num_walkers = max(num_walkers, V)                                      # one per image
        self.args = args
        self.noise = args.noise * max(self.H, self.W)                          # b in pixels
        self.edges = cumulative(edge_maps(images))
        self.register_buffer("view", torch.arange(num_walkers, device=images.device) % V)
        self.register_buffer("xy", uniform_pixels(num_walkers, self.H, self.W, images.device))
        self.image_size = torch.tensor([self.W, self.H], device=images.device)

    def draw(self, R: int, step: int = 0) -> tuple[Tensor, Tensor]:
        self.drawn = torch.randperm(len(self.xy), device=self.xy.device)[:R]   # (R,)
        return self.view[self.drawn], self.xy[self.drawn].floor() + 0.5

    def update(self, squared_error, abs_error, weight, d_xy: Optional[Tensor]) -> None:
        args, R, device = self.args, len(abs_error), abs_error.device
        view, xy = self.view[self.drawn], self.xy[self.drawn]                  # (R,), (R, 2)
        # Langevin move
        if d_xy is not None:
            drift = args.beta * self.noise ** 2 / 2 * grad_log_q(squared_error, weight, d_xy)
            length = drift.norm(dim=1, keepdim=True).clamp(min=1e-12)
            xy = xy + drift * (2 * self.noise / length).clamp(max=1)
        xy = xy + self.noise * torch.randn(R, 2, device=device)
        # re-initialise those that left their image, and those of least error
        restart = ((xy < 0) | (xy >= self.image_size)).any(1)                  # (R,)
        restart[abs_error.topk(int(args.reinit_share * R), largest=False).indices] = True
        if args.reinit == "edge":
            edges = draw_pixels(self.edges, view, self.H, self.W).to(xy)
            xy = torch.where(restart[:, None], edges, xy)
        elif args.reinit == "uniform":
            xy = torch.where(restart[:, None], uniform_pixels(R, self.H, self.W, device), xy)
        else:                                                       # the image's border reflects
            xy = self.image_size - (self.image_size - xy.abs()).abs()
        # a share of uniform positions, so that every pixel is visited now and then
        uniform = torch.randperm(R, device=device)[:round(args.uniform_share * R)]
        xy[uniform] = uniform_pixels(len(uniform), self.H, self.W, device)
        # stay inside the image; NaN, from a loss that is NaN, becomes 0 (the run stops soon)
        xy = xy.nan_to_num().clamp(min=0)
        self.xy[self.drawn] = torch.minimum(xy, self.image_size - 1e-3)


def visit_exponent(visits: Tensor, abs_error: Tensor) -> float:
    """The k for which visits ~ Q^k fits best, over pixels in ten groups of equal size by Q.

    visits (n,) how often each pixel was drawn, abs_error Q (n,). Slope of the least-squares line
    through (log mean Q, log mean visits) of the groups that were visited. 0 is uniform. A rough
    number: Q is measured after the visits, and training on them has made it smaller.
    Example: visits of 1, 2, 4 where Q is 1, 4, 16 give k = 1/2.
    """
    groups = [(abs_error[ids].mean().clamp(min=2 ** -10), visits[ids].float().mean())
              for ids in abs_error.argsort().tensor_split(10)]
    points = torch.tensor([(math.log(q), math.log(v)) for q, v in groups if v > 0]).view(-1, 2)
    log_q, log_visits = (points - points.mean(0)).unbind(1)
    return float((log_q * log_visits).sum() / (log_q * log_q).sum().clamp(min=1e-12))


# -------------------------------------------------------- edges, and the baselines of --sampling

def edge_maps(images: Tensor, released: bool = False) -> Tensor:
    """images (V, H, W, 3) -> (V, H, W): Sobel magnitude of the grey image over its maximum, in
    [1e-5, 1]; in float64, as convolutions on a GPU may keep 10 bits (TF32).
    Released code: the maximum is that of each pixel column, and the border counts as an edge."""
    grey = (images @ images.new_tensor([0.2989, 0.5870, 0.1140]))[:, None].double()
    grey = F.pad(grey, (1, 1, 1, 1), mode="constant" if released else "replicate")
    sobel = grey.new_tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]])
    magnitude = F.conv2d(grey, torch.stack([sobel, sobel.T])[:, None]).norm(dim=1)
    largest = magnitude.amax(1 if released else (1, 2), keepdim=True)
    return (magnitude / (largest + 1e-7)).clamp(1e-5, 1.0).to(images)


def cumulative(pdf: Tensor) -> Tensor:
    """Cumulative distribution of the pixels of each image, pdf (V, H, W) >= 0 of any scale, in one
    sorted array (V H W,): that of image v runs from v to v + 1."""
    cdf = pdf.flatten(1).double().cumsum(1)
    first = torch.arange(len(pdf), device=pdf.device, dtype=torch.float64)[:, None]
    return (cdf / cdf[:, -1:] + first).flatten()


def draw_pixels(cdf: Tensor, view: Tensor, H: int, W: int) -> Tensor:
    """view (R,) -> xy (R, 2), the centre of a pixel of each of these images, by inverting cdf."""
    u = view + torch.rand(len(view), dtype=torch.float64, device=view.device)
    pixel = torch.searchsorted(cdf, u, right=True) - view * (H * W)
    pixel = pixel.clamp(0, H * W - 1)                              # u may round up to the end
    return torch.stack([pixel % W, pixel // W], -1) + 0.5


def uniform_pixels(n: int, H: int, W: int, device) -> Tensor:
    """n pixel centres, each pixel equally likely: xy (n, 2)."""
    x, y = torch.rand(n, 2, device=device).unbind(1)
    return torch.stack([x * W, y * H], 1).floor() + 0.5


class BaselineSampler(nn.Module):
    """Draws pixels from a map over each image, apart from a uniform share.

    uniform: all pixels alike. edge: edge_maps. multinomial: a stored map of Q, where each pixel has
    the abs_error of the last time that it was drawn (until then the mean of all drawn ones). In
    500 steps a quarter of lego's pixels is drawn: most of the map is that mean, nearly uniform.
    """
    REFRESH = 10                           # steps between two cumulative sums over all pixels

    def __init__(self, images: Tensor, args: Args):
        super().__init__()
        self.V, self.H, self.W, _ = images.shape
        self.sampling = args.sampling
        self.uniform_share = 1.0 if args.sampling == "uniform" else args.uniform_share
        pdf = edge_maps(images) if args.sampling == "edge" else torch.ones_like(images[..., 0])
        self.register_buffer("cdf", cumulative(pdf))
        self.register_buffer("error_map", torch.full_like(pdf, torch.nan))

    def draw(self, R: int, step: int = 0) -> tuple[Tensor, Tensor]:
        if self.sampling == "multinomial" and step > 0 and step % self.REFRESH == 0:
            error = torch.where(self.error_map.isnan(), self.error_map.nanmean(), self.error_map)
            self.cdf = cumulative(error.clamp(min=2 ** -10))
        view = torch.randint(self.V, (R,), device=self.cdf.device)
        xy = uniform_pixels(R, self.H, self.W, view.device)
        mined = round((1 - self.uniform_share) * R)
        xy[:mined] = draw_pixels(self.cdf, view[:mined], self.H, self.W).to(xy)
        self.drawn = view, xy.long()
        return view, xy

    def update(self, squared_error, abs_error, weight, d_xy) -> None:
        view, (x, y) = self.drawn[0], self.drawn[1].unbind(-1)
        self.error_map[view, y, x] = abs_error


# ------------------------------------------------------------------------------ what was measured
# lego, 100 px, --ray-sampling proposal --steps 500 (R = 8192 samples / 16 per ray = 512 rays);
# means of three seeds, which spread by 0.2 dB. The walkers' settings were tuned here, on these test
# views; uniform sampling had no search of its own.
#
#                                          PSNR       k of visits ~ Q^k
#     --sampling uniform                   25.9 dB    0.0    without soft weight
#     --sampling uniform --weighting on    25.5       0.0    the soft weight alone
#     --sampling multinomial               26.0       0.1
#     --sampling edge                      28.0       0.8    edges only, whatever the error is
#     --sampling lmc                       28.4       0.7    walkers
#     --no-pixel-gradient                  28.5       0.7    walkers without drift
#     --alpha 0                            28.3       0.7    walkers without weight: hard mining
#     --reinit uniform                     27.3       0.4    walkers that restart anywhere
#     --reinit none                        25.8       0.0    the walk and its uniform share only
#
# What the rows show. Restarting the walkers of least error anywhere gains 1.4 dB over uniform
# sampling: this is mining without edges. Edges alone gain 2.1 dB (with or without the soft weight),
# both together 2.5 dB. The walk alone does not mine: k is 0 after some 30 moves per walker, as it
# is after 430 below. Yet with the exact gradient of a fixed Q the same code ends at Q^beta
# (tests/test_soft_mining.py), so what fails is the estimate, which does not see the target, or Q
# changes too fast; we did not separate the two. The final PSNR of 1000 uniform steps (27.6 dB) is
# passed after 380 steps of walkers, in 0.42 of the seconds (the paper: less than half).
#
# In a longer training, the default (occupancy grid, 3000 steps), the soft weight earns most:
#     uniform pixels 29.7 dB, with the soft weight 30.9; the walk alone 30.7 (seed 0, k = 0.0)
#     walkers 31.3, without the soft weight 30.5, without the gradient 31.3 (seed 0)
# The training PSNR of walkers is lower than their test PSNR, as it is that of difficult pixels.


# ------------------------------------------------------------- the walkers of the released code

class ReleasedWalkers(nn.Module):
    """--as-released. Positions are s = (row / (H-1), column / (W-1)); ceil(rays / V) walkers
    per image, all of which are drawn and move at every step. What differs from Walkers:
    * The drift A grad log err / R is computed in pixels, but added to s, whose unit is the image's
      side. At 800 px and 4100 rays beta is then 0.06: nearly plain diffusion.
    * The uniform share is always the last tenth of the walkers, those of the last images; those of
      them that restart go to edges all the same.
    * Walkers restart by their weighted error, on edges of the image on black.
    """
    A, B, UNIFORM, REINIT = 20.0, 0.02, 0.1, 0.1

    def __init__(self, black: Tensor, rays: int):
        super().__init__()
        V, self.H, self.W, _ = black.shape
        self.last = torch.tensor([self.H - 1, self.W - 1], device=black.device)
        self.edges = cumulative(edge_maps(black, released=True))
        view = torch.arange(V, device=black.device).repeat_interleave(math.ceil(rays / V))
        self.register_buffer("view", view)
        self.register_buffer("s", self.to_s(uniform_pixels(len(view), self.H, self.W, view.device)))

    def to_s(self, xy: Tensor) -> Tensor:
        return (xy - 0.5).flip(-1) / self.last

    def draw(self, R: int, step: int = 0) -> tuple[Tensor, Tensor]:
        return self.view, (self.s * self.last).round().flip(-1) + 0.5

    def update(self, squared_error, abs_error, weight, d_xy: Optional[Tensor]) -> None:
        R, loss = len(abs_error), weight * squared_error
        s = self.s + self.B * torch.randn_like(self.s)
        if d_xy is not None:
            eps = torch.finfo(loss.dtype).eps / 1024       # its loss has a factor of 1024
            s = s + self.A * (d_xy / (loss + eps)[:, None]).flip(-1)
        restart = ((s < 0) | (s > 1)).any(1)
        restart |= loss <= loss.kthvalue(int(self.REINIT * R) + 1).values
        uniform = int(self.UNIFORM * R)
        s[R - uniform:] = torch.rand(uniform, 2, device=s.device)
        edges = self.to_s(draw_pixels(self.edges, self.view, self.H, self.W).to(s))
        self.s = torch.where(restart[:, None], edges, s).nan_to_num().clamp(0, 1)


# -------------------------------------------------------------- field, rendering, evaluation

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

    def encode(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """points (N, 3) in the world -> sigmas (N,) [1/length], features of the colour (N, 15)."""
        u = (points - self.aabb[0]) / (self.aabb[1] - self.aabb[0])            # (N, 3) in [0, 1]
        with torch.autocast(u.device.type, torch.bfloat16, enabled=self.half):
            hidden = self.geometry[:2](hash_encode(u, self.table, self.levels))
        encoded = self.geometry[2](hidden.to(u))    # bfloat16 changes a density by 1 %
        return truncated_exp(encoded[:, 0] - 1), encoded[:, 1:]

    def density(self, points: Tensor) -> Tensor:
        return self.encode(points)[0]

    def forward(self, points: Tensor, sh: Tensor) -> tuple[Tensor, Tensor]:
        """points (N, 3), sh (N, 16) of directions -> sigmas (N,), rgbs (N, 3)."""
        sigmas, features = self.encode(points)
        with torch.autocast(points.device.type, torch.bfloat16, enabled=self.half):
            rgbs = self.colour(torch.cat([features, sh.to(features)], -1))
        return sigmas, torch.sigmoid(rgbs.float())


def render(field: HashField, ray_sampler: nn.Module, rays_o: Tensor, rays_d: Tensor, bg: Tensor,
           jitter: Optional[Tensor] = None) -> dict:
    """Volume rendering (NeRF eq. 3) of rays (R, 3): with delta_i the length of interval i,

        T_i = exp(-sum_{j<i} sigma_j delta_j),    weights_i = T_i (1 - exp(-sigma_i delta_i)),
        rgb = sum_i weights_i rgbs_i + (1 - opacity) bg,    opacity = sum_i weights_i.

    bg (3,) or (R, 3) -> rgb (R, 3), opacity (R,), depth = sum_i weights_i t_i (R,); of the N
    samples: weights (N,), rgbs (N, 3), and N. The gradient reaches the pixels through positions
    (hash_encode interpolates between corners of a cell) and directions, not through distances t.
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
    chunks = [render(field, ray_sampler, o, d, scene.bg)
              for o, d in zip(rays_o.split(chunk), rays_d.split(chunk))]
    out = {key: torch.cat([part[key] for part in chunks]) for key in ("rgb", "depth", "opacity")}
    out["rgb"].clamp_(0, 1)
    return {key: value.unflatten(0, (H, W)) for key, value in out.items()}


def evaluate(field, ray_sampler, scene: Scene, views: Optional[int], pictures=None) -> dict:
    """Mean PSNR [dB], SSIM and opacity over `views` evenly spaced test images (None: all).
    pictures: folder for one comparison strip per image (target | render | error | depth)."""
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


def show_visits(run: TrainingRun, field, ray_sampler, scene: Scene, visits: Tensor) -> None:
    """Write a frame of walkers.gif, and note the exponent k of visits ~ Q^k.

    visits (V, H, W): how often each pixel was drawn since the last evaluation; set back to 0. Three
    training images, one per row: target | render | Q, 0 to 0.25, white where a pixel was drawn.
    """
    V, H, W = visits.shape
    rows, errors, shown = [], [], evenly_spaced(V, min(V, 3))
    for v in shown:
        target = scene.train.images[v]
        rgb = render_image(field, ray_sampler, scene, scene.train, v)["rgb"]
        errors.append((rgb - target).abs().mean(-1))
        dots = torch.where(visits[v, ..., None] > 0, 1.0, colour_map(errors[-1], 0, 0.25))
        rows.append(torch.cat([target, rgb, dots], 1))
    run.counts["visit_exponent"] = visit_exponent(visits[shown].flatten(),
                                                  torch.stack(errors).flatten())
    zoom = math.ceil(300 / W)                                      # at least 300 px wide
    frame = torch.cat(rows).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)
    (run.path / "walkers").mkdir(exist_ok=True)
    save_png(run.path / "walkers" / f"{run.step:06d}.png", frame)
    visits.zero_()


# ------------------------------------------------------------------------------------- training

def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("rays", "samples", "num_walkers", "levels", "features", "finest",
                                "march_steps", "ray_samples", "warmup", "lr"),
                not_negative=("alpha", "beta", "noise"), shares=("uniform_share", "reinit_share"))
    require(min(args.proposal_samples) > 0, "--proposal-samples must be greater than 0")
    require(1 <= args.log2_table <= 24, f"--log2-table {args.log2_table}: wanted 1 to 24")
    require(args.finest >= 16, f"--finest {args.finest}: the coarsest level has 16 cells per side")
    require(args.sampling == "lmc" or not args.as_released,
            f"--as-released is a rule for walkers: it needs --sampling lmc, not {args.sampling}")


def learning_rate(args: Args, step: int) -> float:
    """Linear over 100 steps (at the full rate, the first steps can empty the field for good), times
    a cosine from 1 to 1/10."""
    cosine = 0.55 + 0.45 * math.cos(math.pi * step / args.steps)
    return args.lr * min((step + 1) / 100, 1) * cosine


def num_rays(args: Args, ray_sampler: nn.Module) -> int:
    """R of the next step: a constant, or as many as have --samples samples."""
    if args.batch == "rays":
        return args.rays
    rays = args.samples / ray_sampler.samples_per_ray              # a mean of recent steps
    return int(min(max(rays, 64), args.num_walkers))


def make_pixel_sampler(scene: Scene, args: Args) -> nn.Module:
    images, alpha_channel = scene.train.images, scene.train.alpha
    if args.as_released:
        outside = 0 if alpha_channel is None else (1 - alpha_channel[..., None]) * scene.bg
        return ReleasedWalkers(images - outside, args.rays)
    if args.sampling != "lmc":
        return BaselineSampler(images, args)
    return Walkers(images, args, args.rays if args.batch == "rays" else args.num_walkers)


def train(args: Args) -> dict:
    """Train, evaluate, write the run folder; -> what summary.json holds."""
    check(args)
    torch.manual_seed(args.seed)
    scene = to_device(load_scene(args.scene, args.data, args.size, args.background,
                                 args.normalise), args.device)
    if args.as_released:                                           # constants of the released code
        args = replace(args, alpha=0.8 if scene.ndc else 0.6, clamp=True, weighting="on",
                       batch="rays", train_background="scene")
    images, alpha_channel = scene.train.images, scene.train.alpha  # (V, H, W, 3), (V, H, W) | None
    field = HashField(args, scene.aabb).to(args.device)
    if args.ray_sampling == "proposal":
        ray_sampler = ProposalSampler(scene, args.proposal_samples, args.ray_samples, args.steps)
    else:
        ray_sampler = OccupancySampler(scene, args.march_steps, args.samples / args.rays)
    ray_sampler.to(args.device)
    pixels = make_pixel_sampler(scene, args).to(args.device)
    parameters = [*field.parameters(), *ray_sampler.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=args.lr, eps=1e-15, weight_decay=1e-6, fused=True)
    visits = torch.zeros(images.shape[:3], dtype=torch.int32, device=args.device)
    run = TrainingRun("soft_mining", scene, args)

    def score(views, pictures):
        if visits.any():
            show_visits(run, field, ray_sampler, scene, visits)
        return evaluate(field, ray_sampler, scene, views, pictures)

    parts = {"field": field, "ray_sampler": ray_sampler, "pixels": pixels, "optimiser": optimiser}
    for step in run.loop(parts, score):
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(args, step)
        # 1. place the samples: refresh the occupancy grid, or anneal the proposals
        ray_sampler.prepare(field, step)
        # 2. draw pixels, look up their colours, make their rays. xy gets a gradient: it moves the
        # sample positions, so the features and the colour; distances t stay constant
        view, xy = pixels.draw(num_rays(args, ray_sampler), step)  # (R,), (R, 2)
        column, row = xy.long().unbind(-1)
        target, bg = images[view, row, column], scene.bg           # (R, 3), a constant
        if args.train_background == "random":
            pixel_alpha = None if alpha_channel is None else alpha_channel[view, row, column]
            target, bg = random_background(target, pixel_alpha, bg)
        xy.requires_grad_(args.sampling == "lmc" and args.pixel_gradient)
        rays_o, rays_d = camera_rays(scene.train, view, xy, scene.ndc)
        # 3. render
        jitter = torch.rand(len(xy), device=args.device)
        out = render(field, ray_sampler, rays_o, rays_d, bg, jitter)
        # 4. error, importance Q, soft weight, loss
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
        visits.index_put_((view, row, column), torch.ones_like(row, dtype=torch.int32),
                          accumulate=True)
        run.count(rays=len(xy), samples=out["samples"])
        if step + 1 == args.steps:                     # is the background used as a colour?
            check_colours(out["rgbs"], out["weights"], target)
    summary = run.finish(sampling=args.sampling, **run.counts)
    write_films(args, run, scene, field, ray_sampler)
    return summary


def write_films(args: Args, run: TrainingRun, scene: Scene, field, ray_sampler) -> None:
    """walkers.gif from the pictures of all evaluations; with --video a camera path, render.mp4."""
    files = sorted((run.path / "walkers").glob("*.png"))
    save_video(run.path / "walkers.gif", [torch.from_numpy(iio.imread(f)) / 255 for f in files], 4)
    if args.video:
        frames = []
        for c2w in camera_path(scene.train.c2w, scene.ndc, 120).to(args.device):
            view = replace(scene.test, c2w=c2w[None], K=scene.test.K[0])
            frames.append(render_image(field, ray_sampler, scene, view, 0)["rgb"])
        save_video(run.path / "render.mp4", frames)


if __name__ == "__main__":
    cli(PRESETS, train)
