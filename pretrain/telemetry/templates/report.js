// Draws the charts of a report from the numbers in the page: SVG, no library, no network.
"use strict";

// Pure: numbers in, numbers out

const STEPS = [1, 2, 2.5, 5, 10];
const DOT_GAP = 9;  // pixels between points that are drawn as dots, too

// About `count` round numbers within [low, high].
function linearTicks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * STEPS.find((each) => each * power >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(Number((k * step).toPrecision(12)));
  return ticks;
}

// Round times, in seconds.
function timeTicks(low, high, count) {
  const rough = (high - low) / count;
  if (rough > 86400) return linearTicks(low / 86400, high / 86400, count).map((days) => days * 86400);
  const step = [1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10800, 21600, 43200, 86400].find((each) => each >= rough);
  const ticks = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) ticks.push(k * step);
  return ticks;
}

// Powers of ten, with 2 and 5 between them where there are few; round numbers where there is no power at all.
function logTicks(low, high) {
  const decades = Math.log10(high / low), factors = decades > 4 ? [1] : decades > 1.5 ? [1, 3] : [1, 2, 5];
  const ticks = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const factor of factors) {
      const tick = Number((factor * 10 ** power).toPrecision(6));
      if (tick >= low * 0.999 && tick <= high * 1.001) ticks.push(tick);
    }
  return ticks.length > 1 ? ticks : linearTicks(low, high, 4);
}

// 12k, 3.5M, 4,500, 0.001, 2e-5; beside a number of an axis that is written out (its `largest`), 0.0005
function short(value, largest = value) {
  if (value === null || !Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  for (const [unit, name] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e4, "k"]])
    if (size >= unit) return Number((value / (name === "k" ? 1e3 : unit)).toPrecision(4)) + name;
  if (Math.max(size, Math.abs(largest)) < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e");
  return size < 1000 ? String(Number(value.toPrecision(4))) : Math.round(value).toLocaleString("en");
}

function clock(seconds) {
  if (seconds < 90) return Math.round(seconds) + " s";
  if (seconds < 5400) return Number((seconds / 60).toPrecision(2)) + " min";
  return seconds < 172800 ? Number((seconds / 3600).toPrecision(2)) + " h" : Number((seconds / 86400).toPrecision(2)) + " d";
}

// An exponential mean that begins without a bias; gaps stay gaps.
function smoothed(values, weight) {
  let sum = 0, norm = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return sum / norm;
  });
}

function quantile(sorted, share) {
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.round(share * (sorted.length - 1))))];
}

// What a chart shows: of each line nearly all, but one line far beyond the others (a run that diverged) does not count.
function domain(lines, log, rough, rules) {
  const spans = [];
  for (const [number, line] of lines.entries()) {
    const values = line.filter((value) => value !== null && Number.isFinite(value) && (!log || value > 0));
    if (!values.length) continue;
    values.sort((a, b) => a - b);
    const leaps = values.length > 40 && (!rough || rough[number]), cut = leaps ? 0.01 : 0, low = quantile(values, cut);
    const high = quantile(values, 1 - cut), usual = leaps && rough && low >= 0 && !log ? Math.max(low, 5 * quantile(values, 0.5)) : Infinity;
    spans.push([low, Math.min(high, usual), rules && rules[number]]);
  }
  if (!spans.length) return null;
  const own = spans.filter(([, , rule]) => !rule), least = Math.min(...(own.length ? own : spans).map(([, high]) => Math.abs(high))), most = log ? Infinity : 5 * least;
  const counted = spans.filter(([, high]) => spans.length === 1 || least === 0 || Math.abs(high) <= most);
  let low = Math.min(...counted.map(([each]) => each)), high = Math.max(...counted.map(([, each]) => each));
  if (high - low <= Math.abs(high) * 1e-9) [low, high] = high === 0 ? [-1, 1] : [low - Math.abs(low) * 0.1, high + Math.abs(high) * 0.1];
  if (log) return [low / 1.15, high * 1.15];
  const pad = (high - low) * 0.06;
  return [low >= 0 && low - pad < 0 ? 0 : low - pad, high + pad];
}

// Index of the value nearest to `at` in ascending `places`.
function nearest(places, at) {
  let low = 0, high = places.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (places[middle] < at) low = middle + 1; else high = middle;
  }
  return low > 0 && at - places[low - 1] < places[low] - at ? low - 1 : low;
}

// The `d` of an SVG path; a gap at every null.
function path(xs, ys) {
  let text = "", pen = false;
  for (let i = 0; i < xs.length; i++) {
    if (ys[i] === null || !Number.isFinite(ys[i]) || !Number.isFinite(xs[i])) { pen = false; continue; }
    text += (pen ? "L" : "M") + xs[i].toFixed(1) + " " + ys[i].toFixed(1);
    pen = true;
  }
  return text;
}

