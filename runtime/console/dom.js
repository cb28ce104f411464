// Small words for making elements and for saying times, sizes and states.

/** An element. Functions in `props` listen, `dataset` and `class` are what they say, the rest are attributes. */
export const h = (tag, props, ...children) =>
  fill(document.createElement(tag), props, children);

/** An SVG element. */
export const s = (tag, props, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), props, children);

function fill(element, props, children) {
  for (const [name, value] of Object.entries(props ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (typeof value === "function") element.addEventListener(name, value);
    else if (name === "dataset") Object.assign(element.dataset, value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** Set text or an attribute only when it differs: a write makes the browser lay out again. */
export function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function set(element, name, value) {
  if (value === null || value === undefined) element.removeAttribute(name);
  else if (element.getAttribute(name) !== String(value)) element.setAttribute(name, value);
}

export function duration(ms) {
  if (!(ms >= 0)) return "";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 60_000) return `${(ms / 1000).toFixed(1)} s`;
  const minutes = Math.floor(ms / 60_000);
  if (minutes < 60) return `${minutes} min ${Math.floor((ms % 60_000) / 1000)} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function ago(time) {
  const seconds = Math.max(0, (Date.now() - time) / 1000);
  if (seconds < 60) return "just now";
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 86_400) return `${Math.floor(seconds / 3600)} h ago`;
  return new Date(time).toLocaleDateString();
}

export const clock = (time) => new Date(time).toISOString().slice(11, 23);

/** A status of a run as the state of a node that it looks like. */
export const LOOKS = {
  pending: "waiting",
  running: "running",
  success: "done",
  error: "failed",
  timeout: "failed",
  cancelled: "cancelled",
  interrupted: "interrupted",
};

/** A shape for each state, so that colour alone never tells. */
export const GLYPHS = {
  waiting: "○",
  running: "●",
  retrying: "↻",
  done: "✓",
  failed: "✕",
  cached: "≡",
  interrupted: "?",
  cancelled: "–",
};

export function chip(status) {
  const look = LOOKS[status] ?? "waiting";
  return h("span", { class: "chip", "data-state": look },
    h("span", { "aria-hidden": "true" }, GLYPHS[look]), ` ${status}`);
}

/** A button that copies, and says that it did; `name` tells it from others of its label. */
export function copyButton(label, text, name = null) {
  let timer;
  const button = h("button", {
    type: "button",
    class: "quiet",
    "aria-label": name,
    click: async () => {
      clearTimeout(timer);
      button.textContent = label;
      const said = await copy(text()) ? "Copied" : "Not allowed to copy";
      button.textContent = said;
      announce(said);
      timer = setTimeout(() => (button.textContent = label), 1500);
    },
  }, label);
  return button;
}

/** Whether it could be copied. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without https there is no clipboard but the old one.
    const area = h("textarea", { class: "offscreen" });
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Say something to who listens instead of looking. */
export function announce(text) {
  document.getElementById("announcer").textContent = text;
}

/** Text as one word of a POSIX shell. */
export const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;
