"""Loss curves as a picture, without a plotting library."""

import math
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 720, 380, 58, 18, 18, 44
STYLES = (("#999999", 5.0), ("#1a56c4", 1.6), ("#c4391a", 1.6))
SMOOTHING = 0.9


def smooth(losses: Sequence[float]) -> list[float]:
    """A running mean of a tenth of each new loss, without the pull to zero at the beginning."""
    smoothed, mean = [], 0.0
    for step, loss in enumerate(losses, 1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
        smoothed.append(mean / (1 - SMOOTHING**step))
    return smoothed


def write_svg(curves: dict[str, Sequence[float]], path: Path) -> None:
    """Write loss over steps, smoothed, the loss on a logarithmic axis; a curve ends where it stops being a number."""
    drawn = {name: [each for each in smooth(losses) if math.isfinite(each) and each > 0] for name, losses in curves.items()}
    values = [each for losses in drawn.values() for each in losses]
    low, high = math.log10(min(values)), math.log10(max(values))
    steps = max(len(losses) for losses in curves.values())
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x(step: float) -> float:
        return LEFT + width * step / max(steps - 1, 1)

    def y(loss: float) -> float:
        return TOP + height * (high - math.log10(loss)) / max(high - low, 1e-9)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
    ]
    for loss in _ticks(low, high):
        lines.append(f'<path d="M{LEFT} {y(loss):.1f}h{width}" stroke="#ddd"/>')
        lines.append(f'<text x="{LEFT - 8}" y="{y(loss) + 4:.1f}" text-anchor="end">{loss:g}</text>')
    for step in range(0, steps, next(each for each in (1, 5, 25, 50, 100, 500, steps) if steps <= 6 * each)):
        lines.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 24}" text-anchor="middle">{step}</text>')
    lines.append(f'<text x="{LEFT + width / 2}" y="{HEIGHT - 6}" text-anchor="middle">step</text>')
    lines.append(f'<text x="14" y="{TOP + height / 2}" transform="rotate(-90 14 {TOP + height / 2})">loss, nats</text>')
    for place, (name, losses) in enumerate(drawn.items()):
        colour, thickness = STYLES[place]
        points = " ".join(f"{x(step):.1f},{y(loss):.1f}" for step, loss in enumerate(losses))
        lines.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="{thickness}"/>')
        down = TOP + 16 + 20 * place
        lines.append(f'<path d="M{WIDTH - 120} {down - 4}h26" stroke="{colour}" stroke-width="{thickness}"/>')
        lines.append(f'<text x="{WIDTH - 86}" y="{down}">{name}</text>')
    path.write_text("\n".join([*lines, "</svg>", ""]))


def _ticks(low: float, high: float) -> list[float]:
    candidates = [
        digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in (1, 1.5, 2, 3, 5, 7)
    ]
    return [each for each in candidates if low <= math.log10(each) <= high]
