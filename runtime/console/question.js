// What a run that was interrupted asks, and the answer that goes on with a new run.

import * as api from "./api.js";
import { announce, h, say } from "./dom.js";
import { formOf } from "./form.js";

/** The question of a run; `onRun` gets the id of the run that its answer starts. */
export async function questionView(run, onRun) {
  const later = await latestRun(run.threadId);
  if (later && later.run_id !== run.runId) {
    return h("section", { class: "panel" },
      h("p", {}, "This was answered; the thread goes on with ",
        h("a", { href: `#/runs/${later.run_id}` }, later.run_id), "."));
  }
  const interrupts = await withValues(run);
  const fields = interrupts.map((interrupt) => [interrupt.id, answerField(interrupt)]);
  const error = h("p", { class: "problem", role: "alert", hidden: true });
  const send = h("button", { type: "submit", class: "primary" }, fields.length ? "Answer" : "Go on");

  async function submit(event) {
    event.preventDefault();
    send.disabled = true;
    try {
      const answer = Object.fromEntries(fields.map(([id, field]) => [id, field.read()]));
      const next = await api.resume(run.threadId, fields.length ? answer : null);
      announce("Answered; the thread goes on.");
      onRun(next.run_id);
    } catch (problem) {
      error.hidden = false;
      say(error, problem.message);
      send.disabled = false;
    }
  }

  const waiting = run.result.next?.length ? ` It goes on at ${run.result.next.join(", ")}.` : "";
  return h("form", {
    class: "panel asks", submit, "aria-label": "The run asks",
    keydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && submit(event),
  },
  h("h2", {}, fields.length ? "The run waits for an answer" : "The run stopped at a breakpoint"),
  fields.length ? "" : h("p", { class: "hint" }, waiting.trim()),
  ...fields.map(([, field]) => field.element),
  error,
  h("div", { class: "bar-row" }, send, h("span", { class: "hint" }, "Ctrl + Enter")));
}

async function latestRun(thread) {
  const { runs } = await api.runs({ thread_id: thread, limit: 1 }).catch(() => ({ runs: [] }));
  return runs[0];
}

/** The interrupts; those too large for the line are asked for. */
async function withValues(run) {
  const { interrupts = [] } = run.result;
  return Array.isArray(interrupts) ? interrupts : (await api.threadState(run.threadId)).interrupts;
}

function answerField({ id, value, response_schema: schema }) {
  const field = schema ? formOf(schema, () => {}) : freeField(id, suggestions(value));
  return { read: field.read, element: h("div", { class: "ask" }, asked(value), field.element) };
}

/** Text or JSON, whichever it is; the page says how it takes it. */
function freeField(id, suggested) {
  const how = h("span", { class: "hint", id: `how-${id}` });
  const input = h("textarea", {
    id: `answer-${id}`, rows: 2, spellcheck: "false", "aria-describedby": `how-${id}`,
    input: () => say(how, input.value === "" ? "Text, or JSON." : `Sent as ${kindOf(input.value)}.`),
  });
  say(how, "Text, or JSON.");
  const write = (text) => {
    input.value = text;
    input.dispatchEvent(new Event("input"));
    input.focus();
  };
  return {
    read: () => parsed(input.value),
    element: h("div", { class: "field" }, h("label", { for: input.id }, "Answer"), input,
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
