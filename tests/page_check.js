// What a page must not have: sideways scrolling, faint text, controls without a name. Returns the offenders.
const linear = (c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
const rgb = (text) => {
  canvas.clearRect(0, 0, 1, 1);
  canvas.fillStyle = text;
  canvas.fillRect(0, 0, 1, 1);
  return [...canvas.getImageData(0, 0, 1, 1).data];
};
const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
const contrast = (a, b) => {
  const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
  return (high + 0.05) / (low + 0.05);
};
const behind = (element) => {
  for (let e = element; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour[3] === 255) return colour;
  }
  return [255, 255, 255, 255];
};
const faint = [], roles = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.textContent.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
  if (!element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const ratio = contrast(rgb(element.closest("svg") ? style.fill : style.color), behind(element));
  if (ratio < 4.5) faint.push(`${element.tagName} ${element.textContent.slice(0, 40)}: ${ratio.toFixed(2)}`);
}
if (document.querySelectorAll("h1").length !== 1) roles.push("not one h1");
let level = 1;
for (const heading of document.querySelectorAll("h1, h2, h3")) {
  const now = Number(heading.tagName[1]);
  if (now > level + 1) roles.push(`${heading.tagName} after h${level}`);
  level = now;
}
for (const table of document.querySelectorAll("table")) {
  if (!table.caption || !table.querySelector("thead th[scope=col]")) roles.push("a table without caption or headings");
  if (!table.closest("[tabindex]")) roles.push("a table that the keyboard cannot scroll");
}
for (const figure of document.querySelectorAll("figure"))
  if (!figure.getAttribute("aria-label") || figure.getAttribute("role") !== "img") roles.push("a figure without a name");
if (!document.querySelector("main") || !document.documentElement.lang || !document.title) roles.push("no main, lang or title");
const root = document.scrollingElement;
const wide = [...document.querySelectorAll("body *")]
  .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 && !e.closest(".scroll, pre, svg"))
  .map((e) => `${e.tagName}.${e.className}`).slice(0, 5);
return {
  scrolls: Math.max(0, root.scrollWidth - innerWidth), wide, faint: faint.slice(0, 5), roles,
  dark: luminance(rgb(getComputedStyle(document.documentElement).backgroundColor)) < 0.5,
};
