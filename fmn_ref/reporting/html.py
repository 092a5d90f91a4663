"""Pieces of the page that `report` writes: text, tables, lines as SVG, pictures as PNG. NumPy only."""

from __future__ import annotations

import base64
import html
import itertools
import math
import struct
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINE_BINS, THUMBNAIL = 500, 96
Float = NDArray[np.float64]
Int = NDArray[np.int64]


def text(value: Any, limit: int = 200) -> str:
    """Escaped, on one line, without characters that do not show (line breaks, reversed writing, half surrogates)."""
    s = str(value)
    s = s if len(s) <= limit else s[: limit - 1] + "…"
    return html.escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in s))


def count(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def short(n: int) -> str:
    """A number that fits under an axis."""
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= max(size, 10_000):
            return f"{n / size:.4g}{unit}"
    return str(n)


def every(n: int, most: int) -> range:
    """Every k-th of n rows, at most so many, up to the last one."""
    step = -(-n // most)
    return range((n - 1) % step, n, step)


def thinned(shown: Sequence[int], epochs: Sequence[int]) -> str:
    return "" if len(shown) == len(epochs) else f" ({len(shown)} of the {len(epochs):,} epochs)"


def bar(share: float) -> str:
    return f'<i style="width:{100 * min(max(share, 0), 1):.2f}%"></i>'


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    name: str,
    box: str = "",
    kind: str = "",
    best: Sequence[int] = (),
) -> str:
    """Cells are HTML; the last column of kind "bars" holds `bar`s. It scrolls in its own box."""
    bars = kind.startswith("bars")

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [""] * (len(cells) - 1) + [' class="bar"' if bars else ""]
        return "".join(f"<{tag}{k}>{cell}</{tag}>" for k, cell in zip(kinds, cells, strict=True))

    marks = dict.fromkeys(best, ' class="best"')
    body = "".join(f"<tr{marks.get(k, '')}>{line(cells, 'td')}</tr>\n" for k, cells in enumerate(rows))
    head = f"<thead><tr>{line(columns, 'th')}</tr></thead>"
    table = f'<table class="{kind}">{head}<tbody>\n{body}</tbody></table>'
    return f'<div class="scroll {box}" role="region" tabindex="0" aria-label="{name}">{table}</div>'


def chart(x: Float, lines: dict[str, Float], told: str, mark: tuple[int, float, str, str]) -> str:
    """Lines over epochs, the area between the first two filled; `mark`: row, height, class and text of a point.

    The SVG is stretched to its box, whatever that is; texts are HTML, so that they keep their size.
    """
    forget = "forget" in lines
    low = 0.0 if forget else min(float(v.min()) for v in lines.values())
    high = max(float(v.max()) for v in lines.values())
    step = _step(max(high - low, 0.01) / 4)
    low, high = math.floor(low / step + 1e-9) * step, max(math.ceil(high / step - 1e-9), 1) * step
    if high <= low:
        low, high = max(low - step, 0.0), min(low + step, 1.0)
    first, last = float(x[0]), float(x[-1]) if len(x) > 1 else float(x[0]) + 1

    def points(v: Float) -> list[str]:
        rows = _extremes(v)
        px, py = 1000 * (x[rows] - first) / (last - first), 1000 * (high - v[rows]) / (high - low)
        return [f"{a:.1f} {b:.1f}" for a, b in zip(px, py, strict=True)]

    heights = np.arange(round((high - low) / step) + 1) * step + low
    drawn = {name: points(v) for name, v in lines.items()}
    grid = "".join(f"M0 {1000 * (high - v) / (high - low):.1f}H1000" for v in heights)
    paths = [f'<path class="grid" d="{grid}"/>']
    if len(lines) > 1:
        below, above = list(drawn.values())[:2]
        paths.append(f'<path class="area" d="M{"L".join(above + below[::-1])}Z"/>')
    paths += [f'<path class="{name}" d="M{"L".join(p)}"/>' for name, p in drawn.items()]
    spans = [at("x", "left", (k - first) / (last - first), short(k)) for k in ticks(first, last, 5)]
    spans += [at("y", "bottom", (v - low) / (high - low), f"{round(100 * v, 6):g}%") for v in heights]
    row, height, kind, text = mark
    across, up = (x[row] - first) / (last - first), (height - low) / (high - low)
    side = "begin" if across < 0.2 else "end" if across > 0.8 else "middle"
    where = f"left:{100 * across:.2f}%;bottom:{100 * up:.2f}%"
    spans.append(
        f'<span class="dot {kind}" style="{where}"></span><span class="note {side}" style="{where}">{text}</span>'
    )
    svg = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">{"".join(paths)}</svg>'
    return f'<div class="plot{" low" * forget}" role="img" aria-label="{told}">{svg}{"".join(spans)}</div>'


def at(kind: str, side: str, share: float, text: str) -> str:
    return f'<span class="{kind}" style="{side}:{100 * share:.2f}%">{text}</span>'


def ticks(first: float, last: float, n: int) -> range:
    """About so many round numbers."""
    step = max(1, int(_step(max(last - first, 1) / n)))
    return range(math.ceil(first / step) * step, int(last) + 1, step)


def _step(size: float) -> float:
    """1, 2 or 5 times a power of ten, at least so large."""
    power = 10.0 ** math.floor(math.log10(size))
    return next(k * power for k in (1, 2, 5, 10) if k * power >= size * (1 - 1e-9))


def _extremes(v: Float) -> Int:
    """Rows to draw a line by: all, or the lowest and the highest of each bin."""
    n = len(v)
    if n <= 2 * LINE_BINS:
        return np.arange(n)
    edges = np.linspace(0, n, LINE_BINS + 1).astype(int)
    rows = {0, n - 1}
    for a, b in itertools.pairwise(edges):
        rows |= {a + int(v[a:b].argmin()), a + int(v[a:b].argmax())}
    return np.array(sorted(rows))


def strip(right: NDArray[np.integer[Any]]) -> str:
    """The epochs at which a sample was right, as a bar."""
    edges = np.flatnonzero(np.diff(right.astype(np.int8), prepend=0, append=0))
    runs = "".join(f"M{a} 0H{b}V1H{a}Z" for a, b in edges.reshape(-1, 2))
    box = f'viewBox="0 0 {len(right)} 1" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="strip" {box}><path d="{runs}"/></svg>'


def thumbnails(images: NDArray[Any], chosen: Int) -> list[str]:
    """Attributes of <img> for some of the samples."""
    a = np.asarray(images[chosen])
    if a.ndim == 3:
        a = a[..., None]
    elif a.shape[3] not in (1, 3):
        a = np.moveaxis(a, 1, -1)
    if a.dtype != np.uint8:
        a = a.astype(np.float64)
        if not np.isfinite(a).all():
            sample = chosen[np.argwhere(~np.isfinite(a))[0][0]]
            raise ValueError(f"images: expected finite numbers, sample {sample} has others")
        if a.min() < 0 or a.max() > 1:
            low, high = a.min((1, 2, 3), keepdims=True), a.max((1, 2, 3), keepdims=True)
            a = (a - low) / np.where(high > low, high - low, 1)
        a = 255 * a
    small = ' class="small"' if max(a.shape[1:3]) <= 64 else ""
    f = -(-max(a.shape[1:3]) // THUMBNAIL)
    if f > 1:  # means of f x f pixels, cut to what they fill
        h, w = a.shape[1:3]
        fh, fw = min(f, h), min(f, w)
        a = a[:, : h // fh * fh, : w // fw * fw].reshape(len(a), h // fh, fh, w // fw, fw, -1).mean((2, 4))
    return [f'src="{data_uri(png(np.rint(p).astype(np.uint8)))}"{small}' for p in a]


def palette(colours: Sequence[str]) -> NDArray[np.uint8]:
    """(256, 3) between the given ones."""
    anchors = np.array([list(bytes.fromhex(c)) for c in colours], np.float64)
    at = np.linspace(0, len(anchors) - 1, 256)
    return np.stack([np.interp(at, range(len(anchors)), anchors[:, k]) for k in range(3)], 1).round().astype(np.uint8)


def png(pixels: NDArray[np.uint8], palette: NDArray[np.uint8] | None = None) -> bytes:
    """(h, w) of a palette, or (h, w, 1 or 3): grey or RGB."""
    h, w = pixels.shape[:2]
    kind = 3 if palette is not None else {1: 0, 3: 2}[pixels.shape[2]]
    lines = np.zeros((h, 1 + pixels.size // h), np.uint8)  # each begins with its filter, none
    lines[:, 1:] = pixels.reshape(h, -1)

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, kind, 0, 0, 0))
    colours = b"" if palette is None else chunk(b"PLTE", palette.tobytes())
    return (
        b"\x89PNG\r\n\x1a\n" + head + colours + chunk(b"IDAT", zlib.compress(lines.tobytes(), 9)) + chunk(b"IEND", b"")
    )


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
