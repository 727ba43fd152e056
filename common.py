"""What every method needs and none is about: scenes, rays, an occupancy grid, metrics, pictures, the run folder.

Read it once, top to bottom:
    errors and command line | rays | pictures read from disk | Blender scenes | LLFF scenes | DTU scenes |
    the built-in scene | scene look-up | video scenes | the built-in video | families of many scenes | the built-in family |
    occupancy grid | spherical harmonics | metrics | camera paths and pictures | run folder | commands

Conventions. Camera to world `c2w` (3, 4) has OpenGL axes: x right, y up, the camera looks along -z. `K` (3, 3) speaks of
pixels of the images that were really loaded; the centre of the pixel in row i, column j is x = j + 0.5, y = i + 0.5. Ray
directions are unit vectors, so a distance t along a ray is metric.

    python common.py compare runs/a runs/b       # a table and one picture; with --curves FILE.svg PSNR against cost
    python common.py download lego               # a real scene -> data/nerf_synthetic/lego
    python common.py bricks --out data/bricks    # the built-in scene, written as files
    python common.py cars --out data/cars        # some of the built-in family, the same
"""
import colorsys
import contextlib
import html
import http.client
import io
import json
import math
import os
import platform
import random
import re
import shutil
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Callable

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

torch.set_flush_denormal(True)          # gradients of hidden samples, below 1e-38, count as 0: a CPU takes a hundred cycles for each of them


# ---------------------------------------------------------------------------------------------- errors and command line

class UserError(Exception):
    """Something the person at the keyboard can mend. The message is one line: what, where, what to do."""


def check_flags(args, positive=(), not_negative=(), shares=()) -> None:
    """Raise UserError for a flag that makes no sense. args: a dataclass with size, seed, device, eval_only, out; the others: names of its
    fields that must lie in (0, inf), [0, inf), [0, 1]."""
    for names, good, rule in ((("size", *positive), lambda x: 0 < x < math.inf, "must be greater than 0"),
                              (not_negative, lambda x: 0 <= x < math.inf, "must be 0 or more"),
                              (shares, lambda x: 0 <= x <= 1, "is a share: give a number from 0 to 1")):
        for name in names:
            if not good(getattr(args, name)):
                raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)} {rule}")
    if args.size < 11:
        raise UserError(f"--size {args.size}: SSIM's window needs pictures of at least 11 pixels")
    if not 0 <= args.seed < 2 ** 32:
        raise UserError(f"--seed {args.seed}: give a number from 0 to 2^32 - 1")
    if args.eval_only and args.out is None:
        raise UserError("--eval-only needs --out DIR, the folder of a trained run")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {args.device} is not to be had here: use --device cpu, or install a CUDA build of torch") from None


def spread(count: int, n: int) -> list[int]:
    """n whole numbers from 0 to count - 1, evenly spaced, both ends among them."""
    return torch.linspace(0, count - 1, n).round().long().tolist()


def check_finite(loss: Tensor, step: int) -> None:
    """Raise UserError if `loss` is NaN or infinite. Call it before the step is taken, so that the last checkpoint stays good."""
    if not torch.isfinite(loss).all():
        raise UserError(f"loss is not finite at step {step}; the last checkpoint is kept: lower the learning rate, then --resume")


def check_not_empty(acc: Tensor, step: int) -> None:
    """Raise UserError if rays see next to nothing: accumulated opacity `acc` (R,), mean below 1/1000.

    On a background of the pictures' own colour an empty field is a minimum that gradients do not leave: no density, no gradient.
    Call it after the first few hundred steps, before the checkpoint is written.
    """
    acc = acc.detach()
    if acc.mean() < 1e-3:
        raise UserError(f"the field is empty at step {step} (mean opacity {float(acc.mean()):.1e}) and will stay so: use a lower --lr, "
                        "a longer --lr-warmup, or another --seed")


def cli(presets: dict, main: Callable) -> None:
    """Read `--preset NAME` first, then every other flag over that preset, and call main(args).

    presets: name -> instance of one dataclass; "quick" is the default. With --resume or --eval-only a run's own args.json stands
    before the words of the command line, so that `--out DIR --resume` is enough. Bad flags and UserError end as one line on stderr
    with exit status 2, Ctrl-C as one line with status 130. A traceback that you do see is a bug of ours.
    """
    def parse():
        rest, name = [], None
        words = iter(sys.argv[1:])
        for word in words:
            if word == "--preset":
                name = next(words, "")
            elif word.startswith("--preset="):
                name = word.split("=", 1)[1]
            else:
                rest.append(word)
        given = read(rest, "quick" if name is None else name)
        if (getattr(given, "resume", False) or getattr(given, "eval_only", False)) and given.out is not None:
            path = Path(given.out) / "args.json"
            saved = _saved_args(path, {f.name for f in fields(given)})
            if saved:
                was = saved.pop("preset", "quick")
                if name not in (None, was):
                    raise UserError(f"{path}: of another run: preset was {was}, now {name}: give the same preset, or another --out")
                given = read(_words_of(saved) + rest, was)
        return given

    def read(words, name):
        if name not in presets:
            raise UserError(f"--preset {name or '(nothing)'} does not exist: choose one of {', '.join(presets)}")
        about = (type(presets[name]).__doc__ or "") + f"\n\n--preset {{{','.join(presets)}}} (now: {name}) sets all defaults at once."
        return tyro.cli(type(presets[name]), args=words, default=presets[name], description=about)
    _one_line_errors(parse, main)


def _saved_args(path: Path, known: set[str]) -> dict:
    """What a run's args.json says of `known` flags, {} where there is none: not where it ran (--device), nor data that has moved since."""
    if not path.is_file():
        return {}
    try:
        saved = {name: value for name, value in json.loads(path.read_text()).items() if name in known - {"out", "resume", "eval_only", "device"}}
        if "data" in saved and not Path(saved["data"]).is_dir():
            del saved["data"]
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{path}: not a run's args.json: start afresh with another --out") from None
    return saved


def _words_of(args: dict) -> list[str]:
    """The command line that says the same."""
    words = []
    for name, value in args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(str, value)]
        else:
            words.append(f"--{flag}={value}")
    return words


def _one_line_errors(parse: Callable, main: Callable) -> None:
    try:
        complaint = io.StringIO()
        try:
            with contextlib.redirect_stderr(complaint):
                args = parse()
        except SystemExit as stop:
            if not stop.code:                      # --help
                raise
            lines = [re.sub("[─-╿]", " ", line).strip() for line in complaint.getvalue().splitlines()]  # a box drawn by tyro
            lines = [line for line in lines if line and "--help" not in line and line != "Parsing error"]
            words = " ".join(" ".join(lines).split()).replace("For full helptext, run:", "").strip()
            raise UserError(f"{words} (--help lists the flags)") from None
        main(args)
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------- rays

def pixel_rays(xy: Tensor, K: Tensor, c2w: Tensor) -> tuple[Tensor, Tensor]:
    """Rays through image points: d = R [(x - cx)/fx, -(y - cy)/fy, -1], normalised; o = the camera's position.

    xy (R, 2): x to the right, y down, in pixels. K (3, 3) or (R, 3, 3), c2w (R, 3, 4).
    -> rays_o (R, 3), rays_d (R, 3) unit. Differentiable in xy, K and c2w.
    Pocket check: the middle of the image, (cx, cy), looks along minus the third column of c2w.
    """
    x = (xy[:, 0] - K[..., 0, 2]) / K[..., 0, 0]
    y = (xy[:, 1] - K[..., 1, 2]) / K[..., 1, 1]
    d = torch.stack([x, -y, -torch.ones_like(x)], -1)                   # (R, 3) in the camera's axes
    d = (c2w[..., :3] * d[..., None, :]).sum(-1)                        # (R, 3) in the world's
    return c2w[..., 3].expand_as(d), F.normalize(d, dim=-1)


