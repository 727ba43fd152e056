"""continual.py against known answers: sectors and streams, what is stored and what is replayed, gradients, penalties, measures, training,
killed and resumed runs, the command line.

Random draws are compared with what they should follow at a stated tolerance, from fixed seeds. Real data: NERF_DATA=... ; without it
those tests say that they were skipped.
"""
import copy
import functools
import itertools
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import common  # noqa: E402
import conftest  # noqa: E402
import continual as cl  # noqa: E402
from conftest import assert_refused, close, content, lines, real, write_llff  # noqa: E402
from continual import Args, Memory, Past, Task, choose, fisher, penalty, project, sector, smooth_order, tile_losses  # noqa: E402

F64 = torch.float64
FILLS = ("random", "uniform", "topk", "tiles", "all")
TINY = dict(scene="bricks", size=16, steps=6, rays=64, replay_rays=32, levels=3, features=2, log2_table=10, base=4, finest=24, width=16,
            depth=2, frequencies=3, samples=24, grid=12, lr_warmup=4, eval_every=4, eval_views=1, ewc_rays=128, chunk=34, chunk_steps=6,
            device="cpu")


@functools.lru_cache
def bricks(size=16, background="white"):
    """A second each time."""
    return common.load_scene("bricks", "data", size, background)


def load(name, data, size, background):
    return bricks(size, background) if name == "bricks" else common.load_scene(name, data, size, background)


