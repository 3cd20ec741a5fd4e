"""Drawn scenes with captions: the miniature NSD's stimuli, and what the mini models learn from.

A scene is a two-part background (say, sky over sea) with one or two large, flat-coloured objects of ten kinds. It is
drawn at four times its size and scaled down. A scene follows from (seed, purpose, index) alone, so stimuli
(purpose "stimuli") and the mini models' training scenes (purpose "training") never share one.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from nsdray.seeds import rng

KINDS = ("ball", "house", "car", "tree", "boat", "fish", "flower", "star", "mug", "umbrella")
COLOURS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 216, 60),
    "green": (58, 160, 72),
    "blue": (48, 96, 200),
    "purple": (136, 68, 168),
    "white": (244, 244, 240),
    "black": (38, 38, 44),
}
BACKGROUNDS = {  # name: (upper colour, lower colour)
    "meadow": ((150, 205, 240), (120, 180, 90)),
    "beach": ((176, 222, 240), (226, 202, 150)),
    "sea": ((196, 226, 244), (40, 120, 160)),
    "desert": ((244, 206, 160), (206, 150, 92)),
    "night": ((22, 26, 66), (48, 60, 66)),
    "snow": ((172, 188, 212), (236, 242, 248)),
    "street": ((200, 202, 206), (110, 110, 116)),
    "room": ((232, 206, 196), (150, 104, 78)),
}
SUPERSAMPLING = 4
N_CAPTIONS = 5


@dataclass(frozen=True)
class SceneObject:
    """One object. Lengths are fractions of the picture's width."""

    kind: str
    colour: str
    size: float
    x: float
    """Centre, from the left."""
    y: float
    """Centre, from the top."""


@dataclass(frozen=True)
class Scene:
    """A background with its horizon, and one or two objects, the farther one first."""

    background: str
    horizon: float
    """Height of the border between the two parts, from the top, as a fraction of the picture's height."""
    tint: tuple[int, int, int]
    """Added to both background colours, so that no two meadows are quite alike."""
    objects: tuple[SceneObject, ...]


def make_scene(seed: int, purpose: str, index: int) -> Scene:
    """Scene number index of the stream (seed, purpose)."""
    random = rng(seed, "scene", purpose, index)
    objects = []
    n_objects = int(random.integers(1, 3))
    for i in range(n_objects):
        size = random.uniform(0.42, 0.58) if n_objects == 1 else random.uniform(0.36, 0.48)
        low, high = size / 2, 1 - size / 2
        if n_objects == 1:
            x = random.uniform(low, high)
        else:  # one in the left half, one in the right
            x = random.uniform(low, 0.36) if i == 0 else random.uniform(0.64, high)
        objects.append(
            SceneObject(
                kind=str(random.choice(KINDS)),
                colour=str(random.choice(list(COLOURS))),
                size=float(size),
                x=float(x),
                y=float(random.uniform(max(low, 0.3), min(high, 0.75))),
            )
        )
    order = random.permutation(n_objects)
    return Scene(
        background=str(random.choice(list(BACKGROUNDS))),
        horizon=float(random.uniform(0.35, 0.7)),
        tint=tuple(int(t) for t in random.integers(-14, 15, 3)),
        objects=tuple(objects[i] for i in order),
    )


def draw_scene(scene: Scene, size: int = 64) -> np.ndarray:
    """Draw a scene: uint8 (size, size, 3), values 0..255."""
    side = size * SUPERSAMPLING
    upper, lower = (
        tuple(int(np.clip(c + t, 0, 255)) for c, t in zip(colour, scene.tint))
        for colour in BACKGROUNDS[scene.background]
    )
    picture = Image.new("RGB", (side, side), upper)
    canvas = ImageDraw.Draw(picture)
    canvas.rectangle((0, int(scene.horizon * side), side, side), fill=lower)
    for thing in scene.objects:
        DRAWERS[thing.kind](_Pen(canvas, thing, side), COLOURS[thing.colour])
    return np.asarray(picture.resize((size, size), Image.Resampling.BOX))


