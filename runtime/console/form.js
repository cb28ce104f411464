// A form from a JSON Schema: a field for each property, and JSON where a form would be no help.

import { h } from "./dom.js";

const DEPTH = 4;
let fields = 0;

/**
 * `{ element, read(), write(value) }` for a schema. `read` leaves out what was left empty,
 * and throws an Error that says which field is wrong; `onChange` is called after each change.
 */
export function formOf(schema, onChange) {
  const definitions = schema?.$defs ?? schema?.definitions ?? {};
  const field = fieldOf(schema ?? {}, { definitions, onChange, depth: 0, name: "input", required: true });
  return field;
}

function fieldOf(raw, context) {
  const schema = resolved(raw, context.definitions);
  if (isMessages(schema, context)) return messagesField(schema, context);
  const kind = schema.const !== undefined ? "const" : schema.enum ? "enum" : schema.type;
  const make = context.depth > DEPTH ? jsonField : MAKERS[kind] ?? jsonField;
  return make(schema, context);
}

/** A schema without references, and without a mere "or null". */
function resolved(schema, definitions, seen = 0) {
  if (seen > 8) return {};
  if (schema.$ref) {
    const target = definitions[schema.$ref.split("/").pop()] ?? {};
    return resolved({ ...target, ...without(schema, "$ref") }, definitions, seen + 1);
  }
  const options = (schema.anyOf ?? schema.oneOf)?.filter((option) => option.type !== "null");
  if (options?.length === 1) {
    return resolved({ ...options[0], ...without(schema, "anyOf", "oneOf") }, definitions, seen + 1);
  }
  if (schema.allOf?.length === 1) {
    return resolved({ ...schema.allOf[0], ...without(schema, "allOf") }, definitions, seen + 1);
  }
  return schema;
}

const without = (object, ...names) =>
  Object.fromEntries(Object.entries(object).filter(([name]) => !names.includes(name)));

const MAKERS = {
  object: objectField,
  array: arrayField,
  string: stringField,
  integer: numberField,
  number: numberField,
  boolean: booleanField,
  enum: enumField,
  const: (schema) => ({ element: h("span", {}, String(schema.const)), read: () => schema.const, write() {} }),
};

function objectField(schema, context) {
  const required = new Set(schema.required ?? []);
  const parts = Object.entries(schema.properties ?? {}).map(([name, property]) => [
    name,
    fieldOf(property, { ...context, depth: context.depth + 1, name, required: required.has(name) }),
  ]);
  if (!parts.length) return jsonField(schema, context);
  let rest = {};
  const element = context.depth === 0
    ? h("div", { class: "fields" }, ...parts.map(([, part]) => part.element))
    : h("fieldset", {}, legend(schema, context), ...parts.map(([, part]) => part.element));
  return {
    element,
    read() {
      const value = { ...rest };
      for (const [name, part] of parts) {
        const found = part.read();
        if (found !== undefined) value[name] = found;
      }
      return context.depth > 0 && !context.required && !Object.keys(value).length ? undefined : value;
    },
    write(value) {
      const given = isObject(value) ? value : {};
      rest = without(given, ...parts.map(([name]) => name));
      for (const [name, part] of parts) part.write(given[name]);
    },
  };
}

function arrayField(schema, context) {
  const list = h("div", { class: "items" });
  let items = [];
  const add = (value) => {
    const part = fieldOf(schema.items ?? {}, { ...context, depth: context.depth + 1, name: `${context.name} ${items.length + 1}`, required: true });
    part.write(value);
    const row = h("div", { class: "item" }, part.element, h("button", {
      type: "button", class: "quiet", "aria-label": `Remove ${context.name} ${items.length + 1}`,
      click: () => {
        items = items.filter((item) => item !== part);
        row.remove();
        context.onChange();
      },
    }, "✕"));
    items.push(part);
    list.append(row);
  };
  const more = h("button", { type: "button", class: "quiet", click: () => { add(undefined); context.onChange(); } }, "Add");
  return {
    element: h("fieldset", {}, legend(schema, context), list, more),
    read: () => (items.length || context.required ? items.map((item) => item.read() ?? null) : undefined),
    write(value) {
      items = [];
      list.replaceChildren();
      for (const item of Array.isArray(value) ? value : []) add(item);
    },
  };
}

