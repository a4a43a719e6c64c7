// The page: asks for one document a second and shows it. Figures are the sidecar's; nothing is counted here.
import { Curve, Stack, numbersTable } from "./charts.js";
import * as f from "./format.js";
import * as panels from "./panels.js";
import { Series } from "./series.js";
import { RANGES, REASONS, TIERS, reasonName } from "./words.js";

const POLL_MS = 1000, TIMEOUT_MS = 4000;
const REASONS_SHOWN = 6;
const byId = (id) => document.getElementById(id);
const add = (values) => values.reduce((a, b) => a + b, 0);

let range = RANGES["10m"];
let series = new Series(range);
let recent = series; // the last ten minutes by the second, for rates
let epoch = "";
let curveTier = "dram";
let heard = null; // when the last document came, by this machine's clock
let latest = null;

const sources = new Stack(byId("sources-chart"), {
  share: true, format: f.short, describe: () => "Bars over time: " + inWords(sources, true),
});
const misses = new Stack(byId("misses-chart"), {
  format: f.short, describe: () => "Bars over time of tokens computed: " + inWords(misses, false),
});
const saved = new Stack(byId("saved-chart"), {
  format: f.short, describe: () => "Bars over time of tokens not computed: " + inWords(saved, false),
});
const curve = new Curve(byId("whatif-chart"), () => byId("whatif-say").textContent);

function inWords(stack, shares) {
  const sums = stack.buckets.values.map(add), whole = add(sums);
  if (!whole) return "no requests in this time";
  return `${series.span[2]}, ` + stack.parts.map((part, k) =>
    `${part.name} ${shares ? f.percent(sums[k], whole) : f.short(sums[k])}`).join(", ");
}

// Charts of the history.

function drawSources() {
  const tiers = Object.keys(TIERS), reasons = Object.keys(latest.stats.miss_tokens);
  const parts = [...tiers.map((tier) => ({ name: TIERS[tier], color: tier })), { name: "missed", color: "missed" }];
  const groups = [...tiers.map((tier) => ["hit_tokens." + tier]), reasons.map((why) => "miss_tokens." + why)];
  const buckets = series.buckets(groups);
  sources.draw(parts, buckets, "No prompt was asked for in the " + series.span[2] + ".");
  const sums = buckets.values.map(add);
  panels.showSources(Object.fromEntries(tiers.map((tier, k) => [tier, sums[k]])), sums[tiers.length]);
}

function drawMisses() {
  const reasons = Object.keys(latest.stats.miss_tokens);
  const all = series.buckets(reasons.map((why) => ["miss_tokens." + why]));
  const sums = Object.fromEntries(reasons.map((why, k) => [why, add(all.values[k])]));
  panels.showMisses(sums);
  const order = [...Object.keys(REASONS), ...reasons.filter((why) => !(why in REASONS))];
  const most = reasons.filter((why) => sums[why] > 0).sort((a, b) => sums[b] - sums[a]);
  const shown = most.slice(0, REASONS_SHOWN).sort((a, b) => order.indexOf(a) - order.indexOf(b));
  const rest = most.slice(REASONS_SHOWN);
  const parts = shown.map((why) => ({ name: reasonName(why), color: (REASONS[why] || [])[2] || "m4" }));
  const values = shown.map((why) => all.values[reasons.indexOf(why)]);
  if (rest.length) {
    parts.push({ name: "other reasons", color: "m7" });
    values.push(all.at.map((_, i) => add(rest.map((why) => all.values[reasons.indexOf(why)][i]))));
  }
  misses.draw(parts, { ...all, values }, "Nothing was computed in the " + series.span[2] + ".");
}

function drawSaved() {
  const tiers = ["dram", "flash"];
  const parts = tiers.map((tier) => ({ name: "from " + TIERS[tier], color: tier }));
  saved.draw(parts, series.buckets(tiers.map((tier) => ["hit_tokens." + tier])), "Nothing was saved in the " + series.span[2] + ".");
}

function drawCurve() {
  const { stats } = latest;
  const use = stats.tiers.find((each) => each.tier === curveTier);
  const points = stats.what_if[curveTier] || [];
  const policy = stats.eviction.find((each) => each.tier === curveTier);
  const present = policy && policy.asked_blocks ? (100 * policy.hit_blocks) / policy.asked_blocks : null;
  const size = (point) => f.bytes(use ? point.multiple * use.slots * use.slot_bytes : 0);
  curve.draw(points, present, size, curveTier, points.length ? "" : "Known once blocks have been asked for.");
  byId("whatif-say").textContent = curveInWords(points, present);
  byId("whatif-tiers").hidden = !stats.tiers.some((each) => each.tier === "flash");
}

function curveInWords(points, present) {
  const at = (multiple) => points.find((point) => point.multiple === multiple);
  if (!at(1) || !at(2)) return "";
  const gain = 100 * (at(2).hit_ratio - at(1).hit_ratio), loss = 100 * (at(1).hit_ratio - at(0.5).hit_ratio);
  const own = present === null ? "" : ` The dot is what this tier has hit since the start: ${present.toFixed(1)} % of blocks.`;
  return `Twice the size would bring ${gain.toFixed(1)} points, half would cost ${loss.toFixed(1)}.${own}`;
}

