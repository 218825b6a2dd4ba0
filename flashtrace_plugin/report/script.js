// Comfort only: exact numbers under the pointer, and arrow keys to step through the tokens of a text.
(() => {
  const root = document.currentScript && document.currentScript.closest(".ft");
  if (!root) return;
  const data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
  const tip = root.querySelector(".tip");
  const tokens = [...root.querySelectorAll(".tokens span:not(.part)")];
  const position = new Map(tokens.map((token, i) => [token, i]));
  tokens.forEach((token) => token.removeAttribute("title"));
  let at = null;

  const number = (x, signed) => (signed && x > 0 ? "+" : "") + String(Number(x.toPrecision(4))).replace("-", "−");
  const percent = (x, whole) => (whole > 0 ? ((100 * x) / whole).toFixed(1) + " %" : "");
  const current = () => {
    const keys = [...root.querySelectorAll('input[name$="-view"]')];
    return Math.max(0, keys.findIndex((key) => key.checked));
  };

  function show(element, title, rows) {
    const head = document.createElement("b");
    head.textContent = title;
    const table = document.createElement("table");
    for (const cells of rows) {
      const row = table.insertRow();
      for (const cell of cells) row.insertCell().textContent = cell;
    }
    tip.replaceChildren(head, table);
    tip.hidden = false;
    const box = element.getClientRects()[0] || element.getBoundingClientRect();
    const left = Math.min(box.left, innerWidth - tip.offsetWidth - 8);
    const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
    tip.style.left = Math.max(8, left) + "px";
    tip.style.top = (below ? box.bottom + 6 : box.top - 6 - tip.offsetHeight) + "px";
  }

  function showToken(token) {
    const i = position.get(token), chosen = current(), many = data.views.length > 9;
    const rows = data.views
      .map(([label, whole, values, signed], v) => [v, label, values[i], whole, signed])
      .filter(([v, , x]) => x !== undefined && (!many || v === chosen || v < 2))
      .map(([v, label, x, whole, signed]) => [(v === chosen ? "▸ " : "") + label, number(x, signed), percent(Math.abs(x), whole)]);
    show(token, JSON.stringify(token.textContent) + " · position " + i, rows);
  }

  function showHead(cell) {
    const hop = cell.closest("table").dataset.hop, row = cell.parentElement;
    const layer = row.sectionRowIndex, head = cell.cellIndex - 1;
    const width = row.querySelectorAll("td:empty").length;
    show(cell, "L" + layer + "H" + head, [["share of the layer", percent(data.heads[hop][layer * width + head], 1)]]);
  }

  function point(event) {
    const token = event.target.closest(".tokens span:not(.part)");
    if (token) return showToken(token);
    const cell = event.target.closest(".map td:empty");
    if (cell) return showHead(cell);
    tip.hidden = true;
  }

  function leave() {
    tip.hidden = true;
    if (at) at.classList.remove("at");
    at = null;
  }

  function step(event) {
    if (event.key === "Escape") return leave();
    const own = [...event.currentTarget.querySelectorAll("span:not(.part)")];
    const i = own.indexOf(at), last = own.length - 1;
    const next = { ArrowRight: Math.min(i + 1, last), ArrowLeft: Math.max(i - 1, 0), Home: 0, End: last }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    leave();
    at = own[next];
    at.classList.add("at");
    at.scrollIntoView({ block: "nearest" });
    showToken(at);
  }

  root.addEventListener("pointerover", point);
  root.addEventListener("pointerleave", () => (tip.hidden = true));
  addEventListener("scroll", () => { if (!at) tip.hidden = true; }, { passive: true });
  for (const text of root.querySelectorAll(".tokens")) {
    text.setAttribute("aria-description", "Arrow keys step through the tokens");
    text.addEventListener("keydown", step);
    text.addEventListener("blur", leave);
  }
})();
