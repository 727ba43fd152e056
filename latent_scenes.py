"""Many scenes in a 3D-aware latent space (3Da-AE: Schnepf et al., CVPRW 2024, arXiv 2403.11678).

Many cars are fitted together. A car's tri-plane is rendered to 16 x 16 latents, and a decoder D
turns these into a picture of 64 x 64: a whole picture takes 256 rays, not 4096. The tri-plane is a
small part of the car's own (micro) beside a learned mixture of tri-planes that all share (macro).

The idea: a tri-plane gives a point one value, seen from everywhere. An encoder E does not: it
encodes patches of a picture, so the same door handle gets another latent in the next view. Planes
fitted to such latents learn their mean over the views, which lacks the detail on which views
disagree: D makes a blurred picture. The cure: train E, D and the planes of some cars together, so
that E is drawn to what a tri-plane can hold.

    T_i = concat(T_i^mic, sum_k W_ik B_k)                                              fuse
    y = render(T_i, pose),  picture = D(norm^-1(y)),  norm(z) = tanh(s z)   render, normalise
    L_latent = |norm(E(x)) - y|^2,  L_rgb = |D(norm^-1(y)) - x|^2,  L_ae = |D(E(x)) - x|^2
    joint: L_rgb + lambda_latent L_latent + lambda_ae L_ae + lambda_tv TV(T_i)       total_loss

    phase     cars  trains, PSNR [dB]:  D(E(x))  rendered  without joint
    pretrain  old   E, D                  29.1                       an ordinary autoencoder
    fit       old   T^mic, W, B_k, MLP    29.1     18.1              planes copy its latents
    joint     old   these and E, D        28.0     24.7              E learns what planes can hold
    new       new   T^mic, W              27.9     21.5      19.6    y is near norm(E(x)), not equal
    finetune  new   T^mic, W, D           27.3     24.6      23.0    D learns what planes render
    new cars, at the end:                                      PSNR  each car         once
    python latent_scenes.py                                    24.6  49 kB, 1.0 s     3.2 MB, 203 s
    --autoencoder plain --epochs 220 190 160 20 70             23.0  49 kB, 0.9 s     without joint
    --representation rgb (RGB planes)                          28.8  147 kB, 3.9 s
    --scenes 100 --new-scenes 900 --epochs 480 40 600 20 120   28.4  49 kB, 1.6 s     3.2 MB, 1144 s
    RGB planes, 8 of these cars, --epochs-rgb 1000 (4000)      28.4  147 kB, 3.8 s    (30.4, 16 s)
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
    size: int = 64                  # image side [pixels]
    steps: int = 1_000_000
    """At most so many steps of each phase, for a quick look; --epochs decide on them."""
    scenes: int = 40                # old scenes, of pretrain, fit and joint
    new_scenes: int = 24            # new scenes, of new and finetune: the next ones
    representation: Literal["rgb", "latent"] = "latent"
    """What planes are rendered to: latents, or colours (the baseline, on the new scenes only)."""
    autoencoder: Literal["plain", "3d"] = "3d"
    """3d: 3D-aware, by phase joint. plain: without it (give its epochs to fit, as at the top)."""
    latent_channels: int = 8        # channels of a latent image, C
    width: tuple[int, ...] = (32, 48)
    """Channels of the autoencoder after each downsampling by 2. Two: 4 x 4 pixels per latent."""
    resolution: int = 32            # texels along a side of a plane, R
    micro: int = 4                  # micro features, F_mic (0: 1.5 dB less)
    macro: int = 8                  # macro features, F_mac (0: 1.0 dB less). RGB planes: all micro
    bases: int = 12                 # shared tri-planes B_k, M of them
    hidden: int = 32                # width of the MLP behind the planes
    samples: int = 24               # samples per ray, one in each of so many intervals
    batch: int = 4                  # scenes per step, one picture of each, over all processes
    epochs: tuple[int, int, int, int, int] = (220, 30, 160, 20, 70)
    """Pictures of each scene in pretrain, fit, joint (plain: none), new, finetune."""
    epochs_rgb: int = 1000          # pictures of each scene for RGB planes: --rgb-rays rays of each
    rgb_rays: int = 128             # random rays of a picture in a step of RGB planes
    lr: float = 6e-2                # Adam's learning rate of micro planes, W and shared planes
    lr_rgb: float = 1e-1            # Adam's learning rate of RGB planes (found by search)
    lr_mlp: float = 5e-3            # Adam's learning rate of the MLP
    lr_ae: float = 2e-3             # Adam's learning rate of E and D in pretrain and joint
    lr_finetune: float = 5e-4       # Adam's learning rate of D in finetune
    lambda_latent: float = 0.1      # weight of L_latent in joint, where L_rgb has 1
    lambda_ae: float = 0.3          # weight of L_ae in joint: D(E(x)) stays a good autoencoder
    tv: float = 1e-3                # weight of TV (fit, joint, RGB planes)
    encode_every: int = 4           # in joint, 1 picture of so many goes through E, to save time
    shift: bool = True
    """Move training pictures and rays by up to half a latent (ours; off: 0.3 dB less)."""


# paper: the paper's sizes, epochs, rates and weights of losses. The autoencoder, pretrain, shift,
# the weight of TV, Adam's betas and what is frozen for new scenes stay ours. Not run.
PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", size=128, scenes=500, new_scenes=500, eval_every=2000,
                  latent_channels=4, width=(64, 128, 256), resolution=64, micro=10,
                  macro=22, bases=50, hidden=64, samples=96, batch=32,
                  epochs=(2000, 1230, 1230, 1230, 1230), epochs_rgb=20_000, rgb_rays=1024,
                  lr=1e-2, lr_rgb=1e-2, lr_mlp=1e-2, lr_ae=1e-4, lr_finetune=1e-4,
                  lambda_latent=1.0, lambda_ae=0.1, encode_every=1)}


# ------------------------------------------------------- planes, latents, losses: the method

def fuse(micro: Tensor, W: Tensor, shared: Tensor) -> Tensor:
    """T_i = concat(T_i^mic, sum_k W_ik B_k): the micro and the macro part of each tri-plane.

    micro (n, 3, R, R, F_mic), W (n, M), shared B (M, 3, R, R, F_mac) -> (n, 3, R, R, F).
    Why: what cars have in common is stored once, in B; W is M numbers per scene. What a car has
    alone goes into its F_mic micro features. Quick: 4 bytes * 3 * 32^2 * 4 = 49 kB per car, and
    48 bytes of W; RGB planes with 12 micro features take 147 kB.
    """
    macro = torch.einsum("nk,k...->n...", W, shared)
    return torch.cat([micro, macro], -1)


def normalise(z: Tensor, s: Tensor) -> Tensor:
    """norm(z) = tanh(s z), in (-1, 1), as planes are rendered through a sigmoid. s = 0.4 / std(z):
    a latent of one standard deviation goes to 0.38, of three to 0.83: few are saturated. One s for
    all channels, as in the paper (there 0.02, which suits the latents of Stable Diffusion)."""
    return torch.tanh(s * z)


def denormalise(y: Tensor, s: Tensor) -> Tensor:
    """norm^-1(y) = atanh(y) / s; y is clipped to +-(1 - 1e-4), as atanh(1) is infinite."""
    return torch.atanh(y.clamp(-1 + 1e-4, 1 - 1e-4)) / s


def total_variation(planes: Tensor) -> Tensor:
    """TV: mean squared difference of neighbouring texels along one axis, plus that along the other.
    planes (n, 3, R, R, F)."""
    return planes.diff(dim=2).square().mean() + planes.diff(dim=3).square().mean()


def total_loss(model: Model, batch: Batch, planes: Optional[Tensor], weights: dict) -> tuple:
    """-> the loss of a step, a weighted sum, and the mean opacity of its rays (0-d each).

    planes (n, 3, R, R, F) of the batch's scenes, None in pretrain. weights: loss -> its weight.
    |.|^2 are means over pictures, pixels and channels, of quantities in about [-1, 1]. What a phase
    freezes receives no gradient.
    """
    loss, opacity = batch.x.new_zeros(()), batch.x.new_ones(())
    encoded = batch.encoded if "autoencoder" in weights or "latent" in weights else []
    if encoded:
        z = model.autoencoder.encoder(batch.x[encoded])                        # (e, C, h, w)
    if encoded and "autoencoder" in weights:
        # Gradient to E and D. It keeps what a picture needs in the latents: for L_latent alone the
        # best E is a constant. Here it is a safeguard only: with --lambda-ae 0, D(E(x)) falls from
        # 27.9 to 25.7 dB, but new cars have the same PSNR, as L_rgb keeps planes useful.
        error = F.mse_loss(model.autoencoder.decoder(z), batch.x[encoded])
        loss = loss + weights["autoencoder"] * batch.encoded_weight * error
    if planes is None:
        return loss, opacity
    out = render(model, planes, batch.rays_o, batch.rays_d, batch.jitter)
    if encoded and "latent" in weights:
        # Gradient to T^mic, W, B and MLP: y moves towards norm(E(x)). In joint also to E: then
        # norm(E(x)) moves towards y, and as the y of a tri-plane is 3D-consistent, E becomes so:
        # the idea of the paper. With z.detach() (seed 0) latent_psnr is 25.3 instead of 30.3 dB,
        # new cars have 20.9 instead of 21.5 before finetune, but 24.5 after it, as with it (24.6).
        error = F.mse_loss(out["y"][encoded], normalise(z, model.autoencoder.s))
        loss = loss + weights["latent"] * batch.encoded_weight * error
    if "rgb" in weights:
        # Gradient to D and, through norm^-1 and the renderer, to T^mic, W, B and MLP. Not to E.
        error = F.mse_loss(model.decode(out["y"]), batch.target)
        loss = loss + weights["rgb"] * error
    if "tv" in weights:
        # Gradient to T^mic, W and B: texels that no ray has seen follow their neighbours. Planes
        # of fit start as noise; those of phase new start as a mean of smooth ones, without TV.
        loss = loss + weights["tv"] * total_variation(planes)
    return loss, out["opacity"].mean().detach()


@dataclass(frozen=True)
class Phase:
    name: str
    cars: str               # "old" or "new" ones
    trains: set             # of encoder, decoder, planes, shared, mlp. The rest is frozen
    weights: dict           # loss -> weight
    steps: int
    rays: int               # per picture: all of a latent image, or --rgb-rays


def phases(args: Args) -> list[Phase]:
    """What trains when (why: see the top). Here `planes` are T^mic and W of the phase's scenes. The
    paper takes a pretrained autoencoder in place of pretrain; fit and joint are its first stage,
    new and finetune its second. fit comes before joint, so that E does not follow planes of noise.

    finetune has no latent loss: the decoder should suit what planes render, which is not quite E(x)
    now. new comes before it, so that D does not learn from planes that are far from their car.
    We freeze shared planes and MLP for new cars, so that old cars still render. Released code: both
    phases train them too, the MLP from scratch (here 0.5 dB less on new cars, an earlier version).

    Cost: a step of RGB planes takes 128 random rays of each picture, a step of ours all 256 rays of
    the latent image, which D needs as a whole. So a step costs more (one thread: 16 ms, but 40 in
    new and 45 in finetune). What is saved is the number of steps: 20 + 70 pictures per car
    instead of 1000, as new cars start with trained B and MLP, from the mean of the old cars.
    """
    joint = {"rgb": 1.0, "latent": args.lambda_latent, "autoencoder": args.lambda_ae, "tv": args.tv}
    table = [
        # name, cars, what trains                                losses and their weights
        ("pretrain", "old", "encoder decoder",                   {"autoencoder": 1.0}),
        ("fit",      "old", "planes shared mlp",                 {"latent": 1.0, "tv": args.tv}),
        ("joint",    "old", "planes shared mlp encoder decoder", joint),
        ("new",      "new", "planes",                            {"latent": 1.0}),
        ("finetune", "new", "planes decoder",                    {"rgb": 1.0}),
    ]
    epochs, rays = args.epochs, [0, *[(args.size // 2 ** len(args.width)) ** 2] * 4]
    if args.representation == "rgb":
        table = [("rgb", "new", "planes mlp", {"rgb": 1.0, "tv": args.tv})]
        epochs, rays = [args.epochs_rgb], [args.rgb_rays]
    listed = []
    for k, (name, cars, trains, weights) in enumerate(table):
        scenes = args.scenes if cars == "old" else args.new_scenes
        steps = min(args.steps, epochs[k] * math.ceil(scenes / args.batch))
        if name != "joint" or args.autoencoder == "3d":
            listed.append(Phase(name, cars, set(trains.split()), weights, steps, rays[k]))
    return listed


def break_even(shared: float, each: float, rgb: float) -> float:
    """The N above which N scenes take fewer bytes than RGB planes: shared + N each = N rgb.

    Example, the paper's sizes in float32: micro planes and W of a scene take each = 4 (3 * 64^2 *
    10 + 50) bytes = 492 kB; shared planes and autoencoder shared = 4 (50 * 3 * 64^2 * 22 + 83.65 M)
    = 389 MB; RGB planes rgb = 4 * 3 * 64^2 * 32 = 1573 kB. So N = 360. Of 1000 scenes each takes
    each + shared / 1000 = 880 kB, 44 % less than RGB planes. The quick run, with the
    numbers at the top, which count both decoders (of old and of new cars): N = 32; with seconds in
    place of bytes 203 / (3.9 - 1.0) = 70.
    """
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
    """E: (n, 3, H, W) in [-1, 1] -> z (n, C, H/f, W/f); D back. A downsampling moves 2 x 2
    pixels into channels. Released code: Stable Diffusion's, 84 M weights trained on other pictures,
    with noise on its latents. Here 0.3 M weights, trained from nothing, no noise."""
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
    def set_latent_stats(self, scenes: list[SceneViews]) -> None:
        """Set s (see normalise), and bg (C,), which the renderer puts behind planes: the mean of
        (norm(z) + 1) / 2 along the border of the training views of these scenes, the latent of
        the background, which planes then need not hold. Both are set once, as a change would undo
        what planes have learned. (So E could raise latent_psnr in joint by a smaller z, too.)"""
        x = torch.cat([scene.pictures(slice(scene.num_tests, None)) for scene in scenes])
        z = self.encoder(x).double()
        sums = torch.stack([z.new_tensor(z.numel()), z.sum(), z.square().sum()])
        sum_over_ranks([sums])                                 # sums over all pictures
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
        R, micro, macro, channels = args.resolution, args.micro, args.macro, args.latent_channels
        self.factor, self.samples = 2 ** len(args.width), args.samples
        self.rgb = args.representation == "rgb"
        if self.rgb:
            micro, macro, channels, self.factor = args.micro + args.macro, 0, 3, 1
        M = args.bases if macro else 0
        self.micro_shape = (3, R, R, micro)
        self.P = math.prod(self.micro_shape) + M               # numbers of a scene: T^mic and W
        self.near, self.far = family.near, family.far
        self.shared = nn.Parameter(0.1 * torch.randn(M, 3, R, R, macro))
        self.mlp = nn.Sequential(nn.Linear(micro + macro, args.hidden), nn.Softplus(),
                                 nn.Linear(args.hidden, 1 + channels))
        self.autoencoder = None
        if not self.rgb:
            self.autoencoder = Autoencoder(channels, args.width)
        # latents need room: E sees patches, so those beside a car are not yet background
        self.register_buffer("aabb", (family.tight if self.rgb else family.aabb).clone())
        self.register_buffer("background", family.bg.clone())  # of RGB planes

    def planes(self, params: Tensor) -> Tensor:
        """Parameters of scenes (n, P), T^mic and then W -> tri-planes (n, 3, R, R, F)."""
        end = self.P - len(self.shared)                        # of T^mic
        micro = params[:, :end].view(len(params), *self.micro_shape)
        return fuse(micro, params[:, end:], self.shared)

    def field(self, x: Tensor, planes: Tensor) -> tuple[Tensor, Tensor]:
        """x (n, N, 3) in the world -> sigmas (n N,) = softplus(raw - 1) [1/length], as EG3D: space
        starts thin; features (n N, C) = 1.002 sigmoid(raw) - 0.001, as Mip-NeRF: reaches 0 and 1.
        raw = MLP(sum of the bilinear samples of planes xy, xz, yz at x), as in EG3D. No view
        direction: a point has one latent from all sides, so rendered latents are 3D-consistent."""
        u = 2 * (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0]) - 1
        raw = self.mlp(triplane_interp(u, planes)).flatten(0, 1)               # (n N, 1 + C)
        return F.softplus(raw[:, 0] - 1), torch.sigmoid(raw[:, 1:]) * 1.002 - 0.001

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
    opacity and depth = sum_j w_j t_j (n, h, w). The part of a ray in the box is divided into
    equal bins with a sample in the middle of each. In training all bin edges but the two ends move
    by jitter (n, h, w) - 1/2 of a bin, one number per ray. A latent covers 4 x 4 pixels but gets
    one ray, through its centre. In joint E adapts to such renderings.
    """
    n, shape = len(planes), rays_o.shape[:-1]
    o, d = rays_o.reshape(-1, 3), rays_d.reshape(-1, 3)                        # (r, 3)
    jitter = None if jitter is None else jitter.reshape(-1)
    box = ray_box(o, d, model.aabb, model.near, model.far)                     # (r, 2)
    uniform = torch.ones_like(box[:, :1])                                      # density of samples
    edges = resample(box, uniform, model.samples, jitter)                      # (r, S + 1)
    t = 0.5 * (edges[:, 1:] + edges[:, :-1])                                   # (r, S)
    x = o[:, None] + t[..., None] * d[:, None]
    sigmas, features = model.field(x.view(n, -1, 3), planes)
    offsets = torch.arange(len(o) + 1, device=o.device) * model.samples
    starts, ends = edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1)
    c, opacity, depth, _ = composite(sigmas, features, starts, ends, offsets)  # _: all w_j
    bg = model.background if model.rgb else model.autoencoder.bg
    y = 2 * (c + (1 - opacity[:, None]) * bg) - 1                              # (r, C)
    return {"y": y.view(*shape, -1).permute(0, 3, 1, 2), "opacity": opacity.view(shape),
            "depth": depth.view(shape)}


