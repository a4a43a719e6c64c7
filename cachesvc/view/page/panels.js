// Everything on the page that is not a chart: headline, sums, tiers, advice, tables.
import { element } from "./charts.js";
import * as f from "./format.js";
import { REASONS, TIERS, reasonName, reasonWhy } from "./words.js";

const byId = (id) => document.getElementById(id);
const sum = (counts) => Object.values(counts).reduce((a, b) => a + b, 0);
const swatch = (color) => element("i", { class: "swatch " + color });

function say(id, text) {
  const target = byId(id);
  if (target.textContent !== text) target.textContent = text;
}

// Headline.

export function showHeadline({ spans }) {
  const rate = (span) => f.percent(sum(span.hit_tokens), span.requested);
  const { minute, hour, start } = spans;
  say("hit-now", rate(minute));
  say("hit-hour", rate(hour));
  say("hit-start", rate(start));
  say("hit-say", minute.requested
    ? `${f.short(sum(minute.hit_tokens))} of ${f.short(minute.requested)} prompt tokens were not computed`
    : start.requested ? "no requests in the last minute" : "no requests yet");
}

export function showWorth({ spans: { start }, worth, advice }) {
  const saved = start.saved_s, spent = start.load_s + start.store_s, net = start.net_s;
  const known = start.requested > 0 && saved + spent > 0;
  byId("worth-net").classList.toggle("minus", advice.some((each) => each.code === "not-worth-it"));
  say("worth-net", known ? (net > 0 ? "+" : "") + f.duration(net) : f.NONE);
  say("worth-saved", known ? f.duration(saved) : f.NONE);
  say("worth-spent", known ? f.duration(spent) : f.NONE);
  say("worth-say", worthInWords(known, net, saved / spent, start, worth));
}

function worthInWords(known, net, times, start, worth) {
  if (!start.requested) return "no requests yet";
  if (!known) return "no engine has measured its rates yet";
  const own = worth.find((tier) => tier.tier === "hbm").saved_s;
  const beside = own > 0 ? `. The engines’ own HBM, which is not in it, saved ${f.duration(own)}` : "";
  if (net <= 0) return "not yet: a cache stores before it hits" + beside;
  const each = Number.isFinite(times) && times >= 1 ? `, ${f.digits(times)} s for each second spent moving` : "";
  return `yes: ${f.short(start.saved_tokens)} tokens not computed since the start${each}${beside}`;
}

const MARKS = { bad: "●", warn: "▲", note: "■", good: "✓" };

const line = (level, content) => element("li", {},
  element("span", { class: "mark " + level, "aria-hidden": "true" }, MARKS[level]), content);

/** What is in order, for those who look for trouble. */
function sound(stats) {
  const ready = stats.tiers.filter((use) => use.state === "ready").map((use) => TIERS[use.tier]);
  const facts = [];
  if (ready.length) facts.push(`${ready.join(" and ")} ${ready.length > 1 ? "are" : "is"} ready`);
  const read = stats.tiers.length > 0 && !stats.advice.some((each) => each.code === "checksum-failures");
  if (read) facts.push("every block read had its checksum");
  if (stats.sessions) facts.push(stats.sessions === 1 ? "1 engine is attached" : `${stats.sessions} engines are attached`);
  return facts;
}

export function showHealth(stats) {
  const { health, advice } = stats;
  say("health-words", health);
  byId("health-words").dataset.level = advice.length ? advice[0].level : "good";
  const said = advice.slice(0, 2).map((each) => line(each.level, element("a", { href: "#advice-" + each.code }, each.what)));
  byId("health-brief").replaceChildren(...said, ...sound(stats).slice(0, 3 - said.length).map((text) => line("good", text)));
}

export function showAdvice({ advice }) {
  const items = advice.map((each) => element("li", { id: "advice-" + each.code, class: each.level },
    element("p", { class: "what" },
      element("span", { class: "mark " + each.level, "aria-hidden": "true" }, MARKS[each.level]), each.what),
    element("p", { class: "do" }, each.do),
    element("p", { class: "doc" }, each.doc)));
  const none = element("li", { class: "none" }, element("p", {}, "Nothing. Every rule was looked at and none had anything to say."));
  byId("advice-list").replaceChildren(...(items.length ? items : [none]));
}

