"""InfoNeRF: a scene from four images, by rays of low entropy (Kim, Seo and Han, CVPR 2022,
arXiv 2112.15399).

Four images do not determine a volume: many wrong ones render all four. A common one has density
spread thinly along the rays (fog), and looks wrong from everywhere else. A real ray is mostly empty
space: its opacity sits in a few intervals. Cut a ray into S intervals, and let alpha_i be the
opacity of interval i alone, whatever lies before it. Divided by their sum, they are a distribution
p. Its entropy H is log2 m bits if m intervals share the opacity equally: 0 for one interval, 6 for
fog in all of 64. InfoNeRF adds H to the loss. H needs no colour, so it can be asked of rays of
cameras without an image, too. The H of a real scene is not 0 (two walls: 1 bit), so its weight
lambda_1 is small. The second term, D, asks that p is nearly equal to q, the same distribution on a
neighbouring ray: two close rays meet opacity at similar distances.

    p_i = alpha_i / sum_j alpha_j,    alpha_i = 1 - exp(-sigma_i delta_i)    ray_density
    M = 1 if sum_i alpha_i > eps (--mask-threshold), else 0                  ray_mask
    H = - sum_i p_i log2 p_i,    D = sum_i p_i log2(p_i / q_i)               entropy, kl_divergence
    L = mean_seen (rgb - target)^2 + mean_all (lambda_1 M H + lambda_2 D)    train
Seen rays: of training images; all: also unseen ones. lambda_1 (--entropy-weight) grows from 0 in
--entropy-ramp steps; lambda_2: --kl-weight. Paper: P(r) = p, P(r~) = q, Q(r) = sum_i alpha_i.

                                                            mean opacity of pixels
    python infonerf.py --scene lego       PSNR [dB]     H [bits]  off the object  on the object
      --entropy-weight 0 --kl-weight 0    17.3 +- 0.3   3.4       0.10            0.85
      H alone, the paper's weight *       17.8 +- 0.2   2.8       0.04            0.81
      H alone, our weight: --kl-weight 0  17.1 +- 0.0   1.8       0.02            0.78
      D alone: --entropy-weight 0         stops, as all is fog    0.93            0.99
      both, the default                   19.0 +- 0.1   2.9       0.02            0.83
100 px, 4 views, three seeds; * --entropy-weight 1e-3 --entropy-ramp 1 --kl-weight 0. At our weight
H alone takes opacity from the object, too. D alone is 0 in fog, where p = q; H is largest there.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (Scene, SceneArgs, TrainingRun, Views, camera_path, camera_rays, check_flags,
                    cli, colour_map, comparison_strip, evenly_spaced, load_scene, note, pick_views,
                    psnr, random_background, ray_box, ray_weights, require, resample, save_png,
                    save_video, spherical_harmonics, ssim, to_device, truncated_exp, view_rays)
from kernels import composite, hash_encode, hash_levels


@dataclass
class Args(SceneArgs):
    entropy_weight: float = 0.005   # lambda_1, weight of the entropy of a ray [1/bit] (0: off)
    entropy_ramp: int = 375
    """Steps in which lambda_1 grows linearly from 0 (a quarter of the quick preset's steps)."""
    ray_density: Literal["alpha", "weight"] = "alpha"
    """What becomes p: the opacities alpha_i, or the weights T_i alpha_i of volume rendering."""
    mask_threshold: float = 0.1
    """eps: a ray whose alphas have no larger sum counts 0 in the mean of H (eps 0: none does)."""
    kl_weight: float = 0.0035
    """lambda_2, weight of the KL divergence of neighbouring rays [1/bit] (0: off)."""
    kl_degrees: float = 5.0
    """Largest component of the rotation vector from a ray to its neighbour [degrees]."""
    rays: int = 128                 # rays of the training views per step
    unseen_rays: int = 64
    """Rays of cameras without an image per step (0: none; 32 to 512 score alike)."""
    samples: int = 64               # intervals per ray; S = this + --fine-samples
    fine_samples: int = 0
    """Additional intervals where a coarse field has weight (0: there is no coarse field)."""
    precrop_steps: int = 0
    """First steps, whose seen rays come from the middle half of the images."""
    field: Literal["hash", "mlp"] = "hash"
    """A small hash grid, or the paper's MLP of 8 layers."""
    finest: int = 128
    """hash: cells per side of the finest of 6 levels (the coarsest has 8)."""
    lr: float = 2e-2                # learning rate of Adam
    lr_final: float = 0.1
    """Factor on it at the last step, by exponential decay (the first 50 steps also ramp up)."""
    views: tuple[int, ...] = ()
    """Training views by index (default: the authors', see DEFAULT_VIEWS)."""
    num_views: Optional[int] = None
    """Number of training views: the first of --views, then those farthest from the ones chosen."""
    view_seed: Optional[int] = None  # training views drawn at random, by this seed


# No random background: it would tell where the object ends, which the four images do not.
PRESETS = {
    "quick": Args(steps=1500, eval_every=500, train_background="scene"),
    "paper": Args(preset="paper", size=800, steps=50_000, eval_every=5000, rays=1024,
                  unseen_rays=1024, fine_samples=128, precrop_steps=500, field="mlp",
                  entropy_weight=1e-3, entropy_ramp=1, kl_weight=0.0, lr=5e-4, lr_final=0.794,
                  train_background="scene"),
}       # lr_final: the authors' decay, a tenth in 500 000 steps, is 0.1 ** 0.1 in 50 000. Their KL,
        # on DTU only: --kl-weight 1.4e-5 (2e-5 a nat), which they halve every 5000 steps.


# ------------------------------------------------------- where a ray has its opacity: p, M, H, D

def ray_density(sigmas: Tensor, edges: Tensor, by: str = "alpha") -> Tensor:
    """p_i = a_i / (sum_j a_j + 1e-10).  sigmas (R, S) [1/length] in the intervals between edges
    (R, S+1), distances along unit directions -> p (R, S), rows of sum 1, or of 0 on an empty ray.

    by "alpha": a_i = alpha_i = 1 - exp(-sigma_i delta_i). "weight": a_i = T_i alpha_i.
    Why alpha: behind an opaque surface T is 0, so weights do not see what is there; other cameras
    do. Example: alphas (0, 1, 0, 1), two walls, give p = (0, 1/2, 0, 1/2), 1 bit. By weights it is
    (0, 1, 0, 0), 0 bits, and the second wall stays (lego: 18.3 dB instead of 19.1).
    Why the last interval is finite (rays end where they leave the scene's box): in the released
    code it is 1e10 long, so wherever sigma > 0 its alpha is 1, a wall at infinity in every p.
    """
    if by == "alpha":
        a = -torch.expm1(-sigmas * edges.diff(dim=1))
    else:
        a = ray_weights(sigmas, edges)
    return a / (a.sum(1, keepdim=True) + 1e-10)


def ray_mask(sigmas: Tensor, edges: Tensor, threshold: float) -> Tensor:
    """M = 1 where sum_i alpha_i > eps, else 0.  (R, S), (R, S+1) -> (R,), no gradient.

    Why: p is normalised, so even a ray through empty space has an entropy, and lowering it would
    gather the ray's traces of opacity in one place. M takes such rays out. The field's own alphas
    decide, as no image tells which unseen rays are empty.
    Example: eps 0.1, the authors': alphas (0.05, 0.06) count, (0.05, 0.04) add 0 to the mean.
    On lego it is not needed: without a mask (eps = 0) the PSNR is the same, as it is with the
    released code's, 1 - prod_i (1 - alpha_i) > eps. It is here because the paper has it.
    """
    alphas = -torch.expm1(-sigmas.detach() * edges.diff(dim=1))
    return (alphas.sum(1) > threshold).to(alphas)


def entropy(p: Tensor) -> Tensor:
    """H = - sum_i p_i log2(p_i + 1e-10) [bits].  p (R, S) -> (R,).

    0 if one interval has all the opacity, log2 m if m share it equally, so at most log2 S, in
    uniform fog. Example: p = (1/2, 1/4, 1/4) has 1/2 + 1/2 + 1/2 = 1.5 bits.
    If you change S, tune lambda_1 again. Example: a ray of length 1 with a wall 1/16 thick, in fog
    of sigma = 0.5. With a larger S the wall covers more intervals, so it has more entropy itself,
    while the gradient on the fog falls:
        S    H of the wall alone    fog's share of p    H           dH / dsigma of the fog
        32   1 bit                  19 %                2.4 bits    1.8
        64   2 bits                 10 %                2.9 bits    1.3
        128  3 bits                 6 %                 3.5 bits    0.8
    With --fine-samples intervals are unequal, and p also depends on where they are dense.
    """
    return -(p * torch.log2(p + 1e-10)).sum(1)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """D = sum_i p_i log2(p_i / q_i) [bits], 1e-10 added to all.  (R, S), (R, S) -> (R,).

    p of a ray, q of its neighbour, in intervals equally far along both; gradient to both.
    Example: p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log2(2) + 1/2 log2(2/3) = 0.21 bits.
    D is large where the ray has opacity and its neighbour none, at most log2 1e10 = 33 bits. With
    p and q exchanged (released code) it would be large where only the neighbour has opacity. As
    neighbours are random and both rays get the gradient, this makes little difference.
    Rays through empty space count, too: no M. Measured on lego: the exchange, and leaving empty
    rays out, score the same.
    """
    p, q = p + 1e-10, q + 1e-10
    return (p * torch.log2(p / q)).sum(1)


def rotate_rays(rays_o: Tensor, rays_d: Tensor, centre: Tensor, degrees: float) -> tuple:
    """Neighbouring rays: each ray gets a random rotation of its own about `centre` (3,), the middle
    of the box, as if its camera had moved.  (R, 3), (R, 3) -> the same.

    A rotation keeps distances from `centre`: what lies near it, or is about round, is met at about
    the same t. So the neighbour gets the edges of the ray, and p and q can be compared interval by
    interval. Where these edges leave the box, the hash grid has the features of the nearest face.
    Released code: about the origin. (LLFF: the rotation is one of NDC, not of a real camera.)
    5 degrees are the authors'. With 1, 5 and 10 degrees, the terms gain 0.9, 1.7, 1.9 dB on lego.
    The rotation vector w is uniform in [-degrees, degrees]^3. With angle a = |w| and k = w / a,
    v' = cos a v + sin a (k x v) + (1 - cos a) (k . v) k  (Rodrigues).
    """
    w = math.radians(degrees) * (2 * torch.rand_like(rays_d) - 1)              # (R, 3)
    angle = w.norm(dim=1, keepdim=True)
    k, cos, sin = w / angle.clamp(min=1e-9), angle.cos(), angle.sin()

    def rotate(v):
        along = (k * v).sum(1, keepdim=True)
        return cos * v + sin * torch.linalg.cross(k, v) + (1 - cos) * along * k

    return centre + rotate(rays_o - centre), rotate(rays_d)


def unseen_poses(scene: Scene, n: int) -> Tensor:
    """n cameras (n, 3, 4) that took no image. They look at the middle of the scene's box from the
    mean distance of the training cameras, uniform over the upper half of that sphere, so uniform in
    z. Where all cameras face one way (DTU, LLFF), each new one lies between two training cameras.
    Released code: poses of all splits, the test views' included."""
    c2w, centre = scene.train.c2w, scene.aabb.mean(0)
    V, device = len(c2w), centre.device
    if scene.kind in ("dtu", "llff"):
        i = torch.randint(V, (n,), device=device)
        j = (i + torch.randint(1, max(V, 2), (n,), device=device)) % V         # another one
        pose = torch.lerp(c2w[i], c2w[j], torch.rand(n, 1, 1, device=device))
        up, back, position = pose[:, :, 1:].unbind(-1)                         # not yet orthogonal
    else:
        z = 0.98 * torch.rand(n, device=device)                # straight above, `up` is undefined
        azimuth = 2 * math.pi * torch.rand(n, device=device)
        radius = (1 - z * z).sqrt()
        back = torch.stack([radius * azimuth.cos(), radius * azimuth.sin(), z], -1)
        position = centre + (c2w[:, :, 3] - centre).norm(dim=1).mean() * back
        up = torch.zeros_like(back)
        up[:, 2] = 1
    back = F.normalize(back, dim=-1)
    right = F.normalize(torch.linalg.cross(up, back), dim=-1)
    return torch.stack([right, torch.linalg.cross(back, right), back, position], -1)


def sample_unseen_rays(fields, scene: Scene, args: Args) -> tuple:
    """A random pixel of each of n = unseen_rays cameras without an image; no colour is needed.
    -> rays_o, rays_d (n, 3), edges (n, S+1), sigmas (n, S)."""
    n, device = args.unseen_rays, scene.aabb.device
    K = scene.train.K[torch.randint(len(scene.train.K), (n,), device=device)]
    cameras = replace(scene.train, c2w=unseen_poses(scene, n), K=K)            # one per ray
    xy, ids = sample_pixels(n, cameras, False), torch.arange(n, device=device)
    rays = camera_rays(cameras, ids, xy, scene.ndc)
    _, edges = sample_along_rays(fields, *rays, scene, args, torch.rand(n, device=device))
    sigmas, _ = query(fields["fine"], *rays, edges)
    return *rays, edges, sigmas


# ----------------------------------------------------------------------------- beyond the paper
# Main differences of the default from the paper (sizes and rates: see PRESETS):
# * The field is a hash grid, without a coarse one: minutes on a CPU, where the MLP needs a GPU.
# * lambda_2 is 250 times the authors' (who use D on DTU only). An MLP is smooth, but a hash grid
#   stores places apart, and D ties neighbouring rays together.
# * lambda_1 is 5 times the paper's, because a strong D pulls towards uniform fog. It grows over the
#   first 375 steps: from the start, it would keep opacity where it lies by chance.
# * Photographs have no alpha: each pixel shows something, so opacity should be 1, but H is the same
#   if all alphas of a ray are halved. Two remedies. PSNR of flower (6 views, 63 px, both terms,
#   seed 0) on a white and on a black background:                     white   black
#       no remedy                                                     19.8    23.6 dB
#       the colour of another pixel behind each ray and its target    22.2    23.2
#       that, and 0.1 mean (1 - opacity)^2 in the loss                23.0    23.1
#   Without them the result depends on the background. (The table below has the mean of two seeds.)
#
# PSNR without and with the two terms; 100 px, 4 views, seeds 0 to 2 (flower, fern: 63 px, 6 views,
# seeds 0 and 1). All weights and rates were tuned on lego with the first views, on its test views.
#       lego     17.3    19.0 dB        lego, other views (--view-seed 1)    15.0    17.7 dB
#       mic      22.8    24.9           mic, other views                     23.1    24.2
#       bricks   15.2    16.9           flower                               22.1    22.7
#                                       fern                                 26.1    23.6
# On fern D alone has 26.2 dB, so H loses there: perhaps because rays of a forward-facing scene meet
# many surfaces one behind the other (not tested).
# Gain on lego with 2, 3, 4, 8, 16 views: 0.1, 0.4, 1.7, 0.8, -0.3 dB (seed 0; 4: three seeds).
# 2 say too little, 16 suffice.

class HashField(nn.Module):
    """Instant-NGP's field, small: hash grid -> MLP -> density and 15 features; these and the view
    direction -> MLP -> colour. The density starts near e^-1: a fog has a gradient everywhere."""
    def __init__(self, aabb: Tensor, finest: int):
        super().__init__()
        self.levels = hash_levels(6, 8, finest, 16)
        self.register_buffer("aabb", aabb)                                     # (2, 3)
        self.table = nn.Parameter(torch.empty(self.levels.offsets[-1], 4).uniform_(-1e-4, 1e-4))
        self.geometry = nn.Sequential(nn.Linear(6 * 4, 64), nn.ReLU(), nn.Linear(64, 16))
        self.colour_mlp = nn.Sequential(nn.Linear(15 + 16, 64), nn.ReLU(), nn.Linear(64, 3))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])                 # (N, 3) in [0, 1]
        h = self.geometry(hash_encode(u, self.table, self.levels))             # (N, 16)
        return truncated_exp(h[:, 0] - 1), h[:, 1:]

    def colour(self, features: Tensor, d: Tensor) -> Tensor:
        return torch.sigmoid(self.colour_mlp(torch.cat([features, spherical_harmonics(d)], -1)))


