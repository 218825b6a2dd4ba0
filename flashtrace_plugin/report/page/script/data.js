// The page's numbers, read once. Texts come from the page itself and are only ever written as text.
const own = document.currentScript; // none where a notebook evaluates the script's text
const root = own ? own.closest(".ft") : document.querySelector(".ft:not(.js)");
if (!root) return;
const find = (selector) => root.querySelector(selector);
const all = (selector) => [...root.querySelectorAll(selector)];
const data = JSON.parse(find('script[type="application/json"]').textContent);

const unpack = (Type, text) => new Type(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);

const KIND = { content: 0, template: 1, sink: 2, target: 3 };
const tokens = all(".text .tokens span");
const kinds = unpack(Uint8Array, data.kinds);
const views = data.views.map((view) => ({ ...view, values: unpack(Float32Array, view.values) }));
const cuts = data.cuts.map(readCut);

// The part of the text that a token is in: "prompt", "reasoning", "target" or "rest".
const partOf = (token) => data.parts.find(([, start, stop]) => start <= token && token < stop)[0];

// A cut: the piece of each token, tokens that count in parts, and the first and last token of each piece.
function readCut(cut) {
  const owner = unpack(Int32Array, cut.owner);
  const size = owner.reduce((most, piece) => Math.max(most, piece + 1), 0);
  const first = new Int32Array(size).fill(-1), last = new Int32Array(size), inParts = new Set();
  owner.forEach((piece, token) => {
    if (first[piece] < 0) first[piece] = token;
    last[piece] = token;
  });
  cut.parts.forEach(([token]) => inParts.add(token));
  return { ...cut, owner, size, first, last, inParts };
}

// Numbers of tokens added up over the pieces of a cut.
function sums(values, cut) {
  const total = new Float64Array(cut.size);
  cut.owner.forEach((piece, token) => {
    if (!cut.inParts.has(token)) total[piece] += values[token];
  });
  for (const [token, piece, share] of cut.parts) total[piece] += values[token] * share;
  return total;
}

const textOf = (cut, piece) =>
  tokens.slice(cut.first[piece], cut.last[piece] + 1).map((token) => token.textContent).join("");

const oneLineKeeping = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥");
const oneLine = (text) => oneLineKeeping(text.trim());
const short = (text, most = 160) => {
  const line = [...oneLine(text)];
  const head = Math.floor(((most - 3) * 2) / 3);
  return line.length <= most ? line.join("") : line.slice(0, head).join("") + " … " + line.slice(line.length - (most - 3 - head)).join("");
};
const number = (x, signed) => {
  const digits = Math.abs(x) < 1e-4 ? x.toExponential(1) : x.toPrecision(3);
  return (signed && x > 0 ? "+" : "") + (x ? digits.replace(/-/g, "−") : "0");
};
const percent = (x) => (x > 0 && x < 0.0005 ? "< 0.1 %" : (100 * x).toFixed(1).replace("-", "−") + " %");

// The language of drawings, by its name in full.
const SVG = find("svg").namespaceURI;
function drawing(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
