"use strict";
// Draws the examples of an evaluation. Text from data only ever becomes textContent.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const CHUNK = 20, PRINTED = 200, MOST_CELLS = 250000;

function el(tag, name, ...inside) {
  const e = document.createElement(tag);
  if (name) e.className = name;
  e.append(...inside);
  return e;
}
const bdi = (...inside) => { const e = el("bdi", "", ...inside); e.dir = "auto"; return e; };
const number = (x) => x == null ? "–" : Number.isInteger(x) ? String(x) : x.toFixed(Math.abs(x) < 10 ? 3 : 1);

// ---- what differs: the longest common subsequence, of words, or of characters where neither has a space
function pieces(text, words) { return words ? text.match(/\s+|[^\s]+/gu) || [] : Array.from(text); }

function compare(answer, reference) {
  const words = /\s/.test(answer + reference), a = pieces(answer, words), b = pieces(reference, words);
  if (a.length * b.length > MOST_CELLS) return null;
  const w = b.length + 1, t = new Uint16Array((a.length + 1) * w);
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      t[i * w + j] = a[i] === b[j] ? t[(i + 1) * w + j + 1] + 1 : Math.max(t[(i + 1) * w + j], t[i * w + j + 1]);
  const left = [], right = [];
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && a[i] === b[j]) { left.push([a[i++], false]); right.push([b[j++], false]); }
    else if (j === b.length || (i < a.length && t[(i + 1) * w + j] >= t[i * w + j + 1])) left.push([a[i++], true]);
    else right.push([b[j++], true]);
  }
  return { left, right, common: 2 * t[0] / Math.max(1, a.length + b.length) };
}

function marked(parts, name) {
  const out = bdi();
  for (let i = 0; i < parts.length;) {
    let text = "", on = parts[i][1];
    while (i < parts.length && parts[i][1] === on) text += parts[i++][0];
    out.append(on && text.trim() ? el("mark", name, text) : text);
  }
  return out;
}

// ---- one example
const perfect = (scores) => scores.length > 0 && scores.every((s, i) => s !== null && s >= data.metrics[i].high);

function chips(row) {
  const out = el("div", "chips");
  data.metrics.forEach((m, i) => {
    const s = row.s[i], chip = el("span", "chip " + (s === null ? "none" : s >= m.high ? "good" : s <= m.low ? "poor" : "part"));
    chip.append(el("span", "name", m.name), " ");
    if (data.compare) chip.append(el("span", "muted", number(row.t[i]) + " → "));
    chip.append(el("b", "", number(s)));
    out.append(chip);
  });
  if (row.l !== undefined) out.append(el("span", "chip none", el("span", "name", "log p"), " ", el("b", "", (row.l > -0.0005 ? 0 : row.l).toFixed(3))));
  return out;
}

function example(row) {
  const best = row.r.map(([text]) => [text, compare(row.a, text)])
    .reduce((x, y) => !x || (y[1] && (!x[1] || y[1].common > x[1].common)) ? y : x, null);
  const plain = perfect(row.s) || !best || !best[1];
  const answer = (text, scores, cut) => {
    const c = best && !perfect(scores) && compare(text, best[0]);
    return [text === "" ? el("i", "muted", "empty") : c ? marked(c.left, "extra") : bdi(text),
      ...cut ? [el("span", "cut", "cut at the limit")] : []];
  };
  const texts = el("dl", "texts");
  const put = (label, ...inside) => texts.append(el("dt", "", label), el("dd", "", ...inside));
  const references = row.r.map(([text, n]) => el("span", "reference",
    !plain && text === best[0] ? marked(best[1].right, "missing") : bdi(text), ...(n > 1 ? [el("span", "muted", " ×" + n)] : [])));
  put(row.r.length > 1 ? "References" : "Reference", ...references);
  if (data.compare) put("Base", ...answer(row.b, row.t, row.y));
  put(data.compare ? "Tuned" : "Answer", ...answer(row.a, row.s, row.x));
  const [question, ...more] = row.q.split("\n");  // what follows is often the same in every example, or words read in the image
  const asked = el("p", "question", bdi(question), ...more.length ? [el("span", "more", "\n", bdi(more.join("\n")))] : []);
  const words = el("div", "words", el("div", "top", el("p", "id", bdi(row.id)), chips(row)),
    ...row.e ? [el("p", "earlier", bdi(row.e))] : [], asked, texts);
  const card = el("article", "example");
  if (row.p) {
    const images = el("div", "images");
    for (const place of row.p) {
      if (place === null) { images.append(el("div", "noimage", "no image")); continue; }
      const img = el("img");
      img.alt = "";
      img.src = data.images[place];
      images.append(img);
    }
    card.append(images);
  }
  card.append(words);
  return card;
}

