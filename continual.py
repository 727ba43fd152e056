"""Continual learning of a radiance field ("NeRF-CL", a code release without a paper: github.com/sreesai1412/NeRF-CL, slides and READMEs).

The idea in five lines. Views come in tasks: first those of one side of the object, then those of the other, and the first are gone. A field
that is simply trained on forgets them. What keeps them: stored rays, drawn again where their loss is high; the colours that the
old model gives to new rays (distillation) or to old cameras (own replay: no picture is stored); a penalty on moving the weights that
mattered (EWC). Or views come as a stream, and a bounded memory has to choose what to keep while it passes. How much there is to forget
depends on the field: in a grid most weights belong to a place, in an MLP all weights belong to all places.

| in this field's words                      | here                                                                          |
|--------------------------------------------|-------------------------------------------------------------------------------|
| task, chunk of a stream                    | Task, make_tasks, sector, smooth_order                                        |
| replay buffer of B rays: fill, draw        | Memory.absorb, Memory.draw; --buffer-size, --buffer-fill, --buffer-draw       |
| loss of a stored ray, dynamic update       | Memory.loss, the fine field's squared error; --dynamic                        |
| soft targets                               | --soft-targets: the model's own colours are stored                            |
| exploration ratio; image-centre ratio a    | --exploration; --centre                                                       |
| generative replay, self-distillation       | --learner own-replay, Past.teacher                                            |
| EWC: lambda, F_i, theta*_i                 | --ewc-weight, Past.fisher, Past.anchors (the newest, F summed: online EWC)    |
| A-GEM: g, g_ref                            | project                                                                       |
| P[x][j], PSNR on task j after task x       | psnr_heldout, psnr_seen: its held-out and its training views, met yet or not  |

l is the mean squared error of the fine field, plus the coarse one's where there are two; f the field, y pictures, s the old model. A step's
loss is l(f, y) on rays of the present, and

    naive        nothing else                                                 step_gradients, part 1
    distill      l(f, s) on the same rays: minimal where f = (y + s) / 2      part 2
    ewc          lambda / 2 sum_i F_i (theta_i - theta*_i)^2                  part 2; fisher, penalty
    replay       l(f, y) on stored rays                                       part 3
    own-replay   l(f, s) on rays of old cameras                               part 3
    mixed        half and half of these two                                   part 3
    agem         g - (g . r / r . r) r where g . r < 0, r of stored rays      part 3; project
    joint        rays of all tasks from the start: the reference              train
    forgetting = mean_j<T  max_x>=j P[x][j] - P[T][j];  backward transfer = mean_j<T  P[T][j] - P[j][j]

Where the released code differs from this file:
(1) Only the first task's held-out views are reported there; that distillation caps the second task (at most 6.02 dB above what the old
    model had there) stays unseen. Here all tasks, seen and held-out views, for every learner.
(2) Its buffer holds rays twice (random fill draws with replacement), or leaves out the last 5 % (uniform: stride 8 for 8.4). Here B
    different rays, evenly spaced over all.
(3) Initial losses are of the fine field, updated ones of both: rays once drawn keep being drawn. Here one unit.
(4) Weighted draws crash where the fill stored no losses; here whatever needs losses gets them, and a draw by loss where nothing is stored
    is refused. An update rebuilds a list of B tensors; here all steps of the memory are one pass over an array.
(5) Its second task goes on with Adam's moments and an eighth of the rate (--resume-optimizer --schedule steps); here it starts afresh,
    which forgets more. It trains each task for 128 epochs (21.5 k and 29.7 k steps); here --steps for each.
(6) Losses and soft targets lie in the dataset's folder, reused by whatever runs next; random states are not saved. Here all is in ckpt.pt.
(7) Its online branch does not run as committed (fills crash, the lowest-loss one stores zeros, a ray is stored again and again). Here a
    chunk is taken in when it ends, each ray once; tiles: of all its frames, not of 50.
(8) Its rays end in an interval of 1e10. Here every interval is finite.
Ours, not theirs: own-replay, mixed, ewc, joint, reservoir; --split hard; the hash grid, and the occupancy grid that small fields are
marched through; a positive bias at the MLP's density; tasks by azimuth; --freeze.

What is kept has a price: at 64 px an old hash model takes ten times the bytes of all the pictures that it stands in for (memory_bytes). Own
replay is for larger pictures, and for pictures that must not be kept.

What the runs say (README, three seeds): on the hard split a hash grid forgets 7 dB of the first task's held-out views and 14 dB of the seen
ones, 4 and 6 dB on the released split: not its shape but its colours, by the table as much as by the MLPs. Own renders bring it back to
what joint training has, stored rays three quarters of it. In a stream, the rays of highest loss are worth most: 12 % of all rays are
worth as much as all. Of the release's five findings four hold on both fields; draws weighted by loss do not beat plain ones.

    python continual.py                       two tasks: naive 24.4 dB on the first one's held-out views, mixed and joint 30.7; two minutes
    python continual.py --online highest      a stream of ten chunks: 30.5 dB, nothing stored 27.1, all stored 30.6
    python continual.py --preset paper        the released experiment; for a GPU; not run
"""
from __future__ import annotations

import copy
import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Callable, Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (OccupancyGrid, Progress, Run, Scene, Stopwatch, UserError, check_finite, check_flags, check_not_empty, cli,
                    colour_map, join_views, load_scene, peak_memory_mb, pixel_rays, psnr, random_state, save_png, save_video,
                    random_background, set_random_state, spherical_harmonics, evenly_spaced, ssim, camera_path, comparison_strip, tensorboard,
                    to_device, write_json)
from kernels import composite, hash_encode, hash_levels, march

LEARNERS = ("naive", "distill", "ewc", "replay", "own-replay", "mixed", "joint")
POLICIES = ("none", "agem", "stride", "reservoir", "mixed", "tiles", "highest", "unbounded")                # of a stream
# how the rays are chosen by those who store some (None: as --buffer-fill says)
FILLS = {"replay": None, "mixed": None, "agem": "random", "stride": "uniform", "reservoir": "random", "tiles": "tiles", "highest": "topk",
         "unbounded": "all"}


