"""Many scenes in a 3D-aware latent space (3Da-AE: Schnepf et al., CVPR 2024 workshop 3DMV,
arXiv 2403.11678).

A thousand cars are fitted together. The tri-plane of a car is not rendered to 64 x 64 colours but
to a 16 x 16 image of latents, which a small convolutional decoder turns into the picture: 16 times
fewer rays a picture. For that, the latents of all views must be views of one thing in space, which
those of an ordinary autoencoder are not. So the autoencoder is first trained further together with
the planes of some scenes (stage 1): it becomes 3D-aware. Each tri-plane is a small private part
beside a learned combination of tri-planes that all scenes share. A new scene (stage 2) then costs
few bytes and seconds, and what was paid once is divided by the number of scenes.

    T_i = concat(T_i^mic, sum_k W_ik B_k)                                  fuse
    y = render(T_i, pose),  picture = D(n^-1(y)),  n(z) = tanh(s z)        render, Model.decode
    L_latent = |n(E(x)) - y|^2,  L_rgb = |D(n^-1(y)) - x|^2,  L_ae = |D(E(x)) - x|^2      losses

| paper                             | here                                                       |
|-----------------------------------|------------------------------------------------------------|
| E, D; B_k; tiny MLP               | Autoencoder.encoder, .decoder; Model.shared; Model.mlp     |
| T_i^mic, W_i; what trains when    | row i of Bank; phases                                      |

    python latent_scenes.py                         24 unseen cars: 25.0 dB, 200 s of one core
    python latent_scenes.py --representation rgb    the baseline, RGB tri-planes: 26.3 dB (4 cars)
    python latent_scenes.py --autoencoder plain     without phase B: 21.0 dB
    torchrun --nproc-per-node=2 latent_scenes.py    the same, scenes dealt to two processes
"""
from __future__ import annotations

import copy
import json
import math
import os
import sys
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Literal, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Family, RunArgs, TrainingRun, check_flags, cli, comparison_strip,
                    load_family, orbit_poses, pixel_grid, pixel_rays, psnr, ray_box, require,
                    resample, save_png, save_video, say, ssim)
from kernels import composite, triplane_interp


@dataclass
class Args(RunArgs):
    scene: str = "cars"
    """A family of scenes: a name under --data (srn_cars), a path, or the built-in `cars`."""
    size: int = 64
    """Image side [pixels]."""
    steps: int = 1_000_000
    """Most steps of a phase, for a quick look."""
    scenes: int = 40
    """Scenes of stage 1, N1: they teach the autoencoder, the shared planes and the MLP."""
    new_scenes: int = 24
    """Scenes of stage 2: the next ones."""
    representation: Literal["rgb", "latent"] = "latent"
    """What planes are rendered to: latents, or colours (the baseline, on the new scenes only)."""
    autoencoder: Literal["plain", "3d"] = "3d"
    """3d: trained further with the planes of stage 1 (phase B). plain: phase B is left out."""
    latent_channels: int = 8
    """Channels of a latent image, C."""
    width: tuple[int, ...] = (32, 48)
    """Channels of the autoencoder after each halving of the side: f = 2^2 pixels a latent pixel."""
    resolution: int = 32
    """Texels a side of a plane, R."""
    micro: int = 4
    """Private features, F_mic (0: shared planes only)."""
    macro: int = 8
    """Shared features, F_mac (0: private planes only). RGB planes have F_mic + F_mac private."""
    bases: int = 12
    """Shared tri-planes, M."""
    hidden: int = 32
    """Width of the MLP behind the planes."""
    samples: int = 24
    """Samples of a ray, one in each of so many equal intervals."""
    batch: int = 4
    """Scenes a step, a picture of each, over all processes."""
    views: tuple[int, int, int, int, int] = (220, 30, 160, 20, 70)
    """Pictures of each of their scenes that phases 0, A, B, C and D see."""
    views_rgb: int = 1000
    """The same for RGB planes, which see --rgb-rays of each."""
    rgb_rays: int = 128
    """Rays of one picture that a step of RGB planes takes."""
    lr: float = 6e-2
    """Adam's learning rate of private planes, W and shared planes."""
    lr_rgb: float = 1e-1
    """The same for RGB planes."""
    lr_mlp: float = 5e-3
    """Of the MLP."""
    lr_ae: float = 2e-3
    """Of encoder and decoder in stage 1."""
    lr_finetune: float = 5e-4
    """Of the decoder in stage 2."""
    lambda_latent: float = 0.1
    """Weight of the latent loss beside the RGB loss (phase B)."""
    lambda_ae: float = 0.3
    """The same of the autoencoder's own loss."""
    tv: float = 1e-3
    """Weight of the total variation of planes in stage 1."""
    encode_every: int = 4
    """In phase B one picture of so many goes through E, which costs much (paper: 1)."""
    shift: bool = True
    """Move each training picture by up to half a latent pixel, its rays with it (ours)."""


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", size=128, scenes=500, new_scenes=500, eval_every=2000,
                  latent_channels=4, width=(64, 128, 256), resolution=64, micro=10,
                  macro=22, bases=50, hidden=64, samples=96, batch=32,
                  views=(2000, 1230, 1230, 1230, 1230), views_rgb=20_000, rgb_rays=1024, lr=1e-2,
                  lr_rgb=1e-2, lr_mlp=1e-2, lr_ae=1e-4, lr_finetune=1e-4, lambda_latent=1.0,
                  lambda_ae=0.1, encode_every=1)}


