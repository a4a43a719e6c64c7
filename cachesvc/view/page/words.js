// What tiers and reasons are called, and what they mean in one line.

export const TIERS = { hbm: "HBM", dram: "DRAM", flash: "flash" };

// [name, explanation, colour]; the order is that of the stack in the chart.
export const REASONS = {
  never_stored: ["never stored", "new to the cache: nobody sent these tokens before", "m1"],
  evicted: ["evicted", "was here and had to make room; more memory or flash keeps it", "m2"],
  not_admitted: ["not admitted", "offered, but no tier took it: no room, first use, or write budget", "m3"],
  tail: ["tail of the prompt", "less than a block, or the last token, which is always computed", "m4"],
  namespace: ["another namespace", "stored by an engine with another model, dtype or settings", "m5"],
  cheaper: ["cheaper to compute", "here, but loading it would have taken longer than computing it", "m6"],
  flash_late: ["flash too late", "on flash, but did not rise to DRAM in time", "m3"],
  flight_late: ["other engine too late", "another engine was computing it and gave up or was slow", "m6"],
  flash_off: ["flash is off", "the flash tier failed; the block may be there", "m2"],
  flash_rebuilding: ["flash being rebuilt", "its index is being read; the block may be there", "m3"],
  detached: ["sidecar away", "the engine could not reach this sidecar", "m5"],
  no_cache: ["no cache", "the request or its engine has the cache turned off", "m4"],
  self_test: ["trial failed", "what the engine stored for a trial came back wrong: it runs without", "m2"],
  corrupt: ["corrupt", "a checksum differed; dropped and computed instead", "m2"],
  torn: ["torn read", "the slot was reused while it was read; computed instead", "m6"],
  expired: ["expired", "its tenant’s time to live was over", "m3"],
  cleared: ["cleared", "dropped by an operator’s clear", "m4"],
};

export const RANGES = {
  "10m": { step: 1, seconds: 600 },
  "2h": { step: 10, seconds: 7200 },
  "24h": { step: 60, seconds: 86400 },
};

// How much a chart shows: no more than there is of a young cache. [seconds, of a bar, in words]
export const SPANS = [
  [60, 2, "last minute"], [120, 4, "last 2 minutes"], [300, 5, "last 5 minutes"],
  [600, 10, "last 10 minutes"], [1800, 30, "last 30 minutes"], [3600, 60, "last hour"],
  [7200, 120, "last 2 hours"], [21600, 300, "last 6 hours"], [43200, 600, "last 12 hours"],
  [86400, 1200, "last 24 hours"],
];

export const reasonName = (reason) => (REASONS[reason] || [reason])[0];
export const reasonWhy = (reason) => (REASONS[reason] || ["", ""])[1];
