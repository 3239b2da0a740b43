// What is done with disks: commits, groups, windows, cycles and rules.
import { question } from "./ask.js";
import { h } from "./dom.js";
import { badge, bar, facts, file, moment, plot, size, span } from "./show.js";
import { ABORT, diskOf, KEEP, PIVOT, reach, windowDisks } from "./vms.js";

const LATELY = 20;
const LONG = 300;
const NEVER_BEGUN = "It waits in the queue, and is never begun: no file is touched.";
const LOOK_ON = "You may look on; deciding needs the role 'operate' here.";

const named = (commit) => `${commit.disk} of ${commit.vm}`;

function policy(asked) {
  const told = asked.policy;
  if (!told) return "an intermediate layer, which needs no decision";
  const inner = (one) => policy({ policy: one });
  switch (told.kind) {
    case "pivot": return "pivots when READY";
    case "keep": return "keeps the overlay when READY";
    case "abort": return "aborts when READY";
    case "recycle": return "pivots when READY, and lays a fresh overlay";
    case "check": return `a command decides when READY: ${told.command.join(" ")}`;
    case "hold": return told.timeout === null || told.timeout === undefined
      ? "stays READY until somebody decides"
      : `stays READY for ${span(told.timeout)}, then it ${inner(told.otherwise ?? { kind: "keep" })
        .replace(" when READY", "")}`;
    default: return told.kind;
  }
}

const since = (state, at) => state.now() - at;

// -- what waits for a decision, and what is under way ---------------------------------------------

const isReady = (commit) => commit.phase === "ready" && !commit.decision;

/** Whether it is READY and nobody but a person will decide. */
export const waits = (commit) => isReady(commit) && !commit.ended
  && commit.request.policy?.kind === "hold";

/** The number of those that are READY. */
export const waiting = (state) => state.commits.filter((c) => !c.ended && isReady(c)).length
  + foreign(state).filter((job) => job.ready).length;

/** Commits and groups that have not ended, those that are READY first. */
export function underWay(state, actions) {
  const groups = state.groups.filter((group) => !group.ended);
  const alone = state.commits.filter((commit) => !commit.ended && !commit.group);
  const rank = (one) => (isReady(one) ? 0 : one.state === "running" ? 1 : 2);
  const all = [...groups, ...alone].sort((a, b) => rank(a) - rank(b) || a.created - b.created);
  const others = foreign(state);
  if (!all.length && !others.length)
    return h("p", { class: "none" }, "No commit waits or runs.");
  return h("div", { class: "cards" },
    others.map((job) => foreignCard(state, job, actions)),
    all.map((one) => (one.members ? groupCard : commitCard)(state, one, actions)));
}

function phase(commit) {
  if (commit.state === "queued")
    return badge("quiet", commit.position ? `queued, place ${commit.position}` : "queued");
  if (commit.decision) return badge("busy", `decided: ${commit.decision}`);
  if (commit.phase === "ready") return badge("ready", "READY");
  return badge("busy", commit.phase || commit.state);
}

/** How long it has been READY; the longer the louder. */
function age(state, commit) {
  if (!commit.ready || commit.phase !== "ready") return null;
  const seconds = since(state, commit.ready);
  return h("p", { class: seconds > LONG ? "age long" : "age" }, "READY for ",
    h("strong", {}, span(seconds)), seconds > LONG
      ? ": has somebody forgotten it? The guest writes to both images until it is decided."
      : ", and mirrors what the guest writes until it is decided.");
}

function progress(state, commit) {
  const seen = commit.progress;
  if (!seen || commit.phase === "ready") return null;
  const left = seen.total - seen.current;
  const rate = seen.bandwidth;
  return [
    bar(seen.current, seen.total, `${named(commit)}: copied`),
    h("p", { class: "small" }, `${size(seen.current)} of ${size(seen.total)}`,
      rate > 0 && `, ${size(rate)}/s, about ${span(left / rate)} to go`,
      seen.pace && seen.pace !== "moving" && [" ", badge("wrong", seen.pace)]),
  ];
}

