// The raw lines: as many as there are, of which only those in sight are elements.

import { announce, clock, copy, copyButton, h, say, set } from "./dom.js";

const ROW = 22;
const MARGIN = 10;

export class Lines {
  constructor() {
    this._all = [];
    this._shown = [];
    this._run = null;
    this._picked = null;
    this._follow = true;
    this._rows = new Map();
    this._known = new Set();
    this._keyWidth = 0;
    this._filter = { text: "", type: "", node: null };

    this._search = h("input", {
      type: "search", placeholder: "Filter", "aria-label": "Filter lines by text",
      input: () => this._refilter({ text: this._search.value.trim().toLowerCase() }),
    });
    this._types = h("select", {
      "aria-label": "Filter lines by type",
      change: () => this._refilter({ type: this._types.value }),
    }, h("option", { value: "" }, "every type"));
    this._node = h("button", { type: "button", class: "quiet", hidden: true, click: () => this._onClear() });
    this._count = h("span", { class: "hint count" });
    this._space = h("div", { class: "space" });
    this._list = h("div", {
      class: "lines", tabindex: 0, role: "listbox", "aria-label": "Lines",
      scroll: () => this._scrolled(), keydown: (event) => this._key(event),
    }, this._space);
    this._none = h("p", { class: "hint none", hidden: true }, "No line fits.");
    this._text = h("pre", { tabindex: 0, "aria-label": "The chosen line" });
    this._detail = h("div", { class: "detail", hidden: true },
      h("div", { class: "bar-row" },
        copyButton("Copy line", () => this._pickedText()),
        h("button", { type: "button", class: "quiet", click: () => this._unpick() }, "Close")),
      this._text);
    this.element = h("div", { class: "lines-panel" },
      h("div", { class: "bar-row" }, this._search, this._types, this._node, this._count,
        copyButton("Copy", () => this._shown.map((item) => `${item.text}\n`).join(""), "Copy the lines")),
      this._none, this._list, this._detail);
    this._detail.addEventListener("keydown", (event) => event.key === "Escape" && this._unpick());
    new ResizeObserver(() => this._draw()).observe(this._list);
  }

  /** `onClear` is called when the filter by node is taken away here. */
  set onClear(clear) {
    this._onClear = clear;
  }

  reset() {
    this._all = [];
    this._picked = null;
    this._detail.hidden = true;
    this._refilter({});
  }

  append(batch) {
    for (const { line, text } of batch) {
      if (line.seq === undefined) continue;
      const item = { seq: line.seq, ts: line.ts, type: line.type, text, key: keyOf(line), attempt: line.attempt };
      this._all.push(item);
      this._offer(line.type);
      this._keyWidth = Math.max(this._keyWidth, whereOf(item).length);
      if (this._passes(item)) this._shown.push(item);
    }
  }

  render(run) {
    this._run = run;
    this._draw();
  }

  /** Only the lines of a node and of what is inside it. */
  only(node) {
    const held = document.activeElement === this._node;
    this._node.hidden = node === null;
    say(this._node, node === null ? "" : `${node} ✕`);
    set(this._node, "aria-label", `Show the lines of every node, not only ${node}`);
    this._refilter({ node });
    // The focus is not lost with the button that had it.
    if (held && this._node.hidden) (this._list.hidden ? this._search : this._list).focus({ preventScroll: true });
  }

  _offer(type) {
    if (this._known.has(type)) return;
    this._known.add(type);
    this._types.append(h("option", { value: type }, type));
  }

  _passes({ type, key, text }) {
    const { text: wanted, type: only, node } = this._filter;
    return (!only || type === only)
      && (node === null || key === node || key?.startsWith(`${node}/`))
      && (!wanted || text.toLowerCase().includes(wanted));
  }

  _refilter(change) {
    Object.assign(this._filter, change);
    this._shown = this._all.filter((item) => this._passes(item));
    this._follow = true;
    this._clear();
    this._draw();
  }

  _clear() {
    for (const row of this._rows.values()) row.remove();
    this._rows.clear();
  }

  _scrolled() {
    const { scrollHeight, scrollTop, clientHeight } = this._list;
    this._follow = scrollHeight - scrollTop - clientHeight < 2 * ROW;
    this._draw();
  }