// ---- the list: chunks that are drawn when they come near the screen and emptied when they are far
let shown = [];
const fill = (chunk) => {
  if (chunk.firstChild) return;
  chunk.style.minHeight = "";
  chunk.append(...shown.slice(chunk.start, chunk.start + CHUNK).map((i) => example(data.rows[i])));
};
const near = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    if (isIntersecting) fill(target);
    else if (target.firstChild) {
      target.style.minHeight = target.offsetHeight + "px";
      target.replaceChildren();
    }
  }
}, { rootMargin: "1200px 0px" });

function draw() {
  near.disconnect();
  const chunks = [];
  for (let start = 0; start < shown.length; start += CHUNK) {
    const chunk = el("div", "chunk");
    chunk.start = start;
    chunk.style.minHeight = Math.min(CHUNK, shown.length - start) * 190 + "px";
    chunks.push(chunk);
  }
  $("list").replaceChildren(...chunks.length ? chunks : [el("p", "empty", "No example matches.")]);
  chunks.forEach((c) => near.observe(c));
  if (chunks.length) fill(chunks[0]);
}

addEventListener("beforeprint", () => {
  const chunks = [...document.querySelectorAll(".chunk")];
  chunks.forEach((c) => { c.hidden = c.start >= PRINTED; if (!c.hidden) fill(c); });
  $("printed").hidden = shown.length <= PRINTED;
  $("printed").textContent = "The first " + PRINTED + " of " + shown.length.toLocaleString("en") + " examples are printed.";
});
addEventListener("afterprint", () => {
  document.querySelectorAll(".chunk").forEach((c) => { c.hidden = false; });
  $("printed").hidden = true;
});

// ---- filter and order
const state = { metric: 0, show: "all" };
const score = (row) => row.s.length ? row.s[state.metric] : null;
const base = (row) => row.t && row.t.length ? row.t[state.metric] : null;
const change = (row) => score(row) === null || base(row) === null ? 0 : score(row) - base(row);
const SHOW = {
  all: ["All", () => true],
  wrong: ["Wrong", (r) => score(r) === null || score(r) < data.metrics[state.metric].high],
  right: ["Right", (r) => score(r) !== null && score(r) >= data.metrics[state.metric].high],
  ...(data.compare && {
    better: ["Better", (r) => change(r) > 0], worse: ["Worse", (r) => change(r) < 0], same: ["Same score", (r) => change(r) === 0],
    changed: ["Changed", (r) => r.d],
  }),
  ...(data.rows.some((r) => r.x || r.y) && { cut: ["Cut at the limit", (r) => r.x || r.y] }),
};
if (!data.metrics.length) { delete SHOW.wrong; delete SHOW.right; delete SHOW.better; delete SHOW.worse; delete SHOW.same; }
const low = (x) => x === null || x === undefined ? -Infinity : x;
const ORDER = {
  ...(data.compare && data.metrics.length && {
    lost: ["most lost first", (a, b) => change(a) - change(b) || low(score(a)) - low(score(b))],
    gained: ["most gained first", (a, b) => change(b) - change(a) || low(score(a)) - low(score(b))],
  }),
  ...(data.metrics.length && { worst: ["worst first", (a, b) => low(score(a)) - low(score(b))],
    best: ["best first", (a, b) => low(score(b)) - low(score(a))] }),
  ...(data.rows.some((r) => r.l !== undefined) && { unsure: ["least likely first", (a, b) => low(a.l) - low(b.l)],
    sure: ["most likely first", (a, b) => low(b.l) - low(a.l)] }),
  file: ["as in the file", () => 0],
};
const fold = (s) => s.normalize("NFKC").toLowerCase();
const haystack = (r) => r.hay ??= fold([r.id, r.e || "", r.q, r.a, r.b || "", ...r.r.map((x) => x[0])].join("\n"));

