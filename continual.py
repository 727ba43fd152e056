"""Continual learning of a radiance field: NeRF-CL, a code release with slides, but without a paper
(github.com/sreesai1412/NeRF-CL).

Views come in tasks: first those of one side of an object, then those of the other side. While a
field trains on task 2, it forgets task 1: its renders of the first side get worse. A learner keeps
something of each old task against that. NeRF-CL has two main ways. replay: store some rays with
their colours, and train on them again (as released, --preset paper: the 12 % of highest loss, and
those of high loss more often). distill: keep a frozen copy of the model from the end of the
previous task, the old model; on new rays the field is held to its colours. The release does not
have ewc, generative and mixed.

    loss of a step = l(f, y) on rays of the present task + old loss, the term against forgetting
l: mean squared error; f: colours of rays as rendered by the model; y: in the images; s: as rendered
by the old model; theta, theta*: weights of model, of old model; h: importance of each weight; w:
--replay-weight; lambda: --ewc-weight. PSNR [dB] of held-out views after task 2:

| learner    | old loss                                      | class            | task 1 | task 2 |
|------------|-----------------------------------------------|------------------|-------:|-------:|
| naive      | none                                          | Naive            |   23.9 |   32.2 |
| distill    | l(f, s) on the new rays                       | Distillation     |   26.3 |   25.1 |
| ewc        | lambda / 2 sum_i h_i (theta_i - theta*_i)^2   | EWC              |   26.5 |   31.4 |
| agem       | none; the gradient of l(f, y) is projected    | AGEM             |   28.4 |   32.2 |
| replay     | w l(f, y) on stored rays                      | Replay           |   29.2 |   31.8 |
| generative | w l(f, s) on rays of old cameras              | GenerativeReplay |   31.9 |   31.7 |
| mixed      | w l on half stored rays, half generated ones  | Mixed            |   31.9 |   31.8 |
| joint      | none; the rays of all tasks from the start    | Joint            |   31.9 |   31.6 |
Hard split, 64 px, --steps 2000 per task, seeds 0 to 2 (agem: 1). After task 1: 31.1, unseen 19.8.
    python continual.py (mixed, 800 steps): 30.5, 30.6 dB (task 1 was 29.1): backward transfer +1.4
    --learner naive, to see forgetting:     24.2, 31.1 dB (task 1 was 29.1): backward transfer -4.9
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
    """Optimiser steps per task (in a stream, an eighth of it per chunk)."""
    eval_views: int = 8
    """An evaluation renders at most so many trained and so many held-out views of each task."""

    split: Literal["released", "hard"] = "hard"
    """released: cameras at x > 0, then at x < 0. hard: without those between and on top."""
    stream: bool = False
    """Chunks of frames in nearest-neighbour order, instead of two tasks."""
    chunk: int = 10                 # frames per chunk, of which every fifth is held out
    learner: Literal["naive", "distill", "ewc", "replay", "generative", "mixed", "joint",
                     "agem"] = "mixed"
    """What is kept of old tasks: see the table at the top of the file."""
    rays: int = 1024
    """New rays per step. Learners that replay add as many old ones (if so many are stored)."""
    replay_weight: float = 1.0
    """w, weight of the loss of old rays (1: as that of the new ones; agem: any w > 0 is alike)."""
    buffer_share: float = 0.12
    """At most this share of the rays of all tasks but the final one is stored."""
    buffer_fill: Literal["random", "uniform", "topk"] = "random"
    """Which rays are stored: any, evenly spaced ones, or those of highest loss."""
    buffer_draw: Literal["random", "topk", "weighted"] = "random"
    """Which of them a step replays: any, those of highest loss, or more where loss is higher."""
    soft_targets: bool = False      # store the colours of the model, not those of the images
    ewc_weight: float = 1.0
    """lambda of EWC (1: the penalty approximates the rise of the old loss)."""
    optimiser: Literal["fresh", "continued"] = "fresh"
    """At a new task: reset Adam and its learning rate, or keep both (released). Not in a stream."""

    field: Literal["hash", "mlp"] = "hash"
    """hash: most weights belong to few places. mlp: each takes part in all places."""
    log2_table: int = 16
    """log2 of the most rows of a level's table (6 levels, 16 to 128 cells per side)."""
    mlp: tuple[int, int, int] = (64, 4, 6)
    """Width and number of layers of the MLP, frequencies of the positional encoding."""
    march_steps: int = 128
    """Samples along the diagonal of the scene's box, all cells being occupied."""
    lr: float = 1e-2                # learning rate of Adam (the small MLP: 5e-3 is better)


