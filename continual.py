"""Continual learning of a radiance field: NeRF-CL, a code release with slides and READMEs, but no
paper (github.com/sreesai1412/NeRF-CL).

Views come in tasks: first those of one side of an object, then those of the other side. While a
field trains on the second task, it forgets: its renders of the first side get worse. A learner
keeps something of each old task: some rays with their colours (replay), the old model, which gives
colours to new rays (distillation) or to rays of old cameras (generative replay), or how much each
weight mattered (EWC). In a stream, the tasks are short chunks of frames.

f: rendered colours of rays; y: their colours in the images; s: as the old model renders them;
theta*: its weights; l: mean squared error. A step's loss is l(f, y) on rays of the present task and

| learner    | adds                                                      | class                  |
|------------|-----------------------------------------------------------|------------------------|
| naive      | nothing                                                   | Naive                  |
| distill    | l(f, s) on the new rays                                   | Distillation           |
| ewc        | lambda / 2 sum_i h_i (theta_i - theta*_i)^2               | EWC                    |
| replay     | l(f, y) on stored rays                                    | Replay, ReplayBuffer   |
| generative | l(f, s) on rays of old cameras                            | GenerativeReplay       |
| mixed      | these two, with half of the rays each                     | Mixed                  |
| agem       | nothing; its gradient must not raise l of stored rays     | AGEM, agem_project     |
| joint      | nothing; it has the rays of all tasks from the start      | Joint                  |

Held-out views of lego, 64 px, 800 steps a task, seed 0 [dB]:  task 1 / task 2 / forgetting (task 1)
    python continual.py                                         30.5 / 30.6 / 0.0
    python continual.py --learner naive                         24.2 / 31.1 / 4.9
    python continual.py --learner joint                         30.9 / 30.8
    ... --stream --learner naive                                mean of ten chunks 27.0 / 1.8
    ... --stream --learner replay --buffer-fill topk            mean of ten chunks 30.6 / 0.3
"""
from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Literal, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import (OccupancySampler, Scene, SceneArgs, TrainingRun, camera_path, camera_rays,
                    check_flags, cli, comparison_strip, evenly_spaced, join_views, load_scene, psnr,
                    random_background, require, save_png, save_video, say, spherical_harmonics,
                    ssim, to_device, truncated_exp)
from kernels import composite, hash_encode, hash_levels


@dataclass
class Args(SceneArgs):
    size: int = 64
    steps: int = 800
    """Optimiser steps a task (a chunk of a stream: an eighth of them)."""
    eval_views: int = 8
    """An evaluation renders at most so many trained and so many held-out views of each task."""
    train_background: Literal["random", "scene"] = "random"
    """If images have no alpha: random puts another ray's colour behind each ray, so that only an
    opaque field fits all of them; scene uses the scene's background."""

    split: Literal["released", "hard"] = "hard"
    """released: cameras at x > 0, then at x < 0. hard: without those that see both sides."""
    stream: bool = False
    """Chunks of frames in nearest-neighbour order, instead of two tasks."""
    chunk: int = 10
    """Frames a chunk, of which every fifth is held out."""
    learner: Literal["naive", "distill", "ewc", "replay", "generative", "mixed", "joint",
                     "agem"] = "mixed"
    """What is kept of old tasks: see the table at the top of this file."""

    rays: int = 1024
    """New rays a step, and as many old ones for the learners that replay."""
    replay_weight: float = 1.0
    """Weight of the loss of old rays (1: as that of the new ones). agem: its scale cancels."""
    buffer_share: float = 0.12
    """B, the most rays that are stored, over all rays that old tasks have (released: 0.119)."""
    buffer_fill: Literal["random", "uniform", "topk"] = "random"
    """Which rays are stored: any, evenly spaced ones, or those of highest loss."""
    buffer_draw: Literal["random", "topk", "weighted"] = "random"
    """Which of them a step replays: any, those of highest loss, or more where loss is higher."""
    soft_targets: bool = False
    """Store the colours of the model, not those of the images."""
    ewc_weight: float = 1.0
    """lambda of EWC (1: the quadratic approximation of the old loss)."""
    optimiser: Literal["fresh", "continued"] = "fresh"
    """At a new task: start Adam and its learning rate again, or go on (released, streams)."""

    field: Literal["hash", "mlp"] = "hash"
    """hash: most weights belong to a place. mlp: every weight takes part in every place."""
    log2_table: int = 16
    """log2 of the rows of each level's table (6 levels, 16 to 128 cells a side)."""
    mlp: tuple[int, int, int] = (64, 4, 6)
    """Width and number of layers of the MLP, frequencies of its positional encoding."""
    march_steps: int = 128
    """Samples along the diagonal of the scene's box, all cells being occupied."""
    lr: float = 1e-2
    """Learning rate of Adam (--field mlp: 5e-3 is better)."""


