"use strict";
// Says the value of a curve at the pointer. The curves themselves are drawn already.
const charts = JSON.parse(document.getElementById("data").textContent);
document.querySelectorAll(".chart").forEach((figure, k) => {
  const { x, y, t } = charts[k], svg = figure.querySelector("svg"), out = figure.querySelector("output");
  const [line, dot] = svg.querySelectorAll(".cursor");
  if (!x.length) return;
  const show = (i) => {
    line.setAttribute("x1", i < 0 ? -9 : x[i]);
    line.setAttribute("x2", i < 0 ? -9 : x[i]);
    dot.setAttribute("cx", i < 0 ? -9 : x[i]);
    dot.setAttribute("cy", i < 0 ? -9 : y[i]);
    out.textContent = t[i < 0 ? t.length - 1 : i];
  };
  const nearest = (at) => x.reduce((best, v, i) => Math.abs(v - at) < Math.abs(x[best] - at) ? i : best, 0);
  svg.addEventListener("pointermove", (e) => {
    const box = svg.getBoundingClientRect();
    show(nearest((e.clientX - box.left) / box.width * svg.viewBox.baseVal.width));
  });
  svg.addEventListener("pointerleave", () => show(-1));
  show(-1);
});
document.documentElement.dataset.ready = "yes";