# ------------------------------------------------------- planes, latents, losses: the method

def fuse(private: Tensor, W: Tensor, shared: Tensor) -> Tensor:
    """T_i = concat(T_i^mic, sum_k W_ik B_k): the micro and the macro part of each tri-plane.

    private (n, 3, R, R, F_mic), W (n, M), shared B (M, 3, R, R, F_mac) -> (n, 3, R, R, F).
    Why: what cars have in common is stored once, in B; W is M numbers a scene. What a car has
    alone goes into its F_mic private features. Quick: 4 bytes * 3 * 32^2 * 4 = 49 kB a car, and
    48 bytes of W; RGB planes with 12 private features take 147 kB.
    """
    macro = torch.einsum("nk,k...->n...", W, shared)
    return torch.cat([private, macro], -1)


def normalise(z: Tensor, s: Tensor) -> Tensor:
    """n(z) = tanh(s z), in (-1, 1). Why: planes are rendered through a sigmoid. s is 0.4 / std(z),
    measured when phase 0 ends: latents then use most of tanh's range, and few are saturated."""
    return torch.tanh(s * z)


def denormalise(y: Tensor, s: Tensor) -> Tensor:
    """n^-1(y) = atanh(y) / s; y is clipped to [-1 + 1e-4, 1 - 1e-4], no gradient where it is."""
    return torch.atanh(y.clamp(-1 + 1e-4, 1 - 1e-4)) / s


def total_variation(planes: Tensor) -> Tensor:
    """Mean squared difference of neighbouring texels along both sides.  planes (n, 3, R, R, F).
    Released code: a sum instead of a mean, so that its weight 1e-4 is about 10 of ours."""
    return planes.diff(dim=2).square().mean() + planes.diff(dim=3).square().mean()


def losses(model: Model, batch: Batch, planes: Optional[Tensor], weights: dict) -> tuple:
    """-> the loss of a step, a weighted sum, and the mean opacity of its rays (0-d each).

    planes (n, 3, R, R, F) of the batch's scenes, None in phase 0. weights: loss -> its weight.
    Errors are of quantities in [-1, 1]. What a phase freezes receives no gradient.
    """
    some = batch.encoded
    loss, opacity = batch.x.new_zeros(()), batch.x.new_ones(())
    if some and ("autoencoder" in weights or "latent" in weights):
        z = model.autoencoder.encoder(batch.x[some])                           # (e, C, h, w)
    if some and "autoencoder" in weights:
        # Gradient to E and D. It keeps E from collapsing: for the latent loss alone the best E is
        # a constant, which planes can render without error.
        error = F.mse_loss(model.autoencoder.decoder(z), batch.x[some])
        loss = loss + weights["autoencoder"] * batch.encoded_weight * error
    if planes is None:
        return loss, opacity
    out = render(model, planes, batch.rays_o, batch.rays_d, batch.jitter)
    if some and "latent" in weights:
        # Gradient to planes, W, B and MLP: they are drawn to what E says. In phase B also to E: it
        # is drawn to what planes can render, which are latents of one thing in space.
        error = F.mse_loss(out["y"][some], normalise(z, model.autoencoder.s))
        loss = loss + weights["latent"] * batch.encoded_weight * error
    if "rgb" in weights:
        # Gradient to D and, through n^-1 and the renderer, to planes, W, B and MLP. Not to E.
        error = F.mse_loss(model.decode(out["y"]), batch.target)
        loss = loss + weights["rgb"] * error
    if "tv" in weights:
        # Gradient to planes, W and B: texels that no ray has seen follow their neighbours.
        loss = loss + weights["tv"] * total_variation(planes)
    return loss, out["opacity"].mean().detach()


@dataclass(frozen=True)
class Phase:
    name: str
    stage: str              # whose scenes: "old" (stage 1) or "new" (stage 2)
    trains: frozenset       # of encoder, decoder, planes, shared, mlp; all else is frozen
    weights: dict           # loss -> weight
    views: int              # pictures of each scene
    rays: int               # of a picture


