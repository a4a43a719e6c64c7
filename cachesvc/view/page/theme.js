// Runs before anything is painted, so that a chosen theme does not flash the other one.
"use strict";
try {
  const chosen = localStorage.getItem("kvist-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // A browser that stores nothing follows the system.
}
