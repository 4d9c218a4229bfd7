import math
import random
import re

import matplotlib
import pytest

from malora_dist.report.charts import Line, line_chart, number, smoothed
from malora_dist.report.theme import task_colour


@pytest.mark.parametrize("n", [1, 2, 7, 60])
def test_smoothing_equals_its_definition(n: int) -> None:
    chance = random.Random(n)
    values = [chance.gauss(0, 1) for _ in range(n)]
    half_life = max(1.0, n / 20)
    for i, mean in enumerate(smoothed(values)):
        weights = [0.5 ** (abs(i - j) / half_life) for j in range(n)]
        assert math.isclose(mean, sum(map(math.prod, zip(weights, values, strict=True))) / sum(weights), abs_tol=1e-12)
    assert smoothed([]) == []


def test_a_chart_follows_the_pages_colours_and_keeps_its_ids_apart() -> None:
    before = dict(matplotlib.rcParams)
    line = Line([1, 2, 3], [3.0, 2.0, 1.0], task_colour(2), smooth=True, raw=True)
    svg = line_chart("one", [line], label='falls & "ends"', reference=1.0, from_zero=True)
    assert svg.startswith("<svg ") and "var(--task-2)" in svg and "var(--muted)" in svg and "#0" not in svg
    assert 'aria-label="falls &amp; &quot;ends&quot;"' in svg and "http" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert ids and all(name.startswith("one-") for name in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', svg)) <= set(ids)
    assert svg == line_chart("one", [line], label='falls & "ends"', reference=1.0, from_zero=True)
    assert dict(matplotlib.rcParams) == before


def test_numbers_for_axes() -> None:
    shown = [number(value) for value in (0.0, 0.1 + 0.2, 5e-5, 9000, 20_000, 2.5e6)]
    assert shown == ["0", "0.3", "5e-05", "9000", "20k", "2.5M"]
