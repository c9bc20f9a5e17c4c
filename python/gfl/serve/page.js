// SPDX-License-Identifier: Apache-2.0
// A photo dropped on the page is sent to /detect; a click on a box shows its four distributions.
"use strict";
const element = (id) => document.getElementById(id);
const canvas = element("picture"), says = element("says"), sides = element("sides");
let photo = null, bitmap = null, found = [], chosen = -1;

const color = (label) => `hsl(${(7 + label * 222.49) % 360} 80% 45%)`;

function draw() {
  const pen = canvas.getContext("2d");
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  pen.drawImage(bitmap, 0, 0);
  const unit = Math.max(1, Math.min(bitmap.width, bitmap.height) / 300);
  pen.font = `${Math.round(10 * unit)}px sans-serif`;
  pen.textBaseline = "top";
  [...found.keys()].reverse().forEach((i) => {
    const { box: [x1, y1, x2, y2], label, name, score } = found[i];
    pen.strokeStyle = pen.fillStyle = color(label);
    pen.lineWidth = (i === chosen ? 4 : 2) * unit;
    pen.strokeRect(x1, y1, x2 - x1, y2 - y1);
    const text = `${name} ${score.toFixed(2)}`, top = Math.max(0, y1 - 13 * unit);
    pen.fillRect(x1, top, pen.measureText(text).width + 6 * unit, 13 * unit);
    pen.fillStyle = "#fff";
    pen.fillText(text, x1 + 3 * unit, top + unit);
  });
}

function shape(kind, parent, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text) node.textContent = text;
  parent.appendChild(node);
  return node;
}

function distributions() {
  sides.replaceChildren();
  if (chosen < 0) return;
  const { edges, box, name } = found[chosen];
  const title = document.createElement("b");
  title.textContent = name;
  sides.appendChild(title);
  ["left", "top", "right", "bottom"].forEach((side, s) => {
    const bins = edges.probabilities[s], step = edges.bins[s % 2], peak = Math.max(...bins);
    const mean = bins.reduce((sum, p, k) => sum + p * k, 0);
    const spread = Math.sqrt(bins.reduce((sum, p, k) => sum + p * (k - mean) ** 2, 0));
    const svg = shape("svg", sides, { width: 240, height: 70, class: "side" });
    shape("text", svg, { x: 0, y: 11, "font-size": 12 }, `${side} ${box[s].toFixed(1)} ± ${(spread * step).toFixed(1)} px`);
    bins.forEach((p, k) => shape("rect", svg, {
      x: (k * 240) / bins.length + 1, y: 68 - (50 * p) / peak, width: 240 / bins.length - 2, height: (50 * p) / peak,
      fill: color(found[chosen].label),
    }));
  });
}

async function detect() {
  if (!photo) return;
  says.textContent = "detecting …";
  const form = new FormData();
  form.append("image", photo);
  form.append("score_threshold", element("score").value);
  form.append("edges", "1");
  try {
    const answer = await fetch("detect", { method: "POST", body: form });
    const result = await answer.json();
    if (!answer.ok) throw new Error(result.error);
    bitmap = await createImageBitmap(photo, { imageOrientation: "from-image" });
    found = result.detections;
    chosen = found.length ? 0 : -1;
    draw();
    distributions();
    const { read, network, postprocess } = result.milliseconds;
    const total = Math.round(read + network + postprocess);
    says.textContent = `${found.length} objects in ${result.width}×${result.height} pixels, ${total} ms`;
  } catch (error) {
    says.textContent = `not detected: ${error.message}`;
  }
}

canvas.addEventListener("click", (event) => {
  const place = canvas.getBoundingClientRect();
  const x = ((event.clientX - place.left) * canvas.width) / place.width;
  const y = ((event.clientY - place.top) * canvas.height) / place.height;
  const inside = found.map(({ box: [x1, y1, x2, y2] }, i) => [(x2 - x1) * (y2 - y1), i, x >= x1 && x <= x2 && y >= y1 && y <= y2])
    .filter((one) => one[2]).sort((a, b) => a[0] - b[0]);
  if (!inside.length) return;
  chosen = inside[0][1];
  draw();
  distributions();
});
const take = (files) => { if (files.length) { photo = files[0]; detect(); } };
element("file").addEventListener("change", (event) => take(event.target.files));
element("score").addEventListener("change", detect);
const drop = element("drop");
document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
document.addEventListener("dragleave", () => drop.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files);
});
