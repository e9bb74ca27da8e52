// The curves: one uPlot chart for each panel, in the order of DATA.charts. Charts share zoom, cursor and smoothing.
const WINDOWS = [1, 3, 5, 10, 20, 50, 100, 200];
const plots = [...document.querySelectorAll(".plot")];
let charts = [];
let range = null; // [first step, last step], or null for the whole run
let smoothing = 1;
const WHOLE = [Math.min(...DATA.axes.map((x) => x[0])), Math.max(...DATA.axes.map((x) => x[x.length - 1]))];

// The centred mean over `width` points, at both ends over fewer.
function smooth(values, width) {
  const sums = [0], counts = [0];
  for (const value of values) {
    const known = value !== null && value !== undefined;
    sums.push(sums[sums.length - 1] + (known ? value : 0));
    counts.push(counts[counts.length - 1] + (known ? 1 : 0));
  }
  const before = Math.floor((width - 1) / 2), after = width - before;
  return values.map((value, i) => {
    if (value === null || value === undefined) return value;
    const first = Math.max(0, i - before), last = Math.min(values.length, i + after);
    return (sums[last] - sums[first]) / (counts[last] - counts[first]);
  });
}

function steps(values, width, log) {
  const kept = width > 1 ? smooth(values, width) : values;
  return log ? kept.map((value) => (value > 0 ? value : null)) : kept;
}

// Columns for uPlot: x, then one for each entry of the returned plan.
function columns(chart) {
  const tables = [], plan = [], log = chart.kind === "log";
  const add = (line, values, role) => { tables.push([DATA.axes[line.x], values]); plan.push({ line, role }); };
  for (const line of chart.lines) {
    if (line.low) { add(line, line.high, "high"); add(line, line.low, "low"); }
    const wide = smoothing > 1 && line.y.length >= 2 * smoothing;
    if (wide) add(line, steps(line.y, 1, log), "raw");
    add(line, steps(line.y, wide ? smoothing : 1, log), "main");
  }
  return { data: uPlot.join(tables), plan };
}

function stacked(chart) {
  const columns = chart.lines.map((line) => steps(line.y, smoothing, false));
  const totals = new Array(DATA.axes[chart.lines[0].x].length).fill(0);
  const tops = columns.map((values) => values.map((value, i) => (totals[i] += value ?? 0)));
  const order = chart.lines.map((line, i) => ({ line, role: "stack", own: columns[i] }));
  return { data: [DATA.axes[chart.lines[0].x], ...tops.reverse()], plan: order.reverse() };
}

function series(entry) {
  const ink = color(`--c${entry.line.color}`);
  const few = entry.line.y.length <= 12;
  const points = { show: few && entry.role === "main", size: 6, fill: ink, stroke: ink };
  const looks = {
    main: { stroke: ink, width: 1.8 },
    raw: { stroke: ink + "55", width: 1 },
    high: { stroke: ink + "00", width: 0 },
    low: { stroke: ink + "00", width: 0 },
    stack: { stroke: ink, fill: ink, width: 0 },
  };
  return { ...looks[entry.role], points, spanGaps: true, label: entry.line.label };
}