# There is no paper: `paper` is the released setting: 128 epochs of 172 032 rays, 1024 per step, are
# 21 504 steps (we give task 2 as many), and 20 480 stored rays are 0.119 of them.
PRESETS = {
    "quick": Args(),
    "paper": Args(preset="paper", split="released", learner="replay", steps=21_504, field="mlp",
                  mlp=(256, 8, 10), lr=5e-4, optimiser="continued", buffer_share=0.119,
                  buffer_fill="topk", buffer_draw="weighted", eval_every=2000, eval_views=200),
}


# ----------------------------------------------------------------- the learners: loss of one step

class Naive:
    """l(f, y) on new rays alone, the base of all learners. What others override:

    stages       the order of training: a list of (newest task, views to train on, steps)
    consolidate  called before the first step of a later task: keeps something of the previous one
    num_rays     the number of new rays of a step
    backward     called at each step: sets the gradients, returns the loss to log (first task: as
                 Naive, for all learners)
    old_loss     called by backward: the old loss of the table (agem takes that of replay)
    `parts` is what a learner keeps: it is stored in checkpoints."""
    keeps_model = False                    # True: consolidate copies the model to old_model

    def __init__(self, args: Args, data: RayData, model: Model):
        self.args, self.data, self.parts = args, data, {}
        if self.keeps_model:
            self.old_model = copy.deepcopy(model).requires_grad_(False)
            self.parts["old_model"] = self.old_model

    def stages(self, tasks: list[Task], steps: int) -> list[tuple[int, list[int], int]]:
        return [(k, task.trained, steps) for k, task in enumerate(tasks)]

    def consolidate(self, model: Model, views: list[int]) -> None:
        if self.keeps_model:
            self.old_model.load_state_dict(model.state_dict())

    def num_rays(self, step: int, task_steps: int) -> int:
        return self.args.rays

    def old_loss(self, model: Model, batch: dict):
        return 0.0

    def backward(self, model: Model, batch: dict) -> Tensor:
        loss = batch["loss"] + self.old_loss(model, batch)
        loss.backward()
        return loss.detach()


class Joint(Naive):
    """One training on the images of all tasks: the reference, often called the upper bound. But a
    learner that gives more of its rays to a task can score higher on it: naive on task 2."""
    def stages(self, tasks, steps):
        views = sum((task.trained for task in tasks), [])
        return [(len(tasks) - 1, views, len(tasks) * steps)]

    def num_rays(self, step, task_steps):                  # as many as the first task and replay
        return self.args.rays if step < task_steps else 2 * self.args.rays


class Distillation(Naive):
    """l(f, s) on the new rays (learning without forgetting), with weight 1 as released. The old
    model has seen little of the new side, so s is wrong there. If each colour were free, the sum of
    both losses would be least at f = (y + s) / 2 (y = 0.9, s = 0.5 -> f = 0.7): half the error of s
    stays, a quarter of its square, so task 2 is 10 log10(4) = 6 dB above the old model. This gives
    19.8 + 6.0 = 25.8 dB; the table has 25.1, naive 32.2. The release reports task 1 only."""
    keeps_model = True

    def old_loss(self, model, batch):
        with torch.no_grad():
            s = render(self.old_model, *batch["rays"], batch["bg"])["rgb"]
        return ((batch["rgb"] - s) ** 2).mean()


