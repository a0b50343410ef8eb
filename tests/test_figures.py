"""Every kind of figure under extremes: no two texts overlap, and none leaves the canvas."""

import inspect
import itertools
import math
import struct

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install -e '.[plot]'")

from matplotlib.colors import to_rgb
from matplotlib.text import Text

from gptjax.figures import inspection, plan, runs, scaling
from gptjax.figures.series import column, smooth, thin, top_of_range
from gptjax.figures.style import DARK, LIGHT, NARROW_IN, THEMES, Look, Sheet, quiet, to_bytes, to_inline
from gptjax.figures.ticks import labels
from gptjax.shell import display

LONG = "a-run-whose-name-nobody-would-type-but-a-launcher-does-with-80-characters-in-all"
CHINESE = "莎士比亚全集字符级模型第三次训练运行学习率零点零二批量十二"
NAN = float("nan")
LOOKS = [Look(), Look(DARK, NARROW_IN)]


# ---- what is drawn: each case of a kind is a function of the look


def rows_of(steps, loss=None, **extra):
    """Rows of metrics.jsonl with a loss that falls from 10."""
    made = []
    for step in steps:
        value = 1.4 + 9 * math.exp(-step / 50) if loss is None else loss
        row = {"step": step, "tokens": 1536 * step, "train/loss": value, "lr": 0.02, "grad_norm": 1.5, "mfu": 0.4}
        row |= {"val/loss": value + 0.01, "val/bpb": value / 0.69, "tokens_per_s": 12345.6, "skipped": 0.0}
        made.append(row | extra)
    return made


def grid(n_budgets, n_sizes=7, low=1e3, high=1e12):
    params, flops = np.meshgrid(
        np.geomspace(low, high, n_sizes), np.geomspace(1e11, 1e26, max(2, n_budgets))[:n_budgets]
    )
    loss = 1.5 + 0.1 * np.log(params / 1e6) ** 2 / 50 + 3 * (flops / 1e11) ** -0.1
    return scaling.Runs(params.ravel(), flops.ravel(), loss.ravel())


def valleys_of(found):
    return [
        scaling.Valley(c, found.params[found.flops == c], found.loss[found.flops == c], (1e6, 2.0))
        for c in np.unique(found.flops)
    ]


def with_gaps(found):
    loss = found.loss.copy()
    loss[::2] = NAN
    return scaling.Runs(found.params, found.flops, loss)


