// The table of the strongest units in the chosen view; it follows view, unit, part and order.
const PAGE = 20;
const order = { by: "score", up: false, rows: PAGE };
const COLUMNS = [
  ["#", null], ["Text", null], ["Part", null], ["At", "at"], ["First", "first"], ["Second", "second"], ["Sign", null],
  ["Score", "score"], ["Share", "share"], ["Per token", "density"],
];

const LESS = ["#", "Sign", "Score", "Per token"]; // what a narrow screen leaves out

function rowsOf(shown) {
  const part = find("[data-part]").value, { cut, view } = shown;
  const rows = [];
  for (let piece = 0; piece < cut.size; piece++) {
    const at = cut.first[piece], score = shown.sums[piece];
    if (!shown.visible[piece] || !score || (part && partOf(at) !== part)) continue;
    const sides = shown.sides ? { first: shown.sides[0][piece], second: shown.sides[1][piece] } : {};
    rows.push({ piece, at, score, share: shown.whole ? score / shown.whole : 0, density: score / shown.counts[piece], ...sides });
  }
  const key = order.by === "at" ? (row) => -row.at : (row) => (view.signed ? Math.abs(row[order.by]) : row[order.by]);
  return rows.sort((a, b) => (order.up ? key(a) - key(b) : key(b) - key(a)));
}

function drawTable(shown) {
  const rows = rowsOf(shown), perToken = shown.cut.name !== "token", signs = data.signs !== null && data.signs !== undefined;
  const hidden = { Sign: !signs || pins.nodes.length, "Per token": !perToken || shown.sides, Part: find("[data-part]").value !== "" };
  hidden.First = hidden.Second = !shown.sides;
  hidden.Score = shown.sides;
  const columns = COLUMNS.filter(([name]) => !hidden[name]);
  const table = find(".top"), head = element("tr");
  for (const [name, by] of columns) head.append(headCell(name, by, shown));
  table.tHead.replaceChildren(head);
  const most = Math.max(...rows.map((row) => Math.abs(row.score)), 0);
  const marks = signs ? sums(views[data.signs].values, shown.cut) : null;
  const made = rows.slice(0, order.rows).map((row, i) => tableRow(row, i, shown, columns, most, marks));
  const none = element("tr");
  none.append(element("td", "Nothing here has a score.", { colspan: columns.length }));
  table.tBodies[0].replaceChildren(...(made.length ? made : [none]));
  drawMore(rows, shown);
  for (const hint of all(".signs")) hint.hidden = hidden.Sign;
}

function headCell(name, by, shown) {
  const cell = element("th", by ? undefined : name, { scope: "col" });
  if (name !== "Text" && name !== "Part") cell.className = LESS.includes(name) ? "num less" : "num";
  if (by) {
    const label = name === "Share" && shown.view.signed && shown.sides ? "Difference" : name;
    const button = element("button", label, { type: "button" });
    button.addEventListener("click", () => {
      order.up = order.by === by && !order.up;
      order.by = by;
      drawTable(shown);
      [...find(".top").tHead.querySelectorAll("button")].find((one) => one.textContent.startsWith(label)).focus();
    });
    if (order.by === by) cell.setAttribute("aria-sort", order.up !== (by === "at") ? "ascending" : "descending");
    if (order.by === by) button.append(order.up !== (by === "at") ? " ▴" : " ▾");
    cell.append(button);
  }
  return cell;
}

function tableRow(row, i, shown, columns, most, marks) {
  const cells = {
    "#": element("td", i + 1, { class: "num less" }),
    Text: whereCell(row, shown, most),
    Part: element("td", { target: "answer", rest: "other" }[partOf(row.at)] || partOf(row.at)),
    At: element("td", row.at, { class: "num" }),
    First: element("td", percent(row.first), { class: "num" }),
    Second: element("td", percent(row.second), { class: "num" }),
    Sign: element("td", marks && marks[row.piece] ? (marks[row.piece] > 0 ? "+" : "−") : "", { class: "num less" }),
    Score: element("td", number(row.score, shown.view.signed), { class: "num less" }),
    Share: element("td", percent(row.share), { class: "num" }),
    "Per token": element("td", number(row.density, shown.view.signed), { class: "num less" }),
  };
  const made = element("tr");
  made.append(...columns.map(([name]) => cells[name]));
  return made;
}

function whereCell(row, shown, most) {
  const { cut } = shown, cell = element("td", undefined, { class: "where" }), link = element("a", undefined, { href: "#" });
  const name = cut.names && cut.names[row.piece];
  if (name) cell.append(element("span", name + ": ", { class: "around" }));
  if (cut.name === "token") link.append(...inContext(row.at));
  else link.append(element("bdi", short(textOf(cut, row.piece)) || "␣"));
  link.addEventListener("click", (event) => {
    event.preventDefault();
    goTo(row.at, true);
  });
  const bar = drawing("svg", { class: row.score < 0 ? "bar minus" : "bar", "aria-hidden": "true" });
  bar.append(drawing("rect", { width: (100 * Math.abs(row.score)) / most + "%", height: "100%" }));
  cell.append(link, bar);
  return cell;
}

// A token between its neighbours.
function inContext(at) {
  const say = (from, to) => tokens.slice(Math.max(0, from), to).map((token) => token.textContent).join("");
  const own = tokens[at].textContent;
  return [
    element("bdi", oneLineKeeping(say(at - 4, at)), { class: "around" }),
    element("b", own.trim() ? oneLineKeeping(own) : "␣".repeat(own.length) || "⟨no text⟩"),
    element("bdi", oneLineKeeping(say(at + 1, at + 5)), { class: "around" }),
  ];
}

function drawMore(rows, shown) {
  const more = find(".more"), listed = rows.slice(0, order.rows);
  const together = listed.reduce((sum, row) => sum + Math.abs(row.share), 0);
  const sum = shown.view.signed ? "" : `, together ${percent(together)}`;
  more.textContent = rows.length ? `${listed.length} of ${rows.length}${sum}. ` : "";
  if (rows.length <= order.rows) return;
  const button = element("button", "Show more", { type: "button" });
  button.addEventListener("click", () => {
    order.rows += 5 * PAGE;
    drawTable(shown);
  });
  more.append(button);
}
