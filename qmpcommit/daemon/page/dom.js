// Elements, made of data. Whatever comes from QEMU, from files or from people is put in as text:
// nothing here, and nothing that uses this, reads markup.

const SVG = "http://www.w3.org/2000/svg";
const DRAWN = new Set(["svg", "path", "line", "rect"]);

/** An element: `given` has its attributes, its `key` among its siblings, and its handlers. */
export function h(tag, given = {}, ...children) {
  const made = DRAWN.has(tag)
    ? document.createElementNS(SVG, tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name.startsWith("on")) made[name] = value;
    else if (name === "key") made.dataset.key = value;
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined)
      made.setAttribute(name, value);
  }
  for (const child of children.flat(Infinity)) {
    if (child === null || child === undefined || child === false || child === "") continue;
    made.append(child instanceof Node ? child : document.createTextNode(String(child)));
  }
  return made;
}

/** Make what is shown like what was made: what is the same stays, with its focus and its state. */
export function bring(shown, made) {
  for (const { name } of [...shown.attributes])
    if (!made.hasAttribute(name) && !kept(shown, name)) shown.removeAttribute(name);
  for (const { name, value } of [...made.attributes])
    if (shown.getAttribute(name) !== value && !kept(shown, name)) shown.setAttribute(name, value);
  for (const handler of ["onclick", "onchange", "oninput", "ontoggle"])
    if (shown[handler] !== made[handler]) shown[handler] = made[handler];
  children(shown, [...made.childNodes]);
}

// Whether a person has opened it is theirs.
const kept = (shown, name) => shown.nodeName === "DETAILS" && name === "open";

function children(shown, wanted) {
  const keyed = new Map();
  for (const each of shown.children) if (each.dataset?.key) keyed.set(each.dataset.key, each);
  let place = shown.firstChild;
  for (const made of wanted) {
    const key = made.dataset?.key;
    let same = key ? keyed.get(key) : place;
    if (key === undefined && same?.dataset?.key) same = null;
    if (!same || same.nodeName !== made.nodeName) {
      shown.insertBefore(made, place);
      continue;
    }
    if (same === place) place = place.nextSibling;
    else shown.insertBefore(same, place);
    if (same.nodeType === Node.TEXT_NODE) {
      if (same.data !== made.data) same.data = made.data;
    } else bring(same, made);
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}