// Sums beside the charts.

export function showSources(hits, missed) {
  const whole = sum(hits) + missed;
  const row = (color, name, tokens) => element("tr", {},
    element("th", { scope: "row" }, swatch(color), name),
    element("td", { "data-tokens": tokens }, f.count(tokens)), element("td", {}, f.percent(tokens, whole)));
  byId("sources-sum").tBodies[0]?.remove();
  byId("sources-sum").append(element("tbody", { id: "sources-rows" },
    ...Object.entries(TIERS).map(([tier, name]) => row(tier, "hit in " + name, hits[tier] || 0)),
    row("missed", "missed: computed", missed),
    element("tr", { class: "total" }, element("th", { scope: "row" }, "= requested"),
      element("td", { "data-tokens": whole }, f.count(whole)), element("td", {}, whole ? "100 %" : f.NONE))));
}

export function showMisses(misses) {
  const whole = sum(misses);
  const rows = Object.entries(misses).filter(([, tokens]) => tokens > 0).sort((a, b) => b[1] - a[1])
    .flatMap(([reason, tokens]) => [element("tr", { "data-reason": reason },
      element("th", { scope: "row" }, swatch((REASONS[reason] || [])[2] || "m4"), reasonName(reason)),
      element("td", { "data-tokens": tokens }, f.count(tokens)), element("td", {}, f.percent(tokens, whole))),
    element("tr", { class: "why" }, element("td", { colspan: 3 }, reasonWhy(reason)))]);
  byId("misses-sum").tBodies[0]?.remove();
  byId("misses-sum").append(element("tbody", { id: "misses-rows" }, ...rows,
    element("tr", { class: "total" }, element("th", { scope: "row" }, "= missed: computed"),
      element("td", { "data-tokens": whole }, f.count(whole)), element("td", {}, whole ? "100 %" : f.NONE))));
}

// The tiers as a picture.

const MEAN_S = 10;
const TENANTS_SHOWN = 20;
const USES_MAX = 65535; // counts of uses stay there, see study/hottest.py

function tank(tier, name, where, use, lines) {
  const share = use && use.slots ? use.used_slots / use.slots : 0;
  const fill = element("div", { class: "fill" });
  fill.style.height = Math.max(share > 0 ? 2 : 0, 100 * share) + "%";
  return element("div", { class: `tank ${tier} ${use ? use.state : "absent"}` },
    fill,
    element("div", { class: "inside" },
      element("h3", {}, name, element("span", {}, where)),
      ...lines.map(([kind, text]) => element("p", { class: kind }, text))));
}

function held(use) {
  if (!use) return [["amount", "not configured"]];
  const total = use.slots * use.slot_bytes, used = use.used_slots * use.slot_bytes;
  const state = use.state === "ready" ? [] : [["state", use.failure || use.state]];
  return [["amount", f.bytes(used)], ["of", `of ${f.bytes(total)}, ${f.percent(use.used_slots, use.slots)}`], ...state];
}

function flow(kind, way, bytesPerSecond) {
  const moving = bytesPerSecond > 0;
  return element("div", { class: `flow ${way} ${moving ? "moving" : ""}`, "data-flow": kind },
    element("span", { class: "label" }, kind + " ", element("b", {}, f.rate(bytesPerSecond))),
    element("i", { class: "line", "aria-hidden": "true" }));
}

/** The engines' own pools, as a tier: ours and vLLM's; SGLang does not tell a plugin of its own. */
function pools(stats, slotBytes) {
  const told = stats.workers.map((worker) => worker.rates).filter((rates) => rates["pool_blocks.total"] > 0);
  const whole = (name) => told.reduce((blocks, rates) => blocks + (rates["pool_blocks." + name] || 0), 0);
  const use = { state: "ready", slots: whole("total"), used_slots: whole("filled"), slot_bytes: slotBytes };
  return { use, count: told.length };
}

