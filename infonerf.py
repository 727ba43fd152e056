"""InfoNeRF: few views, and rays that make up their mind (Kim, Seo and Han, CVPR 2022, arXiv 2112.15399).

The idea in five lines. Three or four pictures do not determine a volume: a field explains them with fog of the right colours in front of
each camera, and fails from everywhere else. A real ray ends at one surface. So read the opacities along a ray as a distribution over where
the ray ends, and ask for low entropy: of the rays of the given pictures, and of rays from places where no picture was taken, for which no
colour is needed. And a camera that moves a little should see nearly the same distribution: a small KL divergence between twin rays.

| paper                            | here                                                                               |
|----------------------------------|------------------------------------------------------------------------------------|
| alpha_i = 1 - exp(-sigma delta)  | out["sigmas"], out["deltas"] (R, S); interval i of the S along a ray, all finite   |
| p(r_i) = alpha_i / sum alpha     | p (R, S), ray_distribution                                                         |
| Q(r) = sum alpha, eps, M(r)      | --mask sum (default: acc, as released), --mask-threshold, opaque                   |
| H(r), lambda_1                   | entropy [bits], --entropy-weight                                                   |
| P~, D_KL(P || P~), lambda_2      | near_rays, divergence [nats], --kl-weight                                          |

    L = mse + lambda_1 mean_r M(r) H(r) + lambda_2 mean_r D_KL(P(r) || P(r~))      train, ray_terms (M = 0 counts as 0)
    H(r) = - sum_i p_i log2 p_i                                                    entropy
    the mean goes over rays of the given views (seen) and of others (unseen)       --entropy-rays

Where the released code differs from this file:
(1) Its last interval is 1e10 long, so the last sample has alpha 1 wherever sigma > 0, and a "wall at infinity" takes part in p. Here every
    interval is finite and the ray ends where it leaves the box.
(2) It takes the entropy of unseen rays only, and draws them from all poses it has loaded, those of the test views included. Here both
    (--entropy-rays unseen), the unseen from a half sphere around the scene (--unseen-poses dataset: the training split's other poses).
(3) Its mask is the rendered opacity (acc), the paper's the sum of alphas. Both are here: --mask acc, sum, none.
(4) Its KL is KL(near || original), against the paper's formula (--kl-direction near), and compares the i-th samples of two rays that were
    sampled independently. Here twins share their distances t, so the i-th intervals are equally far from their cameras (near the box's
    faces a twin's may lie outside, where the grid repeats its border).
(5) KL without entropy crashes there; here each runs alone. Its default KL weight, 1, destroys the training; its DTU setting is 2e-5.
(6) A step draws all its rays from one picture; here from all given views. Unseen rays: one pose a step there, one pose a ray here.
(7) It trains on through a field that has gone empty or a wall of fog before the cameras; here both are noticed by the opacity and named.
(8) Its entropy grows with the number of samples. --normalise density takes the differential entropy, which does not.
Ours, not the paper's: a hash-grid field for laptops (--field mlp is the paper's), samples only inside the scene's box, the ramp, a positive
bias at the MLP's density (with the usual one, four of ten seeds are born with density 0 everywhere, and no gradient to leave it), and a KL
weight 250 times the authors'. Their MLP is smooth by itself, and KL is off in all their configurations but DTU's. A hash grid is not: what
it stores here says nothing about what it stores next door. There the KL, which ties neighbouring rays together, earns more than the entropy,
but not alone: an even fog is the same for all twins, and without the entropy this KL weight ends in one.

What the runs say (README): entropy alone clears the air (bits and opacity off the object fall by far), but gains only 0.4 dB on lego and
opens holes in surfaces (a fifth of the weight: 0.9 dB); with the KL it is 1.7 dB. At 8 views half of that is left. At 20 times its weight the
entropy loses 4 dB, at 200 times the object is gone, and the run says so.

    python infonerf.py --scene lego                                       4 views, 100 px: 18.9 dB, two minutes on one core
    python infonerf.py --scene lego --entropy-weight 0 --kl-weight 0      the same without the terms: 17.2 dB
    python infonerf.py --scene lego --preset paper                        800 px, 8x256 MLP, for a GPU; not run
"""
from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Progress, Run, Scene, Stopwatch, UserError, Views, check_finite, check_flags,
                    check_not_empty, cli, colour_map, join_views, load_scene, peak_memory_mb,
                    pick_views, pixel_grid, pixel_rays, psnr, random_state, random_background,
                    save_png, save_video, set_random_state, spherical_harmonics, evenly_spaced,
                    ssim, camera_path, comparison_strip, tensorboard, to_device, to_ndc,
                    write_json)
from kernels import composite, hash_encode, hash_levels


