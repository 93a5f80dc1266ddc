"use strict";
// The gallery's pages from gallery.json (data.js holds it packed, since a page on disk may not fetch). No library.
let data, lines, rows, byName;
const $ = id => document.getElementById(id);
const make = (tag, attributes = {}, ...children) => {
  const e = document.createElement(tag);
  for (const [k, v] of Object.entries(attributes)) if (v !== false && v != null) e.setAttribute(k, v === true ? "" : v);
  e.append(...children);
  return e;
};
const short = n => {
  for (const [unit, size] of [["T", 1e12], ["B", 1e9], ["M", 1e6], ["K", 1e3]])
    if (n >= size * .9995) return (n / size).toPrecision(3) + unit;
  return String(n);
};
const GB = n => { const x = n / 1e9; return (x >= 99.95 ? x.toFixed(0) : x >= .995 ? x.toFixed(1) : x.toPrecision(2)) + " GB"; };
const whole = n => n.toLocaleString("en");
const cacheBytes = (r, context, kv) => r.cache.reduce((sum, [n, kept]) => sum + n * Math.min(context, kept || context), 0) * kv;
const stateBytes = (r, kv) => r.state[0] + r.state[1] * kv;
const weightBytes = (r, dtype) => {
  const bits = data.bits[dtype];
  return bits >= 16 ? r.params * bits / 8 : (r.matrices * bits + (r.params - r.matrices) * 16) / 8;
};
const size = r => r.params ?? r.published_params ?? 0;
const active = r => r.active ?? r.published_active ?? size(r);
const made = (r, group) => r.choices?.[group] ?? [];
const proven = { weights: "proven with its weights", rules: "family proven" };

function card(r) {
  const picture = r.drawing
    ? make("a", { class: "picture", href: `r/${r.name}.html`, tabindex: -1, "aria-hidden": "true" },
      make("img", { src: `svg/${r.drawing}`, alt: "", loading: "lazy", decoding: "async" }))
    : make("p", { class: "none" }, `Not drawn: ${r.not_drawn}.`);
  const copied = r.drawn_as ? `Drawn as ${r.drawn_as}, of which it is a quantised copy (${r.weights})` : "";
  const li = make("li", {}, picture);
  const text = make("div", { class: "text" });
  text.append(make("h2", {}, make("a", { href: `r/${r.name}.html` }, r.name)));
  const moe = active(r) < size(r) ? `, ${short(active(r))} active` : "";
  text.append(make("p", {}, (size(r) ? short(size(r)) + moe : "size not published") + (r.context ? ` · ${whole(r.context)} tokens` : "")));
  text.append(make("p", { class: "muted" }, [r.vendor, r.released, r.licence].filter(Boolean).join(" · ")));
  const cache = r.kv_per_token ? `KV cache ${GB(cacheBytes(r, r.context, 2))} at full context in bf16` : r.cache ? "no KV cache" : "";
  text.append(make("p", { class: "muted" }, [cache, proven[r.proven]].filter(Boolean).join(" · ")));
  if (copied) text.append(make("p", { class: "muted" }, copied));
  const tags = [...made(r, "attention"), ...made(r, "positions"), ...made(r, "feed-forward").filter(t => !/^MoE,|GLU/.test(t))];
  text.append(make("div", { class: "tags" }, ...tags.map(t => make("span", {}, t))));
  li.append(text);
  if (r.drawing) li.append(make("label", {}, make("input", { type: "checkbox", name: "compare", value: r.name }), "Compare"));
  return li;
}

const SORTS = {
  "newest, drawn first": [r => (r.drawn_as ? 1 : r.drawing ? 2 : 0) + (r.released ?? ""), -1], newest: [r => r.released ?? "", -1], oldest: [r => r.released ?? "9", 1], "largest": [size, -1], "smallest": [r => size(r) || Infinity, 1],
  "most active": [active, -1], "longest context": [r => r.context ?? 0, -1], "smallest cache a token": [r => r.kv_per_token ?? Infinity, 1],
  name: [r => r.name, 1],
};

