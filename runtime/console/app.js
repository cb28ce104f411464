// The page: the list of runs on one side, and what the address names on the other.

import * as api from "./api.js";
import { ago, GLYPHS, h, LOOKS, say, set } from "./dom.js";
import { startView } from "./start.js";
import { Watch } from "./watch.js";

const LIST_MS = 4000;

const main = document.getElementById("main");
const list = document.getElementById("runs");
const server = document.getElementById("server");
const older = document.getElementById("older");

const state = { info: {}, graphs: [], watch: null, visit: 0, pages: 1, listing: null };

addEventListener("hashchange", () => show());
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names what is shown, not where the focus is
  main.focus({ preventScroll: true });
});
older.addEventListener("click", () => {
  state.pages += 1;
  listRuns();
});
document.addEventListener("visibilitychange", () => document.hidden || listRuns());
setInterval(() => document.hidden || listRuns(), LIST_MS);

async function begin() {
  try {
    [state.info, { graphs: state.graphs }] = await Promise.all([api.info(), api.graphs()]);
  } catch (problem) {
    main.replaceChildren(h("p", { class: "problem", role: "alert" }, `${problem.message} This is tried again.`));
    setTimeout(begin, 2000);
    return;
  }
  await Promise.all([show(), listRuns()]);
}

/** Show what the address names: `#/runs/<id>`, `#/graphs/<name>`, or a new run. */
async function show() {
  const visit = ++state.visit;
  const [, kind, rest = ""] = location.hash.split("/");
  const id = decodeURIComponent(rest);
  state.watch?.close();
  state.watch = null;
  const view = kind === "runs" && id ? watchRun(id) : await newRun(id).catch(trouble);
  if (visit !== state.visit) return;
  main.replaceChildren(view);
  scrollTo(0, 0);
  document.title = kind === "runs" ? `${id} · Sereno` : "Sereno";
  markRun();
}

function watchRun(runId) {
  state.watch = new Watch(runId, {
    graphs: state.graphs,
    info: state.info,
    onChange: listRuns,
    onRun: goTo,
  });
  return state.watch.element;
}

function newRun(name) {
  const graph = state.graphs.find((one) => one.name === name) ?? state.graphs[0];
  if (!graph) return Promise.resolve(h("p", {}, "No graph is served."));
  return startView(state.graphs, graph, {
    onStart: (run) => goTo(run.run_id),
    onChoose: (chosen) => (location.hash = `#/graphs/${encodeURIComponent(chosen)}`),
  });
}

const trouble = (problem) => h("p", { class: "problem", role: "alert" }, problem.message);

function goTo(runId) {
  location.hash = `#/runs/${encodeURIComponent(runId)}`;
  main.focus({ preventScroll: true });
}

// The list of runs.

async function listRuns() {
  const turn = (state.listing = Symbol());
  try {
    const { runs, next_cursor: more } = await api.runs({ limit: Math.min(500, 30 * state.pages) });
    if (turn !== state.listing) return;
    renderRuns(runs);
    older.hidden = !more;
    say(server, `Sereno ${state.info.version ?? ""}`);
    set(server, "data-kind", "live");
  } catch {
    say(server, "The server cannot be reached");
    set(server, "data-kind", "waiting");
  }
}

const items = new Map();

function renderRuns(runs) {
  const wanted = new Set(runs.map((run) => run.run_id));
  for (const [id, item] of items) {
    if (wanted.has(id)) continue;
    item.element.remove();
    items.delete(id);
  }
  runs.forEach((run, index) => {
    const item = items.get(run.run_id) ?? newItem(run);
    const look = LOOKS[run.status] ?? "waiting";
    set(item.element, "data-state", look);
    say(item.glyph, GLYPHS[look]);
    say(item.status, run.status);
    say(item.when, ago(Date.parse(run.created_at)));
    if (list.children[index] !== item.element) list.insertBefore(item.element, list.children[index] ?? null);
  });
  document.getElementById("no-runs").hidden = runs.length > 0;
  markRun();
}

function newItem(run) {
  const glyph = h("span", { class: "glyph", "aria-hidden": "true" });
  const status = h("span", { class: "status" });
  const when = h("span", { class: "when" });
  const link = h("a", { href: `#/runs/${encodeURIComponent(run.run_id)}`, title: run.run_id },
    glyph, h("span", { class: "what" }, h("strong", {}, run.graph), status), when);
  const item = { element: h("li", {}, link), link, glyph, status, when };
  items.set(run.run_id, item);
  return item;
}

function markRun() {
  for (const [id, item] of items) {
    set(item.link, "aria-current", location.hash === `#/runs/${encodeURIComponent(id)}` ? "page" : null);
  }
}

begin();