@dataclass
class Args:
    scene: str = "lego"
    """A scene's name under --data, a path, or the built-in `bricks`."""
    data: str = os.environ.get("NERF_DATA", "data")
    """Folder with nerf_synthetic/, nerf_llff_data/, dtu/ (default: $NERF_DATA, else `data`)."""
    preset: Literal["quick", "paper"] = "quick"
    """quick: 100 px, hash grid, two minutes on two cores. paper: 800 px, MLP, 50 000 steps, for a GPU."""
    out: Optional[str] = None
    """Run folder (default: runs/infonerf-SCENE-TIME)."""
    seed: int = 0
    """Seed of every random number."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, ..."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    eval_only: bool = False
    """Load the checkpoint in --out, evaluate it, draw the pictures, train nothing."""
    video: bool = False
    """Also write a turntable, render.mp4: colour beside depth."""
    tensorboard: bool = False
    """Also log to TensorBoard (if it is installed)."""

    size: int = 100
    """Longer image side [pixels]."""
    views: tuple[int, ...] = ()
    """Training views by index (default: 26 86 2 55; DTU 22 25 28; LLFF 3 spread views)."""
    num_views: Optional[int] = None
    """Training views by count: the default ones, then whichever is farthest from those chosen."""
    test_skip: int = 0
    """Test every n-th held-out view (0: every 8th of 200, all of fewer)."""
    steps: int = 1500
    """Optimiser steps."""
    rays: int = 128
    """Rays of the given views a step, those with a colour loss."""
    unseen_rays: int = 128
    """Rays of other views a step, without colour (drawn only where a term uses them)."""
    samples: int = 64
    """Stratified samples a ray."""
    importance: int = 0
    """Samples a ray that are added where a first pass saw weight."""
    precrop_steps: int = 0
    """First steps that draw seen rays from the middle of the pictures only."""
    precrop_share: float = 0.5
    """Side of that middle, as a share of the picture's."""
    background: Literal["white", "black", "grey"] = "white"
    """What is behind the scene."""
    train_background: Literal["random", "scene"] = "scene"
    """Behind each training ray: a random colour (tells the field the silhouettes, where pictures have alpha), or the scene's."""
    masked: bool = False
    """DTU: the object's mask is the pictures' alpha; what is outside becomes the background, in training and in testing."""

    entropy_weight: float = 0.005
    """lambda_1, weight of the ray entropy in bits (0: the baseline)."""
    entropy_rays: Literal["seen", "unseen", "both"] = "both"
    """Whose entropy, and whose KL."""
    unseen_poses: Literal["sphere", "dataset"] = "sphere"
    """Where unseen rays start: a hemisphere at the given cameras' distance (DTU, LLFF: between them), or the training split's others."""
    normalise: Literal["alpha", "weight", "density"] = "alpha"
    """What becomes p: opacities (paper), weights T alpha, or sigma delta (differential entropy: lambda holds at any sample count)."""
    mask: Literal["acc", "sum", "none"] = "acc"
    """Rays without a surface count as 0: those of low accumulated opacity (released), of low sum of alphas (paper), or none."""
    mask_threshold: float = 0.1
    """eps, the opacity from which on a ray counts."""
    entropy_ramp: int = 375
    """Steps in which lambda_1 grows linearly from 0."""
    entropy_end: int = 0
    """Step from which on lambda_1 is 0 (0: never)."""
    entropy_final: float = 1.0
    """What an exponential decay leaves of lambda_1 at the end (1: constant)."""
    kl_weight: float = 0.005
    """lambda_2, weight of the KL divergence of twin rays in nats (0: off; the authors' DTU setting is 2e-5, with an MLP)."""
    kl_direction: Literal["original", "near"] = "original"
    """KL(original || near) (paper) or KL(near || original) (released)."""
    kl_near: Literal["auto", "rotation", "pixel"] = "auto"
    """A twin is the ray turned about the world's origin, or that of a neighbouring pixel (auto: pixel in NDC, which has no origin)."""
    kl_degrees: float = 5.0
    """Range of each of the three angles of that turn [degrees]."""
    kl_pixels: int = 1
    """Range of that neighbourhood [pixels]."""
    kl_mask: bool = False
    """Rays without a surface count as 0 in the KL, too (the authors': they do not)."""
    kl_rate: float = 0.5
    """lambda_2 is multiplied by this ..."""
    kl_every: int = 5000
    """... every so many steps."""

    field: Literal["hash", "mlp"] = "hash"
    """Small hash grid, or the paper's coarse and fine MLP of 8 layers."""
    levels: int = 6
    """Hash grid levels (L)."""
    features: int = 4
    """Features a level (F)."""
    log2_table: int = 16
    """Rows of a level's table, log2 (log2 T)."""
    base: int = 8
    """Cells a side of the coarsest level."""
    finest: int = 128
    """Cells a side of the finest level."""
    width: int = 256
    """Units of an MLP layer (--field mlp)."""
    density_noise: float = 0.0
    """Standard deviation of noise on the MLP's density before its ReLU, in training (released DTU setting: 1)."""
    lr: float = 2e-2
    """Adam's learning rate."""
    lr_final: float = 0.1
    """What an exponential decay leaves of it at the last step."""
    lr_warmup: int = 50
    """Steps in which it first grows linearly from 0."""
    eval_every: int = 250
    """Steps between two evaluations and checkpoints."""
    eval_views: int = 5
    """Test views in those evaluations (the last one takes all)."""


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", size=800, steps=50_000, rays=1024, unseen_rays=1024, samples=64, importance=128, precrop_steps=500,
                  entropy_weight=1e-3, entropy_ramp=1, kl_weight=0.0, field="mlp", lr=5e-4, lr_final=0.794, lr_warmup=1,
                  eval_every=5000, eval_views=5),
}


# ------------------------------------------------------------------------------------------- where a ray ends: p, H, KL, M

def ray_distribution(sigmas: Tensor, deltas: Tensor, weights: Tensor, by: str) -> Tensor:
    """p_i = m_i / (sum_j m_j + 1e-10): where along a ray its opacity sits.  (R, S) each -> p (R, S), rows of sum 1 (0 on an empty ray).

    by "alpha": m = 1 - exp(-sigma delta) (paper, ray density). "weight": m = T alpha, what the eye sees: density behind the first surface
    does not count. "density": m = sigma delta. Gradient to sigmas (and weights).
    """
    mass = -torch.expm1(-sigmas * deltas) if by == "alpha" else weights if by == "weight" else sigmas * deltas
    return mass / (mass.sum(1, keepdim=True) + 1e-10)


