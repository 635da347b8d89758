"""Drawings of networks for the plan's page: fat trees of any layers and planes, groups in a circle, tori.

A drawing says what there is and how it is joined; where there are many of a thing it shows the first ones, the last
one and the count. Left out: every single link; :mod:`cofire.network` has these.
"""

from __future__ import annotations

import math
from typing import TypeAlias

from cofire.plan.page.figures import GroupedTopology, LayeredTopology, SwitchLayer, TorusTopology
from cofire.plan.page.svg import WIDTH, clipped, colour, drawing, legend, line, number, rect, table, tag, tipped, words

MAX_PLANES = 4

_Place: TypeAlias = tuple[float, float]

_LEFT = 176.0
_LAYER = 92.0
_BOX = 20.0
_HOSTS = 3
_PARTS = 8


def draw_layered(topology: LayeredTopology) -> str:
    """Draw a fat tree: a column a plane, a row a layer, hosts below with their NICs in the planes' colours."""
    planes = min(topology.num_planes, MAX_PLANES)
    width = (WIDTH - _LEFT) / planes
    shown_each = 5 if planes <= 2 else 4 if planes == 3 else 3
    body = []
    # A little less than the column, so that planes stand apart.
    lefts = [_LEFT + plane * width + 0.03 * width for plane in range(planes)]
    centres = [
        [_centres(left, 0.94 * width, layer.count_per_plane, shown_each) for left in lefts] for layer in topology.layers
    ]
    for depth, layer in enumerate(topology.layers):
        y = 34 + depth * _LAYER
        body.append(_layer_name(topology, depth, y))
        for plane in range(planes):
            below = centres[depth + 1][plane] if depth + 1 < len(centres) else []
            for x in centres[depth][plane]:
                body += [line(x, y + _BOX, other, y + _LAYER, f"link {colour(plane)}") for other in below]
        for plane in range(planes):
            place = f"{topology.plane_name} {plane + 1}"
            body.append(_switches(layer, centres[depth][plane], y, place, colour(plane)))
    if topology.num_planes > 1:
        for plane in range(planes):
            body.append(
                words(_LEFT + (plane + 0.5) * width, 18, f"{topology.plane_name} {plane + 1}", "soft", "middle")
            )
        if topology.num_planes > planes:
            body.append(words(8, 18, f"{planes} of {topology.num_planes} {topology.plane_name}s drawn", "soft small"))
    y = 34 + len(topology.layers) * _LAYER
    body.append(_hosts(topology, centres[-1], y))
    about = ", ".join(
        f"{layer.count_per_plane} {layer.name} switches a {topology.plane_name}" for layer in topology.layers
    )
    about += f", {topology.num_planes} {topology.plane_name}s, {topology.num_hosts} hosts"
    keys = [(colour(plane), f"{topology.plane_name} {plane + 1}") for plane in range(planes)]
    head = legend(keys) if topology.num_planes > 1 else ""
    return head + tag("div", drawing(topology.title, about, y + 132, "".join(body)), class_="topology")


def _centres(left: float, width: float, count: int, most: int) -> list[float]:
    """Return the middles of the boxes drawn of ``count``, with a gap before the last where some are missing."""
    drawn = min(count, most)
    if drawn == count:
        return [left + width * (i + 0.5) / drawn for i in range(drawn)]
    slots = drawn + 1
    return [left + width * (i + 0.5) / slots for i in (*range(drawn - 1), slots - 1)]


def _many(count: int, one: str, many: str = "") -> str:
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _layer_name(topology: LayeredTopology, depth: int, y: float) -> str:
    layer = topology.layers[depth]
    total = layer.count_per_plane * topology.num_planes
    body = words(8, y + 8, layer.name, "strong")
    count = _many(layer.count_per_plane, "switch", "switches")
    if topology.num_planes > 1:
        count = f"{layer.count_per_plane:,} x {topology.num_planes} = {total:,} switches"
    body += words(8, y + 24, count, "soft small")
    if layer.link:
        body += words(8, y + _BOX / 2 + _LAYER / 2 + 6, clipped(layer.link, _LEFT - 16, 11), "soft small")
    return body


