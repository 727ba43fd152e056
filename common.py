"""What every method needs and none is about: scenes, rays, samplers, metrics, pictures, runs.

Conventions. Camera to world `c2w` (3, 4) has OpenGL axes: x right, y up, the camera looks along -z.
`K` (3, 3) speaks of pixels of the images that were really loaded; the centre of the pixel in row i,
column j is x = j + 0.5, y = i + 0.5. Ray directions are unit vectors: a distance t is metric.

    python common.py compare runs/a runs/b       # a table; with --curves FILE.svg PSNR against cost
    python common.py download lego               # a real scene -> data/nerf_synthetic/lego
"""
import colorsys
import contextlib
import html
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from datetime import datetime
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, Iterable, Literal, Optional

import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor, nn

from kernels import hash_encode, hash_levels, march

torch.set_flush_denormal(True)          # numbers below 1e-38 are 0: a CPU needs 100 cycles for each


# ------------------------------------------------------------------- errors and command line

class UserError(Exception):
    """What the user can mend, in one line: WHAT or WHERE: what is wrong: what to do."""


@dataclass
class RunArgs:
    """The flags that all methods share."""
    scene: str = "lego"
    """A scene's name under --data, a path, or the built-in `bricks`."""
    data: str = os.environ.get("NERF_DATA", "data")
    """The data folder (default: $NERF_DATA, else `data`)."""
    preset: Literal["quick", "paper"] = "quick"
    """quick: two minutes on two cores. paper: the paper's setting, for a GPU."""
    out: Optional[str] = None
    """The run folder (default: runs/METHOD-SCENE-TIME)."""
    seed: int = 0
    """Seed of every random number."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, ..."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    eval_only: bool = False
    """Evaluate the checkpoint in --out and write its pictures; train nothing."""
    video: bool = False
    """Also write a film, render.mp4."""
    tensorboard: bool = False
    """Also log to TensorBoard, if it is installed."""
    size: int = 100
    """Longer image side [pixels]."""
    steps: int = 3000
    """Optimiser steps."""
    eval_every: int = 300
    """Steps between two evaluations; each one writes a checkpoint."""
    eval_views: int = 5
    """Test views of these evaluations (the last one takes all)."""


@dataclass
class SceneArgs(RunArgs):
    """The flags of the methods that train on the pictures of one scene."""
    background: Literal["white", "black", "grey"] = "white"
    """What stands behind the scene in its pictures, where they have alpha."""
    train_background: Literal["random", "scene"] = "random"
    """Behind each training ray: a colour of its own (see random_background), or the scene's."""
    normalise: bool = True
    """Move and scale a world that does not fit the box of the synthetic scenes."""


def require(ok, line: str) -> None:
    if not ok:
        raise UserError(line)


def check_flags(args, positive=(), not_negative=(), shares=()) -> None:
    """Names of flags in (0, inf), [0, inf) and [0, 1], beyond those of RunArgs."""
    positive = {"steps", "eval_every", "eval_views", *positive} - {*not_negative}
    for name, value in vars(args).items():
        flag = f"--{name.replace('_', '-')} {value}"
        require(name not in positive or 0 < value < math.inf, f"{flag} must be greater than 0")
        require(name not in not_negative or 0 <= value < math.inf, f"{flag} must be 0 or more")
        require(name not in shares or 0 <= value <= 1, f"{flag} must be from 0 to 1")
    require(args.size >= 11, f"--size {args.size}: SSIM needs at least 11 pixels a side")
    require(0 <= args.seed < 2 ** 32, f"--seed {args.seed}: give a number from 0 to 2^32 - 1")
    with reading(f"--device {args.device}", "use --device cpu, or install a CUDA build of torch"):
        torch.empty(0, device=args.device)


def cli(presets: dict, main: Callable) -> None:
    """main(args), with the flags of the command line over those of the preset; on --resume and
    --eval-only over those of OUT/args.json, so that `--out DIR --resume` is enough."""
    one_line_errors(lambda: read_flags(presets), main)


def read_flags(presets: dict):
    about = sys.modules[type(presets["quick"]).__module__].__doc__.split("\n\n")[0]
    read = partial(tyro.cli, type(presets["quick"]), description=about)
    words = [word for word in sys.argv[1:] if word not in ("-h", "--help")]
    given = read(args=words, default=presets["quick"])
    path = Path(given.out or "") / "args.json"
    if not (given.resume or given.eval_only) or not path.is_file():
        return read(default=presets[given.preset])
    with reading(path, "start afresh with another --out"):
        saved = {name: tuple(value) if isinstance(value, list) else value       # JSON: no tuples
                 for name, value in json.loads(path.read_text()).items() if name != "device"}
        if not Path(saved["data"]).is_dir():                # it has moved
            del saved["data"]
        with warnings.catch_warnings(action="error"):       # tyro warns of a value of a wrong type
            return read(default=replace(presets[saved["preset"]], **saved))


def one_line_errors(parse: Callable, main: Callable) -> None:
    """main(parse()), where what the user can mend ends as one line on stderr with exit status 2,
    and Ctrl-C as one with status 130. A traceback that you do see is a bug."""
    args, box, status = None, io.StringIO(), 2
    try:
        with contextlib.redirect_stderr(box):               # in which tyro draws its complaints
            args = parse()
        return main(args)
    except SystemExit as stop:
        if not stop.code:                                   # --help
            raise
        drawn = "[─-╿]|-{3,}|Parsing error|For full helptext.*"
        line = "error:" + re.sub(drawn, " ", box.getvalue(), flags=re.S) + " (see --help)"
    except BrokenPipeError:                                 # `--help | head -1`
        return
    except KeyboardInterrupt:
        line, status = "interrupted: --out DIR --resume goes on from the last checkpoint", 130
    except UserError as error:
        line = f"error: {error}"
    except Exception as error:
        line = "error: out of memory: lower --size, or the rays and samples of a step"
        if isinstance(error.__context__, OSError):          # torch.save hides it
            error = error.__context__
        if isinstance(error, OSError):
            where = error.filename or getattr(args, "out", None) or "output"
            line = f"error: {where}: {error.strerror or error}: free space, or use another --out"
        elif not re.search("MemoryError|(out of|allocate|enough) memory|ALLOC_FAILED", repr(error)):
            raise
    finally:
        say("", end="")
    print(" ".join(line.split()), file=sys.stderr)
    sys.exit(status)


def say(text: str, end: str = "\n") -> None:
    """print, which goes on when its reader has gone: `| head -1` does not end a training."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:                                 # from here on, nobody reads
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# ---------------------------------------------------------------------------------------- rays

def pixel_rays(xy: Tensor, K: Tensor, c2w: Tensor) -> tuple[Tensor, Tensor]:
    """Rays through image points: d = R [(x - cx)/fx, -(y - cy)/fy, -1], normalised; o = position.

    xy (R, 2): x to the right, y down, in pixels. K (3, 3) or (R, 3, 3), c2w (R, 3, 4).
    -> rays_o (R, 3), rays_d (R, 3) unit. Differentiable in xy, K and c2w.
    Example: the middle of the image, (cx, cy), looks along minus the third column of c2w."""
    x = (xy[:, 0] - K[..., 0, 2]) / K[..., 0, 0]
    y = (xy[:, 1] - K[..., 1, 2]) / K[..., 1, 1]
    d = torch.stack([x, -y, -torch.ones_like(x)], -1)           # (R, 3) in the camera's axes
    d = (c2w[..., :3] * d[..., None, :]).sum(-1)                # (R, 3) in the world's
    return c2w[..., 3].expand_as(d), F.normalize(d, dim=-1)


def ndc_rays(rays_o: Tensor, rays_d: Tensor, K: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
    """Rays of a forward-facing scene in normalised device coordinates (NeRF, appendix C).

    A point (x, y, z), z < 0, goes to (-2fx/W x/z, -2fy/H y/z, 1 + 2/z): the near plane z = -1
    becomes -1, infinity becomes +1, and straight lines stay straight. Origins are first moved onto
    the near plane; directions come back normalised, so t measures distance in NDC and a ray ends
    where it leaves the box at z = 1. rays_o, rays_d (R, 3), K (3, 3), one for all views of a scene
    -> (R, 3), (R, 3) unit."""
    rays_o = rays_o - ((1 + rays_o[:, 2]) / rays_d[:, 2])[:, None] * rays_d
    ax, ay = -2 * K[..., 0, 0] / W, -2 * K[..., 1, 1] / H
    (ox, oy, oz), (dx, dy, dz) = rays_o.unbind(-1), rays_d.unbind(-1)
    o = torch.stack([ax * ox / oz, ay * oy / oz, 1 + 2 / oz], -1)
    d = torch.stack([ax * (dx / dz - ox / oz), ay * (dy / dz - oy / oz), -2 / oz], -1)
    return o, F.normalize(d, dim=-1)


def pixel_grid(H: int, W: int, device=None) -> Tensor:
    """Centres of all pixels, row by row: (H*W, 2) as (x, y)."""
    rows, columns = torch.arange(H, device=device) + 0.5, torch.arange(W, device=device) + 0.5
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], -1).reshape(-1, 2)


# ---------------------------------------------------------------------------- scenes: what one is

OBJECT_BOX = torch.tensor([[-1.5] * 3, [1.5] * 3])  # where objects are, unless files say more
PER_VIEW = ("images", "c2w", "K", "alpha", "depth", "mask")

@dataclass
class Views:
    """A set of posed pictures."""
    images: Tensor          # (V, H, W, 3) in [0, 1], already composited onto the scene's background
    c2w: Tensor             # (V, 3, 4)
    K: Tensor               # (V, 3, 3); a single (3, 3) is taken for all views
    alpha: Tensor | None    # (V, H, W); None where the pictures have none
    depth: Tensor | None    # (V, H, W) distance along the unit ray; 0 = nothing hit; if built in
    names: list[str]
    mask: Tensor | None = None      # (V, H, W) in [0, 1], the object; DTU: pictures keep the rest
    ndc_K: Tensor | None = None     # (3, 3) that defines the NDC of all views; None: not in NDC

    def __post_init__(self):
        self.K = self.K.expand(len(self.c2w), 3, 3)


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


def camera_rays(views: Views, view: Tensor, xy: Tensor, ndc: bool) -> tuple[Tensor, Tensor]:
    """rays_o, rays_d (R, 3) of pixels xy (R, 2) in images view (R,). NDC have one K for all views:
    each focal length would make a space of its own."""
    rays = pixel_rays(xy, views.K[view], views.c2w[view])
    if not ndc:
        return rays
    K = views.K[0] if views.ndc_K is None else views.ndc_K
    return ndc_rays(*rays, K, *views.images.shape[1:3])


def view_rays(views: Views, v: int, ndc: bool) -> tuple[Tensor, Tensor]:
    """All rays of view v, row by row: rays_o, rays_d (H*W, 3)."""
    xy = pixel_grid(*views.images.shape[1:3], views.c2w.device)
    return camera_rays(views, torch.full((len(xy),), v, device=xy.device), xy, ndc)


def random_background(target: Tensor, alpha: Tensor | None, bg: Tensor) -> tuple[Tensor, Tensor]:
    """Another background behind each training ray: target (R, 3) and bg (R, 3), no gradient.

    A field that sees one background only can use it as paint, where it stays transparent. target
    (R, 3) is composited onto bg (3,) with alpha (R,). Photographs have no alpha (None): behind each
    ray stands the target of another ray, with less noise than uniform colours would bring."""
    if alpha is None:
        return target, target[torch.randperm(len(target), device=target.device)]
    other = torch.rand_like(target)
    return target + (1 - alpha[:, None]) * (other - bg), other


@torch.no_grad()
def check_colours(rgbs: Tensor, weights: Tensor, target: Tensor) -> None:
    """A note if samples (rgbs (N, 3), weights (N,)) show saturated channels (0 or 1), pictures
    (R, 3) few: with white behind it, a dark red is then black that lets some white through."""
    shown, wanted = (((x - 0.5).abs() > 0.5 - 1 / 255).float().mean(1) for x in (rgbs, target))
    found, wanted = float((weights * shown).sum() / weights.sum()), float(wanted.mean())
    if found > wanted + 0.3:
        note(f"{found:.0%} of the visible colours are saturated, {wanted:.0%} in the pictures: "
             "the field uses the background as paint: use --train-background random")


def to_device(thing, device):
    """A new Scene or Views with its tensors on `device` (those already there are shared)."""
    if isinstance(thing, Tensor):
        return thing.to(device)
    if not is_dataclass(thing):
        return thing
    moved = {f.name: to_device(getattr(thing, f.name), device) for f in fields(thing)}
    return replace(thing, **moved)


def join_views(a: Views, b: Views) -> Views:
    """The views of a, then those of b. alpha, depth and mask stay where both have them."""
    joined = {"names": a.names + b.names}
    for name in PER_VIEW:
        one, other = getattr(a, name), getattr(b, name)
        joined[name] = None if one is None or other is None else torch.cat([one, other])
    return replace(a, **joined)


def pick_views(views: Views, ids: list[int]) -> Views:
    """The views with these indices, in this order; [] gives a Views without any."""
    there = [name for name in PER_VIEW if getattr(views, name) is not None]
    picked = {name: getattr(views, name)[ids] for name in there}
    return replace(views, names=[views.names[i] for i in ids], **picked)


def hold_out(views: Views, where) -> tuple[Views, Views]:
    """Training views, and every 8th (0, 8, ...) as test views."""
    n = len(views.names)
    require(n > 1, f"{where}: one view only: it is held out, nothing is left to train on")
    train = [i for i in range(n) if i % 8]
    return pick_views(views, train), pick_views(views, list(range(0, n, 8)))


# ------------------------------------------------------------------------- what all loaders share

AGAIN = "copy or download it again"


@contextlib.contextmanager
def reading(path: Path, advice: str = AGAIN):
    """Any exception in this block, while `path` is read, becomes one UserError line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:                 # broken archives and pictures fail in a dozen ways
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UserError(f"{path}: not usable ({why.splitlines()[0]}): {advice}") from None