def ndc_rays(rays_o: Tensor, rays_d: Tensor, K: Tensor, H: int, W: int, near: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rays of a forward-facing scene in normalised device coordinates (NeRF, appendix C).

    A point (x, y, z), z < 0, goes to (-2fx/W x/z, -2fy/H y/z, 1 + 2 near/z): the plane z = -near becomes -1, infinity
    becomes +1, and straight lines stay straight. Origins are first moved onto the near plane; directions come back
    normalised, so t measures distance in NDC and a ray ends where it leaves the box at z = 1.
    rays_o, rays_d (R, 3), K (3, 3) or (R, 3, 3) with its principal point in the middle -> (R, 3), (R, 3) unit.
    """
    rays_o = rays_o - ((near + rays_o[:, 2]) / rays_d[:, 2])[:, None] * rays_d
    ax, ay = -2 * K[..., 0, 0] / W, -2 * K[..., 1, 1] / H
    (ox, oy, oz), (dx, dy, dz) = rays_o.unbind(-1), rays_d.unbind(-1)
    o = torch.stack([ax * ox / oz, ay * oy / oz, 1 + 2 * near / oz], -1)
    d = torch.stack([ax * (dx / dz - ox / oz), ay * (dy / dz - oy / oz), -2 * near / oz], -1)
    return o, F.normalize(d, dim=-1)


def pixel_grid(H: int, W: int, device=None) -> Tensor:
    """Centres of all pixels, row by row: (H*W, 2) as (x, y)."""
    y, x = torch.meshgrid(torch.arange(H, device=device) + 0.5, torch.arange(W, device=device) + 0.5, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


# ------------------------------------------------------------------------------------------------------ scenes: what one is

@dataclass
class Views:
    """A set of posed pictures."""
    images: Tensor          # (V, H, W, 3) in [0, 1], already blended onto the scene's background
    c2w: Tensor             # (V, 3, 4)
    K: Tensor               # (3, 3) or (V, 3, 3)
    alpha: Tensor | None    # (V, H, W); None where the pictures have none
    depth: Tensor | None    # (V, H, W) distance along the unit ray through the pixel's centre; 0 = nothing hit; built-in scenes
    names: list[str]
    mask: Tensor | None = None   # (V, H, W) in [0, 1], the object; DTU (pictures are not blended with it)


@dataclass
class Scene:
    """Training and test views, and the space that they look at."""
    name: str
    kind: str               # "blender" | "llff" | "dtu" | "builtin"
    train: Views
    test: Views
    aabb: Tensor            # (2, 3) the box in which a field has to live
    near: float             # rays start and end here; metric (in NDC where ndc is set)
    far: float
    bg: Tensor              # (3,)
    ndc: bool


def K_of(views: Views, view) -> Tensor:
    """Intrinsics of view(s), an index or a tensor of them: (3, 3), also where all views share one matrix, or (..., 3, 3)."""
    return views.K if views.K.dim() == 2 else views.K[view]


def view_rays(views: Views, v: int, ndc: bool) -> tuple[Tensor, Tensor]:
    """All rays of view v, row by row: rays_o, rays_d (H*W, 3), in NDC where `ndc` is set."""
    H, W = views.images.shape[1:3]
    K = K_of(views, v)
    xy = pixel_grid(H, W, views.c2w.device)
    rays_o, rays_d = pixel_rays(xy, K, views.c2w[v].expand(len(xy), 3, 4))
    return ndc_rays(rays_o, rays_d, K, H, W) if ndc else (rays_o, rays_d)


def to_device(thing, device):
    """A Scene or Views with all its tensors on `device` (a new object; tensors already there are shared)."""
    moved = {f.name: getattr(thing, f.name) for f in fields(thing)}
    for name, value in moved.items():
        if isinstance(value, Tensor):
            moved[name] = value.to(device)
        elif is_dataclass(value):
            moved[name] = to_device(value, device)
    return replace(thing, **moved)


def join_views(a: Views, b: Views) -> Views:
    """The views of a, then those of b (same image size). K becomes (V, 3, 3) where the two differ."""
    if a.images.shape[1:] != b.images.shape[1:]:
        raise UserError(f"{b.names[0]}: {_wh(b.images[0])} px, but {a.names[0]} has {_wh(a.images[0])}: one size per scene, please")
    both = lambda x, y: None if x is None or y is None else torch.cat([x, y])
    K = a.K if a.K.dim() == 2 and torch.equal(a.K, b.K) else torch.cat([v.K.expand(len(v.names), 3, 3) for v in (a, b)])
    return Views(both(a.images, b.images), both(a.c2w, b.c2w), K, both(a.alpha, b.alpha), both(a.depth, b.depth), a.names + b.names,
                 both(a.mask, b.mask))


def pick_views(views: Views, ids: list[int]) -> Views:
    """The views with these indices, in this order; [] gives a Views without any."""
    pick = lambda x: None if x is None else x[ids]
    return Views(pick(views.images), pick(views.c2w), K_of(views, ids), pick(views.alpha), pick(views.depth),
                 [views.names[i] for i in ids], pick(views.mask))


def hold_out(views: Views, where) -> tuple[Views, Views]:
    """Training views, and every 8th (0, 8, ...) held out as test views. UserError if nothing is left to train on."""
    n = len(views.names)
    if n < 2:
        raise UserError(f"{where}: one view only: every 8th is held out, nothing is left to train on")
    return pick_views(views, [i for i in range(n) if i % 8]), pick_views(views, list(range(0, n, 8)))


def _wh(image) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"


# ------------------------------------------------------------------------------------------------ pictures read from disk

def area_weights(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): the share of output cell i that input cell j covers; rows sum to 1.

    Output cell i spans [i, i+1) * n_in / n_out. Averaging over areas is exact at any ratio, while sampling a large picture
    at few points would turn fine texture into noise that no field can fit.
    """
    edges = np.arange(n_out + 1) * (n_in / n_out)
    cells = np.arange(n_in)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (overlap.clip(0) * (n_out / n_in)).astype(np.float32)


def area_average(image: np.ndarray, down: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(H, W, C) -> (h, w, C) with down = area_weights(H, h), right = area_weights(W, w)."""
    (h, H), (w, W), C = down.shape, right.shape, image.shape[2]
    if H % h == 0 and W % w == 0:
        return image.reshape(h, H // h, W * C).mean(1).reshape(h, w, W // w, C).mean(2)    # whole blocks: the same, sooner
    image = (down @ image.reshape(H, W * C)).reshape(h, W, C)           # rows first: the large product is contiguous
    return right @ image                                                # (w, W) @ (h, W, C) -> (h, w, C)


def fit_size(H: int, W: int, size: int | None, where) -> tuple[int, int]:
    """(h, w) whose longer side is `size` (None: unchanged). UserError if that would enlarge the picture."""
    if size is None:
        return H, W
    if size < 1:
        raise UserError(f"--size {size} must be at least 1 pixel")
    if size > max(H, W):
        raise UserError(f"{where}: pictures are {W}x{H}, smaller than --size {size}: ask for at most {max(H, W)}")
    return max(1, round(H * size / max(H, W))), max(1, round(W * size / max(H, W)))


def read_image(path: Path) -> np.ndarray:
    """(H, W, 3 or 4) float32 in [0, 1]. UserError naming the file if it is missing or broken."""
    if not path.is_file():
        raise UserError(f"{path}: image not found: restore the file, or remove its frame from the transforms")
    try:
        image = iio.imread(path, plugin="pillow")
    except Exception as error:                 # Pillow has a dozen ways to say that a file is cut short or is no picture
        raise UserError(f"{path}: not a readable image ({str(error).splitlines()[0] if str(error) else type(error).__name__}): "
                        "copy or download the file again") from None
    top = np.float32(np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1)
    image = image / top
    if image.ndim == 2:
        image = image[..., None]
    if image.shape[-1] in (1, 2):              # grey, grey with alpha
        image = np.concatenate([image[..., :1]] * 3 + [image[..., 1:]], -1)
    return image


def read_images(paths: list[Path], size: int | None, bg: Tensor, square: bool = False) -> tuple[Tensor, Tensor | None, tuple[int, int]]:
    """Read, shrink, blend onto bg: images (V, h, w, 3), alpha (V, h, w) or None, and the size (H, W) of the files. square: of each picture
    the central square alone.

    The average of c * alpha is what a camera with larger pixels would see; averaging c itself would let the meaningless
    colour of transparent pixels bleed into edges. So: premultiply, average, then add (1 - alpha) bg.
    """
    first = read_image(paths[0])
    H, W = first.shape[:2]
    top, left, rows, cols = ((H - min(H, W)) // 2, (W - min(H, W)) // 2, min(H, W), min(H, W)) if square else (0, 0, H, W)
    h, w = fit_size(rows, cols, size, paths[0])
    down, right = area_weights(rows, h), area_weights(cols, w)
    images = np.empty((len(paths), h, w, 3), np.float32)
    alphas = np.ones((len(paths), h, w), np.float32)
    back = bg.numpy()

    def load(v):
        image = first if v == 0 else read_image(paths[v])
        if image.shape[:2] != (H, W):
            raise UserError(f"{paths[v]}: {_wh(image)} px, but {paths[0].name} has {W}x{H}: all images of a scene must agree")
        image = image[top:top + rows, left:left + cols]
        has_alpha = image.shape[2] == 4
        if has_alpha:
            image[..., :3] *= image[..., 3:]
        image = area_average(image, down, right)
        images[v] = image[..., :3]
        if has_alpha:
            alphas[v] = image[..., 3].clip(0, 1)
            images[v] += (1 - alphas[v])[..., None] * back
        np.clip(images[v], 0, 1, out=images[v])
        return has_alpha

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:       # decoding runs outside Python's lock
        has_alpha = list(pool.map(load, range(len(paths))))
    return torch.from_numpy(images), torch.from_numpy(alphas) if any(has_alpha) else None, (H, W)


def _intrinsics(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float32)


# ------------------------------------------------------------------------------------------------------- Blender scenes

def load_blender(folder: Path, split: str, size: int | None, bg: Tensor) -> Views:
    """One split of a folder with transforms_{split}.json: the synthetic scenes of NeRF, and what Blender, instant-ngp or
    nerfstudio write in that form.

    The focal length is 0.5 W / tan(camera_angle_x / 2), or fl_x (and fl_y, cx, cy in pixels of w x h) where the file has it.
    Raises UserError for everything that can be wrong with such a folder.
    """
    path = folder / f"transforms_{split}.json"
    if not path.is_file():
        raise UserError(f"{path}: not found: the {split} split needs it")
    try:
        meta = json.loads(path.read_text())
        frames = meta["frames"]
        files = [folder / frame["file_path"] for frame in frames]
        poses = [frame["transform_matrix"] for frame in frames]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a transforms file ({type(error).__name__}: {error}): download the scene again") from None
    if not frames:
        raise UserError(f"{path}: has no frames: list at least one image")
    for v, pose in enumerate(poses):
        try:
            poses[v] = np.asarray(pose, np.float64)
        except (ValueError, TypeError):
            poses[v] = np.zeros(0)
        if poses[v].shape != (4, 4) or not np.isfinite(poses[v]).all():
            raise UserError(f"{path}: frame {v} ({frames[v]['file_path']}): transform_matrix must be 4x4 finite numbers: mend or remove the frame")
    for v, file in enumerate(files):           # the official files leave the extension out
        if not file.is_file():
            files[v] = next((f for f in (file.with_name(file.name + e) for e in (".png", ".jpg", ".jpeg")) if f.is_file()), file)
    images, alpha, (H, W) = read_images(files, size, bg)
    try:
        if "fl_x" in meta:
            fx = float(meta["fl_x"])
            fy = float(meta.get("fl_y", fx))
            w, h = float(meta.get("w", W)), float(meta.get("h", H))
            cx, cy = float(meta.get("cx", w / 2)), float(meta.get("cy", h / 2))
        else:
            w, h = W, H
            fx = fy = 0.5 * W / math.tan(0.5 * float(meta["camera_angle_x"]))
            cx, cy = W / 2, H / 2
        if not all(math.isfinite(n) for n in (fx, fy, cx, cy)) or min(fx, fy, w, h) <= 0:
            raise ValueError(f"focal lengths {fx:.4g}, {fy:.4g}")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path}: camera_angle_x (radians) or fl_x (pixels) is missing or unusable ({error}): mend the file") from None
    sx, sy = images.shape[2] / w, images.shape[1] / h
    c2w = torch.tensor(np.stack(poses)[:, :3], dtype=torch.float32)
    return Views(images, c2w, _intrinsics(fx * sx, fy * sy, cx * sx, cy * sy), alpha, None, [f["file_path"] for f in frames])


# ---------------------------------------------------------------------------------------------------------- LLFF scenes

def load_llff(folder: Path, size: int | None, bg: Tensor) -> tuple[Views, Views]:
    """Train and test views of a forward-facing scene: images_K/ and poses_bounds.npy. Every 8th view is held out.

    A row of poses_bounds.npy holds a 3x5 matrix [R | position | (H, W, focal)] and the nearest and farthest depth. Its
    axes are [down, right, backwards]. As in NeRF, the world is scaled so that the nearest depth is 1/0.75 (NDC's near plane
    at 1 then lies safely before all content), and moved so that the mean camera is the identity.
    Folder: the smallest whose longer side reaches `size`, then averaged down to it; with size None images_8, else the
    smallest there is. The full-size images/ may be missing.
    """
    c2w, hwf = llff_poses(folder / "poses_bounds.npy")
    choices = []                                                        # (longer side, folder name, files)
    for sub in [folder / "images", *sorted(folder.glob("images_*"))]:
        files = sorted(f for f in sub.glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg"))
        if files:
            choices.append((max(read_image(files[0]).shape[:2]), sub.name, files))
    if not choices:
        raise UserError(f"{folder}: no images/ or images_K/ with PNG or JPG files beside poses_bounds.npy")
    choices.sort(key=lambda c: c[0])
    default = next((c for c in choices if c[1] == "images_8"), choices[0])
    _, name, files = default if size is None else next((c for c in choices if c[0] >= size), choices[-1])
    if len(files) != len(c2w):
        raise UserError(f"{folder / name}: {len(files)} images, but poses_bounds.npy has {len(c2w)} poses: they must match one to one")
    images, alpha, _ = read_images(files, size, bg)
    (H, W, focal), (h, w) = hwf[0], images.shape[1:3]
    K = _intrinsics(focal * w / W, focal * h / H, w / 2, h / 2)
    return hold_out(Views(images, c2w, K, alpha, None, [f"{name}/{file.name}" for file in files]), folder)


def llff_poses(path: Path) -> tuple[Tensor, np.ndarray]:
    """Cameras of a poses_bounds.npy: c2w (N, 3, 4), scaled and moved as load_llff says; H, W, focal (N, 3) of the full-size pictures."""
    try:
        rows = np.load(path).astype(np.float64)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: not a readable array ({error}): copy or download it again") from None
    if rows.ndim != 2 or rows.shape[1] != 17 or len(rows) == 0 or not np.isfinite(rows).all():
        raise UserError(f"{path}: expected (N, 17) finite numbers, found {rows.shape}: run COLMAP/LLFF's imgs2poses again")
    matrix, bounds = rows[:, :15].reshape(-1, 3, 5), rows[:, 15:]
    if bounds.min() <= 0 or matrix[:, :, 4].min() <= 0:
        raise UserError(f"{path}: depths, image sizes and focal lengths must be positive: run COLMAP/LLFF's imgs2poses again")
    right, up, back, position = matrix[:, :, 1], -matrix[:, :, 0], matrix[:, :, 2], matrix[:, :, 3]
    position = position / (bounds.min() * 0.75)
    mean = np.eye(4)
    mean[:3] = look_at(position.mean(0), position.mean(0) - back.sum(0), up.sum(0))
    c2w = np.tile(np.eye(4), (len(rows), 1, 1))
    c2w[:, :3] = np.stack([right, up, back, position], -1)
    return torch.tensor((np.linalg.inv(mean) @ c2w)[:, :3], dtype=torch.float32), matrix[:, :, 4]


def look_at(position, target, up=(0, 0, 1)) -> np.ndarray:
    """(3, 4) float64 camera to world: at `position`, looking at `target`, with `up` upwards in the picture."""
    position, up = np.asarray(position, np.float64), np.asarray(up, np.float64)
    back = position - target
    back = back / np.linalg.norm(back)
    right = np.cross(up, back)
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, position], -1)


# ----------------------------------------------------------------------------------------------------------- DTU scenes

def load_dtu(folder: Path, size: int | None, bg: Tensor) -> Views:
    """All views, by index, of a DTU scan as IDR and pixelNeRF store it: image/, cameras.npz and, where there is one, mask/.

    For view i cameras.npz holds world_mat_i (4, 4), whose first three rows take the world (mm) to pixels, and scale_mat_i =
    [s I, c; 0, 1], the same for all. We live in X' = (X - c) / s, where the object lies in the unit sphere; X = s X' + c, so
    P = (world_mat scale_mat)[:3] projects X'. P = m K [R | -R C] for any m != 0; det(P[:, :3]) > 0 makes m positive. The
    inverse of P[:, :3] = (m K) R is R^T times an upper triangle, which is what QR finds: that is the RQ decomposition.
    There, pixel centres are integers (ours: + 0.5), and axes are x right, y down, z ahead (ours: y up, z backwards).
    K (V, 3, 3) has no skew, since rays know none: below 1e-3 fx (scan24: 2e-7) it is dropped, above refused. alpha and depth
    are None; mask is the grey of mask/, averaged like the pictures, or None. Raises UserError for everything else that can
    be wrong with such a folder.
    """
    path, again = folder / "cameras.npz", "copy or download it again"
    try:
        with np.load(path) as file:                                     # pickled objects are not loaded: they could run code
            found = {key: np.asarray(file[key]) for key in file.files if re.fullmatch(r"(world|scale)_mat_\d+", key)}
    except Exception as error:                 # a zip archive of arrays can be broken in a dozen ways, each with its own exception
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: not a readable archive of arrays ({why}): {again}") from None
    n = 1 + max((int(key.rsplit("_", 1)[1]) for key in found), default=0)
    for key in (f"{kind}_mat_{i}" for i in range(n) for kind in ("world", "scale")):
        if key not in found:
            raise UserError(f"{path}: {key} is missing: views 0 to {n - 1} need a world_mat and a scale_mat each: {again}")
        if found[key].shape != (4, 4) or found[key].dtype.kind not in "fiu" or not np.isfinite(found[key]).all():
            raise UserError(f"{path}: {key} must be 4x4 finite numbers, found {found[key].dtype} {found[key].shape}: {again}")
    world, scale = (np.stack([found[f"{kind}_mat_{i}"] for i in range(n)]).astype(np.float64) for kind in ("world", "scale"))
    for i, S in enumerate(scale):
        s = S[0, 0]
        if not (s > 0 and S[3, 3] == 1 and np.allclose(S[:, :3], s * np.eye(4, 3), atol=1e-6 * s)):
            raise UserError(f"{path}: scale_mat_{i} must be [s I, c; 0, 1], one positive scale and a shift: {again}")
        if not np.allclose(S, scale[0], atol=1e-6 * s):
            raise UserError(f"{path}: scale_mat_{i} differs from scale_mat_0, but all views must share one world: {again}")
    pictures = lambda sub: sorted((f for f in (folder / sub).glob("*") if f.suffix.lower() in (".png", ".jpg", ".jpeg")),
                                  key=lambda f: (len(f.stem), f.stem))  # by index, also where 10.png follows 9.png
    files, masks = pictures("image"), pictures("mask")
    if not files:
        raise UserError(f"{folder / 'image'}: no PNG or JPG files there: put the pictures of the views of {path.name} into it")
    for sub, there in (("image", files), ("mask", masks)):
        if there and len(there) != n:
            raise UserError(f"{folder / sub}: {len(there)} files, but {path.name} has {n} cameras: they must match one to one")

    P = (world @ scale)[:, :3]
    for i in np.flatnonzero(~(np.linalg.cond(P[:, :, :3]) < 1e8)):      # NaN too
        raise UserError(f"{path}: world_mat_{i} is singular, which no camera is: {again}")
    inverse = np.linalg.inv(P[:, :, :3])
    C = -inverse @ P[:, :, 3:]                                          # (n, 3, 1), the same for P and -P
    q, u = np.linalg.qr(inverse * np.sign(np.linalg.det(inverse))[:, None, None])
    sign = np.sign(np.diagonal(u, axis1=1, axis2=2))                    # QR leaves these open; with them K's diagonal is positive
    q, K = q * sign[:, None], np.linalg.inv(u * sign[:, :, None])       # q = R^T: columns right, down, ahead
    K = K / K[:, 2:, 2:]
    for i in np.flatnonzero(abs(K[:, 0, 1]) > 1e-3 * K[:, 0, 0]):
        raise UserError(f"{path}: world_mat_{i} has skew {K[i, 0, 1]:.3g} px (fx {K[i, 0, 0]:.4g}), rays here none: rectify the pictures")

    images, _, (H, W) = read_images(files + masks, size, bg)            # together: all must have one size
    h, w = images.shape[1:3]
    K[:, 0, 1] = 0
    K[:, :2, 2] += 0.5
    K[:, :2] *= np.array([w / W, h / H])[:, None]
    c2w = np.concatenate([q * [1, -1, -1], C], -1)
    return Views(images[:n], torch.tensor(c2w, dtype=torch.float32), torch.tensor(K, dtype=torch.float32), None, None,
                 [f"image/{file.name}" for file in files], images[n:, ..., 0] if masks else None)


# ------------------------------------------------------------------------------------------ built-in scenes: a ray-caster

@dataclass
class Primitive:
    """A box, cylinder (axis: its own z) or ball, in metres, stretched by `half`, turned by `rotation`, moved to `centre`."""
    kind: str                                   # "box" | "cylinder" | "ball"
    centre: tuple                               # (3,)
    half: tuple                                 # half the extent along its own x, y, z (radius, radius, half the height)
    colour: tuple                               # (3,) in [0, 1]
    rotation: np.ndarray | None = None          # (3, 3), columns: its own axes in the world; None: not turned
    pattern: str = "plain"                      # "plain" | "checker" | "stripes" (diagonal), with `colour2`
    colour2: tuple = (1.0, 1.0, 1.0)
    period: float = 0.1                         # of the pattern: side of a square, width of a stripe


class _Packed:
    """The same as tensors, one row a primitive."""
    def __init__(self, primitives: list[Primitive]):
        rows = lambda values: torch.tensor(np.array(values), dtype=torch.float32)
        self.is_kind = {kind: torch.tensor([p.kind == kind for p in primitives]) for kind in ("box", "cylinder", "ball")}     # (P,) bool each
        self.centre, self.half = rows([p.centre for p in primitives]), rows([p.half for p in primitives])
        self.period = rows([p.period for p in primitives])
        self.rotation = rows([np.eye(3) if p.rotation is None else p.rotation for p in primitives])                           # (P, 3, 3)
        self.turn = self.rotation.mT / self.half[:, :, None]            # from the world's axes to its own, in units of `half`
        self.colours = rows([[p.colour, p.colour2] for p in primitives])                                                      # (P, 2, 3)
        self.pattern = torch.tensor([("plain", "checker", "stripes").index(p.pattern) for p in primitives])


def _interval(kind: str, o: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Where the line o + t d is inside the unit shape: [t_in, t_out], empty if t_in > t_out. o, d (..., 3, n).

    All three shapes are convex, so one interval says it all; a cylinder is a round tube met by the slab |z| <= 1.
    """
    if kind == "box":
        inv = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
        a, b = (-1 - o) * inv, (1 - o) * inv
        return torch.minimum(a, b).amax(-2), torch.maximum(a, b).amin(-2)
    (ox, oy, oz), (dx, dy, dz) = o.unbind(-2), d.unbind(-2)             # |o + t d|^2 = 1, for a cylinder in x and y only
    a, b = dx * dx + dy * dy + 1e-12, ox * dx + oy * dy                 # 1e-12: for d along z
    aside = (ox * dy - oy * dx) ** 2 + 1e-12 * (ox * ox + oy * oy)
    if kind == "ball":
        a, b, aside = a + dz * dz, b + oz * dz, aside + (oy * dz - oz * dy) ** 2 + (oz * dx - ox * dz) ** 2
    root = (a - aside).sqrt()                                           # NaN: a miss. Not b^2 - a (|o|^2 - 1), which is equal,
                                                                        # but for a thin rod far away nothing but rounding error
    t_in, t_out = ((-b - root) / a).nan_to_num(1.0), ((-b + root) / a).nan_to_num(-1.0)
    if kind == "cylinder":
        z_in, z_out = _interval("box", o[..., 2:, :], d[..., 2:, :])
        t_in, t_out = torch.maximum(t_in, z_in), torch.minimum(t_out, z_out)
    return t_in, t_out


def first_hit(shapes: _Packed, rays_o: Tensor, rays_d: Tensor, packet: int) -> tuple[Tensor, Tensor]:
    """Distance to the first surface (inf: none) and the primitive's number (-1: none) for rays (R, 3). From inside a
    primitive its far wall is seen.

    Rays are tried in packets of `packet` consecutive ones. All rays of a packet stay within a known distance of its middle
    ray, so a primitive which that ray misses even when it is thickened by this distance (`pad`) can be left out. The rest
    are tried nearest first, until no ray of the packet can still find anything closer. Rays in any order give the same
    answer, neighbouring rays give it much sooner.
    """
    R = len(rays_o)
    pad_rays = -R % packet
    if pad_rays:
        rays_o, rays_d = (torch.cat([x, x[-1:].expand(pad_rays, 3)]) for x in (rays_o, rays_d))
    o, d = (x.reshape(-1, packet, 3).mT.contiguous() for x in (rays_o, rays_d))        # (B, 3, packet): sums over x, y, z are fast so
    apex, axis = o.mean(2), F.normalize(d.mean(2), dim=-1)                             # the middle ray
    spread = (o - apex[..., None]).square().sum(1).amax(1, keepdim=True).sqrt()        # |o_i - apex|; norm(dim=1) takes 40 times as long
    chord = (d - axis[..., None]).square().sum(1).amax(1, keepdim=True).sqrt()         # |d_i - axis|: a ray strays by chord * t
    radius, distance = shapes.half.norm(dim=-1), shapes.centre.norm(dim=-1)            # of a ball around each primitive
    pad = spread + chord * (apex.norm(dim=-1, keepdim=True) + spread + (distance + radius).max()) + 1e-4               # (B, 1)
    along = axis @ shapes.centre.T - (axis * apex).sum(-1, keepdim=True)               # (B, P)
    far2 = torch.addmm(distance ** 2, apex, shapes.centre.T, alpha=-2) + (apex * apex).sum(-1, keepdim=True)           # |apex - centre|^2
    reach = radius + pad
    o, d = (x[..., :1] if (x == x[..., :1]).all() else x for x in (o, d))              # from one camera, or towards the sun
    b, p = ((far2.addcmul_(along, along, value=-1) <= reach * reach + 1e-4) & (along >= -reach)).nonzero(as_tuple=True)
    size = shapes.half[p] + pad[b]                                                     # each as a box, thickened
    turn = shapes.rotation[p].mT / size[..., None]
    t_in, t_out = _interval("box", turn @ (apex[b] - shapes.centre[p])[..., None], turn @ axis[b, :, None])
    t_in, t_out = t_in.squeeze(1), t_out.squeeze(1)
    keep = ((t_in <= t_out) & (t_out > 0)).nonzero().squeeze(1)
    keep = keep[(b[keep].double() * 1e4 + t_in[keep]).argsort(stable=True)]            # by packet, nearest first
    b, p, t_in = b[keep], p[keep], t_in[keep]
    count = torch.bincount(b, minlength=len(o))
    start = count.cumsum(0) - count

    t, index = torch.full((len(o), packet), torch.inf), torch.full((len(o), packet), -1)
    active, rank = count.nonzero().squeeze(1), 0
    while len(active):
        wide = min((1 << 16) // packet // len(active), int(count[active].max()) - rank)              # candidates per packet at a time:
        wide = max(1, wide)                                                                          # many once few packets are left
        row = start[active, None] + (rank + torch.arange(wide)).clamp_max(count[active, None] - 1)   # (A, wide)
        a, q = active.repeat_interleave(wide), p[row.flatten()]
        hits = torch.empty(len(q), packet)
        for kind, is_kind in shapes.is_kind.items():
            mine = is_kind[q].nonzero().squeeze(1)
            if len(mine) == 0:
                continue
            k = q[mine]
            enter, leave = _interval(kind, shapes.turn[k] @ (o[a[mine]] - shapes.centre[k, :, None]), shapes.turn[k] @ d[a[mine]])
            hit = torch.where(enter > 1e-4, enter, leave)
            hits[mine] = torch.where((enter <= leave) & (hit > 1e-4), hit, torch.inf)
        best, which = hits.reshape(len(active), wide, packet).min(1)
        closer = best < t[active]
        t[active] = torch.where(closer, best, t[active])
        index[active] = torch.where(closer, q.reshape(-1, wide).gather(1, which), index[active])
        rank += wide
        active = active[count[active] > rank]
        active = active[t_in[start[active] + rank] < t[active].amax(1)]
    return t.reshape(-1)[:R], index.reshape(-1)[:R]


SUN = (0.45, -0.35, 0.82)                       # towards the light


def raycast(primitives: list[Primitive], rays_o: Tensor, rays_d: Tensor, packet: int = 64, sun: tuple = SUN) -> tuple[Tensor, Tensor, Tensor]:
    """Colour (R, 3), alpha (R,) 0 or 1, depth (R,) (0 where nothing is hit) of the first surface along rays (R, 3), on the CPU."""
    shapes = _Packed(primitives)
    t, index = first_hit(shapes, rays_o, rays_d, packet)
    return shade(shapes, rays_o, rays_d, t, index, sun), (index >= 0).float(), torch.where(index >= 0, t, 0.0)


def shade(shapes: _Packed, rays_o: Tensor, rays_d: Tensor, t: Tensor, index: Tensor, sun: tuple = SUN) -> Tensor:
    """Colour (R, 3) of what first_hit found, black where it found nothing.

    colour * (sky + sun * max(0, n.l) * [not in shadow]) + a small highlight. Only sums, products and roots, so that the same
    rays give the same bits in every run.
    """
    colour, hit = torch.zeros_like(rays_o), (index >= 0).nonzero().squeeze(1)
    if len(hit) == 0:
        return colour
    p, d = index[hit], rays_d[hit]
    point = rays_o[hit] + t[hit, None] * d
    R, half = shapes.rotation[p], shapes.half[p]
    unit = ((point - shapes.centre[p])[:, None] @ R).squeeze(1) / half                 # on the surface of the unit shape
    is_ball, is_box = shapes.is_kind["ball"][p], shapes.is_kind["box"][p]
    face = F.one_hot(unit.abs().argmax(-1), 3) * unit.sign()
    round_ = torch.cat([unit[:, :2], torch.zeros_like(unit[:, :1])], -1)
    cap = unit[:, 2].abs() > unit[:, :2].norm(dim=-1)
    end = torch.cat([torch.zeros_like(unit[:, :2]), unit[:, 2:].sign()], -1)
    normal = torch.where(is_ball[:, None], unit, torch.where(is_box[:, None], face, torch.where(cap[:, None], end, round_)))
    cell = torch.floor((unit * half - 1e-3 * normal) / shapes.period[p, None]).long()  # a little inside, else a face lies between two cells
    normal = F.normalize((R @ (normal / half)[..., None]).squeeze(-1), dim=-1)
    normal = torch.where((normal * d).sum(-1, keepdim=True) > 0, -normal, normal)      # towards the viewer

    diagonal = torch.floor((unit * half).sum(-1) / shapes.period[p]).long()
    second = torch.where(shapes.pattern[p] == 1, cell.sum(-1) % 2, torch.where(shapes.pattern[p] == 2, diagonal % 2, 0))
    base = shapes.colours[p, second]
    light = F.normalize(torch.tensor(sun), dim=0)
    lambert = (normal * light).sum(-1).clamp_min(0)
    lit = (lambert > 0).nonzero().squeeze(1)                                           # shadow rays, where they matter
    cell = (point[lit] / 0.15).floor().long() @ torch.tensor([1 << 40, 1 << 20, 1])    # sorted by cells of 0.15 m: a packet stays
    lit = lit[cell.argsort(stable=True)]                                               # in one place, whichever pixels see it
    blocked, _ = first_hit(shapes, point[lit] + 2e-3 * normal[lit], light.expand(len(lit), 3), 64)
    lambert[lit] *= blocked.isinf()
    sky = 0.42 + 0.16 * normal[:, 2]
    shine = (normal * F.normalize(light - d, dim=-1)).sum(-1).clamp_min(0) * (lambert > 0)
    for _ in range(5):
        shine = shine * shine                                                          # to the power 32
    colour[hit] = (base * (sky + 0.62 * lambert)[:, None] + 0.12 * shine[:, None]).clamp(0, 1)
    return colour


def render_primitives(primitives: list[Primitive], c2w: Tensor, K: Tensor, H: int, W: int, bg: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Antialiased pictures of primitives: images (V, H, W, 3), alpha (V, H, W), depth (V, H, W).

    One ray through each pixel's centre first, which gives the depth. Then eight more, a grid of 3x3 with the first, for the
    pixels that need them: those with another colour, or background, among their eight neighbours.
    """
    shapes, V = _Packed(primitives), len(c2w)
    colour, alpha, depth = torch.empty(V, H, W, 3), torch.empty(V, H, W), torch.empty(V, H, W)
    z_order = torch.tensor([0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15])     # in blocks of 4x4: whoever is near in the list
    by, bx = torch.meshgrid(torch.arange(-(-H // 4)), torch.arange(-(-W // 4)), indexing="ij")     # is near in the picture
    row, col = (by.reshape(-1, 1) * 4 + z_order // 4).flatten(), (bx.reshape(-1, 1) * 4 + z_order % 4).flatten()
    inside, row, col = (row < H) & (col < W), row.clamp_max(H - 1), col.clamp_max(W - 1)           # whole blocks: some pixels come twice
    centre, others = torch.tensor([[0.5, 0.5]]), torch.tensor([[x / 6, y / 6] for y in (1, 3, 5) for x in (1, 3, 5) if (x, y) != (3, 3)])

    def trace(job, points, packet):             # job (n, 2): view, place in the list; points (S, 2) in a pixel
        v, k = job.unbind(1)                    # -> where to write, colour (n, S, 3), t, index (n, S)
        n, S, where = len(job), len(points), (v, row[k], col[k])
        xy = torch.stack([col[k], row[k]], -1)[:, None] + points
        rays_o, rays_d = pixel_rays(xy.reshape(-1, 2), K, c2w[v].repeat_interleave(S, 0))
        t, which = first_hit(shapes, rays_o, rays_d, packet)
        return where, shade(shapes, rays_o, rays_d, t, which).view(n, S, 3), t.view(n, S), which.view(n, S)

    def first(job):
        where, c, t, which = trace(job, centre, 16)
        hit = which[:, 0] >= 0
        colour[where], alpha[where], depth[where] = c[:, 0], hit.float(), torch.where(hit, t[:, 0], 0.0)

    def rough(v):                               # -> the pixels of picture v that need more rays
        x = torch.cat([colour[v].movedim(-1, 0), alpha[v, None]])
        spread = F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)                  # largest minus smallest around
        k = ((spread > 0.06).any(0)[row, col] & inside).nonzero().squeeze(1)
        k = torch.cat([k, k[-1:].expand(-len(k) % 4)])                                 # whole packets: each sees one picture
        return torch.stack([torch.full_like(k, v), k], 1)

    def again(job):
        where, c, _, which = trace(job, others, 32)
        colour[where], alpha[where] = (colour[where] + c.sum(1)) / 9, (alpha[where] + (which >= 0).sum(1)) / 9

    threads = torch.get_num_threads()
    torch.set_num_threads(1)            # the operations are small: whole jobs side by side go faster than each one split up
    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(first, torch.cartesian_prod(torch.arange(V), torch.arange(len(row))).split(1 << 17)))
            list(pool.map(again, torch.cat(list(pool.map(rough, range(V)))).split(1 << 16)))
    finally:
        torch.set_num_threads(threads)
    return (colour + (1 - alpha[..., None]) * bg).clamp(0, 1), alpha, depth            # misses are black: the mean is premultiplied


def turned(axis: str, degrees: float) -> np.ndarray:
    """(3, 3) rotation about "x", "y" or "z", right-handed."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    i, j = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    R = np.eye(3)
    R[i, i], R[j, j], R[i, j], R[j, i] = c, c, -s, s
    return R


def placed(parts: list[Primitive], centre, rotation: np.ndarray) -> list[Primitive]:
    """A group of parts, turned about the origin and then moved."""
    own = lambda p: np.eye(3) if p.rotation is None else p.rotation
    return [replace(p, centre=tuple(rotation @ p.centre + centre), rotation=rotation @ own(p)) for p in parts]


def studs(x: float, y: float, z: float, nx: int, ny: int, colour) -> list[Primitive]:
    """nx x ny studs standing at height z, lengths in units of their pitch."""
    return [Primitive("cylinder", (x + i + 0.5, y + j + 0.5, z + 0.1), (0.3, 0.3, 0.12), colour) for i in range(nx) for j in range(ny)]


def brick(x: float, y: float, z: float, nx: int, ny: int, height: float, colour, bare: bool = False) -> list[Primitive]:
    """A brick of nx x ny studs (bare: without them) with its lowest corner at (x, y, z), a little smaller than its place: seams show."""
    gap = 0.03
    box = Primitive("box", (x + nx / 2, y + ny / 2, z + height / 2), (nx / 2 - gap, ny / 2 - gap, height / 2 - gap / 2), colour)
    return [box] + ([] if bare else studs(x, y, z + height, nx, ny, colour))


def rod(a, b, radius: float, colour) -> Primitive:
    """A thin cylinder from a to b."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    length = np.linalg.norm(b - a)
    up = (1, 0, 0) if abs(b[0] - a[0]) < 0.9 * length else (0, 1, 0)    # anything but parallel
    return Primitive("cylinder", tuple((a + b) / 2), (radius, radius, length / 2), colour, look_at(b, a, up)[:, :3])


def truck() -> list[Primitive]:
    """A toy tipper of studded bricks, nose towards +x, within [-1.3, 1.3]^3: rows of studs, stripes and a checkerboard
    (fine repeated texture), rods, ladder and railing (thin parts), walls and tailboard (large flat areas)."""
    red, yellow, blue, green = (0.80, 0.11, 0.09), (0.95, 0.73, 0.08), (0.10, 0.32, 0.68), (0.16, 0.56, 0.24)
    grey, dark, black, white = (0.62, 0.64, 0.66), (0.25, 0.26, 0.28), (0.10, 0.10, 0.11), (0.93, 0.93, 0.91)
    glass, lamp, orange = (0.45, 0.66, 0.80), (1.0, 0.93, 0.60), (0.96, 0.45, 0.06)
    parts = []
    # Below, lengths are in studs; x forward from -8 to 8, y to the left from -3 to 3, z = 0 at the frame.
    parts += brick(-8, -2, 0, 16, 4, 0.6, dark, bare=True)                                        # frame
    for x in (-5.6, -2.6, 5.0):                                                                   # wheels
        for side in (-1, 1):
            turn = turned("x", -90 * side)                                                        # its z axis points outwards
            wheel = [Primitive("cylinder", (0, 0, 0), (1.45, 1.45, 0.62), black),
                     Primitive("cylinder", (0, 0, 0.1), (0.85, 0.85, 0.6), grey),
                     Primitive("cylinder", (0, 0, 0.2), (0.32, 0.32, 0.62), red)]
            wheel += [Primitive("ball", (0.58 * math.cos(a), 0.58 * math.sin(a), 0.7), (0.11,) * 3, dark) for a in np.arange(6) * math.pi / 3]
            wheel += [Primitive("box", (1.42 * math.cos(a), 1.42 * math.sin(a), 0), (0.12, 0.14, 0.58), black, turned("z", math.degrees(a)))
                      for a in np.arange(12) * math.pi / 6]                                        # tread
            parts += placed(wheel, np.array([x, 2.55 * side, -0.3]), turn)
    for y in (-3, 2):                                                                             # mudguards
        parts += brick(3.4, y, 1.35, 3, 1, 0.4, blue, bare=True)
    parts += brick(7.2, -3, -0.2, 1, 6, 0.7, grey, bare=True)                                     # bumper
    # Cab
    parts += brick(2, -3, 0.6, 2, 6, 1.2, red, bare=True) + brick(4, -2, 0.6, 4, 4, 1.2, red, bare=True)
    parts += brick(2, -3, 1.8, 6, 6, 1.2, red, bare=True) + studs(6, -3, 3.0, 2, 6, red)          # bonnet; no studs where nobody sees them
    parts += [Primitive("box", (3.9, 0, 4.1), (1.65, 2.65, 1.15), glass)]                         # the windows are one block
    for x, y in ((2.25, -2.75), (2.25, 2.75), (5.55, -2.75), (5.55, 2.75)):                       # of glass behind four posts
        parts.append(Primitive("box", (x, y, 4.1), (0.25, 0.25, 1.13), red))
    parts += [Primitive("box", (3.9, y, 4.1), (0.14, 0.1, 1.13), red) for y in (-2.7, 2.7)]
    parts += brick(1.8, -3, 5.2, 4, 6, 0.5, red)                                                  # roof
    parts += [Primitive("cylinder", (3.2, 0, 6.05), (0.5, 0.5, 0.35), dark), Primitive("ball", (3.2, 0, 6.4), (0.45, 0.45, 0.5), orange)]
    parts.append(Primitive("box", (8.0, 0, 1.75), (0.1, 1.45, 0.85), dark, None, "checker", grey, 0.29))   # grille
    for y in (-2.35, 2.35):
        parts += [Primitive("cylinder", (8.0, y, 2.1), (0.48, 0.48, 0.2), grey, turned("y", 90)),
                  Primitive("ball", (8.15, y, 2.1), (0.22, 0.38, 0.38), lamp), Primitive("box", (8.22, y, 0.15), (0.1, 0.5, 0.18), orange)]
    parts += [rod((5.9, 2.3, 3.0), (6.6, 2.6, 7.9), 0.1, dark), Primitive("ball", (6.6, 2.6, 7.9), (0.16,) * 3, red)]   # antenna
    parts += [rod((1.5, -2.5, 0.6), (1.5, -2.5, 6.9), 0.2, grey), rod((1.5, 2.5, 0.6), (1.5, 2.5, 6.9), 0.2, grey)]      # exhausts
    for y in (-1, 1):                                                                             # mirrors
        parts += [rod((5.4, 2.9 * y, 3.6), (5.9, 3.6 * y, 3.9), 0.07, dark), Primitive("box", (5.9, 3.7 * y, 4.1), (0.08, 0.25, 0.45), dark)]
    # Bed, tipped by ten degrees about its rear edge
    bed = brick(0, -3, 0, 9, 6, 0.5, grey, bare=True) + studs(0, -2, 0.5, 1, 4, grey) + studs(5, -2, 0.5, 3, 4, grey)
    for y in (-3, 2):
        for row in range(3):                                                                      # walls, bricks in running bond
            x = 0
            for n in ((3, 3, 3), (1, 4, 4), (2, 4, 3))[row]:
                bed += brick(x, y, 0.5 + 1.0 * row, n, 1, 1.0, yellow, bare=row < 2)
                x += n
    bed += brick(8, -2, 0.5, 1, 4, 3.0, yellow)                                                   # front wall
    bed.append(Primitive("box", (-0.12, 0, 1.9), (0.12, 2.9, 1.5), yellow, None, "stripes", black, 0.55))   # tailboard
    bed += [Primitive("box", (4.5, y, 1.5), (3.4, 0.05, 0.5), white, None, "checker", blue, 0.25) for y in (-3.02, 3.02)]
    for y in (-2.5, 2.5):                                                                         # railing
        bed += [rod((x, y, 3.5), (x, y, 4.6), 0.06, dark) for x in np.linspace(0.5, 8.5, 9)] + [rod((0.4, y, 4.6), (8.6, y, 4.6), 0.08, dark)]
    bed += brick(1, -2, 0.5, 2, 4, 1.0, blue) + brick(3, -2, 0.5, 3, 2, 1.0, green) + brick(3, 0, 0.5, 2, 2, 1.0, white)   # load
    bed += brick(1, -1, 1.5, 2, 2, 1.0, orange) + placed(brick(-1, -1, 0, 2, 2, 1.0, red), np.array([6.6, 0.5, 0.62]), turned("z", 33))
    bed += [Primitive("ball", (4.0, -1.0, 2.35), (0.85,) * 3, yellow, None, "stripes", red, 0.3)]
    parts += placed(bed, np.array([-8.0, 0, 1.0]), turned("y", -10))
    parts += [rod((-1.2, y, 0.4), (-1.2, y, 2.2), 0.25, grey) for y in (-1, 1)]                   # what lifts it
    lean = [rod((-6.4, -3.85, -0.9), (-6.4, -3.2, 3.4), 0.07, grey), rod((-5.2, -3.85, -0.9), (-5.2, -3.2, 3.4), 0.07, grey)]
    lean += [rod((-6.4, -3.85 + 0.65 * f, -0.9 + 4.3 * f), (-5.2, -3.85 + 0.65 * f, -0.9 + 4.3 * f), 0.06, grey) for f in np.linspace(0.08, 0.95, 8)]
    parts += lean                                                                                 # ladder
    s = 0.135                                                                                     # metres per stud
    return [replace(p, centre=(s * p.centre[0], s * p.centre[1], s * (p.centre[2] - 2.4)), half=tuple(s * h for h in p.half), period=s * p.period)
            for p in parts]


def load_bricks(split: str, size: int | None, bg: Tensor) -> Views:
    """The built-in truck through cameras like those of the Blender set: angle of view 0.6911112 rad, 4.031 from the middle.

    "train": 100, "val": 25 positions on the upper hemisphere from a fixed seed; "test": 25 on a full turn at 15 to 45
    degrees. size None: 200 px. The cost grows with the number of pixels: 100 px take about 8 s of one core.
    """
    size = 200 if size is None else size
    if size < 1:
        raise UserError(f"--size {size} must be at least 1 pixel")
    if split == "test":
        turn = 2 * np.pi * np.arange(25) / 25
        elevation = np.radians(30 + 15 * np.cos(2 * turn))
    else:
        rng = np.random.default_rng({"train": 0, "val": 1}[split])
        u = rng.random((100 if split == "train" else 25, 2))
        turn, elevation = 2 * np.pi * u[:, 0], np.arcsin(0.08 + 0.9 * u[:, 1])     # uniform over the sphere's area
    c2w = torch.tensor(np.stack([orbit_pose(a, e, 4.0311289) for a, e in zip(turn, elevation)]), dtype=torch.float32)
    focal = 0.5 * size / math.tan(0.5 * 0.6911112070083618)
    K = _intrinsics(focal, focal, size / 2, size / 2)
    images, alpha, depth = render_primitives(truck(), c2w, K, size, size, bg)
    return Views(images, c2w, K, alpha, depth, [f"{split}/r_{v}" for v in range(len(c2w))])


def orbit_pose(azimuth: float, elevation: float, radius: float, centre=(0, 0, 0)) -> np.ndarray:
    """(3, 4) camera at the given angles (radians) and distance from `centre`, looking at it, z upwards."""
    out = np.array([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    return look_at(np.asarray(centre) + radius * out, centre)


# -------------------------------------------------------------------------------------------------------- scene look-up

BLENDER_SCENES = ("chair", "drums", "ficus", "hotdog", "lego", "materials", "mic", "ship")
LLFF_SCENES = ("fern", "flower", "fortress", "horns", "leaves", "orchids", "room", "trex")
BUILTIN_SCENES = ("bricks",)


def load_scene(name: str, data: str | Path, size: int | None = None, bg="white", train_split: str = "train", test: bool = True) -> Scene:
    """Find and load a scene.

    name: "bricks" (built in), a path, or a name under `data`, data/nerf_synthetic, data/nerf_llff_data or data/dtu. What it
    is, its files tell: transforms_*.json = Blender, poses_bounds.npy = LLFF, cameras.npz = DTU. A well-known scene that is not
    on disk is replaced by "bricks", loudly: look at scene.kind == "builtin".
    size: longer image side in pixels, None = as on disk. bg: "white" | "black" | "grey" | three numbers in [0, 1].
    train_split: "train" | "val" | "trainval" (LLFF, DTU: "train" only; every 8th view is held out for testing).
    test=False: scene.test has no views.
    """
    bg = background(bg)
    splits = {"train": ["train"], "val": ["val"], "trainval": ["train", "val"]}.get(train_split)
    if splits is None:
        raise UserError(f"train split {train_split!r} does not exist: train, val or trainval")
    folder = None if name in BUILTIN_SCENES else find_scene(name, Path(data))
    llff, dtu = (folder is not None and (folder / file).is_file() for file in ("poses_bounds.npy", "cameras.npz"))
    if (llff or dtu) and train_split != "train":
        raise UserError(f"{folder}: {'an LLFF' if llff else 'a DTU'} scene has no split {train_split!r}: use train")
    if llff:
        train, held_out = load_llff(folder, size, bg)
        # In NDC the mean camera sees [-1, 1]^2; the others lean out of it at the far end (fern: to 1.43). z = 1 is infinity.
        aabb = torch.tensor([[-1.5, -1.5, -1.0], [1.5, 1.5, 1.0]])
        return Scene(folder.name, "llff", train, held_out if test else pick_views(train, []), aabb, 0.0,
                     float((aabb[1] - aabb[0]).norm()), bg, True)
    if dtu:
        train, held_out = hold_out(load_dtu(folder, size, bg), folder)
        aabb = torch.tensor([[-1.5] * 3, [1.5] * 3])    # the object fills the unit sphere, its table goes on; cameras stand outside, at 3
        near = max(0.1, float(torch.cat([train.c2w, held_out.c2w])[:, :, 3].norm(dim=1).min()) - 1.1)      # no haze before the cameras
        return Scene(folder.resolve().name, "dtu", train, held_out if test else pick_views(train, []), aabb, near, 5.0, bg, False)
    read = (lambda split: load_bricks(split, size, bg)) if folder is None else (lambda split: load_blender(folder, split, size, bg))
    train = read(splits[0])
    for split in splits[1:]:
        train = join_views(train, read(split))
    held_out = read("test") if test else pick_views(train, [])
    if held_out.images.shape[1:] != train.images.shape[1:]:
        raise UserError(f"{folder}: test images are {_wh(held_out.images[0])}, training images {_wh(train.images[0])}: they must agree")
    aabb = torch.tensor([[-1.5] * 3, [1.5] * 3])
    name, kind = ("bricks", "builtin") if folder is None else (folder.resolve().name, "blender")
    return Scene(name, kind, train, held_out, aabb, 2.0, 6.0, bg, False)


def background(bg) -> Tensor:
    """"white" | "black" | "grey" | three numbers in [0, 1] -> (3,)."""
    named = {"white": (1.0,) * 3, "black": (0.0,) * 3, "grey": (0.5,) * 3}
    try:
        colour = torch.tensor([float(c) for c in (named[bg] if isinstance(bg, str) else bg)])
        assert colour.shape == (3,) and bool(((colour >= 0) & (colour <= 1)).all())
    except (KeyError, TypeError, ValueError, AssertionError):
        raise UserError(f"background {bg!r}: use white, black, grey, or three numbers from 0 to 1") from None
    return colour


def find_scene(name: str, data: Path) -> Path | None:
    """The folder of a scene; None = a well-known scene that is not here (said on stderr); UserError if unknown or no scene."""
    places = [Path(name), data / name, data / "nerf_synthetic" / name, data / "nerf_llff_data" / name, data / "dtu" / name] if name else []
    folder = next((p for p in places if p.is_dir()), None)
    if folder is not None:
        if not any(folder.glob("transforms_*.json")) and not any((folder / file).is_file() for file in ("poses_bounds.npy", "cameras.npz")):
            raise UserError(f"{folder}: no transforms_train.json, poses_bounds.npy or cameras.npz in it: not a scene, or an incomplete one")
        return folder
    if name in BUILTIN_VIDEOS or any(name in names for names in VIDEO_SCENES.values()):
        raise UserError(f"scene {name!r} is a video: pictures are wanted here, give another scene, or take a method for videos")
    if name in BUILTIN_FAMILIES + SRN_FAMILIES:
        raise UserError(f"scene {name!r} is a family of many: one is wanted here, give another scene, or take a method for families")
    if name in BLENDER_SCENES + LLFF_SCENES:
        how = f"python common.py download {name}" if name in BLENDER_SCENES else f"put it at {data / 'nerf_llff_data' / name}"
        return _say_instead(name, data, "bricks", how)
    found = {f.parent.name for pattern in ("transforms_train.json", "poses_bounds.npy", "cameras.npz") for depth in ("*", "*/*")
             for f in data.glob(f"{depth}/{pattern}")}
    raise UserError(f"scene {name!r} not found: no such folder, and under {data} there is {', '.join(sorted(found)) or 'no scene'}; "
                    f"built in: {', '.join(BUILTIN_SCENES)}; give a path, --data, or one of these names")


def _say_instead(name: str, data: Path, builtin: str, how: str) -> None:
    rule = "!" * 100
    print(f"{rule}\n!!  Scene '{name}' is not under {data}: USING THE BUILT-IN SCENE '{builtin}' INSTEAD.\n"
          f"!!  Numbers from this run are not numbers for {name}.  For the real one:  {how}\n{rule}", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------------- video scenes

VIDEO_SCENES = {"n3dv": ("coffee_martini", "cook_spinach", "cut_roasted_beef", "flame_salmon_1", "flame_steak", "sear_steak"),
                "meetroom": ("discussion", "trimming", "vrheadset"),
                "panoptic_sports": ("basketball", "boxes", "football", "juggle", "softball", "tennis")}
BUILTIN_VIDEOS = ("stage",)


@dataclass
class Video:
    """A scene filmed by synchronised cameras that stand still. Pictures are read one frame at a time, never all."""
    name: str
    kind: str               # "n3dv" | "panoptic" | "builtin"
    frames: int             # how many there are (at most the number asked for)
    fps: float
    c2w: Tensor             # (V, 3, 4) of all cameras, OpenGL axes
    K: Tensor               # (V, 3, 3), for the loaded size
    H: int                  # loaded size
    W: int
    names: list[str]        # cameras
    train: list[int]        # camera indices
    test: list[int]
    aabb: Tensor            # (2, 3) the box in which a field has to live
    near: float             # rays start and end here; metric (in NDC where ndc is set)
    far: float
    bg: Tensor              # (3,)
    ndc: bool
    read: Callable[[int], Views]    # frame t -> Views of ALL cameras, in order; alpha, depth, mask only for the built-in one


def load_video(name: str, data: str | Path, size: int | None = None, frames: int | None = None, bg="grey") -> Video:
    """Find a video scene and read its cameras; video.read(t) reads pictures.

    name: "stage" (built in), a path, or a name under `data`, data/n3dv, data/meetroom or data/panoptic_sports. What it is, its files
    tell: train_meta.json = CMU Panoptic, camNN.mp4 or cam_N.mp4 = N3DV and Meet Room. A well-known scene that is not on disk is replaced
    by "stage", loudly: look at video.kind == "builtin". size: longer image side in pixels, None = as on disk. frames: the first so many,
    None = all.
    """
    bg = background(bg)
    if frames is not None and frames < 1:
        raise UserError(f"--frames {frames} must be at least 1")
    folder = None if name in BUILTIN_VIDEOS else find_video(name, Path(data))
    if folder is None:
        return load_stage(size, frames, bg)
    return (load_panoptic if is_panoptic(folder) else load_n3dv)(folder, size, frames, bg)


def find_video(name: str, data: Path) -> Path | None:
    """The folder of a video scene; None = a well-known one that is not here (said on stderr); UserError if unknown or no video."""
    places = [Path(name), data / name, *(data / sub / name for sub in VIDEO_SCENES)] if name else []
    folder = next((p for p in places if p.is_dir()), None)
    if folder is not None:
        if not is_panoptic(folder) and not camera_files(folder):
            raise UserError(f"{folder}: no camNN.mp4 (with poses_bounds.npy) or train_meta.json in it: not a video, or an incomplete one")
        return folder
    sub = next((sub for sub, names in VIDEO_SCENES.items() if name in names), None)
    if sub:
        return _say_instead(name, data, "stage", f"put it at {data / sub / name}")
    found = {p.name for depth in ("*", "*/*") for p in data.glob(depth) if p.is_dir() and (is_panoptic(p) or camera_files(p))}
    raise UserError(f"video {name!r} not found: no such folder, and under {data} there is {', '.join(sorted(found)) or 'no video'}; "
                    f"built in: {', '.join(BUILTIN_VIDEOS)}; give a path, --data, or one of these names")


def is_panoptic(folder: Path) -> bool:
    """Whether it holds train_meta.json or test_meta.json (a missing one is named later)."""
    return any((folder / f"{split}_meta.json").is_file() for split in ("train", "test"))


def camera_files(folder: Path) -> list[Path]:
    """Its videos camNN.mp4 or cam_N.mp4, by number."""
    numbered = [(int(found[1]), f) for f in folder.glob("*.mp4") if (found := re.fullmatch(r"cam_?(\d+)\.mp4", f.name))]
    return [f for _, f in sorted(numbered)]


def load_n3dv(folder: Path, size: int | None, frames: int | None, bg: Tensor) -> Video:
    """Neural 3D Video and Meet Room: a film per camera, camNN.mp4 or cam_N.mp4, and poses_bounds.npy with a row each, in the order of the
    numbers. Forward-facing, hence NDC, as in load_llff; each camera has its own focal length. The first camera is held out.

    One ffmpeg per camera stays open while frames are asked for in order; going back starts them again. The last frame read is kept.
    """
    try:
        from imageio_ffmpeg import get_ffmpeg_exe, read_frames
        ffmpeg = get_ffmpeg_exe()
    except (ImportError, RuntimeError):
        raise UserError(f'{folder}: reading videos needs ffmpeg: pip install "imageio[ffmpeg]"') from None
    files = camera_files(folder)
    c2w, hwf = llff_poses(folder / "poses_bounds.npy")
    V, again = len(files), "copy or download it again"
    if V != len(c2w):
        raise UserError(f"{folder}: {V} videos camNN.mp4, but poses_bounds.npy has {len(c2w)} rows: they must match one to one")
    if V < 2:
        raise UserError(f"{folder}: one camera only: the first is held out, nothing is left to train on")
    counts, names = [], [file.stem for file in files]
    aabb = torch.tensor([[-1.5, -1.5, -1.0], [1.5, 1.5, 1.0]])          # as load_scene's for LLFF

    def start(file):                            # -> a generator of a film's frames as bytes, and what its header says
        stream = read_frames(str(file), input_params=["-threads", "1"])
        try:
            return stream, next(stream)
        except Exception:                       # whatever may happen while it looks for numbers in ffmpeg's messages
            raise UserError(f"{file}: not a readable video: {again}") from None

    for file in files:                          # packets are counted, nothing is decoded
        out = subprocess.run([ffmpeg, "-i", str(file), "-map", "0:v:0", "-c", "copy", "-f", "null", "-"], stdin=subprocess.DEVNULL,
                             capture_output=True, text=True, errors="replace")
        counts.append(int((re.findall(r"frame=\s*(\d+)", out.stderr) or [0])[-1]))
        if out.returncode or not counts[-1]:
            raise UserError(f"{file}: not a readable video: {again}")
    count = min(counts)
    if count < max(counts):
        print(f"note: {folder}: videos have {count} to {max(counts)} frames: the first {count} are used", file=sys.stderr, flush=True)
    count = min(count, frames or count)
    streams, metas = zip(*(start(file) for file in files))
    at, (W, H) = 0, metas[0]["size"]            # the frame that comes next, in all streams
    for file, meta in zip(files, metas):
        if meta["size"] != (W, H):
            raise UserError(f"{file}: {meta['size'][0]}x{meta['size'][1]} px, but {files[0].name} has {W}x{H}: all cameras must agree")
    h, w = fit_size(H, W, size, files[0])
    down, right = area_weights(H, h), area_weights(W, w)
    K = torch.stack([_intrinsics(f * w / W0, f * h / H0, w / 2, h / 2) for H0, W0, f in hwf])

    @lru_cache(maxsize=1)
    def read(t):
        nonlocal streams, at
        _check_frame(folder, t, count)
        if not streams or t < at:
            streams = ()                        # a stream that is let go closes its ffmpeg
            streams, at = [start(file)[0] for file in files], 0

        def advance(v):
            try:
                for _ in range(at, t):
                    next(streams[v])
                pixels = np.frombuffer(next(streams[v]), np.uint8).reshape(H, W, 3)
            except (OSError, RuntimeError, StopIteration, ValueError):
                raise UserError(f"{files[v]}: broken at or before frame {t}: {again}") from None
            return torch.from_numpy(area_average(pixels / np.float32(255), down, right).clip(0, 1))

        try:
            with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
                images = torch.stack(list(pool.map(advance, range(V))))
            at = t + 1
        except BaseException:                   # Ctrl-C too: some cameras may be a frame ahead of others
            streams = ()
            raise
        if at == count:
            streams = ()
        return Views(images, c2w, K, None, None, names)

    return Video(folder.resolve().name, "n3dv", count, float(metas[0]["fps"] or 30), c2w, K, h, w, names, list(range(1, V)), [0], aabb, 0.0,
                 float((aabb[1] - aabb[0]).norm()), bg, True, read)


def load_panoptic(folder: Path, size: int | None, frames: int | None, bg: Tensor) -> Video:
    """CMU Panoptic in the layout of Dynamic 3D Gaussians: ims/CAM/FRAME.jpg, train_meta.json and test_meta.json.

    These hold w, h, and for each frame and camera fn (the file under ims/), cam_id, k (3, 3) and w2c (4, 4); OpenCV axes. Its world is in
    metres, y down, y = 0 the floor. All cameras look inwards from the wall of a dome, a sphere of radius 2.75 about (0, -1.355, 0), and see
    the wall behind the players, so the box holds the whole dome: ours is (x, z, -y - 2.1) / 3, z up, in [-1, 1]^2 x [-0.75, 0.75], which is
    6 m x 6 m, from 0.15 m below the floor to 4.35 m above it. What is seen through the open door lies outside. Rays start 0.3 m ahead.
    """
    again, parts = "copy or download it again", []
    for split in ("train", "test"):
        path = folder / f"{split}_meta.json"
        try:
            meta = json.loads(path.read_text())
            k, w2c = (np.asarray(meta[key], np.float64) for key in ("k", "w2c"))
            fn, ids, (w0, h0) = np.asarray(meta["fn"], str), np.asarray(meta["cam_id"], str), (float(meta["w"]), float(meta["h"]))
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}): {again}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not a usable meta file ({type(error).__name__}: {error}): {again}") from None
        T, V = fn.shape if fn.ndim == 2 else (0, 0)
        if min(T, V) < 1 or ids.shape != (T, V) or k.shape != (T, V, 3, 3) or w2c.shape != (T, V, 4, 4):
            raise UserError(f"{path}: fn {fn.shape}, cam_id {ids.shape}, k {k.shape}, w2c {w2c.shape}: must be one a frame and camera")
        if not (np.isfinite(k).all() and np.isfinite(w2c).all() and min(w0, h0, k[..., 0, 0].min(), k[..., 1, 1].min()) > 0):
            raise UserError(f"{path}: k and w2c must be finite numbers, and w, h and focal lengths positive: {again}")
        if not (np.allclose(w2c, w2c[:1], atol=1e-6) and np.allclose(k, k[:1], atol=1e-3) and (ids == ids[:1]).all()):
            raise UserError(f"{path}: k, w2c or cam_id change between frames, but cameras must stand still: give another scene")
        if parts and len(parts[0][0]) != T:
            raise UserError(f"{path}: {T} frames, but train_meta.json has {len(parts[0][0])}: {again}")
        parts.append((fn, ids[0], k[0] * np.array([[1 / w0], [1 / h0], [1]]), w2c[0]))
    fn, ids = np.concatenate([part[0] for part in parts], 1), np.concatenate([part[1] for part in parts])
    k, w2c = np.concatenate([part[2] for part in parts]), np.concatenate([part[3] for part in parts])
    count, n = min(len(fn), frames or len(fn)), len(parts[0][1])
    files = [[folder / "ims" / name for name in row] for row in fn[:count]]
    for file in (file for row in files for file in row):
        if not file.is_file():
            raise UserError(f"{file}: image not found: {again}, or ask for fewer frames")
    R, first = w2c[:, :3, :3].mT, read_image(files[0][0])
    if abs(R @ R.mT - np.eye(3)).max() > 1e-3:
        raise UserError(f"{folder}: a w2c in it is not a rotation and a shift: {again}")
    ours = np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0.0]])                                          # (x, y, z) -> (x, z, -y)
    position = (ours @ (-R @ w2c[:, :3, 3:]) - [[0], [0], [2.1]]) / 3
    aabb = torch.tensor([[-1.0, -1.0, -0.75], [1.0, 1.0, 0.75]])
    c2w = torch.tensor(np.concatenate([ours @ R * [1, -1, -1], position], -1), dtype=torch.float32)
    if (c2w[:, :, 3].abs() > aabb[1]).any():
        raise UserError(f"{folder}: cameras stand outside of the studio's dome: w2c must be in metres, with the floor at y = 0 and y down")
    h, w = fit_size(*first.shape[:2], size, files[0][0])
    K = torch.tensor(k * np.array([[w], [h], [1]]), dtype=torch.float32)

    @lru_cache(maxsize=1)
    def read(t):
        _check_frame(folder, t, count)
        return Views(read_images(files[t], size, bg)[0], c2w, K, None, None, ids.tolist())

    return Video(folder.resolve().name, "panoptic", count, 30.0, c2w, K, h, w, ids.tolist(), list(range(n)), list(range(n, len(ids))), aabb,
                 0.1, float((aabb[1] - aabb[0]).norm()), bg, False, read)


def free_path(c2w: Tensor, ndc: bool, n: int) -> Tensor:
    """A closed path (n, 3, 4) among cameras (V, 3, 4): an orbit at their mean height and 0.8 of their distance where they stand all around,
    else an ellipse about the mean one. It looks at the point nearest to all cameras' axes (in NDC, where axes hardly meet, 4 ahead)."""
    c2w, turn = c2w.cpu().double().numpy(), 2 * np.pi * np.arange(n)[:, None] / n
    position, up = c2w[:, :, 3], np.array((0, 1, 0) if ndc else (0, 0, 1))
    off = np.eye(3) - c2w[:, :, 2:3] * c2w[:, None, :, 2]               # (V, 3, 3): what of a vector is not along the axis
    focus = np.array((0, 0, -4)) if ndc else np.linalg.solve(off.sum(0), (off @ position[..., None]).sum(0))[:, 0]
    middle = position.mean(0)
    ground = (position - focus)[:, :2]
    distance = np.linalg.norm(ground, axis=1, keepdims=True)
    if np.linalg.norm((ground / distance).mean(0)) < 0.5:               # all around
        radius = 0.8 * distance.mean()
        path = np.array([*focus[:2], middle[2]]) + radius * (np.cos(turn) * (1, 0, 0) + np.sin(turn) * (0, 1, 0))
    else:
        side, lift = look_at(middle, focus, up)[:, :2].T
        reach = [0.7 * np.quantile(abs((position - middle) @ axis), 0.9) for axis in (side, lift)]
        path = middle + reach[0] * np.cos(turn) * side + reach[1] * np.sin(turn) * lift
    return torch.tensor(np.stack([look_at(p, focus, up) for p in path]), dtype=torch.float32)


def _check_frame(where, t: int, count: int) -> None:
    if not 0 <= t < count:
        raise UserError(f"{where}: frame {t} does not exist: it has frames 0 to {count - 1}")


# --------------------------------------------------------------------------------- the built-in video: a room, filmed

STAGE_APPEARS, STAGE_FLICKER = 5, 3             # from this frame on the cube is there; the panel changes colour every so many frames
STAGE_THINGS = ("static", "ball", "turning", "appearing", "flicker")


def stage(t: int) -> dict[str, list[Primitive]]:
    """What stands in the room at frame t, within [-0.96, 0.96]^3, z upwards, open towards -y: "static", and four things that change.

    "ball": rolls round the plinth, 0.04 a frame. "turning": the crate on the plinth, 6 degrees a frame. "appearing": a cube in the air,
    at rest, from frame STAGE_APPEARS on. "flicker": a panel on the back wall, amber or blue for STAGE_FLICKER frames each; its shape stays.
    """
    cream, wood, teal, slate = (0.93, 0.87, 0.76), (0.62, 0.38, 0.22), (0.56, 0.80, 0.82), (0.36, 0.60, 0.68)
    red, yellow, green, white, plum = (0.88, 0.16, 0.12), (0.97, 0.78, 0.16), (0.30, 0.66, 0.30), (0.94, 0.94, 0.92), (0.58, 0.36, 0.64)
    static = [Primitive("box", (0, 0, -0.92), (0.96, 0.96, 0.04), cream, None, "checker", wood, 0.24),              # floor
              Primitive("box", (0, 0.92, 0.04), (0.96, 0.04, 0.92), teal, None, "stripes", slate, 0.16)]            # back wall
    static += [Primitive("box", (x, 0.48, -0.14), (0.04, 0.40, 0.74), plum, None, "checker", cream, 0.185) for x in (-0.92, 0.92)]   # wings
    static += [Primitive("box", (-0.66, 0.60, -0.66), (0.17, 0.17, 0.22), red, turned("z", 20), "checker", white, 0.11),
               Primitive("box", (0.64, 0.60, -0.72), (0.18, 0.15, 0.16), green, turned("z", -25), "stripes", yellow, 0.09),
               Primitive("box", (0.66, 0.60, -0.48), (0.10, 0.10, 0.08), white, turned("z", 15), "checker", slate, 0.08),
               Primitive("cylinder", (0, 0, -0.68), (0.21, 0.21, 0.20), slate, None, "stripes", white, 0.11),       # plinth
               Primitive("box", (0.34, 0.86, 0.42), (0.34, 0.03, 0.25), white)]                                      # frame of the panel
    angle = math.radians(205) + t * 0.04 / 0.46
    ball = Primitive("ball", (0.46 * math.cos(angle), 0.46 * math.sin(angle), -0.73), (0.15,) * 3, yellow,
                     turned("z", math.degrees(angle)) @ turned("x", math.degrees(-t * 0.04 / 0.15)), "checker", red, 0.1)
    crate = Primitive("box", (0, 0, -0.30), (0.17, 0.17, 0.18), white, turned("z", 6 * t), "checker", (0.10, 0.32, 0.68), 0.085)
    cube = Primitive("box", (-0.42, 0.10, 0.28), (0.13,) * 3, (1.0, 0.52, 0.08), turned("z", 35), "checker", (0.72, 0.12, 0.40), 0.13)
    panel = Primitive("box", (0.34, 0.82, 0.42), (0.28, 0.02, 0.19), ((1.0, 0.86, 0.36), (0.16, 0.26, 0.86))[t // STAGE_FLICKER % 2])
    return {"static": static, "ball": [ball], "turning": [crate], "appearing": [cube] if t >= STAGE_APPEARS else [], "flicker": [panel]}


def load_stage(size: int | None, frames: int | None, bg: Tensor) -> Video:
    """The built-in video: 14 cameras on an arc before the room, of which 4 and 9 are held out. size None: 128 px; frames None: 20.

    Frame t is the same whatever `frames` is. mask = what changes: 1 where the ray through the pixel's centre meets, at frame t or t - 1,
    the ball, the turning crate, the cube that appears or the panel that flickers, and where the picture differs from the last one's by
    more than 1e-4 (their shadows and edges). A frame is traced when it is asked for, and the one before it; the last two are kept.
    """
    size, frames = 128 if size is None else size, 20 if frames is None else frames
    if size < 1:
        raise UserError(f"--size {size} must be at least 1 pixel")
    turn, lift = np.radians(np.linspace(-125, -55, 14)), np.radians(np.resize([8, 26], 14))
    c2w = torch.tensor(np.stack([orbit_pose(a, e, 3.2, (0, 0.1, -0.18)) for a, e in zip(turn, lift)]), dtype=torch.float32)
    K = _intrinsics(1.12 * size, 1.12 * size, size / 2, size / 2).repeat(14, 1, 1)
    names, test, aabb = [f"cam{v:02d}" for v in range(14)], [4, 9], torch.tensor([[-1.0] * 3, [1.0] * 3])

    @lru_cache(maxsize=2)
    def trace(t):
        images, alpha, depth = render_primitives(sum(stage(t).values(), []), c2w, K[0], size, size, bg)
        return images, alpha, depth, stage_things(t, c2w, K[0], size, size) > 0

    def read(t):
        _check_frame("stage", t, frames)
        before, _, _, changed = trace(max(t - 1, 0))                    # first, so that it is the one to be dropped next
        images, alpha, depth, changes = trace(t)
        mask = changes | changed | ((images - before).abs().amax(-1) > 1e-4)
        return Views(images, c2w, K, alpha, depth, names, mask.float())

    return Video("stage", "builtin", frames, 10.0, c2w, K, size, size, names, [v for v in range(14) if v not in test], test,
                 aabb, 1.0, 5.0, bg, False, read)


def stage_things(t: int, c2w: Tensor, K: Tensor, H: int, W: int) -> Tensor:
    """What the rays through the pixels' centres meet first at frame t: (V, H, W), an index into STAGE_THINGS, -1 = nothing."""
    room = stage(t)
    thing = torch.tensor([i for i, name in enumerate(STAGE_THINGS) for _ in room[name]] + [-1])        # of primitive -1: nothing
    xy = pixel_grid(H, W).repeat(len(c2w), 1)
    rays_o, rays_d = pixel_rays(xy, K, c2w.repeat_interleave(H * W, 0))
    _, index = first_hit(_Packed(sum(room.values(), [])), rays_o, rays_d, 16)
    return thing[index].view(len(c2w), H, W)


def stage_masks(video: Video, t: int) -> dict[str, Tensor]:
    """"ball" | "turning" | "appearing" | "flicker" -> (V, H, W) bool on the CPU: the pixels of frame t whose centre shows it."""
    seen = stage_things(t, video.c2w.cpu(), video.K[0].cpu(), video.H, video.W)
    return {thing: seen == i for i, thing in enumerate(STAGE_THINGS) if thing != "static"}


# ----------------------------------------------------------------------------------------------- families of many scenes

SRN_FAMILIES = ("srn_cars", "cars_train", "cars_val", "cars_test")
BUILTIN_FAMILIES = ("cars",)


@dataclass
class Family:
    """Many scenes of one kind, all seen by cameras at about the same distance. One scene is read at a time, never all, and none is kept."""
    name: str
    kind: str               # "builtin" | "srn"
    scenes: list[Path] | range      # folders, sorted by name; built in: seeds
    size: int               # image side in pixels; pictures are square
    near: float             # rays start and end here
    far: float
    aabb: Tensor            # (2, 3) the box that holds every scene
    bg: Tensor              # (3,)
    above: bool             # only views from cameras with z > -0.5

    def read(self, i: int) -> tuple[Views, Views]:
        """Training and test views of scene i, by name: of 12 or more views the first 10 are held out for testing, of fewer a third, at
        least one. Read from disk, or drawn (see load_car), at each call."""
        scene = self.scenes[self._existing([i])[0]]
        views = (load_car if self.kind == "builtin" else load_srn)(scene, self.size, self.bg, self.above)
        n = len(views.names)
        held_out = 10 if n >= 12 else max(1, n // 3)
        return pick_views(views, list(range(held_out, n))), pick_views(views, list(range(held_out)))

    def check(self, ids: list[int], skip_bad: bool = False) -> list[int]:
        """Those of scenes `ids` whose files are in order: names, poses, intrinsics, sizes. Pixels are not decoded; a PNG must have its end.

        Call it before hours of training. Raises one UserError for all scenes that are not; with skip_bad they are named on stderr and left
        out (UserError if none is left). UserError for a scene that does not exist. Built-in scenes have no files.
        """
        bad = {}
        for i in self._existing(ids) if self.kind == "srn" else []:
            try:
                check_pictures(srn_cameras(self.scenes[i], self.size, self.above)[0], self.size)
            except UserError as error:
                bad[i] = str(error)
        left = [i for i in self._existing(ids) if i not in bad]
        if bad and not (skip_bad and left):
            more = f"; and {len(bad) - 3} more" if len(bad) > 3 else ""
            raise UserError(f"{self.name}: {len(bad)} of {len(ids)} scenes cannot be used: {'; '.join(list(bad.values())[:3])}{more}: "
                            + ("none is left" if skip_bad else "mend them, or leave them out with --skip-bad"))
        for why in bad.values():
            print(f"left out: {why}", file=sys.stderr, flush=True)
        return left

    def _existing(self, ids: list[int]) -> list[int]:
        for i in ids:
            if not 0 <= i < len(self.scenes):
                raise UserError(f"{self.name}: scene {i} does not exist: it has {len(self.scenes)}, numbers 0 to {len(self.scenes) - 1}")
        return list(ids)


def load_family(name: str, data: str | Path, size: int, bg="white", above: bool = True) -> Family:
    """Find a family of scenes; family.read(i) reads one.

    name: "cars" (built in), a path to a folder of scenes or to one scene (a family of one), or a name under `data` or data/srn_cars. The
    layout is that of Scene Representation Networks, see load_srn; of a folder of families (cars_test, cars_train) the first *_train is
    taken, else the first. A well-known family that is not on disk is replaced by "cars", loudly: look at family.kind == "builtin".
    size: image side in pixels. above: leave out views from far below, where the camera's z is -0.5 or less.
    Cameras stand 1.3 from the middle, scenes lie within [-0.5, 0.5]^3, so rays run from 0.5 to 2.1.
    """
    bg = background(bg)
    if size < 1:
        raise UserError(f"--size {size} must be at least 1 pixel")
    folder = None if name in BUILTIN_FAMILIES else find_family(name, Path(data))
    kind, name = ("builtin", "cars") if folder is None else ("srn", folder.resolve().name)
    scenes = range(100_000) if folder is None else [folder] if is_srn(folder) else srn_folders(folder)
    return Family(name, kind, scenes, size, 0.5, 2.1, torch.tensor([[-0.5] * 3, [0.5] * 3]), bg, above)


def find_family(name: str, data: Path) -> Path | None:
    """The folder of a family or of one scene; None = a well-known family that is not here (said on stderr); UserError if unknown."""
    places = [Path(name), data / name, data / "srn_cars" / name] if name else []
    folder = next((p for p in places if p.is_dir()), None)
    if folder is not None:
        inner = sorted(folder.iterdir(), key=lambda f: (not f.name.endswith("_train"), f.name))
        found = folder if is_srn(folder) else next((f for f in (folder, *inner) if srn_folders(f)), None)
        if found is None:
            raise UserError(f"{folder}: no folder in it has rgb/, pose/ and intrinsics.txt: not a family of scenes, or an incomplete one")
        return found
    if name and Path(name).name in SRN_FAMILIES:
        train = "cars_train" if name == "srn_cars" else Path(name).name
        where = data / "srn_cars" / train
        return _say_instead(name, data, "cars", f"unpack {train}.zip of Scene Representation Networks as {where}")
    found = {str(f.relative_to(data)) for depth in ("*", "*/*") for f in data.glob(depth) if not is_srn(f) and srn_folders(f)}
    raise UserError(f"family {name!r} not found: no such folder, and under {data} there is {', '.join(sorted(found)) or 'no family'}; "
                    f"built in: {', '.join(BUILTIN_FAMILIES)}; give a path, --data, or one of these names")


def is_srn(folder: Path) -> bool:
    """Whether it is one scene (what it lacks is named later)."""
    return (folder / "intrinsics.txt").is_file() or (folder / "pose").is_dir() or (folder / "rgb").is_dir()


def srn_folders(folder: Path) -> list[Path]:
    """The scenes of a family, by name: all folders in it, if at least one is a scene (a broken one shall not shift the others' numbers)."""
    folders = sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith((".", "_"))) if folder.is_dir() else []
    return folders if any(map(is_srn, folders)) else []


def load_srn(folder: Path, size: int, bg: Tensor, above: bool) -> Views:
    """The views, by name, of one scene as Scene Representation Networks store it: rgb/NAME.png, pose/NAME.txt, intrinsics.txt.

    A pose is a 4x4 camera to world, row by row, in OpenCV's axes (x right, y down, z ahead; here they become OpenGL's). intrinsics.txt
    begins with a line `f cx cy 0.` and ends with a line `H W`: the pixels that f, cx, cy speak of, which need not be those of the pictures
    (usually 512 beside pictures of 128). Pictures and intrinsics are cropped to their central square, then scaled to `size`.
    alpha is None where pictures have none, or one that is 1 everywhere, background included, as the original ones.
    """
    files, c2w, K = srn_cameras(folder, size, above)
    images, alpha, _ = read_images(files, size, bg, square=True)
    alpha = None if alpha is None or alpha.min() == 1 else alpha
    return Views(images, c2w, K, alpha, None, [f"rgb/{file.name}" for file in files])


def srn_cameras(folder: Path, size: int, above: bool) -> tuple[list[Path], Tensor, Tensor]:
    """Picture files, c2w (V, 3, 4) and K (3, 3) for `size` pixels of one scene, as load_srn says. Raises UserError for all that can be
    wrong with names, poses and intrinsics; pictures are not opened."""
    again = "copy or download it again"
    for part in ("rgb", "pose"):
        if not (folder / part).is_dir():
            raise UserError(f"{folder / part}: not found: a scene needs rgb/, pose/ and intrinsics.txt")
    files = sorted((f for f in (folder / "rgb").iterdir() if f.suffix.lower() in (".png", ".jpg", ".jpeg")), key=lambda f: f.stem)
    poses = sorted((folder / "pose").glob("*.txt"), key=lambda f: f.stem)
    for some, others, lack in ((files, poses, "pose/{}.txt"), (poses, files, "rgb/{}.png")):
        there = {file.stem for file in others}
        for file in some:
            if file.stem not in there:
                raise UserError(f"{file}: has no {lack.format(file.stem)}: pictures and poses must match one to one")
    if len(files) != len(poses):
        raise UserError(f"{folder / 'rgb'}: {len(files)} pictures, but {len(poses)} poses: two of them have one name")

    lines = [line for line in _numbers(folder / "intrinsics.txt", again) if line]
    if len(lines) < 2 or len(lines[0]) < 3 or len(lines[-1]) != 2 or min(lines[0][0], *lines[-1]) <= 0:
        raise UserError(f"{folder / 'intrinsics.txt'}: must begin with a line `f cx cy 0.` and end with a line `H W`: {again}")
    (f, cx, cy), (H, W) = lines[0][:3], lines[-1]
    scale = size / min(H, W)
    K = _intrinsics(f * scale, f * scale, (cx - (W - min(H, W)) / 2) * scale, (cy - (H - min(H, W)) / 2) * scale)

    c2w = np.empty((len(poses), 4, 4))
    for v, path in enumerate(poses):
        pose = np.array(sum(_numbers(path, again), []))
        if len(pose) != 16:
            raise UserError(f"{path}: {len(pose)} numbers, a pose has 16: {again}")
        c2w[v] = pose.reshape(4, 4)
        R = c2w[v, :3, :3]
        if abs(R.T @ R - np.eye(3)).max() > 1e-3 or np.linalg.det(R) < 0 or abs(c2w[v, 3] - (0, 0, 0, 1)).max() > 1e-3:
            raise UserError(f"{path}: not a rotation and a shift above a row 0 0 0 1: {again}")
    keep = [v for v in range(len(poses)) if not above or c2w[v, 2, 3] > -0.5]
    if len(keep) < 2:
        raise UserError(f"{folder}: {len(keep)} views{' from above' if above else ''}, two are the least: one to train on, one to test")
    c2w = np.concatenate([c2w[keep, :3, :3] * [1, -1, -1], c2w[keep, :3, 3:]], -1)
    return [files[v] for v in keep], torch.tensor(c2w, dtype=torch.float32), K


def _numbers(path: Path, again: str) -> list[list[float]]:
    """Line by line. UserError if it is missing or holds anything but finite numbers."""
    try:
        lines = [[float(word) for word in line.split()] for line in path.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}): {again}") from None
    except ValueError as error:                # no number, or no text
        raise UserError(f"{path}: must hold numbers only ({error}): {again}") from None
    if not all(math.isfinite(x) for line in lines for x in line):
        raise UserError(f"{path}: holds a number that is not finite: {again}")
    return lines


def check_pictures(files: list[Path], size: int) -> None:
    """UserError if a picture has no readable head, is a PNG without its end (a copy that was cut), differs in size from the others, or
    is smaller than `size`. Pixels are not decoded."""
    for file in files:
        try:
            H, W = iio.improps(file, plugin="pillow").shape[:2]
            with open(file, "rb") as data:
                data.seek(max(0, file.stat().st_size - 64))
                if file.suffix.lower() == ".png" and b"IEND" not in data.read():
                    raise ValueError("it is cut short")
        except Exception as error:             # Pillow has a dozen ways, see read_image
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"{file}: not a readable image ({why}): copy or download the file again") from None
        if file == files[0]:
            first = H, W
        if (H, W) != first:
            raise UserError(f"{file}: {W}x{H} px, but {files[0].name} has {first[1]}x{first[0]}: all images of a scene must agree")
    fit_size(min(first), min(first), size, files[0])


# ----------------------------------------------------------------------------------- the built-in family: cars from seeds

@dataclass
class Car:
    """What tells one car of the family from another: lengths in the unit of the world (a car is about 0.87 long), shares, colours."""
    length: float           # bumper to bumper
    width: float
    clearance: float        # from the ground to the sill
    body: float             # height from the sill to the lower edge of the windows
    nose: float             # height of the nose as a share of `body`: below 1 the bonnet slopes
    overhang: float         # how far nose and tail bulge: 0.02 a box, 0.08 an egg
    cabin: float            # length of the cabin as a share of `length`
    cabin_height: float
    cabin_offset: float     # of the cabin's middle from the car's, forwards, as a share of `length`
    windscreen: float       # how far it leans, as a share of the cabin's length
    rear_window: float      # the same: 0.05 a van, 0.4 a fastback
    wheel: float            # radius
    tyre: float             # width of a wheel
    wheelbase: float        # share of `length`
    spoiler: float          # its height above the boot; 0 = none
    paint: tuple            # (3,) of the body
    second: tuple           # (3,) of what `trim` says, and of the spoiler
    trim: str               # "plain" | "roof" (in the second colour) | "stripes" (from nose to tail)
    tint: float             # brightness of the windows
    lamp: float             # half the width of a head lamp

    @staticmethod
    def draw(seed: int) -> "Car":
        """The same car for the same seed, whatever was drawn before."""
        rng = np.random.default_rng((seed, 0))
        u = lambda low, high: float(rng.uniform(low, high))

        def colour():
            if rng.random() < 0.3:                                      # white, silver, grey, black
                return (u(0.12, 0.92),) * 3
            return colorsys.hsv_to_rgb(u(0, 1), u(0.6, 0.95), u(0.45, 0.95))

        length, overhang, cabin = u(0.80, 0.93), u(0.02, 0.08), u(0.40, 0.68)
        offset = u(max(-0.13, cabin / 2 - 0.5 + overhang / length), min(0.05, 0.32 - cabin / 2))  # between tail and bonnet
        clearance, body, nose = u(0.04, 0.075), u(0.11, 0.16), u(0.76, 1.0)
        return Car(length, u(0.34, 0.41), clearance, body, nose, overhang, cabin, u(0.07, 0.14), offset, u(0.12, 0.36), u(0.04, 0.40),
                   u(0.40, 0.45) * (clearance + nose * body), u(0.045, 0.070), u(0.57, 0.65), u(0.03, 0.06) if rng.random() < 0.35 else 0.0,
                   colour(), colour(), ("plain", "roof", "stripes")[rng.choice(3, p=(0.5, 0.25, 0.25))], u(0.05, 0.25), u(0.018, 0.035))


def car(seed: int) -> list[Primitive]:
    """Car number `seed` of the built-in family: x forward, z up, the middle of its box at the origin, within [-0.5, 0.5]^3."""
    c = Car.draw(seed)
    black, rubber, metal, lamp, red = (0.06, 0.06, 0.07), (0.10, 0.10, 0.11), (0.72, 0.73, 0.75), (1.0, 0.96, 0.78), (0.75, 0.06, 0.05)
    glass, roof = (0.8 * c.tint, 0.95 * c.tint, 1.15 * c.tint), c.second if c.trim == "roof" else c.paint
    y, belt, front, tail = c.width / 2, c.clearance + c.body, c.length / 2 - c.overhang, c.overhang - c.length / 2   # z = 0: the ground
    nose, top = c.nose * c.body, belt + c.cabin_height
    x0, x3 = ((c.cabin_offset + s * c.cabin / 2) * c.length for s in (-1, 1))                     # the cabin's profile is a trapezium:
    x1, x2 = x0 + c.rear_window * c.cabin * c.length, x3 - c.windscreen * c.cabin * c.length      # x0, x3 at its foot, x1, x2 at the roof
    yc = 0.88 * y
    half = lambda ends: (ends[1] - ends[0]) / 2
    box = lambda x, z, y, half_y, colour: Primitive("box", (sum(x) / 2, y, sum(z) / 2), (half(x), half_y, half(z)), colour)
    tube = lambda x, y, z, rx, rz, half_y, colour: Primitive("cylinder", (x, y, z), (rx, rz, half_y), colour, turned("x", 90))

    def slab(a, b, thick, y, half_y, colour, proud=0.0):                # its upper side runs from a to b, (x, z) each, a[0] < b[0]
        a, b = np.array(a), np.array(b)
        along = (b - a) / np.linalg.norm(b - a)
        up = np.array([-along[1], along[0]])
        x, z = (a + b) / 2 + (proud - thick / 2) * up
        R = np.array([[along[0], 0, up[0]], [0, 1, 0], [along[1], 0, up[1]]])
        return Primitive("box", (x, y, z), (np.linalg.norm(b - a) / 2, half_y, thick / 2), colour, R)

    # Body: a block up to the windscreen, a lower one before it under the sloping bonnet, nose and tail rounded
    bonnet = ((x3 - 0.02, belt), (front, c.clearance + nose))
    parts = [box((tail, x3), (c.clearance, belt), 0, y, c.paint), box((x3, front), (c.clearance, c.clearance + nose), 0, y, c.paint),
             slab(*bonnet, 0.3 * nose, 0, y, c.paint), tube(front, 0, c.clearance + nose / 2, c.overhang, nose / 2, y, c.paint),
             tube(tail, 0, c.clearance + c.body / 2, c.overhang, c.body / 2, y, c.paint),
             box((tail, front), (c.clearance - 0.008, c.clearance + 0.18 * c.body), 0, y + 0.003, black)]            # sill
    # Cabin: one block of glass behind posts, under a roof
    lean = lambda run: run * c.cabin_height / math.hypot(run, c.cabin_height) + 0.004             # thick enough to leave no gap
    rear, wind = ((x0, belt), (x1, top)), ((x2, top), (x3, belt))
    parts += [box((x1, x2), (belt - 0.01, top), 0, yc, glass), slab(*rear, lean(x1 - x0), 0, yc, glass),
              slab(*wind, lean(x3 - x2), 0, yc, glass), box((x1 - 0.006, x2 + 0.006), (top - 0.006, top + 0.012), 0, yc + 0.004, roof)]
    for side in (-1, 1):
        parts += [slab(*rear, 0.026, side * (yc - 0.009), 0.013, roof, 0.003), slab(*wind, 0.016, side * (yc - 0.005), 0.009, roof, 0.003),
                  box(((x1 + x2) / 2 - 0.009, (x1 + x2) / 2 + 0.009), (belt, top), side * yc, 0.004, roof),
                  box((x3 - 0.045, x3 - 0.02), (belt + 0.004, belt + 0.028), side * (y + 0.012), 0.016, c.paint)]    # mirror
        parts += [box((x1 + 0.02, x1 + 0.06), (belt - 0.028, belt - 0.018), side * y, 0.004, metal)]                 # door handle
    # Wheels, each in a dark arch
    for x in (-c.wheelbase / 2 * c.length, c.wheelbase / 2 * c.length):
        for side in (-1, 1):
            rim = y + 0.008 - c.tyre / 2                                # the tyre's middle: it stands out by 0.008
            parts += [tube(x, side * y, 1.08 * c.wheel, 1.08 * c.wheel, 1.08 * c.wheel, 0.004, black),
                      tube(x, side * rim, c.wheel, c.wheel, c.wheel, c.tyre / 2, rubber),
                      tube(x, side * (rim + 0.003), c.wheel, 0.6 * c.wheel, 0.6 * c.wheel, c.tyre / 2, metal)]
    # Lamps and grille
    parts += [box((front, front + c.overhang + 0.004), (c.clearance + 0.25 * nose, c.clearance + 0.5 * nose), 0, 0.45 * y, black)]
    for side in (-1, 1):
        parts += [Primitive("ball", (front + 0.8 * c.overhang, side * 0.74 * y, c.clearance + 0.68 * nose), (0.018, c.lamp, 0.018), lamp),
                  Primitive("ball", (tail - 0.75 * c.overhang, side * 0.74 * y, c.clearance + 0.7 * c.body), (0.018, c.lamp, 0.018), red)]
    if c.spoiler:
        end = tail - 0.3 * c.overhang
        parts += [box((end, end + 0.07), (belt + c.spoiler, belt + c.spoiler + 0.012), 0, 0.9 * y, c.second)]
        parts += [box((end + 0.02, end + 0.05), (belt - 0.01, belt + c.spoiler), side * 0.6 * y, 0.006, black) for side in (-1, 1)]
    if c.trim == "stripes":
        for side in (-1, 1):
            at = (side * 0.16 * y, 0.09 * y, c.second)
            parts += [slab(*bonnet, 0.02, *at, 0.002), box((x1 - 0.008, x2 + 0.008), (top, top + 0.014), *at),
                      box((tail, x0), (belt - 0.01, belt + 0.002), *at)]
    return [replace(p, centre=(p.centre[0], p.centre[1], p.centre[2] - (top + 0.012) / 2)) for p in parts]


def load_car(seed: int, size: int, bg: Tensor, above: bool) -> Views:
    """Car number `seed` through cameras like those of the SRN cars: 50 positions, uniform over a sphere of radius 1.3, looking at the
    middle, z upwards, focal length 525/512 of the picture's side. Drawn from the seed alone, whatever `size` is. above: without those at
    z <= -0.5, about 35 remain. At 64 px that takes about 0.25 s of one core.
    """
    u = np.random.default_rng((seed, 1)).random((50, 2))
    c2w = np.stack([orbit_pose(2 * np.pi * a, np.arcsin(2 * b - 1), 1.3) for a, b in u])
    keep = [v for v in range(50) if not above or c2w[v, 2, 3] > -0.5]
    c2w, focal = torch.tensor(c2w[keep], dtype=torch.float32), 525 / 512 * size
    K = _intrinsics(focal, focal, size / 2, size / 2)
    images, alpha, depth = render_primitives(car(seed), c2w, K, size, size, bg)
    return Views(images, c2w, K, alpha, depth, [f"{v:06d}" for v in keep])


# ------------------------------------------------------------------------------------------------------- occupancy grid

class OccupancyGrid(nn.Module):
    """Which cells of the box hold anything (Instant NGP's idea, nerfacc's rule).

    After an update:  ema = max(decay * ema, sigma * step) where a cell was looked at,
                      occupied = ema > min(mean(ema), threshold).
    sigma * step is about the opacity of one sample. All cells count as occupied until the first update.
    Buffers: ema (G, G, G), occupied (G, G, G) bool, aabb (2, 3); cell (i, j, k) spans aabb[0] + (i..i+1, ...) * extent / G.
    """
    def __init__(self, aabb: Tensor, resolution: int = 128, decay: float = 0.95, threshold: float = 0.01):
        super().__init__()
        G = resolution
        self.decay, self.threshold = decay, threshold
        self.register_buffer("aabb", aabb.clone())
        self.register_buffer("ema", torch.zeros(G, G, G))
        self.register_buffer("occupied", torch.ones(G, G, G, dtype=torch.bool))

    @torch.no_grad()
    def update(self, density_fn: Callable, step_size: float, warm: bool, generator: torch.Generator | None = None) -> None:
        """Look at the density again, once in each chosen cell, at a random point of it.

        density_fn: (n, 3) world positions -> (n,) sigma. warm: all cells; later a quarter of them drawn at random (with
        replacement) plus the occupied ones (at most a quarter more), half the price.
        """
        G, device = self.ema.shape[0], self.ema.device
        total = G ** 3
        if warm:
            cells = torch.arange(total, device=device)
        else:
            chosen = torch.zeros(total, dtype=torch.bool, device=device)     # a mask, so that no cell comes twice
            chosen[torch.randint(total, (total // 4,), device=device, generator=generator)] = True
            full = self.occupied.flatten().nonzero().squeeze(1)
            if len(full) > total // 4:
                full = full[torch.randint(len(full), (total // 4,), device=device, generator=generator)]
            chosen[full] = True
            cells = chosen.nonzero().squeeze(1)
        ijk = torch.stack([cells // (G * G), cells // G % G, cells % G], -1)
        u = (ijk + torch.rand(len(cells), 3, device=device, generator=generator)) / G
        x = self.aabb[0] + u * (self.aabb[1] - self.aabb[0])
        sigma = torch.cat([density_fn(part).reshape(-1).float() for part in x.split(1 << 18)])   # bounded memory
        ema = self.ema.view(-1)
        ema[cells] = torch.maximum(ema[cells] * self.decay, sigma * step_size)
        self.occupied.copy_(self.ema > self.ema.mean().clamp_max(self.threshold))


# --------------------------------------------------------------------------------------------------- spherical harmonics

def spherical_harmonics(d: Tensor, degree: int = 4) -> Tensor:
    """Real spherical harmonics of unit directions, bands 0 .. degree-1: (N, 3) -> (N, degree**2), orthonormal on the sphere.

    Column l*l + l + m holds Y_l^m. A field sees these instead of d itself: few, smooth, and of known frequency.
    Raises ValueError unless degree is 1, 2, 3 or 4.
    """
    if degree not in (1, 2, 3, 4):
        raise ValueError(f"degree must be 1, 2, 3 or 4, not {degree}")
    x, y, z = d.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    out = [torch.full_like(x, 0.28209479177387814)]
    if degree > 1:
        c = 0.4886025119029199
        out += [-c * y, c * z, -c * x]
    if degree > 2:
        c = 1.0925484305920792
        out += [c * x * y, -c * y * z, 0.31539156525252005 * (3 * zz - 1), -c * x * z, 0.5462742152960396 * (xx - yy)]
    if degree > 3:
        a, b, c = 0.5900435899266435, 2.890611442640554, 0.4570457994644658
        out += [-a * y * (3 * xx - yy), b * x * y * z, -c * y * (5 * zz - 1), 0.3731763325901154 * z * (5 * zz - 3),
                -c * x * (5 * zz - 1), 0.5 * b * z * (xx - yy), -a * x * (xx - 3 * yy)]
    return torch.stack(out, -1)


# -------------------------------------------------------------------------------------------------------------- metrics

def psnr(a: Tensor, b: Tensor) -> Tensor:
    """-10 log10 mean((a - b)^2) in dB, for images in [0, 1] of any shape. An error of 0.1 everywhere gives 20 dB."""
    return -10 * torch.log10(((a - b) ** 2).mean())


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of two images (H, W, 3) in [0, 1]; 1 = equal.

    Per pixel and channel (2 ma mb + C1)(2 sab + C2) / ((ma^2 + mb^2 + C1)(sa^2 + sb^2 + C2)), C1 = 0.01^2, C2 = 0.03^2,
    means and (co)variances under an 11x11 Gaussian window, sigma 1.5; averaged over all places where the window fits.
    """
    if min(a.shape[:2]) < 11:
        raise UserError(f"SSIM needs pictures of at least 11x11 px, not {_wh(a)}: use a larger --size")
    g = torch.exp(-0.5 * ((torch.arange(11, device=a.device, dtype=a.dtype) - 5) / 1.5) ** 2)
    g = g / g.sum()
    a, b = a.permute(2, 0, 1)[:, None], b.permute(2, 0, 1)[:, None]                    # (3, 1, H, W)
    blur = lambda x: F.conv2d(F.conv2d(x, g.view(1, 1, 11, 1)), g.view(1, 1, 1, 11))
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    C1, C2 = 0.01 ** 2, 0.03 ** 2
    return (((2 * ma * mb + C1) * (2 * cov + C2)) / ((ma * ma + mb * mb + C1) * (va + vb + C2))).mean()


# --------------------------------------------------------------------------------------------- camera paths and pictures

def orbit_poses(n: int, radius: float, elevation_deg: float = 30.0, centre=(0.0, 0.0, 0.0)) -> Tensor:
    """n cameras (n, 3, 4) on a full turn around `centre`, z upwards."""
    return torch.tensor(np.stack([orbit_pose(2 * np.pi * i / n, np.radians(elevation_deg), radius, centre) for i in range(n)]), dtype=torch.float32)


def turntable(scene: Scene, n: int) -> Tensor:
    """A closed camera path (n, 3, 4) that suits the scene: an orbit at the training cameras' distance; for a
    forward-facing scene, an ellipse within them that keeps looking at a point 4 units ahead; for DTU, whose cameras stand on one
    side and whose "up" is no axis, an ellipse within them on the sphere of their mean distance, looking at the origin."""
    turn = 2 * np.pi * np.arange(n) / n
    if scene.kind == "dtu":
        c2w = scene.train.c2w.cpu().double().numpy()
        position, up = c2w[:, :, 3], c2w[:, :, 1].sum(0)
        mean = look_at(position.mean(0), np.zeros(3), up)
        reach = 0.7 * np.quantile(abs(position @ mean[:, :2]), 0.9, axis=0)             # right and up, as the mean camera sees it
        path = mean[:, 3] + (np.stack([np.cos(turn), np.sin(turn)], -1) * reach) @ mean[:, :2].T
        path *= np.linalg.norm(position, axis=1).mean() / np.linalg.norm(path, axis=1, keepdims=True)
        return torch.tensor(np.stack([look_at(p, np.zeros(3), up) for p in path]), dtype=torch.float32)
    if not scene.ndc:
        centre = scene.aabb.mean(0).cpu()
        radius = float((scene.train.c2w[:, :, 3].cpu() - centre).norm(dim=-1).mean())
        return orbit_poses(n, radius, 30.0, centre.tolist())
    reach = 0.7 * scene.train.c2w[:, :2, 3].abs().quantile(0.9, dim=0).cpu().numpy()
    path = [look_at((reach[0] * np.cos(a), reach[1] * np.sin(a), 0), (0, 0, -4), (0, 1, 0)) for a in turn]
    return torch.tensor(np.stack(path), dtype=torch.float32)


def _bytes(image: Tensor) -> np.ndarray:
    image = image.detach().float().cpu().nan_to_num(0).clamp(0, 1)
    return (image.expand(*image.shape[:2], max(3, image.shape[2])) * 255 + 0.5).byte().numpy()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write (H, W, 1 | 3 | 4) in [0, 1] as an 8-bit PNG."""
    iio.imwrite(path, _bytes(image), extension=".png")


def save_video(path: str | Path, frames: list[Tensor], fps: int = 30) -> None:
    """Write frames (H, W, 3) in [0, 1] as .mp4 (H.264) or .gif, by the name's ending."""
    stack = np.stack([_bytes(frame) for frame in frames])
    if Path(path).suffix == ".gif":
        iio.imwrite(path, stack, duration=1000 / fps, loop=0)
        return
    H, W = stack.shape[1:3]
    stack = np.pad(stack, ((0, 0), (0, H % 2), (0, W % 2), (0, 0)), mode="edge")       # H.264 wants even sides
    iio.imwrite(path, stack, fps=fps, codec="libx264", macro_block_size=2)


def colour_map(x: Tensor, lo: float, hi: float) -> Tensor:
    """Numbers -> colours, (...) -> (..., 3): dark blue at lo, green in the middle, dark red at hi (polynomial fit of Turbo)."""
    x = ((x - lo) / max(hi - lo, 1e-12)).nan_to_num(0).clamp(0, 1)[..., None]
    powers = torch.cat([x ** k for k in range(6)], -1)
    fit = torch.tensor([[0.13572138, 4.61539260, -42.66032258, 132.13108234, -152.94239396, 59.28637943],
                        [0.09140261, 2.19418839, 4.84296658, -14.18503333, 4.27729857, 2.82956604],
                        [0.10667330, 12.64194608, -60.58204836, 110.36276771, -89.90310912, 27.34824973]], device=x.device, dtype=x.dtype)
    return (powers @ fit.T).clamp(0, 1)


def strip(truth: Tensor, render: Tensor, depth: Tensor, near: float, far: float) -> Tensor:
    """(H, 4W, 3): ground truth | render | mean absolute error, 0 to 0.25 | depth, near to far. truth, render (H, W, 3), depth (H, W)."""
    error = (truth - render).abs().mean(-1)
    return torch.cat([truth, render.clamp(0, 1), colour_map(error, 0.0, 0.25), colour_map(depth, near, far)], 1)


@dataclass
class Panel:
    """Lines in one pair of axes."""
    x_title: str
    curves: dict            # label -> x (n,) ascending, y (n,) or, in a band, (k, n); n = 0: the label is kept, nothing is drawn
    y_title: str = ""


def draw_panels(panels: list[Panel], log: bool = False, dots: bool = False) -> str:
    """SVG text: panels side by side above one legend; a label has one colour in all of them. k > 1: a line through the means, in a band
    from the least to the greatest. Panels with one y_title share the range of y. log: both axes are logarithmic. dots: one at each point
    of a line. A panel without points is left out; ValueError if no point is left, or one is not finite or, with log, not positive."""
    colours = ("#2f81f7", "#e5711d", "#2da44e", "#d1549b", "#8b6cef", "#a8850a")       # each readable on white and on black,
    grey = "#808890"                                                                   # and so is this
    stroke = lambda i: f'stroke="{colours[i % 6]}"' + (' stroke-dasharray="5 3"' if i >= 6 else "")         # then again, dashed
    labels = list(dict.fromkeys(label for panel in panels for label in panel.curves))
    panels = [replace(panel, curves={label: (np.asarray(x), np.atleast_2d(y)) for label, (x, y) in panel.curves.items() if len(x)})
              for panel in panels]
    panels = [panel for panel in panels if panel.curves]
    numbers = [v for panel in panels for xy in panel.curves.values() for v in xy]
    if not numbers or not all(np.isfinite(v).all() and (not log or v.min() > 0) for v in numbers):
        raise ValueError("nothing to draw, or a number that is not finite or has no logarithm")
    scale = np.log10 if log else lambda v: v
    ends = lambda lists: (scale(min(v.min() for v in lists)), scale(max(v.max() for v in lists)))
    wider = lambda lo, hi: (lo - 0.05 * (hi - lo) - 0.1, hi + 0.05 * (hi - lo) + 0.1)
    short = lambda v: next((f"{v / n:g}{unit}" for n, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if v >= n), f"{v:g}")
    w, h, left, top = 190, 170, 55 if log else 45, 12                   # of a panel, in pixels; "100k" is wide
    pitch = left + w + 10
    body, text = [], lambda x, y, words, anchor: f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(words)}</text>'
    for n, panel in enumerate(panels):
        x0 = left + n * pitch
        lo, hi = wider(*ends([y for other in panels if other.y_title == panel.y_title for _, y in other.curves.values()]))
        x_lo, x_hi = ends([x for x, _ in panel.curves.values()])
        x_lo, x_hi = wider(x_lo, x_hi) if log else (0, max(x_hi, 1e-9))
        X, Y = lambda x: x0 + w * (scale(x) - x_lo) / (x_hi - x_lo), lambda y: top + h * (hi - scale(y)) / (hi - lo)
        for y in log_ticks(10 ** lo, 10 ** hi) if log else round_ticks(lo, hi):
            body += [f'<path d="M{x0} {Y(y):.1f}h{w}" stroke="{grey}" stroke-opacity="0.3"/>', text(x0 - 6, Y(y) + 4, short(y), "end")]
        for x in log_ticks(10 ** x_lo, 10 ** x_hi) if log else round_ticks(x_lo, x_hi, 4):
            body += [f'<path d="M{X(x):.1f} {top + h}v4" stroke="{grey}"/>', text(X(x), top + h + 17, short(x), "middle")]
        body += [f'<path d="M{x0} {top}v{h}h{w}" fill="none" stroke="{grey}"/>', text(x0 + w / 2, top + h + 35, panel.x_title, "middle")]
        for i, label in enumerate(labels):
            if label in panel.curves:
                x, y = panel.curves[label]
                mean, fill = y.mean(0), f'fill="{colours[i % 6]}"'
                path = lambda x, y: " ".join(f"{X(a):.1f},{Y(b):.1f}" for a, b in zip(x, y))
                if len(y) > 1:
                    body.append(f'<polygon points="{path(x, y.min(0))} {path(x[::-1], y.max(0)[::-1])}" {fill} fill-opacity="0.2"/>')
                body.append(f'<polyline points="{path(x, mean)}" fill="none" {stroke(i)} stroke-width="2"/>')
                body += [f'<circle cx="{X(a):.1f}" cy="{Y(b):.1f}" r="3" {fill}/>' for a, b in zip(x, mean) if dots]
    x, y, width = left, top + h + 60, max(len(panels) * pitch, 400)
    for i, label in enumerate(labels):                                  # the legend, broken into lines
        if x > left and x + 40 + 7 * len(label) > width:
            x, y = left, y + 18
        body += [f'<path d="M{x} {y - 4}h18" {stroke(i)} stroke-width="3"/>', text(x + 24, y, label, "start")]
        x += 45 + 7 * len(label)
    for n, panel in enumerate(panels):
        if n == 0 or panel.y_title != panels[n - 1].y_title:
            body.append(f'<text transform="translate({10 + n * pitch} {top + h / 2}) rotate(-90)" text-anchor="middle">'
                        f'{html.escape(panel.y_title)}</text>')
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 12}" width="{width}" height="{y + 12}" '
            f'font-family="sans-serif" font-size="12" fill="{grey}">\n' + "\n".join(body) + "\n</svg>\n")


def round_ticks(lo: float, hi: float, most: int = 5) -> np.ndarray:
    """At most `most` round numbers (1, 2 or 5 times a power of ten apart) in [lo, hi], lo < hi."""
    unit = 10 ** math.floor(math.log10((hi - lo) / most))
    gap = next(unit * k for k in (1, 2, 5, 10, 20) if math.floor(hi / (unit * k)) - math.ceil(lo / (unit * k)) < most)
    return gap * np.arange(math.ceil(lo / gap), math.floor(hi / gap) + 1)


def log_ticks(lo: float, hi: float, most: int = 5) -> list[float]:
    """At most `most` numbers in [lo, hi], 0 < lo < hi, for a logarithmic axis: 1, 2, 5 times powers of ten; where these are too many, the
    powers alone, or every second, third, ... of them; where they are fewer than two, round_ticks."""
    decades = range(math.floor(math.log10(lo)), math.floor(math.log10(hi)) + 1)
    fine, powers = ([t for k in decades for digit in digits if lo <= (t := float(f"{digit}e{k}")) <= hi] for digits in ((1, 2, 5), (1,)))
    if len(fine) < 2:
        return round_ticks(lo, hi, most).tolist()
    return fine if len(fine) <= most else powers[::math.ceil(len(powers) / most)]


# ----------------------------------------------------------------------------------------------------------- run folder

def plain(value):
    """The same value out of dict, list, str, int, float, bool and None only. NaN and infinity become None: JSON has no word for them."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def write_whole(path: Path, write: Callable) -> None:
    """write(file) into a temporary file beside `path`, then put it in place: whoever looks sees the old file or the new
    one, never half of one, also after a power cut."""
    temp = path.with_name(path.name + ".tmp")
    with open(temp, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temp, path)


def _write_json(path: Path, value) -> None:
    write_whole(path, lambda file: file.write(json.dumps(plain(value), indent=1, allow_nan=False).encode()))


def environment() -> dict:
    """What a number depends on: versions, device, git commit of this repository, date, command line."""
    def git(*words):
        try:
            done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10)
            return done.stdout.strip() if done.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired):
            return None
    def version(package):
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return None
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):
        cpu = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[0]
    changes = git("status", "--porcelain")
    return {"python": platform.python_version(), **{p: version(p) for p in ("torch", "triton", "numpy")},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu", "cpu": cpu, "threads": torch.get_num_threads(),
            "commit": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"), "argv": sys.argv}


class Run:
    """A run's folder: args.json, env.json, metrics.jsonl, summary.json, ckpt.pt. It never overwrites another run.

    out None: runs/<method>-<scene>-<time>, else exactly `out`. resume: the folder of the run to continue; `resumed` tells whether it has
    a checkpoint, as a run that was killed before its first one starts again from the beginning; eval_only: it must have one.
    Raises UserError if the folder holds a run and both are off, if they find none, or if it cannot be written.
    """
    def __init__(self, method: str, scene_name: str, out: str | Path | None, args: dict, resume: bool = False, eval_only: bool = False):
        self.identity = {"method": method, "scene": scene_name}
        self.args = plain(args | {name: False for name in ("resume", "eval_only") if name in args})     # what it is, not how it was called
        name = f"{method}-{scene_name}-{datetime.now():%Y%m%d-%H%M%S}"
        self.path = Path(out) if out is not None else Path("runs") / name
        self.resumed = (resume or eval_only) and (self.path / "ckpt.pt").is_file()
        if eval_only and not self.resumed:
            raise UserError(f"{self.path}: no ckpt.pt to evaluate: train first")
        if resume and out is None:
            raise UserError("--resume needs --out DIR, the folder of the run to continue")
        if resume and not (self.resumed or (self.path / "args.json").is_file()):
            raise UserError(f"{self.path}: no ckpt.pt to resume from: check --out, or leave --resume away to start afresh")
        if self.resumed:
            return
        try:
            n = 1
            while out is None and self.path.exists():                   # two runs started within a second
                n += 1
                self.path = Path("runs") / f"{name}-{n}"
            if not resume and any((self.path / f).exists() for f in ("args.json", "ckpt.pt", "metrics.jsonl")):
                raise UserError(f"{self.path}: already holds a run: --resume to continue it, or another --out")
            self.path.mkdir(parents=True, exist_ok=True)
            _write_json(self.path / "args.json", self.args)
            _write_json(self.path / "env.json", environment())
        except OSError as error:
            raise UserError(f"--out {self.path}: cannot be written ({error.strerror}): choose another --out") from None

    def log(self, **metrics) -> None:
        """Append one line to metrics.jsonl."""
        with open(self.path / "metrics.jsonl", "a") as file:
            file.write(json.dumps(plain(metrics), allow_nan=False) + "\n")

    def rewind(self, step: int, by: str = "step") -> None:
        """A run goes on: args.json takes the flags of now, and the lines of metrics.jsonl whose `by` is after `step`, which will be written
        again, are forgotten; half a line at the end goes too."""
        _write_json(self.path / "args.json", self.args)
        path = self.path / "metrics.jsonl"
        if not path.is_file():
            return
        kept = []
        for line in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                if json.loads(line).get(by, 0) <= step:
                    kept.append(line + "\n")
        write_whole(path, lambda file: file.write("".join(kept).encode()))

    def summary(self, **values) -> None:
        """Write summary.json."""
        _write_json(self.path / "summary.json", values)

    def save(self, state: dict) -> None:
        """Write ckpt.pt, whole or not at all. state: tensors and plain values; method, scene and args are added."""
        everything = {**self.identity, "args": self.args, **state}
        write_whole(self.path / "ckpt.pt", lambda file: torch.save(everything, file))

    def load(self, expect: dict | None = None) -> dict:
        """Read ckpt.pt onto the CPU. UserError if it is broken, of another method or scene, or if one of `expect`
        (name -> value, compared with the args it was saved with) differs."""
        path = self.path / "ckpt.pt"
        state = load_tensors(path, "checkpoint", "args")
        for saved, wanted in ((state, self.identity), (state["args"], expect or {})):
            for key, value in wanted.items():
                if key not in saved or saved[key] != plain(value):
                    raise UserError(f"{path}: of another run: {key} was {saved.get(key, 'not set')}, now {plain(value)}: give the same {key}, "
                                    "or another --out")
        return state


def load_tensors(path: Path, what: str, *needed: str) -> dict:
    """Read onto the CPU what torch.save wrote. UserError, which calls it a `what`, if it is broken or lacks one of the keys `needed`."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        [state[key] for key in needed]
    except Exception as error:                                          # zip, pickle, EOF, key, type: all mean the same here
        raise UserError(f"{path}: not a usable {what} ({type(error).__name__}): start afresh with another --out") from None
    return state


def random_state() -> dict:
    """All random states, as tensors and plain numbers (loadable with weights_only=True)."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "numpy": [torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)],
            "python": [random.getstate()[0], list(random.getstate()[1]), random.getstate()[2]]}


def set_random_state(state: dict) -> None:
    """The inverse of random_state()."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))


class Progress:
    """One line: step, values, seconds left. Rewritten in place on a terminal, printed every 10 s elsewhere."""
    def __init__(self, total: int, start: int = 0):
        self.total, self.start, self.began, self.last = total, start, time.monotonic(), -math.inf
        self.tty = sys.stdout.isatty()

    def __call__(self, step: int, **values) -> None:
        """values: numbers, shown as name value; a Tensor is read only when the line is shown (reading one waits for the GPU)."""
        now = time.monotonic()
        if now - self.last < (0.2 if self.tty else 10) and step < self.total:
            return
        self.last = now
        left = (now - self.began) / max(step - self.start, 1) * (self.total - step)
        shown = "  ".join(f"{name} {float(v.detach() if isinstance(v, Tensor) else v):.4g}" for name, v in values.items())
        line = f"step {step}/{self.total}  {shown}  {left:.0f} s left"
        print(f"\r{line:<100}" if self.tty else line, end="" if self.tty else "\n", flush=True)

    def close(self) -> None:
        if self.tty:
            print(flush=True)


class Stopwatch:
    """Adds up the seconds between start() and stop(); waits for the GPU at both ends, so that its work is counted."""
    def __init__(self, device="cpu", seconds: float = 0.0):
        self.device, self.seconds, self.began = torch.device(device), seconds, None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def start(self) -> None:
        self.began = self._now()

    def stop(self) -> float:
        """-> all seconds so far."""
        if self.began is not None:
            self.seconds, self.began = self.seconds + self._now() - self.began, None
        return self.seconds


def tensorboard(folder):
    """A SummaryWriter, or UserError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard: it is not installed: pip install tensorboard, or leave the flag away") from None
    return SummaryWriter(folder)


def peak_memory_mb(device="cpu") -> float:
    """Largest memory so far in MiB: of PyTorch on a CUDA device, of the whole process on a CPU (nan on Windows)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10)


# ------------------------------------------------------------------------------------------------------------- commands

@dataclass
class Compare:
    """A Markdown table of finished runs, one picture with their first test views below each other, and PSNR against cost as curves.

    Runs whose names differ only by their seed (lmc-s0, lmc-s1, ...) count as one: mean and sample standard deviation.
    """
    runs: tyro.conf.Positional[list[Path]]
    """Run folders."""
    out: Path = Path("compare.png")
    """Where the runs' pictures go, below each other or, if they are not wide, side by side."""
    curves: Path | None = None
    """Where the curves go (FILE.svg): held-out PSNR against steps, rays, samples and training seconds."""
    against: str | None = None
    """Curves of final PSNR against this number of summary.json instead (bytes_per_frame, ...): a line joins runs alike up to the last "-"."""
    keys: list[str] = field(default_factory=list)
    """More numbers out of summary.json to show (entropy_bits, ...)."""
    picture: str = "test_000.png"
    """Which picture of each run."""

    def __call__(self) -> None:
        if not self.runs:
            raise UserError("compare needs at least one run folder: python common.py compare runs/A runs/B")
        if self.curves and self.curves.suffix != ".svg":
            raise UserError(f"--curves {self.curves}: the curves are written as SVG: give a name that ends in .svg")
        if self.against and not self.curves:
            raise UserError("--against says what the curves show: give --curves FILE.svg as well")
        print(compare(self.runs, self.keys))
        pictures = [(run, read_image(run / self.picture)[..., :3]) for run in self.runs if (run / self.picture).is_file()]
        path, flag = self.out, "--out"
        try:
            if pictures:
                H, W = (max(image.shape[axis] for _, image in pictures) for axis in (0, 1))
                wide = W >= 2 * H                                       # strips below each other, other pictures side by side
                pad = lambda h, w: ((0, 4 if wide else H - h), (0, W - w if wide else 4), (0, 0))
                padded = [np.pad(image, pad(*image.shape[:2]), constant_values=1) for _, image in pictures]
                save_png(self.out, torch.from_numpy(np.concatenate(padded, 0 if wide else 1)))
                print(f"\n{self.out}, {self.picture} from {'top to bottom' if wide else 'left to right'}:", ", ".join(run.name for run, _ in pictures))
            if self.curves:
                path, flag = self.curves, "--curves"
                self.curves.write_text(draw_curves(self.runs, self.against), encoding="utf-8")
                print(f"\n{self.curves}: held-out PSNR against {self.against or 'cost'}")
        except OSError as error:
            raise UserError(f"{flag} {path}: cannot be written ({error.strerror}): choose another {flag}") from None


def read_runs(runs: list[Path]) -> dict[str, list[tuple[dict, list[dict]]]]:
    """label -> its runs, each as (summary, evaluations); one label for runs in a folder whose names differ only in a trailing -s<seed>."""
    groups = {}
    for run in runs:
        groups.setdefault(run.with_name(re.sub(r"-s\d+$", "", run.name)) if run.name else run, []).append(run)
    out = {}
    for group, members in groups.items():
        read = []
        for run in members:
            try:
                summary = json.loads((run / "summary.json").read_text())
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            except (OSError, ValueError) as error:
                raise UserError(f"{run}: not a finished run ({error}): it needs summary.json and metrics.jsonl") from None
            read.append((summary, [line for line in lines if None not in (line.get("step"), line.get("train_seconds"), line.get("psnr"))]))
        label = members[0].name if len(members) == 1 else f"{group.name} ({len(members)} runs)"
        out[label if label not in out else str(members[0])] = read
    return out


def cost_to_reach(curve: list[dict], target: float, cost: str) -> float | None:
    """The least `cost` ("step", "train_seconds") at which a run's PSNR is `target`, linear between evaluations; None: never.
    A run that is there at its first evaluation gets that evaluation's cost. Pocket check: 20 dB at step 10, 24 dB at 20: 23 dB at 17.5."""
    for i, line in enumerate(curve):
        if line["psnr"] >= target:
            before = curve[max(i - 1, 0)]
            share = 1 if i == 0 else (target - before["psnr"]) / (line["psnr"] - before["psnr"])
            return before[cost] + share * (line[cost] - before[cost])
    return None


def compare(runs: list[Path], more: list[str] = ()) -> str:
    """The table of `python common.py compare`, one row a run or a group of seeds: the end; `more` numbers of summary.json;
    PSNR at the largest step that all runs evaluated; PSNR at the largest training time that all reached, linear between evaluations;
    and the cost of the FIRST row's final PSNR as a share of that row's whole cost ("0.60 (2 of 3)": the mean over the runs that got
    there). A group shows mean ± sample standard deviation where its runs differ; "-" where a run does not say."""
    groups = read_runs(runs)
    first = [curve for _, curve in next(iter(groups.values()))]
    curves = [curve for group in groups.values() for _, curve in group]
    shared = set.intersection(*({line["step"] for line in curve} for curve in curves))
    step = max(shared) if shared else None
    seconds = min(curve[-1]["train_seconds"] for curve in curves) if all(curves) else None
    target = np.mean([curve[-1]["psnr"] for curve in first]) if all(first) else None

    def cell(values, digits):
        if not all(isinstance(value, (str, int, float)) for value in values):
            return "-"
        if isinstance(values[0], str):
            return " / ".join(dict.fromkeys(values))
        spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(set(values)) > 1 else ""
        return f"{np.mean(values):.{digits}f}{spread}"

    def share(group, cost):
        reached = [] if target is None else [c for _, curve in group if (c := cost_to_reach(curve, target, cost)) is not None]
        whole = np.mean([curve[-1][cost] for curve in first]) if reached else 0
        if whole == 0:
            return "-"
        if len(reached) < len(group):
            return f"{np.mean(reached) / whole:.2f} ({len(reached)} of {len(group)})"
        return cell([c / whole for c in reached], 2)

    to = "the first's" if target is None else f"{target:.2f} dB"
    table = [["run", "method", "scene", "data", "px", "steps", "train s", "MB", "PSNR", "SSIM", *more,
              "PSNR at equal steps" + (f" ({step})" if step is not None else ""),
              "PSNR at equal seconds" + (f" ({seconds:.0f})" if seconds is not None else ""),
              f"share of steps to {to}", f"share of train s to {to}"]]
    table.append(["---"] * 5 + ["---:"] * (9 + len(more)))
    for label, group in groups.items():
        keys = dict(method=0, scene=0, data=0, size=0, steps=0, train_seconds=1, peak_memory_mb=0, psnr=2, ssim=4)
        columns = [*keys.items(), *((key, 3) for key in more)]                          # a key that is there already is shown again
        at_step = [next((line["psnr"] for line in curve if line["step"] == step), None) for _, curve in group]
        at_time = [None if seconds is None else np.interp(seconds, [line["train_seconds"] for line in curve], [line["psnr"] for line in curve])
                   for _, curve in group]
        table.append([label, *(cell([summary.get(key) for summary, _ in group], digits) for key, digits in columns),
                      cell(at_step, 2), cell(at_time, 2), share(group, "step"), share(group, "train_seconds")])
    return "\n".join("| " + " | ".join(row) + " |" for row in table)


def draw_curves(runs: list[Path], against: str | None = None) -> str:
    """SVG text: held-out PSNR against steps, rays, samples, training seconds (a panel is left out where no run has its numbers).
    Seeds of one run: a line through their means, linear between evaluations, in a band from the least to the greatest.
    against: a key of summary.json; then a line through the ends of all runs whose names agree up to the last "-"."""
    def curve(group, cost):                                             # x (n,), PSNR of each run (runs, n)
        lines = [[line for line in curve if line.get(cost) is not None] for _, curve in group]
        if not all(lines):
            return np.empty(0), np.empty((1, 0))
        x = np.unique([line[cost] for curve in lines for line in curve])
        x = x[(x >= max(curve[0][cost] for curve in lines)) & (x <= min(curve[-1][cost] for curve in lines))]   # where all have been
        return x, np.stack([np.interp(x, [line[cost] for line in curve], [line["psnr"] for line in curve]) for curve in lines])

    groups = read_runs(runs)
    curves = {cost: {label: curve(group, cost) for label, group in groups.items()} for cost in ("step", "rays", "samples", "train_seconds")}
    if against:
        ends = {}
        for label, group in groups.items():
            points = [(summary.get(against), summary.get("psnr")) for summary, _ in group]
            points = [point for point in points if all(isinstance(number, (int, float)) for number in point)]
            ends.setdefault(label.rpartition("-")[0] or label, []).extend(points)
        curves = {against: {label: np.array(sorted(points), dtype=float).T for label, points in ends.items() if points}}
    if not any(len(x) for lines in curves.values() for x, _ in lines.values()):
        raise UserError(f"{runs[0]}: nothing to draw: summary.json has no number {against}" if against else
                        f"{runs[0]}: no evaluations to draw: its metrics.jsonl needs lines with step, train_seconds and psnr")
    titles = {"step": "steps", "train_seconds": "training seconds"}
    return draw_panels([Panel(titles.get(cost, cost), lines, "held-out PSNR [dB]") for cost, lines in curves.items()], dots=bool(against))


@dataclass
class Download:
    """Fetch a Blender scene (chair, drums, ficus, hotdog, lego, materials, mic, ship) into DATA/nerf_synthetic/SCENE."""
    scene: tyro.conf.Positional[str]
    """Name of the scene."""
    data: Path = Path(os.environ.get("NERF_DATA", "data"))
    """The data folder; default: the environment variable NERF_DATA, else data."""
    url: str | None = None
    """A zip archive to take instead of the public mirror's."""

    def __call__(self) -> None:
        download(self.scene, self.data, self.url)


MIRROR = "https://huggingface.co/datasets/nerfbaselines/nerfbaselines-data/resolve/main/blender/{}.zip"


def download(scene: str, data: Path, url: str | None = None) -> Path:
    """Fetch and unpack a scene's zip archive -> data/nerf_synthetic/SCENE, which appears only when it is complete.

    What has arrived is kept in SCENE.zip.part, and the next call asks the server for the rest. Raises UserError for a
    failed or cut transfer, for something that is no zip archive or no scene, and for an archive with a path or link that
    would leave the folder (nothing of it is unpacked).
    """
    if not re.fullmatch(r"[\w-][\w.-]*", scene):
        raise UserError(f"{scene!r} is not a scene's name: letters, digits, '-', '_' and '.' only")
    if url is None and scene not in BLENDER_SCENES:
        raise UserError(f"the mirror has no scene {scene!r}: choose one of {', '.join(BLENDER_SCENES)}, or give --url")
    folder = data / "nerf_synthetic" / scene
    if folder.exists():
        raise UserError(f"{folder}: is there already: use it, or remove it first to fetch it again")
    part = folder.with_name(scene + ".zip.part")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        fetch(url or MIRROR.format(scene), part)
        unpack(part, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}): free some space, or choose another --data") from None
    part.unlink()
    print(f"{folder} is ready")
    return folder


def fetch(url: str, part: Path) -> None:
    """Append to `part` what it lacks of the file at `url`, through HTTP Range where the server knows it."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"User-Agent": "python", **({"Range": f"bytes={have}-"} if have else {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            if reply.status != 206:                                     # the server starts at the beginning, so do we
                have = 0
            length = reply.headers.get("Content-Length")
            total = have + int(length) if length else None
            print(f"{url}: {total / 1e6:.1f} MB" if total else f"{url}: size unknown", f"({have / 1e6:.1f} MB are here already)" if have else "")
            progress = Progress(max(1, (total or 0) >> 20), have >> 20)
            with open(part, "r+b" if have else "wb") as file:
                file.seek(have)
                while block := reply.read(1 << 20):
                    file.write(block)
                    have += len(block)
                    progress(min(have >> 20, progress.total), MB=have / 1e6)
            progress.close()
    except urllib.error.HTTPError as error:
        if error.code == 416:                                           # nothing lacks: complete, or not the same file any more
            if error.headers.get("Content-Range", "").strip() == f"bytes */{have}":
                return
            part.unlink()
            raise UserError(f"{url}: has changed since {part.name} was begun: run the command again") from None
        raise UserError(f"{url}: the server says {error.code} {error.reason}: check the name, or give another --url") from None
    except (urllib.error.URLError, http.client.HTTPException, ValueError, TimeoutError, ConnectionError) as error:
        raise UserError(f"{url}: {getattr(error, 'reason', None) or error or type(error).__name__}: run the command again, "
                        f"it goes on from {have / 1e6:.1f} MB; or check --url and the network") from None
    if total is not None and have < total:
        raise UserError(f"{url}: cut at {have / 1e6:.1f} of {total / 1e6:.1f} MB: run the command again, it goes on from there")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a scene's zip archive as `folder`; whether its files lie at the root or in one top folder does not matter."""
    temp = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(temp, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            for entry in zipped.infolist():
                path = PurePosixPath(entry.filename.replace("\\", "/"))
                if path.is_absolute() or ".." in path.parts or ":" in entry.filename or stat.S_ISLNK(entry.external_attr >> 16):
                    raise UserError(f"{archive}: refused, {entry.filename!r} in it would leave the folder: find another source")
            zipped.extractall(temp)                                     # checks every file's CRC
        top = temp
        if not (top / "transforms_train.json").is_file():
            top = next((f.parent for f in sorted(temp.glob("*/transforms_train.json"))), None)
        if top is None:
            raise UserError(f"{archive}: has no transforms_train.json: not a Blender scene; remove it and give another --url")
        os.replace(top, folder)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        archive.unlink()
        raise UserError(f"{archive}: was not a good zip archive ({error}) and is removed: run the command again, or give another --url") from None
    finally:
        shutil.rmtree(temp, ignore_errors=True)


@dataclass
class Bricks:
    """Write the built-in scene as files in Blender's layout: something to look at, and to load again."""
    out: Path
    """An empty or new folder."""
    size: int = 200
    """Image side in pixels."""

    def __call__(self) -> None:
        _check_new(self.out)
        for split in ("train", "val", "test"):
            views = load_bricks(split, self.size, torch.zeros(3))       # on black: images are colour * alpha
            try:
                (self.out / split).mkdir(parents=True)
                _save_views(views, [self.out / f"{name}.png" for name in views.names])
                last_row = torch.tensor([[0.0, 0.0, 0.0, 1.0]])
                frames = [{"file_path": f"./{name}", "transform_matrix": torch.cat([c2w, last_row]).tolist()} for name, c2w in zip(views.names, views.c2w)]
                angle = 2 * math.atan(0.5 * self.size / float(views.K[0, 0]))
                _write_json(self.out / f"transforms_{split}.json", {"camera_angle_x": angle, "frames": frames})
            except OSError as error:
                raise UserError(f"--out {self.out}: cannot be written ({error.strerror}): choose another --out") from None
        print(f"{self.out}: 100 train, 25 val, 25 test views of {self.size} px")


def _check_new(out: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out {out}: exists and is not an empty folder: choose another --out")


def _save_views(views: Views, paths: list[Path]) -> None:
    """Pictures on black, which are colour * alpha, as PNG files with colour and alpha."""
    for image, alpha, path in zip(views.images, views.alpha, paths):
        save_png(path, torch.cat([image / alpha.clamp_min(1e-6)[..., None], alpha[..., None]], -1))


@dataclass
class Cars:
    """Write cars of the built-in family as files in the layout of the SRN cars, 50 views each: something to look at, and to load again."""
    out: Path
    """An empty or new folder."""
    n: int = 3
    """How many: seeds 0 to n - 1."""
    size: int = 128
    """Image side in pixels."""

    def __call__(self) -> None:
        if min(self.n, self.size) < 1:
            raise UserError(f"--n {self.n}, --size {self.size}: must be at least 1")
        _check_new(self.out)
        for seed in range(self.n):
            views, folder = load_car(seed, self.size, torch.zeros(3), False), self.out / f"car_{seed:05d}"
            try:
                for part in ("rgb", "pose"):
                    (folder / part).mkdir(parents=True)
                _save_views(views, [folder / "rgb" / f"{name}.png" for name in views.names])
                for name, c2w in zip(views.names, views.c2w * torch.tensor([1.0, -1.0, -1.0, 1.0])):                 # OpenCV's axes
                    (folder / "pose" / f"{name}.txt").write_text(" ".join(map(repr, c2w.flatten().tolist())) + " 0.0 0.0 0.0 1.0\n")
                (folder / "intrinsics.txt").write_text("525.0 256.0 256.0 0.\n0. 0. 0.\n1.\n512 512\n")
            except OSError as error:
                raise UserError(f"--out {self.out}: cannot be written ({error.strerror}): choose another --out") from None
        print(f"{self.out}: {self.n} cars, 50 views of {self.size} px each")


COMMANDS = Compare | Download | Bricks | Cars

if __name__ == "__main__":
    _one_line_errors(lambda: tyro.cli(COMMANDS, description=__doc__), lambda command: command())