export function showTiers(stats, series) {
  const tier = Object.fromEntries(stats.tiers.map((use) => [use.tier, use]));
  const rate = (name) => series.rate(name, MEAN_S);
  const tokens = rate("hit_tokens.hbm"), { use: hbm, count } = pools(stats, tier.dram?.slot_bytes || 0);
  const named = (engines) => engines === 1 ? "1 engine" : engines + " engines";
  const out = (name) => element("div", { class: "out" }, tier[name] ? flow("evict", "down", rate("evicted_bytes." + name)) : "");
  byId("tiers").replaceChildren(
    element("div", { class: "column" }, tank("hbm", "HBM", hbm.slots ? `pools of ${named(count)}` : "the engines’ own pools", hbm,
      hbm.slots ? held(hbm) : [["amount", named(stats.sessions)],
        ["of", tokens > 0 ? `${f.short(tokens)} tokens/s hit` : "managed by the engines"]]), out("hbm")),
    element("div", { class: "between" }, flow("load", "left", rate("loaded_bytes")), flow("store", "right", rate("stored_bytes"))),
    element("div", { class: "column" }, tank("dram", "DRAM", "shared arena", tier.dram,
      tier.dram ? held(tier.dram) : [["amount", "not made yet"], ["of", "the first worker says how large blocks are"]]), out("dram")),
    element("div", { class: "between" }, flow("rise", "left", rate("read_bytes.flash")), flow("sink", "right", rate("written_bytes.flash"))),
    element("div", { class: "column" }, tank("flash", "Flash", "local disk", tier.flash,
      stats.tiers.length ? held(tier.flash) : [["amount", "not made yet"], ["of", "if kvistd has a flash_path"]]), out("flash")),
    element("div", { class: "between none", "aria-hidden": "true" }),
    element("div", { class: "column" }, tank("remote", "Remote", "other stores", null, held(null)), element("div", { class: "out" })));
}

// Time to first token.

const KINDS = [["none", "computed", "missed"], ["hbm", "from HBM", "hbm"], ["dram", "from DRAM", "dram"], ["flash", "from flash", "flash"]];

export function showTtft(stats) {
  const known = Object.fromEntries(stats.ttft.map((each) => [each.tier, each]));
  const slowest = Math.max(...stats.ttft.map((each) => each.mean_s), 1e-9);
  const rows = KINDS.map(([tier, name, color]) => {
    const each = known[tier];
    const bar = element("div", { class: "bar " + color });
    bar.style.width = each ? Math.max(1, (100 * each.mean_s) / slowest) + "%" : "0";
    const sooner = each && known.none && tier !== "none" ? known.none.mean_s / each.mean_s : 0;
    return element("tr", { "data-tier": tier },
      element("th", { scope: "row" }, name, element("small", {}, each ? requests(each.requests) : "no request yet")),
      element("td", { class: "track" }, bar),
      element("td", {}, element("b", {}, each ? f.duration(each.mean_s) : f.NONE),
        element("small", {}, sooner >= 1.05 ? `${sooner < 9.95 ? sooner.toFixed(1) : f.count(sooner)} times sooner` : "\u00a0")));
  });
  byId("ttft").replaceChildren(element("table", { class: "ttft" },
    element("caption", { class: "hidden" }, "Mean time to first token by where the prompt came from"), element("tbody", {}, ...rows)));
  say("ttft-say", movingInWords(stats.worth));
}

const requests = (n) => (n === 1 ? "1 request" : `${f.short(n)} requests`);

function movingInWords(worth) {
  const parts = worth.filter((each) => each.saved_tokens && each.load_s)
    .map((each) => `${f.duration((1000 * each.load_s) / each.saved_tokens)} from ${TIERS[each.tier]}`);
  const tokens = worth.reduce((all, each) => all + each.saved_tokens, 0);
  const saved = worth.reduce((all, each) => all + each.saved_s, 0);
  if (!parts.length || !saved) return "Engines measure both: loading a prefix, and computing it.";
  return `A thousand cached tokens: ${parts.join(", ")}; computed ${f.duration((1000 * saved) / tokens)}.`;
}

// Tables.

function table(id, heads, rows, empty) {
  const body = rows.length ? rows
    : [element("tr", {}, element("td", { class: "empty", colspan: heads.length }, empty))];
  byId(id).replaceChildren(
    element("thead", {}, element("tr", {}, ...heads.map(([name, kind]) => element("th", { scope: "col", class: kind || null }, name)))),
    element("tbody", {}, ...body));
}