def read_json(path: Path) -> dict:
    """A JSON object in UTF-8, with or without a byte-order mark."""
    with reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))


def finite(array, shape: tuple, path: Path, name: str) -> np.ndarray:
    """`array` as float64 of this shape, all finite; else UserError."""
    with contextlib.suppress(TypeError, ValueError):
        array = np.asarray(array, np.float64)
        if array.shape == shape and np.isfinite(array).all():
            return array
    raise UserError(f"{path}: {name} must be {'x'.join(map(str, shape))} finite numbers: {AGAIN}")


def check_pose(c2w: np.ndarray, path: Path, name: str) -> None:
    """UserError unless c2w (3 or 4, 4) is a rotation (to 1e-3), a shift and a row 0 0 0 1."""
    R = c2w[:3, :3]
    rotation = np.allclose(R.T @ R, np.eye(3), atol=1e-3) and np.linalg.det(R) > 0
    require(rotation and np.allclose(c2w[3:], [0, 0, 0, 1], atol=1e-3),
            f"{path}: {name} is not a rotation and a shift: {AGAIN}")


def natural(path: Path) -> list:
    """Sorting key by which 2.png comes before 10.png."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", path.name)]


def image_files(folder: Path) -> list[Path]:
    """PNG and JPG files of a folder in natural order; hidden ones (._name.png) are left out."""
    files = [f for f in folder.glob("[!.]*") if f.suffix.lower() in (".png", ".jpg", ".jpeg")]
    return sorted(files, key=natural)


def check_count(where, count: int, what: str, wanted: int, of: str) -> None:
    require(count == wanted, f"{where}: {count} {what}, but {wanted} {of}: they must match")


def opengl(c2w: np.ndarray) -> np.ndarray:
    """OpenCV axes (x right, y down, z ahead) to OpenGL's (y up, z backwards): (..., 3, 4)."""
    return c2w[..., :3, :] * np.array([1.0, -1.0, -1.0, 1.0])


def scale_K(K, sx: float, sy: float):
    """Intrinsics (..., 3, 3) of pictures that were scaled by sx across and sy down."""
    return K * (torch.tensor if isinstance(K, Tensor) else np.array)([[sx], [sy], [1.0]])


def note(line: str) -> None:
    """Say on stderr what was assumed or left out."""
    print(f"note: {line}", file=sys.stderr, flush=True)


@lru_cache(maxsize=8)
def area_weights(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): the share of output cell i, [i, i+1) n_in / n_out, that cell j covers."""
    edges, cells = np.arange(n_out + 1) * (n_in / n_out), np.arange(n_in)
    overlap = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    return (overlap.clip(0) * (n_out / n_in)).astype(np.float32)


def area_average(image: np.ndarray, h: int, w: int) -> np.ndarray:
    """(H, W, C) -> (h, w, C). Single points of a large picture would turn texture into noise."""
    H, W, C = image.shape
    if H % h == 0 and W % w == 0:               # whole blocks: the same, sooner
        return image.reshape(h, H // h, W * C).mean(1).reshape(h, w, W // w, C).mean(2)
    rows = area_weights(H, h) @ image.reshape(H, W * C)
    return area_weights(W, w) @ rows.reshape(h, W, C)


def fit_size(H: int, W: int, size: int | None, where) -> tuple[int, int]:
    """(h, w) whose longer side is `size` (None: unchanged). UserError if that would enlarge."""
    longer = max(H, W)
    size = longer if size is None else size
    require(1 <= size <= longer, f"{where}: {W}x{H} pixels: --size {size} must be 1 to {longer}")
    return max(1, round(H * size / longer)), max(1, round(W * size / longer))


def check_shapes(stated: list[tuple], W: int, H: int, where) -> None:
    """UserError if a size (w, h) in the cameras' file is not that of pictures W x H, scaled and
    rounded to whole pixels."""
    for w, h in stated:
        require(abs(h * W - w * H) <= w + h, f"{where}: cameras of pictures of {w:g}x{h:g}, but "
                f"they have {W}x{H}, another shape: they seem to be turned or cropped")


def read_image(path: Path) -> np.ndarray:
    """(H, W, 4) float32 in [0, 1]: colour, and alpha, which is 1 without transparency."""
    with reading(path), Image.open(path) as picture:
        turned = picture.getexif().get(0x0112, 1) > 1           # do cameras know? programs differ
        require(not turned, f"{path}: EXIF orientation: save it as its cameras mean it, without")
        require(picture.mode[0] not in "IF", f"{path}: {picture.mode} pixels: save it with 8 bits")
        return np.asarray(picture.convert("RGBA")) / np.float32(255)


def read_images(paths: list[Path], size: int | None, bg: Tensor) -> tuple:
    """Read, shrink, composite onto bg: images (V, h, w, 3), alpha (V, h, w) or None, files' (H, W).
    Multiplying by alpha before the average keeps the colour of transparent pixels out of edges."""
    H, W = read_image(paths[0]).shape[:2]
    h, w = fit_size(H, W, size, paths[0])
    images = np.empty((len(paths), h, w, 3), np.float32)
    alphas = np.empty((len(paths), h, w), np.float32)

    def load(v):
        image = read_image(paths[v])
        require(image.shape[:2] == (H, W), f"{paths[v]}: not {W}x{H} px as {paths[0].name}: all "
                "pictures of a scene must have one size")
        image[..., :3] *= image[..., 3:]
        image = area_average(image, h, w).clip(0, 1)
        alphas[v] = image[..., 3]
        images[v] = (image[..., :3] + (1 - image[..., 3:]) * bg.numpy()).clip(0, 1)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:   # decoding is outside the GIL
        list(pool.map(load, range(len(paths))))
    require(alphas.any(), f"{paths[0].parent}: all pictures are fully transparent")
    alpha = None if alphas.min() > 0.9999 else torch.from_numpy(alphas)
    return torch.from_numpy(images), alpha, (H, W)


def _intrinsics(fx: float, fy: float, cx: float, cy: float) -> Tensor:
    return torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float32)


# ------------------------------------------------------------------------------ Blender scenes

FOCAL = {"camera_angle_x", "camera_angle_y", "fl_x", "fl_y"}
REFUSED = ("k1", "k2", "k3", "k4", "p1", "p2", "is_fisheye", "mask_path")
PINHOLE = ("OPENCV", "PINHOLE", "SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL", "PERSPECTIVE")
READ = {*FOCAL, *REFUSED, "w", "h", "cx", "cy", "camera_model", "file_path", "transform_matrix",
        "rotation"}                                         # rotation: of Blender's rig, no use


def load_blender(path: Path, size: int | None, bg: Tensor) -> Views:
    """The views of one transforms file: what Blender, instant-ngp and nerfstudio write.

    {"camera_angle_x": 0.69, "frames": [{"file_path": "./train/r_0", "transform_matrix": [[...]]}]}
    What a frame states overrides the top. c2w is 3x4 or 4x4 with OpenGL axes."""
    top, frames, names, c2w = read_json(path), [], [], []
    with reading(path):
        for frame in top.pop("frames"):
            skip = FOCAL if FOCAL & frame.keys() else set()     # fl_x here replaces an angle there
            frames.append({**{key: top[key] for key in top.keys() - skip}, **frame})
            names.append(str(frame["file_path"]))
            matrix, what = frame["transform_matrix"], f"transform_matrix of {names[-1]}"
            matrix = finite(matrix, (len(matrix), 4), path, what)
            check_pose(matrix, path, what)
            c2w.append(matrix[:3])
        files = [named_file(path.parent, name) for name in names]
    require(frames, f"{path}: has no frames: list at least one image")
    images, alpha, (H, W) = read_images(files, size, bg)
    K = np.stack([frame_K(frame, W, H, path) for frame in frames])
    left_out = set().union(*frames) - READ
    if left_out:
        note(f"{path}: left out: {', '.join(sorted(left_out))}")
    K = fit_K(K, W, H, images, path)
    return Views(images, torch.tensor(np.stack(c2w)).float(), K, alpha, None, names)


def frame_K(stated: dict, W: int, H: int, path: Path) -> np.ndarray:
    """(3, 3) for pixels of a picture W x H.

    fl_x, fl_y in pixels of w x h, or 0.5 w / tan(camera_angle_x / 2), the same with h and y; one
    alone is both. Where nothing else is stated, cx, cy are the middle, w, h the picture's."""
    model = str(stated.get("camera_model", "OPENCV")).upper()
    require(model in PINHOLE and not any(stated.get(name) for name in REFUSED),
            f"{path}: masks or lens distortion ({model}): undistort the pictures, make masks "
            "their alpha")
    with reading(path, "state camera_angle_x (radians) or fl_x (pixels) on top or in each frame"):
        w, h = float(stated.get("w", W)), float(stated.get("h", H))
        angle_x, angle_y = (float(stated.get(f"camera_angle_{a}", math.nan)) for a in "xy")
        fx = float(stated.get("fl_x", 0.5 * w / math.tan(0.5 * angle_x)))
        fy = fx if math.isnan(angle_y) else 0.5 * h / math.tan(0.5 * angle_y)
        fy = float(stated.get("fl_y", fy))
        cx, cy = float(stated.get("cx", w / 2)), float(stated.get("cy", h / 2))
        good = np.isfinite([fx, fy]).all() and min(fx, fy) > 0
        if not good or angle_x >= math.pi or angle_y >= math.pi:
            found = f"camera_angle_x {angle_x:g}, fl_x {fx:g}, fl_y {fy:g}"
            raise ValueError("no focal length" if math.isnan(fx + fy) else found)
    check_shapes([(w, h)], W, H, path)
    return scale_K(np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]]), W / w, H / h)


def fit_K(K: np.ndarray, W: int, H: int, images: Tensor, path: Path) -> Tensor:
    """Intrinsics (V, 3, 3) of pictures W x H -> those of `images`. UserError for a principal point
    near the border: they speak of larger pictures."""
    for cx, cy in K[:, :2, 2]:
        require(0.25 < cx / W < 0.75 and 0.25 < cy / H < 0.75,
                f"{path}: principal point ({cx:.4g}, {cy:.4g}) in pictures of {W}x{H}: it seems "
                f"to speak of {2 * cx:.0f}x{2 * cy:.0f}: use pictures of that size")
    return scale_K(torch.from_numpy(K).float(), images.shape[2] / W, images.shape[1] / H)


def named_file(folder: Path, name: str) -> Path:
    """The file that a transforms file names with / or \\, without its ending, in any capitals."""
    path = folder / name.replace("\\", "/")
    exact = [Path(f"{path}{ending}") for ending in ("", ".png", ".jpg", ".jpeg")]
    lower = [file.name.lower() for file in exact]
    for file in itertools.chain(exact, path.parent.glob("*")):
        if file.name.lower() in lower and file.is_file():
            return file
    return path if path.suffix else exact[1]


def load_splits(folder: Path, size: int | None, bg: Tensor) -> tuple[Views, Views]:
    """Training and test views; every 8th is for testing where no file lists test views."""
    path, test_path = folder / "transforms_train.json", folder / "transforms_test.json"
    train = load_blender(path if path.is_file() else folder / "transforms.json", size, bg)
    if not test_path.is_file() or not read_json(test_path).get("frames"):
        note(f"{folder}: no test views are listed: every 8th view is held out")
        return hold_out(train, folder)
    test = load_blender(test_path, size, bg)
    require(test.images.shape[1:] == train.images.shape[1:],
            f"{folder}: training and test pictures: all of a scene must have one size")
    return train, test


def focus(c2w: Tensor) -> Tensor:
    """The point nearest to the axes o_v + t d_v of cameras (V, 3, 4), x = (sum A_v)^-1 sum A_v o_v
    with A_v = I - d_v d_v^T: (3,), float64; NaN where they are parallel to 2 degrees."""
    o, d = c2w[:, :, 3:].double(), c2w[:, :, 2:3].double()
    A = torch.eye(3).double() - d @ d.mT
    if torch.linalg.eigvalsh(A.mean(0))[0] < 1e-3:
        return torch.full((3,), math.nan)
    return torch.linalg.solve(A.sum(0), (A @ o).sum(0))[:, 0]