def phases(args: Args) -> list[Phase]:
    """What trains when; `planes` are the private planes and W of the phase's scenes.

    0: an ordinary autoencoder. A: planes learn its latents as well as they can. B: everything
    together; the autoencoder becomes 3D-aware. C: planes of new scenes, from latents alone.
    D: through the decoder, which is tuned to what these planes render.
    Why C before D: a step of C needs no decoder, and brings planes near to where D ends.
    Released code: C and D also train the shared planes and a new MLP, so that no old scene renders
    any more (tried here: 0.5 dB less). D tunes a second decoder; old scenes keep the first.
    """
    joint = {"rgb": 1.0, "latent": args.lambda_latent, "autoencoder": args.lambda_ae, "tv": args.tv}
    table = [
        # name, scenes, what trains                            losses and their weights
        ("0", "old", "encoder decoder",                        {"autoencoder": 1.0}),
        ("A", "old", "planes shared mlp",                      {"latent": 1.0, "tv": args.tv}),
        ("B", "old", "planes shared mlp encoder decoder",      joint),
        ("C", "new", "planes",                                 {"latent": 1.0}),
        ("D", "new", "planes decoder",                         {"rgb": 1.0}),
    ]
    views, rays = args.views, [0, *[(args.size // 2 ** len(args.width)) ** 2] * 4]
    if args.representation == "rgb":
        table = [("rgb", "new", "planes mlp", {"rgb": 1.0, "tv": args.tv})]
        views, rays = [args.views_rgb], [args.rgb_rays]
    listed = [Phase(name, stage, frozenset(trains.split()), weights, *counts)
              for (name, stage, trains, weights), *counts in zip(table, views, rays)]
    return [phase for phase in listed if phase.name != "B" or args.autoencoder == "3d"]


def bytes_per_scene(N: int, R: int, micro: int, M=0, macro=0, networks=0) -> float:
    """Bytes of one of N scenes in float32: 4 (3 R^2 F_mic + M) + (4 M 3 R^2 F_mac + networks) / N.

    networks: bytes of autoencoder and MLP. Example (the paper's): R = 64, F = 10 + 22, M = 50, an
    autoencoder of 83.65 M weights: of 1000 scenes each takes 880 kB, 44 % less than RGB planes
    (F_mic = 32, nothing shared: 1573 kB).
    """
    return 4 * (3 * R ** 2 * micro + M) + (4 * M * 3 * R ** 2 * macro + networks) / N


def break_even(shared: float, each: float, rgb: float) -> float:
    """The N above which N scenes take fewer bytes than RGB planes: shared + N each = N rgb.
    Example (the paper's sizes): (54.1 MB + 334.6 MB) / (1573 kB - 492 kB) = 360 scenes."""
    return shared / (rgb - each) if rgb > each else math.inf


# ---------------------------------------------------------------- autoencoder, planes, renderer

class Residual(nn.Sequential):
    def __init__(self, width: int):
        a, b = (nn.Conv2d(width, width, 3, padding=1) for _ in "ab")
        nn.init.zeros_(b.weight)                               # starts as the identity
        nn.init.zeros_(b.bias)
        super().__init__(nn.SiLU(), a, nn.SiLU(), b)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Autoencoder(nn.Module):
    """E: (n, 3, H, W) in [-1, 1] -> z (n, C, H/f, W/f); D back. Convolutions; each halving moves
    2 x 2 pixels into channels. Measured when phase 0 ends: s (see normalise), and bg (C,), which
    the renderer puts behind planes: the mean of (n(z) + 1) / 2 along the border of the pictures.
    Released code: Stable Diffusion's, 84 M weights trained on other pictures, with noise on its
    latents. Here 0.3 M weights, trained from nothing, no noise.
    """
    def __init__(self, channels: int, width: tuple[int, ...]):
        super().__init__()
        down, up, last = [], [], width[-1]
        for before, after in zip((3, *width), width):
            down += [nn.PixelUnshuffle(2), nn.Conv2d(4 * before, after, 3, padding=1),
                     Residual(after)]
            up = [nn.SiLU(), nn.Conv2d(after, 4 * before, 3, padding=1), nn.PixelShuffle(2),
                  *([Residual(before)] if before > 3 else []), *up]
        self.encoder = nn.Sequential(*down, Residual(last), nn.SiLU(),
                                     nn.Conv2d(last, channels, 3, padding=1))
        self.decoder = nn.Sequential(nn.Conv2d(channels, last, 3, padding=1), Residual(last),
                                     Residual(last), *up)
        self.to(memory_format=torch.channels_last)             # a quarter faster on a CPU
        self.register_buffer("s", torch.ones(()))
        self.register_buffer("bg", torch.zeros(channels))

    @torch.no_grad()
    def measure(self, scenes: list[SceneViews]) -> None:
        """Set s and bg by the training views of these scenes, and of those of other processes."""
        x = torch.cat([scene.pictures(slice(scene.tests, None)) for scene in scenes])
        z = self.encoder(x).double()
        sums = torch.stack([z.new_tensor(z.numel()), z.sum(), z.square().sum()])
        sum_over_ranks([sums])
        mean, square = sums[1:] / sums[0]
        self.s.copy_(0.4 / (square - mean ** 2).sqrt())
        y = normalise(z, self.s)
        border = torch.cat([y[:, :, 0], y[:, :, -1], y[:, :, :, 0], y[:, :, :, -1]], -1)
        sums = torch.cat([border.sum((0, 2)), border.new_tensor([border[:, 0].numel()])])
        sum_over_ranks([sums])
        self.bg.copy_((sums[:-1] / sums[-1] + 1) / 2)


class Model(nn.Module):
    """What scenes share: autoencoder (RGB planes: none), shared planes B, MLP."""
    def __init__(self, args: Args, family: Family):
        super().__init__()
        R, private, macro, channels = args.resolution, args.micro, args.macro, args.latent_channels
        self.factor, self.samples = 2 ** len(args.width), args.samples
        self.rgb = args.representation == "rgb"
        if self.rgb:
            private, macro, channels, self.factor = args.micro + args.macro, 0, 3, 1
        M = args.bases if macro else 0
        self.private = (3, R, R, private)                      # shape of a scene's own planes
        self.P = math.prod(self.private) + M                   # numbers of a scene: these and W
        self.near, self.far = family.near, family.far
        self.shared = nn.Parameter(0.1 * torch.randn(M, 3, R, R, macro))
        self.mlp = nn.Sequential(nn.Linear(private + macro, args.hidden), nn.Softplus(),
                                 nn.Linear(args.hidden, 1 + channels))
        self.autoencoder = None
        if not self.rgb:
            self.autoencoder = Autoencoder(channels, args.width)
        self.register_buffer("aabb", family.aabb.clone())      # the box that planes span (2, 3)
        self.register_buffer("white", family.bg.clone())

    def planes(self, p: Tensor) -> Tensor:
        """Scenes' own numbers (n, P) -> tri-planes (n, 3, R, R, F)."""
        own = self.P - len(self.shared)
        return fuse(p[:, :own].view(len(p), *self.private), p[:, own:], self.shared)

    def field(self, x: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, N, 3) in the world -> sigmas (n N,) = softplus(raw - 1) [1/length],
        rgbs (n N, C) = 1.002 sigmoid(raw) - 0.001. Features: the sum of the three planes xy, xz,
        yz at x. Released code: its third plane is (z, x), so nothing sees y and z together."""
        u = 2 * (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0]) - 1
        h = self.mlp(triplane_interp(u, planes)).flatten(0, 1)                 # (n N, 1 + C)
        return F.softplus(h[:, 0] - 1), torch.sigmoid(h[:, 1:]) * 1.002 - 0.001

    def decode(self, y: Tensor) -> Tensor:
        """Rendered (n, C, h, w) in [-1, 1] -> pictures (n, 3, H, W) = D(n^-1(y))."""
        if self.rgb:
            return y
        return self.autoencoder.decoder(denormalise(y, self.autoencoder.s))


def render(model: Model, planes: Tensor, rays_o: Tensor, rays_d: Tensor,
           jitter: Optional[Tensor] = None) -> dict:
    """Volume rendering of latents or colours c_i: with delta_i the length of interval i,

        T_i = exp(-sum_{j<i} sigma_j delta_j),    w_i = T_i (1 - exp(-sigma_i delta_i)),
        y = 2 (sum_i w_i c_i + (1 - opacity) bg) - 1,    opacity = sum_i w_i.

    planes (n, 3, R, R, F), rays (n, h, w, 3) of n pictures -> y (n, C, h, w) in about [-1, 1],
    opacity and depth = sum_i w_i t_i (n, h, w). The part of a ray in the box is cut into equal
    intervals, moved by jitter (n, h, w) - 1/2 of one (None: not), with a sample in the middle of
    each. Differentiable in planes and model.
    Released code: 48 samples, then 48 more where these found something; here 96 (--preset paper).
    """
    n, shape = len(planes), rays_o.shape[:-1]
    o, d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)                        # (r, 3)
    jitter = None if jitter is None else jitter.reshape(-1)
    edges = ray_box(o, d, model.aabb, model.near, model.far)                   # (r, 2)
    edges = resample(edges, torch.ones_like(edges[:, :1]), model.samples, jitter)
    t = 0.5 * (edges[:, 1:] + edges[:, :-1])                                   # (r, S)
    x = o[:, None] + t[..., None] * d[:, None]
    sigmas, rgbs = model.field(x.view(n, -1, 3), planes)
    offsets = torch.arange(len(o) + 1, device=o.device) * (edges.shape[1] - 1)
    starts, ends = edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1)
    rgb, opacity, depth, _ = composite(sigmas, rgbs, starts, ends, offsets)
    bg = model.white if model.rgb else model.autoencoder.bg
    y = 2 * (rgb + (1 - opacity[:, None]) * bg) - 1                            # (r, C)
    return {"y": y.view(*shape, -1).permute(0, 3, 1, 2), "opacity": opacity.view(shape),
            "depth": depth.view(shape)}


# --------------------------------------------------------- pictures, rays, the batch of a step

@dataclass
class SceneViews:
    """The pictures of a scene, in 8 bits: a thousand scenes of 128 px take 1.7 GB."""
    images: Tensor          # (V, 3, H, W) uint8
    c2w: Tensor             # (V, 3, 4)
    K: Tensor               # (V, 3, 3)
    tests: int              # the first so many are test views

    def pictures(self, views) -> Tensor:
        """(n, 3, H, W) in [-1, 1]; of one number (3, H, W)."""
        return self.images[views].float() / 127.5 - 1

    def training_view(self, u: float) -> tuple[Tensor, Tensor, Tensor]:
        v = self.tests + int(u * (len(self.c2w) - self.tests))
        return self.pictures(v), self.c2w[v], self.K[v]


def load_views(family: Family, i: int, device: str) -> SceneViews:
    train, test = family.read(i)
    images, c2w, K = (torch.cat([getattr(test, name), getattr(train, name)]).to(device)
                      for name in ("images", "c2w", "K"))
    return SceneViews((images * 255).round().byte().permute(0, 3, 1, 2), c2w, K, len(test.names))


def rays_through(xy: Tensor, c2w: Tensor, K: Tensor) -> tuple[Tensor, Tensor]:
    """xy (n, h, w, 2) pixels of n views, c2w (n, 3, 4), K (n, 3, 3) -> rays (n, h, w, 3)."""
    each = xy.shape[1] * xy.shape[2]
    K, c2w = K.repeat_interleave(each, 0), c2w.repeat_interleave(each, 0)
    o, d = pixel_rays(xy.reshape(-1, 2), K, c2w)
    return o.view(*xy.shape[:3], 3), d.view(*xy.shape[:3], 3)


@dataclass
class Batch:
    """This process's part of a step: n pictures, one each of n scenes."""
    scenes: list            # (n,) rows of the bank
    x: Tensor               # (n, 3, H, W) in [-1, 1], shifted
    target: Tensor          # of the RGB loss: x; of RGB planes, the colours (n, 3, 1, k) of rays
    rays_o: Tensor          # (n, h, w, 3); of RGB planes (n, 1, k, 3)
    rays_d: Tensor
    jitter: Tensor          # (n, h, w) in [0, 1)
    share: float            # of the pictures of all processes in this step
    encoded: list           # which of the n go through E
    encoded_weight: float   # of their mean error, which stands for that of all n


def draw_batch(args: Args, phase: Phase, number: int, step: int, rows: range, views: dict,
               device: str) -> Optional[Batch]:
    """The pictures of a step; None if all slots of this process rest. All processes draw the random
    numbers of all slots, so that a step does not depend on how many processes there are.

    A latent step takes all H W / f^2 rays of a picture (quick: 256), as D needs the whole latent
    image; a step of RGB planes any --rgb-rays of H W (quick: 128 of 4096). So f^2 is saved on a
    picture, not on a step.
    Why --shift: rays through the centres of latent pixels alone never see what is between them
    (pictures are rolled: their border is background).
    """
    rank, world = ranks()
    slots = schedule(len(rows), args.batch, step, args.seed, number)
    used = [j for j in range(args.batch) if slots[j] is not None]
    mine = [j for j in used if j % world == rank]
    rgb, factor = phase.name == "rgb", 2 ** len(args.width)
    side, half = args.size // factor, factor // 2
    which = torch.rand(args.batch).tolist()
    jitter = torch.rand((args.batch, 1, args.rgb_rays) if rgb else (args.batch, side, side))
    pixel = torch.randint(args.size ** 2, jitter.shape)
    shift = torch.randint(-half, half + 1, (args.batch, 2)) * int(args.shift and not rgb)
    if not mine:
        return None
    every = args.encode_every if phase.name == "B" else 1
    encoded = [k for k, j in enumerate(mine) if (j + step) % every == 0]       # slots take turns
    scenes = [rows[slots[j]] for j in mine]
    x, c2w, K = zip(*(views[i].training_view(which[j]) for i, j in zip(scenes, mine)))
    target = x = torch.stack([image.roll(shift[j].tolist(), (2, 1)) for image, j in zip(x, mine)])
    xy = (pixel_grid(side, side, device) * factor).view(side, side, 2)
    xy = xy - shift[mine, None, None].to(device)               # (n, h, w, 2)
    if rgb:
        pixel = pixel[mine].to(device)                                         # (n, 1, k)
        xy = torch.stack([pixel % args.size, pixel // args.size], -1) + 0.5
        target = x.flatten(2).gather(2, pixel.expand(-1, 3, -1))[:, :, None]
    rays_o, rays_d = rays_through(xy, torch.stack(c2w), torch.stack(K))
    return Batch(scenes, x, target, rays_o, rays_d, jitter[mine].to(device), len(mine) / len(used),
                 encoded, len(encoded) * every / len(mine))


def schedule(n: int, B: int, step: int, *seed: int) -> list[Optional[int]]:
    """Which of n scenes stand in the B slots of a step (None: a slot rests); each comes once in an
    epoch of L = ceil(n / B) steps.

    Scene k has slot k mod B, and slot j belongs to process j mod world, so that a scene's numbers
    never move between processes. Of the L scenes of a slot, step s of the epoch takes number
    (a + b s) mod L, with a and b of the epoch, b prime to L: one element of a permutation, without
    drawing the others. Example: L = 5, a = 3, b = 2: 3, 0, 2, 4, 1.
    """
    L = math.ceil(n / B)
    epoch, s = divmod(step, L)
    rng, slots = np.random.default_rng((*seed, epoch)), []
    for slot in range(B):
        a, b = rng.integers(L, size=2).tolist()
        while math.gcd(b, L) != 1:
            b = (b + 1) % L
        k = (a + b * s) % L * B + slot
        slots.append(k if k < n else None)
    return slots


# ------------------------------------------------------------------------------ parameter bank

class Bank:
    """Each scene's own numbers and their Adam moments, a row of one memory-mapped file, which all
    processes share: p, m, v (P,) each, and t, the number of its steps.

    A step reads and writes the rows of its batch: its cost does not depend on how many scenes there
    are, and the others rest. (Released code: dense Adam, whose old momentum moves them all.)
    On a GPU the rows stay on it, and the file is written before a checkpoint is.
    """
    def __init__(self, path, count: int, P: int, device: str):
        self.P, width = P, 3 * P + 1
        self.file = torch.from_file(str(path), shared=True, size=count * width).view(count, width)
        self.rows = self.file.to(device)                       # on a CPU: the file itself

    def fill(self, i: int, p: Tensor) -> None:
        self.rows[i] = F.pad(p, (0, 2 * self.P + 1))

    def read(self, scenes: list[int]) -> Tensor:
        return self.rows[scenes, :self.P]                      # (n, P), a copy

    def step(self, scenes: list[int], d_p: Tensor, lr: float) -> None:
        """Adam on these rows alone (betas 0.9, 0.99).  d_p (n, P)."""
        p, m, v, t = self.rows[scenes].split([self.P, self.P, self.P, 1], 1)
        t, m, v = t + 1, 0.9 * m + 0.1 * d_p, 0.99 * v + 0.01 * d_p ** 2
        p = p - lr * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.99 ** t)).sqrt() + 1e-8)
        self.rows[scenes] = torch.cat([p, m, v, t], 1)

    def to_file(self, scenes: list[int]) -> None:
        if self.rows.device.type != "cpu":
            self.file[scenes] = self.rows[scenes].cpu()

    def state_dict(self) -> dict:
        return {"rows": self.file}

    def load_state_dict(self, state: dict) -> None:
        self.file.copy_(state["rows"])
        self.rows.copy_(self.file)


# ------------------------------------------------------------------------------- many processes
# Row k of a stage belongs to process k mod world. A step sums gradients over all processes before
# it writes rows, so that no row changes while the first process still saves them.

def ranks() -> tuple[int, int]:
    """(rank, world): number of this process, and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_ranks(device: str) -> str:
    """Join torchrun's other processes, if there are any; -> the device of this one. They wait for
    each other for at most an hour: to draw a thousand cars takes ten minutes."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or dist.is_initialized():
        return device
    require(device in ("cpu", "cuda"), f"--device {device}: {world} processes would share it: use "
                                       "--device cuda, and each has its own")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)                          # before NCCL takes one
    dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(hours=1))
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")                     # the first one speaks
    return device


