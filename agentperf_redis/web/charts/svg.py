"""The parts that all charts share: escaped elements, a frame with its axes, and the description of each step."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from agentperf_redis.web.charts.axis import step_text, time_labels
from agentperf_redis.windows import Interval

Written = Callable[[float], str]
"""Returns a value as text with its unit."""

TOP, BOTTOM = 8, 22
"""Space in px above the plot, for the upper half of the highest label, and below the plot, for the times."""
WIDTH = 1000
"""Width of a nested SVG in its own units, whatever its width on the screen is."""


def element(name: str, *children: str, **attributes: object) -> Markup:
    """Return an element. Texts are escaped unless they are `Markup`.

    Args:
        name: its name.
        children: texts and elements inside.
        attributes: its attributes; those that are None are left out. ``class_`` stands for class, ``text_anchor`` for
            text-anchor.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inner = "".join(escape(child) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>" if inner else f"<{name}{written}/>")  # noqa: S704


def joined(parts: Iterable[str]) -> Markup:
    """Return the parts one after the other."""
    return Markup("").join(parts)


def percent(share: float) -> str:
    """Return a position in x."""
    return f"{_short(share * 100)}%"


def _short(value: object) -> str:
    """Return a value as short text, because a chart has hundreds of numbers."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def frame(
    label: str,
    intervals: Sequence[Interval],
    plot: str,
    *,
    height: int,
    ticks: Sequence[float],
    written: Written,
    texts: Sequence[str] = (),
) -> Markup:
    """Return a whole chart.

    Args:
        label: a sentence that describes the chart, for people who cannot see it.
        intervals: the steps, evenly spaced.
        plot: the drawing, in px from `TOP` downwards.
        height: height of the plot, px.
        ticks: values of the horizontal lines, from 0 to the top of the plot, evenly spaced.
        written: returns the text of a tick's value.
        texts: description of each step, shown while the pointer is on it.
    """
    lines, labels = [], []
    for number, tick in enumerate(ticks):
        y = TOP + height - height * number / max(1, len(ticks) - 1)
        lines.append(element("line", x1="0", x2="100%", y1=y, y2=y, class_="grid" if number else "axis"))
        labels.append((y, tidy(written(tick)) if tick or number else "0"))
    return side_by_side(
        label,
        labels,
        (*lines, time_axis(intervals, TOP + height), plot, hover_areas(intervals, texts, height)),
        height,
    )


def side_by_side(label: str, labels: Iterable[tuple[float, str]], plot: Iterable[str], height: float) -> Markup:
    """Return a chart: the labels of the values, and the plot beside them.

    Args:
        label: the chart in a sentence.
        labels: for each label, the y position of its middle in px, and its text.
        plot: the parts of the plot.
        height: height of the plot, px.
    """
    whole = height + TOP + BOTTOM
    texts = [element("text", text, x="100%", y=y + 4, text_anchor="end", class_="tick") for y, text in labels]
    return element(
        "div",
        element("svg", *texts, width="100%", height=whole, class_="labels"),
        element("svg", *plot, width="100%", height=whole, class_="plot"),
        class_="chart",
        role="img",
        aria_label=label,
    )


def time_axis(intervals: Sequence[Interval], bottom: float) -> Markup:
    """Return the labels of the time axis. On narrow screens, every second label is left out."""
    found = []
    for number, (share, text) in enumerate(time_labels(intervals)):
        anchor = "start" if share < _EDGE else "end" if share > 1 - _EDGE else "middle"
        shown = "tick" if number % 2 == 0 else "tick wide"
        found.append(element("text", text, x=percent(share), y=bottom + 16, text_anchor=anchor, class_=shown))
    return joined(found)


_EDGE = 0.03
"""A label that is nearer to an end of the axis than this share of the axis would be cut off if it were centred."""


def tidy(text: str) -> str:
    """Return the label of a round number without its decimal zeros: ``1 s`` instead of ``1.00 s``."""
    return _ZEROS.sub(r"\1", text)


_ZEROS = re.compile(r"\.0+(?!\d)|(\.\d*[1-9])0+(?!\d)")


def hover_areas(intervals: Sequence[Interval], texts: Sequence[str], height: int) -> Markup:
    """Return an invisible area for each step, with its time and description as the browser's tool tip."""
    count = len(texts)
    return joined(
        element(
            "g",
            element("title", f"{step_text(interval)}: {text}"),
            element("rect", x=percent(number / count), width=percent(1 / count), y=TOP, height=height),
            class_="step",
        )
        for number, (interval, text) in enumerate(zip(intervals, texts, strict=False))
    )


def curve(values: Sequence[float | None], largest: float, height: float) -> str:
    """Return the path of a line through the middles of the steps. Steps without a value interrupt it.

    A value between two gaps has no neighbour to connect to, so it becomes a short horizontal line.
    """
    step = WIDTH / max(1, len(values))
    path: list[str] = []
    pen_down = False
    for number, value in enumerate(values):
        if value is None:
            pen_down = False
            continue
        x, y = (number + 0.5) * step, height - height * min(value / largest, 1.0) if largest > 0 else height
        alone = not pen_down and (number + 1 == len(values) or values[number + 1] is None)
        if alone:
            path.append(f"M{_short(x - step / 3)} {_short(y)}H{_short(x + step / 3)}")
        else:
            path.append(f"{'L' if pen_down else 'M'}{_short(x)} {_short(y)}")
            pen_down = True
    return "".join(path)


def stretched(*children: str, y: float, height: float) -> Markup:
    """Return drawings stretched to the full width of the chart. In their own units, this width is `WIDTH`."""
    return element(
        "svg",
        *children,
        y=y,
        width="100%",
        height=height,
        viewBox=f"0 0 {WIDTH} {_short(float(height))}",
        preserveAspectRatio="none",
    )
