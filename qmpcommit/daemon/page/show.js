// Values as people read them, and small drawings of them.
import { h } from "./dom.js";

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** Bytes, with one decimal below ten of a unit. */
export function size(bytes) {
  if (bytes === null || bytes === undefined) return "?";
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  const digits = unit && value < 10 && value % 1 ? 1 : 0;
  return `${value.toFixed(digits)} ${UNITS[unit]}`;
}

/** Seconds, in the two largest units. */
export function span(seconds) {
  const s = Math.max(0, seconds);
  if (s < 1 && s > 0) return `${Math.round(s * 1000)} ms`;
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** A moment (seconds since 1970), as this browser's clock has it. */
export function moment(at) {
  if (!at) return "never";
  const date = new Date(at * 1000);
  const today = new Date().toDateString() === date.toDateString();
  const pad = (number) => String(number).padStart(2, "0");
  const clock = [date.getHours(), date.getMinutes(), date.getSeconds()].map(pad).join(":");
  const day = [date.getFullYear(), date.getMonth() + 1, date.getDate()].map(pad).join("-");
  return today ? clock : `${day} ${clock}`;
}

/** A file's name, its folder less loud; it wraps, and is never cut. */
export function file(path) {
  const at = path.lastIndexOf("/") + 1;
  return h("span", { class: "file" }, h("span", { class: "folder" }, path.slice(0, at)),
    path.slice(at));
}

/** A word in a coloured frame; the colour says nothing that the word does not. */
export const badge = (kind, ...text) => h("span", { class: `badge ${kind}` }, ...text);

/** A bar of parts of a whole, which says its number to who can't see it. */
export function bar(part, whole, label, kind = "") {
  const share = whole > 0 ? Math.min(1, part / whole) : 0;
  return h("progress", { class: kind, max: "1", value: share.toFixed(4), "aria-label": label },
    `${Math.floor(share * 100)} %`);
}

/** Bytes over time, and `what` they are: `samples` are [seconds, bytes]. */
export function plot(samples, what) {
  const wide = 240;
  const high = 44;
  const first = samples[0][0];
  const time = Math.max(1, samples.at(-1)[0] - first);
  const most = Math.max(1, ...samples.map(([, bytes]) => bytes));
  const points = samples.map(([at, bytes]) => [
    ((at - first) / time) * wide,
    2 + (1 - bytes / most) * (high - 4),
  ]);
  const line = points.map(([x, y]) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" L");
  const [, now] = samples.at(-1);
  const told = `${size(now)} ${what}, at most ${size(most)} in the last ${span(time)}`;
  return h("figure", { class: "plot" },
    h("svg", { viewBox: `0 0 ${wide} ${high}`, preserveAspectRatio: "none", "aria-hidden": "true" },
      h("path", { class: "area", d: `M0,${high} L${line} L${points.at(-1)[0].toFixed(1)},${high} Z` }),
      h("path", { class: "line", d: `M${line}` })),
    h("figcaption", {}, told));
}

/** A list of names and values; those without a value are left out. */
export function facts(...pairs) {
  return h("dl", { class: "facts" }, pairs
    .filter(([, value]) => value !== null && value !== undefined && value !== ""
      && value !== false)
    .map(([name, value]) => h("div", { key: name }, h("dt", {}, name), h("dd", {}, value))));
}
