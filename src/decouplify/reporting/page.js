// Draws the charts in the reader's colours, again when light turns to dark, and shows an image beside its dot.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("charts").textContent);
  const card = document.getElementById("hover");
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const themed = (trace) => {
    const color = trace.meta && style(trace.meta.color);
    if (!color) return trace;
    const line = trace.mode === "lines" ? { line: { ...trace.line, color } } : {};
    return { ...trace, ...line, marker: { ...trace.marker, color } };
  };

  const layoutOf = (layout) => {
    const ink = style("--ink"), quiet = style("--quiet"), line = style("--line");
    const axis = (given) => ({ gridcolor: line, linecolor: line, zerolinecolor: line, color: quiet, fixedrange: true, ...given });
    return {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 13, color: ink },
      hoverlabel: { bgcolor: style("--card"), bordercolor: line, font: { color: ink }, align: "left" },
      xaxis: axis(layout.xaxis),
      yaxis: axis(layout.yaxis),
    };
  };

  const config = { displayModeBar: false, responsive: true, doubleClick: false };
  const draw = () => {
    for (const [id, figure] of Object.entries(figures)) {
      const area = document.getElementById(id);
      if (area) Plotly.react(area, figure.data.map(themed), layoutOf(figure.layout), config);
    }
  };

  const placeOf = (tile) => {
    const columns = Number(card.dataset.columns), lines = Number(card.dataset.lines);
    const part = (index, n) => `${(100 * index) / Math.max(n - 1, 1)}%`;
    return `${part(tile % columns, columns)} ${part(Math.floor(tile / columns), lines)}`;
  };

  const show = (event) => {
    const [tile, words] = event.points[0].customdata;
    const picture = card.querySelector(".tile");
    picture.hidden = tile < 0;
    if (tile >= 0) picture.style.backgroundPosition = placeOf(tile);
    card.querySelector("p").textContent = words;
    card.hidden = false;
    const { clientX: x = 0, clientY: y = 0 } = event.event ?? {};
    const width = card.offsetWidth, height = card.offsetHeight;
    const left = x + 16 + width > innerWidth ? x - 16 - width : x + 16;
    card.style.left = `${Math.max(4, left)}px`;
    card.style.top = `${Math.min(Math.max(4, y - height / 2), innerHeight - height - 4)}px`;
  };

  draw();
  const map = document.getElementById("chart-map");
  map.on("plotly_hover", show);
  map.on("plotly_unhover", () => { card.hidden = true; });
  addEventListener("scroll", () => { card.hidden = true; }, { passive: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.documentElement.dataset.drawn = Object.keys(figures).length;
})();
