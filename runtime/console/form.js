// A form from a JSON Schema: a field for each property, and JSON where a form would be no help.

import { h, say, set } from "./dom.js";
import { DEPTH, isMessages, isObject, kindOf, matches, own, resolved, without } from "./schema.js";

/** A form of more fields than this is of no help, and slow. */
const MOST = 500;

let fields = 0;

/** What was written into a field cannot be used. */
export class FieldError extends Error {
  constructor(field, message) {
    super(`${field.title}: ${message}`);
    this.field = field;
    this.told = message;
  }
}

/** The value of a JSON text. A number that would be sent as another one is refused with a RangeError. */
export function fromJson(text) {
  try {
    return JSON.parse(text, (_key, value, { source } = {}) => {
      const digits = /^-?[1-9]\d*$/.test(source);
      if (value === Infinity || value === -Infinity || (digits && String(value) !== source)) throw tooLarge(source ?? value);
      return value;
    });
  } catch (problem) {
    throw problem instanceof SyntaxError ? new SyntaxError(`this is not JSON: ${problem.message}`) : problem;
  }
}

const tooLarge = (number) =>
  new RangeError(`${number} is too large a number for this page; in quotes it is sent as text`);

/**
 * A field for a schema:
 *
 *   element          what is seen
 *   read()           the value; undefined where it was left empty; throws a FieldError
 *   blank()          whether nothing was written into it
 *   write(value)     shows a value; what the field cannot show is kept as it is
 *   find(path)       the field at a path, or the nearest one around it
 *   complain(text)   says what is wrong with it; null takes that back
 *   focus()
 *
 * `onChange` is called after each change. A value that has to be `complete` has the schema's
 * defaults in it and everything that is required; else who takes the value sees to that.
 */
export function formOf(schema, onChange, { name = "input", complete = false } = {}) {
  const definitions = schema?.$defs ?? schema?.definitions ?? {};
  // The wider a schema is, the less deep a form looks into it.
  const build = (deepest) => {
    const count = { fields: 0 };
    const form = fieldOf(schema ?? {}, {
      definitions, onChange, complete, name, deepest, count, depth: 0, required: true, refs: [],
    });
    return count.fields > MOST && deepest >= 0 ? build(deepest - 1) : form;
  };
  return build(DEPTH);
}

function fieldOf(raw, context) {
  context.count.fields += 1;
  try {
    return madeOf(raw, context);
  } catch {
    // Anybody can write a schema, also one that is none: then it is JSON.
    return keeping(jsonField({}, context), {}, context);
  }
}

function madeOf(raw, context) {
  const refs = [...context.refs];
  const { nullable, ...schema } = resolved(raw, context.definitions, refs);
  // A type that holds itself has no last field.
  const endless = refs.length > new Set(refs).size || context.depth > context.deepest || context.count.fields > MOST;
  const maker = makerOf(schema, context);
  const make = endless && [objectField, entriesField, arrayField, choiceField].includes(maker) ? jsonField : maker;
  return keeping(make(schema, { ...context, refs }), schema, { ...context, nullable });
}

function makerOf(schema, context) {
  if (isMessages(schema, context)) return messagesField;
  if (schema.const !== undefined) return constField;
  if (schema.enum) return enumField;
  if (schema.anyOf) return choiceField;
  if (schema.type === "object") {
    if (Object.keys(schema.properties ?? {}).length) return objectField;
    return isObject(schema.additionalProperties) ? entriesField : jsonField;
  }
  if (schema.type === "array") {
    if (!schema.items || schema.prefixItems) return jsonField;
    return schema.uniqueItems && schema.items.enum ? setField : arrayField;
  }
  return { string: stringField, integer: numberField, number: numberField, boolean: booleanField }[schema.type]
    ?? jsonField;
}

/** Keeps what the field cannot show, and the null or the empty text that it cannot tell apart. */
function keeping(field, schema, context) {
  const fits = (value) => {
    try {
      return field.fits?.(value) ?? true;
    } catch {
      return false; // its schema is none, further inside
    }
  };
  const note = h("p", { class: "hint", hidden: true });
  const empty = context.item ? (schema.type === "string" ? "" : null)
    : context.required && context.nullable ? null : undefined;
  let strange, left = empty;
  field.element.append(note);
  const write = (value) => {
    strange = value !== undefined && value !== null && !fits(value) ? value : undefined;
    left = value === null || value === "" ? value : empty;
    say(note, strange === undefined ? "" : `It is ${shortly(strange)}, which this field cannot show. The JSON can change it.`);
    note.hidden = strange === undefined;
    field.body.hidden = strange !== undefined;
    field.write(strange === undefined && value !== null ? value : undefined);
  };
  const kept = {
    find: () => kept,
    ...field,
    write,
    blank: () => strange === undefined && left === empty && field.blank(),
    read() {
      if (strange !== undefined) return strange;
      const found = field.read();
      return found === undefined ? left : found;
    },
  };
  if (context.complete && schema.default !== undefined) write(schema.default);
  return kept;
}