class EWC(Naive):
    """Elastic weight consolidation: weights that matter for old colours should move little. L, the
    loss on old rays, is about L(theta*) + g.d + d.H d / 2 near theta*, where d = theta - theta*.
    Training on them is over, so the gradient g is taken to be 0; the Hessian H is replaced by the
    diagonal h of its Gauss-Newton matrix. What is left is the penalty for lambda = 1. There is one
    h, the sum over old tasks, and one theta*, the newest."""
    keeps_model = True

    def __init__(self, args, data, model):
        super().__init__(args, data, model)
        # a Model whose weights are h, so that a checkpoint stores it like a model
        self.importance = self.parts["importance"] = copy.deepcopy(self.old_model)
        for h in self.importance.parameters():
            h.zero_()

    def consolidate(self, model, views):
        def render_batch():
            rays = self.data.rays(self.data.draw(views, 1024))
            return render(model, *rays, self.data.scene.bg)["rgb"]
        diagonal = gauss_newton_diagonal(render_batch, list(model.parameters()), batches=16)
        for h, h_of_task in zip(self.importance.parameters(), diagonal):
            h += h_of_task
        super().consolidate(model, views)

    def old_loss(self, model, batch):
        models = self.importance, model, self.old_model
        triples = zip(*[each.parameters() for each in models])
        penalty = 0.5 * sum((h * (theta - old) ** 2).sum() for h, theta, old in triples)
        return self.args.ewc_weight * penalty


def gauss_newton_diagonal(render_batch, parameters: list[Tensor], batches: int) -> list[Tensor]:
    """h_i = 2 mean_nc (d f_nc / d theta_i)^2, the diagonal of the Gauss-Newton matrix of l.
    render_batch() -> f (n, 3), colours of other rays each time -> h: a tensor for each parameter.

    A backward pass for each of the 3n numbers f_nc would be slow. Instead, each gets a random
    sign z_nc = +1 or -1, and one pass gives sum_nc z_nc d f_nc. In its square the products of
    different ones have random signs and cancel on average; sum_nc (d f_nc)^2 is left. Two
    of them with d f = 3 and 4: squares (3 + 4)^2 = 49 and (3 - 4)^2 = 1, mean 25 = 9 + 16.
    EWC's paper takes the Fisher information: h / (2 v), if colours have noise of variance v."""
    importance = [torch.zeros_like(theta) for theta in parameters]
    for _ in range(batches):
        f = render_batch()
        z = torch.randint(0, 2, f.shape, device=f.device).to(f) * 2 - 1
        for h, gradient in zip(importance, torch.autograd.grad((z * f).sum(), parameters)):
            h += 2 * gradient ** 2 / (f.numel() * batches)
    return importance


class Replay(Naive):
    """w l(f, y) on stored rays, as many as new ones; ReplayBuffer stores and draws them."""
    def __init__(self, args, data, model):
        super().__init__(args, data, model)
        self.buffer = self.parts["buffer"] = ReplayBuffer(args, data)

    def consolidate(self, model, views):
        super().consolidate(model, views)
        ray_index = self.data.all_rays(views)
        target, loss = self.data.pixels[ray_index], None
        if self.args.soft_targets or self.buffer.loss is not None:
            images = [render_image(model, self.data, view)["rgb"] for view in views]
            rendered = torch.cat(images).view(-1, 3)
            loss = ((rendered - target) ** 2).mean(-1)
            if self.args.soft_targets:
                target = rendered
        self.buffer.add(ray_index, target, loss)

    def old_batch(self, n: int) -> tuple[Tensor, Tensor]:
        """n old rays: ray_index (n,) and target (n, 3)."""
        drawn = self.buffer.draw(n)
        return self.buffer.ray_index[drawn], self.buffer.rgb[drawn] / 255

    def old_loss(self, model, batch):
        replayed = self.data.render_and_loss(model, *self.old_batch(self.args.rays))
        self.buffer.refresh(replayed["squared_error"])
        return self.args.replay_weight * replayed["loss"]


