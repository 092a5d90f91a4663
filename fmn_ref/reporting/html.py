"""Building blocks of the report's page: text, tables, line charts as SVG, pictures as PNG. NumPy only."""

from __future__ import annotations

import base64
import html
import itertools
import math
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .._check import Float, Int
from .tables import one_line

LINE_BINS = 500  # bins of a long line; each is drawn by its lowest and highest value
THUMBNAIL = 96  # largest side of a picture, in pixels
Cells = Sequence[str]  # one row of a table


# --- text and tables ---


def text(value: Any, limit: int = 200) -> str:
    """Escape `value` and put it on one line of at most `limit` characters."""
    return html.escape(one_line(value, limit))


def count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def short(n: int) -> str:
    """Shorten a number to fit below an axis: 12.5k, 3M."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= max(size, 10_000):
            return f"{n / size:.4g}{unit}"
    return str(n)


def thinned(n: int, most: int) -> range:
    """Every k-th of n rows, at most `most` of them, up to the last one."""
    step = -(-n // most)
    return range((n - 1) % step, n, step)


def thinned_note(shown: Sequence[int], epochs: Sequence[int]) -> str:
    return "" if len(shown) == len(epochs) else f" ({len(shown)} of the {len(epochs):,} epochs)"


def share_bar(share: float) -> str:
    return f'<i style="width:{100 * min(max(share, 0), 1):.2f}%"></i>'


def scroll_table(
    columns: Cells, rows: Iterable[Cells], name: str, box: str = "", kind: str = "", best: Sequence[int] = ()
) -> str:
    """Table in a box that scrolls. Cells are HTML; the last column of kind "bars" contains `share_bar`s."""
    bar = ' class="bar"' if kind.startswith("bars") else ""

    def line(cells: Cells, tag: str) -> str:
        return "".join(f"<{tag}>{cell}</{tag}>" for cell in cells[:-1]) + f"<{tag}{bar}>{cells[-1]}</{tag}>"

    marks = dict.fromkeys(best, ' class="best"')
    body = "".join(f"<tr{marks.get(k, '')}>{line(cells, 'td')}</tr>\n" for k, cells in enumerate(rows))
    head = f"<thead><tr>{line(columns, 'th')}</tr></thead>"
    table = f'<table class="{kind}">{head}<tbody>\n{body}</tbody></table>'
    return f'<div class="scroll {box}" role="region" tabindex="0" aria-label="{name}">{table}</div>'


# --- lines, as SVG ---


def chart(
    epochs: Sequence[int],
    lines: dict[str, Float],
    description: str,
    marked: int,
    unit: str,
    levels: Mapping[str, float] = MappingProxyType({}),
) -> str:
    """Draw lines over epochs and fill the area between the first two.

    The SVG is stretched to its box. Texts are HTML and keep their size.

    Parameters
    ----------
    epochs : (n_epochs,) integers
    lines : {CSS class: (n_epochs,) float64}
    description : str
        Text for screen readers.
    marked : int
        Row to mark on the last line.
    unit : str
        Name and unit of the vertical axis.
    levels : {CSS class: float}, optional
        Horizontal lines.
    """
    forget, first, last = "forget" in lines, epochs[0], max(epochs[-1], epochs[0] + 1)
    x = np.array([e - first for e in epochs], np.float64)  # as integers: large ones can be equal as floats
    values = np.concatenate([*lines.values(), list(levels.values())])
    low, high, step = _axis(0.0 if forget else values.min(), values.max())

    def down(v: Any) -> Any:
        return 1000 * (high - v) / (high - low)

    def points(v: Float) -> list[str]:
        rows = _extremes(v)
        return [f"{a:.1f} {b:.1f}" for a, b in zip(1000 * x[rows] / (last - first), down(v[rows]), strict=True)]

    heights = np.arange(round((high - low) / step) + 1) * step + low
    drawn = {name: points(v) for name, v in lines.items()}
    grid = "".join(f"M0 {down(v):.1f}H1000" for v in heights)
    paths = [f'<path class="grid" d="{grid}"/>']
    if len(lines) > 1:
        below, above = list(drawn.values())[:2]
        paths.append(f'<path class="area" d="M{"L".join(above + below[::-1])}Z"/>')
    paths += [f'<path class="{name}" d="M0 {down(v):.1f}H1000"/>' for name, v in levels.items()]
    paths += [f'<path class="{name}" d="M{"L".join(p)}"/>' for name, p in drawn.items()]
    labels = [axis_names("epoch", unit)]
    labels += [axis_label("x", "left", (k - first) / (last - first), short(k)) for k in ticks(first, last, 5)]
    labels += [axis_label("y", "bottom", (v - low) / (high - low), f"{round(100 * v, 6):g}%") for v in heights]
    height, kind = list(lines.values())[-1][marked], "forget" * forget
    note = f"{height:.1%} at epoch {epochs[marked]}"
    labels.append(_marked_point(x[marked] / (last - first), (height - low) / (high - low), kind, note))
    svg = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(paths)}</svg>'
    return f'<div class="plot{" low" * forget}" role="img" aria-label="{description}">{svg}{"".join(labels)}</div>'


def axis_label(kind: str, side: str, share: float, label: str) -> str:
    """Label of the x or the y axis, at a share of its length from `side`."""
    return f'<span class="{kind}" style="{side}:{100 * share:.2f}%">{label}</span>'


def axis_names(x: str, y: str) -> str:
    return f'<span class="xname">{x}</span><span class="yname">{y}</span>'


def ticks(first: int, last: int, n: int) -> range:
    """About n round numbers between two integers."""
    step = max(1, int(_round_step(max(last - first, 1) / n)))
    return range(-(-first // step) * step, last + 1, step)


def _axis(low: float, high: float) -> tuple[float, float, float]:
    """Lowest and highest value of the axis around these two, and the step of its grid: round numbers."""
    step = _round_step(max(high - low, 0.01) / 4)
    low, high = math.floor(low / step + 1e-9) * step, max(math.ceil(high / step - 1e-9), 1) * step
    return (low, high, step) if high > low else (max(low - step, 0.0), min(low + step, 1.0), step)


def _round_step(size: float) -> float:
    """Smallest number of the form 1, 2 or 5 times a power of ten that is at least `size`."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= size * (1 - 1e-9))


