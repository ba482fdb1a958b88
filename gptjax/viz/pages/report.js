"use strict";
{
  const find = (id) => document.getElementById(id);
  let data = JSON.parse(find("data").textContent);
  const state = { x: "step", scale: "linear", unit: "nats", range: "late", smooth: null, sample: null };
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const dash = (i) => ["solid", "dash", "dashdot"][Math.floor(i / 8) % 3];
  const color = (i) => style(`--run${i % 8}`);
  const number = (value, digits = 4) => value == null ? "" : value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const whole = (value) => value == null ? "" : value.toLocaleString("en", { maximumFractionDigits: 0 });
  function short(value) {
    if (value == null) return "-";
    for (const [size, letter] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (value >= 0.9995 * size) return (value / size).toPrecision(3) + letter;
    }
    return String(Math.round(value));
  }
  function duration(seconds) {
    if (seconds == null) return "";
    if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
    const whole = Math.round(seconds);
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)}:${String(whole % 60).padStart(2, "0")} min`;
    return `${(seconds / 3600).toFixed(1)} h`;
  }
  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text != null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }
  // A mean in which each value before counts `weight` times as much as the next, without the pull
  // towards zero at the start.
  function smoothed(values, weight) {
    let sum = 0, total = 0;
    return values.map((value) => {
      if (value == null) return null;
      sum = weight * sum + (1 - weight) * value;
      total = weight * total + (1 - weight);
      return sum / total;
    });
  }

  // By default over about a fortieth of the points.
  const smoothing = (run) => state.smooth ?? Math.min(0.99, Math.max(0, 1 - 40 / run.rows.step.length));

  const most = (values) => values.reduce((a, b) => b == null ? a : Math.max(a, b), 0);
  const least = (values) => values.reduce((a, b) => b == null ? a : Math.min(a, b), Infinity);
  function timeUnit() {
    const longest = most(data.runs.map((run) => most(run.rows.seconds)));
    return longest > 3 * 3600 ? ["hours", 3600] : longest > 180 ? ["minutes", 60] : ["seconds", 1];
  }
  function xs(run) {
    if (state.x === "tokens") return run.rows.step.map((step) => step * run.tokens_per_step);
    if (state.x === "time") return run.rows.seconds.map((s) => s == null ? null : s / timeUnit()[1]);
    return run.rows.step;
  }
  const xTitle = () => ({ step: "step", tokens: "tokens", time: `${timeUnit()[0]} of training` })[state.x];
  const inUnit = (run, value) => value == null ? null : state.unit === "bits" ? value / Math.LN2 / run.bytes_per_token : value;

  const unitName = () => state.unit === "bits" ? "bits per byte" : "nats per token";

  function layout(more) {
    const axis = { gridcolor: style("--line"), zeroline: false, linecolor: style("--line"), tickcolor: style("--line"), automargin: true };
    const { xaxis, yaxis, ...rest } = more;
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 48, r: 8, t: 8, b: 40 },
      font: { family: "system-ui, sans-serif", size: 13, color: style("--muted") }, hovermode: "x unified", uirevision: `${state.x} ${state.scale} ${state.unit} ${state.range}`,
      hoverlabel: { bgcolor: style("--surface"), bordercolor: style("--line"), font: { color: style("--ink") } },
      xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
    };
  }
  const config = { displayModeBar: false, responsive: true };
  const react = (id, traces, more) => Plotly.react(id, traces, layout(more), config);

  function drawLoss() {
    const alone = data.runs.length === 1, traces = [], late = [], shapes = [], annotations = [];
    const drawn = data.runs.filter((run) => state.unit === "nats" || run.bytes_per_token);
    data.runs.forEach((run, i) => {
      if (!drawn.includes(run)) return;
      const x = xs(run), valColor = alone ? color(1) : color(i);
      const train = run.rows.train_loss.map((v) => inUnit(run, v)), smooth = smoothed(train, smoothing(run));
      const val = run.rows.val_loss.map((v) => inUnit(run, v));
      const from = 0.03 * most(x);
      x.forEach((at, j) => { if (at >= from) late.push(smooth[j], val[j]); });
      const line = { x, mode: "lines", connectgaps: true };
      traces.push({ ...line, ...(alone ? {} : { legendgroup: run.name }), y: train, opacity: 0.3, line: { color: color(i), width: 1 }, hoverinfo: "skip", showlegend: false });
      const group = alone ? {} : { legendgroup: run.name };
      traces.push({ ...line, ...group, y: smooth, line: { color: color(i), width: alone ? 2 : 1.5, dash: dash(i) }, name: alone ? "training" : run.name, hovertemplate: "%{y:.4f}" });
      const at = val.map((v, j) => v == null ? -1 : j).filter((j) => j >= 0);
      traces.push({ x: at.map((j) => x[j]), y: at.map((j) => val[j]), mode: "lines+markers", line: { color: valColor, width: 2, dash: alone ? "solid" : "dot" }, marker: { size: 6 }, ...group, showlegend: alone, name: alone ? "validation" : `${run.name}, validation`, hovertemplate: "%{y:.4f}" });
      if (run.best) {
        const j = run.rows.step.findIndex((step, k) => step === run.best.step && run.rows.val_loss[k] != null);
        if (j >= 0) traces.push({ x: [x[j]], y: [val[j]], mode: "markers", marker: { symbol: "star", size: 14, color: valColor, line: { color: style("--surface"), width: 1 } }, ...group, showlegend: alone, name: `best ${number(val[j])}`, hoverinfo: "skip" });
      }
      run.starts.filter((start) => start.step > 0).forEach((start) => {
        const j = run.rows.step.findLastIndex((step) => step <= start.step);
        shapes.push({ type: "line", x0: x[j], x1: x[j], yref: "paper", y0: 0, y1: 1, line: { color: alone ? style("--muted") : color(i), width: 1, dash: "dot" } });
        annotations.push({ x: x[j], yref: "paper", y: 1, text: "resumed", showarrow: false, xanchor: "left", yanchor: "top", font: { size: 11 } });
      });
    });
    const shown = late.filter((v) => v > 0), low = least(shown), high = most(shown), log = state.scale === "log";
    const put = (v) => log ? Math.log10(v) : v, margin = 0.05 * (put(high) - put(low)) || 0.05;
    const range = state.range === "late" && shown.length ? [put(low) - margin, put(high) + margin] : undefined;
    react("loss", traces, {
      xaxis: { title: { text: xTitle() }, rangemode: "tozero" },
      yaxis: { title: { text: unitName() }, type: log ? "log" : "linear", range, autorange: !range },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 }, shapes, annotations, margin: { l: 56, r: 8, t: 8, b: 40 },
    });
    const top = range && (log ? 10 ** range[1] : range[1]), first = drawn.map((run) => inUnit(run, run.rows.val_loss[0])).filter((v) => v > top);
    find("above").textContent = !first.length ? "" : alone ? `At first the loss was ${number(first[0], 2)}, above this picture.` : "The first losses are above this picture.";
    const best = drawn.filter((run) => run.best).map((run) => `${run.name}: best ${number(inUnit(run, run.best.val_loss))} at step ${whole(run.best.step)}`);
    find("loss").setAttribute("aria-label", `Training and validation loss. ${best.join("; ")}`);
  }
  function drawSmall(id) {
    const traces = data.runs.map((run, i) => ({ x: xs(run), y: run.rows[id], mode: "lines", connectgaps: true, line: { color: color(i), width: 1.5 }, name: run.name, hovertemplate: id === "learning_rate" ? "%{y:.2e}" : id === "grad_norm" ? "%{y:.3f}" : "%{y:,.0f}" }));
    react(id, traces, { xaxis: { title: { text: xTitle() } }, yaxis: { rangemode: "tozero", exponentformat: id === "learning_rate" ? "power" : "SI" }, showlegend: false });
    find(id).setAttribute("aria-label", `${id.replaceAll("_", " ")} over ${xTitle()}`);
  }
  function drawAll() {
    drawLoss();
    ["learning_rate", "grad_norm", "tokens_per_second"].forEach(drawSmall);
  }

  function table(id, heads, rows, { numeric = [], differs = false } = {}) {
    const head = element("thead"), body = element("tbody"), top = element("tr");
    heads.forEach((text, i) => top.append(!text ? element("td") : element("th", text, { scope: "col", ...(numeric.includes(i) ? { class: "number" } : {}) })));
    head.append(top);
    for (const row of rows) {
      const line = element("tr", null, differs ? { class: "differs" } : {});
      row.forEach((text, i) => line.append(i ? element("td", text, numeric.includes(i) ? { class: "number" } : {}) : element("th", text, { scope: "row" })));
      body.append(line);
    }
    find(id).replaceChildren(head, body);
  }
  function fillTiles() {
    const tile = (title, value, small) => {
      const box = element("div", null, { class: "tile card" }), dd = element("dd", value);
      box.style.margin = 0;
      dd.append(element("small", small));
      box.append(element("dt", title), dd);
      return box;
    };
    const tiles = data.runs.length > 1 ? data.runs.map((run, i) => {
      const made = tile("", run.best && (state.unit === "nats" || run.bytes_per_token) ? number(inUnit(run, run.best.val_loss)) : "-", run.best ? `best, ${unitName()}, step ${whole(run.best.step)} of ${whole(run.last)}` : "not evaluated yet");
      made.firstChild.append(element("span", null, { class: "key", style: `background: ${color(i)}` }), run.name);
      return made;
    }) : data.runs.flatMap((run) => {
      const last = (values) => values.findLast((v) => v != null), seconds = last(run.rows.seconds);
      return [
        tile("Best validation loss", run.best ? number(inUnit(run, run.best.val_loss)) : "-", run.best ? `${unitName()}, step ${whole(run.best.step)}` : "not evaluated yet"),
        tile("Last training loss", number(inUnit(run, smoothed(run.rows.train_loss, smoothing(run)).findLast((v) => v != null))), "smoothed"),
        tile("Steps", whole(run.last), run.tokens_per_step ? `${short(run.last * run.tokens_per_step)} tokens` : ""),
        tile("Time", duration(seconds), "of training"),
        tile("Speed", short(last(run.rows.tokens_per_second)), "tokens per second"),
        tile("Parameters", run.parameters ? short(run.parameters) : "-", run.tokenizer),
      ];
    });
    find("tiles").replaceChildren(...tiles);
  }
  function fillSamples() {
    const steps = [...new Set(data.runs.flatMap((run) => run.samples.map(([step]) => step)))].sort((a, b) => a - b);
    find("samples").hidden = !steps.length;
    if (!steps.length) return;
    const slider = find("sample"), at = state.sample == null ? steps.length - 1 : Math.min(state.sample, steps.length - 1);
    slider.max = steps.length - 1;
    slider.value = at;
    slider.disabled = steps.length < 2;
    slider.setAttribute("aria-valuetext", `step ${steps[at]}`);
    find("sample-step").textContent = whole(steps[at]);
    // What the reader has scrolled to stays, unless the text is another one.
    const texts = JSON.stringify([at, data.runs.map((run) => run.samples.findLast(([step]) => step <= steps[at]))]);
    if (texts === state.texts) return;
    state.texts = texts;
    find("texts").replaceChildren(...data.runs.filter((run) => run.samples.length).map((run) => {
      const box = element("div"), found = run.samples.findLast(([step]) => step <= steps[at]);
      if (data.runs.length > 1) box.append(element("h3", found ? `${run.name}, step ${whole(found[0])}` : run.name));
      box.append(element("pre", found ? found[1] : "", { class: "sample", tabindex: 0, role: "group", "aria-label": `Sample of ${run.name}` }));
      return box;
    }));
  }
  function fill() {
    const alone = data.runs.length === 1, names = data.runs.map((run) => run.name);
    find("title").textContent = alone ? names[0] : `${names.length} runs compared`;
    find("subtitle").textContent = alone ? data.runs[0].folder : names.join(", ");
    const notice = find("notice");
    const left = data.runs.filter((run) => !run.bytes_per_token).map((run) => run.name), said = [];
    if (!data.same_tokens) {
      state.unit = "bits";
      said.push("These runs have different tokenizers: a token of one is not a token of the other, so their losses are shown in bits per byte of text.");
      if (left.length) said.push(`Not shown, because their bytes per token are not known: ${left.join(", ")}.`);
    }
    if (!data.same_text) said.push("These runs were validated on different texts: their losses say little about each other.");
    notice.textContent = said.join(" ");
    notice.hidden = !said.length;
    fillTiles();
    fillSamples();
    const thin = (run) => Math.ceil(run.rows.val_loss.filter((v) => v != null).length / 200) || 1;
    const evaluations = data.runs.flatMap((run) => run.rows.val_loss.map((value, j) => value == null ? null : [
      run.name, whole(run.rows.step[j]), run.tokens_per_step ? short(run.rows.step[j] * run.tokens_per_step) : "", duration(run.rows.seconds[j]),
      number(value), run.bytes_per_token ? number(value / Math.LN2 / run.bytes_per_token) : "", run.best && run.best.step === run.rows.step[j] ? "best" : "",
    ]).filter(Boolean).filter((row, j) => j % thin(run) === 0 || row[6]));
    table("evaluations", ["run", "step", "tokens", "time", "validation loss", "bits per byte", ""], evaluations, { numeric: [1, 2, 3, 4, 5] });
    find("evaluations").classList.toggle("alone", alone);
    const chosen = data.settings.filter(([, usual, ...values]) => alone ? values[0] !== usual : new Set(values.filter((value) => value !== "")).size > 1);
    find("differences").hidden = !chosen.length;
    table("differences", [alone ? "not the default" : "what differs", ...names], chosen.map(([name, , ...values]) => [name, ...values]), { differs: !alone });
    find("same").replaceChildren(...data.settings.filter((row) => !chosen.includes(row)).map(([name, , value]) => {
      const pair = element("div");
      pair.append(element("dt", name), element("dd", value));
      return pair;
    }));
    table("starts", ["run", "when", "from step", "to step", "machine", "versions"], data.runs.flatMap((run) => run.starts.map((start) => [run.name, new Date(start.time * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }), whole(start.step), start.end == null ? "" : whole(start.end) + (start.early ? ", stopped early" : ""), start.machine, start.versions])), { numeric: [2, 3] });
    find("starts").closest("section").hidden = !data.runs.some((run) => run.starts.length);
    press();
    drawAll();
  }
  // What the data do not allow cannot be chosen.
  function press() {
    for (const button of document.querySelectorAll("[data-set]")) {
      const { set, value } = button.dataset;
      button.setAttribute("aria-pressed", state[set] === value);
      const impossible = (value === "tokens" && data.runs.some((run) => !run.tokens_per_step)) || (value === "bits" && !data.runs.some((run) => run.bytes_per_token)) || (value === "nats" && !data.same_tokens);
      button.hidden = impossible;
    }
  }

  for (const button of document.querySelectorAll("[data-set]")) {
    button.addEventListener("click", () => { state[button.dataset.set] = button.dataset.value; press(); fillTiles(); drawAll(); });
  }
  find("smooth").value = smoothing(data.runs[0]);
  find("smooth").addEventListener("input", (event) => { state.smooth = +event.target.value; drawLoss(); });
  find("sample").addEventListener("input", (event) => { state.sample = +event.target.value; fillSamples(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", fill);
  fill();
  if (document.querySelector("main").dataset.live) {
    let before = "", since = new Date();
    const ask = async () => {
      try {
        const answer = await fetch("data"), text = await answer.text();
        if (!answer.ok) throw new Error(text);
        since = new Date();
        if (text !== before || find("notice").dataset.old) {
          [before, data] = [text, JSON.parse(text)];
          delete find("notice").dataset.old;
          fill();
        }
      } catch (error) {
        find("notice").dataset.old = "true";
        find("notice").hidden = false;
        find("notice").textContent = `Not renewed since ${since.toLocaleTimeString("en-GB")} (${error.message}).`;
      }
      setTimeout(ask, 3000);
    };
    setTimeout(ask, 3000);
  }
}