class GenerativeReplay(Naive):
    """w l(f, s) on random rays of old cameras: the old model renders the images that are gone. The
    next old model learns from this one, so errors can add up. At 64 px the old hash model has 15
    times the bytes of task 1's images: it is for larger images, or those that must not be kept."""
    keeps_model = True

    def old_loss(self, model, batch):
        ray_index, target = generated_batch(self.old_model, self.data, self.args.rays)
        return self.args.replay_weight * self.data.render_and_loss(model, ray_index, target)["loss"]


def generated_batch(old_model: Model, data: RayData, n: int) -> tuple[Tensor, Tensor]:
    """n rays of old cameras: ray_index (n,) and s (n, 3), on the images' background, no jitter."""
    ray_index = data.draw(data.old_views, n)
    with torch.no_grad():
        return ray_index, render(old_model, *data.rays(ray_index), data.scene.bg)["rgb"]


class Mixed(Replay):
    """Half of the old rays from a buffer, half from the old model. The default, as it is within 0.2
    dB of the better one on task 1: with the hash grid that is generative (31.9 dB; replay 29.2,
    mixed 31.9), with the MLP replay (26.8; generative 25.9, mixed 26.6; an earlier version). A topk
    fill with w = 0.5 is as good (32.0), so the fill is random, which needs no losses."""
    keeps_model = True

    def old_batch(self, n):
        ray_index, target = super().old_batch(n // 2)
        more_index, more_target = generated_batch(self.old_model, self.data, n - len(ray_index))
        return torch.cat([ray_index, more_index]), torch.cat([target, more_target])


class AGEM(Replay):
    """Averaged gradient episodic memory: stored rays are not trained on, but their gradient
    corrects that of the new rays. In the stream: 28.4 dB; naive 27.0, replay 29.7 (seed 0)."""
    def backward(self, model, batch):
        parameters = list(model.parameters())
        g = torch.autograd.grad(batch["loss"], parameters)
        g_old = torch.autograd.grad(self.old_loss(model, batch), parameters)
        for theta, gradient in zip(parameters, agem_project(g, g_old)):
            theta.grad = gradient
        return batch["loss"].detach()


def agem_project(g: list[Tensor], g_old: list[Tensor]) -> list[Tensor]:
    """g: gradient of the loss of new rays; g_old: of stored rays. If g.g_old >= 0, a step along -g
    does not raise the loss of stored rays (to first order, before Adam scales it), and g stays.
    Else -> g - (g.g_old / g_old.g_old) g_old, the nearest gradient that does not raise it.
    Example: g = (1, -3), g_old = (1, 1): g.g_old = -2 -> (2, -2)."""
    dot = sum((a * b).sum() for a, b in zip(g, g_old))
    if dot >= 0:
        return g
    factor = dot / sum((b * b).sum() for b in g_old)
    return [a - factor * b for a, b in zip(g, g_old)]


LEARNERS = {"naive": Naive, "distill": Distillation, "ewc": EWC, "replay": Replay, "mixed": Mixed,
            "generative": GenerativeReplay, "joint": Joint, "agem": AGEM}


# ------------------------------------------------------------------------------ the replay buffer

class ReplayBuffer:
    """At most B rays of old tasks: ray_index (B,), rgb (B, 3) as bytes and, where losses decide
    what is kept or drawn, loss (B,): 7 or 11 bytes per ray, where a pixel of an image has 3.

    add      When a task is over, all of its rays come, with the model's squared errors if needed.
             topk: of old and new rays, those of highest loss stay. random: all rays so far have the
             same chance to be stored, so n_new new ones get B n_new / rays_seen places, and as many
             old ones go. uniform: the same numbers, evenly spaced.
    draw     Indices of the rays that one step replays, no two alike.
    refresh  The losses of drawn rays become their newest errors. Not with --soft-targets: errors
             against the model's own colours are not comparable to the stored losses.

    Examples with B = 4, rays 0 to 9 with losses 1, 9, 2, 8, 3, 7, 4, 6, 5, 0.
    --buffer-fill uniform stores rays 0, 2, 5, 7; of ten more rays, two get a place: 0, 5, 10, 15.
    --buffer-fill topk stores rays 1, 3, 5, 7 with losses 9, 8, 7, 6. With --buffer-draw topk, a
    draw of two takes rays 1, 3. If their errors in that step are 2, 8.5, the losses become 2, 8.5,
    7, 6, and the next draw of two takes rays 3, 5."""
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
        """ray_index (n_new,), rgb (n_new, 3) in [0, 1], loss (n_new,): of the previous task."""
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
        """Indices (n,). weighted: n - int(n EXPLORATION) of them by weighted_sample of the losses,
        the others uniformly from the rest."""
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
        """squared_error: of the drawn rays, then of others (Mixed)."""
        if self.refreshes:
            self.loss[self.drawn] = squared_error[:len(self.drawn)]

    def state_dict(self) -> dict:
        return {key: getattr(self, key) for key in ("ray_index", "rgb", "loss", "rays_seen")}

    def load_state_dict(self, state: dict) -> None:
        for key, value in state.items():
            setattr(self, key, to_device(value, self.ray_index.device))


def weighted_sample(p: Tensor, n: int) -> Tensor:
    """n different indices, drawn one after the other in proportion to p (B,) >= 0 among those that
    are left (any, once no p > 0 is left): the n largest p_i / E_i with E_i ~ Exp(1) (Efraimidis
    and Spirakis 2006). p = (0.8, 0.1, 0.1), n = 2: probabilities 0.98, 0.51, 0.51, not n p_i."""
    return (p / torch.empty_like(p).exponential_()).topk(n).indices


# The five findings of the release, and ours: PSNR of task 1 (held-out views) with A minus that with
# B [dB]. --learner replay --split released, lego, seeds 0 to 2 (spreads: 0.1 to 0.4 dB); hash grid
# with 1000 steps per task; MLP with 1500 steps of 512 rays, it and 4 in an earlier version. fill:
# --buffer-fill; weighted: --buffer-draw weighted; where nothing is said, both are random.
#
# | finding                               | A                     | B              | hash |  MLP |
# | 1. topk forgets less: holds           | fill topk             | fill random    | +0.8 | +0.9 |
# | 2. less memory forgets more: holds    | 2048 rays             | 20 480 rays    | -1.7 | -2.0 |
# | 3. weighted draws are better: not so  | fill topk, weighted   | fill topk      | -0.4 | -0.1 |
# | 4. prefer mid-image pixels: in part   | 3.A, with that        | 3.A            | +0.1 | +0.2 |
# | 5. storing all rays is best: holds    | all rays, weighted    | 20 480 rays    | +2.1 | +1.5 |
#
# 1 costs the hash grid 0.6 dB of task 2, and 5 costs it 0.7. Draws that prefer mid-image pixels are
# no longer in this file: on the hash grid 4.A is 0.3 dB worse than 3.B, on the MLP 0.1 dB better.


# ---------------------------------------------------------------------------------- tasks and rays

@dataclass
class Task:
    """Views that come together, as indices into RayData.views."""
    trained: list[int]
    held_out: list[int]


def cameras_of_side(c2w: Tensor, sign: int, hard: bool) -> Tensor:
    """Which cameras (V, 3, 4) are on one side, x > 0 for sign = 1, x < 0 for -1: bool (V,).
    hard: only those of azimuth within 75 degrees of that axis and of elevation below 60 degrees (z
    is up, the object at the origin; both numbers are ours). Cameras near the border or the top see
    much of both sides: in task 2 they remind the field of task 1, which naive forgets less then."""
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
    """The two sides, or the chunks of a stream, which uses training views only and holds out the
    3rd, 8th, ... frame of each chunk. Test views are numbered after the training views."""
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
    """All views, the test views behind the training views, as one list of rays: ray_index
    v H W + row W + column is a pixel of view v. old_views: of the tasks that are over."""
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
        """What render returns for rays ray_index (n,), and rays, bg; loss = l(f, target) with the
        colours target (n, 3); squared_error (n,), a mean over channels without gradient."""
        rays, bg = self.rays(ray_index), self.scene.bg
        if self.random_background:         # images without alpha: the field might stay transparent
            target, bg = random_background(target, None, bg)
        out = render(model, *rays, bg, jitter=torch.rand(len(ray_index), device=bg.device))
        error = ((out["rgb"] - target) ** 2).mean(-1)
        return {**out, "rays": rays, "bg": bg, "loss": error.mean(),
                "squared_error": error.detach()}


# -------------------------------------------------------------- fields, rendering, evaluation

class HashField(nn.Module):
    """Most weights are rows of a table, which rays elsewhere touch only by collisions. Yet a table
    forgets: with the small MLPs frozen in task 2, naive training ended with 24.0 dB on task 1, with
    the table frozen with 23.5, else with 23.8 dB (an earlier version; which rows: not measured)."""
    encode_directions = staticmethod(spherical_harmonics)                      # (R, 3) -> (R, 16)

    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        self.levels = hash_levels(6, 16, 128, args.log2_table)
        self.register_buffer("aabb", aabb)                                     # (2, 3)
        self.table = nn.Parameter(torch.empty(self.levels.offsets[-1], 4).uniform_(-1e-4, 1e-4))
        self.geometry = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 16))
        self.colour = nn.Sequential(nn.Linear(15 + 16, 64), nn.ReLU(), nn.Linear(64, 3))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (N, 3) in the world -> sigmas (N,), feature (N, 15)."""
        u = (x - self.aabb[0]) / (self.aabb[1] - self.aabb[0])                 # (N, 3) in [0, 1]
        out = self.geometry(hash_encode(u, self.table, self.levels))
        return truncated_exp(out[:, 0] - 1), out[:, 1:]                        # exp(-1): thin fog


def frequencies(x: Tensor, count: int = 4) -> Tensor:
    """x, sin(2^k x), cos(2^k x) for k < count: (N, 3) -> (N, 3 + 6 count)."""
    angles = (x[:, None] * 2.0 ** torch.arange(count, device=x.device)[:, None]).flatten(1)
    return torch.cat([x, angles.sin(), angles.cos()], -1)


class MLPField(nn.Module):
    """NeRF's MLP: every weight takes part in every place. x enters again at the fifth layer."""
    encode_directions = staticmethod(frequencies)                              # (R, 3) -> (R, 27)

    def __init__(self, args: Args, aabb: Tensor):
        super().__init__()
        width, layers, self.num_frequencies = args.mlp
        inputs = 3 + 6 * self.num_frequencies
        sizes = [inputs, width, width, width, width + inputs] + [width] * layers
        self.layers = nn.ModuleList([nn.Linear(size, width) for size in sizes[:layers]])
        self.sigma, self.feature = nn.Linear(width, 1), nn.Linear(width, width)
        nn.init.constant_(self.sigma.bias, 0.1)          # thin fog: below 0 a ReLU has no gradient
        half = width // 2
        self.colour = nn.Sequential(nn.Linear(width + 27, half), nn.ReLU(), nn.Linear(half, 3))

    def features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = hidden = frequencies(x, self.num_frequencies)
        for number, layer in enumerate(self.layers):
            if number == 4:
                hidden = torch.cat([x, hidden], -1)
            hidden = F.relu(layer(hidden))
        return F.relu(self.sigma(hidden)[:, 0]), self.feature(hidden)