@dataclass
class Args:
    scene: str = "lego"
    """A scene's name under --data, a path, or the built-in `bricks`; cameras around an object."""
    data: str = os.environ.get("NERF_DATA", "data")
    """Folder with nerf_synthetic/, dtu/ (default: $NERF_DATA, else `data`)."""
    preset: Literal["quick", "paper"] = "quick"
    """quick: hash grid, two minutes on two cores. paper: the released two-task experiment, 8x256 MLPs, for a GPU."""
    out: Optional[str] = None
    """Run folder (default: runs/continual-SCENE-TIME)."""
    seed: int = 0
    """Seed of every random number."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """cpu, cuda, cuda:1, ..."""
    resume: bool = False
    """Continue the run in --out from its last checkpoint."""
    eval_only: bool = False
    """Load the checkpoint in --out, score its last model, draw the pictures, train nothing."""
    video: bool = False
    """Also write a turntable of the last model, render.mp4."""
    tensorboard: bool = False
    """Also log to TensorBoard (if it is installed)."""

    size: int = 64
    """Longer image side [pixels]."""
    split: Literal["released", "hard"] = "hard"
    """released: camera x > 0, then x < 0. hard: within 75 degrees of +x, then of -x, below 60 degrees of elevation."""
    tasks: int = 2
    """Tasks: that many sectors of azimuth, the first one around +x (hard: the middle 5/6 of each sector)."""
    learner: Literal[LEARNERS] = "mixed"
    """What keeps the old tasks. naive: nothing. distill: the old model's colours on new rays. ewc: a penalty on moving weights. replay:
    stored rays. own-replay: the old model's renders of old views. mixed: half and half of these two. joint: all tasks at once, the
    reference."""
    online: Optional[Literal[POLICIES]] = None
    """A stream instead of tasks: frames come in chunks, by a walk to the nearest camera. Which of the rays gone by are stored: none,
    reservoir: a uniform sample, stride: evenly spaced ones, tiles: more where 4x4 tiles have more loss, highest: those of highest loss,
    unbounded: all (drawn with p ~ loss). agem: a sample that only bends gradients. mixed: a sample, and the last chunk's model."""
    compare: Optional[tuple[Literal[LEARNERS + POLICIES], ...]] = None
    """More learners (or policies) in the same run, from the same first task (default: naive joint, --preset paper: all; online: none
    unbounded)."""
    steps: int = 800
    """Optimiser steps a task."""
    rays: int = 1024
    """Rays of the present task a step."""
    background: Literal["white", "black", "grey"] = "white"
    """What is behind the scene."""

    replay_rays: int = 1024
    """Rays of the past a step, for those who look back."""
    replay_weight: float = 1.0
    """Their mean loss counts this much beside the present task's."""
    buffer_size: Optional[int] = None
    """Most rays that are stored (B; default: 12 % of those of all tasks but the last)."""
    buffer_fill: Literal["random", "uniform", "topk", "tiles"] = "random"
    """Which: any; evenly spaced ones; those of highest loss; more where 4x4 tiles of a picture have more loss."""
    buffer_draw: Literal["random", "topk", "weighted"] = "random"
    """Which of them a step replays: any; those of highest loss; with p ~ loss (topk, weighted: --dynamic keeps the losses new)."""
    exploration: float = 0.2
    """--buffer-draw weighted: share that is drawn uniformly from the rest."""
    dynamic: bool = True
    """Keep the newest loss of a replayed ray (otherwise the one that it was stored with)."""
    centre: float = 0.0
    """--buffer-draw weighted: share a of the image-centre term, p = (1 - a) p_loss + a p_centre (released: 0.3)."""
    soft_targets: bool = False
    """Store the model's own colours of rays, not the pictures' (the losses that they are stored with are still those against pictures)."""
    distill_weight: float = 1.0
    """--learner distill: weight of the old model's colours (1: released)."""
    ewc_weight: float = 1.0
    """--learner ewc: lambda; 1 is the Laplace approximation of the old tasks' loss."""
    ewc_rays: int = 16384
    """Old rays from which the Fisher information is estimated."""
    freeze: Literal["none", "table", "mlps"] = "none"
    """--field hash: what rests after the first task, the grid or the MLPs that read it: who of the two forgets?"""
    resume_optimizer: bool = False
    """Adam's moments and its decayed rate go on in the next task (released); otherwise each task starts them afresh."""
    chunk: int = 10
    """--online: frames a chunk; every fifth is held out."""
    chunk_steps: int = 100
    """--online: optimiser steps a chunk."""

    field: Literal["hash", "mlp"] = "hash"
    """hash: a grid, whose weights are local in space. mlp: every weight is everywhere."""
    levels: int = 6
    """Hash grid levels (L)."""
    features: int = 4
    """Features a level (F)."""
    log2_table: int = 16
    """Rows of a level's table, log2 (log2 T)."""
    base: int = 16
    """Cells a side of the coarsest level."""
    finest: int = 128
    """Cells a side of the finest level."""
    width: int = 64
    """Units of an MLP layer (--field mlp)."""
    depth: int = 4
    """Layers of the MLP; where more than 4, x enters again before the fifth."""
    frequencies: int = 6
    """Frequencies of x in the MLP's positional encoding (of d: 4)."""
    samples: int = 128
    """Samples along the box's diagonal, where an occupancy grid is marched; with --importance: stratified samples a ray."""
    importance: int = 0
    """Not 0: no occupancy grid, but a coarse and a fine field, the second with so many more samples a ray (released: 64)."""
    grid: int = 32
    """Occupancy grid cells a side."""
    lr: Optional[float] = None
    """Adam's learning rate (default: 1e-2 for hash, 5e-3 for mlp)."""
    lr_warmup: int = 50
    """Steps in which it first grows linearly from 0."""
    schedule: Literal["cosine", "steps", "constant"] = "cosine"
    """Within a task: down to a tenth; halved after 1/64, 1/32 and 1/16 of its steps (released); or as it is. Online always constant."""
    eval_every: int = 500
    """Steps between two evaluations and checkpoints within a task."""
    eval_views: int = 8
    """Views a task whose PSNR is measured, of the seen and of the held-out each (0: all)."""


PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", split="released", field="mlp", width=256, depth=8, frequencies=10, samples=64, importance=64,
                  steps=21_504, resume_optimizer=True, schedule="steps", lr=5e-4, lr_warmup=1, buffer_size=20_480, buffer_fill="topk",
                  buffer_draw="weighted", eval_every=2000, eval_views=0),
}


# ------------------------------------------------------------------------------------------------------- tasks and streams

@dataclass
class Task:
    """Views that come together: indices of those to learn from, and of those that nobody trains on, in one list of views."""
    name: str
    seen: list[int]
    held_out: list[int]


def sector(c2w: Tensor, k: int, n: int, hard: bool) -> Tensor:
    """Cameras (V, 3, 4) that look from the k-th of n sectors of azimuth: bool (V,). Sector 0 is centred on +x; of two, the first is x > 0.

    hard: only within 5/6 of the sector's half width of its centre (n = 2: 75 degrees), below 60 degrees of elevation.
    """
    x, y, z = c2w[:, :, 3].double().unbind(-1)
    away = torch.atan2(y, x) - 2 * math.pi * k / n
    away = (torch.remainder(away + math.pi, 2 * math.pi) - math.pi).abs()                           # (V,) angle to the centre, in [0, pi]
    if hard:
        return (away < math.pi / n * 5 / 6) & (torch.atan2(z, torch.hypot(x, y)) < math.pi / 3)
    return away < math.pi / n


def smooth_order(position: Tensor) -> list[int]:
    """A walk from camera 0 to whichever unvisited one is nearest, and so on.  (V, 3) -> all indices."""
    distance, order = torch.cdist(position, position), [0]
    distance[:, 0] = math.inf
    while len(order) < len(position):
        order.append(int(distance[order[-1]].argmin()))
        distance[:, order[-1]] = math.inf
    return order