def sum_over_ranks(values: list[Tensor]) -> None:
    """Each tensor becomes its sum over all processes, in place; one message, nothing pickled."""
    if dist.is_initialized():
        flat = torch.cat([value.reshape(-1) for value in values])
        dist.all_reduce(flat)
        for value, part in zip(values, flat.split([value.numel() for value in values])):
            value.copy_(part.view_as(value))


class QuietRun(TrainingRun):
    """The run of any process but the first, in the same folder: the same steps, nothing saved."""
    def _save(self, *rest) -> None:
        pass


def start_run(args: Args, name: str) -> TrainingRun:
    """One process after the other opens the run; the first one makes the folder."""
    rank, world = ranks()
    folder, kind = [args.out], QuietRun if rank else TrainingRun
    for turn in range(world):
        if turn == rank:
            flags = replace(args, out=folder[0], resume=args.resume or rank > 0)
            run = kind("latent_scenes", name, flags)
            folder = [str(run.path)]
        if world > 1:
            dist.broadcast_object_list(folder, turn)           # text, no tensors
    return run


# --------------------------------------------------------------------------------- evaluation

def to_images(x: Tensor) -> Tensor:
    """(n, 3, H, W) in about [-1, 1] -> (n, H, W, 3) in [0, 1]."""
    return (x.clamp(-1, 1).permute(0, 2, 3, 1) + 1) / 2


