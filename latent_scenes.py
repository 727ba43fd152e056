"""Many scenes in a 3D-aware latent space (3Da-AE: Schnepf et al., CVPR 2024 workshop 3DMV,
arXiv 2403.11678).

Many cars (here 64, paper: 1000) are fitted together. A car's tri-plane is rendered not to 64 x 64
colours but to 16 x 16 latents, which a decoder D turns into the picture: 256 rays, not 4096. (RGB
planes may take 128 random rays a step, so that a latent step is no cheaper. The gain is fewer
pictures of a new car: 90 of 256 rays against 1000 of 128.) Latents of an ordinary encoder E do not
fit: move the camera a little, and the latent of the same door handle changes with its place in
the frame; no tri-plane renders both. So E and D are trained further with planes of some cars (phase
B). A tri-plane is a small private part beside a learned combination of tri-planes all cars share.

    T_i = concat(T_i^mic, sum_k W_ik B_k)                                              fuse
    y = render(T_i, pose),  picture = D(norm^-1(y)),  norm(z) = tanh(s z)   render, normalise
    L_latent = |norm(E(x)) - y|^2,  L_rgb = |D(norm^-1(y)) - x|^2,  L_ae = |D(E(x)) - x|^2
    phase B: L_rgb + lambda_latent L_latent + lambda_ae L_ae + lambda_tv TV(T)       total_loss

| phase | scenes | trains                   | why                                                |
|-------|--------|--------------------------|----------------------------------------------------|
| 0     | old    | E, D                     | an ordinary autoencoder; new cars stay unseen      |
| A     | old    | T^mic, W, B_k, MLP       | planes learn its latents as well as they can       |
| B     | old    | T^mic, W, B_k, MLP, E, D | latents become what planes can render: 3D-aware    |
| C     | new    | T^mic, W                 | new cars from latents alone; a step needs no D     |
| D     | new    | T^mic, W, D              | a second decoder, tuned to what planes now render  |
Old: stage 1; new: stage 2. Code: E, D in Autoencoder, B_k Model.shared, T_i^mic, W_i row i of Bank.

    python latent_scenes.py                         24 unseen cars: 24.6 dB, 200 s of one core
    python latent_scenes.py --representation rgb    the baseline, RGB tri-planes: 26.3 dB (4 cars)
    python latent_scenes.py --autoencoder plain     phase B and its steps left out: 21.0 dB
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
    """plain: no phase B, so shared planes and MLP lose 1600 of 1900 steps and all RGB training too.
    Were it as good, phase B would bring nothing."""
    latent_channels: int = 8
    """Channels of a latent image, C."""
    width: tuple[int, ...] = (32, 48)
    """Channels of the autoencoder after each halving of the side: f = 2^2 pixels a latent pixel."""
    resolution: int = 32
    """Texels a side of a plane, R."""
    micro: int = 4
    """Private features, F_mic (0: shared planes only, 23.1 instead of 24.6 dB, older run)."""
    macro: int = 8
    """Shared features, F_mac (0: private planes only, 23.6 dB). RGB planes have both private."""
    bases: int = 12
    """Shared tri-planes, M."""
    hidden: int = 32
    """Width of the MLP behind the planes."""
    samples: int = 24
    """Samples of a ray, one in each of so many equal intervals."""
    batch: int = 4
    """Scenes a step, a picture of each, over all processes."""
    epochs: tuple[int, int, int, int, int] = (220, 30, 160, 20, 70)
    """Pictures of each of their scenes that phases 0, A, B, C and D see."""
    epochs_rgb: int = 1000
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
    """Weight of the total variation of planes that begin as noise (stage 1, RGB planes)."""
    encode_every: int = 4
    """In phase B one picture of so many goes through E, as it is slow: one a step (paper: all)."""
    shift: bool = True
    """Move training pictures by up to half a latent pixel, rays too (ours; off: 0.3 dB less)."""


PRESETS = {         # paper: its sizes, rates and weights; tv and shift stay ours. It was not run.
    "quick": Args(),
    "paper": Args(preset="paper", size=128, scenes=500, new_scenes=500, eval_every=2000,
                  latent_channels=4, width=(64, 128, 256), resolution=64, micro=10,
                  macro=22, bases=50, hidden=64, samples=96, batch=32,
                  epochs=(2000, 1230, 1230, 1230, 1230), epochs_rgb=20_000, rgb_rays=1024,
                  lr=1e-2, lr_rgb=1e-2, lr_mlp=1e-2, lr_ae=1e-4, lr_finetune=1e-4,
                  lambda_latent=1.0, lambda_ae=0.1, encode_every=1)}


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
    """norm(z) = tanh(s z), in (-1, 1), as planes are rendered through a sigmoid. s = 0.4 / std(z):
    one standard deviation goes to 0.38, three to 0.83, so that few latents are saturated."""
    return torch.tanh(s * z)


def denormalise(y: Tensor, s: Tensor) -> Tensor:
    """norm^-1(y) = atanh(y) / s; y is clipped to [-1 + 1e-4, 1 - 1e-4], no gradient where it is."""
    return torch.atanh(y.clamp(-1 + 1e-4, 1 - 1e-4)) / s


def total_variation(planes: Tensor) -> Tensor:
    """Mean squared difference of neighbouring texels along both sides.  planes (n, 3, R, R, F).
    Released code: a sum, not a mean; its weight 1e-4 cannot be compared with --tv."""
    return planes.diff(dim=2).square().mean() + planes.diff(dim=3).square().mean()


def total_loss(model: Model, batch: Batch, planes: Optional[Tensor], weights: dict) -> tuple:
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
        # Gradient to D and, through norm^-1 and the renderer, to planes, W, B and MLP. Not to E.
        error = F.mse_loss(model.decode(out["y"]), batch.target)
        loss = loss + weights["rgb"] * error
    if "tv" in weights:
        # Gradient to planes, W and B: texels that no ray has seen follow their neighbours. It is
        # for planes that begin as noise (A, B, rgb); those of C begin as a mean of smooth ones.
        loss = loss + weights["tv"] * total_variation(planes)
    return loss, out["opacity"].mean().detach()


@dataclass(frozen=True)
class Phase:
    name: str
    scenes: str             # "old" (of stage 1) or "new" (of stage 2)
    trains: frozenset       # of encoder, decoder, planes, shared, mlp; all else is frozen
    weights: dict           # loss -> weight
    epochs: int             # pictures of each scene
    rays: int               # of a picture: all of a latent image, as D needs it whole


def phases(args: Args) -> list[Phase]:
    """What trains when (why: see the top). `planes`: private planes and W of the phase's scenes.
    Released code: C and D also train the shared planes and a new MLP, so that no old scene renders
    any more (tried here: 0.5 dB less)."""
    joint = {"rgb": 1.0, "latent": args.lambda_latent, "autoencoder": args.lambda_ae, "tv": args.tv}
    table = [
        # name, scenes, what trains                            losses and their weights
        ("0", "old", "encoder decoder",                        {"autoencoder": 1.0}),   # then s, bg
        ("A", "old", "planes shared mlp",                      {"latent": 1.0, "tv": args.tv}),
        ("B", "old", "planes shared mlp encoder decoder",      joint),
        ("C", "new", "planes",                                 {"latent": 1.0}),
        ("D", "new", "planes decoder",                         {"rgb": 1.0}),
    ]
    epochs, rays = args.epochs, [0, *[(args.size // 2 ** len(args.width)) ** 2] * 4]
    if args.representation == "rgb":
        table = [("rgb", "new", "planes mlp", {"rgb": 1.0, "tv": args.tv})]
        epochs, rays = [args.epochs_rgb], [args.rgb_rays]
    listed = [Phase(name, scenes, frozenset(trains.split()), weights, *counts)
              for (name, scenes, trains, weights), *counts in zip(table, epochs, rays)]
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
    Example (the paper's sizes, one decoder; train counts two): (54.1 MB + 334.6 MB) / (1573 kB -
    492 kB) = 360 scenes. Seconds, quick size, first version: 162 / (3.43 - 0.69) = 59 scenes, with
    24.3 dB against 26.6: for the 24 new cars of a quick run RGB planes are better and faster."""
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
    the renderer puts behind planes: the mean of (norm(z) + 1) / 2 along the pictures' border. Both
    stay as E trains on: planes have learned latents of this scale before this background.
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
        x = torch.cat([scene.pictures(slice(scene.num_tests, None)) for scene in scenes])
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
        self.private_shape = (3, R, R, private)                # shape of a scene's own planes
        self.P = math.prod(self.private_shape) + M             # numbers of a scene: these and W
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
        return fuse(p[:, :own].view(len(p), *self.private_shape), p[:, own:], self.shared)

    def field(self, x: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, N, 3) in the world -> sigmas (n N,) = softplus(raw - 1) [1/length], as EG3D: space
        begins thin; rgbs (n N, C) = 1.002 sigmoid(raw) - 0.001, as Mip-NeRF: reaches 0 and 1.
        Features: the sum of planes xy, xz, yz at x, as in EG3D. No view direction: a point has one
        latent from all sides, which is what makes latents 3D-consistent.
        Released code: its third plane is (z, x), so nothing sees y and z together."""
        u = 2 * (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0]) - 1
        h = self.mlp(triplane_interp(u, planes)).flatten(0, 1)                 # (n N, 1 + C)
        return F.softplus(h[:, 0] - 1), torch.sigmoid(h[:, 1:]) * 1.002 - 0.001

    def decode(self, y: Tensor) -> Tensor:
        """Rendered (n, C, h, w) in [-1, 1] -> pictures (n, 3, H, W) = D(norm^-1(y))."""
        if self.rgb:
            return y
        return self.autoencoder.decoder(denormalise(y, self.autoencoder.s))


def render(model: Model, planes: Tensor, rays_o: Tensor, rays_d: Tensor,
           jitter: Optional[Tensor] = None) -> dict:
    """Volume rendering of latents or colours c_j: with delta_j the length of interval j,

        w_j = exp(-sum_{l<j} sigma_l delta_l) (1 - exp(-sigma_j delta_j)),    opacity = sum_j w_j,
        y = 2 (sum_j w_j c_j + (1 - opacity) bg) - 1.

    planes (n, 3, R, R, F), rays (n, h, w, 3) of n pictures -> y (n, C, h, w) in about [-1, 1],
    opacity and depth = sum_j w_j t_j (n, h, w). The part of a ray in the box is cut into equal
    intervals, moved by jitter (n, h, w) - 1/2 of one (None: not), with a sample in the middle of
    each. One ray stands for a latent pixel: E is trained too, towards what such rays can render.
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
    num_tests: int          # the first so many are test views

    def pictures(self, views) -> Tensor:
        """(n, 3, H, W) in [-1, 1]; of one number (3, H, W)."""
        return self.images[views].float() / 127.5 - 1

    def training_view(self, u: float) -> tuple[Tensor, Tensor, Tensor]:
        v = self.num_tests + int(u * (len(self.c2w) - self.num_tests))
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
    fraction: float         # of the pictures of all processes in this step
    encoded: list           # which of the n go through E
    encoded_weight: float   # of their mean error, which stands for that of all n