function yRange(top) {
  return (chart, low, high) => {
    if (top !== undefined) return [0, top];
    if (low === null || high === null) return [0, 1];
    const spread = high - low;
    const room = spread > 1e-6 * Math.abs(high) ? 0.08 * spread : 0.05 * Math.abs(high) || 1;
    return [low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  };
}

function marks(chart) {
  const { ctx } = chart;
  ctx.save();
  ctx.strokeStyle = color("--soft");
  ctx.setLineDash([4, 4]);
  for (const step of DATA.restarts ?? []) {
    const x = Math.round(chart.valToPos(step, "x", true));
    if (x < chart.bbox.left || x > chart.bbox.left + chart.bbox.width) continue;
    ctx.beginPath();
    ctx.moveTo(x, chart.bbox.top);
    ctx.lineTo(x, chart.bbox.top + chart.bbox.height);
    ctx.stroke();
  }
  ctx.restore();
}

// Of a logarithmic axis the lines at powers of ten alone.
const powers = (plot, splits) => splits.map((v) => (Math.abs(Math.log10(v) - Math.round(Math.log10(v))) < 1e-6 ? v : null));

function draw(chart, place) {
  const stack = chart.kind === "stack" && new Set(chart.lines.map((line) => line.x)).size === 1;
  const { data, plan } = stack ? stacked(chart) : columns(chart);
  const figure = place.closest("figure");
  const values = [...figure.querySelectorAll(".legend b")], at = figure.querySelector(".at");
  const last = chart.lines.map((line) => quantity(line.y[line.y.length - 1], chart.unit));

  function show(plot) {
    const index = plot.cursor.idx;
    at.textContent = index === null || index === undefined ? "" : `step ${data[0][index]}`;
    chart.lines.forEach((line, i) => {
      if (!values[i]) return;
      const entry = plan.findIndex((one) => one.line === line && ["main", "stack"].includes(one.role));
      const found = index === null || index === undefined ? undefined : (plan[entry].own ?? data[entry + 1])[index];
      values[i].textContent = at.textContent === "" ? last[i] : quantity(found, chart.unit);
    });
  }

  const ink = color("--soft"), grid = { stroke: color("--line"), width: 1 };
  const bands = plan.flatMap((entry, i) =>
    entry.role === "high" ? [{ series: [i + 1, i + 2], fill: color(`--c${entry.line.color}`) + "26" }] : []);
  return new uPlot({
    width: place.clientWidth, height: 190, series: [{}, ...plan.map(series)], bands,
    legend: { show: false }, padding: [8, 10, 0, 0],
    cursor: {
      sync: { key: "steps", scales: ["x", null] }, y: false, points: { size: 6 },
      drag: { x: true, y: false, setScale: false },
      bind: { dblclick: () => () => zoom(null) },
    },
    scales: {
      x: { time: false, range: () => range ?? pad(WHOLE) },
      y: chart.kind === "log" ? { distr: 3 } : { range: yRange(chart.top) },
    },
    axes: [
      { stroke: ink, grid: { show: false }, ticks: { show: false }, size: 26, font: FONT, incrs: [1, 2, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1000, 2000, 5000, 10000] },
      { stroke: ink, grid: chart.kind === "log" ? { ...grid, filter: powers } : grid, ticks: { show: false }, font: FONT, size: (u, labels) => Math.max(30, 12 + 6.6 * Math.max(0, ...(labels ?? []).map((label) => (label ?? "").length))),
        values: (u, splits) => splits.map((v) => (v === null ? "" : quantity(v, chart.unit, 5))) },
    ],
    hooks: {
      setCursor: [show], draw: [marks],
      setSelect: [(u) => {
        if (u.select.width < 4) return;
        const ends = [u.select.left, u.select.left + u.select.width].map((left) => Math.round(u.posToVal(left, "x")));
        u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        if (ends[1] > ends[0]) zoom(ends);
      }],
    },
  }, data, place);
}

const FONT = "12px system-ui, sans-serif";
const pad = ([low, high]) => (high > low ? [low, high] : [low - 1, high + 1]);

function redraw() {
  for (const chart of charts) chart.destroy();
  charts = plots.map((place, i) => draw(DATA.charts[i], place));
}

function zoom(ends) {
  range = ends;
  $("from").value = (ends ?? WHOLE)[0];
  $("to").value = (ends ?? WHOLE)[1];
  for (const chart of charts) chart.setScale("x", { min: (ends ?? pad(WHOLE))[0], max: (ends ?? pad(WHOLE))[1] });
}

function setSmoothing(place) {
  smoothing = WINDOWS[place];
  $("smoothing").value = place;
  $("smoothing-value").textContent = smoothing === 1 ? "none" : `mean over ${smoothing} steps`;
}

function startCharts() {
  const longest = Math.max(...DATA.axes.map((x) => x.length));
  $("smoothing").max = Math.max(0, WINDOWS.findLastIndex((width) => 2 * width <= longest));
  setSmoothing(Math.max(0, WINDOWS.findLastIndex((width) => width <= longest / 15)));
  document.querySelector(".toolbar.curves").hidden = false;
  redraw();
  zoom(null);
  $("smoothing").addEventListener("input", (event) => { setSmoothing(Number(event.target.value)); redraw(); });
  $("whole").addEventListener("click", () => zoom(null));
  for (const id of ["from", "to"]) {
    $(id).addEventListener("change", () => {
      const ends = [Number($("from").value), Number($("to").value)];
      zoom(ends[1] > ends[0] ? ends : null);
    });
  }
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}

if (plots.length) startCharts();
