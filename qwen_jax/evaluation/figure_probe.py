"""Runs in the kernel of a code interpreter, after a snippet: describes the open figures as JSON and closes them.

`interpreter_benchmark.py` sends this file's text there. Untrusted code has run in that kernel before, so what it prints
is data to check, not the truth about a figure that tries to deceive.
"""

import json

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.patches import Wedge

MOST = 2000  # numbers of a series


def _numbers(values):
    array = np.ma.filled(np.ma.asarray(values), np.nan).ravel()[:MOST]
    try:
        return [None if not np.isfinite(one) else float(one) for one in array.astype(float)]
    except (TypeError, ValueError):  # dates and names
        return [str(one) for one in array]


def _texts(items):
    return [text for text in (one.get_text() for one in items) if text.strip()]


def _bars(container):
    bars = container.patches
    widths, heights = [bar.get_width() for bar in bars], [bar.get_height() for bar in bars]
    lying = getattr(container, "orientation", None) == "horizontal"
    touching = len(bars) > 1 and all(
        abs(one.get_x() + one.get_width() - two.get_x()) < 1e-9 for one, two in zip(bars, bars[1:], strict=False)
    )
    kind = "barh" if lying else "hist" if touching else "bar"
    return {"kind": kind, "values": _numbers(widths if lying else heights), "label": str(container.get_label())}


def _axes(axes):
    series = []
    for line in axes.get_lines():
        dots = line.get_linestyle() in ("None", "", " ") and line.get_marker() not in ("None", "", " ")
        values = {"x": _numbers(line.get_xdata(orig=False)), "values": _numbers(line.get_ydata(orig=False))}
        series.append({"kind": "scatter" if dots else "line", **values, "label": str(line.get_label())})
    series += [_bars(one) for one in axes.containers if isinstance(one, BarContainer)]
    for one in axes.collections:
        if isinstance(one, PathCollection) and len(one.get_offsets()):
            offsets = np.asarray(one.get_offsets())
            values = {"x": _numbers(offsets[:, 0]), "values": _numbers(offsets[:, 1])}
            series.append({"kind": "scatter", **values, "label": str(one.get_label())})
    wedges = [one for one in axes.patches if isinstance(one, Wedge)]
    if wedges:
        shares = [(one.theta2 - one.theta1) / 360 for one in wedges]
        series.append({"kind": "pie", "values": _numbers(shares), "label": ""})
    series += [{"kind": "image", "values": [], "label": ""} for _ in axes.images]
    legend = axes.get_legend()
    return {
        "series": series,
        "title": axes.get_title(),
        "x_label": axes.get_xlabel(),
        "y_label": axes.get_ylabel(),
        "texts": _texts([*axes.texts, *axes.get_xticklabels(), *axes.get_yticklabels()]),
        "legend": _texts(legend.get_texts()) if legend else [],
    }


def describe():
    figures = []
    for number in plt.get_fignums():
        figure = plt.figure(number)
        figure.canvas.draw()  # labels of ticks are made by drawing
        title = figure.get_suptitle()
        figures.append({"axes": [_axes(one) for one in figure.axes], "title": title})
    plt.close("all")
    return figures


print(json.dumps(describe()))