def draw_batch(args: Args, phase: Phase, number: int, step: int, rows: range, views: dict,
               device: str) -> Optional[Batch]:
    """The pictures of a step; None if all slots of this process rest. All processes draw the random
    numbers of all slots, so that a step does not depend on how many processes there are.

    Why --shift: rays through the centres of latent pixels alone never see what is between them
    (pictures are rolled: their border is background)."""
    rank, world = ranks()
    slots = schedule(len(rows), args.batch, step, args.seed, number)
    used = [j for j in range(args.batch) if slots[j] is not None]
    mine = [j for j in used if j % world == rank]
    rgb, factor = phase.name == "rgb", 2 ** len(args.width)
    side, half = args.size // factor, factor // 2
    view = torch.rand(args.batch).tolist()
    jitter = torch.rand((args.batch, 1, args.rgb_rays) if rgb else (args.batch, side, side))
    pixel = torch.randint(args.size ** 2, jitter.shape)
    shift = torch.randint(-half, half + 1, (args.batch, 2)) * int(args.shift and not rgb)
    if not mine:
        return None
    every = args.encode_every if phase.name == "B" else 1
    encoded = [k for k, j in enumerate(mine) if (j + step) % every == 0]       # slots take turns
    scenes = [rows[slots[j]] for j in mine]
    x, c2w, K = zip(*(views[i].training_view(view[j]) for i, j in zip(scenes, mine)))
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