def fit_world(train: Views, test: Views, where, normalise: bool) -> tuple:
    """(train, test, near, far) in a world whose box is OBJECT_BOX.

    If each axis o + t d is in the ball of radius 1.5 between 2 and 6, as in the synthetic sets,
    nothing changes. Else their focus becomes the origin, and the nearest camera comes to
    2.902 fx / W (the box fills its picture, as there), or 2.7, outside."""
    o, d = train.c2w[:, :, 3].double(), -train.c2w[:, :, 2].double()
    middle = -(o * d).sum(-1)                                       # t nearest to the origin
    half = (1.5 ** 2 - (o + middle[:, None] * d).square().sum(-1)).clamp(min=0).sqrt()
    fits = (half > 0) & (middle - half >= 2) & (middle + half <= 6)
    if fits.all() or not normalise:
        return train, test, 2.0, 6.0
    centre = focus(train.c2w)
    ahead = ((centre - o) * d).sum(-1).median() > 0
    require(ahead and centre.isfinite().all(), f"{where}: cameras do not look at one place: use "
            "OpenGL axes (OpenCV's: negate columns 2, 3), views all around, or --no-normalise")
    distance = (o - centre).norm(dim=-1)
    nearest = max(2.7, 2.902 * float(train.K[:, 0, 0].min()) / train.images.shape[2])
    scale = nearest / float(distance.min())
    note(f"{where}: the world is moved by {-centre.numpy().round(3)}, then scaled by {scale:.4g}, "
         "to fit the box [-1.5, 1.5]^3 (--no-normalise leaves it)")
    moved = []
    for views in (train, test):
        position = ((views.c2w[:, :, 3:].double() - centre[:, None]) * scale).float()
        moved.append(replace(views, c2w=torch.cat([views.c2w[:, :, :3], position], -1)))
    return *moved, nearest / 2, float(distance.max()) * scale + 2


# --------------------------------------------------------------------------------- LLFF scenes

# The mean camera sees [-1, 1]^2; the others lean out of it far away (fern: to 1.43).
NDC_BOX = torch.tensor([[-1.5, -1.5, -1.0], [1.5, 1.5, 1.0]])


def load_llff(folder: Path, size: int | None, bg: Tensor) -> Views:
    """All views of a forward-facing scene: poses_bounds.npy, and of the folders images_K/ the one
    with the smallest pictures whose longer side reaches `size`."""
    path = folder / "poses_bounds.npy"
    c2w, K, sizes = llff_poses(path)
    lists = [image_files(sub) for sub in sorted(folder.glob("images*"))]
    by_side = {max(read_image(files[0]).shape[:2]): files for files in lists if files}
    require(by_side, f"{folder}: no images/ or images_K/ with PNG or JPG files in it")
    files = by_side[min((n for n in by_side if n >= (size or 0)), default=max(by_side))]
    check_count(files[0].parent, len(files), "images", len(c2w), f"poses in {path.name}")
    images, alpha, (H, W) = read_images(files, size, bg)
    check_shapes(sizes, W, H, path)
    corner = torch.atan((0.5 / K[:, 0, 0]).hypot(0.5 / K[:, 1, 1]))
    require((torch.acos(c2w[:, 2, 2].clamp(-1, 1)) + corner).max() < 1.4,
            f"{path}: not forward-facing (rays beyond 80 degrees): write a transforms.json")
    K = scale_K(K, images.shape[2], images.shape[1])
    names = [f"{file.parent.name}/{file.name}" for file in files]
    return Views(images, c2w, K, alpha, None, names, ndc_K=K[0])


def llff_poses(path: Path) -> tuple[Tensor, Tensor, np.ndarray]:
    """Cameras of poses_bounds.npy: c2w (V, 3, 4), K (V, 3, 3) of pictures 1 wide and 1 high, and
    the sizes (w, h) that it speaks of.

    A row: 3x5 matrix [down | right | back | position | (H, W, focal)], nearest and farthest depth.
    As in NeRF, the mean camera becomes the identity and the nearest depth 1/0.75: the near plane
    of NDC, at 1, lies safely before all content."""
    with reading(path):
        rows = np.load(path)
        rows = finite(rows, (len(rows), 17), path, "the array")
    down, right, back, position, hwf = np.moveaxis(rows[:, :15].reshape(-1, 3, 5), 2, 0)
    depths = rows[:, 15:]
    require(len(rows) and min(depths.min(), hwf.min()) > 0,
            f"{path}: depths, sizes and focal lengths must be positive: {AGAIN}")
    c2w = np.stack([right, -down, back, position / (0.75 * depths.min())], -1)
    for v, pose in enumerate(c2w):
        check_pose(pose, path, f"row {v}")
    middle = c2w[:, :, 3].mean(0)
    mean = look_at(middle, middle - back.sum(0), -down.sum(0))
    c2w[:, :, 3] -= middle
    K = torch.stack([_intrinsics(f / w, f / h, 0.5, 0.5) for h, w, f in hwf])
    return torch.from_numpy(mean[:, :3].T @ c2w).float(), K, hwf[:, 1::-1]


def look_at(position, target, up=(0, 0, 1)) -> np.ndarray:
    """(3, 4) float64 camera to world: at `position`, looking at `target`, with `up` upwards."""
    position, up = np.asarray(position, np.float64), np.asarray(up, np.float64)
    back = position - target
    back = back / np.linalg.norm(back)
    right = np.cross(up, back)
    right = right / np.linalg.norm(right)
    return np.stack([right, np.cross(back, right), back, position], -1)


# ---------------------------------------------------------------------------------- DTU scenes

def load_dtu(folder: Path, size: int | None, bg: Tensor) -> Views:
    """All views of a scan: image/, mask/ (for views.mask, if there) and an archive of cameras.

    P = world_mat_i[:3] projects the world X (mm) to pixels. scale_mat_i = [s I, c; 0, 1], one for
    all: the object lies in the unit sphere of X' = (X - c) / s, our world."""
    path = next(f for f in (folder / "cameras.npz", folder / "cameras_sphere.npz") if f.is_file())
    files, masks = image_files(folder / "image"), image_files(folder / "mask")
    with reading(path), np.load(path) as arrays:            # pickled objects could run code
        n = sum(re.fullmatch(r"world_mat_\d+", key) is not None for key in arrays.files)
        world = finite([arrays[f"world_mat_{i}"] for i in range(n)], (n, 4, 4), path, "world_mat_i")
        scale = finite([arrays[f"scale_mat_{i}"] for i in range(n)], (n, 4, 4), path, "scale_mat_i")
    check_count(folder / "image", len(files), "PNG or JPG files", n, f"cameras in {path.name}")
    check_count(folder / "mask", len(masks or files), "PNG or JPG files", n, "pictures")
    s = scale[0, 0, 0]
    even = np.allclose(scale[0, :3, :3], s * np.eye(3), atol=1e-6 * s)
    require(s > 0 and even and np.allclose(scale, scale[0], atol=1e-6 * s),
            f"{path}: scale_mat_i must be [s I, c; 0, 1], one s > 0 and one c for all: {AGAIN}")
    K, c2w = split_projections((world @ scale)[:, :3], path)
    images, _, (H, W) = read_images(files + masks, size, bg)        # all must have one size
    K = fit_K(K, W, H, images, path)
    return Views(images[:n], torch.from_numpy(c2w).float(), K, None, None,
                 [f"image/{file.name}" for file in files], images[n:, ..., 0] if masks else None)


def split_projections(P: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """K (V, 3, 3), c2w (V, 3, 4) of projections P = m K [R | -R C] (V, 3, 4), m any number but 0.

    The inverse of P[:, :3] = (m K) R is R^T times an upper triangle, which is what QR finds; m > 0
    where its determinant is. Skew below 1e-3 fx is dropped. DTU's pixel centres start at 0, ours at
    0.5."""
    with reading(path):
        inverse = np.linalg.inv(P[:, :, :3])
    position = -inverse @ P[:, :, 3:]                               # the same for P and -P
    q, u = np.linalg.qr(inverse * np.sign(np.linalg.det(inverse))[:, None, None])
    sign = np.sign(np.diagonal(u, axis1=1, axis2=2))                # K's diagonal is positive
    R_inverse, K = q * sign[:, None], np.linalg.inv(u * sign[..., None])
    K = K / K[:, 2:, 2:]                                # R_inverse: columns right, down, ahead
    require((abs(K[:, 0, 1]) < 1e-3 * K[:, 0, 0]).all(), f"{path}: skew: rectify the pictures")
    K[:, 0, 1] = 0
    K[:, :2, 2] += 0.5
    return K, opengl(np.concatenate([R_inverse, position], -1))


# ---------------------------------------------------------------------------------- built-in scenes

BOX, TUBE, WHEEL, BALL = [], [0, 1], [0, 2], [0, 1, 2]      # a shape's round axes; others are flat
RED, ORANGE, YELLOW, WOOD = (0.8, 0.1, 0.1), (1.0, 0.5, 0.1), (0.95, 0.75, 0.1), (0.6, 0.4, 0.2)
GREEN, BLUE, TEAL, PLUM = (0.15, 0.55, 0.25), (0.1, 0.3, 0.7), (0.5, 0.75, 0.8), (0.6, 0.35, 0.65)
CORNERS = np.array(list(np.ndindex(2, 2, 2))).T * 2 - 1                # (3, 8) of [-1, 1]^3
BLACK, DARK, GREY, LAMP, WHITE = (0.09,) * 3, (0.26,) * 3, (0.64,) * 3, (1, 0.95, 0.7), (0.93,) * 3


@dataclass
class Shape:
    """[-1, 1]^3 or what is round in it: scaled by `half`, turned by `pitch` about y, then by `yaw`
    about z (degrees), moved to `centre`. Every second cell of a checkerboard has `colour2`."""
    kind: list
    centre: tuple
    half: tuple
    colour: tuple
    colour2: tuple = WHITE
    cells: tuple = (1, 1, 1)            # how many along its own x, y, z
    yaw: float = 0
    pitch: float = 0

    def matrix(self) -> np.ndarray:
        """(3, 3): its own axes in the world, as columns of length `half`."""
        c, cp = np.cos(np.radians([self.yaw, self.pitch]))
        s, sp = np.sin(np.radians([self.yaw, self.pitch]))
        return np.array([[c * cp, -s, c * sp], [s * cp, c, s * sp], [-sp, 0, cp]]) * self.half


def crossing(kind: list, o, d) -> tuple[np.ndarray, np.ndarray]:
    """t_in, t_out of lines o + t d, (3,) and (3, ...), in the unit shape: between two planes along
    each flat axis, in the tube or sphere of the round ones. Where not t_in <= t_out: a miss."""
    t_in, t_out = -np.inf, np.inf
    for i in set(range(3)) - set(kind):
        one, two = (-1 - o[i]) / d[i], (1 - o[i]) / d[i]
        t_in = np.maximum(t_in, np.minimum(one, two))
        t_out = np.minimum(t_out, np.maximum(one, two))
    d2 = sum(d[i] * d[i] for i in kind) + 1e-12             # 0: a box, or along the axis of a tube
    middle = -sum(o[i] * d[i] for i in kind) / d2           # of the chord
    half = ((1 - sum((o[i] + middle * d[i]) ** 2 for i in kind)) / d2) ** 0.5       # NaN: a miss
    return np.maximum(t_in, middle - half), np.minimum(t_out, middle + half)


@np.errstate(all="ignore")                                  # 0 / 0 of rays that miss
def trace(shapes: list[Shape], c2w, focal: float, n: int) -> tuple[np.ndarray, ...]:
    """n x n rays from a camera outside of all shapes -> colour (3, n, n), distance to the first
    surface (inf: none) and index of its shape (-1). Only pixels between its corners try a shape.
    colour = paint * (sky + sun * max(0, normal . light)), no shadows."""
    x = ((np.arange(n, dtype=np.float32) + 0.5) / n - 0.5) / np.float32(focal)
    length = np.sqrt(1 + x ** 2 + x[:, None] ** 2)                      # of (x_j, -x_i, -1)
    colour, index = np.zeros((3, n, n), np.float32), np.full((n, n), -1)
    distance = np.full((n, n), np.inf, np.float32)
    for p, shape in enumerate(shapes):
        matrix, offset = shape.matrix(), shape.centre - c2w[:, 3]
        right, up, back = c2w[:, :3].T @ (matrix @ CORNERS + offset[:, None])
        image = np.stack([0.5 + focal * up / back, 0.5 - focal * right / back]) * n
        low, high = np.floor(image.min(1)).clip(0, n), np.ceil(image.max(1)).clip(0, n)
        rows, cols = (slice(int(a), int(b)) for a, b in zip(low, high))
        to_unit = np.float32(np.linalg.inv(matrix))
        o, turn = np.float32(-to_unit @ offset), (to_unit @ c2w[:, :3])[..., None, None]
        d = (turn[:, 0] * x[cols] - turn[:, 1] * x[rows, None] - turn[:, 2]) / length[rows, cols]
        t_in, t_out = crossing(shape.kind, o, d)
        hit = (t_in <= t_out) & (t_in < distance[rows, cols])
        distance[rows, cols][hit] = t_in[hit]
        index[rows, cols][hit] = p
        unit = o[:, None] + t_in[hit] * d[:, hit]                       # (3, hits)
        reach = abs(unit)                                               # 1 on the surface
        reach[shape.kind] = np.sqrt((unit[shape.kind] ** 2).sum(0))
        normal = np.einsum("ij,in->jn", to_unit, unit * (reach == reach.max(0)))
        normal /= np.sqrt((normal ** 2).sum(0))
        sun = (0.45 * normal[0] - 0.35 * normal[1] + 0.82 * normal[2]).clip(0)
        cell = np.floor((0.4999 * unit + 0.5) * np.float32([shape.cells]).T).sum(0)
        paint = np.where(cell % 2, np.float32([shape.colour2]).T, np.float32([shape.colour]).T)
        colour[:, rows, cols][:, hit] = (paint * (0.42 + 0.16 * normal[2] + 0.62 * sun)).clip(0, 1)
    return colour, distance, index


def render(shapes: list[Shape], cameras: dict, focal: float, size: int, bg: Tensor):
    """-> Views, and indices of the shapes at pixels' centres (V, size, size), -1 = none. cameras:
    name -> c2w; focal: in sides. Colour, alpha: means over 3x3 rays; depth: of the middle one."""
    poses, parts = np.float32([*cameras.values()]), []
    for c2w in poses:
        colour, distance, index = trace(shapes, c2w, focal, 3 * size)
        rgba = np.concatenate([colour, index[None] >= 0]).reshape(4, size, 3, -1)
        rgba = rgba.mean(2, dtype=np.float32).reshape(4, size, size, 3).mean(3)
        depth, index = np.where(index < 0, 0, distance)[1::3, 1::3], index[1::3, 1::3]
        parts.append((rgba[:3].transpose(1, 2, 0), rgba[3], depth, index))
    colour, alpha, depth, index = (torch.from_numpy(np.stack(part)) for part in zip(*parts))
    images = (colour + (1 - alpha[..., None]) * bg).clamp(0, 1).contiguous()
    K = _intrinsics(focal * size, focal * size, size / 2, size / 2).repeat(len(poses), 1, 1)
    return Views(images, torch.tensor(poses), K, alpha, depth, [*cameras]), index


def orbit_pose(azimuth: float, elevation: float, radius: float, centre=(0, 0, 0)) -> np.ndarray:
    """(3, 4) camera at the given angles (radians) and distance from `centre`, looking at it."""
    x, y = np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth)
    return look_at(np.asarray(centre) + radius * np.array([x, y, np.sin(elevation)]), centre)


