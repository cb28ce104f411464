// Every visit of a node as a bar in time: attempts solid, waits between and within them striped.

import { GLYPHS, duration, h, say, set } from "./dom.js";

/** More rows than this are neither read nor drawn in time; the latest ones are kept. */
const ROWS = 200;
const STEPS = [1, 2, 5];
/** These ends are told beside the time as well, not by a colour alone. */
const TOLD = ["failed", "interrupted", "cancelled"];
/** The widest that a letter of the axis is. */
const LETTER = 7;

export class Waterfall {
  constructor(onPick) {
    this._onPick = onPick;
    this._rows = new Map();
    this._axis = h("div", { class: "scale" });
    this._list = h("ol", { class: "rows" });
    this._note = h("p", { class: "hint", hidden: true });
    this.element = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Waterfall" },
      h("div", { class: "axis", "aria-hidden": "true" }, this._axis), this._note, this._list);
  }

  render(run) {
    const from = run.startedAt ?? run.queuedAt;
    if (from === null) return;
    const { scrollHeight, scrollTop, clientHeight } = this.element;
    const atEnd = scrollHeight - scrollTop - clientHeight < 40;
    const span = Math.max(run.now() - from, 100);
    this._renderAxis(span, run.recoveries.map(({ at }) => (at - from) / span));
    const visits = [...run.visits.values()];
    const shown = visits.slice(-ROWS);
    this._note.hidden = visits.length <= ROWS;
    say(this._note, `The latest ${ROWS} of ${visits.length} visits.`);
    for (const [task, row] of this._rows) {
      if (this._rows.size <= ROWS) break;
      row.element.remove();
      this._rows.delete(task);
    }
    for (const visit of shown) this._renderRow(visit, from, span, run.now());
    if (atEnd) this.element.scrollTop = this.element.scrollHeight;
  }

  _renderAxis(span, recoveries) {
    const width = this._axis.clientWidth;
    const key = `${span} ${recoveries.length} ${width}`;
    if (this._key === key) return;
    this._key = key;
    // Marks that came first keep their place; a text that would touch another one is left out.
    const taken = [];
    const mark = (at, text, kind) => {
      const from = at * width;
      const to = from + text.length * LETTER + 8;
      const fits = to <= width + 8 && taken.every(([start, end]) => to < start || from > end);
      if (fits) taken.push([from, to]);
      const element = h("span", { class: kind }, fits ? text : "");
      element.style.left = `${at * 100}%`;
      return element;
    };
    const marks = recoveries.map((at) => mark(at, "↻", "tick recovery"));
    const step = tick(span, width);
    for (let at = 0; at <= span; at += step) marks.push(mark(at / span, at ? duration(at) : "0", "tick"));
    this._axis.replaceChildren(...marks);
  }

  _renderRow(visit, from, span, now) {
    let row = this._rows.get(visit.task);
    if (row?.final && row.span === span) return;
    if (!row) {
      const time = h("span", { class: "time" });
      const lane = h("span", { class: "lane", "aria-hidden": "true" });
      const name = h("button", { type: "button", class: "name", click: () => this._onPick(visit) }, visit.node);
      name.style.paddingInlineStart = `${visit.depth * 14 + 6}px`;
      row = { element: h("li", {}, name, lane, time), name, lane, time, bars: [] };
      row.element.dataset.depth = visit.depth;
      this._rows.set(visit.task, row);
      this._place(row, visit);
    }
    set(row.element, "data-state", visit.state);
    set(row.name, "aria-label", `${visit.node}: ${visit.state}`);
    visit.bars.forEach((bar, index) => {
      const until = bar.to ?? now;
      const element = (row.bars[index] ??= row.lane.appendChild(h("span", { class: "bar" })));
      set(element, "data-outcome", bar.kind === "attempt" ? bar.outcome ?? "running" : bar.kind);
      lay(element, bar.from - from, until - bar.from, span);
      bar.pauses.forEach((pause, at) => {
        const inside = element.children[at] ?? element.appendChild(h("span", { class: "pause" }));
        lay(inside, pause.from - bar.from, pause.to - pause.from, until - bar.from);
      });
    });
    const first = visit.bars[0]?.from ?? now;
    const attempts = visit.bars.filter((bar) => bar.kind === "attempt").length;
    // A visit that went on after a crash was measured from there only.
    const measured = visit.bars.some((bar) => bar.outcome === "lost") ? null : visit.durationMs;
    const total = duration(measured ?? (visit.bars.at(-1)?.to ?? now) - first);
    const glyph = TOLD.includes(visit.state) ? `${GLYPHS[visit.state]} ` : "";
    say(row.time, `${glyph}${total}${attempts > 1 ? ` · ${attempts} tries` : ""}`);
    row.final = visit.durationMs !== null;
    row.span = span;
  }

  /** Behind all that is in the same visit of a subgraph. */
  _place(row, { parent, depth }) {
    let next = this._rows.get(parent)?.element.nextElementSibling ?? null;
    while (next && Number(next.dataset.depth) >= depth) next = next.nextElementSibling;
    this._list.insertBefore(row.element, next);
  }
}

/** Where something begins, and how long it lasts, in what is `whole` long. */
function lay(element, from, lasts, whole) {
  element.style.left = `${(from / whole) * 100}%`;
  element.style.width = `${(lasts / whole) * 100}%`;
}

/** A round number of milliseconds, so that its marks have room. */
function tick(span, width) {
  const most = Math.max(2, Math.min(6, Math.floor(width / (9 * LETTER))));
  for (let power = 1; ; power *= 10) {
    for (const step of STEPS) if (span / (step * power) <= most) return step * power;
  }
}
