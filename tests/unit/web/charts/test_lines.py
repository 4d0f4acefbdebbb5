from __future__ import annotations

from agentperf_redis.web.charts.lines import Line, legend, line_chart
from agentperf_redis.windows import Interval

STEPS = [Interval(0, 60), Interval(60, 120), Interval(120, 180)]


def seconds(value: float) -> str:
    return f"{value:.2f} s"


def test_chart_describes_itself_and_each_step() -> None:
    lines = [Line("p95", [1.0, None, 3.0]), Line("p50", [0.5, 0.5, 1.0], "s3")]
    found = line_chart(STEPS, lines, seconds, "Percentiles <over> time")
    assert 'role="img" aria-label="Percentiles &lt;over&gt; time"' in found
    assert "p95 no data, p50 0.50 s" in found
    assert 'class="line s1"' in found
    assert 'class="line s3"' in found
    assert ">3 s<" in found


def test_first_line_is_drawn_last() -> None:
    found = line_chart(STEPS, [Line("a", [1.0] * 3, "s1"), Line("b", [1.0] * 3, "s2")], seconds, "")
    plot = found[found.index('class="chart"') :]
    assert plot.index("line s2") < plot.index("line s1")


def test_single_line_needs_no_legend() -> None:
    assert legend([("p95", "line s1")]) == ""
    assert legend([("a<", "line s1"), ("b", "s2")]).count("<li>") == 2


def test_chart_without_steps_is_empty_but_whole() -> None:
    assert line_chart([], [Line("a", [])], seconds, "nothing").count("<svg") == 3
