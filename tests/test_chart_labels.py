"""Where names stand in the charts of a report."""

from itertools import combinations, pairwise

import numpy as np
import pytest

from gpt2_edge.benchmarks.chart_labels import Place, beside, column

TOP_LEFT, BOTTOM_RIGHT = Place(60, 10), Place(440, 250)


def test_a_column_keeps_places_that_are_far_apart() -> None:
    assert column([200, 20, 100], 15, 10, 240) == [200, 20, 100]


def test_a_column_moves_places_apart_in_their_order_and_stays_above_the_bottom() -> None:
    places = column([100, 100, 101, 239, 240], 15, 10, 240)
    assert places == [100, 115, 130, 225, 240]
    crowded = column([240.0] * 16, 15, 10, 240)
    assert crowded == sorted(crowded)
    assert all(lower - higher == pytest.approx(15) for higher, lower in pairwise(crowded))
    assert (crowded[0], crowded[-1]) == (15, 240)


def test_numbers_cover_neither_points_nor_each_other() -> None:
    generator = np.random.default_rng(0)
    points = [Place(*generator.uniform((120, 60), (200, 120))) for _ in range(16)]
    points.append(Place(TOP_LEFT.x, BOTTOM_RIGHT.y))
    places = beside(points, [str(number) for number in range(1, 18)], TOP_LEFT, BOTTOM_RIGHT)
    for place in places:
        assert TOP_LEFT.x + 3 < place.x < BOTTOM_RIGHT.x - 3
        assert TOP_LEFT.y + 5 < place.y < BOTTOM_RIGHT.y - 5
        assert min(np.hypot(place.x - point.x, place.y - point.y) for point in points) > 7
    # A digit is 7 wide and 12 high: those side by side or one above the other are apart.
    assert all(abs(one.x - other.x) > 7 or abs(one.y - other.y) > 11 for one, other in combinations(places, 2))


def test_a_text_without_a_free_place_stands_right_of_its_point() -> None:
    points = [Place(x, y) for x in range(60, 441, 9) for y in range(10, 251, 9)]
    first, *_ = beside(points, ["1"] * len(points), TOP_LEFT, BOTTOM_RIGHT)
    assert (first.x > points[0].x, first.y) == (True, points[0].y)
