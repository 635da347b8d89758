// Draws the report's figures from the JSON in #figures: line charts as SVG, expert load on canvases.
// Hand-written so that the page stays one small file that needs no network; colours come from page.css.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const margin = { left: 50, right: 12, top: 8, bottom: 30 };

  const node = (name, attributes, parent) => {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (parent) parent.appendChild(made);
    return made;
  };
  const element = (name, className, parent, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  };
  const shown = (value) => {
    if (value === null || value === undefined) return "-";
    const size = Math.abs(value);
    if (size >= 1e9) return (value / 1e9).toPrecision(3) + "B";
    if (size >= 1e6) return (value / 1e6).toPrecision(3) + "M";
    if (size >= 1e4) return Math.round(value).toLocaleString("en-US");
    if (size > 0 && size < 1e-3) return value.toExponential(2).replace(".00e", "e");
    return String(Number(value.toPrecision(4)));
  };

  const linearTicks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= raw);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
    return ticks;
  };
  const logTicks = (low, high) => {
    const digits = high / low > 200 ? [1] : [1, 2, 5];
    const ticks = [];
    for (let p = Math.floor(Math.log10(low)); p <= Math.ceil(Math.log10(high)); p++)
      for (const d of digits) if (d * 10 ** p >= low && d * 10 ** p <= high) ticks.push(d * 10 ** p);
    return ticks;
  };

  const range = (chart, hidden) => {
    let low = Infinity, high = -Infinity;
    const see = (v) => { if (v !== null) { low = Math.min(low, v); high = Math.max(high, v); } };
    chart.curves.forEach((curve, i) => { if (!hidden.has(i)) curve.values.forEach(see); });
    chart.levels.forEach((level, i) => { if (!hidden.has(chart.curves.length + i)) see(level.value); });
    if (low > high) return [0, 1];
    if (chart.log) return [low / 1.15, high * 1.15];
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.1 || 1;
    const start = low >= 0 && low < (high - low) * 0.6 ? 0 : low - pad;
    return [start, high + pad];
  };

  const drawChart = (chart, box) => {
    const hidden = new Set();
    const legend = element("div", "legend", box);
    const svg = node("svg", { class: "plot", role: "img", "aria-label": chart.title + ". " + chart.caption }, box);
    const tip = element("div", "tip", box);
    const entries = [
      ...chart.curves.map((c) => ({ label: c.label, colour: c.colour, faint: c.role === "faint" })),
      ...chart.levels.map((l) => ({ label: l.label, colour: "level", level: true })),
    ];
    if (entries.length > 1) entries.forEach((entry, i) => {
      const button = element("button", "", legend);
      const swatch = element("i", entry.level ? "swatch level" : "swatch", button);
      if (entry.level) swatch.style.borderColor = "var(--level)";
      else swatch.style.background = `var(--${entry.colour})`;
      if (entry.faint) swatch.style.opacity = 0.4;
      button.append(entry.label);
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        if (!hidden.delete(i)) hidden.add(i);
        button.setAttribute("aria-pressed", String(!hidden.has(i)));
        draw();
      });
    });
    let place;
    const draw = () => {
      svg.replaceChildren();
      const width = svg.clientWidth || 480, height = svg.clientHeight || 250;
      const steps = chart.curves.flatMap((c) => c.steps);
      const first = Math.min(...steps), last = Math.max(...steps, first + 1);
      const [low, high] = range(chart, hidden);
      const x = (s) => margin.left + ((s - first) / (last - first)) * (width - margin.left - margin.right);
      const scale = chart.log ? Math.log : (v) => v;
      const span = scale(high) - scale(low);
      const y = (v) => height - margin.bottom - ((scale(v) - scale(low)) / span) * (height - margin.top - margin.bottom);
      place = { x, y, width, height, first, last };
      for (const tick of chart.log ? logTicks(low, high) : linearTicks(low, high, 5)) {
        node("line", { x1: margin.left, x2: width - margin.right, y1: y(tick), y2: y(tick), stroke: "var(--grid)" }, svg);
        node("text", { x: margin.left - 7, y: y(tick) + 4, "text-anchor": "end" }, svg).textContent = shown(tick);
      }
      for (const tick of linearTicks(first, last, 6)) {
        node("text", { x: x(tick), y: height - margin.bottom + 16, "text-anchor": "middle" }, svg).textContent = shown(tick);
      }
      const unit = node("text", { x: width - margin.right, y: height - 2, "text-anchor": "end" }, svg);
      unit.textContent = "step" + (chart.unit ? "  |  vertical: " + chart.unit : "");
      chart.curves.forEach((curve, i) => { if (!hidden.has(i)) drawCurve(curve, svg, x, y); });
      chart.levels.forEach((level, i) => {
        if (hidden.has(chart.curves.length + i)) return;
        node("line", { x1: margin.left, x2: width - margin.right, y1: y(level.value), y2: y(level.value),
          stroke: "var(--level)", "stroke-width": 1.4, "stroke-dasharray": "6 4" }, svg);
      });
    };
    const nearest = (curve, step) => {
      let low = 0, high = curve.steps.length - 1;
      while (low < high) { const mid = (low + high) >> 1; if (curve.steps[mid] < step) low = mid + 1; else high = mid; }
      if (low > 0 && step - curve.steps[low - 1] < curve.steps[low] - step) low--;
      return low;
    };
    const point = (event) => {
      const bounds = svg.getBoundingClientRect();
      const inside = event.clientX - bounds.left;
      const share = (inside - margin.left) / (place.width - margin.left - margin.right);
      const wanted = place.first + Math.min(1, Math.max(0, share)) * (place.last - place.first);
      const seen = chart.curves.map((c, i) => ({ c, i })).filter((e) => !hidden.has(e.i));
      if (!seen.length) return;
      const densest = seen.reduce((a, b) => (b.c.steps.length > a.c.steps.length ? b : a));
      const step = densest.c.steps[nearest(densest.c, wanted)];
      svg.querySelectorAll(".cursor").forEach((old) => old.remove());
      node("line", { class: "cursor", x1: place.x(step), x2: place.x(step), y1: margin.top,
        y2: place.height - margin.bottom, stroke: "var(--soft)", "stroke-opacity": 0.6 }, svg);
      tip.replaceChildren();
      element("div", "", tip, "step " + Math.round(step).toLocaleString("en-US"));
      for (const { c } of seen) {
        const at = nearest(c, step);
        if (c.values[at] === null) continue;
        const row = element("div", "", tip);
        element("i", "swatch", row).style.background = `var(--${c.colour})`;
        row.append(c.label + (c.role === "points" && c.steps[at] !== step ? ` (step ${Math.round(c.steps[at])})` : ""));
        element("b", "", row, shown(c.values[at]));
        node("circle", { class: "cursor", cx: place.x(c.steps[at]), cy: place.y(c.values[at]), r: 3.5,
          fill: `var(--${c.colour})`, stroke: "var(--card)", "stroke-width": 1.5 }, svg);
      }
      showTip(tip, box, event);
    };
    svg.addEventListener("pointermove", point);
    svg.addEventListener("pointerleave", () => {
      tip.style.display = "none";
      svg.querySelectorAll(".cursor").forEach((old) => old.remove());
    });
    draw();
    new ResizeObserver(draw).observe(svg);
  };

  const drawCurve = (curve, svg, x, y) => {
    let path = "", open = false;
    curve.steps.forEach((step, i) => {
      const value = curve.values[i];
      if (value === null) { open = false; return; }
      path += `${open ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      open = true;
    });
    const thin = curve.role === "faint" || curve.role === "layer";
    node("path", { d: path, fill: "none", stroke: `var(--${curve.colour})`, "stroke-linejoin": "round",
      "stroke-width": thin ? 1.2 : 2, "stroke-opacity": curve.role === "faint" ? 0.35 : 1 }, svg);
    if (curve.role === "points" && curve.steps.length <= 120) curve.steps.forEach((step, i) => {
      if (curve.values[i] !== null)
        node("circle", { cx: x(step), cy: y(curve.values[i]), r: 3, fill: `var(--${curve.colour})` }, svg);
    });
  };

  const showTip = (tip, box, event) => {
    const bounds = box.getBoundingClientRect();
    tip.style.display = "block";
    const left = event.clientX - bounds.left;
    tip.style.left = (left + 16 + tip.offsetWidth > bounds.width ? left - tip.offsetWidth - 14 : left + 16) + "px";
    tip.style.top = Math.max(4, event.clientY - bounds.top - tip.offsetHeight / 2) + "px";
  };

  // Expert load: even is the middle colour, four times as much or as little the ends (logarithmic).
  const heatColours = () =>
    getComputedStyle(document.documentElement).getPropertyValue("--heat").trim().split(/\s+/)
      .map((hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16)));
  const heatColour = (load, stops) => {
    const share = Math.min(1, Math.max(0, Math.log2(Math.max(load, 1e-3)) / 4 + 0.5)) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(share));
    return stops[low].map((c, i) => c + (stops[low + 1][i] - c) * (share - low));
  };
  const drawHeatMap = (heat, box) => {
    const maps = element("div", "maps", box);
    const tip = element("div", "tip", box);
    const canvases = heat.layers.map((label, layer) => {
      const map = element("div", "map", maps);
      const loads = heat.loads[layer];
      element("div", "", map, `${label}, ${loads[0].length} experts`);
      const canvas = element("canvas", "", map);
      canvas.width = loads.length;
      canvas.height = loads[0].length;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `expert load of ${label} over time`);
      const axis = element("div", "axis", map);
      element("span", "", axis, "step " + heat.steps[0].toLocaleString("en-US"));
      element("span", "", axis, heat.steps[heat.steps.length - 1].toLocaleString("en-US"));
      canvas.addEventListener("pointermove", (event) => {
        const bounds = canvas.getBoundingClientRect();
        const inside = (value, size, count) => Math.min(count - 1, Math.max(0, Math.floor((value / size) * count)));
        const time = inside(event.clientX - bounds.left, bounds.width, loads.length);
        const expert = inside(event.clientY - bounds.top, bounds.height, loads[0].length);
        tip.replaceChildren();
        element("div", "", tip, `${label}, expert ${expert}, step ${heat.steps[time].toLocaleString("en-US")}`);
        element("div", "", tip, `${shown(loads[time][expert])} of an even share`);
        showTip(tip, box, event);
      });
      canvas.addEventListener("pointerleave", () => { tip.style.display = "none"; });
      return canvas;
    });
    const scale = element("div", "scale", box);
    element("span", "", scale, "1/4");
    const bar = element("i", "", scale);
    element("span", "", scale, "4 times an even share");
    const paint = () => {
      const stops = heatColours();
      bar.style.background = `linear-gradient(90deg, ${stops.map((c) => `rgb(${c.join()})`).join()})`;
      canvases.forEach((canvas, layer) => {
        const context = canvas.getContext("2d");
        const image = context.createImageData(canvas.width, canvas.height);
        heat.loads[layer].forEach((column, time) => column.forEach((load, expert) => {
          const at = 4 * (expert * canvas.width + time);
          const colour = heatColour(load, stops);
          for (let i = 0; i < 3; i++) image.data[at + i] = colour[i];
          image.data[at + 3] = 255;
        }));
        context.putImageData(image, 0, 0);
      });
    };
    paint();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  };

  for (const figure of figures) {
    const box = document.getElementById("figure-" + figure.key).querySelector(".drawing");
    (figure.loads ? drawHeatMap : drawChart)(figure, box);
  }
})();
