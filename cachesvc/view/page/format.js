// Numbers for people: tiny ones, huge ones, and none at all.

export const NONE = "–";

export function count(n) {
  return Math.round(n).toLocaleString("en");
}

/** At most four figures and a unit: 987, 12.3 k, 4.56 M. */
export function short(n) {
  const size = Math.abs(n);
  for (const [unit, scale] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (size >= 0.9995 * scale * (unit === "k" ? 10 : 1)) return digits(n / scale) + " " + unit;
  }
  return size >= 100 || Number.isInteger(n) ? count(n) : digits(n);
}

/** Three figures: 1.23, 12.3, 123. */
export function digits(n) {
  const size = Math.abs(n);
  if (size >= 999.5) return count(n);
  if (size && size < 0.01) return n.toPrecision(2);
  return n.toFixed(size < 9.995 ? 2 : size < 99.95 ? 1 : 0).replace(/\.0+$|(\.\d*?)0+$/, "$1");
}

/** A share of 0 to 1; one that is not quite all or nothing does not look so. */
export function percent(part, whole) {
  if (!whole) return NONE;
  const share = (100 * part) / whole;
  if (part > 0 && share < 0.1) return "<0.1 %";
  if (part < whole && share > 99.9) return ">99.9 %";
  return share.toFixed(share === 0 || share === 100 ? 0 : 1) + " %";
}

export function bytes(n) {
  const units = [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]];
  for (const [unit, scale] of units) if (n >= 0.9995 * scale) return digits(n / scale) + " " + unit;
  return count(n) + " B";
}

/** Decimal, as bandwidths are told. */
export function rate(bytesPerSecond) {
  const n = bytesPerSecond;
  for (const [unit, scale] of [["GB/s", 1e9], ["MB/s", 1e6], ["kB/s", 1e3]]) {
    if (n >= 0.9995 * scale) return digits(n / scale) + " " + unit;
  }
  return n >= 1 ? count(n) + " B/s" : n > 0 ? "<1 B/s" : "0";
}

/** A length of time of any size, with two units at most. */
export function duration(seconds) {
  const size = Math.abs(seconds), sign = seconds < 0 ? "−" : "";
  if (size === 0) return "0 s";
  if (size < 0.001) return sign + digits(size * 1e6) + " µs";
  if (size < 1) return sign + digits(size * 1e3) + " ms";
  if (size < 120) return sign + digits(size) + " s";
  const parts = [[86400, "d"], [3600, "h"], [60, "min"], [1, "s"]];
  const at = parts.findIndex(([scale]) => size >= scale);
  const [scale, unit] = parts[at];
  const [next, nextUnit] = parts[at + 1];
  const rest = Math.floor((size % scale) / next);
  const whole = Math.floor(size / scale).toLocaleString("en");
  return sign + `${whole} ${unit}` + (rest ? ` ${rest} ${nextUnit}` : "");
}

/** Time of day; with the seconds when points are close. */
export function clock(unix, seconds = false) {
  const options = { hour: "2-digit", minute: "2-digit", hour12: false };
  return new Date(unix * 1000).toLocaleTimeString("en-GB", seconds ? { ...options, second: "2-digit" } : options);
}