# paper: 128 epochs of 172 032 rays / 1024 = 168 steps; 20 480 / 172 032 = 0.119 of the rays stored;
# 200: all views are evaluated. Each task has as many steps (released: the second has more).
PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", split="released", learner="replay", steps=21_504, field="mlp",
                  mlp=(256, 8, 10), lr=5e-4, optimiser="continued", buffer_share=0.119,
                  buffer_fill="topk", buffer_draw="weighted", eval_every=2000, eval_views=200),
}


# ----------------------------------------------------------------- the learners: loss of one step

class Naive:
    """Naive training: l(f, y) on new rays alone. What the other learners change:

    keeps_model  whether there is an old model: the copy of the model that end_task makes
    parts        what is kept, each with a state_dict, for checkpoints; bytes: their size
    stages       in order: task, views that are trained on, steps
    end_task     keeps something of a task with these views, before the first step of the next one
    old_loss     what is added to the loss; batch: what render_and_loss gives for the new rays
    backward     sets the gradients of the sum, and returns the loss"""
    keeps_model = False

    def __init__(self, args: Args, data: RayData, model: Model):
        self.args, self.data, self.parts = args, data, {}
        if self.keeps_model:
            self.old_model = copy.deepcopy(model).requires_grad_(False)
            self.parts["old_model"] = self.old_model

    def stages(self, tasks: list[Task], steps: int) -> list[tuple[int, list[int], int]]:
        return [(k, task.trained, steps) for k, task in enumerate(tasks)]

    def end_task(self, model: Model, views: list[int]) -> None:
        if self.keeps_model:
            self.old_model.load_state_dict(model.state_dict())

    def old_loss(self, model: Model, batch: dict):
        return 0.0

    def backward(self, model: Model, batch: dict) -> Tensor:
        loss = batch["loss"] + self.old_loss(model, batch)
        loss.backward()
        return loss.detach()

    def bytes(self) -> int:
        kept = [value for part in self.parts.values() for value in part.state_dict().values()]
        return sum(value.nbytes for value in kept if isinstance(value, Tensor))


class Joint(Naive):
    """Joint training: the reference, often called the upper bound, as it trains on all images from
    the start. A learner can still score higher, as topk replays hard rays more often than joint
    draws them (mixed, topk, half the replay weight: 0.5 dB higher on trained views of task 1)."""
    def stages(self, tasks, steps):
        views = sum((task.trained for task in tasks), [])
        return [(len(tasks) - 1, views, len(tasks) * steps)]

    def bytes(self):
        return 3 * self.data.num_old_rays


class Distillation(Naive):
    """l(f, s) on the new rays, with weight 1 as released. The old model has seen little of the new
    side, so s is wrong there. The sum of both losses is minimal at f = (y + s) / 2 (y = 0.9, s =
    0.5 -> f = 0.7). Half of the old model's error stays: the new task ends at most 20 log10(2) =
    6 dB above the old model's PSNR on it (the release reports the first task only)."""
    keeps_model = True

    def old_loss(self, model, batch):
        with torch.no_grad():
            s = render(self.old_model, *batch["rays"], batch["bg"])["rgb"]
        return ((batch["rgb"] - s) ** 2).mean()


class EWC(Naive):
    """Elastic weight consolidation: lambda / 2 sum_i h_i (theta_i - theta*_i)^2, with h summed over
    old tasks, and the newest theta*: each as large as the model. With lambda = 1 it is how much the
    old loss rises, if that is a parabola without mixed terms and minimal at theta*. Adam scales the
    sum of both gradients: lambda decides which one prevails, not how long a step is."""
    keeps_model = True

    def __init__(self, args, data, model):
        super().__init__(args, data, model)
        self.h = self.parts["h"] = copy.deepcopy(self.old_model)
        for h_i in self.h.parameters():
            h_i.zero_()

    def end_task(self, model, views):
        def render_batch():
            rays = self.data.rays(self.data.draw(views, 1024))
            return render(model, *rays, self.data.scene.bg)["rgb"]
        diagonal = gauss_newton_diagonal(render_batch, list(model.parameters()), batches=16)
        for h_i, h_of_task in zip(self.h.parameters(), diagonal):
            h_i += h_of_task
        super().end_task(model, views)

    def old_loss(self, model, batch):
        triples = zip(model.parameters(), self.old_model.parameters(), self.h.parameters())
        penalty = 0.5 * sum((h * (p - p_old) ** 2).sum() for p, p_old, h in triples)
        return self.args.ewc_weight * penalty


