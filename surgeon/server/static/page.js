"use strict";
const at = (id) => document.getElementById(id);
const chosen = new Set();
let state = null;
let asked = 0, drawn = 0;

function row(cells) {
  const line = document.createElement("tr");
  for (const cell of cells) {
    const td = document.createElement("td");
    if (cell instanceof Node) td.append(cell);
    else td.textContent = cell ?? "";
    line.append(td);
  }
  return line;
}

function bar(share) {
  const outer = document.createElement("span"), inner = document.createElement("i");
  outer.className = "bar";
  outer.title = share.toFixed(4);
  inner.style.setProperty("width", `${100 * share}%`);
  outer.append(inner);
  return outer;
}

function tick(name) {
  const box = document.createElement("input");
  box.type = "checkbox";
  box.checked = chosen.has(name);
  box.setAttribute("aria-label", name);
  box.addEventListener("change", () => {
    if (box.checked) chosen.add(name); else chosen.delete(name);
    count();
  });
  return box;
}

function count() {
  at("chosen").textContent = chosen.size ? [...chosen].join(", ") : "choose tasks below";
  at("go").disabled = chosen.size === 0;
}

function shown(name, what) { at(name).textContent = what ?? "–"; }

function draw() {
  const { latency, load } = state;
  at("build").textContent = `${state.build.base} · ${state.build.architecture}`;
  shown("total", state.total.toLocaleString("en"));
  shown("resident", state.resident);
  shown("rate", latency.per_second);
  shown("p50", latency.p50_ms === null ? null : `${latency.p50_ms} ms`);
  shown("p99", latency.p99_ms === null ? null : `${latency.p99_ms} ms`);
  shown("waiting", load.waiting + load.writing);
  shown("running", load.running);
  at("found").textContent = state.found > state.tasks.length ? `${state.tasks.length} of ${state.found}` : "";
  const tasks = [{ name: state.name, labels: null, sizes: {}, parameters: 0 }, ...state.tasks];
  at("tasks").tBodies[0].replaceChildren(...tasks.map((task) => row([
    tick(task.name),
    task.name + (task.name === state.name ? " (no task)" : ""),
    task.fault ?? (task.labels ? task.labels.join(", ") : ""),
    Object.entries(task.sizes ?? {}).slice(0, 4).map(([symbol, size]) => `${symbol} ${size}`).join(", "),
    (task.parameters ?? 0).toLocaleString("en"),
  ])));
}

async function refresh() {
  const turn = ++asked;
  let found = null, fault = "";
  try {
    const answer = await fetch(`status?search=${encodeURIComponent(at("search").value)}`);
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    found = await answer.json();
  } catch (error) {
    fault = `the server does not answer: ${error.message}`;
  }
  if (turn < drawn) return; // a later question was answered first
  drawn = turn;
  at("fault").textContent = fault;
  at("fault").hidden = !fault;
  if (found) { state = found; draw(); }
}

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
  });
  const found = await answer.json();
  if (!answer.ok) throw new Error(typeof found.error === "string" ? found.error : found.error.message);
  return found;
}

async function classified(name, text) {
  const found = await post(`v2/models/${encodeURIComponent(name)}/infer`, {
    inputs: [{ name: "text", datatype: "BYTES", shape: [1], data: [text] }],
    outputs: [{ name: "label" }, { name: "score" }],
  });
  const [label, score] = found.outputs.map((output) => output.data[0]);
  return [`${label} (${score.toFixed(3)})`, bar(score)];
}

async function written(name, text) {
  const path = state.chat ? "v1/chat/completions" : "v1/completions";
  const asked = state.chat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
  const found = await post(path, { model: name, max_tokens: 64, temperature: 0, ...asked });
  const said = document.createElement("div");
  said.className = "text";
  said.textContent = state.chat ? found.choices[0].message.content : found.choices[0].text;
  return [said, ""];
}

async function ask(name, text) {
  const begun = performance.now();
  try {
    const cells = await (state.writes ? written : classified)(name, text);
    return row([name, ...cells, (performance.now() - begun).toFixed(0)]);
  } catch (error) {
    const line = row([name, error.message, "", ""]);
    line.className = "fault";
    return line;
  }
}

at("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  at("go").disabled = true;
  const text = at("text").value;
  const rows = await Promise.all([...chosen].map((name) => ask(name, text)));
  at("answers").tBodies[0].replaceChildren(...rows);
  at("answers").hidden = false;
  count();
});
at("search").addEventListener("input", refresh);
count();
refresh();
setInterval(refresh, 2000);