def _switches(layer: SwitchLayer, centres: list[float], y: float, place: str, series: str) -> str:
    count = layer.count_per_plane
    wide = min(54.0, (centres[1] - centres[0]) * 0.72) if len(centres) > 1 else 54.0
    body = []
    for index, x in enumerate(centres):
        label = index + 1 if index + 1 < len(centres) or len(centres) == count else count
        tip = f"{layer.name} {label} of {count}, {place}"
        body.append(rect(x - wide / 2, y, wide, _BOX, f"box {series}", tip))
        body.append(words(x, y + 14, str(label), "small", "middle"))
    if len(centres) < count and len(centres) > 1:
        body.append(words((centres[-2] + centres[-1]) / 2, y + 14, "...", "soft", "middle"))
    return "".join(body)


def _hosts(topology: LayeredTopology, leaves: list[list[float]], y: float) -> str:
    """Draw the first hosts and the last one, each with its NICs, its devices and the links to the leaves."""
    drawn = min(topology.num_hosts, _HOSTS)
    gap = 46.0 if drawn < topology.num_hosts else 14.0
    width = (WIDTH - _LEFT - 14 * max(drawn - 2, 0) - gap * (drawn > 1)) / drawn
    parts, links = [_host_names(topology, y)], []
    for index in range(drawn):
        last = index == drawn - 1
        left = _LEFT + index * (width + 14) + (gap - 14 if last and drawn > 1 else 0.0)
        host = topology.num_hosts - 1 if last else index
        parts.append(_host(topology, host, left, width, y))
        for nic in range(min(topology.nics_per_host, _PARTS)):
            plane = _plane(topology, host, nic)
            if plane < len(leaves):
                x = _part(left, width, nic, min(topology.nics_per_host, _PARTS))
                leaf = leaves[plane][-1 if last and drawn > 1 else min(index, len(leaves[plane]) - 1)]
                links.append(line(x, y + 10, leaf, y - _LAYER + _BOX, f"link {colour(plane)}"))
        if last and drawn < topology.num_hosts:
            parts.append(words(left - gap / 2, y + 60, "...", "soft", "middle"))
    return "".join(parts + links)


def _plane(topology: LayeredTopology, host: int, nic: int) -> int:
    """Return the plane of a NIC: hosts in blocks where they are split, else the NICs go round the planes."""
    if topology.split_hosts:
        return host * topology.num_planes // topology.num_hosts
    return nic % topology.num_planes


def _part(left: float, width: float, index: int, count: int) -> float:
    return left + 5 + (width - 10) * (index + 0.5) / count


def _host(topology: LayeredTopology, host: int, left: float, width: float, y: float) -> str:
    nics, devices = min(topology.nics_per_host, _PARTS), min(topology.devices_per_host, _PARTS)
    inside = clipped(topology.inside_link, width - 90, 11)
    body = [
        rect(left, y, width, 118, "host"),
        words(left + 8, y + 112, f"host {host + 1:,}", "small"),
        words(left + width - 8, y + 112, inside, "soft small", "end"),
    ]
    paired = nics == devices
    for nic in range(nics):
        x, wide, plane = _part(left, width, nic, nics), min(34.0, width / nics - 5), _plane(topology, host, nic)
        kind = f"box {colour(plane)}" if plane < MAX_PLANES else "box"
        tip = f"NIC {nic + 1} of {topology.nics_per_host}, {topology.plane_name} {plane + 1}"
        body.append(line(x, y + 28, x, y + (58 if paired else 43), "wire"))
        body.append(rect(x - wide / 2, y + 10, wide, 18, kind, tip))
        body.append(words(x, y + 23, "NIC" if wide > 24 else "", "tiny", "middle"))
    for device in range(devices):
        x, wide = _part(left, width, device, devices), min(34.0, width / devices - 5)
        tip = f"{topology.device_name} {device + 1} of {topology.devices_per_host}"
        body.append("" if paired else line(x, y + 43, x, y + 58, "wire"))
        body.append(rect(x - wide / 2, y + 58, wide, 26, "device", tip))
        body.append(words(x, y + 75, topology.device_name if wide > 26 else "", "tiny", "middle"))
    if not paired:
        ends = [_part(left, width, i, count) for count in (nics, devices) for i in (0, count - 1)]
        body.append(line(min(ends), y + 43, max(ends), y + 43, "wire"))
    if topology.inside_link:
        body.append(line(left + 10, y + 91, left + width - 10, y + 91, "bus"))
    return "".join(body)


