"""Charts as SVG, made on the server. They work without JavaScript and under a strict Content-Security-Policy.

A chart is two drawings side by side: the labels of the values, and the plot. The drawings have no viewBox, so that text
keeps its size on any screen. Positions in x are percentages, and positions in y are pixels. Only curves, which SVG
cannot place by percentages, are drawn in a nested SVG that is stretched. Colours, dashes and hatching come from the
classes ``s1`` to ``s6`` and ``h1`` to ``h6`` of the style sheet.
"""
