// The page: the list of runs on one side, and what the address names on the other.

import * as api from "./api.js";
import { ago, GLYPHS, h, LOOKS, say, set } from "./dom.js";
import { FAILED } from "./question.js";
import { choiceOf, startView } from "./start.js";
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
  const watches = kind === "runs" && id !== "";
  const chose = document.activeElement?.classList.contains("graph");
  // What is left behind is not to be sent any more, however long the next view takes.
  for (const form of main.querySelectorAll("form")) form.inert = true;
  state.watch?.close();
  state.watch = null;
  const view = watches ? watchRun(id) : await newRun(id);
  if (visit !== state.visit) return;
  main.replaceChildren(view);
  document.title = watches ? `${id} · Sereno` : "New run · Sereno";
  markRun();
  if (!moved) return;
  // In a narrow window the list stands above what was chosen in it.
  scrollTo(0, matchMedia("(max-width: 900px)").matches ? main.offsetTop : 0);
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

async function newRun(name) {
  const graph = state.graphs.find((one) => one.name === name) ?? state.graphs[0];
  if (!graph) return noGraph();
  const onChoose = (chosen) => (location.hash = `#/graphs/${encodeURIComponent(chosen)}`);
  try {
    return await startView(state.graphs, graph, { onStart: (run) => goTo(run.run_id), onChoose });
  } catch (problem) {
    return trouble(problem, choiceOf(state.graphs, graph, onChoose));
  }
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

const trouble = (problem, choice) => h("div", { class: "view" },
  h("h1", {}, "New run"),
  choice,
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
    const known = list.children.length;
    const asked = document.activeElement === older;
    renderRuns(runs, query);
    older.hidden = !more;
    // The button goes with the last page; who pressed it reads on where that begins.
    if (asked && !more) (list.children[known] ?? list.lastElementChild)?.querySelector("a").focus();
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
  const later = new Map(); // of each thread, its newest run; null when one has gone past the question
  runs.forEach((run, index) => {
    const item = items.get(run.run_id) ?? newItem(run);
    const look = LOOKS[run.status] ?? "waiting";
    // A later run on its thread may have answered it; with one status alone, nobody can tell.
    const newest = later.get(run.thread_id);
    const waits = run.status === "interrupted" && !query.status
      && (newest === undefined || (newest !== null && asksStill(newest)));
    later.set(run.thread_id, newest !== null && FAILED.includes(run.status) ? newest ?? run : null);
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

const asking = new Map();

/** Whether the thread of a run that failed still asks; false until the server has said. */
function asksStill({ run_id: id, thread_id: thread }) {
  if (!asking.has(id)) {
    asking.set(id, false);
    api.threadState(thread).then(({ interrupts }) => {
      asking.set(id, interrupts.length > 0);
      listRuns();
    }, () => {});
  }
  return asking.get(id);
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