@torch.no_grad()
def render_views(model: Model, row: Tensor, c2w: Tensor, K: Tensor, size: int) -> dict:
    """A scene, row (1, P), from cameras (n, 3, 4): y (n, C, h, w), rgb (n, H, W, 3) in [0, 1] and
    depth (n, h, w)."""
    planes, side = model.planes(row), size // model.factor
    xy = (pixel_grid(side, side, row.device) * model.factor).view(1, side, side, 2)
    parts = [render(model, planes, *rays_through(xy, c2w[k:k + 1], K[k:k + 1]))
             for k in range(len(c2w))]
    y, depth = (torch.cat([part[name] for part in parts]) for name in ("y", "depth"))
    return {"y": y, "rgb": to_images(model.decode(y)), "depth": depth}


@torch.no_grad()
def evaluate(model: Model, bank: Optional[Bank], views: dict, scenes: range, count=None) -> dict:
    """Means over scenes, those of other processes included, of means over `count` test views (None:
    all): psnr [dB] and ssim of rendered pictures (bank None: not); autoencoder_psnr, of D(E(x)), a
    ceiling for planes that copy latents (phases A, C). Phase D may pass it: D is tuned to them."""
    def mean(measure, images):
        return float(torch.stack([measure(a, b) for a, b in zip(images, target)]).mean())

    sums = torch.zeros(4, device=model.aabb.device)            # number of scenes, three scores
    for i in [i for i in scenes if i in views]:
        scene, scores = views[i], [1.0, 0.0, 0.0, 0.0]
        tests = slice(min(count or scene.tests, scene.tests))
        x = scene.pictures(tests)
        target = to_images(x)
        if bank is not None:
            p, c2w, K = bank.read([i]), scene.c2w[tests], scene.K[tests]
            rgb = render_views(model, p, c2w, K, x.shape[-1])["rgb"]
            scores[1:3] = mean(psnr, rgb), mean(ssim, rgb)
        if not model.rgb:
            z = model.autoencoder.encoder(x)
            scores[3] = mean(psnr, to_images(model.autoencoder.decoder(z)))
        sums += torch.tensor(scores, device=sums.device)
    sum_over_ranks([sums])
    names = ("psnr", "ssim", "autoencoder_psnr")
    return {name: float(x / sums[0]) for name, x in zip(names, sums[1:]) if x != 0}