class _Pen:
    """Draws in an object's own coordinates: x and y from -1 to 1, y downwards."""

    def __init__(self, canvas: ImageDraw.ImageDraw, thing: SceneObject, side: int):
        self.canvas, self.scale = canvas, thing.size * side / 2
        self.x, self.y = thing.x * side, thing.y * side

    def _at(self, *xy: float) -> list[float]:
        return [(self.x, self.y)[i % 2] + v * self.scale for i, v in enumerate(xy)]

    def box(self, x0: float, y0: float, x1: float, y1: float, colour: tuple) -> None:
        self.canvas.rectangle(self._at(x0, y0, x1, y1), fill=colour)

    def oval(self, x0: float, y0: float, x1: float, y1: float, colour: tuple) -> None:
        self.canvas.ellipse(self._at(x0, y0, x1, y1), fill=colour)

    def polygon(self, *xy: float, colour: tuple) -> None:
        points = self._at(*xy)
        self.canvas.polygon(list(zip(points[::2], points[1::2])), fill=colour)

    def pie(self, x0: float, y0: float, x1: float, y1: float, start: float, end: float, colour: tuple) -> None:
        self.canvas.pieslice(self._at(x0, y0, x1, y1), start, end, fill=colour)

    def ring(self, x0: float, y0: float, x1: float, y1: float, width: float, colour: tuple) -> None:
        self.canvas.ellipse(self._at(x0, y0, x1, y1), outline=colour, width=int(width * self.scale))


