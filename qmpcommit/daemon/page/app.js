// The page: what it knows, when it asks again, and what is shown of it.
import { asking, say } from "./ask.js";
import { ask, follow, text } from "./data.js";
import { bring, h } from "./dom.js";
import { page } from "./manual.js";
import { badge, file, moment } from "./show.js";
import { vms, windowDisks } from "./vms.js";
import { cycles, ended, rules, underWay, waiting, waits, windows } from "./work.js";

const SOON = 120;
const TICK = 1000;
const ALL = 15000;
const AT_ONCE = 2;
const KEPT = 500;
const SAMPLES = 240;
const PATHS = {
  asker: "/ui/asker.json",
  vms: "/v1/vms",
  groups: "/v1/groups?limit=50",
  windows: "/v1/windows?limit=50",
  cycles: "/v1/cycles",
  rules: "/v1/rules",
  losses: "/v1/losses",
};
/** What an event of a kind makes worth being asked for again. */
const CHANGES = {
  vm: ["vms", "asker"],
  commit: ["commits", "groups"],
  group: ["groups", "commits"],
  window: ["windows", "commits"],
  cycle: ["cycles", "commits"],
  flatten: ["rules"],
};

const state = {
  asker: { operates: [], role: "", who: "", host: "", version: "", time: 0 },
  vms: [], commits: [], groups: [], windows: [], cycles: [], rules: [], losses: [],
  disks: new Map(), samples: new Map(), events: [], errors: new Map(),
  filter: "", all: false, known: false, live: null, why: "", unready: "", ahead: 0,
  topics: [], pages: new Map(),
  now: () => Date.now() / 1000 + state.ahead,
};

// -- what is asked for ----------------------------------------------------------------------------

async function load(what) {
  try {
    if (what === "commits") state.commits = await commits();
    else state[what] = await ask(PATHS[what]);
    if (what === "asker") state.ahead = state.asker.time - Date.now() / 1000;
    if (what === "windows") state.windows.forEach(grow);
    state.errors.delete(what);
  } catch (error) {
    state.errors.set(what, error.message);
  }
  draw();
}

/** Those that have not ended, however many came after them, and the newest. */
async function commits() {
  const lists = await Promise.all(["state=running&limit=500", "state=queued&limit=500", "limit=60"]
    .map((which) => ask(`/v1/commits?${which}`)));
  const before = new Map(state.commits.map((commit) => [commit.id, commit]));
  const news = before.size > 0 || state.known;
  state.known = true;
  const found = new Map();
  for (const commit of lists.flat()) {
    const progress = commit.progress ?? before.get(commit.id)?.progress ?? null;
    if (news && waits(commit) && before.get(commit.id)?.phase !== "ready")
      say(`${commit.disk} of ${commit.vm} is READY, and waits for a decision`);
    found.set(commit.id, { ...commit, progress });
  }
  return [...found.values()];
}

async function look(name) {
  const path = `/v1/vms/${encodeURIComponent(name)}`;
  try {
    const [found, jobs] = await Promise.all([ask(`${path}/disks`), ask(`${path}/jobs`)]);
    for (const job of jobs) {
      const before = state.disks.get(name)?.jobs?.find((one) => one.device === job.device);
      job.seen = job.ready ? before?.seen ?? Date.now() / 1000 : null;
    }
    state.disks.set(name, { found, jobs, error: "", at: Date.now() });
  } catch (error) {
    state.disks.set(name, { ...state.disks.get(name), error: error.message, at: Date.now() });
  }
  draw();
}

async function ready() {
  try {
    const { warnings } = await ask("/readyz");
    state.unready = warnings.join("; ");
  } catch (error) {
    state.unready = error.status ? `the daemon takes no new commits: ${error.message}` : "";
  }
}

/** Looks at the disks of those VMs that are on the screen and connected. */
const onScreen = new Set();
const looking = () => state.vms.filter((vm) => onScreen.has(vm.name) && vm.state === "connected")
  .map((vm) => vm.name);

