// VMs, and their backing chains as they are now.
import { h } from "./dom.js";
import { badge, file, size } from "./show.js";

const STATES = {
  connected: "good",
  connecting: "busy",
  away: "wrong",
  idle: "quiet",
};

const MANY = 60;

/** Which layers a commit merges into which: [top, base] as indices, or null. */
export function reach(chain, asked) {
  const find = (layer) => {
    if (typeof layer === "number") return layer;
    return chain.findIndex((image) => [image.node_name, image.filename, image.shown,
      image.given_as].includes(layer));
  };
  const top = asked.top === null || asked.top === undefined ? 0 : find(asked.top);
  let base = chain.length - 1;
  if (asked.shallow) base = top + 1;
  else if (asked.base !== null && asked.base !== undefined) base = find(asked.base);
  return top >= 0 && base > top && base < chain.length ? [top, base] : null;
}

/** A window's disks, each with its VM. */
export function windowDisks(window) {
  const parts = window.windows.length ? window.windows
    : [{ vm: window.vm, disks: window.disks }];
  return parts.flatMap((part) => Object.values(part.disks)
    .map((disk) => ({ vm: part.vm, ...disk })));
}

/** The disk of a VM that is called so, where it was looked at. */
export function diskOf(state, vm, name) {
  return state.disks.get(vm)?.found?.find((disk) => [disk.name, disk.device, disk.qdev, disk.root]
    .includes(name) || disk.chain.some((image) => image.node_name === name
      || image.filename === name));
}

/** All VMs whose names hold the filter's text. */
export function vms(state, actions) {
  const rank = (vm) => (busy(state, vm) ? 0 : vm.state === "idle" ? 2 : 1);
  const wanted = state.vms.filter((vm) => vm.name.includes(state.filter))
    .sort((a, b) => rank(a) - rank(b) || (a.name < b.name ? -1 : 1));
  if (!wanted.length)
    return h("p", { class: "none" }, state.vms.length
      ? `No VM's name has '${state.filter}' in it.`
      : "The daemon knows no VM that you may see.");
  const shown = state.all ? wanted : wanted.slice(0, MANY);
  const more = wanted.length - shown.length;
  return [h("div", { class: "cards" }, shown.map((vm) => card(state, vm, actions))),
    more > 0 && h("p", { class: "more" }, `${more} more are not shown. `,
      h("button", { type: "button", onclick: actions.all }, "Show all"))];
}

/** Whether something is done with it: such VMs come first. */
const busy = (state, vm) => state.commits.some((one) => one.vm === vm.name && !one.ended)
  || state.windows.some((one) => !one.ended && one.vm.split(",").includes(vm.name))
  || (state.disks.get(vm.name)?.jobs ?? []).length > 0;

function card(state, vm, actions) {
  const looked = state.disks.get(vm.name);
  const jobs = (looked?.jobs ?? []).filter((job) => !job.commit);
  return h("article", { class: "card vm", key: `vm ${vm.name}`, "data-vm": vm.name },
    h("header", {}, h("h3", {}, vm.name), badge(STATES[vm.state] ?? "", vm.state)),
    vm.error && h("p", { class: "error" }, vm.error),
    looked?.error && !vm.error && h("p", { class: "error" }, looked.error),
    vm.state === "idle" && !looked && h("p", {},
      "Its monitor is held only while something needs it. ",
      h("button", { type: "button", onclick: () => actions.look(vm.name) }, "Look at its disks",
        h("span", { class: "unseen" }, ` (${vm.name})`))),
    (looked?.found ?? []).map((disk) => drawn(state, vm, disk)),
    looked?.found && !looked.found.length && h("p", { class: "none" }, "It has no disks."),
    jobs.map((job) => h("p", { key: `job ${job.device}` },
      badge(job.ready ? "ready" : "busy", job.ready ? "READY" : job.status || job.type),
      ` ${job.device}: a ${job.type} job that others began`)),
    h("p", { class: "small" }, vm.qmp, vm.pid && `, process ${vm.pid}`,
      vm.origin === "api" ? ", added by a client" : "",
      vm.connect === "on-demand" ? ", connected on demand" : ""));
}

function drawn(state, vm, disk) {
  const work = state.commits.find((commit) => commit.vm === vm.name && !commit.ended
    && diskOf(state, vm.name, commit.disk)?.name === disk.name);
  const merged = work && work.state === "running" ? reach(disk.chain, work.request) : null;
  const still = state.windows.filter((window) => !window.ended).flatMap(windowDisks)
    .filter((one) => one.vm === vm.name).map((one) => one.filename);
  const most = Math.max(1, ...disk.chain.map((image) => image.allocated_size ?? 0));
  return h("section", { class: "disk", key: `disk ${disk.name}` },
    h("h4", {}, disk.name, " ", h("span", { class: "small" },
      `${disk.chain.length} ${disk.chain.length === 1 ? "layer" : "layers"}`),
    disk.io_status && disk.io_status !== "ok" && badge("wrong", `I/O: ${disk.io_status}`)),
    disk.chain.length
      ? h("ol", { class: "chain", "aria-label": `backing chain of ${disk.name} of ${vm.name},`
        + " active layer first" },
      disk.chain.map((image, at) => layer(image, at, most, merged, work, still)))
      : h("p", { class: "none" }, "No medium is inserted."));
}

function layer(image, at, most, merged, work, still) {
  const into = merged && at === merged[1];
  const from = merged && at >= merged[0] && at < merged[1];
  const role = into ? " target" : from ? " merging" : "";
  const taken = image.allocated_size;
  return h("li", { class: `layer${at === 0 ? " active" : ""}${role}`, key: image.node_name },
    h("div", { class: "line" }, file(image.filename),
      h("span", { class: "badges" },
        at === 0 && badge("good", "active"),
        still.includes(image.filename) && badge("quiet", "stands still in a window"),
        from && badge("busy", "being committed"),
        into && badge("busy", work.phase === "ready" ? "holds all of it" : "takes the data"),
        (image.bitmaps ?? []).length > 0 && badge("quiet", `${image.bitmaps.length} bitmaps`))),
    h("div", { class: "fill" },
      h("meter", { min: "0", max: String(most), value: String(taken ?? 0),
        "aria-label": "bytes on the host" }),
      h("span", { class: "small" }, `${size(taken)} of ${size(image.virtual_size)}, `,
        `${image.driver}, node ${image.node_name}`)),
    (image.warnings ?? []).map((told) => h("p", { class: "error", key: told }, told)),
    image.astray && h("p", { class: "error" }, image.astray));
}

export const PIVOT = "The base becomes the active image. The overlay is invalid from then on:"
  + " it must never be booted again.";
export const KEEP = "The overlay stays active. The base holds everything up to this instant.";
export const ABORT = "The job is cancelled by force. The overlay stays active and loses nothing;"
  + " the base is left half-written, or ahead of what it held before.";
