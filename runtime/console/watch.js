// The view of one run: a reader feeds the fold, and what it tells is drawn once per frame.

import * as api from "./api.js";
import { announce, chip, copyButton, duration, h, quoted, say, set } from "./dom.js";
import { Drawing } from "./drawing.js";
import { Lines, countOf } from "./lines.js";
import { FAILED, questionView } from "./question.js";
import { Reader } from "./reader.js";
import { Run } from "./run.js";
import { Texts, moved } from "./texts.js";
import { Waterfall } from "./waterfall.js";

const TICK_MS = 100;
/** What is said when the status changes, and why a run failed where no error of a graph tells it. */
const SAID = {
  pending: "The run is queued.",
  running: "The run goes on.",
  success: "The run has succeeded.",
  error: "The run has failed.",
  timeout: "The run has timed out.",
  cancelled: "The run was cancelled.",
  interrupted: "The run was interrupted.",
};
const REASONS = {
  log_limit: "The run wrote more lines, or more bytes, than the server allows for one run",
};

export class Watch {
  /** `onChange` is called when the run's status changes, `onRun` with a run to go to. */
  constructor(runId, { graphs, info, onChange, onRun }) {
    this._info = info;
    this._graphs = graphs;
    this._onChange = onChange;
    this._onRun = onRun;
    this._dirty = true;
    this._status = null;
    this._told = null;
    this._drawing = null;
    this._asked = false;
    /** When the last frame was drawn, and how long that took. */
    this._drawnAt = 0;
    this._cost = 0;
    this._texts = new Texts();
    this._lines = new Lines();
    this._lines.onClear = () => this._pick(null);
    this._waterfall = new Waterfall((visit) => this._pick(visit.key));
    this.run = new Run(runId);
    this.element = this._build();
    this.reader = new Reader(runId, {
      onLines: (batch) => this._take(batch),
      onStatus: (status) => this._connection(status),
      onReset: () => this._reset(),
    });
    this._timer = setInterval(() => {
      if (!this.run.over || this._dirty) this._frame();
    }, TICK_MS);
  }

  close() {
    this.reader.close();
    clearInterval(this._timer);
    this._closed = true;
  }

  _build() {
    const { runId } = this.run;
    this._title = h("h1", { tabindex: -1 }, "Run");
    this._chip = h("span", {});
    this._cancel = h("button", { type: "button", class: "danger", hidden: true, click: () => this._cancelRun() }, "Cancel");
    this._elapsed = h("span", { class: "elapsed" });
    this._facts = h("dl", { class: "facts" });
    this._link = h("p", { class: "link", role: "status" });
    this._countdown = h("span", { class: "hint", "aria-hidden": "true" });
    this._retry = h("button", { type: "button", class: "quiet", hidden: true, click: () => this.reader.retryNow() }, "Try now");
    this._stage = h("section", { class: "panel stage", "aria-label": "Drawing" });
    this._question = h("div", { class: "question", answered: () => this._answered() });
    this._outcome = h("section", { class: "panel outcome", "aria-label": "Outcome", hidden: true });
    const curl = `curl -N ${quoted(api.address(`v1/runs/${runId}/stream?after=0`))}`;
    return h("div", { class: "view watch" },
      h("header", { class: "run-head" },
        h("div", { class: "bar-row" }, this._title, this._chip, this._elapsed, this._cancel),
        this._facts,
        h("div", { class: "connection" }, this._link, this._countdown, this._retry)),
      this._stage,
      this._question,
      this._outcome,
      h("div", { class: "pair" },
        h("section", { class: "panel" }, h("h2", {}, "Text"), this._texts.element),
        h("section", { class: "panel" }, h("h2", {}, "Waterfall"), this._waterfall.element)),
      h("section", { class: "panel" }, h("h2", {}, "Lines"), this._lines.element),
      h("section", { class: "panel" },
        h("div", { class: "bar-row" }, h("h2", {}, "The same with curl"), copyButton("Copy", () => curl, "Copy the command")),
        h("pre", { class: "curl", tabindex: 0, "aria-label": "The same with curl" }, curl)));
  }

  _take(batch) {
    for (const { line } of batch) this.run.fold(line);
    this._lines.append(batch);
    this._soon();
  }