/** Those connected VMs that were not looked at for longest: nobody's READY job is to be missed. */
function nextInTurn() {
  const age = (vm) => state.disks.get(vm.name)?.at ?? 0;
  return state.vms.filter((vm) => vm.state === "connected" && age(vm) < Date.now() - ALL)
    .sort((a, b) => age(a) - age(b)).slice(0, AT_ONCE).map((vm) => vm.name);
}

async function everything() {
  await Promise.all([...Object.keys(PATHS), "commits"].map(load).concat(ready()));
  await Promise.all(looking().map(look));
}

/** Once, a moment after the last of several asks for it. */
function soon(task) {
  const due = new Set();
  let timer = null;
  return (...what) => {
    what.forEach((each) => due.add(each));
    timer ??= setTimeout(() => {
      timer = null;
      const now = [...due];
      due.clear();
      now.forEach(task);
    }, SOON);
  };
}

const loadSoon = soon(load);
const lookSoon = soon(look);

function sample(key, bytes) {
  const kept = state.samples.get(key) ?? [];
  kept.push([Date.now() / 1000, bytes]);
  // Thinned out where it is long, so that the plot begins where the copy did.
  state.samples.set(key, kept.length > SAMPLES
    ? kept.filter((_, at) => at % 2 === 0 || at === kept.length - 1) : kept);
}

const grow = (window) => windowDisks(window).forEach((disk) => {
  if (disk.size !== null) sample(`${window.id} ${disk.overlay}`, disk.size);
});

let ticks = 0;

async function tick() {
  ticks += 1;
  const running = state.commits.filter((commit) => commit.state === "running"
    && (commit.phase !== "ready" || commit.group || ticks % 5 === 0));
  const open = ticks % 2 ? [] : state.windows.filter((each) => each.state === "open");
  await Promise.all([
    ...nextInTurn().map(look),
    ...running.slice(0, 32).map(async (commit) => {
      const seen = await ask(`/v1/commits/${commit.id}`);
      Object.assign(commit, seen);
      if (seen.progress) sample(commit.id, seen.progress.total - seen.progress.current);
    }),
    ...open.slice(0, 32).map(async (window) => {
      Object.assign(window, await ask(`/v1/windows/${window.id}`));
      grow(window);
    }),
  ].map((each) => each.catch(() => {}))); // what is away is told by the stream of events
}

// -- what is told ---------------------------------------------------------------------------------

const begun = Date.now() / 1000;

function told(event) {
  state.events.unshift(event);
  state.events.length = Math.min(state.events.length, KEPT);
  const past = event.at < begun + state.ahead - 5;
  if (!past) {
    loadSoon(...(CHANGES[event.kind] ?? ["commits", "windows"]));
    const near = new Set(looking());
    lookSoon(...String(event.vm ?? "").split(",").filter((vm) => near.has(vm)));
  }
  draw();
}

function live(is, why) {
  if (is && state.live === false) everything();
  state.live = is;
  state.why = why;
  draw();
}

// -- what is shown --------------------------------------------------------------------------------

const actions = {
  look,
  all: () => {
    state.all = true;
    draw();
  },
  refresh: () => {
    loadSoon("commits", "groups", "windows");
    lookSoon(...looking());
    draw();
    if (document.activeElement === document.body) document.getElementById("said").focus();
  },
};

const section = (title, ...shown) => h("section", { key: title },
  h("h2", {}, title), ...shown);

function overview() {
  return [
    state.losses.map((loss) => h("p", { class: "notice", key: `loss ${loss.at}` },
      `A damaged journal was set aside at ${moment(loss.at)}: ${loss.why}; `
      + `${loss.promises.length} promises may be lost. It is kept as `, file(loss.kept))),
    state.unready && h("p", { class: "notice", key: "unready" }, state.unready),
    [...state.errors].map(([what, why]) => h("p", { class: "notice", key: `error ${what}` },
      `${what}: ${why}`)),
    section("Commits under way", underWay(state, actions)),
    section("Windows", windows(state, actions)),
    section("VMs", vms(state, actions)),
    section("Ended lately", ended(state)),
  ];
}

const schedules = () => [
  section("Golden cycles", cycles(state)),
  section("Flatten rules", rules(state)),
];

