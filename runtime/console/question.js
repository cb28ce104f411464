// What a run that was interrupted asks, and the answer that goes on with a new run.

import * as api from "./api.js";
import { announce, h, say, set } from "./dom.js";
import { FieldError, formOf } from "./form.js";

const LOOK_MS = 5000;

/**
 * The question of a run that was interrupted, or of one whose answer did not fit;
 * `onRun` gets the id of the run that an answer starts. Empty where nothing is asked.
 */
export async function questionView(run, onRun) {
  const place = h("div", {});
  const asking = await askingOf(run);
  if (!asking) return "";
  if (asking.later) place.append(answered(asking.later));
  else place.append(questionForm(run, asking, { onRun, onLate: (later) => place.replaceChildren(answered(later)) }));
  return place;
}

/** What is asked: `{ interrupts, misfit }`, or the run that has answered it: `{ later }`. */
async function askingOf(run) {
  const latest = await latestOn(run.threadId);
  if (run.status === "interrupted" && (!latest || latest.run_id === run.runId)) {
    return { interrupts: await interruptsOf(run.runId, run.result), next: run.result.next };
  }
  // An answer that did not fit ends its run with an error, and the thread still asks.
  if (latest?.status === "error") {
    const { interrupts } = await api.threadState(run.threadId).catch(() => ({ interrupts: [] }));
    if (interrupts.length) return { interrupts, misfit: latest.run_id };
  }
  return run.status === "interrupted" ? { later: latest } : null;
}

/** The run that was started last on a thread; undefined when nobody can say. */
async function latestOn(thread) {
  const { runs: [latest] } = await api.runs({ thread_id: thread, limit: 1 }).catch(() => ({ runs: [] }));
  return latest;
}

/** The interrupts of a terminal line; those too large for the line are asked for. */
async function interruptsOf(runId, { interrupts = [] }) {
  return Array.isArray(interrupts) ? interrupts : await api.member(interrupts.$ref);
}

const answered = (later) => h("section", { class: "panel" },
  h("p", { role: "status" }, "This was answered; the thread goes on with ",
    h("a", { href: `#/runs/${encodeURIComponent(later.run_id)}` }, later.run_id), "."));

function questionForm(run, { interrupts, next, misfit }, { onRun, onLate }) {
  const several = interrupts.length > 1;
  const error = h("p", { class: "problem", role: "alert", hidden: true });
  const clear = () => {
    error.hidden = true;
    for (const { field } of fields) field.complain?.(null);
  };
  const fields = interrupts.map((interrupt, index) => answerField(interrupt, several ? index + 1 : 0, clear));
  const send = h("button", { type: "submit", class: "primary" }, fields.length ? (several ? "Answer all" : "Answer") : "Go on");
  const element = h("form", {
    class: "panel asks", submit, novalidate: true, "aria-label": "The run asks",
    keydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && submit(event),
  },
  h("h2", {}, fields.length ? waits(fields.length) : "The run stopped at a breakpoint"),
  misfit ? h("p", { class: "problem" }, "The run that took an answer has failed, and the thread asks again: ",
    h("a", { href: `#/runs/${encodeURIComponent(misfit)}` }, misfit), ".") : null,
  !fields.length && next?.length ? h("p", { class: "hint" }, `It goes on at ${next.join(", ")}.`) : null,
  ...fields.map((field) => field.element),
  error,
  h("div", { class: "bar-row" }, send, h("span", { class: "hint" }, "Ctrl + Enter")));

  function complain(text, field) {
    error.hidden = false;
    say(error, text);
    field?.focus();
  }

  async function submit(event) {
    event.preventDefault();
    if (send.disabled) return;
    clear();
    const answer = {};
    for (const one of fields) {
      try {
        answer[one.id] = one.field.read();
        if (answer[one.id] === undefined) throw new FieldError(one.field, "this waits for an answer");
      } catch (problem) {
        if (!(problem instanceof FieldError)) throw problem;
        problem.field.complain?.(problem.told);
        complain(problem.message, problem.field);
        return;
      }
    }
    send.disabled = true;
    try {
      const started = await api.resume(run.threadId, fields.length ? answer : null);
      announce("Answered; the thread goes on.");
      onRun(started.run_id);
    } catch (problem) {
      send.disabled = false;
      if (!await lookForLater()) complain(problem.message, fields[0]?.field);
    }
  }

  /** Somebody else may have answered. Whether it is so. */
  async function lookForLater() {
    const latest = await latestOn(run.threadId);
    if (!latest || latest.run_id === (misfit ?? run.runId)) return false;
    clearInterval(timer);
    announce("This was answered elsewhere.");
    onLate(latest);
    return true;
  }

  const timer = setInterval(() => {
    if (!element.isConnected) clearInterval(timer);
    else if (!document.hidden && !send.disabled) lookForLater();
  }, LOOK_MS);
  announce(fields.length ? waits(fields.length) : "The run stopped at a breakpoint");
  return element;
}