def make_tasks(scene: Scene, args: Args) -> list[Task]:
    """An index points into join_views(train, test). Online: the training views only, every fifth of a chunk held out."""
    V = len(scene.train.names)
    if args.online:
        order = smooth_order(scene.train.c2w[:, :, 3])
        chunks = [order[i:i + args.chunk] for i in range(0, V, args.chunk)]
        if len(chunks[-1]) < 3:                                                                     # too few to hold one out
            chunks[-2:] = [sum(chunks[-2:], [])]
        if len(chunks) < 2 or args.chunk < 3:
            raise UserError(f"--chunk {args.chunk}: {scene.name} has {V} views: give at least 3, and so few that there are 2 chunks")
        return [Task(f"chunk {k + 1}", [v for i, v in enumerate(c) if i % 5 != 2], c[2::5]) for k, c in enumerate(chunks)]
    where = [sector(torch.cat([scene.train.c2w, scene.test.c2w]), k, args.tasks, args.split == "hard").nonzero()[:, 0].tolist()
             for k in range(args.tasks)]
    tasks = [Task(f"task {k + 1}", [v for v in ids if v < V], [v for v in ids if v >= V]) for k, ids in enumerate(where)]
    for task in tasks:
        if not task.seen or not task.held_out:
            raise UserError(f"--split {args.split} --tasks {args.tasks}: {task.name} of {scene.name} has {len(task.seen)} training and "
                            f"{len(task.held_out)} test views: use fewer tasks, or --split released")
    return tasks


@dataclass
class Lesson:
    """A learner at a task, for so many steps; those of one learner follow each other."""
    learner: str                # "first" is the first task, which all but `joint` have in common
    x: int                      # index of the task
    steps: int
    start: str                  # with which model: "newborn", "first" (as that lesson left it), "" (as the last lesson left it)


def plan(args: Args, tasks: int) -> list[Lesson]:
    """All lessons in order. The main learner comes last, so that the last model is its; joint has the steps of all tasks."""
    main = args.online or args.learner
    names = [name for name in dict.fromkeys(args.compare) if name != main] + [main]
    if args.online:
        return [Lesson(name, x, args.chunk_steps, "" if x else "newborn") for name in names for x in range(tasks)]
    lessons = [] if names == ["joint"] else [Lesson("first", 0, args.steps, "newborn")]
    for name in names:
        lessons += [Lesson("joint", tasks - 1, tasks * args.steps, "newborn")] if name == "joint" else \
            [Lesson(name, x, args.steps, "first" if x == 1 else "") for x in range(1, tasks)]
    return lessons


# ------------------------------------------------------------------------------- what to keep, what to replay: the memory

def choose(p: Tensor, n: int) -> Tensor:
    """n indices without replacement, each next one with probability in proportion to what is left of p.  (B,) >= 0 -> (n,)

    Those with the n largest p_i / E_i, E_i ~ Exp(1): one pass and a selection (Efraimidis and Spirakis 2006). Where fewer than n have
    p > 0, any others fill up.
    """
    return (p / torch.empty_like(p).exponential_()).topk(n).indices


def tile_losses(loss: Tensor, id: Tensor, H: int, W: int) -> Tensor:
    """Each ray's share of drawing by 4x4 tiles: the mean loss of its tile, over the sum of these of its picture.  (n,), (n,) -> (n,).

    id: view H W + row W + column. So a picture's 16 tiles get rays in proportion to L_1 ... L_16, which sum to 1 (online-cl, README).
    """
    view, row, column = id // (H * W), id // W % H, id % W
    tile = view * 16 + row * 4 // H * 4 + column * 4 // W
    sums = loss.new_zeros(2, 16 * (int(view.max()) + 1))                                            # of losses, of rays; a tile each
    total, count = sums.index_add_(1, tile, torch.stack([loss, torch.ones_like(loss)]))
    mean = total / count.clamp(min=1)
    return mean[tile] / mean.view(-1, 16).sum(1)[view].clamp(min=1e-12)


def size_of(tensors) -> int:
    """Bytes."""
    return sum(x.numel() * x.element_size() for x in tensors)


