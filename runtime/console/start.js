// The view that starts a run: a graph, its input as a form and as JSON, and the curl that does the same.

import * as api from "./api.js";
import { announce, copyButton, h, quoted, say } from "./dom.js";
import { Drawing } from "./drawing.js";
import { formOf } from "./form.js";
import { Run } from "./run.js";

/** The view for a graph; `onStart` gets the run that was started. */
export async function startView(graphs, graph, { onStart, onChoose }) {
  const [schema, shape] = await Promise.all([api.schema(graph.name), api.drawing(graph.name)]);
  const drawing = new Drawing(shape, graph, () => {});
  drawing.render(new Run(null));

  const error = h("p", { class: "problem", role: "alert", hidden: true });
  const curl = h("pre", { class: "curl", tabindex: 0, "aria-label": "The same with curl" });
  const json = h("textarea", {
    class: "code", id: "json", rows: 8, spellcheck: "false", input: () => take(readJson, form),
  });
  const thread = h("input", {
    type: "text", id: "thread", autocomplete: "off", spellcheck: "false", placeholder: "a new one",
    input: () => renderCurl(),
  });
  const form = formOf(schema.input, () => take(() => form.read(), null));
  const button = h("button", { type: "submit", class: "primary" }, "Start the run");
  let input = graph.default_input ?? {};

  function readJson() {
    try {
      return JSON.parse(json.value);
    } catch (exc) {
      throw new Error(`This is not JSON: ${exc.message}`);
    }
  }

  /** What was written on one side goes to the other side. */
  function take(read, other) {
    try {
      input = read();
      complain(null);
      if (other) other.write(input);
      else json.value = JSON.stringify(input, null, 2);
    } catch (exc) {
      complain(exc.message);
    }
    renderCurl();
  }

  function complain(text) {
    error.hidden = text === null;
    say(error, text ?? "");
    button.disabled = text !== null;
  }

  const body = () => ({ graph: graph.name, input, ...(thread.value && { thread_id: thread.value }) });

  const command = () =>
    `curl -N ${quoted(api.address("v1/runs"))} \\\n  -H 'Accept: application/x-ndjson' \\\n  -H 'Content-Type: application/json' \\\n  -d ${quoted(JSON.stringify(body()))}`;

  function renderCurl() {
    say(curl, command());
  }

  async function submit(event) {
    event.preventDefault();
    if (button.disabled) return;
    button.disabled = true;
    try {
      onStart(await api.start(body()));
      announce("The run has started.");
    } catch (problem) {
      complain(problem.message);
      button.disabled = false;
    }
  }

  form.write(input);
  json.value = JSON.stringify(input, null, 2);
  renderCurl();

  const choice = h("div", { class: "graphs", role: "group", "aria-label": "Graph" }, ...graphs.map(({ name, description }) =>
    h("button", {
      type: "button", class: "graph", "aria-pressed": String(name === graph.name), click: () => name === graph.name || onChoose(name),
    }, h("strong", {}, name), description ? h("span", {}, description) : null)));

  return h("div", { class: "view start" },
    h("h1", {}, "New run"),
    choice,
    h("section", { class: "panel stage", "aria-label": "Drawing" }, drawing.element),
    h("form", {
      class: "panel", submit, novalidate: true,
      keydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && submit(event),
    },
    h("div", { class: "pair" },
      h("section", { "aria-label": "Input" }, h("h2", {}, "Input"), form.element),
      h("section", {}, h("h2", {}, h("label", { for: "json" }, "The same as JSON")), json)),
    h("div", { class: "field thread" }, h("label", { for: "thread" }, "Thread (optional)"), thread),
    error,
    h("div", { class: "bar-row" }, button, h("span", { class: "hint" }, "Ctrl + Enter"))),
    h("section", { class: "panel", "aria-label": "curl" },
      h("div", { class: "bar-row" }, h("h2", {}, "The same with curl"), copyButton("Copy", command)), curl));
}
