"""Where names stand in a drawing: beside their points, none over another."""

from collections.abc import Sequence
from typing import Final, NamedTuple

LINE_HEIGHT: Final = 15
_CHARACTER_WIDTH: Final = 7.5
_POINT_RADIUS: Final = 6.0
# Beside, above, below, and then further and further away.
_DIRECTIONS: Final = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1))
_DISTANCES: Final = (14.0, 22.0, 30.0, 40.0, 52.0)


class Place(NamedTuple):
    """A place in a drawing, in its units, from the top left."""

    x: float
    y: float


class Box(NamedTuple):
    """What something in a drawing covers."""

    left: float
    top: float
    right: float
    bottom: float


def column(heights: Sequence[float], step: float, top: float, bottom: float) -> list[float]:
    """Move places on a vertical line apart.

    Args:
        heights: Where each would stand.
        step: How far apart two have to be at least.
        top: No place is above.
        bottom: No place is below, as long as there is room for all.

    Returns:
        A place for each, in the same order from top to bottom.
    """
    places = [0.0] * len(heights)
    above = top - step
    ordered = sorted(range(len(heights)), key=heights.__getitem__)
    for place, index in enumerate(ordered):
        lowest = bottom - step * (len(ordered) - 1 - place)
        above = places[index] = max(above + step, min(heights[index], lowest))
    return places


def beside(points: Sequence[Place], texts: Sequence[str], top_left: Place, bottom_right: Place) -> list[Place]:
    """Find a place near each point for a short text, where it covers neither a point nor another text.

    Args:
        points: What the texts belong to.
        texts: One for each point.
        top_left: Corner of the area that texts must stay in.
        bottom_right: The other corner.

    Returns:
        The middle of each text; of one that there is no free place for, the place right of its point.
    """
    taken = [point_box(point) for point in points]
    places = []
    for point, text in zip(points, texts, strict=True):
        width = _CHARACTER_WIDTH * len(text)
        candidates = [
            Place(point.x + across * (distance + width / 2 - _CHARACTER_WIDTH / 2), point.y + down * distance)
            for distance in _DISTANCES
            for across, down in _DIRECTIONS
        ]
        free = (
            place
            for place in candidates
            if _within(box := _box(place, width, LINE_HEIGHT - 3), top_left, bottom_right)
            and not any(overlap(box, other) for other in taken)
        )
        chosen = next(free, candidates[0])
        taken.append(_box(chosen, width, LINE_HEIGHT - 3))
        places.append(chosen)
    return places


def point_box(point: Place) -> Box:
    """Return what the dot at a point covers."""
    return _box(point, 2 * _POINT_RADIUS, 2 * _POINT_RADIUS)


def _box(middle: Place, width: float, height: float) -> Box:
    return Box(middle.x - width / 2, middle.y - height / 2, middle.x + width / 2, middle.y + height / 2)


def _within(box: Box, top_left: Place, bottom_right: Place) -> bool:
    return (
        box.left >= top_left.x
        and box.top >= top_left.y
        and box.right <= bottom_right.x
        and box.bottom <= bottom_right.y
    )


def overlap(one: Box, other: Box) -> bool:
    """Tell whether one covers a part of the other."""
    return one.left < other.right and other.left < one.right and one.top < other.bottom and other.top < one.bottom
