// What moves on the page: theme, copy, reading a value off a curve, looking back through the heat map. Without it the
// page still says everything: values stand in the tables, the heat map's past in the small pictures.
"use strict";
const all = (query, root = document) => [...root.querySelectorAll(query)];

const theme = document.getElementById("theme");
theme.hidden = false;
theme.onclick = () => {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const now = document.documentElement.dataset.theme || (dark ? "dark" : "light");
  document.documentElement.dataset.theme = now === "dark" ? "light" : "dark";
};

for (const button of all("[data-copy]")) {
  button.hidden = false;
  button.onclick = async () => {
    const source = document.getElementById(button.dataset.copy);
    try {
      await navigator.clipboard.writeText(source.textContent);
    } catch {  // a page opened from a file may not use the clipboard; the old way still works there
      getSelection().selectAllChildren(source);
      document.execCommand("copy");
      getSelection().removeAllRanges();
    }
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1600);
  };
}

function nearest(xs, x) {
  let best = 0;
  xs.forEach((v, i) => { if (Math.abs(v - x) < Math.abs(xs[best] - x)) best = i; });
  return best;
}

for (const plot of all("[data-curves]")) {
  const { low, high, x: unit, series } = JSON.parse(plot.dataset.curves);
  const card = plot.closest(".card"), svg = plot.querySelector("svg");
  const where = card.querySelector(".where"), keys = all(".key", card);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  let at = null;
  const show = (x) => {
    const main = series.reduce((a, b) => (b.x.length > a.x.length ? b : a));
    at = main.x[nearest(main.x, x)];
    cursor.setAttribute("d", `M${(1000 * (at - low)) / (high - low)} 0V1000`);
    svg.append(cursor);
    where.textContent = `${unit} ${at.toLocaleString("en")}`;
    for (const key of keys) {
      const line = series.find((s) => s.name === key.dataset.name);
      if (line) key.querySelector("output").textContent = line.text[nearest(line.x, at)];
    }
  };
  const hide = () => {
    cursor.remove();
    where.textContent = "";
    for (const key of keys) key.querySelector("output").textContent = key.dataset.last || "";
  };
  plot.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    show(low + ((high - low) * (event.clientX - box.left)) / box.width);
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const side = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!side) return;
    event.preventDefault();
    const steps = [...new Set(series.flatMap((s) => s.x))].sort((a, b) => a - b);
    const i = at === null ? (side > 0 ? -1 : steps.length) : nearest(steps, at);
    show(steps[Math.max(0, Math.min(steps.length - 1, i + side))]);
  });
}

for (const scrub of all(".scrub")) {
  scrub.hidden = false;
  const slider = scrub.querySelector("input"), told = scrub.querySelector("output");
  const frames = JSON.parse(scrub.dataset.frames);
  const cells = all(".heat rect", scrub.closest(".card"));
  slider.oninput = () => {
    const { step, levels } = frames[slider.value];
    cells.forEach((cell, i) => cell.setAttribute("class", { ".": "qnone", "!": "qbad" }[levels[i]] || `q${levels[i]}`));
    told.textContent = `step ${step.toLocaleString("en")}`;
  };
}