def schedule(n: int, batch: int, step: int, *seed: int) -> list[Optional[int]]:
    """Which of n scenes stand in the slots of a step (None: a slot rests); each comes once in an
    epoch of length = ceil(n / batch) steps.

    Scene k has slot k mod batch, and slot j belongs to process j mod world, so that a scene's
    numbers never move between processes. Of the scenes of a slot, step t of the epoch takes number
    (a + b t) mod length, with a and b of the epoch, b prime to length: one element of a
    permutation, without drawing the others. Example: length 5, a = 3, b = 2: 3, 0, 2, 4, 1.
    """
    length = math.ceil(n / batch)
    epoch, t = divmod(step, length)
    rng, slots = np.random.default_rng((*seed, epoch)), []
    for slot in range(batch):
        a, b = rng.integers(length, size=2).tolist()
        while math.gcd(b, length) != 1:
            b = (b + 1) % length
        k = (a + b * t) % length * batch + slot
        slots.append(k if k < n else None)
    return slots


# ------------------------------------------------------------------------------ parameter bank

class Bank:
    """Each scene's own numbers and their Adam moments, a row of one memory-mapped file, which all
    processes share: p, m, v (P,) each, and t, the number of its steps.

    A step reads and writes the rows of its batch: its cost does not depend on how many scenes there
    are. The others rest (released code: dense Adam, whose old momentum moves them all). Moments go
    on from A to B and from C to D, as the planes do.
    On a GPU the rows stay on it, and the file is written before a checkpoint is."""
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
    """Join torchrun's other processes, if any; -> this one's device. They wait an hour at most."""
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
    ceiling for copied latents (quick: 28.88 dB; without phase B 29.01), which phase D may pass."""
    def mean(measure, images):
        return float(torch.stack([measure(a, b) for a, b in zip(images, target)]).mean())

    sums = torch.zeros(4, device=model.aabb.device)            # number of scenes, three scores
    for i in [i for i in scenes if i in views]:
        scene, scores = views[i], [1.0, 0.0, 0.0, 0.0]
        tests = slice(min(count or scene.num_tests, scene.num_tests))
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


def save_strips(model: Model, bank: Bank, views: dict, rows: range, folder) -> None:
    """test_000.png, ... of the first six scenes: target | rendered | error | depth, and (latents)
    four channels of what is rendered, 2 x 2."""
    for k in [k for k in range(len(rows[:6])) if rows[k] in views]:
        scene = views[rows[k]]
        v = [k % scene.num_tests]                              # a test view
        target = to_images(scene.pictures(v))[0]
        out = render_views(model, bank.read([rows[k]]), scene.c2w[v], scene.K[v], len(target))
        depth = F.interpolate(out["depth"][None], size=target.shape[:2])[0, 0]
        strip = comparison_strip(target, out["rgb"][0], depth, model.near, model.far)
        if not model.rgb:
            y = out["y"][:, torch.arange(4) % out["y"].shape[1]] / 2 + 0.5
            a, b, c, d = F.interpolate(y, size=len(target) // 2)[0]
            tiles = torch.cat([torch.cat([a, b], 1), torch.cat([c, d], 1)])
            strip = torch.cat([strip, tiles[..., None].expand(-1, -1, 3)], 1)
        save_png(folder / f"test_{k:03d}.png", strip)


# ------------------------------------------------------------------------------------- training

def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("scenes", "new_scenes", "latent_channels", "resolution", "bases",
                                "hidden", "samples", "batch", "epochs_rgb", "rgb_rays", "lr",
                                "lr_rgb", "lr_mlp", "lr_ae", "lr_finetune", "encode_every"),
                not_negative=("micro", "macro", "lambda_latent", "lambda_ae", "tv"))
    require(args.micro + args.macro > 0, "--micro 0 --macro 0: planes need features")
    require(args.width and args.size % 2 ** len(args.width) == 0,
            f"--size {args.size}: is halved once for each number of --width, and must be even")
    require(min(args.width) > 0 and min(args.epochs) > 0, "--width, --epochs: wanted more than 0")
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
        rate = args.lr_ae if phase.scenes == "old" else args.lr_finetune
        parts += [("encoder", model.autoencoder.encoder.parameters(), rate),
                  ("decoder", model.autoencoder.decoder.parameters(), rate)]
    groups = [{"params": [p.requires_grad_() for p in params if name in phase.trains], "rate": rate}
              for name, params, rate in parts]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def start_planes(phase: Phase, model: Model, bank: Bank, rows: dict, views: dict) -> None:
    """Planes of stage 1, and RGB planes, start from noise (0.1; W such that sum_k W_k B_k is as
    large as B_k), new ones from the mean of stage 1's. Released code: all from noise."""
    for i in rows[phase.scenes] if phase.name in ("A", "rgb") else ():
        M = len(model.shared)
        W = torch.randn(M) / max(M, 1) ** 0.5
        bank.fill(i, torch.cat([0.1 * torch.randn(model.P - M), W]))
    if phase.name == "C":
        mean = bank.read([i for i in rows["old"] if i in views]).sum(0) / len(rows["old"])
        sum_over_ranks([mean])
        for i in rows["new"]:
            bank.fill(i, mean)


