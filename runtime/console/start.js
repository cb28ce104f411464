// The view that starts a run: a graph, its input as a form and as JSON, and the curl that does the same.

import * as api from "./api.js";
import { announce, copyButton, h, quoted, say, set } from "./dom.js";
import { Drawing } from "./drawing.js";
import { FieldError, formOf, fromJson } from "./form.js";
import { Run } from "./run.js";

/** A drawing that takes longer is put in when it comes. */
const PATIENCE_MS = 300;

/** What else `POST /v1/runs` takes. */
const MORE = {
  type: "object",
  properties: {
    deadline_s: { title: "Deadline", type: "number", exclusiveMinimum: 0, maximum: 2_592_000, description: "Seconds from now until the run is timed out, queue and restarts included." },
    stream: { title: "Recorded", type: "array", uniqueItems: true, items: { enum: ["updates", "messages", "custom", "values"] }, description: "All but values unless said." },
    metadata: { title: "Metadata", type: "object", description: "Kept with the run." },
    durability: { title: "Durability", enum: ["sync", "async", "exit"], description: "When checkpoints are written." },
    config: {
      title: "Config",
      type: "object",
      properties: {
        configurable: { title: "Configurable", type: "object" },
        recursion_limit: { title: "Recursion limit", type: "integer", minimum: 1 },
        max_concurrency: { title: "Max concurrency", type: "integer", minimum: 1 },
        tags: { title: "Tags", type: "array", items: { type: "string", maxLength: 200 } },
      },
    },
  },
};

