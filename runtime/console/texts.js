// What the nodes say, as text: messages token by token, custom values, and notes of what was taken back.

import { address } from "./api.js";
import { h, say, set } from "./dom.js";
import { textOf } from "./run.js";

const SHOWN = 100;

export class Texts {
  constructor() {
    this._items = new Map();
    this._seen = 0;
    this._list = h("div", { class: "texts" });
    this._empty = h("p", { class: "hint" }, "Nothing has been said yet.");
    this._earlier = h("p", { class: "hint", hidden: true });
    this.element = h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Text" },
      this._empty, this._earlier, this._list);
  }

  render(run) {
    const atEnd = this.element.scrollHeight - this.element.scrollTop - this.element.clientHeight < 40;
    // From the end: a run may have said far more than is shown.
    const shown = [];
    let index = run.texts.length;
    while (index > 0 && shown.length < SHOWN) {
      const text = run.texts[--index];
      if (!text.gone) shown.push(text);
    }
    const wanted = new Set(shown);
    for (const [text, item] of this._items) {
      if (wanted.has(text)) continue;
      item.element.remove();
      this._items.delete(text);
    }
    for (const text of shown.reverse()) this._renderItem(text);
    set(this.element, "data-over", run.over ? "" : null);
    this._empty.hidden = shown.length > 0;
    this._earlier.hidden = index === 0;
    say(this._empty, run.over ? "Nothing was said." : "Nothing has been said yet.");
    say(this._earlier, "What was said earlier is in the lines below.");
    if (atEnd) this.element.scrollTop = this.element.scrollHeight;
  }

  _renderItem(text) {
    let item = this._items.get(text);
    if (!item) {
      const body = h("div", { class: "said", dir: "auto" });
      const head = text.kind === "note" || !text.node ? null : h("div", { class: "who" });
      item = { body, head, element: h("article", { class: `text ${text.kind}` }, head, body), version: -1 };
      this._items.set(text, item);
      this._list.append(item.element);
    }
    if (item.version === text.version) return;
    item.version = text.version;
    if (text.kind === "message") {
      const role = text.whole?.data.role;
      say(item.head, [text.key, role && role !== "ai" ? role : "", text.whole?.data.name ?? ""].filter(Boolean).join(" · "));
      show(item.body, textOf(text), calls(text.whole));
      set(item.element, "data-open", text.whole ? null : "");
      return;
    }
    if (item.head) say(item.head, text.key);
    if (text.kind === "note") say(item.body, `${text.key ? `${text.key}: ` : ""}${text.value}`);
    else show(item.body, text.value);
  }
}

function show(element, value, more = "") {
  const link = moved(value);
  if (link) element.replaceChildren(link, more);
  else say(element, (plain(value) + more).replace(/^\n/, ""));
}

function calls(whole) {
  const list = whole?.data.tool_calls;
  if (moved(list)) return "\n→ calls that are too large for their line";
  return (list ?? []).map((call) => `\n→ ${call.name}(${JSON.stringify(call.args)})`).join("");
}

/** What stands for a value that was too large for its line; null for any other value. */
export function moved(value) {
  if (typeof value?.bytes !== "number" || Object.keys(value).length !== 2) return null;
  const size = `${value.bytes.toLocaleString()} bytes`;
  if (value.$truncated === true) return h("span", { class: "hint" }, `${size}, too large to be kept`);
  if (!/^\/v1\/runs\/[\w-]+\/data\/\d+\/\w+$/.test(value.$ref)) return null;
  return h("a", { href: address(value.$ref.slice(1)), target: "_blank", rel: "noreferrer" }, `Open ${size}`);
}

/** A custom value as a person would say it. */
function plain(value) {
  if (typeof value === "string") return value;
  const { message } = value ?? {};
  return typeof message === "string" ? message : JSON.stringify(value);
}