// The document.

function show() {
  const { stats } = latest;
  document.querySelectorAll(".range-words").forEach((each) => { each.textContent = series.span[2]; });
  panels.showHeadline(stats);
  panels.showWorth(stats);
  panels.showHealth(stats);
  panels.showAdvice(stats);
  panels.showTiers(stats, recent);
  panels.showTtft(stats);
  panels.showPrefixes(stats);
  panels.showSessions(stats);
  drawSources();
  drawMisses();
  drawSaved();
  drawCurve();
  showEmpty(stats);
  const engines = stats.sessions === 1 ? "1 engine" : `${stats.sessions} engines`;
  setLife("live", `live · up ${f.duration(Math.floor(stats.uptime_s))} · ${engines}`);
  byId("foot").textContent = `kvistd ${stats.version} · boot epoch ${stats.boot_epoch.slice(0, 8)}`;
  document.querySelectorAll("details.numbers[open]").forEach(fillNumbers);
}

function showEmpty(stats) {
  const hint = byId("empty");
  hint.hidden = add(Object.values(stats.spans.start.hit_tokens)) > 0;
  hint.textContent = !stats.sessions
    ? "No engine is attached yet. Start one with --cache and the path of this sidecar’s socket."
    : !stats.requested_tokens ? "An engine is attached. Send it a prompt, then another one with the same beginning."
      : `No hit yet. Send a prompt that begins like an earlier one, with at least ${stats.block_tokens} tokens in common.`;
}

function setLife(kind, text) {
  byId("life").className = kind;
  if (byId("life-text").textContent !== text) byId("life-text").textContent = text;
}

function showGone(error) {
  document.body.classList.add("gone");
  const since = heard === null ? "" : `, not since ${f.clock(heard / 1000, true)}`;
  setLife("lost", "no answer");
  const gone = byId("gone");
  const text = `The sidecar does not answer${since} (${error.message}). ` +
    (latest ? "Below are its last figures. Engines go on without it, with misses; this page asks again each second."
      : "This page asks again each second.");
  if (gone.textContent !== text) gone.textContent = text;
  gone.hidden = false;
}

async function ask(kept) {
  const abort = new AbortController();
  const timer = setTimeout(() => abort.abort(), TIMEOUT_MS);
  try {
    const answer = await fetch(`history.json?step=${kept.range.step}&since=${kept.kept}`, { signal: abort.signal });
    if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`);
    return await answer.json();
  } finally {
    clearTimeout(timer);
  }
}

async function poll() {
  try {
    const document_ = await ask(recent);
    if (document_.stats.boot_epoch !== epoch) { // another life: its totals begin anew
      const first = epoch === "";
      epoch = document_.stats.boot_epoch;
      if (!first) return start();
    }
    recent.add(document_.history);
    if (series !== recent) series.add((await ask(series)).history);
    latest = document_;
    heard = Date.now();
    document.body.classList.remove("gone");
    byId("gone").hidden = true;
    show();
  } catch (error) {
    showGone(error.name === "AbortError" ? new Error("it took too long") : error);
  }
}

function start() {
  recent = new Series(RANGES["10m"]);
  series = range === RANGES["10m"] ? recent : new Series(range);
  return poll();
}

async function forever() {
  for (;;) {
    if (!document.hidden) await poll();
    await new Promise((wake) => setTimeout(wake, POLL_MS));
  }
}

// What a person can do here.

function press(group, button) {
  for (const each of group.querySelectorAll("button")) each.setAttribute("aria-pressed", String(each === button));
}

function onPress(id, act) {
  byId(id).addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    press(byId(id), button);
    act(button.dataset);
  });
}

onPress("ranges", ({ range: name }) => {
  range = RANGES[name];
  series = range === RANGES["10m"] ? recent : new Series(range);
  poll();
});

function setTheme(choice) {
  if (choice === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = choice;
  for (const chart of [sources, misses, saved, curve]) chart.forget(); // colours are drawn, not styled
  if (latest) show();
}

onPress("themes", ({ themeChoice: choice }) => {
  try { localStorage.setItem("kvist-theme", choice); } catch { /* then it is for this visit */ }
  setTheme(choice);
});
onPress("whatif-tiers", ({ tier }) => { curveTier = tier; if (latest) drawCurve(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme(document.documentElement.dataset.theme || "auto"));
const chosen = document.documentElement.dataset.theme || "auto";
press(byId("themes"), byId("themes").querySelector(`[data-theme-choice="${chosen}"]`));

function fillNumbers(details) {
  const stack = { "sources-chart": sources, "misses-chart": misses, "saved-chart": saved }[details.dataset.for];
  const made = stack ? numbersTable(stack, f.count) : curveTable();
  details.querySelector("table")?.remove();
  details.append(made);
}

function curveTable() {
  const made = document.createElement("table");
  for (const point of curve.points || []) {
    const row = made.insertRow();
    row.insertCell().textContent = `×${point.multiple}`;
    row.insertCell().textContent = curve.format(point);
    row.insertCell().textContent = (100 * point.hit_ratio).toFixed(1) + " %";
  }
  return made;
}

document.querySelectorAll("details.numbers").forEach((details) =>
  details.addEventListener("toggle", () => details.open && latest && fillNumbers(details)));

forever();
