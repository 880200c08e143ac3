"""What makes the page of `torch_eplb.offline.page` look and move as it does."""

from __future__ import annotations

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --quiet: #5c6670; --paper: #ffffff;
  --card: #f4f6f8; --line: #d5dbe1; --main: #0072b2; --other: #d55e00; --alarm: #b2182b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --quiet: #9aa4ae; --paper: #14171a;
  --card: #1f2429; --line: #39414a; --main: #56b4e9; --other: #e69f00; --alarm: #f4a582; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1060px; padding: 24px; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 32px 0 4px; }
p { margin: 4px 0 8px; color: var(--quiet); } small { color: var(--quiet); }
.alarm { color: var(--alarm); font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(180px, 1fr)); gap: 10px;
  margin: 16px 0 0; }
.tiles div { background: var(--card); border-radius: 8px; padding: 10px 14px; }
.tiles dt { color: var(--quiet); font-size: 13px; }
.tiles dd { margin: 0; font-size: 22px; font-variant-numeric: tabular-nums; }
svg { width: 100%; min-width: 640px; height: auto; display: block; }
.chart { overflow-x: auto; }
svg text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .line { fill: none; stroke-width: 2; } svg .main { stroke: var(--main); }
svg .light { stroke: var(--main); opacity: .55; stroke-width: 1.5; }
svg .dashed { stroke: var(--main); stroke-dasharray: 6 4; } svg .other { stroke: var(--other); }
svg .bar { fill: var(--main); } svg .mark { fill: var(--other); }
figure { margin: 0; } figcaption { color: var(--quiet); font-size: 13px; }
.heat input { width: 100%; margin: 4px 0 0; accent-color: var(--main); }
.frame { display: grid; grid-template-columns: auto 1fr; gap: 4px 8px; }
.frame img { width: 100%; image-rendering: pixelated; border: 1px solid var(--line); }
.frame b { font-weight: 400; font-size: 12px; color: var(--quiet); }
.rows { display: flex; flex-direction: column; justify-content: space-between; text-align: right; }
.columns { grid-column: 2; display: flex; justify-content: space-between; }
.legend i { display: inline-block; width: 120px; height: 10px; border: 1px solid var(--line); }
.wide { overflow-x: auto; max-height: 420px; overflow-y: auto; margin: 8px 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { text-align: right; padding: 3px 14px 3px 0; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--paper); font-weight: 600; }
td:last-child, th:last-child { padding-right: 0; }
.words td:last-child, .words th:last-child { text-align: left; }
"""

SCRIPT = """
for (const range of document.querySelectorAll("input[data-windows]")) {
  const [pictures, captions] = JSON.parse(range.dataset.windows);
  const figure = range.closest("figure");
  range.addEventListener("input", () => {
    figure.querySelector("img").src = pictures[range.value];
    figure.querySelector("figcaption").textContent = captions[range.value];
  });
}
"""