  _draw() {
    const total = this._shown.length;
    const all = countOf(this._all.length);
    say(this._count, total === this._all.length ? all : `${total.toLocaleString()} of ${all}`);
    this._none.hidden = total > 0 || !this._all.length;
    this._list.hidden = !this._none.hidden;
    this._space.style.height = `${total * ROW}px`;
    this._list.style.setProperty("--key", `${this._keyWidth}ch`);
    if (this._follow) this._list.scrollTop = this._list.scrollHeight;
    const first = Math.max(0, Math.floor(this._list.scrollTop / ROW) - MARGIN);
    const last = Math.min(total, Math.ceil((this._list.scrollTop + this._list.clientHeight) / ROW) + MARGIN);
    const wanted = new Set();
    for (let index = first; index < last; index++) wanted.add(this._drawRow(index));
    for (const [seq, row] of this._rows) {
      if (wanted.has(seq)) continue;
      row.remove();
      this._rows.delete(seq);
    }
    set(this._list, "aria-activedescendant", this._rows.has(this._picked) ? `line-${this._picked}` : null);
  }

  _drawRow(index) {
    const item = this._shown[index];
    let row = this._rows.get(item.seq);
    if (!row) {
      row = h("div", {
        class: "line", id: `line-${item.seq}`, role: "option", dataset: { type: item.type, seq: item.seq },
        click: () => this._pick(index),
      },
      h("span", { class: "seq" }, item.seq), h("span", { class: "at", "aria-hidden": "true" }, clock(item.ts)),
      h("span", { class: "type" }, item.type),
      h("span", { class: "key" }, whereOf(item)), h("span", { class: "data" }, dataOf(item.text)));
      this._rows.set(item.seq, row);
      this._list.append(row);
    }
    row.style.transform = `translateY(${index * ROW}px)`;
    set(row, "aria-posinset", index + 1);
    set(row, "aria-setsize", this._shown.length);
    set(row, "aria-selected", item.seq === this._picked);
    row.classList.toggle("gone", this._run?.discarded.has(item.seq) ?? false);
    return item.seq;
  }

  _pick(index) {
    const item = this._shown[index];
    this._follow = false;
    const same = this._picked === item.seq;
    this._picked = same ? null : item.seq;
    this._detail.hidden = same;
    if (!same) say(this._text, JSON.stringify(JSON.parse(item.text), null, 2));
    this._draw();
  }

  _pickedText() {
    return this._all.find((item) => item.seq === this._picked)?.text ?? "";
  }

  /** The focus goes back to the list, which the chosen line was chosen from. */
  _unpick() {
    this._picked = null;
    this._detail.hidden = true;
    this._draw();
    this._list.focus({ preventScroll: true });
  }

  _key(event) {
    if (this._picked !== null && event.key === "Escape") this._unpick();
    const copies = event.key === "c" && (event.ctrlKey || event.metaKey) && getSelection().isCollapsed;
    if (this._picked !== null && copies) copy(this._pickedText()).then((done) => announce(done ? "Line copied" : "Not allowed to copy"));
    const page = Math.floor(this._list.clientHeight / ROW) - 1;
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
    if (!(event.key in steps) || !this._shown.length) return;
    event.preventDefault();
    const last = this._shown.length - 1;
    const now = this._shown.findIndex((item) => item.seq === this._picked);
    const from = now >= 0 ? now : Math.floor(this._list.scrollTop / ROW);
    const next = Math.min(last, Math.max(0, from + steps[event.key]));
    if (next === now) return;
    const top = next * ROW;
    const { scrollTop, clientHeight } = this._list;
    if (top < scrollTop) this._list.scrollTop = top;
    if (top + ROW > scrollTop + clientHeight) this._list.scrollTop = top + ROW - clientHeight;
    this._pick(next);
  }
}

/** How many lines, in words. */
export const countOf = (lines) => `${lines.toLocaleString()} ${lines === 1 ? "line" : "lines"}`;

const keyOf = (line) => (line.node ? [...line.ns, line.node].join("/") : null);

const whereOf = ({ key, attempt }) => (key ? `${key}${attempt > 1 ? ` #${attempt}` : ""}` : "");

/** The data of a line, beginning with what was said: its ids alone would fill the row. */
function dataOf(line) {
  const { text, value, ...rest } = JSON.parse(line).data;
  return JSON.stringify({ text, value, ...rest }).slice(0, 400);
}