/** The view for a graph; `onStart` gets the run that was started. */
export async function startView(graphs, graph, { onStart, onChoose }) {
  const stage = h("section", { class: "panel stage", "aria-label": "Drawing" });
  const patience = new Promise((resolve) => setTimeout(resolve, PATIENCE_MS));
  const [schema] = await Promise.all([api.schema(graph.name), Promise.race([draw(graph, stage), patience])]);

  const error = h("p", { class: "problem", role: "alert", hidden: true });
  const curl = h("pre", { class: "curl", tabindex: 0, "aria-label": "The same with curl" });
  const json = h("textarea", {
    class: "code", id: "json", rows: 8, spellcheck: "false", input: () => take(readJson, form),
  });
  const jsonField = plainField("JSON", json);
  const thread = h("input", {
    type: "text", id: "thread", autocomplete: "off", spellcheck: "false", placeholder: "a new one",
    "aria-describedby": "thread-error", input: () => recheck(),
  });
  const threadError = h("p", { class: "problem", id: "thread-error", hidden: true });
  const threadField = plainField("Thread", thread, threadError);
  const form = formOf(schema.input, () => take(() => form.read(), null));
  const context = schema.context && formOf(schema.context, () => recheck(), { name: "context" });
  const more = formOf(MORE, () => recheck(), { name: "more" });
  const folded = h("details", { class: "more" }, h("summary", {}, "More"), more.element);
  const button = h("button", { type: "submit", class: "primary" }, "Start the run");
  let input = graph.default_input ?? {};
  let wrong = null; // what keeps the run from being started
  let starting = false;
  let marked = [];

  function readJson() {
    try {
      return fromJson(json.value);
    } catch (problem) {
      throw new FieldError(jsonField, problem.message);
    }
  }

  /** What was written on one side goes to the other side. */
  function take(read, other) {
    recheck(() => {
      input = read();
      if (other) other.write(input);
      else json.value = JSON.stringify(input, null, 2);
    });
  }

  function recheck(step = () => {}) {
    clear();
    try {
      step();
      body();
    } catch (problem) {
      if (!(problem instanceof FieldError)) throw problem;
      wrong = problem;
      complain(problem.message, [[problem.field, problem.told]]);
    }
    if (!wrong) say(curl, command());
    set(curl, "data-old", wrong && "");
  }

  function clear() {
    wrong = null;
    error.hidden = true;
    for (const field of marked) field.complain(null);
    marked = [];
  }

  function complain(text, fields) {
    error.hidden = false;
    say(error, text);
    for (const [field, told] of fields) field.complain(told);
    marked = fields.map(([field]) => field);
  }

  function goToWrong() {
    const [field] = marked;
    if (!field) return;
    if (more.element.contains(elementOf(field))) folded.open = true;
    field.focus();
  }

  const elementOf = (field) => field.body ?? null;

  const body = () => ({
    graph: graph.name,
    input,
    ...(thread.value && { thread_id: thread.value }),
    ...(context && filled({ context: context.read() })),
    ...more.read(),
  });

  const command = () =>
    `curl -N ${quoted(api.address("v1/runs"))} \\\n  -H 'Accept: application/x-ndjson' \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(body()))}`;

  /** The field that the server names: `input.topic`, `config.recursion_limit`. */
  function fieldAt(name) {
    const [first, ...path] = name.split(".");
    if (first === "input") return form.json ? jsonField : form.find(path);
    if (first === "thread_id") return threadField;
    if (first === "context") return context?.find(path);
    const found = more.find([first, ...path]);
    return found === more ? undefined : found;
  }

  function refused(problem) {
    const { field, errors = field ? [{ field, message: problem.message.replace(`${field}: `, "") }] : [] } = problem.body ?? {};
    const fields = errors.map((one) => [fieldAt(one.field), one.message]).filter(([found]) => found);
    const busy = problem.body?.active_run;
    clear();
    complain(problem.message, fields);
    if (busy) error.append(" ", h("a", { href: `#/runs/${encodeURIComponent(busy)}` }, "Go to that run"), ".");
    goToWrong();
  }

  async function submit(event) {
    event.preventDefault();
    if (starting) return;
    if (wrong) {
      goToWrong();
      return;
    }
    starting = true; // a button that is disabled would lose the focus
    set(button, "aria-disabled", "true");
    try {
      onStart(await api.start(body()));
      announce("The run has started.");
    } catch (problem) {
      starting = false;
      set(button, "aria-disabled", null);
      refused(problem);
    }
  }

  form.write(input);
  json.value = JSON.stringify(input, null, 2);
  recheck();

  return h("div", { class: "view start" },
    h("h1", {}, "New run"),
    choiceOf(graphs, graph, onChoose),
    stage,
    h("form", {
      class: "panel", submit, novalidate: true,
      keydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && submit(event),
    },
    h("div", { class: form.json ? "" : "pair" },
      form.json ? null : h("section", { "aria-label": "Input" }, h("h2", {}, "Input"), form.element),
      h("section", {}, h("h2", {}, h("label", { for: "json" }, form.json ? "Input as JSON" : "The same as JSON")), json)),
    context ? h("section", { class: "context", "aria-label": "Context" }, h("h2", {}, "Context"), context.element) : null,
    h("div", { class: "field thread" }, h("label", { for: "thread" }, "Thread (optional)"), thread, threadError),
    folded,
    error,
    h("div", { class: "bar-row" }, button, h("span", { class: "hint" }, "Ctrl + Enter"))),
    h("section", { class: "panel", "aria-label": "curl" },
      h("div", { class: "bar-row" }, h("h2", {}, "The same with curl"), copyButton("Copy", () => curl.textContent, "Copy the command")), curl));
}

/** The graphs as buttons; the one that is chosen is pressed. */
export const choiceOf = (graphs, graph, onChoose) =>
  h("div", { class: "graphs", role: "group", "aria-label": "Graph" }, ...graphs.map(({ name, description }) =>
    h("button", {
      type: "button", class: "graph", "aria-pressed": String(name === graph.name), click: () => name === graph.name || onChoose(name),
    }, h("strong", {}, name), description ? h("span", {}, description) : null)));

async function draw(graph, stage) {
  const shape = await api.drawing(graph.name).catch(() => null);
  const drawing = new Drawing(shape, graph, null);
  drawing.render(new Run(null));
  stage.replaceChildren(drawing.element);
}

/** A control of this view as a field that can be wrong. */
function plainField(title, control, error = null) {
  return {
    title,
    body: control,
    complain(text) {
      set(control, "aria-invalid", text === null ? null : "true");
      if (!error) return;
      error.hidden = text === null;
      say(error, text ?? "");
    },
    focus: () => control.focus(),
  };
}

const filled = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) =>
  value !== undefined && (typeof value !== "object" || value === null || Object.keys(value).length)));