function remaining(state, id) {
  const samples = state.samples.get(id) ?? [];
  const fell = samples.length > 1 && samples[0][1] > samples.at(-1)[1];
  return fell ? plot(samples, "remaining") : null;
}

function commitCard(state, commit, actions) {
  return h("article", { class: `card work ${isReady(commit) ? "asks" : ""}`,
    key: `commit ${commit.id}`, "data-commit": commit.id },
  h("header", {}, h("h3", {}, named(commit)), phase(commit)),
  age(state, commit),
  progress(state, commit),
  remaining(state, commit.id),
  facts(["policy", policy(commit.request)],
    ["asked for", commit.created && `${moment(commit.created)}${by(commit.asked_by)}`],
    ["speed limit", commit.bandwidth ? `${size(commit.bandwidth)}/s` : null],
    ["job", commit.job_id]),
  decisions(state, [commit.vm], {
    what: named(commit),
    path: `/v1/commits/${commit.id}`,
    ready: isReady(commit),
    files: files(state, commit),
    queued: commit.state === "queued",
    decided: commit.decision,
  }, actions));
}

/** The commit jobs of other clients, each with its VM. */
export const foreign = (state) => [...state.disks].flatMap(([vm, { jobs }]) => (jobs ?? [])
  .filter((job) => !job.commit && job.type === "commit").map((job) => ({ vm, ...job })));

function foreignCard(state, job, actions) {
  const what = `${job.device} of ${job.vm}`;
  const choose = (action, word, told) => h("button", {
    type: "button",
    onclick: () => question({
      title: `${word} ${what}`,
      lines: ["Somebody else began this job. It becomes a commit of the daemon's, with this end.",
        told],
      word: `${word} ${what}`,
      grave: action === "abort",
      path: `/v1/vms/${encodeURIComponent(job.vm)}/jobs/${encodeURIComponent(job.device)}/decision`,
      body: { action },
      done: actions.refresh,
    }),
  }, word, h("span", { class: "unseen" }, ` ${what}`), " …");
  return h("article", { class: `card work ${job.ready ? "asks" : ""}`,
    key: `job ${job.vm} ${job.device}` },
  h("header", {}, h("h3", {}, what), job.ready ? badge("ready", "READY")
    : badge("busy", job.status || "running")),
  job.ready
    ? h("p", { class: "age" }, "READY for at least ",
      h("strong", {}, span(Date.now() / 1000 - job.seen)), ". Another client began it: it may wait"
      + " for somebody who has gone.")
    : [bar(job.offset, job.len, `${what}: copied`),
      h("p", { class: "small" }, `${size(job.offset)} of ${size(job.len)}; another client began it`)],
  state.asker.operates.includes(job.vm)
    ? h("div", { class: "buttons" }, job.ready && choose("pivot", "Pivot", PIVOT),
      job.ready && choose("keep", "Keep", KEEP), choose("abort", "Abort", ABORT))
    : h("p", { class: "small" }, LOOK_ON));
}

const by = (asker) => (asker ? ` by ${asker.who}` : "");

/** What a decision does to which files, where they are known. */
function files(state, commit) {
  const disk = diskOf(state, commit.vm, commit.disk);
  const found = disk && reach(disk.chain, commit.request);
  if (!found) return null;
  const names = disk.chain.map((image) => image.filename);
  return { active: names[0], base: names[found[1]], stale: names.slice(...found) };
}

function told(known, action) {
  if (!known) return { pivot: [PIVOT], keep: [KEEP], abort: [ABORT] }[action];
  switch (action) {
    case "pivot": return [
      h("span", {}, "The guest goes on to write to ", file(known.base), "."),
      h("span", {}, "Invalid from then on, never to be booted again: ",
        known.stale.map((name, at) => [at ? ", " : "", file(name)]), ".")];
    case "keep": return [
      h("span", {}, "The guest goes on to write to ", file(known.active), "."),
      h("span", {}, file(known.base), " holds everything up to this instant.")];
    default: return [
      h("span", {}, "The guest goes on to write to ", file(known.active), ", which loses nothing."),
      h("span", {}, file(known.base), " is left half-written, or ahead of what it held before.")];
  }
}

