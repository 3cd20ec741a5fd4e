"""The page stands alone, and shows what it is given."""
from __future__ import annotations

import base64
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from nsdray.metrics.bootstrap import Estimate
from nsdray.report import Cell, Code, Figure, Line, Row, Section, Table, line_chart, picture_grid, png, render, show

PICTURES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


def page() -> str:
    lines = {"a": Line([0, 1], [0.2, 0.4], [0.1, 0.3], [0.3, 0.5]), "b": Line([0, 1], [1, 2])}
    curve = line_chart(lines, "noise", "ssim", ["0", "8"])
    grid = png(picture_grid({"seen": PICTURES, "decoded": PICTURES}, "subject 1"))
    table = Table(["model", "ssim"], [Row([Cell("ridge"), Cell("0.5", "0.4 … 0.6")]), Row([Cell("chance"), Cell("–")], True)])
    figures = [Figure(curve, "curve"), Figure(grid, "grid")]
    section = Section("Scores <&>", ["what they mean"], [table], figures, [Code("config", "{}")])
    return render("title", "subtitle", [section], "SIMULATED")


def test_page_needs_no_network():
    text = page()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text) and "url(" not in text and "<script" not in text
    uris = re.findall(r'src="data:image/([a-z+]+);base64,([^"]+)"', text)
    assert [kind for kind, _ in uris] == ["svg+xml", "png"]
    assert base64.b64decode(uris[1][1]).startswith(b"\x89PNG")


def test_page_says_what_it_is_given():
    text = page()
    assert "Scores &lt;&amp;&gt;" in text and "0.4 … 0.6" in text and "SIMULATED" in text and 'class="reference"' in text
    assert 'name="viewport"' in text


def test_small_differences_are_printed_to_their_interval_s_digits():
    assert show(Estimate(0.0009, 0.0004, 0.0015, 0.0003)) == Cell("0.0009", "0.0004 … 0.0015")
    assert show(Estimate(0.61, 0.55, 0.67, 0.03)) == Cell("0.610", "0.550 … 0.670")
    assert show(Estimate(1.0, 1.0, 1.0, 0.0)) == Cell("1.000", "1.000 … 1.000") and show(None) == Cell("–")


def test_chart_is_svg():
    chart = line_chart({"a": Line([1, 2], [3, 4])}, "epoch", "loss")
    assert ElementTree.fromstring(chart).tag.endswith("svg")


def test_grid_refuses_columns_of_different_length():
    with pytest.raises(ValueError, match="columns differ in length: {'seen': 5, 'decoded': 4}"):
        picture_grid({"seen": PICTURES, "decoded": PICTURES[:4]}, "")


def test_grid_shows_every_picture():
    grid = np.asarray(picture_grid({"seen": PICTURES}, "", cell=16, n_columns_side=2))
    for picture in PICTURES:
        windows = np.lib.stride_tricks.sliding_window_view(grid, picture.shape)[:, :, 0]
        assert (windows == picture).all((2, 3, 4)).any()
