"""Kernels of Canvas that are built by hand, each to use some primitive in some layout."""

from __future__ import annotations

from cofire.search.canvas import DimName, Graph, Kernel
from cofire.search.canvas.primitives import (
    Activation,
    Bmm,
    Broadcast,
    Convolution,
    Elementwise,
    Fc,
    Fold,
    Group,
    Mix,
    Output,
    Scale,
    Shift,
    Softmax,
    Unfold,
)
from cofire.search.canvas.variables import ONE, C, G, H, W, number

GROUPS, CHANNELS, KH, KW = (DimName(0, name) for name in ("G", "C", "KH", "KW"))
HEIGHT, WIDTH = DimName(1, "H"), DimName(1, "W")
HALF = C / number(2)
SPACE_FIRST = (Bmm(transpose_left=True), 0, 0), (Bmm(transpose_right=True), 1, 0)  # [H W | C]
GRAM = ((Bmm(transpose_right=True), 0, 0),)  # [C | C]


def build(*steps, groups: int = 2) -> Kernel:
    """Apply primitives one after the other, or as (primitive, *positions of its inputs), and an output."""
    graph = Graph.start()
    for step in (*steps, Output()):
        primitive, *inputs = step if isinstance(step, tuple) else (step, len(graph.nodes) - 1)
        graph = graph.apply(primitive, *inputs)
    return Kernel(graph, groups)


CASES = {
    "fc": build(Fc(C)),
    "fc of groups": build(Group(G), Fc(C)),
    "fc narrower and wider": build(Fc(HALF), Fc(C)),
    "fc of a window": build(Unfold("HW", 3), Fc(C)),
    "fc of windows of a row": build(Fold("avg", (HEIGHT,)), Unfold("W", 3), Fc(C), (Broadcast("add"), 3, 0)),
    "fc of means": build(Fold("avg", (HEIGHT, WIDTH)), Fc(C), (Broadcast("mul"), 2, 0)),
    "fc after space": build(*SPACE_FIRST, Fc(C, meta=1)),
    "fc of groups after space": build(*SPACE_FIRST, Group(G, meta=1), Fc(C, meta=1)),
    "fc of either of two channels": build(*GRAM, Fc(HALF, meta=1), Fc(C), (Fc(HALF), 0), (Bmm(), 3, 4)),
    "fc beside three dims of channels": build(
        *(*GRAM, Group(G, meta=1), Mix((DimName(1, "C"), DimName(1, "KH")), (C / G, number(3))), Fc(C)),
        *(Fold("avg", (DimName(1, "KH"),)), (Bmm(), 5, 0)),
    ),
    "convolution": build(Convolution(3, 1, C)),
    "dilated convolution": build(Convolution(5, 2, C)),
    "convolution of groups": build(Group(G), Convolution(3, 1, C)),
    "depthwise convolution": build(Convolution(3, 2)),
    "depthwise convolution of groups": build(Group(G), Convolution(3), Scale((GROUPS, CHANNELS, WIDTH))),
    "convolution after space": build(*SPACE_FIRST, Convolution(3, 1, C)),
    "depthwise convolution after space": build(*SPACE_FIRST, Group(G, meta=1), Convolution(3)),
    "mix of channels": build(Group(G), Mix((CHANNELS,), (C / G,))),
    "mix of space": build(Mix((CHANNELS, WIDTH), (C, W))),
    "mix into one": build(Mix((HEIGHT, WIDTH), (ONE, W)), (Broadcast("add"), 1, 0)),
    "mix out of one": build(Fold("max", (HEIGHT,)), Mix((HEIGHT, WIDTH), (H, W))),
    "mix of a window": build(Unfold("W", 3), Mix((CHANNELS, KW), (C, ONE))),
    "scale of channels": build(Scale((CHANNELS,))),
    "scale of space": build(Scale((HEIGHT, WIDTH))),
    "scale of ends": build(Scale((CHANNELS, WIDTH))),
    "fold of windows": build(Unfold("HW", 3), Fold("max", (KH, KW))),
    "fold of one side of windows": build(Unfold("HW", 3, 2), Fold("avg", (KW,)), Fold("max", (KH,))),
    "unfold of height": build(Unfold("H", 5), Fold("avg", (KH,))),
    "unfold of width, then of height": build(
        *(Unfold("W", 3, 3), Unfold("H", 3), Scale((KH, KW)), Fold("avg", (KH,)), Fold("avg", (KW,)))
    ),
    "unfold after space": build(*SPACE_FIRST, Unfold("HW", 3), Fc(C, meta=1)),
    "shifts": build(Shift((HEIGHT,), 2), Shift((HEIGHT, WIDTH)), Shift((CHANNELS,), 3)),
    "shift of a window": build(Unfold("H", 3), Shift((KH,)), Scale((KH,)), Fold("avg", (KH,))),
    "softmaxes": build(Softmax(CHANNELS), Softmax(WIDTH)),
    "activations": build(*map(Activation, ("gelu", "tanh", "sigmoid", "relu"))),
    "elementwise": build(*map(Elementwise, ("sin", "exp", "neg", "abs", "sqr", "sqrt"))),
    "stretch of halves": build(Fc(HALF), (Broadcast("sub"), 1, 0)),
    "stretch of rows": build(Fold("avg", (HEIGHT,)), Scale((CHANNELS,)), (Broadcast("max"), 2, 0)),
    "stretch of all": build(Fold("avg", (CHANNELS,)), Fold("max", (HEIGHT, WIDTH)), (Broadcast("min"), 2, 0)),
    "stretch into a window": build(
        *(Scale((CHANNELS,)), (Unfold("HW", 3), 0), (Broadcast("mul"), 1, 2), Fold("avg", (KH, KW)))
    ),
    "stretch of channels over groups": build((Group(G), 0), (Broadcast("add"), 0, 1), (Broadcast("sub"), 2, 0)),
    "products of both": build(*GRAM, (Bmm(), 1, 0)),
    "attention": build(
        *[(Fc(C), 0)] * 3, (Bmm(transpose_left=True, softmax=True), 1, 2), (Bmm(transpose_right=True), 3, 4)
    ),
    "product that turns both": build(
        *(*SPACE_FIRST, (Bmm(transpose_left=True, transpose_right=True), 0, 2), (Bmm(), 0, 3))
    ),
}