def _marked_point(across: float, up: float, kind: str, note: str) -> str:
    side = "begin" if across < 0.2 else "end" if across > 0.8 else "middle"
    place = f"left:{100 * across:.2f}%;bottom:{100 * up:.2f}%"
    return f'<span class="dot {kind}" style="{place}"></span><span class="note {side}" style="{place}">{note}</span>'


def _extremes(v: Float) -> Int:
    """Rows that draw a line: all of a short one, the lowest and the highest of each bin of a long one."""
    n = len(v)
    if n <= 2 * LINE_BINS:
        return np.arange(n)
    edges = np.linspace(0, n, LINE_BINS + 1).astype(int)
    rows = {0, n - 1}
    for a, b in itertools.pairwise(edges):
        rows |= {a + int(v[a:b].argmin()), a + int(v[a:b].argmax())}
    return np.array(sorted(rows))


def strip(right: NDArray[np.integer[Any]]) -> str:
    """Bar that shows the epochs at which a sample was right."""
    edges = np.flatnonzero(np.diff(right.astype(np.int8), prepend=0, append=0))
    runs = "".join(f"M{a} 0H{b}V1H{a}Z" for a, b in edges.reshape(-1, 2))
    box = f'viewBox="0 0 {len(right)} 1" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="strip" {box}><path d="{runs}"/></svg>'


# --- pictures, as PNG ---


def thumbnails(images: NDArray[Any], chosen: Int) -> list[str]:
    """An <img> element for each of the chosen samples."""
    a = np.asarray(images[chosen])
    if a.ndim == 3:
        a = a[..., None]
    elif a.shape[3] not in (1, 3):
        a = np.moveaxis(a, 1, -1)
    if a.dtype != np.uint8:
        a = _stretched(a.astype(np.float64), chosen)
    size = ' class="small"' if max(a.shape[1:3]) <= 64 else ""
    pictures = (png(np.rint(p).astype(np.uint8)) for p in _shrunk(a))
    return [f'<img src="{p}"{size} alt="sample {i}">' for p, i in zip(pictures, chosen, strict=True)]


def _stretched(a: Float, chosen: Int) -> Float:
    """Values from 0 to 255: of numbers within [0, 1], or else from each picture's lowest to its highest value."""
    if not np.isfinite(a).all():
        sample = chosen[np.argwhere(~np.isfinite(a))[0][0]]
        raise ValueError(f"images: expected finite numbers, sample {sample} has others")
    if a.min() < 0 or a.max() > 1:
        low, high = a.min((1, 2, 3), keepdims=True), a.max((1, 2, 3), keepdims=True)
        a = (a - low) / np.where(high > low, high - low, 1)
    return 255 * a


def _shrunk(a: NDArray[Any]) -> NDArray[Any]:
    """Means of f x f pixels, so that no side is above THUMBNAIL; pixels that fill no square are cut off."""
    h, w = a.shape[1:3]
    f = -(-max(h, w) // THUMBNAIL)
    if f == 1:
        return a
    fh, fw = min(f, h), min(f, w)
    squares = a[:, : h // fh * fh, : w // fw * fw].reshape(len(a), h // fh, fh, w // fw, fw, -1)
    return np.asarray(squares.mean((2, 4)))


def palette(colours: Sequence[str]) -> NDArray[np.uint8]:
    """Interpolate 256 RGB colours between the given ones ("#1f69ae"), (256, 3)."""
    anchors = np.array([list(bytes.fromhex(c[1:])) for c in colours], np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    return np.stack([np.interp(at, range(len(anchors)), anchors[:, k]) for k in range(3)], 1).round().astype(np.uint8)


def png(pixels: NDArray[np.uint8], colours: NDArray[np.uint8] | None = None) -> str:
    """Encode (h, w) indices of a palette, or (h, w, 1 or 3) grey or RGB values, as a data URI."""
    h, w = pixels.shape[:2]
    kind = 3 if colours is not None else {1: 0, 3: 2}[pixels.shape[2]]
    lines = np.zeros((h, 1 + pixels.size // h), np.uint8)  # each line begins with 0, for no filter
    lines[:, 1:] = pixels.reshape(h, -1)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, kind, 0, 0, 0))
    if colours is not None:
        content += chunk(b"PLTE", colours.tobytes())
    content += chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(content).decode()