const cells = (...values) => element("tr", {}, ...values.map(([kind, value]) =>
  element("td", { class: kind }, ...(Array.isArray(value) ? value : [value]))));

function where(prefix) {
  const parts = [];
  if (prefix.dram_blocks) parts.push(["dram", "DRAM"]);
  if (prefix.flash_blocks) parts.push(["flash", "flash"]);
  return parts.map(([color, name]) => {
    const blocks = prefix[color + "_blocks"];
    const text = name + (blocks < prefix.blocks ? ` ${f.percent(blocks, prefix.blocks)}` : "");
    return element("span", { class: "chip" }, swatch(color), text);
  });
}

export function showPrefixes(stats) {
  const slot = stats.tiers.length ? stats.tiers[0].slot_bytes : 0;
  const shown = stats.prefixes.some((prefix) => prefix.begins.length);
  say("prefixes-note", "beginnings that prompts share, by tokens they saved; " + (shown
    ? "token ids of begin and end" : "named by key: text stays hidden, see the setting page_tokens"));
  const ids = (prefix) => (prefix.begins.length ? `${prefix.begins.join(" ")} … ${prefix.ends.join(" ")}` : prefix.key.slice(0, 12));
  table("prefixes",
    [[shown ? "tokens" : "key", ""], ["depth", "number"], ["uses", "number"], ["tokens saved", "number"], ["size", "number"], ["where", ""]],
    stats.prefixes.map((prefix) => cells(
      ["key", ids(prefix)],
      ["number", `${f.count(prefix.blocks * stats.block_tokens)} tokens`],
      ["number", f.count(prefix.uses) + (prefix.uses === USES_MAX ? "+" : "")],
      ["number", f.short(prefix.uses * prefix.blocks * stats.block_tokens)],
      ["number", f.bytes(prefix.blocks * slot)],
      ["", where(prefix)])),
    "none yet: a prefix is listed once a second prompt begins with it");
}

export function showSessions(stats) {
  const slot = stats.tiers.length ? stats.tiers[0].slot_bytes : 0;
  showTenants(stats, slot);
  table("sessions",
    [["engine", ""], ["namespace", ""], ["attached", "number"], ["hit rate", "number"], ["loaded", "number"], ["stored", "number"], ["its blocks here", "number"], ["filling", "number"]],
    stats.attached.map((each) => cells(
      ["name", [each.client, element("small", {}, ` pid ${each.pid}`)]],
      ["", [each.namespace, element("small", { title: each.compute }, " " + each.compute.replace(/^[0-9a-f]{32,} /, ""))]],
      ["number", f.duration(Math.floor(each.age_s))],
      ["number", f.percent(each.hit_tokens, each.requested_tokens)],
      ["number", f.bytes(each.loaded_bytes)],
      ["number", f.bytes(each.stored_bytes)],
      ["number", f.bytes(Math.max(each.dram_blocks, each.flash_blocks) * slot)],
      ["number", each.reserved_slots ? `${f.count(each.reserved_slots)} slots` : f.NONE])),
    "no engine is attached");
}

function showTenants(stats, slot) {
  byId("tenants-card").hidden = !stats.tenants.length;
  table("tenants",
    [["tenant", ""], ["namespace", ""], ["prompts", "number"], ["tokens asked for", "number"], ["hit rate", "number"], ["worth", "number"], ["in DRAM", "number"], ["on flash", "number"]],
    stats.tenants.slice(0, TENANTS_SHOWN).map((each) => cells(
      ["name", each.tenant],
      ["", each.namespace],
      ["number", f.count(each.lookups)],
      ["number", f.short(each.requested_tokens)],
      ["number", f.percent(sum(each.hit_tokens), each.requested_tokens)],
      ["number", (each.net_s > 0 ? "+" : "") + f.duration(each.net_s)],
      ["number", f.bytes(each.held_blocks.dram * slot)],
      ["number", f.bytes(each.held_blocks.flash * slot)])),
    "nobody has asked for anything");
}
