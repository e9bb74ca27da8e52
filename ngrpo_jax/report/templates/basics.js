// What every script of a page uses: the data, elements, text and numbers for people.
const DATA = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

// Text goes into a page as text nodes alone, so that no response can be markup.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

// Control characters and marks that turn the direction of writing would hide or reorder text: they are shown.
const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

function readable(text) {
  const nodes = [];
  let at = 0;
  for (const found of text.matchAll(INVISIBLE)) {
    const name = "U+" + found[0].charCodeAt(0).toString(16).toUpperCase().padStart(4, "0");
    nodes.push(text.slice(at, found.index), el("span", { class: "control" }, name));
    at = found.index + 1;
  }
  return [...nodes, text.slice(at)];
}

const visible = (text) => text.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶", 7: "⁷", 8: "⁸", 9: "⁹" };
const minus = (text) => text.replace(/^-/, "−");

function number(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 10000) return minus(Math.round(value).toString().replace(/\B(?=(\d{3})+$)/g, "\u202f"));
  if (size >= 1e-3) return minus(String(Number(value.toPrecision(4))));
  const [digits, exponent] = value.toExponential(2).split("e");
  const power = [...String(Number(exponent))].map((c) => SUPERSCRIPTS[c]).join("");
  return `${minus(String(Number(digits)))} × 10${power}`;
}

function seconds(value) {
  if (value < 9.95) return `${Number(value.toPrecision(2))} s`;
  const whole = Math.round(value);
  for (const [size, unit, smaller, name] of [[86400, "d", 3600, "h"], [3600, "h", 60, "min"], [60, "min", 1, "s"]]) {
    if (whole >= size) {
      const rest = Math.floor((whole % size) / smaller);
      return `${Math.floor(whole / size)} ${unit}` + (rest ? ` ${String(rest).padStart(2, "0")} ${name}` : "");
    }
  }
  return `${whole} s`;
}

function bytes(value) {
  for (const [size, unit] of [[1024 ** 4, "TiB"], [1024 ** 3, "GiB"], [1024 ** 2, "MiB"], [1024, "KiB"]]) {
    if (value >= size) return `${Number((value / size).toPrecision(3))} ${unit}`;
  }
  return `${value} B`;
}

function quantity(value, unit, digits = 4) {
  if (value === null || value === undefined) return "–";
  if (unit === "%") return `${minus(String(Number((100 * value).toPrecision(digits))))} %`;
  if (unit === "s") return seconds(value);
  return unit === "bytes" ? bytes(value) : number(value);
}

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
