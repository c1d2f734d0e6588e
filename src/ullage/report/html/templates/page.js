(function () {
  "use strict";
  var root = document.documentElement;
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  var colours = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b8a800", "#8c8c8c", "#7a5195", "#a0522d"];
  var figures = [];

  function css(name) { return getComputedStyle(root).getPropertyValue(name).trim(); }

  function axis(given) {
    return Object.assign({ gridcolor: css("--line"), linecolor: css("--line"), zerolinecolor: css("--line"), automargin: true }, given || {});
  }

  function themed(layout) {
    var result = Object.assign({
      colorway: colours, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", autosize: true,
      margin: { l: 60, r: 20, t: 20, b: 45 }, height: 380, hoverlabel: { font: { size: 12 } },
      legend: { orientation: "h", y: -0.2 }
    }, layout);
    result.font = Object.assign({ color: css("--text"), size: 13, family: "system-ui, sans-serif" }, layout.font || {});
    Object.keys(layout).concat(["xaxis", "yaxis"]).forEach(function (key) {
      if (/^[xy]axis\d*$/.test(key)) { result[key] = axis(layout[key]); }
    });
    if (typeof layout.title === "string") { result.title = { text: layout.title }; }
    return result;
  }

  function draw() {
    if (!window.Plotly) { return; }
    figures.forEach(function (one) {
      window.Plotly.react(one.target, one.spec.data, themed(one.spec.layout), {
        responsive: true, displaylogo: false, modeBarButtonsToRemove: ["sendDataToCloud", "lasso2d", "select2d"]
      });
    });
  }

  document.querySelectorAll("script.figure").forEach(function (element) {
    figures.push({ target: document.getElementById(element.dataset.for), spec: JSON.parse(element.textContent) });
  });
  draw();

  var button = document.getElementById("theme");
  button.addEventListener("click", function () {
    var now = root.dataset.theme || (dark.matches ? "dark" : "light");
    root.dataset.theme = now === "dark" ? "light" : "dark";
    button.setAttribute("aria-pressed", String(root.dataset.theme === "dark"));
    draw();
  });
  dark.addEventListener("change", draw);
  document.getElementById("print").addEventListener("click", function () { window.print(); });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (one) { one.open = true; });
    draw();
  });
  document.querySelectorAll("details").forEach(function (one) {
    one.addEventListener("toggle", function () {
      if (one.open && window.Plotly) { one.querySelectorAll(".plot").forEach(function (plot) { window.Plotly.Plots.resize(plot); }); }
    });
  });
}());