const waits = (count) => (count > 1 ? `The run waits for ${count} answers` : "The run waits for an answer");

/** One question and the field for its answer; `number` tells several apart. */
function answerField({ id, value, response_schema: schema }, number, onChange) {
  const title = number ? `Answer ${number}` : "Answer";
  const field = schema
    ? formOf(schema, onChange, { name: title, complete: true })
    : freeField(id, title, suggestions(value), onChange);
  return {
    id,
    field,
    element: number
      ? h("fieldset", { class: "ask" }, h("legend", {}, `Question ${number}`), asked(value), field.element)
      : h("div", { class: "ask" }, asked(value), field.element),
  };
}

/** Text or JSON, whichever it is; the page says how it takes it. */
function freeField(id, title, suggested, onChange) {
  const how = h("span", { class: "hint", id: `how-${id}` });
  const input = h("textarea", {
    id: `answer-${id}`, rows: 2, spellcheck: "false", "aria-describedby": `how-${id} wrong-${id}`,
    input: () => {
      say(how, input.value === "" ? "Text, or JSON." : `Sent as ${kindOf(input.value)}.`);
      onChange();
    },
  });
  const wrong = h("p", { class: "problem", id: `wrong-${id}`, hidden: true });
  say(how, "Text, or JSON.");
  const write = (text) => {
    input.value = text;
    input.dispatchEvent(new Event("input"));
    input.focus();
  };
  return {
    title,
    read: () => (input.value === "" ? undefined : parsed(input.value)),
    complain(text) {
      set(input, "aria-invalid", text === null ? null : "true");
      wrong.hidden = text === null;
      say(wrong, text ?? "");
    },
    focus: () => input.focus(),
    element: h("div", { class: "field" }, h("label", { for: input.id }, title), input, wrong,
      h("div", { class: "bar-row" }, how, ...suggested.map((text) =>
        h("button", { type: "button", class: "quiet", click: () => write(text) }, text)))),
  };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

const kindOf = (text) => (typeof parsed(text) === "string" ? "text" : "JSON");

/** A question may name answers, as JSON or in words; only what is JSON can be put in. */
const suggestions = (value) =>
  (Array.isArray(value?.answers) ? value.answers : [])
    .map((answer) => (typeof answer === "string" ? answer : JSON.stringify(answer)))
    .filter((answer) => typeof parsed(answer) !== "string");

/** The value of an interrupt: texts as text, the rest as JSON. */
function asked(value) {
  if (typeof value === "string") return h("p", { class: "asked" }, value);
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    return h("pre", {}, JSON.stringify(value, null, 2));
  }
  const { question, answers, ...rest } = value;
  return h("div", {},
    typeof question === "string" ? h("p", { class: "asked" }, question) : null,
    h("dl", { class: "asked-more" }, ...Object.entries(typeof question === "string" ? rest : { question, ...rest })
      .filter(([, part]) => part !== undefined)
      .map(([name, part]) => h("div", {}, h("dt", {}, name), h("dd", {},
        typeof part === "string" ? h("div", { class: "said" }, part) : h("pre", {}, JSON.stringify(part, null, 2)))))));
}
