// Charts: stacked bars over time, lines, and the what-if curve, drawn by uPlot.
import { clock, NONE } from "./format.js";

const FONT = "12px Inter, system-ui, sans-serif";
const css = (name) => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();

export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children); // strings become text, so nothing that a client sends becomes markup
  return made;
}

const axis = (more) => ({
  stroke: css("soft"), font: FONT, gap: 6, ticks: { show: false },
  grid: { stroke: css("line"), width: 1 }, ...more,
});

/** What all charts share: size, theme, keyboard, tooltip, words for an empty one. */
class Chart {
  constructor(root, describe) {
    this.root = root;
    this.describe = describe;
    this.plot = null;
    this.tip = element("div", { class: "tip", role: "status" });
    this.note = element("p", { class: "nothing" });
    this.root.tabIndex = 0;
    this.root.setAttribute("role", "img");
    this.root.append(this.note);
    this.root.addEventListener("keydown", (event) => this.key(event));
    this.root.addEventListener("blur", () => this.point(null));
    new ResizeObserver(() => this.fit()).observe(root);
  }

  fit() {
    if (this.plot) this.plot.setSize({ width: this.root.clientWidth, height: this.root.clientHeight });
  }

  forget() {
    if (this.plot) this.plot.destroy();
    this.plot = null;
  }

  show(options, data, note) {
    this.note.textContent = note || "";
    if (this.plot) {
      this.plot.setData(data);
    } else {
      const size = { width: this.root.clientWidth, height: this.root.clientHeight };
      const hooks = { setCursor: [(plot) => this.move(plot)] };
      this.plot = new uPlot({ ...size, legend: { show: false }, hooks, ...options }, data, this.root);
      this.plot.over.append(this.tip);
    }
    this.root.setAttribute("aria-label", this.describe());
  }

  key(event) {
    const steps = { ArrowLeft: -1, ArrowRight: 1 };
    if (!this.plot || !(event.key in steps)) return;
    event.preventDefault();
    const last = this.plot.data[0].length - 1;
    const at = this.plot.cursor.idx ?? last + (event.key === "ArrowRight" ? -1 : 1);
    this.point(Math.min(last, Math.max(0, at + steps[event.key])));
  }

  point(at) {
    if (!this.plot) return;
    const left = at === null ? -10 : this.plot.valToPos(this.plot.data[0][at], "x");
    this.plot.setCursor({ left, top: at === null ? -10 : 10 });
  }

  move(plot) {
    const at = plot.cursor.left >= 0 ? plot.cursor.idx : null;
    const lines = at === null || at === undefined ? [] : this.tell(at);
    this.tip.hidden = !lines.length;
    if (!lines.length) return;
    this.tip.replaceChildren(...lines.map(([color, name, value]) =>
      element("div", {}, element("i", { class: "swatch " + (color || "none") }), element("span", {}, name),
        element("b", {}, value))));
    const wide = this.tip.offsetWidth, room = plot.over.clientWidth, x = plot.cursor.left;
    this.tip.style.left = Math.max(0, Math.min(room - wide, x > room / 2 ? x - wide - 14 : x + 14)) + "px";
  }
}

/** Bars over time, parts stacked; with `share` each bar is 100 %. */
export class Stack extends Chart {
  /** parts: [{name, color, format}], bottom first; words(totals) describes it in a sentence. */
  constructor(root, { share, format, describe, seconds }) {
    super(root, describe);
    this.share = share;
    this.format = format;
    this.wantsSeconds = seconds;
    this.parts = [];
    this.buckets = { at: [], size: 10, values: [] };
  }

  /** buckets: {at: [start], size, values: [[...] for each part]}. */
  draw(parts, buckets, note) {
    const names = parts.map((part) => part.name + part.color).join();
    if (names !== this.names) this.forget();
    this.names = names;
    this.parts = parts;
    this.buckets = buckets;
    const totals = buckets.at.map((_, i) => buckets.values.reduce((sum, part) => sum + part[i], 0));
    this.totals = totals;
    const tops = [];
    let below = totals.map(() => 0);
    buckets.values.forEach((values, k) => {
      below = below.map((low, i) => low + values[i]);
      tops[k] = below.map((top, i) => (!totals[i] ? null : this.share ? (100 * top) / totals[i] : top));
    });
    const data = [buckets.at.map((start) => start + buckets.size / 2), ...tops.slice().reverse()];
    this.from = buckets.from;
    this.to = buckets.to;
    this.show(this.options(), data, totals.some(Boolean) ? "" : note);
  }