function limit(id) {
  const text = $(id).value.trim().replace(",", "."), x = Number(text);
  $(id).toggleAttribute("aria-invalid", text !== "" && Number.isNaN(x));
  return text === "" || Number.isNaN(x) ? null : x;
}

function update() {
  const words = fold($("search").value).split(/\s+/).filter(Boolean), from = limit("low"), to = limit("high");
  const found = [];
  data.rows.forEach((r, i) => {
    const s = score(r);
    if ((from !== null && !(s !== null && s >= from - 1e-9)) || (to !== null && !(s !== null && s <= to + 1e-9))) return;
    if (words.every((w) => haystack(r).includes(w))) found.push(i);
  });
  for (const button of $("show").children) {
    const n = found.filter((i) => SHOW[button.value][1](data.rows[i])).length;
    button.lastChild.textContent = n.toLocaleString("en");
    button.setAttribute("aria-pressed", String(button.value === state.show));
  }
  const order = ORDER[$("order").value][1];
  shown = found.filter((i) => SHOW[state.show][1](data.rows[i])).sort((i, j) => order(data.rows[i], data.rows[j]) || i - j);
  $("count").textContent = shown.length.toLocaleString("en") + " of " + data.rows.length.toLocaleString("en");
  draw();
}

// ten bars of the chosen metric's scores; a click keeps one of them, a second click all
function histogram() {
  const m = data.metrics[state.metric], counts = new Array(10).fill(0), width = (m.high - m.low) / 10 || 1;
  for (const r of data.rows) if (score(r) !== null) counts[Math.min(9, Math.max(0, Math.floor((score(r) - m.low) / width + 1e-9)))]++;
  const most = Math.max(...counts, 1);
  $("histogram").replaceChildren(...counts.map((n, k) => {
    const bar = el("button"), fill = el("span"), text = (x) => String(+x.toFixed(4));
    const ends = [text(m.low + k * width), k === 9 ? text(m.high) : text(m.low + (k + 1) * width - width / 1000)];
    bar.type = "button";
    bar.title = `${ends[0]} to ${text(m.low + (k + 1) * width)}: ${n.toLocaleString("en")}`;
    bar.setAttribute("aria-label", bar.title);
    bar.disabled = n === 0;
    fill.style.height = n ? Math.max(8, 100 * n / most) + "%" : "0";
    bar.append(fill);
    bar.addEventListener("click", () => {
      const again = $("low").value === ends[0] && $("high").value === ends[1];
      $("low").value = again ? "" : ends[0];
      $("high").value = again ? "" : ends[1];
      update();
    });
    return bar;
  }));
}

function option(select, value, text) { const o = el("option", "", text); o.value = value; select.append(o); }
data.metrics.forEach((m, i) => option($("metric"), i, m.name));
for (const [name, [text]] of Object.entries(ORDER)) option($("order"), name, text);
for (const [name, [text]] of Object.entries(SHOW)) {
  const button = el("button", "", text + " ", el("span", "muted"));
  button.type = "button";
  button.value = name;
  button.addEventListener("click", () => { state.show = name; update(); });
  $("show").append(button);
}
let wait;
for (const id of ["search", "low", "high"]) $(id).addEventListener("input", () => { clearTimeout(wait); wait = setTimeout(update, 120); });
$("order").addEventListener("change", update);
$("metric").addEventListener("change", () => {
  state.metric = Number($("metric").value);
  $("low").value = $("high").value = "";
  histogram();
  update();
});
const tools = document.querySelector(".tools");
tools.addEventListener("submit", (e) => e.preventDefault());
tools.hidden = false;
$("metric").parentElement.hidden = data.metrics.length < 2;
document.querySelector(".range").hidden = $("histogram").hidden = !data.metrics.length;
if (data.metrics.length) histogram();
update();
document.documentElement.dataset.ready = "yes";