# --------------------------------------------------------------- the paper's field, and rendering
# A field: encode(x (N, 3)) -> sigmas (N,) [1/length], features (N, F), and
# colour(features, directions (N, 3)) -> rgbs (N, 3) in (0, 1).

class MLPField(nn.Module):
    """NeRF's MLP: 10 frequencies of x -> 8 layers, x again after the fifth -> density; with 4
    frequencies of the direction -> colour."""
    def __init__(self):
        super().__init__()
        layers = [nn.Sequential(nn.Linear(n, 256), nn.ReLU())
                  for n in (63, 256, 256, 256, 256, 63 + 256, 256, 256)]
        self.first, self.second = nn.Sequential(*layers[:5]), nn.Sequential(*layers[5:])
        self.density, self.feature = nn.Linear(256, 1), nn.Linear(256, 256)
        nn.init.constant_(self.density.bias, 0.1)   # else 4 of 10 seeds: density 0, for good (ReLU)
        self.colour_mlp = nn.Sequential(nn.Linear(256 + 27, 128), nn.ReLU(), nn.Linear(128, 3))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = positional_encoding(x, 10)
        h = self.second(torch.cat([x, self.first(x)], -1))
        return F.relu(self.density(h)[:, 0]), self.feature(h)

    def colour(self, features: Tensor, d: Tensor) -> Tensor:
        return torch.sigmoid(self.colour_mlp(torch.cat([features, positional_encoding(d, 4)], -1)))