class Memory:
    """At most `size` rays of the past: id (B,) int32, rgb (B, 3) uint8, loss (B,) float32, the newest squared error that is known (mean
    over channels; None where nobody asks for it), and how many rays have gone by. 7 or 11 bytes a ray, and 48 a camera."""
    def __init__(self, size: int, fill: str, H: int, W: int, device="cpu", losses: bool = True):
        self.size, self.fill, self.H, self.W, self.gone_by = size, fill, H, W, 0
        self.id, self.rgb = torch.zeros(0, dtype=torch.int32, device=device), torch.zeros(0, 3, dtype=torch.uint8, device=device)
        self.loss = torch.zeros(0, device=device) if losses else None

    def __len__(self):
        return len(self.id)

    def bytes(self) -> int:
        views = len((self.id // (self.H * self.W)).unique())
        return size_of([self.id, self.rgb] + ([] if self.loss is None else [self.loss])) + 48 * views

    def state_dict(self) -> dict:
        return {"id": self.id, "rgb": self.rgb, "loss": self.loss, "gone_by": self.gone_by}

    def load_state_dict(self, state: dict) -> None:
        self.gone_by = state["gone_by"]
        self.id, self.rgb, self.loss = (x if x is None else x.to(self.id.device) for x in (state["id"], state["rgb"], state["loss"]))

    def absorb(self, id: Tensor, rgb: Tensor, loss: Tensor) -> None:
        """Take in the rays of a task that is over: id (n,), rgb (n, 3) in [0, 1], loss (n,). No ray is ever stored twice.

        all: everything. topk: of old and new together, those of highest loss (the new ones have just been trained on, so theirs is low).
        Otherwise the new ones get size n / gone_by of the places, and the old ones are thinned to the others: random, any, without
        replacement; uniform, evenly spaced; tiles, the new ones by tile_losses, the old ones any.
        """
        n, device = len(id), id.device
        self.gone_by += n
        if self.fill in ("topk", "all"):
            old, new = torch.arange(len(self), device=device), torch.arange(n, device=device)
        else:
            places = min(self.size, self.gone_by)
            share = round(places * n / self.gone_by)                                                # all of them, while all fit
            even = lambda have, take: torch.arange(take, device=device) * have // max(take, 1)
            chance = lambda have, take: torch.randperm(have, device=device)[:take].sort().values
            thin = even if self.fill == "uniform" else chance
            old = thin(len(self), places - share)
            new = choose(tile_losses(loss, id, self.H, self.W), share).sort().values if self.fill == "tiles" else thin(n, share)
        self.id = torch.cat([self.id[old], id[new].int()])
        self.rgb = torch.cat([self.rgb[old], (rgb[new] * 255 + 0.5).byte()])
        if self.loss is not None:
            self.loss = torch.cat([self.loss[old], loss[new]])
        if self.fill == "topk" and len(self) > self.size:
            kept = self.loss.topk(self.size).indices.sort().values
            self.id, self.rgb, self.loss = self.id[kept], self.rgb[kept], self.loss[kept]

    def draw(self, n: int, how: str, exploration: float = 0.0, centre: float = 0.0) -> Tensor:
        """Indices (n,) of rays to replay, no two alike. random; topk: highest loss; weighted: p ~ loss for n - int(n exploration) of them,
        the others uniform from the rest. centre a: p = (1 - a) p_loss + a p_centre, p_centre ~ exp(-r^2 / 2), r = 0 in the picture's
        middle, 1 in the middle of its sides."""
        n = min(n, len(self))
        if how == "random":
            return torch.randperm(len(self), device=self.id.device)[:n]
        if how == "topk":
            return self.loss.topk(n).indices
        p = self.loss / self.loss.sum().clamp(min=1e-12)
        if centre:
            x, y = (self.id % self.W + 0.5) * 2 / self.W - 1, (self.id // self.W % self.H + 0.5) * 2 / self.H - 1
            middle = torch.exp(-(x ** 2 + y ** 2) / 2)
            p = (1 - centre) * p + centre * middle / middle.sum()
        explored = int(n * exploration)
        by_loss = choose(p, n - explored)
        rest = torch.ones_like(p).index_fill_(0, by_loss, 0)
        return torch.cat([by_loss, choose(rest, explored)])


# ---------------------------------------------------------------------------------- what else keeps the past: two gradients

def project(new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    """A-GEM: g of the new batch, r of the replayed one -> g where g . r >= 0, else g - (g . r / r . r) r: to first
    order the old loss does not rise (of plain gradient descent; Adam's moments and scales come after this)."""
    dot = sum((g * r).sum() for g, r in zip(new, old))
    if dot >= 0:
        return new
    scale = dot / sum((r * r).sum() for r in old)
    return [g - scale * r for g, r in zip(new, old)]


def fisher(outputs: Callable, parameters: list[Tensor], batches: int) -> list[Tensor]:
    """Diagonal of the Gauss-Newton matrix of a mean squared error: h_i = 2 mean_n,c (d f_nc / d theta_i)^2, one tensor a parameter.

    outputs() -> (n, C), another batch each time. From one backward pass a batch: with independent signs s, E (sum_nc s_nc d f_nc)^2 is the
    sum of squares, as the mixed terms cancel in the mean. (For colours with Gaussian noise h is the Fisher information times its variance.)
    """
    h = [torch.zeros_like(p) for p in parameters]
    for _ in range(batches):
        f = outputs()
        signs = torch.randint(0, 2, f.shape, device=f.device).to(f) * 2 - 1
        for total, g in zip(h, torch.autograd.grad((signs * f).sum(), parameters)):
            total += 2 * g ** 2 / (f.numel() * batches)
    return h


def penalty(parameters: list[Tensor], anchors: list[Tensor], h: list[Tensor]) -> Tensor:
    """EWC: 1/2 sum_i h_i (theta_i - theta*_i)^2: what the old tasks' loss would have become, were it a parabola without mixed terms."""
    return 0.5 * sum((w * (p - a) ** 2).sum() for p, a, w in zip(parameters, anchors, h))


# ---------------------------------------------------------------------------------------------------------------- measures

def forgetting(P: list[list[float]]) -> Optional[float]:
    """Mean over all tasks but the last of best minus last.  P[x][j]: PSNR after task x on task j -> dB, None for a single row.
    Pocket check: [[30, 20], [25, 30]] -> 5."""
    return None if len(P) < 2 else sum(max(row[j] for row in P[j:]) - P[-1][j] for j in range(len(P) - 1)) / (len(P) - 1)


def backward_transfer(P: list[list[float]]) -> Optional[float]:
    """Mean over all tasks but the last of last minus just learned: negative where tasks are forgotten, positive where later ones help."""
    return None if len(P) < 2 else sum(P[-1][j] - P[j][j] for j in range(len(P) - 1)) / (len(P) - 1)


# -------------------------------------------------------------------------------------------------------------- the fields

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
    """Hash grid -> MLP 64 -> density and 15 features; these and the direction -> MLP 64 -> colour. Most weights are rows of a table, which
    a ray elsewhere does not touch (but for collisions); the two small MLPs belong to all places."""
    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        self.levels = hash_levels(args.levels, args.base, args.finest, args.log2_table)
        self.register_buffer("aabb", aabb)                                                          # (2, 3)
        self.table = nn.Parameter(torch.empty(self.levels.offsets[-1], args.features).uniform_(-1e-4, 1e-4))
        self.geometry = nn.Sequential(nn.Linear(args.levels * args.features, 64), nn.ReLU(), nn.Linear(64, 16))
        self.colour = nn.Sequential(nn.Linear(15 + 16, 64), nn.ReLU(), nn.Linear(64, 3))

    directions = staticmethod(spherical_harmonics)                                                  # (R, 3) unit -> (R, 16)

    def forward(self, x: Tensor, d: Optional[Tensor]):
        """x (N, 3) in the world, d (N, 16) what `directions` makes of it, or None -> sigmas (N,) [1/length], rgbs (N, 3) or None."""
        u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])                                      # (N, 3) in [0, 1]
        h = self.geometry(hash_encode(u, self.table, self.levels))                                  # (N, 16)
        rgbs = None if d is None else torch.sigmoid(self.colour(torch.cat([h[:, 1:], d], -1)))
        return _TruncatedExp.apply(h[:, 0] - 1), rgbs


class MLPField(nn.Module):
    """NeRF's MLP: frequencies of x -> --depth layers, x again before the fifth -> density; with 4 frequencies of d -> colour. Every weight
    takes part in every place."""
    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        W, self.n = args.width, args.frequencies
        into = 3 + 6 * self.n
        self.layers = nn.ModuleList([nn.Linear(into if i == 0 else W + into if i == 4 else W, W) for i in range(args.depth)])
        self.density, self.feature = nn.Linear(W, 1), nn.Linear(W, W)
        nn.init.constant_(self.density.bias, 0.1)                                                   # fog: a ReLU of less is dead
        self.colour = nn.Sequential(nn.Linear(W + 27, W // 2), nn.ReLU(), nn.Linear(W // 2, 3))

    @staticmethod
    def encode(v: Tensor, n: int) -> Tensor:
        """v, sin(2^k v), cos(2^k v), k < n: (N, 3) -> (N, 3 + 6n)."""
        angles = (v[:, None] * 2.0 ** torch.arange(n, device=v.device)[:, None]).flatten(1)
        return torch.cat([v, angles.sin(), angles.cos()], -1)

    def directions(self, d: Tensor) -> Tensor:
        return self.encode(d, 4)                                                                    # (R, 27)

    def forward(self, x: Tensor, d: Optional[Tensor]):
        x = h = self.encode(x, self.n)
        for i, layer in enumerate(self.layers):
            h = F.relu(layer(torch.cat([x, h], -1) if i == 4 else h))
        rgbs = None if d is None else torch.sigmoid(self.colour(torch.cat([self.feature(h), d], -1)))
        return F.relu(self.density(h)[:, 0]), rgbs


class Model(nn.Module):
    """All that renders: a field and the occupancy grid that it is marched through, or (--importance) a coarse and a fine field. An old
    model is a copy of this."""
    def __init__(self, args: Args, scene: Scene):
        super().__init__()
        make = HashField if args.field == "hash" else MLPField
        self.fine = make(args, scene.aabb)
        self.coarse = make(args, scene.aabb) if args.importance else None
        self.grid = None if args.importance else OccupancyGrid(scene.aabb, args.grid, decay=0.8)
        self.march_step = float((scene.aabb[1] - scene.aabb[0]).norm()) / args.samples              # in world units

    def bytes(self) -> int:
        return size_of(self.parameters()) + (0 if self.grid is None else size_of([self.grid.occupied]))


# ------------------------------------------------------------------------------------------------------------------ render

def blend(field, rays_o: Tensor, rays_d: Tensor, ray: Tensor, t_starts: Tensor, t_ends: Tensor, offsets: Tensor, bg: Tensor) -> dict:
    """Packed intervals (N,) of rays (R, 3), ray (N,) their ray, sampled in their middles -> rgb (R, 3), acc, depth (R,), weights (N,)."""
    x = rays_o[ray] + (0.5 * (t_starts + t_ends))[:, None] * rays_d[ray]                            # (N, 3)
    rgb, acc, depth, weights = composite(*field(x, field.directions(rays_d)[ray]), t_starts, t_ends, offsets)
    return {"rgb": rgb + (1 - acc[:, None]) * bg, "acc": acc, "depth": depth, "weights": weights}


def edges(t: Tensor) -> tuple[Tensor, ...]:
    """Edges (R, S+1) of intervals -> packed: ray (R S,), t_starts, t_ends (R S,), offsets (R+1,)."""
    R, S = len(t), t.shape[1] - 1
    return (torch.arange(R, device=t.device).repeat_interleave(S), t[:, :-1].reshape(-1), t[:, 1:].reshape(-1),
            torch.arange(R + 1, device=t.device) * S)


def importance(t: Tensor, weights: Tensor, n: int, perturb: bool) -> Tensor:
    """Edges (R, S+1) and n more of them, drawn by weights (R, S), constant in each interval: -> (R, S+1+n), sorted. No gradient."""
    cdf = F.pad((weights.detach() + 1e-5).cumsum(1), (1, 0))
    cdf = cdf / cdf[:, -1:]
    u = (torch.arange(n, device=t.device) + (torch.rand(len(t), n, device=t.device) if perturb else 0.5)) / n
    i = torch.searchsorted(cdf, u.expand(len(t), n).contiguous(), right=True).clamp(1, t.shape[1] - 1)        # the upper edge
    low, high = cdf.gather(1, i - 1), cdf.gather(1, i)
    more = torch.lerp(t.gather(1, i - 1), t.gather(1, i), (u - low) / (high - low))
    return torch.cat([t, more], 1).sort(1).values


def render(model: Model, rays_o: Tensor, rays_d: Tensor, scene: Scene, args: Args, perturb: bool = False) -> dict:
    """Rays (R, 3) -> rgb (R, 3) over the scene's background, acc, depth (R,); coarse (R, 3) or None. perturb: samples move."""
    R, device = len(rays_o), rays_o.device
    if model.grid is not None:
        jitter = torch.rand(R, device=device) if perturb else None
        *t, offsets, ray = march(rays_o, rays_d, model.grid.occupied, scene.aabb, model.march_step, scene.near, scene.far, jitter)
        return {**blend(model.fine, rays_o, rays_d, ray, *t, offsets, scene.bg), "coarse": None}
    k = torch.arange(args.samples + 1, device=device).expand(R, -1)
    if perturb:
        k = k + F.pad(torch.rand(R, args.samples - 1, device=device) - 0.5, (1, 1))                 # inner edges move by up to half a width
    t = scene.near + k * ((scene.far - scene.near) / args.samples)                                  # (R, S+1)
    first = blend(model.coarse, rays_o, rays_d, *edges(t), scene.bg)
    t = importance(t, first["weights"].view(R, -1), args.importance, perturb)
    return {**blend(model.fine, rays_o, rays_d, *edges(t), scene.bg), "coarse": first["rgb"]}


def squared_error(out: dict, target: Tensor) -> tuple[Tensor, Tensor]:
    """-> the loss, fine + coarse mean squared error; and each ray's own, of the fine colour, mean over channels (R,), no gradient."""
    e = ((out["rgb"] - target) ** 2).mean(-1)
    return e.mean() + (0 if out["coarse"] is None else ((out["coarse"] - target) ** 2).mean()), e.detach()


def rays_of(views, id: Tensor) -> tuple[Tensor, Tensor]:
    """id (n,), view H W + row W + column -> rays_o, rays_d (n, 3)."""
    H, W = views.images.shape[1:3]
    id = id.long()
    view, xy = id // (H * W), torch.stack([id % W, id // W % H], -1) + 0.5
    return pixel_rays(xy, views.K[view], views.c2w[view])


# ---------------------------------------------------------------------------------------------------------------- evaluate

@torch.no_grad()
def render_view(model: Model, views, v: int, scene: Scene, args: Args, chunk: int = 8192) -> dict:
    """A whole picture: rgb (H, W, 3) in [0, 1], depth (H, W)."""
    H, W = views.images.shape[1:3]
    pixels = torch.arange(v * H * W, (v + 1) * H * W, device=views.c2w.device)
    parts = [render(model, *rays_of(views, id), scene, args) for id in pixels.split(chunk if model.coarse is None else chunk // 8)]
    return {"rgb": torch.cat([p["rgb"] for p in parts]).clamp(0, 1).view(H, W, 3),
            "depth": torch.cat([p["depth"] for p in parts]).view(H, W)}


def some(ids: list[int], n: int) -> list[int]:
    """n of ids, evenly spaced (0: all)."""
    return [ids[i] for i in evenly_spaced(len(ids), n)] if 0 < n < len(ids) else ids


def evaluate(model: Model, views, tasks: list[Task], scene: Scene, args: Args, most: int) -> dict:
    """psnr_heldout, psnr_seen: a number a task [dB], the mean over at most `most` of its views; ssim: over all those held out."""
    scores = {"psnr_heldout": [], "psnr_seen": [], "ssim": []}
    for task in tasks:
        for name, ids in (("psnr_heldout", task.held_out), ("psnr_seen", task.seen)):
            found = []
            for v in some(ids, most):
                rgb = render_view(model, views, v, scene, args)["rgb"]
                found.append(float(psnr(rgb, views.images[v])))
                if name == "psnr_heldout":
                    scores["ssim"].append(float(ssim(rgb, views.images[v])))
            scores[name].append(sum(found) / len(found))
    return {**scores, "ssim": sum(scores["ssim"]) / len(scores["ssim"])}


# ------------------------------------------------------------------------------------------------------------------- train

class Past:
    """All that a learner keeps of the tasks before: stored rays, the old model, old weights and how much they matter, old cameras."""
    def __init__(self, learner: str, args: Args, H: int, W: int):
        fill = (FILLS[learner] or args.buffer_fill) if learner in FILLS else None
        self.how = "weighted" if learner == "unbounded" else args.buffer_draw
        self.by_loss = fill in ("topk", "tiles") or self.how != "random"
        self.memory = None if fill is None else Memory(args.buffer_size, fill, H, W, args.device, losses=self.by_loss)
        self.learner, self.teacher, self.anchors, self.fisher, self.views = learner, None, None, None, []

    def state_dict(self) -> dict:
        state = lambda part: None if part is None else part.state_dict()
        return {"memory": state(self.memory), "teacher": state(self.teacher), "anchors": self.anchors, "fisher": self.fisher,
                "views": self.views}

    def load_state_dict(self, state: dict, model: Model) -> None:
        if state["memory"]:
            self.memory.load_state_dict(state["memory"])
        if state["teacher"]:
            self.teacher = copy.deepcopy(model).requires_grad_(False)
            self.teacher.load_state_dict(state["teacher"])
        move = lambda tensors: tensors and [x.to(next(model.parameters()).device) for x in tensors]
        self.anchors, self.fisher, self.views = move(state["anchors"]), move(state["fisher"]), state["views"]

    def bytes(self, H: int, W: int) -> int:
        """What it costs to keep: rays, old model, weights; 48 for each old camera that is used; `joint` keeps pictures, 3 bytes a pixel."""
        total = size_of((self.anchors or []) + (self.fisher or [])) + (self.teacher.bytes() if self.teacher else 0)
        if self.learner in ("own-replay", "joint"):
            total += 48 * len(self.views)
        return total + (self.memory.bytes() if self.memory else 0) + (3 * H * W * len(self.views) if self.learner == "joint" else 0)

    def remember(self, model: Model, views, old: Task, scene: Scene, args: Args) -> None:
        """A task is over: keep what this learner keeps of it. Called, and timed, when the next one begins."""
        H, W = views.images.shape[1:3]
        device = views.c2w.device
        self.views = self.views + old.seen
        id = (torch.tensor(old.seen, device=device)[:, None] * (H * W) + torch.arange(H * W, device=device)).flatten()    # all its rays
        if self.memory is not None:
            rgb, loss = views.images.view(-1, 3)[id], torch.zeros(len(id), device=device)
            if self.by_loss or args.soft_targets:
                own = torch.cat([render_view(model, views, v, scene, args)["rgb"].view(-1, 3) for v in old.seen])
                loss = ((own - rgb) ** 2).mean(-1)
                rgb = own if args.soft_targets else rgb
            self.memory.absorb(id, rgb, loss)
        if self.learner in ("distill", "own-replay", "mixed"):
            self.teacher = copy.deepcopy(model).requires_grad_(False)
        if self.learner == "ewc":
            def colours():
                out = render(model, *rays_of(views, id[torch.randint(len(id), (args.rays,), device=device)]), scene, args)
                both = out["rgb"] if out["coarse"] is None else torch.cat([out["rgb"], out["coarse"]], 1)
                return both * (both.shape[1] / 3) ** 0.5                                            # l adds their means, fisher takes one
            parameters = moving(model)
            new = fisher(colours, parameters, math.ceil(args.ewc_rays / args.rays))
            self.anchors = [p.detach().clone() for p in parameters]
            self.fisher = new if self.fisher is None else [a + b for a, b in zip(self.fisher, new)]


def moving(model: Model) -> list[Tensor]:
    """The parameters that --freeze has not put to rest."""
    return [p for p in model.parameters() if p.requires_grad]


def behind(scene: Scene, target: Tensor) -> Scene:
    """The scene; of pictures without alpha with a background a ray, the target (R, 3) of another ray: see common.random_background."""
    if scene.train.alpha is not None:
        return scene
    return replace(scene, bg=random_background(target, None, scene.bg)[1])


def step_gradients(model: Model, past: Past, views, present: list[int], n: int, scene: Scene, args: Args) -> tuple[Tensor, Tensor]:
    """One step's loss, its gradient left in the parameters.  n: rays of the views `present` -> loss, acc (n,)."""
    H, W = views.images.shape[1:3]
    pixels, device = views.images.view(-1, 3), views.c2w.device
    anywhere = lambda ids, n: (torch.tensor(ids, device=device)[torch.randint(len(ids), (n,), device=device)] * (H * W)
                               + torch.randint(H * W, (n,), device=device))
    # 1. rays of the present
    id = anywhere(present, n)
    rays = rays_of(views, id)
    shown = behind(scene, pixels[id])
    out = render(model, *rays, shown, args, perturb=True)
    loss, _ = squared_error(out, pixels[id])
    # 2. the past without rays of its own
    if past.learner == "distill" and past.teacher:                                                  # the same rays, another target
        with torch.no_grad():
            target = render(past.teacher, *rays, shown, args)["rgb"]
        loss = loss + args.distill_weight * squared_error(out, target)[0]
    if past.learner == "ewc" and past.fisher:
        loss = loss + args.ewc_weight * penalty(moving(model), past.anchors, past.fisher)
    # 3. rays of the past, one batch: stored ones with their colours, then old cameras with the old model's
    ids, targets, want = [], [], args.replay_rays
    if past.memory is not None and len(past.memory):
        i = past.memory.draw(want // 2 if past.learner == "mixed" else want, past.how, args.exploration, args.centre)
        ids, targets = [past.memory.id[i]], [past.memory.rgb[i] / 255]
    if past.learner in ("own-replay", "mixed") and past.teacher:
        ids.append(anywhere(past.views, want - (len(i) if ids else 0)))
        with torch.no_grad():
            targets.append(render(past.teacher, *rays_of(views, ids[-1]), scene, args)["rgb"])
    if ids:
        ids, targets = torch.cat(ids), torch.cat(targets)
        old_loss, e = squared_error(render(model, *rays_of(views, ids), behind(scene, targets), args, perturb=True), targets)
        if past.memory is not None and past.memory.loss is not None and args.dynamic:
            past.memory.loss[i] = e[:len(i)]
        if past.learner == "agem":                                                                  # bends the gradient, is not learnt
            parameters = moving(model)
            gradients = project(torch.autograd.grad(loss, parameters), torch.autograd.grad(old_loss, parameters))
            for p, g in zip(parameters, gradients):
                p.grad = g
            return loss.detach(), out["acc"]
        loss = loss + args.replay_weight * old_loss
    loss.backward()
    return loss.detach(), out["acc"]


# flags that may change between a run and its --resume or --eval-only (lr: the cure of a loss that is not finite)
FREE = {"lr", "data", "device", "out", "resume", "eval_only", "video", "tensorboard"}


def check(args: Args) -> None:
    """Raise UserError for a flag that makes no sense."""
    check_flags(args, positive=("steps", "rays", "replay_rays", "ewc_rays", "chunk", "chunk_steps", "levels", "features", "base", "samples",
                                "finest", "width", "depth", "frequencies", "grid", "lr", "lr_warmup", "eval_every"),
                not_negative=("replay_weight", "distill_weight", "ewc_weight", "importance", "eval_views"),
                shares=("exploration", "centre"))
    if not 1 <= args.log2_table <= 24 or args.finest < args.base:
        raise UserError(f"--log2-table {args.log2_table} --base {args.base} --finest {args.finest}: 1 to 24, and finest not below base")
    if args.buffer_size is not None and args.buffer_size < 1:
        raise UserError(f"--buffer-size {args.buffer_size} must be greater than 0")
    if args.freeze != "none" and args.field == "mlp":
        raise UserError(f"--freeze {args.freeze}: an MLP has no table: use it with --field hash")
    if args.tasks < 2:
        raise UserError(f"--tasks {args.tasks}: to forget, one needs 2")
    if args.importance and args.field == "hash":
        raise UserError("--importance samples from near to far, beyond the hash grid's box: use it with --field mlp")
    known = POLICIES if args.online else LEARNERS
    for name in args.compare:
        if name not in known:
            raise UserError(f"--compare {name}: {'with' if args.online else 'without'} --online, choose among {' '.join(known)}")
    if not {args.online or args.learner, *args.compare} & set(FILLS) and args.buffer_draw not in ("random", PRESETS[args.preset].buffer_draw):
        raise UserError(f"--buffer-draw {args.buffer_draw}: {args.online or args.learner} stores no rays, so no losses to draw by are kept")
    if args.centre and args.buffer_draw != "weighted":
        raise UserError(f"--centre {args.centre} is a term of --buffer-draw weighted, not of {args.buffer_draw}")


def anneal(progress: float, schedule: str) -> float:
    """Factor on the learning rate at a task's progress in [0, 1)."""
    return {"cosine": 0.55 + 0.45 * math.cos(math.pi * progress), "constant": 1.0,
            "steps": 0.5 ** sum(progress >= p for p in (1 / 64, 1 / 32, 1 / 16))}[schedule]


def train(args: Args) -> dict:
    """Train, evaluate, write the run folder; -> what summary.json holds."""
    if args.compare is None:
        default = ("none", "unbounded") if args.online else LEARNERS if args.preset == "paper" else ("naive", "joint")
        args = replace(args, compare=default)
    if args.lr is None:
        args = replace(args, lr=1e-2 if args.field == "hash" else 5e-3)
    check(args)
    torch.manual_seed(args.seed)
    scene = to_device(load_scene(args.scene, args.data, args.size, args.background), args.device)
    if scene.ndc:
        raise UserError(f"{scene.name} is a forward-facing scene, whose cameras have no sides: choose one with cameras around an object")
    tasks, views = make_tasks(scene, args), join_views(scene.train, scene.test)
    H, W = views.images.shape[1:3]
    old_rays = sum(len(task.seen) for task in tasks[:-1]) * H * W
    if args.buffer_size is None:
        args = replace(args, buffer_size=round(0.12 * old_rays))
    if args.buffer_size > old_rays:
        raise UserError(f"--buffer-size {args.buffer_size}: all tasks but the last have {old_rays} rays: give at most that")
    run = Run("continual", scene.name, args.out, asdict(args), resume=args.resume, eval_only=args.eval_only)
    board = tensorboard(run.path) if args.tensorboard else None

    lessons, main = plan(args, len(tasks)), args.online or args.learner
    new_model = lambda: Model(args, scene).to(args.device)
    new_optimiser = lambda: torch.optim.Adam(model.parameters(), lr=args.lr, eps=1e-15 if args.field == "hash" else 1e-8, fused=True)
    model = new_model()
    optimiser, past = new_optimiser(), Past(lessons[0].learner, args, H, W)
    place, results, clock = {"lesson": 0, "t": 0}, {"rows": {}, "album": {}, "first": None}, Stopwatch(args.device)
    if run.resumed:
        state = run.load({name: value for name, value in run.args.items() if name not in FREE})
        place, results, clock = state["place"], state["results"], Stopwatch(args.device, state["seconds"])
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        past = Past(lessons[place["lesson"] - (place["t"] == 0)].learner, args, H, W)               # the one that the checkpoint holds
        past.load_state_dict(state["past"], model)
        set_random_state(state["random"])
    if args.eval_only and place["lesson"] < len(lessons):
        raise UserError(f"{run.path}: {main} is not trained yet: --resume the run first")
    done = sum(lesson.steps for lesson in lessons[:place["lesson"]]) + place["t"]                   # steps of all learners together
    if args.resume:
        run.rewind(done, by="total")                                                                # lines that will be written again
    progress = Progress(sum(lesson.steps for lesson in lessons), done)

    while place["lesson"] < len(lessons) and not args.eval_only:
        lesson, t = lessons[place["lesson"]], place["t"]
        learner, x, newborn = lesson.learner, lesson.x, lesson.start == "newborn"
        clock.start()
        before = clock.seconds
        # 1. a task begins. Its random numbers follow from the seed and the task alone, whoever else is compared
        if t == 0 and newborn:
            torch.manual_seed(args.seed)
            model = new_model()
            optimiser, past = new_optimiser(), Past(learner, args, H, W)
            results["rows"][learner] = {"psnr_heldout": [], "psnr_seen": [], "seconds": 0.0, "steps": 0}
        elif t == 0 and lesson.start == "first":
            model.load_state_dict(results["first"]["model"])
            optimiser.load_state_dict(copy.deepcopy(results["first"]["optimiser"]))                 # it keeps what it is given
            past = Past(learner, args, H, W)
            results["rows"][learner] = copy.deepcopy(results["rows"]["first"])
        for name, p in model.named_parameters():
            p.requires_grad_(newborn or args.freeze == "none" or name.endswith("table") != (args.freeze == "table"))
        if t == 0:
            torch.manual_seed(args.seed * 1000 + x)
            if learner == "joint":
                past.views = [v for task in tasks[:-1] for v in task.seen]
            elif not newborn:
                past.remember(model, views, tasks[x - 1], scene, args)
                if not (args.resume_optimizer or args.online):
                    optimiser = new_optimiser()
        # 2. a step, with the rate of this task's progress
        decayed = args.resume_optimizer and not newborn
        factor = 1.0 if args.online else anneal(1.0 if decayed else t / lesson.steps, args.schedule)
        for group in optimiser.param_groups:
            group["lr"] = args.lr * factor * (1.0 if decayed or args.online and not newborn else min((t + 1) / args.lr_warmup, 1))
        if model.grid is not None and t % 16 == 0:
            model.grid.update(lambda p: model.fine(p, None)[0], model.march_step, warm=newborn and t < 256)
        present = [v for task in tasks for v in task.seen] if learner == "joint" else tasks[x].seen
        n = args.rays + (args.replay_rays if learner == "joint" and t >= args.steps else 0)         # as many rays in all as with replay
        optimiser.zero_grad()
        loss, acc = step_gradients(model, past, views, present, n, scene, args)
        check_finite(loss, done)
        optimiser.step()
        place["t"] = t = t + 1
        done += 1
        row = results["rows"][learner]
        row["seconds"] += clock.stop() - before
        row["steps"] += 1

        progress(done, loss=loss, acc=acc.mean())
        last = t == lesson.steps
        if t % args.eval_every and not last:
            continue
        # 3. all tasks, seen and held-out views: what is left of the old ones?
        check_not_empty(acc, done, "use a lower --lr, a longer --lr-warmup, or another --seed")
        scores = evaluate(model, views, tasks, scene, args, args.eval_views)
        mean = sum(scores["psnr_heldout"][:x + 1]) / (x + 1)                                        # over the tasks met so far
        ours = {"psnr": mean} if learner == main or learner == "first" and main != "joint" else {}  # the main learner's whole curve
        run.write_line(step=row["steps"], total=done, learner=learner, task=x + 1, train_seconds=row["seconds"], loss=loss.item(), **ours,
                **scores)
        if board:
            board.add_scalar(f"{learner}/psnr", mean, row["steps"])
        if last:
            row["psnr_heldout"].append(scores["psnr_heldout"])
            row["psnr_seen"].append(scores["psnr_seen"])
            row.update(ssim=scores["ssim"], memory_bytes=past.bytes(H, W))
            results["album"][learner] = torch.stack([render_view(model, views, task.held_out[0], scene, args)["rgb"] for task in tasks[:4]])
            if learner == "first":
                results["first"] = copy.deepcopy({"model": model.state_dict(), "optimiser": optimiser.state_dict()})
            place = {"lesson": place["lesson"] + 1, "t": 0}
        run.save({"random": random_state(), "place": place, "seconds": clock.seconds, "results": results, "past": past.state_dict(),
                  "model": model.state_dict(), "optimiser": optimiser.state_dict()})
    return conclude(args, run, scene, tasks, views, model, past, results, clock.seconds)


def album_picture(views, tasks: list[Task], album: dict, zoom: int = 2) -> Tensor:
    """A row for each of the first four tasks, its first held-out view: truth | after the first task | each learner at the end, in
    the order of the printed table."""
    rows = [torch.cat([views.images[task.held_out[0]], *(renders[k].to(views.images) for renders in album.values())], 1)
            for k, task in enumerate(tasks[:4])]
    return torch.cat(rows).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def buffer_picture(memory: Memory, views, tasks: list[Task], zoom: int = 2) -> Tensor:
    """Where the stored rays lie: six pictures of the tasks before the last, faded, the stored pixels red."""
    H, W = views.images.shape[1:3]
    shown = some([v for task in tasks[:-1] for v in task.seen], 6)
    picture = 0.5 + 0.5 * views.images
    picture.view(-1, 3)[memory.id.long()] = picture.new_tensor([0.9, 0.1, 0.1])
    return torch.cat([picture[v] for v in shown], 1).repeat_interleave(zoom, 0).repeat_interleave(zoom, 1)


def bar_frames(rows: dict, height: int = 100, width: int = 24) -> list[Tensor]:
    """A frame after each chunk, a row of bars a policy (in the order of `rows`), a bar a chunk: PSNR on its seen frames, 10 to 40 dB;
    chunks that were still to come are grey."""
    count, frames = len(next(iter(rows.values()))["psnr_seen"]), []
    level = torch.arange(height).flip(0)[:, None]                                                   # (height, 1), 0 at the bottom
    for x in range(count):
        parts = []
        for row in rows.values():
            P = torch.tensor(row["psnr_seen"][x])
            bars = ((P - 10) / 30 * height).repeat_interleave(width)                                # (count width,)
            colour = colour_map(torch.arange(count), 0, count - 1)
            colour[x + 1:] = 0.8
            part = torch.where((level < bars)[..., None], colour.repeat_interleave(width, 0), torch.ones(3))
            part[:, ::width], part[0] = 1.0, 0.6
            parts.append(part)
        frames.append(torch.cat(parts))
    return frames


def draw_matrices(rows: dict, tasks: list[Task]) -> str:
    """SVG: for each learner two matrices, PSNR [dB] on held-out and on seen views; line x: after task x, column j: on task j."""
    n, cell, left, top = len(tasks), 44, 130, 40
    values = [v for row in rows.values() for name in ("psnr_heldout", "psnr_seen") for line in row[name] for v in line]
    lo, hi, body, y = min(values), max(values), [], top
    text = lambda x, y, words, anchor="middle": f'<text x="{x}" y="{y}" text-anchor="{anchor}">{words}</text>'
    for k, words in enumerate(("held-out views", "seen views")):
        body.append(text(left + k * (n * cell + 20) + n * cell / 2, 18, words))
    for name, row in rows.items():
        body.append(text(8, y + 22, name, "start"))
        for k, kind in enumerate(("psnr_heldout", "psnr_seen")):
            for i, line in enumerate(row[kind]):
                for j, v in enumerate(line):
                    x0, y0 = left + k * (n * cell + 20) + j * cell, y + i * 24
                    opacity = 0.05 + 0.6 * (v - lo) / max(hi - lo, 1e-9)
                    body.append(f'<rect x="{x0}" y="{y0}" width="{cell - 2}" height="22" fill="#2f81f7" fill-opacity="{opacity:.2f}"/>')
                    body.append(text(x0 + cell / 2 - 1, y0 + 16, f"{v:.1f}"))
        y += len(row["psnr_seen"]) * 24 + 10
    width = left + 2 * n * cell + 30
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" font-family="sans-serif" '
            f'font-size="12"><rect width="{width}" height="{y}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n")


def conclude(args: Args, run: Run, scene: Scene, tasks: list[Task], views, model: Model, past: Past, results: dict,
             seconds: float) -> dict:
    """Write pictures, film and summary. model, past: the main learner's, at the end."""
    main, rows = args.online or args.learner, results["rows"]
    if args.eval_only:
        scores = evaluate(model, views, tasks, scene, args, args.eval_views)
        for name in ("psnr_heldout", "psnr_seen"):
            rows[main][name][-1] = scores[name]
        rows[main]["ssim"] = scores["ssim"]
    rows = {name: {**row, "psnr": sum(row["psnr_heldout"][-1]) / len(tasks), "forgetting": forgetting(row["psnr_heldout"]),
                   "forgetting_seen": forgetting(row["psnr_seen"]), "backward_transfer": backward_transfer(row["psnr_heldout"]),
                   "backward_transfer_seen": backward_transfer(row["psnr_seen"])} for name, row in rows.items() if name != "first"}
    for i, v in enumerate(v for task in tasks for v in some(task.held_out, 2)):
        out = render_view(model, views, v, scene, args)
        save_png(run.path / f"test_{i:03d}.png", comparison_strip(views.images[v], out["rgb"], out["depth"], scene.near, scene.far))
    save_png(run.path / "forgetting.png", album_picture(views, tasks, results["album"]))
    (run.path / "matrix.svg").write_text(draw_matrices(rows, tasks), encoding="utf-8")
    if past.memory is not None:
        save_png(run.path / "buffer.png", buffer_picture(past.memory, views, tasks))
    if args.online:
        save_video(run.path / "chunks.gif", bar_frames(rows), fps=2)
    if args.video:
        path = camera_path(scene.train.c2w, scene.ndc, 120).to(args.device)                         # (120, 3, 4)
        film = replace(scene.test, c2w=path, K=scene.test.K[0], images=scene.test.images[:1].expand(len(path), -1, -1, -1))
        save_video(run.path / "render.mp4", [render_view(model, film, v, scene, args)["rgb"] for v in range(len(path))])
    row = rows[main]
    summary = dict(method="continual", scene=scene.name, data=scene.kind, size=args.size, seed=args.seed, steps=row["steps"],
                   train_seconds=round(row["seconds"], 2), peak_memory_mb=round(peak_memory_mb(args.device), 1), psnr=row["psnr"],
                   **{name: value for name, value in row.items() if name not in ("psnr", "seconds", "steps")},
                   learner=main, field=args.field, split="stream" if args.online else args.split, rows=rows)
    write_json(run.path / "summary.json", summary)
    print(table(rows))
    print(f"{scene.name}, {main}: PSNR {row['psnr']:.2f} dB, SSIM {row['ssim']:.4f} over the held-out views of {len(tasks)} tasks after "
          f"{row['seconds']:.1f} s of training ({seconds:.1f} s with what it is compared to); pictures in {run.path}")
    return summary


def table(rows: dict) -> str:
    """Markdown: PSNR [dB] on each task at the end, held-out / seen; of more than four tasks their mean."""
    dB = lambda v: "" if v is None else f"{v:.2f}"
    tasks = len(next(iter(rows.values()))["psnr_seen"][-1])
    titles = [f"task {j + 1}: held-out / seen" for j in range(tasks)] if tasks < 5 else ["held-out / seen"]

    def line(name, row, x, *more):
        held_out, seen = (row[kind][x] if tasks < 5 else [sum(row[kind][x]) / tasks] for kind in ("psnr_heldout", "psnr_seen"))
        return "| " + " | ".join([name, *(f"{a:.2f} / {b:.2f}" for a, b in zip(held_out, seen)), *more]) + " |"

    lines = ["", f"| learner | {' | '.join(titles)} | forgetting | of seen | memory kB | s |", "|---|" + "---:|" * (len(titles) + 4)]
    begun = next((row for row in rows.values() if len(row["psnr_seen"]) == 2), None)                # two tasks: what there was to forget
    lines += [line("after task 1", begun, 0, "", "", "", "")] if begun else []
    lines += [line(name, row, -1, dB(row["forgetting"]), dB(row["forgetting_seen"]), f"{row['memory_bytes'] / 1e3:.0f}",
                   f"{row['seconds']:.0f}") for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli(PRESETS, train)
