"""Many scenes in a 3D-aware latent space ("3Da-AE": Schnepf et al., CVPR 2024 workshop 3DMV, arXiv 2403.11678).

The idea in five lines. A thousand cars are fitted together. A car's tri-plane is not rendered to 64 x 64 colours but to a 16 x 16 image of
latents, which a small convolutional decoder turns into the picture: sixteen times fewer rays. For that, latents of different views must be
views of one thing in space: the autoencoder is first trained further together with the planes of some scenes ("3D-aware"). Each tri-plane
is a small private part beside a learned combination of tri-planes that all scenes share. New scenes then cost seconds and few bytes, and
what was paid once is divided by the number of scenes.

| paper                                   | here                                                                            |
|-----------------------------------------|---------------------------------------------------------------------------------|
| E, D; normalisation of latents          | Autoencoder.encoder, .decoder; .normalise, .denormalise, .measure               |
| T_i = T_i^micro, sum_k W_ik B_k         | Model.fuse; a scene's own numbers T_i^micro, W_i are a row of Store             |
| tiny MLP, shared by all scenes          | Model.mlp, in Model.field                                                       |
| L_latent, L_RGB, L_ae, TV               | losses_of                                                                       |
| stage 1; stage 2                        | phases 0, A, B; phases C, D of plan                                             |
| cost a scene, divided by N              | bytes_per_scene, seconds_per_scene, price, amortise                             |

| phase | scenes  | what moves (the rest is frozen)  | losses                        |
|-------|---------|----------------------------------|-------------------------------|
| 0     | stage 1 | E, D                             | autoencoder                   |
| A     | stage 1 | T_i^micro, W_i, B_k, MLP         | latent, TV                    |
| B     | stage 1 | all of these                     | latent, RGB, autoencoder, TV  |
| C     | new     | T_i^micro, W_i                   | latent                        |
| D     | new     | T_i^micro, W_i, D                | RGB                           |
| rgb   | new     | private planes, MLP              | RGB, TV; the baseline         |

Sizes: B scenes and n pictures of a batch, R texels a side, F features, M shared planes, C latent channels, f pixels a latent pixel, S
samples a ray.

    y = render(T, pose), picture = D(n^-1(y))               render, Model.decode
    n(z) = tanh(s z), s and background measured             Autoencoder.normalise, measure
    a batch's scenes move, all others rest                  Store.step, run_phase

Where the released code differs from this file:
(1) Its third plane is (z, x), the second one transposed; nothing samples y and z together. Here xy, xz, yz (kernels.triplane_interp).
(2) Dense Adam over the planes of all scenes: a step costs more the more scenes there are, and momentum moves those that are not in the
    batch. Here a scene has its own Adam, its row of a file, and is touched when it is seen.
(3) The shipped range of "new" scenes overlaps that of stage 1 by half. Here stage 2 takes the next ones.
(4) Stage 2 draws the MLP anew and trains shared planes and decoder on: no old scene renders any more. Here shared planes and MLP stay
    (--new-shared trained, random: theirs), and a tuned decoder is a second one, whose bytes are counted; old scenes keep theirs.
    summary.json tells what they would look like through the new one.
(5) Its planes span [-1, 1]^3, twice the cars. Here the hull of the silhouettes of stage 1 (--box whole: the family's cube).
(6) Its scenes come in the order of an unsorted directory listing, and it jitters at evaluation. Here sorted, no jitter, and every number of
    a step follows from (seed, phase, step): on a CPU runs repeat, also resumed ones, and on any number of ranks.
(7) Its new planes start as noise. Here as the mean of stage 1's (--new-start random).
(8) Its TV is a sum over everything (its 1e-4 is about 10 of ours), here a mean; its rates fall in stage 2 alone, here in each phase. Its
    autoencoder is Stable Diffusion's, 84 M weights, and samples its latents; here one of 0.3 M is trained from nothing, and has no noise.
    48 + 48 samples a ray: --samples, --fine.
Ours, not the paper's: training pictures are moved by up to half a latent pixel, with their rays (--no-shift), as planes are otherwise only
ever seen along the same few rays; in phase B a quarter of the pictures goes through the encoder (--encode); no phase needs a latent cache.

What the runs say (README): over a thousand cars 87 % less time and 48 % less memory each than RGB tri-planes trained until they stop
improving, and 0.5 dB less; 0.9 to 1.4 dB more than RGB planes of the same seconds, up to 7 s a car. Phase B is worth 3.6 dB before the
decoder is tuned, private and shared planes together 1.3 dB over either alone.

    python latent_scenes.py                                  24 unseen cars: 24.3 dB, 282 s of one core
    python latent_scenes.py --scenes 100 --new-scenes 900 --visits-0 480 --visits-b 600 --visits-d 120         27.9 dB, 40 minutes
    torchrun --nproc-per-node=2 latent_scenes.py             the same, scenes split over two processes
    python latent_scenes.py --scene srn_cars --preset paper  for a GPU; not run
"""
from __future__ import annotations

import math
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Family, Progress, Run, Stopwatch, UserError, check_finite, check_flags, cli, draw_panels, load_family,
                    load_tensors, orbit_poses, peak_memory_mb, pixel_grid, pixel_rays, psnr, save_png, save_video, ssim, comparison_strip,
                    tensorboard, write_json, write_whole)
from kernels import composite, triplane_interp