def entropy(p: Tensor, deltas: Optional[Tensor] = None) -> Tensor:
    """H = - sum_i p_i log2(p_i + 1e-10) [bits], 0 for one spike, log2 k for k equal shares.  p (R, S) -> (R,)  (paper, ray entropy).

    Where deltas (R, S) are given: the differential entropy - sum_i p_i log2(p_i / delta_i), with length measured in 1/64 of the ray's:
    finer sampling of the same density does not change it. A ray that is filled evenly has 6 bits at any sample count, mass within less
    than 1/64 of the ray a negative number of them (so a masked ray's 0 is not the least any more).
    Pocket check: p = (1/2, 1/2), deltas (1/2, 1/2): 1 bit; by the second form 6, since each half is 32 units long: 1 + log2 32.
    """
    if deltas is None:
        return -(p * torch.log2(p + 1e-10)).sum(1)
    unit = deltas.sum(1, keepdim=True) / 64
    return -(p * torch.log2((p + 1e-10) * unit / deltas.clamp(min=1e-10) + 1e-10)).sum(1)


def divergence(p: Tensor, near: Tensor) -> Tensor:
    """D_KL(p || near) = sum_i p_i (ln p_i - ln near_i), 1e-10 added to all.  (R, S) -> (R,) [nats]; 0 where equal. Gradient to both."""
    p, near = p + 1e-10, near + 1e-10
    return (p * (p.log() - near.log())).sum(1)


def opaque(sigmas: Tensor, deltas: Tensor, acc: Tensor, by: str, threshold: float) -> Tensor:
    """M(r): 1 where a ray meets something, else 0; no gradient.  (R, S), (R, S), (R,) -> (R,).

    Without it, rays through empty space would be asked to end somewhere. As acc = 1 - prod(1 - alpha) <= sum alpha, "sum" lets more in.
    """
    if by == "none":
        return torch.ones_like(acc)
    opacity = acc if by == "acc" else -torch.expm1(-sigmas * deltas).sum(1)
    return (opacity.detach() > threshold).to(acc)


def entropy_weight(args: Args, t: int) -> float:
    """lambda_1 at step t: up over --entropy-ramp steps, down to --entropy-final of it at the end, 0 from --entropy-end on."""
    if args.entropy_end and t >= args.entropy_end:
        return 0.0
    return args.entropy_weight * min(t / args.entropy_ramp, 1) * args.entropy_final ** (t / args.steps)


# ------------------------------------------------------------------------------------------------- cameras: given, unseen, near

DEFAULT_VIEWS = {"blender": (26, 86, 2, 55), "builtin": (26, 86, 2, 55), "dtu": (22, 25, 28), "llff": ()}


def choose_views(args: Args, scene: Scene) -> list[int]:
    """Indices of the training views that are given: --views, or the first --num-views of the default list, made longer by always taking
    the camera that is farthest from those chosen (so that more views contain fewer). UserError for an index that is not there, or twice."""
    V = len(scene.train.names)
    views = list(args.views)
    if views and args.num_views is not None:
        raise UserError("--views and --num-views are two ways to say the same: give one of them")
    if not views:
        views = [v for v in DEFAULT_VIEWS[scene.kind] if v < V]
        n = args.num_views if args.num_views is not None else min(len(DEFAULT_VIEWS[scene.kind]) or 3, V)
        if not 1 <= n <= V:
            raise UserError(f"--num-views {n}: {scene.name} has {V} training views: give a number from 1 to {V}")
        views, centre = views[:n] or [0], scene.train.c2w[:, :, 3].cpu()
        while len(views) < n:
            views.append(int(torch.cdist(centre, centre[views]).amin(1).argmax()))
    for v in views:
        if not 0 <= v < V:
            raise UserError(f"--views {v}: {scene.name} has {V} training views: give indices from 0 to {V - 1}")
        if views.count(v) > 1:
            raise UserError(f"--views {v} is given twice: name each view once")
    return views


def few_shot(scene: Scene, args: Args) -> tuple[Scene, Views]:
    """-> the scene with only the given training views and the test views that are to be scored; and the training views not given
    (their poses may serve, their pictures must not). On DTU, indices count all views of the scan, and all not given are test views: no pose
    is left that may serve."""
    if args.masked and scene.train.mask is None:
        raise UserError(f"--masked: {scene.name} has no masks: use a DTU scan with mask/")
    if scene.kind == "dtu":
        both = join_views(scene.train, scene.test)
        if args.masked:
            m = both.mask[..., None]
            both = replace(both, images=m * both.images + (1 - m) * scene.bg, alpha=both.mask)
        scene = replace(scene, train=pick_views(both, sorted(range(len(both.names)), key=lambda v: (len(both.names[v]), both.names[v]))))
    given = choose_views(args, scene)
    rest = pick_views(scene.train, [v for v in range(len(scene.train.names)) if v not in given])
    test = scene.test
    if scene.kind == "dtu":
        test, rest = rest, pick_views(rest, [])
    if not test.names:
        raise UserError(f"{scene.name}: all {len(given)} views are given, none is left to test on: give fewer")
    skip = args.test_skip or (8 if len(test.names) >= 200 else 1)
    return replace(scene, train=pick_views(scene.train, given), test=pick_views(test, list(range(0, len(test.names), skip)))), rest