const shortly = (value) => {
  const json = JSON.stringify(value);
  return json.length > 60 ? `${json.slice(0, 60)}…` : json;
};

// Fields that hold others.

function objectField(schema, context) {
  const required = new Set(schema.required ?? []);
  const parts = new Map(Object.entries(schema.properties).map(([name, property]) => [
    name,
    fieldOf(property, { ...inner(context), name, required: required.has(name) }),
  ]));
  let rest = {};
  let given = false;
  const body = h("div", { class: "fields" }, ...[...parts.values()].map((part) => part.element));
  const blank = () => !given && !Object.keys(rest).length && [...parts.values()].every((part) => part.blank());
  return {
    ...groupOf(schema, context, body),
    fits: isObject,
    blank,
    read() {
      if (optional(context) && blank()) return undefined;
      const entries = Object.entries(rest);
      let missing;
      for (const [name, part] of parts) {
        const found = part.read();
        if (found !== undefined) entries.push([name, found]);
        else if (required.has(name)) missing ??= part;
      }
      if (context.complete && missing) throw new FieldError(missing, "this has to be filled in");
      return Object.fromEntries(entries);
    },
    write(value) {
      given = value !== undefined;
      rest = without(value ?? {}, ...parts.keys());
      for (const [name, part] of parts) part.write(value && own(value, name));
    },
    find(path) {
      const part = parts.get(path[0]);
      return part ? part.find(path.slice(1)) : this;
    },
    focus: () => parts.values().next().value.focus(),
  };
}

function arrayField(schema, context) {
  const list = rows(context, (value) => {
    const name = `${titleOf(schema, context)} ${list.items.length + 1}`;
    const part = fieldOf(schema.items, { ...itemOf(context), name });
    part.write(value);
    return { part, element: part.element, title: name };
  });
  return {
    ...groupOf(schema, context, list.element),
    fits: Array.isArray,
    blank: list.blank,
    read: () => (optional(context) && list.blank() ? undefined : list.items.map(({ part }) => part.read())),
    write: (value) => list.write(value),
    find(path) {
      return list.items[path[0]]?.part.find(path.slice(1)) ?? this;
    },
    focus: () => (list.items[0] ? list.items[0].part.focus() : list.more.focus()),
  };
}

/** An object whose names are free: a row for each. */
function entriesField(schema, context) {
  const list = rows(context, (entry = ["", undefined]) => {
    const title = `${titleOf(schema, context)} ${list.items.length + 1}`;
    const key = h("input", {
      type: "text", class: "code", placeholder: "name", "aria-label": `Name of ${title}`,
      spellcheck: "false", autocomplete: "off", input: context.onChange,
    });
    key.value = entry[0];
    const part = fieldOf(schema.additionalProperties, { ...itemOf(context), name: `Value of ${title}`, bare: true });
    part.write(entry[1]);
    return { key, part, title, element: h("div", { class: "entry" }, key, part.element) };
  });
  const field = {
    ...groupOf(schema, context, list.element),
    fits: isObject,
    blank: list.blank,
    read() {
      const entries = list.items.map(({ key, part }) => [key.value, part.read()]);
      const names = entries.map(([name]) => name);
      const twice = names.find((name, index) => names.indexOf(name) !== index);
      if (twice !== undefined) throw new FieldError(field, `the name ${JSON.stringify(twice)} is there twice`);
      return optional(context) && list.blank() ? undefined : Object.fromEntries(entries);
    },
    write: (value) => list.write(value && Object.entries(value)),
    find(path) {
      return list.items.find(({ key }) => key.value === path[0])?.part.find(path.slice(1)) ?? this;
    },
    focus: () => (list.items[0]?.key ?? list.more).focus(),
  };
  return field;
}

/** Rows that can be added and taken away. */
function rows(context, make) {
  const list = h("div", { class: "items" });
  const more = h("button", {
    type: "button", class: "quiet",
    click: () => {
      const item = add(undefined);
      context.onChange();
      (item.key ?? item.part).focus();
    },
  }, "Add");
  let given = false;
  const self = { items: [], more, element: h("div", {}, list, more), write, blank: () => !given && !self.items.length };

  function add(value) {
    const item = make(value);
    const row = h("div", { class: "item" }, item.element, h("button", {
      type: "button", class: "quiet", "aria-label": `Remove ${item.title}`,
      click: () => {
        self.items = self.items.filter((other) => other !== item);
        row.remove();
        context.onChange();
        more.focus();
      },
    }, "✕"));
    self.items.push(item);
    list.append(row);
    return item;
  }

  function write(values) {
    given = values !== undefined;
    self.items = [];
    list.replaceChildren();
    for (const value of values ?? []) add(value);
  }
  return self;
}