class Replay(Naive):
    """l(f, y) on stored rays. ReplayBuffer decides which ones are stored and drawn.

    The release's five findings, each with ours: held-out PSNR of task 1 (lego, --split released,
    20 480 rays, seeds 0 to 2), for the hash grid (1000 steps) and the MLP (1500 of 512 rays).
    1. Random, uniform fills forget more than topk. Holds: 0.7 and 0.9 dB (hash: task 2 loses 0.5).
    2. A smaller buffer forgets more. Holds: a tenth of the rays loses another 1.6 and 2.0 dB.
    3. Weighted draws with refreshed losses beat plain ones. Does not hold: -0.4 and -0.1 dB (topk).
    4. Weighted draws gain if pixels in the middle of an image count more. Holds: by 0.1 and 0.2 dB.
       Plain draws remain 0.3 dB better (hash) or 0.1 dB worse (MLP): this file has no such term.
    5. The full buffer is best. Holds: 2.1 and 1.5 dB over random fills (task 2: -0.6 and -0.1)."""
    def __init__(self, args, data, model):
        super().__init__(args, data, model)
        self.buffer = self.parts["buffer"] = ReplayBuffer(args, data)

    def end_task(self, model, views):
        super().end_task(model, views)
        ray_index = self.data.all_rays(views)
        target, loss = self.data.pixels[ray_index], None
        if self.args.soft_targets or self.buffer.loss is not None:
            own = torch.cat([render_image(model, self.data, v)["rgb"].view(-1, 3) for v in views])
            loss = ((own - target) ** 2).mean(-1)
        self.buffer.add(ray_index, own if self.args.soft_targets else target, loss)

    def old_batch(self, n: int) -> tuple[Tensor, Tensor]:
        """n old rays: ray_index (n,) and target (n, 3)."""
        drawn = self.buffer.draw(n)
        return self.buffer.ray_index[drawn], self.buffer.rgb[drawn] / 255

    def old_loss(self, model, batch):
        replayed = self.data.render_and_loss(model, *self.old_batch(self.args.rays))
        self.buffer.refresh(replayed["squared_error"])
        return self.args.replay_weight * replayed["loss"]


class GenerativeReplay(Naive):
    """l(f, s) on random rays of old cameras: the old model renders the images that are gone. The
    next s learns from this one, so errors can add up. At 64 px the old hash model has 15 times the
    bytes of the images: this is for larger images, or for those that must not be kept."""
    keeps_model = True

    def old_loss(self, model, batch):
        ray_index, target = generated_batch(self.old_model, self.data, self.args.rays)
        return self.args.replay_weight * self.data.render_and_loss(model, ray_index, target)["loss"]


def generated_batch(old_model: Model, data: RayData, n: int) -> tuple[Tensor, Tensor]:
    """n rays of old cameras, ray_index (n,), and the old model's colours of them (n, 3)."""
    ray_index = data.draw(data.old_views, n)
    with torch.no_grad():                                          # samples without jitter
        return ray_index, render(old_model, *data.rays(ray_index), data.scene.bg)["rgb"]