function decisions(state, vms, given, actions) {
  const { what, path, ready, files: known, queued, decided, members = [] } = given;
  if (!vms.every((vm) => state.asker.operates.includes(vm)))
    return h("p", { class: "small" }, LOOK_ON);
  const choose = (action, word, grave) => h("button", {
    type: "button",
    class: action === "pivot" ? "first" : "",
    onclick: () => question({
      title: `${word} ${what}`,
      lines: [members.length > 0 && `All of them, at one instant: ${members.map(named).join(", ")}.`,
        ...queued ? [NEVER_BEGUN] : told(known, action)].filter(Boolean),
      word: `${word} ${what}`,
      grave,
      ...(action === "abort"
        ? { path, method: "DELETE" }
        : { path: `${path}/decision`, body: { action } }),
      done: actions.refresh,
    }),
  }, word, h("span", { class: "unseen" }, ` ${what}`), " …");
  return h("div", { class: "buttons" },
    ready && choose("pivot", "Pivot"),
    ready && choose("keep", "Keep"),
    decided !== "abort" && choose("abort", ready ? "Abort" : "Cancel", true));
}

// -- groups ---------------------------------------------------------------------------------------

function groupCard(state, group, actions) {
  const ready = group.phase === "ready" && !group.decision;
  const members = group.members.map((member) => ({
    ...member, commit: state.commits.find((commit) => commit.id === member.commit),
  }));
  const what = `the group ${group.id} (${members.length} disks)`;
  return h("article", { class: `card work ${ready ? "asks" : ""}`, key: `group ${group.id}` },
    h("header", {}, h("h3", {}, `Group of ${members.length} disks`),
      ready ? badge("ready", "READY") : badge("busy", group.decision
        ? `decided: ${group.decision}` : group.phase || group.state)),
    h("ul", { class: "members" }, members.map((member) => memberLine(state, member))),
    facts(["policy", group.request.policy ? policy(group.request) : "each disk's own"],
      ["I/O held at most", `${group.request.hold_limit ?? 2} s`],
      ["guests", group.request.freeze ? `quiesced by ${group.request.freeze}` : null],
      ["asked for", `${moment(group.created)}${by(group.asked_by)}`],
      ["group", group.id]),
    decisions(state, members.map((member) => member.vm), {
      what, path: `/v1/groups/${group.id}`, ready, files: null, members,
      queued: group.state === "queued", decided: group.decision,
    }, actions));
}

function memberLine(state, member) {
  const { commit } = member;
  const held = commit?.progress?.status === "pending";
  return h("li", { key: member.job_id },
    h("div", { class: "line" }, h("strong", {}, `${member.disk} of ${member.vm}`),
      held ? badge("ready", "its I/O is held") : commit && phase(commit)),
    commit && [age(state, commit), progress(state, commit), remaining(state, commit.id)]);
}

// -- windows --------------------------------------------------------------------------------------

const WINDOWS = { opening: "busy", open: "good", closing: "busy", orphan: "wrong" };

/** Windows that are open, or that nobody here opened. */
export function windows(state, actions) {
  const open = state.windows.filter((window) => !window.ended);
  if (!open.length) return h("p", { class: "none" }, "No window is open.");
  return h("div", { class: "cards" }, open.map((window) => windowCard(state, window, actions)));
}

