// What a JSON Schema says, as far as a form has to know it.

/** How deep a form looks into a schema. */
export const DEPTH = 4;

/** A schema without references and without a mere "or null"; `refs` gets what was followed. */
export function resolved(schema, definitions, refs = []) {
  if (refs.length > 40) return {};
  if (schema.$ref) {
    const name = schema.$ref.split("/").pop();
    refs.push(name);
    return resolved({ ...own(definitions, name), ...without(schema, "$ref") }, definitions, refs);
  }
  const given = schema.anyOf ?? schema.oneOf;
  const options = given?.filter((option) => option.type !== "null");
  const nullable = schema.nullable || (given && options.length < given.length);
  const rest = { ...without(schema, "anyOf", "oneOf"), ...(nullable && { nullable }) };
  if (options?.length === 1) return resolved({ ...options[0], ...rest }, definitions, refs);
  if (options) return { ...rest, anyOf: options };
  if (schema.allOf?.length === 1) {
    return resolved({ ...schema.allOf[0], ...without(schema, "allOf") }, definitions, refs);
  }
  return schema;
}

/** What an object itself has under a name, be the name `constructor`. */
export const own = (object, name) => (Object.hasOwn(object, name) ? object[name] : undefined);

export const without = (object, ...names) =>
  Object.fromEntries(Object.entries(object).filter(([name]) => !names.includes(name)));

const KINDS = { string: "text", integer: "whole number", number: "number", boolean: "true or false", array: "list", object: "object" };

/** A schema in a few words. */
export const kindOf = (schema) =>
  schema.title ?? (schema.const !== undefined ? String(schema.const) : schema.enum ? schema.enum.join(", ") : KINDS[schema.type] ?? "JSON");

/** Whether a value may be meant by a schema, as far as a look at it tells. */
export function matches(raw, value, context, depth = 0) {
  const schema = resolved(raw, context.definitions);
  if (depth > DEPTH) return true;
  if (schema.const !== undefined) return value === schema.const;
  if (schema.enum) return schema.enum.includes(value);
  if (schema.anyOf) return schema.anyOf.some((option) => matches(option, value, context, depth + 1));
  if (schema.type === "object") {
    return isObject(value)
      && (schema.required ?? []).every((name) => Object.hasOwn(value, name))
      && Object.entries(schema.properties ?? {}).every(([name, part]) => !Object.hasOwn(value, name) || matches(part, value[name], context, depth + 1));
  }
  if (schema.type === "array") return Array.isArray(value) && value.every((item) => !schema.items || matches(schema.items, item, context, depth + 1));
  if (schema.type === "null") return value === null;
  if (schema.type === "integer") return Number.isInteger(value);
  return schema.type === undefined || typeof value === schema.type;
}

/** Whether it is of LangChain's messages. */
export const isMessages = (schema, { definitions }) =>
  schema.type === "array" && JSON.stringify(schema.items ?? {}).includes("HumanMessage") && Object.hasOwn(definitions, "HumanMessage");

export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