function summary(event) {
  if (event.kind === "vm") return event.change ?? event.state;
  const words = [event.disk, event.state, event.phase !== event.state && event.phase,
    event.outcome?.action, event.why, event.stalled && `stalls on ${event.stalled}`,
    event.error && (event.error.message ?? event.error.type)];
  return words.filter(Boolean).join(", ");
}

const log = () => [section("Events",
  h("p", { class: "small" }, "The newest first, as they become durable."),
  state.events.length
    ? h("ol", { class: "log" }, state.events
      .filter((event) => String(event.vm ?? "").includes(state.filter))
      .map((event) => h("li", { key: `event ${event.number}` }, h("time", {}, moment(event.at)),
        h("span", {}, badge("quiet", event.kind)), h("strong", {}, event.vm),
        h("span", {}, summary(event)))))
    : h("p", { class: "none" }, "Nothing has happened yet."))];

function manual(topic) {
  if (!state.topics.length) ask("/ui/manual.json").then((found) => {
    state.topics = found;
    draw();
  }, () => {});
  if (topic && !state.pages.has(topic)) {
    state.pages.set(topic, "");
    text(`/ui/manual/${encodeURIComponent(topic)}.md`).then((found) => {
      state.pages.set(topic, found);
      draw();
    }, (error) => {
      state.pages.set(topic, error.message);
      draw();
    });
  }
  return [h("div", { class: "manual" },
    h("nav", { "aria-label": "topics of the manual" }, h("ul", {}, state.topics.map((each) => h(
      "li", { key: each.name }, h("a", { href: `#manual/${each.name}`,
        "aria-current": each.name === topic ? "page" : null }, h("strong", {}, each.name), " ",
      each.title))))),
    h("article", { class: "page", key: `page ${topic}` }, topic ? page(state.pages.get(topic))
      : h("p", {}, "Choose a topic. 'qmpcommit help TOPIC' shows the same pages in a terminal.")))];
}

const VIEWS = { "": overview, schedules, log, manual };

function view() {
  const [name, topic] = location.hash.slice(1).split("/");
  return VIEWS[name] ? [name, topic && /^\w+$/.test(topic) ? topic : ""] : ["", ""];
}

let drawing = false;

function draw() {
  if (drawing || document.hidden) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const [name, topic] = view();
    const main = document.getElementById("view");
    const made = h("main", { id: "view", tabindex: "-1", class: `view-${name || "overview"}` }, VIEWS[name](topic));
    bring(main, made);
    for (const link of document.querySelectorAll("#views a")) {
      if (link.hash.slice(1) === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    header();
    for (const each of main.querySelectorAll("[data-vm]")) seen.observe(each);
  });
}

function header() {
  const { who, role, host, version } = state.asker;
  const many = waiting(state);
  document.title = `${many ? `(${many} READY) ` : ""}qmpcommit${host ? ` on ${host}` : ""}`;
  bring(document.getElementById("where"), h("span", { id: "where" }, host));
  bring(document.getElementById("asker"), h("span", { id: "asker" },
    who && `${who}: ${role}`, version && ` · ${version}`));
  const line = state.live === null ? badge("quiet", "connecting")
    : state.live ? badge("good", "live") : badge("wrong", "not live");
  bring(document.getElementById("live"), h("span", { id: "live" }, line,
    state.live === false && ` ${state.why}; what is shown may be old. Trying again`));
  document.getElementById("filter").hidden = !["", "log"].includes(view()[0]);
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    const { vm } = entry.target.dataset;
    if (!entry.isIntersecting) onScreen.delete(vm);
    else {
      onScreen.add(vm);
      if (looking().includes(vm)) lookSoon(vm);
    }
  }
});

// -- from here on it lives ------------------------------------------------------------------------

document.getElementById("wanted").oninput = (event) => {
  state.filter = event.target.value.trim();
  draw();
};

addEventListener("hashchange", () => {
  draw();
  scrollTo(0, 0);
  document.getElementById("view").focus({ preventScroll: true });
});

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) everything();
});

async function every(pause, task) {
  for (;;) {
    await new Promise((done) => setTimeout(done, pause));
    if (!document.hidden) {
      await task();
      draw();
    }
  }
}

draw();
everything();
follow(told, live);
every(TICK, tick);
every(ALL, async () => {
  if (!asking()) await everything();
});