def facing(position: Tensor, back: Tensor, up: Tensor) -> Tensor:
    """Cameras (n, 3, 4) at `position` (n, 3), looking against `back`, `up` upwards in the picture."""
    back = F.normalize(back, dim=-1)
    right = F.normalize(torch.linalg.cross(up.expand_as(back), back), dim=-1)
    return torch.stack([right, torch.linalg.cross(back, right), back, position], -1)


def unseen_poses(scene: Scene, rest: Views, n: int, source: str) -> Tensor:
    """n cameras (n, 3, 4) where no picture was given.

    "dataset": of the training split's other views. "sphere": on the upper half of the sphere around the box's middle, at the given
    cameras' mean distance, uniform over its area; where cameras face one way (DTU, LLFF) between two given ones instead.
    """
    train, device = scene.train.c2w, scene.train.c2w.device
    if source == "dataset":
        return rest.c2w[torch.randint(len(rest.c2w), (n,), device=device)]
    if scene.kind in ("dtu", "llff"):
        i = torch.randint(len(train), (n,), device=device)
        j = (i + torch.randint(1, max(len(train), 2), (n,), device=device)) % len(train)            # another one, where there is one
        between = torch.lerp(train[i], train[j], torch.rand(n, 1, 1, device=device))
        return facing(between[:, :, 3], between[:, :, 2], between[:, :, 1])
    middle = scene.aabb.mean(0)
    radius = (train[:, :, 3] - middle).norm(dim=1).mean()
    z, turn = 0.98 * torch.rand(n, device=device), 2 * math.pi * torch.rand(n, device=device)      # not from straight above
    back = torch.stack([(1 - z * z).sqrt() * turn.cos(), (1 - z * z).sqrt() * turn.sin(), z], -1)
    return facing(middle + radius * back, back, torch.tensor([0.0, 0.0, 1.0], device=device))


def near_rays(rays_o: Tensor, rays_d: Tensor, degrees: float) -> tuple[Tensor, Tensor]:
    """Each ray turned about the world's origin by Rx Ry Rz, three angles uniform in +-degrees (all in all at most sqrt(3) times that): its
    camera goes round the origin, and it passes the origin as closely as before.  (R, 3) each -> (R, 3) each."""
    a = (torch.rand(3, len(rays_o), device=rays_o.device) * 2 - 1) * math.radians(degrees)
    c, s, one, zero = a.cos(), a.sin(), torch.ones_like(a[0]), torch.zeros_like(a[0])
    matrix = lambda *rows: torch.stack([torch.stack(row, -1) for row in rows], -2)                  # (R, 3, 3)
    R = (matrix((one, zero, zero), (zero, c[0], -s[0]), (zero, s[0], c[0]))
         @ matrix((c[1], zero, s[1]), (zero, one, zero), (-s[1], zero, c[1]))
         @ matrix((c[2], -s[2], zero), (s[2], c[2], zero), (zero, zero, one)))
    turn = lambda v: (R @ v[:, :, None])[:, :, 0]
    return turn(rays_o), turn(rays_d)


def camera_rays(xy: Tensor, K: Tensor, c2w: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    """Rays of pixels xy (R, 2) of cameras K (3, 3) or (R, 3, 3), c2w (R, 3, 4), in NDC where the scene is."""
    rays_o, rays_d = pixel_rays(xy, K, c2w)
    return to_ndc(scene.train, rays_o, rays_d) if scene.ndc else (rays_o, rays_d)


# -------------------------------------------------------------------------------------------------------------- the fields
# A field is a function of x (N, 3) and d (N, 3) or None -> sigmas (N,) and rgbs (N, 3), or None where d is: no colour was asked for.

class _TruncatedExp(torch.autograd.Function):
    """exp(x), whose gradient is cut at exp(15) (Instant-NGP)."""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, d_y):
        return d_y * ctx.saved_tensors[0].clamp(max=15).exp()


class HashField(nn.Module):
    """Instant-NGP's field, small: hash grid -> MLP 64 -> density and 15 features; these and the direction -> MLP 64 -> colour.

    The density starts at e^-1: thin fog everywhere, so that there is a gradient everywhere.
    """
    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        self.levels = hash_levels(args.levels, args.base, args.finest, args.log2_table)
        self.register_buffer("aabb", aabb)                                                          # (2, 3)
        self.table = nn.Parameter(torch.empty(self.levels.offsets[-1], args.features).uniform_(-1e-4, 1e-4))
        self.geometry = nn.Sequential(nn.Linear(args.levels * args.features, 64), nn.ReLU(), nn.Linear(64, 16))
        self.colour = nn.Sequential(nn.Linear(15 + 16, 64), nn.ReLU(), nn.Linear(64, 3))

    def forward(self, x: Tensor, d: Optional[Tensor]):
        u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])                                      # (N, 3) in [0, 1]
        h = self.geometry(hash_encode(u, self.table, self.levels))                                  # (N, 16)
        rgbs = None if d is None else torch.sigmoid(self.colour(torch.cat([h[:, 1:], spherical_harmonics(d)], -1)))
        return _TruncatedExp.apply(h[:, 0] - 1), rgbs


