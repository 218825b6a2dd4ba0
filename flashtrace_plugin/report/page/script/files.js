// Files of what is shown: a table, and drawings of the text for a paper.
const LARGEST = 16000; // pixels of a canvas, beyond which browsers give none

function saveAs(name, blob) {
  const link = element("a", undefined, { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

// A field of CSV. Spreadsheets run what begins like a formula: text from a model gets an apostrophe before it.
function field(value) {
  const text = typeof value === "string" && /^[=+\-@\t\r]/.test(value) ? "'" + value : String(value);
  return /[",\n\r]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
}

function asCsv(shown) {
  const lines = [["unit", "name", "part", "start", "stop", "text", "view", "score", "share", "per token"]];
  for (const row of rowsOf(shown)) {
    const { cut, view } = shown, name = (cut.names && cut.names[row.piece]) || "";
    lines.push([cut.name, name, partOf(row.at), row.at, cut.last[row.piece] + 1, textOf(cut, row.piece).trim(), view.label, row.score, row.share, row.density]);
  }
  return lines.map((line) => line.map(field).join(",")).join("\r\n") + "\r\n";
}

// Where every token is drawn: boxes of colour, and runs of text on one line each.
function layout() {
  const box = find(".text"), origin = box.getBoundingClientRect(), marks = [], runs = [];
  for (const scroller of all(".text .long")) scroller.classList.remove("long"), scroller.classList.add("was-long");
  const from = box.getBoundingClientRect();
  for (const token of tokens) {
    const style = getComputedStyle(token), fill = style.backgroundColor;
    const move = (r) => ({ x: r.left - from.left, y: r.top - from.top, w: r.width, h: r.height });
    if (/^[^(]*\((?!.*, 0\)$)/.test(fill) && / [sm]\d+$/.test(" " + token.className))
      for (const rect of token.getClientRects()) marks.push({ ...move(rect), fill });
    for (const node of token.childNodes) if (node.nodeType === 3) runs.push(...linesOf(node, move, style));
  }
  for (const scroller of all(".text .was-long")) scroller.classList.remove("was-long"), scroller.classList.add("long");
  return { width: Math.ceil(origin.width), height: Math.ceil(from.height), marks, runs };
}

function linesOf(node, move, style) {
  const range = document.createRange(), text = node.data, found = [];
  range.selectNodeContents(node);
  const rects = [...range.getClientRects()].filter((rect) => rect.width);
  if (rects.length === 1) return text.trim() ? [{ ...move(rects[0]), text, ink: style.color }] : [];
  for (let i = 0; i < text.length; i++) {
    range.setStart(node, i);
    range.setEnd(node, i + 1);
    const rect = range.getClientRects()[0], last = found[found.length - 1];
    if (!rect || !rect.width) continue;
    if (last && Math.abs(last.top - rect.top) < 2) last.text += text[i];
    else found.push({ ...move(rect), top: rect.top, text: text[i], ink: style.color });
  }
  return found.filter((run) => run.text.trim());
}

const escaped = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);
const FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace";

function asSvg() {
  const { width, height, marks, runs } = layout(), round = (x) => Math.round(10 * x) / 10;
  const boxes = marks.map((m) => `<rect x="${round(m.x)}" y="${round(m.y)}" width="${round(m.w)}" height="${round(m.h)}" rx="2" fill="${m.fill}"/>`);
  const texts = runs.map((r) => `<text x="${round(r.x)}" y="${round(r.y + 0.78 * r.h)}" textLength="${round(r.w)}" fill="${r.ink}" xml:space="preserve">${escaped(r.text)}</text>`);
  return [
    `<svg xmlns="${SVG}" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" font-family="${FONT}" font-size="14">`,
    `<title>${escaped(find("h1").textContent)}</title>`,
    `<rect width="100%" height="100%" fill="${colour("paper")}"/>`,
    ...boxes,
    ...texts,
    "</svg>\n",
  ].join("\n");
}

function savePng() {
  const { width, height, marks, runs } = layout(), scale = 2;
  if (scale * height > LARGEST) return tell(`The text is ${height} pixels high, more than a picture of ${LARGEST / scale} can hold; save it as SVG`);
  const canvas = element("canvas"), pen = canvas.getContext("2d");
  [canvas.width, canvas.height] = [scale * width, scale * height];
  pen.scale(scale, scale);
  pen.fillStyle = colour("paper");
  pen.fillRect(0, 0, width, height);
  for (const mark of marks) (pen.fillStyle = mark.fill), pen.fillRect(mark.x, mark.y, mark.w, mark.h);
  pen.font = "14px " + FONT;
  for (const run of runs) (pen.fillStyle = run.ink), pen.fillText(run.text, run.x, run.y + 0.78 * run.h, run.w);
  canvas.toBlob((blob) => saveAs("attribution.png", blob), "image/png");
}

const tell = (text) => (find(".more").textContent = text);

function listenToFiles() {
  const make = {
    csv: () => saveAs("attribution.csv", new Blob([asCsv(page.shown)], { type: "text/csv" })),
    svg: () => saveAs("attribution.svg", new Blob([asSvg()], { type: "image/svg+xml" })),
    png: savePng,
  };
  for (const button of all("[data-save]")) button.addEventListener("click", () => make[button.dataset.save]());
  const copy = find("[data-copy]");
  if (!copy) return;
  copy.hidden = false;
  copy.addEventListener("click", () => {
    const code = copy.parentElement.querySelector("pre");
    getSelection().selectAllChildren(code);
    // A page from a file has no clipboard in some browsers; what is selected can be copied there.
    const done = navigator.clipboard ? navigator.clipboard.writeText(code.textContent) : Promise.reject();
    done.then(() => (copy.textContent = "Copied"), () => (copy.textContent = document.execCommand("copy") ? "Copied" : "Selected: press Ctrl+C"));
  });
}