class Model(nn.Module):
    """A field and its occupancy grid; an old model is a copy of both.
    The grid forgets, too. Training on new rays changes weights that other places share, so it can
    empty a cell that no new ray crosses. The grid then skips the cell, replayed rays get no sample
    there, hence no gradient: replay cannot repair it. It comes back only if the field's density
    rises there through shared weights, and one of the grid's visits (every 16 steps, a random
    quarter) finds it."""
    def __init__(self, args: Args, scene: Scene):
        super().__init__()
        self.field = (HashField if args.field == "hash" else MLPField)(args, scene.aabb)
        self.sampler = OccupancySampler(scene, args.march_steps, samples_per_ray=1.0)

    def density(self, x: Tensor) -> Tensor:              # for the grid
        return self.field.features(x)[0]


def render(model: Model, rays_o: Tensor, rays_d: Tensor, bg: Tensor,
           jitter: Optional[Tensor] = None) -> dict:
    """Volume rendering (NeRF eq. 3) of rays (R, 3): with delta_i the length of interval i,
        T_i = exp(-sum_{j<i} sigma_j delta_j),    weights_i = T_i (1 - exp(-sigma_i delta_i)),
        rgb = sum_i weights_i rgbs_i + (1 - opacity) bg,    opacity = sum_i weights_i.
    bg (3,) or (R, 3); jitter (R,) in [0, 1) moves the samples (training only)."""
    t_starts, t_ends, offsets, ray = model.sampler.sample(rays_o, rays_d, jitter)      # (N,)
    x = rays_o[ray] + (0.5 * (t_starts + t_ends))[:, None] * rays_d[ray]               # (N, 3)
    sigmas, feature = model.field.features(x)                                   # (N,), (N, K)
    directions = model.field.encode_directions(rays_d)[ray]
    rgbs = torch.sigmoid(model.field.colour(torch.cat([feature, directions], -1)))     # (N, 3)
    rgb, opacity, depth, _ = composite(sigmas, rgbs, t_starts, t_ends, offsets)
    return {"rgb": rgb + (1 - opacity[:, None]) * bg, "opacity": opacity, "depth": depth}