@dataclass
class Args:
    scene: str = "cars"
    """A family of scenes: a name under --data (srn_cars/cars_train), a path, or the built-in `cars`."""
    data: str = os.environ.get("NERF_DATA", "data")
    """Folder with srn_cars/ (default: $NERF_DATA, else `data`)."""
    preset: Literal["quick", "paper"] = "quick"
    """quick: 64 px, 40 + 24 scenes, all rows, four minutes on two cores. paper: 128 px, 500 + 500 scenes, the paper's sizes, for a GPU."""
    out: Optional[str] = None
    """Run folder (default: runs/latent_scenes-SCENE-TIME)."""
    seed: int = 0
    """Seed of every random number (of training: the built-in cars are drawn from their own numbers)."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, ... Under torchrun `cuda` is each rank's own."""
    resume: bool = False
    """Continue the run in --out: finished phases are kept, the one that was cut goes on from its last checkpoint."""
    eval_only: bool = False
    """Load the finished phases in --out, score their last rows again, draw the pictures, train nothing."""
    video: bool = False
    """Also write a turntable of four new scenes, render.mp4."""
    tensorboard: bool = False
    """Also log to TensorBoard (if it is installed)."""

    size: int = 64
    """Image side [pixels]."""
    first: int = 0
    """Number of the first scene of stage 1."""
    scenes: int = 40
    """Scenes of stage 1 (N1): they teach the autoencoder, the shared planes and the MLP."""
    new_scenes: int = 24
    """Scenes of stage 2: the next ones, disjoint from stage 1's."""
    skip_bad: bool = False
    """Leave out scenes whose files are broken (otherwise they are an error before training starts)."""
    above: bool = True
    """Only views from cameras with z > -0.5 (the usual subset)."""
    representation: Literal["rgb", "latent"] = "latent"
    """latent: planes are rendered to latent images and decoded. rgb: the baseline alone, planes rendered to colour."""
    autoencoder: Literal["plain", "3d"] = "3d"
    """3d: trained further together with the planes of stage 1, so that the latents of all views agree (phase B). plain: without that."""
    planes: Literal["micro", "macro", "both"] = "both"
    """micro: private planes only. macro: combinations of shared planes only. both: the paper."""
    compare: tuple[Literal["rgb", "plain", "micro", "both", "macro"], ...] = ("rgb", "plain", "micro", "both", "macro")
    """Rivals that the same run prices on the same new scenes. micro, both, macro: planes of that kind in the latents of phase B, with
    phases A, C, D of their own but no B: to be compared with each other. Nothing after the flag: none."""
    rgb_scenes: int = 4
    """New scenes that the RGB rival is given (it takes its time)."""
    steps: Optional[int] = None
    """Cut every phase to this many steps, for a quick look."""

    latent_channels: int = 8
    """Channels of a latent image (C; the paper's autoencoder has 4)."""
    factor: Optional[int] = None
    """Pixels a side of one latent pixel, 4 or 8 (default: 4 up to 64 px, else 8)."""
    width: tuple[int, ...] = (32, 48, 64)
    """Channels of the autoencoder after each halving of the side."""
    resolution: int = 32
    """Texels a side of a plane."""
    micro: int = 4
    """Features of the private planes (F_mic)."""
    macro: int = 8
    """Features of the shared planes (F_mac). --planes micro gives their place to nobody."""
    bases: int = 12
    """Shared tri-planes (M)."""
    fusion: Literal["concat", "sum"] = "concat"
    """How private and shared features meet (sum needs --micro and --macro equal)."""
    hidden: int = 32
    """Width of the MLP behind the planes."""
    samples: int = 24
    """Samples of a ray, evenly spread over its part of the box."""
    fine: int = 0
    """More samples where these found something (the paper: 48 after 48)."""
    box: Literal["measured", "whole"] = "measured"
    """The planes span the hull of the silhouettes of stage 1's first 16 scenes, or the family's cube (the authors' is larger still)."""

    batch: int = 4
    """Scenes a step, over all ranks."""
    views: int = 1
    """Views of each."""
    visits_0: int = 220
    """Phase 0, plain autoencoder: pictures of each stage-1 scene."""
    visits_a: int = 30
    """Phase A, planes in frozen latents: views of each stage-1 scene."""
    visits_b: int = 160
    """Phase B, joint training: views of each stage-1 scene."""
    visits_c: int = 20
    """Phase C, planes of new scenes in frozen latents: views of each new scene."""
    visits_d: int = 70
    """Phase D, planes of new scenes behind the decoder: views of each new scene."""
    visits_rgb: int = 1000
    """RGB planes: batches of --rgb-rays of each scene."""
    rgb_rays: int = 128
    """Rays of one view that an RGB step takes of a scene."""
    lr: float = 6e-2
    """Adam's learning rate of planes, weights W and shared planes."""
    lr_rgb: float = 1e-1
    """The same for RGB planes."""
    lr_mlp: float = 5e-3
    """Of the MLP."""
    lr_ae: float = 2e-3
    """Of encoder and decoder (phases 0 and B)."""
    lr_finetune: float = 5e-4
    """Of the decoder in phase D."""
    decay: float = 0.05
    """What is left of every rate at the end of a phase (exponential)."""
    encode: float = 0.25
    """Share of phase B's pictures that go through the encoder, for the latent and the autoencoder's loss; it costs as much as rendering."""
    lambda_latent: float = 0.1
    """Weight of the latent loss beside the RGB loss (phase B)."""
    lambda_ae: float = 0.3
    """Weight of the autoencoder's own loss (phase B)."""
    tv: float = 1e-3
    """Weight of the total variation of the planes: mean squared difference of neighbours."""
    finetune: Literal["decoder", "none"] = "decoder"
    """What phase D tunes beside the planes. A tuned decoder is a second one: stage 1's scenes keep theirs."""
    new_shared: Literal["frozen", "trained", "random"] = "frozen"
    """Shared planes and MLP in stage 2: loaded and frozen, loaded and trained on, or drawn anew and trained (the authors' MLP)."""
    new_start: Literal["mean", "random"] = "mean"
    """New planes start as the mean of stage 1's, or as noise (the authors')."""
    shift: bool = True
    """Move each training picture by up to half a latent pixel, and its rays with it: planes are seen between latent pixels too (ours)."""
    eval_every: int = 0
    """Visits between two evaluations inside phases C, D and RGB, for curves (0: at their ends only)."""
    save_every: int = 500
    """Steps between two checkpoints."""


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", size=128, scenes=500, new_scenes=500, latent_channels=4, width=(64, 128, 256), resolution=64, micro=10,
                  macro=22, bases=50, hidden=64, samples=48, fine=48, batch=32, encode=1.0, lr=1e-2, lr_rgb=1e-2, lr_mlp=1e-2, lr_ae=1e-4,
                  lr_finetune=1e-4, lambda_latent=1.0, lambda_ae=0.1,
                  visits_0=2000, visits_a=1230, visits_b=1230, visits_c=1230, visits_d=1230, visits_rgb=20_000, rgb_rays=1024,
                  rgb_scenes=32),
}


# ------------------------------------------------------------------------------------------------------------ the price list

def bytes_per_scene(N: int, resolution: int, micro: int, bases: int = 0, macro: int = 0, overhead: float = 0) -> float:
    """Bytes of one scene in fp32 when N scenes share what is shared: 4 (3 R^2 F_mic + M) + (4 M 3 R^2 F_mac + overhead) / N.

    overhead: bytes of the networks, autoencoder and MLP. RGB tri-planes: micro = F, nothing shared.
    Source: section on resource costs; with R = 64, F = 32 = 10 + 22, M = 50 and an autoencoder of 83.65 M weights a thousand scenes take
    44 % less than 32 private features (880 kB against 1573 kB each).
    """
    texels = 3 * resolution ** 2
    return 4 * (texels * micro + bases) + (4 * bases * texels * macro + overhead) / N


def seconds_per_scene(N: int, N1: int, stage1: float, each: float) -> tuple[float, float]:
    """Seconds a scene for N of them -> (as the user pays who keeps stage 1's N1 scenes, as one who trained it for nothing else).

    stage1: seconds of all of stage 1, whose scenes are fitted at its end; each: marginal seconds of a new scene.
    (stage1 + max(N - N1, 0) each) / N  and  stage1 / N + each.
    """
    return (stage1 + max(N - N1, 0) * each) / N, stage1 / N + each


# ----------------------------------------------------------------------------------------------------------- the autoencoder

class _Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.b.weight)                                   # starts as the identity
        nn.init.zeros_(self.b.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(F.silu(self.a(F.silu(x))))


class Autoencoder(nn.Module):
    """E: (n, 3, H, W) in [-1, 1] -> z (n, C, H/f, W/f); D back. Convolutions only; each halving moves 2 x 2 pixels into channels.

    Planes are rendered through a sigmoid, so latents are squeezed into (-1, 1) for them:  n(z) = tanh(s z),  s = 0.4 / std(z), measured
    when phase 0 ends, as is `bg` (C,), the colour of an empty latent pixel: the mean of (n(z) + 1) / 2 along the border of the pictures.
    """
    def __init__(self, channels: int, factor: int, width: tuple[int, ...]):
        super().__init__()
        width = width[:factor.bit_length() - 1]                         # one for each halving
        down, up, last = [], [], width[-1]
        for before, after in zip((3, *width), width):
            down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * before, after, 3, padding=1), _Residual(after)]
            up = [nn.SiLU(), nn.Conv2d(after, 4 * before, 3, padding=1), nn.PixelShuffle(2), *([_Residual(before)] * (before > 3)), *up]
        self.encoder = nn.Sequential(*down, _Residual(last), nn.SiLU(), nn.Conv2d(last, channels, 3, padding=1))
        self.decoder = nn.Sequential(nn.Conv2d(channels, last, 3, padding=1), _Residual(last), _Residual(last), *up)
        self.to(memory_format=torch.channels_last)                      # a quarter faster on a CPU
        self.register_buffer("s", torch.ones(()))
        self.register_buffer("bg", torch.zeros(channels))

    def normalise(self, z: Tensor) -> Tensor:
        """n(z) in (-1, 1), of any shape."""
        return torch.tanh(self.s * z)

    def denormalise(self, y: Tensor) -> Tensor:
        """n^-1(y), y clipped to [-1 + 1e-4, 1 - 1e-4]; no gradient where it is."""
        return torch.atanh(y.clamp(-1 + 1e-4, 1 - 1e-4)) / self.s

    @torch.no_grad()
    def measure(self, images: Tensor) -> None:
        """Set s and bg from pictures (n, 3, H, W)."""
        z = self.encoder(images)
        self.s.copy_(0.4 / z.std())
        y = self.normalise(z)
        border = torch.cat([y[:, :, 0], y[:, :, -1], y[:, :, :, 0], y[:, :, :, -1]], -1)                # (n, C, 2 h + 2 w)
        self.bg.copy_((border.mean((0, 2)) + 1) / 2)


# ------------------------------------------------------------------------------------------------------- planes, MLP, renderer

