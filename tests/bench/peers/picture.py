"""Owns the report as a picture: bars of output and of the worst pauses, by load, as plain SVG."""

from html import escape

from . import summary
from .summary import Cell

WIDTH, PANEL_HEIGHT, LEFT, TOP = 900, 220, 20, 64
GAP = 70
# Ours are blue, peers are grey to brown: told apart in print as well, by their order.
OUR_COLOURS = ("#1f5fbf", "#6ea3e8", "#a9c8f2", "#12386f")
PEER_COLOURS = ("#777777", "#b0b0b0", "#b5894d", "#d8bb8c")
PANELS = (("output", "Output tokens a second (more is better)"), ("itl_p99", "ITL p99, ms (less is better)"))


def render(result: dict) -> str:
    """One panel a figure, one group of bars a load, one colour a contender."""
    table = summary.cells(result["samples"], result["typical"])
    names = [name for name, row in result["contenders"].items() if "error" not in row]
    colours = _colours(names, result)
    height = TOP + len(PANELS) * (PANEL_HEIGHT + GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        _text(
            LEFT, 20, f"Model {result['model']}, {result['machine']}, {result['threads']} threads", bold=True
        ),
    ]
    for index, name in enumerate(names):
        x = LEFT + index * (WIDTH - 2 * LEFT) / max(len(names), 1)
        parts.append(f'<rect x="{x:.1f}" y="32" width="10" height="10" fill="{colours[name]}"/>')
        parts.append(_text(x + 14, 41, name))
    for index, (figure, title) in enumerate(PANELS):
        top = TOP + index * (PANEL_HEIGHT + GAP)
        parts.append(_text(LEFT, top + 12, title, bold=True))
        parts += _panel(result["loads"], names, colours, table, figure, top + 24)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    loads: list[str],
    names: list[str],
    colours: dict[str, str],
    table: dict[tuple[str, str], Cell],
    figure: str,
    top: float,
) -> list[str]:
    values = {
        key: cell.figures[figure].median for key, cell in table.items() if cell.figures[figure] is not None
    }
    highest = max(values.values(), default=0) or 1
    group = (WIDTH - 2 * LEFT) / max(len(loads), 1)
    bar = group * 0.85 / max(len(names), 1)
    room, base = PANEL_HEIGHT - 20, top + PANEL_HEIGHT
    parts = [f'<line x1="{LEFT}" x2="{WIDTH - LEFT}" y1="{base}" y2="{base}" stroke="#444"/>']
    for at, load in enumerate(loads):
        parts.append(_text(LEFT + at * group, base + 16, load, size=11))
        for number, name in enumerate(names):
            if (name, load) not in values:
                continue
            value = values[name, load]
            height, x = value / highest * room, LEFT + at * group + number * bar
            parts.append(
                f'<rect x="{x:.1f}" y="{base - height:.1f}" width="{bar * 0.9:.1f}" height="{height:.1f}" '
                f'fill="{colours[name]}"><title>{escape(f"{name}, {load}: {value:.1f}")}</title></rect>'
            )
            parts.append(_text(x, base - height - 3, f"{value:.0f}", size=9))
    return parts


def _colours(names: list[str], result: dict) -> dict[str, str]:
    ours = [name for name in names if result["contenders"][name]["is_ours"]]
    peers = [name for name in names if name not in ours]
    colours = {name: OUR_COLOURS[at % len(OUR_COLOURS)] for at, name in enumerate(ours)}
    return colours | {name: PEER_COLOURS[at % len(PEER_COLOURS)] for at, name in enumerate(peers)}


def _text(x: float, y: float, text: str, size: int = 12, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}"{weight}>{escape(text)}</text>'