@torch.no_grad()
def render_image(model: Model, data: RayData, view: int) -> dict:
    """rgb (H, W, 3) in [0, 1], depth and opacity (H, W)."""
    chunks = [render(model, *data.rays(ray_index), data.scene.bg)
              for ray_index in data.all_rays([view]).split(8192)]
    out = {key: torch.cat([chunk[key] for chunk in chunks]) for key in chunks[0]}
    out["rgb"].clamp_(0, 1)
    return {key: value.unflatten(0, (data.H, data.W)) for key, value in out.items()}


def evaluate(model: Model, data: RayData, tasks: list[Task], at_most: int, folder=None) -> dict:
    """psnr_heldout, psnr_train: means of at most so many views of each task, met or not [dB]. ssim,
    opacity: of all these held-out ones. folder: for pictures, target | render | error | depth."""
    scores, others = {"psnr_heldout": [], "psnr_train": []}, []
    for j, task in enumerate(tasks):
        for name, views in (("psnr_train", task.trained), ("psnr_heldout", task.held_out)):
            psnrs = []
            for i in evenly_spaced(len(views), min(at_most, len(views))):
                out, target = render_image(model, data, views[i]), data.views.images[views[i]]
                psnrs.append(float(psnr(out["rgb"], target)))
                if name == "psnr_heldout":
                    others.append([float(ssim(out["rgb"], target)), float(out["opacity"].mean())])
            scores[name].append(sum(psnrs) / len(psnrs))
        if folder:
            near, far = data.scene.near, data.scene.far    # of the last held-out view
            strip = comparison_strip(target, out["rgb"], out["depth"], near, far)
            save_png(folder / f"test_{j:03d}.png", strip)
    return {**scores, **dict(zip(("ssim", "opacity"), torch.tensor(others).mean(0).tolist()))}