class Mixed(Replay):
    """Half of the old rays from a buffer, half from the old model. The default: task 1 stays good
    with both fields (held-out, hard split, hash grid at 2000 steps / MLP at 1500): 31.8 / 26.6 dB;
    replay 29.2 / 26.8, generative 32.0 / 25.9. topk with half the weight adds 0.1 dB (hash grid),
    so the fill is random, which needs no losses. As task 1 is trained for longer, it can end above
    what it had when it was over: compare with joint, which has as many rays in all."""
    keeps_model = True

    def old_batch(self, n):
        ray_index, target = super().old_batch(n // 2)
        more_index, more_target = generated_batch(self.old_model, self.data, n - len(ray_index))
        return torch.cat([ray_index, more_index]), torch.cat([target, more_target])


class AGEM(Replay):
    """Averaged gradient episodic memory: stored rays are not trained on. Their gradient corrects
    that of the new rays where a step would raise their loss."""
    def backward(self, model, batch):
        parameters = list(model.parameters())
        g = torch.autograd.grad(batch["loss"], parameters)
        r = torch.autograd.grad(self.old_loss(model, batch), parameters)
        for p, gradient in zip(parameters, agem_project(g, r)):
            p.grad = gradient
        return batch["loss"].detach()


LEARNERS = {"naive": Naive, "distill": Distillation, "ewc": EWC, "replay": Replay, "mixed": Mixed,
            "generative": GenerativeReplay, "joint": Joint, "agem": AGEM}


def agem_project(g: list[Tensor], r: list[Tensor]) -> list[Tensor]:
    """g where g.r >= 0, else g - (g.r / r.r) r: the nearest gradient along which the loss with the
    gradient r does not rise (to first order, and before Adam scales it).
    Example: g = (1, -3), r = (1, 1): g.r = -2, -> (2, -2)."""
    dot = sum((a * b).sum() for a, b in zip(g, r))
    if dot >= 0:
        return g
    scale = dot / sum((b * b).sum() for b in r)
    return [a - scale * b for a, b in zip(g, r)]


def gauss_newton_diagonal(render_batch, parameters: list[Tensor], batches: int) -> list[Tensor]:
    """h_i = 2 mean_nc (d f_nc / d theta_i)^2, a tensor a parameter: the diagonal of the
    Gauss-Newton matrix of l, whatever the targets are. render_batch() -> f (n, 3), other rays each
    time. One backward pass a batch: for independent random signs z, (sum_nc z_nc d f_nc)^2 is the
    sum of the squares in the mean. EWC's paper has the Fisher information: with noise of variance
    v on a colour it is (d f)^2 / v, and h is 2 v times its mean over n and c."""
    h = [torch.zeros_like(p) for p in parameters]
    for _ in range(batches):
        f = render_batch()
        z = torch.randint(0, 2, f.shape, device=f.device).to(f) * 2 - 1
        for h_i, gradient in zip(h, torch.autograd.grad((z * f).sum(), parameters)):
            h_i += 2 * gradient ** 2 / (f.numel() * batches)
    return h


# ------------------------------------------------------------------------------ the replay buffer

class ReplayBuffer:
    """At most B rays of old tasks: ray_index (B,), rgb (B, 3) as bytes and, where losses decide
    what is kept or drawn, loss (B,).
    add      at the end of a task, with the loss of each of its rays: the model's squared error
             against the image. topk: of old and new rays, those of highest loss stay. random,
             uniform: n_new new rays get B n_new / rays_seen slots (rays_seen counts them, too), old
             rays are subsampled to the others: all rays are stored with the same probability.
    draw     indices of different rays for one step.
    refresh  the losses of drawn rays become their newest errors. Not with --soft-targets: an error
             against stored colours of the model is another quantity than the stored losses.

    Example: B = 4, rays 0 to 9 with losses (1, 9, 2, 8, 3, 7, 4, 6, 5, 0). uniform stores rays
    0, 2, 5, 7; topk stores 1, 3, 5, 7 with losses 9, 8, 7, 6. A topk draw of two takes rays 1 and
    3. Their errors in that step are 2 and 8.5. After refresh the losses are 2, 8.5, 7, 6, and the
    next draw takes 3 and 5. Then ten more rays: uniform keeps 0 and 5 and adds 10 and 15."""
    EXPLORATION = 0.2                   # share of a weighted draw that ignores losses, as released

    def __init__(self, args: Args, data: RayData):
        self.fill_rule, self.draw_rule = args.buffer_fill, args.buffer_draw
        self.size, self.rays_seen = max(round(args.buffer_share * data.num_old_rays), 1), 0
        self.ray_index = data.pixels.new_zeros(0, dtype=torch.int32)
        self.rgb = data.pixels.new_zeros(0, 3, dtype=torch.uint8)
        by_loss = self.fill_rule == "topk" or self.draw_rule != "random"
        self.loss = data.pixels.new_zeros(0) if by_loss else None
        self.refreshes = by_loss and not args.soft_targets

    def add(self, ray_index: Tensor, rgb: Tensor, loss: Tensor) -> None:
        """ray_index (n_new,), rgb (n_new, 3) in [0, 1], loss (n_new,): rays of the last task."""
        n_old, n_new = len(self.ray_index), len(ray_index)
        self.rays_seen += n_new
        keep_old, keep_new = n_old, n_new              # topk: append all, then cut to B below
        if self.fill_rule != "topk":
            slots = min(self.size, self.rays_seen)
            keep_new = round(slots * n_new / self.rays_seen)
            keep_old = slots - keep_new
        kept_old, kept_new = self.subsample(n_old, keep_old), self.subsample(n_new, keep_new)
        self.ray_index = torch.cat([self.ray_index[kept_old], ray_index[kept_new].int()])
        self.rgb = torch.cat([self.rgb[kept_old], (rgb[kept_new] * 255 + 0.5).byte()])
        if self.loss is not None:
            self.loss = torch.cat([self.loss[kept_old], loss[kept_new]])
        if self.fill_rule == "topk" and len(self.ray_index) > self.size:
            self.loss, hardest = self.loss.topk(self.size)
            self.ray_index, self.rgb = self.ray_index[hardest], self.rgb[hardest]

    def subsample(self, count: int, keep: int) -> Tensor:
        """Indices of `keep` of `count` rays: random ones, else evenly spaced ones."""
        if self.fill_rule == "random":
            return torch.randperm(count, device=self.ray_index.device)[:keep]
        return torch.arange(keep, device=self.ray_index.device) * count // max(keep, 1)

    def draw(self, n: int) -> Tensor:
        """Indices (n,) of the rays to replay, no two alike. weighted: n - int(n EXPLORATION) by
        weighted_sample of the losses, the others uniformly from the rest."""
        n = min(n, len(self.ray_index))
        if self.draw_rule == "random":
            self.drawn = torch.randperm(len(self.ray_index), device=self.ray_index.device)[:n]
        elif self.draw_rule == "topk":
            self.drawn = self.loss.topk(n).indices
        else:
            explored = int(n * self.EXPLORATION)
            by_loss = weighted_sample(self.loss, n - explored)
            rest = torch.ones_like(self.loss).index_fill_(0, by_loss, 0)
            self.drawn = torch.cat([by_loss, weighted_sample(rest, explored)])
        return self.drawn

    def refresh(self, squared_error: Tensor) -> None:
        """squared_error: of the rays of the last draw, and of others behind them (Mixed)."""
        if self.refreshes:
            self.loss[self.drawn] = squared_error[:len(self.drawn)]

    def state_dict(self) -> dict:
        return {key: getattr(self, key) for key in ("ray_index", "rgb", "loss", "rays_seen")}

    def load_state_dict(self, state: dict) -> None:
        device = self.ray_index.device
        for key, value in state.items():
            setattr(self, key, value.to(device) if isinstance(value, Tensor) else value)


def weighted_sample(p: Tensor, n: int) -> Tensor:
    """n different indices, drawn one after the other in proportion to p (B,) >= 0 among those that
    are left (any, once no p > 0 is left): the n largest p_i / E_i with E_i ~ Exp(1) (Efraimidis
    and Spirakis 2006). p = (0.8, 0.1, 0.1), n = 2: probabilities 0.98, 0.51, 0.51, not n p_i."""
    return (p / torch.empty_like(p).exponential_()).topk(n).indices


# ---------------------------------------------------------------------------------- tasks and rays

@dataclass
class Task:
    """Views that come together, as indices into RayData.views."""
    trained: list[int]
    held_out: list[int]


def cameras_of_side(c2w: Tensor, sign: int, hard: bool) -> Tensor:
    """Which cameras (V, 3, 4) are on one side, x > 0 for sign = 1, x < 0 for -1: bool (V,). hard:
    only those within 75 degrees of that axis and below 60 degrees of elevation, for a world where
    z points up and the object is at the origin. Why this is harder: cameras near the border or the
    top see much of both sides, so those of the second task remind the field of the first one. With
    them, naive training of the hash grid loses 3.6 dB on held-out views of task 1 (1000 steps a
    task); without them 4.9 dB (800 steps) and 7.3 dB (2000 steps)."""
    x, y, z = c2w[:, :, 3].double().unbind(-1)
    if not hard:
        return sign * x > 0
    azimuth, elevation = torch.atan2(y.abs(), sign * x), torch.atan2(z, torch.hypot(x, y))
    return (azimuth < math.radians(75)) & (elevation < math.radians(60))


def smooth_order(position: Tensor) -> list[int]:
    """Nearest-neighbour order: camera 0, the nearest one that is left, ...: (V, 3) -> V indices."""
    distance, order = torch.cdist(position, position), [0]
    distance[:, 0] = math.inf
    while len(order) < len(position):
        order.append(int(distance[order[-1]].argmin()))
        distance[:, order[-1]] = math.inf
    return order


def make_tasks(scene: Scene, args: Args) -> list[Task]:
    """Indices point into the training views, then the test views. A stream uses the training views
    only, and holds out the 3rd, 8th, ... frame of each chunk."""
    V = len(scene.train.names)
    if args.stream:
        order = smooth_order(scene.train.c2w[:, :, 3])
        chunks = [order[i:i + args.chunk] for i in range(0, V - 2, args.chunk)]    # of 3 or more
        require(len(chunks) > 1 and args.chunk > 2, f"--chunk {args.chunk}: {scene.name} has {V} "
                "views: give at least 3, and so few that there are 2 chunks")
        return [Task([v for i, v in enumerate(c) if i % 5 != 2], c[2::5]) for c in chunks]
    tasks, c2w = [], torch.cat([scene.train.c2w, scene.test.c2w])
    for sign, name in ((1, "x > 0"), (-1, "x < 0")):
        ids = cameras_of_side(c2w, sign, args.split == "hard").nonzero()[:, 0].tolist()
        task = Task([v for v in ids if v < V], [v for v in ids if v >= V])
        require(task.trained and task.held_out, f"--split {args.split}: {scene.name} has no views "
                f"to train on or to test at {name}: use --split released, or another scene")
        tasks.append(task)
    return tasks


class RayData:
    """All views, the test views after those to train on, as one list of rays: ray
    v H W + row W + column is a pixel of view v."""
    def __init__(self, scene: Scene, tasks: list[Task], args: Args):
        self.scene, self.views = scene, join_views(scene.train, scene.test)
        self.H, self.W = self.views.images.shape[1:3]
        self.pixels, self.old_views = self.views.images.view(-1, 3), []
        self.num_old_rays = self.H * self.W * sum(len(task.trained) for task in tasks[:-1])
        self.random_background = args.train_background == "random" and scene.train.alpha is None

    def draw(self, views: list[int], n: int) -> Tensor:
        """n random rays of these views: ray_index (n,)."""
        device, size = self.pixels.device, self.H * self.W
        view = torch.tensor(views, device=device)[torch.randint(len(views), (n,), device=device)]
        return view * size + torch.randint(size, (n,), device=device)

    def all_rays(self, views: list[int]) -> Tensor:
        pixel = torch.arange(self.H * self.W, device=self.pixels.device)
        return torch.cat([v * len(pixel) + pixel for v in views])

    def rays(self, ray_index: Tensor) -> tuple[Tensor, Tensor]:
        """ray_index (n,) -> rays_o, rays_d (n, 3)."""
        ray_index = ray_index.long()
        xy = torch.stack([ray_index % self.W, ray_index // self.W % self.H], -1) + 0.5
        return camera_rays(self.views, ray_index // (self.H * self.W), xy, self.scene.ndc)

    def render_and_loss(self, model: Model, ray_index: Tensor, target: Tensor) -> dict:
        """Render rays ray_index (n,), compare with target (n, 3): what render returns, rays, bg,
        loss = l(f, target), and squared_error (n,), a mean over channels without gradient."""
        rays, bg = self.rays(ray_index), self.scene.bg
        if self.random_background:         # else the field could leave parts transparent
            target, bg = random_background(target, None, bg)
        out = render(model, *rays, bg, jitter=torch.rand(len(ray_index), device=bg.device))
        error = ((out["rgb"] - target) ** 2).mean(-1)
        errors = {"loss": error.mean(), "squared_error": error.detach()}
        return {**out, **errors, "rays": rays, "bg": bg}


# -------------------------------------------------------------- fields, rendering, evaluation

class Field(nn.Module):
    """features(x) -> sigmas (N,), feature (N, K); it and the encoded direction -> MLP -> colour."""
    def density(self, x: Tensor) -> Tensor:
        return self.features(x)[0]

    def forward(self, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3) in the world, directions (N, D) -> sigmas (N,), rgbs (N, 3)."""
        sigmas, feature = self.features(x)
        return sigmas, torch.sigmoid(self.colour(torch.cat([feature, directions], -1)))


class HashField(Field):
    """Most weights are rows of a table, which rays elsewhere do not touch (but for collisions), and
    the MLPs are small. Yet the table alone forgets as much: if the MLPs are frozen in the second
    task, naive training ends at 24.0 dB on the first, else at 23.8 (hard split, 2000 steps)."""
    encode_directions = staticmethod(spherical_harmonics)                      # (R, 3) -> (R, 16)

    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        self.levels = hash_levels(6, 16, 128, args.log2_table)
        self.register_buffer("aabb", aabb)                                     # (2, 3)
        self.table = nn.Parameter(torch.empty(self.levels.offsets[-1], 4).uniform_(-1e-4, 1e-4))
        self.geometry = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 16))
        self.colour = nn.Sequential(nn.Linear(15 + 16, 64), nn.ReLU(), nn.Linear(64, 3))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])                 # (N, 3) in [0, 1]
        out = self.geometry(hash_encode(u, self.table, self.levels))
        return truncated_exp(out[:, 0] - 1), out[:, 1:]


def frequencies(v: Tensor, count: int = 4) -> Tensor:
    """v, sin(2^k v), cos(2^k v) for k < count: (N, 3) -> (N, 3 + 6 count)."""
    angles = (v[:, None] * 2.0 ** torch.arange(count, device=v.device)[:, None]).flatten(1)
    return torch.cat([v, angles.sin(), angles.cos()], -1)


class MLPField(Field):
    """NeRF's MLP: every weight takes part in every place. x enters again at the fifth layer."""
    encode_directions = staticmethod(frequencies)                              # (R, 3) -> (R, 27)

    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        W, depth, self.num_frequencies = args.mlp
        inputs = 3 + 6 * self.num_frequencies
        sizes = [inputs, W, W, W, W + inputs] + [W] * depth
        self.layers = nn.ModuleList([nn.Linear(size, W) for size in sizes[:depth]])
        self.sigma, self.feature = nn.Linear(W, 1), nn.Linear(W, W)
        nn.init.constant_(self.sigma.bias, 0.1)          # thin fog: below 0 a ReLU has no gradient
        self.colour = nn.Sequential(nn.Linear(W + 27, W // 2), nn.ReLU(), nn.Linear(W // 2, 3))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden = frequencies(x, self.num_frequencies)
        for k, layer in enumerate(self.layers):
            if k == 4:
                hidden = torch.cat([x, hidden], -1)
            hidden = F.relu(layer(hidden))
        return F.relu(self.sigma(hidden)[:, 0]), self.feature(hidden)


class Model(nn.Module):
    """A field and its occupancy grid; an old model is a copy of both.

    What the grid forgets: it skips cells that the field has emptied, for all rays. If new views
    empty a cell that only old views see, replayed rays have no sample there, and no gradient brings
    it back. Only chance does: every 16 steps the grid looks at a random quarter of the cells."""
    def __init__(self, args: Args, scene: Scene):
        super().__init__()
        self.field = (HashField if args.field == "hash" else MLPField)(args, scene.aabb)
        self.sampler = OccupancySampler(scene, args.march_steps, samples_per_ray=1.0)


def render(model: Model, rays_o: Tensor, rays_d: Tensor, bg: Tensor,
           jitter: Optional[Tensor] = None) -> dict:
    """Volume rendering (NeRF eq. 3) of rays (R, 3): with delta_i the length of interval i,

        T_i = exp(-sum_{j<i} sigma_j delta_j),    weights_i = T_i (1 - exp(-sigma_i delta_i)),
        rgb = sum_i weights_i rgbs_i + (1 - opacity) bg,    opacity = sum_i weights_i.

    bg (3,) or (R, 3); jitter (R,) in [0, 1) moves the samples in training
    -> rgb (R, 3), opacity (R,), depth = sum_i weights_i t_i (R,)."""
    t_starts, t_ends, offsets, ray = model.sampler.sample(rays_o, rays_d, jitter)      # (N,)
    x = rays_o[ray] + (0.5 * (t_starts + t_ends))[:, None] * rays_d[ray]               # (N, 3)
    sigmas, rgbs = model.field(x, model.field.encode_directions(rays_d)[ray])
    rgb, opacity, depth, _ = composite(sigmas, rgbs, t_starts, t_ends, offsets)
    return {"rgb": rgb + (1 - opacity[:, None]) * bg, "opacity": opacity, "depth": depth}


@torch.no_grad()
def render_image(model: Model, data: RayData, v: int) -> dict:
    """A whole view: rgb (H, W, 3) in [0, 1], depth and opacity (H, W)."""
    chunks = data.all_rays([v]).split(8192)
    parts = [render(model, *data.rays(chunk), data.scene.bg) for chunk in chunks]
    out = {key: torch.cat([part[key] for part in parts]) for key in ("rgb", "depth", "opacity")}
    out["rgb"].clamp_(0, 1)
    return {key: value.unflatten(0, (data.H, data.W)) for key, value in out.items()}


def evaluate(model: Model, data: RayData, tasks: list[Task], at_most: int, pictures=None) -> dict:
    """psnr_heldout, psnr_train: a number a task, met or not [dB], the mean over at most so many
    evenly spaced views. ssim, opacity: means over all of these that are held out. pictures: folder
    for a strip of one held-out view a task (target | render | error | depth)."""
    scores, others = {"psnr_heldout": [], "psnr_train": []}, []
    for j, task in enumerate(tasks):
        for name, ids in (("psnr_heldout", task.held_out), ("psnr_train", task.trained)):
            found = []
            for view in [ids[k] for k in evenly_spaced(len(ids), min(at_most, len(ids)))]:
                out, target = render_image(model, data, view), data.views.images[view]
                found.append(float(psnr(out["rgb"], target)))
                if name == "psnr_heldout":
                    others.append([float(ssim(out["rgb"], target)), float(out["opacity"].mean())])
                    strip = comparison_strip(target, out["rgb"], out["depth"], data.scene.near,
                                             data.scene.far)
            scores[name].append(sum(found) / len(found))
        if pictures:
            save_png(pictures / f"test_{j:03d}.png", strip)
    return {**scores, **dict(zip(("ssim", "opacity"), torch.tensor(others).mean(0).tolist()))}


def forgetting(P: list[list[float]]) -> tuple[Optional[float], Optional[float]]:
    """Forgetting and backward transfer [dB]. P[k][j] is the PSNR on task j after task k. The means
    over all tasks j but the last, T, of max_k>=j P[k][j] - P[T][j] >= 0 (best minus last) and of
    P[T][j] - P[j][j] (last minus just learnt); None for a single row. For two tasks, forgetting =
    max(0, -backward transfer).  Example: [[30, 20], [25, 30]] -> 5, -5."""
    earlier = range(len(P) - 1)
    if not earlier:
        return None, None
    lost = [max(row[j] for row in P[j:]) - P[-1][j] for j in earlier]
    gained = [P[-1][j] - P[j][j] for j in earlier]
    return sum(lost) / len(earlier), sum(gained) / len(earlier)


# -------------------------------------------------------------------------------------- training

def check(args: Args) -> None:
    check_flags(args, positive=("rays", "chunk", "march_steps", "buffer_share", "lr"),
                not_negative=("replay_weight", "ewc_weight"), shares=("buffer_share",))
    require(1 <= args.log2_table <= 24, f"--log2-table {args.log2_table}: wanted 1 to 24")
    require(min(args.mlp) > 0, f"--mlp {args.mlp}: give three numbers greater than 0")


def learning_rate(args: Args, first: bool, progress: float, step: int) -> float:
    """first: in the first task; progress: the share of the task's steps that are done. At the full
    rate the first steps can empty a field, so there is a warm-up of 50 steps.
    fresh      in each task a warm-up, and a cosine from 1 to 1/10
    continued  halved after 1/64, 1/32, 1/16 of the first task; then 1/8: learns and forgets less
    --stream   the full rate, whatever --optimiser says, as a stream has no known end"""
    warm_rate = args.lr * min((step + 1) / 50, 1)
    if args.stream:
        return warm_rate if first else args.lr
    if args.optimiser == "fresh":
        return warm_rate * (0.55 + 0.45 * math.cos(math.pi * progress))
    if first:
        return warm_rate * 0.5 ** sum(progress >= part for part in (1 / 64, 1 / 32, 1 / 16))
    return args.lr / 8


def train(args: Args) -> dict:
    """Train, evaluate, write the run folder; -> what summary.json holds."""
    check(args)
    scene = to_device(load_scene(args.scene, args.data, args.size, args.background,
                                 args.normalise), args.device)
    tasks = make_tasks(scene, args)
    data = RayData(scene, tasks, args)
    torch.manual_seed(args.seed)
    model = Model(args, scene).to(args.device)
    learner = LEARNERS[args.learner](args, data, model)
    eps = 1e-15 if args.field == "hash" else 1e-8
    optimiser = torch.optim.Adam(model.parameters(), eps=eps, fused=True)
    run = TrainingRun("continual", scene, args)
    P = {"psnr_heldout": [], "psnr_train": []}              # a row a stage: see forgetting
    parts = {"field": model, "optimiser": optimiser, "P": P, **learner.parts}
    grid_warm_up = 256             # while its step is less, the sampler evaluates the whole grid
    task_steps = max(args.steps // 8, 1) if args.stream else args.steps

    for stage, (k, views, steps) in enumerate(learner.stages(tasks, task_steps)):
        first = stage == 0                                 # then there is no past
        current = Naive(args, data, model) if first else learner
        data.old_views = sum((task.trained for task in tasks[:k]), [])

        def score(_, pictures):
            scores = evaluate(model, data, tasks, args.eval_views, pictures)
            for kind, rows in P.items():
                rows[stage:] = [scores[kind]]
            if pictures:                                   # the end of a task
                both = zip(scores["psnr_heldout"], scores["psnr_train"])
                pairs = ", ".join(f"{a:.2f} / {b:.2f}" for a, b in both)
                say(f"after task {k + 1}, held-out / trained views of each task [dB]: {pairs}")
            mean = sum(scores["psnr_heldout"][:k + 1]) / (k + 1)       # of the tasks met so far
            return {"task": k + 1, "psnr": mean, **scores, "memory_bytes": learner.bytes(),
                    "forgetting": forgetting(P["psnr_heldout"])[0]}

        for step in run.loop(parts, score, steps=steps, stage=f"task {k + 1}"):
            # 1. as a task begins: random numbers of its own, what is kept of the last one, Adam
            if step == 0:
                torch.manual_seed(args.seed * 1000 + k)
                if not first:
                    learner.end_task(model, tasks[k - 1].trained)
                    if args.optimiser == "fresh" and not args.stream:
                        optimiser.state.clear()
            # 2. learning rate, occupancy grid (its warm-up belongs to the first task only)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(args, first, step / steps, step)
            model.sampler.prepare(model.field, step if first else step + grid_warm_up)
            # 3. new rays and their loss; joint has as many rays as first task and replay together
            n = args.rays
            if args.learner == "joint" and step >= task_steps:
                n = 2 * args.rays
            ray_index = data.draw(views, n)
            batch = data.render_and_loss(model, ray_index, data.pixels[ray_index])
            # 4. what the learner adds, the gradient, and a step
            optimiser.zero_grad()
            loss = current.backward(model, batch)
            optimiser.step()
            run.log(loss=loss, opacity=batch["opacity"].mean())
            run.count(rays=n)

    summary = run.finish(backward_transfer=forgetting(P["psnr_heldout"])[1], P=P,
                         forgetting_train=forgetting(P["psnr_train"])[0], learner=args.learner,
                         split="stream" if args.stream else args.split)
    if args.video:
        path = camera_path(scene.train.c2w, scene.ndc, 120).to(args.device)
        data.views = replace(data.views, c2w=path, K=data.views.K[:1].expand(120, 3, 3))
        frames = [render_image(model, data, v)["rgb"] for v in range(120)]
        save_video(run.path / "render.mp4", frames)
    return summary


if __name__ == "__main__":
    cli(PRESETS, train)
