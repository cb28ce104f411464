// The public endpoints that answer with JSON.

/** An address below the page's own, wherever a proxy has put it. */
export const address = (path) => new URL(path, document.baseURI).href;

const PAGE_MAX = 500;

/** What the server refused, in its own words. */
export class Problem extends Error {
  constructor(status, body) {
    super(body?.detail ?? body?.title ?? `the server answered ${status}`);
    this.status = status;
    this.code = body?.code;
    this.body = body;
  }
}

async function call(path, options) {
  let response;
  try {
    response = await fetch(address(path), options);
  } catch {
    throw new Error("The server cannot be reached.");
  }
  const body = await response.json().catch(() => undefined);
  if (!response.ok) throw new Problem(response.status, body);
  if (body === undefined) throw new Error("What answered is not Sereno: it sent no JSON.");
  return body;
}

const get = (path) => call(path);
const post = (path, body) =>
  call(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
const name = encodeURIComponent;

export const info = () => get("info");
export const graphs = () => get("v1/graphs");
export const schema = (graph) => get(`v1/graphs/${name(graph)}/schema`);
export const runs = (query = {}) => get(`v1/runs?${new URLSearchParams(query)}`);

/** The newest runs that fit, `count` of them over as many pages as it takes. */
export async function newestRuns(count, query) {
  const found = [];
  let cursor = null;
  do {
    const page = await runs({ ...query, limit: Math.min(PAGE_MAX, count - found.length), ...(cursor && { cursor }) });
    found.push(...page.runs);
    cursor = page.next_cursor;
  } while (cursor && found.length < count);
  return { runs: found, more: cursor !== null };
}

export const run = (id) => get(`v1/runs/${name(id)}`);
/** A member that was too large for its line: what stands in `$ref`. */
export const member = (ref) => get(ref.replace(/^\//, ""));
export const start = (body) => post("v1/runs", body);
export const cancel = (run, reason) => post(`v1/runs/${name(run)}/cancel`, { reason });
export const resume = (thread, answer) => post(`v1/threads/${name(thread)}/resume`, { resume: answer });
export const threadState = (thread) => get(`v1/threads/${name(thread)}/state`);

/** How a graph is drawn: nodes and edges; null where only its nodes are known. */
export async function drawing(graph) {
  try {
    return await get(`v1/graphs/${name(graph)}/drawing?format=json&xray=10`);
  } catch (problem) {
    if (problem instanceof Problem) return null;
    throw problem;
  }
}