def forgetting(P: list[list[float]]) -> tuple[Optional[float], Optional[float]]:
    """Forgetting, max_{k >= j} P[k][j] - P[-1][j] >= 0 (best minus last), and backward transfer,
    P[-1][j] - P[j][j] (last minus just learnt): means over all tasks j but the last, where P[k][j]
    is the PSNR on task j after task k [dB]. None for a single row. For two tasks, forgetting =
    max(0, -backward transfer): it does not show a gain.  Example: [[30, 20], [25, 30]] -> 5, -5."""
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
    fresh      in each task a warm-up, and a cosine from lr to lr / 10
    continued  (released) halved after 1/64, 1/32, 1/16 of the first task; later tasks have lr / 8
    --stream   lr after the warm-up, whatever --optimiser says, as a stream has no known end"""
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
    eps = 1e-15 if args.field == "hash" else 1e-8    # rows of a table have tiny gradients (NGP)
    optimiser = torch.optim.Adam(model.parameters(), eps=eps, fused=True)
    run = TrainingRun("continual", scene, args)
    P = {"psnr_heldout": [], "psnr_train": []}       # P[kind][k][j]: see forgetting
    parts = {"field": model, "optimiser": optimiser, "P": P, **learner.parts}
    task_steps = max(args.steps // 8, 1) if args.stream else args.steps

    for stage, (k, views, steps) in enumerate(learner.stages(tasks, task_steps)):
        first = stage == 0                           # then there is nothing old
        current = Naive(args, data, model) if first else learner
        data.old_views = sum((task.trained for task in tasks[:k]), [])

        def score(_, folder):        # every --eval-every steps; with folder at the end of task k
            scores = evaluate(model, data, tasks, args.eval_views, folder)
            for kind, rows in P.items():
                rows[stage:] = [scores[kind]]
                if folder:
                    row = "  ".join(f"{decibels:.2f}" for decibels in scores[kind])
                    say(f"after task {k + 1}: {kind} of each task [dB]  {row}")
            mean = sum(scores["psnr_heldout"][:k + 1]) / (k + 1)       # of the tasks so far
            return {"task": k + 1, "psnr": mean, **scores,
                    "forgetting": forgetting(P["psnr_heldout"])[0]}

        for step in run.loop(parts, score, steps=steps, stage=f"task {k + 1}"):
            # 1. A new task: keep something of the previous one (not again in a resumed run)
            if step == 0:
                torch.manual_seed(args.seed * 1000 + k)      # task 1 is alike for all but joint
                if not first:
                    learner.consolidate(model, tasks[k - 1].trained)
                    if args.optimiser == "fresh" and not args.stream:
                        optimiser.state.clear()
            # 2. Learning rate; occupancy grid (evaluated whole until step 256 of the first task)
            optimiser.param_groups[0]["lr"] = learning_rate(args, first, step / steps, step)
            model.sampler.prepare(model, step if first else step + 256)
            # 3. New rays and their loss
            n = learner.num_rays(step, task_steps)
            ray_index = data.draw(views, n)
            batch = data.render_and_loss(model, ray_index, data.pixels[ray_index])
            # 4. The old loss, the gradient, and a step
            optimiser.zero_grad()
            loss = current.backward(model, batch)
            optimiser.step()
            run.log(loss=loss, opacity=batch["opacity"].mean())
            run.count(rays=n)

    kept = [value for part in learner.parts.values() for value in part.state_dict().values()
            if torch.is_tensor(value)]               # joint keeps the images instead
    memory_bytes = sum(value.numel() * value.element_size() for value in kept)
    summary = run.finish(memory_bytes=memory_bytes,
                         backward_transfer=forgetting(P["psnr_heldout"])[1], P=P,
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
