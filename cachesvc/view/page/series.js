// The history as the page keeps it: samples of running totals, and what happened between them.
import { SPANS } from "./words.js";

export class Series {
  constructor(range) {
    this.range = range;
    this.at = [];
    this.columns = {};
    this.isEarly = false;
  }

  get last() {
    return this.at.length ? this.at[this.at.length - 1] : 0;
  }

  /** Time of the last sample that stays. */
  get kept() {
    return this.at[this.at.length - (this.isEarly ? 2 : 1)] || 0;
  }

  /** Take in what /history.json says; a column that did not change came as one number. */
  add(history) {
    if (this.isEarly) { // it was of that moment only
      this.at.pop();
      for (const column of Object.values(this.columns)) column.pop();
    }
    this.isEarly = history.is_early;
    const fresh = history.at.length;
    for (const [name, values] of Object.entries(history.columns)) {
      const column = (this.columns[name] ||= new Array(this.at.length).fill(0));
      column.push(...(Array.isArray(values) ? values : new Array(fresh).fill(values)));
    }
    this.at.push(...history.at);
    const old = this.at.findIndex((at) => at > this.last - this.range.seconds - this.range.step);
    if (old > 0) {
      this.at.splice(0, old);
      for (const column of Object.values(this.columns)) column.splice(0, old);
    }
  }

  level(name) {
    const column = this.columns[name] || [];
    return column[column.length - 1] || 0;
  }

  /** How much a total grew in all that is kept. */
  change(name) {
    const column = this.columns[name] || [];
    return column.length ? column[column.length - 1] - column[0] : 0;
  }

  /** How much a total grew per second in the last seconds. */
  rate(name, seconds) {
    const from = Math.max(0, this.at.findIndex((at) => at >= this.last - seconds - 0.5));
    const span = this.last - this.at[from];
    const column = this.columns[name] || [];
    return span > 0 ? (column[column.length - 1] - column[from]) / span : 0;
  }

  /** [seconds, of a bar, in words]: the range, or less while there is no more. */
  get span() {
    const age = this.at.length ? this.last - this.at[0] : 0;
    const fit = SPANS.filter(([seconds, size]) => seconds <= this.range.seconds && size >= this.range.step);
    return fit.find(([seconds]) => seconds >= age) || fit[fit.length - 1];
  }

  /** Totals cut into pieces of time; groups: a list of names of columns for each part. */
  buckets(groups) {
    const [seconds, size] = this.span;
    const to = Math.ceil((this.last + 0.001) / size) * size, from = to - seconds;
    const at = Array.from({ length: seconds / size }, (_, i) => from + i * size);
    const values = groups.map((names) => {
      const part = new Array(at.length).fill(0);
      for (const name of names) {
        const column = this.columns[name] || [];
        for (let i = 1; i < column.length; i++) {
          const place = Math.floor((this.at[i] - from) / size);
          if (column[i] !== column[i - 1] && place >= 0) part[place] += column[i] - column[i - 1];
        }
      }
      return part;
    });
    return { at, size, values, from, to };
  }
}