def _host_names(topology: LayeredTopology, y: float) -> str:
    def count(number_: int, name: str) -> str:
        more = f" ({_PARTS} drawn)" if number_ > _PARTS else ""
        return f"{number_} {name}{'s' * (number_ > 1)} each{more}"

    total = topology.num_hosts * topology.devices_per_host
    return (
        words(8, y + 12, "hosts", "strong")
        + words(8, y + 28, f"{topology.num_hosts:,}", "soft small")
        + words(8, y + 44, count(topology.nics_per_host, "NIC"), "soft small")
        + words(8, y + 60, count(topology.devices_per_host, topology.device_name), "soft small")
        + words(8, y + 76, f"{total:,} {topology.device_name}s in all", "soft small")
    )


def layered_table(topology: LayeredTopology) -> str:
    """Return the counts of :func:`draw_layered`."""
    rows = [
        [layer.name, f"{layer.count_per_plane:,}", f"{layer.count_per_plane * topology.num_planes:,}", layer.link]
        for layer in topology.layers
    ]
    nics = topology.num_hosts * topology.nics_per_host
    rows.append(["hosts", "", f"{topology.num_hosts:,}", f"{nics:,} NICs"])
    devices = topology.num_hosts * topology.devices_per_host
    rows.append([f"{topology.device_name}s", "", f"{devices:,}", topology.inside_link])
    return table(["", f"a {topology.plane_name}", "in all", "links"], rows)


def draw_grouped(topology: GroupedTopology) -> str:
    """Draw groups in a circle, each joined to each other, and one group from inside."""
    drawn = min(topology.num_groups, 12)
    centre, middle, radius = 280.0, 190.0, 140.0
    places: list[_Place] = []
    for index in range(drawn):
        angle = 2 * math.pi * index / drawn - math.pi / 2
        places.append((centre + radius * math.cos(angle), middle + radius * math.sin(angle)))
    body = [_edge(places[a], places[b], "link c1") for a in range(drawn) for b in range(a)]
    for index, (x, y) in enumerate(places):
        label = topology.num_groups if index == drawn - 1 else index + 1
        tip = f"group {label} of {topology.num_groups}\n{_many(topology.routers_per_group, 'router')}"
        body.append(tag("circle", cx=x, cy=y, r=22.0, class_="box c1", **tipped(tip)))
        body.append(words(x, y + 4, f"{label}", "small", "middle"))
    counts = _many(topology.num_groups, "group") + (f", {drawn} drawn" if drawn < topology.num_groups else "")
    body.append(
        words(centre, 372, f"{counts}; between groups: {topology.between_link or 'all to all'}", "soft", "middle")
    )
    body.append(_inside(topology))
    about = f"{topology.num_groups} groups of {topology.routers_per_group} routers"
    return drawing(topology.title, about, 388, "".join(body))


def _inside(topology: GroupedTopology) -> str:
    routers = min(topology.routers_per_group, 6)
    centre, middle, distance = 820.0, 190.0, 74.0 if routers > 1 else 0.0
    body = [tag("circle", cx=centre, cy=middle, r=158.0, class_="host")]
    places = []
    for index in range(routers):
        angle = 2 * math.pi * index / routers - math.pi / 2
        dx, dy = math.cos(angle), math.sin(angle)
        places.append((centre + distance * dx, middle + distance * dy, dx, dy))
    body += [_edge(places[a][:2], places[b][:2], "link c0") for a in range(routers) for b in range(a)]
    for index, (x, y, dx, dy) in enumerate(places):
        label = topology.routers_per_group if index == routers - 1 else index + 1
        for host in range(min(topology.hosts_per_router, 3)):
            shift = (host - (min(topology.hosts_per_router, 3) - 1) / 2) * 20
            hx, hy = x + dx * 52 - dy * shift, y + dy * 52 + dx * shift
            body.append(line(x, y, hx, hy, "wire"))
            body.append(tag("circle", cx=hx, cy=hy, r=6.0, class_="device"))
        body.append(tag("circle", cx=x, cy=y, r=16.0, class_="box c0", **tipped(f"router {label}")))
        body.append(words(x, y + 4, f"{label}", "small", "middle"))
    says = f"one group: {_many(topology.routers_per_group, 'router')}"
    says += f" with {_many(topology.hosts_per_router, 'host')} each; inside: {topology.inside_link or 'all to all'}"
    body.append(words(centre, 372, says, "soft", "middle"))
    return "".join(body)