def draw(model: Model, bank: Bank, views: dict, rows: range, folder) -> None:
    """test_000.png, ... of the first six scenes: target | rendered | error | depth, and (latents)
    four channels of what is rendered, 2 x 2."""
    for k in [k for k in range(len(rows[:6])) if rows[k] in views]:
        scene, v = views[rows[k]], slice(k, k + 1)
        target = to_images(scene.pictures(v))[0]               # one of its first views
        out = render_views(model, bank.read([rows[k]]), scene.c2w[v], scene.K[v], len(target))
        depth = F.interpolate(out["depth"][None], size=target.shape[:2])[0, 0]
        strip = comparison_strip(target, out["rgb"][0], depth, model.near, model.far)
        if not model.rgb:
            y = out["y"][:, [0, 1, 2, -1]] / 2 + 0.5
            a, b, c, d = F.interpolate(y, size=len(target) // 2)[0]
            tiles = torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)])
            strip = torch.cat([strip, tiles[..., None].expand(-1, -1, 3)], 1)
        save_png(folder / f"test_{k:03d}.png", strip)


# ------------------------------------------------------------------------------------- training

def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("scenes", "new_scenes", "latent_channels", "resolution", "bases",
                                "hidden", "samples", "batch", "views_rgb", "rgb_rays", "lr",
                                "lr_rgb", "lr_mlp", "lr_ae", "lr_finetune", "encode_every"),
                not_negative=("micro", "macro", "lambda_latent", "lambda_ae", "tv"))
    require(args.micro + args.macro > 0, "--micro 0 --macro 0: planes need features")
    require(args.width and args.size % 2 ** len(args.width) == 0,
            f"--size {args.size}: is halved once for each number of --width, and must be even")
    require(min(args.width) > 0 and min(args.views) > 0, "--width, --views: wanted more than 0")
    world = ranks()[1]
    require(args.batch % world == 0 and min(args.scenes, args.new_scenes) >= world,
            f"--batch {args.batch}: wanted a multiple of the {world} processes, and as many scenes")


