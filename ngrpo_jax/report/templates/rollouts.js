// The rollouts: groups of responses side by side, search and filter over all of them, mixtures on hover or tap.
const FILTERS = {
  all: ["all", () => true],
  right: ["right", (one) => one.reward > 0.5],
  wrong: ["wrong", (one) => !(one.reward > 0.5)],
  cut: ["cut off", (one) => one.stopped === false],
  mixed: ["most mixed", (one) => mixedCount(one) > 0],
};
const MOST_FOUND = 30;
const mixedCount = (one) => one.parts.filter((part) => typeof part !== "string").length;
const textOf = (one) => one.parts.map((part) => (typeof part === "string" ? part : part[0])).join("");
const cards = $("rollout-list"), tools = $("rollout-tools");
let current = 0, reference = 0;

function weightRows([cosine, candidates]) {
  const rows = [];
  for (let i = 0; i < candidates.length; i += 2) {
    const share = candidates[i + 1];
    rows.push(el("tr", {}, el("td", { class: "token" }, ...readable(visible(DATA.texts[candidates[i]]))),
      el("td", {}, share > 0 && share < 5e-4 ? "under 0.1 %" : `${(100 * share).toFixed(1)} %`),
      el("td", { class: "bar" }, el("i", { style: `width:${100 * share}%` }))));
  }
  return [el("table", { class: "bars" }, ...rows), el("p", {}, `cosine to the anchor ${cosine.toFixed(4)}`)];
}

const popover = el("div", { class: "popover", role: "tooltip", id: "mixture", hidden: true });
document.body.append(popover);

function explain(mark) {
  const mixture = mark.mixture;
  popover.replaceChildren(...(mixture.length
    ? [el("b", {}, DATA.nearest ? "Read as a mixture: the anchor, then its neighbours, nearest first" : "Read as a mixture, the anchor first"), ...weightRows(mixture)]
    : [el("p", {}, "Read as a mixture; the log has no room for what it was made of.")]));
  popover.hidden = false;
  const place = mark.getClientRects()[0], size = popover.getBoundingClientRect();
  const left = Math.max(8, Math.min(place.left, innerWidth - size.width - 8));
  const below = place.bottom + 6 + size.height < innerHeight;
  popover.style.left = `${left}px`;
  popover.style.top = `${Math.max(8, below ? place.bottom + 6 : place.top - size.height - 6)}px`;
  for (const old of document.querySelectorAll("mark[aria-describedby]")) old.removeAttribute("aria-describedby");
  mark.setAttribute("aria-describedby", "mixture");
}

// Where two texts first differ, not within a pair of surrogates.
function shared(a, b) {
  let n = 0;
  while (n < a.length && n < b.length && a[n] === b[n]) n++;
  return n > 0 && /[\ud800-\udbff]/.test(a[n - 1]) ? n - 1 : n;
}

// The text with mixed tokens marked; its first `same` characters are pale, and a sign stands after them.
function body(one, same) {
  const box = el("div", { class: "response", tabindex: 0, role: "region", "aria-label": `response ${one.sample ?? ""}` });
  let at = 0;
  const add = (text, mixture) => {
    const cut = Math.max(0, Math.min(text.length, same - at));
    for (const [piece, pale] of [[text.slice(0, cut), true], [text.slice(cut), false]]) {
      if (!piece) continue;
      const node = mixture ? el("mark", { tabindex: 0 }, ...readable(piece)) : el("span", {}, ...readable(piece));
      if (mixture) node.mixture = mixture;
      if (pale) node.classList.add("pale");
      if (!pale && at + cut === same && same > 0 && !box.querySelector(".parts")) {
        box.append(el("span", { class: "parts", title: "Here the two responses first part", role: "img", "aria-label": "parts here" }));
      }
      box.append(node);
    }
    at += text.length;
  };
  for (const part of one.parts) {
    if (typeof part === "string") add(part, null);
    else add(part[0], part.slice(1));
  }
  if (one.cut) box.append(el("span", { class: "control" }, `${number(one.cut)} more characters are not in the log`));
  return box;
}

function badge(one) {
  if (one.reward === undefined || one.reward === null) return el("span", { class: "badge" }, "no reward");
  const right = one.reward > 0.5;
  return el("span", { class: `badge ${right ? "good" : "bad"}` }, right ? "right" : "wrong");
}

function card(one, same, index, choose) {
  const mixed = mixedCount(one);
  const facts = [
    one.reward === undefined || one.reward === null ? "" : `reward ${number(one.reward)}`,
    one.tokens === undefined ? "" : `${number(one.tokens)} tokens`,
    one.logprob === undefined || !one.tokens ? "" : `log-probability ${number(one.logprob / one.tokens)} a token`,
    `${mixed} mixed`,
  ].filter(Boolean).join(" · ");
  const summary = el("summary", {}, badge(one), one.stopped === false ? el("span", { class: "badge" }, "cut off") : "",
    el("span", {}, `response ${one.sample ?? index + 1}`), el("span", { class: "facts-line" }, facts));
  const node = el("details", { class: "rollout", open: true }, summary, body(one, same));
  if (choose) {
    const button = el("button", { type: "button", "aria-pressed": String(index === reference) },
      index === reference ? "others are compared with this one" : "compare with this one");
    button.addEventListener("click", () => { reference = index; showGroup(); });
    node.append(button);
  }
  return node;
}