// The page

function start() {
  const SVG = "http://www.w3.org/2000/svg", root = document.getElementById("charts");
  let data = JSON.parse(document.getElementById("data").textContent);
  const view = { axis: root.dataset.axis, smooth: 0.6, logX: false, logY: new Map(), zoom: null, hidden: new Set() };
  const drawn = [];

  function element(parent, name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  }

  const axisOf = (chart) => chart.axis || view.axis;
  const shown = (chart) => chart.series.filter((one) => !view.hidden.has(one.run));

  function scale(low, high, from, to, log) {
    const f = log ? Math.log : (value) => value, span = f(high) - f(low) || 1;
    const at = (value) => (log && value <= 0 ? NaN : from + ((f(value) - f(low)) / span) * (to - from));
    at.back = (place) => { const v = f(low) + ((place - from) / (to - from)) * span; return log ? Math.exp(v) : v; };
    return at;
  }

  function draw(figure, chart) {
    const old = figure.querySelector("svg");
    if (old) old.remove();
    const axis = axisOf(chart), series = shown(chart), wide = Math.max(240, figure.clientWidth - 22), high = wide < 360 ? 190 : 230;
    const logX = view.logX && !chart.axis, logY = view.logY.has(chart.title) ? view.logY.get(chart.title) : chart.log;
    const svg = element(figure, "svg", { viewBox: `0 0 ${wide} ${high}`, width: wide, height: high, role: "img", "aria-label": chart.title });
    const places = series.map((one) => data.grids[one.grid][axis] || []);
    const every = places.flat().filter((place) => place !== null && (!logX || place > 0));
    if (!every.length) { element(svg, "text", { x: wide / 2, y: high / 2, "text-anchor": "middle", class: "tick" }, "not over " + axis); return; }
    let [x0, x1] = every.reduce(([a, b], each) => [Math.min(a, each), Math.max(b, each)], [Infinity, -Infinity]);
    if (view.zoom && !chart.axis) [x0, x1] = view.zoom;
    else if (!logX && x0 > 0 && x0 < 0.05 * x1) x0 = 0;
    if (x0 === x1) [x0, x1] = logX ? [x0 / 1.5, x1 * 1.5] : [x0 - 1, x1 + 1];
    const weights = series.map((one) => (one.smooth && one.y.length > 30 ? view.smooth : 0));
    const lines = series.map((one, i) => (weights[i] ? smoothed(one.y, weights[i]) : one.y));
    const inside = lines.map((line, i) => line.filter((_, k) => places[i][k] >= x0 && places[i][k] <= x1));
    const range = domain(inside.some((line) => line.length) ? inside : lines, logY, series.map((one) => one.smooth), series.map((one) => one.kind === "rule"));
    if (!range) return;
    const yTicks = logY ? logTicks(...range) : linearTicks(...range, 5);
    const label = (value) => (chart.percent ? Number((100 * value).toPrecision(4)) + "%" : short(value));
    const largest = logY ? undefined : Math.max(...yTicks.map(Math.abs));
    const told = (tick) => (chart.percent ? label(tick) : short(tick, largest ?? tick));
    const left = 12 + 6.6 * Math.max(...yTicks.map((tick) => told(tick).length)), right = wide - 12, top = 12, bottom = high - 24;
    const x = scale(x0, x1, left, right, logX), y = scale(range[0], range[1], bottom, top, logY);
    for (const tick of yTicks) {
      element(svg, "line", { x1: left, x2: right, y1: y(tick), y2: y(tick), class: "grid" });
      element(svg, "text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end", class: "tick" }, told(tick));
    }
    const wanted = Math.max(4, Math.floor(wide / 95));
    const xTicks = logX ? logTicks(x0, x1) : axis === "seconds" ? timeTicks(x0, x1, wanted) : linearTicks(x0, x1, wanted);
    for (const tick of xTicks)
      element(svg, "text", { x: Math.min(x(tick), right - 4), y: high - 7, "text-anchor": "middle", class: "tick" }, axis === "seconds" ? clock(tick) : axis === "share" ? Math.round(100 * tick) + "%" : short(tick));
    const clip = "clip-" + chart.number;
    element(element(element(svg, "defs", {}), "clipPath", { id: clip }), "rect", { x: left, y: top - 4, width: right - left, height: bottom - top + 8 });
    const area = element(svg, "g", { "clip-path": `url(#${clip})` });
    for (const mark of chart.axis ? [] : data.marks.filter((one) => !view.hidden.has(one.run))) {
      const at = x(mark[axis]);
      if (!(at >= left - 1 && at <= right + 1)) continue;
      const line = element(area, "g", { class: "mark " + mark.kind });
      element(line, "line", { x1: at, x2: at, y1: top, y2: bottom });
      element(line, "title", {}, mark.text);
    }
    series.forEach((one, i) => {
      const xs = places[i].map(x), colour = "var(--c" + (one.colour % 8) + ")";
      if (one.low && weights[i] < 0.01)
        element(area, "path", { d: path(xs, one.high.map(y)) + path([...xs].reverse(), [...one.low].reverse().map(y)).replace("M", "L") + "Z", fill: colour, opacity: 0.14 });
      if (weights[i]) element(area, "path", { d: path(xs, one.y.map((v) => (v === null ? null : y(v)))), class: "raw", stroke: colour });
      const ys = lines[i].map((v) => (v === null ? null : y(v)));
      const points = ys.filter((v) => v !== null && Number.isFinite(v));
      if (one.kind === "rule" && points.length) {  // holds from one end to the other
        xs.unshift(left); ys.unshift(points[0]);
        xs.push(right); ys.push(points.at(-1));
      }
      element(area, "path", { d: path(xs, ys), class: "line " + one.kind, stroke: colour });
      if (one.kind !== "rule" && points.length && (points.length === 1 || Math.abs(xs.at(-1) - xs[0]) / (points.length - 1) > DOT_GAP))
        ys.forEach((v, k) => { if (v !== null && Number.isFinite(v)) element(area, "circle", { cx: xs[k], cy: v, r: 2.6, fill: colour }); });
      if (ys.some((v) => v !== null && v < top - 0.4 * (bottom - top))) element(svg, "text", { x: right - 4 - 14 * (i % 6), y: top + 8, "text-anchor": "end", fill: colour, class: "beyond" }, "▲").append(Object.assign(document.createElementNS(SVG, "title"), { textContent: one.name + " goes beyond this chart" }));
    });
    const hair = element(svg, "line", { class: "hair", y1: top, y2: bottom, x1: -9, x2: -9 });
    const box = element(svg, "rect", { class: "drag", y: top, height: bottom - top, width: 0, x: 0 });
    drawn.push({ chart, figure, svg, x, left, right, hair, box, places, series, axis, label });
  }

  function drawAll() {
    drawn.length = 0;
    [...root.querySelectorAll("figure")].forEach((figure, number) => draw(figure, { ...data.charts[number], number }));
    document.getElementById("unzoom").hidden = !view.zoom;
  }

  function build() {
    root.replaceChildren();
    data.charts.forEach((chart) => {
      const figure = document.createElement("figure"), caption = document.createElement("figcaption");
      const title = document.createElement("span"), unit = document.createElement("small"), log = document.createElement("button");
      title.textContent = chart.title;
      unit.textContent = " " + (chart.unit || "");
      title.append(unit);
      log.textContent = "log";
      log.type = "button";
      const isLog = () => (view.logY.has(chart.title) ? view.logY.get(chart.title) : chart.log);
      log.setAttribute("aria-pressed", isLog());
      log.onclick = () => { view.logY.set(chart.title, !isLog()); log.setAttribute("aria-pressed", isLog()); drawAll(); };
      caption.append(title, log);
      const note = document.createElement("p");
      note.className = "note";
      const several = chart.series.some((one) => one.run !== chart.series[0].run), told = new Set();
      const alike = chart.series.every((one) => one.told === chart.series[0].told && one.kind === "train");
      for (const one of alike ? [] : chart.series) {
        if (several && told.has(one.told)) continue;  // colours of runs stand above
        told.add(one.told);
        const item = document.createElement("span"), key = document.createElement("i");
        key.className = one.kind;
        key.style.borderTopColor = several ? "var(--soft)" : "var(--c" + (one.colour % 8) + ")";
        item.append(key, one.told);
        note.append(item);
      }
      figure.append(caption, note);
      root.append(figure);
      point(figure, chart);
    });
    drawAll();
  }

  // Pointing shows values, dragging zooms
  const tip = document.getElementById("tip");
  let from = null;
  function point(figure) {
    const mine = () => drawn.find((one) => one.figure === figure);
    const place = (event, one) => {
      const area = one.svg.getBoundingClientRect();
      return Math.min(one.right, Math.max(one.left, (event.clientX - area.left) * (one.svg.viewBox.baseVal.width / area.width)));
    };
    figure.addEventListener("pointermove", (event) => {
      const one = mine();
      if (!one || !event.target.closest("svg")) return;
      const at = place(event, one), value = one.x.back(at);
      for (const other of drawn) {
        const same = other.axis === one.axis ? other.x(value) : -9;
        const hair = same >= other.left - 1 && same <= other.right + 1 ? same : -9;
        other.hair.setAttribute("x1", hair);
        other.hair.setAttribute("x2", hair);
      }
      if (from !== null) {
        one.box.setAttribute("x", Math.min(from, at));
        one.box.setAttribute("width", Math.abs(at - from));
      }
      const rows = [one.axis === "seconds" ? clock(value) : one.axis === "share" ? Math.round(100 * value) + "% of the run" : one.axis + " " + Math.round(value).toLocaleString("en")];
      one.series.forEach((series, i) => {
        if (!one.places[i].length) return;
        const k = nearest(one.places[i], value);
        if (series.y[k] !== null) rows.push(series.name + "  " + one.label(series.y[k]));
      });
      const near = one.chart.axis ? [] : data.marks.filter((mark) => !view.hidden.has(mark.run) && Math.abs(one.x(mark[one.axis]) - at) < 6);
      tip.textContent = [...rows, ...near.map((mark) => mark.text)].join("\n");
      tip.hidden = false;
      const room = document.documentElement.clientWidth;
      tip.style.left = Math.max(4, Math.min(event.clientX + 14, room - tip.offsetWidth - 8)) + "px";
      tip.style.top = event.clientY + 16 + "px";
    });
    figure.addEventListener("pointerleave", () => { tip.hidden = true; from = null; for (const one of drawn) { one.hair.setAttribute("x1", -9); one.hair.setAttribute("x2", -9); one.box.setAttribute("width", 0); } });
    figure.addEventListener("pointerdown", (event) => { const one = mine(); if (one && event.pointerType === "mouse" && event.target.closest("svg")) { from = place(event, one); event.preventDefault(); } });
    figure.addEventListener("pointerup", (event) => {
      const one = mine();
      if (one && from !== null && !one.chart.axis) {
        const [a, b] = [from, place(event, one)].sort((p, q) => p - q);
        if (b - a > 8) { view.zoom = [one.x.back(a), one.x.back(b)]; drawAll(); }
      }
      from = null;
      if (one) one.box.setAttribute("width", 0);
    });
    figure.addEventListener("dblclick", () => { view.zoom = null; drawAll(); });
  }

  document.getElementById("axis").value = view.axis;
  document.getElementById("axis").onchange = (event) => { view.axis = event.target.value; view.zoom = null; drawAll(); };
  document.getElementById("smooth").oninput = (event) => { view.smooth = Number(event.target.value); drawAll(); };
  document.getElementById("log-x").onchange = (event) => { view.logX = event.target.checked; drawAll(); };
  document.getElementById("unzoom").onclick = () => { view.zoom = null; drawAll(); };
  for (const box of document.querySelectorAll("input[data-run]"))
    box.onchange = () => { const run = Number(box.dataset.run); if (box.checked) view.hidden.delete(run); else view.hidden.add(run); drawAll(); };
  for (const button of document.querySelectorAll("button[data-copy]"))
    button.onclick = () => navigator.clipboard && navigator.clipboard.writeText(button.dataset.copy).then(() => { button.textContent = "copied"; });

  let width = 0;
  new ResizeObserver(() => { if (root.clientWidth !== width) { width = root.clientWidth; drawAll(); } }).observe(root);
  window.addEventListener("beforeprint", drawAll);
  build();

  // A page that is served follows its runs
  const live = document.body.dataset.live;
  if (live) setInterval(async () => {
    if (document.hidden) return;
    try {
      const answer = await fetch(live, { headers: { "X-Etag": document.body.dataset.etag || "" } });
      if (answer.status !== 200) return;
      const fresh = await answer.json();
      document.body.dataset.etag = fresh.etag;
      for (const [name, text] of Object.entries(fresh.texts)) {
        const place = document.querySelector(`[data-text="${CSS.escape(name)}"]`);
        if (place) { if (place.dataset.width !== undefined) place.style.width = text; else place.textContent = text; }
      }
      const titles = data.charts.map((chart) => chart.title).join();
      data = fresh.data;
      if (titles === data.charts.map((chart) => chart.title).join()) drawAll(); else build();
    } catch (error) { /* the server is gone: what was drawn stays */ }
  }, 5000);
}

if (typeof document !== "undefined") start();
if (typeof module !== "undefined") module.exports = { linearTicks, logTicks, timeTicks, short, clock, smoothed, domain, nearest, path };
