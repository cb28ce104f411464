// The graph's drawing: nodes that light up as the run goes through them, subgraphs as frames around theirs.

import { GLYPHS, announce, duration, h, s, say, set } from "./dom.js";
import { depthOf, entered, grow, layout, path } from "./layout.js";
import { stateOf } from "./run.js";

const PAD = 14;
/** How wide a letter is in a name, and in the note below it. */
const LABEL = 7.4;
const NOTE = 6.2;
/** A drawing is shrunk to this at most; what is wider then is scrolled. */
const SMALLEST = 0.74;
/** Subgraphs are open at first when the whole is not higher than this. */
const HIGHEST = 440;

export class Drawing {
  /** `onPick` gets the path of a node that was chosen, or null when it is let go; without it there is no choice. */
  constructor(shape, graph, onPick) {
    this._graph = graph;
    this._root = grow(shape?.nodes ?? graph.nodes.map((id) => ({ id, label: id })));
    this._edges = shape?.edges ?? [];
    this._onPick = onPick;
    this._picked = null;
    this._run = null;
    this._last = null;
    this._room = null;
    /** What somebody folded or unfolded by hand, by path. */
    this._chosen = new Map();
    this._depth = depthOf(this._root);
    this._nodes = new Map();
    this._canvas = h("div", {
      class: "canvas", focusin: ({ target }) => this._stopAt(target), keydown: (event) => this._key(event),
    });
    this.element = h("div", {}, this._canvas,
      entered(this._root, this._edges) ? null : h("p", { class: "hint" }, "Not all edges of this graph are known."));
    this._draw();
    // The room with the scroll bars, which come and go with what is drawn.
    new ResizeObserver(([{ borderBoxSize: [{ inlineSize }] }]) => requestAnimationFrame(() => this._fit(inlineSize)))
      .observe(this._canvas);
  }

  /** As many levels of subgraphs are open as there is room for. */
  _fit(room) {
    if (!room || room === this._room) return;
    this._room = room;
    const before = this._depth;
    this._depth = depthOf(this._root);
    while (this._depth > 0) {
      const { width, height } = this._plan();
      if ((width + 2 * PAD) * SMALLEST <= room && height <= HIGHEST) break;
      this._depth -= 1;
    }
    if (this._depth !== before) this._draw();
    else this._reach();
  }

  _isOpen(node) {
    return this._chosen.get(node.key) ?? node.key.split("/").length <= this._depth;
  }

  _plan() {
    return layout(this._root, this._edges, (node) => this._isOpen(node));
  }

  _draw() {
    const plan = this._plan();
    const [width, height] = [plan.width + 2 * PAD, plan.height + 2 * PAD];
    this._nodes.clear();
    const drawing = s("svg", {
      class: "drawing", viewBox: `${-PAD} ${-PAD} ${width} ${height}`, width, height,
      role: "group", "aria-label": `The graph ${this._graph.name}`,
    },
    s("defs", {}, s("marker", {
      id: "tip", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto",
    }, s("path", { d: "M0,0.5 L7.5,4 L0,7.5 z" }))),
    ...this._inside(plan));
    drawing.style.minWidth = `${Math.round(width * SMALLEST)}px`;
    const before = this._canvas.querySelector("[tabindex='0']");
    const held = before !== null && before === document.activeElement;
    this._canvas.replaceChildren(drawing);
    this._mark();
    const stop = (before && this._successor(before.dataset)) ?? this._buttons()[0];
    if (stop) this._stopAt(stop);
    if (held) stop.focus({ preventScroll: true });
    this._reach();
    if (this._run) this.render(this._run);
  }

  /** What stands for a button that was drawn before: the same one, or that of the node it is now inside of. */
  _successor({ node, fold }) {
    const [kind, key] = fold === undefined ? ["node", node] : ["fold", fold];
    return this._canvas.querySelector(`[data-${kind}="${CSS.escape(this._shown(key))}"]`);
  }

  _buttons() {
    return [...this._canvas.querySelectorAll("[role=button]")];
  }

  /** However many buttons there are, Tab stops at one of them; the arrow keys lead to the others. */
  _stopAt(button) {
    for (const other of this._buttons()) set(other, "tabindex", other === button ? 0 : -1);
  }