@pytest.fixture(autouse=True)
def seeded(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(cl, "load_scene", load)


def args(**more):
    return replace(Args(), **{**TINY, **more})


def at(azimuth, elevation=20.0, radius=4.0):
    a, e = math.radians(azimuth), math.radians(elevation)
    return [radius * math.cos(a) * math.cos(e), radius * math.sin(a) * math.cos(e), radius * math.sin(e)]


def placed(*positions):
    """Cameras (V, 3, 4) there; where they look does not matter."""
    return torch.cat([torch.eye(3).expand(len(positions), 3, 3), torch.tensor(positions)[..., None]], -1)


def some_scene(train, test, H=12, W=16, images=None):
    """A scene with cameras at these positions, which look at the origin, each with its own K; pictures are noise."""
    V = len(train) + len(test)
    c2w = torch.tensor(np.stack([common.look_at(np.array(p), np.zeros(3)) for p in (*train, *test)])).float()
    K = torch.tensor([[18.0, 0, 8], [0, 18.0, 6], [0, 0, 1]]).repeat(V, 1, 1)
    K[:, 0, 0] += torch.arange(V)
    images = torch.rand(V, H, W, 3, generator=torch.Generator().manual_seed(3)) if images is None else images
    views = common.Views(images, c2w, K, None, None, [f"v{v}" for v in range(V)])
    pick = lambda ids: common.pick_views(views, list(ids))
    aabb = torch.tensor([[-1.5] * 3, [1.5] * 3])
    train, test = pick(range(len(train))), pick(range(len(train), V))
    return common.Scene("s", "blender", train, test, aabb, 2.0, 6.0, torch.tensor([0.9, 0.5, 0.1]), False)


def ring(V, T, **more):
    generator = torch.Generator().manual_seed(5)
    places = [at(360 * float(a), 60 * float(b)) for a, b in torch.rand(V + T, 2, generator=generator)]
    return some_scene(places[:V], places[V:], **more)


def joined(scene):
    return common.join_views(scene.train, scene.test)


# -------------------------------------------------------------------------------------------------------- tasks and streams

def test_two_sectors_are_the_signs_of_x():
    x = torch.cat([torch.randn(2000), torch.tensor([1e-3, 1e-7, 1e-10, -1e-3, -1e-7, -1e-10, 0.0, -0.0])])
    for y in (torch.randn(len(x)) * 4, torch.full_like(x, 4.0), torch.full_like(x, -4.0)):
        c2w = torch.cat([torch.eye(3).expand(len(x), 3, 3), torch.stack([x, y, torch.rand(len(x)) * 4], -1)[..., None]], -1)
        assert torch.equal(sector(c2w, 0, 2, False), x > 0) and torch.equal(sector(c2w, 1, 2, False), x < 0)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_hard_sectors_have_margins(n):
    reach = {2: 75, 3: 50, 4: 37.5}[n]
    for k in range(n):
        middle = 360 * k / n
        inside = placed(*[at(middle + s * a, e) for s in (-1, 1) for a in (0, 20, reach - 0.05) for e in (-30, 0, 59.9)])
        outside = placed(*[at(middle + a) for a in (reach + 0.05, -reach - 0.05, 180)], *[at(middle + a, 60.1) for a in (-10, 0, 10)])
        assert sector(inside, k, n, True).all() and not sector(outside, k, n, True).any()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_sectors_cover_the_turn_and_do_not_overlap(n):
    edge = {2: 90, 3: 60, 4: 45}[n]
    c2w = torch.cat([torch.eye(3).expand(3000, 3, 3), torch.randn(3000, 3, 1)], -1)
    wide, hard = (torch.stack([sector(c2w, k, n, how) for k in range(n)]) for how in (False, True))
    assert wide.dtype == torch.bool and wide.shape == (n, 3000)
    assert (wide.sum(0) == 1).all() and (hard.sum(0) <= 1).all() and (wide | ~hard).all() and 0.3 < hard.any(0).float().mean() < 0.85
    for k in range(n):
        found = sector(placed(*[at(360 * k / n + a, 80) for a in (edge - 0.1, edge + 0.1, -edge + 0.1, -edge - 0.1)]), k, n, False)
        assert found.tolist() == [True, False, True, False]


def test_tasks_point_into_training_then_test_views():
    scene = some_scene([at(0), at(170), at(70), at(80), at(-100), at(10, 65), at(190)], [at(100), at(-60), at(180), at(30, 70)])
    by_hand = {"released": [([0, 2, 3, 5], [8, 10]), ([1, 4, 6], [7, 9])], "hard": [([0, 2], [8]), ([1, 6], [9])]}
    for split, expected in by_hand.items():
        tasks = cl.make_tasks(scene, args(split=split))
        assert [(task.seen, task.held_out) for task in tasks] == expected
    tasks = cl.make_tasks(ring(60, 30), args(split="released", tasks=3))
    assert len({task.name for task in tasks}) == 3
    assert sorted(v for task in tasks for v in task.seen) == list(range(60))
    assert sorted(v for task in tasks for v in task.held_out) == list(range(60, 90))


def test_real_lego_splits_42_to_58():
    data = real("nerf_synthetic/lego")
    split = lambda name: [[row[3] for row in frame["transform_matrix"][:3]] for frame in
                          json.loads((Path(data) / f"nerf_synthetic/lego/transforms_{name}.json").read_text())["frames"]]
    scene = some_scene(split("train"), split("test"))
    tasks = cl.make_tasks(scene, args(split="released"))
    assert [len(task.seen) for task in tasks] == [42, 58]
    for task, sign in zip(tasks, (1, -1)):
        x = joined(scene).c2w[:, 0, 3] * sign
        assert task.seen == [v for v in range(100) if x[v] > 0] and task.held_out == [v for v in range(100, len(x)) if x[v] > 0]
    hard = cl.make_tasks(scene, args(split="hard"))
    assert all(set(a.seen) < set(b.seen) and set(a.held_out) < set(b.held_out) for a, b in zip(hard, tasks))


@pytest.mark.parametrize("train, test, tasks", [([at(0), at(10)], [at(0), at(180)], 2), ([at(0), at(180)], [at(20), at(5)], 2),
                                                ([at(0), at(180)], [at(0), at(180)], 3), ([at(0, 70), at(180)], [at(0), at(180)], 2)])
def test_tasks_without_views_are_refused(train, test, tasks):
    with pytest.raises(common.UserError, match=f"--split hard --tasks {tasks}"):
        cl.make_tasks(some_scene(train, test), args(tasks=tasks))


@pytest.mark.parametrize("V, chunk, sizes", [(23, 5, [5, 5, 5, 5, 3]), (23, 12, [12, 11]), (40, 10, [10] * 4), (9, 3, [3] * 3),
                                             (31, 10, [10, 10, 11]), (22, 10, [10, 12]), (7, 3, [3, 4])])
def test_chunks_of_a_stream(V, chunk, sizes):
    scene = ring(V, 4)
    tasks = cl.make_tasks(scene, args(online="none", chunk=chunk))
    order = smooth_order(scene.train.c2w[:, :, 3])
    chunks = [order[sum(sizes[:k]):sum(sizes[:k + 1])] for k in range(len(sizes))]
    assert [task.held_out for task in tasks] == [[v for i, v in enumerate(c) if i in (2, 7, 12)] for c in chunks]
    assert [task.seen for task in tasks] == [[v for i, v in enumerate(c) if i not in (2, 7, 12)] for c in chunks]
    assert sorted(v for task in tasks for v in task.seen + task.held_out) == list(range(V))
    assert len({task.name for task in tasks}) == len(sizes)


@pytest.mark.parametrize("V, chunk", [(20, 20), (20, 25), (20, 19), (20, 18), (20, 2), (20, 1), (2, 3)])
def test_chunks_that_make_no_stream_are_refused(V, chunk):
    with pytest.raises(common.UserError, match=f"--chunk {chunk}"):
        cl.make_tasks(ring(V, 4), args(online="none", chunk=chunk))


def slow_walk(position):
    order, left = [0], set(range(1, len(position)))
    while left:
        order.append(min(left, key=lambda v: math.dist(position[v], position[order[-1]])))
        left.remove(order[-1])
    return order


def test_a_walk_to_the_nearest_camera():
    assert smooth_order(torch.tensor([[0.0, 0, 0], [10, 0, 0], [1, 0, 0], [9, 0, 0], [2, 0, 0]])) == [0, 2, 4, 3, 1]
    assert smooth_order(torch.zeros(1, 3)) == [0] and sorted(smooth_order(torch.zeros(5, 3))) == list(range(5))
    for V in (7, 20, 60):
        position = torch.randn(V, 3)
        assert smooth_order(position) == slow_walk(position.double().tolist())
    turn = (torch.rand(300, dtype=F64) * 0.02 + 0.005).cumsum(0)[torch.randperm(300)]               # a film: frames 2 to 10 cm apart
    position = torch.stack([4 * turn.cos(), 4 * turn.sin(), 0.3 * turn], -1).float()
    assert smooth_order(position) == slow_walk(position.double().tolist())


# --------------------------------------------------------------------------------------------------------- choose, by tiles

def test_choose_follows_sequential_drawing_without_replacement():
    """All ordered pairs of four: p_i p_j / (1 - p_i)."""
    p, trials = torch.tensor([0.4, 0.3, 0.2, 0.1]), 12000
    found = torch.zeros(4, 4)
    for _ in range(trials):
        i, j = choose(p * 7, 2)
        found[i, j] += 1
    expected = p[:, None] * p / (1 - p[:, None])
    expected.fill_diagonal_(0)
    assert expected.sum() == pytest.approx(1) and found.diagonal().sum() == 0
    off = ~torch.eye(4, dtype=torch.bool)
    chi2 = float(((found - trials * expected)[off] ** 2 / (trials * expected)[off]).sum())
    assert chi2 < 31.3, chi2                                                                        # 11 degrees of freedom: 1 in 1000


def test_choose_takes_each_once_and_zeros_last():
    for B, n in ((1, 1), (50, 0), (50, 7), (50, 50), (3000, 1000)):
        found = choose(torch.rand(B), n)
        assert found.shape == (n,) and len(found.unique()) == n
    p = torch.zeros(40)
    p[[3, 17, 29]] = torch.tensor([1e-6, 1.0, 1e6])
    for n in (3, 5, 40):
        found = choose(p, n)
        assert set(found[:3].tolist()) == {3, 17, 29} and len(found.unique()) == n
    assert len(choose(torch.zeros(10), 4).unique()) == 4


def slow_shares(loss, id, H, W):
    tiles = {}
    place = [(k // (H * W), k // W % H * 4 // H, k % W * 4 // W) for k in id]
    for where, e in zip(place, loss):
        tiles.setdefault(where, []).append(e)
    mean = {where: sum(e) / len(e) for where, e in tiles.items()}
    return [mean[where] / sum(m for other, m in mean.items() if other[0] == where[0]) for where in place]


@pytest.mark.parametrize("H, W", [(8, 8), (5, 7), (4, 4), (12, 9), (6, 31)])
def test_tile_losses_against_a_slow_loop(H, W):
    for views in ([0], [0, 1, 2], [7, 2, 5], [3]):
        id = torch.cat([torch.arange(v * H * W, (v + 1) * H * W) for v in views])
        for which in (id, id[torch.randperm(len(id))], id[torch.randperm(len(id))[:len(id) // 2]], id[-1:]):
            loss = torch.rand(len(which), dtype=F64) * (1 + which // (H * W))
            assert close(tile_losses(loss, which, H, W), torch.tensor(slow_shares(loss.tolist(), which.tolist(), H, W), dtype=F64))
    assert tile_losses(torch.zeros(20), torch.arange(20), H, W).abs().max() == 0


def test_tile_losses_by_hand():
    """4x4 px: a tile is a pixel; shares of a picture sum to 1, whatever its loss is."""
    loss = torch.cat([torch.arange(16.0), torch.full((16,), 5.0)])
    shares = tile_losses(loss, torch.arange(32) + 32, 4, 4)
    assert close(shares[:16], torch.arange(16) / 120) and close(shares[16:], torch.full((16,), 1 / 16))


# -------------------------------------------------------------------------------------------------------------- the memory

H, W = 6, 10


def rays(*views):
    """All rays of these pictures: id, rgb and loss that follow from id."""
    id = torch.cat([torch.arange(v * H * W, (v + 1) * H * W) for v in views])
    return id, *content_of(id)


def content_of(id):
    return torch.stack([id % 256, id // 256, id * 7 % 256], -1) / 255, torch.frac(id.float() * 0.618034) + 0.01


def assert_sound(memory):
    """No ray twice, and each one with its own colour and loss."""
    assert len(memory.id.unique()) == len(memory) == len(memory.rgb) == len(memory.loss)
    assert (memory.id.dtype, memory.rgb.dtype, memory.loss.dtype) == (torch.int32, torch.uint8, torch.float32)
    rgb, loss = content_of(memory.id.long())
    assert torch.equal(memory.rgb.float(), (rgb * 255).round()) and torch.equal(memory.loss, loss)


@pytest.mark.parametrize("fill", FILLS)
def test_a_memory_is_full_and_holds_no_ray_twice(fill):
    memory, gone_by = Memory(150, fill, H, W), 0
    assert len(memory) == 0 and memory.bytes() == 0
    for views in ((0,), (5, 3), (2, 1, 4), (9,)):                                                   # 60, 180, 360, 420 rays
        memory.absorb(*rays(*views))
        gone_by += len(views) * H * W
        assert memory.gone_by == gone_by and len(memory) == (gone_by if fill == "all" else min(150, gone_by))
        assert_sound(memory)
    views = len({int(k) // (H * W) for k in memory.id})
    assert memory.bytes() == 11 * len(memory) + 48 * views and views == 7


@pytest.mark.parametrize("fill", FILLS)
def test_a_memory_with_more_places_than_rays_keeps_all(fill):
    memory = Memory(10_000, fill, H, W)
    for views in ((0,), (5, 3), (2,)):
        memory.absorb(*rays(*views))
    assert sorted(memory.id.tolist()) == sorted(rays(0, 5, 3, 2)[0].tolist())
    assert_sound(memory)


@pytest.mark.parametrize("fill", ["random", "uniform", "all"])
def test_a_memory_without_losses_is_smaller(tmp_path, fill):
    with_losses, memory = (Memory(70, fill, H, W, losses=losses) for losses in (True, False))
    for parts in range(3):
        for one in (with_losses, memory):
            torch.manual_seed(parts)
            one.absorb(*rays(2 * parts, 2 * parts + 1))
        assert torch.equal(memory.id, with_losses.id) and torch.equal(memory.rgb, with_losses.rgb) and memory.loss is None
        assert memory.bytes() == 7 * len(memory) + 48 * len((memory.id // 60).unique()) == with_losses.bytes() - 4 * len(memory)
    again = Memory(70, fill, H, W, losses=False)
    again.load_state_dict(through_a_file(memory.state_dict(), tmp_path / "m"))
    assert same(again.state_dict(), memory.state_dict()) and len(again.draw(20, "random").unique()) == 20


def test_colours_are_rounded_to_bytes():
    memory = Memory(9, "all", H, W)
    memory.absorb(torch.arange(4), torch.tensor([0.0, 1.0, 0.4999 / 255, 100.5001 / 255])[:, None].expand(4, 3), torch.ones(4))
    assert memory.rgb[:, 1].tolist() == [0, 255, 0, 101]


def test_random_fill_gives_every_ray_that_ever_came_the_same_right():
    """15, 15, 30 rays through 6 places: 0.1 for each ray, also for pairs within and across tasks (6 5 / (60 59))."""
    found, together, trials = torch.zeros(60), torch.zeros(60, 60), 4000
    for _ in range(trials):
        memory = Memory(6, "random", H, W)
        for part in torch.arange(60).split([15, 15, 30]):
            memory.absorb(part, torch.zeros(len(part), 3), torch.zeros(len(part)))
        found[memory.id.long()] += 1
        together[memory.id.long()[:, None], memory.id.long()] += 1
    sd = math.sqrt(0.1 * 0.9 / trials)
    assert (found / trials - 0.1).abs().max() < 4.5 * sd
    for part, mean in zip((slice(0, 15), slice(15, 30), slice(30, 60)), (0.1,) * 3):
        assert float(found[part].mean()) / trials == pytest.approx(mean, abs=4 * sd / math.sqrt(15))
    old = together[:15, 15:30].mean() / trials
    assert float(old) == pytest.approx(6 * 5 / (60 * 59), rel=0.12)


@pytest.mark.parametrize("N, B", [(100, 12), (100, 100), (172, 20), (97, 1), (64, 8)])
def test_uniform_fill_is_evenly_spaced(N, B):
    memory = Memory(B, "uniform", H, W)
    memory.absorb(*(x[:N] for x in rays(0, 1, 2)))
    id = memory.id.tolist()
    gaps = {b - a for a, b in zip(id, [*id[1:], N])}
    assert len(id) == B and id[0] == 0 and gaps <= {N // B, -(-N // B)}
    assert_sound(memory)


@pytest.mark.parametrize("fill", ["random", "uniform", "tiles"])
def test_tasks_share_the_places_in_proportion_to_their_rays(fill):
    memory, seen = Memory(96, fill, H, W), []
    for views in ((0, 1, 2), (3,), (4, 5), (6, 7)):
        memory.absorb(*rays(*views))
        seen.append([int(((memory.id // (H * W)) == v).sum()) for v in views])
        assert sum(seen[-1]) == round(96 * len(views) * H * W / memory.gone_by) and len(memory) == 96
    counts = (memory.id // (H * W)).bincount(minlength=8)
    assert counts.tolist() == [12] * 8 if fill == "uniform" else (counts - 12).abs().max() <= 8
    unequal = Memory(100, fill, H, W)                                                               # 10 of 30, then 60
    unequal.absorb(*(x[:30] for x in rays(0)))
    assert len(unequal) == 30
    unequal.absorb(*rays(1, 2))
    assert [int((unequal.id < 60).sum()), len(unequal)] == [20, 100]


def test_topk_fill_keeps_the_highest_losses_of_all_tasks():
    memory, everything = Memory(70, "topk", H, W), []
    for views in ((0,), (5, 3), (2, 1), (4,)):
        id, rgb, loss = rays(*views)
        memory.absorb(id, rgb, loss)
        everything += list(zip(loss.tolist(), id.tolist()))
        best = sorted(everything, reverse=True)[:70]
        assert {k for _, k in best} == set(memory.id.tolist())
        assert_sound(memory)


def test_tiles_fill_draws_by_tiles():
    """8x8 px, one place: a tile is drawn with half its share L_i / sum L, and both pictures equally, though one has 20 times the loss."""
    share, found, trials = torch.rand(2, 4, 4) + 0.1, torch.zeros(2, 4, 4), 6000
    loss = share / share.sum((1, 2), keepdim=True) * torch.tensor([1.0, 20.0])[:, None, None]
    loss = loss.repeat_interleave(2, 1).repeat_interleave(2, 2)
    loss = loss * (1 + 0.5 * (torch.arange(8) % 2 * 2 - 1))                                         # only a tile's mean counts
    for _ in range(trials):
        memory = Memory(1, "tiles", 8, 8)
        memory.absorb(torch.arange(128), torch.zeros(128, 3), loss.flatten())
        v, y, x = int(memory.id) // 64, int(memory.id) // 8 % 8, int(memory.id) % 8
        found[v, y // 2, x // 2] += 1
    expected = share / share.sum((1, 2), keepdim=True) / 2
    assert float(((found - trials * expected) ** 2 / (trials * expected)).sum()) < 61.1             # chi2, 31 degrees of freedom: 1 in 1000


def memory_of(loss, **more):
    """A memory that holds rays 0, 1, ... with these losses."""
    memory = Memory(len(loss), "all", more.get("H", H), more.get("W", W))
    memory.absorb(torch.arange(len(loss)), torch.zeros(len(loss), 3), loss)
    return memory


@pytest.mark.parametrize("how", ["random", "topk", "weighted"])
@pytest.mark.parametrize("n, B", [(1024, 3000), (100, 100), (500, 60), (1, 7)])
def test_a_draw_takes_no_ray_twice(how, n, B):
    memory = memory_of(torch.rand(B))
    for exploration, centre in ((0.0, 0.0), (0.2, 0.0), (0.2, 0.3), (1.0, 1.0)):
        i = memory.draw(n, how, exploration, centre)
        assert i.shape == (min(n, B),) and len(i.unique()) == len(i) and 0 <= i.min() and i.max() < B


def test_random_and_topk_draws():
    memory, found = memory_of(torch.rand(50) ** 3), torch.zeros(50)
    for _ in range(1500):
        found[memory.draw(10, "random")] += 1
    assert (found / 1500 - 0.2).abs().max() < 4.5 * math.sqrt(0.16 / 1500)                          # the loss does not matter
    for n in (1, 10, 50):
        assert sorted(memory.loss[memory.draw(n, "topk")].tolist()) == sorted(memory.loss.tolist())[-n:]


def test_weighted_draw_takes_820_by_loss_and_204_from_the_rest():
    loss = torch.full((3000,), 1e-9)
    high = torch.randperm(3000)[:820]
    loss[high] = 1e6 * (torch.rand(820) + 0.5)
    loss[:1500] *= 1e-3                                                                             # the rest: uniform, whatever its loss
    memory, found = memory_of(loss), torch.zeros(3000)
    for _ in range(60):
        i = memory.draw(1024, "weighted", 0.2)
        assert set(i[:820].tolist()) == set(high.tolist()) and len(i) == len(i.unique()) == 1024
        found[i[820:]] += 1
    rest = torch.ones(3000, dtype=torch.bool).index_fill_(0, high, False)
    assert found[high].sum() == 0
    assert (found[rest] / 60 - 204 / 2180).abs().max() < 5.5 * math.sqrt(0.094 * 0.906 / 60)
    share = found[:1500].sum() / found.sum()
    assert float(share) == pytest.approx(float(rest[:1500].sum() / rest.sum()), abs=0.02)
    assert set(memory.draw(820, "weighted", 0.0).tolist()) == set(high.tolist())


@pytest.mark.parametrize("n, exploration, by_loss", [(1024, 0.2, 820), (1024, 0.0, 1024), (10, 1.0, 0), (10, 0.25, 8), (7, 0.1, 7)])
def test_how_many_are_drawn_by_loss(monkeypatch, n, exploration, by_loss):
    calls = []
    monkeypatch.setattr(cl, "choose", lambda p, k: (calls.append((p.clone(), k)), choose(p, k))[1])
    memory = memory_of(torch.rand(2000) + 0.1)
    i = memory.draw(n, "weighted", exploration)
    assert [k for _, k in calls] == [by_loss, n - by_loss]
    assert close(calls[0][0] / calls[0][0].sum(), memory.loss / memory.loss.sum())
    expected = torch.ones(2000)
    expected[i[:by_loss]] = 0
    assert torch.equal(calls[1][0], expected)


def test_weighted_draw_follows_the_loss():
    memory, found = memory_of(torch.tensor([1.0, 2.0, 3.0, 4.0])), torch.zeros(4)
    for _ in range(4000):
        found[memory.draw(1, "weighted", 0.0)] += 1
    assert (found / 4000 - torch.arange(1, 5) / 10).abs().max() < 0.03


def test_the_centre_term_by_hand(monkeypatch):
    """Two pictures of 4 x 2 px: x = -3/4, -1/4, 1/4, 3/4; y = -1/2, 1/2."""
    seen = []
    monkeypatch.setattr(cl, "choose", lambda p, k: (seen.append(p.clone()), choose(p, k))[1])
    loss = torch.arange(1.0, 17.0)
    near, far = math.exp(-(1 / 16 + 1 / 4) / 2), math.exp(-(9 / 16 + 1 / 4) / 2)
    middle = torch.tensor([far, near, near, far] * 4)
    memory = memory_of(loss, H=2, W=4)
    for a in (0.0, 0.3, 1.0):
        seen.clear()
        memory.draw(4, "weighted", 0.25, a)
        expected = (1 - a) * loss / 136 + a * middle / middle.sum()
        assert close(seen[0] / seen[0].sum(), expected / expected.sum())
    memory = memory_of(torch.rand(35), H=7, W=5)                                                    # rows and columns are not confused
    seen.clear()
    memory.draw(4, "weighted", 0.0, 1.0)
    best = int(seen[0].argmax())
    assert best == 3 * 5 + 2 and seen[0].argmin() in (0, 4, 30, 34)
    r2 = [((k % 5 - 2) / 2.5) ** 2 + ((k // 5 - 3) / 3.5) ** 2 for k in range(35)]
    assert close(seen[0] / seen[0][best], torch.exp(-torch.tensor(r2) / 2))


def through_a_file(state, path):
    torch.save(state, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("fill", FILLS)
def test_a_memory_comes_back_from_a_file(tmp_path, fill):
    memory = Memory(70, fill, H, W)
    for parts in range(3):
        again = Memory(70, fill, H, W)
        again.load_state_dict(through_a_file(memory.state_dict(), tmp_path / "m"))
        for one in (memory, again):                                                                 # both go on alike
            torch.manual_seed(parts)
            one.absorb(*rays(2 * parts, 2 * parts + 1))
        assert same(memory.state_dict(), again.state_dict()) and memory.gone_by == 120 * (parts + 1)
        torch.manual_seed(9)
        i = memory.draw(20, "weighted", 0.2, 0.3)
        torch.manual_seed(9)
        assert torch.equal(i, again.draw(20, "weighted", 0.2, 0.3))


# -------------------------------------------------------------------------------- gradients, penalties, and what is measured

def test_projected_gradients_do_no_harm():
    bent = 0
    for trial in range(300):
        new, old = ([torch.randn(shape, dtype=F64) for shape in ((4, 3), (5,), (2, 2, 2))] for _ in range(2))
        if trial % 3 == 0:                                                                          # together they agree, some do not
            new = [g + r for g, r in zip(new, old)]
        dot = sum(float((g * r).sum()) for g, r in zip(new, old))
        result = project(new, old)
        assert [g.shape for g in result] == [g.shape for g in new]
        after = sum(float((g * r).sum()) for g, r in zip(result, old))
        if dot >= 0:
            assert all(torch.equal(g, r) for g, r in zip(result, new))
            continue
        bent += 1
        assert abs(after) < 1e-12
        change, along = (torch.cat([x.flatten() for x in xs]) for xs in ([r - g for r, g in zip(result, new)], old))
        scale = float((change * along).sum() / (along * along).sum())
        assert scale > 0 and close(change, scale * along)                                           # parallel to the old one
    assert bent > 50


def test_projection_by_hand():
    a, b = project([torch.tensor([1.0]), torch.tensor([-3.0])], [torch.tensor([1.0]), torch.tensor([1.0])])
    assert a.tolist() == [2.0] and b.tolist() == [-2.0]
    zero = [torch.zeros(2)]
    assert torch.equal(project([torch.ones(2)], zero)[0], torch.ones(2))                            # nothing to go against


def test_fisher_is_the_hessian_s_diagonal_one_output_at_a_time():
    """f_n = x_n . w + b: the Hessian of mean (f - y)^2 has 2 mean x_nk^2 and 2 on its diagonal."""
    w, b, x = torch.randn(3, dtype=F64, requires_grad=True), torch.randn((), dtype=F64, requires_grad=True), torch.randn(8, 3, dtype=F64)
    batches = iter(x)
    h = fisher(lambda: (next(batches) @ w + b).view(1, 1), [w, b], 8)
    assert close(h[0], 2 * (x ** 2).mean(0)) and close(h[1], torch.tensor(2.0, dtype=F64)) and not h[0].requires_grad


def test_fisher_of_many_batches_is_the_hessian_s_diagonal():
    A, w = torch.randn(6, 3, 5, dtype=F64), torch.randn(5, dtype=F64, requires_grad=True)           # 6 rays, 3 channels, 5 weights
    mean_squared = lambda w: ((A @ w - 1) ** 2).mean()
    exact = torch.autograd.functional.hessian(mean_squared, w.detach()).diagonal()
    h, = fisher(lambda: A @ w, [w], 6000)
    assert close(h, exact, rtol=0.1, atol=0)
    few, = fisher(lambda: A @ w, [w], 1)
    assert not torch.allclose(few, exact, rtol=0.1)                                                 # signs are random


def test_penalty_by_hand():
    p, a, h = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])], [torch.tensor([0.0, 4.0]), torch.tensor([[3.5]])], \
        [torch.tensor([2.0, 0.5]), torch.tensor([[8.0]])]
    assert float(penalty(p, a, h)) == pytest.approx(0.5 * (2 * 1 + 0.5 * 4 + 8 * 0.25))


def test_penalised_minimum_is_the_joint_one_where_the_problem_is_diagonal():
    """Task k: mean_c (a_kc theta_c - y_kc)^2. Three tasks, one after the other: at the end the minimum of the sum of all."""
    a, y = torch.rand(3, 4, dtype=F64) + 0.5, torch.randn(3, 4, dtype=F64)
    theta, h = torch.zeros(4, dtype=F64, requires_grad=True), torch.zeros(4, dtype=F64)
    for k in range(3):
        anchor = theta.detach().clone()
        optimiser = torch.optim.LBFGS([theta], max_iter=100, tolerance_grad=1e-14, tolerance_change=1e-16, line_search_fn="strong_wolfe")

        def closure():
            optimiser.zero_grad()
            loss = ((a[k] * theta - y[k]) ** 2).mean() + penalty([theta], [anchor], [h])
            loss.backward()
            return loss
        optimiser.step(closure)
        h = h + fisher(lambda: (a[k] * theta)[None], [theta], 1)[0]
    assert close(theta.detach(), (a * y).sum(0) / (a ** 2).sum(0), atol=1e-6, rtol=0)


def test_forgetting_and_backward_transfer_by_hand():
    P = [[30.0, 20.0], [25.0, 30.0]]
    assert cl.forgetting(P) == 5 and cl.backward_transfer(P) == -5
    P = [[30.0, 50.0, 10.0], [32.0, 28.0, 12.0], [29.0, 31.0, 33.0]]                                # task 1: 32 -> 29; task 2: 28 -> 31
    assert cl.forgetting(P) == pytest.approx(1.5) and cl.backward_transfer(P) == pytest.approx((-1 + 3) / 2)
    assert cl.forgetting(P[:1]) is None and cl.backward_transfer(P[:1]) is None and cl.forgetting([]) is None
    assert cl.forgetting([[20.0, 0.0], [25.0, 30.0]]) == 0                                          # became better: nothing is forgotten


@pytest.mark.parametrize("schedule, expected", [("cosine", [1, 0.55 + 0.45 * math.cos(0.2), 0.55, 0.1]), ("constant", [1, 1, 1, 1]),
                                                ("steps", [1, 0.125, 0.125, 0.125])])
def test_rate_within_a_task(schedule, expected):
    assert [cl.anneal(p, schedule) for p in (0, 0.2 / math.pi, 0.5, 1)] == pytest.approx(expected)
    assert [cl.anneal(p, "steps") for p in (0.0155, 0.0157, 0.0311, 0.0313, 0.0624, 0.0626)] == [1, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_plan_ends_with_the_main_learner():
    def lessons(tasks=2, **flags):
        return [(lesson.learner, lesson.x, lesson.steps) for lesson in cl.plan(args(steps=7, chunk_steps=3, **flags), tasks)]
    assert lessons(learner="mixed", compare=("naive", "joint")) == [("first", 0, 7), ("naive", 1, 7), ("joint", 1, 14), ("mixed", 1, 7)]
    expected = [("first", 0, 7), ("ewc", 1, 7), ("ewc", 2, 7), ("naive", 1, 7), ("naive", 2, 7)]
    assert lessons(3, learner="naive", compare=("naive", "ewc")) == expected
    assert lessons(3, learner="joint", compare=("joint",)) == lessons(3, learner="joint", compare=()) == [("joint", 2, 21)]
    assert lessons(learner="joint", compare=("naive",)) == [("first", 0, 7), ("naive", 1, 7), ("joint", 1, 14)]
    assert lessons(3, online="tiles", compare=("none", "tiles")) == [(name, x, 3) for name in ("none", "tiles") for x in range(3)]
    assert lessons(4, learner="mixed", compare=cl.LEARNERS)[-3:] == [("mixed", x, 7) for x in (1, 2, 3)]


# -------------------------------------------------------------------------------------------------------------------- render

def test_rays_of_pixels():
    views = joined(ring(5, 3))
    for v in (0, 4, 7):
        o, d = common.view_rays(views, v, False)
        for id in (torch.arange(v * 192, (v + 1) * 192), torch.arange(v * 192, (v + 1) * 192, dtype=torch.int32)):
            assert all(torch.equal(a, b) for a, b in zip(cl.rays_of(views, id), (o, d)))
    mixed = torch.randperm(8 * 192)[:50]
    o, d = cl.rays_of(views, mixed)
    for r, k in enumerate(mixed.tolist()):
        one = common.view_rays(views, k // 192, False)
        assert close(o[r], one[0][k % 192]) and close(d[r], one[1][k % 192])


def test_edges_by_hand():
    ray, t_starts, t_ends, offsets = cl.edges(torch.tensor([[1.0, 2.0, 4.0, 5.0], [2.0, 3.0, 3.5, 9.0]]))
    assert ray.tolist() == [0, 0, 0, 1, 1, 1] and offsets.tolist() == [0, 3, 6]
    assert t_starts.tolist() == [1, 2, 4, 2, 3, 3.5] and t_ends.tolist() == [2, 4, 5, 3, 3.5, 9]


def slow_importance(t, weights, u):
    w = [x + 1e-5 for x in weights]
    total, found = sum(w), []
    for share in u:
        below = 0.0
        for k, x in enumerate(w):
            if below + x / total >= share or k == len(w) - 1:
                found.append(t[k] + (t[k + 1] - t[k]) * (share - below) / (x / total))
                break
            below += x / total
    return sorted([*t, *found])


def test_importance_against_a_slow_loop():
    t = (2 + torch.rand(9, 11, dtype=F64).cumsum(1)).requires_grad_()
    weights = torch.rand(9, 10, dtype=F64) ** 4
    weights[0], weights[1, 3:] = 0, 0
    found = cl.importance(t.detach(), weights.requires_grad_(), 7, False)
    expected = [slow_importance(a, b, [(k + 0.5) / 7 for k in range(7)]) for a, b in zip(t.tolist(), weights.tolist())]
    assert close(found, torch.tensor(expected, dtype=F64)) and not found.requires_grad
    moved = cl.importance(t.detach(), weights, 7, True)
    assert moved.shape == (9, 18) and (moved.diff(dim=1) >= 0).all() and not torch.equal(moved, found)
    weights = torch.zeros(2, 10, dtype=F64)
    weights[:, 4] = 1.0
    more = cl.importance(t[:2].detach(), weights, 1000, True)
    assert ((more >= t[:2, 4:5]) & (more <= t[:2, 5:6])).sum(1).min() >= 999 + 2


def test_the_released_mlp():
    field = cl.MLPField(args(width=256, depth=8, frequencies=10), torch.zeros(2, 3))
    assert sum(p.numel() for p in field.parameters()) == 595_844
    assert [layer.in_features for layer in field.layers] == [63, 256, 256, 256, 256 + 63, 256, 256, 256]
    v = torch.tensor([[0.3, -1.0, 2.0]])
    expected = [*v[0], *(math.sin(2 ** k * x) for k in range(3) for x in v[0]), *(math.cos(2 ** k * x) for k in range(3) for x in v[0])]
    assert sorted(cl.MLPField.encode(v, 3)[0].tolist()) == pytest.approx(sorted(map(float, expected)), abs=1e-6)


@pytest.mark.parametrize("make", [cl.HashField, cl.MLPField])
def test_fields(make):
    """Density of a place alone; colour of place and direction."""
    field, x = make(args(), torch.tensor([[-1.5] * 3, [1.5] * 3])), torch.rand(40, 3) * 3 - 1.5
    d = torch.nn.functional.normalize(torch.randn(2, 40, 3), dim=-1)
    with torch.no_grad():
        for p in field.parameters():
            p.add_(0.3 * torch.randn_like(p))
    (sigma, rgb), (again, other) = (field(x, field.directions(directions)) for directions in d)
    assert torch.equal(sigma, again) and torch.equal(field(x, None)[0], sigma) and field(x, None)[1] is None and (sigma >= 0).all()
    assert (rgb - other).abs().mean() > 1e-3 and rgb.min() >= 0 and rgb.max() <= 1 and sigma.std() > 0
    gradients = torch.autograd.grad(sigma.sum() + rgb.sum(), list(field.parameters()))
    assert all(g.abs().max() > 0 for g in gradients)


class Fog(nn.Module):
    """The same density and colour everywhere; a colour that tells the field apart."""
    def __init__(self, sigma, colour):
        super().__init__()
        self.sigma, self.colour = nn.Parameter(torch.tensor(sigma)), nn.Parameter(torch.tensor(colour))

    def directions(self, d):
        return d

    def forward(self, x, d):
        return self.sigma.expand(len(x)), None if d is None else self.colour.expand(len(x), 3)


def test_render_of_fog_by_hand():
    """rgb = (1 - exp(-sigma L)) colour + exp(-sigma L) background: L from near to far, or within the box."""
    scene = ring(3, 1)
    scene = replace(scene, train=replace(scene.train, K=torch.tensor([[9.0, 0, 8], [0, 9.0, 6], [0, 0, 1]])))   # sees more than the box
    o, d = common.view_rays(scene.train, 0, False)
    ar = args(importance=5, samples=9)
    model = cl.Model(ar, scene)
    model.coarse, model.fine = Fog(0.2, [0.1, 0.2, 0.3]), Fog(0.5, [0.8, 0.6, 0.4])
    for perturb in (False, True):
        out = cl.render(model, o, d, scene, ar, perturb)
        for name, field in (("rgb", model.fine), ("coarse", model.coarse)):
            acc = 1 - math.exp(-4 * field.sigma.item())
            assert close(out[name], (acc * field.colour + (1 - acc) * scene.bg).expand(len(o), 3), atol=1e-5, rtol=0)
        assert close(out["acc"], torch.full((len(o),), 1 - math.exp(-2.0)), atol=1e-5, rtol=0)
    gradients = torch.autograd.grad(out["rgb"].sum(), list(model.coarse.parameters()), allow_unused=True)
    assert gradients == (None, None)                                                                # not through where samples lie
    ar = args(importance=0, samples=400)
    model = cl.Model(ar, scene)
    model.fine = Fog(0.5, [0.8, 0.6, 0.4])
    out = cl.render(model, o, d, scene, ar)
    t = torch.stack([(s * 1.5 - o) / d for s in (-1, 1)])
    length = (t.amax(0).amin(1).clamp(max=6) - t.amin(0).amax(1).clamp(min=2)).clamp(min=0)
    assert 0 < (length == 0).sum() < len(o) and out["coarse"] is None
    acc = 1 - torch.exp(-0.5 * length)[:, None]
    assert close(out["rgb"], acc * model.fine.colour + (1 - acc) * scene.bg, atol=5e-3, rtol=0)


@pytest.mark.parametrize("importance", [0, 6])
@pytest.mark.parametrize("field", ["hash", "mlp"])
def test_samples_move_only_in_training(importance, field):
    scene = ring(3, 1)
    ar = args(importance=importance, field=field, samples=16)
    model = cl.Model(ar, scene)
    o, d = common.view_rays(scene.train, 1, False)
    still = [cl.render(model, o, d, scene, ar)["rgb"] for _ in range(2)]
    moved = [cl.render(model, o, d, scene, ar, True)["rgb"] for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*moved) and (model.coarse is None) == (model.grid is not None) == (importance == 0)
    view = cl.render_view(model, scene.train, 1, scene, ar, chunk=400)
    assert view["rgb"].shape == (12, 16, 3) and view["depth"].shape == (12, 16)
    assert close(view["rgb"].view(-1, 3), still[0].clamp(0, 1)) and not view["rgb"].requires_grad


def test_stratified_samples_keep_to_their_places(monkeypatch):
    """Inner edges move by up to half a width to both sides, near and far stay."""
    seen, edges = [], cl.edges
    monkeypatch.setattr(cl, "edges", lambda t: (seen.append(t), edges(t))[1])
    scene, ar = ring(30, 1), args(importance=3, samples=8)
    o, d = cl.rays_of(scene.train, torch.arange(2000))
    cl.render(cl.Model(ar, scene), o, d, scene, ar, perturb=True)
    away = seen[0] - torch.linspace(2, 6, 9)
    assert seen[0].shape == (2000, 9) and seen[1].shape == (2000, 12) and (away[:, [0, 8]].abs() < 1e-6).all()
    assert away.abs().max() < 0.2501 and away[:, 1:8].mean(0).abs().max() < 0.015
    assert (away[:, 1:8].std(0) - 0.5 / 12 ** 0.5).abs().max() < 0.01


def test_squared_error_by_hand():
    out = {"rgb": torch.tensor([[0.5, 0.5, 0.5], [1.0, 0.0, 0.0]], requires_grad=True), "coarse": None}
    target = torch.tensor([[0.5, 0.2, 0.5], [0.0, 0.0, 0.0]])
    loss, e = cl.squared_error(out, target)
    assert close(e, torch.tensor([0.03, 1 / 3])) and loss.item() == pytest.approx((0.03 + 1 / 3) / 2) and not e.requires_grad
    loss, e = cl.squared_error({**out, "coarse": target + 0.1}, target)
    assert close(e, torch.tensor([0.03, 1 / 3])) and loss.item() == pytest.approx((0.03 + 1 / 3) / 2 + 0.01)


def test_evaluate_by_hand(monkeypatch):
    """View v is rendered with an error of 10^-(v/2): 10 v dB."""
    scene = ring(6, 6, images=torch.full((12, 12, 16, 3), 0.5))
    views, asked = joined(scene), []

    def picture(model, views, v, scene, ar):
        asked.append(v)
        return {"rgb": views.images[v] + 10 ** (-v / 2), "depth": None}
    monkeypatch.setattr(cl, "render_view", picture)
    tasks = [Task("a", [0, 2, 4], [6, 7]), Task("b", [1, 5], [8, 9, 10, 11])]
    scores = cl.evaluate(None, views, tasks, scene, args(), 0)
    assert scores["psnr_seen"] == pytest.approx([20, 30], abs=1e-3) and scores["psnr_heldout"] == pytest.approx([65, 95], abs=0.5)
    ssim = [float(common.ssim(views.images[v] + 10 ** (-v / 2), views.images[v])) for v in (6, 7, 8, 9, 10, 11)]
    assert scores["ssim"] == pytest.approx(sum(ssim) / 6) and sorted(asked) == [0, 1, 2, *range(4, 12)]
    asked.clear()
    scores = cl.evaluate(None, views, tasks, scene, args(), 2)
    assert sorted(asked) == [0, 1, 4, 5, 6, 7, 8, 11] and scores["psnr_seen"] == pytest.approx([20, 30], abs=1e-3)


# ------------------------------------------------------------------------------------------ one step, and what is kept of the past

class Flat(nn.Module):
    """A model whose pictures have one colour; `other` is the coarse one's."""
    def __init__(self, colour, other=None):
        super().__init__()
        self.colour, self.other = nn.Parameter(torch.tensor(colour)), None if other is None else nn.Parameter(torch.tensor(other))
        self.grid = self.coarse = None


def flat_render(model, rays_o, rays_d, scene, ar, perturb=False):
    R = len(rays_o)
    coarse = None if model.other is None else model.other.expand(R, 3)
    return {"rgb": model.colour.expand(R, 3), "acc": torch.ones(R), "depth": torch.ones(R), "coarse": coarse}


@pytest.fixture
def flat(monkeypatch):
    """Pictures of one colour a view: view v has 0.1 v, so that what is drawn shows in the loss."""
    monkeypatch.setattr(cl, "render", flat_render)
    scene = ring(6, 2, images=(0.1 * torch.arange(8.0))[:, None, None, None].expand(8, 12, 16, 3).contiguous())
    return scene, joined(scene)


def gradient_of(model):
    return [p.grad for p in model.parameters()]


def test_a_step_draws_from_the_present_views_only(flat, monkeypatch):
    scene, views = flat
    seen = []
    rays_of = cl.rays_of
    monkeypatch.setattr(cl, "rays_of", lambda views, id: (seen.append(id), rays_of(views, id))[1])
    loss, acc = cl.step_gradients(Flat([0.2] * 3), Past("naive", args(), 12, 16), views, [1, 4, 5], 3000, scene, args())
    assert len(seen) == 1 and acc.shape == (3000,) and not loss.requires_grad
    assert set((seen[0] // 192).tolist()) == {1, 4, 5} and len((seen[0] % 192).unique()) == 192     # all their pixels
    assert (seen[0] // 192).bincount()[[1, 4, 5]].sub(1000).abs().max() < 120
    expected = ((0.1 * (seen[0] // 192) - 0.2) ** 2).mean()
    assert loss.item() == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("coarse", [False, True])
def test_distillation_ends_in_the_mean_of_both_targets(flat, weight, coarse):
    scene, views = flat
    ar = args(learner="distill", distill_weight=weight)
    past, truth, old = Past("distill", ar, 12, 16), 0.3, [0.9, 0.5, 0.1]
    past.remember(Flat(old, [0.0] * 3 if coarse else None), views, Task("a", [0, 1], [6]), scene, ar)
    model = Flat([0.5] * 3, [0.5] * 3 if coarse else None)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(60):
        optimiser.zero_grad()
        cl.step_gradients(model, past, views, [3], 8, scene, ar)
        optimiser.step()
    expected = (truth + weight * torch.tensor(old)) / (1 + weight)                                  # weight 1: the mean
    for p in model.parameters():
        assert close(p.detach(), expected, atol=1e-5, rtol=0)


def test_distillation_uses_the_same_rays(monkeypatch):
    """Real fields: target and render of the very rays of the new batch; the old model's samples do not move."""
    scene, ar = ring(6, 2), args(learner="distill")
    views, calls, render = joined(scene), [], cl.render
    model, past = cl.Model(ar, scene), Past("distill", ar, 12, 16)
    past.remember(model, views, Task("a", [0], [6]), scene, ar)
    monkeypatch.setattr(cl, "render", lambda *words, **more: (calls.append((words, more)), render(*words, **more))[1])
    cl.step_gradients(model, past, views, [3], 20, scene, ar)
    (new, new_more), (old, old_more) = calls
    assert new[0] is model and old[0] is past.teacher and torch.equal(new[1], old[1]) and torch.equal(new[2], old[2]) and len(new[1]) == 20
    assert new_more.get("perturb") and not old_more.get("perturb")


def stored(ar, learner, views, ids, model=None, scene=None):
    past = Past(learner, ar, *views.images.shape[1:3])
    past.remember(model, views, Task("a", ids, [6]), scene, ar)
    return past


def test_replay_adds_the_loss_of_stored_rays(flat):
    scene, views = flat
    ar = args(replay_weight=0.7, buffer_size=100, replay_rays=32)
    past, model = stored(ar, "replay", views, [5]), Flat([0.2] * 3)                                  # 0.5, stored as 128 of 255
    loss, _ = cl.step_gradients(model, past, views, [4], 8, scene, ar)
    assert loss.item() == pytest.approx(0.2 ** 2 + 0.7 * (128 / 255 - 0.2) ** 2, rel=1e-5)
    assert close(model.colour.grad, torch.full((3,), 2 / 3 * ((0.2 - 0.4) + 0.7 * (0.2 - 128 / 255))))


def test_a_step_draws_as_the_flags_say(flat, monkeypatch):
    scene, views = flat
    seen, draw = [], Memory.draw
    monkeypatch.setattr(Memory, "draw", lambda *words: (seen.append(words[1:]), draw(*words))[1])
    ar = args(buffer_size=100, replay_rays=30, buffer_draw="weighted", exploration=0.7, centre=0.4)
    for learner in ("replay", "mixed", "agem", "unbounded"):
        cl.step_gradients(Flat([0.2] * 3), stored(ar, learner, views, [1, 2], Flat([0.5] * 3), scene), views, [4], 8, scene, ar)
    assert seen == [(n, "weighted", 0.7, 0.4) for n in (30, 15, 30, 30)]


def test_own_replay_renders_old_cameras_with_the_old_model(flat, monkeypatch):
    scene, views = flat
    seen, ar = [], args(replay_weight=0.7, replay_rays=900)
    rays_of = cl.rays_of
    monkeypatch.setattr(cl, "rays_of", lambda views, id: (seen.append(id), rays_of(views, id))[1])
    past = stored(ar, "own-replay", views, [0, 2], Flat([0.9, 0.5, 0.1]), scene)
    past.remember(Flat([0.9, 0.5, 0.1]), views, Task("b", [3], [6]), scene, ar)
    model = Flat([0.2] * 3)
    loss, _ = cl.step_gradients(model, past, views, [4], 8, scene, ar)
    assert loss.item() == pytest.approx(0.2 ** 2 + 0.7 * (0.7 ** 2 + 0.3 ** 2 + 0.1 ** 2) / 3, rel=1e-5)
    assert [len(id) for id in seen] == [8, 900, 900] and torch.equal(seen[1], seen[2]) and past.memory is None
    assert set((seen[1] // 192).tolist()) == {0, 2, 3} and len((seen[1] % 192).unique()) > 180
    assert close(model.colour.grad, 2 / 3 * (-0.2 + 0.7 * (0.2 - torch.tensor([0.9, 0.5, 0.1]))))


def test_mixed_replays_half_and_half(monkeypatch):
    scene, ar = ring(6, 2), args(learner="mixed", replay_rays=33, buffer_size=100)
    views, calls, render = joined(scene), [], cl.render
    model, past = cl.Model(ar, scene), Past("mixed", ar, 12, 16)
    past.remember(model, views, Task("a", [0, 2], [6]), scene, ar)
    monkeypatch.setattr(cl, "render", lambda *words, **more: (calls.append((words, more)), render(*words, **more))[1])
    cl.step_gradients(model, past, views, [3], 20, scene, ar)
    assert [(words[0] is past.teacher, len(words[1])) for words, _ in calls] == [(False, 20), (True, 17), (False, 33)]
    assert [bool(more.get("perturb")) for _, more in calls] == [True, False, True]                  # what a target is made of stands still
    places = views.c2w[[0, 2], :, 3]
    for words, _ in calls[1:]:
        assert torch.cdist(words[1], places).amin(1).max() == 0
    assert torch.equal(calls[1][0][1], calls[2][0][1][16:]) and torch.equal(calls[1][0][2], calls[2][0][2][16:])
    calls.clear()
    past.memory = Memory(5, "random", 12, 16)                                                       # fewer: more of the other kind
    past.memory.absorb(torch.arange(5), torch.rand(5, 3), torch.rand(5))
    cl.step_gradients(model, past, views, [3], 20, scene, ar)
    assert [len(words[1]) for words, _ in calls] == [20, 28, 33]


def test_mixed_weighs_old_rays_as_replay_does(flat):
    scene, views = flat
    ar = args(replay_weight=0.7, buffer_size=100, replay_rays=33)
    past, model = stored(ar, "mixed", views, [5], Flat([0.9, 0.5, 0.1]), scene), Flat([0.2] * 3)
    loss, _ = cl.step_gradients(model, past, views, [4], 8, scene, ar)
    own, pictures = (0.7 ** 2 + 0.3 ** 2 + 0.1 ** 2) / 3, (128 / 255 - 0.2) ** 2
    assert loss.item() == pytest.approx(0.04 + 0.7 * (17 * own + 16 * pictures) / 33, rel=1e-4)


def test_the_first_task_has_no_past(flat):
    scene, views = flat
    for learner in ("first", *cl.LEARNERS, *cl.POLICIES):
        ar = args(buffer_size=50)
        loss, _ = cl.step_gradients(Flat([0.2] * 3), Past(learner, ar, 12, 16), views, [4], 8, scene, ar)
        assert loss.item() == pytest.approx(0.04, rel=1e-4)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("learner", ["replay", "agem", "mixed"])
def test_newest_losses_are_those_of_the_fine_colour(monkeypatch, dynamic, learner):
    scene, outs, drawn = ring(6, 2), [], []
    ar = args(importance=4, samples=8, dynamic=dynamic, buffer_size=200, replay_rays=32, buffer_draw="weighted", buffer_fill="topk")
    views, render, draw = joined(scene), cl.render, Memory.draw
    model = cl.Model(ar, scene)
    past = stored(ar, learner, views, [0, 2], model, scene)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    before = past.memory.loss.clone()
    monkeypatch.setattr(cl, "render", lambda *words, **more: (outs.append(render(*words, **more)), outs[-1])[1])
    monkeypatch.setattr(Memory, "draw", lambda *words, **more: (drawn.append(draw(*words, **more)), drawn[-1])[1])
    cl.step_gradients(model, past, views, [3], 20, scene, ar)
    i, out = drawn[0], {"rgb": outs[-1]["rgb"][:len(drawn[0])]}
    expected = before.clone()
    if dynamic:
        expected[i] = ((out["rgb"] - past.memory.rgb[i] / 255) ** 2).mean(1).detach()
        assert (expected - before)[i].abs().min() > 0
    assert len(i) == (16 if learner == "mixed" else 32) and close(past.memory.loss, expected) and not past.memory.loss.requires_grad
    rest = torch.ones(200, dtype=torch.bool).index_fill_(0, i, False)
    assert torch.equal(past.memory.loss[rest], before[rest])


def test_agem_by_hand(flat):
    """New pictures say -0.4, -0.4, +0.2 (2/3 of it), stored ones +0.4, 0, 0: the first channel gives way, the others stay."""
    scene, views = flat
    ar = args(buffer_size=50, buffer_draw="topk")
    past = stored(ar, "agem", views, [0], Flat([0.5] * 3), scene)
    past.memory.rgb[:] = torch.tensor([51, 153, 102], dtype=torch.uint8)                            # 0.2, 0.6, 0.4
    views.images[4] = torch.tensor([1.0, 1.0, 0.2])
    model = Flat([0.6, 0.6, 0.4])
    loss, _ = cl.step_gradients(model, past, views, [4], 8, scene, ar)
    assert loss.item() == pytest.approx((0.16 + 0.16 + 0.04) / 3, rel=1e-4)                         # what is stored is not learnt
    assert close(model.colour.grad, 2 / 3 * torch.tensor([0.0, -0.4, 0.2]), atol=1e-6, rtol=0)
    past.memory.rgb[:] = torch.tensor([255, 153, 102], dtype=torch.uint8)                           # now they agree
    model = Flat([0.6, 0.6, 0.4])
    cl.step_gradients(model, past, views, [4], 8, scene, ar)
    assert close(model.colour.grad, 2 / 3 * torch.tensor([-0.4, -0.4, 0.2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("more", [{}, dict(importance=4, samples=8), dict(field="mlp")])
def test_agem_projects_the_gradient_of_the_new_batch(monkeypatch, more):
    """naive and replay draw the same rays at the same seed: their gradients are g and g + r."""
    scene = replace(ring(6, 2, images=torch.ones(8, 12, 16, 3)), bg=torch.full((3,), 0.5))
    scene = replace(scene, train=replace(scene.train, alpha=torch.ones(6, 12, 16)))     # bg counts
    views, found, was_bent = joined(scene), {}, []
    for seed in range(4):
        for learner in ("naive", "replay", "agem"):
            ar = args(buffer_size=100, dynamic=False, **more)
            torch.manual_seed(seed)
            model = cl.Model(ar, scene)
            past = stored(ar, learner, views, [0, 2], model, scene)
            if past.memory:
                past.memory.rgb[:] = 255 * (seed % 2)                                               # the other way, or the same
            torch.manual_seed(seed + 100)
            cl.step_gradients(model, past, views, [3], 64, scene, ar)
            found[learner] = gradient_of(model)
        g = found["naive"]
        r = [b - a for a, b in zip(found["naive"], found["replay"])]
        for a, b in zip(found["agem"], project(g, r)):
            assert close(a, b, atol=2e-6, rtol=1e-3)
        was_bent.append(not all(torch.equal(a, b) for a, b in zip(found["agem"], g)))
    assert was_bent == [True, False] * 2


def test_pictures_without_alpha_are_not_trained_on_the_scene_s_background():
    """Behind each ray stands the target of another ray; with alpha, the scene's background."""
    scene, target = ring(6, 2), torch.rand(50, 3)
    bg = cl.behind(scene, target).bg
    assert bg.shape == (50, 3) and not torch.equal(bg, target)
    assert torch.equal(bg.sort(0).values, target.sort(0).values)
    opaque = replace(scene, train=replace(scene.train, alpha=torch.ones(6, 12, 16)))
    assert cl.behind(opaque, target).bg is scene.bg


def test_a_teacher_does_not_learn(tmp_path):
    for learner, more in itertools.product(("distill", "own-replay", "mixed"), ({}, dict(importance=4, samples=8))):
        scene, ar = ring(6, 2), args(buffer_size=100, **more)
        views = joined(scene)
        model = cl.Model(ar, scene)
        past = stored(ar, learner, views, [0, 2], model, scene)
        before = copy.deepcopy(past.teacher.state_dict())
        assert all(torch.equal(x, model.state_dict()[name]) for name, x in before.items())
        optimiser = torch.optim.Adam(model.parameters(), lr=0.01)
        for _ in range(3):
            if model.grid is not None:
                model.grid.update(lambda p: model.fine(p, None)[0], model.march_step, warm=True)
            optimiser.zero_grad()
            cl.step_gradients(model, past, views, [3], 20, scene, ar)
            optimiser.step()
        assert all(torch.equal(x, before[name]) for name, x in past.teacher.state_dict().items())
        assert not any(torch.equal(a, b) for a, b in zip(past.teacher.parameters(), model.parameters()))
        assert all(p.grad is None and not p.requires_grad for p in past.teacher.parameters())
        again = Past(learner, ar, 12, 16)
        again.load_state_dict(through_a_file(past.state_dict(), tmp_path / "past"), model)
        assert all(torch.equal(x, before[name]) for name, x in again.teacher.state_dict().items()) and again.views == past.views == [0, 2]
        assert all(not p.requires_grad for p in model.parameters()) is False


def test_ewc_pulls_towards_the_old_weights(flat):
    """One ray: h is 2/3 for each channel of what was seen; twice as much after two tasks, around the newest weights."""
    scene, views = flat
    ar = args(learner="ewc", ewc_weight=0.5, rays=1, ewc_rays=7)
    past = stored(ar, "ewc", views, [0, 1], Flat([0.8, 0.5, 0.1]), scene)
    assert close(past.fisher[0], torch.full((3,), 2 / 3)) and past.anchors[0].tolist() == pytest.approx([0.8, 0.5, 0.1])
    past.remember(Flat([0.7, 0.6, 0.2]), views, Task("b", [2], [6]), scene, ar)
    assert close(past.fisher[0], torch.full((3,), 4 / 3)) and past.anchors[0].tolist() == pytest.approx([0.7, 0.6, 0.2])
    model = Flat([0.5] * 3)
    loss, _ = cl.step_gradients(model, past, views, [4], 8, scene, ar)
    assert loss.item() == pytest.approx(0.01 + 0.5 * 0.5 * 4 / 3 * (0.04 + 0.01 + 0.09), rel=1e-4)
    assert close(model.colour.grad, 2 / 3 * 0.1 + 0.5 * 4 / 3 * (0.5 - torch.tensor([0.7, 0.6, 0.2])))


def test_ewc_counts_the_coarse_colour_as_the_loss_does(flat):
    """loss = fine + coarse mean squared error: 2/3 for each channel of both, with one ray."""
    scene, views = flat
    past = stored(args(learner="ewc", rays=1, ewc_rays=3, importance=8), "ewc", views, [0], Flat([0.8] * 3, [0.4] * 3), scene)
    assert close(past.fisher[0], torch.full((3,), 2 / 3)) and close(past.fisher[1], torch.full((3,), 2 / 3))


def test_ewc_looks_at_so_many_old_rays(flat, monkeypatch):
    scene, views = flat
    seen, rays_of = [], cl.rays_of
    monkeypatch.setattr(cl, "rays_of", lambda views, id: (seen.append(id), rays_of(views, id))[1])
    stored(args(rays=64, ewc_rays=640), "ewc", views, [1, 4], Flat([0.8] * 3), scene)
    assert len(seen) == 10 and set((torch.cat(seen) // 192).tolist()) == {1, 4} and sum(map(len, seen)) == 640


FILL_OF = {"replay": "buffer_fill", "mixed": "buffer_fill", "reservoir": "random", "highest": "topk", "stride": "uniform", "tiles": "tiles",
           "agem": "random", "unbounded": "all"}


@pytest.mark.parametrize("learner", ["first", *cl.LEARNERS, *(name for name in cl.POLICIES if name not in cl.LEARNERS)])
def test_what_a_learner_keeps(monkeypatch, learner):
    scene, ar = ring(6, 2), args(buffer_size=60, buffer_fill="uniform", ewc_rays=64)
    views = joined(scene)
    model, past = cl.Model(ar, scene), Past(learner, ar, 12, 16)
    for k, task in enumerate((Task("a", [0, 2], [6]), Task("b", [3, 5], [7]))):
        past.remember(model, views, task, scene, ar)
    fill = FILL_OF.get(learner)
    assert (past.memory is None) == (fill is None) and past.views == [0, 2, 3, 5]
    if fill:
        assert past.memory.fill == (ar.buffer_fill if fill == "buffer_fill" else fill) and past.memory.gone_by == 4 * 192
        assert len(past.memory) == (4 * 192 if learner == "unbounded" else 60)
        at = past.memory.id.long()
        assert set((at // 192).tolist()) <= {0, 2, 3, 5}
        assert torch.equal(past.memory.rgb.float(), (views.images.view(-1, 3)[at] * 255).add(0.5).floor())
    assert (past.teacher is not None) == (learner in ("distill", "own-replay", "mixed")) and (past.fisher is not None) == (learner == "ewc")
    if learner in ("highest", "tiles", "unbounded"):                                                # losses of the model as it was
        own = torch.stack([cl.render_view(model, views, v, scene, ar)["rgb"] for v in range(8)]).view(-1, 3)
        assert close(past.memory.loss, ((own - views.images.view(-1, 3)) ** 2).mean(1)[at])
        assert past.how == ("weighted" if learner == "unbounded" else "random")
    weights = 4 * sum(p.numel() for p in model.parameters())
    model_bytes = weights + 12 ** 3                                                                 # and the occupancy grid
    views_stored = len((past.memory.id // 192).unique()) if past.memory else 0
    expected = {"first": 0, "naive": 0, "none": 0, "distill": model_bytes, "ewc": 2 * weights, "own-replay": model_bytes + 4 * 48,
                "joint": 4 * (3 * 192 + 48), "unbounded": 4 * (192 * 11 + 48), "highest": 60 * 11 + 48 * views_stored,
                "tiles": 60 * 11 + 48 * views_stored}.get(learner, 60 * 7 + 48 * views_stored)
    assert past.bytes(12, 16) == expected + (model_bytes if learner == "mixed" else 0)
    assert not fill or (past.memory.loss is None) == (learner not in ("highest", "tiles", "unbounded"))


@pytest.mark.parametrize("soft", [True, False])
def test_soft_targets_are_the_model_s_own_colours(flat, soft):
    scene, views = flat
    ar = args(buffer_size=40, soft_targets=soft, buffer_fill="topk")
    past = stored(ar, "replay", views, [1, 5], Flat([0.8, 0.6, 0.4]), scene)
    assert (past.memory.rgb == torch.tensor([204, 153, 102] if soft else [26, 26, 26])).all()       # the worse fit: view 1, at 0.1
    assert close(past.memory.loss, torch.full((40,), (0.49 + 0.25 + 0.09) / 3))
    past = stored(args(buffer_size=40, soft_targets=soft), "replay", views, [1, 5], Flat([0.8, 0.6, 0.4]), scene)
    assert past.memory.loss is None and (past.memory.rgb == torch.tensor([204, 153, 102])).all() == soft


@pytest.mark.parametrize("learner", ["replay", "ewc", "mixed", "agem", "none", "joint"])
def test_what_is_kept_comes_back_from_a_file(tmp_path, learner):
    scene, ar = ring(6, 2), args(buffer_size=60, ewc_rays=64)
    views = joined(scene)
    model, past = cl.Model(ar, scene), Past(learner, ar, 12, 16)
    for tasks in ((), ([0, 2],), ([3, 5],)):                                                        # also before there is a past
        for ids in tasks:
            past.remember(model, views, Task("a", ids, [6]), scene, ar)
        again = Past(learner, ar, 12, 16)
        again.load_state_dict(through_a_file(past.state_dict(), tmp_path / "past"), model)
        assert same(past.state_dict(), again.state_dict()) and past.bytes(12, 16) == again.bytes(12, 16)


# -------------------------------------------------------------------------------------------------------------- training

def same(a, b):
    """Bit by bit, in dicts and lists; a NaN equals a NaN."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def words_of(**flags):
    return conftest.words_of({**TINY, **flags})


def timeless(value):
    """Without what depends on the machine."""
    if isinstance(value, dict):
        return {key: timeless(x) for key, x in value.items() if "seconds" not in str(key) and key != "peak_memory_mb"}
    return [timeless(x) for x in value] if isinstance(value, (list, tuple)) else value


def quick(out, **more):
    return cl.train(args(out=str(out), **more))


def checkpoint(out):
    return torch.load(Path(out) / "ckpt.pt", weights_only=True)


COMMON = {"args.json", "env.json", "metrics.jsonl", "summary.json", "ckpt.pt", "forgetting.png", "matrix.svg"}
KEYS = {"method", "scene", "data", "size", "seed", "steps", "train_seconds", "peak_memory_mb", "psnr", "psnr_heldout", "psnr_seen", "ssim",
        "forgetting", "forgetting_seen", "backward_transfer", "backward_transfer_seen", "memory_bytes", "learner", "field", "split", "rows"}


def names_in(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """All learners, by the command line."""
    folder = tmp_path_factory.mktemp("runs") / "offline"
    flags = dict(learner="mixed", compare=cl.LEARNERS, steps=24, eval_every=10, video=True, out=folder)
    done = subprocess.run([sys.executable, str(ROOT / "continual.py"), *words_of(**flags)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "summary.json").read_text()), done


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """All policies."""
    folder = tmp_path_factory.mktemp("runs") / "online"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cl, "load_scene", load)
        cl.train(args(online="reservoir", compare=cl.POLICIES, chunk_steps=16, eval_every=1000, out=str(folder)))
    return folder, json.loads((folder / "summary.json").read_text()), None


def assert_row(row, tasks, lengths=None):
    """Matrices as they should be, and measures that follow from them."""
    for name in ("psnr_heldout", "psnr_seen"):
        assert [len(line) for line in row[name]] == [tasks] * (lengths or tasks), name
        assert all(3 < v < 40 for line in row[name] for v in line)
    assert row["psnr"] == pytest.approx(sum(row["psnr_heldout"][-1]) / tasks) and 0 < row["ssim"] < 1 and row["seconds"] > 0
    for tail in ("", "_seen"):
        P = row["psnr_seen" if tail else "psnr_heldout"]
        if len(P) == 1:
            assert row["forgetting" + tail] is None and row["backward_transfer" + tail] is None
            continue
        lost = [max(P[x][j] for x in range(j, len(P))) - P[-1][j] for j in range(tasks - 1)]
        assert row["forgetting" + tail] == pytest.approx(sum(lost) / len(lost), abs=1e-9)
        assert row["backward_transfer" + tail] == pytest.approx(sum(P[-1][j] - P[j][j] for j in range(tasks - 1)) / (tasks - 1), abs=1e-9)


def test_an_offline_run_s_folder(offline):
    folder, summary, done = offline
    assert names_in(folder) == {*COMMON, "buffer.png", "render.mp4", *(f"test_{v:03d}.png" for v in range(4))}
    assert KEYS <= summary.keys() and set(summary["rows"]) == set(cl.LEARNERS)
    assert (summary["method"], summary["scene"], summary["data"], summary["size"], summary["learner"], summary["split"]) == (
        "continual", "bricks", "builtin", 16, "mixed", "hard")
    for name, row in summary["rows"].items():
        assert_row(row, 2, 1 if name == "joint" else 2)
    main = summary["rows"]["mixed"]
    assert all(main[name] == summary[name] for name in main if name != "seconds")
    assert summary["train_seconds"] == pytest.approx(main["seconds"], abs=0.01)
    first = {json.dumps([row["psnr_heldout"][0], row["psnr_seen"][0]]) for name, row in summary["rows"].items() if name != "joint"}
    assert len(first) == 1                                                                          # the same first task
    last = {json.dumps(row["psnr_seen"][-1]) for row in summary["rows"].values()}
    assert len(last) == len(cl.LEARNERS)                                                            # and seven ways to go on
    assert iio.imread(folder / "test_000.png").shape == (16, 64, 3)
    assert iio.imread(folder / "forgetting.png").shape == (2 * 16 * 2, 2 * 16 * (2 + len(cl.LEARNERS)), 3)
    assert iio.imread(folder / "buffer.png").shape[0] % 16 == 0 and iio.imread(folder / "render.mp4", index=0).shape == (16, 16, 3)
    svg = (folder / "matrix.svg").read_text()
    assert svg.startswith("<svg") and all(name in svg for name in cl.LEARNERS) and f"{main['psnr_seen'][1][0]:.1f}" in svg
    assert done.stderr == "" and f"{summary['psnr']:.2f} dB" in done.stdout and all(f"| {name} |" in done.stdout for name in cl.LEARNERS)
    recorded = json.loads((folder / "args.json").read_text())
    assert recorded["buffer_size"] > 0 and recorded["compare"] == list(cl.LEARNERS) and recorded["lr"] == 0.01


def test_an_offline_run_s_lines(offline):
    folder, summary, _ = offline
    curve = lines(folder / "metrics.jsonl")
    steps = [line["total"] for line in curve]
    assert steps == sorted(set(steps)) and steps[-1] == 24 * 7 + 48 and summary["steps"] == 48
    assert all(math.isfinite(line["loss"]) and len(line["psnr_seen"]) == len(line["psnr_heldout"]) == 2 for line in curve)
    order = list(dict.fromkeys(line["learner"] for line in curve))
    assert order[0] == "first" and order[-1] == "mixed" and set(order) == {"first", *cl.LEARNERS}
    for name in order:
        mine = [line for line in curve if line["learner"] == name]
        assert [line["step"] for line in mine] == {"joint": [10, 20, 30, 40, 48], "first": [10, 20, 24]}.get(name, [34, 44, 48])
        seconds = [line["train_seconds"] for line in mine]
        assert seconds == sorted(seconds) and {line["task"] for line in mine} == {1 if name == "first" else 2}
        row = summary["rows"].get(name, summary["rows"]["naive"])
        assert mine[-1]["psnr_seen"] == row["psnr_seen"][0 if name == "first" else -1]
        assert all(("psnr" in line) == (name in ("first", "mixed")) for line in mine)
    assert curve[-1]["psnr"] == summary["psnr"] and curve[2]["psnr"] == curve[2]["psnr_heldout"][0]
    assert curve[2]["psnr_seen"][0] > curve[0]["psnr_seen"][0]                                        # it learns


def test_an_online_run_s_folder(online):
    folder, summary, _ = online
    assert names_in(folder) == {*COMMON, "buffer.png", "chunks.gif", *(f"test_{v:03d}.png" for v in range(6))}
    assert KEYS <= summary.keys() and set(summary["rows"]) == set(cl.POLICIES)
    assert (summary["learner"], summary["split"]) == ("reservoir", "stream")
    for row in summary["rows"].values():
        assert_row(row, 3)
    assert len({json.dumps(row["psnr_seen"][0]) for row in summary["rows"].values()}) == 1          # the first chunk has no past
    assert len({json.dumps(row["psnr_seen"][-1]) for row in summary["rows"].values()}) == len(cl.POLICIES)
    assert len(iio.imread(folder / "chunks.gif", index=None)) == 3
    curve = lines(folder / "metrics.jsonl")
    assert [line["total"] for line in curve] == list(range(16, 48 * len(cl.POLICIES) + 1, 16)) and curve[-1]["learner"] == "reservoir"
    assert [line["step"] for line in curve] == [16, 32, 48] * len(cl.POLICIES)
    assert [line["task"] for line in curve] == [1, 2, 3] * len(cl.POLICIES)


def test_memory_bytes_by_hand(offline, online):
    folder, summary, _ = offline
    B = json.loads((folder / "args.json").read_text())["buffer_size"]
    seen, = {len(task.seen) for task in cl.make_tasks(bricks(), args())[:1]}
    assert B == round(0.12 * seen * 256)
    rows = 125 + 1000 + 1024                                                                        # 5^3, 10^3 corners, and a hashed table
    weights = 4 * (rows * 2 + (6 * 64 + 64) + (64 * 16 + 16) + (31 * 64 + 64) + (64 * 3 + 3))
    model = weights + 12 ** 3                                                                       # and the occupancy grid
    expected = {"naive": 0, "distill": model, "ewc": 2 * weights, "replay": 7 * B + 48 * seen, "own-replay": model + 48 * seen,
                "joint": seen * (3 * 256 + 48), "mixed": 7 * B + model + 48 * seen}
    found = {name: row["memory_bytes"] for name, row in summary["rows"].items()}
    assert found == expected
    folder, summary, _ = online
    B = json.loads((folder / "args.json").read_text())["buffer_size"]
    found = {name: row["memory_bytes"] for name, row in summary["rows"].items()}
    seen = sum(len(task.seen) for task in cl.make_tasks(bricks(), args(online="none"))[:-1])
    assert B == round(0.12 * seen * 256) and found["none"] == 0 and found["unbounded"] == seen * (256 * 11 + 48)
    for name, ray in {"reservoir": 7, "agem": 7, "mixed": 7, "highest": 11, "tiles": 11}.items():
        assert ray * B < found[name] - (model if name == "mixed" else 0) <= ray * B + seen * 48, name
    assert found["stride"] == 7 * B + seen * 48


@pytest.mark.parametrize("main, compare", [("naive", ()), ("replay", ("ewc", "naive")), ("joint", ("own-replay",))])
def test_a_row_does_not_depend_on_who_else_is_compared(offline, tmp_path, main, compare):
    rows = offline[1]["rows"]
    again = quick(tmp_path / "a", learner=main, compare=compare, steps=24, eval_every=24)["rows"]
    assert set(again) == {main, *compare}
    for name, row in again.items():
        assert timeless(common.to_json(row)) == timeless(rows[name]), name


def test_a_policy_s_row_does_not_depend_on_who_else_is_compared(online, tmp_path):
    again = quick(tmp_path / "a", online="tiles", compare=("none",), chunk_steps=16, eval_every=7)["rows"]
    assert timeless(common.to_json(again)) == {name: timeless(online[1]["rows"][name]) for name in ("none", "tiles")}


def test_moments_that_go_on_are_those_of_the_first_task_for_each_learner(tmp_path):
    alone, beside = (quick(tmp_path / str(len(others)), learner="replay", compare=others, resume_optimizer=True)
                     for others in ((), ("naive", "ewc")))
    assert timeless(alone["rows"]["replay"]) == timeless(beside["rows"]["replay"])


@pytest.mark.parametrize("freeze", ["table", "mlps"])
def test_what_rests_after_the_first_task(tmp_path, freeze):
    quick(tmp_path / "a", learner="mixed", compare=("naive",), freeze=freeze, tasks=3)
    state = checkpoint(tmp_path / "a")
    first, last = state["results"]["first"]["model"], state["model"]
    for name in first:
        if name.split(".")[1] in ("table", "geometry", "colour"):
            rests = ("table" in name) == (freeze == "table")
            assert torch.equal(first[name], last[name]) == rests, name


def test_seeds_differ_and_repeat(monkeypatch, tmp_path):
    born, model = [], cl.Model
    monkeypatch.setattr(cl, "Model", lambda *words: (born.append(model(*words)), copy.deepcopy(born[-1]))[1])
    runs = [timeless(quick(tmp_path / name, learner="replay", compare=(), seed=seed)) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    assert runs[0] == runs[1] and runs[0]["psnr_seen"] != runs[2]["psnr_seen"]
    assert len({float(one.fine.table.detach().double().sum()) for one in born}) == 2                # one newborn for each seed


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_replay_forgets_less_than_nothing_kept(tmp_path, seed):
    """Small tables: the second side's rays overwrite what the first one stored. Five seeds: naive 0.8 to 1.5 dB, replay none."""
    rows = quick(tmp_path / "a", learner="replay", compare=("naive",), seed=seed, steps=100, rays=128, replay_rays=128, levels=4,
                 log2_table=8, finest=32, samples=32, eval_every=1000, eval_views=4)["rows"]
    naive, replay = rows["naive"], rows["replay"]
    assert naive["forgetting_seen"] > 0.4 and naive["backward_transfer_seen"] == pytest.approx(-naive["forgetting_seen"])
    assert replay["forgetting_seen"] < 0.3 and replay["psnr_seen"][1][0] > naive["psnr_seen"][1][0] + 1
    assert min(row["psnr_seen"][1][1] for row in rows.values()) > naive["psnr_seen"][0][1] + 3      # both learn the second side


def rates(monkeypatch, out, **flags):
    """Of every optimiser step: the rate over --lr, and how many steps Adam's moments had seen."""
    found, step = [], torch.optim.Adam.step

    def recorded(optimiser, *words, **more):
        group = optimiser.param_groups[0]
        state = optimiser.state.get(group["params"][0])
        found.append((group["lr"] / 0.01, int(state["step"]) if state else 0))
        return step(optimiser, *words, **more)
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", recorded)
        quick(out, steps=8, chunk_steps=8, **flags)
    return [rate for rate, _ in found], [count for _, count in found]


def test_each_task_starts_its_optimiser_afresh(monkeypatch, tmp_path):
    up = lambda t: min((t + 1) / 4, 1)
    down = [0.55 + 0.45 * math.cos(math.pi * t / 8) for t in range(8)]
    fresh = [up(t) * down[t] for t in range(8)]
    rate, count = rates(monkeypatch, tmp_path / "a", learner="naive", compare=("replay",))
    assert rate == pytest.approx(fresh * 3) and count == [*range(8)] * 3
    rate, count = rates(monkeypatch, tmp_path / "b", learner="naive", compare=("replay",), resume_optimizer=True)
    assert rate == pytest.approx(fresh + [0.1] * 16) and count == [*range(8), *range(8, 16), *range(8, 16)]
    rate, count = rates(monkeypatch, tmp_path / "c", learner="naive", compare=(), resume_optimizer=True, schedule="steps")
    assert rate[8:] == pytest.approx([0.125] * 8)
    rate, count = rates(monkeypatch, tmp_path / "d", learner="joint", compare=("naive",), resume_optimizer=True)
    assert rate[16:] == pytest.approx([up(t) * (0.55 + 0.45 * math.cos(math.pi * t / 16)) for t in range(16)])
    assert count[16:] == [*range(16)]
    rate, count = rates(monkeypatch, tmp_path / "e", online="none", compare=("stride",))
    stream = [up(t) for t in range(8)] + [1.0] * 16
    assert rate == pytest.approx(stream * 2) and count == [*range(24)] * 2


def test_the_occupancy_grid_is_looked_at_whole_by_newborns(monkeypatch, tmp_path):
    found, update = [], cl.OccupancyGrid.update
    monkeypatch.setattr(cl.OccupancyGrid, "update", lambda *words, warm: (found.append(warm), update(*words, warm=warm))[1])
    quick(tmp_path / "a", learner="joint", compare=("naive",), steps=17)
    assert found == [True] * 2 + [False] * 2 + [True] * 3                                           # every 16 steps of a lesson


def test_joint_sees_as_many_rays_as_the_first_task_and_replay(monkeypatch, tmp_path):
    calls, step = [], cl.step_gradients

    def recorded(model, past, views, present, n, scene, ar):
        calls.append((past.learner, tuple(present), n))
        return step(model, past, views, present, n, scene, ar)
    monkeypatch.setattr(cl, "step_gradients", recorded)
    quick(tmp_path / "a", learner="joint", compare=("naive",), tasks=3, split="released")
    tasks = cl.make_tasks(bricks(), args(tasks=3, split="released"))
    assert [n for learner, _, n in calls if learner == "joint"] == [64] * 6 + [96] * 12
    assert {ids for learner, ids, _ in calls if learner == "joint"} == {tuple(v for task in tasks for v in task.seen)}
    assert [ids for learner, ids, _ in calls if learner != "joint"] == [tuple(task.seen) for task in tasks for _ in range(6)]
    assert {n for learner, _, n in calls if learner != "joint"} == {64}


# ------------------------------------------------------------------------------------------ killed, resumed, and not harmed

FLAGS = {
    "all learners": dict(learner="mixed", compare=cl.LEARNERS), "joint alone": dict(learner="joint", compare=()),
    "three tasks": dict(tasks=3, learner="replay", compare=("ewc", "distill", "own-replay")),
    "three tasks, moments go on": dict(tasks=3, learner="mixed", compare=("naive",), resume_optimizer=True),
    "online": dict(online="mixed", compare=("highest", "none")), "agem": dict(online="agem", compare=()),
    "online weighted": dict(online="tiles", buffer_draw="weighted", compare=("unbounded",), schedule="constant"),
    "mlp": dict(field="mlp", compare=("ewc",), depth=7),
    "importance": dict(field="mlp", importance=6, samples=8, compare=("ewc", "replay"), learner="distill"),
    "table rests": dict(freeze="table", learner="mixed", compare=("ewc",)),
    "mlps rest": dict(freeze="mlps", online="agem", compare=("none",)),
    "released": dict(split="released", schedule="steps", learner="replay", buffer_fill="topk", buffer_draw="weighted", centre=0.3,
                     compare=()),
    "tiles, soft": dict(learner="replay", buffer_fill="tiles", buffer_draw="topk", soft_targets=True, compare=()),
    "uniform, not dynamic": dict(learner="replay", buffer_fill="uniform", buffer_draw="weighted", dynamic=False, exploration=1.0,
                                 compare=("mixed",)),
}


def kill_after(monkeypatch, steps, run):
    """KeyboardInterrupt in the step after so many; -> whether it came to that."""
    finite, count = cl.check_finite, itertools.count(1)

    def check(loss, t):
        if next(count) > steps:
            raise KeyboardInterrupt
        return finite(loss, t)
    with monkeypatch.context() as patch:
        patch.setattr(cl, "check_finite", check)
        try:
            run()
        except KeyboardInterrupt:
            return True
    return False


@pytest.mark.parametrize("name", FLAGS)
def test_killed_again_and_again_ends_bit_equal(monkeypatch, tmp_path, name):
    """Killed every fourth step, where every fourth one of six has a checkpoint: within tasks, and at the end of each lesson."""
    monkeypatch.setattr(cl, "check_not_empty", lambda *_: None)                                     # an MLP that was just born may be empty
    undisturbed = quick(tmp_path / "a", **FLAGS[name])
    for kills in range(200):
        torch.manual_seed(99 + kills)
        if not kill_after(monkeypatch, 4, lambda: quick(tmp_path / "b", resume=kills > 0, **FLAGS[name])):
            break
        with open(tmp_path / "b/metrics.jsonl", "a") as file:                                       # written, but its checkpoint was not
            file.write('{"step": 9, "total": 99999, "psnr": 99}\n{"st')
    total = sum(lesson.steps for lesson in cl.plan(args(**FLAGS[name]), FLAGS[name].get("tasks", 3 if FLAGS[name].get("online") else 2)))
    assert total / 6 <= kills <= total / 2 and checkpoint(tmp_path / "b")["place"]["t"] == 0
    resumed = json.loads((tmp_path / "b/summary.json").read_text())
    assert timeless(resumed) == timeless(common.to_json(undisturbed))
    a, b = (timeless(checkpoint(tmp_path / run)) for run in "ab")
    assert a.keys() == b.keys() >= {"model", "optimiser", "past", "random", "place", "results"}
    for key in a.keys() - {"args"}:
        assert same(a[key], b[key]), key
    assert timeless(lines(tmp_path / "a/metrics.jsonl")) == timeless(lines(tmp_path / "b/metrics.jsonl"))
    assert checkpoint(tmp_path / "b")["seconds"] >= max(row["seconds"] for row in resumed["rows"].values())
    for picture in ("forgetting.png", "test_000.png", "matrix.svg"):
        assert (tmp_path / "a" / picture).read_bytes() == (tmp_path / "b" / picture).read_bytes()
    assert math.isfinite(resumed["psnr"]) and all(math.isfinite(line["loss"]) for line in lines(tmp_path / "a/metrics.jsonl"))
    assert ("buffer.png" in names_in(tmp_path / "a")) == (checkpoint(tmp_path / "a")["past"]["memory"] is not None)


def test_killed_between_a_line_and_its_checkpoint(monkeypatch, tmp_path):
    flags = dict(learner="replay", compare=("naive",))
    undisturbed, save = quick(tmp_path / "a", **flags), common.Run.save
    for saves in (1, 2, 3, 6):
        count, out = itertools.count(1), tmp_path / f"b{saves}"

        def power_cut(run, state):
            if next(count) == saves:
                raise KeyboardInterrupt
            save(run, state)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(common.Run, "save", power_cut)
            quick(out, **flags)
        assert timeless(quick(out, resume=True, **flags)) == timeless(undisturbed), saves
        assert timeless(lines(tmp_path / "a/metrics.jsonl")) == timeless(lines(out / "metrics.jsonl")), saves


@pytest.mark.parametrize("flags", [dict(), dict(online="stride", compare=("none",)), dict(learner="joint", compare=()),
                                   dict(field="mlp", importance=6, samples=8, learner="ewc", compare=())])
def test_eval_only_gives_the_same_scores(monkeypatch, tmp_path, flags):
    before = quick(tmp_path / "a", **flags)
    names = ("ckpt.pt", "metrics.jsonl", "args.json", "forgetting.png", "test_001.png")
    kept = {name: (tmp_path / "a" / name).read_bytes() for name in names}
    (tmp_path / "a/test_001.png").unlink()
    torch.manual_seed(77)
    for how in (dict(eval_only=True), dict(resume=True)):                                           # finished: nothing is left to train
        again = quick(tmp_path / "a", **how, **flags)
        assert timeless(again) == timeless(before) and again["train_seconds"] == before["train_seconds"]
        assert all((tmp_path / "a" / name).read_bytes() == content for name, content in kept.items())


def test_eval_only_renders_again(tmp_path):
    before = quick(tmp_path / "a")
    state = checkpoint(tmp_path / "a")
    row = state["results"]["rows"]["mixed"]
    row["psnr_seen"][-1], row["psnr_heldout"][-1], row["ssim"] = [1.0, 2.0], [3.0, 4.0], 5.0
    torch.save(state, tmp_path / "a/ckpt.pt")
    assert timeless(quick(tmp_path / "a", eval_only=True)) == timeless(before)


command = functools.partial(conftest.command, cl)


def test_eval_only_of_an_unfinished_run_is_one_line(monkeypatch, capsys, tmp_path):
    kill_after(monkeypatch, 8, lambda: quick(tmp_path / "a"))
    before = content(tmp_path / "a")
    assert_refused(command(monkeypatch, capsys, *words_of(out=tmp_path / "a"), "--eval-only"), "--resume")
    assert content(tmp_path / "a") == before


def test_a_run_is_not_harmed_by_another(monkeypatch, capsys, tmp_path):
    out = tmp_path / "a"
    base = words_of(out=out)
    assert command(monkeypatch, capsys, *base)[0] == 0
    before = content(out)
    assert_refused(command(monkeypatch, capsys, *base), "holds a run")
    for words in ("--seed 5", "--steps 8", "--tasks 3", "--learner naive", "--compare ewc", "--buffer-size 7", "--levels 2", "--split released",
                  "--eval-views 2", "--online none --compare none"):
        for how in ("--resume", "--eval-only"):
            assert_refused(command(monkeypatch, capsys, *base, how, *words.split()), f"{words.split()[0][2:].replace('-', '_')} was")
    assert content(out) == before
    (tmp_path / "b").mkdir()
    common.Run("other_method", "bricks", tmp_path / "b", {"preset": "quick", "data": ""}).save({"step": 1})
    copied = content(tmp_path / "b")
    assert_refused(command(monkeypatch, capsys, *words_of(out=tmp_path / "b"), "--resume"), "other_method")
    assert content(tmp_path / "b") == copied
    for how in ("--eval-only", "--resume"):
        assert_refused(command(monkeypatch, capsys, *words_of(out=tmp_path / "new"), how), "ckpt.pt")
    assert not (tmp_path / "new").exists()
    whole = (out / "ckpt.pt").read_bytes()
    (out / "ckpt.pt").write_bytes(whole[:len(whole) // 2])
    assert_refused(command(monkeypatch, capsys, *base, "--resume"), "ckpt.pt")


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(monkeypatch, tmp_path):
    step, calls = cl.step_gradients, itertools.count(1)

    def spoil(*words):
        loss, acc = step(*words)
        return (loss * math.nan if next(calls) == 6 else loss), acc
    with monkeypatch.context() as patch, pytest.raises(common.UserError, match="not finite"):
        patch.setattr(cl, "step_gradients", spoil)
        quick(tmp_path / "a")
    assert checkpoint(tmp_path / "a")["place"] == {"lesson": 0, "t": 4}
    assert math.isfinite(quick(tmp_path / "a", resume=True, lr=1e-3)["psnr"])                       # as the message says


WRONG = {
    "--steps 0": "--steps", "--rays -3": "--rays", "--replay-rays 0": "--replay-rays", "--replay-weight -1": "--replay-weight",
    "--replay-weight nan": "--replay-weight", "--distill-weight inf": "--distill-weight", "--ewc-weight nan": "--ewc-weight",
    "--ewc-rays 0": "--ewc-rays", "--buffer-size 0": "--buffer-size", "--buffer-size -4": "--buffer-size",
    "--buffer-size 100000000": "--buffer-size", "--exploration 1.5": "--exploration", "--exploration nan": "--exploration",
    "--centre -0.1 --buffer-draw weighted": "--centre", "--centre nan --buffer-draw weighted": "--centre", "--centre 0.3": "--centre",
    "--centre 0.3 --buffer-draw topk": "--centre", "--buffer-draw weighted --learner naive": "--buffer-draw weighted",
    "--buffer-draw topk --learner ewc --compare distill joint": "--buffer-draw topk",
    "--online none --compare none --buffer-draw weighted": "--buffer-draw", "--compare reservoir": "--compare reservoir",
    "--online none --compare naive": "--compare naive", "--compare nobody": "nobody", "--learner reservoir": "reservoir",
    "--online joint": "joint", "--tasks 1": "--tasks 1", "--tasks 0": "--tasks", "--tasks -2": "--tasks", "--tasks 60": "--tasks 60",
    "--split left": "left", "--online none --chunk 100": "--chunk", "--online none --chunk 2": "--chunk",
    "--online none --chunk 0": "--chunk", "--online none --chunk-steps 0": "--chunk-steps", "--levels 0": "--levels",
    "--features 0": "--features", "--log2-table 40": "--log2-table", "--log2-table 0": "--log2-table", "--base 0": "--base",
    "--base 300 --finest 200": "--finest", "--width 0": "--width", "--depth 0": "--depth", "--frequencies -1": "--frequencies",
    "--samples 0": "--samples", "--samples -8": "--samples", "--importance -1": "--importance", "--grid 0": "--grid", "--lr 0": "--lr",
    "--lr nan": "--lr", "--lr -1e-3": "--lr", "--lr-warmup 0": "--lr-warmup", "--eval-every 0": "--eval-every",
    "--eval-views -1": "--eval-views", "--seed -1": "--seed", "--size 8": "--size", "--size 0": "--size", "--schedule linear": "linear",
    "--field grid": "grid", "--buffer-fill newest": "newest", "--resume": "--out", "--eval-only": "--out",
    "--device nonsense": "--device", "--bogus 3": "--bogus", "--preset huge": "--preset", "--background pink": "pink",
    "--steps many": "many", "--importance 8": "--importance", "--freeze table --field mlp": "--freeze",
    "--freeze all": "all",
}


@pytest.mark.parametrize("words", WRONG)
def test_wrong_flags_are_one_line(monkeypatch, capsys, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    given = words.split()
    base = {"--steps": 2, "--size": 16, "--scene": "bricks", "--rays": 8}
    base = [word for name, value in base.items() if name not in given for word in (name, value)]
    assert_refused(command(monkeypatch, capsys, *base, *given), WRONG[words])
    assert not list(tmp_path.iterdir())


def test_a_buffer_for_more_than_the_past_is_refused(monkeypatch, capsys, tmp_path):
    most = len(cl.make_tasks(bricks(), args())[0].seen) * 256
    assert_refused(command(monkeypatch, capsys, *words_of(out=tmp_path / "a", buffer_size=most + 1)), f"--buffer-size {most + 1}", most)
    assert not (tmp_path / "a").exists()
    result = quick(tmp_path / "a", learner="replay", compare=(), buffer_size=most, steps=1)
    assert result["memory_bytes"] == 7 * most + 48 * most // 256


def test_a_name_twice_in_compare_is_trained_once():
    once, twice = (cl.plan(args(learner="replay", compare=names), 3) for names in (("naive", "ewc"), ("naive", "ewc", "naive", "replay")))
    assert once == twice


@pytest.mark.parametrize("flags", [dict(learner="mixed", replay_rays=1), dict(learner="naive", rays=1), dict(online="mixed", replay_rays=1),
                                   dict(learner="replay", buffer_size=1), dict(levels=1), dict(grid=1), dict(field="mlp", depth=1)])
def test_the_smallest_flags_work(monkeypatch, tmp_path, flags):
    monkeypatch.setattr(cl, "check_not_empty", lambda *_: None)
    assert math.isfinite(quick(tmp_path / "a", compare=(), steps=2, chunk_steps=2, **flags)["psnr"])


def test_a_forward_facing_scene_is_refused(monkeypatch, capsys, tmp_path):
    write_llff(tmp_path / "line")
    for more in ((), ("--online", "none")):
        assert_refused(command(monkeypatch, capsys, *words_of(scene=tmp_path / "line", out=tmp_path / "a"), *more), "forward-facing")
    assert not (tmp_path / "a").exists()


def test_real_fern_is_refused(monkeypatch, capsys, tmp_path):
    data = real("nerf_llff_data/fern")
    assert_refused(command(monkeypatch, capsys, *words_of(scene="fern", data=data, out=tmp_path / "a")), "fern", "forward-facing")
    assert not (tmp_path / "a").exists()


def test_help_names_every_flag(monkeypatch, capsys):
    status, out, _ = command(monkeypatch, capsys, "--help")
    assert status == 0
    for name in asdict(Args()):
        assert name == "preset" or f"--{name.replace('_', '-')}" in out, name


def test_presets_pass_their_own_checks():
    for name, preset in cl.PRESETS.items():
        assert preset.preset == name
        cl.check(replace(preset, compare=preset.compare or ("naive", "joint"), lr=preset.lr or 1e-2))
