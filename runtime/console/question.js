// What a run that was interrupted asks, and the answer that goes on with a new run.

import * as api from "./api.js";
import { announce, h, say, set } from "./dom.js";
import { FieldError, formOf, fromJson } from "./form.js";

const LOOK_MS = 5000;

/** How a run ends that may leave the question of its thread unanswered. */
export const FAILED = ["error", "timeout", "cancelled"];

/**
 * The question of a run that was interrupted, or of one that took an answer and failed;
 * `onRun` gets the id of the run that an answer starts. Empty where nothing is asked.
 */
export async function questionView(run, onRun) {
  const asking = await askingOf(run);
  if (!asking) return "";
  return asking.later ? answered(asking.later) : questionForm(run, asking, onRun);
}

/** What is asked: `{ interrupts, failed }`, or the run that has answered it: `{ later }`. */
async function askingOf(run) {
  const latest = await latestOn(run.threadId);
  if (run.status === "interrupted" && (!latest || latest.run_id === run.runId)) {
    return { interrupts: await interruptsOf(run), next: run.result.next };
  }
  // An answer that does not fit ends its run with an error; the thread asks on, as when it is cancelled.
  if (FAILED.includes(latest?.status)) {
    const { interrupts } = await api.threadState(run.threadId).catch(() => ({ interrupts: [] }));
    if (interrupts.length) return { interrupts, failed: latest.run_id };
  }
  return run.status === "interrupted" ? { later: latest } : null;
}

/** The run that was started last on a thread; undefined when nobody can say. */
async function latestOn(thread) {
  const { runs: [latest] } = await api.runs({ thread_id: thread, limit: 1 }).catch(() => ({ runs: [] }));
  return latest;
}

/** The interrupts of a terminal line; those too large for the line are asked for, or for the log: the thread has them. */
async function interruptsOf({ threadId, result: { interrupts = [] } }) {
  if (Array.isArray(interrupts)) return interrupts;
  return interrupts.$ref ? api.member(interrupts.$ref) : (await api.threadState(threadId)).interrupts;
}

const answered = (later) => h("section", { class: "panel", tabindex: -1 },
  h("p", { role: "status" }, "This was answered; the thread goes on with ",
    h("a", { href: `#/runs/${encodeURIComponent(later.run_id)}` }, later.run_id), "."));

function questionForm(run, { interrupts, next, failed }, onRun) {
  const several = interrupts.length > 1;
  const error = h("p", { class: "problem", role: "alert", hidden: true });
  const clear = () => {
    error.hidden = true;
    for (const { field } of fields) field.complain?.(null);
  };
  const fields = interrupts.map((interrupt, index) => answerField(interrupt, several ? index + 1 : 0, clear));
  const send = h("button", { type: "submit", class: "primary" }, fields.length ? (several ? "Answer all" : "Answer") : "Go on");
  const heading = h("h2", {}, fields.length ? waits(fields.length) : "The run stopped at a breakpoint");
  let touched = false;
  let sending = false;
  const element = h("form", {
    class: "panel asks", submit, novalidate: true, "aria-label": "The run asks", input: () => (touched = true),
    keydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && submit(event),
  },
  heading,
  failed ? h("p", { class: "problem" }, "The run that took an answer came to nothing, and the thread asks again: ",
    h("a", { href: `#/runs/${encodeURIComponent(failed)}` }, failed), ".") : null,
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
    if (sending) return;
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
    sending = true; // a button that is disabled would lose the focus
    set(send, "aria-disabled", "true");
    try {
      const started = await api.resume(run.threadId, fields.length ? answer : null);
      announce("Answered; the thread goes on.");
      onRun(started.run_id);
    } catch (problem) {
      if (await lookForLater()) return;
      sending = false;
      set(send, "aria-disabled", null);
      complain(problem.message, fields[0]?.field);
    }
  }

  /** Somebody else may have answered. Whether it is so. */
  async function lookForLater() {
    const latest = await latestOn(run.threadId);
    if (!latest || latest.run_id === (failed ?? run.runId)) return false;
    clearInterval(timer);
    sending = true;
    announce("This was answered elsewhere.");
    place.dispatchEvent(new Event("answered", { bubbles: true }));
    const told = answered(latest);
    const held = place.contains(document.activeElement);
    if (touched) {
      place.prepend(told);
      close();
    } else place.replaceChildren(told);
    if (held) told.focus();
    return true;
  }

  /** What was written can still be read and copied. */
  function close() {
    say(heading, "What you wrote was not sent");
    for (const control of element.elements) {
      if (control.tagName === "TEXTAREA") control.readOnly = true;
      else control.disabled = true;
    }
  }

  const timer = setInterval(() => {
    if (!element.isConnected) clearInterval(timer);
    else if (!document.hidden && !sending) lookForLater();
  }, LOOK_MS);
  announce(heading.textContent);
  const place = h("div", { class: "asking" }, element);
  return place;
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
      say(how, input.value === "" ? "Text, or JSON." : `Taken as ${kindOf(input.value)}.`);
      onChange();
    },
  });
  const wrong = h("p", { class: "problem", id: `wrong-${id}`, hidden: true });
  say(how, "Text, or JSON.");
  const write = (text) => {
    input.value = text;
    input.dispatchEvent(new Event("input", { bubbles: true }));
    input.focus();
  };
  const field = {
    title,
    read() {
      if (input.value === "") return undefined;
      try {
        return fromJson(input.value);
      } catch (problem) {
        if (problem instanceof SyntaxError) return input.value;
        throw new FieldError(field, problem.message);
      }
    },
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
  return field;
}

function kindOf(text) {
  try {
    return typeof JSON.parse(text) === "string" ? "text" : "JSON";
  } catch {
    return "text";
  }
}

/** A question may name answers, as JSON or in words; only what is JSON can be put in. */
const suggestions = (value) =>
  (Array.isArray(value?.answers) ? value.answers : [])
    .map((answer) => (typeof answer === "string" ? answer : JSON.stringify(answer)))
    .filter((answer) => kindOf(answer) === "JSON");

/** The value of an interrupt: texts as text, the rest as JSON. */
function asked(value) {
  if (typeof value === "string") return h("p", { class: "asked", dir: "auto" }, value);
  if (typeof value !== "object" || value === null || Array.isArray(value)) {
    return about(h("pre", {}, JSON.stringify(value, null, 2)));
  }
  const { question, answers, ...rest } = value;
  const parts = Object.entries(typeof question === "string" ? rest : { question, ...rest })
    .filter(([, part]) => part !== undefined);
  return h("div", {},
    typeof question === "string" ? h("p", { class: "asked", dir: "auto" }, question) : null,
    parts.length ? about(h("dl", {}, ...parts.map(([name, part]) => h("div", {}, h("dt", {}, name), h("dd", {},
      typeof part === "string" ? h("div", { class: "said", dir: "auto" }, part) : h("pre", {}, JSON.stringify(part, null, 2))))))) : null);
}

/** It scrolls when it is long, also with the keyboard. */
const about = (content) =>
  h("div", { class: "asked-more", tabindex: 0, role: "region", "aria-label": "What is asked about" }, content);