NOTHING = scaling.Runs(np.array([]), np.array([]), np.array([]))
ONE = scaling.Runs(np.array([1e6]), np.array([1e12]), np.array([2.5]))
STUDIES = {
    "one point": ONE,
    "one budget": grid(1),
    "nine budgets": grid(9),
    "thirty budgets": grid(30, 17),
    "half of it NaN": with_gaps(grid(3)),
    "narrow range": grid(3, 5, 9e5, 1.1e6),
    "no rows": NOTHING,
}
BAND = scaling.Band(*(np.geomspace(1e11, 1e27, 40),) * 4)
CURVE_X = np.arange(1.0, 60) * 1000
RUNS = {
    "one point": [runs.Curve("one", np.array([2.0]), {"steps": np.array([5.0])})],
    "forty runs": [
        runs.Curve(
            f"{LONG[:-2]}{i:02d}", 1.4 + 0.01 * i + 5 * np.exp(-CURVE_X / 5e3), dict.fromkeys(runs.AGAINST, CURVE_X)
        )
        for i in range(40)
    ],
    "Chinese": [runs.Curve(f"{CHINESE}{i}", 3 + 0 * CURVE_X, {"tokens": 1e9 * CURVE_X}) for i in range(8)],
    "NaN": [runs.Curve("nan", np.full(5, NAN), {"steps": np.arange(5.0)})],
    "five steps and a month": [
        runs.Curve(name, 9 / (1 + CURVE_X), dict.fromkeys(runs.AGAINST, x))
        for name, x in (("short", np.linspace(0, 5, 59)), ("long", np.linspace(0, 2.6e6, 59)))
    ],
    "none": [],
}
CHIPS = {
    "one chip": [plan.Chip(0, 0, 0, 0, 0)],
    "64": [plan.Chip(i % 8, i // 8, i // 4, i, i) for i in range(64)],
    "4096": [plan.Chip(i % 64, i // 64, i // 4, i % 512, i) for i in range(4096)],
}
RATES = 2.0 ** np.arange(-11, -5)
SWEEP = scaling.Sweep(LONG, RATES, 2 + 0.1 * (np.log2(RATES) + 8) ** 2, 2.0**-8)
FORECASTS = [
    scaling.Forecast(f"{CHINESE}{i}", 1.5 + i / 10, 1.4 + i / 10, 1.6 + i / 10, 1.55 if i else None) for i in range(9)
]

CASES = {
    "loss": {
        "usual": lambda look: runs.draw_loss(
            rows_of(range(0, 3000, 10)),
            LONG,
            [{"step": 700, "event": "resume"}, {"step": 1200, "event": "rollback"}],
            look=look,
        ),
        "one point": lambda look: runs.draw_loss(rows_of([5]), "one", look=look),
        "no rows": lambda look: runs.draw_loss([], CHINESE, look=look),
        "NaN": lambda look: runs.draw_loss(rows_of(range(9), loss=NAN), "nan", look=look),
        "skipped": lambda look: runs.draw_loss(rows_of(range(1, 90), skipped=2.0), CHINESE * 3, look=look),
        "step 0 only": lambda look: runs.draw_loss([{"step": 0, "tokens": 0, "val/loss": 4.1}], "begun", look=look),
        "a trillion tokens": lambda look: runs.draw_loss(rows_of(range(0, 2_000_000, 20_000)), "long", look=look),
        "missing keys": lambda look: runs.draw_loss([{"step": 3, "val/loss": 2.0}], "few", look=look),
    },
    "metric": {
        f"{metric.key} {name}": lambda look, metric=metric, rows=rows: runs.draw_metric(rows, metric, look=look)
        for metric, name, rows in [
            *((metric, "usual", rows_of(range(100))) for metric in runs.METRICS),
            (runs.METRICS[2], "NaN", rows_of(range(9), grad_norm=NAN)),
            (runs.METRICS[3], "one", rows_of([7])),
        ]
    },
    "compare": {name: lambda look, many=many: runs.draw_compare(many, look=look) for name, many in RUNS.items()},
    "compute": {
        name: lambda look, found=found: scaling.draw_compute(
            found, BAND, ONE, scaling.Band(*(np.array([x]) for x in (1e12, 2.5, 2.4, 2.6))), LONG, look=look
        )
        for name, found in STUDIES.items()
    },
    "valleys": {
        name: lambda look, found=found: scaling.draw_valleys(valleys_of(found), CHINESE * 2, look=look)
        for name, found in STUDIES.items()
    },
    "residuals": {
        name: lambda look, found=found: scaling.draw_residuals(found, found.loss * 1.01, 0.004, look=look)
        for name, found in STUDIES.items()
    },
    "sweeps": {
        "two recipes": lambda look: scaling.draw_sweeps(
            {"standard": [SWEEP] * 3, LONG: [SWEEP]}, LONG * 2, look=look
        ),
        "forty curves": lambda look: scaling.draw_sweeps(
            {"": [scaling.Sweep(f"{i} {LONG}", RATES, SWEEP.losses + i) for i in range(40)]}, "forty", look=look
        ),
        "one rate": lambda look: scaling.draw_sweeps(
            {"": [scaling.Sweep("x", RATES[:1], RATES[:1])]}, "1", look=look
        ),
        "NaN": lambda look: scaling.draw_sweeps({"": [scaling.Sweep("x", RATES, RATES * NAN)]}, "nan", look=look),
        "none": lambda look: scaling.draw_sweeps({}, "none", look=look),
    },
    "batch": {
        name: lambda look, n=n, critical=critical: scaling.draw_batch(
            np.geomspace(1e2, 1e7, 6)[:n], np.geomspace(1e5, 1e12, 6)[:n], None, critical, "batch", look=look
        )
        for name, n, critical in (("six", 6, 1e4), ("one", 1, NAN), ("none", 0, NAN))
    },
    "coordinates": {
        "usual": lambda look: scaling.draw_coordinates(
            [64, 128, 256, 512], {name: [1, 2, 3, 4.5] for name in ("attention", "mlp", LONG)}, {}, LONG, look=look
        ),
        "one width": lambda look: scaling.draw_coordinates([64], {"mlp": [1.0]}, {"mlp": NAN}, "one", look=look),
        "NaN": lambda look: scaling.draw_coordinates([64, 128], {"mlp": [NAN, 0.0]}, {}, "nan", look=look),
    },
    "forecasts": {
        "nine": lambda look: scaling.draw_forecasts(FORECASTS, LONG, look=look),
        "none": lambda look: scaling.draw_forecasts([], "none", look=look),
        "NaN": lambda look: scaling.draw_forecasts([scaling.Forecast("x", NAN, NAN, NAN, NAN)], "nan", look=look),
    },
    "memory": {
        "ten parts": lambda look: plan.draw_memory({f"{LONG}{i}": 2e9 * i for i in range(10)}, 9e10, LONG, look=look),
        "too much": lambda look: plan.draw_memory({"weights": 9e12}, 1e10, "does not fit", look=look),
        "nothing": lambda look: plan.draw_memory({"weights": 0.0, "x": NAN}, 16e9, "nothing", look=look),
    },
    "roofline": {
        "all": lambda look: plan.draw_roofline(
            1e15, 2e14, {"hbm": (1e11, 8e11), "ici": (1e10, 2e11), "dcn": (1e6, 3e9)}, 8e13, LONG, look=look
        ),
        "none": lambda look: plan.draw_roofline(1e15, 2e14, {"dcn": (0.0, 3e9)}, 8e13, "one chip", look=look),
    },
    "mesh": {
        name: lambda look, chips=chips: plan.draw_mesh(chips, LONG, CHINESE, look=look)
        for name, chips in CHIPS.items()
    },
    "attention": {
        f"{L} layers, {H} heads, {T} tokens": lambda look, shape=(L, H, T, T): inspection.draw_attention(
            np.full(shape, 0.5), LONG, look=look
        )
        for L, H, T in ((1, 1, 1), (48, 25, 8), (80, 128, 4), (4, 4, 60))
    },
    "layers_by_tokens": {
        f"{L} layers, {T} tokens, {size:g}": lambda look, L=L, T=T, size=size: inspection.draw_layers_by_tokens(
            np.linspace(-size, size, L * T).reshape(L, T), ["intercontine…"] * T, CHINESE, LONG, "logit", look=look
        )
        for L, T, size in ((1, 1, 0.0), (13, 12, 3.0), (81, 1024, 1e-7), (4, 60, 1e9))
    },
    "candidates": {
        "many": lambda look: plan.draw_candidates(
            [plan.Candidate(LONG, 1e9 * i, 0.001 * 1.1**i, i == 3) for i in range(1, 90)], 96e9, LONG, look=look
        ),
        "one": lambda look: plan.draw_candidates([plan.Candidate("x", 1e9, 1.0, True)], 16e9, "one", look=look),
        "none": lambda look: plan.draw_candidates([], 16e9, "none", look=look),
    },
}


def test_every_kind_has_its_cases():
    kinds = {
        name
        for module in (runs, scaling, plan, inspection)
        for name, _ in inspect.getmembers(module)
        if name.startswith("draw_")
    }
    assert kinds == {f"draw_{kind}" for kind in CASES}


def drawn_texts(sheet: Sheet, monkeypatch) -> tuple[list, tuple[int, int]]:
    """The texts that a figure draws, with the boxes that the renderer gives them; and the canvas' size."""
    found = []
    draw = Text.draw

    def record(self, renderer):
        if self.get_visible() and self.get_text().strip():
            found.append((self.get_text(), self.get_window_extent(renderer)))
        return draw(self, renderer)

    with monkeypatch.context() as patched, quiet():
        patched.setattr(Text, "draw", record)
        sheet.figure.draw_without_rendering()
    return found, (sheet.figure.bbox.width, sheet.figure.bbox.height)


@pytest.mark.parametrize("look", LOOKS, ids=["wide", "narrow"])
@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in CASES.items() for case in cases])
def test_no_two_texts_overlap_and_none_leaves_the_canvas(kind, case, look, monkeypatch):
    sheet = CASES[kind][case](look)
    texts, (width, height) = drawn_texts(sheet, monkeypatch)
    assert texts, "an empty figure says why it is empty"
    for text, box in texts:
        outside = box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height
        assert not outside, f"{text!r} leaves the canvas: {box.extents} of {width} x {height}"
    for (one, a), (other, b) in itertools.combinations(texts, 2):
        apart = a.x1 <= b.x0 + 0.5 or b.x1 <= a.x0 + 0.5 or a.y1 <= b.y0 + 0.5 or b.y1 <= a.y0 + 0.5
        assert apart, f"{one!r} and {other!r} overlap: {a.extents}, {b.extents}"


def test_the_check_sees_an_overlap(monkeypatch):
    sheet = CASES["metric"]["lr usual"](Look())
    sheet.figure.text(0.5, 0.5, "one")
    sheet.figure.text(0.51, 0.5, "another")
    boxes = dict(drawn_texts(sheet, monkeypatch)[0])
    assert boxes["one"].overlaps(boxes["another"])


def test_boxes_are_measured_at_the_resolution_of_the_file():
    sheet = CASES["forecasts"]["nine"](Look())
    wide, high = struct.unpack(">II", to_bytes(sheet)[16:24])
    assert (wide, high) == pytest.approx(tuple(sheet.figure.bbox.size), abs=1)


# ---- colours


def contrast(one: str, other: str) -> float:
    """The contrast of two colours, 1 to 21 (WCAG 2.2, relative luminance)."""

    def luminance(colour):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", THEMES.values(), ids=list(THEMES))
def test_text_and_marks_stand_out(theme):
    for colour in (theme.ink, theme.muted, theme.good, theme.bad):
        assert contrast(colour, theme.paper) >= 4.5
    for colour in (*theme.series, *theme.ordered):
        assert contrast(colour, theme.paper) >= 2.0
    assert len(set(theme.series)) == len(LIGHT.series) and len(set(theme.ordered)) == len(LIGHT.ordered)


def test_a_page_gives_a_figure_its_own_colours():
    text = to_inline(CASES["loss"]["usual"](Look()), "f1")
    assert "var(--ink)" in text and "var(--series-0)" in text and 'id="f1-' in text
    assert not any(colour in text for colour in LIGHT.names().values() if colour != "#ffffff")


def test_the_same_figure_gives_the_same_bytes():
    make = CASES["valleys"]["nine budgets"]
    for kind in ("png", "svg"):
        assert to_bytes(make(Look()), kind) == to_bytes(make(Look()), kind)


# ---- series


def test_thinning_keeps_the_extremes_and_the_ends():
    x = np.arange(100_000.0)
    y = np.random.default_rng(0).normal(size=100_000)
    y[54_321], y[70_000], y[3] = 99.0, -99.0, NAN
    thin_x, thin_y = thin(x, y, 1000)
    assert len(thin_x) <= 1000
    assert {0.0, 54_321.0, 70_000.0, 99_999.0} <= set(thin_x)
    assert np.array_equal(thin_y, y[thin_x.astype(int)], equal_nan=True)
    assert thin(x[:10], y[:10], 1000)[0] is not None and len(thin(x[:10], y[:10], 1000)[0]) == 10


def test_a_column_leaves_out_what_is_missing_and_breaks_at_nan():
    rows = [{"step": 1, "a": 2.0}, {"step": 2, "a": None}, {"step": 3}, {"step": 4, "a": NAN}, {"step": "x", "a": 3}]
    x, y = column(rows, "a")
    assert x.tolist() == [1, 4] and y[0] == 2 and np.isnan(y[1])


def test_smoothing_keeps_a_straight_line_and_fills_gaps():
    line = np.arange(1000.0)
    assert np.allclose(smooth(line)[:974], line[:974])
    assert smooth(line)[-1] == pytest.approx(999 - 12.5)  # the end is the mean of the last half window
    gap = line.copy()
    gap[500] = NAN
    assert smooth(gap)[500] == pytest.approx(500)
    assert smooth(line[:10]) is not None and len(smooth(line[:10])) == 10


def test_the_range_leaves_the_first_steps_out():
    x = np.arange(100.0)
    y = np.where(x < 8, 10.0, 2.0)
    assert top_of_range([(x, y)]) == 2.0
    assert top_of_range([(x, np.full(100, NAN))]) is None
    assert top_of_range([(x, np.linspace(3, 1, 100))]) == 3.0, "a slow fall is no fall of the first steps"


# ---- numbers and tables


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (display.count, 1_234_567, "1.23 M"),
        (display.count, 999_999, "1 M"),
        (display.count, 3.4e9, "3.4 B"),
        (display.count, 768, "768"),
        (display.count, 1e18, "10¹⁸"),
        (display.count, NAN, "–"),
        (display.size, 787 * 2**20, "787 MiB"),
        (display.size, 1.46 * 2**30, "1.46 GiB"),
        (display.duration, 7800, "2 h 10 min"),
        (display.duration, 0.24, "240 ms"),
        (display.duration, 59.99, "60 s"),
        (display.duration, 3599.9, "1 h"),
        (display.duration, 3 * 86400 + 4 * 3600 + 59, "3 d 4 h"),
        (display.power, 3e11, "3×10¹¹"),
        (display.power, 1e-3, "10⁻³"),
        (display.power, 0.0, "0"),
        (display.power, NAN, "–"),
        (display.significant, 0.0123456, "0.0123"),
        (display.significant, 1.4999, "1.50"),
        (display.significant, 24317.2, "24,300"),
    ],
)
def test_numbers_are_written_for_people(write, value, text):
    assert write(value) == text