def choose_scenes(args: Args, family: Family) -> tuple[list[int], dict[str, range]]:
    """-> numbers of the scenes in the family, one a row of the bank; rows of each stage."""
    old, end = args.scenes, args.scenes + args.new_scenes
    require(end <= len(family.scenes), f"{family.name}: has {len(family.scenes)} scenes, --scenes "
            f"{args.scenes} --new-scenes {args.new_scenes} ask for {end}: lower them")
    ids = list(range(end))
    if args.representation == "rgb":
        ids, old = ids[old:], 0
    for i in ids if family.kind != "builtin" else ():          # a broken one ends the run here
        family.read(i)
    return ids, {"old": range(old), "new": range(old, len(ids))}


def make_optimiser(args: Args, phase: Phase, model: Model) -> torch.optim.Adam:
    """Adam on what the phase trains of the model; all else is frozen. Planes have Bank.step."""
    model.requires_grad_(False)
    parts = [("shared", [model.shared], args.lr), ("mlp", model.mlp.parameters(), args.lr_mlp)]
    if not model.rgb:
        rate = args.lr_ae if phase.stage == "old" else args.lr_finetune
        parts += [("encoder", model.autoencoder.encoder.parameters(), rate),
                  ("decoder", model.autoencoder.decoder.parameters(), rate)]
    groups = [{"params": [p.requires_grad_() for p in params if name in phase.trains], "rate": rate}
              for name, params, rate in parts]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def start_planes(phase: Phase, model: Model, bank: Bank, rows: dict, views: dict) -> None:
    """Planes of stage 1, and RGB planes, start from noise (0.1; W such that sum_k W_k B_k is as
    large as B_k), new ones from the mean of stage 1's. Released code: all from noise."""
    for i in rows[phase.stage] if phase.name in ("A", "rgb") else ():
        M = len(model.shared)
        W = torch.randn(M) / max(M, 1) ** 0.5
        bank.fill(i, torch.cat([0.1 * torch.randn(model.P - M), W]))
    if phase.name == "C":
        mean = bank.read([i for i in rows["old"] if i in views]).sum(0) / len(rows["old"])
        sum_over_ranks([mean])
        for i in rows["new"]:
            bank.fill(i, mean)


def num_steps(args: Args, phase: Phase, scenes: int) -> int:
    return min(args.steps, phase.views * math.ceil(scenes / args.batch))