def _edge(start: _Place, end: _Place, class_: str) -> str:
    return line(start[0], start[1], end[0], end[1], class_)


def grouped_table(topology: GroupedTopology) -> str:
    """Return the counts of :func:`draw_grouped`."""
    routers = topology.num_groups * topology.routers_per_group
    rows = [
        ["groups", f"{topology.num_groups:,}", topology.between_link],
        ["routers", f"{routers:,}", topology.inside_link],
        ["hosts", f"{routers * topology.hosts_per_router:,}", ""],
    ]
    return table(["", "in all", "links"], rows)


def draw_torus(topology: TorusTopology) -> str:
    """Draw the last two axes of a torus as a grid with its wrapping links; further axes are said in words."""
    rows, columns = (1, *topology.sizes)[-2:]
    xs, ys = _centres(250, 620, columns, 6), _centres(34, 290 if rows > 1 else 70, rows, 4)
    body = []
    # Between two hosts the way around is the link itself.
    for y in ys:
        if columns > 2:
            body.append(_bow((xs[0], y), (xs[0] - 110, y - 44), (xs[-1] + 110, y - 44), (xs[-1], y), "c0"))
        body.append(line(xs[0], y, xs[-1], y, "link c0"))
    for x in xs:
        if rows > 2:
            body.append(_bow((x, ys[0]), (x + 50, ys[0] - 60), (x + 50, ys[-1] + 60), (x, ys[-1]), "c1"))
        body.append(line(x, ys[0], x, ys[-1], "link c1"))
    for row, y in enumerate(ys):
        for column, x in enumerate(xs):
            r = rows if row == len(ys) - 1 else row + 1
            c = columns if column == len(xs) - 1 else column + 1
            body.append(
                tag("rect", x=x - 18, y=y - 11, width=36.0, height=22.0, class_="device", **tipped(f"host {r}, {c}"))
            )
            body.append(words(x, y + 4, f"{r},{c}" if rows > 1 else f"{c}", "tiny", "middle"))
    sizes = " x ".join(f"{size}" for size in topology.sizes)
    total = math.prod(topology.sizes)
    bottom = ys[-1] + 58
    more = f"; one of {math.prod(topology.sizes[:-2])} such layers" if len(topology.sizes) > 2 else ""
    says = f"{sizes} = {total:,}" if len(topology.sizes) > 1 else f"{total:,}"
    says += f" hosts{more}; edges are joined{'; ' + topology.link if topology.link else ''}"
    body.append(words(WIDTH / 2, bottom, says, "soft", "middle"))
    return drawing(topology.title, f"a torus of {sizes} hosts", bottom + 14, "".join(body))


def _bow(start: _Place, first: _Place, second: _Place, end: _Place, series: str) -> str:
    """Return a curve that leads from ``start`` around to ``end``."""
    places = [" ".join(map(number, place)) for place in (start, first, second, end)]
    return tag("path", d=f"M{places[0]}C{places[1]} {places[2]} {places[3]}", class_=f"link {series} wrap")


def torus_table(topology: TorusTopology) -> str:
    """Return the counts of :func:`draw_torus`."""
    rows = [[f"axis {axis + 1}", f"{size:,}"] for axis, size in enumerate(topology.sizes)]
    return table(["", "hosts"], [*rows, ["in all", f"{math.prod(topology.sizes):,}"]])
