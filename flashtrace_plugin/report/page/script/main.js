// What is chosen, and drawing all of it again when that changes.
const page = { view: 0, cut: data.cut, scale: "root", clip: data.clip, cutoff: 0, show: { target: false, template: false, sink: false }, shown: null };

const visibleKind = (kind) => kind === KIND.content || (kind === KIND.target ? page.show.target : kind === KIND.sink ? page.show.sink : page.show.template);

// What shares refer to: the mass on contents, for a view of sources on those of the prompt.
function wholeOf(view) {
  if (view.whole) return view.whole;
  if (view.total === undefined) {
    view.total = 0;
    const stop = view.sources ? data.parts[0][2] : tokens.length;
    for (let i = 0; i < stop; i++) if (kinds[i] === KIND.content) view.total += Math.abs(view.values[i]);
  }
  return view.total;
}

function compute() {
  const view = focusView() || views[page.view], cut = cuts[page.cut], total = sums(view.values, cut);
  const visible = Array.from(cut.first, (token) => visibleKind(kinds[token]));
  const magnitudes = total.map((value, piece) => (visible[piece] ? Math.abs(value) : 0));
  cut.counts ||= sums(new Float32Array(tokens.length).fill(1), cut);
  const shown = { view, cut, sums: total, visible, magnitudes, counts: cut.counts, whole: data.sides ? 1 : wholeOf(view) };
  shown.sides = sidesOf(view, cut);
  const other = data.sides && !view.signed ? shown.sides[1].map((value, piece) => (visible[piece] ? value : 0)) : [];
  shown.top = Math.max(percentile(magnitudes, page.clip), percentile(other, page.clip));
  shown.steps = levels(magnitudes, shown.top, page.scale, page.cutoff);
  if (other.length) shown.twin = { cut, sums: other, steps: levels(other, shown.top, page.scale, page.cutoff) };
  return shown;
}

// Both sides of a comparison, as shares of each one's mass.
function sidesOf(view, cut) {
  const sides = data.sides ? [views[0].values, views[1].values] : view.sides;
  return sides && sides.map((values) => sums(values, cut));
}

function draw() {
  drawFocus();
  page.shown = compute();
  if (twin) {
    twin.box.hidden = page.shown.view.signed;
    find(".columns").classList.toggle("split", !twin.box.hidden);
  }
  paint(page.shown);
  drawLegend(page.shown);
  drawHistogram(page.shown.magnitudes, page, page.shown.top);
  drawMap(page.shown);
  drawTable(page.shown);
}

function drawLegend({ view, cut, top, magnitudes }) {
  drawRamp(view.signed);
  const clipped = magnitudes.reduce((count, x) => count + (x > top), 0);
  const range = view.signed ? `−${number(top)} (blue) to ${number(top)} (orange)` : `0 to ${number(top)}`;
  const more = clipped ? `, ${clipped} above it with the strongest colour` : "";
  find(".legend span").textContent = `${range} by ${cut.name}${more}: ${view.note}.`;
  const mass = find(".mass");
  mass.hidden = !view.mass;
  mass.querySelector("span").textContent = `${view.mass}.`;
}

function listen() {
  const numbers = { view: Number, cut: Number, scale: String };
  for (const input of all('.controls input[type="radio"]'))
    input.addEventListener("change", () => {
      const name = input.name.split("-").pop();
      page[name] = numbers[name](input.value);
      if (name === "view") pins.nodes = [];
      if (name === "cut") leave();
      draw();
    });
  for (const input of all("[data-show]"))
    input.addEventListener("change", () => {
      page.show[input.dataset.show] = input.checked;
      draw();
    });
  const [top, slider] = [find(".cutoff select"), find(".cutoff input")];
  top.addEventListener("change", () => ((page.clip = Number(top.value)), draw()));
  slider.addEventListener("input", () => {
    page.cutoff = Number(slider.value);
    find(".cutoff output").textContent = slider.value;
    draw();
  });
  find("[data-part]").addEventListener("change", () => drawTable(page.shown));
  for (const link of all("[data-at]"))
    link.addEventListener("click", (event) => {
      event.preventDefault();
      goTo(Number(link.dataset.at), true);
    });
}

root.classList.add("js");
for (const part of all(".controls, .bar-top, .tools")) part.hidden = false;
listen();
listenToText();
listenToOverview();
listenToFocus();
listenToFiles();
draw();