def truck() -> list[Shape]:
    """A truck, nose towards +x: fine repeated texture (studs, checkers), thin parts (rods), flat
    ones (walls). Lengths in studs of 0.135 m until the last line."""
    shapes = [Shape(BOX, (3.9, 0, 4.1), (1.7, 2.7, 1.1), TEAL),                         # windows
              Shape(BOX, (8, 0, 2), (0.1, 1.4, 0.8), DARK, GREY, (1, 10, 6)),           # grille
              Shape(BOX, (-8, 0, 2.4), (0.1, 2.9, 0.6), YELLOW, BLACK, (1, 10, 1)),
              Shape(BALL, (-3, 1, 2.4), (0.9,) * 3, YELLOW, RED, (6, 1, 1))]
    for x, y, z, nx, ny, height, colour, studs in (                                     # bricks
            (-8, -2, 0, 16, 4, 0.6, DARK, 0), (7, -3, -0.2, 1, 6, 0.7, GREY, 0),
            (2, -2, 0.6, 6, 4, 0.9, RED, 0), (2, -3, 1.5, 6, 6, 1.5, RED, 1),
            (2, -3, 5.2, 4, 6, 0.5, RED, 1), (-8, -3, 1, 9, 6, 0.5, GREY, 1),
            (-8, -3, 1.5, 9, 1, 3, YELLOW, 1), (-8, 2, 1.5, 9, 1, 3, YELLOW, 1),
            (0, -2, 1.5, 1, 4, 4, YELLOW, 1), (-8, -2, 1.5, 1, 4, 2, YELLOW, 1),
            (-6, -2, 1.5, 2, 4, 1, BLUE, 1), (-4, -2, 1.5, 3, 2, 1, GREEN, 1)):
        half = (nx / 2 - 0.03, ny / 2 - 0.03, height / 2)
        shapes.append(Shape(BOX, (x + nx / 2, y + ny / 2, z + height / 2), half, colour))
        shapes += [Shape(TUBE, (x + i + 0.5, y + j + 0.5, z + height + 0.1), (0.3, 0.3, 0.12),
                         colour) for i, j in np.ndindex(nx * studs, ny)]
    for y in (-2.5, 2.5):
        for x in (-5.6, -2.6, 5):
            shapes += [Shape(WHEEL, (x, y, -0.3), (1.5, 0.8, 1.5), BLACK, DARK, (4, 1, 4)),
                       Shape(WHEEL, (x, y, -0.3), (0.8, 0.9, 0.8), GREY, RED, (2, 1, 2))]
        shapes += [Shape(BOX, (x, 1.1 * y, 4.1), (0.2, 0.24, 1.1), RED) for x in (2.3, 3.9, 5.5)]
        shapes += [Shape(TUBE, (x, y, 5), (0.06, 0.06, 0.5), DARK) for x in np.arange(-7.5, 1)]
        shapes += [Shape(BOX, (-3.5, y, 5.5), (4.5, 0.07, 0.07), DARK),                 # railing
                   Shape(BOX, (-3.5, 1.2 * y, 3), (3.4, 0.05, 0.5), WHITE, BLUE, (27, 1, 4)),
                   Shape(BALL, (8.1, 0.9 * y, 2.2), (0.3, 0.5, 0.5), LAMP),
                   Shape(TUBE, (1.5, y, 3.7), (0.2, 0.2, 3), GREY)]                     # exhaust
    shapes += [Shape(TUBE, (x, -3.4, 1.6), (0.07, 0.07, 2.8), GREY) for x in (-7, -5.8)]
    shapes += [Shape(BOX, (-6.4, -3.4, z), (0.6, 0.06, 0.06), GREY) for z in np.arange(-1, 4, 0.6)]
    return [replace(shape, centre=0.135 * np.subtract(shape.centre, (0, 0, 2.4)),
                    half=0.135 * np.array(shape.half)) for shape in shapes]


def load_bricks(split: str, size: int | None, bg: Tensor) -> Views:
    """The truck through cameras like the Blender set's, 0.6911112 rad wide, 4.031 away: "train"
    100, drawn on the upper hemisphere; "test" 25 on a full turn. size None: 200 px."""
    turn = 2 * np.pi * np.arange(25) / 25
    angles = zip(turn, np.radians(30 + 15 * np.cos(2 * turn)))
    if split == "train":
        u = np.random.default_rng(0).random((100, 2))
        angles = zip(2 * np.pi * u[:, 0], np.arcsin(0.08 + 0.9 * u[:, 1]))
    cameras = {f"{split}/r_{v}": orbit_pose(*angle, 4.0311289) for v, angle in enumerate(angles)}
    size = 200 if size is None else size
    return render(truck(), cameras, 0.5 / math.tan(0.3455556035), size, bg)[0]