def num_steps(args: Args, phase: Phase, scenes: int) -> int:
    return min(args.steps, phase.epochs * math.ceil(scenes / args.batch))


def train(args: Args) -> dict:
    """All phases; write the run folder; -> what summary.json holds. On resume, run.loop
    returns at once for finished phases; the checkpoint overwrites what start_planes wrote."""
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
        scenes = rows[phase.scenes]
        steps = num_steps(args, phase, len(scenes))
        if phase.name == "C":
            stage1.load_state_dict(model.state_dict())
        start_planes(phase, model, bank, rows, views)
        optimiser = make_optimiser(args, phase, model)
        trained = [p for group in optimiser.param_groups for p in group["params"]]
        planes_lr = args.lr_rgb if phase.name == "rgb" else args.lr

        def score(count, pictures):
            last = count is None
            if last and phase.name == "0":                     # before the checkpoint
                model.autoencoder.measure([views[i] for i in scenes[:16] if i in views])
            bank.to_file([i for i in scenes if i in views])
            planes = None if phase.name == "0" else bank
            scores = evaluate(model, planes, views, scenes, count)
            if last and phase.scenes == "new":
                save_strips(model, bank, views, scenes, pictures)
            prefix = "" if phase.scenes == "new" else "old_"
            return {prefix + name: value for name, value in scores.items()}

        parts = {"field": model, "stage1": stage1, "bank": bank, "optimiser": optimiser}
        for step in run.loop(parts, score, steps=steps, stage=phase.name):
            decay = 0.05 ** (step / steps)                     # of all rates, anew for each loss
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
                loss, opacity = total_loss(model, batch, planes, phase.weights)
                (batch.fraction * loss).backward()
                totals = batch.fraction * torch.stack([loss.detach(), opacity])
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
    final = {"data": family.kind, "processes": ranks()[1]}
    if not model.rgb:
        for name, net in (("old_psnr", stage1), ("old_psnr_new_decoder", model)):
            final[name] = evaluate(net, bank, views, rows["old"][:8])["psnr"]
    if ranks()[0] > 0:
        return final
    (run.path / "planes.bin").unlink()                         # the checkpoint has the rows
    if args.video:
        i, poses = rows["new"][0], orbit_poses(60, 1.3, 25.0).to(args.device)
        K = views[i].K[:1].expand(60, 3, 3)
        film = render_views(model, bank.read([i]), poses, K, args.size)
        save_video(run.path / "render.mp4", list(film["rgb"]))
    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    before, seconds, ends = {"step": 0, "train_seconds": 0.0}, {"old": 0.0, "new": 0.0}, {}
    for phase in phases(args):
        steps = num_steps(args, phase, len(rows[phase.scenes]))
        line = next(line for line in lines if line["step"] == before["step"] + steps)
        took = line["train_seconds"] - before["train_seconds"]
        seconds[phase.scenes] += took
        scores = ", ".join(f"{name} {line[name]:.2f}" for name in line if name.endswith("psnr"))
        say(f"phase {phase.name}: {steps} steps of {phase.rays} rays a picture, "
            f"{1000 * took / steps:.1f} ms each: {scores}")
        before, ends[phase.name] = line, line
    each, shared = 4 * model.P, 4 * sum(p.numel() for p in model.parameters())
    if not model.rgb:                                          # there are two decoders
        shared += 4 * sum(p.numel() for p in model.autoencoder.decoder.parameters())
        final["ceiling_psnr"] = ends["C"]["autoencoder_psnr"]
    rgb = bytes_per_scene(1, args.resolution, args.micro + args.macro)
    final |= {"bytes_per_scene": each, "bytes_shared": shared, "seconds_shared": seconds["old"],
              "seconds_per_scene": seconds["new"] / len(rows["new"]),
              "break_even_scenes": break_even(shared, each, rgb)}
    say(f"A new scene: {each / 1e3:.1f} kB and {final['seconds_per_scene']:.2f} s. Shared by all: "
        f"{shared / 1e3:.0f} kB and {seconds['old']:.0f} s of stage 1.")
    if not model.rgb:
        say(f"Break-even with RGB planes: {shared / 1e3:.0f} kB + N {each / 1e3:.1f} kB is less "
            f"than N {rgb / 1e3:.1f} kB for more than N = {final['break_even_scenes']:.0f} scenes.")
    return run.finish(**final)


if __name__ == "__main__":
    cli(PRESETS, train)
