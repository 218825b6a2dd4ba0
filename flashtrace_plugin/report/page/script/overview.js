// The whole text at a glance, the way to its strong units, and search.
const STRONG = 20;

function strongPieces(shown) {
  const pieces = [...Array(shown.cut.size).keys()].filter((piece) => shown.steps[piece]);
  return pieces.sort((a, b) => Math.abs(shown.sums[b]) - Math.abs(shown.sums[a])).slice(0, STRONG).sort((a, b) => a - b);
}

function jump(direction) {
  const { cut } = page.shown, strong = strongPieces(page.shown);
  if (!strong.length) return;
  const place = at.piece < 0 ? (direction > 0 ? -1 : cut.size) : at.piece;
  const ahead = direction > 0 ? strong.find((piece) => piece > place) : strong.filter((piece) => piece < place).pop();
  goTo(cut.first[ahead === undefined ? (direction > 0 ? strong[0] : strong[strong.length - 1]) : ahead], true);
}

function drawMap(shown) {
  const canvas = find(".map"), width = Math.max(1, canvas.clientWidth), height = 34;
  canvas.width = width * devicePixelRatio;
  canvas.height = height * devicePixelRatio;
  const pen = canvas.getContext("2d"), n = tokens.length;
  pen.scale(devicePixelRatio, devicePixelRatio);
  const best = new Uint8Array(width), minus = new Uint8Array(width);
  for (let i = 0; i < n; i++) {
    const piece = shown.cut.owner[i], step = shown.steps[piece];
    const to = Math.max(Math.floor((i * width) / n) + 1, Math.floor(((i + 1) * width) / n));
    for (let x = Math.floor((i * width) / n); step && x < to; x++)
      if (step > best[x]) [best[x], minus[x]] = [step, shown.sums[piece] < 0];
  }
  for (let x = 0; x < width; x++) {
    if (!best[x]) continue;
    const tall = ((height - 5) * best[x]) / data.levels;
    pen.fillStyle = colour((minus[x] ? "m" : "s") + Math.max(12, best[x]));
    pen.fillRect(x, height - 5 - tall, 1, tall);
  }
  for (const [part, start, stop] of data.parts) {
    pen.fillStyle = colour(part);
    pen.fillRect((start * width) / n, height - 4, Math.max(1, ((stop - start) * width) / n), 4);
  }
}

function search(text) {
  for (let i = 0; i < extra.length; i++) extra[i] = extra[i].replace(/ ?\bhit\b/, "");
  const said = find(".found"), hits = text.trim() ? occurrences(text) : [];
  const { view } = page.shown;
  let mass = 0, first = -1;
  const seen = new Set();
  for (const [start, stop] of hits)
    for (let i = start; i < stop; i++) {
      extra[i] = (extra[i] + " hit").trim();
      if (first < 0) first = i;
      if (!seen.has(i) && visibleKind(kinds[i])) mass += Math.abs(view.values[i]);
      seen.add(i);
    }
  const whole = wholeOf(view);
  said.textContent = text.trim() ? `${hits.length} found${hits.length && whole ? `, ${percent(mass / whole)} of the mass` : ""}` : "";
  paint(page.shown);
  if (first >= 0) tokens[first].scrollIntoView({ block: "center" });
}

// Ranges of tokens over which a text occurs, whatever the case.
function occurrences(text) {
  const ends = [];
  let whole = "";
  for (const token of tokens) ends.push((whole += token.textContent.toLowerCase()).length);
  const found = [], wanted = text.toLowerCase();
  let token = 0;
  for (let from = whole.indexOf(wanted); from >= 0; from = whole.indexOf(wanted, from + wanted.length)) {
    while (ends[token] <= from) token++;
    let stop = token;
    while (ends[stop] < from + wanted.length) stop++;
    found.push([token, stop + 1]);
  }
  return found;
}

function listenToOverview() {
  const map = find(".map");
  map.addEventListener("click", (event) => {
    const box = map.getBoundingClientRect();
    goTo(Math.min(tokens.length - 1, Math.max(0, Math.floor(((event.clientX - box.left) / box.width) * tokens.length))), true);
  });
  for (const button of all("[data-jump]")) button.addEventListener("click", () => jump(Number(button.dataset.jump)));
  const input = find(".bar-top input");
  let waiting = 0;
  input.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => search(input.value), 150);
  });
  addEventListener("resize", () => drawMap(page.shown));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
}
