// What a drawn page cannot do alone: values under the mouse, hidden series, sorted tables, other axes of the designs.
// All places, ticks and texts come from the plan; nothing is computed here but which of them to show.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const tip = document.createElement("div");
  tip.className = "tip";
  document.body.append(tip);

  const showTip = (text, x, y) => {
    tip.textContent = text;
    tip.style.display = "block";
    const left = x + 16 + tip.offsetWidth > innerWidth ? x - tip.offsetWidth - 14 : x + 16;
    tip.style.left = Math.max(4, left) + "px";
    tip.style.top = Math.min(Math.max(4, y - tip.offsetHeight / 2), innerHeight - tip.offsetHeight - 4) + "px";
  };
  const hideTip = () => { tip.style.display = "none"; };
  const middle = (mark) => {
    const box = mark.getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const onMark = (mark, x, y) => {
    unlight();
    const design = mark && mark.closest("[data-i]");
    if (design) return light(design, x, y);
    const told = mark && mark.closest("[data-tip]");
    if (told) showTip(told.dataset.tip, x, y);
    else hideTip();
  };
  const unlight = () => document.querySelectorAll(".lit").forEach((mark) => mark.classList.remove("lit"));
  const light = (mark, x, y) => {
    const figure = mark.closest("figure");
    figure.querySelectorAll(`[data-i="${mark.dataset.i}"]`).forEach((same) => same.classList.add("lit"));
    showTip(data[figure.id].tips[mark.dataset.i], x, y);
  };
  document.addEventListener("pointermove", (event) => {
    if (event.target.closest && !event.target.closest(".timeline")) onMark(event.target, event.clientX, event.clientY);
  });
  document.addEventListener("focusin", (event) => {
    if (event.target.closest("svg")) onMark(event.target, ...middle(event.target));
  });
  document.addEventListener("focusout", () => { hideTip(); unlight(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") hideTip(); });

  // Legends: a click hides the marks of a series.
  document.querySelectorAll(".legend button[data-series]").forEach((button) => {
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") === "false";
      button.setAttribute("aria-pressed", String(on));
      const marks = button.closest("figure").querySelectorAll(`svg .${button.dataset.series}, svg .t${button.dataset.series}`);
      marks.forEach((mark) => mark.classList.toggle("off", !on));
    });
  });

  // Tables: a click on a heading sorts by it, another click the other way.
  document.querySelectorAll("table.sortable").forEach((table) => {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const order = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b, "en", { numeric: true }) : a - b);
      const rows = [...table.tBodies[0].rows].sort((a, b) => order(key(a), key(b)) * (down ? -1 : 1));
      table.tBodies[0].append(...rows);
    }));
  });

  // Time lines: find the span under the mouse by bisection; a row is start, length, text, start, length, text, ...
  document.querySelectorAll(".timeline").forEach((box) => {
    const about = data[box.closest("figure").id], svg = box.querySelector("svg"), cursor = svg.querySelector(".cursor");
    // A span is "part,stage,micro-batch", two of them joined by "&"; a merged one comes as words and starts with a number.
    const told = (text) => /^\d/.test(text) ? text : text.split("&").map((chunk) => {
      const [part, stage, batch] = chunk.split(",");
      return `${part} of stage ${stage}, micro-batch ${batch}`;
    }).join("\n");
    const stop = () => { hideTip(); cursor.setAttribute("visibility", "hidden"); };
    box.addEventListener("pointerleave", stop);
    box.addEventListener("pointermove", (event) => {
      const bounds = svg.getBoundingClientRect(), zoom = svg.viewBox.baseVal.width / bounds.width;
      const x = (event.clientX - bounds.left) * zoom, y = (event.clientY - bounds.top) * zoom;
      const rank = Math.floor((y - about.top) / about.height), row = about.rows[rank];
      const at = ((x - about.left) / about.width) * about.ticks;
      if (!row || !row.length || at < 0 || at > about.ticks) return stop();
      let low = 0, high = row.length / 3 - 1;
      while (low < high) { const mid = (low + high + 1) >> 1; if (row[3 * mid] <= at) low = mid; else high = mid - 1; }
      const [start, length, text] = row.slice(3 * low, 3 * low + 3);
      if (at < start || at > start + length) {
        cursor.setAttribute("visibility", "hidden");
        return showTip(`rank ${rank}: idle`, event.clientX, event.clientY);
      }
      const shown = (ticks, digits) => Number((ticks * about.scale).toPrecision(digits));
      cursor.setAttribute("x", about.left + (start / about.ticks) * about.width);
      cursor.setAttribute("width", Math.max(1, (length / about.ticks) * about.width));
      cursor.setAttribute("y", about.top + 1 + rank * about.height);
      cursor.setAttribute("height", about.height - 2);
      cursor.setAttribute("visibility", "visible");
      const times = `${shown(start, 4)} to ${shown(start + length, 4)} ${about.unit} (${shown(length, 3)} ${about.unit})`;
      showTip(`rank ${rank}\n${told(text)}\n${times}`, event.clientX, event.clientY);
    });
  });

  // Designs: other metrics on the axes.
  const node = (name, attributes, parent, text) => {
    const made = document.createElementNS(SVG, name);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
  };
  const frontOf = (about) => {
    const sign = [about.better[about.x], about.better[about.y]];
    const value = (i) => [sign[0] * about.places[i][about.x], sign[1] * about.places[i][about.y]];
    const order = about.places.map((_, i) => i).sort((a, b) => value(a)[0] - value(b)[0] || value(a)[1] - value(b)[1]);
    let best = Infinity;
    return order.filter((i) => value(i)[1] < best && ((best = value(i)[1]), true));
  };
  const place = (figure) => {
    const about = data[figure.id], svg = figure.querySelector(".scatter svg"), axes = svg.querySelector(".axes");
    const [left, right, top, bottom] = about.box;
    const x = (at) => left + at * (right - left), y = (at) => bottom + at * (top - bottom);
    axes.replaceChildren();
    for (const [at, text] of about.ticks[about.x]) {
      node("line", { class: "grid", x1: x(at), x2: x(at), y1: top, y2: bottom }, axes);
      node("text", { class: "tick", x: x(at), y: bottom + 16, "text-anchor": "middle" }, axes, text);
    }
    for (const [at, text] of about.ticks[about.y]) {
      node("line", { class: "grid", x1: left, x2: right, y1: y(at), y2: y(at) }, axes);
      node("text", { class: "tick", x: left - 7, y: y(at) + 4, "text-anchor": "end" }, axes, text);
    }
    node("text", { class: "soft", x: (left + right) / 2, y: bottom + 36, "text-anchor": "middle" }, axes, about.names[about.x]);
    node("text", { class: "soft", x: left, y: 8 }, axes, about.names[about.y]);
    svg.querySelectorAll("circle[data-i]").forEach((mark) => {
      const at = about.places[mark.dataset.i];
      mark.setAttribute("cx", x(at[about.x]));
      mark.setAttribute("cy", y(at[about.y]));
    });
    const front = frontOf(about);
    svg.querySelectorAll("circle[data-i]").forEach((mark) => {
      mark.classList.toggle("best", front.includes(Number(mark.dataset.i)));
    });
    const path = front.map((i) => `${x(about.places[i][about.x])} ${y(about.places[i][about.y])}`);
    svg.querySelector("path.front").setAttribute("d", "M" + path.join("L"));
  };
  document.querySelectorAll("select[data-axis]").forEach((select) => {
    const figure = select.closest("figure");
    const change = () => { data[figure.id][select.dataset.axis] = Number(select.value); place(figure); };
    select.addEventListener("change", change);
    // A reloaded page keeps the reader's choice in the box; the figure follows it.
    if (Number(select.value) !== data[figure.id][select.dataset.axis]) change();
  });
})();