  _key(event) {
    const buttons = this._buttons();
    const at = buttons.indexOf(event.target);
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: buttons.length - 1 }[event.key];
    if (at < 0 || !buttons[to]) return;
    event.preventDefault();
    buttons[to].focus();
  }

  /** What is scrolled and has no button in it is scrolled with the keyboard by itself. */
  _reach() {
    const { scrollWidth, clientWidth, scrollHeight, clientHeight } = this._canvas;
    const alone = !this._buttons().length && (scrollWidth > clientWidth || scrollHeight > clientHeight);
    for (const [name, value] of [["tabindex", 0], ["role", "group"], ["aria-label", "The drawing, to be scrolled"]]) {
      set(this._canvas, name, alone ? value : null);
    }
  }

  _mark() {
    if (!this._onPick) return;
    for (const [key, { group }] of this._nodes) set(group, "aria-pressed", key === this._picked);
  }

  _inside({ nodes, edges }) {
    return [
      ...edges.map((edge) => s("path", {
        class: edge.conditional ? "edge conditional" : "edge", d: path(edge),
        "marker-end": edge.through ? null : "url(#tip)",
      }, edge.label ? s("title", {}, edge.label) : null)),
      ...nodes.map((node) => (node.inside ? this._frame(node) : this._node(node))),
    ];
  }

  _node(node) {
    const { id, x, y, width, height, children } = node;
    if (id === "__start__" || id === "__end__") {
      return s("circle", { class: `terminus ${id}`, cx: x + width / 2, cy: y + height / 2, r: width / 2 - 2 },
        s("title", {}, id === "__start__" ? "start" : "end"));
    }
    const folds = children.length > 0;
    const glyph = s("text", { class: "glyph", x: 18, y: height / 2 });
    const letters = Math.floor((width - 42 - (folds ? 20 : 0)) / LABEL);
    const name = s("text", { class: "label", x: 33, y: height / 2 }, fit(node.label, letters));
    const note = s("text", { class: "note", x: 33, y: height / 2 + 10 });
    const button = this._button(node, "node",
      folds ? s("rect", { class: "box behind", x: 4, y: 4, width, height, rx: 10 }) : null,
      s("rect", { class: "halo", x: -4, y: -4, width: width + 8, height: height + 8, rx: 13 }),
      s("rect", { class: "box", width, height, rx: 10 }),
      s("circle", { class: "badge", cx: 18, cy: height / 2, r: 10 }),
      glyph, name, note);
    this._nodes.set(node.key, {
      ...node, group: button, glyph, note, letters: Math.floor((width - 38 - (folds ? 20 : 0)) / NOTE),
      settle: () => set(name, "y", note.textContent ? height / 2 - 7 : height / 2),
    });
    const fold = folds ? this._fold(node, width - 24, height / 2) : null;
    return s("g", { transform: `translate(${x},${y})` }, button, fold);
  }

  /** A subgraph that is open: its name and state above, its nodes within. */
  _frame(node) {
    const { x, y, width, height, inside } = node;
    const glyph = s("text", { class: "glyph", x: 18, y: 17 });
    const name = fit(node.label, Math.floor((width - 70) / LABEL));
    const note = s("tspan", { class: "note", dx: 10 });
    const button = this._button(node, "node frame",
      s("rect", { class: "halo", x: -4, y: -4, width: width + 8, height: height + 8, rx: 15 }),
      s("rect", { class: "box", width, height, rx: 12 }),
      s("circle", { class: "badge", cx: 18, cy: 17, r: 9 }),
      glyph, s("text", { x: 33, y: 17 }, s("tspan", { class: "label" }, name), note));
    const letters = Math.floor((width - 76 - name.length * LABEL) / NOTE);
    this._nodes.set(node.key, { ...node, group: button, glyph, note, letters, settle() {} });
    return s("g", { transform: `translate(${x},${y})`, role: "group", "aria-label": `Inside ${node.label}` },
      button, this._fold(node, width - 24, 17),
      s("g", { transform: `translate(0,${inside.y})` }, ...this._inside(inside)));
  }

  _button({ key, label }, kind, ...parts) {
    return s("g", {
      class: kind, dataset: { node: key, state: "waiting" },
      ...(this._onPick
        ? { tabindex: -1, role: "button", ...pressed(() => this.pick(key === this._picked ? null : key)) }
        : { role: "img", "aria-label": label }),
    }, s("title", {}, label), ...parts);
  }

  _fold(node, x, y) {
    const open = Boolean(node.inside);
    return s("g", {
      class: "fold", transform: `translate(${x},${y})`, tabindex: -1, role: "button", dataset: { fold: node.key },
      "aria-expanded": String(open), "aria-label": `The inside of ${node.label}`,
      ...pressed(() => this._toggle(node, !open)),
    },
    s("title", {}, open ? "Fold" : "Unfold"),
    s("rect", { class: "reach", x: -9, y: -17, width: 33, height: 34 }),
    s("rect", { class: "face", x: -2, y: -9, width: 18, height: 18, rx: 5 }),
    s("path", { d: open ? "M3,0h8" : "M3,0h8M7,-4v8" }));
  }

  _toggle(node, open) {
    this._chosen.set(node.key, open);
    this._draw();
    announce(`${node.label} is ${open ? "unfolded" : "folded"}.`);
  }

  /** Choose the node with that path, or the one in sight that it is in. */
  pick(key) {
    this._picked = this._shown(key);
    this._mark();
    this._onPick(key);
  }

  /** The node in sight that a path leads to: itself, or the closest one around it. */
  _shown(key) {
    let at = key;
    while (at && !this._nodes.has(at)) at = at.slice(0, Math.max(at.lastIndexOf("/"), 0));
    return at || null;
  }

  render(run) {
    this._run = run;
    const now = run.now();
    const hidden = this._hidden(run);
    for (const [key, { group, glyph, note, letters, label, settle }] of this._nodes) {
      const node = run.nodes.get(key);
      const state = stateOf(node);
      const parts = node ? tell(node, state, now, run.answered).filter(Boolean) : [];
      const told = parts.join(" · ");
      set(group, "data-state", state);
      if (this._onPick) set(group, "aria-label", `${label}: ${state}${told ? `, ${told}` : ""}`);
      say(glyph, GLYPHS[state]);
      const moving = state === "running" ? hidden.get(key) : null;
      say(note, fitting(moving ? [moving] : parts, letters));
      settle();
    }
    this._follow(run);
  }

  /** What goes on out of sight, by the node in sight that it is in. */
  _hidden(run) {
    const notes = new Map();
    for (const node of run.nodes.values()) {
      if (node.depth === 0 || this._nodes.has(node.key)) continue;
      const state = stateOf(node);
      if (state !== "running" && state !== "retrying") continue;
      const open = (node.states.running ?? 0) + (node.states.retrying ?? 0);
      notes.set(this._shown(node.key), `${node.name}${open > 1 ? ` × ${open}` : ""}`);
    }
    return notes;
  }

  /** A drawing that is larger than its place keeps what began last in sight. */
  _follow(run) {
    const key = run.latest && this._shown(run.latest);
    if (key === this._last) return;
    const behavior = this._last ? "auto" : "instant"; // the style sheet says how it moves later
    this._last = key;
    if (!key) return;
    const box = this._nodes.get(key).group.getBoundingClientRect();
    const place = this._canvas.getBoundingClientRect();
    const across = box.left >= place.left && box.right <= place.right;
    const along = box.top >= place.top && box.bottom <= place.bottom;
    if (across && along) return;
    this._canvas.scrollBy({
      left: box.left + box.width / 2 - place.left - place.width / 2,
      top: box.top + box.height / 2 - place.top - place.height / 2,
      behavior,
    });
  }
}