function windowCard(state, window, actions) {
  const vms = window.vm.split(",");
  const left = window.expires ? window.expires - state.now() : null;
  const may = vms.every((vm) => state.asker.operates.includes(vm));
  const disks = windowDisks(window);
  return h("article", { class: "card work", key: `window ${window.id}` },
    h("header", {}, h("h3", {}, `Window on ${vms.join(", ")}`),
      badge(WINDOWS[window.state] ?? "", window.state)),
    window.problem && h("p", { class: "error" }, window.problem),
    window.state === "orphan" && h("p", { class: "error" },
      "Nobody here opened it, or it could not be closed: its disks go on growing."),
    left !== null && [
      bar(Math.max(0, left), window.lease, "what is left of its lease"),
      h("p", { class: left < 10 ? "age long" : "age" }, left > 0
        ? ["its lease ends in ", h("strong", {}, span(left)), `, at ${moment(window.expires)}`]
        : "its lease has ended"),
    ],
    h("ul", { class: "members" }, disks.map((disk) => windowDisk(state, window, disk))),
    facts(["opened", window.created && `${moment(window.created)}${by(window.asked_by)}`],
      ["guest stood still", window.quiesced === null ? null : span(window.quiesced)]),
    may && window.state !== "closing" && h("div", { class: "buttons" },
      h("button", { type: "button", onclick: () => question({
        title: `Close the window on ${vms.join(", ")}`,
        lines: ["What is read from its files from now on is no snapshot any more.",
          h("span", {}, "Each overlay is committed back, pivoted away from and deleted: ",
            disks.map((disk, at) => [at ? ", " : "", file(disk.overlay)]), ".")],
        word: "Close the window",
        path: `/v1/windows/${window.id}`,
        method: "DELETE",
        done: actions.refresh,
      }) }, "Close", h("span", { class: "unseen" }, ` the window on ${vms.join(", ")}`), " …")));
}

function windowDisk(state, window, disk) {
  const samples = state.samples.get(`${window.id} ${disk.overlay}`) ?? [];
  const first = samples[0];
  const grown = samples.length > 1 ? samples.at(-1)[1] - first[1] : 0;
  return h("li", { key: `${disk.vm} ${disk.overlay}` },
    h("div", { class: "line" }, h("strong", {}, `${disk.disk} of ${disk.vm}`)),
    facts(["stands still", file(disk.filename)],
      ["the guest writes to", file(disk.overlay)],
      ["overlay", [size(disk.size), samples.length > 1
        && (grown > 0 ? `, ${size(grown)} more in ${span(samples.at(-1)[0] - first[0])}`
          : ", does not grow")]]),
    grown > 0 && plot(samples, "in the overlay"),
    disk.astray && h("p", { class: "error" }, disk.astray));
}

// -- cycles and rules -----------------------------------------------------------------------------

/** The cycles of the configuration and their rounds. */
export function cycles(state) {
  if (!state.cycles.length)
    return h("p", { class: "none" }, "The configuration has no [[cycle]] that you may see.");
  return h("div", { class: "cards" }, state.cycles.map((each) => {
    const { cycle, running, last } = each;
    const disks = [[cycle.vm, cycle.disk], ...cycle.together.map((one) => [one.vm, one.disk])];
    return h("article", { class: "card", key: `cycle ${cycle.vm} ${cycle.disk}` },
      h("header", {}, h("h3", {}, disks.map(([vm, disk]) => `${disk} of ${vm}`).join(", ")),
        running ? badge("busy", running.state) : badge("quiet", "waits")),
      facts(["when", cycle.at ? `daily at ${cycle.at} of the daemon's host`
        : `every ${span(cycle.every)}`],
      ["next round", each.next_round && `${moment(each.next_round)}, in `
        + span(each.next_round - state.now())],
      ["kept if", cycle.keep_if.join(" ")],
      ["after a discard", `the guest is ${cycle.guest === "reset" ? "reset" : "left stopped"}`],
      ["last round", last && `${last.result ?? last.state}, ${moment(last.ended)}`],
      ["last kept", each.last_kept && moment(each.last_kept)]),
      last?.error && h("p", { class: "error" }, last.error.message),
      (last?.warnings ?? []).map((warning) => h("p", { class: "error", key: warning }, warning)));
  }));
}

const RULES = { within: "good", "left-alone": "quiet", promised: "busy", done: "good",
  "backing-off": "wrong" };

