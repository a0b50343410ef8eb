"use strict";
// Tables: a click on a heading sorts by its column.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.parentElement, row = heading.parentElement, body = row.closest("table").tBodies[0];
    const column = [...row.children].indexOf(heading), rising = heading.getAttribute("aria-sort") !== "ascending";
    const key = (line) => {
      const cell = line.children[column], text = cell.dataset.value ?? cell.textContent;
      const value = Number(text.replaceAll(",", "") || "-");
      return Number.isNaN(value) ? text : value;
    };
    const empty = (value) => value === "" || value === "–";
    const order = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b)));
    const lines = [...body.rows].sort((a, b) => {
      const [one, other] = [key(a), key(b)];
      return empty(one) || empty(other) ? empty(one) - empty(other) : (rising ? 1 : -1) * order(one, other);
    });
    for (const other of row.children) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", rising ? "ascending" : "descending");
    body.append(...lines);
  });
}
// Figures: the pointer, or the arrow keys, show the values of the nearest point of every series of those axes.
const short = (value) => {
  const size = Math.abs(value);
  if (size >= 1e16 || (size > 0 && size < 1e-4)) return value.toExponential(3);
  for (const [scale, unit] of [[1e12, " T"], [1e9, " B"], [1e6, " M"]])
    if (size >= scale) return (value / scale).toPrecision(4) + unit;
  return size >= 1000 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(5)));
};
for (const figure of document.querySelectorAll("figure[data-hover]")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const tip = document.createElement("div"), cursor = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  cursor.className = "cursor";
  tip.hidden = cursor.hidden = true;
  figure.append(cursor, tip);
  const shown = () => [...figure.children].find((child) => child.tagName === "DIV" && child.offsetParent !== null && child.querySelector("svg"));
  const share = (value, range, log) =>
    log ? Math.log(value / range[0]) / Math.log(range[1] / range[0]) : (value - range[0]) / (range[1] - range[0]);
  const hide = () => { tip.hidden = cursor.hidden = true; };
  const show = (across, down) => {
    const frame = shown(), boxes = data[frame.className];
    const inside = (box) => across >= box.left && across <= box.right && down >= box.top && down <= box.bottom;
    const found = [];
    let place = null;
    data.series.forEach((series, i) => {
      const box = boxes[i];
      if (!inside(box)) return;
      let best = -1, least = Infinity;
      series.x.forEach((x, j) => {
        if (x === null || series.y[j] === null || (box.log[0] && x <= 0)) return;
        const at = box.left + share(x, box.x, box.log[0]) * (box.right - box.left);
        if (Math.abs(at - across) < least) [least, best] = [Math.abs(at - across), j];
      });
      if (best < 0) return;
      if (!found.length) place = { x: series.x[best], at: box.left + share(series.x[best], box.x, box.log[0]) * (box.right - box.left), box };
      found.push([series, best]);
    });
    if (!found.length) return hide();
    tip.replaceChildren(document.createTextNode("at " + short(place.x)));
    for (const [series, j] of found.slice(0, 9)) {
      const line = document.createElement("div");
      line.textContent = series.name + ": " + short(series.y[j]) + (series.x[j] === place.x ? "" : " (at " + short(series.x[j]) + ")");
      line.style.borderLeft = "3px solid var(--" + series.colour + ")";
      line.style.paddingLeft = "0.4em";
      tip.append(line);
    }
    tip.hidden = cursor.hidden = false;
    const width = frame.clientWidth, height = frame.clientHeight, x = Math.min(Math.max(place.at, 0), 1) * width;
    cursor.style.left = x + "px";
    cursor.style.top = place.box.top * height + "px";
    cursor.style.height = (place.box.bottom - place.box.top) * height + "px";
    tip.style.left = Math.max(0, x + 12 + tip.offsetWidth > width ? x - 12 - tip.offsetWidth : x + 12) + "px";
    tip.style.top = (place.box.top * height + 8) + "px";
  };
  figure.addEventListener("pointermove", (event) => {
    const frame = shown(), area = frame.getBoundingClientRect();
    show((event.clientX - area.left) / area.width, (event.clientY - area.top) / area.height);
  });
  figure.addEventListener("pointerleave", hide);
  figure.addEventListener("blur", hide);
  let key = null;
  figure.addEventListener("keydown", (event) => {
    const box = data[shown().className][0], step = (box.right - box.left) / 40;
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return event.key === "Escape" && hide();
    event.preventDefault();
    key = Math.min(box.right, Math.max(box.left, (key ?? box.left) + (event.key === "ArrowRight" ? step : -step)));
    show(key, (box.top + box.bottom) / 2);
  });
}