/** Listeners for somebody who presses it, with the mouse or with the keyboard. */
function pressed(press) {
  return {
    click: press,
    keydown: (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      press();
    },
  };
}

/** What stands under a node's name; where there is no room for all of it, the last of it stays. */
function tell(node, state, now, answered) {
  const { last } = node;
  const count = node.visits > 1 ? countOf(node) : "";
  if (state === "retrying") {
    return [`try ${last.attempt + 1} ${again(last.retryAt - now, last.retryBy - now)}`];
  }
  if (state === "running") {
    const since = last.bars.at(-1)?.from ?? now;
    return [duration(now - since), last.attempt > 1 ? `try ${last.attempt}` : "", count];
  }
  if (state === "failed") return [last.error ?? "failed"];
  if (state === "interrupted") return [answered ? "answered" : "needs an answer"];
  if (state === "cached") return ["cached", count];
  return [last.durationMs === null ? "" : duration(last.durationMs), count];
}

/** In how many ms the next attempt begins, at the least and at the most: its pause has a random part. */
function again(least, most) {
  const s = (ms) => (ms / 1000).toFixed(1);
  if (least > 0) return most - least < 50 ? `in ${s(least)} s` : `in ${s(least)}–${s(most)} s`;
  return most > 0 ? `within ${s(most)} s` : "now";
}

function countOf(node) {
  const ended = (node.states.done ?? 0) + (node.states.cached ?? 0);
  return ended < node.visits ? `${ended} of ${node.visits}` : `× ${node.visits}`;
}

function fitting(parts, letters) {
  const text = parts.join(" · ");
  return parts.length > 1 && text.length > letters ? fitting(parts.slice(1), letters) : fit(text, letters);
}

const fit = (text, length) => (text.length > length ? `${text.slice(0, Math.max(length - 1, 1))}…` : text);
