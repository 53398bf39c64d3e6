"use strict";
// Values under the pointer, sections that are folded on a phone and stay as they were when the page loads again.
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  const made = (parent, tag, text = "", space = null) => {
    const element = space ? document.createElementNS(space, tag) : document.createElement(tag);
    element.textContent = text;
    parent.append(element);
    return element;
  };

  const curveOf = (element, figure) => ({
    color: `var(--c${element.dataset.curve % 8})`,
    name: figure.querySelector(`.legend [data-curve="${element.dataset.curve}"]`)?.textContent.trim() ?? "",
    points: element.dataset.points.split(" ").map((point) => point.split(",").map(Number)),
    at: element.dataset.at.split("|"),
    values: element.dataset.values.split("|"),
  });

  const nearest = (points, x) =>
    points.reduce((best, [px], i) => (Math.abs(px - x) < Math.abs(points[best][0] - x) ? i : best), 0);

  // Where the pointer is, in the coordinates of the chart.
  const position = (event, svg) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [place.x, place.y];
  };

  const showTip = (chart, svg, x, title, lines) => {
    const tip = chart.querySelector(".tip") ?? made(chart, "div");
    tip.className = "tip";
    tip.textContent = "";
    made(tip, "b", title);
    for (const { color, text } of lines) {
      const line = made(tip, "span");
      if (color) made(line, "i").style.setProperty("--mine", color);
      made(line, "bdi", text);
    }
    const share = x / svg.viewBox.baseVal.width;
    tip.style.left = share < 0.5 ? `calc(${100 * share}% + 10px)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${100 - 100 * share}% + 10px)`;
  };

  const curvesUnder = (chart, svg) => {
    const curves = [...svg.querySelectorAll("[data-points]")].map((each) => curveOf(each, chart.closest("figure")));
    return (event) => {
      const [x] = position(event, svg);
      const found = curves.map((curve) => ({ ...curve, i: nearest(curve.points, x) }));
      const distance = ({ points, i }) => Math.abs(points[i][0] - x);
      const first = found.reduce((best, curve) => (distance(curve) < distance(best) ? curve : best));
      const line = made(svg, "path", "", SVG);
      line.setAttribute("class", "cursor");
      line.setAttribute("d", `M${first.points[first.i][0]} 8V178`);
      for (const { points, i, color } of found) {
        const dot = made(svg, "circle", "", SVG);
        dot.setAttribute("class", "dot");
        dot.setAttribute("style", `--mine:${color}`);
        [["cx", points[i][0]], ["cy", points[i][1]], ["r", 4]].forEach(([name, value]) => dot.setAttribute(name, value));
      }
      const title = first.at[first.i];
      showTip(chart, svg, first.points[first.i][0], title, found.map(({ color, name, at, values, i }) => ({
        color,
        text: `${name} ${values[i]}${at[i] === title ? "" : ` (${at[i]})`}`.trim(),
      })));
    };
  };

  const cellsUnder = (chart, svg) => {
    const area = svg.querySelector("[data-cells]");
    const rows = area.dataset.cells.split(";").map((row) => row.split(" "));
    const name = (i, j) => area.dataset.pair.replace("{i}", i).replace("{j}", j);
    const [left, top, size] = ["x", "y", "width"].map((name) => Number(area.getAttribute(name)));
    return (event) => {
      const [x, y] = position(event, svg);
      const [i, j] = [y - top, x - left].map((place) => Math.floor((place / size) * rows.length));
      if (rows[i]?.[j] !== undefined) showTip(chart, svg, x, name(i + 1, j + 1), [{ text: rows[i][j] }]);
    };
  };

  for (const chart of document.querySelectorAll(".chart")) {
    const svg = chart.querySelector("svg");
    const show = svg.querySelector("[data-cells]") ? cellsUnder(chart, svg) : curvesUnder(chart, svg);
    const hide = () => chart.querySelectorAll(".tip, .cursor, .dot").forEach((element) => element.remove());
    for (const kind of ["pointerdown", "pointermove"]) {
      svg.addEventListener(kind, (event) => { hide(); show(event); });
    }
    svg.addEventListener("pointerleave", hide);
  }

  // On a phone, only the first section is open. A page that loads again keeps what its reader has opened and closed.
  const folds = [...document.querySelectorAll("details:not(.long)")];
  const nameOf = (fold) => `${fold.closest(".run")?.querySelector(".anchor").id} ${fold.querySelector("summary").textContent}`;
  const key = `folds ${location.pathname}`;
  const narrow = matchMedia("(max-width: 40rem)").matches;
  let stored = {};
  try {
    stored = JSON.parse(sessionStorage.getItem(key)) ?? {};
  } catch {
    // storage is not allowed here
  }
  const usual = new Map(folds.map((fold) => [fold, fold.open && !(narrow && fold.matches(".fold:not(.first)"))]));
  for (const fold of folds) fold.open = stored[nameOf(fold)] ?? usual.get(fold);
  addEventListener("pagehide", () => {
    try {
      const changed = folds.filter((fold) => fold.open !== usual.get(fold)).map((fold) => [nameOf(fold), fold.open]);
      sessionStorage.setItem(key, JSON.stringify(Object.fromEntries(changed)));
    } catch {
      // as above
    }
  });

  // A link to a section opens it.
  const reveal = (id) => {
    for (let fold = id && document.getElementById(id)?.closest("details"); fold; fold = fold.parentElement.closest("details")) {
      fold.open = true;
    }
  };
  document.querySelectorAll('nav a, th a').forEach((link) => link.addEventListener("click", () => reveal(link.hash.slice(1))));
  reveal(location.hash.slice(1));

  // All of the page is printed.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = folds.filter((fold) => !fold.open);
    closed.forEach((fold) => { fold.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((fold) => { fold.open = false; }));
})();
