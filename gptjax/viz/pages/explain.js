"use strict";
{
  const { layers, heads, size, tokens, weights } = JSON.parse(document.getElementById("weights").textContent);
  const bytes = Uint8Array.from(atob(weights), (char) => char.charCodeAt(0));
  const weight = (layer, head, from, to) => bytes[((layer * heads + head) * size + from) * size + to] / 255;
  const squares = document.getElementById("squares"), row = document.getElementById("row");
  let layer = 0, head = 0, chosen = size - 1;

  // The colour of a share lies between the surface and the warm colour, which depend on the theme.
  const rgb = (name) => {
    const probe = document.createElement("span");
    probe.style.color = `var(${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number);
    probe.remove();
    return found;
  };
  function paint() {
    const low = rgb("--surface"), high = rgb("--warm");
    for (const square of squares.querySelectorAll("button")) {
      const context = square.firstChild.getContext("2d"), image = context.createImageData(size, size);
      for (let i = 0; i < size; i++) {
        for (let j = 0; j < size; j++) {
          const share = Math.sqrt(weight(+square.dataset.layer, +square.dataset.head, i, j));
          for (let c = 0; c < 3; c++) {
            image.data[(i * size + j) * 4 + c] = low[c] + (high[c] - low[c]) * share;
          }
          image.data[(i * size + j) * 4 + 3] = 255;
        }
      }
      context.putImageData(image, 0, 0);
    }
  }
  function show(from = chosen) {
    document.getElementById("chosen").textContent = `Layer ${layer}, head ${head}: where ${tokens[from]} (position ${from}) looks`;
    for (const square of squares.querySelectorAll("button")) {
      square.setAttribute("aria-pressed", +square.dataset.layer === layer && +square.dataset.head === head);
    }
    [...row.children].forEach((token, to) => {
      const share = to <= from ? weight(layer, head, from, to) : 0;
      token.style.setProperty("--share", Math.sqrt(share));  // as in the squares
      token.setAttribute("aria-pressed", to === chosen);
      token.lastChild.textContent = to <= from ? (100 * share).toFixed(0) + "%" : "";
    });
  }

  squares.style.gridTemplateColumns = `max-content repeat(${heads}, minmax(40px, ${Math.max(48, Math.min(120, 720 / heads))}px))`;
  const label = (className, text) => {
    const span = document.createElement("span");
    span.className = className;
    span.textContent = text;
    squares.append(span);
  };
  label("name", "head");
  for (let h = 0; h < heads; h++) label("number", h);
  for (let l = 0; l < layers; l++) {
    label("name", `layer ${l}`);
    for (let h = 0; h < heads; h++) {
      const square = document.createElement("button"), canvas = document.createElement("canvas");
      square.className = "head";
      square.setAttribute("aria-label", `Layer ${l}, head ${h}`);
      Object.assign(square.dataset, { layer: l, head: h });
      canvas.width = canvas.height = size;
      square.append(canvas);
      square.addEventListener("click", () => { [layer, head] = [l, h]; show(); });
      squares.append(square);
    }
  }
  tokens.forEach((text, i) => {
    const token = document.createElement("button"), share = document.createElement("small");
    token.className = "token";
    token.append(text, share);
    token.addEventListener("click", () => { chosen = i; show(); });
    token.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show(i));
    token.addEventListener("pointerleave", () => show());
    row.append(token);
  });
  if (matchMedia("(max-width: 900px)").matches) document.querySelector("nav details").open = false;
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
  paint();
  show();
}