def stage(t: int) -> list[Shape]:
    """The room at frame t, in [-0.96, 0.96]^3, open towards -y: 8 shapes that rest; a ball that
    rolls round a plinth, 0.04 a frame; a crate on it that turns by 6 degrees; a panel whose colour
    changes every 3 frames; a cube from frame 5 on."""
    angle = math.radians(205) + t * 0.04 / 0.46
    at = (0.46 * math.cos(angle), 0.46 * math.sin(angle), -0.73)
    yaw, pitch = math.degrees(angle) - 90, math.degrees(t * 0.04 / 0.15)
    shapes = [Shape(BOX, (0, 0, -0.92), (0.96, 0.96, 0.04), WHITE, WOOD, (8, 8, 1)),
              Shape(BOX, (0, 0.92, 0.04), (0.96, 0.04, 0.92), TEAL, GREY, (12, 1, 12)),
              *[Shape(BOX, (x, 0.48, -0.14), (0.04, 0.4, 0.74), PLUM, WHITE, (1, 4, 8))
                for x in (-0.92, 0.92)],
              Shape(BOX, (-0.66, 0.6, -0.66), (0.17, 0.17, 0.22), RED, WHITE, (3, 3, 4), 20),
              Shape(BOX, (0.64, 0.6, -0.72), (0.18, 0.15, 0.16), GREEN, YELLOW, (4, 1, 1), -25),
              Shape(TUBE, (0, 0, -0.68), (0.21, 0.21, 0.2), TEAL, WHITE, (1, 1, 4)),
              Shape(BOX, (0.34, 0.86, 0.42), (0.34, 0.03, 0.25), WHITE),        # the panel's frame
              Shape(BALL, at, (0.15,) * 3, YELLOW, RED, (3, 3, 3), yaw, pitch),
              Shape(BOX, (0, 0, -0.3), (0.17, 0.17, 0.18), WHITE, BLUE, (4, 4, 4), 6 * t),
              Shape(BOX, (0.34, 0.82, 0.42), (0.28, 0.02, 0.19), (YELLOW, BLUE)[t // 3 % 2]),
              Shape(BOX, (-0.42, 0.1, 0.28), (0.13,) * 3, ORANGE, PLUM, (2, 2, 2), 35)]
    return shapes if t >= 5 else shapes[:-1]


@lru_cache(maxsize=2)
def stage_frame(t: int, size: int) -> tuple[Views, Tensor]:
    """Frame t before black, and the numbers of the shapes at pixels' centres (14, H, W)."""
    angles = np.radians([(5.3846 * v - 125, 8 + 18 * (v % 2)) for v in range(14)])
    cameras = {f"cam{v:02d}": orbit_pose(*angles[v], 3.2, (0, 0.1, -0.18)) for v in range(14)}
    return render(stage(t), cameras, 1.12, size, torch.zeros(3))


def load_stage(size: int | None, frames: int | None, bg: Tensor) -> "Video":
    """The room, filmed by 14 cameras, 4 and 9 held out. None: 128 px, 20 frames. mask: where frame
    t or t - 1 shows a thing that changes, or where the picture is not the last one (edges)."""
    size, frames = 128 if size is None else size, 20 if frames is None else frames

    def read(t):
        before, seen_before = stage_frame(max(t - 1, 0), size)
        views, seen = stage_frame(t, size)
        mask = (views.images - before.images).abs().amax(-1) > 1e-4
        mask |= (seen >= 8) | (seen_before >= 8)
        images = views.images + (1 - views.alpha[..., None]) * bg
        return replace(views, images=images, mask=mask.float())

    first, _ = stage_frame(0, size)
    train, aabb = [v for v in range(14) if v not in (4, 9)], torch.tensor([[-1.0] * 3, [1.0] * 3])
    return Video("stage", "builtin", frames, 10.0, first.c2w, first.K, size, size, first.names,
                 train, [4, 9], aabb, 1.0, 5.0, bg, False, read)


CAR_BOX = torch.tensor([[-0.48, -0.22, -0.20], [0.48, 0.22, 0.20]])     # holds every built-in car


def car(seed: int) -> list[Shape]:
    """Car number `seed`, x forward, in CAR_BOX. All have wheels, windows, lamps; sizes,
    cabin, colours and spoiler are its own. z = 0 is the ground until the last line."""
    rng = np.random.default_rng((seed, 0))
    u = rng.uniform
    paint, second = [colorsys.hsv_to_rgb(u(), rng.choice([0, 0.7, 0.9]), u(0.4, 1)) for _ in "ab"]
    y, bulge, sill, body, cabin = u((0.17, 0.02, 0.04, 0.11, 0.07), (0.2, 0.08, 0.07, 0.16, 0.13))
    end, belt, bonnet = u(0.39, 0.46) - bulge, sill + body, body * u(0.7, 1)
    back, front = -u(0.5, 0.9) * end, u(0.2, 0.6) * end                 # of the cabin
    middle, half = (front + back) / 2, (front - back) / 2
    radius, axle = u(0.4, 0.47) * (sill + bonnet), u(0.65, 0.75) * end
    glass = (BOX, WHEEL)[rng.integers(2)]                               # upright windows, or a dome
    high = ((front - end) / 2, 0, sill + body / 2)                      # the body behind the bonnet
    shapes = [Shape(BOX, high, ((front + end) / 2, y, body / 2), paint),
              Shape(BOX, (0, 0, sill + bonnet / 2), (end, y, bonnet / 2), paint),
              Shape(BOX, (0, 0, sill), (end, y + 0.003, 0.02), BLACK),
              Shape(glass, (middle, 0, belt), (half, 0.88 * y, cabin), BLACK),
              Shape(glass, (middle, 0, belt), (0.7 * half, 0.85 * y, cabin + 0.01), second),
              Shape(BOX, (middle, 0, belt + cabin / 2), (0.012, 0.89 * y, cabin / 2), paint)]
    for x, height, lamp in ((end, bonnet, LAMP), (-end, body, RED)):    # nose and tail
        shapes.append(Shape(WHEEL, (x, 0, sill + height / 2), (bulge, y, height / 2), paint))
        shapes += [Shape(BALL, (x + np.sign(x) * 0.8 * bulge, side, sill + 0.7 * height),
                         (0.02, 0.03, 0.02), lamp) for side in (-0.7 * y, 0.7 * y)]
    for x, side in itertools.product((-axle, axle), (-1, 1)):
        for share, out, colour in ((1, 0.01, DARK), (0.6, 0.013, GREY)):
            at, r = (x, side * (y - 0.05 + out), radius), share * radius
            shapes.append(Shape(WHEEL, at, (r, 0.05, r), colour))
    if rng.random() < 0.35:                                             # spoiler
        shapes.append(Shape(BOX, (-end, 0, belt), (0.03, 0.9 * y, 0.04), second))
    lift = (0, 0, (belt + cabin) / 2)
    return [replace(shape, centre=np.subtract(shape.centre, lift)) for shape in shapes]


def load_car(seed: int, size: int, bg: Tensor, above: bool) -> Views:
    """Car `seed` through cameras like the SRN cars': 50, uniform on a sphere of radius 1.3, from
    the seed alone; focal length 525/512 sides. above: without those at z <= -0.5."""
    u = np.random.default_rng((seed, 1)).random((50, 2))
    poses = [orbit_pose(2 * np.pi * a, np.arcsin(2 * b - 1), 1.3) for a, b in u]
    cameras = {f"{v:06d}": c2w for v, c2w in enumerate(poses) if not above or c2w[2, 3] > -0.5}
    return render(car(seed), cameras, 525 / 512, size, bg)[0]


# ------------------------------------------------------------------------------- scene look-up

SCENE_FILES = {"poses_bounds.npy": "llff", "cameras.npz": "dtu", "cameras_sphere.npz": "dtu",
               "transforms*.json": "blender"}
BUILTIN = {"scene": "bricks", "video": "stage", "family": "cars"}
KNOWN = {                       # folder under --data: what is in it, and the names that it may have
    "nerf_synthetic": ("scene", "chair drums ficus hotdog lego materials mic ship"),
    "nerf_llff_data": ("scene", "fern flower fortress horns leaves orchids room trex"),
    "dtu": ("scene", ""),
    "n3dv": ("video", "coffee_martini cook_spinach cut_roasted_beef flame_salmon_1 flame_steak "
                      "sear_steak"),
    "meetroom": ("video", "discussion trimming vrheadset"),
    "panoptic_sports": ("video", "basketball boxes football juggle softball tennis"),
    "srn_cars": ("family", "srn_cars cars_train cars_val cars_test")}


def find_dataset(what: str, name: str, data: Path, recognise: Callable, files: str) -> Path | None:
    """The folder of a "scene", "video" or "family": `name` is its path, or its name in `data` or in
    a folder of KNOWN there. None: take the built-in one, which is meant, or (said on stderr) stands
    in for a known one that is not on disk. recognise(folder): is it one? files: by what, in words.
    """
    builtin = BUILTIN[what]
    if name == builtin:
        return None
    known = {sub: names.split() for sub, (kind, names) in KNOWN.items() if kind == what}
    places = [Path(name), data / name, *(data / sub / name for sub in known)] if name else []
    folders = [place for place in places if place.is_dir()]
    for folder in folders:
        if recognise(folder):
            return folder
    require(not folders, f"{', '.join(map(str, folders))}: no {files} in it: not a {what}")
    for sub, names in known.items():
        if name in names:
            how = f"put it in {data / sub}"
            if sub == "nerf_synthetic":
                how = f"python common.py download {name}"
            print(f"\n!!! '{name}' is not under {data}: USING THE BUILT-IN SCENE '{builtin}' "
                  f"INSTEAD.\n!!! Numbers of this run are not numbers for {name}.\n"
                  f"!!! For the real one: {how}\n", file=sys.stderr)
            return None
    there = [f for pattern in ("*", "*/*") for f in sorted(data.glob(pattern)) if f.is_dir()]
    listed = [f.relative_to(data).as_posix() for f in there if recognise(f)]
    raise UserError(f"{what} {name!r} not found: under {data} there is "
                    f"{', '.join(listed) or 'no ' + what}; built in: {builtin}; "
                    "give a path, --data, or one of these names")


def load_scene(name: str, data: str | Path, size: int | None = None, bg="white",
               normalise: bool = True) -> Scene:
    """Find and load a scene: "bricks" (built in, and in place of a known one that is not on disk:
    see scene.kind), or as find_dataset says. size: longer image side in pixels, None = as on disk.
    normalise: see fit_world."""
    bg = background(bg)
    folder = find_dataset("scene", name, Path(data), scene_kind, " or ".join(SCENE_FILES))
    if folder is None:
        train, test = load_bricks("train", size, bg), load_bricks("test", size, bg)
        return Scene("bricks", "builtin", train, test, OBJECT_BOX, 2.0, 6.0, bg, False)
    name, kind = folder.resolve().name, scene_kind(folder)
    if kind == "blender":
        train, test = load_splits(folder, size, bg)
        train, test, near, far = fit_world(train, test, folder, normalise)
        return Scene(name, kind, train, test, OBJECT_BOX, near, far, bg, False)
    views = load_llff(folder, size, bg) if kind == "llff" else load_dtu(folder, size, bg)
    train, test = hold_out(views, folder)
    if kind == "llff":
        far = float((NDC_BOX[1] - NDC_BOX[0]).norm())
        return Scene(name, kind, train, test, NDC_BOX, 0.0, far, bg, True)
    # The object fills the unit sphere, its table goes on; cameras stand outside, at about 3.
    near = max(0.1, float(views.c2w[:, :, 3].norm(dim=1).min()) - 1.1)
    return Scene(name, kind, train, test, OBJECT_BOX, near, 5.0, bg, False)


def scene_kind(folder: Path) -> str | None:
    """The layout of a folder, by the file with its cameras."""
    return next((SCENE_FILES[name] for name in SCENE_FILES if any(folder.glob(name))), None)


def background(colour: str) -> Tensor:
    """(3,) of one of the names of --background."""
    return torch.full((3,), {"white": 1.0, "black": 0.0, "grey": 0.5}[colour])


# ------------------------------------------------------------------------------------ video scenes

@dataclass
class Video:
    """A scene filmed by synchronised cameras that stand still; read one frame at a time."""
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
    read: Callable[[int], Views]    # frame t -> Views of ALL cameras; depth, mask: built-in only


def load_video(name: str, data: str | Path, size: int | None = None, frames: int | None = None,
               bg="grey") -> Video:
    """Find a video (see find_dataset) and its cameras; video.read(t) reads frame t. size: longer
    image side in pixels, None = as on disk. frames: the first so many, None = all."""
    bg = background(bg)
    folder = find_dataset("video", name, Path(data), video_files,
                          "camNN.mp4, 0000/images or train_meta.json")
    return load_stage(size, frames, bg) if folder is None else load_filmed(folder, size, frames, bg)


def video_files(folder: Path) -> list[Path]:
    """train_meta.json, or films camNN.mp4 (.mov, cam_N), or the folders of frames, by number."""
    there = sorted(folder.iterdir(), key=natural)
    meta = [f for f in there if f.name == "train_meta.json"]
    films = [f for f in there if re.fullmatch(r"cam_?\d+\.(mp4|mov)", f.name, re.IGNORECASE)]
    return meta or films or [f for f in there if f.name.isdigit() and (f / "images").is_dir()]


def n3dv_cameras(folder: Path, frames: int | None) -> tuple:
    """Neural 3D Video, Meet Room: films camNN.mp4, or pictures 0000/images/ as StreamRF prepares
    them; poses_bounds.npy, there or in 0000/, has a row a camera. In NDC; camera 0 is held out.

    -> pictures files[t][v] or films files[0][v]; names; cameras held out; c2w (V, 3, 4); K of
    pictures 1 wide and 1 high; sizes (w, h) that the cameras' file speaks of; aabb; near."""
    files, path = [video_files(folder)], folder / "poses_bounds.npy"
    if files[0][0].is_dir():
        path = path if path.is_file() else files[0][0] / path.name
        files = [image_files(frame / "images") for frame in files[0][:frames]]
    c2w, K, sizes = llff_poses(path)
    require(len(c2w) > 1, f"{path}: one camera only: it is held out, none is left to train on")
    for t, row in enumerate(files):
        check_count(f"{folder}: frame {t}", len(row), "cameras", len(c2w), f"rows in {path.name}")
    return files, [file.stem for file in files[0]], [0], c2w, K, sizes, NDC_BOX, 0.0


def panoptic_cameras(folder: Path, frames: int | None) -> tuple:
    """The same of CMU Panoptic as Dynamic 3D Gaussians has it: train_meta.json, test_meta.json.

    Its world: metres, y down, the floor at y = 0. The cameras stand on the wall of a dome, a sphere
    of radius 2.75 about (0, -1.355, 0), and see the wall behind the players, so the box holds it.
    Our world: (x, z, -y - 2.1) / 3, z up: the box is 6 m wide, from 0.15 m below the floor."""
    splits = []
    for path in (folder / "train_meta.json", folder / "test_meta.json"):
        meta = read_json(path)
        with reading(path):
            fn = np.array(meta["fn"], str)              # (T, V): a row a frame, an entry a camera
        k = finite(meta.get("k"), (*fn.shape, 3, 3), path, "k")
        w2c = finite(meta.get("w2c"), (*fn.shape, 4, 4), path, "w2c")
        w, h = finite([meta.get("w"), meta.get("h")], (2,), path, "w, h")
        still = np.ptp(k, 0).max() < 1e-3 and np.ptp(w2c, 0).max() < 1e-5
        require(still and min(w, h, k[..., 0, 0].min(), k[..., 1, 1].min()) > 0,
                f"{path}: cameras must stand still, and w, h, focal lengths be positive: {AGAIN}")
        for pose in w2c[0]:
            check_pose(pose, path, "a w2c")
        splits.append((fn.T, scale_K(k[0], 1 / w, 1 / h), np.linalg.inv(w2c[0]), [(w, h)]))
    with reading(path, "it must have as many frames as train_meta.json"):
        fn, K, c2w, stated = map(np.concatenate, zip(*splits))
    files = [[folder / "ims" / name.replace("\\", "/") for name in row] for row in fn.T[:frames]]
    world = np.array([[1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, -2.1]])    # (x, z, -y - 2.1)
    c2w = torch.from_numpy(opengl(world @ c2w)).float()
    c2w[:, :, 3] /= 3
    aabb = torch.tensor([[-1.0, -1.0, -0.75], [1.0, 1.0, 0.75]])
    require((c2w[:, :, 3].abs() < aabb[1]).all(), f"{folder}: cameras stand outside of the dome: "
            "w2c must be in metres, with the floor at y = 0 and y down")
    names, test = [file.parent.name for file in files[0]], list(range(len(splits[0][0]), len(K)))
    return files, names, test, c2w, torch.from_numpy(K).float(), stated, aabb, 0.1


def load_filmed(folder: Path, size: int | None, frames: int | None, bg: Tensor) -> Video:
    """A video from disk."""
    panoptic = (folder / "train_meta.json").is_file()
    cameras = panoptic_cameras if panoptic else n3dv_cameras
    files, names, test, c2w, K, stated, aabb, near = cameras(folder, frames)
    films = [file for file in files[0] if file.suffix.lower() in (".mp4", ".mov")]
    pictures = frame_reader(films, files, size, bg)
    H, W = pictures(0).shape[1:3]
    check_shapes(stated, W, H, folder)
    metas = [iio.immeta(film, plugin="FFMPEG") for film in films]
    counts = [round(meta["duration"] * meta["fps"]) for meta in metas] or [len(files)]
    if min(counts) < max(counts):
        note(f"{folder}: films have {min(counts)} to {max(counts)} frames: the shortest counts")
    count = min(counts + [frames or counts[0]])
    K = scale_K(K, W, H)

    def read(t):
        images = pictures(t)
        require(images.shape[1:3] == (H, W), f"{folder}: frame {t} has another size: {AGAIN}")
        return Views(images, c2w, K, None, None, names)

    train = [v for v in range(len(names)) if v not in test]
    return Video(folder.resolve().name, "panoptic" if panoptic else "n3dv", count,
                 metas[0]["fps"] if films else 30.0, c2w, K, H, W, names, train, test, aabb, near,
                 float((aabb[1] - aabb[0]).norm()), bg, not panoptic, read)


def frame_reader(films: list[Path], files: list[list[Path]], size: int | None, bg: Tensor):
    """-> read(t), which gives (V, H, W, 3) from films, or from pictures files[t][v]; the last one
    is kept. Films are decoded in step, frame by frame; for an earlier frame they start again."""
    frames, following = None, math.inf

    def decoded(film):
        with reading(film, f"{AGAIN}, use fewer frames, or pip install 'imageio[ffmpeg]'"):
            with contextlib.suppress(OSError):                          # a report of many lines
                yield from iio.imiter(film, plugin="FFMPEG", input_params=["-threads", "1"])
            raise EOFError("the film is broken, or ends before the frame that is asked for")

    @lru_cache(maxsize=1)
    def read(t):
        nonlocal frames, following
        if not films:
            return read_images(files[t], size, bg)[0]
        if t < following:
            frames, following = zip(*map(decoded, films)), 0
        with reading(films[0].parent, "all films must have one size"):
            images = np.stack(next(itertools.islice(frames, t - following, None)))
        following = t + 1
        h, w = fit_size(*images.shape[1:3], size, films[0])
        images = [area_average(image / np.float32(255), h, w) for image in images]
        return torch.from_numpy(np.stack(images)).clamp(0, 1)
    return read


# ------------------------------------------------------------------------- families of many scenes

@dataclass
class Family:
    """Many scenes of one kind, seen by cameras at about the same distance; read one at a time."""
    name: str
    kind: str               # "builtin" | "srn"
    scenes: list[Path] | range      # folders, sorted by name; built in: seeds
    size: int               # image side in pixels; pictures are square
    bg: Tensor              # (3,)
    above: bool             # only views from cameras with z > -0.5
    near: float = 0.5       # rays start and end here; cameras stand 1.3 from the middle
    far: float = 2.1
    aabb: Tensor = OBJECT_BOX / 3       # a cube around every scene, with room beside it
    tight: Tensor = OBJECT_BOX / 3      # a box that holds every scene

    def read(self, i: int) -> tuple[Views, Views]:
        """Training and test views of scene i, by name. The first 10 of 12 or more views are held
        out for testing, of fewer a third, at least one."""
        load = load_car if self.kind == "builtin" else load_srn
        views = load(self.scenes[i], self.size, self.bg, self.above)
        n = len(views.names)
        held_out = 10 if n >= 12 else max(1, n // 3)
        return pick_views(views, list(range(held_out, n))), pick_views(views, list(range(held_out)))


def load_family(name: str, data: str | Path, size: int, bg="white", above: bool = True) -> Family:
    """Find a family of scenes (see find_dataset); family.read(i) reads one."""
    folder = find_dataset("family", name, Path(data), srn_scenes,
                          "folders with rgb/, pose/ and intrinsics.txt")
    if folder is None:
        return Family("cars", "builtin", range(100_000), size, background(bg), above, tight=CAR_BOX)
    scenes = srn_scenes(folder)
    return Family(scenes[0].parent.resolve().name, "srn", scenes, size, background(bg), above)


def srn_scenes(folder: Path) -> list[Path]:
    """All folders in it or in cars_train/, by name, if one of them is a scene: a broken one keeps
    its number."""
    for place in (folder, folder / "cars_train"):
        found = sorted(f for f in place.glob("[!._]*") if f.is_dir())
        if any((f / "intrinsics.txt").is_file() for f in found):
            return found
    return []


def load_srn(folder: Path, size: int, bg: Tensor, above: bool) -> Views:
    """One scene of Scene Representation Networks: rgb/NAME.png, pose/NAME.txt, intrinsics.txt.

    A pose is a 4x4 camera to world with OpenCV axes. intrinsics.txt begins with `f cx cy` and ends
    with `H W`, the size that these speak of (usually 512 beside pictures of 128). Only squares are
    read. The original pictures have an alpha of 1 everywhere, which becomes None."""
    files, poses = image_files(folder / "rgb"), list((folder / "pose").glob("[!.]*.txt"))
    check_count(folder, len(files), "pictures", len(poses), "poses")
    used, c2w = [], []
    for file in files:
        path = folder / "pose" / f"{file.stem}.txt"
        with reading(path):
            pose = np.array(path.read_text(encoding="utf-8-sig").split(), float).reshape(4, 4)
        check_pose(pose, path, "it")
        if not above or pose[2, 3] > -0.5:
            used.append(file)
            c2w.append(opengl(pose))
    require(len(used) > 1, f"{folder}: {len(used)} of {len(files)} views are used, two are needed")
    path = folder / "intrinsics.txt"
    with reading(path):
        words = path.read_text(encoding="utf-8-sig").split()
    f, cx, cy, H, W = finite(words[:3] + words[-2:], (5,), path, "f cx cy, ..., H W").tolist()
    images, alpha, (rows, columns) = read_images(used, size, bg)
    require(min(f, H) > 0 and H == W and rows == columns, f"{path}: f, H and W must be positive, "
            f"and H = W; pictures must be square, not {columns}x{rows}")
    K = scale_K(_intrinsics(f, f, cx, cy), size / W, size / H)
    return Views(images, torch.tensor(np.stack(c2w)).float(), K, alpha, None,
                 [f"rgb/{file.name}" for file in used])


# ------------------------------------- where samples stand on a ray; what depends on its direction

class OccupancyGrid(nn.Module):
    """Which cells of the box hold anything (Instant NGP's idea, nerfacc's rule).

    After an update:  ema = max(decay * ema, sigma * step) in the cells that were evaluated,
                      occupied = ema > min(mean(ema), 0.01).
    sigma * step is about the opacity of one sample. All cells are occupied until the first update.
    """
    def __init__(self, aabb: Tensor, resolution: int, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("aabb", aabb.clone())                                  # (2, 3)
        self.register_buffer("ema", torch.zeros(resolution, resolution, resolution))
        self.register_buffer("occupied", torch.ones_like(self.ema, dtype=torch.bool))

    @torch.no_grad()
    def update(self, density_fn: Callable, step_size: float, warm: bool) -> None:
        """Evaluate density_fn, (n, 3) world positions -> (n,), at a random point of each chosen
        cell. warm: all cells; later a random quarter and at most as many occupied ones."""
        G, device = len(self.ema), self.ema.device
        chosen = torch.full((G ** 3,), warm, device=device)
        if not warm:
            quarter = G ** 3 // 4
            chosen[torch.randint(G ** 3, (quarter,), device=device)] = True
            full = self.occupied.flatten().nonzero().squeeze(1)
            if len(full) > quarter:
                full = full[torch.randint(len(full), (quarter,), device=device)]
            chosen[full] = True
        cells = chosen.nonzero().squeeze(1)
        corner = torch.stack([cells // G ** 2, cells // G % G, cells % G], -1)
        u = (corner + torch.rand(len(cells), 3, device=device)) / G
        x = self.aabb[0] + u * (self.aabb[1] - self.aabb[0])
        sigma = [density_fn(part).reshape(-1).float() for part in x.split(1 << 18)]
        ema = self.ema.view(-1)
        ema[cells] = torch.maximum(ema[cells] * self.decay, torch.cat(sigma) * step_size)
        self.occupied.copy_(self.ema > self.ema.mean().clamp_max(0.01))


class OccupancySampler(nn.Module):
    """Equal steps through the occupied cells of a grid. A ray that meets nothing is almost free.

    Both samplers have: prepare(field, step), before each training step; sample(rays_o, rays_d,
    jitter) -> packed samples as of kernels.march, jitter (R,) in [0, 1) or None in evaluation;
    loss(weights (N,)), what it learns from the rays of the last call, or 0; samples_per_ray."""
    def __init__(self, scene: Scene, march_steps: int, samples_per_ray: float):
        super().__init__()
        self.step = float((scene.aabb[1] - scene.aabb[0]).norm()) / march_steps
        self.near, self.far = scene.near, scene.far
        self.grid = OccupancyGrid(scene.aabb, min(march_steps // 4, 128), decay=0.8)
        self.samples_per_ray = samples_per_ray

    def get_extra_state(self) -> float:                 # part of a checkpoint, not on the device
        return self.samples_per_ray

    def set_extra_state(self, samples_per_ray: float) -> None:
        self.samples_per_ray = samples_per_ray

    def prepare(self, field, step: int) -> None:
        if step % 16 == 0:
            self.grid.update(field.density, self.step, warm=step < 256)

    def sample(self, rays_o: Tensor, rays_d: Tensor, jitter: Tensor | None):
        samples = march(rays_o, rays_d, self.grid.occupied, self.grid.aabb, self.step, self.near,
                        self.far, jitter)
        if jitter is not None:                          # follows the present cost half-way
            now = max(len(samples[0]), 1) / len(rays_o)
            self.samples_per_ray = math.sqrt(self.samples_per_ray * now)
        return samples

    def loss(self, weights: Tensor):
        return 0.0


class ProposalSampler(nn.Module):
    """Two rounds of resampling by small density networks (mip-NeRF 360; nerfacc's PropNet).

    Round i places intervals by the weights of round i - 1 (at first equal ones), and network i
    gives their new weights. The field sees n intervals drawn from the last weights. Annealing
    (eq. 18): early weights are raised to a power below 1, as first guesses are wrong."""
    def __init__(self, scene: Scene, counts: tuple, n: int, steps: int):
        super().__init__()
        self.aabb, self.near, self.far = scene.aabb, scene.near, scene.far
        self.networks = nn.ModuleList([ProposalDensity(64), ProposalDensity(128)])
        self.counts, self.steps, self.samples_per_ray = counts, steps, n
        self.power, self.learn = 1.0, True

    def prepare(self, field, step: int) -> None:
        """The networks learn at every step at first, later at every fifth (nerfacc's rule)."""
        self.power = 10 * step / (9 * step + self.steps)
        self.learn = step % (1 + min(step // 64, 4)) == 0

    def sample(self, rays_o: Tensor, rays_d: Tensor, jitter: Tensor | None):
        rays_o, rays_d = rays_o.detach(), rays_d.detach()
        power = 1.0 if jitter is None else self.power
        edges = ray_box(rays_o, rays_d, self.aabb, self.near, self.far)        # (R, 2)
        weights, self.rounds = torch.ones_like(edges[:, :1]), []
        for network, count in zip(self.networks, self.counts):
            edges = resample(edges, weights ** power, count, jitter)           # (R, count + 1)
            middle = 0.5 * (edges[:, 1:] + edges[:, :-1])
            x = rays_o[:, None] + middle[..., None] * rays_d[:, None]          # (R, count, 3)
            u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.learn):
                weights = ray_weights(network(u.view(-1, 3)).view_as(middle), edges)
            self.rounds.append((edges, weights))
            weights = weights.detach()
        R, n = len(rays_o), self.samples_per_ray
        self.edges = edges = resample(edges, weights ** power, n, jitter)
        rays = torch.arange(R + 1, device=edges.device)
        return (edges[:, :-1].reshape(-1), edges[:, 1:].reshape(-1), rays * n,
                rays[:R].repeat_interleave(n))

    def loss(self, weights: Tensor):
        if not self.learn:
            return 0.0
        weights = weights.detach().view(-1, self.samples_per_ray)
        return sum(interlevel_loss(self.edges, weights, *proposal) for proposal in self.rounds)


def truncated_exp(x: Tensor) -> Tensor:
    """exp(x), its gradient cut at exp(15): one extreme sample must not spoil the whole table."""
    slope = x.detach().clamp(max=15).exp()
    return x.detach().exp() + slope * (x - x.detach())           # the second term is 0


class ProposalDensity(nn.Module):
    """Density of positions x (N, 3) in [0, 1]: a hash grid and an MLP, which cost little."""
    def __init__(self, finest: int):
        super().__init__()
        self.levels = hash_levels(5, 16, finest, 15)
        self.table = nn.Parameter(torch.empty(self.levels.offsets[-1], 2).uniform_(-1e-4, 1e-4))
        self.mlp = nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, x: Tensor) -> Tensor:
        return truncated_exp(self.mlp(hash_encode(x, self.table, self.levels))[:, 0] - 1)


def ray_box(rays_o: Tensor, rays_d: Tensor, aabb: Tensor, near: float, far: float) -> Tensor:
    """(R, 2) distances at which rays enter and leave the box, within near and far; two equal ones
    where a ray misses it, so that its intervals have no length and no weight."""
    inverse = 1 / torch.where(rays_d.abs() < 1e-9, 1e-9, rays_d)
    a, b = (aabb[0] - rays_o) * inverse, (aabb[1] - rays_o) * inverse
    enter = torch.minimum(a, b).amax(1).clamp(min=near)
    leave = torch.maximum(a, b).amin(1).clamp(max=far)
    return torch.stack([enter, torch.maximum(enter, leave)], 1)


def ray_weights(sigmas: Tensor, edges: Tensor) -> Tensor:
    """w_i = exp(-sum_{j<i} sigma_j delta_j) (1 - exp(-sigma_i delta_i)), delta_i the length of
    interval i.  sigmas (R, S), edges (R, S+1) -> (R, S)."""
    tau = sigmas * edges.diff(dim=1)
    return torch.exp(tau - tau.cumsum(1)) * -torch.expm1(-tau)


def resample(edges: Tensor, weights: Tensor, n: int, jitter: Tensor | None) -> Tensor:
    """n intervals a ray that lie as densely as the weights are large (inverse transform sampling).

    edges (R, S+1), weights (R, S), jitter (R,) or None for 1/2 -> (R, n+1) edges, no gradient.
    The weights, blurred and raised by 0.01 (mip-NeRF, eq. 18), are a density, constant on each
    interval, whose distribution function is inverted at (k + jitter - 1/2) / n. Without the blur
    all samples crowd at the first guess of the surface (lego, 500 steps: 1.1 dB less).
    Example: edges (0, 1, 2, 3), weights (0, 1, 0), n = 3: the blurred weights are (1/2, 1, 1/2)
    + 0.01, so the inner edges are about 1.17 and 1.83."""
    padded = F.pad(weights.detach(), (1, 1))
    larger = torch.maximum(padded[:, 1:], padded[:, :-1])                      # of two neighbours
    pdf = 0.5 * (larger[:, 1:] + larger[:, :-1]) + 0.01                        # (R, S)
    cdf = F.pad((pdf / pdf.sum(1, keepdim=True)).cumsum(1), (1, 0))            # (R, S+1)
    shift = 0.0 if jitter is None else jitter[:, None] - 0.5
    u = ((torch.arange(1, n, device=edges.device) + shift) / n).expand(len(edges), n - 1)
    above = torch.searchsorted(cdf, u.contiguous(), right=True).clamp(1, weights.shape[1])
    low, high = cdf.gather(1, above - 1), cdf.gather(1, above)
    start, end = edges.gather(1, above - 1), edges.gather(1, above)
    inner = start + ((u - low) / (high - low)).clamp(max=1) * (end - start)
    return torch.cat([edges[:, :1], inner, edges[:, -1:]], 1)


def interlevel_loss(edges: Tensor, weights: Tensor, p_edges: Tensor, p_weights: Tensor) -> Tensor:
    """How far a proposal fails to bound the field's weights from above (mip-NeRF 360, eq. 13).

    bound_i = sum of the proposal's weights over its intervals that overlap interval i;
    L = mean over rays of sum_i max(0, w_i - bound_i)^2 / w_i. A larger proposal costs nothing.
    edges (R, S+1), weights (R, S), p_edges (R, P+1), p_weights (R, P). Gradient to p_weights only.
    """
    sums, last = F.pad(p_weights.cumsum(1), (1, 0)), p_weights.shape[1]        # (R, P+1)
    first = torch.searchsorted(p_edges, edges[:, :-1].contiguous(), right=True) - 1
    end = torch.searchsorted(p_edges, edges[:, 1:].contiguous())
    bound = sums.gather(1, end.clamp(1, last)) - sums.gather(1, first.clamp(0, last - 1))
    return ((weights.detach() - bound).clamp(min=0) ** 2 / (weights.detach() + 1e-7)).sum(1).mean()


def spherical_harmonics(d: Tensor, degree: int = 4) -> Tensor:
    """Real spherical harmonics of unit directions, bands 0 to degree - 1, of at most 3: (N, 3) ->
    (N, degree**2). Orthonormal on the sphere; column l*l + l + m holds Y_l^m."""
    x, y, z = d.unbind(-1)
    xx, yy, zz = x * x, y * y, z * z
    band_0 = [torch.full_like(x, 0.28209479177387814)]
    band_1 = [0.4886025119029199 * axis for axis in (-y, z, -x)]
    c = 1.0925484305920792
    band_2 = [c * x * y, -c * y * z, 0.31539156525252005 * (3 * zz - 1), -c * x * z,
              0.5 * c * (xx - yy)]
    a, b, c = 0.5900435899266435, 2.890611442640554, 0.4570457994644658
    band_3 = [-a * y * (3 * xx - yy), b * x * y * z, -c * y * (5 * zz - 1),
              0.3731763325901154 * z * (5 * zz - 3),
              -c * x * (5 * zz - 1), 0.5 * b * z * (xx - yy), -a * x * (xx - 3 * yy)]
    return torch.stack([*band_0, *band_1, *band_2, *band_3][:degree ** 2], -1)


# ------------------------------------------------- metrics, camera paths and pictures

def psnr(a: Tensor, b: Tensor) -> Tensor:
    """-10 log10 mean((a - b)^2) in dB, for images in [0, 1]: an error of 0.1 gives 20 dB."""
    return -10 * torch.log10(((a - b) ** 2).mean())


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of two images (H, W, 3) in [0, 1]; 1 = equal.

    Luminance times contrast and structure, from moments under an 11x11 Gaussian window, sigma 1.5;
    the mean over channels and places where the window fits."""
    require(min(a.shape[:2]) >= 11, "SSIM needs 11x11 pixels or more: use a larger --size")
    window = torch.softmax(-0.5 * (torch.arange(-5, 6).to(a) / 1.5) ** 2, 0)     # its sum is 1

    def mean(x):                       # (H, W, 3) -> (h, w, 3); a GPU's conv2d may use 10 bits
        return (x.unfold(0, 11, 1) @ window).unfold(1, 11, 1) @ window

    mean_a, mean_b = mean(a), mean(b)
    variances = mean(a * a) - mean_a ** 2 + mean(b * b) - mean_b ** 2
    cov_ab = mean(a * b) - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + 0.01 ** 2) / (mean_a ** 2 + mean_b ** 2 + 0.01 ** 2)
    return (luminance * (2 * cov_ab + 0.03 ** 2) / (variances + 0.03 ** 2)).mean()


def orbit_poses(n: int, radius: float, elevation_deg=30.0, centre=(0.0, 0.0, 0.0)) -> Tensor:
    """n cameras (n, 3, 4) on a full turn around `centre`, at which they look; z is up."""
    turns, elevation = 2 * np.pi * np.arange(n) / n, np.radians(elevation_deg)
    poses = np.stack([orbit_pose(turn, elevation, radius, centre) for turn in turns])
    return torch.tensor(poses).float()


def camera_path(c2w: Tensor, ndc: bool, n: int) -> Tensor:
    """A closed path (n, 3, 4) among the cameras c2w (V, 3, 4), which look at one place (their
    focus; 4 ahead in NDC or where they are parallel): an orbit about z if they stand all around
    it, else an ellipse about their mean, with their mean axis y up."""
    c2w = c2w.cpu().double()
    centre = focus(c2w)
    if ndc or not centre.isfinite().all():
        centre = (c2w[:, :, 3] - 4 * c2w[:, :, 2]).mean(0)
    offset, centre = (c2w[:, :, 3] - centre).numpy(), centre.numpy()
    middle, radius = offset.mean(0), np.linalg.norm(offset, axis=1).mean()
    if np.linalg.norm(middle) < 0.8 * radius:
        return orbit_poses(n, radius, np.degrees(np.arcsin(middle[2] / radius)), centre)
    up = c2w[:, :, 1].mean(0).numpy()
    across = look_at(middle, np.zeros(3), up)[:, :2]                  # (3, 2): right and upwards
    axes = across * ((offset - middle) @ across).std(0)
    turn = 2 * np.pi * np.arange(n) / n
    path = middle + np.stack([np.cos(turn), np.sin(turn)], -1) @ axes.T
    return torch.tensor(np.stack([look_at(centre + x, centre, up) for x in path])).float()


def to_bytes(image: Tensor) -> np.ndarray:
    image = image.detach().float().cpu().nan_to_num(0).clamp(0, 1)
    return (image * 255 + 0.5).byte().numpy()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write (H, W, 3 | 4) in [0, 1] as an 8-bit PNG."""
    iio.imwrite(path, to_bytes(image), extension=".png")


def save_video(path: str | Path, frames: list[Tensor], fps: int = 30) -> None:
    """Write frames (H, W, 3) in [0, 1] as .gif or .mp4 (H.264, whose sides are even)."""
    stack = np.stack([to_bytes(frame) for frame in frames])
    if Path(path).suffix == ".gif":
        iio.imwrite(path, stack, duration=1000 / fps, loop=0)
        return
    stack = stack[:, :stack.shape[1] // 2 * 2, :stack.shape[2] // 2 * 2]
    iio.imwrite(path, stack, fps=fps, codec="libx264", macro_block_size=2)


def colour_map(x: Tensor, lo: float, hi: float) -> Tensor:
    """(...) -> (..., 3): dark blue at lo, green in the middle, dark red at hi."""
    x = ((x - lo) / max(hi - lo, 1e-12)).nan_to_num(0).clamp(0, 1)
    centres = x.new_tensor([0.75, 0.5, 0.25])                         # of red, green and blue
    return (1.5 - 4 * (x[..., None] - centres).abs()).clamp(0, 1)


def comparison_strip(target: Tensor, render: Tensor, depth: Tensor, near, far) -> Tensor:
    """(H, 4W, 3): target | render | mean absolute error, 0 to 0.25 | depth (H, W), near to far."""
    error = colour_map((target - render).abs().mean(-1), 0.0, 0.25)
    return torch.cat([target, render.clamp(0, 1), error, colour_map(depth, near, far)], 1)


# ------------------------------------------------------------------------------ run folder

def evenly_spaced(count: int, n: int) -> list[int]:
    """n whole numbers from 0 to count - 1, evenly spaced, both ends among them."""
    return torch.linspace(0, count - 1, n).round().long().tolist()


def to_json(value):
    """The same out of dicts, lists and plain values; NaN and infinity become None."""
    text = json.dumps(value, default=lambda x: x.tolist() if hasattr(x, "tolist") else str(x))
    return json.loads(text, parse_constant=lambda name: None)


def write_whole(path: Path, write: Callable) -> None:
    """write(file) to a temporary file, which then becomes `path`: that is never half written."""
    temp = path.with_name(path.name + ".tmp")
    try:
        with open(temp, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    finally:
        temp.unlink(missing_ok=True)


def write_json(path: Path, value) -> None:
    write_whole(path, lambda file: file.write(json.dumps(to_json(value), indent=1).encode()))


def environment(device) -> dict:
    """What a number depends on: versions, hardware, commit of this repository, date, command."""
    git = f'git -C "{Path(__file__).parent}" describe --always --dirty --abbrev=40 --exclude="*"'
    if torch.device(device).type == "cuda":
        device = torch.cuda.get_device_name(device)
    return {"python": sys.version.split()[0], "torch": torch.__version__, "device": device,
            "cpu": subprocess.getoutput("grep -m 1 'model name' /proc/cpuinfo"),       # Linux only
            "threads": torch.get_num_threads(), "commit": subprocess.getoutput(git),
            "date": datetime.now().astimezone().isoformat(timespec="seconds"), "argv": sys.argv}


def peak_memory_mb(device) -> float:
    """Largest memory so far [MiB]: PyTorch's on CUDA, else the process's (nan if not on Linux)."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 20
    if sys.platform != "linux":
        return math.nan
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 10


class TrainingRun:
    """The folder of a training run, `out` or runs/METHOD-SCENE-TIME (args.json, env.json,
    metrics.jsonl, ckpt.pt, summary.json), its clock, progress line, evaluations and checkpoints:

        run = TrainingRun("my_method", scene, args)
        for step in run.loop({"field": field, "optimiser": optimiser}, evaluate):
            ...                                             # one training step
            run.log(loss=loss, opacity=opacity.mean())
        run.finish()

    scene: what has a name and a kind, or a name. free: flags that may differ from the
    checkpoint's; --steps may grow."""
    def __init__(self, method: str, scene, args: RunArgs, free: Iterable[str] = ("lr",)):
        if args.video:
            with reading("--video", 'pip install "imageio[ffmpeg]", or leave the flag away'):
                import imageio_ffmpeg
                imageio_ffmpeg.get_ffmpeg_exe()
        self.identity = {"method": method, "scene": getattr(scene, "name", scene),
                         "data": getattr(scene, "kind", None)}   # "builtin": not the real scene
        self.path = Path(args.out or f"runs/{method}-{self.identity['scene']}-"
                                     f"{datetime.now():%Y%m%d-%H%M%S-%f}")
        views = (scene.train, scene.test) if isinstance(scene, Scene) else ()
        cameras = [torch.cat([v.c2w, v.K], -1).cpu() for v in views]          # (V, 3, 7)
        self._cameras = torch.cat(cameras or [torch.zeros(0)])
        self.flags, self.device = args, torch.device(args.device)
        self.step, self.seconds, self.counts = 0, 0.0, Counter()
        self.count = self.counts.update                     # count(rays=8) adds 8 to the rays
        self.scores, self._values, self._spoilt = {}, {}, 0.0
        self._finished, self._log, self._saved = [], "", None           # _log: metrics.jsonl
        self._args = to_json({**asdict(args), "resume": False, "eval_only": False})
        begun, saved = ((self.path / name).exists() for name in ("args.json", "ckpt.pt"))
        if saved and (args.resume or args.eval_only):
            self._load({*free, "steps", "data", "device", "out", "video", "tensorboard"})
        else:
            require(not args.eval_only, f"{self.path}: no ckpt.pt to evaluate: check --out")
            require(begun or not args.resume, f"{self.path}: no ckpt.pt to resume: check --out")
            require(args.resume or not begun and not saved,
                    f"{self.path}: already holds a run: add --resume, or give another --out")
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / "env.json", environment(args.device))
        self.board = None
        if not args.eval_only:
            self._begin()

    def _load(self, free: set) -> None:
        """Read ckpt.pt, which must be of this method, this scene, and these flags."""
        with reading(self.path / "ckpt.pt", "start afresh with another --out"):
            saved = torch.load(self.path / "ckpt.pt", map_location="cpu", weights_only=True)
            before, steps = saved["args"], saved["args"]["steps"]
            self.step, self.seconds, self._finished, self._log = (
                saved[name] for name in ("step", "seconds", "finished", "log"))
            self.count(saved["counts"])
        flags = {name: value for name, value in self._args.items() if name not in free}
        for name, now in {**flags, **self.identity}.items():
            then = before.get(name, "not set")
            require(then == now, f"{self.path}: of another run: {name} was {then}, now {now}: give "
                                 "the same, or another --out")
        now = self.flags.steps
        require(steps == now or steps < now and not self._finished,
                f"{self.path}: of another run: steps was {steps}, now {now}: give no less")
        same = saved["cameras"].shape == self._cameras.shape and torch.allclose(
            saved["cameras"], self._cameras, 1e-3, 1e-3)
        require(same, f"{self.path}: of another scene of the same name: give its path as --scene")
        self._saved = saved

    def _begin(self) -> None:
        """Write args.json; forget lines of metrics.jsonl after the checkpoint: they come again."""
        write_json(self.path / "args.json", self._args)
        write_whole(self.path / "metrics.jsonl", lambda file: file.write(self._log.encode()))
        if self.flags.tensorboard:
            with reading("--tensorboard", "pip install tensorboard, or leave the flag away"):
                from torch.utils.tensorboard import SummaryWriter
                self.board = SummaryWriter(self.path)

    def loop(self, parts: dict, evaluate: Callable, *, steps: Optional[int] = None,
             stage: str = "training", empty: str = "use a lower --lr, or another --seed"):
        """The numbers, from 0, of the steps that are left; none with --eval-only.

        parts: name -> a dict of plain values and tensors, or what has state_dict().
        evaluate(views, pictures) -> scores of so many test views (None: all); pictures: None, or
        the folder for some. empty: advice for an empty field, whose logged `opacity` is near 0."""
        if stage in self._finished:
            return
        start = self._restore(parts, stage)
        end = self.flags.steps if steps is None else steps
        if self.flags.eval_only:
            end = start
        opened, began, shown = time.monotonic(), self._now(), -math.inf
        for t in range(start, end):
            self._values = {}
            yield t
            due = (t + 1) % self.flags.eval_every == 0 or t + 1 == end
            if due or self.device.type == "cpu" or t % 50 == 0:            # a GPU is waited for
                require(math.isfinite(self._values.get("loss", 0)), "loss is not finite at step "
                        f"{self.step}; the last checkpoint is kept: lower the rate, then --resume")
            self.step += 1
            now = time.monotonic()
            if t + 1 == end or now - shown >= 10:
                shown = now
                values = "".join(f"{name} {float(x):.4g}  " for name, x in self._values.items())
                left = (now - opened) / (t + 1 - start) * (end - t - 1)         # step 1 is slow
                say(f"step {t + 1}/{end}  {values}" + (f"{left:.0f} s left" if t > start else ""))
            if due:
                self.seconds += self._now() - began
                opacity = float(self._values.get("opacity", 1.0))
                require(opacity >= 1e-3, f"the field is empty at step {self.step} (mean opacity "
                        f"{opacity:.1e}) and will stay so: {empty}")
                self._evaluate(evaluate, last=t + 1 == end)
                self._save(parts, stage, t + 1)
                began = self._now()
        if start >= end:
            self._evaluate(evaluate, last=True)
        self._finished.append(stage)

    def log(self, **values) -> None:
        """Tensors or numbers of this step; a `loss` that is not finite ends the run."""
        self._values.update((name, torch.as_tensor(x).detach()) for name, x in values.items())
        if "loss" in values:            # a GPU's is read seldom: one that is not finite spoils all
            self._spoilt = self._values["loss"] * 0 + self._spoilt               # NaN from then on
            self._values["loss"] = self._values["loss"] + self._spoilt

    def finish(self, **more) -> dict:
        """Write summary.json and print its scores. -> the summary, which `more` is a part of."""
        flags = self.flags
        summary = {**self.identity, "size": flags.size, "seed": flags.seed, "steps": self.step,
                   "train_seconds": round(self.seconds, 2),
                   "peak_memory_mb": round(peak_memory_mb(flags.device), 1), **self.scores, **more}
        write_json(self.path / "summary.json", summary)
        if self.board:
            self.board.close()
        formats = {"psnr": "PSNR {:.2f} dB", "ssim": "SSIM {:.4f}"}
        shown = ", ".join(formats.get(name, name + " {:.3g}").format(value)
                          for name, value in self.scores.items() if isinstance(value, float))
        say(f"{self.identity['scene']}: {shown} after {self.step} steps, {self.seconds:.0f} s of "
            f"training; pictures in {self.path}")
        return summary


    def _now(self) -> float:
        """Seconds, when the GPU has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _restore(self, parts: dict, stage: str) -> int:
        """-> the number of steps of this loop that the checkpoint has seen."""
        saved, self._saved = self._saved, None
        require(saved or not self.flags.eval_only, f"{self.path}: {stage} is not trained: --resume")
        if saved is None:
            if self.flags.resume and self.step == 0:
                note(f"{self.path}: there was no checkpoint yet: from the first step on")
            return 0
        with reading(self.path / "ckpt.pt", "start afresh with another --out"):
            for name, part in parts.items():
                load = part.update if isinstance(part, dict) else part.load_state_dict
                load(saved["parts"][stage][name])
        torch.set_rng_state(saved["random"]["cpu"])
        state, on_cuda = saved["random"]["cuda"], self.device.type == "cuda"
        if on_cuda and state is not None:
            torch.cuda.set_rng_state(state, self.device)
        elif on_cuda or state is not None:
            note("the checkpoint is of another kind of device: other random numbers follow")
        return saved["stage_step"]

    def _evaluate(self, evaluate: Callable, last: bool) -> None:
        """Scores of --eval-views test views; after the last step of all, with pictures."""
        views, pictures = (None, self.path) if last else (self.flags.eval_views, None)
        with torch.no_grad():
            self.scores = evaluate(views, pictures)
        for name, value in self.scores.items():
            require(value == value, f"{name} is not a number after {self.step} steps: lower --lr")

    def _save(self, parts: dict, stage: str, step: int) -> None:
        """A line of metrics.jsonl, and a checkpoint."""
        line = to_json({"step": self.step, **self.counts, "train_seconds": self.seconds,
                        "loss": self._values.get("loss"), **self.scores})
        self._log += json.dumps(line) + "\n"
        write_whole(self.path / "metrics.jsonl", lambda file: file.write(self._log.encode()))
        for name, value in line.items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar(name, value, self.step)
        states = {name: part if isinstance(part, dict) else part.state_dict()
                  for name, part in parts.items()}
        on_cuda = self.device.type == "cuda"
        random = {"cpu": torch.get_rng_state(),
                  "cuda": torch.cuda.get_rng_state(self.device) if on_cuda else None}
        state = {"args": {**self._args, **self.identity}, "parts": {stage: states},
                 "stage_step": step, "step": self.step, "finished": self._finished,
                 "counts": dict(self.counts), "cameras": self._cameras, "seconds": self.seconds,
                 "random": random, "log": self._log}
        write_whole(self.path / "ckpt.pt", lambda file: torch.save(state, file))


# --------------------------------------------------------------------------------- commands

@dataclass
class Compare:
    """A Markdown table of finished runs. Runs whose names differ only by the seed (lmc-s0, lmc-s1)
    are one row, with mean and sample standard deviation."""
    runs: tyro.conf.Positional[list[Path]]
    """Run folders."""
    curves: Path | None = None
    """FILE.svg: held-out PSNR against steps, rays, samples and training seconds; a line a seed."""

    def __call__(self) -> None:
        require(self.runs, "compare needs a run folder: python common.py compare runs/A runs/B")
        groups = {}             # name without the seed -> [(summary.json, lines of metrics.jsonl)]
        for folder in self.runs:
            with reading(folder):
                lines = (folder / "metrics.jsonl").read_text().splitlines()
                curve = [line for line in map(json.loads, lines)
                         if None not in map(line.get, ("step", "train_seconds", "psnr"))]
            require((folder / "summary.json").is_file(),
                    f"{folder}: not finished: go on with --out {folder} --resume")
            name = re.sub(r"-s\d+$", "", str(folder))
            groups.setdefault(name, []).append((read_json(folder / "summary.json"), curve))
        say(table(groups))
        if self.curves:
            drawn = draw_curves({name: [curve for _, curve in groups[name]] for name in groups})
            with reading(self.curves, "choose another file"):
                self.curves.write_text(drawn, encoding="utf-8")


def table(groups: dict) -> str:
    """A row a group: numbers of summary.json, and what it costs to get to the first row's PSNR."""
    decimals = {"method": 0, "scene": 0, "data": 0, "size": 0, "steps": 0, "train_seconds": 1,
                "peak_memory_mb": 0, "psnr": 2, "ssim": 4}
    first = [curve[-1]["psnr"] for _, curve in next(iter(groups.values())) if curve]
    costs = ("step", "train_seconds") if first else ()
    titles = ["run", "seeds", *decimals, *(f"{cost} to {np.mean(first):.2f} dB" for cost in costs)]
    rows = [titles, ["---"] * len(titles)]
    for name, group in groups.items():
        row = [cell([summary.get(key) for summary, _ in group], digits)
               for key, digits in decimals.items()]
        row += [cell([cost_to_reach(curve, np.mean(first), cost) for _, curve in group], 1)
                for cost in costs]
        rows.append([name, str(len(group)), *row])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def cost_to_reach(curve: list[dict], target: float, cost: str) -> float | None:
    """The least `cost` at which PSNR is `target`, linear between evaluations; None: never.
    Example: 20 dB at step 10 and 24 dB at step 20 reach 23 dB at step 17.5."""
    for before, line in zip(curve[:1] + curve, curve):
        if line["psnr"] >= target:
            share = (target - before["psnr"]) / max(line["psnr"] - before["psnr"], 1e-9)
            return before[cost] + share * (line[cost] - before[cost])
    return None


def cell(values: list, decimals: int) -> str:
    """Mean ± sample standard deviation; "(2 of 3)" where runs do not say, "-" where none does."""
    numbers = [value for value in values if isinstance(value, (int, float))]
    if not numbers:
        return " / ".join(dict.fromkeys(str(value or "-") for value in values))
    text = f"{np.mean(numbers):.{decimals}f}"
    if len(set(numbers)) > 1:
        text += f" ± {np.std(numbers, ddof=1):.{decimals}f}"
    if len(numbers) < len(values):
        text += f" ({len(numbers)} of {len(values)})"
    return text


def draw_curves(groups: dict[str, list]) -> str:
    """SVG text: a panel a cost, in each a line a curve (of metrics.jsonl), and a legend below."""
    colour = dict(zip(groups, itertools.cycle("#2f81f7 #e5711d #2da44e #d1549b #8b6cef".split())))
    panels = []
    for cost in ("step", "rays", "samples", "train_seconds"):
        lines = [(colour[name], np.array([(at[cost], at["psnr"]) for at in curve if cost in at]))
                 for name in groups for curve in groups[name]]
        lines = [(stroke, line) for stroke, line in lines if len(line)]
        if not lines:
            continue
        every = np.concatenate([line for _, line in lines])
        lo, extent = every.min(0), np.ptp(every, 0)
        panels.append(f'<g transform="translate({60 + 260 * len(panels)} 12)" fill="#808890">'
                      f'<text y="205">held-out PSNR [dB] against {cost}</text>'
                      '<path d="M0 0v170h190" fill="none" stroke="#808890"/>')
        for share in (0, 0.5, 1):
            x, y = lo + share * extent
            panels[-1] += (f'<text x="{190 * share}" y="187" text-anchor="middle">{x:.3g}</text>'
                           f'<text x="-5" y="{174 - 170 * share}" text-anchor="end">{y:.3g}</text>')
        for stroke, line in lines:
            pixels = (line - lo) / np.maximum(extent, 1e-12) * (190, -170) + (0, 170)
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
            panels[-1] += f'<polyline points="{path}" fill="none" stroke="{stroke}"/>'
        panels[-1] += "</g>"
    require(panels, "--curves: the runs have no evaluations to draw")
    legend = [f'<text x="60" y="{240 + 18 * i}" fill="{colour[name]}">{html.escape(name)}</text>'
              for i, name in enumerate(groups)]
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" width="{60 + 260 * len(panels)}" '
                      f'height="{240 + 18 * len(groups)}" font-family="sans-serif" '
                      'font-size="12">', *panels, *legend, "</svg>\n"])


MIRROR = "https://huggingface.co/datasets/nerfbaselines/nerfbaselines-data/resolve/main/blender"


@dataclass
class Download:
    """Fetch a Blender scene into DATA/nerf_synthetic/SCENE."""
    scene: tyro.conf.Positional[Literal[tuple(KNOWN["nerf_synthetic"][1].split())]]
    """Name of the scene."""
    data: Path = Path(RunArgs.data)
    """The data folder; default: the environment variable NERF_DATA, else data."""

    def __call__(self) -> None:
        folder, url = self.data / "nerf_synthetic" / self.scene, f"{MIRROR}/{self.scene}.zip"
        require(not folder.exists(), f"{folder}: is there already: remove it first")
        with reading(url, "check --data, the network and the free space"):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temp:
                torch.hub.download_url_to_file(url, f"{temp}/scene.zip")
                shutil.unpack_archive(f"{temp}/scene.zip", temp)    # never outside it; checks CRCs
                found = list(Path(temp).rglob("transforms_train.json"))
                require(len(found) == 1, f"{url}: {len(found)} files transforms_train.json in it")
                os.replace(found[0].parent, folder)
        say(f"{folder} is ready")


COMMANDS = Compare | Download

if __name__ == "__main__":
    one_line_errors(lambda: tyro.cli(COMMANDS, description=__doc__), lambda command: command())