  options() {
    const bars = uPlot.paths.bars({ size: [0.82, 26], align: 0 });
    const drawn = this.parts.map((part) => ({
      label: part.name, fill: css(part.color), stroke: css("card"), width: 1, paths: bars,
      points: { show: false },
    }));
    const y = this.share ? { range: [0, 100] } : { range: (_u, _low, high) => [0, Math.max(10, high * 1.08)] };
    return {
      scales: { x: { time: true, range: () => [this.from, this.to] }, y },
      cursor: { y: false, points: { show: false }, drag: { x: false, y: false } },
      series: [{}, ...drawn.reverse()],
      axes: [
        axis({ grid: { show: false }, space: 76, size: 28, values: (_u, marks, _a, _s, step) => marks.map((at) => clock(at, step < 60)) }),
        axis({
          size: 52, space: 36,
          values: (_u, marks) => marks.map((mark) => (this.share ? mark + " %" : this.format(mark))),
        }),
      ],
    };
  }

  tell(at) {
    const { at: starts, size, values } = this.buckets;
    if (!this.totals[at]) return [["", `${clock(starts[at], size < 60)}`, "no requests"]];
    const lines = this.parts.map((part, k) => [part.color, part.name, values[k][at]]);
    const span = `${clock(starts[at], size < 60)} – ${clock(starts[at] + size, size < 60)}`;
    return [["", span, ""], ...lines.reverse().filter(([, , n]) => n > 0).map(([color, name, n]) => [
      color, name, this.share ? ((100 * n) / this.totals[at]).toFixed(1) + " %" : this.format(n),
    ])];
  }
}

/** The what-if curve: hit ratio against size, with what there is now. */
export class Curve extends Chart {
  draw(points, present, format, color, note) {
    if (color !== this.color) this.forget();
    Object.assign(this, { points, present, format, color });
    const x = points.map((point) => Math.log2(point.multiple));
    const own = x.map((at) => (at === 0 && present !== null ? present : null));
    this.show(this.options(), [x, points.map((point) => 100 * point.hit_ratio), own], note);
  }

  options() {
    const color = css(this.color);
    return {
      scales: {
        x: { time: false, range: () => [-1.25, 3.25] },
        y: { range: (_u, low, high) => [0, Math.min(100, Math.max(10, (high ?? low ?? 0) * 1.25))] },
      },
      cursor: { y: false, drag: { x: false, y: false } },
      series: [{},
        { stroke: color, width: 2.5, fill: color + "22", points: { show: true, size: 7, fill: css("card"), width: 2 } },
        { stroke: css("ink"), width: 0, points: { show: true, size: 11, fill: css("ink") } }],
      axes: [
        axis({
          grid: { show: false }, splits: [-1, 0, 1, 2, 3], size: 44,
          values: (_u, marks) => marks.map((mark) => {
            const point = this.points.find((each) => Math.log2(each.multiple) === mark);
            return point ? `${this.format(point)}\n${point.multiple === 1 ? "now" : "×" + point.multiple}` : "";
          }),
        }),
        axis({ size: 52, space: 32, values: (_u, marks) => marks.map((mark) => mark + " %") }),
      ],
      hooks: {
        setCursor: [(plot) => this.move(plot)],
        drawAxes: [(plot) => {
          const x = plot.valToPos(0, "x", true), { top, height } = plot.bbox;
          plot.ctx.save();
          plot.ctx.strokeStyle = css("soft");
          plot.ctx.setLineDash([4, 4]);
          plot.ctx.beginPath();
          plot.ctx.moveTo(x, top);
          plot.ctx.lineTo(x, top + height);
          plot.ctx.stroke();
          plot.ctx.restore();
        }],
      },
    };
  }

  tell(at) {
    const point = this.points[at];
    if (!point) return [];
    const lines = [["", this.format(point), "×" + point.multiple],
      [this.color, "leaf-LRU would hit", (100 * point.hit_ratio).toFixed(1) + " %"]];
    if (point.multiple === 1 && this.present !== null) {
      lines.push(["ink", "this tier has hit", this.present.toFixed(1) + " %"]);
    }
    return lines;
  }
}

/** The same figures as a table, made when somebody opens it. */
export function numbersTable(stack, format) {
  const { at, values, size } = stack.buckets;
  const head = element("tr", {}, element("th", { scope: "col" }, "from"),
    ...stack.parts.map((part) => element("th", { scope: "col" }, part.name)),
    element("th", { scope: "col" }, "together"));
  const rows = at.map((start, i) => [start, i]).filter(([, i]) => stack.totals[i]).reverse().map(([start, i]) =>
    element("tr", {}, element("th", { scope: "row" }, clock(start, size < 60)),
      ...values.map((part) => element("td", {}, part[i] ? format(part[i]) : NONE)),
      element("td", {}, format(stack.totals[i]))));
  const body = rows.length ? rows
    : [element("tr", {}, element("td", { colspan: stack.parts.length + 2 }, "no requests in this time"))];
  return element("table", {}, element("thead", {}, head), element("tbody", {}, ...body));
}
