// What one step rests on, or how two differ: needs the graph of the same text.
const pins = { nodes: [], direct: false };
const owners = data.graph ? unpack(Int32Array, data.graph.owner) : null;

function choose(token) {
  if (!data.graph) return;
  const node = owners[token];
  if (node < data.graph.first) return;
  const place = pins.nodes.indexOf(node);
  if (place >= 0) pins.nodes.splice(place, 1);
  else pins.nodes = [...pins.nodes, node].slice(-2);
  draw();
}

const rowOf = (node) => data.graph.rows[node - data.graph.first];

// The shares of a step's sources, each spread evenly over its tokens, so that they add up over any units.
function spread(node) {
  const share = new Float64Array(data.graph.counts.length);
  for (const [source, value] of rowOf(node)[pins.direct ? "direct" : "total"]) share[source] = value;
  return Float32Array.from(owners, (source) => (source < 0 ? 0 : share[source] / data.graph.counts[source]));
}

function focusView() {
  if (!pins.nodes.length) return null;
  const [a, b] = pins.nodes.map(spread), names = pins.nodes.map((node) => rowOf(node).label);
  const how = pins.direct ? "directly" : "by all routes to the prompt";
  if (!b) return { label: "Rests on", note: `what ${names[0]} rests on, ${how}`, signed: false, values: a, mass: "", whole: 1 };
  const note = `what ${names[0]} (orange) rests on more than ${names[1]} (blue), ${how}`;
  return { label: "Difference", note, signed: true, values: a.map((value, i) => value - b[i]), mass: "", whole: 1, sides: [a, b] };
}

function drawFocus() {
  const box = find(".focus");
  if (!data.graph) return;
  for (let i = 0; i < extra.length; i++) {
    extra[i] = extra[i].replace(/ ?\bpin[01]\b/, "");
    const pin = pins.nodes.indexOf(owners[i]);
    if (pin >= 0) extra[i] = `${extra[i]} pin${pin}`.trim();
  }
  for (const edge of all(".flow .edge"))
    edge.classList.toggle("on", pins.nodes.includes(Number(edge.dataset.to)));
  const hint = box.querySelector(".hint");
  hint.hidden = pins.nodes.length > 1;
  for (const old of box.querySelectorAll(".chip, .how")) old.remove();
  pins.nodes.forEach((node, i) => box.append(chip(node, i)));
  if (pins.nodes.length) box.append(howButton());
}

function chip(node, i) {
  const made = element("span", undefined, { class: `chip pin${i}` });
  const close = element("button", "×", { type: "button", "aria-label": "Remove " + rowOf(node).label });
  close.addEventListener("click", () => {
    pins.nodes = pins.nodes.filter((one) => one !== node);
    draw();
  });
  made.append(element("bdi", rowOf(node).label), close);
  return made;
}

function howButton() {
  const button = element("button", pins.direct ? "Directly" : "By all routes", { type: "button", class: "how", title: "Directly, or by all routes to the prompt" });
  button.addEventListener("click", () => {
    pins.direct = !pins.direct;
    draw();
    find(".how").focus();
  });
  return button;
}

function listenToFocus() {
  for (const node of all(".flow .node")) {
    node.addEventListener("click", () => {
      const token = owners.indexOf(Number(node.dataset.node));
      if (token < 0) return;
      choose(token);
      goTo(token, false);
    });
  }
  root.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || !pins.nodes.length) return;
    pins.nodes = [];
    draw();
  });
}
