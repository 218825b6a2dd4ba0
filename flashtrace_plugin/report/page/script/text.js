// Shading of the text, numbers under the pointer, and stepping through its units by keyboard.
const base = tokens.map((token) => token.className.split(" ").filter((name) => !/^[sm]\d+$/.test(name)).join(" "));
const extra = tokens.map(() => "");
const drawn = tokens.map((token) => token.className);
const at = { piece: -1 };

function paint(shown) {
  shade(tokens, drawn, shown);
  if (twin) shade(twin.tokens, twin.drawn, shown.twin || shown);
}

function shade(tokens, drawn, shown) {
  const { cut, steps } = shown;
  for (let i = 0; i < tokens.length; i++) {
    const piece = cut.owner[i], step = steps[piece];
    let name = base[i];
    if (extra[i]) name += " " + extra[i];
    if (step) name += " " + (shown.sums[piece] < 0 ? "m" : "s") + step;
    name = name.trim();
    if (name !== drawn[i]) tokens[i].className = drawn[i] = name;
  }
}

// The second of two attributions: a copy of the text beside the first.
const twin = data.sides ? makeTwin() : null;
function makeTwin() {
  const text = find(".text"), box = text.cloneNode(true), copies = [...box.querySelectorAll(".tokens span")];
  for (const one of box.querySelectorAll("[id]")) one.removeAttribute("id");
  [text, box].forEach((one, i) => {
    for (const part of one.querySelectorAll("[aria-label]")) part.setAttribute("aria-label", `${part.ariaLabel}, ${data.sides[i]}`);
    one.prepend(element("h3", data.sides[i], { class: "side" }));
  });
  text.after(box);
  return { box, tokens: copies, drawn: copies.map((token) => token.className) };
}

const piecesTokens = (cut, piece) => {
  const found = [];
  for (let i = cut.first[piece]; i <= cut.last[piece]; i++) if (cut.owner[i] === piece) found.push(tokens[i]);
  return found;
};

function outline(piece) {
  for (const token of all(".tokens span.at")) token.classList.remove("at");
  at.piece = piece;
  if (piece >= 0) for (const token of piecesTokens(page.shown.cut, piece)) token.classList.add("at");
}

// Scrolls to a token; from a link also moves the keyboard's place there.
function goTo(token, focus) {
  const box = tokens[token].closest(".tokens");
  if (focus) box.focus({ preventScroll: true });
  outline(page.shown.cut.owner[token]);
  tokens[token].scrollIntoView({ block: "center" });
  say(page.shown.cut.owner[token]);
}

function say(piece) {
  const { cut } = page.shown;
  find("[role=status].sr").textContent = `${short(textOf(cut, piece), 120) || "white space"}: ${numbersOf(piece)[0].slice(1).join(", ")}`;
}

// Rows of numbers for a piece: the chosen view first, then the others.
function numbersOf(piece) {
  const { cut, view } = page.shown, many = views.length > 9;
  if (data.sides) return views.map((one, i) => [i < 2 ? data.sides[i] : "Difference", percent(sums(one.values, cut)[piece])]);
  const rows = [[view, page.shown.sums[piece], page.shown.whole]];
  for (const other of views)
    if (other !== view && !many) rows.push([other, sums(other.values, cut)[piece], wholeOf(other)]);
  return rows.map(([one, value, whole]) => [one.label, number(value, one.signed), whole ? percent(value / whole) : ""]);
}

function showTip(box, title, rows) {
  const tip = find(".tip"), table = element("table");
  for (const cells of rows) {
    const row = table.insertRow();
    for (const cell of cells) row.insertCell().textContent = cell;
  }
  tip.replaceChildren(element("b", title), table);
  tip.hidden = false;
  const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = Math.max(8, left) + "px";
  tip.style.top = (below ? box.bottom + 6 : Math.max(8, box.top - 6 - tip.offsetHeight)) + "px";
}
const hideTip = () => (find(".tip").hidden = true);

function tipOf(token) {
  const i = position.get(token), { cut } = page.shown, piece = cut.owner[i];
  const where = ["", "template", "sink", ""][kinds[i]];
  const title = cut.name === "token" ? JSON.stringify(token.textContent) : short(textOf(cut, piece), 90);
  const places = cut.first[piece] === cut.last[piece] ? `at ${i}` : `at ${cut.first[piece]} to ${cut.last[piece]}`;
  showTip(token.getClientRects()[0] || token.getBoundingClientRect(), title, [[where || partOf(i), places, ""], ...numbersOf(piece)]);
}

const position = new Map(tokens.map((token, i) => [token, i]));
if (twin) twin.tokens.forEach((token, i) => position.set(token, i));
const tokenAt = (event) => {
  const found = event.target.closest && event.target.closest(".text .tokens span");
  return found && position.has(found) ? found : null;
};

function stepBy(event) {
  if (event.key === "Escape") return leave();
  const { cut, visible } = page.shown, inside = (piece) => event.currentTarget.contains(tokens[cut.first[piece]]);
  const pieces = [...Array(cut.size).keys()].filter((piece) => visible[piece] && inside(piece));
  const place = pieces.indexOf(at.piece), last = pieces.length - 1;
  if (event.key === "Enter" && place >= 0) return choose(cut.first[at.piece]);
  if (event.key === "n" || event.key === "p") return jump(event.key === "n" ? 1 : -1);
  const next = { ArrowRight: Math.min(place + 1, last), ArrowLeft: Math.max(place - 1, 0), Home: 0, End: last }[event.key];
  if (next === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  outline(pieces[next]);
  const token = tokens[cut.first[pieces[next]]];
  token.scrollIntoView({ block: "nearest" });
  tipOf(token);
  say(pieces[next]);
}

function leave() {
  hideTip();
  outline(-1);
}

function headTip(cell) {
  const hop = cell.closest("table").dataset.hop, row = cell.parentElement;
  const layer = row.sectionRowIndex, head = cell.cellIndex - 1;
  const shares = unpack(Float32Array, data.heads[hop]);
  showTip(cell.getBoundingClientRect(), "L" + layer + "H" + head, [["share", percent(shares[layer * data.rows + head])]]);
}

function listenToText() {
  root.addEventListener("pointerover", (event) => {
    const token = tokenAt(event), cell = event.target.closest && event.target.closest(".heads td:empty");
    if (token) tipOf(token);
    else if (cell && data.heads) headTip(cell);
    else hideTip();
  });
  root.addEventListener("pointerleave", hideTip);
  addEventListener("scroll", () => at.piece < 0 && hideTip(), { passive: true });
  for (const box of all(".text .tokens")) {
    box.setAttribute("aria-description", "Arrow keys step through the units, n and p through the strongest, Enter chooses a step");
    if (data.graph) box.classList.add("steps");
    box.addEventListener("keydown", stepBy);
    box.addEventListener("blur", leave);
    box.addEventListener("click", (event) => {
      const token = tokenAt(event);
      if (!token) return;
      tipOf(token); // for fingers, which do not hover
      if (!getSelection().toString()) choose(position.get(token));
    });
  }
}