def _shade(colour: tuple, factor: float) -> tuple:
    """Darker for factor < 1, lighter for factor > 1."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)
    return tuple(int(255 - (255 - c) * (2 - factor)) for c in colour)


_WOOD, _GLASS, _DARK, _LEAF = (120, 78, 48), (190, 226, 240), (44, 44, 50), (56, 128, 60)


def _ball(pen: _Pen, colour: tuple) -> None:
    pen.oval(-0.9, -0.9, 0.9, 0.9, colour)
    pen.box(-0.86, -0.16, 0.86, 0.16, _shade(colour, 0.6 if sum(colour) > 200 else 1.6))


def _house(pen: _Pen, colour: tuple) -> None:
    pen.box(-0.75, -0.2, 0.75, 0.95, colour)
    pen.polygon(-1, -0.2, 0, -1, 1, -0.2, colour=_shade(colour, 0.55 if sum(colour) > 200 else 1.5))
    pen.box(-0.2, 0.3, 0.2, 0.95, _WOOD)
    pen.box(-0.62, -0.02, -0.3, 0.26, _GLASS)
    pen.box(0.3, -0.02, 0.62, 0.26, _GLASS)


def _car(pen: _Pen, colour: tuple) -> None:
    pen.polygon(-0.6, 0.0, -0.38, -0.5, 0.38, -0.5, 0.62, 0.0, colour=colour)
    pen.polygon(-0.44, -0.04, -0.3, -0.4, 0.3, -0.4, 0.46, -0.04, colour=_GLASS)
    pen.box(-1, -0.05, 1, 0.42, colour)
    for x in (-0.55, 0.55):
        pen.oval(x - 0.28, 0.14, x + 0.28, 0.7, _DARK)
        pen.oval(x - 0.12, 0.3, x + 0.12, 0.54, (200, 200, 204))


def _tree(pen: _Pen, colour: tuple) -> None:
    pen.box(-0.14, 0.2, 0.14, 1, _WOOD)
    pen.oval(-0.8, -1, 0.8, 0.4, colour)


def _boat(pen: _Pen, colour: tuple) -> None:
    pen.box(-0.05, -1, 0.05, 0.4, _WOOD)
    pen.polygon(0.1, -0.95, 0.1, 0.25, 0.85, 0.25, colour=(244, 244, 240))
    pen.polygon(-0.1, -0.7, -0.1, 0.25, -0.7, 0.25, colour=(222, 222, 214))
    pen.polygon(-1, 0.4, 1, 0.4, 0.65, 0.95, -0.65, 0.95, colour=colour)


def _fish(pen: _Pen, colour: tuple) -> None:
    pen.polygon(0.4, 0, 1, -0.55, 1, 0.55, colour=_shade(colour, 0.7 if sum(colour) > 200 else 1.4))
    pen.oval(-1, -0.55, 0.6, 0.55, colour)
    pen.oval(-0.72, -0.26, -0.46, 0.0, (250, 250, 250))
    pen.oval(-0.65, -0.19, -0.53, -0.07, (20, 20, 20))


def _flower(pen: _Pen, colour: tuple) -> None:
    pen.box(-0.07, 0, 0.07, 1, _LEAF)
    pen.polygon(0.05, 0.8, 0.6, 0.4, 0.5, 0.75, colour=_LEAF)
    for angle in np.arange(5) * 2 * np.pi / 5 - np.pi / 2:
        x, y = 0.42 * np.cos(angle), -0.3 + 0.42 * np.sin(angle)
        pen.oval(x - 0.34, y - 0.34, x + 0.34, y + 0.34, colour)
    pen.oval(-0.24, -0.54, 0.24, -0.06, (250, 216, 60) if colour != COLOURS["yellow"] else _WOOD)


def _star(pen: _Pen, colour: tuple) -> None:
    angles = np.arange(10) * np.pi / 5 - np.pi / 2
    radii = np.where(np.arange(10) % 2 == 0, 1.0, 0.44)
    pen.polygon(*np.stack([radii * np.cos(angles), radii * np.sin(angles)], 1).ravel().tolist(), colour=colour)


def _mug(pen: _Pen, colour: tuple) -> None:
    pen.ring(0.2, -0.4, 0.98, 0.5, 0.17, colour)
    pen.box(-0.8, -0.7, 0.5, 0.85, colour)
    pen.oval(-0.8, -0.88, 0.5, -0.52, _shade(colour, 0.55 if sum(colour) > 200 else 1.5))


def _umbrella(pen: _Pen, colour: tuple) -> None:
    pen.box(-0.05, -0.1, 0.05, 0.9, _DARK)
    pen.box(-0.05, 0.82, 0.3, 0.94, _DARK)
    other = _shade(colour, 0.6 if sum(colour) > 200 else 1.6)
    for i in range(4):
        pen.pie(-1, -0.95, 1, 0.95, 180 + 45 * i, 225 + 45 * i, colour if i % 2 == 0 else other)


DRAWERS = dict(zip(KINDS, (_ball, _house, _car, _tree, _boat, _fish, _flower, _star, _mug, _umbrella)))

_PLACES = {
    "meadow": "on a meadow",
    "beach": "on a beach",
    "sea": "at sea",
    "desert": "in the desert",
    "night": "at night",
    "snow": "in the snow",
    "street": "in a street",
    "room": "in a room",
}
_TEMPLATES = (
    "{things} {place}.",
    "A picture of {things} {place}.",
    "There is {things} {place}.",
    "{place}, one sees {things}.",
    "{things}, {place}.",
    "A scene {place} with {things}.",
    "A drawing: {things} {place}.",
)


def caption_scene(scene: Scene, seed: int, index: int) -> list[str]:
    """Five captions of a scene from a small grammar: kinds, colours, sizes, sides and the place."""
    random = rng(seed, "captions", index)
    captions = []
    for template in random.permutation(len(_TEMPLATES))[:N_CAPTIONS]:
        things = []
        for thing in scene.objects:
            words = [thing.colour, thing.kind]
            if random.random() < 0.4:
                words.insert(0, "big" if thing.size > 0.48 else "small")
            phrase = ("an " if words[0][0] in "aeiou" else "a ") + " ".join(words)
            if random.random() < 0.4:
                phrase += " on the left" if thing.x < 0.42 else " on the right" if thing.x > 0.58 else " in the middle"
            things.append(phrase)
        text = _TEMPLATES[template].format(things=" and ".join(things), place=_PLACES[scene.background])
        captions.append(text[0].upper() + text[1:])
    return captions