class Model(nn.Module):
    """What scenes share: autoencoder (not for RGB), shared planes B_k, MLP. A scene's own numbers are a row of Store.

    planes: micro | macro | both. T_i = concat(T_i^mic, sum_k W_ik B_k), or their sum. rgb: planes of F_mic + F_mac private features,
    rendered straight to colour.
    """
    def __init__(self, args: Args, planes: str, rgb: bool, box: Tensor, bg: Tensor):
        super().__init__()
        R, both = args.resolution, args.micro if args.fusion == "sum" else args.micro + args.macro
        self.rgb, self.fusion, self.samples, self.fine = rgb, args.fusion, args.samples, args.fine
        self.factor = 1 if rgb else args.factor
        micro, macro = (both, 0) if rgb else (args.micro * (planes != "macro"), args.macro * (planes != "micro"))
        self.own = (3, R, R, micro)                                                                 # a scene's private planes
        self.bases = args.bases if macro else 0                                                     # and its weights W
        self.autoencoder = None if rgb else Autoencoder(args.latent_channels, args.factor, args.width)
        self.shared = nn.Parameter(0.1 * torch.randn(args.bases, 3, R, R, macro)) if macro else None
        features = max(micro, macro) if args.fusion == "sum" else micro + macro
        self.mlp = nn.Sequential(nn.Linear(features, args.hidden), nn.Softplus(),
                                 nn.Linear(args.hidden, 1 + (3 if rgb else args.latent_channels)))
        self.register_buffer("box", box)                                                            # (2, 3)
        self.register_buffer("white", bg)

    def split(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Rows (B, P) of a store -> private planes (B, 3, R, R, F_mic), W (B, M)."""
        P = math.prod(self.own)
        return row[:, :P].view(len(row), *self.own), row[:, P:]

    def fuse(self, row: Tensor) -> Tensor:
        """T_i of each row: (B, P) -> (B, 3, R, R, F)."""
        micro, W = self.split(row)
        if self.shared is None:
            return micro
        macro = torch.einsum("bm,m...->b...", W, self.shared)
        if micro.shape[-1] == 0:
            return macro
        return micro + macro if self.fusion == "sum" else torch.cat([micro, macro], -1)

    def decode(self, y: Tensor) -> Tensor:
        """Rendered (n, C, h, w) in [-1, 1] -> pictures (n, 3, H, W)."""
        return y if self.rgb else self.autoencoder.decoder(self.autoencoder.denormalise(y))

    def field(self, x: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, N, 3) in the world -> sigmas (B N,) = softplus(raw - 1) [1/length], rgbs (B N, C) = 1.002 sigmoid(raw) - 0.001."""
        u = 2 * (x - self.box[0]) / (self.box[1] - self.box[0]) - 1
        h = self.mlp(triplane_interp(u, planes)).flatten(0, 1)                                      # (B N, 1 + C)
        return F.softplus(h[:, 0] - 1), torch.sigmoid(h[:, 1:]) * 1.002 - 0.001


def hit_box(rays_o: Tensor, rays_d: Tensor, box: Tensor, near: float, far: float) -> tuple[Tensor, Tensor]:
    """Where rays (..., 3) enter and leave the box, within [near, far]: t_in, t_out (...). t_out = t_in where they miss it."""
    inverse = 1 / torch.where(rays_d.abs() < 1e-9, 1e-9, rays_d)
    a, b = (box[0] - rays_o) * inverse, (box[1] - rays_o) * inverse
    t_in = torch.minimum(a, b).amax(-1).clamp(near, far)
    return t_in, torch.maximum(torch.maximum(a, b).amin(-1).clamp(near, far), t_in)


@torch.no_grad()
def resample(edges: Tensor, weights: Tensor, u: Tensor) -> Tensor:
    """Draws from the piecewise-constant density  weights, widened to their neighbours, + 0.01.  No gradient.

    edges (..., S+1), weights (..., S), u (..., n) in [0, 1) -> t (..., n), sorted where u is.
    Source: mip-NeRF, blurred importance sampling.
    """
    wide = F.max_pool1d(weights.flatten(0, -2)[:, None], 2, 1, padding=1)                           # (.., 1, S+1)
    w = F.avg_pool1d(wide, 2, 1)[:, 0].view(weights.shape) + 0.01
    cdf = F.pad(w.cumsum(-1) / w.sum(-1, keepdim=True), (1, 0))                                     # (..., S+1)
    i = (torch.searchsorted(cdf, u.contiguous(), right=True) - 1).clamp(0, w.shape[-1] - 1)
    low, high = cdf.gather(-1, i), cdf.gather(-1, i + 1)
    t0, t1 = edges.gather(-1, i), edges.gather(-1, i + 1)
    return t0 + (t1 - t0) * ((u - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)


def blend(model: Model, planes: Tensor, rays_o: Tensor, rays_d: Tensor, edges: Tensor, t: Tensor):
    """Composite samples at t (B, n, S) of the intervals edges (B, n, S+1): rgb (B n, C), acc, depth (B n,), weights (B, n, S)."""
    B, n, S = t.shape
    x = rays_o[:, :, None] + t[..., None] * rays_d[:, :, None]                                      # (B, n, S, 3)
    sigmas, rgbs = model.field(x.view(B, n * S, 3), planes)
    offsets = torch.arange(B * n + 1, device=t.device) * S
    rgb, acc, depth, weights = composite(sigmas, rgbs, edges[..., :-1].reshape(-1), edges[..., 1:].reshape(-1), offsets)
    return rgb, acc, depth, weights.view(B, n, S)


def render(model: Model, planes: Tensor, rays_o: Tensor, rays_d: Tensor, near: float, far: float, jitter: Optional[Tensor] = None) -> dict:
    """Rays (B, n, 3) through planes (B, 3, R, R, F) -> y (B, n, C) in about [-1, 1], acc, depth (B, n).

    One sample in each of S equal parts of the ray's stretch of the box: its middle, or at jitter (B, n) of the part. With --fine as many
    more are drawn from their weights, and all are composited again (the first pass gives no picture and no gradient).
    y = 2 (sum w_i c_i + (1 - sum w_i) bg) - 1. Differentiable in planes and model.
    """
    B, n, _ = rays_o.shape
    t_in, t_out = hit_box(rays_o, rays_d, model.box, near, far)
    parts = torch.linspace(0, 1, model.samples + 1, device=rays_o.device)
    edges = t_in[..., None] + (t_out - t_in)[..., None] * parts                                     # (B, n, S+1)
    shift = 0.5 if jitter is None else jitter[..., None]
    t = edges[..., :-1] + shift * (edges[..., 1:] - edges[..., :-1])
    if model.fine:
        with torch.no_grad():
            weights = blend(model, planes, rays_o, rays_d, edges, t)[3]
        u = (torch.arange(model.fine, device=t.device) + shift) / model.fine
        more = resample(edges, weights, u.expand(B, n, model.fine))
        t = torch.cat([t, more], -1).sort(-1).values
        edges = torch.cat([t_in[..., None], 0.5 * (t[..., 1:] + t[..., :-1]), t_out[..., None]], -1)
    rgb, acc, depth, _ = blend(model, planes, rays_o, rays_d, edges, t)
    bg = model.white if model.rgb else model.autoencoder.bg
    y = 2 * (rgb + (1 - acc[:, None]) * bg) - 1
    return {"y": y.view(B, n, -1), "acc": acc.view(B, n), "depth": depth.view(B, n)}


def latent_pixels(size: int, factor: int, device=None) -> Tensor:
    """Middles of all latent pixels, in pixels of the picture: xy (h w, 2)."""
    return pixel_grid(size // factor, size // factor, device) * factor


def rays_through(xy: Tensor, c2w: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """xy (n, k, 2) pixels of n views, c2w (n, 3, 4), K (n, 3, 3) -> rays_o, rays_d (n, k, 3)."""
    n, k, _ = xy.shape
    rays_o, rays_d = pixel_rays(xy.reshape(-1, 2), K.repeat_interleave(k, 0), c2w.repeat_interleave(k, 0))
    return rays_o.view(n, k, 3), rays_d.view(n, k, 3)


def moved(x: Tensor, shift: Tensor) -> Tensor:
    """Pictures x (n, 3, H, W) moved right and down by whole pixels shift (n, 2); edges repeat."""
    n, _, H, W = x.shape
    m = int(shift.abs().max()) if n else 0
    x = F.pad(x, (m, m, m, m), mode="replicate")
    return torch.stack([p[:, m - dy:m - dy + H, m - dx:m - dx + W] for p, (dx, dy) in zip(x, shift.tolist())])


def total_variation(planes: Tensor) -> Tensor:
    """Mean squared difference of neighbouring texels along both sides.  planes (B, 3, H, W, F)."""
    return (planes[:, :, 1:] - planes[:, :, :-1]).square().mean() + (planes[:, :, :, 1:] - planes[:, :, :, :-1]).square().mean()


# ---------------------------------------------------------------------------------------- a thousand scenes: on disk, row by row

class Store:
    """Each scene's own numbers and their Adam moments, one row of a file a scene: only the rows asked for are in memory.

    A row: p (P,) parameters, m, v (P,) moments, t steps taken. A row never written is zeros, on most file systems takes no space, and
    stands for the start: `mean` (P,) or noise drawn from (seed, scene). So a step's cost does not depend on how many scenes there are,
    and a scene that is not in the batch does not move (a dense Adam would push it along its old momentum).
    """
    def __init__(self, path: Path, model: Model, mean: Optional[Tensor], seed: int, first: int = 0):
        self.path, self.mean, self.seed, self.first = path, mean, seed, first                       # first: scene of the file's first row
        self.P = math.prod(model.own) + model.bases
        self.bases, self.bytes = model.bases, 4 * (3 * self.P + 1)
        self.file = os.open(path, os.O_RDWR | os.O_CREAT)

    def noise(self, scene: int) -> Tensor:
        p = 0.1 * torch.randn(self.P, generator=generator(self.seed, scene))
        p[self.P - self.bases:] *= 10 / max(self.bases, 1) ** 0.5                                   # sum_k W_k B_k as large as each B_k
        return p

    def read(self, scenes: list[int]) -> tuple[Tensor, tuple]:
        """-> p (B, P) and the moments (m, v, t) that step wants back."""
        rows = np.zeros((len(scenes), 3 * self.P + 1), np.float32)
        for row, scene in zip(rows, scenes):
            data = os.pread(self.file, self.bytes, (scene - self.first) * self.bytes)
            row[:len(data) // 4] = np.frombuffer(data, np.float32)                                  # short or empty beyond the file's end
        rows = torch.from_numpy(rows)
        p, m, v, t = rows.split([self.P, self.P, self.P, 1], 1)
        for j, scene in enumerate(scenes):
            if t[j] == 0:
                p[j] = self.noise(scene) if self.mean is None else self.mean
        return p, (m, v, t)

    def step(self, scenes: list[int], p: Tensor, d_p: Tensor, moments: tuple, lr: float) -> None:
        """Adam on these rows alone (betas 0.9, 0.99), and back to the file.  p, d_p (B, P)."""
        m, v, t = (x.to(p) for x in moments)
        t, m, v = t + 1, 0.9 * m + 0.1 * d_p, 0.99 * v + 0.01 * d_p ** 2
        p = p - lr * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.99 ** t)).sqrt() + 1e-8)
        for row, scene in zip(torch.cat([p, m, v, t], 1).cpu().numpy(), scenes):
            os.pwrite(self.file, row.tobytes(), (scene - self.first) * self.bytes)

    def close(self) -> None:
        os.close(self.file)


class Album:
    """The pictures of the scenes in use, 8 bits a channel, one file a scene; a scene is loaded or drawn the first time somebody asks.

    Cameras (60 bytes a view) stay in memory, pictures do not.
    """
    def __init__(self, family: Family, folder: Path):
        self.family, self.folder, self.cameras = family, folder, {}
        folder.mkdir(parents=True, exist_ok=True)

    def scene(self, i: int) -> dict:
        """{"c2w": (V, 3, 4), "K": (V, 3, 3), "test": number of test views, which come first, "file": of pictures (V, H, W, 3) uint8}."""
        if i not in self.cameras:
            file, kept = self.folder / f"{i:06d}.npy", self.folder / f"{i:06d}.npz"
            if not kept.is_file():
                train, test = self.family.read(i)
                both = [torch.cat([test.K, train.K]), torch.cat([test.c2w, train.c2w])]
                images = (torch.cat([test.images, train.images]) * 255).round().byte().numpy()
                write_whole(file, lambda f: np.save(f, images))
                write_whole(kept, lambda f: np.savez(f, K=both[0].numpy(), c2w=both[1].numpy(), test=len(test.names)))
            with np.load(kept) as data:
                self.cameras[i] = {"c2w": torch.from_numpy(data["c2w"]), "K": torch.from_numpy(data["K"]), "test": int(data["test"]),
                                   "file": file}
        return self.cameras[i]

    def pictures(self, i: int, views) -> Tensor:
        """(n, 3, H, W) in [-1, 1]."""
        images = np.array(np.load(self.scene(i)["file"], mmap_mode="r")[views])                     # reads these views alone
        return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def measure_box(album: Album, scenes: list[int], cells: int = 48) -> Tensor:
    """The box of all points that project onto the object in every training view of one of the scenes, a tenth wider: (2, 3).

    The family's cube is mostly empty: cars are long and flat. Planes that span the hull have finer texels where there is something, and
    rays spend their samples there. An unseen scene that stands out of it is cut: hence the tenth.
    """
    low, high = album.family.aabb
    step = (high - low) / cells
    axes = [low[k] + step[k] * (torch.arange(cells) + 0.5) for k in range(3)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).view(-1, 3)                      # (P, 3)
    hull = torch.zeros(len(points), dtype=torch.bool)
    bg = 2 * album.family.bg - 1
    for i in scenes:
        scene, inside = album.scene(i), torch.ones_like(hull)
        views = range(scene["test"], len(scene["c2w"]))
        solid = ((album.pictures(i, views) - bg[:, None, None]).abs().amax(1) > 0.02).float()[:, None]          # (V, 1, H, W)
        solid = F.max_pool2d(solid, 3, 1, 1)[:, 0] > 0
        H, W = solid.shape[1:]
        for mask, c2w, K in zip(solid, scene["c2w"][views.start:], scene["K"][views.start:]):
            p = (points - c2w[:, 3]) @ c2w[:, :3]                                                   # OpenGL: looks along -z
            x, y = K[0, 0] * p[:, 0] / -p[:, 2] + K[0, 2], K[1, 1] * -p[:, 1] / -p[:, 2] + K[1, 2]
            seen = (x >= 0) & (x < W) & (y >= 0) & (y < H) & (p[:, 2] < 0)                          # the pictures hold the whole object
            inside &= seen & mask[y.long().clamp(0, H - 1), x.long().clamp(0, W - 1)]
        hull |= inside
    if not hull.any():
        raise UserError(f"{album.family.name}: no point lies within the silhouettes of all views: wrong poses, or no white background? "
                        "--box whole does without")
    found = points[hull]
    least, most = found.amin(0) - step, found.amax(0) + step
    margin = 0.05 * (most - least)
    return torch.stack([torch.maximum(least - margin, low), torch.minimum(most + margin, high)])


# ---------------------------------------------------------------------------------------------------------- who trains when

EVERYTHING = ("autoencoder", "shared", "mlp")


@dataclass(frozen=True)
class Phase:
    """One phase of training: which scenes, from which model, what moves, by which losses. The plan below is the paper's freezing table."""
    name: str
    scenes: Literal["old", "new", "few"]
    visits: int
    train: frozenset                    # of {encoder, decoder, planes, shared, mlp}; planes: a scene's row. All else is frozen
    losses: dict                        # of {autoencoder, latent, rgb, tv} -> weight
    planes: str = "both"                # micro | macro | both
    kind: str = "latent"                # or rgb
    store: str = ""                     # the file of the scenes' rows
    after: Optional[str] = None         # the phase whose model and mean scene it starts from
    keep: tuple = EVERYTHING            # of that model; the rest is drawn anew
    encode: float = 1.0                 # share of a step's pictures that go through the encoder
    row: Optional[str] = None           # its name in the table, if its scenes are scored


def plan(args: Args) -> list[Phase]:
    """The phases of a run, in order."""
    rgb = Phase("rgb", "few" if args.representation == "latent" else "new", args.visits_rgb, frozenset({"planes", "mlp"}),
                {"rgb": 1, "tv": args.tv}, kind="rgb", store="rgb", row="RGB tri-planes")
    if args.representation == "rgb":
        return [rgb]
    shared = frozenset() if args.new_shared == "frozen" else frozenset({"shared", "mlp"})
    keep = ("autoencoder",) if args.new_shared == "random" else EVERYTHING
    tuned = frozenset({"decoder"}) if args.finetune == "decoder" else frozenset()

    def stage2(tag: str, planes: str, after: str, row: str, decoder: bool = True) -> list[Phase]:
        c = Phase(f"{tag}C", "new", args.visits_c, frozenset({"planes"}) | shared, {"latent": 1}, planes, store=f"{tag}new", after=after,
                  keep=keep, row=row)
        d = replace(c, name=f"{tag}D", visits=args.visits_d, train=c.train | tuned, losses={"rgb": 1}, after=c.name,
                    keep=EVERYTHING, row=f"{row}, + decoder" if tuned else f"{row}, RGB loss")
        return [c, d] if decoder else [c]

    def stage1(tag: str, planes: str, after: str) -> Phase:
        return Phase(f"{tag}A", "old", args.visits_a, frozenset({"planes", "shared", "mlp"}), {"latent": 1, "tv": args.tv}, planes,
                     store=f"{tag}old", after=after, keep=("autoencoder",))

    phases = [Phase("0", "old", args.visits_0, frozenset({"encoder", "decoder"}), {"autoencoder": 1}, args.planes),
              stage1("", args.planes, "0")]
    if args.autoencoder == "plain":
        phases += stage2("", args.planes, "A", "plain AE")
    else:
        losses = {"latent": args.lambda_latent, "rgb": 1, "autoencoder": args.lambda_ae, "tv": args.tv}
        phases.append(replace(phases[1], name="B", visits=args.visits_b, train=phases[1].train | {"encoder", "decoder"}, losses=losses,
                              after="A", keep=EVERYTHING, encode=args.encode))
        phases += stage2("", args.planes, "B", "3D-aware AE")
        if "plain" in args.compare:
            phases += stage2("plain-", args.planes, "A", "plain AE", decoder=False)
        for planes, row in (("micro", "micro only"), ("both", "micro and macro"), ("macro", "macro only")):
            if planes in args.compare:                                  # on equal terms: all without a phase B of their own
                phases += [stage1(f"{planes}-", planes, "B"), *stage2(f"{planes}-", planes, f"{planes}-A", row)]
    return phases + [rgb] * ("rgb" in args.compare)


def generator(*numbers: int) -> torch.Generator:
    """A generator that depends on these numbers alone: (seed, phase, step) draw the same on every rank and after every resume."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((len(numbers), *numbers)).generate_state(1)[0]))


def schedule(scenes: list[int], B: int, step: int, *seed: int) -> list[Optional[int]]:
    """The scenes of a step, one a slot (None: that slot rests).

    Scenes stand in B columns, scene number k in column k mod B. An epoch shuffles each column, and step after step takes a line. So a
    scene keeps its slot: with slots dealt to ranks, it keeps its rank, and any number of ranks sees the same batches.
    """
    lines = math.ceil(len(scenes) / B)
    epoch, line = divmod(step, lines)
    g, slots = generator(*seed, epoch), []
    for column in range(B):
        ids = scenes[column::B]
        order = torch.randperm(lines, generator=g).tolist()
        slots.append(ids[order[line]] if order[line] < len(ids) else None)
    return slots


# -------------------------------------------------------------------------------------------------------------- many processes

def ranks() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(values: list[Tensor]) -> None:
    """Each tensor becomes its sum over all ranks, in place; one message."""
    if dist.is_initialized():
        flat = torch.cat([v.reshape(-1) for v in values])
        dist.all_reduce(flat)
        for value, part in zip(values, flat.split([v.numel() for v in values])):
            value.copy_(part.view_as(value))


def gathered(mine: dict) -> dict:
    """The union of all ranks' dictionaries, in the order of their keys."""
    if dist.is_initialized():
        parts = [None] * ranks()[1]
        dist.all_gather_object(parts, mine)
        mine = {key: value for part in parts for key, value in part.items()}
    return dict(sorted(mine.items()))


# -------------------------------------------------------------------------------------------------------- render and evaluate

@torch.no_grad()
def render_views(model: Model, row: Tensor, c2w: Tensor, K: Tensor, family: Family, decoder: Optional[Model] = None) -> dict:
    """One scene, row (1, P), seen by cameras (n, 3, 4): y (n, C, h, w) as rendered, rgb (n, H, W, 3) in [0, 1], depth (n, h, w)."""
    planes, side, parts = model.fuse(row), family.size // model.factor, []
    xy = latent_pixels(family.size, model.factor, row.device)
    few = 8 if model.factor > 1 else 1                                                              # views at a time: memory
    for pose, k in zip(c2w.split(few), K.split(few)):
        rays_o, rays_d = rays_through(xy.expand(len(pose), -1, -1), pose, k)
        parts.append(render(model, planes, rays_o.flatten(0, 1)[None], rays_d.flatten(0, 1)[None], family.near, family.far))
    y = torch.cat([p["y"][0] for p in parts]).view(len(c2w), side, side, -1).permute(0, 3, 1, 2)
    rgb = ((decoder or model).decode(y).clamp(-1, 1).permute(0, 2, 3, 1) + 1) / 2
    return {"y": y, "rgb": rgb, "depth": torch.cat([p["depth"][0] for p in parts]).view(len(c2w), side, side)}


@torch.no_grad()
def evaluate(model: Model, store: Store, album: Album, scenes: list[int], device, decoder: Optional[Model] = None) -> dict:
    """Means over scenes, of means over each one's test views: psnr [dB], ssim; of latent models also latent_psnr, of latents halved and
    shifted to [0, 1] against the encoder's, and autoencoder_psnr, of decoded encodings: the ceiling."""
    rank, world = ranks()
    family, mine = album.family, {}
    for i in scenes[rank::world]:
        c, tests = album.scene(i), slice(album.scene(i)["test"])
        x = album.pictures(i, tests).to(device)
        truth = (x.permute(0, 2, 3, 1) + 1) / 2
        out = render_views(model, store.read([i])[0].to(device), c["c2w"][tests].to(device), c["K"][tests].to(device), family, decoder)
        mean = lambda measure, a, b: float(torch.stack([measure(p, q) for p, q in zip(a, b)]).mean())
        mine[i] = {"psnr": mean(psnr, out["rgb"], truth), "ssim": mean(ssim, out["rgb"], truth)}
        if not model.rgb:
            z = model.autoencoder.encoder(x)
            mine[i]["latent_psnr"] = mean(psnr, (out["y"] + 1) / 2, (model.autoencoder.normalise(z) + 1) / 2)
            again = ((decoder or model).autoencoder.decoder(z).clamp(-1, 1).permute(0, 2, 3, 1) + 1) / 2
            mine[i]["autoencoder_psnr"] = mean(psnr, again, truth)
    every = list(gathered(mine).values())
    return {key: sum(s[key] for s in every) / len(every) for key in every[0]}


# --------------------------------------------------------------------------------------------------------------- training

@dataclass
class Setup:
    """What stays the same through all phases of a run."""
    args: Args
    album: Album
    scenes: dict            # old, new, few -> numbers
    box: Tensor             # (2, 3)
    path: Path
    run: Optional[Run]      # None on all ranks but the first
    device: str


# flags that may change between a run and its --resume or --eval-only
FREE = {"data", "device", "out", "resume", "eval_only", "video", "tensorboard", "save_every"}


def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(replace(args, steps=args.steps or 1), positive=("size", "scenes", "new_scenes", "rgb_scenes", "latent_channels", "resolution", "micro", "macro", "bases",
                                "hidden", "samples", "batch", "views", "visits_0", "visits_a", "visits_b", "visits_c", "visits_d",
                                "visits_rgb", "rgb_rays", "lr", "lr_rgb", "lr_mlp", "lr_ae", "lr_finetune", "save_every"),
                shares=("decay",), not_negative=("first", "fine", "lambda_latent", "lambda_ae", "tv", "eval_every"))
    if args.steps is not None and args.steps < 1:
        raise UserError(f"--steps {args.steps} must be at least 1")
    if args.factor not in (4, 8) or args.size % args.factor:
        raise UserError(f"--factor {args.factor} --size {args.size}: wanted 4 or 8, and a size that it divides")
    if len(args.width) < args.factor.bit_length() - 1 or min(args.width) < 1:
        raise UserError(f"--width {' '.join(map(str, args.width))}: wanted {args.factor.bit_length() - 1} positive numbers, one a halving")
    if args.fusion == "sum" and args.micro != args.macro:
        raise UserError(f"--fusion sum --micro {args.micro} --macro {args.macro}: only equal numbers of features can be added")
    if not 0.99 / args.batch <= args.encode <= 1 or abs(1 / args.encode - round(1 / args.encode)) > 0.02:
        raise UserError(f"--encode {args.encode}: wanted 1, 1/2, 1/3, ... down to one over --batch {args.batch}")
    if args.batch % ranks()[1]:
        raise UserError(f"--batch {args.batch}: must be a multiple of the {ranks()[1]} ranks")


@dataclass
class Batch:
    """One rank's part of a step: n pictures of B scenes, n / B each, in order."""
    scenes: list            # (B,) numbers
    x: Tensor               # (n, 3, H, W) in [-1, 1], moved by shift
    c2w: Tensor             # (n, 3, 4)
    K: Tensor               # (n, 3, 3)
    shift: Tensor           # (n, 2) pixels
    jitter: Tensor          # (n, rays) in [0, 1)
    pixels: Optional[Tensor]        # (n, rays) those of the picture that an RGB step takes
    share: float            # of the step's scenes
    encoded: list           # which of the n pictures go through the encoder
    share_encoded: float    # of the step's pictures that do


def draw_batch(setup: Setup, number: int, phase: Phase, step: int, model: Model) -> Optional[Batch]:
    """The pictures of a step. All ranks draw the same numbers for all slots and take their own; None if this rank's slots rest."""
    rank, world = ranks()
    args, album, scenes = setup.args, setup.album, setup.scenes[phase.scenes]
    slots = [(j, i) for j, i in enumerate(schedule(scenes, args.batch, step, args.seed, number)) if i is not None]
    mine = [(j, i) for j, i in slots if j % world == rank]
    g, shape, half = generator(args.seed, number, 0, step), (args.batch, args.views), model.factor // 2
    rays = args.rgb_rays if model.rgb else (args.size // args.factor) ** 2
    which = torch.rand(shape, generator=g)
    shift = torch.randint(-half, half + 1, (*shape, 2), generator=g) if args.shift else torch.zeros(*shape, 2, dtype=torch.long)
    jitter = torch.rand(*shape, rays, generator=g)
    pixels = torch.randint(args.size ** 2, (*shape, rays), generator=g) if model.rgb else None
    if not mine:
        return None
    x, c2w, K, js = [], [], [], [j for j, _ in mine]
    for j, i in mine:
        c = album.scene(i)
        v = c["test"] + (which[j] * (len(c["c2w"]) - c["test"])).long()
        x.append(album.pictures(i, v.numpy()))
        c2w.append(c["c2w"][v])
        K.append(c["K"][v])
    every = round(1 / phase.encode)                                     # one slot in so many is encoded, in turns
    encodes = lambda j: (j + step) % every == 0
    encoded = [k for k, j in enumerate(j for j in js for _ in range(args.views)) if encodes(j)]
    take = lambda a: a[js].flatten(0, 1).to(setup.device)
    x = moved(torch.cat(x), shift[js].flatten(0, 1))
    return Batch([i for _, i in mine], x.to(setup.device), torch.cat(c2w).to(setup.device), torch.cat(K).to(setup.device), take(shift),
                 take(jitter), take(pixels) if model.rgb else None, len(mine) / len(slots), encoded,
                 len(encoded) / max(args.views * sum(encodes(j) for j, _ in slots), 1))


def losses_of(model: Model, phase: Phase, planes: Optional[Tensor], b: Batch, family: Family) -> dict:
    """The phase's losses, mean squared errors of quantities in [-1, 1], each this rank's part of the step's mean. planes (B, 3, R, R, F).

    autoencoder = |D(E(x)) - x|^2,  latent = |n(E(x)) - y|^2,  rgb = |D(n^-1(y)) - x|^2  with y = render(T, pose),  tv = total_variation(T).
    """
    out, wanted, n, H = {}, phase.losses, len(b.x), b.x.shape[-1]
    encoded = b.encoded if wanted.keys() & {"autoencoder", "latent"} else []
    z = model.autoencoder.encoder(b.x[encoded]) if encoded else None
    if encoded and "autoencoder" in wanted:
        out["autoencoder"] = b.share_encoded * F.mse_loss(model.autoencoder.decoder(z), b.x[encoded])
    if wanted.keys() & {"latent", "rgb"}:
        xy = latent_pixels(H, model.factor, b.x.device).expand(n, -1, -1)                           # (n, h w, 2)
        if b.pixels is not None:
            xy = xy.gather(1, b.pixels[..., None].expand(-1, -1, 2))
        rays_o, rays_d = rays_through(xy - b.shift[:, None], b.c2w, b.K)
        B = len(planes)
        y = render(model, planes, rays_o.view(B, -1, 3), rays_d.view(B, -1, 3), family.near, family.far, b.jitter.view(B, -1))["y"]
        y = y.view(n, xy.shape[1], -1).transpose(1, 2)                                              # (n, C, rays)
        if model.rgb:
            out["rgb"] = b.share * F.mse_loss(y, b.x.flatten(2).gather(2, b.pixels[:, None].expand(-1, 3, -1)))
        else:
            y = y.unflatten(2, (H // model.factor, H // model.factor))
            if encoded and "latent" in wanted:
                out["latent"] = b.share_encoded * F.mse_loss(y[encoded], model.autoencoder.normalise(z))
            if "rgb" in wanted:
                out["rgb"] = b.share * F.mse_loss(model.decode(y), b.x)
    if wanted.get("tv"):
        out["tv"] = b.share * total_variation(planes)
    return out


def copy_whole(source: Path, target: Path) -> None:
    """Copy a file; `target` is the old one or the new one, never half of it."""
    with open(source, "rb") as file:
        write_whole(target, lambda copy: shutil.copyfileobj(file, copy))


def load_phase(file: Path, rows: Optional[Path]) -> dict:
    """What a finished phase left; UserError if it or its file of rows cannot be used."""
    done = load_tensors(file, "model", "seconds", "steps")
    if rows and not rows.is_file():
        raise UserError(f"{rows}: not found: {file.name} needs it: start afresh with another --out")
    return done


def open_phase(setup: Setup, number: int, phase: Phase, done: dict) -> tuple[Model, Optional[Store]]:
    """The model that a phase starts from, and the file of its scenes' rows."""
    args = setup.args
    with torch.random.fork_rng():
        torch.manual_seed(int(generator(args.seed, number).initial_seed()))
        model = Model(args, phase.planes, phase.kind == "rgb", setup.box, setup.album.family.bg)
    mean = None
    if phase.after:
        before = done[phase.after]
        model.load_state_dict({k: v for k, v in before["model"].items() if k.split(".")[0] in phase.keep}, strict=False)
        mean = before["mean"] if args.new_start == "mean" and phase.scenes == "new" and phase.keep == EVERYTHING else None
    model = model.to(setup.device)
    file = setup.path / f"planes-{phase.store}.bin"
    return model, Store(file, model, mean, args.seed, setup.scenes[phase.scenes][0]) if phase.store else None


def optimiser_of(args: Args, phase: Phase, model: Model) -> tuple[list, Optional[torch.optim.Adam]]:
    """Freeze everything but what the phase trains; -> the parameters that move, and Adam on them (None if it is the scenes' rows alone)."""
    model.requires_grad_(False)
    rates = {"autoencoder.encoder": args.lr_ae, "autoencoder.decoder": args.lr_ae if phase.scenes == "old" else args.lr_finetune,
             "mlp": args.lr_mlp, "shared": args.lr}
    groups = []
    for part, rate in rates.items():
        params = [p.requires_grad_() for name, p in model.named_parameters() if name.startswith(part) and part.split(".")[-1] in phase.train]
        groups += [{"params": params, "rate": rate}] if params else []
    return [p for group in groups for p in group["params"]], torch.optim.Adam(groups, betas=(0.9, 0.99)) if groups else None


def run_phase(setup: Setup, number: int, phase: Phase, model: Model, store: Optional[Store], state: Optional[dict], before: dict) -> dict:
    """Train one phase to its end; -> {"seconds": of training, "steps", "scores"}. state: a checkpoint to go on from. before:
    {"steps", "seconds"} of the earlier phases.

    Every random number of a step comes from generator(seed, phase, step): nothing else to save, and all ranks agree.
    """
    args, scenes, run = setup.args, setup.scenes[phase.scenes], setup.run
    lines = math.ceil(len(scenes) / args.batch)                         # steps in which every scene is seen once
    steps = min(args.steps or 10 ** 9, math.ceil(phase.visits * lines / args.views))
    shared, optimiser = optimiser_of(args, phase, model)
    clock, step = Stopwatch(setup.device), 0
    if state:
        model.load_state_dict(state["model"])
        if optimiser:
            optimiser.load_state_dict(state["optimiser"])
        step, clock = state["step"], Stopwatch(setup.device, state["seconds"])
    keep = lambda: checkpoint(setup, store, {"phase": phase.name, "step": step, "seconds": clock.seconds, "model": model.state_dict(),
                                          "optimiser": optimiser.state_dict() if optimiser else {}})
    if not state:
        keep()                                                          # before the first row is written
    progress, scores = Progress(steps, step) if run else None, {}
    tag = "" if phase.store == main_phase(plan(args)).store else f"{phase.name}/"                    # psnr is the run's own row's
    while step < steps:
        clock.start()
        decay = args.decay ** (step / steps)
        for group in optimiser.param_groups if optimiser else ():
            group["lr"] = group["rate"] * decay
        # 1. the step's scenes and views
        batch = draw_batch(setup, number, phase, step, model)
        total = torch.zeros((), device=setup.device)
        for p in shared:
            p.grad = torch.zeros_like(p)
        if batch:
            planes = None
            if store:
                rows, moments = store.read(batch.scenes)
                rows = rows.to(setup.device).requires_grad_()
                planes = model.fuse(rows)                                                           # (B, 3, R, R, F)
            # 2. losses, gradients
            losses = losses_of(model, phase, planes, batch, setup.album.family)
            total = total + sum(phase.losses[name] * value for name, value in losses.items())
            total.backward()
        # 3. what is shared moves by all ranks' gradients, a scene's row by its own
        total = total.detach()
        sum_over_ranks([total, *(p.grad for p in shared)])
        check_finite(total, step)
        if optimiser:
            optimiser.step()
        if batch and store:
            store.step(batch.scenes, rows.detach(), rows.grad, moments, decay * (args.lr_rgb if model.rgb else args.lr))
        step, seconds = step + 1, clock.stop()
        # 4. the books
        due = phase.row and (step == steps or args.eval_every and step * args.views // (lines * args.eval_every)
                             > (step - 1) * args.views // (lines * args.eval_every))
        scores = evaluate(model, store, setup.album, scenes, setup.device) if due else {}
        if run:
            progress(step, **{phase.name: total})
            if due or step % 100 == 0 or step == steps:
                run.write_line(step=before["steps"] + step, phase=phase.name, visits=step * args.views / lines, loss=float(total),
                        train_seconds=before["seconds"] + seconds, seconds_per_scene=seconds / len(scenes),
                        **{f"{tag}{name}": value for name, value in scores.items()})
        if step % args.save_every == 0 and step < steps:
            keep()
    if phase.row and not scores:                                        # cut after its last step
        scores = evaluate(model, store, setup.album, scenes, setup.device)
    return {"seconds": clock.seconds, "steps": steps, **({"scores": scores} if phase.row else {})}


def checkpoint(setup: Setup, store: Optional[Store], state: dict) -> None:
    """Rank 0 writes ckpt.pt and a copy of the rows as they are now. Nobody writes rows meanwhile."""
    barrier()
    if setup.run:
        kept = store and f"{store.path.stem}-{state['step']:07d}.kept"
        if store:
            copy_whole(store.path, setup.path / kept)
        setup.run.save({**state, "kept": kept})
        for old in setup.path.glob("*.kept"):
            if old.name != kept:
                old.unlink()
    barrier()


def start_group(device: str) -> str:
    """Join torchrun's other processes, if there are any; -> this rank's device."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    if dist.is_initialized() and device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    return device


def from_rank_0(value):
    """Rank 0's value, on all ranks."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box)
    return box[0]


def choose_scenes(args: Args, family: Family) -> dict[str, list[int]]:
    """Numbers of the scenes of stage 1 ("old"), of stage 2 ("new"), of those that RGB planes get ("few"). UserError for broken ones."""
    end = args.first + args.scenes + args.new_scenes
    if end > len(family.scenes):
        raise UserError(f"{family.name}: has {len(family.scenes)} scenes, but --first {args.first} --scenes {args.scenes} --new-scenes "
                        f"{args.new_scenes} ask for {end}: lower them")
    ids = family.check(list(range(args.first, end)), args.skip_bad)
    old, new = [i for i in ids if i < args.first + args.scenes], [i for i in ids if i >= args.first + args.scenes]
    if not old or not new:
        raise UserError(f"{family.name}: no usable scene is left for stage {2 if old else 1}: other --first, --scenes, --new-scenes")
    return {"old": old, "new": new, "few": new[:args.rgb_scenes]}


def train(args: Args) -> dict:
    """All phases of the plan, scored; write the run folder; -> what summary.json holds."""
    device = start_group(args.device)
    rank, world = ranks()
    args = replace(args, factor=args.factor or (4 if args.size <= 64 else 8))
    check(args)
    family = load_family(args.scene, args.data, args.size, above=args.above)
    scenes = choose_scenes(args, family)
    run = Run("latent_scenes", family.name, args.out, asdict(args), resume=args.resume, eval_only=args.eval_only) if rank == 0 else None
    path, resumed = from_rank_0(run and (run.path, run.resumed))
    expect = {name: value for name, value in run.args.items() if name not in FREE} if run else {}
    state = from_rank_0(run and resumed and run.load(expect)) or {"phase": None}
    board = tensorboard(path) if args.tensorboard and run else None
    album = Album(family, path / f"pictures-{args.size}{'' if args.above else '-all'}")
    box = state["model"]["box"] if resumed else from_rank_0(
        run and (family.aabb if args.box == "whole" else measure_box(album, scenes["old"][:16])))
    setup, phases, done = Setup(args, album, scenes, box, path, run, device), plan(args), {}
    for phase in phases:
        number = zlib.crc32(phase.name.encode())                        # of its random numbers: whatever else is in --compare
        file, mine = path / f"phase-{phase.name}.pt", scenes[phase.scenes]
        if file.is_file():                                              # finished before
            done[phase.name] = load_phase(file, path / f"planes-{phase.store}.bin" if phase.store else None)
            continue
        if args.eval_only:
            raise UserError(f"{path}: phase {phase.name} is not finished: --resume first")
        cut = state if state["phase"] == phase.name else None
        if cut and cut["kept"] and not (path / cut["kept"]).is_file():
            raise UserError(f"{path / cut['kept']}: not found: ckpt.pt needs it: start afresh with another --out")
        if cut and cut["kept"] and run:                                 # rows as they were at the checkpoint
            copy_whole(path / cut["kept"], path / f"planes-{phase.store}.bin")
        for i in mine[rank::world]:
            album.scene(i)                                              # loading and drawing is not training
        barrier()
        model, store = open_phase(setup, number, phase, done)
        before = {key: sum(d[key] for d in done.values()) for key in ("steps", "seconds")}
        if run:
            run.rewind(before["steps"] + (cut["step"] if cut else 0))            # lines that will be written again
            print(f"phase {phase.name}: {len(mine)} {phase.scenes} scenes; moves {', '.join(sorted(phase.train))}", flush=True)
        result = run_phase(setup, number, phase, model, store, cut, before)
        if phase.name == "0":
            if run:
                model.autoencoder.measure(torch.cat([album.pictures(i, slice(album.scene(i)["test"], None)) for i in mine[:16]]).to(device))
            model.load_state_dict(from_rank_0(model.state_dict()))
        barrier()                                                       # all rows are written
        mean = store and (sum(store.read([i])[0][0] for i in mine) / len(mine) if phase.scenes == "old" else store.mean)
        done[phase.name] = {**result, "model": model.state_dict(), "mean": mean, "bytes": store and 4 * store.P}
        if run:
            write_whole(file, lambda f: torch.save(done[phase.name], f))
        if run and phase.row:
            print(f"{phase.row}: {result['scores']['psnr']:.2f} dB, {result['seconds'] / len(mine):.2f} s a scene in this phase", flush=True)
            for name, value in result["scores"].items() if board else ():
                board.add_scalar(f"{phase.name}/{name}", value, before["steps"] + result["steps"])
        barrier()
        if store:
            store.close()
    summary = conclude(setup, phases, done)
    if dist.is_initialized():
        dist.destroy_process_group()
    return summary


def chain(phases: list[Phase], name: str) -> list[Phase]:
    """The phases that lead to this one, first to last."""
    phase = next(p for p in phases if p.name == name)
    return (chain(phases, phase.after) if phase.after else []) + [phase]


def main_phase(phases: list[Phase]) -> Phase:
    """The one whose row the run is about: the last of --planes in latents, else RGB."""
    return [p for p in phases if p.store == ("new" if any(p.store == "new" for p in phases) else "rgb")][-1]


def price(phases: list[Phase], done: dict, scenes: dict, last: Phase) -> dict:
    """What a row of the table cost: seconds and bytes of one more scene, and those that all scenes share: of stage 1; of autoencoder, MLP,
    shared planes, and of second copies of what stage 2 changed."""
    way = chain(phases, last.name)
    seconds = lambda old: sum(done[p.name]["seconds"] for p in way if (p.scenes == "old") == old)
    size = lambda *parts: sum(4 * v.numel() for name, v in done[last.name]["model"].items() if name.startswith(parts))
    networks = {part: size(part) for part in ("autoencoder.encoder", "autoencoder.decoder", "mlp", "shared")}
    second = [part for part in networks if part.split(".")[-1] in last.train and len(way) > 1]      # stage 1's scenes keep theirs
    return {"seconds_per_scene": seconds(False) / len(scenes[last.scenes]), "bytes_per_scene": done[last.name]["bytes"],
            "seconds_shared": seconds(True), "bytes_shared": sum(networks.values()) + sum(networks[part] for part in second)}


def amortise(price: dict, N1: int, counts: list[int]) -> dict:
    """N -> bytes and seconds a scene if N scenes share what a row shares; `seconds` keeps stage 1's scenes, `seconds_overhead` does not."""
    table = {}
    for N in counts:
        kept, overhead = seconds_per_scene(N, N1 if price["seconds_shared"] else 0, price["seconds_shared"], price["seconds_per_scene"])
        table[N] = {"bytes": price["bytes_per_scene"] + price["bytes_shared"] / N, "seconds": kept, "seconds_overhead": overhead}
    return table


def cost_curves(*tables: Optional[dict]) -> str:
    """SVG: bytes and seconds a scene against the number of scenes; tables of amortise, of the run's own row and of RGB planes."""
    curve = lambda table, key: [[(N, max(cell[key], 1e-3)) for N, cell in table.items()]]
    tables = {label: table for label, table in zip(("this run", "RGB tri-planes"), tables) if table}
    seconds = {label: curve(table, "seconds") for label, table in tables.items()}
    seconds |= {"stage 1 for nothing else": curve(tables["this run"], "seconds_overhead")}
    size = {label: curve(table, "bytes") for label, table in tables.items()}
    return draw_panels({"bytes a scene against scenes": size, "seconds a scene against scenes": seconds}, log=True)


def sheet(columns: list[Tensor], zoom: int) -> Tensor:
    """Columns of pictures, each (n, H, W, 3) -> one picture (n H zoom, columns W zoom, 3)."""
    whole = torch.cat([torch.cat(list(column)) for column in columns], 1)
    return whole.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def mosaic(y: Tensor, H: int) -> Tensor:
    """The first four latent channels (n, C, h, w) as 2 x 2 grey tiles: (n, H, H, 3)."""
    tiles = F.interpolate((y[:, :4] + 1) / 2, size=(H // 2, H // 2), mode="nearest").clamp(0, 1)
    while tiles.shape[1] < 4:
        tiles = torch.cat([tiles, torch.ones_like(tiles[:, :1])], 1)
    rows = [torch.cat([tiles[:, a], tiles[:, b]], 2) for a, b in ((0, 1), (2, 3))]
    return torch.cat(rows, 1)[..., None].expand(-1, -1, -1, 3)


@torch.no_grad()
def draw(setup: Setup, phases: list[Phase], done: dict, models: dict) -> None:
    """sheet.png: new scenes, truth | four latent channels | the run's own decoded | rivals as in the table. test_*.png: strips of the
    first. macro.png: the mean of --planes macro, then each weight W_k raised by two standard deviations. render.mp4."""
    album, path, family = setup.album, setup.path, setup.album.family
    main, zoom, rows = main_phase(phases), max(1, 128 // family.size), lambda p, ids: models[p.name][1].read(ids)[0].to(setup.device)
    last = {p.store: p for p in phases if p.row and p.store != "both-new"}         # C's planes are gone where D has moved them
    see = lambda p, row, c2w, K: render_views(models[p.name][0], row, c2w.to(setup.device), K.to(setup.device), family)
    columns = {name: [] for name in ("truth", "latent", *(p.name for p in last.values()))}
    shown = setup.scenes["few"][:6]
    for k, i in enumerate(shown):
        c, v = album.scene(i), [k % album.scene(i)["test"]]
        columns["truth"].append((album.pictures(i, v)[0].permute(1, 2, 0) + 1) / 2)
        for p in last.values():
            out = see(p, rows(p, [i]), c["c2w"][v], c["K"][v])
            columns[p.name].append(out["rgb"][0].cpu())
            if p == main:
                columns["latent"].append(mosaic(out["y"], family.size)[0].cpu())
                depth = F.interpolate(out["depth"][None], size=(family.size, family.size), mode="nearest")[0, 0].cpu()
                save_png(path / f"test_{i:03d}.png", comparison_strip(columns["truth"][-1], columns[p.name][-1], depth, family.near, family.far))
    save_png(path / "sheet.png", sheet([torch.stack(column) for column in columns.values()], zoom))
    K = album.scene(shown[0])["K"][:1]
    for p in last.values():
        if p.planes == "macro":
            W = rows(p, setup.scenes["new"])                                                        # (scenes, M)
            some = torch.cat([W.mean(0, keepdim=True), W.mean(0) + 2 * torch.diag(W.std(0, unbiased=False))])
            tiles = [see(p, w[None], orbit_poses(8, 1.3, 25.0)[1:2], K)["rgb"] for w in some]
            save_png(path / "macro.png", sheet([tile.cpu() for tile in tiles], zoom))
    if setup.args.video:
        films = [see(main, rows(main, [i]), orbit_poses(60, 1.3, 25.0), K.expand(60, 3, 3))["rgb"].cpu() for i in shown[:4]]
        save_video(path / "render.mp4", list(torch.cat(films, 2)))


def conclude(setup: Setup, phases: list[Phase], done: dict) -> dict:
    """Rows, costs, pictures, summary."""
    args, album, scenes, device = setup.args, setup.album, setup.scenes, setup.device
    models = {p.name: open_phase(setup, n, replace(p, after=p.name, keep=EVERYTHING), done) for n, p in enumerate(phases)}
    score = lambda p, ids, decoder=None: evaluate(*models[p.name], album, ids, device, decoder)
    if args.eval_only:
        for p in {p.store: p for p in phases if p.row}.values():        # the last phase of each file of rows
            done[p.name]["scores"] = score(p, scenes[p.scenes])
    rows = {p.row: {**done[p.name]["scores"], **price(phases, done, scenes, p), "scenes": len(scenes[p.scenes])} for p in phases if p.row}
    main, rgb = main_phase(phases), next((p for p in phases if p.kind == "rgb"), None)
    counts, extra = sorted({10, 30, 100, 300, 1000, 3000, len(scenes["old"]) + len(scenes["new"])}), {}
    amortised = amortise(rows[main.row], len(scenes["old"]), counts)
    if rgb and rgb != main:
        extra["amortised_rgb"] = amortise(rows[rgb.row], 0, counts)
    if len(scenes["few"]) < len(scenes["new"]):                         # the RGB row's scenes
        extra["few_scenes_psnr"] = score(main, scenes["few"])["psnr"]
    if "decoder" in main.train:                                         # stage 1's scenes, with their own decoder and with the tuned one
        old = next(p for p in reversed(phases) if p.store == "old")
        extra["old_scenes_psnr"] = score(old, scenes["old"][:8])["psnr"]
        extra["old_scenes_psnr_new_decoder"] = score(old, scenes["old"][:8], models[main.name][0])["psnr"]
    ceiling = next((done[p.name]["scores"]["autoencoder_psnr"] for p in phases if p.row and p.store == "new"), None)
    total, scores = sum(d["seconds"] for d in done.values()), done[main.name]["scores"]
    summary = dict(method="latent_scenes", scene=album.family.name, data=album.family.kind, size=args.size, seed=args.seed,
                   steps=sum(d["steps"] for d in done.values()), train_seconds=round(total, 2),
                   peak_memory_mb=round(peak_memory_mb(device), 1), psnr=scores["psnr"], ssim=scores["ssim"], autoencoder_psnr=ceiling,
                   ranks=ranks()[1], scenes=len(scenes["old"]), new_scenes=len(scenes["new"]), rows=rows, amortised=amortised, **extra)
    if setup.run:
        draw(setup, phases, done, models)
        (setup.path / "costs.svg").write_text(cost_curves(amortised, extra.get("amortised_rgb")), encoding="utf-8")
        write_json(setup.path / "summary.json", summary)
        shutil.rmtree(album.folder, ignore_errors=True)
        print(table(rows))
        print(f"{album.family.name}: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f} over {len(scenes[main.scenes])} unseen scenes "
              f"after {total:.1f} s of training; pictures in {setup.path}")
    barrier()
    return summary


def table(rows: dict) -> str:
    """Markdown. marginal: of one more scene. shared: paid once."""
    lines = ["", "| unseen scenes | PSNR [dB] | SSIM | marginal s | marginal kB | shared s | shared kB |",
             "|---|---:|---:|---:|---:|---:|---:|"]
    lines += [f"| {name} | {r['psnr']:.2f} | {r['ssim']:.4f} | {r['seconds_per_scene']:.2f} | {r['bytes_per_scene'] / 1e3:.2f} | "
              f"{r['seconds_shared']:.0f} | {r['bytes_shared'] / 1e3:.0f} |" for name, r in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli(PRESETS, train)