function stringField(schema, context) {
  const long = schema.format === undefined && schema.maxLength === undefined;
  const input = h(long ? "textarea" : "input", long ? { rows: 1, spellcheck: "false" } : { type: "text" });
  return simple(input, schema, context, () => input.value, (value) => (input.value = value));
}

function numberField(schema, context) {
  const input = h("input", { type: "number", step: schema.type === "integer" ? 1 : "any", min: schema.minimum, max: schema.maximum });
  const read = () => {
    if (input.validity.badInput || Number.isNaN(Number(input.value))) throw new Error(`${context.name} is not a number`);
    return Number(input.value);
  };
  return simple(input, schema, context, read, (value) => (input.value = value));
}

function booleanField(schema, context) {
  const input = h("select", {}, ...["", "true", "false"].map((value) => h("option", { value }, value || "—")));
  return simple(input, schema, context, () => input.value === "true", (value) => (input.value = String(value)));
}

function enumField(schema, context) {
  const options = schema.enum.map((value) => h("option", { value: JSON.stringify(value) }, String(value)));
  const input = h("select", {}, h("option", { value: "" }, "—"), ...options);
  return simple(input, schema, context, () => JSON.parse(input.value), (value) => (input.value = JSON.stringify(value)));
}

function jsonField(schema, context) {
  const input = h("textarea", { rows: 3, class: "code", spellcheck: "false", placeholder: "JSON" });
  const read = () => {
    try {
      return JSON.parse(input.value);
    } catch {
      throw new Error(`${context.name} is not JSON`);
    }
  };
  return simple(input, schema, context, read, (value) => (input.value = JSON.stringify(value, null, 2)));
}

/** A list of chat messages: one text box for what a person says first; more of them as JSON. */
function messagesField(schema, context) {
  const input = h("textarea", { rows: 3 });
  let kept = null;
  const field = simple(input, { ...schema, title: "Message" }, context,
    () => kept ?? [{ role: "user", content: input.value }],
    (value) => {
      const only = Array.isArray(value) && value.length === 1 ? value[0] : null;
      const own = only?.role === "user" && typeof only.content === "string";
      kept = own || value === undefined ? null : value;
      input.value = own ? only.content : JSON.stringify(value);
      input.disabled = kept !== null;
    });
  return field;
}

const isMessages = (schema, { definitions }) =>
  schema.type === "array" && JSON.stringify(schema.items ?? {}).includes("HumanMessage") && "HumanMessage" in definitions;

/** A field of one input element, with its label and what the schema says of it. */
function simple(input, schema, context, read, write) {
  const id = `field-${++fields}`;
  input.id = id;
  input.addEventListener("input", context.onChange);
  const hint = schema.description ? h("p", { class: "hint", id: `${id}-hint` }, schema.description) : null;
  if (hint) input.setAttribute("aria-describedby", hint.id);
  if (context.required) input.setAttribute("aria-required", "true");
  const field = {
    element: h("div", { class: "field" }, h("label", { for: id }, titleOf(schema, context)), hint, input),
    read: () => (input.value === "" && !(context.required && schema.type === "string") ? undefined : read()),
    write(value) {
      if (value === undefined || value === null) input.value = "";
      else write(value);
      if (input.tagName === "TEXTAREA" && !input.classList.contains("code")) {
        input.rows = Math.min(8, Math.max(1, Math.ceil(input.value.length / 48)));
      }
    },
  };
  if (schema.default !== undefined && schema.default !== null) field.write(schema.default);
  return field;
}

const legend = (schema, context) => h("legend", {}, titleOf(schema, context));
const titleOf = (schema, { name, required }) =>
  `${schema.title ?? name}${required ? "" : " (optional)"}`;
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
