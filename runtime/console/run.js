// A run as its lines tell it: a fold, with what failed attempts said taken back (docs/events.md).

const STATUS = {
  "run.completed": "success",
  "run.failed": "error",
  "run.timed_out": "timeout",
  "run.cancelled": "cancelled",
  "run.interrupted": "interrupted",
};

/** How many of the lines that tell the server's clock count. */
const HEARD = 4;

export class Run {
  constructor(runId) {
    this.runId = runId;
    this.threadId = null;
    this.graph = null;
    /** Null until a line tells it. */
    this.status = null;
    this.epoch = 0;
    this.traceId = null;
    this.queuedAt = null;
    this.startedAt = null;
    this.endedAt = null;
    /** The terminal line's data. */
    this.result = null;
    /** Whether a later run has answered what this one asked. */
    this.answered = false;
    /** Visits of nodes, by task, in the order in which they began. */
    this.visits = new Map();
    /** What the drawing shows, by the node's path. */
    this.nodes = new Map();
    /** The path of the node that was entered last. */
    this.latest = null;
    /** Messages, custom values and notes, in the order of their first line. */
    this.texts = [];
    /** The seqs of lines that were taken back. */
    this.discarded = new Set();
    /** When a server took the run up again. */
    this.recoveries = [];
    /** The time at which the connection was cut: what has happened since, nobody here knows. */
    this.cutAt = null;
    /** When the last line was written. */
    this.lastAt = null;
    /** How far this machine's clock is ahead of the server's, at most. */
    this.skew = null;
    this._skews = [];
    this._messages = new Map();
    this._said = new Map();
  }

  get over() {
    return this.result !== null;
  }

  /** The server's time, as far as we can tell. */
  now() {
    return this.endedAt ?? this.cutAt ?? Date.now() - (this.skew ?? 0);
  }

  fold(line) {
    const at = Date.parse(line.ts);
    if (line.seq === undefined) {
      this._hear(at);
      return;
    }
    this.epoch = line.epoch;
    this.threadId = line.thread_id;
    this.traceId = line.trace_id ?? this.traceId;
    FOLDS[line.type]?.(this, line, at);
    if (line.type in STATUS) end(this, line, at);
    this.lastAt = at;
  }

  /**
   * Lines that are sent as they are made tell the server's clock; the quickest one tells it best.
   * Only the last few count, for this machine's clock may be set.
   */
  _hear(at) {
    this._skews = [...this._skews.slice(1 - HEARD), Date.now() - at];
    this.skew = Math.min(...this._skews);
  }
}

const FOLDS = {
  "run.queued"(run, line, at) {
    run.status = "pending";
    run.graph = line.data.graph;
    run.queuedAt = at;
  },
  "run.started"(run, line, at) {
    run.status = "running";
    run.startedAt = at;
  },
  "run.requeued"(run) {
    run.status = "pending";
  },
  "run.recovered"(run, line, at) {
    run.status = "running";
    run.recoveries.push({ at, reason: line.data.reason });
    let dropped = 0;
    for (const { task } of listed(line.data.lost)) {
      const visit = run.visits.get(task);
      if (visit) {
        loseBar(visit, run.lastAt, at);
        become(run, visit, "waiting");
      }
      const own = (run._said.get(task) ?? []).filter((text) => text.task === task);
      dropped += discard(run, own, line.data.discard_from);
    }
    const why = line.data.reason === "crash" ? "The server was gone" : "The server was restarted";
    note(run, line, `${why}; the run goes on from its last checkpoint.${taken(dropped)}`);
  },
  "node.started"(run, line, at) {
    const visit = visitOf(run, line);
    closeBar(visit, at, "wait");
    visit.attempt = line.attempt;
    run.latest = visit.key;
    openBar(visit, "attempt", at);
    become(run, visit, "running");
  },
  "node.retrying"(run, line, at) {
    const visit = visitOf(run, line);
    closeBar(visit, at, "failed");
    openBar(visit, "wait", at);
    visit.retryAt = at + line.data.retry_in_ms;
    visit.retryBy = visit.retryAt + (line.data.jitter_ms ?? 0);
    visit.error = line.data.error_type;
    visit.attempts = line.data.max_attempts;
    become(run, visit, "retrying");
    const dropped = discard(run, run._said.get(line.task) ?? [], line.data.discard_from);
    note(run, line, `${line.data.error_type} in attempt ${line.attempt}; it is tried again.${taken(dropped)}`);
  },
  "node.completed"(run, line, at) {
    settle(run, line, at, line.data.cached ? "cached" : "done");
  },
  "node.failed"(run, line, at) {
    visitOf(run, line).error = line.data.error_type;
    settle(run, line, at, "failed");
  },
  "node.interrupted"(run, line, at) {
    settle(run, line, at, "interrupted");
  },
  "node.cancelled"(run, line, at) {
    settle(run, line, at, "cancelled");
  },
  "call.retrying"(run, line, at) {
    run.visits.get(line.task)?.bars.at(-1)?.pauses.push({ from: at, to: at + line.data.retry_in_ms });
    const said = listed(line.data.message_ids).map((id) => run._messages.get(id)).filter(Boolean);
    const dropped = discard(run, said, 0);
    note(run, line, `${line.data.error_type} in ${line.data.call}; it is called again.${taken(dropped)}`);
  },
  token(run, line) {
    const message = messageOf(run, line);
    message.pieces.push({ seq: line.seq, text: line.data.text });
    message.version += 1;
  },
  message(run, line) {
    const message = messageOf(run, line);
    message.whole = { seq: line.seq, data: line.data };
    message.version += 1;
  },
  custom(run, line) {
    add(run, line, { kind: "custom", value: line.data.value });
  },
};

