// The manual's markdown as elements: what it has of that, and nothing else; markup in it is text.
import { h } from "./dom.js";

/** The pieces of a line: code, strong words, links to other pages of the manual. */
function words(text) {
  const found = [];
  const pattern = /`([^`]+)`|\*\*([^*]+)\*\*|\*([^*\s][^*]*)\*|\[([^\]]+)\]\(([^)\s]+)\)/g;
  let last = 0;
  for (const match of text.matchAll(pattern)) {
    found.push(text.slice(last, match.index));
    last = match.index + match[0].length;
    const [, code, strong, stressed, label] = match;
    if (code !== undefined) {
      const topic = /^qmpcommit help (\w+)$/.exec(code);
      found.push(topic ? h("a", { href: `#manual/${topic[1]}` }, h("code", {}, code))
        : h("code", {}, code));
    } else if (strong !== undefined) found.push(h("strong", {}, words(strong)));
    else if (stressed !== undefined) found.push(h("em", {}, words(stressed)));
    else found.push(label);
  }
  found.push(text.slice(last));
  return found;
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/)
  .map((cell) => cell.trim().replaceAll("\\|", "|"));

/** A page as a list of elements. */
export function page(text) {
  const lines = text.split("\n");
  const made = [];
  let at = 0;
  const gather = (more) => {
    const found = [lines[at]];
    at += 1;
    while (at < lines.length && more(lines[at])) {
      found.push(lines[at]);
      at += 1;
    }
    return found;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) at += 1;
    else if (line.startsWith("```")) {
      const code = gather((next) => !next.startsWith("```")).slice(1);
      at += 1;
      made.push(h("pre", { tabindex: "0" }, h("code", {}, code.join("\n"))));
    } else if (line.startsWith("<!--")) gather(() => !lines[at - 1].includes("-->"));
    else if (/^#+ /.test(line)) {
      const [, marks, title] = /^(#+) (.*)$/.exec(line);
      made.push(h(`h${Math.min(4, marks.length + 1)}`, {}, words(title)));
      at += 1;
    } else if (line.startsWith("|")) made.push(table(gather((next) => next.startsWith("|"))));
    else if (/^([*-]|\d+\.) /.test(line)) {
      made.push(list(gather((next) => next.trim() && !/^(```|#|\|)/.test(next))));
    } else {
      made.push(h("p", {}, words(gather((next) => next.trim()
        && !/^(```|#|\||([*-]|\d+\.) )/.test(next)).join(" "))));
    }
  }
  return made;
}

function table([head, , ...rows]) {
  const titles = cells(head);
  return h("div", { class: "wide", tabindex: "0", role: "group", "aria-label": "table" },
    h("table", {},
      titles.some(Boolean) && h("thead", {}, h("tr", {},
        titles.map((title) => (title ? h("th", { scope: "col" }, words(title)) : h("td", {}))))),
      h("tbody", {}, rows.map((row) => h("tr", {},
        cells(row).map((cell) => h("td", {}, words(cell))))))));
}

function list(lines) {
  const items = [];
  for (const line of lines) {
    const begun = /^(\s*)([*-]|\d+\.) (.*)$/.exec(line);
    if (!begun) items.at(-1).text += ` ${line.trim()}`;
    else if (begun[1] && items.length) items.at(-1).inner.push(begun[3]);
    else items.push({ text: begun[3], inner: [] });
  }
  const ordered = /^\d/.test(lines[0]);
  return h(ordered ? "ol" : "ul", {}, items.map(({ text, inner }) => h("li", {}, words(text),
    inner.length > 0 && h("ul", {}, inner.map((each) => h("li", {}, words(each)))))));
}