function question(group) {
  return el("div", { class: "box question" }, el("b", {}, `step ${group.step ?? "?"} · ${group.id ?? ""}`),
    el("div", { class: "problem", tabindex: 0, role: "region", "aria-label": "problem" }, ...readable(String(group.problem ?? ""))),
    group.answer === undefined || group.answer === null ? "" : el("div", { class: "note" }, "expected ", ...readable(String(group.answer))));
}

function showGroup() {
  const group = DATA.groups[current];
  const texts = group.responses.map(textOf);
  const others = texts.filter((_, i) => i !== reference);
  const same = texts.map((text, i) => (i === reference
    ? Math.min(...others.map((other) => shared(text, other)), texts.length > 1 ? text.length : 0)
    : shared(text, texts[reference])));
  cards.replaceChildren(question(group), el("div", { class: "group" },
    ...group.responses.map((one, i) => card(one, same[i], i, texts.length > 1))));
}

function showFound(wanted, filter) {
  const [, fits] = FILTERS[filter];
  let found = DATA.groups.flatMap((group) => group.responses.filter(fits)
    .filter((one) => !wanted || `${textOf(one)}\n${group.problem}\n${group.id}`.toLowerCase().includes(wanted))
    .map((one) => ({ group, one })));
  if (filter === "mixed") found.sort((a, b) => mixedCount(b.one) / (b.one.tokens || 1) - mixedCount(a.one) / (a.one.tokens || 1));
  const all = DATA.groups.reduce((sum, group) => sum + group.responses.length, 0);
  const more = found.length > MOST_FOUND ? `, of which ${MOST_FOUND} are shown` : "";
  cards.replaceChildren(el("p", { class: "note", id: "found" }, `${found.length} of ${all} responses${more}`),
    ...found.slice(0, MOST_FOUND).map(({ group, one }) =>
      el("div", { class: "hit" }, question(group), card(one, 0, (one.sample ?? 1) - 1, false))));
  highlight(wanted);
}

// Found text is highlighted where the browser can do so without changing the document.
function highlight(wanted) {
  if (!globalThis.Highlight) return;
  const ranges = [];
  const walker = document.createTreeWalker(cards, NodeFilter.SHOW_TEXT);
  while (wanted && walker.nextNode()) {
    const text = walker.currentNode.data.toLowerCase();
    for (let at = text.indexOf(wanted); at >= 0; at = text.indexOf(wanted, at + wanted.length)) {
      const found = new Range();
      found.setStart(walker.currentNode, at);
      found.setEnd(walker.currentNode, at + wanted.length);
      ranges.push(found);
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

function startRollouts() {
  const label = (group) => {
    const right = group.responses.filter(FILTERS.right[1]).length;
    return `step ${group.step ?? "?"} · ${right} of ${group.responses.length} right · ${String(group.problem ?? "").slice(0, 60)}`;
  };
  const picker = el("select", { id: "group" }, ...DATA.groups.map((group, i) => el("option", { value: i }, label(group))));
  const search = el("input", { type: "search", id: "search", placeholder: "response or problem" });
  const filter = el("select", { id: "filter" }, ...Object.entries(FILTERS).map(([name, [words]]) => el("option", { value: name }, words)));
  const move = (by) => {
    picker.value = Math.min(DATA.groups.length - 1, Math.max(0, Number(picker.value) + by));
    picker.dispatchEvent(new Event("change"));
  };
  const earlier = el("button", { type: "button", "aria-label": "earlier group" }, "‹");
  const later = el("button", { type: "button", "aria-label": "later group" }, "›");
  earlier.addEventListener("click", () => move(-1));
  later.addEventListener("click", () => move(1));
  const show = () => {
    const wanted = search.value.trim().toLowerCase();
    popover.hidden = true;
    if (wanted || filter.value !== "all") showFound(wanted, filter.value);
    else { highlight(""); showGroup(); }
  };
  picker.addEventListener("change", () => {
    current = Number(picker.value);
    reference = 0;
    search.value = "";
    filter.value = "all";
    show();
  });
  search.addEventListener("input", show);
  filter.addEventListener("change", show);
  tools.append(el("span", { class: "pair grow" }, earlier, el("label", { class: "grow" }, el("span", { class: "unseen" }, "Group "), picker), later),
    el("label", { class: "search" }, "Search ", search), el("label", {}, "Show ", filter));
  const marked = (event) => event.target.closest?.("mark");
  for (const kind of ["pointerover", "focusin", "click"]) {
    cards.addEventListener(kind, (event) => { if (marked(event)?.mixture) explain(marked(event)); });
  }
  document.addEventListener("pointerover", (event) => { if (!marked(event)) popover.hidden = true; });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") popover.hidden = true; });
  addEventListener("scroll", () => { popover.hidden = true; }, { capture: true, passive: true });
  current = Math.max(0, DATA.groups.findIndex((group) => group.responses.some(FILTERS.wrong[1])));
  picker.value = current;
  show();
}

if (cards) startRollouts();
