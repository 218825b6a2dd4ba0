// From numbers to shades: the strongest colour begins at a percentile, and the shape tells small scores apart.
const SHAPES = { linear: (x) => x, root: Math.sqrt, log: (x) => Math.log1p(999 * x) / Math.log(1000) };

function percentile(magnitudes, at) {
  const found = Float64Array.from(magnitudes.filter((x) => x > 0)).sort();
  if (!found.length) return 0;
  const place = (at / 100) * (found.length - 1), low = Math.floor(place);
  return found[low] + (found[Math.min(low + 1, found.length - 1)] - found[low]) * (place - low);
}

// Steps of the colour scale for magnitudes; 0 below the cut-off.
function levels(magnitudes, top, shape, cutoff) {
  return Uint8Array.from(magnitudes, (x) => {
    if (!(x > 0 && top > 0)) return 0;
    const step = Math.min(data.levels, Math.round(data.levels * SHAPES[shape](Math.min(1, x / top))));
    return step < cutoff ? 0 : step;
  });
}

// How many pieces have each shade, as bars whose height is logarithmic.
function drawHistogram(magnitudes, state, top) {
  const counts = new Array(data.levels + 1).fill(0);
  levels(magnitudes, top, state.scale, 0).forEach((step) => step && counts[step]++);
  const most = Math.log1p(Math.max(1, ...counts));
  const bars = counts.map((count, step) => {
    const height = (24 * Math.log1p(count)) / most;
    const bar = drawing("rect", { x: step + 0.1, y: 24 - height, width: 0.8, height });
    if (step < state.cutoff) bar.setAttribute("class", "off");
    return bar;
  });
  find(".histogram").replaceChildren(...bars);
}

function drawRamp(signed) {
  const canvas = find(".ramp"), pen = canvas.getContext("2d"), steps = data.levels;
  for (let x = 0; x < canvas.width; x++) {
    const at = Math.round((signed ? (2 * x) / canvas.width - 1 : x / canvas.width) * steps);
    pen.fillStyle = colour((at < 0 ? "m" : "s") + Math.abs(at));
    pen.fillRect(x, 0, 1, canvas.height);
  }
}

const colour = (name) => getComputedStyle(root).getPropertyValue("--" + name).trim();