  _reset() {
    this.run = new Run(this.run.runId);
    this._lines.reset();
    this._stage.replaceChildren();
    this._drawing = null;
    this._told = null;
    this._asked = false;
    this._question.replaceChildren();
    this._outcome.hidden = true;
    this._soon();
  }

  /** Draw in the next frame, however many batches come before it; a replay, and who draws slowly, waits for the tick. */
  _soon() {
    if (this._dirty) return;
    this._dirty = true;
    const rested = performance.now() - this._drawnAt > 3 * this._cost;
    if (rested && this._connectionNow?.kind !== "reading") requestAnimationFrame(() => this._frame());
  }

  _frame() {
    if (this._closed) return;
    this._dirty = false;
    const began = performance.now();
    const { run } = this;
    if (run.graph && !this._drawing) this._draw();
    this._drawing?.render?.(run);
    this._waterfall.render(run);
    this._texts.render(run);
    this._lines.render(run);
    this._renderHead();
    if (run.status !== this._told) this._tell();
    if (this._connectionNow?.kind === "waiting") this._renderConnection();
    this._drawnAt = performance.now();
    this._cost = this._drawnAt - began;
  }

  async _draw() {
    const { graph: name } = this.run;
    this._drawing = {};
    const shape = await api.drawing(name).catch(() => null);
    const graph = this._graphs.find((one) => one.name === name) ?? { name, nodes: [] };
    if (!shape && !graph.nodes.length) return;
    this._drawing = new Drawing(shape, graph, (node) => this._lines.only(node));
    this._stage.replaceChildren(this._drawing.element);
    this._soon();
  }

  _pick(node) {
    if (this._drawing?.pick) this._drawing.pick(node);
    else this._lines.only(node);
  }

  _renderHead() {
    const { run } = this;
    say(this._title, run.graph ?? "Run");
    const from = run.startedAt ?? run.queuedAt;
    say(this._elapsed, from === null ? "" : duration(run.result?.duration_ms ?? run.now() - from));
    this._show(this._cancel, run.status !== null && !run.over);
    if (this._factsOf !== `${run.threadId} ${run.traceId} ${run.epoch}`) {
      this._factsOf = `${run.threadId} ${run.traceId} ${run.epoch}`;
      this._renderFacts();
    }
  }

