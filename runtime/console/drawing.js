// The graph's drawing: nodes that light up as the run goes through them.

import { GLYPHS, duration, s, say, set } from "./dom.js";
import { layout, path } from "./layout.js";
import { stateOf } from "./run.js";

const PAD = 14;

export class Drawing {
  /** `onPick` gets the path of a node that was chosen, or null when it is let go. */
  constructor(shape, graph, onPick) {
    const nodes = shape?.nodes ?? graph.nodes.map((id) => ({ id, label: id }));
    const plan = layout(nodes, shape?.edges ?? []);
    this._onPick = onPick;
    this._picked = null;
    this._nodes = new Map();
    const width = plan.width + 2 * PAD;
    const height = plan.height + 2 * PAD;
    this.element = s("svg", {
      class: "drawing", viewBox: `${-PAD} ${-PAD} ${width} ${height}`, width, height,
      role: "group", "aria-label": `The graph ${graph.name}`,
    });
    this.element.append(
      s("defs", {}, s("marker", {
        id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto",
      }, s("path", { d: "M0,0.5 L7.5,4 L0,7.5 z" }))),
      ...plan.edges.map((edge) => this._edge(edge)),
      ...plan.nodes.map((node) => this._node(node)),
    );
  }

  _edge(edge) {
    return s("path", {
      class: edge.conditional ? "edge conditional" : "edge", d: path(edge), "marker-end": "url(#tip)",
    }, edge.label ? s("title", {}, edge.label) : null);
  }

  _node({ id, label, x, y, width, height }) {
    if (id === "__start__" || id === "__end__") {
      return s("circle", { class: `terminus ${id}`, cx: x, cy: y, r: width / 2 - 2 },
        s("title", {}, id === "__start__" ? "start" : "end"));
    }
    const glyph = s("text", { class: "glyph", x: 18, y: height / 2 });
    const name = s("text", { class: "label", x: 33, y: height / 2 }, fit(label ?? id, 15));
    const note = s("text", { class: "note", x: 33, y: height / 2 + 10 });
    const group = s("g", {
      class: "node", transform: `translate(${x - width / 2},${y - height / 2})`,
      tabindex: 0, role: "button", "aria-pressed": "false", dataset: { node: id, state: "waiting" },
      click: () => this.pick(id === this._picked ? null : id),
      keydown: (event) => {
        if (event.key !== "Enter" && event.key !== " ") return;
        event.preventDefault();
        this.pick(id === this._picked ? null : id);
      },
    },
    s("title", {}, label ?? id),
    s("rect", { class: "halo", x: -4, y: -4, width: width + 8, height: height + 8, rx: 13 }),
    s("rect", { class: "box", width, height, rx: 10 }),
    s("circle", { class: "badge", cx: 18, cy: height / 2, r: 10 }),
    glyph,
    name,
    note);
    this._nodes.set(id, { group, glyph, name, note, label: label ?? id, middle: height / 2 });
    return group;
  }

  pick(id) {
    this._picked = id;
    for (const [other, { group }] of this._nodes) set(group, "aria-pressed", other === id);
    this._onPick(id);
  }

  render(run) {
    const now = run.now();
    const inner = innerNotes(run);
    for (const [id, { group, glyph, name, note, label, middle }] of this._nodes) {
      const node = run.nodes.get(id);
      const state = stateOf(node);
      const told = node ? tell(node, state, now) : "";
      set(group, "data-state", state);
      set(group, "aria-label", `${label}: ${state}${told ? `, ${told}` : ""}`);
      say(glyph, GLYPHS[state]);
      const moving = state === "running" ? inner.get(id) : null;
      say(note, fit(moving ?? told, 18));
      set(name, "y", note.textContent ? middle - 7 : middle);
    }
  }
}

/** What stands under a node's name. */
function tell(node, state, now) {
  const { last } = node;
  const count = node.visits > 1 ? countOf(node) : "";
  if (state === "retrying") {
    const left = last.retryAt - now;
    return left > 0 ? `try ${last.attempt + 1} in ${(left / 1000).toFixed(1)} s` : `try ${last.attempt + 1} now`;
  }
  if (state === "running") {
    const since = last.bars.at(-1)?.from ?? now;
    return [duration(now - since), last.attempt > 1 ? `try ${last.attempt}` : "", count].filter(Boolean).join(" · ");
  }
  if (state === "failed") return last.error ?? "failed";
  if (state === "interrupted") return "needs an answer";
  if (state === "cached") return ["cached", count].filter(Boolean).join(" · ");
  return [last.durationMs === null ? "" : duration(last.durationMs), count].filter(Boolean).join(" · ");
}

function countOf(node) {
  const ended = (node.states.done ?? 0) + (node.states.cached ?? 0);
  return ended < node.visits ? `${ended} of ${node.visits}` : `× ${node.visits}`;
}

/** What goes on inside a subgraph, by the node that it is. */
function innerNotes(run) {
  const notes = new Map();
  for (const node of run.nodes.values()) {
    if (node.depth === 0) continue;
    const state = stateOf(node);
    if (state !== "running" && state !== "retrying") continue;
    const open = (node.states.running ?? 0) + (node.states.retrying ?? 0);
    notes.set(node.key.split("/")[0], `${node.name}${open > 1 ? ` × ${open}` : ""}`);
  }
  return notes;
}

const fit = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
