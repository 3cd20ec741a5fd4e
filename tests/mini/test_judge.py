"""The judge of pictures: how it counts, and that it learns."""
from __future__ import annotations

import pytest
import torch

from nsdray.mini.judge import NOTHING, Contents, Judge, compare, contents, train_judge
from nsdray.mini.loop import held_out
from nsdray.nsd.scenes import COLOURS, Scene, SceneObject, make_scene

BALL, HOUSE, CAR = range(3)
RED, ORANGE, YELLOW = range(3)


def shows(*objects: tuple[int, int, float]) -> Contents:
    """One picture, of objects (kind, colour, x) from the left."""
    objects = (*objects, (NOTHING, RED, 0.7))[:2]
    kind, colour, x = (torch.tensor([values]) for values in zip(*objects))
    return Contents(kind, colour, x)


def test_contents_of_a_scene():
    things = (SceneObject("car", "yellow", 0.4, 0.7, 0.5), SceneObject("ball", "red", 0.4, 0.3, 0.5))
    found = contents([Scene("sea", 0.5, (0, 0, 0), things), Scene("sea", 0.5, (0, 0, 0), things[:1])])
    assert found.kind.tolist() == [[BALL, CAR], [CAR, NOTHING]]
    assert found.colour.tolist() == [[RED, YELLOW], [YELLOW, 0]]
    torch.testing.assert_close(found.x, torch.tensor([[0.3, 0.7], [0.7, 0.0]]))


def test_objects_are_counted():
    seen = shows((BALL, RED, 0.3), (HOUSE, ORANGE, 0.7))
    assert compare(seen, seen) == (1, 1, 1)
    assert compare(seen, shows((BALL, RED, 0.4), (HOUSE, RED, 0.6))) == (1, 1, 0.5)
    assert compare(seen, shows((HOUSE, ORANGE, 0.3), (BALL, RED, 0.7))) == (1, 0, 0)  # swapped
    assert compare(seen, shows((BALL, ORANGE, 0.3), (BALL, ORANGE, 0.7))) == (0.5, 0.5, 0.5)
    assert compare(seen, shows((HOUSE, RED, 0.3))) == (0.5, 0, 0.5)
    alone = shows((CAR, YELLOW, 0.5))
    assert compare(alone, shows((CAR, YELLOW, 0.7))) == (1, 0, 0)
    assert compare(alone, shows((BALL, YELLOW, 0.3), (CAR, RED, 0.6))) == (1, 1, 0)
    twins = shows((CAR, RED, 0.3), (CAR, RED, 0.7))
    assert compare(twins, shows((CAR, RED, 0.3))) == (0.5, 0.5, 0.5)
    assert compare(twins, twins) == (1, 1, 1)


def test_pictures_are_looked_at():
    _, pictures = held_out(64, 3)
    shown = Judge().eval().look(pictures)
    assert all(value.shape == (3, 2) for value in shown) and shown.kind.max() <= NOTHING and shown.colour.max() < len(COLOURS)


@pytest.mark.slow
def test_it_learns_what_is_in_a_scene():
    _, pictures = held_out(64, 500)
    scores = compare(contents([make_scene(0, "card", i) for i in range(500)]), train_judge().look(pictures))
    assert min(scores) > 0.95