def test_ticks_are_told_apart():
    assert labels(np.array([1_000_100.0, 1_000_200.0]), "count") == ["1.0001 M", "1.0002 M"]
    assert labels(np.array([1.5, 1.75, 2.0]), "plain") == ["1.50", "1.75", "2.00"]
    assert labels(np.array([0.0, 250.0, 1250.0]), "whole") == ["0", "250", "1,250"]
    assert labels(np.array([0, 5e-5, 1e-4, 3e-4]), "plain") == ["0.00000", "0.00005", "0.00010", "0.00030"]
    assert labels(np.array([0, 5e-5]), "plain") == ["0", "5×10⁻⁵"]


def test_a_table_is_aligned_whatever_is_in_it():
    lines = display.table([["莎士比亚", "1.5"], ["b\x1b[31m", "12.25"]], header=["run", "loss"])
    assert len({display.width(line) for line in lines}) == 1
    assert "\x1b" not in "".join(lines)
    lines = display.table([["a", "1", "held"], ["bb", "10"]], left=(0, -1))
    assert lines == ["a    1  held", "bb  10"], "the first and the last column hold words"
    assert display.shorten(LONG, 20).count("…") == 1 and display.width(display.shorten(CHINESE, 20)) <= 20


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    class Terminal:
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert display.paint("x", "red", Terminal()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert display.paint("x", "red", Terminal()) == "x"
    monkeypatch.delenv("NO_COLOR")
    assert display.paint("x", "red", open("/dev/null")) == "x"  # noqa: SIM115