/** One of several types: which one is chosen, and then its field. */
function choiceField(schema, context) {
  const id = `field-${++fields}`;
  const options = schema.anyOf.map((option) => resolved(option, context.definitions));
  const parts = schema.anyOf.map((option, index) =>
    fieldOf(option, { ...inner(context), name: kindOf(options[index]), required: true, bare: !options[index].properties }));
  const choice = h("select", {
    id, "aria-label": `Kind of ${titleOf(schema, context)}`,
    change: () => {
      show(choice.value);
      context.onChange();
    },
  }, h("option", { value: "" }, "—"), ...options.map((option, index) => h("option", { value: index }, kindOf(option))));
  const place = h("div", { class: "chosen" });
  const show = (index) => {
    choice.value = index;
    place.replaceChildren(...(index === "" ? [] : [parts[index].element]));
  };
  const chosen = () => parts[choice.value];
  return {
    ...groupOf(schema, context, h("div", { class: "choice" }, choice, place)),
    fits: (value) => options.some((option) => matches(option, value, context)),
    blank: () => choice.value === "",
    read: () => (choice.value === "" ? undefined : chosen().read() ?? (options[choice.value].type === "string" ? "" : undefined)),
    write(value) {
      const index = value === undefined ? -1 : options.findIndex((option) => matches(option, value, context));
      show(index < 0 ? "" : String(index));
      chosen()?.write(value);
    },
    find(path) {
      return path.length && chosen() ? chosen().find(path) : this;
    },
    focus: () => (chosen() ?? choice).focus(),
  };
}

/** What several controls of one value have in common. */
function groupOf(schema, context, body) {
  const error = errorOf();
  const hint = hintOf(schema, context, null);
  const title = titleOf(schema, context);
  const element = context.depth === 0 && !context.legend
    ? h("div", { class: "group" }, hint, body, error)
    : h("fieldset", {}, h("legend", {}, ...labelOf(schema, context)), hint, body, error);
  return { element, body, title, complain: (text) => tell(error, text) };
}

// Fields of one control.

function stringField(schema, context) {
  const long = schema.format === undefined && schema.maxLength === undefined;
  const input = h(long ? "textarea" : "input", {
    ...(long ? { rows: 1 } : { type: "text", maxlength: schema.maxLength }),
    spellcheck: "false", autocomplete: "off",
    placeholder: { "date-time": "2026-11-24T17:06:08Z", date: "2026-11-24", time: "17:06:08Z" }[schema.format],
  });
  return simple(input, schema, context, {
    // A control of one line drops line breaks, a larger one makes each of them a \n.
    fits: (value) => typeof value === "string" && !(long ? /\r/ : /[\r\n]/).test(value),
    read: () => {
      if (input.value.length < schema.minLength) throw new Error(`write ${schema.minLength} characters or more`);
      return input.value;
    },
    write: (value) => (input.value = value),
  });
}

function numberField(schema, context) {
  const whole = schema.type === "integer";
  const { minimum: least, maximum: most, exclusiveMinimum: above, exclusiveMaximum: below } = schema;
  const input = h("input", { type: "number", step: whole ? 1 : "any", min: least, max: most });
  return simple(input, schema, context, {
    fits: (value) => typeof value === "number" && (!whole || Number.isInteger(value)),
    empty: () => input.value === "" && !input.validity.badInput,
    read: () => {
      const value = Number(input.value);
      if (input.validity.badInput || Number.isNaN(value)) throw new Error("this is not a number");
      if (whole && !Number.isInteger(value)) throw new Error("this is not a whole number");
      if (whole && !Number.isSafeInteger(value)) throw tooLarge(input.value);
      if (value < least) throw new Error(`use ${least} or more`);
      if (value > most) throw new Error(`use ${most} or less`);
      if (value <= above) throw new Error(`use more than ${above}`);
      if (value >= below) throw new Error(`use less than ${below}`);
      return value;
    },
    write: (value) => (input.value = value),
  });
}

const booleanField = (schema, context) => enumField({ ...schema, enum: [true, false] }, context);

function enumField(schema, context) {
  const options = schema.enum.map((value) => h("option", { value: JSON.stringify(value) }, String(value)));
  const input = h("select", {}, h("option", { value: "" }, "—"), ...options);
  return simple(input, schema, context, {
    fits: (value) => schema.enum.includes(value),
    read: () => JSON.parse(input.value),
    write: (value) => (input.value = JSON.stringify(value)),
  });
}