  _renderFacts() {
    const { run } = this;
    const facts = [["Run", h("code", {}, run.runId)], ["Thread", h("code", {}, run.threadId ?? "")]];
    if (run.epoch > 1) facts.push(["Epoch", String(run.epoch)]);
    if (run.traceId) {
      const shown = traceUrl(this._info.trace_url, run);
      const href = shown ?? api.address(`v1/runs/${run.runId}/trace`);
      const title = shown ? null : "The spans as OTLP/JSON; set SERENO_TRACE_URL to link to where traces are shown";
      facts.push(["Trace", h("a", { href, title, target: "_blank", rel: "noreferrer" }, h("code", {}, run.traceId))]);
    }
    this._facts.replaceChildren(...facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }

  /** Show or hide a button; one that goes away leaves the focus with the heading. */
  _show(button, shown) {
    if (!shown && button === document.activeElement) this._title.focus({ preventScroll: true });
    button.hidden = !shown;
  }

  /** What changes with the run's status. */
  _tell() {
    const { run } = this;
    this._told = run.status;
    this._chip.replaceChildren(chip(run.status));
    document.title = `${run.graph} · ${run.status} · Sereno`;
    announce(SAID[run.status]);
    this._onChange();
    if (!run.over) return;
    this._renderOutcome();
    // The thread of a run that took an answer and failed still asks.
    if (["interrupted", ...FAILED].includes(run.status) && !this._asked) this._ask();
  }

  _renderOutcome() {
    const { result, status } = this.run;
    const numbers = [
      ["took", duration(result.duration_ms)], ["queued", duration(result.queue_ms)],
      ["visits", result.nodes], ["attempts", result.attempts], ["retries", result.retries],
      ["back-off", result.backoff_ms > 0 ? duration(result.backoff_ms) : ""],
      ["tokens", result.tokens && `${result.tokens.input} in, ${result.tokens.output} out`],
    ].filter(([, value]) => value !== undefined && value !== "" && value !== null);
    const { error } = result;
    this._outcome.hidden = false;
    this._outcome.replaceChildren(
      h("h2", {}, "Outcome"),
      h("dl", { class: "facts" }, ...numbers.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, String(value))))),
      error ? h("p", { class: "problem" }, moved(error) ?? [REASONS[error.code] ?? error.error_type ?? error.code, error.node && `in ${error.node}`, error.detail].filter(Boolean).join(" · ")) : "",
      status === "cancelled" && result.reason ? h("p", {}, `Reason: ${result.reason}`) : "",
      "output" in result ? outputView(result.output) : "");
  }

  async _ask() {
    this._asked = true;
    const { run } = this;
    let problem = null;
    const view = await questionView(run, this._onRun).catch((raised) => (problem = raised));
    if (run !== this.run) return; // the log is another one now
    const held = this._question.contains(document.activeElement);
    this._question.replaceChildren(problem ? unasked(problem, () => this._ask()) : view);
    if (held) (this._question.querySelector("textarea, input, button, a") ?? this._title).focus({ preventScroll: true });
    if (run.status === "interrupted" && !problem && !this._question.querySelector("form")) this._answered();
  }

  /** Another run goes on from the question of this one. */
  _answered() {
    this.run.answered = true;
    this._soon();
  }

  async _cancelRun() {
    if (this._cancel.ariaDisabled) return;
    this._cancel.ariaDisabled = "true"; // a button that is disabled loses the focus
    say(this._cancel, "Cancelling…");
    try {
      await api.cancel(this.run.runId, "asked for on the page");
    } catch (problem) {
      announce(problem.message);
      say(this._cancel, "Cancel");
      this._cancel.ariaDisabled = null;
    }
  }

  _connection(status) {
    if (status.kind === "ended" && !this.run.over) {
      status = { ...status, kind: "refused", why: "it has nothing more to tell of this run, not even how it ended" };
    }
    const before = this._connectionNow;
    this._connectionNow = { ...status, resumedAt: before?.resumedAt ?? null };
    const cut = ["waiting", "refused"].includes(status.kind);
    if (cut) this.run.cutAt ??= this.run.now();
    else this.run.cutAt = null;
    set(this.element, "data-cut", cut ? "" : null);
    if (cut && before?.kind !== "waiting") this._onChange();
    if (before?.kind === "waiting" && status.kind === "reading") this._connectionNow.resumedAt = status.cursor;
    this._renderConnection();
  }

  _renderConnection() {
    const { kind, cursor, until, tries, resumedAt, why } = this._connectionNow;
    const lines = countOf(cursor);
    const over = this.run.status === "interrupted" ? "The run stopped at a question or a breakpoint" : "The run has ended";
    const left = until ? Math.max(0, (until - Date.now()) / 1000) : 0;
    const again = resumedAt === null ? "" : ` The connection was cut and went on behind line ${resumedAt}; nothing was lost.`;
    const said = {
      connecting: "Connecting…",
      reading: `Reading what is stored.${again}`,
      live: `Live.${again}`,
      waiting: `The connection was cut after ${lines}; the run may go on without us.`,
      ended: `${over}, and all of its ${lines} were read.${again}`,
      refused: `The server refuses: ${why}`,
    };
    set(this._link, "data-kind", kind);
    say(this._link, said[kind]);
    const next = left >= 1 ? `Try ${tries} in ${Math.ceil(left)} s.` : `Try ${tries}…`;
    say(this._countdown, kind === "waiting" ? next : "");
    this._show(this._retry, kind === "waiting");
  }
}

/** What stands where the question could not be read. */
const unasked = (problem, again) => h("section", { class: "panel help" },
  h("p", { class: "problem", role: "alert" }, `What the run asks could not be read. ${problem.message}`),
  h("button", { type: "button", click: again }, "Try again"));

function outputView(output) {
  const link = moved(output);
  if (link) return h("p", { class: "moved" }, h("span", {}, "Output"), link);
  const json = JSON.stringify(output, null, 2);
  return h("details", { open: json.length < 4000 }, h("summary", {}, "Output"),
    h("pre", { tabindex: 0, "aria-label": "Output" }, json));
}

/** The link to a trace, when a template says where traces are kept. */
function traceUrl(template, run) {
  if (!template) return null;
  const url = template.replaceAll("{trace_id}", run.traceId).replaceAll("{run_id}", run.runId);
  return /^https?:/.test(url) ? url : null;
}