def positional_encoding(v: Tensor, n: int) -> Tensor:
    """v, sin(2^k v), cos(2^k v), k < n: (N, 3) -> (N, 3 + 6n)."""
    angles = (v[:, None] * 2.0 ** torch.arange(n, device=v.device)[:, None]).flatten(1)
    return torch.cat([v, angles.sin(), angles.cos()], -1)


def sample_pixels(n: int, views: Views, middle: bool) -> Tensor:
    """n pixel centres (n, 2), uniform over the image, or over its middle half."""
    H, W = views.images.shape[1:3]
    u = torch.rand(n, 2, device=views.c2w.device)
    if middle:
        u = 0.25 + 0.5 * u
    return torch.stack([u[:, 0] * W, u[:, 1] * H], 1).floor() + 0.5


def sample_along_rays(fields, rays_o: Tensor, rays_d: Tensor, scene: Scene, args: Args,
                      jitter: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Edges of each ray's intervals for the coarse field and for the fine one, no gradient. Coarse:
    --samples equal steps through the scene's box, whose inner edges all shift by the same part of a
    step, by jitter (R,) in [0, 1) (None: evaluation). Fine: the same and --fine-samples more edges,
    drawn in proportion to the coarse weights."""
    box = ray_box(rays_o, rays_d, scene.aabb, scene.near, scene.far)           # (R, 2)
    edges = resample(box, torch.ones_like(box[:, :1]), args.samples, jitter)   # (R, samples + 1)
    if not args.fine_samples:
        return edges, edges
    with torch.no_grad():
        weights = ray_weights(query(fields["coarse"], rays_o, rays_d, edges)[0], edges)
    inner = resample(edges, weights, args.fine_samples + 1, jitter)[:, 1:-1]
    return edges, torch.cat([edges, inner], 1).sort(1).values


def query(field, rays_o: Tensor, rays_d: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The field in the middles of the intervals between edges (R, S+1) of rays (R, 3): sigmas
    (R, S), all that the two terms need, and features (R S, F)."""
    middle = 0.5 * (edges[:, 1:] + edges[:, :-1])                              # (R, S)
    x = rays_o[:, None] + middle[..., None] * rays_d[:, None]                  # (R, S, 3)
    sigmas, features = field.encode(x.view(-1, 3))
    return sigmas.view_as(middle), features


def render(field, rays_o: Tensor, rays_d: Tensor, edges: Tensor, bg: Tensor) -> dict:
    """Volume rendering (NeRF eq. 3) of rays (R, 3): with delta_i the length of interval i,

        T_i = exp(-sum_{j<i} sigma_j delta_j),    weights_i = T_i (1 - exp(-sigma_i delta_i)),
        rgb = sum_i weights_i rgbs_i + (1 - opacity) bg,    opacity = sum_i weights_i.

    edges (R, S+1), bg (3,) or (R, 3) -> rgb (R, 3), opacity (R,), depth = sum_i weights_i t_i (R,)
    with t_i the middle of interval i, sigmas (R, S).
    """
    R, S = len(edges), edges.shape[1] - 1
    sigmas, features = query(field, rays_o, rays_d, edges)
    rgbs = field.colour(features, rays_d.repeat_interleave(S, 0))
    offsets = torch.arange(R + 1, device=edges.device) * S       # first sample of each ray
    rgb, opacity, depth, _ = composite(sigmas.view(-1), rgbs, edges[:, :-1].reshape(-1),
                                       edges[:, 1:].reshape(-1), offsets)
    return {"rgb": rgb + (1 - opacity[:, None]) * bg, "opacity": opacity, "depth": depth,
            "sigmas": sigmas}


# ------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def render_image(fields, scene: Scene, views: Views, v: int, args: Args, chunk: int = 2048) -> dict:
    """A whole image: rgb (H, W, 3) in [0, 1]; opacity, depth, entropy of p by alpha (H, W)."""
    H, W = views.images.shape[1:3]
    rays_o, rays_d = view_rays(views, v, scene.ndc)
    parts = []
    for o, d in zip(rays_o.split(chunk), rays_d.split(chunk)):
        _, edges = sample_along_rays(fields, o, d, scene, args, None)
        part = render(fields["fine"], o, d, edges, scene.bg)
        parts.append({**part, "entropy": entropy(ray_density(part["sigmas"], edges))})
    out = {key: torch.cat([part[key] for part in parts]).unflatten(0, (H, W))
           for key in ("rgb", "opacity", "depth", "entropy")}
    out["rgb"].clamp_(0, 1)
    return out


def evaluate(fields, scene: Scene, args: Args, views: Optional[int], pictures=None) -> dict:
    """Scores of `views` evenly spaced test images (None: all, of 50 and more some 25, as in paper).
    Means over images: psnr [dB], ssim, psnr_masked inside the object's mask (DTU). Means over
    pixels: opacity, that where alpha is 1 and where it is 0, entropy_bits where opacity > 0.1.
    pictures: folder for strips (target | render | error | depth) and rays.png.
    """
    test, scores = scene.test, {}
    ids = range(0, len(test.names), max(len(test.names) // 25, 1))
    for i in evenly_spaced(len(ids), min(views or len(ids), len(ids))):
        v = ids[i]
        out, target = render_image(fields, scene, test, v, args), test.images[v]
        opacity = out["opacity"]
        found = {"psnr": psnr(out["rgb"], target), "ssim": ssim(out["rgb"], target),
                 "opacity": opacity, "entropy_bits": out["entropy"][opacity > 0.1]}
        if test.mask is not None:
            inside = test.mask[v, ..., None]
            error = (inside * (out["rgb"] - target) ** 2).sum() / (3 * inside.sum())
            found["psnr_masked"] = -10 * torch.log10(error)
        if test.alpha is not None:
            found["opacity_on_object"] = opacity[test.alpha[v] == 1]
            found["opacity_off_object"] = opacity[test.alpha[v] == 0]
        for name, value in found.items():
            scores.setdefault(name, []).append(value.flatten())
        if pictures:
            strip = comparison_strip(target, out["rgb"], out["depth"], scene.near, scene.far)
            save_png(pictures / f"test_{v:03d}.png", strip)
    if pictures:
        save_png(pictures / "rays.png", ray_picture(fields, scene, args))
    scores = {name: torch.cat(values) for name, values in scores.items()}
    return {name: float(values.mean()) for name, values in scores.items() if len(values)}


@torch.no_grad()
def ray_picture(fields, scene: Scene, args: Args) -> Tensor:
    """p on the rays of the middle row of the first test image, as seen from above: one column per
    ray, its camera below, S intervals in the box. Brightness: p over its largest, times the ray's
    opacity.  -> (3 S, 3 W, 3)."""
    H, W = scene.test.images.shape[1:3]
    rays = [ray.view(H, W, 3)[H // 2] for ray in view_rays(scene.test, 0, scene.ndc)]
    _, edges = sample_along_rays(fields, *rays, scene, args, None)
    out = render(fields["fine"], *rays, edges, scene.bg)
    p = ray_density(out["sigmas"], edges)                                      # (W, S)
    brightness = p / p.amax(1, keepdim=True).clamp(min=1e-10) * out["opacity"][:, None]
    picture = colour_map(brightness.T.flip(0), 0, 1)                           # (S, W, 3)
    return picture.repeat_interleave(3, 0).repeat_interleave(3, 1)


# --------------------------------------------------------------------------------------- training

# As the authors chose. DTU: images 22, 25 and 28, as every 8th is a test view. LLFF: camera 0, then
# those farthest from the ones chosen.
DEFAULT_VIEWS = {"blender": (26, 86, 2, 55), "dtu": (19, 21, 24), "llff": ()}


def choose_views(args: Args, scene: Scene) -> list[int]:
    """Indices of the training views: --views, else the authors', and while --num-views asks for
    more, the camera farthest from those chosen; or all at random, by --view-seed."""
    V = len(scene.train.names)
    default = DEFAULT_VIEWS.get(scene.kind, DEFAULT_VIEWS["blender"])
    for v in args.views:
        require(0 <= v < V and args.views.count(v) == 1, f"--views {v}: {scene.name} has {V} "
                f"training views: give indices from 0 to {V - 1}, each once")
    n = args.num_views
    if n is None:
        n = len(args.views) or min(len(default) or 3, V)
    require(1 <= n <= V, f"--num-views {n}: {scene.name} has {V} training views")
    if args.view_seed is not None:
        generator = torch.Generator().manual_seed(args.view_seed)
        return torch.randperm(V, generator=generator)[:n].tolist()
    views = [v for v in args.views or default if v < V][:n] or [0]
    position = scene.train.c2w[:, :, 3]
    while len(views) < n:
        views.append(int(torch.cdist(position, position[views]).amin(1).argmax()))
    return views


def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("rays", "samples", "lr", "lr_final", "entropy_ramp"),
                not_negative=("unseen_rays", "fine_samples", "precrop_steps", "entropy_weight",
                              "kl_weight", "kl_degrees", "mask_threshold"))
    require(args.finest >= 8, f"--finest {args.finest}: the coarsest level has 8 cells a side")
    require(args.view_seed is None or not args.views, "--view-seed: not together with --views")


ADVICE = "use another --entropy-weight, a lower --kl-weight or --lr, or another --seed"


def check_opacity(opacity: Tensor, image_alpha: Optional[Tensor], step: int) -> None:
    """Stop where the field has collapsed, note fog. opacity (R,) of seen rays, image_alpha (R,)
    of their pixels (None: photographs, not checked); not before step 200: fields start as fog.
    on, off: mean opacity where the images show the object, and where they show nothing.
    on < 0.5: the object vanishes. A large lambda_1 lowers all but the largest alpha_i of a ray.
    on - off < 0.1: the object does not stand out of the fog around it.
    off > 0.3: fog beside the object; a note only, as mic without the terms ends so.
    """
    if image_alpha is None or step < 200 or min(image_alpha.sum(), (1 - image_alpha).sum()) < 5:
        return
    on = float((opacity * image_alpha).sum() / image_alpha.sum())
    off = float((opacity * (1 - image_alpha)).sum() / (1 - image_alpha).sum())
    found = f"by step {step}: mean opacity {on:.2f} on the object, {off:.2f} off it"
    require(on >= 0.5, f"the field is emptying {found}: {ADVICE}")
    require(on - off >= 0.1, f"the field is a uniform fog {found}: {ADVICE}")
    if off > 0.3:
        note(f"fog beside the object {found}")


def train(args: Args) -> dict:
    """Train, evaluate, write the run folder; -> what summary.json holds."""
    check(args)
    torch.manual_seed(args.seed)
    scene = load_scene(args.scene, args.data, args.size, args.background, args.normalise)
    scene = replace(scene, train=pick_views(scene.train, choose_views(args, scene)))
    scene = to_device(scene, args.device)
    views, centre = scene.train, scene.aabb.mean(0)
    if scene.ndc and args.entropy_weight:
        note("on forward-facing scenes the entropy may do harm (fern: -2.6 dB): compare "
             "with --entropy-weight 0")
    fields = nn.ModuleDict()
    for name in ["coarse", "fine"] if args.fine_samples else ["fine"]:
        fields[name] = MLPField() if args.field == "mlp" else HashField(scene.aabb, args.finest)
    fields.to(args.device)
    optimiser = torch.optim.Adam(fields.parameters(), lr=args.lr, eps=1e-15, fused=True)
    run = TrainingRun("infonerf", scene, args)
    parts = {"field": fields, "optimiser": optimiser}
    for step in run.loop(parts, partial(evaluate, fields, scene, args), empty=ADVICE):
        decay = args.lr_final ** (step / args.steps)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min((step + 1) / 50, 1) * decay
        # 1. seen rays: pixels of the training views; their colour loss
        view = torch.randint(len(views.names), (args.rays,), device=args.device)
        xy = sample_pixels(args.rays, views, step < args.precrop_steps)
        column, row = xy.long().unbind(-1)
        target, bg = views.images[view, row, column], scene.bg                 # (rays, 3), (3,)
        alpha = None if views.alpha is None else views.alpha[view, row, column]    # (rays,)
        if args.train_background == "random" or alpha is None:     # None: photographs
            target, bg = random_background(target, alpha, bg)
        rays = camera_rays(views, view, xy, scene.ndc)
        jitter = torch.rand(args.rays, device=args.device)
        coarse_edges, edges = sample_along_rays(fields, *rays, scene, args, jitter)
        out = render(fields["fine"], *rays, edges, bg)
        loss = mse = ((out["rgb"] - target) ** 2).mean()
        if "coarse" in fields:
            coarse = render(fields["coarse"], *rays, coarse_edges, bg)
            loss = loss + ((coarse["rgb"] - target) ** 2).mean()
        if alpha is None:                                  # see `beyond the paper`
            loss = loss + 0.1 * ((1 - out["opacity"]) ** 2).mean()
        entropy_loss = kl_loss = torch.zeros(())
        if args.entropy_weight or args.kl_weight:
            # 2. seen and unseen rays, R = 128 + 64 = 192 by default; p of the fine field on them:
            # fog on seen rays can have the right colours, unseen rays see it from the side. (On
            # lego, unseen rays alone, as released, and seen rays alone are within 0.5 dB of both.)
            *unseen, unseen_edges, unseen_sigmas = sample_unseen_rays(fields, scene, args)
            all_o, all_d = (torch.cat(pair) for pair in zip(rays, unseen))     # (R, 3) each
            all_edges = torch.cat([edges, unseen_edges])                       # (R, S + 1)
            sigmas = torch.cat([out["sigmas"], unseen_sigmas])                 # (R, S)
            p = ray_density(sigmas, all_edges, args.ray_density)               # (R, S)
        if args.entropy_weight:
            # 3. the entropy of p where there is opacity
            M = ray_mask(sigmas, all_edges, args.mask_threshold)               # (R,)
            entropy_loss = (M * entropy(p)).mean()
            loss = loss + args.entropy_weight * min(step / args.entropy_ramp, 1) * entropy_loss
        if args.kl_weight:
            # 4. neighbouring rays, with the same edges, and the divergence from them
            neighbours = rotate_rays(all_o, all_d, centre, args.kl_degrees)
            sigmas_q, _ = query(fields["fine"], *neighbours, all_edges)
            q = ray_density(sigmas_q, all_edges, args.ray_density)             # (R, S)
            kl_loss = kl_divergence(p, q).mean()
            loss = loss + args.kl_weight * kl_loss
        # 5. optimise
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        run.log(loss=loss, psnr=-10 * mse.log10(), entropy=entropy_loss, kl=kl_loss,
                opacity=out["opacity"].mean())
        run.count(rays=args.rays)
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            check_opacity(out["opacity"].detach(), alpha, step + 1)
    summary = run.finish(train_views=views.names)
    if args.video:
        cameras = camera_path(views.c2w, scene.ndc, 120).to(args.device)
        path = replace(views, c2w=cameras, K=views.K[:1])
        frames = [render_image(fields, scene, path, v, args)["rgb"] for v in range(120)]
        save_video(run.path / "render.mp4", frames)
    return summary


if __name__ == "__main__":
    cli(PRESETS, train)
