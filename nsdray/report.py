"""Figures that people look at: grids of seen and decoded pictures."""
from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MARGIN, HEADER = 6, 26


def picture_grid(columns: dict[str, np.ndarray], title: str, cell: int = 96, n_columns_side: int = 1) -> Image.Image:
    """A grid with one row per image: columns maps a heading to uint8 pictures (n, h, w, 3), all with the same n.

    cell: width of a picture in pixels. n_columns_side: blocks of rows set side by side, for many images.
    """
    n = len(next(iter(columns.values())))
    if any(len(pictures) != n for pictures in columns.values()):
        raise ValueError(f"picture_grid: columns differ in length: { {k: len(v) for k, v in columns.items()} }")
    n_rows = -(-n // n_columns_side)
    block = len(columns) * (cell + MARGIN) + 2 * MARGIN
    grid = Image.new("RGB", (block * n_columns_side, 2 * HEADER + n_rows * (cell + MARGIN) + MARGIN), "white")
    canvas = ImageDraw.Draw(grid)
    canvas.text((MARGIN, MARGIN), title, "black", ImageFont.load_default(15))
    for row in range(n):
        side, line = divmod(row, n_rows)
        for i, (heading, pictures) in enumerate(columns.items()):
            x = side * block + MARGIN + i * (cell + MARGIN)
            if line == 0:
                canvas.text((x, HEADER + MARGIN), heading, "black", ImageFont.load_default(13))
            picture = Image.fromarray(pictures[row]).resize((cell, cell), Image.Resampling.BICUBIC)
            grid.paste(picture, (x, 2 * HEADER + line * (cell + MARGIN)))
    return grid