def train(args: Args) -> dict:
    """All phases; write the run folder; -> what summary.json holds. A finished phase yields no
    steps; what is prepared for it again is replaced by the checkpoint before the next step."""
    args = replace(args, device=start_ranks(args.device))
    check(args)
    torch.manual_seed(args.seed)
    family = load_family(args.scene, args.data, args.size)
    ids, rows = choose_scenes(args, family)
    run = start_run(args, family.name)
    rank, world = ranks()
    views = {i: load_views(family, ids[i], args.device)
             for stage in rows for i in rows[stage][rank::world]}
    model = Model(args, family).to(args.device)
    stage1 = copy.deepcopy(model)                              # with which old scenes are rendered
    bank = Bank(run.path / "planes.bin", len(ids), model.P, args.device)
    for number, phase in enumerate(phases(args)):
        scenes = rows[phase.stage]
        steps = num_steps(args, phase, len(scenes))
        if phase.name == "C":
            stage1.load_state_dict(model.state_dict())
        start_planes(phase, model, bank, rows, views)
        optimiser = make_optimiser(args, phase, model)
        trained = [p for group in optimiser.param_groups for p in group["params"]]
        planes_lr = args.lr_rgb if phase.name == "rgb" else args.lr

        def score(count, pictures):
            last = count is None
            if last and phase.name == "0":
                model.autoencoder.measure([views[i] for i in scenes[:16] if i in views])
            bank.to_file([i for i in scenes if i in views])
            planes = None if phase.name == "0" else bank
            scores = evaluate(model, planes, views, scenes, count)
            if last and phase.stage == "new":
                draw(model, bank, views, scenes, pictures)
            prefix = "" if phase.stage == "new" else "old_"
            return {prefix + name: value for name, value in scores.items()}

        parts = {"field": model, "stage1": stage1, "bank": bank, "optimiser": optimiser}
        for step in run.loop(parts, score, steps=steps, stage=phase.name):
            decay = 0.05 ** (step / steps)                     # of all rates, in each phase
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * decay
            # 1. a picture of each scene of the batch, and its rays
            batch = draw_batch(args, phase, number, step, scenes, views, args.device)
            # 2. planes, losses, gradients
            totals, planes = torch.zeros(2, device=args.device), None
            for p in trained:
                p.grad = torch.zeros_like(p)
            if batch is not None:
                private = bank.read(batch.scenes).requires_grad_()             # (n, P)
                if phase.name != "0":
                    planes = model.planes(private)
                loss, opacity = losses(model, batch, planes, phase.weights)
                (batch.share * loss).backward()
                totals = batch.share * torch.stack([loss.detach(), opacity])
            # 3. what scenes share moves, by the gradients of all processes
            sum_over_ranks([totals, *(p.grad for p in trained)])
            optimiser.step()
            # 4. planes of the batch's scenes move; those of others rest
            if planes is not None:
                bank.step(batch.scenes, private.grad, decay * planes_lr)
            run.log(loss=totals[0], opacity=totals[1])
            run.count(rays=phase.rays * min(args.batch, len(scenes)))
    return conclude(args, run, family, model, stage1, bank, views, rows)


def conclude(args: Args, run: TrainingRun, family: Family, model: Model, stage1: Model, bank: Bank,
             views: dict, rows: dict) -> dict:
    """What each phase took and reached, what a scene costs, old scenes through either decoder."""
    more = {"data": family.kind, "processes": ranks()[1]}
    if not model.rgb:
        for name, which in (("old_psnr", stage1), ("old_psnr_new_decoder", model)):
            more[name] = evaluate(which, bank, views, rows["old"][:8])["psnr"]
    if ranks()[0] > 0:
        return more
    (run.path / "planes.bin").unlink()                         # the checkpoint has the rows
    if args.video:
        i, poses = rows["new"][0], orbit_poses(60, 1.3, 25.0).to(args.device)
        K = views[i].K[:1].expand(60, 3, 3)
        film = render_views(model, bank.read([i]), poses, K, args.size)
        save_video(run.path / "render.mp4", list(film["rgb"]))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    before, seconds, ends = {"step": 0, "train_seconds": 0.0}, {"old": 0.0, "new": 0.0}, {}
    for phase in phases(args):
        steps = num_steps(args, phase, len(rows[phase.stage]))
        line = next(line for line in lines if line["step"] == before["step"] + steps)
        took = line["train_seconds"] - before["train_seconds"]
        seconds[phase.stage] += took
        scores = ", ".join(f"{name} {line[name]:.2f}" for name in line if name.endswith("psnr"))
        say(f"phase {phase.name}: {steps} steps of {phase.rays} rays a picture, "
            f"{1000 * took / steps:.1f} ms each: {scores}")
        before, ends[phase.name] = line, line
    each, shared = 4 * model.P, 4 * sum(p.numel() for p in model.parameters())
    if not model.rgb:                                          # there are two decoders
        shared += 4 * sum(p.numel() for p in model.autoencoder.decoder.parameters())
        more["ceiling_psnr"] = ends["C"]["autoencoder_psnr"]
    rgb = bytes_per_scene(1, args.resolution, args.micro + args.macro)
    more |= {"bytes_per_scene": each, "bytes_shared": shared, "seconds_shared": seconds["old"],
             "seconds_per_scene": seconds["new"] / len(rows["new"]),
             "break_even_scenes": break_even(shared, each, rgb)}
    say(f"A new scene: {each / 1e3:.1f} kB and {more['seconds_per_scene']:.2f} s. Shared by all: "
        f"{shared / 1e3:.0f} kB and {seconds['old']:.0f} s of stage 1.")
    if not model.rgb:
        say(f"Break-even with RGB planes: {shared / 1e3:.0f} kB + N {each / 1e3:.1f} kB is less "
            f"than N {rgb / 1e3:.1f} kB for more than N = {more['break_even_scenes']:.0f} scenes.")
    return run.finish(**more)


if __name__ == "__main__":
    cli(PRESETS, train)
