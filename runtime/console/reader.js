// Follows a run's lines over as many connections as it takes: each line once, in order.

import { address } from "./api.js";

const HEARTBEAT_S = 5;
/** A connection that says nothing for this long is as good as cut. */
const SILENCE_MS = 3 * HEARTBEAT_S * 1000;
const WAITS_MS = [250, 500, 1000, 2000, 4000, 5000];

/**
 * Calls `onLines` with batches of `{ line, text }`, `onStatus` with `{ kind, … }`:
 *
 *   connecting        the first connection is being made
 *   reading           what was stored is being read
 *   live              everything there is has been read, and the connection is open
 *   waiting           the connection was cut; `until` says when it is tried again, `tries` how often
 *   ended             the terminal line was read
 *   refused           the server says that there is nothing to read; `why` in its words
 *
 * `onReset` is called when the server's log is another one: what was read no longer holds.
 */
export class Reader {
  constructor(runId, { onLines, onStatus, onReset }) {
    this.cursor = 0;
    this.cuts = 0;
    this._url = `v1/runs/${encodeURIComponent(runId)}/stream`;
    this._onLines = onLines;
    this._onStatus = onStatus;
    this._onReset = onReset;
    this._logId = null;
    this._closed = false;
    this._ended = false;
    this._tries = 0;
    this._askedToWait = 0;
    this._abort = null;
    this._wake = () => {};
    this._online = () => this.retryNow();
    addEventListener("online", this._online);
    this._follow();
  }

  close() {
    this._closed = true;
    removeEventListener("online", this._online);
    this._abort?.abort();
    this._wake();
  }

  retryNow() {
    this._wake();
  }

  async _follow() {
    this._status("connecting");
    while (!this._closed) {
      const refused = await this._connect().catch(() => null);
      if (this._closed) return;
      if (this._ended || refused) {
        removeEventListener("online", this._online);
        this._status(this._ended ? "ended" : "refused", refused ?? {});
        return;
      }
      const wait = Math.max(this._askedToWait, WAITS_MS[Math.min(this._tries++, WAITS_MS.length - 1)]);
      this.cuts += 1;
      this._status("waiting", { until: Date.now() + wait, tries: this._tries });
      await this._sleep(wait);
      this._status("waiting", { until: null, tries: this._tries });
    }
  }

  /** One connection, read to its end. What the server refuses for good, if it does. */
  async _connect() {
    this._askedToWait = 0;
    this._abort = new AbortController();
    const silence = new Alarm(() => this._abort.abort(), SILENCE_MS);
    try {
      const query = `?after=${this.cursor}&heartbeat=${HEARTBEAT_S}`;
      const response = await fetch(address(this._url + query), {
        headers: { Accept: "application/x-ndjson" },
        signal: this._abort.signal,
        cache: "no-store",
      });
      if (response.status === 204) {
        this._ended = true;
        return null;
      }
      if (!response.ok) return await this._refusal(response);
      const kind = response.headers.get("Content-Type") ?? "nothing";
      // Something in between may answer in the server's place, a page to log in for instance.
      if (!kind.startsWith("application/x-ndjson")) return { why: `what answered is not Sereno, it sent ${kind}` };
      const logId = response.headers.get("X-Log-Id");
      if (this._logId !== null && logId !== this._logId) {
        this._startOver();
        this._logId = logId;
        return null;
      }
      this._logId = logId;
      this._status("reading");
      for await (const batch of batches(response.body, silence)) this._take(batch);
      return null;
    } finally {
      silence.stop();
      this._abort.abort();
    }
  }

  async _refusal(response) {
    if (response.status >= 500 || [408, 425, 429].includes(response.status)) {
      this._askedToWait = 1000 * Math.min(60, Number(response.headers.get("Retry-After")) || 0);
      return null;
    }
    const problem = await response.json().catch(() => null);
    if (problem?.code === "cursor_ahead") {
      this._startOver();
      return null;
    }
    return { why: problem?.detail ?? `the server answered ${response.status}` };
  }

  /** The log is another one, for instance after its file was restored. */
  _startOver() {
    this.cursor = 0;
    this._onReset();
  }

  /** Hands on what is good; a line that cannot be, or that is missing, ends the connection. */
  _take(batch) {
    const fresh = [];
    let caughtUp = false;
    try {
      for (const text of batch) {
        if (text === "") continue;
        const line = JSON.parse(text);
        if (line.seq === undefined) {
          caughtUp ||= line.type === "caught_up" || line.type === "heartbeat";
          fresh.push({ line, text });
        } else if (line.seq === this.cursor + 1) {
          this.cursor = line.seq;
          this._ended ||= line.data.final === true;
          fresh.push({ line, text });
        } else if (line.seq > this.cursor) {
          throw new Error(`line ${this.cursor + 1} is missing`); // the next connection asks for it
        }
      }
    } finally {
      if (fresh.length) {
        this._tries = 0;
        this._onLines(fresh);
      }
    }
    if (caughtUp && !this._ended) this._status("live");
  }

  _status(kind, more = {}) {
    if (!this._closed) this._onStatus({ kind, cursor: this.cursor, cuts: this.cuts, ...more });
  }

  _sleep(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this._wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}

/** The whole lines of each chunk; what a cut left unfinished is dropped. */
async function* batches(body, silence) {
  const chunks = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await chunks.read();
    if (done) return;
    silence.rest();
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    if (lines.length) yield lines;
  }
}

/** Rings when nobody lets it rest for a while. */
class Alarm {
  constructor(ring, ms) {
    this._last = Date.now();
    this._timer = setInterval(() => Date.now() - this._last > ms && ring(), ms / 5);
  }

  rest() {
    this._last = Date.now();
  }

  stop() {
    clearInterval(this._timer);
  }
}
