// The question before anything is decided, and what came of it.
import { ask } from "./data.js";
import { h } from "./dom.js";

const dialog = () => document.getElementById("question");
let fading;
const said = () => document.getElementById("said");

/** Say something, to who does not see it too. */
export function say(text, wrong = false) {
  clearTimeout(fading);
  if (text && !wrong) fading = setTimeout(say, 20000, "");
  said().className = wrong ? "wrong" : "";
  said().textContent = text;
}

/**
 * Ask whether to do it, and do it where a person says so.
 *
 * `title` is what is done to which disk of which VM, `lines` what that does to files, `word` the
 * button's. Escape, and the button that has the focus first, leave everything as it is.
 */
export function question({ title, lines, word, grave = false, path, method = "POST", body, done }) {
  const box = dialog();
  const leave = h("button", { type: "button", autofocus: true }, "Leave it as it is");
  const go = h("button", { type: "button", class: grave ? "grave" : "go" }, word);
  leave.onclick = () => box.close();
  go.onclick = async () => {
    go.disabled = true;
    go.textContent = "Asking the daemon …";
    try {
      await ask(path, method, body);
      say(`${title}: the daemon has taken it.`);
    } catch (error) {
      say(`${title}: not done: ${error.message}`, true);
    }
    box.close();
    done();
  };
  box.replaceChildren(
    h("h2", { id: "question-title" }, title),
    ...lines.map((line) => h("p", {}, line)),
    h("div", { class: "buttons" }, leave, go),
  );
  box.showModal();
}

/** Whether a question is being asked. */
export const asking = () => dialog().open;