/** The flatten rules, and what they saw last. */
export function rules(state) {
  if (!state.rules.length)
    return h("p", { class: "none" }, "The configuration has no [[flatten]] rule.");
  return h("div", { class: "cards" }, state.rules.map((each) => h("article",
    { class: "card", key: `rule ${each.number}` },
    h("header", {}, h("h3", {}, `${each.rule.disk} of ${each.rule.vm}`),
      badge("quiet", `keeps ${each.rule.keep} layers`)),
    facts(["flattened when", [each.rule.depth && `more than ${each.rule.depth} layers`,
      each.rule.overlay_size && `more than ${size(each.rule.overlay_size)} of overlays`]
      .filter(Boolean).join(", or ")],
    ["last look", each.last_look && `${moment(each.last_look)}`
      + (each.last_result ? `: ${each.last_result}` : "")],
    ["next look", each.next_look && `in ${span(each.next_look - state.now())}`]),
    h("ul", { class: "members" }, each.disks.map((disk) => h("li",
      { key: `${disk.vm} ${disk.disk}` },
      h("div", { class: "line" }, h("strong", {}, `${disk.disk} of ${disk.vm}`),
        badge(RULES[disk.state] ?? "", disk.state)),
      h("p", { class: "small" }, `${disk.layers} layers, ${size(disk.overlay_size)} above the base`,
        disk.why && `: ${disk.why}`, disk.not_before
          && `; tried again in ${span(disk.not_before - state.now())}`)))),
    Object.entries(each.away).map(([vm, why]) => h("p", { class: "error", key: vm },
      `${vm}: ${why}`)))));
}

// -- what has ended -------------------------------------------------------------------------------

const ENDS = { done: "good", failed: "wrong", cancelled: "quiet" };

/** What has ended lately: commits, groups and windows, the newest first. */
export function ended(state) {
  const commits = state.commits.filter((commit) => commit.ended && !commit.group)
    .map((commit) => ({ ...commit, what: named(commit), key: `commit ${commit.id}` }));
  const groups = state.groups.filter((group) => group.ended).map((group) => ({
    ...group, key: `group ${group.id}`,
    what: `group: ${group.members.map((one) => `${one.disk} of ${one.vm}`).join(", ")}`,
  }));
  const closed = state.windows.filter((window) => window.ended).map((window) => ({
    ...window, key: `window ${window.id}`, what: `window on ${window.vm.split(",").join(", ")}`,
  }));
  const all = [...commits, ...groups, ...closed].sort((a, b) => b.ended - a.ended);
  if (!all.length) return h("p", { class: "none" }, "Nothing has ended yet.");
  return h("ul", { class: "ended" }, all.slice(0, LATELY).map((each) => {
    const { outcome, error } = each;
    const result = error ? error.type : outcome?.action ?? each.state;
    const outcomes = outcome?.outcomes ?? (outcome ? [outcome] : each.outcomes ?? []);
    const stale = outcomes.flatMap((one) => one.invalidated ?? []);
    const deleted = outcomes.flatMap((one) => one.deleted ?? []);
    const warnings = [...outcome?.warnings ?? [], ...outcome?.outcomes
      ? outcomes.flatMap((one) => one.warnings) : []];
    return h("li", { key: each.key }, h("details", {},
      h("summary", {}, h("time", {}, moment(each.ended)), " ",
        badge(ENDS[each.state] ?? "", result), ` ${each.what}`),
      error && h("p", { class: "error" }, error.message),
      facts(["committed", outcome?.bytes_committed !== undefined
        && size(outcome.bytes_committed)],
      ["took", span(each.ended - each.created)],
      ["I/O held", outcomes.map((one, at) => one.held
        && `${each.members ? named(each.members[at]) : one.disk}: ${span(one.held)}`)
        .filter(Boolean).join(", ")],
      ["guest writes to", outcomes.length > 0 && outcomes[0].active
        && file(outcomes[0].active.filename)],
      ["never boot again", stale.length > 0 && stale.map((name, at) => [at ? ", " : "",
        file(name)])],
      ["deleted", deleted.length > 0 && deleted.map((name, at) => [at ? ", " : "", file(name)])],
      ["decided by", each.decided_by?.who],
      ["asked by", each.asked_by?.who]),
      warnings.map((warning) => h("p", { class: "error", key: warning }, warning))));
  }));
}