class MLPField(nn.Module):
    """NeRF's MLP: 10 frequencies of x -> 8 layers, x again after the fifth -> density; with 4 frequencies of d -> colour."""
    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        W, self.noise = args.width, args.density_noise
        self.layers = nn.ModuleList([nn.Linear(63 if i == 0 else W + 63 if i == 5 else W, W) for i in range(8)])
        self.density, self.feature = nn.Linear(W, 1), nn.Linear(W, W)
        nn.init.constant_(self.density.bias, 0.1)                                                   # fog, not nothing: a ReLU of less is dead
        self.colour = nn.Sequential(nn.Linear(W + 27, W // 2), nn.ReLU(), nn.Linear(W // 2, 3))

    @staticmethod
    def frequencies(v: Tensor, n: int) -> Tensor:
        """v, sin(2^k v), cos(2^k v), k < n: (N, 3) -> (N, 3 + 6n)."""
        angles = (v[:, None] * 2.0 ** torch.arange(n, device=v.device)[:, None]).flatten(1)
        return torch.cat([v, angles.sin(), angles.cos()], -1)

    def forward(self, x: Tensor, d: Optional[Tensor]):
        x = h = self.frequencies(x, 10)
        for i, layer in enumerate(self.layers):
            h = F.relu(layer(torch.cat([x, h], -1) if i == 5 else h))
        s = self.density(h)[:, 0]
        if self.training and self.noise:
            s = s + self.noise * torch.randn_like(s)
        return F.relu(s), None if d is None else torch.sigmoid(self.colour(torch.cat([self.feature(h), self.frequencies(d, 4)], -1)))


# ------------------------------------------------------------------------------------------------------------------ render

def box_interval(rays_o: Tensor, rays_d: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    """t at which rays (R, 3) enter and leave the scene's box, within [near, far]: (R,), (R,), equal where they miss it."""
    inverse = 1 / torch.where(rays_d.abs() < 1e-9, 1e-9, rays_d)
    a, b = (scene.aabb[0] - rays_o) * inverse, (scene.aabb[1] - rays_o) * inverse                   # (R, 3)
    t_in = torch.minimum(a, b).amax(1).clamp(scene.near, scene.far)
    return t_in, torch.maximum(torch.maximum(a, b).amin(1).clamp(max=scene.far), t_in)


def stratified(t_in: Tensor, t_out: Tensor, S: int, perturb: bool) -> Tensor:
    """Edges (R, S+1) of S intervals from t_in to t_out (R,), front to back; perturb: the inner edges move by up to half a width."""
    k = torch.arange(S + 1, device=t_in.device).expand(len(t_in), S + 1)
    if perturb:
        k = k + F.pad(torch.rand(len(t_in), S - 1, device=t_in.device) - 0.5, (1, 1))
    return t_in[:, None] + k * ((t_out - t_in) / S)[:, None]


def importance(t: Tensor, weights: Tensor, n: int, perturb: bool) -> Tensor:
    """Edges (R, S+1) and n more of them, drawn by weights (R, S), constant in each interval: -> (R, S+1+n), sorted. No gradient."""
    cdf = F.pad((weights.detach() + 1e-5).cumsum(1), (1, 0))
    cdf = cdf / cdf[:, -1:]
    u = (torch.arange(n, device=t.device) + (torch.rand(len(t), n, device=t.device) if perturb else 0.5)) / n
    i = torch.searchsorted(cdf, u.expand(len(t), n).contiguous(), right=True).clamp(1, t.shape[1] - 1)        # the upper edge
    low, high = cdf.gather(1, i - 1), cdf.gather(1, i)
    more = torch.lerp(t.gather(1, i - 1), t.gather(1, i), (u - low) / (high - low))
    return torch.cat([t, more], 1).sort(1).values


def blend(field, rays_o: Tensor, rays_d: Tensor, t: Tensor, bg: Tensor, colour: bool) -> dict:
    """Render rays (R, 3) with intervals between edges t (R, S+1), sampled in their middles; bg (3,) or (R, 3).

    -> rgb (R, 3), acc, depth (R,); sigmas, deltas, weights (R, S). Without colour: rgb is None, and the field's colour is not computed.
    """
    R, S = len(t), t.shape[1] - 1
    middle = 0.5 * (t[:, 1:] + t[:, :-1])                                                           # (R, S)
    x = (rays_o[:, None] + middle[..., None] * rays_d[:, None]).view(-1, 3)                         # (R S, 3)
    sigmas, rgbs = field(x, rays_d.repeat_interleave(S, 0) if colour else None)
    offsets = torch.arange(R + 1, device=t.device) * S                                              # packed, all rays equally long
    rgb, acc, depth, weights = composite(sigmas, torch.zeros_like(sigmas)[:, None] if rgbs is None else rgbs,
                                         t[:, :-1].reshape(-1), t[:, 1:].reshape(-1), offsets)
    return {"rgb": rgb + (1 - acc[:, None]) * bg if colour else None, "acc": acc, "depth": depth, "t": t,
            "sigmas": sigmas.view(R, S), "deltas": t.diff(dim=1), "weights": weights.view(R, S)}


def render(fields: nn.ModuleDict, rays_o: Tensor, rays_d: Tensor, scene: Scene, bg: Tensor, args: Args, perturb: bool = False,
           colour: bool = True) -> dict:
    """Rays (R, 3) -> blend() of the fine field; "coarse" holds the coarse field's colour (R, 3) where there is one."""
    t = stratified(*box_interval(rays_o, rays_d, scene), args.samples, perturb)
    coarse = None
    if args.importance:
        separate = "coarse" in fields and colour                                                    # it learns by its own colour loss
        with torch.set_grad_enabled(separate and torch.is_grad_enabled()):
            first = blend(fields["coarse" if "coarse" in fields else "fine"], rays_o, rays_d, t, bg, separate)
        coarse, t = first["rgb"], importance(t, first["weights"], args.importance, perturb)
    return {**blend(fields["fine"], rays_o, rays_d, t, bg, colour), "coarse": coarse}


# ---------------------------------------------------------------------------------------------------------------- evaluate

@torch.no_grad()
def render_view(fields, c2w: Tensor, K: Tensor, scene: Scene, args: Args, chunk: int = 2048) -> dict:
    """A whole picture: rgb (H, W, 3) in [0, 1]; acc, depth, entropy [bits of alpha-normalised p] (H, W)."""
    H, W = scene.train.images.shape[1:3]
    parts = {"rgb": [], "acc": [], "depth": [], "entropy": []}
    for xy in pixel_grid(H, W, c2w.device).split(chunk):
        out = render(fields, *camera_rays(xy, K, c2w.expand(len(xy), 3, 4), scene), scene, scene.bg, args)
        out["entropy"] = entropy(ray_distribution(out["sigmas"], out["deltas"], out["weights"], "alpha"))
        for name, part in parts.items():
            part.append(out[name])
    return {name: torch.cat(part).view(H, W, *part[0].shape[1:]).clamp(0, 1 if name == "rgb" else None) for name, part in parts.items()}


def evaluate(fields, scene: Scene, args: Args, ids: list[int], pictures=None) -> dict:
    """Scores of test views; pictures: folder for strips (truth | render | error | depth). PSNR and SSIM: mean over views; the others: over
    the pixels of all views.

    psnr [dB], ssim; psnr_masked, ssim_masked inside the object's mask (DTU; outside, both pictures are set to the background);
    entropy_bits: mean H of rays with acc > 0.1; acc_on_object, acc_off_object: mean opacity where alpha is 1 and where it is 0;
    depth_error: mean |depth / acc - truth| where there is an object and its depth is known [world units].
    """
    scores: dict[str, list] = {}
    views = scene.test
    for v in ids:
        truth, out = views.images[v], render_view(fields, views.c2w[v], views.K[v], scene, args)
        found = {"psnr": psnr(out["rgb"], truth), "ssim": ssim(out["rgb"], truth)}
        if views.mask is not None:
            m = views.mask[v, ..., None]
            found["psnr_masked"] = -10 * torch.log10((m * (out["rgb"] - truth) ** 2).sum() / (3 * m.sum()))
            found["ssim_masked"] = ssim(m * out["rgb"] + (1 - m) * scene.bg, m * truth + (1 - m) * scene.bg)
        found["entropy_bits"] = out["entropy"][out["acc"] > 0.1]
        if views.alpha is not None:
            found["acc_on_object"], found["acc_off_object"] = out["acc"][views.alpha[v] == 1], out["acc"][views.alpha[v] == 0]
        if views.depth is not None:
            hit = views.depth[v] > 0
            found["depth_error"] = (out["depth"] / out["acc"].clamp(min=1e-3) - views.depth[v])[hit].abs()
        for name, value in found.items():
            scores.setdefault(name, []).append(value.reshape(-1))
        if pictures:
            save_png(pictures / f"test_{v:03d}.png", comparison_strip(truth, out["rgb"], out["depth"], scene.near, scene.far))
    return {name: float(torch.cat(values).mean()) for name, values in scores.items()}


@torch.no_grad()
def ray_picture(fields, scene: Scene, args: Args) -> Tensor:
    """Where the rays of one image row end: the middle row of the first test view, a column a ray, the camera below, far above; brightness
    is p, in 96 even intervals, relative to the column's largest, times acc. White: the true depth, if known.  -> (288, 3 W, 3)."""
    views, (H, W) = scene.test, scene.test.images.shape[1:3]
    xy = pixel_grid(H, W, views.c2w.device).view(H, W, 2)[H // 2]                                   # (W, 2)
    rays = camera_rays(xy, views.K[0], views.c2w[:1].expand(W, 3, 4), scene)
    t_in, t_out = box_interval(*rays, scene)
    near, far = float(t_in.min()), float(t_out.max())
    edges = torch.linspace(near, far, 97, device=xy.device).expand(W, 97)
    out = blend(fields["fine"], *rays, edges, scene.bg, False)
    p = ray_distribution(out["sigmas"], out["deltas"], out["weights"], args.normalise)              # (W, 96)
    inside = (edges[:, 1:] > t_in[:, None]) & (edges[:, :-1] < t_out[:, None])
    picture = colour_map(inside * p / p.amax(1, keepdim=True).clamp(min=1e-10) * out["acc"][:, None], 0, 1)
    if views.depth is not None:
        truth = views.depth[0, H // 2]
        picture[(truth[:, None] >= edges[:, :-1]) & (truth[:, None] < edges[:, 1:])] = 1.0
    return picture.transpose(0, 1).flip(0).repeat_interleave(3, 0).repeat_interleave(3, 1)


# ------------------------------------------------------------------------------------------------------------------- train

# flags that may change between a run and its --resume or --eval-only (lr: the cure of a loss that is not finite)
FREE = {"lr", "data", "device", "out", "resume", "eval_only", "video", "tensorboard", "test_skip", "eval_views"}


def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("steps", "rays", "unseen_rays", "samples", "levels", "features", "base", "finest", "width", "entropy_ramp",
                                "entropy_final", "kl_pixels", "kl_rate", "kl_every", "lr", "lr_final", "lr_warmup", "eval_every", "eval_views"),
                not_negative=("importance", "precrop_steps", "entropy_weight", "entropy_end", "kl_weight", "kl_degrees", "mask_threshold",
                              "density_noise", "test_skip"), shares=("precrop_share",))
    if not 1 <= args.log2_table <= 24 or args.finest < args.base:
        raise UserError(f"--log2-table {args.log2_table} --base {args.base} --finest {args.finest}: wanted 1 to 24, and finest not below base")
    if args.samples < 2:
        raise UserError("--samples 1: a distribution along a ray needs at least 2")


def check_opacity(acc: Tensor, alpha: Optional[Tensor], step: int) -> None:
    """Raise UserError where the field has collapsed. acc (R,) of seen rays, alpha (R,) of their pixels (None: unknown).

    Emptying: half of what the pictures show is gone. Low entropy is had that way, too, since masked rays count as 0, and no gradient brings
    back what is gone. A wall: fog of the pictures' colours, background included, right before the cameras.
    """
    if alpha is None:
        return check_not_empty(acc, step, "use a lower --lr, a longer --lr-warmup, or another --seed")
    if alpha.sum() < 2.5:                                                                           # too few of the rays hit anything to say
        return
    if acc.mean() < 0.5 * alpha.mean():
        raise UserError(f"the field has collapsed by step {step}: it is emptying (mean opacity {acc.mean():.3f}, the pictures have "
                        f"{alpha.mean():.3f}): use a lower --entropy-weight, a longer --entropy-ramp, or another --seed")
    if acc.mean() > 0.98 and alpha.mean() < 0.9:
        raise UserError(f"the field has collapsed by step {step}: a wall of fog before the cameras (mean opacity {acc.mean():.3f}, the "
                        f"pictures have {alpha.mean():.3f}): use a lower --lr, a lower --entropy-weight, or another --seed")


def draw_pixels(n: int, H: int, W: int, share: float, device) -> Tensor:
    """n pixel centres (n, 2), uniform in the middle `share` of the picture (1: everywhere)."""
    side = torch.tensor([W, H], device=device)
    return ((1 - share) / 2 * side + torch.rand(n, 2, device=device) * share * side).floor().clamp(max=side - 1) + 0.5


def neighbours(xy: Tensor, reach: int, H: int, W: int) -> Tensor:
    """Another pixel for each of xy (n, 2), at most `reach` to the side and `reach` up or down; one that would lie outside is mirrored."""
    move = torch.randint((2 * reach + 1) ** 2 - 1, (len(xy),), device=xy.device)
    move = move + (move >= 2 * reach * (reach + 1))                                                 # the middle, no move at all, is left out
    moved = xy + torch.stack([move % (2 * reach + 1) - reach, move // (2 * reach + 1) - reach], -1)
    side = torch.tensor([W, H], device=xy.device)
    return torch.where((moved < 0) | (moved > side), 2 * xy - moved, moved)


def ray_terms(fields, scene: Scene, rest: Views, args: Args, seen: tuple, out: dict, lambda1: float, lambda2: float):
    """-> mean M H [bits], mean KL [nats], without their weights; 0, and not computed, where the weight is 0.
    seen: pixels (R, 2), K and c2w of the rays rendered as `out`."""
    H_mean = kl_mean = out["acc"].new_zeros(())
    if not (lambda1 or lambda2):
        return H_mean, kl_mean
    views, n, (H, W) = scene.train, args.unseen_rays, scene.train.images.shape[1:3]
    # 2. unseen rays: cameras without pictures; only where they end is asked, so no colour is computed
    batches = [(seen, out)] if args.entropy_rays != "unseen" else []
    if args.entropy_rays != "seen":
        camera = torch.randint(len(views.names), (n,), device=views.c2w.device)                     # any view's intrinsics
        unseen = (draw_pixels(n, H, W, 1.0, views.c2w.device), views.K[camera], unseen_poses(scene, rest, n, args.unseen_poses))
        batches.append((unseen, render(fields, *camera_rays(*unseen, scene), scene, scene.bg, args, perturb=True, colour=False)))
    Hs, kls = [], []
    for (xy, K, c2w), o in batches:
        # 3. where the rays end, and whether they do; the entropy of that
        p = ray_distribution(o["sigmas"], o["deltas"], o["weights"], args.normalise)                # (R, S)
        m = opaque(o["sigmas"], o["deltas"], o["acc"], args.mask, args.mask_threshold)              # (R,)
        if lambda1:
            Hs.append(m * entropy(p, o["deltas"] if args.normalise == "density" else None))
        # 4. their twins, at the same distances t, and the divergence
        if lambda2:
            if args.kl_near == "pixel":
                xy = neighbours(xy, args.kl_pixels, H, W)
            twins = camera_rays(xy, K, c2w, scene)
            if args.kl_near == "rotation":
                twins = near_rays(*twins, args.kl_degrees)
            near = blend(fields["fine"], *twins, o["t"], scene.bg, False)
            q = ray_distribution(near["sigmas"], near["deltas"], near["weights"], args.normalise)
            kls.append((m if args.kl_mask else 1) * (divergence(p, q) if args.kl_direction == "original" else divergence(q, p)))
    return torch.cat(Hs).mean() if lambda1 else H_mean, torch.cat(kls).mean() if lambda2 else kl_mean


def train(args: Args) -> dict:
    """Train, evaluate, write the run folder; -> what summary.json holds."""
    check(args)
    torch.manual_seed(args.seed)
    scene, rest = few_shot(load_scene(args.scene, args.data, args.size, args.background), args)
    if args.kl_near == "auto":
        args = replace(args, kl_near="pixel" if scene.ndc else "rotation")
    if args.kl_weight and args.kl_near == "rotation" and scene.ndc:
        raise UserError(f"--kl-near rotation: {scene.name} is a forward-facing scene, with no middle to turn about: use --kl-near pixel")
    if args.unseen_poses == "dataset" and len(rest.names) == 0:
        raise UserError(f"--unseen-poses dataset: {scene.name} has no view that is neither given nor tested: use --unseen-poses sphere")
    scene, rest = to_device(scene, args.device), to_device(rest, args.device)
    run = Run("infonerf", scene.name, args.out, asdict(args), resume=args.resume, eval_only=args.eval_only)
    board = tensorboard(run.path) if args.tensorboard else None

    views, tests, (H, W) = scene.train, len(scene.test.names), scene.train.images.shape[1:3]
    make = HashField if args.field == "hash" else MLPField
    names = ("coarse", "fine") if args.field == "mlp" and args.importance else ("fine",)
    fields = nn.ModuleDict({name: make(args, scene.aabb) for name in names})
    fields.to(args.device)
    optimiser = torch.optim.Adam(fields.parameters(), lr=args.lr, eps=1e-15 if args.field == "hash" else 1e-8, fused=True)
    step, clock = 0, Stopwatch(args.device)
    if run.resumed:
        state = run.load({name: value for name, value in run.args.items() if name not in FREE})
        fields.load_state_dict(state["fields"])
        optimiser.load_state_dict(state["optimiser"])
        set_random_state(state["random"])
        step, clock = state["step"], Stopwatch(args.device, state["seconds"])
    if args.resume:
        run.rewind(step)                                                                            # lines that will be written again
    progress, scores = Progress(args.steps, step), None

    while step < args.steps and not args.eval_only:
        clock.start()
        fields.train()
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min((step + 1) / args.lr_warmup, 1) * args.lr_final ** (step / args.steps)
        lambda1, lambda2 = entropy_weight(args, step), args.kl_weight * args.kl_rate ** (step // args.kl_every)
        # 1. seen rays: pixels of the given views
        view = torch.randint(len(views.names), (args.rays,), device=args.device)
        xy = draw_pixels(args.rays, H, W, args.precrop_share if step < args.precrop_steps else 1.0, args.device)
        x, y = xy.long().unbind(-1)
        truth, bg = views.images[view, y, x], scene.bg                                              # (N, 3)
        alpha = None if views.alpha is None else views.alpha[view, y, x]                            # (N,)
        if args.train_background == "random" or alpha is None:          # photographs: else the background is used as paint
            truth, bg = random_background(truth, alpha, scene.bg)
        pixels = xy, views.K[view], views.c2w[view]
        out = render(fields, *camera_rays(*pixels, scene), scene, bg, args, perturb=True)
        mse = ((out["rgb"] - truth) ** 2).mean()
        loss = mse if out["coarse"] is None else mse + ((out["coarse"] - truth) ** 2).mean()
        # 2. to 4. the two terms, of seen and unseen rays
        H_mean, kl_mean = ray_terms(fields, scene, rest, args, pixels, out, lambda1, lambda2)
        loss = loss + lambda1 * H_mean + lambda2 * kl_mean
        check_finite(loss, step)
        # 5. the fields take a step
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        step += 1
        seconds = clock.stop()

        progress(step, loss=loss, psnr=-10 * mse.log10(), entropy=H_mean, acc=out["acc"].mean(), rays_per_second=step * args.rays / seconds)
        last = step == args.steps
        if step % args.eval_every == 0 or last:
            fields.eval()
            check_opacity(out["acc"].detach(), alpha, step)
            n = tests if last else min(args.eval_views, tests)
            scores = evaluate(fields, scene, args, evenly_spaced(tests, n), pictures=run.path if last else None)
            run.write_line(step=step, rays=step * args.rays, train_seconds=seconds, loss=loss.item(), mse=mse.item(), views=n, **scores)
            for name, value in scores.items() if board else ():
                board.add_scalar(name, value, step)
            run.save({"random": random_state(), "step": step, "seconds": seconds, "fields": fields.state_dict(),
                      "optimiser": optimiser.state_dict()})
    fields.eval()
    if scores is None:                                                                              # nothing was left to train
        scores = evaluate(fields, scene, args, range(tests), pictures=run.path)
    return conclude(args, run, scene, fields, step, clock.seconds, scores)


def conclude(args: Args, run: Run, scene: Scene, fields, step: int, seconds: float, scores: dict) -> dict:
    """Write the ray picture, the turntable and the summary. scores: of all test views."""
    save_png(run.path / "rays.png", ray_picture(fields, scene, args))
    if args.video:
        K, frames = scene.train.K[0], []
        for c2w in camera_path(scene.train.c2w, scene.ndc, 120).to(args.device):
            out = render_view(fields, c2w, K, scene, args)
            frames.append(torch.cat([out["rgb"], colour_map(out["depth"], scene.near, scene.far)], 1))
        save_video(run.path / "render.mp4", frames)
    summary = dict(method="infonerf", scene=scene.name, data=scene.kind, size=args.size, seed=args.seed, steps=step,
                   train_seconds=round(seconds, 2), peak_memory_mb=round(peak_memory_mb(args.device), 1), **scores,
                   train_views=scene.train.names, test_views=len(scene.test.names), entropy_weight=args.entropy_weight, kl_weight=args.kl_weight)
    write_json(run.path / "summary.json", summary)
    rest = "".join(f", {name} {scores[name]:.3f}" for name in scores if name not in ("psnr", "ssim"))
    print(f"{scene.name}, {len(scene.train.names)} views: PSNR {scores['psnr']:.2f} dB, SSIM {scores['ssim']:.4f}{rest} over "
          f"{len(scene.test.names)} test views after {step} steps, {seconds:.1f} s of training; pictures in {run.path}")
    return summary


if __name__ == "__main__":
    cli(PRESETS, train)