/** What can only be one thing is not asked for. */
function constField(schema, context) {
  const element = h("div", { hidden: true });
  return {
    element,
    body: h("span", {}),
    title: titleOf(schema, context),
    fits: (value) => value === schema.const,
    blank: () => true,
    read: () => schema.const,
    write() {},
    complain() {},
    focus() {},
  };
}

/** Some of a few: a box for each. */
function setField(schema, context) {
  const boxes = schema.items.enum.map((value) => ({
    value, box: h("input", { type: "checkbox", input: context.onChange }),
  }));
  const body = h("div", { class: "boxes" }, ...boxes.map(({ value, box }) => h("label", {}, box, ` ${value}`)));
  let given = false;
  const chosen = () => boxes.filter(({ box }) => box.checked).map(({ value }) => value);
  const blank = () => !given && !chosen().length;
  return {
    ...groupOf(schema, context, body),
    fits: (value) => Array.isArray(value) && new Set(value).size === value.length && value.every((one) => schema.items.enum.includes(one)),
    blank,
    read: () => (blank() ? undefined : chosen()),
    write(value) {
      given = value !== undefined && !value.length;
      for (const { value: one, box } of boxes) box.checked = value?.includes(one) ?? false;
    },
    focus: () => boxes[0].box.focus(),
  };
}

function jsonField(schema, context) {
  const input = h("textarea", { rows: 2, class: "code", spellcheck: "false", placeholder: schema.type === "object" ? "{ }" : "JSON" });
  const field = simple(input, schema, context, {
    read: () => {
      const value = fromJson(input.value);
      if (schema.type === "object" && !isObject(value)) throw new Error("this is not an object: { … }");
      return value;
    },
    write: (value) => (input.value = JSON.stringify(value, null, 2)),
  });
  return { ...field, json: true };
}

/** A list of chat messages: one text box for what a person says first; more of them as JSON. */
function messagesField(schema, context) {
  const input = h("textarea", { rows: 3 });
  const own = (value) => Array.isArray(value) && value.length === 1 && value[0]?.role === "user"
    && typeof value[0].content === "string" && !value[0].content.includes("\r") && Object.keys(value[0]).length === 2;
  return simple(input, { ...schema, title: "Message" }, context, {
    fits: own,
    read: () => [{ role: "user", content: input.value }],
    write: (value) => (input.value = value[0].content),
  });
}

/** A field of one control, with its label and what the schema says of it. */
function simple(input, schema, context, { fits, read, write, empty = () => input.value === "" }) {
  const id = `field-${++fields}`;
  const error = errorOf(`${id}-error`);
  const hint = hintOf(schema, context, `${id}-hint`);
  const title = titleOf(schema, context);
  input.id = id;
  input.addEventListener("input", context.onChange);
  set(input, "aria-describedby", hint ? `${hint.id} ${error.id}` : error.id);
  if (context.required && !context.item && context.depth > 0) input.setAttribute("aria-required", "true");
  if (context.bare) input.setAttribute("aria-label", title);
  const label = context.bare ? null : h("label", { for: id }, ...labelOf(schema, context));
  const field = {
    element: h("div", { class: "field" }, label, hint, input, error),
    body: input,
    title,
    fits,
    blank: empty,
    read() {
      if (empty()) return undefined;
      try {
        return read();
      } catch (problem) {
        throw new FieldError(field, problem.message);
      }
    },
    write(value) {
      if (value === undefined) input.value = "";
      else write(value);
    },
    complain(text) {
      tell(error, text);
      set(input, "aria-invalid", text === null ? null : "true");
    },
    focus: () => input.focus(),
  };
  return field;
}

const inner = (context) => ({ ...context, depth: context.depth + 1, item: false, bare: false, legend: false });
/** Items are made one by one, as somebody adds them: each counts its own fields. */
const itemOf = (context) => ({ ...inner(context), item: true, required: true, count: { fields: 0 } });
const optional = ({ depth, required }) => depth > 0 && !required;

const titleOf = (schema, { name, item, bare }) => (item || bare ? name : schema.title ?? name);
const labelOf = (schema, context) => [
  titleOf(schema, context),
  context.required ? null : h("span", { class: "optional" }, " (optional)"),
];

function hintOf(schema, context, id) {
  const told = [
    schema.description,
    !context.complete && schema.const === undefined && tells(schema.default) ? `${shortly(schema.default)} unless said.` : null,
  ].filter(Boolean);
  const sentences = told.join(/[.!?…]$/.test(told[0]) ? " " : ". ");
  return told.length && !context.item ? h("p", { class: "hint", id }, sentences) : null;
}

const tells = (value) => value !== undefined && value !== null && value !== "" && (typeof value !== "object" || Object.keys(value).length > 0);

const errorOf = (id) => h("p", { class: "problem", id, hidden: true });

function tell(error, text) {
  error.hidden = text === null;
  say(error, text ?? "");
}