/** A list of a line, unless it was too large for it. */
const listed = (list) => (Array.isArray(list) ? list : []);

/** The visit of a node that a line is from. */
function visitOf(run, line) {
  let visit = run.visits.get(line.task);
  if (!visit) {
    const key = [...line.ns, line.node].join("/");
    visit = {
      task: line.task, node: line.node, key, depth: line.ns.length, step: line.step,
      parent: line.path.at(-1) ?? null,
      state: null, attempt: line.attempt, attempts: null, bars: [], retryAt: null, retryBy: null, error: null,
      durationMs: null,
    };
    run.visits.set(line.task, visit);
    if (!run.nodes.has(key)) {
      run.nodes.set(key, { key, name: line.node, depth: visit.depth, visits: 0, states: {}, last: null });
    }
    run.nodes.get(key).visits += 1;
  }
  return visit;
}

function become(run, visit, state) {
  const node = run.nodes.get(visit.key);
  if (visit.state !== null) node.states[visit.state] -= 1;
  node.states[state] = (node.states[state] ?? 0) + 1;
  node.last = visit;
  visit.state = state;
}

/** What a node as a whole is doing: what still moves is told before what has ended. */
export function stateOf(node) {
  if (!node) return "waiting";
  for (const state of ["running", "retrying", "interrupted"]) {
    if (node.states[state]) return state;
  }
  return node.last.state;
}

function settle(run, line, at, state) {
  const visit = visitOf(run, line);
  const { duration_ms: ms } = line.data;
  if (!visit.bars.length) openBar(visit, "attempt", at);
  closeBar(visit, at, state);
  visit.durationMs = ms ?? null;
  become(run, visit, state);
}

/** `pauses` are the back-offs of the calls in it, as long as they are meant to be. */
function openBar(visit, kind, at) {
  visit.bars.push({ kind, from: at, to: null, outcome: null, pauses: [] });
}

function closeBar(visit, at, outcome) {
  const bar = visit.bars.at(-1);
  if (bar && bar.to === null) {
    bar.to = at;
    bar.outcome = outcome;
  }
}

/** What was under way is known up to the run's last line; how long it still went on, nobody knows. */
function loseBar(visit, from, to) {
  if (visit.bars.at(-1).to !== null) return;
  closeBar(visit, from, "lost");
  openBar(visit, "gone", from);
  closeBar(visit, to, null);
}

function end(run, line, at) {
  run.status = STATUS[line.type];
  run.result = line.data;
  run.endedAt = at;
  for (const visit of run.visits.values()) {
    if (["running", "retrying", "waiting"].includes(visit.state)) {
      closeBar(visit, at, "cancelled");
      become(run, visit, "cancelled");
    }
  }
}

// What was said, and what is taken back of it.

function add(run, line, text) {
  const whole = {
    ...text, seq: line.seq, task: line.task, node: line.node, key: [...(line.ns ?? []), line.node].join("/"),
    attempt: line.attempt, gone: false, version: 0,
  };
  run.texts.push(whole);
  for (const task of [line.task, ...(line.path ?? [])]) {
    if (!run._said.has(task)) run._said.set(task, []);
    run._said.get(task).push(whole);
  }
  return whole;
}

function messageOf(run, line) {
  const id = line.data.message_id;
  let message = run._messages.get(id);
  if (!message || message.gone) {
    message = add(run, line, { kind: "message", id, pieces: [], whole: null });
    run._messages.set(id, message);
  }
  return message;
}

/** Take back what was said from a seq on. How many lines that were. */
function discard(run, texts, from) {
  const before = run.discarded.size;
  for (const text of texts) {
    if (text.gone || text.kind === "note") continue;
    if (text.kind === "custom") {
      if (text.seq >= from) drop(run, text, text.seq);
      continue;
    }
    text.pieces = text.pieces.filter(({ seq }) => seq < from || drop(run, text, seq));
    if (text.whole?.seq >= from) {
      drop(run, text, text.whole.seq);
      text.whole = null;
    }
    text.gone = !text.pieces.length && !text.whole;
    text.version += 1;
  }
  return run.discarded.size - before;
}

function drop(run, text, seq) {
  run.discarded.add(seq);
  text.gone = text.kind === "custom";
  return false;
}

function note(run, line, value) {
  const key = line.node ? [...line.ns, line.node].join("/") : null;
  run.texts.push({ kind: "note", seq: line.seq, node: line.node, key, value, gone: false, version: 0 });
}

const taken = (lines) =>
  lines ? ` What it had said is taken back: ${lines} ${lines === 1 ? "line" : "lines"}.` : "";

/** The text of a message as far as it has come; where it is, when it was too large for its line. */
export const textOf = (message) =>
  message.whole ? message.whole.data.text ?? "" : message.pieces.map((piece) => piece.text).join("");