function gallery() {
  const form = $("ask"), cards = new Map(), picked = [];
  let asks = 0;
  const option = (select, values, all) => $(select).append(make("option", { value: "" }, all), ...values.map(v => make("option", {}, v)));
  const each = f => [...new Set(rows.map(f).filter(Boolean))].sort((a, b) => a.localeCompare(b, "en", { sensitivity: "base" }));
  option("vendor", each(r => r.vendor), "all");
  option("year", each(r => r.released?.slice(0, 4)).reverse(), "all");
  const groups = Object.keys(data.choices);
  for (const g of groups) option(g, data.choices[g].filter(c => rows.some(r => made(r, g).includes(c))), "any");
  option("proven", Object.values(proven), "any");
  $("sort").append(...Object.keys(SORTS).map(s => make("option", {}, s)));
  const haystack = new Map(rows.map(r => [r, [r.name, ...(r.aliases ?? []), r.vendor, r.family, r.repo, r.licence, r.released, r.weights,
    ...Object.values(r.choices ?? {}).flat(), ...Object.values(r.about ?? {})].join(" ").toLowerCase()]));
  function show() {
    const asked = Object.fromEntries(new FormData(form));
    const words = asked.search.toLowerCase().split(/\s+/).filter(Boolean);
    const found = rows.filter(r => words.every(w => haystack.get(r).includes(w)) && (!asked.vendor || r.vendor === asked.vendor)
      && (!asked.year || r.released?.startsWith(asked.year)) && (!asked.proven || proven[r.proven] === asked.proven)
      && groups.every(g => !asked[g] || made(r, g).includes(asked[g])));
    const [key, way] = SORTS[asked.sort];
    const order = (a, b) => a < b ? -way : a > b ? way : 0;
    found.sort((a, b) => order(key(a), key(b)));
    const shown = several => several.map(r => cards.get(r) ?? cards.set(r, card(r)).get(r));
    $("cards").replaceChildren(...shown(found.slice(0, 24))); // what is seen first, first
    const asking = ++asks;
    setTimeout(() => { if (asking === asks) $("cards").append(...shown(found.slice(24))); });
    const filters = Object.entries(asked).filter(([k, v]) => v && k !== "search" && k !== "sort").length;
    $("filtered").textContent = filters ? ` (${filters})` : "";
    $("count").textContent = `${found.length} of ${rows.length} releases`;
    const kept = new URLSearchParams(Object.entries(asked).filter(([k, v]) => v && !(k === "sort" && v === Object.keys(SORTS)[0])));
    try { history.replaceState(null, "", "#" + kept); } catch { /* a frame on disk may not */ }
  }
  for (const [k, v] of new URLSearchParams(location.hash.slice(1))) if (form.elements[k]) form.elements[k].value = v;
  const narrow = matchMedia("(max-width:600px)"); // where they would fill the window, filters are folded away
  const fold = () => { $("filters").open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
  form.addEventListener("input", show);
  form.addEventListener("submit", e => e.preventDefault());
  form.addEventListener("reset", () => setTimeout(show));
  const untick = name => { cards.get(byName.get(name)).querySelector("input").checked = false; };
  function bar() {
    const none = make("button", { type: "button" }, "Choose none");
    none.addEventListener("click", () => { picked.splice(0).forEach(untick); bar(); $("search").focus(); });
    $("bar").hidden = !picked.length;
    $("bar").replaceChildren(picked.length < 2 ? `${picked[0]}: choose another to compare` :
      make("a", { href: "compare.html#" + picked.join(",") }, "Compare " + picked.join(", ")), none);
  }
  $("cards").addEventListener("change", e => {
    if (e.target.name !== "compare") return;
    if (e.target.checked) picked.push(e.target.value); else picked.splice(picked.indexOf(e.target.value), 1);
    if (picked.length > 4) untick(picked.shift());
    bar();
  });
  show();
}

const FACTS = [
  ["vendor", r => r.vendor], ["released", r => r.released], ["licence", r => r.licence], ["weights", r => r.weights],
  ["drawn and counted as", r => r.drawn_as],
  ["parameters", r => size(r) && short(size(r))], ["active per token", r => size(r) && short(active(r))], ["layers", r => r.layers],
  ["d_model", r => r.d_model && whole(r.d_model)], ["vocabulary", r => r.vocabulary && whole(r.vocabulary)],
  ["context", r => r.context && whole(r.context)], ["order of layers", r => r.pattern],
  ...["attention", "positions", "norm", "QK-norm", "feed-forward"].map(k => [k, r => r.about?.[k]]),
  ["KV cache a token, bf16", r => r.cache && whole(r.kv_per_token) + " B"],
  ["KV cache, full context", r => r.cache && GB(cacheBytes(r, r.context, 2))], ["proven", r => proven[r.proven] ?? "no"],
];

// A drawing, and over it a mark on each line whose text is not among those that all drawings have.
function marked(r, common) {
  const [height, ...at] = lines.at[r.drawing], box = make("div", { class: "drawn" },
    make("img", { src: `svg/${r.drawing}`, alt: `Block diagram of ${r.name}; the table says the same in words` }));
  for (let n = 0; n < at.length; n += 3) {
    const [text, width] = lines.texts[at[n]];
    if (common.has(text)) continue;
    const part = (x, of) => `${(100 * x / of).toFixed(2)}%`;
    box.append(make("i", { title: text, style: `left:${part(at[n + 1], 400)};width:${part(width, 400)};top:${part(at[n + 2] - 10, height)};height:${part(14, height)}` }));
  }
  return box;
}

function compare() {
  const form = $("ask"), drawn = rows.filter(r => r.drawing);
  const selects = [0, 1, 2, 3].map(n => {
    const s = make("select", { id: `m${n}` }, make("option", { value: "" }, n > 1 ? "none" : "choose"), ...drawn.map(r => make("option", {}, r.name)));
    form.append(make("label", {}, `Model ${n + 1}`, s));
    return s;
  });
  decodeURIComponent(location.hash.slice(1)).split(",").slice(0, 4).forEach((n, i) => { if (byName.get(n)?.drawing) selects[i].value = n; });
  if (!selects[0].value && drawn.length > 1) { selects[0].value = drawn[0].name; selects[1].value = drawn[1].name; }
  function show() {
    const chosen = selects.map(s => byName.get(s.value)).filter(Boolean);
    const head = make("tr", {}, make("td"), ...chosen.map(r => make("th", { scope: "col" }, make("a", { href: `r/${r.name}.html` }, r.name))));
    const body = FACTS.filter(([, fact]) => chosen.some(fact)).map(([name, fact]) => {
      const values = chosen.map(r => String(fact(r) || "–")), differs = new Set(values).size > 1;
      return make("tr", { class: differs && "differs" }, make("th", { scope: "row" }, (differs ? "≠\u00a0" : "") + name), ...values.map(v => make("td", {}, v)));
    });
    $("table").style.setProperty("--models", chosen.length);
    $("table").replaceChildren(make("caption", {}, "Rows that differ begin with ≠"), make("thead", {}, head), make("tbody", {}, ...body));
    const said = chosen.map(r => new Set(lines.at[r.drawing].slice(1).filter((_, n) => n % 3 === 0).map(n => lines.texts[n][0])));
    const common = said.reduce((all, one) => new Set([...all].filter(t => one.has(t))), said[0] ?? new Set());
    $("pictures").replaceChildren(...chosen.map(r => make("figure", {}, make("figcaption", {}, r.name), marked(r, common))));
    try { history.replaceState(null, "", "#" + chosen.map(r => r.name).join(",")); } catch { /* as above */ }
  }
  form.addEventListener("input", show);
  show();
}

function fit() {
  const form = $("ask"), known = rows.filter(r => r.params);
  $("release").append(...known.map(r => make("option", {}, r.name)).sort((a, b) => a.value.localeCompare(b.value)));
  $("dtype").append(...Object.keys(data.bits).map(d => make("option", { selected: d === "bf16" }, d)));
  $("kv").append(...Object.keys(data.kv_bytes).map(d => make("option", { selected: d === "bf16" }, d)));
  const asked = location.hash.slice(1), fields = ["release", "dtype", "context", "batch", "kv"]; // #NAME, or all that was asked
  for (const [k, v] of asked.includes("=") ? new URLSearchParams(asked) : [["release", decodeURIComponent(asked)]])
    if (fields.includes(k) && ([...$(k).options ?? []].some(o => o.value === v) || $(k).type === "number")) $(k).value = v;
  function show() {
    const r = byName.get($("release").value), kv = data.kv_bytes[$("kv").value];
    const batch = Math.max(1, Math.floor(+$("batch").value) || 1), wanted = Math.max(1, Math.floor(+$("context").value) || 1);
    const context = Math.min(wanted, r.context);
    const weights = weightBytes(r, $("dtype").value), cache = cacheBytes(r, context, kv) * batch, state = stateBytes(r, kv) * batch;
    const total = weights + cache + state;
    $("said").textContent = wanted > r.context ? `${r.name} sees at most ${whole(r.context)} tokens: counted for that many.` : "";
    const line = (name, n) => make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "n" }, GB(n)));
    const needs = [["Weights", weights], ["KV cache", cache], ["Recurrent state", state], ["Together", total]];
    $("needs").replaceChildren(...needs.filter(([, n]) => n).map(([name, n]) => line(name, n)));
    $("hardware").replaceChildren(...Object.entries(data.cards).map(([name, gb]) => {
      const n = Math.ceil(total / (gb * 9e8));
      return make("tr", {}, make("th", { scope: "row" }, name), make("td", { class: "n" }, `${gb} GB`),
        make("td", { class: n === 1 ? "yes" : "" }, n === 1 ? "fits on one" : `${whole(n)} of them`));
    }));
    try { history.replaceState(null, "", "#" + new URLSearchParams(fields.map(k => [k, $(k).value]))); } catch { /* as above */ }
  }
  form.addEventListener("input", show);
  show();
}

// zlib's stream in base64 -> JSON.
const unpack = async packed => {
  const bytes = Uint8Array.from(atob(packed), c => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).json();
};

async function start() {
  data = await unpack(DATA);
  if (typeof LINES !== "undefined") lines = await unpack(LINES);
  rows = data.releases.map(r => ({ ...r, ...data.architectures[r.drawing] }));
  byName = new Map(rows.map(r => [r.name, r]));
  ({ gallery, compare, fit })[document.body.dataset.page]?.();
  document.body.dataset.filled = "";
}

start().catch(e => {
  $("main").prepend(make("p", { role: "alert" }, "This page can't show the releases: it needs a browser of 2023 or later. ",
    make("a", { href: "gallery.json" }, "The data")));
  throw e;
});
