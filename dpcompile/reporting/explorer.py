"""Style and script of the page of a graph: rows are shown by what they are for, module, line and text."""

__all__ = ["SCRIPT", "STYLE"]

STYLE = """
body{font:14px/1.4 sans-serif;margin:1em}h1{font-size:1.3em}
.columns{display:flex;gap:1em;align-items:flex-start}
nav{flex:0 0 22em;max-height:95vh;overflow:auto;position:sticky;top:0}
main{flex:1;min-width:0;overflow-x:auto}nav ul{list-style:none;padding-left:.3em;margin:.2em 0}
nav button{border:0;background:none;text-align:left;cursor:pointer;font:12px monospace;padding:0}
nav button.on{background:#fd6}table{border-collapse:collapse;font:12px monospace;margin:.5em 0}
td,th{border:1px solid #ccc;padding:.1em .4em;text-align:left;vertical-align:top}
summary{cursor:pointer;font-weight:bold}label{padding:.1em .4em;margin-right:.4em}
.norm{background:#e3f0ff}.clip{background:#ffe3e3}.sum{background:#e3f8e3}
tr.backward td:first-child{border-left:3px solid #888}tr:target{outline:2px solid #000}tr.hidden{display:none}
"""

SCRIPT = """
"use strict";
(function () {
  var rows = Array.prototype.slice.call(document.querySelectorAll("#graph tbody tr"));
  var boxes = Array.prototype.slice.call(document.querySelectorAll("input.job"));
  var buttons = Array.prototype.slice.call(document.querySelectorAll("nav button"));
  var search = document.getElementById("search"), shown = document.getElementById("shown");
  var chosen = null;
  function within(path, module) { return path === module || (module !== "" && path.indexOf(module + ".") === 0); }
  function fits(row) {
    if (chosen && "module" in chosen.dataset && !within(row.dataset.module, chosen.dataset.module)) { return false; }
    if (chosen && "line" in chosen.dataset && row.dataset.line !== chosen.dataset.line) { return false; }
    if (!boxes.some(function (box) { return box.checked && box.value === row.dataset.job; })) { return false; }
    return row.textContent.toLowerCase().indexOf(search.value.toLowerCase()) >= 0;
  }
  function update() {
    var count = 0;
    rows.forEach(function (row) {
      var fit = fits(row);
      row.classList.toggle("hidden", !fit);
      count += fit ? 1 : 0;
    });
    buttons.forEach(function (button) { button.classList.toggle("on", button === chosen); });
    shown.textContent = count + " of " + rows.length + " nodes";
  }
  function clear() {
    chosen = null; search.value = "";
    boxes.forEach(function (box) { box.checked = true; });
    update();
  }
  buttons.forEach(function (button) {
    button.addEventListener("click", function () { chosen = chosen === button ? null : button; update(); });
  });
  boxes.forEach(function (box) { box.addEventListener("change", update); });
  search.addEventListener("input", update);
  document.getElementById("all").addEventListener("click", clear);
  window.addEventListener("hashchange", function () {
    var row = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (row && row.closest("tr.hidden")) { clear(); row.scrollIntoView(); }
  });
  update();
})();
"""
