// What the daemon says: its API, and its stream of events.

/** A request that was refused, in the daemon's own words. */
export class Refused extends Error {
  constructor(status, told) {
    super(told);
    this.status = status;
  }
}

/** The address of a path of the daemon; something may lead here by a path before it. */
const at = (path) => new URL(`..${path}`, import.meta.url);

/** One request; its JSON, or null. */
export async function ask(path, method = "GET", body = undefined) {
  let answer;
  try {
    answer = await fetch(at(path), {
      method,
      headers: body === undefined ? {} : { "Content-Type": "application/json" },
      body: body === undefined ? undefined : JSON.stringify(body),
      credentials: "same-origin",
      redirect: "error",
    });
  } catch {
    throw new Refused(0, "the daemon does not answer; nothing is known to have been done");
  }
  const text = await answer.text();
  let value = null;
  try {
    value = JSON.parse(text);
  } catch {
    // an empty body, or no JSON
  }
  if (!answer.ok) throw new Refused(answer.status, value?.detail ?? `it answered ${answer.status}`);
  return value;
}

const PAST = 200;
const PAUSES = [0.3, 1, 2, 5, 10];

/** Follow the events for ever: `told` gets each, `live` whether the stream is there and why not. */
export async function follow(told, live) {
  let last = null;
  let failures = 0;
  for (;;) {
    try {
      if (last === null) last = Math.max(0, (await begin()) - PAST);
      await read(last, (id, kind, data) => {
        last = id;
        told({ ...data, number: id, kind });
      }, () => {
        failures = 0;
        live(true, "");
      });
    } catch (error) {
      live(false, error.message);
    }
    const pause = PAUSES[Math.min(failures, PAUSES.length - 1)];
    failures += 1;
    await new Promise((done) => setTimeout(done, pause * 1000));
  }
}

/** The number of the newest event. */
async function begin() {
  const cut = new AbortController();
  try {
    const answer = await open("/v1/events", {}, cut);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    while (!text.includes("\n\n")) {
      const { value, done } = await reader.read();
      if (done) throw new Error("the daemon has ended the stream of events");
      text += value;
    }
    return Number(/^id: (\d+)$/m.exec(text)?.[1] ?? 0);
  } finally {
    cut.abort();
  }
}

async function open(path, headers, cut) {
  let answer;
  try {
    answer = await fetch(at(path), { headers, signal: cut.signal, credentials: "same-origin" });
  } catch {
    throw new Error("the daemon does not answer");
  }
  if (!answer.ok) {
    const value = await answer.json().catch(() => null);
    throw new Error(value?.detail ?? `the stream of events answered ${answer.status}`);
  }
  return answer;
}

async function read(after, event, opened) {
  const cut = new AbortController();
  // A line that is dead without anybody knowing: the daemon says something every 15 s.
  let watch = setTimeout(() => cut.abort(), 45000);
  try {
    const answer = await open("/v1/events", { "Last-Event-ID": String(after) }, cut);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let text = "";
    opened();
    for (;;) {
      const { value, done } = await reader.read().catch(() => ({ done: true }));
      if (done) throw new Error("the stream of events has ended");
      clearTimeout(watch);
      watch = setTimeout(() => cut.abort(), 45000);
      text += value;
      const whole = text.split("\n\n");
      text = whole.pop();
      for (const each of whole) parse(each, event);
    }
  } finally {
    clearTimeout(watch);
    cut.abort();
  }
}

function parse(text, event) {
  const found = { data: "" };
  for (const line of text.split("\n")) {
    const end = line.indexOf(": ");
    if (end > 0) found[line.slice(0, end)] = line.slice(end + 2);
  }
  if (!found.data) return;
  try {
    event(Number(found.id), found.event, JSON.parse(found.data));
  } catch {
    // one that can't be read is not told; the next one is
  }
}

/** A page of the manual. */
export async function text(path) {
  const answer = await fetch(at(path), { credentials: "same-origin" }).catch(() => null);
  if (!answer?.ok) throw new Refused(answer?.status ?? 0, "the manual can't be read now");
  return answer.text();
}
