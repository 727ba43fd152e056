"""InfoNeRF: a scene from four pictures, by rays of low entropy (Kim, Seo and Han, CVPR 2022,
arXiv 2112.15399).

Few pictures do not determine a volume. A field can explain each of them by thin fog of the right
colours in front of its camera, and is then wrong from everywhere else. A real ray ends at one
surface. p_i is the share that interval i has of all opacity on a ray, seen or hidden, and InfoNeRF
adds the entropy of p to the loss: low entropy is opacity in few intervals, so no fog. It needs no
colour, so rays of cameras without a picture have it, too. A second term asks that a camera that
moves a little sees nearly the same: the KL divergence of neighbouring rays shall be small.

    p_i = alpha_i / sum_j alpha_j,    alpha_i = 1 - exp(-sigma_i delta_i)      ray_density
    M(r) = 1 if sum_i alpha_i > eps, else 0                                    ray_mask
    H(r) = - sum_i p_i log2 p_i                                                entropy
    D(r) = sum_i p_i log2(p_i / q_i), q of a neighbouring ray                  kl_divergence
    L = mse + lambda_1 mean_r M(r) H(r) + lambda_2 mean_r D(r)           steps 1, 3 and 4 of train

| paper                        | here                                                             |
|------------------------------|------------------------------------------------------------------|
| P(r), P(r~), r~              | p, q (R, S); turn_rays, --kl-degrees                             |
| Q(r) = sum_i alpha_i, eps    | ray_mask, --mask-threshold                                       |
| lambda_1, lambda_2           | --entropy-weight, --kl-weight                                    |

    python infonerf.py --scene lego                                       19.0 dB (100 px, 4 views)
    python infonerf.py --scene lego --entropy-weight 0 --kl-weight 0      17.3 dB
Both print entropy_bits (2.9 of at most 6 with the terms, 3.4 without) and opacity_off_object (0.02,
0.10; 0.3 is fog). The default is ours (see `beyond the paper`), --preset paper the authors'.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
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
    views: tuple[int, ...] = ()
    """Training views by index (default: the authors', see DEFAULT_VIEWS)."""
    num_views: Optional[int] = None
    """Training views by count: the default ones, then those farthest from the ones chosen."""
    view_seed: Optional[int] = None
    """Training views drawn at random, by this seed."""
    entropy_weight: float = 0.005
    """lambda_1, weight of the entropy of a ray [1/bit] (0: off)."""
    ray_density: Literal["alpha", "weight"] = "alpha"
    """What becomes p: the opacities alpha_i, or the weights T_i alpha_i of volume rendering."""
    mask_threshold: float = 0.1
    """eps: a ray whose alphas have no larger sum has no entropy (0: all rays have)."""
    entropy_ramp: int = 375
    """Steps in which lambda_1 grows linearly from 0."""
    kl_weight: float = 0.0035
    """lambda_2, weight of the KL divergence of neighbouring rays [1/bit] (0: off)."""
    kl_degrees: float = 5.0
    """A neighbouring ray is turned by up to so much about each axis [degrees]."""
    rays: int = 128
    """Rays of the training views a step."""
    unseen_rays: int = 64
    """Rays of cameras without a picture a step."""
    samples: int = 64
    """Intervals a ray, S."""
    fine_samples: int = 0
    """Intervals more, where a coarse field has weight (0: there is no coarse field)."""
    precrop_steps: int = 0
    """First steps, whose rays come from the middle half of the pictures."""
    field: Literal["hash", "mlp"] = "hash"
    """A small hash grid, or the paper's MLP of 8 layers."""
    finest: int = 128
    """hash: cells a side of the finest of 6 levels (the coarsest has 8)."""
    lr: float = 2e-2
    """Learning rate of Adam."""
    lr_final: float = 0.1
    """What an exponential decay leaves of it at the last step (it starts with 50 steps warm-up)."""


PRESETS = {         # random backgrounds, SceneArgs' default, would tell the field the outlines
    "quick": Args(steps=1500, eval_every=500, train_background="scene"),
    "paper": Args(preset="paper", size=800, steps=50_000, eval_every=5000, rays=1024,
                  unseen_rays=1024, fine_samples=128, precrop_steps=500, field="mlp",
                  entropy_weight=1e-3, entropy_ramp=1, kl_weight=0.0, lr=5e-4, lr_final=0.794,
                  train_background="scene"),
}       # the authors' KL, on DTU only: --kl-weight 1.4e-5 (2e-5 a nat), halved every 5000 steps


# -------------------------------------------------------------------- where a ray ends: p, M, H, D

def ray_density(sigmas: Tensor, edges: Tensor, by: str = "alpha") -> Tensor:
    """p_i = a_i / (sum_j a_j + 1e-10), the share that interval i has of a ray's opacity.

    sigmas (R, S) [1/length], edges (R, S+1) of the intervals -> p (R, S), rows of sum 1, or of 0 on
    an empty ray. by "alpha": a_i = 1 - exp(-sigma_i delta_i). "weight": a_i = T_i alpha_i.
    Why alpha: behind an opaque surface T is 0, so weights do not see what is there; other cameras
    do. Example: alphas (0, 1, 0, 1), two walls, give p = (0, 1/2, 0, 1/2), 1 bit. By weights it is
    (0, 1, 0, 0), 0 bits, and the second wall stays (lego: 0.6 dB less).
    Why the last interval is finite (rays end where they leave the scene's box): in the released
    code it is 1e10 long, so wherever sigma > 0 its alpha is 1, a wall at infinity in every p.
    """
    if by == "alpha":
        amount = -torch.expm1(-sigmas * edges.diff(dim=1))
    else:
        amount = ray_weights(sigmas, edges)
    return amount / (amount.sum(1, keepdim=True) + 1e-10)


def ray_mask(sigmas: Tensor, edges: Tensor, threshold: float) -> Tensor:
    """M(r) = 1 where sum_i alpha_i > eps, else 0.  (R, S), (R, S+1) -> (R,), no gradient.

    p is normalised: without a mask, a ray through air would be asked to end somewhere, too. The
    field's own alphas decide, as an unseen ray has no picture that tells. A comparison has no
    gradient, so M never pushes a ray towards transparency; it only leaves out rays that are empty.
    Example: eps 0.1: a ray of alphas (0.05, 0.06) counts, one of (0.05, 0.04) adds 0 to the mean.
    Released code: 1 - prod_i (1 - alpha_i) > eps. Neither that nor no mask makes a difference.
    """
    alphas = -torch.expm1(-sigmas.detach() * edges.diff(dim=1))
    return (alphas.sum(1) > threshold).to(alphas)


def entropy(p: Tensor) -> Tensor:
    """H = - sum_i p_i log2(p_i + 1e-10) [bits].  p (R, S) -> (R,).

    0 if the ray ends in one interval, log2 k if in one of k equally likely ones, so at most log2 S,
    in an even fog. Example: p = (1/2, 1/4, 1/4) has 1/2 + 1/2 + 1/2 = 1.5 bits.
    Why lambda_1 depends on S: a ray of length 1 with a wall 1/16 thick, and fog of sigma = 0.5.
        S = 32:  the wall has 2 alphas of 1, the fog 30 that sum to 0.47, 19 % of p. H = 2.4 bits.
        S = 128: the wall has 8 alphas of 1, the fog 120 that sum to 0.47, 6 % of p. H = 3.5 bits.
    dH / dsigma of the fog is 1.8 and 0.8: with more samples, the same lambda_1 acts less on the fog
    and more on the wall, which alone has 1 and 3 bits. Tune --entropy-weight anew with --samples.
    """
    return -(p * torch.log2(p + 1e-10)).sum(1)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """D = sum_i p_i log2(p_i / q_i) [bits], 1e-10 added to all.  (R, S), (R, S) -> (R,).

    p of a ray, q of its neighbour, in intervals equally far along both; gradient to both.
    Example: p = (1/2, 1/2), q = (1/4, 3/4): 1/2 log2 2 + 1/2 log2 2/3 = 0.21 bits.
    Direction: it is large where p has mass and q has none, so where the ray may end, its neighbour
    must be able to end. The other, sum q log(q/p), asks that the ray may end where its neighbour
    does. Pairs occur in both orders, and the direction makes no difference (18.9 and 19.0 dB).
    Empty rays: where sigma is exactly 0 (the MLP), p = 0 asks for nothing; with exp, even air has a
    p of sum 1, which is compared. An empty neighbour (q = 0) costs a ray that ends in one interval
    log2 1e10 = 33 bits, the most there is. A mask made no difference.
    Released code: the other direction, in nats, between samples that are not equally far.
    """
    p, q = p + 1e-10, q + 1e-10
    return (p * torch.log2(p / q)).sum(1)


def turn_rays(rays_o: Tensor, rays_d: Tensor, centre: Tensor, degrees: float
              ) -> tuple[Tensor, Tensor]:
    """Neighbouring rays: each turned about `centre` (3,), the middle of the scene's box, which also
    the unseen cameras circle (released code: the world's origin). A surface lies in about the same
    interval of both rays, as a ray is turned as a whole.  (R, 3) each -> (R, 3) each.

    The rotation vector w is uniform in [-degrees, degrees]^3. With angle a = |w| and k = w / a,
    v' = cos a v + sin a (k x v) + (1 - cos a) (k . v) k  (Rodrigues).
    """
    w = math.radians(degrees) * (2 * torch.rand_like(rays_d) - 1)              # (R, 3)
    angle = w.norm(dim=1, keepdim=True)
    k, cos, sin = w / angle.clamp(min=1e-9), angle.cos(), angle.sin()

    def turn(v):
        along = (k * v).sum(1, keepdim=True)
        return cos * v + sin * torch.linalg.cross(k, v) + (1 - cos) * along * k

    return centre + turn(rays_o - centre), turn(rays_d)


# ------------------------------------------------------ training views, and cameras without any

# As the authors chose. DTU: pictures 22, 25 and 28, as every 8th is a test view.
DEFAULT_VIEWS = {"blender": (26, 86, 2, 55), "dtu": (19, 21, 24), "llff": ()}


def choose_views(args: Args, scene: Scene) -> list[int]:
    """Indices of the training views: --views; or at random, by --view-seed; or the default ones,
    and again and again the camera farthest from those chosen (so sets of views are nested)."""
    V, n = len(scene.train.names), args.num_views
    default = DEFAULT_VIEWS.get(scene.kind, DEFAULT_VIEWS["blender"])
    there = f"{scene.name} has {V} training views"
    if args.views:
        require(n is None and args.view_seed is None,
                "--views names all views: leave --num-views and --view-seed away")
        for v in args.views:
            require(0 <= v < V, f"--views {v}: {there}: give indices from 0 to {V - 1}")
            require(args.views.count(v) == 1, f"--views {v} is given twice: name each view once")
        return list(args.views)
    if n is None:
        n = min(len(default) or 3, V)
    require(1 <= n <= V, f"--num-views {n}: {there}: give a number from 1 to {V}")
    if args.view_seed is not None:
        generator = torch.Generator().manual_seed(args.view_seed)
        return torch.randperm(V, generator=generator)[:n].tolist()
    views = [v for v in default if v < V][:n] or [0]
    position = scene.train.c2w[:, :, 3]
    while len(views) < n:
        views.append(int(torch.cdist(position, position[views]).amin(1).argmax()))
    return views


def unseen_poses(scene: Scene, n: int) -> Tensor:
    """n cameras (n, 3, 4) that took no picture: around the middle of the scene's box, at the mean
    distance of the training cameras, uniform over the upper half of that sphere, where all heights
    are equally likely. Where cameras face one way (DTU, LLFF), between two training cameras each.
    Released code: poses of all splits, the test views' included. Unused training poses do as well.
    """
    c2w, centre = scene.train.c2w, scene.aabb.mean(0)
    V, device = len(c2w), centre.device
    if scene.kind in ("dtu", "llff"):
        i = torch.randint(V, (n,), device=device)
        j = (i + torch.randint(1, max(V, 2), (n,), device=device)) % V         # another one
        pose = torch.lerp(c2w[i], c2w[j], torch.rand(n, 1, 1, device=device))
        up, back, position = pose[:, :, 1:].unbind(-1)                         # (n, 3) each
    else:
        z = 0.98 * torch.rand(n, device=device)                # straight above, `up` is undefined
        turn = 2 * math.pi * torch.rand(n, device=device)
        level = (1 - z * z).sqrt()
        back = torch.stack([level * turn.cos(), level * turn.sin(), z], -1)    # (n, 3) unit
        position = centre + (c2w[:, :, 3] - centre).norm(dim=1).mean() * back
        up = torch.zeros_like(back)
        up[:, 2] = 1
    back = F.normalize(back, dim=-1)
    right = F.normalize(torch.linalg.cross(up, back), dim=-1)
    return torch.stack([right, torch.linalg.cross(back, right), back, position], -1)


def draw_pixels(n: int, views: Views, middle: bool) -> Tensor:
    """n pixel centres (n, 2), uniform over the picture, or over its middle half."""
    H, W = views.images.shape[1:3]
    u = torch.rand(n, 2, device=views.c2w.device)
    if middle:
        u = 0.25 + 0.5 * u
    return torch.stack([u[:, 0] * W, u[:, 1] * H], 1).floor() + 0.5


# --------------------------------------------------------------- the paper's field, and rendering
# A field: encode(x (N, 3)) -> sigmas (N,) [1/length], features (N, F), and
# colour(features, directions (N, 3)) -> rgbs (N, 3) in (0, 1).

class MLPField(nn.Module):
    """NeRF's MLP: 10 frequencies of x -> 8 layers, x again after the fifth -> density; with 4
    frequencies of the direction -> colour."""
    def __init__(self):
        super().__init__()
        inputs = [63, 256, 256, 256, 256, 256 + 63, 256, 256]
        self.layers = nn.ModuleList([nn.Linear(n, 256) for n in inputs])
        self.density, self.feature = nn.Linear(256, 1), nn.Linear(256, 256)
        nn.init.constant_(self.density.bias, 0.1)   # else 4 of 10 seeds are 0, and stay so (ReLU)
        self.shade = nn.Sequential(nn.Linear(256 + 27, 128), nn.ReLU(), nn.Linear(128, 3))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = h = frequencies(x, 10)
        for i, layer in enumerate(self.layers):
            if i == 5:
                h = torch.cat([x, h], -1)
            h = F.relu(layer(h))
        return F.relu(self.density(h)[:, 0]), self.feature(h)

    def colour(self, features: Tensor, d: Tensor) -> Tensor:
        return torch.sigmoid(self.shade(torch.cat([features, frequencies(d, 4)], -1)))


def frequencies(v: Tensor, n: int) -> Tensor:
    """v, sin(2^k v), cos(2^k v), k < n: (N, 3) -> (N, 3 + 6n)."""
    angles = (v[:, None] * 2.0 ** torch.arange(n, device=v.device)[:, None]).flatten(1)
    return torch.cat([v, angles.sin(), angles.cos()], -1)


def query(field, rays_o: Tensor, rays_d: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """The field in the middles of the intervals between edges (R, S+1) of rays (R, 3): sigmas
    (R, S), all that the two terms need, and features (R S, F)."""
    middle = 0.5 * (edges[:, 1:] + edges[:, :-1])                              # (R, S)
    x = rays_o[:, None] + middle[..., None] * rays_d[:, None]                  # (R, S, 3)
    sigmas, features = field.encode(x.view(-1, 3))
    return sigmas.view_as(middle), features


def sample_along_rays(fields, rays_o: Tensor, rays_d: Tensor, scene: Scene, args: Args,
                      jitter: Optional[Tensor]) -> tuple[Tensor, Tensor]:
    """Edges of each ray's intervals in the scene's box, no gradient. For the coarse field --samples
    equal ones; for the fine one these and --fine-samples more, drawn by the coarse weights.
    jitter (R,) in [0, 1) shifts the inner edges; None in evaluation."""
    box = ray_box(rays_o, rays_d, scene.aabb, scene.near, scene.far)           # (R, 2)
    edges = resample(box, torch.ones_like(box[:, :1]), args.samples, jitter)   # (R, samples + 1)
    if not args.fine_samples:
        return edges, edges
    with torch.no_grad():
        weights = ray_weights(query(fields["coarse"], rays_o, rays_d, edges)[0], edges)
    more = resample(edges, weights, args.fine_samples + 1, jitter)[:, 1:-1]
    return edges, torch.cat([edges, more], 1).sort(1).values


def render(field, rays_o: Tensor, rays_d: Tensor, edges: Tensor, bg: Tensor) -> dict:
    """Volume rendering (NeRF eq. 3) of rays (R, 3): with delta_i the length of interval i,

        T_i = exp(-sum_{j<i} sigma_j delta_j),    weights_i = T_i (1 - exp(-sigma_i delta_i)),
        rgb = sum_i weights_i rgbs_i + (1 - opacity) bg,    opacity = sum_i weights_i.

    edges (R, S+1), bg (3,) or (R, 3) -> rgb (R, 3), opacity (R,), depth = sum_i weights_i t_i (R,),
    sigmas (R, S).
    """
    R, S = len(edges), edges.shape[1] - 1
    sigmas, features = query(field, rays_o, rays_d, edges)
    rgbs = field.colour(features, rays_d.repeat_interleave(S, 0))
    offsets = torch.arange(R + 1, device=edges.device) * S       # first sample of each ray
    rgb, opacity, depth, _ = composite(sigmas.view(-1), rgbs, edges[:, :-1].reshape(-1),
                                       edges[:, 1:].reshape(-1), offsets)
    return {"rgb": rgb + (1 - opacity[:, None]) * bg, "opacity": opacity, "depth": depth,
            "sigmas": sigmas}


# ----------------------------------------------------------------------------- beyond the paper
# Ours, and the default, because it earns it (lego, 4 views; without the terms 17.3 dB):
# * A hash grid, which trains in minutes on a CPU, where the MLP needs a GPU.
# * KL at 250 times the authors' weight. An MLP is smooth, a hash grid stores places apart, and the
#   KL ties neighbouring rays together: the paper's terms gain 0.3 dB (seed 0), ours 1.7 (3 seeds).
#   The KL alone ends in an even fog, in which all neighbours agree.
# * lambda_1 at 5 times theirs, against that fog, after a ramp, as early decisions are wrong.
# * Photographs have no alpha, and all their rays end: 0.1 mean (1 - opacity)^2 of seen rays (step 1
#   of train). Else a half-transparent field costs nothing: H does not change if all alphas of a ray
#   are scaled alike. Flower, 6 views, on white and black: 19.8 and 23.6 dB with the scene's
#   background, 22.2 and 23.2 with another pixel's colour behind each ray, 23.0 and 23.1 with both.
# The gain is largest at 4 views: 2, 3, 4, 8, 16 views gain -0.1, 0.4, 1.7, 0.8, 0.0 dB (seed 0):
# 16 pictures suffice, 2 say too little. On mic 2.1 dB (3 seeds); with four other views 2.9 dB on
# lego, 0.8 dB on mic (seed 0). All weights and rates were tuned on lego.

class HashField(nn.Module):
    """Instant-NGP's field, small: hash grid -> MLP -> density and 15 features; these and the view
    direction -> MLP -> colour. The density starts at e^-1, a fog that has a gradient everywhere."""
    def __init__(self, aabb: Tensor, finest: int):
        super().__init__()
        self.levels = hash_levels(6, 8, finest, 16)
        self.register_buffer("aabb", aabb)                                     # (2, 3)
        self.table = nn.Parameter(torch.empty(self.levels.offsets[-1], 4).uniform_(-1e-4, 1e-4))
        self.geometry = nn.Sequential(nn.Linear(6 * 4, 64), nn.ReLU(), nn.Linear(64, 16))
        self.shade = nn.Sequential(nn.Linear(15 + 16, 64), nn.ReLU(), nn.Linear(64, 3))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])                 # (N, 3) in [0, 1]
        h = self.geometry(hash_encode(u, self.table, self.levels))             # (N, 16)
        return truncated_exp(h[:, 0] - 1), h[:, 1:]

    def colour(self, features: Tensor, d: Tensor) -> Tensor:
        return torch.sigmoid(self.shade(torch.cat([features, spherical_harmonics(d)], -1)))


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
    """Scores of `views` evenly spaced test images (None: all, but of 200 every 8th, as the paper).
    Means over images: psnr [dB], ssim, psnr_masked inside the object's mask (DTU). Means over
    pixels: opacity, that where alpha is 1 and where it is 0, entropy_bits where opacity > 0.1.
    pictures: folder for strips (target | render | error | depth) and rays.png.
    """
    test, scores = scene.test, {}
    ids = list(range(0, len(test.names), max(len(test.names) // 25, 1)))
    for i in evenly_spaced(len(ids), min(views or len(ids), len(ids))):
        v = ids[i]
        out, target = render_image(fields, scene, test, v, args), test.images[v]
        opacity = out["opacity"]
        found = {"psnr": psnr(out["rgb"], target), "ssim": ssim(out["rgb"], target),
                 "opacity": opacity, "entropy_bits": out["entropy"][opacity > 0.1]}
        if test.mask is not None:
            mask = test.mask[v, ..., None]
            error = (mask * (out["rgb"] - target) ** 2).sum() / (3 * mask.sum())
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
        save_png(pictures / "rays.png", ray_picture(fields["fine"], scene))
    scores = {name: torch.cat(values) for name, values in scores.items()}
    return {name: float(values.mean()) for name, values in scores.items() if len(values)}


@torch.no_grad()
def ray_picture(field, scene: Scene) -> Tensor:
    """Where the rays of one image row end: the middle row of the first test view from above, a
    column a ray, its camera below. Brightness: alpha in 96 equal intervals over the column's
    largest, times the opacity. White: the true depth, where it is known.  -> (288, 3 W, 3)."""
    views, (H, W) = scene.test, scene.test.images.shape[1:3]
    rays_o, rays_d = (rays.view(H, W, 3)[H // 2] for rays in view_rays(views, 0, scene.ndc))
    box = ray_box(rays_o, rays_d, scene.aabb, scene.near, scene.far).clamp(max=scene.far)  # (W, 2)
    edges = torch.linspace(float(box.min()), float(box.max()), 97, device=box.device).expand(W, 97)
    inside = (edges[:, 1:] > box[:, :1]) & (edges[:, :-1] < box[:, 1:])
    sigmas = inside * query(field, rays_o, rays_d, edges)[0]                   # (W, 96)
    p, opacity = ray_density(sigmas, edges), ray_weights(sigmas, edges).sum(1, keepdim=True)
    picture = colour_map(p / p.amax(1, keepdim=True).clamp(min=1e-10) * opacity, 0, 1)
    if views.depth is not None:
        depth = views.depth[0, H // 2, :, None]
        picture[(depth >= edges[:, :-1]) & (depth < edges[:, 1:])] = 1.0
    return picture.transpose(0, 1).flip(0).repeat_interleave(3, 0).repeat_interleave(3, 1)


# --------------------------------------------------------------------------------------- training

def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("rays", "unseen_rays", "finest", "lr", "lr_final", "entropy_ramp"),
                not_negative=("fine_samples", "precrop_steps", "entropy_weight", "kl_weight",
                              "kl_degrees", "mask_threshold"))
    require(args.samples >= 2, f"--samples {args.samples}: a distribution needs at least 2")
    require(args.finest >= 8, f"--finest {args.finest}: the coarsest level has 8 cells a side")


ADVICE = "use a lower --entropy-weight, --kl-weight or --lr, or another --seed"


def check_opacity(opacity: Tensor, alpha: Tensor, step: int) -> None:
    """Stop where the field has collapsed, note fog. opacity (R,) of seen rays, alpha (R,) of their
    pixels; not before step 200, as every field starts as fog, nor on too few rays.
    on, off: mean opacity where the pictures show the object, and where they show nothing.
    on < 0.5: the object vanishes, which lowers the loss, too, as rays with M = 0 add nothing.
    on - off < 0.1: nothing stands out of the fog, be it thin, thick, or all that is left.
    off > 0.3: fog beside the object; a note only, as without the terms this is how it ends.
    """
    if step < 200 or min(alpha.sum(), (1 - alpha).sum()) < 5:
        return
    on = float((opacity * alpha).sum() / alpha.sum())
    off = float((opacity * (1 - alpha)).sum() / (1 - alpha).sum())
    found = f"by step {step}: mean opacity {on:.2f} on the object, {off:.2f} off it"
    require(on >= 0.5, f"the field is emptying {found}: {ADVICE}")
    require(on - off >= 0.1, f"the field is an even fog {found}: {ADVICE}")
    if off > 0.3:
        note(f"fog beside the object {found}")


def regularised_rays(fields, scene: Scene, args: Args, seen: tuple) -> tuple:
    """The rays of both terms: rays_o, rays_d (R, 3), edges (R, S+1), sigmas (R, S).

    seen: the same of the 128 seen rays; with 64 unseen ones R = 192. Why seen rays, too, as in the
    paper: fog can have the right colour. (Unseen rays alone, as in the released code, did as well.)
    """
    n, device = args.unseen_rays, scene.aabb.device
    K = scene.train.K[torch.randint(len(scene.train.K), (n,), device=device)]
    cameras = replace(scene.train, c2w=unseen_poses(scene, n), K=K)            # one a ray
    xy, ids = draw_pixels(n, cameras, False), torch.arange(n, device=device)
    rays = camera_rays(cameras, ids, xy, scene.ndc)
    _, edges = sample_along_rays(fields, *rays, scene, args, torch.rand(n, device=device))
    unseen = *rays, edges, query(fields["fine"], *rays, edges)[0]
    return tuple(torch.cat(pair) for pair in zip(seen, unseen))


def train(args: Args) -> dict:
    """Train, evaluate, write the run folder; -> what summary.json holds."""
    check(args)
    torch.manual_seed(args.seed)
    scene = load_scene(args.scene, args.data, args.size, args.background, args.normalise)
    scene = replace(scene, train=pick_views(scene.train, choose_views(args, scene)))
    scene = to_device(scene, args.device)
    views, centre = scene.train, scene.aabb.mean(0)
    fields = nn.ModuleDict()
    for name in ["coarse", "fine"] if args.fine_samples else ["fine"]:
        fields[name] = MLPField() if args.field == "mlp" else HashField(scene.aabb, args.finest)
    fields.to(args.device)
    optimiser = torch.optim.Adam(fields.parameters(), lr=args.lr, eps=1e-15, fused=True)
    run = TrainingRun("infonerf", scene, args)
    last = {}                                              # opacity and alpha of the last step

    def score(count, pictures):
        if last and views.alpha is not None:
            check_opacity(last["opacity"], last["alpha"], run.step)
        return evaluate(fields, scene, args, count, pictures)

    parts = {"field": fields, "optimiser": optimiser}
    for step in run.loop(parts, score, empty=ADVICE):
        decay = args.lr_final ** (step / args.steps)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * min((step + 1) / 50, 1) * decay
        # 1. seen rays: pixels of the training views; their colour loss
        view = torch.randint(len(views.names), (args.rays,), device=args.device)
        xy = draw_pixels(args.rays, views, step < args.precrop_steps)
        x, y = xy.long().unbind(-1)
        target, bg, alpha = views.images[view, y, x], scene.bg, None           # (R, 3), (3,)
        if views.alpha is not None:
            alpha = views.alpha[view, y, x]                                    # (R,)
        if args.train_background == "random" or alpha is None:
            target, bg = random_background(target, alpha, bg)
        rays = camera_rays(views, view, xy, scene.ndc)
        jitter = torch.rand(args.rays, device=args.device)
        coarse_edges, edges = sample_along_rays(fields, *rays, scene, args, jitter)
        out = render(fields["fine"], *rays, edges, bg)
        loss = mse = ((out["rgb"] - target) ** 2).mean()
        if "coarse" in fields:
            coarse = render(fields["coarse"], *rays, coarse_edges, bg)
            loss = loss + ((coarse["rgb"] - target) ** 2).mean()
        if alpha is None:
            loss = loss + 0.1 * ((1 - out["opacity"]) ** 2).mean()
        bits = kl = torch.zeros(())
        if args.entropy_weight or args.kl_weight:
            # 2. unseen rays: of cameras without a picture
            seen = *rays, edges, out["sigmas"]
            rays_o, rays_d, edges, sigmas = regularised_rays(fields, scene, args, seen)
            # 3. where all these rays end, and the entropy of that
            p = ray_density(sigmas, edges, args.ray_density)                   # (R, S)
            bits = (ray_mask(sigmas, edges, args.mask_threshold) * entropy(p)).mean()
            loss = loss + args.entropy_weight * min(step / args.entropy_ramp, 1) * bits
        if args.kl_weight:
            # 4. their neighbours, at the same distances, and the divergence
            neighbours = turn_rays(rays_o, rays_d, centre, args.kl_degrees)
            sigmas, _ = query(fields["fine"], *neighbours, edges)
            q = ray_density(sigmas, edges, args.ray_density)                   # (R, S)
            kl = kl_divergence(p, q).mean()
            loss = loss + args.kl_weight * kl
        # 5. optimise
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        run.log(loss=loss, psnr=-10 * mse.log10(), entropy=bits, kl=kl,
                opacity=out["opacity"].mean())
        run.count(rays=args.rays)
        last.update(opacity=out["opacity"].detach(), alpha=alpha)
    summary = run.finish(train_views=views.names)
    if args.video:
        write_film(run.path / "render.mp4", fields, scene, args)
    return summary


def write_film(path, fields, scene: Scene, args: Args) -> None:
    """120 frames along a camera path: colour | depth."""
    cameras, frames = camera_path(scene.train.c2w, scene.ndc, 120).to(args.device), []
    views = replace(scene.train, c2w=cameras, K=scene.train.K[:1])
    for v in range(120):
        out = render_image(fields, scene, views, v, args)
        frames.append(torch.cat([out["rgb"], colour_map(out["depth"], scene.near, scene.far)], 1))
    save_video(path, frames)


if __name__ == "__main__":
    cli(PRESETS, train)
