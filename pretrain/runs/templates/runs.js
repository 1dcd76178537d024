// The list of runs: asks the server again every few seconds; every text goes in as text.
"use strict";

const chosen = new Set(), body = document.getElementById("runs"), filter = document.getElementById("filter");
const heads = [...document.querySelectorAll("thead th")].slice(1).map((head) => head.textContent);
const compare = document.getElementById("compare"), count = document.getElementById("count"), MOST = 500;
let runs = [], etag = "";

function link(names) {
  return "/run?" + new URLSearchParams(names.map((name) => ["run", name]));
}

function show() {
  const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
  const found = runs.filter((run) => words.every((word) => (run.name + " " + run.cells[1]).toLowerCase().includes(word)));
  count.textContent = `${found.length} of ${runs.length}, ${runs.filter((run) => run.state === "running").length} running`;
  body.replaceChildren(...found.slice(0, MOST).map((run) => {
    const row = document.createElement("tr"), box = document.createElement("input"), first = document.createElement("td");
    box.type = "checkbox";
    box.checked = chosen.has(run.name);
    box.setAttribute("aria-label", "compare " + run.name);
    box.onchange = () => { if (box.checked) chosen.add(run.name); else chosen.delete(run.name); ready(); };
    first.append(box);
    row.append(first, ...run.cells.map((text, number) => {
      const cell = document.createElement("td");
      if (number === 0) {
        const to = document.createElement("a");
        to.href = link([run.name]);
        to.textContent = text;
        cell.append(to);
      } else cell.textContent = text;
      if (number > 1 && text) cell.dataset.name = heads[number];  // on a phone there is no head
      if (number === 2 && run.share !== null) {
        const bar = document.createElement("div"), done = document.createElement("i");
        cell.className = "step";
        bar.className = "bar";
        done.style.width = `${100 * run.share}%`;
        bar.append(done);
        cell.append(bar);
      }
      if (number === 1) cell.className = run.learning === "diverged" || run.learning === "on the plateau" ? "bad" : run.state;
      return cell;
    }));
    row.title = run.advice;
    return row;
  }));
}

function ready() {
  compare.disabled = chosen.size < 2 || chosen.size > 8;
  compare.textContent = chosen.size > 8 ? "eight at most" : chosen.size > 1 ? `compare ${chosen.size}` : chosen.size ? "tick another" : "tick two to compare";
}

async function ask() {
  if (document.hidden) return;
  try {
    const answer = await fetch("/list", { headers: { "X-Etag": etag } });
    if (answer.status !== 200) return;
    const fresh = await answer.json();
    [runs, etag] = [fresh.runs, fresh.etag];
    show();
  } catch (error) { count.textContent = "the server is gone"; }
}

filter.oninput = show;
compare.onclick = () => { location.href = link([...chosen]); };
ask();
setInterval(ask, 5000);
