"""The picture: how many times as fast as each other queue, an SVG for light and dark pages.

A panel for each kind of crowd, on one logarithmic scale whose middle is 1: a bar to the right is
how much faster sqlspace is, one to the left how much slower. It brings its own ground, so that it
can be read where the page's colours aren't those that the reader's system asks for.
"""

import math
from collections.abc import Sequence
from html import escape

from bench_rows import Row, number

PANELS = ("one client, no fsync", "one client, fsync", "16 threads, fsync", "8 processes, fsync")
VERBS = ("push", "pull")
WIDTH = 920
MARGIN = 24
GUTTER = 32
HEAD = 84
NAMES = 178  # for the peers' names
VALUE = 40  # for the figure behind the longest bar
BAR = 9
GAP = 3
ROW = 33
PANEL_HEAD = 34
PANEL_FOOT = 30
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)

STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.ground { fill: #ffffff; stroke: #d1d9e0; }
.text { fill: #1f2328; } .faint { fill: #59636e; }
.title { font-size: 16px; font-weight: 600; } .panel { font-size: 13px; font-weight: 600; }
.small { font-size: 11px; }
.grid { stroke: #d1d9e0; } .one { stroke: #59636e; stroke-width: 1.5; }
.push { fill: #0969da; } .pull { fill: #1a9c86; }
@media (prefers-color-scheme: dark) {
  .ground { fill: #0d1117; stroke: #3d444d; }
  .text { fill: #f0f6fc; } .faint { fill: #9198a1; }
  .grid { stroke: #2a313c; } .one { stroke: #9198a1; }
  .push { fill: #4493f8; } .pull { fill: #2bb9a0; }
}
"""


def picture(rows: Sequence[Row], machine: str) -> str | None:
    """An SVG of all rows that have a bar; None if none has."""
    bars: dict[str, dict[str, dict[str, float]]] = {panel: {} for panel in PANELS}
    for row in rows:
        if row.bar is not None and row.figure is not None:
            panel, peer, verb = row.bar
            bars[panel].setdefault(peer, {})[verb] = row.figure
    shown = [panel for panel in PANELS if bars[panel]]
    if not shown:
        return None
    figures = [each for panel in shown for peer in bars[panel].values() for each in peer.values()]
    scale = _Scale(min(*figures, 0.5), max(*figures, 2), (WIDTH - 2 * MARGIN - GUTTER) / 2)
    parts: list[str] = []
    top = HEAD
    for first in range(0, len(shown), 2):
        pair = shown[first : first + 2]
        rows_high = max(len(bars[panel]) for panel in pair)
        for nth, panel in enumerate(pair):
            left = MARGIN + nth * (scale.width + GUTTER)
            parts += _panel(panel, bars[panel], left, top, scale, rows_high)
        top += PANEL_HEAD + rows_high * ROW + PANEL_FOOT
    height = top + 4
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"',
            f'width="{WIDTH}" height="{height}" role="img" aria-labelledby="title">',
            f'<title id="title">{TITLE}</title>',
            f"<style>{STYLE}</style>",
            '<rect class="ground" x="0.5" y="0.5" rx="8"',
            f'width="{WIDTH - 1}" height="{height - 1}"/>',
            _text(MARGIN, 32, "text title", TITLE),
            _text(MARGIN, 52, "faint small", machine),
            *_legend(),
            *parts,
            "</svg>\n",
        ]
    )


TITLE = "sqlspace's speed, as a multiple of other queues' at the same durability"


class _Scale:
    """Where a ratio stands in a panel, from its left edge."""

    def __init__(self, lowest: float, highest: float, width: float) -> None:
        self.width = width
        self.ticks = [tick for tick in TICKS if lowest * 0.99 <= tick <= highest * 1.01]
        self._lowest, self._highest = math.log(lowest * 0.85), math.log(highest)

    def at(self, ratio: float) -> float:
        room = self.width - NAMES - VALUE
        return NAMES + room * (math.log(ratio) - self._lowest) / (self._highest - self._lowest)


def _panel(
    name: str, peers: dict[str, dict[str, float]], left: float, top: float, scale: _Scale, high: int
) -> list[str]:
    found = [_text(left, top + 16, "text panel", name)]
    first, last = top + PANEL_HEAD - 8, top + PANEL_HEAD + high * ROW
    for tick in scale.ticks:
        x = left + scale.at(tick)
        kind = "one" if tick == 1 else "grid"
        found.append(f'<path class="{kind}" d="M{x:.1f} {first:.1f}V{last:.1f}"/>')
        found.append(_text(x, last + 14, "faint small", f"{tick:g}×", "middle"))
    for nth, (peer, verbs) in enumerate(peers.items()):
        y = top + PANEL_HEAD + nth * ROW
        found.append(_text(left, y + BAR + GAP + 2, "text small", peer))
        for row, verb in enumerate(VERBS):
            if verb in verbs:
                found += _bar(left, y + row * (BAR + GAP), verb, verbs[verb], scale)
    return found


def _bar(left: float, y: float, verb: str, ratio: float, scale: _Scale) -> list[str]:
    one, end = left + scale.at(1), left + scale.at(ratio)
    start, width = min(one, end), max(abs(end - one), 1.0)
    return [
        f'<rect class="{verb}" x="{start:.1f}" y="{y:.1f}" rx="1.5"',
        f'width="{width:.1f}" height="{BAR}"/>',
        _text(max(one, end) + 5, y + BAR - 0.5, "text small", number(ratio)),
    ]


def _legend() -> list[str]:
    found = []
    for nth, verb in enumerate(VERBS):
        x = WIDTH - MARGIN - 110 + nth * 60
        found.append(f'<rect class="{verb}" x="{x}" y="23" width="12" height="10" rx="1.5"/>')
        found.append(_text(x + 17, 32, "text", verb))
    return found


def _text(x: float, y: float, kind: str, text: str, anchor: str = "start") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
    )
