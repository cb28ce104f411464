// The page: the list of runs on one side, and what the address names on the other.

import * as api from "./api.js";
import { ago, GLYPHS, h, LOOKS, say, set } from "./dom.js";
import { startView } from "./start.js";
import { Watch } from "./watch.js";

const LIST_MS = 4000;
const PAGE = 30;

const byId = (id) => document.getElementById(id);
const main = byId("main");
const list = byId("runs");
const server = byId("server");
const older = byId("older");
const noRuns = byId("no-runs");
const filters = { status: byId("by-status"), graph: byId("by-graph") };

const state = { info: {}, graphs: [], failures: {}, watch: null, visit: 0, pages: 1, listing: null };

addEventListener("hashchange", () => show({ moved: true }));
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names what is shown, not where the focus is
  main.focus({ preventScroll: true });
});
older.addEventListener("click", () => {
  state.pages += 1;
  listRuns();
});
for (const filter of Object.values(filters)) {
  filter.addEventListener("change", () => {
    state.pages = 1;
    listRuns();
  });
}
document.addEventListener("visibilitychange", () => document.hidden || listRuns());
setInterval(() => document.hidden || listRuns(), LIST_MS);

async function begin() {
  try {
    const [info, served] = await Promise.all([api.info(), api.graphs()]);
    Object.assign(state, { info, graphs: served.graphs, failures: served.failures ?? {} });
  } catch (problem) {
    if (!main.querySelector("[data-unreachable]")) main.replaceChildren(unreachable(problem));
    say(server, "The server cannot be reached");
    set(server, "data-kind", "waiting");
    setTimeout(begin, 2000);
    return;
  }
  filters.graph.append(...state.graphs.map(({ name }) => h("option", { value: name }, name)));
  await Promise.all([show({ moved: false }), listRuns()]);
}

const unreachable = (problem) => h("div", { class: "view", "data-unreachable": "" },
  h("h1", {}, "There is no server"),
  h("section", { class: "panel help" },
    h("p", { class: "problem", role: "alert" }, problem.message),
    h("p", {}, "It is asked again every two seconds, and this page goes on by itself.")));

/** Show what the address names: `#/runs/<id>`, `#/graphs/<name>`, or a new run. */
async function show({ moved }) {
  const visit = ++state.visit;
  const [, kind, rest = ""] = location.hash.split("/");
  const id = decoded(rest);
  state.watch?.close();
  state.watch = null;
  const view = kind === "runs" && id ? watchRun(id) : await newRun(id).catch(trouble);
  if (visit !== state.visit) return;
  const chose = document.activeElement?.classList.contains("graph");
  main.replaceChildren(view);
  document.title = kind === "runs" ? `${id} · Sereno` : "New run · Sereno";
  markRun();
  if (!moved) return;
  scrollTo(0, 0);
  // Who chose among the graphs may choose again; everybody else begins at the heading.
  const target = (chose && view.querySelector(".graph[aria-pressed=true]")) || view.querySelector("h1") || main;
  if (target.tagName === "H1") target.tabIndex = -1;
  target.focus({ preventScroll: true });
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
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
  if (!graph) return Promise.resolve(noGraph());
  return startView(state.graphs, graph, {
    onStart: (run) => goTo(run.run_id),
    onChoose: (chosen) => (location.hash = `#/graphs/${encodeURIComponent(chosen)}`),
  });
}

function noGraph() {
  const failures = Object.entries(state.failures);
  return h("div", { class: "view" },
    h("h1", {}, "No graph is served"),
    h("section", { class: "panel help" },
      h("p", {}, "Name one in a langgraph.json and start the server with it:"),
      h("pre", {}, "sereno serve --config langgraph.json"),
      failures.length ? h("p", {}, "These could not be loaded:") : null,
      ...failures.map(([name, why]) => h("p", { class: "problem" }, `${name}: ${why}`))));
}

const trouble = (problem) => h("div", { class: "view" },
  h("h1", {}, "New run"),
  h("section", { class: "panel help" },
    h("p", { class: "problem", role: "alert" }, problem.message),
    h("button", { type: "button", click: () => show({ moved: true }) }, "Try again")));

function goTo(runId) {
  location.hash = `#/runs/${encodeURIComponent(runId)}`;
}

// The list of runs.

async function listRuns() {
  const turn = (state.listing = Symbol());
  const query = Object.fromEntries(Object.entries(filters).map(([name, { value }]) => [name, value]).filter(([, value]) => value));
  try {
    const { runs, more } = await api.newestRuns(PAGE * state.pages, query);
    if (turn !== state.listing) return;
    renderRuns(runs, query);
    older.hidden = !more;
    say(server, `Sereno ${state.info.version ?? ""}`);
    set(server, "data-kind", "live");
  } catch {
    if (turn !== state.listing) return;
    say(server, "The server cannot be reached");
    set(server, "data-kind", "waiting");
  }
}

const items = new Map();

function renderRuns(runs, query) {
  const wanted = new Set(runs.map((run) => run.run_id));
  for (const [id, item] of items) {
    if (wanted.has(id)) continue;
    item.element.remove();
    items.delete(id);
  }
  const threads = new Set();
  runs.forEach((run, index) => {
    const item = items.get(run.run_id) ?? newItem(run);
    const look = LOOKS[run.status] ?? "waiting";
    // A later run on its thread has answered it; with one status alone, nobody can tell.
    const waits = run.status === "interrupted" && !threads.has(run.thread_id) && !query.status;
    threads.add(run.thread_id);
    set(item.element, "data-state", look);
    set(item.element, "data-waits", waits ? "" : null);
    say(item.glyph, GLYPHS[look]);
    say(item.status, waits ? "needs an answer" : run.status);
    say(item.when, ago(Date.parse(run.created_at)));
    if (list.children[index] !== item.element) list.insertBefore(item.element, list.children[index] ?? null);
  });
  noRuns.hidden = runs.length > 0;
  const filtered = Object.keys(query).length > 0;
  say(noRuns, filtered ? "No run is like that." : "There is none yet. Start one here, or with curl.");
  byId("filters").hidden = !filtered && !runs.length;
  markRun();
}

function newItem(run) {
  const glyph = h("span", { class: "glyph", "aria-hidden": "true" });
  const status = h("span", { class: "status" });
  const when = h("span", { class: "when" });
  const link = h("a", { href: `#/runs/${encodeURIComponent(run.run_id)}`, title: `Run ${run.run_id}\nThread ${run.thread_id}` },
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