# --------------------------------------------------------- pictures, rays, the batch of a step

@dataclass
class SceneViews:
    """The pictures of a scene (a car: about 25 for training, 10 for tests), in 8 bits."""
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
    """This process's part of a step: n pictures, each of another scene."""
    rows: list              # (n,) numbers of the scenes
    x: Tensor               # (n, 3, H, W) in [-1, 1], shifted
    target: Tensor          # of the RGB loss: x; of RGB planes, the colours (n, 3, 1, k) of rays
    rays_o: Tensor          # (n, h, w, 3); of RGB planes (n, 1, k, 3)
    rays_d: Tensor
    jitter: Tensor          # (n, h, w) in [0, 1)
    share: float            # n over the number of pictures of all processes
    encoded: list           # which of the n go through E
    encoded_weight: float   # makes their mean error an unbiased estimate of that of all pictures


def draw_batch(args: Args, phase: Phase, index: int, step: int, rows: range, views: dict,
               device: str) -> Optional[Batch]:
    """The pictures of a step; None if this process has none. All processes draw the random numbers
    of all pictures, so that a step does not depend on how many processes there are.

    Why --shift: rays through the centres of latents alone never see what is between them. A shift
    moves them over the 4 x 4 pixels; the picture is rolled by as much (its border is background).
    """
    slots = schedule(rows, args.batch, step, args.seed, index)
    mine = [j for j in range(args.batch) if slots[j] in views]
    rgb, factor = phase.name == "rgb", 2 ** len(args.width)
    side, half = args.size // factor, factor // 2
    u = torch.rand(args.batch).tolist()
    jitter = torch.rand((args.batch, 1, args.rgb_rays) if rgb else (args.batch, side, side))
    pixel = torch.randint(args.size ** 2, jitter.shape)
    shift = torch.randint(-half, half + 1, (args.batch, 2)) * int(args.shift and not rgb)
    if not mine:
        return None
    every = args.encode_every if phase.name == "joint" else 1
    encoded = [k for k, j in enumerate(mine) if (j + step) % every == 0]       # 1 of 4, by turns
    scenes = [slots[j] for j in mine]
    x, c2w, K = zip(*(views[i].training_view(u[j]) for i, j in zip(scenes, mine)))
    x = target = torch.stack([image.roll(shift[j].tolist(), (2, 1)) for image, j in zip(x, mine)])
    if rgb:
        pixel = pixel[mine].to(device)                                         # (n, 1, k)
        xy = torch.stack([pixel % args.size, pixel // args.size], -1) + 0.5
        target = x.flatten(2).gather(2, pixel.expand(-1, 3, -1))[:, :, None]
    else:
        xy = (pixel_grid(side, side, device) * factor).view(side, side, 2)
        xy = xy - shift[mine, None, None].to(device)                           # (n, h, w, 2)
    rays_o, rays_d = rays_through(xy, torch.stack(c2w), torch.stack(K))
    share = len(mine) / (args.batch - slots.count(None))
    return Batch(scenes, x, target, rays_o, rays_d, jitter[mine].to(device), share, encoded,
                 len(encoded) * every / len(mine))


def schedule(rows: range, batch: int, step: int, *seed: int) -> list[Optional[int]]:
    """Of n scenes, those of the pictures of a step, in `batch` slots (None: no picture).

    Slot j of a step takes one of the scenes j, j + batch, j + 2 batch, ... As the number of
    processes divides batch, these belong to one process. An epoch has length = ceil(n / batch)
    steps and each scene once: a slot takes its scenes in the order start, start + stride, start + 2
    stride, ... modulo length, both drawn anew. Example: length 5, start 3, stride 2: 3, 0, 2, 4, 1.
    """
    length = math.ceil(len(rows) / batch)
    epoch, t = divmod(step, length)
    rng, slots = np.random.default_rng((*seed, epoch)), []
    for slot in range(batch):
        start, stride = rng.integers(length, size=2).tolist()
        while math.gcd(stride, length) != 1:                   # or some scenes would come twice
            stride = (stride + 1) % length
        k = (start + stride * t) % length * batch + slot
        slots.append(rows[k] if k < len(rows) else None)
    return slots


# ------------------------------------------------------------------------------ parameter bank

class Bank:
    """The parameters of each scene, T^mic and W, and their Adam moments, a row of one memory-mapped
    file, which all processes share: p, m, v (P,) each, and t, the number of its steps.

    A step reads and writes the rows of its batch: its cost does not depend on how many scenes there
    are, and the others do not change (released code: dense Adam, whose momentum moves them all)."""
    def __init__(self, path, count: int, P: int, device: str):
        self.P, width = P, 3 * P + 1
        self.file = torch.from_file(str(path), shared=True, size=count * width).view(count, width)
        self.table = self.file.to(device)                      # a copy on a GPU, else the file

    def fill(self, row: int, p: Tensor) -> None:
        self.table[row] = F.pad(p, (0, 2 * self.P + 1))

    def read(self, rows: list[int]) -> Tensor:
        return self.table[rows, :self.P]                       # (n, P), a copy

    def step(self, rows: list[int], grad: Tensor, lr: float) -> None:
        """Adam on these rows alone (betas 0.9, 0.99).  grad (n, P)."""
        p, m, v, t = self.table[rows].split([self.P, self.P, self.P, 1], 1)
        t, m, v = t + 1, 0.9 * m + 0.1 * grad, 0.99 * v + 0.01 * grad ** 2
        p = p - lr * (m / (1 - 0.9 ** t)) / ((v / (1 - 0.99 ** t)).sqrt() + 1e-8)
        self.table[rows] = torch.cat([p, m, v, t], 1)

    def to_file(self, rows: list[int]) -> None:
        """Before a checkpoint, which holds the file."""
        if self.table.device.type != "cpu":
            self.file[rows] = self.table[rows].cpu()

    def state_dict(self) -> dict:
        return {"rows": self.file}

    def load_state_dict(self, state: dict) -> None:
        self.file.copy_(state["rows"])
        self.table.copy_(self.file)


# ------------------------------------------------------------------------------ many processes
# torchrun --nproc-per-node=2 latent_scenes.py: scene k of a phase belongs to process k mod 2.
# Process 0 writes checkpoints, between steps. The others wait for it in their next sum over
# processes and change rows only after that. So no row changes while a checkpoint is written.

def ranks() -> tuple[int, int]:
    """(rank, world): number of this process, and how many there are; (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def start_ranks(device: str) -> str:
    """Join torchrun's other processes, if any; -> this one's device. They wait an hour at most."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
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
    """Each tensor becomes its sum over all processes, in place."""
    if dist.is_initialized():
        flat = torch.cat([value.reshape(-1) for value in values])
        dist.all_reduce(flat)
        for value, part in zip(values, flat.split([value.numel() for value in values])):
            value.copy_(part.view_as(value))


def start_run(args: Args, family: Family) -> TrainingRun:
    """The first process makes the folder; the others then open it in turn, and save nothing."""
    (rank, world), folder = ranks(), [args.out]
    for turn in range(world):
        if turn == rank:
            flags = replace(args, out=folder[0], resume=args.resume or rank > 0)
            run = TrainingRun("latent_scenes", family, flags)
            folder = [str(run.path)]
        if world > 1:
            dist.broadcast_object_list(folder, turn)           # text, no tensors
    if rank > 0:
        run._save = lambda *rest: None
    return run


# --------------------------------------------------------------------------------- evaluation

def to_images(x: Tensor) -> Tensor:
    """(n, C, H, W) in about [-1, 1] -> (n, H, W, C) in [0, 1]."""
    return (x.clamp(-1, 1).permute(0, 2, 3, 1) + 1) / 2


@torch.no_grad()
def render_views(model: Model, params: Tensor, c2w: Tensor, K: Tensor, size: int) -> dict:
    """A scene, params (1, P), from cameras (n, 3, 4): y (n, C, h, w), rgb (n, H, W, 3) in [0, 1]
    and depth (n, h, w)."""
    planes, side = model.planes(params), size // model.factor
    xy = (pixel_grid(side, side, params.device) * model.factor).view(1, side, side, 2)
    parts = [render(model, planes, *rays_through(xy, c2w[k:k + 1], K[k:k + 1]))
             for k in range(len(c2w))]
    y, depth = (torch.cat([part[name] for part in parts]) for name in ("y", "depth"))
    return {"y": y, "rgb": to_images(model.decode(y)), "depth": depth}


@torch.no_grad()
def evaluate(model: Model, bank: Optional[Bank], views: dict, rows: range, count=None) -> dict:
    """Mean over scenes of the mean over their first `count` test views:

    psnr [dB], ssim     of rendered pictures (bank None, in pretrain: not computed)
    autoencoder_psnr    of D(E(x)): the ceiling for planes that copy latents; finetune may pass it
    latent_psnr         of y against norm(E(x)), in unseen views: higher where E is more
                        3D-consistent, but also where E makes z smaller: read it beside psnr
    """
    def mean(score, images, targets):
        return float(torch.stack([score(a, b) for a, b in zip(images, targets)]).mean())

    sums = torch.zeros(5, device=model.aabb.device)            # number of scenes, four scores
    for i in [i for i in rows if i in views]:
        scene, scores = views[i], [1.0, 0.0, 0.0, 0.0, 0.0]
        tests = slice(min(count or scene.num_tests, scene.num_tests))
        x = scene.pictures(tests)
        target = to_images(x)
        if bank is not None:
            out = render_views(model, bank.read([i]), scene.c2w[tests], scene.K[tests], x.shape[-1])
            scores[1:3] = mean(psnr, out["rgb"], target), mean(ssim, out["rgb"], target)
        if not model.rgb:
            z = model.autoencoder.encoder(x)
            scores[3] = mean(psnr, to_images(model.autoencoder.decoder(z)), target)
            if bank is not None:
                z = normalise(z, model.autoencoder.s)
                scores[4] = mean(psnr, to_images(out["y"]), to_images(z))
        sums += torch.tensor(scores, device=sums.device)
    sum_over_ranks([sums])
    names = ("psnr", "ssim", "autoencoder_psnr", "latent_psnr")                # 0: not computed
    return {name: float(v / sums[0]) for name, v in zip(names, sums[1:]) if v != 0}


def save_strips(model: Model, bank: Bank, views: dict, rows: range, folder) -> None:
    """test_000.png, ... of the first six scenes: target | rendered | error | depth, and (latents)
    three channels as colours: y | norm(E(x))."""
    for k, i in enumerate(rows[:6]):
        if i not in views:
            continue                                           # another process has it
        scene, v = views[i], [k % views[i].num_tests]          # a test view
        x, size = scene.pictures(v), scene.images.shape[2:]
        out = render_views(model, bank.read([i]), scene.c2w[v], scene.K[v], size[0])
        depth = F.interpolate(out["depth"][None], size=size)[0, 0]
        strip = comparison_strip(to_images(x)[0], out["rgb"][0], depth, model.near, model.far)
        if not model.rgb:
            z = normalise(model.autoencoder.encoder(x), model.autoencoder.s)
            latents = F.interpolate(torch.cat([out["y"], z]), size=size)       # (2, C, H, W)
            channels = [c % latents.shape[1] for c in range(3)]
            strip = torch.cat([strip, *to_images(latents[:, channels])], 1)
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
            f"--size {args.size}: must be divisible by 2 for each number of --width")
    require(min(args.width) > 0 and min(args.epochs) > 0, "--width, --epochs: wanted more than 0")
    world = ranks()[1]
    require(args.batch % world == 0 and min(args.scenes, args.new_scenes) >= world,
            f"--batch {args.batch}: wanted a multiple of the {world} processes, and as many scenes")


def choose_scenes(args: Args, family: Family) -> tuple[Family, dict[str, range]]:
    """-> the scenes that are used; old and new ones of them. Scene i has row i of the bank."""
    end = args.scenes + args.new_scenes
    require(end <= len(family.scenes), f"{family.name}: has {len(family.scenes)} scenes, --scenes "
            f"{args.scenes} --new-scenes {args.new_scenes} ask for {end}: lower them")
    first = args.scenes if args.representation == "rgb" else 0
    family, old = replace(family, scenes=family.scenes[first:end]), args.scenes - first
    for i in range(end - first) if family.kind != "builtin" else ():
        family.read(i)                                         # a broken one ends the run here
    return family, {"old": range(old), "new": range(old, end - first)}


def make_optimiser(args: Args, phase: Phase, model: Model) -> torch.optim.Adam:
    """Adam on what the phase trains of the model; all else is frozen. Planes have Bank.step, so in
    phase new this one has nothing to do. The betas, and those of Bank.step, are ours."""
    model.requires_grad_(False)
    parts = [("shared", [model.shared], args.lr), ("mlp", model.mlp.parameters(), args.lr_mlp)]
    if not model.rgb:
        rate = args.lr_ae if phase.cars == "old" else args.lr_finetune
        parts += [("encoder", model.autoencoder.encoder.parameters(), rate),
                  ("decoder", model.autoencoder.decoder.parameters(), rate)]
    groups = [{"params": [p.requires_grad_() for p in params if name in phase.trains], "rate": rate}
              for name, params, rate in parts]
    return torch.optim.Adam(groups, betas=(0.9, 0.99))


def start_phase(phase: Phase, model: Model, bank: Bank, rows: dict, views: dict) -> None:
    """Before fit: set s and bg from 16 scenes, enough for such means. T^mic starts as noise of 0.1,
    so that space starts nearly uniform, W from N(0, 1/M), so that sum_k W_k B_k is as large as B_k.
    RGB planes start as noise, too. Before new: T^mic and W of new cars become the mean of those of
    old cars (released code: noise; here 0.3 dB less, one seed, an earlier version)."""
    if phase.name == "fit":
        model.autoencoder.set_latent_stats([views[i] for i in rows["old"][:16] if i in views])
    if phase.name in ("fit", "rgb"):
        M = len(model.shared)
        for i in rows[phase.cars]:
            W = torch.randn(M) / max(M, 1) ** 0.5
            params = torch.cat([0.1 * torch.randn(model.P - M), W])
            if i in views:                                     # all draw, the owner writes
                bank.fill(i, params)
    if phase.name == "new":
        mean = bank.read([i for i in rows["old"] if i in views]).sum(0) / len(rows["old"])
        sum_over_ranks([mean])
        for i in [i for i in rows["new"] if i in views]:
            bank.fill(i, mean)


def train(args: Args) -> dict:
    """All phases; write the run folder; -> what summary.json holds. On resume, run.loop returns at
    once for finished phases, and restores from the checkpoint what start_phase has changed."""
    args = replace(args, device=start_ranks(args.device))
    check(args)
    torch.manual_seed(args.seed)
    family, rows = choose_scenes(args, load_family(args.scene, args.data, args.size))
    run = start_run(args, family)
    rank, world = ranks()
    views = {i: load_views(family, i, args.device)
             for cars in rows for i in rows[cars][rank::world]}
    model = Model(args, family).to(args.device)
    old_model = copy.deepcopy(model)                           # renders old cars after finetune
    bank = Bank(run.path / "planes.bin", len(family.scenes), model.P, args.device)
    for index, phase in enumerate(phases(args)):
        scenes = rows[phase.cars]
        if phase.name == "new":
            old_model.load_state_dict(model.state_dict())
        start_phase(phase, model, bank, rows, views)
        # A new Adam for the shared parts, as other parts train now. T^mic and W keep their moments,
        # which are in the bank, from fit to joint and from new to finetune.
        optimiser = make_optimiser(args, phase, model)
        trained = [p for group in optimiser.param_groups for p in group["params"]]
        planes_lr = args.lr_rgb if phase.name == "rgb" else args.lr

        def score(count, pictures):
            bank.to_file([i for i in scenes if i in views])
            fitted = bank if "planes" in phase.trains else None
            scores = evaluate(model, fitted, views, scenes, count)
            if pictures and phase.cars == "new":               # after the last step
                save_strips(model, bank, views, scenes, pictures)
            prefix = "" if phase.cars == "new" else "old_"
            return {prefix + name: value for name, value in scores.items()}

        parts = {"field": model, "old_model": old_model, "bank": bank, "optimiser": optimiser}
        for step in run.loop(parts, score, steps=phase.steps, stage=phase.name):
            decay = 0.05 ** (step / phase.steps)               # to 5 % (released: in new, finetune)
            for group in optimiser.param_groups:
                group["lr"] = group["rate"] * decay
            # In joint: x (4, 3, 64, 64), rays (4, 16, 16, 3), params (4, 12 300) -> planes
            # (4, 3, 32, 32, 12) -> y (4, 8, 16, 16) -> D -> (4, 3, 64, 64); one x goes through E.
            # 1. a picture of each scene of the batch, and its rays
            batch = draw_batch(args, phase, index, step, scenes, views, args.device)
            # 2. planes, losses, gradients
            totals, planes = torch.zeros(2, device=args.device), None
            for p in trained:
                p.grad = torch.zeros_like(p)
            if batch is not None:
                params = bank.read(batch.rows).requires_grad_()                # (n, P)
                if "planes" in phase.trains:
                    planes = model.planes(params)
                loss, opacity = total_loss(model, batch, planes, phase.weights)
                (batch.share * loss).backward()
                totals = batch.share * torch.stack([loss.detach(), opacity])
            # 3. Adam on what scenes share, with the gradients of all processes
            sum_over_ranks([totals, *(p.grad for p in trained)])
            optimiser.step()
            # 4. Adam on planes of the batch's scenes, no others
            if planes is not None:
                bank.step(batch.rows, params.grad, decay * planes_lr)
            run.log(loss=totals[0], opacity=totals[1])
            run.count(rays=phase.rays * min(args.batch, len(scenes)))
    return summarise(args, run, model, old_model, bank, views, rows)


def summarise(args: Args, run: TrainingRun, model: Model, old_model: Model, bank: Bank,
              views: dict, rows: dict) -> dict:
    """Add to the last scores: old_psnr, old_psnr_new_decoder (of eight old cars, by the decoder of
    joint and that of finetune), ceiling_psnr, new_latent_psnr (autoencoder_psnr and latent_psnr of
    new cars before finetune), bytes and seconds; print these per phase and per scene."""
    final = {"processes": ranks()[1]}
    each, shared = 4 * model.P, 4 * sum(p.numel() for p in model.parameters())
    if not model.rgb:                                          # there are two decoders
        shared += 4 * sum(p.numel() for p in model.autoencoder.decoder.parameters())
        for name, net in (("old_psnr", old_model), ("old_psnr_new_decoder", model)):
            final[name] = evaluate(net, bank, views, rows["old"][:8])["psnr"]
    if ranks()[0] > 0:
        return final
    (run.path / "planes.bin").unlink()                         # the checkpoint has the rows
    if args.video:
        i, poses = rows["new"][0], orbit_poses(60, 1.3, 25.0).to(args.device)
        K = views[i].K[:1].expand(60, 3, 3)
        film = render_views(model, bank.read([i]), poses, K, args.size)
        save_video(run.path / "render.mp4", list(film["rgb"]))
    curve = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    seconds, before, step = {"old": 0.0, "new": 0.0}, 0.0, 0
    for phase in phases(args):
        step += phase.steps
        end = next(line for line in curve if line["step"] == step)
        took, before = end["train_seconds"] - before, end["train_seconds"]
        seconds[phase.cars] += took
        scores = ", ".join(f"{name} {end[name]:.2f}" for name in end if name.endswith("psnr"))
        say(f"phase {phase.name}: {phase.steps} steps of {phase.rays} rays per picture, "
            f"{1000 * took / phase.steps:.1f} ms each: {scores}")
        if phase.name == "new":
            final["ceiling_psnr"] = end["autoencoder_psnr"]
            final["new_latent_psnr"] = end["latent_psnr"]
    rgb = 4 * 3 * args.resolution ** 2 * (args.micro + args.macro)
    N, seconds_each = break_even(shared, each, rgb), seconds["new"] / len(rows["new"])
    say(f"A new scene: {each / 1e3:.1f} kB and {seconds_each:.2f} s. Shared by all: "
        f"{shared / 1e3:.0f} kB and {seconds['old']:.0f} s.")
    if not model.rgb:
        say(f"Fewer bytes than RGB planes ({rgb / 1e3:.1f} kB each) for more than {N:.0f} scenes.")
    return run.finish(**final, bytes_per_scene=each, bytes_shared=shared, break_even_scenes=N,
                      seconds_shared=seconds["old"], seconds_per_scene=seconds_each)


if __name__ == "__main__":
    cli(PRESETS, train)
